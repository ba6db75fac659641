//! What stands behind the loop: the decoder, and what it is given.

use super::{Part, Pipeline, Stage};
use crate::sampler::Error;
use lathe_ir::{DataType, Dim, Model, Node, Tensor, ValueId};

/// The folder of the decoder.
pub const DECODER: &str = "vae_decoder";

/// What stands behind the loop, in the making.
pub struct Decoding<'a> {
    /// The model.
    pub stage: Stage<'a>,
    /// The sample of the loop.
    pub sample: ValueId,
    /// Height and width of the latent, where they are known.
    pub size: Option<[usize; 2]>,
    /// The decoder.
    pub vae: &'a Part,
}

/// Makes the model behind the loop: the sample in, pixels from 0 to 1 out.
pub fn decoded(
    pipeline: &Pipeline,
    parts: &[Part],
    sample: Vec<Dim>,
    size: Option<[usize; 2]>,
) -> Result<Model, Error> {
    let mut stage = Stage::new("decode", parts);
    let vae = stage.part(DECODER)?;
    let sample = stage.input("sample", DataType::Float, sample);
    let mut decoding = Decoding { stage, sample, size, vae };
    let pixels = (pipeline.decode)(&mut decoding)?;
    decoding.stage.output(pipeline.output, pixels);
    decoding.stage.finish()
}

impl Decoding<'_> {
    /// The latent as the decoder knows it: divided by the scaling factor, or spread by mean and deviation of each channel
    /// where the configuration has those, and shifted where it says so. `layout` is the axis of channels and how many axes
    /// there are.
    pub fn unscaled(&mut self, latent: ValueId, layout: (usize, usize)) -> Result<ValueId, Error> {
        let config = &self.vae.config;
        let (factors, offsets) = match (config.numbers("latents_mean"), config.numbers("latents_std")) {
            (Some(mean), Some(std)) => {
                let factor = config.number("scaling_factor").unwrap_or(1.0);
                (std.iter().map(|s| s / factor).collect(), mean)
            }
            _ => (vec![1.0 / config.required("scaling_factor")?], vec![config.number("shift_factor").unwrap_or(0.0)]),
        };
        Ok(self.stage.affine(latent, &factors, &offsets, layout))
    }

    /// What the decoder makes of a latent.
    pub fn decoded(&mut self, latent: ValueId) -> Result<ValueId, Error> {
        let mut inputs = self.vae.inputs().map(|v| self.vae.model.graph.value(v).name.clone());
        let first = inputs.next().ok_or_else(|| Error::Pipeline(format!("`{DECODER}` has no input")))?;
        if let Some(other) = inputs.next() {
            let message =
                format!("`{DECODER}` takes `{other}` besides `{first}`, and only decoders of one input are built");
            return Err(Error::Pipeline(message));
        }
        self.stage.fits(latent, DECODER, &first)?;
        self.stage.run(DECODER, &[(&first, latent)])?.first()
    }

    /// Pixels from -1 to 1 as pixels from 0 to 1.
    pub fn pixels(&mut self, decoded: ValueId) -> ValueId {
        let halved = self.stage.affine(decoded, &[0.5], &[0.5], (0, 0));
        let [low, high] = [0.0, 1.0].map(|n| self.stage.constant(Tensor::from_f32s(&[], &[n]), "bound"));
        self.stage.node(Node::new("Clip"), &[halved, low, high], "pixels")
    }

    /// All that most pipelines of images do.
    pub fn image(&mut self, latent: ValueId) -> Result<ValueId, Error> {
        let latent = self.unscaled(latent, (1, 4))?;
        let decoded = self.decoded(latent)?;
        Ok(self.pixels(decoded))
    }
}
