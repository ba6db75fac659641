//! The last step of the planner: whether a plan is worth it as measured, on seeds that nothing was chosen by.
//!
//! Reuse of whole predictions is often no more than another grid, so a plan must draw what all steps draw more closely
//! than the plain grid that takes as long, and as a set no further from real images. Otherwise that grid is used.

use super::{
    super::{compare::batches, features::Extractor},
    plan_compiler::PlanCompiler,
};
use crate::Failure;
use anyhow::anyhow;
use lathe_ir::Tensor;
use lathe_passes::sampler::{StepPlan, Table};
use lathe_runtime::{Features, Listener, Pair, Progress, SetSpec, bootstrap, kernel, pairs, quantile};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Pairs of samples that decide. They are drawn from numbers on that no batch of the planner uses.
const PAIRS: usize = 64;
const HELD_OUT: usize = 1 << 22;
/// By how much a grid may seem slower than a plan and still count as one that takes as long.
pub(super) const TOLERANCE: f64 = 0.02;
/// What a plan must save of the time of all steps at least: 1.05 times the speed.
const LEAST_SAVED: f64 = 1.0 - 1.0 / 1.05;
/// Measurements that look for the grid.
const SEARCHES: usize = 5;
/// Real images that are looked at, and subsets of a kernel distance with their size.
const MOST_REAL: usize = 5000;
const SUBSETS: (usize, usize) = (20, 500);

/// A network and real images that sets of samples are held against.
#[derive(Debug, Clone)]
pub struct ImageReference {
    /// A network that gives features of images.
    pub network: PathBuf,
    /// Real images.
    pub real: SetSpec,
    /// Samples that are drawn from each sampler.
    pub samples: usize,
}

/// A plan with its numbers, compiled and timed.
pub(super) struct TimedPlan {
    pub table: Table,
    pub plan: StepPlan,
    pub path: PathBuf,
    /// Its time as a share of that of all steps.
    pub share: f64,
}

/// The sampler of all steps that others are measured against.
pub(super) struct Baseline {
    pub table: Table,
    pub path: PathBuf,
}

impl Baseline {
    /// Compiles all steps.
    pub fn new(compiler: &PlanCompiler, table: &Table) -> Result<Baseline, Failure> {
        let path = compiler.compile("baseline", table, &compiler.plans.full_plan(table))?;
        Ok(Baseline { table: table.clone(), path })
    }

    /// Compiles a plan and times it beside all steps.
    pub fn measure(
        &self,
        compiler: &PlanCompiler,
        name: &str,
        table: Table,
        plan: StepPlan,
    ) -> Result<TimedPlan, Failure> {
        let path = compiler.compile(name, &table, &plan)?;
        let times = compiler.times(&[&self.path, &path])?;
        Ok(TimedPlan { share: times[1] / times[0], table, plan, path })
    }

    /// The plain grid of the most steps that takes no longer than `share` of the time of all steps, as measured.
    pub fn grid(&self, compiler: &PlanCompiler, share: f64) -> Result<TimedPlan, Failure> {
        let all = self.table.rows.len();
        let mut steps = ((share * all as f64).round() as usize).clamp(1, all);
        let mut best: Option<TimedPlan> = None;
        for _ in 0..SEARCHES {
            let table = compiler.plans.table_of(steps)?;
            let plan = compiler.plans.full_plan(&table);
            let timed = self.measure(compiler, &format!("grid{steps}"), table, plan)?;
            let fits = timed.share <= share * (1.0 + TOLERANCE);
            // Time goes with the number of steps, so one measurement says where to look next.
            let likely = (steps as f64 * share * (1.0 + TOLERANCE) / timed.share).floor() as usize;
            let next = if fits { likely.max(steps) } else { likely.min(steps - 1) }.clamp(1, all);
            let better = best.as_ref().is_none_or(|b| timed.table.rows.len() > b.table.rows.len());
            if (fits && better) || (steps == 1 && best.is_none()) {
                best = Some(timed);
            }
            let known = best.as_ref().map_or(0, |b| b.table.rows.len());
            if next == steps || next <= known {
                break;
            }
            steps = next;
        }
        best.ok_or_else(|| Failure::Error(anyhow!("no plain grid takes {share:.3} of the time of all steps")))
    }

    /// Holds a plan against the plain grid that takes as long. Returns what is used, and why in a sentence where that is
    /// the grid.
    pub fn decide(
        &self,
        compiler: &PlanCompiler,
        candidate: TimedPlan,
        images: Option<&ImageReference>,
        progress: &Listener,
    ) -> Result<(StepPlan, Option<String>), Failure> {
        let grid = self.grid(compiler, candidate.share)?;
        let reference = self.samples(compiler, &self.path)?;
        let of_plan = self.pairs(compiler, &reference, &candidate.path)?;
        let of_grid = self.pairs(compiler, &reference, &grid.path)?;
        let psnr = |of: &[Pair]| quantile(&of.iter().map(|p| p.psnr.min(200.0)).collect::<Vec<_>>(), 0.5);
        let p10 = |of: &[Pair]| quantile(&of.iter().map(|p| p.psnr.min(200.0)).collect::<Vec<_>>(), 0.1);
        // The same noise in both: what counts is the difference of each pair.
        let gained: Vec<f64> = of_plan.iter().zip(&of_grid).map(|(a, b)| b.rmse - a.rmse).collect();
        let interval = bootstrap(&gained, 1000, compiler.plans.inputs.seed);
        let sets = match images {
            Some(images) => Some(distances_to_real(compiler, images, [&candidate.path, &grid.path], progress)?),
            None => None,
        };
        let steps = grid.table.rows.len();
        let figures = format!("PSNR {:.1} dB where {:.1}", psnr(&of_plan), psnr(&of_grid));
        let reason = match &sets {
            _ if gained.iter().any(|g| !g.is_finite()) => Some("draws what is not finite".to_owned()),
            _ if candidate.share > 1.0 - LEAST_SAVED => Some(format!("takes {:.2} of the time", candidate.share)),
            _ if interval[0] <= 0.0 => Some(format!("draws no closer to all steps ({figures})")),
            Some(sets) if sets.kid[0] > sets.kid[1] + sets.deviation => {
                Some(format!("draws a set further from real images (KID {:.4} where {:.4})", sets.kid[0], sets.kid[1]))
            }
            _ => None,
        };
        let evidence = json!({
            "share": candidate.share, "grid_steps": steps, "grid_share": grid.share, "pairs": of_plan.len(),
            "psnr": psnr(&of_plan), "psnr_p10": p10(&of_plan), "grid_psnr": psnr(&of_grid), "grid_psnr_p10": p10(&of_grid),
            "gained_rmse": interval,
            "kid": sets.as_ref().map(|s| s.kid[0]), "grid_kid": sets.as_ref().map(|s| s.kid[1]),
            "kid_deviation": sets.as_ref().map(|s| s.deviation),
            "kept": if reason.is_none() { "plan" } else { "plain" }, "because": reason,
        });
        let sentence = reason.map(|reason| {
            format!("the plan that was found {reason}; {steps} plain steps that take as long are used instead")
        });
        let mut plan = match sentence {
            None => candidate.plan,
            Some(_) => StepPlan { evidence: candidate.plan.evidence, ..grid.plan },
        };
        plan.evidence.insert("measured".to_owned(), evidence);
        Ok((plan, sentence))
    }

    fn samples(&self, compiler: &PlanCompiler, path: &Path) -> Result<Vec<Tensor>, Failure> {
        let sampler = compiler.open(path)?;
        let inputs = sampler.seeded(&compiler.inputs())?;
        let mut all = Vec::new();
        for group in batches(&inputs, HELD_OUT..HELD_OUT + PAIRS, self.table.noises()) {
            all.extend(sampler.samples(&inputs, &group)?);
        }
        Ok(all)
    }

    fn pairs(&self, compiler: &PlanCompiler, reference: &[Tensor], path: &Path) -> Result<Vec<Pair>, Failure> {
        let found = self.samples(compiler, path)?;
        let mut all = Vec::new();
        for (reference, found) in reference.iter().zip(&found) {
            all.extend(pairs(reference, found, 2.0)?);
        }
        Ok(all)
    }
}

/// Kernel distances of two sets of samples to real images.
struct KernelDistances {
    kid: [f64; 2],
    deviation: f64,
}

fn distances_to_real(
    compiler: &PlanCompiler,
    images: &ImageReference,
    paths: [&PathBuf; 2],
    progress: &Listener,
) -> Result<KernelDistances, Failure> {
    let evaluator = compiler.evaluator();
    let extractor = Extractor::read(&images.network, &evaluator)?;
    let real = extractor.of_set(&images.real, MOST_REAL)?;
    let mut found = Vec::new();
    for (index, path) in paths.into_iter().enumerate() {
        progress.hear(&Progress::new(index, 2, "sets of samples"));
        let sampler = compiler.open(path)?;
        let inputs = sampler.seeded(&compiler.inputs())?;
        let mut features = Features::new();
        let start = HELD_OUT + PAIRS;
        for group in batches(&inputs, start..start + images.samples, 0) {
            for samples in sampler.samples(&inputs, &group)? {
                extractor.add(&samples, &mut features)?;
            }
        }
        found.push(kernel(&features, &real, SUBSETS.0, SUBSETS.1, compiler.plans.inputs.seed)?);
    }
    Ok(KernelDistances { kid: [found[0].mean, found[1].mean], deviation: found[1].deviation })
}

/// What is used where no plan is cheap enough: the plain grid that is.
pub(super) fn plain_grid(
    baseline: &Baseline,
    compiler: &PlanCompiler,
    latency: f64,
) -> Result<(StepPlan, Option<String>), Failure> {
    let grid = baseline.grid(compiler, latency)?;
    let steps = grid.table.rows.len();
    let because = format!("no plan takes {latency} of the time");
    let evidence = json!({"grid_steps": steps, "grid_share": grid.share, "kept": "plain", "because": because});
    let mut plan = grid.plan;
    plan.evidence.insert("measured".to_owned(), evidence);
    Ok((plan, Some(format!("{because}; {steps} plain steps are used instead"))))
}
