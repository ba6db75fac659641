//! Exact passes: the result is the same function.

mod drop_identities;
mod drop_noop_layout;
mod simplify_reshapes;

pub use drop_identities::DropIdentities;
pub use drop_noop_layout::DropNoopLayout;
pub use simplify_reshapes::SimplifyReshapes;

use crate::Pass;

/// Every exact pass, in default order. The help, `optimize explain`, the README table and the report are printed from
/// this list.
pub const PASSES: &[&dyn Pass] = &[&DropIdentities, &DropNoopLayout, &SimplifyReshapes];
