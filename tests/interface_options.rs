//! `--fix-dim`, `--outputs` and `--rename`: what a caller gives and takes.

#![allow(clippy::unwrap_used)]

mod common;

use lathe_ir::{Model, ScopeId, WriteOptions, text};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

const SOURCE: &str = "<ir_version: 8, opset_import: [\"\" : 17]>
    g (float[batch, seq, 8] x, int64[batch, ?] ids) => (float[batch, n, 8] y, float[batch, seq] z)
    <float[50, 8] table = {TABLE}> {
        p = Gather (table, ids)
        y = Relu (p)
        shape = Shape (x)
        i = Constant <value = int64[2] {0, 1}> ()
        two = Gather (shape, i)
        sums = ReduceSum <keepdims = 0> (x, axes)
        axes = Constant <value = int64[1] {2}> ()
        z = Reshape (sums, two)
        h = Neg (p)
    }";

fn model(folder: &Path) -> PathBuf {
    let table: Vec<String> = (0..400).map(|i| format!("{}.5", i % 17)).collect();
    let mut model = text::parse(&SOURCE.replace("TABLE", &table.join(","))).unwrap();
    model.graph.sort().unwrap();
    let path = folder.join("model.onnx");
    model.write(&path, &WriteOptions::default()).unwrap();
    path
}

fn run(model: &Path, options: &[&str]) -> (Output, PathBuf) {
    let out = model.with_file_name("out.onnx");
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path);
    (command.arg(model).arg("-o").arg(&out).args(options).output().unwrap(), out)
}

fn written(model: &Path, options: &[&str]) -> (Model, String) {
    let (output, path) = run(model, options);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (Model::read(&path).unwrap().model, String::from_utf8(output.stdout).unwrap())
}

fn interface(model: &Model) -> Vec<String> {
    let main = model.graph.main();
    let shown = main.inputs().iter().chain(main.outputs()).map(|&v| {
        let value = model.graph.value(v);
        let dims: Vec<String> =
            value.ty.as_ref().unwrap().shape().unwrap().dims.iter().map(ToString::to_string).collect();
        format!("{}[{}]", value.name, dims.join(","))
    });
    shown.collect()
}

#[test]
fn fixed_sizes_fold_what_follows_from_them_and_are_proven() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let (open, _) = written(&path, &["--overwrite"]);
    let (fixed, said) = written(&path, &["--fix-dim", "batch=2,seq=5,ids[1]=3"]);
    assert_eq!(interface(&fixed), ["x[2,5,8]", "ids[2,3]", "y[2,3,8]", "z[2,5]"]);
    let nodes = |model: &Model| model.graph.nodes(ScopeId::MAIN).count();
    assert!(nodes(&fixed) <= nodes(&open));
    assert!(!fixed.graph.nodes(ScopeId::MAIN).any(|id| fixed.graph.node(id).is("Shape")));
    assert!(said.contains("verified"), "{said}");
    // A set has to have these sizes.
    let set = folder.path().join("set.npz");
    let mut npz = lathe_runtime::NpzWriter::create(&set).unwrap();
    npz.add("x", &lathe_ir::Tensor::from_f32s(&[2, 4, 8], &[0.5; 64])).unwrap();
    npz.add("ids", &lathe_ir::Tensor::from_i64s(&[2, 3], &[1; 6])).unwrap();
    npz.finish().unwrap();
    let (output, _) = run(&path, &["--fix-dim", "seq=5", "--validate", set.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("`x`") && said.lines().count() == 1, "{said}");
}

/// As many samples run at a time as the result takes, for the original too.
#[test]
fn sets_are_run_at_the_sizes_that_are_fixed() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let set = folder.path().join("set.npz");
    let mut npz = lathe_runtime::NpzWriter::create(&set).unwrap();
    npz.add("pixels", &lathe_ir::Tensor::from_f32s(&[16, 5, 8], &[0.5; 640])).unwrap();
    npz.add("ids", &lathe_ir::Tensor::from_i64s(&[16, 3], &[1; 48])).unwrap();
    npz.finish().unwrap();
    for batch in [1, 4, 16] {
        let fixed = format!("batch={batch},seq=5,ids[1]=3");
        let options = ["--fix-dim", &fixed, "--rename", "x=pixels", "--overwrite", "--validate", set.to_str().unwrap()];
        let (found, said) = written(&path, &options);
        assert_eq!(interface(&found)[0], format!("pixels[{batch},5,8]"));
        assert!(said.contains("of the validation set"), "{said}");
    }
}

#[test]
fn outputs_and_names_are_those_that_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let (found, said) = written(&path, &["--outputs", "h,z", "--rename", "x=pixels,h=features"]);
    assert_eq!(interface(&found)[..2], ["pixels[batch,seq,8]", "ids[batch,?]"]);
    assert!(interface(&found)[2].starts_with("features[") && interface(&found)[3].starts_with("z["));
    assert!(!found.graph.nodes(ScopeId::MAIN).any(|id| found.graph.node(id).is("Relu")));
    assert!(said.contains("verified"), "{said}");
}

#[test]
fn what_cannot_be_is_said_in_one_sentence_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    for (options, sentence) in [
        (["--fix-dim", "n=1"], "--fix-dim: no input has an open dimension `n`; there are `batch`, `ids[1]`, `seq`"),
        (["--fix-dim", "batch"], "--fix-dim batch: expected NAME=SIZE"),
        (["--fix-dim", "batch=-1"], "--fix-dim batch=-1: expected NAME=SIZE"),
        (["--outputs", "q"], "--outputs: the model has no value `q`; its outputs are `y`, `z`"),
        (["--rename", "q=r"], "--rename: the model has no input or output `q`; it has `x`, `ids`, `y`, `z`"),
        (["--rename", "q"], "--rename q: expected OLD=NEW"),
    ] {
        let (output, out) = run(&path, &options);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(String::from_utf8_lossy(&output.stderr).trim(), format!("error: {sentence}"));
        assert!(!out.exists());
    }
}

#[test]
fn differences_are_told_and_can_end_a_script() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let diff = |other: &Path, options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.arg("diff").arg(&path).arg(other).args(options).output().unwrap()
    };
    let same = diff(&path, &["--exit-code"]);
    assert!(same.status.success());
    assert!(String::from_utf8_lossy(&same.stdout).starts_with("the models are equal: "));
    let (_, _) = written(&path, &["--outputs", "z"]);
    let out = path.with_file_name("out.onnx");
    let page = folder.path().join("page.html");
    let differ = diff(&out, &["--json", "--exit-code", "--html", page.to_str().unwrap()]);
    assert_eq!(differ.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&differ.stderr).trim(), "error: the models differ");
    let found: serde_json::Value = serde_json::from_slice(&differ.stdout).unwrap();
    assert_eq!(found["equal"], false);
    assert_eq!(found["interface"][0]["name"], "y");
    assert!(std::fs::read_to_string(&page).unwrap().contains("Nodes only in the first"));
    assert!(diff(&out, &[]).status.success());
}
