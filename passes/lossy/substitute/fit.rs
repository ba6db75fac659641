//! Least squares from second moments: a factor per feature, or a layer, and what either loses.

use crate::lossy::spectrum::product;
use faer::{Mat, Side, prelude::Solve};
use lathe_analysis::Cross;

/// Parts of a feature's variance that are tried as what is added to it.
const RIDGES: [f64; 6] = [1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1];

/// Rows per feature that the fit of a layer needs.
const ROWS_PER_FEATURE: u64 = 10;

/// A map `x·matrix + bias`.
#[derive(Debug, Clone)]
pub(super) struct Fit {
    /// `[k, m]`.
    pub matrix: Mat<f64>,
    /// `[m]`.
    pub bias: Vec<f64>,
}

/// Means over rows of products of features `x: [k]` with themselves and with what is to be made of them, `y: [m]`.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    own: Mat<f64>,
    cross: Mat<f64>,
    x_mean: Vec<f64>,
    y_mean: Vec<f64>,
    y_square: Vec<f64>,
    rows: u64,
}

impl Moments {
    /// Of the moments of features with themselves, and with what is to be made.
    pub fn of(own: &Cross, with: &Cross) -> Moments {
        let (k, m) = (with.x_mean.len(), with.y_mean.len());
        Moments {
            own: Mat::from_fn(k, k, |i, j| own.matrix[i * k + j]),
            cross: Mat::from_fn(k, m, |i, j| with.matrix[i * m + j]),
            x_mean: with.x_mean.clone(),
            y_mean: with.y_mean.clone(),
            y_square: with.y_square.clone(),
            rows: with.rows.min(own.rows),
        }
    }

    /// Of some of the features.
    pub fn pick(&self, columns: &[usize]) -> Moments {
        Moments {
            own: Mat::from_fn(columns.len(), columns.len(), |i, j| self.own[(columns[i], columns[j])]),
            cross: Mat::from_fn(columns.len(), self.cross.ncols(), |i, j| self.cross[(columns[i], j)]),
            x_mean: columns.iter().map(|&i| self.x_mean[i]).collect(),
            ..self.clone()
        }
    }

    /// Whether there are rows, and all is finite.
    pub fn is_finite(&self) -> bool {
        let finite = |m: &Mat<f64>| m.is_all_finite();
        self.rows > 1 && finite(&self.own) && finite(&self.cross) && self.y_square.iter().all(|x| x.is_finite())
    }

    /// The mean square norm of a row of what is to be made.
    pub fn output(&self) -> f64 {
        self.y_square.iter().sum()
    }

    /// The same about its mean.
    pub fn variance(&self) -> f64 {
        self.output() - self.y_mean.iter().map(|mean| mean * mean).sum::<f64>()
    }

    /// What a map is off, as a mean of squares.
    pub fn lost(&self, fit: &Fit) -> f64 {
        let moved = product(self.own.as_ref(), fit.matrix.as_ref());
        let along = product(mean_row(&self.x_mean).as_ref(), fit.matrix.as_ref());
        let each = |j: usize| {
            let (t, own, cross) = (fit.matrix.col(j), moved.col(j), self.cross.col(j));
            let squares: f64 = t.iter().zip(own.iter()).map(|(t, g)| t * g).sum();
            let shared: f64 = t.iter().zip(cross.iter()).map(|(t, r)| t * r).sum();
            let b = fit.bias[j];
            self.y_square[j] - 2.0 * shared + squares + b * (b + 2.0 * (along[(0, j)] - self.y_mean[j]))
        };
        (0..fit.bias.len()).map(each).sum::<f64>().max(0.0)
    }

    fn constant(&self, matrix: &Mat<f64>) -> Vec<f64> {
        let along = product(mean_row(&self.x_mean).as_ref(), matrix.as_ref());
        self.y_mean.iter().enumerate().map(|(j, mean)| mean - along[(0, j)]).collect()
    }
}

fn mean_row(mean: &[f64]) -> Mat<f64> {
    Mat::from_fn(1, mean.len(), |_, i| mean[i])
}

/// A factor and a constant per feature; `None` unless there is one thing to make of each feature.
pub(super) fn factors(moments: &Moments) -> Option<Fit> {
    let k = moments.x_mean.len();
    if moments.y_mean.len() != k {
        return None;
    }
    let factor = |i: usize| {
        let variance = moments.own[(i, i)] - moments.x_mean[i] * moments.x_mean[i];
        let shared = moments.cross[(i, i)] - moments.x_mean[i] * moments.y_mean[i];
        // A feature that is constant up to rounding has no slope.
        if variance > 1e-12 * moments.own[(i, i)] { shared / variance } else { 0.0 }
    };
    let matrix = Mat::from_fn(k, k, |i, j| if i == j { factor(i) } else { 0.0 });
    let bias = moments.constant(&matrix);
    Some(Fit { matrix, bias })
}

/// A layer by ridge regression on features of equal variance, with the ridge that loses least on `held`, and what that is;
/// `None` if there are too few rows.
pub(super) fn layer(moments: &Moments, held: &Moments) -> Option<(Fit, f64)> {
    let (k, m) = (moments.x_mean.len(), moments.y_mean.len());
    if moments.rows < ROWS_PER_FEATURE * k as u64 {
        return None;
    }
    let covariance = |i: usize, j: usize| moments.own[(i, j)] - moments.x_mean[i] * moments.x_mean[j];
    let scale: Vec<f64> = (0..k)
        .map(|i| if covariance(i, i) > 1e-12 * moments.own[(i, i)] { 1.0 / covariance(i, i).sqrt() } else { 0.0 })
        .collect();
    let level = Mat::from_fn(k, k, |i, j| covariance(i, j) * scale[i] * scale[j]);
    let shared = Mat::from_fn(k, m, |i, j| (moments.cross[(i, j)] - moments.x_mean[i] * moments.y_mean[j]) * scale[i]);
    let mut best: Option<(Fit, f64)> = None;
    for ridge in RIDGES {
        let mut damped = level.clone();
        (0..k).for_each(|i| damped[(i, i)] += ridge + f64::MIN_POSITIVE);
        let Ok(solver) = damped.llt(Side::Lower) else { continue };
        let solved = solver.solve(shared.as_ref());
        let matrix = Mat::from_fn(k, m, |i, j| solved[(i, j)] * scale[i]);
        let fit = Fit { bias: moments.constant(&matrix), matrix };
        let lost = held.lost(&fit);
        if lost.is_finite() && best.as_ref().is_none_or(|(_, least)| lost < *least) {
            best = Some((fit, lost));
        }
    }
    best
}
