//! What a model hands back: tensors, and what ONNX builds from them.

use lathe_ir::Tensor;

/// Named tensors: the inputs of one run, or its outputs where all of them are tensors.
pub type Sample = Vec<(String, Tensor)>;

/// One value at run time.
#[derive(Debug, Clone, PartialEq)]
pub enum Datum {
    /// A tensor.
    Tensor(Tensor),
    /// A sequence; its members may be tensors or maps.
    Sequence(Vec<Datum>),
    /// A map: its keys and, in the same order, its values, both with one axis.
    Map {
        /// Integers or strings, sorted.
        keys: Tensor,
        /// One value per key.
        values: Tensor,
    },
    /// An optional value that is absent.
    None,
}

impl Datum {
    /// The tensor, if this is one.
    pub fn tensor(&self) -> Option<&Tensor> {
        match self {
            Datum::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// What it is, for messages: `float[2, 3]`, `a sequence of 3`.
    pub fn describe(&self) -> String {
        match self {
            Datum::Tensor(tensor) => format!("{}{:?}", tensor.dtype(), tensor.dims()),
            Datum::Sequence(members) => format!("a sequence of {}", members.len()),
            Datum::Map { keys, .. } => format!("a map of {}", keys.len()),
            Datum::None => "nothing".to_owned(),
        }
    }
}

impl From<Tensor> for Datum {
    fn from(tensor: Tensor) -> Datum {
        Datum::Tensor(tensor)
    }
}

/// An output that is no tensor, where only tensors can be handed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("output `{output}` is {found}, not a tensor")]
pub(crate) struct NotATensor {
    output: String,
    found: String,
}

/// The outputs as named tensors, if all of them are tensors.
pub(crate) fn only_tensors(outputs: Vec<(String, Datum)>) -> Result<Sample, NotATensor> {
    let tensor = |(output, datum): (String, Datum)| match datum {
        Datum::Tensor(tensor) => Ok((output, tensor)),
        other => Err(NotATensor { output, found: other.describe() }),
    };
    outputs.into_iter().map(tensor).collect()
}
