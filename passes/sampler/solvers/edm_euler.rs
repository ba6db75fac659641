//! Karras et al. 2022, EDM, arXiv:2206.00364: Euler steps with the preconditioning of the paper.

use crate::sampler::{Error, Fields, Level, Prediction, Request, Row, Scheduler, Sigmas, Solver, SolverInfo, grid};

/// Euler steps on preconditioned outputs.
pub(super) struct EdmEuler;

impl Solver for EdmEuler {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "edm-euler",
            class: "EDMEulerScheduler",
            summary: "Euler steps in the noise level on preconditioned outputs",
            ..USUAL
        };
        &INFO
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        read(fields, scheduler, &DEFAULTS)
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let sigmas = sigmas(scheduler, request.steps.count());
        // Here the lowest level is that of the last step itself.
        let last = if scheduler.final_sigma_zero { 0.0 } else { sigmas[sigmas.len() - 1] };
        let next = sigmas.iter().copied().skip(1).chain([last]);
        let row = |(&sigma, next): (&f64, f64)| {
            let left = next / sigma;
            Row { state: left, history: vec![1.0 - left], ..row(scheduler, sigma, c_noise(sigma)) }
        };
        Ok((sigmas.iter().zip(next).map(row).collect(), first_scale(scheduler)))
    }
}

/// What the solvers with preconditioning have in common.
pub(super) const USUAL: SolverInfo = SolverInfo {
    source: "Karras et al. 2022, arXiv:2206.00364",
    fields: &["rho", "sigma_data", "sigma_schedule"],
    predictions: &[Prediction::Epsilon, Prediction::Velocity],
    fractions: true,
    preconditions: true,
    zero_snr: false,
    grids: false,
    mixtures: false,
    ..SolverInfo::USUAL
};

/// What a class says where the configuration does not: the lowest and the highest noise level, the deviation of the data,
/// and how levels are spread.
pub(super) struct Defaults {
    pub range: [f64; 2],
    pub data: f64,
    pub sigmas: Sigmas,
}

/// The defaults of the paper.
pub(super) const DEFAULTS: Defaults = Defaults { range: [0.002, 80.0], data: 0.5, sigmas: Sigmas::Karras };

/// Reads noise levels and preconditioning.
pub(super) fn read(f: &Fields, s: &mut Scheduler, defaults: &Defaults) -> Result<(), Error> {
    let [min, max] = [f.positive("sigma_min", defaults.range[0])?, f.positive("sigma_max", defaults.range[1])?];
    if min >= max {
        return Err(Fields::wrong("sigma_max", &max.into(), "more than `sigma_min`"));
    }
    (s.sigma_min, s.sigma_max) = (Some(min), Some(max));
    s.sigma_data = f.positive("sigma_data", defaults.data)?;
    s.rho = f.positive("rho", 7.0)?;
    let ways = [("karras", Sigmas::Karras), ("exponential", Sigmas::Exponential)];
    s.sigmas = f.word("sigma_schedule", defaults.sigmas, &ways)?;
    Ok(())
}

/// The lowest and the highest noise level.
pub(super) fn range(s: &Scheduler) -> [f64; 2] {
    [s.sigma_min.unwrap_or(DEFAULTS.range[0]), s.sigma_max.unwrap_or(DEFAULTS.range[1])]
}

/// The noise levels of the steps.
pub(super) fn sigmas(s: &Scheduler, count: usize) -> Vec<f64> {
    let [min, max] = range(s);
    match s.sigmas {
        Sigmas::Exponential => grid::exponential(max, min, count),
        _ => grid::karras(max, min, count, s.rho),
    }
}

/// What the network is told of a noise level.
pub(super) fn c_noise(sigma: f64) -> f64 {
    0.25 * sigma.ln()
}

/// The scale of the first state.
pub(super) fn first_scale(s: &Scheduler) -> f64 {
    let [_, max] = range(s);
    (max * max + 1.0).sqrt()
}

/// A row at a noise level, whose network sees the state and gives the sample in units of the data.
pub(super) fn row(s: &Scheduler, sigma: f64, time: f64) -> Row {
    let (square, data) = (sigma * sigma + s.sigma_data * s.sigma_data, s.sigma_data);
    let out = sigma * data / square.sqrt();
    let estimate = match s.prediction {
        Prediction::Sample => [0.0, 1.0],
        Prediction::Velocity => [data * data / square, -out],
        Prediction::Epsilon | Prediction::Flow => [data * data / square, out],
    };
    Row { input_scale: 1.0 / square.sqrt(), ..Level { alpha: 1.0, noise: sigma }.row(time, estimate) }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, assert_six, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("EDMEulerScheduler", json!({}), 5).rows;
        let times: Vec<f64> = rows.iter().map(|row| row.time).collect();
        assert_rows(&[times], &[[1.095_507, 0.715_947_5, 0.230_59, -0.443_353_1, -1.553_652]]);
        let states: Vec<f64> = rows.iter().map(|row| row.state).collect();
        assert_rows(&[states], &[[0.219_097_9, 0.143_498_6, 0.067_490_3, 0.011_781_8, 0.0]]);
        let row = &table("EDMEulerScheduler", json!({"sigma_schedule": "exponential"}), 10).rows[5];
        assert_six(&[row.time, row.state, row.history[0]], &[-0.376_248, 0.308_077, 0.691_923]);
        let row = &table("EDMEulerScheduler", json!({}), 10).rows[5];
        assert_six(&[row.time, row.state, row.history[0]], &[0.101_656, 0.312_956, 0.687_044]);
    }

    #[test]
    fn a_last_step_to_its_own_level_is_left_out() {
        let table = table("EDMEulerScheduler", json!({"final_sigmas_type": "sigma_min"}), 5);
        assert_eq!((table.rows.len(), table.notes.len()), (4, 1));
    }
}
