//! What one kernel of whole numbers does: the operators that a runtime fuses with the rounding of what they read and give.

use crate::lossy::Recipe;
use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, NodeId, Origin, ScopeId, Tensor, Use, ValueId};
use serde::{Deserialize, Serialize};

/// Products of 8 bits with 8 bits that a sum of 32 bits has room for.
pub(super) const MOST_PRODUCTS: usize = 66_000;

/// How an operator works on codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Form {
    /// A convolution: it has a kernel of whole numbers only where its output is rounded.
    Conv,
    /// A layer of two axes, whose output may stay as it is.
    Gemm,
    /// The sum or product of two values, one of which may be a constant.
    Pair,
    /// Gives codes of other parameters than those it reads.
    Rescaled,
    /// Moves codes: what it gives has the parameters of what it reads.
    Carried,
    /// A mean over all spatial axes, which becomes a pooling of the same result.
    SpatialMean,
    /// A product with a constant matrix.
    MatMul,
    /// A sum whose first operand a layer gives: it is added there, and the other one is read.
    Skip,
    /// Anything that has to read and give codes.
    Any,
}

/// An operator with a kernel of whole numbers, and the activation that the kernel includes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Unit {
    pub node: NodeId,
    pub form: Form,
    /// A `Relu` or `Clip` behind it, which codes that cannot fall below zero do by themselves.
    pub activation: Option<NodeId>,
    /// What the activation cuts numbers to.
    pub most: Option<f32>,
    /// What it gives, behind the activation.
    pub output: ValueId,
}

impl Unit {
    /// Values that it reads as codes, with the inputs of the node that they are.
    pub fn reads(&self, graph: &Graph) -> Vec<(usize, ValueId)> {
        reads(graph, self.node, self.form)
    }

    /// Its weight; `None` of operators without one.
    pub fn weight(&self, graph: &Graph) -> Option<ValueId> {
        graph.node(self.node).input(1).filter(|_| self.has_weight())
    }

    pub fn has_weight(&self) -> bool {
        matches!(self.form, Form::Conv | Form::Gemm | Form::MatMul)
    }

    /// Whether its output must be rounded for a kernel of whole numbers to do the work.
    pub fn needs_rounded_output(&self) -> bool {
        self.form != Form::Gemm || self.activation.is_some()
    }

    /// The nodes that become one.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        [Some(self.node), self.activation].into_iter().flatten()
    }
}

/// Values that a node reads as codes.
pub(super) fn reads(graph: &Graph, id: NodeId, form: Form) -> Vec<(usize, ValueId)> {
    let inputs = graph.node(id).inputs().iter().enumerate().filter_map(|(index, value)| Some((index, (*value)?)));
    let is_data = |index: usize, value: ValueId| match form {
        Form::Pair | Form::Any => graph.constant(value).is_none(),
        Form::Rescaled => index == 0 || graph.node(id).is("Concat"),
        Form::Skip => Some(index) == skip(graph, id),
        _ => index == 0,
    };
    inputs.filter(|&(index, value)| is_data(index, value)).collect()
}

/// Which operand of a sum skips a layer: the one that no convolution gives, or the second.
fn skip(graph: &Graph, id: NodeId) -> Option<usize> {
    let node = graph.node(id);
    let of_layer = |index: usize| {
        let maker = node.input(index).and_then(|value| graph.producer(value));
        maker.is_some_and(|maker| graph.node(maker).is("Conv"))
    };
    let constant = |index: usize| node.input(index).is_none_or(|value| graph.constant(value).is_some());
    let skips = node.is("Add") && !constant(0) && !constant(1);
    match (of_layer(0), of_layer(1)) {
        (true, _) if skips => Some(1),
        (false, true) if skips => Some(0),
        _ => None,
    }
}

/// The unit of a node, or why it has to stay in float.
pub(super) fn fuses(model: &Model, facts: &Facts, id: NodeId, recipe: Recipe) -> Result<Unit, String> {
    let graph = &model.graph;
    let node = graph.node(id);
    let coded = |value: ValueId| graph.producer(value).is_some_and(|id| graph.node(id).is("DequantizeLinear"));
    let rounded = |place: &Use| matches!(*place, Use::Node(id, 0) if graph.node(id).is("QuantizeLinear"));
    let given = node.outputs().iter().flatten().any(|&output| graph.value(output).uses().iter().any(rounded));
    if given || node.inputs().iter().flatten().any(|&value| coded(value)) {
        return Err("it is quantized already".into());
    }
    let form = form(model, facts, id, recipe)?;
    let raw = node.output(0).ok_or("it gives nothing")?;
    let float = |value: ValueId| facts.elem(value) == Some(DataType::Float) && facts.ndim(value).is_some_and(|n| n > 0);
    if !float(raw) || reads(graph, id, form).iter().any(|&(_, value)| !float(value)) {
        return Err("what it reads or gives is not float32 of a known number of axes".into());
    }
    let included = recipe == Recipe::Cpu && matches!(form, Form::Conv | Form::Gemm | Form::Pair);
    let behind = activation(graph, raw).filter(|_| included);
    let (activation, most) = behind.map_or((None, None), |(id, most)| (Some(id), most));
    let output = activation.map_or(Some(raw), |id| graph.node(id).output(0)).ok_or("its activation gives nothing")?;
    Ok(Unit { node: id, form, activation, most, output })
}

/// How an operator works on codes, whatever reads and gives them, or why it has to stay in float.
pub(super) fn form(model: &Model, facts: &Facts, id: NodeId, recipe: Recipe) -> Result<Form, String> {
    let graph = &model.graph;
    let node = graph.node(id);
    let outputs = node.outputs().iter().flatten().count();
    if node.scope() != ScopeId::MAIN || !node.is_standard() || outputs != 1 {
        return Err(format!("{} has no kernel of whole numbers", node.op_type));
    }
    let constant = |index: usize| node.input(index).is_some_and(|value| graph.constant(value).is_some());
    let data = |index: usize| node.input(index).is_some() && !constant(index);
    let everywhere = matches!(recipe, Recipe::Cpu | Recipe::Qnn);
    match node.op_type.as_str() {
        "MatMul" if recipe != Recipe::Cpu && constant(1) => layer(graph, id, &[2]).map(|()| Form::MatMul),
        "Add" if recipe == Recipe::TensorRt && skip(graph, id).is_some() => Ok(Form::Skip),
        "Conv" if !everywhere => layer(graph, id, &[3, 4, 5]).map(|()| Form::Conv),
        "Conv" => layer(graph, id, &[3, 4]).map(|()| Form::Conv),
        "Gemm" => {
            let plain = ["alpha", "beta"].iter().all(|f| node.float(f).unwrap_or(1.0) == 1.0);
            if !plain || node.int("transA").unwrap_or(0) != 0 {
                return Err("its Gemm scales the product or what it adds, or turns what it reads".into());
            }
            layer(graph, id, &[2]).map(|()| Form::Gemm)
        }
        op if !everywhere && op != "Gemm" => Err(format!("{op} stays in float before and behind layers")),
        "Add" | "Mul" if data(0) || data(1) => {
            let float = |index: usize| !constant(index) || floats(graph, node.input(index)).is_some();
            match float(0) && float(1) {
                true => Ok(Form::Pair),
                false => Err("its constant is not float32".into()),
            }
        }
        "Concat" if (0..node.inputs().len()).all(data) => Ok(Form::Rescaled),
        "AveragePool" | "GlobalAveragePool" | "Sigmoid" | "LeakyRelu" if data(0) => Ok(Form::Rescaled),
        "MaxPool" if data(0) && model.opset() >= 12 => Ok(Form::Carried),
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Transpose" | "DepthToSpace" if data(0) => Ok(Form::Carried),
        "ReduceMean" if data(0) && is_spatial_mean(graph, facts, id) => Ok(Form::SpatialMean),
        "Clip" if recipe == Recipe::Qnn && data(0) => Ok(Form::Any),
        op if recipe == Recipe::Qnn && ROUNDED.contains(&op) && (0..node.inputs().len()).all(data) => Ok(Form::Any),
        op => Err(format!("{op} has no kernel of whole numbers")),
    }
}

/// Operators without constants of their own that a processor of whole numbers has.
const ROUNDED: &[&str] =
    &["Div", "Elu", "Gelu", "HardSigmoid", "HardSwish", "MatMul", "Max", "Min", "Relu", "Softmax", "Sub", "Tanh"];

/// Whether a layer has a constant weight of one of these numbers of axes, and a bias with one number for every output.
fn layer(graph: &Graph, id: NodeId, ndims: &[usize]) -> Result<(), String> {
    let node = graph.node(id);
    let weight = floats(graph, node.input(1)).ok_or("its weight is no float32 constant of the main graph")?;
    if !ndims.contains(&weight.dims().len()) || weight.is_empty() {
        return Err("its weight has a number of axes for which there is no kernel of whole numbers".into());
    }
    if node.input(0).is_none_or(|data| graph.constant(data).is_some()) {
        return Err("it reads a constant".into());
    }
    let outputs = weight.dims()[output_axis(graph, id)];
    if weight.len() / outputs.max(1) > MOST_PRODUCTS {
        return Err("an output adds up more products than 32 bits have room for".into());
    }
    match node.input(2) {
        None => Ok(()),
        Some(bias) => match floats(graph, Some(bias)).is_some_and(|bias| is_row(bias, outputs)) {
            true => Ok(()),
            false => Err("its bias is no constant with one number for every output".into()),
        },
    }
}

/// The axis of a layer's weight along which its outputs lie.
pub(super) fn output_axis(graph: &Graph, id: NodeId) -> usize {
    let node = graph.node(id);
    usize::from(node.is("MatMul") || node.is("Gemm") && node.int("transB").unwrap_or(0) == 0)
}

/// Whether a tensor holds one number for every feature of the last axis of what it is added to.
pub(super) fn is_row(tensor: &Tensor, features: usize) -> bool {
    tensor.len() == features && tensor.dims().last() == Some(&features)
}

/// A float32 constant of the main graph.
pub(super) fn floats(graph: &Graph, value: Option<ValueId>) -> Option<&Tensor> {
    let value = value?;
    let tensor = graph.constant(value).filter(|tensor| tensor.dtype() == DataType::Float)?;
    matches!(graph.value(value).origin(), Origin::Initializer(ScopeId::MAIN)).then_some(tensor)
}

/// The activation that alone reads a value and cuts it off at zero, and what else it cuts it off at.
fn activation(graph: &Graph, value: ValueId) -> Option<(NodeId, Option<f32>)> {
    let mut uses = graph.value(value).uses().iter();
    let (Some(&Use::Node(id, 0)), None) = (uses.next(), uses.next()) else { return None };
    let node = graph.node(id);
    if node.scope() != ScopeId::MAIN {
        return None;
    }
    if node.is("Relu") {
        return Some((id, None));
    }
    let bound = |index: usize| floats(graph, node.input(index)).and_then(Tensor::scalar_f64);
    let from_zero = node.is("Clip") && bound(1) == Some(0.0);
    let most = node.input(2).is_none() || bound(2).is_some_and(|most| most > 0.0);
    (from_zero && most).then(|| (id, bound(2).map(|most| most as f32)))
}

/// Whether a node takes the mean over the two spatial axes of an image.
pub(super) fn is_spatial_mean(graph: &Graph, facts: &Facts, id: NodeId) -> bool {
    let node = graph.node(id);
    let axes = match node.input(1) {
        Some(axes) => graph.constant(axes).and_then(Tensor::to_i64s),
        None => node.ints("axes").map(<[i64]>::to_vec),
    };
    let ndim = node.input(0).and_then(|data| facts.ndim(data));
    let Some(mut axes) = axes.filter(|_| ndim == Some(4)) else { return false };
    axes.iter_mut().for_each(|axis| *axis += if *axis < 0 { 4 } else { 0 });
    axes.sort_unstable();
    axes == [2, 3]
}
