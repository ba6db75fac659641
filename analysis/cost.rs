//! What a model costs: nodes, parameters, bytes, FLOPs and the peak of its activations.
//!
//! One multiply-add is 2 FLOP. Element-wise operators, reductions and pooling count one operation per element they
//! read, normalizations and softmax five; moving data and whole-number arithmetic on shapes count nothing. Operators
//! that are not known, or whose shapes are not, add nothing and are listed: the total is then a lower bound. Nodes that only
//! read constants count nothing, since runtimes compute them once: what is stored behind them belongs to the layer that reads
//! them.

mod bindings;
mod flops;
mod folded;

pub use bindings::Bindings;

use self::folded::{constants, folded};
use crate::{liveness::Liveness, shapes::Facts};
use lathe_ir::{AttributeValue, DataType, Graph, Initializer, Model, NodeId, ScopeId, Tensor, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What the nodes of one operator cost together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OperatorCost {
    /// The operator, with its domain if that is not the standard one: `com.microsoft.FusedConv`.
    pub op_type: String,
    /// How many nodes there are, in every subgraph.
    pub count: usize,
    /// What they compute.
    pub flops: u64,
    /// Bytes of the constants that they are the first to read, also behind nodes that only read constants.
    pub weight_bytes: u64,
}

/// What one node costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeCost {
    /// What it computes; of a node in a loop for all rounds, of a call with all that it calls.
    pub flops: u64,
    /// Elements of the constants that it is the first to read, as [`Cost::parameters`] counts them.
    pub parameters: u64,
    /// Bytes of the constants that it is the first to read, also behind nodes that only read constants.
    pub weight_bytes: u64,
}

/// What a model costs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cost {
    /// Nodes of the main graph.
    pub nodes: usize,
    /// Nodes of the main graph, its subgraphs and the local functions.
    pub nodes_total: usize,
    /// Elements of constants, apart from int32, int64, booleans and strings (which are indices and shapes).
    pub parameters: u64,
    /// Bytes of all constants.
    pub weight_bytes: u64,
    /// Floating-point operations of one run.
    pub flops: u64,
    /// Operators that `flops` leaves out, with the number of their nodes, in order of names.
    pub uncounted: Vec<(String, usize)>,
    /// The most bytes that values hold at the same time when nodes run in order and nothing is shared.
    pub activation_peak_bytes: u64,
    /// Values whose size is not known and which the peak leaves out.
    pub unsized_values: usize,
    /// The same per operator, the most FLOPs first.
    pub operators: Vec<OperatorCost>,
    /// The same per node of the main graph and its subgraphs, by [`NodeId::index`].
    pub by_node: Vec<NodeCost>,
}

impl Cost {
    /// Computes the cost of a model whose facts are known, at these sizes; see also [`Bindings::for_inputs`].
    pub fn of(model: &Model, facts: &Facts, bindings: &Bindings) -> Cost {
        Cost::with(model, facts, bindings, folded)
    }

    /// As [`Cost::of`] for a runtime that folds nothing, as where its optimizations are off.
    pub fn unfolded(model: &Model, facts: &Facts, bindings: &Bindings) -> Cost {
        Cost::with(model, facts, bindings, |_| BTreeSet::new())
    }

    fn with(model: &Model, facts: &Facts, bindings: &Bindings, folded: fn(&Graph) -> BTreeSet<NodeId>) -> Cost {
        let bindings = &bindings.clone().for_inputs(&model.graph, facts);
        let by_node = vec![NodeCost::default(); model.graph.node_bound()];
        let mut sums =
            Sums { model, bindings, folded, operators: BTreeMap::new(), uncounted: BTreeMap::new(), by_node };
        let mut cost = Cost { nodes: model.graph.nodes(ScopeId::MAIN).count(), ..Cost::default() };
        for (graph, _) in model.graphs() {
            cost.nodes_total += graph.all_nodes().len();
            sums.weights(graph, &mut cost);
        }
        let main = Body { graph: &model.graph, facts, folded: &folded(&model.graph) };
        cost.flops = sums.scope(main, ScopeId::MAIN, 1, 0);
        (cost.activation_peak_bytes, cost.unsized_values) = peak(main, bindings, ScopeId::MAIN, 0);
        cost.uncounted = sums.uncounted.into_iter().collect();
        cost.by_node = sums.by_node;
        cost.operators = sums.operators.into_values().collect();
        cost.operators.sort_by(|a, b| {
            let key = |o: &OperatorCost| (o.flops, o.weight_bytes, o.count);
            key(b).cmp(&key(a)).then_with(|| a.op_type.cmp(&b.op_type))
        });
        cost
    }
}

/// How deeply subgraphs and functions are followed.
const MAX_DEPTH: usize = 16;

/// A graph with what is known about it.
#[derive(Clone, Copy)]
struct Body<'b> {
    graph: &'b Graph,
    facts: &'b Facts,
    folded: &'b BTreeSet<NodeId>,
}

struct Sums<'a> {
    model: &'a Model,
    bindings: &'a Bindings,
    /// The nodes of a graph that count nothing.
    folded: fn(&Graph) -> BTreeSet<NodeId>,
    operators: BTreeMap<String, OperatorCost>,
    uncounted: BTreeMap<String, usize>,
    by_node: Vec<NodeCost>,
}

/// The operator's name, with its domain if that is not the standard one.
fn operator_name(graph: &Graph, id: NodeId) -> String {
    let node = graph.node(id);
    if node.is_standard() { node.op_type.clone() } else { format!("{}.{}", node.domain, node.op_type) }
}

impl Sums<'_> {
    fn operator(&mut self, name: String) -> &mut OperatorCost {
        self.operators.entry(name.clone()).or_insert_with(|| OperatorCost { op_type: name, ..OperatorCost::default() })
    }

    /// The entry of a node, if it belongs to the main graph or its subgraphs.
    fn of_main(&mut self, graph: &Graph, id: NodeId) -> Option<&mut NodeCost> {
        std::ptr::eq(graph, &self.model.graph).then(|| &mut self.by_node[id.index()])
    }

    fn weights(&mut self, graph: &Graph, cost: &mut Cost) {
        let (folded, mut counted) = ((self.folded)(graph), BTreeSet::new());
        for id in graph.all_nodes() {
            let node = graph.node(id);
            let (mut bytes, parameters) = (0, cost.parameters);
            // What is stored behind folded nodes belongs to the layer that reads them.
            let inputs = node.inputs().iter().flatten().filter(|_| !folded.contains(&id));
            for value in inputs.flat_map(|&value| constants(graph, &folded, value)) {
                if counted.insert(value) {
                    bytes += initializer_bytes(graph, value, cost);
                }
            }
            for attribute in &node.attributes {
                if let AttributeValue::Tensor(tensor) = &attribute.value {
                    bytes += tensor_bytes(tensor, cost);
                }
            }
            let entry = self.operator(operator_name(graph, id));
            entry.count += 1;
            entry.weight_bytes += bytes;
            cost.weight_bytes += bytes;
            if let Some(of_node) = self.of_main(graph, id) {
                (of_node.parameters, of_node.weight_bytes) = (cost.parameters - parameters, bytes);
            }
        }
        let inputs = graph.main().inputs().iter().copied();
        let unused: Vec<ValueId> =
            graph.scopes().into_iter().flat_map(|s| graph.initializers(s)).chain(inputs).collect();
        for value in unused {
            if graph.value(value).initializer().is_some() && counted.insert(value) {
                cost.weight_bytes += initializer_bytes(graph, value, cost);
            }
        }
    }

    /// The FLOPs of a scope that runs `times` times; they are also entered into the table.
    fn scope(&mut self, body: Body<'_>, scope: ScopeId, times: u64, depth: usize) -> u64 {
        let mut total = 0u64;
        if depth > MAX_DEPTH {
            return 0;
        }
        for id in body.graph.nodes(scope).filter(|id| !body.folded.contains(id)) {
            total = total.saturating_add(self.node(body, id, times, depth));
        }
        total
    }

    fn node(&mut self, body: Body<'_>, id: NodeId, times: u64, depth: usize) -> u64 {
        let Body { graph, facts, .. } = body;
        let node = graph.node(id);
        let name = operator_name(graph, id);
        if let Some((called, inner)) = facts.of_call(graph, &self.model.functions, id, depth) {
            let called = Body { graph: called, facts: &inner, folded: &(self.folded)(called) };
            let flops = self.scope(called, ScopeId::MAIN, times, depth + 1);
            if let Some(of_node) = self.of_main(graph, id) {
                of_node.flops = of_node.flops.saturating_add(flops);
            }
            return flops;
        }
        let scopes = node.subgraphs();
        if !scopes.is_empty() {
            let (rounds, certain) = flops::rounds(graph, facts, id, self.bindings);
            if !certain {
                *self.uncounted.entry(name).or_default() += 1;
            }
            let each: Vec<u64> = scopes
                .into_iter()
                .map(|inner| self.scope(body, inner, times.saturating_mul(rounds), depth + 1))
                .collect();
            // One branch runs; the dearer one counts.
            let all = if node.op_type == "If" {
                each.into_iter().max()
            } else {
                each.into_iter().reduce(u64::saturating_add)
            };
            return all.unwrap_or(0);
        }
        match flops::of_node(graph, facts, id, self.bindings) {
            Some(flops) => {
                let flops = flops.saturating_mul(times);
                let entry = self.operator(name);
                entry.flops = entry.flops.saturating_add(flops);
                if let Some(of_node) = self.of_main(graph, id) {
                    of_node.flops = of_node.flops.saturating_add(flops);
                }
                flops
            }
            None => {
                *self.uncounted.entry(name).or_default() += 1;
                0
            }
        }
    }
}

fn tensor_bytes(tensor: &Tensor, cost: &mut Cost) -> u64 {
    use DataType::{Bool, Int32, Int64, String};
    if !matches!(tensor.dtype(), Int32 | Int64 | Bool | String) {
        cost.parameters += tensor.len() as u64;
    }
    tensor.byte_len() as u64
}

fn initializer_bytes(graph: &Graph, value: ValueId, cost: &mut Cost) -> u64 {
    match graph.value(value).initializer() {
        Some(Initializer::Dense(tensor)) => tensor_bytes(tensor, cost),
        Some(Initializer::Sparse(sparse)) => tensor_bytes(&sparse.values, cost) + sparse.indices.byte_len() as u64,
        None => 0,
    }
}

/// The most bytes alive at once in a scope, and how many values had no known size.
fn peak(body: Body<'_>, bindings: &Bindings, scope: ScopeId, depth: usize) -> (u64, usize) {
    let Body { graph, facts, folded } = body;
    let Some(live) = Liveness::of(graph, scope).filter(|_| depth <= MAX_DEPTH) else { return (0, 0) };
    let mut unsized_values = 0;
    let mut bytes = |value: ValueId| {
        let elements = bindings.sizes(facts, value).and_then(|s| s.iter().try_fold(1u64, |n, &d| n.checked_mul(d)));
        match elements.zip(facts.elem(value)) {
            Some((elements, elem)) => elements.saturating_mul(elem.bits() as u64).div_ceil(8),
            None => {
                unsized_values += 1;
                0
            }
        }
    };
    let mut held: Vec<u64> = vec![0; graph.value_bound()];
    let mut ending: Vec<Vec<ValueId>> = vec![Vec::new(); live.order().len() + 1];
    let mut now = 0u64;
    let mut most = 0u64;
    // The body of a loop reads values of the scope around it, which are counted there.
    for &value in graph.scope(scope).inputs() {
        held[value.index()] = bytes(value);
        now = now.saturating_add(held[value.index()]);
        if let Some(last) = live.last_use(value) {
            ending[last].push(value);
        }
    }
    let mut inner_unsized = 0;
    for (at, &id) in live.order().iter().enumerate() {
        let node = graph.node(id);
        for &value in node.outputs().iter().flatten() {
            held[value.index()] = if node.is("Constant") || folded.contains(&id) { 0 } else { bytes(value) };
            now = now.saturating_add(held[value.index()]);
            ending[live.last_use(value).unwrap_or(at)].push(value);
        }
        let mut inside = 0;
        for inner in node.subgraphs() {
            let (bytes, missing) = peak(body, bindings, inner, depth + 1);
            inside = inside.max(bytes);
            inner_unsized += missing;
        }
        most = most.max(now.saturating_add(inside));
        for value in std::mem::take(&mut ending[at]) {
            now = now.saturating_sub(held[value.index()]);
        }
    }
    (most.max(now), unsized_values + inner_unsized)
}

#[cfg(test)]
mod tests;
