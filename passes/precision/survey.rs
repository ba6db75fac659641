//! What is known of a model that is to be converted, and which of its nodes stay in float32.

use super::{
    Magnitude, Magnitudes, Precision, Prepared,
    ports::{Ports, ports, touches_float},
};
use lathe_analysis::{Bindings, Facts, Trait};
use lathe_ir::{DataType, Graph, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// A node that stays in float32.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The node, as [`Graph::describe`] names it.
    pub node: String,
    /// Why.
    pub reason: String,
}

/// The model and what rules have said about its nodes so far.
pub(super) struct Survey<'a> {
    prepared: &'a Prepared,
    pub model: &'a Model,
    pub graph: &'a Graph,
    pub facts: Facts,
    pub precision: Precision,
    magnitudes: &'a Magnitudes,
    bindings: Bindings,
    /// The nodes of the main graph that may compute in half precision, with what changes at each.
    candidates: BTreeMap<NodeId, Ports>,
    /// Why nodes stay, of those that read or give float32.
    reasons: BTreeMap<NodeId, String>,
}

impl<'a> Survey<'a> {
    pub fn new(prepared: &'a Prepared, precision: Precision, magnitudes: &'a Magnitudes) -> Survey<'a> {
        let model = &prepared.model;
        let graph = &model.graph;
        let facts = Facts::infer(model);
        let bindings = Bindings::default().for_inputs(graph, &facts);
        let (mut candidates, mut reasons) = (BTreeMap::new(), BTreeMap::new());
        for id in graph.nodes(ScopeId::MAIN).filter(|&id| touches_float(graph, &facts, graph.node(id))) {
            match ports(model, &facts, id, precision) {
                Ok(ports) => _ = candidates.insert(id, ports),
                Err(reason) => _ = reasons.insert(id, reason),
            }
        }
        Survey { prepared, model, graph, facts, precision, magnitudes, bindings, candidates, reasons }
    }

    /// Lets a node stay in float32; the first reason counts.
    pub fn keep(&mut self, id: NodeId, reason: impl Into<String>) {
        if self.candidates.remove(&id).is_some() {
            self.reasons.insert(id, reason.into());
        }
    }

    /// Nodes that may still compute in half precision, in order of their numbers.
    pub fn candidates(&self) -> Vec<NodeId> {
        self.candidates.keys().copied().collect()
    }

    pub fn ports(&self, id: NodeId) -> Option<&Ports> {
        self.candidates.get(&id)
    }

    /// The nodes that stay, in the graph's order, with the reasons.
    pub fn kept(&self) -> Vec<Kept> {
        let order = self.graph.nodes(ScopeId::MAIN);
        let of = |id: NodeId| Some(Kept { node: self.graph.describe(id), reason: self.reasons.get(&id)?.clone() });
        order.filter_map(of).collect()
    }

    pub fn is_float(&self, value: ValueId) -> bool {
        self.facts.elem(value) == Some(DataType::Float)
    }

    pub fn constant(&self, value: ValueId) -> Option<&'a Tensor> {
        self.graph.constant(value)
    }

    pub fn name(&self, value: ValueId) -> &'a str {
        &self.graph.value(value).name
    }

    /// The node of the main graph that makes a value.
    pub fn producer(&self, value: ValueId) -> Option<(NodeId, &'a Node)> {
        let id = self.graph.producer(value)?;
        Some((id, self.graph.node(id)))
    }

    /// The nodes of the main graph that read a value, by themselves or in their subgraphs, with the input of those that do
    /// it themselves.
    pub fn readers(&self, value: ValueId) -> Vec<(NodeId, Option<usize>)> {
        let mut readers = BTreeSet::new();
        for place in self.graph.value(value).uses() {
            let (own, mut scope) = match *place {
                Use::Node(id, index) => (Some((id, index)), self.graph.node(id).scope()),
                Use::Output(scope, _) => (None, scope),
                Use::Annotation(_) => continue,
            };
            if let (Some((id, index)), ScopeId::MAIN) = (own, scope) {
                readers.insert((id, Some(index)));
            }
            while let Some(owner) = self.graph.scope(scope).owner() {
                scope = self.graph.node(owner).scope();
                if scope == ScopeId::MAIN {
                    readers.insert((owner, None));
                }
            }
        }
        readers.into_iter().collect()
    }

    /// The float32 inputs of a node that are no constants.
    pub fn float_inputs(&self, id: NodeId) -> Vec<ValueId> {
        let inputs = self.graph.node(id).inputs().iter().flatten().copied();
        inputs.filter(|&value| self.is_float(value) && self.constant(value).is_none()).collect()
    }

    /// The largest magnitude that a value may have.
    pub fn limit(&self, value: ValueId) -> f64 {
        match self.prepared.is_masked(value) {
            true => self.precision.largest(),
            false => self.precision.limit(),
        }
    }

    /// How large a value gets, where that was measured.
    pub fn magnitude(&self, value: ValueId) -> Option<Magnitude> {
        self.magnitudes.of(value)
    }

    /// The elements of a value at usual sizes; of one that is not known as many as an activation may have.
    pub fn elements(&self, value: ValueId) -> u64 {
        const UNKNOWN: u64 = 1 << 12;
        let Some(shape) = self.facts.shape(value) else { return UNKNOWN };
        let sizes = shape.iter().map(|dim| self.bindings.evaluate(dim).unwrap_or(1));
        sizes.fold(1u64, u64::saturating_mul).min(1 << 40)
    }

    /// The elements on these axes, where they are the same in every run.
    pub fn fixed_elements(&self, value: ValueId, axes: Option<&[i64]>) -> Option<u64> {
        let shape = self.facts.shape(value)?;
        let ndim = shape.len() as i64;
        let all: Vec<i64> = (0..ndim).collect();
        let axes = axes.unwrap_or(&all);
        axes.iter().try_fold(1u64, |product, &axis| {
            let axis = if axis < 0 { axis + ndim } else { axis };
            let size = shape.get(usize::try_from(axis).ok()?)?.as_known()?;
            product.checked_mul(u64::try_from(size).ok()?)
        })
    }

    /// Keeps the nodes that a value is computed by, as far as each hands on or changes single elements; and those before
    /// them, if that is asked for.
    pub fn keep_upstream(&mut self, value: ValueId, and_sources: bool, reason: &str) {
        let mut seen = BTreeSet::new();
        let mut stack = vec![value];
        while let Some(value) = stack.pop() {
            let Some((id, node)) = self.producer(value) else { continue };
            if node.scope() != ScopeId::MAIN || !self.is_float(value) || !seen.insert(id) {
                continue;
            }
            if carries(node) {
                stack.extend(self.float_inputs(id));
            } else if !and_sources {
                continue;
            }
            self.keep(id, reason);
        }
    }
}

/// Whether a node hands elements on or computes each from the elements at its place.
pub(super) fn carries(node: &Node) -> bool {
    let moves = [Trait::Elementwise, Trait::Layout, Trait::Free].iter().any(|wanted| wanted.of(node));
    moves && !Trait::Random.of(node) && !Trait::Composite.of(node)
}
