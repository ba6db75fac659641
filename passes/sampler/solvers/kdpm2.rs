//! Karras et al. 2022, arXiv:2206.00364, with the midpoint in the logarithm of the noise level as in Lu et al. 2022, DPM-Solver, arXiv:2206.00927.

use super::heun;
use crate::sampler::{
    Anchor, Error, Prediction, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, levels,
};

/// Midpoint steps in the noise level.
pub(super) struct Kdpm2;

impl Solver for Kdpm2 {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "kdpm2",
            class: "KDPM2DiscreteScheduler",
            summary: "midpoint steps in the noise level, two evaluations each",
            ..USUAL
        };
        &INFO
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok(rows(scheduler, request, &|sigma, next| Way { middle: (sigma * next).sqrt(), down: next, up: 0.0 }))
    }
}

/// What the solvers with a midpoint have in common.
pub(super) const USUAL: SolverInfo = SolverInfo {
    source: "Lu et al. 2022, arXiv:2206.00927",
    predictions: &[Prediction::Epsilon, Prediction::Velocity],
    betas: heun::BETAS,
    sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
    fractions: true,
    zero_snr: false,
    pairs: true,
    mixtures: false,
    ..SolverInfo::USUAL
};

/// The way of a step from one noise level to another: where the network is evaluated again, where it ends, and how much
/// noise follows.
pub(super) struct Way {
    pub middle: f64,
    pub down: f64,
    pub up: f64,
}

/// The rows of steps with a midpoint, and the scale of the first state.
pub(super) fn rows(s: &Scheduler, request: &Request, way: &dyn Fn(f64, f64) -> Way) -> (Vec<Row>, f64) {
    let schedule = Schedule::new(s);
    let (mut sigmas, mut times) = levels::growing(s, &schedule, &request.steps);
    sigmas.push(0.0);
    if s.sigmas == Sigmas::Karras {
        times.iter_mut().for_each(|time| *time = time.round_ties_even());
    }
    let mut rows = Vec::new();
    for (index, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let first = levels::derivative_row(s, sigma, times[index]);
        if next == 0.0 {
            rows.push(Row { history: vec![-sigma], ..first });
            continue;
        }
        let Way { middle, down, up } = way(sigma, next);
        rows.push(Row { history: vec![middle - sigma], ..first });
        let second = levels::derivative_row(s, middle, schedule.time_of(middle));
        let anchor = Some(Anchor { back: 1, factor: 1.0 });
        rows.push(Row { state: 0.0, anchor, history: vec![down - sigma], noise: up, ..second });
    }
    (rows, levels::growing_scale(s, &sigmas))
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{SD, assert_rows, assert_six, sd, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("KDPM2DiscreteScheduler", SD.clone(), 5).rows;
        assert_eq!(rows.len(), 9);
        let middles: Vec<f64> = rows[..8].iter().skip(1).step_by(2).map(|r| r.level.noise).collect();
        assert_rows(&[middles], &[[7.727_663_0, 2.569_323_0, 1.059_752_0, 0.142_393_3]]);
        for (row, time) in rows[..8].iter().skip(1).step_by(2).zip([885.2077, 632.2288, 371.3834, 21.2750]) {
            assert!((row.time - time).abs() < 1e-4, "{} {time}", row.time);
        }
        let rows = table("KDPM2DiscreteScheduler", sd(json!({"use_karras_sigmas": true})), 10).rows;
        assert_six(&[rows[10].time, rows[10].history[0]], &[327.0, -0.274_921]);
        assert_six(&[rows[11].time, rows[11].history[0]], &[227.72, -0.467_156]);
    }
}
