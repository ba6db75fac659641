//! Pipelines of diffusers: what stands in front of the sampling loop and behind it, one file for each kind of pipeline.
//!
//! A [`Pipeline`] says what the inputs of the denoiser are, in the words of the command line, and has two functions. `encode`
//! makes the conditions of the denoiser from token ids, `decode` makes pixels of the sample. Both put parts of the pipeline's
//! folder into a [`Stage`], and [`chain`] makes one model of encoders, loop and decoder.

mod chain;
mod cogvideox;
mod decoding;
mod encoding;
mod flux;
mod merge;
mod part;
mod pixart;
mod stable_diffusion;
mod stable_diffusion_3;
mod stable_diffusion_xl;
mod stage;
mod wan;

pub use chain::{Link, chain};
pub use decoding::{DECODER, Decoding, decoded};
pub use encoding::{Asked, Encoding, MaskUse, Negative, PACKED_NOISES, encoded};
pub use part::{Config, Part};
pub use stage::{Given, Stage};

use super::Error;
use lathe_ir::ValueId;

/// How the pipelines of a kind are guided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guided {
    /// By an unconditional pass.
    Passes,
    /// By an input of the denoiser that holds the scale.
    Embedded,
}

/// How a pipeline gets along without its text encoders being told what is not wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Empty {
    /// The text encoders read an empty text.
    Text,
    /// What they would give is zero where `model_index.json` says `force_zeros_for_empty_prompt`.
    Zeros,
}

/// What is true of the pipelines of a kind.
pub struct Pipeline {
    /// The classes of diffusers.
    pub classes: &'static [&'static str],
    /// What they make of what.
    pub summary: &'static str,
    /// The folder of the denoiser.
    pub denoiser: &'static str,
    /// The folders of the text encoders.
    pub encoders: &'static [&'static str],
    /// What the inputs of the denoiser are, as `--io` says it.
    pub roles: &'static [&'static str],
    /// Settings of `model_index.json` that mean something else than what is built.
    pub refused: &'static [&'static str],
    /// How they are guided.
    pub guided: Guided,
    /// What the unconditional pass knows where no text is given for it.
    pub empty: Empty,
    /// Whether the noise levels of a flow are `linspace(1, 1/N, N)`.
    pub explicit_sigmas: bool,
    /// The side of a patch of the latent that is one token, by whose count noise levels are shifted; `None` where the
    /// denoiser's configuration says it.
    pub patch: Option<usize>,
    /// The side of the latent where neither the user nor the denoiser's configuration says it; 0 where that is an error.
    pub side: usize,
    /// The axis of channels in the latent.
    pub channels: usize,
    /// The axis of frames in the latent, of videos.
    pub frames: Option<usize>,
    /// Whether the denoiser is told patches, so that the size of a sample has to be known.
    pub packed: bool,
    /// Gives the conditions of the denoiser.
    pub encode: fn(&mut Encoding) -> Result<(), Error>,
    /// Gives what the decoder makes of a sample, from 0 to 1.
    pub decode: fn(&mut Decoding) -> Result<ValueId, Error>,
    /// What the result is called.
    pub output: &'static str,
}

/// Every kind of pipeline. The documentation lists them in this order.
pub const PIPELINES: &[&Pipeline] = &[
    &stable_diffusion::PIPELINE,
    &stable_diffusion_xl::PIPELINE,
    &stable_diffusion_3::PIPELINE,
    &flux::PIPELINE,
    &pixart::PIPELINE,
    &cogvideox::PIPELINE,
    &wan::PIPELINE,
];

/// Parts of a pipeline that pixels do not depend on.
pub const BESIDE: &[&str] = &[
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "feature_extractor",
    "safety_checker",
    "watermark",
    "image_processor",
    "scheduler",
    "vae",
    "vae_encoder",
    "vae_decoder",
];

/// The kind of pipeline that a class belongs to. Exporters put a word of their own in front.
pub fn pipeline(class: &str) -> Result<&'static Pipeline, Error> {
    let plain = |class: &'_ str| class.strip_prefix("ORT").or(class.strip_prefix("Onnx")).unwrap_or(class).to_owned();
    let found = PIPELINES.iter().copied().find(|p| p.classes.contains(&plain(class).as_str()));
    found.ok_or_else(|| {
        let known: Vec<&str> = PIPELINES.iter().flat_map(|p| p.classes.iter().copied()).collect();
        Error::Pipeline(format!(
            "pipelines of class `{class}` are not built, those of {} are; a denoiser alone is compiled by `optimize \
             sampler DENOISER.onnx --scheduler FILE`, where --io says what its inputs are",
            known.join(", ")
        ))
    })
}
