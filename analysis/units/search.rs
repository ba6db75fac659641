//! From a sum to the unit that ends there.

use super::{
    Barrier, NoUnit, NoUnitReason, Unit,
    flow::{Flow, reads_shape},
    kind,
};
use crate::Facts;
use lathe_ir::{NodeId, Use, ValueId};
use std::collections::{BTreeSet, HashMap};

/// How many steps a skip may take from the stream to the join.
const MAX_SKIP_STEPS: usize = 8;
/// How many nodes after the stream are looked at to see whether a side input comes from it.
const MAX_SIDE_NODES: usize = 256;
/// How many nodes are looked at in all, as a multiple of those of the scope.
const WORK_PER_NODE: usize = 64;
const WORK_AT_LEAST: usize = 1 << 20;

/// How a summand comes from the stream without passing a branch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    /// It is the stream, perhaps in another layout.
    Same,
    /// Through a layer.
    Projected,
}

/// A sum at which branches come back to their stream.
struct Join {
    /// The place of its node.
    at: usize,
    sum: ValueId,
    /// The partial sums on the way to it.
    via: Vec<ValueId>,
}

/// What lies between a stream and a set of summands.
struct Region {
    stream: ValueId,
    path: Path,
    /// For each summand the places of the nodes on a path to it, ascending.
    parts: Vec<Vec<usize>>,
}

struct Search<'a, 'f> {
    flow: &'f Flow<'a>,
    facts: &'f Facts,
    /// Marks places in the search that has this number.
    marks: Vec<u32>,
    reached: Vec<u32>,
    mark: u32,
    work: usize,
    /// The unit that computes a summand.
    of_branch: HashMap<ValueId, usize>,
    escapes: bool,
    too_deep: bool,
}

/// Appends the units of one scope.
pub(super) fn find(flow: &Flow, facts: &Facts, units: &mut Vec<Unit>, rejected: &mut Vec<NoUnit>) {
    let count = flow.order.len();
    let mut search = Search {
        flow,
        facts,
        marks: vec![0; count],
        reached: vec![0; count],
        mark: 0,
        work: (count * WORK_PER_NODE).max(WORK_AT_LEAST),
        of_branch: HashMap::new(),
        escapes: false,
        too_deep: false,
    };
    for at in (0..count).filter(|&at| flow.needed[at]) {
        search.join(at, units, rejected);
    }
}

impl Search<'_, '_> {
    fn join(&mut self, at: usize, units: &mut Vec<Unit>, rejected: &mut Vec<NoUnit>) {
        let id = self.flow.order[at];
        let Some((members, sum, fused)) = kind::sum_of(self.flow.graph.node(id)) else { return };
        let members: Vec<ValueId> = members.into_iter().filter(|v| self.flow.reads[at].contains(v)).collect();
        if members.len() < 2 || members[1..].iter().any(|&v| self.differ(members[0], v)) {
            return;
        }
        let known = self.alike(&members);
        (self.escapes, self.too_deep) = (false, false);
        let Some((region, members, via)) = self.solve(at, &members) else {
            let reason = match (self.too_deep, self.escapes) {
                (true, _) => NoUnitReason::TooDeep,
                (_, true) => NoUnitReason::Escape,
                _ => return,
            };
            rejected.push(NoUnit { join: id, reason });
            return;
        };
        if !known && !fused {
            rejected.push(NoUnit { join: id, reason: NoUnitReason::UnknownShapes });
            return;
        }
        self.emit(at, sum, region, &members, via, units);
    }

    fn alike(&self, members: &[ValueId]) -> bool {
        let first = members[0];
        members[1..].iter().all(|&v| self.facts.same_shape(first, v) && self.facts.elem(first) == self.facts.elem(v))
    }

    /// Whether two values cannot have the same shape, so that one is broadcast.
    fn differ(&self, a: ValueId, b: ValueId) -> bool {
        match (self.facts.shape(a), self.facts.shape(b)) {
            (Some(a), Some(b)) => a.len() != b.len() || a.iter().zip(b).any(|(a, b)| a.differs(b)),
            _ => false,
        }
    }

    /// The stream of a join, the summands computed from it, and the partial sums that had to be taken apart.
    fn solve(&mut self, at: usize, members: &[ValueId]) -> Option<(Region, Vec<ValueId>, Vec<ValueId>)> {
        let (flat, via) = self.flatten(members, usize::MAX);
        let ways: Vec<(&[ValueId], Vec<ValueId>)> =
            if via.is_empty() { vec![(members, via)] } else { vec![(members, Vec::new()), (&flat, via)] };
        for projected in [false, true] {
            for (members, via) in &ways {
                if let Some((region, branches)) = self.split_off(at, members, projected) {
                    return Some((region, branches, via.clone()));
                }
            }
        }
        None
    }

    /// Takes the first `times` partial sums among summands apart that are used nowhere else.
    fn flatten(&self, members: &[ValueId], times: usize) -> (Vec<ValueId>, Vec<ValueId>) {
        let (mut flat, mut via) = (Vec::new(), Vec::new());
        let mut pending: Vec<ValueId> = members.iter().rev().copied().collect();
        while let Some(value) = pending.pop() {
            let graph = self.flow.graph;
            let inner = self.flow.made_at(value).filter(|_| graph.value(value).uses().len() == 1 && via.len() < times);
            let sum = inner.and_then(|at| {
                let (summands, ..) = kind::sum_of(graph.node(self.flow.order[at])).filter(|(_, _, fused)| !fused)?;
                let fits = summands.iter().all(|v| self.flow.reads[at].contains(v)) && self.alike(&summands);
                fits.then_some(summands)
            });
            match sum {
                Some(summands) if flat.len() + pending.len() + summands.len() <= 8 => {
                    via.push(value);
                    pending.extend(summands.into_iter().rev());
                }
                _ => flat.push(value),
            }
        }
        (flat, via)
    }

    /// Finds the summand that is the stream, and the way from it to all others.
    fn split_off(&mut self, at: usize, members: &[ValueId], projected: bool) -> Option<(Region, Vec<ValueId>)> {
        let mut by_place: Vec<ValueId> = members.to_vec();
        by_place.sort_by_key(|&v| self.flow.made_at(v).map_or(0, |p| p + 1));
        let tries = if projected { by_place.len() } else { 1 };
        for index in 0..tries {
            let mut branches = by_place.clone();
            let skip = branches.remove(index);
            let streams = if projected { self.skip_path(skip) } else { vec![(skip, Path::Same)] };
            if streams.is_empty() {
                continue;
            }
            if let Some(region) = self.region(at, &streams, &branches) {
                return Some((region, branches));
            }
        }
        None
    }

    /// The values from which a summand comes by layout changes or a projection, the nearest first.
    fn skip_path(&self, skip: ValueId) -> Vec<(ValueId, Path)> {
        let graph = self.flow.graph;
        let (mut found, mut value, mut path) = (Vec::new(), skip, Path::Same);
        for _ in 0..MAX_SKIP_STEPS {
            let Some(at) = self.flow.made_at(value) else { break };
            let node = graph.node(self.flow.order[at]);
            let [next] = self.flow.reads[at].as_slice() else { break };
            let (may, projects) = kind::is_projection(graph, node);
            if !kind::is_layout(node) && !may {
                break;
            }
            if projects {
                path = Path::Projected;
            }
            value = *next;
            // Slices, pads and sums alone are no projection, but may stand beside one.
            if path == Path::Projected || kind::is_layout(node) {
                found.push((value, path));
            }
        }
        found
    }

    /// The nodes between the first of `streams` that serves and every branch, if nothing leaks out.
    fn region(&mut self, gate: usize, streams: &[(ValueId, Path)], branches: &[ValueId]) -> Option<Region> {
        let floor = streams.iter().map(|&(v, _)| self.flow.made_at(v).map_or(0, |p| p + 1)).min()?;
        let (seen, sides) = self.behind(gate, floor, branches)?;
        for &(stream, path) in streams {
            let Some(parts) = self.parts(stream, branches, &seen) else { continue };
            if sides.iter().any(|&side| self.comes_from(side, stream)) {
                self.escapes = true;
                return None;
            }
            let all = union(&parts);
            let node = |at: &usize| self.flow.graph.node(self.flow.order[*at]);
            let nonlinear = path == Path::Same || all.iter().any(|at| kind::is_nonlinear(node(at)));
            if nonlinear && all.iter().any(|at| kind::is_layer(node(at))) {
                return Some(Region { stream, path, parts });
            }
            return None;
        }
        // The stream may still reach a branch past a node that something else uses.
        let (stream, _) = streams[0];
        let layers = seen.iter().any(|&at| kind::is_layer(self.flow.graph.node(self.flow.order[at])));
        self.escapes |= layers && sides.iter().any(|&side| self.comes_from(side, stream));
        None
    }

    /// The nodes from `floor` on that branches need and that serve nothing but the join, ascending; and the places of
    /// nodes that those read and that serve something else as well.
    fn behind(&mut self, gate: usize, floor: usize, branches: &[ValueId]) -> Option<(Vec<usize>, Vec<usize>)> {
        self.mark += 1;
        let (mut seen, mut sides) = (Vec::new(), BTreeSet::new());
        let mut pending: Vec<ValueId> = branches.to_vec();
        while let Some(value) = pending.pop() {
            let Some(at) = self.flow.made_at(value).filter(|&at| at >= floor) else { continue };
            if self.marks[at] == self.mark {
                continue;
            }
            if !self.flow.passes(at, gate) {
                sides.insert(at);
                continue;
            }
            self.marks[at] = self.mark;
            self.spend()?;
            seen.push(at);
            pending.extend(&self.flow.reads[at]);
        }
        seen.sort_unstable();
        Some((seen, sides.into_iter().collect()))
    }

    fn spend(&mut self) -> Option<()> {
        self.too_deep |= self.work == 0;
        self.work = self.work.checked_sub(1)?;
        Some(())
    }

    /// Whether a value is the stream, or the stream normalized by the node that made it.
    fn is_stream(&self, value: ValueId, stream: ValueId) -> bool {
        let graph = self.flow.graph;
        value == stream
            || graph
                .producer(value)
                .is_some_and(|id| graph.producer(stream) == Some(id) && kind::is_normalized_sum(graph.node(id)))
    }

    /// For every branch the nodes among `seen` on a path to it from the stream; `None` if there is none to one of them.
    fn parts(&mut self, stream: ValueId, branches: &[ValueId], seen: &[usize]) -> Option<Vec<Vec<usize>>> {
        self.mark += 1;
        for &at in seen {
            let reads = &self.flow.reads[at];
            let from = |v: ValueId| {
                self.is_stream(v, stream) || self.flow.made_at(v).is_some_and(|p| self.reached[p] == self.mark)
            };
            if reads.iter().any(|&v| from(v)) {
                self.reached[at] = self.mark;
            }
        }
        let goal = self.mark;
        let mut parts = Vec::new();
        for &branch in branches {
            self.mark += 1;
            let mut part = Vec::new();
            let mut pending = vec![branch];
            while let Some(value) = pending.pop() {
                let Some(at) = self.flow.made_at(value) else { continue };
                if self.reached[at] != goal || self.marks[at] == self.mark {
                    continue;
                }
                self.marks[at] = self.mark;
                self.spend()?;
                part.push(at);
                pending.extend(&self.flow.reads[at]);
            }
            if part.is_empty() {
                return None;
            }
            part.sort_unstable();
            parts.push(part);
        }
        Some(parts)
    }

    /// Whether the node at `side` needs the stream, as far as a short look shows.
    fn comes_from(&mut self, side: usize, stream: ValueId) -> bool {
        let floor = self.flow.made_at(stream).map_or(0, |p| p + 1);
        let mut pending = vec![side];
        let mut looked: BTreeSet<usize> = BTreeSet::new();
        while let Some(at) = pending.pop() {
            if !looked.insert(at) || looked.len() > MAX_SIDE_NODES || self.spend().is_none() {
                continue;
            }
            for &value in &self.flow.reads[at] {
                if self.is_stream(value, stream) {
                    return true;
                }
                pending.extend(self.flow.made_at(value).filter(|&p| p >= floor));
            }
        }
        false
    }

    /// Enters the units of a join: one for each branch that can be told apart, else one for all of them.
    fn emit(
        &mut self,
        at: usize,
        sum: ValueId,
        mut region: Region,
        branches: &[ValueId],
        via: Vec<ValueId>,
        units: &mut Vec<Unit>,
    ) {
        let mut branches = branches.to_vec();
        let mut through = via.clone();
        // A branch that is itself a sum may be several.
        let (finer, inner) = self.flatten(&branches, usize::MAX);
        if !inner.is_empty()
            && region.path == Path::Same
            && let Some(parts) = self.region(at, &[(region.stream, Path::Same)], &finer)
        {
            let split = apart(&parts.parts);
            if split.iter().all(|part| self.substantial(part)) {
                (region, branches) = (Region { parts: split, ..parts }, finer);
                through.extend(inner);
                return self.enter(Join { at, sum, via: through }, region, branches, units);
            }
        }
        if branches.len() > 1 {
            let split = apart(&region.parts);
            if split.iter().all(|part| self.substantial(part)) {
                region.parts = split;
            } else {
                region.parts = vec![union(&region.parts)];
            }
        }
        self.enter(Join { at, sum, via: through }, region, branches, units);
    }

    fn substantial(&self, part: &[usize]) -> bool {
        let node = |at: &usize| self.flow.graph.node(self.flow.order[*at]);
        part.iter().any(|at| kind::is_layer(node(at))) && part.iter().any(|at| kind::is_nonlinear(node(at)))
    }

    fn enter(&mut self, join: Join, region: Region, branches: Vec<ValueId>, units: &mut Vec<Unit>) {
        let groups: Vec<Vec<ValueId>> = match region.parts.len() {
            1 => vec![branches],
            _ => branches.into_iter().map(|b| vec![b]).collect(),
        };
        for (branch, places) in groups.into_iter().zip(region.parts) {
            if branch.iter().any(|b| self.of_branch.contains_key(b)) {
                continue;
            }
            for &value in &branch {
                self.of_branch.insert(value, units.len());
            }
            let unit = self.unit(&join, region.stream, region.path, branch, &places);
            units.push(unit);
        }
    }

    /// The unit of one branch, whose nodes are at `places`.
    fn unit(&mut self, join: &Join, stream: ValueId, path: Path, branch: Vec<ValueId>, places: &[usize]) -> Unit {
        let (flow, graph) = (self.flow, self.flow.graph);
        self.mark += 1;
        let mark = self.mark;
        for &place in places {
            self.reached[place] = mark;
        }
        let mut side_inputs = BTreeSet::new();
        for &place in places {
            let foreign = |v: &&ValueId| {
                !self.is_stream(**v, stream) && flow.made_at(**v).is_none_or(|p| self.reached[p] != mark)
            };
            side_inputs.extend(flow.reads[place].iter().filter(foreign).copied());
        }
        let kind = kind::classify(flow, places, |p| self.reached[p] == mark);
        let nodes: Vec<NodeId> = places.iter().map(|&p| flow.order[p]).collect();
        let (mut support, outputs) = self.leaving(places);
        for &place in places.iter().chain(&support) {
            self.reached[place] = mark;
        }
        support.extend(self.only_for(places, &support.clone()));
        support.sort_unstable();
        for &place in &support {
            self.reached[place] = mark;
        }
        let made = nodes.iter().flat_map(|&id| graph.node(id).outputs().iter().flatten().copied());
        let measured = |v: &ValueId| {
            let outside = |u: &Use| match u {
                Use::Node(id, input) => {
                    reads_shape(graph, *id, *input) && flow.lift(*id).is_some_and(|p| self.reached[p] != mark)
                }
                _ => false,
            };
            graph.value(*v).uses().iter().any(outside)
        };
        let shape_taps = made.filter(measured).collect();
        // The sum that reads the branch; of a partial sum that is not the last one.
        let reader = graph.value(branch[0]).uses().iter().find_map(|u| match u {
            Use::Node(id, _) => join.via.iter().find(|&&v| graph.producer(v) == Some(*id)).map(|_| *id),
            _ => None,
        });
        Unit {
            join: reader.unwrap_or(flow.order[join.at]),
            stream_in: stream,
            stream_out: join.sum,
            branch,
            signature: kind::signature(graph, &nodes),
            nodes,
            support: support.into_iter().map(|p| flow.order[p]).collect(),
            side_inputs: side_inputs.into_iter().collect(),
            outputs,
            shape_taps,
            kind,
            barrier: (path == Path::Projected).then_some(Barrier::Projected),
            chain: 0,
            position: 0,
            post: None,
            parent: None,
            depth: 0,
            via: join.via.clone(),
        }
    }

    /// What follows from a unit and is needed by nothing but caches and attention maps among the outputs: the places of
    /// the nodes, and the outputs.
    fn leaving(&self, places: &[usize]) -> (Vec<usize>, Vec<ValueId>) {
        let (flow, graph) = (self.flow, self.flow.graph);
        let (mut found, mut outputs) = (BTreeSet::new(), BTreeSet::new());
        let mut pending: Vec<usize> = places.to_vec();
        while let Some(at) = pending.pop() {
            for &value in graph.node(flow.order[at]).outputs().iter().flatten() {
                for place in graph.value(value).uses() {
                    match place {
                        Use::Output(scope, _) if *scope == flow.scope => _ = outputs.insert(value),
                        Use::Node(id, _) => {
                            let user = flow.lift(*id).filter(|&p| !flow.needed[p] && !flow.reads[p].is_empty());
                            pending.extend(user.filter(|&p| found.insert(p)));
                        }
                        _ => {}
                    }
                }
            }
        }
        (found.into_iter().collect(), outputs.into_iter().collect())
    }

    /// The places of nodes that only these places need, directly or not.
    fn only_for(&mut self, places: &[usize], more: &[usize]) -> Vec<usize> {
        let (flow, graph) = (self.flow, self.flow.graph);
        self.mark += 1;
        let mark = self.mark;
        let mut open: BTreeSet<usize> = BTreeSet::new();
        for &place in places.iter().chain(more) {
            self.marks[place] = mark;
        }
        let makers = |at: usize| {
            let id = flow.order[at];
            let node = graph.node(id);
            let captured = node.subgraphs().into_iter().flat_map(|s| graph.captures(s));
            let read: Vec<ValueId> = node.inputs().iter().flatten().copied().chain(captured).collect();
            read.into_iter().filter_map(|v| flow.made_at(v)).collect::<Vec<_>>()
        };
        for &place in places.iter().chain(more) {
            open.extend(makers(place).into_iter().filter(|&p| self.marks[p] != mark));
        }
        let mut found = Vec::new();
        // From last to first, so that all users of a node have been decided before it.
        while let Some(at) = open.pop_last() {
            let outputs = graph.node(flow.order[at]).outputs();
            if outputs.iter().flatten().all(|&v| flow.all_users(v, |p| self.marks[p] == mark)) {
                self.marks[at] = mark;
                found.push(at);
                open.extend(makers(at).into_iter().filter(|&p| self.marks[p] != mark));
            }
        }
        found
    }
}

fn union(parts: &[Vec<usize>]) -> Vec<usize> {
    let all: BTreeSet<usize> = parts.iter().flatten().copied().collect();
    all.into_iter().collect()
}

/// Each part without what others hold as well.
fn apart(parts: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut held: HashMap<usize, usize> = HashMap::new();
    for &place in parts.iter().flatten() {
        *held.entry(place).or_default() += 1;
    }
    parts.iter().map(|part| part.iter().copied().filter(|place| held[place] == 1).collect()).collect()
}
