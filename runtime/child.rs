//! The program's side: a worker process that may crash, hang or eat memory without taking the program with it.

mod asking;
mod pool;
mod worker;

use crate::{
    BenchInputs, BenchResult, BenchTask, ChosenSamples, Claim, ContentIds, Executor, Gates, Inputs, KeptResults,
    LayersJob, LayersReport, Listener, LoadOptions, Measured, ModelOn, RuntimeError, Sample, SetSpec, Verdict, machine,
    verify::{AT_EDGE, RESULT_AT_EDGE},
    wire::{GatherJob, Gathered, InputHeads, MeasureJob, SelectJob, TrialJob, WorkerAnswer, WorkerRequest, framing},
};
use asking::Answer;
use lathe_analysis::{Evaluate, EvaluateError, Keep as _};
use lathe_ir::{Model, Tensor};
use pool::Pool;
use serde::Serialize;
use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tempfile::TempDir;

/// What one request may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Time for one stage of a request: loading a model, running one batch.
    pub timeout: Option<Duration>,
    /// Resident memory of the worker, in bytes; watched on Linux only.
    pub memory: Option<u64>,
}

/// Worker processes that run models. They are started when first needed and again after they died.
pub struct Child {
    pool: Pool,
    limits: Limits,
    /// Name and providers of the engine, once it was asked.
    engine: Mutex<Option<(String, Vec<String>)>>,
    listener: Listener,
    content: ContentIds,
    kept: Option<KeptResults>,
    scratch: Option<PathBuf>,
    executor: Option<Arc<dyn Executor>>,
}

/// What measurements are kept as.
const MEASUREMENTS: &str = "measurements";

impl Child {
    /// A worker that `program` becomes when called with `arguments`: it must call [`crate::serve`].
    pub fn new(program: impl Into<PathBuf>, arguments: Vec<OsString>, limits: Limits) -> Child {
        Child {
            pool: Pool::new(program.into(), arguments, 1),
            limits,
            engine: Mutex::new(None),
            listener: Listener::default(),
            content: ContentIds::default(),
            kept: None,
            scratch: None,
            executor: None,
        }
    }

    /// The same, and what is computed is kept for later runs.
    pub fn keeping(self, kept: KeptResults, content: ContentIds) -> Child {
        Child { kept: Some(kept), content, ..self }
    }

    /// The same, and nothing is taken of what earlier runs kept, nor kept for later ones.
    pub fn keeping_nothing(self) -> Child {
        Child { kept: None, ..self }
    }

    /// What files are by their contents.
    pub fn content(&self) -> &ContentIds {
        &self.content
    }

    /// Where results are kept for later runs; `None` where nothing is.
    pub fn kept(&self) -> Option<&KeptResults> {
        self.kept.as_ref()
    }

    /// The same with up to so many workers, each within the limits: requests of several threads are answered at a time.
    pub fn of_workers(self, most: usize) -> Child {
        Child { pool: self.pool.with_most(most), ..self }
    }

    /// The same, and models that are written for a request go to this folder, which every worker sees.
    pub fn writing_in(self, folder: PathBuf) -> Child {
        Child { scratch: Some(folder), ..self }
    }

    /// A fresh folder for models that are written for requests.
    pub fn scratch(&self) -> io::Result<TempDir> {
        match &self.scratch {
            None => tempfile::tempdir(),
            Some(folder) => {
                fs::create_dir_all(folder)?;
                tempfile::tempdir_in(folder)
            }
        }
    }

    /// The same, and whatever runs models for a while is carried out by `executor`, whose workers must be of this `version`
    /// and have the same engine.
    pub fn carried_out_by(self, executor: Arc<dyn Executor>, version: &str) -> Result<Child, RuntimeError> {
        let (engine, _) = self.hello()?;
        let child = Child { executor: Some(executor), ..self };
        match child.elsewhere(vec![(WorkerRequest::Hello, Vec::new())])?.pop() {
            Some(Ok((WorkerAnswer::Hello { name, version: other, .. }, _))) => {
                if other != version {
                    return Err(RuntimeError::Child(format!(
                        "the workers are of version {other}, and this is {version}"
                    )));
                }
                if name != engine {
                    return Err(RuntimeError::Child(format!("the workers run {name}, and here it is {engine}")));
                }
                Ok(child)
            }
            Some(Err(error)) => Err(error),
            _ => Err(RuntimeError::Child("the workers do not say who they are".to_owned())),
        }
    }

    /// How many requests are answered at a time.
    pub fn workers(&self) -> usize {
        self.executor.as_ref().map_or(self.pool.most(), |executor| executor.workers())
    }

    /// The same, and `listener` hears how far long work is.
    pub fn heard_by(self, listener: Listener) -> Child {
        Child { listener, ..self }
    }

    /// Who hears how far long work is.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// A hash of everything that results of runs depend on, and of what else there is.
    pub fn run_hash(
        &self,
        model: &Model,
        set: &SetSpec,
        load: &LoadOptions,
        more: &impl Serialize,
    ) -> Result<blake3::Hash, RuntimeError> {
        let (engine, _) = self.hello()?;
        let failed = |e| RuntimeError::Child(format!("what a run depends on cannot be read: {e}"));
        // Kernels round as the processor and the division among threads have it.
        let more = (more, load.device, load.threads, machine());
        self.content.of_run(&engine, model, set, load, &more).map_err(failed)
    }

    /// The engine's name and its execution providers.
    pub fn hello(&self) -> Result<(String, Vec<String>), RuntimeError> {
        let mut known = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        match self.ask(&WorkerRequest::Hello, &[])? {
            (WorkerAnswer::Hello { name, providers, .. }, _) => Ok(known.insert((name, providers)).clone()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Runs a model that is already serialized.
    pub fn evaluate(
        &self,
        model: &[u8],
        inputs: &[(String, Tensor)],
        options: &LoadOptions,
    ) -> Result<Sample, RuntimeError> {
        let (heads, data) = framing::pack(inputs);
        let request = WorkerRequest::Evaluate { model: model.len() as u64, inputs: heads, options: options.clone() };
        let payload: Vec<&[u8]> = std::iter::once(model).chain(data.iter().map(|part| &part[..])).collect();
        match self.ask(&request, &payload)? {
            (WorkerAnswer::Outputs(heads), mut payload) => {
                framing::unpack(heads, &mut payload).map_err(|e| RuntimeError::Child(e.to_string()))
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Runs a model on disk on every one of some sets of inputs. It is loaded once.
    pub fn run_file(
        &self,
        model: &Path,
        inputs: &[Sample],
        options: &LoadOptions,
    ) -> Result<Vec<Sample>, RuntimeError> {
        let (heads, data) = framing::pack_all(inputs);
        let request = WorkerRequest::Run { model: model.to_owned(), inputs: heads, options: options.clone() };
        let payload: Vec<&[u8]> = data.iter().map(|part| &part[..]).collect();
        match self.ask(&request, &payload)? {
            (WorkerAnswer::Ran(heads), mut payload) => {
                framing::unpack_all(heads, &mut payload).map_err(|e| RuntimeError::Child(e.to_string()))
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Compares two models on disk, with [`crate::verify`], entirely inside the worker.
    pub fn verify(
        &self,
        reference: ModelOn<'_>,
        candidate: ModelOn<'_>,
        inputs: &Inputs,
        claim: Claim,
    ) -> Result<Verdict, RuntimeError> {
        let mut data = Vec::new();
        let inputs = match inputs {
            Inputs::Random(spec) => InputHeads::Random(spec.clone()),
            Inputs::Set(spec) => InputHeads::Set(spec.clone()),
            Inputs::Given(samples) => {
                let (heads, parts) = framing::pack_all(samples);
                data = parts;
                InputHeads::Given(heads)
            }
        };
        let mut request = WorkerRequest::Verify {
            reference: reference.path.to_owned(),
            candidate: candidate.path.to_owned(),
            inputs,
            claim,
            reference_options: reference.options.clone(),
            options: candidate.options.clone(),
            left_out: Vec::new(),
        };
        let payload: Vec<&[u8]> = data.iter().map(|part| &part[..]).collect();
        loop {
            let ended = match self.ask(&request, &payload) {
                Ok((WorkerAnswer::Verdict(verdict), _)) => return Ok(verdict),
                Ok((other, _)) => return Err(unexpected(&other)),
                Err(error) => error,
            };
            let RuntimeError::Ended { stage, message, .. } = &ended else { return Err(ended) };
            let result_at_edge = stage.strip_prefix(RESULT_AT_EDGE);
            let two_providers = reference.options.provider != candidate.options.provider;
            if let Some(sizes) = result_at_edge.filter(|_| !two_providers) {
                let (message, sizes) = (message.clone(), sizes.to_owned());
                return Ok(Verdict::CandidateRefused { message, sizes });
            }
            // An engine that the original crashes on some inputs refuses them; the others are still to run. So does a
            // provider on which only the candidate runs.
            match (stage.strip_prefix(AT_EDGE).or(result_at_edge), &mut request) {
                (Some(at), WorkerRequest::Verify { left_out, .. })
                    if !left_out.iter().any(|(known, _)| known == at) =>
                {
                    left_out.push((at.to_owned(), message.clone()));
                }
                _ => return Err(ended),
            }
        }
    }

    /// Compares two models value by value, with [`crate::compare_layers`], entirely inside the worker.
    pub fn layers(&self, job: LayersJob) -> Result<LayersReport, RuntimeError> {
        match self.ask(&WorkerRequest::Layers(Box::new(job)), &[])? {
            (WorkerAnswer::Layers(report), _) => Ok(*report),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Runs models that compute statistics, as many at a time as there are workers; what came of them, in their order.
    pub(crate) fn gather(&self, jobs: &[GatherJob]) -> Result<Vec<Gathered>, RuntimeError> {
        let answers = self.ask_all(jobs.iter().map(|job| WorkerRequest::Gather(job.clone())).collect());
        let gathered = |answer: Result<Answer, RuntimeError>| match answer? {
            (WorkerAnswer::Gathered(gathered), _) => Ok(gathered),
            (other, _) => Err(unexpected(&other)),
        };
        answers.into_iter().map(gathered).collect()
    }

    /// Runs variants of a model, shared out among the workers; a distance that is not finite is infinite.
    pub(crate) fn trials(&self, job: &TrialJob) -> Result<Vec<f64>, RuntimeError> {
        let share = job.gates.len().div_ceil(self.workers()).max(1);
        let part = |gates: &[Gates]| WorkerRequest::Trials(TrialJob { gates: gates.to_vec(), ..job.clone() });
        let mut all = Vec::new();
        for answer in self.ask_all(job.gates.chunks(share).map(part).collect()) {
            match answer? {
                (WorkerAnswer::Tried(found), _) => all.extend(found.into_iter().map(|d| d.unwrap_or(f64::INFINITY))),
                (other, _) => return Err(unexpected(&other)),
            }
        }
        Ok(all)
    }

    /// Chooses `count` samples of a set, as calibration sets are chosen from larger pools, entirely inside the worker.
    pub fn select(
        &self,
        model: &Path,
        set: &SetSpec,
        count: usize,
        seed: u64,
        options: &LoadOptions,
    ) -> Result<ChosenSamples, RuntimeError> {
        let (model, set, options) = (model.to_owned(), set.clone(), options.clone());
        match self.ask(&WorkerRequest::Select(SelectJob { model, set, count, seed, options }), &[])? {
            (WorkerAnswer::Selected(selection), _) => Ok(selection),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Measures what a candidate on disk loses against its reference on a set, entirely inside the worker.
    ///
    /// `metric` is the name of one of [`crate::metrics`] or `auto`. A model that does not run is a verdict.
    pub fn measure(
        &self,
        reference: &Path,
        candidate: &Path,
        set: &SetSpec,
        metric: &str,
        options: &LoadOptions,
    ) -> Result<Result<Measured, Verdict>, RuntimeError> {
        let key = self.measurement_key((reference, candidate), set, metric, options);
        let kept = self.kept.as_ref().zip(key);
        let known = kept.as_ref().and_then(|(kept, key)| kept.read(MEASUREMENTS, key));
        // What cannot be read is measured again.
        if let Some(measured) = known.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(Ok(measured));
        }
        let (reference, candidate) = (reference.to_owned(), candidate.to_owned());
        let (set, metric, options) = (set.clone(), metric.to_owned(), options.clone());
        match self.ask(&WorkerRequest::Measure(MeasureJob { reference, candidate, set, metric, options }), &[])? {
            (WorkerAnswer::Measured(found), _) => {
                if let (Ok(measured), Some((kept, key))) = (&found, kept)
                    && let Ok(bytes) = serde_json::to_vec(measured)
                {
                    kept.put(MEASUREMENTS, &key, &bytes);
                }
                Ok(found.map(|measured| *measured))
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// A key of what a measurement depends on; `None` where that cannot be told.
    fn measurement_key(
        &self,
        (reference, candidate): (&Path, &Path),
        set: &SetSpec,
        metric: &str,
        options: &LoadOptions,
    ) -> Option<[u8; 32]> {
        let read = |path: &Path| Model::read(path).ok().map(|loaded| loaded.model);
        let (reference, candidate) = (read(reference)?, read(candidate)?);
        let candidate = self.content.of_model(&candidate).ok()?;
        let more = (candidate.as_bytes(), metric);
        Some(*self.run_hash(&reference, set, options, &more).ok()?.as_bytes())
    }

    /// Times one or two models on disk, with [`crate::bench`], entirely inside the worker.
    pub fn bench(
        &self,
        models: &[PathBuf],
        inputs: &BenchInputs,
        task: BenchTask,
        options: &LoadOptions,
    ) -> Result<BenchResult, RuntimeError> {
        let (models, inputs, options) = (models.to_vec(), inputs.clone(), options.clone());
        match self.ask(&WorkerRequest::Bench { models, inputs, task, options }, &[])? {
            (WorkerAnswer::Timed(result), _) => Ok(result),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

impl Evaluate for Child {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        Ok(self.evaluate(&model.to_bytes(), inputs, &options)?)
    }

    fn name(&self) -> String {
        self.hello().map_or_else(|_| "no runtime".to_owned(), |(name, _)| name)
    }
}

fn unexpected(answer: &WorkerAnswer) -> RuntimeError {
    RuntimeError::Child(format!("the worker answers another question: {answer:?}"))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
        time::Instant,
    };

    fn shell(script: &str, limits: Limits) -> Child {
        Child::new("/bin/sh", vec!["-c".into(), script.into()], limits)
    }

    #[test]
    fn a_crash_names_its_signal_and_last_words() {
        let child = shell("echo bad alloc >&2; kill -SEGV $$", Limits::default());
        let error = child.hello().unwrap_err().to_string();
        assert_eq!(
            error,
            "the runtime crashed (signal 11, SIGSEGV: it touched memory that is not its own) while starting; \
             its last words were \"bad alloc\""
        );
        // The next request starts another worker.
        assert_eq!(child.hello().unwrap_err().to_string(), error);
    }

    /// Compares by way of a worker that says what is in `first`, ends, and is started again to say what is in `second`.
    fn verified(first: &[WorkerAnswer], second: &[WorkerAnswer]) -> Result<Verdict, RuntimeError> {
        let folder = tempfile::tempdir().unwrap();
        for (name, answers) in [("first", first), ("second", second)] {
            let mut wire = Vec::new();
            answers.iter().for_each(|answer| framing::write(&mut wire, answer, &[]).unwrap());
            std::fs::write(folder.path().join(name), wire).unwrap();
        }
        let at = folder.path().display();
        let script = format!("if [ -e {at}/once ]; then cat {at}/second; else touch {at}/once; cat {at}/first; fi");
        let inputs = Inputs::Random(crate::InputSpec::default());
        let claim = Claim::Equivalent { rtol: None };
        let child = shell(&script, Limits::default());
        let options = LoadOptions::default();
        let on = |path: &'static str| ModelOn { path: Path::new(path), options: &options };
        child.verify(on("a"), on("b"), &inputs, claim)
    }

    #[test]
    fn an_edge_that_crashes_the_original_is_left_out() {
        let at = |prefix: &str| WorkerAnswer::Stage(format!("{prefix}n = 0"));
        let verdict = Verdict::Compared(crate::verify::Report::default());
        let found = verified(&[at(AT_EDGE)], &[WorkerAnswer::Verdict(verdict.clone())]).unwrap();
        assert_eq!(found, verdict);
        // The second time it is left out, so that something else is wrong.
        let error = verified(&[at(AT_EDGE)], &[at(AT_EDGE)]).unwrap_err().to_string();
        assert!(error.contains("running the original at the edge: n = 0"), "{error}");
        let error = verified(&[WorkerAnswer::Stage("loading the original".to_owned())], &[]).unwrap_err().to_string();
        assert!(error.contains("loading the original"), "{error}");
    }

    #[test]
    fn an_edge_that_crashes_the_result_is_a_fault() {
        let stage = WorkerAnswer::Stage(format!("{RESULT_AT_EDGE}n = 0"));
        let Verdict::CandidateRefused { sizes, .. } = verified(&[stage], &[]).unwrap() else { panic!() };
        assert_eq!(sizes, "n = 0");
    }

    #[test]
    fn a_request_whose_worker_was_killed_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut wire = Vec::new();
        let hello =
            WorkerAnswer::Hello { name: "an engine".to_owned(), providers: Vec::new(), version: "1".to_owned() };
        framing::write(&mut wire, &hello, &[]).unwrap();
        std::fs::write(folder.path().join("answer"), wire).unwrap();
        let at = folder.path().display();
        let script = format!("if [ -e {at}/once ]; then cat {at}/answer; else touch {at}/once; kill -KILL $$; fi");
        assert_eq!(shell(&script, Limits::default()).hello().unwrap().0, "an engine");
        let always = shell("kill -KILL $$", Limits::default()).hello().unwrap_err().to_string();
        assert!(always.contains("SIGKILL"), "{always}");
    }

    #[test]
    fn workers_answer_at_a_time_and_one_that_times_is_alone() {
        let script = "exec sleep 60";
        let limits = Limits { timeout: Some(Duration::from_millis(400)), memory: None };
        let bench = |child: &Child| {
            let inputs = BenchInputs::Random(crate::InputSpec::default());
            child.bench(&[], &inputs, BenchTask::Load, &LoadOptions::default()).unwrap_err()
        };
        let took = |workers: usize, work: &(dyn Fn(&Child) -> RuntimeError + Sync)| {
            let child = shell(script, limits).of_workers(workers);
            let start = Instant::now();
            thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(|| work(&child)))));
            start.elapsed().as_secs_f64()
        };
        let run = |child: &Child| child.evaluate(&[], &[], &LoadOptions::default()).unwrap_err();
        // Three one after another take three times the limit.
        assert!((0.4..1.2).contains(&took(3, &run)));
        assert!(took(1, &run) >= 1.2 && took(3, &bench) >= 1.2);
    }

    #[test]
    fn a_hang_is_ended() {
        let limits = Limits { timeout: Some(Duration::from_millis(200)), memory: None };
        let error = shell("exec sleep 60", limits).hello().unwrap_err().to_string();
        assert_eq!(error, "the runtime was stopped: starting took longer than 0.2 s");
    }

    #[test]
    fn work_that_is_called_off_ends_at_once() {
        let stop = Arc::new(AtomicBool::new(false));
        let child = shell("exec sleep 60", Limits::default());
        let child = child.heard_by(Listener::default().stopped_by(Arc::clone(&stop)));
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                stop.store(true, Ordering::Relaxed);
            });
            assert!(matches!(child.hello().unwrap_err(), RuntimeError::Stopped));
        });
        assert!(matches!(child.hello().unwrap_err(), RuntimeError::Stopped));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_watched() {
        let limits = Limits { timeout: Some(Duration::from_secs(20)), memory: Some(1) };
        let error = shell("exec sleep 60", limits).hello().unwrap_err().to_string();
        assert!(error.contains("MiB, and 0 MiB are allowed"), "{error}");
    }

    #[test]
    fn a_library_that_prints_is_noticed() {
        let error = shell("echo this is a long line that is no message; exec sleep 60", Limits::default());
        let error = error.hello().unwrap_err().to_string();
        assert!(error.starts_with("the runtime sent something that is no message"), "{error}");
    }

    #[test]
    fn a_worker_that_is_not_there_is_an_error() {
        let error = Child::new("no/such/program", Vec::new(), Limits::default()).hello().unwrap_err().to_string();
        assert!(error.starts_with("cannot start the worker `no/such/program`"), "{error}");
    }
}
