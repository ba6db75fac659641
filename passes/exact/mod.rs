//! Exact passes: the result is the same function.

mod drop_broadcasts;
mod drop_dead;
mod drop_duplicate_units;
mod drop_identities;
mod drop_neutral;
mod drop_noop_layout;
mod drop_trace_info;
mod fit_provider;
mod fold_batch_norm;
mod fold_bias;
mod fold_compute;
mod fold_constants;
mod fold_index_arithmetic;
mod fold_matmul_chain;
mod fold_norm_affine;
mod fold_pads;
mod fold_plan;
mod fold_residual_bias;
mod fold_scale;
mod freeze_initializers;
mod fuse_attention;
mod fuse_gelu;
mod fuse_gemm;
mod fuse_hard_swish;
mod fuse_layer_norm;
mod fuse_rms_norm;
mod fuse_rotary;
mod fuse_skip_norm;
mod group_experts;
mod hoist_constants;
mod hoist_invariants;
mod inline_functions;
mod inline_if;
mod inline_sequences;
mod linear;
mod merge_duplicates;
mod merge_linears;
mod merge_scalars;
mod merge_slices;
mod norm_parts;
mod normalise_model;
mod reshape_target;
mod rounding;
mod share_initializers;
mod simplify_gathers;
mod simplify_reshapes;
mod simplify_shapes;
mod simplify_slices;
mod simplify_transposes;
mod slice_chains;
mod unroll_loop;
mod upgrade_opset;

// Passes that others run by themselves.
pub use drop_dead::DropDead;
pub use drop_identities::DropIdentities;
pub use drop_noop_layout::DropNoopLayout;
pub use fold_constants::FoldConstants;
pub(crate) use hoist_constants::constant_of;
pub use merge_duplicates::MergeDuplicates;
pub use share_initializers::ShareInitializers;
pub use simplify_shapes::SimplifyShapes;

use crate::Pass;

/// Every exact pass, in default order. The help, `optimize explain`, the table of the book and the report are printed from
/// this list.
pub const PASSES: &[&dyn Pass] = &[
    &freeze_initializers::FreezeInitializers,
    &hoist_constants::HoistConstants,
    &upgrade_opset::UpgradeOpset,
    &inline_functions::InlineFunctions,
    &normalise_model::NormaliseModel,
    &drop_trace_info::DropTraceInfo,
    &drop_identities::DropIdentities,
    &drop_neutral::DropNeutral,
    &drop_noop_layout::DropNoopLayout,
    &fold_constants::FoldConstants,
    &fold_index_arithmetic::FoldIndexArithmetic,
    &drop_broadcasts::DropBroadcasts,
    &inline_if::InlineIf,
    &unroll_loop::UnrollLoop,
    &inline_sequences::InlineSequences,
    &hoist_invariants::HoistInvariants,
    &simplify_gathers::SimplifyGathers,
    &simplify_reshapes::SimplifyReshapes,
    &simplify_shapes::SimplifyShapes,
    &simplify_slices::SimplifySlices,
    &simplify_transposes::SimplifyTransposes,
    &fold_pads::FoldPads,
    // Operators that are one node come before the folds that would take a factor or a sum out of what spells them out.
    &fuse_layer_norm::FuseLayerNorm,
    &fuse_rms_norm::FuseRmsNorm,
    &fuse_gelu::FuseGelu,
    &fuse_hard_swish::FuseHardSwish,
    &merge_scalars::MergeScalars,
    &fold_batch_norm::FoldBatchNorm,
    &fold_scale::FoldScale,
    &fold_bias::FoldBias,
    &fuse_gemm::FuseGemm,
    &fold_norm_affine::FoldNormAffine,
    &fold_matmul_chain::FoldMatmulChain,
    &merge_linears::MergeLinears,
    &drop_duplicate_units::DropDuplicateUnits,
    &merge_slices::MergeSlices,
    &group_experts::GroupExperts,
    &fuse_attention::FuseAttention,
    &fuse_rotary::FuseRotary,
    &fuse_skip_norm::FuseSkipNorm,
    &fold_residual_bias::FoldResidualBias,
    &fit_provider::FitProvider,
    &slice_chains::SliceChains,
    &share_initializers::ShareInitializers,
    &merge_duplicates::MergeDuplicates,
    &drop_dead::DropDead,
];
