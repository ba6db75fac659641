//! Eigenvalues and eigenvectors of a symmetric matrix: Householder reflections to tridiagonal form, then QL iterations.

/// Rounds of QL for one eigenvalue before it is taken as it is; two or three are usual.
const MOST_ROUNDS: usize = 60;

/// The eigenvalues of the symmetric `matrix`, `[n, n]`, in descending order, and the eigenvectors as rows of `[n, n]`.
pub(super) fn eigen(mut matrix: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    assert_eq!(matrix.len(), n * n, "the matrix is square");
    let (mut diagonal, mut beside) = (vec![0.0; n], vec![0.0; n]);
    if n > 0 {
        tridiagonal(&mut matrix, n, &mut diagonal, &mut beside);
        // Rotations mix two columns of the basis: as rows of its transpose they lie together in memory.
        let mut basis = vec![0.0; n * n];
        for row in 0..n {
            for column in 0..n {
                basis[column * n + row] = matrix[row * n + column];
            }
        }
        iterate(&mut basis, n, &mut diagonal, &mut beside);
        matrix = basis;
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
    let vectors = order.iter().flat_map(|&i| matrix[i * n..(i + 1) * n].iter().copied()).collect();
    (order.iter().map(|&i| diagonal[i]).collect(), vectors)
}

/// Replaces `a` by the orthogonal matrix that brings it to tridiagonal form, whose diagonal is `d` and subdiagonal `e[1..]`.
fn tridiagonal(a: &mut [f64], n: usize, d: &mut [f64], e: &mut [f64]) {
    for i in (1..n).rev() {
        let scale: f64 = a[i * n..i * n + i].iter().map(|v| v.abs()).sum();
        if i == 1 || scale == 0.0 {
            e[i] = a[i * n + i - 1];
            d[i] = 0.0;
            continue;
        }
        let mut h = 0.0;
        for value in &mut a[i * n..i * n + i] {
            *value /= scale;
            h += *value * *value;
        }
        let f = a[i * n + i - 1];
        let g = if f >= 0.0 { -h.sqrt() } else { h.sqrt() };
        e[i] = scale * g;
        h -= f * g;
        a[i * n + i - 1] = f - g;
        let mut sum = 0.0;
        for j in 0..i {
            a[j * n + i] = a[i * n + j] / h;
            let mut g = 0.0;
            for k in 0..=j {
                g += a[j * n + k] * a[i * n + k];
            }
            for k in j + 1..i {
                g += a[k * n + j] * a[i * n + k];
            }
            e[j] = g / h;
            sum += e[j] * a[i * n + j];
        }
        let half = sum / (h + h);
        for j in 0..i {
            let f = a[i * n + j];
            e[j] -= half * f;
            let g = e[j];
            for k in 0..=j {
                a[j * n + k] -= f * e[k] + g * a[i * n + k];
            }
        }
        d[i] = h;
    }
    (d[0], e[0]) = (0.0, 0.0);
    for i in 0..n {
        if d[i] != 0.0 {
            for j in 0..i {
                let g: f64 = (0..i).map(|k| a[i * n + k] * a[k * n + j]).sum();
                for k in 0..i {
                    a[k * n + j] -= g * a[k * n + i];
                }
            }
        }
        d[i] = a[i * n + i];
        a[i * n + i] = 1.0;
        for j in 0..i {
            a[j * n + i] = 0.0;
            a[i * n + j] = 0.0;
        }
    }
}

/// Brings the tridiagonal matrix to diagonal form, turning the rows of `basis` with it.
fn iterate(basis: &mut [f64], n: usize, d: &mut [f64], e: &mut [f64]) {
    e.rotate_left(1);
    for l in 0..n {
        for _ in 0..MOST_ROUNDS {
            let small = |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let mut g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut r = g.hypot(1.0);
            g = d[m] - d[l] + e[l] / (g + r.copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut split = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    split = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                let (upper, lower) = basis.split_at_mut((i + 1) * n);
                for (x, y) in upper[i * n..].iter_mut().zip(&mut lower[..n]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
            if !split {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_analysis::Random;

    /// Holds eigenvectors to `A v = λ v` and to being orthonormal.
    fn check(a: &[f64], n: usize) -> Vec<f64> {
        let (values, vectors) = eigen(a.to_vec(), n);
        let size = a.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-300);
        assert!(values.is_sorted_by(|x, y| x >= y), "{values:?}");
        for i in 0..n {
            let v = &vectors[i * n..(i + 1) * n];
            for row in 0..n {
                let product: f64 = (0..n).map(|k| a[row * n + k] * v[k]).sum();
                assert!((product - values[i] * v[row]).abs() < 1e-12 * size * n as f64);
            }
            for j in 0..n {
                let dot: f64 = v.iter().zip(&vectors[j * n..]).map(|(x, y)| x * y).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12 * n as f64);
            }
        }
        values
    }

    #[test]
    fn random_and_degenerate_matrices() {
        let mut random = Random::new(7);
        for n in [1, 2, 3, 17, 64] {
            let mut a = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..=i {
                    let value = random.normal();
                    (a[i * n + j], a[j * n + i]) = (value, value);
                }
            }
            let values = check(&a, n);
            let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
            assert!((values.iter().sum::<f64>() - trace).abs() < 1e-10 * n as f64);
        }
        assert_eq!(check(&[2.0, 0.0, 0.0, 5.0], 2), [5.0, 2.0]);
        check(&[1.0; 25], 5);
        check(&[0.0; 9], 3);
        assert!(eigen(Vec::new(), 0).0.is_empty());
    }
}
