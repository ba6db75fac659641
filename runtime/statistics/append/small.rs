//! Statistics of numbers that are small: how many there are, and what a layer loses without them.

use super::Append;
use crate::{
    StatisticsError,
    statistics::request::Skip,
    wire::{Fold, Output},
};
use lathe_analysis::{Magnitudes, Rows};
use lathe_ir::{DataType, Node, Tensor, ValueId};

impl Append<'_> {
    /// How many numbers are small.
    pub(super) fn magnitudes(&mut self, rows: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let matrix = self.matrix(rows)?;
        let dtype = if matrix.wide { DataType::Double } else { DataType::Float };
        let (keep, counts) = self.keep(matrix.finite, matrix.tokens, matrix.value);
        let number = |x: f64| Tensor::from_f64s(dtype, &[1], &[x]);
        let (zero, beyond) = (self.constant(number(0.0)), self.constant(number(f64::INFINITY)));
        let size = self.op("Abs", &[matrix.value]);
        // Rows that do not count lie below nothing.
        let size = self.op("Where", &[keep, size, beyond]);
        let kept = self.op("Where", &[keep, matrix.value, zero]);
        let square = self.op("Mul", &[kept, kept]);
        let (mut below, mut square_below) = (Vec::new(), Vec::new());
        for step in Magnitudes::steps() {
            let step = self.constant(number(step));
            let flags = self.op("Less", &[size, step]);
            let ones = self.cast(flags, dtype);
            below.push(self.reduce("ReduceSum", ones, Some(0), true));
            let small = self.op("Where", &[flags, square, zero]);
            square_below.push(self.reduce("ReduceSum", small, Some(0), true));
        }
        let below = self.node(Node::new("Concat").with("axis", 0i64), &below);
        let square_below = self.node(Node::new("Concat").with("axis", 0i64), &square_below);
        let square_sum = self.column_sum(square);
        Ok(vec![
            self.output(below, dtype, "below", Fold::Sum),
            self.output(square_below, dtype, "square_below", Fold::Sum),
            self.output(square_sum, DataType::Double, "square_sum", Fold::Sum),
            self.output(counts, DataType::Double, "counts", Fold::Sum),
        ])
    }

    /// What is lost where small numbers are left out.
    pub(super) fn skip(&mut self, skip: &Skip) -> Result<Vec<Output>, StatisticsError> {
        let missing = || StatisticsError::Missing { value: skip.weight.clone() };
        let stored = self.graph.find_value(&skip.weight).ok_or_else(missing)?;
        let mut weight = self.graph.constant(stored).map(|_| stored).ok_or_else(missing)?;
        weight = self.as_float(weight);
        let matrix = self.matrix(&skip.rows)?;
        let (keep, counts) = self.keep(matrix.finite, matrix.tokens, matrix.value);
        let mut x = self.zeroed(matrix, keep);
        if matrix.wide {
            x = self.cast(x, DataType::Float);
        }
        if !skip.first_axis {
            let shape = self.ints(&[-1, matrix.features as i64]);
            let rows = self.op("Reshape", &[weight, shape]);
            weight = self.node(Node::new("Transpose").with("perm", vec![1i64, 0]), &[rows]);
        }
        let squares = self.op("Mul", &[weight, weight]);
        let norms = self.reduce("ReduceSum", squares, Some(1), false);
        let norms = self.op("Sqrt", &[norms]);
        let size = self.op("Abs", &[x]);
        let weighed = self.op("Mul", &[size, norms]);
        let zero = self.constant(Tensor::from_f64s(DataType::Float, &[1], &[0.0]));
        let one = self.ints(&[1]);
        let output = self.square_sum(x, weight);
        let (mut skipped, mut lost) = (Vec::new(), Vec::new());
        for cut in &skip.cuts {
            let threshold = self.constant(Some(Tensor::from_f32s(&[1], &[cut.threshold()])));
            let small = self.op("Less", &[if cut.weighed { weighed } else { size }, threshold]);
            let small = self.op("And", &[small, keep]);
            let ones = self.cast(small, DataType::Double);
            let sum = self.reduce("ReduceSum", ones, None, false);
            skipped.push(self.op("Reshape", &[sum, one]));
            let left_out = self.op("Where", &[small, x, zero]);
            lost.push(self.square_sum(left_out, weight));
        }
        let skipped = self.node(Node::new("Concat").with("axis", 0i64), &skipped);
        let lost = self.node(Node::new("Concat").with("axis", 0i64), &lost);
        Ok(vec![
            self.output(skipped, DataType::Double, "skipped", Fold::Sum),
            self.output(lost, DataType::Double, "lost_square_sum", Fold::Sum),
            self.output(output, DataType::Double, "output_square_sum", Fold::Sum),
            self.output(counts, DataType::Double, "counts", Fold::Sum),
        ])
    }

    /// The sum of the squares of a product, `[1]`.
    fn square_sum(&mut self, rows: ValueId, weight: ValueId) -> ValueId {
        let product = self.op("MatMul", &[rows, weight]);
        let wide = self.cast(product, DataType::Double);
        let square = self.op("Mul", &[wide, wide]);
        let sum = self.reduce("ReduceSum", square, None, false);
        let one = self.ints(&[1]);
        self.op("Reshape", &[sum, one])
    }
}
