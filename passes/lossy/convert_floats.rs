//! Weights as floats of 16 bits: stored so and widened where they are used, or multiplied so where that is faster.

use super::{
    Candidate, Cost, Edit, Loss, Method, MethodContext, Needs, OVERHEAD, Proposal, Site, Tap, Weight, on_all_cores,
    stored::{self, Storage, Stored},
    weights,
};
use crate::{Error, Info, Kind, Outcome, Quantity, Saving};
use lathe_analysis::{Rows, View};
use lathe_ir::{DataType, Graph, Model, Node, ScopeId, Tensor, Use, ValueId};

/// Stores weights as 16-bit floats, and multiplies in them.
pub struct ConvertFloats;

static INFO: Info = Info {
    name: "convert-floats",
    summary: "store weights as 16-bit floats, and multiply in them where the provider does",
    doc: "Offers every float32 matrix, table and kernel as float16 or bfloat16 with a `Cast` back where it is used; rows \
          of tables are picked first. Weights of LSTM, GRU and RNN nodes, of grouped and transposed convolutions, and of \
          products with more than two axes are stored so too, with a loss that is measured in the whole model. Where latency is limited and the execution provider computes in half precision, \
          offers layers that multiply in float16 too, with casts on both sides: only those whose inputs, outputs and \
          biases stay below an eighth of float16's range on the calibration set; others stay in float32 with the \
          reason. Biases and the parameters of normalizations stay float32. Declines float16 where a number lies \
          beyond its range, and bfloat16 before operator set 13.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters],
    source: Some("IEEE 754 binary16; bfloat16"),
};

/// The oldest operator sets whose `Cast` says its type as a number, and knows bfloat16.
const OPSET: i64 = 9;
const BFLOAT16_OPSET: i64 = 13;

/// An eighth of float16's largest number: samples that were not seen may reach further than those that were.
const MOST: f64 = 65504.0 / 8.0;

/// The mean square of float16's relative rounding error, where the digits of numbers are spread as those of a bell curve
/// over many octaves are: 2⁻²² / (8 ln 2).
const ROUNDING: f64 = 1.0 / (8.0 * std::f64::consts::LN_2 * (1u64 << 22) as f64);

/// The mean square of the rounding error of numbers too small for float16's full precision.
const SMALLEST_STEP: f64 = 1.0 / (1u64 << 24) as f64;
const FLOOR: f64 = SMALLEST_STEP * SMALLEST_STEP / 12.0;

/// Numbers that are rounded at a time.
const LINE: usize = 1 << 12;

/// What becomes of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Stored in this type, float32 where it is used.
    Stored(DataType),
    /// Stored and multiplied as float16.
    Multiplied,
}

impl Form {
    const ALL: [Form; 3] = [Form::Stored(DataType::Float16), Form::Stored(DataType::Bfloat16), Form::Multiplied];

    /// As reports call it.
    fn name(self) -> &'static str {
        match self {
            Form::Stored(DataType::Float16) => "float16",
            Form::Stored(_) => "bfloat16",
            Form::Multiplied => "float16 products",
        }
    }

    fn dtype(self) -> DataType {
        match self {
            Form::Stored(dtype) => dtype,
            Form::Multiplied => DataType::Float16,
        }
    }
}

/// What was seen of a use.
struct Input {
    /// Mean squares of what the weight is multiplied with.
    squares: Vec<f64>,
    /// The largest magnitude among it, and of the output; `None` where it was not watched.
    largest: Option<f64>,
    largest_output: Option<f64>,
    /// Mean square norm of a row of the output.
    output: f64,
}

/// Numbers that a use of the weight sums over, or that a row which it picks has.
fn length(weight: &Weight, tap: &Tap) -> usize {
    if tap.inputs_axis == 0 { weight.dims[0] } else { weight.dims[1..].iter().product() }
}

/// What was seen of every use, or why the weight is passed over.
fn inputs_of(weight: &Weight, cx: &MethodContext) -> Result<Result<Vec<Input>, &'static str>, Error> {
    const UNSEEN: &str = "nothing was seen of it on the calibration set";
    let Some(calibration) = cx.calibration else { return Ok(Err(UNSEEN)) };
    let mut inputs = Vec::new();
    for tap in &weight.taps {
        let Some(output) = calibration.moments(&tap.output_rows)? else { return Ok(Err(UNSEEN)) };
        let (squares, largest) = match &tap.rows {
            // Rows are picked: each is as likely as any other.
            None => (vec![1.0 / weight.dims[0] as f64; length(weight, tap)], None),
            Some(rows) => {
                let Some(moments) = calibration.moments(rows)? else { return Ok(Err(UNSEEN)) };
                // Patches hold what their value holds.
                let range = match rows.view {
                    View::Patches(_) => calibration.moments(&Rows::channels(rows.value.clone()))?,
                    View::Axis(_) | View::Position(_) => Some(moments.clone()),
                };
                (moments.square, range.and_then(|m| m.largest))
            }
        };
        let energy: f64 = output.square.iter().sum();
        let finite = energy.is_finite() && energy > 0.0 && squares.iter().all(|x| x.is_finite());
        if squares.len() != length(weight, tap) || !finite {
            return Ok(Err("what it reads is not finite, or what it gives is all zero"));
        }
        inputs.push(Input { squares, largest, largest_output: output.largest, output: energy });
    }
    Ok(Ok(inputs))
}

/// The numbers as a type of 16 bits.
fn short(dtype: DataType, dims: &[usize], numbers: &[f32]) -> Tensor {
    let mut bytes = Vec::with_capacity(numbers.len() * 2);
    for line in numbers.chunks(LINE) {
        bytes.extend_from_slice(line_of(dtype, line).bytes());
    }
    Tensor::new(dtype, dims.to_vec(), bytes).expect("every number has two bytes")
}

fn line_of(dtype: DataType, line: &[f32]) -> Tensor {
    let wide: Vec<f64> = line.iter().map(|&w| f64::from(w)).collect();
    Tensor::from_f64s(dtype, &[line.len()], &wide).expect("both types are floats of 16 bits")
}

/// Sums of squares along both axes of the matrix of a weight: `[first, others]`.
#[derive(Clone)]
struct Sums([Vec<f64>; 2]);

impl Sums {
    fn new(weight: &Weight) -> Sums {
        Sums([vec![0.0; weight.dims[0]], vec![0.0; weight.dims[1..].iter().product()]])
    }

    fn add(&mut self, at: usize, square: f64) {
        let others = self.0[1].len();
        self.0[0][at / others] += square;
        self.0[1][at % others] += square;
    }

    /// Per input of a use.
    fn of(&self, tap: &Tap) -> &[f64] {
        &self.0[usize::from(tap.inputs_axis != 0)]
    }
}

/// What rounding a weight changes, and what is left.
struct Rounded {
    /// Squares of what is lost.
    lost: Sums,
    /// Squares of the rounded numbers.
    energy: Sums,
}

/// `None` if a number lies beyond the type's range.
fn rounded(weight: &Weight, numbers: &[f32], dtype: DataType) -> Option<Rounded> {
    let (mut lost, mut energy) = (Sums::new(weight), Sums::new(weight));
    for (index, line) in numbers.chunks(LINE).enumerate() {
        let stored = line_of(dtype, line).to_f64s().expect("floats are real numbers");
        for (at, (&w, s)) in line.iter().zip(stored).enumerate() {
            if !s.is_finite() {
                return None;
            }
            lost.add(index * LINE + at, (f64::from(w) - s).powi(2));
            energy.add(index * LINE + at, s * s);
        }
    }
    Some(Rounded { lost, energy })
}

/// What a use multiplies its product with.
fn gain(graph: &Graph, tap: &Tap) -> f64 {
    let node = graph.node(tap.node);
    if node.is("Gemm") { f64::from(node.float("alpha").unwrap_or(1.0)) } else { 1.0 }
}

/// The relative errors of all uses where the weight takes a form. Rounding errors of different numbers are unrelated, so
/// that only mean squares count.
fn errors(graph: &Graph, weight: &Weight, inputs: &[Input], rounded: &Rounded, form: Form) -> Vec<f64> {
    let error = |(tap, input): (&Tap, &Input)| {
        let weigh = |sums: &Sums, of: &dyn Fn(f64) -> f64| -> f64 {
            sums.of(tap).iter().zip(&input.squares).map(|(sum, &square)| sum * of(square)).sum()
        };
        let mut lost = weigh(&rounded.lost, &|square| square);
        let mut own = 0.0;
        if form == Form::Multiplied && tap.rows.is_some() {
            lost += weigh(&rounded.energy, &|square| (square * ROUNDING + FLOOR).min(square));
            own = ROUNDING;
        }
        (lost * gain(graph, tap).powi(2) / input.output + own).sqrt()
    };
    weight.taps.iter().zip(inputs).map(error).collect()
}

/// Why a layer may not multiply in float16.
fn too_large(graph: &Graph, weight: &Weight, inputs: &[Input]) -> Option<&'static str> {
    let products = || weight.taps.iter().zip(inputs).filter(|(tap, _)| tap.rows.is_some());
    if products().next().is_none() {
        return Some("stays in float32: it is no layer");
    }
    for (tap, input) in products() {
        let (Some(largest), Some(output)) = (input.largest, input.largest_output) else {
            return Some("stays in float32: the range of what it reads or gives was not watched");
        };
        if largest > MOST || output > MOST {
            return Some("stays in float32: what it reads or gives comes near the end of float16's range");
        }
        if let Some(bias) = graph.node(tap.node).input(2) {
            let numbers = graph.constant(bias).and_then(Tensor::to_f32s);
            if !numbers.is_some_and(|all| all.iter().all(|b| f64::from(b.abs()) <= MOST)) {
                return Some("stays in float32: its bias is no constant or comes near the end of float16's range");
            }
        }
    }
    None
}

/// What a form takes: the numbers, and the nodes that are added.
fn cost(weight: &Weight, form: Form) -> Cost {
    let elements = weight.dims.iter().product::<usize>() as u64;
    let picks = weight.taps.iter().filter(|tap| tap.rows.is_none()).count();
    let products = weight.taps.len() - picks;
    let casts = match form {
        Form::Stored(_) => picks + usize::from(products > 0),
        Form::Multiplied => picks + 3 * products,
    };
    Cost { bytes: 2 * elements + OVERHEAD * casts as u64, parameters: elements, flops_per_row: 2 * elements }
}

/// A weight's options, and why it has not all of them.
fn site(
    model: &Model,
    weight: &Weight,
    inputs: &[Input],
    products: bool,
) -> Result<(Site, Vec<&'static str>), &'static str> {
    let graph = &model.graph;
    let tensor = graph.constant(weight.value).expect("weights are constants");
    let numbers = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite()));
    tensor.release();
    let numbers = numbers.ok_or("the constant holds a NaN or an infinity")?;
    let (mut candidates, mut reasons) = (Vec::new(), Vec::new());
    for dtype in [DataType::Float16, DataType::Bfloat16] {
        if dtype == DataType::Bfloat16 && model.opset() < BFLOAT16_OPSET {
            reasons.push("bfloat16 needs operator set 13; --opset 13 upgrades");
            continue;
        }
        let Some(rounded) = rounded(weight, &numbers, dtype) else {
            reasons.push("a number of the constant lies beyond the range of the short type");
            continue;
        };
        let mut offer = |form: Form| {
            candidates.push(Candidate {
                label: form.name().to_owned(),
                cost: cost(weight, form),
                loss: Loss::PerTap(errors(graph, weight, inputs, &rounded, form)),
                edit: Edit::new(form),
            });
        };
        offer(Form::Stored(dtype));
        if products && dtype == DataType::Float16 {
            match too_large(graph, weight, inputs) {
                None => offer(Form::Multiplied),
                Some(reason) => reasons.push(reason),
            }
        }
    }
    Ok((weight.site(graph, candidates), reasons))
}

impl Method for ConvertFloats {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn rounds_only(&self) -> bool {
        true
    }

    fn plain(&self, candidate: &Candidate) -> Option<&'static str> {
        (*candidate.edit.of::<Form>() == Form::Stored(DataType::Float16)).then_some("weights in float16")
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.iter().any(|m| matches!(m, Quantity::Size | Quantity::Latency))
    }

    fn needs(&self, cx: &MethodContext) -> Needs {
        Needs { ranges: cx.half_precision, ..Needs::default() }
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let graph = &model.graph;
        if !self.serves(&cx.quantities) {
            proposal.outcome.refuse("it saves bytes and time, and neither is limited", "the model");
            return Ok(proposal);
        }
        if model.opset() < OPSET {
            proposal.outcome.refuse("it needs operator set 9; --opset 9 upgrades", "the model");
            return Ok(proposal);
        }
        let place = |value: ValueId| format!("`{}`", graph.value(value).name);
        let (found, refused) = weights(graph);
        let (others, refused) = stored::stored(graph, refused);
        refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
        let mut work = Vec::new();
        for weight in &found {
            match inputs_of(weight, cx)? {
                Ok(inputs) => work.push((weight, inputs)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
        let products = cx.half_precision && cx.quantities.contains(&Quantity::Latency);
        let sites = on_all_cores(cx, &work, |(weight, inputs)| site(model, weight, inputs, products));
        for ((weight, _), site) in work.iter().zip(sites) {
            let reasons = match site {
                Ok((site, reasons)) => {
                    proposal.sites.extend(Some(site).filter(|s| !s.candidates.is_empty()));
                    reasons
                }
                Err(reason) => vec![reason],
            };
            reasons.into_iter().for_each(|reason| proposal.outcome.refuse(reason, place(weight.value)));
        }
        let forms = if model.opset() < BFLOAT16_OPSET { &Form::ALL[..1] } else { &Form::ALL[..2] };
        let storages = |stored: &Stored| -> Vec<Storage<Form>> {
            let bytes = 2 * stored.dims.iter().product::<usize>() as u64 + OVERHEAD;
            forms.iter().map(|&form| Storage { form, label: form.name().to_owned(), bytes }).collect()
        };
        proposal.sites.extend(stored::sites(model, &others, cx, &storages, &store, &mut proposal.outcome)?);
        Ok(proposal)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        _cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let &form = candidate.edit.of::<Form>();
        let (found, _) = weights(&model.graph);
        match found.iter().find(|w| Some(w.value) == site.weight) {
            Some(weight) => {
                emit(&mut model.graph, weight, form);
                outcome.change(candidate.label.clone(), format!("`{}`", site.name));
            }
            None => {
                let stored = site.weight.and_then(|value| stored::of(&model.graph, value));
                match stored.ok_or("the constant is no longer used as it was").and_then(|s| store(model, &s, form)) {
                    Ok(()) => outcome.change(candidate.label.clone(), format!("`{}`", site.name)),
                    Err(reason) => outcome.refuse(reason, format!("`{}`", site.name)),
                }
            }
        }
        Ok(outcome)
    }
}

fn cast_to(dtype: DataType) -> Node {
    Node::new("Cast").with("to", i64::from(dtype.code()))
}

/// A value as float16; layers that read the same share it.
fn halved(graph: &mut Graph, value: ValueId) -> ValueId {
    let to = i64::from(DataType::Float16.code());
    let known = graph.value(value).uses().iter().find_map(|place| match *place {
        Use::Node(id, 0) if graph.node(id).is("Cast") && graph.node(id).int("to") == Some(to) => {
            graph.node(id).output(0)
        }
        _ => None,
    });
    let name = format!("{}_half", graph.value(value).name);
    known.unwrap_or_else(|| graph.append(ScopeId::MAIN, cast_to(DataType::Float16), &[value], &name))
}

/// Stores the weight in a short type. The constant has no uses afterwards.
fn emit(graph: &mut Graph, weight: &Weight, form: Form) {
    let name = graph.value(weight.value).name.clone();
    let tensor = graph.constant(weight.value).expect("weights are constants");
    let numbers = tensor.to_f32s().expect("weights are float32");
    let stored = short(form.dtype(), &weight.dims, &numbers);
    tensor.release();
    let fresh = graph.fresh_name(&format!("{name}_short"));
    let stored = graph.add_initializer(ScopeId::MAIN, &fresh, stored);
    for tap in weight.taps.iter().filter(|tap| tap.rows.is_none()) {
        let own = graph.node(tap.node).clone();
        let rows = graph.node(tap.node).input(1).expect("a Gather has indices");
        let picked = graph.append(ScopeId::MAIN, own, &[stored, rows], &format!("{name}_picked"));
        let wide = graph.append(ScopeId::MAIN, cast_to(DataType::Float), &[picked], &format!("{name}_wide"));
        graph.replace(tap.output, wide);
        graph.remove_node(tap.node);
    }
    if !graph.value(weight.value).uses().is_empty() {
        let read = match form {
            Form::Multiplied => stored,
            Form::Stored(_) => {
                graph.append(ScopeId::MAIN, cast_to(DataType::Float), &[stored], &format!("{name}_wide"))
            }
        };
        graph.replace_uses(weight.value, read);
    }
    graph.remove_initializer(weight.value);
    if form == Form::Multiplied {
        weight.taps.iter().filter(|tap| tap.rows.is_some()).for_each(|tap| multiply(graph, tap));
    }
}

/// Stores a constant in a short type that holds all its numbers, with a cast in front of what reads it.
fn store(model: &mut Model, stored: &Stored, form: Form) -> Result<(), &'static str> {
    let tensor = model.graph.constant(stored.value).expect("only constants are stored");
    let short = tensor.to_f32s().map(|numbers| short(form.dtype(), &stored.dims, &numbers));
    let finite = short.as_ref().and_then(Tensor::to_f64s).is_some_and(|all| all.iter().all(|x| x.is_finite()));
    tensor.release();
    if !finite {
        return Err("a number of the constant lies beyond the range of the short type");
    }
    emit(&mut model.graph, &stored.weight(), form);
    Ok(())
}

/// Lets a product whose weight is float16 already compute in it.
fn multiply(graph: &mut Graph, tap: &Tap) {
    let name = graph.value(tap.output).name.clone();
    let own = graph.node(tap.node).clone();
    let inputs: Vec<ValueId> = own.inputs().iter().flatten().copied().collect();
    let mut halves = vec![halved(graph, inputs[0]), inputs[1]];
    if graph.producer(inputs[1]).is_some() {
        // The weight stands behind a transposition, which is of its type now.
        graph.value_mut(inputs[1]).ty = None;
    }
    halves.extend(inputs.get(2).map(|&bias| halved(graph, bias)));
    let product = graph.append(ScopeId::MAIN, own, &halves, &format!("{name}_half"));
    let wide = graph.append(ScopeId::MAIN, cast_to(DataType::Float), &[product], &format!("{name}_wide"));
    graph.replace(tap.output, wide);
    graph.remove_node(tap.node);
}

#[cfg(test)]
mod tests;
