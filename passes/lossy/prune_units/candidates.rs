//! Which units could be left out, and why others could not.

use super::surgery::{can_go, norm_after, read_shapes_elsewhere};
use lathe_analysis::{Bindings, Cost as ModelCost, Facts, PostOp, Unit, UnitKind, Units};
use lathe_ir::{DataType, Model, NodeId, ScopeId, ValueId};
use std::collections::BTreeSet;

/// Units with a larger share of the model's operations are the model itself rather than a part of it.
const LARGEST_SHARE: f64 = 0.25;

/// A unit that can be left out.
#[derive(Debug, Clone)]
pub(super) struct RemovableUnit {
    /// As reports call it.
    pub name: String,
    pub kind: UnitKind,
    /// The summands that go, and the sum whose normalization goes with them, if it does.
    pub gone: Vec<ValueId>,
    /// The sum whose normalization may go too: a design that normalizes the stream after every sum.
    pub norm: Option<ValueId>,
    /// What only the unit needs, in order.
    pub nodes: Vec<NodeId>,
    /// The stream before it, and with its summands added.
    pub stream: (ValueId, ValueId),
    pub flops: u64,
    pub parameters: u64,
    pub bytes: u64,
}

/// The units that can be left out, in order, and reasons with names for those that cannot. With `ends` the first and the
/// last block of every chain can too.
pub(super) fn candidates(model: &Model, ends: bool) -> (Vec<RemovableUnit>, Vec<(String, String)>) {
    let facts = Facts::infer(model);
    let units = Units::find(model, &facts);
    let cost = ModelCost::of(model, &facts, &Bindings::default());
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    for (id, unit) in units.iter() {
        let name = units.label(&model.graph, id);
        let of_node = |get: &dyn Fn(&lathe_analysis::NodeCost) -> u64| -> u64 {
            nodes(unit).filter_map(|id| cost.by_node.get(id.index())).map(get).sum()
        };
        let flops = of_node(&|n| n.flops);
        let share = flops as f64 / cost.flops.max(1) as f64;
        match refusal(model, &facts, &units, unit, share, ends) {
            Some(reason) => refused.push((reason, name)),
            None => found.push(RemovableUnit {
                name,
                kind: unit.kind,
                gone: unit.branch.clone(),
                norm: post_norm(model, &units, unit),
                nodes: nodes(unit).collect(),
                stream: (unit.stream_in, unit.stream_out),
                flops,
                parameters: of_node(&|n| n.parameters),
                bytes: of_node(&|n| n.weight_bytes),
            }),
        }
    }
    for rejected in units.rejected() {
        refused.push((rejected.reason.to_string(), model.graph.describe(rejected.join)));
    }
    (found, refused)
}

fn nodes(unit: &Unit) -> impl Iterator<Item = NodeId> + '_ {
    unit.nodes.iter().chain(&unit.support).copied()
}

fn refusal(model: &Model, facts: &Facts, units: &Units, unit: &Unit, share: f64, ends: bool) -> Option<String> {
    if let Some(barrier) = unit.barrier {
        return Some(barrier.to_string());
    }
    if model.graph.node(unit.join).scope() != ScopeId::MAIN {
        return Some("it lies in a subgraph".to_owned());
    }
    if share > LARGEST_SHARE {
        return Some("it holds more than a quarter of the model's operations".to_owned());
    }
    let block = units.period(unit.chain).unwrap_or(1);
    let length = units.chains()[unit.chain].len();
    if !ends && (unit.position < block || unit.position + block >= length) {
        return Some("it belongs to the first or the last block of its chain".to_owned());
    }
    let floats = |&v: &ValueId| facts.elem(v).is_some_and(|t| matches!(t, DataType::Float | DataType::Float16));
    if !unit.branch.iter().chain([&unit.stream_in]).all(floats) {
        return Some("its stream holds no float32 or float16".to_owned());
    }
    if let Some(reason) = unit.branch.iter().find_map(|&value| can_go(model, value).err()) {
        return Some(reason.to_owned());
    }
    let own: BTreeSet<NodeId> = nodes(unit).collect();
    if !unit.shape_taps.is_empty() && !read_shapes_elsewhere(&mut model.clone(), &own) {
        return Some("the shape of a value inside is read elsewhere, and no value outside has the same".to_owned());
    }
    None
}

/// The sum of a unit whose normalization makes the stream of the next one.
fn post_norm(model: &Model, units: &Units, unit: &Unit) -> Option<ValueId> {
    let next = units.chains()[unit.chain].get(unit.position + 1).map(|&id| units.get(id))?;
    let norm = norm_after(&model.graph, unit.stream_out)?;
    let normal = model.graph.node(norm).output(0) == Some(next.stream_in);
    (next.post == Some(PostOp::Norm) && normal).then_some(unit.stream_out)
}
