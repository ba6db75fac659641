//! The search for timesteps: what candidates are worth, and the file that remembers it.

use super::{
    super::features::Extractor,
    plan_runner::{BATCH, Seen, Trial},
};
use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_ir::Tensor;
use lathe_passes::sampler::{
    Clip, Error, Kind, Row, StepPlan, Substitution, Table,
    methods::Parts,
    search::{Candidate, Remembering, Scorer, SearchOptions, search, shortest},
};
use lathe_runtime::{Features, Listener, Progress, SetSpec, frechet, kernel};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io::{Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

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
/// Real images that are looked at.
const MOST_REAL: usize = 5000;
/// Samples that a score by real images is of at least, and images that they are held against.
const LEAST_DRAWN: usize = 256;
const MOST_HELD_AGAINST: usize = 1000;

/// Finds timesteps, writes every score into the log at once, and returns the plan of the best.
pub(super) fn run(trial: &Trial, wanted: &Search, progress: &Listener) -> Result<StepPlan, Failure> {
    let train = trial.scheduler.num_train_timesteps;
    let dense = trial.spread(REFERENCE_STEPS.min(train))?;
    let extractor = wanted.reference.as_ref().map(|path| Extractor::read(path, trial.evaluator)).transpose()?;
    let images = match (&wanted.real, &extractor) {
        (Some(real), Some(extractor)) => Some((extractor, extractor.of_set(real, MOST_REAL)?)),
        _ => None,
    };
    let samples = if images.is_some() { wanted.pairs.max(LEAST_DRAWN) } else { wanted.pairs };
    let batches = samples.div_ceil(BATCH).max(1) as u64;
    let arms = if wanted.skip > 0.0 { Parts::find(trial.denoiser, trial.roles)?.arms } else { Vec::new() };
    let (first, seen) = trial.watch(trial.denoiser, &dense, 0)?;
    let seeds = seeds(trial, &dense, &seen, wanted.steps)?;
    let (mut sets, mut paired);
    let scorer: &mut dyn Scorer = match &images {
        Some((extractor, images)) => {
            sets = Sets { trial, arms: &arms, extractor, images, batches };
            &mut sets
        }
        None => {
            let mut reference = vec![first];
            for batch in 1..batches {
                reference.push(trial.samples(&dense, &trial.plain(&dense), batch)?);
            }
            paired = Paired { trial, arms: &arms, extractor: extractor.as_ref(), reference: Vec::new() };
            paired.reference = reference.iter().map(|sample| paired.look(sample)).collect::<Result<_, _>>()?;
            &mut paired
        }
    };
    let setting = setting(trial, wanted, arms.len());
    let (known, mut log) = open_log(&wanted.log, &setting)?;
    let options = SearchOptions {
        steps: wanted.steps,
        train,
        evaluations: wanted.evaluations,
        layers: arms.len(),
        most_skipped: wanted.skip,
        seed: trial.inputs.seed,
    };
    let mut keep = |key: &str, score: f64| {
        let line = json!({"candidate": key, "score": if score.is_finite() { json!(score) } else { Value::Null }});
        // One write per line: a kill leaves at most one line torn, which is dropped when the log is read.
        let written = log.write_all(format!("{line}\n").as_bytes()).and_then(|()| log.sync_data());
        written.map_err(|e| Error::Plan(format!("the log of the search cannot be written: {e}")))
    };
    let mut remembering = Remembering::new(known, scorer, &mut keep);
    let unit = |best: f64| format!("candidates, best {best:.4}");
    let ranked = search(&options, &seeds, &mut remembering, &mut |done, _, best| {
        progress.hear(&Progress::new(done, wanted.evaluations, &unit(best.score)));
    })?;
    let uniform = ranked.iter().find(|s| Some(&s.candidate) == seeds.first()).map(|s| s.score);
    let (best, decided) = match &images {
        Some((extractor, images)) => {
            let finalists: Vec<&Candidate> =
                ranked.iter().take(FINALISTS).map(|s| &s.candidate).chain(seeds.first()).collect();
            decide(trial, extractor, images, wanted.draws, &finalists, &arms, progress)?
        }
        None => (ranked[0].candidate.clone(), Value::Null),
    };
    let mut plan = plan_of(trial, &best, &arms)?.1;
    let score = ranked.iter().find(|s| s.candidate == best).map(|s| s.score);
    let measure = match (&images, &extractor) {
        (Some(_), _) => "kid",
        (None, Some(_)) => "features",
        (None, None) => "samples",
    };
    let evidence = json!({
        "search": {"evaluations": ranked.len(), "pairs": batches as usize * BATCH, "score": score, "uniform": uniform,
                   "measure": measure},
        "sets": decided,
    });
    plan.evidence = evidence.as_object().cloned().unwrap_or_default();
    Ok(plan)
}

/// The numbers and the plan of a candidate.
fn plan_of(trial: &Trial, candidate: &Candidate, arms: &[String]) -> Result<(Table, StepPlan), Error> {
    let times: Vec<f64> = candidate.times.iter().map(|&t| t as f64).collect();
    let table = trial.at(&times)?;
    let mut plan = trial.plain(&table);
    // What is left out is what it was at the first step, times zero; the first step has nothing to refer to.
    for (step, skips) in candidate.skips.iter().enumerate().skip(1) {
        let zero = |&layer: &usize| Substitution::new(arms[layer].clone(), Kind::Scale { from: 0, factor: 0.0 });
        if !skips.is_empty() {
            plan.steps.insert(step, skips.iter().map(zero).collect());
        }
    }
    Ok((table, plan))
}

/// The grids to begin with: as the scheduler spreads steps, evenly with both ends, and along the shortest path.
fn seeds(trial: &Trial, dense: &Table, seen: &[Seen], steps: usize) -> Result<Vec<Candidate>, Failure> {
    let train = trial.scheduler.num_train_timesteps;
    let whole = |times: Vec<f64>| -> Option<Candidate> {
        let mut all: Vec<usize> = times.iter().map(|&t| (t.max(0.0) as usize).min(train - 1)).collect();
        all.dedup();
        (all.len() == steps && all.is_sorted_by(|a, b| a > b)).then(|| Candidate::plain(all))
    };
    let own = trial.spread(steps)?.rows.iter().map(|row| row.time).collect();
    let even = (1..=steps).rev().map(|i| (i * train / steps) as f64 - 1.0).collect();
    let mut found: Vec<Candidate> = [whole(own), whole(even)].into_iter().flatten().collect();
    if let Some(path) = path(trial, dense, seen, steps)? {
        found.extend(whole(path));
    }
    found.dedup();
    Ok(found)
}

/// The timesteps of the shortest path along what the dense sampler saw.
fn path(trial: &Trial, dense: &Table, seen: &[Seen], steps: usize) -> Result<Option<Vec<f64>>, Failure> {
    let mut states = Vec::new();
    let mut outputs = Vec::new();
    for (row, step) in dense.rows.iter().zip(seen) {
        let all = |t: &Tensor| t.to_f64s().ok_or_else(|| anyhow!("the denoiser gives no real numbers"));
        states.push(all(&step.latent)?.into_iter().map(|v| v / row.input_scale).collect::<Vec<f64>>());
        outputs.push(all(&guided(trial, step)?)?);
    }
    let size = states.first().map_or(0, Vec::len);
    if states.len() != dense.rows.len() || outputs.iter().any(|o| o.len() != size) {
        // A variance beside the prediction: the channels are not taken apart here.
        return Ok(None);
    }
    let end = jump(dense.rows.last(), dense.clip, &states, &outputs, states.len() - 1);
    let apart =
        |a: &[f64], b: &[f64]| (a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
    let start: Vec<f64> = states.iter().map(|state| apart(state, &states[0])).collect();
    let times: Vec<f64> = dense.rows.iter().map(|row| row.time).collect();
    let mut costs: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for from in 0..times.len() {
        for to in from + 1..=times.len() {
            let grid = if to < times.len() { vec![times[from], times[to]] } else { vec![times[from]] };
            let Ok(table) = trial.at_exactly(&grid) else { continue };
            let reached = jump(table.rows.first(), dense.clip, &states, &outputs, from);
            let target = if to < times.len() { &states[to] } else { &end };
            costs.insert((from, to), apart(&reached, target));
        }
    }
    let found = shortest(&start, &|from, to| costs.get(&(from, to)).copied().unwrap_or(f64::INFINITY), steps);
    Ok(found.map(|path| path.into_iter().map(|node| times[node]).collect()))
}

/// One first-order step with the numbers of `row` from what was seen at a step.
fn jump(row: Option<&Row>, clip: Clip, states: &[Vec<f64>], outputs: &[Vec<f64>], at: usize) -> Vec<f64> {
    let Some(row) = row else { return Vec::new() };
    let own = row.estimates.first().copied().unwrap_or(0.0);
    let step = |(x, m): (&f64, &f64)| {
        let estimate = row.estimate[0] * x + row.estimate[1] * m;
        let estimate = if let Clip::Clamp(range) = clip { estimate.clamp(-range, range) } else { estimate };
        row.state * x + row.output * m + own * estimate
    };
    states[at].iter().zip(&outputs[at]).map(step).collect()
}

/// The prediction of a step, guided as samples are.
fn guided(trial: &Trial, step: &Seen) -> Result<Tensor, Failure> {
    let find =
        |outputs: &[(String, Tensor)]| outputs.iter().find(|(n, _)| *n == trial.roles.output).map(|(_, t)| t.clone());
    let missing = || anyhow!("the denoiser gave no `{}`", trial.roles.output);
    let cond = find(&step.outputs[0]).ok_or_else(missing)?;
    let Some(uncond) = step.outputs.get(1) else { return Ok(cond) };
    let uncond = find(uncond).ok_or_else(missing)?;
    let scale = match trial.guidance.map(|g| g.scale) {
        Some(lathe_passes::sampler::Scale::Constant(scale)) => scale,
        _ => 3.0,
    };
    let all = |t: &Tensor| t.to_f64s().ok_or_else(|| anyhow!("the denoiser gives no real numbers"));
    let joined: Vec<f64> = all(&cond)?.iter().zip(all(&uncond)?).map(|(c, u)| u + scale * (c - u)).collect();
    Ok(Tensor::from_f64s(lathe_ir::DataType::Double, cond.dims(), &joined).ok_or_else(missing)?)
}

/// Scores by the distance between samples and those of the dense sampler from the same noise.
struct Paired<'a> {
    trial: &'a Trial<'a>,
    arms: &'a [String],
    extractor: Option<&'a Extractor<'a>>,
    reference: Vec<Vec<f64>>,
}

impl Paired<'_> {
    /// What is compared of samples.
    fn look(&self, samples: &Tensor) -> Result<Vec<f64>, Failure> {
        match self.extractor {
            Some(extractor) => {
                let mut features = Features::new();
                extractor.add(samples, &mut features)?;
                Ok((0..features.len()).flat_map(|image| features.row(image).to_vec()).collect())
            }
            None => Ok(samples.to_f64s().ok_or_else(|| anyhow!("samples are no real numbers"))?),
        }
    }

    fn distance(&self, candidate: &Candidate) -> Result<f64, Failure> {
        let (table, plan) = plan_of(self.trial, candidate, self.arms)?;
        let (mut apart, mut whole) = (0.0, 0.0);
        for (batch, reference) in self.reference.iter().enumerate() {
            let samples = self.trial.samples(&table, &plan, batch as u64)?;
            if !finite(&samples) {
                return Ok(f64::INFINITY);
            }
            let found = self.look(&samples)?;
            apart += found.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            whole += reference.iter().map(|b| b * b).sum::<f64>();
        }
        Ok((apart / whole).sqrt())
    }
}

impl Scorer for Paired<'_> {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, Error> {
        self.distance(candidate).map_err(|e| Error::Plan(e.to_string()))
    }
}

/// Scores by the kernel distance between a set of samples, always from the same noise, and real images.
struct Sets<'a> {
    trial: &'a Trial<'a>,
    arms: &'a [String],
    extractor: &'a Extractor<'a>,
    images: &'a Features,
    batches: u64,
}

impl Scorer for Sets<'_> {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, Error> {
        let drawn = draw(self.trial, self.extractor, candidate, self.arms, 0..self.batches);
        let Some(drawn) = drawn.map_err(|e| Error::Plan(e.to_string()))? else { return Ok(f64::INFINITY) };
        let distance = kernel(&drawn, self.images, 1, MOST_HELD_AGAINST, self.trial.inputs.seed);
        Ok(distance.map_err(|e| Error::Plan(e.to_string()))?.mean)
    }
}

/// Whether samples are numbers throughout.
fn finite(samples: &Tensor) -> bool {
    samples.to_f64s().is_none_or(|all| all.iter().all(|v| v.is_finite()))
}

/// What the network sees in the samples of a candidate; `None` where some are no numbers.
fn draw(
    trial: &Trial,
    extractor: &Extractor,
    candidate: &Candidate,
    arms: &[String],
    batches: std::ops::Range<u64>,
) -> Result<Option<Features>, Failure> {
    let (table, plan) = plan_of(trial, candidate, arms)?;
    let mut drawn = Features::new();
    for batch in batches {
        let samples = trial.samples(&table, &plan, batch)?;
        if !finite(&samples) {
            return Ok(None);
        }
        extractor.add(&samples, &mut drawn)?;
    }
    Ok(Some(drawn))
}

/// The finalist whose samples, as a set, are closest to real images, and what was measured.
fn decide(
    trial: &Trial,
    extractor: &Extractor,
    images: &Features,
    draws: usize,
    finalists: &[&Candidate],
    arms: &[String],
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
        // Batches that no score was made of.
        let batches = (1 << 20)..(1 << 20) + draws.div_ceil(BATCH).max(1) as u64;
        let Some(drawn) = draw(trial, extractor, candidate, arms, batches)? else { continue };
        let distance = kernel(&drawn, images, 20, 500, trial.inputs.seed)?;
        let frechet = frechet(&drawn, images)?;
        lines.push(json!({"candidate": candidate.key(), "kid": distance.mean, "kid_deviation": distance.deviation,
                          "fid": frechet, "draws": drawn.len(), "real": images.len()}));
        if best.is_none_or(|(least, _)| distance.mean < least) {
            best = Some((distance.mean, candidate));
        }
    }
    let (_, best) = best.ok_or_else(|| anyhow!("there is no candidate to decide between"))?;
    Ok((best.clone(), Value::Array(lines)))
}

/// What scores depend on; scores of another setting are not read.
fn setting(trial: &Trial, wanted: &Search, layers: usize) -> Value {
    let key = trial.key();
    json!({
        "denoiser": key.model, "guidance": key.guidance, "shape": key.shape, "solver": trial.scheduler.solver.name(),
        "scheduler": format!("{:?}", trial.scheduler), "eta": trial.request.eta, "seed": trial.inputs.seed, "pairs": wanted.pairs,
        "layers": layers, "reference": wanted.reference, "shapes": trial.inputs.shapes,
        "real": wanted.real.as_ref().map(|real| format!("{real:?}")),
    })
}

/// The scores that a log holds, and the log to write on. A torn last line is dropped; a log of another setting is an error.
fn open_log(path: &Path, setting: &Value) -> Result<(BTreeMap<String, f64>, File), Failure> {
    let cannot = |what: &str| format!("the log `{}` cannot be {what}", path.display());
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Failure::Error(anyhow!(e).context(cannot("read")))),
    };
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut known = BTreeMap::new();
    let mut lines = text[..whole].lines();
    let first = lines.next();
    if let Some(first) = first {
        let found: Value = serde_json::from_str(first).unwrap_or_default();
        if found != *setting {
            let message = format!("{}: it is of another search; --search-log FILE names another", cannot("continued"));
            return Err(Failure::Usage(message));
        }
    }
    for line in lines {
        let line: Value = serde_json::from_str(line).with_context(|| cannot("understood"))?;
        if let Some(key) = line["candidate"].as_str() {
            known.insert(key.to_owned(), line["score"].as_f64().unwrap_or(f64::INFINITY));
        }
    }
    let mut file =
        OpenOptions::new().create(true).truncate(false).write(true).open(path).with_context(|| cannot("written"))?;
    let opened = file.set_len(whole as u64).and_then(|()| file.seek(SeekFrom::End(0)).map(drop));
    opened.with_context(|| cannot("written"))?;
    if first.is_none() {
        file.write_all(format!("{setting}\n").as_bytes()).with_context(|| cannot("written"))?;
    }
    Ok((known, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_up_to_a_torn_line_and_belongs_to_its_setting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let setting = json!({"seed": 1});
        let (known, mut file) = open_log(&path, &setting).unwrap();
        assert!(known.is_empty());
        file.write_all(b"{\"candidate\":\"9 3\",\"score\":0.5}\n{\"candidate\":\"9 4\",\"score\":null}\n{\"candid")
            .unwrap();
        drop(file);
        let (known, mut file) = open_log(&path, &setting).unwrap();
        assert_eq!(known, BTreeMap::from([("9 3".to_owned(), 0.5), ("9 4".to_owned(), f64::INFINITY)]));
        file.write_all(b"{\"candidate\":\"9 5\",\"score\":0.25}\n").unwrap();
        drop(file);
        assert_eq!(open_log(&path, &setting).unwrap().0.len(), 3);
        let other = open_log(&path, &json!({"seed": 2})).unwrap_err();
        assert!(other.to_string().contains("another search"));
    }
}
