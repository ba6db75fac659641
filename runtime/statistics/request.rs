//! What can be asked for: statistics of the rows of values in the main graph.

use lathe_analysis::Rows;
use serde::{Deserialize, Serialize};

/// One statistic. Sums run over the rows that are kept: neither padded nor holding a NaN or an infinity.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Request {
    /// `gram` = XᵀX `[k, k]` and `sum` `[k]`.
    Gram(Rows),
    /// `sum`, `abs_sum`, `square_sum` and `max_abs` of every feature, `[k]` each.
    Columns(Rows),
    /// `cross` = XᵀY `[k, m]`, `x_sum`, `x_square_sum` `[k]`, `y_sum`, `y_square_sum` `[m]`, over rows kept in both.
    Cross(Rows, Rows),
    /// Sums over row pairs of two values of one shape: `cosine_sum` (0 where a row is all zero), `dot_sum`,
    /// `x_norm_sum`, `y_norm_sum`, `x_square_sum`, `y_square_sum` and `difference_square_sum`, one number each.
    Cosine(Rows, Rows),
    /// `below` and `square_below`, both `[steps, k]`: how many numbers of every feature are smaller in size than each of
    /// [`Magnitudes::steps`](lathe_analysis::Magnitudes::steps), and the sums of their squares; `square_sum` `[k]`.
    Magnitudes(Rows),
    /// `least` and `largest` of every feature, `[k]` each; infinite where no row counts.
    Range(Rows),
    /// How all numbers are spread: `spread`, counts, sums and sums of squares of the bins of a
    /// [`Spread`](lathe_analysis::Spread) one after the other, and `least` and `largest` of every feature.
    Spread(Rows),
    /// What a layer's product loses where small inputs are left out: `skipped` and `lost_square_sum`, one for each cut, and
    /// `output_square_sum`.
    Skip(Skip),
}

/// A layer, and which of its inputs are left out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Skip {
    /// What the layer reads.
    pub rows: Rows,
    /// The name of its weight, an initializer.
    pub weight: String,
    /// Whether the products sum over the weight's first axis; over all others if not.
    pub first_axis: bool,
    /// Ways to leave out inputs.
    pub cuts: Vec<Cut>,
}

/// Leaves out inputs below a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cut {
    /// Whether an input counts by its size times the norm of the weights that it is multiplied with, or by its size.
    pub weighed: bool,
    /// The bits of the threshold in float32.
    bits: u32,
}

impl Cut {
    /// Inputs below `threshold`.
    pub fn new(threshold: f32, weighed: bool) -> Cut {
        Cut { weighed, bits: threshold.to_bits() }
    }

    /// The threshold.
    pub fn threshold(self) -> f32 {
        f32::from_bits(self.bits)
    }
}

impl Request {
    /// The values it reads.
    pub fn rows(&self) -> Vec<&Rows> {
        match self {
            Request::Gram(x)
            | Request::Columns(x)
            | Request::Magnitudes(x)
            | Request::Range(x)
            | Request::Spread(x) => vec![x],
            Request::Skip(skip) => vec![&skip.rows],
            Request::Cross(x, y) | Request::Cosine(x, y) => vec![x, y],
        }
    }

    /// How messages and result files name it: `gram:x`.
    pub fn label(&self) -> String {
        let kind = match self {
            Request::Gram(_) => "gram",
            Request::Columns(_) => "columns",
            Request::Cross(..) => "cross",
            Request::Cosine(..) => "cosine",
            Request::Magnitudes(_) => "magnitudes",
            Request::Range(_) => "range",
            Request::Spread(_) => "spread",
            Request::Skip(_) => "skip",
        };
        let rows: Vec<String> = self.rows().into_iter().map(Rows::label).collect();
        format!("{kind}:{}", rows.join(":"))
    }
}
