//! Makes what a file says about itself fit what it holds.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext};
use lathe_ir::{Graph, Model, ScopeId};
use std::collections::BTreeSet;

/// See [`INFO`].
pub struct NormaliseModel;

static INFO: Info = Info {
    name: "normalise-model",
    summary: "makes names unique and drops operator sets that nothing uses",
    doc: "Gives values that share a name names of their own (graph inputs and outputs keep theirs), puts nodes in an \
          order in which each follows what it needs, drops imported operator sets that no node and no function uses, \
          and raises the IR version to the least that the imported operator sets and the initializers need.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[],
    source: None,
};

/// The least IR version that goes with an operator set of the standard domain, from the first opset on.
const IR_VERSIONS: &[(i64, i64)] =
    &[(1, 3), (9, 4), (10, 5), (11, 6), (12, 7), (15, 8), (19, 9), (21, 10), (23, 11), (24, 12), (25, 13), (28, 14)];

impl Pass for NormaliseModel {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, _: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for (graph, _) in model.graphs_mut() {
            for id in graph.all_nodes() {
                // Both names mean the standard domain; one of them makes nodes comparable.
                if graph.node(id).domain == "ai.onnx" {
                    let place = graph.describe(id);
                    graph.node_mut(id).domain.clear();
                    outcome.change("name-standard-domain", place);
                }
            }
            graph.sort()?;
            let renamed = graph.make_names_unique();
            if renamed > 0 {
                outcome.change("make-names-unique", format!("{renamed} values of `{}`", graph.main().name));
            }
        }
        drop_imports(model, &mut outcome);
        let needed = least_ir_version(model);
        if model.ir_version < needed {
            outcome.change("raise-ir-version", format!("from {} to {needed}", model.ir_version));
            model.ir_version = needed;
        }
        Ok(outcome)
    }
}

fn drop_imports(model: &mut Model, outcome: &mut Outcome) {
    let mut used: BTreeSet<String> = model.functions.iter().map(|f| f.domain.clone()).collect();
    for function in &mut model.functions {
        let inside = domains(&function.graph);
        // Whoever calls the function must be able to run its body.
        used.extend(inside.iter().cloned());
        function.opsets.retain(|(domain, _)| {
            let keep = is_standard(domain) || inside.contains(domain);
            if !keep {
                outcome.change("drop-import", format!("`{domain}` in function `{}`", function.name));
            }
            keep
        });
    }
    used.extend(domains(&model.graph));
    model.opsets.retain(|(domain, version)| {
        let keep = is_standard(domain) || used.contains(domain);
        if !keep {
            outcome.change("drop-import", format!("`{domain}` {version}"));
        }
        keep
    });
}

fn domains(graph: &Graph) -> BTreeSet<String> {
    graph.all_nodes().into_iter().map(|id| graph.node(id).domain.clone()).collect()
}

fn is_standard(domain: &str) -> bool {
    domain.is_empty() || domain == "ai.onnx"
}

/// The least IR version of a file that may hold `model`.
pub(super) fn least_ir_version(model: &Model) -> i64 {
    let opset = model.opset();
    let by_opset = IR_VERSIONS.iter().rev().find(|(first, _)| *first <= opset).map_or(3, |(_, version)| *version);
    let unlisted = model.graph.initializers(ScopeId::MAIN).next().is_some();
    let by_initializers = if unlisted { 4 } else { 3 };
    let by_functions = if model.functions.is_empty() { 3 } else { 8 };
    by_opset.max(by_initializers).max(by_functions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;

    #[test]
    fn drops_unused_imports_and_raises_the_ir_version() {
        let mut m = model("g (float[2] x) => (float[2] y) { y = Neg (x) }");
        m.import("com.example", 1);
        m.ir_version = 3;
        let outcome = NormaliseModel.apply(&mut m, &PassContext::default()).unwrap();
        assert_eq!(outcome.changes.len(), 2);
        assert_eq!(m.opsets, [(String::new(), 21)]);
        assert_eq!(m.ir_version, 10);
        assert_eq!(NormaliseModel.apply(&mut m, &PassContext::default()).unwrap(), Outcome::default());
    }

    #[test]
    fn keeps_the_import_of_a_custom_operator_in_a_subgraph() {
        let mut m = model(
            "
            g (bool c, float[2] x) => (float[2] y) {
                y = If (c) <then_branch = t () => (float[2] p) { p = com.example.Foo (x) },
                            else_branch = e () => (float[2] q) { q = Neg (x) }>
            }",
        );
        assert_eq!(NormaliseModel.apply(&mut m, &PassContext::default()).unwrap(), Outcome::default());
        assert_eq!(m.opset_of("com.example"), Some(1));
    }

    #[test]
    fn makes_names_unique() {
        let mut m = model("g (float[2] x) => (float[2] y) { t = Neg (x) y = Neg (t) }");
        let t = m.graph.find_value("t").unwrap();
        m.graph.rename(t, "x");
        let outcome = NormaliseModel.apply(&mut m, &PassContext::default()).unwrap();
        assert_eq!(outcome.changes.len(), 1);
        assert_ne!(m.graph.value(t).name, "x");
    }
}
