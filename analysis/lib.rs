//! Facts about a model that is never changed: types and shapes, constants, cost, liveness.

mod evaluate;

pub use evaluate::{Evaluate, EvaluateError};
