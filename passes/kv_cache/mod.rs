//! Key-value caches of whole numbers: keys and values of earlier positions that a decoder is given and returns as int8 or int4.
//!
//! [`Caches::find`] names the caches of `GroupQueryAttention` that can change, [`Watched`] makes models that tell how large
//! their numbers get, from which [`Scales`] follow, [`quantize`] rewrites the model, and [`with_float_caches`] makes a model of
//! the result that has the inputs and outputs of the original, so that both can be run on the same samples.

mod find;
mod float_caches;
mod quantize;
mod scales;
#[cfg(test)]
mod tests;

pub use find::{CacheNode, Caches};
pub use float_caches::with_float_caches;
pub use quantize::{ChangedPort, Quantized, quantize};
pub use scales::{CLIPS, Scales, Watched};

use crate::{Info, Kind};
use lathe_ir::DataType;
use std::fmt;

/// How reports call it.
pub static INFO: Info = Info {
    name: "kv-cache",
    summary: "keep keys and values of earlier positions as int8 or int4",
    doc: "The caches of GroupQueryAttention become int8, or two int4 to a byte, with symmetric scales per channel or per \
          tensor from a calibration set: inputs and outputs of the model change their type. New rows are rounded when they \
          are written, and attention reads what was rounded.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[],
    source: None,
};

/// In what numbers a cache is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheType {
    /// 8 or 4.
    pub bits: u8,
    /// Whether every channel of every head has a scale of its own.
    pub by_channel: bool,
}

impl CacheType {
    /// By the name that the command line gives it: `int8`, `int4`, and `int8:tensor` or `int4:tensor` for one scale.
    pub fn parse(text: &str) -> Option<CacheType> {
        let (name, by_channel) = match text.split_once(':') {
            Some((name, "tensor")) => (name, false),
            Some(_) => return None,
            None => (text, true),
        };
        let bits = match name {
            "int8" => 8,
            "int4" => 4,
            _ => return None,
        };
        Some(CacheType { bits, by_channel })
    }

    /// `int8` or `int4`.
    pub fn name(self) -> &'static str {
        if self.bits == 8 { "int8" } else { "int4" }
    }

    /// The element type of inputs and outputs: two codes of 4 bits share a byte.
    pub fn elem(self) -> DataType {
        if self.bits == 8 { DataType::Int8 } else { DataType::Uint8 }
    }

    /// Numbers in one element.
    pub fn packed(self) -> i64 {
        if self.bits == 8 { 1 } else { 2 }
    }

    /// The largest code; the lowest is one further from 0.
    fn largest(self) -> f64 {
        if self.bits == 8 { 127.0 } else { 7.0 }
    }

    /// The relative L2 error that outputs may have unless told.
    pub fn tolerance(self) -> f64 {
        if self.bits == 8 { 5e-2 } else { 5e-1 }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.name(), if self.by_channel { "" } else { ":tensor" })
    }
}
