//! Building and editing: every change of a graph, with its use lists kept.

use super::{Graph, Initializer, Node, NodeId, Origin, Scope, ScopeId, Use, Value, ValueId};
use crate::{Tensor, Type};
use std::collections::BTreeSet;

impl Graph {
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
        self.make_initializer(scope, value, Initializer::Dense(tensor.spilled()));
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

    /// As [`Graph::replace_uses`], and `new` takes over the name of `old`, which users know.
    pub fn replace(&mut self, old: ValueId, new: ValueId) {
        let name = self.value(old).name.clone();
        self.replace_uses(old, new);
        // An output of the main graph has kept its name already.
        if self.value(old).name == name && !self.is_output(new) && old != new {
            let spare = self.fresh_name(&name);
            self.rename(old, spare);
            self.rename(new, name);
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
}
