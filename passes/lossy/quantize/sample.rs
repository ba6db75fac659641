//! What fitted rounding gains on some columns of a weight, and what it is fitted to.

use super::super::{
    Weight,
    factors::LayerStatistics,
    gptq::Gptq,
    integers::{Blocks, Layout, Scheme, quantize},
    spectrum,
};
use super::{
    Work,
    importance::{Importance, joint},
};
use faer::Mat;
use lathe_analysis::Gram;
use lathe_ir::Graph;

/// Fitted rounding of a weight that all uses multiply.
pub(in super::super) struct Fit {
    /// What it is fitted to, `[k, k]`.
    pub moments: Mat<f64>,
    /// What every use then loses, as a part of what it loses where every number is rounded to the nearest code.
    pub gains: Vec<f64>,
}

/// What fitting gains, if it does; `squares` are mean squares of what every use reads, relative to those of what it gives.
pub(in super::super) fn fit(
    graph: &Graph,
    weight: &Weight,
    squares: &[Vec<f64>],
    seen: &LayerStatistics,
    scheme: Scheme,
) -> Option<Fit> {
    let tensor = graph.constant(weight.value)?;
    let matrix = tensor.to_f32s()?;
    tensor.release();
    let importance = |inputs: &Vec<f64>| Importance { inputs: inputs.clone(), output: 1.0 };
    let importances: Vec<Importance> = squares.iter().map(importance).collect();
    let joint = joint(&importances, Layout::of(weight));
    let moments = joint_moments(weight, seen, &importances);
    let work = Work { weight, importances, seen: None };
    let gains = Sample::of(&matrix, &work, seen, &joint)?.gains(scheme);
    (gains.iter().sum::<f64>() < gains.len() as f64).then_some(Fit { moments, gains })
}

/// Columns of a weight by which the gain of fitted rounding is told: columns are rounded each for itself.
const SAMPLED: usize = 32;

/// Some columns of a weight, with what rounding them is fitted to and judged by.
pub(super) struct Sample {
    /// `[columns, k]`.
    numbers: Vec<f32>,
    layout: Layout,
    joint: Vec<f64>,
    gptq: Gptq,
    /// Of every use: second moments on the rows that fits are judged by; `None` where rows are picked.
    judges: Vec<Option<Mat<f64>>>,
}

impl Sample {
    /// `None` where nothing can be fitted.
    pub fn of(matrix: &[f32], work: &Work<'_>, seen: &LayerStatistics, joint: &[f64]) -> Option<Sample> {
        let weight = work.weight;
        let whole = Layout::of(weight);
        let (columns, k) = (whole.outer * whole.inner, whole.length);
        let count = columns.min(SAMPLED);
        let number =
            |column: usize, row: usize| matrix[(column / whole.inner * k + row) * whole.inner + column % whole.inner];
        let chosen = (0..count).map(|at| at * columns / count);
        let numbers = chosen.flat_map(|column| (0..k).map(move |row| number(column, row))).collect();
        let held = seen.judges().ok()?;
        let mut held = held.iter().map(|judge| square(judge.gram));
        let judges = weight.taps.iter().map(|tap| tap.rows.as_ref().and_then(|_| held.next())).collect();
        let gptq = Gptq::new(joint_moments(weight, seen, &work.importances).as_ref())?;
        let layout = Layout { outer: count, length: k, inner: 1, axis: 1 };
        Some(Sample { numbers, layout, joint: joint.to_vec(), gptq, judges })
    }

    /// What every use loses where rounding is fitted, as a part of what it loses where it is not.
    pub fn gains(&self, scheme: Scheme) -> Vec<f64> {
        let mut blocks = quantize(&self.numbers, self.layout, scheme, &self.joint);
        let plain = self.lost(&blocks, scheme);
        self.gptq.round(&self.numbers, self.layout, scheme, &mut blocks);
        let fitted = self.lost(&blocks, scheme);
        plain.iter().zip(fitted).map(|(plain, fitted)| if *plain > 0.0 { fitted / plain } else { 1.0 }).collect()
    }

    fn lost(&self, blocks: &Blocks, scheme: Scheme) -> Vec<f64> {
        let Layout { outer: columns, length: k, .. } = self.layout;
        let count = k.div_ceil(scheme.block);
        let off = Mat::from_fn(k, columns, |row, column| {
            let grid = blocks.grid(column * count + row / scheme.block);
            f64::from(self.numbers[column * k + row] - grid.number(f32::from(blocks.codes[column * k + row])))
        });
        let lost = |judge: &Option<Mat<f64>>| match judge {
            Some(moments) => spectrum::energies(off.as_ref(), moments.as_ref()).iter().sum::<f64>().max(0.0),
            None => off.squared_norm_l2(),
        };
        self.judges.iter().map(lost).collect()
    }
}

fn square(gram: &Gram) -> Mat<f64> {
    let k = gram.matrix.size();
    Mat::from_fn(k, k, |i, j| gram.matrix.get(i, j))
}

/// Second moments of what all uses multiply a weight with, each by its share of its own output.
pub(super) fn joint_moments(weight: &Weight, seen: &LayerStatistics, importances: &[Importance]) -> Mat<f64> {
    let k = weight.inputs();
    let mut joint = Mat::zeros(k, k);
    for (gram, output) in seen.grams.iter().zip(&seen.outputs) {
        joint += square(gram) * faer::Scale(1.0 / output);
    }
    // What picks rows reads every feature alone.
    let of_taps = weight.taps.iter().zip(importances);
    for (_, importance) in of_taps.filter(|(tap, _)| tap.rows.is_none()) {
        (0..k).for_each(|i| joint[(i, i)] += importance.inputs[i] / importance.output);
    }
    joint
}
