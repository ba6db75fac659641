//! What a set of samples can say about two models: metrics, gathered batch by batch in sums that do not grow.
//!
//! A family is one file: what it measures, which outputs it fits, and the sums it keeps. A new metric is a new file and
//! a line of [`FAMILIES`].

mod accuracy;
mod choose;
mod distance;
mod image;
mod logits;
mod perplexity;

pub(crate) use choose::{Chosen, choose};

use crate::{Sample, divergence::is_distribution, elements};
use lathe_ir::{DataType, Tensor};
use serde::{Deserialize, Serialize};

/// A metric as a user meets it.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, one line, no full stop.
    pub summary: &'static str,
    /// How its drop is computed. A drop is positive where the candidate is worse.
    pub drop: &'static str,
}

/// Every family. The order is that of `--help`.
const FAMILIES: &[&dyn Family] =
    &[&distance::Distances, &logits::Distributions, &accuracy::Labelled, &perplexity::LanguageModel, &image::Images];

/// Every metric.
pub fn metrics() -> impl Iterator<Item = &'static Metric> {
    FAMILIES.iter().flat_map(|family| family.metrics())
}

/// What a metric came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The metric's name.
    pub metric: String,
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
    fn new(metric: &str, before: f64, after: f64, drop: f64) -> Score {
        Score { metric: metric.to_owned(), before, after, drop, detail: None }
    }

    /// The score where nothing could be compared.
    pub(crate) fn unmeasured(metric: &str) -> Score {
        Score::new(metric, 0.0, f64::INFINITY, f64::INFINITY)
    }

    fn with(mut self, detail: String) -> Score {
        self.detail = Some(detail);
        self
    }
}

/// Metrics that are read off the same sums.
pub(crate) trait Family: Sync {
    fn metrics(&self) -> &'static [Metric];

    /// Whether this family can say anything about an output, or why not.
    fn fits(&self, place: &Place<'_>) -> Result<(), String>;

    /// Empty sums for an output that fits.
    fn start(&self, place: &Place<'_>) -> Box<dyn Accumulator>;

    /// Whether it looks at one output only: there is one prediction, however many tensors a model gives.
    fn single(&self) -> bool {
        false
    }
}

/// Sums over the batches so far, of one output.
pub(crate) trait Accumulator: Send {
    /// Takes in the next batch. What is wrong with it is said in one sentence.
    fn add(&mut self, pair: &Pair<'_>) -> Result<(), String>;

    /// One score for each metric of the family that there is something to say about.
    fn scores(&self) -> Vec<Score>;

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
pub(crate) struct Place<'a> {
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
pub(crate) struct Pair<'a> {
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
    pub kept: Option<&'a Kept>,
}

/// Which tokens of a batch are more than padding.
pub(crate) struct Kept {
    /// Sequences and their length.
    pub dims: [usize; 2],
    pub flags: Vec<bool>,
}

impl Kept {
    /// Reads an attention mask; `None` unless it has two axes.
    pub(crate) fn of(mask: &Tensor) -> Option<Kept> {
        let dims = <[usize; 2]>::try_from(mask.dims()).ok()?;
        Some(Kept { dims, flags: mask.to_f64s()?.into_iter().map(|x| x != 0.0).collect() })
    }
}

impl Pair<'_> {
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
fn hold_distributions(pair: &Pair<'_>) -> bool {
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
    pub(crate) fn new(place: &Place<'_>, single: &[&'static str]) -> OutputMeter {
        let wanted = |family: &&&dyn Family| {
            (!family.single() || family.metrics().iter().any(|m| single.contains(&m.name)))
                && family.fits(place).is_ok()
        };
        let meters = FAMILIES.iter().filter(wanted).map(|family| family.start(place)).collect();
        OutputMeter { name: place.name.to_owned(), meters }
    }

    pub(crate) fn add(&mut self, pair: &Pair<'_>) -> Result<(), String> {
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

    pub(crate) fn scores(&self) -> Vec<Score> {
        self.meters.iter().flat_map(|meter| meter.scores()).collect()
    }

    pub(crate) fn failures(&self) -> Vec<String> {
        self.meters.iter().flat_map(|meter| meter.failures()).collect()
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        self.meters.iter().flat_map(|meter| meter.notes()).collect()
    }
}

/// The inputs of a language model among those that a batch feeds.
pub(crate) fn token_inputs<'a>(graph: &lathe_ir::Graph, inputs: &'a Sample) -> Option<Tokens<'a>> {
    perplexity::token_inputs(graph, inputs)
}

#[cfg(test)]
mod testing {
    use super::*;

    /// The scores of one family over batches of one output.
    pub(super) fn scores(family: &dyn Family, batches: &[(Tensor, Tensor)], labels: Option<&Tensor>) -> Vec<Score> {
        let first = &batches[0].0;
        let samples = first.dims()[0];
        let place = Place { name: "y", dtype: first.dtype(), dims: first.dims(), labels, tokens: None };
        family.fits(&place).unwrap();
        let mut meter = family.start(&place);
        for (index, (reference, candidate)) in batches.iter().enumerate() {
            let first = index * samples;
            let pair = Pair { name: "y", reference, candidate, first, samples, labels, ids: None, kept: None };
            meter.add(&pair).unwrap();
        }
        meter.scores()
    }

    #[test]
    fn names_differ_and_every_drop_is_explained() {
        let mut names: Vec<&str> = metrics().map(|m| m.name).collect();
        assert!(metrics().all(|m| !m.drop.is_empty() && !m.summary.ends_with('.')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), metrics().count());
    }
}
