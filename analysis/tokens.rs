//! Tokens: which axes of values count them, from one value of the main graph on, and where that stops being so.
//!
//! What follows tokens treats each by itself (layers along other axes, element-wise operators, normalizations), lets
//! them attend to one another, averages them, or picks the first few. Tokens can then be fewer without anything else
//! having to change but sizes that are written down, the attention's weight of a token that stands for several, and
//! averages. Anything else blocks: windows and grids divide the tokens, tables of positions have a number for each.

mod step;
#[cfg(test)]
mod tests;

use crate::{DimExpr, Facts};
use lathe_ir::{Graph, Model, NodeId, ScopeId, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Where the tokens of a value are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenAxes {
    /// The axes, rising; two in the scores of an attention.
    pub axes: Vec<usize>,
    /// How many tokens at the front were left out.
    pub skipped: usize,
    /// Whether the value is weights of an attention, which sum to 1 over the last axis.
    pub weights: bool,
}

/// Tokens attend to one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenAttention {
    /// The softmax over the scores, or the operator that does it all.
    pub node: NodeId,
    /// What scores and the weighted sum are computed from.
    pub keys: Keys,
}

/// The keys of an attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keys {
    /// A value of four axes, heads second: the axis of the tokens is 2 or 3.
    Heads(ValueId, usize),
    /// A value `[batch, tokens, heads · size]`, with the number of heads.
    Flat(ValueId, i64),
    /// The operator multiplies this value with its packed weight for queries, keys and values.
    Packed(ValueId),
}

/// A use that does not go on with fewer tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBlock {
    /// Where.
    pub place: Use,
    /// What is used there.
    pub value: ValueId,
    /// Why.
    pub reason: &'static str,
}

/// What happens to tokens from one value on.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// How many there are.
    pub count: usize,
    /// How many at the front are picked by their position.
    pub picked: usize,
    /// The nodes that read tokens, in the order they run.
    pub nodes: Vec<NodeId>,
    /// Where tokens attend to one another, in that order.
    pub attentions: Vec<TokenAttention>,
    /// Nodes that average over tokens.
    pub averages: Vec<NodeId>,
    /// Where following them ends otherwise.
    pub blocks: Vec<TokenBlock>,
    axes: BTreeMap<ValueId, TokenAxes>,
}

/// What every step needs.
struct Cx<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    opset: i64,
}

impl Tokens {
    /// Follows the tokens of `from`, a value `[batch, tokens, features]` of the main graph, but not into `stops`. The
    /// error says why there is nothing to follow.
    pub fn follow(model: &Model, facts: &Facts, from: ValueId, stops: &BTreeSet<Use>) -> Result<Tokens, &'static str> {
        let graph = &model.graph;
        let shape = facts.shape(from).ok_or("the shape of the stream is not known")?;
        let [_, count, _] = shape else { return Err("the stream does not have three axes: batch, tokens, features") };
        let count = count.as_known().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 1);
        let count = count.ok_or("the number of tokens is not fixed")?;
        let order = graph.sorted(ScopeId::MAIN).map_err(|_| "the nodes form a cycle")?;
        let axes = BTreeMap::from([(from, TokenAxes { axes: vec![1], skipped: 0, weights: false })]);
        let (nodes, attentions, averages, blocks) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut tokens = Tokens { count, picked: 0, nodes, attentions, averages, blocks, axes };
        let cx = Cx { graph, facts, opset: model.opset() };
        for id in order {
            let node = graph.node(id);
            for value in node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope)) {
                if tokens.axes.contains_key(&value) {
                    tokens.block(Use::Node(id, usize::MAX), value, "a subgraph reads the tokens");
                }
            }
            let reads = |index: &usize| {
                let value = node.input(*index).filter(|v| tokens.axes.contains_key(v));
                value.filter(|_| !stops.contains(&Use::Node(id, *index)))
            };
            let Some((first, value)) = (0..node.inputs().len()).find_map(|i| reads(&i).map(|v| (i, v))) else {
                continue;
            };
            match step::step(&mut tokens, &cx, id) {
                Ok(outputs) => {
                    tokens.nodes.push(id);
                    for (index, found) in outputs {
                        if let Some(output) = node.output(index) {
                            tokens.axes.insert(output, found);
                        }
                    }
                }
                Err(reason) => tokens.block(Use::Node(id, first), value, reason),
            }
        }
        for (index, &value) in graph.main().outputs().iter().enumerate() {
            let place = Use::Output(ScopeId::MAIN, index);
            if tokens.axes.contains_key(&value) && !stops.contains(&place) {
                tokens.block(place, value, "an output of the model has a row per token");
            }
        }
        Ok(tokens)
    }

    /// Where the tokens of a value are; `None` if it has none.
    pub fn of(&self, value: ValueId) -> Option<&TokenAxes> {
        self.axes.get(&value)
    }

    /// Every value with tokens.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &TokenAxes)> {
        self.axes.iter().map(|(value, axes)| (*value, axes))
    }

    fn block(&mut self, place: Use, value: ValueId, reason: &'static str) {
        self.blocks.push(TokenBlock { place, value, reason });
    }
}

/// Where an axis of a tensor is after its sizes were grouped otherwise; `None` if it was divided or joined.
pub fn kept_axis(from: &[DimExpr], to: &[DimExpr], axis: usize) -> Option<usize> {
    let before = crate::dim::product(&from[..axis])?;
    (0..to.len()).find(|&at| to[at] == from[axis] && crate::dim::product(&to[..at]).is_some_and(|p| p == before))
}
