//! Runs of units that go together, found in the graph by the summands that go.

use super::surgery::{maker, only_reader};
use crate::lossy::layers::{Tap, Weight, weights};
use lathe_ir::{Graph, Node, NodeId, ScopeId, Use, ValueId};
use std::collections::BTreeSet;

/// Nodes between a sum and the stream that is made of it, and between a layer and the sum, at most.
const MOST_STEPS: usize = 6;

/// What may stand between a sum and the stream.
const POST: [&str; 14] = [
    "Relu",
    "Clip",
    "LeakyRelu",
    "PRelu",
    "HardSwish",
    "Gelu",
    "Sigmoid",
    "Tanh",
    "Identity",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "BatchNormalization",
    "Cast",
];

/// Units that follow each other and go.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Span {
    /// The stream that the first of them reads.
    pub enter: ValueId,
    /// The sum of the last.
    pub leave: ValueId,
    /// What goes of the span.
    pub gone: Vec<ValueId>,
    /// What the unit before it adds, and the sum that is.
    pub before: Option<(ValueId, ValueId)>,
}

/// The spans of summands that go, in order. Those that enter the stream otherwise than by a plain sum make none.
pub(super) fn spans(graph: &Graph, gone: &[ValueId]) -> Vec<Span> {
    let named: BTreeSet<ValueId> = gone.iter().copied().collect();
    let order: Vec<NodeId> = graph.nodes(ScopeId::MAIN).collect();
    let mut found: Vec<Span> = Vec::new();
    for id in order {
        let node = graph.node(id);
        let (true, &[Some(a), Some(b)], Some(sum)) = (node.is("Add"), node.inputs(), node.output(0)) else { continue };
        let (skip, branch) = match (named.contains(&a), named.contains(&b)) {
            (false, true) => (a, b),
            (true, false) => (b, a),
            _ => continue,
        };
        let mut own = vec![branch];
        own.extend(named.contains(&sum).then_some(sum));
        match found.iter_mut().find(|span| comes_from(graph, skip, span.leave)) {
            Some(span) => {
                span.leave = sum;
                span.gone.extend(own);
            }
            None => {
                let before = last_sum(graph, skip);
                found.push(Span { enter: skip, leave: sum, gone: own, before });
            }
        }
    }
    found
}

/// Whether a stream is made of a sum by what may stand between.
fn comes_from(graph: &Graph, stream: ValueId, sum: ValueId) -> bool {
    back(graph, stream, &|value| value == sum).is_some()
}

/// Walks from a stream towards the sum it is made of.
fn back(graph: &Graph, stream: ValueId, end: &dyn Fn(ValueId) -> bool) -> Option<ValueId> {
    let mut value = stream;
    for _ in 0..MOST_STEPS {
        if end(value) {
            return Some(value);
        }
        let node = graph.node(maker(graph, value)?);
        let data: Vec<ValueId> =
            node.inputs().iter().flatten().copied().filter(|&v| graph.constant(v).is_none()).collect();
        value = match data.as_slice() {
            [one] if POST.iter().any(|op| node.is(op)) => *one,
            _ => return None,
        };
    }
    None
}

/// The summand that a layer gives, and the sum, behind a stream.
fn last_sum(graph: &Graph, stream: ValueId) -> Option<(ValueId, ValueId)> {
    let summands = |value: ValueId| -> Option<[ValueId; 2]> {
        let node = graph.node(maker(graph, value)?);
        match *node.inputs() {
            [Some(a), Some(b)] if node.is("Add") && graph.constant(a).is_none() && graph.constant(b).is_none() => {
                Some([a, b])
            }
            _ => None,
        }
    };
    let sum = back(graph, stream, &|value| summands(value).is_some())?;
    let alone = |&v: &ValueId| only_reader(graph, v).is_some() && layer(graph, v).is_some();
    Some((summands(sum)?.into_iter().find(alone)?, sum))
}

/// A layer whose output, with constants added and multiplied, is a summand.
pub(super) struct Last {
    pub weight: Weight,
    pub tap: Tap,
    /// Products with a constant between the layer and the summand: the node and the constant.
    pub factors: Vec<(NodeId, ValueId)>,
    /// Sums with a constant between them, in order.
    pub sums: Vec<(NodeId, ValueId)>,
}

/// The layer behind a summand, if its weight is its own and nothing else reads what lies between.
pub(super) fn layer(graph: &Graph, summand: ValueId) -> Option<NodeId> {
    steps(graph, summand).map(|(id, ..)| id)
}

type Steps = (NodeId, Vec<(NodeId, ValueId)>, Vec<(NodeId, ValueId)>);

fn steps(graph: &Graph, summand: ValueId) -> Option<Steps> {
    let (mut factors, mut sums) = (Vec::new(), Vec::new());
    let mut value = summand;
    for _ in 0..MOST_STEPS {
        only_reader(graph, value)?;
        let id = maker(graph, value)?;
        let node = graph.node(id);
        if is_layer(node) {
            return Some((id, factors, sums));
        }
        let &[Some(a), Some(b)] = node.inputs() else { return None };
        let (data, constant) = match (graph.constant(a), graph.constant(b)) {
            (None, Some(_)) => (a, b),
            (Some(_), None) => (b, a),
            _ => return None,
        };
        match node.op_type.as_str() {
            "Mul" if node.is_standard() && sums.is_empty() => factors.push((id, constant)),
            // A constant that is added before a factor is one of the layer's own.
            "Add" if node.is_standard() => sums.push((id, constant)),
            _ => return None,
        }
        value = data;
    }
    None
}

fn is_layer(node: &Node) -> bool {
    ["MatMul", "Gemm", "Conv"].iter().any(|op| node.is(op))
}

impl Last {
    /// `None` where the weight cannot be changed for this summand alone.
    pub fn of(graph: &Graph, summand: ValueId) -> Option<Last> {
        let (id, factors, sums) = steps(graph, summand)?;
        let (found, _) = weights(graph);
        let weight = found.into_iter().find(|w| w.taps.iter().any(|tap| tap.node == id))?;
        let plain = |&place: &Use| matches!(place, Use::Node(user, _) if user == id);
        let [tap] = weight.taps.as_slice() else { return None };
        let own = graph.value(weight.value).uses().iter().all(plain) && tap.rows.is_some();
        let node = graph.node(id);
        let scaled =
            node.is("Gemm") && (node.float("alpha").unwrap_or(1.0) != 1.0 || node.float("beta").unwrap_or(1.0) != 1.0);
        let tap = tap.clone();
        (own && !scaled).then_some(Last { weight, tap, factors, sums })
    }
}
