//! Lu et al. 2022, DPM-Solver, arXiv:2206.00927, on the stochastic equation: a midpoint, and noise at both evaluations.

use super::{euler_ancestral::split, kdpm2};
use crate::sampler::{Anchor, Error, Request, Row, Schedule, Scheduler, Solver, SolverInfo, levels};

/// Stochastic midpoint steps.
pub(super) struct DpmSde;

impl Solver for DpmSde {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "dpm-sde",
            class: "DPMSolverSDEScheduler",
            summary: "stochastic midpoint steps in the noise level, two evaluations each",
            fields: &["noise_sampler_seed"],
            ..kdpm2::USUAL
        };
        &INFO
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let schedule = Schedule::new(scheduler);
        let (mut sigmas, times) = levels::growing(scheduler, &schedule, &request.steps);
        sigmas.push(0.0);
        let mut rows = Vec::new();
        for (pair, &time) in sigmas.windows(2).zip(&times) {
            let (sigma, next) = (pair[0], pair[1]);
            let first = levels::growing_row(scheduler, sigma, time);
            if next == 0.0 {
                rows.push(Row { state: 0.0, history: vec![1.0], ..first });
                continue;
            }
            let middle = (sigma * next).sqrt();
            let (down, up) = split(sigma, middle);
            rows.push(Row { state: down / sigma, history: vec![1.0 - down / sigma], noise: up, ..first });
            // Both noises are of one Brownian path, so the second shares what the path did up to the middle.
            let shared = (sigma - middle) / (sigma - next);
            let (down, up) = split(sigma, next);
            rows.push(Row {
                state: 0.0,
                anchor: Some(Anchor { back: 1, factor: down / sigma }),
                history: vec![1.0 - down / sigma],
                noise: (1.0 - shared).sqrt() * up,
                noise_before: shared.sqrt() * up,
                ..levels::growing_row(scheduler, middle, schedule.time_of(middle))
            });
        }
        Ok((rows, levels::growing_scale(scheduler, &sigmas)))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::{
        Row,
        testing::{SD, assert_rows, assert_six, sd, table},
    };
    use serde_json::json;

    fn state(row: &Row) -> f64 {
        row.anchor.map_or(row.state, |anchor| anchor.factor)
    }

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("DPMSolverSDEScheduler", SD.clone(), 5).rows;
        let found: Vec<[f64; 2]> = rows[..8].chunks(2).map(|pair| [state(&pair[0]), state(&pair[1])]).collect();
        let golden = [
            [0.279_588_7, 0.078_169_8],
            [0.395_386_1, 0.156_330_2],
            [0.430_278_6, 0.185_139_7],
            [0.041_958_6, 0.001_760_5],
        ];
        assert_rows(&found, &golden);
        let rows = table("DPMSolverSDEScheduler", SD.clone(), 10).rows;
        let noise = |row: &Row| row.noise.hypot(row.noise_before);
        assert_six(&[state(&rows[10]), rows[10].history[0], noise(&rows[10])], &[0.693_24, 0.306_76, 0.620_212]);
        let second = [rows[11].time, state(&rows[11]), rows[11].history[0], noise(&rows[11])];
        assert_six(&second, &[388.107, 0.480_582, 0.519_418, 0.671_957]);
        let rows = table("DPMSolverSDEScheduler", sd(json!({"use_karras_sigmas": true})), 10).rows;
        assert_six(&[state(&rows[11]), noise(&rows[11])], &[0.239_054, 0.389_859]);
    }
}
