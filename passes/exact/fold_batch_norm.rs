//! Folds batch normalization into the weights of a neighbouring layer, or constants into batch normalization.

use super::linear::{Gain, Layer, LayerKind, RTOL, operands, require_no_growth, require_private};
use super::rounding::{Sum, factors, require_no_cancellation, sums};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FoldBatchNorm;

static INFO: Info = Info {
    name: "fold-batch-norm",
    summary: "folds BatchNormalization into the layer before or after it, and constants into BatchNormalization",
    doc: "In inference a BatchNormalization multiplies every channel by γ/√(σ²+ε) and adds a constant. After Conv, \
          ConvTranspose, Gemm or MatMul both go into the weights and the bias; before a Conv or Gemm too, if nothing \
          pads the input. Where there is no such layer, constants that are multiplied or added just before or after it \
          and a second BatchNormalization go into its scale and bias. Computed in float64 and rounded once. Declines \
          in training mode, on weights that other nodes share, where a constant is not one number a channel, and where \
          constants cancel or would lose digits.",
    options: &[],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes, Saving::Parameters, Saving::Flops],
    source: None,
};

impl Pass for FoldBatchNorm {
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
        rule(
            "norm-after-layer",
            pat!(norm: BatchNormalization(layer: Conv|ConvTranspose|Gemm|MatMul(_, _, ..), _, _, _, _)),
            |m, g| {
                let layer = Layer::at(m, m.id("layer"))?;
                let norm = Norm::of(m, "norm")?;
                require_private(m)?;
                let flat = layer.ndim == Some(2) || !matches!(layer.kind, LayerKind::MatMul);
                m.require(flat, "the channels of MatMul are the last axis, those of BatchNormalization the second")?;
                m.require(norm.channels() == layer.outputs, "the layer has another number of channels")?;
                let (gain, shift) = norm.affine();
                let folded = layer.then(g, &gain, &shift)?;
                require_no_growth(m, g)?;
                Ok(folded)
            },
        ),
        rule("norm-before-layer", pat!(layer: Conv|Gemm(norm: BatchNormalization(x, _, _, _, _), _, ..)), |m, g| {
            let layer = Layer::at(m, m.id("layer"))?;
            let norm = Norm::of(m, "norm")?;
            require_private(m)?;
            m.require(norm.channels() == layer.inputs, "the layer has another number of channels")?;
            let (gain, shift) = norm.affine();
            let folded = layer.on(g, m.value("x"), &gain, &shift)?;
            require_no_growth(m, g)?;
            Ok(folded)
        }),
        rule(
            "norm-after-norm",
            pat!(outer: BatchNormalization(inner: BatchNormalization(x, _, _, _, _), _, _, _, _)),
            |m, g| {
                let (outer, inner) = (Norm::of(m, "outer")?, Norm::of(m, "inner")?);
                require_private(m)?;
                m.require(outer.channels() == inner.channels(), "the norms have different numbers of channels")?;
                let (gain, shift) = outer.affine();
                inner.with(m, g, m.value("x"), &gain, &shift)
            },
        ),
        rule("scale-after-norm", pat!(Mul(norm: BatchNormalization(x, _, _, _, _), c)), |m, g| {
            let norm = Norm::before(m)?;
            let gain = norm.constant(m, m.tensor("c")?)?;
            norm.with(m, g, m.value("x"), &gain, &Gain::ZERO)
        }),
        rule("divide-after-norm", pat!(Div(norm: BatchNormalization(x, _, _, _, _), c)), |m, g| {
            let norm = Norm::before(m)?;
            let gain = norm.constant(m, m.tensor("c")?)?.map(|x| 1.0 / x);
            norm.with(m, g, m.value("x"), &gain, &Gain::ZERO)
        }),
        rule("shift-after-norm", pat!(Add(norm: BatchNormalization(x, _, _, _, _), c)), |m, g| {
            let norm = Norm::before(m)?;
            let shift = norm.constant(m, m.tensor("c")?)?;
            norm.with(m, g, m.value("x"), &Gain::ONE, &shift)
        }),
        rule("subtract-after-norm", pat!(Sub(norm: BatchNormalization(x, _, _, _, _), c)), |m, g| {
            let norm = Norm::before(m)?;
            let shift = norm.constant(m, m.tensor("c")?)?.map(|x| -x);
            norm.with(m, g, m.value("x"), &Gain::ONE, &shift)
        }),
        rule("scale-before-norm", pat!(norm: BatchNormalization(Mul(a, b), _, _, _, _)), |m, g| {
            let (x, c) = operands(m, "a", "b")?;
            let norm = Norm::of(m, "norm")?;
            let gain = norm.constant_before(m, x, c)?;
            // γ(xg − μ)/√… + β = γg(x − μ)/√… + β + γμ(g − 1)/√…
            let (slope, _) = norm.affine();
            let moved = slope.zip(&norm.mean, |a, mean| a * mean);
            norm.require_beside_mean(&moved.zip(&gain, |a, g| a * g), &Gain::ZERO)?;
            norm.with_own(m, g, x, &gain, &moved.zip(&gain, |a, g| a * (g - 1.0)))
        }),
        rule("shift-before-norm", pat!(norm: BatchNormalization(Add(a, b), _, _, _, _)), |m, g| {
            let (x, c) = operands(m, "a", "b")?;
            let norm = Norm::of(m, "norm")?;
            let (slope, _) = norm.affine();
            let shift = slope.zip(&norm.constant_before(m, x, c)?, |a, c| a * c);
            norm.require_beside_mean(&shift, &shift)?;
            norm.with_own(m, g, x, &Gain::ONE, &shift)
        }),
    ]
}

/// A BatchNormalization in inference with constant parameters.
struct Norm<'a> {
    node: &'a Node,
    parameters: [&'a Tensor; 4],
    scale: Gain,
    bias: Gain,
    mean: Gain,
    var: Gain,
    ndim: Option<usize>,
}

impl<'a> Norm<'a> {
    fn of(m: &Match<'a>, label: &str) -> Result<Norm<'a>, Refusal> {
        let node = m.node(label);
        m.require(m.opset() >= 6, "before opset 6 BatchNormalization is another operator")?;
        m.require(node.outputs().len() == 1, "the node asks for training outputs")?;
        m.require(node.int("training_mode").unwrap_or(0) == 0, "the node is in training mode")?;
        m.require(m.opset() >= 7 || node.int("is_test") == Some(1), "the node is in training mode")?;
        m.require(node.int("spatial").unwrap_or(1) == 1, "the node has statistics for every position")?;
        let tensor = |index: usize| {
            let tensor = node.input(index).and_then(|v| m.graph().constant(v));
            tensor.ok_or("a parameter of the node is not a constant")
        };
        let parameters = [tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?];
        let size = parameters[0].len();
        let read = |tensor: &Tensor| -> Result<Gain, Refusal> {
            if tensor.dims() != [size] {
                return Err("the parameters have different shapes".into());
            }
            let numbers = tensor.to_f64s().ok_or("the parameters are no numbers")?;
            let gain = Gain::Each(numbers);
            gain.require_finite()?;
            Ok(gain)
        };
        let [scale, bias, mean, var] =
            [read(parameters[0])?, read(parameters[1])?, read(parameters[2])?, read(parameters[3])?];
        let norm =
            Norm { node, parameters, scale, bias, mean, var, ndim: m.facts().ndim(node.output(0).ok_or("unused")?) };
        norm.affine().0.require_finite()?;
        Ok(norm)
    }

    /// The norm that the constant `c` after it goes into.
    fn before(m: &Match<'a>) -> Result<Norm<'a>, Refusal> {
        m.only_if(m.graph().constant(m.value("c")).is_some())?;
        require_private(m)?;
        Norm::of(m, "norm")
    }

    fn channels(&self) -> usize {
        self.parameters[0].len()
    }

    /// What a channel is multiplied with, and what is added to it then.
    fn affine(&self) -> (Gain, Gain) {
        let epsilon = f64::from(self.node.float("epsilon").unwrap_or(1e-5));
        let slope = self.scale.zip(&self.var, |scale, var| scale / (var + epsilon).sqrt());
        let shift = self.bias.zip(&slope.zip(&self.mean, |a, mean| a * mean), |bias, moved| bias - moved);
        (slope, shift)
    }

    /// A constant of the shape of a channel.
    fn constant(&self, m: &Match, tensor: &Tensor) -> Result<Gain, Refusal> {
        let ndim = self.ndim.ok_or("the number of axes is unknown")?;
        m.require(ndim >= 2, "the value has no channel axis")?;
        Gain::read(tensor, Some(ndim), ndim - 2, self.channels())
    }

    /// The constant of a node between `x` and the norm, which must not widen `x`.
    fn constant_before(&self, m: &Match, x: ValueId, tensor: &Tensor) -> Result<Gain, Refusal> {
        require_private(m)?;
        let same = m.facts().same_shape(x, m.value("output"));
        m.require(same, "the constant may give the value more elements")?;
        self.constant(m, tensor)
    }

    /// This norm on `x`, its output multiplied by `gain` and then added to `shift`.
    fn with(&self, m: &Match, g: &mut Patch, x: ValueId, gain: &Gain, shift: &Gain) -> Result<ValueId, Refusal> {
        let scale = self.scale.zip(gain, |scale, gain| scale * gain);
        let bias = |i: usize| Sum::of(self.bias.at(i) * gain.at(i), scale.at(i)).plus(shift.at(i));
        self.rebuilt(m, g, x, gain, bias)
    }

    /// This norm on `x`, its scale multiplied by `gain` and `shift` added to its bias.
    fn with_own(&self, m: &Match, g: &mut Patch, x: ValueId, gain: &Gain, shift: &Gain) -> Result<ValueId, Refusal> {
        let bias = |i: usize| Sum::of(self.bias.at(i), self.scale.at(i)).plus(shift.at(i));
        self.rebuilt(m, g, x, gain, bias)
    }

    /// Refuses where the node comes to add something much larger than `shift` leaves of its mean and its bias: `largest`
    /// and the mean would cancel only when it runs, or have cancelled only before.
    fn require_beside_mean(&self, largest: &Gain, shift: &Gain) -> Result<(), Refusal> {
        let (_, own) = self.affine();
        let sum = |i: usize| Sum::from_parts(own.at(i) + shift.at(i), largest.at(i), self.scale.at(i));
        let all: Vec<Sum> = (0..self.channels()).map(sum).collect();
        require_no_cancellation(self.parameters[1].dtype(), &all)
    }

    fn rebuilt(
        &self,
        m: &Match,
        g: &mut Patch,
        x: ValueId,
        gain: &Gain,
        bias: impl Fn(usize) -> Sum,
    ) -> Result<ValueId, Refusal> {
        let channels = 0..self.channels();
        let dims = [self.channels()];
        let scale: Vec<f64> = channels.clone().map(|i| self.scale.at(i) * gain.at(i)).collect();
        let scale = g.constant("scale", factors(self.parameters[0].dtype(), &dims, &scale)?);
        let bias: Vec<Sum> = channels.map(bias).collect();
        let bias = g.constant("bias", sums(self.parameters[1].dtype(), &dims, &bias)?);
        let inputs = [Some(x), Some(scale), Some(bias), self.node.input(3), self.node.input(4)];
        let made = g.node_with(self.node.clone(), &inputs, 1)[0];
        require_no_growth(m, g)?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    const NORM: &str =
        "float[2] s = {0.5, -2}, float[2] b = {1, 0.25}, float[2] m = {0.1, -0.3}, float[2] v = {0.9, 2}";

    fn graph(more: &str, body: &str) -> String {
        format!(
            "<ir_version: 8, opset_import: [\"\" : 13]> \
             g (float[N,2,4,4] x) => (float[N,2,H,W] y) <{NORM}{more}> {{ {body} }}"
        )
    }

    #[test]
    fn folds_into_a_conv() {
        let w = ", float[2,2,1,1] w = {1, 2, 3, 4}, float[2] c = {1, -1}";
        assert_snapshot!(check(&FoldBatchNorm, &graph(w, "t = Conv (x, w, c) y = BatchNormalization (t, s, b, m, v)")), @"
        g (float[N,2,4,4] x) => (float[N,2,H,W] y) <
            float[2] s = {0.5, -2},
            float[2] b = {1, 0.25},
            float[2] m = {0.1, -0.3},
            float[2] v = {0.9, 2},
            float[2,2,1,1] w = {1, 2, 3, 4},
            float[2] c = {1, -1},
            float[2] y_bias = {1.474339, 1.239947},
            float[2,2,1,1] y_weight = {0.52704334, 1.0540867, -4.24263, -5.6568403}
        > {
            y = Conv (x, y_weight, y_bias)  # float[N,2,H,W]
        }
        ");
    }

    #[test]
    fn folds_into_a_conv_without_bias_and_with_groups() {
        let w = ", float[2,1,3,3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}";
        let body =
            "t = Conv <group = 2, pads = [1,1,1,1]> (x, w) y = BatchNormalization <epsilon = 0.01> (t, s, b, m, v)";
        check(&FoldBatchNorm, &graph(w, body));
    }

    #[test]
    fn folds_into_a_grouped_conv_transpose() {
        let w = ", float[2,1,2,2] w = {1, 2, 3, 4, 5, 6, 7, 8}";
        let body = "t = ConvTranspose <group = 2, strides = [2,2]> (x, w) y = BatchNormalization (t, s, b, m, v)";
        check(&FoldBatchNorm, &graph(w, body));
    }

    #[test]
    fn folds_into_the_conv_after_it() {
        let w = ", float[2,2,2,2] w = {1, 2, 3, 4, 5, 6, 7, 8, -1, 2, -3, 4, -5, 6, -7, 8}";
        check(&FoldBatchNorm, &graph(w, "t = BatchNormalization (x, s, b, m, v) y = Conv (t, w)"));
    }

    #[test]
    fn composes_with_constants_on_both_sides_and_with_a_second_norm() {
        let c = ", float[2,1,1] f = {3, -1}, float[1] h = {2}";
        let body = "t = BatchNormalization (x, s, b, m, v) u = Mul (t, f) w = Add (h, u) r = Sub (w, f) q = Div (r, f)
                    p = BatchNormalization (q, s, b, m, v) y = Relu (p)";
        assert_snapshot!(check(&FoldBatchNorm, &graph(c, body)), @"
        g (float[N,2,4,4] x) => (float[N,2,H,W] y) <
            float[2] s = {0.5, -2},
            float[2] b = {1, 0.25},
            float[2] m = {0.1, -0.3},
            float[2] v = {0.9, 2},
            float[2,1,1] f = {3, -1},
            float[1] h = {2},
            float[2] u_scale = {1.5, 2},
            float[2] u_bias = {3, -0.25},
            float[2] w_scale = {1.5, 2},
            float[2] w_bias = {5, 1.75},
            float[2] r_scale = {1.5, 2},
            float[2] r_bias = {2, 2.75},
            float[2] q_scale = {0.5, -2},
            float[2] q_bias = {0.6666667, -2.75},
            float[2] p_scale = {0.26352167, 2.8284202},
            float[2] p_bias = {1.2986579, 3.7148147}
        > {
            p = BatchNormalization (x, p_scale, p_bias, m, v)
            y = Relu (p)  # float[N,2,H,W]
        }
        ");
        let body = "u = Mul (x, f) w = Add (h, u) t = BatchNormalization (w, s, b, m, v) y = Relu (t)";
        check(&FoldBatchNorm, &graph(c, body));
    }

    #[test]
    fn makes_a_gemm_of_a_matmul() {
        let graph = format!(
            "g (float[N,3] x) => (float[N,2] y) <{NORM}, float[3,2] w = {{1, 2, 3, 4, 5, 6}}> {{
            t = MatMul (x, w) y = BatchNormalization (t, s, b, m, v) }}"
        );
        assert_snapshot!(check(&FoldBatchNorm, &graph), @"
        g (float[N,3] x) => (float[N,2] y) <
            float[2] s = {0.5, -2},
            float[2] b = {1, 0.25},
            float[2] m = {0.1, -0.3},
            float[2] v = {0.9, 2},
            float[3,2] w = {1, 2, 3, 4, 5, 6},
            float[2] y_bias = {0.94729567, -0.17426303},
            float[3,2] y_weight = {0.52704334, -2.8284202, 1.58113, -5.6568403, 2.6352167, -8.48526}
        > {
            y = Gemm (x, y_weight, y_bias)  # float[N,2]
        }
        ");
    }

    #[test]
    fn folds_into_a_gemm_with_alpha_and_beta() {
        let graph = format!(
            "g (float[N,3] x) => (float[N,2] y) <{NORM}, float[2,3] w = {{1, 2, 3, 4, 5, 6}}, float[2] c = {{1, 2}}> {{
            t = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, c) y = BatchNormalization (t, s, b, m, v) }}"
        );
        check(&FoldBatchNorm, &graph);
    }

    #[test]
    fn works_inside_a_subgraph() {
        let w = ", float[2,2,1,1] w = {1, 2, 3, 4}, bool[1] k = {1}";
        let body = "z = Shape (x) o = Size (z) e = Cast <to = 9> (o)
            y = If (e) <then_branch = a () => (float[N,2,4,4] p) { t = Conv (x, w) p = BatchNormalization (t, s, b, m, v) },
                        else_branch = c () => (float[N,2,4,4] q) { q = Identity (x) }>";
        check(&FoldBatchNorm, &graph(w, body));
    }

    #[test]
    fn keeps_what_it_must() {
        let pointwise = ", float[2,2,1,1] w = {1, 2, 3, 4}";
        let norm = "BatchNormalization (t, s, b, m, v)";
        let padded = ", float[1,2,3,3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}";
        let body = "t = BatchNormalization (x, s, b, m, v) y = Conv <pads = [1,1,1,1]> (t, w)";
        check_refuses(&FoldBatchNorm, &graph(padded, body), "the Conv pads its input");
        let body = format!("t = Conv (x, w) u = {norm} y = Add (t, u)");
        check_refuses(&FoldBatchNorm, &graph(pointwise, &body), "an inner value has other uses");
        let body = "t = Conv (x, w) y, a, c = BatchNormalization <training_mode = 1> (t, s, b, m, v)";
        let training = graph(pointwise, body).replace(": 13", ": 15");
        check_refuses(&FoldBatchNorm, &training, "the node asks for training outputs");
    }

    #[test]
    fn keeps_constants_that_cancel_or_lose_digits() {
        let refuses = |weights: &str, body: &str, reason: &str| {
            check_refuses(&FoldBatchNorm, &graph(weights, body), reason);
        };
        let cancels = "the constants cancel";
        let far = ", float[2,2,1,1] w = {1, 2, 3, 4}, float[2] c = {1e10, 2e10}, float[1] k = {1e10}, float[2] k2 = {1e10, 1e10}";
        refuses(far, "t = Conv (x, w, c) y = BatchNormalization (t, s, b, c, v)", cancels);
        refuses(far, "t = Add (x, k) y = BatchNormalization (t, s, b, c, v)", cancels);
        refuses(far, "t = Mul (x, k) y = BatchNormalization (t, s, b, m, v)", cancels);
        refuses(far, "t = BatchNormalization (x, s, k2, m, v) y = Sub (t, k)", cancels);
        let small = ", float[2] k2 = {1e-25, 2e-25}, float[2,1,1] f = {1e-20, 1e-20}";
        refuses(small, "t = BatchNormalization (x, k2, b, m, v) y = Mul (t, f)", "too small for its type");
    }

    #[test]
    fn keeps_an_inner_graph_output_and_a_shared_weight() {
        let graph = format!("g (float[N,2,4,4] x) => (float[N,2,4,4] t, float[N,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> {{
            t = Conv (x, w) y = BatchNormalization (t, s, b, m, v) }}");
        check_refuses(&FoldBatchNorm, &graph, "an inner value has other uses");
        let many = vec!["1"; 2048].join(", ");
        let graph = format!(
            "g (float[N,1024,4] x) => (float[N,2,4] y, float[N,2,4] z) <{NORM}, float[2,1024,1] w = {{{many}}}> {{
            z = Conv (x, w) t = Conv (x, w) y = BatchNormalization (t, s, b, m, v) }}"
        );
        check_refuses(&FoldBatchNorm, &graph, "the weight is shared");
    }

    #[test]
    fn keeps_norms_that_are_no_affine_map_of_channels() {
        let refuses = |opset: i64, weights: &str, body: &str, reason: &str| {
            let ir_version = if opset < 9 { 3 } else { 8 };
            let graph = format!(
                "<ir_version: {ir_version}, opset_import: [\"\" : {opset}]> \
                 g (float[N,2,4,4] x) => (float[N,2,H,W] y) <{NORM}{weights}> {{ {body} }}"
            );
            check_refuses(&FoldBatchNorm, &graph, reason);
        };
        let w = ", float[2,2,1,1] w = {1, 2, 3, 4}";
        // drop-dead has taken the outputs that only training has.
        let body = "t = Conv (x, w) y = BatchNormalization <training_mode = 1> (t, s, b, m, v)";
        refuses(15, w, body, "the node is in training mode");
        let body = "t = Conv (x, w) y = BatchNormalization (t, s, b, m, v)";
        refuses(6, w, body, "the node is in training mode");
        refuses(5, w, body, "before opset 6 BatchNormalization is another operator");
        let body = "t = Conv (x, w) y = BatchNormalization <spatial = 0> (t, s, b, m, v)";
        refuses(7, w, body, "the node has statistics for every position");
        let body = "z = Exp (v) t = Conv (x, w) y = BatchNormalization (t, s, b, m, z)";
        refuses(13, w, body, "a parameter of the node is not a constant");
        let odd = ", float[2,2,1,1] w = {1, 2, 3, 4}, float[1,2] p = {1, 2}, float[2] q = {-1, -1}";
        refuses(
            13,
            odd,
            "t = Conv (x, w) y = BatchNormalization (t, s, p, m, v)",
            "the parameters have different shapes",
        );
        refuses(
            13,
            odd,
            "t = Conv (x, w) y = BatchNormalization (t, s, b, m, q)",
            "a constant is infinite or not a number",
        );
        let three = ", float[3,2,1,1] w = {1, 2, 3, 4, 5, 6}, float[3] e = {1, 2, 3}";
        refuses(13, three, "t = Conv (x, w) y = BatchNormalization (t, s, b, m, v)", "another number of channels");
        refuses(13, three, "t = BatchNormalization (x, e, e, e, e) y = Conv (t, w)", "another number of channels");
        let norms = "t = BatchNormalization (x, e, e, e, e) y = BatchNormalization (t, s, b, m, v)";
        refuses(13, three, norms, "the norms have different numbers of channels");
        let wide = ", float[1,2,1,4] k = {1, 2, 3, 4, 5, 6, 7, 8}";
        refuses(
            13,
            wide,
            "t = BatchNormalization (x, s, b, m, v) y = Mul (t, k)",
            "neither one number nor one number a channel",
        );
        let widened = "z = ReduceMean <axes = [1]> (x) t = Mul (z, f) y = BatchNormalization (t, s, b, m, v)";
        refuses(13, ", float[2,1,1] f = {1, 2}", widened, "the constant may give the value more elements");
        let stacked = "g (float[B,N,2] x) => (float[B,N,2] y) <float[2,2] w = {1, 2, 3, 4}, NORM> {
            t = MatMul (x, w) y = BatchNormalization (t, s, b, m, v) }";
        check_refuses(&FoldBatchNorm, &stacked.replace("NORM", NORM), "the channels of MatMul are the last axis");
        let unknown = "<ir_version: 8, opset_import: [\"\" : 13, \"custom\" : 1]>
            g (float[N,2] x) => (float[N,2] y) <NORM, float k = {2}> {
                a = custom.F (x) t = BatchNormalization (a, s, b, m, v) y = Mul (t, k) }";
        check_refuses(&FoldBatchNorm, &unknown.replace("NORM", NORM), "the number of axes is unknown");
    }

    #[test]
    fn keeps_products_that_gemm_cannot_take() {
        let graph = |opset: i64, elem: &str, attributes: &str| {
            let (ir_version, norm) = (if opset < 9 { 3 } else { 8 }, NORM.replace("float", elem));
            let (norm, weight) = match elem {
                "float" => (norm, "float[2,2] w = {1, 2, 3, 4}"),
                _ => (
                    norm.replace("{1,", "{1.0,").replace("-2}", "-2.0}").replace("2}", "2.0}"),
                    "bfloat16[2,2] w = {1.0, 2.0, 3.0, 4.0}",
                ),
            };
            format!("<ir_version: {ir_version}, opset_import: [\"\" : {opset}]> g ({elem}[N,2] x) => ({elem}[N,2] y) <{norm}, {weight}> {{
                t = MatMul (x, w) y = BatchNormalization{attributes} (t, s, b, m, v) }}")
        };
        let old = graph(6, "float", " <is_test = 1>");
        check_refuses(&FoldBatchNorm, &old, "before opset 7 Gemm broadcasts only where an attribute says so");
        check_refuses(&FoldBatchNorm, &graph(9, "bfloat16", ""), "Gemm has no bfloat16 before opset 13");
    }

    #[test]
    fn keeps_constants_after_a_value_without_channels() {
        let graph = format!(
            "g (float[2] x) => (float[2] y) <{NORM}, float k = {{2}}> {{
            t = BatchNormalization (x, s, b, m, v) y = Mul (t, k) }}"
        );
        check_refuses(&FoldBatchNorm, &graph, "the value has no channel axis");
    }
}
