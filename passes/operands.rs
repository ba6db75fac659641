//! Operands that moved from attributes to inputs over the versions of the operator set.

use crate::rule::{Match, Refusal};
use lathe_analysis::Facts;
use lathe_ir::{AttributeValue, Graph, Node, Patch, ValueId};

/// The whole numbers a node takes as attribute `name` in older versions and as input `index` in newer ones; `None`
/// where they are left out. Refuses where they are computed.
pub(crate) fn int64s(m: &Match, node: &Node, name: &str, index: usize) -> Result<Option<Vec<i64>>, Refusal> {
    int64s_in(m.graph(), m.facts(), node, name, index)
}

fn int64s_in(graph: &Graph, facts: &Facts, node: &Node, name: &str, index: usize) -> Result<Option<Vec<i64>>, Refusal> {
    let known = |value| match graph.constant(value) {
        Some(tensor) => tensor.to_i64s(),
        None => facts.contents(value)?.known(),
    };
    match (node.attribute(name), node.input(index)) {
        (Some(AttributeValue::Ints(values)), _) => Ok(Some(values.clone())),
        (Some(AttributeValue::Int(value)), _) => Ok(Some(vec![*value])),
        (None, None) => Ok(None),
        (None, Some(value)) => match known(value) {
            Some(values) => Ok(Some(values)),
            None => Err(format!("the {name} of a {} are computed", node.op_type).into()),
        },
        _ => Err(format!("the {name} of a {} are of an unexpected type", node.op_type).into()),
    }
}

/// Axes counted from the front, sorted. Refuses axes that are out of range or given twice.
pub(crate) fn sorted_axes(m: &Match, axes: &[i64], ndim: usize) -> Result<Vec<usize>, Refusal> {
    let mut found: Vec<usize> = axes.iter().map(|&axis| m.axis(axis, ndim)).collect::<Result<_, _>>()?;
    found.sort_unstable();
    m.require(found.windows(2).all(|pair| pair[0] != pair[1]), "an axis is given twice")?;
    Ok(found)
}

/// A node of `op` over `x` with `axes`, as the operator set in use writes them: as an input from version `since` on.
pub(crate) fn with_axes(m: &Match, g: &mut Patch, node: Node, since: i64, x: ValueId, axes: &[usize]) -> ValueId {
    let axes: Vec<i64> = axes.iter().map(|&axis| axis as i64).collect();
    if m.opset() >= since {
        let axes = g.int64s("axes", &axes);
        g.node(node, &[x, axes])
    } else {
        g.node(node.with("axes", axes), &[x])
    }
}

/// One axis of a `Slice`, as the file states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    /// The axis, from the front.
    pub axis: usize,
    /// Where it starts; negative counts from the end.
    pub start: i64,
    /// Where it ends (exclusive); negative counts from the end.
    pub end: i64,
    /// How far apart the elements are; never 0.
    pub step: i64,
}

/// What a `Slice` over `ndim` axes takes, in the order it states them. Refuses where that is computed.
pub(crate) fn slice_ranges(graph: &Graph, facts: &Facts, node: &Node, ndim: usize) -> Result<Vec<Range>, Refusal> {
    let read = |name, index| int64s_in(graph, facts, node, name, index);
    let starts = read("starts", 1)?.ok_or("a Slice has no starts")?;
    let ends = read("ends", 2)?.ok_or("a Slice has no ends")?;
    let axes = read("axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = read("steps", 4)?.unwrap_or_else(|| vec![1; starts.len()]);
    let count = starts.len();
    if ends.len() != count || axes.len() != count || steps.len() != count || steps.contains(&0) {
        return Err("a Slice has operands that do not fit together".into());
    }
    let ranges = (0..count).map(|i| {
        let axis = if axes[i] < 0 { axes[i].saturating_add(ndim as i64) } else { axes[i] };
        let axis = usize::try_from(axis).ok().filter(|&axis| axis < ndim).ok_or("a Slice has an axis out of range")?;
        Ok(Range { axis, start: starts[i], end: ends[i], step: steps[i] })
    });
    ranges.collect()
}

/// A `Slice` with these ranges, as the operator set in use writes it. Refuses steps before version 10.
pub(crate) fn slice(m: &Match, g: &mut Patch, x: ValueId, ranges: &[Range]) -> Result<ValueId, Refusal> {
    let column = |part: fn(&Range) -> i64| ranges.iter().map(part).collect::<Vec<i64>>();
    let (starts, ends) = (column(|r| r.start), column(|r| r.end));
    let (axes, steps) = (column(|r| r.axis as i64), column(|r| r.step));
    if m.opset() < 10 {
        m.require(steps.iter().all(|&s| s == 1), "before opset 10 a Slice has no steps")?;
        let node = Node::new("Slice").with("starts", starts).with("ends", ends).with("axes", axes);
        return Ok(g.node(node, &[x]));
    }
    let stepped = steps.iter().any(|&s| s != 1);
    let mut inputs = vec![x, g.int64s("starts", &starts), g.int64s("ends", &ends), g.int64s("axes", &axes)];
    if stepped {
        inputs.push(g.int64s("steps", &steps));
    }
    Ok(g.node(Node::new("Slice"), &inputs))
}
