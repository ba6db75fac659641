//! Composes nodes that only regroup axes, and makes their targets constants.

use super::reshape_target::{full_axes, nonempty, target};
use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving,
    operands::{int64s, sorted_axes, with_axes},
    pat, rewrite, rule,
};
use lathe_analysis::DimExpr;
use lathe_ir::{Model, Node, Patch, Use, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct SimplifyReshapes;

static INFO: Info = Info {
    name: "simplify-reshapes",
    summary: "composes Reshape, Flatten, Squeeze and Unsqueeze, and makes their targets constants",
    doc: "A target that is computed from shapes becomes a constant where every size is known, is the size of the same \
          axis of the input (written 0) or is the only one left (written -1, where no other can be 0); the nodes that \
          computed it go away. Reshape, Flatten, Squeeze and Unsqueeze directly after one another become one node; two around an \
          elementwise node go where they undo one another, and a Transpose behind one where it only moves an axis of size 1. \
          Declines where sizes are not related by the symbolic shapes, where a size would be inferred beside an axis \
          that may be empty, and where the value between two nodes has other uses.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for SimplifyReshapes {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        cx.nonempty.get_or_init(|| nonempty(model, cx));
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("compose-unsqueezes", pat!(outer: Unsqueeze(inner: Unsqueeze(x, ..), ..)), |m, g| {
            // Where all that reads the inner one is composed with it, it goes.
            let inner = m.node("inner").output(0).ok_or(Refusal::NoMatch)?;
            let composed = |u: &Use| matches!(u, Use::Node(id, 0) if m.graph().node(*id).is("Unsqueeze"));
            m.require(m.graph().value(inner).uses().iter().all(composed), "the inner Unsqueeze has other readers")?;
            compose_unsqueezes(m, g)
        })
        .sharing(),
        rule("compose-squeezes", pat!(outer: Squeeze(inner: Squeeze(x, ..), ..)), compose_squeezes),
        rule(
            "compose-reshapes",
            pat!(outer: Reshape|Flatten|Squeeze|Unsqueeze(inner: Reshape|Flatten|Squeeze|Unsqueeze(x, ..), ..)),
            |m, g| {
                m.require(m.opset() >= 5, "before opset 5 the target of a Reshape is an attribute")?;
                regrouped(m, g, &["outer", "inner"])
            },
        ),
        rule(
            "undo-around-elementwise",
            pat!(outer: Reshape|Flatten|Squeeze|Unsqueeze(
                between: Cast|Not|Neg|Abs|Sign|Sqrt|Relu|Sigmoid|Tanh|Erf(inner: Reshape|Flatten|Squeeze|Unsqueeze(x, ..)), ..
            )),
            |m, g| {
                // Elements keep their order, so that equal shapes are equal tensors.
                m.only_if(m.same_shape("x", "output"))?;
                let between = m.node("between");
                let mut node = Node::new(&between.op_type);
                node.attributes = between.attributes.clone();
                Ok(g.node(node, &[m.value("x")]))
            },
        ),
        rule("compose-transpose", pat!(outer: Transpose(Reshape|Flatten|Squeeze|Unsqueeze(x, ..))), |m, g| {
            let perm = m.perm("outer")?;
            let moved = m.node("outer").input(0).and_then(|v| m.facts().shape(v)).ok_or(Refusal::NoMatch)?;
            // Only axes of one element change their place, so that elements keep their order.
            m.only_if(perm.iter().filter(|&&axis| moved[axis].as_known() != Some(1)).is_sorted())?;
            with_ones(m, g, m.value("x"), m.value("output")).ok_or(Refusal::NoMatch)
        }),
        rule("reshape-to-constant", pat!(node: Reshape(x, shape)), |m, g| {
            m.only_if(m.graph().constant(m.value("shape")).is_none())?;
            regrouped(m, g, &["node"])
        }),
        rule("expand-to-constant", pat!(node: Expand(x, shape)), |m, g| {
            m.only_if(m.graph().constant(m.value("shape")).is_none())?;
            let to = expansion(m)?;
            let shape = g.int64s("shape", &to);
            Ok(g.node(Node::new("Expand"), &[m.value("x"), shape]))
        }),
    ]
}

/// `x` in the shape of the output, by one node that does so for every size that the nodes labelled `old` bear.
fn regrouped(m: &Match, g: &mut Patch, old: &[&str]) -> Result<ValueId, Refusal> {
    let (x, result) = (m.value("x"), m.value("output"));
    let full: Vec<DimExpr> = old.iter().flat_map(|label| full_axes(m.facts(), m.node(label))).collect();
    match target(m, x, result, &full) {
        // An Unsqueeze or Squeeze has nothing to infer.
        Ok(sizes) if sizes.contains(&-1) => Ok(with_ones(m, g, x, result).unwrap_or_else(|| g.reshape(x, &sizes))),
        Ok(sizes) => Ok(g.reshape(x, &sizes)),
        Err(reason) => flattened(m, g, x, result).or_else(|| with_ones(m, g, x, result)).ok_or(reason),
    }
}

/// `x` as a matrix in the shape of `result`, where that takes its first axes as rows and the others as columns.
fn flattened(m: &Match, g: &mut Patch, x: ValueId, result: ValueId) -> Option<ValueId> {
    let (from, [rows, columns]) = (m.facts().shape(x)?, m.facts().shape(result)?) else { return None };
    let product = |sizes: &[DimExpr]| sizes.iter().try_fold(DimExpr::from(1), |all, size| all.times(size));
    let fits = |&axis: &usize| {
        product(&from[..axis]).as_ref() == Some(rows) && product(&from[axis..]).as_ref() == Some(columns)
    };
    let axis = (0..=from.len()).find(fits).filter(|_| m.opset() >= 9)?;
    Some(g.node(Node::new("Flatten").with("axis", axis as i64), &[x]))
}

/// `x` in the shape of `result`, where the two differ by axes of one element that only one of them has.
fn with_ones(m: &Match, g: &mut Patch, x: ValueId, result: ValueId) -> Option<ValueId> {
    let (from, to) = (m.facts().shape(x)?, m.facts().shape(result)?);
    let (op, long, short) = if from.len() > to.len() { ("Squeeze", from, to) } else { ("Unsqueeze", to, from) };
    let mut left = short.iter().peekable();
    let mut ones = Vec::new();
    for (axis, size) in long.iter().enumerate() {
        if left.next_if_eq(&size).is_none() {
            ones.push(axis);
        }
    }
    let fits = left.peek().is_none() && ones.iter().all(|&axis| long[axis].as_known() == Some(1));
    (fits && !ones.is_empty()).then(|| with_axes(m, g, Node::new(op), 13, x, &ones))
}

/// The target of an `Expand` in known sizes, where 1 keeps the size of the input.
fn expansion(m: &Match) -> Result<Vec<i64>, Refusal> {
    let (from, to) = (m.shape("x")?, m.shape("output")?);
    let missing = to.len() - from.len().min(to.len());
    let size = |(axis, size): (usize, &DimExpr)| {
        let kept = axis >= missing && from[axis - missing] == *size;
        match size.as_known() {
            _ if kept => Ok(1),
            Some(known) => Ok(known),
            None => Err(Refusal::from("a size that is not known is expanded to")),
        }
    };
    to.iter().enumerate().map(size).collect()
}

fn compose_unsqueezes(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let inner = int64s(m, m.node("inner"), "axes", 1)?.ok_or(Refusal::NoMatch)?;
    let outer = int64s(m, m.node("outer"), "axes", 1)?.ok_or(Refusal::NoMatch)?;
    let given = m.facts().ndim(m.value("x"));
    let from_front = inner.iter().chain(&outer).all(|&axis| axis >= 0);
    // Only axes counted from the end need the number of axes; otherwise any number that is large enough will do.
    let bound = || inner.iter().chain(&outer).max().map_or(0, |&axis| axis.clamp(0, 64) as usize + 1);
    let ndim = match given {
        Some(ndim) => ndim,
        None if from_front => bound(),
        None => m.ndim("x")?,
    };
    let inner = sorted_axes(m, &inner, ndim + inner.len())?;
    let outer = sorted_axes(m, &outer, ndim + inner.len() + outer.len())?;
    let kept: Vec<usize> = (0..ndim + inner.len() + outer.len()).filter(|axis| !outer.contains(axis)).collect();
    let mut axes: Vec<usize> = inner.iter().map(|&axis| kept[axis]).chain(outer).collect();
    axes.sort_unstable();
    Ok(with_axes(m, g, Node::new("Unsqueeze"), 13, m.value("x"), &axes))
}

fn compose_squeezes(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let ndim = m.ndim("x")?;
    let inner = int64s(m, m.node("inner"), "axes", 1)?.ok_or("a Squeeze states no axes")?;
    let outer = int64s(m, m.node("outer"), "axes", 1)?.ok_or("a Squeeze states no axes")?;
    let inner = sorted_axes(m, &inner, ndim)?;
    let kept: Vec<usize> = (0..ndim).filter(|axis| !inner.contains(axis)).collect();
    let outer = sorted_axes(m, &outer, kept.len())?;
    let mut axes: Vec<usize> = outer.iter().map(|&axis| kept[axis]).chain(inner).collect();
    axes.sort_unstable();
    Ok(with_axes(m, g, Node::new("Squeeze"), 13, m.value("x"), &axes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn splits_heads_with_a_constant_target() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[batch,seq,256] x) => (float[batch,seq,4,64] y)
               <int64 zero = {0}, int64 one = {1}, int64[1] front = {0}, int64[1] h = {4}, int64[1] d = {64}> {
                s = Shape (x)
                b = Gather (s, zero)
                n = Gather (s, one)
                ub = Unsqueeze (b, front)
                un = Unsqueeze (n, front)
                to = Concat <axis = 0> (ub, un, h, d)
                y = Reshape (x, to)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @r#"
        g (float[batch,"seq",256] x) => (float[batch,"seq",4,64] y) <
            int64 zero = {0},
            int64 one = {1},
            int64[1] front = {0},
            int64[1] h = {4},
            int64[1] d = {64},
            int64[4] y_shape = {0, 0, 4, 64}
        > {
            y = Reshape (x, y_shape)  # float[batch,seq,4,64]
        }
        "#);
    }

    #[test]
    fn composes_reshapes_around_an_unsqueeze() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[batch,6] x) => (float[batch,3,2] y) <int64[1] two = {2}, int64[3] to = {-1, 3, 2}> {
                u = Unsqueeze (x, two)
                y = Reshape (u, to)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @"
        g (float[batch,6] x) => (float[batch,3,2] y) <
            int64[1] two = {2},
            int64[3] to = {-1, 3, 2},
            int64[3] y_shape = {0, 3, 2}
        > {
            y = Reshape (x, y_shape)  # float[batch,3,2]
        }
        ");
    }

    #[test]
    fn what_is_undone_behind_a_cast_goes() {
        let graph = |last: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]>
                g (bool[B,S] x) => ({last}) <int64[2] axes = {{1, 2}}> {{
                    u = Unsqueeze (x, axes)
                    c = Cast <to = 6> (u)
                    y = Squeeze (c, axes)
                }}"
            )
        };
        insta::assert_snapshot!(check(&SimplifyReshapes, &graph("int32[B,S] y")), @r#"
        g (bool[B,S] x) => (int32[B,S] y) <
            int64[2] axes = {1, 2}
        > {
            y = Cast <to = 6> (x)  # int32[B,S]
        }
        "#);
        let read = graph("int32[B,S] y, int32[B,1,1,S] c");
        crate::testing::check_untouched(&SimplifyReshapes, &read);
    }

    #[test]
    fn an_axis_of_one_element_goes_where_a_transpose_moves_it() {
        let graph = |heads: i64| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]>
                g (float[B,S,{}] x) => (float[B,{heads},S,8] y) <int64[4] to = {{0, 0, {heads}, 8}}> {{
                    r = Reshape (x, to)
                    y = Transpose <perm = [0, 2, 1, 3]> (r)
                }}",
                8 * heads
            )
        };
        insta::assert_snapshot!(check(&SimplifyReshapes, &graph(1)), @r#"
        g (float[B,S,8] x) => (float[B,1,S,8] y) <
            int64[4] to = {0, 0, 1, 8},
            int64[1] y_axes = {1}
        > {
            y = Unsqueeze (x, y_axes)  # float[B,1,S,8]
        }
        "#);
        crate::testing::check_untouched(&SimplifyReshapes, &graph(2));
    }

    #[test]
    fn composes_unsqueezes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[a,b] x) => (float[1,a,1,b,1] y) <int64[1] inner = {1}, int64[2] outer = {0, -1}> {
                u = Unsqueeze (x, inner)
                y = Unsqueeze (u, outer)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @"
        g (float[a,b] x) => (float[1,a,1,b,1] y) <
            int64[1] inner = {1},
            int64[2] outer = {0, -1},
            int64[3] y_axes = {0, 2, 4}
        > {
            y = Unsqueeze (x, y_axes)  # float[1,a,1,b,1]
        }
        ");
    }

    #[test]
    fn composes_with_every_reader_or_none() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[a] x) => (float[1,1,a,1] y, float[1,a,1,1] z) <int64[1] zero = {0}, int64[2] front = {0, 3}, int64[2] back = {2, 3}> {
                u = Unsqueeze (x, zero)
                y = Unsqueeze (u, front)
                z = Unsqueeze (u, back)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @r#"
        g (float[a] x) => (float[1,1,a,1] y, float[1,a,1,1] z) <
            int64[1] zero = {0},
            int64[2] front = {0, 3},
            int64[2] back = {2, 3},
            int64[3] y_axes = {0, 1, 3},
            int64[3] z_axes = {0, 2, 3}
        > {
            y = Unsqueeze (x, y_axes)  # float[1,1,a,1]
            z = Unsqueeze (x, z_axes)  # float[1,a,1,1]
        }
        "#);
        let shared = graph.replace("z = Unsqueeze (u, back)", "w = Neg (u) z = Unsqueeze (w, back)");
        check_refuses(&SimplifyReshapes, &shared, "the inner Unsqueeze has other readers");
    }

    #[test]
    fn composes_squeezes_as_opset_11_writes_them() {
        let graph = "<ir_version: 7, opset_import: [\"\" : 11]>
            g (float[1,a,1,b,1] x) => (float[a,b] y) {
                u = Squeeze <axes = [0, -1]> (x)
                y = Squeeze <axes = [1]> (u)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @"
        g (float[1,a,1,b,1] x) => (float[a,b] y) {
            y = Squeeze <axes = [0, 2, 4]> (x)  # float[a,b]
        }
        ");
    }

    #[test]
    fn keeps_a_target_with_two_new_sizes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[a,b] x, float[b,a] like) => (float[b,a] y) {
                to = Shape (like)
                y = Reshape (x, to)
            }";
        check_refuses(&SimplifyReshapes, graph, "more than one size is neither known nor the same as before");
    }

    #[test]
    fn infers_no_size_beside_one_that_may_be_empty() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[b,n,4,m] x) => (float[b,n,k] y) <int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] i4 = {4}> {
                s = Shape (x)
                a = Slice (s, i0, i2)
                c = Slice (s, i3, i4)
                d = Mul (c, i4)
                to = Concat <axis = 0> (a, d)
                y = Reshape (x, to)
            }";
        check_refuses(&SimplifyReshapes, graph, "a size is inferred beside one that may be 0");
        // Where the file itself infers the size it does not run on empty axes either.
        let inferred = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[b,n,4,m] x) => (float[b,n,k] y) <int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] minus = {-1}> {
                s = Shape (x)
                a = Slice (s, i0, i2)
                to = Concat <axis = 0> (a, minus)
                y = Reshape (x, to)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, inferred), @"
        g (float[b,n,4,m] x) => (float[b,n,k] y) <
            int64[1] i0 = {0},
            int64[1] i2 = {2},
            int64[1] minus = {-1},
            int64[3] y_shape = {0, 0, -1}
        > {
            y = Reshape (x, y_shape)  # float[b,n,k]
        }
        ");
    }

    #[test]
    fn infers_sizes_beside_axes_that_another_reshape_keeps_from_being_empty() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[b,s,8] x, float[b,4,s,m] z) => (float[b,s,4,2] q, float[b,4,k] y)
               <int64[4] heads = {0, 0, -1, 2}, int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] i4 = {4}> {
                h = Reshape (x, heads)
                q = Neg (h)
                l = Shape (z)
                a = Slice (l, i0, i2)
                c = Slice (l, i2, i3)
                d = Slice (l, i3, i4)
                e = Mul (c, d)
                to = Concat <axis = 0> (a, e)
                y = Reshape (z, to)
            }";
        assert!(check(&SimplifyReshapes, graph).contains("y_shape = {0, 4, -1}"));
        // A Reshape that nothing needs does not run.
        let dead = graph
            .replace("q = Neg (h)", "q = Reshape (x, known)")
            .replace("i0 =", "known = {0, 0, 4, 2}, int64[1] i0 =");
        let dead = dead.replace("int64[1] known", "int64[4] known");
        check_refuses(&SimplifyReshapes, &dead, "a size is inferred beside one that may be 0");
        // Neither does one in a branch that is not taken.
        let branch = graph.replace("float[b,s,8] x", "bool t, float[b,s,8] x").replace(
            "h = Reshape (x, heads)",
            "h = If (t) <then_branch = p () => (float[b,s,4,2] u) { u = Reshape (x, heads) },
                        else_branch = e () => (float[b,s,4,2] v) { v = Reshape (x, known) }>",
        );
        let branch = branch.replace("int64[1] i0 =", "int64[4] known = {0, 0, 4, 2}, int64[1] i0 =");
        check_refuses(&SimplifyReshapes, &branch, "a size is inferred beside one that may be 0");
    }

    #[test]
    fn flattens_and_adds_ones_where_a_target_would_infer() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,m,4] x) => (float[n,k] y, float[1,n,m,4] z)
               <int64[4] four = {0, 0, 2, 2}, int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i4 = {4}> {
                r = Reshape (x, four)
                y = Flatten <axis = 1> (r)
                s = Shape (x)
                one = Slice (s, i4, i4)
                to = Concat <axis = 0> (i1, s, one)
                z = Reshape (x, to)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @"
        g (float[n,m,4] x) => (float[n,k] y, float[1,n,m,4] z) <
            int64[4] four = {0, 0, 2, 2},
            int64[1] i0 = {0},
            int64[1] i1 = {1},
            int64[1] i2 = {2},
            int64[1] i4 = {4},
            int64[1] z_axes = {0}
        > {
            y = Flatten <axis = 1> (x)  # float[n,k]
            z = Unsqueeze (x, z_axes)  # float[1,n,m,4]
        }
        ");
        let flat = "<ir_version: 7, opset_import: [\"\" : 12]>
            g (float[n,1,m,k] x) => (float[n,m,k] y) {
                u = Unsqueeze <axes = [0]> (x)
                y = Squeeze <axes = [0, 2]> (u)
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, flat), @"
        g (float[n,1,m,k] x) => (float[n,m,k] y) {
            y = Squeeze <axes = [1]> (x)  # float[n,m,k]
        }
        ");
    }

    #[test]
    fn keeps_a_value_that_is_an_output() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[2,6] x) => (float[12] u, float[3,4] y) <int64[1] flat = {12}, int64[2] to = {3, 4}> {
                u = Reshape (x, flat)
                y = Reshape (u, to)
            }";
        check_refuses(&SimplifyReshapes, graph, "an inner value is a graph output");
    }

    #[test]
    fn makes_targets_constant_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (bool c, float[batch,6] x) => (float[batch,2,3] y) <int64[2] tail = {2, 3}> {
                y = If (c) <then_branch = yes () => (float[batch,2,3] p) {
                    s = Shape <start = 0, end = 1> (x)
                    to = Concat <axis = 0> (s, tail)
                    p = Reshape (x, to)
                }, else_branch = no () => (float[batch,2,3] q) <int64[3] to = {0, 2, 3}> {
                    q = Reshape (x, to)
                }>
            }";
        insta::assert_snapshot!(check(&SimplifyReshapes, graph), @"
        g (bool c, float[batch,6] x) => (float[batch,2,3] y) <
            int64[2] tail = {2, 3}
        > {
            y = If (c) <then_branch = yes () => (p_1) <
                int64[3] p_shape = {0, 2, 3}
            > {
                p_1 = Reshape (x, p_shape)
            }, else_branch = no () => (float[batch,2,3] q) <
                int64[3] to = {0, 2, 3}
            > {
                q = Reshape (x, to)  # float[batch,2,3]
            }>  # float[batch,2,3]
        }
        ");
    }

    #[test]
    fn keeps_targets_that_it_cannot_write() {
        let old = "<ir_version: 3, opset_import: [\"\" : 4]>
            g (float[2,6] x) => (float[12] y) { a = Reshape <shape = [3, 4]> (x) y = Reshape <shape = [12]> (a) }";
        check_refuses(&SimplifyReshapes, old, "before opset 5 the target of a Reshape is an attribute");
        let refuses = |graph: &str, reason: &str| {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 17, \"custom\" : 1]> g (float[2,0] x, int64[k] to, float[n] v, int64[2] two) {graph}"
            );
            check_refuses(&SimplifyReshapes, &graph, reason);
        };
        refuses("=> (float[] y) { y = Reshape (v, to) }", "the number of axes of the result is unknown");
        let empty = "=> (float[0,3] y) <int64[3] three = {1, 2, 0}, int64[2] t = {0, 3}> { u = Reshape <allowzero = 1> (x, three) y = Reshape <allowzero = 1> (u, t) }";
        refuses(empty, "a size is 0, which would copy one of the input");
        refuses("=> (float[a,b] y) { y = Expand (v, two) }", "a size that is not known is expanded to");
        let axes = "<int64[1] last = {-1}, int64[1] first = {0}>";
        refuses(
            &format!("=> (float[] y) {axes} {{ c = custom.F (v) u = Unsqueeze (c, last) y = Unsqueeze (u, first) }}"),
            "the number of axes of `x` is unknown",
        );
        refuses(
            "=> (float[] y) { c = custom.F (v) u = Squeeze (c) y = Squeeze (u) }",
            "the number of axes of `x` is unknown",
        );
        refuses("=> (float[] y) { u = Squeeze (v) y = Squeeze (u) }", "a Squeeze states no axes");
    }

    #[test]
    fn keeps_targets_that_are_constant_or_other_shapes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[2,6] x) => (float[12] y) <int64[2] to = {3, 4}, int64[1] flat = {12}> {
                a = Reshape (x, to) b = Relu (a) y = Reshape (b, flat)
            }";
        crate::testing::check_untouched(&SimplifyReshapes, graph);
    }
}
