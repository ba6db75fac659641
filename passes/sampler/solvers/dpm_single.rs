//! Lu et al. 2022, DPM-Solver, arXiv:2206.00927: steps of order 2 and 3 that begin again from where their first row began.

use super::dpmpp::{self, Algorithm};
use crate::sampler::{
    Anchor, Error, Fields, Level, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, Spacing,
    exponential::{Worth, log_ratio},
    levels::{self, Preserving},
};

/// Single-step DPM-Solver, of order 1 to 3.
pub(super) struct DpmSingle;

impl Solver for DpmSingle {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "dpm-single",
            class: "DPMSolverSinglestepScheduler",
            summary: "DPM-Solver of order 1 to 3 in groups of steps that keep nothing between them",
            source: "Lu et al. 2022, arXiv:2206.00927",
            thresholding: true,
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            flow_sigmas: true,
            zero_snr: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        dpmpp::read_algorithm(fields, scheduler, &ALGORITHMS)?;
        scheduler.lower_order_final = fields.flag("lower_order_final", false)?;
        scheduler.lambda_min_clipped = fields.number("lambda_min_clipped", f64::NEG_INFINITY)?;
        // The class knows no other spacing.
        scheduler.spacing = Spacing::Linspace;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let levels = levels::preserving(scheduler, &Schedule::new(scheduler), request, Preserving::default())?;
        let points = levels.points(scheduler);
        let orders = orders(scheduler, levels.times.len());
        let row = |(index, &time): (usize, &f64)| step(scheduler, &points, index, orders[index], time);
        Ok((levels.times.iter().enumerate().map(row).collect(), 1.0))
    }
}

/// The algorithms; the last one is of another class.
const ALGORITHMS: [Algorithm; 4] = [
    ("dpmsolver++", (false, false)),
    ("sde-dpmsolver++", (false, true)),
    ("dpmsolver", (true, false)),
    ("deis", (false, false)),
];

/// The order of every step: groups that count up, and an end of lower order where it has to be, or is wanted.
fn orders(s: &Scheduler, steps: usize) -> Vec<usize> {
    let order = s.solver_order;
    let lower = s.lower_order_final || !steps.is_multiple_of(order) || s.final_sigma_zero;
    let mut orders: Vec<usize> = (0..steps).map(|step| step % order + 1).collect();
    if lower && order > 1 && steps.is_multiple_of(order) {
        orders[steps - 1] = 1;
    }
    if s.final_sigma_zero {
        orders[steps - 1] = 1;
    }
    orders
}

/// The row at `index`, whose step begins as many rows before as its order says.
fn step(s: &Scheduler, points: &[Level], index: usize, order: usize, time: f64) -> Row {
    let first = index + 1 - order;
    let worth = Worth::of(s, points[first], points[index + 1]);
    let share = |row: usize| (log_ratio(points[row]) - log_ratio(points[first])) / worth.length;
    let history = match order {
        1 => vec![worth.base],
        2 => {
            let difference = worth.second_order(s.heun) / share(index);
            vec![difference, worth.base - difference]
        }
        _ => third_order(s, &worth, share(index), share(index - 1)),
    };
    let anchor = (order > 1).then_some(Anchor { back: order - 1, factor: worth.state });
    let state = if anchor.is_some() { 0.0 } else { worth.state };
    Row { state, anchor, history, noise: worth.noise, ..dpmpp::row(s, points[index], time) }
}

/// The factors of the latest prediction, of the one before, and of that at the beginning; `late` and `middle` are where the
/// first two lie, as shares of the step.
fn third_order(s: &Scheduler, worth: &Worth, late: f64, middle: f64) -> Vec<f64> {
    // Differences from the beginning: of the one before the latest, and of the latest.
    let (before, latest) = ([0.0, 1.0 / middle, -1.0 / middle], [1.0 / late, 0.0, -1.0 / late]);
    let factor = |k: usize| {
        let (d1, d2) = match s.heun {
            false => (latest[k], 0.0),
            true => (
                (late * before[k] - middle * latest[k]) / (late - middle),
                2.0 * (latest[k] - before[k]) / (late - middle),
            ),
        };
        let base = if k == 2 { worth.base } else { 0.0 };
        base + worth.first * d1 + worth.second * d2
    };
    (0..3).map(factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, assert_rows, assert_six, scheduler, sd, table};
    use serde_json::json;

    fn shown(rows: &[Row]) -> Vec<[f64; 3]> {
        let state = |row: &Row| row.anchor.map_or(row.state, |anchor| anchor.factor);
        rows.iter().map(|r| [state(r), r.history[0], r.history.get(1).copied().unwrap_or(0.0)]).collect()
    }

    #[test]
    fn steps_are_the_golden_ones() {
        let golden = [
            [0.983_520_6, 0.125_720_0, 0.0],
            [0.917_699_4, 0.299_159_3, 0.040_378_6],
            [0.828_596_3, 0.318_274_8, 0.0],
            [0.542_067_5, 0.670_010_4, -0.019_867_3],
            [0.0, 1.0, 0.0],
        ];
        let rows = table("DPMSolverSinglestepScheduler", SD.clone(), 5).rows;
        assert_rows(&shown(&rows), &golden);
        assert_eq!(rows[3].anchor.map(|anchor| anchor.back), Some(1));
        let golden = [
            [0.981_240_1, 0.137_110_8, 0.0],
            [0.788_482_4, 0.617_081_9, -0.053_499_5],
            [0.305_938_1, 0.781_719_8, 0.0],
            [0.037_062_7, 1.126_890_0, -0.150_198_3],
            [0.0, 1.0, 0.0],
        ];
        let karras = sd(json!({"use_karras_sigmas": true}));
        for (found, golden) in shown(&table("DPMSolverSinglestepScheduler", karras.clone(), 5).rows).iter().zip(&golden)
        {
            assert_six(found, golden);
        }
        let rows = table("DPMSolverSinglestepScheduler", SD.clone(), 10).rows;
        assert_six(&shown(&rows)[5], &[0.828_596, 0.312_635, 0.005_640_15]);
        let rows = table("DPMSolverSinglestepScheduler", karras, 10).rows;
        assert_six(&shown(&rows)[5], &[0.469_982, 0.714_505, -0.034_768_4]);
    }

    #[test]
    fn the_end_is_of_lower_order_where_it_has_to_be() {
        let orders =
            |settings: serde_json::Value, steps| orders(&scheduler("DPMSolverSinglestepScheduler", settings), steps);
        assert_eq!(orders(json!({}), 4), [1, 2, 1, 1]);
        assert_eq!(orders(json!({}), 5), [1, 2, 1, 2, 1]);
        assert_eq!(orders(json!({"solver_order": 3}), 6), [1, 2, 3, 1, 2, 1]);
        assert_eq!(orders(json!({"solver_order": 3}), 7), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(orders(json!({"solver_order": 3}), 8), [1, 2, 3, 1, 2, 3, 1, 1]);
        assert_eq!(orders(json!({"solver_order": 3, "final_sigmas_type": "sigma_min"}), 8), [1, 2, 3, 1, 2, 3, 1, 2]);
        assert_eq!(orders(json!({"final_sigmas_type": "sigma_min"}), 4), [1, 2, 1, 2]);
    }
}
