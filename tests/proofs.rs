//! What a comparison notices and what it lets pass: outputs of every size, random outputs, half precision, edges of sizes
//! and types; and how much work it takes.

#![allow(clippy::unwrap_used)]

mod common;

use lathe_ir::{Model, text};
use serde_json::Value;
use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;

struct Bench {
    folder: TempDir,
}

/// Exit code, standard output and standard error.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("{}{}", self.out, self.err))
    }
}

impl Bench {
    fn new() -> Bench {
        Bench { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, graph: &str) {
        let graph = format!("<ir_version: 8, opset_import: [\"\": 17]> {graph}");
        fs::write(self.path(name), text::parse(&graph).unwrap().to_bytes()).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        let output = command.current_dir(self.folder.path()).args(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Runs `optimize verify` on two models.
fn verify(a: &str, b: &str, options: &[&str]) -> Ran {
    let bench = Bench::new();
    bench.write("a.onnx", a);
    bench.write("b.onnx", b);
    bench.run(&[&["verify", "a.onnx", "b.onnx"], options].concat())
}

/// Expects exit code 3 and a sentence that holds `message`.
#[track_caller]
fn differs(a: &str, b: &str, message: &str) {
    let ran = verify(a, b, &[]);
    assert_eq!((ran.code, ran.err.contains(message)), (Some(3), true), "{}{}", ran.out, ran.err);
}

/// Expects exit code 0; the `verify` object.
#[track_caller]
fn equal(a: &str, b: &str) -> Value {
    let ran = verify(a, b, &["--json"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    ran.json()
}

/// `y = x · factor` in a type.
fn scaled(dtype: &str, factor: &str) -> String {
    format!("g ({dtype}[N,4] x) => ({dtype}[N,4] y) <{dtype} k = {{{factor}}}> {{ y = Mul (x, k) }}")
}

// An output is compared with its own size.

#[test]
fn small_outputs_are_compared_like_any() {
    differs(&scaled("float", "1e-8"), &scaled("float", "-3e-8"), "output `y`: the relative L2 error is 4.000e0");
    differs(&scaled("float", "1e-8"), &scaled("float", "2e-8"), "the relative L2 error is 1.000e0, the limit 1.0e-4");
    differs(&scaled("double", "1e-30"), &scaled("double", "0"), "the relative L2 error is 1.000e0, the limit 1.0e-6");
    differs(&scaled("float", "1e-8"), &scaled("float", "1.001e-8"), "the relative L2 error is 1.000e-3");
    let found = equal(&scaled("float", "1e-30"), &scaled("float", "1e-30"));
    assert_eq!((&found["note"], found["after"].as_f64()), (&Value::Null, Some(0.0)));
}

#[test]
fn squares_of_doubles_do_not_leave_their_range() {
    differs(&scaled("double", "1e-200"), &scaled("double", "-3e-200"), "the relative L2 error is 4.000e0");
    differs(&scaled("double", "1e200"), &scaled("double", "3e200"), "the relative L2 error is 2.000e0");
    equal(&scaled("double", "1e200"), &scaled("double", "1e200"));
}

#[test]
fn a_small_output_beside_a_large_one_is_compared_alone() {
    let model = |k: &str| {
        format!(
            "g (float[N,4] x) => (float[N,4] y, float[N,4] z) <float k = {{{k}}}> {{ y = Mul (x, k) z = Relu (x) }}"
        )
    };
    differs(&model("1e-9"), &model("2e-9"), "output `y`: the relative L2 error is 1.000e0");
}

// Rounding is measured.

/// Sums of centred rows: nothing but what rounding leaves.
const CENTRED: &str = "g (float[N,64] x) => (float[N,1] y) <int64[1] axes = {1}> {
    m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) y = ReduceSum (d, axes) }";

#[test]
fn what_rounding_leaves_is_no_difference() {
    // The same sum, taken before the rows are centred.
    let other = "g (float[N,64] x) => (float[N,1] y) <int64[1] axes = {1}, float n = {64}> {
        s = ReduceSum (x, axes) m = ReduceMean <axes = [-1]> (x) t = Mul (m, n) y = Sub (s, t) }";
    let found = equal(CENTRED, other);
    let excuse = &found["outputs"][0]["excuse"];
    assert_eq!(excuse["kind"], "rounding", "{found}");
    let (error, noise) = (excuse["error"].as_f64().unwrap(), excuse["noise"].as_f64().unwrap());
    assert!(0.0 < error && error <= 8.0 * noise && noise < 1e-5, "{found}");
    // The error is told as it is, and so is why it passes.
    assert!(found["after"].as_f64().unwrap() > 0.01, "{found}");
    let note = found["note"].as_str().unwrap();
    assert!(note.starts_with("`y` differs by ") && note.contains("rounding inside the original moves it by"), "{note}");
}

#[test]
fn an_exact_zero_has_the_noise_of_what_it_is_the_difference_of() {
    let zero = "g (float[N,4] x) => (float[N,4] y) <float k = {0.3}> {
        a = Mul (x, k) b = Mul (x, k) y = Sub (a, b) }";
    let nearly = "g (float[N,4] x) => (float[N,4] y) <float k = {0.3}, float l = {3.3333333}> {
        a = Mul (x, k) b = Div (x, l) y = Sub (a, b) }";
    let found = equal(zero, nearly);
    assert_eq!(found["outputs"][0]["excuse"]["kind"], "rounding", "{found}");
    // JSON has no infinity: the original is zero.
    assert_eq!(found["outputs"][0]["rel_l2"], Value::Null, "{found}");
    let wrong = nearly.replace("3.3333333", "3.334");
    differs(zero, &wrong, "output `y`: the relative L2 error is inf");
}

#[test]
fn more_than_noise_is_a_difference() {
    let shifted = CENTRED.replace("y = ReduceSum (d, axes)", "t = ReduceSum (d, axes) y = Add (t, k)");
    let shifted = shifted.replace("<int64[1] axes = {1}>", "<int64[1] axes = {1}, float k = {0.001}>");
    differs(CENTRED, &shifted, "output `y`: the relative L2 error is");
}

#[test]
fn a_decision_that_turns_is_no_noise() {
    // Whole numbers are rounded to themselves whatever happens around them; a step that is off by one is wrong.
    let steps = |k: &str| {
        format!(
            "g (float[N,4] x) => (float[N,4] y) <float k = {{{k}}}, float h = {{0.5}}> {{
                w = Floor (x) t = Mul (w, h) u = Add (t, t) y = Floor (u) z = Add (y, k) }}"
        )
        .replace("y = Floor (u) z = Add (y, k)", "f = Floor (u) y = Add (f, k)")
    };
    differs(&steps("0"), &steps("-1"), "output `y`: the relative L2 error is");
}

// Random outputs.

/// A model with a random output `r` beside `y`.
fn random(y: &str, outputs: &str, draw: &str) -> String {
    format!("g (float[N,4] x) => (float[N,4] r, {outputs}) {{ {draw} {y} }}")
}

const DRAW: &str = "q = RandomUniformLike (x) r = Add (x, q)";

#[test]
fn a_random_output_does_not_hide_the_others() {
    let relu = random("y = Relu (x)", "float[N,4] y", DRAW);
    differs(&relu, &random("y = Neg (x)", "float[N,4] y", DRAW), "output `y`: the relative L2 error is");
    let flat = random("i = Constant <value_ints = [0]> () y = Unsqueeze (x, i)", "float[1,N,4] y", DRAW);
    differs(&flat, &relu, "output `y`: expected float[1, 1, 4], found float[1, 4]");
    let unknown = random("y = NoSuchOperator (x)", "float[N,4] y", DRAW);
    differs(&relu, &unknown, "the original runs but the result does not");
    let found = equal(&relu, &relu);
    assert_eq!((&found["note"], &found["outputs"][0]["uncompared"]), (&Value::Null, &Value::Null), "{found}");
}

#[test]
fn random_operators_draw_the_same_numbers_in_both() {
    let model = |body: &str| format!("g (float[N,4] x) => (float[N,4] y) {{ {body} }}");
    let sum = model("q = RandomNormalLike (x) y = Add (x, q)");
    let found = equal(&sum, &model("i = Identity (x) q = RandomNormalLike (x) y = Add (q, i)"));
    assert_eq!(found["outputs"][0]["rel_l2"], 0.0, "{found}");
    differs(&sum, &model("q = RandomNormalLike (x) y = Sub (x, q)"), "output `y`: the relative L2 error is");
    differs(&sum, &model("q = RandomNormalLike <mean = 1.0> (x) y = Add (x, q)"), "output `y`: the relative L2 error");
    let dice = |low: &str| {
        model(&format!("h = Sigmoid (x) q = Bernoulli (h) l = Constant <value_float = {low}> () y = Mul (q, l)"))
    };
    equal(&dice("1.0"), &dice("1.0"));
    differs(&dice("1.0"), &dice("2.0"), "output `y`: the relative L2 error is 1.000e0");
}

#[test]
fn what_is_random_stays_random() {
    let model = |body: &str| format!("g (float[N,4] x) => (float[N,4] y) {{ {body} }}");
    let random = model("q = RandomNormalLike (x) y = Add (x, q)");
    differs(&random, &model("y = Relu (x)"), "it is random in the original, and the same in every run of the result");
    // Two draws in the place of one: nothing to seed alike, and still random.
    let two = model("a = RandomUniformLike (x) b = RandomUniformLike (x) c = Add (a, b) y = Add (x, c)");
    let found = equal(&random, &two);
    let why = found["outputs"][0]["uncompared"].as_str().unwrap();
    assert_eq!(why, "it is random, and what draws its numbers is not found in both models");
    assert!(found["note"].as_str().unwrap().starts_with("of `y` only type and shape were compared"), "{found}");
}

#[test]
fn a_run_compares_what_is_not_random() {
    let bench = Bench::new();
    // The scale of the variance has another rank than the row: what is normalized has an axis more.
    bench.write(
        "model.onnx",
        "g (float[N,4] x) => (float[N,4] r, float[1,N,4] y) <float[1,1,1] eps = {1e-5}> {
            q = RandomUniformLike (x) r = Add (x, q)
            m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Mul (d, d) v = ReduceMean <axes = [-1]> (p)
            e = Add (v, eps) s = Sqrt (e) y = Div (d, s) }",
    );
    let ran = bench.run(&["model.onnx", "-o", "out.onnx", "--report", "report.json"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("verified against the original"), "{}", ran.out);
    let report: Value = serde_json::from_slice(&fs::read(bench.path("report.json")).unwrap()).unwrap();
    assert_eq!(report["verify"]["outputs"].as_array().unwrap().len(), 2);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    let y = model.graph.main().outputs()[1];
    assert_eq!(model.graph.value(y).ty.as_ref().unwrap().shape().unwrap().dims.len(), 3);
    let same = bench.run(&["verify", "model.onnx", "out.onnx"]);
    assert_eq!(same.code, Some(0), "{}{}", same.out, same.err);
}

// Half precision.

/// A chain of 24 additions of numbers that half precision does not hold, one after the other or in pairs.
fn halves(body: &str) -> String {
    // Halves are written as their bits: a third, and 24 of them.
    format!(
        "g (float16[N,64] x) => (float16[N,64] y) <float16 third = {{13653}}, float16 sum = {{18432}}> {{ {body} }}"
    )
}

#[test]
fn half_precision_is_judged_against_float32() {
    // The runtime adds in float32, and rounds where several operators in a row move halves.
    let step = |i: i32| format!("s{i} = Add (t{}, third) r{i} = Identity (s{i}) t{i} = Identity (r{i}) ", i - 1);
    let chain: String = (1..25).map(step).collect();
    let rounded = halves(&format!("t0 = Identity (x) {chain} y = Sub (t24, sum)"));
    // One addition rounds once, the chain 24 times: they differ by more than the limit, and the chain is the one that is off.
    let exact = halves(
        "c = Cast <to = 1> (x) s = Cast <to = 1> (sum) k = Cast <to = 1> (third) n = Constant <value_float = 24.0> () \
                        m = Mul (k, n) a = Add (c, m) b = Sub (a, s) y = Cast <to = 10> (b)",
    );
    let found = equal(&rounded, &exact);
    let output = &found["outputs"][0];
    assert_eq!((&output["limit"], &output["excuse"]["kind"]), (&2e-3.into(), &"half-precision".into()), "{found}");
    assert!(output["rel_l2"].as_f64().unwrap() > 2e-3, "{found}");
    let (candidate, reference) = (output["excuse"]["candidate"].as_f64(), output["excuse"]["reference"].as_f64());
    assert!(candidate.unwrap() < reference.unwrap(), "{found}");
    assert!(found["note"].as_str().unwrap().contains("from the original computed in float32"), "{found}");
    // The other way round the candidate is many times as far from float32 as the reference.
    differs(&exact, &rounded, "output `y`: the relative L2 error is");
}

#[test]
fn the_limit_is_the_one_of_the_worst_output() {
    let bench = Bench::new();
    bench.write(
        "model.onnx",
        "g (float16[N,8] x) => (float16[N,8] y, int64[1] s) <float16[8,8] w = {WEIGHTS}> {
            i = Identity (x) y = MatMul (i, w) s = Size (x) }"
            .replace("WEIGHTS", &vec!["13653"; 64].join(", "))
            .replace("int64[1] s", "int64 s")
            .as_str(),
    );
    let ran = bench.run(&["model.onnx", "-o", "out.onnx"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("in `y` (limit 2e-3)"), "{}", ran.out);
}

// Edges of sizes and types.

#[test]
fn the_result_runs_at_every_size_at_which_the_original_runs() {
    let same = "g (float[N,4] x) => (float[N,4] y) { y = Identity (x) }";
    // A size is inferred beside 0, which no runtime does.
    let inferred = "g (float[N,4] x) => (float[N,4] y) <int64[2] to = {0, -1}> { y = Reshape (x, to) }";
    differs(same, inferred, "the original runs but the result does not");
    differs(same, inferred, "(at N = 0)");
    // The other way round the original does not run there, so that nothing is asked of the result; that is told.
    let found = equal(inferred, same);
    let left_out = found["left_out"][0].as_str().unwrap();
    assert!(left_out.starts_with("N = 0: ") && left_out.contains("Reshape"), "{found}");
    assert_eq!(equal(same, same)["left_out"], Value::Array(Vec::new()));
}

#[test]
fn shapes_are_the_same_at_size_zero() {
    let model = |body: &str, constants: &str| format!("g (float[N,4] x) => (int64 y) {constants} {{ {body} }}");
    let counted = model("y = Size (x)", "");
    let at_least_one = model("s = Size (x) y = Max (s, four)", "<int64 four = {4}>");
    differs(&counted, &at_least_one, "output `y`: 1 of 1 elements differ, by at most 4 (run at N = 0)");
}

#[test]
fn shapes_are_the_same_at_size_one() {
    let named = "g (float[1,seq,4] x) => (float[seq,4] y) <int64[1] axes = {0}> { y = Squeeze (x, axes) }";
    let every = "g (float[1,seq,4] x) => (float[seq,4] y) { y = Squeeze (x) }";
    differs(named, every, "output `y`: expected float[1, 4], found float[4] (run at seq = 1)");
    // One step of a batch of several, which is not a batch of one.
    let named = "g (float[batch,seq,4] x) => (float[batch,seq,4] y) { y = Identity (x) }";
    let once = "g (float[batch,seq,4] x) => (float[batch,seq,4] y) <int64[1] axes = {1}, int64 one = {1}> {
        s = Shape <start = 1, end = 2> (x) b = Shape <start = 0, end = 1> (x) i = Equal (s, one) j = Greater (b, one)
        a = And (i, j) f = Cast <to = 1> (a) y = Add (x, f) }";
    differs(named, once, "(run at batch = 3, seq = 1)");
}

#[test]
fn rows_that_are_masked_throughout_are_compared() {
    let attention = |mask: &str, keep: &str, low: &str| {
        format!(
            "g (float[N,S] x, {mask}[N,S] {keep}) => (float[N,S] y) <float low = {{{low}}}> {{
                k = Cast <to = 9> ({keep}) s = Where (k, x, low) y = Softmax (s) }}"
        )
    };
    let message = "elements are NaN or infinite in only one of the two";
    for (mask, keep) in [("bool", "attention_mask"), ("int64", "attention_mask"), ("bool", "keep"), ("int64", "keep")] {
        let [nothing, finite] = ["-inf", "-1e9"].map(|low| attention(mask, keep, low));
        // Where anything is kept they agree; a row without anything has no sum to divide by.
        let ran = verify(&nothing, &finite, &[]);
        assert_eq!((ran.code, ran.err.contains(message)), (Some(3), true), "{mask} {keep}: {}{}", ran.out, ran.err);
        assert!(ran.err.contains(", a row masked throughout)"), "{}", ran.err);
        equal(&finite, &finite);
        equal(&nothing, &nothing);
    }
}

#[test]
fn whole_numbers_are_compared_at_the_ends_of_their_types() {
    let model = |body: &str| format!("g (int64[N,4] x) => (int64[N,4] y) {{ {body} }}");
    let (same, through) = (model("y = Identity (x)"), model("d = Cast <to = 11> (x) y = Cast <to = 7> (d)"));
    differs(&same, &through, "N = 3, whole numbers at the ends of their types");
    let clip = |most: &str| {
        format!(
            "g (int64[N,4] x) => (int64[N,4] y) <int64 most = {{{most}}}> {{ z = Constant <value_int = -9> () y = Clip (x, z, most) }}"
        )
    };
    differs(&clip("9007199254740993"), &clip("9007199254740992"), "elements differ, by at most 1 ");
    equal(&clip("9007199254740993"), &clip("9007199254740993"));
    // Where numbers are rounded, large ones are all noise.
    let wave = |body: &str| {
        format!(
            "g (int64[N,4] t) => (float[N,4] y) <float k = {{0.1}}, float l = {{10}}> {{ f = Cast <to = 1> (t) {body} y = Sin (p) }}"
        )
    };
    let found = equal(&wave("p = Mul (f, k)"), &wave("p = Div (f, l)"));
    assert!(!found["sizes"].to_string().contains("whole numbers"), "{found}");
    assert!(equal(&same, &same)["sizes"].to_string().contains("whole numbers"));
}

#[test]
fn bits_are_compared_at_the_edges_of_types() {
    let model = |body: &str, constants: &str| format!("g (float[N,4] x) => (float[N,4] y) {constants} {{ {body} }}");
    let (same, squared) = (model("y = Identity (x)", ""), model("s = Mul (x, k) y = Div (s, k)", "<float k = {2}>"));
    assert_eq!(verify(&same, &same, &["--bits"]).code, Some(0));
    // Twice the largest number is infinite.
    let ran = verify(&same, &squared, &["--bits"]);
    assert_eq!(
        (ran.code, ran.err.contains("values at the edges of their types")),
        (Some(3), true),
        "{}{}",
        ran.out,
        ran.err
    );
    equal(&same, &squared);
}

#[test]
fn a_run_tells_with_v_where_the_original_does_not_run() {
    let bench = Bench::new();
    bench.write(
        "model.onnx",
        "g (float[N,4] x) => (float[N,4] y) <int64[2] to = {0, -1}> { r = Reshape (x, to) n = Neg (r) y = Neg (n) }",
    );
    let run = |options: &[&str]| bench.run(&[&["model.onnx", "-o", "out.onnx", "--overwrite"], options].concat());
    let (loud, usual) = (run(&["-v"]), run(&[]));
    assert_eq!((loud.code, usual.code), (Some(0), Some(0)), "{}{}", loud.out, loud.err);
    assert!(loud.out.contains("not compared: N = 0: ") && !usual.out.contains("not compared"), "{}", loud.out);
}

#[test]
fn rotary_embeddings_of_onnx_runtime_take_an_empty_batch() {
    let bench = Bench::new();
    bench.write(
        "model.onnx",
        "g (float[B,2,S,4] x, float[B,S] p) => (float[B,2,S,4] y)
        <float[2] rates = {1, 0.1}, int64[1] one = {1}, int64[1] end = {-1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}> {
            u = Unsqueeze (p, end) f = Mul (u, rates) both = Concat <axis = -1> (f, f)
            c = Cos (both) s = Sin (both) cos = Unsqueeze (c, one) sin = Unsqueeze (s, one)
            low = Slice (x, zero, two, end) high = Slice (x, two, four, end) minus = Neg (high)
            turned = Concat <axis = -1> (minus, low) a = Mul (x, cos) b = Mul (turned, sin) y = Add (a, b) }",
    );
    let ran = bench.run(&["model.onnx", "-o", "out.onnx", "--target", "ort", "--report", "report.json"]);
    assert_eq!((ran.code, ran.err.contains("left out")), (Some(0), false), "{}{}", ran.out, ran.err);
    let report: Value = serde_json::from_slice(&fs::read(bench.path("report.json")).unwrap()).unwrap();
    let sizes = report["verify"]["sizes"].to_string();
    assert!(sizes.contains("B = 0, ") && sizes.contains("S = 0"), "{sizes}");
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(text::print(&model).contains("RotaryEmbedding"), "{}", text::print(&model));
}

// Work.

#[test]
fn a_search_that_finds_no_sizes_says_how_to_state_them() {
    // No size divides both ways.
    let never = "g (float[a,b,c,d,e,f,g] x) => (float[h,i] y) <int64[2] to = {977, 991}> { y = Reshape (x, to) }";
    let start = Instant::now();
    let ran = verify(never, never, &[]);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert_eq!((ran.code, ran.err.contains("; --input-shape states its sizes")), (Some(1), true), "{}", ran.err);
    assert!(ran.err.contains("(tried a = ") && ran.err.contains(" more)"), "{}", ran.err);
}

#[test]
fn sizes_keep_to_a_budget_of_work() {
    // 0.7 MFLOP a voxel: 12 GFLOP for 4 slices of 64², 116 for three times 6 slices of 96².
    let model = "g (float[N,32,D,H,W] x) => (float[N,32,D,H,W] y) <int64[5] shape = {32, 32, 7, 7, 7}> {
        w = ConstantOfShape (shape) c = Conv <pads = [3, 3, 3, 3, 3, 3]> (x, w) y = Add (c, x) }";
    let found = equal(model, model);
    let sizes: Vec<&str> = found["sizes"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(sizes[..2], ["D = 4, H = 64, N = 1, W = 64", "D = 3, H = 32, N = 2, W = 32"]);
}

/// A model that would take a minute if a branch were taken that never is.
fn heavy(dims: &str) -> String {
    format!(
        "g (float[{dims}] x) => (float[{dims}] y) <int64[2] square = {{8192, 8192}}, float never = {{1e30}}> {{
            m = ReduceMax <keepdims = 0> (x) c = Greater (m, never)
            y = If (c) <
                then_branch = t () => (float[{dims}] z) {{
                    a = ConstantOfShape (square) b = MatMul (a, a) d = ReduceMax <keepdims = 0> (b) z = Add (x, d) }},
                else_branch = e () => (float[{dims}] r) {{ r = Relu (x) }}
            > }}"
    )
}

#[test]
fn a_model_that_takes_long_is_run_on_one_set_of_inputs() {
    let sizes = |model: &str| equal(model, model)["sizes"].as_array().unwrap().len();
    let light = "g (float[2,4] x) => (float[2,4] y) { y = Relu (x) }";
    assert_eq!([light, &heavy("2,4")].map(sizes), [2, 1]);
    // Edges do not fit either, which is told.
    let found = equal(&heavy("N,4"), &heavy("N,4"));
    assert_eq!(found["sizes"], serde_json::json!(["N = 1"]));
    assert_eq!(found["left_out"], serde_json::json!(["N = 0: that would take too long"]));
    // What is wrong is found all the same.
    differs(&heavy("N,4"), &heavy("N,4").replace("Relu (x)", "Neg (x)"), "output `y`: the relative L2 error is");
}
