//! Whether two subgraphs compute the same thing from the same values.

use crate::exact::constant_of;
use lathe_ir::{AttributeValue, Graph, ScopeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// What a value of a subgraph is, seen through copies.
pub(crate) enum Operand {
    /// A value of a graph around the subgraph.
    Outer(ValueId),
    /// A constant.
    Constant(Tensor),
    /// Something that the subgraph computes.
    Inner(ValueId),
}

/// What `value`, as used in `scope`, is.
pub(crate) fn operand(graph: &Graph, value: ValueId, scope: ScopeId) -> Operand {
    let mut value = value;
    loop {
        if let Some(tensor) = graph.constant(value) {
            return Operand::Constant(tensor.clone());
        }
        if graph.scope_of(value).is_none_or(|s| !graph.is_within(s, scope)) {
            return Operand::Outer(value);
        }
        let Some(node) = graph.producer(value).map(|p| graph.node(p)) else { return Operand::Inner(value) };
        if node.is("Constant") {
            return constant_of(node).map_or(Operand::Inner(value), Operand::Constant);
        }
        match node.input(0) {
            Some(input) if node.is("Identity") => value = input,
            _ => return Operand::Inner(value),
        }
    }
}

/// Whether two subgraphs hold the same nodes in the same order, reading the same values.
pub(crate) fn same_scopes(graph: &Graph, a: ScopeId, b: ScopeId) -> bool {
    same(graph, a, b, &mut BTreeMap::new())
}

fn same(graph: &Graph, a: ScopeId, b: ScopeId, map: &mut BTreeMap<ValueId, ValueId>) -> bool {
    let (left, right) = (graph.scope(a), graph.scope(b));
    if left.inputs().len() != right.inputs().len() || left.outputs().len() != right.outputs().len() {
        return false;
    }
    map.extend(left.inputs().iter().copied().zip(right.inputs().iter().copied()));
    let (mut ours, mut theirs) = (graph.nodes(a), graph.nodes(b));
    loop {
        let (x, y) = match (ours.next(), theirs.next()) {
            (Some(x), Some(y)) => (graph.node(x), graph.node(y)),
            (None, None) => break,
            _ => return false,
        };
        let alike = x.op_type == y.op_type
            && x.is_standard() == y.is_standard()
            && (x.is_standard() || x.domain == y.domain)
            && x.overload == y.overload
            && x.attributes.len() == y.attributes.len()
            && x.inputs().len() == y.inputs().len()
            && x.outputs().len() == y.outputs().len();
        if !alike || !x.inputs().iter().zip(y.inputs()).all(|(&p, &q)| same_value(graph, p, q, map)) {
            return false;
        }
        for attribute in &x.attributes {
            let Some(other) = y.attribute(&attribute.name) else { return false };
            let equal = match (&attribute.value, other) {
                (AttributeValue::Graph(p), AttributeValue::Graph(q)) => same(graph, *p, *q, map),
                (AttributeValue::Graphs(_), _) => false,
                (p, q) => same_attribute(p, q),
            };
            if !equal {
                return false;
            }
        }
        for (p, q) in x.outputs().iter().zip(y.outputs()) {
            match (p, q) {
                (Some(p), Some(q)) => _ = map.insert(*p, *q),
                (None, None) => {}
                _ => return false,
            }
        }
    }
    left.outputs().iter().zip(right.outputs()).all(|(&p, &q)| same_value(graph, Some(p), Some(q), map))
}

/// Equality bit by bit: 0 and −0 differ, and a NaN equals itself.
fn same_attribute(a: &AttributeValue, b: &AttributeValue) -> bool {
    use AttributeValue::{Float, Floats, Tensor};
    match (a, b) {
        (Float(x), Float(y)) => x.to_bits() == y.to_bits(),
        (Floats(x), Floats(y)) => x.iter().map(|v| v.to_bits()).eq(y.iter().map(|v| v.to_bits())),
        (Tensor(x), Tensor(y)) => x.same_bits(y),
        _ => a == b,
    }
}

fn same_value(graph: &Graph, a: Option<ValueId>, b: Option<ValueId>, map: &BTreeMap<ValueId, ValueId>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a == b };
    if let Some(mapped) = map.get(&a) {
        return *mapped == b;
    }
    match (graph.constant(a), graph.constant(b)) {
        (Some(x), Some(y)) => a == b || x.same_bits(y),
        _ => a == b,
    }
}
