//! Song et al. 2023, Consistency models, arXiv:2303.01469: estimates of the clean sample with fresh noise on top.

use super::edm_euler::{self, DEFAULTS};
use crate::sampler::{Clip, Error, Fields, Prediction, Request, Row, Scheduler, Solver, SolverInfo, grid};

/// Consistency models.
pub(super) struct Consistency;

impl Solver for Consistency {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "consistency",
            class: "CMStochasticIterativeScheduler",
            summary: "consistency models",
            source: "Song et al. 2023, arXiv:2303.01469",
            fields: &["clip_denoised", "s_noise"],
            train: 40,
            predictions: &[],
            ..edm_euler::USUAL
        };
        &INFO
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        edm_euler::read(fields, scheduler, &DEFAULTS)?;
        scheduler.s_noise = fields.number("s_noise", 1.0)?;
        scheduler.clip = if fields.flag("clip_denoised", true)? { Clip::Clamp(1.0) } else { Clip::None };
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let (s, count) = (scheduler, request.steps.count());
        let ([min, max], data) = (edm_euler::range(s), s.sigma_data);
        // Some of the levels that the model was trained on, told as integers are of other models.
        let (stride, all) = (s.num_train_timesteps / count, s.num_train_timesteps - 1);
        let shares: Vec<f64> = (0..count).map(|step| (step * stride) as f64 / all as f64).collect();
        let sigmas = grid::karras_at(max, min, &shares, s.rho);
        let row = |(index, &sigma): (usize, &f64)| {
            let base = edm_euler::row(s, sigma, 250.0 * sigma.ln());
            let above = sigma - min;
            // At the lowest level the estimate is the state itself.
            let skip = data * data / (above * above + data * data);
            let out = above * data / (sigma * sigma + data * data).sqrt();
            let estimate = if s.prediction == Prediction::Sample { base.estimate } else { [skip, out] };
            let next = sigmas.get(index + 1).map_or(min, |next| next.clamp(min, max));
            let noise = s.s_noise * (next * next - min * min).max(0.0).sqrt();
            Row { estimate, state: 0.0, history: vec![1.0], noise, ..base }
        };
        Ok((sigmas.iter().enumerate().map(row).collect(), max))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, assert_six, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let of = |steps| table("CMStochasticIterativeScheduler", json!({}), steps);
        let table = of(5);
        let noises: Vec<f64> = table.rows.iter().map(|row| row.noise).collect();
        assert_rows(&[noises], &[[23.610_09, 5.380_004, 0.822_938_9, 0.062_730_5, 0.0]]);
        let times: Vec<f64> = table.rows.iter().map(|row| row.time).collect();
        assert_rows(&[times], &[[1095.507, 790.4186, 420.6723, -48.7176, -692.0998]]);
        assert_eq!(table.initial_scale, 80.0);
        let rows = of(10).rows;
        assert_six(&[rows[5].time, rows[5].noise], &[201.668, 0.822_939]);
        assert_eq!(of(1).noises(), 0);
    }
}
