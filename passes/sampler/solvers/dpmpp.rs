//! Lu et al. 2022, DPM-Solver++, arXiv:2211.01095: multistep solvers on estimates of the clean sample.

use crate::sampler::{
    BetaSchedule, Error, Level, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, Steps, grid,
    schedule::linspace, scheduler::Fields,
};
use serde_json::Value;

/// DPM-Solver++, of order 1 to 3.
pub(super) struct DpmPp;

impl Solver for DpmPp {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "dpmpp",
            class: "DPMSolverMultistepScheduler",
            summary: "DPM-Solver++ of order 1 to 3, deterministic or stochastic",
            source: "Lu et al. 2022, arXiv:2211.01095",
            fields: &[
                "algorithm_type",
                "euler_at_final",
                "flow_shift",
                "lambda_min_clipped",
                "lower_order_final",
                "solver_order",
                "solver_type",
                "use_flow_sigmas",
            ],
            thresholding: true,
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Flow],
            finite_sigmas: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        let algorithms = [("dpmsolver++", false), ("sde-dpmsolver++", true)];
        scheduler.stochastic = fields.word("algorithm_type", false, &algorithms)?;
        scheduler.solver_order = fields.count("solver_order", 2)?;
        if scheduler.solver_order > 3 {
            return Err(Fields::wrong("solver_order", &Value::from(scheduler.solver_order as f64), "1, 2 or 3"));
        }
        // Other names fall back to the midpoint rule in the reference as well.
        scheduler.heun = fields.get("solver_type").and_then(Value::as_str) == Some("heun");
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.euler_at_final = fields.flag("euler_at_final", false)?;
        scheduler.lambda_min_clipped = fields.number("lambda_min_clipped", f64::NEG_INFINITY)?;
        scheduler.shift = fields.number("flow_shift", 1.0)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, &Schedule::new(scheduler), request), 1.0))
    }
}

/// Steps below which the last ones are of lower order.
const FEW: usize = 15;

/// The noise levels with the final one, and the timesteps.
fn levels(s: &Scheduler, schedule: &Schedule, steps: &Steps) -> (Vec<f64>, Vec<f64>) {
    let count = steps.count();
    let all = schedule.sigmas();
    let (max, min) = (all[all.len() - 1], all[0]);
    let found = |sigmas: Vec<f64>, round: bool| {
        let time = |&sigma: &f64| {
            let time = schedule.time_of(sigma);
            if round { time.round_ties_even() } else { time.trunc() }
        };
        let times = sigmas.iter().map(time).collect();
        (sigmas, times)
    };
    let (mut sigmas, times): (Vec<f64>, Vec<f64>) = match (s.sigmas, steps) {
        (Sigmas::Karras, _) => {
            let cosine = s.beta_schedule == BetaSchedule::SquaredCosine;
            found(grid::karras(max, min, count), !cosine)
        }
        (Sigmas::Exponential, _) => found(grid::exponential(max, min, count), false),
        (Sigmas::Flow, _) => {
            let total = s.num_train_timesteps as f64;
            let even = linspace(1.0 - 1.0 / total, 0.0, count + 1);
            let shifted = even.iter().take(count).map(|&x| s.shift * x / (1.0 + (s.shift - 1.0) * x));
            let sigmas: Vec<f64> = shifted.collect();
            let times = sigmas.iter().map(|x| (x * total).trunc()).collect();
            (sigmas, times)
        }
        (Sigmas::Plain, Steps::Count(count)) => {
            let times = grid::dpm(s, schedule, *count);
            (times.iter().map(|&t| schedule.sigma_at(t)).collect(), times)
        }
        (Sigmas::Plain, Steps::Times(times)) => (times.iter().map(|&t| schedule.sigma_at(t)).collect(), times.clone()),
    };
    sigmas.push(if s.final_sigma_zero { 0.0 } else { min });
    (sigmas, times)
}

/// The order of step `index` of `count`, when enough steps were made before it.
fn order(s: &Scheduler, index: usize, count: usize) -> usize {
    let few = s.lower_order_final && count < FEW;
    let last = index + 1 == count && (s.euler_at_final || few || s.final_sigma_zero);
    let second = index + 2 == count && few;
    match s.solver_order {
        _ if last || index == 0 => 1,
        1 => 1,
        2 => 2,
        _ if index == 1 || second => 2,
        _ => 3,
    }
}

fn rows(s: &Scheduler, schedule: &Schedule, request: &Request) -> Vec<Row> {
    let (sigmas, times) = levels(s, schedule, &request.steps);
    let level = |sigma: f64| match s.sigmas {
        Sigmas::Flow => Level { alpha: 1.0 - sigma, noise: sigma },
        _ => Level::of_sigma(sigma),
    };
    let lambda = |index: usize| {
        let Level { alpha, noise } = level(sigmas[index]);
        alpha.ln() - noise.ln()
    };
    let row = |index: usize| {
        let (here, next) = (level(sigmas[index]), level(sigmas[index + 1]));
        // Infinite where the last level is free of noise; everything below is finite then.
        let h = lambda(index + 1) - lambda(index);
        let orders = order(s, index, times.len());
        let gap = |back: usize| lambda(index + 1 - back) - lambda(index - back);
        let (decay, pull) = if s.stochastic { ((-h).exp(), 1.0 - (-2.0 * h).exp()) } else { (1.0, 1.0 - (-h).exp()) };
        // What the first and the second divided difference of the estimates are worth. Both vanish with h; the reference
        // has another sign in the second of its stochastic solver, which keeps that from third order.
        let h = if s.stochastic { 2.0 * h } else { h };
        let (first, second) = (1.0 - pull / h, pull / (h * h) - 1.0 / h + 0.5);
        let mut estimates = vec![pull];
        match orders {
            1 => {}
            2 => {
                let worth = if s.heun { first } else { 0.5 * pull };
                let ratio = gap(1) / gap(0);
                estimates = vec![pull + worth / ratio, -worth / ratio];
            }
            _ => {
                let (r0, r1) = (gap(1) / gap(0), gap(2) / gap(0));
                // D1 = D1₀ + r0/(r0 + r1)·(D1₀ − D1₁) and D2 = (D1₀ − D1₁)/(r0 + r1), of the estimates d0, d1, d2.
                let differences = [[1.0 / r0, -1.0 / r0, 0.0], [0.0, 1.0 / r1, -1.0 / r1]];
                estimates.extend([0.0, 0.0]);
                for (k, factor) in estimates.iter_mut().enumerate() {
                    let change = differences[0][k] - differences[1][k];
                    let d1 = differences[0][k] + r0 / (r0 + r1) * change;
                    *factor += first * d1 + second * change / (r0 + r1);
                }
            }
        }
        Row {
            state: next.noise / here.noise * decay,
            history: estimates.iter().map(|b| next.alpha * b).collect(),
            noise: if s.stochastic { next.noise * pull.sqrt() } else { 0.0 },
            ..here.row(times[index], here.estimate(s.prediction))
        }
    };
    (0..times.len()).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, assert_rows, scheduler, table};
    use serde_json::json;

    fn with(settings: serde_json::Value) -> serde_json::Value {
        let mut all = SD.clone();
        all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        all
    }

    #[test]
    fn second_order_steps_are_the_golden_ones() {
        let rows = table("DPMSolverMultistepScheduler", SD.clone(), 5).rows;
        let found: Vec<[f64; 3]> =
            rows.iter().map(|r| [r.state, r.history[0], r.history.get(1).copied().unwrap_or(0.0)]).collect();
        let golden = [
            [0.983_520_6, 0.125_720_0, 0.0],
            [0.933_075_9, 0.306_919_0, -0.084_687_5],
            [0.828_596_3, 0.450_937_8, -0.132_663_0],
            [0.654_199_7, 0.676_396_4, -0.234_468_5],
            [0.0, 1.0, 0.0],
        ];
        assert_rows(&found, &golden);
    }

    #[test]
    fn first_order_is_ddim() {
        let settings = json!({"solver_order": 1, "timestep_spacing": "trailing"});
        let first = table("DPMSolverMultistepScheduler", with(settings), 5).rows;
        let ddim = table("DDIMScheduler", with(json!({"timestep_spacing": "trailing", "clip_sample": false})), 5).rows;
        let maps = |rows: &[Row]| rows.iter().map(|r| [r.affine().0, r.affine().1]).collect::<Vec<_>>();
        for (a, b) in maps(&first).iter().zip(&maps(&ddim)) {
            assert!((a[0] - b[0]).abs() < 1e-6 && (a[1] - b[1]).abs() < 1e-6, "{a:?} {b:?}");
        }
    }

    #[test]
    fn constant_estimates_are_kept_whatever_the_order() {
        for order in [1, 2, 3] {
            for kind in ["midpoint", "heun"] {
                for algorithm in ["dpmsolver++", "sde-dpmsolver++"] {
                    let settings = json!({"solver_order": order, "solver_type": kind, "algorithm_type": algorithm});
                    let s = scheduler("DPMSolverMultistepScheduler", with(settings));
                    let schedule = Schedule::new(&s);
                    let request = Request::steps(20);
                    let sigmas = levels(&s, &schedule, &request.steps).0;
                    for (row, pair) in rows(&s, &schedule, &request).iter().zip(sigmas.windows(2)) {
                        // With x = α·D + s·ε and every estimate D, the next state is α'·D plus noise.
                        let (here, next) = (Level::of_sigma(pair[0]), Level::of_sigma(pair[1]));
                        let kept = row.state * here.alpha + row.history.iter().sum::<f64>();
                        assert!((kept - next.alpha).abs() < 1e-9, "{kept} {}", next.alpha);
                        let left = (row.state * here.noise).powi(2) + row.noise.powi(2);
                        assert!((left - next.noise.powi(2)).abs() < 1e-9, "{left}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_order_drops_at_both_ends() {
        let s = scheduler("DPMSolverMultistepScheduler", json!({"solver_order": 3}));
        let orders = |count: usize| (0..count).map(|k| order(&s, k, count)).collect::<Vec<_>>();
        assert_eq!(orders(6), [1, 2, 3, 3, 2, 1]);
        assert_eq!(orders(16)[13..], [3, 3, 1]);
        let s = scheduler(
            "DPMSolverMultistepScheduler",
            json!({"lower_order_final": false, "final_sigmas_type": "sigma_min"}),
        );
        assert_eq!((0..3).map(|k| order(&s, k, 3)).collect::<Vec<_>>(), [1, 2, 2]);
    }
}
