//! `optimize verify --layers` and `--against`: which value is the first that differs, and which node it is.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output},
};

/// `x · 300`, its square, the root of that, and a sum that hides where it went wrong.
fn model(dtype: &str, factor: &str) -> String {
    format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>
         g (float[n, 8] x) => (float[n, 8] y) <{dtype} scale = {{{factor}}}, {dtype} one = {{1.0}}> {{
           h = Cast <to = {to}> (x)
           [grow] big = Mul (h, scale)
           [square] square = Mul (big, big)
           [root] root = Sqrt (square)
           [shift] shifted = Add (root, one)
           y = Cast <to = 1> (shifted)
         }}",
        to = if dtype == "float" { 1 } else { 10 },
    )
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    let model = lathe_ir::text::parse(text).unwrap();
    std::fs::write(&path, model.to_bytes()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn verify(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command.arg("verify").args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn float16_that_overflows_is_found_at_its_node() {
    let folder = tempfile::tempdir().unwrap();
    let a = write(folder.path(), "a.onnx", &model("float", "1000.0"));
    let b = write(folder.path(), "b.onnx", &model("float16", "1000.0"));
    let output = verify(&[&a, &b, "--layers", "--json"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let found: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let layers = &found["layers"];
    // The CPU computes half precision in float32 from end to end, so the outputs agree.
    assert_eq!(found["passed"], true);
    assert!(stderr(&output).contains("the outputs agree, but node `square` (Mul) computes something else"));
    assert_eq!(layers["first"], "square", "{layers}");
    assert_eq!(layers["first_special"], "square");
    assert_eq!(layers["culprit"], "node `square` (Mul)");
    let text = stdout(&verify(&[&a, &b, "--layers"]));
    assert!(text.contains("NaN or infinities begin in `square` by node `square` (Mul)"), "{text}");
    assert!(text.contains("so node `square` (Mul) is the node to look at"), "{text}");
}

#[test]
fn a_wrong_constant_is_found_at_the_node_that_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let a = write(folder.path(), "a.onnx", &model("float", "3.0"));
    let b = write(folder.path(), "b.onnx", &model("float", "3.25"));
    let text = stdout(&verify(&[&a, &b, "--layers"]));
    assert!(text.contains("first: `big` [") && text.contains("so node `grow` (Mul) is the node to look at"), "{text}");
    let same = verify(&[&a, &a, "--layers", "--memory", "1GB"]);
    assert_eq!(same.status.code(), Some(0), "{}", stderr(&same));
    assert!(stdout(&same).contains("layers: 0 of 6 values are beyond their bound"), "{}", stdout(&same));
}

#[test]
fn what_would_compare_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let a = write(folder.path(), "a.onnx", &model("float", "3.0"));
    let itself = verify(&[&a, "--against", "cpu"]);
    assert_eq!(itself.status.code(), Some(2));
    assert!(stderr(&itself).contains("would compare"), "{}", stderr(&itself));
    let missing = verify(&[&a]);
    assert_eq!(missing.status.code(), Some(2), "{}", stderr(&missing));
    let nowhere = verify(&[&a, "--against", "cpu", "--ep", "abacus"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(stderr(&nowhere).contains("abacus"), "{}", stderr(&nowhere));
    let metric = verify(&[&a, &a, "--layers", "--metric", "kl", "--calib", "set.npz"]);
    assert_eq!(metric.status.code(), Some(2), "{}", stderr(&metric));
}
