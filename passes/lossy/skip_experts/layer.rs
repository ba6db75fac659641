//! Layers of experts whose rows are grouped, and what leaves pairs of a token and an expert out of them.

use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{DataType, Graph, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A layer of experts as `group-experts` writes it.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// The number of the expert of every pair: `[pairs]`.
    numbers: ValueId,
    /// The TopK that puts pairs in the order of their experts.
    sort: NodeId,
    /// The places of the sorted pairs: `[pairs]`.
    order: ValueId,
    /// What counts the rows of every expert starts from the numbers as a column: `[pairs, 1]`.
    column: NodeId,
    /// Compares the column with the experts' numbers, `[1, experts]`.
    hits: NodeId,
    /// Hand every expert its rows.
    splits: Vec<NodeId>,
    /// Joins the results of the experts.
    join: NodeId,
    /// What the router multiplies the result of every pair with: `[pairs, 1]`.
    weights: ValueId,
    /// The weighted results of the pairs.
    pub result: ValueId,
    pub experts: usize,
    /// How many experts every token has.
    pub slots: usize,
    /// What works on the rows of experts.
    pub nodes: BTreeSet<NodeId>,
}

/// Which pairs are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Skip {
    /// Those that the router gives no larger weight.
    Below(f32),
    /// Those beyond the first so many of every token.
    Slots(usize),
    /// Those of these experts, which go.
    Experts(Vec<usize>),
}

/// The layers of the main graph.
pub(super) fn layers(model: &Model) -> Vec<Layer> {
    let facts = Facts::infer(model);
    let graph = &model.graph;
    graph.nodes(ScopeId::MAIN).filter_map(|id| Layer::at(graph, &facts, id)).collect()
}

/// The one node of this operator among the readers of a value.
fn reader(graph: &Graph, value: ValueId, op: &str) -> Option<NodeId> {
    let mut all = readers(graph, value).into_iter().filter(|&id| graph.node(id).is(op));
    all.next().filter(|_| all.next().is_none())
}

fn readers(graph: &Graph, value: ValueId) -> BTreeSet<NodeId> {
    let nodes = graph.value(value).uses().iter().filter_map(|place| match place {
        Use::Node(id, _) => Some(*id),
        _ => None,
    });
    nodes.collect()
}

impl Layer {
    /// The layer whose pairs a TopK sorts.
    fn at(graph: &Graph, facts: &Facts, sort: NodeId) -> Option<Layer> {
        let node = graph.node(sort);
        let sorts = node.is("TopK") && node.int("axis") == Some(0) && node.int("largest") == Some(0);
        let numbers = node.input(0).filter(|_| sorts)?;
        let order = node.output(1)?;
        let given = |id: NodeId| graph.node(id).output(0);
        let column = readers(graph, numbers).into_iter().find_map(|id| {
            let hits = graph.node(id).is("Unsqueeze").then(|| reader(graph, given(id)?, "Equal"))??;
            Some((id, hits))
        });
        let (column, hits) = column?;
        let experts = graph.constant(graph.node(hits).input(1)?)?.len();
        let ones = reader(graph, given(hits)?, "Cast")?;
        let counts = given(reader(graph, given(ones)?, "ReduceSum")?)?;
        let splits: Vec<NodeId> = readers(graph, counts).into_iter().collect();
        let fits = |id: &NodeId| graph.node(*id).is("Split") && graph.node(*id).outputs().len() == experts;
        (!splits.is_empty() && splits.iter().all(fits)).then_some(())?;
        let places = given(reader(graph, order, "Unsqueeze")?)?;
        let scatter = reader(graph, places, "ScatterND")?;
        let join = graph.producer(graph.node(scatter).input(2)?)?;
        (graph.node(join).is("Concat") && graph.node(join).inputs().len() == experts).then_some(())?;
        let mut result = given(scatter)?;
        if let Some(shaped) = reader(graph, result, "Reshape") {
            result = given(shaped)?;
        }
        let weighting = reader(graph, result, "Mul")?;
        let weights = graph.node(weighting).inputs().iter().flatten().copied().find(|&v| v != result)?;
        (matches!(facts.shape(weights)?, [_, one] if one.as_known() == Some(1))).then_some(())?;
        let slots = slots(graph, facts, numbers)?;
        let nodes = between(graph, join, &splits)?;
        let result = given(weighting)?;
        Some(Layer { numbers, sort, order, column, hits, splits, join, weights, result, experts, slots, nodes })
    }

    /// As reports call it.
    pub(super) fn name(&self, graph: &Graph) -> String {
        format!("experts of `{}`", graph.value(self.numbers).name)
    }

    /// Adds what says of every pair whether it stays, `[pairs, 1]`, true or false.
    pub(super) fn keep(&self, graph: &mut Graph, facts: &Facts, skip: &Skip) -> ValueId {
        let base = format!("{}_keep", graph.value(self.numbers).name);
        let constant = |graph: &mut Graph, tensor: Tensor| graph.add_initializer(ScopeId::MAIN, &base, tensor);
        let append =
            |graph: &mut Graph, node: Node, inputs: &[ValueId]| graph.append(ScopeId::MAIN, node, inputs, &base);
        match skip {
            Skip::Below(threshold) => {
                let elem = facts.elem(self.weights).unwrap_or(DataType::Float);
                let limit = Tensor::from_f64s(elem, &[], &[f64::from(*threshold)]);
                let limit = constant(graph, limit.unwrap_or_else(|| Tensor::from_f32s(&[], &[*threshold])));
                append(graph, Node::new("Greater"), &[self.weights, limit])
            }
            Skip::Slots(kept) => {
                // The pairs of a token lie together: [tokens, slots].
                let allowed: Vec<bool> = (0..self.slots).map(|slot| slot < *kept).collect();
                let allowed = constant(graph, Tensor::from_bools(&[1, self.slots], &allowed));
                let table = constant(graph, Tensor::int64s(&[-1, self.slots as i64]));
                let line = constant(graph, Tensor::int64s(&[-1, 1]));
                let numbers = append(graph, Node::new("Reshape"), &[self.numbers, table]);
                let size = append(graph, Node::new("Shape"), &[numbers]);
                let allowed = append(graph, Node::new("Expand"), &[allowed, size]);
                append(graph, Node::new("Reshape"), &[allowed, line])
            }
            Skip::Experts(gone) => {
                let stays: Vec<bool> = (0..self.experts).map(|expert| !gone.contains(&expert)).collect();
                let stays = constant(graph, Tensor::from_bools(&[self.experts], &stays));
                let line = constant(graph, Tensor::int64s(&[-1, 1]));
                let kept = append(graph, Node::new("Gather").with("axis", 0), &[stays, self.numbers]);
                append(graph, Node::new("Reshape"), &[kept, line])
            }
        }
    }

    /// Leaves out the pairs that `keep`, `[pairs, 1]`, does not name: no expert gets them, and they add nothing.
    pub(super) fn leave_out(&self, graph: &mut Graph, keep: ValueId) {
        let base = graph.value(self.numbers).name.clone();
        let name = |what: &str| format!("{base}_{what}");
        let flat = graph.add_initializer(ScopeId::MAIN, &name("flat"), Tensor::int64s(&[-1]));
        let first = graph.add_initializer(ScopeId::MAIN, &name("first"), Tensor::int64s(&[0]));
        let nobody = Tensor::from_i64s(&[], &[self.experts as i64]);
        let nobody = graph.add_initializer(ScopeId::MAIN, &name("nobody"), nobody);
        let keep = graph.append(ScopeId::MAIN, Node::new("Reshape"), &[keep, flat], &name("kept"));
        let numbers = [keep, self.numbers, nobody];
        let numbers = graph.append(ScopeId::MAIN, Node::new("Where"), &numbers, &name("served"));
        graph.set_input(self.sort, 0, Some(numbers));
        graph.set_input(self.column, 0, Some(numbers));
        // Pairs of nobody come last in the order: it ends before them.
        let cast = Node::new("Cast").with("to", i64::from(DataType::Int64.code()));
        let ones = graph.append(ScopeId::MAIN, cast, &[keep], &name("kept_ones"));
        let sum = Node::new("ReduceSum").with("keepdims", 1);
        let count = graph.append(ScopeId::MAIN, sum, &[ones, first], &name("kept_count"));
        let readers: Vec<(NodeId, usize)> = graph
            .value(self.order)
            .uses()
            .iter()
            .filter_map(|place| match place {
                Use::Node(id, index) => Some((*id, *index)),
                _ => None,
            })
            .collect();
        let inputs = [self.order, first, count, first];
        let order = graph.append(ScopeId::MAIN, Node::new("Slice"), &inputs, &name("kept_order"));
        for (id, index) in readers {
            graph.set_input(id, index, Some(order));
        }
    }

    /// Takes experts that no pair has any more out of the layer.
    fn drop_experts(&self, graph: &mut Graph, gone: &[usize]) {
        let stays: Vec<usize> = (0..self.experts).filter(|expert| !gone.contains(expert)).collect();
        let name = format!("{}_experts", graph.value(self.numbers).name);
        let numbers: Vec<i64> = stays.iter().map(|&expert| expert as i64).collect();
        let numbers = graph.add_initializer(ScopeId::MAIN, &name, Tensor::from_i64s(&[1, numbers.len()], &numbers));
        graph.set_input(self.hits, 1, Some(numbers));
        let ends = graph.node(self.join).inputs().to_vec();
        graph.set_inputs(self.join, stays.iter().map(|&expert| ends[expert]).collect());
        let unused: Vec<NodeId> = gone.iter().filter_map(|&expert| graph.producer(ends[expert]?)).collect();
        graph.remove_unused(unused);
        for &split in &self.splits {
            let node = graph.node(split).clone();
            let (inputs, parts) = (node.inputs().to_vec(), node.outputs().to_vec());
            let mut outputs = Vec::new();
            for &expert in &stays {
                let Some(part) = parts[expert] else { continue };
                let base = graph.value(part).name.clone();
                let new = graph.fresh_name(&base);
                outputs.push((part, graph.add_value(new, None)));
            }
            let mut plain = Node::new("Split");
            plain.attributes = node.attributes.clone();
            plain.name = node.name.clone();
            graph.add_node(ScopeId::MAIN, plain, inputs, outputs.iter().map(|&(_, new)| Some(new)).collect());
            for (old, new) in outputs {
                graph.replace_uses(old, new);
            }
            graph.remove_node(split);
        }
    }

    /// Carries a choice out.
    pub(super) fn apply(&self, model: &mut Model, skip: &Skip) -> Result<(), lathe_ir::Cycle> {
        let facts = Facts::infer(model);
        let graph = &mut model.graph;
        let keep = self.keep(graph, &facts, skip);
        self.leave_out(graph, keep);
        if let Skip::Experts(gone) = skip {
            self.drop_experts(graph, gone);
        }
        graph.sort()
    }

    /// Adds a number as an input: pairs with a weight no larger than it are left out.
    pub(super) fn gate_threshold(&self, model: &mut Model, name: &str) -> Result<String, lathe_ir::Cycle> {
        let facts = Facts::infer(model);
        let (graph, input) = gate(model, name);
        let mut limit = input;
        if let Some(other) = facts.elem(self.weights).filter(|&elem| elem != DataType::Float) {
            let cast = Node::new("Cast").with("to", i64::from(other.code()));
            limit = graph.append(ScopeId::MAIN, cast, &[input], name);
        }
        let keep = graph.append(ScopeId::MAIN, Node::new("Greater"), &[self.weights, limit], name);
        self.leave_out(graph, keep);
        graph.sort()?;
        Ok(graph.value(input).name.clone())
    }

    /// Adds a number as an input: pairs of the expert that it names are left out.
    pub(super) fn gate_expert(&self, model: &mut Model, name: &str) -> Result<String, lathe_ir::Cycle> {
        let (graph, input) = gate(model, name);
        let cast = Node::new("Cast").with("to", i64::from(DataType::Float.code()));
        let numbers = graph.append(ScopeId::MAIN, cast, &[self.numbers], name);
        let gone = graph.append(ScopeId::MAIN, Node::new("Equal"), &[numbers, input], name);
        let keep = graph.append(ScopeId::MAIN, Node::new("Not"), &[gone], name);
        self.leave_out(graph, keep);
        graph.sort()?;
        Ok(graph.value(input).name.clone())
    }

    /// The weights of the router, as a value whose spread tells thresholds.
    pub(super) fn weights_name(&self, graph: &Graph) -> String {
        graph.value(self.weights).name.clone()
    }
}

/// A new input of one number.
fn gate<'a>(model: &'a mut Model, name: &str) -> (&'a mut Graph, ValueId) {
    let graph = &mut model.graph;
    let name = graph.fresh_name(name);
    let input = graph.add_value(name, Some(lathe_ir::Type::tensor(DataType::Float, Vec::new())));
    graph.add_input(ScopeId::MAIN, input);
    (graph, input)
}

/// How many experts a token has: numbers are the flat indices of a TopK.
fn slots(graph: &Graph, facts: &Facts, numbers: ValueId) -> Option<usize> {
    let node = graph.node(graph.producer(numbers)?);
    let ids = node.input(0).filter(|_| node.is("Reshape"))?;
    let top = graph.node(graph.producer(ids)?);
    (top.is("TopK") && top.output(1) == Some(ids)).then_some(())?;
    let size = facts.shape(ids)?.last().and_then(DimExpr::as_known)?;
    usize::try_from(size).ok()
}

/// The nodes between the rows of the experts and what joins their results.
fn between(graph: &Graph, join: NodeId, splits: &[NodeId]) -> Option<BTreeSet<NodeId>> {
    let mut nodes = BTreeSet::new();
    let mut open: Vec<ValueId> = graph.node(join).inputs().iter().flatten().copied().collect();
    while let Some(value) = open.pop() {
        if graph.constant(value).is_some() {
            continue;
        }
        let id = graph.producer(value)?;
        if !splits.contains(&id) && nodes.insert(id) {
            open.extend(graph.node(id).inputs().iter().flatten());
        }
    }
    Some(nodes)
}
