//! Timing on the command line, and providers that are not there.

#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, options};
use lathe_ir::{Initializer, Tensor, text};
use serde_json::Value;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command.args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_model_is_not_faster_than_itself() {
    let model = fixture("transformer.onnx");
    let model = model.to_str().unwrap();
    let output = run(&["bench", model, model, "--json", "--profile", "--seconds", "0", "--threads", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["verdict"], "no difference", "{json:#}");
    assert_eq!((&json["ep"], &json["threads"]), (&Value::from("cpu"), &Value::from(1)));
    for key in ["before_ms", "after_ms", "ratio", "spread"] {
        assert!(json[key].as_f64().unwrap() > 0.0, "{key}");
    }
    let ratio = json["after_ms"].as_f64().unwrap() / json["before_ms"].as_f64().unwrap();
    assert!((json["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9);
    let sum = |of: &str| -> f64 {
        json["profile"][0][of].as_array().unwrap().iter().map(|share| share["ms"].as_f64().unwrap()).sum()
    };
    assert!((sum("operators") - sum("units")).abs() < 1e-9, "every node is in a unit or outside of units");
    assert!(json["profile"][0]["units"].as_array().unwrap().len() > 1);
}

#[test]
fn what_cannot_be_used_is_an_error_everywhere() {
    let model = fixture("transformer.onnx");
    let model = model.to_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.onnx");
    let main = [model, "-o", out.to_str().unwrap()];
    let commands: [&[&str]; 3] = [&["bench", model], &["verify", model, model], &main];
    for command in commands {
        for (provider, reason) in [("abacus", "has no execution provider `abacus`"), ("odd=no/such.so", "cannot find")]
        {
            let output = run(&[command, &["--ep", provider]].concat());
            assert_eq!(output.status.code(), Some(1), "{command:?}");
            assert!(stderr(&output).contains(reason), "{}", stderr(&output));
        }
    }
    assert!(!out.exists());
}

#[test]
fn the_main_job_reports_latency_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.onnx");
    let mut options = options(&fixture("transformer.onnx"), &out);
    assert!(onnx_lathe::optimize(&options).unwrap().report.latency.is_none());
    options.bench = Some(0.0);
    let latency = onnx_lathe::optimize(&options).unwrap().report.latency.unwrap();
    assert!(latency.before_ms > 0.0 && latency.after_ms.unwrap() > 0.0);
    assert_eq!(latency.after.unwrap().path, out.display().to_string());
}

#[test]
fn a_sliced_chain_needs_less_memory() {
    let mut model = text::parse(
        "<ir_version: 9, opset_import: [\"\" : 20]> g (float[8192,64] x) => (float[8192,64] y) <float[1] w = {0}, float[1] v = {0}> {
            h = MatMul (x, w) a = Gelu (h) o = MatMul (a, v) y = Add (x, o) }",
    )
    .unwrap();
    for (name, dims) in [("w", [64, 1024]), ("v", [1024, 64])] {
        let values: Vec<f32> = (0..64 * 1024).map(|i| (i * 37 % 101) as f32 / 1000.0 - 0.05).collect();
        let value = model.graph.find_value(name).unwrap();
        model.graph.set_initializer(value, Initializer::Dense(Tensor::from_f32s(&dims, &values)));
    }
    let folder = tempfile::tempdir().unwrap();
    let [whole, sliced] = ["whole.onnx", "sliced.onnx"].map(|name| folder.path().join(name).display().to_string());
    std::fs::write(&whole, model.to_bytes()).unwrap();
    let output = run(&[&whole, "-o", &sliced, "--set", "slice-chains.enabled=true"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = run(&["bench", &whole, &sliced, "--json", "--seconds", "0", "--threads", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let peak = |side: &str| json[side]["peak_rss_bytes"].as_u64().unwrap() >> 20;
    // Of 32 MiB between the products and 32 MiB behind the activation, an eighth is left.
    assert!(peak("after") + 24 < peak("before"), "{} MiB before, {} after", peak("before"), peak("after"));
}
