//! What a model does on a calibration set, without knowing who ran it.

use crate::{EvaluateError, Rows};
use lathe_ir::Model;

/// A symmetric matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct SymMatrix {
    size: usize,
    upper: Vec<f64>,
}

impl SymMatrix {
    /// Of the upper triangle with the diagonal, row by row; `None` unless that is `size · (size + 1) / 2` numbers.
    pub fn from_upper(size: usize, upper: Vec<f64>) -> Option<SymMatrix> {
        let expected = size.checked_mul(size.checked_add(1)?)? / 2;
        (upper.len() == expected).then_some(SymMatrix { size, upper })
    }

    /// Rows, and columns.
    pub fn size(&self) -> usize {
        self.size
    }

    /// One element. Panics outside of the matrix.
    pub fn get(&self, row: usize, column: usize) -> f64 {
        assert!(row < self.size && column < self.size, "outside of the matrix");
        let (row, column) = (row.min(column), row.max(column));
        self.upper[row * self.size - row * (row + 1) / 2 + column]
    }

    /// The upper triangle with the diagonal, row by row: `size · (size + 1) / 2` numbers.
    pub fn upper(&self) -> &[f64] {
        &self.upper
    }

    /// Multiplies every element.
    pub fn scale(&mut self, factor: f64) {
        self.upper.iter_mut().for_each(|x| *x *= factor);
    }

    /// All elements, row by row.
    pub fn to_full(&self) -> Vec<f64> {
        let all = (0..self.size).flat_map(|row| (0..self.size).map(move |column| (row, column)));
        all.map(|(row, column)| self.get(row, column)).collect()
    }
}

/// Second moments of what a layer reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    /// `XᵀX / rows`, `[k, k]`.
    pub matrix: SymMatrix,
    /// The mean row, `[k]`.
    pub mean: Vec<f64>,
    /// Rows that count.
    pub rows: u64,
}

/// Means over the rows of a value, per feature.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Of the squares, `[k]`.
    pub square: Vec<f64>,
    /// The largest magnitude of any number of the rows; `None` if it was not watched.
    pub largest: Option<f64>,
    /// Rows that count.
    pub rows: u64,
}

/// How two values of one run go together.
#[derive(Debug, Clone, PartialEq)]
pub struct Cross {
    /// `XᵀY / rows`, `[k, m]`, row by row.
    pub matrix: Vec<f64>,
    /// The mean row of the first, `[k]`.
    pub x_mean: Vec<f64>,
    /// The mean row of the second, `[m]`.
    pub y_mean: Vec<f64>,
    /// Mean squares of the first, `[k]`.
    pub x_square: Vec<f64>,
    /// Mean squares of the second, `[m]`.
    pub y_square: Vec<f64>,
    /// Rows that count.
    pub rows: u64,
}

/// Statistics of the model that is being compressed, over its calibration set.
pub trait Calibrate {
    /// Second moments of a value of the original model; `None` if they were not collected.
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError>;

    /// Mean squares of a value of the original model; `None` if they were not collected.
    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError>;

    /// The mean cosine between rows of two values of the model that is being compressed, of one shape each, for every
    /// pair, over the calibration samples that trials do not run on.
    fn cosines(&self, pairs: &[(Rows, Rows)]) -> Result<Vec<f64>, EvaluateError>;

    /// Second moments between values of `model`, the one that is being compressed or a variant of it without gates, over
    /// the calibration samples that trials do not run on.
    fn cross(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError>;

    /// How far the outputs of `variant` are from those of the model that is being compressed, once for every assignment
    /// of its gates: inputs that it has more, each one number of float32. Without any, one empty assignment runs it once.
    ///
    /// The mean over some calibration samples, in the unit of sensitivity times squared error; infinite where outputs
    /// are not finite.
    fn trials(&self, variant: &Model, gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError>;
}
