//! Zheng et al. 2024, Trajectory consistency distillation, arXiv:2402.19159.

use crate::sampler::{
    BetaSchedule, Error, Fields, Level, Request, Row, Schedule, Scheduler, Solver, SolverInfo, Spacing, Steps, grid,
};

/// Trajectory consistency models.
pub(super) struct Tcd;

/// How stochastic steps are where nobody says: the paper's γ.
const ETA: f64 = 0.3;

impl Solver for Tcd {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "tcd",
            class: "TCDScheduler",
            summary: "trajectory consistency models, more or less random by `--eta`",
            source: "Zheng et al. 2024, arXiv:2402.19159",
            fields: &["original_inference_steps", "timestep_scaling"],
            spacing: Spacing::Leading,
            betas: (0.000_85, 0.012, BetaSchedule::ScaledLinear),
            eta: Some(ETA),
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.original_inference_steps = fields.count("original_inference_steps", 50)?;
        for field in ["clip_sample", "thresholding"] {
            if fields.flag(field, false)? {
                scheduler.notes.push(format!("`{field}` = true means nothing to solver tcd"));
            }
        }
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let (schedule, eta) = (Schedule::new(scheduler), request.eta.unwrap_or(ETA));
        let times = match &request.steps {
            Steps::Count(count) => grid::lcm(scheduler, *count)?,
            Steps::Times(times) => times.clone(),
        };
        let row = |(index, &time): (usize, &f64)| {
            let next = times.get(index + 1).copied();
            // In float32, as in the reference, where some products lie just below a whole number.
            let between = ((1.0 - eta) as f32 * next.unwrap_or(0.0) as f32).floor();
            let bar = |time: f64| schedule.alpha(time as usize);
            let (here, between) = (Level::of_alpha(bar(time)), bar(f64::from(between)));
            let target = Level::of_alpha(between);
            let left = next.filter(|_| eta > 0.0).map_or(1.0, |next| bar(next) / between);
            let [e, f] = here.epsilon(scheduler.prediction);
            let factor = left.sqrt();
            Row {
                state: factor * target.noise * e,
                output: factor * target.noise * f,
                history: vec![factor * target.alpha],
                noise: (1.0 - left).max(0.0).sqrt(),
                ..here.row(time, here.estimate(scheduler.prediction))
            }
        };
        Ok((times.iter().enumerate().map(row).collect(), 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{
        Table,
        testing::{assert_rows, assert_six, scheduler, table},
    };
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("TCDScheduler", json!({}), 5).rows;
        let found: Vec<[f64; 3]> = rows.iter().map(as_estimate).collect();
        let golden = [
            [0.382_240_1, 0.166_766_4, 0.904_089_8],
            [0.507_913_0, 0.304_228_4, 0.768_028_3],
            [0.551_394_4, 0.430_990_4, 0.564_851_0],
            [0.494_794_8, 0.546_065_7, 0.322_885_8],
            [0.058_930_9, 0.948_361_3, 0.0],
        ];
        assert_rows(&found, &golden);
        assert_six(&as_estimate(&table("TCDScheduler", json!({}), 10).rows[5]), &[0.593_992, 0.339_753, 0.564_851]);
    }

    /// A row of predicted noise as factors of the state and of the estimate.
    fn as_estimate(row: &Row) -> [f64; 3] {
        let (level, own) = (row.level, row.history[0]);
        // ε = (x − α·y)/s.
        [row.output / level.noise, own - row.output * level.alpha / level.noise, row.noise]
    }

    #[test]
    fn without_randomness_steps_end_at_the_next_timestep() {
        let s = scheduler("TCDScheduler", json!({}));
        let request = Request { eta: Some(0.0), ..Request::steps(4) };
        let table = Table::new(&s, &request).unwrap();
        assert_eq!(table.noises(), 0);
        let next = table.rows[1].level;
        assert!(
            (table.rows[0].history[0] - next.alpha).abs() < 1e-9 && (table.rows[0].output - next.noise).abs() < 1e-9
        );
    }
}
