//! The program as a user meets it: probes that other optimizers fail, bad input, reports, interruption.

#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, operators};
use lathe_ir::{Model, text};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};
use tempfile::TempDir;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Optimizes a fixture, expects success, and returns the result, what was printed and the folder it lies in.
fn optimized(name: &str, options: &[&str]) -> (Model, Output, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.onnx");
    let (model, out) = (fixture(name), out.to_str().unwrap().to_owned());
    let output = run(&[&[model.to_str().unwrap(), "-o", &out], options].concat());
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    (Model::read(Path::new(&out)).unwrap().model, output, folder)
}

fn listing(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.path(), e.metadata().unwrap().len())).collect()
}

/// Runs the program on `model` and expects exit code 1 or 2, one sentence with `culprit` in it, and nothing written.
fn refuses(model: &Path, options: &[&str], culprit: &str) {
    let folder = model.parent().unwrap();
    let before = listing(folder);
    let out = folder.join("refused.onnx");
    let output = run(&[&[model.to_str().unwrap(), "-o", out.to_str().unwrap()], options].concat());
    assert_refused(&output, culprit);
    assert_eq!(listing(folder), before, "something was written");
}

fn assert_refused(output: &Output, culprit: &str) {
    let said = stderr(output);
    assert!(matches!(output.status.code(), Some(1 | 2)), "exit {:?}: {said}", output.status);
    assert!(said.contains(culprit), "expected `{culprit}` in: {said}");
    assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "expected one sentence: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// Writes the model that `graph` is the text of.
fn written(folder: &Path, graph: &str) -> PathBuf {
    let path = folder.join("model.onnx");
    fs::write(&path, text::parse(graph).unwrap().to_bytes()).unwrap();
    path
}

// What other optimizers trip over.

#[test]
fn random_numbers_stay_random() {
    let (model, output, _folder) = optimized("random_normal.onnx", &[]);
    assert_eq!(operators(&model).get("RandomNormal"), Some(&1));
    // Both draw the same numbers, so they can be compared.
    assert!(stdout(&output).contains("verified against the original"), "{}", stdout(&output));
    assert!(!stdout(&output).contains("note:"), "{}", stdout(&output));
}

#[test]
fn an_if_a_function_and_an_unknown_operator_survive_together() {
    // No runtime knows the operator, so the result cannot be run.
    let (model, ..) = optimized("if_function_custom.onnx", &["--no-verify"]);
    assert_eq!(operators(&model).get("Vendor"), Some(&1));
    assert_eq!(operators(&model).get("If"), Some(&1));
    model.check().unwrap();
    refuses_without_proof("if_function_custom.onnx", "Vendor");
}

/// A model that cannot be run is not written as if it had been.
fn refuses_without_proof(name: &str, culprit: &str) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join(name);
    fs::copy(fixture(name), &model).unwrap();
    refuses(&model, &[], culprit);
}

#[test]
fn a_local_function_is_kept_or_inlined() {
    let (model, ..) = optimized("function_alone.onnx", &[]);
    let calls = operators(&model).get("ScaledRelu").copied().unwrap_or_default();
    assert_eq!(calls > 0, !model.functions.is_empty());
}

#[test]
fn a_constant_if_is_inlined() {
    let (model, ..) = optimized("constant_if.onnx", &[]);
    assert_eq!(operators(&model).into_iter().collect::<Vec<_>>(), [("Add".to_owned(), 1)]);
}

#[test]
fn a_short_loop_is_unrolled() {
    let (model, ..) = optimized("loop_three.onnx", &[]);
    assert_eq!(operators(&model).get("Loop"), None);
    assert_eq!(operators(&model).get("Relu"), Some(&3));
}

#[test]
fn folding_does_not_grow_the_file() {
    let (model, output, folder) = optimized("tile.onnx", &[]);
    assert_eq!(operators(&model).get("Tile"), Some(&1));
    assert!(fs::metadata(folder.path().join("out.onnx")).unwrap().len() < 1024);
    assert!(stdout(&output).contains("--max-growth"), "the skipped fold is not named: {}", stdout(&output));
    let (model, ..) = optimized("tile.onnx", &["--max-growth", "32MB"]);
    assert_eq!(operators(&model).get("Tile"), None);
}

#[test]
fn an_untidy_model_is_repaired_with_a_warning() {
    let (model, output, _folder) = optimized("open_output.onnx", &[]);
    assert!(stderr(&output).contains("warning: nodes stood before what they need"), "{}", stderr(&output));
    let y = model.graph.main().outputs()[0];
    assert_eq!(model.graph.value(y).ty.as_ref().unwrap().shape().unwrap().dims.len(), 2);
}

#[test]
fn multiplication_by_ones_goes() {
    let (model, ..) = optimized("mul_by_ones.onnx", &[]);
    assert_eq!(operators(&model).get("Mul"), None);
    assert_eq!(operators(&model).get("Identity"), None);
}

#[test]
fn external_data_stays_external() {
    let (model, _, folder) = optimized("external.onnx", &[]);
    assert_eq!(operators(&model).get("Identity"), None);
    let size = |name: &str| fs::metadata(folder.path().join(name)).unwrap().len();
    assert!(size("out.onnx") < 1024);
    assert!((4096..8192).contains(&size("out.onnx.data")));
}

#[test]
fn tied_weights_stay_tied() {
    let (_, _, folder) = optimized("tied_weights.onnx", &[]);
    let before = fs::metadata(fixture("tied_weights.onnx")).unwrap().len();
    let after = fs::metadata(folder.path().join("out.onnx")).unwrap().len();
    // One of the two equal matrices goes: 16 × 16 floats.
    assert!(after <= before - 1000, "{before} became {after} bytes");
}

#[test]
fn old_half_and_quantized_models_pass() {
    let (model, ..) = optimized("old_opset.onnx", &[]);
    assert_eq!(operators(&model).get("BatchNormalization"), None);
    assert_eq!(operators(&model).get("Dropout"), None);
    assert_eq!(model.opset(), 9);
    optimized("half.onnx", &[]);
    optimized("quantized.onnx", &[]);
}

#[test]
fn a_transformer_shrinks() {
    let (model, ..) = optimized("transformer.onnx", &[]);
    // 106 nodes a layer come in; onnxsim leaves 58 of them, ONNX Runtime's own fusions for its own operators 7.
    assert!(model.graph.all_nodes().len() <= 2 * 33, "{} nodes are left", model.graph.all_nodes().len());
}

#[test]
fn the_same_model_gives_the_same_bytes() {
    for name in ["mobilenet.onnx", "transformer.onnx", "old_opset.onnx"] {
        let (_, _, first) = optimized(name, &["--no-verify"]);
        let (_, _, second) = optimized(name, &["--no-verify"]);
        let bytes = |folder: &TempDir| fs::read(folder.path().join("out.onnx")).unwrap();
        assert!(bytes(&first) == bytes(&second), "{name}");
    }
}

// Bad input.

#[test]
fn what_is_no_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let whole = fs::read(fixture("mobilenet.onnx")).unwrap();
    for length in [1, 100, 20_000, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        refuses(&path, &[], "model.onnx");
    }
    fs::write(&path, b"").unwrap();
    refuses(&path, &[], "model.onnx");
    fs::write(&path, b"PK\x03\x04 no model at all").unwrap();
    refuses(&path, &[], "model.onnx");
    let mut random = lathe_analysis::Random::new(7);
    let noise: Vec<u8> = (0..4096).map(|_| random.next_u64() as u8).collect();
    fs::write(&path, noise).unwrap();
    refuses(&path, &[], "model.onnx");
    refuses(&folder.path().join("missing.onnx"), &[], "missing.onnx");
    refuses(folder.path(), &[], &folder.path().display().to_string());
}

#[test]
fn external_data_must_be_there_and_inside_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let model = fs::read(fixture("external.onnx")).unwrap();
    fs::write(&path, &model).unwrap();
    refuses(&path, &[], "external.onnx.data");
    fs::write(folder.path().join("external.onnx.data"), [0; 100]).unwrap();
    refuses(&path, &[], "external.onnx.data");
    // The same length keeps the file well formed.
    for escape in ["../tern.onnx.data_", "/etc/ssl/openssl.c"] {
        let position = model.windows(18).position(|w| w == b"external.onnx.data").unwrap();
        let mut changed = model.clone();
        changed[position..position + 18].copy_from_slice(escape.as_bytes());
        fs::write(&path, changed).unwrap();
        refuses(&path, &[], escape);
    }
    #[cfg(unix)]
    {
        fs::write(&path, &model).unwrap();
        let link = folder.path().join("external.onnx.data");
        fs::remove_file(&link).unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::write(outside.path(), [0; 4096]).unwrap();
        std::os::unix::fs::symlink(outside.path(), &link).unwrap();
        refuses(&path, &[], "external.onnx.data");
    }
}

/// A model with one field of its encoding changed: `find` becomes `replace`, of equal length.
fn patched(folder: &Path, graph: &str, find: &[u8], replace: &[u8]) -> PathBuf {
    let path = written(folder, graph);
    let mut bytes = fs::read(&path).unwrap();
    let position = bytes.windows(find.len()).position(|w| w == find).expect("the bytes are there");
    bytes[position..position + find.len()].copy_from_slice(replace);
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn graphs_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    // A tensor of 2 × 2 floats that says 3 × 2: dims are field 1, varints.
    let weights = "g (float[2,2] x) => (float[2,2] y) <float[2,2] weights = {1, 2, 3, 4}> { y = Add (x, weights) }";
    refuses(&patched(at, weights, &[8, 2, 8, 2, 16, 1], &[8, 3, 8, 2, 16, 1]), &[], "weights");
    let path = written(at, "g (float[2] x) => (float[2] y) { inside = Neg (x) y = Add (x, inside) }");
    let mut bytes = fs::read(&path).unwrap();
    let used = bytes.windows(6).rposition(|w| w == b"inside").unwrap();
    bytes[used..used + 6].copy_from_slice(b"beyond");
    fs::write(&path, bytes).unwrap();
    refuses(&path, &[], "beyond");
    let mut cycle = text::parse("g (float[2] x) => (float[2] y) { a = Add (x, x) b = Neg (a) y = Neg (b) }").unwrap();
    let (first, b) = (cycle.graph.all_nodes()[0], cycle.graph.find_value("b"));
    cycle.graph.set_input(first, 1, b);
    fs::write(&path, cycle.to_bytes()).unwrap();
    refuses(&path, &[], "the nodes form a cycle");
    let opset = "<ir_version: 8, opset_import: [\"\" : 99]> g (float[2] x) => (float[2] y) { y = Neg (x) }";
    refuses(&written(at, opset), &[], "version 99");
}

#[test]
fn dimensions_that_overflow_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    // ModelProto { ir_version: 8, graph: { name: "g", initializer: { dims, data_type: 1, name: "huge" } }, opset: 17 }
    let huge = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40];
    let mut tensor = Vec::new();
    for _ in 0..3 {
        tensor.push(0x08);
        tensor.extend(huge);
    }
    tensor.extend([0x10, 1, 0x42, 4]);
    tensor.extend(b"huge");
    let mut graph = vec![0x12, 1, b'g', 0x2a, tensor.len() as u8];
    graph.extend(tensor);
    let mut model = vec![0x08, 8, 0x3a, graph.len() as u8];
    model.extend(graph);
    model.extend([0x42, 2, 0x10, 17]);
    fs::write(&path, model).unwrap();
    refuses(&path, &[], "huge");
}

#[test]
fn names_that_are_defined_twice_are_repaired_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let graph = "g (float[2] x) => (float[2] y) { aaaa = Neg (x) bbbb = Abs (x) y = Add (aaaa, bbbb) }";
    let path = written(folder.path(), graph);
    let bytes = fs::read(&path).unwrap();
    let text = b"bbbb";
    let position = bytes.windows(4).position(|w| w == text).unwrap();
    let mut changed = bytes;
    changed[position..position + 4].copy_from_slice(b"aaaa");
    fs::write(&path, changed).unwrap();
    refuses(&path, &[], "aaaa");
}

#[test]
fn a_long_chain_is_no_trouble() {
    let folder = tempfile::tempdir().unwrap();
    let mut graph = lathe_ir::Graph::new("chain");
    let ty = lathe_ir::Type::tensor(lathe_ir::DataType::Float, vec![lathe_ir::Dim::Known(2)]);
    let mut value = graph.add_value("x", Some(ty.clone()));
    graph.add_input(lathe_ir::ScopeId::MAIN, value);
    for index in 0..100_000 {
        let op = if index % 2 == 0 { "Sin" } else { "Cos" };
        value = graph.append(lathe_ir::ScopeId::MAIN, lathe_ir::Node::new(op), &[value], "t");
    }
    graph.value_mut(value).ty = Some(ty);
    graph.add_output(lathe_ir::ScopeId::MAIN, value);
    let model = Model { ir_version: 8, opsets: vec![(String::new(), 17)], graph, ..Model::default() };
    let (path, out) = (folder.path().join("model.onnx"), folder.path().join("out.onnx"));
    fs::write(&path, model.to_bytes()).unwrap();
    let output = run(&[path.to_str().unwrap(), "-o", out.to_str().unwrap(), "--no-verify"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(Model::read(&out).unwrap().model.graph.all_nodes().len(), 100_000);
}

/// `If` inside `If`, so deep.
fn nested(depth: usize) -> String {
    let mut body = "v0 = Neg (x)".to_owned();
    for level in 1..=depth {
        let inner = level - 1;
        body = format!(
            "v{level} = If (flag) <then_branch = t{level} () => (float[2] v{inner}) {{ {body} }}, \
             else_branch = e{level} () => (float[2] w{inner}) {{ w{inner} = Abs (x) }}>"
        );
    }
    format!("g (bool flag, float[2] x) => (float[2] v{depth}) {{ {body} }}")
}

#[test]
fn nesting_is_followed_up_to_a_bound() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    fs::write(&path, deep_bytes(30)).unwrap();
    let out = folder.path().join("out.onnx");
    let output = run(&[path.to_str().unwrap(), "-o", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    fs::remove_file(out).unwrap();
    fs::write(&path, deep_bytes(200)).unwrap();
    refuses(&path, &[], "nested");
}

/// The encoding of `If` inside `If`, without the help of a writer or parser that has a bound itself.
fn deep_bytes(depth: usize) -> Vec<u8> {
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut length = content.len();
        while length >= 128 {
            out.push(length as u8 | 128);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend(content);
        out
    }
    fn node(op: &str, input: &str, output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut out = [field(1, input.as_bytes()), field(2, output.as_bytes()), field(4, op.as_bytes())].concat();
        attributes.iter().for_each(|a| out.extend(field(5, a)));
        out
    }
    // A float[2] value: type { tensor_type { elem_type: 1, shape { dim { dim_value: 2 } } } }.
    fn value(name: &str, elem: u8, dims: &[u8]) -> Vec<u8> {
        let shape: Vec<u8> = dims.iter().flat_map(|d| field(1, &[8, *d])).collect();
        let tensor = [vec![8, elem], field(2, &shape)].concat();
        [field(1, name.as_bytes()), field(2, &field(1, &tensor))].concat()
    }
    fn branch(name: &str, graph: &[u8]) -> Vec<u8> {
        [field(1, name.as_bytes()), field(6, graph), vec![20 << 3 & 0x7f | 0x80, 1, 5]].concat()
    }
    let leaf = |op: &str, output: &str| {
        [field(1, &node(op, "x", output, &[])), field(2, b"b"), field(12, &value(output, 1, &[2]))].concat()
    };
    let mut inner = leaf("Neg", "v0");
    for level in 1..=depth {
        let attributes = [branch("then_branch", &inner), branch("else_branch", &leaf("Abs", &format!("w{level}")))];
        let output = format!("v{level}");
        inner =
            [field(1, &node("If", "flag", &output, &attributes)), field(2, b"b"), field(12, &value(&output, 1, &[2]))]
                .concat();
    }
    inner.extend(field(11, &value("flag", 9, &[])));
    inner.extend(field(11, &value("x", 1, &[2])));
    [vec![8, 8], field(7, &inner), field(8, &[0x10, 17])].concat()
}

#[test]
fn nesting_in_text_is_written_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path(), &nested(10));
    let out = folder.path().join("out.onnx");
    let output = run(&[path.to_str().unwrap(), "-o", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn an_empty_graph_is_handled() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path(), "g () => () { }");
    let out = folder.path().join("out.onnx");
    let output = run(&[path.to_str().unwrap(), "-o", out.to_str().unwrap(), "--no-verify"]);
    if output.status.success() {
        assert!(out.exists());
    } else {
        assert_refused(&output, "");
        assert!(!out.exists());
    }
}

// Where the result goes.

#[test]
fn the_model_itself_is_replaced_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    fs::copy(fixture("constant_if.onnx"), &path).unwrap();
    let before = fs::read(&path).unwrap();
    let name = path.to_str().unwrap();
    assert_refused(&run(&[name, "-o", name]), "model.onnx");
    assert!(fs::read(&path).unwrap() == before);
    let output = run(&[name, "-o", name, "--overwrite"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(&path).unwrap() != before);
    assert_eq!(listing(folder.path()).len(), 1);
}

#[test]
fn external_data_of_the_model_itself_is_replaced_whole() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["external.onnx", "external.onnx.data"] {
        fs::copy(fixture(name), folder.path().join(name)).unwrap();
    }
    let path = folder.path().join("external.onnx");
    let name = path.to_str().unwrap();
    let output = run(&[name, "-o", name, "--overwrite"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(listing(folder.path()).len(), 2);
    let bytes = fs::read(folder.path().join("external.onnx.data")).unwrap();
    assert!(bytes == fs::read(fixture("external.onnx.data")).unwrap());
}

#[test]
fn a_place_that_cannot_be_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("constant_if.onnx");
    let model = model.to_str().unwrap();
    let nowhere = folder.path().join("none").join("out.onnx");
    assert_refused(&run(&[model, "-o", nowhere.to_str().unwrap()]), "none");
    assert_refused(&run(&[model, "-o", folder.path().to_str().unwrap()]), "is a folder");
    // A file where a folder must be cannot be written into, whoever runs the test.
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert_refused(&run(&[model, "-o", file.join("out.onnx").to_str().unwrap()]), "file");
    assert_eq!(listing(folder.path()).len(), 1);
}

#[test]
fn what_is_asked_for_must_make_sense() {
    let model = fixture("constant_if.onnx");
    let model = model.to_str().unwrap();
    let usage = |arguments: &[&str], culprit: &str| {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(culprit), "{}", stderr(&output));
    };
    usage(&[model], "-o OUT");
    usage(&[], "no model");
    usage(&[model, "--dry-run", "--skip", "no-such-pass"], "no-such-pass");
    usage(&[model, "--dry-run", "--set", "no-such.option=1"], "no-such.option");
    usage(&[model, "--dry-run", "--max-growth", "many"], "many");
    usage(&[model, "--no-such-option"], "--no-such-option");
    usage(&[model, "--dry-run", "--report", "report.pdf"], "report.pdf");
    usage(&["explain", "no-such-pass"], "no-such-pass");
}

#[test]
fn a_dry_run_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("constant_if.onnx");
    let out = folder.path().join("out.onnx");
    let output = run(&[model.to_str().unwrap(), "-o", out.to_str().unwrap(), "--dry-run"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("wrote nothing"));
    assert!(listing(folder.path()).is_empty());
}

// What is said.

/// The keys of an object in order.
fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Asserts that `value` has all of `names`: more may come, none may go.
fn has(value: &Value, names: &str) {
    for name in names.split_whitespace() {
        assert!(keys(value).contains(&name), "`{name}` is missing from {:?}", keys(value));
    }
}

#[test]
fn the_json_report_keeps_its_contract() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let model = fixture("mobilenet.onnx");
    let arguments =
        [model.to_str().unwrap(), "-o", &at("out.onnx"), "--report", &at("r.json"), "--report", &at("r.md")];
    let output = run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_str(&fs::read_to_string(at("r.json")).unwrap()).unwrap();
    has(&report, "version command seed input output passes plan verify latency seconds peak_rss_bytes");
    has(&report["input"], "path file_bytes weight_bytes nodes parameters flops opset");
    has(&report["output"], "path file_bytes weight_bytes nodes parameters flops opset");
    for pass in report["passes"].as_array().unwrap() {
        has(pass, "name kind changes refusals seconds nodes_delta weight_bytes_delta flops_delta error");
        for refusal in pass["refusals"].as_array().unwrap() {
            has(refusal, "reason count");
        }
    }
    has(&report["verify"], "set samples metric before after drop limit passed outputs");
    has(&report["verify"]["outputs"][0], "name max_abs rel_l2 cosine top1 kl");
    assert_eq!(report["verify"]["passed"], true);
    assert!(report["plan"].is_null() && report["latency"].is_null());
    assert_eq!(report["output"]["file_bytes"], fs::metadata(at("out.onnx")).unwrap().len());
    let markdown = fs::read_to_string(at("r.md")).unwrap();
    assert!(markdown.contains("| nodes | 89 |") && markdown.contains("Run beside the original"), "{markdown}");
}

#[test]
fn the_other_commands_answer() {
    let model = fixture("mobilenet.onnx");
    let model = model.to_str().unwrap();
    for (arguments, expected) in [
        (vec!["inspect", model], "Conv"),
        (vec!["dump", model], "=> (float"),
        (vec!["verify", model, model], "x"),
        (vec!["passes"], "drop-identities"),
        (vec!["explain", "drop-identities"], "Identity"),
        (vec!["doctor"], "ONNX Runtime"),
        (vec!["--help"], "Exit codes"),
    ] {
        let output = run(&arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        let said = stdout(&output) + &stderr(&output);
        assert!(said.contains(expected), "{arguments:?} said {said}");
    }
}

#[test]
fn a_dump_can_be_read_again() {
    for name in ["if_function_custom.onnx", "loop_three.onnx", "quantized.onnx", "half.onnx"] {
        let output = run(&["dump", "--full", fixture(name).to_str().unwrap()]);
        text::parse(&stdout(&output)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

// What goes wrong while it runs.

#[test]
fn a_model_that_never_ends_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("endless.onnx");
    fs::copy(fixture("loop_endless.onnx"), &model).unwrap();
    refuses(&model, &["--timeout", "1"], "1 s");
}

#[test]
fn a_worker_that_needs_too_much_memory_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(
        folder.path(),
        "g (float[1] x) => (float[60000,60000] y) <int64[2] shape = {60000, 60000}> {
            large = Expand (x, shape)
            y = Neg (large)
        }",
    );
    refuses(&path, &["--memory", "1GB"], "1024 MiB are allowed");
}

#[test]
fn a_library_that_is_none_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (model, library) = (folder.path().join("model.onnx"), folder.path().join("libonnxruntime.so"));
    fs::copy(fixture("constant_if.onnx"), &model).unwrap();
    fs::write(&library, "no library").unwrap();
    refuses(&model, &["--ort", library.to_str().unwrap()], "libonnxruntime.so");
}

/// An interrupt in the middle of writing leaves what was there before.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let weights = lathe_ir::Tensor::from_f32s(&[4096, 4096], &vec![0.5; 4096 * 4096]);
    let mut model = text::parse("g (float[1,4096] x) => (float[1,4096] y) { y = MatMul (x, x) }").unwrap();
    let node = model.graph.all_nodes()[0];
    let w = model.graph.add_initializer(lathe_ir::ScopeId::MAIN, "w", weights);
    model.graph.set_input(node, 1, Some(w));
    let path = folder.path().join("model.onnx");
    fs::write(&path, model.to_bytes()).unwrap();
    drop(model);
    let before = listing(folder.path());
    let out = folder.path().join("out.onnx");
    let mut interrupted = 0;
    for delay in [5, 10, 20, 40, 80, 160] {
        let mut process = program().args([path.to_str().unwrap(), "-o", out.to_str().unwrap(), "-q"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        let id = process.id().to_string();
        Command::new("kill").args(["-INT", &id]).status().unwrap();
        if process.wait().unwrap().success() {
            assert!(Model::read(&out).is_ok());
            fs::remove_file(&out).unwrap();
        } else {
            interrupted += 1;
        }
        assert_eq!(listing(folder.path()), before, "after {delay} ms");
    }
    assert!(interrupted > 0, "no run was interrupted");
}

#[test]
fn inspect_counts_units_and_what_could_be_saved() {
    let model = fixture("transformer.onnx");
    let output = run(&["inspect", model.to_str().unwrap(), "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let units = found["units"].as_array().unwrap();
    let kinds: Vec<&str> = units.iter().map(|u| u["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["attention", "mlp", "attention", "mlp"]);
    assert_eq!(found["chains"], serde_json::json!([{"units": [0, 1, 2, 3], "period": 2}]));
    // What is in units and what is outside of them is the whole model.
    let sum = |rows: &str, quantity: &str| -> u64 {
        found[rows].as_array().unwrap().iter().map(|row| row[quantity].as_u64().unwrap()).sum()
    };
    assert_eq!(sum("unit_kinds", "flops"), found["model"]["flops"].as_u64().unwrap());
    assert_eq!(sum("unit_kinds", "parameters"), found["model"]["parameters"].as_u64().unwrap());
    assert_eq!(sum("unit_kinds", "weight_bytes"), sum("operators", "weight_bytes"));
    let methods: Vec<&str> =
        found["ceilings"].as_array().unwrap().iter().map(|c| c["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["int8 weights", "int4 weights", "low-rank layers", "dropped units", "fewer tokens"]);
    let listed = stdout(&run(&["inspect", model.to_str().unwrap(), "--units"]));
    assert!(listed.contains("encoder/layer.1/attention"), "{listed}");
    // An image classifier has no tokens, and convolutions that could give way.
    let model = fixture("mobilenet.onnx");
    let said = stdout(&run(&["inspect", model.to_str().unwrap()]));
    assert!(said.contains("spatial substitution") && !said.contains("fewer tokens"), "{said}");
}
