//! Leaving units out of a graph, and doing so by way of a number that is an input.
//!
//! What goes is named by values: the summands of a stream that units compute, and the sums whose normalization goes with
//! them. So units can be left out of a graph in which others have changed.

use lathe_analysis::Facts;
use lathe_ir::{Graph, Model, Node, NodeId, Origin, ScopeId, Tensor, Type, Use, ValueId};
use std::collections::BTreeSet;

/// Normalizations that stand in one node.
const NORMS: [&str; 3] = ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"];

/// Operators that read nothing of a value but its shape.
const SHAPE_READERS: [&str; 2] = ["Shape", "Size"];

/// How a summand enters a stream.
enum Join {
    /// `Add` and `Sum`.
    Sum,
    /// A sum with its normalization in one node: the normalization, and the input of the bias that is added too.
    Normalized(&'static str, usize),
}

/// The node that reads a value, if nothing else does.
pub(super) fn only_reader(graph: &Graph, value: ValueId) -> Option<(NodeId, usize)> {
    let uses = graph.value(value).uses();
    match uses.first() {
        Some(&Use::Node(id, index)) if uses.len() == 1 => Some((id, index)),
        _ => None,
    }
}

/// The node in one piece that normalizes a sum and is all that reads it.
pub(super) fn norm_after(graph: &Graph, sum: ValueId) -> Option<NodeId> {
    let (id, index) = only_reader(graph, sum)?;
    (index == 0 && NORMS.iter().any(|op| graph.node(id).is(op))).then_some(id)
}

fn join(graph: &Graph, opset: i64, value: ValueId) -> Result<(NodeId, usize, Join), &'static str> {
    let (id, index) = only_reader(graph, value).ok_or("something else than a sum reads what it adds")?;
    let node = graph.node(id);
    if node.scope() != ScopeId::MAIN {
        return Err("it lies in a subgraph");
    }
    let kind = match node.op_type.as_str() {
        "Add" | "Sum" if node.is_standard() => Join::Sum,
        "SkipLayerNormalization" if node.domain == "com.microsoft" && opset >= 17 => {
            Join::Normalized("LayerNormalization", 4)
        }
        "SkipSimplifiedLayerNormalization" if node.domain == "com.microsoft" => {
            Join::Normalized("SimplifiedLayerNormalization", 3)
        }
        _ => return Err("the operator that adds it is not known to work without it"),
    };
    if matches!(kind, Join::Normalized(..)) && (index > 1 || node.output(1).is_some() || node.output(2).is_some()) {
        return Err("the operator that adds it gives more than the sum");
    }
    Ok((id, index, kind))
}

/// Whether a summand can be left out.
pub(super) fn can_go(model: &Model, value: ValueId) -> Result<(), &'static str> {
    join(&model.graph, model.opset(), value).map(|_| ())
}

/// Leaves out what `gone` names, and the normalizations of the sums that it names. Nodes that nothing needs any more
/// stay.
pub(super) fn leave_out(model: &mut Model, gone: &[ValueId]) -> Result<(), &'static str> {
    let opset = model.opset();
    let graph = &mut model.graph;
    let (sums, mut open): (Vec<ValueId>, Vec<ValueId>) =
        gone.iter().copied().partition(|&value| norm_after(graph, value).is_some());
    for sum in sums {
        let norm = norm_after(graph, sum).expect("it was there");
        let output = graph.node(norm).output(0).ok_or("a normalization has no output")?;
        graph.replace_uses(output, sum);
        remove(graph, norm);
    }
    open.reverse();
    let mut names: BTreeSet<ValueId> = open.iter().copied().collect();
    while let Some(value) = open.pop() {
        if graph.value(value).uses().is_empty() {
            // Its sum went with another summand.
            continue;
        }
        let (id, index, kind) = join(graph, opset, value)?;
        let node = graph.node(id).clone();
        match kind {
            Join::Sum => {
                let sum = node.output(0).ok_or("a sum has no output")?;
                let mut kept: Vec<ValueId> =
                    node.inputs().iter().flatten().copied().filter(|v| !names.contains(v)).collect();
                // What is left is a bias of the unit, not a stream.
                if kept.iter().all(|&v| graph.constant(v).is_some()) {
                    kept.clear();
                }
                match kept.as_slice() {
                    [] => {
                        names.insert(sum);
                        open.push(sum);
                        // Its own summands are left behind.
                        continue;
                    }
                    [one] => {
                        graph.replace_uses(sum, *one);
                        remove(graph, id);
                    }
                    several => graph.set_inputs(id, several.iter().map(|&v| Some(v)).collect()),
                }
            }
            Join::Normalized(norm, _) => {
                let other = node.input(1 - index).ok_or("a sum has one summand only")?;
                let mut inputs = vec![other];
                inputs.extend(
                    node.inputs().iter().skip(2).take(if norm == "LayerNormalization" { 2 } else { 1 }).flatten(),
                );
                let epsilon = node.float("epsilon").unwrap_or(1e-12);
                let mut plain = Node::new(norm).with("axis", -1i64).with("epsilon", epsilon);
                if norm == "SimplifiedLayerNormalization" {
                    plain = plain.with("stash_type", 1i64);
                }
                let made = graph.append(ScopeId::MAIN, plain, &inputs, "normalized");
                if let Some(output) = node.output(0) {
                    graph.replace_uses(output, made);
                }
                if let Some(sum) = node.output(3) {
                    graph.replace_uses(sum, other);
                }
                remove(graph, id);
            }
        }
    }
    graph.sort().map_err(|_| "nodes need one another")
}

/// Removes a node that nothing reads.
fn remove(graph: &mut Graph, id: NodeId) {
    let unused = graph.node(id).outputs().iter().flatten().all(|&v| graph.value(v).uses().is_empty());
    if unused {
        graph.remove_node(id);
    }
}

/// Adds an input that multiplies all of `gone`: 1 leaves the model as it is, 0 leaves them out.
pub(super) fn gate(model: &mut Model, gone: &[ValueId], name: &str) -> Result<String, &'static str> {
    let opset = model.opset();
    let facts = Facts::infer(model);
    let graph = &mut model.graph;
    let name = graph.fresh_name(name);
    let input = graph.add_value(name.clone(), Some(Type::tensor(lathe_ir::DataType::Float, Vec::new())));
    graph.add_input(ScopeId::MAIN, input);
    for &value in gone {
        let dtype = facts.elem(value).filter(|t| t.is_float()).ok_or("the stream does not hold floats")?;
        let factor = match dtype {
            lathe_ir::DataType::Float => input,
            other => {
                let cast = Node::new("Cast").with("to", i64::from(other.code()));
                graph.append(ScopeId::MAIN, cast, &[input], &name)
            }
        };
        if let Some(norm) = norm_after(graph, value) {
            // output = gate · norm(sum) + (1 − gate) · sum
            let output = graph.node(norm).output(0).ok_or("a normalization has no output")?;
            let one = Tensor::from_f64s(dtype, &[], &[1.0]).ok_or("the stream holds unusual floats")?;
            let one = graph.add_initializer(ScopeId::MAIN, &name, one);
            let rest = graph.append(ScopeId::MAIN, Node::new("Sub"), &[one, factor], &name);
            let plain = graph.append(ScopeId::MAIN, Node::new("Mul"), &[value, rest], &name);
            let normed = graph.append(ScopeId::MAIN, Node::new("Mul"), &[output, factor], &name);
            let mixed = graph.append(ScopeId::MAIN, Node::new("Add"), &[normed, plain], &name);
            graph.replace_uses(output, mixed);
            let scaled = graph.producer(normed).expect("it was just added");
            graph.set_input(scaled, 0, Some(output));
            continue;
        }
        let (id, index, kind) = join(graph, opset, value)?;
        let mut reads = vec![(index, value)];
        if let Join::Normalized(_, bias) = kind {
            reads.extend(graph.node(id).input(bias).map(|b| (bias, b)));
        }
        for (index, read) in reads {
            let gated = graph.append(ScopeId::MAIN, Node::new("Mul"), &[read, factor], &name);
            graph.set_input(id, index, Some(gated));
        }
    }
    graph.sort().map_err(|_| "nodes need one another")?;
    Ok(name)
}

/// Lets what reads the shape of a value among the outputs of `nodes` from outside read that of another one of the same
/// shape; says whether nothing is left that does.
pub(super) fn read_shapes_elsewhere(model: &mut Model, nodes: &BTreeSet<NodeId>) -> bool {
    let graph = &model.graph;
    let mut found = Vec::new();
    for &id in nodes.iter().filter(|&&id| graph.get(id).is_some()) {
        for &value in graph.node(id).outputs().iter().flatten() {
            let readers = graph.value(value).uses().iter().filter_map(|place| match place {
                Use::Node(reader, 0) if !nodes.contains(reader) => {
                    SHAPE_READERS.iter().any(|op| graph.node(*reader).is(op)).then_some(*reader)
                }
                _ => None,
            });
            found.extend(readers.map(|reader| (reader, value)));
        }
    }
    if found.is_empty() {
        return true;
    }
    let facts = Facts::infer(model);
    let order: Vec<NodeId> = graph.nodes(ScopeId::MAIN).collect();
    let mut all = true;
    let mut edits = Vec::new();
    for (reader, value) in found {
        let before = order.iter().take_while(|&&id| id != reader);
        let made = before.filter(|id| !nodes.contains(id)).flat_map(|&id| graph.node(id).outputs().iter().flatten());
        let mut others = graph.main().inputs().iter().chain(made).copied();
        match others.find(|&other| facts.same_shape(value, other)) {
            Some(other) => edits.push((reader, other)),
            None => all = false,
        }
    }
    for (reader, other) in edits {
        model.graph.set_input(reader, 0, Some(other));
    }
    all
}

/// The node of the main graph that makes a value.
pub(super) fn maker(graph: &Graph, value: ValueId) -> Option<NodeId> {
    match graph.value(value).origin() {
        Origin::Node(id, _) if graph.node(id).scope() == ScopeId::MAIN => Some(id),
        _ => None,
    }
}
