use super::*;
use crate::testing::{Build, engine};
use lathe_ir::{DataType, Node, Type};

fn stacks(inputs: &[(&str, Tensor)], labels: Option<Tensor>, samples: usize) -> Vec<Result<Batch, SetError>> {
    let inputs = inputs.iter().map(|(name, t)| ((*name).to_owned(), t.clone())).collect();
    vec![Ok(Batch { inputs, labels, samples, first: 0 })]
}

fn run(a: &Model, b: &Model, stacks: Vec<Result<Batch, SetError>>, metric: &str) -> Result<Measured, String> {
    measured(&SessionStore::new(engine(), 1 << 20), [a, b], stacks, metric)
}

fn measured(
    sessions: &SessionStore<'_>,
    [a, b]: [&Model; 2],
    stacks: Vec<Result<Batch, SetError>>,
    metric: &str,
) -> Result<Measured, String> {
    let total = stacks.iter().flatten().map(|s| s.samples).sum();
    let folder = tempfile::tempdir().unwrap();
    let [x, y] = ["a.onnx", "b.onnx"].map(|name| folder.path().join(name));
    std::fs::write(&x, a.to_bytes()).unwrap();
    std::fs::write(&y, b.to_bytes()).unwrap();
    let measurement = Measurement {
        sessions,
        model: a,
        reference: &x,
        candidate: &y,
        renamed: Renamed::new(),
        metric,
        options: LoadOptions { threads: 1, ..LoadOptions::default() },
        total,
    };
    let found = measurement.run(&mut stacks.into_iter(), &mut |_: &str| {});
    found.map_err(|e| e.to_string())?.map_err(|verdict| verdict.describe())
}

/// `y = x · w + b`, one row of `w` per input.
fn linear(weights: &[f32]) -> Model {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "2"]);
    let w = build.constant("w", Tensor::from_f32s(&[2, weights.len() / 2], weights));
    let y = build.node(Node::new("MatMul"), &[x, w], "y");
    build.output(y, Type::unshaped(DataType::Float)).model()
}

#[test]
fn an_original_whose_outputs_are_known_gives_the_same_measurement() {
    let sessions = SessionStore::new(engine(), 1 << 20);
    let model = linear(&[1.0, 2.0, -1.0, 0.5]);
    let set = || {
        let rows = |at: f32| Tensor::from_f32s(&[2, 2], &[at, 1.0, -1.0, at]);
        [0.5, 2.0].map(|at| stacks(&[("x", rows(at))], None, 2)).into_iter().flatten().collect()
    };
    let found = [0.25, 0.0, 0.25].map(|w| {
        let other = linear(&[1.0, 2.0, -1.0, w]);
        measured(&sessions, [&model, &other], set(), "rel-l2").unwrap()
    });
    assert_eq!(found[0], found[2]);
    assert_ne!(found[0].drop, found[1].drop);
    assert_eq!(found[0], run(&model, &linear(&[1.0, 2.0, -1.0, 0.25]), set(), "rel-l2").unwrap());
}

/// Logits for each token are a row of a table; with `look` every position adds the last token's row.
fn language(table: &[f32], look: bool) -> Model {
    let mut build = Build::new();
    let ids = build.input("ids", DataType::Int64, &["n", "s"]);
    build.input("attention_mask", DataType::Int64, &["n", "s"]);
    let table = build.constant("table", Tensor::from_f32s(&[3, 3], table));
    let mut y = build.node(Node::new("Gather"), &[table, ids], "rows");
    if look {
        let last = build.constant("last", Tensor::int64s(&[-1]));
        let end = build.node(Node::new("Gather").with("axis", 1), &[y, last], "end");
        y = build.node(Node::new("Add"), &[y, end], "sum");
    }
    build.output(y, Type::unshaped(DataType::Float)).model()
}

#[test]
fn batches_of_any_size_give_the_same() {
    let (a, b) = (linear(&[1.0, 0.0, 0.0, 1.0]), linear(&[1.0, 0.0, 0.0, 0.5]));
    let rows: Vec<f32> = (0..12).map(|i| (i * 7 % 5) as f32).collect();
    let labels = [0, 1, 1, 0, 1, 0];
    let part = |range: std::ops::Range<usize>| {
        let x = Tensor::from_f32s(&[range.len(), 2], &rows[range.start * 2..range.end * 2]);
        let labels = Tensor::int64s(&labels[range.clone()]);
        Ok(Batch { inputs: vec![("x".to_owned(), x)], labels: Some(labels), samples: range.len(), first: range.start })
    };
    let whole = run(&a, &b, vec![part(0..6)], "auto").unwrap();
    let parts = run(&a, &b, vec![part(0..4), part(4..5), part(5..6)], "auto").unwrap();
    assert_eq!((&whole, whole.metric.as_str()), (&parts, "accuracy"));
    assert_eq!(whole.detail.as_deref(), Some("1 of 6 labels before, 2 after"));
    assert_eq!(whole.drop, -1.0 / 6.0);
    let names: Vec<&String> = whole.outputs[0].scores.keys().collect();
    assert_eq!(names, ["accuracy", "cosine", "kl", "max-abs", "rel-l2", "snr", "top1"]);
}

#[test]
fn a_causal_model_is_told_from_one_that_looks_ahead() {
    let table = [1.0, 2.0, 0.0, 0.5, -1.0, 3.0, 0.0, 0.0, 0.0];
    let ids = Tensor::from_i64s(&[2, 4], &[0, 1, 2, 0, 2, 1, 0, 0]);
    let mask = Tensor::from_i64s(&[2, 4], &[1, 1, 1, 1, 1, 1, 0, 0]);
    let set = || stacks(&[("ids", ids.clone()), ("attention_mask", mask.clone())], None, 2);
    let causal = language(&table, false);
    let found = run(&causal, &causal, set(), "auto").unwrap();
    assert_eq!((found.metric.as_str(), found.drop), ("perplexity", 0.0));
    assert_eq!(found.detail.as_deref(), Some("4 tokens predicted, 2 of padding left out"));
    let ahead = language(&table, true);
    assert_eq!(run(&ahead, &ahead, set(), "auto").unwrap().metric, "rel-l2");
}

#[test]
fn a_nan_fails_whatever_the_metric_says() {
    let x = Tensor::from_f32s(&[2, 2], &[1.0, 0.0, 0.0, 1.0]);
    let set = stacks(&[("x", x)], None, 2);
    let found = run(&linear(&[1.0; 4]), &linear(&[1.0, 1.0, 1.0, f32::NAN]), set, "rel-l2").unwrap();
    assert!(found.failures[0].starts_with("output `y` has NaN in sample 0 where the original has 1"), "{found:?}");
}

#[test]
fn other_shapes_and_refused_models_are_told_apart() {
    let set = || stacks(&[("x", Tensor::from_f32s(&[1, 2], &[1.0, 2.0]))], None, 1);
    let (two, three) = (linear(&[1.0; 4]), linear(&[1.0; 6]));
    let found = run(&two, &three, set(), "rel-l2").unwrap();
    assert_eq!(found.failures, ["output `y` of samples from 0 on: expected float[1, 2], found float[1, 3]"]);
    assert_eq!(found.drop, f64::INFINITY);
    let broken = crate::testing::unary(Node::new("NoSuchOperator"));
    assert!(run(&two, &broken, set(), "auto").unwrap_err().starts_with("the original runs but the result does not"));
    let noise = {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "2"]);
        let y = build.node(Node::new("RandomNormalLike"), &[x], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    };
    assert!(run(&noise, &two, set(), "auto").unwrap_err().starts_with("the model disagrees with itself"));
    assert_eq!(run(&two, &two, Vec::new(), "auto").unwrap_err(), "the set has no samples");
}

#[test]
fn members_of_sequences_and_values_of_maps_are_measured() {
    let source = |weights: &str, length: usize| {
        let members = vec!["y"; length].join(", ");
        let head = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 2] x) => (seq(float[n, 2]) z)";
        let body = format!("y = MatMul (x, w) z = SequenceConstruct ({members})");
        lathe_ir::text::parse(&format!("{head} <float[2, 2] w = {{{weights}}}> {{ {body} }}")).unwrap()
    };
    let rows = || stacks(&[("x", Tensor::from_f32s(&[2, 2], &[1.0, 0.0, 0.0, 1.0]))], None, 2);
    let found = run(&source("3, 0, 0, 4", 2), &source("3, 0, 0, 3", 2), rows(), "auto").unwrap();
    assert_eq!((found.metric.as_str(), found.drop, found.failures.len()), ("rel-l2", 0.2, 0));
    let found = run(&source("3, 0, 0, 4", 2), &source("3, 0, 0, 4", 3), rows(), "rel-l2").unwrap();
    assert!(found.failures[0].contains("expected a sequence of 2, found a sequence of 3"), "{:?}", found.failures);
    let map = |keys: &[i64], values: &[f32]| Datum::Map {
        keys: Tensor::int64s(keys),
        values: Tensor::from_f32s(&[values.len()], values),
    };
    assert!(is_alike(&map(&[1, 2], &[0.5, 0.5]), &map(&[1, 2], &[0.4, 0.6])));
    assert!(!is_alike(&map(&[1, 2], &[0.5, 0.5]), &map(&[1, 3], &[0.5, 0.5])));
    assert_eq!(numbers_in(&Datum::Sequence(vec![map(&[1], &[0.5]), map(&[2], &[0.5])])).unwrap().len(), 2);
    assert!(numbers_in(&Datum::Sequence(vec![Datum::None])).is_none());
}
