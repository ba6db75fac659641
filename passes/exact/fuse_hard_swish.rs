//! Makes HardSigmoid and HardSwish of the nodes that spell them out.

use super::linear::{operands, require_private};
use super::rounding::{attribute, is_weight_type};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{DataType, Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FuseHardSwish;

static INFO: Info = Info {
    name: "fuse-hard-swish",
    summary: "makes HardSigmoid and HardSwish of sums, clips and quotients that spell them out",
    doc: "Clip(x + b, 0, m)/m is HardSigmoid with slope 1/m and offset b/m, and Clip(a·x + b, 0, 1) is one with slope a \
          and offset b, in any order of the product that follows. With slope 1/6 and offset 1/2, its product with x is \
          HardSwish from opset 14 on. Declines where a bound or a constant is not one known number, and where the number \
          divided by is not the upper bound to about six digits.",
    options: &[],
    // Slope and offset are float32 attributes: 1/6 is off by 10⁻⁸ of itself, and so is every output.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

impl Pass for FuseHardSwish {
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
        rule("hard-swish", pat!(Mul(x, gate: HardSigmoid(x))), |m, g| {
            let gate = m.node("gate");
            let near = |name: &str, usual: f32, wanted: f32| {
                (f64::from(gate.float(name).unwrap_or(usual)) / f64::from(wanted) - 1.0).abs() <= OFF
            };
            m.only_if(near("alpha", 0.2, 1.0 / 6.0) && near("beta", 0.5, 0.5) && m.opset() >= 14)?;
            m.require(m.elem("x")? != DataType::Bfloat16 || m.opset() >= 22, "HardSwish has no bfloat16 here")?;
            Ok(g.node(Node::new("HardSwish"), &[m.value("x")]))
        }),
        rule("hard-sigmoid-times", pat!(Div(Mul(clip: Clip(Add(x, y), ..), other), m)), |m, g| {
            let top = number(m, "m")?;
            scaled_product(m, g, top)
        }),
        rule("hard-sigmoid-times-reciprocal", pat!(Mul(Mul(clip: Clip(Add(x, y), ..), other), m)), |m, g| {
            let top = 1.0 / number(m, "m")?;
            scaled_product(m, g, top)
        }),
        rule("hard-sigmoid", pat!(Div(clip: Clip(Add(x, y), ..), m)), |m, g| {
            let top = number(m, "m")?;
            hard_sigmoid(m, g, top)
        }),
        rule("hard-sigmoid-reciprocal", pat!(Mul(clip: Clip(Add(x, y), ..), m)), |m, g| {
            let top = 1.0 / number(m, "m")?;
            hard_sigmoid(m, g, top)
        }),
        rule("hard-sigmoid-of-product", pat!(clip: Clip(Add(Mul(x, y), b), ..)), |m, g| {
            let (x, slope) = operands(m, "x", "y")?;
            let offset = m.graph().constant(m.value("b")).ok_or(Refusal::NoMatch)?;
            clipped(m, g, x, one_number(m, x, slope)?, one_number(m, x, offset)?, 1.0)
        }),
        rule("hard-sigmoid-of-quotient", pat!(clip: Clip(Add(Div(x, a), b), ..)), |m, g| {
            let constant = |name| m.graph().constant(m.value(name)).ok_or(Refusal::NoMatch);
            let x = m.value("x");
            let (slope, offset) = (1.0 / one_number(m, x, constant("a")?)?, one_number(m, x, constant("b")?)?);
            clipped(m, g, x, slope, offset, 1.0)
        }),
    ]
}

/// How far from the upper bound, relative to it, the number that is divided by may be: an inverse that is written with
/// six digits is. Slope and offset may be as far off again, and together they stay within the claim.
const OFF: f64 = 4e-6;

/// `other · Clip(x + b, 0, top) / top`.
fn scaled_product(m: &Match, g: &mut Patch, top: f64) -> Result<ValueId, Refusal> {
    let gate = hard_sigmoid(m, g, top)?;
    Ok(g.node(Node::new("Mul"), &[m.value("other"), gate]))
}

/// `Clip(x + b, 0, top) / top`.
fn hard_sigmoid(m: &Match, g: &mut Patch, top: f64) -> Result<ValueId, Refusal> {
    let (x, offset) = operands(m, "x", "y")?;
    clipped(m, g, x, 1.0, one_number(m, x, offset)?, top)
}

/// `Clip(slope·x + offset, 0, top) / top`.
fn clipped(m: &Match, g: &mut Patch, x: ValueId, slope: f64, offset: f64, top: f64) -> Result<ValueId, Refusal> {
    m.only_if(m.opset() >= 6)?;
    let (low, high) = bounds(m)?;
    m.only_if(low == 0.0 && high > 0.0 && (high / top - 1.0).abs() < 0.1)?;
    m.require((high / top - 1.0).abs() <= OFF, "the divisor is not the upper bound")?;
    m.only_if(slope.is_finite() && slope != 0.0)?;
    require_private(m)?;
    let (alpha, beta) = (attribute(slope / high)?, attribute(offset / high)?);
    let node = Node::new("HardSigmoid").with("alpha", alpha).with("beta", beta);
    Ok(g.node(node, &[x]))
}

/// The bounds of the Clip.
fn bounds(m: &Match) -> Result<(f64, f64), Refusal> {
    let clip = m.node("clip");
    if m.opset() < 11 {
        let bound = |name: &str| clip.float(name).map(f64::from).ok_or(Refusal::NoMatch);
        return Ok((bound("min")?, bound("max")?));
    }
    let bound = |index: usize| {
        let tensor = clip.input(index).and_then(|v| m.graph().constant(v));
        tensor.and_then(|t| t.scalar_f64()).ok_or(Refusal::NoMatch)
    };
    Ok((bound(1)?, bound(2)?))
}

/// The one number behind a name, which must not give the output more axes than the Clip has.
fn number(m: &Match, name: &str) -> Result<f64, Refusal> {
    let tensor = m.graph().constant(m.value(name)).ok_or(Refusal::NoMatch)?;
    let clip = m.node("clip").input(0).ok_or(Refusal::NoMatch)?;
    one_number(m, clip, tensor)
}

/// The number in a constant of one element that must not give `x` more axes.
fn one_number(m: &Match, x: ValueId, tensor: &Tensor) -> Result<f64, Refusal> {
    m.only_if(tensor.len() == 1 && is_weight_type(tensor.dtype()))?;
    let number = tensor.scalar_f64().filter(|x| x.is_finite()).ok_or(Refusal::NoMatch)?;
    let ndim = m.facts().ndim(x);
    let narrow = tensor.dims().is_empty() || ndim.is_some_and(|n| tensor.dims().len() <= n);
    m.require(narrow, "a constant may have more axes than the value")?;
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_untouched};
    use insta::assert_snapshot;

    fn graph(opset: i64, body: &str) -> String {
        format!(
            "<ir_version: 8, opset_import: [\"\" : {opset}]> g (float[N,3] x) => (float[N,3] y)
             <float[1] three = {{3}}, float zero = {{0}}, float six = {{6}}, float[1] sixth = {{0.16666667}}, float one = {{1}},
              float slope = {{0.2}}, float half = {{0.5}}> {{ {body} }}"
        )
    }

    #[test]
    fn makes_a_hard_sigmoid_and_a_product_before_opset_14() {
        let body = "t = Add (three, x) c = Clip (t, zero, six) p = Mul (x, c) y = Div (p, six)";
        assert_snapshot!(check(&FuseHardSwish, &graph(13, body)), @"
        g (float[N,3] x) => (float[N,3] y) <
            float[1] three = {3},
            float zero = {0},
            float six = {6},
            float[1] sixth = {0.16666667},
            float one = {1},
            float slope = {0.2},
            float half = {0.5}
        > {
            y_1 = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)
            y = Mul (x, y_1)  # float[N,3]
        }
        ");
    }

    #[test]
    fn makes_a_hard_swish_from_opset_14_on() {
        let body = "t = Add (x, three) c = Clip (t, zero, six) p = Mul (c, sixth) y = Mul (p, x)";
        assert_snapshot!(check(&FuseHardSwish, &graph(14, body)), @"
        g (float[N,3] x) => (float[N,3] y) <
            float[1] three = {3},
            float zero = {0},
            float six = {6},
            float[1] sixth = {0.16666667},
            float one = {1},
            float slope = {0.2},
            float half = {0.5}
        > {
            y = HardSwish (x)  # float[N,3]
        }
        ");
    }

    #[test]
    fn reads_every_order_and_older_clips() {
        for body in [
            "t = Add (x, three) c = Clip <min = 0.0, max = 6.0> (t) p = Div (c, six) y = Mul (p, x)",
            "t = Add (x, three) c = Clip <min = 0.0, max = 6.0> (t) p = Mul (x, c) y = Mul (sixth, p)",
            "a = Mul (x, slope) t = Add (a, half) y = Clip <min = 0.0, max = 1.0> (t)",
        ] {
            check(&FuseHardSwish, &graph(10, body));
        }
    }

    #[test]
    fn works_inside_a_subgraph() {
        let body = "z = Shape (x) o = Size (z) e = Cast <to = 9> (o)
            y = If (e) <then_branch = a () => (float[N,3] p) { t = Add (x, three) c = Clip (t, zero, six) p = Div (c, six) },
                        else_branch = c () => (float[N,3] q) { q = Identity (x) }>";
        check(&FuseHardSwish, &graph(13, body));
    }

    #[test]
    fn keeps_a_clip_with_other_uses() {
        let body = "t = Add (x, three) c = Clip (t, zero, six) p = Div (c, six) y = Add (p, c)";
        check_refuses(&FuseHardSwish, &graph(13, body), "an inner value has other uses");
        let wide = "t = Add (x, wide) c = Clip (t, zero, six) y = Div (c, six)";
        let wide = graph(13, wide)
            .replace("(float[N,3] y)", "(float[1,N,3] y)")
            .replace("float one", "float[1,1,1] wide = {3}, float one");
        check_refuses(&FuseHardSwish, &wide, "a constant may have more axes");
    }

    #[test]
    fn keeps_numbers_that_are_only_near() {
        let near = "t = Add (x, three) c = Clip (t, zero, six) y = Div (c, k)";
        let with = |number: &str, body: &str| {
            graph(14, body).replace("float one", &format!("float k = {{{number}}}, float one"))
        };
        check_refuses(&FuseHardSwish, &with("6.0005", near), "the divisor is not the upper bound");
        let product = "t = Add (x, three) c = Clip (t, zero, six) y = Mul (c, k)";
        check_refuses(&FuseHardSwish, &with("0.16667", product), "the divisor is not the upper bound");
        check(&FuseHardSwish, &with("0.166667", product));
        // The slope of a HardSwish is 1/6 to as many digits.
        let gate = "g = HardSigmoid <alpha = 0.16667, beta = 0.5> (x) y = Mul (x, g)";
        check_untouched(&FuseHardSwish, &graph(14, gate));
        let offset = "g = HardSigmoid <alpha = 0.16666667, beta = 0.50001> (x) y = Mul (x, g)";
        check_untouched(&FuseHardSwish, &graph(14, offset));
        let flat = "s = Mul (x, k) t = Add (s, half) y = Clip (t, zero, one)";
        check_refuses(&FuseHardSwish, &with("1e-40", flat), "too small for its type");
    }

    #[test]
    fn keeps_a_clip_that_is_a_graph_output() {
        let body = "t = Add (x, three) c = Clip (t, zero, six) y = Div (c, six)";
        let graph = graph(13, body).replace("(float[N,3] y)", "(float[N,3] y, float[N,3] c)");
        check_refuses(&FuseHardSwish, &graph, "an inner value has other uses");
    }

    #[test]
    fn keeps_products_of_types_that_hard_swish_has_not_yet() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 14]> g (bfloat16[N] x) => (bfloat16[N] y) {
            g = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul (x, g) }";
        check_refuses(&FuseHardSwish, graph, "HardSwish has no bfloat16 here");
    }

    #[test]
    fn keeps_clips_that_begin_elsewhere() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 14]>
            g (float[n] x) => (float[n] y) <float three = {3}, float one = {1}, float six = {6}> {
                a = Add (x, three) c = Clip (a, one, six) y = Div (c, six)
            }";
        check_untouched(&FuseHardSwish, graph);
    }
}
