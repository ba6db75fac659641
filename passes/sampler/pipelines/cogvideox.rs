//! CogVideoX: T5; frames of the latent come before its channels.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline};
use crate::sampler::Error;
use lathe_ir::ValueId;

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["CogVideoXPipeline"],
    summary: "videos of T5",
    denoiser: "transformer",
    encoders: &["text_encoder"],
    roles: &["latent=hidden_states", "uncond:encoder_hidden_states=input"],
    refused: &[],
    guided: Guided::Passes,
    empty: Empty::Text,
    explicit_sigmas: false,
    patch: None,
    side: 0,
    channels: 2,
    frames: Some(1),
    packed: false,
    encode,
    decode,
    output: "video",
};

fn encode(e: &mut Encoding) -> Result<(), Error> {
    e.noise()?;
    let text = e.text("text_encoder", MaskUse::None, Some("encoder_hidden_states"))?;
    e.condition("encoder_hidden_states", text.given.output(&["last_hidden_state"])?)
}

/// Frames come before channels in the result too.
fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    let latent = d.stage.transpose(d.sample, &[0, 2, 1, 3, 4]);
    let latent = d.unscaled(latent, (1, 5))?;
    let frames = d.decoded(latent)?;
    let frames = d.stage.transpose(frames, &[0, 2, 1, 3, 4]);
    Ok(d.pixels(frames))
}
