//! What the tests of the whole program share.

#![allow(dead_code)] // Every test uses a part of it.

use lathe_ir::External;
use lathe_passes::Target;
use onnx_lathe::{Options, Selection};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

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
    Options {
        model: model.to_owned(),
        output: Some(output.to_owned()),
        overwrite: false,
        selection: Selection::default(),
        settings: BTreeMap::new(),
        target: Target::Portable,
        opset: None,
        max_growth: 0,
        external: External::Auto,
        verify: false,
        paranoid: false,
        bench: None,
        detailed: false,
        sets: Default::default(),
        budget: Default::default(),
        calib_select: None,
        shapes: Vec::new(),
        seed: 0,
        ort: Some(lathe_testkit::engine().found().path.clone()),
        load: Default::default(),
        timeout: Duration::from_secs(60),
        memory: None,
        worker: Some(env!("CARGO_BIN_EXE_optimize").into()),
        progress: Default::default(),
        command: Vec::new(),
    }
}

/// Optimizes a file with default options and reads the result. A pass that was left out is a failure that names it.
pub fn optimize(model: &Path, output: &Path) -> Result<lathe_ir::Model, String> {
    let done = onnx_lathe::optimize(&options(model, output)).map_err(|e| format!("not optimized: {e}"))?;
    if let Some(warning) = done.report.warnings.iter().find(|w| w.contains("was left out")) {
        return Err(warning.clone());
    }
    Ok(lathe_ir::Model::read(output).map_err(|e| format!("the result cannot be read: {e}"))?.model)
}

/// The operators of a model and how often each occurs, subgraphs and local functions included.
pub fn operators(model: &lathe_ir::Model) -> BTreeMap<String, usize> {
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
