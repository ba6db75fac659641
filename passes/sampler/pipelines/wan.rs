//! Wan: T5 with its mask; what it gives of ids that do not count is zero.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline};
use crate::sampler::Error;
use lathe_ir::{DataType, Node, ValueId};

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["WanPipeline"],
    summary: "videos of T5 with its mask",
    denoiser: "transformer",
    encoders: &["text_encoder"],
    roles: &["latent=hidden_states", "uncond:encoder_hidden_states=input"],
    refused: &["expand_timesteps", "boundary_ratio"],
    guided: Guided::Passes,
    empty: Empty::Text,
    explicit_sigmas: false,
    patch: None,
    side: 0,
    channels: 1,
    frames: Some(2),
    packed: false,
    encode,
    decode,
    output: "video",
};

fn encode(e: &mut Encoding) -> Result<(), Error> {
    e.noise()?;
    let text = e.text("text_encoder", MaskUse::Encoder, Some("encoder_hidden_states"))?;
    let states = text.given.output(&["last_hidden_state"])?;
    let mask = e.stage.cast(text.mask.expect("a masked text has a mask"), DataType::Float);
    let last = e.stage.int64s(&[-1], "axes");
    let mask = e.stage.node(Node::new("Unsqueeze"), &[mask, last], "mask");
    let states = e.stage.node(Node::new("Mul"), &[states, mask], "states");
    e.condition("encoder_hidden_states", states)
}

fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    let latent = d.unscaled(d.sample, (1, 5))?;
    let frames = d.decoded(latent)?;
    let frames = d.stage.transpose(frames, &[0, 2, 1, 3, 4]);
    Ok(d.pixels(frames))
}
