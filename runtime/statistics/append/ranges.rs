//! Statistics of how large numbers get, and how they are spread.

use super::{Append, Matrix};
use crate::{
    StatisticsError,
    wire::{Fold, Output},
};
use lathe_analysis::Rows;
use lathe_ir::{DataType, Tensor, ValueId};

impl Append<'_> {
    /// The least and the largest number of every feature.
    pub(super) fn range(&mut self, rows: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let matrix = self.matrix(rows)?;
        let (keep, counts) = self.keep(matrix.finite, matrix.tokens, matrix.value);
        let mut outputs = self.extremes(matrix, keep);
        outputs.push(self.output(counts, DataType::Double, "counts", Fold::Sum));
        Ok(outputs)
    }

    /// All numbers, for the worker to count, and their extremes.
    pub(super) fn spread(&mut self, rows: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let matrix = self.matrix(rows)?;
        let (keep, counts) = self.keep(matrix.finite, matrix.tokens, matrix.value);
        // What is no number is not counted.
        let all = self.filled(matrix, keep, f64::NAN);
        let mut outputs = vec![self.output(all, dtype(matrix), "spread", Fold::Spread)];
        outputs.extend(self.extremes(matrix, keep));
        outputs.push(self.output(counts, DataType::Double, "counts", Fold::Sum));
        Ok(outputs)
    }

    fn extremes(&mut self, matrix: Matrix, keep: ValueId) -> Vec<Output> {
        let ends =
            [("ReduceMin", f64::INFINITY, "least", Fold::Min), ("ReduceMax", -f64::INFINITY, "largest", Fold::Max)];
        let mut outputs = Vec::new();
        for (op, nothing, field, fold) in ends {
            let kept = self.filled(matrix, keep, nothing);
            let end = self.reduce(op, kept, Some(0), false);
            outputs.push(self.output(end, dtype(matrix), field, fold));
        }
        outputs
    }

    /// The matrix with this number in the rows that are dropped.
    fn filled(&mut self, matrix: Matrix, keep: ValueId, number: f64) -> ValueId {
        let number = self.constant(Tensor::from_f64s(dtype(matrix), &[1], &[number]));
        self.op("Where", &[keep, matrix.value, number])
    }
}

fn dtype(matrix: Matrix) -> DataType {
    if matrix.wide { DataType::Double } else { DataType::Float }
}
