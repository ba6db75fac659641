//! The process that runs models.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// Whether a process runs: one that has ended and waits to be noticed does not.
fn runs(process: &str) -> bool {
    let told = Command::new("ps").args(["-o", "stat=", "-p", process]).output().unwrap();
    let state = String::from_utf8_lossy(&told.stdout).trim().to_owned();
    !state.is_empty() && !state.starts_with('Z')
}

#[test]
fn ends_with_the_process_that_started_it() {
    // The shell leaves after a moment; the worker's input stays open.
    let line = "exec 3<&0; \"$0\" __serve <&3 >/dev/null & echo $!; sleep 2";
    let mut shell = Command::new("sh")
        .args(["-c", line, env!("CARGO_BIN_EXE_optimize")])
        .env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let held = shell.stdin.take();
    let mut worker = String::new();
    BufReader::new(shell.stdout.take().unwrap()).read_line(&mut worker).unwrap();
    let worker = worker.trim();
    assert!(runs(worker), "the worker has not started");
    shell.wait().unwrap();
    let start = Instant::now();
    while runs(worker) && start.elapsed() < Duration::from_secs(20) {
        sleep(Duration::from_millis(100));
    }
    assert!(!runs(worker), "the worker outlives who started it");
    drop(held);
}
