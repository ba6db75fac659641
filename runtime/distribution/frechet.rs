//! The Fréchet distance of two normal distributions that are fitted to features.
//!
//! Source: Heusel et al. 2017, GANs trained by a two time-scale update rule, arXiv:1706.08500.

use super::{FeatureError, Features};
use faer::{Accum, Mat, MatRef, Par, Side, linalg::matmul::matmul};

/// `‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½`, covariances with the divisor `n − 1`.
///
/// Falls with the number of images even where both sets are drawn from one distribution: compare equal numbers only.
/// Needs two images of each.
pub fn frechet(a: &Features, b: &Features) -> Result<f64, FeatureError> {
    a.check(b, 2)?;
    let gap: f64 = a.mean().iter().zip(b.mean()).map(|(x, y)| (x - y) * (x - y)).sum();
    let (left, right) = (centred(a), centred(b));
    let spread = left.squared_norm_l2() + right.squared_norm_l2();
    // Each form decomposes matrices of another size.
    let few = a.len().max(b.len()) < a.width();
    let shared = if few { trace_of_rows(&left, &right)? } else { trace_of_covariances(&left, &right)? };
    Ok(gap + spread - 2.0 * shared)
}

/// Rows without their mean, over `√(n − 1)`: `[n, d]`, so that `AᵀA` is the covariance.
fn centred(features: &Features) -> Mat<f64> {
    let (mean, scale) = (features.mean(), 1.0 / (features.len() as f64 - 1.0).sqrt());
    Mat::from_fn(features.len(), features.width(), |i, j| (features.row(i)[j] - mean[j]) * scale)
}

fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    matmul(c.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

/// `tr (Σ₁Σ₂)^½` as the sum of the singular values of `ABᵀ`, `[n₁, n₂]`: for fewer images than features.
fn trace_of_rows(a: &Mat<f64>, b: &Mat<f64>) -> Result<f64, FeatureError> {
    let values = product(a.as_ref(), b.transpose()).singular_values();
    Ok(values.map_err(|_| FeatureError::Decomposition)?.iter().sum())
}

/// The same as `tr (RΣ₂R)^½` with `R = Σ₁^½`, `[d, d]`, by eigenvalues of symmetric matrices only.
fn trace_of_covariances(a: &Mat<f64>, b: &Mat<f64>) -> Result<f64, FeatureError> {
    let failed = |_| FeatureError::Decomposition;
    let (first, second) = (product(a.transpose(), a.as_ref()), product(b.transpose(), b.as_ref()));
    let eigen = first.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let (values, vectors) = (eigen.S().column_vector(), eigen.U());
    // Rounding makes the eigenvalues of directions without variance a little negative.
    let scaled = Mat::from_fn(vectors.nrows(), vectors.ncols(), |i, j| vectors[(i, j)] * values[j].max(0.0).sqrt());
    let root = product(scaled.as_ref(), vectors.transpose());
    let inner = product(product(root.as_ref(), second.as_ref()).as_ref(), root.as_ref());
    let values = inner.self_adjoint_eigenvalues(Side::Lower).map_err(failed)?;
    Ok(values.iter().map(|v| v.max(0.0).sqrt()).sum())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{from, moved, waves};
    use super::*;

    #[test]
    fn moved_and_scaled_sets_have_closed_forms() {
        let (n, d) = (40, 6);
        let a = waves(n, d, 0.0);
        assert!(frechet(&a, &a).unwrap().abs() < 1e-9);
        // Equal covariances leave the distance of the means.
        assert!((frechet(&a, &moved(&a, 1.0, 0.5)).unwrap() - 0.25 * d as f64).abs() < 1e-9);
        // Scaling by 3 about the mean leaves (3 − 1)² tr Σ, about zero also what the mean moves.
        let spread = centred(&a).squared_norm_l2();
        let mean: f64 = a.mean().iter().map(|m| m * m).sum();
        assert!((frechet(&a, &moved(&a, 3.0, 0.0)).unwrap() - 4.0 * (spread + mean)).abs() < 1e-8);
    }

    #[test]
    fn both_forms_agree_with_numpy() {
        // Whichever form is chosen, the other gives the same.
        for (n, d, expected) in [(50, 8, MANY), (10, 24, FEW)] {
            let (a, b) = (waves(n, d, 0.0), moved(&waves(n, d, 0.4), 1.2, 0.1));
            let found = frechet(&a, &b).unwrap();
            assert!((found - expected).abs() < 1e-6 * expected, "{n} {d}: {found}");
            let (left, right) = (centred(&a), centred(&b));
            let (rows, covariances) =
                (trace_of_rows(&left, &right).unwrap(), trace_of_covariances(&left, &right).unwrap());
            assert!((rows - covariances).abs() < 1e-6 * rows, "{n} {d}: {rows} {covariances}");
        }
    }

    // NumPy: `eigvals` of the product of both `np.cov`, and, where those are singular, `svd` of the product of the rows.
    const MANY: f64 = 0.254_664_884_435;
    const FEW: f64 = 0.908_766_156_41;

    #[test]
    fn too_few_images_are_refused() {
        let one = from(&[1, 2], vec![0.0, 1.0]);
        assert_eq!(frechet(&one, &one), Err(FeatureError::Few { found: 1, expected: 2 }));
        let wide = from(&[2, 3], vec![0.0; 6]);
        let narrow = from(&[2, 2], vec![0.0; 4]);
        assert_eq!(frechet(&wide, &narrow), Err(FeatureError::Width { found: 2, expected: 3 }));
    }
}
