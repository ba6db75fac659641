//! Merges the Slices that tile an axis of one tensor into one Split.

use crate::{Editor, Error, Info, Kind, Outcome, Pass, PassContext, Saving, edit_graphs, operands::slice_ranges};
use lathe_analysis::Facts;
use lathe_ir::{Graph, Model, Node, NodeId, Tensor, Use, ValueId, imported};
use std::collections::{BTreeMap, BTreeSet};

/// See [`INFO`].
pub struct MergeSlices;

static INFO: Info = Info {
    name: "merge-slices",
    summary: "merges the Slices that tile an axis of one tensor into one Split",
    doc: "Slices of one tensor that together take an axis of known size, each element once and in steps of 1, become \
          the outputs of one Split. Declines where a part is missing or taken twice.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for MergeSlices {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        edit_graphs(model, cx, merge)
    }
}

/// One Slice over one axis: where it begins and ends, and its node.
type Part = (i64, i64, NodeId);

fn merge(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, .. } = editor;
    let sliced: BTreeSet<ValueId> = graph
        .all_nodes()
        .into_iter()
        .map(|id| graph.node(id))
        .filter(|n| n.is("Slice"))
        .filter_map(|n| n.input(0))
        .collect();
    let several = |v: &ValueId| graph.value(*v).uses().len() > 1;
    let sliced: Vec<ValueId> = sliced.into_iter().filter(several).collect();
    if sliced.is_empty() {
        return Ok(());
    }
    let mut facts = editor.context.facts.take(graph, opsets, functions);
    let mut changed = false;
    for x in sliced {
        for (axis, size, parts) in candidates(editor.graph, &facts, x) {
            match tiles(&parts, size) {
                Ok(()) => {
                    split(editor, &mut facts, x, axis, &parts);
                    changed = true;
                }
                Err(reason) => editor.outcome.refuse(reason, editor.graph.describe(parts[0].2)),
            }
        }
    }
    if changed {
        editor.graph.sort()?;
    }
    editor.context.facts.keep(editor.graph, facts);
    Ok(())
}

/// The Slices of `x` over one axis of known size, by scope and axis, in order of where they begin.
fn candidates(graph: &Graph, facts: &Facts, x: ValueId) -> Vec<(usize, i64, Vec<Part>)> {
    let Some(shape) = facts.shape(x) else { return Vec::new() };
    let mut groups: BTreeMap<_, Vec<Part>> = BTreeMap::new();
    for place in graph.value(x).uses() {
        let Use::Node(id, 0) = place else { continue };
        let node = graph.node(*id);
        let passed = |a: &lathe_ir::Attribute| matches!(a.value, lathe_ir::AttributeValue::Reference { .. });
        if !node.is("Slice") || node.attributes.iter().any(passed) {
            continue;
        }
        let Ok(ranges) = slice_ranges(graph, facts, node, shape.len()) else { continue };
        let [range] = ranges.as_slice() else { continue };
        let Some(size) = shape[range.axis].as_known().filter(|_| range.step == 1) else { continue };
        let from_front = |at: i64| if at < 0 { at.saturating_add(size) } else { at }.clamp(0, size);
        let part = (from_front(range.start), from_front(range.end), *id);
        groups.entry((node.scope(), range.axis, size)).or_default().push(part);
    }
    let several = groups.into_iter().filter(|(_, parts)| parts.len() > 1);
    let sorted = several.map(|((_, axis, size), mut parts)| {
        parts.sort_unstable();
        (axis, size, parts)
    });
    sorted.collect()
}

fn tiles(parts: &[Part], size: i64) -> Result<(), &'static str> {
    let mut at = 0;
    for &(start, end, _) in parts {
        if start < at {
            return Err("the Slices of a tensor overlap");
        }
        if start > at || end <= start {
            return Err("the Slices of a tensor leave elements out");
        }
        at = end;
    }
    if at == size { Ok(()) } else { Err("the Slices of a tensor leave elements out") }
}

/// Puts a Split in the place of the Slices that tile `axis` of `x`.
fn split(editor: &mut Editor, facts: &mut Facts, x: ValueId, axis: usize, parts: &[Part]) {
    let Editor { graph, opsets, functions, outcome, .. } = editor;
    let first = parts[0].2;
    let (scope, place) = (graph.node(first).scope(), graph.describe(first));
    let sizes: Vec<i64> = parts.iter().map(|(start, end, _)| end - start).collect();
    let mut node = Node::new("Split").with("axis", axis as i64);
    node.name = graph.node(first).name.clone();
    let mut inputs = vec![Some(x)];
    if imported(opsets, "").unwrap_or(0) >= 13 {
        let base = format!("{}_sizes", graph.value(x).name);
        inputs.push(Some(graph.add_initializer(scope, &base, Tensor::int64s(&sizes))));
    } else {
        node = node.with("split", sizes);
    }
    let made: Vec<ValueId> = parts
        .iter()
        .map(|_| {
            let name = graph.fresh_name("part");
            graph.add_value(name, None)
        })
        .collect();
    let id = graph.add_node(scope, node, inputs, made.iter().map(|&v| Some(v)).collect());
    facts.update(graph, opsets, functions, id);
    for (&(_, _, slice), &new) in parts.iter().zip(&made) {
        let Some(old) = graph.node(slice).output(0) else { continue };
        facts.inherit(new, old);
        graph.replace(old, new);
        graph.remove_unused(vec![slice]);
    }
    outcome.change("slices-to-split", place);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn splits_what_three_slices_tile() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (float[n,1,6] x) => (float[n,1,2] a, float[n,1,3] y)
               <int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] i5 = {5}, int64[1] back = {-1}, int64[1] far = {9223372036854775807}> {
                a = Slice (x, i0, i2, back)
                b = Slice (x, i2, i5, i2)
                c = Slice (x, back, far, i2)
                y = Add (b, c)
            }";
        insta::assert_snapshot!(check(&MergeSlices, graph), @"
        g (float[n,1,6] x) => (float[n,1,2] a, float[n,1,3] y) <
            int64[1] i0 = {0},
            int64[1] i2 = {2},
            int64[1] i5 = {5},
            int64[1] back = {-1},
            int64[1] far = {9223372036854775807},
            int64[3] x_sizes = {2, 3, 1}
        > {
            a, b, c = Split <axis = 2> (x, x_sizes)  # float[n,1,2], ?, ?
            y = Add (b, c)  # float[n,1,3]
        }
        ");
    }

    #[test]
    fn writes_sizes_as_opset_11_wants_them_in_a_branch() {
        let graph = "<ir_version: 7, opset_import: [\"\" : 11]>
            g (bool c, float[n,4] x) => (float[n,2] y) <int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i4 = {4}> {
                y = If (c) <then_branch = yes () => (float[n,2] p) {
                    a = Slice (x, i0, i2, i1)
                    b = Slice (x, i2, i4, i1)
                    p = Mul (a, b)
                }, else_branch = no () => (float[n,2] q) { q = Slice (x, i0, i2, i1) }>
            }";
        insta::assert_snapshot!(check(&MergeSlices, graph), @"
        g (bool c, float[n,4] x) => (float[n,2] y) <
            int64[1] i0 = {0},
            int64[1] i1 = {1},
            int64[1] i2 = {2},
            int64[1] i4 = {4}
        > {
            y = If (c) <then_branch = yes () => (float[n,2] p) {
                a, b = Split <axis = 1, split = [2, 2]> (x)
                p = Mul (a, b)  # float[n,2]
            }, else_branch = no () => (float[n,2] q) {
                q = Slice (x, i0, i2, i1)  # float[n,2]
            }>  # float[n,2]
        }
        ");
    }

    #[test]
    fn keeps_slices_that_leave_elements_out() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (float[n,6] x) => (float[n,2] a, float[n,2] b) <int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i4 = {4}> {
                a = Slice (x, i0, i2, i1)
                b = Slice (x, i2, i4, i1)
            }";
        check_refuses(&MergeSlices, graph, "the Slices of a tensor leave elements out");
    }

    #[test]
    fn keeps_slices_that_overlap() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (float[n,4] x) => (float[n,3] a, float[n,3] b) <int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i3 = {3}, int64[1] i4 = {4}> {
                a = Slice (x, i0, i3, i1)
                b = Slice (x, i1, i4, i1)
            }";
        check_refuses(&MergeSlices, graph, "the Slices of a tensor overlap");
    }
}
