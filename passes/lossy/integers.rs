//! Matrices as whole numbers of few bits with one scale per block: rounding to nearest with a search over clipped ranges.

use super::{Cost, OVERHEAD, Weight};
use serde::{Deserialize, Serialize};

/// Shares of the largest magnitude that a block's range may be cut to.
const CLIPS: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7];

/// Clips that are tried side by side.
const LANES: usize = CLIPS.len().next_power_of_two();

/// Bits and numbers per scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Scheme {
    pub bits: usize,
    /// `usize::MAX` for one scale per output channel.
    pub block: usize,
    /// Whether blocks have a code of their own that stands for zero, where others have 0.
    pub zero_points: bool,
}

impl Scheme {
    /// Codes around zero.
    pub const fn new(bits: usize, block: usize) -> Scheme {
        Scheme { bits, block, zero_points: false }
    }

    /// Codes around a zero point.
    pub const fn with_zero_points(bits: usize, block: usize) -> Scheme {
        Scheme { bits, block, zero_points: true }
    }

    /// As reports call it.
    pub fn name(self) -> String {
        if self.block == usize::MAX {
            return format!("int{} per channel", self.bits);
        }
        let own = if self.zero_points { ", zero points" } else { "" };
        format!("int{} block {}{own}", self.bits, self.block)
    }

    /// The range of codes.
    pub fn range(self) -> (f32, f32) {
        let half = 1i32 << (self.bits - 1);
        (-half as f32, (half - 1) as f32)
    }

    /// What it takes; `whole` where the last block of a row is stored to its end.
    pub fn cost(self, layout: &Layout, whole: bool) -> Cost {
        let elements = layout.outer * layout.length * layout.inner;
        let stored =
            if whole { elements / layout.length * layout.length.next_multiple_of(self.block) } else { elements };
        let (columns, blocks) = (layout.outer * layout.inner, layout.length.div_ceil(self.block));
        let scales = columns * blocks;
        let zeros = match (self.zero_points, whole) {
            (false, _) => 0,
            (true, true) => columns * (blocks * self.bits).div_ceil(8),
            (true, false) => (scales * self.bits).div_ceil(8),
        };
        Cost {
            bytes: ((stored * self.bits).div_ceil(8) + scales * 4 + zeros) as u64 + OVERHEAD,
            parameters: elements as u64,
            flops_per_row: 2 * elements as u64,
        }
    }
}

/// A stored matrix as `[outer, length, inner]`, quantized along `length`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub outer: usize,
    pub length: usize,
    pub inner: usize,
    /// The axis of `length` in the stored constant.
    pub axis: usize,
}

impl Layout {
    pub fn of(weight: &Weight) -> Layout {
        let axis = weight.taps.first().map_or(0, |tap| tap.inputs_axis);
        match axis {
            0 => Layout { outer: 1, length: weight.dims[0], inner: weight.dims[1], axis },
            _ => Layout { outer: weight.dims[0], length: weight.dims[1..].iter().product(), inner: 1, axis },
        }
    }
}

/// Codes and scales: `(code − zero) · scale`.
pub(super) struct Blocks {
    /// In the order of the stored constant.
    pub codes: Vec<i8>,
    /// `[outer, blocks, inner]`.
    pub scales: Vec<f32>,
    /// The codes that stand for zero, in the order of scales; empty where that is 0.
    pub zeros: Vec<i8>,
}

impl Blocks {
    /// The numbers that the codes of a block stand for.
    pub fn grid(&self, block: usize) -> Grid {
        Grid { scale: self.scales[block], zero: self.zeros.get(block).map_or(0.0, |&zero| f32::from(zero)) }
    }
}

/// Numbers `(code − zero) · scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Grid {
    pub scale: f32,
    pub zero: f32,
}

impl Grid {
    /// The code of a number: that of the nearest number.
    pub fn code(self, w: f32, (low, high): (f32, f32)) -> f32 {
        if self.scale == 0.0 { self.zero } else { nearest((w / self.scale + self.zero).clamp(low, high)) }
    }

    /// The number that a code stands for.
    pub fn number(self, code: f32) -> f32 {
        (code - self.zero) * self.scale
    }

    fn lost(self, line: &[f32], importance: &[f64], range: (f32, f32)) -> f64 {
        let lost = |(&w, &weight): (&f32, &f64)| {
            let off = f64::from(w - self.number(self.code(w, range)));
            weight * off * off
        };
        line.iter().zip(importance).map(lost).sum()
    }
}

/// Quantizes `matrix` so that Σ importance · (w − ŵ)² is small.
pub(super) fn quantize(matrix: &[f32], layout: Layout, scheme: Scheme, importance: &[f64]) -> Blocks {
    let blocks = layout.length.div_ceil(scheme.block);
    let mut codes = vec![0i8; matrix.len()];
    let mut scales = vec![0f32; layout.outer * blocks * layout.inner];
    let mut zeros = vec![0i8; if scheme.zero_points { scales.len() } else { 0 }];
    let range = scheme.range();
    let mut line = Vec::with_capacity(scheme.block.min(layout.length));
    for outer in 0..layout.outer {
        for block in 0..blocks {
            let start = block * scheme.block.min(layout.length);
            let rows = start..layout.length.min(start.saturating_add(scheme.block));
            for inner in 0..layout.inner {
                let at = |row: usize| (outer * layout.length + row) * layout.inner + inner;
                line.clear();
                line.extend(rows.clone().map(|row| matrix[at(row)]));
                let grid = best_grid(&line, &importance[rows.clone()], scheme);
                let place = (outer * blocks + block) * layout.inner + inner;
                scales[place] = grid.scale;
                if let Some(zero) = zeros.get_mut(place) {
                    *zero = grid.zero as i8;
                }
                for (row, &w) in rows.clone().zip(&line) {
                    codes[at(row)] = grid.code(w, range) as i8;
                }
            }
        }
    }
    Blocks { codes, scales, zeros }
}

/// The grid that loses least of those that clipping gives.
fn best_grid(line: &[f32], importance: &[f64], scheme: Scheme) -> Grid {
    let (low, high) = scheme.range();
    let around_zero = Grid { scale: best_scale(line, importance, low, high), zero: 0.0 };
    if !scheme.zero_points {
        return around_zero;
    }
    let least = line.iter().copied().fold(0.0f32, f32::min);
    let most = line.iter().copied().fold(0.0f32, f32::max);
    let clipped = CLIPS.iter().map(|clip| {
        let scale = (most - least) * clip / (high - low);
        Grid { scale, zero: nearest((low - least * clip / scale).clamp(low, high)) }
    });
    let usable = clipped.filter(|grid| grid.scale != 0.0 && grid.scale.is_finite() && grid.zero.is_finite());
    let mut best = (around_zero.lost(line, importance, (low, high)), around_zero);
    for grid in usable {
        let lost = grid.lost(line, importance, (low, high));
        if lost < best.0 {
            best = (lost, grid);
        }
    }
    best.1
}

/// How much of what a block of 32 loses without zero points it loses with them, over some columns of a matrix.
pub(super) fn zero_points_gain(matrix: &[f32], layout: Layout, bits: usize, importance: &[f64]) -> f64 {
    const SAMPLED: usize = 32;
    const BLOCK: usize = 32;
    let columns = layout.outer * layout.inner;
    let count = columns.min(SAMPLED);
    let (mut plain, mut own) = (0.0, 0.0);
    for column in (0..count).map(|at| at * columns / count) {
        let at = |row: usize| (column / layout.inner * layout.length + row) * layout.inner + column % layout.inner;
        for start in (0..layout.length).step_by(BLOCK) {
            let rows = start..layout.length.min(start + BLOCK);
            let line: Vec<f32> = rows.clone().map(|row| matrix[at(row)]).collect();
            let importance = &importance[rows];
            let lost = |scheme: Scheme| best_grid(&line, importance, scheme).lost(&line, importance, scheme.range());
            plain += lost(Scheme::new(bits, BLOCK));
            own += lost(Scheme::with_zero_points(bits, BLOCK));
        }
    }
    if plain > 0.0 { own / plain } else { 1.0 }
}

/// The whole number that is nearest to a number of less than 2²², of two the even one: where the sum has no bits left for
/// the fraction, addition rounds. Unlike `round_ties_even` it is one vector instruction on every processor.
fn nearest(x: f32) -> f32 {
    const NO_FRACTION: f32 = 12_582_912.0;
    (x + NO_FRACTION) - NO_FRACTION
}

/// The scale that loses least: the number of largest magnitude, or a share of it, becomes the lowest code, which has no
/// positive counterpart.
fn best_scale(line: &[f32], importance: &[f64], low: f32, high: f32) -> f32 {
    let largest = line.iter().copied().fold(0.0f32, |best, w| if w.abs() > best.abs() { w } else { best });
    if largest == 0.0 {
        return 0.0;
    }
    // All clips side by side, one to a lane of vector instructions; the last lane has none.
    let mut scales = [1f32; LANES];
    scales.iter_mut().zip(CLIPS).for_each(|(scale, clip)| *scale = largest * clip / low);
    let usable = scales.map(|scale| scale != 0.0 && scale.is_finite());
    let mut lost = [0f64; LANES];
    for (&w, &weight) in line.iter().zip(importance) {
        for (lost, &scale) in lost.iter_mut().zip(&scales) {
            let off = f64::from(w - nearest((w / scale).clamp(low, high)) * scale);
            *lost += weight * off * off;
        }
    }
    let mut best = (f64::INFINITY, 0.0);
    for at in (0..CLIPS.len()).filter(|&at| usable[at]) {
        if lost[at] < best.0 {
            best = (lost[at], scales[at]);
        }
    }
    best.1
}

/// Σ over the matrix of the squared error, per position along the quantized axis.
pub(super) fn losses(matrix: &[f32], blocks: &Blocks, layout: Layout, scheme: Scheme) -> Vec<f64> {
    let count = layout.length.div_ceil(scheme.block);
    let mut lost = vec![0.0; layout.length];
    for outer in 0..layout.outer {
        for (row, lost) in lost.iter_mut().enumerate() {
            for inner in 0..layout.inner {
                let at = (outer * layout.length + row) * layout.inner + inner;
                let grid = blocks.grid((outer * count + row / scheme.block) * layout.inner + inner);
                let off = f64::from(matrix[at] - grid.number(f32::from(blocks.codes[at])));
                *lost += off * off;
            }
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_the_even_one_of_two() {
        let mut x = -300.0f32;
        while x < 300.0 {
            assert_eq!(nearest(x), x.round_ties_even(), "{x}");
            x += 0.125;
        }
    }

    #[test]
    fn zero_points_take_skewed_blocks_nearer_and_never_further() {
        let importance = [1.0; 32];
        let (plain, own) = (Scheme::new(4, 32), Scheme::with_zero_points(4, 32));
        let lost = |line: &[f32], scheme| best_grid(line, &importance, scheme).lost(line, &importance, scheme.range());
        // Sixteen numbers with even steps, none below zero: all are codes.
        let even: Vec<f32> = (0..32).map(|i| 0.5 * (i % 16) as f32).collect();
        assert_eq!(best_grid(&even, &importance, own), Grid { scale: 0.5, zero: -8.0 });
        assert_eq!(lost(&even, own), 0.0);
        assert!(lost(&even, plain) > 1.0);
        let layout = Layout { outer: 1, length: 32, inner: 1, axis: 1 };
        assert_eq!(zero_points_gain(&even, layout, 4, &importance), 0.0);
        let mut state = 1u32;
        for shift in [-1.0, -0.3, 0.0, 0.2, 3.0] {
            let line: Vec<f32> = (0..32)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0 + shift
                })
                .collect();
            assert!(lost(&line, own) <= lost(&line, plain), "{shift}");
            let blocks = quantize(&line, layout, own, &importance);
            let total: f64 = losses(&line, &blocks, layout, own).iter().sum();
            assert!((total - lost(&line, own)).abs() < 1e-6);
        }
        assert_eq!(best_grid(&[0.0; 32], &importance, own), Grid { scale: 0.0, zero: 0.0 });
    }

    #[test]
    fn the_best_scale_is_that_of_the_clip_that_loses_least() {
        let mut state = 1u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for (low, high) in [(-8.0, 7.0), (-128.0, 127.0), (-2.0, 1.0)] {
            for length in [1, 5, 32, 100] {
                let line: Vec<f32> = (0..length).map(|_| number().powi(3)).collect();
                let importance: Vec<f64> = (0..length).map(|_| f64::from(number().abs())).collect();
                let largest = line.iter().copied().fold(0.0f32, |best, w| if w.abs() > best.abs() { w } else { best });
                let loss = |scale: f32| -> f64 {
                    let off = |w: f32| f64::from(w - (w / scale).round_ties_even().clamp(low, high) * scale);
                    line.iter().zip(&importance).map(|(&w, weight)| weight * off(w) * off(w)).sum()
                };
                let scales = CLIPS.map(|clip| largest * clip / low);
                let least = scales.into_iter().min_by(|&a, &b| loss(a).total_cmp(&loss(b))).unwrap();
                assert_eq!(best_scale(&line, &importance, low, high), least);
            }
        }
        assert_eq!(best_scale(&[0.0, -0.0], &[1.0, 1.0], -8.0, 7.0), 0.0);
        // Too small for a scale of its own.
        assert_eq!(best_scale(&[f32::from_bits(1)], &[1.0], -128.0, 127.0), 0.0);
    }
}
