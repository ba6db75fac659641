//! Merges layers that read the same value into one wider layer and a Split.

use super::{linear::RTOL, rounding::is_weight_type};
use crate::{Editor, Error, Info, Kind, Match, Opt, Outcome, Pass, PassContext, Refusal, Saving, edit_graphs};
use lathe_analysis::Facts;
use lathe_ir::{Bindings, DataType, Graph, Model, Node, NodeId, Patch, ScopeId, Tensor, Use, ValueId};
use std::collections::BTreeMap;

/// See [`INFO`].
pub struct MergeLinears;

static INFO: Info = Info {
    name: "merge-linears",
    summary: "merges layers that read the same value into one wider layer and a Split (off by default)",
    doc: "Layers of one kind that read the same value, such as the query, key and value projections or the two halves \
          of a gated unit, become one layer whose weight holds theirs side by side, with their biases, and a Split. \
          Widths may differ. The bytes stay the same, but the Split copies its parts, so this pays only where one \
          large product is faster than several small ones: it is off unless `enabled` is set. Declines on weights \
          that other nodes share, and where only some of the layers have a constant bias.",
    options: &[Opt { name: "enabled", unit: "true or false", default: "false", doc: "Whether the pass does anything" }],
    // A wider product may be summed in other blocks.
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for MergeLinears {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        if !cx.setting::<bool>(&INFO, "enabled")? {
            return Ok(Outcome::default());
        }
        edit_graphs(model, cx, merge_all)
    }
}

/// What layers must agree in: scope, input, operator with attributes, and all of the weight's shape but its width.
type Key = (ScopeId, ValueId, String, DataType, Vec<usize>);

fn merge_all(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    let mut groups: BTreeMap<Key, Vec<NodeId>> = BTreeMap::new();
    for id in graph.all_nodes() {
        if let Some(key) = key(graph, id) {
            groups.entry(key).or_default().push(id);
        }
    }
    for layers in groups.into_values().filter(|layers| layers.len() > 1) {
        let facts: Facts = cx.facts.take(graph, opsets, functions);
        let mut patch = Patch::new(graph);
        let place = Match { graph, facts: &facts, opsets, functions, cx, bindings: Bindings::default() };
        let planned = plan(&place, &mut patch, &layers);
        match planned {
            Ok(replaced) => {
                outcome.change("merge-siblings", graph.describe(layers[0]));
                carry_out(graph, patch, layers[0], &replaced);
            }
            Err(refusal) => {
                if let Refusal::Reason(reason) = refusal {
                    outcome.refuse(reason, graph.describe(layers[0]));
                }
                cx.facts.keep(graph, facts);
            }
        }
    }
    Ok(graph.sort()?)
}

/// The axis of the weight along which the output channels lie, where layers of this kind can stand side by side.
fn width_axis(node: &Node, weight: &Tensor) -> Option<usize> {
    match (node.op_type.as_str(), weight.dims().len()) {
        ("MatMul", 2) => Some(1),
        ("Gemm", 2) => Some(usize::from(node.int("transB").unwrap_or(0) == 0)),
        ("Conv", 3..) if node.int("group").unwrap_or(1) == 1 => Some(0),
        _ => None,
    }
}

fn key(graph: &Graph, id: NodeId) -> Option<Key> {
    let node = graph.node(id);
    let (x, weight) = (node.input(0)?, graph.constant(node.input(1)?)?);
    let axis = width_axis(node, weight)?;
    if !node.is_standard() || !is_weight_type(weight.dtype()) || graph.constant(x).is_some() {
        return None;
    }
    let mut attributes: Vec<String> = node.attributes.iter().map(|a| format!("{} {:?}", a.name, a.value)).collect();
    attributes.sort();
    let mut dims = weight.dims().to_vec();
    dims[axis] = 0;
    Some((node.scope(), x, format!("{} {}", node.op_type, attributes.join(" ")), weight.dtype(), dims))
}

/// Builds the wide layer; returns the nodes whose outputs the parts of its Split replace.
fn plan(m: &Match, g: &mut Patch, layers: &[NodeId]) -> Result<Vec<(NodeId, ValueId)>, Refusal> {
    let graph = m.graph();
    let first = graph.node(layers[0]);
    let mut weights = Vec::new();
    for &id in layers {
        let value = graph.node(id).input(1).ok_or(Refusal::NoMatch)?;
        let own = graph.value(value).uses().len() == 1;
        m.require(own, "a weight is shared: a copy would enlarge the file")?;
        weights.push(graph.constant(value).ok_or(Refusal::NoMatch)?);
    }
    let axis = width_axis(first, weights[0]).ok_or(Refusal::NoMatch)?;
    let widths: Vec<usize> = weights.iter().map(|w| w.dims()[axis]).collect();
    let sums: Vec<Option<(NodeId, &Tensor)>> = layers.iter().map(|&id| sum_after(graph, id)).collect();
    let with_sums = first.is("MatMul") && sums.iter().all(Option::is_some);
    let biases: Vec<Option<ValueId>> = layers.iter().map(|&id| graph.node(id).input(2)).collect();
    let constant = |v: &Option<ValueId>| v.and_then(|v| graph.constant(v));
    let bias = if with_sums {
        Some(side_by_side(&sums.iter().flatten().map(|s| s.1).collect::<Vec<_>>(), &widths)?)
    } else if biases.iter().any(Option::is_some) {
        let all: Option<Vec<&Tensor>> = biases.iter().map(constant).collect();
        Some(side_by_side(&all.ok_or("some of the layers have no constant bias")?, &widths)?)
    } else {
        None
    };
    let weight = g.constant("weight", concat(&weights, axis)?);
    let bias = bias.map(|bias| g.constant("bias", bias));
    let mut inputs = vec![first.input(0), Some(weight)];
    inputs.extend(bias.filter(|_| !with_sums).map(Some));
    let mut node = first.clone();
    node.name.clear();
    let mut wide = g.node_with(node, &inputs, 1)[0];
    if let Some(bias) = bias.filter(|_| with_sums) {
        wide = g.node(Node::new("Add"), &[wide, bias]);
    }
    let ndim = first.output(0).and_then(|y| m.facts().ndim(y));
    let along = match (first.op_type.as_str(), ndim) {
        ("Conv" | "Gemm", _) => 1,
        (_, Some(ndim)) if ndim > 0 => ndim as i64 - 1,
        _ if m.opset() >= 11 => -1,
        _ => return Err("the number of axes is unknown".into()),
    };
    let sizes: Vec<i64> = widths.iter().map(|&w| w as i64).collect();
    let mut split = Node::new("Split").with("axis", along);
    let mut inputs = vec![Some(wide)];
    if m.opset() >= 13 {
        inputs.push(Some(g.int64s("sizes", &sizes)));
    } else {
        split = split.with("split", sizes);
    }
    let parts = g.node_with(split, &inputs, widths.len());
    let ends = layers.iter().zip(&sums).map(|(&id, sum)| if with_sums { sum.map_or(id, |s| s.0) } else { id });
    Ok(ends.zip(parts).collect())
}

/// The constant sum that is the only reader of a layer.
fn sum_after(graph: &Graph, id: NodeId) -> Option<(NodeId, &Tensor)> {
    let product = graph.node(id).output(0)?;
    let uses = graph.value(product).uses();
    let Some(Use::Node(sum, index)) = uses.first().filter(|_| uses.len() == 1) else { return None };
    let node = graph.node(*sum);
    let constant = graph.constant(node.input(1 - (*index).min(1))?)?;
    (node.is("Add") && node.scope() == graph.node(id).scope()).then_some((*sum, constant))
}

/// Biases of one number a channel, one after the other.
fn side_by_side(biases: &[&Tensor], widths: &[usize]) -> Result<Tensor, Refusal> {
    let flat = |(bias, &width): (&&Tensor, &usize)| {
        (bias.dims() == [width]).then(|| (*bias).clone()).ok_or_else(|| "a bias is not one number a channel".into())
    };
    let flat: Vec<Tensor> = biases.iter().zip(widths).map(flat).collect::<Result<_, Refusal>>()?;
    concat(&flat.iter().collect::<Vec<_>>(), 0)
}

/// Tensors of one type joined along `axis`.
fn concat(tensors: &[&Tensor], axis: usize) -> Result<Tensor, Refusal> {
    let dtype = tensors[0].dtype();
    if tensors.iter().any(|t| t.dtype() != dtype) {
        return Err(Refusal::NoMatch);
    }
    let outer: usize = tensors[0].dims()[..axis].iter().product();
    let mut bytes = Vec::with_capacity(tensors.iter().map(|t| t.byte_len()).sum());
    for row in 0..outer {
        for tensor in tensors {
            let size = tensor.byte_len() / outer.max(1);
            bytes.extend_from_slice(&tensor.bytes()[row * size..(row + 1) * size]);
        }
    }
    tensors.iter().for_each(|t| t.release());
    let mut dims = tensors[0].dims().to_vec();
    dims[axis] = tensors.iter().map(|t| t.dims()[axis]).sum();
    Tensor::new(dtype, dims, bytes).map_err(|e| Refusal::from(e.to_string()))
}

fn carry_out(graph: &mut Graph, patch: Patch, first: NodeId, replaced: &[(NodeId, ValueId)]) {
    let scope = graph.node(first).scope();
    let base = graph.node(first).output(0).map(|v| graph.value(v).name.clone()).unwrap_or_default();
    graph.apply(patch, scope, &base);
    for &(old, new) in replaced {
        let value = graph.node(old).output(0).expect("a layer that is merged has an output");
        graph.replace(value, new);
    }
    graph.remove_unused(replaced.iter().map(|r| r.0).collect());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_in, check_refuses_in};
    use insta::assert_snapshot;

    const OPSET: &str = "<ir_version: 8, opset_import: [\"\" : 13]>";
    const WEIGHTS: &str =
        "float[2,3] q = {1, 2, 3, 4, 5, 6}, float[2,2] k = {1, 2, 3, 4}, float[3] d = {1, 2, 3}, float[2] e = {4, 5}";

    fn enabled() -> PassContext<'static> {
        let settings = [("merge-linears.enabled".to_owned(), "true".to_owned())];
        PassContext::default().with_settings(settings).with_evaluator(lathe_testkit::evaluator())
    }

    #[test]
    fn merges_products_of_unequal_width_with_their_sums() {
        let graph = format!(
            "{OPSET} g (float[B,N,2] x) => (float[B,N,3] y, float[B,N,2] z) <{WEIGHTS}> {{
            a = MatMul (x, q) y = Add (a, d) b = MatMul (x, k) c = Add (e, b) z = Relu (c) }}"
        );
        assert_snapshot!(check_in(&MergeLinears, &graph, &enabled()), @r#"
        g (float[B,N,2] x) => (float[B,N,3] y, float[B,N,2] z) <
            float[2,3] q = {1, 2, 3, 4, 5, 6},
            float[2,2] k = {1, 2, 3, 4},
            float[3] d = {1, 2, 3},
            float[2] e = {4, 5},
            float[2,5] a_weight = ["elements": "10", "hash": "aa1b3330"],
            float[5] a_bias = {1, 2, 3, 4, 5},
            int64[2] a_sizes = {3, 2}
        > {
            a_1 = MatMul (x, a_weight)
            a_2 = Add (a_1, a_bias)
            y, c = Split <axis = 2> (a_2, a_sizes)  # float[B,N,3], ?
            z = Relu (c)  # float[B,N,2]
        }
        "#);
    }

    #[test]
    fn merges_gemms_and_convs() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,3] y, float[N,2] z) <{WEIGHTS}> {{
            y = Gemm <transB = 0> (x, q, d) z = Gemm <transB = 0> (x, k, e) }}"
        );
        check_in(&MergeLinears, &graph, &enabled());
        let graph = "<ir_version: 8, opset_import: [\"\" : 11]> g (float[N,2,4] x) => (float[N,1,4] y, float[N,2,4] z)
            <float[1,2,1] a = {1, 2}, float[2,2,1] b = {3, 4, 5, 6}> { y = Conv (x, a) z = Conv (x, b) }";
        check_in(&MergeLinears, graph, &enabled());
    }

    #[test]
    fn works_inside_a_subgraph() {
        let graph = format!("{OPSET} g (float[N,2] x, bool e) => (float[N,2] y) <float[2,2] k = {{1, 2, 3, 4}}, float[2,2] l = {{4, 3, 2, 1}}> {{
            y = If (e) <then_branch = p () => (float[N,2] u) {{ a = MatMul (x, k) b = MatMul (x, l) u = Mul (a, b) }},
                        else_branch = q () => (float[N,2] v) {{ v = Identity (x) }}> }}");
        check_in(&MergeLinears, &graph, &enabled());
    }

    #[test]
    fn keeps_shared_weights_and_is_off_by_default() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,3] y, float[N,2] z, float[N,2] w) <{WEIGHTS}> {{
            y = MatMul (x, q) z = MatMul (x, k) r = Relu (x) w = MatMul (r, k) }}"
        );
        check_refuses_in(&MergeLinears, &graph, "a weight is shared", &enabled());
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,3] y, float[N,2] z) <{WEIGHTS}> {{
            y = Gemm (x, q, d) z = Gemm (x, k) }}"
        );
        check_refuses_in(&MergeLinears, &graph, "some of the layers have no constant bias", &enabled());
        let mut model = crate::testing::model(&graph);
        assert_eq!(MergeLinears.apply(&mut model, &PassContext::default()).unwrap(), Outcome::default());
    }

    #[test]
    fn keeps_layers_whose_biases_do_not_stand_side_by_side() {
        let graph = |weights: &str, body: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 13]> g (float[N,2] x) => (float[N,2] y, float[N,3] z)
                <float[2,2] a = {{1, 2, 3, 4}}, float[2,3] b = {{1, 2, 3, 4, 5, 6}}, {weights}> {{ {body} }}"
            )
        };
        let gemms = "y = Gemm (x, a, c) z = Gemm (x, b, d)";
        let refuses = |weights: &str, body: &str, reason: &str| {
            check_refuses_in(&MergeLinears, &graph(weights, body), reason, &enabled())
        };
        refuses("float[1] c = {1}, float[3] d = {1, 2, 3}", gemms, "a bias is not one number a channel");
        let unknown =
            "<ir_version: 8, opset_import: [\"\" : 9, \"custom\" : 1]> g (float[N,2] w) => (float[N,2] y, float[N,3] z)
            <float[2,2] a = {1, 2, 3, 4}, float[2,3] b = {1, 2, 3, 4, 5, 6}> {
            x = custom.F (w) s = MatMul (x, a) t = MatMul (x, b) y = custom.G (s) z = custom.G (t) }";
        check_refuses_in(&MergeLinears, unknown, "the number of axes is unknown", &enabled());
    }
}
