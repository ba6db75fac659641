//! Turns spelled-out attention into one operator.

use super::{
    attention_parts::{Flat, Heads, Rotary, flat_heads, key_heads, query_heads, value_heads},
    attention_weights::{joined_projection, packed},
    causal_mask::is_causal_mask,
    norm_parts::{CONTRIB, import_contrib, require_ort},
};
use crate::{Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Rule, Target, rewrite, rule};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Model, Node, NodeId, Patch, Pattern, Tensor, Use, ValueId};

/// See [`INFO`].
pub struct FuseAttention;

static INFO: Info = Info {
    name: "fuse-attention",
    summary: "replaces the steps of an attention by one node",
    doc: "Scores, scale, mask, softmax and the weighted sum, with the splitting and joining of heads around them, \
          become one operator. Under the target ort that is Attention where queries, keys and values are products of \
          one value with constant weights, which are joined, GroupQueryAttention where several heads share keys or \
          rotary embeddings by computed angles come before, and MultiHeadAttention elsewhere; otherwise the Attention \
          of opset 23. A mask that is provably causal turns into the causal form. Declines where shapes are not known \
          well enough to prove the form.",
    options: &[],
    // The fused kernels sum scores and weights in blocks, and scale before or after the product.
    kind: Kind::Equivalent { rtol: 1e-4 },
    lowers: &[Quantity::Nodes],
    source: Some("Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245"),
};

impl Pass for FuseAttention {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        // With the heads joined first: the weighted sum alone matches inside it.
        let mut outcome = rewrite(model, cx, &joined())?;
        outcome.merge(rewrite(model, cx, &separate())?);
        if !outcome.changes.is_empty() {
            import_contrib(model);
        }
        Ok(outcome)
    }
}

/// Patterns of the weighted sum over heads.
fn forms() -> Vec<String> {
    let mut forms = Vec::new();
    for scores in ["MatMul(q, k)", "Mul(MatMul(q, k), factor)", "Div(MatMul(q, k), divisor)"] {
        for scores in [format!("Add({scores}, mask)"), scores.to_owned()] {
            forms.push(format!("MatMul(softmax: Softmax({scores}), v)"));
        }
    }
    forms
}

fn joined() -> Vec<Rule> {
    let rule = |form: String| {
        let form = format!("Reshape(turned: Transpose(context: {form}), _)");
        rule("fuse-heads", Pattern::parse(&form), fuse_joined)
    };
    forms().into_iter().map(rule).collect()
}

fn separate() -> Vec<Rule> {
    let rule = |form: String| rule("fuse-context", Pattern::parse(&form), fuse_separate);
    forms().into_iter().map(rule).collect()
}

/// What all attention operators need to know.
struct Attention {
    q: Heads,
    k: Heads,
    v: Heads,
    mask: Option<ValueId>,
    causal: bool,
    scale: f32,
    elem: DataType,
}

impl Attention {
    /// Reads the scores and what they are made of.
    fn find(m: &Match) -> Result<Attention, Refusal> {
        let axis = m.node("softmax").int("axis");
        let last = axis == Some(-1) || axis == Some(3) || (axis.is_none() && m.opset() >= 13);
        m.only_if(last)?;
        let q = query_heads(m, m.value("q"));
        let k = key_heads(m, m.value("k"));
        m.only_if(k.is_some())?;
        let (k, v) = (k.ok_or("the keys have no heads")?, value_heads(m, m.value("v")));
        let (Some(q), Some(v)) = (q, v) else { return Err("the shapes of the heads are unknown".into()) };
        let mut scale = q.scale * k.scale;
        if let Some(factor) = m.find_value("factor") {
            scale *= scalar(m, factor)?;
        }
        if let Some(divisor) = m.find_value("divisor") {
            scale /= scalar(m, divisor)?;
        }
        m.require(scale.is_finite() && scale > 0.0, "the scale is not positive")?;
        let elem = m.facts().elem(m.value("v")).ok_or("the element type is unknown")?;
        let fits = q.batch == k.batch && k.batch == v.batch && k.length == v.length && q.size == k.size;
        m.require(fits && k.count == v.count && q.count % k.count == 0, "queries, keys and values do not fit")?;
        let mask = m.find_value("mask");
        let square = |mask: ValueId| {
            let sizes = m.facts().shape(mask);
            q.length == k.length
                && matches!(sizes, Some([.., rows, columns]) if *rows == q.length && *columns == k.length)
        };
        let causal = mask.is_some_and(|mask| square(mask) && is_causal_mask(m, mask));
        let mask = mask.filter(|_| !causal);
        Ok(Attention { q, k, v, mask, causal, scale: scale as f32, elem })
    }

    /// The mask as ONNX Runtime takes it: `[1 or batch, 1 or heads, queries, keys]`. One row for all queries, as
    /// padding masks have, is repeated once for all layers.
    fn full_mask(&self, m: &Match, g: &mut Patch) -> Result<Option<ValueId>, Refusal> {
        let Some(mask) = self.mask else { return Ok(None) };
        let Some([batch, heads, queries, keys]) = m.facts().shape(mask) else {
            return Err("the mask does not have four known axes".into());
        };
        let one = DimExpr::from(1);
        let fits = (*batch == one || *batch == self.q.batch)
            && (*heads == one || *heads == DimExpr::from(self.q.count))
            && *keys == self.k.length;
        m.require(fits, "the mask broadcasts over keys, or its sizes are not those of the scores")?;
        m.require(m.facts().elem(mask) == Some(self.elem), "the mask has another type")?;
        if *queries == self.q.length {
            return Ok(Some(mask));
        }
        m.require(*queries == one, "the mask has another number of queries")?;
        m.require(m.opset() >= 11, "a mask of one row is repeated with operators of opset 11")?;
        let Some(length) = self.q.length.as_known() else {
            let length = size(m, g, self, Size::Length);
            // [1, 1, length, 1]
            let pads = Arg::Constant("pads", Tensor::int64s(&[2, 1]));
            let one = Arg::Constant("one", Tensor::from_i64s(&[], &[1]));
            let target = shared(m, g, Node::new("Pad"), length, vec![pads, one]);
            return Ok(Some(shared(m, g, Node::new("Expand"), mask, vec![Arg::Value(target)])));
        };
        let target = Arg::Constant("shape", Tensor::int64s(&[1, 1, length, 1]));
        Ok(Some(shared(m, g, Node::new("Expand"), mask, vec![target])))
    }

    fn has_rotary(&self) -> bool {
        self.q.rotary.is_some() || self.k.rotary.is_some()
    }
}

/// The number in a one-element constant that cannot add axes.
fn scalar(m: &Match, value: ValueId) -> Result<f64, Refusal> {
    let tensor = m.graph().constant(value).filter(|t| t.len() == 1 && t.dims().len() <= 4);
    tensor.and_then(Tensor::scalar_f64).ok_or_else(|| "the scale is not a constant number".into())
}

fn fuse_joined(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    m.only_if(m.perm("turned").is_ok_and(|p| p == [0, 2, 1, 3]))?;
    let found = Attention::find(m)?;
    let width = found.q.count.checked_mul(found.v.size).map(DimExpr::from);
    let output = m.shape("output")?;
    let joins = matches!(output, [batch, length, w] if *batch == found.q.batch && *length == found.q.length && Some(w) == width.as_ref());
    m.require(joins, "the output does not join the heads")?;
    match m.context().target {
        Target::Ort => fuse_for_ort(m, g, &found),
        Target::Portable => fuse_standard(m, g, &found, true),
    }
}

fn fuse_separate(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    // ONNX Runtime's own operators join the heads.
    m.only_if(m.opset() >= 23)?;
    let found = Attention::find(m)?;
    fuse_standard(m, g, &found, false)
}

fn fuse_standard(m: &Match, g: &mut Patch, found: &Attention, join: bool) -> Result<ValueId, Refusal> {
    m.require(m.opset() >= 23, "Attention needs opset 23")?;
    if let Some(mask) = found.mask {
        let scores = [&found.q.batch, &found.q.count.into(), &found.q.length, &found.k.length];
        let shape = m.facts().shape(mask).filter(|s| matches!(s.len(), 2 | 4));
        let shape = shape.ok_or("the mask does not have two or four known axes")?;
        let (one, last) = (DimExpr::from(1), shape.last() == Some(&found.k.length));
        let fits = shape.iter().rev().zip(scores.into_iter().rev()).all(|(size, of)| size == of || *size == one);
        m.require(fits && last, "the sizes of the mask are not those of the scores")?;
        m.require(m.facts().elem(mask) == Some(found.elem), "the mask has another type")?;
    }
    let mut node = Node::new("Attention").with("scale", found.scale);
    if found.causal {
        node = node.with("is_causal", 1);
    }
    let all = [&found.q, &found.k, &found.v];
    let inputs: Vec<ValueId> = if join && all.iter().all(|h| h.rotary.is_none()) {
        let mut flats = Vec::new();
        for heads in all {
            match flat_heads(m, heads) {
                Some(Flat::Whole(flat)) => flats.push(flat),
                _ => return Err("the heads are not split from three values".into()),
            }
        }
        node = node.with("q_num_heads", found.q.count).with("kv_num_heads", found.k.count);
        flats
    } else {
        m.only_if(!join)?;
        let whole = |h: &&Heads| match &h.rotary {
            Some(rotary) => rotary.output,
            None if h.turned => g.transpose(h.value, &[0, 1, 3, 2]),
            None => h.value,
        };
        all.iter().map(whole).collect()
    };
    let inputs: Vec<Option<ValueId>> = inputs.into_iter().map(Some).chain(found.mask.map(Some)).collect();
    Ok(g.node_with(node, &inputs, 1)[0])
}

fn fuse_for_ort(m: &Match, g: &mut Patch, found: &Attention) -> Result<ValueId, Refusal> {
    require_ort(m, found.elem, "the attention of ONNX Runtime is for its target")?;
    let flats: Option<Vec<Flat>> = [&found.q, &found.k, &found.v].iter().map(|h| flat_heads(m, h)).collect();
    let flats = flats.ok_or("the heads are not split from values of three axes")?;
    if found.has_rotary() || found.q.count != found.k.count {
        return group_query(m, g, found, &flats);
    }
    let mask = found.full_mask(m, g)?;
    let same_length = found.q.length == found.k.length;
    m.require(!found.causal || same_length, "queries and keys have different lengths")?;
    let mut node =
        Node::new("MultiHeadAttention").in_domain(CONTRIB).with("num_heads", found.q.count).with("scale", found.scale);
    if found.causal {
        node = node.with("unidirectional", 1);
    }
    if let Some((x, weight, bias)) = joined_projection(m, g, &flats).filter(|_| same_length) {
        node.op_type = "Attention".to_owned();
        let mut inputs = vec![Some(x), Some(weight), bias];
        if mask.is_some() {
            inputs.extend([None, None, mask]);
        }
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        return Ok(g.node_with(node, &inputs, 1)[0]);
    }
    let [q, k, v] = parts(m, g, &flats)?;
    let mut inputs = vec![Some(q), Some(k), Some(v)];
    if mask.is_some() {
        inputs.extend([None, None, mask]);
    }
    Ok(g.node_with(node, &inputs, 1)[0])
}

/// The queries, keys and values with three axes each.
fn parts(m: &Match, g: &mut Patch, flats: &[Flat]) -> Result<[ValueId; 3], Refusal> {
    if let [Flat::Whole(q), Flat::Whole(k), Flat::Whole(v)] = *flats {
        return Ok([q, k, v]);
    }
    let Some((packed, width)) = packed(flats) else {
        return Err("queries, keys and values are packed otherwise".into());
    };
    let sizes = [width; 3];
    let outputs = if m.opset() >= 13 {
        let sizes = g.int64s("split", &sizes);
        g.node_with(Node::new("Split").with("axis", -1), &[Some(packed), Some(sizes)], 3)
    } else {
        g.node_with(Node::new("Split").with("axis", 2).with("split", sizes.to_vec()), &[Some(packed)], 3)
    };
    Ok([outputs[0], outputs[1], outputs[2]])
}

/// Writes `GroupQueryAttention`. It counts the tokens itself, so it is told the lengths as tensors.
fn group_query(m: &Match, g: &mut Patch, found: &Attention, flats: &[Flat]) -> Result<ValueId, Refusal> {
    let (q, k, v) = (&found.q, &found.k, &found.v);
    m.require(q.length == k.length, "queries and keys have different lengths")?;
    m.require(q.size == v.size, "values have another size than keys")?;
    // The kernels rotate in blocks of 16 and multiply in blocks of 8.
    let block = if found.has_rotary() { 16 } else { 8 };
    m.require(q.size % block == 0, "the size of a head is no multiple of what GroupQueryAttention needs")?;
    let [query, key, value] = parts(m, g, flats)?;
    let rotary = match (&q.rotary, &k.rotary) {
        (None, None) => None,
        (Some(a), Some(b)) if a.angles == b.angles => Some(a),
        _ => return Err("queries and keys are rotated differently".into()),
    };
    let mut node = Node::new("GroupQueryAttention")
        .in_domain(CONTRIB)
        .with("num_heads", q.count)
        .with("kv_num_heads", k.count)
        .with("scale", found.scale);
    if !found.causal {
        node = node.with("causal", 0);
    }
    let [lengths, total] = lengths(m, g, found);
    let mut inputs = vec![Some(query), Some(key), Some(value), None, None, Some(lengths), Some(total)];
    if let Some(rotary) = rotary {
        let [cos, sin] = tables(m, g, rotary, found)?;
        node = node.with("do_rotary", 1);
        inputs.extend([Some(cos), Some(sin)]);
    }
    if let Some(mask) = found.full_mask(m, g)? {
        inputs.resize(10, None);
        inputs.push(Some(mask));
    }
    Ok(g.node_with(node, &inputs, 1)[0])
}

/// One more input of a node that may be there already.
enum Arg {
    Value(ValueId),
    Constant(&'static str, Tensor),
}

/// The output of `node` on `x` and `args`: of a node that is there already, else of a new one. Several attentions so
/// share what tells them lengths and angles.
fn shared(m: &Match, g: &mut Patch, node: Node, x: ValueId, args: Vec<Arg>) -> ValueId {
    let graph = m.graph();
    if !g.makes(x) {
        let same = |id: &NodeId| {
            let found = graph.node(*id);
            found.op_type == node.op_type
                && found.is_standard()
                && found.scope() == m.scope()
                && found.attributes == node.attributes
                && found.inputs().len() == 1 + args.len()
                && found.input(0) == Some(x)
                && args.iter().zip(&found.inputs()[1..]).all(|(arg, input)| match (arg, input) {
                    (Arg::Value(value), Some(input)) => value == input,
                    (Arg::Constant(_, tensor), Some(input)) => {
                        graph.constant(*input).is_some_and(|t| t.same_bits(tensor))
                    }
                    _ => false,
                })
        };
        let users = graph.value(x).uses().iter().filter_map(|u| match u {
            Use::Node(id, 0) => Some(*id),
            _ => None,
        });
        if let Some(output) = users.into_iter().find(same).and_then(|id| graph.node(id).output(0)) {
            return output;
        }
    }
    let mut inputs = vec![x];
    for arg in args {
        inputs.push(match arg {
            Arg::Value(value) => value,
            Arg::Constant(name, tensor) => g.constant(name, tensor),
        });
    }
    g.node(node, &inputs)
}

/// What can be read off the queries at run time.
#[derive(Clone, Copy)]
enum Size {
    Batch,
    Length,
}

/// The batch size or the number of queries at run time, with one axis.
fn size(m: &Match, g: &mut Patch, found: &Attention, of: Size) -> ValueId {
    let graph = m.graph();
    let [batch, length] = [&found.q.batch, &found.q.length];
    let starts_alike =
        |value: &ValueId| m.facts().shape(*value).is_some_and(|s| s.len() >= 2 && s[0] == *batch && s[1] == *length);
    // An input of the graph serves all layers at once.
    let input = graph.main().inputs().iter().copied().find(starts_alike);
    let axis = match (of, input) {
        (Size::Batch, _) => 0,
        (Size::Length, Some(_)) => 1,
        (Size::Length, None) => 2,
    };
    let shape = shared(m, g, Node::new("Shape"), input.unwrap_or(found.q.value), vec![]);
    let index = Arg::Constant("index", Tensor::int64s(&[axis]));
    shared(m, g, Node::new("Gather").with("axis", 0), shape, vec![index])
}

/// The last position of each sequence, and the common length: all sequences are as long as the queries.
fn lengths(m: &Match, g: &mut Patch, found: &Attention) -> [ValueId; 2] {
    let (batch, length) = (size(m, g, found, Size::Batch), size(m, g, found, Size::Length));
    let total = shared(m, g, Node::new("Cast").with("to", DataType::Int32), length, vec![]);
    let one = Tensor::from_f64s(DataType::Int32, &[1], &[1.0]).expect("1 is an int32");
    let last = shared(m, g, Node::new("Sub"), total, vec![Arg::Constant("one", one)]);
    let lengths = shared(m, g, Node::new("Expand"), last, vec![Arg::Value(batch)]);
    [lengths, total]
}

/// The cosines and sines of the first half of each head, `[positions, size / 2]`.
fn tables(m: &Match, g: &mut Patch, rotary: &Rotary, found: &Attention) -> Result<[ValueId; 2], Refusal> {
    let half = found.q.size / 2;
    m.require(rotary.positions == found.q.length, "the angles are for another number of positions")?;
    let target = || vec![Arg::Constant("shape", Tensor::int64s(&[-1, half]))];
    let angles = shared(m, g, Node::new("Reshape"), rotary.angles, target());
    Ok([shared(m, g, Node::new("Cos"), angles, vec![]), shared(m, g, Node::new("Sin"), angles, vec![])])
}

#[cfg(test)]
mod tests;
