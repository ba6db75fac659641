use super::*;
use crate::{Settings, Target, lossy::Loss};
use lathe_analysis::{Calibrate, EvaluateError, Gram, Moments, Random, SymMatrix, View};
use lathe_ir::{DataType, ScopeId, Tensor, Type, text};
use std::collections::BTreeMap;

/// What every value of a model is on one sample of its input `x`.
pub(super) struct Seen {
    model: Model,
    pub sample: Vec<(String, Tensor)>,
    values: BTreeMap<String, Tensor>,
    /// By how much losses that are tried are told too large.
    exaggeration: f64,
    /// Whether second moments are told; if not, means alone.
    fits: bool,
}

impl Seen {
    pub fn new(model: &Model, dims: &[usize]) -> Seen {
        let mut random = Random::new(7);
        let numbers: Vec<f32> = (0..dims.iter().product()).map(|_| random.normal() as f32).collect();
        Seen::on(model, Tensor::from_f32s(dims, &numbers))
    }

    pub fn on(model: &Model, x: Tensor) -> Seen {
        let sample = vec![("x".to_owned(), x.clone())];
        let mut all = model.clone();
        let nodes = all.graph.nodes(ScopeId::MAIN).map(|id| all.graph.node(id));
        let values: Vec<ValueId> =
            nodes.filter(|node| !node.is("QuantizeLinear")).filter_map(|node| node.output(0)).collect();
        for value in values.into_iter().filter(|&value| !model.graph.is_output(value)) {
            all.graph.value_mut(value).ty = Some(Type::unshaped(DataType::Float));
            all.graph.add_output(ScopeId::MAIN, value);
        }
        let mut values: BTreeMap<String, Tensor> = run(&all, &sample).into_iter().collect();
        values.insert("x".to_owned(), x);
        Seen { model: model.clone(), sample, values, exaggeration: 1.0, fits: true }
    }

    /// Rows of a value, with their features along an axis.
    fn rows(&self, rows: &Rows) -> Option<Vec<Vec<f64>>> {
        let View::Axis(axis) = rows.view else { return None };
        let tensor = self.values.get(&rows.value)?;
        let axis = if axis < 0 { tensor.dims().len() - 1 } else { axis as usize };
        let (features, inner) = (tensor.dims()[axis], tensor.dims()[axis + 1..].iter().product::<usize>());
        let mut found = vec![vec![0.0; features]; tensor.len() / features];
        for (at, x) in tensor.to_f32s()?.into_iter().enumerate() {
            let (outer, feature) = (at / (features * inner), at / inner % features);
            found[outer * inner + at % inner][feature] = f64::from(x);
        }
        Some(found)
    }
}

pub(super) fn run(model: &Model, sample: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    lathe_testkit::evaluator().run(model, sample).unwrap_or_else(|error| panic!("{error}\n{}", text::print(model)))
}

/// How far the first output of a model is from that of another, relative to it.
pub(super) fn distance(one: &Model, other: &Model, sample: &[(String, Tensor)]) -> f64 {
    let [a, b] = [one, other].map(|model| run(model, sample).remove(0).1.to_f32s().unwrap());
    let square = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
    (square(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / square(&mut a.iter().copied())).sqrt()
}

impl Calibrate for Seen {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        // Patches are not collected here.
        let Some(x) = self.rows(rows) else { return Ok(None) };
        let (count, k) = (x.len() as f64, x[0].len());
        let mean = |of: &dyn Fn(&Vec<f64>) -> f64| x.iter().map(of).sum::<f64>() / count;
        let upper = (0..k).flat_map(|i| (i..k).map(move |j| (i, j)));
        let upper = upper.map(|(i, j)| if self.fits { mean(&|row| row[i] * row[j]) } else { 0.0 });
        let matrix = SymMatrix::from_upper(k, upper.collect()).unwrap();
        Ok(Some(Gram { matrix, mean: (0..k).map(|i| mean(&|row| row[i])).collect(), rows: x.len() as u64 }))
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let Some(tensor) = self.values.get(&rows.value) else { return Ok(None) };
        let features = *tensor.dims().last().unwrap();
        let (numbers, mut square) = (tensor.to_f32s().unwrap(), vec![0.0; features]);
        let count = numbers.len() / features;
        numbers.iter().enumerate().for_each(|(at, &x)| square[at % features] += f64::from(x).powi(2) / count as f64);
        Ok(Some(Moments { square, largest: None, rows: count as u64 }))
    }

    fn spread(&self, rows: &Rows) -> Result<Option<Spread>, EvaluateError> {
        let Some(numbers) = self.values.get(&rows.value).and_then(Tensor::to_f32s) else { return Ok(None) };
        let mut sums = vec![0.0; 3 * Spread::BINS];
        Spread::add(&mut sums, numbers.iter().copied());
        let ends = numbers.iter().filter(|x| !x.is_nan()).map(|&x| f64::from(x));
        let (least, largest) = (ends.clone().fold(f64::INFINITY, f64::min), ends.fold(f64::NEG_INFINITY, f64::max));
        Ok(Spread::new(least, largest, &sums))
    }

    fn extremes(&self, rows: &Rows) -> Result<Option<Vec<(f64, f64)>>, EvaluateError> {
        let Some(x) = self.rows(rows) else { return Ok(None) };
        let ends = |feature: usize| {
            let own = || x.iter().map(move |row| row[feature]);
            (own().fold(f64::INFINITY, f64::min), own().fold(f64::NEG_INFINITY, f64::max))
        };
        Ok(Some((0..x[0].len()).map(ends).collect()))
    }

    fn spreads_of(&self, model: &Model, rows: &[Rows]) -> Result<Vec<Option<Spread>>, EvaluateError> {
        let seen = Seen::on(model, self.sample[0].1.clone());
        rows.iter().map(|rows| seen.spread(rows)).collect()
    }

    fn trials(&self, variant: &Model, _: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        Ok(vec![distance(&self.model, variant, &self.sample).powi(2) * self.exaggeration])
    }
}

/// A list of numbers of both signs.
fn numbers(count: usize, seed: u64) -> String {
    let mut random = Random::new(seed);
    let all: Vec<String> = (0..count).map(|_| format!("{:e}", random.normal() as f32 / 4.0)).collect();
    format!("{{{}}}", all.join(", "))
}

/// A model whose constants `float[…] name` are numbers of both signs; others are written out.
pub(super) fn model(input: &str, output: &str, constants: &[&str], body: &str) -> Model {
    let constant = |(at, constant): (usize, &&str)| {
        if constant.contains('=') {
            return (*constant).to_owned();
        }
        let sizes = constant.split(['[', ']']).nth(1).unwrap();
        let count = sizes.split(", ").map(|size| size.parse::<usize>().unwrap()).product();
        format!("{constant} = {}", numbers(count, at as u64 + 1))
    };
    let constants: Vec<String> = constants.iter().enumerate().map(constant).collect();
    let source = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]> g ({input} x) => ({output} y) <{}> {{ {body} }}",
        constants.join(", ")
    );
    let model = text::parse(&source).unwrap_or_else(|error| panic!("{error}\n{source}"));
    model.check().unwrap();
    model
}

pub(super) fn context<'a>(seen: &'a Seen, settings: &[(&str, &str)]) -> MethodContext<'a> {
    let settings: Settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    MethodContext::new(Target::Portable, vec![Quantity::Latency], settings).with_calibration(seen)
}

/// The first candidate of the first site, carried out.
pub(super) fn carried_out(model: &Model, seen: &Seen, settings: &[(&str, &str)]) -> Model {
    let cx = context(seen, settings);
    let proposal = QuantizeStatic.propose(model, &cx).unwrap();
    let site = proposal.sites.first().unwrap_or_else(|| panic!("nothing is offered: {:?}", proposal.outcome.refusals));
    let mut changed = model.clone();
    let outcome = QuantizeStatic.apply(&mut changed, site, &site.candidates[0], &cx).unwrap();
    assert_eq!(outcome.changes.len(), 1, "{:?}", outcome.refusals);
    changed.check().unwrap_or_else(|error| panic!("{error}\n{}", text::print(&changed)));
    changed
}

pub(super) const IMAGE: &str = "float[1, 3, 12, 12]";
pub(super) const DIMS: [usize; 4] = [1, 3, 12, 12];
pub(super) const LAYER: [&str; 2] = ["float[8, 3, 3, 3] w", "float[8] b"];
pub(super) const OTHER: [&str; 2] = ["float[8, 8, 3, 3] v", "float[8] c"];

/// Carries a model out in whole numbers, and expects these operators of the runtime, and no other floating-point work than
/// what is named.
fn fuses(output: &str, constants: &[&str], body: &str, expected: &[(&str, usize)]) -> Model {
    let model = model(IMAGE, output, constants, body);
    let seen = Seen::new(&model, &DIMS);
    let changed = carried_out(&model, &seen, &[]);
    let lost = distance(&model, &changed, &seen.sample);
    assert!(lost < 0.04, "{body}: {lost}\n{}", text::print(&changed));
    let mut kernels = lathe_testkit::kernels(&changed, &seen.sample);
    kernels.remove("Transpose");
    let expected: BTreeMap<String, usize> = expected.iter().map(|(op, count)| ((*op).to_owned(), *count)).collect();
    assert_eq!(kernels, expected, "{body}\n{}", text::print(&changed));
    changed
}

const IN: (&str, usize) = ("QuantizeLinear", 1);
const OUT: (&str, usize) = ("DequantizeLinear", 1);

#[test]
fn convolutions_with_what_they_include_become_one_kernel() {
    let output = "float[1, 8, 10, 10]";
    for body in [
        "y = Conv (x, w, b)",
        "y = Conv (x, w)",
        "a = Conv (x, w, b) y = Relu (a)",
        "a = Conv (x, w, b) y = Clip (a, zero, six)",
        "a = Conv (x, w, b) y = Clip (a, zero)",
    ] {
        fuses(
            output,
            &[LAYER[0], LAYER[1], "float zero = {0}", "float six = {6}"],
            body,
            &[IN, ("QLinearConv", 1), OUT],
        );
    }
    fuses(
        "float[1, 6, 10, 10]",
        &["float[6, 1, 3, 3] w", "float[6] b"],
        "y = Conv <group = 3> (x, w, b)",
        &[IN, ("QLinearConv", 1), OUT],
    );
}

#[test]
fn a_clip_that_lets_through_other_than_what_lies_above_zero_stays() {
    let constants = [LAYER[0], LAYER[1], "float low = {-1}", "float six = {6}"];
    let body = "a = Conv (x, w, b) y = Clip (a, low, six)";
    fuses("float[1, 8, 10, 10]", &constants, body, &[IN, ("QLinearConv", 1), OUT, ("Clip", 1)]);
}

#[test]
fn what_moves_joins_or_adds_codes_is_done_on_codes() {
    let constants = [LAYER[0], LAYER[1], OTHER[0], OTHER[1]];
    let first = "a = Conv (x, w, b) h = Relu (a)";
    let again = "d = Conv <pads = [1, 1, 1, 1]> (h, v, c)";
    let two = [IN, ("QLinearConv", 2), OUT];
    let with = |more: &[(&'static str, usize)]| [&two[..], more].concat();
    let image = "float[1, 8, 10, 10]";
    fuses(image, &constants, &format!("{first} {again} y = Add (d, h)"), &with(&[("QLinearAdd", 1)]));
    fuses(image, &constants, &format!("{first} {again} s = Add (h, d) y = Relu (s)"), &with(&[("QLinearAdd", 1)]));
    fuses(image, &constants, &format!("{first} {again} y = Mul (d, h)"), &with(&[("QLinearMul", 1)]));
    fuses(
        "float[1, 16, 10, 10]",
        &constants,
        &format!("{first} {again} y = Concat <axis = 1> (d, h)"),
        &with(&[("QLinearConcat", 1)]),
    );
    let pool = |op: &str| format!("{first} p = {op} <kernel_shape = [2, 2], strides = [2, 2]> (h) y = Conv (p, v, c)");
    fuses("float[1, 8, 3, 3]", &constants, &pool("MaxPool"), &with(&[("NhwcMaxPool", 1)]));
    fuses("float[1, 8, 3, 3]", &constants, &pool("AveragePool"), &with(&[("QLinearAveragePool", 1)]));
    let steep = format!("{first} l = LeakyRelu <alpha = 0.2> (h) y = Conv (l, v, c)");
    fuses("float[1, 8, 8, 8]", &constants, &steep, &with(&[("QLinearLeakyRelu", 1)]));
    let gated = format!("{first} s = Sigmoid (h) m = Mul (h, s) y = Conv (m, v, c)");
    fuses("float[1, 8, 8, 8]", &constants, &gated, &with(&[("QLinearSigmoid", 1), ("QLinearMul", 1)]));
    let shifted = [&constants[..], &["float[1, 8, 1, 1] shift"]].concat();
    let shift = format!("{first} s = Add (h, shift) y = Conv (s, v, c)");
    fuses("float[1, 8, 8, 8]", &shifted, &shift, &with(&[("QLinearAdd", 1)]));
    let turned = format!("{first} t = Transpose <perm = [0, 1, 3, 2]> (h) y = Conv (t, v, c)");
    fuses("float[1, 8, 8, 8]", &constants, &turned, &two);
}

#[test]
fn operators_without_a_kernel_of_whole_numbers_part_regions() {
    let constants = [LAYER[0], LAYER[1], OTHER[0], OTHER[1]];
    let body = "a = Conv (x, w, b) h = HardSwish (a) y = Conv (h, v, c)";
    let model = model(IMAGE, "float[1, 8, 8, 8]", &constants, body);
    let seen = Seen::new(&model, &DIMS);
    let proposal = QuantizeStatic.propose(&model, &context(&seen, &[])).unwrap();
    assert_eq!(proposal.sites.len(), 2);
    let refusals: Vec<_> = proposal.outcome.refusals.keys().collect();
    assert!(refusals.contains(&&"HardSwish has no kernel of whole numbers".to_owned()), "{refusals:?}");
}

#[test]
fn a_head_behind_a_mean_over_the_image_is_one_kernel_with_a_float_output() {
    let constants = [LAYER[0], LAYER[1], "float[8, 5] v", "float[5] c"];
    for (body, head) in [
        ("m = ReduceMean <axes = [2, 3], keepdims = 0> (h) y = Gemm (m, v, c)", "float[1, 5]"),
        ("m = ReduceMean <axes = [-1, -2]> (h) f = Flatten (m) y = Gemm (f, v, c)", "float[1, 5]"),
        ("m = GlobalAveragePool (h) f = Flatten (m) y = Gemm (f, v, c)", "float[1, 5]"),
    ] {
        let body = format!("a = Conv (x, w, b) h = Relu (a) {body}");
        let changed = fuses(
            head,
            &constants,
            &body,
            &[IN, ("QLinearConv", 1), ("QLinearGlobalAveragePool", 1), ("Flatten", 1), ("QGemm", 1)],
        );
        assert!(changed.graph.find_value("y").is_some());
    }
}

#[test]
fn linear_layers_round_what_they_read_and_give_floats() {
    let linear = |input: &str, output: &str, constants: &[&str], body: &str, dims: &[usize], expected: &[&str]| {
        let model = model(input, output, constants, body);
        let seen = Seen::new(&model, dims);
        let changed = carried_out(&model, &seen, &[]);
        assert!(distance(&model, &changed, &seen.sample) < 0.02, "{body}");
        let kernels = lathe_testkit::kernels(&changed, &seen.sample);
        let mut found: Vec<&str> = kernels.keys().map(String::as_str).collect();
        found.retain(|op| !["Reshape", "Add", "Relu"].contains(op));
        assert_eq!(found, expected, "{body}: {kernels:?}\n{}", text::print(&changed));
    };
    let whole = ["MatMulIntegerToFloat", "QuantizeLinear"];
    let gemm = ["QGemm", "QuantizeLinear"];
    let w = ["float[64, 72] w", "float[72] b"];
    linear("float[2, 5, 64]", "float[2, 5, 72]", &w[..1], "y = MatMul (x, w)", &[2, 5, 64], &whole);
    // Sizes that are known make one node of the product and the bias.
    for (input, dims) in [("float[5, 64]", vec![5, 64]), ("float[n, 64]", vec![5, 64])] {
        let output = input.replace("64", "72");
        linear(input, &output, &w, "y = Gemm (x, w, b)", &dims, &gemm);
        let turned = ["float[72, 64] w", "float[72] b"];
        linear(input, &output, &turned, "y = Gemm <transB = 1> (x, w, b)", &dims, &gemm);
        linear(input, &output, &turned[..1], "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", &dims, &whole);
    }
    for (input, dims) in
        [("float[5, 64]", vec![5, 64]), ("float[2, 5, 64]", vec![2, 5, 64]), ("float[n, s, 64]", vec![2, 5, 64])]
    {
        let (model, output) = (input, input.replace("64", "72"));
        let fused: &[&str] = if input.contains('n') { &["DequantizeLinear", whole[0], whole[1]] } else { &gemm };
        linear(model, &output, &w, "h = MatMul (x, w) y = Add (b, h)", &dims, fused);
    }
}

#[test]
fn layers_that_read_one_value_round_it_once() {
    let constants = ["float[64, 72] w", "float[64, 72] v"];
    let body = "a = MatMul (x, w) b = MatMul (x, v) y = Add (a, b)";
    let model = model("float[5, 64]", "float[5, 72]", &constants, body);
    let seen = Seen::new(&model, &[5, 64]);
    let cx = context(&seen, &[]);
    let mut changed = model.clone();
    for site in QuantizeStatic.propose(&model, &cx).unwrap().sites {
        let outcome = QuantizeStatic.apply(&mut changed, &site, &site.candidates[0], &cx).unwrap();
        assert_eq!(outcome.changes.len(), 1);
    }
    let count = |op: &str| changed.graph.nodes(ScopeId::MAIN).filter(|&id| changed.graph.node(id).is(op)).count();
    assert_eq!((count("QuantizeLinear"), count("DequantizeLinear")), (1, 3));
}

#[test]
fn a_region_is_offered_whole_and_with_layers_left_out() {
    let constants = [LAYER[0], LAYER[1], OTHER[0], OTHER[1]];
    let body = "a = Conv (x, w, b) h = Relu (a) d = Conv <pads = [1, 1, 1, 1]> (h, v, c) y = Add (d, h)";
    let model = model(IMAGE, "float[1, 8, 10, 10]", &constants, body);
    let mut seen = Seen::new(&model, &DIMS);
    let offered = |seen: &Seen| QuantizeStatic.propose(&model, &context(seen, &[])).unwrap().sites.remove(0);
    // What loses next to nothing is not offered in parts that lose hardly less.
    assert_eq!(offered(&seen).candidates.len(), 1);
    seen.exaggeration = 100.0;
    let (site, cx) = (offered(&seen), context(&seen, &[]));
    let labels: Vec<&str> = site.candidates.iter().map(|candidate| candidate.label.as_str()).collect();
    assert_eq!(labels[0], "static int8 of 2 of 2 layers");
    assert!(labels[1..].iter().all(|label| *label == "static int8 of 1 of 2 layers") && labels.len() > 2, "{labels:?}");
    assert!(site.candidates.iter().all(|candidate| matches!(candidate.loss, Loss::Measured(loss) if loss < 0.1)));
    assert_eq!(site.name, "w to v");
    for candidate in &site.candidates {
        let mut changed = model.clone();
        QuantizeStatic.apply(&mut changed, &site, candidate, &cx).unwrap();
        changed.check().unwrap();
        assert!(distance(&model, &changed, &seen.sample) < 0.03);
        let bytes = |model: &Model| model.to_bytes().len() as f64;
        let (told, real) = (candidate.cost.bytes as f64 - site.baseline.bytes as f64, bytes(&changed) - bytes(&model));
        assert!((told - real).abs() < 1600.0, "{told} {real}");
    }
    let edit = site.candidates[0].edit.of::<StaticEdit>();
    let written = postcard::to_stdvec(edit).unwrap();
    assert_eq!(&postcard::from_bytes::<StaticEdit>(&written).unwrap(), edit);
}

#[test]
fn options_say_how_ranges_are_chosen_and_how_large_weights_get() {
    let model = model(IMAGE, "float[1, 8, 10, 10]", &LAYER, "a = Conv (x, w, b) y = Relu (a)");
    let seen = Seen::new(&model, &DIMS);
    let largest = |settings: &[(&str, &str)]| {
        let changed = carried_out(&model, &seen, settings);
        let codes = changed.graph.find_value("w_quantized").unwrap();
        let codes =
            changed.graph.constant(codes).unwrap().bytes().iter().map(|&code| (code as i8).unsigned_abs()).max();
        (codes.unwrap(), distance(&model, &changed, &seen.sample))
    };
    let (any, lost) = largest(&[]);
    let (vnni, less) = largest(&[("quantize-static.cpus", "vnni")]);
    assert!((any, vnni) == (64, 127) && less < lost, "{any} {vnni} {lost} {less}");
    for ranges in ["minmax", "percentile", "mse", "entropy"] {
        let (_, lost) = largest(&[("quantize-static.ranges", ranges)]);
        assert!(lost < 0.2, "{ranges}: {lost}");
    }
    let wrong = context(&seen, &[("quantize-static.ranges", "widest")]);
    let error = QuantizeStatic.propose(&model, &wrong).unwrap_err().to_string();
    assert!(error.contains("expected auto, minmax, percentile, mse or entropy"), "{error}");
}

#[test]
fn biases_make_up_for_what_rounding_takes_of_the_mean() {
    // All numbers are positive, so that errors of weights do not cancel, and one large weight makes the others coarse.
    let image = "float[1, 128, 6, 6]";
    let constants = ["float[32, 128, 1, 1] w", "float[32] b"];
    let mut layer = model(image, "float[1, 32, 6, 6]", &constants, "y = Conv (x, w, b)");
    let weight = layer.graph.find_value("w").unwrap();
    let mut numbers = layer.graph.constant(weight).unwrap().to_f32s().unwrap();
    numbers.iter_mut().step_by(128).for_each(|w| *w = 12.0);
    let tensor = Tensor::from_f32s(&[32, 128, 1, 1], &numbers);
    layer.graph.set_initializer(weight, lathe_ir::Initializer::Dense(tensor));
    let mut random = Random::new(23);
    let numbers: Vec<f32> = (0..128 * 36).map(|_| 1.0 + random.uniform() as f32 / 4.0).collect();
    let seen = Seen { fits: false, ..Seen::on(&layer, Tensor::from_f32s(&[1, 128, 6, 6], &numbers)) };
    let changed = carried_out(&layer, &seen, &[]);
    let edit = |seen: &Seen| {
        let site = QuantizeStatic.propose(&layer, &context(seen, &[])).unwrap().sites.remove(0);
        site.candidates[0].edit.of::<StaticEdit>().clone()
    };
    let corrected = edit(&seen);
    assert_eq!(corrected.units[0].correction.len(), 32);
    let mut plain = corrected.clone();
    plain.units[0].correction.clear();
    let mut uncorrected = layer.clone();
    plain.emit(&mut uncorrected.graph, &rounding::Fits::new()).unwrap();
    let [with, without] = [&changed, &uncorrected].map(|variant| distance(&layer, variant, &seen.sample));
    assert!(with < 0.5 * without, "{with} {without}");
    // What is taken of the mean of every output is what is added.
    let mean = |model: &Model| {
        let all = run(model, &seen.sample).remove(0).1.to_f32s().unwrap();
        all.chunks(36).map(|own| own.iter().sum::<f32>() / 36.0).collect::<Vec<f32>>()
    };
    let (exact, rounded) = (mean(&layer), mean(&uncorrected));
    for (at, more) in corrected.units[0].correction.iter().enumerate() {
        assert!((exact[at] - rounded[at] - more).abs() < 0.1, "{at}: {} {more}", exact[at] - rounded[at]);
    }
}

fn refusals(model: &Model, seen: &Seen) -> Vec<String> {
    let proposal = QuantizeStatic.propose(model, &context(seen, &[])).unwrap();
    assert!(proposal.sites.is_empty());
    proposal.outcome.refusals.into_keys().collect()
}

#[test]
fn what_cannot_be_done_is_said() {
    let plain = model(IMAGE, IMAGE, &[], "y = Tanh (x)");
    let seen = Seen::new(&plain, &DIMS);
    assert_eq!(refusals(&plain, &seen), ["no operator of it has a kernel of whole numbers"]);
    let layer = model(IMAGE, "float[1, 8, 10, 10]", &LAYER, "y = Conv (x, w, b)");
    let mut unseen = Seen::new(&layer, &DIMS);
    // Nothing at all, or nothing finite.
    for numbers in [&[][..], &[f32::NAN], &[f32::INFINITY], &[f32::NEG_INFINITY, 1.0]] {
        unseen.values.insert("x".into(), Tensor::from_f32s(&[numbers.len()], numbers));
        assert_eq!(refusals(&layer, &unseen), ["no finite number of `x` was seen on the calibration set"]);
    }
    let broken = model(IMAGE, "float[1, 1, 12, 12]", &["float[1, 3, 1, 1] w = {1, nan, 2}"], "y = Conv (x, w)");
    let seen = Seen::new(&broken, &DIMS);
    assert!(!refusals(&broken, &seen).is_empty());
    let seen = Seen::new(&layer, &DIMS);
    let cx = context(&seen, &[]).with_recipe(Recipe::None);
    let refused = QuantizeStatic.propose(&layer, &cx).unwrap().outcome.refusals;
    assert!(refused.contains_key(NO_KERNELS) && QuantizeStatic.spreads(&layer, &cx).unwrap().is_empty());
    let cx = context(&seen, &[]).with_quantities(vec![Quantity::Flops]);
    assert_eq!(QuantizeStatic.propose(&layer, &cx).unwrap().sites.len(), 0);
    let scaled = model("float[5, 64]", "float[5, 72]", &["float[64, 72] w"], "y = Gemm <alpha = 0.5> (x, w)");
    let seen = Seen::new(&scaled, &[5, 64]);
    let found = refusals(&scaled, &seen);
    assert!(found.iter().any(|reason| reason.contains("scales the product")), "{found:?}");
}

#[test]
fn layers_that_see_zeros_alone_and_dead_channels_stay_right() {
    // The second layer reads zeros alone; its bias is what it gives.
    let constants = [LAYER[0], "float[8] b = {-90, -90, -90, -90, -90, -90, -90, -90}", OTHER[0], OTHER[1]];
    let body = "a = Conv (x, w, b) h = Relu (a) y = Conv (h, v, c)";
    let zeros = model(IMAGE, "float[1, 8, 8, 8]", &constants, body);
    let seen = Seen::new(&zeros, &DIMS);
    assert!(seen.values["h"].to_f32s().unwrap().iter().all(|&x| x == 0.0));
    let changed = carried_out(&zeros, &seen, &[]);
    assert!(distance(&zeros, &changed, &seen.sample) < 0.01);
    // One channel has weights near zero and a bias far beyond what its scale could hold.
    let dead = ["float[2, 3, 1, 1] w = {1e-12, -1e-12, 1e-13, 0.5, -0.25, 0.125}", "float[2] b = {3, -0.5}"];
    let dead = model(IMAGE, "float[1, 2, 12, 12]", &dead, "y = Conv (x, w, b)");
    let seen = Seen::new(&dead, &DIMS);
    let changed = carried_out(&dead, &seen, &[]);
    assert!(distance(&dead, &changed, &seen.sample) < 0.01);
    let flat = run(&changed, &seen.sample).remove(0).1.to_f32s().unwrap();
    assert!(flat[..144].iter().all(|&y| (y - 3.0).abs() < 0.02), "{:?}", &flat[..4]);
}

#[test]
fn a_value_that_something_else_reads_is_read_as_codes_stand_for_it() {
    let constants = [LAYER[0], LAYER[1], OTHER[0], OTHER[1]];
    let body = "a = Conv (x, w, b) t = Tanh (a) d = Conv <pads = [1, 1, 1, 1]> (a, v, c) y = Sub (d, t)";
    let model = model(IMAGE, "float[1, 8, 10, 10]", &constants, body);
    let seen = Seen::new(&model, &DIMS);
    let changed = carried_out(&model, &seen, &[]);
    assert!(distance(&model, &changed, &seen.sample) < 0.03);
    let kernels = lathe_testkit::kernels(&changed, &seen.sample);
    assert_eq!((kernels.get("QLinearConv"), kernels.get("Conv")), (Some(&2), None), "{kernels:?}");
}
