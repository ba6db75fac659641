//! Whole numbers carried in floats stay in float32: float16 is exact up to 2,048 only, bfloat16 up to 256.

use super::survey::{Survey, carries};
use lathe_analysis::Trait;
use lathe_ir::{DataType, Node, NodeId, ScopeId, ValueId};
use std::collections::BTreeSet;

const REASON: &str = "whole numbers are carried in its floats";

/// Operators whose results are no whole numbers, whatever they read.
const ENDS: &[&str] = &["Cos", "Erf", "Exp", "Sigmoid", "Sin", "Softmax", "Tan", "Tanh"];

pub(super) fn keep(survey: &mut Survey) {
    let order = survey.graph.sorted(ScopeId::MAIN).unwrap_or_else(|_| survey.graph.nodes(ScopeId::MAIN).collect());
    let mut whole: BTreeSet<ValueId> = BTreeSet::new();
    for id in order {
        let node = survey.graph.node(id);
        let reads = survey.float_inputs(id);
        let carried = !reads.is_empty() && reads.iter().all(|value| whole.contains(value)) && hands_on(node);
        if !carried && !makes_whole(survey, node) {
            continue;
        }
        if !ENDS.contains(&node.op_type.as_str()) {
            let made = node.outputs().iter().flatten().copied();
            whole.extend(made.filter(|&value| survey.is_float(value)));
        }
        keep_here(survey, id);
    }
}

fn keep_here(survey: &mut Survey, id: NodeId) {
    survey.keep(id, REASON);
}

/// Whether results of whole numbers may be whole numbers, or multiples of them.
fn hands_on(node: &Node) -> bool {
    const SUMS: &[&str] = &["CumSum", "ReduceSum", "ReduceMax", "ReduceMin", "Einsum"];
    carries(node) || Trait::Product.of(node) || SUMS.contains(&node.op_type.as_str())
}

/// Whether a node makes floats of whole numbers of any size.
fn makes_whole(survey: &Survey, node: &Node) -> bool {
    let Some(output) = node.output(0).filter(|&value| survey.is_float(value)) else { return false };
    let from = node.input(0).and_then(|value| survey.facts.elem(value));
    // Bytes fit exactly.
    let small = [DataType::Int8, DataType::Uint8];
    let cast = node.is("Cast") && from.is_some_and(|elem| elem.is_integer() && !small.contains(&elem));
    let range = node.is("Range") && survey.is_float(output);
    cast || range
}
