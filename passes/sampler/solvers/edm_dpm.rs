//! The preconditioning of Karras et al. 2022, EDM, with the steps of Lu et al. 2022, DPM-Solver++, arXiv:2211.01095.

use super::{
    dpmpp::{self, Algorithm},
    edm_euler::{self, DEFAULTS},
};
use crate::sampler::{Error, Fields, Level, Request, Row, Scheduler, Solver, SolverInfo};

/// DPM-Solver++ on preconditioned outputs.
pub(super) struct EdmDpm;

impl Solver for EdmDpm {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "edm-dpm",
            class: "EDMDPMSolverMultistepScheduler",
            summary: "DPM-Solver++ in the noise level on preconditioned outputs",
            source: "Lu et al. 2022, arXiv:2211.01095",
            thresholding: true,
            ..edm_euler::USUAL
        };
        &INFO
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        const ALGORITHMS: [Algorithm; 3] =
            [("dpmsolver++", (false, false)), ("sde-dpmsolver++", (false, true)), ("deis", (false, false))];
        edm_euler::read(fields, scheduler, &DEFAULTS)?;
        dpmpp::read_algorithm(fields, scheduler, &ALGORITHMS)?;
        if scheduler.stochastic && scheduler.solver_order == 3 {
            return Err(fields.unsupported("algorithm_type", " of order 3"));
        }
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.euler_at_final = fields.flag("euler_at_final", false)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, request, &edm_euler::c_noise), edm_euler::first_scale(scheduler)))
    }
}

/// The rows, whose network is told what `told` makes of noise levels.
pub(super) fn rows(s: &Scheduler, request: &Request, told: &dyn Fn(f64) -> f64) -> Vec<Row> {
    let sigmas = edm_euler::sigmas(s, request.steps.count());
    let last = if s.final_sigma_zero { 0.0 } else { edm_euler::range(s)[0] };
    let level = |noise: f64| Level { alpha: 1.0, noise };
    let points: Vec<Level> = sigmas.iter().copied().chain([last]).map(level).collect();
    let row = |(index, &sigma): (usize, &f64)| dpmpp::step(s, &points, index, edm_euler::row(s, sigma, told(sigma)));
    sigmas.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, assert_six, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("EDMDPMSolverMultistepScheduler", json!({}), 5).rows;
        let found: Vec<[f64; 2]> =
            rows.iter().map(|r| [r.history[0], r.history.get(1).copied().unwrap_or(0.0)]).collect();
        let golden = [
            [0.780_902_1, 0.0],
            [1.404_123, -0.547_621_4],
            [1.579_928, -0.647_418_0],
            [1.802_247, -0.814_028_4],
            [1.0, 0.0],
        ];
        assert_rows(&found, &golden);
        let row = &table("EDMDPMSolverMultistepScheduler", json!({}), 10).rows[5];
        assert_six(&row.history, &[1.087_69, -0.400_644]);
        let exponential = json!({"sigma_schedule": "exponential"});
        let row = &table("EDMDPMSolverMultistepScheduler", exponential, 10).rows[5];
        assert_six(&row.history, &[1.037_88, -0.345_961]);
    }
}
