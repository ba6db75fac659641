//! Replaces calls of local functions by what the functions compute.

use super::hoist_constants::hoist;
use crate::{Error, Info, Kind, Opt, Outcome, Pass, PassContext, Refusal};
use lathe_ir::{Attribute, AttributeValue, Fragment, Function, Graph, Model, NodeId, ScopeId, ValueId, imported};
use std::collections::BTreeMap;

/// See [`INFO`].
pub struct InlineFunctions;

static INFO: Info = Info {
    name: "inline-functions",
    summary: "replaces calls of local functions by their bodies",
    doc: "Every call of a local function becomes a copy of its body, with the attributes of the call (or their defaults) \
          filled in and names that begin with the call's. Constants of a body are stored once however often it is \
          called. Functions that nothing calls any more are left for `drop-dead`. Declines where body and model use \
          different versions of an operator set, where an attribute holds a graph, where a subgraph of the body \
          returns an input, and where the graph would grow beyond `max-nodes`.",
    options: &[Opt {
        name: "max-nodes",
        unit: "count",
        default: "100000",
        doc: "the most nodes that inlining may add to one graph",
    }],
    kind: Kind::Identical,
    lowers: &[],
    source: None,
};

impl Pass for InlineFunctions {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let limit: usize = cx.setting(&INFO, "max-nodes")?;
        let mut outcome = Outcome::default();
        if model.functions.is_empty() {
            return Ok(outcome);
        }
        // Bodies stay as they are: whatever calls remain in a copied body are inlined in their new place.
        let mut inliner = Inliner { functions: &model.functions, bodies: BTreeMap::new(), left: limit };
        let mut opsets = model.opsets.clone();
        inliner.graph(&mut model.graph, &mut opsets, &mut outcome);
        model.opsets = opsets;
        if !outcome.changes.is_empty() {
            model.graph.sort()?;
            model.graph.make_names_unique();
        }
        Ok(outcome)
    }
}

/// A body ready to be copied, and where its constants are in the main graph.
struct Body {
    fragment: Fragment,
    constants: Option<BTreeMap<ValueId, ValueId>>,
}

struct Inliner<'a> {
    functions: &'a [Function],
    bodies: BTreeMap<usize, Body>,
    left: usize,
}

impl Inliner<'_> {
    fn called(&self, graph: &Graph, id: NodeId) -> Option<usize> {
        let node = graph.node(id);
        let standard = |d: &str| d.is_empty() || d == "ai.onnx";
        let same = |d: &str| d == node.domain || (standard(d) && node.is_standard());
        self.functions.iter().position(|f| f.name == node.op_type && f.overload == node.overload && same(&f.domain))
    }

    fn graph(&mut self, graph: &mut Graph, opsets: &mut Vec<(String, i64)>, outcome: &mut Outcome) {
        let mut queue: Vec<NodeId> = graph.all_nodes().into_iter().rev().collect();
        while let Some(id) = queue.pop() {
            if graph.get(id).is_none() {
                continue;
            }
            let Some(index) = self.called(graph, id) else { continue };
            let place = graph.describe(id);
            match self.inline(graph, opsets, id, index) {
                Ok(added) => {
                    outcome.change("inline-function", place);
                    queue.extend(added);
                }
                Err(Refusal::NoMatch) => {}
                Err(Refusal::Reason(reason)) => outcome.refuse(reason, place),
            }
        }
    }

    /// Inlines one call and returns the nodes it became.
    fn inline(
        &mut self,
        graph: &mut Graph,
        opsets: &mut Vec<(String, i64)>,
        id: NodeId,
        index: usize,
    ) -> Result<Vec<NodeId>, Refusal> {
        let function = &self.functions[index];
        let body = self.bodies.entry(index).or_insert_with(|| {
            let mut graph = function.graph.clone();
            hoist(&mut graph, &mut Outcome::default());
            Body { fragment: graph.fragment(ScopeId::MAIN), constants: None }
        });
        let nodes = body.fragment.all_nodes();
        for domain in nodes.iter().map(|n| n.domain.as_str()) {
            let (here, there) = (imported(opsets, domain), imported(&function.opsets, domain));
            if let (Some(here), Some(there)) = (here, there)
                && here != there
            {
                let name = if domain.is_empty() { "ai.onnx" } else { domain };
                return Err(format!("the body uses version {there} of `{name}`, the model version {here}").into());
            }
        }
        self.left = self.left.checked_sub(nodes.len()).ok_or("the graph would grow beyond `max-nodes`")?;
        let node = graph.node(id).clone();
        let attributes = arguments(&node.attributes, function)?;
        let inputs: Vec<Option<ValueId>> =
            (0..body.fragment.inputs().len()).map(|i| node.inputs().get(i).copied().flatten()).collect();
        if node.inputs().len() > inputs.len() {
            return Err("the call has more inputs than the function".into());
        }
        let missing: Vec<ValueId> =
            body.fragment.inputs().iter().zip(&inputs).filter(|(_, v)| v.is_none()).map(|(&i, _)| i).collect();
        if body.fragment.returns_inside(&missing) {
            return Err("a subgraph of the body returns an input that the call leaves out".into());
        }
        let returned = body.fragment.outputs();
        let used = |v: &Option<ValueId>| v.is_some_and(|v| !graph.value(v).uses().is_empty());
        if node
            .outputs()
            .iter()
            .enumerate()
            .any(|(i, v)| used(v) && returned.get(i).is_none_or(|r| missing.contains(r)))
        {
            return Err("the function does not return what the call asks for".into());
        }
        for domain in nodes.iter().map(|n| n.domain.as_str()) {
            if let (None, Some(version)) = (imported(opsets, domain), imported(&function.opsets, domain)) {
                opsets.push((domain.to_owned(), version));
            }
        }
        let label = if node.name.is_empty() { function.name.clone() } else { node.name.clone() };
        if body.constants.is_none() {
            let prefix = format!("{}/", function.name);
            body.constants = Some(graph.paste_constants(&body.fragment, ScopeId::MAIN, &prefix));
        }
        let known = body.constants.clone().unwrap_or_default();
        let mut fragment = body.fragment.clone();
        fragment.bind(&attributes);
        let pasted = graph.paste(&fragment, node.scope(), &inputs, &known, &format!("{label}/"));
        let outputs: Vec<(ValueId, String)> =
            node.outputs().iter().flatten().map(|&v| (v, graph.value(v).name.clone())).collect();
        let mut renames = Vec::new();
        for (old, new) in node.outputs().iter().zip(&pasted.outputs) {
            let (Some(old), Some(new)) = (*old, *new) else { continue };
            graph.replace_uses(old, new);
            let made = pasted.values.iter().any(|(v, _)| *v == new);
            if made && !graph.is_output(new) {
                renames.extend(outputs.iter().find(|(v, _)| *v == old).map(|(_, name)| (new, name.clone())));
            }
        }
        graph.remove_node(id);
        for (value, name) in renames {
            // What the function hands out is known by the name that the call gave it.
            let name = graph.fresh_name(&name);
            graph.rename(value, name);
        }
        Ok(pasted.nodes)
    }
}

/// The attributes that references in the body mean: those of the call, else the defaults.
fn arguments(given: &[Attribute], function: &Function) -> Result<Vec<Attribute>, Refusal> {
    let mut all = given.to_vec();
    for default in &function.defaults {
        if !all.iter().any(|a| a.name == default.name) {
            all.push(default.clone());
        }
    }
    match all.iter().find(|a| matches!(a.value, AttributeValue::Graph(_) | AttributeValue::Graphs(_))) {
        Some(attribute) => Err(format!("attribute `{}` of the call is a graph", attribute.name).into()),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_refuses_in};
    use insta::assert_snapshot;

    #[test]
    fn inlines_nested_calls_with_attributes_and_defaults() {
        assert_snapshot!(check(&InlineFunctions, r#"
            <ir_version: 10, opset_import: ["": 18, "local": 1]>
            g (float[2,3] x) => (float[2,3] y, float[2,3] z) {
                y = local.Twice <axis = 0> (x)
                t = local.Soft (x)
                z = Neg (t)
            }
            <domain: "local", opset_import: ["": 18, "local": 1]>
            Twice <axis> (a) => (b) {
                m = local.Soft <axis: int = @axis> (a)
                b = local.Soft (m)
            }
            <domain: "local", opset_import: ["": 18]>
            Soft <axis: int = -1> (a) => (b) {
                k = Constant <value = float {2.0}> ()
                s = Mul (a, k)
                b = Softmax <axis: int = @axis> (s)
            }"#), @r#"
        g (float[2,3] x) => (float[2,3] y, float[2,3] z) <
            float "Soft/k" = {2}
        > {
            "Soft/s_2" = Mul (x, "Soft/k")
            t = Softmax <axis = -1> ("Soft/s_2")
            z = Neg (t)  # float[2,3]
            "Soft/s_1" = Mul (x, "Soft/k")
            "Twice/m" = Softmax <axis = 0> ("Soft/s_1")
            "Soft/s" = Mul ("Twice/m", "Soft/k")
            y = Softmax <axis = -1> ("Soft/s")  # float[2,3]
        }

        <
            domain: "local",
            opset_import: ["" : 18, "local" : 1]
        >
        Twice <axis> (a) => (b) {
            m = local.Soft <axis: int = @axis> (a)
            b = local.Soft (m)
        }

        <
            domain: "local",
            opset_import: ["" : 18]
        >
        Soft <axis = -1> (a) => (b) {
            k = Constant <value = float {2}> ()
            s = Mul (a, k)
            b = Softmax <axis: int = @axis> (s)
        }
        "#);
    }

    #[test]
    fn inlines_inside_a_branch_and_leaves_out_optional_inputs() {
        check(
            &InlineFunctions,
            r#"
            <ir_version: 10, opset_import: ["": 18, "local": 1]>
            g (float[4] x, bool c, float high) => (float[4] y) {
                y = If (c) <then_branch = t () => (float[4] p) { p = local.Bound (x, , high) },
                            else_branch = e () => (float[4] q) { q = local.Bound (x) }>
            }
            <domain: "local", opset_import: ["": 18]>
            Bound (a, low, high) => (b) { b = Clip (a, low, high) }"#,
        );
    }

    #[test]
    fn refuses_other_versions() {
        let graph = r#"
            <ir_version: 10, opset_import: ["": 18, "local": 1]>
            g (float[2] x) => (float[2] y) { y = local.F (x) }
            <domain: "local", opset_import: ["": 17]>
            F (a) => (b) { b = Neg (a) }"#;
        check_refuses(&InlineFunctions, graph, "the body uses version 17 of `ai.onnx`, the model version 18");
    }

    #[test]
    fn keeps_custom_operators_functions_and_branches_together() {
        // The combination that breaks other tools: a branch that calls a function which calls a custom operator.
        let mut m = crate::testing::model(
            r#"
            <ir_version: 10, opset_import: ["": 18, "local": 1, "com.example": 3]>
            g (float[2] x, bool c) => (float[2] y) {
                s = Exp (x)
                y = If (c) <then_branch = t () => (float[2] p) { p = local.F (s) },
                            else_branch = e () => (float[2] q) { q = com.example.Odd (s) }>
            }
            <domain: "local", opset_import: ["": 18, "com.example": 3]>
            F (a) => (b) { o = com.example.Odd (a) b = Neg (o) }"#,
        );
        let outcome = InlineFunctions.apply(&mut m, &PassContext::default()).unwrap();
        assert_eq!(outcome.changes.len(), 1);
        m.check().unwrap();
        let ops: Vec<String> = m.graph.all_nodes().iter().map(|&id| m.graph.node(id).op_type.clone()).collect();
        assert_eq!(ops, ["Exp", "If", "Odd", "Neg", "Odd"]);
    }

    #[test]
    fn keeps_calls_that_do_not_fit_their_function() {
        let graph = |call: &str, body: &str| {
            format!(
                r#"<ir_version: 10, opset_import: ["": 18, "local": 1]>
                g (float[2] x, bool c) => (float[2] y) {{ {call} }}
                <domain: "local", opset_import: ["": 18]>
                F <k> (a, b) => (r, s) {{ {body} }}"#
            )
        };
        let body = "r = Add (a, b) s = Neg (r)";
        let refuses =
            |call: &str, body: &str, reason: &str| check_refuses(&InlineFunctions, &graph(call, body), reason);
        refuses("y = local.F (x, x, x)", body, "the call has more inputs than the function");
        refuses("y, z, w = local.F (x, x) v = Add (z, w)", body, "the function does not return what the call asks for");
        refuses(
            "y = local.F <k = t () => (float[2] p) { p = Neg (x) }> (x, x)",
            body,
            "attribute `k` of the call is a graph",
        );
        let inner =
            "n = Size (a) c = Cast <to = 9> (n) r = If (c) <then_branch = t () => (float[2] p) { p = Identity (a) },
                     else_branch = e () => (b) {}> s = Neg (a)";
        refuses("y = local.F (x)", inner, "a subgraph of the body returns an input that the call leaves out");
        let small = PassContext::default().with_settings([("inline-functions.max-nodes".to_owned(), "1".to_owned())]);
        check_refuses_in(
            &InlineFunctions,
            &graph("y = local.F (x, x)", body),
            "the graph would grow beyond `max-nodes`",
            &small,
        );
    }
}
