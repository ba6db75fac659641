//! Looking at what makes a value.

use crate::{Match, Refusal};
use lathe_ir::{DataType, Node, NodeId, Tensor, ValueId};

/// The standard node that makes `value` as its first output in the graph of the match.
pub(super) fn producer<'a>(m: &Match<'a>, value: ValueId) -> Option<(NodeId, &'a Node)> {
    let id = m.graph().producer(value)?;
    let node = m.graph().node(id);
    (node.is_standard() && node.scope() == m.scope() && node.output(0) == Some(value)).then_some((id, node))
}

/// The producer of `value`, if it is an `op`.
pub(super) fn made_by<'a>(m: &Match<'a>, value: ValueId, op: &str) -> Option<&'a Node> {
    producer(m, value).map(|(_, node)| node).filter(|node| node.is(op))
}

/// Whether a node regroups axes and moves nothing.
pub(super) fn is_layout(node: &Node) -> bool {
    ["Reshape", "Squeeze", "Unsqueeze", "Flatten"].iter().any(|op| node.is(op))
}

/// The number in a constant of one element that adds no axes to scores.
pub(super) fn constant_number(m: &Match, value: ValueId) -> Option<f64> {
    let tensor = m.graph().constant(value).filter(|t| t.len() == 1 && t.dims().len() <= 4)?;
    tensor.scalar_f64()
}

/// The number that every element of a constant is.
pub(super) fn uniform(m: &Match, value: ValueId) -> Option<f64> {
    const MOST: usize = 1 << 16;
    let tensor = m.graph().constant(value).filter(|t| (1..=MOST).contains(&t.len()))?;
    let all = tensor.to_f64s()?;
    all.iter().all(|x| *x == all[0]).then_some(all[0])
}

/// Whether a score that becomes `fill`, or to which `fill` is added, is as good as minus infinity whatever it was.
pub(super) fn hides(fill: f64, elem: DataType) -> bool {
    let enough =
        if matches!(elem, DataType::Float | DataType::Double | DataType::Bfloat16) { -1e30 } else { f64::NEG_INFINITY };
    fill <= enough
}

/// The tensor of one number of type `elem`.
pub(super) fn number(elem: DataType, value: f64) -> Result<Tensor, Refusal> {
    Tensor::from_f64s(elem, &[], &[value]).ok_or(Refusal::NoMatch)
}
