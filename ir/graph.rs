//! The graph: nodes, values and scopes in one arena, with use lists.
//!
//! One [`Graph`] holds a main graph together with every subgraph nested in it. Each of them is a [`Scope`]; values are
//! identified across all scopes, so a value captured by a subgraph is simply used there. Names are labels: they are
//! resolved when a model is read and made unambiguous before it is written.

mod attribute;
mod edit;
mod names;
mod node;
mod order;
mod value;

pub use attribute::{Attribute, AttributeValue};
pub use node::{Node, Placement, Port, ShardedDim, Sharding};
pub use order::Cycle;
pub use value::{Initializer, Origin, Use, Value};

use crate::{Metadata, Tensor};
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
}
