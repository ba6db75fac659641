//! Copies of a model that return values inside it.

use super::LayersError;
use crate::{Datum, Engine, LoadOptions, RuntimeError, Sample, rounding::ModelCopy};
use lathe_analysis::{Facts, unused_initializers};
use lathe_ir::{Graph, Model, Node, ScopeId, Tensor, Type, ValueId};

/// Values of a model that are asked for.
pub(super) struct Tapped<'a> {
    pub model: &'a Model,
    pub facts: &'a Facts,
    pub values: Vec<ValueId>,
}

/// The values on one sample, in their order.
pub(super) fn run_tapped(
    engine: &dyn Engine,
    tapped: &Tapped<'_>,
    sample: &Sample,
    options: &LoadOptions,
) -> Result<Vec<Tensor>, LayersError> {
    let mut graph = tapped.model.graph.clone();
    for &value in &tapped.values {
        let elem = tapped.facts.elem(value);
        let ty = &mut graph.value_mut(value).ty;
        if ty.as_ref().is_none_or(|ty| ty.elem().is_none()) {
            *ty = elem.map(Type::unshaped);
        }
    }
    run_copy(engine, tapped.model, graph, &tapped.values, sample, options)
}

/// How many elements values of a model have on one sample.
pub(super) fn shapes_of(
    engine: &dyn Engine,
    model: &Model,
    values: &[ValueId],
    sample: &Sample,
    options: &LoadOptions,
) -> Result<Vec<u64>, LayersError> {
    let mut graph = model.graph.clone();
    let ask = |&value: &ValueId| {
        let shape = graph.append(ScopeId::MAIN, Node::new("Shape"), &[value], "shape");
        graph.value_mut(shape).ty = Some(Type::unshaped(lathe_ir::DataType::Int64));
        shape
    };
    let shapes: Vec<ValueId> = values.iter().map(ask).collect();
    let shapes = run_copy(engine, model, graph, &shapes, sample, options)?;
    let elements = |shape: &Tensor| {
        let sizes = shape.to_i64s().unwrap_or_default();
        sizes.iter().map(|&size| u64::try_from(size).unwrap_or(0)).fold(1, u64::saturating_mul)
    };
    Ok(shapes.iter().map(elements).collect())
}

/// Runs a copy of `model` with another graph, of which only `outputs` are returned and what they do not need is left out.
pub(super) fn run_copy(
    engine: &dyn Engine,
    model: &Model,
    mut graph: Graph,
    outputs: &[ValueId],
    sample: &Sample,
    options: &LoadOptions,
) -> Result<Vec<Tensor>, LayersError> {
    for index in (0..graph.main().outputs().len()).rev() {
        graph.remove_output(ScopeId::MAIN, index);
    }
    for &value in outputs {
        graph.add_output(ScopeId::MAIN, value);
    }
    let unused = |&id: &lathe_ir::NodeId| {
        graph.node(id).outputs().iter().flatten().all(|&v: &ValueId| graph.value(v).uses().is_empty())
    };
    let dead = graph.all_nodes().into_iter().filter(unused).collect();
    graph.remove_unused(dead);
    for value in unused_initializers(&graph) {
        graph.remove_initializer(value);
    }
    let copy = Model { graph, ir_version: model.ir_version.max(4), training: Vec::new(), ..model.clone() };
    let copy = ModelCopy::write(&copy).ok_or(LayersError::Copy)?;
    let mut session = engine.load(copy.source(), options)?;
    let mut tensors = Vec::with_capacity(outputs.len());
    session.visit(sample, &mut |name, datum| match datum {
        Datum::Tensor(tensor) => {
            tensors.push(tensor);
            Ok(())
        }
        _ => Err(RuntimeError::Value {
            value: format!("the value `{name}`"),
            engine: engine.name(),
            message: "it is no tensor".to_owned(),
        }),
    })?;
    Ok(tensors)
}
