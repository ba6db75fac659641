//! What runs of models came to: quartiles, how far they can be trusted, and whether one model is faster.

use crate::quantile;
use serde::{Deserialize, Serialize};

/// Runs of one or two models.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// The engine.
    pub engine: String,
    /// The sizes of the inputs: `x [1, 3, 224, 224]`.
    pub inputs: String,
    /// The samples in a run, where the inputs are of a set.
    pub samples: Option<usize>,
    /// The runs of each model.
    pub models: Vec<Series>,
    /// With two models: for each sitting the ratios of the second to the first, one for each round.
    pub ratios: Vec<Vec<f64>>,
}

/// The runs of one model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The runs of each sitting, in milliseconds.
    pub sittings: Vec<Vec<f64>>,
    /// Copying the inputs to the device, in milliseconds, if it has memory of its own.
    pub copy_in_ms: Option<f64>,
    /// Copying the outputs from it.
    pub copy_out_ms: Option<f64>,
    /// Whether such copies are in the times of the runs, because they could not be kept out.
    #[serde(default)]
    pub copies_in_run: bool,
}

/// No measurement of ours is more certain than this share of itself.
const FLOOR: f64 = 0.005;

impl Timings {
    /// Median, first and third quartile of all runs of a model, in milliseconds.
    pub fn quartiles(&self, model: usize) -> [f64; 3] {
        let runs: Vec<f64> = self.models[model].sittings.iter().flatten().copied().collect();
        [0.5, 0.25, 0.75].map(|share| quantile(&runs, share))
    }

    /// By how much the result may be off, as a share of it: of the ratio of two models, of the median of one.
    ///
    /// The largest of: the standard deviation of the sittings' medians, half the distance of the quartiles of all
    /// rounds, and half a percent.
    pub fn spread(&self) -> f64 {
        let (sittings, rounds): (Vec<f64>, Vec<f64>) = if self.ratios.is_empty() {
            let sittings: Vec<f64> = self.models[0].sittings.iter().map(|runs| quantile(runs, 0.5)).collect();
            (sittings.clone(), sittings)
        } else {
            let sittings = self.ratios.iter().map(|rounds| quantile(rounds, 0.5)).collect();
            (sittings, self.ratios.iter().flatten().copied().collect())
        };
        let middle = quantile(&sittings, 0.5);
        let mean = sittings.iter().sum::<f64>() / sittings.len() as f64;
        let squares: f64 = sittings.iter().map(|s| (s - mean).powi(2)).sum();
        let deviation = (squares / (sittings.len().max(2) - 1) as f64).sqrt();
        let quartiles = (quantile(&rounds, 0.75) - quantile(&rounds, 0.25)) / 2.0;
        (deviation.max(quartiles) / middle).max(FLOOR)
    }

    /// The second model's median as a share of the first one's.
    pub fn ratio(&self) -> Option<f64> {
        (self.models.len() == 2).then(|| self.quartiles(1)[0] / self.quartiles(0)[0])
    }

    /// Whether the second model is `faster`, `slower`, or neither: both the medians and the rounds must differ by more
    /// than three spreads.
    pub fn verdict(&self) -> Option<&'static str> {
        let ratio = self.ratio()?;
        let rounds: Vec<f64> = self.ratios.iter().flatten().copied().collect();
        let paired = quantile(&rounds, 0.5);
        let margin = 3.0 * self.spread();
        let beyond = |ratio: f64| if ratio < 1.0 - margin { -1 } else { i32::from(ratio > 1.0 + margin) };
        Some(match beyond(ratio) + beyond(paired) {
            -2 => "faster",
            2 => "slower",
            _ => "no difference",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::SITTINGS, *};
    use lathe_analysis::Random;

    /// Sittings of two models that take `before` and `after` on a machine with this noise.
    fn simulated(before: f64, after: f64, noise: f64, seed: u64) -> Timings {
        let mut random = Random::new(seed);
        let mut draw = |scale: f64| 1.0 + scale * (random.uniform() + random.uniform() + random.uniform() - 1.5) * 2.0;
        let mut timings = Timings { models: vec![Series::default(); 2], ..Timings::default() };
        for _ in 0..SITTINGS {
            let (bias, mut ratios) = (draw(noise), Vec::new());
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for _ in 0..10 {
                let load = draw(5.0 * noise);
                a.push(before * load * draw(noise));
                b.push(after * load * bias * draw(noise));
                ratios.push(b[b.len() - 1] / a[a.len() - 1]);
            }
            timings.models[0].sittings.push(a);
            timings.models[1].sittings.push(b);
            timings.ratios.push(ratios);
        }
        timings
    }

    #[test]
    fn equals_are_never_told_apart() {
        for seed in 0..200 {
            let timings = simulated(3.0, 3.0, 0.02, seed);
            assert_eq!(timings.verdict(), Some("no difference"), "seed {seed}: {timings:?}");
        }
    }

    #[test]
    fn a_large_difference_is_seen_through_noise() {
        for seed in 0..50 {
            assert_eq!(simulated(3.0, 1.5, 0.02, seed).verdict(), Some("faster"));
            assert_eq!(simulated(1.5, 3.0, 0.02, seed).verdict(), Some("slower"));
        }
    }
}
