//! Calibration statistics: sums over the rows of values inside a model while it runs on a set of inputs.
//!
//! The sums are computed in the graph: products, means and cosines are appended as nodes to a copy of the model, whose
//! own outputs are dropped, so that the execution provider does the work and only small results come back. Products
//! of wide values are float32 over a few hundred rows at a time, everything else is float64; batches are added in
//! float64. A copy shares its weights with the model's files. Rows of padded tokens and rows that hold a NaN or an
//! infinity count as zero, and are counted.
//!
//! Results are files in a cache, one per request, under a name made of everything they depend on: the model, the
//! contents of the set, the runtime, and how it runs.

mod append;
mod collect;
mod error;
mod gather;
mod request;
mod store;
#[cfg(test)]
mod tests;

pub(crate) use append::resolve;
pub use collect::{CollectOptions, Counts, Field, MaskInput, Statistics, Work, quarter_of_memory};
pub use error::StatisticsError;
pub(crate) use gather::serve;
pub use request::{Cut, Request, Skip};
