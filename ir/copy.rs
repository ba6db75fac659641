//! Copying what a scope computes to another place, in the same graph or another one.

use crate::{
    Attribute, AttributeValue, Dim, Graph, Initializer, Node, NodeId, Origin, Scope, ScopeId, Shape, Type, TypeKind,
    Value, ValueId,
};
use std::collections::BTreeMap;

/// What a scope holds, apart from the graph it came from: nodes, constants and nested scopes.
#[derive(Debug, Clone)]
pub struct Fragment {
    scope: Scope,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    values: BTreeMap<ValueId, Value>,
    constants: Vec<ValueId>,
    nodes: Vec<Node>,
    subgraphs: BTreeMap<ScopeId, Fragment>,
}

/// What [`Graph::paste`] made.
#[derive(Debug, Clone, Default)]
pub struct Pasted {
    /// What takes the place of the outputs of the copied scope; `None` for an input that was left out.
    pub outputs: Vec<Option<ValueId>>,
    /// The new values of the target scope, each with the name of the one it is a copy of.
    pub values: Vec<(ValueId, String)>,
    /// The new nodes, those of nested scopes included.
    pub nodes: Vec<NodeId>,
}

impl Fragment {
    /// How many nodes it holds, those of nested scopes included.
    pub fn node_count(&self) -> usize {
        self.subgraphs.values().fold(self.nodes.len(), |sum, inner| sum.saturating_add(inner.node_count()))
    }

    /// Every node, those of nested scopes included.
    pub fn all_nodes(&self) -> Vec<&Node> {
        let inner = self.subgraphs.values().flat_map(Fragment::all_nodes);
        self.nodes.iter().chain(inner).collect()
    }

    /// Whether a nested scope returns one of these values itself.
    pub fn returns_inside(&self, values: &[ValueId]) -> bool {
        let mut inner = self.subgraphs.values();
        inner.any(|s| s.outputs.iter().any(|v| values.contains(v)) || s.returns_inside(values))
    }

    /// The inputs of the scope, in the ids of the graph it came from.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The outputs of the scope, in the ids of the graph it came from.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// Puts `attributes` in the place of references to them. An attribute that refers to none of them goes away.
    pub fn bind(&mut self, attributes: &[Attribute]) {
        for node in &mut self.nodes {
            node.attributes.retain_mut(|attribute| {
                let AttributeValue::Reference { name, .. } = &attribute.value else { return true };
                let Some(found) = attributes.iter().find(|a| a.name == *name) else { return false };
                attribute.value = found.value.clone();
                true
            });
        }
        for inner in self.subgraphs.values_mut() {
            inner.bind(attributes);
        }
    }
}

impl Graph {
    /// A copy of everything in a scope.
    pub fn fragment(&self, scope: ScopeId) -> Fragment {
        let here = self.scope(scope);
        let nodes: Vec<Node> = self.nodes(scope).map(|id| self.node(id).clone()).collect();
        let constants: Vec<ValueId> = self.initializers(scope).collect();
        let made = nodes.iter().flat_map(|node| node.outputs().iter().flatten().copied());
        let named = here.inputs().iter().copied().chain(constants.iter().copied()).chain(made);
        let values = named.map(|id| (id, self.value(id).clone())).collect();
        let inner = nodes.iter().flat_map(Node::subgraphs).map(|id| (id, self.fragment(id))).collect();
        let mut description = Scope::default();
        description.name = here.name.clone();
        description.doc = here.doc.clone();
        description.metadata = here.metadata.clone();
        Fragment {
            scope: description,
            inputs: here.inputs().to_vec(),
            outputs: here.outputs().to_vec(),
            values,
            constants,
            nodes,
            subgraphs: inner,
        }
    }

    /// Adds the constants of a fragment (not those of nested scopes) to `scope`. Returns what each one became, for
    /// the `known` of [`Graph::paste`], so that several copies share them.
    pub fn paste_constants(&mut self, fragment: &Fragment, scope: ScopeId, prefix: &str) -> BTreeMap<ValueId, ValueId> {
        let mut known = BTreeMap::new();
        for &old in &fragment.constants {
            let new = self.copy_value(&fragment.values[&old], prefix);
            self.make_initializer(scope, new, initializer(&fragment.values[&old]));
            known.insert(old, new);
        }
        known
    }

    /// Adds a copy of a fragment to `scope`, with `arguments` in the place of its inputs.
    ///
    /// `known` says what other values became; a value it does not name stays the same, which is right for what a
    /// subgraph of this graph captures. Names begin with `prefix` and are made fresh.
    pub fn paste(
        &mut self,
        fragment: &Fragment,
        scope: ScopeId,
        arguments: &[Option<ValueId>],
        known: &BTreeMap<ValueId, ValueId>,
        prefix: &str,
    ) -> Pasted {
        let mut map: BTreeMap<ValueId, Option<ValueId>> = known.iter().map(|(&old, &new)| (old, Some(new))).collect();
        for (index, &input) in fragment.inputs.iter().enumerate() {
            map.insert(input, arguments.get(index).copied().flatten());
        }
        let first = self.node_bound();
        let values = self.paste_content(fragment, scope, &mut map, prefix);
        let outputs = fragment.outputs.iter().map(|&v| mapped(&map, v)).collect();
        let nodes = (first..self.node_bound()).map(NodeId::from_index).collect();
        Pasted { outputs, values, nodes }
    }

    fn paste_content(
        &mut self,
        fragment: &Fragment,
        scope: ScopeId,
        map: &mut BTreeMap<ValueId, Option<ValueId>>,
        prefix: &str,
    ) -> Vec<(ValueId, String)> {
        let mut made = Vec::new();
        for old in &fragment.constants {
            if map.contains_key(old) {
                continue;
            }
            let value = &fragment.values[old];
            let new = self.copy_value(value, prefix);
            self.make_initializer(scope, new, initializer(value));
            map.insert(*old, Some(new));
            made.push((new, value.name.clone()));
        }
        // Nodes may stand in any order, so every output exists before the first node reads one.
        for node in &fragment.nodes {
            for old in node.outputs().iter().flatten() {
                let value = &fragment.values[old];
                let new = self.copy_value(value, prefix);
                map.insert(*old, Some(new));
                made.push((new, value.name.clone()));
            }
        }
        for node in &fragment.nodes {
            let mut copy = node.clone();
            if !copy.name.is_empty() {
                copy.name = format!("{prefix}{}", copy.name);
            }
            for attribute in &mut copy.attributes {
                match &mut attribute.value {
                    AttributeValue::Graph(inner) => *inner = self.paste_scope(&fragment.subgraphs[inner], map, prefix),
                    AttributeValue::Graphs(several) => {
                        for inner in several {
                            *inner = self.paste_scope(&fragment.subgraphs[inner], map, prefix);
                        }
                    }
                    _ => {}
                }
            }
            let mut inputs: Vec<Option<ValueId>> =
                node.inputs().iter().map(|v| v.and_then(|v| mapped(map, v))).collect();
            while inputs.last() == Some(&None) {
                inputs.pop();
            }
            let outputs = node.outputs().iter().map(|v| v.and_then(|v| mapped(map, v))).collect();
            self.add_node(scope, copy, inputs, outputs);
        }
        for (old, value) in &fragment.values {
            let Some(new) = mapped(map, *old).filter(|_| !value.quantization().is_empty()) else { continue };
            if fragment.inputs.contains(old) {
                continue;
            }
            let parameters = value.quantization().iter();
            let parameters = parameters.filter_map(|(kind, v)| Some((kind.clone(), mapped(map, *v)?))).collect();
            self.set_quantization(new, parameters);
        }
        made
    }

    fn paste_scope(
        &mut self,
        fragment: &Fragment,
        map: &mut BTreeMap<ValueId, Option<ValueId>>,
        prefix: &str,
    ) -> ScopeId {
        let scope = self.add_scope(fragment.scope.name.clone());
        self.scope_mut(scope).doc = fragment.scope.doc.clone();
        self.scope_mut(scope).metadata = fragment.scope.metadata.clone();
        for &old in &fragment.inputs {
            let value = &fragment.values[&old];
            let new = self.copy_value(value, prefix);
            self.add_input(scope, new);
            if let Some(default) = value.initializer() {
                self.set_default(new, Some(default.clone()));
            }
            map.insert(old, Some(new));
        }
        self.paste_content(fragment, scope, map, prefix);
        for &old in &fragment.outputs {
            if let Some(new) = mapped(map, old) {
                self.add_output(scope, new);
            }
        }
        scope
    }

    fn copy_value(&mut self, value: &Value, prefix: &str) -> ValueId {
        let name = self.fresh_name(&format!("{prefix}{}", value.name));
        let new = self.add_value(name, value.ty.as_ref().map(nameless));
        let copy = self.value_mut(new);
        copy.doc = value.doc.clone();
        copy.metadata = value.metadata.clone();
        new
    }
}

fn mapped(map: &BTreeMap<ValueId, Option<ValueId>>, value: ValueId) -> Option<ValueId> {
    map.get(&value).copied().unwrap_or(Some(value))
}

fn initializer(value: &Value) -> Initializer {
    debug_assert!(matches!(value.origin(), Origin::Initializer(_)), "the value is no initializer");
    value.initializer().cloned().expect("an initializer holds a tensor")
}

/// The type without the names of its sizes: in another place, or another iteration, they may be other sizes.
fn nameless(ty: &Type) -> Type {
    let plain = |shape: &Option<Shape>| {
        shape.as_ref().map(|shape| {
            let dims = shape.dims.iter().map(|d| if d.known().is_some() { d.clone() } else { Dim::Unknown });
            Shape { dims: dims.collect(), denotations: shape.denotations.clone() }
        })
    };
    let kind = match &ty.kind {
        TypeKind::Tensor { elem, shape } => TypeKind::Tensor { elem: *elem, shape: plain(shape) },
        TypeKind::SparseTensor { elem, shape } => TypeKind::SparseTensor { elem: *elem, shape: plain(shape) },
        TypeKind::Sequence(inner) => TypeKind::Sequence(Box::new(nameless(inner))),
        TypeKind::Optional(inner) => TypeKind::Optional(Box::new(nameless(inner))),
        TypeKind::Map { key, value } => TypeKind::Map { key: *key, value: Box::new(nameless(value)) },
        other => other.clone(),
    };
    Type { kind, denotation: ty.denotation.clone() }
}
