//! Folds constant factors into the weights of layers.

use super::linear::{Gain, Layer, RTOL, operands, require_no_growth, require_no_growth_over, require_private};
use super::rounding::{Sum, factors, is_weight_type, require_moderate, sums};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, NodeId, Patch, Tensor, Use, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FoldScale;

static INFO: Info = Info {
    name: "fold-scale",
    summary: "folds constant factors into the weights of a layer before or after them",
    doc: "A product with a constant (Mul, Div, Neg) of one number, or of one number a channel, goes into the weight and \
          bias of the Conv, ConvTranspose, Gemm or MatMul beside it. A single number also moves towards such a layer \
          through Reshape, Transpose and the like, constant sums and products, and through one side of a MatMul of two \
          computed values: so the 1/√d of attention goes into the query projection. A factor before a constant sum \
          before a layer goes into the layer, and its reciprocal into the sum. Computed in float64 and rounded once. \
          Declines on the half of a GELU, which runtimes know as a whole, on weights that other nodes share, and where a \
          constant would leave the range of its type or be so small that it loses digits.",
    options: &[],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

impl Pass for FoldScale {
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
        rule("multiply-after-layer", pat!(Mul(a, b)), |m, g| {
            let (x, c) = operands(m, "a", "b")?;
            after(m, g, x, c, |c| c)
        }),
        rule("divide-after-layer", pat!(Div(a, b)), |m, g| {
            let c = m.graph().constant(m.value("b")).ok_or(Refusal::NoMatch)?;
            after(m, g, m.value("a"), c, |c| 1.0 / c)
        }),
        rule("negate-after-layer", pat!(Neg(a)), |m, g| {
            let minus = Tensor::from_f32s(&[], &[-1.0]);
            after(m, g, m.value("a"), &minus, |c| c)
        }),
        rule("multiply-before-layer", pat!(layer: Conv|ConvTranspose|Gemm|MatMul(scale: Mul(a, b), _, ..)), |m, g| {
            let (x, c) = operands(m, "a", "b")?;
            before(m, g, x, c, |c| c)
        }),
        rule("divide-before-layer", pat!(layer: Conv|ConvTranspose|Gemm|MatMul(scale: Div(a, b), _, ..)), |m, g| {
            let c = m.graph().constant(m.value("b")).ok_or(Refusal::NoMatch)?;
            before(m, g, m.value("a"), c, |c| 1.0 / c)
        }),
        rule("negate-before-layer", pat!(layer: Conv|ConvTranspose|Gemm|MatMul(scale: Neg(a), _, ..)), |m, g| {
            let minus = Tensor::from_f32s(&[], &[-1.0]);
            before(m, g, m.value("a"), &minus, |c| c)
        }),
        rule(
            "multiply-before-shift-before-layer",
            pat!(layer: Conv|ConvTranspose|Gemm|MatMul(sum: Add(scale: Mul(a, b), c), _, ..)),
            before_shift,
        ),
    ]
}

/// A factor after whatever makes `x`.
fn after(m: &Match, g: &mut Patch, x: ValueId, c: &Tensor, factor: impl Fn(f64) -> f64) -> Result<ValueId, Refusal> {
    m.only_if(is_weight_type(c.dtype()) && uses_once(m, x, m.root()))?;
    let mut walk = Walk { m, nodes: vec![m.root()] };
    let made = match c.len() {
        1 => {
            let ndim = m.facts().ndim(x);
            m.only_if(walk.leads_to_weights(x, m.root(), MAX_DEPTH))?;
            let narrow = c.dims().is_empty() || ndim.is_some_and(|n| c.dims().len() <= n);
            m.require(narrow, "the constant may have more axes than the value")?;
            let gain = factor(c.scalar_f64().ok_or(Refusal::NoMatch)?);
            Gain::All(gain).require_finite()?;
            require_moderate(c.dtype(), &[gain])?;
            walk.scale(g, x, m.root(), gain, MAX_DEPTH)?
        }
        _ => walk.scale_channels(g, x, c, factor)?,
    };
    require_no_growth_over(m, g, &walk.nodes)?;
    Ok(made)
}

/// How many nodes a single number moves past.
const MAX_DEPTH: usize = 12;

/// Operators that only move elements about: a factor of all elements passes them.
const MOVERS: &[&str] =
    &["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Tile", "Slice"];

/// A walk from a factor towards the inputs.
struct Walk<'m, 'a> {
    m: &'m Match<'a>,
    /// What becomes superfluous.
    nodes: Vec<NodeId>,
}

impl<'a> Walk<'_, 'a> {
    /// The node that makes `value`, if only `user` uses it.
    fn maker(&self, value: ValueId, user: NodeId) -> Option<(NodeId, &'a Node)> {
        let graph = self.m.graph();
        let id = graph.producer(value)?;
        let node = graph.node(id);
        let here = node.scope() == self.m.scope() && node.is_standard() && node.outputs().len() == 1;
        (here && uses_once(self.m, value, user)).then_some((id, node))
    }

    /// The computed operand of a sum or product with a constant, and which input the constant is.
    fn computed(&self, node: &Node) -> Option<(ValueId, usize)> {
        let (a, b) = (node.input(0)?, node.input(1)?);
        match (self.m.graph().constant(a), self.m.graph().constant(b)) {
            (None, Some(c)) if is_weight_type(c.dtype()) => Some((a, 1)),
            (Some(c), None) if is_weight_type(c.dtype()) => Some((b, 0)),
            _ => None,
        }
    }

    /// Whether a factor of `value`, used by `user` only, reaches constants that take it.
    fn leads_to_weights(&self, value: ValueId, user: NodeId, depth: usize) -> bool {
        let Some((id, node)) = self.maker(value, user) else { return false };
        if depth == 0 {
            return false;
        }
        let further = |index: usize| node.input(index).is_some_and(|v| self.leads_to_weights(v, id, depth - 1));
        match node.op_type.as_str() {
            "Mul" => self.computed(node).is_some(),
            "Div" => self.computed(node).is_some_and(|(_, constant)| constant == 1),
            "Add" | "Sub" => self.computed(node).is_some_and(|(x, _)| self.leads_to_weights(x, id, depth - 1)),
            "MatMul" if Layer::at(self.m, id).is_ok() => true,
            "MatMul" => further(0) || further(1),
            op if MOVERS.contains(&op) => further(0),
            _ => Layer::at(self.m, id).is_ok(),
        }
    }

    /// `value` multiplied by `gain`, made again from the constants that take the factor.
    fn scale(
        &mut self,
        g: &mut Patch,
        value: ValueId,
        user: NodeId,
        gain: f64,
        depth: usize,
    ) -> Result<ValueId, Refusal> {
        let m = self.m;
        let (id, _) = self.maker(value, user).ok_or(Refusal::NoMatch)?;
        let node = m.graph().node(id);
        self.nodes.push(id);
        let mut inputs = node.inputs().to_vec();
        match node.op_type.as_str() {
            op @ ("Mul" | "Div" | "Add" | "Sub") => {
                let (x, constant) = self.computed(node).ok_or(Refusal::NoMatch)?;
                let old = inputs[constant].and_then(|v| m.graph().constant(v)).ok_or(Refusal::NoMatch)?;
                let by = if op == "Div" { 1.0 / gain } else { gain };
                let numbers: Vec<f64> = old.to_f64s().ok_or(Refusal::NoMatch)?.iter().map(|x| x * by).collect();
                let is_sum = matches!(op, "Add" | "Sub");
                let scaled = if is_sum {
                    let all: Vec<Sum> = numbers.iter().map(|&x| Sum::of(x, gain)).collect();
                    sums(old.dtype(), old.dims(), &all)?
                } else {
                    if let [number] = numbers[..] {
                        require_moderate(old.dtype(), &[number / by, number])?;
                    }
                    factors(old.dtype(), old.dims(), &numbers)?
                };
                inputs[constant] = Some(g.constant("scaled", scaled));
                if is_sum {
                    inputs[1 - constant] = Some(self.scale(g, x, id, gain, depth - 1)?);
                }
            }
            "MatMul" if Layer::at(m, id).is_err() => {
                let left = inputs[0].filter(|&v| self.leads_to_weights(v, id, depth - 1));
                let side = usize::from(left.is_none());
                let x = inputs[side].ok_or(Refusal::NoMatch)?;
                inputs[side] = Some(self.scale(g, x, id, gain, depth - 1)?);
            }
            op if MOVERS.contains(&op) => {
                let x = inputs[0].ok_or(Refusal::NoMatch)?;
                inputs[0] = Some(self.scale(g, x, id, gain, depth - 1)?);
            }
            _ => return Layer::at(m, id)?.then(g, &Gain::All(gain), &Gain::ZERO),
        }
        Ok(g.node_with(node.clone(), &inputs, 1)[0])
    }

    /// `value` multiplied channel by channel, where a layer makes it, or a layer and a constant sum.
    fn scale_channels(
        &mut self,
        g: &mut Patch,
        value: ValueId,
        c: &Tensor,
        factor: impl Fn(f64) -> f64,
    ) -> Result<ValueId, Refusal> {
        let m = self.m;
        let (id, node) = self.maker(value, m.root()).ok_or(Refusal::NoMatch)?;
        self.nodes.push(id);
        if let Ok(layer) = Layer::at(m, id) {
            let gain = layer.gain(c)?.map(factor);
            gain.require_finite()?;
            return layer.then(g, &gain, &Gain::ZERO);
        }
        m.only_if(matches!(node.op_type.as_str(), "Add" | "Sub"))?;
        let (x, constant) = self.computed(node).ok_or(Refusal::NoMatch)?;
        let (inner, _) = self.maker(x, id).ok_or(Refusal::NoMatch)?;
        let layer = Layer::at(m, inner)?;
        self.nodes.push(inner);
        let gain = layer.gain(c)?.map(factor);
        gain.require_finite()?;
        let old = node.input(constant).and_then(|v| m.graph().constant(v)).ok_or(Refusal::NoMatch)?;
        let scaled = layer.gain(old)?.zip(&gain, |old, gain| old * gain);
        let mut inputs = node.inputs().to_vec();
        inputs[1 - constant] = Some(layer.then(g, &gain, &Gain::ZERO)?);
        inputs[constant] = Some(channel_constant(g, old, &scaled, &gain, layer.outputs, layer.trailing_axes())?);
        Ok(g.node_with(node.clone(), &inputs, 1)[0])
    }
}

/// Whether `user` reads `value` at one input and nothing else does.
fn uses_once(m: &Match, value: ValueId, user: NodeId) -> bool {
    let uses = m.graph().value(value).uses();
    uses.len() == 1 && matches!(uses.first(), Some(Use::Node(id, _)) if *id == user)
}

/// A constant like `old` that holds `terms` along the channel axis, to be added to values of the size `beside`.
fn channel_constant(
    g: &mut Patch,
    old: &Tensor,
    terms: &Gain,
    beside: &Gain,
    channels: usize,
    from_end: usize,
) -> Result<ValueId, Refusal> {
    let sum = |channel: usize| Sum::of(terms.at(channel), beside.at(channel));
    let tensor = match terms {
        Gain::All(_) => sums(old.dtype(), old.dims(), &[sum(0)])?,
        Gain::Each(_) => {
            let mut dims = vec![channels];
            dims.resize(1 + from_end, 1);
            sums(old.dtype(), &dims, &(0..channels).map(sum).collect::<Vec<Sum>>())?
        }
    };
    Ok(g.constant("scaled", tensor))
}

/// A factor of the input of a layer.
fn before(m: &Match, g: &mut Patch, x: ValueId, c: &Tensor, factor: impl Fn(f64) -> f64) -> Result<ValueId, Refusal> {
    let layer = Layer::at(m, m.id("layer"))?;
    m.only_if(is_weight_type(c.dtype()))?;
    require_private(m)?;
    m.require(!ends_gelu(m, x), "the factor ends a GELU, which runtimes know as a whole")?;
    let product = m.node("scale").output(0).ok_or(Refusal::NoMatch)?;
    let gain = layer.input_gain(m, x, product, c)?.map(factor);
    gain.require_finite()?;
    if let Gain::All(gain) = gain {
        require_moderate(c.dtype(), &[gain])?;
    }
    let folded = layer.on(g, x, &gain, &Gain::ZERO)?;
    require_no_growth(m, g)?;
    Ok(folded)
}

/// Whether `x` is `a·(1 + erf(…))` or `a·(1 + tanh(…))`, which takes a half to be an activation that runtimes fuse.
fn ends_gelu(m: &Match, x: ValueId) -> bool {
    let graph = m.graph();
    let made = |value: Option<ValueId>, op: &str| {
        let node = graph.node(graph.producer(value?)?);
        node.is(op).then_some(node)
    };
    let gate = |value: &Option<ValueId>| {
        let Some(sum) = made(*value, "Add") else { return false };
        sum.inputs().iter().any(|&part| made(part, "Erf").or(made(part, "Tanh")).is_some())
    };
    made(Some(x), "Mul").is_some_and(|product| product.inputs().iter().any(gate))
}

/// `(x·k + c)·W` is `(x + c/k)·kW`.
fn before_shift(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, k) = operands(m, "a", "b")?;
    let c = m.graph().constant(m.value("c")).ok_or(Refusal::NoMatch)?;
    m.only_if(is_weight_type(c.dtype()) && is_weight_type(k.dtype()))?;
    let layer = Layer::at(m, m.id("layer"))?;
    require_private(m)?;
    let sum = m.node("sum").output(0).ok_or(Refusal::NoMatch)?;
    let gain = layer.input_gain(m, x, sum, k)?;
    if let Gain::All(gain) = gain {
        require_moderate(k.dtype(), &[gain])?;
    }
    let shift = layer.input_gain(m, x, sum, c)?.zip(&gain, |c, k| c / k);
    m.require(shift.require_finite().is_ok(), "the factor is zero")?;
    let constant = channel_constant(g, c, &shift, &Gain::ONE, layer.inputs, layer.trailing_axes())?;
    let moved = g.node(m.node("sum").clone(), &[x, constant]);
    let folded = layer.on(g, moved, &gain, &Gain::ZERO)?;
    require_no_growth(m, g)?;
    Ok(folded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    const CONV: &str = "float[2,2,1,1] w = {1, 2, 3, 4}, float[2] b = {1, -1}";

    fn graph(weights: &str, body: &str) -> String {
        format!(
            "<ir_version: 8, opset_import: [\"\" : 13]>
             g (float[N,2,4,4] x) => (float[N,2,H,W] y) <{CONV}, {weights}> {{ {body} }}"
        )
    }

    #[test]
    fn folds_one_number_and_one_a_channel_into_a_conv() {
        let weights = "float[1] k = {3}, float[1,2,1,1] c = {2, -4}";
        let body = "t = Conv (x, w, b) u = Mul (k, t) v = Div (u, c) n = Neg (v) y = Relu (n)";
        assert_snapshot!(check(&FoldScale, &graph(weights, body)), @"
        g (float[N,2,4,4] x) => (float[N,2,H,W] y) <
            float[2,2,1,1] w = {1, 2, 3, 4},
            float[2] b = {1, -1},
            float[1] k = {3},
            float[1,2,1,1] c = {2, -4},
            float[2] u_bias = {3, -3},
            float[2,2,1,1] u_weight = {3, 6, 9, 12},
            float[2] v_bias = {1.5, 0.75},
            float[2,2,1,1] v_weight = {1.5, 3, -2.25, -3},
            float[2] n_bias = {-1.5, -0.75},
            float[2,2,1,1] n_weight = {-1.5, -3, 2.25, 3}
        > {
            n = Conv (x, n_weight, n_bias)
            y = Relu (n)  # float[N,2,H,W]
        }
        ");
    }

    #[test]
    fn folds_into_the_layer_after_it() {
        let weights = "float[1] k = {3}, float[2,1,1] c = {2, -4}";
        let body = "r = Relu (x) t = Mul (r, k) u = Div (t, c) y = Conv <pads = [1,1,1,1]> (u, w, b)";
        check(&FoldScale, &graph(weights, body));
        let body = "r = Relu (x) t = Mul (c, r) u = Neg (t) y = ConvTranspose (u, w, b)";
        check(&FoldScale, &graph(weights, body));
    }

    #[test]
    fn moves_past_a_sum_before_a_padded_conv() {
        let weights = "float[1] k = {3}, float[1] c = {2}";
        let body = "r = Relu (x) t = Mul (r, k) u = Add (t, c) y = Conv <pads = [1,1,1,1]> (u, w, b)";
        assert_snapshot!(check(&FoldScale, &graph(weights, body)), @"
        g (float[N,2,4,4] x) => (float[N,2,H,W] y) <
            float[2,2,1,1] w = {1, 2, 3, 4},
            float[2] b = {1, -1},
            float[1] k = {3},
            float[1] c = {2},
            float[1] y_scaled = {0.6666667},
            float[2,2,1,1] y_weight = {3, 6, 9, 12}
        > {
            r = Relu (x)
            y_1 = Add (r, y_scaled)
            y = Conv <pads = [1, 1, 1, 1]> (y_1, y_weight, b)  # float[N,2,H,W]
        }
        ");
    }

    #[test]
    fn moves_the_scale_of_attention_into_the_query() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 13]>
            g (float[N,3,4] x, float[N,2,2,3] k) => (float[N,2,3,3] y) <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7},
               float[4] b = {1, 2, 3, 4}, int64[4] s = {0, 0, 2, 2}, float r = {2}> {
                t = MatMul (x, w) u = Add (b, t) v = Reshape (u, s) q = Transpose <perm = [0, 2, 1, 3]> (v)
                a = MatMul (q, k) d = Div (a, r) y = Softmax (d)
            }";
        assert_snapshot!(check(&FoldScale, graph), @r#"
        g (float[N,3,4] x, float[N,2,2,3] k) => (float[N,2,3,3] y) <
            float[4,4] w = ["elements": "16", "hash": "a3b2be93"],
            float[4] b = {1, 2, 3, 4},
            int64[4] s = {0, 0, 2, 2},
            float r = {2},
            float[4] d_scaled = {0.5, 1, 1.5, 2},
            float[4,4] d_weight = ["elements": "16", "hash": "00b8b901"]
        > {
            d_1 = MatMul (x, d_weight)
            d_2 = Add (d_scaled, d_1)
            d_3 = Reshape (d_2, s)
            d_4 = Transpose <perm = [0, 2, 1, 3]> (d_3)
            d = MatMul (d_4, k)
            y = Softmax (d)  # float[N,2,3,3]
        }
        "#);
    }

    #[test]
    fn folds_into_gemm_weights_and_attributes() {
        let graph = "g (float[N,2] x) => (float[N,2] y, float[N,2] z) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}, float k = {3}> {
            t = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) y = Mul (t, k) u = Gemm (x, w) z = Mul (u, k) }";
        let graph = format!("<ir_version: 8, opset_import: [\"\" : 13]> {graph}");
        check(&FoldScale, &graph);
    }

    #[test]
    fn leaves_a_gelu_whole() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 13]>
            g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float r = {1.4142135}, float one = {1}, float half = {0.5}> {
                t = MatMul (x, w) d = Div (t, r) e = Erf (d) s = Add (e, one) p = Mul (t, s) h = Mul (p, half) y = MatMul (h, w) }";
        check_refuses(&FoldScale, graph, "the factor ends a GELU, which runtimes know as a whole");
    }

    #[test]
    fn works_inside_a_subgraph() {
        let body = "z = Shape (x) o = Size (z) e = Cast <to = 9> (o)
            y = If (e) <then_branch = a () => (float[N,2,4,4] p) { t = Conv (x, w) p = Mul (t, k) },
                        else_branch = c () => (float[N,2,4,4] q) { q = Identity (x) }>";
        check(&FoldScale, &graph("float[1] k = {3}", body));
    }

    #[test]
    fn keeps_what_it_must() {
        let refuses =
            |weights: &str, body: &str, reason: &str| check_refuses(&FoldScale, &graph(weights, body), reason);
        refuses("float[4] k = {1, 2, 3, 4}", "t = Conv (x, w) y = Mul (t, k)", "neither one number nor one");
        refuses("float[1,1,1,1,1] k = {1}", "t = Conv (x, w) y = Mul (t, k)", "more axes");
        refuses("float[1] k = {0}", "t = Conv (x, w) y = Div (t, k)", "infinite");
        refuses("float[1] k = {2}", "t = Mul (x, k) u = Conv (t, w) y = Add (t, u)", "an inner value has other uses");
        refuses("float[2,1,1] k = {3e38, 3e38}", "t = Conv (x, w) y = Mul (t, k)", "leave the range");
    }

    #[test]
    fn keeps_what_would_lose_digits_or_leave_the_range() {
        let of = |elem: &str, weights: &str, body: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g ({elem}[N,2] x) => ({elem}[N,2] y) <{weights}> {{ {body} }}"
            )
        };
        let (small, far) = ("too small for its type", "a factor is very large or very small");
        let weights = "float16[2,2] w = {0.001, -0.002, 0.003, -0.0005}, float16[1] s = {0.0001}, float16[2] c = {0.0001, 0.0002}";
        check_refuses(&FoldScale, &of("float16", weights, "t = Mul (x, s) y = MatMul (t, w)"), far);
        check_refuses(&FoldScale, &of("float16", weights, "t = Mul (x, c) y = MatMul (t, w)"), small);
        check_refuses(&FoldScale, &of("float16", weights, "t = MatMul (x, w) y = Mul (t, c)"), small);
        let tiny = "float16[2,2] w = {0.001, -0.002, 0.003, -0.0005}, float16[1] s = {0.01}, float16[1] d = {100.0}";
        check_refuses(&FoldScale, &of("float16", tiny, "t = MatMul (x, w) y = Mul (t, s)"), small);
        check_refuses(&FoldScale, &of("float16", tiny, "t = Div (x, d) y = MatMul (t, w)"), small);
        let pair = "t = Mul (x, s) y = Mul (t, s)";
        check_refuses(&FoldScale, &of("float16", "float16 s = {0.0001}", pair), far);
        check_refuses(&FoldScale, &of("float", "float s = {1e-25}", pair), far);
        check_refuses(&FoldScale, &of("float16", "float16 s = {0.0002}", "t = Div (x, s) y = Div (t, s)"), far);
        let channels = "float16 s = {0.01}, float16[2] c = {0.0001, 0.0003}";
        check_refuses(&FoldScale, &of("float16", channels, "t = Mul (x, c) y = Mul (t, s)"), small);
        let square = "float[2,2] w = {1e-20, 2e-20, 3e-20, 4e-20}, float[2] c = {1e-20, 2e-20}";
        check_refuses(&FoldScale, &of("float", square, "t = MatMul (x, w) y = Mul (t, c)"), small);
        let gemm = "float[2,2] w = {1, 2, 3, 4}, float k = {1e-11}";
        let body = "t = Gemm <alpha = 1e-30> (x, w) u = Mul (t, k) v = Gemm (x, w) y = Add (u, v)";
        check_refuses(&FoldScale, &of("float", gemm, body), small);
    }

    #[test]
    fn moves_the_scale_of_attention_in_float16_past_small_biases() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]> g (float16[N,2] x, float16[2,N] k) => (float16[N,N] y)
            <float16[2,2] w = {0.5, -0.25, 0.125, 0.75}, float16[2] b = {0.00005, 0.5}, float16 s = {0.125}> {
                t = MatMul (x, w) u = Add (t, b) a = MatMul (u, k) d = Mul (a, s) y = Softmax (d) }";
        assert!(!check(&FoldScale, graph).contains(" Mul ("));
    }

    #[test]
    fn keeps_factors_that_add_axes_and_zeros_before_sums() {
        let axes = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[N,2] x) => (float[1,N,2] y)
            <float[2,2] w = {1, 2, 3, 4}, float[1,1,1] k = {2}> { t = MatMul (x, w) y = Mul (t, k) }";
        check_refuses(&FoldScale, axes, "the constant may have more axes than the value");
        let zero = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[N,2] x) => (float[N,2] y)
            <float[2,2] w = {1, 2, 3, 4}, float[2] k = {0, 1}, float[2] c = {1, 2}> {
                t = Mul (x, k) s = Add (t, c) y = MatMul (s, w) }";
        check_refuses(&FoldScale, zero, "the factor is zero");
    }

    #[test]
    fn keeps_layers_that_cannot_take_a_factor() {
        let graph = |sizes: &str, weights: &str, body: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g (float[{sizes}] x) => (float[a,b] y) <{weights}> {{ {body} }}"
            )
        };
        let turned = graph(
            "2,N",
            "float[2,2] w = {1, 2, 3, 4}, float[2,1] k = {2, 3}",
            "t = Mul (x, k) y = Gemm <transA = 1> (t, w)",
        );
        check_refuses(&FoldScale, &turned, "the constant is neither one number nor one number a channel");
        let turned = graph(
            "2,2",
            "float[2,2] w = {1, 2, 3, 4}, float[2] k = {2, 3}",
            "t = Mul (x, k) y = Gemm <transA = 1> (t, w)",
        );
        check_refuses(&FoldScale, &turned, "the Gemm transposes its input");
        let infinite =
            graph("N,2", "float[2,2] w = {1, 2, 3, 4}, float[2] k = {2, inf}", "t = MatMul (x, w) y = Mul (t, k)");
        check_refuses(&FoldScale, &infinite, "a constant is infinite or not a number");
        let widened =
            graph("N,1", "float[2,2] w = {1, 2, 3, 4}, float[2] k = {2, 3}", "t = Mul (x, k) y = MatMul (t, w)");
        check_refuses(&FoldScale, &widened, "the constant may give the value more elements");
    }

    #[test]
    fn keeps_a_graph_output_before_the_factor() {
        let graph = format!("<ir_version: 8, opset_import: [\"\" : 13]>
            g (float[N,2,4,4] x) => (float[N,2,4,4] t, float[N,2,4,4] y) <{CONV}, float k = {{2}}> {{ t = Conv (x, w) y = Mul (t, k) }}");
        let mut model = crate::testing::model(&graph);
        let outcome = FoldScale.apply(&mut model, &PassContext::default()).unwrap();
        assert_eq!(outcome, Outcome::default());
    }
}
