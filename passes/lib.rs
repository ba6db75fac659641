//! The catalogue of passes, and the driver that carries out rewrite rules.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod driver;
mod editor;
pub mod exact;
pub mod lossy;
mod operands;
mod pass;
mod rule;
mod same_scope;
pub mod sampler;
#[cfg(test)]
mod testing;

pub use driver::rewrite;
pub(crate) use editor::{Editor, edit_graphs};
pub use exact::PASSES;
pub use pass::{Change, Context, Error, Info, Kind, Opt, Outcome, Pass, Quantity, Target};
pub use rule::{Match, Refusal, Replacement, Rule, rule};
