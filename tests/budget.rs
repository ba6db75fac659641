//! A size budget end to end: met, measured, predicted in bytes, or refused with what can be reached.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, Workbench};
use lathe_ir::{Model, ScopeId, Tensor, text};
use serde_json::Value;
use std::{fs, process::Command};

/// A table of tokens that is also the head, and a unit between; weights are made by [`bench`].
const MODEL: &str = "<ir_version: 10, opset_import: [\"\" : 21]>
g (int64[n, 6] ids) => (float[n, 6, 96] logits) <float[96, 64] table = {}, float[64, 128] up = {}, float[128, 64] down = {}> {
    x = Gather (table, ids)
    h = MatMul (x, up)
    a = Relu (h)
    d = MatMul (a, down)
    y = Add (x, d)
    head = Transpose <perm = [1, 0]> (table)
    logits = MatMul (y, head)
}";

const RUN: [&str; 4] = ["--calib", "set.npz", "-o", "out.onnx"];

fn bench() -> Workbench {
    let mut noise = Noise(5);
    let constants = [("table", [96, 64], 0.5), ("up", [64, 128], 0.2), ("down", [128, 64], 0.2)];
    let mut source = MODEL.to_owned();
    for (name, [rows, columns], scale) in constants {
        let numbers: Vec<String> = noise.numbers(rows * columns, scale).iter().map(|x| format!("{x:e}")).collect();
        source = source.replace(&format!("{name} = {{}}"), &format!("{name} = {{{}}}", numbers.join(", ")));
    }
    let ids: Vec<i64> = (0..64 * 6).map(|_| (noise.next() % 96) as i64).collect();
    Workbench::new(&text::parse(&source).unwrap(), &[("ids", Tensor::from_i64s(&[64, 6], &ids))], &RUN)
}

fn choices(report: &Value) -> Vec<(&str, &str)> {
    let all = report["plan"]["choices"].as_array().unwrap();
    all.iter().map(|c| (c["site"].as_str().unwrap(), c["option"].as_str().unwrap())).collect()
}

#[test]
fn a_size_is_met_and_every_byte_was_reckoned() {
    let bench = bench();
    let report = bench.report(&["--size", "0.4"]);
    let size = fs::metadata(bench.path("out.onnx")).unwrap().len();
    let original = fs::metadata(bench.path("model.onnx")).unwrap().len();
    assert!(size as f64 <= 0.4 * original as f64, "{size} of {original} bytes");
    assert_eq!(report["output"]["file_bytes"], size);
    assert_eq!(report["plan"]["status"], "optimal");
    // What the constants take in the file is what the plan says, but for names and attributes.
    let used = report["plan"]["sites"]["bytes"].as_f64().unwrap();
    let weights = report["output"]["weight_bytes"].as_f64().unwrap();
    assert!((used - weights).abs() < 0.03 * weights, "{used} reckoned, {weights} stored");
    // What the budget says is what was written.
    let row = |report: &Value, key: &str, part: &str| report["plan"]["budget"][key][part].as_f64().unwrap();
    assert_eq!(row(&report, "size", "used"), size as f64);
    assert_eq!(report["plan"]["used"]["size"].as_f64(), Some(size as f64));
    assert!((row(&report, "size", "allowed") - 0.4 * original as f64).abs() < 1e-6);
    assert_eq!(row(&report, "size", "share"), size as f64 / original as f64);
    // The tied table is stored once, for its look-up and its product.
    assert_eq!(choices(&report).iter().filter(|(site, _)| *site == "table").count(), 1);
    assert!(choices(&report).iter().any(|(_, option)| option.starts_with("int")));
    let verify = &report["verify"];
    assert_eq!((verify["set"].as_str(), verify["passed"].as_bool()), (Some("validation"), Some(true)));
    assert!(Model::read(&bench.path("out.onnx")).is_ok());
}

#[test]
fn a_smaller_size_loses_more_and_the_same_run_gives_the_same_bytes() {
    let bench = bench();
    let objective = |size: &str| bench.report(&["--size", size])["plan"]["objective"].as_f64().unwrap();
    let (large, small) = (objective("0.5"), objective("0.22"));
    assert!(0.0 < large && large < small, "{large} and {small}");
    let first = fs::read(bench.path("out.onnx")).unwrap();
    objective("0.22");
    assert_eq!(first, fs::read(bench.path("out.onnx")).unwrap());
}

/// Why a method that was not asked offers nothing.
const UNASKED: &str = "rounding alone keeps to the budget and loses next to nothing; --thorough asks this method too";

#[test]
fn where_rounding_loses_next_to_nothing_others_are_asked_only_if_told() {
    let bench = bench();
    let reasons = |options: &[&str]| -> Vec<String> {
        let report = bench.report(options);
        let pass = report["passes"].as_array().unwrap().iter().find(|p| p["name"] == "dictionary").unwrap().clone();
        pass["refusals"].as_array().unwrap().iter().map(|r| r["reason"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(reasons(&["--size", "0.5"]), [UNASKED]);
    assert!(!reasons(&["--size", "0.5", "--thorough"]).contains(&UNASKED.to_owned()));
    // Where rounding loses more than nobody would notice, all are asked.
    assert!(!reasons(&["--size", "0.16"]).contains(&UNASKED.to_owned()));
}

#[test]
fn how_a_budget_is_spent_needs_one() {
    for flag in ["--thorough", "--allow-slower"] {
        let output = bench().run(&[flag]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(&format!("{flag} says how a budget is spent, and none is given")), "{message}");
    }
}

#[test]
fn plain_alternatives_stand_beside_the_plan() {
    let report = bench().report(&["--size", "0.4"]);
    let objective = report["plan"]["objective"].as_f64().unwrap();
    let rows = report["plan"]["alternatives"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
    let (int4, halves) = (row("int4 of block 32, rounded to nearest"), row("weights in float16"));
    assert_eq!((int4["keeps"].as_bool(), halves["keeps"].as_bool()), (Some(true), Some(false)), "{rows:?}");
    assert!(int4["loses"].as_f64().unwrap() > objective && halves["loses"].as_f64().unwrap() < objective, "{rows:?}");
    let takes = |row: &Value| row["takes"]["size"].as_f64().unwrap();
    assert!((0.14..0.2).contains(&takes(int4)) && (0.5..0.55).contains(&takes(halves)), "{rows:?}");
}

#[test]
fn the_whole_size_changes_no_weight() {
    let report = bench().report(&["--size", "1"]);
    assert!(choices(&report).iter().all(|(_, option)| *option == "as it is"));
    assert_eq!(report["plan"]["objective"], 0.0);
}

#[test]
fn what_cannot_be_reached_is_refused_with_what_can() {
    let bench = bench();
    let output = bench.run(&["--size", "0.05"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(message.contains("of the original's size is asked for, and 0.147 is the least"), "{message}");
    let output = bench.run(&["--size", "0.2", "--metric", "rel-l2", "--max-drop", "1e-9"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(message.contains("where 1.00e-9 is allowed; --size "), "{message}");
    let output = bench.run(&["--size", "0.2", "--metric", "rel-l2", "--max-drop", "0.02"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{message}");
    // What the refusal proposes works.
    let share = message.split("--size ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let report = bench.report(&["--size", &share, "--metric", "rel-l2", "--max-drop", "0.02"]);
    assert_eq!(report["verify"]["passed"], true);
    fs::remove_file(bench.path("out.onnx")).unwrap();
    assert!(!bench.path("out.onnx").exists());
}

#[test]
fn where_nothing_is_offered_methods_say_why() {
    let bench = bench();
    let mut model = Model::read(&bench.path("model.onnx")).unwrap().model;
    model.opsets = vec![(String::new(), 18)];
    fs::write(bench.path("model.onnx"), model.to_bytes()).unwrap();
    let output = bench.run(&["--size", "0.5", "--passes", "quantize"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(message.contains("is the least; no method handles "), "{message}");
    let expected = "; quantize: blocked DequantizeLinear needs operator set 21; --opset 21 upgrades";
    assert!(message.contains(expected), "{message}");
    // Methods that could not have helped have nothing to say.
    let output = bench.run(&["--flops", "0.1", "--passes", "quantize,prune-channels"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(3) && !message.contains("quantize:"), "{message}");
}

#[test]
fn methods_see_the_samples_that_were_chosen() {
    let bench = bench();
    let objective = |options: &[&str]| bench.report(options)["plan"]["objective"].as_f64().unwrap();
    let (all, few) = (objective(&["--size", "0.3"]), objective(&["--size", "0.3", "--calib-select", "4"]));
    assert!(all != few, "{all} either way");
}

#[test]
fn works_without_a_data_folder() {
    let bench = bench();
    let set = bench.path("set.npz");
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command
        .env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path)
        .env_remove("XDG_DATA_HOME")
        .env_remove("HOME");
    command.arg(bench.path("model.onnx")).arg("-o").arg(bench.path("out.onnx"));
    let output = command.args(["--size", "0.3", "--calib", set.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn kernels_get_a_scale_per_channel() {
    let mut noise = Noise(9);
    let numbers = |numbers: Vec<f32>| numbers.iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ");
    let kernel = numbers(noise.numbers(64 * 8 * 9, 0.2));
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 21]>
        g (float[n, 8, 7, 7] x) => (float[n, 64, 4, 4] y) <float[64, 8, 3, 3] w = {{{kernel}}}> {{
            y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)
        }}"
    );
    let x = Tensor::from_f32s(&[16, 8, 7, 7], &noise.numbers(16 * 8 * 49, 1.0));
    let bench = Workbench::new(&text::parse(&source).unwrap(), &[("x", x)], &RUN);
    let report = bench.report(&["--size", "0.35", "--metric", "rel-l2", "--max-drop", "0.02"]);
    assert_eq!(choices(&report), [("w", "int8 per channel")]);
    // One layer is the whole model: its predicted error is the measured one.
    let (predicted, measured) =
        (report["plan"]["objective"].as_f64().unwrap(), report["verify"]["after"].as_f64().unwrap());
    assert!((predicted.sqrt() / measured - 1.0).abs() < 0.1, "{} predicted, {measured} measured", predicted.sqrt());
    // The summary says so of an error as of any metric.
    let shown = bench.run(&["--size", "0.35", "--metric", "rel-l2", "--max-drop", "0.02", "--dry-run"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("measured on ") && shown.contains(": rel-l2 0 before, "), "{shown}");
}

#[test]
fn a_budget_needs_samples() {
    let model = Model::read(&bench().path("model.onnx")).unwrap().model;
    let output = Workbench::new(&model, &[], &["-o", "out.onnx"]).run(&["--size", "0.5"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--calib names a set"));
}

/// Every method by itself, and what the plan says about the file.
#[test]
fn each_method_keeps_to_its_budget() {
    for (method, option, share, prefix) in [
        ("factorize", "--params", 0.8, "rank "),
        ("factorize", "--flops", 0.85, "rank "),
        ("dictionary", "--params", 0.85, "dictionary "),
        ("dictionary", "--size", 0.9, "dictionary "),
        ("prune-channels", "--params", 0.85, "keep "),
        ("prune-channels", "--flops", 0.8, "keep "),
        ("compensate", "--size", 0.75, "int4 block 128 + rank "),
        ("convert-floats", "--size", 0.55, "float16"),
    ] {
        let bench = bench();
        let report = bench.report(&["--passes", method, option, &share.to_string()]);
        let chosen = choices(&report);
        assert!(chosen.iter().any(|(_, option)| option.starts_with(prefix)), "{method} {option}: {chosen:?}");
        let key = match option {
            "--params" => "parameters",
            "--flops" => "flops",
            _ => "file_bytes",
        };
        let figure = |side: &str| report[side][key].as_f64().unwrap();
        assert!(figure("output") <= share * figure("input"), "{method} {option}");
        assert!(report["verify"]["drop"].as_f64().unwrap() < 1.0, "{}", report["verify"]);
        assert_eq!(report["plan"]["status"], "optimal");
    }
}

#[test]
fn under_target_ort_one_table_serves_look_ups_and_the_head() {
    let bench = bench();
    let portable = bench.report(&["--size", "0.4", "--passes", "quantize"]);
    let own = bench.report(&["--size", "0.4", "--passes", "quantize", "--target", "ort"]);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    let nodes: Vec<_> = model.graph.nodes(ScopeId::MAIN).map(|id| model.graph.node(id).op_type.clone()).collect();
    assert!(nodes.iter().any(|op| op == "GatherBlockQuantized"), "{nodes:?}");
    assert!(nodes.iter().any(|op| op == "MatMulNBits"), "{nodes:?}");
    assert!(!nodes.iter().any(|op| op == "DequantizeLinear"), "{nodes:?}");
    assert_eq!(choices(&portable), choices(&own));
    let drop = |report: &Value| report["verify"]["drop"].as_f64().unwrap();
    // Measured as deployed: the kernels of ONNX Runtime's own operators round what they read to fewer bits.
    let (portable, own) = (drop(&portable), drop(&own));
    assert!(own < 2.5 * portable.max(0.0) + 1e-3 && own < 0.01, "{portable} {own}");
}

#[test]
fn only_methods_that_share_the_budget_upgrade_the_model() {
    let bench = bench();
    let mut model = Model::read(&bench.path("model.onnx")).unwrap().model;
    model.opsets = vec![(String::new(), 18)];
    fs::write(bench.path("model.onnx"), model.to_bytes()).unwrap();
    let opset_and_warnings = |options: &[&str]| {
        let report = bench.report(options);
        (report["output"]["opset"].as_i64().unwrap(), report["warnings"].to_string())
    };
    let (opset, warnings) = opset_and_warnings(&["--size", "0.6", "--skip", "quantize,compensate"]);
    assert!(opset == 18 && !warnings.contains("upgraded"), "{opset}: {warnings}");
    let (opset, warnings) = opset_and_warnings(&["--size", "0.3", "--overwrite"]);
    assert!(opset == 21 && warnings.contains("from operator set 18 to 21, which `quantize` writes"), "{warnings}");
}

#[test]
fn methods_that_nothing_is_taken_of_are_told() {
    let report = bench().report(&["--size", "0.6"]);
    let passes = report["passes"].as_array().unwrap();
    let told: Vec<&Value> =
        passes.iter().filter(|p| p["refusals"].to_string().contains("less loss without it")).collect();
    assert!(!told.is_empty(), "{passes:?}");
    for pass in told {
        assert_eq!(pass["changes"], 0, "{pass}");
    }
}

#[test]
fn several_budgets_are_kept_together() {
    let report = bench().report(&["--size", "0.5", "--params", "0.9", "--flops", "0.95"]);
    assert_eq!(report["plan"]["solver"], "ilp");
    let figure = |value: &Value| value.as_f64().unwrap();
    for (key, name, limit) in [("file_bytes", "size", 0.5), ("parameters", "parameters", 0.9), ("flops", "flops", 0.95)]
    {
        let (used, original) = (figure(&report["output"][key]), figure(&report["input"][key]));
        assert!(used <= limit * original, "{key}");
        let row = ["limit", "allowed", "used", "share"].map(|part| figure(&report["plan"]["budget"][name][part]));
        assert_eq!((row[0], row[2], row[3]), (limit, used, used / original), "{name}");
        assert!((row[1] - limit * original).abs() < 1e-6 * original, "{name}");
        assert_eq!(figure(&report["plan"]["used"][name]), used, "{name}");
    }
}

#[test]
fn a_latency_that_is_not_reached_is_refused_with_what_is() {
    let bench = bench();
    let output = bench.run(&["--latency", "0.02"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(message.contains("0.020 of the original's latency is asked for"), "{message}");
}

#[test]
fn the_least_size_within_a_drop_is_found() {
    let report = bench().report(&["--max-drop", "0.2", "--metric", "rel-l2", "--minimize", "size"]);
    assert!(report["verify"]["passed"].as_bool().unwrap());
    let share = report["output"]["file_bytes"].as_f64().unwrap() / report["input"]["file_bytes"].as_f64().unwrap();
    assert!(share < 0.35, "{share}");
}

/// Two residual blocks, the second of which reads what the first has become.
#[test]
fn block_by_block_each_block_is_fitted_to_what_it_reads_by_then() {
    let mut noise = Noise(11);
    let mut list =
        |count: usize| noise.numbers(count, 0.3).iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ");
    let block = |at: usize| {
        format!(
            "h{at} = MatMul (s{at}, up{at}) a{at} = Tanh (h{at}) d{at} = MatMul (a{at}, down{at}) s{} = Add (s{at}, d{at})",
            at + 1
        )
    };
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 64] x) => (float[n, 64] y) \
         <float[64, 128] up0 = {{{}}}, float[128, 64] down0 = {{{}}}, float[64, 128] up1 = {{{}}}, float[128, 64] down1 = {{{}}}> \
         {{ s0 = Tanh (x) {} {} y = Tanh (s2) }}",
        list(64 * 128),
        list(64 * 128),
        list(64 * 128),
        list(64 * 128),
        block(0),
        block(1)
    );
    let x = Tensor::from_f32s(&[512, 64], &noise.numbers(512 * 64, 2.0));
    let bench = Workbench::new(&text::parse(&source).unwrap(), &[("x", x)], &RUN);
    let run = |options: &[&str]| {
        let fixed = ["--passes", "factorize", "--params", "0.6", "--metric", "rel-l2"];
        let report = bench.report(&[&fixed, options].concat());
        (
            report["plan"]["objective"].clone(),
            report["verify"]["drop"].as_f64().unwrap(),
            fs::read(bench.path("out.onnx")).unwrap(),
        )
    };
    let once = run(&[]);
    let again = run(&["--set", "factorize.sequential=block"]);
    assert_eq!(once.0, again.0, "the plan is the same");
    assert!(once.2 != again.2 && again.1 < 1.1 * once.1, "{} at once, {} block by block", once.1, again.1);
    let output = bench.run(&["--params", "0.6", "--set", "factorize.sequential=row"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected none or block"));
}

/// A gated unit and a layer of two halves, on rows of one sample each.
fn gated() -> Model {
    let mut noise = Noise(21);
    let mut list = |count: usize, scale: f32| noise.list(count, scale);
    let source = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 64] x) => (float[n, 64] y) \
         <float[64] g1 = {{{}}}, float[64] b1 = {{{}}}, float[64, 128] w1 = {{{}}}, float[64, 128] w2 = {{{}}}, \
         float[128, 64] w3 = {{{}}}, float[64, 96] w4 = {{{}}}, int64[2] halves = {{48, 48}}, float[96, 64] w5 = {{{}}}> \
         {{ n = LayerNormalization (x, g1, b1) a = MatMul (n, w1) b = MatMul (n, w2) s = Sigmoid (b) p = Mul (a, s) \
            c = MatMul (p, w3) r = Add (x, c) d = MatMul (r, w4) u, v = Split <axis = 1> (d, halves) u2 = Relu (u) \
            v2 = Tanh (v) k = Concat <axis = 1> (v2, u2) y0 = MatMul (k, w5) y = Add (r, y0) }}",
        list(64, 1.0),
        list(64, 1.0),
        list(64 * 128, 0.18),
        list(64 * 128, 0.18),
        list(128 * 64, 0.13),
        list(64 * 96, 0.18),
        list(96 * 64, 0.15)
    );
    text::parse(&source).unwrap()
}

/// With fewer rows than hidden units, a fit to them loses nothing of them and much of others.
#[test]
fn a_looser_budget_is_not_worse_however_few_samples_there_are() {
    for samples in [20, 48] {
        let x = Tensor::from_f32s(&[samples, 64], &Noise(22).numbers(samples * 64, 1.4));
        let bench = Bench::new(gated(), x);
        let drop =
            |share: &str| bench.0.report(&["--size", share, "--metric", "rel-l2"])["verify"]["drop"].as_f64().unwrap();
        let losses: Vec<f64> = ["0.3", "0.4", "0.6"].into_iter().map(drop).collect();
        assert!(losses.iter().all(|&loss| loss < 0.1), "{samples} samples: {losses:?}");
        assert!(losses.windows(2).all(|pair| pair[1] < 1.1 * pair[0]), "{samples} samples: {losses:?}");
    }
}

struct Bench(Workbench);

impl Bench {
    fn new(model: Model, x: Tensor) -> Bench {
        Bench(Workbench::new(&model, &[("x", x)], &RUN))
    }

    /// A wave of one layer, of which errors that are a thousandth leave nothing, beside another layer.
    fn wave() -> Bench {
        let mut noise = Noise(31);
        let a = noise.list(64 * 64, 0.2);
        // What is never active stretches the scales of blocks.
        let mut b = noise.numbers(64 * 96, 0.2);
        for row in [31, 63] {
            b[row * 96..(row + 1) * 96].iter_mut().for_each(|w| *w = 4.0);
        }
        let b: Vec<String> = b.iter().map(|w| format!("{w:e}")).collect();
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 64] x) => (float[n, 160] y) \
             <float[64, 64] a = {{{a}}}, float[64, 96] b = {{{}}}, float fast = {{2e4}}, float low = {{0.3}}> \
             {{ h = MatMul (x, a) p = Mul (h, fast) q = Sin (p) s = Mul (q, low) d = MatMul (x, b) t = Tanh (d) \
                y = Concat <axis = 1> (s, t) }}",
            b.join(", ")
        );
        let mut x = noise.numbers(96 * 64, 1.0);
        x.chunks_mut(64).for_each(|row| (row[31], row[63]) = (0.0, 0.0));
        Bench::new(text::parse(&source).unwrap(), Tensor::from_f32s(&[96, 64], &x))
    }
}

#[test]
fn a_plan_that_loses_far_more_than_predicted_gives_way_to_a_tighter_one() {
    let Bench(bench) = Bench::wave();
    let run = |share: &str| {
        let report = bench.report(&["--size", share, "--metric", "rel-l2", "--passes", "quantize"]);
        let kept: Vec<String> =
            choices(&report).into_iter().filter(|c| c.1 == "as it is").map(|c| c.0.to_owned()).collect();
        (kept, report["warnings"].to_string(), report["verify"]["drop"].as_f64().unwrap())
    };
    let (kept, warnings, drop) = run("0.75");
    assert!(warnings.contains("far more than was predicted; a tighter one that loses"), "{warnings}");
    assert!(kept == ["a"] && drop < 0.1, "{kept:?} {drop}");
    // Where the wave has to go, that is said.
    let (_, warnings, drop) = run("0.35");
    assert!(drop > 0.2 && warnings.contains("on calibration samples, where a relative L2 error of"), "{warnings}");
}

#[test]
fn the_operator_set_stays_where_nothing_newer_is_written() {
    let x = Tensor::from_f32s(&[64, 64], &Noise(23).numbers(64 * 64, 1.4));
    let Bench(bench) = Bench::new(gated(), x);
    let run = |options: &[&str]| {
        let report = bench.report(options);
        (report["output"]["opset"].as_i64().unwrap(), report["warnings"].to_string().contains("upgraded"))
    };
    for budget in [
        &["--flops", "0.8"][..],
        &["--params", "0.8"],
        &["--size", "1"],
        &["--flops", "0.8", "--skip", "quantize"],
        &["--params", "0.8", "--size", "0.5", "--skip", "quantize"],
        &["--size", "0.6", "--passes", "convert-floats"],
    ] {
        assert_eq!(run(budget), (17, false), "{budget:?}");
    }
    assert_eq!(run(&["--size", "0.3"]), (21, true));
    assert_eq!(run(&["--size", "1", "--opset", "19"]).0, 19, "what is asked for is done");
}
