//! Guidance ends where both passes agree.
//!
//! Source: Castillo et al. 2023, Adaptive Guidance, arXiv:2312.12487.

use super::{Calibration, Method, Options, PlanContext, Stages, calibration::cosine};
use crate::{
    Opt,
    sampler::{Error, Mode, StepPlan},
};

pub(super) const METHOD: Method = Method {
    name: "gate",
    summary: "ends guidance",
    doc: "Steps from one on run the conditional pass alone. Which one is either given, or found on runs of the plain loop: \
          the first after both passes agree.",
    options: &[
        Opt { name: "at", unit: "a number", default: "", doc: "the first step without guidance; found unless given" },
        Opt { name: "threshold", unit: "a number", default: "0.99", doc: "the cosine at which passes agree" },
        Opt { name: "share", unit: "a number", default: "0.9", doc: "the share of samples in which they must" },
    ],
    stages: Stages::AnyWith("at"),
    source: "Castillo et al. 2023, Adaptive Guidance, arXiv:2312.12487",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let at = match options.optional("at")? {
        Some(at) => at,
        None => {
            let (threshold, share) = (options.get("threshold")?, options.get("share")?);
            gate(&agreement_of_passes(cx.calibration)?, threshold, share)
        }
    };
    guide_until(plan, at)
}

/// For every sample and step of the plain loop the cosine between the noise that both passes see.
pub fn agreement_of_passes(calibration: &Calibration) -> Result<Vec<Vec<f64>>, Error> {
    let mut all = Vec::new();
    for run in calibration.runs()? {
        let samples = run.first().map_or(0, |step| step.latent.dims()[0]);
        let mut of: Vec<Vec<f64>> = vec![Vec::new(); samples];
        for (step, row) in run.iter().zip(&calibration.table().rows) {
            let outputs = step.passes(calibration.prediction())?;
            let [cond, uncond] = outputs.as_slice() else {
                let message = "there is no guidance to end; --guidance says how strong it is";
                return Err(Error::Plan(message.to_owned()));
            };
            let state = step.latent.to_f64s().unwrap_or_default();
            // The noise is the flow plus the clean sample.
            let [on_state, on_output] = [0, 1].map(|i| row.flow.flow[i] + row.estimate[i]);
            let noise = |m: &[f64]| -> Vec<f64> {
                let pairs = m.iter().zip(&state);
                pairs.map(|(m, x)| on_state * x / row.input_scale + on_output * m).collect()
            };
            let (cond, uncond) = (noise(cond), noise(uncond));
            let size = (cond.len() / samples.max(1)).max(1);
            for (sample, (a, b)) in cond.chunks(size).zip(uncond.chunks(size)).enumerate().take(samples) {
                of[sample].push(cosine(a, b));
            }
        }
        all.extend(of);
    }
    Ok(all)
}

/// The first step without guidance: one after that at which the passes of a share of the runs agree.
///
/// `cosines` holds for every run the cosine between the conditional and the unconditional noise at each step. A run that
/// never reaches `threshold` is guided to the end.
pub fn gate(cosines: &[Vec<f64>], threshold: f64, share: f64) -> usize {
    let first = |run: &Vec<f64>| run.iter().position(|&c| c >= threshold).unwrap_or(run.len());
    let mut reached: Vec<usize> = cosines.iter().map(first).collect();
    reached.sort_unstable();
    let steps = cosines.iter().map(Vec::len).max().unwrap_or(0);
    let at = (share.clamp(0.0, 1.0) * reached.len() as f64).ceil() as usize;
    reached.get(at.max(1) - 1).map_or(0, |&step| (step + 1).min(steps))
}

/// Makes every guided step from `gate` on conditional. Steps that a substitution reads keep what it reads.
pub fn guide_until(plan: &mut StepPlan, gate: usize) -> Result<(), Error> {
    if !plan.cfg.iter().any(|mode| mode.is_guided()) {
        return Err(Error::Plan("the plan has no guidance to end".to_owned()));
    }
    for mode in plan.cfg.iter_mut().skip(gate).filter(|mode| mode.is_guided()) {
        *mode = Mode::Conditional;
    }
    // Entries of the pass that is gone have nothing to do.
    for (&step, entries) in &mut plan.steps {
        let passes = plan.cfg[step].passes();
        entries.retain(|one| one.pass.is_none_or(|pass| passes.contains(&pass)));
    }
    plan.steps.retain(|_, entries| !entries.is_empty());
    plan.check()
}

#[cfg(test)]
mod tests {
    use super::super::testing::guided;
    use super::*;
    use crate::sampler::{Kind, Pass, Substitution};

    #[test]
    fn most_runs_must_agree() {
        let runs = [vec![0.5, 0.9, 0.99, 0.999], vec![0.5, 0.995, 0.99, 0.999], vec![0.1, 0.2, 0.3, 0.4]];
        // Reached at 2, 1 and never.
        assert_eq!(gate(&runs, 0.99, 0.9), 4);
        assert_eq!(gate(&runs, 0.99, 0.5), 3);
        assert_eq!(gate(&runs, 0.99, 0.3), 2);
        assert_eq!(gate(&[], 0.99, 0.9), 0);
    }

    #[test]
    fn guidance_ends_at_the_gate() {
        let mut plan = guided(4);
        let one = Substitution { pass: Some(Pass::Uncond), ..Substitution::new("eps", Kind::Reuse { from: 0 }) };
        plan.steps.insert(3, vec![one]);
        guide_until(&mut plan, 2).unwrap();
        assert_eq!(plan.cfg, [Mode::Guided, Mode::Guided, Mode::Conditional, Mode::Conditional]);
        assert!(plan.steps.is_empty());
        assert!(guide_until(&mut plan, 0).is_ok());
        assert!(guide_until(&mut plan, 0).is_err());
    }
}
