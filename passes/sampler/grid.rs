//! Which timesteps a sampler visits, noisy ones first. Every rounding is to even, as in the reference.

use super::{
    Error, Scheduler, Sigmas, Spacing, Steps, beta,
    schedule::{Schedule, linspace},
};

/// Checks that there are steps, that they go from noisy to clean, and that they lie in the schedule.
pub(super) fn check(steps: &Steps, s: &Scheduler) -> Result<(), Error> {
    let plan = |message: String| Err(Error::Plan(message));
    let last = s.num_train_timesteps as f64 - if s.solver.info().flow { 0.0 } else { 1.0 };
    if steps.count() == 0 || steps.count() > s.num_train_timesteps {
        return plan(format!("{} steps are asked for, expected 1 to {}", steps.count(), s.num_train_timesteps));
    }
    let Steps::Times(times) = steps else { return Ok(()) };
    if !s.solver.info().grids {
        return plan(format!("solver {} makes its own timesteps, and a grid is given", s.solver.name()));
    }
    if let Some(bad) = times.iter().find(|t| !(0.0..=last).contains(*t)) {
        return plan(format!("timestep {bad} of the grid lies outside the schedule, expected 0 to {last}"));
    }
    if let Some(pair) = times.windows(2).find(|pair| pair[0] <= pair[1]) {
        return plan(format!("timestep {} of the grid follows {}, expected a smaller one", pair[1], pair[0]));
    }
    if !s.solver.info().fractions && times.iter().any(|t| t.fract() != 0.0) {
        return plan("the grid has fractions, which only the Euler solvers can use".to_owned());
    }
    if s.sigmas != Sigmas::Plain || (s.flow && !s.solver.info().flow) {
        let message = "a grid of timesteps cannot be joined with Karras, exponential, beta or flow noise levels";
        return plan(message.to_owned());
    }
    Ok(())
}

/// Timesteps from the noisy end in strides of `total / count`.
fn trailing(from: f64, stride: f64) -> Vec<f64> {
    let times = (0..).map(|k| from - f64::from(k) * stride).take_while(|&t| t > 1e-9);
    times.map(|t| t.round_ties_even() - 1.0).collect()
}

/// `count` whole strides from the clean end, noisy ones first.
fn leading(count: usize, stride: usize, offset: i64) -> Vec<f64> {
    (0..count).rev().map(|k| (k * stride) as f64 + offset as f64).collect()
}

/// The timesteps of DDPM and DDIM.
pub(super) fn whole(s: &Scheduler, count: usize) -> Vec<f64> {
    let total = s.num_train_timesteps;
    let times = match s.spacing {
        Spacing::Linspace => {
            linspace(0.0, (total - 1) as f64, count).into_iter().rev().map(f64::round_ties_even).collect()
        }
        Spacing::Leading => leading(count, total / count, s.steps_offset),
        Spacing::Trailing => trailing(total as f64, total as f64 / count as f64),
    };
    clamped(times, total)
}

/// The timesteps of the Euler solvers, which need not be whole.
pub(super) fn euler(s: &Scheduler, count: usize) -> Vec<f64> {
    match s.spacing {
        Spacing::Linspace => {
            let times = linspace(0.0, (s.num_train_timesteps - 1) as f64, count);
            times.into_iter().rev().map(|t| f64::from(t as f32)).collect()
        }
        _ => whole(s, count),
    }
}

/// The timesteps of DPM-Solver++, which stop short of the noise that `lambda_min_clipped` excludes.
pub(super) fn dpm(s: &Scheduler, schedule: &Schedule, count: usize) -> Vec<f64> {
    let clipped = schedule.sigmas().iter().filter(|sigma| -sigma.ln() < s.lambda_min_clipped).count();
    let total = (s.num_train_timesteps - clipped).max(2);
    let times = match s.spacing {
        Spacing::Linspace => {
            let all = linspace(0.0, (total - 1) as f64, count + 1);
            all.into_iter().skip(1).rev().map(f64::round_ties_even).collect()
        }
        Spacing::Leading => {
            let mut all = leading(count + 1, total / (count + 1), s.steps_offset);
            all.pop();
            all
        }
        Spacing::Trailing => trailing(total as f64, s.num_train_timesteps as f64 / count as f64),
    };
    clamped(times, s.num_train_timesteps)
}

/// An offset may push the noisiest timestep beyond the schedule.
fn clamped(times: Vec<f64>, total: usize) -> Vec<f64> {
    times.into_iter().map(|t| t.clamp(0.0, (total - 1) as f64)).collect()
}

/// The timesteps of latent consistency models: some of those the model was distilled on.
pub(super) fn lcm(s: &Scheduler, count: usize) -> Result<Vec<f64>, Error> {
    let original = s.original_inference_steps;
    if count > original || original > s.num_train_timesteps {
        let most = original.min(s.num_train_timesteps);
        return Err(Error::Plan(format!("{count} steps are asked for, but the model was distilled on {most}")));
    }
    let stride = s.num_train_timesteps / original;
    let at = |k: usize| ((original - k * original / count) * stride) as f64 - 1.0;
    Ok((0..count).map(at).collect())
}

/// Noise levels between two, spread in a way that needs no more than these; `None` where timesteps say what they are.
pub(super) fn spread(way: Sigmas, max: f64, min: f64, count: usize) -> Option<Vec<f64>> {
    match way {
        Sigmas::Plain | Sigmas::LogLinear => None,
        Sigmas::Karras => Some(karras(max, min, count, 7.0)),
        // Lu's levels are even in the logarithm as well; only their timesteps are rounded in another way.
        Sigmas::Exponential | Sigmas::Lu => Some(exponential(max, min, count)),
        Sigmas::Beta => {
            let shares = linspace(1.0, 0.0, count).into_iter().map(beta::quantile);
            Some(shares.map(|share| min + share * (max - min)).collect())
        }
    }
}

/// Moves the last of a flow's noise levels to `terminal` and stretches the others with it.
pub(super) fn stretch(sigmas: &mut [f64], terminal: Option<f64>) -> Result<(), Error> {
    let Some(terminal) = terminal else { return Ok(()) };
    let scale = (1.0 - sigmas[sigmas.len() - 1]) / (1.0 - terminal);
    if scale <= 0.0 || !scale.is_finite() {
        let count = sigmas.len();
        return Err(Error::Plan(format!("`shift_terminal` = {terminal} cannot be reached in {count} steps")));
    }
    sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) / scale);
    Ok(())
}

/// Noise levels between two, as Karras et al. 2022 spread them.
pub(super) fn karras(max: f64, min: f64, count: usize, rho: f64) -> Vec<f64> {
    karras_at(max, min, &linspace(0.0, 1.0, count), rho)
}

/// Noise levels at these shares of the way.
pub(super) fn karras_at(max: f64, min: f64, shares: &[f64], rho: f64) -> Vec<f64> {
    let (high, low) = (max.powf(1.0 / rho), min.powf(1.0 / rho));
    shares.iter().map(|share| (high + share * (low - high)).powf(rho)).collect()
}

/// Noise levels between two, evenly in the logarithm.
pub(super) fn exponential(max: f64, min: f64, count: usize) -> Vec<f64> {
    linspace(max.ln(), min.ln(), count).into_iter().map(f64::exp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::scheduler;
    use serde_json::json;

    #[test]
    fn grids_are_the_golden_ones() {
        let leading = scheduler("DDIMScheduler", json!({"steps_offset": 1}));
        assert_eq!(whole(&leading, 5), [801.0, 601.0, 401.0, 201.0, 1.0]);
        let trailing = scheduler("DDIMScheduler", json!({"timestep_spacing": "trailing"}));
        assert_eq!(whole(&trailing, 5), [999.0, 799.0, 599.0, 399.0, 199.0]);
        assert_eq!(whole(&trailing, 7), [999.0, 856.0, 713.0, 570.0, 428.0, 285.0, 142.0]);
        // 812.5 rounds to even.
        assert_eq!(whole(&trailing, 16)[3], 811.0);
        let lcm_grid = scheduler("LCMScheduler", json!({}));
        assert_eq!(lcm(&lcm_grid, 1).unwrap(), [999.0]);
        assert_eq!(lcm(&lcm_grid, 2).unwrap(), [999.0, 499.0]);
        assert_eq!(lcm(&lcm_grid, 4).unwrap(), [999.0, 759.0, 499.0, 259.0]);
        assert_eq!(lcm(&lcm_grid, 8).unwrap(), [999.0, 879.0, 759.0, 639.0, 499.0, 379.0, 259.0, 139.0]);
        assert!(lcm(&lcm_grid, 51).is_err());
    }

    #[test]
    fn grids_of_dpm_have_one_more_point_than_steps() {
        let name = "DPMSolverMultistepScheduler";
        let of = |json| {
            let s = scheduler(name, json);
            dpm(&s, &Schedule::new(&s), 5)
        };
        assert_eq!(of(json!({})), [999.0, 799.0, 599.0, 400.0, 200.0]);
        assert_eq!(of(json!({"timestep_spacing": "leading"})), [830.0, 664.0, 498.0, 332.0, 166.0]);
        assert!(of(json!({"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}))[0] < 999.0);
    }

    #[test]
    fn a_grid_must_go_from_noisy_to_clean() {
        let ddim = scheduler("DDIMScheduler", json!({}));
        let refused = |times: &[f64]| check(&Steps::Times(times.to_vec()), &ddim).unwrap_err().to_string();
        assert!(refused(&[10.0, 20.0]).contains("follows"));
        assert!(refused(&[1000.0]).contains("outside"));
        assert!(refused(&[10.5]).contains("fractions"));
        assert!(check(&Steps::Count(0), &ddim).is_err());
    }
}
