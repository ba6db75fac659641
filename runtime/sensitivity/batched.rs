//! Many errors in one batch: a sample runs as several rows, each with errors of other values.
//!
//! A copy of the model gets one input more, a table of amplitudes with one column per probed value. One sample runs at a
//! time, as a batch of rows with different amplitudes beside a first row without any, and the distance of their outputs
//! from the first row's is computed in the graph. So a few sessions and batches serve hundreds of values. What comes before
//! the first disturbed value is the same in all rows, and is computed once: the sum with the errors makes the rows. Values
//! are therefore disturbed by some neighbours in the model at a time, each in a copy of its own.

use super::{
    AMPLITUDE, Task, counted_names,
    edit::{Editor, InjectedError},
};
use crate::{
    Distance, LoadOptions, NpzWriter, Sample, SampleSet, SetError, SetSpec, StatisticsError,
    trials::list,
    wire::{Fold, GatherJob, Output},
};
use lathe_analysis::{DimExpr, may_leave};
use lathe_ir::{AttributeValue, DataType, Dim, Node, ScopeId, Tensor, Type, TypeKind, Use, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Rows of a batch: the first is the reference.
const BATCH: usize = 8;

/// Samples that run at most, as a multiple of the set's.
const PASSES: usize = 4;

/// Samples that every value is tried on at most.
const MOST_ROUNDS: usize = 64;

/// Bytes of inputs at most.
const MOST_BYTES: usize = 256 << 20;

/// Copies of the model at most: each is loaded once more, and computes once what comes before its first error.
const COPIES: usize = 6;

/// What results depend on besides what is asked.
pub(super) const SETTINGS: (usize, usize, usize, usize) = (BATCH, PASSES, MOST_ROUNDS, COPIES);

/// The input of amplitudes.
const INPUT: &str = "probe_amplitudes";

/// A logarithm of a probability at least: what an error rules out is held to be rare.
const LEAST: f32 = -1e3;

/// Where the rows of a batch come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowsOrigin {
    /// From the inputs, which are repeated.
    FromInputs,
    /// From the sum with the first error.
    FromErrors,
}

/// The dimension of the inputs that counts samples, if a sample can run as a row of a batch.
pub(super) fn samples(task: &Task<'_>) -> Result<Option<DimExpr>, StatisticsError> {
    let inputs = || task.model.graph.main().inputs().iter().copied();
    let first = |v: ValueId| task.facts.shape(v).and_then(|shape| shape.first());
    let Some(samples) = inputs().filter_map(first).find(|dim| dim.as_symbol().is_some()) else { return Ok(None) };
    // A size that stands on another axis too counts something else in this model.
    let elsewhere = |v: ValueId| task.facts.shape(v).is_some_and(|shape| shape.iter().skip(1).any(|d| d == samples));
    if inputs().any(elsewhere) || !gives_rows(task, samples) {
        return Ok(None);
    }
    let Some(sample) = one_by_one(task)?.batches().next().transpose()? else { return Ok(None) };
    let is_one = |v: ValueId| {
        let name = &task.model.graph.value(v).name;
        let tensor = sample.inputs.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor);
        first(v) != Some(samples) || tensor.is_none_or(|tensor| tensor.dims().first() == Some(&1))
    };
    Ok(inputs().all(is_one).then(|| samples.clone()))
}

/// Whether every output that counts has a row for every sample, or has nothing to do with what is probed.
fn gives_rows(task: &Task<'_>, samples: &DimExpr) -> bool {
    let moved = task.moved();
    let rows = |v: &ValueId| task.facts.shape(*v).is_none_or(|shape| shape.first() == Some(samples));
    counted(task).iter().all(|v| rows(v) || !moved.contains(v))
}

/// The outputs that are compared: tensors of floats, and by-products only where there is nothing else.
pub(super) fn counted(task: &Task<'_>) -> Vec<ValueId> {
    let graph = &task.model.graph;
    let outputs = graph.main().outputs();
    let whole = outputs.iter().all(|&v| may_leave(&graph.value(v).name));
    let counts = |v: &ValueId| {
        let value = graph.value(*v);
        let tensor = value.ty.as_ref().is_none_or(|ty| matches!(ty.kind, TypeKind::Tensor { .. }));
        let elem = task.facts.elem(*v).or_else(|| value.ty.as_ref()?.elem());
        (whole || !may_leave(&value.name)) && tensor && elem.is_none_or(DataType::is_float)
    };
    outputs.iter().copied().filter(counts).collect()
}

fn one_by_one(task: &Task<'_>) -> Result<SampleSet, SetError> {
    SampleSet::open(&SetSpec { batch: Some(1), ..task.set.clone() }, task.model)
}

/// The rise per squared amplitude of every probe; `None` for what cannot be disturbed sample by sample.
pub(super) fn disturbed(
    task: &Task<'_>,
    samples: &DimExpr,
    rows: RowsOrigin,
) -> Result<Vec<Option<f64>>, StatisticsError> {
    let graph = &task.model.graph;
    let outputs = graph.nodes(ScopeId::MAIN).flat_map(|id| graph.node(id).outputs().iter().flatten());
    let places: BTreeMap<ValueId, usize> = outputs.enumerate().map(|(place, &value)| (value, place + 1)).collect();
    let mut order: Vec<usize> = (0..task.probes.len()).collect();
    order.sort_by_key(|&index| places.get(&task.values[index]));
    let error = |index: usize| {
        let error = InjectedError::of(task.facts, task.values[index], &task.probes[index]);
        error.filter(|error| error.is_per_sample(task.facts, samples)).map(|error| (index, error))
    };
    let errors: Vec<(usize, InjectedError)> = order.into_iter().filter_map(error).collect();
    let mut rises = vec![None; task.probes.len()];
    let copies = if rows == RowsOrigin::FromErrors { COPIES } else { 1 };
    let groups: Vec<&[(usize, InjectedError)]> = errors.chunks(BATCH - 1).collect();
    let schedule = Schedule::new(task, groups.len())?;
    let mut first = 0;
    for part in groups.chunks(groups.len().div_ceil(copies).max(1)) {
        let mut copy = Copy::new(task, samples, rows);
        let columns: Vec<usize> = part.iter().flat_map(|group| group.iter().map(|(index, _)| *index)).collect();
        part.iter().flat_map(|group| group.iter()).enumerate().for_each(|(at, (_, error))| copy.disturb(error, at));
        let Some(outputs) = copy.finish(task, columns.len()) else { return Ok(rises) };
        let sums = copy.run(task, &schedule, (first, columns.len()), outputs)?;
        let Some(sums) = sums else { return Ok(rises) };
        for (&index, &sum) in columns.iter().zip(&sums) {
            // The sum is of distances times amplitudes, and one row of every round has this amplitude.
            let rise = sum / AMPLITUDE.powi(3) / schedule.rounds as f64;
            rises[index] = rise.is_finite().then_some(rise.max(0.0));
        }
        first += part.len();
    }
    Ok(rises)
}

/// Which sample runs with the errors of which group of columns: all groups have their turn, and all that in several rounds
/// on other samples.
struct Schedule {
    groups: usize,
    rounds: usize,
    /// At least one, all of one shape.
    samples: Vec<Sample>,
}

impl Schedule {
    fn new(task: &Task<'_>, groups: usize) -> Result<Schedule, StatisticsError> {
        let set = one_by_one(task)?;
        let mut reader = set.batches();
        let Some(first) = reader.next().transpose()? else {
            return Ok(Schedule { groups, rounds: 1, samples: Vec::new() });
        };
        let sample_bytes: usize = first.inputs.iter().map(|(_, tensor)| tensor.byte_len()).sum();
        let rounds = (PASSES * set.len() / (groups * BATCH).max(1))
            .min(MOST_BYTES / (groups * sample_bytes).max(1))
            .clamp(1, MOST_ROUNDS);
        let mut samples = vec![first.inputs];
        // Files of a set may hold samples of other sizes, which one array cannot.
        let shapes = |sample: &Sample| -> Vec<(String, Vec<usize>)> {
            sample.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect()
        };
        let expected = shapes(&samples[0]);
        for batch in reader {
            if samples.len() == groups * rounds {
                break;
            }
            let sample = batch?.inputs;
            if shapes(&sample) == expected {
                samples.push(sample);
            }
        }
        Ok(Schedule { groups, rounds, samples })
    }

    /// The sample of a group in a round. Where samples come again, they come to other columns.
    fn sample(&self, round: usize, group: usize) -> &Sample {
        let batch = round * self.groups + group;
        &self.samples[(batch + batch / self.samples.len()) % self.samples.len()]
    }
}

/// Tensors of one shape along a new first axis: each is a run of its own.
fn stacked(tensors: &[&Tensor]) -> Tensor {
    let first = tensors[0];
    let dims: Vec<usize> = std::iter::once(tensors.len()).chain(first.dims().iter().copied()).collect();
    let stacked = match first.string_data() {
        Some(_) => {
            let strings = tensors.iter().flat_map(|t| t.string_data().unwrap_or_default()).cloned().collect();
            Tensor::strings(dims, strings)
        }
        None => Tensor::new(first.dtype(), dims, tensors.iter().map(|t| t.bytes()).collect::<Vec<_>>().concat()),
    };
    stacked.expect("equal samples fill their shape")
}

/// The copy under construction.
struct Copy {
    edit: Editor,
    /// The input of amplitudes, `[BATCH, columns]`.
    table: ValueId,
    /// Of every column, whether a row of the batch has an amplitude there.
    disturbs: ValueId,
}

impl Copy {
    fn new(task: &Task<'_>, samples: &DimExpr, rows: RowsOrigin) -> Copy {
        let mut edit = Editor::new(task.model, task.options.seed);
        let graph = &mut edit.model.graph;
        let inputs = graph.main().inputs().to_vec();
        let name = graph.fresh_name(INPUT);
        let table = graph.add_value(name, None);
        graph.add_input(ScopeId::MAIN, table);
        if rows == RowsOrigin::FromErrors {
            edit.forget_shapes();
        }
        let repeats = |v: &ValueId| {
            rows == RowsOrigin::FromInputs && task.facts.shape(*v).and_then(<[_]>::first) == Some(samples)
        };
        for value in inputs.into_iter().filter(repeats) {
            let uses: Vec<Use> = edit.model.graph.value(value).uses().iter().copied().collect();
            let mut shape = vec![1; task.facts.ndim(value).unwrap_or(1)];
            shape[0] = BATCH as i64;
            let shape = edit.constant(Tensor::int64s(&shape));
            let several = edit.op(Node::new("Expand"), &[value, shape]);
            edit.redirect(uses, several);
        }
        let amplitudes = edit.sum(table, 0, false);
        let zero = edit.constant(Tensor::from_f32s(&[], &[0.0]));
        let disturbs = edit.op(Node::new("Greater"), &[amplitudes, zero]);
        Copy { edit, table, disturbs }
    }

    /// The sums of every column, over the batches of all groups of columns from the first on; `None` where they were not
    /// told.
    fn run(
        mut self,
        task: &Task<'_>,
        schedule: &Schedule,
        (first, columns): (usize, usize),
        outputs: Vec<Output>,
    ) -> Result<Option<Vec<f64>>, StatisticsError> {
        let failed = |source| StatisticsError::Io { path: std::env::temp_dir(), source };
        let scratch = tempfile::tempdir().map_err(failed)?;
        let (path, inputs) = (scratch.path().join("probe.onnx"), scratch.path().join("probe.npz"));
        self.write_inputs(&inputs, schedule, first, columns)
            .map_err(|source| StatisticsError::Io { path: inputs.clone(), source })?;
        self.edit.model.graph.sort().expect("what is added needs only what was there");
        self.edit.model.write_linked(&path)?;
        let set = SetSpec { batch: Some(1), ..SetSpec::all(&inputs) };
        let load = LoadOptions { lean: true, ..task.options.load.clone() };
        let job =
            GatherJob { model: path, set, first_only: false, options: load, entries: Vec::new(), direct: outputs };
        let mut gathered = (task.runs.gather)(&job)?;
        let [_, finite] = gathered.direct.as_slice() else { return Ok(None) };
        if finite.iter().sum::<f64>() == 0.0 {
            return Err(StatisticsError::NotFinite { outputs: list(&counted_names(task)) });
        }
        Ok(Some(gathered.direct.swap_remove(0)))
    }

    /// The samples that run, and for each the amplitudes of its `BATCH` rows, the first undisturbed.
    fn write_inputs(&mut self, path: &Path, schedule: &Schedule, first: usize, columns: usize) -> std::io::Result<()> {
        let groups = columns.div_ceil(BATCH - 1);
        let (rounds, batches) = (schedule.rounds, schedule.rounds * groups);
        let mut npz = NpzWriter::create(path)?;
        for (at, (name, tensor)) in schedule.samples.first().into_iter().flatten().enumerate() {
            let all = (0..batches).map(|b| &schedule.sample(b / groups, first + b % groups)[at].1);
            npz.add(name, &stacked(&all.collect::<Vec<_>>()))?;
            self.states(name, tensor);
        }
        let mut table = vec![0f32; batches * BATCH * columns];
        for round in 0..rounds {
            for column in 0..columns {
                let row = (round * groups + column / (BATCH - 1)) * BATCH + 1 + column % (BATCH - 1);
                table[row * columns + column] = AMPLITUDE as f32;
            }
        }
        let name = self.edit.model.graph.value(self.table).name.clone();
        npz.add(&name, &Tensor::from_f32s(&[batches, BATCH, columns], &table))?;
        npz.finish()
    }

    /// Says which shape an input has in every run.
    fn states(&mut self, input: &str, tensor: &Tensor) {
        let graph = &mut self.edit.model.graph;
        let Some(value) = graph.find_value(input) else { return };
        if graph.value(value).ty.as_ref().is_none_or(|ty| ty.shape().is_none()) {
            graph.value_mut(value).ty = Some(Type::tensor(tensor.dtype(), vec![Dim::Unknown; tensor.dims().len()]));
        }
    }

    fn disturb(&mut self, error: &InjectedError, column: usize) {
        let table = self.table;
        let ndim = error.ndim();
        let at = self.edit.constant(Tensor::int64s(&[column as i64]));
        let ones: Vec<i64> = std::iter::once(-1).chain(vec![1; ndim - 1]).collect();
        let ones = self.edit.constant(Tensor::int64s(&ones));
        let disturbs = self.edit.op(Node::new("Gather"), &[self.disturbs, at]);
        self.edit.disturb(error, disturbs, |edit| {
            let amplitude = edit.op(Node::new("Gather").with("axis", 1i64), &[table, at]);
            edit.op(Node::new("Reshape"), &[amplitude, ones])
        });
    }

    /// Replaces the outputs by the distances, weighted by amplitudes and summed over the batch, `[columns]`, and by how
    /// many numbers of the undisturbed outputs are finite. `None` if no output counts.
    fn finish(&mut self, task: &Task<'_>, columns: usize) -> Option<Vec<Output>> {
        let moved = task.moved();
        let compared: BTreeSet<ValueId> = counted(task).into_iter().filter(|v| moved.contains(v)).collect();
        let places: Vec<usize> = task
            .model
            .graph
            .main()
            .outputs()
            .iter()
            .enumerate()
            .filter(|(_, v)| compared.contains(v))
            .map(|p| p.0)
            .collect();
        // Those of the copy: what is disturbed itself has another value there.
        let outputs: Vec<ValueId> = self.edit.model.graph.main().outputs().to_vec();
        for index in (0..outputs.len()).rev() {
            self.edit.model.graph.remove_output(ScopeId::MAIN, index);
        }
        let (mut total, mut finite): (Option<ValueId>, Option<ValueId>) = (None, None);
        for output in places.into_iter().map(|place| outputs[place]) {
            let one = self.edit.cast(output, DataType::Float);
            let (one, count) = match task.options.distance {
                Distance::Divergence => self.divergence(one),
                Distance::Relative => self.relative(one),
            };
            // An output of fewer rows has lost those with errors, and fails here.
            let rows = self.edit.constant(Tensor::int64s(&[BATCH as i64, 1]));
            let one = self.edit.op(Node::new("Reshape"), &[one, rows]);
            let mut add = |sum: &mut Option<ValueId>, one: ValueId| {
                *sum = Some(match *sum {
                    Some(sum) => self.edit.op(Node::new("Add"), &[sum, one]),
                    None => one,
                });
            };
            add(&mut total, one);
            add(&mut finite, count);
        }
        let weighted = self.edit.op(Node::new("Mul"), &[total?, self.table]);
        let sum = self.edit.sum(weighted, 0, false);
        let graph = &mut self.edit.model.graph;
        let dims = vec![Dim::Known(BATCH as i64), Dim::Known(columns as i64)];
        graph.value_mut(self.table).ty = Some(Type::tensor(DataType::Float, dims));
        Some(vec![self.output(sum, "probe"), self.output(finite?, "finite")])
    }

    fn output(&mut self, value: ValueId, field: &str) -> Output {
        let value = self.edit.cast(value, DataType::Double);
        let graph = &mut self.edit.model.graph;
        graph.value_mut(value).ty = Some(Type::unshaped(DataType::Double));
        graph.add_output(ScopeId::MAIN, value);
        Output { value: graph.value(value).name.clone(), field: field.to_owned(), fold: Fold::Sum }
    }

    /// Mean over all but the first axis of Σ p₀ (log p₀ − log p), `[batch, 1]`, and the logits of the first row that are
    /// finite.
    fn divergence(&mut self, logits: ValueId) -> (ValueId, ValueId) {
        let logs = self.edit.op(Node::new("LogSoftmax").with("axis", -1i64), &[logits]);
        let first = self.first(logs);
        let weights = self.edit.op(Node::new("Exp"), &[first]);
        let least = self.number(LEAST);
        let logs = self.numbers_or(logs, least);
        let lost = self.edit.op(Node::new("Sub"), &[first, logs]);
        let parts = self.edit.op(Node::new("Mul"), &[weights, lost]);
        // What the original rules out weighs nothing, and a row without numbers says nothing.
        let zero = self.number(0.0);
        let parts = self.numbers_or(parts, zero);
        let rows = self.edit.sum(parts, -1, true);
        let flat = self.flat(rows);
        let mean = if self.edit.model.opset() < 18 {
            let axes = AttributeValue::Ints(vec![1]);
            self.edit.op(Node::new("ReduceMean").with("axes", axes).with("keepdims", 1i64), &[flat])
        } else {
            let axes = self.edit.constant(Tensor::int64s(&[1]));
            self.edit.op(Node::new("ReduceMean").with("keepdims", 1i64), &[flat, axes])
        };
        let count = self.first(logits);
        (mean, self.count(count))
    }

    /// ‖y − y₀‖² / ‖y₀‖², `[batch, 1]`, and the numbers of y₀ that are finite. Others have no difference; a number that is
    /// finite no more counts as lost.
    fn relative(&mut self, output: ValueId) -> (ValueId, ValueId) {
        let flat = self.flat(output);
        let count = self.first(flat);
        let count = self.count(count);
        let zero = self.number(0.0);
        let kept = self.numbers_or(flat, zero);
        let first = self.first(kept);
        // Where the first row has no number, the others have none either.
        let none = self.edit.op(Node::new("Sub"), &[flat, flat]);
        let none = self.first(none);
        let kept = self.edit.op(Node::new("Add"), &[kept, none]);
        let difference = self.edit.op(Node::new("Sub"), &[kept, first]);
        let difference = self.numbers_or(difference, zero);
        let squares = self.edit.op(Node::new("Mul"), &[difference, difference]);
        let norms = self.edit.op(Node::new("Mul"), &[first, first]);
        let (squares, norm) = (self.edit.sum(squares, 1, true), self.edit.sum(norms, 1, true));
        let tiny = self.number(f32::MIN_POSITIVE);
        let norm = self.edit.op(Node::new("Max"), &[norm, tiny]);
        (self.edit.op(Node::new("Div"), &[squares, norm]), count)
    }

    /// The value with another number in the place of what is not finite.
    fn numbers_or(&mut self, value: ValueId, other: ValueId) -> ValueId {
        let finite = self.finite(value);
        self.edit.op(Node::new("Where"), &[finite, value, other])
    }

    /// Where a value is finite: what is not leaves no zero when it is taken from itself.
    fn finite(&mut self, value: ValueId) -> ValueId {
        let zero = self.edit.op(Node::new("Sub"), &[value, value]);
        let broken = self.edit.op(Node::new("IsNaN"), &[zero]);
        self.edit.op(Node::new("Not"), &[broken])
    }

    /// How many numbers of a value are finite, one number.
    fn count(&mut self, value: ValueId) -> ValueId {
        let finite = self.finite(value);
        let ones = self.edit.cast(finite, DataType::Float);
        self.edit.op(Node::new("ReduceSum").with("keepdims", 0i64), &[ones])
    }

    fn number(&mut self, number: f32) -> ValueId {
        self.edit.constant(Tensor::from_f32s(&[], &[number]))
    }

    fn flat(&mut self, value: ValueId) -> ValueId {
        let shape = self.edit.constant(Tensor::int64s(&[0, -1]));
        self.edit.op(Node::new("Reshape"), &[value, shape])
    }

    /// The first sample of the batch, with its axis.
    fn first(&mut self, value: ValueId) -> ValueId {
        let (start, end) = (self.edit.constant(Tensor::int64s(&[0])), self.edit.constant(Tensor::int64s(&[1])));
        self.edit.op(Node::new("Slice"), &[value, start, end, start])
    }
}
