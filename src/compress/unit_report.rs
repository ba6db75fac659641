//! The plan by residual units: which candidates were applied inside each.

use crate::report::PlanUnit;
use lathe_analysis::{Bindings, Cost, Facts, UnitKind, Units};
use lathe_ir::{Model, NodeId};
use std::collections::BTreeSet;

/// What was done to some nodes.
pub(super) struct Applied<'a> {
    pub nodes: &'a [NodeId],
    /// What it is called: `int4 block 32`.
    pub label: &'a str,
}

/// One entry for every unit that holds no other, in order, with its share of the model's operations; empty where there
/// are no units. The last entry is everything outside of units.
pub(super) fn units(model: &Model, applied: &[Applied<'_>]) -> Vec<PlanUnit> {
    let facts = Facts::infer(model);
    let all = Units::find(model, &facts);
    if all.is_empty() {
        return Vec::new();
    }
    let cost = Cost::of(model, &facts, &Bindings::default());
    let share = |nodes: &BTreeSet<NodeId>| -> f64 {
        let flops: u64 = nodes.iter().filter_map(|id| cost.by_node.get(id.index())).map(|n| n.flops).sum();
        flops as f64 / cost.flops.max(1) as f64
    };
    let mut inside: BTreeSet<NodeId> = BTreeSet::new();
    let mut found = Vec::new();
    for (id, unit) in all.iter().filter(|(_, unit)| unit.kind != UnitKind::Nested) {
        let nodes: BTreeSet<NodeId> = unit.nodes.iter().chain(&unit.support).copied().collect();
        found.push(entry(Some(&all.label(&model.graph, id)), unit.kind.name(), share(&nodes), labels(&nodes, applied)));
        inside.extend(nodes);
    }
    let outside: BTreeSet<NodeId> = model.graph.all_nodes().into_iter().filter(|id| !inside.contains(id)).collect();
    found.push(entry(None, "other", share(&outside), labels(&outside, applied)));
    found
}

/// What was done to any of these nodes, the same once.
fn labels(nodes: &BTreeSet<NodeId>, applied: &[Applied<'_>]) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    for own in applied.iter().filter(|a| a.nodes.iter().any(|id| nodes.contains(id))) {
        if !options.iter().any(|o| o == own.label) {
            options.push(own.label.to_owned());
        }
    }
    options
}

fn entry(unit: Option<&str>, kind: &str, share: f64, got: Vec<String>) -> PlanUnit {
    PlanUnit { unit: unit.map(str::to_owned), kind: kind.to_owned(), flops_share: share, got }
}
