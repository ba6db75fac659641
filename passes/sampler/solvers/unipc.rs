//! Zhao et al. 2023, UniPC, arXiv:2302.04867: multistep steps that correct the state once its prediction is known.
//!
//! A corrected state has the same factor of the state before as the one that was predicted, so it is the predicted one plus
//! a sum of what rows keep: no row needs another state than its own.

use super::flow_euler;
use crate::sampler::{
    Clip, Corrector, Error, Fields, Level, Prediction, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo,
    exponential::log_ratio,
    levels::{self, Preserving},
};
use serde_json::Value;

/// Predictor and corrector, of any order.
pub(super) struct UniPc;

impl Solver for UniPc {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "unipc",
            class: "UniPCMultistepScheduler",
            summary: "multistep steps with a corrector",
            source: "Zhao et al. 2023, arXiv:2302.04867",
            fields: &["disable_corrector", "predict_x0", "solver_p"],
            thresholding: true,
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            flow_sigmas: true,
            finite_sigmas: true,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        let types = [("bh1", true), ("bh2", false), ("midpoint", false), ("heun", false), ("logrho", false)];
        let plain_steps = fields.word("solver_type", false, &types)?;
        let without = corrected_not(fields)?;
        scheduler.corrector = Corrector { order: 0, plain_steps, without };
        scheduler.solver_order = fields.count("solver_order", 2)?;
        scheduler.lower_order_final = fields.flag("lower_order_final", true)?;
        scheduler.noise_form = !fields.flag("predict_x0", true)?;
        scheduler.sigma_min = fields.optional("sigma_min")?;
        scheduler.sigma_max = fields.optional("sigma_max")?;
        if fields.get("solver_p").is_some() {
            return Err(fields.unsupported("solver_p", ", a scheduler inside of another"));
        }
        check_end(fields, scheduler)?;
        read_flow(fields, scheduler)?;
        if scheduler.noise_form && scheduler.clip != Clip::None {
            scheduler.clip = Clip::None;
            scheduler.notes.push("`thresholding` = true means nothing with `predict_x0` = false".to_owned());
        }
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let rule = Preserving { repeats: true, full_flow: true, ..Preserving::default() };
        let levels = levels::preserving(scheduler, &Schedule::new(scheduler), request, rule)?;
        Ok((rows(scheduler, &levels.points(scheduler), &levels.times), 1.0))
    }
}

/// The steps whose result is not corrected.
fn corrected_not(fields: &Fields) -> Result<Vec<usize>, Error> {
    let numbers = fields.numbers("disable_corrector")?.unwrap_or_default();
    let step = |&number: &f64| (number >= 0.0 && number.fract() == 0.0).then_some(number as usize);
    let steps: Option<Vec<usize>> = numbers.iter().map(step).collect();
    steps.ok_or_else(|| Fields::wrong("disable_corrector", &Value::from(numbers), "a list of steps"))
}

/// Refuses what divides by an infinite step where the last one ends without noise.
fn check_end(fields: &Fields, s: &Scheduler) -> Result<(), Error> {
    const WHERE: &str = " with `final_sigmas_type` = `zero`, where the last step is infinite";
    if !s.final_sigma_zero {
        return Ok(());
    }
    if s.corrector.plain_steps {
        return Err(fields.unsupported("solver_type", &format!("{WHERE}; bh2, or sigma_min")));
    }
    if !s.lower_order_final && s.solver_order > 1 {
        return Err(fields.unsupported("lower_order_final", WHERE));
    }
    if s.noise_form {
        return Err(fields.unsupported("predict_x0", &format!("{WHERE}; sigma_min")));
    }
    Ok(())
}

fn read_flow(fields: &Fields, s: &mut Scheduler) -> Result<(), Error> {
    s.shift = fields.number("flow_shift", 1.0)?;
    s.shift_terminal = fields.optional("shift_terminal")?.filter(|&z| z != 0.0);
    if !s.flow {
        let found = s.shift_terminal.map(|_| fields.unsupported("shift_terminal", " without `use_flow_sigmas`"));
        return found.map_or(Ok(()), Err);
    }
    s.dynamic_shift = flow_euler::dynamic_shift(fields)?;
    if matches!(s.sigmas, Sigmas::Exponential | Sigmas::Beta) {
        return Err(fields.unsupported("use_flow_sigmas", " beside exponential or beta noise levels"));
    }
    if s.noise_form && s.prediction == Prediction::Flow {
        return Err(fields.unsupported("predict_x0", " of a flow"));
    }
    Ok(())
}

/// A way from one level to another, before its order is known.
struct Step {
    /// Factor of the state.
    state: f64,
    /// Factor of all that is kept.
    scale: f64,
    /// The length as the exponential takes it.
    length: f64,
    /// What differences are weighted by.
    weight: f64,
}

impl Step {
    fn new(s: &Scheduler, from: Level, to: Level) -> Step {
        let h = log_ratio(to) - log_ratio(from);
        let (state, scale, length) = match s.noise_form {
            false => (to.noise / from.noise, -to.alpha, -h),
            true => (to.alpha / from.alpha, -to.noise, h),
        };
        Step { state, scale, length, weight: if s.corrector.plain_steps { length } else { length.exp_m1() } }
    }

    /// The right sides of the conditions of order, divided by the weight.
    fn conditions(&self, count: usize) -> Vec<f64> {
        let (mut phi, mut factorial) = (self.length.exp_m1() / self.length - 1.0, 1.0);
        let mut conditions = Vec::new();
        for order in 1..=count {
            conditions.push(phi * factorial / self.weight);
            factorial *= (order + 1) as f64;
            phi = phi / self.length - 1.0 / factorial;
        }
        conditions
    }

    /// The factors of what is kept: first of the latest. `ratios` are where earlier ones lie, as shares of the step.
    fn predicted(&self, ratios: &[f64]) -> Vec<f64> {
        let weights = match ratios {
            [_] => vec![0.5],
            _ => solve(ratios, &self.conditions(ratios.len())),
        };
        self.factors(ratios, &weights)
    }

    /// The same once what is kept at the end of the step is known, whose factor comes first.
    fn corrected(&self, ratios: &[f64]) -> Vec<f64> {
        let all: Vec<f64> = ratios.iter().copied().chain([1.0]).collect();
        let weights = if ratios.is_empty() { vec![0.5] } else { solve(&all, &self.conditions(all.len())) };
        let (own, others) = weights.split_last().expect("there is a weight for the end of the step");
        let mut factors = self.factors(ratios, others);
        let own = self.scale * self.weight * own;
        factors[0] -= own;
        factors.insert(0, own);
        factors
    }

    fn factors(&self, ratios: &[f64], weights: &[f64]) -> Vec<f64> {
        let mut factors = vec![self.scale * self.length.exp_m1()];
        for (ratio, weight) in ratios.iter().zip(weights) {
            let factor = self.scale * self.weight * weight / ratio;
            factors[0] -= factor;
            factors.push(factor);
        }
        factors
    }
}

/// The weights `w` with `Σ_k w_k·r_kʲ` equal to the j-th condition.
fn solve(ratios: &[f64], conditions: &[f64]) -> Vec<f64> {
    let count = ratios.len();
    let row = |j: usize| ratios.iter().map(|r| r.powi(j as i32)).chain([conditions[j]]).collect();
    let mut rows: Vec<Vec<f64>> = (0..count).map(row).collect();
    for column in 0..count {
        let largest = (column..count).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, largest.unwrap_or(column));
        let pivot = rows[column].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(index, _)| *index != column) {
            let factor = row[column] / pivot[column];
            row.iter_mut().zip(&pivot).for_each(|(a, b)| *a -= factor * b);
        }
    }
    rows.iter().enumerate().map(|(index, row)| row[count] / row[index]).collect()
}

fn rows(s: &Scheduler, points: &[Level], times: &[f64]) -> Vec<Row> {
    let lambdas = levels::log_ratios(points);
    // Where what earlier rows kept lies, as shares of the step from `index`.
    let ratios = |index: usize, order: usize| -> Vec<f64> {
        let share = |back| (lambdas[index - back] - lambdas[index]) / (lambdas[index + 1] - lambdas[index]);
        (1..order).map(share).collect()
    };
    let mut rows: Vec<Row> = Vec::new();
    let mut order = 1;
    for (index, &time) in times.iter().enumerate() {
        let correction = match index.checked_sub(1).filter(|last| !s.corrector.without.contains(last)) {
            None => Vec::new(),
            Some(last) => correction(&Step::new(s, points[last], points[index]), &ratios(last, order)),
        };
        let left = if s.lower_order_final { times.len() - index } else { usize::MAX };
        order = s.solver_order.min(left).min(index + 1);
        let step = Step::new(s, points[index], points[index + 1]);
        let mut history = step.predicted(&ratios(index, order));
        history.resize(history.len().max(correction.len()), 0.0);
        history.iter_mut().zip(&correction).for_each(|(factor, corrected)| *factor += step.state * corrected);
        let level = points[index];
        let [e, f] = level.epsilon(s.prediction);
        let kept = if s.noise_form { [e, f, 0.0] } else { [0.0, 0.0, 1.0] };
        rows.push(Row { state: step.state, history, kept, ..level.row(time, level.estimate(s.prediction)) });
    }
    rows
}

/// What is added to a predicted state: factors of what this row keeps and of what earlier ones kept.
fn correction(step: &Step, ratios: &[f64]) -> Vec<f64> {
    let mut correction = step.corrected(ratios);
    for (factor, predicted) in correction[1..].iter_mut().zip(step.predicted(ratios)) {
        *factor -= predicted;
    }
    correction
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{SD, assert_rows, assert_six, sd, table};
    use serde_json::json;

    fn shown(rows: &[Row]) -> Vec<Vec<f64>> {
        let row = |row: &Row| {
            let mut history = row.history.clone();
            history.resize(3, 0.0);
            std::iter::once(row.state).chain(history).collect()
        };
        rows.iter().map(row).collect()
    }

    #[test]
    fn steps_are_the_golden_ones() {
        let golden = [
            [0.983_520_6, 0.125_720_0, 0.0, 0.0],
            [0.933_075_9, 0.365_572_2, -0.143_340_7, 0.0],
            [0.828_596_3, 0.542_084_6, -0.283_972_3, 0.060_162_4],
            [0.654_199_7, 0.776_390_4, -0.408_195_8, 0.073_733_2],
            [0.0, 1.0, 0.0, 0.0],
        ];
        assert_rows(&shown(&table("UniPCMultistepScheduler", SD.clone(), 5).rows), &golden);
        let golden = [
            [0.981_240_1, 0.137_110_8, 0.0, 0.0],
            [0.803_557_0, 0.778_238_0, -0.324_831_9, 0.0],
            [0.305_938_1, 1.336_351_0, -0.622_630_1, 0.067_998_5],
            [0.121_144_5, 1.509_992_0, -0.676_149_2, 0.048_148_0],
            [0.0, 1.0, 0.0, 0.0],
        ];
        let karras = sd(json!({"use_karras_sigmas": true}));
        assert_rows(&shown(&table("UniPCMultistepScheduler", karras.clone(), 5).rows), &golden);
        let row = &shown(&table("UniPCMultistepScheduler", SD.clone(), 10).rows)[5];
        assert_six(row, &[0.891_784, 0.331_78, -0.200_61, 0.051_565_6]);
        let row = &shown(&table("UniPCMultistepScheduler", karras, 10).rows)[5];
        assert_six(row, &[0.604_765, 0.823_353, -0.453_095, 0.096_332_1]);
    }

    #[test]
    fn steps_of_a_flow_are_the_golden_ones() {
        let flow = json!({"use_flow_sigmas": true, "flow_shift": 3.0, "prediction_type": "flow_prediction"});
        let rows = table("UniPCMultistepScheduler", flow, 5).rows;
        assert_eq!(rows.iter().map(|row| row.time).collect::<Vec<_>>(), [999.0, 923.0, 818.0, 667.0, 429.0]);
        let golden = [
            [0.923_166_6, 0.076_833_4, 0.0, 0.0],
            [0.886_546_9, 0.152_426_0, -0.038_972_9, 0.0],
            [0.815_246_4, 0.313_557_5, -0.132_705_8, 0.003_901_9],
            [0.644_155_3, 0.629_292_4, -0.315_280_4, 0.041_832_6],
            [0.0, 1.0, 0.0, 0.0],
        ];
        for (found, golden) in shown(&rows).iter().zip(&golden) {
            assert!(found.iter().zip(golden).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} is not {golden:?}");
        }
    }

    #[test]
    fn without_correction_the_first_order_is_ddim() {
        let settings =
            sd(json!({"solver_order": 1, "disable_corrector": [0, 1, 2, 3], "timestep_spacing": "trailing"}));
        let found = table("UniPCMultistepScheduler", settings, 5).rows;
        let ddim = sd(json!({"timestep_spacing": "trailing", "clip_sample": false}));
        for (a, b) in found.iter().zip(&table("DDIMScheduler", ddim, 5).rows) {
            assert!((a.affine().0 - b.affine().0).abs() < 1e-6 && (a.affine().1 - b.affine().1).abs() < 1e-6);
        }
    }

    #[test]
    fn infinite_steps_are_refused() {
        let refused = |settings: Value| {
            let mut json = json!({"_class_name": "UniPCMultistepScheduler"});
            json.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
            Scheduler::parse(&json, None).unwrap_err().to_string()
        };
        assert!(refused(json!({"solver_type": "bh1"})).contains("bh2"));
        assert!(refused(json!({"lower_order_final": false})).contains("infinite"));
        assert!(refused(json!({"predict_x0": false})).contains("sigma_min"));
        assert!(refused(json!({"solver_p": {}})).contains("`solver_p`"));
        assert!(refused(json!({"shift_terminal": 0.1})).contains("`use_flow_sigmas`"));
    }
}
