//! Rounding where the numbers that follow make up for what those before them lose of the product.
//!
//! For a weight `W: [k, n]` and the second moments `H = XᵀX / rows: [k, k]`, rows of `W` are rounded one after the other,
//! and what one loses is taken off those that are left along `H⁻¹`. Rows whose inputs are strong come first; scales stay
//! those of the blocks of the stored order, so that files need no permutation. Rounding row by row is exact:
//! `tr((W − Ŵ)ᵀH(W − Ŵ)) = Σ ‖e‖²`. Then scales move to where their codes lose least, and single codes by one where
//! that loses less.
//!
//! Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323.

use super::integers::{Blocks, Layout, Scheme};
use faer::{
    Accum, Mat, MatMut, MatRef, Par, Side,
    linalg::{matmul::matmul, triangular_inverse::invert_lower_triangular},
};

/// Share of the mean moment that is added to all of them: what the set did not show must not be traded away.
const DAMPING: f64 = 0.01;

/// The largest such share that is tried.
const MOST_DAMPING: f64 = 10.0;

/// Rows whose errors reach the rows behind them at once, in one product of matrices.
const ROWS: usize = 128;

/// Columns that are worked on at a time, so that their rows stay near the processor.
const COLUMNS: usize = 1024;

/// Times that scales and codes are gone through after rounding.
const SWEEPS: usize = 2;

/// How rows of a weight make up for each other.
pub(super) struct Gptq {
    /// Rows in the order in which they are rounded.
    order: Vec<usize>,
    /// `U: [k, k]` with `H⁻¹ = UᵀU` in that order, upper triangular, row by row.
    upper: Vec<f32>,
    /// The damped `H: [k, k]` in the order of the weight.
    moments: Vec<f32>,
}

impl Gptq {
    /// Under the second moments of what a weight is multiplied with, `[k, k]`; `None` where they tell nothing.
    pub fn new(moments: MatRef<'_, f64>) -> Option<Gptq> {
        let k = moments.nrows();
        let mean = (0..k).map(|i| moments[(i, i)]).sum::<f64>() / k.max(1) as f64;
        if !mean.is_finite() || mean <= 0.0 {
            return None;
        }
        let mut order: Vec<usize> = (0..k).collect();
        order.sort_by(|&a, &b| moments[(b, b)].total_cmp(&moments[(a, a)]));
        // From the last row on, `H = R·Rᵀ` with `R` upper, and `U = R⁻¹`: the inverse of `H` itself is never formed.
        let at = |i: usize| order[k - 1 - i];
        let mut damping = DAMPING;
        let damped = |damping: f64, (i, j): (usize, usize)| moments[(i, j)] + if i == j { damping * mean } else { 0.0 };
        let lower = loop {
            match Mat::from_fn(k, k, |i, j| damped(damping, (at(i), at(j)))).llt(Side::Lower) {
                Ok(found) => break found,
                Err(_) if damping < MOST_DAMPING => damping *= 10.0,
                Err(_) => return None,
            }
        };
        let mut inverse = Mat::<f64>::zeros(k, k);
        invert_lower_triangular(inverse.as_mut(), lower.L(), Par::Seq);
        let mut upper = vec![0f32; k * k];
        for i in 0..k {
            for j in i..k {
                upper[i * k + j] = inverse[(k - 1 - i, k - 1 - j)] as f32;
            }
        }
        let moments: Vec<f32> = (0..k * k).map(|place| damped(damping, (place / k, place % k)) as f32).collect();
        upper.iter().chain(&moments).all(|u| u.is_finite()).then_some(Gptq { order, upper, moments })
    }

    /// Bytes that it takes, and that rounding a weight `[k, n]` by it takes.
    pub fn working_bytes((k, n): (usize, usize)) -> u64 {
        let (k, n) = (k as u64, n.min(COLUMNS) as u64);
        2 * 4 * k * k + 4 * (k + ROWS as u64) * n + 3 * 8 * k * k
    }

    /// Rounds `matrix` to codes of the scales that `blocks` has, in place of its codes.
    pub fn round(&self, matrix: &[f32], layout: Layout, scheme: Scheme, blocks: &mut Blocks) {
        self.round_and_sweep(matrix, (layout, scheme), blocks, SWEEPS);
    }

    fn round_and_sweep(&self, matrix: &[f32], (layout, scheme): (Layout, Scheme), blocks: &mut Blocks, sweeps: usize) {
        let columns = layout.outer * layout.inner;
        let mut rows = vec![0f32; self.order.len() * columns.min(COLUMNS)];
        let mut errors = vec![0f32; ROWS * columns.min(COLUMNS)];
        for first in (0..columns).step_by(COLUMNS) {
            let width = COLUMNS.min(columns - first);
            let chunk = Chunk { matrix, layout, scheme, first, width };
            chunk.round(self, blocks, &mut rows, &mut errors);
            (0..width).filter(|_| sweeps > 0).for_each(|column| chunk.refine(self, blocks, column, sweeps));
        }
    }
}

/// `sums + factor · numbers`.
fn add(sums: &mut [f32], factor: f32, numbers: &[f32]) {
    sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += factor * number);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Some neighbouring columns of a weight.
struct Chunk<'a> {
    matrix: &'a [f32],
    layout: Layout,
    scheme: Scheme,
    first: usize,
    width: usize,
}

impl Chunk<'_> {
    /// Where a number is stored.
    fn at(&self, row: usize, column: usize) -> usize {
        let Layout { length, inner, .. } = self.layout;
        let column = self.first + column;
        (column / inner * length + row) * inner + column % inner
    }

    /// Where the scale of a number is stored.
    fn scale_at(&self, row: usize, column: usize) -> usize {
        let Layout { length, inner, .. } = self.layout;
        let (column, count) = (self.first + column, length.div_ceil(self.scheme.block));
        (column / inner * count + row / self.scheme.block) * inner + column % inner
    }

    fn round(&self, gptq: &Gptq, blocks: &mut Blocks, rows: &mut [f32], errors: &mut [f32]) {
        let (k, width) = (gptq.order.len(), self.width);
        let range = self.scheme.range();
        for (place, &row) in gptq.order.iter().enumerate() {
            let numbers = &mut rows[place * width..][..width];
            numbers.iter_mut().enumerate().for_each(|(column, w)| *w = self.matrix[self.at(row, column)]);
        }
        for start in (0..k).step_by(ROWS) {
            let end = k.min(start + ROWS);
            for place in start..end {
                let row = gptq.order[place];
                let factors = &gptq.upper[place * k..][..k];
                let (done, rest) = rows.split_at_mut((place + 1) * width);
                let numbers = &done[place * width..];
                let error = &mut errors[(place - start) * width..][..width];
                for (column, (&w, error)) in numbers.iter().zip(error.iter_mut()).enumerate() {
                    let grid = blocks.grid(self.scale_at(row, column));
                    let code = grid.code(w, range);
                    blocks.codes[self.at(row, column)] = code as i8;
                    *error = (w - grid.number(code)) / factors[place];
                }
                for (later, numbers) in (place + 1..end).zip(rest.chunks_exact_mut(width)) {
                    let factor = factors[later];
                    numbers.iter_mut().zip(error.iter()).for_each(|(w, e)| *w -= factor * e);
                }
            }
            let factors = MatRef::from_row_major_slice(&gptq.upper, k, k).submatrix(start, end, end - start, k - end);
            let rest = MatMut::from_row_major_slice_mut(&mut rows[end * width..k * width], k - end, width);
            let errors = MatRef::from_row_major_slice(&errors[..(end - start) * width], end - start, width);
            matmul(rest, Accum::Add, factors.transpose(), errors, -1.0, Par::Seq);
        }
    }
}

impl Chunk<'_> {
    /// Lowers `eᵀHe` of one column, `e = ŵ − w`, one scale and one code after the other; nothing is taken that does not
    /// lower it.
    fn refine(&self, gptq: &Gptq, blocks: &mut Blocks, column: usize, sweeps: usize) {
        let k = gptq.order.len();
        let row = |i: usize| &gptq.moments[i * k..][..k];
        let (low, high) = self.scheme.range();
        let off = |blocks: &Blocks, i: usize| {
            let number = blocks.grid(self.scale_at(i, column)).number(f32::from(blocks.codes[self.at(i, column)]));
            number - self.matrix[self.at(i, column)]
        };
        // What a change of every number would add, halved: `He`.
        let mut slopes = vec![0f32; k];
        (0..k).for_each(|i| add(&mut slopes, off(blocks, i), row(i)));
        let mut moved = vec![0f32; k];
        for _ in 0..sweeps {
            for start in (0..k).step_by(self.scheme.block.min(k)) {
                let rows = start..k.min(start.saturating_add(self.scheme.block));
                let place = self.scale_at(start, column);
                let grid = blocks.grid(place);
                let steps: Vec<f32> =
                    rows.clone().map(|i| f32::from(blocks.codes[self.at(i, column)]) - grid.zero).collect();
                moved.fill(0.0);
                rows.clone()
                    .zip(&steps)
                    .filter(|(_, step)| **step != 0.0)
                    .for_each(|(i, &step)| add(&mut moved, step, row(i)));
                let (slope, curve) = (dot(&steps, &slopes[rows.clone()]), dot(&steps, &moved[rows]));
                let scale = grid.scale - slope / curve;
                // What is left of a scale after rounding is a small change of it.
                if scale.is_finite() && scale / grid.scale > 0.5 && scale / grid.scale < 2.0 {
                    add(&mut slopes, scale - grid.scale, &moved);
                    blocks.scales[place] = scale;
                }
            }
            for &i in &gptq.order {
                let step = blocks.scales[self.scale_at(i, column)];
                let code = &mut blocks.codes[self.at(i, column)];
                let up = if slopes[i] * step < 0.0 { 1.0 } else { -1.0 };
                let moved = f32::from(*code) + up;
                let gain = 2.0 * up * step * slopes[i] + step * step * gptq.moments[i * k + i];
                if gain < 0.0 && (low..=high).contains(&moved) {
                    *code = moved as i8;
                    add(&mut slopes, up * step, row(i));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        integers::quantize,
        spectrum::{
            energies,
            tests::{gram, random},
        },
    };
    use super::*;

    /// One scale of 1 for each of `n` columns.
    fn whole_numbers(k: usize, n: usize) -> (Layout, Scheme, Blocks) {
        let layout = Layout { outer: n, length: k, inner: 1, axis: 1 };
        let scheme = Scheme::new(8, usize::MAX);
        (layout, scheme, Blocks { codes: vec![0; n * k], scales: vec![1.0; n], zeros: Vec::new() })
    }

    fn lost(matrix: &[f32], blocks: &Blocks, (k, n): (usize, usize), moments: MatRef<'_, f64>) -> f64 {
        let off = |row: usize, column: usize| {
            let at = column * k + row;
            f64::from(matrix[at] - f32::from(blocks.codes[at]) * blocks.scales[at * blocks.scales.len() / (n * k)])
        };
        energies(Mat::from_fn(k, n, off).as_ref(), moments).iter().sum()
    }

    #[test]
    fn the_second_number_makes_up_for_the_first() {
        let moments = Mat::from_fn(2, 2, |i, j| if i == j { 2.0 } else { 1.0 });
        let (layout, scheme, mut blocks) = whole_numbers(2, 1);
        Gptq::new(moments.as_ref()).unwrap().round_and_sweep(&[0.6, 0.6], (layout, scheme), &mut blocks, 0);
        assert_eq!(blocks.codes, [1, 0]);
        assert!((lost(&[0.6, 0.6], &blocks, (2, 1), moments.as_ref()) - 0.56).abs() < 1e-6);
    }

    #[test]
    fn inputs_that_have_nothing_in_common_are_rounded_to_nearest() {
        let moments = Mat::from_fn(300, 300, |i, j| if i == j { 1.0 + (i % 7) as f64 } else { 0.0 });
        let matrix: Vec<f32> = (0..300 * 3).map(|i| (i * 37 % 101) as f32 / 10.0 - 5.0).collect();
        let (layout, scheme, mut blocks) = whole_numbers(300, 3);
        Gptq::new(moments.as_ref()).unwrap().round_and_sweep(&matrix, (layout, scheme), &mut blocks, 0);
        let nearest: Vec<i8> = matrix.iter().map(|w| w.round_ties_even() as i8).collect();
        assert_eq!(blocks.codes, nearest);
    }

    /// Inputs that nothing was seen of keep what they would have.
    #[test]
    fn inputs_that_were_never_active_are_rounded_to_nearest() {
        let x = random(90, 12, 1);
        let seen = gram(&x);
        let moments = Mat::from_fn(16, 16, |i, j| if i < 12 && j < 12 { seen[(i, j)] } else { 0.0 });
        let matrix: Vec<f32> = (0..16 * 5).map(|i| (i * 37 % 101) as f32 / 10.0 - 5.0).collect();
        let (layout, scheme, mut blocks) = whole_numbers(16, 5);
        Gptq::new(moments.as_ref()).unwrap().round_and_sweep(&matrix, (layout, scheme), &mut blocks, 0);
        for at in (0..16 * 5).filter(|at| at % 16 >= 12) {
            assert_eq!(blocks.codes[at], matrix[at].round_ties_even() as i8);
        }
    }

    /// What the rounding of every row adds is what the product loses in all, whatever the chunks of rows and columns.
    #[test]
    fn products_lose_the_sum_of_what_rows_lose() {
        let (k, n) = (2 * ROWS + 44, COLUMNS + 5);
        let x = random(3 * k, k, 3);
        let mixed = gram(&(&x * random(k, k, 4)));
        let scale = (0..k).map(|i| mixed[(i, i)]).sum::<f64>() / k as f64;
        let moments = Mat::from_fn(k, k, |i, j| mixed[(i, j)] / scale + if i == j { 0.05 } else { 0.0 });
        let wide = random(k, n, 5);
        let matrix: Vec<f32> = (0..k * n).map(|at| (4.0 * wide[(at % k, at / k)]) as f32).collect();
        let (layout, scheme, mut blocks) = whole_numbers(k, n);
        let gptq = Gptq::new(moments.as_ref()).unwrap();
        gptq.round_and_sweep(&matrix, (layout, scheme), &mut blocks, 0);
        // The errors of rows, by their definition: `U⁻ᵀ(W − Ŵ)` where `H = R·Rᵀ`, so that `Σ‖e‖² = ‖Rᵀ(W − Ŵ)‖²`.
        let damped = Mat::from_fn(k, k, |i, j| moments[(i, j)] + if i == j { DAMPING * 1.05 } else { 0.0 });
        let all = lost(&matrix, &blocks, (k, n), damped.as_ref());
        let mut nearest = whole_numbers(k, n).2;
        nearest.codes = matrix.iter().map(|w| w.round_ties_even() as i8).collect();
        let plain = lost(&matrix, &nearest, (k, n), damped.as_ref());
        let mut expected = 0.0;
        // Row by row in double precision and without chunks, for some columns at both ends.
        let chosen: Vec<usize> = [0, 1, COLUMNS - 1, COLUMNS, n - 1].to_vec();
        let upper = |i: usize, j: usize| f64::from(gptq.upper[i * k + j]);
        let mut found = 0.0;
        for &column in &chosen {
            let mut w: Vec<f64> = gptq.order.iter().map(|&row| f64::from(matrix[column * k + row])).collect();
            for i in 0..k {
                let e = (w[i] - f64::from(blocks.codes[column * k + gptq.order[i]])) / upper(i, i);
                expected += e * e;
                (i + 1..k).for_each(|j| w[j] -= upper(i, j) * e);
            }
            let off = |row: usize, _| f64::from(matrix[column * k + row]) - f64::from(blocks.codes[column * k + row]);
            found += energies(Mat::from_fn(k, 1, off).as_ref(), damped.as_ref())[0];
        }
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
        assert!(all < 0.8 * plain, "{all} {plain}");
    }

    /// 200 random layers with one grid: not above rounding to nearest but for a few, and half of it where inputs have
    /// much in common.
    #[test]
    fn rounding_to_nearest_is_beaten_under_correlated_inputs() {
        let (mut better, mut ratios) = (0, 0.0);
        for seed in 0..200 {
            // Singular values from 1 to 10^-1.5: a condition of 10³.
            let mix = random(16, 16, 1000 + seed).qr().compute_Q();
            let x = random(64, 16, seed);
            let scaled = Mat::from_fn(64, 16, |i, j| x[(i, j)] * 10f64.powf(-0.1 * j as f64));
            let moments = gram(&(&scaled * mix.transpose()));
            let w = random(16, 8, 5000 + seed);
            let matrix: Vec<f32> = (0..16 * 8).map(|at| w[(at % 16, at / 16)] as f32).collect();
            let layout = Layout { outer: 8, length: 16, inner: 1, axis: 1 };
            let scheme = Scheme::new(4, usize::MAX);
            let mut blocks = quantize(&matrix, layout, scheme, &[1.0; 16]);
            let plain = lost(&matrix, &blocks, (16, 8), moments.as_ref());
            Gptq::new(moments.as_ref()).unwrap().round(&matrix, layout, scheme, &mut blocks);
            let ratio = lost(&matrix, &blocks, (16, 8), moments.as_ref()) / plain;
            better += usize::from(ratio <= 1.0);
            ratios += ratio / 200.0;
        }
        assert!(better >= 196, "{better}");
        assert!(ratios <= 0.5, "{ratios}");
    }

    /// Scales and codes that move after rounding never lose more, and a good part less.
    #[test]
    fn sweeps_after_rounding_lower_what_is_lost() {
        let (mut worse, mut ratios) = (0, 0.0);
        let schemes =
            [Scheme::new(4, usize::MAX), Scheme::new(4, 32), Scheme::with_zero_points(4, 32), Scheme::new(2, 32)];
        for seed in 0..40 {
            let x = random(400, 96, seed);
            let mix = random(96, 96, 100 + seed);
            let moments = gram(&(&x * mix));
            let w = random(96, 8, 5000 + seed);
            let matrix: Vec<f32> = (0..96 * 8).map(|at| w[(at % 96, at / 96)] as f32).collect();
            let layout = Layout { outer: 8, length: 96, inner: 1, axis: 1 };
            let scheme = schemes[seed as usize % schemes.len()];
            let gptq = Gptq::new(moments.as_ref()).unwrap();
            let damped = Mat::from_fn(96, 96, |i, j| f64::from(gptq.moments[i * 96 + j]));
            let mut lost = [0, SWEEPS].map(|sweeps| {
                let mut blocks = quantize(&matrix, layout, scheme, &[1.0; 96]);
                gptq.round_and_sweep(&matrix, (layout, scheme), &mut blocks, sweeps);
                let off = |row: usize, column: usize| {
                    let at = column * 96 + row;
                    let grid = blocks.grid(column * 96usize.div_ceil(scheme.block) + row / scheme.block);
                    f64::from(matrix[at] - grid.number(f32::from(blocks.codes[at])))
                };
                energies(Mat::from_fn(96, 8, off).as_ref(), damped.as_ref()).iter().sum::<f64>()
            });
            lost[1] /= lost[0];
            worse += usize::from(lost[1] > 1.0 + 1e-6);
            ratios += lost[1] / 40.0;
        }
        assert_eq!(worse, 0);
        assert!(ratios <= 0.9, "{ratios}");
    }
}
