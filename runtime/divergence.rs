//! How far apart rows of logits or probabilities are: their Kullback-Leibler divergence, and whether the largest element
//! stays where it was.

/// Sums over rows.
#[derive(Debug, Default)]
pub(crate) struct RowSums {
    rows: u64,
    agreeing: u64,
    divergence: f64,
}

impl RowSums {
    /// Takes in a row of the reference and that of the candidate; `plain` as [`divergence`] has it.
    pub(crate) fn add(&mut self, reference: &[f64], candidate: &[f64], plain: bool) {
        self.rows += 1;
        self.agreeing += u64::from(largest(reference) == largest(candidate));
        self.divergence += divergence(reference, candidate, plain);
    }

    /// How many rows there were.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// How many of them have their largest element at the same place.
    pub(crate) fn agreeing(&self) -> u64 {
        self.agreeing
    }

    /// The share of them; `None` of no rows.
    pub(crate) fn top1(&self) -> Option<f64> {
        (self.rows > 0).then(|| self.agreeing as f64 / self.rows as f64)
    }

    /// The mean divergence, in nats; `None` of no rows.
    pub(crate) fn kl(&self) -> Option<f64> {
        (self.rows > 0).then(|| self.divergence / self.rows as f64)
    }
}

/// The first index of the largest element.
pub(crate) fn largest(row: &[f64]) -> usize {
    let mut best = 0;
    for (index, &x) in row.iter().enumerate() {
        if x > row[best] {
            best = index;
        }
    }
    best
}

/// Nothing negative, and a sum of one up to f16 rounding.
pub(crate) fn is_distribution(row: &[f64]) -> bool {
    row.iter().all(|&x| (0.0..=1.0 + 1e-3).contains(&x)) && (row.iter().sum::<f64>() - 1.0).abs() < 1e-2
}

/// What to subtract from each logit of a row for its log-probability.
pub(crate) fn log_sum_exp(row: &[f64]) -> f64 {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + row.iter().map(|&x| (x - top).exp()).sum::<f64>().ln()
}

/// Probabilities below this are noise of the softmax in any float type.
pub(crate) const TINY: f64 = 1e-30;

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
