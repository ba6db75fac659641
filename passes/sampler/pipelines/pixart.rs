//! PixArt: T5 with its mask; the second half of what the denoiser gives is a variance.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline};
use crate::sampler::Error;
use lathe_ir::{Node, ValueId};

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["PixArtAlphaPipeline", "PixArtSigmaPipeline"],
    summary: "images of T5 with its mask",
    denoiser: "transformer",
    encoders: &["text_encoder"],
    roles: &["uncond:encoder_hidden_states=input", "uncond:encoder_attention_mask=input"],
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
    let text = e.text("text_encoder", MaskUse::Encoder, Some("encoder_hidden_states"))?;
    e.condition("encoder_hidden_states", text.given.output(&["last_hidden_state"])?)?;
    e.mask("encoder_attention_mask", text.mask.expect("a masked text has a mask"))?;
    if e.takes("resolution") {
        let size = e.pixels();
        let [height, width] = e.stage.halves(size, "side");
        e.row("resolution", size, 2)?;
        let ratio = e.stage.node(Node::new("Div"), &[height, width], "ratio");
        e.row("aspect_ratio", ratio, 1)?;
    }
    Ok(())
}

fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    d.image(d.sample)
}
