//! Where a denoiser can be cut: tensors that a step may take from an earlier step instead of computing them.
//!
//! The *spine* are the values that everything on the way from the latent to the output passes. Where a model runs two
//! streams side by side, as text and image in MM-DiT, a cut is a pair of values; where it hands encoder tensors to its
//! decoder, as a UNet does, the concatenations are listed as [`Skip`]s and left aside. Between the cuts lie blocks, and
//! blocks that do the same with other weights form [`Run`]s. Nothing is told by names.
//!
//! Spine: the weighted number of paths through a value, with random weights modulo a prime, equals that through the
//! whole graph exactly where no path leaves the value out (but for one chance in 2⁶¹, and that is taken twice).

mod blocks;
mod paths;
mod residuals;
mod skips;
#[cfg(test)]
mod tests;

use crate::{Cone, Cones, DimExpr, Facts, UnitKind, units::flow::Flow};
use lathe_ir::{Model, NodeId, Origin, ScopeId, ValueId};

/// One cut: everything from the latent to the output passes these values, skips aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Border {
    /// One value; two where streams run side by side, in the same order at every border.
    pub streams: Vec<ValueId>,
    /// How many [`Skip`]s pass it by. Where there is one, the values after the border need more than its streams.
    pub skips: usize,
}

/// A sum `shortcut + arm` where the arm is computed from the stream that the shortcut hands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residual {
    /// The node that adds.
    pub join: NodeId,
    /// The sum.
    pub sum: ValueId,
    /// What both summands are computed from.
    pub stream: ValueId,
    /// The summand that takes the place of the sum where the arm is left out: the stream, or a projection of it.
    pub shortcut: ValueId,
    /// The other summand, after its gate: what a cache of the whole contribution holds.
    pub arm: ValueId,
    /// The arm before it is multiplied by a gate that depends on time or conditions; the arm itself without a gate.
    pub ungated: ValueId,
    /// That gate.
    pub gate: Option<ValueId>,
    /// What the arm computes.
    pub kind: UnitKind,
    /// The nodes of the arm, in the order they run.
    pub nodes: Vec<NodeId>,
}

/// A concatenation of a tensor with something computed from it: encoder and decoder of a UNet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// The node that concatenates.
    pub join: NodeId,
    /// The operand that comes from the encoder.
    pub source: ValueId,
    /// The operand that comes from the deeper part: with this value given, nothing deeper need run.
    pub deep: ValueId,
    /// The resolution at which it happens, 0 for the finest; `None` where sizes are not known.
    pub level: Option<usize>,
}

/// Consecutive borders with what lies between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The border where it starts, an index into [`Cuts::borders`].
    pub enter: usize,
    /// The border where it ends.
    pub leave: usize,
    /// Its nodes that depend on its streams, in the order they run.
    pub nodes: Vec<NodeId>,
    /// Its residual sums, indices into [`Cuts::residuals`].
    pub residuals: Vec<usize>,
}

/// Blocks that do the same with other weights, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// How many borders make one block.
    pub period: usize,
    /// The blocks; at least two.
    pub blocks: Vec<Block>,
}

/// The cuts of a denoiser.
#[derive(Debug, Clone, Default)]
pub struct Cuts {
    /// The values that every path from the latent to the output passes, both included, in the order they are computed.
    pub spine: Vec<ValueId>,
    /// Cuts at which blocks may begin and end, in order.
    pub borders: Vec<Border>,
    /// Repeated blocks, in order.
    pub runs: Vec<Run>,
    /// Residual sums, in the order they are computed.
    pub residuals: Vec<Residual>,
    /// Skips from the shallowest, which is the last to run, to the deepest.
    pub skips: Vec<Skip>,
    /// The distinct spatial sizes of images on the way, finest first.
    levels: Vec<Vec<DimExpr>>,
}

impl Cuts {
    /// Finds the cuts of the main graph between an input and an output. There are none if the nodes form a cycle or
    /// the output does not depend on the input.
    pub fn find(model: &Model, facts: &Facts, cones: &Cones, latent: ValueId, output: ValueId) -> Cuts {
        let graph = &model.graph;
        let mut dynamic = vec![false; graph.value_bound()];
        let Some(flow) = Flow::of(graph, ScopeId::MAIN, &mut dynamic) else { return Cuts::default() };
        let whole = paths::Sums::of(&flow, latent, output, &[]);
        let spine = whole.spine(&flow, latent);
        let mut skips = skips::find(&flow, cones);
        let aside = paths::Sums::of(&flow, latent, output, &skips);
        let trunk = aside.spine(&flow, latent);
        let residuals = residuals::find(&flow, facts, cones, &trunk);
        let levels = levels(facts, &trunk);
        for skip in &mut skips {
            let joined = graph.node(skip.join).output(0);
            skip.level = joined.and_then(|v| level_of(&levels, facts, v));
        }
        let mut borders = blocks::borders(&flow, cones, &aside, &trunk, &residuals);
        for border in &mut borders {
            let at = border.streams.iter().map(|&v| place(&flow, v)).max().unwrap_or(0);
            let passes = |s: &&Skip| place(&flow, s.source) < at && Some(at) <= flow.place_of(s.join).map(|p| p + 1);
            border.skips = skips.iter().filter(passes).filter(|s| !border.streams.contains(&s.source)).count();
        }
        let runs = blocks::runs(&flow, cones, &borders, &residuals);
        Cuts { spine, borders, runs, residuals, skips, levels }
    }

    /// The resolution of an image on the way, 0 for the finest; `None` for other values.
    pub fn level(&self, facts: &Facts, value: ValueId) -> Option<usize> {
        level_of(&self.levels, facts, value)
    }

    /// The longest run by number of nodes.
    pub fn longest(&self) -> Option<&Run> {
        let nodes = |run: &&Run| run.blocks.iter().map(|b| b.nodes.len()).sum::<usize>();
        self.runs.iter().rev().max_by_key(nodes)
    }
}

/// Position of a value in the order of computation: 0 for what no node of the main graph makes, else one more than the
/// place of its node.
fn place(flow: &Flow, value: ValueId) -> usize {
    match flow.graph.value(value).origin() {
        Origin::Node(..) => flow.made_at(value).map_or(0, |at| at + 1),
        _ => 0,
    }
}

fn levels(facts: &Facts, trunk: &[ValueId]) -> Vec<Vec<DimExpr>> {
    let mut levels: Vec<Vec<DimExpr>> = Vec::new();
    for shape in trunk.iter().filter_map(|&v| facts.shape(v)).filter(|s| s.len() == 4) {
        if !levels.iter().any(|l| l[..] == shape[2..]) {
            levels.push(shape[2..].to_vec());
        }
    }
    levels
}

fn level_of(levels: &[Vec<DimExpr>], facts: &Facts, value: ValueId) -> Option<usize> {
    let shape = facts.shape(value).filter(|s| s.len() == 4)?;
    levels.iter().position(|l| l[..] == shape[2..])
}

/// Whether a value changes from step to step.
fn is_latent(cones: &Cones, value: ValueId) -> bool {
    cones.of(value) == Cone::Latent
}
