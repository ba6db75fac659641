//! Which layers of a result compute in whole numbers, and why the others do not.

use super::{products, units};
use crate::lossy::{Recipe, Weight, weights};
use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, NodeId, ScopeId, ValueId};

/// Operators that multiply with weights.
const LAYERS: [&str; 4] = ["Conv", "ConvTranspose", "Gemm", "MatMul"];

/// The layers of a model, as they compute.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayersInCodes {
    /// Those that read codes.
    pub coded: Vec<NodeId>,
    /// Those that read floats, and why.
    pub floats: Vec<(NodeId, String)>,
    /// The largest code of a weight that codes are multiplied with.
    pub largest: u8,
}

/// Which layers read codes, for a runtime that wants them so.
pub fn layers_in_codes(model: &Model, recipe: Recipe) -> LayersInCodes {
    let (graph, facts) = (&model.graph, Facts::infer(model));
    let known = weights(graph).0;
    let mut found = LayersInCodes::default();
    for id in graph.sorted(ScopeId::MAIN).unwrap_or_default() {
        let node = graph.node(id);
        if !LAYERS.iter().any(|op| node.is(op)) && node.op_type != "MatMulNBits" {
            continue;
        }
        if !(restored(graph, id, 0) && restored(graph, id, 1)) {
            found.floats.push((id, reason(model, &facts, id, (recipe, &known))));
            continue;
        }
        found.coded.push(id);
        let codes = node.input(1).and_then(|weight| graph.producer(weight));
        let codes = codes.and_then(|maker| graph.constant(graph.node(maker).input(0)?));
        if let Some(codes) = codes.filter(|codes| codes.dtype() == DataType::Int8) {
            let most = codes.bytes().iter().map(|&code| (code as i8).unsigned_abs()).max();
            found.largest = found.largest.max(most.unwrap_or(0));
        }
    }
    found
}

fn restored(graph: &Graph, id: NodeId, index: usize) -> bool {
    let maker = graph.node(id).input(index).and_then(|value| graph.producer(value));
    maker.is_some_and(|maker| graph.node(maker).is("DequantizeLinear"))
}

fn reason(model: &Model, facts: &Facts, id: NodeId, (recipe, known): (Recipe, &[Weight])) -> String {
    const CHOSEN: &str = "it could read codes, and the plan keeps it in float";
    let graph = &model.graph;
    let node = graph.node(id);
    if !node.is_standard() || restored(graph, id, 1) && !restored(graph, id, 0) {
        return "its weight alone is stored in codes".to_owned();
    }
    let turned = |value: ValueId| {
        let maker = graph.producer(value).map(|id| graph.node(id)).filter(|maker| maker.is("Transpose"));
        maker.and_then(|maker| maker.input(0)).unwrap_or(value)
    };
    let constant = node.input(1).is_some_and(|value| graph.constant(turned(value)).is_some());
    if node.is("MatMul") && !constant {
        return "both of its operands are computed".to_owned();
    }
    if node.is("MatMul") && recipe == Recipe::Cpu {
        let own = known.iter().find(|weight| weight.taps.iter().any(|tap| tap.node == id));
        let small = || "its weight is no matrix of 4,096 numbers or more that products alone read".to_owned();
        return own.map_or_else(small, |weight| products::refusal(graph, weight).unwrap_or(CHOSEN).to_owned());
    }
    units::form(model, facts, id, recipe).err().unwrap_or_else(|| CHOSEN.to_owned())
}
