//! The program's side: a worker process that may crash, hang or eat memory without taking the program with it.

mod worker;

use crate::{
    BenchInputs, BenchResult, BenchTask, ChosenSamples, Claim, Inputs, Listener, LoadOptions, Measured, RuntimeError,
    Sample, SetSpec, Verdict,
    verify::{AT_EDGE, RESULT_AT_EDGE},
    wire::{GatherJob, Gathered, InputHeads, MeasureJob, SelectJob, TrialJob, WorkerAnswer, WorkerRequest, framing},
};
use bytes::Bytes;
use lathe_analysis::{Evaluate, EvaluateError};
use lathe_ir::{Model, Tensor};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};
use worker::Worker;

/// What one request may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Time for one stage of a request: loading a model, running one batch.
    pub timeout: Option<Duration>,
    /// Resident memory of the worker, in bytes; watched on Linux only.
    pub memory: Option<u64>,
}

/// A worker process that runs models. It is started when first needed and again after it died.
pub struct Child {
    program: PathBuf,
    arguments: Vec<OsString>,
    limits: Limits,
    worker: Mutex<Option<Worker>>,
    name: Mutex<Option<String>>,
    listener: Listener,
}

impl Child {
    /// A worker that `program` becomes when called with `arguments`: it must call [`crate::serve`].
    pub fn new(program: impl Into<PathBuf>, arguments: Vec<OsString>, limits: Limits) -> Child {
        let program = program.into();
        Child {
            program,
            arguments,
            limits,
            worker: Mutex::new(None),
            name: Mutex::new(None),
            listener: Listener::default(),
        }
    }

    /// The same, and `listener` hears how far long work is.
    pub fn heard_by(self, listener: Listener) -> Child {
        Child { listener, ..self }
    }

    /// Who hears how far long work is.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// The engine's name and its execution providers.
    pub fn hello(&self) -> Result<(String, Vec<String>), RuntimeError> {
        match self.ask(&WorkerRequest::Hello, &[])? {
            (WorkerAnswer::Hello { name, providers }, _) => Ok((name, providers)),
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
        reference: &Path,
        candidate: &Path,
        inputs: &Inputs,
        claim: Claim,
        options: &LoadOptions,
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
        let (reference, candidate) = (reference.to_owned(), candidate.to_owned());
        let options = options.clone();
        let mut request = WorkerRequest::Verify { reference, candidate, inputs, claim, options, left_out: Vec::new() };
        let payload: Vec<&[u8]> = data.iter().map(|part| &part[..]).collect();
        loop {
            let ended = match self.ask(&request, &payload) {
                Ok((WorkerAnswer::Verdict(verdict), _)) => return Ok(verdict),
                Ok((other, _)) => return Err(unexpected(&other)),
                Err(error) => error,
            };
            let RuntimeError::Ended { stage, message } = &ended else { return Err(ended) };
            if let Some(sizes) = stage.strip_prefix(RESULT_AT_EDGE) {
                let (message, sizes) = (message.clone(), sizes.to_owned());
                return Ok(Verdict::CandidateRefused { message, sizes });
            }
            // An engine that the original crashes on some inputs refuses them; the others are still to run.
            match (stage.strip_prefix(AT_EDGE), &mut request) {
                (Some(at), WorkerRequest::Verify { left_out, .. })
                    if !left_out.iter().any(|(known, _)| known == at) =>
                {
                    left_out.push((at.to_owned(), message.clone()));
                }
                _ => return Err(ended),
            }
        }
    }

    /// Runs a model that computes statistics.
    pub(crate) fn gather(&self, job: &GatherJob) -> Result<Gathered, RuntimeError> {
        match self.ask(&WorkerRequest::Gather(job.clone()), &[])? {
            (WorkerAnswer::Gathered(gathered), _) => Ok(gathered),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Runs variants of a model; a distance that is not finite is infinite.
    pub(crate) fn trials(&self, job: &TrialJob) -> Result<Vec<f64>, RuntimeError> {
        match self.ask(&WorkerRequest::Trials(job.clone()), &[])? {
            (WorkerAnswer::Tried(found), _) => Ok(found.into_iter().map(|d| d.unwrap_or(f64::INFINITY)).collect()),
            (other, _) => Err(unexpected(&other)),
        }
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
        let (reference, candidate) = (reference.to_owned(), candidate.to_owned());
        let (set, metric, options) = (set.clone(), metric.to_owned(), options.clone());
        match self.ask(&WorkerRequest::Measure(MeasureJob { reference, candidate, set, metric, options }), &[])? {
            (WorkerAnswer::Measured(found), _) => Ok(found.map(|measured| *measured)),
            (other, _) => Err(unexpected(&other)),
        }
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

    /// Sends one request and waits for its answer. A worker that fails is gone afterwards; the next request starts anew.
    fn ask(&self, request: &WorkerRequest, payload: &[&[u8]]) -> Result<(WorkerAnswer, Bytes), RuntimeError> {
        if self.listener.is_stopped() {
            return Err(RuntimeError::Stopped);
        }
        let mut slot = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let mut worker = match slot.take() {
            Some(worker) => worker,
            None => Worker::start(&self.program, &self.arguments)?,
        };
        let _span = self.listener.span_of(worker.process_id(), "request", request.name());
        worker.send(request, payload);
        let answer = match worker.wait(self.limits, &self.listener) {
            Err(_) if self.listener.is_stopped() => return Err(RuntimeError::Stopped),
            answer => answer?,
        };
        *slot = Some(worker);
        match answer {
            (WorkerAnswer::Error(message), _) => Err(RuntimeError::Child(message)),
            (WorkerAnswer::NoEngine(message), _) => Err(RuntimeError::NoEngine(message)),
            answer => Ok(answer),
        }
    }
}

impl Evaluate for Child {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        Ok(self.evaluate(&model.to_bytes(), inputs, &options)?)
    }

    fn name(&self) -> String {
        let mut name = self.name.lock().unwrap_or_else(PoisonError::into_inner);
        if name.is_none() {
            *name = self.hello().ok().map(|(name, _)| name);
        }
        name.clone().unwrap_or_else(|| "no runtime".to_owned())
    }
}

fn unexpected(answer: &WorkerAnswer) -> RuntimeError {
    RuntimeError::Child(format!("the worker answers another question: {answer:?}"))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
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
        child.verify(Path::new("a"), Path::new("b"), &inputs, claim, &LoadOptions::default())
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
