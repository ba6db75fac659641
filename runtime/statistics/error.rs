//! Why statistics and what is measured by them cannot be had: one sentence each.

use crate::{RuntimeError, SetError};
use lathe_ir::WriteError;
use std::{io, path::PathBuf};

/// Why statistics could not be collected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum StatisticsError {
    #[error("the model has no value `{value}`")]
    Missing { value: String },
    #[error("`{value}` is computed in {node}; statistics can be taken of values of the main graph only")]
    Nested { value: String, node: String },
    #[error("`{value}` is a constant, it has the same rows whatever the inputs are")]
    Constant { value: String },
    #[error("the model has no input `{name}` of whole numbers or booleans with two axes, which a mask of tokens is")]
    NoMask { name: String },
    #[error("the model uses operator set {found}; statistics need {needed} or later")]
    OldOpset { found: i64, needed: i64 },
    #[error("`{value}` of shape {found:?} has no such axis, or nothing along it")]
    Axis { value: String, found: Vec<usize> },
    #[error("no convolution has the window {window}")]
    Window { window: String },
    #[error("`{x}` has {} rows and `{y}` has {}; statistics of pairs need equal numbers", .found.0, .found.1)]
    Rows { x: String, y: String, found: (usize, usize) },
    #[error("`{x}` is of shape {:?} and `{y}` of shape {:?}; their rows cannot be compared", .found.0, .found.1)]
    Shapes { x: String, y: String, found: (Vec<usize>, Vec<usize>) },
    #[error("{request} alone needs about {needed} MiB besides the model, and {allowed} MiB are allowed in all")]
    TooLarge { request: String, needed: u64, allowed: u64 },
    #[error(
        "output {outputs} of the model is NaN or infinite in all its elements on these samples: no loss can be measured"
    )]
    NotFinite { outputs: String },
    #[error("`{request}` was not collected")]
    NotCollected { request: String },
    #[error("cannot use `{path}`: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot write the model that computes statistics: {0}")]
    Write(#[from] WriteError),
    #[error(transparent)]
    Set(#[from] SetError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}
