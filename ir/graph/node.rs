//! Nodes: an operator applied to values, and where it runs.

use super::{Attribute, AttributeValue, ScopeId, ValueId};
use crate::Metadata;

/// What a sharding specification of a node speaks about.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The variants say it.
pub enum Port {
    Input(usize),
    Output(usize),
    /// Neither an input nor an output of the node.
    Named(String),
}

/// How one axis is split over devices.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardedDim {
    /// The axis.
    pub axis: i64,
    /// Size of each part (known or named) and the number of shards.
    pub shards: Vec<(crate::Dim, Option<i64>)>,
}

/// How one input or output of a node is split over devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Sharding {
    /// Which one.
    pub port: Port,
    /// The devices.
    pub devices: Vec<i64>,
    /// Groups of devices by index.
    pub groups: Vec<(i64, Vec<i64>)>,
    /// The split axes.
    pub dims: Vec<ShardedDim>,
}

/// Where a node runs under one of the model's device configurations.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// The configuration's name.
    pub configuration: String,
    /// How the tensors are split.
    pub sharding: Vec<Sharding>,
    /// The pipeline stage.
    pub stage: Option<i32>,
}

/// One node: an operator applied to values.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// The operator: `MatMul`.
    pub op_type: String,
    /// Its domain as written; `""` and `ai.onnx` are both the standard one.
    pub domain: String,
    /// Which overload of a local function is called; usually empty.
    pub overload: String,
    /// The node's name; may be empty.
    pub name: String,
    /// Documentation kept for the file.
    pub doc: String,
    /// Attributes; at most one of each name.
    pub attributes: Vec<Attribute>,
    /// Metadata kept for the file.
    pub metadata: Metadata,
    /// Multi-device placements kept for the file.
    pub placements: Vec<Placement>,
    pub(super) inputs: Vec<Option<ValueId>>,
    pub(super) outputs: Vec<Option<ValueId>>,
    pub(super) scope: Option<ScopeId>,
}

impl Node {
    /// A node of the standard domain that is not yet in a graph.
    pub fn new(op_type: impl Into<String>) -> Node {
        Node { op_type: op_type.into(), ..Node::default() }
    }

    /// The same node in another domain.
    pub fn in_domain(mut self, domain: impl Into<String>) -> Node {
        self.domain = domain.into();
        self
    }

    /// The same node with one more attribute.
    pub fn with(mut self, name: &str, value: impl Into<AttributeValue>) -> Node {
        self.attributes.push(Attribute::new(name, value));
        self
    }

    /// Its inputs; `None` where an optional one is left out.
    pub fn inputs(&self) -> &[Option<ValueId>] {
        &self.inputs
    }

    /// Its outputs; `None` where one is not asked for.
    pub fn outputs(&self) -> &[Option<ValueId>] {
        &self.outputs
    }

    /// Input `index`, if it is there.
    pub fn input(&self, index: usize) -> Option<ValueId> {
        self.inputs.get(index).copied().flatten()
    }

    /// Output `index`, if it is asked for.
    pub fn output(&self, index: usize) -> Option<ValueId> {
        self.outputs.get(index).copied().flatten()
    }

    /// The scope it stands in.
    pub fn scope(&self) -> ScopeId {
        self.scope.expect("a node gets its scope when it is added to a graph")
    }

    /// Whether the operator belongs to the standard domain.
    pub fn is_standard(&self) -> bool {
        self.domain.is_empty() || self.domain == "ai.onnx"
    }

    /// The operator with its domain, if that is not the standard one: `Add`, `com.microsoft.Gelu`.
    pub fn operator(&self) -> String {
        if self.is_standard() { self.op_type.clone() } else { format!("{}.{}", self.domain, self.op_type) }
    }

    /// Whether this is the standard operator `op_type`.
    pub fn is(&self, op_type: &str) -> bool {
        self.op_type == op_type && self.is_standard()
    }

    /// The attribute `name`.
    pub fn attribute(&self, name: &str) -> Option<&AttributeValue> {
        self.attributes.iter().find(|a| a.name == name).map(|a| &a.value)
    }

    /// The integer attribute `name`.
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.attribute(name)? {
            AttributeValue::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The float attribute `name`.
    pub fn float(&self, name: &str) -> Option<f32> {
        match self.attribute(name)? {
            AttributeValue::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// The integer-list attribute `name`.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        match self.attribute(name)? {
            AttributeValue::Ints(value) => Some(value),
            _ => None,
        }
    }

    /// The string attribute `name`, if it is UTF-8.
    pub fn string(&self, name: &str) -> Option<&str> {
        match self.attribute(name)? {
            AttributeValue::String(value) => std::str::from_utf8(value).ok(),
            _ => None,
        }
    }

    /// Sets the attribute `name`, in place if it is there.
    pub fn set_attribute(&mut self, name: &str, value: impl Into<AttributeValue>) {
        let value = value.into();
        match self.attributes.iter_mut().find(|a| a.name == name) {
            Some(attribute) => attribute.value = value,
            None => self.attributes.push(Attribute::new(name, value)),
        }
    }

    /// Removes the attribute `name`.
    pub fn remove_attribute(&mut self, name: &str) {
        self.attributes.retain(|a| a.name != name);
    }

    /// The scopes of its subgraph attributes, in order.
    pub fn subgraphs(&self) -> Vec<ScopeId> {
        let mut scopes = Vec::new();
        for attribute in &self.attributes {
            match &attribute.value {
                AttributeValue::Graph(scope) => scopes.push(*scope),
                AttributeValue::Graphs(several) => scopes.extend(several),
                _ => {}
            }
        }
        scopes
    }

    /// The scope of the subgraph attribute `name`.
    pub fn subgraph(&self, name: &str) -> Option<ScopeId> {
        match self.attribute(name)? {
            AttributeValue::Graph(scope) => Some(*scope),
            _ => None,
        }
    }

    /// How messages name it: its name, else its first output's name is used by [`Graph::describe`].
    pub(super) fn label(&self) -> Option<&str> {
        (!self.name.is_empty()).then_some(self.name.as_str())
    }
}
