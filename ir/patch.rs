//! A replacement under construction: nodes and constants that are not yet in the graph.

use crate::{Graph, Node, NodeId, Origin, ScopeId, Tensor, ValueId};

enum Pending {
    Output,
    Constant(Tensor, String),
}

struct NewNode {
    node: Node,
    inputs: Vec<Option<ValueId>>,
    outputs: Vec<Option<ValueId>>,
}

/// New nodes and constants for one place of a graph. Nothing changes until [`Graph::apply`].
///
/// The values it hands out become valid when it is applied to the graph it was made for, before any other edit.
pub struct Patch {
    base: usize,
    values: Vec<Pending>,
    nodes: Vec<NewNode>,
}

impl Patch {
    /// An empty patch for `graph` as it is now.
    pub fn new(graph: &Graph) -> Patch {
        Patch { base: graph.value_bound(), values: Vec::new(), nodes: Vec::new() }
    }

    fn pend(&mut self, value: Pending) -> ValueId {
        self.values.push(value);
        ValueId::from_index(self.base + self.values.len() - 1)
    }

    /// A new constant, named like `name`.
    pub fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        self.pend(Pending::Constant(tensor.spilled(), name.to_owned()))
    }

    /// A new one-axis int64 constant.
    pub fn int64s(&mut self, name: &str, values: &[i64]) -> ValueId {
        self.constant(name, Tensor::int64s(values))
    }

    /// A new node with one output.
    pub fn node(&mut self, node: Node, inputs: &[ValueId]) -> ValueId {
        let inputs: Vec<Option<ValueId>> = inputs.iter().map(|&v| Some(v)).collect();
        self.node_with(node, &inputs, 1)[0]
    }

    /// A new node with inputs that may be left out and `outputs` outputs.
    pub fn node_with(&mut self, node: Node, inputs: &[Option<ValueId>], outputs: usize) -> Vec<ValueId> {
        let made: Vec<ValueId> = (0..outputs).map(|_| self.pend(Pending::Output)).collect();
        let outputs = made.iter().map(|&v| Some(v)).collect();
        self.nodes.push(NewNode { node, inputs: inputs.to_vec(), outputs });
        made
    }

    /// A new `Transpose`.
    pub fn transpose(&mut self, x: ValueId, perm: &[usize]) -> ValueId {
        let perm: Vec<i64> = perm.iter().map(|&axis| axis as i64).collect();
        self.node(Node::new("Transpose").with("perm", perm), &[x])
    }

    /// A new `Reshape` to these sizes, where 0 copies a size and −1 infers one.
    pub fn reshape(&mut self, x: ValueId, sizes: &[i64]) -> ValueId {
        let shape = self.int64s("shape", sizes);
        self.node(Node::new("Reshape"), &[x, shape])
    }

    /// Whether `value` is one that this patch makes.
    pub fn makes(&self, value: ValueId) -> bool {
        value.index() >= self.base
    }

    /// The values of the graph that its nodes read.
    pub fn reads(&self) -> Vec<ValueId> {
        let inputs = self.nodes.iter().flat_map(|new| new.inputs.iter().flatten().copied());
        inputs.filter(|&value| !self.makes(value)).collect()
    }

    /// The operators of its nodes, those of other domains with theirs: `Add`, `com.microsoft.Gelu`.
    pub fn operators(&self) -> impl Iterator<Item = String> + '_ {
        self.nodes.iter().map(|new| new.node.operator())
    }

    /// How many nodes it adds.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes of the constants it adds.
    pub fn constant_bytes(&self) -> usize {
        let bytes = |value: &Pending| match value {
            Pending::Output => 0,
            Pending::Constant(tensor, _) => tensor.byte_len(),
        };
        self.values.iter().map(bytes).sum()
    }
}

impl Graph {
    /// Adds everything a patch holds to `scope` and returns the new nodes. Values are named after `name`.
    pub fn apply(&mut self, patch: Patch, scope: ScopeId, name: &str) -> Vec<NodeId> {
        assert_eq!(patch.base, self.value_bound(), "the graph changed after the patch was made");
        for pending in patch.values {
            match pending {
                Pending::Output => {
                    let name = self.fresh_name(name);
                    self.add_value(name, None);
                }
                Pending::Constant(tensor, constant) => {
                    self.add_initializer(scope, &format!("{name}_{constant}"), tensor);
                }
            }
        }
        let added = patch.nodes.into_iter().map(|new| self.add_node(scope, new.node, new.inputs, new.outputs));
        added.collect()
    }

    /// Removes nodes that produce nothing used, starting at `candidates` and going on to what only they needed.
    /// Initializers stay; they are cheap to drop later. Returns how many nodes were removed.
    pub fn remove_unused(&mut self, candidates: Vec<NodeId>) -> usize {
        let mut removed = 0;
        let mut stack = candidates;
        while let Some(id) = stack.pop() {
            let Some(node) = self.get(id) else { continue };
            if node.outputs().iter().flatten().any(|&v| !self.value(v).uses().is_empty()) {
                continue;
            }
            let mut needed: Vec<ValueId> = node.inputs().iter().flatten().copied().collect();
            for scope in node.subgraphs() {
                needed.extend(self.captures(scope));
            }
            self.remove_node(id);
            removed += 1;
            stack.extend(needed.into_iter().filter_map(|v| match self.value(v).origin() {
                Origin::Node(producer, _) => Some(producer),
                _ => None,
            }));
        }
        removed
    }
}
