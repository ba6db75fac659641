//! Turns spelled-out layer normalizations into `LayerNormalization`.

use super::norm_parts::{self, averaged_axes, filled, normalized, spanning};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, Target, rewrite, rule};
use lathe_ir::{Model, Node, Patch, Pattern, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FuseLayerNorm;

static INFO: Info = Info {
    name: "fuse-layer-norm",
    summary: "replaces the steps of a layer normalization by one LayerNormalization",
    doc: "Mean, difference, mean square, square root and quotient over the last axes, in any order and spelling, become one \
          LayerNormalization, with the scale and shift that follow where they have the normalized axes or are one \
          number, and the casts around and inside a half precision one. Needs opset 17 (any under the target ort), a \
          constant epsilon, and inner values without other uses.",
    options: &[],
    // The operator sums in another order and may take the variance as E[x²] − E[x]².
    kind: Kind::Equivalent { rtol: 1e-4 },
    lowers: &[Saving::Nodes],
    source: Some("Ba et al. 2016, arXiv:1607.06450"),
};

impl Pass for FuseLayerNorm {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        // Whole forms first: a part that is fused alone no longer matches them.
        let mut outcome = Outcome::default();
        for rules in &*RULES {
            outcome.merge(rewrite(model, cx, rules)?);
        }
        Ok(outcome)
    }
}

static RULES: LazyLock<[Vec<Rule>; 4]> = LazyLock::new(|| {
    let centred = "Add*(x, -mean: ReduceMean(x, ..))";
    let inverse = format!("Pow(Add(mean: ReduceMean(Pow*({centred}, 2), ..), epsilon), -0.5)");
    let pattern = |text: String| Pattern::parse(&text).through_casts();
    // TensorFlow scales the inverse deviation first: x·inverse + (shift − mean·inverse).
    let shifted = format!(
        "(Add*(Mul*({centred}, {inverse}, scale), shift)
        | Add*(Mul*(x, {inverse}, scale), shift, -Mul*(mean: ReduceMean(x, ..), {inverse}, scale)))"
    );
    let scaled = format!("Mul*({centred}, {inverse}, scale)");
    [
        vec![rule("fuse-scale-and-shift", pattern(shifted), |m, g| fuse(m, g, Affine::ScaleAndShift))],
        vec![rule("fuse-scale", pattern(scaled), |m, g| fuse(m, g, Affine::Scale))],
        vec![rule("fuse-narrowed", pattern(format!("Cast(Mul*({centred}, {inverse}))")), |m, g| {
            fuse(m, g, Affine::None)
        })],
        vec![rule("fuse-normalized", pattern(format!("Mul*({centred}, {inverse})")), |m, g| fuse(m, g, Affine::None))],
    ]
});

/// What follows the normalization.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Affine {
    None,
    Scale,
    ScaleAndShift,
}

fn fuse(m: &Match, g: &mut Patch, affine: Affine) -> Result<ValueId, Refusal> {
    let available = m.has_operator("LayerNormalization") || m.context().target == Target::Ort;
    m.require(available, "LayerNormalization needs opset 17")?;
    let axis = averaged_axes(m, m.value("x"))?;
    let x = normalized(m)?;
    let epsilon = norm_parts::epsilon(m)?;
    let scale = match affine {
        Affine::None => filled(m, g, "scale", &x, axis, 1.0)?,
        Affine::Scale | Affine::ScaleAndShift => spanning(m, g, "scale", &x, axis)?,
    };
    let mut inputs = vec![Some(x.x), Some(scale)];
    if affine == Affine::ScaleAndShift {
        inputs.push(Some(spanning(m, g, "shift", &x, axis)?));
    }
    let node = Node::new("LayerNormalization").with("axis", axis).with("epsilon", epsilon);
    Ok(g.node_with(node, &inputs, 1)[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_in, check_refuses, check_untouched};
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
            }"#, &PassContext::default()), @"
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
            }"#, &PassContext::default().with_target(Target::Ort)), @"
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
        assert_eq!(FuseLayerNorm.apply(&mut kept, &PassContext::default()).unwrap().changes, []);
    }

    /// A layer normalization whose deviation is made by `inverse` and whose end is `end`.
    fn spelled(x: &str, square: &str, inverse: &str, end: &str) -> String {
        format!(
            r#"<opset_import: ["" : 18]> g (float[N,3,4] {x}) => (float[N,3,4] y)
            <int64[1] axes = {{-1}}, float two = {{2}}, float half = {{0.5}}, float minus = {{-0.5}}, float[1] one = {{1}},
             float[1,1] eps = {{1e-5}}, float[1,1,4] scale = {{1, 2, 3, 4}}, float shift = {{0.5}}> {{
                mean = ReduceMean (x, axes)
                d = Sub (x, mean)
                {square}
                var = ReduceMean (sq, axes)
                e = Add (eps, var)
                {inverse}
                {end}
            }}"#
        )
    }

    #[test]
    fn fuses_every_spelling() {
        let root = "r = Sqrt (e)";
        for square in ["sq = Mul (d, d)", "sq = Pow (d, two)", "n = Neg (mean) k = Add (x, n) sq = Mul (k, d)"] {
            for (inverse, end) in [
                (root, "y = Div (d, r)"),
                ("r = Pow (e, half)", "y = Div (d, r)"),
                ("r = Pow (e, minus)", "y = Mul (r, d)"),
                ("q = Sqrt (e) r = Reciprocal (q)", "y = Mul (d, r)"),
                ("q = Reciprocal (e) r = Sqrt (q)", "y = Mul (d, r)"),
                ("q = Sqrt (e) r = Div (one, q)", "y = Mul (d, r)"),
                (root, "q = Div (scale, r) p = Mul (d, q) y = Add (shift, p)"),
                (root, "q = Mul (d, scale) p = Div (q, r) y = Sub (p, shift)"),
                ("q = Pow (e, minus) r = Mul (scale, q)", "y = Mul (d, r)"),
                (
                    "q = Pow (e, minus) r = Mul (scale, q)",
                    "a = Mul (x, r) b = Mul (mean, r) c = Sub (a, b) y = Add (c, shift)",
                ),
            ] {
                let graph = spelled("x", square, inverse, end);
                let fused = check(&FuseLayerNorm, &graph);
                assert!(fused.contains("y = LayerNormalization") || end.contains("Sub (p"), "{graph}\n{fused}");
            }
        }
    }

    #[test]
    fn a_parameter_may_be_one_number_or_have_further_axes() {
        let end = "p = Div (d, r) q = Mul (p, scale) y = Add (q, shift)";
        assert_snapshot!(check(&FuseLayerNorm, &spelled("x", "sq = Mul (d, d)", "r = Sqrt (e)", end)), @"
        g (float[N,3,4] x) => (float[N,3,4] y) <
            int64[1] axes = {-1},
            float two = {2},
            float half = {0.5},
            float minus = {-0.5},
            float[1] one = {1},
            float[1,1] eps = {1e-5},
            float[1,1,4] scale = {1, 2, 3, 4},
            float shift = {0.5},
            float[4] y_scale = {1, 2, 3, 4},
            float[4] y_shift = {0.5, 0.5, 0.5, 0.5}
        > {
            y = LayerNormalization <axis = -1, epsilon = 1e-5> (x, y_scale, y_shift)  # float[N,3,4]
        }
        ");
    }

    #[test]
    fn refuses() {
        let graph = |opset: i64, axes: &str, end: &str| {
            format!(
                r#"<opset_import: ["" : {opset}]>
                g (float[4,4] x) => (float[4,4] y, float[N,M] z) <float two = {{2}}, float eps = {{1e-5}}, float[2] both = {{1, 2}}> {{
                    mean = ReduceMean <axes = [{axes}]> (x)
                    d = Sub (x, mean)
                    sq = Pow (d, two)
                    var = ReduceMean <axes = [-1]> (sq)
                    e = Add (var, eps)
                    s = Sqrt (e)
                    y = Div (d, s)
                    z = {end}
                }}"#
            )
        };
        let plain = graph(17, "-1", "Neg (x)");
        check_refuses(&FuseLayerNorm, &graph(16, "-1", "Neg (x)"), "needs opset 17");
        check_refuses(&FuseLayerNorm, &graph(17, "0", "Neg (x)"), "the means are over different axes");
        check_refuses(&FuseLayerNorm, &plain.replace("[-1]", "[0]"), "not over the last axes");
        check_refuses(&FuseLayerNorm, &graph(17, "-1", "Neg (mean)"), "other uses");
        let dropped = plain.replace("<axes = [-1]>", "<axes = [-1], keepdims = 0>");
        check_refuses(&FuseLayerNorm, &dropped, "the mean drops its axes");
        check_refuses(&FuseLayerNorm, &plain.replace("<axes = [-1]>", ""), "the mean is over all axes");
        let wide = plain.replace("float[4,4] y", "float[1,4,4] y").replace("float eps", "float[1,1,1] eps");
        check_refuses(&FuseLayerNorm, &wide, "a constant adds axes");
        check_refuses(&FuseLayerNorm, &plain.replace("{1e-5}", "{-1e-5}"), "epsilon is negative");
        check_refuses(
            &FuseLayerNorm,
            &plain.replace("float eps = {1e-5}", "float[4] eps = {1, 2, 3, 4}"),
            "epsilon is not one number",
        );
        check_refuses(&FuseLayerNorm, &plain.replace("Add (var, eps)", "Add (var, x)"), "`epsilon` is not a constant");
        check_refuses(&FuseLayerNorm, &plain.replace("float", "double"), "not float, float16 or bfloat16");
    }

    #[test]
    fn refuses_parameters_that_do_not_fit() {
        let graph = r#"<opset_import: ["" : 17]>
            g (float[N,3,4] x) => (float[N,3,4] y, float m) <float eps = {1e-5}, float[3,1] scale = {1, 2, 3}> {
                mean = ReduceMean <axes = [-1]> (x)
                d = Sub (x, mean)
                sq = Mul (d, d)
                var = ReduceMean <axes = [-1]> (sq)
                e = Add (var, eps)
                s = Sqrt (e)
                n = Div (d, s)
                y = Mul (n, scale)
                m = ReduceMean <keepdims = 0> (n)
            }"#;
        // What is normalized is read twice, so that nothing smaller can be fused either.
        check_refuses(&FuseLayerNorm, &graph.replace("(n)", "(s)"), "does not have the normalized axes");
        let half = graph.replace("float[3,1] scale = {1, 2, 3}", "float16[4] scale = {15360, 16384, 16896, 17408}");
        let half = half.replace("(n, scale)", "(n, w)").replace("mean = Red", "w = Cast <to = 1> (scale) mean = Red");
        assert!(check(&FuseLayerNorm, &half).contains("LayerNormalization"));
    }

    #[test]
    fn a_cast_to_whole_numbers_is_no_part_of_it() {
        let graph = r#"<opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) <float eps = {1e-5}> {
                mean = ReduceMean <axes = [-1]> (x)
                d = Sub (x, mean)
                whole = Cast <to = 7> (d)
                sq = Mul (whole, whole)
                back = Cast <to = 1> (sq)
                var = ReduceMean <axes = [-1]> (back)
                e = Add (var, eps)
                s = Sqrt (e)
                y = Div (d, s)
            }"#;
        check_untouched(&FuseLayerNorm, graph);
        assert!(check(&FuseLayerNorm, &graph.replace("to = 7", "to = 11")).contains("LayerNormalization"));
    }
}
