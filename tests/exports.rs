//! What exporters write that people do not: sizes named by digits or counted, masks that hide nothing.

#![allow(clippy::unwrap_used)]

mod common;

use common::operators;
use lathe_ir::{Model, text};
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};
use tempfile::TempDir;

fn program(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path);
    command.args(arguments).output().unwrap()
}

/// Writes the model that `graph` is the text of.
fn written(graph: &str) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    fs::write(&path, text::parse(graph).unwrap().to_bytes()).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

/// Optimizes `graph`, with verification.
fn optimized(graph: &str, options: &[&str]) -> Model {
    let (folder, path) = written(graph);
    let out = folder.path().join("out.onnx");
    let output = program(&[&[path.as_str(), "-o", out.to_str().unwrap()], options].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Model::read(Path::new(&out)).unwrap().model
}

fn inspected(graph: &str) -> String {
    let (_folder, path) = written(graph);
    String::from_utf8(program(&["inspect", &path]).stdout).unwrap()
}

/// Patches of an image whose sizes are written as names, as transformers' exporter does.
fn patches(dims: &str, position: &str) -> String {
    let numbers = |count: usize| vec!["0.5"; count].join(", ");
    format!(
        "<ir_version: 10, opset_import: [\"\" : 20]>
        g (float[{dims}] x) => (float[batch,{position},8] y)
        <float[8,3,8,8] w = {{{}}}, float[1,16,8] p = {{{}}}, int64[3] to = {{-1, 8, 16}}> {{
            c = Conv <kernel_shape = [8, 8], strides = [8, 8]> (x, w)
            r = Reshape (c, to)
            t = Transpose <perm = [0, 2, 1]> (r)
            y = Add (t, p)
        }}",
        numbers(8 * 3 * 64),
        numbers(16 * 8)
    )
}

#[test]
fn sizes_named_by_digits_are_numbers_and_stay_names_in_the_file() {
    for (dims, position) in
        [(r#"s99,"3","32","32""#, r#""16""#), (r#""2","3",32,"32""#, "16"), (r#"s99,"03","32","0032""#, r#""016""#)]
    {
        let graph = patches(dims, position);
        let model = optimized(&graph, &[]);
        let original = text::parse(&graph).unwrap();
        let interface = |m: &Model| {
            let main = m.graph.main();
            let values = main.inputs().iter().chain(main.outputs());
            values.map(|&v| (m.graph.value(v).name.clone(), m.graph.value(v).ty.clone())).collect::<Vec<_>>()
        };
        assert_eq!(interface(&model), interface(&original));
    }
    let found = inspected(&patches(r#"s99,"3","32","32""#, r#""16""#));
    assert!(found.contains("x  float[s99, 3, 32, 32]") && found.contains("y  float[s99, 16, 8]"), "{found}");
}

#[test]
fn a_batch_by_any_name_counts_once() {
    for name in ["batch", "s33", "unk__214", "?", "\"axis 0\""] {
        let weights = vec!["0.5"; 8 * 3 * 9].join(", ");
        let graph = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[{name},3,64,64] x) => (float[{name},8,64,64] y) <float[8,3,3,3] w = {{{weights}}}> {{
                y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
            }}"
        );
        let found = inspected(&graph);
        assert!(found.contains(" 1,769,472 (open batch sizes as 1"), "{name}: {found}");
    }
}

#[test]
fn sizes_are_printed_as_people_write_them() {
    let found = inspected(
        "<ir_version: 8, opset_import: [\"\" : 17]>
        g (float[batch,3,h,?] x, float[batch,seq,4] k, int64[2] to) => (float a, float b, float c, float d)
        <float[8,3,1,1] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> {
            a = Conv <strides = [16, 16]> (x, w)
            b = Concat <axis = 1> (k, k)
            one = Constant <value_float = 1.0> ()
            e = Expand (one, to)
            c = Identity (e)
            n = NonZero (x)
            d = Cast <to = 1> (n)
        }",
    );
    for line in [
        "x  float[batch, 3, h, ?]",
        "a  float[batch, 8, ceil(h/16), ceil(x.shape[3]/16)]",
        "b  float[batch, 2*seq, 4]",
        "c  float[?, ?]",
        "d  float[4, ?]",
    ] {
        assert!(found.contains(line), "{line} in {found}");
    }
}

/// A mask of padding beside a comparison of positions that is true everywhere.
fn masked(comparison: &str, join: &str) -> String {
    format!(
        "<ir_version: 9, opset_import: [\"\" : 17]>
        g (float[B,4,S,S] s, bool[B,1,1,S] m) => (float[B,4,S,S] y) <
            int64[1] front = {{0}}, int64 zero = {{0}}, int64 one = {{1}}, int64[3] axes = {{0, 1, 3}}, float none = {{0}}, float low = {{-3.4e38}}
        > {{
            sh = Shape <start = 3, end = 4> (s)
            n = Squeeze (sh, front)
            r = Range (zero, n, one)
            q = Unsqueeze (r, axes)
            c = {comparison}
            k = {join}
            w = Where (k, none, low)
            t = Add (s, w)
            y = Softmax <axis = -1> (t)
        }}"
    )
}

#[test]
fn a_mask_that_hides_nothing_goes() {
    let left = ["Add", "Softmax", "Where"];
    for (comparison, join) in
        [("GreaterOrEqual (q, zero)", "And (c, m)"), ("Less (q, n)", "And (m, c)"), ("Greater (zero, q)", "Or (c, m)")]
    {
        let model = optimized(&masked(comparison, join), &[]);
        let found: Vec<String> = operators(&model).into_keys().collect();
        assert_eq!(found, left, "{comparison}");
    }
    // One position is hidden: the mask stays.
    let model = optimized(&masked("Greater (q, zero)", "And (c, m)"), &[]);
    assert!(operators(&model).contains_key("And"));
}
