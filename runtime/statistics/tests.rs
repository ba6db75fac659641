use super::{
    collect::{CollectOptions, Counts, Gatherer, MaskInput, Statistics},
    error::StatisticsError,
    gather,
    request::{Cut, Request, Skip},
};
use crate::{
    LoadOptions, NpzWriter, RuntimeError, SetSpec,
    testing::{Build, engine},
    wire::{GatherJob, Gathered},
};
use lathe_analysis::{Magnitudes, Random, Rows, View, weight_inputs};
use lathe_ir::{DataType, Model, Node, Tensor, Type};
use std::{cell::Cell, path::PathBuf};
use tempfile::TempDir;

/// A model with a set, and a place for results.
struct Bench {
    folder: TempDir,
    model: Model,
    set: SetSpec,
    memory: u64,
    mask: MaskInput,
    /// Fail after this many runs.
    runs: Cell<usize>,
}

impl Bench {
    fn new(model: Model, arrays: &[(&str, Tensor)]) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        let mut npz = NpzWriter::create(&path).unwrap();
        for (name, tensor) in arrays {
            npz.add(name, tensor).unwrap();
        }
        npz.finish().unwrap();
        let set = SetSpec { batch: Some(2), ..SetSpec::all(path) };
        Bench { folder, model, set, memory: 1 << 30, mask: MaskInput::Auto, runs: Cell::new(usize::MAX) }
    }

    fn collect(&self, requests: &[Request]) -> Result<Statistics, StatisticsError> {
        let run = |job: &GatherJob| {
            self.runs.set(self.runs.get().checked_sub(1).ok_or(RuntimeError::Child("interrupted".into()))?);
            gather::serve(engine(), job, &mut |_: &str| {}).map_err(|e| RuntimeError::Child(e.to_string()))
        };
        let all = |jobs: &[GatherJob]| jobs.iter().map(run).collect();
        let worker = Gatherer { engine: "test".into(), content: &crate::ContentIds::default(), gather: &all };
        let load = LoadOptions { threads: 1, ..LoadOptions::default() };
        let (memory, mask) = (self.memory, self.mask.clone());
        let options = CollectOptions { memory, mask, ..CollectOptions::new(load, self.folder.path().join("cache")) };
        std::fs::create_dir_all(&options.cache).unwrap();
        Statistics::collect_with(&worker, &self.model, &self.set, requests, &options)
    }

    fn stat_files(&self) -> Vec<PathBuf> {
        let inside = |path: PathBuf| std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<PathBuf> = inside(self.folder.path().join("cache")).flat_map(inside).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "stat"));
        files.sort();
        files
    }
}

fn floats(dims: &[usize], seed: u64) -> Tensor {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| random.normal() as f32 + 0.25).collect();
    Tensor::from_f32s(dims, &values)
}

/// `x [b, s, k]` → `h = −x` → `y = h · w`.
fn linear(opset: i64, features: &str) -> Model {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["b", "s", features]);
    let h = build.node(Node::new("Neg"), &[x], "h");
    let size = features.parse().unwrap();
    let w = build.constant("w", floats(&[size, 2], 7));
    let y = build.node(Node::new("MatMul"), &[h, w], "y");
    Model { opsets: vec![(String::new(), opset)], ..build.output(y, Type::unshaped(DataType::Float)).model() }
}

fn gram_of(rows: &[f64], features: usize) -> Vec<f64> {
    let mut gram = vec![0.0; features * features];
    for row in rows.chunks(features) {
        for (i, a) in row.iter().enumerate() {
            for (j, b) in row.iter().enumerate() {
                gram[i * features + j] += a * b;
            }
        }
    }
    gram
}

fn assert_close(found: &[f64], expected: &[f64], scale: f64) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= 1e-6 * scale, "{a} and {b}");
    }
}

#[test]
fn sums_are_those_of_the_rows_in_every_operator_set() {
    for opset in [9, 10, 12, 13, 17, 18, 21] {
        // Three batches, the last one smaller.
        let bench = Bench::new(linear(opset, "3"), &[("x", floats(&[5, 4, 3], 1))]);
        let h = Rows::last("h");
        let (gram, columns) = (Request::Gram(h.clone()), Request::Columns(h.clone()));
        let statistics = bench.collect(&[gram.clone(), columns.clone()]).unwrap();
        let rows: Vec<f64> = floats(&[5, 4, 3], 1).to_f64s().unwrap().iter().map(|v| -v).collect();
        assert_close(&statistics.gram(&h).unwrap().to_full(), &gram_of(&rows, 3), 30.0);
        let column = |index: usize| rows.iter().skip(index).step_by(3);
        for index in 0..3 {
            let field = |name: &str| statistics.field(&columns, name).unwrap().data[index];
            assert_close(&[field("sum")], &[column(index).sum()], 1.0);
            assert_close(&[field("abs_sum")], &[column(index).map(|v| v.abs()).sum()], 1.0);
            assert_close(&[field("square_sum")], &[column(index).map(|v| v * v).sum()], 1.0);
            assert_close(&[field("max_abs")], &[column(index).fold(0.0, |m: f64, v| m.max(v.abs()))], 1.0);
        }
        assert_eq!(statistics.counts(&gram).unwrap(), Counts { rows: 20, padded: 0, broken: 0 }, "opset {opset}");
        assert_eq!((statistics.work.samples, statistics.work.groups), (5, 1));
    }
}

#[test]
fn long_sums_are_added_in_parts() {
    // Too wide for float64, and 1,400 rows in a batch.
    let x = floats(&[3, 700, 130], 2);
    let bench = Bench::new(linear(17, "130"), &[("x", x.clone())]);
    let statistics = bench.collect(&[Request::Gram(Rows::last("h"))]).unwrap();
    let expected = gram_of(&x.to_f64s().unwrap(), 130);
    assert_close(&statistics.gram(&Rows::last("h")).unwrap().to_full(), &expected, expected[0]);
}

#[test]
fn padding_and_broken_rows_are_left_out_and_counted() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["b", "s", "2"]);
    build.input("attention_mask", DataType::Int64, &["b", "s"]);
    let h = build.node(Node::new("Neg"), &[x], "h");
    let shape = build.constant("shape", Tensor::int64s(&[0, 0, 2, 1]));
    let heads = build.node(Node::new("Reshape"), &[h, shape], "heads");
    let turned = build.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1, 3]), &[heads], "turned");
    let model = build.output(turned, Type::unshaped(DataType::Float)).model();
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let x = Tensor::from_f32s(&[2, 3, 2], &[1.0, 2.0, nan, 0.0, 5.0, 6.0, 3.0, 4.0, 0.0, inf, nan, 1.0]);
    let mask = Tensor::from_i64s(&[2, 3], &[1, 1, 0, 1, 1, 0]);
    let bench = Bench::new(model, &[("x", x), ("attention_mask", mask)]);
    let request = Request::Gram(Rows::last("h"));
    // Features of one head each: rows are batch, head, token, and the mask has to find the token among them.
    let heads = Request::Columns(Rows::last("turned"));
    let statistics = bench.collect(&[request.clone(), heads.clone()]).unwrap();
    assert_eq!(statistics.counts(&request).unwrap(), Counts { rows: 2, padded: 2, broken: 2 });
    assert_eq!(statistics.gram(&Rows::last("h")).unwrap().upper(), [10.0, 14.0, 20.0]);
    assert_eq!(statistics.field(&request, "sum").unwrap().data, [-4.0, -6.0]);
    assert_eq!(statistics.counts(&heads).unwrap(), Counts { rows: 6, padded: 4, broken: 2 });
    assert_eq!(statistics.field(&heads, "abs_sum").unwrap().data, [10.0]);
    let bench = Bench { mask: MaskInput::None, ..bench };
    let statistics = bench.collect(std::slice::from_ref(&request)).unwrap();
    assert_eq!(statistics.counts(&request).unwrap(), Counts { rows: 3, padded: 0, broken: 3 });
}

#[test]
fn patches_are_what_a_convolution_multiplies() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "3", "9", "8"]);
    let w = build.constant("w", floats(&[4, 3, 3, 2], 3));
    let node = Node::new("Conv").with("pads", vec![1i64, 0, 2, 1]).with("strides", vec![2i64, 1]);
    let node = node.with("dilations", vec![1i64, 2]).with("kernel_shape", vec![3i64, 2]);
    let y = build.node(node, &[x, w], "y");
    let point = build.constant("point", floats(&[2, 4, 1, 1], 4));
    let z = build.node(Node::new("Conv"), &[y, point], "z");
    let model = build.output(z, Type::unshaped(DataType::Float)).model();
    let rows = weight_inputs(&model);
    assert_eq!(rows.iter().map(Rows::label).collect::<Vec<_>>(), ["x patches 3x2", "y axis 1"]);
    let bench = Bench::new(model, &[("x", floats(&[3, 3, 9, 8], 5))]);
    // The squares of what a layer gives are what its weight makes of the Gram matrix of what it reads.
    for (rows, output, weight) in [(&rows[0], "y", floats(&[4, 18], 3)), (&rows[1], "z", floats(&[2, 4], 4))] {
        let columns = Request::Columns(Rows::channels(output));
        let statistics = bench.collect(&[Request::Gram(rows.clone()), columns.clone()]).unwrap();
        let gram = statistics.gram(rows).unwrap();
        let squares = statistics.field(&columns, "square_sum").unwrap().data;
        let weight = weight.to_f64s().unwrap();
        for (w, square) in weight.chunks(gram.size()).zip(squares) {
            let pairs = (0..w.len()).flat_map(|i| (0..w.len()).map(move |j| (i, j)));
            let made: f64 = pairs.map(|(i, j)| w[i] * gram.get(i, j) * w[j]).sum();
            assert_close(&[made], &[square], square);
        }
    }
}

/// What a depthwise convolution reads by channel, and the extremes that a spread is counted with.
#[test]
fn taps_of_every_channel_are_rows_of_their_own() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "3", "9", "8"]);
    let w = build.constant("w", floats(&[3, 1, 3, 2], 3));
    let node = Node::new("Conv").with("group", 3i64).with("kernel_shape", vec![3i64, 2]);
    let y = build.node(node.with("pads", vec![1i64, 0, 1, 1]), &[x, w], "y");
    let model = build.output(y, Type::unshaped(DataType::Float)).model();
    let id = model.graph.producer(y).unwrap();
    let (together, apart) = (Rows::of_conv(&model.graph, id).unwrap(), Rows::of_depthwise(&model.graph, id).unwrap());
    assert_eq!((together.label(), apart.label()), ("x patches 3x2".to_owned(), "x patches 3x2 by channel".to_owned()));
    let numbers = floats(&[2, 3, 9, 8], 5);
    let bench = Bench::new(model, &[("x", numbers.clone())]);
    let rows = Rows::channels("x");
    let requests = [together.clone(), apart.clone()].map(Request::Gram);
    let statistics = bench.collect(&[&requests[..], &[Request::Spread(rows.clone())]].concat()).unwrap();
    let [whole, own] = [&together, &apart].map(|rows| statistics.gram(rows).unwrap());
    assert_eq!((whole.size(), own.size()), (18, 6));
    let counted = requests.each_ref().map(|request| statistics.counts(request).unwrap().rows);
    assert_eq!(counted[1], 3 * counted[0]);
    for i in 0..6 {
        for j in 0..6 {
            let sum: f64 = (0..3).map(|channel| whole.get(channel * 6 + i, channel * 6 + j)).sum();
            assert_close(&[own.get(i, j)], &[sum], own.get(0, 0));
        }
    }
    let all = numbers.to_f64s().unwrap();
    let own = |channel: usize| all.iter().enumerate().filter(move |(at, _)| at / 72 % 3 == channel).map(|(_, x)| *x);
    let expected: Vec<(f64, f64)> =
        (0..3).map(|c| (own(c).fold(f64::INFINITY, f64::min), own(c).fold(f64::NEG_INFINITY, f64::max))).collect();
    assert_eq!(statistics.extremes(&rows).unwrap(), expected);
}

#[test]
fn pairs_of_values() {
    let bench = Bench::new(linear(17, "3"), &[("x", Tensor::from_f32s(&[1, 2, 3], &[3.0, 4.0, 0.0, 0.0, 0.0, 0.0]))]);
    let cosine = Request::Cosine(Rows::last("x"), Rows::last("h"));
    let cross = Request::Cross(Rows::last("x"), Rows::last("h"));
    let statistics = bench.collect(&[cosine.clone(), cross.clone()]).unwrap();
    let field = |request: &Request, name: &str| statistics.field(request, name).unwrap().data;
    assert_close(&field(&cosine, "cosine_sum"), &[-1.0], 1.0);
    assert_close(&field(&cosine, "dot_sum"), &[-25.0], 1.0);
    assert_close(&field(&cosine, "y_norm_sum"), &[5.0], 1.0);
    assert_close(&field(&cosine, "difference_square_sum"), &[100.0], 1.0);
    assert_eq!(field(&cross, "cross"), [-9.0, -12.0, 0.0, -12.0, -16.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(field(&cross, "y_square_sum"), [9.0, 16.0, 0.0]);
    let other = Request::Cosine(Rows::last("x"), Rows::last("y"));
    assert!(matches!(bench.collect(&[other]), Err(StatisticsError::Shapes { .. })));
    let other = Request::Cross(Rows::last("x"), Rows { value: "x".into(), view: View::Axis(0) });
    assert!(matches!(bench.collect(&[other]), Err(StatisticsError::Rows { .. })));
}

#[test]
fn layers_that_share_an_input_share_an_entry() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "4"]);
    let stored = build.constant("stored", floats(&[2, 4], 1));
    let mut heads = Vec::new();
    for name in ["q", "k"] {
        let w = build.node(Node::new("Transpose"), &[stored], "turned");
        heads.push(build.node(Node::new("MatMul"), &[x, w], name));
    }
    let y = build.node(Node::new("Gemm").with("transB", 1i64), &[x, stored], "v");
    let product = build.node(Node::new("Mul"), &[heads[0], heads[1]], "product");
    let y = build.node(Node::new("Mul"), &[product, y], "y");
    let model = build.output(y, Type::unshaped(DataType::Float)).model();
    assert_eq!(weight_inputs(&model), [Rows::last("x")]);
}

#[test]
fn what_cannot_be_had_is_refused() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "3"]);
    let condition = build.constant("condition", Tensor::from_bools(&[], &[true]));
    let mut node = Node::new("If");
    for (branch, inner) in [("then_branch", "a"), ("else_branch", "b")] {
        let scope = build.graph.add_scope(branch);
        let value = build.graph.append(scope, Node::new("Abs"), &[x], inner);
        build.graph.add_output(scope, value);
        node = node.with(branch, lathe_ir::AttributeValue::Graph(scope));
    }
    let y = build.node(node, &[condition], "y");
    let model = build.output(y, Type::unshaped(DataType::Float)).model();
    let bench = Bench::new(model, &[("x", floats(&[4, 3], 1))]);
    let refusal = |name: &str| bench.collect(&[Request::Gram(Rows::last(name))]).unwrap_err().to_string();
    assert_eq!(
        refusal("a"),
        "`a` is computed in a subgraph of node `y` (If); statistics can be taken of values of the main graph only"
    );
    assert_eq!(refusal("condition"), "`condition` is a constant, it has the same rows whatever the inputs are");
    assert_eq!(refusal("nothing"), "the model has no value `nothing`");
    let axis = Request::Gram(Rows { value: "x".into(), view: View::Axis(2) });
    assert_eq!(
        bench.collect(&[axis]).unwrap_err().to_string(),
        "`x axis 2` of shape [2, 3] has no such axis, or nothing along it"
    );
    let bench = Bench { mask: MaskInput::Named("x".into()), ..bench };
    assert!(matches!(bench.collect(&[Request::Gram(Rows::last("x"))]), Err(StatisticsError::NoMask { .. })));
    let bench = Bench { memory: 10, mask: MaskInput::None, ..bench };
    assert!(matches!(bench.collect(&[Request::Gram(Rows::last("x"))]), Err(StatisticsError::TooLarge { .. })));
    let old = Bench::new(linear(8, "3"), &[("x", floats(&[1, 2, 3], 1))]);
    assert!(matches!(old.collect(&[Request::Gram(Rows::last("x"))]), Err(StatisticsError::OldOpset { .. })));
    // What a subgraph gives to the main graph can be had.
    assert!(Bench { memory: 1 << 30, ..bench }.collect(&[Request::Gram(Rows::last("y"))]).is_ok());
}

#[test]
fn finished_groups_are_kept_and_damage_is_repaired() {
    let bench = Bench::new(linear(17, "64"), &[("x", floats(&[3, 2, 64], 1))]);
    // Enough for one of the large statistics, so that there are two groups.
    let bench = Bench { memory: 250 << 10, ..bench };
    let requests = [Request::Gram(Rows::last("x")), Request::Gram(Rows::last("h"))];
    bench.runs.set(1);
    let interrupted = bench.collect(&requests).unwrap_err();
    assert_eq!(interrupted.to_string(), "interrupted");
    assert_eq!(bench.stat_files().len(), 1);
    bench.runs.set(usize::MAX);
    let resumed = bench.collect(&requests).unwrap();
    assert_eq!((resumed.work.cached, resumed.work.computed, resumed.work.groups), (1, 1, 1));
    let again = bench.collect(&requests).unwrap();
    assert_eq!((again.work.cached, again.work.computed, again.work.samples), (2, 0, 0));
    assert_eq!(again.gram(&Rows::last("x")).unwrap(), again.gram(&Rows::last("h")).unwrap());
    let file = &bench.stat_files()[0];
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 16;
    std::fs::write(file, bytes).unwrap();
    let repaired = bench.collect(&requests).unwrap();
    assert_eq!((repaired.work.cached, repaired.work.computed, repaired.work.damaged), (1, 1, 1));
    // Another set is another entry.
    std::fs::copy(file, bench.folder.path().join("kept")).unwrap();
    let other = Bench::new(linear(17, "64"), &[("x", floats(&[3, 2, 64], 2))]);
    std::fs::copy(&other.set.path, &bench.set.path).unwrap();
    assert_eq!(bench.collect(&requests).unwrap().work.cached, 0);
}

#[test]
fn small_numbers_are_counted_where_they_count() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["b", "s", "2"]);
    build.input("attention_mask", DataType::Int64, &["b", "s"]);
    let h = build.node(Node::new("Neg"), &[x], "h");
    let model = build.output(h, Type::unshaped(DataType::Float)).model();
    let x = Tensor::from_f32s(&[3, 2, 2], &[0.0, 3.0, 0.75, f32::NAN, 1.5, 1048576.0, 0.1, 0.1, 0.75, -0.25, 0.0, 0.0]);
    let mask = Tensor::from_i64s(&[3, 2], &[1, 1, 1, 0, 1, 1]);
    for opset in [9, 13, 18, 21] {
        let model = Model { opsets: vec![(String::new(), opset)], ..model.clone() };
        let bench = Bench::new(model, &[("x", x.clone()), ("attention_mask", mask.clone())]);
        let rows = Rows::last("h");
        let statistics = bench.collect(&[Request::Magnitudes(rows.clone())]).unwrap();
        let found = statistics.magnitudes(&rows).unwrap().unwrap();
        // Counted: [0, 3], [1.5, 2²⁰], [0.75, -0.25] and [0, 0].
        assert_eq!(found.rows, 4, "opset {opset}");
        let step = |edge: f64| Magnitudes::steps().iter().position(|&s| s == edge).unwrap();
        let shares = |edge: f64| &found.share_below[2 * step(edge)..][..2];
        let squares = |edge: f64| &found.square_below[2 * step(edge)..][..2];
        assert_eq!(found.share_below[..2], [0.5, 0.25]);
        assert_eq!((shares(0.25), shares(0.5), shares(1.0)), (&[0.5, 0.25][..], &[0.5, 0.5][..], &[0.75, 0.5][..]));
        assert_eq!((shares(2.0), shares(512.0)), (&[1.0, 0.5][..], &[1.0, 0.75][..]));
        assert_eq!(squares(512.0), [(2.25 + 0.5625) / 4.0, (9.0 + 0.0625) / 4.0]);
        assert_eq!(found.square, [(2.25 + 0.5625) / 4.0, (9.0 + 0.0625 + 1048576.0 * 1048576.0) / 4.0]);
    }
}

#[test]
fn ranges_and_spreads_are_of_the_rows_that_count() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["b", "s", "2"]);
    build.input("attention_mask", DataType::Int64, &["b", "s"]);
    let h = build.node(Node::new("Neg"), &[x], "h");
    let model = build.output(h, Type::unshaped(DataType::Float)).model();
    let x = Tensor::from_f32s(&[3, 2, 2], &[-1.0, -3.0, 9.0, 9.0, f32::NAN, -50.0, -1.5, -2.0, -4.0, 0.25, 7.0, 7.0]);
    let mask = Tensor::from_i64s(&[3, 2], &[1, 0, 1, 1, 1, 0]);
    for opset in [9, 13, 18, 21] {
        let model = Model { opsets: vec![(String::new(), opset)], ..model.clone() };
        let bench = Bench::new(model, &[("x", x.clone()), ("attention_mask", mask.clone())]);
        let rows = Rows::last("h");
        let [range, spread] = [Request::Range(rows.clone()), Request::Spread(rows.clone())];
        // Batches of two samples and of one.
        let statistics = bench.collect(&[range.clone(), spread.clone()]).unwrap();
        // Counted: [1, 3], [1.5, 2] and [4, -0.25].
        for request in [&range, &spread] {
            assert_eq!(statistics.field(request, "least").unwrap().data, [1.0, -0.25], "opset {opset}");
            assert_eq!(statistics.field(request, "largest").unwrap().data, [4.0, 3.0]);
            assert_eq!(statistics.counts(request).unwrap(), Counts { rows: 3, padded: 2, broken: 1 });
        }
        let found = statistics.spread(&rows).unwrap().unwrap();
        assert_eq!((found.count(), found.least, found.largest), (6.0, -0.25, 4.0));
        assert_eq!((found.mean(), found.square()), (11.25 / 6.0, (1.0 + 9.0 + 2.25 + 4.0 + 16.0 + 0.0625) / 6.0));
    }
    let none = Bench::new(model, &[("x", x), ("attention_mask", Tensor::from_i64s(&[3, 2], &[0; 6]))]);
    let rows = Rows::last("h");
    let found = none.collect(&[Request::Spread(rows.clone())]).unwrap().spread(&rows).unwrap();
    assert_eq!(found, None, "nothing counts");
}

#[test]
fn what_a_layer_loses_without_small_inputs() {
    // `y = h · w` with `w = [[3, 4], [0, 1]]`: norms 5 and 1.
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "2"]);
    let h = build.node(Node::new("Neg"), &[x], "h");
    let w = build.constant("w", Tensor::from_f32s(&[2, 2], &[3.0, 4.0, 0.0, 1.0]));
    let turned = build.constant("turned", Tensor::from_f32s(&[2, 2], &[3.0, 0.0, 4.0, 1.0]));
    let a = build.node(Node::new("MatMul"), &[h, w], "a");
    let b = build.node(Node::new("Gemm").with("transB", 1i64), &[h, turned], "b");
    let y = build.node(Node::new("Add"), &[a, b], "y");
    let model = build.output(y, Type::unshaped(DataType::Float)).model();
    let rows = [1.0, 1.0, 0.1, 2.0, f32::INFINITY, 0.0, 0.5, 0.1];
    let bench = Bench::new(model, &[("x", Tensor::from_f32s(&[4, 2], &rows))]);
    let cuts = vec![Cut::new(1.5, true), Cut::new(0.6, false), Cut::new(0.0, false)];
    for (weight, first_axis) in [("w", true), ("turned", false)] {
        let skip = Skip { rows: Rows::last("h"), weight: weight.into(), first_axis, cuts: cuts.clone() };
        let request = Request::Skip(skip);
        let statistics = bench.collect(std::slice::from_ref(&request)).unwrap();
        let field = |name: &str| statistics.field(&request, name).unwrap().data;
        // Weighed, the second input of the first row, the first of the second, and the second of the last are small.
        assert_eq!(field("skipped"), [3.0, 3.0, 0.0], "{weight}");
        assert_close(&field("lost_square_sum"), &[1.0 + 0.25 + 0.01, 0.25 + (2.25 + 4.41), 0.0], 10.0);
        assert_close(&field("output_square_sum"), &[9.0 + 25.0 + 0.09 + 5.76 + 2.25 + 4.41], 50.0);
        assert_eq!(statistics.counts(&request).unwrap(), Counts { rows: 3, padded: 0, broken: 1 });
    }
    let missing = Skip { rows: Rows::last("h"), weight: "h".into(), first_axis: true, cuts };
    assert!(matches!(bench.collect(&[Request::Skip(missing)]), Err(StatisticsError::Missing { .. })));
}

#[test]
fn one_position_has_statistics_of_its_own() {
    let (samples, positions, k) = (5, 4, 3);
    let x = floats(&[samples, positions, k], 11);
    let bench = Bench::new(linear(18, "3"), &[("x", x.clone())]);
    let at = Rows::at("h", 2);
    let found = bench.collect(&[Request::Gram(at.clone()), Request::Columns(at.clone())]).unwrap();
    let numbers: Vec<f64> = x.to_f32s().unwrap().iter().map(|&x| -f64::from(x)).collect();
    let rows: Vec<f64> = numbers.chunks(positions * k).flat_map(|sample| sample[2 * k..3 * k].to_vec()).collect();
    assert_eq!(found.counts(&Request::Gram(at.clone())).unwrap().rows, samples as u64);
    assert_close(&found.gram(&at).unwrap().to_full(), &gram_of(&rows, k), 1.0);
    let squares = found.field(&Request::Columns(at), "square_sum").unwrap().data;
    let expected: Vec<f64> = (0..k).map(|i| rows.chunks(k).map(|row| row[i] * row[i]).sum()).collect();
    assert_close(&squares, &expected, 1.0);
}

#[test]
fn sums_that_are_not_finite_travel() {
    let direct = vec![vec![1.5, f64::NAN, f64::INFINITY], vec![], vec![f64::NEG_INFINITY]];
    let text = serde_json::to_string(&Gathered { direct, ..Gathered::default() }).unwrap();
    let again: Gathered = serde_json::from_str(&text).unwrap();
    assert_eq!(format!("{:?}", again.direct), "[[1.5, NaN, inf], [], [-inf]]");
}
