//! For tests only: running two models side by side, seeded inputs, random small graphs.
//!
//! Unlike the rest of the program this crate reads `ORT_DYLIB_PATH` itself, and panics when ONNX Runtime is missing.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use lathe_analysis::Evaluate;
use lathe_ir::{Model, Tensor};
use lathe_runtime::{
    Engine, InProcess, InputSpec, Inputs, LibrarySearch, LoadOptions, OrtEngine, Profile, Source, VerifyTask, verify,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::LazyLock,
};

mod operators;
mod random;

pub use lathe_runtime::{Claim, Verdict};
pub use operators::{operator_inputs, operator_model};
pub use random::random_model;

static ENGINE: LazyLock<&OrtEngine> = LazyLock::new(|| {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let search = LibrarySearch {
        variable: std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from),
        environments: vec![workspace.join(".venv")],
        pythons: vec![PathBuf::from("python3")],
        system_dirs: LibrarySearch::usual_system_dirs(),
        ..LibrarySearch::default()
    };
    match OrtEngine::start(&search) {
        Ok(engine) => engine,
        Err(error) => panic!("the tests need ONNX Runtime, which `./test` installs: {error}"),
    }
});

static EVALUATOR: LazyLock<InProcess<'static>> = LazyLock::new(|| InProcess::new(engine()));

/// The ONNX Runtime of this process.
pub fn engine() -> &'static OrtEngine {
    *ENGINE
}

/// Runs models for passes under test.
pub fn evaluator() -> &'static (dyn Evaluate + Sync) {
    &*EVALUATOR
}

/// The operators that ONNX Runtime carries a model out with when all its optimizations are on, and how many nodes of each.
pub fn kernels(model: &Model, inputs: &[(String, Tensor)]) -> BTreeMap<String, usize> {
    let folder = tempfile::tempdir().expect("there is a place for a profile");
    let options = LoadOptions { threads: 1, optimize: true, ..LoadOptions::default() };
    let bytes = model.to_bytes();
    let loaded = engine().timed(Source::Bytes(&bytes), &options, Some(folder.path()));
    let mut session = loaded.unwrap_or_else(|error| panic!("the model is not loaded: {error}"));
    session.bind(&inputs.to_vec()).expect("the inputs fit the model");
    session.run().unwrap_or_else(|error| panic!("the model does not run: {error}"));
    let path = session.profile().expect("a profile is written").expect("the runtime has a profiler");
    let profile =
        Profile::parse(&std::fs::read(path).expect("it is there"), session.provider(), &session.left_because())
            .expect("it is one");
    let mut kernels = BTreeMap::new();
    for node in profile.nodes {
        *kernels.entry(node.op).or_insert(0) += 1;
    }
    kernels
}

/// Runs both models on seeded inputs and checks the candidate against `claim`; the error says what differs.
///
/// Both run with ONNX Runtime's own optimizations off, at two sizes of every symbolic dimension. Under
/// [`Claim::Identical`] the inputs also hold negative zeros, infinities, NaN and denormals.
pub fn equivalent(reference: &Model, candidate: &Model, claim: impl Into<Claim>, seed: u64) -> Result<(), String> {
    let verdict = verdict(reference, candidate, claim.into(), seed)?;
    if verdict.holds() { Ok(()) } else { Err(verdict.describe()) }
}

/// What comes of running both models on seeded inputs.
pub fn verdict(reference: &Model, candidate: &Model, claim: Claim, seed: u64) -> Result<Verdict, String> {
    let (expected, found) = (reference.to_bytes(), candidate.to_bytes());
    let inputs = Inputs::Random(InputSpec { seed, ..InputSpec::default() });
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let task = VerifyTask {
        model: reference,
        reference: Source::Bytes(&expected),
        candidate: Source::Bytes(&found),
        inputs: &inputs,
        claim,
        reference_options: &options,
        options: &options,
    };
    verify(engine(), &task, &mut |_: &str| {}).map_err(|e| e.to_string())
}
