//! Stable Diffusion XL: two CLIP text encoders, what the second one projects, and sizes.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline};
use crate::sampler::Error;
use lathe_ir::{Tensor, ValueId};

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["StableDiffusionXLPipeline"],
    summary: "images of two CLIP text encoders",
    denoiser: "unet",
    encoders: &["text_encoder", "text_encoder_2"],
    roles: &["uncond:encoder_hidden_states=input", "uncond:text_embeds=input"],
    refused: &[],
    guided: Guided::Passes,
    empty: Empty::Zeros,
    explicit_sigmas: false,
    patch: None,
    side: 128,
    channels: 1,
    frames: None,
    packed: false,
    encode,
    decode,
    output: "image",
};

fn encode(e: &mut Encoding) -> Result<(), Error> {
    e.noise()?;
    let first = e.text("text_encoder", MaskUse::None, Some("encoder_hidden_states"))?.given.hidden(2)?;
    let second = e.text("text_encoder_2", MaskUse::None, Some("encoder_hidden_states"))?.given;
    let states = e.stage.concat(&[first, second.hidden(2)?], 2, "states");
    e.condition("encoder_hidden_states", states)?;
    e.condition("text_embeds", second.output(&["text_embeds"])?)?;
    // The original size, where the crop begins, and the size that is wanted.
    let size = e.pixels();
    let corner = e.stage.constant(Tensor::from_f32s(&[2], &[0.0, 0.0]), "corner");
    let ids = e.stage.concat(&[size, corner, size], 0, "time_ids");
    e.row("time_ids", ids, 6)
}

fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    d.image(d.sample)
}
