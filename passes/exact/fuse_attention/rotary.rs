//! The rotary embedding of queries and keys by positions.

use super::walk::{is_layout, made_by, producer};
use crate::Match;
use lathe_analysis::DimExpr;
use lathe_ir::{Node, Pattern, ValueId};
use std::sync::LazyLock;

/// A rotary embedding that rotates the first half of a head against the second.
pub(super) struct Rotary {
    /// The angles of one half, with the positions on one axis and nothing on others.
    pub angles: ValueId,
    /// How many positions there are.
    pub positions: DimExpr,
}
static SLICED: LazyLock<Pattern> =
    LazyLock::new(|| Pattern::parse("Add(Mul(x, cos), Mul(Concat(Neg(high: Slice(x, ..)), low: Slice(x, ..)), sin))"));
static SPLIT: LazyLock<Pattern> =
    LazyLock::new(|| Pattern::parse("Add(Mul(x, cos), Mul(halves: Concat(Neg(high), low), sin))"));

/// The rotary embedding that makes `value`, and what it is applied to.
pub(super) fn unrotated(m: &Match, value: ValueId) -> Option<(ValueId, Rotary)> {
    let graph = m.graph();
    let root = graph.producer(value).filter(|&id| graph.node(id).scope() == m.scope())?;
    let size = m.facts().shape(value)?.last()?.as_known()?;
    let (x, cos, sin) = if let Some(found) = SLICED.find(graph, root) {
        let half = size / 2;
        let range = |label: &str| {
            let node = graph.node(found.node(label)?);
            let one = |i: usize| m.known_int64s(node.input(i)?).filter(|v| v.len() == 1).map(|v| v[0]);
            let axis = one(3)?;
            let step = node.input(4).is_none() || one(4) == Some(1);
            (step && (axis == -1 || axis == 3)).then_some((one(1)?, one(2)?.min(size)))
        };
        if range("high")? != (half, size) || range("low")? != (0, half) {
            return None;
        }
        (found.value("x")?, found.value("cos")?, found.value("sin")?)
    } else {
        let found = SPLIT.find(graph, root)?;
        let (high, low) = (found.value("high")?, found.value("low")?);
        let split = made_by(m, low, "Split")?;
        let halves = [Some(low), Some(high)] == *split.outputs();
        let axis = split.int("axis").unwrap_or(0);
        let even = m.facts().shape(low)?.last()?.as_known()? * 2 == size;
        if !halves || !even || !(axis == -1 || axis == 3) {
            return None;
        }
        let x = split.input(0)?;
        let (a, b) = (found.value("x")?, found.value("cos")?);
        // Either operand of a product may have been bound to either name.
        let cos = if a == x { b } else { a };
        (b == x || a == x).then_some((x, cos, found.value("sin")?))?
    };
    let concat = [&*SLICED, &*SPLIT].iter().find_map(|p| p.find(graph, root));
    let joined = concat?.nodes().iter().map(|&id| graph.node(id)).find(|n| n.is("Concat"))?.int("axis")?;
    if size % 2 != 0 || !(joined == -1 || joined == 3) {
        return None;
    }
    let (angles, positions) = angles(m, cos, "Cos", size)?;
    if self::angles(m, sin, "Sin", size)?.0 != angles {
        return None;
    }
    Some((x, Rotary { angles, positions }))
}

/// The angles whose cosine or sine `value` is, if both halves of the last axis have the same.
fn angles(m: &Match, value: ValueId, op: &str, size: i64) -> Option<(ValueId, DimExpr)> {
    let layout = |node: &Node| is_layout(node) || node.is("Identity");
    let last = |value: ValueId| m.facts().shape(value)?.last()?.as_known();
    let mut at = value;
    for _ in 0..8 {
        if last(at)? != size {
            return None;
        }
        let (_, node) = producer(m, at)?;
        if node.is(op) {
            let mut doubled = node.input(0)?;
            while let Some((_, node)) = producer(m, doubled).filter(|(_, n)| layout(n)) {
                if last(doubled)? != size {
                    return None;
                }
                doubled = node.input(0)?;
            }
            let concat = made_by(m, doubled, "Concat")?;
            let [Some(a), Some(b)] = *concat.inputs() else { return None };
            let shape = m.facts().shape(a)?;
            let (half, leading) = shape.split_last()?;
            let axis = concat.int("axis")?;
            let fits = a == b && half.as_known()? * 2 == size && (axis == -1 || axis == leading.len() as i64);
            let mut long = leading.iter().filter(|d| d.as_known() != Some(1));
            let positions = long.next().cloned().unwrap_or_else(|| 1.into());
            // Only the positions may vary, and they must be the rows of the heads.
            let [.., rows, _] = m.facts().shape(value)? else { return None };
            let elsewhere = m.facts().shape(value)?.iter().rev().skip(2).all(|d| d.as_known() == Some(1));
            return (fits && long.next().is_none() && *rows == positions && elsewhere).then_some((a, positions));
        }
        if !layout(node) {
            return None;
        }
        at = node.input(0)?;
    }
    None
}
