//! Where the error of a simulation comes from: the node at which it jumps, else the part of the model that adds most.

use super::{ANYTHING, Attempt, PrecisionOptions};
use crate::{Failure, job::Job};
use anyhow::Context as _;
use lathe_ir::{Model, NodeId, ScopeId, ValueId};
use lathe_passes::precision::{simulate_some, watch_errors};
use lathe_runtime::Verdict;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// A value whose error is so many times that of what it is computed from is where the error comes from.
const JUMP: f64 = 10.0;

/// Values that are compared in one run.
const COMPARED_AT_A_TIME: usize = 64;

/// Parts of a model whose shares in the error are told apart.
const PARTS: usize = 8;

/// Nodes that the simulation points at, the first of them first, and why.
pub(super) struct Culprit {
    pub nodes: Vec<NodeId>,
    pub reason: String,
}

impl Job<'_> {
    /// Where the error of the simulation begins, or most of it comes from; `None` if nothing is rounded.
    pub(super) fn culprit(
        &self,
        model: &Model,
        reference: &Path,
        attempt: &Attempt,
        asked: PrecisionOptions,
    ) -> Result<Option<Culprit>, Failure> {
        let graph = &model.graph;
        let order = graph.sorted(ScopeId::MAIN).context("the nodes of the model need one another")?;
        let made = |id: &NodeId| graph.node(*id).outputs().iter().flatten().copied().collect::<Vec<ValueId>>();
        let is_half = |value: &ValueId| attempt.converted.values.contains(value);
        let values: Vec<ValueId> = order.iter().flat_map(made).filter(is_half).collect();
        match self.jump(model, attempt, asked, &values)? {
            Some(culprit) => Ok(Some(culprit)),
            None => self.largest_part(model, reference, attempt, (asked, &values)),
        }
    }

    /// The first node whose error is many times that of what it reads.
    fn jump(
        &self,
        model: &Model,
        attempt: &Attempt,
        asked: PrecisionOptions,
        values: &[ValueId],
    ) -> Result<Option<Culprit>, Failure> {
        let graph = &model.graph;
        let mut errors: BTreeMap<ValueId, f64> = BTreeMap::new();
        for some in values.chunks(COMPARED_AT_A_TIME) {
            let (reference, rounded, names) = watch_errors(model, &attempt.simulation, some);
            let Verdict::Compared(report) = self.compare_on(&reference, &rounded, &self.inputs(), ANYTHING)? else {
                continue;
            };
            for output in report.comparison.outputs {
                if let Some(&value) = names.get(&output.name) {
                    let finite = output.max_abs.is_finite() && output.rel_l2.is_finite();
                    errors.insert(value, if finite { output.rel_l2 } else { f64::INFINITY });
                }
            }
        }
        // Below a part of the tolerance an error is what rounding is.
        let floor = asked.tolerance() / 4.0;
        let before = |id: NodeId| {
            let read = graph.node(id).inputs().iter().flatten().filter_map(|v| errors.get(v));
            read.copied().filter(|error| error.is_finite()).fold(floor, f64::max)
        };
        let jumps = |value: &&ValueId| {
            graph.producer(**value).is_some_and(|id| errors.get(value).is_some_and(|error| *error > JUMP * before(id)))
        };
        let Some((&value, id)) = values.iter().find(jumps).and_then(|value| Some((value, graph.producer(*value)?)))
        else {
            return Ok(None);
        };
        let reason = match errors.get(&value) {
            Some(error) if error.is_finite() => {
                format!("the simulation's error is {error:.1e} behind it and at most {:.1e} before it", before(id))
            }
            _ => "it overflows in the simulation".to_owned(),
        };
        let read = graph.node(id).inputs().iter().flatten().filter_map(|&v| graph.producer(v));
        let read = read.filter(|before| attempt.converted.nodes.contains(before));
        Ok(Some(Culprit { nodes: std::iter::once(id).chain(read).collect(), reason }))
    }

    /// The part of the model whose rounding alone makes the largest error.
    fn largest_part(
        &self,
        model: &Model,
        reference: &Path,
        attempt: &Attempt,
        (asked, values): (PrecisionOptions, &[ValueId]),
    ) -> Result<Option<Culprit>, Failure> {
        let mut seen = BTreeSet::new();
        let makers = values.iter().filter_map(|&value| model.graph.producer(value));
        let makers: Vec<NodeId> =
            makers.filter(|id| attempt.converted.nodes.contains(id) && seen.insert(*id)).collect();
        let mut worst: Option<(f64, &[NodeId])> = None;
        for part in makers.chunks(makers.len().div_ceil(PARTS).max(1)) {
            let chosen: BTreeSet<NodeId> = part.iter().copied().collect();
            let simulation = simulate_some(&attempt.converted, model, &chosen);
            let report = self.simulated(model, reference, &simulation, asked.tolerance())?;
            let alone = Attempt::error_of(&report);
            if worst.is_none_or(|(most, _)| alone > most) {
                worst = Some((alone, part));
            }
        }
        let Some((error, part)) = worst else { return Ok(None) };
        let nodes = part.to_vec();
        let reason = format!("rounding there alone makes an error of {error:.1e}");
        Ok((!nodes.is_empty()).then_some(Culprit { nodes, reason }))
    }
}
