//! Moves Pads into the convolution or pooling that reads them.

use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Replacement, Rule, Saving, operands::int64s, pat,
    rewrite, rule,
};
use lathe_ir::{Model, Node, Patch};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FoldPads;

static INFO: Info = Info {
    name: "fold-pads",
    summary: "moves Pads into the convolution or pooling that reads them",
    doc: "A Pad of the spatial axes whose result only one Conv, AveragePool or MaxPool reads becomes part of that node's \
          own pads. A Conv and an AveragePool that counts its padding need constant zeros, a MaxPool needs minus \
          infinity. Declines for other modes, negative pads, automatic padding and computed amounts.",
    options: &[],
    // Engines begin a maximum at the lowest finite number and a sum at +0, so infinities and -0 may come out otherwise.
    kind: Kind::Equivalent { rtol: 1e-6 },
    lowers: &[Saving::Nodes, Saving::PeakMemory],
    source: None,
};

impl Pass for FoldPads {
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
        rule("pad-into-conv", pat!(node: Conv(pad: Pad(x, ..), ..)), |m, g| fold(m, g, 0.0)),
        rule("pad-into-average-pool", pat!(node: AveragePool(pad: Pad(x, ..))), |m, g| {
            let counted = m.node("node").int("count_include_pad") == Some(1);
            m.require(counted, "the pool leaves padding out of its averages")?;
            // With ceil_mode a window may reach past the padding, where it counts fewer elements.
            m.require(m.node("node").int("ceil_mode").unwrap_or(0) == 0, "the pool rounds its size up")?;
            fold(m, g, 0.0)
        }),
        rule("pad-into-max-pool", pat!(node: MaxPool(pad: Pad(x, ..))), |m, g| {
            m.require(m.node("node").outputs().len() == 1, "the indices of the maxima are used")?;
            m.require(m.node("node").int("ceil_mode").unwrap_or(0) == 0, "the pool rounds its size up")?;
            fold(m, g, f64::NEG_INFINITY)
        }),
    ]
}

fn fold(m: &Match, g: &mut Patch, filler: f64) -> Result<Replacement, Refusal> {
    let (node, pad) = (m.node("node"), m.node("pad"));
    m.require(pad.string("mode").is_none_or(|mode| mode == "constant"), "the Pad does not fill with a constant")?;
    let automatic = node.string("auto_pad").is_some_and(|mode| mode != "NOTSET");
    m.require(!automatic, "the node chooses its own padding")?;
    let value = match (pad.float("value"), pad.input(2)) {
        (Some(value), _) => f64::from(value),
        (None, None) => 0.0,
        (None, Some(value)) => {
            let value = m.graph().constant(value).and_then(|t| t.scalar_f64());
            value.ok_or("the value that fills is not a constant")?
        }
    };
    m.require(value == filler, "the Pad fills with another value than the node does")?;
    let ndim = m.ndim("x")?;
    let added = amounts(m, pad, ndim)?;
    m.only_if(ndim > 2)?;
    m.require(added.iter().all(|&(low, high)| low >= 0 && high >= 0), "a pad is negative")?;
    m.require(added[..2] == [(0, 0); 2], "a batch or channel axis is padded")?;
    let spatial = ndim - 2;
    let own = node.ints("pads").map_or_else(|| vec![0; 2 * spatial], <[i64]>::to_vec);
    m.require(own.len() == 2 * spatial, "the node's pads do not fit its input")?;
    let mut pads = own;
    for (axis, (low, high)) in added[2..].iter().enumerate() {
        pads[axis] = pads[axis].checked_add(*low).ok_or("the pads overflow")?;
        pads[axis + spatial] = pads[axis + spatial].checked_add(*high).ok_or("the pads overflow")?;
    }
    if node.is("MaxPool") || node.is("AveragePool") {
        // A window that lies in padding alone is not allowed.
        let kernel = node.ints("kernel_shape").ok_or("the pool has no kernel shape")?;
        let fits = (0..2 * spatial).all(|i| kernel.get(i % spatial).is_some_and(|&k| pads[i] < k));
        m.require(fits, "a window would lie in padding alone")?;
    }
    let mut made = Node::new(node.op_type.clone());
    made.attributes = node.attributes.clone();
    made.set_attribute("pads", pads);
    let mut inputs = node.inputs().to_vec();
    inputs[0] = Some(m.value("x"));
    Ok(g.node_with(made, &inputs, 1).into())
}

/// How much a Pad adds before and after each axis.
fn amounts(m: &Match, pad: &Node, ndim: usize) -> Result<Vec<(i64, i64)>, Refusal> {
    let name = if pad.attribute("paddings").is_some() { "paddings" } else { "pads" };
    let pads = int64s(m, pad, name, 1)?.ok_or("the Pad states no pads")?;
    let axes = match pad.input(3) {
        None => (0..ndim).collect(),
        Some(axes) => {
            let axes = m.known_int64s(axes).ok_or("the axes of the Pad are computed")?;
            axes.into_iter().map(|axis| m.axis(axis, ndim)).collect::<Result<Vec<_>, _>>()?
        }
    };
    m.require(pads.len() == 2 * axes.len(), "the Pad has amounts that do not fit its axes")?;
    let mut added = vec![(0, 0); ndim];
    for (index, &axis) in axes.iter().enumerate() {
        added[axis] = (pads[index], pads[index + axes.len()]);
    }
    Ok(added)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn moves_a_pad_into_a_convolution() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,1,5,5] x) => (float[n,1,6,5] y)
               <int64[8] pads = {0, 0, 1, 0, 0, 0, 2, 1}, float[1,1,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {
                p = Pad (x, pads)
                y = Conv <pads = [0, 1, 0, 0]> (p, w)
            }";
        insta::assert_snapshot!(check(&FoldPads, graph), @r#"
        g (float[n,1,5,5] x) => (float[n,1,6,5] y) <
            int64[8] pads = {0, 0, 1, 0, 0, 0, 2, 1},
            float[1,1,3,3] w = ["elements": "9", "hash": "b51b62c8"]
        > {
            y = Conv <pads = [1, 1, 2, 1]> (x, w)  # float[n,1,6,5]
        }
        "#);
    }

    #[test]
    fn moves_pads_into_pools_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (bool c, float[n,1,5,5] x) => (float[n,1,6,6] y)
               <int64[4] pads = {1, 1, 1, 1}, int64[2] axes = {2, 3}, float low = {-inf}, float zero = {0}> {
                y = If (c) <then_branch = yes () => (float[n,1,6,6] a) {
                    p = Pad (x, pads, low, axes)
                    a = MaxPool <kernel_shape = [2, 2]> (p)
                }, else_branch = no () => (float[n,1,6,6] b) {
                    q = Pad (x, pads, zero, axes)
                    b = AveragePool <kernel_shape = [2, 2], count_include_pad = 1> (q)
                }>
            }";
        insta::assert_snapshot!(check(&FoldPads, graph), @"
        g (bool c, float[n,1,5,5] x) => (float[n,1,6,6] y) <
            int64[4] pads = {1, 1, 1, 1},
            int64[2] axes = {2, 3},
            float low = {-inf},
            float zero = {0}
        > {
            y = If (c) <then_branch = yes () => (a_1) {
                a_1 = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 1, 1]> (x)
            }, else_branch = no () => (b_1) {
                b_1 = AveragePool <kernel_shape = [2, 2], count_include_pad = 1, pads = [1, 1, 1, 1]> (x)
            }>  # float[n,1,6,6]
        }
        ");
    }

    #[test]
    fn keeps_pads_that_the_node_fills_otherwise() {
        let pool = |node: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]>
                g (float[n,1,5,5] x) => (float[n,1,6,6] y) <int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}> {{
                    p = Pad (x, pads)
                    y = {node} (p)
                }}"
            )
        };
        let average = pool("AveragePool <kernel_shape = [2, 2]>");
        check_refuses(&FoldPads, &average, "the pool leaves padding out of its averages");
        let max = pool("MaxPool <kernel_shape = [2, 2]>");
        check_refuses(&FoldPads, &max, "the Pad fills with another value than the node does");
    }

    #[test]
    fn keeps_a_reflecting_pad() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,1,5] x) => (float[n,1,5] y) <int64[6] pads = {0, 0, 1, 0, 0, 1}, float[1,1,3] w = {1, 2, 3}> {
                p = Pad <mode = \"reflect\"> (x, pads)
                y = Conv (p, w)
            }";
        check_refuses(&FoldPads, graph, "the Pad does not fill with a constant");
    }

    #[test]
    fn keeps_a_padded_channel_axis() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,1,5] x) => (float[n,1,3] y) <int64[6] pads = {0, 1, 0, 0, 0, 0}, float[1,2,3] w = {1, 2, 3, 4, 5, 6}> {
                p = Pad (x, pads)
                y = Conv (p, w)
            }";
        check_refuses(&FoldPads, graph, "a batch or channel axis is padded");
    }

    /// A graph with a Pad before a node.
    fn padded(opset: i64, sizes: &str, weights: &str, body: &str) -> String {
        let ir_version = if opset < 10 { 3 } else { 8 };
        format!(
            "<ir_version: {ir_version}, opset_import: [\"\" : {opset}]>
            g (float[{sizes}] x, int64[6] amounts, float fill) => (float[a,b,c] y)
               <float[1,1,3] w = {{1, 2, 3}}, int64[6] one = {{0, 0, 1, 0, 0, 1}}, float low = {{-inf}}{weights}> {{ {body} }}"
        )
    }

    #[test]
    fn keeps_pads_of_nodes_that_round_or_choose_their_size() {
        let refuses = |body: &str, reason: &str| check_refuses(&FoldPads, &padded(17, "1,1,5", "", body), reason);
        let up = "the pool rounds its size up";
        refuses("p = Pad (x, one) y = AveragePool <kernel_shape = [2], count_include_pad = 1, ceil_mode = 1> (p)", up);
        refuses("p = Pad (x, one, low) y = MaxPool <kernel_shape = [2], ceil_mode = 1> (p)", up);
        refuses("p = Pad (x, one) y = Conv <auto_pad = \"SAME_UPPER\"> (p, w)", "the node chooses its own padding");
        refuses(
            "p = Pad (x, one, low) m, i = MaxPool <kernel_shape = [2]> (p) j = Cast <to = 1> (i) y = Add (m, j)",
            "the indices of the maxima are used",
        );
    }

    #[test]
    fn keeps_pads_by_amounts_that_the_node_cannot_take() {
        let refuses = |weights: &str, body: &str, reason: &str| {
            check_refuses(&FoldPads, &padded(18, "1,1,5", weights, body), reason);
        };
        let conv = "y = Conv (p, w)";
        refuses("", &format!("p = Pad (x, one, fill) {conv}"), "the value that fills is not a constant");
        refuses("", &format!("p = Pad (x, amounts) {conv}"), "the pads of a Pad are computed");
        refuses("", &format!("p = Pad (x) {conv}"), "the Pad states no pads");
        refuses("", "p = Pad (x, one, low) y = MaxPool (p)", "the pool has no kernel shape");
        let negative = ", int64[6] less = {0, 0, -1, 0, 0, 1}";
        refuses(negative, &format!("p = Pad (x, less) {conv}"), "a pad is negative");
        let end = ", int64[6] less = {0, 0, 1, 0, 0, -1}";
        refuses(end, &format!("p = Pad (x, less) {conv}"), "a pad is negative");
        let far = ", int64[6] far = {0, 0, 9223372036854775807, 0, 0, 0}";
        refuses(far, "p = Pad (x, far) y = Conv <pads = [1, 1]> (p, w)", "the pads overflow");
        refuses("", "p = Pad (x, one) y = Conv <pads = [1, 1, 1]> (p, w)", "the node's pads do not fit its input");
        let pool = "y = MaxPool <kernel_shape = [2]> (p)";
        let two = ", int64[6] two = {0, 0, 2, 0, 0, 0}, int64[6] after = {0, 0, 0, 0, 0, 2}";
        refuses(two, &format!("p = Pad (x, two, low) {pool}"), "a window would lie in padding alone");
        refuses(two, &format!("p = Pad (x, after, low) {pool}"), "a window would lie in padding alone");
        let axes = ", int64[2] some = {1, 1}, int64[1] first = {0}, int64[2] both = {1, 2}";
        refuses(axes, &format!("p = Pad (x, some, , both) {conv}"), "the Pad has amounts that do not fit its axes");
        refuses(
            axes,
            &format!("d = Cast <to = 7> (fill) e = Unsqueeze (d, first) p = Pad (x, some, , e) {conv}"),
            "the axes of the Pad are computed",
        );
    }

    #[test]
    fn gives_a_pool_the_most_that_its_window_reaches() {
        let body = "p = Pad (x, one, low) y = MaxPool <kernel_shape = [2]> (p)";
        check(&FoldPads, &padded(17, "1,1,5", "", body));
        let old = "p = Pad <pads = [0, 0, 1, 0, 0, 1]> (x) y = Conv (p, w)";
        check(&FoldPads, &padded(10, "1,1,5", "", old));
    }
}
