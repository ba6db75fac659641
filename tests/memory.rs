//! Memory of a job: weights are mapped or spilled, and their pages are let go while they are streamed.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use lathe_ir::{External, Initializer, Model, ScopeId, Tensor, WriteOptions, text};
use serde_json::Value;
use std::{
    fmt::Write,
    fs,
    process::{Command, Stdio},
};

const BLOCKS: usize = 6;
const WIDTH: usize = 1024;
/// Bytes that the program, the graph and what is in work may take.
const LIMIT: u64 = 100 << 20;

/// 288 MiB of weights, two thirds of which a rewrite computes anew: the factor goes into both layers that read it.
fn model() -> Model {
    let mut nodes = String::new();
    let mut x = "x".to_owned();
    for block in 0..BLOCKS {
        let y = if block + 1 == BLOCKS { "y".to_owned() } else { format!("x{block}") };
        let _ = write!(
            nodes,
            "r{block} = Relu ({x}) t{block} = Mul (s, r{block}) a{block} = MatMul (t{block}, wa{block})
             b{block} = MatMul (t{block}, wb{block}) m{block} = Mul (a{block}, b{block}) {y} = MatMul (m{block}, wc{block})\n"
        );
        x = y;
    }
    let weights: String = (0..BLOCKS)
        .map(|b| {
            let wide = 4 * WIDTH;
            format!(", float[{WIDTH},{wide}] wa{b}, float[{WIDTH},{wide}] wb{b}, float[{wide},{WIDTH}] wc{b}")
        })
        .collect();
    let head = r#"<ir_version: 8, opset_import: ["" : 17]>"#;
    let ends = format!("g (float[N,{WIDTH}] x, float[{WIDTH}] s{weights}) => (float[N,{WIDTH}] y)");
    let mut model = text::parse(&format!("{head} {ends} {{ {nodes} }}")).unwrap();
    let graph = &mut model.graph;
    for index in (1..graph.main().inputs().len()).rev() {
        let value = graph.main().inputs()[index];
        let shape = graph.value(value).ty.as_ref().unwrap().shape().unwrap();
        let dims: Vec<usize> = shape.sizes().unwrap().into_iter().map(|d| d as usize).collect();
        let count: usize = dims.iter().product();
        let numbers: Vec<f32> = (0..count).map(|at| ((at * 31 + index * 7) % 127) as f32 / 64.0 - 1.0).collect();
        graph.set_default(value, Some(Initializer::Dense(Tensor::from_f32s(&dims, &numbers).spilled())));
        graph.freeze_input(ScopeId::MAIN, index);
    }
    model
}

#[test]
fn weights_stay_on_disk_also_where_a_rewrite_computes_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let written = model().write(path("model.onnx").as_ref(), &WriteOptions { external: External::Always }).unwrap();
    assert!(written.data_bytes > 280 << 20);
    fs::create_dir(path("scratch")).unwrap();
    for target in ["portable", "ort"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("TMPDIR", path("scratch"));
        command.args([&path("model.onnx"), "-o", &path("out.onnx"), "--no-verify", "--target", target]);
        let output = command.args(["--report", &path("report.json")]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_str(&fs::read_to_string(path("report.json")).unwrap()).unwrap();
        let folded = report["passes"].as_array().unwrap().iter().find(|p| p["name"] == "fold-norm-affine").unwrap();
        assert_eq!(folded["changes"], BLOCKS, "the factors are folded into the weights");
        let peak = report["peak_rss_bytes"].as_u64().unwrap();
        assert!(peak < LIMIT, "{} MiB of a model of {} MiB", peak >> 20, written.data_bytes >> 20);
        assert_eq!(spilled(&path("scratch")), 0);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("TMPDIR", path("scratch")).stderr(Stdio::null());
    let mut child = command.args([&path("model.onnx"), "-o", &path("out.onnx"), "--no-verify"]).spawn().unwrap();
    while spilled(&path("scratch")) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "nothing was spilled");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(spilled(&path("scratch")), 0, "an interrupt leaves nothing");
}

/// Temporary files of weights in a folder.
fn spilled(folder: &str) -> usize {
    fs::read_dir(folder)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension() == Some("weights".as_ref()))
        .count()
}
