//! How far apart the elements of two outputs are: sums from which the largest difference, the relative L2 error and the
//! cosine are read.

use lathe_ir::Tensor;

/// What two elements are to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// Two finite numbers, which have gone into the sums.
    Finite,
    /// The same infinity, or no number in both; in no sum.
    Same,
    /// A number in only one of the two, or another infinity; in no sum.
    Broken,
}

/// Sums over pairs of elements.
#[derive(Debug)]
pub(crate) struct ElementSums {
    /// What elements are multiplied by before they are squared.
    scale: f64,
    max_abs: f64,
    difference: f64,
    reference: f64,
    candidate: f64,
    product: f64,
}

impl Default for ElementSums {
    fn default() -> ElementSums {
        ElementSums { scale: 1.0, max_abs: 0.0, difference: 0.0, reference: 0.0, candidate: 0.0, product: 0.0 }
    }
}

impl ElementSums {
    /// For numbers of at most this magnitude: a power of two keeps squares of float64 inside its range.
    pub(crate) fn for_magnitude(largest: f64) -> ElementSums {
        let scale = if largest > 0.0 { (-largest.log2().floor()).clamp(-1022.0, 1022.0).exp2() } else { 1.0 };
        ElementSums { scale, ..ElementSums::default() }
    }

    /// Takes in an element of the reference and that of the candidate.
    pub(crate) fn add(&mut self, reference: f64, candidate: f64) -> Meeting {
        if !reference.is_finite() || !candidate.is_finite() {
            let same = reference == candidate || (reference.is_nan() && candidate.is_nan());
            return if same { Meeting::Same } else { Meeting::Broken };
        }
        self.max_abs = self.max_abs.max((candidate - reference).abs());
        let (a, b) = (reference * self.scale, candidate * self.scale);
        self.difference += (b - a) * (b - a);
        self.reference += a * a;
        self.candidate += b * b;
        self.product += a * b;
        Meeting::Finite
    }

    /// Adds sums of the same scale: sums of rows first keep small squares that one long sum onto a large one would lose.
    pub(crate) fn join(&mut self, row: &ElementSums) {
        self.max_abs = self.max_abs.max(row.max_abs);
        self.difference += row.difference;
        self.reference += row.reference;
        self.candidate += row.candidate;
        self.product += row.product;
    }

    /// The largest difference of two elements.
    pub(crate) fn max_abs(&self) -> f64 {
        self.max_abs
    }

    /// `‖candidate − reference‖ / ‖reference‖`.
    pub(crate) fn rel_l2(&self) -> f64 {
        match (self.difference, self.reference) {
            (0.0, _) => 0.0,
            (_, 0.0) => f64::INFINITY,
            (difference, reference) => (difference / reference).sqrt(),
        }
    }

    /// The cosine of the angle between the two; 1 where nothing differs.
    pub(crate) fn cosine(&self) -> f64 {
        let norms = (self.reference * self.candidate).sqrt();
        match self.difference {
            0.0 => 1.0,
            // Rounding may lead beyond the ends.
            _ if norms > 0.0 => (self.product / norms).clamp(-1.0, 1.0),
            _ => 0.0,
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
    let distances = || a.iter().zip(&b).filter(|&(&a, &b)| finite(a, b)).map(|(a, b)| (a - b).abs());
    let most = distances().fold(0.0, f64::max);
    if most == 0.0 {
        return Some(0.0);
    }
    let mean = distances().map(|d| (d / most).powi(2)).sum::<f64>() / a.len() as f64;
    Some(most * mean.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(largest: f64, pairs: &[(f64, f64)]) -> ElementSums {
        let mut sums = ElementSums::for_magnitude(largest);
        pairs.iter().for_each(|&(a, b)| assert_eq!(sums.add(a, b), Meeting::Finite));
        sums
    }

    #[test]
    fn errors_are_those_of_their_definitions() {
        let sums = sums(1.0, &[(3.0, 3.0), (4.0, 5.0)]);
        assert_eq!((sums.max_abs(), sums.rel_l2()), (1.0, 0.2));
        assert!((sums.cosine() - 29.0 / (25f64 * 34.0).sqrt()).abs() < 1e-15);
        let zero = ElementSums::default();
        assert_eq!((zero.max_abs(), zero.rel_l2(), zero.cosine()), (0.0, 0.0, 1.0));
    }

    #[test]
    fn squares_stay_inside_float64() {
        let huge = sums(1e300, &[(1e300, 1e300), (1e300, 0.5e300)]);
        assert!((huge.rel_l2() - (0.125f64).sqrt()).abs() < 1e-15, "{huge:?}");
        let tiny = sums(1e-300, &[(1e-300, 1e-300), (1e-300, 0.5e-300)]);
        assert!((tiny.rel_l2() - (0.125f64).sqrt()).abs() < 1e-15, "{tiny:?}");
    }

    #[test]
    fn parallel_rows_are_no_closer_than_parallel() {
        let pairs: Vec<(f64, f64)> = (1..30).map(|i| (f64::from(i) / 3.0, f64::from(i) / 3.0 * 1.3)).collect();
        // The quotient of the rounded sums is 1 + 4e-16.
        assert_eq!(sums(1.0, &pairs).cosine(), 1.0);
    }

    #[test]
    fn what_is_no_number_is_in_no_sum() {
        let mut sums = ElementSums::default();
        let met = [(f64::NAN, f64::NAN), (f64::INFINITY, f64::INFINITY), (f64::INFINITY, 1.0), (1.0, f64::NAN)]
            .map(|(a, b)| sums.add(a, b));
        assert_eq!(met, [Meeting::Same, Meeting::Same, Meeting::Broken, Meeting::Broken]);
        assert_eq!(sums.max_abs(), 0.0);
    }
}
