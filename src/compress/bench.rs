//! What it takes to run, time and judge candidates: no part of the main job.

use super::Budget;
use crate::{
    Failure, PassRecord, RunOptions,
    latency::{Latency, Measurement},
    report::{Plan, PrecisionReport, Side, Verify},
    runner::Runner,
    validate::{Bound, validate},
};
use anyhow::Context as _;
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{Model, Staged, ValueId, WriteOptions};
use lathe_passes::{
    Pass, PassContext, Quantity,
    exact::{DropDead, DropNoopLayout},
    precision::Choices,
};
use lathe_runtime::{BenchInputs, Distance, SampleSet, SetSpec, Timings, metrics};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// How often sessions are made anew to time one of several attempts.
const ATTEMPT_SITTINGS: usize = 3;

/// What an error of timing is about.
const UNTIMED: &str = "the latency cannot be measured";

/// What a result becomes before it is written, timed and judged: half precision where it may.
pub(crate) trait Finish {
    /// The model as it is written, staged.
    fn finish(&self, model: &Model) -> Result<Written, Failure>;
}

/// A result as it is written.
pub(crate) struct Written {
    pub staged: Staged,
    /// What half precision made of it, if that was asked for.
    pub half: Option<Box<Half>>,
}

/// A result in half precision.
pub(crate) struct Half {
    pub model: Model,
    /// The file that rounds in float32 wherever the result is half precision, and the result before it was converted.
    pub simulation: PathBuf,
    pub float: PathBuf,
    /// Holds both.
    pub folder: TempDir,
    pub report: PrecisionReport,
    pub record: PassRecord,
    pub warnings: Vec<String>,
    /// What hangs on choices.
    pub choices: Choices,
}

impl Written {
    /// The model that is written, of one that was given.
    pub fn model<'m>(&'m self, given: &'m Model) -> &'m Model {
        self.half.as_ref().map_or(given, |half| &half.model)
    }
}

/// What is run where a loss is measured: a processor computes half precision in float32, so that a simulation stands for it.
pub(super) fn judged<'m>(staged: &'m Staged, half: &'m Option<Box<Half>>) -> &'m Path {
    half.as_ref().map_or(staged.path(), |half| &half.simulation)
}

/// Runs, times and judges models beside the original.
#[derive(Clone)]
pub(crate) struct Bench<'a> {
    pub runner: &'a Runner,
    pub run: &'a RunOptions,
    /// The file of the original.
    pub original: &'a Path,
    /// Seconds that one timing may take, and the inputs that are timed.
    pub seconds: f64,
    pub inputs: BenchInputs,
    /// What exact passes that tidy a result may know.
    pub passes: &'a PassContext<'a>,
    /// What results are measured on, and what it is called; `None` where there is no set.
    pub set: Option<(SetSpec, &'static str)>,
    /// Whether results are measured there.
    pub verify: bool,
    /// What becomes of a result before it is written; `None` where it is written as it is.
    pub finish: Option<&'a dyn Finish>,
}

/// What the exact passes left.
pub(crate) struct Exact<'a> {
    pub model: &'a Model,
    pub staged: &'a Staged,
    /// The original.
    pub original: &'a Side,
    /// Where the result will be written, and how.
    pub target: &'a Path,
    pub write: &'a WriteOptions,
}

/// A result within the budgets, before it is written.
pub(crate) struct Fitted {
    /// In float32 where it is not quantized.
    pub model: Model,
    pub staged: Staged,
    /// What is staged, where that is half precision.
    pub half: Option<Box<Half>>,
    pub verify: Option<Verify>,
    pub plan: Plan,
    pub records: Vec<PassRecord>,
    pub latency: Option<Latency>,
}

impl Fitted {
    /// The file that is run where the loss is measured.
    pub fn judged(&self) -> &Path {
        judged(&self.staged, &self.half)
    }
}

impl Bench<'_> {
    /// A model as it would be written.
    pub fn write(&self, model: &Model, exact: &Exact<'_>) -> Result<Written, Failure> {
        match self.finish {
            Some(finish) => finish.finish(model),
            None => Ok(Written { staged: model.stage(exact.target, exact.write)?, half: None }),
        }
    }

    /// The times of the original and of a candidate in turns.
    pub fn time(&self, candidate: &Path) -> Result<Timings, Failure> {
        let _span = self.run.progress.span("time an attempt");
        Ok(self.measurement(&[self.original, candidate]).timings(ATTEMPT_SITTINGS).context(UNTIMED)?)
    }

    /// The latency of the original and of a candidate that was timed.
    pub fn latency(&self, candidate: &Path, timings: &Timings) -> Result<Latency, Failure> {
        let _span = self.run.progress.span("time loading");
        Ok(self.measurement(&[self.original, candidate]).of(timings).context(UNTIMED)?)
    }

    /// The same where one sample runs at a time, if samples can and no sizes are given.
    pub fn at_one_sample(&self, model: &Model) -> Bench<'_> {
        let one = |set: &SetSpec| SetSpec { batch: Some(1), ..set.clone() };
        let inputs = match &self.inputs {
            BenchInputs::Set(set) if SampleSet::open(&one(set), model).is_ok() => BenchInputs::Set(one(set)),
            given => given.clone(),
        };
        Bench { inputs, ..self.clone() }
    }

    fn measurement<'m>(&'m self, models: &'m [&'m Path]) -> Measurement<'m> {
        Measurement { run: self.run, models, inputs: &self.inputs, seconds: self.seconds }
    }

    /// The loss of a candidate on held-out samples; `None` if it is not to be run.
    pub fn measure(&self, candidate: &Path, budget: &Budget) -> Result<Option<Verify>, Failure> {
        let Some((set, set_name)) = self.set.as_ref().filter(|_| self.verify) else { return Ok(None) };
        let _span = self.run.progress.span("measure the result");
        let metric = budget.metric.clone().unwrap_or_else(|| "auto".to_owned());
        let bound = Bound { set: set.clone(), set_name, metric, max_drop: budget.max_drop };
        validate(self.runner, self.original, candidate, &bound).map(Some)
    }

    /// How outputs are compared while the sensitivity of layers is measured: as distributions where they are logits.
    pub fn distance(&self, model: &Model, budget: &Budget) -> Distance {
        let graph = &model.graph;
        let logits = |&v: &ValueId| graph.value(v).name.to_ascii_lowercase().contains("logit");
        let labelled = || self.set.as_ref().is_some_and(|(set, _)| set.labels.is_some());
        let divergence = match budget.metric.as_deref() {
            Some(metric) => metrics().any(|m| m.name == metric && m.of_logits),
            None => labelled() || graph.main().outputs().iter().any(logits),
        };
        if divergence { Distance::Divergence } else { Distance::Relative }
    }

    /// What the original and the exact result take of a quantity.
    pub fn totals(&self, quantity: Quantity, exact: &Exact<'_>) -> Result<(f64, f64), Failure> {
        let finished = self.finish.map(|finish| finish.finish(exact.model)).transpose()?;
        let (model, staged) = match &finished {
            Some(written) => (written.model(exact.model), &written.staged),
            None => (exact.model, exact.staged),
        };
        Ok(match exact.original.figure(quantity) {
            Some(original) => (original as f64, counted(quantity, model, staged)),
            None => {
                let timings = self.time(staged.path())?;
                let [before, after] = [0, 1].map(|model| timings.quartiles(model)[0] * 1e6);
                (before, after)
            }
        })
    }

    /// Drops what methods left unread, and casts that cancel between layers of one type.
    pub fn tidy(&self, model: &mut Model) -> Result<(), Failure> {
        let passes: [&dyn Pass; 2] = [&DropNoopLayout, &DropDead];
        for pass in passes {
            pass.apply(model, self.passes)?;
        }
        model.check().context("the result is not a valid model; this is a fault of this program")?;
        Ok(())
    }
}

/// What a staged model takes of a quantity that is counted, not timed.
pub(super) fn counted(quantity: Quantity, model: &Model, staged: &Staged) -> f64 {
    let cost = || Cost::of(model, &Facts::infer(model), &Bindings::default());
    match quantity {
        Quantity::Size => (staged.written().file_bytes + staged.written().data_bytes) as f64,
        Quantity::Parameters => cost().parameters as f64,
        Quantity::Flops => cost().flops as f64,
        Quantity::Latency => f64::NAN,
    }
}
