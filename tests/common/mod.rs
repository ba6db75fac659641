//! What the tests of the whole program share.

#![allow(dead_code)] // Every test uses a part of it.

pub mod pairs;

use lathe_ir::{Model, Tensor};
use lathe_runtime::NpzWriter;
use onnx_lathe::{Options, RunOptions};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};
use tempfile::TempDir;

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A model of `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    repository("fixtures").join(name)
}

/// The default options for one model, without the comparison at the end: tests compare for themselves.
pub fn options(model: &Path, output: &Path) -> Options {
    let run = RunOptions {
        ort: Some(lathe_testkit::engine().library().path.clone()),
        timeout: Duration::from_secs(60),
        worker: Some(env!("CARGO_BIN_EXE_optimize").into()),
        ..RunOptions::default()
    };
    Options::exact(model.to_owned(), output.to_owned(), run)
}

/// Optimizes a file with default options and reads the result. A pass that was left out is a failure that names it.
pub fn optimize(model: &Path, output: &Path) -> Result<Model, String> {
    let done = onnx_lathe::optimize(&options(model, output)).map_err(|e| format!("not optimized: {e}"))?;
    if let Some(warning) = done.report.warnings.iter().find(|w| w.contains("was left out")) {
        return Err(warning.clone());
    }
    Ok(Model::read(output).map_err(|e| format!("the result cannot be read: {e}"))?.model)
}

/// A folder with `model.onnx` and `set.npz`, and what the program makes of them there.
pub struct Workbench {
    folder: TempDir,
    fixed: Vec<String>,
}

impl Workbench {
    /// Every run has the `fixed` options; files are named as in the folder.
    pub fn new(model: &Model, set: &[(&str, Tensor)], fixed: &[&str]) -> Workbench {
        let fixed = fixed.iter().map(|&option| option.to_owned()).collect();
        let bench = Workbench { folder: tempfile::tempdir().unwrap(), fixed };
        bench.put(model, set);
        bench
    }

    /// Takes another model and set.
    pub fn put(&self, model: &Model, set: &[(&str, Tensor)]) {
        fs::write(self.path("model.onnx"), model.to_bytes()).unwrap();
        let mut npz = NpzWriter::create(&self.path("set.npz")).unwrap();
        set.iter().for_each(|(name, tensor)| npz.add(name, tensor).unwrap());
        npz.finish().unwrap();
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `optimize model.onnx` with the fixed options and these.
    pub fn run(&self, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        command.env("XDG_DATA_HOME", self.path("data")).current_dir(self.folder.path());
        command.arg("model.onnx").args(&self.fixed).args(options).output().unwrap()
    }

    /// The report of a run that must succeed.
    pub fn report(&self, options: &[&str]) -> Value {
        let output = self.run(&[&["--report", "report.json"], options].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&fs::read_to_string(self.path("report.json")).unwrap()).unwrap()
    }
}

/// Numbers near a bell curve, from a fixed seed.
pub struct Noise(pub u64);

impl Noise {
    /// 31 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// So many numbers.
    pub fn numbers(&mut self, count: usize, scale: f32) -> Vec<f32> {
        let mut one = || (0..6).map(|_| self.next() as f32 / (1u64 << 31) as f32 - 0.5).sum::<f32>() * scale;
        (0..count).map(|_| one()).collect()
    }

    /// The same as the text form lists them.
    pub fn list(&mut self, count: usize, scale: f32) -> String {
        self.numbers(count, scale).iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ")
    }
}

/// The operators of a model and how often each occurs, subgraphs and local functions included.
pub fn operators(model: &Model) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (graph, _) in model.graphs() {
        for id in graph.all_nodes() {
            *counts.entry(graph.node(id).op_type.clone()).or_default() += 1;
        }
    }
    counts
}

/// What a panic said.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}
