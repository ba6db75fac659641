//! Removes nodes that hand their input on unchanged.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext, Rule, Saving, pat, rewrite, rule};
use lathe_ir::Model;
use std::sync::LazyLock;

/// See [`INFO`].
pub struct DropIdentities;

static INFO: Info = Info {
    name: "drop-identities",
    summary: "removes Identity nodes, and Dropout nodes that are inactive in inference",
    doc: "An Identity node, and a Dropout node outside training mode whose mask is unused, hand their input on \
          unchanged. Their users read the input instead. Declines where only a copy can give a graph input, a \
          constant or a second output its own output name, and where a subgraph would return a value of an outer graph.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for DropIdentities {
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
        rule("drop-identity", pat!(Identity(x)), |m, _| {
            m.require_replaceable("output", "x")?;
            Ok(m.value("x"))
        }),
        rule("drop-dropout", pat!(node: Dropout(x, ..)), |m, _| {
            let training = m.node("node").input(2);
            let off = training.is_none_or(|v| m.known_bool(v) == Some(false));
            m.require(off, "the node may be in training mode")?;
            m.require(m.opset() >= 7, "before opset 7 a flag decides between training and inference")?;
            m.require_replaceable("output", "x")?;
            Ok(m.value("x"))
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    #[test]
    fn drops_a_copy() {
        assert_snapshot!(check(&DropIdentities, "g (float[2] x) => (float[2] y) { c = Identity (x) y = Neg (c) }"), @"
        g (float[2] x) => (float[2] y) {
            y = Neg (x)  # float[2]
        }");
    }

    #[test]
    fn keeps_the_second_of_two_outputs_of_a_body() {
        let graph = "
            g (float[2] s, float[3,2] x) => (float[2] y, float[3,2] z) {
                y, z = Scan (s, x) <num_scan_inputs = 1, body = b (float[2] a, float[2] e) => (float[2] n, float[2] o) {
                    n = Add (a, e)
                    o = Identity (n)
                }>
            }";
        check_refuses(&DropIdentities, graph, "a subgraph would return one value twice");
    }

    #[test]
    fn keeps_what_may_drop_elements() {
        let training = "<ir_version: 8, opset_import: [\"\" : 13]>
            g (float[2] x, bool t) => (float[2] y) { d = Dropout (x, , t) y = Neg (d) }";
        check_refuses(&DropIdentities, training, "the node may be in training mode");
        let old =
            "<ir_version: 3, opset_import: [\"\" : 6]> g (float[2] x) => (float[2] y) { d = Dropout (x) y = Neg (d) }";
        check_refuses(&DropIdentities, old, "before opset 7 a flag decides between training and inference");
    }

    #[test]
    fn keeps_an_identity_that_makes_one_value_two_outputs() {
        let graph = "g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x) z = Identity (y) }";
        check_refuses(&DropIdentities, graph, "two outputs would be one value");
    }
}
