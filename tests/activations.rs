//! `optimize inspect --activations`: what could be left out of what layers read, as measured on a set.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Tensor, text};
use lathe_runtime::NpzWriter;
use serde_json::Value;
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// One layer of 64 inputs whose last 16 matter little, and one convolution.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 7u64;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let weights: Vec<String> = (0..64 * 64)
        .map(|at| if at / 64 < 48 { number() } else { 1e-4 * number() })
        .map(|w| format!("{w:e}"))
        .collect();
    let kernel: Vec<String> = (0..64 * 8 * 9).map(|_| format!("{:e}", number())).collect();
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 17]> g (float[n, 64] x, float[n, 8, 5, 5] image) => (float[n, 64] y, float[n, 64, 3, 3] z) \
         <float[64, 64] w = {{{}}}, float[64, 8, 3, 3] kernel = {{{}}}> {{ h = MatMul (x, w) y = Relu (h) z = Conv (image, kernel) }}",
        weights.join(", "),
        kernel.join(", ")
    );
    fs::write(folder.path().join("model.onnx"), text::parse(&source).unwrap().to_bytes()).unwrap();
    let mut npz = NpzWriter::create(&folder.path().join("set.npz")).unwrap();
    let rows: Vec<f32> = (0..256 * 64).map(|_| number()).collect();
    npz.add("x", &Tensor::from_f32s(&[256, 64], &rows)).unwrap();
    let images: Vec<f32> = (0..256 * 8 * 25).map(|_| number()).collect();
    npz.add("image", &Tensor::from_f32s(&[256, 8, 5, 5], &images)).unwrap();
    npz.finish().unwrap();
    folder
}

fn inspect(folder: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command.env("XDG_DATA_HOME", folder).env("LOCALAPPDATA", folder);
    command.arg("inspect").arg(folder.join("model.onnx")).args(options).output().unwrap()
}

#[test]
fn layers_are_measured_at_the_error_that_was_aimed_at() {
    let folder = workplace();
    let set = folder.path().join("set.npz");
    let output = inspect(folder.path(), &["--activations", "--calib", set.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let layers = found["activations"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert_eq!(found["activations"]["samples"], 256);
    for layer in layers {
        for rule in ["wina", "teal"] {
            for skipped in layer[rule].as_array().unwrap() {
                let figure = |name: &str| skipped[name].as_f64().unwrap();
                let (limit, error) = (figure("limit"), figure("error"));
                assert!((error / limit - 1.0).abs() < 0.2, "{rule} of {layer}");
            }
        }
    }
    let share = |rule: &str, at: usize| layers[0][rule][at]["share"].as_f64().unwrap();
    // A quarter of the inputs has next to no weights: only the rule that knows them can leave out all of these.
    assert!(share("wina", 0) > 0.25 && share("teal", 0) < 0.15, "{} {}", share("wina", 0), share("teal", 0));
    assert!(share("wina", 1) > share("wina", 0) && share("teal", 1) > share("teal", 0));
    assert_eq!((layers[0]["quiet_inputs"].as_u64(), layers[0]["rows"].as_u64()), (Some(16), Some(256)));
    assert_eq!((layers[1]["inputs"].as_u64(), layers[1]["rows"].as_u64()), (Some(72), Some(256 * 9)));
    let said =
        String::from_utf8(inspect(folder.path(), &["--activations", "--calib", set.to_str().unwrap()]).stdout).unwrap();
    assert!(said.contains("inputs that could be left out, on 256 samples of") && said.contains("WINA 1.0 %"), "{said}");
}

#[test]
fn a_set_is_needed_and_nothing_is_ignored() {
    let folder = workplace();
    for options in [
        &["--activations"][..],
        &["--calib", "set.npz"],
        &["--threads", "2"],
        &["--ep", "cpu", "--input-shape", "x:1,4"],
        &["--memory", "1GB"],
        &["--activations", "--calib", "s", "--batch", "0"],
    ] {
        assert_eq!(inspect(folder.path(), options).status.code(), Some(2), "{options:?}");
    }
    let missing = inspect(folder.path(), &["--activations", "--calib", "nowhere.npz"]);
    assert_eq!(missing.status.code(), Some(1));
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(said.starts_with("error: ") && said.contains("nowhere.npz") && said.lines().count() == 1, "{said}");
    // Without a set the answer is as it was.
    let plain: Value = serde_json::from_slice(&inspect(folder.path(), &["--json"]).stdout).unwrap();
    assert_eq!(plain["activations"], Value::Null);
}
