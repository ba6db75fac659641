//! Half precision in the file: which nodes compute in 16-bit floats, and the casts between them and the others.
//!
//! [`Prepared::new`] puts a model in the form that is converted, [`watch`] makes the model that tells how large its values
//! get, [`convert`] decides and rewrites, [`check_types`] proves the types of the result, and [`simulate`] makes a float32
//! model that rounds wherever the result does, which any provider runs.

mod borders;
mod check;
mod choices;
mod constants;
mod cut;
mod decisions;
mod magnitudes;
mod masks;
mod ports;
mod quantized;
mod rewrite;
mod simulate;
mod sums;
mod survey;
#[cfg(test)]
mod tests;
mod watch;
mod whole_numbers;

pub use check::{TypeFault, check_types};
pub use choices::Choices;
pub use magnitudes::{Magnitude, Magnitudes};
pub use masks::Prepared;
pub use quantized::reads_codes;
pub use rewrite::{Converted, by_reason};
pub use simulate::{Simulation, simulate, simulate_some, watch_errors};
pub use survey::Kept;
pub use watch::{Watched, watch};

use crate::{Error, Info, Kind, Saving};
use lathe_ir::{DataType, NodeId};
use std::{collections::BTreeMap, fmt};

/// How reports call the conversion.
pub static INFO: Info = Info {
    name: "half-precision",
    summary: "compute in 16-bit floats wherever that is allowed",
    doc: "Converts every node whose operator set allows it to float16 or bfloat16, with casts at the borders of maximal \
          regions (a minimum cut). Choices and coordinates, whole numbers carried in floats, long sums, subgraphs, \
          what stands between QuantizeLinear and DequantizeLinear and what comes near the end of float16's range stay in \
          float32.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters],
    source: Some("IEEE 754 binary16; bfloat16"),
};

/// What to convert to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// float16 or bfloat16.
    pub dtype: DataType,
    /// Whether inputs and outputs of the model change too.
    pub interface: bool,
}

impl Precision {
    /// Float16 or bfloat16 by the name that the command line gives them: `float16:io`.
    pub fn parse(text: &str) -> Option<Precision> {
        let (name, interface) = match text.split_once(':') {
            Some((name, "io")) => (name, true),
            Some(_) => return None,
            None => (text, false),
        };
        let dtype = [DataType::Float16, DataType::Bfloat16].into_iter().find(|dtype| dtype.name() == name)?;
        Some(Precision { dtype, interface })
    }

    /// The largest finite number.
    fn largest(self) -> f64 {
        match self.dtype {
            DataType::Float16 => 65504.0,
            _ => f64::from(f32::from_bits(0x7F7F_0000)),
        }
    }

    /// The smallest number that keeps all its digits.
    fn smallest_normal(self) -> f64 {
        match self.dtype {
            DataType::Float16 => 1.0 / f64::from(1 << 14),
            _ => f64::from(f32::MIN_POSITIVE),
        }
    }

    /// The largest magnitude that values may reach: samples that were not seen may reach further than those that were.
    fn limit(self) -> f64 {
        self.largest() / 8.0
    }

    /// The relative L2 error that a result may have unless told.
    pub fn tolerance(self) -> f64 {
        match self.dtype {
            DataType::Float16 => 2e-3,
            _ => 2e-2,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, if self.interface { ":io" } else { "" })
    }
}

/// Converts a prepared model. Nodes of `kept` stay in float32 for the reason given, besides those that rules keep.
pub fn convert(
    prepared: &Prepared,
    precision: Precision,
    magnitudes: &Magnitudes,
    kept: &BTreeMap<NodeId, String>,
) -> Result<Converted, Error> {
    let mut survey = survey::Survey::new(prepared, precision, magnitudes);
    kept.iter().for_each(|(&node, reason)| survey.keep(node, reason.clone()));
    quantized::keep(&mut survey);
    decisions::keep(&mut survey);
    whole_numbers::keep(&mut survey);
    constants::keep(&mut survey);
    sums::keep(&mut survey);
    magnitudes::keep(&mut survey);
    quantized::tie(&mut survey);
    let halves = borders::choose(&mut survey);
    rewrite::rewrite(survey, &halves)
}
