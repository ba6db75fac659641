//! Turns spelled-out layer normalizations into `LayerNormalization`.

use super::norm_parts::{self, averaged_axes, normalized, require_spans};
use crate::{Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Rule, Target, rewrite, rule};
use lathe_ir::{Model, Node, Patch, Pattern, ValueId};

/// See [`INFO`].
pub struct FuseLayerNorm;

static INFO: Info = Info {
    name: "fuse-layer-norm",
    summary: "replaces the steps of a layer normalization by one LayerNormalization",
    doc: "Mean, difference, mean square, square root and quotient over the last axes become one LayerNormalization, \
          with the scale and shift that follow where they have the normalized axes, and the casts around a half \
          precision one. Needs opset 17 (any under the target ort), a constant epsilon, and inner values without \
          other uses.",
    options: &[],
    // The operator sums in another order and may take the variance as E[x²] − E[x]².
    kind: Kind::Equivalent { rtol: 1e-4 },
    lowers: &[Quantity::Nodes],
    source: Some("Ba et al. 2016, arXiv:1607.06450"),
};

impl Pass for FuseLayerNorm {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        // Whole forms first: a part that is fused alone no longer matches them.
        let mut outcome = rewrite(model, cx, &shifted())?;
        outcome.merge(rewrite(model, cx, &scaled())?);
        outcome.merge(rewrite(model, cx, &bare())?);
        Ok(outcome)
    }
}

/// Patterns of the normalized value itself.
fn forms() -> Vec<String> {
    let square = "Sub(x, mean_a: ReduceMean(x, ..))";
    let again = "Sub(x, mean_b: ReduceMean(x, ..))";
    let centred = "Cast?(Sub(x, mean: ReduceMean(x, ..)))";
    let mut forms = Vec::new();
    for square in [format!("Pow(Cast?({square}), 2)"), format!("Mul(Cast?({square}), Cast?({again}))")] {
        let variance = format!("Add(variance: ReduceMean({square}, ..), epsilon)");
        forms.push(format!("Div({centred}, Cast?(Sqrt({variance})))"));
        forms.push(format!("Mul({centred}, Cast?(Reciprocal(Sqrt({variance}))))"));
        forms.push(format!("Mul({centred}, Cast?(Div(1, Sqrt({variance}))))"));
        forms.push(format!("Mul({centred}, Cast?(Pow({variance}, -0.5)))"));
        forms.push(format!("Div({centred}, Cast?(Pow({variance}, 0.5)))"));
    }
    forms
}

fn shifted() -> Vec<Rule> {
    let mut rules = Vec::new();
    for form in forms() {
        let pattern = Pattern::parse(&format!("Add(Mul(narrowed: Cast?({form}), scale), shift)"));
        rules.push(rule("fuse-scale-and-shift", pattern, |m, g| {
            fuse(m, g, Some(m.value("scale")), Some(m.value("shift")))
        }));
    }
    // TensorFlow scales the inverse deviation first: x·inv + (shift − mean·inv).
    let inverse = "Mul(Reciprocal(Sqrt(Add(variance: ReduceMean(SQUARE, ..), epsilon))), scale)";
    for square in [
        "Pow(Sub(x, mean_a: ReduceMean(x, ..)), 2)",
        "Mul(Sub(x, mean_a: ReduceMean(x, ..)), Sub(x, mean_b: ReduceMean(x, ..)))",
    ] {
        let inverse = inverse.replace("SQUARE", square);
        let form = format!("Add(Mul(x, {inverse}), Sub(shift, Mul(mean: ReduceMean(x, ..), {inverse})))");
        rules.push(rule("fuse-scaled-inverse", Pattern::parse(&form), |m, g| {
            fuse(m, g, Some(m.value("scale")), Some(m.value("shift")))
        }));
    }
    rules
}

fn scaled() -> Vec<Rule> {
    let rule = |form: String| {
        let pattern = Pattern::parse(&format!("Mul(narrowed: Cast?({form}), scale)"));
        rule("fuse-scale", pattern, |m, g| fuse(m, g, Some(m.value("scale")), None))
    };
    forms().into_iter().map(rule).collect()
}

fn bare() -> Vec<Rule> {
    let mut rules = Vec::new();
    for form in forms() {
        let narrowed = Pattern::parse(&format!("narrowed: Cast({form})"));
        rules.push(rule("fuse-normalized", narrowed, |m, g| fuse(m, g, None, None)));
    }
    for form in forms() {
        rules.push(rule("fuse-normalized", Pattern::parse(&form), |m, g| fuse(m, g, None, None)));
    }
    rules
}

fn fuse(m: &Match, g: &mut Patch, scale: Option<ValueId>, shift: Option<ValueId>) -> Result<ValueId, Refusal> {
    let available = m.opset() >= 17 || m.context().target == Target::Ort;
    m.require(available, "LayerNormalization needs opset 17")?;
    let start = m.value("x");
    let axis = averaged_axes(m, "mean", start)?;
    for label in ["mean_a", "mean_b", "variance"] {
        if m.find_node(label).is_some() {
            m.require(averaged_axes(m, label, start)? == axis, "the means are over different axes")?;
        }
    }
    let x = normalized(m, Some("narrowed"))?;
    // A widened difference whose quotient nothing narrows again is for the rule that sees the cast.
    m.only_if(m.elem("output")? == x.elem)?;
    let epsilon = norm_parts::epsilon(m)?;
    if scale.is_some() {
        require_spans(m, "scale", &x, axis)?;
    }
    if shift.is_some() {
        require_spans(m, "shift", &x, axis)?;
    }
    let scale = match scale {
        Some(scale) => scale,
        None => norm_parts::ones(m, g, &x, axis)?,
    };
    let node = Node::new("LayerNormalization").with("axis", axis).with("epsilon", epsilon);
    let inputs: Vec<Option<ValueId>> = [Some(x.x), Some(scale)].into_iter().chain(shift.map(Some)).collect();
    Ok(g.node_with(node, &inputs, 1)[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_in, check_refuses};
    use insta::assert_snapshot;

    #[test]
    fn fuses_scale_and_shift() {
        assert_snapshot!(check(&FuseLayerNorm, r#"<opset_import: ["" : 18]>
            g (float[N,4] x) => (float[N,4] y)
            <int64[1] axes = {-1}, float two = {2}, float eps = {1e-5}, float[4] scale = {1, 2, 3, 4}, float[4] shift = {0, 1, 0, -1}> {
                mean = ReduceMean (x, axes)
                d = Sub (x, mean)
                sq = Pow (d, two)
                var = ReduceMean (sq, axes)
                e = Add (var, eps)
                s = Sqrt (e)
                n = Div (d, s)
                m = Mul (scale, n)
                y = Add (m, shift)
            }"#), @"
        g (float[N,4] x) => (float[N,4] y) <
            int64[1] axes = {-1},
            float two = {2},
            float eps = {1e-5},
            float[4] scale = {1, 2, 3, 4},
            float[4] shift = {0, 1, 0, -1}
        > {
            y = LayerNormalization <axis = -1, epsilon = 1e-5> (x, scale, shift)  # float[N,4]
        }
        ");
    }

    #[test]
    fn fuses_two_differences_and_an_inverse_without_scale() {
        assert_snapshot!(check(&FuseLayerNorm, r#"<opset_import: ["" : 17]>
            g (float[N,2,3] x) => (float[N,2,3] y) <float eps = {1e-5}> {
                mean = ReduceMean <axes = [1, 2]> (x)
                d = Sub (x, mean)
                e = Sub (x, mean)
                sq = Mul (e, e)
                var = ReduceMean <axes = [1, 2]> (sq)
                v = Add (eps, var)
                s = Sqrt (v)
                r = Reciprocal (s)
                y = Mul (r, d)
            }"#), @"
        g (float[N,2,3] x) => (float[N,2,3] y) <
            float eps = {1e-5},
            float[2,3] y_scale = {1, 1, 1, 1, 1, 1}
        > {
            y = LayerNormalization <axis = -2, epsilon = 1e-5> (x, y_scale)  # float[N,2,3]
        }
        ");
    }

    #[test]
    fn absorbs_the_casts_of_half_precision() {
        assert_snapshot!(check_in(&FuseLayerNorm, r#"<opset_import: ["" : 17]>
            g (float16[N,4] x) => (float16[N,4] y)
            <float two = {2}, float eps = {1e-5}, float16[4] scale = {15360, 16384, 16896, 17408}, float16[4] shift = {0, 15360, 0, 48128}> {
                w = Cast <to = 1> (x)
                mean = ReduceMean <axes = [-1]> (w)
                d = Sub (w, mean)
                sq = Pow (d, two)
                var = ReduceMean <axes = [-1]> (sq)
                e = Add (var, eps)
                s = Sqrt (e)
                n = Div (d, s)
                h = Cast <to = 10> (n)
                m = Mul (h, scale)
                y = Add (m, shift)
            }"#, &Context::default()), @"
        g (float16[N,4] x) => (float16[N,4] y) <
            float two = {2},
            float eps = {1e-5},
            float16[4] scale = {15360, 16384, 16896, 17408},
            float16[4] shift = {0, 15360, 0, 48128}
        > {
            y = LayerNormalization <axis = -1, epsilon = 1e-5> (x, scale, shift)  # float16[N,4]
        }
        ");
    }

    #[test]
    fn fuses_the_scaled_inverse_of_tensorflow_in_a_branch() {
        assert_snapshot!(check_in(&FuseLayerNorm, r#"<opset_import: ["" : 16]>
            g (bool c, float[N,4] x) => (float[N,4] y)
            <float eps = {1e-3}, float[4] scale = {1, 2, 3, 4}, float[4] shift = {0, 1, 0, -1}> {
                y = If (c) <then_branch = a () => (float[N,4] p) {
                    mean = ReduceMean <axes = [-1]> (x)
                    d = Sub (x, mean)
                    sq = Mul (d, d)
                    var = ReduceMean <axes = [-1]> (sq)
                    v = Add (var, eps)
                    s = Sqrt (v)
                    r = Reciprocal (s)
                    inverse = Mul (r, scale)
                    scaled = Mul (x, inverse)
                    offset = Mul (mean, inverse)
                    rest = Sub (shift, offset)
                    p = Add (scaled, rest)
                }, else_branch = b () => (float[N,4] q) { q = Neg (x) }>
            }"#, &Context { target: Target::Ort, ..Context::default() }), @"
        g (bool c, float[N,4] x) => (float[N,4] y) <
            float eps = {0.001},
            float[4] scale = {1, 2, 3, 4},
            float[4] shift = {0, 1, 0, -1}
        > {
            y = If (c) <then_branch = a () => (p_1) {
                p_1 = LayerNormalization <axis = -1, epsilon = 0.001> (x, scale, shift)
            }, else_branch = b () => (float[N,4] q) {
                q = Neg (x)  # float[N,4]
            }>  # float[N,4]
        }
        ");
    }

    #[test]
    fn keeps_the_type_of_a_widened_quotient() {
        let graph = r#"<opset_import: ["" : 17]>
            g (float16[N,4] x) => (float16[N,4] y) <float two = {2}, float eps = {1e-3}> {
                mean = ReduceMean <axes = [-1]> (x)
                d = Sub (x, mean)
                w = Cast <to = 1> (d)
                sq = Pow (w, two)
                var = ReduceMean <axes = [-1]> (sq)
                e = Add (var, eps)
                s = Sqrt (e)
                n = Div (w, s)
                y = Cast <to = 10> (n)
            }"#;
        assert!(check(&FuseLayerNorm, graph).contains("y = LayerNormalization"));
        let wide = graph.replace("=> (float16[N,4] y)", "=> (float[N,4] n)").replace("y = Cast <to = 10> (n)", "");
        let mut kept = crate::testing::model(&wide);
        assert_eq!(FuseLayerNorm.apply(&mut kept, &Context::default()).unwrap().changes, []);
    }

    #[test]
    fn refuses() {
        let graph = |opset: i64, axes: &str, end: &str| {
            format!(
                r#"<opset_import: ["" : {opset}]>
                g (float[2,4] x) => (float[2,4] y, float[N,M] z) <float two = {{2}}, float eps = {{1e-5}}> {{
                    mean = ReduceMean <axes = [{axes}]> (x)
                    d = Sub (x, mean)
                    sq = Pow (d, two)
                    var = ReduceMean <axes = [{axes}]> (sq)
                    e = Add (var, eps)
                    s = Sqrt (e)
                    y = Div (d, s)
                    z = {end}
                }}"#
            )
        };
        check_refuses(&FuseLayerNorm, &graph(16, "-1", "Neg (x)"), "needs opset 17");
        check_refuses(&FuseLayerNorm, &graph(17, "0", "Neg (x)"), "not over the last axes");
        check_refuses(&FuseLayerNorm, &graph(17, "-1", "Neg (mean)"), "other uses");
    }
}
