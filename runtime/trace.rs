//! Where time goes: spans of the program and of what its workers say they do, in the trace format of Chrome.
//!
//! <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU> describes the format; Perfetto and
//! `chrome://tracing` show it.

use serde_json::json;
use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// A file that spans are written to as they end, one line each. It can be shown even where the program was killed: the
/// format does without its closing bracket.
#[derive(Debug)]
pub struct Trace {
    start: Instant,
    out: Mutex<File>,
}

impl Trace {
    /// Begins a trace in this file, which is overwritten.
    pub fn create(path: &Path) -> io::Result<Trace> {
        let mut out = File::create(path)?;
        out.write_all(b"[\n")?;
        Ok(Trace { start: Instant::now(), out: Mutex::new(out) })
    }

    fn write(&self, span: &Span) {
        let since = |from: Instant, to: Instant| to.duration_since(from).as_micros() as u64;
        let event = json!({
            "name": span.what, "cat": span.category, "ph": "X", "ts": since(self.start, span.start),
            "dur": since(span.start, Instant::now()), "pid": span.process, "tid": thread_number(),
        });
        // A trace that cannot be written is no reason to lose the work.
        let _ = writeln!(self.out.lock().unwrap_or_else(PoisonError::into_inner), "{event},");
    }
}

/// Work that goes on until this is dropped.
#[derive(Debug)]
#[must_use = "a span ends where it is dropped"]
pub struct Span {
    trace: Option<Arc<Trace>>,
    what: String,
    category: &'static str,
    process: u32,
    start: Instant,
}

impl Span {
    /// A span of `process`; one that nobody records costs nothing.
    pub(crate) fn begin(trace: Option<&Arc<Trace>>, category: &'static str, what: &str, process: u32) -> Span {
        let what = if trace.is_some() { what.to_owned() } else { String::new() };
        Span { trace: trace.cloned(), what, category, process, start: Instant::now() }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(trace) = self.trace.take() {
            trace.write(self);
        }
    }
}

/// A number for every thread, from 1 on.
fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static OWN: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    OWN.with(|own| *own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn spans_nest_by_their_times() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Arc::new(Trace::create(&path).unwrap());
        let outer = Span::begin(Some(&trace), "program", "outer", 1);
        drop(Span::begin(Some(&trace), "worker", "inner", 2));
        drop(outer);
        drop(Span::begin(None, "program", "unheard", 1));
        let text = std::fs::read_to_string(&path).unwrap();
        let events: Vec<Value> =
            text.lines().skip(1).map(|line| serde_json::from_str(line.strip_suffix(',').unwrap()).unwrap()).collect();
        let names: Vec<&str> = events.iter().map(|event| event["name"].as_str().unwrap()).collect();
        assert_eq!((text.starts_with("[\n"), &names[..]), (true, &["inner", "outer"][..]));
        let end = |event: &Value| event["ts"].as_u64().unwrap() + event["dur"].as_u64().unwrap();
        assert!(events[0]["ts"].as_u64() >= events[1]["ts"].as_u64() && end(&events[0]) <= end(&events[1]));
        assert_eq!((events[0]["pid"].as_u64(), events[0]["cat"].as_str()), (Some(2), Some("worker")));
    }
}
