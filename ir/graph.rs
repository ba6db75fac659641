//! The graph: nodes, values and scopes in one arena, with use lists.
//!
//! One [`Graph`] holds a main graph together with every subgraph nested in it. Each of them is a [`Scope`]; values are
//! identified across all scopes, so a value captured by a subgraph is simply used there. Names are labels: they are
//! resolved when a model is read and made unambiguous before it is written.

use crate::{DataType, Metadata, SparseTensor, Tensor, Type};
use bytes::Bytes;
use std::{
    collections::{BTreeSet, HashMap},
    sync::atomic::{AtomicU64, Ordering},
};

/// A value of a graph, in whichever scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(u32);

/// A node of a graph, in whichever scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

/// The main graph or one subgraph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeId(u32);

impl ValueId {
    pub(crate) fn from_index(index: usize) -> ValueId {
        ValueId(index as u32)
    }

    /// A dense index below [`Graph::value_bound`], for side tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    pub(crate) fn from_index(index: usize) -> NodeId {
        NodeId(index as u32)
    }

    /// A dense index below [`Graph::node_bound`], for side tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl ScopeId {
    /// The main graph.
    pub const MAIN: ScopeId = ScopeId(0);

    /// A dense index, for side tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nothing: removed, or just added and not yet produced.
    None,
    /// An input of this scope; it may carry a default (an initializer that a caller can override).
    Input(ScopeId),
    /// An initializer of this scope.
    Initializer(ScopeId),
    /// This output of this node.
    Node(NodeId, usize),
}

/// Where a value is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Use {
    /// This input of this node.
    Node(NodeId, usize),
    /// This output of this scope.
    Output(ScopeId, usize),
    /// A parameter (scale, zero point) that this value's quantization annotation names.
    Annotation(ValueId),
}

/// A constant stored with the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Initializer {
    /// A dense tensor.
    Dense(Tensor),
    /// A sparse tensor.
    Sparse(SparseTensor),
}

/// One value: a graph input, an initializer or a node output.
#[derive(Debug, Clone)]
pub struct Value {
    /// Its name; never empty.
    pub name: String,
    /// The type that the file states.
    pub ty: Option<Type>,
    /// Documentation kept for the file.
    pub doc: String,
    /// Metadata kept for the file.
    pub metadata: Metadata,
    /// Quantization annotation: parameter kind (`SCALE_TENSOR`) and the value that holds it.
    quantization: Vec<(String, ValueId)>,
    origin: Origin,
    initializer: Option<Initializer>,
    uses: BTreeSet<Use>,
}

impl Value {
    /// Where it comes from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Its initializer: the constant itself, or the default of a graph input.
    pub fn initializer(&self) -> Option<&Initializer> {
        self.initializer.as_ref()
    }

    /// Everything that uses it, in a fixed order.
    pub fn uses(&self) -> &BTreeSet<Use> {
        &self.uses
    }

    /// The quantization annotation.
    pub fn quantization(&self) -> &[(String, ValueId)] {
        &self.quantization
    }
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The names are ONNX's own.
pub enum AttributeValue {
    Float(f32),
    Int(i64),
    String(Bytes),
    Tensor(Tensor),
    Graph(ScopeId),
    SparseTensor(SparseTensor),
    Type(Type),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Bytes>),
    Tensors(Vec<Tensor>),
    Graphs(Vec<ScopeId>),
    SparseTensors(Vec<SparseTensor>),
    Types(Vec<Type>),
    /// In a local function: the attribute `name` of the calling node, of ONNX attribute type `kind`.
    Reference {
        name: String,
        kind: i32,
    },
}

impl From<i64> for AttributeValue {
    fn from(value: i64) -> Self {
        AttributeValue::Int(value)
    }
}

impl From<f32> for AttributeValue {
    fn from(value: f32) -> Self {
        AttributeValue::Float(value)
    }
}

impl From<&str> for AttributeValue {
    fn from(value: &str) -> Self {
        AttributeValue::String(Bytes::copy_from_slice(value.as_bytes()))
    }
}

impl From<Vec<i64>> for AttributeValue {
    fn from(value: Vec<i64>) -> Self {
        AttributeValue::Ints(value)
    }
}

impl From<Vec<f32>> for AttributeValue {
    fn from(value: Vec<f32>) -> Self {
        AttributeValue::Floats(value)
    }
}

impl From<Tensor> for AttributeValue {
    fn from(value: Tensor) -> Self {
        AttributeValue::Tensor(value)
    }
}

impl From<DataType> for AttributeValue {
    fn from(value: DataType) -> Self {
        AttributeValue::Int(value.code().into())
    }
}

/// A named attribute of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct Attribute {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: AttributeValue,
    /// Documentation kept for the file.
    pub doc: String,
}

impl Attribute {
    /// An attribute without documentation.
    pub fn new(name: impl Into<String>, value: impl Into<AttributeValue>) -> Attribute {
        Attribute { name: name.into(), value: value.into(), doc: String::new() }
    }
}

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
    inputs: Vec<Option<ValueId>>,
    outputs: Vec<Option<ValueId>>,
    scope: Option<ScopeId>,
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
    fn label(&self) -> Option<&str> {
        (!self.name.is_empty()).then_some(self.name.as_str())
    }
}

/// The main graph or one subgraph: what goes in, what is computed in which order, what comes out.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// The name the file gives it.
    pub name: String,
    /// Documentation kept for the file.
    pub doc: String,
    /// Metadata kept for the file.
    pub metadata: Metadata,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    nodes: Vec<NodeId>,
    initializers: Vec<ValueId>,
    owner: Option<NodeId>,
}

impl Scope {
    /// The inputs in order.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The outputs in order.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// The node whose subgraph this is; `None` for the main graph.
    pub fn owner(&self) -> Option<NodeId> {
        self.owner
    }
}

/// Nodes that need one another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{node} needs its own output: the nodes form a cycle")]
pub struct Cycle {
    /// One node of the cycle, as [`Graph::describe`] names it.
    pub node: String,
}

/// A main graph and all subgraphs nested in it.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    values: Vec<Value>,
    nodes: Vec<Option<Node>>,
    scopes: Vec<Scope>,
    names: HashMap<String, u32>,
    fresh: HashMap<String, u32>,
    revision: u64,
}

/// The last revision handed out; never the same twice, so that equal revisions mean equal graphs.
static REVISION: AtomicU64 = AtomicU64::new(1);

impl Graph {
    /// An empty main graph.
    pub fn new(name: impl Into<String>) -> Graph {
        let mut graph = Graph { scopes: vec![Scope { name: name.into(), ..Scope::default() }], ..Graph::default() };
        graph.touch();
        graph
    }

    fn touch(&mut self) {
        self.revision = REVISION.fetch_add(1, Ordering::Relaxed);
    }

    /// Changes with every edit (sorting is none). Graphs of equal revision are equal: one is a clone of the other.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    // Reading.

    /// The main graph or one subgraph.
    pub fn scope(&self, id: ScopeId) -> &Scope {
        &self.scopes[id.index()]
    }

    /// Name, documentation and metadata of a scope, to edit.
    pub fn scope_mut(&mut self, id: ScopeId) -> &mut Scope {
        self.touch();
        &mut self.scopes[id.index()]
    }

    /// The main graph.
    pub fn main(&self) -> &Scope {
        &self.scopes[0]
    }

    /// A node. Panics if it was removed.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.index()].as_ref().expect("the node was removed")
    }

    /// A node, if it was not removed.
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index())?.as_ref()
    }

    /// Attributes, name and documentation of a node, to edit. Inputs and outputs change through the graph.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.touch();
        self.nodes[id.index()].as_mut().expect("the node was removed")
    }

    /// A value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// Type, documentation and metadata of a value, to edit. Names change through [`Graph::rename`].
    pub fn value_mut(&mut self, id: ValueId) -> &mut Value {
        self.touch();
        &mut self.values[id.index()]
    }

    /// Every value index is below this.
    pub fn value_bound(&self) -> usize {
        self.values.len()
    }

    /// Every node index is below this.
    pub fn node_bound(&self) -> usize {
        self.nodes.len()
    }

    /// Every scope index is below this.
    pub fn scope_bound(&self) -> usize {
        self.scopes.len()
    }

    /// The nodes of one scope, in order.
    pub fn nodes(&self, scope: ScopeId) -> impl DoubleEndedIterator<Item = NodeId> + '_ {
        let live = move |id: &NodeId| self.nodes[id.index()].as_ref().is_some_and(|n| n.scope == Some(scope));
        self.scope(scope).nodes.iter().copied().filter(live)
    }

    /// The initializers of one scope, in order (defaults of inputs are not among them).
    pub fn initializers(&self, scope: ScopeId) -> impl Iterator<Item = ValueId> + '_ {
        let here = move |id: &ValueId| self.value(*id).origin == Origin::Initializer(scope);
        self.scope(scope).initializers.iter().copied().filter(here)
    }

    /// Every scope that is still in use: the main graph first, each subgraph after the scope around it.
    pub fn scopes(&self) -> Vec<ScopeId> {
        let mut found = vec![ScopeId::MAIN];
        // Most graphs have no subgraphs, and looking for them reads every node.
        let mut next = usize::from(self.scopes.len() == 1);
        while let Some(&scope) = found.get(next) {
            for node in self.nodes(scope) {
                found.extend(self.node(node).subgraphs());
            }
            next += 1;
        }
        found
    }

    /// Every node of every scope; the order inside each scope is kept.
    pub fn all_nodes(&self) -> Vec<NodeId> {
        self.scopes().into_iter().flat_map(|scope| self.nodes(scope)).collect()
    }

    /// The node that produces a value.
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        match self.value(value).origin {
            Origin::Node(node, _) => Some(node),
            _ => None,
        }
    }

    /// The dense tensor behind a value that is constant: an initializer that no caller can override.
    pub fn constant(&self, value: ValueId) -> Option<&Tensor> {
        let value = self.value(value);
        match (&value.origin, &value.initializer) {
            (Origin::Initializer(_), Some(Initializer::Dense(tensor))) => Some(tensor),
            _ => None,
        }
    }

    /// The scope in which a value is defined.
    pub fn scope_of(&self, value: ValueId) -> Option<ScopeId> {
        match self.value(value).origin {
            Origin::None => None,
            Origin::Input(scope) | Origin::Initializer(scope) => Some(scope),
            Origin::Node(node, _) => Some(self.node(node).scope()),
        }
    }

    /// The scope around `scope`.
    pub fn parent(&self, scope: ScopeId) -> Option<ScopeId> {
        self.scope(scope).owner.map(|node| self.node(node).scope())
    }

    /// Whether `inner` is `outer` or lies inside it, so that values of `outer` can be used in `inner`.
    pub fn is_within(&self, inner: ScopeId, outer: ScopeId) -> bool {
        let mut at = Some(inner);
        while let Some(scope) = at {
            if scope == outer {
                return true;
            }
            at = self.parent(scope);
        }
        false
    }

    /// Whether a value is an output of the main graph or of a subgraph.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.value(value).uses.iter().any(|u| matches!(u, Use::Output(..)))
    }

    /// How messages name a node: "node `layer1/MatMul` (MatMul)".
    pub fn describe(&self, id: NodeId) -> String {
        let node = self.node(id);
        let output = || node.outputs.iter().flatten().next().map(|&v| self.value(v).name.as_str());
        match node.label().or_else(output) {
            Some(label) => format!("node `{label}` ({})", node.op_type),
            None => format!("a node without name and outputs ({})", node.op_type),
        }
    }

    /// A value by name in the main graph's scope or any other; the first found in order of creation.
    pub fn find_value(&self, name: &str) -> Option<ValueId> {
        self.names.get(name)?;
        let found = self.values.iter().position(|v| v.name == name && v.origin != Origin::None)?;
        Some(ValueId(found as u32))
    }

    /// Values of enclosing scopes that the nodes inside `scope` (and scopes nested in it) use, in order of first use.
    pub fn captures(&self, scope: ScopeId) -> Vec<ValueId> {
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        let mut stack = vec![scope];
        let mut inside = vec![scope];
        while let Some(at) = stack.pop() {
            for id in self.nodes(at) {
                let subgraphs = self.node(id).subgraphs();
                inside.extend(&subgraphs);
                stack.extend(subgraphs);
            }
        }
        let inside: BTreeSet<ScopeId> = inside.into_iter().collect();
        for &at in &inside {
            let used = self.nodes(at).flat_map(|id| self.node(id).inputs.iter().flatten().copied());
            for value in used.chain(self.scope(at).outputs.iter().copied()) {
                let outside = self.scope_of(value).is_some_and(|s| !inside.contains(&s));
                if outside && seen.insert(value) {
                    found.push(value);
                }
            }
        }
        found
    }

    // Building and editing.

    /// A name like `base` that no value has.
    pub fn fresh_name(&mut self, base: &str) -> String {
        if !base.is_empty() && !self.names.contains_key(base) {
            return base.to_owned();
        }
        let next = self.fresh.entry(base.to_owned()).or_insert(0);
        loop {
            *next += 1;
            let name = format!("{base}_{next}");
            if !self.names.contains_key(&name) {
                return name;
            }
        }
    }

    fn count_name(&mut self, name: &str) {
        match self.names.get_mut(name) {
            Some(count) => *count += 1,
            None => _ = self.names.insert(name.to_owned(), 1),
        }
    }

    fn uncount_name(&mut self, name: &str) {
        if let Some(count) = self.names.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                self.names.remove(name);
            }
        }
    }

    /// A new value with exactly this name, not yet produced by anything.
    pub fn add_value(&mut self, name: impl Into<String>, ty: Option<Type>) -> ValueId {
        self.touch();
        let name = name.into();
        self.count_name(&name);
        self.values.push(Value {
            name,
            ty,
            doc: String::new(),
            metadata: Vec::new(),
            quantization: Vec::new(),
            origin: Origin::None,
            initializer: None,
            uses: BTreeSet::new(),
        });
        ValueId(self.values.len() as u32 - 1)
    }

    /// Makes an unproduced value the last input of `scope`.
    pub fn add_input(&mut self, scope: ScopeId, value: ValueId) {
        self.touch();
        debug_assert_eq!(self.value(value).origin, Origin::None, "the value already has an origin");
        self.values[value.index()].origin = Origin::Input(scope);
        self.scopes[scope.index()].inputs.push(value);
    }

    /// Removes input `index` of `scope`, which must have no uses.
    pub fn remove_input(&mut self, scope: ScopeId, index: usize) {
        self.touch();
        let value = self.scopes[scope.index()].inputs.remove(index);
        debug_assert!(self.value(value).uses.is_empty(), "the input is still used");
        self.forget_value(value);
    }

    /// Makes a value the last output of `scope`.
    pub fn add_output(&mut self, scope: ScopeId, value: ValueId) {
        self.touch();
        let index = self.scopes[scope.index()].outputs.len();
        self.scopes[scope.index()].outputs.push(value);
        self.values[value.index()].uses.insert(Use::Output(scope, index));
    }

    /// Replaces output `index` of `scope`; the old value keeps its name.
    pub fn set_output(&mut self, scope: ScopeId, index: usize, value: ValueId) {
        self.touch();
        let old = std::mem::replace(&mut self.scopes[scope.index()].outputs[index], value);
        self.values[old.index()].uses.remove(&Use::Output(scope, index));
        self.values[value.index()].uses.insert(Use::Output(scope, index));
    }

    /// Removes output `index` of `scope`; later ones move up.
    pub fn remove_output(&mut self, scope: ScopeId, index: usize) {
        let outputs = std::mem::take(&mut self.scopes[scope.index()].outputs);
        for (i, value) in outputs.iter().enumerate() {
            self.values[value.index()].uses.remove(&Use::Output(scope, i));
        }
        for (_, value) in outputs.into_iter().enumerate().filter(|(i, _)| *i != index) {
            self.add_output(scope, value);
        }
    }

    /// A new constant of `scope`, named like `name`.
    pub fn add_initializer(&mut self, scope: ScopeId, name: &str, tensor: Tensor) -> ValueId {
        let name = self.fresh_name(name);
        let value = self.add_value(name, None);
        self.make_initializer(scope, value, Initializer::Dense(tensor));
        value
    }

    /// Makes an unproduced value an initializer of `scope`.
    pub fn make_initializer(&mut self, scope: ScopeId, value: ValueId, initializer: Initializer) {
        self.touch();
        debug_assert_eq!(self.value(value).origin, Origin::None, "the value already has an origin");
        self.values[value.index()].origin = Origin::Initializer(scope);
        self.values[value.index()].initializer = Some(initializer);
        self.scopes[scope.index()].initializers.push(value);
    }

    /// Gives a graph input a default, or takes it away.
    pub fn set_default(&mut self, input: ValueId, default: Option<Initializer>) {
        self.touch();
        debug_assert!(matches!(self.value(input).origin, Origin::Input(_)), "only inputs have defaults");
        self.values[input.index()].initializer = default;
    }

    /// Replaces the tensor of an initializer.
    pub fn set_initializer(&mut self, value: ValueId, initializer: Initializer) {
        self.touch();
        debug_assert!(matches!(self.value(value).origin, Origin::Initializer(_)), "the value is no initializer");
        self.values[value.index()].initializer = Some(initializer);
    }

    /// Turns a main-graph input that has a default into a constant: callers can no longer override it.
    pub fn freeze_input(&mut self, scope: ScopeId, index: usize) {
        self.touch();
        let value = self.scopes[scope.index()].inputs[index];
        debug_assert!(self.value(value).initializer.is_some(), "the input has no default");
        self.scopes[scope.index()].inputs.remove(index);
        self.scopes[scope.index()].initializers.push(value);
        self.values[value.index()].origin = Origin::Initializer(scope);
    }

    /// Annotates a value with quantization parameters.
    pub fn set_quantization(&mut self, value: ValueId, parameters: Vec<(String, ValueId)>) {
        self.touch();
        for (_, old) in std::mem::take(&mut self.values[value.index()].quantization) {
            self.values[old.index()].uses.remove(&Use::Annotation(value));
        }
        for (_, new) in &parameters {
            self.values[new.index()].uses.insert(Use::Annotation(value));
        }
        self.values[value.index()].quantization = parameters;
    }

    /// A new, empty scope; it becomes a subgraph when a node with it as an attribute is added.
    pub fn add_scope(&mut self, name: impl Into<String>) -> ScopeId {
        self.touch();
        self.scopes.push(Scope { name: name.into(), ..Scope::default() });
        ScopeId(self.scopes.len() as u32 - 1)
    }

    /// Appends `node` to `scope`, reading `inputs` and producing `outputs`, which must be unproduced values.
    pub fn add_node(
        &mut self,
        scope: ScopeId,
        mut node: Node,
        inputs: Vec<Option<ValueId>>,
        outputs: Vec<Option<ValueId>>,
    ) -> NodeId {
        self.touch();
        let id = NodeId(self.nodes.len() as u32);
        for (index, value) in inputs.iter().enumerate() {
            if let Some(value) = value {
                self.values[value.index()].uses.insert(Use::Node(id, index));
            }
        }
        for (index, value) in outputs.iter().enumerate() {
            if let Some(value) = value {
                debug_assert_eq!(self.value(*value).origin, Origin::None, "the value already has an origin");
                self.values[value.index()].origin = Origin::Node(id, index);
            }
        }
        for subgraph in node.subgraphs() {
            self.scopes[subgraph.index()].owner = Some(id);
        }
        node.inputs = inputs;
        node.outputs = outputs;
        node.scope = Some(scope);
        self.nodes.push(Some(node));
        self.scopes[scope.index()].nodes.push(id);
        id
    }

    /// Appends a one-output node and returns its new output, named like `name`.
    pub fn append(&mut self, scope: ScopeId, node: Node, inputs: &[ValueId], name: &str) -> ValueId {
        let name = self.fresh_name(name);
        let output = self.add_value(name, None);
        self.add_node(scope, node, inputs.iter().map(|&v| Some(v)).collect(), vec![Some(output)]);
        output
    }

    /// Changes input `index` of a node; missing inputs before it are left out.
    pub fn set_input(&mut self, id: NodeId, index: usize, value: Option<ValueId>) {
        self.touch();
        let node = self.nodes[id.index()].as_mut().expect("the node was removed");
        if node.inputs.len() <= index {
            node.inputs.resize(index + 1, None);
        }
        let old = std::mem::replace(&mut node.inputs[index], value);
        while node.inputs.last() == Some(&None) {
            node.inputs.pop();
        }
        if let Some(old) = old {
            self.values[old.index()].uses.remove(&Use::Node(id, index));
        }
        if let Some(new) = value {
            self.values[new.index()].uses.insert(Use::Node(id, index));
        }
    }

    /// Replaces all inputs of a node.
    pub fn set_inputs(&mut self, id: NodeId, inputs: Vec<Option<ValueId>>) {
        let old = self.node(id).inputs.len();
        for index in (0..old.max(inputs.len())).rev() {
            self.set_input(id, index, inputs.get(index).copied().flatten());
        }
    }

    /// Stops asking for output `index` of a node; the value must have no uses.
    pub fn drop_output(&mut self, id: NodeId, index: usize) {
        self.touch();
        let node = self.nodes[id.index()].as_mut().expect("the node was removed");
        let Some(value) = node.outputs.get_mut(index).and_then(Option::take) else { return };
        while node.outputs.last() == Some(&None) {
            node.outputs.pop();
        }
        debug_assert!(self.value(value).uses.is_empty(), "the output is still used");
        self.forget_value(value);
    }

    /// Makes everything that uses `old` use `new` instead.
    ///
    /// An output of the main graph keeps its name: `new` takes it over (and the type stated for it), unless `new` is
    /// itself an input or output of the main graph, in which case an `Identity` node goes between. So it does where a
    /// subgraph would return a value of another scope or one value twice. `new` must be visible wherever `old` is used.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        if old == new {
            return;
        }
        let uses: Vec<Use> = self.values[old.index()].uses.iter().copied().collect();
        for place in uses {
            match place {
                Use::Node(node, index) => self.set_input(node, index, Some(new)),
                Use::Annotation(value) => {
                    let parameters = self.value(value).quantization.iter();
                    let parameters = parameters.map(|(k, v)| (k.clone(), if *v == old { new } else { *v })).collect();
                    self.set_quantization(value, parameters);
                }
                Use::Output(scope, index) => self.replace_output(scope, index, new),
            }
        }
    }

    fn replace_output(&mut self, scope: ScopeId, index: usize, new: ValueId) {
        let old = self.scopes[scope.index()].outputs[index];
        let produced_here = match self.value(new).origin {
            Origin::Node(node, _) => self.node(node).scope() == scope,
            _ => false,
        };
        if scope != ScopeId::MAIN {
            if produced_here && !self.must_return_once(scope, new) {
                return self.set_output(scope, index, new);
            }
            let name = self.fresh_name(&self.value(old).name.clone());
            let copy = self.append(scope, Node::new("Identity"), &[new], &name);
            return self.set_output(scope, index, copy);
        }
        let mut target = new;
        if !produced_here || self.is_output(new) {
            let name = self.fresh_name("copy");
            target = self.append(scope, Node::new("Identity"), &[new], &name);
        }
        let name = self.value(old).name.clone();
        let spare = self.fresh_name(&name);
        self.rename(old, spare);
        let ty = self.value(old).ty.clone();
        let (doc, metadata) = (self.value(old).doc.clone(), self.value(old).metadata.clone());
        self.rename(target, name);
        let value = &mut self.values[target.index()];
        value.ty = ty;
        value.doc = doc;
        value.metadata = metadata;
        self.set_output(scope, index, target);
    }

    /// Whether a subgraph returns `value` already and must not do so twice: ONNX Runtime takes that for one output, and
    /// leaves the other undefined, in everything but a `Loop`.
    pub fn must_return_once(&self, scope: ScopeId, value: ValueId) -> bool {
        let owner = self.scope(scope).owner().map(|id| self.node(id));
        self.scope(scope).outputs.contains(&value) && !owner.is_some_and(|node| node.is("Loop"))
    }

    /// Gives a value exactly this name.
    pub fn rename(&mut self, value: ValueId, name: impl Into<String>) {
        self.touch();
        let name = name.into();
        let old = std::mem::take(&mut self.values[value.index()].name);
        self.uncount_name(&old);
        self.count_name(&name);
        self.values[value.index()].name = name;
    }

    /// Removes a node with its subgraphs. Its outputs must have no uses.
    pub fn remove_node(&mut self, id: NodeId) {
        self.touch();
        let node = self.nodes[id.index()].take().expect("the node was removed before");
        for (index, value) in node.inputs.iter().enumerate() {
            if let Some(value) = value {
                self.values[value.index()].uses.remove(&Use::Node(id, index));
            }
        }
        for scope in node.subgraphs() {
            self.clear_scope(scope);
        }
        for value in node.outputs.into_iter().flatten() {
            debug_assert!(self.value(value).uses.is_empty(), "an output of the removed node is still used");
            self.forget_value(value);
        }
    }

    /// Removes everything inside a scope that is going away.
    fn clear_scope(&mut self, scope: ScopeId) {
        for index in (0..self.scope(scope).outputs.len()).rev() {
            self.remove_output(scope, index);
        }
        let nodes: Vec<NodeId> = self.nodes(scope).collect();
        // Every use goes before any value does: nodes nested further in may read what a node here produces.
        for &id in &nodes {
            self.set_inputs(id, Vec::new());
            for inner in self.node(id).subgraphs() {
                self.clear_scope(inner);
            }
        }
        for id in nodes {
            self.remove_node(id);
        }
        let mine = |v: &ValueId| matches!(self.values[v.index()].origin, Origin::Input(s) | Origin::Initializer(s) if s == scope);
        let here = &self.scopes[scope.index()];
        let values: Vec<ValueId> = here.inputs.iter().chain(&here.initializers).copied().filter(mine).collect();
        for value in values {
            self.forget_value(value);
        }
        self.scopes[scope.index()] = Scope::default();
    }

    /// Removes an initializer, which must have no uses.
    pub fn remove_initializer(&mut self, value: ValueId) {
        debug_assert!(matches!(self.value(value).origin, Origin::Initializer(_)), "the value is no initializer");
        debug_assert!(self.value(value).uses.is_empty(), "the initializer is still used");
        self.forget_value(value);
    }

    fn forget_value(&mut self, id: ValueId) {
        self.touch();
        self.set_quantization(id, Vec::new());
        let value = &mut self.values[id.index()];
        value.origin = Origin::None;
        value.initializer = None;
        value.uses.clear();
        let name = std::mem::take(&mut value.name);
        self.uncount_name(&name);
    }

    /// Moves a node (with its subgraphs) to the end of another scope, which must see the values it reads.
    pub fn move_node(&mut self, id: NodeId, scope: ScopeId) {
        let from = self.node(id).scope();
        self.node_mut(id).scope = Some(scope);
        let left = &mut self.scopes[from.index()].nodes;
        if let Some(at) = left.iter().position(|&n| n == id) {
            left.remove(at);
        }
        self.scopes[scope.index()].nodes.push(id);
    }

    /// Moves an initializer to another scope, which must contain all of its uses.
    pub fn move_initializer(&mut self, value: ValueId, scope: ScopeId) {
        self.touch();
        if let Origin::Initializer(from) = self.value(value).origin {
            self.scopes[from.index()].initializers.retain(|&v| v != value);
        }
        self.values[value.index()].origin = Origin::Initializer(scope);
        self.scopes[scope.index()].initializers.push(value);
    }

    /// Puts the nodes of every scope in an order in which each one follows what it needs.
    ///
    /// Nodes already in order stay where they are; a node that comes too late moves to just before its first user.
    pub fn sort(&mut self) -> Result<(), Cycle> {
        for scope in self.scopes() {
            let order = self.sorted(scope)?;
            let live: Vec<ValueId> = self.initializers(scope).collect();
            let scope = &mut self.scopes[scope.index()];
            scope.nodes = order;
            scope.initializers = live;
        }
        Ok(())
    }

    /// The nodes of one scope in the order that [`Graph::sort`] would give them.
    pub fn sorted(&self, scope: ScopeId) -> Result<Vec<NodeId>, Cycle> {
        const WAITING: u8 = 1;
        const DONE: u8 = 2;
        let roots: Vec<NodeId> = self.nodes(scope).collect();
        let mut order = Vec::with_capacity(roots.len());
        let mut state: HashMap<NodeId, u8> = HashMap::with_capacity(roots.len());
        let mut stack: Vec<(NodeId, Vec<NodeId>)> = Vec::new();
        for root in roots {
            if state.contains_key(&root) {
                continue;
            }
            state.insert(root, WAITING);
            stack.push((root, self.needs(root, scope)));
            while let Some((node, pending)) = stack.last_mut() {
                let Some(next) = pending.pop() else {
                    state.insert(*node, DONE);
                    order.push(*node);
                    stack.pop();
                    continue;
                };
                match state.get(&next) {
                    Some(&DONE) => {}
                    Some(_) => return Err(Cycle { node: self.describe(next) }),
                    None => {
                        state.insert(next, WAITING);
                        let needs = self.needs(next, scope);
                        stack.push((next, needs));
                    }
                }
            }
        }
        Ok(order)
    }

    /// The nodes of `scope` whose outputs a node or its subgraphs read, last input first.
    fn needs(&self, id: NodeId, scope: ScopeId) -> Vec<NodeId> {
        let node = self.node(id);
        let mut values: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
        for subgraph in node.subgraphs() {
            values.extend(self.captures(subgraph));
        }
        let here = |v: ValueId| self.producer(v).filter(|&p| self.node(p).scope() == scope);
        let mut needs: Vec<NodeId> = values.into_iter().rev().filter_map(here).collect();
        needs.dedup();
        needs
    }

    /// Renames values so that no name is defined twice where both could be seen. Names of the main graph's inputs and
    /// outputs never change. Returns how many were renamed.
    pub fn make_names_unique(&mut self) -> usize {
        let mut renamed = 0;
        let mut taken: Vec<BTreeSet<String>> = vec![BTreeSet::new(); self.scopes.len()];
        for scope in self.scopes() {
            let mut visible = Vec::new();
            let mut at = self.parent(scope);
            while let Some(outer) = at {
                visible.push(outer.index());
                at = self.parent(outer);
            }
            let here = self.scope(scope);
            let fixed: Vec<ValueId> = if scope == ScopeId::MAIN {
                here.inputs.iter().chain(&here.outputs).copied().collect()
            } else {
                here.inputs.clone()
            };
            let made = self.nodes(scope).flat_map(|id| self.node(id).outputs.iter().flatten().copied());
            let all: Vec<ValueId> = fixed.into_iter().chain(self.initializers(scope)).chain(made).collect();
            let mut done = BTreeSet::new();
            for value in all {
                if !done.insert(value) {
                    continue;
                }
                let name = self.value(value).name.clone();
                let clash = name.is_empty()
                    || taken[scope.index()].contains(&name)
                    || visible.iter().any(|&outer| taken[outer].contains(&name));
                let name = if clash {
                    renamed += 1;
                    let fresh = self.fresh_name(if name.is_empty() { "value" } else { &name });
                    self.rename(value, fresh.clone());
                    fresh
                } else {
                    name
                };
                taken[scope.index()].insert(name);
            }
        }
        renamed
    }
}
