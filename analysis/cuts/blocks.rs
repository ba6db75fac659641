//! Borders between blocks, and blocks that repeat.

use super::{Block, Border, Residual, Run, is_latent, paths::Sums, place};
use crate::{Cones, StableHash, units::flow::Flow};
use lathe_ir::{Attribute, AttributeValue, NodeId, Origin, Tensor, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{Hash, Hasher},
};

/// The longest period that is looked for.
const MAX_PERIOD: usize = 6;
/// Whole-number constants with more elements than this count by their shape only.
const MAX_NUMBERS: usize = 16;

/// The values of the trunk at which something is added or handed on, and pairs of values between them.
///
/// Without any sum every value of the trunk is a border.
pub(super) fn borders(
    flow: &Flow,
    cones: &Cones,
    sums: &Sums,
    trunk: &[ValueId],
    residuals: &[Residual],
) -> Vec<Border> {
    let ends: BTreeSet<ValueId> = residuals.iter().flat_map(|r| [r.sum, r.stream]).collect();
    let one = |v: &ValueId| Border { streams: vec![*v], skips: 0 };
    if residuals.is_empty() {
        return trunk.iter().map(one).collect();
    }
    let mut borders: Vec<Border> = trunk.iter().filter(|v| ends.contains(v)).map(one).collect();
    let streams: HashMap<ValueId, ValueId> = residuals.iter().map(|r| (r.sum, r.stream)).collect();
    let at = |border: &Border| border.streams.iter().map(|&v| place(flow, v)).max().unwrap_or(0);
    for mut pair in pairs(flow, sums, residuals) {
        let end = pair.iter().map(|&v| place(flow, v)).max().unwrap_or(0);
        let next = borders.partition_point(|b| at(b) < end);
        let Some(before) = next.checked_sub(1).map(|i| &mut borders[i]) else { continue };
        // The first stream goes on with what came first.
        let roots = pair.map(|v| root(&streams, v, &before.streams));
        if roots[1] == before.streams[0] {
            pair.reverse();
        }
        let second = roots[usize::from(roots[1] != before.streams[0])];
        // The second stream begins as something that does not depend on the latent.
        if before.streams.len() == 1 && second != before.streams[0] && !is_latent(cones, second) {
            before.streams.push(second);
        }
        borders.insert(next, Border { streams: pair.to_vec(), skips: 0 });
    }
    borders
}

/// Where a stream comes from: the first of `stops` on the way back along sums, or where the sums end.
fn root(streams: &HashMap<ValueId, ValueId>, mut value: ValueId, stops: &[ValueId]) -> ValueId {
    while let Some(&stream) = streams.get(&value).filter(|_| !stops.contains(&value)) {
        value = stream;
    }
    value
}

/// Two sums such that every path passes one of them: the last ones of both streams before they mix again.
fn pairs(flow: &Flow, sums: &Sums, residuals: &[Residual]) -> Vec<[ValueId; 2]> {
    let mut last: BTreeMap<[u64; 2], ValueId> = BTreeMap::new();
    for residual in residuals {
        let through = sums.through(residual.sum);
        if through != [0; 2] && through != sums.total {
            last.insert(through, residual.sum);
        }
    }
    let mut found = Vec::new();
    for &value in last.values() {
        let other = last.get(&sums.rest(value)).copied();
        // Each pair is met twice.
        if let Some(other) = other.filter(|&o| place(flow, value) < place(flow, o)) {
            found.push([value, other]);
        }
    }
    found.sort_by_key(|pair| place(flow, pair[1]));
    found
}

/// What lies between two borders.
struct Segment {
    nodes: Vec<NodeId>,
    hash: u64,
}

/// Blocks that repeat, in order.
pub(super) fn runs(flow: &Flow, cones: &Cones, borders: &[Border], residuals: &[Residual]) -> Vec<Run> {
    let segments: Vec<Segment> =
        borders.windows(2).map(|pair| segment(flow, cones, &pair[0].streams, &pair[1].streams)).collect();
    let joins: HashMap<NodeId, usize> = residuals.iter().enumerate().map(|(i, r)| (r.join, i)).collect();
    let mut runs = Vec::new();
    let mut pending = vec![(0, segments.len())];
    while let Some((from, to)) = pending.pop() {
        let Some((start, period, repeats)) = longest(&segments, from, to) else { continue };
        let end = start + period * repeats;
        pending.extend([(from, start), (end, to)]);
        let block = |enter: usize| {
            let mut nodes: Vec<NodeId> =
                segments[enter..enter + period].iter().flat_map(|s| s.nodes.iter().copied()).collect();
            nodes.sort_by_key(|&id| flow.place_of(id));
            let residuals = nodes.iter().filter_map(|id| joins.get(id).copied()).collect();
            Block { enter, leave: enter + period, nodes, residuals }
        };
        runs.push(Run { period, blocks: (0..repeats).map(|i| block(start + i * period)).collect() });
    }
    runs.sort_by_key(|run| run.blocks[0].enter);
    runs
}

/// Start, period and repetitions of the run that covers most nodes.
fn longest(segments: &[Segment], from: usize, to: usize) -> Option<(usize, usize, usize)> {
    let mut best = None;
    let mut most = 0;
    for period in 1..=MAX_PERIOD {
        let mut alike = 0;
        for start in (from..to.saturating_sub(period)).rev() {
            alike = if segments[start].hash == segments[start + period].hash { alike + 1 } else { 0 };
            let repeats = 1 + alike / period;
            let nodes: usize = if repeats == 1 {
                0
            } else {
                let once: usize = segments[start..start + period].iter().map(|s| s.nodes.len()).sum();
                once * repeats
            };
            // Of equal ones the shortest period and the earliest start.
            let shorter = best.is_none_or(|(_, p, _)| p == period);
            if nodes > most || (nodes == most && nodes > 0 && shorter) {
                (best, most) = (Some((start, period, repeats)), nodes);
            }
        }
    }
    best
}

/// The nodes between two cuts that depend on the first, and a number that is equal for segments of equal structure.
fn segment(flow: &Flow, cones: &Cones, enter: &[ValueId], leave: &[ValueId]) -> Segment {
    let first = enter.iter().map(|&v| place(flow, v)).min().unwrap_or(0);
    let mut places = Vec::new();
    let mut seen = BTreeSet::new();
    let mut pending = leave.to_vec();
    while let Some(value) = pending.pop() {
        let Some(at) = flow.made_at(value).filter(|&at| at + 1 > first) else { continue };
        if !enter.contains(&value) && seen.insert(at) {
            places.push(at);
            pending.extend(&flow.reads[at]);
        }
    }
    places.sort_unstable();
    // The hash of every value that depends on the first cut, by its own hash and those of what it is computed from.
    let mut known: HashMap<ValueId, u64> = enter.iter().enumerate().map(|(i, &v)| (v, digest(|h| i.hash(h)))).collect();
    let mut nodes = Vec::new();
    for at in places {
        if !flow.reads[at].iter().any(|v| known.contains_key(v)) {
            continue;
        }
        let id = flow.order[at];
        let own = describe(flow, cones, id, &known);
        for (index, &output) in flow.graph.node(id).outputs().iter().enumerate() {
            if let Some(output) = output.filter(|v| !enter.contains(v)) {
                known.insert(output, digest(|h| (own, index).hash(h)));
            }
        }
        nodes.push(id);
    }
    let hash = digest(|h| {
        nodes.len().hash(h);
        leave.iter().for_each(|v| known.get(v).hash(h));
    });
    Segment { nodes, hash }
}

fn digest(feed: impl FnOnce(&mut StableHash)) -> u64 {
    let mut hasher = StableHash::new();
    feed(&mut hasher);
    hasher.finish()
}

/// The hash of a node: operator, attributes, and where its inputs come from. Weights count by type and shape, other
/// values from outside by what they depend on.
fn describe(flow: &Flow, cones: &Cones, id: NodeId, known: &HashMap<ValueId, u64>) -> u64 {
    let (graph, node) = (flow.graph, flow.graph.node(id));
    digest(|h| {
        (&node.domain, &node.op_type, &node.overload).hash(h);
        let mut attributes: Vec<&Attribute> = node.attributes.iter().collect();
        attributes.sort_by(|a, b| a.name.cmp(&b.name));
        for attribute in attributes {
            attribute.name.hash(h);
            attribute_value(flow, &attribute.value, h);
        }
        for input in node.inputs() {
            let Some(value) = *input else {
                0u8.hash(h);
                continue;
            };
            match (known.get(&value), graph.constant(value), graph.value(value).origin()) {
                (Some(hash), _, _) => (1u8, hash).hash(h),
                (None, Some(tensor), _) => constant(tensor, h),
                (None, None, Origin::Node(maker, _)) if graph.node(maker).is("Constant") => {
                    match graph.node(maker).attribute("value") {
                        Some(AttributeValue::Tensor(tensor)) => constant(tensor, h),
                        _ => 2u8.hash(h),
                    }
                }
                _ => (3u8, cones.of(value)).hash(h),
            }
        }
    })
}

/// A constant by type and shape; small whole numbers say how data is laid out and count as they are.
fn constant(tensor: &Tensor, h: &mut StableHash) {
    (4u8, tensor.dtype().code(), tensor.dims()).hash(h);
    if tensor.dtype().is_integer() && tensor.len() <= MAX_NUMBERS {
        tensor.to_i64s().hash(h);
    }
}

fn attribute_value(flow: &Flow, value: &AttributeValue, h: &mut StableHash) {
    match value {
        AttributeValue::Float(x) => x.to_bits().hash(h),
        AttributeValue::Int(x) => x.hash(h),
        AttributeValue::String(x) => x.hash(h),
        AttributeValue::Floats(x) => x.iter().for_each(|x| x.to_bits().hash(h)),
        AttributeValue::Ints(x) => x.hash(h),
        AttributeValue::Strings(x) => x.hash(h),
        AttributeValue::Tensor(x) => constant(x, h),
        AttributeValue::Tensors(x) => x.iter().for_each(|x| constant(x, h)),
        // Bodies count by their operators; what they capture is not told apart.
        AttributeValue::Graph(scope) => flow.graph.nodes(*scope).for_each(|id| flow.graph.node(id).op_type.hash(h)),
        _ => 5u8.hash(h),
    }
}
