//! The numbers of one step of a sampler, in the one form that every solver has.
//!
//! A row is one evaluation of the network, of which a step may need several. With `m`, the output of the network, and
//! `y = u·x + w·m`, the estimate of the clean sample, which may be clipped, it keeps `q = kept·(x, m, y)` and gives
//!
//! `x' = state·x + anchor·X + output·m + Σ_j history[j]·q_{i−j} + noise·z_i + noise_before·z_{i−1}`,
//!
//! where `X` is the state that an earlier row began with: second evaluations start again from where their step began.

/// The numbers of one row.
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
    /// What later rows find of this one: factors of state, output and estimate.
    pub kept: [f64; 3],
    /// Factors of what this row keeps and of what the rows before it kept.
    pub history: Vec<f64>,
    /// The state of an earlier row that this one starts from.
    pub anchor: Option<Anchor>,
    /// Factor of fresh noise.
    pub noise: f64,
    /// Factor of the noise that was fresh at the row before.
    pub noise_before: f64,
    /// This step as a flow.
    pub flow: Flow,
}

/// The state that an earlier row began with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Anchor {
    /// How many rows ago, at least 1.
    pub back: usize,
    /// Its factor.
    pub factor: f64,
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
    /// The update `x' = a·x + b·m + …` with what this row keeps resolved, which is possible without clipping. Returns `a`,
    /// `b` and the factors of what earlier rows kept.
    pub fn affine(&self) -> (f64, f64, &[f64]) {
        let own = self.history.first().copied().unwrap_or(0.0);
        let kept = self.kept_affine();
        let (a, b) = (added(self.state, own * kept[0]), added(self.output, own * kept[1]));
        (a, b, self.history.get(1..).unwrap_or_default())
    }

    /// What this row keeps as factors of state and output, which is possible without clipping.
    pub fn kept_affine(&self) -> [f64; 2] {
        let [state, output, estimate] = self.kept;
        [added(state, estimate * self.estimate[0]), added(output, estimate * self.estimate[1])]
    }

    /// Whether this row leaves the state as it is, whatever the network gives.
    pub fn is_idle(&self) -> bool {
        let nothing = |n: &f64| *n == 0.0;
        let others = [self.output, self.noise, self.noise_before];
        self.state == 1.0 && self.anchor.is_none() && others.iter().chain(&self.history).all(nothing)
    }

    /// Whether what the network gives at this row reaches anything: the next state, or what is kept.
    pub fn evaluates(&self) -> bool {
        self.output != 0.0 || self.kept_affine()[1] != 0.0
    }
}

/// A sum; of what cancels but for rounding, nothing is left.
fn added(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if sum.abs() <= 4.0 * f64::EPSILON * a.abs() { 0.0 } else { sum }
}

/// What the network's output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity `α·ε − s·x0`.
    Velocity,
    /// The clean sample.
    Sample,
    /// The flow `ε − x0`.
    Flow,
}

/// A point of the way from noise to sample: `x = alpha·x0 + noise·ε`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Factor of the clean sample.
    pub alpha: f64,
    /// Factor of the noise.
    pub noise: f64,
}

impl Level {
    /// The level at a cumulative alpha ᾱ.
    pub fn of_alpha(bar: f64) -> Level {
        Level { alpha: bar.sqrt(), noise: (1.0 - bar).sqrt() }
    }

    /// The variance preserving level at `noise / alpha`.
    pub fn of_sigma(sigma: f64) -> Level {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Level { alpha, noise: sigma * alpha }
    }

    /// The estimate of the clean sample: factors of the state and of the output of the network.
    pub fn estimate(self, prediction: Prediction) -> [f64; 2] {
        let Level { alpha, noise } = self;
        match prediction {
            Prediction::Epsilon => [1.0 / alpha, -noise / alpha],
            Prediction::Velocity => [alpha, -noise],
            Prediction::Sample => [0.0, 1.0],
            Prediction::Flow => [1.0, -noise],
        }
    }

    /// The estimate of the clean sample where states are not scaled down and the network sees them as if they were.
    pub(super) fn growing_estimate(self, prediction: Prediction) -> [f64; 2] {
        let sigma = self.noise;
        let square = sigma * sigma + 1.0;
        match prediction {
            Prediction::Epsilon | Prediction::Flow => [1.0, -sigma],
            Prediction::Velocity => [1.0 / square, -sigma / square.sqrt()],
            Prediction::Sample => [0.0, 1.0],
        }
    }

    /// The noise level as networks know it that are told it: noise over signal, or, of a flow, the share of noise.
    pub fn sigma(self) -> f64 {
        let flow = (self.alpha + self.noise - 1.0).abs() < 1e-12;
        if flow { self.noise } else { self.noise / self.alpha }
    }

    /// The estimate of the noise, before anything is clipped.
    pub fn epsilon(self, prediction: Prediction) -> [f64; 2] {
        let Level { alpha, noise } = self;
        match prediction {
            Prediction::Epsilon => [0.0, 1.0],
            Prediction::Velocity => [noise, alpha],
            Prediction::Sample => [1.0 / noise, -alpha / noise],
            Prediction::Flow => [1.0, 1.0 - noise],
        }
    }

    /// The noise that an estimate of the clean sample leaves: factors of state, output and estimate.
    pub(super) fn noise_of_estimate(self) -> [f64; 3] {
        [1.0 / self.noise, 0.0, -self.alpha / self.noise]
    }

    /// A row at this level that so far leaves the state as it is, and keeps its estimate.
    pub(super) fn row(self, time: f64, estimate: [f64; 2]) -> Row {
        let flow = Flow::of(self, estimate);
        Row {
            time,
            level: self,
            input_scale: 1.0,
            estimate,
            state: 1.0,
            output: 0.0,
            kept: [0.0, 0.0, 1.0],
            history: vec![0.0],
            anchor: None,
            noise: 0.0,
            noise_before: 0.0,
            flow,
        }
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
