//! Small models that a whole run once made something else of: each keeps its outputs, and its inputs, whatever is fed.

#![allow(clippy::unwrap_used)]

mod common;

use lathe_ir::{DataType, Initializer, Model, Tensor, text};
use lathe_testkit::evaluator;

/// What is fed: names and tensors.
type Feed = Vec<(&'static str, Tensor)>;

/// Optimizes `model` as `adjust` says, without the comparison that would put a fault right.
fn optimized(model: &Model, adjust: impl FnOnce(&mut onnx_lathe::Options)) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("model.onnx"), folder.path().join("out.onnx"));
    std::fs::write(&path, model.to_bytes()).unwrap();
    let mut options = common::options(&path, &out);
    adjust(&mut options);
    let done = onnx_lathe::optimize(&options).unwrap_or_else(|error| panic!("{error}\n{}", text::print(model)));
    assert_eq!(done.report.warnings, Vec::<String>::new());
    // The bytes are read whole, because the folder goes.
    Model::from_bytes(std::fs::read(&out).unwrap().into()).unwrap().model
}

fn run(model: &Model, feed: &Feed) -> Vec<(String, Tensor)> {
    let feed: Vec<(String, Tensor)> = feed.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    evaluator().run(model, &feed).unwrap_or_else(|error| panic!("{error}\n{}", text::print(model)))
}

/// Requires that both models give the same for each feed: the same bits, or floats within `rtol` of each other.
fn require_same(before: &Model, after: &Model, feeds: &[Feed], rtol: f64) {
    for feed in feeds {
        for ((name, expected), (_, found)) in run(before, feed).iter().zip(run(after, feed)) {
            assert_eq!(expected.dims(), found.dims(), "`{name}`\n{}", text::print(after));
            let close = |(a, b): (&f64, &f64)| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= rtol * a.abs();
            let (a, b) = (expected.to_f64s().unwrap(), found.to_f64s().unwrap());
            let same = expected.same_bits(&found) || a.iter().zip(&b).all(close);
            assert!(same, "`{name}`: {a:?} has become {b:?}\n{}", text::print(after));
        }
    }
}

/// Optimizes a graph in every way that a user can and compares it with itself. Returns the portable result.
fn keeps(opset: i64, graph: &str, feeds: &[Feed], rtol: f64) -> Model {
    let ir_version = if opset < 11 { 5 } else { 8 };
    let before = text::parse(&format!("<ir_version: {ir_version}, opset_import: [\"\" : {opset}]>\n{graph}")).unwrap();
    let after = optimized(&before, |_| {});
    require_same(&before, &after, feeds, rtol);
    let ort = optimized(&before, |options| options.target = lathe_passes::Target::Ort);
    require_same(&before, &ort, feeds, rtol);
    after
}

fn floats(dims: &[usize], numbers: &[f32]) -> Tensor {
    Tensor::from_f32s(dims, numbers)
}

fn halves(dims: &[usize], numbers: &[f64]) -> Tensor {
    Tensor::from_f64s(DataType::Float16, dims, numbers).unwrap()
}

#[test]
fn factors_keep_their_digits() {
    let x = [12345.0, -20000.0, 7000.0, 31.0];
    let feeds = [vec![("x", halves(&[1, 4], &x))]];
    let weights = "float16[4,4] w = {0.0012, -0.0003, 0.0007, 0.0001, 0.0009, -0.0013, 0.0004, 0.0002, -0.0006, 0.0011, \
                   0.0005, -0.0008, 0.0014, 0.0003, -0.001, 0.0006}, float16 s = {0.0001}";
    let graph = |body: &str| format!("g (float16[N,4] x) => (float16[N,4] y) <{weights}> {{ {body} }}");
    keeps(17, &graph("a = Mul (x, s) y = MatMul (a, w)"), &feeds, 2e-3);
    keeps(17, &graph("a = MatMul (x, w) y = Mul (a, s)"), &feeds, 2e-3);
    keeps(17, &graph("a = Mul (x, s) y = Mul (a, s)"), &feeds, 2e-3);
    keeps(
        17,
        &graph("a = Div (x, s) b = Mul (a, s) y = Mul (b, s)"),
        &[vec![("x", halves(&[1, 4], &[1.0, -2.0, 0.5, 3.0]))]],
        2e-3,
    );
    let small = "g (float16[N] x) => (float16[N] y) <float16 s = {0.0002}> { a = Div (x, s) y = Div (a, s) }";
    keeps(17, small, &[vec![("x", halves(&[2], &[1e-5, 2e-4]))]], 2e-3);
    let single = "g (float[N] x) => (float[N] y) <float s = {1e-25}> { a = Mul (x, s) y = Mul (a, s) }";
    keeps(17, single, &[vec![("x", floats(&[2], &[1e38, 3e37]))]], 1e-5);
    let layer = "g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1e-20, 2e-20, 3e-20, 4e-20}, float[2] s = {1e-20, 2e-20}> { a = MatMul (x, w) y = Mul (a, s) }";
    keeps(17, layer, &[vec![("x", floats(&[1, 2], &[1e8, 3e8]))]], 1e-5);
}

#[test]
fn constants_that_cancel_stay_apart() {
    let x = || floats(&[2, 2], &[1.0, -2.0, 0.5, 3.0]);
    let pair = "g (float[N,2] x) => (float[N,2] y) <float c = {1e10}> { a = Add (x, c) y = Sub (a, c) }";
    keeps(17, pair, &[vec![("x", x())]], 1e-6);
    let half =
        "g (float16[N,2] x) => (float16[N,2] y) <float16[2] c = {2048.0, 1024.0}> { a = Add (x, c) y = Sub (a, c) }";
    keeps(17, half, &[vec![("x", halves(&[1, 2], &[0.3, 0.7]))]], 1e-3);
    let layer = "g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, -1, -2}, float[2] c = {1e10, 1e10}, float[2] d = {1, 2}>
        { s = Add (x, c) t = MatMul (s, w) y = Add (t, d) }";
    keeps(17, layer, &[vec![("x", x())]], 1e-6);
    let norm =
        "g (float[N,2] x) => (float[N,2] y) <float[2] s = {1, 2}, float[2] m = {1e10, 1e10}, float[2] v = {1, 1}>
        { a = Add (x, m) y = BatchNormalization (a, s, s, m, v) }";
    keeps(17, norm, &[vec![("x", x())]], 1e-6);
}

#[test]
fn an_index_is_that_of_the_rounded_softmax() {
    let graph = |last: &str| {
        format!("g (float[N,4] x) => (int64[N,1] y, int64[N,1] z) {{
            s = Softmax <axis = 1> (x) y = ArgMax <axis = 1{last}> (s) t = LogSoftmax <axis = 1> (x) z = ArgMax <axis = 1{last}> (t) }}")
    };
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [-1e-8, 0.0, -2e-8, 1e-8, 0.0, nan, 1.0, 2.0, inf, 1.0, 2.0, inf, 1.0, 2.0, 3.0, 4.0];
    let feeds = [vec![("x", floats(&[4, 4], &rows))]];
    keeps(17, &graph(""), &feeds, 0.0);
    keeps(17, &graph(", select_last_index = 1"), &feeds, 0.0);
    // The largest numbers of a rounded softmax have the same ties.
    let top = "g (float[N,4] x) => (int64[N,2] i) <int64[1] k = {2}> { s = Softmax <axis = 1> (x) v, i = TopK <axis = 1> (s, k) }";
    keeps(17, top, &[vec![("x", floats(&[1, 4], &rows[..4]))]], 0.0);
}

#[test]
fn a_divisor_near_the_bound_is_another_divisor() {
    let feeds = [vec![("x", floats(&[5], &[-4.0, -1.5, 0.25, 2.0, 8.0]))]];
    for (op, number) in [("Div", "6.0005"), ("Mul", "0.16667"), ("Div", "6.00005"), ("Div", "6"), ("Mul", "0.166667")] {
        for last in ["y = OP (c, k)", "p = Mul (x, c) y = OP (p, k)"] {
            let graph = format!(
                "g (float[N] x) => (float[N] y) <float three = {{3}}, float zero = {{0}}, float six = {{6}}, float k = {{{number}}}> {{
                    a = Add (x, three) c = Clip (a, zero, six) {} }}",
                last.replace("OP", op)
            );
            let after = keeps(17, &graph, &feeds, 1e-5);
            let fused = text::print(&after).contains("HardS");
            assert_eq!(fused, ["6", "0.166667"].contains(&number), "{op} {number}");
        }
    }
}

#[test]
fn bounds_of_whole_numbers_keep_every_digit() {
    let graph = "g (int64[N] x) => (int64[N] y, int64[N] z)
        <int64 a = {-4611686018427387905}, int64 b = {4611686018427387905}, int64 c = {-1152921504606846977},
         int64 d = {1152921504606846977}, int64 e = {9007199254740993}> {
            i = Clip (x, a, b)
            y = Clip (i, c, d)
            j = Clip (x, e, b)
            z = Clip (j, c, e)
        }";
    let numbers = [i64::MAX, i64::MIN, 1 << 60, (1 << 60) + 1, -(1 << 60) - 2, 0, (1 << 53) + 1];
    let after = keeps(17, graph, &[vec![("x", Tensor::from_i64s(&[7], &numbers))]], 0.0);
    assert_eq!(common::operators(&after)["Clip"], 2);
}

#[test]
fn nothing_that_runs_on_empty_axes_stops_running() {
    let empty = |name: &'static str, dims: &[usize]| {
        let count: usize = dims.iter().product();
        vec![(name, floats(dims, &(0..count).map(|i| i as f32).collect::<Vec<f32>>()))]
    };
    let sizes = |graph: &str, opset: i64, fixed: &dyn Fn(usize, usize) -> Vec<usize>| {
        let feeds: Vec<Feed> =
            [(0, 2), (2, 0), (0, 0), (1, 1), (2, 3)].iter().map(|&(n, m)| empty("x", &fixed(n, m))).collect();
        keeps(opset, graph, &feeds, 1e-6)
    };
    sizes("g (float[1,N,M] x) => (float[N,1,M] y) { y = Transpose <perm = [1, 0, 2]> (x) }", 17, &|n, m| vec![1, n, m]);
    let computed = "g (float[N,M,4] x) => (float[N,K] y) <int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i4 = {4}> {
        s = Shape (x) a = Slice (s, i0, i1) b = Slice (s, i1, i2) c = Mul (b, i4) t = Concat <axis = 0> (a, c) y = Reshape (x, t) }";
    let after = sizes(computed, 17, &|n, m| vec![n, m, 4]);
    assert_eq!(common::operators(&after).len(), 1, "{}", text::print(&after));
    let flattened = "g (float[N,M,4] x) => (float[N,K] y) <int64[4] s = {0, 0, 2, 2}> { r = Reshape (x, s) y = Flatten <axis = 1> (r) }";
    let after = sizes(flattened, 17, &|n, m| vec![n, m, 4]);
    assert_eq!(common::operators(&after).len(), 1, "{}", text::print(&after));
    let spatial = "g (float[N,3,M,M] x) => (float[N,3,K] y) <int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] i4 = {4}> {
        s = Shape (x) a = Slice (s, i0, i2) h = Slice (s, i2, i3) w = Slice (s, i3, i4) c = Mul (h, w)
        t = Concat <axis = 0> (a, c) y = Reshape (x, t) }";
    sizes(spatial, 17, &|n, m| vec![n, 3, m, m]);
    // Only where everything is empty, or nothing, does the file itself run.
    let guarded = "g (float[N,M,4] x) => (float[N,M,2,2] q, float[N,K] y, float[N,1,L] z)
        <int64[4] s = {0, 0, -1, 2}, int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i4 = {4}, int64[1] one = {1}> {
        q = Reshape (x, s) l = Shape (x) a = Slice (l, i0, i1) b = Slice (l, i1, i2) c = Mul (b, i4)
        t = Concat <axis = 0> (a, one, c) z = Reshape (x, t) f = Reshape (x, u) y = Flatten <axis = 1> (f) }";
    let guarded = guarded.replace("<int64[4] s", "<int64[4] u = {0, 0, 2, 2}, int64[4] s");
    let after = keeps(17, &guarded, &[empty("x", &[1, 1, 4]), empty("x", &[2, 3, 4])], 0.0);
    assert!(!common::operators(&after).contains_key("Concat"), "{}", text::print(&after));
    let squeezed = "g (float[N,1,M,2] x) => (float[N,M,2] y) <int64[1] i0 = {0}, int64[2] i02 = {0, 2}> {
        u = Unsqueeze (x, i0) y = Squeeze (u, i02) }";
    let after = sizes(squeezed, 17, &|n, m| vec![n, 1, m, 2]);
    assert_eq!(common::operators(&after).len(), 1, "{}", text::print(&after));
}

#[test]
fn an_upgraded_softmax_keeps_empty_axes() {
    let graph = "<ir_version: 6, opset_import: [\"\" : 11]> g (float[A,B,C,3] x) => (float[A,B,C,3] y) { y = Softmax <axis = 1> (x) }";
    let before = text::parse(graph).unwrap();
    let feeds: Vec<Feed> = [[0, 2, 2, 3], [2, 0, 2, 3], [2, 2, 0, 3], [2, 2, 1, 3]]
        .iter()
        .map(|dims| vec![("x", floats(dims, &vec![0.5; dims.iter().product()]))])
        .collect();
    for opset in [13, 14, 17, 21] {
        let after = optimized(&before, |options| options.opset = Some(opset));
        // Version 13 has no way to write it.
        assert_eq!(after.opset(), if opset == 13 { 11 } else { opset });
        require_same(&before, &after, &feeds, 1e-6);
    }
}

#[test]
fn an_upgrade_leaves_a_mask_as_it_was() {
    let graph = "<ir_version: 5, opset_import: [\"\" : 10]> g (float[N,3] x) => (float[N,3] y, bool[N,3] m) { y, m = Dropout <ratio = 0.7> (x) }";
    let before = text::parse(graph).unwrap();
    let after = optimized(&before, |options| options.opset = Some(13));
    assert_eq!(after.opset(), 10);
    require_same(&before, &after, &[vec![("x", floats(&[1, 3], &[1.0, 2.0, 3.0]))]], 0.0);
}

#[test]
fn an_input_with_a_default_stays_an_input() {
    let default = |graph: &str, name: &str, tensor: Tensor| {
        let mut model = text::parse(&format!("<ir_version: 8, opset_import: [\"\" : 17]>\n{graph}")).unwrap();
        let inputs = model.graph.main().inputs().to_vec();
        let input = inputs.into_iter().find(|&v| model.graph.value(v).name == name).unwrap();
        model.graph.set_default(input, Some(Initializer::Dense(tensor)));
        model
    };
    let ones = "g (float[N,2] x, float[2] w) => (float[N,2] y) <float[2] v = {1, 1}> { t = Add (x, w) y = Mul (t, v) }";
    let chain = "g (float[N,4] x, float[1] w) => (float[N,4] y) <int64[3] a = {-1, 2, 2}, int64[2] b = {-1, 4}> {
        r = Reshape (x, a) q = Reshape (r, b) y = Mul (q, w) }";
    let constants = "g (float[N,2] x, float[2] w) => (float[N,2] y) { c = Constant <value = float[1] {1.0}> () t = Mul (x, c) y = Add (t, w) }";
    let dead = "g (float[N,2] x, float[2] w) => (float[N,2] y) <float[2] v = {1, 1}> { t = Add (x, v) y = Mul (x, w) }";
    for (graph, width) in [(ones, 2), (chain, 1), (dead, 2)] {
        let before = default(graph, "w", floats(&[width], &[0.5, 2.0][..width]));
        let after = optimized(&before, |_| {});
        let names: Vec<&str> =
            after.graph.main().inputs().iter().map(|&v| after.graph.value(v).name.as_str()).collect();
        assert_eq!(names, ["x", "w"], "{graph}");
        let columns = if width == 1 { 4 } else { 2 };
        let x = || floats(&[1, columns], &[1.0, 2.0, 3.0, 4.0][..columns]);
        let own = vec![("x", x()), ("w", floats(&[width], &[3.0, 4.0][..width]))];
        require_same(&before, &after, &[vec![("x", x())], own], 0.0);
    }
    // What old exporters write: every initializer is listed, and nothing but a node holds another constant.
    let after = optimized(&default(constants, "w", floats(&[2], &[0.5, 2.0])), |_| {});
    assert_eq!(after.graph.main().inputs().len(), 1);
}
