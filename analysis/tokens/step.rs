//! What one node does with tokens.

use super::{Cx, Keys, TokenAttention, TokenAxes, Tokens, kept_axis};
use crate::operators::Trait;
use lathe_ir::{Node, NodeId, Tensor, ValueId};

/// The outputs of a node that have tokens, or why it blocks.
type Step = Result<Vec<(usize, TokenAxes)>, &'static str>;

const CONSTANT_PER_TOKEN: &str = "a constant has a number per token, as tables of relative positions do";
const OTHER_PER_TOKEN: &str = "a value with a number per token enters from elsewhere";
const DIVIDED: &str = "the tokens are divided into windows or a grid, or joined with another axis";
const NO_SHAPE: &str = "the shape of a value with tokens is not known";

fn contrib(node: &Node, op: &str) -> bool {
    node.domain == "com.microsoft" && node.op_type == op
}

pub(super) fn step(tokens: &mut Tokens, cx: &Cx, id: NodeId) -> Step {
    let node = cx.graph.node(id);
    if Trait::Elementwise.of(node) {
        return Ok(vec![(0, aligned(tokens, cx, node)?)]);
    }
    if Trait::Trailing.of(node) {
        let (value, axes) = first(tokens, node)?;
        let ndim = cx.facts.ndim(value).ok_or(NO_SHAPE)?;
        let from = on(node.int("axis").unwrap_or(-1), ndim)?;
        let apart = axes.axes.iter().all(|&axis| axis < from);
        return if apart { Ok(vec![(0, axes)]) } else { Err("a normalization runs over tokens") };
    }
    if contrib(node, "SkipLayerNormalization") || contrib(node, "SkipSimplifiedLayerNormalization") {
        let axes = aligned(tokens, cx, node)?;
        return Ok(vec![(0, axes.clone()), (3, axes)]);
    }
    if contrib(node, "Attention") {
        return packed(tokens, node, id);
    }
    if contrib(node, "MultiHeadAttention") || node.is("Attention") {
        return fused(tokens, cx, node, id);
    }
    if !node.is_standard() {
        return Err("an operator reads tokens that may mix them");
    }
    match node.op_type.as_str() {
        "MatMul" => product(tokens, cx, node),
        "Softmax" => softmax(tokens, cx, node, id),
        "Transpose" => transpose(tokens, cx, node),
        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => regroup(tokens, cx, node),
        "Split" => {
            let (axes, axis) = beside(tokens, cx, node, 0)?;
            let apart = !axes.axes.contains(&axis);
            let all = |axes: TokenAxes| (0..node.outputs().len()).map(|i| (i, axes.clone())).collect();
            if apart { Ok(all(axes)) } else { Err("tokens are split by their position") }
        }
        "Concat" => {
            let all: Vec<Option<&TokenAxes>> = node.inputs().iter().flatten().map(|&v| tokens.of(v)).collect();
            let (axes, axis) = beside(tokens, cx, node, 0)?;
            let alike = all.iter().all(|found| *found == Some(&axes));
            let apart = alike && !axes.axes.contains(&axis);
            if apart { Ok(vec![(0, axes)]) } else { Err("tokens are joined with others, or with what is no token") }
        }
        "Slice" => slice(tokens, cx, node),
        "Gather" => gather(tokens, cx, node),
        "ReduceMean" => average(tokens, cx, node, id),
        "Shape" => sizes(tokens, cx, node),
        "Conv" | "ConvTranspose" | "MaxPool" | "AveragePool" => Err("a convolution or pooling reads the tokens"),
        _ => Err("an operator reads tokens that may mix them"),
    }
}

/// An axis counted from the front.
fn on(axis: i64, ndim: usize) -> Result<usize, &'static str> {
    let from_front = if axis < 0 { axis + ndim as i64 } else { axis };
    usize::try_from(from_front).ok().filter(|&at| at < ndim).ok_or("an axis is not one of the value's")
}

/// The first input, which must be the one with tokens.
fn first(tokens: &Tokens, node: &Node) -> Result<(ValueId, TokenAxes), &'static str> {
    let value = node.input(0).ok_or("an input is left out")?;
    let axes = tokens.of(value).ok_or("tokens are read other than as data")?;
    Ok((value, axes.clone()))
}

/// The tokens of the first input and the attribute `axis`.
fn beside(tokens: &Tokens, cx: &Cx, node: &Node, default: i64) -> Result<(TokenAxes, usize), &'static str> {
    let (value, axes) = first(tokens, node)?;
    let ndim = cx.facts.ndim(value).ok_or(NO_SHAPE)?;
    Ok((axes, on(node.int("axis").unwrap_or(default), ndim)?))
}

/// Whole numbers of a constant input.
fn numbers(cx: &Cx, node: &Node, index: usize) -> Option<Vec<i64>> {
    cx.graph.constant(node.input(index)?).and_then(Tensor::to_i64s)
}

/// The tokens of what broadcasting makes.
fn aligned(tokens: &Tokens, cx: &Cx, node: &Node) -> Result<TokenAxes, &'static str> {
    let mut inputs = Vec::new();
    for &value in node.inputs().iter().flatten() {
        inputs.push((value, cx.facts.shape(value).ok_or(NO_SHAPE)?));
    }
    let ndim = inputs.iter().map(|(_, shape)| shape.len()).max().unwrap_or(0);
    let mut axes = Vec::new();
    let mut skipped = None;
    for (value, shape) in &inputs {
        let Some(found) = tokens.of(*value) else { continue };
        axes.extend(found.axes.iter().map(|axis| axis + ndim - shape.len()));
        if *skipped.get_or_insert(found.skipped) != found.skipped {
            return Err("tokens meet others, of which more or fewer were left out");
        }
    }
    axes.sort_unstable();
    axes.dedup();
    for (value, shape) in &inputs {
        for &axis in &axes {
            let Some(own) = (axis + shape.len()).checked_sub(ndim) else { continue };
            let along = tokens.of(*value).is_some_and(|found| found.axes.contains(&own));
            if !along && shape[own].as_known() != Some(1) {
                return Err(if cx.graph.constant(*value).is_some() { CONSTANT_PER_TOKEN } else { OTHER_PER_TOKEN });
            }
        }
    }
    let passes = ["Cast", "Dropout", "Identity"].iter().any(|op| node.is(op));
    let weights = passes && node.input(0).and_then(|v| tokens.of(v)).is_some_and(|found| found.weights);
    Ok(TokenAxes { axes, skipped: skipped.unwrap_or(0), weights })
}

fn product(tokens: &Tokens, cx: &Cx, node: &Node) -> Step {
    let (Some(left), Some(right)) = (node.input(0), node.input(1)) else { return Err("an input is left out") };
    let ndim = |value| cx.facts.ndim(value).filter(|&n| n >= 2).ok_or(NO_SHAPE);
    let (a, b) = (ndim(left)?, ndim(right)?);
    let out = a.max(b);
    let empty = TokenAxes { axes: Vec::new(), skipped: 0, weights: false };
    let of = |value| tokens.of(value).unwrap_or(&empty);
    let (x, y) = (of(left), of(right));
    let summed = (x.axes.contains(&(a - 1)), y.axes.contains(&(b - 2)));
    match summed {
        (false, false) => {}
        (true, true) if x.weights && x.skipped == y.skipped => {}
        (true, true) => return Err("tokens are summed over without a softmax"),
        _ => return Err("a layer mixes tokens"),
    }
    let rows = x.axes.contains(&(a - 2)).then_some(out - 2);
    let columns = y.axes.contains(&(b - 1)).then_some(out - 1);
    let beyond = x.axes.iter().any(|&axis| axis + 2 < a) || y.axes.iter().any(|&axis| axis + 2 < b);
    if beyond {
        return Err("every token has a product of its own");
    }
    if rows.is_some() && columns.is_some() && x.skipped != y.skipped {
        return Err("tokens meet others, of which more or fewer were left out");
    }
    let skipped = if rows.is_some() { x.skipped } else { y.skipped };
    let axes: Vec<usize> = [rows, columns].into_iter().flatten().collect();
    Ok(if axes.is_empty() { Vec::new() } else { vec![(0, TokenAxes { axes, skipped, weights: false })] })
}

fn softmax(tokens: &mut Tokens, cx: &Cx, node: &Node, id: NodeId) -> Step {
    let (value, axes) = first(tokens, node)?;
    let ndim = cx.facts.ndim(value).ok_or(NO_SHAPE)?;
    let axis = on(node.int("axis").unwrap_or(if cx.opset >= 13 { -1 } else { 1 }), ndim)?;
    if axis + 1 != ndim {
        return Err("a softmax runs over another axis than the last one");
    }
    if !axes.axes.contains(&axis) {
        return Ok(vec![(0, axes)]);
    }
    let keys = keys_of(tokens, cx, value).ok_or("a softmax over tokens is no attention that is known")?;
    if ndim != 4 || axes.axes != [2, 3] || axes.skipped != 0 {
        return Err("the scores of an attention do not have four axes: batch, heads, tokens, tokens");
    }
    tokens.attentions.push(TokenAttention { node: id, keys });
    Ok(vec![(0, TokenAxes { weights: true, ..axes })])
}

/// The keys that scores were made of.
fn keys_of(tokens: &Tokens, cx: &Cx, mut scores: ValueId) -> Option<Keys> {
    const LONGEST: usize = 8;
    for _ in 0..LONGEST {
        let node = cx.graph.node(cx.graph.producer(scores)?);
        if node.is("MatMul") {
            let keys = node.input(1)?;
            let fits = tokens.of(keys)?.axes == [3] && cx.facts.ndim(keys) == Some(4);
            return fits.then_some(Keys::Heads(keys, 3));
        }
        let square = |v: &ValueId| tokens.of(*v).is_some_and(|found| found.axes.len() == 2);
        scores = *node.inputs().iter().flatten().find(|v| square(v))?;
    }
    None
}

/// ONNX Runtime's attention with one packed weight.
fn packed(tokens: &mut Tokens, node: &Node, id: NodeId) -> Step {
    let (value, axes) = first(tokens, node)?;
    let plain =
        node.int("unidirectional").unwrap_or(0) == 0 && (3..node.inputs().len()).all(|i| node.input(i).is_none());
    if !plain || node.outputs().iter().skip(1).any(Option::is_some) || node.int("do_rotary").unwrap_or(0) != 0 {
        return Err("an attention is causal, or has a mask, a cache or rotary embeddings");
    }
    if axes.axes != [1] || axes.skipped != 0 {
        return Err("an attention reads tokens that are not its second axis");
    }
    tokens.attentions.push(TokenAttention { node: id, keys: Keys::Packed(value) });
    Ok(vec![(0, axes)])
}

/// An attention of queries, keys and values.
fn fused(tokens: &mut Tokens, cx: &Cx, node: &Node, id: NodeId) -> Step {
    let own = !node.is_standard();
    let causal = node.int(if own { "unidirectional" } else { "is_causal" }).unwrap_or(0) != 0;
    let extra = (3..node.inputs().len()).any(|i| node.input(i).is_some() && !(own && i == 3));
    if causal || extra || node.outputs().iter().skip(1).any(Option::is_some) {
        return Err("an attention is causal, or has a mask, a cache or rotary embeddings");
    }
    let mut found = Vec::new();
    for index in 0..3 {
        let value = node.input(index).ok_or("queries, keys and values are packed in a way that is not known")?;
        found.push((tokens.of(value).ok_or("tokens attend to something else")?.clone(), cx.facts.ndim(value)));
    }
    let (Some(ndim @ (3 | 4)), Some(keys)) = (found[0].1, node.input(1)) else { return Err(NO_SHAPE) };
    let axis = ndim - 2;
    let fits = found.iter().all(|(axes, n)| *n == Some(ndim) && axes.axes == [axis] && axes.skipped == 0);
    if !fits {
        return Err("queries, keys and values do not have the same tokens");
    }
    let heads = node.int(if own { "num_heads" } else { "kv_num_heads" });
    let keys = match (ndim, heads) {
        (4, _) => Keys::Heads(keys, 2),
        (_, Some(heads)) if heads > 0 => Keys::Flat(keys, heads),
        _ => return Err("the number of heads of an attention is not known"),
    };
    tokens.attentions.push(TokenAttention { node: id, keys });
    Ok(vec![(0, found.swap_remove(0).0)])
}

fn transpose(tokens: &Tokens, cx: &Cx, node: &Node) -> Step {
    let (value, axes) = first(tokens, node)?;
    let ndim = cx.facts.ndim(value).ok_or(NO_SHAPE)?;
    let reversed: Vec<i64> = (0..ndim as i64).rev().collect();
    let perm = node.ints("perm").unwrap_or(&reversed);
    let mut moved: Vec<usize> = (0..perm.len()).filter(|&at| axes.axes.iter().any(|&a| perm[at] == a as i64)).collect();
    moved.sort_unstable();
    Ok(vec![(0, TokenAxes { axes: moved, weights: false, ..axes })])
}

fn regroup(tokens: &Tokens, cx: &Cx, node: &Node) -> Step {
    let (value, axes) = first(tokens, node)?;
    let output = node.output(0).ok_or(NO_SHAPE)?;
    let (Some(from), Some(to)) = (cx.facts.shape(value), cx.facts.shape(output)) else { return Err(NO_SHAPE) };
    let moved: Option<Vec<usize>> = axes.axes.iter().map(|&axis| kept_axis(from, to, axis)).collect();
    let moved = moved.ok_or(DIVIDED)?;
    if node.is("Reshape") && numbers(cx, node, 1).is_none() {
        return Err("the target of a Reshape of tokens is computed");
    }
    Ok(vec![(0, TokenAxes { axes: moved, weights: false, ..axes })])
}

fn slice(tokens: &mut Tokens, cx: &Cx, node: &Node) -> Step {
    let (value, axes) = first(tokens, node)?;
    let shape = cx.facts.shape(value).ok_or(NO_SHAPE)?;
    const COMPUTED: &str = "a slice of tokens is computed";
    let (starts, ends) = (numbers(cx, node, 1).ok_or(COMPUTED)?, numbers(cx, node, 2).ok_or(COMPUTED)?);
    let along = match node.input(3) {
        Some(_) => numbers(cx, node, 3).ok_or(COMPUTED)?,
        None => (0..starts.len() as i64).collect(),
    };
    let steps = match node.input(4) {
        Some(_) => numbers(cx, node, 4).ok_or(COMPUTED)?,
        None => vec![1; starts.len()],
    };
    if ends.len() != starts.len() || along.len() != starts.len() || steps.len() != starts.len() {
        return Err(COMPUTED);
    }
    let mut skipped = axes.skipped;
    for (index, &axis) in along.iter().enumerate() {
        let axis = on(axis, shape.len())?;
        if !axes.axes.contains(&axis) {
            continue;
        }
        let (start, end) = (usize::try_from(starts[index]), ends[index]);
        let (Ok(start), 1, [_]) = (start, steps[index], axes.axes.as_slice()) else {
            return Err("tokens are picked by their position");
        };
        if end > 0 && (end as usize) < tokens.count - axes.skipped {
            // The first few, whatever the others are.
            tokens.picked = tokens.picked.max(axes.skipped + end as usize);
            return Ok(Vec::new());
        }
        if end < 0 {
            return Err("tokens are picked by their position");
        }
        skipped += start;
        tokens.picked = tokens.picked.max(skipped);
    }
    Ok(vec![(0, TokenAxes { skipped, ..axes })])
}

fn gather(tokens: &mut Tokens, cx: &Cx, node: &Node) -> Step {
    let (axes, axis) = beside(tokens, cx, node, 0)?;
    let index = node.input(1).ok_or("an input is left out")?;
    let ndim = cx.facts.ndim(index).ok_or(NO_SHAPE)?;
    if tokens.of(index).is_some() {
        return Err("tokens are read other than as data");
    }
    if axes.axes.contains(&axis) {
        let picked = numbers(cx, node, 1).ok_or("tokens are picked by what is computed")?;
        let last = picked.iter().map(|&i| usize::try_from(i)).collect::<Result<Vec<_>, _>>();
        let last = last.ok().and_then(|all| all.into_iter().max()).filter(|_| axes.axes.len() == 1);
        let last = last.ok_or("tokens are picked by their position from the end")?;
        tokens.picked = tokens.picked.max(axes.skipped + last + 1);
        return Ok(Vec::new());
    }
    let moved = axes.axes.iter().map(|&a| if a > axis { a + ndim - 1 } else { a }).collect();
    Ok(vec![(0, TokenAxes { axes: moved, weights: false, ..axes })])
}

fn average(tokens: &mut Tokens, cx: &Cx, node: &Node, id: NodeId) -> Step {
    let (value, axes) = first(tokens, node)?;
    let ndim = cx.facts.ndim(value).ok_or(NO_SHAPE)?;
    let over = node.ints("axes").map(<[i64]>::to_vec).or_else(|| numbers(cx, node, 1));
    let over = over.filter(|all| !all.is_empty()).ok_or("an average runs over everything, tokens included")?;
    let over = over.into_iter().map(|axis| on(axis, ndim)).collect::<Result<Vec<_>, _>>()?;
    let kept = node.int("keepdims").unwrap_or(1) != 0;
    if axes.axes.iter().any(|axis| over.contains(axis)) {
        if over.len() != 1 || axes.axes != [1] || ndim != 3 {
            return Err("an average runs over tokens and other axes");
        }
        tokens.averages.push(id);
        return Ok(Vec::new());
    }
    let moved = |&axis: &usize| if kept { axis } else { axis - over.iter().filter(|&&o| o < axis).count() };
    let moved = axes.axes.iter().map(moved).collect();
    Ok(vec![(0, TokenAxes { axes: moved, weights: false, ..axes })])
}

/// Sizes may be read as long as the number of tokens is not among them.
fn sizes(tokens: &Tokens, cx: &Cx, node: &Node) -> Step {
    let (value, axes) = first(tokens, node)?;
    let ndim = cx.facts.ndim(value).ok_or(NO_SHAPE)? as i64;
    let bound = |name: &str, default: i64| {
        let at = node.int(name).unwrap_or(default);
        (if at < 0 { at + ndim } else { at }).clamp(0, ndim)
    };
    let range = bound("start", 0)..bound("end", ndim);
    let asked = |axis: i64| axes.axes.iter().any(|&a| a as i64 == axis);
    if !range.clone().any(asked) {
        return Ok(Vec::new());
    }
    let output = node.output(0).ok_or(NO_SHAPE)?;
    let beside = cx.graph.value(output).uses().iter().all(|place| {
        let lathe_ir::Use::Node(id, 0) = *place else { return false };
        let reader = cx.graph.node(id);
        let picked = numbers(cx, reader, 1).filter(|_| reader.is("Gather"));
        let at = |i: &i64| range.start + if *i < 0 { i + range.end - range.start } else { *i };
        picked.is_some_and(|all| all.iter().all(|i| !asked(at(i))))
    });
    if beside { Ok(Vec::new()) } else { Err("the number of tokens is read") }
}
