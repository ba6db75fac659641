//! Where something without parameters could stand, and why not elsewhere.

use super::fit::Fit;
use crate::lossy::{prune_units::own_values, spectrum::product};
use faer::Mat;
use lathe_analysis::{Facts, Rows, UnitKind, Units, View};
use lathe_ir::{DataType, Graph, Model, Node, NodeId, Origin, ScopeId, Tensor, Use, ValueId};
use std::collections::BTreeSet;

/// Operators of one input that may stand between a convolution and the pointwise layer after it.
const ACTIVATIONS: [&str; 13] = [
    "Relu",
    "Clip",
    "LeakyRelu",
    "HardSwish",
    "HardSigmoid",
    "Sigmoid",
    "Tanh",
    "Gelu",
    "Elu",
    "Selu",
    "Mish",
    "Softplus",
    "Identity",
];

/// Operators between a convolution and the pointwise layer after it at most.
const MOST_STEPS: usize = 2;

/// Sides of a grid of tokens at least.
const SMALLEST_SIDE: usize = 3;

/// How the features of what a place reads and gives lie.
#[derive(Debug, Clone)]
pub(super) enum Layout {
    /// Channels on axis 1 of an image that a window moves over.
    Image(Window),
    /// The last axis of rows; `[batch, tokens, features]` where tokens may be mixed.
    Tokens(Option<Tokens>),
}

/// A centred window.
#[derive(Debug, Clone)]
pub(super) struct Window {
    pub kernel: Vec<i64>,
    pub strides: Vec<i64>,
    /// For every channel that is read, the place of the window that its weights are largest at, from the centre.
    pub shifts: Vec<Vec<i64>>,
}

impl Window {
    pub fn pads(&self) -> Vec<i64> {
        let half = || self.kernel.iter().map(|k| (k - 1) / 2);
        half().chain(half()).collect()
    }
}

/// A fixed number of tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tokens {
    pub grid: Option<Grid>,
}

/// A square of tokens behind some that are none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    pub front: usize,
    pub side: usize,
}

/// The square that so many tokens make, behind a class token or alone.
pub(super) fn grid(tokens: usize) -> Option<Grid> {
    let found = [0, 1].into_iter().find_map(|front| {
        let side = tokens.checked_sub(front)?.isqrt();
        (side * side + front == tokens).then_some(Grid { front, side })
    });
    found.filter(|grid| grid.side >= SMALLEST_SIDE)
}

/// The pointwise layer behind a convolution.
#[derive(Debug, Clone)]
pub(super) struct Second {
    /// What it reads.
    pub reads: ValueId,
    /// Channels of that.
    pub inputs: usize,
    weight: ValueId,
    bias: Option<ValueId>,
}

impl Second {
    /// The layer behind a map, as one map.
    pub fn after(&self, graph: &Graph, first: &Fit) -> Option<Fit> {
        let weight = graph.constant(self.weight)?;
        let (outputs, inputs) = (*weight.dims().first()?, self.inputs);
        let numbers = weight.to_f32s()?;
        let layer = Mat::from_fn(inputs, outputs, |i, o| f64::from(numbers[o * inputs + i]));
        let own = match self.bias {
            Some(bias) => graph.constant(bias)?.to_f64s()?,
            None => vec![0.0; outputs],
        };
        let moved = product(Mat::from_fn(1, inputs, |_, i| first.bias[i]).as_ref(), layer.as_ref());
        let bias = own.iter().enumerate().map(|(o, b)| b + moved[(0, o)]).collect();
        Some(Fit { matrix: product(first.matrix.as_ref(), layer.as_ref()), bias })
    }
}

/// Somewhere between two values.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub name: String,
    pub reads: ValueId,
    pub output: ValueId,
    /// The nodes between them, in order.
    pub nodes: Vec<NodeId>,
    pub footprint: Vec<ValueId>,
    pub layout: Layout,
    /// Features read.
    pub inputs: usize,
    /// Features given.
    pub outputs: usize,
    /// The pointwise layer, if that is the last of several.
    pub second: Option<Second>,
    /// The operator set of the model.
    pub opset: i64,
}

impl Place {
    /// The axis of the features.
    pub fn axis(&self) -> i64 {
        if matches!(self.layout, Layout::Image(_)) { 1 } else { -1 }
    }

    /// A value that lies as what the place reads and gives.
    pub fn rows(&self, graph: &Graph, value: ValueId) -> Rows {
        Rows { value: graph.value(value).name.clone(), view: View::Axis(self.axis()) }
    }
}

/// The places of a model, and reasons with places for what is none.
pub(super) fn places(model: &Model) -> (Vec<Place>, Vec<(&'static str, String)>) {
    let graph = &model.graph;
    let facts = Facts::infer(model);
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    for id in graph.nodes(ScopeId::MAIN).filter(|&id| is_spatial(graph, id)) {
        match convolution(graph, &facts, id) {
            Ok(place) => {
                found.extend(pair(graph, &facts, id, &place));
                found.push(place);
            }
            Err(reason) => refused.push((reason, graph.describe(id))),
        }
    }
    let units = Units::find(model, &facts);
    for (id, unit) in units.iter() {
        if !matches!(unit.kind, UnitKind::Attention | UnitKind::Mlp) {
            continue;
        }
        let name = units.label(graph, id);
        match branch(graph, &facts, unit, name.clone()) {
            Ok(place) => found.push(place),
            Err(reason) => refused.push((reason, format!("`{name}`"))),
        }
    }
    found.iter_mut().for_each(|place| place.opset = model.opset());
    (found, refused)
}

/// Whether a node is a convolution with a constant kernel of more than one pixel.
fn is_spatial(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    let weight = node.input(1).filter(|_| node.is("Conv")).and_then(|w| graph.constant(w));
    weight.is_some_and(|w| w.dims().len() > 2 && w.dims()[2..].iter().any(|&k| k > 1))
}

fn convolution(graph: &Graph, facts: &Facts, id: NodeId) -> Result<Place, &'static str> {
    let node = graph.node(id);
    let (reads, output, weight) = ends(graph, node)?;
    let tensor = weight_of(graph, weight)?;
    let dims = tensor.dims();
    let group = node.int("group").unwrap_or(1);
    let inputs = dims[1] * usize::try_from(group).map_err(|_| "it has groups of several channels")?;
    let outputs = dims[0];
    if group != 1 && (dims[1] != 1 || outputs != inputs) {
        return Err("it has groups of several channels");
    }
    if facts.elem(reads) != Some(DataType::Float) {
        return Err("it reads no float32");
    }
    let kernel: Vec<i64> = dims[2..].iter().map(|&k| k as i64).collect();
    let list = |name: &str, default: i64| node.ints(name).map_or_else(|| vec![default; kernel.len()], <[i64]>::to_vec);
    if list("dilations", 1).iter().any(|&d| d != 1) {
        return Err("its window has gaps");
    }
    let strides = list("strides", 1);
    let half: Vec<i64> = kernel.iter().map(|k| (k - 1) / 2).collect();
    let odd = kernel.iter().all(|k| k % 2 == 1);
    let centred = match node.string("auto_pad").unwrap_or("NOTSET") {
        "NOTSET" => {
            let pads = node.ints("pads").map_or_else(|| vec![0; 2 * kernel.len()], <[i64]>::to_vec);
            pads == [half.as_slice(), &half].concat()
        }
        "SAME_UPPER" | "SAME_LOWER" => strides.iter().all(|&s| s == 1),
        _ => false,
    };
    if !odd || !centred {
        return Err("its window is not centred on what it gives");
    }
    let shifts = shifts(tensor, group != 1, inputs).ok_or("its weights are not finite")?;
    Ok(Place {
        name: graph.value(weight).name.clone(),
        reads,
        output,
        nodes: vec![id],
        footprint: vec![weight],
        layout: Layout::Image(Window { kernel, strides, shifts }),
        inputs,
        outputs,
        second: None,
        opset: 0,
    })
}

/// What a convolution reads and gives, and its weight.
fn ends(graph: &Graph, node: &Node) -> Result<(ValueId, ValueId, ValueId), &'static str> {
    let (Some(reads), Some(weight), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
        return Err("it lacks an input or an output");
    };
    if graph.constant(reads).is_some() {
        return Err("it reads a constant");
    }
    if graph.is_output(output) {
        return Err("it gives an output of the model");
    }
    Ok((reads, output, weight))
}

fn weight_of(graph: &Graph, weight: ValueId) -> Result<&Tensor, &'static str> {
    let tensor = graph.constant(weight).filter(|t| t.dtype() == DataType::Float);
    let tensor = tensor.ok_or("its weights are no float32 constant")?;
    if graph.value(weight).uses().len() > 1
        || !matches!(graph.value(weight).origin(), Origin::Initializer(ScopeId::MAIN))
    {
        return Err("others share its weights");
    }
    Ok(tensor)
}

/// The place of the window, from its centre, at which every channel that is read has its largest weights.
fn shifts(weight: &Tensor, depthwise: bool, inputs: usize) -> Option<Vec<Vec<i64>>> {
    let numbers = weight.to_f32s().filter(|w| w.iter().all(|x| x.is_finite()))?;
    weight.release();
    let kernel = &weight.dims()[2..];
    let taps: usize = kernel.iter().product();
    let mut energy = vec![0.0f64; inputs * taps];
    for (at, x) in numbers.into_iter().enumerate() {
        let channel = if depthwise { at / taps } else { at / taps % inputs };
        energy[channel * taps + at % taps] += f64::from(x).powi(2);
    }
    let shift = |energy: &[f64]| {
        let mut tap = (0..taps).max_by(|&a, &b| energy[a].total_cmp(&energy[b])).unwrap_or(0);
        let mut offset: Vec<i64> = kernel
            .iter()
            .rev()
            .map(|&k| {
                let at = tap % k;
                tap /= k;
                at as i64 - (k as i64 - 1) / 2
            })
            .collect();
        offset.reverse();
        offset
    };
    Some(energy.chunks(taps).map(shift).collect())
}

/// A convolution with the activation and the pointwise layer behind it.
fn pair(graph: &Graph, facts: &Facts, id: NodeId, first: &Place) -> Option<Place> {
    let mut nodes = vec![id];
    let mut value = first.output;
    for _ in 0..=MOST_STEPS {
        let uses = graph.value(value).uses();
        let &Use::Node(next, 0) = uses.first().filter(|_| uses.len() == 1)? else { return None };
        let node = graph.node(next);
        nodes.push(next);
        if node.scope() != ScopeId::MAIN {
            return None;
        }
        let step = |v: &ValueId| graph.constant(*v).is_some();
        if ACTIVATIONS.iter().any(|op| node.is(op)) && node.inputs().iter().skip(1).flatten().all(step) {
            value = node.output(0)?;
            continue;
        }
        if !node.is("Conv") || facts.elem(value) != Some(DataType::Float) {
            return None;
        }
        let (reads, output, weight) = ends(graph, node).ok()?;
        let dims = weight_of(graph, weight).ok()?.dims();
        let list = |name: &str, plain: i64| node.ints(name).is_none_or(|l| l.iter().all(|&x| x == plain));
        let pointwise = dims.len() > 2 && dims[2..].iter().all(|&k| k == 1) && list("strides", 1) && list("pads", 0);
        let own = node.int("group").unwrap_or(1) == 1
            && matches!(node.string("auto_pad").unwrap_or("NOTSET"), "NOTSET" | "VALID");
        let bias = node.input(2).filter(|b| graph.constant(*b).is_some());
        if !pointwise || !own || bias != node.input(2) || dims[1] != first.outputs {
            return None;
        }
        let mut footprint = vec![first.footprint[0], weight];
        footprint.sort_unstable();
        return Some(Place {
            name: format!("{}, {}", first.name, graph.value(weight).name),
            output,
            nodes,
            footprint,
            outputs: dims[0],
            second: Some(Second { reads, inputs: dims[1], weight, bias }),
            ..first.clone()
        });
    }
    None
}

/// What a unit adds to the stream, from its normalization on.
fn branch(graph: &Graph, facts: &Facts, unit: &lathe_analysis::Unit, name: String) -> Result<Place, &'static str> {
    if graph.node(unit.join).scope() != ScopeId::MAIN {
        return Err("it lies in a subgraph");
    }
    let &[output] = unit.branch.as_slice() else { return Err("its branches cannot be told apart") };
    if !unit.side_inputs.is_empty() || !unit.outputs.is_empty() || !unit.shape_taps.is_empty() {
        return Err("it reads or gives more than the stream");
    }
    let (reads, norm) = entry(graph, unit);
    let all: BTreeSet<NodeId> =
        unit.nodes.iter().chain(&unit.support).copied().filter(|id| Some(*id) != norm).collect();
    let floats = |v: ValueId| facts.elem(v) == Some(DataType::Float);
    if !floats(reads) || !floats(output) || graph.is_output(output) {
        return Err("its stream holds no float32, or is an output of the model");
    }
    let width = |value: ValueId| {
        let shape = facts.shape(value).filter(|s| s.len() == 2 || s.len() == 3)?;
        usize::try_from(shape.last()?.as_known()?).ok().filter(|&w| w > 1)
    };
    let (Some(inputs), Some(outputs)) = (width(reads), width(output)) else {
        return Err("its features are not on the last axis, or their number is not known");
    };
    if inputs > super::MOST_FEATURES {
        return Err("it has too many features to be fitted");
    }
    let mixes = unit.kind == UnitKind::Attention && sees_all_tokens(graph, &all);
    let tokens = facts.shape(reads).filter(|s| s.len() == 3 && mixes);
    let tokens = tokens.and_then(|s| usize::try_from(s[1].as_known()?).ok()).filter(|&n| n > 1);
    Ok(Place {
        name,
        reads,
        output,
        footprint: own_values(graph, &all).into_iter().collect(),
        nodes: graph.nodes(ScopeId::MAIN).filter(|id| all.contains(id)).collect(),
        layout: Layout::Tokens(tokens.map(|count| Tokens { grid: grid(count) })),
        inputs,
        outputs,
        second: None,
        opset: 0,
    })
}

/// Whether attention among these nodes is spelled out and has no mask: an average of all tokens in the place of a causal
/// attention would know tokens that are yet to come.
fn sees_all_tokens(graph: &Graph, nodes: &BTreeSet<NodeId>) -> bool {
    let mut weights = nodes.iter().map(|&id| graph.node(id)).filter(|node| node.is("Softmax")).peekable();
    let bare = |scores: Option<ValueId>| {
        let mut value = scores?;
        loop {
            let node = graph.node(graph.producer(value)?);
            if node.is("MatMul") || node.is("Einsum") {
                return Some(());
            }
            if !["Mul", "Div", "Cast", "Identity"].iter().any(|op| node.is(op)) {
                return None;
            }
            let numbers =
                node.inputs().iter().skip(1).flatten().all(|&v| graph.constant(v).is_some_and(|t| t.len() == 1));
            value = node.input(0).filter(|_| numbers)?;
        }
    };
    weights.peek().is_some() && weights.all(|node| bare(node.input(0)).is_some())
}

/// What all of a branch is computed from: its normalization in one node, if nothing else reads the stream, which is told
/// too; or the stream.
fn entry(graph: &Graph, unit: &lathe_analysis::Unit) -> (ValueId, Option<NodeId>) {
    let reads_stream = |id: &NodeId| graph.node(*id).inputs().contains(&Some(unit.stream_in));
    let mut readers = unit.nodes.iter().chain(&unit.support).copied().filter(reads_stream);
    let norm = |id: &NodeId| {
        let op = &graph.node(*id).op_type;
        ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"].contains(&op.as_str())
    };
    match (readers.next().filter(norm), readers.next()) {
        (Some(id), None) => (graph.node(id).output(0).unwrap_or(unit.stream_in), Some(id)),
        _ => (unit.stream_in, None),
    }
}
