//! What is quantized: pairs of `QuantizeLinear` and `DequantizeLinear` stay in float32 with what stands between them, and the rest
//! converts around them. A weight that is stored as codes is dequantized to the type in which it is read.

use super::survey::Survey;
use lathe_ir::{Graph, Model, NodeId, ScopeId, ValueId};

const PAIRS: &str = "it is quantized: it stands between QuantizeLinear and DequantizeLinear";
const READ_IN_FLOAT: &str = "what reads the weight that it dequantizes stays in float32";
const OF_FLOAT: &str = "it reads a weight that is dequantized to float32";

/// Operators that are quantized themselves.
const QUANTIZED: &[&str] = &[
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QMoE",
    "QOrderedMatMul",
    "QuantizeLinear",
];

/// Layout of codes that are stored: what picks or turns them.
const HANDING_ON: &[&str] = &["Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"];

/// Keeps pairs around activations: what reads a dequantized one or is quantized behind it belongs to them.
pub(super) fn keep(survey: &mut Survey) {
    let graph = survey.graph;
    let mut found = Vec::new();
    for id in survey.candidates().into_iter().filter(|&id| !is_stored_weight(graph, id)) {
        let node = graph.node(id);
        let is_pair = |maker: NodeId| is_dequantize(graph, maker) && !is_stored_weight(graph, maker);
        let reads = node.inputs().iter().flatten().any(|&value| graph.producer(value).is_some_and(is_pair));
        let gives = || {
            let readers = node.outputs().iter().flatten().flat_map(|&value| survey.readers(value));
            readers.into_iter().any(|(reader, _)| graph.node(reader).op_type == "QuantizeLinear")
        };
        let own = QUANTIZED.contains(&node.op_type.as_str()) || node.op_type.starts_with("QLinear");
        if own || reads || gives() {
            found.push(id);
        }
    }
    found.into_iter().for_each(|id| survey.keep(id, PAIRS));
}

/// Whether activations are rounded to codes, which then differ by a step where what is rounded differs by next to nothing.
pub fn reads_codes(model: &Model) -> bool {
    let rounds = ["DynamicQuantizeLinear", "QuantizeLinear"];
    model.graph.all_nodes().into_iter().any(|id| rounds.contains(&model.graph.node(id).op_type.as_str()))
}

/// Lets weights that are stored as codes and what reads them compute in one type: a cast between them would keep a runtime from
/// multiplying with the codes. Comes last, when it is known what stays.
pub(super) fn tie(survey: &mut Survey) {
    let graph = survey.graph;
    let stored: Vec<NodeId> = graph.nodes(ScopeId::MAIN).filter(|&id| is_stored_weight(graph, id)).collect();
    loop {
        let mut kept = Vec::new();
        for &id in &stored {
            let Some(weight) = graph.node(id).output(0).filter(|&value| survey.is_float(value)) else { continue };
            let readers = survey.readers(weight);
            let converts = |&(reader, at): &(NodeId, Option<usize>)| {
                at.zip(survey.ports(reader)).is_some_and(|(at, ports)| ports.inputs[at])
            };
            match survey.ports(id) {
                Some(_) if !readers.iter().all(converts) => kept.push((id, READ_IN_FLOAT)),
                None => kept.extend(readers.iter().filter(|reader| converts(reader)).map(|&(id, _)| (id, OF_FLOAT))),
                Some(_) => {}
            }
        }
        if kept.is_empty() {
            return;
        }
        kept.into_iter().for_each(|(id, reason)| survey.keep(id, reason));
    }
}

/// Whether a value is a weight that was stored as codes, between which and its readers no cast belongs.
pub(super) fn is_restored(graph: &Graph, value: ValueId) -> bool {
    graph.producer(value).is_some_and(|id| is_stored_weight(graph, id))
}

/// Whether input `at` of a node is the scale of codes.
pub(super) fn is_scale(graph: &Graph, id: NodeId, at: usize) -> bool {
    match graph.node(id).op_type.as_str() {
        "DequantizeLinear" | "QuantizeLinear" => at == 1,
        "MatMulNBits" | "GatherBlockQuantized" => at == 2,
        _ => false,
    }
}

fn is_dequantize(graph: &Graph, id: NodeId) -> bool {
    graph.node(id).op_type == "DequantizeLinear"
}

/// Whether a node restores a constant from codes, or rows that are picked of one.
fn is_stored_weight(graph: &Graph, id: NodeId) -> bool {
    let mut codes = graph.node(id).input(0).filter(|_| is_dequantize(graph, id));
    while let Some(value) = codes {
        if graph.constant(value).is_some() {
            return true;
        }
        let maker = graph.producer(value).map(|id| graph.node(id));
        codes = maker.filter(|node| HANDING_ON.contains(&node.op_type.as_str())).and_then(|node| node.input(0));
    }
    false
}
