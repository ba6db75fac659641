//! Euler steps in the noise level: Karras et al. 2022, arXiv:2206.00364. States grow with the noise.

use crate::sampler::{
    Error, Fields, Prediction, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, Steps, grid, levels,
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
            fields: &["timestep_type"],
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            fractions: true,
            finite_sigmas: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.sigma_min = fields.optional("sigma_min")?;
        scheduler.sigma_max = fields.optional("sigma_max")?;
        let log_linear = fields.word("interpolation_type", false, &[("linear", false), ("log_linear", true)])?;
        if log_linear && scheduler.sigmas == Sigmas::Plain {
            scheduler.sigmas = Sigmas::LogLinear;
        }
        let continuous = fields.word("timestep_type", false, &[("discrete", false), ("continuous", true)])?;
        scheduler.continuous_time = continuous && scheduler.prediction == Prediction::Velocity;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok(rows(scheduler, &request.steps, &|_, next| (next, 0.0)))
    }
}

/// The noise levels with the final one, and the timesteps.
fn levels(s: &Scheduler, schedule: &Schedule, steps: &Steps) -> (Vec<f64>, Vec<f64>) {
    let (mut sigmas, mut times) = levels::growing(s, schedule, steps);
    if s.continuous_time {
        times = sigmas.iter().map(|sigma| 0.25 * sigma.ln()).collect();
    }
    if s.sigmas == Sigmas::LogLinear {
        // One more than there are timesteps, so the final one is the lowest of the schedule.
        let all = schedule.sigmas();
        return (grid::exponential(all[all.len() - 1], all[0], times.len() + 1), times);
    }
    sigmas.push(if s.final_sigma_zero { 0.0 } else { schedule.sigma_at(0.0) });
    (sigmas, times)
}

/// The rows and the scale of the first state. `split` says from a noise level and the next one down to which the step goes
/// and how much fresh noise follows.
pub(super) fn rows(s: &Scheduler, steps: &Steps, split: &dyn Fn(f64, f64) -> (f64, f64)) -> (Vec<Row>, f64) {
    let (sigmas, times) = levels(s, &Schedule::new(s), steps);
    let row = |(pair, time): (&[f64], f64)| {
        let (sigma, (down, up)) = (pair[0], split(pair[0], pair[1]));
        let history = vec![1.0 - down / sigma];
        Row { state: down / sigma, history, noise: up, ..levels::growing_row(s, sigma, time) }
    };
    let rows = sigmas.windows(2).zip(times).map(row).collect();
    (rows, levels::growing_scale(s, &sigmas))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{assert_rows, assert_six, schedule, scheduler, sd, table};
    use serde_json::json;

    fn sigmas(settings: serde_json::Value) -> Vec<f64> {
        let all = sd(settings);
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
        let beta = [14.614_646_9, 12.052_264_2, 7.321_907_0, 2.591_550_1, 0.029_167_5, 0.0];
        assert_rows(&[sigmas(json!({"use_beta_sigmas": true}))], &[beta]);
        let rows = table("EulerDiscreteScheduler", sd(json!({"use_beta_sigmas": true})), 5).rows;
        let times: Vec<f64> = rows.iter().map(|row| row.time).collect();
        assert_six(&times, &[999.0, 966.495, 874.662, 634.552, 0.0]);
        let log_linear = [14.614_646_9, 4.215_126_5, 1.215_718_0, 0.350_635_0, 0.101_129_4, 0.029_167_5];
        assert_rows(&[sigmas(json!({"interpolation_type": "log_linear"}))], &[log_linear]);
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
