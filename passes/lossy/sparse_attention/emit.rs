//! Writes the draft, the choice of blocks and the attention over them.

use super::{
    Kept,
    place::{Mask, Place},
};
use crate::lossy::reduce_tokens::emit::Writer;
use lathe_ir::{Node, Tensor, ValueId};

/// What an attention gives that reads the blocks a draft chooses, in the form of what is there.
///
/// With `g` heads of all samples, `m` blocks of `b` tokens and `c` of them kept: drafts are `[g, m, m]`, what is gathered
/// `[g, m, c · b, d]`.
pub(super) fn sparse(w: &mut Writer<'_>, place: &Place, kept: Kept, opset: i64) -> ValueId {
    let (n, b, c) = (place.tokens as i64, kept.block as i64, kept.count as i64);
    let m = n / b;
    let [d, dv] = place.sizes.map(|size| size as i64);
    let [q, k, v] = parts(w, place);
    let queries = w.reshape(q, &[-1, m, b, d]);
    let keys = w.reshape(k, &[-1, m, b, d]);
    let sums = |w: &mut Writer<'_>, x: ValueId| {
        let axis = w.ints(&[2]);
        w.node(Node::new("ReduceSum").with("keepdims", 0i64), &[x, axis])
    };
    let (pooled_queries, pooled_keys) = (sums(w, queries), sums(w, keys));
    let turned = w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[pooled_keys]);
    let draft = w.node(Node::new("MatMul"), &[pooled_queries, turned]);
    let factor = w.constant(Tensor::from_f32s(&[], &[(place.scale / (b * b) as f64) as f32]));
    let mut draft = w.node(Node::new("Mul"), &[draft, factor]);
    if let Some(heads) = place.heads {
        draft = w.reshape(draft, &[-1, heads as i64, m, m]);
    }
    for mask in &place.masks {
        let most = most(w, place, mask, m, b, opset);
        draft = w.node(Node::new("Add"), &[draft, most]);
    }
    // The first block and the own one win against any mask that is not infinite; the mask of scores counts for both.
    let always: Vec<f32> = (0..m * m).map(|at| if at % m == 0 || at / m == at % m { 1e30 } else { f32::MIN }).collect();
    let always = w.constant(Tensor::from_f32s(&[m as usize, m as usize], &always));
    let draft = w.node(Node::new("Max"), &[draft, always]);
    let count = w.ints(&[c]);
    let (_, chosen) = w.pair(Node::new("TopK").with("axis", -1i64).with("sorted", 0i64), &[draft, count]);
    let index = w.reshape(chosen, &[-1, m * c, 1]);
    let gathered = |w: &mut Writer<'_>, x: ValueId, size: i64| {
        let rows = w.reshape(x, &[-1, m, b * size]);
        let rows = w.node(Node::new("GatherND").with("batch_dims", 1i64), &[rows, index]);
        w.reshape(rows, &[-1, m, c * b, size])
    };
    let (near, values) = (gathered(w, k, d), gathered(w, v, dv));
    let near = w.node(Node::new("Transpose").with("perm", vec![0i64, 1, 3, 2]), &[near]);
    let mut scores = w.node(Node::new("MatMul"), &[queries, near]);
    if place.scale != 1.0 {
        let scale = w.constant(Tensor::from_f32s(&[], &[place.scale as f32]));
        scores = w.node(Node::new("Mul"), &[scores, scale]);
    }
    for mask in place.masks.iter().rev() {
        let own = masked(w, place, mask, chosen, kept);
        scores = w.node(Node::new("Add"), &[scores, own]);
    }
    let weights = w.node(Node::new("Softmax").with("axis", -1i64), &[scores]);
    let output = w.node(Node::new("MatMul"), &[weights, values]);
    match (place.heads, place.joined) {
        (Some(heads), true) => {
            let output = w.reshape(output, &[-1, heads as i64, n, dv]);
            let output = w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1, 3]), &[output]);
            w.reshape(output, &[-1, n, heads as i64 * dv])
        }
        (Some(heads), false) => w.reshape(output, &[-1, heads as i64, n, dv]),
        (None, _) => w.reshape(output, &[-1, n, dv]),
    }
}

/// Queries, keys and values with tokens before features.
fn parts(w: &mut Writer<'_>, place: &Place) -> [ValueId; 3] {
    let [q, mut k, v] = place.read;
    if place.turned {
        let perm = if place.heads.is_some() { vec![0i64, 1, 3, 2] } else { vec![0i64, 2, 1] };
        k = w.node(Node::new("Transpose").with("perm", perm), &[k]);
    }
    let Some(heads) = place.heads.filter(|_| place.joined) else { return [q, k, v] };
    let [d, dv] = place.sizes;
    [(q, d), (k, d), (v, dv)].map(|(x, size)| {
        let split = w.reshape(x, &[-1, place.tokens as i64, heads as i64, size as i64]);
        w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1, 3]), &[split])
    })
}

/// The largest number of a mask in every block of queries and keys, which a block has that is open in part: an axis for
/// samples, one for heads if scores have one, `[m or 1, m]`.
fn most(w: &mut Writer<'_>, place: &Place, mask: &Mask, m: i64, b: i64, opset: i64) -> ValueId {
    let (rows, in_row) = if mask.by_query { (m, b) } else { (1, 1) };
    let blocks = w.reshape(mask.value, &[-1, rows, in_row, m, b]);
    let node = Node::new("ReduceMax").with("keepdims", 0i64);
    let blocks = if opset < 18 {
        w.node(node.with("axes", vec![2i64, 4]), &[blocks])
    } else {
        let axes = w.ints(&[2, 4]);
        w.node(node, &[blocks, axes])
    };
    match place.heads {
        Some(heads) => w.reshape(blocks, &[-1, if mask.by_head { heads as i64 } else { 1 }, rows, m]),
        None => blocks,
    }
}

/// What a mask adds to the scores of the chosen blocks: `[g, m, b or 1, c · b]`.
fn masked(w: &mut Writer<'_>, place: &Place, mask: &Mask, chosen: ValueId, kept: Kept) -> ValueId {
    let (b, c) = (kept.block, kept.count as i64);
    let m = place.tokens / b;
    let rows = if mask.by_query { b } else { 1 };
    let heads = place.heads.unwrap_or(1);
    let chosen = w.reshape(chosen, &[-1, heads as i64, m as i64, 1, c]);
    // Where the row of every query, and head, begins, in blocks.
    let first: Vec<i64> = match mask.by_query {
        true => (0..m * b).map(|row| (row * m) as i64).collect(),
        false => vec![0; m],
    };
    let first = w.constant(Tensor::from_i64s(&[m, rows, 1], &first));
    let mut index = w.node(Node::new("Add"), &[chosen, first]);
    let matrix = (if mask.by_query { place.tokens * m } else { m }) as i64;
    if mask.by_head {
        let heads: Vec<i64> = (0..heads as i64).map(|head| head * matrix).collect();
        let heads = w.constant(Tensor::from_i64s(&[heads.len(), 1, 1, 1], &heads));
        index = w.node(Node::new("Add"), &[index, heads]);
    }
    if mask.by_sample {
        let shape = w.node(Node::new("Shape"), &[mask.value]);
        let zero = w.constant(Tensor::from_i64s(&[], &[0]));
        let samples = w.node(Node::new("Gather"), &[shape, zero]);
        let one = w.constant(Tensor::from_i64s(&[], &[1]));
        let samples = w.node(Node::new("Range"), &[zero, samples, one]);
        let stride = w.constant(Tensor::from_i64s(&[], &[matrix * if mask.by_head { heads as i64 } else { 1 }]));
        let samples = w.node(Node::new("Mul"), &[samples, stride]);
        let samples = w.reshape(samples, &[-1, 1, 1, 1, 1]);
        index = w.node(Node::new("Add"), &[index, samples]);
    }
    let table = w.reshape(mask.value, &[-1, b as i64]);
    let found = w.node(Node::new("Gather").with("axis", 0i64), &[table, index]);
    w.reshape(found, &[-1, m as i64, rows as i64, c * b as i64])
}
