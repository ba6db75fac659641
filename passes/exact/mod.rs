//! Exact passes: the result is the same function.

mod drop_identities;
mod drop_noop_layout;
mod fold_batch_norm;
mod fold_scale;
mod freeze_initializers;
mod hoist_constants;
mod inline_if;
mod linear;
mod merge_slices;
mod normalise_model;
mod simplify_reshapes;
mod simplify_slices;
mod unroll_loop;

pub use drop_identities::DropIdentities;
pub use drop_noop_layout::DropNoopLayout;
pub use fold_batch_norm::FoldBatchNorm;
pub use fold_scale::FoldScale;
pub use freeze_initializers::FreezeInitializers;
pub use hoist_constants::HoistConstants;
pub(crate) use hoist_constants::constant_of;
pub use inline_if::InlineIf;
pub use merge_slices::MergeSlices;
pub use normalise_model::NormaliseModel;
pub use simplify_reshapes::SimplifyReshapes;
pub use simplify_slices::SimplifySlices;
pub use unroll_loop::UnrollLoop;

use crate::Pass;

/// Every exact pass, in default order. The help, `optimize explain`, the README table and the report are printed from
/// this list.
pub const PASSES: &[&dyn Pass] = &[
    &FreezeInitializers,
    &HoistConstants,
    &NormaliseModel,
    &DropIdentities,
    &DropNoopLayout,
    &SimplifyReshapes,
    &SimplifySlices,
    &FoldBatchNorm,
    &FoldScale,
    &MergeSlices,
    &InlineIf,
    &UnrollLoop,
];
