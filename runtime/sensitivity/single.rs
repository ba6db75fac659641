//! One error at a time: where a sample cannot run as a row of a batch, or a value has no row for every sample.
//!
//! A copy of the model has one number more as an input for every probed value, 0 by default, and runs once per sample and
//! value. Whatever the interface of the model is, its outputs are compared as they come.

use super::{
    AMPLITUDE, Task,
    edit::{Editor, InjectedError},
};
use crate::{
    LoadOptions, SampleSet, SetSpec, StatisticsError,
    wire::{NonFinite, TrialJob},
};
use lathe_analysis::{Bindings, Cost};
use lathe_ir::{DataType, Dim, Initializer, Node, ScopeId, Tensor, Type};

/// Samples that run at most, as a multiple of the set's.
const PASSES: usize = 4;

/// Samples that every value is tried on, at least where the set has as many and at most.
const ROUNDS: (usize, usize) = (2, 64);

/// Floating-point operations that all runs together may take.
const MOST_FLOPS: f64 = 4e12;

/// What results depend on besides what is asked.
pub(super) const SETTINGS: (usize, (usize, usize), f64) = (PASSES, ROUNDS, MOST_FLOPS);

/// Measures the probes `open`, as far as errors can be added there and the runs do not take too long.
pub(super) fn measure(task: &Task<'_>, open: &[usize], rises: &mut [Option<f64>]) -> Result<(), StatisticsError> {
    if !task.has_numbers() {
        return Ok(());
    }
    let mut edit = Editor::new(task.model, task.options.seed);
    edit.model.ir_version = edit.model.ir_version.max(4);
    let zero = edit.constant(Tensor::from_f32s(&[], &[0.0]));
    let mut columns = Vec::new();
    for &index in open {
        let Some(error) = InjectedError::of(task.facts, task.values[index], &task.probes[index]) else { continue };
        let graph = &mut edit.model.graph;
        let name = graph.fresh_name("probe_amplitude");
        let amplitude = graph.add_value(name.clone(), Some(Type::tensor(DataType::Float, Vec::new())));
        graph.add_input(ScopeId::MAIN, amplitude);
        graph.set_default(amplitude, Some(Initializer::Dense(Tensor::from_f32s(&[], &[0.0]))));
        let disturbs = edit.op(Node::new("Greater"), &[amplitude, zero]);
        edit.disturb(&error, disturbs, |_| amplitude);
        columns.push((index, name));
    }
    let Some(samples) = samples(task, columns.len())? else { return Ok(()) };
    edit.model.graph.sort().expect("what is added needs only what was there");
    let failed = |source| StatisticsError::Io { path: std::env::temp_dir(), source };
    let scratch = tempfile::tempdir().map_err(failed)?;
    let (reference, variant) = (scratch.path().join("model.onnx"), scratch.path().join("probe.onnx"));
    task.model.write_linked(&reference)?;
    edit.model.write_linked(&variant)?;
    let job = TrialJob {
        reference,
        variant,
        set: SetSpec { batch: Some(1), chosen: Some(samples), ..task.set.clone() },
        gates: columns.iter().map(|(_, name)| vec![(name.clone(), AMPLITUDE as f32)]).collect(),
        distance: task.options.distance,
        non_finite: NonFinite::Lost,
        options: LoadOptions { lean: true, ..task.options.load.clone() },
    };
    for ((index, _), rise) in columns.iter().zip((task.runs.tries)(&job)?) {
        rises[*index] = rise.is_finite().then(|| (rise / AMPLITUDE.powi(2)).max(0.0));
    }
    Ok(())
}

/// The samples to run for so many values; `None` where even one takes too long.
fn samples(task: &Task<'_>, columns: usize) -> Result<Option<Vec<usize>>, StatisticsError> {
    let set = SampleSet::open(&SetSpec { batch: Some(1), ..task.set.clone() }, task.model)?;
    let Some(first) = set.batches().next().transpose()?.filter(|_| columns > 0) else { return Ok(None) };
    let mut sizes = Bindings::default();
    let graph = &task.model.graph;
    for &input in graph.main().inputs() {
        let value = graph.value(input);
        let tensor = first.inputs.iter().find(|(name, _)| *name == value.name);
        let shape = value.ty.as_ref().and_then(|ty| ty.shape());
        for (dim, &size) in shape.iter().flat_map(|s| &s.dims).zip(tensor.iter().flat_map(|(_, t)| t.dims())) {
            if let Dim::Symbol(name) = dim {
                sizes.set(name.clone(), size as i64);
            }
        }
    }
    let runs = set.len().div_ceil(first.samples.max(1));
    let flops = Cost::of(task.model, task.facts, &sizes).flops as f64 * columns as f64;
    let affordable = (MOST_FLOPS / flops.max(1.0)) as usize;
    let rounds = (PASSES * runs / columns).clamp(ROUNDS.0, ROUNDS.1).min(runs).min(affordable);
    Ok((rounds > 0).then(|| set.spread(rounds * first.samples.max(1))))
}
