//! Convolutions that are copies of what they read are replaced under a budget, and what is not worth it is declined.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, ScopeId, Tensor, text};
use lathe_runtime::NpzWriter;
use serde_json::Value;
use std::{fs, path::PathBuf, process::Command};
use tempfile::TempDir;

const CHANNELS: usize = 16;

/// Numbers in `(-0.5, 0.5)` from a seed.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f32 / (1u64 << 31) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn list(numbers: impl Iterator<Item = f32>) -> String {
    numbers.map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ")
}

/// A convolution that multiplies every channel with a factor, and one that is what it is.
fn model() -> Model {
    let copy = (0..CHANNELS * CHANNELS * 9).map(|at| {
        let (o, i, tap) = (at / 9 / CHANNELS, at / 9 % CHANNELS, at % 9);
        if o == i && tap == 4 { 1.0 + o as f32 / 8.0 } else { 0.0 }
    });
    text::parse(&format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n,{CHANNELS},12,12] x) => (float[n,{CHANNELS}] y)
         <float[{CHANNELS},{CHANNELS},3,3] copy = {{{}}}, float[{CHANNELS},{CHANNELS},3,3] other = {{{}}}> {{
            a = Conv <pads = [1, 1, 1, 1]> (x, copy) b = Tanh (a)
            c = Conv <pads = [1, 1, 1, 1]> (b, other) d = Tanh (c)
            e = GlobalAveragePool (d) y = Flatten (e)
        }}",
        list(copy),
        list(noise(CHANNELS * CHANNELS * 9, 3).into_iter().map(|x| x / 4.0))
    ))
    .unwrap()
}

struct Bench {
    folder: TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn report(&self, options: &[&str]) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().found().path).env_remove("RUST_BACKTRACE");
        command.env("XDG_DATA_HOME", self.path("data")).arg(self.path("model.onnx"));
        command.args(["--metric", "rel-l2", "--skip", "quantize,quantize-dynamic,convert-floats,compensate,factorize"]);
        command.args(["--skip", "factorize-jointly,dictionary,prune-channels,drop-inputs,prune-units,reduce-tokens"]);
        command.arg("--calib").arg(self.path("set.npz")).arg("-o").arg(self.path("out.onnx"));
        let output = command.args(options).arg("--report").arg(self.path("report.json")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&fs::read_to_string(self.path("report.json")).unwrap()).unwrap()
    }
}

#[test]
fn a_convolution_that_is_a_copy_goes_without_loss() {
    let bench = Bench { folder: tempfile::tempdir().unwrap() };
    fs::write(bench.path("model.onnx"), model().to_bytes()).unwrap();
    let mut npz = NpzWriter::create(&bench.path("set.npz")).unwrap();
    let dims = [32, CHANNELS, 12, 12];
    npz.add("x", &Tensor::from_f32s(&dims, &noise(dims.iter().product(), 11))).unwrap();
    npz.finish().unwrap();
    let report = bench.report(&["--flops", "0.6"]);
    let choices = report["plan"]["choices"].as_array().unwrap();
    let of = |site: &str| choices.iter().find(|c| c["site"] == site).unwrap()["option"].as_str().unwrap().to_owned();
    assert_eq!((of("copy"), of("other")), ("identity, scaled".to_owned(), "as it is".to_owned()));
    assert!(report["verify"]["drop"].as_f64().unwrap() < 1e-5, "{}", report["verify"]);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.find_value("copy").is_none());
    assert_eq!(model.graph.nodes(ScopeId::MAIN).count(), 6);
    // Without a budget nothing of it runs, nor under one of bytes.
    for pass in bench.report(&[])["passes"].as_array().unwrap() {
        assert_ne!(pass["name"], "substitute");
    }
}
