//! How a graph says what is rounded: constants of codes, and `QuantizeLinear` and `DequantizeLinear` around every unit.

use super::{
    channels::{self, Scaled},
    ranges::{Codes, Params, bias_codes, least_scale},
    rounding::{Fits, Numbers, product_numbers},
    smoothing,
    units::{self, Form, floats, is_row},
};
use crate::lossy::{Recipe, Weight, layers::Tap};
use lathe_ir::{DataType, Graph, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Why a graph is left alone.
pub(super) const CHANGED: &str = "the nodes are no longer as they were";

/// What is done to a graph, by the names of values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct StaticEdit {
    /// The units in the order in which they run; none where the products of a weight alone are meant.
    pub units: Vec<UnitEdit>,
    /// What codes stand for.
    pub params: BTreeMap<String, Params>,
    /// The largest code of a weight.
    pub largest: u8,
    /// How the runtime wants it.
    pub recipe: Recipe,
    /// Whether no layer of the region is left out.
    pub whole: bool,
    /// What is done to constants first; the model stays the same function.
    pub scaled: Vec<Scaled>,
    /// Factors that what a product reads is divided by in the normalisation before it, and its weight multiplied with.
    pub smoothed: BTreeMap<String, Vec<f32>>,
    /// Weights whose codes make up for each other.
    pub fitted: BTreeSet<String>,
}

/// A unit by its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct UnitEdit {
    /// What it gives.
    pub output: String,
    pub form: Form,
    /// Whether an activation is part of it.
    pub activation: bool,
    /// Whether its output is rounded.
    pub rounds: bool,
    /// What is added to the bias of its layer so that outputs keep their means; empty for nothing.
    pub correction: Vec<f32>,
}

/// A scale by its bits, or a zero point and its element type.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Constant {
    Scale(u32),
    Zero(u16, i32),
}

/// A graph on the way, with what it rounds already.
struct Emitter<'a> {
    graph: &'a mut Graph,
    edit: &'a StaticEdit,
    fits: &'a Fits,
    /// Values that stand for codes.
    restored: BTreeSet<ValueId>,
    /// What stands for a value that something else reads as it is.
    copies: BTreeMap<ValueId, ValueId>,
    constants: BTreeMap<Constant, ValueId>,
}

impl StaticEdit {
    /// Scales constants so that channels are alike.
    pub fn scale(&self, graph: &mut Graph) -> Result<(), &'static str> {
        channels::scale(graph, &self.scaled)
    }

    /// Carries out the units in a graph whose constants are scaled, with codes that were fitted.
    pub fn emit(&self, graph: &mut Graph, fits: &Fits) -> Result<(), &'static str> {
        let mut emitter = Emitter::new(graph, self, fits);
        self.units.iter().try_for_each(|unit| emitter.unit(unit))
    }

    /// Rounds what the products with a weight read; what they give stays as it is.
    pub fn emit_products(&self, graph: &mut Graph, weight: &Weight, fits: &Fits) -> Result<(), &'static str> {
        Emitter::new(graph, self, fits).products(weight)
    }

    /// The node of a unit, in front of its activation.
    pub fn layer_of(&self, graph: &Graph, unit: &UnitEdit) -> Option<NodeId> {
        let last = graph.producer(graph.find_value(&unit.output)?)?;
        if unit.activation { graph.producer(graph.node(last).input(0)?) } else { Some(last) }
    }
}

impl<'a> Emitter<'a> {
    fn new(graph: &'a mut Graph, edit: &'a StaticEdit, fits: &'a Fits) -> Emitter<'a> {
        Emitter { graph, edit, fits, restored: BTreeSet::new(), copies: BTreeMap::new(), constants: BTreeMap::new() }
    }

    fn unit(&mut self, edit: &UnitEdit) -> Result<(), &'static str> {
        let output = self.graph.find_value(&edit.output).ok_or(CHANGED)?;
        let id = self.edit.layer_of(self.graph, edit).ok_or(CHANGED)?;
        let mut read = None;
        for (index, value) in units::reads(self.graph, id, edit.form) {
            let (params, restored) = self.restored(value)?;
            self.graph.set_input(id, index, Some(restored));
            read = Some(params);
        }
        let read = read.ok_or(CHANGED)?;
        match edit.form {
            Form::Conv | Form::Gemm | Form::MatMul => self.layer(id, read, &edit.correction)?,
            Form::Pair => self.constant_operand(id, read)?,
            Form::Rescaled | Form::Carried | Form::SpatialMean | Form::Skip | Form::Any => {}
        }
        let output = if edit.form == Form::SpatialMean { self.pooled(id, output)? } else { output };
        if edit.rounds {
            let params = self.params(&edit.output)?;
            self.round(output, params);
        }
        Ok(())
    }

    fn params(&self, name: &str) -> Result<Params, &'static str> {
        self.edit.params.get(name).copied().ok_or(CHANGED)
    }

    /// What stands for a value in codes, with what they stand for.
    fn restored(&mut self, value: ValueId) -> Result<(Params, ValueId), &'static str> {
        let params = self.params(&self.graph.value(value).name)?;
        Ok((params, self.restored_by(value, params)))
    }

    fn restored_by(&mut self, value: ValueId, params: Params) -> ValueId {
        if self.restored.contains(&value) {
            return value;
        }
        if let Some(&copy) = self.copies.get(&value) {
            return copy;
        }
        let copy = self.known_copy(value, params).unwrap_or_else(|| self.pair(value, params).1);
        self.copies.insert(value, copy);
        copy
    }

    /// A pair that rounds a value to these codes already.
    fn known_copy(&self, value: ValueId, params: Params) -> Option<ValueId> {
        let reader = |value: ValueId, op: &'static str| {
            let nodes = self.graph.value(value).uses().iter().filter_map(|place| match *place {
                Use::Node(id, 0) if self.graph.node(id).is(op) => Some(id),
                _ => None,
            });
            nodes.collect::<Vec<NodeId>>()
        };
        let number = |id: NodeId, index: usize| self.graph.constant(self.graph.node(id).input(index)?)?.scalar_f64();
        let fits = |id: &NodeId| {
            number(*id, 1) == Some(f64::from(params.scale)) && number(*id, 2) == Some(f64::from(params.zero))
        };
        let rounds = reader(value, "QuantizeLinear").into_iter().find(fits)?;
        let codes = self.graph.node(rounds).output(0)?;
        let restores = reader(codes, "DequantizeLinear").into_iter().find(fits)?;
        self.graph.node(restores).output(0)
    }

    /// The codes of a value, and what stands for it.
    fn pair(&mut self, value: ValueId, params: Params) -> (ValueId, ValueId) {
        let name = self.graph.value(value).name.clone();
        let [scale, zero] = self.parameters(params);
        let round = Node::new("QuantizeLinear");
        let codes = self.graph.append(ScopeId::MAIN, round, &[value, scale, zero], &format!("{name}_codes"));
        let restore = Node::new("DequantizeLinear");
        let restored = self.graph.append(ScopeId::MAIN, restore, &[codes, scale, zero], &format!("{name}_restored"));
        (codes, restored)
    }

    /// A scale and its zero point.
    fn parameters(&mut self, params: Params) -> [ValueId; 2] {
        let keys = [Constant::Scale(params.scale.to_bits()), Constant::Zero(params.zero, params.dtype().code())];
        keys.map(|key| {
            if let Some(&known) = self.constants.get(&key) {
                return known;
            }
            let (name, tensor) = match key {
                Constant::Scale(_) => ("scale", Tensor::from_f32s(&[], &[params.scale])),
                Constant::Zero(..) => ("zero_point", params.zero_point()),
            };
            let value = self.graph.add_initializer(ScopeId::MAIN, name, tensor);
            self.constants.insert(key, value);
            value
        })
    }

    /// Rounds a value for everything that reads it. Where only its size is asked for, the codes have it too.
    fn round(&mut self, value: ValueId, params: Params) {
        let (codes, restored) = self.pair(value, params);
        let rounds = self.graph.producer(codes).expect("codes are made by a node");
        self.graph.replace(value, restored);
        self.graph.set_input(rounds, 0, Some(value));
        let readers: Vec<Use> = self.graph.value(restored).uses().iter().copied().collect();
        for place in readers {
            let Use::Node(id, index) = place else { continue };
            if self.graph.node(id).is("Shape") || self.graph.node(id).is("Size") {
                self.graph.set_input(id, index, Some(codes));
            }
        }
        self.restored.insert(restored);
    }

    /// Stores a layer's weight and bias in codes.
    fn layer(&mut self, id: NodeId, read: Params, correction: &[f32]) -> Result<(), &'static str> {
        let node = self.graph.node(id);
        let (weight, bias) = (node.input(1).ok_or(CHANGED)?, node.input(2));
        let numbers = Numbers::of_layer(self.graph, id, self.edit.recipe).ok_or(CHANGED)?;
        let outputs = numbers.outputs();
        let coded = matches!(self.edit.recipe, Recipe::Cpu | Recipe::Qnn);
        let bias = bias.filter(|_| coded);
        let mut added = bias.map(|bias| self.row(bias, outputs)).transpose()?;
        added.iter_mut().flatten().zip(correction).for_each(|(bias, more)| *bias += more);
        let least = least_scales(added.as_deref(), read, outputs);
        let name = self.graph.value(weight).name.clone();
        let codes = numbers.codes(self.edit.largest, Some(&least), self.fits.get(&name)).ok_or(CHANGED)?;
        let stored = self.stored(&name, &numbers.dims, &codes, numbers.axis);
        self.graph.set_input(id, 1, Some(stored));
        if let Some((bias, added)) = bias.zip(added) {
            let stored = self.stored_bias(bias, &added, read, &codes.scales);
            self.graph.set_input(id, 2, Some(stored));
        }
        for constant in [Some(weight), bias].into_iter().flatten() {
            self.drop_unread(constant);
        }
        Ok(())
    }

    /// A row of numbers, one for every output.
    fn row(&self, value: ValueId, outputs: usize) -> Result<Vec<f32>, &'static str> {
        let tensor = floats(self.graph, Some(value)).filter(|tensor| is_row(tensor, outputs)).ok_or(CHANGED)?;
        tensor.to_f32s().ok_or(CHANGED)
    }

    /// A weight in codes, with one scale for every place of an axis.
    fn stored(&mut self, name: &str, dims: &[usize], codes: &Codes, axis: usize) -> ValueId {
        let bytes: Vec<u8> = codes.codes.iter().map(|&code| code as u8).collect();
        let tensor = Tensor::new(DataType::Int8, dims.to_vec(), bytes).expect("there is a code for every number");
        let tensor = self.graph.add_initializer(ScopeId::MAIN, &format!("{name}_quantized"), tensor);
        let as_one = codes.scales.len() == 1 && dims[axis] != 1;
        let scale_dims = if as_one { Vec::new() } else { vec![codes.scales.len()] };
        let scales = Tensor::from_f32s(&scale_dims, &codes.scales);
        let scales = self.graph.add_initializer(ScopeId::MAIN, &format!("{name}_scale"), scales);
        let node = Node::new("DequantizeLinear");
        let node = if as_one { node } else { node.with("axis", axis as i64) };
        let mut inputs = vec![tensor, scales];
        if dims.len() == 2 && self.edit.recipe == Recipe::Cpu {
            // ONNX Runtime makes no `QGemm` of a weight whose zero points are left out.
            let zeros = Tensor::new(DataType::Int8, vec![codes.scales.len()], vec![0; codes.scales.len()]);
            let zeros = zeros.expect("there is a zero point for every scale");
            inputs.push(self.graph.add_initializer(ScopeId::MAIN, &format!("{name}_zero_point"), zeros));
        }
        self.graph.append(ScopeId::MAIN, node, &inputs, &format!("{name}_dequantized"))
    }

    /// A bias in steps of the products.
    fn stored_bias(&mut self, bias: ValueId, numbers: &[f32], read: Params, weights: &[f32]) -> ValueId {
        let name = self.graph.value(bias).name.clone();
        // A weight with one scale has one for every output.
        let weights: Vec<f32> = (0..numbers.len()).map(|at| weights[at % weights.len()]).collect();
        let (codes, steps) = bias_codes(numbers, read.scale, &weights);
        let bytes: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
        let tensor = Tensor::new(DataType::Int32, vec![codes.len()], bytes).expect("there is a code for every number");
        let tensor = self.graph.add_initializer(ScopeId::MAIN, &format!("{name}_quantized"), tensor);
        let steps = Tensor::from_f32s(&[steps.len()], &steps);
        let steps = self.graph.add_initializer(ScopeId::MAIN, &format!("{name}_scale"), steps);
        let node = Node::new("DequantizeLinear").with("axis", 0i64);
        self.graph.append(ScopeId::MAIN, node, &[tensor, steps], &format!("{name}_dequantized"))
    }

    /// Stores the constant of a sum or product in codes of its own range, as wide as those of the other operand.
    fn constant_operand(&mut self, id: NodeId, other: Params) -> Result<(), &'static str> {
        for index in 0..2 {
            let Some(value) = self.graph.node(id).input(index).filter(|&v| self.graph.constant(v).is_some()) else {
                continue;
            };
            let tensor = floats(self.graph, Some(value)).ok_or(CHANGED)?;
            let (dims, numbers) = (tensor.dims().to_vec(), tensor.to_f32s().ok_or(CHANGED)?);
            let ends = numbers.iter().map(|&x| f64::from(x));
            let range = (ends.clone().fold(0.0, f64::min), ends.fold(0.0, f64::max));
            let params = Params::by(self.edit.recipe, other.width, range);
            let codes = params.codes(&dims, &numbers);
            let name = self.graph.value(value).name.clone();
            let codes = self.graph.add_initializer(ScopeId::MAIN, &format!("{name}_quantized"), codes);
            let [scale, zero] = self.parameters(params);
            let node = Node::new("DequantizeLinear");
            let name = format!("{name}_dequantized");
            let restored = self.graph.append(ScopeId::MAIN, node, &[codes, scale, zero], &name);
            self.graph.set_input(id, index, Some(restored));
            self.drop_unread(value);
        }
        Ok(())
    }

    /// A mean over all spatial axes as a pooling; what it gives now.
    fn pooled(&mut self, id: NodeId, output: ValueId) -> Result<ValueId, &'static str> {
        let (name, kept) = (self.graph.value(output).name.clone(), self.graph.node(id).int("keepdims") != Some(0));
        let data = self.graph.node(id).input(0).ok_or(CHANGED)?;
        let pool = Node::new("GlobalAveragePool");
        let pooled = self.graph.append(ScopeId::MAIN, pool, &[data], &format!("{name}_pooled"));
        let mut whole = pooled;
        if !kept {
            let (_, restored) = self.pair(pooled, self.params(&name)?);
            let node = Node::new("Flatten").with("axis", 1i64);
            whole = self.graph.append(ScopeId::MAIN, node, &[restored], &format!("{name}_flat"));
        }
        self.graph.replace(output, whole);
        self.graph.remove_node(id);
        Ok(whole)
    }

    /// Removes a constant that nothing reads any more.
    fn drop_unread(&mut self, value: ValueId) {
        if self.graph.value(value).uses().is_empty() && self.graph.constant(value).is_some() {
            self.graph.remove_initializer(value);
        }
    }

    /// Removes a normalisation that everything reads divided now.
    fn drop_unread_norm(&mut self, value: Option<ValueId>) {
        let unread = value.filter(|&value| self.graph.value(value).uses().is_empty());
        let Some(id) = unread.and_then(|value| self.graph.producer(value)) else { return };
        let inputs: Vec<ValueId> = self.graph.node(id).inputs().iter().flatten().copied().collect();
        self.graph.remove_node(id);
        inputs.into_iter().for_each(|input| self.drop_unread(input));
    }

    fn products(&mut self, weight: &Weight) -> Result<(), &'static str> {
        let (k, n) = weight.sides();
        let turned = weight.inputs_axis() == 1;
        let mut least = vec![0.0f32; n];
        let (mut uses, mut factors) = (Vec::new(), None);
        for tap in weight.taps.iter().filter(|tap| tap.rows.is_some()) {
            let data = self.graph.node(tap.node).input(0).ok_or(CHANGED)?;
            let name = self.graph.value(data).name.clone();
            let read = self.params(&name)?;
            factors = self.edit.smoothed.get(&name);
            let data = match factors {
                Some(factors) => smoothing::divided(self.graph, data, factors)?,
                None => data,
            };
            let restored = self.restored_by(data, read);
            let bias = bias_of(self.graph, tap, n);
            let added = bias.map(|bias| self.row(bias.value, n)).transpose()?;
            for (least, own) in least.iter_mut().zip(least_scales(added.as_deref(), read, n)) {
                *least = least.max(own);
            }
            uses.push((tap, read, restored, bias.zip(added)));
        }
        let numbers = product_numbers(self.graph, weight, factors.map(Vec::as_slice))?;
        let fitted = self.fits.get(&self.graph.value(weight.value).name);
        let mut codes = numbers.codes(self.edit.largest, Some(&least), fitted).ok_or(CHANGED)?;
        if turned {
            codes.codes = (0..k * n).map(|at| codes.codes[at % n * k + at / n]).collect();
        }
        let name = self.graph.value(weight.value).name.clone();
        let stored = self.stored(&name, &[k, n], &codes, 1);
        for (tap, read, restored, bias) in uses {
            let [data, before] = [0, 1].map(|index| self.graph.node(tap.node).input(index));
            self.graph.set_input(tap.node, 0, Some(restored));
            self.drop_unread_norm(data);
            self.graph.set_input(tap.node, 1, Some(stored));
            self.graph.node_mut(tap.node).remove_attribute("transB");
            if let Some((bias, added)) = bias {
                let value = self.stored_bias(bias.value, &added, read, &codes.scales);
                self.graph.set_input(bias.node, bias.index, Some(value));
                self.drop_unread(bias.value);
            }
            let unread = before.filter(|&value| self.graph.value(value).uses().is_empty());
            if let Some(turn) = unread.and_then(|value| self.graph.producer(value)) {
                self.graph.remove_node(turn);
            }
        }
        self.drop_unread(weight.value);
        Ok(())
    }
}

/// The least scales of a weight's outputs that their biases allow.
fn least_scales(bias: Option<&[f32]>, read: Params, outputs: usize) -> Vec<f32> {
    match bias {
        Some(bias) => bias.iter().map(|&b| least_scale(b, read.scale)).collect(),
        None => vec![0.0; outputs],
    }
}

/// A bias and where it is read.
#[derive(Clone, Copy)]
struct Bias {
    node: NodeId,
    index: usize,
    value: ValueId,
}

/// The constant that is added to a product: by its `Gemm`, or by an `Add` that alone reads the product. ONNX Runtime makes one
/// node of a product and such an `Add`, whose kernel of whole numbers wants a bias in codes too.
fn bias_of(graph: &Graph, tap: &Tap, outputs: usize) -> Option<Bias> {
    let is_bias = |value: &ValueId| floats(graph, Some(*value)).is_some_and(|tensor| is_row(tensor, outputs));
    if graph.node(tap.node).is("Gemm") {
        let value = graph.node(tap.node).input(2).filter(is_bias)?;
        return Some(Bias { node: tap.node, index: 2, value });
    }
    let mut uses = graph.value(tap.output).uses().iter();
    let (Some(&Use::Node(node, at)), None) = (uses.next(), uses.next()) else { return None };
    let index = 1usize.checked_sub(at)?;
    let adds = graph.node(node).is("Add") && graph.node(node).scope() == ScopeId::MAIN;
    let value = graph.node(node).input(index).filter(|_| adds).filter(is_bias)?;
    Some(Bias { node, index, value })
}
