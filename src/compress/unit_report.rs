//! The plan as a strip of the model: its residual units in order, and what each got.

use crate::report::PlanUnit;
use lathe_analysis::{Bindings, Cost, Facts, UnitKind, Units};
use lathe_ir::{Model, NodeId};
use std::collections::BTreeSet;

/// What was done to some nodes.
pub(super) struct Done<'a> {
    pub nodes: &'a [NodeId],
    /// What it is called: `int4 block 32`.
    pub option: &'a str,
}

/// One entry for every unit that holds no other, in order, with its share of the model's operations; empty where there
/// are no units. The last entry is everything outside of units.
pub(super) fn strip(model: &Model, done: &[Done<'_>]) -> Vec<PlanUnit> {
    let facts = Facts::infer(model);
    let units = Units::find(model, &facts);
    if units.is_empty() {
        return Vec::new();
    }
    let cost = Cost::of(model, &facts, &Bindings::default());
    let share = |nodes: &BTreeSet<NodeId>| -> f64 {
        let flops: u64 = nodes.iter().filter_map(|id| cost.by_node.get(id.index())).map(|n| n.flops).sum();
        flops as f64 / cost.flops.max(1) as f64
    };
    let mut inside: BTreeSet<NodeId> = BTreeSet::new();
    let mut found = Vec::new();
    for (id, unit) in units.iter().filter(|(_, unit)| unit.kind != UnitKind::Nested) {
        let nodes: BTreeSet<NodeId> = unit.nodes.iter().chain(&unit.support).copied().collect();
        found.push(entry(Some(&units.label(&model.graph, id)), unit.kind.name(), share(&nodes), got(&nodes, done)));
        inside.extend(nodes);
    }
    let outside: BTreeSet<NodeId> = model.graph.all_nodes().into_iter().filter(|id| !inside.contains(id)).collect();
    found.push(entry(None, "other", share(&outside), got(&outside, done)));
    found
}

/// What was done to any of these nodes, the same once.
fn got(nodes: &BTreeSet<NodeId>, done: &[Done<'_>]) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    for done in done.iter().filter(|d| d.nodes.iter().any(|id| nodes.contains(id))) {
        if !options.iter().any(|o| o == done.option) {
            options.push(done.option.to_owned());
        }
    }
    options
}

fn entry(unit: Option<&str>, kind: &str, share: f64, got: Vec<String>) -> PlanUnit {
    PlanUnit { unit: unit.map(str::to_owned), kind: kind.to_owned(), flops_share: share, got }
}
