//! How a number is spread over pairs of samples.

use lathe_runtime::{bootstrap, quantile};
use serde::Serialize;

/// Samples drawn anew for intervals.
const ROUNDS: usize = 1000;

/// How a number is spread over pairs. What is infinite is `null` in JSON.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Spread {
    /// The mean.
    pub mean: f64,
    /// The ends of its 95 % interval, by drawing pairs anew.
    pub interval: [f64; 2],
    /// The median.
    pub median: f64,
    /// What nine of ten exceed.
    pub p10: f64,
    /// What one of ten exceeds.
    pub p90: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// How values are spread; the interval is drawn by a seed.
    pub fn of(values: &[f64], seed: u64) -> Spread {
        Spread {
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
            interval: bootstrap(values, ROUNDS, seed),
            median: quantile(values, 0.5),
            p10: quantile(values, 0.1),
            p90: quantile(values, 0.9),
            least: quantile(values, 0.0),
            most: quantile(values, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_have_quantiles_and_an_interval() {
        let found = Spread::of(&[1.0, 2.0, 3.0, 4.0, 5.0], 1);
        assert_eq!((found.mean, found.median, found.least, found.most), (3.0, 3.0, 1.0, 5.0));
        assert!(found.interval[0] < 3.0 && found.interval[1] > 3.0 && found.p10 < found.p90);
        // A sample that does not differ has an infinite ratio, which JSON has no number for.
        let endless = Spread::of(&[f64::INFINITY; 3], 1);
        assert!(serde_json::to_string(&endless).unwrap().contains(r#""median":null"#));
    }
}
