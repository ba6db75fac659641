//! The process itself: started, written to, waited for and ended.

use super::Limits;
use crate::{
    Listener, RuntimeError,
    wire::{WorkerAnswer, WorkerRequest, framing},
};
use bytes::Bytes;
use std::{
    ffi::OsString,
    io::{self, BufReader, Read},
    path::Path,
    process::{self, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How often the worker's age and memory are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How much of what the worker says on standard error is kept.
const LAST_WORDS: usize = 4096;

/// A worker that runs; it is ended when this is dropped.
pub(super) struct Worker {
    process: process::Child,
    requests: ChildStdin,
    answers: Receiver<io::Result<(WorkerAnswer, Bytes)>>,
    last_words: Arc<Mutex<Vec<u8>>>,
    listener: JoinHandle<()>,
}

impl Worker {
    /// Starts `program`, which must become a worker.
    pub fn start(program: &Path, arguments: &[OsString]) -> Result<Worker, RuntimeError> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command
            .spawn()
            .map_err(|e| RuntimeError::Child(format!("cannot start the worker `{}`: {e}", program.display())))?;
        let requests = process.stdin.take().expect("standard input was asked for");
        let mut output = BufReader::new(process.stdout.take().expect("standard output was asked for"));
        let mut errors = process.stderr.take().expect("standard error was asked for");
        let (sender, answers) = channel();
        thread::spawn(move || {
            loop {
                let Some(frame) = framing::read(&mut output).transpose() else { return };
                let last = frame.is_err();
                if sender.send(frame).is_err() || last {
                    return;
                }
            }
        });
        let last_words = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&last_words);
        let listener = thread::spawn(move || {
            let mut buffer = [0u8; 1024];
            while let Ok(count @ 1..) = errors.read(&mut buffer) {
                let mut words = heard.lock().unwrap_or_else(PoisonError::into_inner);
                words.extend_from_slice(&buffer[..count]);
                let excess = words.len().saturating_sub(LAST_WORDS);
                words.drain(..excess);
            }
        });
        Ok(Worker { process, requests, answers, last_words, listener })
    }

    /// The system's number of it.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a request. A worker that died while being written to says more when it is waited for.
    pub fn send(&mut self, request: &WorkerRequest, payload: &[&[u8]]) {
        let _ = framing::write(&mut self.requests, request, payload);
    }

    /// Waits for the answer to a request.
    pub fn wait(&mut self, limits: Limits, listener: &Listener) -> Result<(WorkerAnswer, Bytes), RuntimeError> {
        let mut start = Instant::now();
        let mut stage = "starting".to_owned();
        let process = self.process.id();
        let begin = |stage: &str| listener.span_of(process, "worker", stage);
        let mut span = begin(&stage);
        loop {
            match self.answers.recv_timeout(LOOK) {
                Ok(Ok((WorkerAnswer::Stage(what), _))) => {
                    // The limit is on one run, and a set has many.
                    start = Instant::now();
                    drop(span);
                    span = begin(&what);
                    stage = what;
                }
                Ok(Ok((WorkerAnswer::Progress(progress), _))) => {
                    start = Instant::now();
                    listener.hear(&progress);
                }
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => {
                    let (message, killed) = self.obituary(&stage);
                    return Err(RuntimeError::Ended { stage, message, killed });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if listener.is_stopped() {
                self.stop();
                return Err(RuntimeError::Stopped);
            }
            if let Some(limit) = limits.timeout.filter(|&limit| start.elapsed() > limit) {
                self.stop();
                let message = format!("the runtime was stopped: {stage} took longer than {} s", limit.as_secs_f32());
                return Err(RuntimeError::Ended { stage, message, killed: false });
            }
            if let (Some(limit), Some(used)) = (limits.memory, resident(self.process.id()))
                && used > limit
            {
                self.stop();
                let (used, limit) = (used >> 20, limit >> 20);
                let message = format!("the runtime was stopped: {stage} took {used} MiB, and {limit} MiB are allowed");
                return Err(RuntimeError::Ended { stage, message, killed: false });
            }
        }
    }

    fn stop(&mut self) {
        // It may have ended by itself in the meantime.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Why the worker is gone, and whether it was killed.
    fn obituary(&mut self, stage: &str) -> (String, bool) {
        let deadline = Instant::now() + Duration::from_secs(2);
        let status = loop {
            match self.process.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                _ => break None,
            }
        };
        self.stop();
        // Whoever inherited the pipe may keep it open, so this wait ends as well.
        while !self.listener.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let how = status.map_or("sent something that is no message".to_owned(), ended);
        let words = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
        let words = String::from_utf8_lossy(&words);
        let last = words.lines().map(str::trim).rfind(|line| !line.is_empty());
        let said = last.map_or(String::new(), |line| format!("; its last words were \"{line}\""));
        (format!("the runtime {how} while {stage}{said}"), status.is_some_and(was_killed))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether a signal ended it that processes do not send themselves.
fn was_killed(status: ExitStatus) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::process::ExitStatusExt as _;
        const SIGKILL: i32 = 9;
        const SIGTERM: i32 = 15;
        matches!(status.signal(), Some(SIGKILL | SIGTERM))
    }
    #[cfg(not(unix))]
    {
        let _ = status;
        false
    }
}

/// "crashed (signal 11, SIGSEGV)" or "ended with code 3".
fn ended(status: ExitStatus) -> String {
    #[cfg(unix)]
    {
        use std::os::unix::process::ExitStatusExt;
        const NAMES: &[(i32, &str)] = &[
            (4, "SIGILL: an instruction this processor does not have"),
            (6, "SIGABRT: it gave up by itself"),
            (7, "SIGBUS: a file changed while it was read, or memory ran out"),
            (8, "SIGFPE: a division of whole numbers by zero"),
            (9, "SIGKILL: the system stopped it, usually for want of memory"),
            (11, "SIGSEGV: it touched memory that is not its own"),
        ];
        if let Some(signal) = status.signal() {
            let name = NAMES.iter().find(|(number, _)| *number == signal).map(|(_, name)| *name);
            return format!("crashed (signal {signal}{})", name.map(|n| format!(", {n}")).unwrap_or_default());
        }
    }
    match status.code() {
        Some(code) => format!("ended with code {code}"),
        None => "ended".to_owned(),
    }
}

/// The resident memory of a process in bytes, where the system tells.
fn resident(id: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}
