//! Writes fewer tokens into a model.

use super::place::{CONTRIB, Chain, Cut, mean_part};
use lathe_analysis::{Keys, comes_from};
use lathe_ir::{Graph, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Added to a score that a softmax is not to see.
const NEVER: f32 = -1e4;

/// The end of every slice that has none.
pub(in crate::lossy) const END: usize = i64::MAX as usize;

/// Nodes and constants that are added at one place.
pub(in crate::lossy) struct Writer<'a> {
    pub graph: &'a mut Graph,
    name: String,
    ints: BTreeMap<Vec<i64>, ValueId>,
}

impl<'a> Writer<'a> {
    /// Names of what is written begin with this one.
    pub fn new(graph: &'a mut Graph, name: String) -> Writer<'a> {
        Writer { graph, name, ints: BTreeMap::new() }
    }

    pub fn node(&mut self, node: Node, inputs: &[ValueId]) -> ValueId {
        let name = format!("{}_{}", self.name, node.op_type);
        self.graph.append(ScopeId::MAIN, node, inputs, &name)
    }

    pub fn pair(&mut self, node: Node, inputs: &[ValueId]) -> (ValueId, ValueId) {
        let mut output = || {
            let name = self.graph.fresh_name(&format!("{}_{}", self.name, node.op_type));
            self.graph.add_value(name, None)
        };
        let (first, second) = (output(), output());
        let inputs = inputs.iter().map(|&v| Some(v)).collect();
        self.graph.add_node(ScopeId::MAIN, node, inputs, vec![Some(first), Some(second)]);
        (first, second)
    }

    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = self.graph.fresh_name(&format!("{}_constant", self.name));
        self.graph.add_initializer(ScopeId::MAIN, &name, tensor)
    }

    pub fn ints(&mut self, numbers: &[i64]) -> ValueId {
        if let Some(&known) = self.ints.get(numbers) {
            return known;
        }
        let value = self.constant(Tensor::int64s(numbers));
        self.ints.insert(numbers.to_vec(), value);
        value
    }

    /// `x[:, start::step]` up to `end`.
    pub fn slice(&mut self, x: ValueId, start: usize, end: usize, step: i64) -> ValueId {
        let bounds = [start as i64, end as i64, 1, step].map(|n| self.ints(&[n]));
        self.node(Node::new("Slice"), &[x, bounds[0], bounds[1], bounds[2], bounds[3]])
    }

    pub fn reshape(&mut self, x: ValueId, sizes: &[i64]) -> ValueId {
        let sizes = self.ints(sizes);
        self.node(Node::new("Reshape"), &[x, sizes])
    }

    pub fn unsqueeze(&mut self, x: ValueId) -> ValueId {
        let axis = self.ints(&[-1]);
        self.node(Node::new("Unsqueeze"), &[x, axis])
    }

    /// Rows of `x`, `[batch, tokens, …]`, at `index`, `[batch, k]`.
    pub fn rows(&mut self, x: ValueId, index: ValueId) -> ValueId {
        let index = self.unsqueeze(index);
        self.node(Node::new("GatherND").with("batch_dims", 1), &[x, index])
    }

    pub fn join(&mut self, parts: &[ValueId], axis: i64) -> ValueId {
        match parts {
            [one] => *one,
            _ => self.node(Node::new("Concat").with("axis", axis), parts),
        }
    }

    /// Sums over axes: where only directions or an order count, as good as a mean, whose form depends on the operator set.
    fn sum(&mut self, x: ValueId, axes: &[i64]) -> ValueId {
        let axes = self.ints(axes);
        self.node(Node::new("ReduceSum").with("keepdims", 0), &[x, axes])
    }
}

/// How tokens become fewer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) enum Form {
    /// Each one that goes is added to the one most like it.
    Merge,
    /// Each one is spread over those that stay, by a softmax of their cosines over this temperature.
    Mix(f32),
}

/// What one reduction leaves.
pub(in crate::lossy) struct Merged {
    /// How many tokens.
    pub count: usize,
    /// For how many tokens each one stands, `[batch, tokens, 1]`.
    pub sizes: ValueId,
    /// Where every token went; only if it is asked for.
    pub origin: Option<Origin>,
}

/// Where tokens went.
#[derive(Clone, Copy)]
pub(in crate::lossy) enum Origin {
    /// The position of the one it is part of, `[batch, tokens before]`.
    Place(ValueId),
    /// How much of it every one has, `[batch, tokens, tokens before]`.
    Share(ValueId),
}

/// How many tokens at most can be merged into others of `count`, of which the first ones stay.
pub(super) fn most(count: usize, protected: usize) -> usize {
    halves(count, protected).0.1
}

/// First position and number of the tokens that are merged, at even positions, and of those that they are merged into.
fn halves(count: usize, protected: usize) -> ((usize, usize), (usize, usize)) {
    let half = |parity: usize| {
        let first = protected + (protected + parity) % 2;
        (first, count.saturating_sub(first).div_ceil(2))
    };
    (half(0), half(1))
}

/// Takes `counts[i]` tokens away at every cut, and changes what depends on their number.
///
/// Where they merge, tokens at even positions find the most similar one at an odd position by the cosine of their keys; the most similar
/// pairs become their mean, weighted by how many tokens each one stands for. Later attentions add the logarithm of that
/// number to their scores, and averages weigh by it, so that merging equal tokens changes nothing. Where they mix, those
/// stay that the attention before looks at most.
pub(super) fn emit(model: &mut Model, chain: &Chain, counts: &[usize], form: Form) {
    let active: Vec<usize> = (0..counts.len()).filter(|&at| counts[at] > 0).collect();
    let stages = chain.stages(&model.graph, &active).expect("stages were checked with every cut");
    let stage = |value: ValueId| stages.get(&value).copied().unwrap_or(0);
    let graph = &mut model.graph;
    let mut merged: Vec<Merged> = Vec::new();
    for &at in &active {
        let done = reduce(graph, chain, &chain.cuts[at], counts[at], merged.last(), form);
        merged.push(done);
    }
    let left = |stage: usize| stage.checked_sub(1).map_or(chain.tokens.count, |at| merged[at].count);
    for &id in &chain.tokens.nodes {
        let node = graph.node(id);
        let Some((input, output)) = node.input(0).zip(node.output(0)) else { continue };
        if let (true, Some(axes)) = (node.is("Reshape") && stage(input) > 0, chain.tokens.of(output)) {
            resize(graph, id, &axes.axes, left(stage(input)) - axes.skipped);
        }
    }
    let mut biases: BTreeMap<usize, ValueId> = BTreeMap::new();
    for attention in &chain.tokens.attentions {
        let read = graph.node(attention.node).input(0).expect("an attention reads something");
        if let Some(at) = stage(read).checked_sub(1) {
            let bias = *biases.entry(at).or_insert_with(|| logarithm(graph, &merged[at]));
            weigh_attention(graph, attention.node, bias, merged[at].count);
        }
    }
    for &id in &chain.tokens.averages {
        let read = graph.node(id).input(0).expect("an average reads something");
        let skipped = chain.tokens.of(read).map_or(0, |axes| axes.skipped);
        if let Some(at) = stage(read).checked_sub(1) {
            weigh_average(graph, id, &merged[at], skipped, chain.tokens.count);
        }
    }
    for restore in &chain.restores {
        // What is cut itself is read as it was before.
        let cut = active.iter().any(|&at| chain.cuts[at].stream == restore.value);
        if let Some(at) = (stage(restore.value) - usize::from(cut)).checked_sub(1) {
            restore_all(graph, restore.place, restore.value, &merged[..=at]);
        }
    }
    for (&value, _) in stages.iter().filter(|(_, stage)| **stage > 0) {
        if !graph.is_output(value) {
            graph.value_mut(value).ty = None;
        }
    }
}

/// Where a stream is summed and normalized by one node, makes two of it: tokens are merged in between. Whether it was.
///
/// A bias is added to what `attention` gives, so that both are one summand of the stream.
pub(super) fn open_sum(graph: &mut Graph, stream: ValueId, attention: NodeId) -> bool {
    let Some(id) = graph.producer(stream) else { return false };
    let node = graph.node(id).clone();
    let (Some(x), Some(skip), Some(gamma)) = (node.input(0), node.input(1), node.input(2)) else { return false };
    if node.domain != CONTRIB || node.op_type != "SkipLayerNormalization" || node.output(3) != Some(stream) {
        return false;
    }
    let name = graph.value(stream).name.clone();
    let mut summands = [x, skip];
    if let Some(bias) = node.input(4) {
        let own = usize::from(!comes_from(graph, x, attention));
        summands[own] =
            graph.append(ScopeId::MAIN, Node::new("Add"), &[summands[own], bias], &format!("{name}_biased"));
    }
    let sum = graph.append(ScopeId::MAIN, Node::new("Add"), &summands, &format!("{name}_sum"));
    let mut norm = Node::new("LayerNormalization").with("axis", -1);
    if let Some(epsilon) = node.float("epsilon") {
        norm = norm.with("epsilon", epsilon);
    }
    let reads: Vec<ValueId> = [Some(sum), Some(gamma), node.input(3)].into_iter().flatten().collect();
    let normalized = graph.append(ScopeId::MAIN, norm, &reads, &format!("{name}_norm"));
    graph.replace(stream, sum);
    if let Some(old) = node.output(0) {
        graph.replace(old, normalized);
    }
    graph.remove_node(id);
    true
}

/// The mean key over heads of every token, `[batch, tokens, size]`.
fn mean_keys(w: &mut Writer<'_>, cut: &Cut) -> ValueId {
    match cut.keys {
        Keys::Heads(keys, axis) => {
            let mean = w.sum(keys, &[1]);
            if axis == 2 { mean } else { w.node(Node::new("Transpose").with("perm", vec![0, 2, 1]), &[mean]) }
        }
        Keys::Flat(keys, heads) => {
            let split = w.reshape(keys, &[0, 0, heads, -1]);
            w.sum(split, &[2])
        }
        Keys::Packed(x) => {
            let node = w.graph.node(cut.node);
            let heads = node.int("num_heads").unwrap_or(1);
            let read = |index: usize| w.graph.constant(node.input(index)?);
            let part = |tensor: &Tensor| mean_part(tensor, heads as usize);
            let (weight, bias) = (read(1).and_then(part), read(2).and_then(part));
            let weight = w.constant(weight.expect("chains were checked for constant weights of three equal parts"));
            let keys = w.node(Node::new("MatMul"), &[x, weight]);
            let Some(bias) = bias else { return keys };
            let bias = w.constant(bias);
            w.node(Node::new("Add"), &[keys, bias])
        }
    }
}

/// Takes `r` tokens of a stream away; everything that read it reads what is left.
fn reduce(graph: &mut Graph, chain: &Chain, cut: &Cut, r: usize, before: Option<&Merged>, form: Form) -> Merged {
    let uses: Vec<Use> = graph.value(cut.stream).uses().iter().copied().collect();
    let name = format!("{}_merged", graph.value(cut.stream).name);
    let count = before.map_or(chain.tokens.count, |merged| merged.count);
    let w = &mut Writer::new(graph, name);
    let keys = mean_keys(w, cut);
    let keys = w.node(Node::new("LpNormalization").with("axis", -1).with("p", 2), &[keys]);
    // Features times size, and the size behind them.
    let whole = match before {
        Some(merged) => {
            let sized = w.node(Node::new("Mul"), &[cut.stream, merged.sizes]);
            w.join(&[sized, merged.sizes], 2)
        }
        None => {
            let (pads, one) = (w.ints(&[0, 0, 0, 0, 0, 1]), w.constant(Tensor::from_f32s(&[], &[1.0])));
            w.node(Node::new("Pad"), &[cut.stream, pads, one])
        }
    };
    let site = Site { keys, whole, count, r, protected: chain.protected, width: cut.width as i64 };
    let requested = !chain.restores.is_empty();
    let (joined, origin) = match form {
        Form::Merge => site.merge(w, requested),
        Form::Mix(temperature) => {
            let weights = w.graph.node(cut.node).output(0).expect("an attention has an output");
            site.mix(w, weights, temperature)
        }
    };
    let split = w.ints(&[cut.width as i64, 1]);
    let (features, sizes) = w.pair(Node::new("Split").with("axis", 2), &[joined, split]);
    let stream = w.node(Node::new("Div"), &[features, sizes]);
    for place in uses {
        match place {
            Use::Node(id, index) if !chain.restores.iter().any(|r| r.place == place) => {
                w.graph.set_input(id, index, Some(stream));
            }
            _ => {}
        }
    }
    Merged { count: count - r, sizes, origin: Some(origin).filter(|_| requested) }
}

/// One place where tokens become fewer.
struct Site {
    /// What tells tokens apart, `[batch, count, size]`, rows of length 1.
    keys: ValueId,
    /// Features times size, and size, `[batch, count, width + 1]`.
    whole: ValueId,
    count: usize,
    /// How many tokens go.
    r: usize,
    protected: usize,
    width: i64,
}

impl Site {
    /// Spreads tokens over those that `weights`, `[batch, heads, count, count]`, look at most.
    fn mix(&self, w: &mut Writer<'_>, weights: ValueId, temperature: f32) -> (ValueId, Origin) {
        let (p, left) = (self.protected, self.count - self.r);
        let looks = if p > 0 {
            let bounds = [0, 1, 2].map(|n| w.ints(&[n]));
            w.node(Node::new("Slice"), &[weights, bounds[0], bounds[1], bounds[2]])
        } else {
            weights
        };
        let score = w.sum(looks, &[1, 2]);
        let others = w.slice(score, p, END, 1);
        let many = w.ints(&[(left - p) as i64]);
        let (_, best) = w.pair(Node::new("TopK"), &[others, many]);
        let (rising, _) = w.pair(Node::new("TopK").with("largest", 0), &[best, many]);
        let first = w.ints(&[p as i64]);
        let rising = w.node(Node::new("Add"), &[rising, first]);
        let mut index = vec![rising];
        if p > 0 {
            index.insert(0, range(w, rising, 0, p));
        }
        let index = w.join(&index, 1);
        let kept = w.rows(self.keys, index);
        let turned = w.node(Node::new("Transpose").with("perm", vec![0, 2, 1]), &[self.keys]);
        let similar = w.node(Node::new("MatMul"), &[kept, turned]); // [batch, left, count]
        let scale = w.constant(Tensor::from_f32s(&[], &[1.0 / temperature]));
        let mut scaled = w.node(Node::new("Mul"), &[similar, scale]);
        if p > 0 {
            // What is protected stays by itself.
            let far = |at: usize| {
                let (row, column) = (at / self.count, at % self.count);
                if (row < p || column < p) && row != column { NEVER } else { 0.0 }
            };
            let mask: Vec<f32> = (0..left * self.count).map(far).collect();
            let mask = w.constant(Tensor::from_f32s(&[left, self.count], &mask));
            scaled = w.node(Node::new("Add"), &[scaled, mask]);
        }
        let shares = w.node(Node::new("Softmax").with("axis", -2), &[scaled]);
        (w.node(Node::new("MatMul"), &[shares, self.whole]), Origin::Share(shares))
    }

    /// Adds the `r` tokens at even positions that are most like one at an odd position to that one.
    fn merge(&self, w: &mut Writer<'_>, requested: bool) -> (ValueId, Origin) {
        let ((first_a, a), (first_b, b)) = halves(self.count, self.protected);
        let (r, stay) = (self.r, a - self.r);
        let (even, odd) = (w.slice(self.keys, first_a, END, 2), w.slice(self.keys, first_b, END, 2));
        let odd = w.node(Node::new("Transpose").with("perm", vec![0, 2, 1]), &[odd]);
        let similar = w.node(Node::new("MatMul"), &[even, odd]); // [batch, a, b]
        let one = w.ints(&[1]);
        let (best, to) = w.pair(Node::new("TopK"), &[similar, one]);
        let last = w.ints(&[-1]);
        let best = w.node(Node::new("Squeeze"), &[best, last]);
        let all = w.ints(&[a as i64]);
        let (_, order) = w.pair(Node::new("TopK"), &[best, all]); // [batch, a]
        let from = w.slice(order, 0, r, 1);
        let kept = (stay > 0).then(|| {
            let rest = w.slice(order, r, END, 1);
            let many = w.ints(&[stay as i64]);
            w.pair(Node::new("TopK").with("largest", 0), &[rest, many]).0
        });
        let position = |w: &mut Writer<'_>, index: ValueId| {
            let (two, first) = (w.ints(&[2]), w.ints(&[first_a as i64]));
            let doubled = w.node(Node::new("Mul"), &[index, two]);
            w.node(Node::new("Add"), &[doubled, first])
        };
        let away = position(w, from);
        let rows = w.rows(self.whole, away); // [batch, r, width + 1]
        let to = w.node(Node::new("Squeeze"), &[to, last]);
        let target = w.node(Node::new("GatherElements").with("axis", 1), &[to, from]); // [batch, r]
        let wide = w.ints(&[1, 1, self.width + 1]);
        let index = w.unsqueeze(target);
        let index = w.node(Node::new("Expand"), &[index, wide]);
        let others = w.slice(self.whole, first_b, END, 2);
        let scatter = Node::new("ScatterElements").with("axis", 1).with("reduction", "add");
        let sums = w.node(scatter, &[others, index, rows]);
        let mut parts = Vec::new();
        if self.protected > 0 {
            parts.push(w.slice(self.whole, 0, self.protected, 1));
        }
        if let Some(kept) = kept {
            let stays = position(w, kept);
            parts.push(w.rows(self.whole, stays));
        }
        parts.push(sums);
        let joined = w.join(&parts, 1);
        let moved = Moved { order, from, kept, target, first_b, a, b, stay, protected: self.protected };
        (joined, Origin::Place(if requested { moved.places(w) } else { order }))
    }
}

/// `from, from + 1, …` in as many rows as `like`, `[batch, any]` of whole numbers, has.
fn range(w: &mut Writer<'_>, like: ValueId, from: usize, count: usize) -> ValueId {
    let one = w.slice(like, 0, 1, 1);
    let zero = w.node(Node::new("Sub"), &[one, one]); // [batch, 1]
    let numbers: Vec<i64> = (from..from + count).map(|n| n as i64).collect();
    let numbers = w.ints(&numbers);
    w.node(Node::new("Add"), &[zero, numbers])
}

/// Everything that says where tokens went.
struct Moved {
    /// Tokens at even positions, those that go first, `[batch, a]`.
    order: ValueId,
    /// The first ones of them, `[batch, r]`.
    from: ValueId,
    /// The others, rising.
    kept: Option<ValueId>,
    /// What the first ones were added to, `[batch, r]`.
    target: ValueId,
    first_b: usize,
    a: usize,
    b: usize,
    /// How many of the first are not merged.
    stay: usize,
    protected: usize,
}

impl Moved {
    /// Where every token went, `[batch, tokens before]`.
    fn places(&self, w: &mut Writer<'_>) -> ValueId {
        let range = |w: &mut Writer<'_>, from: usize, count: usize| range(w, self.order, from, count);
        let (staying, stay) = (self.kept, self.stay);
        let offset = w.ints(&[(self.protected + stay) as i64]);
        let gone = w.node(Node::new("Add"), &[self.target, offset]);
        let (mut index, mut updates) = (vec![self.from], vec![gone]);
        if let Some(kept) = staying {
            index.push(kept);
            updates.push(range(w, self.protected, stay));
        }
        let (index, updates) = (w.join(&index, 1), w.join(&updates, 1));
        let even = w.node(Node::new("ScatterElements").with("axis", 1), &[self.order, index, updates]);
        let odd = range(w, self.protected + stay, self.b);
        let mut parts = vec![even, odd];
        if self.protected > 0 {
            parts.insert(0, range(w, 0, self.protected));
        }
        let joined = w.join(&parts, 1);
        // Even and odd positions take turns again.
        let mut back: Vec<i64> = (0..self.protected as i64).collect();
        for at in 0..self.a + self.b {
            let position = self.protected + at;
            let odd = position % 2 == self.first_b % 2;
            back.push((self.protected + at / 2 + if odd { self.a } else { 0 }) as i64);
        }
        let back = w.ints(&back);
        w.node(Node::new("Gather").with("axis", 1), &[joined, back])
    }
}

/// Writes the number of tokens into the target of a Reshape.
pub(in crate::lossy) fn resize(graph: &mut Graph, id: NodeId, axes: &[usize], count: usize) {
    let target = graph.node(id).input(1).expect("a Reshape has a target");
    let mut sizes = graph.constant(target).and_then(Tensor::to_i64s).expect("targets of tokens were checked");
    for &axis in axes {
        if sizes[axis] != -1 {
            sizes[axis] = count as i64;
        }
    }
    let name = graph.fresh_name(&graph.value(target).name.clone());
    let resized = graph.add_initializer(ScopeId::MAIN, &name, Tensor::int64s(&sizes));
    graph.set_input(id, 1, Some(resized));
    if graph.value(target).uses().is_empty() {
        graph.remove_initializer(target);
    }
}

/// The logarithm of what tokens stand for, `[batch, 1, 1, tokens]`.
pub(in crate::lossy) fn logarithm(graph: &mut Graph, merged: &Merged) -> ValueId {
    let name = graph.value(merged.sizes).name.clone();
    let w = &mut Writer::new(graph, name);
    let logarithm = w.node(Node::new("Log"), &[merged.sizes]);
    w.reshape(logarithm, &[0, 1, 1, -1])
}

/// Lets every token count in an attention as often as it stands for.
pub(in crate::lossy) fn weigh_attention(graph: &mut Graph, id: NodeId, bias: ValueId, count: usize) {
    let name = graph.value(bias).name.clone();
    let w = &mut Writer::new(graph, name);
    let node = w.graph.node(id);
    if node.is("Softmax") {
        let scores = node.input(0).expect("a softmax reads something");
        let sum = w.node(Node::new("Add"), &[scores, bias]);
        w.graph.set_input(id, 0, Some(sum));
    } else {
        // ONNX Runtime wants a row for every query, in its own operators and in that of the standard.
        let place = if node.is("Attention") { 3 } else { 5 };
        let rows = w.ints(&[1, 1, count as i64, 1]);
        let full = w.node(Node::new("Expand"), &[bias, rows]);
        w.graph.set_input(id, place, Some(full));
    }
}

/// Weighs an average over tokens by what they stand for.
pub(in crate::lossy) fn weigh_average(graph: &mut Graph, id: NodeId, merged: &Merged, skipped: usize, original: usize) {
    let read = graph.node(id).input(0).expect("an average reads something");
    let name = graph.value(read).name.clone();
    let w = &mut Writer::new(graph, name);
    let sizes = if skipped > 0 { w.slice(merged.sizes, skipped, END, 1) } else { merged.sizes };
    let share = (merged.count - skipped) as f32 / (original - skipped) as f32;
    let share = w.constant(Tensor::from_f32s(&[], &[share]));
    let weights = w.node(Node::new("Mul"), &[sizes, share]);
    let weighted = w.node(Node::new("Mul"), &[read, weights]);
    w.graph.set_input(id, 0, Some(weighted));
}

/// Gives a use a row for every token there was: that of the token it went into, or its mix of those.
fn restore_all(graph: &mut Graph, place: Use, value: ValueId, merged: &[Merged]) {
    let name = format!("{}_restored", graph.value(value).name);
    let w = &mut Writer::new(graph, name);
    let mut all = value;
    for one in merged.iter().rev() {
        all = match one.origin.expect("origins are kept where something is restored") {
            Origin::Place(places) => w.rows(all, places),
            Origin::Share(shares) => {
                let turned = w.node(Node::new("Transpose").with("perm", vec![0, 2, 1]), &[shares]);
                w.node(Node::new("MatMul"), &[turned, all])
            }
        };
    }
    match place {
        Use::Node(id, input) => w.graph.set_input(id, input, Some(all)),
        Use::Output(scope, index) => {
            let old = w.graph.value(value);
            let (name, ty) = (old.name.clone(), old.ty.clone());
            let spare = w.graph.fresh_name(&name);
            w.graph.rename(value, spare);
            w.graph.value_mut(value).ty = None;
            w.graph.rename(all, name);
            w.graph.value_mut(all).ty = ty;
            w.graph.set_output(scope, index, all);
        }
        Use::Annotation(_) => {}
    }
}
