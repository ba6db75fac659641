//! `optimize verify` on sets: what is measured, what passes, and what does not.

#![allow(clippy::unwrap_used)]

mod common;

use common::repository;
use lathe_ir::text;
use serde_json::Value;
use std::{fs, process::Command};
use tempfile::TempDir;

/// Rows of x in the sets of `fixtures/sets` rise, so the first model always says 0 and the second 2; labels go round.
const FALLING: &str = "y = Neg (x)";
const RISING: &str = "y = Identity (x)";

/// A folder with two models that differ in how `y` is made of `x`.
fn models(a: &str, b: &str) -> (TempDir, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, body: &str| {
        let graph = format!("g (float[n,3] x, int64[n] k) => (float[n,3] y, int64[n] l) {{ {body} l = Identity (k) }}");
        let path = folder.path().join(name);
        fs::write(&path, text::parse(&graph).unwrap().to_bytes()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (a, b) = (write("a.onnx", a), write("b.onnx", b));
    (folder, a, b)
}

/// Exit code, standard output and standard error.
fn verify(a: &str, b: &str, options: &[&str]) -> (Option<i32>, String, String) {
    let (_folder, a, b) = models(a, b);
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    let output = command.args(["verify", &a, &b]).args(options).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn set(name: &str) -> String {
    repository("fixtures/sets").join(name).to_str().unwrap().to_owned()
}

#[test]
fn accuracy_is_counted_and_held_to_a_limit() {
    let set = set("labelled.npz");
    let options = ["--validate", &set, "--labels", "labels", "--json", "--max-drop", "0.2"];
    let (code, out, err) = verify(FALLING, RISING, &options);
    assert_eq!(code, Some(0), "{err}");
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&found["metric"], &found["why"]), (&"accuracy".into(), &"labels are given".into()));
    assert_eq!(found["detail"], "3 of 8 labels before, 2 after");
    let number = |key: &str| found[key].as_f64().unwrap();
    assert_eq!(["before", "after", "drop", "limit", "samples"].map(number), [0.375, 0.25, 0.125, 0.2, 8.0]);
    assert_eq!((&found["set"], &found["passed"]), (&"validation".into(), &true.into()));
    assert_eq!((found["outputs"][0]["cosine"].as_f64(), found["outputs"][0]["top1"].as_f64()), (Some(-1.0), Some(0.0)));
    // The runs are a batch of eight or eight batches: the same.
    let single = [&options[..], &["--batch", "1"]].concat();
    assert_eq!(verify(FALLING, RISING, &single).1, out);
    let strict = ["--validate", &set, "--labels", "labels", "--max-drop", "0.1"];
    let (code, _, err) = verify(FALLING, RISING, &strict);
    assert_eq!(code, Some(3));
    assert_eq!(
        err,
        "error: accuracy 0.375 before, 0.25 after on 8 validation samples: a drop of 0.125 where 0.1 is allowed\n"
    );
}

#[test]
fn any_metric_can_be_asked_for_and_without_a_limit_it_is_only_measured() {
    let set = set("good.npz");
    let (code, out, err) = verify(
        RISING,
        "h = Constant <value_float = 1.01> () y = Mul (x, h)",
        &["--calib", &set, "--metric", "snr", "--json"],
    );
    assert_eq!(code, Some(0), "{err}");
    let found: Value = serde_json::from_str(&out).unwrap();
    // A hundredth is 40 dB; the original has no noise, which JSON has no number for.
    assert!((found["after"].as_f64().unwrap() - 40.0).abs() < 1e-3, "{out}");
    assert!((found["drop"].as_f64().unwrap() - 0.01).abs() < 1e-6);
    assert_eq!((&found["before"], &found["limit"], &found["samples"]), (&Value::Null, &Value::Null, &2.into()));
}

#[test]
fn a_nan_is_named_and_refused() {
    let set = set("good.npz");
    let (code, _, err) = verify(RISING, "y = Log (x)", &["--validate", &set, "--metric", "rel-l2"]);
    assert_eq!(code, Some(3));
    assert!(err.contains("output `y` has -inf in sample 0 where the original has 0"), "{err}");
}

/// One rule for both: what is held to a limit where none is stated.
#[test]
fn values_are_compared_on_a_set_as_on_random_inputs() {
    let (set, labelled) = (set("good.npz"), set("labelled.npz"));
    let nearly = "h = Constant <value_float = 1.01> () y = Mul (x, h)";
    for options in [&[][..], &["--validate", &set], &["--calib", &set]] {
        let (code, out, err) = verify(RISING, nearly, options);
        assert_eq!(code, Some(3), "{options:?}: {err}");
        assert!(err.contains("output `y`: the relative L2 error is 1.000e-2, the limit 1.0e-4"), "{options:?}: {err}");
        assert!(out.contains("rel L2 1.00e-2 (limit 1e-4)"), "{options:?}: {out}");
        assert_eq!(verify(RISING, RISING, options).0, Some(0), "{options:?}");
    }
    // A metric that is named, by itself or by labels, is measured, and only a limit that is stated holds it.
    for options in [&["--validate", &set, "--metric", "rel-l2"][..], &["--validate", &labelled, "--labels", "labels"]] {
        let (code, out, err) = verify(RISING, nearly, options);
        assert!(code == Some(0) && out.contains("no limit is set (--max-drop)"), "{options:?}: {out}{err}");
    }
}

#[test]
fn bits_are_compared_on_sets_too() {
    let set = set("good.npz");
    let zero = "z = Constant <value_float = -0.0> () y = Sub (x, z)";
    assert_eq!(verify(RISING, RISING, &["--validate", &set, "--bits"]).0, Some(0));
    assert_eq!(verify(FALLING, zero, &["--validate", &set, "--bits"]).0, Some(3));
}

#[test]
fn options_that_would_do_nothing_are_usage_errors() {
    let set = set("good.npz");
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--metric", "kl"], 2, "--metric and --max-drop are about a set, and none is given"),
        (&["--max-drop", "0.1"], 2, "--metric and --max-drop are about a set, and none is given"),
        (&["--calib", &set, "--validate", &set], 2, "two models are compared on one set"),
        (&["--calib", &set, "--metric", "bleu"], 2, "invalid value 'bleu'"),
        (&["--calib", &set, "--metric", "kl", "--bits"], 2, "cannot be used with"),
        (&["--calib", &set, "--metric", "accuracy"], 1, "accuracy cannot be measured here: there are no labels"),
        (&["--calib", &set, "--metric", "psnr"], 1, "psnr cannot be measured here: output `y` of shape"),
    ];
    for (options, code, message) in cases {
        let (found, _, err) = verify(RISING, RISING, options);
        assert_eq!((found, err.contains(message)), (Some(*code), true), "{options:?}: {err}");
    }
}
