//! Takes elements without index arithmetic where the indices only count.

use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, operands::with_axes, pat, rewrite,
    rule,
};
use lathe_analysis::{Affine, Affines, DimExpr, product};
use lathe_ir::{Model, Node, Patch, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct SimplifyGathers;

static INFO: Info = Info {
    name: "simplify-gathers",
    summary: "replaces look-ups over a grid of positions by a Gather along an axis, or by nothing",
    doc: "Exported masks look up `mask[batch, key]` at a grid of indices that Range, Expand and Concat build, or by one \
          Gather from all its elements in a row. Where every \
          part of the grid counts from 0 along one axis of its own, the node only moves the axes of its data: it \
          becomes an Unsqueeze. A GatherND over one axis is a Gather. An axis that is provably as long as the grid is left alone, another one becomes a \
          Gather with the Range that the grid is made of. Declines where the parts do not count (in this order), and \
          where the grid has axes that repeat elements.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for SimplifyGathers {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

/// Constant grids with more elements than this are not looked at.
const LARGEST: usize = 1 << 20;

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("count-out", pat!(node: GatherND(data, grid)), count_out).sharing(),
        rule("count-out-flat", pat!(node: Gather(flat: Reshape|Flatten(x, ..), indices)), count_out_flat).sharing(),
        rule("gather-rows", pat!(node: GatherND(data, column: Unsqueeze(x, ..))), |m, g| {
            let column = m.node("column").output(0).and_then(|v| m.facts().shape(v)).ok_or(Refusal::NoMatch)?;
            m.only_if(m.node("node").int("batch_dims").unwrap_or(0) == 0 && column.last().is_some_and(is_one))?;
            // The indices are the column's where the axis that was added is its last.
            m.only_if(m.facts().shape(m.value("x")) == column.split_last().map(|(_, rows)| rows))?;
            Ok(g.node(Node::new("Gather").with("axis", 0), &[m.value("data"), m.value("x")]))
        })
        .sharing(),
        rule("gather-all", pat!(node: Gather(data, indices)), |m, _| {
            let (data, indices) = (m.shape("data").map_err(silent)?, m.shape("indices").map_err(silent)?);
            let axis = m.axis(m.node("node").int("axis").unwrap_or(0), data.len())?;
            let counting = Affines::new(m.graph(), m.facts()).of(m.value("indices"));
            m.only_if(indices == [data[axis].clone()] && counting == Some(Affine::counting()))?;
            m.require_replaceable("output", "data")?;
            Ok(m.value("data"))
        })
        .sharing(),
    ]
}

fn silent(_: Refusal) -> Refusal {
    Refusal::NoMatch
}

/// One index of a grid: how it counts, and the value that holds it if it is computed.
type Index = (Affine, Option<ValueId>);

/// The indices along the last axis of a grid, which is joined from them or constant.
fn indices(m: &Match, grid: ValueId, outer: usize) -> Result<Vec<Index>, Refusal> {
    const UNKNOWN: &str = "the indices do not count along an axis of the grid";
    if let Some(tensor) = m.graph().constant(grid).filter(|tensor| tensor.len() <= LARGEST) {
        let (elements, dims) = (tensor.to_i64s().ok_or(UNKNOWN)?, &tensor.dims()[..outer]);
        let each =
            |first: usize| elements.iter().skip(first).step_by(tensor.dims()[outer]).copied().collect::<Vec<_>>();
        let all = (0..tensor.dims()[outer]).map(|first| Ok((Affine::fit(&each(first), dims).ok_or(UNKNOWN)?, None)));
        return all.collect();
    }
    let node = m.graph().producer(grid).map(|id| m.graph().node(id)).filter(|node| node.is("Concat"));
    let node = node.ok_or("the indices are neither joined nor constant")?;
    let joined = m.axis(node.int("axis").unwrap_or(0), outer + 1)?;
    m.require(joined == outer, "the indices are not joined along their last axis")?;
    let affines = Affines::new(m.graph(), m.facts());
    let index = |part: ValueId| {
        let single = m.facts().shape(part).and_then(|shape| shape.last()?.as_known()) == Some(1);
        let mut affine = affines.of(part).filter(|_| single)?;
        affine.slopes.truncate(outer);
        Some((affine, Some(part)))
    };
    node.inputs().iter().flatten().map(|&part| index(part).ok_or_else(|| UNKNOWN.into())).collect()
}

/// `data[i₀, i₁, …]` over a grid in which `i₀` counts along one axis, `i₁` along a later one and so on.
fn count_out(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    m.only_if(m.node("node").int("batch_dims").unwrap_or(0) == 0)?;
    let data = m.shape("data")?;
    let [outer @ .., _] = m.shape("grid")? else { return Err(Refusal::NoMatch) };
    let indices = indices(m, m.value("grid"), outer.len())?;
    m.require(indices.len() <= data.len(), "there are more indices than axes")?;
    let mut axes: Vec<usize> = Vec::with_capacity(indices.len());
    for (affine, _) in &indices {
        // An axis of size 1 is counted along by 0 alone.
        let after = axes.last().map_or(0, |&last| last + 1);
        let along = |axis: usize, a: usize| affine.slopes[a].as_known() == Some(i64::from(a == axis));
        let counts = |axis: &usize| (0..outer.len()).all(|a| along(*axis, a) || is_one(&outer[a]));
        let place = (after..outer.len()).filter(|_| affine.offset.as_known() == Some(0)).find(counts);
        axes.push(
            place.ok_or(
                "the indices do not count along an axis of the grid, or in another order than the data's axes",
            )?,
        );
    }
    let others: Vec<usize> = (0..outer.len()).filter(|axis| !axes.contains(axis)).collect();
    m.require(others.iter().all(|&axis| is_one(&outer[axis])), "the grid has an axis along which it repeats elements")?;
    let mut taken = m.value("data");
    for (along, (&axis, (_, part))) in axes.iter().zip(&indices).enumerate() {
        if data[along] == outer[axis] {
            continue;
        }
        let range = match (part, outer[axis].as_known()) {
            (_, Some(length)) => g.int64s("positions", &(0..length).collect::<Vec<_>>()),
            (Some(part), None) => {
                range_behind(m, *part, &outer[axis]).ok_or("the indices are not made of one Range")?
            }
            (None, None) => return Err(Refusal::NoMatch),
        };
        taken = g.node(Node::new("Gather").with("axis", along as i64), &[taken, range]);
    }
    // Axes of size 1 take the places that no index counts along.
    if others.is_empty() {
        if !g.makes(taken) {
            m.require_free(m.value("output"), taken)?;
        }
        return Ok(taken);
    }
    Ok(with_axes(m, g, Node::new("Unsqueeze"), 13, taken, &others))
}

/// Rows of a tensor whose leading axes were made one, taken at `i₀ · stride₀ + i₁ · stride₁ + …` where each index counts
/// along one of those axes.
fn count_out_flat(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let grouped = m.node("flat").output(0).and_then(|v| m.facts().shape(v)).ok_or(Refusal::NoMatch)?;
    let (from, outer) = (m.shape("x").map_err(silent)?, m.shape("indices").map_err(silent)?);
    m.only_if(m.axis(m.node("node").int("axis").unwrap_or(0), grouped.len())? == 0)?;
    let (first, rest) = grouped.split_first().ok_or(Refusal::NoMatch)?;
    // How many axes became the first one. Flatten adds an axis of size 1 where none is left.
    let kept = |count: usize| from[count..] == *rest || count == from.len() && rest.iter().all(is_one);
    let merged = (2..=from.len()).find(|&count| product(&from[..count]).as_ref() == Some(first) && kept(count));
    let merged = merged.ok_or(Refusal::NoMatch)?;
    let affine = Affines::new(m.graph(), m.facts()).of(m.value("indices")).ok_or(Refusal::NoMatch)?;
    m.only_if(affine.offset.as_known() == Some(0))?;
    let mut axes: Vec<usize> = Vec::with_capacity(merged);
    for axis in 0..merged {
        let stride = product(&from[axis + 1..merged]).ok_or(Refusal::NoMatch)?;
        let counts = |&at: &usize| outer[at] == from[axis] && (affine.slopes[at] == stride || is_one(&outer[at]));
        let place = (axes.last().map_or(0, |&last| last + 1)..outer.len()).find(counts);
        axes.push(place.ok_or("the indices do not count along the axes that were made one")?);
    }
    let others: Vec<usize> = (0..outer.len()).filter(|axis| !axes.contains(axis)).collect();
    m.require(
        others.iter().all(|&axis| is_one(&outer[axis])),
        "the indices have an axis along which they repeat rows",
    )?;
    let added = if merged == from.len() { outer.len()..outer.len() + rest.len() } else { 0..0 };
    let places: Vec<usize> = others.into_iter().chain(added).collect();
    if places.is_empty() {
        m.require_free(m.value("output"), m.value("x"))?;
        return Ok(m.value("x"));
    }
    Ok(with_axes(m, g, Node::new("Unsqueeze"), 13, m.value("x"), &places))
}

fn is_one(size: &DimExpr) -> bool {
    size.as_known() == Some(1)
}

/// The one-dimensional tensor 0, 1, 2, … of this length that a part of the grid repeats.
fn range_behind(m: &Match, part: ValueId, length: &DimExpr) -> Option<ValueId> {
    let affines = Affines::new(m.graph(), m.facts());
    let mut at = part;
    loop {
        let counts = || affines.of(at) == Some(Affine::counting());
        if m.facts().shape(at)? == std::slice::from_ref(length) && counts() {
            return Some(at);
        }
        let node = m.graph().node(m.graph().producer(at)?);
        let repeats = ["Unsqueeze", "Squeeze", "Reshape", "Expand", "Identity", "Cast"].iter().any(|op| node.is(op));
        at = node.input(0).filter(|_| repeats)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    /// `mask[batch, key]` as vmap writes it: `[B, 1, 1, S]`.
    fn grid(mask: &str, first: &str, second: &str) -> String {
        format!(
            "<ir_version: 9, opset_import: [\"\" : 17]>
            g (int64[B,S] ids, bool[{mask}] mask) => (bool[B,1,1,S] y) <
                int64 zero = {{0}}, int64 one = {{1}}, int64[1] front = {{0}}, int64[3] a123 = {{1,2,3}}, int64[3] a012 = {{0,1,2}}, int64[1] last = {{-1}}
            > {{
                b1 = Shape <start = 0, end = 1> (ids)
                b = Squeeze (b1, front)
                s1 = Shape <start = 1, end = 2> (ids)
                s = Squeeze (s1, front)
                rows = Range (zero, b, one)
                keys = Range (zero, s, one)
                r4 = Unsqueeze (rows, a123)
                k4 = Unsqueeze (keys, a012)
                both = Max (r4, k4)
                to = Shape (both)
                r = Expand (r4, to)
                k = Expand (k4, to)
                r5 = Unsqueeze (r, last)
                k5 = Unsqueeze (k, last)
                grid = Concat <axis = -1> ({first}, {second})
                m = Not (mask)
                y = GatherND (m, grid)
            }}"
        )
    }

    #[test]
    fn a_mask_of_the_same_sizes_is_only_given_axes() {
        assert_snapshot!(check(&SimplifyGathers, &grid("B,S", "r5", "k5")), @"
        g (int64[B,S] ids, bool[B,S] mask) => (bool[B,1,1,S] y) <
            int64 zero = {0},
            int64 one = {1},
            int64[1] front = {0},
            int64[3] a123 = {1, 2, 3},
            int64[3] a012 = {0, 1, 2},
            int64[1] last = {-1},
            int64[2] y_axes = {1, 2}
        > {
            m = Not (mask)
            y = Unsqueeze (m, y_axes)  # bool[B,1,1,S]
        }
        ");
    }

    #[test]
    fn a_mask_that_may_have_more_rows_is_gathered_along_them() {
        assert_snapshot!(check(&SimplifyGathers, &grid("M,S", "r5", "k5")), @"
        g (int64[B,S] ids, bool[M,S] mask) => (bool[B,1,1,S] y) <
            int64 zero = {0},
            int64 one = {1},
            int64[1] front = {0},
            int64[3] a123 = {1, 2, 3},
            int64[3] a012 = {0, 1, 2},
            int64[1] last = {-1},
            int64[2] y_axes = {1, 2}
        > {
            b1 = Shape <start = 0, end = 1> (ids)
            b = Squeeze (b1, front)
            rows = Range (zero, b, one)
            m = Not (mask)
            y_1 = Gather <axis = 0> (m, rows)
            y = Unsqueeze (y_1, y_axes)  # bool[B,1,1,S]
        }
        ");
    }

    #[test]
    fn refuses_other_grids() {
        let turned = grid("S,B", "k5", "r5");
        check_refuses(&SimplifyGathers, &turned, "or in another order than the data's axes");
        let twice = grid("B,S", "k5", "k5").replace("B,S] mask", "S,S] mask");
        check_refuses(&SimplifyGathers, &twice, "or in another order than the data's axes");
        let shifted =
            grid("B,S", "r5", "k6").replace("k5 = Unsqueeze (k, last)", "k5 = Unsqueeze (k, last) k6 = Mod (k5, one)");
        check_refuses(&SimplifyGathers, &shifted, "the indices do not count along an axis of the grid");
    }

    /// `mask[batch, key]` as the older exporter writes it: at `batch · S + key` of all elements in a row.
    fn flat(sizes: &str, index: &str) -> String {
        format!(
            "<ir_version: 9, opset_import: [\"\" : 17]>
            g (int64[{sizes}] ids, bool[B,S] mask) => (bool[B,1,1,S] y) <
                int64 zero = {{0}}, int64 one = {{1}}, int64[1] front = {{0}}, int64[3] a123 = {{1,2,3}}, int64[3] a012 = {{0,1,2}}, int64[1] last = {{-1}}
            > {{
                b1 = Shape <start = 0, end = 1> (ids)
                b = Squeeze (b1, front)
                s1 = Shape <start = 1, end = 2> (ids)
                s = Squeeze (s1, front)
                rows = Range (zero, b, one)
                keys = Range (zero, s, one)
                r4 = Unsqueeze (rows, a123)
                k4 = Unsqueeze (keys, a012)
                r = Mul (r4, s1)
                at = Add ({index})
                m = Not (mask)
                all = Flatten <axis = 2> (m)
                g = Gather (all, at)
                y = Squeeze (g, last)
            }}"
        )
    }

    #[test]
    fn a_mask_read_in_a_row_is_only_given_axes() {
        assert_snapshot!(check(&SimplifyGathers, &flat("B,S", "r, k4")), @r#"
        g (int64[B,S] ids, bool[B,S] mask) => (bool[B,1,1,S] y) <
            int64 zero = {0},
            int64 one = {1},
            int64[1] front = {0},
            int64[3] a123 = {1, 2, 3},
            int64[3] a012 = {0, 1, 2},
            int64[1] last = {-1},
            int64[3] g_axes = {1, 2, 4}
        > {
            m = Not (mask)
            g = Unsqueeze (m, g_axes)
            y = Squeeze (g, last)  # bool[B,1,1,S]
        }
        "#);
    }

    #[test]
    fn refuses_other_strides() {
        let refused = "the indices do not count along the axes that were made one";
        check_refuses(&SimplifyGathers, &flat("B,S", "r4, k4"), refused);
        // The rows of another tensor may be fewer.
        check_refuses(&SimplifyGathers, &flat("C,S", "r, k4").replace("bool[B,1", "bool[C,1"), refused);
        let repeated =
            flat("B,S", "r, k4").replace("at = Add (r, k4)", "two = Concat <axis = 1> (k4, k4) at = Add (r, two)");
        let refused = "the indices have an axis along which they repeat rows";
        check_refuses(&SimplifyGathers, &repeated.replace("bool[B,1,1,S] y", "bool[B,2,1,S] y"), refused);
    }

    #[test]
    fn one_index_gathers_rows() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (int64[B,S] ids, int64[1,S] one) => (float[B,S,2] y, float[1,S,2] z, float[1,1,S] w) <
                float[3,2] table = {1,2,3,4,5,6}, int64[1] last = {-1}, int64[1] zero = {0}, int64 three = {3}, float[3] row = {1,2,3}
            > {
                i = Mod (ids, three)
                j = Unsqueeze (i, last)
                y = GatherND (table, j)
                k = Mod (one, three)
                l = Unsqueeze (k, last)
                z = GatherND (table, l)
                m = Unsqueeze (l, zero)
                w = GatherND (row, m)
            }";
        assert_snapshot!(check(&SimplifyGathers, graph), @r#"
        g (int64[B,S] ids, int64[1,S] one) => (float[B,S,2] y, float[1,S,2] z, float[1,1,S] w) <
            float[3,2] table = {1, 2, 3, 4, 5, 6},
            int64[1] last = {-1},
            int64[1] zero = {0},
            int64 three = {3},
            float[3] row = {1, 2, 3}
        > {
            i = Mod (ids, three)
            k = Mod (one, three)
            l = Unsqueeze (k, last)
            m = Unsqueeze (l, zero)
            w = GatherND (row, m)  # float[1,1,S]
            y = Gather <axis = 0> (table, i)  # float[B,S,2]
            z = Gather <axis = 0> (table, k)  # float[1,S,2]
        }
        "#);
    }

    #[test]
    fn a_constant_grid_counts_too() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (bool[1,4] m) => (bool[1,1,1,3] y, bool[1,1,1,3] z) <
                int64[1,1,1,3,2] grid = {0,0, 0,1, 0,2}, int64[1,1,1,3,2] odd = {0,0, 0,1, 0,3}
            > {
                n = Not (m)
                y = GatherND (n, grid)
                z = GatherND (n, odd)
            }";
        assert_snapshot!(check(&SimplifyGathers, graph), @"
        g (bool[1,4] m) => (bool[1,1,1,3] y, bool[1,1,1,3] z) <
            int64[1,1,1,3,2] grid = {0, 0, 0, 1, 0, 2},
            int64[1,1,1,3,2] odd = {0, 0, 0, 1, 0, 3},
            int64[3] y_positions = {0, 1, 2},
            int64[2] y_axes = {1, 2}
        > {
            n = Not (m)
            z = GatherND (n, odd)  # bool[1,1,1,3]
            y_1 = Gather <axis = 1> (n, y_positions)
            y = Unsqueeze (y_1, y_axes)  # bool[1,1,1,3]
        }
        ");
    }

    #[test]
    fn refuses_axes_that_repeat() {
        let graph =
            grid("B,S", "r5", "k5").replace("grid = Concat <axis = -1> (r5, k5)", "grid = Concat <axis = -1> (r5)");
        let graph = graph.replace("=> (bool[B,1,1,S] y)", "=> (bool[B,1,1,S,S] y)");
        check_refuses(&SimplifyGathers, &graph, "the grid has an axis along which it repeats elements");
    }

    #[test]
    fn what_takes_every_row_in_order_goes() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (float[B,S,4] x) => (float[B,S,4] y) <int64 zero = {0}, int64 one = {1}, int64[1] front = {0}> {
                s1 = Shape <start = 1, end = 2> (x)
                s = Squeeze (s1, front)
                all = Range (zero, s, one)
                n = Neg (x)
                g = Gather <axis = -2> (n, all)
                y = Abs (g)
            }";
        assert_snapshot!(check(&SimplifyGathers, graph), @"
        g (float[B,S,4] x) => (float[B,S,4] y) <
            int64 zero = {0},
            int64 one = {1},
            int64[1] front = {0}
        > {
            n = Neg (x)
            y = Abs (n)  # float[B,S,4]
        }
        ");
        let part = graph.replace("(float[B,S,4] x)", "(float[B,S,4] x, float[B,T,4] z)").replace("Neg (x)", "Neg (z)");
        crate::testing::check_untouched(&SimplifyGathers, &part);
    }

    #[test]
    fn refuses_grids_of_unknown_parts() {
        let refuses = |graph: &str, reason: &str| check_refuses(&SimplifyGathers, graph, reason);
        let given = grid("B,S", "r5", "k5").replace("mask) =>", "mask, int64[B,1,1,S,2] given) =>");
        refuses(
            &given.replace("GatherND (m, grid)", "GatherND (m, given)"),
            "the indices are neither joined nor constant",
        );
        let joined = grid("B,S", "r5", "k5").replace("Concat <axis = -1> (r5, k5)", "Concat <axis = 0> (r5, k5)");
        refuses(&joined, "the indices are not joined along their last axis");
        refuses(&grid("S", "r5", "k5"), "there are more indices than axes");
        let moved = grid("B,M", "r5", "k5").replace("k = Expand (k4, to)", "k6 = Add (k4, zero) k = Expand (k6, to)");
        refuses(&moved, "the indices are not made of one Range");
    }

    #[test]
    fn keeps_gathers_in_batches_and_along_other_axes() {
        let keeps = |graph: &str| {
            let graph = format!("<ir_version: 9, opset_import: [\"\" : 17]> g {graph}");
            crate::testing::check_untouched(&SimplifyGathers, &graph);
        };
        keeps(
            "(float[2,3] x, int64[2] i) => (float[2] y) <int64[1] one = {1}> { u = Unsqueeze (i, one) y = GatherND <batch_dims = 1> (x, u) }",
        );
        keeps(
            "(float[2,4] x) => (float[2] y) <int64[2,1] grid = {0, 1}> { n = Neg (x) y = GatherND <batch_dims = 1> (n, grid) }",
        );
        keeps(
            "(float[2,3,6] x) => (float[6,2,3] y) <int64[2] to = {6, 6}, int64[2,3] all = {0, 1, 2, 3, 4, 5}> {
            f = Reshape (x, to) y = Gather <axis = 1> (f, all) }",
        );
    }
}
