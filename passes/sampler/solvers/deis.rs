//! Zhang and Chen 2023, Fast sampling of diffusion models with exponential integrator, arXiv:2204.13902: multistep steps on
//! estimates of the noise, as polynomials in the logarithm of noise over signal.

use super::dpmpp::{self, FEW};
use crate::sampler::{
    Error, Fields, Level, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo,
    exponential::log_ratio,
    levels::{self, Preserving},
    polynomials::{exponential_moments, weights},
};
use serde_json::Value;

/// DEIS, of order 1 to 3.
pub(super) struct Deis;

impl Solver for Deis {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "deis",
            class: "DEISMultistepScheduler",
            summary: "exponential multistep steps of order 1 to 3 on estimates of the noise",
            source: "Zhang and Chen 2023, arXiv:2204.13902",
            thresholding: true,
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            flow_sigmas: true,
            zero_snr: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        fields.word("algorithm_type", (), &[("deis", ()), ("dpmsolver", ()), ("dpmsolver++", ())])?;
        let types = [("logrho", ()), ("midpoint", ()), ("heun", ()), ("bh1", ()), ("bh2", ())];
        fields.word("solver_type", (), &types)?;
        scheduler.solver_order = fields.count("solver_order", 2)?;
        if scheduler.solver_order > 3 {
            return Err(Fields::wrong("solver_order", &Value::from(scheduler.solver_order as f64), "1, 2 or 3"));
        }
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.noise_form = true;
        // The class always ends on the lowest level, and has no field for it.
        scheduler.final_sigma_zero = false;
        dpmpp::read_flow(fields, scheduler)
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let rule = Preserving { repeats: true, ..Preserving::default() };
        let levels = levels::preserving(scheduler, &Schedule::new(scheduler), request, rule)?;
        let points = levels.points(scheduler);
        let row = |(index, &time): (usize, &f64)| step(scheduler, &points, index, time);
        Ok((levels.times.iter().enumerate().map(row).collect(), 1.0))
    }
}

fn step(s: &Scheduler, points: &[Level], index: usize, time: f64) -> Row {
    let (here, next, count) = (points[index], points[index + 1], points.len() - 1);
    let few = s.lower_order_final && count < FEW;
    let most = match count - index {
        1 if few => 1,
        2 if few => 2,
        _ => s.solver_order,
    };
    // The logarithm of noise over signal, from where the step ends.
    let from_end = |point: Level| log_ratio(next) - log_ratio(point);
    let nodes: Vec<f64> =
        (0..most.min(s.solver_order).min(index + 1)).map(|back| from_end(points[index - back])).collect();
    let moments = exponential_moments(1.0, -nodes[0], nodes.len());
    let history = weights(&nodes, &moments).iter().map(|weight| next.noise * weight).collect();
    Row { state: next.alpha / here.alpha, history, ..dpmpp::row(s, here, time) }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{SD, assert_rows, assert_six, sd, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("DEISMultistepScheduler", SD.clone(), 5).rows;
        let found: Vec<[f64; 3]> =
            rows.iter().map(|r| [r.state, r.history[0], r.history.get(1).copied().unwrap_or(0.0)]).collect();
        let golden = [
            [2.825_171, -1.837_354, 0.0],
            [2.085_371, -1.504_393, 0.373_731_2],
            [1.619_961, -0.993_048_8, 0.268_507_6],
            [1.332_499, -0.755_490_0, 0.240_912_8],
            [1.151_379, -0.542_268_2, 0.0],
        ];
        assert_rows(&found, &golden);
        let row = &table("DEISMultistepScheduler", SD.clone(), 10).rows[5];
        assert_six(&[row.state, row.history[0], row.history[1]], &[1.239_41, -0.430_527, 0.134_809]);
        let row = &table("DEISMultistepScheduler", sd(json!({"use_karras_sigmas": true})), 10).rows[5];
        assert_six(&[row.state, row.history[0], row.history[1]], &[1.236_91, -0.633_768, 0.207_269]);
    }

    #[test]
    fn a_last_step_to_its_own_level_is_left_out() {
        for way in ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"] {
            let table = table("DEISMultistepScheduler", sd(json!({way: true})), 10);
            assert_eq!((table.rows.len(), table.steps, table.notes.len()), (9, 10, 1));
        }
        assert_eq!(table("DEISMultistepScheduler", SD.clone(), 10).rows.len(), 10);
    }
}
