//! Lossy methods: what could be stored or computed otherwise, what that costs and what it loses.
//!
//! A method proposes candidates and carries them out; it never chooses. All candidates of all methods compete in one
//! allocation.

pub mod allocate;
mod blocks;
mod compensate;
mod convert_floats;
mod dictionary;
mod drop_inputs;
mod factorize;
mod factorize_jointly;
mod factors;
mod gptq;
mod integers;
#[cfg(test)]
mod judging;
mod kept_proposal;
mod layers;
mod method;
mod prune_channels;
mod prune_units;
mod quantize;
mod quantize_dynamic;
mod quantize_static;
mod reduce_tokens;
mod regions;
mod select_visual_tokens;
mod site;
mod skip_experts;
mod sparse_attention;
mod spectrum;
mod stored;
mod substitute;
mod work;

pub use drop_inputs::QUIET;
pub use factorize::block_by_block;
pub use factors::{MOST_INPUTS, gram_rows};
pub use kept_proposal::{EditCodec, propose};
pub use layers::{SMALLEST, Tap, Weight, weights};
pub use method::{Method, MethodContext, Needs, NestedCost, NestedEffect, OLDEST_OPSET, Proposal, Recipe};
pub use quantize_static::{LayersInCodes, layers_in_codes};
pub use site::{Candidate, Cost, Edit, Loss, Site};

use site::OVERHEAD;
use work::{batches, in_batches, on_all_cores, within_memory};

/// Why nothing is fitted: there are no samples to judge it by.
const NOT_HELD_OUT: &str = "the calibration set has one sample only, and none is left to judge a fit by";

/// Every lossy method.
pub const METHODS: &[&dyn Method] = &[
    &quantize::Quantize,
    &quantize_dynamic::QuantizeDynamic,
    &quantize_static::QuantizeStatic,
    &convert_floats::ConvertFloats,
    &compensate::Compensate,
    &factorize::Factorize,
    &factorize_jointly::FactorizeJointly,
    &dictionary::Dictionary,
    &prune_channels::PruneChannels,
    &drop_inputs::DropInputs,
    &prune_units::PruneUnits,
    &substitute::Substitute,
    &reduce_tokens::ReduceTokens,
    &select_visual_tokens::SelectVisualTokens,
    &skip_experts::SkipExperts,
    &sparse_attention::SparseAttention,
];
