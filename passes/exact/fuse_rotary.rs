//! Turns spelled-out rotary embeddings into `RotaryEmbedding`.

mod waves;

use self::waves::Waves;
use super::norm_parts::{CONTRIB, import_contrib};
use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, Target, operands, pat, rewrite, rule,
};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Model, Node, Patch, Tensor, Use, ValueId};
use std::{collections::BTreeSet, sync::LazyLock};

/// See [`INFO`].
pub struct FuseRotary;

static INFO: Info = Info {
    name: "fuse-rotary",
    summary: "replaces the steps of a rotary embedding by one RotaryEmbedding",
    doc: "x·cos + turned(x)·sin, where turned(x) puts the negated second half of the last axis before the first, becomes \
          RotaryEmbedding, with cosines and sines of one half; before opset 23 ONNX Runtime's operator of that name under \
          the target ort. Needs heads as [batch, heads, positions, size], and cosines and sines of angles whose two \
          halves are the same value. The standard operator gets a copy of the angles for each batch, made for all heads \
          and layers at once where an input of the model has the same batch. Declines where inner values have other \
          uses, and under the target ort where an attention of fixed sizes, which may take the embedding in, is still \
          spelled out.",
    options: &[],
    // The products are the same; a kernel may add them without rounding in between.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Saving::Nodes],
    source: Some("Su et al. 2021, arXiv:2104.09864"),
};

impl Pass for FuseRotary {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let outcome = rewrite(model, cx, &RULES)?;
        if !outcome.changes.is_empty() {
            import_contrib(model);
        }
        Ok(outcome)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let pattern = pat!(Add*(Mul*(a, b), Mul*(turned: Concat(Neg(high), low), sin)));
    vec![rule("fuse-halves", pattern, fuse)]
});

fn fuse(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (high, low) = (m.value("high"), m.value("low"));
    let (a, b) = (m.value("a"), m.value("b"));
    // Either factor may be the rotated value.
    let (x, cos) = match (is_half(m, high, a, true), is_half(m, high, b, true)) {
        (true, _) => (a, b),
        (_, true) => (b, a),
        _ => return Err(Refusal::NoMatch),
    };
    m.only_if(is_half(m, low, x, false))?;
    let [batch, _, positions, size] = m.facts().shape(x).ok_or(Refusal::NoMatch)? else {
        return Err("the heads do not have four axes".into());
    };
    let size = size.as_known().ok_or(Refusal::NoMatch)?;
    let axis = m.axis(m.node("turned").int("axis").unwrap_or(0), 4)?;
    m.only_if(axis == 3)?;
    let standard = m.has_operator("RotaryEmbedding");
    m.require(standard || m.context().target == Target::Ort, "RotaryEmbedding needs opset 23")?;
    // GroupQueryAttention rotates by itself where its sizes are known.
    let known = [batch, positions].iter().all(|size| size.as_known().is_some());
    let waits = m.context().target == Target::Ort && known && feeds_attention(m);
    m.require(!waits, "the attention that reads it is still spelled out")?;
    m.require_no_new_axes(x, &[])?;
    let elem = m.facts().elem(x).ok_or("the element type is unknown")?;
    m.require(matches!(elem, DataType::Float | DataType::Float16), "the elements are not float or float16")?;
    let cos = Waves::find(m, cos, "Cos", size)?;
    let sin = Waves::find(m, m.value("sin"), "Sin", size)?;
    let one = DimExpr::from(1);
    for waves in [&cos, &sin] {
        m.require(waves.positions == *positions, "the angles are for another number of positions")?;
        let fits = waves.batch == cos.batch && (waves.batch == *batch || waves.batch == one);
        m.require(fits, "the angles are for another batch")?;
    }
    let tables = [cos.halved(m, g, elem, standard)?, sin.halved(m, g, elem, standard)?];
    if !standard {
        let (ids, tables) = if cos.batch == one {
            (g.int64s("position", &[0]), tables)
        } else {
            let (ids, sizes) = counted(m, g, x, batch, positions)?;
            let tables =
                if batch.as_known().is_some() { tables } else { lengthened(g, tables, sizes, elem, size / 2)? };
            (ids, tables)
        };
        let node = Node::new("RotaryEmbedding").in_domain(CONTRIB);
        return Ok(g.node(node, &[x, ids, tables[0], tables[1]]));
    }
    if cos.batch == *batch {
        return Ok(g.node(Node::new("RotaryEmbedding"), &[x, tables[0], tables[1]]));
    }
    let target = repeated(m, g, x, batch);
    let [cos, sin] = tables.map(|table| g.node(Node::new("Expand"), &[table, target]));
    Ok(g.node(Node::new("RotaryEmbedding"), &[x, cos, sin]))
}

/// Whether a product that reads the output is taken to a Softmax: an attention that is not one node yet, and whose
/// operator may rotate by itself.
fn feeds_attention(m: &Match) -> bool {
    const TO_PRODUCT: &[&str] =
        &["Cast", "Div", "Expand", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"];
    const TO_SOFTMAX: &[&str] = &["Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sub", "Tanh", "Where"];
    let mut seen = BTreeSet::new();
    let mut next = vec![(m.value("output"), false)];
    while let Some((value, multiplied)) = next.pop() {
        if !seen.insert((value, multiplied)) {
            continue;
        }
        let readers = m.graph().value(value).uses().iter().filter_map(|place| match place {
            Use::Node(id, _) => Some(m.graph().node(*id)),
            _ => None,
        });
        for node in readers.filter(|node| node.is_standard()) {
            let op = node.op_type.as_str();
            if multiplied && op == "Softmax" {
                return true;
            }
            let passed = if multiplied { TO_SOFTMAX } else { TO_PRODUCT };
            if op == "MatMul" && !multiplied {
                next.extend(node.output(0).map(|v| (v, true)));
            } else if passed.contains(&op) {
                next.extend(node.output(0).map(|v| (v, multiplied)));
            }
        }
    }
    false
}

/// Positions `[batch, positions]` that count on from batch to batch, and their shape.
fn counted(
    m: &Match,
    g: &mut Patch,
    x: ValueId,
    batch: &DimExpr,
    positions: &DimExpr,
) -> Result<(ValueId, ValueId), Refusal> {
    m.require(m.opset() >= 14, "positions are counted with operators of opset 14")?;
    // An input of the model serves all layers at once.
    let alike =
        |v: &ValueId| matches!(m.facts().shape(*v), Some([first, second, ..]) if first == batch && second == positions);
    let input = m.graph().main().inputs().iter().copied().find(alike);
    let axes = g.int64s("axes", if input.is_some() { &[0, 1] } else { &[0, 2] });
    let shape = g.node(Node::new("Shape"), &[input.unwrap_or(x)]);
    let sizes = g.node(Node::new("Gather").with("axis", 0), &[shape, axes]);
    let count = g.node(Node::new("ReduceProd").with("keepdims", 0), &[sizes]);
    let [zero, one] = [0, 1].map(|number| g.constant("number", Tensor::from_i64s(&[], &[number])));
    let range = g.node(Node::new("Range"), &[zero, count, one]);
    // A batch of none or no position is an empty grid.
    Ok((g.node(Node::new("Reshape").with("allowzero", 1), &[range, sizes]), sizes))
}

/// Tables with a row more for each position: ONNX Runtime asks for so many even where the batch is empty.
fn lengthened(
    g: &mut Patch,
    tables: [ValueId; 2],
    sizes: ValueId,
    elem: DataType,
    half: i64,
) -> Result<[ValueId; 2], Refusal> {
    let zero = Tensor::from_f64s(elem, &[1], &[0.0]).ok_or(Refusal::NoMatch)?;
    let (second, half) = (g.int64s("second", &[1]), g.int64s("half", &[half]));
    let positions = g.node(Node::new("Gather").with("axis", 0), &[sizes, second]);
    let shape = g.node(Node::new("Concat").with("axis", 0), &[positions, half]);
    let rows = g.node(Node::new("ConstantOfShape").with("value", zero), &[shape]);
    Ok(tables.map(|table| g.node(Node::new("Concat").with("axis", 0), &[table, rows])))
}

/// The shape `[batch, 1, 1]`.
fn repeated(m: &Match, g: &mut Patch, x: ValueId, batch: &DimExpr) -> ValueId {
    if let Some(batch) = batch.as_known() {
        return g.int64s("target", &[batch, 1, 1]);
    }
    // An input of the model serves all layers at once.
    let alike = |v: &ValueId| m.facts().shape(*v).is_some_and(|shape| shape.first() == Some(batch));
    let sized = m.graph().main().inputs().iter().copied().find(alike).unwrap_or(x);
    let batch = g.node(Node::new("Shape").with("start", 0).with("end", 1), &[sized]);
    let ones = g.int64s("ones", &[1, 1]);
    g.node(Node::new("Concat").with("axis", 0), &[batch, ones])
}

/// Whether `value` is the second (`high`) or first half of the last axis of `x`.
fn is_half(m: &Match, value: ValueId, x: ValueId, high: bool) -> bool {
    let size = |v: ValueId| m.facts().shape(v)?.last()?.as_known();
    let (Some(whole), Some(half), Some(producer)) = (size(x), size(value), m.graph().producer(value)) else {
        return false;
    };
    let node = m.graph().node(producer);
    let Some(ndim) = m.facts().ndim(x).filter(|_| node.input(0) == Some(x) && half * 2 == whole) else { return false };
    if node.is("Split") {
        let outputs = [node.output(0), node.output(1)];
        let axis = m.axis(node.int("axis").unwrap_or(0), ndim);
        return axis.is_ok_and(|axis| axis == ndim - 1)
            && node.outputs().len() == 2
            && outputs[usize::from(high)] == Some(value);
    }
    let ranges = match node.is("Slice") {
        true => operands::slice_ranges(m.graph(), m.facts(), node, ndim),
        false => return false,
    };
    let end = if high { whole } else { half };
    // Slice takes ends beyond the axis for its size.
    ranges.is_ok_and(|ranges| {
        let [range] = ranges[..] else { return false };
        let from_front = |at: i64| if at < 0 { at + whole } else { at.min(whole) };
        let bounds = (from_front(range.start), from_front(range.end));
        range.axis == ndim - 1 && range.step == 1 && bounds == (end - half, end)
    })
}

#[cfg(test)]
mod tests;
