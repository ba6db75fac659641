//! Which inputs and outputs of a node change their type with it.

use super::Precision;
use lathe_analysis::{Facts, Formal, Operator, Schema};
use lathe_ir::{DataType, Graph, Model, Node, NodeId};

/// The inputs and outputs of a node that are float32 and would be half precision if the node computed in it.
#[derive(Debug, Clone, Default)]
pub(super) struct Ports {
    pub inputs: Vec<bool>,
    pub outputs: Vec<bool>,
}

/// Type variables that stay what they are: statistics, which norms compute in float32 whatever they read, and regions of
/// interest, which are coordinates.
const STAYING: &[(&str, &str)] = &[
    ("LayerNormalization", "U"),
    ("SimplifiedLayerNormalization", "U"),
    ("SkipLayerNormalization", "U"),
    ("SkipSimplifiedLayerNormalization", "U"),
    ("Resize", "T2"),
];

/// Operators whose output type is an attribute that no rule here rewrites.
const STATED: &[&str] = &["BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix", "CastLike", "Constant"];

/// Whether a node reads or gives float32 tensors at all.
pub(super) fn touches_float(graph: &Graph, facts: &Facts, node: &Node) -> bool {
    let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
    let all = node.inputs().iter().chain(node.outputs()).flatten().copied().chain(captured);
    all.into_iter().any(|value| facts.elem(value) == Some(DataType::Float))
}

/// The ports of a node that may compute in half precision; or why it may not.
pub(super) fn ports(model: &Model, facts: &Facts, id: NodeId, precision: Precision) -> Result<Ports, String> {
    let node = model.graph.node(id);
    if !node.subgraphs().is_empty() {
        return Err("its subgraphs compute in float32".to_owned());
    }
    let is_float = |value: &Option<_>| value.is_some_and(|v| facts.elem(v) == Some(DataType::Float));
    if node.is("Cast") {
        let from = node.input(0).and_then(|value| facts.elem(value));
        return match is_float(&node.output(0)) {
            true if from == Some(precision.dtype) => Err(format!("it reads {}", precision.dtype)),
            true => Ok(Ports { inputs: vec![is_float(&node.input(0))], outputs: vec![true] }),
            false => Err("it casts to another type".to_owned()),
        };
    }
    if STATED.contains(&node.op_type.as_str()) {
        return Err("an attribute states its type".to_owned());
    }
    let version = model.opset_of(&node.domain).unwrap_or(0);
    let Some(schema) = Schema::of(node, version) else {
        return Err(match Operator::of(node) {
            Some(_) => format!("operator set {version} does not have its operator"),
            None => "the types of its operator are not known".to_owned(),
        });
    };
    let changes = |formal: Option<Formal>| match formal {
        Some(Formal::Variable(index)) => {
            let variable = &schema.variables()[index];
            variable.allows(precision.dtype) && !STAYING.contains(&(node.op_type.as_str(), variable.name))
        }
        _ => false,
    };
    let inputs = node.inputs().iter().enumerate();
    let outputs = node.outputs().iter().enumerate();
    let ports = Ports {
        inputs: inputs.map(|(at, value)| is_float(value) && changes(schema.input(at))).collect(),
        outputs: outputs.map(|(at, value)| is_float(value) && changes(schema.output(at))).collect(),
    };
    let is_main =
        |ports: &[bool], values: &[Option<_>]| ports.first() == Some(&true) || !values.first().is_some_and(is_float);
    if is_main(&ports.inputs, node.inputs()) && is_main(&ports.outputs, node.outputs()) && ports.changes_anything() {
        return Ok(ports);
    }
    let dtype = precision.dtype;
    let first = Schema::first_with(node, dtype).filter(|&first| first > version && node.is_standard());
    let hint = first.map_or(String::new(), |first| format!("; --opset {first} upgrades"));
    Err(format!("`{}` allows no {dtype} in operator set {version}{hint}", node.op_type))
}

impl Ports {
    fn changes_anything(&self) -> bool {
        self.inputs.iter().chain(&self.outputs).any(|&changes| changes)
    }
}
