//! Concatenations of an encoder's tensor with what the decoder made of it.

use super::{Skip, is_latent, place};
use crate::{Cones, units::flow::Flow};
use lathe_ir::ValueId;

/// How many nodes are looked at in all, as a multiple of those of the graph.
const WORK_PER_NODE: usize = 64;
const WORK_AT_LEAST: usize = 1 << 20;

/// The skips of a graph, the last to run first; their levels are not yet known.
pub(super) fn find(flow: &Flow, cones: &Cones) -> Vec<Skip> {
    let mut walk = Walk { flow, seen: vec![0; flow.order.len()], mark: 0, work: allowance(flow) };
    let mut found = Vec::new();
    for (at, &id) in flow.order.iter().enumerate().rev() {
        let node = flow.graph.node(id);
        let operands: Vec<ValueId> = node.inputs().iter().flatten().copied().collect();
        let &[a, b] = operands.as_slice() else { continue };
        if !node.is("Concat") || !flow.needed[at] || !operands.iter().all(|&v| is_latent(cones, v)) {
            continue;
        }
        let (source, deep) = if place(flow, a) <= place(flow, b) { (a, b) } else { (b, a) };
        if source != deep && walk.between(source, deep).is_some() {
            found.push(Skip { join: id, source, deep, level: None });
        }
    }
    found
}

/// How many nodes a search over all pairs of values may look at.
pub(super) fn allowance(flow: &Flow) -> usize {
    (flow.order.len() * WORK_PER_NODE).max(WORK_AT_LEAST)
}

/// Searches backwards from values.
pub(super) struct Walk<'a, 'f> {
    pub flow: &'f Flow<'a>,
    pub seen: Vec<u32>,
    pub mark: u32,
    /// How many nodes may still be looked at.
    pub work: usize,
}

impl Walk<'_, '_> {
    /// The places on a path from one value to a later one, ascending; `None` if there is no path, or no more work may
    /// be done.
    pub fn between(&mut self, from: ValueId, to: ValueId) -> Option<Vec<usize>> {
        let first = place(self.flow, from);
        self.mark += 1;
        let mut pending = vec![to];
        let mut places = Vec::new();
        while let Some(value) = pending.pop() {
            let Some(at) = self.flow.made_at(value).filter(|&at| at + 1 > first) else { continue };
            if value == from || std::mem::replace(&mut self.seen[at], self.mark) == self.mark {
                continue;
            }
            self.work = self.work.checked_sub(1)?;
            places.push(at);
            pending.extend(&self.flow.reads[at]);
        }
        places.sort_unstable();
        // Of what leads to the end only what comes from the start is kept.
        self.mark += 1;
        let mark = self.mark;
        places.retain(|&at| {
            let comes = |v: &ValueId| *v == from || self.flow.made_at(*v).is_some_and(|m| self.seen[m] == mark);
            let comes = self.flow.reads[at].iter().any(comes);
            if comes {
                self.seen[at] = mark;
            }
            comes
        });
        (places.last().copied() == self.flow.made_at(to) && !places.is_empty()).then_some(places)
    }
}
