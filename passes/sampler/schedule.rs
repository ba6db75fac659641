//! The training schedule: cumulative alphas and noise levels by timestep.

use super::{BetaSchedule, Scheduler};

/// The cumulative alphas ᾱ of a training schedule, one per timestep, each a float32 number.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    alphas: Vec<f64>,
}

/// What solvers of noise levels put in the place of a last cumulative alpha of zero, so that its noise level is finite.
const SMALLEST_ALPHA: f64 = 1.0 / 16_777_216.0;

fn f32ed(x: f64) -> f64 {
    f64::from(x as f32)
}

/// `count` numbers from `start` to `end`, both included.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let last = count.saturating_sub(1).max(1) as f64;
    (0..count).map(|k| start + (end - start) * (k as f64 / last)).collect()
}

fn betas(s: &Scheduler) -> Vec<f64> {
    let count = s.num_train_timesteps;
    if let Some(betas) = &s.trained_betas {
        return betas.iter().map(|&b| f32ed(b)).collect();
    }
    match s.beta_schedule {
        BetaSchedule::Linear => linspace(s.beta_start, s.beta_end, count).into_iter().map(f32ed).collect(),
        BetaSchedule::ScaledLinear => {
            let roots = linspace(s.beta_start.sqrt(), s.beta_end.sqrt(), count);
            roots.into_iter().map(|r| f32ed(f32ed(r) * f32ed(r))).collect()
        }
        BetaSchedule::SquaredCosine => {
            betas_of(count, &|t| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2))
        }
        BetaSchedule::Exponential => betas_of(count, &|t| (-12.0 * t).exp()),
    }
}

/// The betas whose cumulative alpha is a function of the share of the schedule.
fn betas_of(count: usize, bar: &dyn Fn(f64) -> f64) -> Vec<f64> {
    let at = |k: usize| bar(k as f64 / count as f64);
    (0..count).map(|k| f32ed((1.0 - at(k + 1) / at(k)).min(0.999))).collect()
}

impl Schedule {
    /// The schedule that a configuration describes.
    pub fn new(s: &Scheduler) -> Schedule {
        let mut product = 1.0;
        let alphas = betas(s).into_iter().map(|beta| {
            product *= f32ed(1.0 - beta);
            f32ed(product)
        });
        let mut alphas: Vec<f64> = alphas.collect();
        if let Some(k) = s.snr_shift_scale {
            alphas.iter_mut().for_each(|a| *a /= k + (1.0 - k) * *a);
        }
        if s.rescale_betas_zero_snr {
            let roots: Vec<f64> = alphas.iter().map(|a| a.sqrt()).collect();
            let (first, last) = (roots[0], roots[roots.len() - 1]);
            alphas = roots.iter().map(|a| f32ed(((a - last) * first / (first - last)).powi(2))).collect();
            if s.solver.info().finite_sigmas {
                *alphas.last_mut().expect("a schedule has at least two timesteps") = SMALLEST_ALPHA;
            }
        }
        Schedule { alphas }
    }

    /// How many timesteps there are.
    pub fn len(&self) -> usize {
        self.alphas.len()
    }

    /// Whether there are none; a schedule has at least two.
    pub fn is_empty(&self) -> bool {
        self.alphas.is_empty()
    }

    /// ᾱ at a timestep; the last one beyond the end.
    pub fn alpha(&self, timestep: usize) -> f64 {
        self.alphas[timestep.min(self.alphas.len() - 1)]
    }

    /// The noise level `√((1 − ᾱ) / ᾱ)` of every timestep, each a float32 number, as all that is on the way to it.
    pub fn sigmas(&self) -> Vec<f64> {
        (0..self.alphas.len()).map(|timestep| self.sigma(timestep)).collect()
    }

    fn sigma(&self, timestep: usize) -> f64 {
        let alpha = self.alphas[timestep];
        f32ed(f32ed(f32ed(1.0 - alpha) / alpha).sqrt())
    }

    /// The noise level between two timesteps, linearly.
    pub fn sigma_at(&self, time: f64) -> f64 {
        let last = self.alphas.len() - 1;
        let time = time.clamp(0.0, last as f64);
        let low = (time.floor() as usize).min(last - 1);
        let (at, weight) = (|k: usize| self.sigma(k), time - low as f64);
        if weight == 0.0 { at(low) } else { at(low) * (1.0 - weight) + at(low + 1) * weight }
    }

    /// The timestep, with a fraction, at which the logarithm of the noise level is that of `sigma`; clamped to the schedule.
    ///
    /// The logarithms of the schedule are float32 numbers, as in the reference, where a level of the schedule itself may
    /// for that lie just before its own timestep.
    pub fn time_of(&self, sigma: f64) -> f64 {
        let logs: Vec<f64> = self.sigmas().iter().map(|&s| f64::from((s as f32).ln())).collect();
        let target = sigma.max(1e-10).ln();
        let low = logs.iter().rposition(|&l| l <= target).unwrap_or(0).min(logs.len() - 2);
        let weight = ((logs[low] - target) / (logs[low] - logs[low + 1])).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * (low + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::scheduler;
    use serde_json::json;

    fn near(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() <= 1e-6, "{found} is not {expected}");
    }

    fn schedule(json: serde_json::Value) -> Schedule {
        Schedule::new(&scheduler("DDIMScheduler", json))
    }

    #[test]
    fn cumulative_alphas_are_the_golden_ones() {
        let sd = schedule(json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}));
        near(sd.alpha(0), 0.999_149_98);
        near(sd.alpha(499), 0.277_669_40);
        near(sd.alpha(999), 4.660_094e-3);
        let sigmas = sd.sigmas();
        assert!((sigmas[0] - 0.029_167_5).abs() < 5e-8, "{}", sigmas[0]);
        near(sigmas[999], 14.614_65);
        let linear = schedule(json!({}));
        near(linear.alpha(499), 0.078_587_25);
        near(linear.alpha(999), 4.035_830e-5);
        let cosine = schedule(json!({"beta_schedule": "squaredcos_cap_v2"}));
        near(cosine.alpha(499), 0.493_843_47);
        assert!((cosine.alpha(999) - 2.4287e-9).abs() < 1e-13, "{}", cosine.alpha(999));
    }

    #[test]
    fn a_rescaled_schedule_ends_in_noise_alone() {
        let settings = json!({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": true
        });
        let zero = schedule(settings.clone());
        near(zero.alpha(499), 0.242_358_93);
        assert_eq!(zero.alpha(999), 0.0);
        let euler = Schedule::new(&scheduler("EulerDiscreteScheduler", settings));
        near(euler.sigmas()[999], 4096.0);
    }

    #[test]
    fn times_are_found_again() {
        let sd = schedule(json!({}));
        for time in [0.0, 17.0, 499.0, 998.0, 999.0] {
            assert!((sd.time_of(sd.sigma_at(time)) - time).abs() < 1e-4);
        }
        assert_eq!(sd.time_of(1e9), 999.0);
        assert_eq!(sd.time_of(0.0), 0.0);
    }
}
