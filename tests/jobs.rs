//! Several workers, kept results and traces: the same bytes whoever computes what, and whatever was computed before.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, Workbench, fixture};
use lathe_ir::{Tensor, text};
use lathe_runtime::NpzWriter;
use serde_json::Value;
use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Residual units over rows of 64 numbers, four batches of them.
fn bench() -> Workbench {
    let mut noise = Noise(7);
    let mut body = String::new();
    let mut constants = Vec::new();
    let mut stream = "x".to_owned();
    for unit in 0..4 {
        constants.push(format!("float[64, 96] a{unit} = {{{}}}", noise.list(64 * 96, 0.3)));
        constants.push(format!("float[96, 64] b{unit} = {{{}}}", noise.list(96 * 64, 0.3)));
        body += &format!(
            "h{unit} = MatMul ({stream}, a{unit}) r{unit} = Relu (h{unit}) d{unit} = MatMul (r{unit}, b{unit}) "
        );
        let next = if unit == 3 { "y".to_owned() } else { format!("s{unit}") };
        body += &format!("{next} = Add ({stream}, d{unit}) ");
        stream = next;
    }
    let head = "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 6, 64] x) => (float[n, 6, 64] y)";
    let model = text::parse(&format!("{head} <{}> {{ {body} }}", constants.join(", "))).unwrap();
    let x = noise.numbers(256 * 6 * 64, 1.0);
    Workbench::new(&model, &[("x", Tensor::from_f32s(&[256, 6, 64], &x))], &["--calib", "set.npz", "--overwrite"])
}

fn bytes(bench: &Workbench, options: &[&str]) -> Vec<u8> {
    let output = bench.run(&[options, &["-o", "out.onnx"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read(bench.path("out.onnx")).unwrap()
}

#[test]
fn two_workers_give_the_bytes_of_one() {
    let bench = bench();
    for budget in [["--size", "0.3"], ["--flops", "0.7"]] {
        let of =
            |jobs: &str| bytes(&bench, &[&budget[..], &["--jobs", jobs, "--store", &format!("store-{jobs}")]].concat());
        let one = of("1");
        assert_eq!(one, of("2"), "{budget:?}");
        // What one kept serves two.
        assert_eq!(one, bytes(&bench, &[&budget[..], &["--jobs", "2", "--store", "store-1"]].concat()));
    }
}

#[test]
fn another_budget_computes_nothing_again() {
    let bench = bench();
    let spans = |options: &[&str]| -> Vec<String> {
        bytes(&bench, &[options, &["--trace", "trace.json"]].concat());
        let text = fs::read_to_string(bench.path("trace.json")).unwrap();
        let events =
            text.lines().skip(1).map(|line| serde_json::from_str::<Value>(line.trim_end_matches(',')).unwrap());
        events.filter(|e| e["cat"] == "request").map(|e| e["name"].as_str().unwrap().to_owned()).collect()
    };
    let count = |spans: &[String], name: &str| spans.iter().filter(|span| *span == name).count();
    let first = spans(&["--size", "0.3"]);
    assert!(count(&first, "gather statistics") > 0 && count(&first, "try variants") > 0, "{first:?}");
    let second = spans(&["--size", "0.4"]);
    assert_eq!(count(&second, "gather statistics"), 0, "{second:?}");
    // The plan for the other budget is another variant.
    assert!(count(&second, "try variants") <= 2, "{second:?}");
    let again = spans(&["--size", "0.4"]);
    assert_eq!((count(&again, "try variants"), count(&again, "measure the loss")), (0, 0), "{again:?}");
    let cleared = Command::new(env!("CARGO_BIN_EXE_optimize"))
        .args(["cache", "--clear", "--json", "--store"])
        .arg(bench.path("data/onnx-lathe"))
        .output()
        .unwrap();
    let said: Value = serde_json::from_slice(&cleared.stdout).unwrap();
    assert!(said["removed_bytes"].as_u64().unwrap() > 0 && said["bytes"] == 0, "{said}");
    assert!(count(&spans(&["--size", "0.3"]), "gather statistics") > 0);
}

/// Children of a process that run models.
#[cfg(target_os = "linux")]
fn workers_of(parent: &Child) -> Vec<u32> {
    let processes =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |&process: &u32| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        after.split_whitespace().nth(1) == Some(&parent.id().to_string())
    };
    processes.filter(is_child).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn killing_workers_changes_nothing_in_the_result() {
    let bench = bench();
    let options = ["--size", "0.3", "--jobs", "2"];
    let expected = bytes(&bench, &[&options[..], &["--store", "quiet"]].concat());
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).current_dir(bench.path("."));
    command.args(["model.onnx", "--calib", "set.npz", "-o", "killed.onnx", "--store", "disturbed"]).args(options);
    let mut run = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (start, mut killed) = (Instant::now(), 0);
    while run.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(120), "it goes on for ever");
        // Not more often than a request is asked again.
        if let Some(worker) = workers_of(&run).first().filter(|_| killed < 2) {
            thread::sleep(Duration::from_millis(30));
            // It may have ended by itself in the meantime.
            let kill = Command::new("kill").args(["-KILL", &worker.to_string()]).output().unwrap();
            killed += usize::from(kill.status.success());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = run.wait_with_output().unwrap();
    assert!(output.status.success() && killed > 0, "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read(bench.path("killed.onnx")).unwrap(), expected);
}

#[test]
fn what_cannot_be_used_is_said_in_one_sentence_and_nothing_is_written() {
    let bench = bench();
    fs::write(bench.path("file"), b"x").unwrap();
    for (options, code, expected) in [
        (&["--jobs", "0"][..], 2, "--jobs is 0, expected at least 1"),
        (&["--store", "file"], 1, "the store `file` cannot be used"),
        (&["--on", "ray"], 2, "--on needs --store DIR, a folder that every worker sees under the same path"),
        (&["--on", "slurm", "--store", "s"], 2, "tasks cannot go to `slurm`, expected ray or ray:ADDRESS"),
        (&["--on", "127.0.0.1:1/token/1", "--store", "s"], 1, "what carries out tasks does not answer"),
        (&["--trace", "no/such/folder/t.json"], 1, "cannot write `no/such/folder/t.json`"),
    ] {
        let output = bench.run(&[&["--size", "0.3", "-o", "none.onnx"], options].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {error}");
        assert!(error.contains(expected) && error.trim_end().lines().count() == 1, "{options:?}: {error}");
        assert!(!bench.path("none.onnx").exists());
    }
}

#[test]
fn a_search_of_timesteps_is_the_same_with_two_workers() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
        "beta_schedule": "linear", "clip_sample": false, "prediction_type": "epsilon", "timestep_spacing": "leading"}"#;
    fs::write(folder.path().join("s.json"), config).unwrap();
    let search = |jobs: &str| {
        let out = format!("{jobs}.onnx");
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).current_dir(folder.path());
        command.arg("sampler").arg(fixture("dit.onnx")).args(["-o", &out, "--scheduler", "s.json", "--no-verify"]);
        let output = command.args(["--search", "3", "--evaluations", "10", "--pairs", "2", "--jobs", jobs]).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let log = fs::read_to_string(folder.path().join(format!("{out}.search.jsonl"))).unwrap();
        (fs::read(folder.path().join(out)).unwrap(), log)
    };
    let (one, two) = (search("1"), search("2"));
    assert_eq!(one.1, two.1);
    assert!(one.0 == two.0, "the samplers differ");
}

#[test]
fn a_set_of_few_samples_has_one_part() {
    // Fewer batches than parts: what is kept is what was computed at once.
    let bench = bench();
    let mut npz = NpzWriter::create(&bench.path("set.npz")).unwrap();
    let x = Noise(3).numbers(64 * 6 * 64, 1.0);
    npz.add("x", &Tensor::from_f32s(&[64, 6, 64], &x)).unwrap();
    npz.finish().unwrap();
    assert_eq!(bytes(&bench, &["--size", "0.3", "--jobs", "2"]), bytes(&bench, &["--size", "0.3", "--store", "other"]));
}

#[test]
fn a_named_store_serves_every_command_and_a_proof_is_run_each_time() {
    let bench = bench();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).current_dir(bench.path("."));
        command.env("XDG_DATA_HOME", bench.path("data")).args(arguments).output().unwrap()
    };
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    for arguments in [
        &["stats", "model.onnx", "--calib", "set.npz", "-o", "s.npz", "--store", "one"][..],
        &["inspect", "model.onnx", "--activations", "--calib", "set.npz", "--store", "two"],
    ] {
        let output = run(arguments);
        assert!(output.status.success(), "{}", said(&output));
        assert!(bench.path(arguments.last().unwrap()).join("statistics").is_dir(), "{arguments:?}");
    }
    assert!(!bench.path("data").exists());
    for _ in 0..2 {
        let verify =
            ["verify", "model.onnx", "model.onnx", "--calib", "set.npz", "--metric", "rel-l2", "--store", "one"];
        let output = run(&[&verify[..], &["--trace", "trace.json"]].concat());
        assert!(output.status.success(), "{}", said(&output));
        assert!(fs::read_to_string(bench.path("trace.json")).unwrap().contains("measure the loss"));
    }
    let output = run(&["bench", "model.onnx", "--jobs", "2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("what is timed has this machine to itself"), "{}", said(&output));
}
