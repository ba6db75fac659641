//! How far the outputs of variants of a model are from the model's own.
//!
//! A variant has inputs more than the model, *gates*: one loaded session serves every assignment of numbers to them. The
//! model runs once per batch, the variant once per batch and assignment, and only distances are kept.

use crate::{
    Child, Datum, Distance, Engine, Gates, LoadOptions, RuntimeError, Sample, SampleSet, Session, SetSpec, Source,
    StatisticsError, Talk,
    wire::{Broken, TrialJob},
};
use lathe_analysis::{Facts, may_leave};
use lathe_ir::{DataType, Graph, Model, ScopeId, Tensor, Type, TypeKind, ValueId};
use std::{collections::BTreeSet, path::PathBuf};

/// The mean distance of the outputs of `variant` from those of `reference` over the samples of `set`, once for every
/// assignment of its gates; infinite where an output has no number where the model's has one.
///
/// Outputs that are caches or attention maps by their names count only where there are no others, and so do outputs of whole
/// numbers and strings.
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
    let job = TrialJob {
        reference: file("reference", reference)?,
        variant: file("variant", variant)?,
        set: set.clone(),
        gates: gates.to_vec(),
        distance,
        broken: Broken::Infinite,
        options: LoadOptions { lean: true, ..load.clone() },
    };
    Ok(child.trials(&job)?)
}

/// Runs a job; `None` stands for a distance that is not finite.
pub(crate) fn serve(engine: &dyn Engine, job: &TrialJob, talk: &mut dyn Talk) -> Result<Vec<Option<f64>>, String> {
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
    let (mut samples, mut runs, mut finite) = (0, 0, None);
    for batch in set.batches() {
        let batch = batch.map_err(|e| e.to_string())?;
        talk.stage("running the model");
        let mut expected = Vec::new();
        visit(original.as_mut(), &batch.inputs, &compared, &mut |name, tensor| {
            expected.push((name, Expected::of(tensor, job.distance, batch.samples)?));
            Ok(())
        })?;
        // Whole numbers and strings stay what they are under small errors: they count where there is nothing else.
        if expected.iter().any(|(_, e)| matches!(e, Expected::Numbers(_))) {
            expected.retain(|(_, e)| matches!(e, Expected::Numbers(_)));
            finite = Some(finite.unwrap_or(0) + expected.iter().map(|(_, e)| e.finite()).sum::<usize>());
        }
        let inputs: Sample = batch.inputs.into_iter().filter(|(name, _)| feeds.contains(name)).collect();
        for (sum, gates) in sums.iter_mut().zip(&gates) {
            runs += 1;
            talk.stage(&format!("running variant {runs} of the model"));
            let all: Sample = inputs.iter().chain(gates).cloned().collect();
            let (mut rise, mut found) = (0.0, 0);
            visit(session.as_mut(), &all, &compared, &mut |name, tensor| {
                if let Some((_, of)) = expected.iter().find(|(n, _)| *n == name) {
                    found += 1;
                    rise += of.distance(tensor, job.broken)?;
                }
                Ok(())
            })?;
            // A member of a sequence that is not there is lost.
            rise += (expected.len() - found) as f64;
            *sum += rise * batch.samples as f64;
            talk.progress(runs, gates_in_all(set.batch_count(), job), "runs of variants");
        }
        samples += batch.samples;
    }
    if samples == 0 {
        return Err("the set holds no samples".to_owned());
    }
    if finite == Some(0) {
        return Err(StatisticsError::NotFinite { outputs: list(&compared) }.to_string());
    }
    let mean = |sum: f64| Some(sum / samples as f64).filter(|d| d.is_finite());
    Ok(sums.into_iter().map(mean).collect())
}

fn gates_in_all(batches: usize, job: &TrialJob) -> usize {
    batches * job.gates.len()
}

/// `` `a`, `b` ``.
pub(crate) fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Names of the outputs that count: those that depend on inputs and are no by-products, where there are any.
fn counted(model: &Model) -> Vec<String> {
    let graph = &model.graph;
    let moved = downstream(graph, graph.main().inputs());
    let mut outputs: Vec<ValueId> = graph.main().outputs().to_vec();
    let mut only = |counts: &dyn Fn(ValueId) -> bool| {
        if outputs.iter().any(|&v| counts(v)) {
            outputs.retain(|&v| counts(v));
        }
    };
    only(&|v| moved.contains(&v));
    only(&|v| !may_leave(&graph.value(v).name));
    outputs.into_iter().map(|v| graph.value(v).name.clone()).collect()
}

/// Everything in the main graph that is computed of these values, and themselves.
pub(crate) fn downstream(graph: &Graph, values: &[ValueId]) -> BTreeSet<ValueId> {
    let mut moved: BTreeSet<ValueId> = values.iter().copied().collect();
    for id in graph.sorted(ScopeId::MAIN).unwrap_or_default() {
        let node = graph.node(id);
        let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
        if node.inputs().iter().flatten().copied().chain(captured).any(|v| moved.contains(&v)) {
            moved.extend(node.outputs().iter().flatten());
        }
    }
    moved
}

/// The outputs that count, which the variant must have too.
fn compared(model: &Model, variant: &Model) -> Result<Vec<String>, String> {
    let given = |name: &String| variant.graph.main().outputs().iter().any(|&v| variant.graph.value(v).name == *name);
    let own = counted(model);
    match own.iter().find(|name| !given(name)) {
        Some(name) => Err(format!("the variant has no output `{name}`")),
        None => Ok(own),
    }
}

/// Whether an output that counts may hold real numbers, which answer to small errors as whole numbers and strings do not.
pub(crate) fn holds_numbers(model: &Model) -> bool {
    let facts = Facts::infer(model);
    let names = counted(model);
    let graph = &model.graph;
    graph.main().outputs().iter().filter(|&&v| names.contains(&graph.value(v).name)).any(|&v| {
        let elem = facts.elem(v).or_else(|| elem_in(graph.value(v).ty.as_ref()?));
        elem.is_none_or(DataType::is_float)
    })
}

/// The type of the elements of a tensor, or of those that something holds.
fn elem_in(ty: &Type) -> Option<DataType> {
    match &ty.kind {
        TypeKind::Sequence(inner) | TypeKind::Optional(inner) => elem_in(inner),
        TypeKind::Map { value, .. } => elem_in(value),
        _ => ty.elem(),
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

/// Runs and hands over the tensors of the outputs that count.
fn visit(
    session: &mut dyn Session,
    inputs: &Sample,
    compared: &[String],
    take: &mut dyn FnMut(String, &Tensor) -> Result<(), String>,
) -> Result<(), String> {
    let mut wrong = None;
    let visited = session.visit(inputs, &mut |name, datum| {
        if wrong.is_none() && compared.iter().any(|c| c == name) {
            wrong = each(name.to_owned(), &datum, take).err();
        }
        Ok(())
    });
    visited.map_err(|e| e.to_string())?;
    wrong.map_or(Ok(()), Err)
}

/// Every tensor inside an output, with a name of its own.
fn each(
    name: String,
    datum: &Datum,
    take: &mut dyn FnMut(String, &Tensor) -> Result<(), String>,
) -> Result<(), String> {
    match datum {
        Datum::Tensor(tensor) => take(name, tensor),
        Datum::Sequence(members) => {
            members.iter().enumerate().try_for_each(|(at, member)| each(format!("{name}[{at}]"), member, take))
        }
        Datum::Map { keys, values } => {
            take(format!("{name} keys"), keys)?;
            take(format!("{name} values"), values)
        }
        Datum::None => Ok(()),
    }
}

/// An output of the model, as far as distances from it need it.
enum Expected {
    Numbers(Numbers),
    /// Whole numbers, booleans or strings.
    Symbols(Tensor),
}

/// A logarithm of a probability at least: what a variant rules out is held to be rare.
const LEAST: f64 = -1e3;

/// Floats.
struct Numbers {
    dims: Vec<usize>,
    distance: Distance,
    /// Numbers in a row: of a sample, or of the last axis.
    row: usize,
    /// The output itself, or the probabilities of its softmax, which are NaN where a row has none.
    numbers: Vec<f32>,
    /// Of every row: the squared norm of what is finite, or Σ p log p.
    norms: Vec<f64>,
    finite: usize,
}

impl Expected {
    fn of(tensor: &Tensor, distance: Distance, samples: usize) -> Result<Expected, String> {
        if !tensor.dtype().is_float() {
            return Ok(Expected::Symbols(tensor.clone()));
        }
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
            Distance::Relative => row.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x) * f64::from(x)).sum(),
            Distance::Divergence => {
                let scale = log_sum(row);
                let mut sum = if scale.is_finite() { 0.0 } else { f64::NAN };
                for x in row {
                    let log = f64::from(*x) - scale;
                    *x = log.exp() as f32;
                    // A probability of zero adds nothing, whatever its logarithm.
                    sum += if *x > 0.0 { f64::from(*x) * log } else { 0.0 };
                }
                sum
            }
        };
        let finite = numbers.iter().filter(|x| x.is_finite()).count();
        let norms = numbers.chunks_mut(row).map(norm).collect();
        Ok(Expected::Numbers(Numbers { dims, distance, row, numbers, norms, finite }))
    }

    /// Numbers that are finite.
    fn finite(&self) -> usize {
        match self {
            Expected::Numbers(numbers) => numbers.finite,
            Expected::Symbols(_) => 0,
        }
    }

    /// The mean distance of the rows of another tensor. A tensor of another shape is lost altogether.
    fn distance(&self, tensor: &Tensor, broken: Broken) -> Result<f64, String> {
        match self {
            Expected::Numbers(expected) if tensor.dims() == expected.dims && tensor.dtype().is_float() => {
                expected.distance(&floats(tensor)?, broken)
            }
            Expected::Symbols(expected) if tensor.dims() == expected.dims() => Ok(changed(expected, tensor)),
            _ => Ok(1.0),
        }
    }
}

/// The share of elements that differ, as one can expect it to be after having seen these: none of few says little.
fn changed(a: &Tensor, b: &Tensor) -> f64 {
    let differing = match (a.string_data(), b.string_data()) {
        (Some(a), Some(b)) => a.iter().zip(b).filter(|(a, b)| a != b).count(),
        _ => {
            let size = a.byte_len().checked_div(a.len()).unwrap_or(1).max(1);
            a.bytes().chunks(size).zip(b.bytes().chunks(size)).filter(|(a, b)| a != b).count()
        }
    };
    (differing + 1) as f64 / (a.len() + 2) as f64
}

impl Numbers {
    fn distance(&self, numbers: &[f32], broken: Broken) -> Result<f64, String> {
        let lost = |part: f64| if broken == Broken::Infinite { f64::INFINITY } else { part };
        let rows = self.numbers.chunks(self.row).zip(numbers.chunks(self.row)).zip(&self.norms);
        let distances = rows.map(|((expected, found), &norm)| match self.distance {
            Distance::Relative => {
                let off = |(&a, &b): (&f32, &f32)| match (a.is_finite(), b.is_finite()) {
                    (true, true) => (f64::from(a) - f64::from(b)).powi(2),
                    (true, false) => lost(f64::from(a).powi(2)),
                    (false, _) if a == b || a.is_nan() && b.is_nan() => 0.0,
                    (false, _) => lost(0.0),
                };
                let sum: f64 = expected.iter().zip(found).map(off).sum();
                sum / norm.max(f64::from(f32::MIN_POSITIVE))
            }
            Distance::Divergence => {
                let scale = log_sum(found);
                // A row without probabilities in both says nothing.
                if norm.is_nan() {
                    return if scale.is_finite() { lost(0.0) } else { 0.0 };
                }
                let mean = |(&p, &x): (&f32, &f32)| {
                    let log = f64::from(x) - scale;
                    let log = if log.is_finite() { log } else { -lost(-LEAST) };
                    // What the model rules out weighs nothing.
                    if p > 0.0 { f64::from(p) * log } else { 0.0 }
                };
                let mean: f64 = expected.iter().zip(found).map(mean).sum();
                // Rounding may leave less than nothing.
                (norm - mean).max(0.0)
            }
        });
        Ok(distances.sum::<f64>() / self.norms.len().max(1) as f64)
    }
}

/// log Σ exp, without overflow; NaN where a number is one, or where there is nothing to add.
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
        let job = TrialJob {
            reference: file("reference.onnx", model(false)),
            variant: file("variant.onnx", model(true)),
            set: SetSpec::all(&path),
            gates: gates.iter().map(|&g| vec![("gate".to_owned(), g)]).collect(),
            distance,
            broken: Broken::Infinite,
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

    fn distance(expected: &Tensor, found: &Tensor, distance: Distance, broken: Broken) -> f64 {
        Expected::of(expected, distance, 2).unwrap().distance(found, broken).unwrap()
    }

    #[test]
    fn what_is_not_finite_in_both_says_nothing() {
        const INF: f32 = f32::INFINITY;
        let t = |numbers: &[f32]| Tensor::from_f32s(&[2, 2], numbers);
        let whole = t(&[1.0, -INF, f32::NAN, 2.0]);
        for broken in [Broken::Infinite, Broken::Lost] {
            let same = t(&[1.5, -INF, f32::NAN, 2.0]);
            assert_eq!(distance(&whole, &same, Distance::Relative, broken), 0.125, "a quarter of the first row");
        }
        let (rows, gone) = (t(&[3.0, 4.0, 1.0, 1.0]), t(&[3.0, f32::NAN, 1.0, 1.0]));
        assert_eq!(distance(&rows, &gone, Distance::Relative, Broken::Infinite), f64::INFINITY);
        assert_eq!(distance(&rows, &gone, Distance::Relative, Broken::Lost), 16.0 / 25.0 / 2.0);
        assert_eq!(distance(&whole, &t(&[1.0, 0.0, 1.0, 2.0]), Distance::Relative, Broken::Infinite), f64::INFINITY);
        assert_eq!(distance(&whole, &t(&[1.0, 0.0, 1.0, 2.0]), Distance::Relative, Broken::Lost), 0.0);
        // What a mask rules out weighs nothing, and a row without logits says nothing.
        let logits = t(&[0.0, -INF, f32::NAN, 1.0]);
        let found = distance(&logits, &t(&[5.0, -INF, f32::NAN, 2.0]), Distance::Divergence, Broken::Infinite);
        assert!(found.abs() < 1e-6, "{found}");
        let ruled_out = t(&[-INF, 0.0, f32::NAN, 2.0]);
        assert_eq!(distance(&logits, &ruled_out, Distance::Divergence, Broken::Infinite), f64::INFINITY);
        assert_eq!(distance(&logits, &ruled_out, Distance::Divergence, Broken::Lost), -LEAST / 2.0);
    }

    #[test]
    fn other_shapes_are_lost_and_symbols_count_by_how_many_differ() {
        let (a, b) = (Tensor::from_f32s(&[3], &[1.0; 3]), Tensor::from_f32s(&[2], &[1.0; 2]));
        assert_eq!(distance(&a, &b, Distance::Relative, Broken::Infinite), 1.0);
        let (a, b) = (Tensor::int64s(&[1, 2, 3, 4]), Tensor::int64s(&[1, 2, 3, 5]));
        assert_eq!(distance(&a, &b, Distance::Relative, Broken::Infinite), 2.0 / 6.0);
        assert_eq!(distance(&a, &a, Distance::Relative, Broken::Infinite), 1.0 / 6.0);
        let words = |all: [&str; 2]| Tensor::strings(vec![2], all.map(|s| s.to_owned().into()).to_vec()).unwrap();
        let changed = distance(&words(["a", "b"]), &words(["a", "c"]), Distance::Relative, Broken::Infinite);
        assert_eq!(changed, 2.0 / 4.0);
    }

    #[test]
    fn constants_and_by_products_count_only_alone() {
        let outputs = |ports: &str, body: &str| {
            let head = format!("<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 3] x) => ({ports})");
            let model = lathe_ir::text::parse(&format!("{head} <float[1] c = {{1}}> {{ {body} }}")).unwrap();
            (counted(&model), holds_numbers(&model))
        };
        let whole = outputs("int64[n] y, float[1] k", "y = ArgMax <axis = 1, keepdims = 0> (x) k = Identity (c)");
        assert_eq!(whole, (vec!["y".to_owned()], false));
        let cache = outputs("float[n, 3] y, float[n, 3] present_0_key", "y = Neg (x) present_0_key = Abs (x)");
        assert_eq!(cache, (vec!["y".to_owned()], true));
        assert_eq!(outputs("float[1] k", "k = Identity (c)").0, ["k"]);
    }
}
