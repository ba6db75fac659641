//! What makes a model in whole numbers lose less: rewrites that are exact before rounding, and codes that make up for each other.

use super::{
    channels::{Equal, equalise, groups, scale, smoothing as factors_of},
    tests::{DIMS, IMAGE, Seen, carried_out, context, distance, model},
    *,
};
use lathe_analysis::Random;
use lathe_ir::{Initializer, ScopeId, Tensor, text};

const WAYS: [Equal; 3] = [Equal::Weights, Equal::Activations(0.5), Equal::Activations(1.0)];

/// A model with the numbers of a constant changed by the index along an axis.
fn with(model: &mut Model, name: &str, axis: usize, change: impl Fn(usize, f32) -> f32) {
    let value = model.graph.find_value(name).unwrap();
    let tensor = model.graph.constant(value).unwrap();
    let dims = tensor.dims().to_vec();
    let inner: usize = dims[axis + 1..].iter().product();
    let numbers = tensor.to_f32s().unwrap().into_iter().enumerate();
    let numbers: Vec<f32> = numbers.map(|(at, x)| change(at / inner % dims[axis], x)).collect();
    model.graph.set_initializer(value, Initializer::Dense(Tensor::from_f32s(&dims, &numbers)));
}

/// The model with channels made alike.
fn alike(model: &Model, seen: &Seen, equal: Equal) -> (Model, usize) {
    let facts = Facts::infer(model);
    let found = groups(model, &facts);
    let values = found.iter().flat_map(|group| group.values.iter().copied());
    let sizes = sizes((&model.graph, &facts), values, &context(seen, &[])).unwrap();
    let scaled = equalise(&model.graph, &found, &sizes, equal);
    let mut changed = model.clone();
    scale(&mut changed.graph, &scaled).unwrap();
    changed.check().unwrap();
    (changed, found.len())
}

fn most(model: &Model, name: &str, axis: usize) -> Vec<f64> {
    let tensor = model.graph.constant(model.graph.find_value(name).unwrap()).unwrap();
    let inner: usize = tensor.dims()[axis + 1..].iter().product();
    let mut most = vec![0.0f64; tensor.dims()[axis]];
    for (at, x) in tensor.to_f32s().unwrap().into_iter().enumerate() {
        let own = &mut most[at / inner % tensor.dims()[axis]];
        *own = own.max(f64::from(x.abs()));
    }
    most
}

#[test]
fn channels_between_layers_become_alike_and_outputs_stay() {
    let layers = ["float[8, 3, 3, 3] w", "float[8] b", "float[8, 8, 3, 3] v", "float[8] c"];
    let head = ["float[8, 5] u", "float[5] d", "float[8, 1, 3, 3] k", "float[8] e", "float[1, 8, 1, 1] r"];
    let all = [&layers[..], &head].concat();
    let cases = [
        ("a = Conv (x, w, b) h = Relu (a) y = Conv (h, v, c)", "float[1, 8, 8, 8]", 1),
        (
            "a = Conv (x, w, b) h = LeakyRelu <alpha = 0.1> (a) p = MaxPool <kernel_shape = [2, 2]> (h) y = Conv (p, v, c)",
            "float[1, 8, 7, 7]",
            1,
        ),
        // A residual: what skips the layer, and what it gives, share their factors.
        (
            "a = Conv (x, w, b) f = Conv <pads = [1, 1, 1, 1]> (a, v, c) s = Add (a, f) h = Relu (s) \
          m = GlobalAveragePool (h) t = Flatten (m) y = Gemm (t, u, d)",
            "float[1, 5]",
            1,
        ),
        // A filter for every channel both reads and gives.
        (
            "a = Conv (x, w, b) h = Relu (a) f = Conv <group = 8> (h, k, e) g = Relu (f) y = Conv (g, v, c)",
            "float[1, 8, 6, 6]",
            2,
        ),
        ("a = Conv (x, w, b) h = Add (r, a) y = Conv (h, v, c)", "float[1, 8, 8, 8]", 1),
    ];
    for (body, output, count) in cases {
        let is_read = |constant: &&str| {
            let name = constant.split(' ').next_back().unwrap();
            [format!("({name},"), format!(" {name},"), format!(" {name})")].iter().any(|place| body.contains(place))
        };
        let used: Vec<&str> = all.iter().copied().filter(is_read).collect();
        let mut net = model(IMAGE, output, &used, body);
        // Channels of very different sizes.
        with(&mut net, "w", 0, |channel, x| x * [1.0, 30.0, 0.02, 5.0][channel % 4]);
        let seen = Seen::new(&net, &DIMS);
        for equal in WAYS {
            let (changed, found) = alike(&net, &seen, equal);
            assert_eq!(found, count, "{body}");
            let lost = distance(&net, &changed, &seen.sample);
            assert!(lost < 1e-6, "{body} {equal:?}: {lost}");
            assert_ne!(most(&net, "w", 0), most(&changed, "w", 0), "{body} {equal:?}");
        }
    }
}

#[test]
fn both_layers_have_weights_of_one_size_afterwards() {
    let constants = ["float[8, 3, 3, 3] w", "float[8] b", "float[8, 8, 3, 3] v", "float[8] c"];
    let mut net = model(IMAGE, "float[1, 8, 8, 8]", &constants, "a = Conv (x, w, b) h = Relu (a) y = Conv (h, v, c)");
    with(&mut net, "w", 0, |channel, x| x * 2f32.powi(channel as i32));
    let seen = Seen::new(&net, &DIMS);
    let (changed, _) = alike(&net, &seen, Equal::Weights);
    let (given, read) = (most(&changed, "w", 0), most(&changed, "v", 1));
    let ratios: Vec<f64> = given.iter().zip(&read).map(|(a, b)| a / b).collect();
    assert!(ratios.iter().all(|ratio| (ratio / ratios[0] - 1.0).abs() < 1e-3), "{ratios:?}");
    // Factors lie around one: what all of them share is nothing to codes.
    let [a, b] = factors_of(&[100.0, 1.0], &[0.5, 2.0], 0.5)[..] else { panic!() };
    assert!((a / b - 20.0).abs() < 1e-9, "{a} {b}");
    let [a, b] = factors_of(&[100.0, 1.0], &[0.5, 2.0], 1.0)[..] else { panic!() };
    assert!((a / b - 100.0).abs() < 1e-9);
    assert_eq!(factors_of(&[0.0, 1.0, 1.0], &[1.0, 0.0, 1.0], 0.5), [1.0, 1.0, 1.0]);
    assert_eq!(factors_of(&[1e30, 1e-30], &[1.0, 1.0], 1.0), [1e3, 1e-3]);
}

#[test]
fn what_does_not_commute_with_factors_keeps_channels_as_they_are() {
    let constants =
        ["float[8, 3, 3, 3] w", "float[8] b", "float[8, 8, 3, 3] v", "float[8] c", "float z = {0}", "float s = {6}"];
    let behind = |op: &str| format!("a = Conv (x, w, b) h = {op} y = Conv (h, v, c)");
    for op in ["Clip (a, z, s)", "Sigmoid (a)", "HardSwish (a)", "Mul (a, a)"] {
        let used = if op.starts_with("Clip") { &constants[..] } else { &constants[..4] };
        let net = model(IMAGE, "float[1, 8, 8, 8]", used, &behind(op));
        assert!(groups(&net, &Facts::infer(&net)).is_empty(), "{op}");
    }
    // Something else reads the weight, or the value.
    for body in [
        "a = Conv (x, w, b) f = Conv <pads = [1, 1, 1, 1]> (a, v, c) y = Conv <pads = [1, 1, 1, 1]> (f, v, c)",
        "a = Conv (x, w, b) t = Tanh (a) f = Conv <pads = [1, 1, 1, 1]> (a, v, c) y = Sub (f, t)",
    ] {
        let net = model(IMAGE, "float[1, 8, 10, 10]", &constants[..4], body);
        assert!(groups(&net, &Facts::infer(&net)).is_empty(), "{body}");
    }
}

/// The label of the first candidate of the first site, and what it loses.
fn offered(model: &Model, seen: &Seen, settings: &[(&str, &str)]) -> (String, f64) {
    let proposal = QuantizeStatic.propose(model, &context(seen, settings)).unwrap();
    let label = proposal.sites[0].candidates[0].label.clone();
    (label, distance(model, &carried_out(model, seen, settings), &seen.sample))
}

/// The model with every value rounded as the first candidate has it, but without one of its steps.
fn without(model: &Model, seen: &Seen, step: impl Fn(&mut StaticEdit)) -> f64 {
    let cx = context(seen, &[]);
    let site = QuantizeStatic.propose(model, &cx).unwrap().sites.remove(0);
    let mut candidate = site.candidates[0].clone();
    let mut edit = candidate.edit.of::<StaticEdit>().clone();
    step(&mut edit);
    candidate.edit = super::super::Edit::new(edit);
    let mut changed = model.clone();
    QuantizeStatic.apply(&mut changed, &site, &candidate, &cx).unwrap();
    distance(model, &changed, &seen.sample)
}

/// Channels far beyond the others, which are read by weights as much smaller: what is between has no codes left for these.
#[test]
fn a_channel_beyond_the_others_costs_a_fraction_where_channels_are_made_alike() {
    let constants = ["float[8, 3, 1, 1] w", "float[8] b", "float[8, 8, 1, 1] v", "float[8] c"];
    let body = "a = Conv (x, w, b) h = Relu (a) y = Conv (h, v, c)";
    let mut net = model(IMAGE, "float[1, 8, 12, 12]", &constants, body);
    let planted = |channel: usize, x: f32, factor: f32| if channel == 3 { x * factor } else { x };
    let plain = Seen::new(&net, &DIMS);
    let (_, unplanted) = offered(&net, &plain, &[]);
    with(&mut net, "w", 0, |channel, x| planted(channel, x, 64.0));
    with(&mut net, "b", 0, |channel, x| planted(channel, x, 64.0));
    with(&mut net, "v", 1, |channel, x| planted(channel, x, 1.0 / 64.0));
    let seen = Seen::new(&net, &DIMS);
    let (label, lost) = offered(&net, &seen, &[]);
    assert!(label.contains(", equalised"), "{label}");
    // The edit without its first step has ranges of the changed model, so ranges are seen without the step.
    let blind = Blind(Seen::new(&net, &DIMS));
    let cx = MethodContext::new(crate::Target::Portable, vec![Quantity::Latency], crate::Settings::default())
        .with_calibration(&blind);
    let site = QuantizeStatic.propose(&net, &cx).unwrap().sites.remove(0);
    assert!(!site.candidates[0].label.contains("equalised"), "{}", site.candidates[0].label);
    let mut changed = net.clone();
    QuantizeStatic.apply(&mut changed, &site, &site.candidates[0], &cx).unwrap();
    let unequal = distance(&net, &changed, &seen.sample);
    assert!(lost < unequal / 4.0, "{lost} {unequal}");
    assert!(lost < 2.0 * unplanted, "{lost} {unplanted}");
}

/// A calibration that does not tell how large channels get, and cannot count numbers of variants.
struct Blind(Seen);

impl lathe_analysis::Calibrate for Blind {
    fn gram(&self, rows: &Rows) -> Result<Option<lathe_analysis::Gram>, lathe_analysis::EvaluateError> {
        self.0.gram(rows)
    }

    fn moments(&self, rows: &Rows) -> Result<Option<lathe_analysis::Moments>, lathe_analysis::EvaluateError> {
        self.0.moments(rows)
    }

    fn spread(&self, rows: &Rows) -> Result<Option<Spread>, lathe_analysis::EvaluateError> {
        self.0.spread(rows)
    }

    fn spreads_of(&self, _: &Model, rows: &[Rows]) -> Result<Vec<Option<Spread>>, lathe_analysis::EvaluateError> {
        Ok(vec![None; rows.len()])
    }

    fn trials(&self, variant: &Model, gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, lathe_analysis::EvaluateError> {
        self.0.trials(variant, gates)
    }
}

const NORM: &str = "n = LayerNormalization (x, g, o)";

/// Layers behind a normalisation whose gain has channels far beyond the others.
fn behind_a_norm(body: &str, output: &str, constants: &[&str]) -> (Model, Seen) {
    let all = [&["float[64] g", "float[64] o", "float[64, 72] w"], constants].concat();
    let mut net = model("float[40, 64]", output, &all, &format!("{NORM} {body}"));
    with(&mut net, "g", 0, |channel, _| if channel % 16 == 3 { 40.0 } else { 1.0 });
    with(&mut net, "w", 0, |channel, x| if channel % 16 == 3 { x / 40.0 } else { x });
    let seen = Seen::new(&net, &[40, 64]);
    (net, seen)
}

#[test]
fn what_layers_read_is_divided_in_the_normalisation_before_them() {
    let (net, seen) = behind_a_norm("y = MatMul (n, w)", "float[40, 72]", &[]);
    let (label, lost) = offered(&net, &seen, &[]);
    assert!(label.contains(", smoothed"), "{label}");
    let blind = Blind(Seen::new(&net, &[40, 64]));
    let cx = MethodContext::new(crate::Target::Portable, vec![Quantity::Latency], crate::Settings::default())
        .with_calibration(&blind);
    let site = QuantizeStatic.propose(&net, &cx).unwrap().sites.remove(0);
    assert!(!site.candidates[0].label.contains("smoothed"));
    let mut rough = net.clone();
    QuantizeStatic.apply(&mut rough, &site, &site.candidates[0], &cx).unwrap();
    let unsmoothed = distance(&net, &rough, &seen.sample);
    assert!(lost < unsmoothed / 4.0, "{lost} {unsmoothed}");
    // The kernel is the same.
    let changed = carried_out(&net, &seen, &[]);
    let kernels = lathe_testkit::kernels(&changed, &seen.sample);
    assert_eq!((kernels.get("MatMulIntegerToFloat"), kernels.get("LayerNormalization")), (Some(&1), Some(&1)));
    // What was said of the loss is what it is.
    let cx = context(&seen, &[]);
    let told = QuantizeStatic.propose(&net, &cx).unwrap().sites[0].candidates[0].loss.per_tap().unwrap()[0];
    assert!((0.5..2.0).contains(&(told / lost)), "{told} {lost}");
}

#[test]
fn dividing_and_multiplying_leaves_the_product_as_it_was() {
    let (net, seen) = behind_a_norm("y = MatMul (n, w)", "float[40, 72]", &[]);
    let factors: Vec<f32> = (0..64).map(|at| 0.25 + at as f32 / 7.0).collect();
    let mut changed = net.clone();
    let value = changed.graph.find_value("n").unwrap();
    let copy = smoothing::divided(&mut changed.graph, value, &factors).unwrap();
    // It is there already.
    assert_eq!(smoothing::divided(&mut changed.graph, value, &factors).unwrap(), copy);
    let layer = changed.graph.producer(changed.graph.find_value("y").unwrap()).unwrap();
    changed.graph.set_input(layer, 0, Some(copy));
    with(&mut changed, "w", 0, |channel, x| x * factors[channel]);
    changed.check().unwrap();
    let lost = distance(&net, &changed, &seen.sample);
    assert!(lost < 1e-6, "{lost}");
}

#[test]
fn layers_behind_one_normalisation_share_its_copy_and_others_read_what_they_did() {
    let body = "a = MatMul (n, w) b = MatMul (n, v) s = Add (a, b) t = Tanh (n) u = ReduceMean <axes = [1]> (t) y = Add (s, u)";
    let (mut net, _) = behind_a_norm(body, "float[40, 72]", &["float[64, 72] v"]);
    with(&mut net, "v", 0, |channel, x| if channel % 16 == 3 { x / 40.0 } else { x });
    let seen = Seen::new(&net, &[40, 64]);
    let cx = context(&seen, &[]);
    let mut changed = net.clone();
    for site in QuantizeStatic.propose(&net, &cx).unwrap().sites {
        assert!(site.candidates[0].label.contains("smoothed"), "{}", site.candidates[0].label);
        QuantizeStatic.apply(&mut changed, &site, &site.candidates[0], &cx).unwrap();
    }
    changed.check().unwrap();
    let count = |op: &str| changed.graph.nodes(ScopeId::MAIN).filter(|&id| changed.graph.node(id).is(op)).count();
    assert_eq!((count("LayerNormalization"), count("QuantizeLinear")), (2, 1), "{}", text::print(&changed));
    assert!(distance(&net, &changed, &seen.sample) < 0.02);
}

/// Inputs that have much in common: `rows` of them, of so many features.
fn correlated(rows: usize, features: usize) -> Vec<f32> {
    let mut random = Random::new(11);
    let mut all = Vec::new();
    for _ in 0..rows {
        let shared: Vec<f32> = (0..4).map(|_| random.normal() as f32).collect();
        all.extend((0..features).map(|at| shared[at % 4] + 0.2 * random.normal() as f32));
    }
    all
}

#[test]
fn codes_that_make_up_for_each_other_lose_less_at_the_same_bytes() {
    // A layer on its own.
    let linear = model("float[400, 64]", "float[400, 72]", &["float[64, 72] w"], "y = MatMul (x, w)");
    let seen = Seen::on(&linear, Tensor::from_f32s(&[400, 64], &correlated(400, 64)));
    let (label, fitted) = offered(&linear, &seen, &[]);
    assert!(label.contains(", GPTQ"), "{label}");
    let nearest = without(&linear, &seen, |edit| edit.fitted.clear());
    assert!(fitted < 0.9 * nearest, "{fitted} {nearest}");
    // A region, whose features are channels.
    let image = "float[1, 64, 20, 20]";
    let conv = model(image, "float[1, 72, 20, 20]", &["float[72, 64, 1, 1] w", "float[72] b"], "y = Conv (x, w, b)");
    let turned = correlated(400, 64);
    let pixels: Vec<f32> = (0..64 * 400).map(|at| turned[at % 400 * 64 + at / 400]).collect();
    let seen = Seen::on(&conv, Tensor::from_f32s(&[1, 64, 20, 20], &pixels));
    let (label, fitted) = offered(&conv, &seen, &[]);
    assert!(label.contains(", GPTQ"), "{label}");
    let nearest = without(&conv, &seen, |edit| edit.fitted.clear());
    assert!(fitted < 0.97 * nearest, "{fitted} {nearest}");
    let codes = |model: &Model| {
        let codes = model.graph.find_value("w_quantized").unwrap();
        model.graph.constant(codes).unwrap().bytes().iter().map(|&code| code as i8).collect::<Vec<i8>>()
    };
    let changed = carried_out(&conv, &seen, &[]);
    assert!(codes(&changed).iter().all(|code| code.unsigned_abs() <= 64), "processors that add in 16 bits stay right");
    // The same is made again of what the edit says.
    assert_eq!(codes(&changed), codes(&carried_out(&conv, &seen, &[])));
}

#[test]
fn every_layer_is_told_of_with_the_reason_for_its_floats() {
    let constants = ["float[8, 3, 3, 3] w", "float[8] b", "float[8, 8, 3, 3] v", "float[8] c", "float[8, 3] u"];
    let body = "a = Conv (x, w, b) h = Relu (a) d = Conv (h, v, c) g = GlobalAveragePool (d) f = Flatten (g) \
                i = Gemm <alpha = 0.5> (f, u) t = Transpose <perm = [1, 0]> (i) y = MatMul (i, t)";
    let net = model(IMAGE, "float[1, 1]", &constants, body);
    let seen = Seen::new(&net, &DIMS);
    let changed = carried_out(&net, &seen, &[]);
    let told = layers_in_codes(&changed, Recipe::Cpu);
    assert_eq!((told.coded.len(), told.largest), (2, 64));
    let reasons: Vec<&str> = told.floats.iter().map(|(_, reason)| reason.as_str()).collect();
    let scaled = "its Gemm scales the product or what it adds, or turns what it reads";
    assert_eq!(reasons, [scaled, "both of its operands are computed"]);
    let told = layers_in_codes(&net, Recipe::Cpu);
    assert_eq!(told.floats[0].1, "it could read codes, and the plan keeps it in float");
    assert!(told.coded.is_empty());
}
