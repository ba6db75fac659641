//! Running models without knowing who runs them.

use lathe_ir::{Model, Tensor};

/// Why a model could not be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EvaluateError {
    /// One sentence: who refused, at which node if that is known, and why.
    pub message: String,
}

/// Something that runs ONNX models: ONNX Runtime, the embedded engine, a child process around either.
pub trait Evaluate {
    /// Runs `model` on named inputs and returns the named outputs in the model's order.
    ///
    /// Graph optimizations of the engine are off. Inputs that have a default may be left out.
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError>;

    /// Who runs them, for reports: `ONNX Runtime 1.32.0`.
    fn name(&self) -> String;
}
