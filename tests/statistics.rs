//! Calibration statistics on the command line: computed in the worker, kept in the data folder, written for NumPy.

#![allow(clippy::unwrap_used)]

mod common;

use common::repository;
use lathe_ir::{External, Model, ScopeId, Tensor, WriteOptions, text};
use lathe_runtime::NpzWriter;
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// One input for two layers, and one layer more.
const MODEL: &str =
    "g (float[n,3] x) => (float[n,2] y) <float[3,2] w = {1, 2, 3, 4, 5, 6}, float[2,2] v = {1, 0, 2, 1}> {
    a = MatMul (x, w)
    b = MatMul (x, w)
    c = Add (a, b)
    y = MatMul (c, v)
}";

fn stats(folder: &Path, options: &[&str]) -> Output {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command.env("XDG_DATA_HOME", folder).env("LOCALAPPDATA", folder);
    command.args(["stats", &path("model.onnx"), "--calib", &path("set.npz"), "-o", &path("out.npz")]);
    command.args(options).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut model = text::parse(MODEL).unwrap();
    // Large enough to lie in the file beside the model.
    model.graph.add_initializer(ScopeId::MAIN, "unused", Tensor::from_f32s(&[1000], &[0.5; 1000]));
    let options = WriteOptions { external: External::Always };
    model.write(&folder.path().join("model.onnx"), &options).unwrap();
    let mut npz = NpzWriter::create(&folder.path().join("set.npz")).unwrap();
    npz.add("x", &Tensor::from_f32s(&[2, 3], &[1.0, 2.0, 3.0, f32::NAN, 0.0, 0.0])).unwrap();
    npz.finish().unwrap();
    folder
}

#[test]
fn statistics_are_computed_once() {
    let folder = workplace();
    let first = stats(folder.path(), &["--kind", "gram,columns", "-v"]);
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(stderr(&first).starts_with("4 statistics computed in 1 runs over the set, 0 taken from the cache"));
    let told = String::from_utf8_lossy(&first.stdout).into_owned();
    assert!(told.contains("gram:x: 1 rows, 0 padded, 1 broken"), "{told}");
    let out = fs::read(folder.path().join("out.npz")).unwrap();
    // The matrix as NumPy reads it: float64, row by row.
    let gram: Vec<u8> = [1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 3.0, 6.0, 9.0f64].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert!(out.windows(gram.len()).any(|part| part == gram));
    let second = stats(folder.path(), &["--kind", "gram,columns"]);
    assert!(stderr(&second).starts_with("0 statistics computed in 0 runs over the set, 4 taken from the cache"));
    assert_eq!(fs::read(folder.path().join("out.npz")).unwrap(), out);
    // Nothing is left of the copy that computed them.
    let cache = folder.path().join("onnx-lathe/statistics");
    let folders: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(folders.len(), 1, "{folders:?}");
    let pair = stats(folder.path(), &["--tensor", "a", "--tensor", "b@1", "--kind", "cosine,cross", "--no-cache"]);
    assert!(stderr(&pair).starts_with("2 statistics computed in 1 runs over the set"), "{}", stderr(&pair));
}

#[test]
fn what_cannot_be_collected_is_one_sentence() {
    let folder = workplace();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--tensor", "z"], 1, "error: the model has no value `z`"),
        (&["--tensor", "w"], 1, "error: `w` is a constant, it has the same rows whatever the inputs are"),
        (&["--mask", "x"], 1, "error: the model has no input `x` of whole numbers or booleans with two axes"),
        (&["--memory", "1KB"], 1, "error: "),
        (&["--kind", "cosine", "--tensor", "a"], 2, "error: statistics of pairs need exactly two of --tensor"),
        (&["--seed", "3"], 2, "error: --input-shape and --seed are for random choices"),
        (&["--batch", "0"], 2, "error: --batch is 0"),
        (&["--ep", "nothing"], 1, "error: "),
    ];
    for (options, code, message) in cases {
        let output = stats(folder.path(), options);
        let said = stderr(&output);
        assert!(said.starts_with(message) && said.lines().count() == 1, "{options:?}: {said}");
        assert_eq!(output.status.code(), Some(*code), "{options:?}");
        assert!(!folder.path().join("out.npz").exists());
    }
    let wrong = Model::read(&repository("fixtures/transformer.onnx")).unwrap().model;
    fs::write(folder.path().join("model.onnx"), wrong.to_bytes()).unwrap();
    let said = stderr(&stats(folder.path(), &[]));
    assert!(said.starts_with("error: ") && said.lines().count() == 1, "{said}");
}
