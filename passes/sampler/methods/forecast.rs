//! The prediction of steps is forecast from earlier ones.

use super::{Method, Options, PlanContext, Stages, forecasting};
use crate::sampler::{Error, StepPlan};

pub(super) const METHOD: Method = Method {
    name: "forecast",
    summary: "forecasts the prediction",
    doc: "The network is not run at most steps: its prediction is forecast from computed steps. This is the variant of \
          TaylorSeer that keeps one tensor.",
    options: &forecasting::options("3", "1"),
    stages: Stages::Any,
    source: "Liu et al. 2025, TaylorSeer, arXiv:2503.06923",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    forecasting::forecast_as(plan, std::slice::from_ref(&cx.parts.output), options)
}
