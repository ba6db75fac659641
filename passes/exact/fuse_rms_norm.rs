//! Turns spelled-out root-mean-square normalizations into one operator.

use super::norm_parts::{self, averaged_axes, filled, normalized, spanning};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, Target, rewrite, rule};
use lathe_ir::{Model, Node, Patch, Pattern, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FuseRmsNorm;

static INFO: Info = Info {
    name: "fuse-rms-norm",
    summary: "replaces the steps of a root-mean-square normalization by one node",
    doc: "Mean square, square root and quotient over the last axes, in any order and spelling, with the scale that follows \
          and the casts around and inside a half precision one, become RMSNormalization where the model has opset 23, \
          else ONNX Runtime's SimplifiedLayerNormalization under the target ort. Needs a constant epsilon and inner \
          values without other uses.",
    options: &[],
    // The operator sums the squares in another order.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Saving::Nodes],
    source: Some("Zhang and Sennrich 2019, arXiv:1910.07467"),
};

impl Pass for FuseRmsNorm {
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

static RULES: LazyLock<[Vec<Rule>; 3]> = LazyLock::new(|| {
    let normalized = "x, Pow(Add(mean: ReduceMean(Pow*(x, 2), ..), epsilon), -0.5)";
    let pattern = |text: String| Pattern::parse(&text).through_casts();
    [
        vec![rule("fuse-scale", pattern(format!("Mul*({normalized}, scale)")), |m, g| fuse(m, g, true))],
        vec![rule("fuse-narrowed", pattern(format!("Cast(Mul*({normalized}))")), |m, g| fuse(m, g, false))],
        vec![rule("fuse-normalized", pattern(format!("Mul*({normalized})")), |m, g| fuse(m, g, false))],
    ]
});

fn fuse(m: &Match, g: &mut Patch, scaled: bool) -> Result<ValueId, Refusal> {
    let op = match (m.has_operator("RMSNormalization"), m.context().target) {
        (true, _) => "RMSNormalization",
        (false, Target::Ort) => "SimplifiedLayerNormalization",
        (false, _) => return Err("RMSNormalization needs opset 23".into()),
    };
    let axis = averaged_axes(m, m.value("x"))?;
    let x = normalized(m)?;
    let epsilon = norm_parts::epsilon(m)?;
    let scale = if scaled { spanning(m, g, "scale", &x, axis)? } else { filled(m, g, "scale", &x, axis, 1.0)? };
    let node = Node::new(op).with("axis", axis).with("epsilon", epsilon).with("stash_type", 1);
    Ok(g.node(node, &[x.x, scale]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_in, check_refuses, check_refuses_in};
    use insta::assert_snapshot;

    const GRAPH: &str = r#"g (float[N,4] x) => (float[N,4] y)
        <int64[1] axes = {-1}, float two = {2}, float eps = {1e-5}, float[4] scale = {1, 2, 3, 4}> {
            sq = Pow (x, two)
            mean = ReduceMean (sq, axes)
            e = Add (mean, eps)
            s = Sqrt (e)
            r = Reciprocal (s)
            n = Mul (x, r)
            y = Mul (scale, n)
        }"#;

    #[test]
    fn writes_the_standard_operator() {
        let graph = format!("<opset_import: [\"\" : 23]> {GRAPH}");
        assert_snapshot!(check(&FuseRmsNorm, &graph), @"
        g (float[N,4] x) => (float[N,4] y) <
            int64[1] axes = {-1},
            float two = {2},
            float eps = {1e-5},
            float[4] scale = {1, 2, 3, 4}
        > {
            y = RMSNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (x, scale)  # float[N,4]
        }
        ");
    }

    #[test]
    fn writes_the_operator_of_onnx_runtime() {
        let graph = format!("<opset_import: [\"\" : 18]> {GRAPH}");
        let cx = PassContext::default().with_target(Target::Ort);
        assert_snapshot!(check_in(&FuseRmsNorm, &graph, &cx), @"
        g (float[N,4] x) => (float[N,4] y) <
            int64[1] axes = {-1},
            float two = {2},
            float eps = {1e-5},
            float[4] scale = {1, 2, 3, 4}
        > {
            y = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (x, scale)  # float[N,4]
        }
        ");
    }

    #[test]
    fn absorbs_the_casts_of_half_precision_in_a_branch() {
        let cx = PassContext::default().with_target(Target::Ort);
        assert_snapshot!(check_in(&FuseRmsNorm, r#"<opset_import: ["" : 17]>
            g (bool c, float16[N,4] x) => (float16[N,4] y) <float eps = {1e-5}, float one = {1}, float16[4] scale = {15360, 16384, 16896, 17408}> {
                y = If (c) <then_branch = a () => (float16[N,4] p) {
                    w = Cast <to = 1> (x)
                    sq = Mul (w, w)
                    mean = ReduceMean <axes = [1]> (sq)
                    e = Add (mean, eps)
                    s = Sqrt (e)
                    r = Div (one, s)
                    n = Mul (w, r)
                    h = Cast <to = 10> (n)
                    p = Mul (h, scale)
                }, else_branch = b () => (float16[N,4] q) { q = Neg (x) }>
            }"#, &cx), @"
        g (bool c, float16[N,4] x) => (float16[N,4] y) <
            float eps = {1e-5},
            float one = {1},
            float16[4] scale = {15360, 16384, 16896, 17408}
        > {
            y = If (c) <then_branch = a () => (p_1) {
                p_1 = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (x, scale)
            }, else_branch = b () => (float16[N,4] q) {
                q = Neg (x)  # float16[N,4]
            }>  # float16[N,4]
        }
        ");
    }

    #[test]
    fn fuses_every_spelling() {
        for square in ["sq = Mul (x, x)", "sq = Pow (x, two)"] {
            for end in [
                "r = Sqrt (e) y = Div (x, r)",
                "r = Sqrt (e) q = Reciprocal (r) y = Mul (q, x)",
                "r = Reciprocal (e) q = Sqrt (r) y = Mul (q, x)",
                "r = Pow (e, minus) y = Mul (x, r)",
                "r = Pow (e, half) y = Div (x, r)",
                "r = Sqrt (e) q = Div (one, r) p = Mul (q, scale) y = Mul (p, x)",
                "r = Sqrt (e) p = Mul (x, scale) y = Div (p, r)",
            ] {
                let graph = format!(
                    r#"<opset_import: ["" : 23]> g (float[N,4] x) => (float[N,4] y)
                    <int64[1] axes = {{1}}, float two = {{2}}, float half = {{0.5}}, float minus = {{-0.5}}, float one = {{1}},
                     float[1] eps = {{1e-5}}, float[1,4] scale = {{1, 2, 3, 4}}> {{
                        {square} mean = ReduceMean (sq, axes) e = Add (eps, mean) {end}
                    }}"#
                );
                assert!(check(&FuseRmsNorm, &graph).contains("y = RMSNormalization"), "{graph}");
            }
        }
    }

    #[test]
    fn refuses() {
        let graph = format!("<opset_import: [\"\" : 18]> {GRAPH}");
        check_refuses(&FuseRmsNorm, &graph, "needs opset 23");
        let cx = PassContext::default().with_target(Target::Ort);
        let shown = graph.replace("=> (float[N,4] y)", "=> (float[N,4] y, float[N,1] r)");
        check_refuses_in(&FuseRmsNorm, &shown, "an inner value is a graph output", &cx);
        let varying = graph.replace("x) =>", "x, float eps2) =>").replace("(mean, eps)", "(mean, eps2)");
        check_refuses_in(&FuseRmsNorm, &varying, "`epsilon` is not a constant", &cx);
        let wide = graph.replace("(float[N,4] y)", "(float[1,N,4] y)").replace("float eps", "float[1,1,1] eps");
        check_refuses_in(&FuseRmsNorm, &wide, "a constant adds axes", &cx);
        let dropped = graph.replace("(float[N,4]", "(float[4,4]").replace("ReduceMean", "ReduceMean <keepdims = 0>");
        check_refuses_in(&FuseRmsNorm, &dropped, "the mean drops its axes", &cx);
        check_refuses_in(&FuseRmsNorm, &graph.replace("axes = {-1}", "axes = {0}"), "not over the last axes", &cx);
    }
}
