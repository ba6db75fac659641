//! The share of labels that each model predicts.

use super::{Accumulator, Case, Family, METRIC, Metric, OutputInfo, OutputPair, Refusal, Score, Suggestion};
use crate::divergence::largest;
use lathe_ir::{DataType, Tensor};

pub(super) struct Labelled;

const METRICS: &[Metric] = &[Metric {
    name: "accuracy",
    summary: "the share of labels that are predicted (--labels)",
    drop: "accuracy lost, as a share of all labels: 0.01 is one percentage point",
    of_logits: true,
    ..METRIC
}];

/// Why there are no labels to count, or none that can be.
#[derive(Debug, thiserror::Error)]
enum LabelError {
    #[error("there are no labels (--labels NAME names them)")]
    None,
    #[error("the labels hold {0}, expected whole numbers")]
    Type(DataType),
    #[error("output `{output}` of shape {dims:?} has no axis of classes for labels of shape {labels:?}")]
    NoAxis { output: String, dims: Vec<usize>, labels: Vec<usize> },
    #[error("a batch has no labels")]
    Missing,
    #[error("the labels are not whole numbers")]
    NotWhole,
    #[error("the classes are not whole numbers")]
    ClassesNotWhole,
    #[error("the scores are no real numbers")]
    NotReal,
    #[error("labels of shape {labels:?} do not fit output `{output}`")]
    Unfit { output: String, labels: Vec<usize> },
    #[error("label {label} of sample {sample} is none of the {classes} classes of output `{output}`")]
    NoClass { label: i64, sample: usize, classes: usize, output: String },
}

/// Marks a output without a label, as training code does.
const NO_LABEL: i64 = -100;

/// Where the classes of an output are, given the labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClassLayout {
    /// The output holds classes themselves.
    Classes,
    /// Scores along this axis.
    Axis(usize),
}

fn layout(dims: &[usize], integer: bool, labels: &[usize]) -> Option<ClassLayout> {
    // Labels often keep an axis of one beside the samples.
    let labels = match labels {
        [front @ .., 1] if !front.is_empty() && dims.len() != labels.len() + 1 => front,
        all => all,
    };
    let without = |axis: usize| dims.iter().enumerate().filter(move |(i, _)| *i != axis).map(|(_, d)| d);
    if integer {
        return (dims == labels).then_some(ClassLayout::Classes);
    }
    let last = dims.len().checked_sub(1)?;
    let matches = |axis: usize| axis < dims.len() && dims[axis] > 1 && without(axis).eq(labels);
    // The last axis comes first: it is the only one for rank 2, and what a language model uses.
    [last, 1].into_iter().find(|&axis| matches(axis)).map(ClassLayout::Axis)
}

impl Family for Labelled {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, output: &OutputInfo<'_>) -> Result<(), Refusal> {
        let labels = output.labels.ok_or(LabelError::None)?;
        if !(labels.dtype().is_integer() || labels.dtype() == DataType::Bool) {
            return Err(LabelError::Type(labels.dtype()).into());
        }
        match layout(output.dims, output.dtype.is_integer(), labels.dims()) {
            Some(_) => Ok(()),
            None => Err(LabelError::NoAxis {
                output: output.name.to_owned(),
                dims: output.dims.to_vec(),
                labels: labels.dims().to_vec(),
            }
            .into()),
        }
    }

    fn start(&self, _: &OutputInfo<'_>) -> Box<dyn Accumulator> {
        Box::new(LabelCounts::default())
    }

    fn single(&self) -> bool {
        true
    }

    fn precedence(&self) -> u8 {
        40
    }

    fn suggest(&self, case: &mut Case<'_>) -> Option<Suggestion> {
        let labelled = case.outputs.iter().any(|output| output.labels.is_some());
        labelled.then(|| ("accuracy", "labels are given".to_owned()))
    }
}

#[derive(Default)]
struct LabelCounts {
    labels: u64,
    before: u64,
    after: u64,
}

impl LabelCounts {
    fn count(&mut self, label: i64, before: i64, after: i64) {
        self.labels += 1;
        self.before += u64::from(before == label);
        self.after += u64::from(after == label);
    }
}

impl Accumulator for LabelCounts {
    fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal> {
        let tensor = pair.labels.ok_or(LabelError::Missing)?;
        let labels = tensor.to_i64s().ok_or(LabelError::NotWhole)?;
        let dims = pair.reference.dims();
        let layout = layout(dims, pair.reference.dtype().is_integer(), tensor.dims());
        let axis = match layout {
            Some(ClassLayout::Axis(axis)) => axis,
            Some(ClassLayout::Classes) => {
                let classes = |t: &Tensor| t.to_i64s().ok_or(LabelError::ClassesNotWhole);
                for ((&label, a), b) in labels.iter().zip(classes(pair.reference)?).zip(classes(pair.candidate)?) {
                    if label != NO_LABEL {
                        self.count(label, a, b);
                    }
                }
                return Ok(());
            }
            None => {
                let (output, labels) = (pair.name.to_owned(), tensor.dims().to_vec());
                return Err(LabelError::Unfit { output, labels }.into());
            }
        };
        let classes = dims[axis];
        for (index, &label) in labels.iter().enumerate() {
            if label != NO_LABEL && !usize::try_from(label).is_ok_and(|l| l < classes) {
                let sample = pair.first + index * pair.samples / labels.len().max(1);
                return Err(LabelError::NoClass { label, sample, classes, output: pair.name.to_owned() }.into());
            }
        }
        if axis + 1 == dims.len() {
            pair.rows(|start, a, b| {
                let label = labels[start / classes];
                if label != NO_LABEL {
                    self.count(label, largest(a) as i64, largest(b) as i64);
                }
            });
            return Ok(());
        }
        let all = |t: &Tensor| t.to_f64s().ok_or(LabelError::NotReal);
        let (a, b) = (all(pair.reference)?, all(pair.candidate)?);
        let inner: usize = dims[axis + 1..].iter().product();
        let column = |all: &[f64], at: usize| -> i64 {
            let start = at / inner * classes * inner + at % inner;
            let scores: Vec<f64> = (0..classes).map(|c| all[start + c * inner]).collect();
            largest(&scores) as i64
        };
        for (at, &label) in labels.iter().enumerate() {
            if label != NO_LABEL {
                self.count(label, column(&a, at), column(&b, at));
            }
        }
        Ok(())
    }

    fn scores(&self) -> Vec<(&'static str, Score)> {
        if self.labels == 0 {
            return Vec::new();
        }
        let share = |count: u64| count as f64 / self.labels as f64;
        let drop = (self.before as f64 - self.after as f64) / self.labels as f64;
        let detail = format!("{} of {} labels before, {} after", self.before, self.labels, self.after);
        vec![("accuracy", Score::new(share(self.before), share(self.after), drop).with(detail))]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::scores, *};

    #[test]
    fn counts_both_models() {
        let before = Tensor::from_f32s(&[4, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.5]);
        let after = Tensor::from_f32s(&[4, 2], &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.5]);
        let labels = Tensor::int64s(&[0, 1, NO_LABEL, 0]);
        let score = &scores(&Labelled, &[(before, after)], Some(&labels))["accuracy"];
        assert_eq!(score.detail.as_deref(), Some("3 of 3 labels before, 1 after"));
        assert_eq!((score.before, score.after, score.drop), (1.0, 1.0 / 3.0, 2.0 / 3.0));
    }

    #[test]
    fn finds_the_axis_of_classes() {
        assert_eq!(layout(&[8, 10], false, &[8]), Some(ClassLayout::Axis(1)));
        assert_eq!(layout(&[8, 10], false, &[8, 1]), Some(ClassLayout::Axis(1)));
        assert_eq!(layout(&[2, 21, 4, 5], false, &[2, 4, 5]), Some(ClassLayout::Axis(1)));
        assert_eq!(layout(&[2, 7, 30], false, &[2, 7]), Some(ClassLayout::Axis(2)));
        assert_eq!(layout(&[8], true, &[8]), Some(ClassLayout::Classes));
        assert_eq!(layout(&[8, 10], false, &[7]), None);
    }

    #[test]
    fn reads_maps_of_classes() {
        // Two classes, three outputs: the second class wins at the middle output only.
        let map = Tensor::from_f32s(&[1, 2, 3], &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        let labels = Tensor::from_i64s(&[1, 3], &[0, 1, 1]);
        let score = &scores(&Labelled, &[(map.clone(), map)], Some(&labels))["accuracy"];
        assert_eq!(score.detail.as_deref(), Some("2 of 3 labels before, 2 after"));
    }

    #[test]
    fn a_label_that_is_no_class_is_named() {
        let t = Tensor::from_f32s(&[2, 2], &[0.0; 4]);
        let labels = Tensor::int64s(&[1, 2]);
        let (reference, candidate, labels) = (&t, &t, Some(&labels));
        let pair = OutputPair { name: "y", reference, candidate, first: 6, samples: 2, labels, ids: None, kept: None };
        let error = LabelCounts::default().add(&pair).unwrap_err().to_string();
        assert_eq!(error, "label 2 of sample 7 is none of the 2 classes of output `y`");
    }
}
