//! `--auto`: recipes are tried and measured, the best is written, and later runs start where earlier ones ended.

#![allow(clippy::unwrap_used)]

mod common;

use common::Workbench;
use lathe_ir::{Model, Tensor, text};
use serde_json::Value;
use std::{fs, path::PathBuf};

const WIDTH: usize = 64;

/// Two layers of rank 8 around an activation: most of them can go.
const MODEL: &str = "<ir_version: 10, opset_import: [\"\" : 21]>
g (float[n, 64] x) => (float[n, 64] y) <float[64, 64] a = {}, float[64, 64] b = {}> {
    h = MatMul (x, a) r = Relu (h) z = MatMul (r, b) y = Tanh (z)
}";

/// Numbers in `(-0.5, 0.5)` from a seed.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f32 / (1u64 << 31) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// A matrix of rank 8.
fn thin(seed: u64) -> String {
    let (left, right) = (noise(WIDTH * 8, seed), noise(8 * WIDTH, seed + 1));
    let at = |i: usize, j: usize| (0..8).map(|r| left[i * 8 + r] * right[r * WIDTH + j]).sum::<f32>();
    let numbers = (0..WIDTH * WIDTH).map(|k| format!("{:e}", at(k / WIDTH, k % WIDTH)));
    format!("{{{}}}", numbers.collect::<Vec<_>>().join(", "))
}

fn bench() -> Workbench {
    let source = MODEL.replacen("{}", &thin(1), 1).replacen("{}", &thin(5), 1);
    let fixed = ["--metric", "rel-l2", "--auto", "--minimize", "params", "--calib", "set.npz"];
    let x = Tensor::from_f32s(&[512, WIDTH], &noise(512 * WIDTH, 9));
    Workbench::new(&text::parse(&source).unwrap(), &[("x", x)], &fixed)
}

/// What was tried in a run that must succeed.
fn tried(bench: &Workbench, options: &[&str]) -> Value {
    bench.report(options)["auto"].clone()
}

#[test]
fn the_best_that_the_drop_allows_is_written_and_remembered() {
    let bench = bench();
    let out = bench.path("out.onnx");
    let options = ["--max-drop", "0.01", "--time", "60s", "-o", out.to_str().unwrap()];
    let auto = tried(&bench, &options);
    assert_eq!((auto["measure"].as_str(), auto["limit"].as_f64()), (Some("parameters"), Some(0.01)));
    let points = auto["points"].as_array().unwrap();
    assert_eq!(points[0]["recipe"], "exact passes");
    let number = |point: &Value, key: &str| point[key].as_f64().unwrap_or(f64::INFINITY);
    let chosen: Vec<&Value> = points.iter().filter(|p| p["chosen"] == true).collect();
    let [chosen] = chosen.as_slice() else { panic!("{points:?}") };
    // Of rank 8 of 64, a quarter of the numbers is enough.
    assert!(number(chosen, "ratio") < 0.4 && number(chosen, "drop") <= 0.01, "{points:?}");
    let better = |p: &&Value| number(p, "drop") <= 0.01 && number(p, "ratio") < number(chosen, "ratio");
    assert_eq!(points.iter().filter(better).count(), 0);
    let model = Model::read(&out).unwrap().model;
    model.check().unwrap();
    // The next run begins with what was best.
    let again = tried(&bench, &options);
    assert_eq!(again["points"][1]["recipe"], chosen["recipe"]);
    assert_eq!(again["points"][1]["share"], chosen["share"]);
    // Nothing is left behind but what was asked for.
    let mut names: Vec<String> =
        fs::read_dir(bench.path("")).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["data", "model.onnx", "out.onnx", "report.json", "set.npz"]);
}

#[test]
fn all_that_nothing_beats_goes_to_a_folder() {
    let bench = bench();
    let folder = bench.path("front");
    let auto = tried(&bench, &["--time", "60s", "--pareto", folder.to_str().unwrap()]);
    let points = auto["points"].as_array().unwrap();
    let front: Vec<&Value> = points.iter().filter(|p| p["front"] == true).collect();
    assert!(front.len() > 1 && auto["limit"].is_null(), "{points:?}");
    for point in &front {
        let file = PathBuf::from(point["file"].as_str().unwrap());
        Model::read(&file).unwrap().model.check().unwrap();
        let report: Value = serde_json::from_str(&fs::read_to_string(file.with_extension("json")).unwrap()).unwrap();
        assert_eq!(report["output"]["path"], point["file"]);
    }
    // Every model with its report, and the page that shows them.
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2 * front.len() + 1);
    let page = fs::read_to_string(folder.join("index.html")).unwrap();
    assert_eq!(page.matches("<circle class=\"best\"").count(), front.len());
    assert!(points.iter().all(|p| p["chosen"] == false));
}

#[test]
fn what_makes_no_sense_is_a_matter_of_usage() {
    let bench = bench();
    let out = bench.path("out.onnx");
    let out = out.to_str().unwrap();
    for (options, said) in [
        (&["-o", out][..], "--max-drop"),
        (&["-o", out, "--max-drop", "0.1", "--time", "soon"], "`soon` is no time"),
        (&["-o", out, "--max-drop", "0.1", "--size", "0.5"], "cannot be used with"),
    ] {
        let output = bench.run(options);
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
