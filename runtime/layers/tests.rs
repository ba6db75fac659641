use super::*;
use crate::testing::{Build, engine};
use lathe_ir::{Node, Tensor, Type};

/// `x · a`, its ReLU, that times `b`, and the sum over the last axis.
fn chain(scale: f32, wrong: bool) -> Model {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "4"]);
    let a = build.constant("a", Tensor::from_f32s(&[1], &[scale]));
    let b = build.constant("b", Tensor::from_f32s(&[1], &[if wrong { 3.5 } else { 3.0 }]));
    let mut named = |op: &str, name: &str, inputs: &[ValueId], output: &str| {
        let mut node = Node::new(op);
        node.name = name.to_owned();
        build.node(node, inputs, output)
    };
    let first = named("Mul", "first", &[x, a], "h1");
    let second = named("Relu", "second", &[first], "h2");
    let third = named("Mul", "third", &[second, b], "h3");
    let last = named("Exp", "last", &[third], "y");
    build.output(last, Type::unshaped(DataType::Float)).model()
}

fn layers(reference: &Model, candidate: &Model, bytes: u64) -> LayersReport {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, model: &Model| {
        let path = folder.path().join(name);
        std::fs::write(&path, model.to_bytes()).unwrap();
        path
    };
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let job = LayersJob {
        reference: write("a.onnx", reference),
        candidate: write("b.onnx", candidate),
        set: None,
        inputs: InputSpec::default(),
        rtol: None,
        bytes,
        reference_options: options.clone(),
        options,
    };
    compare_layers(engine(), &job, &mut |_: &str| {}).unwrap()
}

#[test]
fn the_first_wrong_node_is_named_and_proven() {
    let report = layers(&chain(1.0, false), &chain(1.0, true), 1 << 20);
    let names: Vec<&str> = report.values.iter().map(|line| line.value.as_str()).collect();
    assert_eq!(names, ["h1", "h2", "h3", "y"]);
    assert_eq!(report.first().unwrap().value, "h3");
    let culprit = report.culprit().unwrap();
    assert_eq!((culprit.node.as_str(), culprit.value.as_str()), ("node `third` (Mul)", "h3"));
    let Alone::Ran { rel_l2, .. } = culprit.alone else { panic!("{culprit:?}") };
    assert!((rel_l2 - 0.5 / 3.0).abs() < 1e-6, "{rel_l2}");
}

#[test]
fn equal_models_have_no_culprit_however_little_memory_there_is() {
    let report = layers(&chain(1.0, false), &chain(1.0, false), 1);
    assert_eq!(report.values.len(), 4);
    assert!(report.first().is_none() && report.culprits.is_empty(), "{report:?}");
}

#[test]
fn infinities_are_traced_to_where_they_begin() {
    let report = layers(&chain(1.0, false), &chain(1e30, false), 1 << 20);
    assert_eq!(report.first_special().unwrap().value, "y");
    assert_eq!(report.culprit().unwrap().node, "node `first` (Mul)");
}

#[test]
fn models_without_a_value_in_common_are_an_error() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "4"]);
    let y = build.node(Node::new("Relu"), &[x], "other");
    let other = build.output(y, Type::unshaped(DataType::Float)).model();
    let folder = tempfile::tempdir().unwrap();
    let paths = [("a.onnx", chain(1.0, false)), ("b.onnx", other)].map(|(name, model)| {
        let path = folder.path().join(name);
        std::fs::write(&path, model.to_bytes()).unwrap();
        path
    });
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let [reference, candidate] = paths;
    let (set, inputs, rtol, bytes) = (None, InputSpec::default(), None, 1 << 20);
    let job = LayersJob { reference, candidate, set, inputs, rtol, bytes, reference_options: options.clone(), options };
    let error = compare_layers(engine(), &job, &mut |_: &str| {}).unwrap_err();
    assert!(matches!(error, LayersError::NothingCommon), "{error}");
}
