//! What is asked of a scheduler: which steps, and what else a solver needs besides its configuration.

/// Which timesteps a sampler visits.
#[derive(Debug, Clone, PartialEq)]
pub enum Steps {
    /// This many, spread as the configuration says.
    Count(usize),
    /// These, noisy ones first.
    Times(Vec<f64>),
}

impl Steps {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Steps::Count(count) => *count,
            Steps::Times(times) => times.len(),
        }
    }
}

/// What a table needs besides the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The steps.
    pub steps: Steps,
    /// How stochastic the solver is, of those for which that can be said; 0 is deterministic, `None` what is usual.
    pub eta: Option<f64>,
    /// How many tokens the latent has, where the shift of the noise levels depends on it.
    pub tokens: Option<usize>,
    /// Whether a flow's noise levels are `linspace(1, 1/N, N)`, as pipelines pass them, rather than those of the
    /// scheduler alone, which shifts its own ends a second time.
    pub explicit_sigmas: bool,
}

impl Request {
    /// Steps as the configuration spreads them.
    pub fn steps(count: usize) -> Request {
        Request { steps: Steps::Count(count), eta: None, tokens: None, explicit_sigmas: false }
    }
}
