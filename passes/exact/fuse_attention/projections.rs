//! Joining the weights that make the queries, keys and values of an attention.

use super::heads::Flat;
use crate::Match;
use lathe_ir::{Node, NodeId, Patch, Tensor, Use, ValueId};

/// The value that holds queries, keys and values one after another, and the width of each.
pub(super) fn packed(flats: &[Flat]) -> Option<(ValueId, i64)> {
    match *flats {
        [
            Flat::Part { packed, index: 0, width },
            Flat::Part { packed: k, index: 1, .. },
            Flat::Part { packed: v, index: 2, .. },
        ] if packed == k && packed == v => Some((packed, width)),
        _ => None,
    }
}

/// A product with a constant weight, and the constant bias added to it.
struct Projection {
    x: ValueId,
    weight: ValueId,
    bias: Option<ValueId>,
}

/// Whether nothing but the nodes `of` an attention needs `value`, which it takes apart into heads.
fn is_private(m: &Match, value: ValueId, of: &[NodeId], budget: &mut usize) -> bool {
    const LAYOUT: &[&str] =
        &["Reshape", "Transpose", "Split", "Gather", "Squeeze", "Unsqueeze", "Slice", "Identity", "Mul", "Div"];
    let graph = m.graph();
    graph.value(value).uses().iter().all(|place| match place {
        Use::Node(user, _) if of.contains(user) => true,
        Use::Node(user, _) if *budget > 0 && LAYOUT.iter().any(|op| graph.node(*user).is(op)) => {
            *budget -= 1;
            graph.node(*user).outputs().iter().flatten().all(|&output| is_private(m, output, of, budget))
        }
        _ => false,
    })
}

/// The projection that makes `value`, if nothing but the nodes `of` an attention needs it or what is inside it: else it
/// would be stored and computed twice.
fn projection(m: &Match, value: ValueId, of: &[NodeId]) -> Option<Projection> {
    let graph = m.graph();
    let made = |value: ValueId| -> Option<&Node> {
        Some(graph.node(graph.producer(value)?)).filter(|n| n.scope() == m.scope())
    };
    let once = |value: ValueId| {
        let uses = graph.value(value).uses();
        uses.len() == 1 && !uses.iter().any(|u| matches!(u, Use::Output(..)))
    };
    let matrix = |node: &Node, bias: Option<ValueId>| -> Option<Projection> {
        let (x, weight) = (node.input(0)?, node.input(1)?);
        let constant = graph.constant(weight)?;
        let fits = node.is("MatMul") && constant.dims().len() == 2 && m.facts().ndim(x) == Some(3);
        (fits && graph.value(weight).uses().len() == 1).then_some(Projection { x, weight, bias })
    };
    let node = made(value).filter(|_| is_private(m, value, of, &mut 64))?;
    if !node.is("Add") {
        return matrix(node, None);
    }
    let vector = |v: ValueId| graph.constant(v).is_some_and(|t| t.dims().len() == 1 && t.len() > 1);
    let (a, b) = (node.input(0)?, node.input(1)?);
    let (product, bias) = match (vector(a), vector(b)) {
        (_, true) => (a, b),
        (true, false) => (b, a),
        _ => return None,
    };
    matrix(made(product).filter(|_| once(product))?, Some(bias))
}

/// One projection that makes queries, keys and values: the input, the joined weight and the joined bias.
pub(super) fn joined_projection(
    m: &Match,
    g: &mut Patch,
    flats: &[Flat],
    of: &[NodeId],
) -> Option<(ValueId, ValueId, Option<ValueId>)> {
    let graph = m.graph();
    if let Some((packed, _)) = packed(flats) {
        let found = projection(m, packed, of)?;
        return Some((found.x, found.weight, found.bias));
    }
    let each: Vec<Projection> = flats
        .iter()
        .map(|flat| match *flat {
            Flat::Whole(value) => projection(m, value, of),
            Flat::Part { .. } => None,
        })
        .collect::<Option<_>>()?;
    if each.iter().any(|p| p.x != each[0].x || p.bias.is_some() != each[0].bias.is_some()) {
        return None;
    }
    let weights: Vec<&Tensor> = each.iter().map(|p| graph.constant(p.weight)).collect::<Option<_>>()?;
    let biases: Vec<&Tensor> = each.iter().filter_map(|p| p.bias).map(|b| graph.constant(b)).collect::<Option<_>>()?;
    let same_width = |all: &[&Tensor]| all.iter().all(|t| t.dims() == all[0].dims() && t.dtype() == all[0].dtype());
    if !same_width(&weights) || (!biases.is_empty() && !same_width(&biases)) {
        return None;
    }
    let weight = join_columns(&weights)?;
    let bias = if biases.is_empty() { None } else { Some(join_columns(&biases)?) };
    let bias = bias.map(|bias| g.constant("bias", bias));
    Some((each[0].x, g.constant("weight", weight), bias))
}

/// Tensors of one shape beside each other along the last axis.
fn join_columns(tensors: &[&Tensor]) -> Option<Tensor> {
    let first = tensors.first()?;
    let mut dims = first.dims().to_vec();
    let columns = *dims.last()?;
    let row = first.dtype().byte_len(columns).filter(|&n| n > 0 && first.dtype().bits() >= 8)?;
    let mut bytes = Vec::with_capacity(first.byte_len().checked_mul(tensors.len())?);
    for at in (0..first.byte_len()).step_by(row) {
        for tensor in tensors {
            bytes.extend_from_slice(tensor.bytes().get(at..at + row)?);
        }
    }
    *dims.last_mut()? = columns.checked_mul(tensors.len())?;
    Tensor::new(first.dtype(), dims, bytes).ok()
}
