//! Leverage scores of feature rows and the choice made by them. Pure arithmetic: nothing is run here.
//!
//! Source: ScalSelect, arXiv:2602.11636. Rows with a high leverage span the dominant subspace of the pool. By leverage alone
//! near-duplicates of one outlier would all be chosen, so half of the choice is pivoted (each row for what the rows before
//! it leave over) and the other half is drawn evenly from the rest, which keeps means unbiased.

use faer::{Accum, Mat, MatRef, Par, Side, linalg::matmul::matmul};
use lathe_analysis::Random;
use std::collections::BTreeMap;

/// The subspace holds this share of the variance.
const SHARE: f64 = 0.9;

/// Wider features are projected to [`NARROW`] random directions first: the eigenproblem grows with the cube.
const WIDE: usize = 2048;
const NARROW: usize = 512;

/// One row of features for every sample.
pub(super) struct PooledFeatures {
    /// Features of one sample.
    pub(super) width: usize,
    /// All rows, one after another.
    pub(super) values: Vec<f32>,
}

/// The eigenvalues of the products of features were not found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the decomposition of the features did not converge")]
pub(crate) struct NotConverged;

/// What was chosen, by row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Selection {
    /// In ascending order.
    pub(super) chosen: Vec<usize>,
    /// Dimensions of the dominant subspace.
    pub(super) components: usize,
    /// The share of the pool's leverage that the chosen rows have.
    pub(super) coverage: f64,
    /// Rows equal to an earlier one.
    pub(super) duplicates: usize,
    /// Rows that hold something else than numbers; none of them is chosen.
    pub(super) broken: usize,
}

/// Rows in the dominant subspace, scaled so that the square of a row's length is its leverage.
struct Whitened {
    width: usize,
    values: Vec<f64>,
}

impl Whitened {
    fn row(&self, index: usize) -> &[f64] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    fn leverage(&self, index: usize) -> f64 {
        self.row(index).iter().map(|v| v * v).sum()
    }
}

impl PooledFeatures {
    fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }

    fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    /// Chooses `count` rows, or all that are not broken if there are fewer.
    pub(super) fn choose(&self, count: usize, seed: u64) -> Result<Selection, NotConverged> {
        let mut first: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
        let (mut distinct, mut copies, mut broken) = (Vec::new(), Vec::new(), 0);
        for index in 0..self.rows() {
            let row = self.row(index);
            if !row.iter().all(|v| v.is_finite()) {
                broken += 1;
            } else if first.insert(row.iter().map(|v| v.to_bits()).collect(), index).is_some() {
                copies.push(index);
            } else {
                distinct.push(index);
            }
        }
        let whitened = self.whitened(&distinct, seed)?;
        let mut random = Random::named(seed, "calibration");
        let mut picked = pivots(&whitened, distinct.len(), count.div_ceil(2).min(distinct.len()));
        let mut others: Vec<usize> = (0..distinct.len()).filter(|i| !picked.contains(i)).collect();
        while picked.len() < count && !others.is_empty() {
            picked.push(others.swap_remove(random.index(others.len())));
        }
        let total: f64 = (0..distinct.len()).map(|i| whitened.leverage(i)).sum();
        let covered: f64 = picked.iter().map(|&i| whitened.leverage(i)).sum();
        let coverage = if total > 0.0 { covered / total } else { 1.0 };
        let mut chosen: Vec<usize> = picked.iter().map(|&i| distinct[i]).collect();
        let duplicates = copies.len();
        while chosen.len() < count && !copies.is_empty() {
            chosen.push(copies.swap_remove(random.index(copies.len())));
        }
        chosen.sort_unstable();
        Ok(Selection { chosen, components: whitened.width, coverage, duplicates, broken })
    }

    /// The rows `kept`, centred, in the subspace of [`SHARE`] of their variance.
    fn whitened(&self, kept: &[usize], seed: u64) -> Result<Whitened, NotConverged> {
        let rows = kept.len();
        let mut z = self.narrow(kept, seed);
        let d = z.ncols();
        for column in 0..d {
            let mean = (0..rows).map(|i| z[(i, column)]).sum::<f64>() / rows.max(1) as f64;
            (0..rows).for_each(|i| z[(i, column)] -= mean);
        }
        if rows == 0 || d == 0 {
            return Ok(Whitened { width: 0, values: Vec::new() });
        }
        // ZᵀZ and ZZᵀ have the same eigenvalues other than zero; the smaller one is taken apart.
        let tall = rows >= d;
        let gram = if tall { product(z.transpose(), z.as_ref()) } else { product(z.as_ref(), z.transpose()) };
        let size = gram.nrows();
        let eigen = gram.self_adjoint_eigen(Side::Lower).map_err(|_| NotConverged)?;
        // They come in ascending order.
        let value = |j: usize| eigen.S().column_vector()[size - 1 - j];
        let vectors = eigen.U();
        let total: f64 = (0..size).map(|j| value(j).max(0.0)).sum();
        let mut width = 0;
        let mut sum = 0.0;
        while width < size && sum < SHARE * total && value(width) > total * 1e-14 {
            sum += value(width);
            width += 1;
        }
        // With fewer samples than directions every sample would be its own direction.
        let width = width.min((rows / 2).max(1));
        let dominant = vectors.subcols(size - width, width);
        let projected = if tall { product(z.as_ref(), dominant) } else { dominant.to_owned() };
        let scale = |j: usize| if tall { 1.0 / value(j).sqrt() } else { 1.0 };
        let whitened = |i: usize| (0..width).map(move |j| (i, j));
        let values = (0..rows).flat_map(whitened).map(|(i, j)| projected[(i, width - 1 - j)] * scale(j)).collect();
        Ok(Whitened { width, values })
    }

    /// The rows in float64, projected on random signs where they are very wide.
    fn narrow(&self, kept: &[usize], seed: u64) -> Mat<f64> {
        if self.width <= WIDE {
            return Mat::from_fn(kept.len(), self.width, |i, j| f64::from(self.row(kept[i])[j]));
        }
        let mut random = Random::named(seed, "projection");
        let signs: Vec<bool> = (0..self.width * NARROW).map(|_| random.below(2) == 0).collect();
        let mut z = Mat::zeros(kept.len(), NARROW);
        for (row, &index) in kept.iter().enumerate() {
            for (&value, signs) in self.row(index).iter().zip(signs.chunks_exact(NARROW)) {
                let value = f64::from(value);
                signs.iter().enumerate().for_each(|(j, &plus)| z[(row, j)] += if plus { value } else { -value });
            }
        }
        z
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// On one thread, so that the sums are the same in every run.
fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    matmul(c.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

/// `count` rows, each the one with the most left over after the ones before it; over again when nothing is left over.
fn pivots(whitened: &Whitened, rows: usize, count: usize) -> Vec<usize> {
    let width = whitened.width;
    let mut picked: Vec<usize> = Vec::with_capacity(count);
    let mut residual = whitened.values.clone();
    let mut fresh = true;
    while picked.len() < count {
        let rest = |i: usize| residual[i * width..(i + 1) * width].iter().map(|v| v * v).sum::<f64>();
        let open = (0..rows).filter(|i| !picked.contains(i)).map(|i| (rest(i), i));
        let Some((most, pivot)) = open.reduce(|a, b| if b.0 > a.0 { b } else { a }) else { break };
        if most < 1e-12 {
            if fresh {
                break;
            }
            residual.clone_from(&whitened.values);
            fresh = true;
            continue;
        }
        fresh = false;
        picked.push(pivot);
        let direction: Vec<f64> =
            residual[pivot * width..(pivot + 1) * width].iter().map(|v| v / most.sqrt()).collect();
        for row in residual.chunks_exact_mut(width) {
            let along = dot(row, &direction);
            row.iter_mut().zip(&direction).for_each(|(value, d)| *value -= along * d);
        }
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `plain` rows of small noise and, after them, one row along each of `rare` directions.
    fn planted(plain: usize, rare: usize, width: usize, seed: u64) -> PooledFeatures {
        let mut random = Random::new(seed);
        let mut values: Vec<f32> = (0..plain * width).map(|_| random.normal() as f32 * 0.05).collect();
        for direction in 0..rare {
            values.extend((0..width).map(|column| if column == direction { 10.0 } else { 0.0 }));
        }
        PooledFeatures { width, values }
    }

    #[test]
    fn rare_directions_are_found_where_chance_misses_them() {
        let (mut chosen_rare, mut random_rare) = (0, 0);
        for seed in 0..10 {
            let features = planted(240, 8, 24, seed);
            let choice = features.choose(24, seed).unwrap();
            assert_eq!(choice.chosen.len(), 24);
            assert!(choice.coverage > 0.9, "{choice:?}");
            chosen_rare += choice.chosen.iter().filter(|&&i| i >= 240).count();
            let mut random = Random::named(seed, "chance");
            let mut pool: Vec<usize> = (0..248).collect();
            random_rare += (0..24).map(|_| pool.swap_remove(random.index(pool.len()))).filter(|&i| i >= 240).count();
        }
        assert_eq!(chosen_rare, 80, "all eight, every time");
        assert!(random_rare < 20, "{random_rare}");
    }

    #[test]
    fn both_products_give_the_same_leverage() {
        let mut random = Random::new(3);
        let tall = PooledFeatures { width: 6, values: (0..40 * 6).map(|_| random.normal() as f32).collect() };
        let kept: Vec<usize> = (0..40).collect();
        let whitened = tall.whitened(&kept, 0).unwrap();
        let total: f64 = (0..40).map(|i| whitened.leverage(i)).sum();
        assert!((total - whitened.width as f64).abs() < 1e-9, "{total}");
        assert!((0..40).all(|i| (0.0..=1.0 + 1e-9).contains(&whitened.leverage(i))));
        // Columns of zeros make the same rows wide, so that the other product is taken.
        let wide = |i: usize| tall.row(i).iter().copied().chain([0.0; 60]).collect::<Vec<f32>>();
        let wide = PooledFeatures { width: 66, values: (0..40).flat_map(wide).collect() };
        let again = wide.whitened(&kept, 0).unwrap();
        assert_eq!(again.width, whitened.width);
        assert!((0..40).all(|i| (again.leverage(i) - whitened.leverage(i)).abs() < 1e-9));
    }

    #[test]
    fn equal_and_broken_rows_come_last_or_never() {
        let mut features = planted(10, 2, 4, 1);
        let repeated = features.row(10).to_vec();
        features.values.extend(repeated.repeat(5));
        features.values.extend([f32::NAN, 0.0, 0.0, 0.0]);
        let choice = features.choose(6, 1).unwrap();
        assert_eq!((choice.duplicates, choice.broken), (5, 1));
        assert!(choice.chosen.iter().all(|&i| i < 12), "{choice:?}");
        assert_eq!(features.choose(100, 1).unwrap().chosen, (0..17).collect::<Vec<_>>());
        assert_eq!(features.choose(6, 1), features.choose(6, 1));
    }

    #[test]
    fn pools_without_variance_are_drawn_from() {
        let one = PooledFeatures { width: 3, values: vec![1.0; 3] };
        assert_eq!(one.choose(4, 0).unwrap().chosen, [0]);
        let same = PooledFeatures { width: 2, values: vec![0.5; 20] };
        assert_eq!(same.choose(4, 0).unwrap().chosen.len(), 4);
        assert_eq!(PooledFeatures { width: 2, values: Vec::new() }.choose(4, 0).unwrap().chosen, Vec::<usize>::new());
    }

    #[test]
    fn very_wide_features_are_projected() {
        let choice = planted(30, 3, WIDE + 8, 2).choose(8, 2).unwrap();
        assert!([30, 31, 32].iter().all(|i| choice.chosen.contains(i)), "{choice:?}");
    }
}
