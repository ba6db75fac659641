//! Turns spelled-out attention into one operator.

use super::{
    attention_parts::{Flat, Heads, Rotary, flat_heads, key_heads, query_heads, value_heads},
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
        let causal = mask.is_some_and(|mask| q.length == k.length && is_causal_mask(m, mask));
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
        m.require(matches!(m.facts().ndim(mask), Some(2 | 4)), "the mask does not have two or four axes")?;
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
        all.iter().map(|h| h.rotary.as_ref().map_or(h.value, |r| r.output)).collect()
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

/// The value that holds queries, keys and values one after another, and the width of each.
fn packed(flats: &[Flat]) -> Option<(ValueId, i64)> {
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

/// The projection that makes `value`, if only `users` uses of it and nothing inside it has other users.
fn projection(m: &Match, value: ValueId, users: usize) -> Option<Projection> {
    let graph = m.graph();
    let producer = |value: ValueId, users: usize| -> Option<&Node> {
        let uses = graph.value(value).uses();
        let private = uses.len() == users && !uses.iter().any(|u| matches!(u, Use::Output(..)));
        let id: NodeId = graph.producer(value).filter(|_| private)?;
        Some(graph.node(id)).filter(|n| n.scope() == m.scope())
    };
    let matrix = |node: &Node, bias: Option<ValueId>| -> Option<Projection> {
        let (x, weight) = (node.input(0)?, node.input(1)?);
        let constant = graph.constant(weight)?;
        let fits = node.is("MatMul") && constant.dims().len() == 2 && m.facts().ndim(x) == Some(3);
        (fits && graph.value(weight).uses().len() == 1).then_some(Projection { x, weight, bias })
    };
    let node = producer(value, users)?;
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
    matrix(producer(product, 1)?, Some(bias))
}

/// One projection that makes queries, keys and values: the input, the joined weight and the joined bias.
fn joined_projection(m: &Match, g: &mut Patch, flats: &[Flat]) -> Option<(ValueId, ValueId, Option<ValueId>)> {
    let graph = m.graph();
    if let Some((packed, _)) = packed(flats) {
        let found = projection(m, packed, 1)?;
        return Some((found.x, found.weight, found.bias));
    }
    let each: Vec<Projection> = flats
        .iter()
        .map(|flat| match *flat {
            Flat::Whole(value) => projection(m, value, 1),
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
        (Some(a), Some(b)) if a.cos == b.cos && a.sin == b.sin => Some(a),
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
mod tests {
    use super::*;
    use crate::testing::{check, check_in, check_refuses, check_refuses_in};
    use insta::assert_snapshot;

    fn ort() -> Context<'static> {
        Context { target: Target::Ort, ..Context::default() }
    }

    /// Two heads of four from values of three axes, with a mask.
    const PLAIN: &str = r#"g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,S,T] mask) => (float[B,S,8] y)
        <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float root = {2}> {
            a4 = Reshape (a, split)
            q = Transpose <perm = [0, 2, 1, 3]> (a4)
            b4 = Reshape (b, split)
            k = Transpose <perm = [0, 2, 3, 1]> (b4)
            c4 = Reshape (c, split)
            v = Transpose <perm = [0, 2, 1, 3]> (c4)
            scores = MatMul (q, k)
            scaled = Div (scores, root)
            masked = Add (scaled, mask)
            weights = Softmax <axis = -1> (masked)
            context = MatMul (weights, v)
            turned = Transpose <perm = [0, 2, 1, 3]> (context)
            y = Reshape (turned, join)
        }"#;

    fn plain(opset: i64) -> String {
        format!("<opset_import: [\"\" : {opset}]> {PLAIN}")
    }

    #[test]
    fn writes_multi_head_attention() {
        assert_snapshot!(check_in(&FuseAttention, &plain(17), &ort()), @r#"
        g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,S,T] mask) => (float[B,S,8] y) <
            int64[4] split = {0, 0, 2, 4},
            int64[3] join = {0, 0, 8},
            float root = {2}
        > {
            y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.5> (a, b, c, "", "", mask)  # float[B,S,8]
        }
        "#);
    }

    #[test]
    fn writes_the_standard_attention() {
        assert_snapshot!(check(&FuseAttention, &plain(23)), @"
        g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,S,T] mask) => (float[B,S,8] y) <
            int64[4] split = {0, 0, 2, 4},
            int64[3] join = {0, 0, 8},
            float root = {2}
        > {
            y = Attention <scale = 0.5, q_num_heads = 2, kv_num_heads = 2> (a, b, c, mask)  # float[B,S,8]
        }
        ");
    }

    #[test]
    fn leaves_heads_separate_that_nothing_joins() {
        assert_snapshot!(check(&FuseAttention, r#"<opset_import: ["" : 23]>
            g (bool c, float[2,4,S,8] q, float[2,4,T,8] k, float[2,4,T,8] v) => (float[2,4,S,8] y) <float scale = {0.5}> {
                y = If (c) <then_branch = a () => (float[2,4,S,8] p) {
                    kt = Transpose <perm = [0, 1, 3, 2]> (k)
                    qs = Mul (q, scale)
                    ks = Mul (kt, scale)
                    scores = MatMul (qs, ks)
                    weights = Softmax (scores)
                    p = MatMul (weights, v)
                }, else_branch = b () => (float[2,4,S,8] n) { n = Neg (q) }>
            }"#), @"
        g (bool c, float[2,4,S,8] q, float[2,4,T,8] k, float[2,4,T,8] v) => (float[2,4,S,8] y) <
            float scale = {0.5}
        > {
            y = If (c) <then_branch = a () => (p_1) {
                p_1 = Attention <scale = 0.25> (q, k, v)
            }, else_branch = b () => (float[2,4,S,8] n) {
                n = Neg (q)  # float[2,4,S,8]
            }>  # float[2,4,S,8]
        }
        ");
    }

    #[test]
    fn joins_three_projections() {
        assert_snapshot!(check_in(&FuseAttention, r#"<opset_import: ["" : 17]>
            g (float[B,S,2] x) => (float[B,S,2] y)
            <int64[4] split = {0, 0, 2, 1}, int64[3] join = {0, 0, 2}, float[2,2] wq = {1, 2, 3, 4},
             float[2,2] wk = {5, 6, 7, 8}, float[2,2] wv = {9, 1, 2, 3}> {
                a = MatMul (x, wq)
                b = MatMul (x, wk)
                c = MatMul (x, wv)
                a4 = Reshape (a, split)
                q = Transpose <perm = [0, 2, 1, 3]> (a4)
                b4 = Reshape (b, split)
                k4 = Transpose <perm = [0, 2, 1, 3]> (b4)
                k = Transpose <perm = [0, 1, 3, 2]> (k4)
                c4 = Reshape (c, split)
                v = Transpose <perm = [0, 2, 1, 3]> (c4)
                scores = MatMul (q, k)
                weights = Softmax <axis = -1> (scores)
                context = MatMul (weights, v)
                turned = Transpose <perm = [0, 2, 1, 3]> (context)
                y = Reshape (turned, join)
            }"#, &ort()), @r#"
        g (float[B,S,2] x) => (float[B,S,2] y) <
            int64[4] split = {0, 0, 2, 1},
            int64[3] join = {0, 0, 2},
            float[2,2] wq = {1, 2, 3, 4},
            float[2,2] wk = {5, 6, 7, 8},
            float[2,2] wv = {9, 1, 2, 3},
            float[2,6] y_weight = ["elements": "12", "hash": "db1a3c26"]
        > {
            y = com.microsoft.Attention <num_heads = 2, scale = 1.0> (x, y_weight)  # float[B,S,2]
        }
        "#);
    }

    #[test]
    fn unpacks_a_projection() {
        assert_snapshot!(check_in(&FuseAttention, r#"<opset_import: ["" : 17]>
            g (float[B,5,12] packed) => (float[B,5,4] y, float[B,5,12] shown)
            <int64[5] split = {0, 0, 3, 2, 2}, int64[3] join = {0, 0, 4}, int64[3] each = {1, 1, 1}, int64[1] first = {0},
             float[12] bias = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
                shown = Add (packed, bias)
                five = Reshape (shown, split)
                moved = Transpose <perm = [2, 0, 3, 1, 4]> (five)
                q1, k1, v1 = Split <axis = 0> (moved, each)
                q = Squeeze (q1, first)
                k4 = Squeeze (k1, first)
                v = Squeeze (v1, first)
                k = Transpose <perm = [0, 1, 3, 2]> (k4)
                scores = MatMul (q, k)
                weights = Softmax <axis = -1> (scores)
                context = MatMul (weights, v)
                turned = Transpose <perm = [0, 2, 1, 3]> (context)
                y = Reshape (turned, join)
            }"#, &ort()), @r#"
        g (float[B,5,12] packed) => (float[B,5,4] y, float[B,5,12] shown) <
            int64[5] split = {0, 0, 3, 2, 2},
            int64[3] join = {0, 0, 4},
            int64[3] each = {1, 1, 1},
            int64[1] first = {0},
            float[12] bias = ["elements": "12", "hash": "a764f3b1"],
            int64[3] y_split = {4, 4, 4}
        > {
            shown = Add (packed, bias)  # float[B,5,12]
            y_1, y_2, y_3 = Split <axis = -1> (shown, y_split)
            y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 1.0> (y_1, y_2, y_3)  # float[B,5,4]
        }
        "#);
    }

    /// Two query heads of 16 on one key head, rotated by position, with `mask`.
    fn grouped(mask: &str) -> String {
        format!(
            r#"<opset_import: ["" : 18]>
            g (float[B,S,32] a, float[B,S,16] b, float[B,S,16] c, float[B,1,S,S] given) => (float[B,S,32] y)
            <int64[4] heads = {{0, 0, 2, 16}}, int64[4] shared = {{0, 0, 1, 16}}, int64[3] join = {{0, 0, 32}}, float scale = {{0.5}},
             int64[1] first = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] end = {{9223372036854775807}},
             int64 zero = {{0}}, int64 step = {{1}}, float[8] frequency = {{1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001}}, float seen = {{0}}, float unseen = {{-3e38}},
             int64[1] last = {{-1}}, int64[1] eight = {{8}}, int64[1] sixteen = {{16}}, int64[2] outer = {{0, 1}}, int64[3] outermost = {{0, 1, 2}}> {{
                shape = Shape (a)
                length = Gather <axis = 0> (shape, step)
                batch = Gather <axis = 0> (shape, first)
                length1 = Gather <axis = 0> (shape, one)
                positions = Range (zero, length, step)
                column = Unsqueeze (positions, last)
                floats = Cast <to = 1> (column)
                half = Mul (floats, frequency)
                angles = Concat <axis = -1> (half, half)
                cosines = Cos (angles)
                cos = Unsqueeze (cosines, outer)
                sines = Sin (angles)
                sin = Unsqueeze (sines, outer)
                queries = Unsqueeze (column, outer)
                keys = Unsqueeze (positions, outermost)
                visible = LessOrEqual (keys, queries)
                causal = Where (visible, seen, unseen)
                a4 = Reshape (a, heads)
                q = Transpose <perm = [0, 2, 1, 3]> (a4)
                qc = Mul (q, cos)
                q_low = Slice (q, first, eight, three, one)
                q_high = Slice (q, eight, end, three, one)
                q_neg = Neg (q_high)
                q_turned = Concat <axis = -1> (q_neg, q_low)
                qs = Mul (q_turned, sin)
                qr = Add (qc, qs)
                b4 = Reshape (b, shared)
                k = Transpose <perm = [0, 2, 1, 3]> (b4)
                kc = Mul (k, cos)
                k_low, k_high = Split <axis = -1, num_outputs = 2> (k)
                k_neg = Neg (k_high)
                k_turned = Concat <axis = -1> (k_neg, k_low)
                ks = Mul (k_turned, sin)
                kr = Add (kc, ks)
                c4 = Reshape (c, shared)
                v = Transpose <perm = [0, 2, 1, 3]> (c4)
                wide = Concat <axis = 0> (batch, one, two, length1, sixteen)
                full = Concat <axis = 0> (batch, two, length1, sixteen)
                k5 = Unsqueeze (kr, two)
                k_wide = Expand (k5, wide)
                k_full = Reshape (k_wide, full)
                v5 = Unsqueeze (v, two)
                v_wide = Expand (v5, wide)
                v_full = Reshape (v_wide, full)
                kt = Transpose <perm = [0, 1, 3, 2]> (k_full)
                scores = MatMul (qr, kt)
                scaled = Mul (scores, scale)
                masked = Add (scaled, {mask})
                weights = Softmax <axis = -1> (masked)
                context = MatMul (weights, v_full)
                turned = Transpose <perm = [0, 2, 1, 3]> (context)
                y = Reshape (turned, join)
            }}"#
        )
    }

    #[test]
    fn writes_group_query_attention() {
        assert_snapshot!(check_in(&FuseAttention, &grouped("causal"), &ort()), @r#"
        g (float[B,S,32] a, float[B,S,16] b, float[B,S,16] c, float[B,1,S,S] given) => (float[B,S,32] y) <
            int64[4] heads = {0, 0, 2, 16},
            int64[4] shared = {0, 0, 1, 16},
            int64[3] join = {0, 0, 32},
            float scale = {0.5},
            int64[1] first = {0},
            int64[1] one = {1},
            int64[1] two = {2},
            int64[1] three = {3},
            int64[1] end = {9223372036854775807},
            int64 zero = {0},
            int64 step = {1},
            float[8] frequency = {1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001},
            float seen = {0},
            float unseen = {-3e38},
            int64[1] last = {-1},
            int64[1] eight = {8},
            int64[1] sixteen = {16},
            int64[2] outer = {0, 1},
            int64[3] outermost = {0, 1, 2},
            int32[1] y_one = {1},
            int64[2] y_shape = {-1, 8}
        > {
            shape = Shape (a)
            length = Gather <axis = 0> (shape, step)
            batch = Gather <axis = 0> (shape, first)
            length1 = Gather <axis = 0> (shape, one)
            positions = Range (zero, length, step)
            column = Unsqueeze (positions, last)
            floats = Cast <to = 1> (column)
            half = Mul (floats, frequency)
            y_1 = Cast <to = 6> (length1)
            y_2 = Sub (y_1, y_one)
            y_3 = Expand (y_2, batch)
            y_4 = Reshape (half, y_shape)
            y_5 = Cos (y_4)
            y_6 = Sin (y_4)
            y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, scale = 0.5, do_rotary = 1> (a, b, c, "", "", y_3, y_1, y_5, y_6)  # float[B,S,32]
        }
        "#);
    }

    #[test]
    fn keeps_a_mask_that_is_not_known_to_be_causal() {
        let printed = check_in(&FuseAttention, &grouped("given"), &ort());
        let attention = printed.lines().find(|line| line.contains("GroupQueryAttention"));
        assert_snapshot!(attention.unwrap_or_default().trim(), @r#"
        y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, scale = 0.5, causal = 0, do_rotary = 1> (a, b, c, "", "", y_3, y_1, y_5, y_6, "", given)  # float[B,S,32]
        "#);
    }

    #[test]
    fn repeats_a_padding_mask() {
        let padding = plain(17).replace("float[B,1,S,T] mask", "float[B,1,1,T] mask");
        assert_snapshot!(check_in(&FuseAttention, &padding, &ort()), @r#"
        g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,1,T] mask) => (float[B,S,8] y) <
            int64[4] split = {0, 0, 2, 4},
            int64[3] join = {0, 0, 8},
            float root = {2},
            int64[1] y_index = {1},
            int64[2] y_pads = {2, 1},
            int64 y_one = {1}
        > {
            y_1 = Shape (a)
            y_2 = Gather <axis = 0> (y_1, y_index)
            y_3 = Pad (y_2, y_pads, y_one)
            y_4 = Expand (mask, y_3)
            y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.5> (a, b, c, "", "", y_4)  # float[B,S,8]
        }
        "#);
    }

    #[test]
    fn refuses() {
        check_refuses(&FuseAttention, &plain(22), "Attention needs opset 23");
        let column = plain(17).replace("float[B,1,S,T] mask", "float[B,1,S,1] mask");
        check_refuses_in(&FuseAttention, &column, "the mask broadcasts over keys", &ort());
        let small = grouped("given").replace("16", "12").replace("32", "24").replace("eight = {8}", "eight = {6}");
        let small = small.replace("float[8] frequency = {1, 0.5, ", "float[6] frequency = {");
        check_refuses_in(&FuseAttention, &small, "the size of a head", &ort());
        let shown = plain(17).replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,2,S,T] weights)");
        check_refuses_in(&FuseAttention, &shown, "an inner value is a graph output", &ort());
        let varying = plain(17).replace("mask) =>", "mask, float r) =>").replace("(scores, root)", "(scores, r)");
        check_refuses_in(&FuseAttention, &varying, "the scale is not a constant number", &ort());
        let other = plain(17).replace("float[B,T,8] c", "float[B,U,8] c");
        check_refuses_in(&FuseAttention, &other, "queries, keys and values do not fit", &ort());
    }
}
