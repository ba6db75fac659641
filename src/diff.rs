//! What differs between two models: interface, operators, nodes, weights. Nothing is run.

use crate::report::Side;
use lathe_analysis::Facts;
use lathe_ir::{Graph, Initializer, Model, NodeId, ScopeId, Tensor, ValueId};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// What differs between two models. The names are a contract.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Diff {
    /// Whether nothing below differs.
    pub equal: bool,
    pub a: Side,
    pub b: Side,
    /// Inputs and outputs that are not the same in both.
    pub interface: Vec<Port>,
    /// What the files say about themselves: `ir_version`, `opset` of a domain, `metadata` of a key.
    pub properties: Vec<Property>,
    /// Operators that are not as many in both, with those of subgraphs and functions.
    pub operators: Vec<OperatorCount>,
    pub nodes: Nodes,
    pub weights: Weights,
}

/// An input or output; a type is `None` where it is not there.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Port {
    pub kind: &'static str,
    pub name: String,
    pub a: Option<String>,
    pub b: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Property {
    pub name: String,
    pub a: Option<String>,
    pub b: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct OperatorCount {
    pub op: String,
    pub a: usize,
    pub b: usize,
}

/// Nodes by the name of their first output; those of branches that share one, in their order.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Nodes {
    /// How many are the same in both.
    pub same: usize,
    pub only_a: Vec<NodeLine>,
    pub only_b: Vec<NodeLine>,
    pub changed: Vec<ChangedNode>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct NodeLine {
    pub output: String,
    pub op: String,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ChangedNode {
    pub output: String,
    pub op: String,
    /// What of it: `operator`, `place` (the subgraph it is in), `inputs`, `outputs`, or names of attributes.
    pub what: Vec<String>,
}

/// Constants by name, and those without a counterpart by their bits.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Weights {
    pub same: usize,
    pub renamed: Vec<Renamed>,
    /// Those that changed most first.
    pub changed: Vec<ChangedWeight>,
    pub only_a: Vec<WeightLine>,
    pub only_b: Vec<WeightLine>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Renamed {
    pub a: String,
    pub b: String,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct WeightLine {
    pub name: String,
    #[serde(rename = "type")]
    pub ty: String,
    pub bytes: usize,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ChangedWeight {
    pub name: String,
    pub a: String,
    pub b: String,
    /// `‖a − b‖ / ‖a‖`; `None` where shapes or types differ.
    pub rel_l2: Option<f64>,
    pub max_abs: Option<f64>,
    /// Share of the numbers that differ.
    pub share: Option<f64>,
}

impl Diff {
    /// What differs between `a` and `b`, with their sides of a report.
    pub fn of((a, a_side): (&Model, Side), (b, b_side): (&Model, Side)) -> Diff {
        let mut diff = Diff {
            equal: false,
            a: a_side,
            b: b_side,
            interface: interface(a, b),
            properties: properties(a, b),
            operators: operators(a, b),
            nodes: nodes(&a.graph, &b.graph),
            weights: weights(&a.graph, &b.graph),
        };
        functions(a, b, &mut diff.nodes);
        let (nodes, weights) = (&diff.nodes, &diff.weights);
        diff.equal = diff.interface.is_empty()
            && diff.properties.is_empty()
            && diff.operators.is_empty()
            && nodes.only_a.is_empty()
            && nodes.only_b.is_empty()
            && nodes.changed.is_empty()
            && weights.renamed.is_empty()
            && weights.changed.is_empty()
            && weights.only_a.is_empty()
            && weights.only_b.is_empty();
        diff
    }
}

/// Both maps' keys with what they hold there.
fn joined<'m, K: Ord, V>(
    a: &'m BTreeMap<K, V>,
    b: &'m BTreeMap<K, V>,
) -> impl Iterator<Item = (&'m K, Option<&'m V>, Option<&'m V>)> {
    let keys: BTreeSet<&K> = a.keys().chain(b.keys()).collect();
    keys.into_iter().map(|key| (key, a.get(key), b.get(key)))
}

/// Things by name, and the first, second, … of a name: branches of one node may use the same names.
fn by_name<T>(named: impl Iterator<Item = (String, T)>) -> BTreeMap<(String, usize), T> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut found = BTreeMap::new();
    for (name, thing) in named {
        let count = counts.entry(name.clone()).or_default();
        found.insert((name, *count), thing);
        *count += 1;
    }
    found
}

/// Names of values.
fn names(graph: &Graph, values: &[ValueId]) -> Vec<String> {
    values.iter().map(|&v| graph.value(v).name.clone()).collect()
}

fn interface(a: &Model, b: &Model) -> Vec<Port> {
    let ports = |model: &Model, outputs: bool| -> BTreeMap<String, String> {
        let (facts, main) = (Facts::infer(model), model.graph.main());
        let values = if outputs { main.outputs() } else { main.inputs() };
        let line = |&value: &ValueId| {
            let ty = facts.described(&model.graph, value);
            let ty = ty.as_ref().and_then(|ty| Some((ty.elem()?, ty.shape()))).map(|(elem, shape)| {
                let dims = shape.map(|shape| shape.dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
                format!("{elem}[{}]", dims.unwrap_or_else(|| "…".to_owned()))
            });
            (model.graph.value(value).name.clone(), ty.unwrap_or_else(|| "no tensor".to_owned()))
        };
        values.iter().map(line).collect()
    };
    let mut found = Vec::new();
    for (kind, outputs) in [("input", false), ("output", true)] {
        let (a, b) = (ports(a, outputs), ports(b, outputs));
        found.extend(joined(&a, &b).filter(|(_, a, b)| a != b).map(|(name, a, b)| Port {
            kind,
            name: name.clone(),
            a: a.cloned(),
            b: b.cloned(),
        }));
    }
    found
}

fn properties(a: &Model, b: &Model) -> Vec<Property> {
    let all = |model: &Model| -> BTreeMap<String, String> {
        let domain = |domain: &str| if domain.is_empty() { "ai.onnx".to_owned() } else { domain.to_owned() };
        let opsets =
            model.opsets.iter().map(|(name, version)| (format!("opset {}", domain(name)), version.to_string()));
        let metadata = model.metadata.iter().map(|(key, value)| (format!("metadata {key}"), value.clone()));
        let version = std::iter::once(("ir_version".to_owned(), model.ir_version.to_string()));
        version.chain(opsets).chain(metadata).collect()
    };
    let orders = |model: &Model| {
        let main = model.graph.main();
        [names(&model.graph, main.inputs()), names(&model.graph, main.outputs())]
    };
    let (mut own, mut other) = (all(a), all(b));
    // Which there are is told by name.
    for (what, (x, y)) in ["order of inputs", "order of outputs"].into_iter().zip(orders(a).into_iter().zip(orders(b)))
    {
        if x != y && x.iter().collect::<BTreeSet<_>>() == y.iter().collect() {
            own.insert(what.to_owned(), x.join(", "));
            other.insert(what.to_owned(), y.join(", "));
        }
    }
    let (a, b) = (own, other);
    let differ = joined(&a, &b).filter(|(_, a, b)| a != b);
    differ.map(|(name, a, b)| Property { name: name.clone(), a: a.cloned(), b: b.cloned() }).collect()
}

/// An operator as people call it: with its domain unless that is the standard one.
fn operator(graph: &Graph, id: NodeId) -> String {
    let node = graph.node(id);
    if node.is_standard() { node.op_type.clone() } else { format!("{}.{}", node.domain, node.op_type) }
}

fn operators(a: &Model, b: &Model) -> Vec<OperatorCount> {
    let count = |model: &Model| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for (graph, _) in model.graphs() {
            graph.all_nodes().into_iter().for_each(|id| *counts.entry(operator(graph, id)).or_default() += 1);
        }
        counts
    };
    let (a, b) = (count(a), count(b));
    let differ = joined(&a, &b).filter(|(_, a, b)| a != b);
    let mut found: Vec<OperatorCount> = differ
        .map(|(op, a, b)| OperatorCount {
            op: op.clone(),
            a: a.copied().unwrap_or_default(),
            b: b.copied().unwrap_or_default(),
        })
        .collect();
    found.sort_by_key(|count| std::cmp::Reverse(count.a.abs_diff(count.b)));
    found
}

fn nodes(a: &Graph, b: &Graph) -> Nodes {
    let by_output = |graph: &Graph| by_name(graph.all_nodes().into_iter().map(|id| (output_of(graph, id), id)));
    let line =
        |graph: &Graph, output: &str, id: NodeId| NodeLine { output: output.to_owned(), op: operator(graph, id) };
    let mut found = Nodes::default();
    for ((output, _), of_a, of_b) in joined(&by_output(a), &by_output(b)) {
        match (of_a, of_b) {
            (Some(&id), None) => found.only_a.push(line(a, output, id)),
            (None, Some(&id)) => found.only_b.push(line(b, output, id)),
            (Some(&of_a), Some(&of_b)) => match changed((a, of_a), (b, of_b)) {
                what if what.is_empty() => found.same += 1,
                what => found.changed.push(ChangedNode { output: output.clone(), op: operator(b, of_b), what }),
            },
            (None, None) => {}
        }
    }
    found
}

/// The name of a node's first output.
fn output_of(graph: &Graph, id: NodeId) -> String {
    let output = graph.node(id).outputs().iter().flatten().next();
    output.map_or_else(|| graph.describe(id), |&v| graph.value(v).name.clone())
}

/// What two nodes of one output differ in.
fn changed((a, of_a): (&Graph, NodeId), (b, of_b): (&Graph, NodeId)) -> Vec<String> {
    let named = |graph: &Graph, values: &[Option<ValueId>]| -> Vec<Option<String>> {
        values.iter().map(|value| value.map(|v| graph.value(v).name.clone())).collect()
    };
    let (x, y) = (a.node(of_a), b.node(of_b));
    let mut what = Vec::new();
    if operator(a, of_a) != operator(b, of_b) || x.overload != y.overload {
        what.push("operator".to_owned());
    }
    let place =
        |graph: &Graph, node: &lathe_ir::Node| graph.scope(node.scope()).owner().map(|owner| output_of(graph, owner));
    if place(a, x) != place(b, y) {
        what.push("place".to_owned());
    }
    if named(a, x.inputs()) != named(b, y.inputs()) {
        what.push("inputs".to_owned());
    }
    if named(a, x.outputs()) != named(b, y.outputs()) {
        what.push("outputs".to_owned());
    }
    // What a subgraph holds is told node by node; what it takes and returns belongs to its owner.
    let ports = |graph: &Graph, scope: ScopeId| {
        let scope = graph.scope(scope);
        [names(graph, scope.inputs()), names(graph, scope.outputs())]
    };
    let differs = |name: &String| match (x.subgraph(name), y.subgraph(name)) {
        (Some(p), Some(q)) => ports(a, p) != ports(b, q),
        _ => x.attribute(name) != y.attribute(name),
    };
    let of = |node: &lathe_ir::Node| -> BTreeSet<String> { node.attributes.iter().map(|a| a.name.clone()).collect() };
    let all = &of(x) | &of(y);
    what.extend(all.into_iter().filter(differs));
    what
}

/// Local functions that are not in both, or hold other nodes.
fn functions(a: &Model, b: &Model, found: &mut Nodes) {
    let by_name = |model: &Model| -> BTreeMap<String, usize> {
        let name = |f: &lathe_ir::Function| format!("{}.{}{}", f.domain, f.name, f.overload);
        model.functions.iter().enumerate().map(|(at, function)| (name(function), at)).collect()
    };
    let line = |name: &str| NodeLine { output: name.to_owned(), op: "function".to_owned() };
    for (name, of_a, of_b) in joined(&by_name(a), &by_name(b)) {
        match (of_a, of_b) {
            (Some(_), None) => found.only_a.push(line(name)),
            (None, Some(_)) => found.only_b.push(line(name)),
            (Some(&x), Some(&y)) => {
                let (x, y) = (&a.functions[x].graph, &b.functions[y].graph);
                let (inner, constants) = (nodes(x, y), weights(x, y));
                let same = inner.only_a.is_empty()
                    && inner.only_b.is_empty()
                    && inner.changed.is_empty()
                    && constants.changed.is_empty()
                    && constants.only_a.is_empty()
                    && constants.only_b.is_empty();
                if !same {
                    let what = vec!["body".to_owned()];
                    found.changed.push(ChangedNode { output: name.clone(), op: "function".to_owned(), what });
                }
            }
            (None, None) => {}
        }
    }
}

fn described(tensor: &Tensor) -> String {
    let dims: Vec<String> = tensor.dims().iter().map(ToString::to_string).collect();
    format!("{}[{}]", tensor.dtype(), dims.join(", "))
}

fn weights(a: &Graph, b: &Graph) -> Weights {
    let constants = |graph: &Graph| {
        let defaults = graph.main().inputs().iter().copied().filter(|&v| graph.value(v).initializer().is_some());
        let all = graph.scopes().into_iter().flat_map(|scope| graph.initializers(scope).collect::<Vec<_>>());
        by_name(defaults.chain(all).map(|value| (graph.value(value).name.clone(), value)))
    };
    let (of_a, of_b) = (constants(a), constants(b));
    let mut found = Weights::default();
    let (mut only_a, mut only_b) = (Vec::new(), Vec::new());
    for (key @ (name, _), x, y) in joined(&of_a, &of_b) {
        match (x.map(|&v| a.value(v).initializer()), y.map(|&v| b.value(v).initializer())) {
            (Some(x), None) => only_a.push((key, x)),
            (None, Some(y)) => only_b.push((key, y)),
            (Some(x), Some(y)) => match change(name, x, y) {
                None => found.same += 1,
                Some(change) => found.changed.push(change),
            },
            (None, None) => {}
        }
    }
    // By their bits.
    let mut taken = BTreeSet::new();
    for (name, x) in &only_a {
        let twin = only_b.iter().find(|(other, y)| !taken.contains(other) && same(*x, *y));
        match twin {
            Some((other, _)) => {
                taken.insert(*other);
                found.renamed.push(Renamed { a: name.0.clone(), b: other.0.clone() });
            }
            None => found.only_a.extend(line(&name.0, *x)),
        }
    }
    let left = only_b.iter().filter(|(name, _)| !taken.contains(name));
    found.only_b = left.filter_map(|(name, y)| line(&name.0, *y)).collect();
    let by_bytes = |lines: &mut Vec<WeightLine>| lines.sort_by_key(|line| std::cmp::Reverse(line.bytes));
    by_bytes(&mut found.only_a);
    by_bytes(&mut found.only_b);
    let size = |change: &ChangedWeight| change.rel_l2.unwrap_or(f64::INFINITY);
    found.changed.sort_by(|x, y| size(y).total_cmp(&size(x)));
    found
}

/// The tensor of a constant, by its values where it is sparse.
fn dense(constant: Option<&Initializer>) -> Option<&Tensor> {
    match constant? {
        Initializer::Dense(tensor) => Some(tensor),
        Initializer::Sparse(sparse) => Some(&sparse.values),
    }
}

fn line(name: &str, constant: Option<&Initializer>) -> Option<WeightLine> {
    let tensor = dense(constant)?;
    Some(WeightLine { name: name.to_owned(), ty: described(tensor), bytes: tensor.byte_len() })
}

fn same(x: Option<&Initializer>, y: Option<&Initializer>) -> bool {
    match (x, y) {
        (Some(Initializer::Dense(x)), Some(Initializer::Dense(y))) => {
            let same = x.byte_len() == y.byte_len() && x.same_bits(y);
            x.release();
            y.release();
            same
        }
        (x, y) => x == y,
    }
}

/// How much a constant changed; `None` where its bits are the same.
fn change(name: &str, x: Option<&Initializer>, y: Option<&Initializer>) -> Option<ChangedWeight> {
    if same(x, y) {
        return None;
    }
    let (x, y) = (dense(x)?, dense(y)?);
    let mut change = ChangedWeight {
        name: name.to_owned(),
        a: described(x),
        b: described(y),
        rel_l2: None,
        max_abs: None,
        share: None,
    };
    if x.dims() == y.dims()
        && let (Some(p), Some(q)) = (x.to_f64s(), y.to_f64s())
    {
        let (mut off, mut norm, mut most, mut differ) = (0.0, 0.0, 0.0f64, 0usize);
        for (p, q) in p.iter().zip(&q).filter(|(p, q)| !(p.is_nan() && q.is_nan())) {
            off += (p - q) * (p - q);
            norm += p * p;
            most = most.max((p - q).abs());
            differ += usize::from(p != q);
        }
        let finite = |number: f64| Some(number).filter(|number| number.is_finite());
        change.rel_l2 = finite((off / norm).sqrt());
        change.max_abs = finite(most);
        change.share = Some(differ as f64 / p.len().max(1) as f64);
    }
    x.release();
    y.release();
    Some(change)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job;
    use lathe_ir::text;
    use std::path::Path;

    fn diff(a: &str, b: &str) -> Diff {
        let (a, b) = (text::parse(a).unwrap(), text::parse(b).unwrap());
        let side = |model: &Model| job::side(Path::new("m.onnx"), model, 0);
        Diff::of((&a, side(&a)), (&b, side(&b)))
    }

    const A: &str = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 2] x) => (float[n, 2] y)
        <float[2] w = {3, 4}, float[2] v = {1, 1}> { h = Add (x, w) s = Mul (h, v) y = LeakyRelu <alpha = 0.5> (s) }";

    #[test]
    fn a_model_and_itself_do_not_differ() {
        let found = diff(A, A);
        assert!(found.equal);
        assert_eq!((found.nodes.same, found.weights.same), (3, 2));
    }

    #[test]
    fn what_differs_is_told_where_it_is() {
        let b = "<ir_version: 8, opset_import: [\"\" : 18]> g (float[n, 2] x) => (float[n, 2] y, float[n, 2] h)
            <float[2] w = {3, 4.5}, float[2] u = {1, 1}> { h = Add (x, w) s = Mul (h, u) y = LeakyRelu <alpha = 0.25> (s) }";
        let found = diff(A, b);
        assert!(!found.equal);
        assert_eq!(found.interface.len(), 1);
        let port = &found.interface[0];
        assert_eq!(
            (port.kind, port.name.as_str(), port.a.as_deref(), port.b.as_deref()),
            ("output", "h", None, Some("float[n, 2]"))
        );
        let property = &found.properties[0];
        assert_eq!(
            (property.name.as_str(), property.a.as_deref(), property.b.as_deref()),
            ("opset ai.onnx", Some("17"), Some("18"))
        );
        assert!(found.operators.is_empty());
        let changed: Vec<_> =
            found.nodes.changed.iter().map(|node| (node.output.as_str(), node.what.clone())).collect();
        assert_eq!(changed, [("s", vec!["inputs".to_owned()]), ("y", vec!["alpha".to_owned()])]);
        let renamed = &found.weights.renamed[0];
        assert_eq!((renamed.a.as_str(), renamed.b.as_str()), ("v", "u"));
        let weight = &found.weights.changed[0];
        assert_eq!(
            (weight.name.as_str(), weight.rel_l2, weight.max_abs, weight.share),
            ("w", Some(0.1), Some(0.5), Some(0.5))
        );
    }

    /// Branches that use the same names, return another value, or models with inputs in another order are not equal.
    #[test]
    fn what_branches_hold_and_the_order_of_inputs_count() {
        let model = |first: &str, second: &str, returned: &str, inputs: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g ({inputs}) => (float[2] y) {{ y = If (c)
                    <then_branch = t () => (float[2] r) {{ r = {first} (x) }},
                     else_branch = e () => (float[2] {returned}) {{ r = {second} (x) s = Neg (r) }}> }}"
            )
        };
        let usual = "bool c, float[2] x";
        let whole = model("Relu", "Abs", "s", usual);
        assert!(diff(&whole, &whole).equal);
        for (other, what) in [
            (model("Exp", "Abs", "s", usual), "operator"),
            (model("Relu", "Exp", "s", usual), "operator"),
            (model("Relu", "Abs", "r", usual), "else_branch"),
        ] {
            let found = diff(&whole, &other);
            assert!(!found.equal, "{other}");
            assert_eq!(found.nodes.changed.iter().flat_map(|node| &node.what).collect::<Vec<_>>(), [what]);
        }
        let turned = diff(&whole, &model("Relu", "Abs", "s", "float[2] x, bool c"));
        assert!(!turned.equal);
        assert_eq!(turned.properties[0].name, "order of inputs");
    }

    #[test]
    fn operators_and_constants_of_one_model_alone_are_listed() {
        let b = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 2] x) => (float[n, 2] y)
            <float[2] w = {3, 4}> { h = Add (x, w) y = Relu (h) }";
        let found = diff(A, b);
        let counts: BTreeSet<_> = found.operators.iter().map(|count| (count.op.as_str(), count.a, count.b)).collect();
        assert_eq!(counts, [("LeakyRelu", 1, 0), ("Mul", 1, 0), ("Relu", 0, 1)].into());
        assert_eq!(found.nodes.only_a.iter().map(|node| node.output.as_str()).collect::<Vec<_>>(), ["s"]);
        assert_eq!(found.nodes.changed[0].what, ["operator", "inputs", "alpha"]);
        let gone: Vec<_> = found.weights.only_a.iter().map(|w| (w.name.as_str(), w.ty.as_str(), w.bytes)).collect();
        assert_eq!(gone, [("v", "float[2]", 8)]);
        assert!(found.weights.only_b.is_empty() && found.interface.is_empty());
    }
}
