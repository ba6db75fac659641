//! What a policy's chunk of numbers stands for: which of them are actions, and in which units.

use super::{Error, Fields, pipelines::Stage};
use lathe_ir::{DataType, Dim, Model, Node};
use serde_json::Value;

/// The pairs of statistics by which numbers are brought to a common size, in the words of LeRobot: what they are called,
/// and the fields.
const MODES: [(&str, [&str; 2]); 3] =
    [("mean_std", ["mean", "std"]), ("min_max", ["min", "max"]), ("quantiles", ["q01", "q99"])];

/// Which numbers of a chunk are actions, and how they are read.
#[derive(Debug, Clone, PartialEq)]
pub struct Actions {
    /// The first step that is kept.
    start: usize,
    /// How many steps are kept; all that there are without it.
    steps: Option<usize>,
    /// An action is the number times this.
    factors: Vec<f64>,
    /// And this is added.
    offsets: Vec<f64>,
}

impl Actions {
    /// Reads statistics of actions: `mean` and `std`, or `min` and `max` or `q01` and `q99`, which stand for -1 and 1. Where
    /// there are several, `mode` says which. `start` and `steps` say which steps of a chunk are kept. All of it may stand
    /// under `action`.
    pub fn parse(json: &Value) -> Result<Actions, Error> {
        let fields = Fields::of(json.get("action").unwrap_or(json))?;
        let there = |[a, b]: [&str; 2]| fields.get(a).is_some() && fields.get(b).is_some();
        let known: Vec<(&str, [&str; 2])> = MODES.into_iter().filter(|(_, pair)| there(*pair)).collect();
        let mode = fields.word("mode", None, &MODES.map(|(name, pair)| (name, Some(pair))))?;
        let [a, b] = match (mode, known.as_slice()) {
            (Some(pair), _) => pair,
            (None, [(_, pair)]) => *pair,
            (None, []) => {
                let message =
                    "the statistics of actions hold neither `mean` and `std` nor `min` and `max` nor `q01` and `q99`";
                return Err(Error::Roles(message.to_owned()));
            }
            (None, several) => {
                let names: Vec<&str> = several.iter().map(|(name, _)| *name).collect();
                let message =
                    format!("the statistics of actions are of several modes; `mode` says which: {}", names.join(", "));
                return Err(Error::Roles(message));
            }
        };
        let numbers = |field: &str| {
            let missing = || Error::Roles(format!("the statistics of actions have no `{field}`"));
            fields.numbers(field)?.filter(|n| !n.is_empty()).ok_or_else(missing)
        };
        let (first, second) = (numbers(a)?, numbers(b)?);
        if first.len() != second.len() {
            let message = format!("`{a}` of actions has {} numbers, and `{b}` {}", first.len(), second.len());
            return Err(Error::Roles(message));
        }
        let pairs = first.iter().zip(&second);
        let (factors, offsets) = match a {
            "mean" => pairs.map(|(mean, std)| (*std, *mean)).unzip(),
            _ => pairs.map(|(low, high)| ((high - low) / 2.0, (high + low) / 2.0)).unzip(),
        };
        let start =
            if fields.get("start").and_then(Value::as_u64) == Some(0) { 0 } else { fields.count("start", 0)? };
        let steps = fields.get("steps").map(|_| fields.count("steps", 1)).transpose()?;
        Ok(Actions { start, steps, factors, offsets })
    }

    /// The model that makes `actions` of a `sample` of these sizes: chunks of steps, each with as many numbers as there are
    /// statistics, and others behind them that are left out.
    pub fn tail(&self, sample: Vec<Dim>, opset: i64) -> Result<Model, Error> {
        let [_, steps, numbers] = sample.as_slice() else {
            let dims: Vec<String> = sample.iter().map(ToString::to_string).collect();
            let message = format!("actions are read off samples of three axes, and this one is [{}]", dims.join(", "));
            return Err(Error::Roles(message));
        };
        let wanted = self.factors.len() as i64;
        if let Some(found) = numbers.known().filter(|found| *found < wanted) {
            let message = format!("a step of the sample has {found} numbers, and the statistics of actions {wanted}");
            return Err(Error::Roles(message));
        }
        let end = self.steps.map_or(i64::MAX, |steps| (self.start + steps) as i64);
        let enough = |found: i64| if self.steps.is_some() { found >= end } else { found > self.start as i64 };
        if let Some(found) = steps.known().filter(|found| !enough(*found)) {
            let last = if self.steps.is_some() { end - 1 } else { self.start as i64 };
            let message =
                format!("a chunk of the sample has {found} steps, and actions are asked for to step {last} from 0");
            return Err(Error::Roles(message));
        }
        let mut stage = Stage::of("actions", &[], opset);
        let sample = stage.input("sample", DataType::Float, sample);
        let bounds = [[self.start as i64, 0], [end, wanted], [1, 2]].map(|pair| stage.int64s(&pair, "bounds"));
        let kept = stage.node(Node::new("Slice"), &[sample, bounds[0], bounds[1], bounds[2]], "kept");
        let actions = stage.affine(kept, &self.factors, &self.offsets, (2, 3));
        stage.output("actions", actions);
        stage.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::Tensor;
    use serde_json::json;

    fn given(json: &Value, dims: [i64; 3], numbers: &[f32]) -> Result<(Vec<usize>, Vec<f32>), Error> {
        let tail = Actions::parse(json)?.tail(dims.map(Dim::Known).to_vec(), crate::sampler::OPSET)?;
        let sample = Tensor::from_f32s(&dims.map(|d| d as usize), numbers);
        let found = lathe_testkit::evaluator().run(&tail, &[("sample".to_owned(), sample)]).unwrap().remove(0).1;
        Ok((found.dims().to_vec(), found.to_f32s().unwrap()))
    }

    #[test]
    fn numbers_become_actions_by_their_statistics() {
        let chunk = [1.0, -1.0, 9.0, 0.5, 0.0, 9.0, 0.0, 1.0, 9.0];
        let standard = json!({"mean": [1.0, 2.0], "std": [10.0, 100.0]});
        assert_eq!(
            given(&standard, [1, 3, 3], &chunk).unwrap(),
            (vec![1, 3, 2], vec![11.0, -98.0, 6.0, 2.0, 1.0, 102.0])
        );
        let range = json!({"action": {"min": [0.0, -4.0], "max": [2.0, 4.0], "start": 1, "steps": 1}});
        assert_eq!(given(&range, [1, 3, 3], &chunk).unwrap(), (vec![1, 1, 2], vec![1.5, 0.0]));
        let quantiles =
            json!({"mean": [1.0], "std": [1.0], "q01": [0.0], "q99": [4.0], "mode": "quantiles", "start": 0});
        assert_eq!(given(&quantiles, [1, 3, 3], &chunk).unwrap(), (vec![1, 3, 1], vec![4.0, 3.0, 2.0]));
    }

    #[test]
    fn statistics_that_do_not_fit_are_refused() {
        let refused = |json: Value, dims: [i64; 3]| given(&json, dims, &[0.0; 6]).unwrap_err().to_string();
        let two = json!({"mean": [0.0, 0.0], "std": [1.0, 1.0]});
        assert!(refused(json!({"mean": [0.0]}), [1, 2, 3]).contains("neither `mean` and `std`"));
        assert!(refused(json!({"mean": [0.0], "std": [1.0, 2.0]}), [1, 2, 3]).contains("has 1 numbers, and `std` 2"));
        let several = json!({"mean": [0.0], "std": [1.0], "min": [0.0], "max": [1.0]});
        assert!(refused(several, [1, 2, 3]).contains("`mode` says which: mean_std, min_max"));
        assert!(refused(json!({"mean": [0.0], "std": [1.0], "mode": "min_max"}), [1, 2, 3]).contains("have no `min`"));
        assert!(refused(json!({"mean": [0.0], "std": [1.0], "mode": "none"}), [1, 2, 3]).contains("`mode`"));
        assert!(refused(two.clone(), [1, 6, 1]).contains("has 1 numbers, and the statistics of actions 2"));
        let mut long = two.clone();
        long["steps"] = json!(4);
        assert!(refused(long, [1, 2, 3]).contains("has 2 steps, and actions are asked for to step 3"));
        let mut late = two;
        late["start"] = json!(2);
        assert!(refused(late, [1, 2, 3]).contains("has 2 steps, and actions are asked for to step 2"));
    }
}
