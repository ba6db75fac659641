//! Xue et al. 2023, SA-Solver, arXiv:2309.05019: stochastic Adams steps with a corrector.
//!
//! As in `unipc`, the corrected state has the same factors of the state before and of its noise as the predicted one.

use super::dpmpp;
use crate::sampler::{
    Corrector, Error, Fields, Level, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo,
    levels::{self, Preserving},
    polynomials::{exponential_moments, weights},
};
use serde_json::Value;

/// Stochastic Adams steps, of order 1 to 4.
pub(super) struct Sa;

impl Solver for Sa {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "sa",
            class: "SASolverScheduler",
            summary: "stochastic Adams steps with a corrector",
            source: "Xue et al. 2023, arXiv:2309.05019",
            fields: &["corrector_order", "predictor_order", "tau_func"],
            thresholding: true,
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            flow_sigmas: true,
            zero_snr: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        let order = |field: &str| match fields.count(field, 2)? {
            order @ 1..=4 => Ok(order),
            order => Err(Fields::wrong(field, &Value::from(order), "1 to 4")),
        };
        scheduler.solver_order = order("predictor_order")?;
        scheduler.corrector = Corrector { order: order("corrector_order")?, ..Corrector::default() };
        let forms = [("data_prediction", false), ("noise_prediction", true)];
        scheduler.noise_form = fields.word("algorithm_type", false, &forms)?;
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.lambda_min_clipped = fields.number("lambda_min_clipped", f64::NEG_INFINITY)?;
        if fields.get("tau_func").is_some() {
            return Err(fields.unsupported("tau_func", ", which is no number"));
        }
        // The class always ends on the lowest level, and has no field for it.
        scheduler.final_sigma_zero = false;
        dpmpp::read_flow(fields, scheduler)
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let rule = Preserving { repeats: true, ..Preserving::default() };
        let levels = levels::preserving(scheduler, &Schedule::new(scheduler), request, rule)?;
        Ok((rows(scheduler, &levels.points(scheduler), &levels.times), 1.0))
    }
}

/// How stochastic a step from a timestep is.
fn tau(time: f64) -> f64 {
    if (200.0..=800.0).contains(&time) { 1.0 } else { 0.0 }
}

/// A way from one level to another.
struct Step {
    state: f64,
    noise: f64,
    /// Factor of the integrals of what is kept.
    scale: f64,
    /// How fast the integrand grows.
    rate: f64,
    length: f64,
    /// Whether estimates of the clean sample are integrated, whose steps of second order differ from the integral.
    adjusts: bool,
}

impl Step {
    fn new(s: &Scheduler, [from, to]: [Level; 2], length: f64, tau: f64) -> Step {
        let square = tau * tau;
        let rate = 1.0 + square;
        match s.noise_form {
            false => Step {
                state: (-square * length).exp() * to.noise / from.noise,
                noise: to.noise * (-(-2.0 * square * length).exp_m1()).max(0.0).sqrt(),
                scale: rate * to.alpha,
                rate,
                length,
                adjusts: true,
            },
            true => Step {
                state: to.alpha / from.alpha,
                noise: tau * to.noise * (2.0 * length).exp_m1().max(0.0).sqrt(),
                scale: -rate * to.noise,
                rate: -1.0,
                length,
                adjusts: false,
            },
        }
    }

    /// The factors of what is kept at `nodes`, which are counted from the end of the step; `adjustment` is added to the first
    /// and taken from the second.
    fn factors(&self, nodes: &[f64], adjustment: f64) -> Vec<f64> {
        let mut factors = weights(nodes, &exponential_moments(self.rate, self.length, nodes.len()));
        if let ([first, second], true) = (factors.as_mut_slice(), self.adjusts) {
            *first += adjustment;
            *second -= adjustment;
        }
        factors.iter().map(|factor| self.scale * factor).collect()
    }

    /// By how much steps of second order differ from the integral.
    fn core(&self) -> f64 {
        let way = self.length * self.rate;
        (way - 1.0 + (-way).exp()) / (self.rate * self.rate)
    }

    /// `nodes` are those of the step's beginning and of rows before.
    fn predicted(&self, nodes: &[f64]) -> Vec<f64> {
        let gap = nodes.get(1).map_or(1.0, |before| nodes[0] - before);
        self.factors(nodes, (0.5 * self.length * self.length - self.core()) / gap)
    }

    /// `nodes` begin with that of the step's end.
    fn corrected(&self, nodes: &[f64]) -> Vec<f64> {
        self.factors(nodes, 0.5 * self.length - self.core() / self.length)
    }
}

fn rows(s: &Scheduler, points: &[Level], times: &[f64]) -> Vec<Row> {
    let lambdas = levels::log_ratios(points);
    let nodes = |end: usize, latest: usize, count: usize| -> Vec<f64> {
        (0..count).map(|back| lambdas[latest - back] - lambdas[end]).collect()
    };
    let step = |from: usize| {
        let pair = [points[from], points[from + 1]];
        Step::new(s, pair, lambdas[from + 1] - lambdas[from], tau(times[from]))
    };
    let deepest = s.solver_order.max(s.corrector.order - 1);
    let mut rows: Vec<Row> = Vec::new();
    let (mut known, mut corrector, mut before) = (0, 0, Vec::new());
    for (index, &time) in times.iter().enumerate() {
        let mut correction = Vec::new();
        if let Some(last) = index.checked_sub(1) {
            correction = step(last).corrected(&nodes(index, index, corrector));
            correction.resize(correction.len().max(before.len() + 1), 0.0);
            correction[1..].iter_mut().zip(&before).for_each(|(factor, predicted)| *factor -= predicted);
        }
        let left = if s.lower_order_final { times.len() - index } else { usize::MAX - 1 };
        let predictor = s.solver_order.min(left).min(known + 1);
        corrector = s.corrector.order.min(left + 1).min(known + 2);
        known = deepest.min(known + 1);
        let step = step(index);
        before = step.predicted(&nodes(index + 1, index, predictor));
        let mut history = before.clone();
        history.resize(history.len().max(correction.len()), 0.0);
        history.iter_mut().zip(&correction).for_each(|(factor, corrected)| *factor += step.state * corrected);
        rows.push(Row { state: step.state, history, noise: step.noise, ..dpmpp::row(s, points[index], time) });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, assert_rows, assert_six, sd, table};
    use serde_json::json;

    fn shown(rows: &[Row]) -> Vec<[f64; 5]> {
        let at = |row: &Row, k: usize| row.history.get(k).copied().unwrap_or(0.0);
        rows.iter().map(|r| [r.state, at(r, 0), at(r, 1), at(r, 2), r.noise]).collect()
    }

    #[test]
    fn steps_are_the_golden_ones() {
        let golden = [
            [0.983_520_6, 0.125_720_0, 0.0, 0.0, 0.0],
            [0.417_494_4, 0.610_661_1, -0.288_994_5, 0.0, 0.818_797_4],
            [0.423_819_9, 0.982_281_9, -0.605_689_8, 0.104_477_5, 0.651_880_7],
            [0.321_183_9, 1.454_537_0, -0.912_594_9, 0.116_953_0, 0.432_363_8],
            [0.002_997_3, 0.998_823_9, -0.003_815_4, 0.001_964_3, 0.029_117_2],
        ];
        assert_rows(&shown(&table("SASolverScheduler", SD.clone(), 5).rows), &golden);
        let karras = sd(json!({"use_karras_sigmas": true}));
        let last = &shown(&table("SASolverScheduler", karras.clone(), 5).rows)[4];
        assert_six(last, &[1.0, 1.069_634, -2.468_25, 1.398_616, 0.0]);
        let row = &shown(&table("SASolverScheduler", SD.clone(), 10).rows)[5];
        assert_six(row, &[0.641_66, 0.636_186, -0.425_977, 0.104_011, 0.526_843]);
        let row = &shown(&table("SASolverScheduler", karras, 10).rows)[5];
        assert_six(row, &[0.295_688, 1.556_48, -1.016_58, 0.154_818, 0.355_93]);
    }
}
