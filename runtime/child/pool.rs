//! Worker processes that requests are given to, as many at a time as there may be.

use super::worker::Worker;
use crate::{Listener, RuntimeError};
use std::{
    ffi::OsString,
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// How often whoever waits for a worker looks whether the work was called off.
const LOOK: Duration = Duration::from_millis(100);

/// Workers that are started when they are first needed, and again after they died.
pub(super) struct Pool {
    program: PathBuf,
    arguments: Vec<OsString>,
    most: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Worker>,
    busy: usize,
    /// Whether one request has the machine to itself.
    alone: bool,
}

impl Pool {
    /// Up to `most` workers, which `program` becomes when called with `arguments`.
    pub fn new(program: PathBuf, arguments: Vec<OsString>, most: usize) -> Pool {
        Pool { program, arguments, most: most.max(1), state: Mutex::default(), changed: Condvar::new() }
    }

    /// The same with another number of workers.
    pub fn with_most(self, most: usize) -> Pool {
        Pool { most: most.max(1), ..self }
    }

    /// How many requests can be answered at a time.
    pub fn most(&self) -> usize {
        self.most
    }

    /// A worker that answers nobody else; where it is to be alone, while no other one answers anybody.
    pub fn lend(&self, alone: bool, listener: &Listener) -> Result<Lent<'_>, RuntimeError> {
        let mut state = self.lock();
        while state.alone || state.busy >= if alone { 1 } else { self.most } {
            if listener.is_stopped() {
                return Err(RuntimeError::Stopped);
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        let worker = match state.idle.pop() {
            Some(worker) => worker,
            None => Worker::start(&self.program, &self.arguments)?,
        };
        state.busy += 1;
        state.alone = alone;
        Ok(Lent { pool: self, worker: Some(worker), alone })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker that goes back to the others when this is dropped, unless it is lost.
pub(super) struct Lent<'p> {
    pool: &'p Pool,
    worker: Option<Worker>,
    alone: bool,
}

impl Lent<'_> {
    /// The worker.
    pub fn worker(&mut self) -> &mut Worker {
        self.worker.as_mut().expect("it is there until it is lost")
    }

    /// The worker is not to be used any more; it ends.
    pub fn lose(mut self) {
        self.worker = None;
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.idle.extend(self.worker.take());
        state.busy -= 1;
        state.alone &= !self.alone;
        self.pool.changed.notify_all();
    }
}
