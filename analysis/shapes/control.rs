//! Operators with subgraphs.
//!
//! A body is inferred with what is known of its inputs, and what it says about its outputs is taken over without
//! anything that only has a meaning inside: symbols of values of the body stand for other numbers on each run of it.

use super::{
    Engine,
    node::{Out, ValueType, axis_of},
};
use crate::dim::{DimExpr, Symbol};
use lathe_ir::{AttributeValue, DataType, NodeId, ScopeId};

/// Runs of a loop body, each with weaker claims about the carried values, before nothing is claimed of them.
const MAX_ROUNDS: usize = 4;
/// How deeply loops may nest before nothing is claimed of carried values from the start.
const MAX_LOOP_DEPTH: usize = 3;

/// The outputs of an operator with subgraphs; `None` if this is not one.
pub(super) fn infer(engine: &mut Engine, id: NodeId) -> Option<Vec<Out>> {
    let node = engine.graph.node(id);
    if !node.is_standard() {
        // Bodies of unknown operators still hold nodes that can be inferred from what they capture.
        for scope in node.subgraphs() {
            unknown_inputs(engine, scope);
            engine.run_scope(scope);
        }
        return None;
    }
    match node.op_type.as_str() {
        "If" => Some(branches(engine, id)),
        "Loop" => Some(repeat(engine, id)),
        "Scan" => Some(scan(engine, id)),
        "SequenceMap" => Some(map(engine, id)),
        _ => {
            for scope in node.subgraphs() {
                unknown_inputs(engine, scope);
                engine.run_scope(scope);
            }
            None
        }
    }
}

fn unknown_inputs(engine: &mut Engine, scope: ScopeId) {
    for &value in engine.graph.scope(scope).inputs() {
        engine.store(value, Out::unknown());
    }
}

/// What a scope says about its outputs that also holds outside.
fn outputs(engine: &Engine, scope: ScopeId) -> Vec<Out> {
    let graph = engine.graph;
    let outside = |symbol: &Symbol| match symbol {
        Symbol::Named(_) => true,
        Symbol::Size { space, value, .. } | Symbol::Element { space, value, .. } => {
            *space != engine.space || graph.scope_of(*value).is_some_and(|home| !graph.is_within(home, scope))
        }
    };
    graph.scope(scope).outputs().iter().map(|&v| engine.facts.out_of(v).keeping(&outside)).collect()
}

/// If: what both branches agree on, or one branch if the condition is known.
fn branches(engine: &mut Engine, id: NodeId) -> Vec<Out> {
    let node = engine.graph.node(id);
    let mut sides = Vec::new();
    for name in ["then_branch", "else_branch"] {
        let Some(scope) = node.subgraph(name) else { return Vec::new() };
        engine.run_scope(scope);
        sides.push(outputs(engine, scope));
    }
    match engine.cx(id).int_of(0) {
        Some(0) => sides.swap_remove(1),
        Some(_) => sides.swap_remove(0),
        None => sides[0].iter().zip(&sides[1]).map(|(a, b)| a.merged(b)).collect(),
    }
}

fn loop_depth(engine: &Engine, scope: ScopeId) -> usize {
    let mut depth = 0;
    let mut at = Some(scope);
    while let Some(scope) = at {
        let owner = engine.graph.scope(scope).owner();
        depth += usize::from(owner.is_some_and(|n| matches!(engine.graph.node(n).op_type.as_str(), "Loop" | "Scan")));
        at = engine.graph.parent(scope);
    }
    depth
}

/// Runs a body until its carried values keep what is claimed of them. `fixed` are its first inputs, `rest` its last.
///
/// Returns what holds for the carried values before and after every round, and all outputs of the last round.
fn settle(
    engine: &mut Engine,
    scope: ScopeId,
    fixed: Vec<Out>,
    mut carried: Vec<Out>,
    rest: Vec<Out>,
    skipped_outputs: usize,
) -> (Vec<Out>, Vec<Out>) {
    let deep = loop_depth(engine, scope) > MAX_LOOP_DEPTH;
    for round in 0..=MAX_ROUNDS {
        let last = deep || round == MAX_ROUNDS;
        if last {
            carried.fill(Out::unknown());
        }
        let given: Vec<Out> = fixed.iter().chain(&carried).chain(&rest).cloned().collect();
        let inputs = engine.graph.scope(scope).inputs().to_vec();
        for (index, value) in inputs.into_iter().enumerate() {
            let out = given.get(index).cloned().unwrap_or_else(Out::unknown);
            store_body_input(engine, value, out);
        }
        engine.run_scope(scope);
        let found = outputs(engine, scope);
        let merged: Vec<Out> = carried
            .iter()
            .enumerate()
            .map(|(i, own)| found.get(skipped_outputs + i).map_or_else(Out::unknown, |new| own.merged(new)))
            .collect();
        if last || merged == carried {
            return (carried, found);
        }
        carried = merged;
    }
    unreachable!("the last round returns")
}

/// Sizes that the file states for a body's inputs are not used: they may hold for the first round only.
fn store_body_input(engine: &mut Engine, value: lathe_ir::ValueId, mut out: Out) {
    let stated = engine.graph.value(value).ty.as_ref().and_then(|ty| ty.elem());
    if let (ValueType::Unknown, Some(elem)) = (&out.ty, stated) {
        out.ty = ValueType::Tensor { elem: Some(elem), dims: None };
    }
    engine.store_as(value, out, false);
}

/// Loop.
fn repeat(engine: &mut Engine, id: NodeId) -> Vec<Out> {
    let node = engine.graph.node(id);
    let Some(scope) = node.subgraph("body") else { return Vec::new() };
    let (trips, condition) = (engine.cx(id).int_of(0), engine.cx(id).int_of(1));
    let carried: Vec<Out> =
        (2..node.inputs().len()).map(|i| node.input(i).map_or_else(Out::unknown, |v| engine.facts.out_of(v))).collect();
    let count = carried.len();
    let counter = Out::scalar(DataType::Int64).with_contents(Some(vec![None]));
    let keep_going = Out::scalar(DataType::Bool);
    let (carried, body) = settle(engine, scope, vec![counter, keep_going], carried, Vec::new(), 1);
    let goes_on = body.first().and_then(|c| c.contents.as_ref()?.first()?.as_ref()?.as_known());
    // The number of rounds is known where nothing but the trip count can end the loop.
    let endless = goes_on.is_some_and(|c| c != 0)
        && (!engine.graph.node(id).inputs().get(1).is_some_and(Option::is_some) || condition.is_some_and(|c| c != 0));
    let rounds = trips.filter(|_| endless).map(|t| DimExpr::from(t.max(0)));
    let mut outs = carried;
    for scanned in body.iter().skip(1 + count) {
        outs.push(stacked(scanned, 0, rounds.clone()));
    }
    outs
}

/// The values of every round joined along a new axis.
fn stacked(each: &Out, axis: i64, rounds: Option<DimExpr>) -> Out {
    match &each.ty {
        ValueType::Tensor { elem, dims } => {
            let some_round = rounds.as_ref().is_some_and(DimExpr::is_positive);
            let dims = dims.as_ref().and_then(|dims| {
                // A loop without any round has no sizes to show for what depends on them.
                let kept = |d: &Option<DimExpr>| d.clone().filter(|d| some_round || d.as_known().is_some());
                let mut all: Vec<_> = dims.iter().map(kept).collect();
                all.insert(axis_of(axis, dims.len() + 1)?, rounds);
                Some(all)
            });
            Out::tensor(*elem, dims)
        }
        _ => Out::unknown(),
    }
}

/// Scan. The batched form before opset 9 is not followed.
fn scan(engine: &mut Engine, id: NodeId) -> Vec<Out> {
    let node = engine.graph.node(id);
    let Some(scope) = node.subgraph("body") else { return Vec::new() };
    let cx = engine.cx(id);
    let scanned = node.int("num_scan_inputs").and_then(|n| usize::try_from(n).ok());
    let Some(states) = scanned.and_then(|n| node.inputs().len().checked_sub(n)).filter(|_| cx.opset >= 9) else {
        unknown_inputs(engine, scope);
        engine.run_scope(scope);
        return Vec::new();
    };
    let axes = |name: &str| match node.attribute(name) {
        Some(AttributeValue::Ints(axes)) => axes.clone(),
        _ => Vec::new(),
    };
    let (input_axes, output_axes) = (axes("scan_input_axes"), axes("scan_output_axes"));
    let mut length: Option<DimExpr> = None;
    let mut slices = Vec::new();
    for i in states..node.inputs().len() {
        let axis = input_axes.get(i - states).copied().unwrap_or(0);
        let dims = cx.dims(i).and_then(|mut dims| {
            let size = dims.remove(axis_of(axis, dims.len())?);
            if length.as_ref().is_none_or(|l| l.as_known().is_none()) {
                length = size.or(length.take());
            }
            Some(dims)
        });
        slices.push(Out::tensor(cx.elem(i), dims));
    }
    let carried: Vec<Out> =
        (0..states).map(|i| node.input(i).map_or_else(Out::unknown, |v| engine.facts.out_of(v))).collect();
    let (mut outs, body) = settle(engine, scope, Vec::new(), carried, slices, 0);
    for (i, each) in body.iter().skip(states).enumerate() {
        outs.push(stacked(each, output_axes.get(i).copied().unwrap_or(0), length.clone()));
    }
    outs
}

/// SequenceMap: the body sees one element of each sequence, and other inputs as they are.
fn map(engine: &mut Engine, id: NodeId) -> Vec<Out> {
    let node = engine.graph.node(id);
    let Some(scope) = node.subgraph("body") else { return Vec::new() };
    let inputs = engine.graph.scope(scope).inputs().to_vec();
    for (index, value) in inputs.into_iter().enumerate() {
        let out = match engine.cx(id).ty(index) {
            ValueType::Sequence(element) => Out::of_type(&element),
            _ => node.input(index).map_or_else(Out::unknown, |v| engine.facts.out_of(v)),
        };
        store_body_input(engine, value, out);
    }
    engine.run_scope(scope);
    outputs(engine, scope).into_iter().map(|out| Out::sequence(out.ty)).collect()
}
