//! The catalogue of passes, and the driver that carries out rewrite rules.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod driver;
mod editor;
pub mod exact;
pub mod kv_cache;
pub mod lossy;
mod operands;
mod pass;
pub mod precision;
mod quantity;
mod rule;
mod same_scope;
pub mod sampler;
#[cfg(test)]
mod testing;

pub use driver::rewrite;
pub(crate) use editor::{Editor, edit_graphs};
pub use exact::PASSES;
pub use pass::{Change, Error, Info, Kind, Opt, Outcome, Pass, PassContext, Saving, Settings, Target};
pub use quantity::{Quantity, QuantityMap};
pub use rule::{Match, Refusal, Replacement, Rule, rule};
