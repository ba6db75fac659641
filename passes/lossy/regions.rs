//! Nodes that are looked at together.

use lathe_ir::{Graph, NodeId, Origin, ValueId};
use std::collections::BTreeSet;

/// What nodes read that is constant, and what they give.
pub(super) fn held_by(graph: &Graph, nodes: &[NodeId]) -> Vec<ValueId> {
    let mut held = BTreeSet::new();
    for &id in nodes {
        let node = graph.node(id);
        held.extend(node.inputs().iter().flatten().filter(|v| graph.constant(**v).is_some()));
        held.extend(node.outputs().iter().flatten());
    }
    held.into_iter().collect()
}

/// The outputs of the model that nodes give.
pub(super) fn ends_of(graph: &Graph, nodes: &[NodeId]) -> Vec<ValueId> {
    let outputs = nodes.iter().flat_map(|&id| graph.node(id).outputs()).flatten();
    outputs.copied().filter(|&v| graph.is_output(v)).collect()
}

/// Removes what makes a value that nothing uses, and what only that needed.
pub(super) fn drop_unused(graph: &mut Graph, value: ValueId) {
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        match graph.value(value).origin() {
            _ if !graph.value(value).uses().is_empty() => {}
            Origin::Node(id, _) => {
                let node = graph.node(id);
                if node.outputs().iter().flatten().all(|&v| graph.value(v).uses().is_empty()) {
                    open.extend(node.inputs().iter().flatten());
                    graph.remove_node(id);
                }
            }
            Origin::Initializer(_) => graph.remove_initializer(value),
            Origin::Input(_) | Origin::None => {}
        }
    }
}
