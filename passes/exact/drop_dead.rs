//! Removes what nothing uses.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext, Saving};
use lathe_ir::{Graph, Model, NodeId};
use std::collections::BTreeSet;

/// See [`INFO`].
pub struct DropDead;

static INFO: Info = Info {
    name: "drop-dead",
    summary: "removes nodes, constants, optional outputs, local functions and operator sets that nothing uses",
    doc: "Works backwards from the outputs of the graph: a node none of whose outputs is used goes, and then what only \
          it needed. Constants without a user, optional outputs without a user (the mask of Dropout, the last states of \
          an LSTM), local functions that no node calls and operator sets that no node belongs to go as well. Inputs \
          and outputs of the model stay.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes, Saving::Parameters],
    source: None,
};

/// Operators all of whose outputs after the first may be left out.
const OPTIONAL_OUTPUTS: &[&str] =
    &["BatchNormalization", "Dropout", "GRU", "LSTM", "LayerNormalization", "MaxPool", "RNN", "Unique"];

impl Pass for DropDead {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, _: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for (graph, _) in model.graphs_mut() {
            drop_nodes(graph, &mut outcome);
            drop_optional_outputs(graph, &mut outcome);
            drop_constants(graph, &mut outcome);
        }
        drop_functions(model, &mut outcome);
        drop_opsets(model, &mut outcome);
        Ok(outcome)
    }
}

fn drop_nodes(graph: &mut Graph, outcome: &mut Outcome) {
    let unused = |graph: &Graph, id: NodeId| {
        graph.node(id).outputs().iter().flatten().all(|&v| graph.value(v).uses().is_empty())
    };
    let mut dead: Vec<NodeId> = graph.all_nodes().into_iter().filter(|&id| unused(graph, id)).collect();
    while let Some(id) = dead.pop() {
        if graph.get(id).is_none() {
            continue;
        }
        let place = graph.describe(id);
        let removed = graph.remove_unused(vec![id]);
        if removed > 0 {
            outcome.change("drop-node", place);
        }
        for _ in 1..removed {
            outcome.change("drop-node", "a node that only it needed");
        }
    }
}

fn drop_optional_outputs(graph: &mut Graph, outcome: &mut Outcome) {
    for id in graph.all_nodes() {
        let node = graph.node(id);
        if !node.is_standard() || !OPTIONAL_OUTPUTS.contains(&node.op_type.as_str()) {
            continue;
        }
        for index in (1..node.outputs().len()).rev() {
            let unused = graph.node(id).output(index).is_some_and(|v| graph.value(v).uses().is_empty());
            if unused {
                graph.drop_output(id, index);
                outcome.change("drop-output", graph.describe(id));
            }
        }
    }
}

fn drop_constants(graph: &mut Graph, outcome: &mut Outcome) {
    for scope in graph.scopes() {
        let all: Vec<_> = graph.initializers(scope).collect();
        for value in all {
            if graph.value(value).uses().is_empty() {
                outcome.change("drop-constant", format!("`{}`", graph.value(value).name));
                graph.remove_initializer(value);
            }
        }
    }
}

type Key = (String, String, String);

fn key(domain: &str, name: &str, overload: &str) -> Key {
    let domain = if domain == "ai.onnx" { "" } else { domain };
    (domain.to_owned(), name.to_owned(), overload.to_owned())
}

fn calls(graph: &Graph) -> BTreeSet<Key> {
    let node = |id: NodeId| {
        let node = graph.node(id);
        key(&node.domain, &node.op_type, &node.overload)
    };
    graph.all_nodes().into_iter().map(node).collect()
}

fn drop_functions(model: &mut Model, outcome: &mut Outcome) {
    if model.functions.is_empty() {
        return;
    }
    let mut called = calls(&model.graph);
    loop {
        let before = called.len();
        for function in &model.functions {
            if called.contains(&key(&function.domain, &function.name, &function.overload)) {
                called.extend(calls(&function.graph));
            }
        }
        if called.len() == before {
            break;
        }
    }
    model.functions.retain(|f| {
        let used = called.contains(&key(&f.domain, &f.name, &f.overload));
        if !used {
            outcome.change("drop-function", format!("`{}`", f.name));
        }
        used
    });
}

fn drop_opsets(model: &mut Model, outcome: &mut Outcome) {
    let mut used: BTreeSet<String> = BTreeSet::new();
    for (graph, _) in model.graphs() {
        used.extend(calls(graph).into_iter().map(|(domain, ..)| domain));
    }
    model.opsets.retain(|(domain, _)| {
        let kept = domain.is_empty() || domain == "ai.onnx" || used.contains(domain);
        if !kept {
            outcome.change("drop-opset", format!("`{domain}`"));
        }
        kept
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_untouched};
    use insta::assert_snapshot;

    #[test]
    fn drops_a_chain_that_leads_nowhere() {
        let graph = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] u = {3, 4}> {
            a = Add (x, w)
            b = Relu (a)
            y = Mul (x, u)
        }";
        assert_snapshot!(check(&DropDead, graph), @r#"
        g (float[2] x) => (float[2] y) <
            float[2] u = {3, 4}
        > {
            y = Mul (x, u)  # float[2]
        }
        "#);
    }

    #[test]
    fn drops_inside_subgraphs_and_keeps_what_they_capture() {
        let graph = "g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            k = Neg (x)
            y = If (c) <
                then_branch = t () => (float[2] p) { p = Add (k, w)  q = Exp (k) },
                else_branch = e () => (float[2] r) { r = Identity (x) }
            >
        }";
        assert_snapshot!(check(&DropDead, graph), @r#"
        g (bool c, float[2] x) => (float[2] y) <
            float[2] w = {1, 2}
        > {
            k = Neg (x)
            y = If (c) <then_branch = t () => (float[2] p) {
                p = Add (k, w)  # float[2]
            }, else_branch = e () => (float[2] r) {
                r = Identity (x)  # float[2]
            }>  # float[2]
        }
        "#);
    }

    #[test]
    fn keeps_a_graph_that_is_all_used() {
        check_untouched(&DropDead, "g (float[2] x) => (float[2] y, float[2] z) { y = Relu (x)  z = Neg (y) }");
    }
}
