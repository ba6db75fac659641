//! What a sampler does at each step, as data: the one language in which every diffusion trick is written.
//!
//! A plan says at which timesteps the network runs, which passes guide it, and which tensors inside it (cuts) are not
//! computed but made from what earlier steps left. A method only writes entries; the emitter turns any plan into a graph.

use super::{Error, Sizes};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// One of the two evaluations of a guided step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// With the condition.
    Cond,
    /// Without it.
    Uncond,
}

/// Which evaluations a step makes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Mode {
    /// The conditional one: `0`.
    Conditional,
    /// Both, joined with the scale of the sampler: `1`.
    Guided,
    /// Both, joined with a scale of this step: `{"scale": 5.0}`.
    Scaled(f64),
    /// The unconditional one: `"uncond"`.
    Unconditional,
}

impl From<Mode> for Value {
    fn from(mode: Mode) -> Value {
        match mode {
            Mode::Conditional => 0.into(),
            Mode::Guided => 1.into(),
            Mode::Scaled(scale) => serde_json::json!({ "scale": scale }),
            Mode::Unconditional => "uncond".into(),
        }
    }
}

/// What stands in the place of a mode.
#[derive(Debug, thiserror::Error)]
#[error("`cfg` holds {0}, expected 0, 1, \"uncond\" or {{\"scale\": number}}")]
pub struct NoMode(Value);

impl TryFrom<Value> for Mode {
    type Error = NoMode;

    fn try_from(value: Value) -> Result<Mode, NoMode> {
        let scale = value.get("scale").and_then(Value::as_f64).filter(|s| s.is_finite());
        match (value.as_f64(), value.as_str(), scale) {
            (Some(0.0), ..) => Ok(Mode::Conditional),
            (Some(1.0), ..) => Ok(Mode::Guided),
            (_, Some("uncond"), _) => Ok(Mode::Unconditional),
            (_, _, Some(scale)) => Ok(Mode::Scaled(scale)),
            _ => Err(NoMode(value)),
        }
    }
}

impl Mode {
    /// The passes of the step.
    pub fn passes(self) -> &'static [Pass] {
        match self {
            Mode::Conditional => &[Pass::Cond],
            Mode::Unconditional => &[Pass::Uncond],
            Mode::Guided | Mode::Scaled(_) => &[Pass::Cond, Pass::Uncond],
        }
    }

    /// Whether the step joins two passes.
    pub fn is_guided(self) -> bool {
        self.passes().len() == 2
    }
}

/// What a cut, or another tensor, was at a step.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ref {
    /// The tensor: a value of the denoiser by name, or the latent as the denoiser sees it; without it, the cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// The step, counted from 0.
    pub step: usize,
    /// The pass; without it, the one that the substitution is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass: Option<Pass>,
}

impl From<usize> for Ref {
    fn from(step: usize) -> Ref {
        Ref { of: None, step, pass: None }
    }
}

impl Ref {
    /// Another tensor than the cut.
    pub fn of(tensor: impl Into<String>, step: usize) -> Ref {
        Ref { of: Some(tensor.into()), step, pass: None }
    }
}

/// What takes the place of a cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Kind {
    /// What the cut was at an earlier step.
    Reuse {
        /// That step.
        #[serde(rename = "ref")]
        from: usize,
    },
    /// What enters a range of blocks, plus what the range added at an earlier step.
    Delta {
        /// The tensor that enters the range.
        #[serde(rename = "in")]
        input: String,
        /// That step.
        #[serde(rename = "ref")]
        from: usize,
    },
    /// What the cut was at an earlier step, times a number.
    Scale {
        /// That step.
        #[serde(rename = "ref")]
        from: usize,
        /// The number.
        factor: f64,
    },
    /// A Taylor series in the step, with divided differences of earlier steps for derivatives.
    Taylor {
        /// The order; one more step than this is needed.
        order: usize,
        /// The steps, the latest first.
        refs: Vec<usize>,
    },
    /// The polynomial through the values of earlier steps.
    Lagrange {
        /// The steps, in any order.
        refs: Vec<usize>,
    },
    /// A weighted sum of any tensors; it may refer to the step itself, whose tensor is then computed.
    Affine {
        /// What is summed.
        refs: Vec<Ref>,
        /// The weights.
        coefs: Vec<f64>,
    },
}

/// A cut that is not computed, or not as it stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Substitution {
    /// The tensor: a value of the denoiser by name, its output included.
    pub cut: String,
    /// The pass it is made in; without it, in every pass of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass: Option<Pass>,
    /// What takes its place.
    #[serde(flatten)]
    pub kind: Kind,
}

/// A weighted sum of what tensors were at several steps.
pub type Terms = Vec<(Ref, f64)>;

impl Substitution {
    /// A substitution in every pass.
    pub fn new(cut: impl Into<String>, kind: Kind) -> Substitution {
        Substitution { cut: cut.into(), pass: None, kind }
    }

    /// The substitution at `step` as a weighted sum of tensors at some steps; `None` for a delta, which is a sum of
    /// differences instead.
    pub fn terms(&self, step: usize) -> Option<Terms> {
        let at = step as f64;
        Some(match &self.kind {
            Kind::Delta { .. } => return None,
            Kind::Reuse { from } => vec![(Ref::from(*from), 1.0)],
            Kind::Scale { from, factor } => vec![(Ref::from(*from), *factor)],
            Kind::Taylor { order, refs } => {
                let steps: Vec<f64> = refs.iter().take(order + 1).map(|&r| r as f64).collect();
                refs.iter().map(|&r| Ref::from(r)).zip(taylor(&steps, at)).collect()
            }
            Kind::Lagrange { refs } => {
                let steps: Vec<f64> = refs.iter().map(|&r| r as f64).collect();
                refs.iter().map(|&r| Ref::from(r)).zip(lagrange(&steps, at)).collect()
            }
            Kind::Affine { refs, coefs } => refs.iter().cloned().zip(coefs.iter().copied()).collect(),
        })
    }

    /// The steps it refers to.
    pub fn refs(&self) -> Vec<Ref> {
        match &self.kind {
            Kind::Reuse { from } | Kind::Delta { from, .. } | Kind::Scale { from, .. } => vec![Ref::from(*from)],
            Kind::Taylor { refs, .. } | Kind::Lagrange { refs } => refs.iter().map(|&r| Ref::from(r)).collect(),
            Kind::Affine { refs, .. } => refs.clone(),
        }
    }

    /// Whether it is made in this pass.
    pub fn is_in(&self, pass: Pass) -> bool {
        self.pass.is_none_or(|p| p == pass)
    }

    fn check(&self, step: usize, plan: &StepPlan) -> Result<(), Error> {
        let what = format!("the substitution of `{}` at step {step}", self.cut);
        let enough = match &self.kind {
            Kind::Taylor { order, refs } => refs.len() == order + 1 && refs.windows(2).all(|pair| pair[0] > pair[1]),
            Kind::Lagrange { refs } => !refs.is_empty() && refs.iter().enumerate().all(|(k, r)| !refs[..k].contains(r)),
            Kind::Affine { refs, coefs } => refs.len() == coefs.len() && coefs.iter().all(|c| c.is_finite()),
            Kind::Scale { factor, .. } => factor.is_finite(),
            Kind::Reuse { .. } | Kind::Delta { .. } => true,
        };
        if !enough {
            return Err(Error::Plan(format!(
                "{what} needs other references: a Taylor series one more than its order, the latest first; a polynomial \
                 different ones; a sum as many as weights"
            )));
        }
        let itself = matches!(self.kind, Kind::Affine { .. });
        for r in self.refs() {
            if r.step > step || (r.step == step && !itself) {
                return Err(Error::Plan(format!("{what} refers to step {}, which is not earlier", r.step)));
            }
            if plan.sizes.as_ref().is_some_and(|sizes| !sizes.are_joined(r.step, step)) {
                let message = format!("{what} refers to step {}, beyond a border where the size changes", r.step);
                return Err(Error::Plan(message));
            }
            for &pass in plan.cfg[step].passes().iter().filter(|&&p| self.is_in(p)) {
                let pass = r.pass.unwrap_or(pass);
                if !plan.cfg[r.step].passes().contains(&pass) {
                    return Err(Error::Plan(format!("{what} refers to step {}, which has no such pass", r.step)));
                }
            }
        }
        Ok(())
    }
}

/// Weights of a Taylor series at `at` around the first of `steps`, with divided differences for derivatives.
///
/// Beyond the first order it is not exact on polynomials, because a difference belongs to the middle of its interval.
fn taylor(steps: &[f64], at: f64) -> Vec<f64> {
    let count = steps.len();
    // differences[j][k] is the weight of value k in the current difference at step j.
    let mut differences: Vec<Vec<f64>> =
        (0..count).map(|j| (0..count).map(|k| f64::from(u8::from(j == k))).collect()).collect();
    let mut weights = differences[0].clone();
    let mut factor = 1.0;
    for order in 1..count {
        factor *= (at - steps[0]) / order as f64;
        for j in 0..count - order {
            let gap = steps[j] - steps[j + 1];
            differences[j] = (0..count).map(|k| (differences[j][k] - differences[j + 1][k]) / gap).collect();
        }
        for (weight, difference) in weights.iter_mut().zip(&differences[0]) {
            *weight += factor * difference;
        }
    }
    weights
}

/// Weights of the polynomial through values at `steps`, evaluated at `at`.
fn lagrange(steps: &[f64], at: f64) -> Vec<f64> {
    let weight = |j: usize| {
        let others = steps.iter().enumerate().filter(|(l, _)| *l != j);
        others.map(|(_, l)| (at - l) / (steps[j] - l)).product()
    };
    (0..steps.len()).map(weight).collect()
}

/// A rule that decides at run time which steps are computed: Zhou et al. 2025, EasyCache, arXiv:2507.02860.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Adaptive {
    /// A step is computed when the estimated change of the output since the last one reaches this share of it; infinite
    /// (`null` in JSON) computes no step between the first and the last ones.
    #[serde(deserialize_with = "null_is_infinite")]
    pub threshold: f64,
    /// This many first steps are computed.
    pub warmup: usize,
    /// So many last steps are computed.
    pub tail: usize,
}

/// JSON has no infinity, so it is written as `null`.
fn null_is_infinite<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// What a plan was made for; it does not carry over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// A hash of the denoiser.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The scale of guidance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    /// The shape of the latent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shape: Vec<i64>,
}

/// What a sampler does at each step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// The timesteps, noisy ones first.
    pub grid: Vec<f64>,
    /// The solver: `ddim`.
    pub solver: String,
    /// Which passes each step makes.
    pub cfg: Vec<Mode>,
    /// What is not computed, by step.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", with = "steps")]
    pub steps: BTreeMap<usize, Vec<Substitution>>,
    /// Height and width of each step; without them, those of the noise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sizes: Option<Sizes>,
    /// The rule that decides at run time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<Adaptive>,
    /// What it was made for.
    #[serde(default)]
    pub key: Key,
    /// What speaks for it: measurements of whoever made it.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub evidence: Map<String, Value>,
}

impl StepPlan {
    /// The plan that computes everything.
    pub fn plain(solver: &str, grid: Vec<f64>, mode: Mode) -> StepPlan {
        StepPlan {
            cfg: vec![mode; grid.len()],
            grid,
            solver: solver.to_owned(),
            steps: BTreeMap::new(),
            sizes: None,
            adaptive: None,
            key: Key::default(),
            evidence: Map::new(),
        }
    }

    /// Reads a plan and checks that it makes sense by itself.
    pub fn parse(json: &str) -> Result<StepPlan, Error> {
        let plan: StepPlan =
            serde_json::from_str(json).map_err(|e| Error::Plan(format!("the plan is not one: {e}")))?;
        plan.check()?;
        Ok(plan)
    }

    /// The plan as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan has only names and numbers")
    }

    /// Checks that every step has a mode and refers to earlier steps only.
    pub fn check(&self) -> Result<(), Error> {
        let plan = |message: String| Err(Error::Plan(message));
        if self.cfg.len() != self.grid.len() {
            return plan(format!("the plan has {} timesteps and {} modes", self.grid.len(), self.cfg.len()));
        }
        if let Some(step) = self.steps.keys().find(|&&step| step >= self.grid.len()) {
            return plan(format!("the plan has {} steps and substitutions at step {step}", self.grid.len()));
        }
        if let Some(sizes) = &self.sizes {
            sizes.check(self.grid.len())?;
        }
        for (&step, substitutions) in &self.steps {
            for (index, one) in substitutions.iter().enumerate() {
                one.check(step, self)?;
                let twice = |other: &Substitution| {
                    other.cut == one.cut && (other.pass.is_none() || one.pass.is_none() || other.pass == one.pass)
                };
                if substitutions[..index].iter().any(twice) {
                    return plan(format!("`{}` is substituted twice at step {step}", one.cut));
                }
            }
        }
        let Some(adaptive) = &self.adaptive else { return Ok(()) };
        if adaptive.threshold.is_nan() || adaptive.threshold < 0.0 || adaptive.warmup < 2 {
            return plan("the adaptive rule needs a threshold of at least 0 and a warm-up of at least 2".to_owned());
        }
        if !self.steps.is_empty() || self.sizes.is_some() || self.cfg.iter().any(|mode| *mode != self.cfg[0]) {
            return plan("a plan that decides at run time computes every step in the same way".to_owned());
        }
        Ok(())
    }

    /// Whether a step has another size than the one before it, so that nothing is left from earlier ones.
    pub fn begins_stage(&self, step: usize) -> bool {
        self.sizes.as_ref().is_some_and(|sizes| step > 0 && !sizes.are_joined(step - 1, step))
    }

    /// The substitutions of a step.
    pub fn at(&self, step: usize) -> &[Substitution] {
        self.steps.get(&step).map_or(&[], Vec::as_slice)
    }
}

/// Steps are the keys of an object, as text.
mod steps {
    use super::{BTreeMap, Substitution};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    type Steps = BTreeMap<usize, Vec<Substitution>>;

    pub(super) fn serialize<S: Serializer>(steps: &Steps, serializer: S) -> Result<S::Ok, S::Error> {
        steps.iter().map(|(k, v)| (k.to_string(), v)).collect::<BTreeMap<_, _>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Steps, D::Error> {
        let named: BTreeMap<String, Vec<Substitution>> = BTreeMap::deserialize(deserializer)?;
        let number = |(key, value): (String, Vec<Substitution>)| {
            let step = key.parse().map_err(|_| D::Error::custom(format!("`{key}` is no step")))?;
            Ok((step, value))
        };
        named.into_iter().map(number).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Up;
    use super::*;

    fn forecast(kind: Kind, step: usize, value: &dyn Fn(f64) -> f64) -> f64 {
        let terms = Substitution::new("c", kind).terms(step).unwrap();
        terms.iter().map(|(r, weight)| weight * value(r.step as f64)).sum()
    }

    #[test]
    fn forecasts_are_exact_where_they_should_be() {
        let taylor = |order, refs: &[usize]| Kind::Taylor { order, refs: refs.to_vec() };
        let lagrange = |refs: &[usize]| Kind::Lagrange { refs: refs.to_vec() };
        assert_eq!(forecast(taylor(1, &[6, 3]), 8, &|t| 2.0 * t + 1.0), 17.0);
        // The published series of second order gives 8 for the square of 3.
        assert_eq!(forecast(taylor(2, &[2, 1, 0]), 3, &|t| t * t), 8.0);
        assert!((forecast(lagrange(&[2, 1, 0]), 3, &|t| t * t) - 9.0).abs() < 1e-12);
        assert!((forecast(lagrange(&[9, 6, 4, 1]), 12, &|t| t * t * t - t) - 1716.0).abs() < 1e-9);
    }

    #[test]
    fn plans_survive_json() {
        let json = r#"{
            "grid": [900, 500.5, 100, 3], "solver": "euler", "cfg": [1, {"scale": 2.5}, 0, "uncond"],
            "steps": {"1": [
                {"cut": "b.out", "kind": "delta", "in": "a.in", "ref": 0},
                {"cut": "c", "pass": "uncond", "kind": "affine", "refs": [{"step": 1, "pass": "cond"}, {"step": 0}], "coefs": [2, -1]}
            ]},
            "key": {"guidance": 7.5, "shape": [1, 4, 64, 64]}, "evidence": {"psnr_p10": 29.1}
        }"#;
        let plan = StepPlan::parse(json).unwrap();
        assert_eq!(plan.cfg, [Mode::Guided, Mode::Scaled(2.5), Mode::Conditional, Mode::Unconditional]);
        assert_eq!(plan.at(1)[0].kind, Kind::Delta { input: "a.in".to_owned(), from: 0 });
        assert_eq!(StepPlan::parse(&plan.to_json()).unwrap(), plan);
        let sizes = Some(Sizes { steps: vec![[2, 4], [4, 8]], up: Up::Matched });
        let plan = StepPlan { sizes, ..StepPlan::plain("ddim", vec![9.0, 5.0], Mode::Conditional) };
        assert_eq!(StepPlan::parse(&plan.to_json()).unwrap(), plan);
        let adaptive = Some(Adaptive { threshold: f64::INFINITY, warmup: 2, tail: 1 });
        let plan = StepPlan { adaptive, ..StepPlan::plain("euler", vec![9.0, 5.0], Mode::Conditional) };
        assert_eq!(StepPlan::parse(&plan.to_json()).unwrap(), plan);
    }

    #[test]
    fn plans_that_make_no_sense_are_refused() {
        let refused = |edit: &dyn Fn(&mut StepPlan)| {
            let mut plan = StepPlan::plain("ddim", vec![9.0, 6.0, 3.0], Mode::Conditional);
            edit(&mut plan);
            plan.check().unwrap_err().to_string()
        };
        let sub = |kind: Kind| vec![Substitution::new("c", kind)];
        let at = |step: usize, kind: Kind| refused(&|plan| _ = plan.steps.insert(step, sub(kind.clone())));
        assert!(at(1, Kind::Reuse { from: 1 }).contains("not earlier"));
        assert!(at(7, Kind::Reuse { from: 1 }).contains("at step 7"));
        assert!(at(2, Kind::Taylor { order: 1, refs: vec![1] }).contains("references"));
        assert!(at(2, Kind::Lagrange { refs: vec![1, 1] }).contains("references"));
        assert!(refused(&|plan| plan.cfg.truncate(1)).contains("modes"));
        let twice = [sub(Kind::Reuse { from: 0 }), sub(Kind::Reuse { from: 0 })].concat();
        assert!(refused(&|plan| _ = plan.steps.insert(1, twice.clone())).contains("twice"));
        let uncond = Substitution { pass: Some(Pass::Cond), ..Substitution::new("c", Kind::Reuse { from: 0 }) };
        let wrong = |plan: &mut StepPlan| {
            plan.cfg[0] = Mode::Unconditional;
            plan.steps.insert(1, vec![uncond.clone()]);
        };
        assert!(refused(&wrong).contains("no such pass"));
        let adaptive = Adaptive { threshold: -1.0, warmup: 2, tail: 1 };
        assert!(refused(&|plan| plan.adaptive = Some(adaptive)).contains("threshold"));
        assert!(StepPlan::parse("{}").unwrap_err().to_string().contains("missing field"));
    }
}
