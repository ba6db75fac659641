//! FLUX: T5, the pooled state of CLIP, patches of the latent with their places, and embedded guidance.

use super::{Decoding, Empty, Encoding, Guided, MaskUse, Pipeline, Stage};
use crate::sampler::Error;
use lathe_ir::{DataType, Dim, Node, Tensor, ValueId};

pub(super) static PIPELINE: Pipeline = Pipeline {
    classes: &["FluxPipeline"],
    summary: "images of T5 and the pooled state of CLIP",
    denoiser: "transformer",
    encoders: &["text_encoder", "text_encoder_2"],
    roles: &["latent=hidden_states", "time=timestep", "time-scale=0.001"],
    refused: &[],
    guided: Guided::Embedded,
    empty: Empty::Text,
    explicit_sigmas: true,
    patch: Some(2),
    side: 128,
    channels: 1,
    frames: None,
    packed: true,
    encode,
    decode,
    output: "image",
};

fn encode(e: &mut Encoding) -> Result<(), Error> {
    let [height, width] = e.size()?;
    let latent = e.denoiser().need("hidden_states")?;
    let packed = e.denoiser().dims(latent).and_then(|dims| dims.last()?.known());
    let packed = packed.or(e.denoiser().config.count("in_channels").map(|c| c as i64)).filter(|c| c % 4 == 0);
    let channels = packed.ok_or_else(|| {
        Error::Pipeline("`transformer` says neither by its input nor by `in_channels` how wide a patch is".to_owned())
    })? / 4;
    let dims = vec![Dim::Unknown, Dim::Known(channels), Dim::Known(height as i64), Dim::Known(width as i64)];
    e.noise_of(dims, &move |stage, noise| pack(stage, noise, channels, [height as i64, width as i64]))?;
    let pooled = e.text("text_encoder", MaskUse::None, None)?.given.output(&["pooler_output"])?;
    let states =
        e.text("text_encoder_2", MaskUse::None, Some("encoder_hidden_states"))?.given.output(&["last_hidden_state"])?;
    e.condition("pooled_projections", pooled)?;
    e.condition("encoder_hidden_states", states)?;
    let (rows, columns) = (height / 2, width / 2);
    let places = (0..rows * columns).flat_map(|k| [0.0, (k / columns) as f32, (k % columns) as f32]);
    let places: Vec<f32> = places.collect();
    let places = e.stage.constant(Tensor::from_f32s(&[rows * columns, 3], &places), "img_ids");
    e.same("img_ids", places)?;
    let ids = no_places(e, states);
    e.same("txt_ids", ids)?;
    if e.takes("guidance") {
        e.embedded_guidance("guidance")?;
    }
    Ok(())
}

/// Zeros, three for every token of a text.
fn no_places(e: &mut Encoding, states: ValueId) -> ValueId {
    let length = e.stage.node(Node::new("Shape").with("start", 1).with("end", 2), &[states], "length");
    let three = e.stage.int64s(&[3], "axes");
    let shape = e.stage.concat(&[length, three], 0, "shape");
    let zero = e.stage.constant(Tensor::from_f64s(DataType::Float, &[], &[0.0]).expect("zero is a float"), "zero");
    e.stage.node(Node::new("Expand"), &[zero, shape], "txt_ids")
}

/// Patches of 2 by 2, `[n, h/2 * w/2, 4c]`.
pub(super) fn pack(stage: &mut Stage, latent: ValueId, channels: i64, [height, width]: [i64; 2]) -> ValueId {
    let patches = stage.reshape(latent, &[-1, channels, height / 2, 2, width / 2, 2]);
    let patches = stage.transpose(patches, &[0, 2, 4, 1, 3, 5]);
    stage.reshape(patches, &[-1, height / 2 * (width / 2), channels * 4])
}

/// The latent of patches.
pub(super) fn unpack(stage: &mut Stage, patches: ValueId, channels: i64, [height, width]: [i64; 2]) -> ValueId {
    let latent = stage.reshape(patches, &[-1, height / 2, width / 2, channels, 2, 2]);
    let latent = stage.transpose(latent, &[0, 3, 1, 4, 2, 5]);
    stage.reshape(latent, &[-1, channels, height, width])
}

fn decode(d: &mut Decoding) -> Result<ValueId, Error> {
    let [height, width] = d.size.ok_or_else(|| Error::Pipeline("the size of the latent is not known".to_owned()))?;
    let channels = d.vae.config.required("latent_channels")? as i64;
    let latent = unpack(&mut d.stage, d.sample, channels, [height as i64, width as i64]);
    d.image(latent)
}
