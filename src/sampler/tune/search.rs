//! The search for timesteps, whose candidates are worth what their samples are.

mod log;
mod scorers;
mod starts;

use self::scorers::{ByDistance, ByImages, ByReference, Distance, is_finite};
use super::{
    super::features::Extractor,
    plan_runner::{BATCH, PlanRunner},
};
use crate::Failure;
use anyhow::anyhow;
use lathe_passes::sampler::{
    Error, Kind, StepPlan, Substitution, Table,
    methods::Parts,
    search::{Candidate, Remembering, Scored, Scorer, SearchOptions, search},
};
use lathe_runtime::{Features, Listener, Progress, SetSpec, frechet, kernel};
use serde_json::{Value, json};
use std::{collections::BTreeSet, ops::Range, path::PathBuf};

/// What to search.
#[derive(Debug, Clone)]
pub struct Search {
    /// How many timesteps.
    pub steps: usize,
    /// How many candidates are scored.
    pub evaluations: usize,
    /// Pairs of samples that a score is the mean of.
    pub pairs: usize,
    /// The share of layers that may be left out over all steps.
    pub skip: f64,
    /// A network whose features say how alike samples are; without it, the samples themselves are compared.
    pub reference: Option<PathBuf>,
    /// Real images: candidates are scored by how far the set of their samples is from them.
    pub real: Option<SetSpec>,
    /// Samples that are drawn to decide between the best candidates.
    pub draws: usize,
    /// Where scores are kept, so that a search can go on.
    pub log: PathBuf,
}

/// Steps of the sampler whose samples are aimed at.
pub(in crate::sampler) const REFERENCE_STEPS: usize = 100;
/// Candidates that are drawn from in the end.
const FINALISTS: usize = 10;
/// Real images whose features are computed.
const MOST_REAL: usize = 5000;
/// Samples that a score by real images is of at least.
const LEAST_SAMPLES: usize = 256;
/// The first batch of samples that decide between finalists; no score is made of them.
const DECIDING_BATCH: u64 = 1 << 20;

/// What candidates stand for.
struct Candidates<'a> {
    plans: &'a PlanRunner<'a>,
    /// The layers that a candidate may leave out, by the tensors they give.
    layers: Vec<String>,
}

/// Real images that samples are held against.
struct RealImages<'a> {
    extractor: &'a Extractor<'a>,
    features: Features,
}

/// Finds timesteps, writes every score into the log at once, and returns the plan of the best.
pub(super) fn find(plans: &PlanRunner, options: &Search, progress: &Listener) -> Result<StepPlan, Failure> {
    let train = plans.scheduler.num_train_timesteps;
    let dense = plans.table_of(REFERENCE_STEPS.min(train))?;
    let extractor = options.reference.as_ref().map(|path| Extractor::read(path, plans.evaluator)).transpose()?;
    let images = match (&options.real, &extractor) {
        (Some(real), Some(extractor)) => Some(RealImages { extractor, features: extractor.of_set(real, MOST_REAL)? }),
        _ => None,
    };
    let samples = if images.is_some() { options.pairs.max(LEAST_SAMPLES) } else { options.pairs };
    let batches = samples.div_ceil(BATCH).max(1) as u64;
    let layers = if options.skip > 0.0 { Parts::find(plans.denoiser, plans.roles)?.arms } else { Vec::new() };
    let candidates = Candidates { plans, layers };
    let (first, record) = plans.samples_and_record(&dense, 0)?;
    let starts = starts::candidates(plans, &dense, &record, options.steps)?;
    let (by_images, by_reference);
    let distance: Box<Distance<'_>> = match &images {
        Some(images) => {
            by_images = ByImages { candidates: &candidates, images, batches };
            Box::new(|candidate| by_images.distance(candidate))
        }
        None => {
            let mut reference = vec![first];
            for batch in 1..batches {
                reference.push(plans.samples(&dense, &plans.full_plan(&dense), batch)?);
            }
            by_reference = ByReference::new(&candidates, extractor.as_ref(), &reference)?;
            Box::new(|candidate| by_reference.distance(candidate))
        }
    };
    let mut scorer = ByDistance { distance: &*distance, at_a_time: plans.at_a_time };
    let ranked = rank(&candidates, options, &starts, &mut scorer, progress)?;
    let (best, decided) = match &images {
        Some(images) => {
            let best = ranked.iter().take(FINALISTS).map(|s| &s.candidate);
            candidates.decide(images, options.draws, &best.chain(starts.first()).collect::<Vec<_>>(), progress)?
        }
        None => (ranked[0].candidate.clone(), Value::Null),
    };
    let mut plan = candidates.plan(&best)?.1;
    let score = |of: Option<&Candidate>| ranked.iter().find(|s| Some(&s.candidate) == of).map(|s| s.score);
    let measure = match (&images, &extractor) {
        (Some(_), _) => "kid",
        (None, Some(_)) => "features",
        (None, None) => "samples",
    };
    let evidence = json!({
        "search": {"evaluations": ranked.len(), "pairs": batches as usize * BATCH, "score": score(Some(&best)),
                   "uniform": score(starts.first()), "measure": measure},
        "sets": decided,
    });
    plan.evidence = evidence.as_object().cloned().unwrap_or_default();
    Ok(plan)
}

/// All candidates that were scored, the best first, with scores of earlier searches read from the log and new ones written.
fn rank(
    candidates: &Candidates,
    options: &Search,
    starts: &[Candidate],
    scorer: &mut dyn Scorer<Failure>,
    progress: &Listener,
) -> Result<Vec<Scored>, Failure> {
    let (known, mut log) = log::open(&options.log, &candidates.setting(options))?;
    let settings = SearchOptions {
        steps: options.steps,
        train: candidates.plans.scheduler.num_train_timesteps,
        evaluations: options.evaluations,
        layers: candidates.layers.len(),
        most_skipped: options.skip,
        seed: candidates.plans.inputs.seed,
    };
    let mut keep = |key: &str, score: f64| log::keep(&mut log, key, score);
    let mut remembering = Remembering::new(known, scorer, &mut keep);
    search(&settings, starts, &mut remembering, &mut |done, _, best| {
        progress.hear(&Progress::new(done, options.evaluations, &format!("candidates, best {:.4}", best.score)));
    })
}

impl Candidates<'_> {
    /// The numbers and the plan of a candidate.
    fn plan(&self, candidate: &Candidate) -> Result<(Table, StepPlan), Error> {
        let times: Vec<f64> = candidate.times.iter().map(|&t| t as f64).collect();
        let table = self.plans.table_at(&times)?;
        let mut plan = self.plans.full_plan(&table);
        // What is left out is what it was at the first step, times zero; the first step has nothing to refer to.
        for (step, skips) in candidate.skips.iter().enumerate().skip(1) {
            let zero =
                |&layer: &usize| Substitution::new(self.layers[layer].clone(), Kind::Scale { from: 0, factor: 0.0 });
            if !skips.is_empty() {
                plan.steps.insert(step, skips.iter().map(zero).collect());
            }
        }
        Ok((table, plan))
    }

    /// The features of a candidate's samples; `None` where some are no numbers.
    fn features(
        &self,
        candidate: &Candidate,
        extractor: &Extractor,
        batches: Range<u64>,
    ) -> Result<Option<Features>, Failure> {
        let (table, plan) = self.plan(candidate)?;
        let mut features = Features::new();
        for batch in batches {
            let samples = self.plans.samples(&table, &plan, batch)?;
            if !is_finite(&samples) {
                return Ok(None);
            }
            extractor.add(&samples, &mut features)?;
        }
        Ok(Some(features))
    }

    /// The finalist whose samples, as a set, are closest to real images, and what was measured.
    fn decide(
        &self,
        images: &RealImages,
        samples: usize,
        finalists: &[&Candidate],
        progress: &Listener,
    ) -> Result<(Candidate, Value), Failure> {
        let mut lines = Vec::new();
        let mut best: Option<(f64, &Candidate)> = None;
        let mut measured = BTreeSet::new();
        for (index, &candidate) in finalists.iter().enumerate() {
            progress.hear(&Progress::new(index, finalists.len(), "finalists"));
            if !measured.insert(candidate.key()) {
                continue;
            }
            let batches = DECIDING_BATCH..DECIDING_BATCH + samples.div_ceil(BATCH).max(1) as u64;
            let Some(found) = self.features(candidate, images.extractor, batches)? else { continue };
            let distance = kernel(&found, &images.features, 20, 500, self.plans.inputs.seed)?;
            let frechet = frechet(&found, &images.features)?;
            lines.push(json!({"candidate": candidate.key(), "kid": distance.mean, "kid_deviation": distance.deviation,
                              "fid": frechet, "draws": found.len(), "real": images.features.len()}));
            if best.is_none_or(|(least, _)| distance.mean < least) {
                best = Some((distance.mean, candidate));
            }
        }
        let (_, best) = best.ok_or_else(|| anyhow!("there is no candidate to decide between"))?;
        Ok((best.clone(), Value::Array(lines)))
    }

    /// What scores depend on; scores of another setting are not read.
    fn setting(&self, options: &Search) -> Value {
        let plans = self.plans;
        let key = plans.key();
        json!({
            "denoiser": key.model, "guidance": key.guidance, "shape": key.shape,
            "solver": plans.scheduler.solver.name(), "scheduler": format!("{:?}", plans.scheduler),
            "eta": plans.request.eta.unwrap_or(0.0), "seed": plans.inputs.seed, "pairs": options.pairs,
            "layers": self.layers.len(), "reference": options.reference, "shapes": plans.inputs.shapes,
            "real": options.real.as_ref().map(|real| format!("{real:?}")),
        })
    }
}
