//! How far long work is: said by the worker, heard by the program.

use crate::trace::{Span, Trace};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

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

/// What a whole run tells of itself, besides how far the piece of work at hand is.
#[derive(Debug, Clone, PartialEq)]
pub enum RunEvent {
    /// The stages that are to come, each with its usual share of the time.
    Plan(Vec<(&'static str, f64)>),
    /// A stage begins.
    Stage(&'static str),
    /// Of the stage, so many parts of all are done, and this one is next.
    Part(usize, usize, String),
    /// The best result so far.
    Best(String),
}

type Hear = dyn Fn(&Progress) + Send + Sync;
type Follow = dyn Fn(&RunEvent) + Send + Sync;

/// Who hears of progress, and may call the work off; by default nobody. Cheap to clone.
#[derive(Clone, Default)]
pub struct Listener {
    hear: Option<Arc<Hear>>,
    stop: Option<Arc<AtomicBool>>,
    trace: Option<Arc<Trace>>,
    follow: Option<Arc<Follow>>,
}

impl Listener {
    /// Calls `hear` with every report.
    pub fn new(hear: impl Fn(&Progress) + Send + Sync + 'static) -> Listener {
        Listener { hear: Some(Arc::new(hear)), ..Listener::default() }
    }

    /// The same, and `trace` keeps what takes how long.
    pub fn traced_by(self, trace: Arc<Trace>) -> Listener {
        Listener { trace: Some(trace), ..self }
    }

    /// The same, and `follow` hears of the run as a whole.
    pub fn followed_by(self, follow: impl Fn(&RunEvent) + Send + Sync + 'static) -> Listener {
        Listener { follow: Some(Arc::new(follow)), ..self }
    }

    /// The same for one of several workers at a time, whose reports would contradict each other.
    pub(crate) fn of_many(&self) -> Listener {
        Listener { hear: None, follow: None, ..self.clone() }
    }

    /// Tells what the whole run does.
    pub fn tell(&self, event: &RunEvent) {
        if let Some(follow) = &self.follow {
            follow(event);
        }
    }

    /// A stage of the run, which ends where the span is dropped.
    pub fn stage(&self, name: &'static str) -> Span {
        self.tell(&RunEvent::Stage(name));
        self.span(name)
    }

    /// Work of the program that begins now and ends where the span is dropped.
    pub fn span(&self, what: &str) -> Span {
        Span::begin(self.trace.as_ref(), "program", what, std::process::id())
    }

    /// Work of a worker by its process.
    pub(crate) fn span_of(&self, process: u32, category: &'static str, what: &str) -> Span {
        Span::begin(self.trace.as_ref(), category, what, process)
    }

    /// The same, and once `stop` is true the work that it hears of ends as an error at the next occasion.
    pub fn stopped_by(self, stop: Arc<AtomicBool>) -> Listener {
        Listener { stop: Some(stop), ..self }
    }

    /// Passes a report on.
    pub fn hear(&self, progress: &Progress) {
        if let Some(hear) = &self.hear {
            hear(progress);
        }
    }

    /// Whether the work was called off.
    pub fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.hear.is_some() { "Listener" } else { "nobody" })
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
