//! Where the queries, keys and values of an attention come from.

use crate::Match;
use lathe_analysis::DimExpr;
use lathe_ir::{Node, Pattern, Tensor, ValueId};
use std::sync::LazyLock;

/// Queries, keys or values by heads, `[batch, count, length, size]`, with what was computed on the way from `value`.
pub(super) struct Heads {
    /// The value with four axes at which the search ended; keys may be transposed there, see `turned`.
    pub value: ValueId,
    /// Whether `value` is `[batch, count, size, length]`.
    pub turned: bool,
    pub batch: DimExpr,
    pub count: i64,
    pub length: DimExpr,
    pub size: i64,
    /// The constant it is multiplied by.
    pub scale: f64,
    /// The rotary embedding of it.
    pub rotary: Option<Rotary>,
}

/// A rotary embedding that rotates the first half of a head against the second.
pub(super) struct Rotary {
    /// The rotated value.
    pub output: ValueId,
    /// The angles of one half, with the positions on one axis and nothing on others.
    pub angles: ValueId,
    /// How many positions there are.
    pub positions: DimExpr,
}

/// Where heads are split from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Flat {
    /// A value `[batch, length, count · size]`.
    Whole(ValueId),
    /// Part `index` of three, each `width` wide, of a value `[batch, length, 3 · width]`.
    Part { packed: ValueId, index: usize, width: i64 },
}

fn producer<'a>(m: &Match<'a>, value: ValueId) -> Option<&'a Node> {
    let node = m.graph().node(m.graph().producer(value)?);
    (node.is_standard() && node.scope() == m.scope()).then_some(node)
}

fn made_by<'a>(m: &Match<'a>, value: ValueId, op: &str) -> Option<&'a Node> {
    producer(m, value).filter(|n| n.is(op))
}

fn has_perm(node: &Node, perm: &[i64]) -> bool {
    node.ints("perm") == Some(perm)
}

fn four(m: &Match, value: ValueId, turned: bool) -> Option<Heads> {
    let [batch, count, length, size] = m.facts().shape(value)? else { return None };
    let (length, size) = if turned { (size, length) } else { (length, size) };
    let (count, size) = (count.as_known()?, size.as_known()?);
    let (batch, length) = (batch.clone(), length.clone());
    (count > 0 && size > 0).then_some(Heads { value, turned, batch, count, length, size, scale: 1.0, rotary: None })
}

/// What `value` is a constant multiple of, and the multiple.
fn unscaled(m: &Match, value: ValueId) -> (ValueId, f64) {
    let found = || {
        let node = producer(m, value)?;
        let number = |v: ValueId| {
            let tensor = m.graph().constant(v).filter(|t| t.len() == 1 && t.dims().len() <= 4)?;
            tensor.scalar_f64().filter(|x| x.is_finite() && *x > 0.0)
        };
        let (a, b) = (node.input(0)?, node.input(1)?);
        match node.op_type.as_str() {
            "Mul" => number(b).map(|x| (a, x)).or_else(|| number(a).map(|x| (b, x))),
            "Div" => number(b).map(|x| (a, 1.0 / x)),
            _ => None,
        }
    };
    found().unwrap_or((value, 1.0))
}

/// What the heads `value` of keys or values repeat, if each is repeated for several queries.
fn unrepeated(m: &Match, value: ValueId) -> Option<ValueId> {
    let shape = |v: ValueId| m.facts().shape(v);
    let expand = made_by(m, made_by(m, value, "Reshape")?.input(0)?, "Expand")?;
    let source = producer(m, expand.input(0)?).filter(|n| n.is("Unsqueeze") || n.is("Reshape"))?.input(0)?;
    let [batch, heads, length, size] = shape(value)? else { return None };
    let [b, groups, times, l, s] = shape(expand.output(0)?)? else { return None };
    let [b1, g1, one, l1, s1] = shape(expand.input(0)?)? else { return None };
    let kept = [b, l, s] == [batch, length, size] && [b1, g1, l1, s1] == [b, groups, l, s];
    let split = groups.as_known()?.checked_mul(times.as_known()?)? == heads.as_known()? && one.as_known() == Some(1);
    let [b0, g0, l0, s0] = shape(source)? else { return None };
    (kept && split && [b0, g0, l0, s0] == [b, groups, l, s]).then_some(source)
}

static SLICED: LazyLock<Pattern> =
    LazyLock::new(|| Pattern::parse("Add(Mul(x, cos), Mul(Concat(Neg(high: Slice(x, ..)), low: Slice(x, ..)), sin))"));
static SPLIT: LazyLock<Pattern> =
    LazyLock::new(|| Pattern::parse("Add(Mul(x, cos), Mul(halves: Concat(Neg(high), low), sin))"));

/// The rotary embedding that makes `value`, and what it is applied to.
fn unrotated(m: &Match, value: ValueId) -> Option<(ValueId, Rotary)> {
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
    Some((x, Rotary { output: value, angles, positions }))
}

/// The angles whose cosine or sine `value` is, if both halves of the last axis have the same.
fn angles(m: &Match, value: ValueId, op: &str, size: i64) -> Option<(ValueId, DimExpr)> {
    let layout = |node: &Node| ["Unsqueeze", "Squeeze", "Reshape", "Identity"].iter().any(|op| node.is(op));
    let last = |value: ValueId| m.facts().shape(value)?.last()?.as_known();
    let mut at = value;
    for _ in 0..8 {
        if last(at)? != size {
            return None;
        }
        let node = producer(m, at)?;
        if node.is(op) {
            let mut doubled = node.input(0)?;
            while let Some(node) = producer(m, doubled).filter(|n| layout(n)) {
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

pub(super) fn query_heads(m: &Match, value: ValueId) -> Option<Heads> {
    let (value, scale) = unscaled(m, value);
    rotated(m, value).map(|heads| Heads { scale, ..heads })
}

fn rotated(m: &Match, value: ValueId) -> Option<Heads> {
    match unrotated(m, value) {
        Some((x, rotary)) => Some(Heads { rotary: Some(rotary), ..four(m, x, false)? }),
        None => four(m, value, false),
    }
}

pub(super) fn value_heads(m: &Match, value: ValueId) -> Option<Heads> {
    four(m, unrepeated(m, value).unwrap_or(value), false)
}

/// The keys, which reach the product transposed: `[batch, count, size, length]`.
pub(super) fn key_heads(m: &Match, value: ValueId) -> Option<Heads> {
    let (value, outer) = unscaled(m, value);
    let turn = made_by(m, value, "Transpose")?;
    if has_perm(turn, &[0, 2, 3, 1]) {
        return Some(Heads { scale: outer, ..four(m, value, true)? });
    }
    if !has_perm(turn, &[0, 1, 3, 2]) {
        return None;
    }
    let (value, inner) = unscaled(m, turn.input(0)?);
    let heads = rotated(m, unrepeated(m, value).unwrap_or(value))?;
    Some(Heads { scale: outer * inner, ..heads })
}

/// What the heads are split from.
pub(super) fn flat_heads(m: &Match, heads: &Heads) -> Option<Flat> {
    if let Some(transpose) = made_by(m, heads.value, "Transpose") {
        let perm: &[i64] = if heads.turned { &[0, 2, 3, 1] } else { &[0, 2, 1, 3] };
        let split = transpose.input(0)?;
        let flat = made_by(m, split, "Reshape")?.input(0)?;
        let [batch, length, width] = m.facts().shape(flat)? else { return None };
        let [b, l, count, size] = m.facts().shape(split)? else { return None };
        let fits =
            [b, l] == [batch, length] && [count.as_known(), size.as_known()] == [Some(heads.count), Some(heads.size)];
        let whole = width.as_known()? == heads.count.checked_mul(heads.size)?;
        return (has_perm(transpose, perm) && fits && whole).then_some(Flat::Whole(flat));
    }
    if heads.turned {
        return None;
    }
    let (part, index) = picked(m, heads.value)?;
    // Queries, keys and values one after another: `[batch, length, 3, count, size]`, then the parts first.
    let transpose = made_by(m, part, "Transpose").filter(|t| has_perm(t, &[2, 0, 3, 1, 4]))?;
    let split = transpose.input(0)?;
    let packed = made_by(m, split, "Reshape")?.input(0)?;
    let [batch, length, width] = m.facts().shape(packed)? else { return None };
    let [b, l, three, count, size] = m.facts().shape(split)? else { return None };
    let each = heads.count.checked_mul(heads.size)?;
    let fits = [b, l] == [batch, length]
        && [three.as_known(), count.as_known(), size.as_known()] == [Some(3), Some(heads.count), Some(heads.size)]
        && width.as_known()? == each.checked_mul(3)?;
    fits.then_some(Flat::Part { packed, index, width: each })
}

/// The value and index along its first axis that `value` is taken from.
fn picked(m: &Match, value: ValueId) -> Option<(ValueId, usize)> {
    let node = producer(m, value)?;
    let first = |v: ValueId| m.known_int64s(v).filter(|all| all.len() == 1).map(|all| all[0]);
    if node.is("Gather") {
        let index = m.graph().constant(node.input(1)?).filter(|t| t.dims().is_empty()).and_then(Tensor::scalar_i64)?;
        let index = usize::try_from(if index < 0 { index + 3 } else { index }).ok()?;
        return (node.int("axis").unwrap_or(0) == 0).then_some((node.input(0)?, index));
    }
    if !node.is("Squeeze") && !node.is("Reshape") {
        return None;
    }
    let inner = node.input(0)?;
    let sliced = m.facts().shape(inner)?;
    // Whatever removes the axis, what is left has the sizes of the others.
    if sliced.first()?.as_known() != Some(1) || sliced.get(1..)? != m.facts().shape(value)? {
        return None;
    }
    let source = producer(m, inner)?;
    if source.is("Split") {
        let outputs = source.outputs();
        let index = outputs.iter().position(|&v| v == Some(inner))?;
        let fits = outputs.len() == 3 && source.int("axis").unwrap_or(0) == 0;
        return fits.then_some((source.input(0)?, index));
    }
    if source.is("Slice") {
        let axis = first(source.input(3)?)?;
        let start = first(source.input(1)?).filter(|&s| s >= 0 && axis == 0)?;
        let step = source.input(4).is_none_or(|v| first(v) == Some(1));
        return step.then_some((source.input(0)?, usize::try_from(start).ok()?));
    }
    None
}
