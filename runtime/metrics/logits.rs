//! How far apart rows of logits or probabilities are: kl and top1.

use super::{
    Accumulator, Case, Column, Family, METRIC, Metric, OutputInfo, OutputPair, Refusal, Score, Suggestion,
    hold_distributions, holds_logits,
};
use crate::divergence::RowSums;

pub(super) struct Distributions;

const METRICS: &[Metric] = &[
    Metric {
        name: "kl",
        summary: "the mean Kullback-Leibler divergence of rows of logits or probabilities, in nats",
        drop: "the divergence",
        of_logits: true,
        column: Some(Column { heading: "KL", order: 2, unit: "nats" }),
        ..METRIC
    },
    Metric {
        name: "top1",
        summary: "the share of rows of logits whose largest element stays where it was",
        drop: "1 − share",
        of_logits: true,
        column: Some(Column { heading: "top-1", order: 1, unit: "" }),
        ..METRIC
    },
];

/// An output without logits.
#[derive(Debug, thiserror::Error)]
#[error("output `{0}` has no rows of logits")]
struct NoRows(String);

/// Below this many rows one changed prediction is more than a percent, so the divergence says more.
const FEW: usize = 100;

impl Family for Distributions {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, output: &OutputInfo<'_>) -> Result<(), Refusal> {
        let width = output.dims.last().copied().unwrap_or(1);
        match output.dtype.is_float() && output.dims.len() >= 2 && width > 1 {
            true => Ok(()),
            false => Err(NoRows(output.name.to_owned()).into()),
        }
    }

    fn precedence(&self) -> u8 {
        20
    }

    fn suggest(&self, case: &mut Case<'_>) -> Option<Suggestion> {
        // A row for every sample, or for every token.
        let rows = |o: &OutputInfo<'_>| o.dims.len() == 2 || o.dims.len() == 3 && o.tokens.is_some();
        let classes = |o: &&OutputInfo<'_>| self.fits(o).is_ok() && rows(o) && holds_logits(case.graph, o.name);
        let (name, samples) = (case.outputs.iter().find(classes)?.name, case.samples);
        Some(if samples < FEW {
            ("kl", format!("`{name}` has logits of classes, and {samples} samples are too few to count winners"))
        } else {
            ("top1", format!("`{name}` has logits of classes and no labels are given"))
        })
    }

    fn start(&self, _: &OutputInfo<'_>) -> Box<dyn Accumulator> {
        Box::new(LogitRows::default())
    }
}

#[derive(Default)]
struct LogitRows {
    sums: RowSums,
    /// Whether rows hold probabilities rather than logits, by the first batch.
    plain: Option<bool>,
}

impl Accumulator for LogitRows {
    fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal> {
        let plain = *self.plain.get_or_insert_with(|| hold_distributions(pair));
        pair.rows(|_, a, b| {
            // A row with a NaN has no largest element; the distances name it.
            if !a.iter().chain(b).any(|x| x.is_nan() || *x == f64::INFINITY) {
                self.sums.add(a, b, plain);
            }
        });
        Ok(())
    }

    fn scores(&self) -> Vec<(&'static str, Score)> {
        let (Some(kl), Some(top1)) = (self.sums.kl(), self.sums.top1()) else { return Vec::new() };
        let (agreeing, rows) = (self.sums.agreeing(), self.sums.rows());
        // Counted, not subtracted: 1 − share would round.
        let lost = (rows - agreeing) as f64 / rows as f64;
        vec![
            ("kl", Score::new(0.0, kl, kl)),
            ("top1", Score::new(1.0, top1, lost).with(format!("{agreeing} of {rows} rows"))),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::scores, *};
    use lathe_ir::Tensor;

    #[test]
    fn logits_and_their_softmax_diverge_alike() {
        let softmax = |row: &[f32]| {
            let total: f32 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x.exp() / total).collect::<Vec<f32>>()
        };
        let (a, b) = ([1.0, 2.0, 0.5], [1.5, 1.0, 0.0]);
        let t = |v: &[f32]| Tensor::from_f32s(&[1, 3], v);
        let logits = scores(&Distributions, &[(t(&a), t(&b))], None);
        let probabilities = scores(&Distributions, &[(t(&softmax(&a)), t(&softmax(&b)))], None);
        assert!((logits["kl"].after - probabilities["kl"].after).abs() < 1e-6);
        let (p, q) = (softmax(&a), softmax(&b));
        let expected: f32 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((logits["kl"].after - f64::from(expected)).abs() < 1e-6);
        assert_eq!((logits["top1"].after, logits["top1"].drop), (0.0, 1.0));
    }

    #[test]
    fn what_is_ruled_out_in_both_weighs_nothing() {
        let t = |v: &[f32]| Tensor::from_f32s(&[1, 3], v);
        let a = t(&[1.0, f32::NEG_INFINITY, 0.5]);
        assert_eq!(scores(&Distributions, &[(a.clone(), a)], None)["kl"].after, 0.0);
    }
}
