//! The canonical form of a sampler: one row of numbers per step.
//!
//! Every solver is `x' = state·x + output·m + Σ_j estimates[j]·y_{i−j} + noise·z`, where `m` is the output of the
//! network and `y = u·x + w·m` the estimate of the clean sample, which may be clipped. Solvers, forecasts of whole
//! outputs and corrections of steps are only different tables, computed in float64; one emitter turns any of them into a graph.

use super::{
    Clip, Error, Scheduler, Steps,
    schedule::Schedule,
    solvers::{self, Level},
};

/// The numbers of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The timestep that the network is told.
    pub time: f64,
    /// How much signal and how much noise the state holds.
    pub level: Level,
    /// The network sees the state times this.
    pub input_scale: f64,
    /// The estimate of the clean sample: factors of the state and of the output.
    pub estimate: [f64; 2],
    /// Factor of the state.
    pub state: f64,
    /// Factor of the output of the network.
    pub output: f64,
    /// Factors of the estimate of this step and of the steps before it.
    pub estimates: Vec<f64>,
    /// Factor of fresh noise.
    pub noise: f64,
    /// This step as a flow.
    pub flow: Flow,
}

/// A step in the coordinates of a flow, in which caches of whole outputs are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flow {
    /// The state of the flow is the state times this.
    pub scale: f64,
    /// The flow `ε − x0`: factors of the state and of the output of the network.
    pub flow: [f64; 2],
}

impl Row {
    /// The update `x' = a·x + b·m + …` with the estimate of this step resolved, which is possible without clipping.
    /// Returns `a`, `b` and the factors of the estimates of earlier steps.
    pub fn affine(&self) -> (f64, f64, &[f64]) {
        let own = self.estimates.first().copied().unwrap_or(0.0);
        let (a, b) = (self.state + own * self.estimate[0], self.output + own * self.estimate[1]);
        (a, b, self.estimates.get(1..).unwrap_or_default())
    }
}

/// A sampler as numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// One row per step, noisy ones first.
    pub rows: Vec<Row>,
    /// The first state is standard normal noise times this.
    pub initial_scale: f64,
    /// What happens to estimates of the clean sample.
    pub clip: Clip,
}

/// What a table needs besides the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The steps.
    pub steps: Steps,
    /// How stochastic DDIM is; 0 is deterministic.
    pub eta: f64,
    /// How many tokens the latent has, where the shift of the noise levels depends on it.
    pub tokens: Option<usize>,
    /// Whether a flow's noise levels are `linspace(1, 1/N, N)`, as pipelines pass them, rather than those of the
    /// scheduler alone, which shifts its own ends a second time.
    pub explicit_sigmas: bool,
}

impl Request {
    /// Steps as the configuration spreads them.
    pub fn steps(count: usize) -> Request {
        Request { steps: Steps::Count(count), eta: 0.0, tokens: None, explicit_sigmas: false }
    }
}

impl Table {
    /// The table of a scheduler. Fails on steps it cannot make and on settings that contradict each other.
    pub fn new(s: &Scheduler, request: &Request) -> Result<Table, Error> {
        request.steps.check(s)?;
        if !(0.0..=1.0).contains(&request.eta) {
            return Err(Error::Plan(format!("eta is {}, expected 0 to 1", request.eta)));
        }
        if request.eta > 0.0 && s.class != super::Class::Ddim {
            return Err(Error::Plan(format!("eta is for solver ddim, and this is {}", s.class.name())));
        }
        if request.tokens.is_some() && s.dynamic_shift.is_none() {
            return Err(Error::Plan("the number of tokens is given, and `use_dynamic_shifting` is off".to_owned()));
        }
        if request.explicit_sigmas && s.class != super::Class::FlowEuler {
            return Err(Error::Plan(format!(
                "explicit sigmas are for solver flow-euler, and this is {}",
                s.class.name()
            )));
        }
        let schedule = Schedule::new(s)?;
        let table = solvers::table(s, &schedule, request)?;
        let numbers = |row: &Row| {
            let fixed = [row.time, row.input_scale, row.state, row.output, row.noise];
            fixed.iter().chain(&row.estimate).chain(&row.estimates).all(|n| n.is_finite())
        };
        match table.rows.iter().position(|row| !numbers(row)) {
            None => Ok(table),
            Some(at) => Err(Error::Unsupported(format!(
                "prediction of the noise at timestep {}, where nothing but noise is left (rescale_betas_zero_snr)",
                table.rows[at].time
            ))),
        }
    }

    /// How many steps add fresh noise.
    pub fn noises(&self) -> usize {
        self.rows.iter().filter(|row| row.noise != 0.0).count()
    }

    /// How many estimates of earlier steps some step uses.
    pub fn history(&self) -> usize {
        let used = |row: &Row| row.estimates.iter().rposition(|&b| b != 0.0).unwrap_or(0);
        self.rows.iter().map(used).max().unwrap_or(0)
    }
}

impl Flow {
    /// The coordinates of a flow at a noise level, where the estimate of the clean sample is `u·x + w·m`.
    pub(super) fn of(level: Level, [u, w]: [f64; 2]) -> Flow {
        let Level { alpha, noise } = level;
        let ratio = alpha / noise + 1.0;
        Flow { scale: 1.0 / (alpha + noise), flow: [1.0 / noise - ratio * u, -ratio * w] }
    }
}
