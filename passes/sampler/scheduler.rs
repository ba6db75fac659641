//! What a `scheduler_config.json` says, with the defaults of its class.

use super::{Error, Prediction, Request, Row, fields::Fields};
use serde_json::Value;
use std::fmt;

/// How betas grow over the training schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BetaSchedule {
    /// Linearly.
    Linear,
    /// As the square of something linear.
    ScaledLinear,
    /// Such that the cumulative alpha is a squared cosine.
    SquaredCosine,
    /// Such that the cumulative alpha is an exponential.
    Exponential,
}

/// How timesteps are spread over the training schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spacing {
    /// Evenly, both ends included.
    Linspace,
    /// Whole strides from the clean end.
    Leading,
    /// Whole strides from the noisy end.
    Trailing,
}

/// What happens to estimates of the clean sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Clip {
    /// Nothing.
    None,
    /// They are clamped to this range around zero.
    Clamp(f64),
    /// They are clamped to a quantile of their own and divided by it.
    Threshold {
        /// Which quantile of the absolute values.
        ratio: f64,
        /// The largest bound.
        max: f64,
    },
}

/// Variance of the noise that DDPM adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variance {
    /// That of the posterior.
    Small,
    /// Beta.
    Large,
}

/// How noise levels are spread instead of by timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sigmas {
    /// As the timesteps say.
    Plain,
    /// Karras et al. 2022.
    Karras,
    /// Evenly in the logarithm.
    Exponential,
    /// By quantiles of a beta distribution: Lee et al. 2024, arXiv:2407.12173.
    Beta,
    /// Evenly in the logarithm, with whole timesteps.
    Lu,
    /// Evenly in the logarithm, one more than timesteps, which stay as they are.
    LogLinear,
}

/// A solver as data: its names, and in what its class differs from the others of the reference.
#[derive(Debug)]
pub struct SolverInfo {
    /// The short name: `ddim`; the file is `ddim.rs`.
    pub name: &'static str,
    /// The name of its class in configurations: `DDIMScheduler`.
    pub class: &'static str,
    /// Other classes that make the same steps.
    pub aliases: &'static [&'static str],
    /// What it is, one line without a full stop.
    pub summary: &'static str,
    /// The paper.
    pub source: &'static str,
    /// Fields of configurations that few classes have.
    pub fields: &'static [&'static str],
    /// Training timesteps where the configuration does not say.
    pub train: usize,
    /// What the network may predict; empty where the class alone says it.
    pub predictions: &'static [Prediction],
    /// How it spreads timesteps where the configuration does not say.
    pub spacing: Spacing,
    /// The first and the last beta and their schedule where the configuration does not say.
    pub betas: (f64, f64, BetaSchedule),
    /// Whether estimates are clamped where the configuration does not say; `None` where they never are.
    pub clip_sample: Option<bool>,
    /// Whether estimates can be clamped to a quantile of their own.
    pub thresholding: bool,
    /// The ways in which it can spread noise levels instead of timesteps.
    pub sigmas: &'static [Sigmas],
    /// Whether the noise levels may be those of a flow.
    pub flow_sigmas: bool,
    /// Whether it knows schedules that are rescaled to end in noise alone.
    pub zero_snr: bool,
    /// Whether it scales what goes into the network and what comes out, which a network may do by itself.
    pub preconditions: bool,
    /// Whether it evaluates the network twice in every step but the last.
    pub pairs: bool,
    /// Whether steps may be a grid of one's own.
    pub grids: bool,
    /// Whether it integrates a flow: the network predicts `ε − x0`, and times are shares of noise.
    pub flow: bool,
    /// Whether trained betas are one for each timestep.
    pub betas_by_timestep: bool,
    /// Whether timesteps may have fractions.
    pub fractions: bool,
    /// Whether it needs a finite noise level even where nothing but noise is left.
    pub finite_sigmas: bool,
    /// How stochastic it is where `--eta` does not say; `None` where that means nothing.
    pub eta: Option<f64>,
    /// Whether its states are mixtures of the estimate and noise, as steps of several sizes need them.
    pub mixtures: bool,
}

impl SolverInfo {
    /// What is usual, for the fields in which a solver is like most others.
    pub(super) const USUAL: SolverInfo = SolverInfo {
        name: "",
        class: "",
        aliases: &[],
        summary: "",
        source: "",
        fields: &[],
        train: 1000,
        predictions: &[Prediction::Epsilon, Prediction::Velocity, Prediction::Sample],
        spacing: Spacing::Linspace,
        betas: (1e-4, 0.02, BetaSchedule::Linear),
        clip_sample: None,
        thresholding: false,
        sigmas: &[],
        flow_sigmas: false,
        zero_snr: true,
        preconditions: false,
        pairs: false,
        grids: true,
        flow: false,
        betas_by_timestep: true,
        fractions: false,
        finite_sigmas: false,
        eta: None,
        mixtures: true,
    };
}

/// What turns a configuration and steps into the rows of a table: one solver, one file.
pub trait Solver: Sync {
    /// The solver as data.
    fn info(&self) -> &'static SolverInfo;

    /// Reads the settings that only this solver has, after those that every solver has.
    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        let _ = (fields, scheduler);
        Ok(())
    }

    /// One row per evaluation of the network, and the scale of the first state.
    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error>;
}

impl dyn Solver {
    /// The short name: `ddim`.
    pub fn name(&self) -> &'static str {
        self.info().name
    }
}

impl fmt::Debug for dyn Solver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for dyn Solver {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

/// The settings of one scheduler.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The names are those of the configuration; what they mean is in the specification of each class.
pub struct Scheduler {
    pub solver: &'static dyn Solver,
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    pub trained_betas: Option<Vec<f64>>,
    pub prediction: Prediction,
    pub spacing: Spacing,
    pub steps_offset: i64,
    pub set_alpha_to_one: bool,
    pub clip: Clip,
    pub rescale_betas_zero_snr: bool,
    pub variance: Variance,
    pub sigmas: Sigmas,
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
    pub continuous_time: bool,
    pub final_sigma_zero: bool,
    pub solver_order: usize,
    pub heun: bool,
    pub stochastic: bool,
    pub lower_order_final: bool,
    pub euler_at_final: bool,
    pub lambda_min_clipped: f64,
    pub shift: f64,
    pub dynamic_shift: Option<DynamicShift>,
    pub shift_terminal: Option<f64>,
    pub invert_sigmas: bool,
    pub original_inference_steps: usize,
    pub timestep_scaling: f64,
    pub flow: bool,
    pub noise_form: bool,
    pub snr_shift_scale: Option<f64>,
    pub skip_prk_steps: bool,
    pub corrector: Corrector,
    pub sigma_data: f64,
    pub rho: f64,
    pub s_noise: f64,
    pub eta: f64,
    pub preconditioned: bool,
    pub notes: Vec<String>,
}

/// How a solver corrects states once it knows the prediction at them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Corrector {
    /// The order of the correction, of solvers for which it is a setting.
    pub order: usize,
    /// Whether steps are weighted by their length rather than by its exponential.
    pub plain_steps: bool,
    /// Steps whose result is not corrected.
    pub without: Vec<usize>,
}

/// A shift of the noise levels that depends on the number of tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DynamicShift {
    /// The logarithm of the shift at few and at many tokens.
    pub shifts: [f64; 2],
    /// What few and many are.
    pub tokens: [f64; 2],
    /// Whether the shift is exponential in the number of tokens rather than linear.
    pub exponential: bool,
}

impl DynamicShift {
    /// The parameter μ for this many tokens.
    pub fn mu(&self, tokens: usize) -> f64 {
        let slope = (self.shifts[1] - self.shifts[0]) / (self.tokens[1] - self.tokens[0]);
        self.shifts[0] + (tokens as f64 - self.tokens[0]) * slope
    }
}

/// Fields that classes have in common, so that anything else is worth a warning: see [`SolverInfo::fields`].
const KNOWN: &[&str] = &[
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "predict_epsilon",
    "variance_type",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "rescale_betas_zero_snr",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "interpolation_type",
    "final_sigmas_type",
    "flow_shift",
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "lower_order_final",
    "euler_at_final",
    "lambda_min_clipped",
    "algorithm_type",
    "solver_type",
    "solver_order",
    "sigma_min",
    "sigma_max",
];

impl Scheduler {
    /// Reads the configuration of a solver. Returns the fields that no class has besides; `known` says which any has.
    pub(super) fn read(
        solver: &'static dyn Solver,
        fields: &Fields,
        known: &dyn Fn(&str) -> bool,
    ) -> Result<(Scheduler, Vec<String>), Error> {
        let unknown = fields.names().filter(|k| !KNOWN.contains(&k.as_str()) && !known(k));
        let mut scheduler = common(fields, solver)?;
        solver.read(fields, &mut scheduler)?;
        sensible(&scheduler)?;
        Ok((scheduler, unknown.cloned().collect()))
    }

    /// By how much the even noise levels of a flow are shifted.
    pub(super) fn flow_shift(&self, request: &Request) -> Result<f64, Error> {
        let Some(dynamic) = &self.dynamic_shift else { return Ok(self.shift) };
        let tokens = request.tokens.ok_or_else(|| {
            let message = "`use_dynamic_shifting` depends on the number of tokens, which is not given; --tokens N";
            Error::Plan(message.to_owned())
        })?;
        let mu = dynamic.mu(tokens);
        Ok(if dynamic.exponential { mu.exp() } else { mu })
    }

    /// The scheduler of a network that does its own preconditioning: it sees the sample plus noise as they are, and gives the
    /// clean sample. Fails for solvers that cannot use such a prediction.
    pub fn preconditioned(mut self) -> Result<Scheduler, Error> {
        let info = self.solver.info();
        if info.flow || !(info.preconditions || info.predictions.contains(&Prediction::Sample)) {
            let message = format!("prediction of the clean sample with solver {}", info.name);
            return Err(Error::Unsupported(message));
        }
        self.preconditioned = true;
        self.prediction = Prediction::Sample;
        Ok(self)
    }
}

/// The settings that every class has, and those of single classes as they are where nobody sets them.
fn common(f: &Fields, solver: &'static dyn Solver) -> Result<Scheduler, Error> {
    let info = solver.info();
    let schedules = [
        ("linear", BetaSchedule::Linear),
        ("scaled_linear", BetaSchedule::ScaledLinear),
        ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
        ("exp", BetaSchedule::Exponential),
    ];
    let spacings = [("linspace", Spacing::Linspace), ("leading", Spacing::Leading), ("trailing", Spacing::Trailing)];
    let (beta_start, beta_end, beta_schedule) = info.betas;
    Ok(Scheduler {
        solver,
        num_train_timesteps: f.count("num_train_timesteps", info.train)?,
        beta_start: f.number("beta_start", beta_start)?,
        beta_end: f.number("beta_end", beta_end)?,
        beta_schedule: f.word("beta_schedule", beta_schedule, &schedules)?,
        trained_betas: f.numbers("trained_betas")?,
        prediction: prediction(f, info)?,
        spacing: f.word("timestep_spacing", info.spacing, &spacings)?,
        steps_offset: f.number("steps_offset", 0.0)? as i64,
        set_alpha_to_one: f.flag("set_alpha_to_one", true)?,
        clip: clip(f, info)?,
        rescale_betas_zero_snr: info.zero_snr && f.flag("rescale_betas_zero_snr", false)?,
        sigmas: sigmas(f, info)?,
        final_sigma_zero: f.word("final_sigmas_type", true, &[("zero", true), ("sigma_min", false)])?,
        // Of a learned variance all solvers but one use the mean only.
        variance: Variance::Small,
        sigma_min: None,
        sigma_max: None,
        continuous_time: false,
        solver_order: 2,
        heun: false,
        stochastic: false,
        lower_order_final: true,
        euler_at_final: false,
        lambda_min_clipped: f64::NEG_INFINITY,
        shift: 1.0,
        dynamic_shift: None,
        shift_terminal: None,
        invert_sigmas: false,
        original_inference_steps: 50,
        timestep_scaling: 10.0,
        flow: info.flow || (info.flow_sigmas && f.flag("use_flow_sigmas", false)?),
        noise_form: false,
        snr_shift_scale: None,
        skip_prk_steps: false,
        corrector: Corrector::default(),
        sigma_data: 0.5,
        rho: 7.0,
        s_noise: 1.0,
        eta: 0.0,
        preconditioned: false,
        notes: Vec::new(),
    })
}

/// What the network predicts. Old files say it by a truth value.
fn prediction(f: &Fields, info: &SolverInfo) -> Result<Prediction, Error> {
    let words = [
        ("epsilon", Prediction::Epsilon),
        ("v_prediction", Prediction::Velocity),
        ("sample", Prediction::Sample),
        ("original_sample", Prediction::Sample),
        ("flow_prediction", Prediction::Flow),
    ];
    if info.flow {
        return Ok(Prediction::Flow);
    }
    if info.predictions.is_empty() {
        return Ok(Prediction::Epsilon);
    }
    let old = if f.flag("predict_epsilon", true)? { Prediction::Epsilon } else { Prediction::Sample };
    let prediction = f.word("prediction_type", old, &words)?;
    if prediction != Prediction::Flow && !info.predictions.contains(&prediction) {
        return Err(f.unsupported("prediction_type", &format!(" of solver {}", info.name)));
    }
    Ok(prediction)
}

/// What the reference does with estimates of the clean sample: thresholding outranks clamping, and only some classes
/// know either.
fn clip(f: &Fields, info: &SolverInfo) -> Result<Clip, Error> {
    let clamps = info.clip_sample.map_or(Ok(false), |default| f.flag("clip_sample", default))?;
    if info.thresholding && f.flag("thresholding", false)? {
        let ratio = f.number("dynamic_thresholding_ratio", 0.995)?;
        let max = f.number("sample_max_value", 1.0)?;
        if !(0.0..=1.0).contains(&ratio) || max < 1.0 {
            let expected = "a ratio between 0 and 1 and a largest value of at least 1";
            return Err(Fields::wrong("dynamic_thresholding_ratio", &Value::from(ratio), expected));
        }
        return Ok(Clip::Threshold { ratio, max });
    }
    if !clamps {
        return Ok(Clip::None);
    }
    let range = f.number("clip_sample_range", 1.0)?;
    if range <= 0.0 {
        return Err(Fields::wrong("clip_sample_range", &Value::from(range), "a number above 0"));
    }
    Ok(Clip::Clamp(range))
}

fn sigmas(f: &Fields, info: &SolverInfo) -> Result<Sigmas, Error> {
    let ways = [
        ("use_karras_sigmas", Sigmas::Karras),
        ("use_lu_lambdas", Sigmas::Lu),
        ("use_exponential_sigmas", Sigmas::Exponential),
        ("use_beta_sigmas", Sigmas::Beta),
    ];
    let mut chosen = Vec::new();
    for (field, way) in ways {
        if info.sigmas.contains(&way) && f.flag(field, false)? {
            chosen.push((field, way));
        }
    }
    match chosen.as_slice() {
        [] => Ok(Sigmas::Plain),
        [(_, way)] => Ok(*way),
        [(first, _), (second, _), ..] => {
            let message = format!("`{first}` = true beside `{second}` = true, of which one can be");
            Err(Error::Unsupported(message))
        }
    }
}

/// Values that no schedule can be made of.
fn sensible(s: &Scheduler) -> Result<(), Error> {
    let wrong = |field: &str, found: f64, expected: &str| Err(Fields::wrong(field, &Value::from(found), expected));
    if s.num_train_timesteps < 2 {
        return wrong("num_train_timesteps", s.num_train_timesteps as f64, "at least 2");
    }
    if !(s.beta_start > 0.0 && s.beta_start < 1.0) {
        return wrong("beta_start", s.beta_start, "a number between 0 and 1");
    }
    if !(s.beta_end > 0.0 && s.beta_end < 1.0) {
        return wrong("beta_end", s.beta_end, "a number between 0 and 1");
    }
    if s.beta_schedule == BetaSchedule::Exponential && s.solver.name() != "heun" {
        let expected = "linear or scaled_linear or squaredcos_cap_v2";
        return Err(Fields::wrong("beta_schedule", &Value::from("exp"), expected));
    }
    if let Some(betas) = s.trained_betas.as_ref().filter(|_| s.solver.info().betas_by_timestep) {
        if betas.len() != s.num_train_timesteps {
            let expected = format!("as many numbers as `num_train_timesteps`, {}", s.num_train_timesteps);
            let found = format!("a list of {}", betas.len());
            return Err(Error::Field { field: "trained_betas".to_owned(), found, expected });
        }
        if let Some(bad) = betas.iter().find(|b| !(**b > 0.0 && **b < 1.0)) {
            return wrong("trained_betas", *bad, "numbers between 0 and 1");
        }
    }
    if s.shift <= 0.0 {
        return wrong("shift", s.shift, "a number above 0");
    }
    let info = s.solver.info();
    if s.prediction == Prediction::Flow && !s.flow {
        let setting = "`prediction_type` = `flow_prediction`";
        return Err(Error::Unsupported(match info.flow_sigmas {
            true => format!("{setting} without `use_flow_sigmas`"),
            false => format!("{setting} of solver {}", info.name),
        }));
    }
    Ok(())
}
