//! Rewrites nodes that the chosen execution provider has no kernel for into equal ones that it has kernels for.

use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FitProvider;

static INFO: Info = Info {
    name: "fit-provider",
    summary: "rewrites nodes that the provider of --ep has no kernel for, where it has one for an equal form",
    doc: "Only with an --ep other than cpu, and only where the runtime, asked once, runs the operator elsewhere: a value \
          that goes to another device and back costs more than the node. Where(IsNaN(p), c, p) of a Softmax p, as \
          exporters guard rows without a key, becomes Where(p ≥ 0, p, c): a Softmax is never negative, and NaN is not \
          at least 0. Pad by reflection becomes slices in reverse beside the value. Declines where the padded sizes or \
          the paddings are not known.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for FitProvider {
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
        rule("guard-by-sign", pat!(Where(IsNaN(p: Softmax(..)), c, q)), |m, g| {
            m.only_if(m.context().missing_kernels.contains("IsNaN") && m.opset() >= 12)?;
            let guarded = m.made("p");
            m.only_if(m.value("q") == guarded)?;
            let zero = Tensor::from_f64s(m.elem("c")?, &[], &[0.0]).ok_or(Refusal::NoMatch)?;
            let zero = g.constant("zero", zero);
            let valid = g.node(Node::new("GreaterOrEqual"), &[guarded, zero]);
            Ok(g.node(Node::new("Where"), &[valid, guarded, m.value("c")]))
        })
        .sharing(),
        rule("reflect-by-slices", pat!(pad: Pad(x, pads)), |m, g| {
            m.only_if(m.context().missing_kernels.contains("Pad:reflect"))?;
            let pad = m.node("pad");
            m.only_if(pad.string("mode") == Some("reflect") && pad.input(3).is_none() && m.opset() >= 11)?;
            reflected(m, g)
        }),
    ]
}

/// The value with its own ends in reverse beside it, one axis after the other.
fn reflected(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let pads = m.known_int64s(m.value("pads")).ok_or("the paddings are not known")?;
    let ndim = m.ndim("x")?;
    m.require(pads.len() == 2 * ndim && pads.iter().all(|&pad| pad >= 0), "the paddings are not of every axis")?;
    let sizes: Vec<Option<i64>> = m.shape("x")?.iter().map(|size| size.as_known()).collect();
    let mut value = m.value("x");
    for axis in 0..ndim {
        let (before, after) = (pads[axis], pads[ndim + axis]);
        if before == 0 && after == 0 {
            continue;
        }
        let size = sizes[axis].ok_or("a padded size is not known")?;
        m.require(before < size && after < size, "more is padded than there is to reflect")?;
        let mut part = |from: i64, to: i64, whole: ValueId| {
            let ends = [[from], [to], [axis as i64], [-1]].map(|one| g.int64s("ends", &one));
            g.node(Node::new("Slice"), &[whole, ends[0], ends[1], ends[2], ends[3]])
        };
        let mut parts = Vec::new();
        if before > 0 {
            parts.push(part(before, 0, value));
        }
        parts.push(value);
        if after > 0 {
            // What would be −1 counts from the end.
            let end = size - 2 - after;
            parts.push(part(size - 2, if end < 0 { i64::MIN + 1 } else { end }, value));
        }
        value = g.node(Node::new("Concat").with("axis", axis as i64), &parts);
    }
    m.only_if(value != m.value("x"))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_in, check_refuses_in, check_untouched};

    fn lacking(op: &str) -> PassContext<'static> {
        PassContext::default().with_evaluator(lathe_testkit::evaluator()).with_missing_kernels([op.to_owned()].into())
    }

    const GUARD: &str = "g (float[n,4] x, float[n,4] bias) => (float[n,4] y) <float zero = {0.0}> {
        z = Add (x, bias) p = Softmax <axis = -1> (z) bad = IsNaN (p) y = Where (bad, zero, p) }";

    #[test]
    fn a_guard_against_nan_looks_at_the_sign() {
        insta::assert_snapshot!(check_in(&FitProvider, GUARD, &lacking("IsNaN")), @r#"
        g (float[n,4] x, float[n,4] bias) => (float[n,4] y) <
            float zero = {0},
            float y_zero = {0}
        > {
            z = Add (x, bias)
            p = Softmax <axis = -1> (z)
            y_1 = GreaterOrEqual (p, y_zero)
            y = Where (y_1, p, zero)  # float[n,4]
        }
        "#);
        check_untouched(&FitProvider, GUARD);
    }

    #[test]
    fn reflection_is_slices_in_reverse() {
        let pad = |size: &str| {
            format!(
                "g (float[1,n,{size}] x) => (float[1,n,m] y) <int64[6] pads = {{0, 0, 2, 0, 0, 3}}> {{
                    y = Pad <mode = \"reflect\"> (x, pads) }}"
            )
        };
        insta::assert_snapshot!(check_in(&FitProvider, &pad("5"), &lacking("Pad:reflect")), @r#"
        g (float[1,n,5] x) => (float[1,n,m] y) <
            int64[6] pads = {0, 0, 2, 0, 0, 3},
            int64[1] y_ends = {2},
            int64[1] y_ends_1 = {0},
            int64[1] y_ends_2 = {2},
            int64[1] y_ends_3 = {-1},
            int64[1] y_ends_4 = {3},
            int64[1] y_ends_5 = {0},
            int64[1] y_ends_6 = {2},
            int64[1] y_ends_7 = {-1}
        > {
            y_1 = Slice (x, y_ends, y_ends_1, y_ends_2, y_ends_3)
            y_2 = Slice (x, y_ends_4, y_ends_5, y_ends_6, y_ends_7)
            y = Concat <axis = 2> (y_1, x, y_2)  # float[1,n,m]
        }
        "#);
        check_refuses_in(&FitProvider, &pad("k"), "a padded size is not known", &lacking("Pad:reflect"));
        check_untouched(&FitProvider, &pad("5"));
        let padded = |inputs: &str, pads: &str| {
            format!(
                "g (float[1,n,5] x{inputs}) => (float[1,n,m] y) {pads} {{ y = Pad <mode = \"reflect\"> (x, pads) }}"
            )
        };
        for (graph, reason) in [
            (padded(", int64[6] pads", ""), "the paddings are not known"),
            (padded("", "<int64[6] pads = {0, 0, -1, 0, 0, 3}>"), "the paddings are not of every axis"),
            (padded("", "<int64[6] pads = {0, 0, 5, 0, 0, 0}>"), "more is padded than there is to reflect"),
        ] {
            check_refuses_in(&FitProvider, &graph, reason, &lacking("Pad:reflect"));
        }
    }

    #[test]
    fn what_the_provider_lacks_is_not_written() {
        let gelu =
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n,4] x) => (float[n,4] y) <float half = {0.5}, float one = {1.0}, float root = {1.4142135}> {
            a = Div (x, root) e = Erf (a) f = Add (e, one) h = Mul (x, f) y = Mul (h, half) }";
        let ort = lacking("com.microsoft.Gelu").with_target(crate::Target::Ort);
        check_refuses_in(
            &super::super::fuse_gelu::FuseGelu,
            gelu,
            "the provider has no right kernel for com.microsoft.Gelu",
            &ort,
        );
    }
}
