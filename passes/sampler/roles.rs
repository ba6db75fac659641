//! What each input of a denoiser is: the latent, the time, or a condition.

use super::{Error, Row};
use lathe_ir::{DataType, Dim, Graph, Model, Shape, ValueId};
use serde::Serialize;

/// What stands for a condition in the unconditional pass.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Uncond {
    /// The condition itself: it is no condition to be guided by.
    Same,
    /// A number, in every element.
    Constant(f64),
    /// An input of the sampler, `NAME_uncond`.
    Input,
}

/// An input besides latent and time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Condition {
    /// The input.
    pub name: String,
    /// What stands for it in the unconditional pass.
    pub uncond: Uncond,
}

/// What a network is told of the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeValue {
    /// What the scheduler tells, mostly the timestep.
    #[default]
    Timestep,
    /// The noise level: noise over signal, or, of a flow, the share of noise.
    Sigma,
    /// A quarter of the logarithm of the noise level.
    CNoise,
}

impl TimeValue {
    const ALL: [TimeValue; 3] = [TimeValue::Timestep, TimeValue::Sigma, TimeValue::CNoise];

    fn name(self) -> &'static str {
        match self {
            TimeValue::Timestep => "timestep",
            TimeValue::Sigma => "sigma",
            TimeValue::CNoise => "c-noise",
        }
    }
}

/// What each input of a denoiser is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Roles {
    /// The input that holds the noisy sample.
    pub latent: String,
    /// The input that holds the timestep.
    pub time: String,
    /// What the network is told, before scale and offset.
    pub time_value: TimeValue,
    /// The network is told that times this.
    pub time_scale: f64,
    /// And this is added.
    pub time_offset: f64,
    /// Whether the network does its own preconditioning: it sees the sample plus noise and gives the clean sample.
    pub preconditioned: bool,
    /// The other inputs.
    pub conditions: Vec<Condition>,
    /// The output that predicts.
    pub output: String,
}

impl Default for Roles {
    fn default() -> Roles {
        Roles {
            latent: String::new(),
            time: String::new(),
            time_value: TimeValue::default(),
            time_scale: 1.0,
            time_offset: 0.0,
            preconditioned: false,
            conditions: Vec::new(),
            output: String::new(),
        }
    }
}

/// Names by which denoisers call their latent, most telling first.
const LATENT_NAMES: &[&str] =
    &["sample", "latent", "latents", "latent_model_input", "noisy_sample", "hidden_states", "x_t", "xt", "x", "z"];

/// Names by which they call the time.
const TIME_NAMES: &[&str] = &["timestep", "timesteps", "time_step", "time", "t", "sigma", "sigmas"];

/// What the user said about roles: `latent=x`, `time=t`, `time-scale=0.001`, `time-offset=1`, `time-value=sigma`,
/// `predicts=clean`, `output=eps`, `cond=label`, `uncond:label=10`, `uncond:label=input`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoleOptions {
    latent: Option<String>,
    time: Option<String>,
    time_value: TimeValue,
    time_scale: Option<f64>,
    time_offset: f64,
    preconditioned: bool,
    output: Option<String>,
    conditions: Vec<String>,
    uncond: Vec<(String, Uncond)>,
}

impl RoleOptions {
    /// These where they say something, else those.
    pub fn or(self, others: RoleOptions) -> RoleOptions {
        let plain = RoleOptions::default();
        RoleOptions {
            latent: self.latent.or(others.latent),
            time: self.time.or(others.time),
            time_value: if self.time_value == plain.time_value { others.time_value } else { self.time_value },
            time_scale: self.time_scale.or(others.time_scale),
            time_offset: if self.time_offset == plain.time_offset { others.time_offset } else { self.time_offset },
            preconditioned: self.preconditioned || others.preconditioned,
            output: self.output.or(others.output),
            conditions: [others.conditions, self.conditions].concat(),
            // What is said last counts.
            uncond: [others.uncond, self.uncond].concat(),
        }
    }

    /// Reads what the user said.
    pub fn parse(texts: &[String]) -> Result<RoleOptions, Error> {
        let mut options = RoleOptions::default();
        for text in texts {
            let wrong =
                |expected: &str| Error::Roles(format!("`{text}` says nothing about a role, expected {expected}"));
            let (role, value) =
                text.split_once('=').filter(|(_, v)| !v.is_empty()).ok_or_else(|| wrong("ROLE=NAME"))?;
            match role {
                "latent" => options.latent = Some(value.to_owned()),
                "time" => options.time = Some(value.to_owned()),
                "output" => options.output = Some(value.to_owned()),
                "cond" => options.conditions.push(value.to_owned()),
                "time-scale" => {
                    let scale = value.parse().ok().filter(|s: &f64| s.is_finite() && *s != 0.0);
                    options.time_scale = Some(scale.ok_or_else(|| wrong("time-scale=NUMBER"))?);
                }
                "time-offset" => {
                    let offset = value.parse().ok().filter(|offset: &f64| offset.is_finite());
                    options.time_offset = offset.ok_or_else(|| wrong("time-offset=NUMBER"))?;
                }
                "time-value" => {
                    let found = TimeValue::ALL.into_iter().find(|known| known.name() == value);
                    options.time_value = found.ok_or_else(|| wrong("time-value=timestep, sigma or c-noise"))?;
                }
                "predicts" if matches!(value, "clean" | "raw") => options.preconditioned = value == "clean",
                "predicts" => return Err(wrong("predicts=clean or predicts=raw")),
                _ => {
                    let expected = "latent=, time=, time-value=, time-scale=, time-offset=, predicts=, output=, cond= or uncond:NAME=";
                    let name = role.strip_prefix("uncond:").ok_or_else(|| wrong(expected))?;
                    let constant = || value.parse().ok().filter(|v: &f64| v.is_finite()).map(Uncond::Constant);
                    let uncond = if value == "input" { Some(Uncond::Input) } else { constant() };
                    let uncond = uncond.ok_or_else(|| wrong("uncond:NAME=NUMBER or uncond:NAME=input"))?;
                    options.uncond.push((name.to_owned(), uncond));
                }
            }
        }
        Ok(options)
    }
}

fn shape(graph: &Graph, value: ValueId) -> Option<&Shape> {
    graph.value(value).ty.as_ref()?.shape()
}

fn elem(graph: &Graph, value: ValueId) -> Option<DataType> {
    graph.value(value).ty.as_ref()?.elem()
}

fn name(graph: &Graph, value: ValueId) -> &str {
    &graph.value(value).name
}

/// Whether the axes that two shapes both know have the same sizes, apart from the second, which may hold a variance too.
fn alike(a: &Shape, b: &Shape) -> bool {
    let same =
        |(axis, (a, b)): (usize, (&Dim, &Dim))| axis == 1 || a.known().zip(b.known()).is_none_or(|(a, b)| a == b);
    a.dims.len() == b.dims.len() && a.dims.iter().zip(&b.dims).enumerate().all(same)
}

/// The one of `candidates` with the most telling name; else the only one there is.
fn choose(graph: &Graph, candidates: &[ValueId], names: &[&str]) -> Option<ValueId> {
    let named = |wanted: &&str| candidates.iter().find(|&&v| name(graph, v).eq_ignore_ascii_case(wanted)).copied();
    match candidates {
        [only] => Some(*only),
        _ => names.iter().find_map(named),
    }
}

impl Roles {
    /// Finds out what the inputs are. What the user said comes first, then shapes, then names.
    pub fn infer(model: &Model, options: &RoleOptions) -> Result<Roles, Error> {
        let graph = &model.graph;
        let inputs: Vec<ValueId> =
            graph.main().inputs().iter().copied().filter(|&v| graph.value(v).initializer().is_none()).collect();
        let listed: Vec<String> = inputs.iter().map(|&v| format!("`{}`", name(graph, v))).collect();
        let listed = listed.join(", ");
        let find = |wanted: &String| {
            let found = inputs.iter().find(|&&v| name(graph, v) == wanted).copied();
            found.ok_or_else(|| Error::Roles(format!("the denoiser has no input `{wanted}`, it has {listed}")))
        };
        let outputs = graph.main().outputs();
        let output = match &options.output {
            None => outputs.first().copied(),
            Some(wanted) => outputs.iter().find(|&&v| name(graph, v) == wanted).copied(),
        };
        let output = output.ok_or_else(|| {
            Error::Roles(format!("the denoiser has no output `{}`", options.output.as_deref().unwrap_or_default()))
        })?;
        let unclear = |what: &str| {
            Error::Roles(format!(
                "which input is the {what} is not clear, --io {what}=NAME says it; there are {listed}"
            ))
        };
        let latent = match &options.latent {
            Some(wanted) => find(wanted)?,
            None => {
                let fits = |v: &ValueId| {
                    let shapes = shape(graph, *v).zip(shape(graph, output));
                    let wide = |shape: &Shape| shape.dims.len() >= 2;
                    let floats = elem(graph, *v).is_none_or(DataType::is_float);
                    floats && shapes.is_none_or(|(a, b)| wide(a) && alike(a, b))
                };
                let taken =
                    |v: &&ValueId| !options.conditions.iter().chain(&options.time).any(|n| n == name(graph, **v));
                let candidates: Vec<ValueId> = inputs.iter().filter(taken).copied().filter(fits).collect();
                choose(graph, &candidates, LATENT_NAMES).ok_or_else(|| unclear("latent"))?
            }
        };
        let time = match &options.time {
            Some(wanted) => find(wanted)?,
            None => {
                let fits = |v: &ValueId| {
                    *v != latent
                        && !options.conditions.iter().any(|n| n == name(graph, *v))
                        && shape(graph, *v).is_none_or(|s| s.dims.len() <= 2)
                };
                let candidates: Vec<ValueId> = inputs.iter().copied().filter(fits).collect();
                choose(graph, &candidates, TIME_NAMES).ok_or_else(|| unclear("time"))?
            }
        };
        if latent == time {
            return Err(Error::Roles(format!("`{}` cannot be both latent and time", name(graph, latent))));
        }
        for wanted in options.conditions.iter().chain(options.uncond.iter().map(|(name, _)| name)) {
            let input = find(wanted)?;
            if input == latent || input == time {
                return Err(Error::Roles(format!("`{wanted}` is the latent or the time, and no condition")));
            }
        }
        let condition = |&v: &ValueId| {
            let said = options.uncond.iter().rev().find(|(n, _)| n == name(graph, v));
            Condition { name: name(graph, v).to_owned(), uncond: said.map_or(Uncond::Same, |(_, uncond)| *uncond) }
        };
        Ok(Roles {
            latent: name(graph, latent).to_owned(),
            time: name(graph, time).to_owned(),
            time_value: options.time_value,
            time_scale: options.time_scale.unwrap_or(1.0),
            time_offset: options.time_offset,
            preconditioned: options.preconditioned,
            conditions: inputs.iter().filter(|&&v| v != latent && v != time).map(condition).collect(),
            output: name(graph, output).to_owned(),
        })
    }

    /// What the network is told of the time at a row.
    pub fn time_of(&self, row: &Row) -> f64 {
        let value = match self.time_value {
            TimeValue::Timestep => row.time,
            TimeValue::Sigma => row.level.sigma(),
            TimeValue::CNoise => 0.25 * row.level.sigma().ln(),
        };
        value * self.time_scale + self.time_offset
    }

    /// Whether the unconditional pass differs from the conditional one.
    pub fn guides(&self) -> bool {
        self.conditions.iter().any(|c| c.uncond != Uncond::Same)
    }

    /// The roles in one line: `latent x, time t, condition label (10 without condition), predicts eps`.
    pub fn describe(&self) -> String {
        let mut parts = vec![format!("latent {}", self.latent)];
        let value = match self.time_value {
            TimeValue::Timestep => String::new(),
            value => format!(" ({})", value.name()),
        };
        let scale = if self.time_scale == 1.0 { String::new() } else { format!(" × {}", self.time_scale) };
        let offset = if self.time_offset == 0.0 { String::new() } else { format!(" + {}", self.time_offset) };
        parts.push(format!("time {}{value}{scale}{offset}", self.time));
        for condition in &self.conditions {
            let uncond = match condition.uncond {
                Uncond::Same => String::new(),
                Uncond::Constant(value) => format!(" ({value} without condition)"),
                Uncond::Input => format!(" ({}_uncond without condition)", condition.name),
            };
            parts.push(format!("condition {}{uncond}", condition.name));
        }
        let clean = if self.preconditioned { " (clean)" } else { "" };
        parts.push(format!("predicts {}{clean}", self.output));
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn infer(signature: &str, said: &[&str]) -> Result<Roles, Error> {
        let model = text::parse(&format!("g ({signature}) => (float[n,4,8,8] out) {{ out = Identity (a) }}")).unwrap();
        let said: Vec<String> = said.iter().map(|&s| s.to_owned()).collect();
        Roles::infer(&model, &RoleOptions::parse(&said)?)
    }

    #[test]
    fn shapes_tell_before_names_do() {
        let roles = infer("float[n,4,8,8] a, int64 step, float[n,77,16] text", &["uncond:text=input"]).unwrap();
        assert_eq!(
            roles.describe(),
            "latent a, time step, condition text (text_uncond without condition), predicts out"
        );
        let roles = infer("float[n,4,8,8] a, float[n] t, int64[n] label", &["uncond:label=10", "time-scale=0.001"]);
        let expected = "latent a, time t × 0.001, condition label (10 without condition), predicts out";
        assert_eq!(roles.unwrap().describe(), expected);
    }

    #[test]
    fn networks_are_told_other_things_than_timesteps() {
        let said = ["time-value=c-noise", "time-scale=-1", "time-offset=1", "predicts=clean"];
        let roles = infer("float[n,4,8,8] a, float[n] t", &said).unwrap();
        assert_eq!(roles.describe(), "latent a, time t (c-noise) × -1 + 1, predicts out (clean)");
        let level = |alpha, noise| crate::sampler::Level { alpha, noise }.row(700.0, [0.0, 1.0]);
        let told = |said: &[&str], row: &Row| infer("float[n,4,8,8] a, float[n] t", said).unwrap().time_of(row);
        assert_eq!(told(&["time-value=sigma"], &level(1.0, 80.0)), 80.0);
        assert!((told(&["time-value=sigma"], &level(0.6, 0.8)) - 4.0 / 3.0).abs() < 1e-12);
        // Of a flow it is the share of noise.
        assert_eq!(told(&["time-value=sigma"], &level(0.25, 0.75)), 0.75);
        assert_eq!(told(&["time-value=c-noise"], &level(1.0, 1.0)), 0.0);
        assert!((told(&["time-scale=-0.001", "time-offset=1"], &level(1.0, 2.0)) - 0.3).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_clear_is_asked() {
        let refused = |signature: &str, said: &[&str]| infer(signature, said).unwrap_err().to_string();
        assert!(refused("float[n,4,8,8] a, float[n,4,8,8] b, int64 t", &[]).contains("--io latent=NAME"));
        assert!(refused("float[n,4,8,8] a, float[n] p, int64[n] q", &[]).contains("--io time=NAME"));
        assert!(refused("float[n,4,8,8] a, float[n] t", &["cond=b"]).contains("no input `b`, it has `a`, `t`"));
        assert!(refused("float[n,4,8,8] a, float[n] t", &["uncond:t=1"]).contains("no condition"));
        assert!(refused("float[n,4,8,8] a, float[n] t", &["guide=1"]).contains("uncond:NAME="));
        assert!(refused("float[n,4,8,8] a, float[n] t", &["time-value=t"]).contains("sigma or c-noise"));
        assert!(refused("float[n,4,8,8] a, float[n] t", &["predicts=eps"]).contains("predicts=clean"));
        assert!(refused("float[n,4,8,8] a, float[n] t", &["latent=a", "time=a"]).contains("both latent and time"));
        let said = infer("float[n,4,8,8] a, float[n,4,8,8] b, int64 t", &["latent=b"]).unwrap();
        assert_eq!((said.latent.as_str(), said.conditions[0].name.as_str()), ("b", "a"));
    }
}
