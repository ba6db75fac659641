//! What a set of samples can say about two models: metrics, gathered batch by batch in sums that do not grow.
//!
//! A family is one file: what it measures, which outputs it fits, when it fits best, how its metrics are shown, and the
//! sums it keeps. A new metric is a new file with its line in [`FAMILIES`]; help, documentation, reports and Python read the
//! list.

mod accuracy;
mod choose;
mod distance;
mod image;
mod logits;
mod perplexity;

pub use choose::MetricError;
use choose::holds_logits;
pub(crate) use choose::{ChosenMetric, choose};
pub(crate) use perplexity::token_inputs;

use crate::{divergence::is_distribution, elements};
use lathe_ir::{DataType, Graph, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A metric as a user meets it.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, one line, no full stop.
    pub summary: &'static str,
    /// How its drop is computed. A drop is positive where the candidate is worse.
    pub drop: &'static str,
    /// Whether it is about logits: of the outputs of a model only those count that hold some, where any does, and errors
    /// inside the model are weighed by how they move distributions.
    pub of_logits: bool,
    /// Whether it is an error, 0 where nothing differs, which is shown on a scale of decades.
    pub is_error: bool,
    /// How it is shown for every output; `None` where it is one number of the whole model.
    pub column: Option<Column>,
}

/// What a metric says where nothing else is stated.
const METRIC: Metric = Metric { name: "", summary: "", drop: "", of_logits: false, is_error: false, column: None };

/// A column of tables in which outputs are rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// What stands above it.
    pub heading: &'static str,
    /// Columns of smaller numbers come first; those of 0 are there for every output.
    pub order: u8,
    /// The unit; empty without one.
    pub unit: &'static str,
}

impl Metric {
    /// Its name in reports: `rel_l2`.
    pub fn key(&self) -> String {
        self.name.replace('-', "_")
    }
}

/// Every family. The order is that of `--help`.
const FAMILIES: &[&dyn Family] =
    &[&distance::Distances, &logits::Distributions, &accuracy::Labelled, &perplexity::LanguageModel, &image::Images];

/// Every metric.
pub fn metrics() -> impl Iterator<Item = &'static Metric> {
    FAMILIES.iter().flat_map(|family| family.metrics())
}

/// The metrics that are shown for every output, in the order of their columns.
pub fn metric_columns() -> Vec<(&'static Metric, Column)> {
    let mut columns: Vec<_> = metrics().filter_map(|metric| Some((metric, metric.column?))).collect();
    columns.sort_by_key(|(_, column)| column.order);
    columns
}

/// What a metric came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Of the reference.
    #[serde(with = "crate::json_float")]
    pub before: f64,
    /// Of the candidate.
    #[serde(with = "crate::json_float")]
    pub after: f64,
    /// How much is lost, as [`Metric::drop`] says.
    #[serde(with = "crate::json_float")]
    pub drop: f64,
    /// What the numbers are made of: `9178 of 10000 before, 9177 after`.
    pub detail: Option<String>,
}

impl Score {
    fn new(before: f64, after: f64, drop: f64) -> Score {
        Score { before, after, drop, detail: None }
    }

    /// The score where nothing could be compared.
    pub(crate) fn unmeasured() -> Score {
        Score::new(0.0, f64::INFINITY, f64::INFINITY)
    }

    fn with(mut self, detail: String) -> Score {
        self.detail = Some(detail);
        self
    }
}

/// Why a family has nothing to say of an output or a batch: one sentence, of an error that the family's file defines.
pub(crate) type Refusal = Box<dyn std::error::Error + Send + Sync>;

/// The metric that fits, and why.
pub(crate) type Suggestion = (&'static str, String);

/// What a model shows of itself on the first batch, for the choice of a metric.
pub(crate) struct Case<'a> {
    pub graph: &'a Graph,
    pub outputs: &'a [OutputInfo<'a>],
    /// Samples of the whole set.
    pub samples: usize,
    /// Runs the model to find out whether no logits of an output depend on later tokens.
    pub is_causal: &'a mut dyn FnMut(&OutputInfo<'_>) -> bool,
}

/// Metrics that are read off the same sums.
pub(crate) trait Family: Sync {
    fn metrics(&self) -> &'static [Metric];

    /// Whether this family can say anything about an output, or why not.
    fn fits(&self, output: &OutputInfo<'_>) -> Result<(), Refusal>;

    /// Empty sums for an output that fits.
    fn start(&self, output: &OutputInfo<'_>) -> Box<dyn Accumulator>;

    /// Whether it looks at one output only: there is one prediction, however many tensors a model gives.
    fn single(&self) -> bool {
        false
    }

    /// Of the families that suggest a metric the one of the largest number is listened to.
    fn precedence(&self) -> u8 {
        0
    }

    /// The metric that says most about this model, if one of this family does.
    fn suggest(&self, _: &mut Case<'_>) -> Option<Suggestion> {
        None
    }
}

/// Sums over the batches so far, of one output.
pub(crate) trait Accumulator: Send {
    /// Takes in the next batch. What is wrong with it is said in one sentence.
    fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal>;

    /// One score for each metric of the family that there is something to say about, with its name.
    fn scores(&self) -> Vec<(&'static str, Score)>;

    /// What makes the comparison fail whatever the metric says.
    fn failures(&self) -> Vec<String> {
        Vec::new()
    }

    /// What a reader should know about the numbers.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// An output, and what was fed in, as the first batch shows them.
#[derive(Clone, Copy)]
pub(crate) struct OutputInfo<'a> {
    pub name: &'a str,
    pub dtype: DataType,
    pub dims: &'a [usize],
    pub labels: Option<&'a Tensor>,
    /// The inputs of a language model, if these are such.
    pub tokens: Option<Tokens<'a>>,
}

/// The inputs of a language model.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    /// The input that holds token ids.
    pub ids: &'a str,
    /// Rows of the table that ids pick of; `None` where the table is not a constant.
    pub vocabulary: Option<usize>,
    /// The input that marks padding, if there is one.
    pub mask: Option<&'a str>,
}

/// One output of both models for one batch.
pub(crate) struct OutputPair<'a> {
    pub name: &'a str,
    pub reference: &'a Tensor,
    pub candidate: &'a Tensor,
    /// The number of the batch's first sample in the set.
    pub first: usize,
    /// Samples in the batch.
    pub samples: usize,
    pub labels: Option<&'a Tensor>,
    pub ids: Option<&'a Tensor>,
    /// One flag per token: whether it is more than padding. `None` where all are.
    pub kept: Option<&'a TokenMask>,
}

/// Which tokens of a batch are more than padding.
pub(crate) struct TokenMask {
    /// Sequences and their length.
    pub dims: [usize; 2],
    pub flags: Vec<bool>,
}

impl TokenMask {
    /// Reads an attention mask; `None` unless it has two axes.
    pub(crate) fn of(mask: &Tensor) -> Option<TokenMask> {
        let dims = <[usize; 2]>::try_from(mask.dims()).ok()?;
        Some(TokenMask { dims, flags: mask.to_f64s()?.into_iter().map(|x| x != 0.0).collect() })
    }
}

impl OutputPair<'_> {
    /// Calls `visit` with the position of the first element and both rows, for every row along the last axis that is
    /// not padding.
    pub(crate) fn rows(&self, mut visit: impl FnMut(usize, &[f64], &[f64])) {
        let dims = self.reference.dims();
        let width = dims.last().copied().unwrap_or(1).max(1);
        let kept = self.kept.filter(|k| dims.len() == 3 && dims[..2] == k.dims);
        let keeps = |row: usize| kept.is_none_or(|k| k.flags.get(row).copied().unwrap_or(true));
        elements::rows(self.reference, self.candidate, width, keeps, |row, a, b| visit(row * width, a, b));
    }

    /// The number of the sample that element `at` belongs to.
    pub(crate) fn sample_of(&self, at: usize) -> usize {
        let per_sample = if self.reference.dims().first() == Some(&self.samples) {
            self.reference.len() / self.samples.max(1)
        } else {
            // The first axis is none of samples, so nothing finer than the batch is known.
            usize::MAX
        };
        self.first + at / per_sample.max(1)
    }
}

/// Whether the rows of both outputs are distributions already. One row may look like one by chance, all rows do not.
fn hold_distributions(pair: &OutputPair<'_>) -> bool {
    let mut all = true;
    pair.rows(|_, a, b| all = all && is_distribution(a) && is_distribution(b));
    all
}

/// Elements of an output from which families look at it at the same time.
const MANY: usize = 1 << 20;

/// Everything that is measured on one output.
pub(crate) struct OutputMeter {
    pub name: String,
    meters: Vec<Box<dyn Accumulator>>,
}

impl OutputMeter {
    /// Starts the families that fit. Of those that look at one output only, it takes the ones in `single`.
    pub(crate) fn new(output: &OutputInfo<'_>, single: &[&'static str]) -> OutputMeter {
        let wanted = |family: &&&dyn Family| {
            (!family.single() || family.metrics().iter().any(|m| single.contains(&m.name)))
                && family.fits(output).is_ok()
        };
        let meters = FAMILIES.iter().filter(wanted).map(|family| family.start(output)).collect();
        OutputMeter { name: output.name.to_owned(), meters }
    }

    pub(crate) fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal> {
        if pair.reference.len() < MANY {
            return self.meters.iter_mut().try_for_each(|meter| meter.add(pair));
        }
        std::thread::scope(|scope| {
            let running: Vec<_> = self.meters.iter_mut().map(|meter| scope.spawn(|| meter.add(pair))).collect();
            let joined = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(joined).collect::<Vec<_>>().into_iter().collect()
        })
    }

    /// What was measured, by the names of metrics.
    pub(crate) fn scores(&self) -> BTreeMap<&'static str, Score> {
        self.meters.iter().flat_map(|meter| meter.scores()).collect()
    }

    pub(crate) fn failures(&self) -> Vec<String> {
        self.meters.iter().flat_map(|meter| meter.failures()).collect()
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        self.meters.iter().flat_map(|meter| meter.notes()).collect()
    }
}

#[cfg(test)]
mod testing {
    use super::*;

    /// The scores of one family over batches of one output.
    pub(super) fn scores(
        family: &dyn Family,
        batches: &[(Tensor, Tensor)],
        labels: Option<&Tensor>,
    ) -> BTreeMap<&'static str, Score> {
        let first = &batches[0].0;
        let samples = first.dims()[0];
        let output = OutputInfo { name: "y", dtype: first.dtype(), dims: first.dims(), labels, tokens: None };
        family.fits(&output).unwrap();
        let mut meter = family.start(&output);
        for (index, (reference, candidate)) in batches.iter().enumerate() {
            let first = index * samples;
            let pair = OutputPair { name: "y", reference, candidate, first, samples, labels, ids: None, kept: None };
            meter.add(&pair).unwrap();
        }
        meter.scores().into_iter().collect()
    }

    #[test]
    fn names_differ_and_every_drop_is_explained() {
        let mut names: Vec<&str> = metrics().map(|m| m.name).collect();
        assert!(metrics().all(|m| !m.drop.is_empty() && !m.summary.ends_with('.')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), metrics().count());
        assert!(metric_columns().is_sorted_by_key(|(_, column)| column.order));
        let headings: BTreeMap<&str, &str> = metric_columns().iter().map(|(m, c)| (c.heading, m.name)).collect();
        assert_eq!(headings.len(), metric_columns().len());
    }

    #[test]
    fn every_file_of_a_family_is_listed() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("metrics");
        let files =
            std::fs::read_dir(folder).unwrap().map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
        assert_eq!(files.filter(|text| text.contains("\nimpl Family for ")).count(), FAMILIES.len());
        let mut precedences: Vec<u8> = FAMILIES.iter().map(|family| family.precedence()).collect();
        precedences.sort_unstable();
        precedences.dedup();
        assert_eq!(precedences.len(), FAMILIES.len(), "two families claim the same models");
    }
}
