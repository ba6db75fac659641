//! What a `scheduler_config.json` says, with the defaults of its class.

use super::{Error, Prediction, Request, Row};
use serde_json::{Map, Value};
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
    /// Karras et al. 2022, with ρ = 7.
    Karras,
    /// Evenly in the logarithm.
    Exponential,
    /// Of a flow.
    Flow,
}

/// A solver as data: its names, and in what its class differs from the others of the reference.
#[derive(Debug)]
pub struct SolverInfo {
    /// The short name: `ddim`; the file is `ddim.rs`.
    pub name: &'static str,
    /// The name of its class in configurations: `DDIMScheduler`.
    pub class: &'static str,
    /// What it is, one line without a full stop.
    pub summary: &'static str,
    /// The paper.
    pub source: &'static str,
    /// Fields of configurations that no other class has.
    pub fields: &'static [&'static str],
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
    /// Whether it integrates a flow: the network predicts `ε − x0`, and times are shares of noise.
    pub flow: bool,
    /// Whether timesteps may have fractions.
    pub fractions: bool,
    /// Whether it needs a finite noise level even where nothing but noise is left.
    pub finite_sigmas: bool,
    /// Whether `--eta` makes it stochastic.
    pub eta: bool,
    /// Whether its states are mixtures of the estimate and noise, as steps of several sizes need them.
    pub mixtures: bool,
}

impl SolverInfo {
    /// What is usual, for the fields in which a solver is like most others.
    pub(super) const USUAL: SolverInfo = SolverInfo {
        name: "",
        class: "",
        summary: "",
        source: "",
        fields: &[],
        spacing: Spacing::Linspace,
        betas: (1e-4, 0.02, BetaSchedule::Linear),
        clip_sample: None,
        thresholding: false,
        sigmas: &[],
        flow: false,
        fractions: false,
        finite_sigmas: false,
        eta: false,
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

    /// One row per step, and the scale of the first state.
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
    "interpolation_type",
    "final_sigmas_type",
];

/// The fields of a configuration, read one by one.
pub struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The fields of a configuration, which is an object.
    pub(super) fn of(json: &'a Value) -> Result<Fields<'a>, Error> {
        json.as_object().map(Fields).ok_or_else(|| Self::wrong("scheduler", json, "an object"))
    }

    /// A field that is given and not `null`.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    /// The error of a field whose value makes no sense.
    pub(super) fn wrong(field: &str, found: &Value, expected: &str) -> Error {
        Error::Field { field: field.to_owned(), found: found.to_string(), expected: expected.to_owned() }
    }

    /// A number.
    pub(super) fn number(&self, field: &str, default: f64) -> Result<f64, Error> {
        Ok(self.optional(field)?.unwrap_or(default))
    }

    /// A number, if there is one.
    pub(super) fn optional(&self, field: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        // Infinities have no JSON form; exporters write them as words.
        let number = value.as_f64().or_else(|| value.as_str()?.to_ascii_lowercase().parse().ok());
        number.filter(|n| !n.is_nan()).map(Some).ok_or_else(|| Self::wrong(field, value, "a number"))
    }

    /// A whole number from 1 to a million.
    pub(super) fn count(&self, field: &str, default: usize) -> Result<usize, Error> {
        const MOST: u64 = 1_000_000;
        let Some(value) = self.get(field) else { return Ok(default) };
        let count = value.as_u64().filter(|&n| (1..=MOST).contains(&n));
        count.map(|n| n as usize).ok_or_else(|| Self::wrong(field, value, "a whole number from 1 to a million"))
    }

    /// A truth value.
    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Self::wrong(field, value, "true or false"))
    }

    /// One of some words, by what it means.
    pub(super) fn word<T: Copy>(&self, field: &str, default: T, words: &[(&str, T)]) -> Result<T, Error> {
        let Some(value) = self.get(field) else { return Ok(default) };
        let found = value.as_str().and_then(|word| words.iter().find(|(name, _)| *name == word));
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
            Self::wrong(field, value, &names.join(" or "))
        })
    }

    /// Refuses a setting that is switched on.
    fn refuse(&self, field: &str, off: &[&str]) -> Result<(), Error> {
        match self.get(field) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(Value::String(word)) if off.contains(&word.as_str()) => Ok(()),
            Some(value) => Err(Error::Unsupported(format!("`{field}` = {value}"))),
        }
    }

    /// A list of numbers, if there is one.
    pub(super) fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let numbers = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        numbers.map(Some).ok_or_else(|| Self::wrong(field, value, "a list of numbers"))
    }
}

impl Scheduler {
    /// Reads the configuration of a solver. Returns the fields that no class has besides; `known` says which any has.
    pub(super) fn read(
        solver: &'static dyn Solver,
        fields: &Fields,
        known: &dyn Fn(&str) -> bool,
    ) -> Result<(Scheduler, Vec<String>), Error> {
        let unknown = fields.0.keys().filter(|k| !k.starts_with('_') && !KNOWN.contains(&k.as_str()) && !known(k));
        let mut scheduler = common(fields, solver)?;
        solver.read(fields, &mut scheduler)?;
        sensible(&scheduler)?;
        Ok((scheduler, unknown.cloned().collect()))
    }
}

/// The settings that every class has, and those of single classes as they are where nobody sets them.
fn common(f: &Fields, solver: &'static dyn Solver) -> Result<Scheduler, Error> {
    f.refuse("use_beta_sigmas", &[])?;
    f.refuse("use_lu_lambdas", &[])?;
    f.refuse("interpolation_type", &["linear"])?;
    let info = solver.info();
    if !info.flow && f.flag("use_dynamic_shifting", false)? {
        return Err(Error::Unsupported(format!("`use_dynamic_shifting` = true of solver {}", info.name)));
    }
    let schedules = [
        ("linear", BetaSchedule::Linear),
        ("scaled_linear", BetaSchedule::ScaledLinear),
        ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
    ];
    let predictions = [
        ("epsilon", Prediction::Epsilon),
        ("v_prediction", Prediction::Velocity),
        ("sample", Prediction::Sample),
        ("flow_prediction", Prediction::Flow),
    ];
    let spacings = [("linspace", Spacing::Linspace), ("leading", Spacing::Leading), ("trailing", Spacing::Trailing)];
    let (beta_start, beta_end, beta_schedule) = info.betas;
    Ok(Scheduler {
        solver,
        num_train_timesteps: f.count("num_train_timesteps", 1000)?,
        beta_start: f.number("beta_start", beta_start)?,
        beta_end: f.number("beta_end", beta_end)?,
        beta_schedule: f.word("beta_schedule", beta_schedule, &schedules)?,
        trained_betas: f.numbers("trained_betas")?,
        prediction: match info.flow {
            true => Prediction::Flow,
            false => f.word("prediction_type", Prediction::Epsilon, &predictions)?,
        },
        spacing: f.word("timestep_spacing", info.spacing, &spacings)?,
        steps_offset: f.number("steps_offset", 0.0)? as i64,
        set_alpha_to_one: f.flag("set_alpha_to_one", true)?,
        clip: clip(f, info)?,
        rescale_betas_zero_snr: f.flag("rescale_betas_zero_snr", false)?,
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
    })
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
        ("use_exponential_sigmas", Sigmas::Exponential),
        ("use_flow_sigmas", Sigmas::Flow),
    ];
    for (field, way) in ways {
        if info.sigmas.contains(&way) && f.flag(field, false)? {
            return Ok(way);
        }
    }
    Ok(Sigmas::Plain)
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
    if let Some(betas) = &s.trained_betas {
        if betas.len() != s.num_train_timesteps {
            return wrong("trained_betas", betas.len() as f64, "`num_train_timesteps` numbers");
        }
        if let Some(bad) = betas.iter().find(|b| !(**b > 0.0 && **b < 1.0)) {
            return wrong("trained_betas", *bad, "numbers between 0 and 1");
        }
    }
    if s.shift <= 0.0 {
        return wrong("shift", s.shift, "a number above 0");
    }
    let info = s.solver.info();
    if s.prediction == Prediction::Flow && !info.flow && s.sigmas != Sigmas::Flow {
        let setting = "`prediction_type` = `flow_prediction`";
        return Err(Error::Unsupported(match info.sigmas.contains(&Sigmas::Flow) {
            true => format!("{setting} without `use_flow_sigmas`"),
            false => format!("{setting} of solver {}", info.name),
        }));
    }
    Ok(())
}
