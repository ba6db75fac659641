//! A part of a pipeline: a model and what its configuration says.

use crate::sampler::Error;
use lathe_ir::{DataType, Dim, Model, Type, ValueId};
use serde_json::{Map, Value};

/// A part of a pipeline.
#[derive(Debug, Clone)]
pub struct Part {
    /// The folder it came from: `text_encoder`.
    pub name: String,
    /// The model, of the operator set that all parts are in.
    pub model: Model,
    /// Its `config.json`.
    pub config: Config,
}

impl Part {
    /// The inputs that must be given.
    pub fn inputs(&self) -> impl Iterator<Item = ValueId> + '_ {
        let graph = &self.model.graph;
        graph.main().inputs().iter().copied().filter(|&v| graph.value(v).initializer().is_none())
    }

    /// The input of this name.
    pub fn input(&self, name: &str) -> Option<ValueId> {
        self.inputs().find(|&v| self.model.graph.value(v).name == name)
    }

    /// The input of this name, of which something has to be known.
    pub fn need(&self, name: &str) -> Result<ValueId, Error> {
        self.input(name).ok_or_else(|| {
            let names: Vec<&str> = self.inputs().map(|v| self.model.graph.value(v).name.as_str()).collect();
            Error::Pipeline(format!("`{}` has no input `{name}`, it has `{}`", self.name, names.join("`, `")))
        })
    }

    /// The element type of an input or output.
    pub fn elem(&self, value: ValueId) -> Option<DataType> {
        self.model.graph.value(value).ty.as_ref().and_then(Type::elem)
    }

    /// The sizes of an input or output, as far as the file states them.
    pub fn dims(&self, value: ValueId) -> Option<&[Dim]> {
        self.model.graph.value(value).ty.as_ref().and_then(Type::shape).map(|shape| shape.dims.as_slice())
    }
}

/// What the `config.json` of a part says.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The folder of the part.
    part: String,
    fields: Map<String, Value>,
}

impl Config {
    /// What the fields of the configuration of a part say.
    pub fn new(part: &str, fields: Map<String, Value>) -> Config {
        Config { part: part.to_owned(), fields }
    }

    /// A number, if it says it.
    pub fn number(&self, field: &str) -> Option<f64> {
        self.fields.get(field).and_then(Value::as_f64)
    }

    /// A number that it has to say.
    pub fn required(&self, field: &str) -> Result<f64, Error> {
        self.number(field).ok_or_else(|| {
            let part = &self.part;
            Error::Pipeline(format!("`{part}/config.json` does not say `{field}`, which cannot be guessed"))
        })
    }

    /// A whole number, if it says it.
    pub fn count(&self, field: &str) -> Option<usize> {
        self.fields.get(field).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok())
    }

    /// Numbers, if it says them.
    pub fn numbers(&self, field: &str) -> Option<Vec<f64>> {
        self.fields.get(field)?.as_array()?.iter().map(Value::as_f64).collect()
    }

    /// Height and width of a latent that it says the model is for: `sample_size`, or `sample_height` and `sample_width`.
    pub fn sample_size(&self) -> Option<[usize; 2]> {
        let list = self.numbers("sample_size").filter(|sizes| sizes.len() == 2);
        let list = list.map(|sizes| [sizes[0] as usize, sizes[1] as usize]);
        let one = self.count("sample_size").map(|side| [side; 2]);
        list.or(one).or(self.count("sample_height").zip(self.count("sample_width")).map(|(h, w)| [h, w]))
    }

    /// How many pixels along a side are one number of the latent of an autoencoder.
    pub fn spatial_factor(&self) -> usize {
        let blocks = || self.fields.get("block_out_channels").and_then(Value::as_array).map(Vec::len);
        self.count("scale_factor_spatial").or_else(|| Some(1 << blocks()?.checked_sub(1)?.min(16))).unwrap_or(8)
    }

    /// How many frames after the first are one frame of the latent of an autoencoder.
    pub fn temporal_factor(&self) -> usize {
        let named =
            ["temporal_compression_ratio", "scale_factor_temporal"].into_iter().find_map(|name| self.count(name));
        named.unwrap_or(4).max(1)
    }
}
