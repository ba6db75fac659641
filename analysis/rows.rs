//! Values of a model read as matrices: what a layer multiplies with its weight.

use lathe_ir::{Graph, Model, Node, NodeId, Origin, ScopeId, Tensor, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// How a tensor is read as a matrix whose rows are tokens, positions or samples and whose columns are features.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum View {
    /// This axis holds the features (negative: from the end); all other axes together are the rows, in their order.
    Axis(i64),
    /// Of `[n, positions, …, features]`, what lies at this position of the second axis; the last axis holds the features.
    Position(usize),
    /// A row is what a convolution sees at one output position: `channels × kernel` values in the order of its weight.
    Patches(Window),
}

/// The window of a convolution: what its attributes say.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Window {
    /// Channels of the input.
    pub channels: i64,
    /// Size of the window, per spatial axis.
    pub kernel: Vec<i64>,
    /// Steps, per spatial axis; empty for 1.
    pub strides: Vec<i64>,
    /// Distance of the taps, per spatial axis; empty for 1.
    pub dilations: Vec<i64>,
    /// Padding before every spatial axis, then after every one; empty for none.
    pub pads: Vec<i64>,
    /// `SAME_UPPER`, `SAME_LOWER`, `VALID`, or empty where `pads` counts.
    pub auto_pad: String,
    /// Whether every channel is a row of its own, which then holds its taps alone.
    pub apart: bool,
}

/// A value of the main graph, read as rows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rows {
    /// The name of the value.
    pub value: String,
    /// How it is read.
    pub view: View,
}

impl Rows {
    /// Rows along the last axis: the tokens of a linear layer's input.
    pub fn last(value: impl Into<String>) -> Rows {
        Rows { value: value.into(), view: View::Axis(-1) }
    }

    /// Rows along the last axis at one position of the second: a class token among others.
    pub fn at(value: impl Into<String>, position: usize) -> Rows {
        Rows { value: value.into(), view: View::Position(position) }
    }

    /// Rows along the channel axis of `[n, channels, …]`: one per position.
    pub fn channels(value: impl Into<String>) -> Rows {
        Rows { value: value.into(), view: View::Axis(1) }
    }

    /// What a `Conv` node multiplies with its weight; `None` if the node is no convolution with a known weight. A
    /// grouped convolution sees, in its group `i` of `g`, the `i`-th of `g` equal parts of these features.
    pub fn of_conv(graph: &Graph, id: NodeId) -> Option<Rows> {
        let node = graph.node(id);
        if !node.is("Conv") {
            return None;
        }
        let weight = weight_dims(graph, node.input(1)?)?;
        let value = graph.value(node.input(0)?).name.clone();
        let sizes = |name: &str| node.ints(name).unwrap_or_default().to_vec();
        let (per_group, kernel) = weight.get(1..)?.split_first()?;
        let window = Window {
            channels: i64::try_from(*per_group).ok()?.checked_mul(node.int("group").unwrap_or(1))?,
            kernel: kernel.iter().map(|&k| k as i64).collect(),
            strides: sizes("strides"),
            dilations: sizes("dilations"),
            pads: sizes("pads"),
            auto_pad: node.string("auto_pad").filter(|p| *p != "NOTSET").unwrap_or_default().to_owned(),
            apart: false,
        };
        let plain = window.kernel.iter().all(|&k| k == 1)
            && window.strides.iter().all(|&s| s == 1)
            && window.pads.iter().all(|&p| p == 0);
        Some(if plain { Rows::channels(value) } else { Rows { value, view: View::Patches(window) } })
    }

    /// What a depthwise `Conv` node sees of every channel: its taps, with the channels as further rows. `None` if the node is
    /// no convolution with one filter for every channel.
    pub fn of_depthwise(graph: &Graph, id: NodeId) -> Option<Rows> {
        let weight = weight_dims(graph, graph.node(id).input(1)?)?;
        let group = graph.node(id).int("group").and_then(|group| usize::try_from(group).ok());
        if weight.get(1) != Some(&1) || group != weight.first().copied() {
            return None;
        }
        let rows = Rows::of_conv(graph, id)?;
        match rows.view {
            View::Patches(window) => Some(Rows { view: View::Patches(Window { apart: true, ..window }), ..rows }),
            _ => None,
        }
    }

    /// How messages and result files name it: `x`, `x axis 1`, `x at 0`, `x patches 3x3`. Distinct rows may share a label.
    pub fn label(&self) -> String {
        match &self.view {
            View::Axis(-1) => self.value.clone(),
            View::Axis(axis) => format!("{} axis {axis}", self.value),
            View::Position(position) => format!("{} at {position}", self.value),
            View::Patches(window) => {
                let kernel: Vec<String> = window.kernel.iter().map(ToString::to_string).collect();
                let apart = if window.apart { " by channel" } else { "" };
                format!("{} patches {}{apart}", self.value, kernel.join("x"))
            }
        }
    }
}

/// What every `MatMul`, `Gemm` and ungrouped `Conv` of the main graph multiplies with a constant weight, in order of
/// the nodes. Layers that read the same tensor in the same way share one entry.
pub fn weight_inputs(model: &Model) -> Vec<Rows> {
    let graph = &model.graph;
    let mut seen = BTreeSet::new();
    let all = graph.nodes(ScopeId::MAIN).filter_map(|id| weight_input(graph, id));
    all.filter(|rows| seen.insert(rows.clone())).collect()
}

fn weight_input(graph: &Graph, id: NodeId) -> Option<Rows> {
    let node = graph.node(id);
    let x = node.input(0)?;
    if graph.constant(x).is_some() || graph.scope_of(x) != Some(ScopeId::MAIN) {
        return None;
    }
    let named = |view| Rows { value: graph.value(x).name.clone(), view };
    let rank = |index: usize| weight_dims(graph, node.input(index)?).map(|dims| dims.len());
    if node.is("MatMul") && rank(1) == Some(2) {
        return Some(named(View::Axis(-1)));
    }
    if node.is("Gemm") && rank(1) == Some(2) {
        return Some(named(View::Axis(if node.int("transA") == Some(1) { 0 } else { -1 })));
    }
    if node.is("Conv") && node.int("group").unwrap_or(1) == 1 { Rows::of_conv(graph, id) } else { None }
}

/// The shape of a weight: a constant, possibly behind operators that only store it otherwise.
fn weight_dims(graph: &Graph, value: ValueId) -> Option<Vec<usize>> {
    const LONGEST_CHAIN: usize = 8;
    let mut at = value;
    let mut transposes: Vec<Vec<usize>> = Vec::new();
    for _ in 0..LONGEST_CHAIN {
        if let Some(tensor) = constant(graph, at) {
            let mut dims = tensor.dims().to_vec();
            for perm in transposes.iter().rev() {
                let reversed: Vec<usize> = (0..dims.len()).rev().collect();
                let perm = if perm.is_empty() { &reversed } else { perm };
                dims = perm.iter().map(|&axis| dims.get(axis).copied()).collect::<Option<_>>()?;
            }
            return Some(dims);
        }
        let node = graph.node(graph.producer(at)?);
        match node.op_type.as_str() {
            "Transpose" => {
                let perm = node.ints("perm").unwrap_or_default().iter().map(|&axis| usize::try_from(axis));
                transposes.push(perm.collect::<Result<_, _>>().ok()?);
            }
            "Identity" | "Cast" | "DequantizeLinear" => {}
            _ => return None,
        }
        at = node.input(0)?;
    }
    None
}

/// The tensor of an initializer or of a `Constant` node.
fn constant(graph: &Graph, value: ValueId) -> Option<&Tensor> {
    match graph.value(value).origin() {
        Origin::Node(id, 0) => constant_of(graph.node(id)),
        _ => graph.constant(value),
    }
}

fn constant_of(node: &Node) -> Option<&Tensor> {
    match node.attribute("value") {
        Some(lathe_ir::AttributeValue::Tensor(tensor)) if node.is("Constant") => Some(tensor),
        _ => None,
    }
}
