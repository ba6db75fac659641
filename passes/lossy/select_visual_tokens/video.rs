//! Merging over time (FlashVID's TSTM, §4 of arXiv:2602.08024), with as many tokens of every frame whatever they show.
//!
//! Of every frame some tokens stay as they are: those looked at most that are unlike each other. Of the others those
//! least like any of the frame before stay too; the rest goes to the one there that it is most like, and on with that one
//! where it goes as well. In the first frame of a segment it goes to the one of the same frame. What stays is the mean of
//! all that went to it: counts walk the same way as sums, so that trees of any height have their true mean.

use super::selection::{Counts, Form, NEVER, Selection};
use crate::lossy::reduce_tokens::emit::Writer;
use lathe_ir::{DataType, Node, Tensor, ValueId};

/// The least relevance of a token, so that none is chosen last for being unlike the frames' means.
const LEAST_RELEVANCE: f32 = 1e-3;

/// The tokens of frames, segment after segment.
pub(super) struct Video {
    /// `[batch · frames, part, width]`, as they are and of length 1.
    pub x: ValueId,
    pub unit: ValueId,
    /// How much each is looked at, `[batch · frames, part]`.
    pub score: ValueId,
    /// Tokens of a frame.
    pub part: usize,
    /// Frames of a segment, over which tokens are merged.
    pub segment: usize,
}

impl Video {
    /// What is left of every frame, `[batch · frames, k, width]`, and for how many tokens each stands,
    /// `[batch · frames, k, 1]`.
    pub fn merged(&self, w: &mut Writer<'_>, counts: Counts) -> (ValueId, ValueId) {
        let (part, segment) = (self.part as i64, self.segment as i64);
        let relevance = self.relevance(w);
        let score = w.node(Node::new("Mul"), &[self.score, relevance]);
        let alone = Counts { merged: 0, ..counts };
        let own = Selection { unit: self.unit, score, part: self.part, counts: alone, form: Form::Spread }.index(w);
        let none = w.node(Node::new("Sub"), &[self.score, self.score]);
        let apart = marked(w, none, own); // [batch · frames, part]
        let by_frame = |w: &mut Writer<'_>, x: ValueId| w.reshape(x, &[-1, segment, part]);
        let apart = by_frame(w, apart);

        // What every token of a later frame is most like in the frame before, of those that are not apart.
        let unit = by_segment(w, self.unit, &[segment, part]);
        let later = w.slice(unit, 1, self.segment, 1);
        let earlier = w.slice(unit, 0, self.segment - 1, 1);
        let earlier = w.node(Node::new("Transpose").with("perm", vec![0i64, 1, 3, 2]), &[earlier]);
        let similar = w.node(Node::new("MatMul"), &[later, earlier]); // [segments, segment − 1, part, part]
        let closed = w.slice(apart, 0, self.segment - 1, 1);
        let similar = barred(w, similar, closed, 2);
        let last = w.ints(&[-1]);
        let likeness = w.node(Node::new("ReduceMax").with("keepdims", 0i64), &[similar, last]);
        let parent = one_of(w, similar, part);

        // The first frame has none before it: there those that are looked at least go.
        let score = by_frame(w, score);
        let first = w.slice(score, 0, 1, 1);
        let first = w.node(Node::new("Neg"), &[first]);
        let order = w.join(&[first, likeness], 1);
        let never = w.constant(Tensor::from_f32s(&[], &[NEVER]));
        let last_of_all = w.node(Node::new("Mul"), &[apart, never]);
        let order = w.node(Node::new("Sub"), &[order, last_of_all]);
        let order = w.reshape(order, &[-1, part]);
        let many = w.ints(&[counts.merged as i64]);
        let (_, stay) = w.pair(Node::new("TopK").with("largest", 0i64), &[order, many]);
        let both = w.join(&[own, stay], 1);
        let many = w.ints(&[counts.all() as i64]);
        let index = w.pair(Node::new("TopK").with("largest", 0i64), &[both, many]).0;
        let kept = marked(w, none, index);
        let kept = by_frame(w, kept);
        let one = w.constant(Tensor::from_f32s(&[], &[1.0]));
        let goes = w.node(Node::new("Sub"), &[one, kept]);

        // Within the first frame, to those that stay and are not apart.
        let inside = w.slice(unit, 0, 1, 1);
        let turned = w.node(Node::new("Transpose").with("perm", vec![0i64, 1, 3, 2]), &[inside]);
        let similar = w.node(Node::new("MatMul"), &[inside, turned]); // [segments, 1, part, part]
        let closed = w.node(Node::new("Add"), &[goes, apart]);
        let closed = w.slice(closed, 0, 1, 1);
        let similar = barred(w, similar, closed, 2);
        let within = one_of(w, similar, part);
        let moves = w.join(&[within, parent], 1); // [segments, segment, part, part]
        let goes = w.unsqueeze(goes);
        let moves = w.node(Node::new("Mul"), &[moves, goes]);

        let sums = self.walk(w, moves);
        let sums = by_segment(w, sums, &[part]);
        let sums = w.rows(sums, index); // [batch · frames, k, width + 1]
        let at = |w: &mut Writer<'_>, from: i64, to: i64| {
            let bounds = [from, to, -1].map(|n| w.ints(&[n]));
            w.node(Node::new("Slice"), &[sums, bounds[0], bounds[1], bounds[2]])
        };
        let (sum, count) = (at(w, 0, -1), at(w, -1, i64::MAX));
        (w.node(Node::new("Div"), &[sum, count]), count)
    }

    /// Sums over everything that goes to each token, frame after frame from the last, with how many that are as one feature
    /// more: `[segments, segment, part, width + 1]`.
    fn walk(&self, w: &mut Writer<'_>, moves: ValueId) -> ValueId {
        let x = by_segment(w, self.x, &[self.segment as i64, self.part as i64]);
        let feature = [0, 1, -1].map(|n| w.ints(&[n]));
        let one = w.node(Node::new("Slice"), &[x, feature[0], feature[1], feature[2]]);
        let zero = w.node(Node::new("Sub"), &[one, one]);
        let ones = w.constant(Tensor::from_f32s(&[], &[1.0]));
        let ones = w.node(Node::new("Add"), &[zero, ones]);
        let x = w.join(&[x, ones], -1);
        let turned = w.node(Node::new("Transpose").with("perm", vec![0i64, 1, 3, 2]), &[moves]);
        let mut after: Option<ValueId> = None;
        let mut frames = Vec::new();
        for frame in (0..self.segment).rev() {
            let mut sum = w.slice(x, frame, frame + 1, 1); // [segments, 1, part, width + 1]
            if let Some(after) = after {
                let to = w.slice(turned, frame + 1, frame + 2, 1);
                let comes = w.node(Node::new("MatMul"), &[to, after]);
                sum = w.node(Node::new("Add"), &[sum, comes]);
            }
            if frame == 0 {
                let to = w.slice(turned, 0, 1, 1);
                let comes = w.node(Node::new("MatMul"), &[to, sum]);
                sum = w.node(Node::new("Add"), &[sum, comes]);
            }
            after = Some(sum);
            frames.push(sum);
        }
        frames.reverse();
        w.join(&frames, 1)
    }

    /// How much every token looks like the means of its segment's frames, `[batch · frames, part]`.
    fn relevance(&self, w: &mut Writer<'_>) -> ValueId {
        let (part, segment) = (self.part as i64, self.segment as i64);
        let axis = w.ints(&[1]);
        let mean = w.node(Node::new("ReduceMean").with("keepdims", 1i64), &[self.x, axis]);
        let mean = w.node(Node::new("LpNormalization").with("axis", -1).with("p", 2), &[mean]);
        let mean = by_segment(w, mean, &[segment]);
        let mean = w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[mean]);
        let unit = by_segment(w, self.unit, &[segment * part]);
        let cosines = w.node(Node::new("MatMul"), &[unit, mean]); // [segments, segment · part, segment]
        let last = w.ints(&[-1]);
        let cosine = w.node(Node::new("ReduceMean").with("keepdims", 0i64), &[cosines, last]);
        let least = w.constant(Tensor::from_f32s(&[], &[LEAST_RELEVANCE]));
        let relevance = w.node(Node::new("Max"), &[cosine, least]);
        w.reshape(relevance, &[-1, part])
    }
}

/// A value with its last axis as it is, and these before it, behind as many as there are.
fn by_segment(w: &mut Writer<'_>, x: ValueId, sizes: &[i64]) -> ValueId {
    let (last, end) = (w.ints(&[-1]), w.ints(&[i64::MAX]));
    let shape = w.node(Node::new("Shape"), &[x]);
    let width = w.node(Node::new("Slice"), &[shape, last, end]);
    let sizes = w.ints(&[&[-1], sizes].concat());
    let target = w.node(Node::new("Concat").with("axis", 0i64), &[sizes, width]);
    w.node(Node::new("Reshape"), &[x, target])
}

/// Zeros, `[batch, part]`, with ones at these positions, `[batch, k]`.
fn marked(w: &mut Writer<'_>, zeros: ValueId, index: ValueId) -> ValueId {
    let like = w.node(Node::new("Cast").with("to", i64::from(DataType::Float.code())), &[index]);
    let one = w.constant(Tensor::from_f32s(&[], &[1.0]));
    let zero = w.node(Node::new("Sub"), &[like, like]);
    let ones = w.node(Node::new("Add"), &[zero, one]);
    w.node(Node::new("ScatterElements").with("axis", 1i64), &[zeros, index, ones])
}

/// Likeness to tokens, the last axis, far below all others where `closed`, which lacks the axis before it, is one.
fn barred(w: &mut Writer<'_>, similar: ValueId, closed: ValueId, axis: i64) -> ValueId {
    let never = w.constant(Tensor::from_f32s(&[], &[NEVER]));
    let low = w.node(Node::new("Mul"), &[closed, never]);
    let axis = w.ints(&[axis]);
    let low = w.node(Node::new("Unsqueeze"), &[low, axis]);
    w.node(Node::new("Add"), &[similar, low])
}

/// One where the last axis, of this size, is largest, and zero elsewhere.
fn one_of(w: &mut Writer<'_>, similar: ValueId, size: i64) -> ValueId {
    let best = w.node(Node::new("ArgMax").with("axis", -1i64).with("keepdims", 1i64), &[similar]);
    let range: Vec<i64> = (0..size).collect();
    let range = w.ints(&range);
    let own = w.node(Node::new("Equal"), &[best, range]);
    w.node(Node::new("Cast").with("to", i64::from(DataType::Float.code())), &[own])
}
