//! What a model does on a calibration set, without knowing who ran it.

use crate::{EvaluateError, Rows, Spread};
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

/// How large the numbers of every feature are: how many of them, and how much of their squares, lie below each step of a
/// ladder of magnitudes.
#[derive(Debug, Clone, PartialEq)]
pub struct Magnitudes {
    /// Share of the rows whose number is smaller in size than each of [`Magnitudes::steps`], `[steps, k]`.
    pub share_below: Vec<f64>,
    /// Sums of the squares of these over the rows, as a mean over all rows, `[steps, k]`.
    pub square_below: Vec<f64>,
    /// Mean squares of all numbers, `[k]`.
    pub square: Vec<f64>,
    /// Rows that count.
    pub rows: u64,
}

/// What lies below a threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Below {
    /// The share of the numbers.
    pub share: f64,
    /// Their squares, each times its factor, summed over features: a mean over the rows.
    pub square: f64,
}

impl Magnitudes {
    /// The ladder: zeros alone, then whole octaves.
    pub fn steps() -> Vec<f64> {
        std::iter::once(f64::from(f32::MIN_POSITIVE)).chain((-22..10).map(|octave| 2f64.powi(octave))).collect()
    }

    /// Features.
    pub fn features(&self) -> usize {
        self.square.len()
    }

    /// A magnitude that at least `share` of a feature's rows lie below: one of the ladder, or infinity.
    pub fn bound(&self, feature: usize, share: f64) -> f64 {
        let reached = |step: &usize| self.share_below[step * self.features() + feature] >= share;
        let steps = Magnitudes::steps();
        (0..steps.len()).find(reached).map_or(f64::INFINITY, |step| steps[step])
    }

    /// What lies below a threshold where every feature is multiplied by its `scale` before it is compared, and its square
    /// by the square of its `norm`. Within an octave, numbers count as spread evenly.
    pub fn below(&self, threshold: f64, scale: &[f64], norm: &[f64]) -> Below {
        let (steps, k) = (Magnitudes::steps(), self.features());
        let mut sum = Below { share: 0.0, square: 0.0 };
        for feature in 0..k {
            let limit = threshold / scale[feature];
            if limit.is_infinite() {
                sum.share += 1.0 / k as f64;
                sum.square += self.square[feature] * norm[feature].powi(2);
                continue;
            }
            let above = steps.partition_point(|&step| step <= limit);
            let at = |table: &[f64], step: usize| table[step * k + feature];
            let known = |table: &[f64]| above.checked_sub(1).map_or(0.0, |step| at(table, step));
            let (mut share, mut square) = (known(&self.share_below), known(&self.square_below));
            if above < steps.len() && limit > 0.0 {
                let low = above.checked_sub(1).map_or(0.0, |step| steps[step]);
                let part =
                    |power: i32| (limit.powi(power) - low.powi(power)) / (steps[above].powi(power) - low.powi(power));
                share += (at(&self.share_below, above) - share) * part(1);
                square += (at(&self.square_below, above) - square) * part(3);
            }
            sum.share += share / k as f64;
            sum.square += square * norm[feature].powi(2);
        }
        sum
    }

    /// The largest threshold below which the squares are at most `limit`, to a part in a million; as for
    /// [`Magnitudes::below`].
    pub fn threshold(&self, limit: f64, scale: &[f64], norm: &[f64]) -> f64 {
        let top = Magnitudes::steps().last().copied().unwrap_or(1.0);
        let (mut low, mut high) = (0.0, top * scale.iter().copied().fold(0.0, f64::max));
        for _ in 0..64 {
            let middle = (low + high) / 2.0;
            if self.below(middle, scale, norm).square <= limit { low = middle } else { high = middle }
        }
        low
    }
}

/// What a calibration says that only has numbers of runs in the past.
fn unable() -> EvaluateError {
    EvaluateError { message: "no model can be run on the calibration set here".to_owned() }
}

/// Statistics of the model that is being compressed, over its calibration set. What needs runs of its own is an error
/// unless it is implemented.
pub trait Calibrate {
    /// Second moments of a value of the original model; `None` if they were not collected.
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError>;

    /// Mean squares of a value of the original model; `None` if they were not collected.
    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError>;

    /// Second moments of samples that [`Calibrate::gram`] was not taken over, by which what is fitted to that is judged;
    /// `None` where no sample is held out, or they were not collected.
    fn held_gram(&self, _rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(None)
    }

    /// Mean squares of the same samples, in the same way.
    fn held_moments(&self, _rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        Ok(None)
    }

    /// What everything that is told here follows from: model, samples and how they are run; `None` where that is not known.
    fn identity(&self) -> Option<[u8; 32]> {
        None
    }

    /// Whether trials run on samples that fits do not see.
    fn holds_out(&self) -> bool {
        true
    }

    /// The mean cosine between rows of two values of the model that is being compressed, of one shape each, for every
    /// pair, over the calibration samples that trials do not run on.
    fn cosines(&self, _pairs: &[(Rows, Rows)]) -> Result<Vec<f64>, EvaluateError> {
        Err(unable())
    }

    /// Second moments between values of `model`, the one that is being compressed or a variant of it without gates, over
    /// the calibration samples that trials do not run on, or as many of them as give enough rows.
    fn cross(&self, _model: &Model, _pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        Err(unable())
    }

    /// The same over the samples that trials run on, which fits have not seen.
    fn held_out(&self, _model: &Model, _pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        Err(unable())
    }

    /// Floating-point operations of one run of the model over the samples of trials; 0 where that is not known.
    fn trial_flops(&self) -> f64 {
        0.0
    }

    /// How far the outputs of `variant` are from those of the model that is being compressed, once for every assignment
    /// of its gates: inputs that it has more, each one number of float32. Without any, one empty assignment runs it once.
    ///
    /// The mean over some calibration samples, in the unit of sensitivity times squared error; infinite where outputs
    /// are not finite.
    fn trials(&self, _variant: &Model, _gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        Err(unable())
    }

    /// The same for several variants without gates.
    fn trials_of(&self, variants: &[Model]) -> Result<Vec<f64>, EvaluateError> {
        let one = |variant: &Model| Ok(self.trials(variant, &[Vec::new()])?.first().copied().unwrap_or(f64::INFINITY));
        variants.iter().map(one).collect()
    }

    /// How large the numbers of a value of the original model are; `None` if that was not collected, as by
    /// default.
    fn magnitudes(&self, _rows: &Rows) -> Result<Option<Magnitudes>, EvaluateError> {
        Ok(None)
    }

    /// How the numbers of a value of the original model are spread; `None` if that was not collected, as by default.
    fn spread(&self, _rows: &Rows) -> Result<Option<Spread>, EvaluateError> {
        Ok(None)
    }

    /// The least and the largest number of every feature, of what was counted for [`Calibrate::spread`]; `None` if that was
    /// not collected.
    fn extremes(&self, _rows: &Rows) -> Result<Option<Vec<(f64, f64)>>, EvaluateError> {
        Ok(None)
    }

    /// How the numbers of values of `model` are spread, a variant of the one that is being compressed without gates, over the
    /// same samples; `None` for a value with no finite number.
    fn spreads_of(&self, _model: &Model, _rows: &[Rows]) -> Result<Vec<Option<Spread>>, EvaluateError> {
        Err(unable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the ladder shows of these rows.
    fn magnitudes(rows: &[&[f64]]) -> Magnitudes {
        let (k, count) = (rows[0].len(), rows.len() as f64);
        let mut found =
            Magnitudes { share_below: vec![], square_below: vec![], square: vec![0.0; k], rows: rows.len() as u64 };
        for step in Magnitudes::steps() {
            for feature in 0..k {
                let below = rows.iter().map(|row| row[feature]).filter(|x| x.abs() < step);
                found.share_below.push(below.clone().count() as f64 / count);
                found.square_below.push(below.map(|x| x * x).sum::<f64>() / count);
            }
        }
        for row in rows {
            found.square.iter_mut().zip(*row).for_each(|(sum, x)| *sum += x * x / count);
        }
        found
    }

    #[test]
    fn what_lies_below_a_step_is_exact_and_between_steps_it_is_spread() {
        let found = magnitudes(&[&[0.0, 1.0], &[0.25, -3.0], &[0.25, 3.0], &[0.0, 100.0]]);
        let ones = [1.0, 1.0];
        let below = |threshold: f64, scale: &[f64]| found.below(threshold, scale, &ones);
        assert_eq!(below(0.5, &ones), Below { share: 0.5, square: 0.03125 });
        // Zeros lie below everything.
        assert!((below(1e-30, &ones).share - 0.25).abs() < 1e-9);
        assert_eq!(below(4.0, &ones).share, 7.0 / 8.0);
        assert_eq!(below(3.0, &ones).share, (4.0 + 1.0 + 0.5 * 2.0) / 8.0);
        assert_eq!(below(8.0, &[1.0, 4.0]).share, 5.0 / 8.0);
        assert_eq!(below(0.5, &ones).square, 0.03125);
        assert_eq!(found.below(0.5, &ones, &[4.0, 1.0]).square, 0.5);
        assert_eq!((found.bound(0, 0.999), found.bound(1, 0.75), found.bound(1, 0.8)), (0.5, 4.0, 128.0));
    }

    #[test]
    fn a_threshold_is_the_largest_that_keeps_to_the_limit() {
        let found = magnitudes(&[&[1.5, 0.1], &[-0.3, 0.2], &[0.7, 0.3], &[5.0, 0.4]]);
        let norm = [1.0, 2.0];
        for limit in [0.01, 0.1, 1.0] {
            let threshold = found.threshold(limit, &norm, &norm);
            let square = |factor: f64| found.below(threshold * factor, &norm, &norm).square;
            assert!(square(1.0) <= limit && square(1.0001) > limit, "{limit}: {threshold}");
        }
        // More than there is: every number lies below.
        assert_eq!(found.below(found.threshold(1e9, &norm, &norm), &norm, &norm).share, 1.0);
    }
}
