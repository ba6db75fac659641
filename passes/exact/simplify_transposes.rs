//! Composes Transposes, and moves them past other nodes where that cancels some.

use super::reshape_target::{nonempty, target};
use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Replacement, Rule, Saving, operands::int64s, pat,
    rewrite, rule,
};
use lathe_analysis::Trait;
use lathe_ir::{Model, Node, Patch, Use, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct SimplifyTransposes;

static INFO: Info = Info {
    name: "simplify-transposes",
    summary: "composes Transposes, and moves them past other nodes where that cancels some",
    doc: "Two Transposes in a row become one or none. The last two axes are \
          turned without a Reshape before and behind that makes all others one. A Transpose that only moves axes of size 1 becomes a Reshape, \
          which copies nothing. Transposes before an elementwise node, a Concat, Softmax, ReduceMax or ReduceMin move behind it where \
          the number of nodes falls: two operands with the same permutation, or a Transpose behind that undoes it. \
          Declines where the value between two nodes has other uses.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes, Saving::PeakMemory],
    source: None,
};

impl Pass for SimplifyTransposes {
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
        rule("compose-transposes", pat!(outer: Transpose(inner: Transpose(x))), |m, g| {
            let (inner, outer) = (m.perm("inner")?, m.perm("outer")?);
            m.only_if(inner.len() == outer.len())?;
            let both: Vec<usize> = outer.iter().map(|&axis| inner[axis]).collect();
            if is_identity(&both) && m.require_replaceable("output", "x").is_ok() {
                return Ok(m.value("x"));
            }
            Ok(g.transpose(m.value("x"), &both))
        }),
        rule("transpose-to-reshape", pat!(node: Transpose(x)), |m, g| {
            let (perm, shape) = (m.perm("node")?, m.facts().shape(m.value("x")).ok_or(Refusal::NoMatch)?);
            let long: Vec<usize> = perm.iter().copied().filter(|&axis| shape[axis].as_known() != Some(1)).collect();
            m.only_if(!is_identity(&perm) && long.is_sorted() && m.opset() >= 5)?;
            let to = target(m, m.value("x"), m.value("output"), &[])?;
            Ok(g.reshape(m.value("x"), &to))
        }),
        rule(
            // As exporters turn keys: with all leading axes as one.
            "transpose-without-grouping",
            pat!(outer: Reshape(middle: Transpose(inner: Reshape(x, _)), _)),
            |m, g| {
                let grouped = m.node("inner").output(0).ok_or(Refusal::NoMatch)?;
                let shape = |value: ValueId| m.facts().shape(value).ok_or(Refusal::NoMatch);
                let (from, to) = (shape(m.value("x"))?, m.shape("output")?);
                let [batch @ .., rows, columns] = from else { return Err(Refusal::NoMatch) };
                m.only_if(m.perm("middle")? == [0, 2, 1] && from.len() != 3)?;
                m.only_if(matches!(shape(grouped)?, [_, r, c] if r == rows && c == columns))?;
                m.only_if(matches!(to, [b @ .., c, r] if b == batch && r == rows && c == columns))?;
                let mut perm: Vec<usize> = (0..from.len()).collect();
                perm.swap(from.len() - 2, from.len() - 1);
                Ok(g.transpose(m.value("x"), &perm))
            },
        ),
        rule(
            "sink-past-unary",
            pat!(middle: Abs|Neg|Relu|LeakyRelu|Sigmoid|HardSigmoid|HardSwish|Tanh|Exp|Log|Sqrt|Erf|Gelu|Elu|Selu|Softplus|Softsign|Clip|Not|Ceil|Floor|Round|Reciprocal|Sin|Cos|Mish|ThresholdedRelu|Celu|Sign|Cast(inner: Transpose(x), ..)),
            sink,
        ),
        rule("sink-past-scalar", pat!(middle: Add|Sub|Mul|Div|Pow|Min|Max(inner: Transpose(x), c)), sink),
        rule("sink-past-scalar", pat!(middle: Add|Sub|Mul|Div|Pow|Min|Max(c, inner: Transpose(x))), sink),
        rule("sink-past-softmax", pat!(middle: Softmax|LogSoftmax(inner: Transpose(x))), sink),
        rule(
            "undo-behind-pair",
            pat!(outer: Transpose(middle: Add|Sub|Mul|Div|Pow|Min|Max|And|Or|Equal|Less|Greater(inner: Transpose(x), other: Transpose(y)))),
            |m, g| {
                m.only_if(m.perm("inner")? == m.perm("other")? && is_identity(&composed(m)?))?;
                let (node, mut inputs) = copy(m, "middle");
                // A commutative operator matches either way round.
                for input in &mut inputs {
                    let first = *input == m.node("inner").output(0);
                    *input = Some(m.value(if first { "x" } else { "y" }));
                }
                Ok(Replacement::from(g.node_with(node, &inputs, 1)))
            },
        ),
        rule(
            "transpose-after-pair",
            pat!(middle: Add|Sub|Mul|Div|Pow|Min|Max|And|Or|Equal|Less|Greater(inner: Transpose(x), other: Transpose(y))),
            |m, g| {
                let perm = m.perm("inner")?;
                m.only_if(perm == m.perm("other")?)?;
                m.require(m.same_shape("x", "y"), "the operands are not provably of one shape")?;
                let (node, mut inputs) = copy(m, "middle");
                for input in &mut inputs {
                    let first = *input == m.node("inner").output(0);
                    *input = Some(m.value(if first { "x" } else { "y" }));
                }
                let made = g.node_with(node, &inputs, 1)[0];
                Ok(g.transpose(made, &perm))
            },
        ),
        rule("transpose-after-concat", pat!(node: Concat(_, ..)), transpose_after_concat),
        rule(
            // A sum over other axes adds in another order, so only maxima and minima keep their bits.
            "undo-behind-reduce",
            pat!(outer: Transpose(middle: ReduceMax|ReduceMin(inner: Transpose(x), ..))),
            |m, g| {
                m.only_if(is_identity(&composed(m)?))?;
                m.only_if(m.node("middle").int("keepdims").unwrap_or(1) == 1)?;
                let perm = m.perm("inner")?;
                let axes = int64s(m, m.node("middle"), "axes", 1)?.filter(|axes| !axes.is_empty());
                let axes = axes.ok_or("the Reduce states no axes")?;
                let mut moved = axes
                    .iter()
                    .map(|&a| Ok(perm[m.axis(a, perm.len())?] as i64))
                    .collect::<Result<Vec<_>, Refusal>>()?;
                moved.sort_unstable();
                let (mut node, mut inputs) = copy(m, "middle");
                inputs[0] = Some(m.value("x"));
                if node.attribute("axes").is_some() {
                    node.set_attribute("axes", moved);
                } else {
                    inputs[1] = Some(g.int64s("axes", &moved));
                }
                Ok(Replacement::from(g.node_with(node, &inputs, 1)))
            },
        ),
    ]
}

fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(at, &axis)| at == axis)
}

/// What the outer and the inner Transpose do together if nothing between them matters.
fn composed(m: &Match) -> Result<Vec<usize>, Refusal> {
    let (inner, outer) = (m.perm("inner")?, m.perm("outer")?);
    m.only_if(inner.len() == outer.len())?;
    Ok(outer.iter().map(|&axis| inner[axis]).collect())
}

/// A node like the labelled one that is not yet in the graph, and its inputs.
fn copy(m: &Match, label: &str) -> (Node, Vec<Option<ValueId>>) {
    let old = m.node(label);
    let mut node = Node::new(old.op_type.clone());
    node.attributes = old.attributes.clone();
    (node, old.inputs().to_vec())
}

/// Nodes behind a Transpose that are searched for one that undoes it.
const MAX_SEARCH: usize = 16;

const BINARY: &[&str] = &["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"];

/// Whether a Transpose of `value` may move behind `node`, which reads it.
fn passes(m: &Match, node: &Node, value: ValueId) -> bool {
    // One element, in no more than one axis, is the same whatever the order of axes.
    let scalar = |v: &Option<ValueId>| {
        let constant = v.and_then(|v| m.graph().constant(v));
        *v == Some(value) || constant.is_some_and(|c| c.len() == 1 && c.dims().len() <= 1)
    };
    let op = node.op_type.as_str();
    let softmax = matches!(op, "Softmax" | "LogSoftmax") && m.opset() >= 13;
    let binary = BINARY.contains(&op) && node.inputs().len() == 2 && node.inputs().iter().all(scalar);
    node.is_standard() && (softmax || binary || (Trait::Unary.of(node) && node.input(0) == Some(value)))
}

/// Moves a Transpose behind a node where further on another one undoes it, or joins it before a node with two operands.
fn sink(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (graph, perm) = (m.graph(), m.perm("inner")?);
    let before = m.made("inner");
    m.only_if(passes(m, m.node("middle"), before))?;
    let same = |node: &Node| node.ints("perm").is_some_and(|p| p.iter().zip(&perm).all(|(&a, &b)| a == b as i64));
    let undone = |node: &Node| {
        let undoes = |p: &[i64]| p.iter().enumerate().all(|(at, &axis)| perm.get(axis as usize) == Some(&at));
        node.ints("perm").is_some_and(undoes)
    };
    let mut at = m.value("output");
    let mut worthwhile = false;
    for _ in 0..MAX_SEARCH {
        let mut uses = graph.value(at).uses().iter();
        let (Some(Use::Node(id, _)), None) = (uses.next(), uses.next()) else { break };
        let node = graph.node(*id);
        let joined = |v: &ValueId| {
            let producer = graph.producer(*v).map(|p| graph.node(p));
            *v != at && producer.is_some_and(|p| p.is("Transpose") && same(p)) && m.facts().same_shape(*v, at)
        };
        let joins = BINARY.contains(&node.op_type.as_str()) && node.inputs().iter().flatten().any(joined);
        worthwhile = node.is_standard() && (joins || (node.is("Transpose") && undone(node)));
        if worthwhile || node.scope() != m.scope() || !passes(m, node, at) {
            break;
        }
        at = node.output(0).ok_or(Refusal::NoMatch)?;
    }
    m.only_if(worthwhile)?;
    let (mut node, mut inputs) = copy(m, "middle");
    if matches!(node.op_type.as_str(), "Softmax" | "LogSoftmax") {
        let axis = m.axis(node.int("axis").unwrap_or(-1), perm.len())?;
        node.set_attribute("axis", perm[axis] as i64);
    }
    for input in &mut inputs {
        if *input == Some(before) {
            *input = Some(m.value("x"));
        }
    }
    let made = g.node_with(node, &inputs, 1)[0];
    Ok(g.transpose(made, &perm))
}

/// A `Concat` whose parts are all transposed alike, by Transposes that nothing else uses.
fn transpose_after_concat(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (graph, node) = (m.graph(), m.node("node"));
    let mut perm: Option<&[i64]> = None;
    let mut parts = Vec::with_capacity(node.inputs().len());
    m.only_if(node.inputs().len() > 1)?;
    for &part in node.inputs().iter().flatten() {
        let producer = graph.producer(part).map(|id| graph.node(id)).ok_or(Refusal::NoMatch)?;
        let private = graph.value(part).uses().iter().all(|u| matches!(u, Use::Node(id, _) if *id == m.root()));
        m.only_if(producer.is("Transpose") && private && producer.scope() == node.scope())?;
        let own = producer.ints("perm").ok_or(Refusal::NoMatch)?;
        m.only_if(perm.is_none_or(|perm| perm == own))?;
        perm = Some(own);
        parts.push(producer.input(0));
    }
    let perm: Vec<usize> = perm.unwrap_or_default().iter().filter_map(|&axis| usize::try_from(axis).ok()).collect();
    let axis = m.axis(node.int("axis").unwrap_or(1), perm.len())?;
    let joined = g.node_with(Node::new("Concat").with("axis", perm[axis] as i64), &parts, 1)[0];
    Ok(g.transpose(joined, &perm))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn composes_two_transposes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[2,3,4] x) => (float[4,2,3] y) {
                t = Transpose <perm = [1, 0, 2]> (x)
                y = Transpose <perm = [2, 1, 0]> (t)
            }";
        insta::assert_snapshot!(check(&SimplifyTransposes, graph), @"
        g (float[2,3,4] x) => (float[4,2,3] y) {
            y = Transpose <perm = [2, 0, 1]> (x)  # float[4,2,3]
        }
        ");
    }

    #[test]
    fn turns_keys_without_grouping_heads() {
        let graph = |to: &str| {
            format!(
                r#"<ir_version: 8, opset_import: ["" : 17]>
                g (float[B,2,S,8] x) => (float[B,2,8,S] y)
                <int64[1] front = {{-1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}}, int64[1] zero = {{0}}> {{
                    s = Shape (x)
                    lead = Slice (s, zero, two)
                    rows = Slice (s, two, three)
                    columns = Slice (s, three, four)
                    grouped = Concat <axis = 0> (front, rows, columns)
                    split = Concat <axis = 0> ({to})
                    a = Reshape (x, grouped)
                    b = Transpose <perm = [0, 2, 1]> (a)
                    y = Reshape (b, split)
                }}"#
            )
        };
        let printed = check(&SimplifyTransposes, &graph("lead, columns, rows"));
        assert!(printed.contains("y = Transpose <perm = [0, 1, 3, 2]> (x)"), "{printed}");
        let other = graph("lead, rows, columns").replace("float[B,2,8,S] y", "float[B,2,S,8] y");
        crate::testing::check_untouched(&SimplifyTransposes, &other);
    }

    #[test]
    fn cancels_across_elementwise_nodes_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (bool c, float[2,3,4] x, float[2,3,4] z) => (float[2,3,4] y) <float two = {2}> {
                y = If (c) <then_branch = yes () => (float[2,3,4] p) {
                    a = Transpose <perm = [1, 2, 0]> (x)
                    b = Relu (a)
                    e = Div (two, b)
                    w = Transpose <perm = [1, 2, 0]> (z)
                    d = Sub (w, e)
                    s = Softmax <axis = 0> (d)
                    p = Transpose <perm = [2, 0, 1]> (s)
                }, else_branch = no () => (float[2,3,4] q) { q = Neg (x) }>
            }";
        insta::assert_snapshot!(check(&SimplifyTransposes, graph), @"
        g (bool c, float[2,3,4] x, float[2,3,4] z) => (float[2,3,4] y) <
            float two = {2}
        > {
            y = If (c) <then_branch = yes () => (s_1) {
                b_1 = Relu (x)
                e_1 = Div (two, b_1)
                d_1 = Sub (z, e_1)
                s_1 = Softmax <axis = 1> (d_1)
            }, else_branch = no () => (float[2,3,4] q) {
                q = Neg (x)  # float[2,3,4]
            }>  # float[2,3,4]
        }
        ");
    }

    #[test]
    fn joins_first_and_permutes_once() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,3,4] x, float[n,5,4] z) => (float[n,4,8] y, float[1,n,1] r) {
                a = Transpose <perm = [0, 2, 1]> (x)
                b = Transpose <perm = [0, 2, 1]> (z)
                y = Concat <axis = 2> (a, b)
                s = ReduceMean <axes = [1, 2]> (x)
                r = Transpose <perm = [1, 0, 2]> (s)
            }";
        insta::assert_snapshot!(check(&SimplifyTransposes, graph), @"
        g (float[n,3,4] x, float[n,5,4] z) => (float[n,4,8] y, float[1,n,1] r) <
            int64[3] r_shape = {1, -1, 1}
        > {
            s = ReduceMean <axes = [1, 2]> (x)
            y_1 = Concat <axis = 1> (x, z)
            y = Transpose <perm = [0, 2, 1]> (y_1)  # float[n,4,8]
            r = Reshape (s, r_shape)  # float[1,n,1]
        }
        ");
    }

    #[test]
    fn moves_a_reduce_before_the_transposes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,3,4] x) => (float[n,1,4] y) {
                a = Transpose <perm = [2, 0, 1]> (x)
                s = ReduceMax <axes = [-1]> (a)
                y = Transpose <perm = [1, 2, 0]> (s)
            }";
        insta::assert_snapshot!(check(&SimplifyTransposes, graph), @"
        g (float[n,3,4] x) => (float[n,1,4] y) {
            y = ReduceMax <axes = [1]> (x)  # float[n,1,4]
        }
        ");
    }

    #[test]
    fn keeps_a_transpose_that_is_an_output() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[2,3,4] x) => (float[3,2,4] t, float[4,2,3] y) {
                t = Transpose <perm = [1, 0, 2]> (x)
                y = Transpose <perm = [2, 1, 0]> (t)
            }";
        check_refuses(&SimplifyTransposes, graph, "an inner value is a graph output");
    }

    #[test]
    fn keeps_transposes_of_other_shapes_and_forms() {
        let refuses = |graph: &str, reason: &str| {
            let graph = format!("<ir_version: 8, opset_import: [\"\" : 18]> g (float[n,3] x, float[m,3] z) {graph}");
            check_refuses(&SimplifyTransposes, &graph, reason);
        };
        let pair =
            "=> (float[3,n] y) { a = Transpose <perm = [1, 0]> (x) b = Transpose <perm = [1, 0]> (z) y = Add (a, b) }";
        refuses(pair, "the operands are not provably of one shape");
        let all = "=> (float[n,3] y) { a = Transpose <perm = [1, 0]> (x) r = ReduceMax <noop_with_empty_axes = 1> (a) y = Transpose <perm = [1, 0]> (r) }";
        refuses(all, "the Reduce states no axes");
        let empty = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[1,n,m] x) => (float[n,1,m] y) { y = Transpose <perm = [1, 0, 2]> (x) }";
        check_refuses(&SimplifyTransposes, empty, "a size is inferred beside one that may be 0");
        let unknown = "<ir_version: 8, opset_import: [\"\" : 17, \"custom\" : 1]> g (float[2] x) => (float[2] y) { a = custom.F (x) b = Transpose (a) y = Transpose (b) }";
        check_refuses(&SimplifyTransposes, unknown, "the number of axes is unknown");
    }

    #[test]
    fn leaves_permutations_that_are_none() {
        for perm in ["[0, -1, 1]", "[0, 0, 1]", "[0, 1]"] {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 17]>
                g (float[2,3,4] x) => (float[a,b,c] y) {{
                    t = Transpose <perm = {perm}> (x)
                    y = Transpose <perm = {perm}> (t)
                }}"
            );
            check_refuses(&SimplifyTransposes, &graph, "the permutation is not one of the axes");
        }
    }

    #[test]
    fn keeps_transposes_that_nothing_undoes() {
        let keeps = |body: &str| {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g (float[2,2,2] x, float[2,2,2] z) => (float[] y) {{ {body} }}"
            );
            crate::testing::check_untouched(&SimplifyTransposes, &graph);
        };
        let two = "a = Transpose <perm = [1, 0, 2]> (x) b = Transpose <perm = [0, 2, 1]> (z)";
        keeps(&format!("{two} y = Add (a, b)"));
        keeps(&format!("{two} y = Concat <axis = 0> (a, b)"));
        keeps("a = Transpose <perm = [1, 0, 2]> (x) b = Neg (z) y = Concat <axis = 0> (a, b)");
        keeps(
            "a = Transpose <perm = [1, 2, 0]> (x) r = ReduceMax <axes = [0]> (a) y = Transpose <perm = [2, 1, 0]> (r)",
        );
        keeps("a = Transpose <perm = [1, 2, 0]> (x) b = Neg (a) y = Abs (b)");
    }
}
