//! Euler steps of a flow: Esser et al. 2024, arXiv:2403.03206.

use crate::sampler::{
    DynamicShift, Error, Flow, Level, Request, Row, Scheduler, Sigmas, Solver, SolverInfo, Steps, grid,
    schedule::linspace, scheduler::Fields,
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
            fields: &[
                "base_image_seq_len",
                "base_shift",
                "invert_sigmas",
                "max_image_seq_len",
                "max_shift",
                "shift",
                "shift_terminal",
                "stochastic_sampling",
                "time_shift_type",
                "use_dynamic_shifting",
            ],
            sigmas: &[Sigmas::Karras, Sigmas::Exponential],
            flow: true,
            fractions: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.stochastic = fields.flag("stochastic_sampling", false)?;
        scheduler.shift = fields.number("shift", 1.0)?;
        scheduler.dynamic_shift = dynamic_shift(fields)?;
        scheduler.shift_terminal = fields.optional("shift_terminal")?.filter(|&z| z != 0.0);
        scheduler.invert_sigmas = fields.flag("invert_sigmas", false)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, request)?, 1.0))
    }
}

fn dynamic_shift(f: &Fields) -> Result<Option<DynamicShift>, Error> {
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
            let shift = shift(s, request)?;
            even.iter().map(|&sigma| shift / (shift + (1.0 / sigma - 1.0))).collect()
        }
    };
    if let Some(terminal) = s.shift_terminal {
        let scale = (1.0 - sigmas[sigmas.len() - 1]) / (1.0 - terminal);
        if scale <= 0.0 || !scale.is_finite() {
            return Err(Error::Plan(format!("`shift_terminal` = {terminal} cannot be reached in {count} steps")));
        }
        sigmas = sigmas.iter().map(|sigma| 1.0 - (1.0 - sigma) / scale).collect();
    }
    let (max, min) = (sigmas[0], sigmas[sigmas.len() - 1]);
    Ok(match s.sigmas {
        Sigmas::Karras => grid::karras(max, min, count),
        Sigmas::Exponential => grid::exponential(max, min, count),
        Sigmas::Plain | Sigmas::Flow => sigmas,
    })
}

/// By how much even noise levels are shifted.
pub(in super::super) fn shift(s: &Scheduler, request: &Request) -> Result<f64, Error> {
    let Some(dynamic) = &s.dynamic_shift else { return Ok(s.shift) };
    let tokens = request.tokens.ok_or_else(|| {
        let message = "`use_dynamic_shifting` depends on the number of tokens, which is not given; --tokens N";
        Error::Plan(message.to_owned())
    })?;
    let mu = dynamic.mu(tokens);
    Ok(if dynamic.exponential { mu.exp() } else { mu })
}

fn rows(s: &Scheduler, request: &Request) -> Result<Vec<Row>, Error> {
    let mut sigmas = sigmas(s, request)?;
    let mut last = 0.0;
    if s.invert_sigmas {
        sigmas = sigmas.iter().map(|sigma| 1.0 - sigma).collect();
        last = 1.0;
    }
    sigmas.push(last);
    let total = s.num_train_timesteps as f64;
    let row = |pair: &[f64]| {
        let (sigma, next) = (pair[0], pair[1]);
        let level = Level { alpha: 1.0 - sigma, noise: sigma };
        let base = Row { estimate: [1.0, -sigma], ..level.row(sigma * total, [1.0, -sigma]) };
        if s.stochastic {
            return Row { state: 0.0, history: vec![1.0 - next], noise: next, ..base };
        }
        Row { output: next - sigma, ..base }
    };
    let mut rows: Vec<Row> = sigmas.windows(2).map(row).collect();
    for row in &mut rows {
        // The output is the flow itself, also at the ends, where levels have no ratio.
        row.flow = Flow { scale: 1.0, flow: [0.0, 1.0] };
    }
    Ok(rows)
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
    fn the_last_level_can_be_moved() {
        let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"shift_terminal": 0.1}));
        let found = sigmas(&s, &Request::steps(5)).unwrap();
        assert!((found[4] - 0.1).abs() < 1e-12 && found[0] == 1.0);
        let s = scheduler("FlowMatchEulerDiscreteScheduler", json!({"invert_sigmas": true}));
        let rows = rows(&s, &Request::steps(4)).unwrap();
        assert!(rows[0].time == 0.0 && rows[3].output > 0.0);
    }
}
