//! A command of the program that runs for another program, which must answer its own user meanwhile.

use crate::{Answer, Failure, cli};
use anyhow::anyhow;
use lathe_runtime::{Listener, Progress};
use std::{
    ffi::OsString,
    io,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

/// Stack of the thread that works: models nest, and a main thread has as much.
const STACK: usize = 16 << 20;

/// How long work that is called off may take to notice.
const GRACE: Duration = Duration::from_millis(600);

/// What a call says.
#[derive(Debug)]
pub enum Event {
    /// How far it is.
    Progress(Progress),
    /// What came of it; nothing follows.
    Done(Result<Box<Answer>, Failure>),
}

/// A command line that is carried out by a thread of its own.
#[derive(Debug)]
pub struct Call {
    events: Receiver<Event>,
    stop: Arc<AtomicBool>,
    thread: ThreadId,
    done: bool,
}

impl Call {
    /// Starts `arguments`, the name of the program included: those of the main job, or of `sampler`, `inspect`,
    /// `verify`, `diff`, `bench` or `passes`.
    pub fn start(arguments: Vec<OsString>) -> io::Result<Call> {
        cli::silence_panics();
        let (sender, events) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let heard = sender.clone();
        // A call that was dropped has nobody to tell.
        let tell = move |progress: &Progress| drop(heard.send(Event::Progress(progress.clone())));
        let progress = Listener::new(tell).stopped_by(Arc::clone(&stop));
        let work = move || {
            let found = panic::catch_unwind(AssertUnwindSafe(|| cli::answer(&arguments, progress)));
            drop(sender.send(Event::Done(found.unwrap_or_else(|_| Err(broken())).map(Box::new))));
        };
        let thread = thread::Builder::new().name("onnx-lathe".to_owned()).stack_size(STACK).spawn(work)?;
        Ok(Call { events, stop, thread: thread.thread().id(), done: false })
    }

    /// The next event, if there is one within `most`. Of several reports of progress the last one counts.
    pub fn wait(&mut self, most: Duration) -> Option<Event> {
        let mut event = match self.events.recv_timeout(most) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => Event::Done(Err(broken())),
        };
        while matches!(event, Event::Progress(_)) {
            let Ok(later) = self.events.try_recv() else { break };
            event = later;
        }
        self.done = matches!(event, Event::Done(_));
        Some(event)
    }
}

impl Drop for Call {
    /// Calls the work off if it goes on: models stop running at once, nothing is put in place any more, and what was
    /// written aside is gone when this returns.
    fn drop(&mut self) {
        let deadline = Instant::now() + GRACE;
        self.stop.store(true, Ordering::Relaxed);
        while !self.done && Instant::now() < deadline {
            let _ = self.wait(deadline.saturating_duration_since(Instant::now()));
        }
        if !self.done {
            lathe_ir::remove_staged_of(self.thread);
        }
    }
}

fn broken() -> Failure {
    Failure::Error(anyhow!("the program broke down; this is a fault of this program"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn call(arguments: &[&str]) -> Call {
        Call::start(std::iter::once(&"optimize").chain(arguments).map(Into::into).collect()).unwrap()
    }

    fn answer(arguments: &[&str]) -> Result<Box<Answer>, Failure> {
        let mut call = call(arguments);
        loop {
            if let Some(Event::Done(found)) = call.wait(Duration::from_secs(60)) {
                return found;
            }
        }
    }

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/transformer.onnx");

    #[test]
    fn a_call_answers_with_the_json_of_the_command() {
        let found = answer(&["inspect", MODEL]).unwrap();
        assert_eq!(found.json["model"]["nodes"], 212);
        assert!(found.text.contains("attention"), "{}", found.text);
        let found = answer(&[MODEL, "--dry-run", "--no-verify"]).unwrap();
        assert!(found.json["output"]["nodes"].as_u64().unwrap() < 212);
        assert_eq!(found.json["verify"], Value::Null);
        assert!(answer(&["passes"]).unwrap().json.as_array().unwrap().len() > 40);
    }

    #[test]
    fn what_makes_no_sense_is_usage_and_one_sentence() {
        for (arguments, culprit) in [
            (&[MODEL, "--dry-run", "--siez", "0.5"][..], "unexpected argument '--siez' found"),
            (&[MODEL, "--dry-run", "--size", "0.5"][..], "--calib names a set"),
            (&[MODEL, "--dry-run", "--size", "5"][..], "expected a share above 0 and at most 1"),
            (&["doctor"][..], "only the command line has this command"),
        ] {
            let error = answer(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(error.to_string().contains(culprit) && !error.to_string().contains('\n'), "{error}");
        }
        let error = answer(&["no/such.onnx", "--dry-run"]).unwrap_err();
        assert_eq!((error.exit_code(), error.is_missing_runtime()), (1, false), "{error}");
    }

    #[test]
    fn a_call_that_is_dropped_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.onnx");
        for delay in [0, 2, 5, 10, 20] {
            let call = call(&[MODEL, "-o", out.to_str().unwrap(), "--no-verify"]);
            thread::sleep(Duration::from_millis(delay));
            drop(call);
            let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert!(left.iter().all(|name| name == "out.onnx"), "{left:?} after {delay} ms");
        }
    }
}
