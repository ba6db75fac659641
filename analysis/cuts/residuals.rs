//! Sums of a stream and of something computed from it.

use super::{Residual, is_latent, place, skips};
use crate::{
    Cones, Facts, UnitKind,
    units::{
        flow::Flow,
        kind::{self, is_layer, is_layout, is_projection},
    },
};
use lathe_ir::{NodeId, ValueId};

/// How many nodes a shortcut that changes the stream may have.
const MAX_SHORTCUT: usize = 8;
/// How many nodes may stand between an arm and its gate.
const MAX_GATE_STEPS: usize = 6;

/// The residual sums that lie on the way from the latent to the output, in the order they are computed.
///
/// On the `trunk` the shortcut may also be a projection of the stream.
pub(super) fn find(flow: &Flow, facts: &Facts, cones: &Cones, trunk: &[ValueId]) -> Vec<Residual> {
    let count = flow.order.len();
    let mut walk = skips::Walk { flow, seen: vec![0; count], mark: 0, work: skips::allowance(flow) };
    let mut found: Vec<Residual> = Vec::new();
    for (at, &id) in flow.order.iter().enumerate().filter(|(at, _)| flow.needed[*at]) {
        let Some((members, sum, _)) = kind::sum_of(flow.graph.node(id)) else { continue };
        let &[a, b] = members.as_slice() else { continue };
        let fits = flow.reads[at].contains(&a) && flow.reads[at].contains(&b) && alike(facts, a, b);
        if a == b || !fits || !(is_latent(cones, a) || is_latent(cones, b)) {
            continue;
        }
        let (stream, arm) = if place(flow, a) <= place(flow, b) { (a, b) } else { (b, a) };
        let plain = walk.between(stream, arm).map(|places| (stream, stream, arm, places));
        let Some((stream, shortcut, arm, places)) = plain.or_else(|| projected(flow, &mut walk, trunk, sum, [a, b]))
        else {
            continue;
        };
        if !places.iter().any(|&at| is_layer(flow.graph.node(flow.order[at]))) {
            continue;
        }
        let nodes: Vec<NodeId> = places.iter().map(|&at| flow.order[at]).collect();
        let holds = found.iter().rev().take_while(|r| place(flow, r.sum) > places[0]);
        let inside = |r: &Residual| flow.place_of(r.join).is_some_and(|at| places.binary_search(&at).is_ok());
        let kind = match holds.into_iter().any(inside) {
            true => UnitKind::Nested,
            false => kind::classify(flow, &places, |at| places.binary_search(&at).is_ok()),
        };
        let (ungated, gate) = gate(flow, cones, arm);
        found.push(Residual { join: id, sum, stream, shortcut, arm, ungated, gate, kind, nodes });
    }
    found
}

/// Whether two values are not known to differ in shape.
fn alike(facts: &Facts, a: ValueId, b: ValueId) -> bool {
    facts.same_shape(a, b) || facts.shape(a).is_none() || facts.shape(b).is_none()
}

/// Takes a sum of the trunk apart into a projection and an arm that both come from the trunk before it: stream,
/// shortcut, arm and the places of the arm.
fn projected(
    flow: &Flow,
    walk: &mut skips::Walk,
    trunk: &[ValueId],
    sum: ValueId,
    members: [ValueId; 2],
) -> Option<(ValueId, ValueId, ValueId, Vec<usize>)> {
    let at = trunk.iter().position(|&v| v == sum)?;
    let stream = *trunk[..at].last()?;
    let mut parts = members.map(|member| walk.between(stream, member).map(|places| (member, places)));
    parts.sort_by_key(|part| part.as_ref().map_or(0, |(_, places)| places.len()));
    let [Some((shortcut, few)), Some((arm, places))] = parts else { return None };
    let projects = few.iter().all(|&at| is_projection(flow.graph, flow.graph.node(flow.order[at])).0);
    (projects && few.len() <= MAX_SHORTCUT).then_some((stream, shortcut, arm, places))
}

/// The arm without its gate, and the gate: a factor that does not depend on the latent, but on time or conditions.
fn gate(flow: &Flow, cones: &Cones, arm: ValueId) -> (ValueId, Option<ValueId>) {
    let mut value = arm;
    for _ in 0..MAX_GATE_STEPS {
        let Some(at) = flow.made_at(value) else { break };
        let node = flow.graph.node(flow.order[at]);
        if let (true, Some(a), Some(b)) = (node.is("Mul"), node.input(0), node.input(1)) {
            let pair = [(a, b), (b, a)];
            let gated = pair.into_iter().find(|&(x, g)| is_latent(cones, x) && !is_latent(cones, g));
            let Some((inner, factor)) = gated else { break };
            if flow.reads[at].contains(&factor) {
                return (inner, Some(factor));
            }
            value = inner;
        } else if let (true, &[inner]) = (is_layout(node), flow.reads[at].as_slice()) {
            value = inner;
        } else {
            break;
        }
    }
    (arm, None)
}
