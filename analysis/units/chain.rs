//! Which unit lies in which, and which follows which.

use super::{PostOp, UnitId, UnitKind, Units, flow::Flow, kind};
use lathe_ir::ValueId;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How many nodes may stand between a join and the next stream; a normalization spelled out has nine.
const MAX_POST_NODES: usize = 24;

/// Enters which unit every node belongs to and which unit lies in which, for the units from `first` on.
pub(super) fn nest(flow: &Flow, units: &mut Units, first: usize) {
    let mut by_size: Vec<usize> = (first..units.units.len()).collect();
    // The smaller unit lies inside and is entered later.
    by_size.sort_by_key(|&index| std::cmp::Reverse(units.units[index].nodes.len()));
    // A unit in a subgraph lies in the unit that holds the node of that subgraph.
    let around = flow.graph.scope(flow.scope).owner().and_then(|id| units.of_node(id));
    for index in by_size {
        let unit = &units.units[index];
        let parent = units.of_node(unit.nodes[0]).or(around);
        let depth = parent.map_or(0, |p| units.get(p).depth + 1);
        let mine: Vec<_> = unit.nodes.iter().chain(&unit.support).copied().collect();
        let join = unit.join;
        (units.units[index].parent, units.units[index].depth) = (parent, depth);
        if let Some(parent) = parent {
            units.units[parent.index()].kind = UnitKind::Nested;
        }
        let id = Some(UnitId(index as u32));
        for node in mine {
            units.owner[node.index()] = id;
        }
        // The join of parallel branches stays with the first of them.
        let taken = units.owner[join.index()].is_some_and(|o| units.get(o).join == join && o.index() >= first);
        if !taken {
            units.owner[join.index()] = id;
        }
    }
    let inner: Vec<_> =
        flow.graph.nodes(flow.scope).filter(|id| !flow.graph.node(*id).subgraphs().is_empty()).collect();
    for owner in inner {
        let unit = units.of_node(owner);
        let mut pending = flow.graph.node(owner).subgraphs();
        while let Some(scope) = pending.pop() {
            for id in flow.graph.nodes(scope) {
                units.owner[id.index()] = unit;
                pending.extend(flow.graph.node(id).subgraphs());
            }
        }
    }
}

/// Puts the units from `first` on into chains.
pub(super) fn link(flow: &Flow, units: &mut Units, first: usize) {
    let mut ends: HashMap<ValueId, Vec<usize>> = HashMap::new();
    let mut followed: BTreeSet<usize> = BTreeSet::new();
    let mut chains: BTreeMap<usize, Vec<UnitId>> = BTreeMap::new();
    let base = units.chains.len();
    for index in first..units.units.len() {
        let unit = &units.units[index];
        let sibling = |value: &ValueId| {
            let found = ends.get(value)?.iter().rev().copied();
            found.into_iter().find(|&u| units.units[u].parent == unit.parent)
        };
        let together = sibling(&unit.stream_out).or_else(|| unit.via.iter().find_map(sibling));
        let before = match together {
            Some(unit) => Some((unit, None)),
            None => before(flow, unit.stream_in, &|v| sibling(&v)),
        };
        let before = before.filter(|(unit, _)| !followed.contains(unit));
        let (chain, position, post) = match before {
            Some((u, post)) => (units.units[u].chain, units.units[u].position + 1, post),
            None => (base + chains.len(), 0, None),
        };
        followed.extend(before.map(|(unit, _)| unit));
        chains.entry(chain).or_default().push(UnitId(index as u32));
        let out = unit.stream_out;
        let unit = &mut units.units[index];
        (unit.chain, unit.position, unit.post) = (chain, position, post);
        ends.entry(out).or_default().push(index);
    }
    units.chains.extend(chains.into_values());
}

/// The unit whose stream a value is, and what stands between.
fn before(flow: &Flow, stream: ValueId, ends: &dyn Fn(ValueId) -> Option<usize>) -> Option<(usize, Option<PostOp>)> {
    let mut pending = vec![stream];
    let mut seen = BTreeSet::new();
    let mut found = None;
    let mut post = None;
    while let Some(value) = pending.pop() {
        if let Some(unit) = ends(value) {
            if found.is_some_and(|f| f != unit) {
                return None;
            }
            found = Some(unit);
            continue;
        }
        if !seen.insert(value) {
            continue;
        }
        if seen.len() > MAX_POST_NODES {
            return None;
        }
        let at = flow.made_at(value)?;
        let step = kind::post_step(flow.graph.node(flow.order[at]))?;
        post = match (post, step) {
            (Some(PostOp::Norm), _) | (_, PostOp::Norm) => Some(PostOp::Norm),
            (Some(PostOp::Activation), _) | (_, PostOp::Activation) => Some(PostOp::Activation),
            _ => Some(PostOp::Layout),
        };
        pending.extend(&flow.reads[at]);
    }
    Some((found?, post))
}
