//! Why no sampler can be made.

use super::methods::OptionError;
use lathe_analysis::EvaluateError;

/// What is wrong with the description of a sampler, the plan or the denoiser.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A field of the scheduler's configuration has a value that makes no sense.
    #[error("`{field}` of the scheduler is {found}, expected {expected}")]
    Field {
        /// The field.
        field: String,
        /// What it says.
        found: String,
        /// What it may say.
        expected: String,
    },
    /// A setting that is known and not built.
    #[error("the scheduler setting {0} is not supported")]
    Unsupported(String),
    /// The plan cannot be carried out.
    #[error("{0}")]
    Plan(String),
    /// A method, or an option of one, cannot be read.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// The inputs of the denoiser are not what a sampler needs.
    #[error("{0}")]
    Roles(String),
    /// The denoiser cannot be taken apart.
    #[error("{0}")]
    Network(String),
    /// The parts of a pipeline are not what its class needs.
    #[error("{0}")]
    Pipeline(String),
    /// The form cannot express the plan.
    #[error("{0}")]
    Form(String),
    /// Part of the denoiser could not be run.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
}
