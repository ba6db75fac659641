//! Turns Constant nodes into initializers.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext, Saving};
use lathe_ir::{AttributeValue, Graph, Initializer, Model, Node, NodeId, Tensor, Use};

/// See [`INFO`].
pub struct HoistConstants;

static INFO: Info = Info {
    name: "hoist-constants",
    summary: "turns Constant nodes into initializers",
    doc: "A Constant node becomes an initializer of its graph or subgraph, under the same name, so that every other pass \
          finds constants in one place. In a local function it becomes a Constant node again when the model is written. \
          Declines for sparse constants, for values that refer to an attribute of the calling node, and for constants \
          that are themselves outputs, which only a node can produce.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for HoistConstants {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, _: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for (graph, _) in model.graphs_mut() {
            hoist(graph, &mut outcome);
        }
        if !outcome.changes.is_empty() {
            // Older files list every initializer among the inputs.
            model.ir_version = model.ir_version.max(4);
        }
        Ok(outcome)
    }
}

/// Hoists every constant of one graph and its subgraphs.
pub(super) fn hoist(graph: &mut Graph, outcome: &mut Outcome) {
    for id in graph.all_nodes() {
        if !graph.node(id).is("Constant") {
            continue;
        }
        let place = graph.describe(id);
        match hoist_one(graph, id) {
            Ok(()) => outcome.change("hoist-constant", place),
            Err(reason) => outcome.refuse(reason, place),
        }
    }
}

fn hoist_one(graph: &mut Graph, id: NodeId) -> Result<(), &'static str> {
    let node = graph.node(id);
    let value = node.output(0).expect("a Constant has an output");
    let tensor = constant_of(node)?;
    if graph.value(value).uses().iter().any(|u| matches!(u, Use::Output(..))) {
        return Err("the constant is an output, which only a node can produce");
    }
    let scope = node.scope();
    let info = graph.value(value);
    let (name, ty, doc, metadata) = (info.name.clone(), info.ty.clone(), info.doc.clone(), info.metadata.clone());
    let annotations = info.quantization().to_vec();
    let new = graph.add_value(name.clone(), ty);
    graph.make_initializer(scope, new, Initializer::Dense(tensor));
    graph.replace_uses(value, new);
    graph.set_quantization(new, annotations);
    graph.remove_node(id);
    let info = graph.value_mut(new);
    info.doc = doc;
    info.metadata = metadata;
    Ok(())
}

/// The tensor that a Constant node stands for.
pub(crate) fn constant_of(node: &Node) -> Result<Tensor, &'static str> {
    let [attribute] = node.attributes.as_slice() else {
        return Err("the constant has not exactly one attribute");
    };
    match (attribute.name.as_str(), &attribute.value) {
        ("value", AttributeValue::Tensor(tensor)) => Ok(tensor.clone()),
        ("value_float", AttributeValue::Float(x)) => Ok(Tensor::from_f32s(&[], &[*x])),
        ("value_floats", AttributeValue::Floats(all)) => Ok(Tensor::from_f32s(&[all.len()], all)),
        ("value_int", AttributeValue::Int(x)) => Ok(Tensor::from_i64s(&[], &[*x])),
        ("value_ints", AttributeValue::Ints(all)) => Ok(Tensor::int64s(all)),
        ("value_string", AttributeValue::String(text)) => {
            Ok(Tensor::strings(Vec::new(), vec![text.clone()]).expect("no axes hold one string"))
        }
        ("value_strings", AttributeValue::Strings(all)) => {
            Ok(Tensor::strings(vec![all.len()], all.clone()).expect("one axis holds all strings"))
        }
        (_, AttributeValue::Reference { .. }) => Err("the constant refers to an attribute of the calling node"),
        ("sparse_value", _) => Err("the constant is sparse"),
        _ => Err("the constant's attribute is of no known form"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    #[test]
    fn hoists_every_form_in_every_scope() {
        assert_snapshot!(check(&HoistConstants, "
            g (float[2] x, bool c) => (float[2] y) {
                a = Constant <value = float[1] {2.0}> ()
                b = Constant <value_float = 3.0> ()
                s = Add (x, a)
                y = If (c) <then_branch = t () => (float[2] p) {
                    k = Constant <value_floats = [1.0, 2.0]> ()
                    p = Mul (s, k)
                }, else_branch = e () => (float[2] q) {
                    q = Mul (s, b)
                }>
            }"), @"
        g (float[2] x, bool c) => (float[2] y) <
            float[1] a = {2},
            float b = {3}
        > {
            s = Add (x, a)
            y = If (c) <then_branch = t () => (float[2] p) <
                float[2] k = {1, 2}
            > {
                p = Mul (s, k)  # float[2]
            }, else_branch = e () => (float[2] q) {
                q = Mul (s, b)  # float[2]
            }>  # float[2]
        }
        ");
    }

    #[test]
    fn hoists_integers() {
        check(
            &HoistConstants,
            "
            g (float[2] x) => (float[1,2] y) {
                axes = Constant <value_ints = [0]> ()
                y = Unsqueeze (x, axes)
            }",
        );
    }

    #[test]
    fn keeps_a_constant_that_is_an_output() {
        let graph = "g (float[2] x) => (float[2] y, int64 k) { y = Neg (x) k = Constant <value_int = 7> () }";
        check_refuses(&HoistConstants, graph, "is an output");
    }

    #[test]
    fn keeps_constants_that_it_cannot_read() {
        let graph = |constant: &str| format!("g (float[2] x) => (float[2] y) {{ {constant} y = Add (x, c) }}");
        let refuses = |constant: &str, reason: &str| check_refuses(&HoistConstants, &graph(constant), reason);
        refuses("c = Constant <value_float = 1.0, value_int = 1> ()", "the constant has not exactly one attribute");
        refuses("c = Constant <value_thing = 1.0> ()", "the constant's attribute is of no known form");
        refuses(
            "c = Constant <sparse_value = sparse_tensor(float[2]) {float[1] {1}, int64[1] {0}}> ()",
            "the constant is sparse",
        );
        let function = r#"<ir_version: 10, opset_import: ["": 18, "local": 1]>
            g (float[2] x) => (float[2] y) { y = local.F <k = 2.0> (x) }
            <domain: "local", opset_import: ["": 18]>
            F <k> (a) => (b) { c = Constant <value_float: float = @k> () b = Add (a, c) }"#;
        check_refuses(&HoistConstants, function, "the constant refers to an attribute of the calling node");
    }
}
