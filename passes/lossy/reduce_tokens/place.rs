//! Where tokens can become fewer, and what then has to change.

use crate::lossy::regions::{ends_of, held_by};
use lathe_analysis::{Facts, Keys, Tokens, UnitKind, Units, find_downstream};
use lathe_ir::{DataType, Graph, Model, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Uses that get all tokens back, at most; more are no head but another network.
const MOST_RESTORED: usize = 16;

/// A value of the stream after which there can be fewer tokens.
pub(super) struct Cut {
    /// The stream after an attention.
    pub stream: ValueId,
    /// The keys of that attention, which tell tokens apart.
    pub keys: Keys,
    /// The attention.
    pub node: NodeId,
    /// Features of the stream.
    pub width: usize,
}

/// Where ONNX Runtime keeps its own operators.
pub(super) const CONTRIB: &str = "com.microsoft";

/// A use that needs a row for every token there was.
pub(super) struct Restore {
    pub place: Use,
    pub value: ValueId,
}

/// A chain of attentions over the same tokens.
pub(super) struct Chain {
    /// The stream before the first attention.
    pub from: ValueId,
    pub tokens: Tokens,
    pub cuts: Vec<Cut>,
    pub restores: Vec<Restore>,
    /// Tokens at the front that stay as they are.
    pub protected: usize,
}

/// What is asked of chains.
#[derive(Clone, Copy)]
pub(super) struct TokenOptions {
    /// Whether heads that need every token get all of them back.
    pub restore: bool,
    /// Tokens at the front that stay as they are; `None` for those that the model picks.
    pub protected: Option<usize>,
}

/// Every chain of attentions, or where one begins and why its tokens stay.
pub(super) fn chains(model: &Model, token_options: TokenOptions) -> Vec<Result<Chain, (String, &'static str)>> {
    let facts = Facts::infer(model);
    let units = Units::find(model, &facts);
    let mut found = Vec::new();
    for chain in units.chains() {
        let attentions = || chain.iter().map(|&id| units.get(id)).filter(|unit| unit.kind == UnitKind::Attention);
        let Some(first) = attentions().next() else { continue };
        let place = format!("`{}`", model.graph.value(first.stream_in).name);
        let owns = |unit: &lathe_analysis::Unit, node: NodeId| unit.nodes.contains(&node) || unit.join == node;
        let made = follow(model, &facts, first.stream_in, token_options).and_then(|(tokens, restores)| {
            let mut cuts = Vec::new();
            for unit in attentions() {
                let stream = unit.stream_out;
                let whole = tokens.of(stream).is_some_and(|t| t.axes == [1] && t.skipped == 0);
                let own = tokens.attentions.iter().find(|a| owns(unit, a.node));
                let width = facts.shape(stream).and_then(|s| usize::try_from(s.last()?.as_known()?).ok());
                if let (true, Some(attention), Some(width)) = (whole, own, width) {
                    cuts.push(Cut { stream, keys: attention.keys.clone(), node: attention.node, width });
                }
            }
            let protected = token_options.protected.unwrap_or(0).max(tokens.picked);
            let chain = Chain { from: first.stream_in, tokens, cuts, restores, protected };
            chain.check(model, &facts)?;
            Ok(chain)
        });
        found.push(made.map_err(|reason| (place, reason)));
    }
    found
}

/// Follows tokens to the end of the model; uses behind the last attention that need them all are listed.
fn follow(
    model: &Model,
    facts: &Facts,
    from: ValueId,
    token_options: TokenOptions,
) -> Result<(Tokens, Vec<Restore>), &'static str> {
    let graph = &model.graph;
    let mut stops: BTreeSet<Use> = BTreeSet::new();
    let mut restores = Vec::new();
    loop {
        let tokens = Tokens::follow(model, facts, from, &stops)?;
        let Some(block) = tokens.blocks.first() else { return Ok((tokens, restores)) };
        if !token_options.restore || restores.len() == MOST_RESTORED {
            return Err(block.reason);
        }
        // Back to where tokens are rows.
        let (mut place, mut value) = (block.place, block.value);
        loop {
            let whole = tokens.of(value).is_some_and(|t| t.axes == [1] && t.skipped == 0);
            if whole && facts.ndim(value) == Some(3) {
                break;
            }
            let maker = graph.producer(value).ok_or(block.reason)?;
            let inputs = graph.node(maker).inputs();
            let mut reads = (0..inputs.len()).filter(|&i| inputs[i].is_some_and(|v| tokens.of(v).is_some()));
            let (Some(index), None) = (reads.next(), reads.next()) else { return Err(block.reason) };
            (place, value) = (Use::Node(maker, index), inputs[index].expect("it was just seen"));
        }
        if matches!(place, Use::Node(id, _) if leads_to_attention(graph, id)) || !stops.insert(place) {
            return Err(block.reason);
        }
        restores.push(Restore { place, value });
    }
}

/// Whether anything that a node computes, by itself or further on, is an attention.
fn leads_to_attention(graph: &Graph, from: NodeId) -> bool {
    let is_attention = |id: NodeId| {
        let node = graph.node(id);
        let mut uses = node.outputs().iter().flatten().flat_map(|&v| graph.value(v).uses()).filter_map(super::reader);
        node.op_type.ends_with("Attention") || (node.is("Softmax") && uses.any(|id| graph.node(id).is("MatMul")))
    };
    find_downstream(graph, from, is_attention).is_some()
}

impl Chain {
    fn check(&self, model: &Model, facts: &Facts) -> Result<(), &'static str> {
        if self.cuts.is_empty() {
            return Err("no attention of the tokens to one another was found");
        }
        if self.cuts.iter().any(|cut| facts.elem(cut.stream) != Some(DataType::Float)) {
            return Err("the stream is not float32");
        }
        if self.protected + 4 > self.tokens.count {
            return Err("all but a few tokens are picked by their position");
        }
        let batch = |value: ValueId| facts.shape(value).and_then(|shape| shape.first().cloned());
        let packed = |keys: &Keys| match *keys {
            Keys::Heads(value, _) | Keys::Flat(value, _) | Keys::Packed(value) => value,
        };
        if self.cuts.iter().any(|cut| batch(packed(&cut.keys)) != batch(cut.stream)) {
            return Err("the first axis of an attention is not the batch");
        }
        for cut in self.cuts.iter().filter(|cut| matches!(cut.keys, Keys::Packed(_))) {
            let node = model.graph.node(cut.node);
            let heads = node.int("num_heads").and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
            let part = |index: usize| mean_part(model.graph.constant(node.input(index)?)?, heads);
            let equal = node.attribute("qkv_hidden_sizes").is_none() && part(1).is_some();
            if !equal || node.input(2).is_some() && part(2).is_none() {
                return Err("the weight of an attention is no constant of three equal parts");
            }
        }
        let all: Vec<usize> = (0..self.cuts.len()).collect();
        self.stages(&model.graph, &all).map(|_| ())
    }

    /// How many of the cuts that are made (`active`, rising) every value with tokens comes after.
    pub fn stages(&self, graph: &Graph, active: &[usize]) -> Result<BTreeMap<ValueId, usize>, &'static str> {
        let mut stages: BTreeMap<ValueId, usize> = BTreeMap::new();
        for &id in &self.tokens.nodes {
            let node = graph.node(id);
            let mut stage = None;
            for (index, value) in node.inputs().iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?))) {
                let stopped = self.restores.iter().any(|r| r.place == Use::Node(id, index));
                if stopped || self.tokens.of(value).is_none() {
                    continue;
                }
                let own = stages.get(&value).copied().unwrap_or(0);
                if *stage.get_or_insert(own) != own {
                    return Err("tokens from before an attention meet those from after it, past its sum");
                }
            }
            for &output in node.outputs().iter().flatten().filter(|v| self.tokens.of(**v).is_some()) {
                // The normalization of a sum in the same node is made of the stream, and comes after it.
                let own = |&at: &usize| [Some(output), node.output(3)].contains(&Some(self.cuts[at].stream));
                let made = active.iter().position(own);
                stages.insert(output, made.map_or(stage.unwrap_or(0), |made| made + 1));
            }
        }
        Ok(stages)
    }

    /// Everything from the first attention on: nodes that depend on its stream, in order.
    pub fn nodes(&self, graph: &Graph) -> Vec<NodeId> {
        let mut made: BTreeSet<ValueId> = BTreeSet::from([self.from]);
        let mut nodes = Vec::new();
        for id in graph.sorted(ScopeId::MAIN).unwrap_or_default() {
            let node = graph.node(id);
            if node.inputs().iter().flatten().any(|v| made.contains(v)) {
                made.extend(node.outputs().iter().flatten());
                nodes.push(id);
            }
        }
        nodes
    }

    /// What these nodes read that is constant, and what they give.
    pub fn footprint(&self, graph: &Graph) -> Vec<ValueId> {
        held_by(graph, &self.nodes(graph))
    }

    /// The outputs of the model that these nodes give.
    pub fn ends(&self, graph: &Graph) -> Vec<ValueId> {
        ends_of(graph, &self.nodes(graph))
    }
}

/// The middle third of the last axis, where the keys are, as the mean over heads; `None` if it does not divide.
pub(super) fn mean_part(packed: &Tensor, heads: usize) -> Option<Tensor> {
    let numbers = packed.to_f32s()?;
    let (&width, before) = packed.dims().split_last()?;
    let size = width.checked_div(3 * heads).filter(|&size| size > 0 && size * 3 * heads == width)?;
    let row = |row: &[f32]| -> Vec<f32> {
        let at = |head: usize, i: usize| row[width / 3 + head * size + i];
        (0..size).map(|i| (0..heads).map(|head| at(head, i)).sum::<f32>() / heads as f32).collect()
    };
    let mean: Vec<f32> = numbers.chunks(width).flat_map(row).collect();
    Some(Tensor::from_f32s(&[before, &[size]].concat(), &mean))
}
