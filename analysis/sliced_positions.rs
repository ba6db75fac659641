//! Positions that a model reads apart from their neighbours: a class token, the last token of a text.

use crate::Facts;
use lathe_ir::{Graph, Model, Node, ScopeId};
use std::collections::{BTreeMap, BTreeSet};

/// The positions of `[n, positions, …, features]` that some node picks alone, by how many positions there are. Counts
/// of positions that are not known, and first axes that are no samples, are left out.
pub fn read_apart(model: &Model, facts: &Facts) -> BTreeMap<usize, BTreeSet<usize>> {
    let graph = &model.graph;
    let mut found: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for id in graph.nodes(ScopeId::MAIN) {
        let node = graph.node(id);
        let Some(shape) = node.input(0).and_then(|data| facts.shape(data)) else { continue };
        let [samples, positions, _, ..] = shape else { continue };
        let Some(count) = positions.as_known().filter(|&count| count > 1 && samples.as_known().is_none()) else {
            continue;
        };
        let Some(position) = picked(graph, node) else { continue };
        let position = if position < 0 { position + count } else { position };
        if (0..count).contains(&position) {
            found.entry(count as usize).or_default().insert(position as usize);
        }
    }
    found
}

/// The one position of the second axis that a node gives, negative from the end.
fn picked(graph: &Graph, node: &Node) -> Option<i64> {
    let only = |index: usize| graph.constant(node.input(index)?)?.scalar_i64();
    if node.is("Gather") {
        return only(1).filter(|_| node.int("axis") == Some(1));
    }
    if !node.is("Slice") || only(3)? != 1 || node.input(4).is_some() && only(4)? != 1 {
        return None;
    }
    let (start, end) = (only(1)?, only(2)?);
    // The last one ends where the axis does.
    (end == start + 1 || start == -1 && end > 0).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn found(body: &str) -> Vec<(usize, Vec<usize>)> {
        let source = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 7, 4] x) => (float[n, 4] y) \
             <int64 first = {{0}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] last = {{-1}}, \
             int64[1] end = {{9223372036854775807}}> {{ {body} }}"
        );
        let model = text::parse(&source).unwrap();
        let apart = read_apart(&model, &Facts::infer(&model));
        apart.into_iter().map(|(count, at)| (count, at.into_iter().collect())).collect()
    }

    #[test]
    fn one_that_is_gathered_or_sliced_is_apart_and_a_part_is_not() {
        assert_eq!(found("y = Gather <axis = 1> (x, first)"), [(7, vec![0])]);
        assert_eq!(found("a = Slice (x, one, two, one) y = ReduceSum <keepdims = 0> (a, one)"), [(7, vec![1])]);
        assert_eq!(found("a = Slice (x, last, end, one) y = ReduceSum <keepdims = 0> (a, one)"), [(7, vec![6])]);
        assert_eq!(found("a = Slice (x, zero, two, one) y = ReduceSum <keepdims = 0> (a, one)"), []);
        assert_eq!(found("a = Slice (x, zero, one, two) y = ReduceSum <keepdims = 0> (a, one)"), []);
        assert_eq!(found("y = ReduceSum <keepdims = 0> (x, one)"), []);
    }
}
