//! Which tokens are visual, what looks at them, and whether what follows works with fewer.

use crate::lossy::regions::ends_of;
use lathe_analysis::{Facts, Tokens, UnitKind, Units, downstream, upstream};
use lathe_ir::{DataType, Graph, Model, NodeId, ScopeId, ValueId};
use std::collections::BTreeSet;

/// Which tokens are visual, as settings say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Span {
    /// Nobody says.
    None,
    /// So many from a position of the stream on.
    At(usize, usize),
    /// The rows of a value.
    Value(String),
}

impl std::str::FromStr for Span {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text.is_empty() {
            return Ok(Span::None);
        }
        let numbers = text.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match numbers {
            Some((_, 0)) => Err(()),
            Some((start, length)) => Ok(Span::At(start, length)),
            None => Ok(Span::Value(text.to_owned())),
        }
    }
}

/// Visual tokens in a stream.
pub(super) struct Place {
    /// The stream before the first attention, `[batch, tokens, width]`.
    pub stream: ValueId,
    pub tokens: Tokens,
    pub start: usize,
    pub length: usize,
    /// Parts of equal length that are chosen from by themselves.
    pub frames: usize,
    /// Weights of an attention over the tokens of a part, `[batch · frames, heads, n, n]`, and how many of its tokens come
    /// before them.
    pub weights: ValueId,
    pub front: usize,
}

/// Finds the visual tokens, or says why they stay.
pub(super) fn place(model: &Model, span: &Span, frames: usize) -> Result<Place, &'static str> {
    let facts = Facts::infer(model);
    let units = Units::find(model, &facts);
    let mut reason = "no attention over a fixed number of tokens, these among them, was found";
    let streams = units.chains().iter().filter_map(|chain| {
        let mut all = chain.iter().map(|&id| units.get(id));
        all.find(|unit| unit.kind == UnitKind::Attention).map(|unit| unit.stream_in)
    });
    for stream in streams {
        match within(model, &facts, stream, span, frames) {
            Ok(Some(place)) => return Ok(place),
            Ok(None) => {}
            Err(why) => reason = why,
        }
    }
    Err(reason)
}

/// The visual tokens of one stream; `None` if they are not in it.
fn within(
    model: &Model,
    facts: &Facts,
    stream: ValueId,
    span: &Span,
    frames: usize,
) -> Result<Option<Place>, &'static str> {
    let graph = &model.graph;
    let sizes = |value: ValueId| {
        let shape = facts.shape(value).filter(|s| s.len() == 3)?;
        usize::try_from(shape[1].as_known()?).ok()
    };
    let Some(count) = sizes(stream) else { return Ok(None) };
    let (start, length) = match span {
        Span::None => return Ok(None),
        Span::At(start, length) => (*start, *length),
        Span::Value(name) => {
            let value = graph.find_value(name).ok_or("there is no value of the name that the span gives")?;
            match joined(graph, facts, value, stream) {
                Some(found) => found,
                None => return Ok(None),
            }
        }
    };
    // The tower's own stream holds nothing else.
    if start.checked_add(length).is_none_or(|end| end > count) || length == count {
        return Ok(None);
    }
    if length % frames != 0 {
        return Err("the visual tokens do not divide into so many frames");
    }
    if facts.elem(stream) != Some(DataType::Float) {
        return Err("the stream is not float32");
    }
    let tokens = Tokens::follow(model, facts, stream, &BTreeSet::new())?;
    if let Some(block) = tokens.blocks.first() {
        return Err(block.reason);
    }
    if tokens.picked > start {
        return Err("visual tokens are picked by their position later");
    }
    let (weights, front) =
        looks(graph, facts, stream, length / frames).ok_or("no attention over the visual tokens can be read")?;
    Ok(Some(Place { stream, tokens, start, length, frames, weights, front }))
}

/// Where the rows of a value are in a stream: it is joined with others, to which positions may be added.
fn joined(graph: &Graph, facts: &Facts, value: ValueId, stream: ValueId) -> Option<(usize, usize)> {
    let rows = |v: ValueId| usize::try_from(facts.shape(v).filter(|s| s.len() == 3)?[1].as_known()?).ok();
    let mut at = stream;
    loop {
        let node = graph.node(graph.producer(at)?);
        if node.is("Concat") && matches!(node.int("axis"), Some(1 | -2)) {
            let before = node.inputs().iter().flatten().take_while(|v| **v != value);
            let start = before.map(|&v| rows(v)).sum::<Option<usize>>()?;
            return node.inputs().contains(&Some(value)).then_some((start, rows(value)?));
        }
        let data: Vec<ValueId> =
            node.inputs().iter().flatten().copied().filter(|&v| graph.constant(v).is_none()).collect();
        let plain = ["Add", "Mul", "Identity", "Cast", "LayerNormalization", "Dropout"].iter().any(|op| node.is(op));
        match data.as_slice() {
            [one] if plain => at = *one,
            _ => return None,
        }
    }
}

/// The last attention before a stream whose weights are over this many tokens, or over one more in front of them.
fn looks(graph: &Graph, facts: &Facts, stream: ValueId, count: usize) -> Option<(ValueId, usize)> {
    let needed = upstream(graph, [stream]);
    let order = graph.sorted(ScopeId::MAIN).ok()?;
    for &id in order.iter().rev().filter(|&&id| needed.contains(id)) {
        let node = graph.node(id);
        let Some(output) = node.output(0).filter(|_| node.is("Softmax")) else { continue };
        let Some(shape) = facts.shape(output).filter(|s| s.len() == 4) else { continue };
        let size = |axis: usize| usize::try_from(shape[axis].as_known()?).ok();
        let front = size(3).filter(|_| size(2) == size(3)).and_then(|n| n.checked_sub(count));
        if let Some(front) = front.filter(|&front| front <= 1) {
            return Some((output, front));
        }
    }
    None
}

impl Place {
    /// Everything that depends on the stream, in order.
    pub fn nodes(&self, graph: &Graph) -> Vec<NodeId> {
        let dependent = downstream(graph, self.stream);
        let order = graph.sorted(ScopeId::MAIN).unwrap_or_default();
        order.into_iter().filter(|&id| dependent.contains(id)).collect()
    }

    /// The outputs of the model that depend on the stream.
    pub fn ends(&self, graph: &Graph) -> Vec<ValueId> {
        ends_of(graph, &self.nodes(graph))
    }
}
