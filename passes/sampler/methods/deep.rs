//! Deep tensors of a UNet are kept between steps.

use super::{Method, Options, PlanContext, Stages, context::missing, forecasting};
use crate::{
    Opt,
    sampler::{Error, StepPlan},
};

pub(super) const METHOD: Method = Method {
    name: "deep",
    summary: "keeps what comes from below at a skip of a UNet",
    doc: "What comes from below at one skip connection of a UNet is kept from the last computed step, so that everything deeper \
          is left out.",
    options: &[
        SKIP,
        forecasting::EVERY,
        Opt { name: "first", unit: "a number", default: "1", doc: "first steps that are always computed" },
    ],
    stages: Stages::Any,
    source: "Ma et al. 2023, DeepCache, arXiv:2312.00858",
    apply,
};

/// Which skip.
pub(super) const SKIP: Opt =
    Opt { name: "skip", unit: "a number", default: "0", doc: "which skip connection, 0 the shallowest" };

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let cut = below(METHOD.name, options, cx)?;
    let computed = forecasting::every(options.get("every")?, options.get("first")?, plan.grid.len());
    forecasting::forecast(plan, &[cut], &computed, forecasting::Forecast::Reuse)
}

/// What comes from below at the skip that the options name.
pub(super) fn below(method: &str, options: &Options, cx: &PlanContext) -> Result<String, Error> {
    cx.parts.deep.get(options.get::<usize>("skip")?).cloned().ok_or_else(|| missing(method, "such a skip"))
}
