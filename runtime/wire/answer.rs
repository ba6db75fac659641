//! What the worker answers.

use super::{framing::Head, jobs::Gathered};
use crate::{BenchResult, ChosenSamples, LayersReport, Measured, Progress, Verdict};
use serde::{Deserialize, Serialize};

/// What the worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerAnswer {
    /// The engine's name and its providers, and the version of the program that the worker is.
    Hello { name: String, providers: Vec<String>, version: String },
    /// What the worker is about to do; the answer is still to come.
    Stage(String),
    /// How far it is; the answer is still to come.
    Progress(Progress),
    /// The outputs, whose data is the payload.
    Outputs(Vec<Head>),
    /// The outputs of several runs, whose data is the payload.
    Ran(Vec<Vec<Head>>),
    /// The result of a comparison.
    Verdict(Verdict),
    /// The result of a comparison value by value.
    Layers(Box<LayersReport>),
    /// The samples that were chosen.
    Selected(ChosenSamples),
    /// What came of gathering statistics.
    Gathered(Gathered),
    /// Distances of outputs; `None` where one is not finite.
    Tried(Vec<Option<f64>>),
    /// The result of a measurement; a verdict where one of the models does not run.
    Measured(Result<Box<Measured>, Verdict>),
    /// What a measurement gave.
    Timed(BenchResult),
    /// It did not work.
    Error(String),
    /// There is nothing to run models with.
    NoEngine(String),
}
