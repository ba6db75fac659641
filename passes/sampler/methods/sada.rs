//! Steps are left out where sampling goes straight: by vote in the first part, at a fixed stride in the second.
//!
//! The votes are those of the stability criterion on calibration runs. Forecasts are of the prediction.
//! Source: Jiang et al. 2025, SADA, arXiv:2507.17135.

use super::{Calibration, Forecast, Method, Options, PlanContext, Stages, calibration::Path, substitute};
use crate::{
    Opt,
    sampler::{Error, StepPlan, Substitution},
};

pub(super) const METHOD: Method = Method {
    name: "sada",
    summary: "skips steps that are stable",
    doc: "The prediction is forecast where sampling goes straight: in the first part where the criterion of stability holds in \
          enough runs of the plain loop, in the second at a fixed stride. Where the parts begin is stretched from 50 steps.",
    options: &[
        Opt {
            name: "stride",
            unit: "a number",
            default: "4",
            doc: "one of so many steps of the second part is computed",
        },
        Opt { name: "nodes", unit: "a number", default: "4", doc: "computed steps that its forecasts look back to" },
        Opt { name: "agreement", unit: "a number", default: "0.7", doc: "the share of runs that must be stable" },
        Opt { name: "longest", unit: "a number", default: "4", doc: "the most steps in a row that are left out" },
    ],
    stages: Stages::One,
    source: "Jiang et al. 2025, SADA, arXiv:2507.17135",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let steps = plan.grid.len();
    let settings = Sada {
        stride: options.get("stride")?,
        nodes: options.get("nodes")?,
        agreement: options.get("agreement")?,
        longest: options.get("longest")?,
        ..Sada::stretched(steps)
    };
    sada(plan, &cx.parts.output, &stable(cx.calibration, steps)?, &settings)
}

/// At every step the share of samples for which the step can be left out by the criterion of stability.
fn stable(calibration: &Calibration, steps: usize) -> Result<Vec<f64>, Error> {
    let paths = calibration.paths()?;
    // The time of the flow: its noise over signal and noise together.
    let times: Vec<f64> = calibration.table().rows.iter().map(|row| -row.estimate[1] / row.flow.flow[1]).collect();
    let mut votes = vec![0.0; steps];
    for Path { states, flows } in &paths {
        for step in 2..steps.saturating_sub(1) {
            let gradients = [&flows[step][..], &flows[step - 1], &flows[step - 2]];
            let width = times[step] - times[step + 1];
            if is_stable(&states[step + 1], &states[step], gradients, width) {
                votes[step + 1] += 1.0;
            }
        }
    }
    Ok(votes.into_iter().map(|v| v / paths.len().max(1) as f64).collect())
}

/// Where which rule holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sada {
    /// No step before this one is left out; at least 3, because the criterion looks back.
    pub start: usize,
    /// From this step on the stride decides.
    pub switch: usize,
    /// From this step on every step is computed.
    pub end: usize,
    /// One of so many steps is computed in the second part.
    pub stride: usize,
    /// How many computed steps a forecast of the second part looks back to.
    pub nodes: usize,
    /// The share of runs that must be stable for a step of the first part to be left out.
    pub agreement: f64,
    /// The most steps in a row that are left out.
    pub longest: usize,
}

impl Sada {
    /// The settings of the paper for 50 steps, stretched.
    pub fn stretched(steps: usize) -> Sada {
        let at = |step: usize| (step * steps + 25) / 50;
        Sada { start: at(10).max(3), switch: at(24), end: at(47), stride: 4, nodes: 4, agreement: 0.7, longest: 4 }
    }
}

/// Writes the entries. `stable[step]` is the share of runs in which the criterion allows to leave the step out.
pub fn sada(plan: &mut StepPlan, output: &str, stable: &[f64], options: &Sada) -> Result<(), Error> {
    let steps = plan.grid.len();
    if stable.len() != steps || options.start < 3 || options.stride == 0 {
        let message = format!(
            "{} votes for {steps} steps, a start of {}, a stride of {}",
            stable.len(),
            options.start,
            options.stride
        );
        return Err(Error::Plan(message));
    }
    let (mut before, mut run) = (Vec::new(), 0);
    for (step, &votes) in stable.iter().enumerate() {
        let open = (options.start..options.end).contains(&step) && run < options.longest && step + 1 < steps;
        let early = step < options.switch;
        let leave = open
            && match early {
                true => votes >= options.agreement,
                false => !step.is_multiple_of(options.stride),
            };
        if !leave {
            before.insert(0, step);
            run = 0;
            continue;
        }
        run += 1;
        let how = if early { Forecast::Taylor(1) } else { Forecast::Lagrange(options.nodes) };
        if let Some(kind) = how.kind(&before) {
            substitute(plan, step, Substitution::new(output, kind))?;
        }
    }
    Ok(())
}

/// Whether sampling goes straight at a step: the difference between the solver's state and one extrapolated along earlier
/// gradients points against the gradients' second difference.
///
/// `gradients` are those of this step and of the two before it; `next` is the state after this step, `state` before it,
/// `width` the length of the step in the time of the gradients.
fn is_stable(next: &[f64], state: &[f64], gradients: [&[f64]; 3], width: f64) -> bool {
    let sum: f64 = (0..next.len())
        .map(|k| {
            let [y0, y1, y2] = gradients.map(|g| g[k]);
            let extrapolated = state[k] - width * (0.625 * y0 + 0.75 * y1 - 0.375 * y2);
            (next[k] - extrapolated) * (y0 - 2.0 * y1 + y2)
        })
        .sum();
    sum <= 0.0
}

#[cfg(test)]
mod tests {
    use super::super::testing::guided;
    use super::*;
    use crate::sampler::Kind;

    fn shown(plan: &StepPlan) -> String {
        (0..plan.grid.len()).map(|i| if plan.at(i).is_empty() { 'x' } else { '.' }).collect()
    }

    #[test]
    fn votes_decide_early_and_the_stride_late() {
        let options = Sada { start: 3, switch: 8, end: 18, stride: 4, nodes: 4, agreement: 0.7, longest: 4 };
        let mut plan = guided(20);
        let votes: Vec<f64> = (0..20).map(|i| if i % 2 == 0 { 0.9 } else { 0.5 }).collect();
        sada(&mut plan, "eps", &votes, &options).unwrap();
        plan.check().unwrap();
        assert_eq!(shown(&plan), "xxxx.x.xx...x...x.xx");
        assert_eq!(plan.at(4)[0].kind, Kind::Taylor { order: 1, refs: vec![3, 2] });
        assert_eq!(plan.at(13)[0].kind, Kind::Lagrange { refs: vec![12, 8, 7, 5] });
        let mut all = guided(20);
        sada(&mut all, "eps", &[1.0; 20], &options).unwrap();
        // Four in a row are the most.
        assert_eq!(shown(&all), "xxx....xx...x...x.xx");
        assert!(sada(&mut guided(20), "eps", &[1.0; 3], &options).is_err());
    }

    #[test]
    fn straight_lines_are_stable() {
        let ones = [1.0; 4];
        assert!(is_stable(&[-1.0; 4], &[0.0; 4], [&ones; 3], 1.0));
        let (late, early) = ([2.0; 4], [0.0; 4]);
        // The second difference is positive, and the state lies above what is extrapolated.
        assert!(!is_stable(&[0.0; 4], &[0.0; 4], [&late, &early, &early], 1.0));
    }

    #[test]
    fn settings_stretch_with_the_steps() {
        let found = Sada::stretched(25);
        assert_eq!((found.start, found.switch, found.end), (5, 12, 24));
    }
}
