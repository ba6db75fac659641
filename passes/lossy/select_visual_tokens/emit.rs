//! Writes the selection of visual tokens into a model.

use super::{place::Place, video::Video};
use crate::lossy::reduce_tokens::emit::{END, Merged, Writer, logarithm, resize, weigh_attention, weigh_average};
use lathe_ir::{AttributeValue, DataType, Model, Node, ScopeId, Tensor, Type, Use, ValueId};
use std::collections::BTreeMap;

/// Below every score and every distance.
pub(super) const NEVER: f32 = -1e30;

/// By what tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// By their score, then by how unlike those before they are.
    Score,
    /// By how unlike those before they are, times their score.
    Spread,
    /// Some so, and some that are not in the frame before; what is goes to what it is like there.
    Video,
}

/// What becomes of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// They are left out.
    Gone,
    /// They are left out, and the one that each is most like counts for it too.
    Counted,
}

/// How many tokens of every part are chosen in which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// By their score; the others are unlike these.
    pub key: usize,
    /// By their score.
    pub task: usize,
    /// One after another, by how unlike those before they are.
    pub spread: usize,
    /// Of frames that are merged over time, by how unlike those of the frame before they are.
    pub merged: usize,
}

impl Counts {
    pub fn all(&self) -> usize {
        self.key + self.task + self.spread + self.merged
    }
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

/// Tokens to choose from.
pub(super) struct Selection {
    /// Rows of length 1, `[batch, part, width]`.
    pub unit: ValueId,
    /// `[batch, part]`.
    pub score: ValueId,
    pub part: usize,
    pub counts: Counts,
    pub form: Form,
}

impl Selection {
    /// The positions of those that are chosen, rising, `[batch, k]`.
    pub fn index(&self, w: &mut Writer<'_>) -> ValueId {
        let mut all = Vec::new();
        let (key, score) = self.best(w, self.score, self.counts.key);
        all.push(key);
        let mut taken = vec![key];
        if self.counts.task > 0 {
            let (task, _) = self.best(w, score, self.counts.task);
            all.push(task);
            taken.push(task);
        }
        if self.counts.spread > 0 {
            all.push(self.spread(w, key, &taken));
        }
        let index = w.join(&all, 1);
        let many = w.ints(&[self.counts.all() as i64]);
        w.pair(Node::new("TopK").with("largest", 0i64), &[index, many]).0
    }

    /// The positions of the largest scores, and the scores without them.
    fn best(&self, w: &mut Writer<'_>, score: ValueId, count: usize) -> (ValueId, ValueId) {
        let many = w.ints(&[count as i64]);
        let (values, index) = w.pair(Node::new("TopK"), &[score, many]);
        (index, self.without(w, score, index, values))
    }

    /// Numbers with [`NEVER`] at these positions; `like` is any value of the shape of the positions.
    fn without(&self, w: &mut Writer<'_>, numbers: ValueId, index: ValueId, like: ValueId) -> ValueId {
        let never = w.constant(Tensor::from_f32s(&[], &[NEVER]));
        let zero = w.node(Node::new("Sub"), &[like, like]);
        let never = w.node(Node::new("Add"), &[zero, never]);
        w.node(Node::new("ScatterElements").with("axis", 1i64), &[numbers, index, never])
    }

    /// The positions of tokens each of which is as far as can be from those before it, `[batch, count]`.
    fn spread(&self, w: &mut Writer<'_>, key: ValueId, taken: &[ValueId]) -> ValueId {
        let keys = w.rows(self.unit, key);
        let turned = w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[keys]);
        let similar = w.node(Node::new("MatMul"), &[self.unit, turned]); // [batch, part, key]
        let last = w.ints(&[-1]);
        let nearest = w.node(Node::new("ReduceMax").with("keepdims", 0i64), &[similar, last]);
        let one = w.constant(Tensor::from_f32s(&[], &[1.0]));
        let mut far = w.node(Node::new("Sub"), &[one, nearest]);
        if self.form == Form::Spread {
            far = w.node(Node::new("Mul"), &[far, self.score]);
        }
        for &index in taken {
            let like = w.node(Node::new("Cast").with("to", i64::from(DataType::Float.code())), &[index]);
            far = self.without(w, far, index, like);
        }
        let range: Vec<i64> = (0..self.part as i64).collect();
        let range = w.ints(&range);
        let never = w.constant(Tensor::from_f32s(&[], &[NEVER]));
        let trips = w.constant(Tensor::from_i64s(&[], &[self.counts.spread as i64]));
        let graph = &mut *w.graph;
        let scope = graph.add_scope("spread");
        let mut input = |name: &str, ty: Type| {
            let name = graph.fresh_name(name);
            let value = graph.add_value(name, Some(ty));
            graph.add_input(scope, value);
            value
        };
        input("iteration", Type::tensor(DataType::Int64, Vec::new()));
        let going = input("going", Type::tensor(DataType::Bool, Vec::new()));
        let before = input("far", Type::unshaped(DataType::Float));
        let mut node = |node: Node, inputs: &[ValueId]| graph.append(scope, node, inputs, "spread");
        let pick = node(Node::new("ArgMax").with("axis", 1i64).with("keepdims", 1i64), &[before]); // [batch, 1]
        let place = node(Node::new("Unsqueeze"), &[pick, last]);
        let row = node(Node::new("GatherND").with("batch_dims", 1i64), &[self.unit, place]); // [batch, 1, width]
        let row = node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[row]);
        let similar = node(Node::new("MatMul"), &[self.unit, row]);
        let similar = node(Node::new("Squeeze"), &[similar, last]);
        let mut own = node(Node::new("Sub"), &[one, similar]);
        if self.form == Form::Spread {
            own = node(Node::new("Mul"), &[own, self.score]);
        }
        let nearer = node(Node::new("Min"), &[before, own]);
        let picked = node(Node::new("Equal"), &[pick, range]);
        let after = node(Node::new("Where"), &[picked, never, nearer]);
        let goes_on = node(Node::new("Identity"), &[going]);
        for output in [goes_on, after, pick] {
            graph.add_output(scope, output);
        }
        let names = ["far_left", "picks"].map(|name| graph.fresh_name(name));
        let [left, picks] = names.map(|name| graph.add_value(name, None));
        let body = Node::new("Loop").with("body", AttributeValue::Graph(scope));
        graph.add_node(ScopeId::MAIN, body, vec![Some(trips), None, Some(far)], vec![Some(left), Some(picks)]);
        // [count, batch, 1]
        let flat = w.node(Node::new("Squeeze"), &[picks, last]);
        w.node(Node::new("Transpose").with("perm", vec![1i64, 0]), &[flat])
    }
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
