//! Linear layers on their own: what they read is rounded, what they give stays as it was.

use super::{
    Options,
    emit::StaticEdit,
    ranges::{Codes, Params, Ranges, STEPS},
    spreads,
    units::{floats, is_row},
};
use crate::{
    Error,
    lossy::{Candidate, Cost, Edit, Loss, MethodContext, OVERHEAD, Proposal, Site, Weight, on_all_cores, weights},
};
use lathe_analysis::{Facts, Spread};
use lathe_ir::{DataType, Graph, Model, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Nodes that a layer in codes has more: those that restore its weight and bias, and the pair before it.
const ADDED: u64 = 4;

/// What layers with constant weights multiply those with.
pub(super) fn inputs(graph: &Graph, facts: &Facts) -> BTreeSet<ValueId> {
    let float = |value: &ValueId| facts.elem(*value) == Some(DataType::Float) && facts.ndim(*value) > Some(0);
    let found = weights(graph).0;
    let layers = found.iter().filter(|weight| refusal(graph, weight).is_none());
    let read = layers.flat_map(|weight| &weight.taps).filter_map(|tap| graph.node(tap.node).input(0));
    read.filter(float).collect()
}

/// Why a weight is passed over whatever was seen.
fn refusal(graph: &Graph, weight: &Weight) -> Option<&'static str> {
    if weight.dims.len() != 2 {
        return Some("it is a convolution");
    }
    if weight.taps.iter().any(|tap| tap.rows.is_none()) {
        return Some("rows are picked of the constant");
    }
    if weight.taps.iter().any(|tap| tap.inputs_axis != weight.inputs_axis()) {
        return Some("its uses sum over different axes");
    }
    if weight.sides().0 > super::units::MOST_PRODUCTS {
        return Some("an output adds up more products than 32 bits have room for");
    }
    let coded = |tap: &crate::lossy::Tap| {
        let data = graph.node(tap.node).input(0).and_then(|data| graph.producer(data));
        data.is_some_and(|id| graph.node(id).is("DequantizeLinear"))
    };
    if weight.taps.iter().any(coded) {
        return Some("it is quantized already");
    }
    let outputs = weight.sides().1;
    let unlike = |tap: &crate::lossy::Tap| {
        let node = graph.node(tap.node);
        let scaled = ["alpha", "beta"].iter().any(|f| node.float(f).is_some_and(|factor| factor != 1.0));
        let is_bias = |bias: ValueId| floats(graph, Some(bias)).is_some_and(|bias| is_row(bias, outputs));
        node.is("Gemm") && (scaled || node.input(2).is_some_and(|bias| !is_bias(bias)))
    };
    let unlike = weight.taps.iter().any(unlike);
    unlike.then_some("its Gemm scales the product, or adds what is no constant with one number for every output")
}

/// What was seen of a use.
struct Input {
    value: ValueId,
    /// Mean squares of what the weight is multiplied with, `[k]`.
    squares: Vec<f64>,
    spread: Spread,
    /// Mean square norm of a row of the output.
    output: f64,
}

/// What was seen of every use, or why the weight is passed over.
fn inputs_of(
    graph: &Graph,
    weight: &Weight,
    spreads: &BTreeMap<ValueId, Spread>,
    cx: &MethodContext,
) -> Result<Result<Vec<Input>, &'static str>, Error> {
    const UNSEEN: &str = "nothing was seen of it on the calibration set";
    let Some(calibration) = cx.calibration else { return Ok(Err(UNSEEN)) };
    let mut inputs = Vec::new();
    for tap in &weight.taps {
        let (Some(rows), Some(value)) = (&tap.rows, graph.node(tap.node).input(0)) else { return Ok(Err(UNSEEN)) };
        let (moments, output) = (calibration.moments(rows)?, calibration.moments(&tap.output_rows)?);
        let (Some(moments), Some(output), Some(spread)) = (moments, output, spreads.get(&value)) else {
            return Ok(Err(UNSEEN));
        };
        let output: f64 = output.square.iter().sum();
        let finite = moments.square.iter().all(|square| square.is_finite());
        if moments.square.len() != weight.sides().0 || !finite || !(output.is_finite() && output > 0.0) {
            return Ok(Err("what it reads is not finite, or what it gives is all zero"));
        }
        inputs.push(Input { value, squares: moments.square, spread: spread.clone(), output });
    }
    Ok(Ok(inputs))
}

/// Proposes every linear layer.
pub(super) fn propose(
    model: &Model,
    cx: &MethodContext,
    options: Options,
    proposal: &mut Proposal,
) -> Result<(), Error> {
    let graph = &model.graph;
    let place = |weight: &Weight| format!("`{}`", graph.value(weight.value).name);
    let spreads = spreads(graph, inputs(graph, &Facts::infer(model)), cx)?;
    let (found, _) = weights(graph);
    let mut work = Vec::new();
    for weight in found.iter().filter(|weight| weight.dims.len() == 2) {
        let seen = match refusal(graph, weight) {
            Some(reason) => Err(reason),
            None => inputs_of(graph, weight, &spreads, cx)?,
        };
        match seen {
            Ok(inputs) => work.push((weight, inputs)),
            Err(reason) => proposal.outcome.refuse(reason, place(weight)),
        }
    }
    let candidates = on_all_cores(cx, &work, |(weight, inputs)| candidate(graph, weight, inputs, options));
    for ((weight, _), candidate) in work.iter().zip(candidates) {
        match candidate {
            Some(candidate) => {
                let site = weight.site(graph, vec![candidate]);
                proposal.sites.push(Site { required: options.everywhere, ..site });
            }
            None => proposal.outcome.refuse("the constant holds a NaN or an infinity", place(weight)),
        }
    }
    Ok(())
}

/// The layer with what it reads in codes; `None` where its weight is not finite.
fn candidate(graph: &Graph, weight: &Weight, inputs: &[Input], options: Options) -> Option<Candidate> {
    let (k, n) = weight.sides();
    let tensor = floats(graph, Some(weight.value))?;
    let numbers = tensor.to_f32s()?;
    tensor.release();
    let turned = weight.inputs_axis() == 1;
    let output = |at: usize| if turned { at / k } else { at % n };
    let codes = Codes::of(&numbers, output, options.largest, &vec![0.0; n])?;
    let (mut lost, mut energy) = (vec![0.0; k], vec![0.0; k]);
    for (at, &w) in numbers.iter().enumerate() {
        let (row, restored) = (if turned { at % k } else { at / n }, codes.restored(at, output(at)));
        lost[row] += f64::from(w - restored).powi(2);
        energy[row] += f64::from(restored).powi(2);
    }
    let error = |input: &Input, params: Params| {
        let rounding = input.spread.error(params.range(), STEPS);
        let of_row = |row: usize| lost[row] * input.squares[row] + energy[row] * rounding.min(input.squares[row]);
        ((0..k).map(of_row).sum::<f64>() / input.output).sqrt()
    };
    let best = |input: &Input| {
        let ranges = options.ranges.tried().into_iter().map(|ranges: Ranges| Params::of(ranges.of(&input.spread)));
        let all = ranges.map(|params| (error(input, params), params));
        all.min_by(|a, b| a.0.total_cmp(&b.0)).expect("some ranges are tried")
    };
    let mut params: BTreeMap<ValueId, Params> = BTreeMap::new();
    for input in inputs {
        // Uses that read one value round it once.
        params.entry(input.value).or_insert_with(|| best(input).1);
    }
    let errors = inputs.iter().map(|input| error(input, params[&input.value])).collect();
    let elements = (k * n) as u64;
    let name = |value: ValueId| graph.value(value).name.clone();
    let params = params.into_iter().map(|(value, params)| (name(value), params)).collect();
    Some(Candidate {
        label: "static int8 products".to_owned(),
        cost: Cost {
            bytes: elements + 9 * n as u64 + ADDED * OVERHEAD * inputs.len() as u64,
            parameters: elements,
            flops_per_row: 2 * elements,
        },
        loss: Loss::PerTap(errors),
        edit: Edit::new(StaticEdit {
            units: Vec::new(),
            params,
            largest: options.largest,
            recipe: options.recipe,
            whole: true,
        }),
    })
}
