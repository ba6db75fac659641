//! What the last repeated block gives is forecast from earlier steps.

use super::{Method, Options, PlanContext, Stages, forecasting};
use crate::sampler::{Error, StepPlan};

pub(super) const METHOD: Method = Method {
    name: "stack",
    summary: "forecasts what the last block gives",
    doc: "The repeated blocks are left out at most steps: what the last of them gives is forecast from computed steps. What \
          comes before and after them is computed at every step.",
    options: &forecasting::options("3", "1"),
    stages: Stages::Any,
    source: "Liu et al. 2025, TaylorSeer, arXiv:2503.06923",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let last = cx.parts.borders.last().map(Vec::as_slice).unwrap_or_default();
    let cuts = cx.cuts(METHOD.name, "repeated blocks", last)?;
    forecasting::forecast_as(plan, &cuts, options)
}
