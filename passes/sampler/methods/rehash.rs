//! Deep tensors of a UNet are kept while they hardly change.
//!
//! Source: Zhan et al. 2024, Fast and memory-efficient video diffusion using streamlined inference, arXiv:2411.01171.

use super::{Method, Options, PlanContext, Stages, calibration::cosine, deep, forecasting};
use crate::{
    Opt,
    sampler::{Error, StepPlan},
};

pub(super) const METHOD: Method = Method {
    name: "rehash",
    summary: "the same while it hardly turns",
    doc: "What comes from below at one skip connection of a UNet is kept while it hardly turns in a run of the plain loop, and \
          computed at every step at which it has turned too far.",
    options: &[
        deep::SKIP,
        Opt { name: "threshold", unit: "a number", default: "0.95", doc: "the cosine below which it is computed" },
        Opt { name: "longest", unit: "a number", default: "4", doc: "the most steps in a row that it is kept" },
    ],
    stages: Stages::One,
    source: "Zhan et al. 2024, Streamlined Inference, arXiv:2411.01171",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let cut = deep::below(METHOD.name, options, cx)?;
    let values = cx.calibration.values(&cut)?;
    let cosine = |from: usize, step: usize| cosine(&values[from], &values[step]);
    let computed = rehash(plan.grid.len(), options.get("threshold")?, options.get("longest")?, &cosine);
    forecasting::forecast(plan, &[cut], &computed, forecasting::Forecast::Reuse)
}

/// Which steps are computed: the first, the last, and every one at which the tensor has turned too far from the last
/// computed one.
///
/// `cosine(from, step)` is the cosine between what the tensor is at both steps on calibration runs. After `longest` steps
/// in a row one is computed in any case.
fn rehash(steps: usize, threshold: f64, longest: usize, cosine: &dyn Fn(usize, usize) -> f64) -> Vec<bool> {
    let mut last = 0;
    let decide = |step: usize| {
        let full = step == 0 || step + 1 == steps || step - last > longest || cosine(last, step) < threshold;
        if full {
            last = step;
        }
        full
    };
    (0..steps).map(decide).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_turns_is_computed() {
        let shown = |threshold, longest| {
            let angle = |step: usize| if step < 4 { 0.5 * step as f64 } else { 2.0 + 0.01 * step as f64 };
            let found = rehash(10, threshold, longest, &|a, b| (angle(a) - angle(b)).cos());
            found.iter().map(|&c| if c { 'x' } else { '.' }).collect::<String>()
        };
        assert_eq!(shown(0.95, 8), "xxxxx....x");
        assert_eq!(shown(0.95, 2), "xxxxx..x.x");
        assert_eq!(shown(-2.0, 8), "x........x");
        assert_eq!(shown(2.0, 8), "xxxxxxxxxx");
    }
}
