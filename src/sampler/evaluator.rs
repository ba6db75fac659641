//! Runs models for the sampler compiler: in the worker, and without moving weights.

use crate::runner::Runner;
use lathe_analysis::{Evaluate, EvaluateError};
use lathe_ir::{Model, Tensor};
use lathe_runtime::LoadOptions;
use std::fmt::Display;

/// Runs models in the worker as they are loaded by some options.
pub(super) struct Evaluator<'a> {
    runner: &'a Runner,
    load: LoadOptions,
}

impl<'a> Evaluator<'a> {
    /// Runs models as they are loaded by `load`.
    pub fn new(runner: &'a Runner, load: &LoadOptions) -> Evaluator<'a> {
        Evaluator { runner, load: load.clone() }
    }

    /// Runs models with everything that the runtime does for speed: for what is not held to a bound.
    pub fn fast(runner: &'a Runner, load: &LoadOptions) -> Evaluator<'a> {
        Evaluator::new(runner, &LoadOptions { optimize: true, ..load.clone() })
    }
}

impl Evaluate for Evaluator<'_> {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        // A message of protobuf ends at 2 GiB, so weights stay in the files they are mapped from.
        let aside = |e: &dyn Display| EvaluateError { message: format!("it cannot be put aside: {e}") };
        let folder = self.runner.child().scratch().map_err(|e| aside(&e))?;
        let path = folder.path().join("model.onnx");
        model.write_linked(&path).map_err(|e| aside(&e))?;
        let mut outputs = self.runner.child().run_file(&path, &[inputs.to_vec()], &self.load)?;
        Ok(outputs.pop().unwrap_or_default())
    }

    fn name(&self) -> String {
        Evaluate::name(self.runner.child())
    }
}
