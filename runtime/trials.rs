//! How far the outputs of variants of a model are from the model's own.
//!
//! A variant has inputs more than the model, *gates*: one loaded session serves every assignment of numbers to them. The
//! model runs once per batch, the variant once per batch and assignment, and only distances are kept.

use crate::{
    Child, Datum, Distance, Engine, LoadOptions, RuntimeError, Sample, SampleSet, Session, SetSpec, Source,
    StatisticsError, Talk,
};
use lathe_analysis::may_leave;
use lathe_ir::{DataType, Model, Tensor};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Numbers for gates, by the names of inputs.
pub type Gates = Vec<(String, f32)>;

/// Two models on disk and what to run them on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The model.
    pub reference: PathBuf,
    /// The variant.
    pub variant: PathBuf,
    /// The inputs.
    pub set: SetSpec,
    /// One run of the set for each.
    pub gates: Vec<Gates>,
    /// How outputs are compared.
    pub distance: Distance,
    /// How to run them.
    pub options: LoadOptions,
}

/// The mean distance of the outputs of `variant` from those of `reference` over the samples of `set`, once for every
/// assignment of its gates; infinite where an output is not finite.
///
/// Outputs that are caches or attention maps by their names count only where there are no others.
pub fn trials(
    child: &Child,
    reference: &Model,
    variant: &Model,
    set: &SetSpec,
    gates: &[Gates],
    distance: Distance,
    load: &LoadOptions,
) -> Result<Vec<f64>, StatisticsError> {
    if gates.is_empty() {
        return Ok(Vec::new());
    }
    let failed = |source| StatisticsError::Io { path: std::env::temp_dir(), source };
    let scratch = tempfile::tempdir().map_err(failed)?;
    let file = |name: &str, model: &Model| -> Result<PathBuf, StatisticsError> {
        let folder = scratch.path().join(name);
        std::fs::create_dir(&folder).map_err(failed)?;
        let path = folder.join("model.onnx");
        model.write_linked(&path)?;
        Ok(path)
    };
    let job = Job {
        reference: file("reference", reference)?,
        variant: file("variant", variant)?,
        set: set.clone(),
        gates: gates.to_vec(),
        distance,
        options: LoadOptions { lean: true, ..load.clone() },
    };
    Ok(child.trials(&job)?)
}

/// Runs a job; `None` stands for a distance that is not finite.
pub(crate) fn serve(engine: &dyn Engine, job: &Job, talk: &mut dyn Talk) -> Result<Vec<Option<f64>>, String> {
    talk.stage("opening the set");
    let said = |e: RuntimeError| e.to_string();
    let read = |path: &PathBuf| Model::read(path).map(|loaded| loaded.model).map_err(|e| e.to_string());
    let (model, variant) = (read(&job.reference)?, read(&job.variant)?);
    let set = SampleSet::open(&job.set, &model).map_err(|e| e.to_string())?;
    let compared = compared(&model, &variant)?;
    let gates = job.gates.iter().map(|gates| tensors(&variant, gates)).collect::<Result<Vec<_>, _>>()?;
    let feeds: Vec<String> =
        variant.graph.main().inputs().iter().map(|&v| variant.graph.value(v).name.clone()).collect();
    drop((model, variant));
    talk.stage("loading the model");
    let mut original = engine.load(Source::Path(&job.reference), &job.options).map_err(said)?;
    talk.stage("loading a variant of the model");
    let mut session = engine.load(Source::Path(&job.variant), &job.options).map_err(said)?;
    let mut sums = vec![0.0; gates.len()];
    let (mut samples, mut runs) = (0, 0);
    for batch in set.batches() {
        let batch = batch.map_err(|e| e.to_string())?;
        talk.stage("running the model");
        let mut expected = Vec::new();
        visit(original.as_mut(), &batch.inputs, &compared, &mut |name, tensor| {
            expected.push((name.to_owned(), Expected::of(tensor, job.distance, batch.samples)?));
            Ok(())
        })?;
        let inputs: Sample = batch.inputs.into_iter().filter(|(name, _)| feeds.contains(name)).collect();
        for (sum, gates) in sums.iter_mut().zip(&gates) {
            runs += 1;
            talk.stage(&format!("running variant {runs} of the model"));
            let all: Sample = inputs.iter().chain(gates).cloned().collect();
            let mut rise = 0.0;
            visit(session.as_mut(), &all, &compared, &mut |name, tensor| {
                let of = expected.iter().find(|(n, _)| n == name).ok_or_else(|| format!("`{name}` is no output"))?;
                rise += of.1.distance(name, tensor)?;
                Ok(())
            })?;
            *sum += rise * batch.samples as f64;
            talk.progress(runs, gates_in_all(set.batch_count(), job), "runs of variants");
        }
        samples += batch.samples;
    }
    if samples == 0 {
        return Err("the set holds no samples".to_owned());
    }
    let mean = |sum: f64| Some(sum / samples as f64).filter(|d| d.is_finite());
    Ok(sums.into_iter().map(mean).collect())
}

fn gates_in_all(batches: usize, job: &Job) -> usize {
    batches * job.gates.len()
}

/// The outputs that count: float ones of the model that are no by-products.
fn compared(model: &Model, variant: &Model) -> Result<Vec<String>, String> {
    let names = |model: &Model| -> Vec<String> {
        model.graph.main().outputs().iter().map(|&v| model.graph.value(v).name.clone()).collect()
    };
    let (mut own, given) = (names(model), names(variant));
    if own.iter().any(|name| !may_leave(name)) {
        own.retain(|name| !may_leave(name));
    }
    match own.iter().find(|name| !given.contains(name)) {
        Some(name) => Err(format!("the variant has no output `{name}`")),
        None => Ok(own),
    }
}

/// One number for every gate, in the shape its input states.
fn tensors(variant: &Model, gates: &Gates) -> Result<Sample, String> {
    let graph = &variant.graph;
    let tensor = |(name, number): &(String, f32)| {
        let input = graph.main().inputs().iter().find(|&&v| graph.value(v).name == *name);
        let input = input.ok_or_else(|| format!("the variant has no input `{name}`"))?;
        let ndim = graph.value(*input).ty.as_ref().and_then(|ty| ty.shape()).map_or(0, |shape| shape.dims.len());
        Ok((name.clone(), Tensor::from_f32s(&vec![1; ndim], &[*number])))
    };
    gates.iter().map(tensor).collect()
}

/// Runs and hands over the outputs that count and are float tensors.
fn visit(
    session: &mut dyn Session,
    inputs: &Sample,
    compared: &[String],
    take: &mut dyn FnMut(&str, &Tensor) -> Result<(), String>,
) -> Result<(), String> {
    let mut wrong = None;
    let visited = session.visit(inputs, &mut |name, datum| {
        if wrong.is_none() && compared.iter().any(|c| c == name) {
            wrong = match &datum {
                Datum::Tensor(tensor) if tensor.dtype().is_float() => take(name, tensor).err(),
                Datum::Tensor(_) => None,
                other => Some(format!("output `{name}` is {}, not a tensor", other.describe())),
            };
        }
        Ok(())
    });
    visited.map_err(|e| e.to_string())?;
    wrong.map_or(Ok(()), Err)
}

/// An output of the model, as far as distances from it need it.
struct Expected {
    dims: Vec<usize>,
    distance: Distance,
    /// Numbers in a row: of a sample, or of the last axis.
    row: usize,
    /// The output itself, or the probabilities of its softmax.
    numbers: Vec<f32>,
    /// Of every row: its squared norm, or Σ p log p.
    norms: Vec<f64>,
}

impl Expected {
    fn of(tensor: &Tensor, distance: Distance, samples: usize) -> Result<Expected, String> {
        let dims = tensor.dims().to_vec();
        let mut numbers = floats(tensor)?;
        let per_sample = samples > 0 && dims.first().is_some_and(|&d| d % samples == 0);
        let row = match distance {
            Distance::Divergence => dims.last().copied().unwrap_or(1),
            Distance::Relative if per_sample => numbers.len() / samples,
            Distance::Relative => numbers.len(),
        };
        let row = row.max(1);
        let norm = |row: &mut [f32]| match distance {
            Distance::Relative => row.iter().map(|&x| f64::from(x) * f64::from(x)).sum(),
            Distance::Divergence => {
                let scale = log_sum(row);
                let mut sum = 0.0;
                for x in row {
                    let log = f64::from(*x) - scale;
                    *x = log.exp() as f32;
                    // A probability of zero adds nothing, whatever its logarithm.
                    sum += if *x > 0.0 { f64::from(*x) * log } else { 0.0 };
                }
                sum
            }
        };
        let norms = numbers.chunks_mut(row).map(norm).collect();
        Ok(Expected { dims, distance, row, numbers, norms })
    }

    /// The mean distance of the rows of another tensor.
    fn distance(&self, name: &str, tensor: &Tensor) -> Result<f64, String> {
        if tensor.dims() != self.dims {
            return Err(format!("output `{name}` is {:?} and becomes {:?}", self.dims, tensor.dims()));
        }
        let numbers = floats(tensor)?;
        let rows = self.numbers.chunks(self.row).zip(numbers.chunks(self.row)).zip(&self.norms);
        let distances = rows.map(|((expected, found), &norm)| match self.distance {
            Distance::Relative => {
                let off = |(&a, &b): (&f32, &f32)| (f64::from(a) - f64::from(b)).powi(2);
                let sum: f64 = expected.iter().zip(found).map(off).sum();
                sum / norm.max(f64::from(f32::MIN_POSITIVE))
            }
            Distance::Divergence => {
                let mean: f64 = expected.iter().zip(found).map(|(&p, &x)| f64::from(p) * f64::from(x)).sum();
                // Rounding may leave less than nothing.
                (norm - mean + log_sum(found)).max(0.0)
            }
        });
        Ok(distances.sum::<f64>() / self.norms.len().max(1) as f64)
    }
}

/// log Σ exp, without overflow; NaN where a number is one.
fn log_sum(row: &[f32]) -> f64 {
    let most = row.iter().fold(f32::NEG_INFINITY, |most, &x| if x.is_nan() { x } else { most.max(x) });
    f64::from(most) + row.iter().map(|&x| f64::from((x - most).exp())).sum::<f64>().ln()
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>, String> {
    if tensor.dtype() == DataType::Float
        && let Some(numbers) = tensor.to_f32s()
    {
        return Ok(numbers);
    }
    let numbers = tensor.to_f64s().ok_or_else(|| format!("an output of type {} has no numbers", tensor.dtype()))?;
    Ok(numbers.iter().map(|&x| x as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        NpzWriter,
        testing::{Build, engine},
    };
    use lathe_ir::{Node, Type};

    /// `y = x + gate · x`, or without a gate `y = x`.
    fn model(gated: bool) -> Model {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        if !gated {
            let y = build.node(Node::new("Identity"), &[x], "y");
            return build.output(y, Type::unshaped(DataType::Float)).model();
        }
        let gate = build.input("gate", DataType::Float, &[]);
        let more = build.node(Node::new("Mul"), &[x, gate], "more");
        let y = build.node(Node::new("Add"), &[x, more], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    fn run(distance: Distance, gates: &[f32]) -> Vec<Option<f64>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        let mut npz = NpzWriter::create(&path).unwrap();
        npz.add("x", &Tensor::from_f32s(&[2, 3], &[1.0, 2.0, 3.0, -1.0, 0.5, 2.0])).unwrap();
        npz.finish().unwrap();
        let file = |name: &str, model: Model| {
            let path = folder.path().join(name);
            model.write_linked(&path).unwrap();
            path
        };
        let job = Job {
            reference: file("reference.onnx", model(false)),
            variant: file("variant.onnx", model(true)),
            set: SetSpec::all(&path),
            gates: gates.iter().map(|&g| vec![("gate".to_owned(), g)]).collect(),
            distance,
            options: LoadOptions::default(),
        };
        serve(engine(), &job, &mut |_: &str| {}).unwrap()
    }

    #[test]
    fn one_session_serves_every_assignment() {
        let found = run(Distance::Relative, &[0.0, 0.5, -1.0, f32::NAN]);
        assert_eq!(found, [Some(0.0), Some(0.25), Some(1.0), None]);
    }

    #[test]
    fn divergence_is_the_mean_over_rows() {
        let softmax = |row: &[f64]| {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x.exp() / sum).collect::<Vec<_>>()
        };
        let rows = [[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]];
        let expected: f64 = rows
            .iter()
            .map(|row| {
                let (p, q) = (softmax(row), softmax(&row.map(|x| 1.5 * x)));
                p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>() / 2.0
            })
            .sum();
        let found = run(Distance::Divergence, &[0.0, 0.5]);
        assert!(found[0].unwrap() < 1e-6, "{found:?}");
        assert!((found[1].unwrap() - expected).abs() < 1e-6, "{found:?} is not {expected}");
    }
}
