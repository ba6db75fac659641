//! Exponential integrators: what a prediction and its differences are worth on the way from one noise level to another.
//! Lu et al. 2022, DPM-Solver, arXiv:2206.00927, and DPM-Solver++, arXiv:2211.01095.

use super::{Level, Scheduler};

/// The logarithm of the ratio of signal to noise; infinite where there is no noise.
pub(super) fn log_ratio(level: Level) -> f64 {
    level.alpha.ln() - level.noise.ln()
}

/// The factors of a step `x' = state·x + base·D0 + …·D1 + …·D2 + noise·z`, where `D0` is the prediction and `D1`, `D2` are
/// its divided differences.
#[derive(Debug, Clone, Copy)]
pub(super) struct Worth {
    pub state: f64,
    pub base: f64,
    /// Of the first difference by the midpoint rule.
    pub midpoint: f64,
    /// Of the first difference, integrated.
    pub first: f64,
    /// Of the second difference, integrated.
    pub second: f64,
    pub noise: f64,
    /// The way, in the logarithm of signal over noise.
    pub length: f64,
}

impl Worth {
    /// The factors for a scheduler that predicts the clean sample or the noise, deterministic or stochastic.
    pub fn of(s: &Scheduler, from: Level, to: Level) -> Worth {
        // Infinite where the last level is free of noise; with estimates of the clean sample everything is finite then.
        let length = log_ratio(to) - log_ratio(from);
        if s.noise_form { of_noise(s.stochastic, from, to, length) } else { of_sample(s.stochastic, from, to, length) }
    }

    /// Of the first difference in a step of second order.
    pub fn second_order(&self, heun: bool) -> f64 {
        if heun { self.first } else { self.midpoint }
    }
}

/// Both integrated factors vanish with the length; the reference has another sign in the second of its stochastic solver,
/// which keeps that from third order.
fn of_sample(stochastic: bool, from: Level, to: Level, length: f64) -> Worth {
    let (decay, h) = if stochastic { ((-length).exp(), 2.0 * length) } else { (1.0, length) };
    let pull = 1.0 - (-h).exp();
    let (first, second) = match h == 0.0 {
        true => (0.0, 0.0),
        false => (1.0 - pull / h, pull / (h * h) - 1.0 / h + 0.5),
    };
    Worth {
        state: to.noise / from.noise * decay,
        base: to.alpha * pull,
        midpoint: 0.5 * to.alpha * pull,
        first: to.alpha * first,
        second: to.alpha * second,
        noise: if stochastic { to.noise * pull.sqrt() } else { 0.0 },
        length,
    }
}

fn of_noise(stochastic: bool, from: Level, to: Level, h: f64) -> Worth {
    let (growth, times) = (h.exp() - 1.0, if stochastic { 2.0 } else { 1.0 });
    let (first, second) = match h == 0.0 {
        true => (0.0, 0.0),
        false => (growth / h - 1.0, (growth - h) / (h * h) - 0.5),
    };
    let scale = -times * to.noise;
    Worth {
        state: to.alpha / from.alpha,
        base: scale * growth,
        midpoint: 0.5 * scale * growth,
        first: scale * first,
        second: scale * second,
        noise: if stochastic { to.noise * ((2.0 * h).exp() - 1.0).sqrt() } else { 0.0 },
        length: h,
    }
}
