//! Random small graphs through all default passes: every output stays what it was.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use lathe_ir::text;
use lathe_passes::PASSES;
use lathe_testkit::{Claim, random_model, verdict};
use onnx_lathe::Selection;
use std::{
    panic,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

const SEEDS: u64 = 2000;

/// Optimizes the model of `seed` with the passes of `selection` and compares it with itself.
fn examine(seed: u64, folder: &Path, selection: Selection) -> Result<(), String> {
    let original = random_model(seed);
    let (path, out) = (folder.join(format!("{seed}.onnx")), folder.join(format!("{seed}.out.onnx")));
    std::fs::write(&path, original.to_bytes()).unwrap();
    let mut options = common::options(&path, &out);
    options.selection = selection;
    let done = onnx_lathe::optimize(&options).map_err(|e| format!("not optimized: {e}"));
    let result = done.and_then(|done| {
        if let Some(warning) = done.report.warnings.iter().find(|w| w.contains("was left out")) {
            return Err(warning.clone());
        }
        let optimized = lathe_ir::Model::read(&out).map_err(|e| format!("not read again: {e}"))?.model;
        let verdict = verdict(&original, &optimized, Claim::Equivalent { rtol: None }, seed)?;
        if verdict.holds() { Ok(()) } else { Err(verdict.describe()) }
    });
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_file(&out);
    result
}

/// As [`examine`]; a panic is a failure too.
fn attempt(seed: u64, folder: &Path, selection: Selection) -> Result<(), String> {
    panic::catch_unwind(|| examine(seed, folder, selection))
        .unwrap_or_else(|payload| Err(format!("it panicked: {}", common::panic_message(&*payload))))
}

/// The pass without which `seed` holds, if there is one.
fn culprit(seed: u64, folder: &Path) -> String {
    let names = PASSES.iter().map(|p| p.info().name);
    let guilty: Vec<&str> = names
        .filter(|name| {
            let selection = Selection { only: None, skip: [(*name).to_owned()].into() };
            attempt(seed, folder, selection).is_ok()
        })
        .collect();
    if guilty.is_empty() { "no single pass".to_owned() } else { guilty.join(" or ") }
}

#[test]
fn random_graphs_keep_their_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let next = AtomicU64::new(0);
    let failures = Mutex::new(Vec::new());
    let first: u64 = std::env::var("LATHE_FIRST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let workers = thread::available_parallelism().map_or(2, |n| n.get());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = first + next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + SEEDS {
                        return;
                    }
                    if let Err(why) = attempt(seed, folder.path(), Selection::default()) {
                        failures.lock().unwrap().push((seed, why));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    println!("{SEEDS} random graphs, {} failures", failures.len());
    // A few are enough to work on; each is named with the pass that may be to blame and printed.
    let shown = failures.iter().take(5).map(|(seed, why)| {
        let blame = culprit(*seed, folder.path());
        format!("seed {seed}, without {blame} it holds: {why}\n{}", text::print_full(&random_model(*seed)))
    });
    let shown: Vec<String> = shown.collect();
    let seeds: Vec<u64> = failures.iter().map(|f| f.0).collect();
    assert!(failures.is_empty(), "{} of {SEEDS} failed: {seeds:?}\n\n{}", failures.len(), shown.join("\n\n"));
}
