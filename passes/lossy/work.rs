//! Work on many layers, on all cores and in bounded memory.

use super::{
    Candidate, MethodContext, Proposal, Weight,
    factors::{self, LayerStatistics},
    weights,
};
use crate::Error;
use lathe_ir::{Model, ValueId};
use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

/// Bytes that work on layers may take where nobody says.
const MEMORY: u64 = 4 << 30;

/// The part of the memory that second moments of layers in work may take.
const STATISTICS: u64 = 8;

/// The part of the memory that layers worked on side by side may take.
const WORKING: u64 = 2;

/// What a method makes of one layer.
pub(super) type Work<'a> = dyn Fn(&Weight, &LayerStatistics) -> Result<Vec<Candidate>, &'static str> + Sync + 'a;

/// What `work` makes of every layer that can be factored, a few layers at a time.
pub(super) fn in_batches(model: &Model, cx: &MethodContext, work: &Work<'_>) -> Result<Proposal, Error> {
    let mut proposal = Proposal::default();
    let graph = &model.graph;
    let place = |value: ValueId| format!("`{}`", graph.value(value).name);
    let (found, refused) = weights(graph);
    refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
    for batch in batches(&found, cx, factors::statistics_bytes) {
        let mut ready = Vec::new();
        for weight in batch {
            match factors::statistics(graph, weight, cx)? {
                Ok(statistics) => ready.push((weight, statistics)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
        let bytes = |(weight, _): &(&Weight, LayerStatistics)| factors::working_bytes(weight.sides());
        let done = within_memory(&ready, cx, bytes, |(weight, statistics)| work(weight, statistics));
        for ((weight, _), candidates) in ready.iter().zip(done) {
            match candidates {
                Ok(candidates) => proposal.sites.push(weight.site(graph, candidates)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
    }
    Ok(proposal)
}

/// Neighbours whose second moments, of so many `bytes`, are in memory at a time: as many as fit, and one at least.
pub(super) fn batches<'a, T>(items: &'a [T], cx: &MethodContext, bytes: impl Fn(&T) -> u64) -> Vec<&'a [T]> {
    let limit = cx.memory.unwrap_or(MEMORY) / STATISTICS;
    let (mut all, mut rest) = (Vec::new(), items);
    while !rest.is_empty() {
        let mut taken = 0;
        let mut fits = |item: &T| {
            taken += bytes(item);
            taken <= limit
        };
        let (batch, others) = rest.split_at(rest.iter().take_while(|item| fits(item)).count().max(1));
        all.push(batch);
        rest = others;
    }
    all
}

/// Applies `work` to every item on as many threads as there may be; results in the order of the items.
pub(super) fn on_all_cores<T: Sync, R: Send>(cx: &MethodContext, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    side_by_side(items, (cx.threads, u64::MAX), |_| 0, work)
}

/// The same where an item takes so many `bytes` while it is worked on: an item waits until it fits beside those that
/// are in work. One that fits nowhere is worked on alone.
pub(super) fn within_memory<T: Sync, R: Send>(
    items: &[T],
    cx: &MethodContext,
    bytes: impl Fn(&T) -> u64 + Sync,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    side_by_side(items, (cx.threads, cx.memory.unwrap_or(MEMORY) / WORKING), bytes, work)
}

fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    (most, limit): (usize, u64),
    bytes: impl Fn(&T) -> u64 + Sync,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let most = if most == 0 { thread::available_parallelism().map_or(1, usize::from) } else { most };
    let threads = most.min(items.len().max(1));
    let queue = Queue { items, limit, state: Mutex::default(), freed: Condvar::new() };
    let run = || {
        let mut done = Vec::new();
        while let Some((index, item, _taken)) = queue.next(&bytes) {
            done.push((index, work(item)));
        }
        done
    };
    let mut all: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("a worker only computes")).collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

/// Items in order, given out as far as they fit into memory.
struct Queue<'a, T> {
    items: &'a [T],
    limit: u64,
    state: Mutex<InWork>,
    /// Told when an item is done.
    freed: Condvar,
}

#[derive(Default)]
struct InWork {
    /// The next item.
    next: usize,
    /// Items in work, and what they take.
    count: usize,
    bytes: u64,
}

impl<T> Queue<'_, T> {
    fn state(&self) -> MutexGuard<'_, InWork> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next item once there is room for it, which it holds until the last part of the answer is dropped.
    fn next(&self, bytes: &impl Fn(&T) -> u64) -> Option<(usize, &T, Taken<'_, T>)> {
        let mut state = self.state();
        loop {
            let item = self.items.get(state.next)?;
            let bytes = bytes(item);
            if state.count == 0 || state.bytes.saturating_add(bytes) <= self.limit {
                let index = state.next;
                *state = InWork { next: index + 1, count: state.count + 1, bytes: state.bytes.saturating_add(bytes) };
                return Some((index, item, Taken { queue: self, bytes }));
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The room of an item in work.
struct Taken<'a, T> {
    queue: &'a Queue<'a, T>,
    bytes: u64,
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        state.count -= 1;
        state.bytes -= self.bytes;
        self.queue.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn context(memory: u64) -> MethodContext<'static> {
        MethodContext::default().with_memory(memory)
    }

    #[test]
    fn a_batch_holds_what_fits_and_one_at_least() {
        let sizes = [3, 3, 3, 9, 1, 8, 8, 2];
        let of = |memory: u64| batches(&sizes, &context(memory), |&size| size);
        assert_eq!(of(8 * STATISTICS), [&[3, 3][..], &[3], &[9], &[1], &[8], &[8], &[2]]);
        assert_eq!(of(0).len(), sizes.len());
        assert_eq!(of(1 << 20), [&sizes[..]]);
    }

    #[test]
    fn work_side_by_side_keeps_to_the_memory_and_loses_nothing() {
        let (taken, most) = (AtomicU64::new(0), AtomicU64::new(0));
        let sizes: Vec<u64> = (0..40).map(|at| at % 5 + 1).collect();
        let work = |&size: &u64| {
            most.fetch_max(taken.fetch_add(size, Ordering::SeqCst) + size, Ordering::SeqCst);
            thread::sleep(std::time::Duration::from_millis(1));
            taken.fetch_sub(size, Ordering::SeqCst);
            size * 2
        };
        for limit in [0, 4, 7, 100] {
            most.store(0, Ordering::SeqCst);
            let done = within_memory(&sizes, &context(limit * WORKING), |&size| size, work);
            assert_eq!(done, sizes.iter().map(|size| size * 2).collect::<Vec<_>>());
            assert!(most.load(Ordering::SeqCst) <= limit.max(5), "{most:?} of {limit}");
        }
    }
}
