//! Whether the number of samples flows into what a model computes.

use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{DataType, Model, ValueId};
use std::collections::BTreeSet;

/// Whether some node that computes anything but integers reads a number that depends on how many samples there are, as
/// a `Reshape` to a shape that was read from an input does.
pub(super) fn counts_samples(model: &Model, facts: &Facts) -> bool {
    let graph = &model.graph;
    let first = |v: &ValueId| facts.shape(*v).and_then(|shape| shape.first()).cloned();
    let Some(samples) = graph.main().inputs().iter().find_map(first) else { return true };
    let Some(samples) = samples.as_symbol().cloned() else { return true };
    let free = |dim: &DimExpr| dim.all_symbols(&|symbol| *symbol != samples);
    // What is known and free of the symbol says nothing about the samples, wherever it comes from.
    let says_nothing =
        |v: ValueId| facts.contents(v).is_some_and(|c| c.elements().iter().all(|e| e.as_ref().is_some_and(free)));
    let mut telling: BTreeSet<ValueId> = BTreeSet::new();
    for scope in graph.scopes() {
        for id in graph.nodes(scope) {
            let node = graph.node(id);
            let inputs = || node.inputs().iter().flatten();
            let measures = matches!(node.op_type.as_str(), "Shape" | "Size")
                && inputs().any(|&v| facts.shape(v).is_none_or(|shape| !shape.iter().all(free)));
            if !measures && !inputs().any(|v| telling.contains(v)) {
                continue;
            }
            for &output in node.outputs().iter().flatten() {
                if says_nothing(output) {
                    continue;
                }
                if !matches!(facts.elem(output), Some(DataType::Int64 | DataType::Int32 | DataType::Bool)) {
                    return true;
                }
                telling.insert(output);
            }
        }
    }
    // A subgraph that reads such a number, and an output that is one.
    let inner = graph.scopes().into_iter().flat_map(|scope| graph.captures(scope));
    inner.chain(graph.main().outputs().iter().copied()).any(|v| telling.contains(&v))
}
