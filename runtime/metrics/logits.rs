//! How far apart rows of logits or probabilities are: kl and top1.

use super::{Accumulator, Family, Metric, Pair, Place, Score, hold_distributions};
use crate::divergence::RowSums;

pub(super) struct Distributions;

const METRICS: &[Metric] = &[
    Metric {
        name: "kl",
        summary: "the mean Kullback-Leibler divergence of rows of logits or probabilities, in nats",
        drop: "the divergence",
    },
    Metric {
        name: "top1",
        summary: "the share of rows of logits whose largest element stays where it was",
        drop: "1 − share",
    },
];

impl Family for Distributions {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, place: &Place<'_>) -> Result<(), String> {
        let width = place.dims.last().copied().unwrap_or(1);
        match place.dtype.is_float() && place.dims.len() >= 2 && width > 1 {
            true => Ok(()),
            false => Err(format!("output `{}` has no rows of logits", place.name)),
        }
    }

    fn start(&self, _: &Place<'_>) -> Box<dyn Accumulator> {
        Box::new(Rows::default())
    }
}

#[derive(Default)]
struct Rows {
    sums: RowSums,
    /// Whether rows hold probabilities rather than logits, by the first batch.
    plain: Option<bool>,
}

impl Accumulator for Rows {
    fn add(&mut self, pair: &Pair<'_>) -> Result<(), String> {
        let plain = *self.plain.get_or_insert_with(|| hold_distributions(pair));
        pair.rows(|_, a, b| {
            // A row with a NaN has no largest element; the distances name it.
            if !a.iter().chain(b).any(|x| x.is_nan() || *x == f64::INFINITY) {
                self.sums.add(a, b, plain);
            }
        });
        Ok(())
    }

    fn scores(&self) -> Vec<Score> {
        let (Some(kl), Some(top1)) = (self.sums.kl(), self.sums.top1()) else { return Vec::new() };
        let (agreeing, rows) = (self.sums.agreeing(), self.sums.rows());
        // Counted, not subtracted: 1 − share would round.
        let lost = (rows - agreeing) as f64 / rows as f64;
        vec![
            Score::new("kl", 0.0, kl, kl),
            Score::new("top1", 1.0, top1, lost).with(format!("{agreeing} of {rows} rows")),
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
        assert!((logits[0].after - probabilities[0].after).abs() < 1e-6);
        let (p, q) = (softmax(&a), softmax(&b));
        let expected: f32 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((logits[0].after - f64::from(expected)).abs() < 1e-6);
        assert_eq!((logits[1].after, logits[1].drop), (0.0, 1.0));
    }

    #[test]
    fn what_is_ruled_out_in_both_weighs_nothing() {
        let t = |v: &[f32]| Tensor::from_f32s(&[1, 3], v);
        let a = t(&[1.0, f32::NEG_INFINITY, 0.5]);
        assert_eq!(scores(&Distributions, &[(a.clone(), a)], None)[0].after, 0.0);
    }
}
