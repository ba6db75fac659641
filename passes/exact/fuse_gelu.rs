//! Turns spelled-out GELU and SiLU activations into one node each.

use super::norm_parts::{CONTRIB, import_contrib, require_ort};
use crate::{Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Rule, Target, rewrite, rule};
use lathe_ir::{DataType, Model, Node, Patch, Pattern, ValueId};

/// See [`INFO`].
pub struct FuseGelu;

static INFO: Info = Info {
    name: "fuse-gelu",
    summary: "replaces the steps of a GELU or SiLU activation by one node",
    doc: "x·½·(1 + erf(x/√2)) and its tanh approximation become Gelu where the model has opset 20, else ONNX Runtime's \
          Gelu and FastGelu under the target ort, there together with a bias added before. x·σ(αx) becomes QuickGelu \
          under the target ort. Declines where inner values have other uses.",
    options: &[],
    // The constants √2 and √(2/π) are rounded differently, and the kernels approximate erf and tanh in their own way.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Quantity::Nodes],
    source: Some("Hendrycks and Gimpel 2016, arXiv:1606.08415"),
};

impl Pass for FuseGelu {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        let mut outcome = rewrite(model, cx, &activations())?;
        outcome.merge(rewrite(model, cx, &biases())?);
        if !outcome.changes.is_empty() {
            import_contrib(model);
        }
        Ok(outcome)
    }
}

/// The ways to multiply `x`, ½ and `gate`, which is 1 + erf(…) or 1 + tanh(…).
fn halved(gate: &str) -> Vec<String> {
    vec![
        format!("Mul(Mul(x, {gate}), 0.5)"),
        format!("Mul(x, Mul({gate}, 0.5))"),
        format!("Mul(Mul(x, 0.5), {gate})"),
        format!("Div(Mul(x, {gate}), 2)"),
        format!("Mul(x, Div({gate}, 2))"),
        format!("Mul(Div(x, 2), {gate})"),
    ]
}

/// The ways to write √(2/π)·(x + 0.044715·x³).
fn tanh_arguments() -> Vec<String> {
    let mut arguments = Vec::new();
    for cube in ["Pow(x, 3)", "Mul(x, Mul(x, x))"] {
        arguments.push(format!("Mul(Add(x, Mul({cube}, 0.044715)), 0.7978845608)"));
    }
    for square in ["Pow(x, 2)", "Mul(x, x)"] {
        arguments.push(format!("Mul(Add(x, Mul(Mul(x, 0.044715), {square})), 0.7978845608)"));
        arguments.push(format!("Mul(Mul(x, 0.7978845608), Add(Mul({square}, 0.044715), 1))"));
        arguments.push(format!("Mul(x, Add(Mul({square}, 0.0356774081), 0.7978845608))"));
        arguments.push(format!("Mul(x, Mul(Add(Mul({square}, 0.044715), 1), 0.7978845608))"));
        arguments.push(format!("Mul(Mul(x, Add(Mul({square}, 0.044715), 1)), 0.7978845608)"));
    }
    arguments.push("Mul(Mul(x, 0.7978845608), Add(Mul(Mul(x, 0.044715), x), 1))".to_owned());
    arguments
}

fn activations() -> Vec<Rule> {
    let mut rules = Vec::new();
    for argument in ["Div(x, 1.4142135624)", "Mul(x, 0.7071067812)"] {
        for form in halved(&format!("Add(Erf({argument}), 1)")) {
            rules.push(rule("fuse-erf", Pattern::parse(&form), |m, g| gelu(m, g, false)));
        }
        let form = format!("Mul(x, Add(Mul(Erf({argument}), 0.5), 0.5))");
        rules.push(rule("fuse-erf", Pattern::parse(&form), |m, g| gelu(m, g, false)));
    }
    for argument in tanh_arguments() {
        for form in halved(&format!("Add(Tanh({argument}), 1)")) {
            rules.push(rule("fuse-tanh", Pattern::parse(&form), |m, g| gelu(m, g, true)));
        }
    }
    rules.push(rule("fuse-silu", Pattern::parse("Mul(x, Sigmoid(x))"), |m, g| swish(m, g, 1.0)));
    rules.push(rule("fuse-sigmoid", Pattern::parse("Mul(x, Sigmoid(Mul(x, alpha)))"), |m, g| {
        let alpha = m.tensor("alpha")?;
        let alpha = alpha.scalar_f64().filter(|_| alpha.len() == 1).ok_or("the factor is not one number")?;
        swish(m, g, alpha as f32)
    }));
    rules
}

/// The element type of `x`, if the whole computation keeps it and the shape of `x`.
fn activated(m: &Match) -> Result<DataType, Refusal> {
    let elem = m.elem("x")?;
    let floats = matches!(elem, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double);
    m.require(floats, "the elements are not floating-point numbers")?;
    m.require(m.ndim("x")? == m.ndim("output")?, "a constant adds axes")?;
    Ok(elem)
}

fn gelu(m: &Match, g: &mut Patch, approximate: bool) -> Result<ValueId, Refusal> {
    let elem = activated(m)?;
    let node = if m.opset() >= 20 {
        Node::new("Gelu").with("approximate", if approximate { "tanh" } else { "none" })
    } else {
        require_ort(m, elem, "Gelu needs opset 20")?;
        Node::new(if approximate { "FastGelu" } else { "Gelu" }).in_domain(CONTRIB)
    };
    Ok(g.node(node, &[m.value("x")]))
}

fn swish(m: &Match, g: &mut Patch, alpha: f32) -> Result<ValueId, Refusal> {
    let elem = activated(m)?;
    // The standard Swish of opset 24 is no way out: ONNX Runtime has no kernel for it.
    require_ort(m, elem, "QuickGelu is an operator of ONNX Runtime")?;
    Ok(g.node(Node::new("QuickGelu").in_domain(CONTRIB).with("alpha", alpha), &[m.value("x")]))
}

fn biases() -> Vec<Rule> {
    let standard = rule("fuse-bias", Pattern::parse("gelu: Gelu(Add(a, b))"), |m, g| {
        m.require(m.context().target == Target::Ort, "BiasGelu is an operator of ONNX Runtime")?;
        let op = match m.node("gelu").string("approximate") {
            Some("tanh") => "FastGelu",
            _ => "BiasGelu",
        };
        biased(m, g, op)
    });
    vec![
        standard,
        rule("fuse-bias", Pattern::parse("com.microsoft.Gelu(Add(a, b))"), |m, g| biased(m, g, "BiasGelu")),
        rule("fuse-bias", Pattern::parse("com.microsoft.FastGelu(Add(a, b))"), |m, g| biased(m, g, "FastGelu")),
    ]
}

fn biased(m: &Match, g: &mut Patch, op: &str) -> Result<ValueId, Refusal> {
    require_ort(m, m.elem("a")?, "the bias is fused for ONNX Runtime only")?;
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
    use crate::testing::{check, check_in, check_refuses, check_refuses_in};
    use insta::assert_snapshot;

    fn ort() -> Context<'static> {
        Context { target: Target::Ort, ..Context::default() }
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

    #[test]
    fn refuses() {
        check_refuses(&FuseGelu, &format!("<opset_import: [\"\" : 19]> {ERF}"), "Gelu needs opset 20");
        let shown = ERF.replace("=> (float[N,4] y)", "=> (float[N,4] y, float[N,4] e)");
        check_refuses_in(&FuseGelu, &format!("<opset_import: [\"\" : 20]> {shown}"), "graph output", &ort());
        let wider = ERF
            .replace("float half = {0.5}", "float[1,1,1] half = {0.5}")
            .replace("(float[N,4] y)", "(float[A,B,C] y)");
        check_refuses_in(&FuseGelu, &format!("<opset_import: [\"\" : 20]> {wider}"), "adds axes", &ort());
    }
}
