//! Timing models side by side: inputs in place, warmed up, taking turns, in several sittings with sessions made anew.
//!
//! Two sessions of one model differ by where their memory happens to lie, and a machine differs from minute to minute.
//! So models take turns within a sitting, every sitting loads them again, and a difference counts only if it stands
//! out from what the sittings disagree about.

mod timings;

pub use timings::{Series, Timings};

use crate::{
    Engine, InputError, InputSpec, LoadOptions, Profile, ProfileError, RuntimeError, Sample, SampleSet, SetError,
    SetSpec, Source, Talk, Timed, generate, quantile, sizes_to_try,
};
use lathe_ir::{Model, ReadError};
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The inputs of a measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum BenchInputs {
    /// Made up: the first sizes that the model accepts.
    Random(InputSpec),
    /// The first batch of a set.
    Set(SetSpec),
}

/// What is measured, in one process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum BenchTask {
    /// Loading a model and its first run, and the memory that this takes: once, in a process that does nothing else.
    Load,
    /// Runs, the models taking turns.
    Time {
        /// Time to spend on runs, in seconds; a slow model takes longer.
        seconds: f64,
        /// How often sessions are made anew.
        sittings: usize,
    },
    /// Any number of small models, each with inputs made up for itself: the runtime of one run.
    Each,
    /// Where the time of a run goes. The runtime writes its profile into this folder.
    Profile {
        /// An empty folder.
        folder: PathBuf,
    },
}

/// What was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum BenchResult {
    /// For [`BenchTask::Load`].
    Loaded(Loading),
    /// For [`BenchTask::Time`].
    Timed(Timings),
    /// For [`BenchTask::Each`]: the median of every model, in milliseconds.
    Each(Vec<f64>),
    /// For [`BenchTask::Profile`], one for each model.
    Profiled(Vec<Profile>),
}

/// How a model starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Loading {
    /// Making a session, in milliseconds.
    pub load_ms: f64,
    /// The first run, in milliseconds.
    pub first_run_ms: f64,
    /// The largest resident memory of the process, runtime and model, after both; `None` where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No inputs can be made.
    #[error(transparent)]
    Inputs(#[from] InputError),
    /// The set does not fit.
    #[error(transparent)]
    Set(#[from] SetError),
    /// A model cannot be loaded or run.
    #[error("`{}`: {error}", .path.display())]
    Model {
        /// The model.
        path: PathBuf,
        /// What went wrong.
        error: RuntimeError,
    },
    /// The provider that was asked for takes no node.
    #[error("`{}`: {provider} took none of its {nodes} nodes; they would run elsewhere", .path.display())]
    Untaken {
        /// The model.
        path: PathBuf,
        /// The provider.
        provider: String,
        /// How many nodes there are.
        nodes: usize,
    },
    /// There is nothing to measure.
    #[error("no model is given")]
    NoModel,
    /// Nothing can be fed to a model.
    #[error("no inputs could be made for the model")]
    NoInputs,
    /// The engine does not say where time goes.
    #[error("{engine} has no profiler")]
    NoProfiler {
        /// The engine.
        engine: String,
    },
    /// The profile is not where the engine says.
    #[error("cannot read the profile `{}`: {source}", .path.display())]
    Unreadable {
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The profile is none.
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

/// Sessions are made anew this often where what differs is to be told from chance.
pub const SITTINGS: usize = 7;

/// Rounds of a sitting at least.
const ROUNDS: usize = 3;

/// A model runs this long before it is the other's turn, so that caches are its own again.
const TURN: Duration = Duration::from_millis(40);

/// Threads of the other model's session spin for a while after its last run.
const REST: Duration = Duration::from_millis(2);

/// Runs under the profiler.
const PROFILED_RUNS: usize = 12;

/// Rounds of [`BenchTask::Each`], at least and at most.
const EACH_ROUNDS: (usize, usize) = (3, 9);

/// Time after which no further round begins.
const EACH_TIME: Duration = Duration::from_secs(1);

/// What the rounds of a model may differ by, as a share of their median, for no more to be needed.
const ALIKE: f64 = 0.03;

/// Does one task. `models` are one or two files with the same inputs, of which the first one says what they are; only
/// [`BenchTask::Each`] takes more.
pub fn bench(
    engine: &dyn Engine,
    models: &[PathBuf],
    inputs: &BenchInputs,
    task: &BenchTask,
    options: &LoadOptions,
    talk: &mut dyn Talk,
) -> Result<BenchResult, BenchError> {
    let first = models.first().ok_or(BenchError::NoModel)?;
    talk.stage("reading the model");
    let model = Model::read(first)?.model;
    let mut feed = Feed { model, inputs, fixed: None };
    let options = LoadOptions { optimize: true, spin: true, ..options.clone() };
    let bench = Bench { engine, models, options };
    match task {
        BenchTask::Load => bench.load(first, &mut feed, talk).map(BenchResult::Loaded),
        BenchTask::Time { seconds, sittings } => {
            bench.time(&mut feed, (*seconds, *sittings), talk).map(BenchResult::Timed)
        }
        BenchTask::Each => bench.each(inputs, talk).map(BenchResult::Each),
        BenchTask::Profile { folder } => bench.profile(&mut feed, folder, talk).map(BenchResult::Profiled),
    }
}

/// What is fed to a model, and how many samples of a set that is.
type Fed = (Sample, Option<usize>);

type Candidates<'a> = Box<dyn Iterator<Item = Result<Fed, BenchError>> + 'a>;

/// The inputs, once they are known.
struct Feed<'a> {
    model: Model,
    inputs: &'a BenchInputs,
    fixed: Option<Fed>,
}

impl Feed<'_> {
    /// Puts inputs in place that the model accepts and runs it once; the times of copying and of that run.
    fn start(&mut self, timed: &mut dyn Timed, path: &Path) -> Result<(Option<Duration>, Duration), BenchError> {
        let failed = |error: RuntimeError| BenchError::Model { path: path.to_owned(), error };
        let candidates: Candidates<'_> = match &self.fixed {
            Some(fixed) => Box::new(std::iter::once(Ok(fixed.clone()))),
            None => match self.inputs {
                BenchInputs::Set(spec) => {
                    let set = SampleSet::open(spec, &self.model)?;
                    let batch = set.batches().next().transpose()?;
                    Box::new(batch.map(|b| Ok((b.inputs, Some(b.samples)))).into_iter())
                }
                BenchInputs::Random(spec) => {
                    let model = &self.model;
                    let make = move |sizes| Ok((generate(model, spec, &sizes)?, None));
                    Box::new(sizes_to_try(&self.model, spec).into_iter().map(make))
                }
            },
        };
        let mut refusal = None;
        for candidate in candidates {
            let (sample, samples) = match candidate {
                Ok(candidate) => candidate,
                Err(BenchError::Inputs(InputError::TooLarge { .. })) if refusal.is_some() => continue,
                Err(error) => return Err(error),
            };
            let ran = timed.bind(&sample).and_then(|copied| Ok((copied, timed.run()?)));
            match ran {
                Ok(times) => {
                    self.fixed = Some((sample, samples));
                    return Ok(times);
                }
                Err(error) => _ = refusal.get_or_insert(error),
            }
        }
        Err(refusal.map_or(BenchError::NoInputs, failed))
    }

    fn describe(&self) -> String {
        let inputs = self.fixed.iter().flat_map(|(sample, _)| sample);
        inputs.map(|(name, tensor)| format!("{name} {:?}", tensor.dims())).collect::<Vec<_>>().join(", ")
    }
}

struct Bench<'a> {
    engine: &'a dyn Engine,
    models: &'a [PathBuf],
    options: LoadOptions,
}

impl Bench<'_> {
    fn session(&self, path: &Path, profile: Option<&Path>) -> Result<Box<dyn Timed>, BenchError> {
        let session = self.engine.timed(Source::Path(path), &self.options, profile);
        session.map_err(|error| BenchError::Model { path: path.to_owned(), error })
    }

    fn load(&self, path: &Path, feed: &mut Feed<'_>, talk: &mut dyn Talk) -> Result<Loading, BenchError> {
        talk.stage("loading the model");
        let start = Instant::now();
        let mut timed = self.session(path, None)?;
        let load = start.elapsed();
        talk.stage("running the model");
        let (_, first) = feed.start(timed.as_mut(), path)?;
        Ok(Loading { load_ms: ms(load), first_run_ms: ms(first), peak_rss_bytes: peak_rss_bytes() })
    }

    fn time(
        &self,
        feed: &mut Feed<'_>,
        (seconds, sittings): (f64, usize),
        talk: &mut dyn Talk,
    ) -> Result<Timings, BenchError> {
        let mut timings = Timings { engine: self.engine.name(), ..Timings::default() };
        timings.models = vec![Series::default(); self.models.len()];
        let budget = Duration::try_from_secs_f64(seconds / sittings as f64).unwrap_or(Duration::ZERO);
        let copies = self.options.provider != "cpu";
        for sitting in 0..sittings {
            talk.stage(&format!("timing, sitting {} of {sittings}", sitting + 1));
            // Whoever is loaded first, or runs first, must not be the same one every time.
            let mut order: Vec<usize> = (0..self.models.len()).collect();
            if sitting % 2 == 1 {
                order.reverse();
            }
            let mut sessions: Vec<Option<Box<dyn Timed>>> = self.models.iter().map(|_| None).collect();
            // The inputs are those of the first model, so it goes first until they are known.
            for &index in if sitting == 0 { &[0usize, 1][..self.models.len().min(2)] } else { &order } {
                let path = &self.models[index];
                let mut timed = self.session(path, None)?;
                let (copied, _) = feed.start(timed.as_mut(), path)?;
                let failed = |error| BenchError::Model { path: path.clone(), error };
                if sitting == 0 && copies {
                    timings.models[index].copy_in_ms = copied.map(ms);
                    timings.models[index].copies_in_run = timed.copies_in_run();
                    timings.models[index].copy_out_ms = timed.fetch().map_err(failed)?.map(ms);
                }
                turn(timed.as_mut()).map_err(failed)?;
                sessions[index] = Some(timed);
            }
            for series in &mut timings.models {
                series.sittings.push(Vec::new());
            }
            let mut ratios = Vec::new();
            let start = Instant::now();
            talk.progress(sitting, sittings, "sittings");
            let mut rounds = 0;
            while rounds < ROUNDS || start.elapsed() < budget {
                let mut medians = vec![f64::NAN; self.models.len()];
                for &index in &order {
                    let Some(timed) = &mut sessions[index] else { continue };
                    let runs = turn(timed.as_mut());
                    let runs = runs.map_err(|error| BenchError::Model { path: self.models[index].clone(), error })?;
                    medians[index] = quantile(&runs, 0.5);
                    timings.models[index].sittings[sitting].extend(runs);
                }
                if let [before, after] = medians[..] {
                    ratios.push(after / before);
                }
                order.reverse();
                rounds += 1;
            }
            if self.models.len() == 2 {
                timings.ratios.push(ratios);
            }
        }
        timings.inputs = feed.describe();
        timings.samples = feed.fixed.as_ref().and_then(|(_, samples)| *samples);
        Ok(timings)
    }

    /// All models are loaded and take turns in every round, so that a disturbance meets all of them.
    fn each(&self, inputs: &BenchInputs, talk: &mut dyn Talk) -> Result<Vec<f64>, BenchError> {
        let mut sessions = Vec::new();
        for path in self.models {
            let mut feed = Feed { model: Model::read(path)?.model, inputs, fixed: None };
            let mut timed = self.session(path, None)?;
            feed.start(timed.as_mut(), path)?;
            sessions.push(timed);
        }
        let mut rounds = vec![Vec::new(); sessions.len()];
        let (least, most) = EACH_ROUNDS;
        let start = Instant::now();
        for round in 0..most {
            if round >= least && (start.elapsed() >= EACH_TIME || rounds.iter().all(|medians| agree(medians))) {
                break;
            }
            talk.progress(round, most, "rounds");
            for (index, timed) in sessions.iter_mut().enumerate() {
                let failed = |error| BenchError::Model { path: self.models[index].clone(), error };
                rounds[index].push(quantile(&turn_of(timed.as_mut(), TURN / 4).map_err(failed)?, 0.5));
            }
        }
        Ok(rounds.iter().map(|medians| quantile(medians, 0.5)).collect())
    }

    fn profile(&self, feed: &mut Feed<'_>, folder: &Path, talk: &mut dyn Talk) -> Result<Vec<Profile>, BenchError> {
        let mut profiles = Vec::new();
        for path in self.models {
            talk.stage("profiling the model");
            let mut timed = self.session(path, Some(folder))?;
            feed.start(timed.as_mut(), path)?;
            let failed = |error| BenchError::Model { path: path.clone(), error };
            for _ in 1..PROFILED_RUNS {
                timed.run().map_err(failed)?;
            }
            let Some(file) = timed.profile().map_err(failed)? else {
                return Err(BenchError::NoProfiler { engine: self.engine.name() });
            };
            let json = std::fs::read(&file).map_err(|source| BenchError::Unreadable { path: file.clone(), source })?;
            // The folder is the caller's and goes with everything in it.
            let _ = std::fs::remove_file(&file);
            let profile = Profile::parse(&json, timed.provider(), &timed.left_because())?;
            let placement = &profile.placement;
            if placement.taken == 0 && !placement.elsewhere.is_empty() {
                let (provider, nodes) = (placement.provider.clone(), placement.elsewhere.len());
                return Err(BenchError::Untaken { path: path.clone(), provider, nodes });
            }
            profiles.push(profile);
        }
        Ok(profiles)
    }
}

/// Runs a model for a while; the first run, which finds the other's data in the caches, does not count if there are
/// enough others.
fn turn(timed: &mut dyn Timed) -> Result<Vec<f64>, RuntimeError> {
    turn_of(timed, TURN)
}

fn turn_of(timed: &mut dyn Timed, length: Duration) -> Result<Vec<f64>, RuntimeError> {
    std::thread::sleep(REST);
    let start = Instant::now();
    let mut runs = Vec::new();
    while runs.is_empty() || start.elapsed() < length {
        runs.push(ms(timed.run()?));
    }
    if runs.len() > 3 {
        runs.remove(0);
    }
    Ok(runs)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The largest resident memory of this process so far, where the system tells.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Whether the middle half of what rounds measured lies close together.
fn agree(medians: &[f64]) -> bool {
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| quantile(medians, share));
    high - low <= ALIKE * middle
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_agree_where_their_middle_half_is_close() {
        assert!(agree(&[1.0, 1.01, 1.005]) && agree(&[1.0, 1.0, 1.0, 1.0, 9.0]));
        assert!(!agree(&[1.0, 1.1, 1.05]));
    }

    use crate::testing::{engine, unary};
    use lathe_ir::Node;

    #[test]
    fn measures_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relu.onnx");
        std::fs::write(&path, unary(Node::new("Relu")).to_bytes()).unwrap();
        let inputs = BenchInputs::Random(InputSpec { shapes: vec![("x".into(), vec![64, 3])], ..InputSpec::default() });
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let ask = |models: &[PathBuf], task: BenchTask| {
            bench(engine(), models, &inputs, &task, &options, &mut |_: &str| {}).unwrap()
        };
        let both = [path.clone(), path.clone()];
        let BenchResult::Timed(timings) = ask(&both, BenchTask::Time { seconds: 0.0, sittings: SITTINGS }) else {
            panic!()
        };
        assert_eq!((timings.inputs.as_str(), timings.ratios.len()), ("x [64, 3]", SITTINGS));
        assert!(timings.quartiles(0)[0] > 0.0 && timings.models[0].copy_in_ms.is_none());
        let BenchResult::Loaded(loading) = ask(&both[..1], BenchTask::Load) else { panic!() };
        assert!(loading.load_ms > 0.0 && loading.first_run_ms > 0.0, "{loading:?}");
        let task = BenchTask::Profile { folder: folder.path().into() };
        let BenchResult::Profiled(profiles) = ask(&both[..1], task) else { panic!() };
        assert_eq!(profiles[0].by_operator()[0].0, "Relu");
        assert_eq!(profiles[0].placement.taken, 1);
        assert_eq!(profiles[0].runs, PROFILED_RUNS - 1);
    }

    #[test]
    fn a_model_that_cannot_run_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("odd.onnx");
        std::fs::write(&path, unary(Node::new("NoSuchOperator")).to_bytes()).unwrap();
        let inputs = BenchInputs::Random(InputSpec::default());
        let options = LoadOptions::default();
        let error = bench(engine(), &[path], &inputs, &BenchTask::Load, &options, &mut |_: &str| {}).unwrap_err();
        assert!(error.to_string().contains("odd.onnx`: ONNX Runtime"), "{error}");
    }
}
