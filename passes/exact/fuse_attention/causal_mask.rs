//! Which masks let every query see itself and all earlier keys, and nothing else.

use crate::Match;
use lathe_ir::{DataType, Node, ValueId};

/// Whether a score with `number` added is as good as minus infinity, whatever the score.
fn masks(number: f64, elem: DataType) -> bool {
    number <= if elem == DataType::Float16 { -6e4 } else { -1e30 }
}

/// How far layout nodes are followed.
const DEPTH: usize = 12;

/// Whether adding `mask` to the scores provably is causal masking: 0 where the key is not after the query, and a very
/// negative number elsewhere. Positions are counted from 0 on the last two axes.
pub(super) fn is_causal_mask(m: &Match, mask: ValueId) -> bool {
    constant(m, mask).or_else(|| selected(m, mask)).unwrap_or(false)
}

/// A mask that is written out.
fn constant(m: &Match, mask: ValueId) -> Option<bool> {
    const MOST: usize = 1 << 24;
    let tensor = m.graph().constant(mask).filter(|t| t.len() <= MOST)?;
    let [.., rows, columns] = *tensor.dims() else { return None };
    if rows != columns || tensor.len() != rows * columns {
        return None;
    }
    let values = tensor.to_f64s()?;
    let causal = |(i, &x): (usize, &f64)| if i % columns <= i / columns { x == 0.0 } else { masks(x, tensor.dtype()) };
    Some(values.iter().enumerate().all(causal))
}

fn producer<'a>(m: &Match<'a>, value: ValueId) -> Option<&'a Node> {
    m.graph().producer(value).map(|id| m.graph().node(id)).filter(|n| n.is_standard())
}

/// `Where(keys ≤ queries, 0, very negative)`, or the other way round.
fn selected(m: &Match, mask: ValueId) -> Option<bool> {
    let node = producer(m, mask).filter(|n| n.is("Where"))?;
    let number = |index: usize| m.graph().constant(node.input(index)?).filter(|t| t.len() == 1)?.scalar_f64();
    let (mut condition, yes, no) = (node.input(0)?, number(1)?, number(2)?);
    let elem = m.facts().elem(mask)?;
    let mut visible = yes == 0.0 && masks(no, elem);
    let hidden = no == 0.0 && masks(yes, elem);
    if !visible && !hidden {
        return None;
    }
    let ndim = m.facts().ndim(mask)?;
    while let Some(not) = producer(m, condition).filter(|n| n.is("Not")) {
        (condition, visible) = (not.input(0)?, !visible);
    }
    let compare = producer(m, condition)?;
    let (a, b) = (compare.input(0)?, compare.input(1)?);
    // With `visible` the comparison says which keys are seen, without it which are not.
    let (keys, queries) = match (compare.op_type.as_str(), visible) {
        ("LessOrEqual", true) | ("Greater", false) => (a, b),
        ("GreaterOrEqual", true) | ("Less", false) => (b, a),
        _ => return None,
    };
    Some(counts(m, keys, ndim)? == 1 && counts(m, queries, ndim)? == 2)
}

/// The axis, counted from the end, along which `value` counts 0, 1, 2, … and does not change along any other, when it
/// broadcasts to `ndim` axes.
fn counts(m: &Match, value: ValueId, ndim: usize) -> Option<usize> {
    let mut at = value;
    for _ in 0..DEPTH {
        let node = producer(m, at)?;
        match node.op_type.as_str() {
            "Range" => break,
            "Unsqueeze" | "Squeeze" | "Reshape" | "Identity" => at = node.input(0)?,
            "Cast" => {
                // Narrower types do not hold every position.
                let wide = [DataType::Int32, DataType::Int64, DataType::Float, DataType::Double];
                at = node.input(0).filter(|_| m.facts().elem(at).is_some_and(|elem| wide.contains(&elem)))?;
            }
            _ => return None,
        }
    }
    let range = producer(m, at).filter(|n| n.is("Range"))?;
    let number = |index: usize| m.graph().constant(range.input(index)?).and_then(|t| t.scalar_f64());
    if number(0)? != 0.0 || number(2)? != 1.0 {
        return None;
    }
    let length = m.facts().shape(at)?.first()?;
    let shape = m.facts().shape(value)?;
    let long: Vec<usize> = (0..shape.len()).filter(|&i| shape[i].as_known() != Some(1)).collect();
    match long[..] {
        [axis] if shape[axis] == *length && shape.len() <= ndim => Some(shape.len() - axis),
        _ => None,
    }
}
