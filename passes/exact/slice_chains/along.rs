//! Which nodes treat everything along one axis by itself.

use lathe_analysis::{Facts, Trait, kept_axis};
use lathe_ir::{Graph, Node, Tensor, ValueId};
use std::collections::BTreeMap;

/// Operators that work on one sample of the batch at a time.
const PER_SAMPLE: &[&str] = &[
    "AveragePool",
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "DepthToSpace",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNormalization",
    "InstanceNormalization",
    "MaxPool",
    "SpaceToDepth",
];

/// Values that lie along one axis that is cut, and the axis of each.
pub(super) struct Along<'a> {
    pub graph: &'a Graph,
    pub facts: &'a Facts,
    pub opset: i64,
    pub axes: BTreeMap<ValueId, usize>,
}

impl Along<'_> {
    /// The axis that is cut, of every output of a node that reads some of these values; `None` if the node may mix what
    /// lies along it. Values that are not among them enter whole, into every piece.
    pub fn step(&self, node: &Node) -> Option<usize> {
        let op = node.op_type.as_str();
        let contrib = node.domain == "com.microsoft";
        if !node.is_standard() && !contrib {
            return None;
        }
        if Trait::Elementwise.of(node) && !Trait::Random.of(node) {
            return self.aligned(node);
        }
        if Trait::Trailing.of(node) {
            let axis = self.aligned(node)?;
            let from = self.axis(node, "axis", -1)?;
            return (axis < from && has_one_output(node)).then_some(axis);
        }
        if contrib && matches!(op, "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization") {
            let axis = self.aligned(node)?;
            let rows = axis + 1 < self.facts.ndim(node.input(0)?)?;
            return (rows && node.output(1).is_none() && node.output(2).is_none()).then_some(axis);
        }
        if contrib {
            return None;
        }
        match op {
            "MatMul" => self.product(node),
            "Gemm" => {
                // The rows of the first factor, and of the sum where it has any.
                let rows = self.axes.get(&node.input(0)?) == Some(&0) && node.int("transA").unwrap_or(0) == 0;
                let apart = node.input(1).is_some_and(|v| !self.axes.contains_key(&v));
                let sum = node.input(2).is_none_or(|v| match self.axes.get(&v) {
                    Some(&own) => own == 0 && self.facts.ndim(v) == Some(2),
                    None => self.is_one(v, 0, 2),
                });
                (rows && apart && sum).then_some(0)
            }
            "Softmax" | "LogSoftmax" => {
                let own = *self.axes.get(&node.input(0)?)?;
                let axis = self.axis(node, "axis", if self.opset >= 13 { -1 } else { 1 })?;
                // Before version 13 it runs over all axes from `axis` on.
                let apart = if self.opset >= 13 { own != axis } else { own < axis };
                apart.then_some(own)
            }
            "Transpose" => {
                let own = self.alone(node)?;
                match node.ints("perm") {
                    Some(perm) => perm.iter().position(|&from| usize::try_from(from) == Ok(own)),
                    None => (self.facts.ndim(node.input(0)?)? - 1).checked_sub(own),
                }
            }
            "Reshape" | "Flatten" | "Unsqueeze" => self.regrouped(node),
            // Without axes, a piece of size 1 would lose its axis.
            "Squeeze" if node.attribute("axes").is_some() || node.input(1).is_some() => self.regrouped(node),
            "Split" => {
                let own = self.alone(node)?;
                (self.axis(node, "axis", 0)? != own).then_some(own)
            }
            "Concat" => {
                let own = *self.axes.get(&node.input(0)?)?;
                let alike = node.inputs().iter().flatten().all(|v| self.axes.get(v) == Some(&own));
                (alike && self.axis(node, "axis", 0)? != own).then_some(own)
            }
            _ if op.starts_with("Reduce") => self.reduced(node),
            _ if PER_SAMPLE.contains(&op) => {
                let inference = node.int("training_mode").unwrap_or(0) == 0 && has_one_output(node);
                self.alone(node).filter(|&own| own == 0 && inference)
            }
            _ => None,
        }
    }

    /// The axis of what broadcasting makes: every value along it must have it in the same place, and no other there.
    fn aligned(&self, node: &Node) -> Option<usize> {
        let inputs: Vec<ValueId> = node.inputs().iter().flatten().copied().collect();
        let ndims: Vec<usize> = inputs.iter().map(|&v| self.facts.ndim(v)).collect::<Option<_>>()?;
        let ndim = *ndims.iter().max()?;
        let place = |(v, n): (&ValueId, &usize)| self.axes.get(v).map(|own| own + ndim - n);
        let mut places = inputs.iter().zip(&ndims).filter_map(place);
        let axis = places.next()?;
        let mut others = inputs.iter().filter(|&v| !self.axes.contains_key(v));
        (places.all(|at| at == axis) && others.all(|&v| self.is_one(v, axis, ndim))).then_some(axis)
    }

    /// Whether a value that is broadcast to `ndim` axes has one element along `axis`.
    fn is_one(&self, value: ValueId, axis: usize, ndim: usize) -> bool {
        self.facts.shape(value).is_some_and(|shape| match (axis + shape.len()).checked_sub(ndim) {
            Some(own) => shape[own].as_known() == Some(1),
            None => true,
        })
    }

    /// An attribute that names an axis of the first input, from the front.
    fn axis(&self, node: &Node, name: &str, default: i64) -> Option<usize> {
        let ndim = self.facts.ndim(node.input(0)?)?;
        from_front(node.int(name).unwrap_or(default), ndim)
    }

    /// The axis of the first input, if no other one is along it.
    fn alone(&self, node: &Node) -> Option<usize> {
        let apart = node.inputs().iter().skip(1).flatten().all(|v| !self.axes.contains_key(v));
        self.axes.get(&node.input(0)?).copied().filter(|_| apart)
    }

    fn product(&self, node: &Node) -> Option<usize> {
        let (left, right) = (node.input(0)?, node.input(1)?);
        let (a, b) = (self.facts.ndim(left)?, self.facts.ndim(right)?);
        let ndim = a.max(b);
        if a.min(b) < 2 {
            return None;
        }
        let place = |value: ValueId, own: usize| self.axes.get(&value).map(|axis| axis + ndim - own);
        match (place(left, a), place(right, b)) {
            (Some(x), Some(y)) if x == y && x + 2 < ndim => Some(x),
            // Rows of the left or columns of the right factor, or one product of several in the batch.
            (Some(x), None) if x + 2 == ndim => Some(x),
            (None, Some(y)) if y + 1 == ndim => Some(y),
            (Some(x), None) if x + 2 < ndim && self.is_one(right, x, ndim) => Some(x),
            (None, Some(y)) if y + 2 < ndim && self.is_one(left, y, ndim) => Some(y),
            _ => None,
        }
    }

    /// The axis after the sizes are grouped otherwise. The target of a `Reshape` is written anew for the pieces.
    fn regrouped(&self, node: &Node) -> Option<usize> {
        let own = self.alone(node)?;
        kept_axis(self.facts.shape(node.input(0)?)?, self.facts.shape(node.output(0)?)?, own)
    }

    fn reduced(&self, node: &Node) -> Option<usize> {
        let own = self.alone(node)?;
        let ndim = self.facts.ndim(node.input(0)?)?;
        let stated = node.ints("axes").map(<[i64]>::to_vec);
        let axes = stated.or_else(|| self.graph.constant(node.input(1)?).and_then(Tensor::to_i64s))?;
        let axes: Vec<usize> = axes.into_iter().map(|axis| from_front(axis, ndim)).collect::<Option<_>>()?;
        if axes.is_empty() || axes.contains(&own) {
            return None;
        }
        let before =
            if node.int("keepdims").unwrap_or(1) == 0 { axes.iter().filter(|&&axis| axis < own).count() } else { 0 };
        own.checked_sub(before)
    }
}

/// Whether nothing but the first output is asked for: others hold statistics, or positions in the whole tensor.
fn has_one_output(node: &Node) -> bool {
    node.outputs().iter().skip(1).all(Option::is_none)
}

/// An axis counted from the front.
fn from_front(axis: i64, ndim: usize) -> Option<usize> {
    let axis = if axis < 0 { axis + ndim as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&at| at < ndim)
}
