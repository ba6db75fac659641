//! The kernel distance: maximum mean discrepancy under a cubic kernel, unbiased at every number of images.
//!
//! Source: Bińkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401.

use super::{FeatureError, Features};
use faer::{Accum, Mat, Par, linalg::matmul::matmul};
use lathe_analysis::Random;

/// A kernel distance as the mean over subsets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kernel {
    /// The mean.
    pub mean: f64,
    /// The standard deviation between subsets; 0 where there is one.
    pub deviation: f64,
}

/// The kernel distance of `subsets` random subsets of `size` images of each set, drawn without replacement.
///
/// Sets that are no larger than `size` are taken whole. Needs two images of each; no subset counts as one.
pub fn kernel(a: &Features, b: &Features, subsets: usize, size: usize, seed: u64) -> Result<Kernel, FeatureError> {
    a.check(b, 2)?;
    let size = size.max(2);
    let whole = a.len() <= size && b.len() <= size;
    let mut random = Random::named(seed, "kernel distance");
    let mut values = Vec::new();
    for _ in 0..if whole { 1 } else { subsets.max(1) } {
        let (left, right) = (drawn(a, size, &mut random), drawn(b, size, &mut random));
        values.push(discrepancy(&left, &right));
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let deviation = if values.len() < 2 { 0.0 } else { (squares / (count - 1.0)).sqrt() };
    Ok(Kernel { mean, deviation })
}

/// The first `size` images of a random order, as rows.
fn drawn(features: &Features, size: usize, random: &mut Random) -> Mat<f64> {
    let mut order: Vec<usize> = (0..features.len()).collect();
    let size = size.min(order.len());
    if size < order.len() {
        for i in 0..size {
            let j = i + random.index(order.len() - i);
            order.swap(i, j);
        }
    }
    Mat::from_fn(size, features.width(), |i, j| features.row(order[i])[j])
}

/// `mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y)` over different images, with `k(a, b) = (a·b / d + 1)³`.
fn discrepancy(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let (n, m) = (a.nrows() as f64, b.nrows() as f64);
    let inside = |of: &Mat<f64>, n: f64| {
        let all = kernels(of, of);
        (0..all.nrows()).map(|i| (0..all.ncols()).filter(|&j| j != i).map(|j| all[(i, j)]).sum::<f64>()).sum::<f64>()
            / (n * (n - 1.0))
    };
    let between = kernels(a, b);
    let between: f64 = (0..between.ncols()).map(|j| between.col(j).iter().sum::<f64>()).sum::<f64>() / (n * m);
    inside(a, n) + inside(b, m) - 2.0 * between
}

fn kernels(a: &Mat<f64>, b: &Mat<f64>) -> Mat<f64> {
    let mut products = Mat::zeros(a.nrows(), b.nrows());
    matmul(products.as_mut(), Accum::Replace, a.as_ref(), b.transpose(), 1.0 / a.ncols() as f64, Par::Seq);
    Mat::from_fn(products.nrows(), products.ncols(), |i, j| (products[(i, j)] + 1.0).powi(3))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{from, moved, waves};
    use super::*;

    #[test]
    fn agrees_with_numpy() {
        let (a, b) = (waves(30, 8, 0.0), moved(&waves(20, 8, 0.4), 1.2, 0.1));
        let found = kernel(&a, &b, 10, 1000, 0).unwrap();
        assert!((found.mean - NUMPY).abs() < 1e-9 && found.deviation == 0.0, "{found:?}");
    }

    const NUMPY: f64 = -0.178_943_991_715_028_6;

    #[test]
    fn two_points_of_each_by_hand() {
        // k is (ab + 1)³ in one dimension: k(0, 1) = 1, k(0, ·) = 1, k(1, 2) = 27, k(1, 1) = 8.
        let (a, b) = (from(&[2, 1], vec![0.0, 1.0]), from(&[2, 1], vec![1.0, 2.0]));
        let expected = 1.0 + 27.0 - 2.0 * (1.0 + 1.0 + 8.0 + 27.0) / 4.0;
        assert!((kernel(&a, &b, 1, 1000, 0).unwrap().mean - expected).abs() < 1e-12);
    }

    #[test]
    fn subsets_scatter_about_the_whole() {
        let (a, b) = (waves(400, 4, 0.0), moved(&waves(400, 4, 0.0), 1.0, 0.2));
        let whole = kernel(&a, &b, 1, 400, 0).unwrap().mean;
        let found = kernel(&a, &b, 40, 50, 7).unwrap();
        assert!(found.deviation > 0.0);
        // Forty subsets: five standard errors.
        assert!((found.mean - whole).abs() < 5.0 * found.deviation / 40f64.sqrt(), "{found:?} {whole}");
        assert_eq!(found, kernel(&a, &b, 40, 50, 7).unwrap());
        assert_ne!(found, kernel(&a, &b, 40, 50, 8).unwrap());
    }
}
