//! Linear layers on their own: what they read is rounded, what they give stays as it was.

use super::{
    Options,
    channels::smoothing as smoothed_by,
    emit::StaticEdit,
    ranges::{Codes, Params, Ranges},
    rounding::{Fits, Numbers, fit_products, product_numbers},
    sizes, smoothing, spreads,
    units::{floats, is_row},
};
use crate::{
    Error,
    lossy::{
        Candidate, Cost, Edit, Loss, MethodContext, OVERHEAD, Proposal, Site, Weight,
        factors::{self, LayerStatistics, products_seen},
        weights, within_memory,
    },
};
use lathe_analysis::{Facts, Rows, Spread};
use lathe_ir::{DataType, Graph, Model, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Powers of ranges that factors may have, in tenths.
const POWERS: std::ops::RangeInclusive<u8> = 3..=9;

/// Part of the error of the products at which dividing what they read is worth a try.
const WORTH: f64 = 0.98;

/// Floating-point operations that trying products in the whole model may take.
const MOST_FLOPS: f64 = 4e12;

/// Runs over the samples of trials that this takes: numbers are counted once, and two variants tried.
const RUNS: f64 = 6.0;

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
pub(super) fn refusal(graph: &Graph, weight: &Weight) -> Option<&'static str> {
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

/// A weight with what was seen of its uses.
struct Layer<'a> {
    weight: &'a Weight,
    inputs: Vec<Input>,
    /// What codes can be fitted to.
    seen: Option<LayerStatistics>,
}

/// Factors by which what products read is divided.
type Factors = BTreeMap<ValueId, Vec<f32>>;

/// Proposes every linear layer.
pub(super) fn propose(
    model: &Model,
    cx: &MethodContext,
    options: Options,
    proposal: &mut Proposal,
) -> Result<(), Error> {
    let (graph, facts) = (&model.graph, Facts::infer(model));
    let place = |weight: &Weight| format!("`{}`", graph.value(weight.value).name);
    let spreads = spreads((graph, &facts), inputs(graph, &facts), cx)?;
    let (found, _) = weights(graph);
    let mut layers = Vec::new();
    for weight in found.iter().filter(|weight| weight.dims.len() == 2) {
        let seen = match refusal(graph, weight) {
            Some(reason) => Err(reason),
            None => inputs_of(graph, weight, &spreads, cx)?,
        };
        match seen {
            Ok(inputs) => layers.push(Layer { weight, inputs, seen: products_seen(graph, weight, cx)?.ok() }),
            Err(reason) => proposal.outcome.refuse(reason, place(weight)),
        }
    }
    let candidates = candidates(graph, cx, &layers, options);
    let factors = smoothing_of((graph, &facts), cx, &layers, options)?;
    let affords = cx.calibration.is_some_and(|calibration| RUNS * calibration.trial_flops() <= MOST_FLOPS);
    if !affords && !factors.is_empty() {
        proposal.outcome.refuse(
            "dividing what layers read by channel was not tried: running the model takes too long",
            "the model",
        );
    }
    let smoothed = match affords && !factors.is_empty() {
        true => smoothed(model, cx, &layers, (options, &factors))?,
        false => None,
    };
    let candidates = match smoothed {
        Some(smoothed) if loses_less(model, cx, &layers, [&smoothed, &candidates])? => smoothed,
        _ => candidates,
    };
    for (layer, candidate) in layers.iter().zip(candidates) {
        match candidate {
            Some((candidate, _)) => {
                let site = layer.weight.site(graph, vec![candidate]);
                proposal.sites.push(Site { required: options.everywhere, ..site });
            }
            None => proposal.outcome.refuse("the constant holds a NaN or an infinity", place(layer.weight)),
        }
    }
    Ok(())
}

/// Candidates with the codes that were fitted to them; `None` where a weight is not finite.
type Candidates = Vec<Option<(Candidate, Fits)>>;

fn candidates(graph: &Graph, cx: &MethodContext, layers: &[Layer<'_>], options: Options) -> Candidates {
    let bytes = |layer: &Layer<'_>| factors::working_bytes(layer.weight.sides());
    within_memory(layers, cx, bytes, |layer| layer.candidate(graph, options, None))
}

/// What divides what products read so that these lose less, as far as their errors tell: for every normalisation that gives
/// it, one power for all of its readers.
fn smoothing_of(
    (graph, facts): (&Graph, &Facts),
    cx: &MethodContext,
    layers: &[Layer<'_>],
    options: Options,
) -> Result<Factors, Error> {
    let mut readers: BTreeMap<ValueId, Vec<&Layer<'_>>> = BTreeMap::new();
    for layer in layers {
        for input in &layer.inputs {
            readers.entry(input.value).or_default().push(layer);
        }
    }
    // A weight that multiplies several values would be stored once for each.
    readers.retain(|&value, layers| {
        let alone = |layer: &&Layer<'_>| layer.inputs.iter().all(|input| input.value == value);
        let channels = layers[0].weight.sides().0;
        layers.iter().all(alone) && smoothing::constants(graph, value, channels).is_some()
    });
    let sizes = sizes((graph, facts), readers.keys().copied(), cx)?;
    let mut chosen = Factors::new();
    for (value, layers) in &readers {
        let Some(sizes) = sizes.get(value) else { continue };
        let numbers: Option<Vec<Numbers>> =
            layers.iter().map(|layer| product_numbers(graph, layer.weight, None).ok()).collect();
        let Some(numbers) = numbers.filter(|all| all.iter().all(|own| own.inputs() == sizes.len())) else { continue };
        let mut largest = vec![0.0f64; sizes.len()];
        for own in &numbers {
            for (at, &w) in own.numbers.iter().enumerate() {
                let most = &mut largest[own.place(at).0];
                *most = most.max(f64::from(w.abs()));
            }
        }
        let told = |factors: &[f32]| -> Option<f64> {
            let all = layers.iter().zip(&numbers);
            all.map(|(layer, own)| layer.told(value, own, (factors, sizes), options)).sum()
        };
        let Some(plain) = told(&vec![1.0; sizes.len()]) else { continue };
        let ways = POWERS.map(|power| smoothed_by(sizes, &largest, f64::from(power) / 10.0));
        let ways = ways.map(|factors| factors.into_iter().map(|s| s as f32).collect::<Vec<f32>>());
        let best = ways.filter_map(|factors| Some((told(&factors)?, factors))).min_by(|a, b| a.0.total_cmp(&b.0));
        chosen.extend(best.filter(|(lost, _)| *lost < WORTH * plain).map(|(_, factors)| (*value, factors)));
    }
    Ok(chosen)
}

/// Candidates with what they read divided, and its numbers counted anew; `None` where there is no calibration.
fn smoothed(
    model: &Model,
    cx: &MethodContext,
    layers: &[Layer<'_>],
    (options, factors): (Options, &Factors),
) -> Result<Option<Candidates>, Error> {
    let Some(calibration) = cx.calibration else { return Ok(None) };
    let mut variant = model.clone();
    let mut watched = Vec::new();
    for (&value, factors) in factors {
        let Ok(copy) = smoothing::divided(&mut variant.graph, value, factors) else { return Ok(None) };
        watched.push(Rows::last(variant.graph.value(copy).name.clone()));
    }
    let spreads = calibration.spreads_of(&variant, &watched)?;
    let spreads: BTreeMap<ValueId, Spread> =
        factors.keys().zip(spreads).filter_map(|(&value, spread)| Some((value, spread?))).collect();
    let divided = |layer: &Layer<'_>| {
        let value = layer.inputs.first()?.value;
        Some((factors.get(&value)?.as_slice(), spreads.get(&value)?))
    };
    let bytes = |layer: &Layer<'_>| factors::working_bytes(layer.weight.sides());
    let graph = &model.graph;
    Ok(Some(within_memory(layers, cx, bytes, |layer| layer.candidate(graph, options, divided(layer)))))
}

/// Whether the model loses less with every product as the first candidates have it than as the second ones do.
fn loses_less(model: &Model, cx: &MethodContext, layers: &[Layer<'_>], both: [&Candidates; 2]) -> Result<bool, Error> {
    let Some(calibration) = cx.calibration else { return Ok(false) };
    let variants = both.map(|candidates| {
        let mut variant = model.clone();
        for (layer, (candidate, fits)) in layers.iter().zip(candidates).filter_map(|(l, c)| Some((l, c.as_ref()?))) {
            let edit = candidate.edit.of::<StaticEdit>();
            let done = edit.emit_products(&mut variant.graph, layer.weight, fits);
            done.expect("an edit is made for this model");
        }
        variant
    });
    let lost = calibration.trials_of(&variants)?;
    Ok(lost[0] < lost[1])
}

/// What a product loses of its output, squared and relative, by input: to its own rounding, and to that of what it reads.
struct Lost {
    weight: Vec<f64>,
    energy: Vec<f64>,
}

impl Lost {
    fn of(numbers: &Numbers, codes: &Codes) -> Lost {
        let k = numbers.inputs();
        let (mut weight, mut energy) = (vec![0.0; k], vec![0.0; k]);
        for (at, &w) in numbers.numbers.iter().enumerate() {
            let (row, restored) = (numbers.place(at).0, codes.restored(at, numbers.scale_of(at)));
            weight[row] += f64::from(w - restored).powi(2);
            energy[row] += f64::from(restored).powi(2);
        }
        Lost { weight, energy }
    }

    /// With what is read having these mean squares, and rounded with this mean square error.
    fn told(&self, squares: &[f64], rounding: f64, gain: f64) -> f64 {
        let of_row =
            |row: usize| gain * self.weight[row] * squares[row] + self.energy[row] * rounding.min(squares[row]);
        (0..self.weight.len()).map(of_row).sum()
    }
}

/// Mean squares of what is divided by factors.
fn divided_squares(squares: &[f64], factors: Option<&[f32]>) -> Vec<f64> {
    match factors {
        Some(factors) => squares.iter().zip(factors).map(|(square, s)| square / f64::from(*s).powi(2)).collect(),
        None => squares.to_vec(),
    }
}

impl Layer<'_> {
    /// The squared relative error of its uses of a value, with this divided by factors and rounded in its whole range.
    fn told(
        &self,
        value: &ValueId,
        numbers: &Numbers,
        (factors, sizes): (&[f32], &[f64]),
        options: Options,
    ) -> Option<f64> {
        let scaled = numbers.numbers.iter().enumerate().map(|(at, w)| w * factors[numbers.place(at).0]);
        let own = Numbers { numbers: scaled.collect(), dims: numbers.dims.clone(), ..*numbers };
        let lost = Lost::of(&own, &own.codes(options.largest, None, None)?);
        let most = sizes.iter().zip(factors).map(|(size, s)| size / f64::from(*s)).fold(0.0, f64::max);
        // Ranges of both signs take all steps.
        let step = 2.0 * most / options.width.steps();
        let uses = self.inputs.iter().filter(|input| input.value == *value);
        let of_use = |input: &Input| {
            lost.told(&divided_squares(&input.squares, Some(factors)), step * step / 12.0, 1.0) / input.output
        };
        Some(uses.map(of_use).sum())
    }

    /// The layer with what it reads in codes, divided by factors if there are any; `None` where its weight is not finite.
    fn candidate(
        &self,
        graph: &Graph,
        options: Options,
        divided: Option<(&[f32], &Spread)>,
    ) -> Option<(Candidate, Fits)> {
        let Layer { weight, inputs, .. } = self;
        let (k, n) = weight.sides();
        let factors = divided.map(|(factors, _)| factors);
        let numbers = product_numbers(graph, weight, factors).ok()?;
        let codes = numbers.codes(options.largest, None, None)?;
        let lost = Lost::of(&numbers, &codes);
        let fitted = self.seen.as_ref().and_then(|seen| fit_products(graph, weight, seen, (options.largest, factors)));
        let gains = self.gains(&numbers, [&codes, fitted.as_ref().unwrap_or(&codes)], factors);
        let error = |(input, gain): (&Input, f64), params: Params| {
            let spread = divided.map_or(&input.spread, |(_, spread)| spread);
            let squares = divided_squares(&input.squares, factors);
            (lost.told(&squares, params.error(spread), gain) / input.output).sqrt()
        };
        let best = |own: (&Input, f64)| {
            let spread = divided.map_or(&own.0.spread, |(_, spread)| spread);
            let of = |ranges: Ranges| Params::of(ranges.of(spread, options.width), options.width);
            let all = options.ranges.tried().into_iter().map(of).map(|params| (error(own, params), params));
            all.min_by(|a, b| a.0.total_cmp(&b.0)).expect("some ranges are tried").1
        };
        let mut params: BTreeMap<ValueId, Params> = BTreeMap::new();
        for (input, &gain) in inputs.iter().zip(&gains) {
            // Uses that read one value round it once.
            params.entry(input.value).or_insert_with(|| best((input, gain)));
        }
        let errors = inputs.iter().zip(&gains).map(|(input, &gain)| error((input, gain), params[&input.value]));
        let errors = errors.collect();
        let elements = (k * n) as u64;
        let name = |value: ValueId| graph.value(value).name.clone();
        let read = inputs.first().map(|input| name(input.value));
        let own = name(weight.value);
        let edit = StaticEdit {
            units: Vec::new(),
            params: params.into_iter().map(|(value, params)| (name(value), params)).collect(),
            largest: options.largest,
            recipe: options.recipe,
            whole: true,
            scaled: Vec::new(),
            smoothed: read.zip(factors.map(<[f32]>::to_vec)).into_iter().collect(),
            fitted: fitted.iter().map(|_| own.clone()).collect(),
        };
        let cost = Cost {
            bytes: elements
                + 9 * n as u64
                + ADDED * OVERHEAD * inputs.len() as u64
                + 8 * factors.map_or(0, <[f32]>::len) as u64,
            parameters: elements,
            flops_per_row: 2 * elements,
        };
        let label = format!("static int8 products{}", edit.steps());
        let candidate = Candidate { label, cost, loss: Loss::PerTap(errors), edit: Edit::new(edit) };
        Some((candidate, fitted.map(|codes| (own, codes)).into_iter().collect()))
    }

    /// What every use loses to the rounding of the weight with the second codes, as a part of what it loses with the first.
    fn gains(&self, numbers: &Numbers, codes: [&Codes; 2], factors: Option<&[f32]>) -> Vec<f64> {
        let Some(judges) = self.seen.as_ref().and_then(|seen| seen.judges().ok()) else {
            return vec![1.0; self.inputs.len()];
        };
        let gain = |judge: &factors::Judge<'_>| {
            let [nearest, fitted] = codes.map(|codes| numbers.lost_under(codes, judge.gram, factors));
            if nearest > 0.0 { (fitted / nearest).max(0.0) } else { 1.0 }
        };
        judges.iter().map(gain).collect()
    }
}
