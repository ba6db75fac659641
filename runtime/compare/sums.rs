//! What one pass over two float tensors finds out.

use super::OutputError;
use crate::{
    differences::{ElementSums, Meeting},
    divergence::{RowSums, is_distribution},
    elements::{is_wide, rows},
};
use lathe_ir::{DataType, Tensor};

/// Sums over two tensors, and what is special in them.
#[derive(Default)]
pub(super) struct Sums {
    elements: ElementSums,
    rows: RowSums,
    count: u64,
    /// Elements whose bits differ, apart from the payloads of NaN.
    pub bits_differ: u64,
    /// The first element that is a number in only one of the two, or another infinity.
    pub special_at: Option<u64>,
    /// What the two hold there.
    pub special: (f64, f64),
    /// How many such elements there are.
    pub special_count: u64,
}

/// The elements that are read at a time where rows mean nothing.
const LINE: usize = 4096;

impl Sums {
    /// Over two tensors of one float type and shape.
    pub fn over(expected: &Tensor, found: &Tensor) -> Sums {
        if !is_wide(expected.dtype()) {
            let all = |t: &Tensor| t.to_f64s().unwrap_or_default();
            return Sums::of(&all(expected), &all(found));
        }
        // Squares of narrower types fit float64 as they are.
        let double = expected.dtype() == DataType::Double;
        let largest = if double { magnitude(expected).max(magnitude(found)) } else { 1.0 };
        let mut sums = Sums { elements: ElementSums::for_magnitude(largest), ..Sums::default() };
        // Rows of one element say nothing about an order; they are taken together only to go faster.
        let width = expected.dims().last().copied().unwrap_or(1);
        let (row, ranked) = if width > 1 { (width, true) } else { (LINE, false) };
        rows(expected, found, row, |_| true, |_, a, b| sums.row(a, b, ranked));
        sums
    }

    /// Over numbers that are read already.
    pub fn of(a: &[f64], b: &[f64]) -> Sums {
        let mut sums = Sums::default();
        sums.row(a, b, false);
        sums
    }

    fn row(&mut self, a: &[f64], b: &[f64], ranked: bool) {
        let before = self.special_count;
        a.iter().zip(b).for_each(|(&a, &b)| self.add(a, b));
        if ranked && self.special_count == before && a.iter().all(|x| x.is_finite()) {
            self.rows.add(a, b, is_distribution(a) && is_distribution(b));
        }
    }

    fn add(&mut self, a: f64, b: f64) {
        let at = self.count;
        self.count += 1;
        // Every narrower float widens without loss, so equal bits here are equal bits there.
        self.bits_differ += u64::from(a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
        if self.elements.add(a, b) == Meeting::Broken {
            self.special_count += 1;
            if self.special_at.is_none() {
                self.special_at = Some(at);
                self.special = (a, b);
            }
        }
    }

    /// Enters what was found.
    pub fn report(&self, error: &mut OutputError) {
        error.max_abs = self.elements.max_abs();
        error.rel_l2 = self.elements.rel_l2();
        error.cosine = self.elements.cosine();
        if self.rows.rows() > 0 {
            (error.rows, error.top1, error.kl) = (self.rows.rows(), self.rows.top1(), self.rows.kl());
        }
    }
}

/// The largest magnitude of the finite elements.
fn magnitude(tensor: &Tensor) -> f64 {
    let mut most = 0.0;
    let mut line = |_: usize, line: &[f64], _: &[f64]| {
        most = line.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(most, f64::max);
    };
    rows(tensor, tensor, LINE, |_| true, &mut line);
    most
}
