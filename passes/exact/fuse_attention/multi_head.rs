//! Writes the attention operators of ONNX Runtime.

use super::{
    Attention, bias,
    cache::cache,
    group_query,
    heads::Flat,
    projections::{joined_projection, packed},
    sizes::sizes,
};
use crate::{
    Match, Refusal, Replacement,
    exact::norm_parts::{CONTRIB, require_ort_type},
};
use lathe_analysis::DimExpr;
use lathe_ir::{Node, Patch, ValueId};

/// Writes `MultiHeadAttention`, or what is better than it.
pub(super) fn fuse(m: &Match, g: &mut Patch, attention: &Attention) -> Result<Replacement, Refusal> {
    require_ort_type(m, attention.elem)?;
    let slow = "MultiHeadAttention is slower than its steps on this execution provider";
    let grouped = match m.context().setting(&super::INFO, "grouped-caches") {
        Ok(true) => group_query::write_cached(m, g, attention)?,
        _ => None,
    };
    let made = if let Some(grouped) = grouped {
        grouped
    } else if group_query::is_for(m, attention)? && pays(m, "GroupQueryAttention") {
        Made { joined: group_query::write(m, g, attention)?, present: Vec::new() }
    } else if !pays(m, "MultiHeadAttention") {
        return Err(slow.into());
    } else if attention.groups()? == 1 {
        one_key_each(m, g, attention)?
    } else {
        stacked(m, g, attention)?
    };
    let restored = attention.restored(m, g, made.joined)?;
    Ok(Replacement { outputs: vec![(0, restored)], others: made.present })
}

/// Whether the kernel of an operator is not slower than what it takes the place of.
fn pays(m: &Match, op: &str) -> bool {
    !m.context().slow_kernels.contains(op)
}

/// What an operator makes.
pub(super) struct Made {
    /// `[batch, length, count · size]`.
    pub joined: ValueId,
    /// The keys and values that the model returns, and those that take their place.
    pub present: Vec<(ValueId, ValueId)>,
}

/// A `MultiHeadAttention` of `query`, which takes and returns the caches if there are any.
fn operator_on(
    m: &Match,
    g: &mut Patch,
    attention: &Attention,
    node: Node,
    query: ValueId,
    masks: [Option<ValueId>; 2],
) -> Result<Made, Refusal> {
    let [padding, bias] = masks;
    if let Some(cache) = cache(m, g, attention)? {
        let ([key, value], [past_key, past_value]) = (cache.new, cache.past);
        let inputs = [query, key, value].map(Some).into_iter().chain([None, padding, bias]);
        let inputs: Vec<Option<ValueId>> = inputs.chain([Some(past_key), Some(past_value)]).collect();
        let made = g.node_with(node, &inputs, 3);
        let present = cache.present.into_iter().zip(made[1..].iter().copied()).collect();
        return Ok(Made { joined: made[0], present });
    }
    let (key, value) = keys_and_values(m, g, attention)?;
    let inputs = without_tail([Some(query), Some(key), Some(value), None, padding, bias]);
    Ok(Made { joined: g.node_with(node, &inputs, 1)[0], present: Vec::new() })
}

/// The attention of heads that have keys of their own, `[batch, length, count · size]`.
fn one_key_each(m: &Match, g: &mut Patch, attention: &Attention) -> Result<Made, Refusal> {
    m.require(attention.softcap.is_none(), "MultiHeadAttention has no soft cap")?;
    let has_sink = attention.sink.is_some();
    let padding = if has_sink { None } else { bias::padding(m, g, attention) };
    let mask = match padding {
        Some(_) => bias::Mask { causal: false, bias: None },
        None => bias::mask(m, g, attention, !has_sink, f64::NEG_INFINITY)?,
    };
    let mut node = operator(attention, attention.count()?);
    if let Some(padding) = &padding {
        node = node.with("mask_filter_value", padding.fill);
    }
    let keys = padding.map(|padding| padding.keys);
    if mask.causal {
        node = node.with("unidirectional", 1);
    }
    let (q, k, v) = (&attention.q, &attention.k, &attention.v);
    let flats: Option<Vec<Flat>> = [q, k, v].iter().map(|heads| heads.flat(m)).collect();
    if let Some(flats) = flats.filter(|_| attention.factors.is_empty() && !has_sink) {
        let added = mask.bias.as_ref().map(|bias| bias.value);
        let same_length = q.length == k.length;
        let packs = same_length && pays(m, "Attention");
        let projection = packs.then(|| joined_projection(m, g, &flats, &attention.nodes)).flatten();
        if let Some((x, weight, bias)) = projection {
            node.op_type = "Attention".to_owned();
            let inputs = without_tail([Some(x), Some(weight), bias, keys, None, added]);
            return Ok(Made { joined: g.node_with(node, &inputs, 1)[0], present: Vec::new() });
        }
        if let Some([q, k, v]) = unpacked(m, g, &flats) {
            let inputs = without_tail([Some(q), Some(k), Some(v), None, keys, added]);
            return Ok(Made { joined: g.node_with(node, &inputs, 1)[0], present: Vec::new() });
        }
    }
    let query = attention.joined_queries(m, g)?;
    let bias = match mask.bias {
        Some(bias) if has_sink => Some(with_sink(m, g, attention, bias.value, attention.count()?, None)?),
        None if has_sink => return Err("a sink without a mask".into()),
        other => other.map(|bias| bias.value),
    };
    operator_on(m, g, attention, node, query, [keys, bias])
}

/// Keys and values side by side, or by heads, which the operator takes too if both are of one size.
fn keys_and_values(m: &Match, g: &mut Patch, attention: &Attention) -> Result<(ValueId, ValueId), Refusal> {
    let (k, v) = (&attention.k, &attention.v);
    let by_heads = attention.lead.len() == 2 && k.size == v.size && !(k.has_rows() && v.has_rows());
    let (key, value) = if by_heads { (k.split(g), v.split(g)) } else { (k.joined(m, g)?, v.joined(m, g)?) };
    if attention.sink.is_none() {
        return Ok((key, value));
    }
    // One more key, whose score is 0 before the bias, and its value of nothing.
    m.require(m.opset() >= 11, "a key is added with the Pad of opset 11")?;
    let pads: &[i64] = if by_heads { &[0, 0, 0, 0, 0, 0, 1, 0] } else { &[0, 0, 0, 0, 1, 0] };
    let mut longer = |value: ValueId| {
        let pads = g.int64s("pads", pads);
        g.node(Node::new("Pad"), &[value, pads])
    };
    Ok((longer(key), longer(value)))
}

/// A bias with the score of a sink behind it. `heads` is how many heads of `rows` queries the operator has.
fn with_sink(
    m: &Match,
    g: &mut Patch,
    attention: &Attention,
    bias: ValueId,
    heads: i64,
    rows: Option<&DimExpr>,
) -> Result<ValueId, Refusal> {
    let near = [attention.q.value, attention.k.value];
    let sink = attention.sink.ok_or(Refusal::NoMatch)?;
    let shape = m.facts().shape(sink).ok_or(Refusal::NoMatch)?;
    let batch = attention.q.batch()?;
    let whole = [batch.clone(), attention.count()?.into(), attention.q.length.clone(), 1.into()];
    m.require(*shape == whole, "a sink is not one score for each query of each head")?;
    let column = match rows {
        Some(rows) => {
            let to =
                sizes(m, g, &[batch.clone(), heads.into(), rows.clone(), 1.into()], &near).ok_or(Refusal::NoMatch)?;
            g.node(Node::new("Reshape").with("allowzero", 1), &[sink, to])
        }
        None => sink,
    };
    let to = sizes(m, g, &[batch, heads.into(), 1.into(), 1.into()], &near).ok_or(Refusal::NoMatch)?;
    let full = g.node(Node::new("Expand"), &[bias, to]);
    Ok(g.node(Node::new("Concat").with("axis", 3), &[full, column]))
}

fn operator(attention: &Attention, heads: i64) -> Node {
    Node::new("MultiHeadAttention").in_domain(CONTRIB).with("num_heads", heads).with("scale", attention.scale)
}

/// Inputs without the missing ones at the end.
fn without_tail(inputs: [Option<ValueId>; 6]) -> Vec<Option<ValueId>> {
    let mut inputs = inputs.to_vec();
    while inputs.last() == Some(&None) {
        inputs.pop();
    }
    inputs
}

/// The queries, keys and values that are three values already, or parts of one.
fn unpacked(m: &Match, g: &mut Patch, flats: &[Flat]) -> Option<[ValueId; 3]> {
    if let [Flat::Whole(q), Flat::Whole(k), Flat::Whole(v)] = *flats {
        return Some([q, k, v]);
    }
    let (packed, width) = packed(flats)?;
    let sizes = [width; 3];
    let outputs = if m.opset() >= 13 {
        let sizes = g.int64s("split", &sizes);
        g.node_with(Node::new("Split").with("axis", -1), &[Some(packed), Some(sizes)], 3)
    } else {
        g.node_with(Node::new("Split").with("axis", 2).with("split", sizes.to_vec()), &[Some(packed)], 3)
    };
    Some([outputs[0], outputs[1], outputs[2]])
}

/// The attention of heads that share keys: the queries of one group follow one another, as if they were more queries
/// of one head.
fn stacked(m: &Match, g: &mut Patch, attention: &Attention) -> Result<Made, Refusal> {
    m.require(m.opset() >= 14, "heads that share keys need a Reshape of opset 14")?;
    m.require(attention.softcap.is_none(), "MultiHeadAttention has no soft cap")?;
    let (q, k, v) = (&attention.q, &attention.k, &attention.v);
    let (groups, keys) = (attention.groups()?, k.count()?);
    m.require(attention.lead.len() == 2, "heads share keys, and there are several batch axes")?;
    let near = [q.value, k.value];
    let unknown = "the sizes of batch and queries cannot be read off an input";
    let rows = q.length.scaled(groups).ok_or("the sizes of the queries overflow")?;
    let known = |size: i64| DimExpr::from(size);
    let joined = attention.joined_queries(m, g)?;
    // [batch, length, keys, groups, size]
    let split = g.reshape(joined, &[0, 0, keys, groups, q.size]);
    let turned = g.transpose(split, &[0, 3, 1, 2, 4]);
    let to = sizes(m, g, &[attention.q.batch()?, rows.clone(), known(keys * q.size)], &near).ok_or(unknown)?;
    let query = g.node(Node::new("Reshape").with("allowzero", 1), &[turned, to]);
    let mask = bias::mask(m, g, attention, false, f64::NEG_INFINITY)?;
    let bias = match mask.bias {
        Some(bias) => Some(stacked_bias(m, g, attention, bias, &rows)?),
        None => None,
    };
    let bias = match bias {
        Some(bias) if attention.sink.is_some() => Some(with_sink(m, g, attention, bias, keys, Some(&rows))?),
        None if attention.sink.is_some() => return Err("a sink without a mask".into()),
        other => other,
    };
    let made = operator_on(m, g, attention, operator(attention, keys), query, [None, bias])?;
    let by_group = [attention.q.batch()?, known(groups), q.length.clone(), known(keys), known(v.size)];
    let to = sizes(m, g, &by_group, &near).ok_or(unknown)?;
    let split = g.node(Node::new("Reshape").with("allowzero", 1), &[made.joined, to]);
    let turned = g.transpose(split, &[0, 2, 3, 1, 4]);
    Ok(Made { joined: g.reshape(turned, &[0, 0, attention.count()? * v.size]), ..made })
}

/// How often a bias is repeated for heads that share keys.
const MOST_COPIES: usize = 1024;

/// A bias whose rows follow one another as the queries of a group do, `[1 or batch, 1 or keys, groups · queries, keys]`.
fn stacked_bias(m: &Match, g: &mut Patch, a: &Attention, bias: bias::Bias, rows: &DimExpr) -> Result<ValueId, Refusal> {
    let [batch, heads, _, columns] = bias.dims;
    if heads.as_known() == Some(1) {
        let copies = usize::try_from(a.groups()?).ok().filter(|&copies| copies <= MOST_COPIES);
        let copies = copies.ok_or("too many heads share keys")?;
        return Ok(g.node(Node::new("Concat").with("axis", 2), &vec![bias.value; copies]));
    }
    let to = [batch, a.k.count()?.into(), rows.clone(), columns];
    let to = sizes(m, g, &to, &[a.q.value, a.k.value]).ok_or(Refusal::NoMatch)?;
    Ok(g.node(Node::new("Reshape").with("allowzero", 1), &[bias.value, to]))
}
