//! Running models in this process: finding an engine, and answering passes with it.

use crate::{Engine, LibrarySearch, LoadOptions, OrtEngine, RuntimeError, Source, datum::only_tensors};
use lathe_analysis::{Evaluate, EvaluateError};
use lathe_ir::{Model, Tensor};

/// The engine to run models with: ONNX Runtime if it is found, else the embedded one if it is built in.
///
/// A library that was asked for by name and cannot be used is an error either way.
pub fn start(search: &LibrarySearch) -> Result<&'static dyn Engine, RuntimeError> {
    match OrtEngine::start(search) {
        Ok(engine) => Ok(engine),
        #[cfg(feature = "embedded")]
        Err(RuntimeError::NoLibrary { .. }) => Ok(&crate::embedded::Embedded),
        Err(error) => Err(error),
    }
}

/// Runs models in this process, with the engine's own optimizations off.
pub struct InProcess<'a> {
    engine: &'a dyn Engine,
    options: LoadOptions,
}

impl<'a> InProcess<'a> {
    /// Runs on one thread: the models that passes ask about are small, and starting a thread pool costs more.
    pub fn new(engine: &'a dyn Engine) -> InProcess<'a> {
        InProcess { engine, options: LoadOptions { threads: 1, ..LoadOptions::default() } }
    }
}

impl Evaluate for InProcess<'_> {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        let bytes = model.to_bytes();
        let mut session = self.engine.load(Source::Bytes(&bytes), &self.options)?;
        let outputs = session.run(inputs)?;
        only_tensors(outputs).map_err(|error| EvaluateError { message: error.to_string() })
    }

    fn name(&self) -> String {
        self.engine.name()
    }
}
