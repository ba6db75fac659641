//! What the program asks of the worker.

use super::{
    framing::Head,
    jobs::{GatherJob, MeasureJob, SelectJob, TrialJob},
};
use crate::{BenchInputs, BenchTask, Claim, InputSpec, LayersJob, LoadOptions, SetSpec, verify::LeftOut};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What the program asks of the worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum WorkerRequest {
    /// Who are you?
    Hello,
    /// Run a model (the first `model` bytes of the payload) on inputs (the rest).
    Evaluate { model: u64, inputs: Vec<Head>, options: LoadOptions },
    /// Run a model on disk on several sets of inputs, whose data is the payload.
    Run { model: PathBuf, inputs: Vec<Vec<Head>>, options: LoadOptions },
    /// Compare two models on disk, but not on the inputs that `left_out` names.
    Verify {
        reference: PathBuf,
        candidate: PathBuf,
        inputs: InputHeads,
        claim: Claim,
        reference_options: LoadOptions,
        options: LoadOptions,
        left_out: Vec<LeftOut>,
    },
    /// Compare two models on disk value by value.
    Layers(Box<LayersJob>),
    /// Choose some samples of a set.
    Select(SelectJob),
    /// Run a model that computes statistics over a set.
    Gather(GatherJob),
    /// Run variants of a model over a set.
    Trials(TrialJob),
    /// Measure what the candidate loses on a set.
    Measure(MeasureJob),
    /// Time one or two models on disk.
    Bench { models: Vec<PathBuf>, inputs: BenchInputs, task: BenchTask, options: LoadOptions },
}

impl WorkerRequest {
    /// Whether it is worth carrying out elsewhere, and the same there: it runs models for a while and reads nothing but
    /// files.
    pub fn travels(&self) -> bool {
        use WorkerRequest::{Gather, Measure, Run, Trials};
        matches!(self, Run { .. } | Gather(_) | Trials(_) | Measure(_))
    }

    /// Whether nothing else may run meanwhile: times of runs that share a machine say nothing.
    pub fn wants_the_machine(&self) -> bool {
        matches!(self, WorkerRequest::Bench { .. })
    }

    /// What it is, for traces.
    pub fn name(&self) -> &'static str {
        match self {
            WorkerRequest::Hello => "hello",
            WorkerRequest::Evaluate { .. } => "evaluate",
            WorkerRequest::Run { .. } => "run",
            WorkerRequest::Verify { .. } => "verify",
            WorkerRequest::Layers(_) => "compare layers",
            WorkerRequest::Select(_) => "select",
            WorkerRequest::Gather(_) => "gather statistics",
            WorkerRequest::Trials(_) => "try variants",
            WorkerRequest::Measure(_) => "measure the loss",
            WorkerRequest::Bench { .. } => "time",
        }
    }
}

/// The inputs of a comparison.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum InputHeads {
    /// Make them.
    Random(InputSpec),
    /// Read them from a set.
    Set(SetSpec),
    /// They are in the payload.
    Given(Vec<Vec<Head>>),
}
