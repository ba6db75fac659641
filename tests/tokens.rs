//! Fewer tokens and fewer units at once: one plan, whose costs are those of the file it makes.

#![allow(clippy::unwrap_used)]

mod common;

use common::Workbench;
use lathe_ir::{Model, Tensor, text};
use serde_json::Value;
use std::fmt::Write as _;

const WIDTH: usize = 32;
const HIDDEN: usize = 128;

/// Tokens of a sample: one to classify by, and pairs of equal ones.
const PAIRS: usize = 32;
const TOKENS: usize = 1 + 2 * PAIRS;

/// Numbers near a bell curve, from a fixed seed.
struct Noise(u64);

impl Noise {
    fn numbers(&mut self, count: usize, scale: f32) -> Vec<f32> {
        let mut one = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as f32 / (1u64 << 31) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| one()).sum::<f32>() * scale).collect()
    }
}

fn listed(dims: &str, name: &str, numbers: &[f32]) -> String {
    let numbers: Vec<String> = numbers.iter().map(|x| format!("{x:e}")).collect();
    format!(", float[{dims}] {name} = {{{}}}", numbers.join(", "))
}

/// Four blocks over pairs of equal tokens. The values of the second attention and what leaves the third feed-forward unit
/// are zeros, so that neither adds anything.
fn model() -> String {
    let mut noise = Noise(11);
    let (mut constants, mut body) = (String::new(), String::new());
    for i in 0..4 {
        let mut qkv = noise.numbers(WIDTH * 3 * WIDTH, 0.3);
        qkv.iter_mut()
            .enumerate()
            .filter(|(at, _)| i == 1 && at % (3 * WIDTH) >= 2 * WIDTH)
            .for_each(|(_, x)| *x = 0.0);
        let up = noise.numbers(WIDTH * HIDDEN, 0.3);
        let down = noise.numbers(WIDTH * HIDDEN, if i == 2 { 0.0 } else { 0.1 });
        constants += &listed("32, 96", &format!("qkv{i}"), &qkv);
        constants += &listed("32, 128", &format!("up{i}"), &up);
        constants += &listed("128, 32", &format!("down{i}"), &down);
        let next = i + 1;
        let _ = write!(
            body,
            "n{i} = LayerNormalization (s{i}, g, b) p{i} = MatMul (n{i}, qkv{i})
             q{i}, k{i}, v{i} = Split <axis = 2, num_outputs = 3> (p{i}) "
        );
        for (name, perm) in [("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")] {
            let _ = write!(
                body,
                "{name}h{i} = Reshape ({name}{i}, heads) {name}t{i} = Transpose <perm = [{perm}]> ({name}h{i}) "
            );
        }
        let _ = write!(
            body,
            "[\"{i}/scores\"] sc{i} = MatMul (qt{i}, kt{i}) sm{i} = Softmax <axis = -1> (sc{i})
             [\"{i}/sum\"] o{i} = MatMul (sm{i}, vt{i}) ot{i} = Transpose <perm = [0, 2, 1, 3]> (o{i})
             a{i} = Reshape (ot{i}, flat) h{i} = Add (s{i}, a{i})
             m{i} = LayerNormalization (h{i}, g, b) [\"{i}/up\"] u{i} = MatMul (m{i}, up{i}) r{i} = Relu (u{i})
             [\"{i}/down\"] d{i} = MatMul (r{i}, down{i}) s{next} = Add (h{i}, d{i}) "
        );
    }
    let pairs: Vec<String> = (0..TOKENS).map(|at| at.div_ceil(2).to_string()).collect();
    format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 33, 32] x) => (float[n, 32] y)
         <int64[{TOKENS}] pairs = {{{}}}, int64[4] heads = {{0, {TOKENS}, 2, 16}}, int64[3] flat = {{0, {TOKENS}, 32}},
          int64 zero = {{0}}, float[32] g = {{{}}}, float[32] b = {{{}}} {constants}> {{
            s0 = Gather <axis = 1> (x, pairs) {body} s = LayerNormalization (s4, g, b) y = Gather <axis = 1> (s, zero) }}",
        pairs.join(", "),
        ["1"; WIDTH].join(", "),
        ["0.1"; WIDTH].join(", "),
    )
}

fn bench() -> Workbench {
    let rows = Noise(3).numbers(32 * (1 + PAIRS) * WIDTH, 2.0);
    let fixed = ["--metric", "rel-l2", "--set", "prune-units.patch=none", "--calib", "set.npz", "-o", "out.onnx"];
    let x = Tensor::from_f32s(&[32, 1 + PAIRS, WIDTH], &rows);
    Workbench::new(&text::parse(&model()).unwrap(), &[("x", x)], &fixed)
}

/// Sites and options of what a method got.
fn got<'r>(report: &'r Value, method: &str) -> Vec<(&'r str, &'r str)> {
    let choices = report["plan"]["choices"].as_array().unwrap().iter().filter(|c| c["method"] == method);
    choices.map(|c| (c["site"].as_str().unwrap(), c["option"].as_str().unwrap())).collect()
}

/// That the plan told what the file takes: every pass told what it saved.
fn assert_reckoned(report: &Value, key: &str, delta: &str) {
    let side = |side: &str| report[side][key].as_i64().unwrap();
    let saved: i64 = report["passes"].as_array().unwrap().iter().map(|p| p[delta].as_i64().unwrap()).sum();
    assert_eq!(side("output") - side("input"), saved, "{}", report["passes"]);
}

#[test]
fn one_plan_merges_tokens_and_leaves_out_units() {
    let bench = bench();
    // Neither fewer tokens alone nor fewer units alone go so far without loss.
    let report = bench.report(&["--flops", "0.45", "--passes", "prune-units,reduce-tokens,factorize"]);
    let (tokens, units) = (got(&report, "reduce-tokens"), got(&report, "prune-units"));
    assert!(tokens.len() == 1 && units.len() == 1, "{}", report["plan"]["choices"]);
    assert_eq!(units[0].1, "leave out");
    assert!(report["verify"]["after"].as_f64().unwrap() < 1e-3, "{}", report["verify"]);
    assert_reckoned(&report, "flops", "flops_delta");
    // Layers in units that stay go on with the rows that are left.
    let choices = report["plan"]["choices"].as_array().unwrap();
    let flops = |site: &str| choices.iter().find(|c| c["site"] == site).map(|c| c["cost"]["flops"].as_u64().unwrap());
    let all = (2 * TOKENS * WIDTH * HIDDEN) as u64;
    assert!(flops("down3").unwrap() < all && flops("down3").unwrap() > all / 4, "{choices:?}");
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.nodes(lathe_ir::ScopeId::MAIN).any(|id| model.graph.node(id).is("ScatterElements")));
    let left = |name: &str| model.graph.find_value(name).is_some();
    assert!(left("down3") && (!left("down2") || !units[0].0.contains('2')));
}

#[test]
fn units_that_must_go_go_where_tokens_merge() {
    let bench = bench();
    let report =
        bench.report(&["--flops", "0.5", "--set", "prune-units.mlp=1", "--passes", "prune-units,reduce-tokens"]);
    assert_eq!(got(&report, "prune-units").len(), 1, "{}", report["plan"]["choices"]);
    assert_eq!(got(&report, "reduce-tokens").len(), 1, "{}", report["plan"]["choices"]);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.find_value("down2").is_none() && model.graph.find_value("down1").is_some());
    assert!(report["verify"]["after"].as_f64().unwrap() < 1e-3, "{}", report["verify"]);
}
