use super::super::{
    factors,
    spectrum::{product, tests::random},
};
use super::*;
use crate::{Pass as _, exact::DropNoopLayout};
use faer::Mat;
use lathe_analysis::{Calibrate, EvaluateError, Gram, Magnitudes, Moments};
use lathe_ir::text;

/// Says the same of every value: mean squares, and the largest number.
struct Same {
    largest: Option<f64>,
}

impl Calibrate for Same {
    fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(None)
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        // Values are named after how many features they have.
        let digits: String = rows.value.chars().filter(char::is_ascii_digit).collect();
        let features = digits.parse().unwrap();
        Ok(Some(Moments { square: vec![1.0; features], largest: self.largest, rows: 100 }))
    }

    fn magnitudes(&self, _: &Rows) -> Result<Option<Magnitudes>, EvaluateError> {
        Ok(None)
    }
}

/// A graph of `x72`, `w` of these sizes, and a bias of 64; the outputs are of any shape.
fn parse(opset: i64, inputs: &str, sizes: &str, body: &str) -> Model {
    let count = sizes.split(',').map(|s| s.trim().parse::<usize>().unwrap()).product::<usize>();
    let numbers: Vec<String> = (0..count).map(|i| format!("{:e}", (i * 37 % 101) as f32 / 300.0 - 0.15)).collect();
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : {opset}]> g ({inputs}) => (float[] y) \
         <float[{sizes}] w = {{{}}}, float[64] c = {{{}}}> {{ {body} }}",
        numbers.join(", "),
        vec!["0.3"; 64].join(", ")
    );
    text::parse(&source).unwrap()
}

fn propose(model: &Model, largest: Option<f64>) -> Proposal {
    let calibration = Same { largest };
    let measures = vec![Quantity::Latency];
    let cx =
        MethodContext::default().with_calibration(&calibration).with_half_precision(true).with_quantities(measures);
    ConvertFloats.propose(model, &cx).unwrap()
}

fn operators(model: &Model) -> Vec<&str> {
    model.graph.nodes(ScopeId::MAIN).map(|id| model.graph.node(id).op_type.as_str()).collect()
}

/// Carries out every form and holds what it computes to the precision of its type.
fn check(inputs: &str, sizes: &str, body: &str, forms: &[&str]) -> Vec<Model> {
    let model = parse(21, inputs, sizes, body);
    let proposal = propose(&model, Some(10.0));
    let [site] = proposal.sites.as_slice() else { panic!("{body}: {proposal:?}") };
    let names: Vec<&str> = site.candidates.iter().map(|c| c.label.as_str()).collect();
    assert_eq!(names, forms, "{body}");
    let carry_out = |(index, choice): (usize, &Candidate)| {
        let mut changed = model.clone();
        let outcome =
            ConvertFloats.apply(&mut changed, site, &site.candidates[index], &MethodContext::default()).unwrap();
        assert_eq!(outcome.changes.len(), 1);
        changed.check().unwrap();
        let bound = if choice.label == "bfloat16" { 1e-2 } else { 1.5e-3 };
        lathe_testkit::equivalent(&model, &changed, Some(bound), 1)
            .unwrap_or_else(|why| panic!("{body} as {}: {why}", choice.label));
        // What it takes is what was told, but for names and attributes; the weight is gone, the bias is as it was.
        let bytes = |model: &Model| model.to_bytes().len() as f64;
        let saved = site.baseline.bytes as f64 - choice.cost.bytes as f64;
        let names = 200.0 * operators(&changed).len() as f64;
        assert!((bytes(&model) - bytes(&changed) - saved).abs() < names, "{body} as {}", choice.label);
        let stored = changed.graph.initializers(ScopeId::MAIN).map(|v| changed.graph.constant(v).unwrap());
        let wide: Vec<_> = stored.filter(|t| t.dtype() == DataType::Float).map(|t| t.len()).collect();
        assert_eq!(wide, [64], "{body} as {}", choice.label);
        changed
    };
    site.candidates.iter().enumerate().map(carry_out).collect()
}

const ALL: [&str; 3] = ["float16", "float16 products", "bfloat16"];

#[test]
fn layers_are_near_what_they_were_in_every_form() {
    check("float[3, 72] x72", "72, 64", "h64 = MatMul (x72, w) y = Add (h64, c)", &ALL);
    check("float[3, 72] x72", "64, 72", "h64 = Gemm <alpha = 0.5, transB = 1> (x72, w, c) y = Relu (h64)", &ALL);
    check("float[3, 72] x72", "64, 72", "t = Transpose (w) h64 = MatMul (x72, t) y = Add (h64, c)", &ALL);
    let conv = "h64 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x72, w, c) y = Relu (h64)";
    check("float[1, 8, 9, 9] x72", "64, 8, 3, 3", conv, &ALL);
    check("float[3, 72] x72", "64, 72", "h64 = Gemm <beta = 2.0, transB = 1> (x72, w, c) y = Neg (h64)", &ALL);
}

#[test]
fn rows_are_picked_before_they_are_widened() {
    let changed = check("int64[3] ids", "72, 64", "p64 = Gather (w, ids) y = Add (p64, c)", &["float16", "bfloat16"]);
    let graph = &changed[0].graph;
    let picked = graph.nodes(ScopeId::MAIN).find(|&id| graph.node(id).is("Gather")).unwrap();
    let table = graph.constant(graph.node(picked).input(0).unwrap()).unwrap();
    assert_eq!((table.dtype(), table.dims()), (DataType::Float16, &[72, 64][..]));
    // Statistics are known by names: the widened rows have that of the picked ones.
    let wide = graph.producer(graph.find_value("p64").unwrap()).unwrap();
    assert_eq!((graph.node(wide).op_type.as_str(), graph.node(wide).input(0)), ("Cast", graph.node(picked).output(0)));
}

#[test]
fn a_tied_table_is_stored_once() {
    let body =
        "p64 = Gather (w, ids) a = Add (p64, c) x64 = Relu (a) t = Transpose (w) h72 = MatMul (x64, t) y = Tanh (h72)";
    for changed in check("int64[3] ids", "72, 64", body, &ALL) {
        assert_eq!(operators(&changed).iter().filter(|op| **op == "Gather").count(), 1);
    }
}

#[test]
fn layers_that_follow_each_other_lose_the_casts_between_them() {
    let body = "a64 = MatMul (x64, w) b64 = MatMul (x64, w) s = Add (a64, b64) t = Add (s, c) y = Relu (t)";
    let [_, changed, _] = check("float[3, 64] x64", "64, 64", body, &ALL).try_into().unwrap();
    // Both read one cast.
    assert_eq!(operators(&changed).iter().filter(|op| **op == "Cast").count(), 3);
    let body = "a64 = MatMul (x64, w) b64 = MatMul (a64, w) y = Add (b64, c)";
    let [_, mut changed, _] = check("float[3, 64] x64", "64, 64", body, &ALL).try_into().unwrap();
    DropNoopLayout.apply(&mut changed, &crate::PassContext::default()).unwrap();
    let casts = operators(&changed).iter().filter(|op| **op == "Cast").count();
    assert_eq!(casts, 2, "one before and one behind: {:?}", operators(&changed));
}

/// The reasons why forms are not offered, and the forms that are.
fn refused(model: &Model, largest: Option<f64>) -> (Vec<String>, Vec<String>) {
    let proposal = propose(model, largest);
    let names = proposal.sites.iter().flat_map(|s| &s.candidates).map(|c| c.label.clone()).collect();
    (proposal.outcome.refusals.into_keys().collect(), names)
}

#[test]
fn layers_that_may_overflow_stay_in_float32() {
    let stored = ["float16", "bfloat16"].map(str::to_owned).to_vec();
    let layer = parse(21, "float[3, 72] x72", "72, 64", "h64 = MatMul (x72, w) y = Add (h64, c)");
    let near = "stays in float32: what it reads or gives comes near the end of float16's range";
    assert_eq!(refused(&layer, Some(8189.0)), (vec![near.to_owned()], stored.clone()));
    let unwatched = "stays in float32: the range of what it reads or gives was not watched";
    assert_eq!(refused(&layer, None), (vec![unwatched.to_owned()], stored.clone()));
    let biased = parse(21, "float[3, 72] x72, float[64] b", "72, 64", "h64 = Gemm (x72, w, b) y = Add (h64, c)");
    let bias = "stays in float32: its bias is no constant or comes near the end of float16's range";
    assert_eq!(refused(&biased, Some(1.0)), (vec![bias.to_owned()], stored.clone()));
    let table = parse(21, "int64[3] ids", "72, 64", "p64 = Gather (w, ids) y = Add (p64, c)");
    assert_eq!(refused(&table, Some(1.0)), (vec!["stays in float32: it is no layer".to_owned()], stored));
}

#[test]
fn what_a_type_cannot_hold_is_not_stored_in_it() {
    let body = "h64 = MatMul (x72, w) y = Add (h64, c)";
    let mut model = parse(12, "float[3, 72] x72", "72, 64", body);
    let old = "bfloat16 needs operator set 13; --opset 13 upgrades".to_owned();
    assert_eq!(refused(&model, Some(1.0)).0, std::slice::from_ref(&old));
    let weight = model.graph.find_value("w").unwrap();
    let store = |model: &mut Model, number: f32| {
        let tensor = Tensor::from_f32s(&[72, 64], &[number; 72 * 64]);
        model.graph.set_initializer(weight, lathe_ir::Initializer::Dense(tensor));
    };
    store(&mut model, 1e5);
    let beyond = "a number of the constant lies beyond the range of the short type".to_owned();
    assert_eq!(refused(&model, Some(1.0)), (vec![beyond, old], Vec::new()));
    store(&mut model, f32::NAN);
    assert_eq!(refused(&model, Some(1.0)).0, ["the constant holds a NaN or an infinity"]);
    let ancient = parse(8, "float[3, 72] x72", "72, 64", body);
    assert_eq!(refused(&ancient, Some(1.0)).0, ["it needs operator set 9; --opset 9 upgrades"]);
    let idle = ConvertFloats.propose(&layer(), &MethodContext::default()).unwrap();
    assert_eq!(idle.outcome.refusals.keys().collect::<Vec<_>>(), ["it saves bytes and time, and neither is limited"]);
    let bytes = MethodContext::default().with_quantities(vec![Quantity::Size]);
    let unseen = ConvertFloats.propose(&layer(), &bytes).unwrap();
    assert_eq!(unseen.outcome.refusals.keys().collect::<Vec<_>>(), ["nothing was seen of it on the calibration set"]);
}

fn layer() -> Model {
    parse(21, "float[3, 72] x72", "72, 64", "h64 = MatMul (x72, w) y = Add (h64, c)")
}

#[test]
fn products_are_offered_only_where_they_can_save_time() {
    let model = layer();
    let calibration = Same { largest: Some(1.0) };
    for (half_precision, measures) in [(false, vec![Quantity::Latency]), (true, vec![Quantity::Size])] {
        let cx = MethodContext::default()
            .with_calibration(&calibration)
            .with_half_precision(half_precision)
            .with_quantities(measures);
        let proposal = ConvertFloats.propose(&model, &cx).unwrap();
        let names: Vec<&str> = proposal.sites[0].candidates.iter().map(|c| c.label.as_str()).collect();
        assert_eq!(names, ["float16", "bfloat16"]);
        assert!(proposal.outcome.refusals.is_empty());
    }
}

#[test]
fn the_error_is_the_one_told() {
    let (x, w) = (random(500, 72, 1), random(72, 64, 2));
    let mut model = parse(21, "float[3, 72] x72", "72, 64", "h64 = MatMul (x72, w) y = Add (h64, c)");
    let value = model.graph.find_value("w").unwrap();
    let numbers = factors::numbers(w.as_ref());
    model.graph.set_initializer(value, lathe_ir::Initializer::Dense(Tensor::from_f32s(&[72, 64], &numbers)));
    let weight = weights(&model.graph).0.remove(0);
    let single = |m: &Mat<f64>| Mat::from_fn(m.nrows(), m.ncols(), |i, j| f64::from(m[(i, j)] as f32));
    let (x, w) = (single(&x), single(&w));
    let whole = product(x.as_ref(), w.as_ref());
    let squares = (0..72).map(|i| x.col(i).squared_norm_l2() / 500.0).collect();
    let output = whole.squared_norm_l2() / 500.0;
    let inputs = [Input { squares, largest: Some(1.0), largest_output: Some(9.0), output }];
    let rounded_to = |m: &Mat<f64>, dtype| {
        let numbers = factors::numbers(m.as_ref());
        let back = short(dtype, &[numbers.len()], &numbers).to_f64s().unwrap();
        Mat::from_fn(m.nrows(), m.ncols(), |i, j| back[i * m.ncols() + j])
    };
    for form in Form::ALL {
        let dtype = form.dtype();
        let rounded = rounded(&weight, &numbers, dtype).unwrap();
        let stated = errors(&model.graph, &weight, &inputs, &rounded, form)[0];
        let made = match form {
            Form::Stored(_) => product(x.as_ref(), rounded_to(&w, dtype).as_ref()),
            Form::Multiplied => {
                let made = product(rounded_to(&x, dtype).as_ref(), rounded_to(&w, dtype).as_ref());
                rounded_to(&made, dtype)
            }
        };
        let found = (&whole - &made).norm_l2() / whole.norm_l2();
        assert!((found / stated - 1.0).abs() < 0.1, "{}: {found} found, {stated} told", form.name());
    }
}
