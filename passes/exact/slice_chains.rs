//! Runs chains of nodes piece by piece where the tensors between them are large.

mod along;
#[cfg(test)]
mod tests;

use super::linear::RTOL;
use crate::{Error, Info, Kind, Opt, Outcome, Pass, PassContext, Saving};
use along::Along;
use lathe_analysis::Facts;
use lathe_ir::{AttributeValue, Dim, Graph, Model, Node, NodeId, ScopeId, Tensor, Type, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// See [`INFO`].
pub struct SliceChains;

static INFO: Info = Info {
    name: "slice-chains",
    summary: "runs chains of nodes piece by piece in a Scan where the tensors between them are large (off by default)",
    doc: "Nodes that treat every row, token or sample by itself (element-wise operators, products with weights, \
          normalizations and softmax along other axes, convolutions and GroupNormalization over the batch) and read \
          one common value move into the body of a Scan that runs over equal pieces of that value, so that only one \
          piece of what lies between them exists at a time. The pieces are cut from the outermost axis that is longer \
          than 1; there are as many as the largest divisor of its size up to `pieces`. Weights stay outside and are \
          shared by all pieces. Declines where a size is not fixed, where no number up to `pieces` divides the axis, \
          where nothing inside is larger than what goes in and comes out together, and where less than `min-bytes` \
          of live tensors would be saved. Other passes see less of a model whose layers are inside a Scan, and each \
          piece costs a little time: the pass is off unless `enabled` is set.",
    options: &[
        Opt { name: "enabled", unit: "true or false", default: "false", doc: "Whether the pass does anything" },
        Opt { name: "pieces", unit: "count", default: "8", doc: "The largest number of pieces" },
        Opt { name: "min-bytes", unit: "bytes", default: "16777216", doc: "The least a chain must save while it runs" },
    ],
    // Products of fewer rows may be summed in other blocks.
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::PeakMemory],
    source: Some("Streamlined Inference: feature slicer and operator grouping (arXiv:2411.01171)"),
};

/// Nodes of one chain; longer ones are cut, because every value is tried as the beginning of one.
const MAX_NODES: usize = 128;

impl Pass for SliceChains {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        if !cx.setting::<bool>(&INFO, "enabled")? {
            return Ok(outcome);
        }
        let (pieces, least) = (cx.setting(&INFO, "pieces")?, cx.setting(&INFO, "min-bytes")?);
        let opset = model.opset();
        if opset < 9 {
            outcome.refuse("before opset 9 a Scan takes batches", model.graph.main().name.clone());
            return Ok(outcome);
        }
        loop {
            let graph = &mut model.graph;
            let facts = cx.facts.take(graph, &model.opsets, &model.functions);
            let mut refused = Outcome::default();
            let best = Search::of(graph, &facts, opset, pieces, least)?.best(&mut refused);
            let Some(plan) = best else {
                cx.facts.keep(graph, facts);
                if outcome.changes.is_empty() && refused.refusals.is_empty() {
                    refused.refuse("no two nodes in a row treat every row by itself", graph.main().name.clone());
                }
                outcome.merge(refused);
                return Ok(outcome);
            };
            outcome.change("slice-chain", graph.describe(plan.nodes[0]));
            carry_out(graph, &facts, &plan);
            graph.sort()?;
        }
    }
}

/// A chain that is run in pieces.
struct Plan {
    /// The one value that it reads and that is cut.
    entry: ValueId,
    pieces: usize,
    /// In an order in which they can run.
    nodes: Vec<NodeId>,
    /// What others read of it.
    outputs: Vec<ValueId>,
    /// The axis that is cut, of the entry and of everything the nodes make.
    axes: BTreeMap<ValueId, usize>,
    /// Bytes of tensors that are no longer alive at once.
    saving: u64,
}

struct Search<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    opset: i64,
    /// The largest number of pieces.
    pieces: usize,
    /// Bytes that a chain must save.
    least: u64,
    order: Vec<NodeId>,
    /// Where a node stands in `order`, by [`NodeId::index`].
    position: Vec<usize>,
}

impl<'a> Search<'a> {
    fn of(graph: &'a Graph, facts: &'a Facts, opset: i64, pieces: usize, least: u64) -> Result<Search<'a>, Error> {
        let order = graph.sorted(ScopeId::MAIN)?;
        let mut position = vec![0; graph.node_bound()];
        for (at, id) in order.iter().enumerate() {
            position[id.index()] = at;
        }
        Ok(Search { graph, facts, opset, pieces, least, order, position })
    }

    /// The chain of the main graph that saves most; of equal ones the first.
    fn best(&self, refused: &mut Outcome) -> Option<Plan> {
        let inputs = self.graph.main().inputs().iter().copied();
        let made = self.order.iter().filter(|&&id| !self.graph.node(id).is("Constant"));
        let made = made.flat_map(|&id| self.graph.node(id).outputs().iter().flatten().copied());
        let mut best: Option<Plan> = None;
        for entry in inputs.filter(|&v| self.graph.value(v).initializer().is_none()).chain(made) {
            match self.chain(entry) {
                Ok(plan) if best.as_ref().is_none_or(|b| plan.saving > b.saving) => best = Some(plan),
                Ok(_) | Err(None) => {}
                Err(Some(reason)) => refused.refuse(reason, self.graph.value(entry).name.clone()),
            }
        }
        best
    }

    /// The best chain that reads `entry`; or why there is none, if anything looked like one.
    fn chain(&self, entry: ValueId) -> Result<Plan, Option<&'static str>> {
        if self.readers(entry).next().is_none() {
            return Err(None);
        }
        let sizes = self.facts.sizes(entry).ok_or("a size of what would be cut is not fixed")?;
        let Some(axis) = outermost(&sizes) else { return Err(None) };
        let size = sizes[axis];
        let pieces = (2..=self.pieces.min(size)).rev().find(|n| size % n == 0);
        let pieces = pieces.ok_or("no number of pieces up to `pieces` divides the outermost axis")?;
        let Some(outside) = self.bytes(entry, axis, size) else { return Err(None) };
        let axes = BTreeMap::from([(entry, axis)]);
        let mut along = Along { graph: self.graph, facts: self.facts, opset: self.opset, axes };
        let mut waiting: BTreeSet<(usize, NodeId)> = self.readers(entry).collect();
        let (mut nodes, mut joined, mut apart) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        // What the nodes so far have made and something else still reads: bytes, and how many uses are to come.
        let mut left: BTreeMap<ValueId, (u64, usize)> = BTreeMap::new();
        let (mut live, mut peak, mut widest, mut larger) = (0u64, 0u64, 0u64, false);
        let mut best: Option<(usize, u64, Vec<ValueId>)> = None;
        while let Some((_, id)) = waiting.pop_first() {
            if nodes.len() == MAX_NODES {
                break;
            }
            let node = self.graph.node(id);
            let Some(at) = along.step(node) else { continue };
            let made = node.outputs().iter().flatten().map(|&v| Some((v, self.bytes(v, at, size)?)));
            let Some(made) = made.collect::<Option<Vec<_>>>() else { continue };
            let mut others = node.inputs().iter().flatten().filter(|&v| !along.axes.contains_key(v));
            if others.any(|&v| self.depends(v, &joined, &mut apart)) {
                continue;
            }
            nodes.push(id);
            joined.insert(id);
            for (value, bytes) in &made {
                along.axes.insert(*value, at);
                left.insert(*value, (*bytes, self.graph.value(*value).uses().len()));
                live = live.saturating_add(*bytes);
                waiting.extend(self.readers(*value));
            }
            peak = peak.max(live);
            for value in node.inputs().iter().flatten() {
                if let Some((_, uses)) = left.get_mut(value) {
                    *uses -= 1;
                }
            }
            left.retain(|_, (bytes, uses)| {
                if *uses == 0 {
                    live -= *bytes;
                    widest = widest.max(*bytes);
                }
                *uses > 0
            });
            if nodes.len() < 2 || widest <= outside.saturating_add(live) {
                continue;
            }
            larger = true;
            // The entry is there in any case. In pieces, all of what comes out is there and a piece of what is between.
            let saving = peak.saturating_sub(live.saturating_add(peak.div_ceil(pieces as u64)));
            let returns = |v: &ValueId| self.facts.sizes(*v).and_then(|s| outermost(&s)) == along.axes.get(v).copied();
            let better = best.as_ref().is_none_or(|b| saving >= b.1);
            if saving >= self.least && better && !left.is_empty() && left.keys().all(returns) {
                best = Some((nodes.len(), saving, left.keys().copied().collect()));
            }
        }
        let Some((count, saving, outputs)) = best else {
            let reason = if larger {
                "a chain would save less than `min-bytes`"
            } else {
                "nothing inside a chain is larger than what goes in and comes out"
            };
            return Err((nodes.len() > 1).then_some(reason));
        };
        nodes.truncate(count);
        Ok(Plan { entry, pieces, nodes, outputs, axes: along.axes, saving })
    }

    /// The nodes of the main graph that read a value, with their positions.
    fn readers(&self, value: ValueId) -> impl Iterator<Item = (usize, NodeId)> {
        self.graph.value(value).uses().iter().filter_map(|place| match place {
            Use::Node(id, _) if self.graph.node(*id).scope() == ScopeId::MAIN => Some((self.position[id.index()], *id)),
            _ => None,
        })
    }

    /// The bytes of a tensor that has `size` elements along `axis`; `None` if it has not, or something is unknown.
    fn bytes(&self, value: ValueId, axis: usize, size: usize) -> Option<u64> {
        let sizes = self.facts.sizes(value)?;
        let elements = sizes.iter().try_fold(1usize, |product, &n| product.checked_mul(n))?;
        let plain = self.graph.value(value).quantization().is_empty() && elements > 0 && sizes.get(axis) == Some(&size);
        let bytes = self.facts.elem(value)?.byte_len(elements)?;
        plain.then_some(bytes as u64)
    }

    /// Whether a value needs one of the nodes in `chain`. `apart` holds nodes that are known not to.
    fn depends(&self, value: ValueId, chain: &BTreeSet<NodeId>, apart: &mut BTreeSet<NodeId>) -> bool {
        let Some(&first) = chain.iter().min_by_key(|id| self.position[id.index()]) else { return false };
        let mut pending: Vec<NodeId> = self.graph.producer(value).into_iter().collect();
        while let Some(id) = pending.pop() {
            if chain.contains(&id) {
                return true;
            }
            if self.position[id.index()] < self.position[first.index()] || !apart.insert(id) {
                continue;
            }
            let node = self.graph.node(id);
            let captured = node.subgraphs().into_iter().flat_map(|scope| self.graph.captures(scope));
            let needed = node.inputs().iter().flatten().copied().chain(captured);
            pending.extend(needed.filter_map(|v| self.graph.producer(v)));
        }
        false
    }
}

/// The first axis longer than 1: what is cut there is one range of the tensor's bytes.
fn outermost(sizes: &[usize]) -> Option<usize> {
    sizes.iter().position(|&size| size > 1)
}

/// Moves the nodes of a chain into the body of a Scan.
fn carry_out(graph: &mut Graph, facts: &Facts, plan: &Plan) {
    let piece = |value: ValueId| -> Option<(Vec<i64>, Type)> {
        let mut sizes = facts.sizes(value)?;
        sizes[*plan.axes.get(&value)?] /= plan.pieces;
        let sizes: Vec<i64> = sizes.into_iter().map(|n| n as i64).collect();
        let dims = sizes.iter().map(|&n| Dim::Known(n)).collect();
        Some((sizes, Type::tensor(facts.elem(value)?, dims)))
    };
    let whole = |value| facts.sizes(value).map(|all| all.into_iter().map(|n| n as i64).collect::<Vec<i64>>());
    let known = "a plan holds values of known type and size only";
    let members: BTreeSet<NodeId> = plan.nodes.iter().copied().collect();
    let inner_uses = |graph: &Graph, value: ValueId| -> Vec<(NodeId, usize)> {
        let inner = graph.value(value).uses().iter().filter_map(|place| match place {
            Use::Node(id, index) if members.contains(id) => Some((*id, *index)),
            _ => None,
        });
        inner.collect()
    };
    let base = graph.value(plan.entry).name.clone();
    let body = graph.add_scope("piece");
    let (sizes, ty) = piece(plan.entry).expect(known);
    let name = graph.fresh_name(&format!("{base}_piece"));
    let input = graph.add_value(name, Some(ty));
    graph.add_input(body, input);
    for (id, index) in inner_uses(graph, plan.entry) {
        graph.set_input(id, index, Some(input));
    }
    for &id in &plan.nodes {
        let made: Vec<ValueId> = graph.node(id).outputs().iter().flatten().copied().collect();
        if graph.node(id).is("Reshape") {
            let (target, _) = piece(made[0]).expect(known);
            let target = graph.add_initializer(ScopeId::MAIN, &format!("{base}_shape"), Tensor::int64s(&target));
            graph.set_input(id, 1, Some(target));
        }
        graph.move_node(id, body);
    }
    let stacked: Vec<i64> = [plan.pieces as i64].into_iter().chain(sizes).collect();
    let cut = graph.add_initializer(ScopeId::MAIN, &format!("{base}_pieces"), Tensor::int64s(&stacked));
    let pieces = graph.append(ScopeId::MAIN, Node::new("Reshape"), &[plan.entry, cut], &format!("{base}_cut"));
    let mut outputs = Vec::new();
    for &value in &plan.outputs {
        let name = graph.fresh_name(&format!("{}_pieces", graph.value(value).name));
        outputs.push(Some(graph.add_value(name, None)));
    }
    let scan = Node::new("Scan").with("body", AttributeValue::Graph(body)).with("num_scan_inputs", 1);
    graph.add_node(ScopeId::MAIN, scan, vec![Some(pieces)], outputs.clone());
    for (&old, pieces) in plan.outputs.iter().zip(outputs) {
        let name = graph.value(old).name.clone();
        let full =
            graph.add_initializer(ScopeId::MAIN, &format!("{name}_whole"), Tensor::int64s(&whole(old).expect(known)));
        let new =
            graph.append(ScopeId::MAIN, Node::new("Reshape"), &[pieces.expect("a Scan returns all"), full], &name);
        let inner = inner_uses(graph, old);
        graph.replace(old, new);
        for (id, index) in inner {
            graph.set_input(id, index, Some(old));
        }
        if !graph.is_output(new) {
            graph.value_mut(new).ty = graph.value(old).ty.clone();
        }
        graph.add_output(body, old);
    }
    for &id in &plan.nodes {
        let made: Vec<ValueId> = graph.node(id).outputs().iter().flatten().copied().collect();
        for value in made {
            graph.value_mut(value).ty = piece(value).map(|p| p.1);
        }
    }
}
