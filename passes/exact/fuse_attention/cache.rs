//! Keys and values of earlier positions: what a decoder is given as past and returns as present.

use super::{
    Attention,
    heads::{Heads, Role},
    product::Operand,
    walk::made_by,
};
use crate::{Match, Refusal};
use lathe_analysis::upstream;
use lathe_ir::{Patch, Use, ValueId};

/// The caches of an attention and what is added to them.
pub(super) struct Cache {
    /// Earlier keys and values by heads.
    pub past: [ValueId; 2],
    /// New keys and values side by side.
    pub new: [ValueId; 2],
    /// Both together, which the operator returns.
    pub present: [ValueId; 2],
}

/// One part of a cache.
struct Part {
    past: ValueId,
    new: Heads,
    present: ValueId,
}

/// Keys or values that are those of a cache and new ones behind, and that the model returns: without that the operator
/// would not put them together.
fn part(m: &Match, heads: &Heads) -> Option<Part> {
    let returned = m.graph().value(heads.value).uses().iter().any(|u| matches!(u, Use::Output(..)));
    let concat = made_by(m, heads.value, "Concat").filter(|_| returned && heads.perm.is_sorted())?;
    let [Some(past), Some(new)] = *concat.inputs() else { return None };
    let axis = concat.int("axis")?;
    let operand = Operand { value: new, perm: (0..4).collect() };
    let new = Heads::read(m, &operand, Role::Values, &heads.lead).ok()?;
    let fits = (axis == 2 || axis == -2) && m.facts().ndim(past) == Some(4) && new.lead == heads.lead;
    fits.then_some(Part { past, new, present: heads.value })
}

/// The caches of an attention, if the operator can take and return them.
pub(super) fn cache(m: &Match, g: &mut Patch, attention: &Attention) -> Result<Option<Cache>, Refusal> {
    let (k, v) = (&attention.k, &attention.v);
    if attention.lead.len() != 2 || k.size != v.size || attention.sink.is_some() || k.value == v.value {
        return Ok(None);
    }
    let (Some(keys), Some(values)) = (part(m, k), part(m, v)) else { return Ok(None) };
    if keys.new.length != values.new.length {
        return Ok(None);
    }
    let present = [keys.present, values.present];
    let mut reads = g.reads();
    reads.extend([keys.new.value, values.new.value, keys.past, values.past]);
    if comes_before(m, present, reads) {
        return Ok(None);
    }
    let new = [keys.new.joined(m, g)?, values.new.joined(m, g)?];
    Ok(Some(Cache { past: [keys.past, values.past], new, present }))
}

/// Whether anything that `reads` are computed from uses the values `present`, so that they cannot come behind.
fn comes_before(m: &Match, present: [ValueId; 2], reads: Vec<ValueId>) -> bool {
    let graph = m.graph();
    let before = upstream(graph, reads.iter().copied());
    present.iter().any(|value| {
        let uses = graph.value(*value).uses();
        reads.contains(value) || uses.iter().any(|u| matches!(u, Use::Node(id, _) if before.contains(*id)))
    })
}
