//! The same function in float32, rounded wherever the converted model rounds: what any provider can run.

use super::rewrite::{Converted, cast_to, rounded, with_elem};
use lathe_analysis::Facts;
use lathe_ir::{
    AttributeValue, DataType, Graph, Initializer, Model, Node, NodeId, Origin, ScopeId, Tensor, Use, ValueId,
};
use std::collections::{BTreeMap, BTreeSet};

/// A float32 model that rounds where another is half precision.
#[derive(Debug)]
pub struct Simulation {
    /// The model.
    pub model: Model,
    /// What stands for each value that is half precision, rounded.
    pub rounded: BTreeMap<ValueId, ValueId>,
}

/// The float32 model that rounds every value that the converted model has in half precision. It has the inputs and outputs
/// of the original.
pub fn simulate(converted: &Converted) -> Simulation {
    simulation(converted, None)
}

/// As [`simulate`], but only these nodes round: what they give, and the constants that they read, of which the prepared model
/// holds the exact ones.
pub fn simulate_some(converted: &Converted, original: &Model, nodes: &BTreeSet<NodeId>) -> Simulation {
    simulation(converted, Some(Part { original, nodes }))
}

/// A part of a model.
#[derive(Clone, Copy)]
struct Part<'a> {
    original: &'a Model,
    nodes: &'a BTreeSet<NodeId>,
}

impl Part<'_> {
    fn rounds(&self, graph: &Graph, value: ValueId) -> bool {
        let makes = graph.producer(value).is_some_and(|id| self.nodes.contains(&id));
        makes || matches!(graph.value(value).origin(), Origin::Initializer(_)) && self.reads(graph, value)
    }

    fn reads(&self, graph: &Graph, value: ValueId) -> bool {
        let uses = graph.value(value).uses().iter();
        uses.into_iter().any(|place| matches!(place, Use::Node(id, _) if self.nodes.contains(id)))
    }
}

fn simulation(converted: &Converted, part: Option<Part<'_>>) -> Simulation {
    let dtype = converted.precision.dtype;
    let facts = Facts::infer(&converted.model);
    let mut model = converted.model.clone();
    let graph = &mut model.graph;
    // What was half precision from the start is widened for nodes that compute in float32 here.
    for &id in &converted.nodes {
        for at in 0..graph.node(id).inputs().len() {
            let Some(value) = graph.node(id).input(at) else { continue };
            if facts.elem(value) == Some(dtype) && !converted.values.contains(&value) {
                let wide = graph.append(ScopeId::MAIN, cast_to(DataType::Float), &[value], "simulated");
                graph.set_input(id, at, Some(wide));
            }
        }
        float_attributes(graph, id);
    }
    let mut simulated = BTreeMap::new();
    for &value in &converted.values {
        let rounds = part.is_none_or(|part| part.rounds(&converted.model.graph, value));
        let found = match graph.value(value).origin() {
            Origin::Initializer(_) => {
                let exact = converted.constants.get(&value).filter(|_| !rounds);
                let exact = exact.and_then(|&old| part?.original.graph.constant(old));
                widen_constant(graph, value, exact.cloned());
                value
            }
            Origin::Input(_) | Origin::Node(..) => round_value(graph, converted, value, rounds),
            Origin::None => continue,
        };
        simulated.insert(value, found);
    }
    model.graph.sort().expect("casts behind values make no cycle");
    Simulation { model, rounded: simulated }
}

fn float_attributes(graph: &mut Graph, id: NodeId) {
    if graph.node(id).is("EyeLike") {
        graph.node_mut(id).set_attribute("dtype", DataType::Float);
    }
    if let Some(AttributeValue::Tensor(tensor)) =
        graph.node(id).attribute("value").filter(|_| graph.node(id).is("ConstantOfShape"))
    {
        let wide = rounded(tensor, DataType::Float);
        graph.node_mut(id).set_attribute("value", wide);
    }
}

/// Makes a constant float32: with these numbers, or those that it has.
fn widen_constant(graph: &mut Graph, value: ValueId, exact: Option<Tensor>) {
    if let Some(tensor) = exact.or_else(|| Some(rounded(graph.constant(value)?, DataType::Float))) {
        graph.set_initializer(value, Initializer::Dense(tensor));
    }
}

/// Puts a pair of casts behind a value, and gives it to everything that reads it in half precision.
fn round_value(graph: &mut Graph, converted: &Converted, value: ValueId, is_rounded: bool) -> ValueId {
    let dtype = if is_rounded { converted.precision.dtype } else { DataType::Float };
    let uses: Vec<Use> = graph.value(value).uses().iter().copied().collect();
    let is_cast = graph.producer(value).is_some_and(|id| graph.node(id).is("Cast"));
    let stated = graph.value(value).ty.clone();
    let name = format!("{}_simulated", graph.value(value).name);
    let narrow = match is_cast {
        true => {
            let maker = graph.producer(value).expect("it is a cast");
            graph.node_mut(maker).set_attribute("to", dtype);
            graph.value_mut(value).ty = stated.as_ref().map(|ty| with_elem(ty, dtype));
            value
        }
        false => {
            if let Some(Initializer::Dense(default)) = graph.value(value).initializer().cloned() {
                graph.set_default(value, Some(Initializer::Dense(rounded(&default, DataType::Float))));
            }
            graph.value_mut(value).ty = stated.as_ref().map(|ty| with_elem(ty, DataType::Float));
            graph.append(ScopeId::MAIN, cast_to(dtype), &[value], &name)
        }
    };
    let wide = graph.append(ScopeId::MAIN, cast_to(DataType::Float), &[narrow], &name);
    graph.value_mut(wide).ty = stated.as_ref().map(|ty| with_elem(ty, DataType::Float));
    for place in uses {
        match place {
            // Nodes of the model that were half precision from the start still are.
            Use::Node(id, at) if !converted.nodes.contains(&id) && !graph.node(id).is("Cast") => {
                let half = match is_rounded {
                    true => narrow,
                    false => graph.append(ScopeId::MAIN, cast_to(converted.precision.dtype), &[narrow], &name),
                };
                graph.set_input(id, at, Some(half));
            }
            Use::Node(id, at) => graph.set_input(id, at, Some(wide)),
            Use::Output(scope, at) => {
                if scope == ScopeId::MAIN && !graph.is_output(wide) {
                    let name = graph.value(value).name.clone();
                    let spare = graph.fresh_name(&name);
                    graph.rename(value, spare);
                    graph.rename(wide, name);
                }
                graph.set_output(scope, at, wide);
            }
            Use::Annotation(_) => {}
        }
    }
    wide
}

/// Two models whose outputs are these values of the prepared model: as they are in float32, and as they come out of the
/// simulation. The outputs have equal names; which value each is follows.
pub fn watch_errors(
    reference: &Model,
    simulation: &Simulation,
    values: &[ValueId],
) -> (Model, Model, BTreeMap<String, ValueId>) {
    let (mut reference, mut rounded) = (reference.clone(), simulation.model.clone());
    for graph in [&mut reference.graph, &mut rounded.graph] {
        let count = graph.main().outputs().len();
        (0..count).rev().for_each(|at| graph.remove_output(ScopeId::MAIN, at));
    }
    let mut names = BTreeMap::new();
    for &value in values {
        let other = simulation.rounded.get(&value).copied().unwrap_or(value);
        let name = format!("compared_{}", names.len());
        for (graph, value) in [(&mut reference.graph, value), (&mut rounded.graph, other)] {
            let copy = graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], &name);
            graph.rename(copy, name.clone());
            graph.value_mut(copy).ty = Some(lathe_ir::Type::unshaped(DataType::Float));
            graph.add_output(ScopeId::MAIN, copy);
        }
        names.insert(name, value);
    }
    (reference, rounded, names)
}
