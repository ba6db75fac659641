//! Steps whose latents have different heights and widths: which step has which, and what happens between two.
//!
//! A border is a step like any other whose new state is resized before fresh noise is added, so a table has a row for it:
//! `x' = resize(state·x + estimate·y) + noise·z`. From the estimate alone, any resize will do. With some of the state in
//! it, which holds noise, growing by repetition leaves equal noise in each group, and what is added must lack just that.

use super::{Error, Level, Request, Row, Scheduler, Steps, Table};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How latents grow. They shrink by the mean over what each new place covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Up {
    /// The estimate of the clean sample, by repetition.
    Nearest,
    /// The estimate of the clean sample, linearly.
    Linear,
    /// The estimate of the clean sample, by cubic convolution with a = −0.75.
    Cubic,
    /// The state itself, by repetition; noise whose mean over each group is zero makes up for what is then missing.
    Matched,
}

impl Up {
    /// The way with this name.
    pub fn from_name(name: &str) -> Option<Up> {
        serde_json::from_value(name.into()).ok()
    }
}

/// Height and width of the latent at every step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Height and width, in places of the latent, by step. That of the last step is the largest: noise and sample have it,
    /// and smaller steps take the upper left of noise.
    pub steps: Vec<[usize; 2]>,
    /// How latents grow.
    pub up: Up,
}

/// A matrix that resizes one axis, by rows: `[to, from]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resize {
    /// The size afterwards.
    pub to: usize,
    /// The size before.
    pub from: usize,
    /// The weights.
    pub weights: Vec<f64>,
}

/// What happens between two steps of different sizes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Border {
    /// What makes the new state of the old one: for height and width.
    pub resize: [Resize; 2],
    /// What gives the part of fresh noise that is left out, if some is: for height and width.
    pub without: Option<[Resize; 2]>,
}

impl Sizes {
    /// Height and width of noise and sample.
    pub fn full(&self) -> [usize; 2] {
        self.steps.last().copied().unwrap_or_default()
    }

    /// Runs of steps of one size.
    pub fn stages(&self) -> Vec<Range<usize>> {
        let mut stages = Vec::new();
        let mut start = 0;
        for run in self.steps.chunk_by(|a, b| a == b) {
            stages.push(start..start + run.len());
            start += run.len();
        }
        stages
    }

    /// Whether no border lies between two steps, the earlier first.
    pub(super) fn are_joined(&self, earlier: usize, later: usize) -> bool {
        self.steps[earlier..=later].iter().all(|size| *size == self.steps[later])
    }

    /// Checks them for so many steps.
    pub(super) fn check(&self, steps: usize) -> Result<(), Error> {
        if self.steps.len() != steps {
            return Err(Error::Plan(format!("the plan has {steps} timesteps and {} sizes", self.steps.len())));
        }
        let [height, width] = self.full();
        let fits = |size: &&[usize; 2]| (1..=height).contains(&size[0]) && (1..=width).contains(&size[1]);
        if let Some([h, w]) = self.steps.iter().find(|size| !fits(size)) {
            return Err(Error::Plan(format!(
                "a step has the size {h}×{w}, expected at most that of the last one, {height}×{width}"
            )));
        }
        let whole =
            |pair: &[[usize; 2]]| !grows(pair[0], pair[1]) || (0..2).all(|k| pair[1][k].is_multiple_of(pair[0][k]));
        match self.steps.windows(2).find(|pair| self.up == Up::Matched && !whole(pair)) {
            None => Ok(()),
            Some(pair) => Err(Error::Plan(format!(
                "noise of {}×{} cannot be repeated to {}×{}; matched growth is by whole factors",
                pair[0][0], pair[0][1], pair[1][0], pair[1][1]
            ))),
        }
    }

    /// What happens after a step, if the next one has another size.
    pub(crate) fn border(&self, step: usize) -> Option<Border> {
        let (from, to) = (*self.steps.get(step)?, *self.steps.get(step + 1)?);
        let resize = |from: usize, to: usize| if to < from { mean(from, to) } else { grow(from, to, self.up) };
        let without = |k: usize| {
            let (up, down) = (resize(from[k], to[k]), mean(to[k], from[k]));
            let entry = |i: usize| {
                let (row, column) = (i / to[k], i % to[k]);
                (0..from[k]).map(|j| up.weights[row * from[k] + j] * down.weights[j * to[k] + column]).sum()
            };
            Resize { to: to[k], from: to[k], weights: (0..to[k] * to[k]).map(entry).collect() }
        };
        (from != to).then(|| Border {
            resize: [0, 1].map(|k| resize(from[k], to[k])),
            without: (self.up == Up::Matched && grows(from, to)).then(|| [0, 1].map(without)),
        })
    }
}

fn grows(from: [usize; 2], to: [usize; 2]) -> bool {
    to[0] * to[1] > from[0] * from[1]
}

/// The ratio of the sides of two sizes, the same for height and width on the whole.
pub(super) fn side_ratio(from: [usize; 2], to: [usize; 2]) -> f64 {
    ((to[0] * to[1]) as f64 / (from[0] * from[1]) as f64).sqrt()
}

/// Means over what each of the new places covers.
fn mean(from: usize, to: usize) -> Resize {
    let width = from as f64 / to as f64;
    let covered = |row: usize, column: usize| {
        let (start, end) = (row as f64 * width, (row + 1) as f64 * width);
        (end.min((column + 1) as f64) - start.max(column as f64)).max(0.0) / width
    };
    let weights = (0..to * from).map(|i| covered(i / from, i % from)).collect();
    Resize { to, from, weights }
}

/// Interpolation between places, whose centres lie at halves; beyond the outermost ones they go on as they are.
fn grow(from: usize, to: usize, up: Up) -> Resize {
    let mut weights = vec![0.0; to * from];
    for row in 0..to {
        let at = (row as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let below = at.floor();
        let (low, between) = (below as i64, at - below);
        let mut add = |place: i64, weight: f64| {
            weights[row * from + place.clamp(0, from as i64 - 1) as usize] += weight;
        };
        match up {
            Up::Nearest | Up::Matched => add((at + 0.5).floor() as i64, 1.0),
            Up::Linear => [(low, 1.0 - between), (low + 1, between)].into_iter().for_each(|(p, w)| add(p, w)),
            Up::Cubic => (-1..=2).for_each(|k| add(low + k, cubic((between - k as f64).abs()))),
        }
    }
    Resize { to, from, weights }
}

/// The kernel of cubic convolution at a distance.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.75;
    if x <= 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}

impl Table {
    /// The table of steps of several sizes: each run of one size as the solver makes it of these timesteps, its last step
    /// to the noise level of the next run.
    ///
    /// Fails where a run does not go from noisy to clean, and for solvers whose states are not a mixture of the estimate
    /// and noise. Source: Tian et al. 2025, Bottleneck Sampling, arXiv:2503.18940; matched growth as in Jeong et al. 2025,
    /// Region-Adaptive Latent Sampling, arXiv:2507.08422.
    pub fn staged(s: &Scheduler, request: &Request, grid: &[f64], sizes: &Sizes) -> Result<Table, Error> {
        sizes.check(grid.len())?;
        let stages = sizes.stages();
        if stages.len() > 1 && (!s.solver.info().mixtures || s.invert_sigmas) {
            let what =
                if s.invert_sigmas { "`invert_sigmas`".to_owned() } else { format!("solver {}", s.solver.name()) };
            return Err(Error::Plan(format!("steps of several sizes are not defined for {what}")));
        }
        let mut tables = Vec::new();
        for stage in &stages {
            let steps = Steps::Times(grid[stage.clone()].to_vec());
            tables.push(Table::new(s, &Request { steps, ..request.clone() })?);
        }
        for (index, stage) in stages.iter().enumerate().skip(1) {
            let next = tables[index].rows[0].level;
            let rows = &mut tables[index - 1].rows;
            let last = rows.len() - 1;
            let (from, to) = (sizes.steps[stage.start - 1], sizes.steps[stage.start]);
            let kept = if sizes.up == Up::Matched && grows(from, to) { 1.0 / side_ratio(from, to) } else { 0.0 };
            rows[last] = leave(&rows[last], next, kept).ok_or_else(|| {
                let (step, noise) = (stage.start - 1, share(next));
                Error::Plan(format!("step {step} has too little noise for one to {noise:.3} of a larger size after it"))
            })?;
        }
        let Table { initial_scale, clip, .. } = tables[0];
        let notes = tables.iter_mut().flat_map(|table| std::mem::take(&mut table.notes)).collect();
        let rows = tables.into_iter().flat_map(|table| table.rows).collect();
        Ok(Table { rows, initial_scale, clip, steps: grid.len(), notes })
    }
}

/// The share of noise in a state, from 0 to 1.
pub(super) fn share(level: Level) -> f64 {
    level.noise / (level.alpha + level.noise)
}

/// A row that ends at another size and at the level `next`, of whose noise this part is what the state had, resized; `None`
/// if the state has less.
///
/// With all of it kept, `x' = (s'/s)·x + (α' − α·s'/s)·y` is a step of first order.
fn leave(row: &Row, next: Level, kept: f64) -> Option<Row> {
    let here = row.level;
    let state = kept * next.noise / here.noise;
    let estimate = next.alpha - state * here.alpha;
    // What the step comes to before it grows: a state with these factors, which are those of a level up to a scale.
    (kept == 0.0 || estimate >= 0.0).then(|| Row {
        state,
        output: 0.0,
        history: vec![estimate],
        noise: next.noise,
        ..row.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?} is not {expected:?}");
    }

    #[test]
    fn places_are_weighted_by_distance_and_by_what_they_cover() {
        assert_near(&mean(3, 2).weights, &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0, 1.0 / 3.0, 2.0 / 3.0]);
        assert_near(&grow(2, 4, Up::Nearest).weights, &[1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]);
        assert_near(&grow(2, 4, Up::Linear).weights, &[1.0, 0.0, 0.75, 0.25, 0.25, 0.75, 0.0, 1.0]);
        // The sixth of eight places lies a quarter beyond the third of four.
        let row = &grow(4, 8, Up::Cubic).weights[5 * 4..6 * 4];
        assert_near(row, &[0.0, -0.105_468_75, 0.878_906_25, 0.261_718_75 - 0.035_156_25]);
    }

    #[test]
    fn stages_are_runs_of_one_size() {
        let sizes = Sizes { steps: vec![[4, 4], [4, 4], [2, 2], [4, 4]], up: Up::Matched };
        assert_eq!(sizes.stages(), [0..2, 2..3, 3..4]);
        assert!(sizes.are_joined(0, 1) && !sizes.are_joined(1, 2) && !sizes.are_joined(0, 3));
        assert!(sizes.border(0).is_none() && sizes.border(3).is_none());
        assert!(sizes.border(1).is_some_and(|border| border.without.is_none()));
        // Noise loses the mean of each group.
        let [rows, _] = sizes.border(2).and_then(|border| border.without).unwrap();
        assert_near(&rows.weights[..8], &[0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]);
    }
}
