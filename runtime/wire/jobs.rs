//! Jobs of the worker that run a model over a set, and what comes of them.

use crate::{LoadOptions, SetSpec, statistics::Request};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A model that computes statistics: what to run and where results go.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GatherJob {
    /// The copy of the model that computes them.
    pub model: PathBuf,
    /// The inputs.
    pub set: SetSpec,
    /// Run the first batch only.
    pub first_only: bool,
    /// How to run it.
    pub options: LoadOptions,
    /// Statistics, each with the file it goes to.
    pub entries: Vec<GatherEntry>,
    /// Outputs whose sums are part of the answer.
    pub direct: Vec<Output>,
}

/// One statistic of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GatherEntry {
    pub request: Request,
    pub outputs: Vec<Output>,
    pub file: PathBuf,
}

/// An output of the copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Output {
    /// Its name in the copy.
    pub value: String,
    /// What it is: `gram`.
    pub field: String,
    /// How batches are joined.
    pub fold: Fold,
}

/// How an output of one batch joins those of the batches before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fold {
    /// Added.
    Sum,
    /// Added; the matrix is symmetric and only its upper triangle is kept, row by row.
    Triangle,
    /// The larger.
    Max,
    /// The smaller.
    Min,
    /// All numbers of every batch are counted in the bins of a [`Spread`](lathe_analysis::Spread).
    Spread,
    /// The first batch's.
    First,
}

/// What came of gathering statistics.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Gathered {
    pub samples: usize,
    pub batches: usize,
    /// The numbers of every direct output.
    #[serde(with = "crate::json_float::lists")]
    pub direct: Vec<Vec<f64>>,
}

/// Samples to choose from a larger set.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SelectJob {
    /// The model, whose first layers say which samples are alike.
    pub model: PathBuf,
    /// What is chosen from.
    pub set: SetSpec,
    /// How many samples.
    pub count: usize,
    /// Seeds what is drawn evenly.
    pub seed: u64,
    /// How to run the model.
    pub options: LoadOptions,
}

/// A candidate whose loss against its reference is measured on a set.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MeasureJob {
    /// The original.
    pub reference: PathBuf,
    /// The result.
    pub candidate: PathBuf,
    /// The inputs, and labels.
    pub set: SetSpec,
    /// The name of a metric, or `auto`.
    pub metric: String,
    /// How to run both.
    pub options: LoadOptions,
}

/// A model and a variant of it with gates, on disk, and what to run them on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TrialJob {
    /// The model.
    pub reference: PathBuf,
    /// The variant.
    pub variant: PathBuf,
    /// The inputs.
    pub set: SetSpec,
    /// One run of the set for each.
    pub gates: Vec<Gates>,
    /// How outputs are compared.
    pub distance: Distance,
    /// What numbers count that are not finite where the model's are, or the other way round.
    pub non_finite: NonFinite,
    /// How to run them.
    pub options: LoadOptions,
}

/// Numbers for gates, by the names of inputs.
pub type Gates = Vec<(String, f32)>;

/// How far outputs are from where they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Distance {
    /// Mean Kullback–Leibler divergence of the softmax over the last axis, in nats.
    Divergence,
    /// Squared difference over squared norm.
    Relative,
}

/// What a number of a variant counts that is not finite where the model's is, or the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NonFinite {
    /// The variant is of no use.
    Infinite,
    /// It is lost: as if it were zero.
    Lost,
}
