//! Where half precision begins and ends.

use super::{
    cut::{Choice, End, Value},
    quantized::is_restored,
    survey::Survey,
};
use lathe_analysis::Cost;
use lathe_ir::{NodeId, Origin, ScopeId, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What a cast costs besides its elements: a kernel has to be started.
const START: u64 = 64;

/// Operations that take as long as moving one element.
const PER_ELEMENT: u64 = 8;

/// What a cast costs that does not belong where it would be.
const NEVER: u64 = 1 << 55;

/// The nodes that compute in half precision: of those that may, the ones for which casts at the borders pay.
pub(super) fn choose(survey: &mut Survey) -> BTreeSet<NodeId> {
    let candidates = survey.candidates();
    let numbers: BTreeMap<NodeId, usize> = candidates.iter().enumerate().map(|(at, &id)| (id, at)).collect();
    let mut choice = Choice { saves: saves(survey, &candidates), values: Vec::new() };
    let main = survey.graph.main();
    let made = candidates_and_others(survey);
    for value in main.inputs().iter().copied().chain(made) {
        if survey.is_float(value) && survey.constant(value).is_none() {
            choice.values.push(of_value(survey, &numbers, value));
        }
    }
    let chosen = choice.solve();
    let halves: BTreeSet<NodeId> =
        candidates.iter().zip(&chosen).filter(|(_, half)| **half).map(|(&id, _)| id).collect();
    for id in candidates {
        if !halves.contains(&id) {
            survey.keep(id, "casts around it would cost more than it saves");
        }
    }
    halves
}

/// Every value that a node of the main graph makes.
fn candidates_and_others(survey: &Survey) -> Vec<ValueId> {
    let graph = survey.graph;
    graph.nodes(ScopeId::MAIN).flat_map(|id| graph.node(id).outputs().iter().flatten().copied()).collect()
}

/// What each node saves: elements that it writes, numbers that are stored for it, and arithmetic.
fn saves(survey: &Survey, candidates: &[NodeId]) -> Vec<Option<u64>> {
    let cost = Cost::of(survey.model, &survey.facts, &lathe_analysis::Bindings::default());
    let of = |&id: &NodeId| {
        let node = survey.graph.node(id);
        let stored = node.inputs().iter().flatten().filter_map(|&value| survey.constant(value));
        let stored: u64 = stored.map(|tensor| 2 * tensor.len() as u64).sum();
        let written = node.outputs().iter().flatten().map(|&value| survey.elements(value));
        let written = written.fold(0, u64::saturating_add);
        let flops = cost.by_node.get(id.index()).map_or(0, |cost| cost.flops);
        Some(stored.saturating_add(written).saturating_add(flops / PER_ELEMENT).min(1 << 50))
    };
    candidates.iter().map(of).collect()
}

fn of_value(survey: &Survey, numbers: &BTreeMap<NodeId, usize>, value: ValueId) -> Value {
    let outside = if survey.precision.interface { End::Half } else { End::Float };
    let number = |id: NodeId| numbers.get(&id).map_or(End::Float, |&at| End::Node(at));
    let producer = match survey.graph.value(value).origin() {
        Origin::Input(ScopeId::MAIN) => outside,
        Origin::Node(id, at) if survey.ports(id).is_some_and(|ports| ports.outputs[at]) => number(id),
        _ => End::Float,
    };
    let mut consumers: Vec<End> = survey
        .readers(value)
        .into_iter()
        .filter(|&(id, _)| !is_same_cast(survey, id))
        .map(|(id, at)| match at {
            Some(at) if survey.ports(id).is_some_and(|ports| ports.inputs[at]) => number(id),
            _ => End::Float,
        })
        .collect();
    let is_output = survey.graph.value(value).uses().iter().any(|place| matches!(place, Use::Output(ScopeId::MAIN, _)));
    consumers.extend(is_output.then_some(outside));
    // What the model casts up is there in half precision.
    let free = survey.producer(value).is_some_and(|(_, node)| {
        node.is("Cast") && node.input(0).and_then(|v| survey.facts.elem(v)) == Some(survey.precision.dtype)
    });
    let cost = match (free, is_restored(survey.graph, value)) {
        (true, _) => 0,
        (false, true) => NEVER,
        (false, false) => START + survey.elements(value),
    };
    Value { cost, producer, consumers }
}

/// Whether a node is a cast of the model's own to the type that others are converted to.
fn is_same_cast(survey: &Survey, id: NodeId) -> bool {
    let node = survey.graph.node(id);
    node.is("Cast") && node.int("to") == Some(survey.precision.dtype.code().into())
}
