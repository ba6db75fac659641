//! Folds constant sums into the biases of layers.

use super::linear::{Gain, Layer, LayerKind, RTOL, operands, require_no_growth, require_private};
use super::rounding::{Sum, is_weight_type, sums};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FoldBias;

static INFO: Info = Info {
    name: "fold-bias",
    summary: "folds constant sums into the bias of a layer before or after them",
    doc: "A sum or difference with a constant of one number, or of one number a channel, goes into the bias of the \
          Conv, ConvTranspose or Gemm before it, or into that of a Conv, Gemm or MatMul with a constant sum after it \
          if nothing pads the input in between. Constants added one after the other become one. Computed in float64 \
          and rounded once. Declines on constants that other nodes share, where a copy would enlarge the file, and on \
          constants that cancel: the original rounds away digits beside them that would come back.",
    options: &[],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

impl Pass for FoldBias {
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
        rule("add-after-layer", pat!(Add(layer: Conv|ConvTranspose|Gemm(_, _, ..), c)), |m, g| after(m, g, 1.0, 1.0)),
        rule("subtract-after-layer", pat!(Sub(layer: Conv|ConvTranspose|Gemm(_, _, ..), c)), |m, g| {
            after(m, g, 1.0, -1.0)
        }),
        rule("subtract-layer", pat!(Sub(c, layer: Conv|ConvTranspose|Gemm(_, _, ..))), |m, g| after(m, g, -1.0, 1.0)),
        rule("add-before-layer", pat!(layer: Conv|Gemm(sum: Add(a, b), _, ..)), |m, g| {
            let (x, c) = operands(m, "a", "b")?;
            before(m, g, x, c, 1.0)
        }),
        rule("subtract-before-layer", pat!(layer: Conv|Gemm(sum: Sub(a, b), _, ..)), |m, g| {
            let c = m.graph().constant(m.value("b")).ok_or(Refusal::NoMatch)?;
            before(m, g, m.value("a"), c, -1.0)
        }),
        rule("add-before-layer-and-add", pat!(Add(layer: MatMul(sum: Add(a, b), _), c)), before_matmul),
        rule("merge-sums", pat!(outer: Add|Sub(inner: Add|Sub(a, b), c)), merge_sums),
    ]
}

/// A layer whose output is multiplied by `gain` (1 or −1) and to which `sign` times the constant `c` is added.
fn after(m: &Match, g: &mut Patch, gain: f64, sign: f64) -> Result<ValueId, Refusal> {
    let c = m.graph().constant(m.value("c")).ok_or(Refusal::NoMatch)?;
    let layer = Layer::at(m, m.id("layer"))?;
    require_private(m)?;
    let shift = layer.gain(c)?.map(|c| c * sign);
    let folded = layer.then(g, &Gain::All(gain), &shift)?;
    require_no_growth(m, g)?;
    Ok(folded)
}

/// A layer whose input is `x` plus `sign` times a constant.
fn before(m: &Match, g: &mut Patch, x: ValueId, c: &Tensor, sign: f64) -> Result<ValueId, Refusal> {
    let layer = Layer::at(m, m.id("layer"))?;
    require_private(m)?;
    let sum = m.node("sum").output(0).ok_or(Refusal::NoMatch)?;
    let shift = layer.input_gain(m, x, sum, c)?.map(|c| c * sign);
    let folded = layer.on(g, x, &Gain::ONE, &shift)?;
    require_no_growth(m, g)?;
    Ok(folded)
}

/// `(x + c)·W + d` is `x·W + (c·W + d)`.
fn before_matmul(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, c) = operands(m, "a", "b")?;
    let d = m.graph().constant(m.value("c")).ok_or(Refusal::NoMatch)?;
    let layer = Layer::at(m, m.id("layer"))?;
    m.only_if(layer.kind == LayerKind::MatMul && is_weight_type(d.dtype()))?;
    require_private(m)?;
    let sum = m.node("sum").output(0).ok_or(Refusal::NoMatch)?;
    let shift = layer.input_gain(m, x, sum, c)?;
    let response = layer.response(&shift)?;
    let old = layer.gain(d)?;
    let all: Vec<Sum> = (0..layer.outputs).map(|i| response.at(i).plus(old.at(i))).collect();
    let mut inputs = m.node("layer").inputs().to_vec();
    inputs[0] = Some(x);
    let product = g.node_with(m.node("layer").clone(), &inputs, 1)[0];
    let bias = g.constant("bias", sums(d.dtype(), &[layer.outputs], &all)?);
    let made = g.node(m.graph().node(m.root()).clone(), &[product, bias]);
    require_no_growth(m, g)?;
    Ok(made)
}

/// `(x ± a) ± b` is `x + (±a ± b)`.
fn merge_sums(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, inner) = operands(m, "a", "b")?;
    let outer = m.graph().constant(m.value("c")).ok_or(Refusal::NoMatch)?;
    let signs = [(m.node("inner"), inner), (m.node("outer"), outer)];
    let second =
        |node: &Node, c: &Tensor| node.input(1).and_then(|v| m.graph().constant(v)).is_some_and(|t| t.same_bits(c));
    // A constant minus a computed value changes the sign of the value: left to the layer that makes it.
    m.only_if(signs.iter().all(|(node, c)| node.op_type == "Add" || second(node, c)))?;
    m.only_if(is_weight_type(inner.dtype()) && inner.len().max(outer.len()) <= 1 << 20)?;
    require_private(m)?;
    let dims = match (inner.len(), outer.len()) {
        _ if inner.dims() == outer.dims() => inner.dims(),
        (1, _) if inner.dims().len() <= outer.dims().len() => outer.dims(),
        (_, 1) if outer.dims().len() <= inner.dims().len() => inner.dims(),
        _ => return Err("the constants have different shapes".into()),
    };
    let read = |index: usize| -> Result<Gain, Refusal> {
        let (node, c) = signs[index];
        let sign = if node.op_type == "Sub" { -1.0 } else { 1.0 };
        let numbers: Vec<f64> = c.to_f64s().ok_or(Refusal::NoMatch)?.iter().map(|x| x * sign).collect();
        Ok(if numbers.len() == 1 { Gain::All(numbers[0]) } else { Gain::Each(numbers) })
    };
    let (first, second) = (read(0)?, read(1)?);
    let count = inner.len().max(outer.len());
    let all: Vec<Sum> = (0..count).map(|i| Sum::of(first.at(i), 1.0).plus(second.at(i))).collect();
    let constant = g.constant("sum", sums(inner.dtype(), dims, &all)?);
    let made = g.node(Node::new("Add"), &[x, constant]);
    require_no_growth(m, g)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    const CONV: &str = "float[2,2,2,2] w = {1, 2, 3, 4, 5, 6, 7, 8, -1, 2, -3, 4, -5, 6, -7, 8}, float[2] b = {1, -1}";

    fn graph(weights: &str, body: &str) -> String {
        format!(
            "<ir_version: 8, opset_import: [\"\" : 13]>
             g (float[N,2,4,4] x) => (float[N,2,H,W] y) <{CONV}, {weights}> {{ {body} }}"
        )
    }

    #[test]
    fn folds_sums_on_both_sides_of_a_conv() {
        let weights = "float[1] k = {3}, float[1,2,1,1] c = {2, -4}";
        let body = "r = Relu (x) p = Add (c, r) q = Sub (p, k) t = Conv (q, w, b) u = Add (k, t) v = Sub (u, c)
                    n = Sub (k, v) y = Relu (n)";
        assert_snapshot!(check(&FoldBias, &graph(weights, body)), @r#"
        g (float[N,2,4,4] x) => (float[N,2,H,W] y) <
            float[2,2,2,2] w = ["elements": "16", "hash": "c88641e5"],
            float[2] b = {1, -1},
            float[1] k = {3},
            float[1,2,1,1] c = {2, -4},
            float[1,2,1,1] q_sum = {-1, -7},
            float[2] t_bias = {-191, -17},
            float[2] u_bias = {-188, -14},
            float[2] v_bias = {-190, -10},
            float[2] n_bias = {193, 13},
            float[2,2,2,2] n_weight = ["elements": "16", "hash": "4703a534"]
        > {
            r = Relu (x)
            n = Conv (r, n_weight, n_bias)
            y = Relu (n)  # float[N,2,H,W]
        }
        "#);
    }

    #[test]
    fn gives_a_conv_transpose_a_bias() {
        let body = "t = ConvTranspose <strides = [2, 2]> (x, w) y = Add (t, c)";
        check(&FoldBias, &graph("float[1,2,1,1] c = {2, -4}", body));
    }

    #[test]
    fn folds_through_matmul_into_the_sum_after_it() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 13]>
            g (float[N,3,2] x) => (float[N,3,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}, float[1,1,2] c = {5, 6}> {
                t = Add (x, c) u = MatMul (t, w) v = Add (b, u) z = Sub (v, b) y = Relu (z) }";
        assert_snapshot!(check(&FoldBias, graph), @"
        g (float[N,3,2] x) => (float[N,3,2] y) <
            float[2,2] w = {1, 2, 3, 4},
            float[2] b = {1, 2},
            float[1,1,2] c = {5, 6},
            float[2] v_bias = {24, 36},
            float[2] z_sum = {23, 34}
        > {
            v_1 = MatMul (x, w)
            z = Add (v_1, z_sum)
            y = Relu (z)  # float[N,3,2]
        }
        ");
    }

    #[test]
    fn folds_into_a_gemm() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 13]>
            g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[1,2] b = {1, 2}, float[2] c = {5, 6}> {
                r = Relu (x) s = Sub (r, c) t = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (s, w, b) y = Add (t, c) }";
        check(&FoldBias, graph);
    }

    #[test]
    fn keeps_constants_that_cancel() {
        let of = |elem: &str, weights: &str, body: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g ({elem}[N,2] x) => ({elem}[N,2] y) <{weights}> {{ {body} }}"
            )
        };
        let refuses = |elem: &str, weights: &str, body: &str| {
            check_refuses(&FoldBias, &of(elem, weights, body), "the constants cancel");
        };
        let pair = "a = Add (x, c) y = Sub (a, c)";
        refuses("float", "float c = {1e10}", pair);
        refuses("float16", "float16 c = {1000.0}", pair);
        refuses("double", "double[2] c = {1e20, 2e20}", pair);
        check(&FoldBias, &of("float", "float c = {2}, float d = {-1}", "a = Add (x, c) b = Add (a, d) y = Neg (b)"));
        let layer = "float[2,2] w = {1, 1, -1, -1}, float[2] c = {1e10, 1e10}, float[2] d = {1, 2}";
        refuses("float", layer, "t = Gemm (x, w, c) y = Sub (t, c)");
        refuses("float", layer, "s = Add (x, c) y = Gemm (s, w, d)");
        refuses("float", layer, "s = Add (x, c) t = MatMul (s, w) y = Add (t, d)");
    }

    #[test]
    fn works_inside_a_subgraph() {
        let body = "z = Shape (x) o = Size (z) e = Cast <to = 9> (o)
            y = If (e) <then_branch = a () => (float[N,2,3,3] p) { t = Conv (x, w) p = Add (t, k) },
                        else_branch = c () => (float[N,2,3,3] q) { q = Conv (x, w, b) }>";
        check(&FoldBias, &graph("float[1] k = {3}", body));
    }

    #[test]
    fn keeps_what_it_must() {
        let refuses = |weights: &str, body: &str, reason: &str| check_refuses(&FoldBias, &graph(weights, body), reason);
        let body = "t = Add (x, k) y = Conv <pads = [1, 1, 1, 1]> (t, w)";
        refuses("float[1] k = {3}", body, "the Conv pads its input");
        refuses("float[4] k = {1, 2, 3, 4}", "t = Conv <pads = [0,0,1,1]> (x, w) y = Add (t, k)", "neither one number");
        refuses("float[1] k = {1}", "t = Conv (x, w) u = Add (t, k) y = Mul (t, u)", "an inner value has other uses");
        let graph = format!(
            "<ir_version: 8, opset_import: [\"\" : 13]> g (float[N,2,4,4] x) =>
            (float[N,2,3,3] t, float[N,2,3,3] y) <{CONV}, float k = {{2}}> {{ t = Conv (x, w) y = Add (t, k) }}"
        );
        check_refuses(&FoldBias, &graph, "an inner value has other uses");
    }

    #[test]
    fn keeps_sums_of_other_shapes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[2,2] x) => (float[2,2] y)
            <float[2] a = {1, 2}, float[2,1] b = {3, 4}> { s = Add (x, a) y = Add (s, b) }";
        check_refuses(&FoldBias, graph, "the constants have different shapes");
    }

    #[test]
    fn keeps_layers_and_constants_that_cannot_take_a_sum() {
        let graph = |body: &str| {
            let many = vec!["1"; 300].join(", ");
            format!("<ir_version: 8, opset_import: [\"\" : 17]> g (float[N,2] x, float[N,300] u) => (float[N,2] y, float[N,300] z)
                <float[2,2] w = {{1, 2, 3, 4}}, float[1,2,2] stack = {{1, 2, 3, 4}}, float[2] c = {{1, 2}}, float[2] d = {{3, 4}},
                 float[2,2,1,1] k = {{1, 2, 3, 4}}, float[300] p = {{{many}}}, float[300] q = {{{many}}}> {{ {body} }}")
        };
        let stacked = graph("s = Add (x, c) t = MatMul (s, stack) a = Add (t, d) y = Squeeze (a) z = Neg (u)");
        check_refuses(&FoldBias, &stacked, "the weight is a stack of matrices");
        let grouped =
            graph("s = Reshape (x, i) a = Add (s, c) t = Conv <group = 3> (a, k) y = Flatten (t) z = Neg (u)");
        let grouped = grouped.replace("float[2] c =", "int64[4] i = {0, 2, 1, 1}, float[2] c =");
        check_refuses(&FoldBias, &grouped, "the weight does not fit its operator");
        let shared = graph("y = Neg (x) a = Add (u, p) b = Add (a, q) e = Mul (p, q) z = Mul (b, e)");
        check_refuses(&FoldBias, &shared, "a constant is shared with other nodes: a copy would enlarge the file");
        let computed =
            graph("t = Gemm (x, w, bias) y = Add (t, c) z = Neg (u) bias = ReduceMax <axes = [0], keepdims = 0> (x)");
        check_refuses(
            &FoldBias,
            &computed
                .replace("t = Gemm", "bias = ReduceMax <axes = [0], keepdims = 0> (x) t = Gemm")
                .replace(" bias = ReduceMax <axes = [0], keepdims = 0> (x) }", " }"),
            "the bias is not a constant",
        );
    }
}
