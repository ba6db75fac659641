//! How much the outputs of a model move per unit of relative error of values inside it.
//!
//! A copy of the model gets one input more, a table of amplitudes with one column per probed value. To every probed
//! value it adds the amplitude times the value's own features, permuted and with random signs: an error as large as
//! asked for, that is linear in the value as the error of a changed weight is. One sample runs at a time, as a batch of
//! rows with different amplitudes beside a first row without any, and the distance of their outputs from the first row's
//! is computed in the graph. So one session and a few batches serve hundreds of values. What comes before the first
//! disturbed value is the same in all rows, and is computed once: the sum with the errors makes the rows.

mod counted;
mod kept;

use crate::{
    Child, LoadOptions, NpzWriter, Random, RuntimeError, SampleSet, SetError, SetSpec,
    statistics::{Fold, Gathered, Job, Output, StatisticsError, key, resolve},
};
use lathe_analysis::{Facts, View, may_leave};
use lathe_ir::{AttributeValue, DataType, Model, Node, ScopeId, Tensor, Type, Use, ValueId};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The relative error that is tried: small enough for outputs to answer in proportion to its square, large enough to
/// stand out of rounding.
const AMPLITUDE: f64 = 0.1;

/// Rows of a batch: the first is the reference.
const BATCH: usize = 8;

/// The oldest operator set that has what is appended in the form it is appended.
const OLDEST_OPSET: i64 = 13;

/// Samples that run at most, as a multiple of the set's.
const PASSES: usize = 4;

/// Samples that every value is tried on at most.
const MOST_ROUNDS: usize = 64;

/// Bytes of inputs at most.
const MOST_BYTES: usize = 256 << 20;

/// The input of amplitudes.
const INPUT: &str = "probe_amplitudes";

/// How far outputs are from where they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Distance {
    /// Mean Kullback–Leibler divergence of the softmax over the last axis, in nats.
    Divergence,
    /// Squared difference over squared norm.
    Relative,
}

/// A value to probe, with the axis of its features.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// The name of the value.
    pub value: String,
    /// Which axis holds the features.
    pub view: View,
}

/// What a probe needs besides the model.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// Threads, provider and device.
    pub load: LoadOptions,
    /// How outputs are compared.
    pub distance: Distance,
    /// Seeds the permutations and signs.
    pub seed: u64,
    /// The folder where results are kept for later runs, beside statistics; `None` keeps none.
    pub cache: Option<PathBuf>,
}

/// The rise of the outputs' distance per squared relative error of each value; `None` where a value cannot be probed,
/// because its first axis is not the samples' or the size of its features is not known.
///
/// Every value is tried on as many samples as a few passes over the set allow, at least one; the samples take turns.
pub fn sensitivities(
    child: &Child,
    model: &Model,
    set: &SetSpec,
    probes: &[Probe],
    options: &ProbeOptions,
) -> Result<Vec<Option<f64>>, StatisticsError> {
    let measure = || sensitivities_with(&|job| child.gather(job), model, set, probes, options);
    let Some(cache) = &options.cache else { return measure() };
    let what = (probes, options.distance, options.seed, AMPLITUDE, BATCH, PASSES, MOST_ROUNDS);
    let folder = cache.join(key(&child.hello()?.0, model, set, &options.load, &what)?);
    if let Some(found) = kept::read(&folder).filter(|found| found.len() == probes.len()) {
        return Ok(found);
    }
    let found = measure()?;
    // What cannot be kept is measured again.
    let _ = kept::write(&folder, &found);
    Ok(found)
}

fn sensitivities_with(
    gather: &dyn Fn(&Job) -> Result<Gathered, RuntimeError>,
    model: &Model,
    set: &SetSpec,
    probes: &[Probe],
    options: &ProbeOptions,
) -> Result<Vec<Option<f64>>, StatisticsError> {
    if model.opset() < OLDEST_OPSET {
        return Err(StatisticsError::OldOpset { found: model.opset(), needed: OLDEST_OPSET });
    }
    let facts = Facts::infer(model);
    let values = probes.iter().map(|probe| resolve(model, &probe.value)).collect::<Result<Vec<_>, _>>()?;
    // Rows that come late are other samples to whoever counted them before.
    if !counted::counts_samples(model, &facts, &values) {
        let found = disturbed(gather, model, set, probes, options, Rows::FromErrors);
        // An operator may refuse operands of one and of several samples.
        if !matches!(found, Err(StatisticsError::Runtime(_))) {
            return found;
        }
    }
    disturbed(gather, model, set, probes, options, Rows::FromInputs)
}

/// Where the rows of a batch come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// From the inputs, which are repeated.
    FromInputs,
    /// From the sum with the first error.
    FromErrors,
}

fn disturbed(
    gather: &dyn Fn(&Job) -> Result<Gathered, RuntimeError>,
    model: &Model,
    set: &SetSpec,
    probes: &[Probe],
    options: &ProbeOptions,
    rows: Rows,
) -> Result<Vec<Option<f64>>, StatisticsError> {
    let mut copy = Copy::new(model, options, rows);
    let mut values = Vec::new();
    for (index, probe) in probes.iter().enumerate() {
        values.push((resolve(model, &probe.value)?, index));
    }
    // Neighbours in the model share a batch, so that much comes before the first of them.
    let places: BTreeMap<ValueId, usize> = model
        .graph
        .nodes(ScopeId::MAIN)
        .flat_map(|id| model.graph.node(id).outputs().iter().flatten())
        .enumerate()
        .map(|(place, &value)| (value, place + 1))
        .collect();
    values.sort_by_key(|(value, _)| places.get(value));
    let mut columns = Vec::new();
    for (value, index) in values {
        if copy.disturb(value, &probes[index].view, columns.len()) {
            columns.push(index);
        }
    }
    let mut found = vec![None; probes.len()];
    if columns.is_empty() {
        return Ok(found);
    }
    let output = copy.finish(options.distance, columns.len());
    let Some(output) = output else { return Ok(found) };
    let failed = |source| StatisticsError::Io { path: std::env::temp_dir(), source };
    let scratch = tempfile::tempdir().map_err(failed)?;
    let path = scratch.path().join("probe.onnx");
    copy.model.graph.sort().expect("what is added needs only what was there");
    copy.model.write_linked(&path)?;
    let inputs = scratch.path().join("probe.npz");
    let rounds = write_inputs(&inputs, model, set, columns.len())?;
    let set = SetSpec { batch: Some(1), ..SetSpec::all(&inputs) };
    let load = LoadOptions { lean: true, ..options.load.clone() };
    let job = Job { model: path, set, first_only: false, options: load, entries: Vec::new(), direct: vec![output] };
    let gathered = gather(&job)?;
    let sums = gathered.direct.first().map(Vec::as_slice).unwrap_or_default();
    for (&index, &sum) in columns.iter().zip(sums) {
        // The sum is of distances times amplitudes, and one row of every round has this amplitude.
        let rise = sum / AMPLITUDE.powi(3) / rounds as f64;
        found[index] = rise.is_finite().then_some(rise.max(0.0));
    }
    Ok(found)
}

/// The samples that run, and for each the amplitudes of its `BATCH` rows, the first undisturbed, until every column had
/// its turn, and all that in several rounds on other samples. Returns the rounds.
fn write_inputs(path: &Path, model: &Model, set: &SetSpec, columns: usize) -> Result<usize, StatisticsError> {
    let failed = |source| StatisticsError::Io { path: path.to_owned(), source };
    let groups = columns.div_ceil(BATCH - 1);
    let samples = SampleSet::open(&SetSpec { batch: Some(1), ..set.clone() }, model)?;
    let mut reader = samples.batches();
    let Some(first) = reader.next().transpose()? else { return Ok(1) };
    let sample_bytes: usize = first.inputs.iter().map(|(_, tensor)| tensor.byte_len()).sum();
    let rounds = (PASSES * samples.len() / (groups * BATCH))
        .min(MOST_BYTES / (groups * sample_bytes.max(1)))
        .clamp(1, MOST_ROUNDS);
    let batches = groups * rounds;
    let others = reader.take(batches - 1).collect::<Result<Vec<_>, SetError>>()?;
    let chosen: Vec<_> = std::iter::once(first).chain(others).collect();
    let mut npz = NpzWriter::create(path).map_err(failed)?;
    for (at, (name, tensor)) in chosen[0].inputs.iter().enumerate() {
        let mut bytes = Vec::with_capacity(tensor.byte_len() * batches);
        for batch in 0..batches {
            // Where samples come again, they come to other columns.
            let sample = &chosen[(batch + batch / chosen.len()) % chosen.len()].inputs[at].1;
            bytes.extend_from_slice(sample.bytes());
        }
        let dims: Vec<usize> = std::iter::once(batches).chain(tensor.dims()[1..].iter().copied()).collect();
        let tensor = Tensor::new(tensor.dtype(), dims, bytes).expect("equal samples fill their shape");
        npz.add(name, &tensor).map_err(failed)?;
    }
    let mut table = vec![0f32; batches * BATCH * columns];
    for round in 0..rounds {
        for column in 0..columns {
            let row = (round * groups + column / (BATCH - 1)) * BATCH + 1 + column % (BATCH - 1);
            table[row * columns + column] = AMPLITUDE as f32;
        }
    }
    npz.add(INPUT, &Tensor::from_f32s(&[batches, BATCH * columns], &table)).map_err(failed)?;
    npz.finish().map_err(failed)?;
    Ok(rounds)
}

/// The copy under construction.
struct Copy {
    model: Model,
    facts: Facts,
    /// The input of amplitudes, and the same as `[BATCH, columns]`.
    input: ValueId,
    table: ValueId,
    /// Of every column, whether a row of the batch has an amplitude there.
    disturbs: ValueId,
    /// Where nodes are added.
    scope: ScopeId,
    random: Random,
}

impl Copy {
    fn new(model: &Model, options: &ProbeOptions, rows: Rows) -> Copy {
        let facts = Facts::infer(model);
        let mut model = Model { training: Vec::new(), ..model.clone() };
        let graph = &mut model.graph;
        let inputs = graph.main().inputs().to_vec();
        let name = graph.fresh_name(INPUT);
        let input = graph.add_value(name, None);
        graph.add_input(ScopeId::MAIN, input);
        let random = Random::new(options.seed);
        let mut copy = Copy { model, facts, input, table: input, disturbs: input, scope: ScopeId::MAIN, random };
        let shape = copy.constant(Tensor::int64s(&[BATCH as i64, -1]));
        copy.table = copy.op(Node::new("Reshape"), &[input, shape]);
        let table = copy.table;
        if rows == Rows::FromErrors {
            // Shapes that are stated are those of one sample, and may not be believed.
            let graph = &mut copy.model.graph;
            let nodes: Vec<_> = graph.scopes().into_iter().flat_map(|scope| graph.nodes(scope)).collect();
            let made: Vec<ValueId> = nodes.iter().flat_map(|&id| graph.node(id).outputs()).flatten().copied().collect();
            made.into_iter().for_each(|value| graph.value_mut(value).ty = None);
        }
        let repeated = if rows == Rows::FromInputs { inputs } else { Vec::new() };
        for value in repeated {
            let Some(ndim) = copy.facts.ndim(value).filter(|&n| n > 0) else { continue };
            let uses: Vec<Use> = copy.model.graph.value(value).uses().iter().copied().collect();
            let mut shape = vec![1; ndim];
            shape[0] = BATCH as i64;
            let shape = copy.constant(Tensor::int64s(&shape));
            let several = copy.op(Node::new("Expand"), &[value, shape]);
            copy.redirect(uses, several);
        }
        let amplitudes = copy.sum(table, 0, false);
        let zero = copy.constant(Tensor::from_f32s(&[], &[0.0]));
        copy.disturbs = copy.op(Node::new("Greater"), &[amplitudes, zero]);
        copy
    }

    /// Adds an error to `value` for everyone who reads it; `false` if that cannot be done per sample.
    fn disturb(&mut self, value: ValueId, view: &View, column: usize) -> bool {
        let Some(shape) = self.facts.shape(value) else { return false };
        let ndim = shape.len() as i64;
        let (axis, position) = match *view {
            View::Axis(axis) => (axis, None),
            View::Position(position) => (-1, Some(position)),
            View::Patches(_) => return false,
        };
        let positions = shape.get(1).and_then(|dim| usize::try_from(dim.as_known()?).ok());
        if position.is_some_and(|at| ndim < 3 || positions.is_none_or(|count| at >= count)) {
            return false;
        }
        let axis = if axis < 0 { axis + ndim } else { axis };
        let samples = self.model.graph.main().inputs().iter().find_map(|&v| self.facts.shape(v)?.first().cloned());
        let per_sample = samples.is_some_and(|s| s.as_known().is_none() && shape.first() == Some(&s));
        let features = usize::try_from(axis).ok().and_then(|a| shape.get(a)?.as_known());
        let Some(features) = features.filter(|&f| per_sample && axis > 0 && f > 0) else { return false };
        let dtype = self.facts.elem(value);
        let Some(dtype) = dtype.filter(|t| matches!(t, DataType::Float | DataType::Float16)) else { return false };
        let uses: Vec<Use> = self.model.graph.value(value).uses().iter().copied().collect();
        let mut order: Vec<i64> = (0..features).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, self.random.below(last as u64 + 1) as usize);
        }
        let signs: Vec<f64> = order.iter().map(|_| if self.random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
        let mut spread = vec![1usize; ndim as usize];
        spread[axis as usize] = features as usize;
        let signs = Tensor::from_f64s(dtype, &spread, &signs).expect("signs are numbers of every float type");
        let only = position.zip(positions).map(|(at, count)| {
            let mut spread = vec![1; ndim as usize];
            spread[1] = count;
            let hit: Vec<f64> = (0..count).map(|other| f64::from(u8::from(other == at))).collect();
            Tensor::from_f64s(dtype, &spread, &hit).expect("0 and 1 are of every float type")
        });
        let only = only.map(|tensor| self.constant(tensor));
        let order = self.constant(Tensor::int64s(&order));
        let signs = self.constant(signs);
        let ones: Vec<i64> = std::iter::once(-1).chain(vec![1; ndim as usize - 1]).collect();
        let ones = self.constant(Tensor::int64s(&ones));
        let zero = Tensor::from_f64s(dtype, &vec![1; ndim as usize], &[0.0]).expect("zero is of every float type");
        let at = self.constant(Tensor::int64s(&[column as i64]));
        let disturbs = self.op(Node::new("Gather"), &[self.disturbs, at]);
        let error = self.inside("error", |copy| {
            let moved = copy.op(Node::new("Gather").with("axis", axis), &[value, order]);
            let mut moved = copy.op(Node::new("Mul"), &[moved, signs]);
            if let Some(only) = only {
                moved = copy.op(Node::new("Mul"), &[moved, only]);
            }
            let amplitude = copy.op(Node::new("Gather").with("axis", 1i64), &[copy.table, at]);
            let mut amplitude = copy.op(Node::new("Reshape"), &[amplitude, ones]);
            if dtype != DataType::Float {
                amplitude = copy.cast(amplitude, dtype);
            }
            copy.op(Node::new("Mul"), &[moved, amplitude])
        });
        let none = self.inside("none", |copy| copy.constant(zero));
        let branch = |scope| AttributeValue::Graph(scope);
        let either = Node::new("If").with("then_branch", branch(error)).with("else_branch", branch(none));
        let error = self.op(either, &[disturbs]);
        let disturbed = self.op(Node::new("Add"), &[value, error]);
        self.redirect(uses, disturbed);
        true
    }

    /// Makes those who read a value at `uses` read another.
    fn redirect(&mut self, uses: Vec<Use>, value: ValueId) {
        for place in uses {
            match place {
                Use::Node(node, index) => self.model.graph.set_input(node, index, Some(value)),
                Use::Output(scope, index) => self.model.graph.set_output(scope, index, value),
                Use::Annotation(_) => {}
            }
        }
    }

    /// Replaces the outputs by the distances, weighted by amplitudes and summed over the batch, `[columns]`.
    fn finish(&mut self, distance: Distance, columns: usize) -> Option<Output> {
        let outputs: Vec<ValueId> = self.model.graph.main().outputs().to_vec();
        for index in (0..outputs.len()).rev() {
            self.model.graph.remove_output(ScopeId::MAIN, index);
        }
        let mut total: Option<ValueId> = None;
        let by_product = |v: &ValueId| may_leave(&self.model.graph.value(*v).name);
        let whole = outputs.iter().all(by_product);
        let counted: Vec<ValueId> = outputs.into_iter().filter(|v| whole || !by_product(v)).collect();
        for output in counted {
            let known = self.facts.elem(output).or_else(|| self.model.graph.value(output).ty.as_ref()?.elem());
            if known.is_some_and(|t| !t.is_float()) {
                continue;
            }
            let one = self.cast(output, DataType::Float);
            let one = match distance {
                Distance::Divergence => self.divergence(one),
                Distance::Relative => self.relative(one),
            };
            total = Some(match total {
                Some(sum) => self.op(Node::new("Add"), &[sum, one]),
                None => one,
            });
        }
        let weighted = self.op(Node::new("Mul"), &[total?, self.table]);
        let sum = self.sum(weighted, 0, false);
        let sum = self.cast(sum, DataType::Double);
        let (input, graph) = (self.input, &mut self.model.graph);
        graph.value_mut(sum).ty = Some(Type::unshaped(DataType::Double));
        graph.add_output(ScopeId::MAIN, sum);
        let samples =
            graph.main().inputs().first().and_then(|&v| graph.value(v).ty.as_ref()?.shape()?.dims.first().cloned());
        let dims = vec![samples.unwrap_or(lathe_ir::Dim::Unknown), lathe_ir::Dim::Known((BATCH * columns) as i64)];
        graph.value_mut(input).ty = Some(Type::tensor(DataType::Float, dims));
        Some(Output { value: graph.value(sum).name.clone(), field: "probe".to_owned(), fold: Fold::Sum })
    }

    /// Mean over all but the first axis of Σ p₀ (log p₀ − log p), `[batch, 1]`.
    fn divergence(&mut self, logits: ValueId) -> ValueId {
        let logs = self.op(Node::new("LogSoftmax").with("axis", -1i64), &[logits]);
        let first = self.first(logs);
        let (weights, lost) = (self.op(Node::new("Exp"), &[first]), self.op(Node::new("Sub"), &[first, logs]));
        let parts = self.op(Node::new("Mul"), &[weights, lost]);
        let rows = self.sum(parts, -1, true);
        let flat = self.flat(rows);
        let axes = AttributeValue::Ints(vec![1]);
        if self.model.opset() < 18 {
            return self.op(Node::new("ReduceMean").with("axes", axes).with("keepdims", 1i64), &[flat]);
        }
        let axes = self.constant(Tensor::int64s(&[1]));
        self.op(Node::new("ReduceMean").with("keepdims", 1i64), &[flat, axes])
    }

    /// ‖y − y₀‖² / ‖y₀‖², `[batch, 1]`.
    fn relative(&mut self, output: ValueId) -> ValueId {
        let flat = self.flat(output);
        let first = self.first(flat);
        let difference = self.op(Node::new("Sub"), &[flat, first]);
        let squares = self.op(Node::new("Mul"), &[difference, difference]);
        let norms = self.op(Node::new("Mul"), &[first, first]);
        let (squares, norm) = (self.sum(squares, 1, true), self.sum(norms, 1, true));
        let tiny = self.constant(Tensor::from_f32s(&[], &[f32::MIN_POSITIVE]));
        let norm = self.op(Node::new("Max"), &[norm, tiny]);
        self.op(Node::new("Div"), &[squares, norm])
    }

    fn flat(&mut self, value: ValueId) -> ValueId {
        let shape = self.constant(Tensor::int64s(&[0, -1]));
        self.op(Node::new("Reshape"), &[value, shape])
    }

    /// The first sample of the batch, with its axis.
    fn first(&mut self, value: ValueId) -> ValueId {
        let (start, end) = (self.constant(Tensor::int64s(&[0])), self.constant(Tensor::int64s(&[1])));
        self.op(Node::new("Slice"), &[value, start, end, start])
    }

    fn sum(&mut self, value: ValueId, axis: i64, keep: bool) -> ValueId {
        let axes = self.constant(Tensor::int64s(&[axis]));
        self.op(Node::new("ReduceSum").with("keepdims", i64::from(keep)), &[value, axes])
    }

    fn cast(&mut self, value: ValueId, dtype: DataType) -> ValueId {
        self.op(Node::new("Cast").with("to", AttributeValue::Int(i64::from(dtype.code()))), &[value])
    }

    /// A subgraph that gives what `build` adds.
    fn inside(&mut self, name: &str, build: impl FnOnce(&mut Copy) -> ValueId) -> ScopeId {
        let scope = self.model.graph.add_scope(name);
        let outer = std::mem::replace(&mut self.scope, scope);
        let result = build(self);
        self.scope = outer;
        self.model.graph.add_output(scope, result);
        scope
    }

    fn op(&mut self, node: Node, inputs: &[ValueId]) -> ValueId {
        self.model.graph.append(self.scope, node, inputs, "probe")
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.model.graph.add_initializer(self.scope, "probe", tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        statistics::serve,
        testing::{Build, engine},
    };

    /// `y = a + 2a` where `a = x·w`.
    fn model() -> Model {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        let weight = [1.0, 2.0, 0.0, 1.0, 0.0, 1.0, 1.0, -1.0, 2.0, 0.0, 1.0, 1.0];
        let w = build.constant("w", Tensor::from_f32s(&[3, 4], &weight));
        let two = build.constant("two", Tensor::from_f32s(&[], &[2.0]));
        let a = build.node(Node::new("MatMul"), &[x, w], "a");
        let b = build.node(Node::new("Mul"), &[a, two], "b");
        let y = build.node(Node::new("Add"), &[a, b], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    fn probe(names: &[&str]) -> Vec<Option<f64>> {
        with(names, |gather, set, probes, options| sensitivities_with(gather, &model(), set, probes, options))
    }

    type Gather<'a> = &'a dyn Fn(&Job) -> Result<Gathered, RuntimeError>;

    fn with(
        names: &[&str],
        measure: impl Fn(Gather, &SetSpec, &[Probe], &ProbeOptions) -> Result<Vec<Option<f64>>, StatisticsError>,
    ) -> Vec<Option<f64>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        let mut npz = NpzWriter::create(&path).unwrap();
        npz.add("x", &Tensor::from_f32s(&[2, 3], &[1.0, 2.0, 3.0, -1.0, 0.5, 2.0])).unwrap();
        npz.finish().unwrap();
        let probes: Vec<Probe> = names.iter().map(|&n| Probe { value: n.to_owned(), view: View::Axis(-1) }).collect();
        let gather = |job: &Job| serve(engine(), job, &mut |_: &str| {}).map_err(RuntimeError::Child);
        let options = ProbeOptions { load: LoadOptions::default(), distance: Distance::Relative, seed: 1, cache: None };
        measure(&gather, &SetSpec::all(&path), &probes, &options).unwrap()
    }

    #[test]
    fn an_error_of_the_output_counts_once_and_one_of_a_part_by_its_share() {
        // y = 3a: an error of a moves y as much as a itself, one of b = 2a by two thirds of it.
        let found = probe(&["a", "b", "y"]);
        let expected = [1.0, 4.0 / 9.0, 1.0];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found.unwrap() - expected).abs() < 1e-4, "{found:?} is not {expected}");
        }
    }

    #[test]
    fn rows_from_inputs_and_from_errors_are_the_same() {
        let measured = |rows| {
            with(&["x", "a", "b", "y"], |gather, set, probes, options| {
                disturbed(gather, &model(), set, probes, options, rows)
            })
        };
        assert_eq!(measured(Rows::FromInputs), measured(Rows::FromErrors));
    }

    #[test]
    fn a_model_that_counts_its_samples_runs_with_as_many_from_the_start() {
        // y = reshape(a, [samples, -1]): where the samples are counted at the input, one row would be expected.
        let build_model = |counts: bool| {
            let mut build = Build::new();
            let x = build.input("x", DataType::Float, &["n", "3"]);
            let weight = [1.0, 2.0, 0.0, 1.0, -1.0, 1.0, 2.0, 0.5, 1.0];
            let w = build.constant("w", Tensor::from_f32s(&[3, 3], &weight));
            let a = build.node(Node::new("MatMul"), &[x, w], "a");
            let shape = build.node(Node::new("Shape"), &[x], "shape");
            let start = build.constant("start", Tensor::int64s(&[i64::from(!counts)]));
            let end = build.constant("end", Tensor::int64s(&[2 - i64::from(counts)]));
            let one = build.node(Node::new("Slice"), &[shape, start, end], "one");
            let rest = build.constant("rest", Tensor::int64s(&[-1]));
            let (first, last) = if counts { (one, rest) } else { (rest, one) };
            let target = build.node(Node::new("Concat").with("axis", 0i64), &[first, last], "target");
            let y = build.node(Node::new("Reshape"), &[a, target], "y");
            build.output(y, Type::unshaped(DataType::Float)).model()
        };
        for counts in [true, false] {
            let model = build_model(counts);
            let probed = model.graph.find_value("a").unwrap();
            assert_eq!(counted::counts_samples(&model, &Facts::infer(&model), &[probed]), counts);
        }
        let counts = build_model(true);
        let found =
            with(&["a"], |gather, set, probes, options| sensitivities_with(gather, &counts, set, probes, options));
        assert!((found[0].unwrap() - 1.0).abs() < 1e-4, "{found:?}");
    }

    #[test]
    fn outputs_answer_to_the_position_that_they_read_and_to_no_other() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "4", "3"]);
        let first = build.constant("first", Tensor::from_i64s(&[], &[0]));
        let a = build.node(Node::new("Neg"), &[x], "a");
        let y = build.node(Node::new("Gather").with("axis", 1i64), &[a, first], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        let mut npz = NpzWriter::create(&path).unwrap();
        let numbers: Vec<f32> = (0..24).map(|i| i as f32 + 1.0).collect();
        npz.add("x", &Tensor::from_f32s(&[2, 4, 3], &numbers)).unwrap();
        npz.finish().unwrap();
        let views = [View::Axis(-1), View::Position(0), View::Position(3), View::Position(4)];
        let probes = views.map(|view| Probe { value: "a".to_owned(), view });
        let gather = |job: &Job| serve(engine(), job, &mut |_: &str| {}).map_err(RuntimeError::Child);
        let options = ProbeOptions { load: LoadOptions::default(), distance: Distance::Relative, seed: 1, cache: None };
        let found = sensitivities_with(&gather, &model, &SetSpec::all(&path), &probes, &options).unwrap();
        let [whole, first, last, none] = found.as_slice() else { panic!("{found:?}") };
        assert!((whole.unwrap() - 1.0).abs() < 1e-4 && (first.unwrap() - 1.0).abs() < 1e-4, "{found:?}");
        assert_eq!((*last, *none), (Some(0.0), None));
    }

    #[test]
    fn an_input_can_be_probed() {
        assert!(probe(&["x"])[0].unwrap() > 0.0);
    }
}
