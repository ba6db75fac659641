//! Quantized key-value caches from the command line: what is written, what is said, and that a decoder writes the same text.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, Workbench, operators};
use lathe_ir::{DataType, Model, Tensor, Type, text};
use std::process::Output;

/// Steps that greedy decoding goes on for.
const STEPS: usize = 64;
const VOCABULARY: usize = 48;
const PROMPT: usize = 12;

/// A decoder of one attention with four heads of eight numbers, spelled out as exporters do, and a cache.
fn decoder() -> Model {
    let mut noise = Noise(5);
    // What follows a token is likely by itself, and the attention adds to it.
    let rows = noise.numbers(VOCABULARY * 32, 4.0);
    let before = |token: usize| (token + VOCABULARY - 7) * 29 % VOCABULARY;
    let columns = (0..32).flat_map(|at| (0..VOCABULARY).map(move |token| (at, token)));
    let head: Vec<f32> = columns.map(|(at, token)| rows[before(token) * 32 + at]).collect();
    let list = |numbers: &[f32]| numbers.iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ");
    let (table, head) = (list(&rows), list(&head));
    let mut matrix = |rows: usize, columns: usize, scale: f32| noise.list(rows * columns, scale);
    let layers = [("wq", 0.2), ("wk", 0.2), ("wv", 0.6), ("wo", 0.05)];
    let layers: Vec<String> =
        layers.iter().map(|(name, scale)| format!("float[32, 32] {name} = {{{}}}", matrix(32, 32, *scale))).collect();
    let heads = |to: &str, weight: &str| {
        format!(
            "{to}_flat = MatMul (x, {weight}) {to}_split = Reshape ({to}_flat, split) \
             {to} = Transpose <perm = [0, 2, 1, 3]> ({to}_split)"
        )
    };
    text::parse(&format!(
        "<ir_version: 10, opset_import: [\"\" : 17]> \
         g (int64[1, S] ids, int64[1, S] positions, int64[1, T] mask, float[1, 4, P, 8] past_key, float[1, 4, P, 8] past_value) \
         => (float[1, S, {VOCABULARY}] logits, float[1, 4, T, 8] present_key, float[1, 4, T, 8] present_value) \
         <float[{VOCABULARY}, 32] table = {{{table}}}, float[32, {VOCABULARY}] head = {{{head}}}, {}, \
         int64[4] split = {{0, 0, 4, 8}}, int64[3] join = {{0, 0, 32}}, int64[2] ends = {{1, 3}}, float scale = {{0.35}}, \
         int64 zero = {{0}}, int64 one = {{1}}, float seen = {{0}}, float hidden = {{-1e9}}> {{ \
         x = Gather (table, ids) {} {} {} \
         present_key = Concat <axis = 2> (past_key, k) present_value = Concat <axis = 2> (past_value, v) \
         turned = Transpose <perm = [0, 1, 3, 2]> (present_key) product = MatMul (q, turned) scaled = Mul (product, scale) \
         count = Shape <start = 1, end = 2> (mask) length = Squeeze (count) columns = Range (zero, length, one) \
         rows = Unsqueeze (positions, ends) before = LessOrEqual (columns, rows) bias = Where (before, seen, hidden) \
         masked = Add (scaled, bias) weights = Softmax <axis = -1> (masked) mixed = MatMul (weights, v_all) \
         order = Transpose <perm = [0, 2, 1, 3]> (mixed) joined = Reshape (order, join) out = MatMul (joined, wo) \
         sum = Add (x, out) logits = MatMul (sum, head) }}",
        layers.join(", "),
        heads("q", "wq"),
        heads("k", "wk"),
        heads("v", "wv"),
    ).replace("v_all", "present_value"))
    .unwrap()
}

fn whole(dims: &[usize], numbers: impl Iterator<Item = i64>) -> Tensor {
    Tensor::from_i64s(dims, &numbers.collect::<Vec<_>>())
}

/// Ten prompts with empty caches.
fn set() -> Vec<(&'static str, Tensor)> {
    let mut noise = Noise(11);
    let count = 10 * PROMPT;
    vec![
        ("ids", whole(&[10, PROMPT], (0..count).map(|_| (noise.next() % VOCABULARY as u64) as i64))),
        ("positions", whole(&[10, PROMPT], (0..count).map(|at| (at % PROMPT) as i64))),
        ("mask", whole(&[10, PROMPT], (0..count).map(|_| 1))),
        ("past_key", Tensor::from_f32s(&[10, 4, 0, 8], &[])),
        ("past_value", Tensor::from_f32s(&[10, 4, 0, 8], &[])),
    ]
}

const RUN: [&str; 4] = ["--calib", "set.npz", "--target", "ort"];

fn bench() -> Workbench {
    Workbench::new(&decoder(), &set(), &RUN)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn elem(model: &Model, name: &str) -> Option<DataType> {
    model.graph.value(model.graph.find_value(name).unwrap()).ty.as_ref().and_then(Type::elem)
}

/// A decoder with the cache that it has got so far.
struct Decoder<'a> {
    model: &'a Model,
    cache: [Tensor; 2],
    length: usize,
}

impl<'a> Decoder<'a> {
    fn new(model: &'a Model) -> Decoder<'a> {
        let dtype = elem(model, "past_key").unwrap();
        let width = if dtype == DataType::Uint8 { 4 } else { 8 };
        let empty = Tensor::new(dtype, vec![1, 4, 0, width], Vec::new()).unwrap();
        Decoder { model, cache: [empty.clone(), empty], length: 0 }
    }

    /// The likeliest token behind these, and how likely all are.
    fn step(&mut self, tokens: &[i64]) -> (i64, Vec<f32>) {
        let many = tokens.len();
        let [key, value] = self.cache.clone();
        let inputs = [
            ("ids", whole(&[1, many], tokens.iter().copied())),
            ("positions", whole(&[1, many], (self.length..self.length + many).map(|at| at as i64))),
            ("mask", whole(&[1, self.length + many], (0..self.length + many).map(|_| 1))),
            ("past_key", key),
            ("past_value", value),
        ];
        let inputs: Vec<(String, Tensor)> =
            inputs.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect();
        let mut found =
            lathe_testkit::evaluator().run(self.model, &inputs).unwrap().into_iter().map(|(_, tensor)| tensor);
        let logits = found.next().unwrap().to_f32s().unwrap();
        self.cache = [found.next().unwrap(), found.next().unwrap()];
        self.length += many;
        let last = logits[logits.len() - VOCABULARY..].to_vec();
        ((0..VOCABULARY).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as i64, last)
    }

    /// The tokens behind a prompt and the logits of the first step that reads its cache; of the prompt's cache nothing is left where it is `forgotten`.
    fn decode(mut self, prompt: &[i64], forgotten: bool) -> (Vec<i64>, Vec<f32>) {
        let mut tokens = vec![self.step(prompt).0];
        let mut logits = None;
        if forgotten {
            let nothing = |tensor: &Tensor| {
                Tensor::new(tensor.dtype(), tensor.dims().to_vec(), vec![0; tensor.byte_len()]).unwrap()
            };
            self.cache = [nothing(&self.cache[0]), nothing(&self.cache[1])];
        }
        while tokens.len() < STEPS {
            let (token, last) = self.step(&tokens[tokens.len() - 1..]);
            tokens.push(token);
            logits.get_or_insert(last);
        }
        (tokens, logits.unwrap())
    }
}

#[test]
fn caches_change_their_type_and_the_report_says_so() {
    let bench = bench();
    for (form, dtype, after) in [("int8", DataType::Int8, "int8[1,4,P,8]"), ("int4", DataType::Uint8, "uint8[1,4,P,4]")]
    {
        let report = bench.report(&["-o", "out.onnx", "--kv-cache", form]);
        let caches = &report["kv_cache"];
        assert_eq!(
            (&caches["dtype"], &caches["nodes"], &caches["scales"]),
            (&form.into(), &1.into(), &"per channel".into())
        );
        let port = &caches["ports"][0];
        assert_eq!(
            (&port["name"], &port["before"], &port["after"]),
            (&"past_key".into(), &"float[1,4,P,8]".into(), &after.into())
        );
        assert_eq!(caches["ports"].as_array().unwrap().len(), 4);
        assert_eq!(
            caches["bytes_before"].as_u64().unwrap() / caches["bytes_after"].as_u64().unwrap(),
            if form == "int8" { 4 } else { 8 }
        );
        let model = Model::read(&bench.path("out.onnx")).unwrap().model;
        assert_eq!(operators(&model)["GroupQueryAttention"], 1);
        for name in ["past_key", "past_value", "present_key", "present_value"] {
            assert_eq!(elem(&model, name), Some(dtype), "{form} {name}");
        }
        assert_eq!(elem(&model, "logits"), Some(DataType::Float));
        let verify = &report["verify"];
        assert_eq!((&verify["passed"], &verify["set"]), (&true.into(), &"validation".into()));
        assert!(
            verify["note"].as_str().unwrap().contains("`present_key` and `present_value` were compared as the numbers"),
            "{verify}"
        );
        assert_eq!(verify["outputs"].as_array().unwrap().len(), 3);
        let error = verify["after"].as_f64().unwrap();
        assert!(error > 1e-4 && error < if form == "int8" { 0.05 } else { 0.5 }, "{form} {error}");
    }
}

/// The scales of one channel fit it better than those of all.
#[test]
fn scales_per_channel_lose_less_than_one_for_all() {
    let bench = bench();
    let lost = |form: &str| bench.report(&["-o", "out.onnx", "--kv-cache", form])["verify"]["after"].as_f64().unwrap();
    for form in ["int8", "int4"] {
        let (channel, tensor) = (lost(form), lost(&format!("{form}:tensor")));
        assert!(channel < tensor, "{form} {channel} {tensor}");
    }
}

#[test]
fn greedy_decoding_agrees_for_64_steps() {
    let bench = bench();
    assert!(bench.run(&["-o", "int8.onnx", "--kv-cache", "int8"]).status.success());
    let (float, int8) = (decoder(), Model::read(&bench.path("int8.onnx")).unwrap().model);
    let mut noise = Noise(23);
    for _ in 0..3 {
        let prompt: Vec<i64> = (0..PROMPT).map(|_| (noise.next() % VOCABULARY as u64) as i64).collect();
        let (tokens, logits) = Decoder::new(&float).decode(&prompt, false);
        let (same, near) = Decoder::new(&int8).decode(&prompt, false);
        assert_eq!(tokens, same);
        let (_, far) = Decoder::new(&float).decode(&prompt, true);
        let off = |other: &[f32]| logits.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off(&near) < 0.4 * off(&far), "the cache does not matter: {} {}", off(&near), off(&far));
    }
}

/// The kernel refuses several sequences that go on by several positions.
#[test]
fn what_keeps_the_operator_from_being_written_is_told() {
    let fixture = Model::read(&common::fixture("decoder.onnx")).unwrap().model;
    let bench = Workbench::new(&fixture, &[], &["--target", "ort", "--kv-cache", "int8", "-o", "out.onnx"]);
    let set = common::fixture("sets/decoder.npz");
    let calib = ["--calib", set.to_str().unwrap()];
    let output = bench.run(&calib);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("`fuse-attention` was left out") && said(&output).contains("--batch 1"),
        "{}",
        said(&output)
    );
    let report = bench.report(&[&calib[..], &["--batch", "1"]].concat());
    assert_eq!(report["kv_cache"]["nodes"], 4);
    assert!(report["verify"]["after"].as_f64().unwrap() < 0.05);
}

#[test]
fn what_cannot_be_is_one_sentence() {
    let bench = bench();
    for (options, code, expected) in [
        (&["--kv-cache", "int8", "--target", "portable"][..], 1, "has no GroupQueryAttention with a cache"),
        (
            &["--kv-cache", "int8", "--ep", "openvino"],
            2,
            "the execution provider openvino has no kernel that reads an int8 cache",
        ),
        (&["--kv-cache", "int8", "--size", "0.5"], 2, "give a budget to its result"),
        (&["--kv-cache", "int8", "--dtype", "float16"], 2, "give a budget to its result"),
        (&["--kv-cache", "int8", "--bench"], 2, "whose types --kv-cache changes"),
        (&["--kv-cache", "int8", "--auto"], 2, "run --kv-cache on its result"),
        (&["--kv-cache", "int2"], 2, "expected int8, int4, int8:tensor or int4:tensor"),
        (&["--kv-cache", "int8", "--rtol", "1e-9"], 3, "caches the relative L2 error of `logits` is"),
        (&["--rtol", "0.1"], 2, "the error that --dtype or --kv-cache may make"),
    ] {
        let output = bench.run(&[&["-o", "out.onnx"], options].concat());
        assert_eq!(output.status.code(), Some(code), "{options:?}: {}", said(&output));
        assert!(said(&output).contains(expected), "{options:?}: {}", said(&output));
        assert!(!bench.path("out.onnx").exists());
    }
    let bare = Workbench::new(&decoder(), &set(), &["--target", "ort"]);
    let output = bare.run(&["-o", "out.onnx", "--kv-cache", "int8"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("--calib names one"), "{}", said(&output));
}

#[test]
fn a_recipe_has_the_type_and_the_same_again_is_the_same_bytes() {
    let bench = bench();
    let saved = bench.run(&["-o", "a.onnx", "--kv-cache", "int4:tensor", "--rtol", "0.6", "--save-recipe", "r.toml"]);
    assert!(saved.status.success(), "{}", said(&saved));
    let recipe = std::fs::read_to_string(bench.path("r.toml")).unwrap();
    assert!(recipe.contains("kv-cache = \"int4:tensor\""), "{recipe}");
    assert!(bench.run(&["-o", "b.onnx", "--recipe", "r.toml"]).status.success());
    let read = |name: &str| std::fs::read(bench.path(name)).unwrap();
    assert_eq!(read("a.onnx"), read("b.onnx"));
}

#[test]
fn a_cache_that_is_quantized_already_stays() {
    let bench = bench();
    assert!(bench.run(&["-o", "out.onnx", "--kv-cache", "int8"]).status.success());
    let made = Model::read(&bench.path("out.onnx")).unwrap().model;
    let mut coded = set();
    coded.retain(|(name, _)| !name.starts_with("past"));
    let empty = || Tensor::new(DataType::Int8, vec![10, 4, 0, 8], Vec::new()).unwrap();
    coded.extend([("past_key", empty()), ("past_value", empty())]);
    let again = Workbench::new(&made, &coded, &RUN);
    let output = again.run(&["-o", "out.onnx", "--kv-cache", "int8"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("its cache is quantized already"), "{}", said(&output));
}
