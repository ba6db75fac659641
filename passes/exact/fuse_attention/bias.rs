//! What is added to the scores, as the one bias that fused operators take.

use super::{
    Attention,
    causal_mask::is_causal_mask,
    scores::{Term, TermKind},
    sizes::{reshape, sizes},
    walk::{constant_number, is_layout, made_by, number, producer},
};
use crate::{Match, Refusal, operands::with_axes};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Node, Patch, ValueId};

/// A value of four axes.
pub(super) struct Bias {
    /// The value.
    pub value: ValueId,
    /// Its sizes.
    pub dims: [DimExpr; 4],
}

/// The terms of an attention, in the form of its operator.
pub(super) struct Mask {
    /// Whether keys after the query are hidden.
    pub causal: bool,
    /// What is added beyond that: `[1 or batch, 1 or heads, queries, keys]`.
    pub bias: Option<Bias>,
}

/// What is added below this hides nothing.
const SMALL: f64 = 1e4;

/// The mask of an attention; its causal form is looked for if the operator has one. Hidden scores become at least
/// `lowest`.
pub(super) fn mask(
    m: &Match,
    g: &mut Patch,
    attention: &Attention,
    has_causal: bool,
    lowest: f64,
) -> Result<Mask, Refusal> {
    let square = |term: &Term| {
        let sizes = m.facts().shape(term.value);
        attention.q.length == attention.k.length
            && matches!(sizes, Some([.., rows, columns]) if *rows == attention.q.length && *columns == attention.k.length)
    };
    let is_causal = |term: &Term| {
        has_causal && term.kind == TermKind::Added && term.factor > 0.0 && square(term) && is_causal_mask(m, term.value)
    };
    let (mut causal, mut others): (Vec<&Term>, Vec<&Term>) = attention.terms.iter().partition(|term| is_causal(term));
    if !others.iter().all(|term| bound(m, term) < SMALL) {
        // What becomes of a query all of whose keys are hidden depends on how, and operators hide later keys their way.
        others.append(&mut causal);
    }
    let mut sum: Option<Bias> = None;
    for term in others {
        let addend = addend(m, g, attention, term, lowest)?;
        sum = Some(match sum {
            None => addend,
            Some(sum) => add(g, sum, addend)?,
        });
    }
    let bias = sum.map(|sum| complete(m, g, attention, sum)).transpose()?;
    Ok(Mask { causal: !causal.is_empty(), bias })
}

/// Which keys of each batch are padding, for operators that take just that.
pub(super) struct Padding {
    /// Not 0 where a key is seen, `[batch, keys]` of int32.
    pub keys: ValueId,
    /// What is added to the scores of the others.
    pub fill: f32,
}

/// The one term of an attention, if it tells for each key of each batch whether it is seen.
pub(super) fn padding(m: &Match, g: &mut Patch, attention: &Attention) -> Option<Padding> {
    let [term] = attention.terms.as_slice() else { return None };
    let (condition, seen, fill) = match term.kind {
        TermKind::Hidden { seen, fill } => (term.value, seen, fill),
        TermKind::Added => {
            let node = made_by(m, term.value, "Where")?;
            let number = |index: usize| constant_number(m, node.input(index)?);
            let seen = number(1) == Some(0.0);
            let fill = if seen { number(2)? } else { number(2).filter(|&x| x == 0.0).and_then(|_| number(1))? };
            (node.input(0)?, seen, fill * term.factor)
        }
    };
    let by_key = |value: ValueId| match m.facts().shape(value) {
        Some([batch, one, row, keys]) => {
            let single = one.as_known() == Some(1) && row.as_known() == Some(1);
            single && [batch, keys] == [&attention.lead[0], &attention.k.length]
        }
        _ => false,
    };
    let fits = attention.lead.len() == 2
        && by_key(term.value)
        && by_key(condition)
        && m.facts().elem(condition) == Some(DataType::Bool)
        && (fill as f32) < 0.0;
    if !fits {
        return None;
    }
    // Mostly the two axes were added to a value that has none of them.
    let mut flat = condition;
    while let Some((_, node)) = producer(m, flat).filter(|(_, node)| is_layout(node)) {
        flat = node.input(0)?;
    }
    let is_flat = m.facts().shape(flat) == Some(&[attention.lead[0].clone(), attention.k.length.clone()]);
    let (condition, is_flat) = if is_flat { (flat, true) } else { (condition, false) };
    let seen = if seen { condition } else { g.node(Node::new("Not"), &[condition]) };
    let numbers = g.node(Node::new("Cast").with("to", DataType::Int32), &[seen]);
    let keys = if is_flat { numbers } else { with_axes(m, g, Node::new("Squeeze"), 13, numbers, &[1, 2]) };
    Some(Padding { keys, fill: fill as f32 })
}

/// One term, `[1 or batch, 1 or heads, 1 or queries, 1 or keys]`.
fn addend(m: &Match, g: &mut Patch, attention: &Attention, term: &Term, lowest: f64) -> Result<Bias, Refusal> {
    let elem = attention.elem;
    let shape = m.facts().shape(term.value).ok_or("the shape of a mask is unknown")?.to_vec();
    let value = match term.kind {
        TermKind::Hidden { seen, fill } => {
            let bool = m.facts().elem(term.value) == Some(DataType::Bool);
            m.require(bool, "the condition of a mask is not boolean")?;
            let stays = g.constant("stays", number(elem, 0.0)?);
            let hidden = g.constant("hidden", number(elem, fill.max(lowest))?);
            let (yes, no) = if seen { (stays, hidden) } else { (hidden, stays) };
            g.node(Node::new("Where"), &[term.value, yes, no])
        }
        TermKind::Added => {
            m.require(m.facts().elem(term.value) == Some(elem), "a mask has another type than the values")?;
            scaled(g, term.value, term.factor, elem)?
        }
    };
    align(m, g, attention, term, value, shape)
}

fn scaled(g: &mut Patch, value: ValueId, factor: f64, elem: DataType) -> Result<ValueId, Refusal> {
    if factor == 1.0 {
        return Ok(value);
    }
    let factor = g.constant("factor", number(elem, factor)?);
    Ok(g.node(Node::new("Mul"), &[value, factor]))
}

/// Gives a term four axes.
fn align(
    m: &Match,
    g: &mut Patch,
    attention: &Attention,
    term: &Term,
    value: ValueId,
    shape: Vec<DimExpr>,
) -> Result<Bias, Refusal> {
    let one = || DimExpr::from(1);
    let stored = shape.len();
    let missing = term.at.len().checked_sub(stored).ok_or(Refusal::NoMatch)?;
    let mut dims: Vec<DimExpr> = vec![one(); missing];
    dims.extend(shape);
    let ([front @ .., queries, keys], [lead @ .., _, _]) = (dims.as_slice(), term.at.as_slice()) else {
        return Err(Refusal::NoMatch);
    };
    let ours = attention.lead.as_slice();
    // Whether the last leading axis is that of the heads, or there is none for them.
    let by_head = ours.len() >= 2 && lead.last() == ours.last();
    let (batch, head) = match front.split_last() {
        Some((head, batch)) if by_head => (batch, head.clone()),
        _ => (front, one()),
    };
    let four = |batch: DimExpr, head: DimExpr| [batch, head, queries.clone(), keys.clone()];
    let is_one = |size: &DimExpr| size.as_known() == Some(1);
    if batch.iter().all(is_one) {
        let value = match stored {
            4 => value,
            0..4 => with_axes(m, g, Node::new("Unsqueeze"), 13, value, &(0..4 - stored).collect::<Vec<_>>()),
            _ => with_axes(m, g, Node::new("Squeeze"), 13, value, &(0..stored - 4).collect::<Vec<_>>()),
        };
        return Ok(Bias { value, dims: four(one(), head) });
    }
    let same = lead == ours;
    if same && ours.len() == 2 {
        // An axis that is not 1 is one that the term has itself, and so are all behind it.
        return Ok(Bias { value, dims: four(front[0].clone(), head) });
    }
    if same && ours.len() == 1 {
        let value = with_axes(m, g, Node::new("Unsqueeze"), 13, value, &[1]);
        return Ok(Bias { value, dims: four(front[0].clone(), one()) });
    }
    m.require(ours.len() >= 2, "the axes of the scores are regrouped before a mask is added")?;
    m.require(m.opset() >= 8, "a mask is repeated with Expand of opset 8")?;
    let near = [attention.q.value, attention.k.value];
    let full = if by_head { &lead[..lead.len() - 1] } else { lead };
    let value = if batch == full {
        value
    } else {
        let tail = if by_head { 3 } else { 2 };
        let wide: Vec<DimExpr> = full.iter().cloned().chain(vec![one(); tail]).collect();
        let wide = sizes(m, g, &wide, &near).ok_or("a size by which a mask is repeated cannot be read off an input")?;
        g.node(Node::new("Expand"), &[value, wide])
    };
    let head = if by_head { head } else { attention.count()?.into() };
    let dims = four(attention.q.batch()?, head);
    Ok(Bias { value: reshape(m, g, value, &dims, &near)?, dims })
}

fn add(g: &mut Patch, a: Bias, b: Bias) -> Result<Bias, Refusal> {
    let mut dims = a.dims.clone();
    for (axis, (left, right)) in a.dims.iter().zip(&b.dims).enumerate() {
        let one = DimExpr::from(1);
        dims[axis] = match (left == &one, right == &one) {
            (true, _) => right.clone(),
            (_, true) => left.clone(),
            _ if left.equal_where_broadcast(right) => left.clone(),
            // Both are 1 or the number of keys: the product with the values takes no other.
            _ if axis == 3 => left.clone(),
            _ => return Err("two masks are not provably of sizes that fit".into()),
        };
    }
    Ok(Bias { value: g.node(Node::new("Add"), &[a.value, b.value]), dims })
}

/// Repeats a bias along queries and keys where it does not vary with them.
fn complete(m: &Match, g: &mut Patch, attention: &Attention, bias: Bias) -> Result<Bias, Refusal> {
    let one = DimExpr::from(1);
    let [batch, heads, queries, keys] = &bias.dims;
    let count = attention.count()?;
    let fits = (*batch == one || *batch == attention.q.batch()?) && (*heads == one || *heads == DimExpr::from(count));
    m.require(fits, "the sizes of the mask are not provably 1 or those of batch and heads")?;
    let rows = queries.equal_where_broadcast(&attention.q.length);
    // As many rows as columns are as many as the keys, or one; and so they are as many as the queries.
    let square = queries == keys && attention.q.length == attention.k.length;
    m.require(rows || square || *queries == one, "the mask has another number of queries")?;
    let columns = keys.equal_where_broadcast(&attention.k.length);
    if rows && columns {
        return Ok(bias);
    }
    m.require(m.opset() >= 8, "a mask of one row is repeated with Expand of opset 8")?;
    let near = [attention.q.value, attention.k.value];
    let wide = |done: bool, size: &DimExpr| if done { one.clone() } else { size.clone() };
    let to = [one.clone(), one.clone(), wide(rows, &attention.q.length), wide(columns, &attention.k.length)];
    let to = sizes(m, g, &to, &near).ok_or(Refusal::NoMatch)?;
    let value = g.node(Node::new("Expand"), &[bias.value, to]);
    let dims = [batch.clone(), heads.clone(), attention.q.length.clone(), attention.k.length.clone()];
    Ok(Bias { value, dims })
}

/// Whether the sum of all terms may be infinite somewhere.
pub(super) fn may_be_infinite(m: &Match, terms: &[Term], elem: DataType) -> bool {
    // What is added beyond the largest number of a type is rounded away up to half of its last bit.
    let largest = match elem {
        DataType::Float16 => 65519.0,
        _ => f64::from(f32::MAX) * (1.0 + 2e-8),
    };
    let total: f64 = terms.iter().map(|term| bound(m, term)).sum();
    // A bound that is not a number is none.
    total.is_nan() || total > largest
}

/// A bound of the magnitude of what a term adds.
pub(super) fn bound(m: &Match, term: &Term) -> f64 {
    match term.kind {
        TermKind::Hidden { fill, .. } => fill.abs(),
        TermKind::Added => magnitude(m, term.value, &mut 64) * term.factor.abs(),
    }
}

/// A bound of the magnitude of all elements. What is computed from activations counts as small: it is finite wherever
/// the scores are.
fn magnitude(m: &Match, value: ValueId, budget: &mut usize) -> f64 {
    const MOST: usize = 1 << 24;
    if *budget == 0 {
        return f64::INFINITY;
    }
    *budget -= 1;
    if let Some(tensor) = m.graph().constant(value) {
        let all = if tensor.len() <= MOST { tensor.to_f64s() } else { None };
        return all
            .map_or(f64::INFINITY, |all| all.iter().map(|x| x.abs()).fold(0.0, |a, b| if b <= a { a } else { b }));
    }
    match m.facts().elem(value) {
        Some(DataType::Bool) => return 1.0,
        Some(elem) if elem.is_float() => {}
        // 2⁶⁴
        _ => return 1.8e19,
    }
    let Some((_, node)) = producer(m, value) else { return f64::INFINITY };
    let mut all = |from: usize| -> Vec<f64> {
        node.inputs()[from..].iter().flatten().map(|&input| magnitude(m, input, budget)).collect()
    };
    match node.op_type.as_str() {
        "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Transpose" | "Expand" | "Slice" | "Gather"
        | "Cast" | "Tile" | "GatherND" | "GatherElements" | "Neg" => all(0).first().copied().unwrap_or(f64::INFINITY),
        "Where" => all(1).into_iter().fold(0.0, f64::max),
        "Concat" | "Min" | "Max" => all(0).into_iter().fold(0.0, f64::max),
        "Add" | "Sub" => all(0).into_iter().sum(),
        "Mul" => all(0).into_iter().product(),
        "ConstantOfShape" => match node.attribute("value") {
            Some(lathe_ir::AttributeValue::Tensor(t)) => t.scalar_f64().map_or(f64::INFINITY, f64::abs),
            Some(_) => f64::INFINITY,
            None => 0.0,
        },
        "Sigmoid" | "Tanh" | "Sin" | "Cos" => 1.0,
        "MatMul" | "Gemm" | "Einsum" | "Conv" => 0.0,
        _ => f64::INFINITY,
    }
}
