//! Units of every family of residual networks: a factor of 1 changes nothing, a factor of 0 is the unit left out.

use super::surgery::{gate, leave_out, norm_after};
use super::*;
use lathe_analysis::Units;
use lathe_ir::{Initializer, Tensor, text};
use std::fmt::Write as _;

/// A model from its inputs and outputs in the text form, weights such as `w:4,4`, and the body.
fn model(ports: &str, weights: &str, body: &str) -> Model {
    let mut constants: Vec<String> = Vec::new();
    for (at, weight) in weights.split_whitespace().enumerate() {
        let (name, sizes) = weight.split_once(':').unwrap();
        let count: usize = sizes.split(',').map(|s| s.parse::<usize>().unwrap()).product();
        let mut values = String::new();
        for index in 0..count {
            let separator = if index == 0 { "" } else { ", " };
            let _ = write!(values, "{separator}{}", ((index * 7 + at * 3) % 11) as f32 / 8.0 - 0.5);
        }
        constants.push(format!("float[{sizes}] {name} = {{{values}}}"));
    }
    let head = r#"<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>"#;
    text::parse(&format!("{head} g {ports} <{}> {{ {body} }}", constants.join(", "))).unwrap()
}

const ATTENTION: &str = "
    q = MatMul (n, wq) k = MatMul (n, wk) v = MatMul (n, wv)
    kt = Transpose <perm = [0, 2, 1]> (k) scores = MatMul (q, kt) p = Softmax (scores)
    o = MatMul (p, v) a = MatMul (o, wo)";
const MLP: &str = "u = MatMul (m, up) r = Relu (u) d = MatMul (r, down)";
const WEIGHTS: &str = "wq:4,4 wk:4,4 wv:4,4 wo:4,4 up:4,8 down:8,4 g:4 b:4 kernel:3,3,3,3";
const STREAM: &str = "(float[batch,seq,4] x) => (float[batch,seq,4] y)";
const IMAGE: &str = "(float[batch,3,8,8] x) => (float[batch,3,8,8] y)";

/// Two units each, in the forms that exporters and ONNX Runtime write.
fn families() -> Vec<(&'static str, Model)> {
    let make = |name, ports, body: String| (name, model(ports, WEIGHTS, &body));
    let pre_norm = format!(
        "n = LayerNormalization (x, g, b) {ATTENTION} h = Add (x, a) m = LayerNormalization (h, g, b) {MLP}
         s = Add (d, h) y = Tanh (s)"
    );
    let post_norm = format!(
        "n = Identity (x) {ATTENTION} s = Add (a, x) m = LayerNormalization (s, g, b) {MLP} t = Add (d, m)
         y = LayerNormalization (t, g, b)"
    );
    let parallel =
        |sums: &str| format!("n = LayerNormalization (x, g, b) {ATTENTION} m = Identity (n) {MLP} {sums} y = Tanh (t)");
    let fused = format!(
        "n = Identity (x) {ATTENTION} m, , , s = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (x, a, g, b, b)
         {MLP} z, , , t = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (s, d, g, b) y = Add (z, t)"
    );
    let residual =
        "c = Conv <pads = [1, 1, 1, 1]> (x, kernel) rc = Relu (c) e = Conv <pads = [1, 1, 1, 1]> (rc, kernel)
         s = Add (x, e) h = Relu (s) f = Conv <pads = [1, 1, 1, 1]> (h, kernel) rf = Relu (f)
         i = Conv <pads = [1, 1, 1, 1]> (rf, kernel) t = Add (i, h) y = Relu (t)";
    vec![
        make("pre-norm", STREAM, pre_norm),
        make("post-norm", STREAM, post_norm),
        make("parallel, branches first", STREAM, parallel("s = Add (a, d) t = Add (s, x)")),
        make("parallel, one after another", STREAM, parallel("s = Add (x, a) t = Add (s, d)")),
        make("parallel, one sum", STREAM, parallel("t = Sum (x, a, d)")),
        make("fused sums and norms", STREAM, fused),
        make("residual network", IMAGE, residual.to_owned()),
    ]
}

/// The model with a number in the place of an input.
fn with(mut model: Model, input: &str, number: f32) -> Model {
    let graph = &mut model.graph;
    let value = graph.find_value(input).unwrap();
    let at = graph.main().inputs().iter().position(|&v| v == value).unwrap();
    graph.set_default(value, Some(Initializer::Dense(Tensor::from_f32s(&[], &[number]))));
    graph.freeze_input(lathe_ir::ScopeId::MAIN, at);
    model
}

fn check(name: &str, model: &Model, gone: &[ValueId]) {
    let mut gated = model.clone();
    let input = gate(&mut gated, gone, "gate").unwrap();
    gated.check().unwrap();
    let mut without = model.clone();
    leave_out(&mut without, gone).unwrap();
    DropDead.apply(&mut without, &crate::PassContext::default()).unwrap();
    without.check().unwrap();
    lathe_testkit::equivalent(model, &with(gated.clone(), &input, 1.0), Some(1e-5), 1)
        .unwrap_or_else(|e| panic!("{name}, a factor of 1: {e}"));
    lathe_testkit::equivalent(&without, &with(gated, &input, 0.0), Some(1e-5), 1)
        .unwrap_or_else(|e| panic!("{name}, a factor of 0: {e}"));
    assert!(
        lathe_testkit::equivalent(model, &without, Some(1e-3), 1).is_err(),
        "{name}: leaving something out changes nothing"
    );
}

#[test]
fn a_unit_of_every_family_can_be_left_out() {
    for (name, model) in families() {
        let units = Units::find(&model, &Facts::infer(&model));
        assert_eq!(units.len(), 2, "{name}");
        for (_, unit) in units.iter() {
            check(name, &model, &unit.branch);
        }
        let both: Vec<ValueId> = units.iter().flat_map(|(_, unit)| unit.branch.iter().copied()).collect();
        check(name, &model, &both);
    }
}

#[test]
fn a_norm_after_the_sum_goes_with_the_unit_or_stays() {
    let (_, model) = families().swap_remove(1);
    let units = Units::find(&model, &Facts::infer(&model));
    let (_, first) = units.iter().next().unwrap();
    // Others read the normalized stream, and only the normalization the sum.
    assert!(norm_after(&model.graph, first.stream_out).is_some());
    check("norm too", &model, &[first.branch[0], first.stream_out]);
    let unit = |at: usize| {
        let mlp = format!("u{at} = MatMul (s{at}, up) r{at} = Relu (u{at}) d{at} = MatMul (r{at}, down)");
        format!("{mlp} t{at} = Add (s{at}, d{at}) s{} = LayerNormalization (t{at}, g, b) ", at + 1)
    };
    let units: String = (0..5).map(unit).collect();
    let model = self::model(STREAM, WEIGHTS, &format!("s0 = Tanh (x) {units} y = Tanh (s5)"));
    let (found, refused) = candidates(&model, true);
    let norms: Vec<bool> = found.iter().map(|c| c.norm.is_some()).collect();
    assert_eq!(norms, [true, true, true, true, false], "{refused:?}");
}

#[test]
fn the_ends_and_what_changes_the_stream_stay() {
    let body = "n = LayerNormalization (x, g, b) ";
    let unit = |at: usize| {
        format!(
            "u{at} = MatMul (s{at}, up) r{at} = Relu (u{at}) d{at} = MatMul (r{at}, down)
        s{} = Add (s{at}, d{at}) ",
            at + 1
        )
    };
    let units: String = (0..5).map(unit).collect();
    let model = model(STREAM, WEIGHTS, &format!("{body} s0 = Tanh (n) {units} y = Tanh (s5)"));
    let (found, refused) = candidates(&model, false);
    assert_eq!(found.len(), 3);
    let ends = refused.iter().filter(|(reason, _)| reason == "it belongs to the first or the last block of its chain");
    assert_eq!(ends.count(), 2);
    assert_eq!(candidates(&model, true).0.len(), 5);
    // Of two units the larger holds more than a quarter.
    let (found, refused) = candidates(&families()[0].1, true);
    assert_eq!((found.len(), refused.len()), (1, 1), "{refused:?}");
    assert!(refused.iter().all(|(reason, _)| reason == "it holds more than a quarter of the model's operations"));
}

#[test]
fn spans_end_where_a_unit_stays() {
    let unit = |at: usize| {
        format!(
            "u{at} = MatMul (s{at}, up) r{at} = Relu (u{at}) d{at} = MatMul (r{at}, down)
        s{} = Add (s{at}, d{at}) ",
            at + 1
        )
    };
    let units: String = (0..5).map(unit).collect();
    let model = model(STREAM, WEIGHTS, &format!("s0 = Tanh (x) {units} y = Tanh (s5)"));
    let value = |name: &str| model.graph.find_value(name).unwrap();
    let found = span::spans(&model.graph, &[value("d4"), value("d1"), value("d2")]);
    type Told = (ValueId, ValueId, Option<(ValueId, ValueId)>);
    let stated: Vec<Told> = found.iter().map(|s| (s.enter, s.leave, s.before)).collect();
    let expected = [
        (value("s1"), value("s3"), Some((value("d0"), value("s1")))),
        (value("s4"), value("s5"), Some((value("d3"), value("s4")))),
    ];
    assert_eq!(stated, expected);
}
