//! Models that tell how large values get: their outputs are the largest magnitudes.

use super::{Magnitude, Magnitudes, magnitudes::divisor};
use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, Node, NodeId, Origin, ScopeId, Tensor, Type, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What stands for the inverse of 0: no output may be infinite.
const MOST: f32 = 3e38;

/// A model that tells magnitudes, and one that gives zeros in their place: the largest difference of the two is the largest
/// magnitude.
#[derive(Debug)]
pub struct Watched {
    /// The model with a number for every value, and nothing else, as outputs.
    pub model: Model,
    /// The same inputs and outputs, all of which are 0.
    pub zeros: Model,
    largest: BTreeMap<String, ValueId>,
    smallest: BTreeMap<String, ValueId>,
}

/// The model that watches every float32 value of the main graph; `None` if there is none.
pub fn watch(model: &Model) -> Option<Watched> {
    let facts = Facts::infer(model);
    let graph = &model.graph;
    let made = graph.nodes(ScopeId::MAIN).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    let given = graph.main().inputs().iter().copied();
    let values: Vec<ValueId> = given.chain(made).filter(|&v| facts.elem(v) == Some(DataType::Float)).collect();
    let divided = graph.nodes(ScopeId::MAIN).filter_map(|id| divisor(graph.node(id)));
    let divisors: BTreeSet<ValueId> =
        divided.filter(|&v| facts.elem(v) == Some(DataType::Float) && graph.constant(v).is_none()).collect();
    if values.is_empty() {
        return None;
    }
    let mut watched = model.clone();
    let outputs = watched.graph.main().outputs().len();
    (0..outputs).rev().for_each(|at| watched.graph.remove_output(ScopeId::MAIN, at));
    let mut append = Append::new(&mut watched);
    let mut largest = BTreeMap::new();
    let mut smallest = BTreeMap::new();
    for &value in &values {
        largest.insert(append.largest(value, false), value);
    }
    for &value in &divisors {
        smallest.insert(append.largest(value, true), value);
    }
    let zeros = zeros(&watched, largest.len() + smallest.len());
    Some(Watched { model: watched, zeros, largest, smallest })
}

impl Watched {
    /// The magnitudes, of the largest difference that each output has from 0.
    pub fn read<'n>(&self, differences: impl IntoIterator<Item = (&'n str, f64)>) -> Magnitudes {
        let found: BTreeMap<&str, f64> = differences.into_iter().collect();
        let smallest: BTreeMap<ValueId, f64> =
            self.smallest.iter().filter_map(|(name, &value)| Some((value, 1.0 / found.get(name.as_str())?))).collect();
        let whole = self.largest.iter().filter_map(|(name, &value)| {
            let largest = *found.get(name.as_str())?;
            Some((value, Magnitude { largest, smallest: smallest.get(&value).copied() }))
        });
        whole.collect()
    }
}

/// Appends nodes that find the largest magnitude of a value.
struct Append<'a> {
    graph: &'a mut Graph,
    opset: i64,
    flat: ValueId,
    zero: ValueId,
    most: ValueId,
    infinity: ValueId,
    axes: Option<ValueId>,
    count: usize,
}

impl<'a> Append<'a> {
    fn new(model: &'a mut Model) -> Append<'a> {
        let opset = model.opset();
        let graph = &mut model.graph;
        let flat = graph.add_initializer(ScopeId::MAIN, "watch_flat", Tensor::int64s(&[-1]));
        let zero = graph.add_initializer(ScopeId::MAIN, "watch_zero", Tensor::from_f32s(&[1], &[0.0]));
        let most = graph.add_initializer(ScopeId::MAIN, "watch_most", Tensor::from_f32s(&[1], &[MOST]));
        let infinite = Tensor::from_f32s(&[1], &[f32::INFINITY]);
        let infinity = graph.add_initializer(ScopeId::MAIN, "watch_infinity", infinite);
        let axes = (opset >= 18).then(|| graph.add_initializer(ScopeId::MAIN, "watch_axes", Tensor::int64s(&[0])));
        Append { graph, opset, flat, zero, most, infinity, axes, count: 0 }
    }

    /// The largest magnitude of a value, or of what 1 is when divided by it, as an output; returns its name.
    fn largest(&mut self, value: ValueId, inverse: bool) -> String {
        let mut node = |op: Node, inputs: &[ValueId]| self.graph.append(ScopeId::MAIN, op, inputs, "watch");
        let mut size = node(Node::new("Abs"), &[value]);
        if inverse {
            size = node(Node::new("Reciprocal"), &[size]);
        } else if self.opset >= 9 {
            // An infinity stays one in half precision, as what is no number does.
            let finite = node(Node::new("Less"), &[size, self.infinity]);
            size = node(Node::new("Where"), &[finite, size, self.zero]);
        }
        let flat = node(Node::new("Reshape"), &[size, self.flat]);
        // Values may be empty.
        let joined = node(Node::new("Concat").with("axis", 0i64), &[flat, self.zero]);
        let reduce = Node::new("ReduceMax").with("keepdims", 1i64);
        let largest = match self.axes {
            Some(axes) => node(reduce, &[joined, axes]),
            None => node(reduce.with("axes", vec![0i64]), &[joined]),
        };
        let bounded = match inverse && self.opset >= 8 {
            true => node(Node::new("Min"), &[largest, self.most]),
            false => largest,
        };
        let name = self.graph.fresh_name(&format!("watched_{}", self.count));
        self.count += 1;
        self.graph.rename(bounded, name.clone());
        self.graph.value_mut(bounded).ty = Some(Type::tensor(DataType::Float, vec![lathe_ir::Dim::Known(1)]));
        self.graph.add_output(ScopeId::MAIN, bounded);
        name
    }
}

/// A model with the inputs and outputs of another, whose outputs are 0.
fn zeros(watched: &Model, outputs: usize) -> Model {
    let mut zeros = watched.clone();
    debug_assert_eq!(zeros.graph.main().outputs().len(), outputs);
    let names: Vec<String> =
        watched.graph.main().outputs().iter().map(|&v| watched.graph.value(v).name.clone()).collect();
    (0..outputs).rev().for_each(|at| zeros.graph.remove_output(ScopeId::MAIN, at));
    let nodes: Vec<NodeId> = zeros.graph.nodes(ScopeId::MAIN).collect();
    zeros.graph.remove_unused(nodes.into_iter().rev().collect());
    drop_unread(&mut zeros.graph);
    let zero = zeros.graph.add_initializer(ScopeId::MAIN, "zero", Tensor::from_f32s(&[1], &[0.0]));
    for name in names {
        let value = zeros.graph.append(ScopeId::MAIN, Node::new("Identity"), &[zero], &name);
        zeros.graph.rename(value, name);
        zeros.graph.value_mut(value).ty = Some(Type::tensor(DataType::Float, vec![lathe_ir::Dim::Known(1)]));
        zeros.graph.add_output(ScopeId::MAIN, value);
    }
    zeros
}

fn drop_unread(graph: &mut Graph) {
    let unread: Vec<ValueId> =
        graph.initializers(ScopeId::MAIN).filter(|&v| graph.value(v).uses().is_empty()).collect();
    for value in unread {
        if matches!(graph.value(value).origin(), Origin::Initializer(_)) {
            graph.remove_initializer(value);
        }
    }
}
