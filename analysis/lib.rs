//! Facts about a model that is never changed: types and shapes, constants, cost, liveness.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod affine;
mod calibrate;
mod cones;
mod cost;
mod cuts;
mod dim;
mod evaluate;
mod keep;
pub mod kernels;
mod liveness;
mod operators;
mod random;
mod reach;
mod rows;
mod schemas;
mod shapes;
mod sliced_positions;
mod spread;
mod stable_hash;
mod tokens;
mod units;

pub use affine::{Affine, Affines};
pub use calibrate::{Below, Calibrate, Cross, Gram, Magnitudes, Moments, SymMatrix};
pub use cones::{Cone, Cones};
pub use cost::{Bindings, Cost, NodeCost, OperatorCost};
pub use cuts::{Block, Border, Cuts, Residual, Run, Skip};
pub use dim::{DimExpr, Symbol, product};
pub use evaluate::{Evaluate, EvaluateError};
pub use keep::{Keep, KeyBuilder, kept_or};
pub use liveness::{Liveness, dead_nodes, unused_initializers};
pub use operators::{OPERATORS, Operator, Trait};
pub use random::Random;
pub use reach::{NodeSet, comes_from, downstream, find_downstream, upstream};
pub use rows::{Rows, View, Window, weight_inputs};
pub use schemas::{Formal, Schema, TypeVariable};
pub use shapes::{Contents, Facts};
pub use sliced_positions::read_apart;
pub use spread::Spread;
pub use stable_hash::StableHash;
pub use tokens::{Keys, TokenAttention, TokenAxes, TokenBlock, Tokens, kept_axis};
pub use units::{Barrier, NoUnit, NoUnitReason, PostOp, Unit, UnitId, UnitKind, Units, may_leave};
