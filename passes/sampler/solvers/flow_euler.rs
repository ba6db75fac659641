//! Euler steps of a flow: Esser et al. 2024, arXiv:2403.03206.

use crate::sampler::{
    DynamicShift, Error, Fields, Flow, Level, Request, Row, Scheduler, Sigmas, Solver, SolverInfo, Steps, grid,
    schedule::linspace,
};
use serde_json::Value;

/// Euler steps of a flow.
pub(super) struct FlowEuler;

impl Solver for FlowEuler {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "flow-euler",
            class: "FlowMatchEulerDiscreteScheduler",
            summary: "Euler steps of a flow",
            source: "Esser et al. 2024, arXiv:2403.03206",
            fields: &["invert_sigmas", "shift", "stochastic_sampling"],
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            flow: true,
            fractions: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.stochastic = fields.flag("stochastic_sampling", false)?;
        read_levels(fields, scheduler)
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, request)?, 1.0))
    }
}

/// Reads what is about the noise levels of a flow.
pub(super) fn read_levels(fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
    scheduler.shift = fields.number("shift", 1.0)?;
    scheduler.dynamic_shift = dynamic_shift(fields)?;
    scheduler.shift_terminal = fields.optional("shift_terminal")?.filter(|&z| z != 0.0);
    scheduler.invert_sigmas = fields.flag("invert_sigmas", false)?;
    Ok(())
}

/// The shift by the number of tokens, if that is asked for.
pub(super) fn dynamic_shift(f: &Fields) -> Result<Option<DynamicShift>, Error> {
    if !f.flag("use_dynamic_shifting", false)? {
        return Ok(None);
    }
    let shift = DynamicShift {
        shifts: [f.number("base_shift", 0.5)?, f.number("max_shift", 1.15)?],
        tokens: [f.number("base_image_seq_len", 256.0)?, f.number("max_image_seq_len", 4096.0)?],
        exponential: f.word("time_shift_type", true, &[("exponential", true), ("linear", false)])?,
    };
    if shift.tokens[0] == shift.tokens[1] {
        let expected = "another than `base_image_seq_len`";
        return Err(Fields::wrong("max_image_seq_len", &Value::from(shift.tokens[1]), expected));
    }
    Ok(Some(shift))
}

fn shifted(sigma: f64, shift: f64) -> f64 {
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}

/// The noise levels of the steps, without the final one.
fn sigmas(s: &Scheduler, request: &Request) -> Result<Vec<f64>, Error> {
    let total = s.num_train_timesteps as f64;
    let count = match &request.steps {
        Steps::Times(times) => return Ok(times.iter().map(|t| t / total).collect()),
        Steps::Count(count) => *count,
    };
    let least = if s.dynamic_shift.is_some() { 1.0 / total } else { shifted(1.0 / total, s.shift) };
    let least = if request.explicit_sigmas { 1.0 / count as f64 } else { least };
    let even = linspace(1.0, least, count);
    let mut sigmas: Vec<f64> = match &s.dynamic_shift {
        None => even.iter().map(|&sigma| shifted(sigma, s.shift)).collect(),
        Some(_) => {
            let shift = s.flow_shift(request)?;
            even.iter().map(|&sigma| shift / (shift + (1.0 / sigma - 1.0))).collect()
        }
    };
    grid::stretch(&mut sigmas, s.shift_terminal)?;
    let (max, min) = (sigmas[0], sigmas[sigmas.len() - 1]);
    Ok(grid::spread(s.sigmas, max, min, count).unwrap_or(sigmas))
}

/// The noise levels of the steps with the final one.
pub(super) fn levels(s: &Scheduler, request: &Request) -> Result<Vec<f64>, Error> {
    let mut sigmas = sigmas(s, request)?;
    if s.invert_sigmas {
        sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - *sigma);
    }
    sigmas.push(if s.invert_sigmas { 1.0 } else { 0.0 });
    Ok(sigmas)
}

/// A row of a flow at a share of noise.
pub(super) fn row(s: &Scheduler, sigma: f64) -> Row {
    let level = Level { alpha: 1.0 - sigma, noise: sigma };
    let row = level.row(sigma * s.num_train_timesteps as f64, [1.0, -sigma]);
    // The output is the flow itself, also at the ends, where levels have no ratio.
    Row { flow: Flow { scale: 1.0, flow: [0.0, 1.0] }, ..row }
}

fn rows(s: &Scheduler, request: &Request) -> Result<Vec<Row>, Error> {
    let step = |pair: &[f64]| {
        let (sigma, next) = (pair[0], pair[1]);
        match s.stochastic {
            true => Row { state: 0.0, history: vec![1.0 - next], noise: next, ..row(s, sigma) },
            false => Row { output: next - sigma, ..row(s, sigma) },
        }
    };
    Ok(levels(s, request)?.windows(2).map(step).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{assert_rows, scheduler};
    use serde_json::json;

    #[test]
    fn noise_levels_are_the_golden_ones() {
        let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"shift": 3.0}));
        let twice = sigmas(&s, &Request::steps(4)).unwrap();
        assert_rows(&[twice], &[[1.0, 0.857_692_3, 0.602_150_5, 0.008_928_6]]);
        let explicit = Request { explicit_sigmas: true, ..Request::steps(4) };
        assert_rows(&[sigmas(&s, &explicit).unwrap()], &[[1.0, 0.9, 0.75, 0.5]]);
        let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"use_dynamic_shifting": true}));
        let dynamic = Request { tokens: Some(4096), ..explicit.clone() };
        assert_rows(&[sigmas(&s, &dynamic).unwrap()], &[[1.0, 0.904_530_8, 0.759_510_9, 0.512_844_1]]);
        assert!(sigmas(&s, &explicit).unwrap_err().to_string().contains("--tokens"));
    }

    #[test]
    fn noise_levels_can_be_spread() {
        let spread = |field: &str| {
            let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"shift": 3.0, field: true}));
            sigmas(&s, &Request::steps(5)).unwrap()
        };
        let beta = [1.0, 0.825_888_2, 0.504_464_3, 0.183_040_4, 0.008_928_6];
        assert_rows(&[spread("use_beta_sigmas")], &[beta]);
        let karras = [1.0, 0.400_321_5, 0.139_599_1, 0.040_372_7, 0.008_928_6];
        assert_rows(&[spread("use_karras_sigmas")], &[karras]);
    }

    #[test]
    fn the_last_level_can_be_moved() {
        let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"shift_terminal": 0.1}));
        let found = sigmas(&s, &Request::steps(5)).unwrap();
        assert!((found[4] - 0.1).abs() < 1e-12 && found[0] == 1.0);
        let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"invert_sigmas": true}));
        let rows = rows(&s, &Request::steps(4)).unwrap();
        assert!(rows[0].time == 0.0 && rows[3].output > 0.0);
    }
}
