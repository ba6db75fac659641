//! Turns spelled-out GELU and SiLU activations into one node each.

use super::norm_parts::{CONTRIB, import_contrib, require_ort};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{DataType, Model, Node, Patch, Pattern, ValueId};
use std::{
    f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI},
    sync::LazyLock,
};

/// See [`INFO`].
pub struct FuseGelu;

static INFO: Info = Info {
    name: "fuse-gelu",
    summary: "replaces the steps of a GELU or SiLU activation by one node",
    doc: "x·½·(1 + erf(x/√2)) and its approximation by tanh or a logistic function, in any order and factored in any way, \
          become Gelu where the model has opset 20, else ONNX Runtime's Gelu and FastGelu under the target ort, there \
          together with a bias added before. x·σ(αx) becomes QuickGelu under the target ort. Declines where inner values \
          have other uses; a constant counts as the one of the formula where it is that to the rounding of its type \
          (1e-6 of it in float32).",
    options: &[],
    // The constants √2 and √(2/π) are rounded differently, and the kernels approximate erf and tanh in their own way.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Saving::Nodes],
    source: Some("Hendrycks and Gimpel 2016, arXiv:1606.08415"),
};

impl Pass for FuseGelu {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = rewrite(model, cx, &ACTIVATIONS)?;
        outcome.merge(rewrite(model, cx, &BIASES)?);
        if !outcome.changes.is_empty() {
            import_contrib(model);
        }
        Ok(outcome)
    }
}

/// `x·½·(1 + f)` as a sum or product of `x` and `f`, where `f` is an odd function of `x` and `-f` one of `−x`.
fn halved(f: &str, of_negative: &str) -> String {
    format!(
        "(Mul*(x, 0.5, (Add*({f}, 1) | Add*(1, -{of_negative})))
        | Mul*(x, Add*(Mul*({f}, 0.5), 0.5))
        | Add*(Mul*(x, 0.5), Mul*(x, {f}, 0.5))
        | Mul*(0.5, Add*(x, Mul*(x, {f}))))"
    )
}

/// `factor·(x + 0.044715·x³)`, factored in any way.
fn cubic(factor: f64) -> String {
    let product = factor * 0.044715;
    format!(
        "(Mul*({factor}, Add*(x, Mul*(Pow(x, 3), 0.044715)))
        | Mul*(x, {factor}, Add*(1, Mul*(Pow(x, 2), 0.044715)))
        | Mul*(x, Add*({factor}, Mul*(Pow(x, 2), {product})))
        | Add*(Mul*(x, {factor}), Mul*(Pow(x, 3), {product})))"
    )
}

static ACTIVATIONS: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let erf = |factor: f64| format!("Erf(Mul*(x, {factor}))");
    let erf = halved(&erf(FRAC_1_SQRT_2), &erf(-FRAC_1_SQRT_2));
    // √(2/π)
    let factor = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
    let tanh = |factor: f64| format!("Tanh({})", cubic(factor));
    // (1 + tanh z)/2 is σ(2z).
    let tanh = format!("({} | Mul*(x, Sigmoid({})))", halved(&tanh(factor), &tanh(-factor)), cubic(2.0 * factor));
    vec![
        rule("fuse-erf", Pattern::parse(&erf), |m, g| gelu(m, g, false)),
        rule("fuse-tanh", Pattern::parse(&tanh), |m, g| gelu(m, g, true)),
        rule("fuse-sigmoid", Pattern::parse("Mul*(x, Sigmoid(Mul*(x, #alpha)))"), swish),
    ]
});

/// The element type of `x`, if the whole computation keeps it and the shape of `x`.
fn activated(m: &Match) -> Result<DataType, Refusal> {
    let elem = m.elem("x")?;
    let floats = matches!(elem, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double);
    m.require(floats, "the elements are not floating-point numbers")?;
    m.require_no_new_axes(m.value("x"), &[])?;
    Ok(elem)
}

fn gelu(m: &Match, g: &mut Patch, approximate: bool) -> Result<ValueId, Refusal> {
    let elem = activated(m)?;
    let node = if m.has_operator("Gelu") {
        Node::new("Gelu").with("approximate", if approximate { "tanh" } else { "none" })
    } else {
        require_ort(m, elem, "Gelu needs opset 20")?;
        Node::new(if approximate { "FastGelu" } else { "Gelu" }).in_domain(CONTRIB)
    };
    Ok(g.node(node, &[m.value("x")]))
}

fn swish(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let elem = activated(m)?;
    // The standard Swish of opset 24 is no way out: ONNX Runtime has no kernel for it.
    require_ort(m, elem, "QuickGelu is an operator of ONNX Runtime")?;
    Ok(g.node(Node::new("QuickGelu").in_domain(CONTRIB).with("alpha", m.number("alpha") as f32), &[m.value("x")]))
}

static BIASES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let pattern = pat!(gelu: Gelu|com.microsoft.Gelu|com.microsoft.FastGelu(Add(a, b)));
    vec![rule("fuse-bias", pattern, |m, g| {
        let gelu = m.node("gelu");
        let approximate = gelu.op_type == "FastGelu" || gelu.string("approximate") == Some("tanh");
        biased(m, g, if approximate { "FastGelu" } else { "BiasGelu" })
    })]
});

fn biased(m: &Match, g: &mut Patch, op: &str) -> Result<ValueId, Refusal> {
    require_ort(m, m.elem("a")?, "BiasGelu is an operator of ONNX Runtime")?;
    let is_bias = |bias: &str, of: &str| match (m.shape(bias), m.shape(of)) {
        (Ok([size]), Ok([.., last])) => size == last && m.graph().constant(m.value(bias)).is_some(),
        _ => false,
    };
    let (x, bias) = match (is_bias("b", "a"), is_bias("a", "b")) {
        (true, _) => ("a", "b"),
        (false, true) => ("b", "a"),
        (false, false) => return Err("neither operand is a constant bias over the last axis".into()),
    };
    Ok(g.node(Node::new(op).in_domain(CONTRIB), &[m.value(x), m.value(bias)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Target;
    use crate::testing::{check, check_in, check_refuses, check_refuses_in, check_untouched};
    use insta::assert_snapshot;

    fn ort() -> PassContext<'static> {
        PassContext::default().with_target(Target::Ort)
    }

    const ERF: &str = r#"g (float[N,4] x) => (float[N,4] y) <float root = {1.4142135}, float one = {1}, float half = {0.5}> {
        d = Div (x, root)
        e = Erf (d)
        p = Add (e, one)
        q = Mul (x, p)
        y = Mul (q, half)
    }"#;

    #[test]
    fn writes_the_standard_gelu() {
        assert_snapshot!(check(&FuseGelu, &format!("<opset_import: [\"\" : 20]> {ERF}")), @r#"
        g (float[N,4] x) => (float[N,4] y) <
            float root = {1.4142135},
            float one = {1},
            float half = {0.5}
        > {
            y = Gelu <approximate = "none"> (x)  # float[N,4]
        }
        "#);
    }

    #[test]
    fn writes_a_gelu_with_bias() {
        assert_snapshot!(check_in(&FuseGelu, r#"<opset_import: ["" : 17]>
            g (float[N,2,4] a) => (float[N,2,4] y)
            <float root = {0.70710677}, float one = {1}, float half = {0.5}, float[4] bias = {0, 1, 2, 3}> {
                x = Add (bias, a)
                d = Mul (x, root)
                e = Erf (d)
                p = Add (one, e)
                h = Mul (half, x)
                y = Mul (h, p)
            }"#, &ort()), @"
        g (float[N,2,4] a) => (float[N,2,4] y) <
            float root = {0.70710677},
            float one = {1},
            float half = {0.5},
            float[4] bias = {0, 1, 2, 3}
        > {
            y = com.microsoft.BiasGelu (a, bias)  # float[N,2,4]
        }
        ");
    }

    #[test]
    fn writes_the_tanh_form() {
        assert_snapshot!(check_in(&FuseGelu, r#"<opset_import: ["" : 18]>
            g (float[N,4] x) => (float[N,4] y)
            <float c = {0.044715}, float r = {0.7978846}, float one = {1}, float half = {0.5}> {
                x2 = Mul (x, x)
                x3 = Mul (x, x2)
                m = Mul (c, x3)
                s = Add (x, m)
                t = Mul (r, s)
                h = Tanh (t)
                p = Add (one, h)
                q = Mul (x, p)
                y = Mul (half, q)
            }"#, &ort()), @"
        g (float[N,4] x) => (float[N,4] y) <
            float c = {0.044715},
            float r = {0.7978846},
            float one = {1},
            float half = {0.5}
        > {
            y = com.microsoft.FastGelu (x)  # float[N,4]
        }
        ");
    }

    #[test]
    fn writes_silu_in_a_branch_and_beside_an_output() {
        assert_snapshot!(check_in(&FuseGelu, r#"<opset_import: ["" : 18]>
            g (bool c, float[N,4] x) => (float[N,4] y, float[N,4] z) <float alpha = {1.702}> {
                m = Mul (alpha, x)
                t = Sigmoid (m)
                z = Mul (t, x)
                y = If (c) <then_branch = a () => (float[N,4] p) {
                    s = Sigmoid (x)
                    p = Mul (x, s)
                }, else_branch = b () => (float[N,4] q) { q = Neg (x) }>
            }"#, &ort()), @"
        g (bool c, float[N,4] x) => (float[N,4] y, float[N,4] z) <
            float alpha = {1.702}
        > {
            y = If (c) <then_branch = a () => (p_1) {
                p_1 = com.microsoft.QuickGelu <alpha = 1.0> (x)
            }, else_branch = b () => (float[N,4] q) {
                q = Neg (x)  # float[N,4]
            }>  # float[N,4]
            z = com.microsoft.QuickGelu <alpha = 1.702> (x)  # float[N,4]
        }
        ");
    }

    fn spelled(body: &str) -> String {
        format!(
            r#"<opset_import: ["" : 20]> g (float[N,4] x) => (float[N,4] y)
            <float half = {{0.5}}, float one = {{1}}, float two = {{2}}, int64 three = {{3}}, float root = {{1.4142135}},
             float inverse = {{0.70710677}}, float back = {{-0.70710677}}, float c = {{0.044715}}, float r = {{0.7978846}},
             float rc = {{0.035677407}}, float twice = {{1.5957692}}> {{ {body} }}"#
        )
    }

    #[test]
    fn fuses_every_spelling() {
        let products = [
            "g = Add (f, one) p = Mul (x, g) y = Mul (p, half)",
            "g = Add (one, f) p = Mul (half, g) y = Mul (p, x)",
            "g = Add (f, one) p = Mul (x, half) y = Mul (g, p)",
            "g = Add (f, one) p = Mul (x, g) y = Div (p, two)",
            "g = Add (f, one) p = Div (g, two) y = Mul (x, p)",
            "g = Add (f, one) p = Div (x, two) y = Mul (g, p)",
            "g = Mul (f, half) p = Add (g, half) y = Mul (x, p)",
            "p = Mul (x, half) q = Mul (f, p) y = Add (p, q)",
            "p = Mul (x, f) q = Add (x, p) y = Mul (q, half)",
        ];
        let erf = ["a = Div (x, root) f = Erf (a)", "a = Mul (inverse, x) f = Erf (a)"];
        let cube = "s = Mul (x, x) k = Mul (s, x)";
        let tanh = [
            format!("{cube} a = Mul (k, c) b = Add (a, x) t = Mul (b, r) f = Tanh (t)"),
            "k = Pow (x, three) a = Mul (k, c) b = Add (x, a) t = Mul (r, b) f = Tanh (t)".to_owned(),
            "s = Mul (x, x) a = Mul (s, c) b = Add (one, a) d = Mul (x, r) t = Mul (d, b) f = Tanh (t)".to_owned(),
            "s = Mul (x, x) a = Mul (s, rc) b = Add (a, r) t = Mul (x, b) f = Tanh (t)".to_owned(),
            "d = Mul (x, c) e = Mul (d, x) a = Mul (e, x) b = Add (a, x) t = Mul (b, r) f = Tanh (t)".to_owned(),
            format!("{cube} a = Mul (k, rc) b = Mul (x, r) t = Add (a, b) f = Tanh (t)"),
        ];
        let standard = |mode: &str| format!("y = Gelu <approximate = \"{mode}\"> (x)");
        for product in products {
            for f in erf {
                assert!(
                    check(&FuseGelu, &spelled(&format!("{f} {product}"))).contains(&standard("none")),
                    "{f} {product}"
                );
            }
            for f in &tanh {
                assert!(
                    check(&FuseGelu, &spelled(&format!("{f} {product}"))).contains(&standard("tanh")),
                    "{f} {product}"
                );
            }
        }
        let mirrored = "a = Mul (x, back) f = Erf (a) g = Sub (one, f) p = Mul (x, g) y = Mul (p, half)";
        assert!(check(&FuseGelu, &spelled(mirrored)).contains(&standard("none")));
        let logistic =
            format!("{cube} a = Mul (k, c) b = Add (x, a) t = Mul (twice, b) f = Sigmoid (t) y = Mul (x, f)");
        assert!(check(&FuseGelu, &spelled(&logistic)).contains(&standard("tanh")));
    }

    #[test]
    fn other_constants_are_another_function() {
        let erf = "a = Div (x, root) f = Erf (a) g = Add (f, one) p = Mul (x, g) y = Mul (p, half)";
        check(&FuseGelu, &spelled(erf));
        for (constant, other) in [
            ("root = {1.4142135}", "root = {1.41421}"),
            ("one = {1}", "one = {1.00001}"),
            ("half = {0.5}", "half = {0.49999}"),
        ] {
            check_untouched(&FuseGelu, &spelled(erf).replace(constant, other));
        }
        let tanh = "s = Mul (x, x) k = Mul (s, x) a = Mul (k, c) b = Add (x, a) t = Mul (r, b) f = Tanh (t)
                    g = Add (f, one) p = Mul (x, g) y = Mul (p, half)";
        check(&FuseGelu, &spelled(tanh));
        for (constant, other) in [("c = {0.044715}", "c = {0.0447}"), ("r = {0.7978846}", "r = {0.79788}")] {
            check_untouched(&FuseGelu, &spelled(tanh).replace(constant, other));
        }
    }

    #[test]
    fn refuses() {
        check_refuses(&FuseGelu, &format!("<opset_import: [\"\" : 19]> {ERF}"), "Gelu needs opset 20");
        let shown = ERF.replace("=> (float[N,4] y)", "=> (float[N,4] y, float[N,4] e)");
        check_refuses_in(&FuseGelu, &format!("<opset_import: [\"\" : 20]> {shown}"), "graph output", &ort());
        let wider = ERF
            .replace("float half = {0.5}", "float[1,1,1] half = {0.5}")
            .replace("(float[N,4] y)", "(float[A,B,C] y)");
        check_refuses_in(&FuseGelu, &format!("<opset_import: [\"\" : 20]> {wider}"), "adds axes", &ort());
        let sum = r#"<opset_import: ["" : 20]> g (float[N,4] x, float[N,4] b) => (float[N,4] y) { s = Add (x, b) y = Gelu (s) }"#;
        check_refuses(&FuseGelu, sum, "BiasGelu is an operator of ONNX Runtime");
        check_refuses_in(&FuseGelu, sum, "neither operand is a constant bias over the last axis", &ort());
    }
}
