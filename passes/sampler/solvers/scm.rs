//! Chen et al. 2025, SANA-Sprint, arXiv:2503.09641: consistency steps along a circle of signal and noise.

use crate::sampler::{
    Error, Fields, Level, Prediction, Request, Row, Scheduler, Solver, SolverInfo, schedule::linspace,
};

/// Continuous consistency models in trigonometric form.
pub(super) struct Scm;

/// The angle that sampling begins with, a right one to four digits as in the reference, and that of the second of two steps.
const ANGLES: [f64; 2] = [15_708.0 / 10_000.0, 1.3];

impl Solver for Scm {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "scm",
            class: "SCMScheduler",
            summary: "consistency models in trigonometric form",
            source: "Chen et al. 2025, arXiv:2503.09641",
            fields: &["sigma_data"],
            predictions: &[],
            fractions: true,
            zero_snr: false,
            grids: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        fields.word("prediction_type", (), &[("trigflow", ())])?;
        scheduler.sigma_data = fields.positive("sigma_data", 0.5)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let [first, second] = ANGLES;
        let angles = match request.steps.count() {
            2 => vec![first, second, 0.0],
            count => linspace(first, 0.0, count + 1),
        };
        let row = |pair: &[f64]| {
            let level = Level { alpha: pair[0].cos(), noise: pair[0].sin() };
            let (noise, estimate) = (scheduler.sigma_data * pair[1].sin(), level.estimate(Prediction::Velocity));
            Row { state: 0.0, history: vec![pair[1].cos()], noise, ..level.row(pair[0], estimate) }
        };
        Ok((angles.windows(2).map(row).collect(), 1.0))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::table;
    use serde_json::json;

    #[test]
    fn two_steps_have_an_angle_of_their_own() {
        let times = |steps| table("SCMScheduler", json!({}), steps).rows.iter().map(|row| row.time).collect::<Vec<_>>();
        assert_eq!(times(2), super::ANGLES);
        assert_eq!(times(4).len(), 4);
        let table = table("SCMScheduler", json!({"sigma_data": 1.0}), 2);
        assert!((table.rows[0].noise - 1.3f64.sin()).abs() < 1e-12 && table.noises() == 1);
    }
}
