//! How far apart the elements of an output are: max-abs, rel-l2, cosine, snr. Pooled over the whole set, so that the
//! size of a batch changes nothing.

use super::{Accumulator, Case, Column, Family, METRIC, Metric, OutputInfo, OutputPair, Refusal, Score, Suggestion};
use crate::differences::{ElementSums, Meeting};
use lathe_ir::DataType;

pub(super) struct Distances;

const METRICS: &[Metric] = &[
    Metric {
        name: "max-abs",
        summary: "the largest difference of two elements",
        drop: "the difference",
        is_error: true,
        column: Some(Column { heading: "max abs", order: 0, unit: "" }),
        ..METRIC
    },
    Metric {
        name: "rel-l2",
        summary: "the L2 norm of the difference over that of the original's output",
        drop: "the error",
        is_error: true,
        column: Some(Column { heading: "relative L2", order: 0, unit: "" }),
        ..METRIC
    },
    Metric {
        name: "cosine",
        summary: "the cosine of the angle between the outputs",
        drop: "1 − cosine",
        column: Some(Column { heading: "cosine", order: 0, unit: "" }),
        ..METRIC
    },
    Metric {
        name: "snr",
        summary: "the signal-to-noise ratio in dB",
        drop: "noise over signal as amplitudes: 0.01 is 40 dB",
        column: Some(Column { heading: "SNR", order: 3, unit: "dB" }),
        ..METRIC
    },
];

/// Elements that have no distance.
#[derive(Debug, thiserror::Error)]
#[error("output `{output}` holds {dtype}, no real numbers")]
struct NotReal {
    output: String,
    dtype: DataType,
}

impl Family for Distances {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, output: &OutputInfo<'_>) -> Result<(), Refusal> {
        match output.dtype {
            DataType::String | DataType::Complex64 | DataType::Complex128 => {
                Err(NotReal { output: output.name.to_owned(), dtype: output.dtype }.into())
            }
            _ => Ok(()),
        }
    }

    fn suggest(&self, _: &mut Case<'_>) -> Option<Suggestion> {
        Some(("rel-l2", "no output is known to be logits or images".to_owned()))
    }

    fn start(&self, output: &OutputInfo<'_>) -> Box<dyn Accumulator> {
        Box::new(DifferenceSums { name: output.name.to_owned(), ..DifferenceSums::default() })
    }
}

/// Elements that are NaN or infinite: how many, and what the first one is.
#[derive(Default)]
struct Special {
    count: u64,
    first: String,
}

impl Special {
    fn add(&mut self, describe: impl FnOnce() -> String) {
        if self.count == 0 {
            self.first = describe();
        }
        self.count += 1;
    }
}

#[derive(Default)]
struct DifferenceSums {
    name: String,
    elements: ElementSums,
    /// In one of the two only, or different ones.
    broken: Special,
    /// The same in both.
    shared: Special,
}

impl Accumulator for DifferenceSums {
    fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal> {
        pair.rows(|start, a, b| {
            let mut row = ElementSums::default();
            for (offset, (&x, &y)) in a.iter().zip(b).enumerate() {
                let sample = || pair.sample_of(start + offset);
                match row.add(x, y) {
                    Meeting::Finite => {}
                    Meeting::Same => self.shared.add(|| format!("{x} in sample {}", sample())),
                    Meeting::Broken => {
                        self.broken.add(|| format!("{y} in sample {} where the original has {x}", sample()));
                    }
                }
            }
            self.elements.join(&row);
        });
        Ok(())
    }

    fn scores(&self) -> Vec<(&'static str, Score)> {
        let (max_abs, rel_l2, cosine) = (self.elements.max_abs(), self.elements.rel_l2(), self.elements.cosine());
        vec![
            ("max-abs", Score::new(0.0, max_abs, max_abs)),
            ("rel-l2", Score::new(0.0, rel_l2, rel_l2)),
            ("cosine", Score::new(1.0, cosine, 1.0 - cosine)),
            ("snr", Score::new(f64::INFINITY, -20.0 * rel_l2.log10(), rel_l2)),
        ]
    }

    fn failures(&self) -> Vec<String> {
        let Special { count, first } = &self.broken;
        let sentence = || format!("output `{}` has {first} ({count} such elements in all)", self.name);
        (*count > 0).then(sentence).into_iter().collect()
    }

    fn notes(&self) -> Vec<String> {
        let Special { count, first } = &self.shared;
        let sentence = || {
            format!("output `{}` of both models has {first} ({count} such elements in all), left out here", self.name)
        };
        (*count > 0).then(sentence).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::scores, *};
    use lathe_ir::Tensor;
    use std::collections::BTreeMap;

    fn value(scores: &BTreeMap<&str, Score>, metric: &str) -> f64 {
        scores[metric].after
    }

    #[test]
    fn batches_are_pooled() {
        let t = |v: &[f32]| Tensor::from_f32s(&[v.len() / 2, 2], v);
        let whole = scores(&Distances, &[(t(&[3.0, 4.0, 0.0, 12.0]), t(&[3.0, 4.0, 0.0, 13.0]))], None);
        let parts = [(t(&[3.0, 4.0]), t(&[3.0, 4.0])), (t(&[0.0, 12.0]), t(&[0.0, 13.0]))];
        assert_eq!(scores(&Distances, &parts, None), whole);
        assert_eq!(value(&whole, "max-abs"), 1.0);
        assert!((value(&whole, "rel-l2") - 1.0 / 13.0).abs() < 1e-15);
        assert!((value(&whole, "snr") - 20.0 * 13f64.log10()).abs() < 1e-12);
        assert!((value(&whole, "cosine") - 181.0 / (169f64 * 194.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn equal_outputs_have_no_noise() {
        let t = Tensor::from_f32s(&[1, 2], &[0.0, 0.0]);
        let all = scores(&Distances, &[(t.clone(), t)], None);
        assert_eq!((value(&all, "snr"), value(&all, "cosine"), value(&all, "rel-l2")), (f64::INFINITY, 1.0, 0.0));
        assert!(all.values().all(|s| s.drop == 0.0));
    }

    #[test]
    fn a_nan_is_named_with_its_sample() {
        let t = |v: &[f32]| Tensor::from_f32s(&[2, 2], v);
        let (reference, candidate) = (t(&[1.0, f32::INFINITY, 2.0, 3.0]), t(&[1.0, f32::INFINITY, 2.0, f32::NAN]));
        let output = OutputInfo { name: "y", dtype: DataType::Float, dims: &[2, 2], labels: None, tokens: None };
        let mut sums = Distances.start(&output);
        let (reference, candidate) = (&reference, &candidate);
        let pair =
            OutputPair { name: "y", reference, candidate, first: 8, samples: 2, labels: None, ids: None, kept: None };
        sums.add(&pair).unwrap();
        assert_eq!(
            sums.failures(),
            ["output `y` has NaN in sample 9 where the original has 3 (1 such elements in all)"]
        );
        assert_eq!(
            sums.notes(),
            ["output `y` of both models has inf in sample 8 (1 such elements in all), left out here"]
        );
    }
}
