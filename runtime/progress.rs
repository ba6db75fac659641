//! How far long work is: said by the worker, heard by the program.

use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};

/// How far a piece of work is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is done.
    pub done: u64,
    /// What there is to do; 0 where nobody knows.
    pub total: u64,
    /// What is counted, in the plural: `samples`.
    pub unit: String,
}

impl Progress {
    /// `done` of `total` `unit`.
    pub fn new(done: usize, total: usize, unit: &str) -> Progress {
        Progress { done: done as u64, total: total as u64, unit: unit.to_owned() }
    }
}

type Hear = dyn Fn(&Progress) + Send + Sync;

/// Who hears of progress; by default nobody. Cheap to clone.
#[derive(Clone, Default)]
pub struct Listener(Option<Arc<Hear>>);

impl Listener {
    /// Calls `hear` with every report.
    pub fn new(hear: impl Fn(&Progress) + Send + Sync + 'static) -> Listener {
        Listener(Some(Arc::new(hear)))
    }

    /// Passes a report on.
    pub fn hear(&self, progress: &Progress) {
        if let Some(hear) = &self.0 {
            hear(progress);
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Listener" } else { "nobody" })
    }
}

/// How the worker says what it does: a closure that hears stages is one that ignores progress.
pub trait Talk {
    /// What is about to happen: `loading the original`. The time limit is on one stage.
    fn stage(&mut self, what: &str);
    /// `done` of `total` `unit` are done. Also a sign of life, which begins the time limit anew.
    fn progress(&mut self, done: usize, total: usize, unit: &str);
}

impl<F: FnMut(&str)> Talk for F {
    fn stage(&mut self, what: &str) {
        self(what);
    }

    fn progress(&mut self, _: usize, _: usize, _: &str) {}
}
