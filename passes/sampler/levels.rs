//! The noise levels of the two families of solvers, with their timesteps: states that grow with the noise, and states
//! whose variance stays what it is.

use super::{
    BetaSchedule, Error, Level, Request, Row, Scheduler, Sigmas, Spacing, Steps, exponential, grid,
    schedule::{Schedule, linspace},
};

/// Noise levels with the final one, and the timesteps, which are one fewer.
pub(super) struct Levels {
    pub sigmas: Vec<f64>,
    pub times: Vec<f64>,
}

/// The noise levels, without the final one, and the timesteps of solvers whose states grow with the noise.
pub(super) fn growing(s: &Scheduler, schedule: &Schedule, steps: &Steps) -> (Vec<f64>, Vec<f64>) {
    let times = match steps {
        Steps::Count(count) => grid::euler(s, *count),
        Steps::Times(times) => times.clone(),
    };
    let sigmas: Vec<f64> = times.iter().map(|&t| schedule.sigma_at(t)).collect();
    let max = s.sigma_max.unwrap_or(sigmas[0]);
    let min = s.sigma_min.unwrap_or(sigmas[sigmas.len() - 1]);
    match grid::spread(s.sigmas, max, min, times.len()) {
        None => (sigmas, times),
        Some(spread) => {
            let times = spread.iter().map(|&sigma| schedule.time_of(sigma)).collect();
            (spread, times)
        }
    }
}

/// The scale of the first state of solvers whose states grow with the noise.
pub(super) fn growing_scale(s: &Scheduler, sigmas: &[f64]) -> f64 {
    let max = sigmas.iter().copied().fold(0.0, f64::max);
    if s.spacing == Spacing::Leading { (max * max + 1.0).sqrt() } else { max }
}

/// A row of such a solver at a noise level.
pub(super) fn growing_row(s: &Scheduler, sigma: f64, time: f64) -> Row {
    let level = Level { alpha: 1.0, noise: sigma };
    let input_scale = 1.0 / (sigma * sigma + 1.0).sqrt();
    Row { input_scale, ..level.row(time, level.growing_estimate(s.prediction)) }
}

/// The same where later rows find the derivative of the state by the noise level, `(x − y)/σ`.
pub(super) fn derivative_row(s: &Scheduler, sigma: f64, time: f64) -> Row {
    Row { kept: [1.0 / sigma, 0.0, -1.0 / sigma], ..growing_row(s, sigma, time) }
}

/// In what solvers of states that keep their variance differ.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Preserving {
    /// Levels that are spread end on their last one again, unless they end on zero.
    pub repeats: bool,
    /// Times of Karras's levels are whole numbers by truncation where the schedule is a cosine.
    pub truncates_cosine: bool,
    /// A flow begins at noise alone.
    pub full_flow: bool,
}

/// The noise levels and the timesteps, whole ones, of solvers whose states keep their variance.
pub(super) fn preserving(
    s: &Scheduler,
    schedule: &Schedule,
    request: &Request,
    rule: Preserving,
) -> Result<Levels, Error> {
    let (steps, total) = (&request.steps, s.num_train_timesteps as f64);
    let all = schedule.sigmas();
    let max = s.sigma_max.unwrap_or(all[all.len() - 1]);
    let min = s.sigma_min.unwrap_or(all[0]);
    let spread = grid::spread(s.sigmas, max, min, steps.count());
    let is_spread = spread.is_some();
    let (mut sigmas, times): (Vec<f64>, Vec<f64>) = match (spread, steps) {
        // Karras's levels of a flow are those of noise over signal.
        (Some(sigmas), _) if s.flow && s.sigmas == Sigmas::Karras => {
            sigmas.iter().map(|sigma| sigma / (sigma + 1.0)).map(|share| (share, (share * total).trunc())).unzip()
        }
        (Some(sigmas), _) => {
            let whole = matches!(s.sigmas, Sigmas::Karras | Sigmas::Lu)
                && !(rule.truncates_cosine && s.beta_schedule == BetaSchedule::SquaredCosine);
            let time = |&sigma: &f64| {
                let time = schedule.time_of(sigma);
                if whole { time.round_ties_even() } else { time.trunc() }
            };
            let times = sigmas.iter().map(time).collect();
            (sigmas, times)
        }
        (None, _) if s.flow => {
            let sigmas = flow(s, request, rule.full_flow)?;
            let times = sigmas.iter().map(|share| (share * total).trunc()).collect();
            (sigmas, times)
        }
        (None, Steps::Count(count)) => {
            let times = grid::dpm(s, schedule, *count);
            (times.iter().map(|&t| schedule.sigma_at(t)).collect(), times)
        }
        (None, Steps::Times(times)) => (times.iter().map(|&t| schedule.sigma_at(t)).collect(), times.clone()),
    };
    let last = match s.final_sigma_zero {
        true => 0.0,
        false if rule.repeats && (is_spread || s.flow) => sigmas[sigmas.len() - 1],
        false => all[0],
    };
    sigmas.push(last);
    Ok(Levels { sigmas, times })
}

/// The shares of noise of a flow, without the final one.
fn flow(s: &Scheduler, request: &Request, full: bool) -> Result<Vec<f64>, Error> {
    const NEARLY: f64 = 1e-6;
    let (count, least) = (request.steps.count(), 1.0 / s.num_train_timesteps as f64);
    let (first, last) = if full { (1.0, least) } else { (1.0 - least, 0.0) };
    let shift = s.flow_shift(request)?;
    let even = linspace(first, last, count + 1);
    let mut sigmas: Vec<f64> = even.iter().take(count).map(|x| shift * x / (1.0 + (shift - 1.0) * x)).collect();
    grid::stretch(&mut sigmas, s.shift_terminal)?;
    // At noise alone nothing of the signal is left to divide by. What is left then is what float32 makes of it.
    if full && (sigmas[0] - 1.0).abs() < NEARLY {
        sigmas[0] = f64::from((sigmas[0] - NEARLY) as f32);
    }
    Ok(sigmas)
}

impl Scheduler {
    /// The level at a number of the table of noise levels.
    pub(super) fn level(&self, sigma: f64) -> Level {
        if self.flow { Level { alpha: 1.0 - sigma, noise: sigma } } else { Level::of_sigma(sigma) }
    }
}

impl Levels {
    /// The levels as points of the way.
    pub fn points(&self, s: &Scheduler) -> Vec<Level> {
        self.sigmas.iter().map(|&sigma| s.level(sigma)).collect()
    }
}

/// The logarithms of signal over noise of points.
pub(super) fn log_ratios(points: &[Level]) -> Vec<f64> {
    points.iter().map(|&point| exponential::log_ratio(point)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, scheduler};
    use serde_json::json;

    fn times(settings: serde_json::Value, base: &serde_json::Value, steps: usize) -> Vec<f64> {
        let mut all = base.clone();
        all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let s = scheduler("DPMSolverMultistepScheduler", all);
        let rule = Preserving { truncates_cosine: true, ..Preserving::default() };
        preserving(&s, &Schedule::new(&s), &Request::steps(steps), rule).unwrap().times
    }

    #[test]
    fn a_flow_may_be_shifted_by_the_number_of_tokens() {
        for class in ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"] {
            let flow = |more: serde_json::Value| {
                let mut all = json!({"use_flow_sigmas": true, "prediction_type": "flow_prediction"});
                all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                scheduler(class, all)
            };
            let levels = |s: &Scheduler, tokens: Option<usize>| {
                let request = Request { tokens, ..Request::steps(5) };
                preserving(s, &Schedule::new(s), &request, Preserving::default()).map(|levels| levels.sigmas)
            };
            let dynamic = flow(json!({"use_dynamic_shifting": true}));
            let fixed = flow(json!({"flow_shift": 1.15f64.exp()}));
            assert_eq!(levels(&dynamic, Some(4096)).unwrap(), levels(&fixed, None).unwrap());
            assert!(levels(&dynamic, None).unwrap_err().to_string().contains("--tokens"));
        }
    }

    #[test]
    fn times_are_found_again_in_the_arithmetic_of_the_reference() {
        let linear = json!({});
        assert_eq!(times(json!({"use_exponential_sigmas": true}), &SD, 5), [998.0, 680.0, 233.0, 20.0, 0.0]);
        assert_eq!(times(json!({"use_exponential_sigmas": true}), &linear, 5), [999.0, 721.0, 302.0, 30.0, 0.0]);
        let karras = [999.0, 916.0, 815.0, 687.0, 523.0, 327.0, 146.0, 41.0, 7.0, 0.0];
        assert_eq!(times(json!({"use_karras_sigmas": true}), &SD, 10), karras);
        let cosine = json!({"beta_schedule": "squaredcos_cap_v2"});
        let karras = [998.0, 998.0, 998.0, 998.0, 997.0, 995.0, 983.0, 894.0, 259.0, 0.0];
        assert_eq!(times(json!({"use_karras_sigmas": true}), &cosine, 10), karras);
    }
}
