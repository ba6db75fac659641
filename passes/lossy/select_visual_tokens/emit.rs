//! Writes the selection of visual tokens into a model.

use super::{
    place::Place,
    selection::{Counts, Form, Selection},
    video::Video,
};
use crate::lossy::reduce_tokens::emit::{END, Merged, Writer, logarithm, resize, weigh_attention, weigh_average};
use lathe_ir::{DataType, Model, Node, Tensor, Use, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What becomes of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Rest {
    /// They are left out.
    Gone,
    /// They are left out, and the one that each is most like counts for it too.
    Counted,
}

/// Keeps some visual tokens of a place; everything that reads the stream reads what is left of it. `segment` frames in a
/// row are merged, where they are merged over time.
pub(super) fn emit(model: &mut Model, place: &Place, counts: &Counts, form: Form, rest: Rest, segment: usize) {
    let graph = &mut model.graph;
    let uses: Vec<Use> = graph.value(place.stream).uses().iter().copied().collect();
    let name = format!("{}_selected", graph.value(place.stream).name);
    let w = &mut Writer::new(graph, name);
    let part = place.length / place.frames;
    let visual = w.slice(place.stream, place.start, place.start + place.length, 1);
    let split = |w: &mut Writer<'_>, x: ValueId, rows: usize| {
        // Parts of a batch are a larger batch.
        if place.frames > 1 { by_rows(w, x, rows) } else { x }
    };
    let x = split(w, visual, part);
    let score = score(w, place);
    let unit = w.node(Node::new("LpNormalization").with("axis", -1).with("p", 2), &[x]);
    let k = counts.all();
    let (kept, sizes) = match form {
        Form::Video => {
            let (kept, sizes) = Video { x, unit, score, part, segment }.merged(w, *counts);
            (kept, (rest == Rest::Counted).then_some(sizes))
        }
        Form::Score | Form::Spread => {
            let index = Selection { unit, score, part, counts: *counts, form }.index(w); // [batch · frames, k]
            (w.rows(x, index), (rest == Rest::Counted).then(|| counted(w, unit, index, k)))
        }
    };
    let whole = split(w, kept, k * place.frames);
    let mut parts = Vec::new();
    if place.start > 0 {
        parts.push(w.slice(place.stream, 0, place.start, 1));
    }
    parts.push(whole);
    let behind = place.tokens.count - place.start - place.length;
    if behind > 0 {
        parts.push(w.slice(place.stream, place.start + place.length, END, 1));
    }
    let stream = w.join(&parts, 1);
    let left = place.tokens.count - place.length + k * place.frames;
    let sizes = sizes.map(|sizes| {
        let sizes = split(w, sizes, k * place.frames);
        let first = w.slice(sizes, 0, 1, 1);
        let zero = w.node(Node::new("Sub"), &[first, first]); // [batch, 1, 1]
        let ones = |w: &mut Writer<'_>, count: usize| {
            let ones = w.constant(Tensor::from_f32s(&[1, count, 1], &vec![1.0; count]));
            w.node(Node::new("Add"), &[zero, ones])
        };
        let mut all = Vec::new();
        if place.start > 0 {
            all.push(ones(w, place.start));
        }
        all.push(sizes);
        if behind > 0 {
            all.push(ones(w, behind));
        }
        w.join(&all, 1)
    });
    for one in uses {
        if let Use::Node(id, index) = one {
            w.graph.set_input(id, index, Some(stream));
        }
    }
    settle(model, place, left, sizes);
}

/// `[batch, frames · rows, …]` as `[batch · frames, rows, …]` and back.
fn by_rows(w: &mut Writer<'_>, x: ValueId, rows: usize) -> ValueId {
    let width = w.ints(&[2]);
    let end = w.ints(&[3]);
    let shape = w.node(Node::new("Shape"), &[x]);
    let last = w.node(Node::new("Slice"), &[shape, width, end]);
    let (all, rows) = (w.ints(&[-1]), w.ints(&[rows as i64]));
    let target = w.node(Node::new("Concat").with("axis", 0i64), &[all, rows, last]);
    w.node(Node::new("Reshape"), &[x, target])
}

/// How much the tower looks at every token, `[batch · frames, part]`.
fn score(w: &mut Writer<'_>, place: &Place) -> ValueId {
    let mut looks = place.weights;
    if place.front > 0 {
        // What the token in front looks at.
        let bounds = [0, 1, 2].map(|n| w.ints(&[n]));
        looks = w.node(Node::new("Slice"), &[looks, bounds[0], bounds[1], bounds[2]]);
    }
    let axes = w.ints(&[1, 2]);
    let score = w.node(Node::new("ReduceMean").with("keepdims", 0i64), &[looks, axes]);
    if place.front > 0 { w.slice(score, place.front, END, 1) } else { score }
}

/// For how many tokens each one that is kept stands, `[batch, k, 1]`.
fn counted(w: &mut Writer<'_>, unit: ValueId, index: ValueId, k: usize) -> ValueId {
    let kept = w.rows(unit, index);
    let turned = w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[kept]);
    let similar = w.node(Node::new("MatMul"), &[unit, turned]); // [batch, part, k]
    let to = w.node(Node::new("ArgMax").with("axis", -1i64).with("keepdims", 1i64), &[similar]);
    let range: Vec<i64> = (0..k as i64).collect();
    let range = w.ints(&range);
    let own = w.node(Node::new("Equal"), &[to, range]);
    let own = w.node(Node::new("Cast").with("to", i64::from(DataType::Float.code())), &[own]);
    let axis = w.ints(&[1]);
    let sizes = w.node(Node::new("ReduceSum").with("keepdims", 0i64), &[own, axis]);
    w.unsqueeze(sizes)
}

/// Changes what depends on how many tokens there are.
fn settle(model: &mut Model, place: &Place, left: usize, sizes: Option<ValueId>) {
    let graph = &mut model.graph;
    for &id in &place.tokens.nodes {
        let node = graph.node(id);
        let output = node.output(0).filter(|_| node.is("Reshape")).and_then(|v| place.tokens.of(v));
        if let Some(axes) = output {
            let count = left - axes.skipped;
            resize(graph, id, &axes.axes, count);
        }
    }
    if let Some(sizes) = sizes {
        let merged = Merged { count: left, sizes, origin: None };
        let bias = logarithm(graph, &merged);
        for attention in &place.tokens.attentions {
            weigh_attention(graph, attention.node, bias, left);
        }
        for &id in &place.tokens.averages {
            let read = graph.node(id).input(0).expect("an average reads something");
            let skipped = place.tokens.of(read).map_or(0, |axes| axes.skipped);
            weigh_average(graph, id, &merged, skipped, place.tokens.count);
        }
    }
    let values: BTreeMap<ValueId, ()> = place.tokens.values().map(|(value, _)| (value, ())).collect();
    for &value in values.keys().filter(|&&value| value != place.stream) {
        if !graph.is_output(value) {
            graph.value_mut(value).ty = None;
        }
    }
    graph.sort().expect("what is added reads only what is before the stream's readers");
}
