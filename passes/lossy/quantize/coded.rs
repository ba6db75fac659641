//! Weights in codes.

use super::{
    super::{
        Cost, Weight, blocks,
        gptq::Gptq,
        integers::{Blocks, Layout, Scheme, quantize},
    },
    importance::{Importance, joint},
};
use crate::Target;
use faer::Mat;
use lathe_ir::{Graph, Model};
use serde::{Deserialize, Serialize};

/// How a weight is put into codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Coding {
    pub scheme: Scheme,
    /// Whether later numbers make up for what earlier ones lose.
    pub fitted: bool,
}

impl Coding {
    /// As reports call it.
    pub fn name(self) -> String {
        let plain = self.scheme.name();
        if self.fitted { format!("{plain}, GPTQ") } else { plain }
    }
}

/// A weight in codes, for methods that build on it.
pub(in super::super) struct Coded {
    scheme: Scheme,
    layout: Layout,
    blocks: Blocks,
}

impl Coded {
    /// The matrix in codes, each the nearest, where a number counts by what its input is squared on average.
    pub fn of(graph: &Graph, weight: &Weight, scheme: Scheme, squares: &[f64]) -> Result<Coded, &'static str> {
        let only = Importance { inputs: squares.to_vec(), output: 1.0 };
        Coded::new(graph, weight, Coding { scheme, fitted: false }, (&joint(&[only], Layout::of(weight)), None))
    }

    /// The matrix in codes that make up for each other under second moments of what it is multiplied with.
    pub fn fitted(graph: &Graph, weight: &Weight, scheme: Scheme, moments: &Mat<f64>) -> Result<Coded, &'static str> {
        let squares = (0..moments.nrows()).map(|i| moments[(i, i)]).collect();
        let only = Importance { inputs: squares, output: 1.0 };
        let joint = joint(&[only], Layout::of(weight));
        Coded::new(graph, weight, Coding { scheme, fitted: true }, (&joint, Some(moments)))
    }

    /// The matrix in codes where a number counts by the `importance` of its input; `moments` are what fitted rounding is
    /// fitted to.
    pub(super) fn new(
        graph: &Graph,
        weight: &Weight,
        Coding { scheme, fitted }: Coding,
        (importance, moments): (&[f64], Option<&Mat<f64>>),
    ) -> Result<Coded, &'static str> {
        let layout = Layout::of(weight);
        let tensor = graph.constant(weight.value).expect("weights are constants");
        let matrix = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite()));
        tensor.release();
        let matrix = matrix.ok_or("the constant holds a NaN or an infinity")?;
        let mut blocks = quantize(&matrix, layout, scheme, importance);
        // Moments that tell nothing leave every number at its nearest code.
        if let Some(gptq) = moments.filter(|_| fitted).and_then(|moments| Gptq::new(moments.as_ref())) {
            gptq.round(&matrix, layout, scheme, &mut blocks);
        }
        Ok(Coded { scheme, layout, blocks })
    }

    /// As reports call it.
    pub fn name(&self) -> String {
        self.scheme.name()
    }

    /// What it takes as a weight of `graph`.
    pub fn cost(&self, graph: &Graph, weight: &Weight, target: Target) -> Cost {
        self.scheme.cost(&self.layout, blocks::are_whole(graph, weight, self.scheme.block, target))
    }

    /// The numbers it stands for, in the order of the stored constant.
    pub fn restored(&self) -> Vec<f32> {
        let (layout, count) = (self.layout, self.layout.length.div_ceil(self.scheme.block));
        let grid = |at: usize| {
            let (inner, row, outer) =
                (at % layout.inner, at / layout.inner % layout.length, at / layout.inner / layout.length);
            self.blocks.grid((outer * count + row / self.scheme.block) * layout.inner + inner)
        };
        self.blocks.codes.iter().enumerate().map(|(at, &code)| grid(at).number(f32::from(code))).collect()
    }

    /// The codes as they are stored, one byte each, in the order of the stored constant, and the scales.
    pub fn parts(&self) -> (&[i8], &[f32]) {
        (&self.blocks.codes, &self.blocks.scales)
    }

    /// Stores it in place of the weight.
    pub fn emit(&self, model: &mut Model, weight: &Weight, target: Target) {
        blocks::emit(model, weight, self.layout, self.scheme, &self.blocks, target);
    }
}
