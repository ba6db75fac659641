//! A budget is kept on every interface that a model can have, or refused in one sentence.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, Workbench, operators};
use lathe_ir::{Model, Tensor, text};
use serde_json::Value;

const RUN: [&str; 4] = ["--calib", "set.npz", "-o", "out.onnx"];

/// Two layers, `h = relu(x · a)` and `y = h · b`, between the ports and the body around them.
struct Case {
    name: &'static str,
    ports: &'static str,
    body: &'static str,
    set: Vec<(&'static str, Tensor)>,
}

fn source(ports: &str, body: &str) -> String {
    let mut noise = Noise(3);
    let (a, b) = (noise.list(64 * 128, 0.2), noise.list(128 * 32, 0.2));
    format!(
        r#"<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]> g {ports}
        <float[64, 128] a = {{{a}}}, float[128, 32] b = {{{b}}}, float[64, 64] table = {{{}}}, float half = {{0.5}},
        float zero = {{0}}, float[2] pair = {{1, 2}}, int64[2] flat = {{0, 64}}, int64 first = {{0}}> {{ {body} }}"#,
        noise.list(64 * 64, 0.5)
    )
}

const LAYERS: &str = "h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)";

fn bench(ports: &str, body: &str, set: &[(&str, Tensor)]) -> Workbench {
    let body = body.replace("LAYERS", LAYERS);
    let model = text::parse(&source(ports, &body)).unwrap_or_else(|e| panic!("{ports}: {e}"));
    Workbench::new(&model, set, &RUN)
}

fn floats(dims: &[usize]) -> Tensor {
    Tensor::from_f32s(dims, &Noise(7).numbers(dims.iter().product(), 1.0))
}

fn strings(all: &[&str], count: usize) -> Tensor {
    let strings = (0..count).map(|i| all[i % all.len()].to_owned().into()).collect();
    Tensor::strings(vec![count], strings).unwrap()
}

/// What a size of 0.5 leaves.
fn halved(bench: &Workbench, name: &str) -> Value {
    let output = bench.run(&["--size", "0.5", "--report", "report.json"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{name}: {message}");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(bench.path("report.json")).unwrap()).unwrap();
    let size = |side: &str| report[side]["file_bytes"].as_f64().unwrap();
    assert!(size("output") <= 0.5 * size("input"), "{name}");
    report
}

fn refused(bench: &Workbench, options: &[&str], code: i32) -> String {
    let output = bench.run(options);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

#[test]
fn every_interface_has_a_result() {
    let x = || ("x", floats(&[24, 64]));
    let case = |name, ports, body, set| Case { name, ports, body, set };
    let ones = |count: usize| Tensor::from_f32s(&[count], &vec![1.5; count]);
    let bools: Vec<bool> = (0..24 * 64).map(|i| i % 3 > 0).collect();
    let pixels: Vec<u8> = (0..24 * 64).map(|i| (i * 37 % 256) as u8).collect();
    let ids: Vec<i64> = (0..24 * 3).map(|i| i * 11 % 128 - 64).collect();
    let cases = [
        case(
            "an input of no axes",
            "(float[n, 64] x, float s) => (float[n, 32] z)",
            "LAYERS z = Mul (y, s)",
            vec![x(), ("s", ones(24))],
        ),
        case(
            "the same number in every run",
            "(float s, float[n, 64] x) => (float[n, 32] z)",
            "LAYERS z = Mul (y, s)",
            vec![("s", Tensor::from_f32s(&[], &[1.5])), x()],
        ),
        case(
            "one axis more than the input",
            "(float[n, 64] x) => (float[n, 32] y)",
            "LAYERS",
            vec![("x", floats(&[8, 3, 64]))],
        ),
        case("a fixed batch", "(float[4, 64] x) => (float[4, 32] y)", "LAYERS", vec![x()]),
        case("no batch", "(float[64] x) => (float[32] y)", "LAYERS", vec![x()]),
        case(
            "samples on different axes",
            "(float[n, 64] x, float[t, n, 32] m) => (float[t, n, 32] z)",
            "LAYERS z = Add (y, m)",
            vec![("x", floats(&[8, 2, 64])), ("m", floats(&[8, 3, 2, 32]))],
        ),
        case(
            "booleans",
            "(float[n, 64] w, bool[n, 64] keep) => (float[n, 32] y)",
            "x = Where (keep, w, zero) LAYERS",
            vec![("w", floats(&[24, 64])), ("keep", Tensor::from_bools(&[24, 64], &bools))],
        ),
        case(
            "images of bytes",
            "(uint8[n, 8, 8] image) => (float[n, 32] y)",
            "f = Cast <to = 1> (image) g = Reshape (f, flat) x = Mul (g, half) LAYERS",
            vec![("image", Tensor::new(lathe_ir::DataType::Uint8, vec![24, 8, 8], pixels).unwrap())],
        ),
        case(
            "strings that are looked up",
            "(string[n] city, float[n, 64] w) => (float[n, 32] y, string[n] same)",
            r#"i = ai.onnx.ml.LabelEncoder <keys_strings = ["a", "b"], values_int64s = [0, 1], default_int64 = 2> (city)
            e = Gather (table, i) x = Add (e, w) same = Identity (city) LAYERS"#,
            vec![("city", strings(&["a", "b", "somewhere"], 24)), ("w", floats(&[24, 64]))],
        ),
        case(
            "indices from the end",
            "(int64[n, 3] ids) => (float[n, 3, 32] y)",
            "x = Gather (table, ids) LAYERS",
            vec![("ids", Tensor::from_i64s(&[24, 3], &ids))],
        ),
        case("a default", "(float[n, 64] x, float half) => (float[n, 32] z)", "LAYERS z = Mul (y, half)", vec![x()]),
        case("one sample", "(float[n, 64] x) => (float[n, 32] y)", "LAYERS", vec![("x", floats(&[1, 64]))]),
        case(
            "one number for all samples",
            "(float[n, 64] x) => (float z)",
            "LAYERS z = ReduceMean <keepdims = 0> (y)",
            vec![x()],
        ),
        case(
            "an output that is constant",
            "(float[n, 64] x) => (float[n, 32] y, float[2] k)",
            "LAYERS k = Identity (pair)",
            vec![x()],
        ),
        case(
            "whole numbers beside a constant",
            "(float[n, 64] x) => (int64[n, 1] z, float[2] k)",
            "LAYERS z = ArgMax <axis = 1> (y) k = Identity (pair)",
            vec![x()],
        ),
        case(
            "a sequence",
            "(float[n, 64] x) => (seq(float[n, 32]) z)",
            "LAYERS z = SequenceConstruct (y, y)",
            vec![x()],
        ),
        case("infinities", "(float[n, 64] x) => (float[n, 32] z)", "LAYERS p = Relu (y) z = Log (p)", vec![x()]),
        case("no numbers", "(float[n, 64] x) => (float[n, 32] z)", "LAYERS z = Sqrt (y)", vec![x()]),
    ];
    for Case { name, ports, body, set } in cases {
        let report = halved(&bench(ports, body, &set), name);
        let warnings = report["warnings"].to_string();
        assert_eq!(warnings.contains("count alike"), name.starts_with("whole numbers"), "{name}: {warnings}");
        assert!(!warnings.contains("the median of the others"), "{name}: {warnings}");
    }
}

#[test]
fn what_cannot_be_measured_is_named() {
    let ports = "(float[n, 64] x) => (float[n, 32] z)";
    let nothing = bench(ports, "LAYERS q = Mul (y, zero) z = Div (q, zero)", &[("x", floats(&[24, 64]))]);
    let message = refused(&nothing, &["--size", "0.5"], 1);
    assert!(message.contains("output `z` of the model is NaN or infinite in all its elements"), "{message}");
    let empty = bench("(float[n, 64] x) => (float[n, 32] y)", "LAYERS", &[("x", floats(&[0, 64]))]);
    let message = refused(&empty, &["--size", "0.5"], 1);
    assert!(message.contains("holds no samples"), "{message}");
    let ports = "(seq(float[n, 64]) s) => (float[n, 32] y)";
    let sequence = bench(ports, "x = SequenceAt (s, first) LAYERS", &[("s", floats(&[24, 64]))]);
    let message = refused(&sequence, &["--size", "0.5"], 1);
    assert!(message.contains("input `s` of the model is a sequence"), "{message}");
}

/// Nine classes for every token of a vocabulary of 512: no language model, though no token depends on later ones.
#[test]
fn classes_of_tokens_are_no_language_model() {
    let mut noise = Noise(5);
    let source = format!(
        r#"<ir_version: 8, opset_import: ["" : 17]> g (int64[n, t] input_ids) => (float[n, t, 9] logits)
        <float[512, 64] table = {{{}}}, float[64, 128] a = {{{}}}, float[128, 9] b = {{{}}}>
        {{ x = Gather (table, input_ids) h = MatMul (x, a) r = Relu (h) logits = MatMul (r, b) }}"#,
        noise.list(512 * 64, 0.5),
        noise.list(64 * 128, 0.2),
        noise.list(128 * 9, 0.2)
    );
    let ids: Vec<i64> = (0..24 * 16).map(|i| i * 37 % 512).collect();
    let bench =
        Workbench::new(&text::parse(&source).unwrap(), &[("input_ids", Tensor::from_i64s(&[24, 16], &ids))], &RUN);
    let report = halved(&bench, "classes");
    assert_eq!(report["verify"]["metric"], "kl", "{}", report["verify"]);
    let message = refused(&bench, &["--size", "0.5", "--metric", "perplexity"], 1);
    assert!(
        message.contains("has 9 numbers for every token of `input_ids`, which are 512 different ones"),
        "{message}"
    );
}

/// `x · W` in a recurrent layer is nothing that a method knows, but its weights can be stored in fewer bits.
#[test]
fn weights_of_recurrent_layers_are_stored_in_fewer_bits() {
    let mut noise = Noise(9);
    for (op, gates, opset) in [("LSTM", 4, 21), ("GRU", 3, 14), ("RNN", 1, 14)] {
        let hidden = 256 / gates;
        let source = format!(
            r#"<ir_version: 10, opset_import: ["" : {opset}]> g (float[t, n, 64] x) => (float[t, 1, n, {hidden}] y)
            <float[1, {rows}, 64] w = {{{}}}, float[1, {rows}, {hidden}] r = {{{}}}>
            {{ y = {op} <hidden_size = {hidden}> (x, w, r) }}"#,
            noise.list(gates * hidden * 64, 0.1),
            noise.list(gates * hidden * hidden, 0.1),
            rows = gates * hidden,
        );
        let bench = Workbench::new(&text::parse(&source).unwrap(), &[("x", floats(&[12, 7, 1, 64]))], &RUN);
        let report = halved(&bench, op);
        assert!(report["verify"]["drop"].as_f64().unwrap() < 0.02, "{op}: {}", report["verify"]);
        let stored = |choice: &&Value| choice["option"] != "as it is";
        assert!(report["plan"]["choices"].as_array().unwrap().iter().filter(stored).count() > 0, "{op}");
        let small = bench.report(&["--size", "0.2"]);
        let found = operators(&Model::read(&bench.path("out.onnx")).unwrap().model);
        assert!(found[op] == 1 && found["DequantizeLinear"] == 2, "{op}: {found:?}");
        assert!(small["verify"]["drop"].as_f64().unwrap() < 0.2, "{op}: {}", small["verify"]);
        // The reason is told without -v where nothing is offered.
        let message = refused(&bench, &["--size", "0.5", "--passes", "factorize"], 3);
        let reason = format!("no method handles 1 {op} node (100 % of the bytes of constants");
        assert!(message.contains(&reason), "{message}");
    }
}

#[test]
fn only_what_a_metric_is_measured_on_needs_labels() {
    let ports = "(float[n, 64] x) => (float[n, 32] y)";
    let bench = bench(ports, "LAYERS", &[("x", floats(&[24, 64]))]);
    let labels: Vec<i64> = (0..24).map(|i| i % 32).collect();
    let mut npz = lathe_runtime::NpzWriter::create(&bench.path("labelled.npz")).unwrap();
    npz.add("x", &floats(&[24, 64])).unwrap();
    npz.add("label", &Tensor::from_i64s(&[24], &labels)).unwrap();
    npz.finish().unwrap();
    let fixed = ["--size", "0.5", "--labels", "label"];
    let report = bench.report(&[&fixed[..], &["--validate", "labelled.npz"]].concat());
    assert_eq!(report["verify"]["metric"], "accuracy");
    let message = refused(&bench, &["--size", "0.5", "--validate", "labelled.npz"], 1);
    assert!(message.contains("array `label` in `labelled.npz` is no input of the model"), "{message}");
    // The last quarter of a set that is divided is measured on.
    let message = refused(&bench, &fixed, 1);
    assert!(message.contains("holds no labels, expected an array `label`"), "{message}");
    std::fs::copy(bench.path("labelled.npz"), bench.path("set.npz")).unwrap();
    for validate in [&[][..], &["--validate", "labelled.npz"]] {
        let report = bench.report(&[&fixed[..], validate].concat());
        assert_eq!(report["verify"]["metric"], "accuracy");
    }
}
