//! Writes `GroupQueryAttention`, whose kernel breaks down on an empty batch and refuses an empty sequence.

use super::{
    Attention, bias,
    cache::cache,
    heads::{Heads, Role},
    multi_head::Made,
    product::Operand,
    rotary::{Rotary, unrotated},
    sizes::size,
};
use crate::{Match, Refusal, exact::norm_parts::CONTRIB};
use lathe_ir::{DataType, Node, Patch, Tensor, ValueId};

/// Whether the operator fits: it pays where heads share keys or are rotated, and nothing else has a soft cap.
pub(super) fn is_for(m: &Match, attention: &Attention) -> Result<bool, Refusal> {
    let (q, k, v) = (&attention.q, &attention.k, &attention.v);
    let rotated = rotary(m, attention)?.is_some();
    // The kernels rotate in blocks of 16 and multiply in blocks of 8.
    let block = if rotated { 16 } else { 8 };
    let known = [&attention.q.batch()?, &q.length].iter().all(|size| size.as_known().is_some_and(|n| n > 0));
    let fits = known
        && attention.lead.len() == 2
        && attention.factors.is_empty()
        && attention.sink.is_none()
        && q.length == k.length
        && q.size == v.size
        && q.size % block == 0;
    m.require(
        fits || attention.softcap.is_none(),
        "a soft cap needs GroupQueryAttention, which takes heads of 8 numbers or a multiple, as many queries as keys, \
         and sizes that are known not to be 0",
    )?;
    Ok(fits && (rotated || attention.softcap.is_some() || attention.groups()? > 1))
}

/// The rotary embedding of queries and keys, with the heads it is applied to.
fn rotary(m: &Match, attention: &Attention) -> Result<Option<(Heads, Heads, Rotary)>, Refusal> {
    let (q, k) = (&attention.q, &attention.k);
    let identity = |heads: &Heads| heads.perm.is_sorted();
    if !identity(q) || !identity(k) {
        return Ok(None);
    }
    let (Some((x, a)), Some((y, b))) = (unrotated(m, q.value), unrotated(m, k.value)) else { return Ok(None) };
    if a.angles != b.angles || a.positions != q.length {
        return Ok(None);
    }
    let operand = |value: ValueId| Operand { value, perm: (0..4).collect() };
    let queries = Heads::read(m, &operand(x), Role::Queries, &q.lead)?;
    // Not as keys, whose product takes them turned.
    let mut keys = Heads::read(m, &operand(y), Role::Values, &k.lead)?;
    if queries.lead != q.lead || keys.lead != k.lead || queries.scale != 1.0 {
        return Ok(None);
    }
    keys.scale = k.scale;
    Ok(Some((queries, keys, a)))
}

/// Writes the operator. It counts the tokens itself, so it is told the lengths as tensors.
pub(super) fn write(m: &Match, g: &mut Patch, attention: &Attention) -> Result<ValueId, Refusal> {
    let mut node = Node::new("GroupQueryAttention")
        .in_domain(CONTRIB)
        .with("num_heads", attention.count()?)
        .with("kv_num_heads", attention.k.count()?)
        .with("scale", attention.scale);
    if let Some(cap) = attention.softcap {
        node = node.with("softcap", cap);
    }
    let mask = bias::mask(m, g, attention, true, f64::NEG_INFINITY)?;
    if !mask.causal {
        node = node.with("causal", 0);
    }
    let rotary = rotary(m, attention)?;
    let (q, k) = rotary.as_ref().map_or((&attention.q, &attention.k), |(q, k, _)| (q, k));
    let (query, key, value) = (q.joined(m, g)?, k.joined(m, g)?, attention.v.joined(m, g)?);
    let [lengths, total] = lengths(g, attention)?;
    let mut inputs = vec![Some(query), Some(key), Some(value), None, None, Some(lengths), Some(total)];
    if let Some((_, _, rotary)) = &rotary {
        // The cosines and sines of the first half of each head, [positions, size / 2].
        let angles = g.reshape(rotary.angles, &[-1, q.size / 2]);
        inputs.extend([Some(g.node(Node::new("Cos"), &[angles])), Some(g.node(Node::new("Sin"), &[angles]))]);
        node = node.with("do_rotary", 1);
    }
    if let Some(bias) = mask.bias {
        inputs.resize(10, None);
        inputs.push(Some(bias.value));
    }
    Ok(g.node_with(node, &inputs, 1)[0])
}

/// Writes the operator with the caches that it takes and returns, where there are some and it takes heads of this form.
/// The mask tells all about who sees whom, so the operator hides nothing by itself.
pub(super) fn write_cached(m: &Match, g: &mut Patch, attention: &Attention) -> Result<Option<Made>, Refusal> {
    let (q, k) = (&attention.q, &attention.k);
    let fits = attention.factors.is_empty() && q.size == attention.v.size && q.size % 8 == 0;
    if !fits || attention.elem != DataType::Float {
        return Ok(None);
    }
    let Some(cache) = cache(m, g, attention)? else { return Ok(None) };
    let query = q.joined(m, g)?;
    let mask = bias::mask(m, g, attention, false, f64::NEG_INFINITY)?;
    let mut node = Node::new("GroupQueryAttention")
        .in_domain(CONTRIB)
        .with("num_heads", attention.count()?)
        .with("kv_num_heads", k.count()?)
        .with("scale", attention.scale)
        .with("causal", 0);
    if let Some(cap) = attention.softcap {
        node = node.with("softcap", cap);
    }
    let near = [q.value, k.value];
    // Queries and keys have these sizes themselves.
    let total = size(m, g, &k.length, &near).ok_or(Refusal::NoMatch)?;
    let batch = size(m, g, &q.batch()?, &near).ok_or(Refusal::NoMatch)?;
    let total = g.node(Node::new("Cast").with("to", DataType::Int32), &[total]);
    let one = g.constant("one", Tensor::from_f64s(DataType::Int32, &[1], &[1.0]).ok_or(Refusal::NoMatch)?);
    let last = g.node(Node::new("Sub"), &[total, one]);
    let lengths = g.node(Node::new("Expand"), &[last, batch]);
    let ([key, value], [past_key, past_value]) = (cache.new, cache.past);
    let mut inputs: Vec<Option<ValueId>> = [query, key, value, past_key, past_value, lengths, total].map(Some).to_vec();
    if let Some(bias) = mask.bias {
        inputs.resize(10, None);
        inputs.push(Some(bias.value));
    }
    let made = g.node_with(node, &inputs, 3);
    let present = cache.present.into_iter().zip(made[1..].iter().copied()).collect();
    Ok(Some(Made { joined: made[0], present }))
}

/// The last position of each sequence, and the common length: all sequences are as long as the queries.
fn lengths(g: &mut Patch, attention: &Attention) -> Result<[ValueId; 2], Refusal> {
    let size = |size: Option<i64>| size.ok_or(Refusal::NoMatch);
    let (batch, length) = (size(attention.q.batch()?.as_known())?, size(attention.q.length.as_known())?);
    let fits = |size: i64| i32::try_from(size).map_err(|_| "the batch or the length is no int32");
    let (batch, length) = (fits(batch)?, fits(length)?);
    let int32 = |dims: &[usize], value: i32| {
        let all = vec![f64::from(value); dims.iter().product()];
        Tensor::from_f64s(DataType::Int32, dims, &all).ok_or(Refusal::NoMatch)
    };
    let last = int32(&[usize::try_from(batch).map_err(|_| Refusal::NoMatch)?], length - 1)?;
    let total = int32(&[], length)?;
    Ok([g.constant("last", last), g.constant("total", total)])
}
