//! The backend cases of the onnx package: every one is optimized, and its outputs still are what they must be wherever
//! the original gives them in the same runtime.
//!
//! `./test` exports the cases with `tests/export_cases.py`. They run in worker processes (this executable again), so
//! that a runtime that crashes or hangs on a case costs that case and is counted.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use lathe_ir::{AttributeValue, DataType, Graph, Model, Node, ScopeId, Tensor, Type, TypeKind, ValueId, text};
use lathe_runtime::{Claim, Datum, Engine, LoadOptions, Session, Source, compare};
use std::{
    collections::{BTreeMap, VecDeque},
    io::{BufRead, BufReader},
    panic,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

/// Names a file with the cases that a worker process takes.
const CASES: &str = "LATHE_BACKEND_CASES";

/// Longer than any case takes on a busy machine: the largest light models run for a few seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// The relative tolerance of onnx's own runner.
const RTOL: f64 = 1e-3;

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Both models give the expected outputs.
    Equal,
    /// The runtime does not give the expected outputs, but the same for both models.
    Same,
    /// The original differs from run to run.
    Nondeterministic,
    /// The runtime does not run the original.
    Refused,
    /// The runtime crashes or hangs on the original.
    Crashed,
    /// The case breaks a promise.
    Failed,
}

const OUTCOMES: [Outcome; 6] =
    [Outcome::Equal, Outcome::Same, Outcome::Nondeterministic, Outcome::Refused, Outcome::Crashed, Outcome::Failed];

#[test]
fn backend_cases_keep_their_outputs() {
    let folder = common::repository("target/onnx-cases");
    let mut cases: Vec<PathBuf> = subfolders(&folder).iter().flat_map(|kind| subfolders(kind)).collect();
    assert!(!cases.is_empty(), "no cases in {}; ./test exports them", folder.display());
    if let Ok(only) = std::env::var("LATHE_BACKEND_ONLY") {
        cases.retain(|case| case.to_string_lossy().contains(&only));
    }
    // The light models take longest and go first.
    cases.sort_by_key(|case| !case.parent().unwrap().ends_with("light"));
    let results = Mutex::new(BTreeMap::new());
    let workers = thread::available_parallelism().map_or(2, |n| n.get()).min(cases.len());
    let queue = Mutex::new(cases.chunks(40).map(<[PathBuf]>::to_vec).collect::<VecDeque<_>>());
    thread::scope(|scope| {
        for number in 0..workers {
            let (queue, results) = (&queue, &results);
            scope.spawn(move || {
                loop {
                    let Some(mut chunk) = queue.lock().unwrap().pop_front() else { return };
                    while !chunk.is_empty() {
                        let done = run_worker(number, &chunk);
                        chunk.drain(..done.len().max(1));
                        results.lock().unwrap().extend(done);
                    }
                }
            });
        }
    });
    let results: BTreeMap<PathBuf, (Outcome, String)> = results.into_inner().unwrap();
    assert_eq!(results.len(), cases.len(), "every case has a result");
    print_table(&results);
    let failed = results.iter().filter(|(_, (outcome, _))| *outcome == Outcome::Failed);
    let lines: Vec<String> = failed.map(|(case, (_, why))| format!("{}: {why}", short(case))).collect();
    assert!(lines.is_empty(), "{} cases failed:\n{}", lines.len(), lines.join("\n"));
}

/// The worker's side. Does nothing in an ordinary run of the tests.
#[test]
fn worker() {
    let Ok(list) = std::env::var(CASES) else { return };
    println!();
    let list = std::fs::read_to_string(list).unwrap();
    for case in list.lines() {
        println!("@case");
        let (outcome, why) = match panic::catch_unwind(|| examine(Path::new(case))) {
            Ok(Ok(found)) => found,
            Ok(Err(why)) => (Outcome::Failed, why),
            Err(payload) => (Outcome::Failed, format!("it panicked: {}", common::panic_message(&*payload))),
        };
        println!("@done {} {}", outcome as usize, why.replace('\n', " "));
    }
}

/// Runs one worker on `cases` and returns results for those it got through, or for the one it did not survive too.
fn run_worker(number: usize, cases: &[PathBuf]) -> Vec<(PathBuf, (Outcome, String))> {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join(format!("{number}.txt"));
    let lines: Vec<String> = cases.iter().map(|c| c.display().to_string()).collect();
    std::fs::write(&list, lines.join("\n")).unwrap();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker", "--nocapture", "--test-threads=1"])
        .env(CASES, &list)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = process.stdout.take().unwrap();
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut results = Vec::new();
    let mut stage = String::new();
    let lost = loop {
        let Some(case) = cases.get(results.len()) else { break None };
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => match line.strip_prefix('@') {
                Some(done) if done.starts_with("done ") => {
                    let (code, why) = done["done ".len()..].split_once(' ').unwrap();
                    results.push((case.clone(), (OUTCOMES[code.parse::<usize>().unwrap()], why.to_owned())));
                }
                Some(now) => stage = now.to_owned(),
                None => {}
            },
            Err(mpsc::RecvTimeoutError::Timeout) => break Some("hangs"),
            Err(mpsc::RecvTimeoutError::Disconnected) => break Some("crashes"),
        }
    };
    if let Some(how) = lost {
        let outcome = if stage == "original" { Outcome::Crashed } else { Outcome::Failed };
        results.push((cases[results.len()].clone(), (outcome, format!("{how} at stage `{stage}`"))));
    }
    let _ = process.kill();
    let _ = process.wait();
    let _ = reader.join();
    results
}

/// Everything that is asked of one case. An error is a broken promise.
fn examine(case: &Path) -> Result<(Outcome, String), String> {
    let path = case.join("model.onnx");
    let folder = tempfile::tempdir().unwrap();
    let written = folder.path().join("optimized.onnx");
    let original = Model::read(&path).map_err(|e| format!("not read: {e}"))?.model;
    survives_writing(&original)?;
    println!("@optimize");
    let optimized = common::optimize(&path, &written)?;
    let mut summary = (Outcome::Equal, String::new());
    for number in 0.. {
        let data = case.join(format!("data_{number}.onnx"));
        if !data.exists() {
            break;
        }
        let data = Model::read(&data).map_err(|e| format!("data not read: {e}"))?.model;
        let (outcome, why) = compare_on(&original, &optimized, &data.graph)?;
        if outcome > summary.0 {
            summary = (outcome, why);
        }
    }
    Ok(summary)
}

/// Reading what was written gives the same model and the same bytes.
fn survives_writing(model: &Model) -> Result<(), String> {
    let bytes = model.to_bytes();
    let again = Model::from_bytes(bytes.clone().into()).map_err(|e| format!("not read again: {e}"))?.model;
    if text::print_full(&again) != text::print_full(model) {
        return Err("reading what was written gives another model".to_owned());
    }
    if again.to_bytes() != bytes {
        return Err("writing what was read gives other bytes".to_owned());
    }
    Ok(())
}

/// Runs both models on one set of inputs and compares them with each other and with the expected outputs.
fn compare_on(original: &Model, optimized: &Model, data: &Graph) -> Result<(Outcome, String), String> {
    println!("@original");
    let given: Vec<Datum> = (0..).map_while(|k| stored(data, &format!("input.{k}"))).collect();
    let expected: Vec<Datum> = (0..).map_while(|k| stored(data, &format!("output.{k}"))).collect();
    let feeds = feed(&mut original.clone(), &given);
    let mut session = match prepare(original, &given) {
        Ok(session) => session,
        Err(why) => return Ok((Outcome::Refused, why)),
    };
    let reference = match session.run(&feeds) {
        Ok(outputs) => outputs,
        Err(error) => return Ok((Outcome::Refused, error.to_string())),
    };
    let again = session.run(&feeds).map_err(|e| e.to_string());
    let steady = again.is_ok_and(|again| compare(&reference, &again, Claim::Identical).holds());
    println!("@optimized");
    let found = prepare(optimized, &given)?.run(&feeds).map_err(|e| format!("the result does not run: {e}"))?;
    if !steady {
        return Ok((Outcome::Nondeterministic, String::new()));
    }
    let comparison = compare(&reference, &found, Claim::Equivalent { rtol: None });
    if let Some(fault) = comparison.faults.first() {
        return Err(fault.to_string());
    }
    let as_expected = |outputs: &[(String, Datum)]| -> Result<(), String> {
        match outputs.iter().zip(&expected).find(|((_, found), expected)| !close(found, expected, RTOL)) {
            Some(((name, _), _)) => Err(format!("output `{name}` is not what the case expects")),
            None => Ok(()),
        }
    };
    match (as_expected(&reference), as_expected(&found)) {
        (Ok(()), Ok(())) => Ok((Outcome::Equal, String::new())),
        (Ok(()), Err(why)) => Err(why),
        (Err(why), _) => Ok((Outcome::Same, why)),
    }
}

fn prepare(model: &Model, given: &[Datum]) -> Result<Box<dyn Session>, String> {
    let mut model = model.clone();
    feed(&mut model, given);
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let engine: &dyn Engine = lathe_testkit::engine();
    engine.load(Source::Bytes(&model.to_bytes()), &options).map_err(|e| e.to_string())
}

/// The tensors that stand for `given`. Inputs that are sequences or optional values, which a run does not take, are
/// built inside the model from tensors.
fn feed(model: &mut Model, given: &[Datum]) -> Vec<(String, Tensor)> {
    let required: Vec<ValueId> = lathe_runtime::required_inputs(&model.graph).collect();
    let mut feeds = Vec::new();
    for (value, datum) in required.into_iter().zip(given) {
        let name = model.graph.value(value).name.clone();
        let optional = matches!(kind(&model.graph, value), Some(TypeKind::Optional(_)));
        match datum {
            Datum::Tensor(tensor) if !optional => feeds.push((name, tensor.clone())),
            datum => {
                let ty = model.graph.value(value).ty.clone();
                let made = model.graph.add_value(format!("{name}.made"), ty);
                build(&mut model.graph, made, datum, optional, &mut feeds);
                model.graph.replace_uses(value, made);
                let index = model.graph.main().inputs().iter().position(|v| *v == value).unwrap();
                model.graph.remove_input(ScopeId::MAIN, index);
            }
        }
    }
    model.graph.sort().unwrap();
    feeds
}

fn kind(graph: &Graph, value: ValueId) -> Option<TypeKind> {
    graph.value(value).ty.as_ref().map(|ty| ty.kind.clone())
}

/// Adds nodes that make `value` out of new tensor inputs.
fn build(graph: &mut Graph, value: ValueId, datum: &Datum, optional: bool, feeds: &mut Vec<(String, Tensor)>) {
    let parts: Vec<ValueId> = match datum {
        Datum::Tensor(tensor) => vec![new_input(graph, tensor, feeds)],
        Datum::Sequence(members) => {
            let tensors = members.iter().filter_map(Datum::tensor);
            tensors.map(|t| new_input(graph, t, feeds)).collect()
        }
        _ => Vec::new(),
    };
    let (sequence, inner) = match kind(graph, value) {
        Some(TypeKind::Optional(inner)) => (matches!(inner.kind, TypeKind::Sequence(_)), Some(*inner)),
        Some(TypeKind::Sequence(inner)) => (true, Some(*inner)),
        _ => (false, None),
    };
    let member = if sequence {
        let member = match inner.as_ref().map(|ty| &ty.kind) {
            Some(TypeKind::Sequence(member)) => Some(&**member),
            _ => inner.as_ref(),
        };
        let elem = member.and_then(Type::elem);
        let node = match elem {
            Some(elem) if parts.is_empty() => Node::new("SequenceEmpty").with("dtype", elem),
            _ => Node::new("SequenceConstruct"),
        };
        if !optional {
            let inputs = parts.iter().copied().map(Some).collect();
            graph.add_node(ScopeId::MAIN, node, inputs, vec![Some(value)]);
            return;
        }
        Some(graph.append(ScopeId::MAIN, node, &parts, "members"))
    } else {
        parts.first().copied()
    };
    let mut node = Node::new("Optional");
    if let (None, Some(inner)) = (member, inner) {
        node = node.with("type", AttributeValue::Type(inner));
    }
    let inputs = member.into_iter().map(Some).collect();
    graph.add_node(ScopeId::MAIN, node, inputs, vec![Some(value)]);
}

fn new_input(graph: &mut Graph, tensor: &Tensor, feeds: &mut Vec<(String, Tensor)>) -> ValueId {
    let name = format!("fed.{}", feeds.len());
    let dims = tensor.dims().iter().map(|&d| lathe_ir::Dim::Known(d as i64)).collect();
    let value = graph.add_value(name.clone(), Some(Type::tensor(tensor.dtype(), dims)));
    graph.add_input(ScopeId::MAIN, value);
    feeds.push((name, tensor.clone()));
    value
}

/// The value that the exporter stored under `name`.
fn stored(data: &Graph, name: &str) -> Option<Datum> {
    let tensor = |name: &str| data.find_value(name).and_then(|v| data.constant(v)).cloned();
    if let Some(length) = tensor(&format!("{name}.length")) {
        let length = length.scalar_i64().unwrap();
        return (0..length).map(|k| stored(data, &format!("{name}.{k}"))).collect::<Option<_>>().map(Datum::Sequence);
    }
    if tensor(&format!("{name}.none")).is_some() {
        return Some(Datum::None);
    }
    tensor(name).map(Datum::Tensor)
}

/// Whether two values agree as onnx's own runner has it: `rtol` relative or 1e-7 absolute, element by element.
fn close(found: &Datum, expected: &Datum, rtol: f64) -> bool {
    match (found, expected) {
        (Datum::Sequence(a), Datum::Sequence(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b, rtol))
        }
        (Datum::None, Datum::None) => true,
        (Datum::Tensor(a), Datum::Tensor(b)) => {
            if a.dtype() != b.dtype() || a.dims() != b.dims() {
                return false;
            }
            if a.same_bits(b) {
                return true;
            }
            // Two steps of the narrow types, which one rounding more or less moves.
            let step = match a.dtype() {
                DataType::Float16 => 2.0 * f64::from(2f32.powi(-10)),
                DataType::Bfloat16 => 2.0 * f64::from(2f32.powi(-7)),
                _ => 0.0,
            };
            let (Some(a), Some(b)) = (a.to_f64s(), b.to_f64s()) else { return false };
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-7 + rtol.max(step) * b.abs();
            a.iter().zip(&b).all(|(&a, &b)| a == b || (a.is_nan() && b.is_nan()) || near(a, b))
        }
        _ => false,
    }
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let mut folders: Vec<PathBuf> = entries.filter(|p| p.is_dir()).collect();
    folders.sort();
    folders
}

fn short(case: &Path) -> String {
    let kind = case.parent().and_then(Path::file_name).unwrap_or_default();
    format!("{}/{}", kind.to_string_lossy(), case.file_name().unwrap_or_default().to_string_lossy())
}

/// How many cases ended how, by kind.
fn print_table(results: &BTreeMap<PathBuf, (Outcome, String)>) {
    let mut table: BTreeMap<String, [usize; OUTCOMES.len()]> = BTreeMap::new();
    for (case, (outcome, why)) in results {
        let kind = short(case).split('/').next().unwrap_or_default().to_owned();
        table.entry(kind).or_default()[*outcome as usize] += 1;
        if !matches!(outcome, Outcome::Equal | Outcome::Refused) {
            println!("{outcome:?}: {}: {why}", short(case));
        }
    }
    println!(
        "{:20}{:>8}{:>8}{:>8}{:>16}{:>9}{:>9}{:>8}",
        "cases", "run", "equal", "same", "undetermined", "refused", "crashed", "failed"
    );
    for (kind, counts) in table {
        let run: usize = counts.iter().sum();
        let [equal, same, undetermined, refused, crashed, failed] = counts;
        println!("{kind:20}{run:>8}{equal:>8}{same:>8}{undetermined:>16}{refused:>9}{crashed:>9}{failed:>8}");
    }
}
