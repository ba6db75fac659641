//! Which constant results are worth storing.

use lathe_analysis::{Facts, Trait};
use lathe_ir::{AttributeValue, DataType, Function, Graph, Node, NodeId, Tensor, Use, ValueId, imported};
use std::collections::{BTreeMap, BTreeSet};

/// Operators that keep weights small or say how they are quantized: computing them ahead would undo just that.
const QUANTIZING: &[&str] = &["DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"];

/// Operators of ONNX Runtime's own domain that are functions of their inputs alone.
const CONTRIB: &[&str] = &["BiasGelu", "FastGelu", "FusedMatMul", "Gelu", "QuickGelu"];

/// Constants of up to this many bytes are not counted: the node that one replaces takes about as much.
const FREE: usize = 1024;

/// Nodes whose results are constants, and how large those are.
pub(super) struct Candidates {
    /// In an order in which each follows what it needs.
    pub nodes: Vec<NodeId>,
    /// Results that the facts already tell.
    pub told: BTreeMap<ValueId, Tensor>,
    /// Bytes of every result that is used, where they are known before it is computed.
    pub sizes: BTreeMap<ValueId, usize>,
    /// Results whose size is not known before they are computed.
    pub unsized_values: Vec<ValueId>,
    members: BTreeSet<NodeId>,
}

/// Whether a node computes the same result every time, from its inputs alone.
fn is_pure(graph: &Graph, node: &Node, opsets: &[(String, i64)], functions: &[Function]) -> bool {
    let op = node.op_type.as_str();
    let sequence = op.contains("Sequence") && op != "ReverseSequence" || op.starts_with("Optional");
    let known = if node.is_standard() {
        !Trait::Random.of(node) && !QUANTIZING.contains(&op) && !sequence
    } else {
        node.domain == "com.microsoft" && CONTRIB.contains(&op)
    };
    let same_domain =
        |f: &Function| f.domain == node.domain || (node.is_standard() && matches!(&*f.domain, "" | "ai.onnx"));
    let called = functions.iter().any(|f| f.name == node.op_type && same_domain(f));
    let passed = node.attributes.iter().any(|a| matches!(a.value, AttributeValue::Reference { .. }));
    let sparse = node.inputs().iter().flatten().any(|&v| {
        let value = graph.value(v);
        value.initializer().is_some() && graph.constant(v).is_none()
    });
    known && !called && !passed && !sparse && node.subgraphs().is_empty() && imported(opsets, &node.domain).is_some()
}

/// The elements of a value of whole numbers, where the facts tell all of them.
fn told(facts: &Facts, value: ValueId) -> Option<Tensor> {
    let dtype = facts.elem(value)?;
    if !matches!(dtype, DataType::Int64 | DataType::Int32 | DataType::Bool) {
        return None;
    }
    let (elements, dims) = (facts.contents(value)?.known()?, facts.sizes(value)?);
    if dims.iter().product::<usize>() != elements.len() {
        return None;
    }
    match dtype {
        DataType::Int64 => Some(Tensor::from_i64s(&dims, &elements)),
        _ => {
            // Whole numbers of 32 bits are exact in float64.
            elements.iter().all(|&e| i32::try_from(e).is_ok()).then_some(())?;
            Tensor::from_f64s(dtype, &dims, &elements.iter().map(|&e| e as f64).collect::<Vec<f64>>())
        }
    }
}

impl Candidates {
    /// Finds the candidates of a graph whose nodes are in order, without those in `blocked`.
    pub fn find(
        graph: &Graph,
        opsets: &[(String, i64)],
        functions: &[Function],
        facts: &Facts,
        blocked: &BTreeSet<NodeId>,
        done: &BTreeMap<ValueId, Tensor>,
    ) -> Candidates {
        let mut found = Candidates {
            nodes: Vec::new(),
            told: BTreeMap::new(),
            sizes: BTreeMap::new(),
            unsized_values: Vec::new(),
            members: BTreeSet::new(),
        };
        for id in graph.all_nodes() {
            let node = graph.node(id);
            if blocked.contains(&id) || !is_pure(graph, node, opsets, functions) {
                continue;
            }
            let used: Vec<ValueId> = found.used_outputs(graph, id).collect();
            let constant = |v: ValueId| {
                graph.constant(v).is_some() || graph.producer(v).is_some_and(|p| found.members.contains(&p))
            };
            let fed = !node.inputs().is_empty() || node.is("Constant");
            let computed = fed && node.inputs().iter().flatten().all(|&v| constant(v));
            if used.is_empty() {
                continue;
            }
            if !computed {
                let Some(all) = used.iter().map(|&v| Some((v, told(facts, v)?))).collect::<Option<Vec<_>>>() else {
                    continue;
                };
                found.told.extend(all);
            }
            for value in used {
                let stated = || {
                    facts
                        .elem(value)?
                        .byte_len(facts.sizes(value)?.iter().try_fold(1, |n: usize, &d| n.checked_mul(d))?)
                };
                let exact = found.told.get(&value).or_else(|| done.get(&value)).map(Tensor::byte_len);
                match exact.or_else(stated) {
                    Some(bytes) => _ = found.sizes.insert(value, bytes),
                    None => found.unsized_values.push(value),
                }
            }
            found.members.insert(id);
            found.nodes.push(id);
        }
        found
    }

    /// Whether the results of a node are constants.
    pub fn contains(&self, id: NodeId) -> bool {
        self.members.contains(&id)
    }

    fn used_outputs<'g>(&self, graph: &'g Graph, id: NodeId) -> impl Iterator<Item = ValueId> + 'g {
        graph.node(id).outputs().iter().flatten().copied().filter(|&v| !graph.value(v).uses().is_empty())
    }
}

/// A result that is not stored because it is too large.
pub(super) struct TooLarge {
    /// The node that goes on computing it.
    pub node: NodeId,
    /// Bytes by which storing it would enlarge the model.
    pub growth: u64,
}

/// What to do.
pub(super) struct Plan {
    /// Results to store.
    pub stored: Vec<ValueId>,
    /// Nodes that nothing needs then.
    pub removed: Vec<NodeId>,
    /// Initializers that nothing needs then.
    pub freed: Vec<ValueId>,
    /// Bytes by which the model grows, where it grows.
    pub growth: u64,
    /// What is left as it is.
    pub too_large: Vec<TooLarge>,
}

/// Chooses what to store so that the model grows by at most `budget` bytes.
///
/// A node is either kept or removed. Stored is every result of a removed node that something else needs: so a chain is
/// judged by what goes in and what comes out. A part of the graph that shrinks pays for itself, but for no other.
pub(super) fn plan(graph: &Graph, found: &Candidates, budget: u64) -> Plan {
    let mut planner = Planner { graph, found, kept: BTreeSet::new() };
    for &id in &found.nodes {
        let node = graph.node(id);
        // Only a node can produce an output, and the least one that can is already there.
        let copy =
            node.is("Constant") || node.is("Identity") && node.input(0).is_some_and(|v| graph.constant(v).is_some());
        if copy && node.outputs().iter().flatten().any(|&v| graph.is_output(v)) {
            planner.kept.insert(id);
        }
    }
    let mut too_large: Vec<TooLarge> = Vec::new();
    let mut refused: BTreeSet<NodeId> = BTreeSet::new();
    loop {
        let growths = planner.growths();
        let growth: u64 = growths.values().map(|&g| u64::try_from(g).unwrap_or(0)).sum();
        if growth <= budget {
            let stored = planner.stored();
            let removed: Vec<NodeId> = planner.removed().collect();
            return Plan { stored, freed: planner.freed(&removed), removed, growth, too_large };
        }
        let mut costs: Vec<(i128, ValueId)> =
            planner.stored().into_iter().filter(|&v| planner.weight(v) > 0).map(|v| (planner.cost(v), v)).collect();
        costs.sort_by_key(|&(cost, v)| (std::cmp::Reverse((cost, planner.weight(v))), v));
        let mut left = i128::from(growth);
        for (place, (cost, value)) in costs.into_iter().enumerate() {
            if (cost <= 0 && place > 0) || left <= i128::from(budget) {
                break;
            }
            left -= cost;
            let Some(node) = graph.producer(value) else { continue };
            planner.kept.insert(node);
            // What only a refused result needs is part of the same refusal.
            let inner =
                graph.value(value).uses().iter().all(|u| matches!(u, Use::Node(user, _) if refused.contains(user)));
            refused.insert(node);
            if !inner {
                too_large.push(TooLarge { node, growth: cost.max(0) as u64 });
            }
        }
    }
}

struct Planner<'a> {
    graph: &'a Graph,
    found: &'a Candidates,
    /// Candidates that stay in the graph. Their results may still be used to compute others.
    kept: BTreeSet<NodeId>,
}

impl Planner<'_> {
    fn is_removed(&self, id: NodeId) -> bool {
        self.found.contains(id) && !self.kept.contains(&id)
    }

    fn removed(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.found.nodes.iter().copied().filter(|&id| self.is_removed(id))
    }

    /// Whether something that stays needs a value.
    fn needed(&self, value: ValueId) -> bool {
        let outside = |u: &Use| !matches!(u, Use::Node(user, _) if self.is_removed(*user));
        self.graph.value(value).uses().iter().any(outside)
    }

    fn stored(&self) -> Vec<ValueId> {
        let results = self.removed().flat_map(|id| self.graph.node(id).outputs().iter().flatten().copied());
        results.filter(|&v| self.needed(v)).collect()
    }

    /// What storing a result, or an initializer that is there, counts for, in bytes.
    fn weight(&self, value: ValueId) -> i128 {
        let stored = || self.graph.constant(value).map(Tensor::byte_len);
        let bytes = self.found.sizes.get(&value).copied().or_else(stored).unwrap_or(0);
        if bytes <= FREE { 0 } else { bytes as i128 }
    }

    /// Bytes of the constants in a node's attributes.
    fn attribute_bytes(&self, id: NodeId) -> i128 {
        let tensor = |value: &AttributeValue| if let AttributeValue::Tensor(t) = value { t.byte_len() } else { 0 };
        self.graph.node(id).attributes.iter().map(|a| tensor(&a.value) as i128).sum()
    }

    /// The initializers that only nodes of `removed` use.
    fn freed(&self, removed: &[NodeId]) -> Vec<ValueId> {
        let gone: BTreeSet<NodeId> = removed.iter().copied().collect();
        let inputs = removed.iter().flat_map(|&id| self.graph.node(id).inputs().iter().flatten().copied());
        let constants: BTreeSet<ValueId> = inputs.filter(|&v| self.graph.constant(v).is_some()).collect();
        let only_here = |v: &ValueId| {
            self.graph.value(*v).uses().iter().all(|u| matches!(u, Use::Node(user, _) if gone.contains(user)))
        };
        constants.into_iter().filter(only_here).collect()
    }

    /// By how many bytes each connected part of the removed nodes makes the model grow, by one node of the part.
    fn growths(&self) -> BTreeMap<NodeId, i128> {
        let removed: Vec<NodeId> = self.removed().collect();
        let mut parts = Parts::default();
        for &id in &removed {
            parts.find(id);
            for &value in self.graph.node(id).inputs().iter().flatten() {
                if let Some(producer) = self.graph.producer(value).filter(|&p| self.is_removed(p)) {
                    parts.join(id, producer);
                }
            }
        }
        let freed = self.freed(&removed);
        for &value in &freed {
            let mut users = self.graph.value(value).uses().iter().filter_map(user);
            if let Some(first) = users.next() {
                users.for_each(|other| parts.join(first, other));
            }
        }
        let mut growths: BTreeMap<NodeId, i128> = BTreeMap::new();
        for id in removed {
            *growths.entry(parts.find(id)).or_default() -= self.attribute_bytes(id);
        }
        for value in self.stored() {
            if let Some(producer) = self.graph.producer(value) {
                *growths.entry(parts.find(producer)).or_default() += self.weight(value);
            }
        }
        for value in freed {
            if let Some(first) = self.graph.value(value).uses().iter().find_map(user) {
                *growths.entry(parts.find(first)).or_default() -= self.weight(value);
            }
        }
        growths
    }

    /// By how many bytes the model is larger for storing `value`, compared with computing it: its own, less everything
    /// that only it needs.
    fn cost(&self, value: ValueId) -> i128 {
        let Some(producer) = self.graph.producer(value) else { return 0 };
        let mut own: Vec<NodeId> = vec![producer];
        let mut members: BTreeSet<NodeId> = BTreeSet::from([producer]);
        let mut shared: BTreeSet<ValueId> = BTreeSet::new();
        let mut next = 0;
        while let Some(&id) = own.get(next) {
            next += 1;
            for &input in self.graph.node(id).inputs().iter().flatten() {
                let Some(source) = self.graph.producer(input).filter(|&p| self.is_removed(p)) else { continue };
                let results = self.graph.node(source).outputs().iter().flatten();
                let mut uses = results.flat_map(|&v| self.graph.value(v).uses());
                if uses.all(|u| matches!(u, Use::Node(user, _) if members.contains(user))) {
                    shared.remove(&input);
                    if members.insert(source) {
                        own.push(source);
                    }
                } else {
                    shared.insert(input);
                }
            }
        }
        let others = self.graph.node(producer).outputs().iter().flatten().filter(|&&v| self.needed(v));
        let own_bytes: i128 = others.map(|&v| self.weight(v)).sum();
        let freed: i128 = self.freed(&own).into_iter().map(|v| self.weight(v)).sum();
        let attributes: i128 = own.iter().map(|&id| self.attribute_bytes(id)).sum();
        let members = &members;
        let inside = |v: ValueId| self.graph.producer(v).is_some_and(|p| members.contains(&p));
        let stored_anyway: i128 =
            shared.iter().filter(|&&v| !inside(v) && !self.needed(v)).map(|&v| self.weight(v)).sum();
        own_bytes - freed - attributes - stored_anyway
    }
}

fn user(place: &Use) -> Option<NodeId> {
    match place {
        Use::Node(node, _) => Some(*node),
        _ => None,
    }
}

/// Disjoint sets of nodes.
#[derive(Default)]
struct Parts {
    parents: BTreeMap<NodeId, NodeId>,
}

impl Parts {
    fn find(&mut self, id: NodeId) -> NodeId {
        let mut at = id;
        while let Some(&parent) = self.parents.get(&at).filter(|&&parent| parent != at) {
            // Halving the path keeps later searches short.
            let above = self.parents.get(&parent).copied().unwrap_or(parent);
            self.parents.insert(at, above);
            at = above;
        }
        self.parents.entry(at).or_insert(at);
        at
    }

    fn join(&mut self, a: NodeId, b: NodeId) {
        let (a, b) = (self.find(a), self.find(b));
        self.parents.insert(a.max(b), a.min(b));
    }
}
