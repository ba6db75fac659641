//! How far one output of a variant is from the model's.

use crate::{Distance, wire::NonFinite};
use lathe_ir::{DataType, Tensor};

/// An output whose elements are neither floats nor compared as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an output of type {0} has no numbers")]
pub(crate) struct NoNumbers(DataType);

/// An output of the model, as far as distances from it need it.
pub(super) enum Expected {
    Numbers(Numbers),
    /// Whole numbers, booleans or strings.
    Symbols(Tensor),
}

/// A logarithm of a probability at least: what a variant rules out is held to be rare.
const LEAST: f64 = -1e3;

/// Floats.
pub(super) struct Numbers {
    dims: Vec<usize>,
    distance: Distance,
    /// Numbers in a row: of a sample, or of the last axis.
    row: usize,
    /// The output itself, or the probabilities of its softmax, which are NaN where a row has none.
    numbers: Vec<f32>,
    /// Of every row: the squared norm of what is finite, or Σ p log p.
    norms: Vec<f64>,
    finite: usize,
}

impl Expected {
    pub fn of(tensor: &Tensor, distance: Distance, samples: usize) -> Result<Expected, NoNumbers> {
        if !tensor.dtype().is_float() {
            return Ok(Expected::Symbols(tensor.clone()));
        }
        let dims = tensor.dims().to_vec();
        let mut numbers = floats(tensor)?;
        let per_sample = samples > 0 && dims.first().is_some_and(|&d| d % samples == 0);
        let row = match distance {
            Distance::Divergence => dims.last().copied().unwrap_or(1),
            Distance::Relative if per_sample => numbers.len() / samples,
            Distance::Relative => numbers.len(),
        };
        let row = row.max(1);
        let norm = |row: &mut [f32]| match distance {
            Distance::Relative => row.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x) * f64::from(x)).sum(),
            Distance::Divergence => {
                let scale = log_sum(row);
                let mut sum = if scale.is_finite() { 0.0 } else { f64::NAN };
                for x in row {
                    let log = f64::from(*x) - scale;
                    *x = log.exp() as f32;
                    // A probability of zero adds nothing, whatever its logarithm.
                    sum += if *x > 0.0 { f64::from(*x) * log } else { 0.0 };
                }
                sum
            }
        };
        let finite = numbers.iter().filter(|x| x.is_finite()).count();
        let norms = numbers.chunks_mut(row).map(norm).collect();
        Ok(Expected::Numbers(Numbers { dims, distance, row, numbers, norms, finite }))
    }

    /// Numbers that are finite.
    pub fn finite(&self) -> usize {
        match self {
            Expected::Numbers(numbers) => numbers.finite,
            Expected::Symbols(_) => 0,
        }
    }

    /// The mean distance of the rows of another tensor. A tensor of another shape is lost altogether.
    pub fn distance(&self, tensor: &Tensor, non_finite: NonFinite) -> Result<f64, NoNumbers> {
        match self {
            Expected::Numbers(expected) if tensor.dims() == expected.dims && tensor.dtype().is_float() => {
                Ok(expected.distance(&floats(tensor)?, non_finite))
            }
            Expected::Symbols(expected) if tensor.dims() == expected.dims() => Ok(changed(expected, tensor)),
            _ => Ok(1.0),
        }
    }
}

/// The share of elements that differ, as one can expect it to be after having seen these: none of few says little.
fn changed(a: &Tensor, b: &Tensor) -> f64 {
    let differing = match (a.string_data(), b.string_data()) {
        (Some(a), Some(b)) => a.iter().zip(b).filter(|(a, b)| a != b).count(),
        _ => {
            let size = a.byte_len().checked_div(a.len()).unwrap_or(1).max(1);
            a.bytes().chunks(size).zip(b.bytes().chunks(size)).filter(|(a, b)| a != b).count()
        }
    };
    (differing + 1) as f64 / (a.len() + 2) as f64
}

impl Numbers {
    fn distance(&self, numbers: &[f32], non_finite: NonFinite) -> f64 {
        let lost = |part: f64| if non_finite == NonFinite::Infinite { f64::INFINITY } else { part };
        let rows = self.numbers.chunks(self.row).zip(numbers.chunks(self.row)).zip(&self.norms);
        let distances = rows.map(|((expected, found), &norm)| match self.distance {
            Distance::Relative => {
                let off = |(&a, &b): (&f32, &f32)| match (a.is_finite(), b.is_finite()) {
                    (true, true) => (f64::from(a) - f64::from(b)).powi(2),
                    (true, false) => lost(f64::from(a).powi(2)),
                    (false, _) if a == b || a.is_nan() && b.is_nan() => 0.0,
                    (false, _) => lost(0.0),
                };
                let sum: f64 = expected.iter().zip(found).map(off).sum();
                sum / norm.max(f64::from(f32::MIN_POSITIVE))
            }
            Distance::Divergence => {
                let scale = log_sum(found);
                // A row without probabilities in both says nothing.
                if norm.is_nan() {
                    return if scale.is_finite() { lost(0.0) } else { 0.0 };
                }
                let mean = |(&p, &x): (&f32, &f32)| {
                    let log = f64::from(x) - scale;
                    let log = if log.is_finite() { log } else { -lost(-LEAST) };
                    // What the model rules out weighs nothing.
                    if p > 0.0 { f64::from(p) * log } else { 0.0 }
                };
                let mean: f64 = expected.iter().zip(found).map(mean).sum();
                // Rounding may leave less than nothing.
                (norm - mean).max(0.0)
            }
        });
        distances.sum::<f64>() / self.norms.len().max(1) as f64
    }
}

/// log Σ exp, without overflow; NaN where a number is one, or where there is nothing to add.
fn log_sum(row: &[f32]) -> f64 {
    let most = row.iter().fold(f32::NEG_INFINITY, |most, &x| if x.is_nan() { x } else { most.max(x) });
    f64::from(most) + row.iter().map(|&x| f64::from((x - most).exp())).sum::<f64>().ln()
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>, NoNumbers> {
    if tensor.dtype() == DataType::Float
        && let Some(numbers) = tensor.to_f32s()
    {
        return Ok(numbers);
    }
    let numbers = tensor.to_f64s().ok_or(NoNumbers(tensor.dtype()))?;
    Ok(numbers.iter().map(|&x| x as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distance(expected: &Tensor, found: &Tensor, distance: Distance, non_finite: NonFinite) -> f64 {
        Expected::of(expected, distance, 2).unwrap().distance(found, non_finite).unwrap()
    }

    #[test]
    fn what_is_not_finite_in_both_says_nothing() {
        const INF: f32 = f32::INFINITY;
        let t = |numbers: &[f32]| Tensor::from_f32s(&[2, 2], numbers);
        let whole = t(&[1.0, -INF, f32::NAN, 2.0]);
        for non_finite in [NonFinite::Infinite, NonFinite::Lost] {
            let same = t(&[1.5, -INF, f32::NAN, 2.0]);
            assert_eq!(distance(&whole, &same, Distance::Relative, non_finite), 0.125, "a quarter of the first row");
        }
        let (rows, gone) = (t(&[3.0, 4.0, 1.0, 1.0]), t(&[3.0, f32::NAN, 1.0, 1.0]));
        assert_eq!(distance(&rows, &gone, Distance::Relative, NonFinite::Infinite), f64::INFINITY);
        assert_eq!(distance(&rows, &gone, Distance::Relative, NonFinite::Lost), 16.0 / 25.0 / 2.0);
        assert_eq!(distance(&whole, &t(&[1.0, 0.0, 1.0, 2.0]), Distance::Relative, NonFinite::Infinite), f64::INFINITY);
        assert_eq!(distance(&whole, &t(&[1.0, 0.0, 1.0, 2.0]), Distance::Relative, NonFinite::Lost), 0.0);
        // What a mask rules out weighs nothing, and a row without logits says nothing.
        let logits = t(&[0.0, -INF, f32::NAN, 1.0]);
        let found = distance(&logits, &t(&[5.0, -INF, f32::NAN, 2.0]), Distance::Divergence, NonFinite::Infinite);
        assert!(found.abs() < 1e-6, "{found}");
        let ruled_out = t(&[-INF, 0.0, f32::NAN, 2.0]);
        assert_eq!(distance(&logits, &ruled_out, Distance::Divergence, NonFinite::Infinite), f64::INFINITY);
        assert_eq!(distance(&logits, &ruled_out, Distance::Divergence, NonFinite::Lost), -LEAST / 2.0);
    }

    #[test]
    fn other_shapes_are_lost_and_symbols_count_by_how_many_differ() {
        let (a, b) = (Tensor::from_f32s(&[3], &[1.0; 3]), Tensor::from_f32s(&[2], &[1.0; 2]));
        assert_eq!(distance(&a, &b, Distance::Relative, NonFinite::Infinite), 1.0);
        let (a, b) = (Tensor::int64s(&[1, 2, 3, 4]), Tensor::int64s(&[1, 2, 3, 5]));
        assert_eq!(distance(&a, &b, Distance::Relative, NonFinite::Infinite), 2.0 / 6.0);
        assert_eq!(distance(&a, &a, Distance::Relative, NonFinite::Infinite), 1.0 / 6.0);
        let words = |all: [&str; 2]| Tensor::strings(vec![2], all.map(|s| s.to_owned().into()).to_vec()).unwrap();
        let changed = distance(&words(["a", "b"]), &words(["a", "c"]), Distance::Relative, NonFinite::Infinite);
        assert_eq!(changed, 2.0 / 4.0);
    }
}
