//! Whether the number of samples decides about what is computed of given values.

use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{Model, ScopeId, ValueId};
use std::collections::BTreeSet;

/// Operators whose second input says what of the first one is read or written.
const INDEXED: [&str; 5] = ["Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"];

/// Whether a node takes both something computed of the `moved` values and a number that depends on how many `samples` the
/// model's inputs have, as a `Reshape` to a shape that was read from an input does. What has an entry for every sample
/// is no such number: it fits, or is refused, as it would for one sample. As indices it picks as many rows, of whatever
/// there is.
pub(super) fn counts_samples(model: &Model, facts: &Facts, samples: &DimExpr, moved: &[ValueId]) -> bool {
    let graph = &model.graph;
    let Some(samples) = samples.as_symbol().cloned() else { return true };
    let free = |dim: &DimExpr| dim.all_symbols(&|symbol| *symbol != samples);
    // What is known and free of the symbol says nothing about the samples, wherever it comes from.
    let says_nothing =
        |v: ValueId| facts.contents(v).is_some_and(|c| c.elements().iter().all(|e| e.as_ref().is_some_and(free)));
    let per_sample = |v: ValueId| facts.shape(v).is_some_and(|shape| !shape.iter().all(free));
    let mut moved: BTreeSet<ValueId> = moved.iter().copied().collect();
    let (mut telling, mut counting): (BTreeSet<ValueId>, BTreeSet<ValueId>) = Default::default();
    for id in graph.nodes(ScopeId::MAIN) {
        let node = graph.node(id);
        let inner = node.subgraphs();
        let captured: Vec<ValueId> = inner.iter().flat_map(|&scope| graph.captures(scope)).collect();
        let inputs = || node.inputs().iter().flatten().chain(&captured);
        let moves = inputs().any(|v| moved.contains(v));
        let measures = matches!(node.op_type.as_str(), "Shape" | "Size")
            && inputs().any(|&v| facts.shape(v).is_none() || per_sample(v));
        let tells = measures || inputs().any(|v| telling.contains(v));
        let counts = tells || inputs().any(|v| counting.contains(v));
        let picks = INDEXED.iter().any(|op| node.is(op)) && node.input(1).is_some_and(|v| counting.contains(&v));
        if moves && (tells && !measures || picks || !inner.is_empty()) {
            return true;
        }
        for &output in node.outputs().iter().flatten() {
            if counts && !says_nothing(output) {
                counting.insert(output);
            }
            if tells && !says_nothing(output) && !per_sample(output) {
                telling.insert(output);
            } else if moves && !says_nothing(output) {
                moved.insert(output);
            }
        }
    }
    false
}
