//! What it takes to run, time and judge candidates: no part of the main job.

use super::Budget;
use crate::{
    Failure, PassRecord, RunOptions,
    latency::{Latency, Measurement},
    report::{Plan, Side, Verify},
    runner::Runner,
    validate::{Bound, validate},
};
use anyhow::Context as _;
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{Model, Staged, ValueId, WriteOptions};
use lathe_passes::{
    Pass, PassContext, Quantity,
    exact::{DropDead, DropNoopLayout},
};
use lathe_runtime::{BenchInputs, Distance, SampleSet, SetSpec, Timings, metrics};
use std::path::Path;

/// How often sessions are made anew to time one of several attempts.
const ATTEMPT_SITTINGS: usize = 3;

/// What an error of timing is about.
const UNTIMED: &str = "the latency cannot be measured";

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
    pub model: Model,
    pub staged: Staged,
    pub verify: Option<Verify>,
    pub plan: Plan,
    pub records: Vec<PassRecord>,
    pub latency: Option<Latency>,
}

impl Bench<'_> {
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
        Ok(match exact.original.figure(quantity) {
            Some(original) => (original as f64, counted(quantity, exact.model, exact.staged)),
            None => {
                let timings = self.time(exact.staged.path())?;
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
