//! The form of a model that is converted: functions inlined, constants in initializers, and the large negative numbers of
//! attention masks made such that two of them add up to no infinity.

use super::{Magnitudes, Precision};
use crate::{Error, PASSES, PassContext};
use lathe_analysis::{Facts, Trait};
use lathe_ir::{AttributeValue, DataType, Graph, Initializer, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::BTreeSet;

/// What a mask adds in the place of a larger number: its exponential is 0 beside scores up to [`MOST_SCORES`], and two of
/// them are finite.
const MASK: f64 = -30000.0;

/// Scores that a mask is added to have to stay below this.
const MOST_SCORES: f64 = 1000.0;

/// A model in the form that is converted.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The model, in float32.
    pub model: Model,
    /// The constants and nodes whose numbers became those of a mask in half precision.
    pub masks: Vec<String>,
    /// The values that masks are added to.
    scores: Vec<ValueId>,
    /// Values that hold numbers of masks.
    masked: BTreeSet<ValueId>,
}

impl Prepared {
    /// Prepares a model. Without `masks` they keep their numbers.
    pub fn new(model: &Model, precision: Precision, masks: bool) -> Result<Prepared, Error> {
        let mut prepared =
            Prepared { model: model.clone(), masks: Vec::new(), scores: Vec::new(), masked: BTreeSet::new() };
        let cx = PassContext::default();
        for pass in PASSES.iter().filter(|pass| ["hoist-constants", "inline-functions"].contains(&pass.info().name)) {
            pass.apply(&mut prepared.model, &cx)?;
        }
        if masks {
            prepared.replace_masks(precision);
        }
        Ok(prepared)
    }

    /// Whether what masks are added to stays so small that they mask it in half precision too.
    pub fn masks_hold(&self, magnitudes: &Magnitudes) -> bool {
        let small = |&value: &ValueId| magnitudes.of(value).is_none_or(|m| m.largest <= MOST_SCORES);
        self.masks.is_empty() || self.scores.iter().all(small)
    }

    /// Whether a value holds numbers of masks, which reach further than others may.
    pub(super) fn is_masked(&self, value: ValueId) -> bool {
        self.masked.contains(&value)
    }

    fn replace_masks(&mut self, precision: Precision) {
        let facts = Facts::infer(&self.model);
        let graph = &self.model.graph;
        let mut found: Vec<(Place, Tensor, Masked)> = Vec::new();
        for value in graph.initializers(ScopeId::MAIN) {
            let Some(tensor) = graph.constant(value).and_then(|tensor| masked(tensor, precision)) else { continue };
            if let Some(masked) = only_masks(graph, &facts, value) {
                found.push((Place::Constant(value), tensor, masked));
            }
        }
        for id in graph.nodes(ScopeId::MAIN) {
            let node = graph.node(id);
            let Some(AttributeValue::Tensor(tensor)) = node.attribute("value").filter(|_| node.is("ConstantOfShape"))
            else {
                continue;
            };
            let Some(tensor) = masked(tensor, precision) else { continue };
            if let Some(masked) = node.output(0).and_then(|value| only_masks(graph, &facts, value)) {
                found.push((Place::Node(id), tensor, masked));
            }
        }
        for (place, tensor, masked) in found {
            self.scores.extend(masked.scores);
            self.masked.extend(masked.values);
            let graph = &mut self.model.graph;
            match place {
                Place::Constant(value) => {
                    self.masks.push(graph.value(value).name.clone());
                    graph.set_initializer(value, Initializer::Dense(tensor));
                }
                Place::Node(id) => {
                    self.masks.push(graph.describe(id));
                    graph.node_mut(id).set_attribute("value", tensor);
                }
            }
        }
    }
}

/// Where a mask's number stands.
enum Place {
    Constant(ValueId),
    Node(NodeId),
}

/// The constant with the number of a mask in the place of those beyond the range, if all of these are negative.
fn masked(tensor: &Tensor, precision: Precision) -> Option<Tensor> {
    if tensor.dtype() != DataType::Float {
        return None;
    }
    let numbers = tensor.to_f64s()?;
    let beyond = |x: f64| x.is_finite() && x.abs() > precision.largest();
    if !numbers.iter().any(|&x| beyond(x)) || numbers.iter().any(|&x| beyond(x) && x > 0.0) {
        return None;
    }
    let replaced: Vec<f64> = numbers.into_iter().map(|x| if beyond(x) { MASK } else { x }).collect();
    Tensor::from_f64s(DataType::Float, tensor.dims(), &replaced)
}

/// What is computed with a mask.
struct Masked {
    /// The values that it is added to.
    scores: BTreeSet<ValueId>,
    /// The values that hold its numbers.
    values: BTreeSet<ValueId>,
}

/// What a value masks; `None` if it is used for anything else, or not at all.
fn only_masks(graph: &Graph, facts: &Facts, value: ValueId) -> Option<Masked> {
    let (mut scores, mut is_mask) = (BTreeSet::new(), false);
    let mut seen = BTreeSet::new();
    let mut stack = vec![value];
    while let Some(value) = stack.pop() {
        if !seen.insert(value) {
            continue;
        }
        for place in graph.value(value).uses() {
            let &Use::Node(id, at) = place else { return None };
            let node = graph.node(id);
            let own = node.outputs().iter().flatten().copied();
            if node.scope() != ScopeId::MAIN || !node.subgraphs().is_empty() {
                return None;
            }
            match node.op_type.as_str() {
                "Softmax" => is_mask = true,
                "Attention" | "MultiHeadAttention" | "GroupQueryAttention" if at > 2 => is_mask = true,
                // What it is compared with lies on one side of both numbers.
                "Equal" | "Less" | "Greater" | "LessOrEqual" | "GreaterOrEqual" => {
                    let other = node.input(1 - at).and_then(|other| graph.constant(other)?.scalar_f64());
                    if other.is_none_or(|x| x < MASK / 2.0) {
                        return None;
                    }
                }
                "Add" | "Sub" if at == 0 || node.op_type == "Add" => {
                    scores.extend(node.input(1 - at).filter(|&other| graph.constant(other).is_none()));
                    stack.extend(own);
                }
                "Where" => {
                    scores.extend(node.input(3 - at).filter(|&other| at > 0 && graph.constant(other).is_none()));
                    stack.extend(own);
                }
                "Mul" | "Min" | "Max" | "Trilu" => stack.extend(own),
                _ if moves(node) && own.clone().all(|v| facts.elem(v) == Some(DataType::Float)) => stack.extend(own),
                _ => return None,
            }
        }
    }
    // A mask added to another mask has no scores of its own.
    let scores = scores.into_iter().filter(|value| !seen.contains(value)).collect();
    is_mask.then_some(Masked { scores, values: seen })
}

fn moves(node: &Node) -> bool {
    const MOVES: &[&str] =
        &["Concat", "Expand", "Gather", "GatherND", "Slice", "Tile", "ScatterND", "ScatterElements", "Pad", "Split"];
    Trait::Layout.of(node) || MOVES.contains(&node.op_type.as_str())
}
