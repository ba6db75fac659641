//! The sampler of Evans et al. 2024, Stable Audio Open, arXiv:2407.14358: stochastic DPM-Solver++ on preconditioned outputs,
//! with noise levels told as angles.

use super::{
    edm_dpm,
    edm_euler::{self, Defaults},
};
use crate::sampler::{Error, Fields, Prediction, Request, Row, Scheduler, Sigmas, Solver, SolverInfo};
use serde_json::Value;

/// Stochastic DPM-Solver++ on preconditioned outputs.
pub(super) struct CosineDpm;

impl Solver for CosineDpm {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "cosine-dpm",
            class: "CosineDPMSolverMultistepScheduler",
            summary: "stochastic DPM-Solver++ on preconditioned outputs, told angles",
            source: "Evans et al. 2024, arXiv:2407.14358",
            ..edm_euler::USUAL
        };
        &INFO
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        const DEFAULTS: Defaults = Defaults { range: [0.3, 500.0], data: 1.0, sigmas: Sigmas::Exponential };
        edm_euler::read(fields, scheduler, &DEFAULTS)?;
        if fields.get("prediction_type").is_none() && fields.flag("predict_epsilon", true)? {
            scheduler.prediction = Prediction::Velocity;
        }
        let rules = [("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)];
        scheduler.heun = fields.word("solver_type", false, &rules)?;
        scheduler.solver_order = fields.count("solver_order", 2)?;
        if scheduler.solver_order > 2 {
            return Err(Fields::wrong("solver_order", &Value::from(scheduler.solver_order), "1 or 2"));
        }
        scheduler.stochastic = true;
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.euler_at_final = fields.flag("euler_at_final", false)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let angle = |sigma: f64| std::f64::consts::FRAC_2_PI * sigma.atan();
        Ok((edm_dpm::rows(scheduler, request, &angle), edm_euler::first_scale(scheduler)))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::{
        Prediction,
        testing::{scheduler, table},
    };
    use serde_json::json;

    #[test]
    fn all_but_the_last_step_add_noise_and_are_told_an_angle() {
        let table = table("CosineDPMSolverMultistepScheduler", json!({}), 5);
        assert_eq!((table.rows.len(), table.noises()), (5, 4));
        assert!(table.rows.iter().all(|row| row.time > 0.0 && row.time < 1.0));
        assert!((table.rows[0].time - 0.998_727).abs() < 1e-6, "{}", table.rows[0].time);
        let s = scheduler("CosineDPMSolverMultistepScheduler", json!({}));
        assert_eq!(s.prediction, Prediction::Velocity);
    }
}
