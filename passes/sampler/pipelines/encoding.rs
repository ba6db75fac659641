//! What stands in front of the loop: noise, token ids, and what the text encoders make of them.

use super::{Given, Part, Pipeline, Stage, decoding::DECODER};
use crate::sampler::{Error, Roles, Scale};
use lathe_ir::{DataType, Dim, Model, Node, Tensor, ValueId};

/// What the unconditional pass knows in the place of a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Negative {
    /// There is no unconditional pass.
    None,
    /// Token ids of its own, inputs of the result.
    Ids,
    /// Zeros where the text encoders would give something.
    Zeros,
    /// What the text encoders gave for one text, by the name of the condition.
    Given(Vec<(String, Tensor)>),
}

/// What the noise of the first state and that of later rows are called once they are packed.
pub const PACKED_NOISES: [&str; 2] = ["packed_noise", "packed_step_noise"];

/// What is asked of a pipeline.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What stands for the text in the unconditional pass.
    pub negative: Negative,
    /// How strong embedded guidance is.
    pub guidance: Option<Scale>,
    /// Height and width of the latent, where they are known.
    pub size: Option<[usize; 2]>,
    /// Frames of the latent, where it has any.
    pub frames: Option<usize>,
    /// In how many rows fresh noise is added.
    pub noises: usize,
}

/// What stands in front of the loop, in the making.
pub struct Encoding<'a> {
    /// The model.
    pub stage: Stage<'a>,
    /// What is asked for.
    pub asked: &'a Asked,
    denoiser: &'a Part,
    latent: &'a str,
    frames: Option<usize>,
    noise: Option<ValueId>,
}

/// Makes the model in front of the loop: token ids and noise in; the conditions of the denoiser out, those of the
/// unconditional pass as `NAME_uncond`, and the noise where it is packed.
pub fn encoded(pipeline: &Pipeline, parts: &[Part], roles: &Roles, asked: &Asked) -> Result<Model, Error> {
    let stage = Stage::new("encode", parts);
    let denoiser = stage.part(pipeline.denoiser)?;
    let mut encoding = Encoding { stage, asked, denoiser, latent: &roles.latent, frames: pipeline.frames, noise: None };
    (pipeline.encode)(&mut encoding)?;
    encoding.stage.finish()
}

/// What a mask of the ids of a text is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskUse {
    /// There is none: all ids count.
    None,
    /// The text encoder reads it.
    Encoder,
}

/// What a text encoder gave, and the mask of its ids.
pub struct Text {
    /// What it gave.
    pub given: Given,
    /// Which ids count.
    pub mask: Option<ValueId>,
}

impl<'a> Encoding<'a> {
    /// The part that is the denoiser.
    pub fn denoiser(&self) -> &'a Part {
        self.denoiser
    }

    /// Whether the denoiser takes an input of this name.
    pub fn takes(&self, name: &str) -> bool {
        self.denoiser.input(name).is_some()
    }

    /// Whether the unconditional pass has texts of its own: they run with the others as one batch, and come first.
    fn doubles(&self) -> bool {
        self.asked.negative == Negative::Ids
    }

    /// The noise in the shape of the denoiser's latent, an input of the result that goes to the loop as it is.
    pub fn noise(&mut self) -> Result<ValueId, Error> {
        let latent = self.denoiser.need(self.latent)?;
        let dims = self.denoiser.dims(latent).map(<[Dim]>::to_vec);
        let mut dims = dims.ok_or_else(|| Error::Pipeline(format!("the shape of `{}` is not stated", self.latent)))?;
        if let (Some(axis), Some(frames)) = (self.frames, self.asked.frames)
            && let Some(dim) = dims.get_mut(axis)
        {
            *dim = Dim::Known(frames as i64);
        }
        if let (Some([height, width]), [.., h, w]) = (self.asked.size, dims.as_mut_slice()) {
            (*h, *w) = (Dim::Known(height as i64), Dim::Known(width as i64));
        }
        self.noise_of(dims, &|_, value| value)
    }

    /// Noise of other dimensions than the latent, which `pack` turns into it.
    pub fn noise_of(
        &mut self,
        mut dims: Vec<Dim>,
        pack: &dyn Fn(&mut Stage, ValueId) -> ValueId,
    ) -> Result<ValueId, Error> {
        if let Some(first) = dims.first_mut().filter(|d| d.known().is_none()) {
            *first = Dim::Symbol("batch".to_owned());
        }
        let noise = self.stage.input("noise", DataType::Float, dims.clone());
        let packed = pack(&mut self.stage, noise);
        if packed != noise {
            self.stage.output(PACKED_NOISES[0], packed);
        }
        if self.asked.noises > 0 {
            let count = self.asked.noises as i64;
            let all: Vec<Dim> = std::iter::once(Dim::Known(count)).chain(dims.iter().cloned()).collect();
            let fresh = self.stage.input("step_noise", DataType::Float, all);
            let packed = self.packed_rows(fresh, count, &dims, pack);
            if packed != fresh {
                self.stage.output(PACKED_NOISES[1], packed);
            }
        }
        self.noise = Some(noise);
        Ok(noise)
    }

    /// Packs the noise of several rows as if they were samples.
    fn packed_rows(
        &mut self,
        fresh: ValueId,
        count: i64,
        dims: &[Dim],
        pack: &dyn Fn(&mut Stage, ValueId) -> ValueId,
    ) -> ValueId {
        let Some(sizes) = dims.iter().skip(1).map(Dim::known).collect::<Option<Vec<i64>>>() else { return fresh };
        let flat: Vec<i64> = std::iter::once(-1).chain(sizes).collect();
        let rows = self.stage.reshape(fresh, &flat);
        let packed = pack(&mut self.stage, rows);
        if packed == rows {
            return fresh;
        }
        // A packed latent is tokens by channels.
        let shape = self.stage.node(Node::new("Shape").with("start", 1), &[packed], "packed.sizes");
        let rows = self.stage.int64s(&[count, -1], "rows");
        let shape = self.stage.concat(&[rows, shape], 0, "shape");
        self.stage.node(Node::new("Reshape"), &[packed, shape], "step_noise.packed")
    }

    /// A text: its ids are an input of the result, `input_ids` for `text_encoder` and `input_ids_2` for `text_encoder_2`,
    /// and so are `negative_input_ids` where the unconditional pass has a text of its own. `mask` says whether the encoder
    /// is told which ids count, so that the mask is an input too; otherwise all do.
    ///
    /// `condition` is the input of the denoiser that the text becomes, whose length the ids then have.
    pub fn text(&mut self, name: &str, mask: MaskUse, condition: Option<&str>) -> Result<Text, Error> {
        let part = self.stage.part(name)?;
        let suffix = name.strip_prefix("text_encoder").unwrap_or_default();
        let ids = part.need("input_ids")?;
        let own = part.dims(ids).and_then(|dims| dims.get(1)?.known());
        let taken = condition.and_then(|c| self.denoiser.dims(self.denoiser.input(c)?)?.get(1)?.known());
        if let Some((own, taken)) = own.zip(taken).filter(|(own, taken)| own != taken) {
            let (denoiser, condition) = (&self.denoiser.name, condition.unwrap_or_default());
            return Err(Error::Pipeline(format!(
                "`{name}` takes {own} ids, and `{condition}` of `{denoiser}` is {taken} long"
            )));
        }
        let length = own.or(taken).map_or_else(|| Dim::Symbol(format!("tokens{suffix}")), Dim::Known);
        let fixed = part.dims(ids).and_then(|dims| dims.first()?.known());
        let batch = fixed.map_or_else(|| Dim::Symbol("batch".to_owned()), Dim::Known);
        let dims = vec![batch, length];
        let elem = part.elem(ids).unwrap_or(DataType::Int64);
        let ids = self.texts(&format!("input_ids{suffix}"), elem, &dims);
        let mask =
            (mask == MaskUse::Encoder).then(|| self.texts(&format!("attention_mask{suffix}"), DataType::Int64, &dims));
        let mut given = vec![("input_ids", ids)];
        if part.input("attention_mask").is_some() {
            let mask = match mask {
                Some(mask) => mask,
                None => {
                    let like = self.stage.cast(ids, DataType::Int64);
                    self.stage.filled(like, 1.0)?
                }
            };
            given.push(("attention_mask", mask));
        }
        let given = match fixed {
            Some(_) if self.doubles() => self.one_by_one(name, &given)?,
            _ => self.stage.run(name, &given)?,
        };
        Ok(Text { given, mask })
    }

    /// An input, and where the unconditional pass has texts of its own both, as one batch.
    fn texts(&mut self, name: &str, elem: DataType, dims: &[Dim]) -> ValueId {
        let value = self.stage.input(name, elem, dims.to_vec());
        if !self.doubles() {
            return value;
        }
        let negative = self.stage.input(&format!("negative_{name}"), elem, dims.to_vec());
        self.stage.concat(&[negative, value], 0, "texts")
    }

    /// Runs an encoder whose batch is fixed once for each half.
    fn one_by_one(&mut self, name: &str, given: &[(&str, ValueId)]) -> Result<Given, Error> {
        let mut halves = Vec::new();
        let split: Vec<(&str, [ValueId; 2])> =
            given.iter().map(|&(input, value)| (input, self.stage.halves(value, input))).collect();
        for half in 0..2 {
            let given: Vec<(&str, ValueId)> = split.iter().map(|(input, values)| (*input, values[half])).collect();
            halves.push(self.stage.run(name, &given)?);
        }
        let [first, second] = [halves.remove(0), halves.remove(0)];
        Ok(first.joined(&second, |a, b| self.stage.concat(&[a, b], 0, "texts")))
    }

    /// Makes what texts became a condition of the denoiser, in both passes.
    pub fn condition(&mut self, name: &str, value: ValueId) -> Result<(), Error> {
        self.denoiser.need(name)?;
        match &self.asked.negative {
            Negative::None => self.stage.output(name, value),
            Negative::Ids => {
                let [uncond, cond] = self.stage.halves(value, name);
                self.stage.output(name, cond);
                self.stage.output(&format!("{name}_uncond"), uncond);
            }
            Negative::Zeros => {
                let zeros = self.stage.filled(value, 0.0)?;
                self.stage.output(name, value);
                self.stage.output(&format!("{name}_uncond"), zeros);
            }
            Negative::Given(known) => {
                let found = known.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.clone());
                let one = found.and_then(|tensor| tensor.reshaped(tensor.dims().get(1..)?.to_vec()).ok());
                let one = one.ok_or_else(|| Error::Pipeline(format!("the negative text gives no `{name}`")))?;
                let uncond = self.stage.per_sample(one, value, name);
                self.stage.output(name, value);
                self.stage.output(&format!("{name}_uncond"), uncond);
            }
        }
        Ok(())
    }

    /// Makes which ids count a condition of the denoiser, in both passes. Zeros in the place of a text are as long as it.
    pub fn mask(&mut self, name: &str, mask: ValueId) -> Result<(), Error> {
        if self.asked.negative != Negative::Zeros {
            return self.condition(name, mask);
        }
        self.denoiser.need(name)?;
        self.stage.output(name, mask);
        self.stage.output(&format!("{name}_uncond"), mask);
        Ok(())
    }

    /// Makes a value a condition that is the same in both passes.
    pub fn same(&mut self, name: &str, value: ValueId) -> Result<(), Error> {
        self.denoiser.need(name)?;
        self.stage.output(name, value);
        Ok(())
    }

    /// Makes a row of numbers a condition of every sample.
    pub fn constant(&mut self, name: &str, row: &[f32]) -> Result<(), Error> {
        let noise = self.noise.expect("the noise comes first");
        let row = self.stage.per_sample(Tensor::from_f32s(&[row.len()], row), noise, name);
        self.same(name, row)
    }

    /// Height and width of the latent, which have to be known.
    pub fn size(&self) -> Result<[usize; 2], Error> {
        self.asked
            .size
            .ok_or_else(|| Error::Pipeline("the size of the latent is not known, --size HxW says it".to_owned()))
    }

    /// Height and width in pixels, as floats in a list.
    pub fn pixels(&mut self) -> ValueId {
        let noise = self.noise.expect("the noise comes first");
        let factor = self.stage.part(DECODER).map_or(8, |vae| vae.config.spatial_factor()) as f64;
        let sides = self.stage.node(Node::new("Shape").with("start", -2), &[noise], "sides");
        self.stage.retype(sides, DataType::Int64);
        let sides = self.stage.cast(sides, DataType::Float);
        self.stage.affine(sides, &[factor], &[0.0], (0, 1))
    }

    /// Makes a list of numbers a condition, the same for every sample.
    pub fn row(&mut self, name: &str, row: ValueId, length: i64) -> Result<(), Error> {
        let noise = self.noise.expect("the noise comes first");
        let batch = self.stage.batch(noise);
        let length = self.stage.int64s(&[length], "length");
        let shape = self.stage.concat(&[batch, length], 0, "shape");
        let rows = self.stage.node(Node::new("Expand"), &[row, shape], name);
        self.same(name, rows)
    }

    /// The scale of guidance, which has to be a number.
    pub fn scale(&self, name: &str) -> Result<f64, Error> {
        match self.asked.guidance {
            Some(Scale::Constant(scale)) => Ok(scale),
            Some(Scale::Input) => {
                let message = format!("`{name}` is made of the scale of guidance, which has to be a number then");
                Err(Error::Roles(message))
            }
            None => Err(self.unguided(name)),
        }
    }

    fn unguided(&self, name: &str) -> Error {
        let denoiser = &self.denoiser.name;
        Error::Roles(format!("`{denoiser}` is told the scale of guidance as `{name}`; --guidance says it"))
    }

    /// Makes the scale of embedded guidance a condition, a number for each sample.
    pub fn embedded_guidance(&mut self, name: &str) -> Result<(), Error> {
        let noise = self.noise.expect("the noise comes first");
        let value = match self.asked.guidance {
            Some(Scale::Constant(scale)) => {
                let scale = Tensor::from_f32s(&[], &[scale as f32]);
                self.stage.per_sample(scale, noise, name)
            }
            Some(Scale::Input) => {
                let scale = self.stage.input("guidance_scale", DataType::Float, Vec::new());
                let batch = self.stage.batch(noise);
                self.stage.node(Node::new("Expand"), &[scale, batch], name)
            }
            None => return Err(self.unguided(name)),
        };
        self.same(name, value)
    }
}
