//! Stable Diffusion 3: two CLIP text encoders side by side, and T5 behind them.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline};
use crate::sampler::Error;
use lathe_ir::{Node, Tensor, ValueId};

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["StableDiffusion3Pipeline"],
    summary: "images of two CLIP text encoders and T5",
    denoiser: "transformer",
    encoders: &["text_encoder", "text_encoder_2", "text_encoder_3"],
    roles: &["uncond:encoder_hidden_states=input", "uncond:pooled_projections=input"],
    refused: &[],
    guided: Guided::Passes,
    empty: Empty::Text,
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
    let first = e.text("text_encoder", MaskUse::None, None)?.given;
    let second = e.text("text_encoder_2", MaskUse::None, None)?.given;
    let third = e.text("text_encoder_3", MaskUse::None, None)?.given.output(&["last_hidden_state"])?;
    let clip = e.stage.concat(&[first.hidden(2)?, second.hidden(2)?], 2, "clip");
    let clip = widened(e, clip, third);
    let states = e.stage.concat(&[clip, third], 1, "states");
    e.condition("encoder_hidden_states", states)?;
    let embeds = ["text_embeds"];
    let pooled = e.stage.concat(&[first.output(&embeds)?, second.output(&embeds)?], 1, "pooled");
    e.condition("pooled_projections", pooled)
}

/// `narrow` with zeros behind its features, so that there are as many as of `wide`.
fn widened(e: &mut Encoding, narrow: ValueId, wide: ValueId) -> ValueId {
    let mut width = |value| e.stage.node(Node::new("Shape").with("start", 2).with("end", 3), &[value], "width");
    let (narrow_width, wide_width) = (width(narrow), width(wide));
    let missing = e.stage.node(Node::new("Sub"), &[wide_width, narrow_width], "missing");
    let none = e.stage.int64s(&[0, 0, 0, 0, 0], "none");
    let pads = e.stage.concat(&[none, missing], 0, "pads");
    let zero = e.stage.constant(Tensor::from_f32s(&[], &[0.0]), "zero");
    e.stage.node(Node::new("Pad"), &[narrow, pads, zero], "widened")
}

fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    d.image(d.sample)
}
