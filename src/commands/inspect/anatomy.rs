//! Where the bytes and the work of a model are: nodes, weights and residual units with their cost.

use lathe_analysis::{Bindings, Cost, Facts, NodeCost, UnitId, UnitKind, Units};
use lathe_ir::{Graph, Model, NodeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// A model with everything that is known about it.
pub(super) struct Anatomy<'a> {
    pub model: &'a Model,
    pub facts: &'a Facts,
    pub cost: Cost,
    pub units: Units,
    /// What each unit costs with all that lies in it.
    pub of_unit: Vec<NodeCost>,
}

/// The weight of layers: a constant float matrix or kernel that nodes multiply by, or pick rows from.
pub(super) struct Weight<'a> {
    pub tensor: &'a Tensor,
    /// What all the nodes that use it compute.
    pub flops: u64,
}

/// A node's name, else that of its first output.
pub(super) fn node_name(graph: &Graph, id: NodeId) -> String {
    let node = graph.node(id);
    let output = || node.outputs().iter().flatten().next().map(|&v| graph.value(v).name.clone());
    if node.name.is_empty() { output().unwrap_or_default() } else { node.name.clone() }
}

impl<'a> Anatomy<'a> {
    pub fn of(model: &'a Model, facts: &'a Facts) -> Anatomy<'a> {
        let cost = Cost::of(model, facts, &Bindings::default());
        let units = Units::find(model, facts);
        let mut of_unit = vec![NodeCost::default(); units.len()];
        for id in model.graph.all_nodes() {
            let mut around = units.of_node(id);
            while let Some(unit) = around {
                add(&mut of_unit[unit.index()], &cost.by_node[id.index()]);
                around = units.get(unit).parent;
            }
        }
        Anatomy { model, facts, cost, units, of_unit }
    }

    pub fn graph(&self) -> &'a Graph {
        &self.model.graph
    }

    /// The nodes that cost most: first by FLOPs, then by bytes.
    pub fn dearest(&self, count: usize) -> Vec<NodeId> {
        let mut all = self.graph().all_nodes();
        let key = |id: &NodeId| {
            let cost = &self.cost.by_node[id.index()];
            (cost.flops, cost.weight_bytes)
        };
        all.retain(|id| key(id) != (0, 0));
        all.sort_by_key(|id| std::cmp::Reverse(key(id)));
        all.truncate(count);
        all
    }

    /// For each kind of unit, how many outermost units of it there are and what they cost; last, what is in no unit.
    pub fn by_kind(&self) -> Vec<(&'static str, usize, NodeCost)> {
        let mut rows: Vec<(&'static str, usize, NodeCost)> = Vec::new();
        for kind in UnitKind::ALL {
            let of_kind = |id: &UnitId| self.units.get(*id).kind == kind && self.units.get(*id).parent.is_none();
            let ids: Vec<UnitId> = self.units.iter().map(|(id, _)| id).filter(of_kind).collect();
            let mut sum = NodeCost::default();
            ids.iter().for_each(|id| add(&mut sum, &self.of_unit[id.index()]));
            if !ids.is_empty() {
                rows.push((kind.name(), ids.len(), sum));
            }
        }
        let mut outside = NodeCost::default();
        let free = self.graph().all_nodes().into_iter().filter(|&id| self.units.of_node(id).is_none());
        free.for_each(|id| add(&mut outside, &self.cost.by_node[id.index()]));
        rows.push(("outside", 0, outside));
        rows
    }

    /// The weights of the nodes of these operators, in the order of their first use.
    pub fn weights(&self, operators: &[&str]) -> Vec<Weight<'a>> {
        let graph = self.graph();
        let mut places: BTreeMap<ValueId, usize> = BTreeMap::new();
        let mut found: Vec<Weight> = Vec::new();
        for id in graph.all_nodes() {
            let node = graph.node(id);
            if !operators.iter().any(|op| node.is(op)) {
                continue;
            }
            let inputs = node.inputs().iter().take(2).flatten();
            let Some((value, tensor)) = inputs.filter_map(|&v| behind(graph, v)).next() else { continue };
            if !tensor.dtype().is_float() || tensor.dims().len() < 2 {
                continue;
            }
            let place = *places.entry(value).or_insert(found.len());
            if place == found.len() {
                found.push(Weight { tensor, flops: 0 });
            }
            found[place].flops = found[place].flops.saturating_add(self.cost.by_node[id.index()].flops);
        }
        found
    }

    pub fn share_of_flops(&self, flops: u64) -> f64 {
        share(flops as f64, self.cost.flops)
    }

    pub fn share_of_bytes(&self, bytes: f64) -> f64 {
        share(bytes, self.cost.weight_bytes)
    }
}

fn share(part: f64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (part / whole as f64).min(1.0) }
}

fn add(sum: &mut NodeCost, more: &NodeCost) {
    sum.flops = sum.flops.saturating_add(more.flops);
    sum.parameters += more.parameters;
    sum.weight_bytes += more.weight_bytes;
}

/// The constant that a value is, perhaps transposed or cast on the way.
fn behind(graph: &Graph, mut value: ValueId) -> Option<(ValueId, &Tensor)> {
    for _ in 0..4 {
        if let Some(tensor) = graph.constant(value) {
            return Some((value, tensor));
        }
        let node = graph.node(graph.producer(value)?);
        if !["Transpose", "Cast", "Identity", "Reshape"].iter().any(|op| node.is(op)) {
            return None;
        }
        value = node.input(0)?;
    }
    None
}
