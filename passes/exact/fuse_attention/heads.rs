//! Where the queries, keys and values of an attention come from.

use super::walk::{constant_number, is_layout, made_by, producer};
use super::{product::Operand, sizes::reshape};
use crate::{Match, Refusal, operands::with_axes};
use lathe_analysis::DimExpr;
use lathe_ir::{Node, Patch, Tensor, ValueId};

/// Queries, keys or values by heads: `Transpose(value, perm)` is `[…, length, size]`, and the leading axes are a batch
/// or a batch and heads.
#[derive(Clone)]
pub(super) struct Heads {
    /// Where the search ended.
    pub value: ValueId,
    /// The order of its axes.
    pub perm: Vec<usize>,
    /// The sizes of the leading axes.
    pub lead: Vec<DimExpr>,
    /// How many queries or keys there are.
    pub length: DimExpr,
    /// The size of a head.
    pub size: i64,
    /// The constant by which they are multiplied behind `value`.
    pub scale: f64,
}

/// Where heads are split from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Flat {
    /// A value `[batch, length, count · size]`.
    Whole(ValueId),
    /// Part `index` of three, each `width` wide, of a value `[batch, length, 3 · width]`.
    Part { packed: ValueId, index: usize, width: i64 },
}

/// What heads are to an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The left operand of the first product.
    Queries,
    /// The right operand of the first product, with its last two axes turned.
    Keys,
    /// The right operand of the second product.
    Values,
}

/// How far back heads are followed.
const DEPTH: usize = 16;

impl Heads {
    /// Reads an operand of a product. The heads have the leading sizes `lead`, but for keys and values with one
    /// head for several heads of queries.
    pub(super) fn read(m: &Match, operand: &Operand, role: Role, lead: &[DimExpr]) -> Result<Heads, Refusal> {
        let Operand { value, mut perm } = operand.clone();
        let ndim = perm.len();
        m.require(ndim >= 2, "queries, keys or values have less than two axes")?;
        if role == Role::Keys {
            perm.swap(ndim - 2, ndim - 1);
        }
        let (mut at, mut scale) = (value, 1.0);
        for _ in 0..DEPTH {
            let Some((_, node)) = producer(m, at) else { break };
            if node.is("Transpose") {
                let Some(inner) = permutation(m, node) else { break };
                perm = perm.iter().map(|&axis| inner[axis]).collect();
            } else if let Some((next, factor)) = unscaled(m, node).filter(|_| role != Role::Values) {
                (at, scale) = (next, scale * factor);
                continue;
            } else if node.is("Reshape") && is_identity(&perm) {
                // Before opset 14 nothing splits heads of an empty batch again.
                let repeated = unrepeated(m, node).filter(|_| role != Role::Queries && m.opset() >= 14);
                let Some(next) = repeated.or_else(|| regrouped(m, node, lead)) else { break };
                at = next;
                perm = (0..m.facts().ndim(at).unwrap_or(0)).collect();
                continue;
            } else if !node.is("Identity") {
                break;
            }
            at = node.input(0).ok_or(Refusal::NoMatch)?;
        }
        let shape = m.facts().shape(at).ok_or("the shape of queries, keys or values is unknown")?;
        let sizes: Vec<DimExpr> = perm.iter().map(|&axis| shape[axis].clone()).collect();
        let [lead @ .., length, size] = sizes.as_slice() else {
            return Err("queries, keys or values have less than two axes".into());
        };
        let size = size.as_known().filter(|&size| size > 0).ok_or("the size of a head is unknown")?;
        Ok(Heads { value: at, lead: lead.to_vec(), length: length.clone(), size, scale, perm })
    }

    /// How many heads there are: without an axis for them, one.
    pub(super) fn count(&self) -> Result<i64, Refusal> {
        match self.lead.as_slice() {
            [_, .., count] => {
                count.as_known().filter(|&n| n > 0).ok_or_else(|| "the number of heads is unknown".into())
            }
            _ => Ok(1),
        }
    }

    fn width(&self) -> Result<i64, Refusal> {
        self.count()?.checked_mul(self.size).ok_or_else(|| "the heads are too wide".into())
    }

    /// The heads, `[…, length, size]`.
    pub(super) fn split(&self, g: &mut Patch) -> ValueId {
        transposed(g, self.value, &self.perm)
    }

    /// The heads side by side, `[batch, length, count · size]`.
    pub(super) fn joined(&self, m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
        if let Some(Flat::Whole(flat)) = self.flat(m) {
            return Ok(flat);
        }
        if let Some(flat) = self.sequence_first(m) {
            return Ok(g.transpose(flat, &[1, 0, 2]));
        }
        self.join(m, g, self.value, &self.perm)
    }

    /// Joins the heads `Transpose(value, perm)`.
    pub(super) fn join(&self, m: &Match, g: &mut Patch, value: ValueId, perm: &[usize]) -> Result<ValueId, Refusal> {
        let (value, lead) = (transposed(g, value, &rows(perm)), self.lead.len());
        match lead {
            0 => Ok(with_axes(m, g, Node::new("Unsqueeze"), 13, value, &[0])),
            1 => Ok(value),
            2 => Ok(g.reshape(value, &[0, 0, self.width()?])),
            _ => {
                let to = [self.batch()?, self.length.clone(), self.width()?.into()];
                reshape(m, g, value, &to, &[self.value])
            }
        }
    }

    /// The size of all leading axes but that of the heads.
    pub(super) fn batch(&self) -> Result<DimExpr, Refusal> {
        let front = if self.lead.len() < 2 { &self.lead[..] } else { &self.lead[..self.lead.len() - 1] };
        let product = front.iter().try_fold(DimExpr::from(1), |product, size| product.times(size));
        product.ok_or_else(|| "the size of the batch overflows".into())
    }

    /// Whether joining the heads moves nothing.
    pub(super) fn has_rows(&self) -> bool {
        is_identity(&rows(&self.perm))
    }

    /// What the heads are split from, if that is a value which has them side by side.
    pub(super) fn flat(&self, m: &Match) -> Option<Flat> {
        let [batch, count] = self.lead.as_slice() else { return None };
        let width = count.as_known()?.checked_mul(self.size)?;
        if self.has_rows() {
            let flat = made_by(m, self.value, "Reshape")?.input(0)?;
            let [b, l, w] = m.facts().shape(flat)? else { return None };
            let fits = [b, l] == [batch, &self.length] && w.as_known() == Some(width);
            return fits.then_some(Flat::Whole(flat));
        }
        if !is_identity(&self.perm) {
            return None;
        }
        let (part, index) = picked(m, self.value)?;
        // Queries, keys and values one after another: `[batch, length, 3, count, size]`, then the parts first.
        let transpose = made_by(m, part, "Transpose").filter(|t| t.ints("perm") == Some(&[2, 0, 3, 1, 4]))?;
        let split = transpose.input(0)?;
        let packed = made_by(m, split, "Reshape")?.input(0)?;
        let [b, l, w] = m.facts().shape(packed)? else { return None };
        let [b5, l5, three, n, size] = m.facts().shape(split)? else { return None };
        let fits = [b, l] == [batch, &self.length]
            && [b5, l5] == [b, l]
            && [three.as_known(), n.as_known(), size.as_known()] == [Some(3), count.as_known(), Some(self.size)]
            && w.as_known()? == width.checked_mul(3)?;
        fits.then_some(Flat::Part { packed, index, width })
    }

    /// The value `[length, batch, count · size]` that `nn.MultiheadAttention` of PyTorch splits heads from, with batch
    /// and heads as one axis on the way.
    fn sequence_first(&self, m: &Match) -> Option<ValueId> {
        let [batch, count] = self.lead.as_slice() else { return None };
        let shape = |value: ValueId| m.facts().shape(value);
        let turned = made_by(m, self.value, "Reshape").filter(|_| is_identity(&self.perm))?.input(0)?;
        let transpose = made_by(m, turned, "Transpose").filter(|t| t.ints("perm") == Some(&[1, 0, 2]))?;
        let grouped = transpose.input(0)?;
        let flat = made_by(m, grouped, "Reshape")?.input(0)?;
        let [l, b, w] = shape(flat)? else { return None };
        let [l2, _, size] = shape(grouped)? else { return None };
        let width = count.as_known()?.checked_mul(self.size)?;
        let fits = [l, b, l2] == [&self.length, batch, &self.length]
            && w.as_known() == Some(width)
            && size.as_known() == Some(self.size);
        fits.then_some(flat)
    }
}

/// From the order of `[…, head, length, size]` to that of `[…, length, head, size]`.
pub(super) fn rows(perm: &[usize]) -> Vec<usize> {
    let mut rows = perm.to_vec();
    if let [_, .., head, length, _] = rows.as_mut_slice() {
        std::mem::swap(head, length);
    }
    rows
}

/// `Transpose(value, perm)`, which is `value` where nothing moves.
pub(super) fn transposed(g: &mut Patch, value: ValueId, perm: &[usize]) -> ValueId {
    if is_identity(perm) { value } else { g.transpose(value, perm) }
}

/// The sizes of batch and heads, where the queries have them as one axis.
pub(super) fn split_lead(m: &Match, queries: &Operand) -> Option<Vec<DimExpr>> {
    let mut at = queries.value;
    if !is_identity(&queries.perm) {
        return None;
    }
    for _ in 0..DEPTH {
        let (_, node) = producer(m, at)?;
        if node.is("Reshape") {
            let source = m.facts().shape(node.input(0)?)?;
            let [batch, count, length, size] = source else { return None };
            let [_, l, s] = m.facts().shape(at)? else { return None };
            return ([length, size] == [l, s]).then(|| vec![batch.clone(), count.clone()]);
        }
        at = if node.is("Identity") { node.input(0)? } else { unscaled(m, node)?.0 };
    }
    None
}

fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(to, &from)| to == from)
}

fn permutation(m: &Match, node: &Node) -> Option<Vec<usize>> {
    match node.ints("perm") {
        Some(perm) => perm.iter().map(|&axis| usize::try_from(axis).ok()).collect(),
        None => Some((0..m.facts().ndim(node.input(0)?)?).rev().collect()),
    }
}

/// What a node multiplies by a constant number, and the number.
fn unscaled(m: &Match, node: &Node) -> Option<(ValueId, f64)> {
    let number = |value: ValueId| constant_number(m, value).filter(|x| x.is_finite() && *x != 0.0);
    let (a, b) = (node.input(0)?, node.input(1)?);
    let (x, factor) = if node.is("Mul") {
        number(b).map(|x| (a, x)).or_else(|| number(a).map(|x| (b, x)))?
    } else if node.is("Div") {
        (a, 1.0 / number(b)?)
    } else {
        return None;
    };
    // A constant of several axes may add some.
    (m.facts().ndim(x)? == m.facts().ndim(node.output(0)?)?).then_some((x, factor))
}

/// What a Reshape groups batch and heads of, if that has the leading sizes `lead`.
fn regrouped(m: &Match, node: &Node, lead: &[DimExpr]) -> Option<ValueId> {
    let source = node.input(0)?;
    let (from, to) = (m.facts().shape(source)?, m.facts().shape(node.output(0)?)?);
    let ([front @ .., l0, s0], [.., l1, s1]) = (from, to) else { return None };
    (front == lead && from.len() != to.len() && [l0, s0] == [l1, s1]).then_some(source)
}

/// What a Reshape repeats the heads of, each for several queries.
fn unrepeated(m: &Match, node: &Node) -> Option<ValueId> {
    let shape = |v: ValueId| m.facts().shape(v);
    let expand = made_by(m, node.input(0)?, "Expand")?;
    let source = producer(m, expand.input(0)?).map(|(_, node)| node).filter(|n| is_layout(n))?.input(0)?;
    let [batch, heads, length, size] = shape(node.output(0)?)? else { return None };
    let [b, groups, times, l, s] = shape(expand.output(0)?)? else { return None };
    let [b1, g1, one, l1, s1] = shape(expand.input(0)?)? else { return None };
    let kept = [b, l, s] == [batch, length, size] && [b1, g1, l1, s1] == [b, groups, l, s];
    let split = groups.as_known()?.checked_mul(times.as_known()?)? == heads.as_known()? && one.as_known() == Some(1);
    let [b0, g0, l0, s0] = shape(source)? else { return None };
    (kept && split && [b0, g0, l0, s0] == [b, groups, l, s]).then_some(source)
}

/// The value and index along its first axis that `value` is taken from.
fn picked(m: &Match, value: ValueId) -> Option<(ValueId, usize)> {
    let (_, node) = producer(m, value)?;
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
    let source = m.graph().node(m.graph().producer(inner)?);
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
