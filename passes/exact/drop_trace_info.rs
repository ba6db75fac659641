//! Drops what an exporter wrote down for its own developers: stack traces, module names, rewriting history.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext};
use lathe_ir::{Graph, Metadata, Model, ValueId};

/// See [`INFO`].
pub struct DropTraceInfo;

static INFO: Info = Info {
    name: "drop-trace-info",
    summary: "drops the exporter's traces: where in its source each node came from",
    doc: "Drops metadata that PyTorch's exporter attaches to nodes, values and graphs for debugging: stack traces with \
          the paths of source files, module hierarchies, the nodes of its own graph. No runtime reads it, and in a \
          large model it is megabytes. Types of initializers that only repeat their tensors' go too. Metadata of other \
          makers, and everything said about the model as a whole, stays.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[],
    source: None,
};

/// How the keys begin under which PyTorch's exporter keeps its notes.
const PREFIXES: &[&str] = &["pkg.torch.", "pkg.onnxscript."];

/// A key without a prefix that PyTorch's exporter writes beside the others.
const NAMESPACE: &str = "namespace";

fn is_note(key: &str) -> bool {
    PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// Whether the exporter left notes here. Asked before anything is edited: an edit makes all that is known about a
/// graph out of date.
fn has_notes(metadata: &Metadata) -> bool {
    metadata.iter().any(|(key, _)| is_note(key))
}

/// Drops notes and returns how many bytes they took.
fn drop_notes(metadata: &mut Metadata) -> u64 {
    let bytes = |all: &Metadata| all.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    let before = bytes(metadata);
    metadata.retain(|(key, _)| !is_note(key) && key != NAMESPACE);
    (before - bytes(metadata)) as u64
}

/// Whether the file says of an initializer, beside its tensor, only what the tensor says.
fn is_stated_twice(graph: &Graph, value: ValueId) -> bool {
    let (Some(tensor), Some(ty)) = (graph.constant(value), &graph.value(value).ty) else { return false };
    let dims: Vec<i64> = tensor.dims().iter().map(|&d| d as i64).collect();
    let same = ty.elem() == Some(tensor.dtype()) && ty.shape().and_then(|s| s.sizes()) == Some(dims);
    same && graph.value(value).metadata.is_empty() && !graph.is_output(value)
}

/// Drops the notes in a graph and returns how many bytes they took.
fn drop_in(graph: &mut Graph, outcome: &mut Outcome) -> u64 {
    let mut saved = 0;
    for scope in graph.scopes() {
        if has_notes(&graph.scope(scope).metadata) {
            saved += drop_notes(&mut graph.scope_mut(scope).metadata);
            outcome.change("drop-graph-notes", format!("graph `{}`", graph.scope(scope).name));
        }
        let made = graph.nodes(scope).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
        let values = graph.scope(scope).inputs().iter().copied().chain(graph.initializers(scope)).chain(made);
        let noted: Vec<_> = values.filter(|&value| has_notes(&graph.value(value).metadata)).collect();
        for value in noted {
            saved += drop_notes(&mut graph.value_mut(value).metadata);
            outcome.change("drop-value-notes", format!("value `{}`", graph.value(value).name));
        }
    }
    for scope in graph.scopes() {
        let stated: Vec<_> = graph.initializers(scope).filter(|&value| is_stated_twice(graph, value)).collect();
        for value in stated {
            graph.value_mut(value).ty = None;
            outcome.change("drop-second-type", format!("value `{}`", graph.value(value).name));
        }
    }
    for id in graph.all_nodes() {
        if has_notes(&graph.node(id).metadata) {
            saved += drop_notes(&mut graph.node_mut(id).metadata);
            outcome.change("drop-node-notes", graph.describe(id));
        }
    }
    saved
}

impl Pass for DropTraceInfo {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for (graph, _) in model.graphs_mut() {
            cx.saved.set(cx.saved.get() + drop_in(graph, &mut outcome));
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;
    use lathe_ir::{DataType, Dim, Type};

    fn pairs(keys: &[&str]) -> Metadata {
        keys.iter().map(|key| ((*key).to_owned(), "x".to_owned())).collect()
    }

    #[test]
    fn drops_traces_in_subgraphs_too_and_keeps_the_rest() {
        let mut m = model(
            "g (bool c, float[2] x) => (float[2] y) {
                y = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                            else_branch = e () => (float[2] b) { b = Abs (x) }>
            }",
        );
        m.metadata = pairs(&["pkg.torch.export.kept", "maker"]);
        for id in m.graph.all_nodes() {
            m.graph.node_mut(id).metadata = pairs(&["pkg.torch.onnx.stack_trace", "namespace", "mine"]);
        }
        let x = m.graph.main().inputs()[1];
        m.graph.value_mut(x).metadata = pairs(&["pkg.onnxscript.optimizer.folded_from"]);
        let cx = PassContext::default();
        let outcome = DropTraceInfo.apply(&mut m, &cx).unwrap();
        assert_eq!(outcome.changes.len(), 4);
        let notes = 3 * ("pkg.torch.onnx.stack_trace".len() + "namespace".len() + 2);
        assert_eq!(cx.saved.get(), (notes + "pkg.onnxscript.optimizer.folded_from".len() + 1) as u64);
        assert!(m.graph.all_nodes().iter().all(|&id| m.graph.node(id).metadata == pairs(&["mine"])));
        assert!(m.graph.value(x).metadata.is_empty());
        assert_eq!(m.metadata.len(), 2);
        assert_eq!(DropTraceInfo.apply(&mut m, &PassContext::default()).unwrap(), Outcome::default());
    }

    #[test]
    fn drops_the_types_of_initializers_that_their_tensors_state() {
        let mut m = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add (x, w) }");
        let w = m.graph.find_value("w").unwrap();
        m.graph.value_mut(w).ty = Some(Type::tensor(DataType::Float, vec![Dim::Known(2)]));
        assert_eq!(DropTraceInfo.apply(&mut m, &PassContext::default()).unwrap().changes.len(), 1);
        assert_eq!(m.graph.value(w).ty, None);
        m.graph.value_mut(w).ty = Some(Type::tensor(DataType::Float, vec![Dim::Symbol("n".to_owned())]));
        assert_eq!(DropTraceInfo.apply(&mut m, &PassContext::default()).unwrap(), Outcome::default());
    }

    #[test]
    fn leaves_the_notes_of_others() {
        let mut m = model("g (float[2] x) => (float[2] y) { y = Neg (x) }");
        let id = m.graph.all_nodes()[0];
        m.graph.node_mut(id).metadata = pairs(&["namespace", "owner"]);
        assert_eq!(DropTraceInfo.apply(&mut m, &PassContext::default()).unwrap(), Outcome::default());
        assert_eq!(m.graph.node(id).metadata.len(), 2);
    }
}
