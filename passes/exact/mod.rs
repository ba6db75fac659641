//! Exact passes: the result is the same function.

mod drop_identities;

pub use drop_identities::DropIdentities;

use crate::Pass;

/// Every exact pass, in default order. The help, `optimize explain`, the README table and the report are printed from
/// this list.
pub const PASSES: &[&dyn Pass] = &[&DropIdentities];
