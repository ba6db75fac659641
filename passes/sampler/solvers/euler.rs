//! Euler steps in the noise level: Karras et al. 2022, arXiv:2206.00364. States grow with the noise.

use crate::sampler::{
    Error, Level, Prediction, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, Spacing, Steps, grid,
    scheduler::Fields,
};

/// Euler steps in the noise level.
pub(super) struct Euler;

impl Solver for Euler {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "euler",
            class: "EulerDiscreteScheduler",
            summary: "Euler steps in the noise level",
            source: "Karras et al. 2022, arXiv:2206.00364",
            fields: &["sigma_max", "sigma_min", "timestep_type"],
            sigmas: &[Sigmas::Karras, Sigmas::Exponential],
            fractions: true,
            finite_sigmas: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.sigma_min = fields.optional("sigma_min")?;
        scheduler.sigma_max = fields.optional("sigma_max")?;
        let continuous = fields.word("timestep_type", false, &[("discrete", false), ("continuous", true)])?;
        scheduler.continuous_time = continuous && scheduler.prediction == Prediction::Velocity;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok(rows(scheduler, &request.steps, &|_, next| (next, 0.0)))
    }
}

/// The estimate of the clean sample from a state that is not scaled down.
fn estimate(prediction: Prediction, sigma: f64) -> [f64; 2] {
    let square = sigma * sigma + 1.0;
    match prediction {
        Prediction::Epsilon | Prediction::Flow => [1.0, -sigma],
        Prediction::Velocity => [1.0 / square, -sigma / square.sqrt()],
        Prediction::Sample => [0.0, 1.0],
    }
}

/// The noise levels with the final one, and the timesteps.
fn levels(s: &Scheduler, schedule: &Schedule, steps: &Steps) -> (Vec<f64>, Vec<f64>) {
    let mut times = match steps {
        Steps::Count(count) => grid::euler(s, *count),
        Steps::Times(times) => times.clone(),
    };
    let mut sigmas: Vec<f64> = times.iter().map(|&t| schedule.sigma_at(t)).collect();
    let max = s.sigma_max.unwrap_or(sigmas[0]);
    let min = s.sigma_min.unwrap_or(sigmas[sigmas.len() - 1]);
    let spread = match s.sigmas {
        Sigmas::Karras => Some(grid::karras(max, min, times.len())),
        Sigmas::Exponential => Some(grid::exponential(max, min, times.len())),
        Sigmas::Plain | Sigmas::Flow => None,
    };
    if let Some(spread) = spread {
        times = spread.iter().map(|&sigma| schedule.time_of(sigma)).collect();
        sigmas = spread;
    }
    if s.continuous_time {
        times = sigmas.iter().map(|sigma| 0.25 * sigma.ln()).collect();
    }
    let last = if s.final_sigma_zero { 0.0 } else { schedule.sigma_at(0.0) };
    sigmas.push(last);
    (sigmas, times)
}

/// The rows and the scale of the first state. `split` says from a noise level and the next one down to which the step goes
/// and how much fresh noise follows.
pub(super) fn rows(s: &Scheduler, steps: &Steps, split: &dyn Fn(f64, f64) -> (f64, f64)) -> (Vec<Row>, f64) {
    let (sigmas, times) = levels(s, &Schedule::new(s), steps);
    let row = |(pair, time): (&[f64], f64)| {
        let (sigma, next) = (pair[0], pair[1]);
        let (down, up) = split(sigma, next);
        let level = Level { alpha: 1.0, noise: sigma };
        Row {
            input_scale: 1.0 / (sigma * sigma + 1.0).sqrt(),
            state: down / sigma,
            history: vec![1.0 - down / sigma],
            noise: up,
            ..level.row(time, estimate(s.prediction, sigma))
        }
    };
    let rows: Vec<Row> = sigmas.windows(2).zip(times).map(row).collect();
    let max = sigmas.iter().copied().fold(0.0, f64::max);
    let leading = s.spacing == Spacing::Leading;
    (rows, if leading { (max * max + 1.0).sqrt() } else { max })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, assert_rows, schedule, scheduler, table};
    use serde_json::json;

    fn sigmas(settings: serde_json::Value) -> Vec<f64> {
        let mut all = SD.clone();
        all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let s = scheduler("EulerDiscreteScheduler", all.clone());
        levels(&s, &schedule("EulerDiscreteScheduler", all), &Steps::Count(5)).0
    }

    #[test]
    fn noise_levels_are_the_golden_ones() {
        let linspace = [14.614_648_8, 4.086_090_4, 1.615_583_5, 0.695_150_9, 0.029_167_5, 0.0];
        assert_rows(&[sigmas(json!({}))], &[linspace]);
        let leading = [5.134_434_1, 2.292_855_0, 1.168_216_6, 0.574_050_8, 0.041_314_5, 0.0];
        assert_rows(&[sigmas(json!({"timestep_spacing": "leading", "steps_offset": 1}))], &[leading]);
        let karras = [14.614_648_8, 4.796_544_5, 1.274_105_5, 0.247_951_7, 0.029_167_5, 0.0];
        assert_rows(&[sigmas(json!({"use_karras_sigmas": true}))], &[karras]);
    }

    #[test]
    fn deterministic_ddim_is_the_same_map() {
        let trailing = json!({"timestep_spacing": "trailing", "clip_sample": false});
        let ddim = table("DDIMScheduler", trailing.clone(), 5).rows;
        let euler = table("EulerDiscreteScheduler", trailing, 5).rows;
        for (index, pair) in ddim.iter().zip(&euler).enumerate() {
            // States of Euler are those of DDIM over α.
            let scale = pair.1.input_scale;
            let next = euler.get(index + 1).map_or(1.0, |r| r.input_scale);
            let ((a, b, _), (c, d, _)) = (pair.0.affine(), pair.1.affine());
            assert!((a - c * next / scale).abs() < 1e-6 && (b - d * next).abs() < 1e-6);
        }
    }
}
