//! The sums that one pass over two tensors gathers.

use crate::compare::OutputError;
use crate::metrics::logits::{divergence, is_distribution};
use half::{bf16, f16};
use lathe_ir::{DataType, Tensor};

/// What one pass over two float tensors finds out.
pub(crate) struct Sums {
    /// A power of two that all elements are multiplied by before they are squared: squares of float64 leave its range.
    scale: f64,
    count: u64,
    max_abs: f64,
    difference: f64,
    reference: f64,
    candidate: f64,
    product: f64,
    /// Elements whose bits differ, apart from the payloads of NaN.
    pub bits_differ: u64,
    /// The first element that is a number in only one of the two, or another infinity.
    pub special_at: Option<u64>,
    /// What the two hold there.
    pub special: (f64, f64),
    /// How many such elements there are.
    pub special_count: u64,
    rows: u64,
    agreeing: u64,
    kl: f64,
}

/// The elements that are read at a time.
const LINE: usize = 4096;

impl Sums {
    fn new(largest: f64) -> Sums {
        let scale = if largest > 0.0 { (-largest.log2().floor()).clamp(-1022.0, 1022.0).exp2() } else { 1.0 };
        Sums {
            scale,
            count: 0,
            max_abs: 0.0,
            difference: 0.0,
            reference: 0.0,
            candidate: 0.0,
            product: 0.0,
            bits_differ: 0,
            special_at: None,
            special: (0.0, 0.0),
            special_count: 0,
            rows: 0,
            agreeing: 0,
            kl: 0.0,
        }
    }

    /// Over two tensors of one float type and shape.
    pub fn over(expected: &Tensor, found: &Tensor) -> Sums {
        let width = expected.dims().last().copied().unwrap_or(1);
        // Rows of one element say nothing about an order; they are taken together only to go faster.
        let (row, ranked) = if width > 1 { (width, true) } else { (LINE, false) };
        if !is_wide(expected.dtype()) {
            let all = |t: &Tensor| t.to_f64s().unwrap_or_default();
            return Sums::of(&all(expected), &all(found));
        }
        // Squares of narrower types fit float64 as they are.
        let double = expected.dtype() == DataType::Double;
        let largest = if double { magnitude(expected).max(magnitude(found)) } else { 1.0 };
        let mut sums = Sums::new(largest);
        pieces(expected, found, row, |a, b| sums.row(a, b, ranked));
        sums
    }

    /// Over numbers that are read already.
    pub fn of(a: &[f64], b: &[f64]) -> Sums {
        let mut sums = Sums::new(1.0);
        sums.row(a, b, false);
        sums
    }

    fn row(&mut self, a: &[f64], b: &[f64], ranked: bool) {
        let before = self.special_count;
        a.iter().zip(b).for_each(|(&a, &b)| self.add(a, b));
        let finite = |row: &[f64]| row.iter().all(|x| x.is_finite());
        if ranked && self.special_count == before && finite(a) {
            self.rows += 1;
            self.agreeing += u64::from(largest(a) == largest(b));
            self.kl += divergence(a, b, is_distribution(a) && is_distribution(b));
        }
    }

    fn add(&mut self, a: f64, b: f64) {
        let at = self.count;
        self.count += 1;
        // Every narrower float widens without loss, so equal bits here are equal bits there.
        self.bits_differ += u64::from(a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
        if !a.is_finite() || !b.is_finite() {
            if !(a == b || (a.is_nan() && b.is_nan())) {
                self.special_count += 1;
                if self.special_at.is_none() {
                    self.special_at = Some(at);
                    self.special = (a, b);
                }
            }
            return;
        }
        self.max_abs = self.max_abs.max((b - a).abs());
        let (a, b) = (a * self.scale, b * self.scale);
        self.difference += (b - a) * (b - a);
        self.reference += a * a;
        self.candidate += b * b;
        self.product += a * b;
    }

    /// Enters what was found.
    pub fn report(&self, error: &mut OutputError) {
        error.max_abs = self.max_abs;
        error.rel_l2 = match (self.difference, self.reference) {
            (0.0, _) => 0.0,
            (_, 0.0) => f64::INFINITY,
            (difference, reference) => (difference / reference).sqrt(),
        };
        let scale = (self.reference * self.candidate).sqrt();
        error.cosine = match self.difference {
            0.0 => 1.0,
            _ if scale > 0.0 => self.product / scale,
            _ => 0.0,
        };
        if self.rows > 0 {
            error.rows = self.rows;
            error.top1 = Some(self.agreeing as f64 / self.rows as f64);
            error.kl = Some(self.kl / self.rows as f64);
        }
    }
}

/// The root mean square of the difference of two tensors of any float types and one shape; `None` where their shapes
/// differ or an element is a number in only one of them.
pub(crate) fn root_mean_square(a: &Tensor, b: &Tensor) -> Option<f64> {
    if a.dims() != b.dims() || !a.dtype().is_float() || !b.dtype().is_float() {
        return None;
    }
    let (a, b) = (a.to_f64s()?, b.to_f64s()?);
    let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
    let finite = |a: f64, b: f64| a.is_finite() && b.is_finite();
    if a.iter().zip(&b).any(|(&a, &b)| !finite(a, b) && !same(a, b)) {
        return None;
    }
    let apart = || a.iter().zip(&b).filter(|&(&a, &b)| finite(a, b)).map(|(a, b)| (a - b).abs());
    let most = apart().fold(0.0, f64::max);
    if most == 0.0 {
        return Some(0.0);
    }
    let mean = apart().map(|d| (d / most).powi(2)).sum::<f64>() / a.len() as f64;
    Some(most * mean.sqrt())
}

/// Whether elements are whole bytes that [`decode`] reads.
fn is_wide(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16)
}

/// The largest magnitude of the finite elements.
fn magnitude(tensor: &Tensor) -> f64 {
    let mut most = 0.0;
    pieces(tensor, tensor, LINE, |line, _| {
        most = line.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(most, f64::max);
    });
    most
}

/// Reads two tensors of one wide type side by side.
fn pieces(a: &Tensor, b: &Tensor, row: usize, mut visit: impl FnMut(&[f64], &[f64])) {
    let step = a.dtype().bits() / 8;
    let (mut left, mut right) = (Vec::with_capacity(row), Vec::with_capacity(row));
    for (x, y) in a.bytes().chunks(row * step).zip(b.bytes().chunks(row * step)) {
        decode(a.dtype(), x, &mut left);
        decode(b.dtype(), y, &mut right);
        visit(&left, &right);
    }
}

/// Widens packed elements into `out`.
pub(crate) fn decode(dtype: DataType, bytes: &[u8], out: &mut Vec<f64>) {
    out.clear();
    match dtype {
        DataType::Float => out.extend(bytes.as_chunks::<4>().0.iter().map(|&b| f64::from(f32::from_le_bytes(b)))),
        DataType::Double => out.extend(bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b))),
        DataType::Float16 => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f64::from(f16::from_le_bytes(b)))),
        _ => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f64::from(bf16::from_le_bytes(b)))),
    }
}

/// The first index of the largest element.
pub(crate) fn largest(row: &[f64]) -> usize {
    let mut best = 0;
    for (index, &x) in row.iter().enumerate() {
        if x > row[best] {
            best = index;
        }
    }
    best
}
