//! `optimize verify A B --seeds N`: two samplers from the same noise.

#![allow(clippy::unwrap_used)]

use lathe_ir::text;
use serde_json::Value;
use std::{fs, path::PathBuf, process::Command};
use tempfile::TempDir;

/// A sampler of images of 12 by 12, whose labels move the sample.
const GRAPH: &str = "g (float[n,1,12,12] noise, int64[n] label) => (float[n,1,12,12] sample) <
    float[3,1] table = {0.3, -0.2, 0.1}, int64[4] shape = {-1, 1, 1, 1}
> {
    row = Gather (table, label)
    cond = Reshape (row, shape)
    moved = Add (noise, cond)
    a = Tanh (moved)
    FACTOR
}";

/// The mean of every quarter of an image: four features.
const FEATURES: &str = "<ir_version: 8, opset_import: [\"\" : 18]>
g (float[n,1,12,12] x) => (float[n,4] features, float[n,1,2,2] maps) <int64[2] shape = {-1, 4}> {
    maps = AveragePool <kernel_shape = [6, 6], strides = [6, 6]> (x)
    features = Reshape (maps, shape)
}";

struct Folder(TempDir);

impl Folder {
    /// Samplers `a.onnx` and `b.onnx`, which end in these lines.
    fn new(a: &str, b: &str) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        for (name, last) in [("a.onnx", a), ("b.onnx", b)] {
            folder.write(name, &GRAPH.replace("FACTOR", last));
        }
        folder.write("features.onnx", FEATURES);
        folder
    }

    fn write(&self, name: &str, graph: &str) {
        fs::write(self.path(name), text::parse(graph).unwrap().to_bytes()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Exit code, standard output and standard error.
    fn verify(&self, options: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        let output = command.current_dir(self.0.path()).args(["verify", "a.onnx", "b.onnx"]).args(options).output();
        let output = output.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, options: &[&str]) -> Value {
        let (code, out, err) = self.verify(&[options, &["--json"]].concat());
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    }
}

const SAME: &str = "sample = Identity (a)";
const SMALLER: &str = "f = Constant <value_float = 0.9> () sample = Mul (a, f)";

#[test]
fn equal_samplers_differ_in_nothing() {
    let found = Folder::new(SAME, SAME).json(&["--seeds", "5", "--max-drop", "0"]);
    assert_eq!((&found["samples"], &found["passed"], &found["drop"]), (&5.into(), &true.into(), &0.0.into()));
    assert_eq!((&found["psnr"]["median"], &found["ssim"]["mean"]), (&Value::Null, &1.0.into()));
    assert_eq!((&found["metric"], &found["features"]), (&"rel-l2".into(), &Value::Null));
}

#[test]
fn distances_are_those_of_pairs_and_of_sets() {
    let folder = Folder::new(SAME, SMALLER);
    let found = folder.json(&["--seeds", "40", "--features", "features.onnx"]);
    let number = |path: &str| found.pointer(path).unwrap().as_f64().unwrap();
    // Every sample is a tenth smaller, whatever the noise.
    assert!((number("/rel_l2/least") - 0.1).abs() < 1e-6 && (number("/rel_l2/most") - 0.1).abs() < 1e-6, "{found}");
    assert!((number("/cosine/mean") - 1.0).abs() < 1e-6);
    assert!((20.0..40.0).contains(&number("/psnr/median")), "{found}");
    assert!((0.9..1.0).contains(&number("/ssim/median")), "{found}");
    assert_eq!(number("/features/width"), 4.0);
    // The network sees smaller numbers in the same direction.
    assert!(number("/features/paired/most") < 1e-9, "{found}");
    assert!(number("/features/fid") >= 0.0 && number("/features/sliced") > 0.0, "{found}");
    // The same samples in whatever batches; another seed draws others.
    assert_eq!(folder.json(&["--seeds", "40", "--features", "features.onnx"]), found);
    let some = folder.json(&["--seeds", "3"]);
    assert_ne!(some["psnr"]["median"], folder.json(&["--seeds", "3", "--seed", "9"])["psnr"]["median"]);
    let (code, out, _) = folder.verify(&["--seeds", "40", "--features", "features.onnx"]);
    assert_eq!(code, Some(0));
    assert!(out.starts_with("40 pairs of samples: a drop of 0.1 by rel-l2 on ONNX Runtime"), "{out}");
    assert!(out.contains("PSNR") && out.contains("between A and B"), "{out}");
}

#[test]
fn a_bound_is_kept_or_refused() {
    let folder = Folder::new(SAME, SMALLER);
    for (options, code) in [
        (&["--max-drop", "0.11"][..], 0),
        (&["--max-drop", "0.09"], 3),
        (&["--metric", "psnr", "--max-drop", "0.1"], 0),
        (&["--metric", "psnr", "--max-drop", "0.001"], 3),
        (&["--metric", "ssim", "--max-drop", "0.1"], 0),
    ] {
        let (found, _, err) = folder.verify(&[&["--seeds", "4"], options].concat());
        assert_eq!(found, Some(code), "{options:?}: {err}");
        assert_eq!(err.contains("is allowed"), code == 3, "{err}");
    }
}

#[test]
fn what_cannot_be_compared_says_why() {
    let folder = Folder::new(SAME, "z = Constant <value_float = 0.0> () sample = Div (a, z)");
    let refused = |folder: &Folder, options: &[&str], code: i32, sentence: &str| {
        let (found, _, err) = folder.verify(options);
        assert_eq!((found, err.contains(sentence)), (Some(code), true), "{err}");
    };
    refused(&folder, &["--seeds", "2"], 3, "sample 0 of B is not finite");
    refused(&folder, &["--seeds", "0"], 2, "expected at least 1");
    refused(&folder, &["--seeds", "3", "--features", "features.onnx"], 2, "expected at least 4");
    refused(&folder, &["--seeds", "3", "--metric", "kl"], 2, "samplers are held to rel-l2, psnr, ssim or action-l2");
    refused(&folder, &["--features", "features.onnx"], 2, "--seeds");
    refused(&folder, &["--seeds", "3", "--bits"], 2, "cannot be used with");
    folder.write("a.onnx", "g (float[n,3] x) => (float[n,3] y) { y = Identity (x) }");
    refused(&folder, &["--seeds", "2"], 2, "`a.onnx` is no sampler");
    let broken = Folder::new("z = Constant <value_float = 0.0> () sample = Div (a, z)", SAME);
    refused(&broken, &["--seeds", "2"], 1, "sample 0 of A is not finite");
    let other = Folder::new(SAME, SAME);
    other.write("b.onnx", "g (float[n,1,4,4] noise) => (float[n,1,4,4] sample) { sample = Identity (noise) }");
    refused(&other, &["--seeds", "2"], 3, "`b.onnx`");
}

#[test]
fn chunks_of_actions_are_held_by_their_range() {
    let folder = Folder::new(SAME, SAME);
    let policy = |last: &str| {
        format!(
            "g (float[n,5,2] noise) => (float[n,5,2] actions) <
                float[2] scale = {{1, 50}}, float[5,1] late = {{0, 0, 0, 0, 0.1}}
            > {{
                unit = Sin (noise)
                wide = Mul (unit, scale)
                {last}
            }}"
        )
    };
    folder.write("a.onnx", &policy("actions = Identity (wide)"));
    let later = "off = Mul (late, scale) actions = Add (wide, off)";
    folder.write("b.onnx", &policy(later));
    let found = folder.json(&["--seeds", "30", "--metric", "action-l2"]);
    let number = |path: &str| found.pointer(path).unwrap().as_f64().unwrap();
    // Both numbers of the last step are a twentieth of their range off, which is nearly 2 and nearly 100; the others are not.
    assert!((number("/actions/worst/mean") - 0.05).abs() < 1e-3, "{found}");
    assert!((number("/actions/chunk/mean") - 0.05 / 5f64.sqrt()).abs() < 1e-3, "{found}");
    assert_eq!(number("/drop"), number("/actions/worst/mean"));
    let (code, said, _) = folder.verify(&["--seeds", "30", "--metric", "action-l2", "--max-drop", "0.04"]);
    assert_eq!(code, Some(3));
    assert!(said.contains("the worst step median 0.05"), "{said}");
    // Images are no actions, and a set is no pair of samplers.
    let images = Folder::new(SAME, SMALLER);
    let refused = |options: &[&str], sentence: &str| {
        let (code, _, said) = images.verify(options);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(sentence), "{said}");
    };
    refused(&["--seeds", "3", "--metric", "action-l2"], "samples are no chunks of actions");
    refused(&["--metric", "action-l2"], "--metric action-l2 is about samplers of actions, with --seeds");
}

#[test]
fn pixels_are_compared_as_numbers_of_both_signs() {
    let folder = Folder::new(SAME, SAME);
    let pipeline = |factor: &str| {
        format!(
            "g (float[n,1,12,12] noise, int64[n,t] input_ids) => (float[n,1,12,12] image) <
                float[1] half = {{0.5}}, float[1] factor = {{{factor}}}
            > {{
                unit = Sin (noise)
                a = Mul (unit, factor)
                b = Mul (a, half)
                image = Add (b, half)
            }}"
        )
    };
    folder.write("a.onnx", &pipeline("1"));
    folder.write("b.onnx", &pipeline("0.9"));
    let found = folder.json(&["--seeds", "6"]);
    let error = found.pointer("/rel_l2/mean").unwrap().as_f64().unwrap();
    assert!((error - 0.1).abs() < 1e-6, "{found}");
}
