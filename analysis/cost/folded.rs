//! What a runtime computes when it loads a model.

use crate::Trait;
use lathe_ir::{Graph, NodeId, ValueId};
use std::collections::BTreeSet;

/// The nodes of all scopes that only read constants: runtimes fold them, or take them into the layer that reads them, as a
/// DequantizeLinear of a stored weight. What is random, and what holds subgraphs, is none.
pub(super) fn folded(graph: &Graph) -> BTreeSet<NodeId> {
    let mut found = BTreeSet::new();
    loop {
        let before = found.len();
        for id in graph.all_nodes() {
            let node = graph.node(id);
            let constant = |value: &ValueId| {
                graph.value(*value).initializer().is_some() && !graph.main().inputs().contains(value)
                    || graph.producer(*value).is_some_and(|made| found.contains(&made))
            };
            let pure = node.subgraphs().is_empty() && !Trait::Random.of(node);
            let known = node.is("Constant") || node.inputs().iter().flatten().count() > 0;
            if pure && known && !found.contains(&id) && node.inputs().iter().flatten().all(constant) {
                found.insert(id);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// The initializers that a value is computed from where it is constant: itself, or those behind folded nodes.
pub(super) fn constants(graph: &Graph, folded: &BTreeSet<NodeId>, value: ValueId) -> Vec<ValueId> {
    let (mut found, mut next, mut seen) = (Vec::new(), vec![value], BTreeSet::new());
    while let Some(value) = next.pop() {
        if !seen.insert(value) {
            continue;
        }
        if graph.value(value).initializer().is_some() {
            found.push(value);
        } else if let Some(id) = graph.producer(value).filter(|id| folded.contains(id)) {
            // The last is taken first.
            next.extend(graph.node(id).inputs().iter().rev().flatten());
        }
    }
    found
}
