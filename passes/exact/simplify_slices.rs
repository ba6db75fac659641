//! Composes Slices, Concats and Splits with one another, and Reduces with Squeezes.

use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Replacement, Rule, Saving,
    operands::{Range, int64s, slice, slice_ranges, sorted_axes},
    pat, rewrite, rule,
};
use lathe_analysis::DimExpr;
use lathe_ir::{Model, Node, Patch, Use, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct SimplifySlices;

static INFO: Info = Info {
    name: "simplify-slices",
    summary: "composes Slices, Concats and Splits, and Reduces with Squeezes",
    doc: "A Slice of a Slice becomes one Slice; a Concat of a Concat over the same axis takes its parts; a Concat of all parts of a Split in order is the \
          Split's input; a Slice of a Concat that takes exactly one part is that part; a Reduce followed by a Squeeze \
          or Unsqueeze of the reduced axes drops or keeps them itself. Declines where ranges are computed or sizes \
          are unknown, and where the value between two nodes has other uses.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for SimplifySlices {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("compose-slices", pat!(outer: Slice(inner: Slice(x, ..), ..)), compose_slices),
        rule("slice-of-concat", pat!(node: Slice(parts: Concat(_, ..), ..)), slice_of_concat).sharing(),
        rule("compose-concats", pat!(node: Concat(_, ..)), compose_concats),
        rule("concat-of-split", pat!(node: Concat(_, ..)), concat_of_split),
        rule(
            "reduce-then-squeeze",
            pat!(outer: Squeeze(inner: ReduceMean|ReduceSum|ReduceMax|ReduceMin|ReduceProd|ReduceL1|ReduceL2|ReduceLogSum|ReduceLogSumExp|ReduceSumSquare|ArgMax|ArgMin(x, ..), ..)),
            reduce_then_squeeze,
        ),
        rule(
            "reduce-then-unsqueeze",
            pat!(outer: Unsqueeze(inner: ReduceMean|ReduceSum|ReduceMax|ReduceMin|ReduceProd|ReduceL1|ReduceL2|ReduceLogSum|ReduceLogSumExp|ReduceSumSquare|ArgMax|ArgMin(x, ..), ..)),
            reduce_then_unsqueeze,
        ),
        rule("cast-of-shape", pat!(outer: Shape(inner: Cast(x))), |m, g| {
            let mut shape = Node::new("Shape");
            shape.attributes = m.node("outer").attributes.clone();
            Ok(g.node(shape, &[m.value("x")]))
        }),
    ]
}

fn compose_slices(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let ndim = m.ndim("x")?;
    let shape = m.shape("x")?;
    let mut ranges = slice_ranges(m.graph(), m.facts(), m.node("inner"), ndim)?;
    for outer in slice_ranges(m.graph(), m.facts(), m.node("outer"), ndim)? {
        match ranges.iter().position(|r| r.axis == outer.axis) {
            None => ranges.push(outer),
            Some(index) => {
                let size = shape[outer.axis].as_known();
                let joined = compose_ranges(ranges[index], outer, size);
                ranges[index] = joined.ok_or("the two ranges of one axis do not make one range")?;
            }
        }
    }
    ranges.sort_by_key(|range| range.axis);
    slice(m, g, m.value("x"), &ranges)
}

/// The range that takes `outer` of what `inner` takes, for any size of the axis or for `size`.
fn compose_ranges(inner: Range, outer: Range, size: Option<i64>) -> Option<Range> {
    if let Some(size) = size {
        let (first, step, count) = elements(inner, size)?;
        let (skip, outer_step, count) = elements(outer, count)?;
        let start = first.checked_add(skip.checked_mul(step)?)?;
        let step = step.checked_mul(outer_step)?;
        if count == 0 {
            return Some(Range { axis: inner.axis, start: 0, end: 0, step: 1 });
        }
        let end = start.checked_add(step.checked_mul(count)?)?;
        // Going down past the first element has no other name than a number below every size.
        return Some(Range { axis: inner.axis, start, end: if end < 0 { i64::MIN + 1 } else { end }, step });
    }
    let plain = |r: Range| r.step == 1 && r.start >= 0;
    if !plain(inner) || !plain(outer) || outer.end < 0 {
        return None;
    }
    let open = inner.end == i64::MAX || inner.end == i64::from(i32::MAX);
    if inner.end < 0 {
        return None;
    }
    let start = inner.start.checked_add(outer.start)?;
    let end = inner.start.saturating_add(outer.end);
    Some(Range { axis: inner.axis, start, end: if open { end } else { end.min(inner.end) }, step: 1 })
}

/// First element, step and number of elements that a range takes of `size`.
fn elements(range: Range, size: i64) -> Option<(i64, i64, i64)> {
    let from_front = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
    let (start, end) = (from_front(range.start), from_front(range.end));
    if range.step > 0 {
        let (start, end) = (start.clamp(0, size), end.clamp(0, size));
        let count = end.checked_sub(start)?.max(0);
        Some((start, range.step, count.checked_add(range.step.checked_sub(1)?)? / range.step))
    } else {
        // ONNX Runtime reads an end this far out as "down to the first".
        if range.end >= i64::from(i32::MAX) {
            return None;
        }
        let (start, end) = (start.clamp((size - 1).min(0), size - 1), end.clamp(-1, size - 1));
        let (count, step) = (start.checked_sub(end)?.max(0), range.step.checked_neg()?);
        Some((start, range.step, count.checked_add(step.checked_sub(1)?)? / step))
    }
}

/// A `Slice` over one axis that takes exactly one part of a `Concat` over that axis, or several in a row.
fn slice_of_concat(m: &Match, _: &mut Patch) -> Result<ValueId, Refusal> {
    let shape = m.facts().shape(m.made("parts")).ok_or("the number of axes is unknown")?;
    let axis = m.axis(m.node("parts").int("axis").unwrap_or(1), shape.len())?;
    let ranges = slice_ranges(m.graph(), m.facts(), m.node("node"), shape.len())?;
    m.only_if(ranges.len() == 1 && ranges[0].axis == axis && ranges[0].step == 1)?;
    let end = ranges[0].end;
    let total = shape[axis].as_known();
    let from_front = |at: i64| match (at < 0, total) {
        (false, _) => Some(at),
        (true, Some(total)) => Some((at + total).max(0)),
        (true, None) => None,
    };
    let start = from_front(ranges[0].start).ok_or("the range counts from an unknown end")?;
    let mut at = DimExpr::from(0);
    let parts: Vec<ValueId> = m.node("parts").inputs().iter().flatten().copied().collect();
    for (index, &part) in parts.iter().enumerate() {
        let size = m.facts().shape(part).map(|shape| &shape[axis]).ok_or("the size of a part is unknown")?;
        let next = at.plus(size).ok_or("the size of a part is unknown")?;
        if at.as_known() == Some(start) {
            let last = index + 1 == parts.len() && (end == i64::MAX || end == i64::from(i32::MAX));
            let ends = from_front(end).map(|end| total.map_or(end, |total| end.min(total)));
            m.only_if(last || ends.is_some_and(|end| next.as_known() == Some(end)))?;
            m.require_free(m.value("output"), part)?;
            return Ok(part);
        }
        at = next;
    }
    Err(Refusal::NoMatch)
}

/// Takes the parts of inner `Concat`s that nothing else uses.
fn compose_concats(m: &Match, g: &mut Patch) -> Result<Replacement, Refusal> {
    let (graph, node) = (m.graph(), m.node("node"));
    let ndim = m.ndim("output").map_err(|_| Refusal::NoMatch)?;
    let axis = m.axis(node.int("axis").unwrap_or(1), ndim)?;
    let inner = |v: ValueId| {
        let producer = graph.node(graph.producer(v)?);
        let same = producer.is("Concat") && producer.scope() == node.scope();
        let same = same && m.axis(producer.int("axis").unwrap_or(1), ndim) == Ok(axis);
        let uses = graph.value(v).uses();
        let private = uses.iter().all(|u| matches!(u, Use::Node(id, _) if *id == m.root()));
        // Taking the parts twice would copy them twice, as before; only one use keeps it simple.
        (same && private && uses.len() == 1).then(|| producer.inputs())
    };
    let mut parts = Vec::new();
    let mut composed = false;
    for value in node.inputs().iter().flatten() {
        match inner(*value) {
            Some(more) => {
                composed = true;
                parts.extend(more);
            }
            None => parts.push(Some(*value)),
        }
    }
    m.only_if(composed)?;
    Ok(g.node_with(Node::new("Concat").with("axis", axis as i64), &parts, 1).into())
}

/// A `Concat` of every part of a `Split` in order, over the axis that was split.
fn concat_of_split(m: &Match, _: &mut Patch) -> Result<ValueId, Refusal> {
    let (graph, node) = (m.graph(), m.node("node"));
    let first = node.input(0).and_then(|v| graph.producer(v)).ok_or(Refusal::NoMatch)?;
    let split = graph.node(first);
    m.only_if(split.is("Split") && split.outputs() == node.inputs())?;
    let whole = split.input(0).ok_or(Refusal::NoMatch)?;
    let ndim = m.facts().ndim(whole).ok_or("the number of axes is unknown")?;
    let (a, b) = (m.axis(split.int("axis").unwrap_or(0), ndim)?, m.axis(node.int("axis").unwrap_or(1), ndim)?);
    m.require(a == b, "the parts are joined over another axis than they were split")?;
    m.require_free(m.value("output"), whole)?;
    Ok(whole)
}

/// The `Reduce` of a pattern with its axes, counted from the front of `x`.
fn reduction(m: &Match) -> Result<(Node, Vec<usize>), Refusal> {
    let ndim = m.ndim("x")?;
    let inner = m.node("inner");
    let axes = if matches!(inner.op_type.as_str(), "ArgMax" | "ArgMin") {
        vec![m.axis(inner.int("axis").unwrap_or(0), ndim)?]
    } else {
        let axes = int64s(m, inner, "axes", 1)?.filter(|axes| !axes.is_empty());
        m.require(inner.int("noop_with_empty_axes").unwrap_or(0) == 0 || axes.is_some(), "nothing is reduced")?;
        sorted_axes(m, &axes.unwrap_or_else(|| (0..ndim as i64).collect()), ndim)?
    };
    let mut node = Node::new(inner.op_type.clone());
    node.attributes = inner.attributes.clone();
    Ok((node, axes))
}

fn reduce_then_squeeze(m: &Match, g: &mut Patch) -> Result<Replacement, Refusal> {
    let (mut node, axes) = reduction(m)?;
    m.only_if(node.int("keepdims").unwrap_or(1) == 1)?;
    let squeezed = int64s(m, m.node("outer"), "axes", 1)?.ok_or("the Squeeze states no axes")?;
    m.only_if(sorted_axes(m, &squeezed, m.ndim("x")?)? == axes)?;
    node.set_attribute("keepdims", 0);
    Ok(g.node_with(node, m.node("inner").inputs(), 1).into())
}

fn reduce_then_unsqueeze(m: &Match, g: &mut Patch) -> Result<Replacement, Refusal> {
    let (mut node, axes) = reduction(m)?;
    m.only_if(node.int("keepdims").unwrap_or(1) == 0)?;
    let added = int64s(m, m.node("outer"), "axes", 1)?.ok_or(Refusal::NoMatch)?;
    m.only_if(added.len() == axes.len() && sorted_axes(m, &added, m.ndim("x")?)? == axes)?;
    node.set_attribute("keepdims", 1);
    Ok(g.node_with(node, m.node("inner").inputs(), 1).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn composes_four_slices() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[n,130,t] x) => (float[n,65,u] y)
               <int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i65 = {65}, int64[1] far = {9223372036854775807}> {
                a = Slice (x, i0, far, i0, i1)
                b = Slice (a, i65, far, i1, i1)
                c = Slice (b, i1, far, i2, i1)
                y = Slice (c, i2, far, i2, i1)
            }";
        insta::assert_snapshot!(check(&SimplifySlices, graph), @"
        g (float[n,130,t] x) => (float[n,65,u] y) <
            int64[1] i0 = {0},
            int64[1] i1 = {1},
            int64[1] i2 = {2},
            int64[1] i65 = {65},
            int64[1] far = {9223372036854775807},
            int64[2] b_starts = {0, 65},
            int64[2] b_ends = {9223372036854775807, 9223372036854775807},
            int64[2] b_axes = {0, 1},
            int64[3] c_starts = {0, 65, 1},
            int64[3] c_ends = {9223372036854775807, 9223372036854775807, 9223372036854775807},
            int64[3] c_axes = {0, 1, 2},
            int64[3] y_starts = {0, 65, 3},
            int64[3] y_ends = {9223372036854775807, 9223372036854775807, 9223372036854775807},
            int64[3] y_axes = {0, 1, 2}
        > {
            y = Slice (x, y_starts, y_ends, y_axes)  # float[n,65,u]
        }
        ");
    }

    #[test]
    fn composes_steps_of_a_known_axis() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[9] x) => (float[u] y)
               <int64[1] a = {-1}, int64[1] b = {-100}, int64[1] zero = {0}, int64[1] back = {-2}, int64[1] one = {1}, int64[1] four = {4}> {
                s = Slice (x, a, b, zero, back)
                y = Slice (s, one, four, zero)
            }";
        insta::assert_snapshot!(check(&SimplifySlices, graph), @"
        g (float[9] x) => (float[u] y) <
            int64[1] a = {-1},
            int64[1] b = {-100},
            int64[1] zero = {0},
            int64[1] back = {-2},
            int64[1] one = {1},
            int64[1] four = {4},
            int64[1] y_starts = {6},
            int64[1] y_ends = {0},
            int64[1] y_axes = {0},
            int64[1] y_steps = {-2}
        > {
            y = Slice (x, y_starts, y_ends, y_axes, y_steps)  # float[u]
        }
        ");
    }

    #[test]
    fn keeps_a_range_that_counts_from_an_unknown_end() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[n] x) => (float[u] y) <int64[1] one = {1}, int64[1] last = {-1}, int64[1] zero = {0}> {
                s = Slice (x, one, last, zero)
                y = Slice (s, one, last, zero)
            }";
        check_refuses(&SimplifySlices, graph, "the two ranges of one axis do not make one range");
    }

    #[test]
    fn finds_the_part_that_a_slice_takes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[n,3] x, float[n,5] z) => (float[n,5] y) <int64[1] three = {3}, int64[1] far = {2147483647}, int64[1] one = {1}> {
                a = Neg (x)
                b = Neg (z)
                c = Concat <axis = 1> (a, b)
                s = Slice (c, three, far, one)
                y = Abs (s)
            }";
        insta::assert_snapshot!(check(&SimplifySlices, graph), @"
        g (float[n,3] x, float[n,5] z) => (float[n,5] y) <
            int64[1] three = {3},
            int64[1] far = {2147483647},
            int64[1] one = {1}
        > {
            b = Neg (z)
            y = Abs (b)  # float[n,5]
        }
        ");
    }

    #[test]
    fn composes_concats_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (bool c, float[n,3] x) => (float[n,9] y) {
                y = If (c) <then_branch = yes () => (float[n,9] p) {
                    a = Concat <axis = 1> (x, x)
                    p = Concat <axis = -1> (a, x)
                }, else_branch = no () => (float[n,9] q) { q = Concat <axis = 1> (x, x, x) }>
            }";
        insta::assert_snapshot!(check(&SimplifySlices, graph), @"
        g (bool c, float[n,3] x) => (float[n,9] y) {
            y = If (c) <then_branch = yes () => (p_1) {
                p_1 = Concat <axis = 1> (x, x, x)
            }, else_branch = no () => (float[n,9] q) {
                q = Concat <axis = 1> (x, x, x)  # float[n,9]
            }>  # float[n,9]
        }
        ");
    }

    #[test]
    fn undoes_a_split() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[n,6] x) => (float[n,6] y) <int64[2] sizes = {2, 4}> {
                r = Relu (x)
                a, b = Split <axis = 1> (r, sizes)
                c = Concat <axis = -1> (a, b)
                y = Neg (c)
            }";
        insta::assert_snapshot!(check(&SimplifySlices, graph), @"
        g (float[n,6] x) => (float[n,6] y) <
            int64[2] sizes = {2, 4}
        > {
            r = Relu (x)
            y = Neg (r)  # float[n,6]
        }
        ");
    }

    #[test]
    fn keeps_parts_joined_over_another_axis() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[2,6] x) => (float[4,3] y) <int64[2] sizes = {3, 3}> {
                a, b = Split <axis = 1> (x, sizes)
                y = Concat <axis = 0> (a, b)
            }";
        check_refuses(&SimplifySlices, graph, "the parts are joined over another axis than they were split");
    }

    #[test]
    fn reduces_without_the_axis_that_is_squeezed() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[n,3,4] x) => (float[n] y, float[1,n,1] z) <int64[2] axes = {1, 2}, int64[2] ends = {0, 2}> {
                r = ReduceMean <axes = [-1, 1]> (x)
                y = Squeeze (r, axes)
                m = Transpose <perm = [1, 0, 2]> (x)
                s = ReduceMax <axes = [0, 2], keepdims = 0> (m)
                w = Unsqueeze (s, ends)
                z = Neg (w)
            }";
        insta::assert_snapshot!(check(&SimplifySlices, graph), @"
        g (float[n,3,4] x) => (float[n] y, float[1,n,1] z) <
            int64[2] axes = {1, 2},
            int64[2] ends = {0, 2}
        > {
            m = Transpose <perm = [1, 0, 2]> (x)
            w = ReduceMax <axes = [0, 2], keepdims = 1> (m)
            z = Neg (w)  # float[1,n,1]
            y = ReduceMean <axes = [-1, 1], keepdims = 0> (x)  # float[n]
        }
        ");
    }

    #[test]
    fn keeps_a_slice_whose_tensor_is_an_output() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 16]>
            g (float[9] x) => (float[u] s, float[v] y) <int64[1] one = {1}, int64[1] four = {4}, int64[1] zero = {0}> {
                s = Slice (x, one, four, zero)
                y = Slice (s, one, four, zero)
            }";
        check_refuses(&SimplifySlices, graph, "an inner value is a graph output");
    }

    #[test]
    fn keeps_ranges_and_axes_that_are_not_known() {
        let refuses = |graph: &str, reason: &str| {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 16, \"custom\" : 1]> g (float[n,3] x, float[m,3] z, int64[1] to) {graph}"
            );
            check_refuses(&SimplifySlices, &graph, reason);
        };
        let ends = "<int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] last = {-1}, int64[1] far = {9223372036854775807}>";
        let joined = "a = Neg (x) b = Neg (z) c = Concat <axis = 0> (a, b)";
        refuses(
            &format!("=> (float[p,3] y) {ends} {{ {joined} y = Slice (c, last, far, i0) }}"),
            "the range counts from an unknown end",
        );
        refuses(
            &format!("=> (float[p,3] y) {ends} {{ {joined} y = Slice (c, i0, to, i0) }}"),
            "the ends of a Slice are computed",
        );
        let parts = "f = custom.F (x) a = Concat <axis = 0> (f, x)";
        refuses(
            &format!("=> (float[p,3] y) {ends} {{ {parts} y = Slice (a, i0, i1, i0) }}"),
            "the size of a part is unknown",
        );
        let unknown = "f = custom.F (x) a = Concat <axis = 0> (f, f)";
        refuses(
            &format!("=> (float[p,3] y) {ends} {{ {unknown} y = Slice (a, i0, i1, i0) }}"),
            "the number of axes is unknown",
        );
        let split = "f = custom.F (x) a, b = Split <axis = 0> (f) y = Concat <axis = 0> (a, b)";
        refuses(&format!("=> (float[p,3] y) {{ {split} }}"), "the number of axes is unknown");
        let far = "a, b = Split <axis = 5> (x) y = Concat <axis = 0> (a, b)";
        refuses(&format!("=> (float[p,3] y) {{ {far} }}"), "axis 5 is outside 2 axes");
        let idle = "<int64[0] none = {}, int64[1] i0 = {0}> { r = ReduceSum <noop_with_empty_axes = 1> (x, none) y = Squeeze (r, i0) }";
        refuses(&format!("=> (float[p,3] y) {idle}"), "nothing is reduced");
        refuses("=> (float y) { r = ReduceMax (x) y = Squeeze (r) }", "the Squeeze states no axes");
        let twice = "<int64[2] i00 = {0, 0}, int64[1] i0 = {0}> { r = ReduceSum (x, i00) y = Squeeze (r, i0) }";
        refuses(&format!("=> (float[p] y) {twice}"), "an axis is given twice");
    }

    #[test]
    fn keeps_slices_whose_operands_do_not_fit() {
        let refuses = |weights: &str, second: &str, reason: &str| {
            let graph = format!("<ir_version: 8, opset_import: [\"\" : 16]> g (float[4,4] x) => (float[a,b] y)
                <int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, {weights}> {{ s = Slice (x, i0, i2, i0) {second} }}");
            check_refuses(&SimplifySlices, &graph, reason);
        };
        refuses("int64[2] two = {0, 1}", "y = Slice (s, two, i2, i1)", "a Slice has operands that do not fit together");
        refuses(
            "int64[1] step = {0}",
            "y = Slice (s, i0, i2, i1, step)",
            "a Slice has operands that do not fit together",
        );
        refuses("int64[1] five = {5}", "y = Slice (s, i0, i2, five)", "a Slice has an axis out of range");
        let old = "<ir_version: 3, opset_import: [\"\" : 9]> g (float[4,4] x) => (float[a,b] y) { s = Slice <starts = [0], ends = [2]> (x) y = Slice <ends = [1]> (s) }";
        check_refuses(&SimplifySlices, old, "a Slice has no starts");
        let old = old.replace("ends = [1]", "starts = [1]");
        check_refuses(&SimplifySlices, &old, "a Slice has no ends");
        let typed = old.replace("<starts = [1]>", "<starts = 1.5, ends = [1]>");
        check_refuses(&SimplifySlices, &typed, "the starts of a Slice are of an unexpected type");
        let stepped = old.replace("<starts = [1]>", "<starts = [0], ends = [2], axes = [1], steps = [2]>");
        check_refuses(&SimplifySlices, &stepped, "before opset 10 a Slice has no steps");
    }

    #[test]
    fn keeps_parts_and_reductions_of_other_axes() {
        let keeps = |inputs: &str, body: &str| {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g ({inputs}) => (float[] y)
                <int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] i3 = {{3}}> {{ {body} }}"
            );
            crate::testing::check_untouched(&SimplifySlices, &graph);
        };
        let parts = "a = Neg (x) b = Abs (x) c = Concat <axis = 0> (a, b)";
        keeps("float[2,3] x", &format!("{parts} y = Slice (c, i0, i2, i1)"));
        keeps("float[2,3] x", &format!("{parts} y = Slice (c, i0, i2, i0, i2)"));
        keeps("float[2,3] x", &format!("{parts} y = Slice (c, i0, i3, i0)"));
        keeps("float[2,3] x", &format!("{parts} y = Slice (c, i1, i3, i0)"));
        keeps("float[1,3,1] x", "r = ReduceSum <keepdims = 0> (x, i1) y = Squeeze (r, i1)");
        keeps("float[1,3,2] x", "r = ReduceSum (x, i1) y = Squeeze (r, i0)");
        keeps("float[2,3] x", "r = ReduceSum (x, i1) y = Unsqueeze (r, i1)");
        keeps("float[2,3] x", "r = ReduceSum <keepdims = 0> (x, i1) y = Unsqueeze (r, i0)");
    }
}
