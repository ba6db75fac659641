//! The unconditional pass of some steps is a weighted sum of what is known already.
//!
//! Source: Castillo et al. 2023, Adaptive Guidance, arXiv:2312.12487.

use super::{Calibration, Method, Options, PlanContext, Stages, substitute};
use crate::{
    Opt,
    sampler::{Error, Kind, Pass, Ref, StepPlan, Substitution},
};

pub(super) const METHOD: Method = Method {
    name: "linear-guidance",
    summary: "estimates the unconditional pass",
    doc: "The unconditional pass of some guided steps is a weighted sum of the predictions around it, with weights that are \
          fitted to runs of the plain loop. They belong to the strength of guidance, the prompt of the unconditional pass and \
          the steps they were fitted with.",
    options: &[
        Opt { name: "every", unit: "a number", default: "2", doc: "one of so many guided steps keeps the pass" },
        Opt {
            name: "residual",
            unit: "a number",
            default: "0.05",
            doc: "where a sum stays farther away, the pass is kept",
        },
    ],
    stages: Stages::One,
    source: "Castillo et al. 2023, Adaptive Guidance, arXiv:2312.12487",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let settings = LinearGuidance { every: options.get("every")?, most_residual: options.get("residual")? };
    let inner = inner(cx.calibration, plan.grid.len())?;
    linear_guidance(plan, &cx.parts.output, &inner, &settings)?;
    Ok(())
}

/// Inner products over the runs of the plain loop.
fn inner(calibration: &Calibration, steps: usize) -> Result<Inner, Error> {
    let mut inner = Inner::new(steps);
    for run in calibration.runs()? {
        let mut both = Vec::with_capacity(steps);
        for step in run {
            let passes = <[Vec<f64>; 2]>::try_from(step.passes(calibration.prediction())?);
            both.push(passes.map_err(|_| Error::Plan("linear-guidance needs --guidance".to_owned()))?);
        }
        inner.add(&both)?;
    }
    Ok(inner)
}

/// How far back a sum may look, in steps.
const BACK: usize = 3;
/// Share of the mean diagonal that is added to it.
const RIDGE: f64 = 1e-4;

/// Inner products of the predictions of both passes of all steps, added up over runs.
#[derive(Debug, Clone)]
pub struct Inner {
    steps: usize,
    products: Vec<f64>,
}

impl Inner {
    /// No runs yet.
    pub fn new(steps: usize) -> Inner {
        Inner { steps, products: vec![0.0; 4 * steps * steps] }
    }

    /// Adds a run: for every step the conditional and the unconditional prediction.
    pub fn add(&mut self, run: &[[Vec<f64>; 2]]) -> Result<(), Error> {
        let size = run.first().map_or(0, |step| step[0].len());
        if run.len() != self.steps || run.iter().flatten().any(|p| p.len() != size) {
            let message = format!("a run of {} steps is added to runs of {}", run.len(), self.steps);
            return Err(Error::Plan(message));
        }
        let all: Vec<&Vec<f64>> = run.iter().flatten().collect();
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate().take(i + 1) {
                let product: f64 = a.iter().zip(b.iter()).map(|(x, y)| x * y).sum();
                self.products[i * 2 * self.steps + j] += product;
                if i != j {
                    self.products[j * 2 * self.steps + i] += product;
                }
            }
        }
        Ok(())
    }

    fn of(&self, a: (usize, Pass), b: (usize, Pass)) -> f64 {
        let index = |(step, pass): (usize, Pass)| 2 * step + usize::from(pass == Pass::Uncond);
        self.products[index(a) * 2 * self.steps + index(b)]
    }

    /// The weights of the sum that comes closest to the unconditional prediction of a step, and how far it stays away,
    /// relative to the prediction.
    fn fit(&self, step: usize) -> Option<Fit> {
        let cond = (step.saturating_sub(BACK - 1)..=step).map(|s| (s, Pass::Cond));
        let uncond = (step.saturating_sub(BACK)..step).map(|s| (s, Pass::Uncond));
        let parts: Vec<(usize, Pass)> = cond.chain(uncond).collect();
        let target = (step, Pass::Uncond);
        let count = parts.len();
        let ridge = RIDGE * parts.iter().map(|&p| self.of(p, p)).sum::<f64>() / count as f64;
        let at = |i: usize, j: usize| self.of(parts[i], parts[j]) + if i == j { ridge } else { 0.0 };
        let matrix: Vec<Vec<f64>> = (0..count).map(|i| (0..count).map(|j| at(i, j)).collect()).collect();
        let right: Vec<f64> = parts.iter().map(|&p| self.of(p, target)).collect();
        let weights = solve(matrix, right.clone())?;
        let own = self.of(target, target);
        let product: f64 = weights.iter().zip(&right).map(|(w, r)| w * r).sum();
        let square: f64 = (0..count)
            .map(|i| (0..count).map(|j| weights[i] * weights[j] * self.of(parts[i], parts[j])).sum::<f64>())
            .sum();
        let away = (own - 2.0 * product + square).max(0.0);
        (own > 0.0).then(|| Fit { parts, weights, away: (away / own).sqrt() })
    }
}

/// A sum of predictions that stands for another.
struct Fit {
    parts: Vec<(usize, Pass)>,
    weights: Vec<f64>,
    /// How far it stays away, relative to what it stands for.
    away: f64,
}

/// Solves a symmetric positive definite system by Cholesky's factors; `None` if the matrix is not definite.
fn solve(mut a: Vec<Vec<f64>>, mut x: Vec<f64>) -> Option<Vec<f64>> {
    let n = x.len();
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| a[i][k] * a[j][k]).sum();
            let rest = a[i][j] - sum;
            a[i][j] = if i == j { Some(rest.sqrt()).filter(|r| r.is_finite() && *r > 0.0)? } else { rest / a[j][j] };
        }
    }
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| a[i][k] * x[k]).sum();
        x[i] = (x[i] - sum) / a[i][i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| a[k][i] * x[k]).sum();
        x[i] = (x[i] - sum) / a[i][i];
    }
    Some(x)
}

/// Which steps lose their unconditional pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearGuidance {
    /// One of so many guided steps keeps it.
    pub every: usize,
    /// Where a sum stays farther away than this, the pass is kept.
    pub most_residual: f64,
}

/// Writes the entries for guided steps and returns at which steps the pass is gone. The weights belong to the guidance,
/// the prompt for the unconditional pass and the grid that the runs were made with.
pub fn linear_guidance(
    plan: &mut StepPlan,
    output: &str,
    inner: &Inner,
    options: &LinearGuidance,
) -> Result<Vec<usize>, Error> {
    if inner.steps != plan.grid.len() || options.every < 2 {
        let (runs, steps) = (inner.steps, plan.grid.len());
        return Err(Error::Plan(format!("runs of {runs} steps say nothing of {steps}, or every step is kept")));
    }
    let mut gone = Vec::new();
    for step in 1..inner.steps {
        // What a sum refers to must have been guided too.
        let back = step.saturating_sub(BACK)..=step;
        if step % options.every == 0 || !plan.cfg[back].iter().all(|mode| mode.is_guided()) {
            continue;
        }
        let Some(Fit { parts, weights: coefs, away: residual }) = inner.fit(step) else { continue };
        if residual <= options.most_residual {
            let refs = parts.into_iter().map(|(step, pass)| Ref { of: None, step, pass: Some(pass) }).collect();
            let one = Substitution::new(output, Kind::Affine { refs, coefs });
            substitute(plan, step, Substitution { pass: Some(Pass::Uncond), ..one })?;
            gone.push(step);
        }
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::super::testing::guided;
    use super::*;

    /// Runs whose unconditional prediction is 0.7 of the conditional one plus 0.3 of the unconditional one before it, but
    /// for noise at some steps.
    fn inner(steps: usize, noisy: &[usize]) -> Inner {
        let mut inner = Inner::new(steps);
        for seed in 0..6 {
            let wave = |step: usize, k: usize, f: f64| ((k as f64 + 1.0) * f * (step as f64 + 1.3) + seed as f64).sin();
            let mut run: Vec<[Vec<f64>; 2]> = Vec::new();
            for step in 0..steps {
                let cond: Vec<f64> = (0..40).map(|k| wave(step, k, 0.61)).collect();
                let uncond = match step {
                    0 => (0..40).map(|k| wave(step, k, 1.7)).collect(),
                    _ if noisy.contains(&step) => (0..40).map(|k| wave(step, k, 2.9)).collect(),
                    _ => cond.iter().zip(&run[step - 1][1]).map(|(c, u)| 0.7 * c + 0.3 * u).collect(),
                };
                run.push([cond, uncond]);
            }
            inner.add(&run).unwrap();
        }
        inner
    }

    #[test]
    fn a_linear_pass_is_found_and_a_noisy_one_is_kept() {
        let mut plan = guided(8);
        let options = LinearGuidance { every: 2, most_residual: 0.05 };
        let gone = linear_guidance(&mut plan, "eps", &inner(8, &[5]), &options).unwrap();
        plan.check().unwrap();
        assert_eq!(gone, [1, 3, 7]);
        let one = &plan.at(3)[0];
        let Kind::Affine { refs, coefs } = &one.kind else { panic!("{one:?}") };
        assert_eq!((one.pass, refs.len()), (Some(Pass::Uncond), 6));
        // The other parts can stand for one another; the conditional pass of the step itself stands alone.
        let own = refs.iter().position(|r| r.step == 3 && r.pass == Some(Pass::Cond)).unwrap();
        assert!((coefs[own] - 0.7).abs() < 0.02, "{coefs:?}");
    }

    #[test]
    fn only_guided_steps_are_estimated() {
        let mut plan = guided(8);
        super::super::gate::guide_until(&mut plan, 4).unwrap();
        let options = LinearGuidance { every: 2, most_residual: 0.05 };
        assert_eq!(linear_guidance(&mut plan, "eps", &inner(8, &[]), &options).unwrap(), [1, 3]);
        assert!(linear_guidance(&mut guided(5), "eps", &inner(8, &[]), &options).is_err());
    }

    #[test]
    fn a_system_that_is_not_definite_has_no_solution() {
        let found = solve(vec![vec![4.0, 2.0], vec![2.0, 3.0]], vec![8.0, 7.0]).unwrap();
        assert!((found[0] - 1.25).abs() < 1e-12 && (found[1] - 1.5).abs() < 1e-12, "{found:?}");
        assert_eq!(solve(vec![vec![1.0, 1.0], vec![1.0, 1.0]], vec![1.0, 1.0]), None);
    }
}
