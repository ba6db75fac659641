//! Attentions as models spell them, or as one `MultiHeadAttention`.

use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, NodeId, ScopeId, Use, ValueId};

/// Tokens below which no choice of blocks is faster.
const FEWEST: usize = 512;

/// An attention of all tokens to all.
pub(super) struct Place {
    /// What it gives: `[…, n, size]`, or `[batch, n, heads · size]` where it is one node.
    pub output: ValueId,
    /// Its nodes.
    pub nodes: Vec<NodeId>,
    /// Queries, keys and values: `[…, n, d]`, or `[batch, n, heads · d]` where it is one node.
    pub read: [ValueId; 3],
    /// Whether the keys are `[…, d, n]`.
    pub turned: bool,
    /// Whether heads are side by side in the last axis.
    pub joined: bool,
    /// Heads, if they are an axis of their own in the scores, `[batch, heads, n, n]`; else the scores are `[batch, n, n]`.
    pub heads: Option<usize>,
    /// Features of a query and of a value.
    pub sizes: [usize; 2],
    /// What scores are multiplied by.
    pub scale: f64,
    /// What is added to them.
    pub masks: Vec<Mask>,
    /// Tokens.
    pub tokens: usize,
}

/// What is added to scores.
pub(super) struct Mask {
    pub value: ValueId,
    /// Whether it is told for every query, or for all of them at once.
    pub by_query: bool,
    /// Whether every head has its own.
    pub by_head: bool,
    /// Whether every sample has its own.
    pub by_sample: bool,
}

impl Place {
    pub fn called(&self, model: &Model) -> String {
        format!("`{}`", model.graph.value(self.output).name)
    }
}

/// Every attention of the main graph, or why it cannot be one over blocks, and where.
pub(super) fn places(model: &Model, facts: &Facts) -> Vec<Result<Place, (&'static str, String)>> {
    let graph = &model.graph;
    let mut found = Vec::new();
    for id in graph.nodes(ScopeId::MAIN) {
        let node = graph.node(id);
        let Some(output) = node.output(0) else { continue };
        let place = match node.op_type.as_str() {
            "Softmax" if node.is_standard() => match sums(graph, output) {
                Some(_) => spelled(graph, facts, id),
                None => continue,
            },
            "MultiHeadAttention" => fused(graph, facts, id),
            "GroupQueryAttention" | "Attention" => {
                Err("only attentions that are spelled out, or are MultiHeadAttention, can leave blocks out")
            }
            _ => continue,
        };
        found.push(place.map_err(|reason| (reason, format!("`{}`", graph.value(output).name))));
    }
    found
}

/// The product of weights with values that alone reads them.
fn sums(graph: &Graph, weights: ValueId) -> Option<NodeId> {
    let product = |place: &Use| match *place {
        Use::Node(id, 0) if graph.node(id).is("MatMul") => Some(id),
        _ => None,
    };
    graph.value(weights).uses().iter().find_map(product)
}

fn spelled(graph: &Graph, facts: &Facts, softmax: NodeId) -> Result<Place, &'static str> {
    let node = graph.node(softmax);
    let (Some(mut scores), Some(weights)) = (node.input(0), node.output(0)) else { return Err("its softmax is empty") };
    let last = sums(graph, weights).ok_or("its weights are multiplied with no values")?;
    let alone = |value: ValueId| graph.value(value).uses().len() == 1 && !graph.is_output(value);
    if !alone(weights) {
        return Err("its weights are read by other than the weighted sums");
    }
    let dims = facts
        .shape(weights)
        .filter(|dims| matches!(dims.len(), 3 | 4))
        .ok_or("its scores have other than three or four axes")?;
    let axis = node.int("axis").unwrap_or(-1);
    if axis != -1 && axis != dims.len() as i64 - 1 {
        return Err("its softmax is over other than keys");
    }
    let tokens = tokens(dims[dims.len() - 2].as_known(), dims[dims.len() - 1].as_known())?;
    let heads = match dims.len() {
        4 => Some(size(dims[1].as_known()).ok_or("its number of heads is open")?),
        _ => None,
    };
    let (mut nodes, mut scale, mut masks) = (vec![softmax, last], 1.0, Vec::new());
    let product = loop {
        let id = graph.producer(scores).filter(|_| alone(scores)).ok_or("its scores have other uses")?;
        let node = graph.node(id);
        nodes.push(id);
        if node.is("MatMul") {
            break id;
        }
        let (Some(a), Some(b)) = (node.input(0), node.input(1)) else {
            return Err("its scores are changed by other than scales and sums");
        };
        let number = |v: ValueId| graph.constant(v).filter(|t| t.len() == 1)?.to_f64s()?.first().copied();
        let inner = |v: ValueId| facts.shape(v).is_some_and(|own| own == dims) && graph.producer(v).is_some();
        scores = match node.op_type.as_str() {
            "Mul" | "Div" if number(b).is_some() => {
                let factor = number(b).unwrap_or(1.0);
                scale *= if node.is("Mul") { factor } else { 1.0 / factor };
                a
            }
            "Mul" if number(a).is_some() => {
                scale *= number(a).unwrap_or(1.0);
                b
            }
            // A sum that is scaled afterwards would have to be scaled as a mask too.
            "Add" if scale == 1.0 => {
                let from_product = |v: ValueId| inner(v) && alone(v) && leads_to_product(graph, v);
                let (on, mask) = match (from_product(a), from_product(b)) {
                    (true, _) => (a, b),
                    (_, true) => (b, a),
                    _ => return Err("what is added to its scores cannot be told from them"),
                };
                masks.push(mask_of(facts, mask, dims.len(), tokens, heads)?);
                on
            }
            _ => return Err("its scores are changed by other than scales and sums"),
        };
    };
    let (Some(q), Some(k)) = (graph.node(product).input(0), graph.node(product).input(1)) else {
        return Err("its scores are no product");
    };
    let (Some(v), Some(output)) = (graph.node(last).input(1), graph.node(last).output(0)) else {
        return Err("its values are missing");
    };
    let lead = &dims[..dims.len() - 2];
    let fits = |v: ValueId, at: usize, n: usize| {
        let own = facts.shape(v).filter(|own| own.len() == dims.len() && own[..lead.len()] == *lead)?;
        let own = &own[lead.len()..];
        (own[at].as_known() == Some(n as i64)).then(|| size(own[1 - at].as_known()))?
    };
    let (Some(d), Some(_), Some(dv)) = (fits(q, 0, tokens), fits(k, 1, tokens), fits(v, 0, tokens)) else {
        return Err("its queries, keys and values are not of the same heads");
    };
    float(facts, &[q, k, v])?;
    nodes.sort();
    let place = Place {
        output,
        nodes,
        read: [q, k, v],
        turned: true,
        joined: false,
        heads,
        sizes: [d, dv],
        scale,
        masks,
        tokens,
    };
    Ok(place)
}

/// Whether scales and sums lead from a product to a value.
fn leads_to_product(graph: &Graph, mut value: ValueId) -> bool {
    while let Some(id) = graph.producer(value) {
        let node = graph.node(id);
        match node.op_type.as_str() {
            "MatMul" => return true,
            "Mul" | "Div" | "Add" => {}
            _ => return false,
        }
        let inner = node.inputs().iter().flatten().copied().find(|&v| graph.constant(v).is_none());
        let Some(next) = inner else { return false };
        value = next;
    }
    false
}

fn fused(graph: &Graph, facts: &Facts, id: NodeId) -> Result<Place, &'static str> {
    let node = graph.node(id);
    if [3, 4, 6, 7, 8, 9].iter().any(|&at| node.input(at).is_some()) || node.int("unidirectional").unwrap_or(0) != 0 {
        return Err("it has biases, a padding mask, a cache or a causal mask of its own");
    }
    if node.outputs().iter().skip(1).flatten().next().is_some() {
        return Err("it gives more than sums");
    }
    let (Some(q), Some(k), Some(v), Some(output)) = (node.input(0), node.input(1), node.input(2), node.output(0))
    else {
        return Err("its keys or values are packed");
    };
    let heads = size(node.int("num_heads")).ok_or("its number of heads is missing")?;
    let shape =
        |v: ValueId| facts.shape(v).filter(|dims| dims.len() == 3).ok_or("its parts have other than three axes");
    let (queries, keys, values) = (shape(q)?, shape(k)?, shape(v)?);
    let tokens = tokens(queries[1].as_known(), keys[1].as_known())?;
    if queries[0] != keys[0] || queries[0] != values[0] || values[1] != keys[1] {
        return Err("its queries, keys and values are not of the same heads");
    }
    let width = |dims: &[lathe_analysis::DimExpr]| size(dims[2].as_known()).filter(|width| width % heads == 0);
    let (Some(d), Some(dv)) = (width(queries), width(values)) else { return Err("its features are open") };
    let (d, dv) = (d / heads, dv / heads);
    float(facts, &[q, k, v])?;
    let masks = match node.input(5) {
        Some(mask) => vec![mask_of(facts, mask, 4, tokens, Some(heads))?],
        None => Vec::new(),
    };
    let scale = node.float("scale").filter(|scale| *scale != 0.0).map_or(1.0 / (d as f64).sqrt(), f64::from);
    let read = [q, k, v];
    Ok(Place {
        output,
        nodes: vec![id],
        read,
        turned: false,
        joined: true,
        heads: Some(heads),
        sizes: [d, dv],
        scale,
        masks,
        tokens,
    })
}

/// As many tokens as there are queries and keys, where blocks of them can be faster.
fn tokens(queries: Option<i64>, keys: Option<i64>) -> Result<usize, &'static str> {
    let (Some(queries), Some(keys)) = (size(queries), size(keys)) else {
        return Err("its number of tokens is open; --input-shape or --fix-dim fixes it");
    };
    if queries != keys {
        return Err("it has other keys than queries");
    }
    if queries < FEWEST {
        return Err("it has less than 512 tokens, where leaving blocks out is no faster");
    }
    if queries % 64 != 0 {
        return Err("its number of tokens is no multiple of 64");
    }
    Ok(queries)
}

fn size(dim: Option<i64>) -> Option<usize> {
    dim.and_then(|dim| usize::try_from(dim).ok()).filter(|dim| *dim > 0)
}

fn float(facts: &Facts, values: &[ValueId]) -> Result<(), &'static str> {
    let all = values.iter().all(|&v| facts.elem(v) == Some(DataType::Float));
    if all { Ok(()) } else { Err("its numbers are no float32") }
}

/// How what is added to scores of so many axes is told for every query, head and sample.
fn mask_of(
    facts: &Facts,
    value: ValueId,
    axes: usize,
    tokens: usize,
    heads: Option<usize>,
) -> Result<Mask, &'static str> {
    float(facts, &[value])?;
    let dims = facts.shape(value).ok_or("the shape of its mask is not known")?;
    let (count, known) = (dims.len(), |at: usize| dims[at].as_known());
    let n = Some(tokens as i64);
    if count < 1 || count > axes || known(count - 1) != n {
        return Err("its mask is not told for every key");
    }
    let one = |from_end: usize| count < from_end || known(count - from_end) == Some(1);
    let by_query = !one(2);
    if by_query && known(count - 2) != n {
        return Err("its mask is not told for every query");
    }
    let by_head = heads.is_some() && !one(3);
    if by_head && size(known(count - 3)) != heads {
        return Err("its mask has other heads");
    }
    Ok(Mask { value, by_query, by_head, by_sample: !one(if heads.is_some() { 4 } else { 3 }) })
}
