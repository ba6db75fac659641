//! What linear layers read, divided channel by channel in the normalisation before them (SmoothQuant).
//!
//! Other readers of the normalisation keep what it gives: the division has a copy of the node, which takes its place where all
//! of them want it.
//!
//! Source: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438.

use super::{emit::CHANGED, units::floats};
use lathe_ir::{Graph, NodeId, ScopeId, Use, ValueId};

/// Nodes whose last act is to multiply every channel with a constant.
const NORMS: [&str; 3] = ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"];

/// The constants of a normalisation that gives a value of so many channels, by the inputs that they are: what it multiplies and
/// what it adds.
pub(super) fn constants(graph: &Graph, value: ValueId, channels: usize) -> Option<(NodeId, Vec<usize>)> {
    let id = graph.producer(value)?;
    let node = graph.node(id);
    let row = |index: usize| {
        let tensor = floats(graph, node.input(index));
        tensor.is_some_and(|tensor| super::units::is_row(tensor, channels))
    };
    if node.scope() != ScopeId::MAIN || node.outputs().iter().flatten().count() != 1 {
        return None;
    }
    if node.is("Mul") {
        let index = (0..2).find(|&index| row(index))?;
        return Some((id, vec![index]));
    }
    let normalises = NORMS.iter().any(|op| node.is(op)) && node.int("axis").unwrap_or(-1) == -1;
    let all: Vec<usize> = (1..node.inputs().len()).filter(|&index| node.input(index).is_some()).collect();
    (normalises && !all.is_empty() && all.iter().all(|&index| row(index))).then_some((id, all))
}

/// A value divided by factors, one for every channel of the last axis: by a copy of the normalisation that gives it, or one that
/// is there already.
pub(super) fn divided(graph: &mut Graph, value: ValueId, factors: &[f32]) -> Result<ValueId, &'static str> {
    let (id, indices) = constants(graph, value, factors.len()).ok_or(CHANGED)?;
    let mut changed = Vec::new();
    for &index in &indices {
        let constant = graph.node(id).input(index).ok_or(CHANGED)?;
        let tensor = floats(graph, Some(constant)).ok_or(CHANGED)?;
        let mut numbers = tensor.to_f32s().ok_or(CHANGED)?;
        numbers.iter_mut().zip(factors).for_each(|(x, factor)| *x /= factor);
        changed.push((index, constant, lathe_ir::Tensor::from_f32s(tensor.dims(), &numbers)));
    }
    let node = graph.node(id).clone();
    let data = (0..node.inputs().len()).find(|index| !indices.contains(index)).ok_or(CHANGED)?;
    let readers: Vec<NodeId> = node.input(data).map_or_else(Vec::new, |data| {
        let uses = graph.value(data).uses().iter();
        uses.filter_map(|place| if let Use::Node(id, _) = *place { Some(id) } else { None }).collect()
    });
    let is_copy = |other: &NodeId| {
        let other = graph.node(*other);
        let same = |(index, _, tensor): &(usize, ValueId, lathe_ir::Tensor)| {
            let own = other.input(*index).and_then(|value| graph.constant(value));
            own.is_some_and(|own| own.dims() == tensor.dims() && own.to_f32s() == tensor.to_f32s())
        };
        other.op_type == node.op_type && other.input(data) == node.input(data) && changed.iter().all(same)
    };
    if let Some(known) = readers.iter().find(|id| is_copy(id)) {
        return graph.node(*known).output(0).ok_or(CHANGED);
    }
    let mut inputs = node.inputs().to_vec();
    for (index, constant, tensor) in changed {
        let name = graph.fresh_name(&format!("{}_smoothed", graph.value(constant).name));
        inputs[index] = Some(graph.add_initializer(ScopeId::MAIN, &name, tensor));
    }
    let name = graph.fresh_name(&format!("{}_smoothed", graph.value(value).name));
    let output = graph.add_value(name, None);
    let mut copy = lathe_ir::Node::new(node.op_type.clone());
    copy.domain.clone_from(&node.domain);
    copy.attributes.clone_from(&node.attributes);
    graph.add_node(ScopeId::MAIN, copy, inputs, vec![Some(output)]);
    Ok(output)
}
