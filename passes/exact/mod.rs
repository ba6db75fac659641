//! Exact passes: the result is the same function.

mod drop_identities;
mod drop_noop_layout;
mod fold_batch_norm;
mod fold_scale;
mod linear;
mod merge_slices;
mod simplify_reshapes;
mod simplify_slices;

pub use drop_identities::DropIdentities;
pub use drop_noop_layout::DropNoopLayout;
pub use fold_batch_norm::FoldBatchNorm;
pub use fold_scale::FoldScale;
pub use merge_slices::MergeSlices;
pub use simplify_reshapes::SimplifyReshapes;
pub use simplify_slices::SimplifySlices;

use crate::Pass;

/// Every exact pass, in default order. The help, `optimize explain`, the README table and the report are printed from
/// this list.
pub const PASSES: &[&dyn Pass] = &[
    &DropIdentities,
    &DropNoopLayout,
    &SimplifyReshapes,
    &SimplifySlices,
    &FoldBatchNorm,
    &FoldScale,
    &MergeSlices,
];
