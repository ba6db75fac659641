//! Calibration and validation sets on the command line: wrong ones are refused in one sentence before any work.

#![allow(clippy::unwrap_used)]

mod common;

use common::repository;
use lathe_ir::text;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

/// What the sets of `fixtures/sets` are for; it takes passes to make `y` of it.
const MODEL: &str = "g (float[n,3] x, int64[n] k) => (float[n,3] y, int64[n] l) <float[3] zero = {0, 0, 0}> {
    a = Sub (x, zero)
    y = Relu (a)
    l = Identity (k)
}";

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command.args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A folder with the model, and the paths of the model and of a result.
fn workplace() -> (TempDir, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.onnx");
    fs::write(&model, text::parse(MODEL).unwrap().to_bytes()).unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (model, out) = (path("model.onnx"), path("out.onnx"));
    (folder, model, out)
}

fn set(name: &str) -> PathBuf {
    repository("fixtures/sets").join(name)
}

/// The report of a run on `options`, which must succeed.
fn report(options: &[&str]) -> Value {
    let (folder, model, out) = workplace();
    let report = folder.path().join("report.json");
    let output = run(&[&[&model, "-o", &out, "--report", report.to_str().unwrap()], options].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_str(&fs::read_to_string(report).unwrap()).unwrap()
}

#[test]
fn wrong_sets_are_refused_in_one_sentence_before_any_work() {
    let cut = tempfile::tempdir().unwrap();
    let truncated = cut.path().join("truncated.npz");
    let whole = fs::read(set("good.npz")).unwrap();
    fs::write(&truncated, &whole[..whole.len() * 2 / 3]).unwrap();
    let absent = cut.path().join("absent.npz");
    let table: &[(&Path, &[&str])] = &[
        (&set("missing.npz"), &["no array for input `k`", "expected int64[n]", "found `x`"]),
        (&set("extra.npz"), &["array `mask`", "expected only `x`, `k`", "--labels mask"]),
        (&set("wrong_type.npz"), &["array `x`", "holds double, expected float"]),
        (&set("wrong_rank.npz"), &["array `x`", "has 4 axes [8, 3, 1, 1]", "expected [n,3]"]),
        (&set("wrong_size.npz"), &["array `x`", "has the shape [6, 4]", "expected [n,3]"]),
        (&set("wrong_count.npz"), &["array `k`", "has 5 rows, expected 8 as in `x`"]),
        (&set("no_samples.npz"), &["holds no samples", "found the shape [0, 3]", "expected at least one row"]),
        (&set("nan.npz"), &["array `x`", "NaN in sample 5", "expected numbers"]),
        (&set("pickle.npz"), &["array `k`", "pickled", "never loaded", "expected numbers"]),
        (&set("fortran.npz"), &["array `x`", "Fortran order, expected C order"]),
        (&truncated, &["is broken, expected a whole .npz archive"]),
        (&absent, &["cannot be read"]),
        (&repository("fixtures/make.py"), &["is a .py file, expected a .npz"]),
        (&repository("fixtures"), &["is a folder with none of these"]),
    ];
    let (folder, model, out) = workplace();
    for (path, expected) in table {
        let path = path.to_str().unwrap();
        for arguments in [
            vec![&model, "-o", &out, "--validate", path],
            vec![&model, "-o", &out, "--calib", path],
            vec!["verify", &model, &model, "--validate", path],
        ] {
            let output = run(&arguments);
            let said = stderr(&output);
            let name = Path::new(path).file_name().unwrap().display();
            assert_eq!(output.status.code(), Some(1), "{name}: {said}");
            assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "{name}: {said}");
            assert!(expected.iter().all(|e| said.contains(e)), "{name}: expected {expected:?} in: {said}");
            assert!(output.stdout.is_empty() && fs::read_dir(folder.path()).unwrap().count() == 1, "{name}");
        }
    }
}

#[test]
fn results_are_compared_on_the_set() {
    let good = set("good.npz");
    let good = good.to_str().unwrap();
    let checks: &[(&[&str], &str, u64)] = &[
        (&["--validate", good], "validation", 8),
        (&["--calib", good], "validation", 2),
        (&["--calib", good, "--validate", good, "--batch", "3"], "validation", 8),
    ];
    for (options, name, samples) in checks {
        let verify = &report(options)["verify"];
        assert_eq!((verify["set"].as_str(), verify["samples"].as_u64()), (Some(*name), Some(*samples)), "{options:?}");
        assert_eq!(verify["passed"], true);
    }
    let (labelled, single) = (set("labelled.npz"), set("onnx/test_data_set_0"));
    let verify = &report(&["--validate", labelled.to_str().unwrap(), "--labels", "labels"])["verify"];
    assert_eq!(verify["samples"], 8);
    // One run cannot be divided, so nothing of it was held out.
    assert_eq!(report(&["--calib", single.to_str().unwrap()])["verify"]["set"], "calibration");
    assert_eq!(report(&[])["verify"]["set"], "random");
}

#[test]
fn chosen_samples_are_reported() {
    let good = set("good.npz");
    let report = report(&["--calib", good.to_str().unwrap(), "--calib-select", "3"]);
    let selection = &report["calibration"];
    assert_eq!((selection["pool"].as_u64(), selection["chosen"].as_array().unwrap().len()), (Some(6), 3));
    // What is held out is not chosen from.
    assert!(selection["chosen"].as_array().unwrap().iter().all(|s| s.as_u64().unwrap() < 6));
    assert_eq!(report["verify"]["samples"], 2);
}

#[test]
fn options_that_say_nothing_are_refused() {
    let good = set("good.npz");
    let good = good.to_str().unwrap();
    let (_folder, model, out) = workplace();
    let refused: &[(&[&str], &str)] = &[
        (&["--labels", "k"], "--labels says how a set is read"),
        (&["--batch", "4"], "--batch says how a set is read"),
        (&["--calib-select", "4"], "--calib names one"),
        (&["--calib", good, "--calib-select", "0"], "expected at least 1"),
        (&["--calib", good, "--batch", "0"], "expected at least 1"),
        (&["--calib", good, "--input-shape", "x:2,3"], "--input-shape is for random inputs"),
        (&["--calib", good, "--no-verify"], "--no-verify runs nothing"),
    ];
    for (options, message) in refused {
        let output = run(&[&[model.as_str(), "-o", &out], *options].concat());
        assert_eq!(output.status.code(), Some(2), "{options:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{options:?}: {}", stderr(&output));
    }
}
