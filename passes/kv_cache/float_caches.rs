//! The result with float caches around it, to be run beside the original.

use super::{Quantized, find::PAST, quantize::Before, scales::codes};
use lathe_ir::{DataType, Model, Node, ScopeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// The model with quantized caches, which are quantized on the way in and dequantized on the way out: it has the inputs and
/// outputs of the original. The attention between is that of the result.
pub fn with_float_caches(quantized: &Quantized) -> Model {
    let before: BTreeMap<ValueId, &Before> = quantized.before.iter().map(|b| (b.value, b)).collect();
    let mut around = Around { model: quantized.model.clone(), quantized };
    for cache in &quantized.caches.nodes {
        for (part, at) in PAST.into_iter().enumerate() {
            let (past, present) = (before[&cache.past[part]], before[&cache.present[part]]);
            around.model.graph.value_mut(past.value).ty = past.ty.clone();
            let codes = around.coded(past, cache.size);
            around.model.graph.set_input(cache.node, at, Some(codes));
            around.restored(present, cache.size);
        }
    }
    let mut model = around.model;
    model.graph.sort().expect("nodes before inputs and behind outputs make no cycle");
    model
}

struct Around<'a> {
    model: Model,
    quantized: &'a Quantized,
}

impl Around<'_> {
    fn node(&mut self, node: Node, inputs: &[ValueId]) -> ValueId {
        self.model.graph.append(ScopeId::MAIN, node, inputs, "around")
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.model.graph.add_initializer(ScopeId::MAIN, "around", tensor)
    }

    fn number(&mut self, number: f32) -> ValueId {
        self.constant(Tensor::from_f32s(&[], &[number]))
    }

    fn reshaped(&mut self, value: ValueId, to: &[i64]) -> ValueId {
        let to = self.constant(Tensor::int64s(to));
        self.node(Node::new("Reshape"), &[value, to])
    }

    /// The codes of a past, two to a byte where they have 4 bits: the first in the low half, both 8 above what they stand for.
    fn coded(&mut self, past: &Before, size: usize) -> ValueId {
        let wanted = self.quantized.wanted;
        let codes = codes(&mut self.model, past.value, past.scale, wanted);
        let bytes = match wanted.bits {
            8 => codes,
            _ => {
                let eight = self.number(8.0);
                let above = self.node(Node::new("Add"), &[codes, eight]);
                let pairs = self.reshaped(above, &[0, 0, 0, size as i64 / 2, 2]);
                let axis = self.constant(Tensor::int64s(&[4]));
                let worth = self.constant(Tensor::from_f32s(&[2], &[1.0, 16.0]));
                let worth = self.node(Node::new("Mul"), &[pairs, worth]);
                self.node(Node::new("ReduceSum").with("keepdims", 0), &[worth, axis])
            }
        };
        self.node(Node::new("Cast").with("to", wanted.elem()), &[bytes])
    }

    /// Gives an output of the model the numbers that its codes stand for; it keeps its name.
    fn restored(&mut self, present: &Before, size: usize) {
        let wanted = self.quantized.wanted;
        let bytes = self.node(Node::new("Cast").with("to", DataType::Float), &[present.value]);
        let codes = match wanted.bits {
            8 => bytes,
            _ => {
                let (sixteen, eight) = (self.number(16.0), self.number(8.0));
                let high = self.node(Node::new("Div"), &[bytes, sixteen]);
                let high = self.node(Node::new("Floor"), &[high]);
                let taken = self.node(Node::new("Mul"), &[high, sixteen]);
                let low = self.node(Node::new("Sub"), &[bytes, taken]);
                let (low, high) = (
                    self.reshaped(low, &[0, 0, 0, size as i64 / 2, 1]),
                    self.reshaped(high, &[0, 0, 0, size as i64 / 2, 1]),
                );
                let pairs = self.node(Node::new("Concat").with("axis", 4), &[low, high]);
                let above = self.reshaped(pairs, &[0, 0, 0, size as i64]);
                self.node(Node::new("Sub"), &[above, eight])
            }
        };
        let numbers = self.node(Node::new("Mul"), &[codes, present.scale]);
        let graph = &mut self.model.graph;
        let name = graph.value(present.value).name.clone();
        let spare = graph.fresh_name(&name);
        graph.rename(present.value, spare);
        graph.rename(numbers, name);
        graph.value_mut(numbers).ty = present.ty.clone();
        let at = graph.main().outputs().iter().position(|&v| v == present.value).expect("a cache is returned");
        graph.set_output(ScopeId::MAIN, at, numbers);
    }
}
