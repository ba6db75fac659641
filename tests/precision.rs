//! Half precision from the command line: what is written, what is said, and how a run ends.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, Workbench};
use lathe_ir::{DataType, Model, Tensor, Type, text};
use std::process::Output;

/// Three layers and what `head` makes of them.
fn model(opset: i64, head: &str) -> Model {
    let numbers = Noise(7).list(64 * 64, 0.2);
    text::parse(&format!(
        "<ir_version: 10, opset_import: [\"\" : {opset}]> g (float[n, 64] x) => (float[n, 64] y) \
         <float[64, 64] w = {{{numbers}}}, float k = {{300}}, float l = {{0.01}}> \
         {{ a = MatMul (x, w) b = Relu (a) c = MatMul (b, w) {head} }}"
    ))
    .unwrap()
}

fn bench(model: &Model) -> Workbench {
    let samples = Tensor::from_f32s(&[16, 64], &Noise(3).numbers(16 * 64, 1.0));
    Workbench::new(model, &[("x", samples)], &[])
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn types(bench: &Workbench, name: &str) -> Vec<Option<DataType>> {
    let model = Model::read(&bench.path(name)).unwrap().model;
    let main = model.graph.main();
    main.inputs().iter().chain(main.outputs()).map(|&v| model.graph.value(v).ty.as_ref().and_then(Type::elem)).collect()
}

#[test]
fn a_result_is_simulated_and_loaded_and_says_so() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16"]);
    let precision = &report["precision"];
    assert_eq!(precision["dtype"], "float16");
    assert_eq!((&precision["nodes"], &precision["casts"]), (&4.into(), &2.into()));
    assert_eq!(precision["ranges"], "not proven");
    assert!(precision["loaded"].as_str().unwrap().contains("ONNX Runtime"));
    let error = precision["simulated_error"].as_f64().unwrap();
    assert!(error > 1e-5 && error < 2e-3, "{error}");
    assert!(report["verify"]["runtime"].as_str().unwrap().contains("float16 simulated in float32"));
    assert_eq!(report["verify"]["limit"], 2e-3);
    assert_eq!(types(&bench, "half.onnx"), [Some(DataType::Float); 2]);
    let size = |side: &str| report[side]["file_bytes"].as_f64().unwrap();
    assert!(size("output") < 0.55 * size("input"));
}

#[test]
fn ranges_are_those_of_a_set() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let output = bench.run(&["-o", "half.onnx", "--dtype", "float16", "--calib", "set.npz"]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("ranges proven on the calibration set"), "{}", said(&output));
    let output = bench.run(&["-o", "half.onnx", "--dtype", "float16"]);
    assert!(said(&output).contains("range not proven"), "{}", said(&output));
}

#[test]
fn inputs_and_outputs_change_with_io() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16:io"]);
    assert_eq!(types(&bench, "half.onnx"), [Some(DataType::Float16); 2]);
    assert_eq!(report["precision"]["casts"], 0);
    let output = bench.run(&["-o", "other.onnx", "--dtype", "float16:io", "--bench"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn bfloat16_is_simulated_and_not_loaded_where_nothing_runs_it() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let report = bench.report(&["-o", "half.onnx", "--dtype", "bfloat16"]);
    assert_eq!(report["precision"]["dtype"], "bfloat16");
    assert_eq!(report["verify"]["limit"], 2e-2);
    assert!(report["precision"]["simulated_error"].as_f64().unwrap() > 1e-3);
    bench.put(&model(12, "y = MatMul (c, w)"), &[]);
    let output = bench.run(&["-o", "old.onnx", "--dtype", "bfloat16"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("bfloat16 needs operator set 13, and the model has 12; --opset 13 upgrades"));
}

/// The difference of two nearly equal numbers has lost its digits.
#[test]
fn a_node_whose_error_jumps_is_kept_in_float32() {
    let head = "d = Add (c, k) e = Sub (d, k) f = Mul (e, l) y = MatMul (f, w)";
    let bench = bench(&model(17, head));
    let passes = ["--passes", "drop-dead"];
    let report = bench.report(&[&["-o", "half.onnx", "--dtype", "float16"], &passes[..]].concat());
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("kept in float32 because the simulation's error is"), "{warnings}");
    assert!(report["precision"]["simulated_error"].as_f64().unwrap() < 2e-3);
    let kept = report["precision"]["kept"].to_string();
    assert!(kept.contains("the simulation's error"), "{kept}");
}

#[test]
fn a_tolerance_that_cannot_be_kept_to_is_refused() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let output = bench.run(&["-o", "half.onnx", "--dtype", "float16", "--rtol", "1e-9"]);
    assert_eq!((output.status.code(), bench.path("half.onnx").exists()), (Some(3), false), "{}", said(&output));
    assert!(said(&output).contains("nothing can be float16 within a relative error of 1e-9"), "{}", said(&output));
}

#[test]
fn what_does_not_go_together_is_one_sentence() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    for (options, expected) in [
        (
            &["--dtype", "float16:io", "--latency", "0.5", "--calib", "set.npz"][..],
            "--latency runs both models on the same inputs, whose types :io changes",
        ),
        (&["--dtype", "float32"], "expected float16, bfloat16, float16:io or bfloat16:io"),
        (&["--dtype", "float16", "--rtol=-1"], "--rtol is a relative error"),
        (&["--dtype", "float16", "--auto", "--calib", "set.npz"], "run --dtype on its result"),
        (&["--rtol", "0.1"], "--dtype"),
    ] {
        let output = bench.run(&[&["-o", "half.onnx"], options].concat());
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
    }
}

/// Three layers that can each be written in other numbers.
fn layers() -> Model {
    let mut noise = Noise(7);
    let weights: Vec<String> = ["a", "b", "c"]
        .iter()
        .map(|name| format!("float[64, 64] w{name} = {{{}}}", noise.list(64 * 64, 0.2)))
        .collect();
    text::parse(&format!(
        "<ir_version: 10, opset_import: [\"\" : 17]> g (float[n, 64] x) => (float[n, 64] y) <{}> \
         {{ a = MatMul (x, wa) b = Relu (a) c = MatMul (b, wb) d = Relu (c) y = MatMul (d, wc) }}",
        weights.join(", ")
    ))
    .unwrap()
}

#[test]
fn a_budget_is_kept_by_the_file_in_half_precision() {
    let bench = bench(&layers());
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16", "--size", "0.3", "--calib", "set.npz"]);
    let size = |report: &serde_json::Value, side: &str| report[side]["file_bytes"].as_f64().unwrap();
    assert!(size(&report, "output") <= 0.3 * size(&report, "input"));
    assert_eq!(size(&report, "output"), std::fs::metadata(bench.path("half.onnx")).unwrap().len() as f64);
    let used = report["plan"]["budget"]["size"]["used"].as_f64().unwrap();
    assert_eq!(used, size(&report, "output"));
    let precision = &report["precision"];
    assert!(precision["nodes"].as_u64().unwrap() >= 5 && precision["loaded"].is_string(), "{precision}");
    let simulated = precision["simulated_error"].as_f64().unwrap();
    assert!(simulated > 0.0 && simulated < 2e-3, "{simulated}");
    let runtime = report["verify"]["runtime"].as_str().unwrap();
    assert!(runtime.contains("float16 simulated in float32"), "{runtime}");
    let model = Model::read(&bench.path("half.onnx")).unwrap().model;
    let graph = &model.graph;
    let restored = graph.all_nodes().into_iter().filter(|&id| graph.node(id).is("DequantizeLinear"));
    let scales: Vec<DataType> =
        restored.map(|id| graph.constant(graph.node(id).input(1).unwrap()).unwrap().dtype()).collect();
    assert!(!scales.is_empty() && scales.iter().all(|&dtype| dtype == DataType::Float16), "{scales:?}");
    let codes = graph.initializers(lathe_ir::ScopeId::MAIN).filter_map(|value| graph.constant(value));
    assert!(codes.into_iter().any(|tensor| matches!(tensor.dtype(), DataType::Int4 | DataType::Int8)));
}

/// What is not quantized takes 2 bytes a number in the file, and so it is priced: one layer of three is quantized.
#[test]
fn floats_that_stay_count_two_bytes() {
    let bench = bench(&layers());
    let report = bench.report(&["-o", "out.onnx", "--size", "0.45", "--calib", "set.npz", "--dtype", "float16"]);
    let size = |side: &str| report[side]["file_bytes"].as_f64().unwrap();
    assert!(size("output") <= 0.45 * size("input"));
    let choices = report["plan"]["choices"].as_array().unwrap();
    let (stay, change): (Vec<_>, Vec<_>) = choices.iter().partition(|choice| choice["option"] == "as it is");
    assert_eq!((stay.len(), change.len()), (2, 1), "{choices:?}");
    for choice in stay {
        assert_eq!(choice["cost"]["bytes"].as_u64(), Some(2 * 64 * 64));
    }
}

/// The rounding of half precision counts against the drop that is allowed: a processor alone would not see it.
#[test]
fn the_drop_is_that_of_the_simulation() {
    let bench = bench(&layers());
    let lost = |dtype: &str| {
        let options = ["--size", "0.3", "--calib", "set.npz", "-o", "out.onnx", "--dtype", dtype, "--opset", "21"];
        bench.report(&options)["verify"]["drop"].as_f64().unwrap()
    };
    let (fine, coarse) = (lost("float16"), lost("bfloat16"));
    assert!(coarse > fine, "{fine} {coarse}");
    let refused = ["--size", "0.3", "--calib", "set.npz", "-o", "no.onnx", "--dtype", "bfloat16", "--max-drop", "1e-6"];
    let output = bench.run(&[&refused[..], &["--time", "0s"]].concat());
    assert_eq!((output.status.code(), bench.path("no.onnx").exists()), (Some(3), false), "{}", said(&output));
}

#[test]
fn what_is_around_pairs_of_a_quantized_model_converts() {
    let numbers = Noise(7).list(64 * 64, 0.2);
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 64] x) => (float[n, 64] y) \
         <float[64, 64] w = {{{numbers}}}, float s = {{0.01}}, int8 z = {{0}}> \
         {{ a = MatMul (x, w) b = Relu (a) q = QuantizeLinear (b, s, z) d = DequantizeLinear (q, s, z) [first] c = MatMul (d, w) \
         e = MatMul (c, w) y = Relu (e) }}"
    );
    let bench = bench(&text::parse(&source).unwrap());
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16"]);
    let precision = &report["precision"];
    assert!(precision["nodes"].as_u64().unwrap() >= 2, "{precision}");
    assert_eq!(precision["limit"], 2e-2);
    let kept = precision["kept"].to_string();
    assert!(kept.contains("it is quantized") && kept.contains("`first`"), "{kept}");
    assert!(report["verify"]["passed"].as_bool().unwrap());
}

#[test]
fn a_model_that_is_half_precision_already_is_written_as_it_is() {
    let source = "<ir_version: 10, opset_import: [\"\" : 17]> g (float16[n, 8] x) => (float16[n, 8] y) { a = Relu (x) y = Sigmoid (a) }";
    let bench = bench(&text::parse(source).unwrap());
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16"]);
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("nothing was converted: no node computes in float32"), "{warnings}");
    assert_eq!(report["precision"]["nodes"], 0);
}

/// Which of 64 nearly equal scores is the largest hangs on rounding.
#[test]
fn candidates_are_compared_where_choices_differ() {
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 17]> g (float[n, 64] x) => (int64[n, 40] y) \
         <float[64, 64] w = {{{}}}, int64[1] k = {{40}}> {{ a = MatMul (x, w) b = Relu (a) c = MatMul (b, w) v, y = TopK (c, k) }}",
        Noise(7).list(64 * 64, 0.2)
    );
    let bench = bench(&text::parse(&source).unwrap());
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16"]);
    let note = report["verify"]["note"].as_str().unwrap();
    assert!(note.contains("`y`") && note.contains("rounding may choose another of nearly equal candidates"), "{note}");
    assert_eq!(report["verify"]["passed"], true);
}

#[test]
fn a_recipe_has_the_type() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let saved = bench.run(&["-o", "a.onnx", "--dtype", "float16:io", "--rtol", "0.01", "--save-recipe", "r.toml"]);
    assert!(saved.status.success(), "{}", said(&saved));
    let recipe = std::fs::read_to_string(bench.path("r.toml")).unwrap();
    assert!(recipe.contains("dtype = \"float16:io\"") && recipe.contains("rtol = 0.01"), "{recipe}");
    assert!(bench.run(&["-o", "b.onnx", "--recipe", "r.toml"]).status.success());
    let read = |name: &str| std::fs::read(bench.path(name)).unwrap();
    assert_eq!(read("a.onnx"), read("b.onnx"));
}

#[test]
fn without_verification_nothing_is_run_or_claimed() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    let report = bench.report(&["-o", "half.onnx", "--dtype", "float16", "--no-verify"]);
    assert_eq!(report["precision"]["simulated_error"], serde_json::Value::Null);
    assert_eq!(report["verify"], serde_json::Value::Null);
    assert_eq!(report["precision"]["nodes"], 4);
}

#[test]
fn the_same_again_is_the_same_bytes() {
    let bench = bench(&model(17, "y = MatMul (c, w)"));
    for name in ["a.onnx", "b.onnx"] {
        assert!(bench.run(&["-o", name, "--dtype", "float16"]).status.success());
    }
    let read = |name: &str| std::fs::read(bench.path(name)).unwrap();
    assert_eq!(read("a.onnx"), read("b.onnx"));
}
