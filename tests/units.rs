//! Residual units that go: planted ones are found, gaps are filled, and what cannot go is named.

#![allow(clippy::unwrap_used)]

mod common;

use common::Workbench;
use lathe_ir::{Model, Tensor, text};
use serde_json::Value;
use std::{fs, path::PathBuf, process::Command};

const WIDTH: usize = 64;

/// Six units over a stream of 64 features. The stream lives in the first half, apart from what `m` adds to the second
/// half; `linear` turns that half only; `dead` adds nothing.
const MODEL: &str = "<ir_version: 10, opset_import: [\"\" : 21]>
g (float[n, 8, 64] x) => (float[n, 8, 64] y) <float[64] half = {}, float[64, 64] a1 = {}, float[64, 64] a2 = {},
    float[64, 64] m1 = {}, float[64, 64] m2 = {}, float[64, 64] turn = {}, float[64, 64] d1 = {}, float[64, 64] d2 = {},
    float[64, 64] b1 = {}, float[64, 64] b2 = {}, float[64, 64] c1 = {}, float[64, 64] c2 = {}> {
    s0 = Mul (x, half)
    [\"first/up\"] a = MatMul (s0, a1)
    [\"first/act\"] aa = Relu (a)
    [\"first/down\"] ab = MatMul (aa, a2)
    s1 = Add (s0, ab)
    [\"m/up\"] m = MatMul (s1, m1)
    [\"m/act\"] ma = Relu (m)
    [\"m/down\"] mb = MatMul (ma, m2)
    s2 = Add (s1, mb)
    [\"linear/turn\"] t = MatMul (s2, turn)
    s3 = Add (s2, t)
    [\"dead/up\"] d = MatMul (s3, d1)
    [\"dead/act\"] da = Relu (d)
    [\"dead/down\"] db = MatMul (da, d2)
    s4 = Add (s3, db)
    [\"late/up\"] b = MatMul (s4, b1)
    [\"late/act\"] ba = Relu (b)
    [\"late/down\"] bb = MatMul (ba, b2)
    s5 = Add (s4, bb)
    [\"last/up\"] c = MatMul (s5, c1)
    [\"last/act\"] ca = Relu (c)
    [\"last/down\"] cb = MatMul (ca, c2)
    y = Add (s5, cb)
}";

/// Numbers near a bell curve, from a fixed seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        let mut one = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as f32 / (1u64 << 31) as f32 - 0.5
        };
        (0..6).map(|_| one()).sum()
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn matrix(&mut self, scale: f32, keep: impl Fn(usize, usize) -> bool) -> Vec<f32> {
        let mut numbers = self.numbers(WIDTH * WIDTH);
        for (at, x) in numbers.iter_mut().enumerate() {
            *x = if keep(at / WIDTH, at % WIDTH) { *x * scale } else { 0.0 };
        }
        numbers
    }
}

fn bench() -> Workbench {
    let mut noise = Noise(7);
    let (first, second) = (|column: usize| column < WIDTH / 2, |column: usize| column >= WIDTH / 2);
    let half = (0..WIDTH).map(|i| if first(i) { 1.0 } else { 0.0 }).collect();
    let mut constants: Vec<(&str, Vec<f32>)> = vec![("half", half)];
    constants.push(("a1", noise.matrix(0.2, |_, _| true)));
    constants.push(("a2", noise.matrix(0.2, |_, column| first(column))));
    constants.push(("m1", noise.matrix(0.2, |_, _| true)));
    constants.push(("m2", noise.matrix(0.2, |_, column| second(column))));
    constants.push(("turn", noise.matrix(0.06, |row, column| second(row) && second(column))));
    constants.push(("d1", noise.matrix(0.2, |_, _| true)));
    constants.push(("d2", vec![0.0; WIDTH * WIDTH]));
    for name in ["b1", "b2", "c1", "c2"] {
        constants.push((name, noise.matrix(0.2, |_, _| true)));
    }
    let mut source = MODEL.to_owned();
    for (name, numbers) in constants {
        let numbers: Vec<String> = numbers.iter().map(|x| format!("{x:e}")).collect();
        source = source.replace(&format!(" {name} = {{}}"), &format!(" {name} = {{{}}}", numbers.join(", ")));
    }
    let rows = noise.numbers(256 * 8 * WIDTH);
    let fixed = ["--metric", "rel-l2", "--calib", "set.npz", "--validate", "set.npz", "-o", "out.onnx"];
    let x = Tensor::from_f32s(&[256, 8, WIDTH], &rows);
    Workbench::new(&text::parse(&source).unwrap(), &[("x", x)], &fixed)
}

/// What went, how the gap was filled, and what was lost by measurement.
fn choice(report: &Value) -> (&str, &str, f64) {
    let choices = report["plan"]["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 1, "{choices:?}");
    let choice = &choices[0];
    (choice["site"].as_str().unwrap(), choice["option"].as_str().unwrap(), choice["error"].as_f64().unwrap())
}

#[test]
fn a_unit_that_does_nothing_goes_first() {
    let bench = bench();
    let report = bench.report(&["--set", "prune-units.count=1", "--set", "prune-units.patch=none"]);
    let (site, option, lost) = choice(&report);
    assert_eq!((site, option), ("dead", "leave out"));
    assert!(lost < 1e-12, "{lost}");
    // Bits are the same: what was added is zero.
    assert!(report["verify"]["drop"].as_f64().unwrap() < 1e-6);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.find_value("d1").is_none() && model.graph.find_value("m1").is_some());
    let got: Vec<(&str, usize)> = report["plan"]["units"].as_array().unwrap()[..6]
        .iter()
        .map(|unit| (unit["unit"].as_str().unwrap(), unit["got"].as_array().unwrap().len()))
        .collect();
    assert_eq!(got, [("first", 0), ("m", 0), ("linear", 0), ("dead", 1), ("late", 0), ("last", 0)]);
}

#[test]
fn both_scores_agree_on_what_does_nothing() {
    let bench = bench();
    let options =
        ["--set", "prune-units.count=1", "--set", "prune-units.score=cosine", "--set", "prune-units.patch=none"];
    assert_eq!(choice(&bench.report(&options)).0, "dead");
}

#[test]
fn a_gap_is_filled_exactly_where_it_can_be() {
    let bench = bench();
    let run =
        |patch: &str| bench.report(&["--set", "prune-units.count=2", "--set", &format!("prune-units.patch={patch}")]);
    let bare = run("none");
    let (site, _, lost) = choice(&bare);
    assert!(site.contains("dead") && site.contains("linear") && lost > 1e-4, "{site} {lost}");
    for patch in ["fold", "affine"] {
        let report = run(patch);
        let (_, option, lost) = choice(&report);
        assert_eq!(option, format!("leave out, {patch}"));
        assert!(lost < 1e-6, "{patch}: {lost}");
        assert!(report["verify"]["after"].as_f64().unwrap() < 1e-3, "{}", report["verify"]);
    }
    // A factor per feature helps only a little here.
    assert!(choice(&run("scale")).2 > 1e-6);
    // The change of a layer costs nothing, and nothing is better by more.
    assert_eq!(choice(&run("auto")).1, "leave out, fold");
}

#[test]
fn a_budget_frees_what_lies_inside_a_unit_that_goes() {
    let bench = bench();
    let report = bench.report(&["--size", "0.5", "--passes", "prune-units,quantize"]);
    let choices = report["plan"]["choices"].as_array().unwrap();
    let gone: Vec<&str> =
        choices.iter().filter(|c| c["method"] == "prune-units").map(|c| c["site"].as_str().unwrap()).collect();
    assert_eq!(gone.len(), 1, "{choices:?}");
    assert!(gone[0].contains("dead"));
    // Nothing is told of the weights of a unit that goes.
    assert!(!choices.iter().any(|c| c["site"] == "d1" || c["site"] == "d2"), "{choices:?}");
    assert!(choices.iter().any(|c| c["site"] == "a1"));
    let size = fs::metadata(bench.path("out.onnx")).unwrap().len();
    assert!(size as f64 <= 0.5 * fs::metadata(bench.path("model.onnx")).unwrap().len() as f64);
}

#[test]
fn what_cannot_go_is_told() {
    let bench = bench();
    let output = bench.run(&["--set", "prune-units.count=5"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("`prune-units` cannot do what is asked: 5 units are to go, and 4 can"), "{said}");
    let report = bench.report(&["--set", "prune-units.count=1"]);
    let line = report["passes"].as_array().unwrap().iter().find(|p| p["name"] == "prune-units").unwrap();
    let ends =
        line["refusals"].as_array().unwrap().iter().find(|r| r["reason"].as_str().unwrap().contains("last block"));
    assert_eq!(ends.unwrap()["count"], 2, "{line}");
}

#[test]
fn a_drop_that_is_too_large_is_refused() {
    let bench = bench();
    let options = ["--set", "prune-units.count=2", "--set", "prune-units.patch=none", "--max-drop", "1e-4"];
    let output = bench.run(&options);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!bench.path("out.onnx").exists());
}

/// Prunes the fixture with caches and returns the names of what it reads and gives, and the tokens that it makes with
/// caches and without.
fn decoder(options: &[&str]) -> (Vec<String>, Vec<String>, Value) {
    let folder = tempfile::tempdir().unwrap();
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let (out, report) = (folder.path().join("out.onnx"), folder.path().join("report.json"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env("XDG_DATA_HOME", folder.path());
    command.arg(workspace.join("fixtures/decoder.onnx")).arg("-o").arg(&out).arg("--report").arg(&report);
    let set = workspace.join("fixtures/sets/decoder.npz");
    command.arg("--calib").arg(&set).arg("--validate").arg(&set).args(["--metric", "rel-l2"]).args(options);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let model = Model::read(&out).unwrap().model;
    let main = model.graph.main();
    let name = |v: &lathe_ir::ValueId| model.graph.value(*v).name.clone();
    let names = main.inputs().iter().chain(main.outputs()).map(name).collect();
    let python = workspace.join(".venv/bin/python");
    let python = if python.exists() { python } else { PathBuf::from("python3") };
    let made = Command::new(python).arg(workspace.join("tests/generate.py")).arg(&out).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let lines = String::from_utf8(made.stdout).unwrap().lines().map(str::to_owned).collect();
    let renamed = out.with_file_name("out.onnx.names.json");
    let renamed = fs::read_to_string(renamed).map_or(Value::Null, |text| serde_json::from_str(&text).unwrap());
    (names, lines, renamed)
}

#[test]
fn caches_of_attention_that_goes_go_too_and_the_others_are_numbered_anew() {
    // With both ends free the first layer can go, whose cache tells how long the past is.
    let settings = ["--set", "prune-units.attention=3", "--set", "prune-units.ends=free"];
    let (names, tokens, renamed) = decoder(&settings);
    assert_eq!(
        names,
        ["input_ids", "past_key_values.0.key", "past_key_values.0.value", "logits", "present.0.key", "present.0.value"]
    );
    assert_eq!(tokens[0], tokens[1]);
    let renamed = renamed["renamed"].as_object().unwrap();
    assert_eq!(renamed.len(), 16);
    assert_eq!(renamed.values().filter(|new| new.is_null()).count(), 12);
}

#[test]
fn caches_can_stay_with_zeros_in_them() {
    let settings = ["--set", "prune-units.attention=2", "--set", "prune-units.caches=keep-io"];
    let (names, tokens, renamed) = decoder(&settings);
    assert_eq!(names.len(), 2 + 16);
    assert!(names.contains(&"present.3.value".to_owned()));
    assert_eq!(tokens[0], tokens[1]);
    assert_eq!(renamed, Value::Null);
}

#[test]
fn units_without_caches_leave_them_alone() {
    let (names, tokens, _) = decoder(&["--set", "prune-units.mlp=2"]);
    assert_eq!(names.len(), 2 + 16);
    assert_eq!(tokens[0], tokens[1]);
}
