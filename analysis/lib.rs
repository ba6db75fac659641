//! Facts about a model that is never changed: types and shapes, constants, cost, liveness.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod dim;
mod evaluate;
mod shapes;

pub use dim::{DimExpr, Symbol};
pub use evaluate::{Evaluate, EvaluateError};
pub use shapes::{Contents, Facts};
