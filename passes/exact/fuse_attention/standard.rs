//! Writes the standard `Attention` of opset 23.
//!
//! ONNX Runtime holds it to more than the standard does: it refuses a batch or a length of 0, a mask of one row, and it
//! gives 0 for a query all of whose keys are masked with the lowest number, where a softmax gives the mean.

use super::{
    Attention, bias,
    scores::{Term, TermKind},
    walk::number,
};
use crate::{Match, Refusal};
use lathe_ir::{DataType, Node, Patch, ValueId};

/// Half of the lowest float32: it hides as well, and is not taken for a key that is not there.
const LOWEST: f64 = f32::MIN as f64 / 2.0;

pub(super) fn fuse(m: &Match, g: &mut Patch, attention: &Attention) -> Result<ValueId, Refusal> {
    m.require(m.opset() >= 23, "Attention needs opset 23")?;
    m.require(attention.lead.len() == 2, "batch and heads are one axis")?;
    m.require(attention.softcap.is_none(), "ONNX Runtime caps the scores after the mask")?;
    m.require(attention.sink.is_none(), "Attention has no sink")?;
    let (q, k, v) = (&attention.q, &attention.k, &attention.v);
    let sizes = [&attention.q.batch()?, &q.length, &k.length];
    let positive = sizes.iter().all(|size| size.as_known().is_some_and(|n| n > 0));
    m.require(positive, "ONNX Runtime refuses an Attention of batch or lengths 0, and these are open")?;
    let lowest = lowest(m, attention)?;
    let mask = bias::mask(m, g, attention, true, lowest.hidden)?;
    let mut node = Node::new("Attention").with("scale", attention.scale);
    if mask.causal {
        node = node.with("is_causal", 1);
    }
    let added = match mask.bias {
        Some(bias) if lowest.clamps => {
            let least = g.constant("least", number(attention.elem, LOWEST)?);
            Some(g.node(Node::new("Max"), &[bias.value, least]))
        }
        other => other.map(|bias| bias.value),
    };
    let is_joined = attention.factors.is_empty() && [q, k, v].iter().all(|heads| heads.has_rows());
    if is_joined {
        node = node.with("q_num_heads", attention.count()?).with("kv_num_heads", k.count()?);
        let inputs = [q.joined(m, g)?, k.joined(m, g)?, v.joined(m, g)?];
        let inputs: Vec<ValueId> = inputs.into_iter().chain(added).collect();
        let made = g.node(node, &inputs);
        return attention.restored(m, g, made);
    }
    let plain = attention.order.is_sorted() && m.ndim("output")? == 4;
    m.require(plain, "batch and heads are regrouped before the product with the values")?;
    let inputs = [attention.split_queries(m, g)?, k.split(g), v.split(g)];
    let inputs: Vec<ValueId> = inputs.into_iter().chain(added).collect();
    Ok(g.node(node, &inputs))
}

/// How low a mask goes.
struct Lowest {
    /// What hidden scores become at least.
    hidden: f64,
    /// Whether what is added may be lower than [`LOWEST`].
    clamps: bool,
}

fn lowest(m: &Match, attention: &Attention) -> Result<Lowest, Refusal> {
    let infinite = |term: &Term| matches!(term.kind, TermKind::Hidden { fill, .. } if fill.is_infinite());
    let float = attention.elem == DataType::Float;
    let limit = if float { -LOWEST } else { 1e4 };
    let rest: f64 = attention.terms.iter().filter(|term| !infinite(term)).map(|term| bias::bound(m, term)).sum();
    if attention.terms.iter().any(infinite) {
        // There 0 is what the weights of such a query become.
        let zeroed = attention.zeroes_nan && rest < limit;
        m.require(zeroed, "a query all of whose keys are masked is not a number, and 0 in ONNX Runtime's Attention")?;
        return Ok(Lowest { hidden: f64::NEG_INFINITY, clamps: false });
    }
    let finite = !bias::may_be_infinite(m, &attention.terms, attention.elem);
    m.require(
        rest < limit || (float && finite),
        "a mask may hold the lowest number or less, which ONNX Runtime's Attention takes for a key that is not there",
    )?;
    let added = attention.terms.iter().filter(|term| term.kind == TermKind::Added);
    Ok(Lowest { hidden: LOWEST, clamps: added.map(|term| bias::bound(m, term)).sum::<f64>() >= limit })
}
