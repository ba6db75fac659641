//! The directions of a layer's output in the order of how much of them the calibration rows show.
//!
//! For a weight `W: [k, n]` and the second moments `G = XᵀX / rows: [k, k]`, the singular value decomposition of `L·W`
//! with `LᵀL = G` is the best approximation of the layer's *output* at every rank. Only `WᵀGW` is needed where `n ≤ k`,
//! and a Cholesky factor elsewhere; no factor is ever inverted, because the left factor is `W` times the right one.
//!
//! Source: Wang et al. 2024, SVD-LLM, arXiv:2403.07378.

use faer::{Accum, Mat, MatRef, Par, Side, linalg::matmul::matmul};

/// Share of the largest moment that is added to all, so that inputs that were never active can be factored.
const RIDGE: f64 = 1e-7;

/// The largest such share that is tried.
const LARGEST_RIDGE: f64 = 1e-3;

/// Directions below this share of the strongest one's energy are rounding.
const NEGLIGIBLE: f64 = 1e-13;

/// `W = left · rightᵀ`, strongest direction first.
pub(super) struct Spectrum {
    /// `W · right`, `[k, m]`.
    pub left: Mat<f64>,
    /// Orthonormal columns, `[n, m]`.
    pub right: Mat<f64>,
    /// Mean square of the output along every direction, `[m]`, falling.
    pub energy: Vec<f64>,
}

/// The product of two matrices on one thread.
pub(super) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    matmul(c.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

impl Spectrum {
    /// Of a weight `[k, n]` under the second moments of its rows, `[k, k]`; `None` if no decomposition converges.
    pub fn of(weight: MatRef<'_, f64>, gram: MatRef<'_, f64>) -> Option<Spectrum> {
        let (k, n) = (weight.nrows(), weight.ncols());
        let right = if n <= k {
            let statistics = product(weight.transpose(), product(gram, weight).as_ref());
            descending(statistics.as_ref())?.1
        } else {
            let strongest = (0..k).map(|i| gram[(i, i)]).fold(0.0, f64::max);
            let mut ridge = RIDGE;
            // Rounding of moments grows with their number: where fewer rows were seen than there are inputs, it can be more
            // than the least ridge.
            let lower = loop {
                let mut damped = gram.to_owned();
                (0..k).for_each(|i| damped[(i, i)] += ridge * strongest + f64::MIN_POSITIVE);
                match damped.llt(Side::Lower) {
                    Ok(lower) => break lower,
                    Err(_) if ridge < LARGEST_RIDGE => ridge *= 10.0,
                    Err(_) => return None,
                }
            };
            // `Y = RW` with `RᵀR = G`; its right directions are `Yᵀb / σ`.
            let whitened = product(lower.L().transpose(), weight);
            drop(lower);
            let (energy, basis) = descending(product(whitened.as_ref(), whitened.transpose()).as_ref())?;
            let kept = energy.iter().take_while(|&&e| e > NEGLIGIBLE * energy[0]).count();
            let mut right = product(whitened.transpose(), basis.as_ref().subcols(0, kept));
            for (i, e) in energy[..kept].iter().enumerate() {
                right.col_mut(i).iter_mut().for_each(|x| *x /= e.sqrt());
            }
            right
        };
        let left = product(weight, right.as_ref());
        let energy = energies(left.as_ref(), gram);
        Some(Spectrum { left, right, energy })
    }

    /// Number of directions.
    pub fn len(&self) -> usize {
        self.energy.len()
    }

    /// What the output loses in mean square where only the first `rank` directions are kept, `[m + 1]`.
    pub fn tails(energy: &[f64]) -> Vec<f64> {
        let mut tails = vec![0.0; energy.len() + 1];
        for i in (0..energy.len()).rev() {
            tails[i] = tails[i + 1] + energy[i].max(0.0);
        }
        tails
    }

    /// The same on other rows than those of the decomposition, which `gram` is of, `[m + 1]`.
    pub fn tails_under(&self, weight: MatRef<'_, f64>, gram: MatRef<'_, f64>) -> Vec<f64> {
        let own = energies(self.left.as_ref(), gram);
        let whole: f64 = energies(weight, gram).iter().sum();
        // Directions without energy are not among those kept; other rows may have some.
        let rest = (whole - own.iter().sum::<f64>()).max(0.0);
        Spectrum::tails(&own).into_iter().map(|tail| tail + rest).collect()
    }
}

/// Sums of a symmetric matrix from every index on, `[m + 1]`: of the squares of a sum where it holds the products of its
/// terms.
pub(super) fn tails_of_products(products: MatRef<'_, f64>) -> Vec<f64> {
    let m = products.nrows();
    let mut tails = vec![0.0; m + 1];
    for i in (0..m).rev() {
        let beside: f64 = (i + 1..m).map(|j| products[(i, j)]).sum();
        tails[i] = tails[i + 1] + products[(i, i)] + 2.0 * beside;
    }
    tails
}

/// `leftᵢᵀ · G · leftᵢ` of every column.
pub(super) fn energies(left: MatRef<'_, f64>, gram: MatRef<'_, f64>) -> Vec<f64> {
    let moved = product(gram, left);
    let dot = |i: usize| left.col(i).iter().zip(moved.col(i).iter()).map(|(a, b)| a * b).sum::<f64>();
    (0..left.ncols()).map(dot).collect()
}

/// Eigenvalues from the largest down, and their vectors.
pub(super) fn descending(matrix: MatRef<'_, f64>) -> Option<(Vec<f64>, Mat<f64>)> {
    let found = matrix.self_adjoint_eigen(Side::Lower).ok()?;
    let (values, vectors) = (found.S().column_vector(), found.U());
    let n = values.nrows();
    let sorted = Mat::from_fn(n, n, |row, column| vectors[(row, n - 1 - column)]);
    Some(((0..n).rev().map(|i| values[i]).collect(), sorted))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers in [-1, 1).
    pub fn random(rows: usize, columns: usize, seed: u64) -> Mat<f64> {
        let mut state = seed.wrapping_add(1);
        Mat::from_fn(rows, columns, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }

    pub fn gram(rows: &Mat<f64>) -> Mat<f64> {
        let mut gram = product(rows.as_ref().transpose(), rows.as_ref());
        gram *= faer::Scale(1.0 / rows.nrows() as f64);
        gram
    }

    fn lost(x: &Mat<f64>, w: &Mat<f64>, approximation: &Mat<f64>) -> f64 {
        let off = product(x.as_ref(), (w - approximation).as_ref());
        off.squared_norm_l2() / x.nrows() as f64
    }

    #[test]
    fn keeps_the_weight_and_tells_what_a_rank_loses() {
        for (k, n) in [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1)] {
            let (x, w) = (random(60, k, 1), random(k, n, 2));
            let found = Spectrum::of(w.as_ref(), gram(&x).as_ref()).unwrap();
            let whole = product(found.left.as_ref(), found.right.as_ref().transpose());
            assert!((&whole - &w).norm_max() < 1e-6, "{k} x {n}");
            let tails = Spectrum::tails(&found.energy);
            for (rank, tail) in tails.iter().enumerate() {
                let low =
                    product(found.left.as_ref().subcols(0, rank), found.right.as_ref().subcols(0, rank).transpose());
                let measured = lost(&x, &w, &low);
                assert!((measured - tail).abs() <= 1e-9 + 1e-6 * tails[0], "{k} x {n}, {rank}: {measured} {tail}");
                // No better than the output's own singular values allow, and as good as they allow.
                let values = product(x.as_ref(), w.as_ref()).thin_svd().unwrap();
                let least: f64 =
                    values.S().column_vector().iter().skip(rank).map(|s| s * s).sum::<f64>() / x.nrows() as f64;
                assert!((measured - least).abs() <= 1e-9 + 1e-6 * tails[0], "{k} x {n}, {rank}: {measured} {least}");
            }
        }
    }

    #[test]
    fn few_rows_and_inputs_that_were_never_active() {
        let mut x = random(4, 9, 3);
        (0..4).for_each(|row| x[(row, 2)] = 0.0);
        for n in [5, 14] {
            let w = random(9, n, 4);
            let found = Spectrum::of(w.as_ref(), gram(&x).as_ref()).unwrap();
            assert!(found.energy.iter().all(|e| e.is_finite()) && found.left.norm_max().is_finite());
            let low = product(found.left.as_ref().subcols(0, 4), found.right.as_ref().subcols(0, 4).transpose());
            assert!(lost(&x, &w, &low) < 1e-5 * found.energy[0], "four rows span four directions");
        }
    }

    #[test]
    fn moments_that_rounding_leaves_indefinite() {
        let (k, x) = (24, random(4, 24, 8));
        let noise = random(k, k, 9);
        let exact = gram(&x);
        let rounded = Mat::from_fn(k, k, |i, j| exact[(i, j)] + 1e-6 * (noise[(i, j)] + noise[(j, i)]));
        assert!(rounded.llt(Side::Lower).is_err());
        let w = random(k, 40, 10);
        let found = Spectrum::of(w.as_ref(), rounded.as_ref()).unwrap();
        let low = product(found.left.as_ref().subcols(0, 4), found.right.as_ref().subcols(0, 4).transpose());
        assert!(lost(&x, &w, &low) < 1e-4 * found.energy[0], "four rows span four directions");
        // What is no matrix of moments has no decomposition.
        let negative = Mat::from_fn(k, k, |i, j| if i == j { -1.0 } else { 0.0 });
        assert!(Spectrum::of(w.as_ref(), negative.as_ref()).is_none());
    }

    #[test]
    fn constant_rows_and_repeated_columns() {
        let constant = Mat::from_fn(50, 8, |_, column| 1.0 + column as f64);
        for n in [5, 12] {
            // A weight whose second half repeats the first has half the directions.
            let half = random(8, n, 6);
            let w = Mat::from_fn(8, 2 * n, |row, column| half[(row, column % n)]);
            let found = Spectrum::of(w.as_ref(), gram(&random(50, 8, 7)).as_ref()).unwrap();
            let tails = Spectrum::tails(&found.energy);
            assert!(tails.get(n).is_none_or(|&tail| tail < 1e-6 * tails[0]), "{n}: {tails:?}");
            // Rows that are all alike have one.
            let found = Spectrum::of(w.as_ref(), gram(&constant).as_ref()).unwrap();
            let low = product(found.left.as_ref().subcols(0, 1), found.right.as_ref().subcols(0, 1).transpose());
            assert!(lost(&constant, &w, &low) < 1e-5 * found.energy[0], "{n}");
            // None is left of them around their mean.
            let nothing = Mat::<f64>::zeros(8, 8);
            let found = Spectrum::of(w.as_ref(), nothing.as_ref()).unwrap();
            assert!(found.energy.iter().all(|e| e.abs() < 1e-12) && found.left.norm_max().is_finite(), "{n}");
        }
    }
}
