//! Lu et al. 2022, DPM-Solver++, arXiv:2211.01095: multistep solvers on estimates of the clean sample.

use super::flow_euler;
use crate::sampler::{
    Error, Fields, Level, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo,
    exponential::{Worth, log_ratio},
    levels::{self, Levels, Preserving},
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
            thresholding: true,
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta, Sigmas::Lu],
            flow_sigmas: true,
            finite_sigmas: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        read_algorithm(fields, scheduler, &ALGORITHMS)?;
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.euler_at_final = fields.flag("euler_at_final", false)?;
        scheduler.lambda_min_clipped = fields.number("lambda_min_clipped", f64::NEG_INFINITY)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, &Schedule::new(scheduler), request)?, 1.0))
    }
}

/// An algorithm by name: whether it is made of estimates of the noise, and whether it is stochastic.
pub(super) type Algorithm = (&'static str, (bool, bool));

/// The algorithms; the last one is of another class.
const ALGORITHMS: [Algorithm; 5] = [
    ("dpmsolver++", (false, false)),
    ("sde-dpmsolver++", (false, true)),
    ("dpmsolver", (true, false)),
    ("sde-dpmsolver", (true, true)),
    ("deis", (false, false)),
];

/// The rules for steps of second order: whether that is Heun's. The last ones are of other classes.
const RULES: [(&str, bool); 5] =
    [("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)];

/// Reads the algorithm, its order and its rule, and a flow's shift.
pub(super) fn read_algorithm(f: &Fields, s: &mut Scheduler, algorithms: &[Algorithm]) -> Result<(), Error> {
    (s.noise_form, s.stochastic) = f.word("algorithm_type", (false, false), algorithms)?;
    s.solver_order = f.count("solver_order", 2)?;
    if s.solver_order > 3 {
        return Err(Fields::wrong("solver_order", &Value::from(s.solver_order as f64), "1, 2 or 3"));
    }
    s.heun = f.word("solver_type", false, &RULES)?;
    if s.noise_form && s.final_sigma_zero {
        return Err(f.unsupported("algorithm_type", " with `final_sigmas_type` = `zero`, where its steps are infinite"));
    }
    if s.noise_form && s.stochastic && s.solver_order == 3 {
        return Err(f.unsupported("algorithm_type", " of order 3"));
    }
    if s.stochastic && s.solver_order == 3 {
        let note =
            "steps of order 3 of sde-dpmsolver++ have the sign that makes them of that order; diffusers has another";
        s.notes.push(note.to_owned());
    }
    read_flow(f, s)
}

/// Reads the shift of a flow's noise levels, where the levels are those of a flow.
pub(super) fn read_flow(f: &Fields, s: &mut Scheduler) -> Result<(), Error> {
    s.shift = f.number("flow_shift", 1.0)?;
    if !s.flow {
        return Ok(());
    }
    s.dynamic_shift = flow_euler::dynamic_shift(f)?;
    if s.sigmas != Sigmas::Plain {
        return Err(f.unsupported("use_flow_sigmas", " beside noise levels that are spread in another way"));
    }
    Ok(())
}

/// Steps below which the last ones are of lower order.
pub(super) const FEW: usize = 15;

/// The order of step `index` of `count`, when enough steps were made before it.
pub(super) fn order(s: &Scheduler, index: usize, count: usize) -> usize {
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

/// What step `index` of a multistep solver changes of a row: `points` are the levels of the steps and the final one.
pub(super) fn step(s: &Scheduler, points: &[Level], index: usize, row: Row) -> Row {
    let worth = Worth::of(s, points[index], points[index + 1]);
    let gap = |back: usize| log_ratio(points[index + 1 - back]) - log_ratio(points[index - back]);
    let mut history = vec![worth.base];
    match order(s, index, points.len() - 1) {
        1 => {}
        2 => {
            let (ratio, difference) = (gap(1) / worth.length, worth.second_order(s.heun));
            history = vec![worth.base + difference / ratio, -difference / ratio];
        }
        _ => {
            let (r0, r1) = (gap(1) / worth.length, gap(2) / worth.length);
            // D1 = D1₀ + r0/(r0 + r1)·(D1₀ − D1₁) and D2 = (D1₀ − D1₁)/(r0 + r1), of the predictions d0, d1, d2.
            let differences = [[1.0 / r0, -1.0 / r0, 0.0], [0.0, 1.0 / r1, -1.0 / r1]];
            history.extend([0.0, 0.0]);
            for (k, factor) in history.iter_mut().enumerate() {
                let change = differences[0][k] - differences[1][k];
                let d1 = differences[0][k] + r0 / (r0 + r1) * change;
                *factor += worth.first * d1 + worth.second * change / (r0 + r1);
            }
        }
    }
    Row { state: worth.state, history, noise: worth.noise, ..row }
}

/// A row at a level that keeps the estimate of the clean sample, or of the noise where that is what steps are made of.
pub(super) fn row(s: &Scheduler, level: Level, time: f64) -> Row {
    let row = level.row(time, level.estimate(s.prediction));
    if s.noise_form { Row { kept: level.noise_of_estimate(), ..row } } else { row }
}

fn levels(s: &Scheduler, schedule: &Schedule, request: &Request) -> Result<Levels, Error> {
    levels::preserving(s, schedule, request, Preserving { truncates_cosine: true, ..Preserving::default() })
}

fn rows(s: &Scheduler, schedule: &Schedule, request: &Request) -> Result<Vec<Row>, Error> {
    let levels = levels(s, schedule, request)?;
    let points = levels.points(s);
    let at = |(index, &time): (usize, &f64)| step(s, &points, index, row(s, points[index], time));
    Ok(levels.times.iter().enumerate().map(at).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, assert_rows, assert_six, scheduler, sd, table};
    use serde_json::json;

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
        let row = &table("DPMSolverMultistepScheduler", SD.clone(), 10).rows[5];
        assert_six(
            &[row.time, row.state, row.history[0], row.history[1]],
            &[500.0, 0.891_784, 0.270_866, -0.088_129_9],
        );
        let karras = sd(json!({"use_karras_sigmas": true}));
        let row = &table("DPMSolverMultistepScheduler", karras, 10).rows[5];
        assert_six(&[row.time, row.state, row.history[0], row.history[1]], &[327.0, 0.604_765, 0.723_752, -0.257_161]);
    }

    #[test]
    fn first_order_is_ddim() {
        let settings = json!({"solver_order": 1, "timestep_spacing": "trailing"});
        let first = table("DPMSolverMultistepScheduler", sd(settings), 5).rows;
        let ddim = table("DDIMScheduler", sd(json!({"timestep_spacing": "trailing", "clip_sample": false})), 5).rows;
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
                    let s = scheduler("DPMSolverMultistepScheduler", sd(settings));
                    let schedule = Schedule::new(&s);
                    let request = Request::steps(20);
                    let sigmas = levels(&s, &schedule, &request).unwrap().sigmas;
                    for (row, pair) in rows(&s, &schedule, &request).unwrap().iter().zip(sigmas.windows(2)) {
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
