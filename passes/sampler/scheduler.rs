//! What a `scheduler_config.json` says, with the defaults of its class.

use super::Error;
use serde_json::{Map, Value};

/// The solvers that are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Ancestral sampling of the diffusion process.
    Ddpm,
    /// DDIM, deterministic or with `eta`.
    Ddim,
    /// Euler steps in the noise level.
    Euler,
    /// Euler steps that add fresh noise.
    EulerAncestral,
    /// DPM-Solver++, of order 1 to 3.
    Dpm,
    /// Euler steps of a flow.
    FlowEuler,
    /// Latent consistency models.
    Lcm,
}

/// The class names of configurations, and the short name of each solver.
const CLASSES: &[(&str, &str, Class)] = &[
    ("DDPMScheduler", "ddpm", Class::Ddpm),
    ("DDIMScheduler", "ddim", Class::Ddim),
    ("EulerDiscreteScheduler", "euler", Class::Euler),
    ("EulerAncestralDiscreteScheduler", "euler-ancestral", Class::EulerAncestral),
    ("DPMSolverMultistepScheduler", "dpmpp", Class::Dpm),
    ("FlowMatchEulerDiscreteScheduler", "flow-euler", Class::FlowEuler),
    ("LCMScheduler", "lcm", Class::Lcm),
];

impl Class {
    /// The short name: `ddim`.
    pub fn name(self) -> &'static str {
        CLASSES.iter().find(|(_, _, class)| *class == self).expect("every class is listed").1
    }

    /// The class with this short name.
    pub fn from_name(name: &str) -> Option<Class> {
        CLASSES.iter().find(|(_, short, _)| *short == name).map(|(_, _, class)| *class)
    }

    /// The short names, for messages.
    pub fn names() -> Vec<&'static str> {
        CLASSES.iter().map(|(_, short, _)| *short).collect()
    }
}

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

/// The settings of one scheduler.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The names are those of the configuration; what they mean is in the specification of each class.
pub struct Scheduler {
    pub class: Class,
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

/// Fields of classes that are built, so that anything else is worth a warning.
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
    "variance_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "sigma_min",
    "sigma_max",
    "interpolation_type",
    "timestep_type",
    "final_sigmas_type",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "lambda_min_clipped",
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
    "original_inference_steps",
    "timestep_scaling",
];

/// The fields of a configuration, read one by one.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn wrong(field: &str, found: &Value, expected: &str) -> Error {
        Error::Field { field: field.to_owned(), found: found.to_string(), expected: expected.to_owned() }
    }

    fn number(&self, field: &str, default: f64) -> Result<f64, Error> {
        Ok(self.optional(field)?.unwrap_or(default))
    }

    fn optional(&self, field: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        // Infinities have no JSON form; exporters write them as words.
        let number = value.as_f64().or_else(|| value.as_str()?.to_ascii_lowercase().parse().ok());
        number.filter(|n| !n.is_nan()).map(Some).ok_or_else(|| Self::wrong(field, value, "a number"))
    }

    fn count(&self, field: &str, default: usize) -> Result<usize, Error> {
        const MOST: u64 = 1_000_000;
        let Some(value) = self.get(field) else { return Ok(default) };
        let count = value.as_u64().filter(|&n| (1..=MOST).contains(&n));
        count.map(|n| n as usize).ok_or_else(|| Self::wrong(field, value, "a whole number from 1 to a million"))
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Self::wrong(field, value, "true or false"))
    }

    fn word<T: Copy>(&self, field: &str, default: T, words: &[(&str, T)]) -> Result<T, Error> {
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

    fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let numbers = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        numbers.map(Some).ok_or_else(|| Self::wrong(field, value, "a list of numbers"))
    }
}

impl Scheduler {
    /// Reads a configuration. `class` overrides the class that it names. Returns warnings about fields that no class has.
    ///
    /// Fails on a class that is not built unless it is overridden, on a setting that is not, and on values that make no
    /// sense.
    pub fn parse(json: &Value, class: Option<Class>) -> Result<(Scheduler, Vec<String>), Error> {
        let fields = json.as_object().ok_or_else(|| Fields::wrong("scheduler", json, "an object"))?;
        let named = fields.get("_class_name").and_then(Value::as_str);
        let found = named.and_then(|name| CLASSES.iter().find(|(long, _, _)| *long == name)).map(|(_, _, c)| *c);
        let class = class.or(found).ok_or_else(|| {
            let what = named.map_or("without `_class_name`".to_owned(), |name| format!("`_class_name` = `{name}`"));
            Error::Unsupported(format!("{what} (--solver takes {} in its place)", Class::names().join(", ")))
        })?;
        let unknown = fields.keys().filter(|k| !k.starts_with('_') && !KNOWN.contains(&k.as_str()));
        let warnings = unknown.map(|k| format!("the scheduler's `{k}` is not known and was ignored")).collect();
        Ok((read(&Fields(fields), class)?, warnings))
    }
}

fn read(f: &Fields, class: Class) -> Result<Scheduler, Error> {
    use Class::{Ddim, Ddpm, Dpm, Euler, FlowEuler, Lcm};
    f.refuse("use_beta_sigmas", &[])?;
    f.refuse("use_lu_lambdas", &[])?;
    f.refuse("interpolation_type", &["linear"])?;
    let lcm = class == Lcm;
    let spacing = if matches!(class, Ddim | Ddpm | Lcm) { Spacing::Leading } else { Spacing::Linspace };
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
    let prediction = match class {
        FlowEuler => Prediction::Flow,
        _ => f.word("prediction_type", Prediction::Epsilon, &predictions)?,
    };
    let stochastic = match class {
        Dpm => f.word("algorithm_type", false, &[("dpmsolver++", false), ("sde-dpmsolver++", true)])?,
        FlowEuler => f.flag("stochastic_sampling", false)?,
        _ => false,
    };
    let defaults = if lcm { (0.000_85, 0.012, BetaSchedule::ScaledLinear) } else { (1e-4, 0.02, BetaSchedule::Linear) };
    let spacings = [("linspace", Spacing::Linspace), ("leading", Spacing::Leading), ("trailing", Spacing::Trailing)];
    let scheduler = Scheduler {
        class,
        num_train_timesteps: f.count("num_train_timesteps", 1000)?,
        beta_start: f.number("beta_start", defaults.0)?,
        beta_end: f.number("beta_end", defaults.1)?,
        beta_schedule: f.word("beta_schedule", defaults.2, &schedules)?,
        trained_betas: f.numbers("trained_betas")?,
        prediction,
        spacing: f.word("timestep_spacing", spacing, &spacings)?,
        steps_offset: f.number("steps_offset", 0.0)? as i64,
        set_alpha_to_one: f.flag("set_alpha_to_one", true)?,
        clip: clip(f, class)?,
        rescale_betas_zero_snr: f.flag("rescale_betas_zero_snr", false)?,
        variance: variance(f, class)?,
        sigmas: sigmas(f, class)?,
        sigma_min: f.optional("sigma_min")?.filter(|_| class == Euler),
        sigma_max: f.optional("sigma_max")?.filter(|_| class == Euler),
        continuous_time: class == Euler
            && f.word("timestep_type", false, &[("discrete", false), ("continuous", true)])?
            && prediction == Prediction::Velocity,
        final_sigma_zero: f.word("final_sigmas_type", true, &[("zero", true), ("sigma_min", false)])?,
        solver_order: f.count("solver_order", 2)?,
        // Other names fall back to the midpoint rule in the reference as well.
        heun: f.get("solver_type").and_then(Value::as_str) == Some("heun"),
        stochastic,
        lower_order_final: f.flag("lower_order_final", true)?,
        euler_at_final: f.flag("euler_at_final", false)?,
        lambda_min_clipped: f.number("lambda_min_clipped", f64::NEG_INFINITY)?,
        shift: if class == FlowEuler { f.number("shift", 1.0)? } else { f.number("flow_shift", 1.0)? },
        dynamic_shift: dynamic_shift(f, class)?,
        shift_terminal: f.optional("shift_terminal")?.filter(|&z| class == FlowEuler && z != 0.0),
        invert_sigmas: class == FlowEuler && f.flag("invert_sigmas", false)?,
        original_inference_steps: f.count("original_inference_steps", 50)?,
        timestep_scaling: f.number("timestep_scaling", 10.0)?,
    };
    sensible(&scheduler)?;
    Ok(scheduler)
}

/// What the reference does with estimates of the clean sample: thresholding outranks clamping, and only some classes
/// know either.
fn clip(f: &Fields, class: Class) -> Result<Clip, Error> {
    use Class::{Ddim, Ddpm, Dpm, Lcm};
    let clamps = match class {
        Ddim | Ddpm => f.flag("clip_sample", true)?,
        Lcm => f.flag("clip_sample", false)?,
        _ => false,
    };
    if matches!(class, Ddim | Ddpm | Dpm | Lcm) && f.flag("thresholding", false)? {
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

fn variance(f: &Fields, class: Class) -> Result<Variance, Error> {
    let words =
        [("fixed_small", Variance::Small), ("fixed_small_log", Variance::Small), ("fixed_large", Variance::Large)];
    match (class, f.get("variance_type").and_then(Value::as_str)) {
        (Class::Ddpm, Some(word)) if word.starts_with("learned") || word == "fixed_large_log" => {
            Err(Error::Unsupported(format!("`variance_type` = `{word}`")))
        }
        (Class::Ddpm, _) => f.word("variance_type", Variance::Small, &words),
        // Of a learned variance the other solvers use the mean only.
        _ => Ok(Variance::Small),
    }
}

fn sigmas(f: &Fields, class: Class) -> Result<Sigmas, Error> {
    if !matches!(class, Class::Euler | Class::Dpm | Class::FlowEuler) {
        return Ok(Sigmas::Plain);
    }
    let ways = [
        ("use_karras_sigmas", Sigmas::Karras),
        ("use_exponential_sigmas", Sigmas::Exponential),
        ("use_flow_sigmas", Sigmas::Flow),
    ];
    for (field, way) in ways {
        let applies = way != Sigmas::Flow || class == Class::Dpm;
        if f.flag(field, false)? && applies {
            return Ok(way);
        }
    }
    Ok(Sigmas::Plain)
}

fn dynamic_shift(f: &Fields, class: Class) -> Result<Option<DynamicShift>, Error> {
    if !f.flag("use_dynamic_shifting", false)? {
        return Ok(None);
    }
    if class != Class::FlowEuler {
        return Err(Error::Unsupported(format!("`use_dynamic_shifting` = true of solver {}", class.name())));
    }
    let shift = DynamicShift {
        shifts: [f.number("base_shift", 0.5)?, f.number("max_shift", 1.15)?],
        tokens: [f.number("base_image_seq_len", 256.0)?, f.number("max_image_seq_len", 4096.0)?],
        exponential: f.word("time_shift_type", true, &[("exponential", true), ("linear", false)])?,
    };
    if shift.tokens[0] == shift.tokens[1] {
        return Err(Fields::wrong(
            "max_image_seq_len",
            &Value::from(shift.tokens[1]),
            "another than `base_image_seq_len`",
        ));
    }
    Ok(Some(shift))
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
    if s.class == Class::Dpm && s.solver_order > 3 {
        return wrong("solver_order", s.solver_order as f64, "1, 2 or 3");
    }
    if s.shift <= 0.0 {
        return wrong("shift", s.shift, "a number above 0");
    }
    if s.prediction == Prediction::Flow && s.class == Class::Dpm && s.sigmas != Sigmas::Flow {
        return Err(Error::Unsupported("`prediction_type` = `flow_prediction` without `use_flow_sigmas`".to_owned()));
    }
    if s.prediction == Prediction::Flow && !matches!(s.class, Class::Dpm | Class::FlowEuler) {
        return Err(Error::Unsupported(format!("`prediction_type` = `flow_prediction` of solver {}", s.class.name())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn classes_have_their_own_defaults() {
        let of = |name: &str| Scheduler::parse(&json!({ "_class_name": name }), None).unwrap().0;
        let (ddim, euler, lcm) = (of("DDIMScheduler"), of("EulerDiscreteScheduler"), of("LCMScheduler"));
        assert_eq!((ddim.spacing, ddim.clip), (Spacing::Leading, Clip::Clamp(1.0)));
        assert_eq!((euler.spacing, euler.clip), (Spacing::Linspace, Clip::None));
        assert_eq!((lcm.beta_schedule, lcm.clip), (BetaSchedule::ScaledLinear, Clip::None));
    }

    #[test]
    fn settings_that_are_not_built_are_named() {
        let refused = |json: Value| Scheduler::parse(&json, None).unwrap_err().to_string();
        let dpm = "DPMSolverMultistepScheduler";
        assert!(refused(json!({"_class_name": dpm, "use_lu_lambdas": true})).contains("`use_lu_lambdas` = true"));
        assert!(refused(json!({"_class_name": dpm, "algorithm_type": "dpmsolver"})).contains("algorithm_type"));
        assert!(refused(json!({"_class_name": "PNDMScheduler"})).contains("`PNDMScheduler`"));
        assert!(refused(json!({"_class_name": dpm, "beta_schedule": "sigmoid"})).contains("squaredcos_cap_v2"));
        assert!(refused(json!({"_class_name": "DDPMScheduler", "variance_type": "learned_range"})).contains("learned"));
        assert!(refused(json!({"_class_name": dpm, "solver_order": 4})).contains("1, 2 or 3"));
        assert!(refused(json!({"_class_name": "DDIMScheduler", "beta_start": "much"})).contains("a number"));
        assert!(refused(json!([1])).contains("an object"));
    }

    #[test]
    fn another_class_is_taken_only_when_it_is_asked_for() {
        let pndm = json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true, "steps_offset": 1});
        let (scheduler, warnings) = Scheduler::parse(&pndm, Some(Class::Ddim)).unwrap();
        assert_eq!((scheduler.class, scheduler.steps_offset), (Class::Ddim, 1));
        assert_eq!(warnings, ["the scheduler's `skip_prk_steps` is not known and was ignored"]);
    }

    #[test]
    fn infinities_are_words() {
        let json = json!({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": "-Infinity"});
        assert_eq!(Scheduler::parse(&json, None).unwrap().0.lambda_min_clipped, f64::NEG_INFINITY);
    }
}
