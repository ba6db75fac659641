//! What attention and MLPs add to their stream is forecast from earlier steps.

use super::{Method, Options, PlanContext, Stages, forecasting};
use crate::sampler::{Error, StepPlan};

pub(super) const METHOD: Method = Method {
    name: "arms",
    summary: "forecasts what attention and MLPs give",
    doc: "What attention and MLPs add to their stream is kept from computed steps, or forecast from several. With the order 0 \
          these are the caches of FORA and EfficientVLA, with slopes that of TaylorSeer.",
    options: &forecasting::options("1", "0"),
    stages: Stages::Any,
    source: "Selvaraju et al. 2024, FORA, arXiv:2407.01425; Yang et al. 2025, EfficientVLA, arXiv:2506.10100; Liu et al. 2025, TaylorSeer, arXiv:2503.06923",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let cuts = cx.cuts(METHOD.name, "repeated blocks", &cx.parts.arms)?;
    forecasting::forecast_as(plan, &cuts, options)
}
