//! Sizes as tensors, read off values at run time where they are not known.

use crate::{Match, Refusal};
use lathe_analysis::DimExpr;
use lathe_ir::{Node, Patch, ValueId};

/// The largest multiple of a size that is computed from it.
const MOST_TIMES: i64 = 128;

/// `size` as an int64 tensor of one element. A size that is not known is read off an input of the graph or else off the
/// first value that has it, so that all layers share it and no projection has another use; else off one of `near`.
pub(super) fn size(m: &Match, g: &mut Patch, size: &DimExpr, near: &[ValueId]) -> Option<ValueId> {
    if let Some(known) = size.as_known() {
        return Some(g.int64s("size", &[known]));
    }
    let Some((value, axis)) = found(m, size, near) else { return computed(m, g, size, near) };
    // What the model returns may be a cache, which the operator is to put together itself.
    if m.graph().is_output(value)
        && let Some(sum) = sum_of_inputs(m, g, size, near)
    {
        return Some(sum);
    }
    if m.opset() >= 15 {
        return Some(g.node(Node::new("Shape").with("start", axis).with("end", axis + 1), &[value]));
    }
    let all = g.node(Node::new("Shape"), &[value]);
    let index = g.int64s("axis", &[axis]);
    Some(g.node(Node::new("Gather").with("axis", 0), &[all, index]))
}

/// A value and its axis of this size.
fn found(m: &Match, size: &DimExpr, near: &[ValueId]) -> Option<(ValueId, i64)> {
    let graph = m.graph();
    let axis = |value: ValueId| {
        let axis = m.facts().shape(value)?.iter().position(|s| s == size)?;
        Some((value, axis as i64))
    };
    let before = graph.nodes(m.scope()).take_while(|&id| id != m.root());
    let inputs = graph.main().inputs().iter().copied();
    let made = before.flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    inputs.chain(made).chain(near.iter().copied()).find_map(axis)
}

/// A size that is a multiple of one that is found, or the sum of two that inputs have.
fn computed(m: &Match, g: &mut Patch, size: &DimExpr, near: &[ValueId]) -> Option<ValueId> {
    let multiple = (2..=MOST_TIMES).find_map(|factor| {
        let rest = size.exact_div(&factor.into())?;
        found(m, &rest, near).map(|_| (factor, rest))
    });
    if let Some((factor, rest)) = multiple {
        let rest = self::size(m, g, &rest, near)?;
        let factor = g.int64s("factor", &[factor]);
        return Some(g.node(Node::new("Mul"), &[rest, factor]));
    }
    sum_of_inputs(m, g, size, near)
}

/// A size that is the sum of two that inputs have.
fn sum_of_inputs(m: &Match, g: &mut Patch, size: &DimExpr, near: &[ValueId]) -> Option<ValueId> {
    let inputs = m.graph().main().inputs();
    let parts = inputs.iter().filter_map(|&value| m.facts().shape(value)).flatten();
    let (first, second) = parts.filter(|part| part.as_known().is_none()).find_map(|part| {
        let rest = size.minus(part)?;
        found(m, &rest, near).map(|_| (part.clone(), rest))
    })?;
    let (first, second) = (self::size(m, g, &first, near)?, self::size(m, g, &second, near)?);
    Some(g.node(Node::new("Add"), &[first, second]))
}

/// The sizes `sizes` as one tensor: a constant where all are known.
pub(super) fn sizes(m: &Match, g: &mut Patch, sizes: &[DimExpr], near: &[ValueId]) -> Option<ValueId> {
    let known: Option<Vec<i64>> = sizes.iter().map(DimExpr::as_known).collect();
    if let Some(known) = known {
        return Some(g.int64s("sizes", &known));
    }
    let mut parts = Vec::new();
    let mut rest = sizes;
    while let Some(first) = rest.first() {
        let run = rest.iter().take_while(|s| s.as_known().is_some()).count();
        if run == 0 {
            parts.push(size(m, g, first, near)?);
            rest = &rest[1..];
        } else {
            let known: Vec<i64> = rest[..run].iter().filter_map(DimExpr::as_known).collect();
            parts.push(g.int64s("sizes", &known));
            rest = &rest[run..];
        }
    }
    match parts[..] {
        [one] => Some(one),
        _ => Some(g.node(Node::new("Concat").with("axis", 0), &parts)),
    }
}

/// `x` with the sizes `to`. At most one size is inferred, and none beside a size that may be 0.
pub(super) fn reshape(
    m: &Match,
    g: &mut Patch,
    x: ValueId,
    to: &[DimExpr],
    near: &[ValueId],
) -> Result<ValueId, Refusal> {
    let known = |size: &DimExpr| size.as_known().filter(|&n| n != 0);
    if to.iter().filter(|size| known(size).is_none()).count() <= 1 {
        let sizes: Vec<i64> = to.iter().map(|size| known(size).unwrap_or(-1)).collect();
        return Ok(g.reshape(x, &sizes));
    }
    m.require(m.opset() >= 14, "several sizes that may be 0 need a Reshape of opset 14")?;
    let sizes = sizes(m, g, to, near).ok_or("a size cannot be read off an input of the graph")?;
    Ok(g.node(Node::new("Reshape").with("allowzero", 1), &[x, sizes]))
}
