//! How far apart rows of logits or probabilities are: kl and top1.

use super::{Accumulator, Family, Metric, Pair, Place, Score};
use crate::differences::largest;

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
    rows: u64,
    agreeing: u64,
    kl: f64,
    /// Whether rows hold probabilities rather than logits, by the first batch.
    plain: Option<bool>,
}

impl Accumulator for Rows {
    fn add(&mut self, pair: &Pair<'_>) -> Result<(), String> {
        let plain = *self.plain.get_or_insert_with(|| hold_distributions(pair));
        pair.rows(|_, a, b| {
            // A row with a NaN has no largest element; the distances name it.
            if a.iter().chain(b).any(|x| x.is_nan() || *x == f64::INFINITY) {
                return;
            }
            self.rows += 1;
            self.agreeing += u64::from(largest(a) == largest(b));
            self.kl += divergence(a, b, plain);
        });
        Ok(())
    }

    fn scores(&self) -> Vec<Score> {
        if self.rows == 0 {
            return Vec::new();
        }
        let rows = self.rows as f64;
        let (kl, top1) = (self.kl / rows, self.agreeing as f64 / rows);
        // Counted, not subtracted: 1 − share would round.
        let lost = (self.rows - self.agreeing) as f64 / rows;
        vec![
            Score::new("kl", 0.0, kl, kl),
            Score::new("top1", 1.0, top1, lost).with(format!("{} of {} rows", self.agreeing, self.rows)),
        ]
    }
}

/// Whether the rows of both outputs are distributions already. One row may look like one by chance, all rows do not.
pub(super) fn hold_distributions(pair: &Pair<'_>) -> bool {
    let mut all = true;
    pair.rows(|_, a, b| all = all && is_distribution(a) && is_distribution(b));
    all
}

/// Nothing negative, and a sum of one up to f16 rounding.
pub(crate) fn is_distribution(row: &[f64]) -> bool {
    row.iter().all(|&x| (0.0..=1.0 + 1e-3).contains(&x)) && (row.iter().sum::<f64>() - 1.0).abs() < 1e-2
}

/// What to subtract from each logit of a row for its log-probability.
pub(super) fn log_sum_exp(row: &[f64]) -> f64 {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + row.iter().map(|&x| (x - top).exp()).sum::<f64>().ln()
}

/// Probabilities below this are noise of the softmax in any float type.
pub(super) const TINY: f64 = 1e-30;

/// The least log-probability: what only the candidate rules out is held to be tiny.
const LEAST: f64 = -1e3;

/// The Kullback-Leibler divergence from `a` to `b`, in nats: of probabilities if they are `plain`, else of logits.
pub(crate) fn divergence(a: &[f64], b: &[f64], plain: bool) -> f64 {
    if a == b {
        return 0.0;
    }
    if plain {
        let logs = a.iter().zip(b).map(|(x, y)| (x.max(TINY).ln(), y.max(TINY).ln()));
        return logs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0);
    }
    // Σ p (log p − log q) with p = e^(a − top) / Z, in one pass over the exponentials of `a`.
    let (top, to) = (a.iter().copied().fold(f64::NEG_INFINITY, f64::max), log_sum_exp(b));
    let (mut total, mut sum) = (0.0, 0.0);
    for (&x, &y) in a.iter().zip(b) {
        // What the original rules out weighs nothing.
        if x > f64::NEG_INFINITY {
            let weight = (x - top).exp();
            total += weight;
            sum += weight * ((x - top) - (y - to).max(LEAST));
        }
    }
    (sum / total - total.ln()).max(0.0)
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
