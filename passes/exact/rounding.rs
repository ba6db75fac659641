//! Constants computed from other constants: in float64, rounded once, and refused where that would lose digits.
//!
//! A rewrite that multiplies or adds constants keeps the function but for roundings, with three exceptions, which are
//! refused here: a product that leaves the range of its type, one that falls below the normal numbers of its type and so
//! loses digits or becomes zero, and a sum that cancels, because then the original has rounded away digits beside a large
//! term that would come back.

use crate::Refusal;
use lathe_ir::{DataType, Tensor};

/// Refused where a number leaves the range of its type.
const RANGE: &str = "a folded constant would leave the range of its type";
/// Refused where a number is too small for its type.
const DIGITS: &str = "a folded constant would be too small for its type and lose digits";
/// Refused where terms cancel.
const CANCELS: &str = "the constants cancel, and what the original rounds away would come back";
/// Refused where a factor is not moderate.
const IMMODERATE: &str = "a factor is very large or very small";

/// Element types whose constants are recomputed.
pub(super) fn is_weight_type(dtype: DataType) -> bool {
    Format::of(dtype).is_ok()
}

/// How a type holds numbers.
struct Format {
    /// The largest relative error of a rounding.
    roundoff: f64,
    /// The smallest number that a rounding keeps all digits of.
    least: f64,
    /// How many times larger than its total, or than what it is added to, a term of a sum may be.
    headroom: f64,
    /// Factors that bring no ordinary value near the ends of the range lie between the inverse of this and this.
    moderate: f64,
    /// Whether runtimes may take numbers below `least` for zero.
    flushes: bool,
}

impl Format {
    fn of(dtype: DataType) -> Result<Format, Refusal> {
        let single = f64::from(f32::MIN_POSITIVE);
        let (digits, least, lost, moderate) = match dtype {
            DataType::Float => (24, single, 8, 1e12),
            DataType::Double => (53, f64::MIN_POSITIVE, 24, 1e12),
            DataType::Float16 => (11, 2f64.powi(-14), 3, 1e3),
            DataType::Bfloat16 => (8, single, 3, 1e12),
            _ => return Err(Refusal::NoMatch),
        };
        let flushes = dtype != DataType::Float16;
        Ok(Format { roundoff: 2f64.powi(-digits), least, headroom: 2f64.powi(lost), moderate, flushes })
    }

    /// How much of a number its rounding loses.
    fn lost(&self, exact: f64, rounded: f64) -> f64 {
        if self.flushes && rounded.abs() < self.least { exact } else { exact - rounded }
    }

    fn is_small(&self, exact: f64) -> bool {
        exact != 0.0 && exact.abs() < self.least
    }
}

/// Refuses factors so far from 1 that a value between them and its neighbours would matter by overflowing or vanishing.
pub(super) fn require_moderate(dtype: DataType, factors: &[f64]) -> Result<(), Refusal> {
    let limit = Format::of(dtype)?.moderate;
    let moderate = |factor: f64| (limit.recip()..=limit).contains(&factor.abs());
    if factors.iter().copied().all(moderate) { Ok(()) } else { Err(IMMODERATE.into()) }
}

/// A number as an attribute.
pub(super) fn attribute(number: f64) -> Result<f32, Refusal> {
    let format = Format::of(DataType::Float)?;
    let rounded = number as f32;
    if !rounded.is_finite() {
        return Err(RANGE.into());
    }
    if format.is_small(number) {
        return Err(DIGITS.into());
    }
    Ok(rounded)
}

/// Numbers as a constant, every one of which multiplies something of its own.
pub(super) fn factors(dtype: DataType, dims: &[usize], numbers: &[f64]) -> Result<Tensor, Refusal> {
    let (tensor, small) = rounded(dtype, dims, numbers)?;
    if small {
        let all = numbers.iter().copied().enumerate();
        require_digits(dtype, numbers.len(), largest(numbers), rounded_pairs(&tensor, all)?)?;
    }
    Ok(tensor)
}

/// The rows and columns that the elements of a weight belong to: of each, the sum over all elements is what counts.
pub(super) struct Grid<F> {
    /// How many rows and columns there are.
    pub counts: (usize, usize),
    /// How many elements in a row of memory are of the same row and column.
    pub inner: usize,
    /// The row and column of the elements of one such block.
    pub place: F,
}

/// Numbers as a weight.
pub(super) fn weight(
    dtype: DataType,
    dims: &[usize],
    numbers: &[f64],
    grid: &Grid<impl Fn(usize) -> (usize, usize)>,
) -> Result<Tensor, Refusal> {
    let (tensor, small) = rounded(dtype, dims, numbers)?;
    if small {
        let inner = grid.inner.max(1);
        let row = numbers.iter().enumerate().map(|(at, &x)| ((grid.place)(at / inner).0, x));
        let column = numbers.iter().enumerate().map(|(at, &x)| ((grid.place)(at / inner).1, x));
        let most = largest(numbers);
        require_digits(dtype, grid.counts.0, most, rounded_pairs(&tensor, row)?)?;
        require_digits(dtype, grid.counts.1, most, rounded_pairs(&tensor, column)?)?;
    }
    Ok(tensor)
}

/// A weight with every block multiplied by its factor.
pub(super) fn scaled(
    tensor: &Tensor,
    grid: &Grid<impl Fn(usize) -> (usize, usize)>,
    factor: impl Fn(usize) -> f64,
) -> Result<Tensor, Refusal> {
    let inner = grid.inner.max(1);
    let products = || -> Result<Vec<f64>, Refusal> {
        let mut numbers = tensor.to_f64s().ok_or(Refusal::NoMatch)?;
        for (block, values) in numbers.chunks_mut(inner).enumerate() {
            let by = factor(block);
            values.iter_mut().for_each(|x| *x *= by);
        }
        Ok(numbers)
    };
    if tensor.dtype() != DataType::Float {
        return weight(tensor.dtype(), tensor.dims(), &products()?, grid);
    }
    // The common case reads the mapped file once and never holds the weights in a wider type.
    let format = Format::of(DataType::Float)?;
    let mut bytes = Vec::with_capacity(tensor.byte_len());
    let (mut finite, mut small) = (true, false);
    let (mut block, mut left, mut by) = (0, 0, 1.0);
    for mut part in tensor.parts() {
        // A part ends where it may, also within a block.
        while !part.is_empty() {
            if left == 0 {
                (block, left, by) = (block + 1, 4 * inner, factor(block));
            }
            let (values, rest) = part.split_at(left.min(part.len()));
            for &value in values.as_chunks::<4>().0 {
                let exact = f64::from(f32::from_le_bytes(value)) * by;
                let product = exact as f32;
                finite &= product.is_finite();
                small |= format.is_small(exact);
                bytes.extend_from_slice(&product.to_le_bytes());
            }
            (part, left) = (rest, left - values.len());
        }
    }
    if !finite {
        return Err(RANGE.into());
    }
    if small {
        return weight(tensor.dtype(), tensor.dims(), &products()?, grid);
    }
    Tensor::new(DataType::Float, tensor.dims().to_vec(), bytes).map_err(|e| Refusal::from(e.to_string()))
}

/// A sum of constants that is added to a computed value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sum {
    total: f64,
    /// The size of its largest term.
    largest: f64,
    /// The size of the value that it is added to. What a graph computes is taken to be about 1.
    beside: f64,
}

impl Sum {
    /// One term that is added to a value of about the size `beside`.
    pub fn of(term: f64, beside: f64) -> Sum {
        Sum { total: term, largest: term.abs(), beside: beside.abs() }
    }

    /// A total whose largest term has the size `largest`.
    pub fn from_parts(total: f64, largest: f64, beside: f64) -> Sum {
        Sum { total, largest: largest.abs(), beside: beside.abs() }
    }

    /// With one more term.
    pub fn plus(self, term: f64) -> Sum {
        Sum { total: self.total + term, largest: self.largest.max(term.abs()), ..self }
    }

    /// What the total has to be seen beside.
    fn size(&self) -> f64 {
        self.total.abs().max(self.beside)
    }
}

/// Refuses sums with a term that is much larger than the total and what it is added to.
pub(super) fn require_no_cancellation(dtype: DataType, all: &[Sum]) -> Result<(), Refusal> {
    let headroom = Format::of(dtype)?.headroom;
    let cancels = |sum: &Sum| sum.largest > headroom * sum.size();
    if all.iter().any(cancels) { Err(CANCELS.into()) } else { Ok(()) }
}

/// Sums as a constant.
pub(super) fn sums(dtype: DataType, dims: &[usize], all: &[Sum]) -> Result<Tensor, Refusal> {
    let format = Format::of(dtype)?;
    let numbers: Vec<f64> = all.iter().map(|sum| sum.total).collect();
    let (tensor, _) = rounded(dtype, dims, &numbers)?;
    require_no_cancellation(dtype, all)?;
    let most = all.iter().map(Sum::size).fold(0.0, f64::max);
    let negligible = format.roundoff * format.roundoff * most;
    let kept = tensor.to_f64s().ok_or(Refusal::NoMatch)?;
    let precise = |(sum, &kept): (&Sum, &f64)| {
        sum.size() <= negligible || format.lost(sum.total, kept).abs() <= format.roundoff * sum.size()
    };
    if all.iter().zip(&kept).all(precise) { Ok(tensor) } else { Err(DIGITS.into()) }
}

/// Numbers as a constant, and whether one is below the normal numbers of its type. Refuses if one leaves its range.
fn rounded(dtype: DataType, dims: &[usize], numbers: &[f64]) -> Result<(Tensor, bool), Refusal> {
    let format = Format::of(dtype)?;
    let tensor = Tensor::from_f64s(dtype, dims, numbers).expect("floats of 16 bits or more can be written");
    let kept = tensor.to_f64s().expect("floats of 16 bits or more can be read");
    if kept.iter().any(|x| !x.is_finite()) {
        return Err(RANGE.into());
    }
    Ok((tensor, numbers.iter().any(|&x| format.is_small(x))))
}

fn largest(numbers: &[f64]) -> f64 {
    numbers.iter().fold(0.0, |most, x| f64::max(most, x.abs()))
}

/// Slice, exact and rounded number of every element.
fn rounded_pairs(
    tensor: &Tensor,
    exact: impl Iterator<Item = (usize, f64)>,
) -> Result<impl Iterator<Item = (usize, f64, f64)>, Refusal> {
    let kept = tensor.to_f64s().ok_or(Refusal::NoMatch)?;
    Ok(exact.zip(kept).map(|((slice, exact), kept)| (slice, exact, kept)))
}

/// Refuses if in one of `slices` more is lost, taken together, than rounding loses of normal numbers. A slice that is
/// nothing beside the others may lose what it has: a dead channel must not keep a whole layer from being folded.
fn require_digits(
    dtype: DataType,
    slices: usize,
    most: f64,
    numbers: impl Iterator<Item = (usize, f64, f64)>,
) -> Result<(), Refusal> {
    let format = Format::of(dtype)?;
    let (mut whole, mut gone) = (vec![0.0; slices], vec![0.0; slices]);
    for (slice, exact, kept) in numbers {
        whole[slice] += (exact / most).powi(2);
        gone[slice] += (format.lost(exact, kept) / most).powi(2);
    }
    let limit = format.roundoff.powi(2);
    let negligible = limit.powi(2) * whole.iter().copied().fold(0.0, f64::max);
    let precise = |(&whole, &gone): (&f64, &f64)| whole <= negligible || gone <= limit * whole;
    if whole.iter().zip(&gone).all(precise) { Ok(()) } else { Err(DIGITS.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DataType::{Bfloat16, Double, Float, Float16};

    fn reason<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
        let refusal = result.expect_err("a refusal");
        [RANGE, DIGITS, CANCELS, IMMODERATE]
            .into_iter()
            .find(|r| refusal == (*r).into())
            .expect("a sentence of this file")
    }

    #[test]
    fn factors_keep_their_digits_or_are_refused() {
        for (dtype, fine, small, large) in [
            (Float, 1e-37, 1e-39, 1e39),
            (Double, 1e-307, 1e-310, f64::INFINITY),
            (Float16, 7e-5, 1e-6, 7e4),
            (Bfloat16, 1e-37, 1e-39, 4e38),
        ] {
            assert_eq!(factors(dtype, &[2], &[0.0, fine]).unwrap().dtype(), dtype);
            assert_eq!(reason(factors(dtype, &[2], &[fine, small])), DIGITS, "{dtype:?}");
            assert_eq!(reason(factors(dtype, &[1], &[large])), RANGE, "{dtype:?}");
            assert_eq!(reason(factors(dtype, &[1], &[f64::NAN])), RANGE, "{dtype:?}");
        }
        // Powers of two are exact in float16 down to its smallest number.
        assert_eq!(factors(Float16, &[1], &[2f64.powi(-20)]).unwrap().to_f64s().unwrap(), [2f64.powi(-20)]);
    }

    #[test]
    fn a_dead_channel_keeps_nothing_from_being_folded() {
        assert!(factors(Float, &[2], &[1.0, 1e-40]).is_ok());
        assert!(factors(Float16, &[2], &[1.0, 1e-7]).is_ok());
        assert_eq!(reason(factors(Float16, &[2], &[1.0, 1e-5])), DIGITS);
    }

    #[test]
    fn a_weight_may_lose_digits_of_a_few_small_elements() {
        let place = |at: usize| (at / 2, at % 2);
        let grid = Grid { counts: (2, 2), inner: 1, place };
        let of = |numbers: [f64; 4]| weight(Float16, &[2, 2], &numbers, &grid);
        assert!(of([0.1, 1e-5, 1e-5, 0.1]).is_ok());
        // A column, or a row, of small elements only.
        assert_eq!(reason(of([0.1, 1e-5, 0.1, 1e-5])), DIGITS);
        assert_eq!(reason(of([0.1, 0.1, 1e-5, 1e-5])), DIGITS);
        let ordinary = Tensor::from_f64s(Float16, &[2, 2], &[0.1, 0.2, 0.3, 0.4]).unwrap();
        assert_eq!(reason(scaled(&ordinary, &grid, |_| 1e-5)), DIGITS);
        let ordinary = Tensor::from_f32s(&[2, 2], &[0.1, 0.2, 0.3, 0.4]);
        assert_eq!(reason(scaled(&ordinary, &grid, |_| 1e-38)), DIGITS);
        assert_eq!(reason(scaled(&ordinary, &grid, |_| 1e39)), RANGE);
        assert!(scaled(&ordinary, &grid, |at| if at == 1 { 1e-40 } else { 1.0 }).is_ok());
    }

    #[test]
    fn sums_that_cancel_are_refused() {
        let of = |dtype, a: f64, b: f64| sums(dtype, &[1], &[Sum::of(a, 1.0).plus(b)]);
        assert_eq!(of(Float, 100.0, -99.0).unwrap().scalar_f64(), Some(1.0));
        assert_eq!(reason(of(Float, 1e10, -1e10)), CANCELS);
        assert_eq!(reason(of(Float16, 100.0, -99.0)), CANCELS);
        assert!(of(Float, 1e10, 1e10).is_ok() && of(Double, 1e6, -1e6).is_ok());
        assert_eq!(reason(of(Float16, 6e4, 6e4)), RANGE);
        // Beside numbers of about 1 a small sum may lose digits, beside small ones it may not.
        assert!(sums(Float16, &[1], &[Sum::of(1e-6, 1.0)]).is_ok());
        assert_eq!(reason(sums(Float16, &[1], &[Sum::of(1e-6, 1e-5)])), DIGITS);
    }

    #[test]
    fn factors_far_from_one_are_refused() {
        assert!(require_moderate(Float16, &[255.0, -0.01]).is_ok() && require_moderate(Float, &[1e9]).is_ok());
        assert_eq!(reason(require_moderate(Float16, &[1e-4])), IMMODERATE);
        assert_eq!(reason(require_moderate(Float, &[1e-25])), IMMODERATE);
        assert_eq!(reason(require_moderate(Float, &[0.0])), IMMODERATE);
        assert_eq!(reason(attribute(1e-40)), DIGITS);
        assert_eq!(reason(attribute(1e40)), RANGE);
    }
}
