//! What operators mean for units: which are layers, which only move data, and what a set of nodes computes.

use super::{UnitKind, flow::Flow};
use crate::{
    StableHash,
    operators::{Operator, Trait},
};
use lathe_ir::{Graph, Node, NodeId, ValueId};
use std::hash::{Hash, Hasher};

fn known_domain(node: &Node) -> bool {
    node.is_standard() || Operator::is_microsoft(&node.domain)
}

fn among(node: &Node, names: &[&str]) -> bool {
    known_domain(node) && names.contains(&node.op_type.as_str())
}

/// What may stand on the skip of a unit that changes the stream, beside a layer.
const PROJECTION: &[&str] = &["Add", "AveragePool", "BatchNormalization", "MaxPool", "Pad", "Resize", "Slice"];

/// The steps of a normalization that is spelled out.
const NORM_STEPS: &[&str] = &["Add", "Div", "Mul", "Pow", "Reciprocal", "ReduceMean", "Sqrt", "Sub"];

fn composite(node: &Node) -> bool {
    Trait::Composite.of(node) || !known_domain(node)
}

/// Whether a node does the kind of work that makes a unit worth its name.
pub(crate) fn is_layer(node: &Node) -> bool {
    Trait::Attention.of(node)
        || Trait::Convolution.of(node)
        || Trait::Product.of(node)
        || Trait::Mixing.of(node)
        || composite(node)
}

/// Whether a node is no linear map of its data, apart from gates, which multiply two values.
pub(super) fn is_nonlinear(node: &Node) -> bool {
    Trait::Nonlinear.of(node) || Trait::Attention.of(node) || composite(node)
}

/// Whether a node hands its first input on, in another layout or type.
pub(crate) fn is_layout(node: &Node) -> bool {
    Trait::Layout.of(node)
}

/// Whether a node may stand on the projected skip of a unit; the second value says that it projects.
pub(crate) fn is_projection(graph: &Graph, node: &Node) -> (bool, bool) {
    let fixed = node.input(1).is_some_and(|v| graph.value(v).initializer().is_some());
    let layer =
        Trait::Convolution.of(node) || (Trait::Product.of(node) && fixed) || among(node, &["AveragePool", "MaxPool"]);
    (layer || among(node, PROJECTION), layer)
}

/// What a node may be between a join and the stream of the next unit.
pub(super) fn post_step(node: &Node) -> Option<super::PostOp> {
    use super::PostOp::{Activation, Layout, Norm};
    let norm = Trait::Normalization.of(node) || among(node, NORM_STEPS);
    let found = [(norm, Norm), (Trait::Nonlinear.of(node), Activation), (is_layout(node), Layout)];
    found.into_iter().find(|(is, _)| *is).map(|(_, post)| post)
}

/// Whether a node adds up several tensors and perhaps normalizes the sum: which inputs, and which output is the sum.
pub(crate) fn sum_of(node: &Node) -> Option<(Vec<ValueId>, ValueId, bool)> {
    let pair = |a: usize, b: usize| Some(vec![node.input(a)?, node.input(b)?]);
    let plain = node.output(0)?;
    if node.is_standard() {
        return match node.op_type.as_str() {
            "Add" => Some((pair(0, 1)?, plain, false)),
            "Sum" => Some((node.inputs().iter().flatten().copied().collect(), plain, false)),
            _ => None,
        };
    }
    if node.domain != "com.microsoft" {
        return None;
    }
    match node.op_type.as_str() {
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => {
            Some((pair(0, 1)?, node.output(3).unwrap_or(plain), true))
        }
        "SkipGroupNorm" => Some((pair(0, 3)?, node.output(1).unwrap_or(plain), true)),
        "QLinearAdd" => Some((pair(0, 3)?, plain, false)),
        _ => None,
    }
}

/// Whether the outputs of a node are one stream, once plain and once normalized.
pub(super) fn is_normalized_sum(node: &Node) -> bool {
    among(node, &["EmbedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization"])
        || among(node, &["SkipSimplifiedLayerNormalization"])
}

/// What the nodes of a unit compute; `inside` says which places belong to them.
pub(crate) fn classify(flow: &Flow, places: &[usize], inside: impl Fn(usize) -> bool) -> UnitKind {
    let graph = flow.graph;
    let node = |at: usize| graph.node(flow.order[at]);
    let from_inside = |v: ValueId| flow.made_at(v).is_some_and(&inside);
    let any = |test: &dyn Fn(NodeId) -> bool| places.iter().any(|&at| test(flow.order[at]));
    if any(&|id| Trait::Attention.of(graph.node(id)) || graph.node(id).is("Softmax")) {
        let foreign = |at: usize| {
            let reads = &flow.reads[at];
            let fused = among(node(at), &["MultiHeadAttention", "Attention"]);
            let pair = if fused { node(at).input(0).zip(node(at).input(1)) } else { None };
            let pair = pair.filter(|(_, key)| reads.contains(key));
            let product = Trait::Product.of(node(at)) && reads.len() == 2;
            pair.is_some_and(|(q, k)| from_inside(q) && !from_inside(k))
                || (product && from_inside(reads[0]) != from_inside(reads[1]))
        };
        return if places.iter().any(|&at| foreign(at)) { UnitKind::CrossAttention } else { UnitKind::Attention };
    }
    let wide = |id: NodeId| {
        let node = graph.node(id);
        let kernel = || {
            let weight = node.inputs().iter().flatten().find_map(|&v| graph.constant(v).filter(|t| t.dims().len() > 2));
            weight.is_some_and(|t| t.dims()[2..].iter().any(|&k| k > 1))
        };
        let stated = node.ints("kernel_shape").map(|k| k.iter().any(|&k| k > 1));
        Trait::Convolution.of(node) && stated.unwrap_or_else(kernel)
    };
    if any(&wide) {
        return UnitKind::Conv;
    }
    let turned = |value: ValueId| {
        let maker = graph.producer(value).map(|id| graph.node(id));
        maker.is_some_and(|n| n.is("Transpose") && n.ints("perm") == Some(&[0, 2, 1]))
    };
    let along_tokens = |id: NodeId| {
        let node = graph.node(id);
        let constant = |i: usize| node.input(i).is_some_and(|v| graph.constant(v).is_some());
        node.is("MatMul") && (constant(0) || (constant(1) && node.input(0).is_some_and(turned)))
    };
    if any(&|id| Trait::Mixing.of(graph.node(id)) || along_tokens(id) || graph.node(id).is("Loop")) {
        return UnitKind::Mixer;
    }
    UnitKind::Mlp
}

/// A number that is equal for nodes of equal operators, reading constants of equal sizes.
pub(super) fn signature(graph: &Graph, nodes: &[NodeId]) -> u64 {
    let mut hash = StableHash::new();
    for &id in nodes {
        let node = graph.node(id);
        (&node.domain, &node.op_type).hash(&mut hash);
        for tensor in node.inputs().iter().flatten().filter_map(|&v| graph.constant(v)) {
            tensor.dims().hash(&mut hash);
        }
    }
    hash.finish()
}
