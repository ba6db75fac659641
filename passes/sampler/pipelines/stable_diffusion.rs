//! Stable Diffusion 1 and 2: one CLIP text encoder.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline};
use crate::sampler::Error;
use lathe_ir::ValueId;

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["StableDiffusionPipeline", "LatentConsistencyModelPipeline"],
    summary: "images of one CLIP text encoder",
    denoiser: "unet",
    encoders: &["text_encoder"],
    roles: &["uncond:encoder_hidden_states=input"],
    refused: &[],
    guided: Guided::Passes,
    empty: Empty::Text,
    explicit_sigmas: false,
    patch: None,
    side: 64,
    channels: 1,
    frames: None,
    packed: false,
    encode,
    decode,
    output: "image",
};

fn encode(e: &mut Encoding) -> Result<(), Error> {
    e.noise()?;
    let text = e.text("text_encoder", MaskUse::None, Some("encoder_hidden_states"))?;
    e.condition("encoder_hidden_states", text.given.output(&["last_hidden_state"])?)?;
    if e.takes("timestep_cond") {
        let width = e.denoiser().config.count("time_cond_proj_dim").unwrap_or(256);
        let row = guidance_embedding(e.scale("timestep_cond")?, width);
        e.constant("timestep_cond", &row)?;
    }
    Ok(())
}

fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    d.image(d.sample)
}

/// What a latent consistency model is told of the scale of guidance: sines, then cosines of (scale - 1) * 1000.
pub(super) fn guidance_embedding(scale: f64, width: usize) -> Vec<f32> {
    let half = width / 2;
    let angle = |k: usize| (scale - 1.0) * 1000.0 * (-(10000f64.ln()) * k as f64 / (half as f64 - 1.0).max(1.0)).exp();
    let sines = (0..half).map(|k| angle(k).sin() as f32);
    let mut row: Vec<f32> = sines.chain((0..half).map(|k| angle(k).cos() as f32)).collect();
    row.resize(width, 0.0);
    row
}
