//! Work on many layers, on all cores.

use super::{
    Candidate, MethodContext, Proposal, Weight,
    factors::{self, LayerStatistics},
    weights,
};
use crate::Error;
use lathe_ir::{Model, ValueId};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Layers whose second moments are in memory at a time.
pub(super) const BATCH: usize = 8;

/// What a method makes of one layer.
pub(super) type Work<'a> = dyn Fn(&Weight, &LayerStatistics) -> Result<Vec<Candidate>, &'static str> + Sync + 'a;

/// What `work` makes of every layer that can be factored, a few layers at a time.
pub(super) fn in_batches(model: &Model, cx: &MethodContext, work: &Work<'_>) -> Result<Proposal, Error> {
    let mut proposal = Proposal::default();
    let graph = &model.graph;
    let place = |value: ValueId| format!("`{}`", graph.value(value).name);
    let (found, refused) = weights(graph);
    refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
    for batch in found.chunks(BATCH) {
        let mut ready = Vec::new();
        for weight in batch {
            match factors::statistics(graph, weight, cx)? {
                Ok(statistics) => ready.push((weight, statistics)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
        let done = on_all_cores(&ready, |(weight, statistics)| work(weight, statistics));
        for ((weight, _), candidates) in ready.iter().zip(done) {
            match candidates {
                Ok(candidates) => proposal.sites.push(weight.site(graph, candidates)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
    }
    Ok(proposal)
}

/// Applies `work` to every item on all cores; results in the order of the items.
pub(super) fn on_all_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(items.len().max(1));
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut all: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("a worker only computes")).collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}
