//! Tensors of steps that are not computed, forecast from steps that are: what several methods share.
//!
//! With the outputs of attention and MLPs and no slope these are the caches of Selvaraju et al. 2024, FORA, arXiv:2407.01425,
//! and of Yang et al. 2025, EfficientVLA, arXiv:2506.10100; with slopes that of Liu et al. 2025, TaylorSeer, arXiv:2503.06923;
//! with the prediction alone its variant that keeps one tensor.

use super::{Options, substitute};
use crate::{
    Opt,
    sampler::{Error, Kind, StepPlan, Substitution},
};

/// The options of a method that forecasts tensors, by default from so many first steps and of such an order.
pub(super) const fn options(first: &'static str, order: &'static str) -> [Opt; 4] {
    [
        EVERY,
        Opt { name: "first", unit: "a number", default: first, doc: "first steps that are always computed" },
        Opt {
            name: "order",
            unit: "a number",
            default: order,
            doc: "the order of the Taylor series; 0 takes the last value",
        },
        Opt {
            name: "points",
            unit: "a number",
            default: "",
            doc: "computed steps that a polynomial is laid through, in the place of a Taylor series",
        },
    ]
}

/// How often a tensor is computed.
pub(super) const EVERY: Opt =
    Opt { name: "every", unit: "a number", default: "3", doc: "one of so many steps is computed" };

/// Lets `cuts` be forecast as these options say.
pub(super) fn forecast_as(plan: &mut StepPlan, cuts: &[String], options: &Options) -> Result<(), Error> {
    let how = match (options.optional("points")?, options.get("order")?) {
        (Some(points), _) => Forecast::Lagrange(points),
        (None, 0) => Forecast::Reuse,
        (None, order) => Forecast::Taylor(order),
    };
    let computed = every(options.get("every")?, options.get("first")?, plan.grid.len());
    forecast(plan, cuts, &computed, how)
}

/// How a tensor is forecast. Where there are too few computed steps before it, by a lower order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forecast {
    /// By its last value.
    Reuse,
    /// By a Taylor series of this order.
    Taylor(usize),
    /// By the polynomial through so many last values.
    Lagrange(usize),
}

impl Forecast {
    /// The entry for a step, given the computed steps before it, the latest first; `None` if there are none.
    pub fn kind(self, before: &[usize]) -> Option<Kind> {
        let (&from, _) = before.split_first()?;
        let some = |count: usize| before[..count.clamp(1, before.len())].to_vec();
        Some(match self {
            Forecast::Taylor(order) if order > 0 && before.len() > 1 => {
                let refs = some(order + 1);
                Kind::Taylor { order: refs.len() - 1, refs }
            }
            Forecast::Lagrange(count) if count > 1 && before.len() > 1 => Kind::Lagrange { refs: some(count) },
            _ => Kind::Reuse { from },
        })
    }

    /// The forecast for a step as a weighted sum of values at computed steps, given those, the latest first.
    pub fn terms(self, before: &[usize], step: usize) -> Vec<(usize, f64)> {
        let kind = self.kind(before).map(|kind| Substitution::new(String::new(), kind));
        let terms = kind.and_then(|one| one.terms(step)).unwrap_or_default();
        terms.into_iter().map(|(r, weight)| (r.step, weight)).collect()
    }
}

/// Which of `steps` are computed: the `first` ones, the last one, and between them every `interval`-th.
pub fn every(interval: usize, first: usize, steps: usize) -> Vec<bool> {
    let interval = interval.max(1);
    let computed = |step: usize| step < first || (step + 1 - first).is_multiple_of(interval) || step + 1 == steps;
    (0..steps).map(computed).collect()
}

/// Lets `cuts` be forecast at every step that is not in `computed`, from computed steps of the same stage. The first step of
/// a stage is computed in any case.
pub fn forecast(plan: &mut StepPlan, cuts: &[String], computed: &[bool], how: Forecast) -> Result<(), Error> {
    if computed.len() != plan.grid.len() || computed.first() == Some(&false) || cuts.is_empty() {
        let (steps, given) = (plan.grid.len(), computed.len());
        let message = format!(
            "{given} decisions and {} tensors for {steps} steps, expected one for each and the first step computed",
            cuts.len()
        );
        return Err(Error::Plan(message));
    }
    let mut before = Vec::new();
    for (step, &full) in computed.iter().enumerate() {
        if plan.begins_stage(step) {
            before.clear();
        }
        if full {
            before.insert(0, step);
            continue;
        }
        let Some(kind) = how.kind(&before) else {
            before.insert(0, step);
            continue;
        };
        for cut in cuts {
            substitute(plan, step, Substitution::new(cut.clone(), kind.clone()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{guided, parts};
    use super::*;

    #[test]
    fn intervals_begin_after_the_first_steps() {
        let shown = |interval, first, steps| {
            every(interval, first, steps).iter().map(|&c| if c { 'x' } else { '.' }).collect::<String>()
        };
        assert_eq!(shown(3, 3, 10), "xxx..x..xx");
        assert_eq!(shown(1, 0, 3), "xxx");
        assert_eq!(shown(2, 1, 6), "x.x.xx");
    }

    #[test]
    fn options_say_how_tensors_are_forecast() {
        const OPTIONS: [Opt; 4] = options("1", "0");
        let kind = |text: &str| {
            let mut plan = guided(5);
            forecast_as(&mut plan, &["eps".to_owned()], &Options::parse("arms", &OPTIONS, text).unwrap()).unwrap();
            plan.at(3)[0].kind.clone()
        };
        assert_eq!(kind("every=2"), Kind::Reuse { from: 2 });
        assert_eq!(kind("every=2,order=1"), Kind::Taylor { order: 1, refs: vec![2, 0] });
        assert_eq!(kind("every=2,points=2"), Kind::Lagrange { refs: vec![2, 0] });
    }

    #[test]
    fn orders_rise_with_what_there_is() {
        let (mut plan, cuts) = (guided(6), vec!["eps".to_owned()]);
        forecast(&mut plan, &cuts, &[true, false, true, false, true, false], Forecast::Taylor(2)).unwrap();
        plan.check().unwrap();
        let kind = |step: usize| plan.at(step)[0].kind.clone();
        assert_eq!(kind(1), Kind::Reuse { from: 0 });
        assert_eq!(kind(3), Kind::Taylor { order: 1, refs: vec![2, 0] });
        assert_eq!(kind(5), Kind::Taylor { order: 2, refs: vec![4, 2, 0] });
    }

    #[test]
    fn all_arms_are_kept_together() {
        let mut plan = guided(4);
        forecast(&mut plan, &parts(2).arms, &every(3, 1, 4), Forecast::Reuse).unwrap();
        assert_eq!(plan.at(1).len(), 4);
        assert_eq!((plan.at(0).len(), plan.at(3).len()), (0, 0));
        // Two methods do not share a tensor at one step.
        let again = forecast(&mut plan, &parts(1).arms, &every(3, 1, 4), Forecast::Reuse);
        assert!(again.unwrap_err().to_string().contains("two methods"));
        assert!(forecast(&mut guided(3), &parts(1).arms, &[false, true, true], Forecast::Reuse).is_err());
    }
}
