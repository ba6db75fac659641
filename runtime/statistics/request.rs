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
}

impl Request {
    /// The values it reads.
    pub fn rows(&self) -> Vec<&Rows> {
        match self {
            Request::Gram(x) | Request::Columns(x) => vec![x],
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
        };
        let rows: Vec<String> = self.rows().into_iter().map(Rows::label).collect();
        format!("{kind}:{}", rows.join(":"))
    }
}
