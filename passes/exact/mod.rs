//! Exact passes: the result is the same function.

mod drop_broadcasts;
mod drop_dead;
mod drop_duplicate_units;
mod drop_identities;
mod drop_neutral;
mod drop_noop_layout;
mod drop_trace_info;
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

pub use drop_broadcasts::DropBroadcasts;
pub use drop_dead::DropDead;
pub use drop_duplicate_units::DropDuplicateUnits;
pub use drop_identities::DropIdentities;
pub use drop_neutral::DropNeutral;
pub use drop_noop_layout::DropNoopLayout;
pub use drop_trace_info::DropTraceInfo;
pub use fold_batch_norm::FoldBatchNorm;
pub use fold_bias::FoldBias;
pub use fold_constants::FoldConstants;
pub use fold_index_arithmetic::FoldIndexArithmetic;
pub use fold_matmul_chain::FoldMatmulChain;
pub use fold_norm_affine::FoldNormAffine;
pub use fold_pads::FoldPads;
pub use fold_residual_bias::FoldResidualBias;
pub use fold_scale::FoldScale;
pub use freeze_initializers::FreezeInitializers;
pub use fuse_attention::FuseAttention;
pub use fuse_gelu::FuseGelu;
pub use fuse_gemm::FuseGemm;
pub use fuse_hard_swish::FuseHardSwish;
pub use fuse_layer_norm::FuseLayerNorm;
pub use fuse_rms_norm::FuseRmsNorm;
pub use fuse_rotary::FuseRotary;
pub use fuse_skip_norm::FuseSkipNorm;
pub use hoist_constants::HoistConstants;
pub(crate) use hoist_constants::constant_of;
pub use hoist_invariants::HoistInvariants;
pub use inline_functions::InlineFunctions;
pub use inline_if::InlineIf;
pub use inline_sequences::InlineSequences;
pub use merge_duplicates::MergeDuplicates;
pub use merge_linears::MergeLinears;
pub use merge_scalars::MergeScalars;
pub use merge_slices::MergeSlices;
pub use normalise_model::NormaliseModel;
pub use share_initializers::ShareInitializers;
pub use simplify_gathers::SimplifyGathers;
pub use simplify_reshapes::SimplifyReshapes;
pub use simplify_shapes::SimplifyShapes;
pub use simplify_slices::SimplifySlices;
pub use simplify_transposes::SimplifyTransposes;
pub use slice_chains::SliceChains;
pub use unroll_loop::UnrollLoop;
pub use upgrade_opset::UpgradeOpset;

use crate::Pass;

/// Every exact pass, in default order. The help, `optimize explain`, the README table and the report are printed from
/// this list.
pub const PASSES: &[&dyn Pass] = &[
    &FreezeInitializers,
    &HoistConstants,
    &UpgradeOpset,
    &InlineFunctions,
    &NormaliseModel,
    &DropTraceInfo,
    &DropIdentities,
    &DropNeutral,
    &DropNoopLayout,
    &FoldConstants,
    &FoldIndexArithmetic,
    &DropBroadcasts,
    &InlineIf,
    &UnrollLoop,
    &InlineSequences,
    &HoistInvariants,
    &SimplifyGathers,
    &SimplifyReshapes,
    &SimplifyShapes,
    &SimplifySlices,
    &SimplifyTransposes,
    &FoldPads,
    // Operators that are one node come before the folds that would take a factor or a sum out of what spells them out.
    &FuseLayerNorm,
    &FuseRmsNorm,
    &FuseGelu,
    &FuseHardSwish,
    &MergeScalars,
    &FoldBatchNorm,
    &FoldScale,
    &FoldBias,
    &FuseGemm,
    &FoldNormAffine,
    &FoldMatmulChain,
    &MergeLinears,
    &DropDuplicateUnits,
    &MergeSlices,
    &FuseAttention,
    &FuseRotary,
    &FuseSkipNorm,
    &FoldResidualBias,
    &SliceChains,
    &ShareInitializers,
    &MergeDuplicates,
    &DropDead,
];
