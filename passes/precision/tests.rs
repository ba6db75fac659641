//! One small graph for every rule. What is converted is simulated, and run as it is.

use super::*;
use lathe_ir::{Model, ScopeId, Tensor, text};
use lathe_testkit::{Claim, Verdict};

const FLOAT16: Precision = Precision { dtype: DataType::Float16, interface: false };
const BFLOAT16: Precision = Precision { dtype: DataType::Bfloat16, interface: false };

/// A graph that may read `w`, a constant of 64 times 64 numbers between −0.15 and 0.15.
fn parse(opset: i64, inputs: &str, outputs: &str, constants: &str, body: &str) -> Model {
    let numbers: Vec<String> = (0..64 * 64).map(|i| format!("{:e}", (i * 37 % 101) as f32 / 300.0 - 0.15)).collect();
    let constants = if constants.is_empty() { String::new() } else { format!(", {constants}") };
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : {opset}]> g ({inputs}) => ({outputs}) \
         <float[64, 64] w = {{{}}}{constants}> {{ {body} }}",
        numbers.join(", ")
    );
    let model = text::parse(&source).unwrap_or_else(|error| panic!("{error}\n{body}"));
    model.check().unwrap();
    model
}

/// What values get to on seeded inputs.
fn measured(model: &Model) -> Magnitudes {
    let watched = watch(model).unwrap();
    let anything = Claim::Within { rtol: f64::MAX };
    let Verdict::Compared(report) = lathe_testkit::verdict(&watched.model, &watched.zeros, anything, 1).unwrap() else {
        panic!("the model cannot be watched")
    };
    watched.read(report.comparison.outputs.iter().map(|output| (output.name.as_str(), output.max_abs)))
}

fn converted(model: &Model, precision: Precision) -> (Model, Converted) {
    let prepared = Prepared::new(model, precision, true).unwrap();
    let magnitudes = measured(&prepared.model);
    assert!(prepared.masks_hold(&magnitudes));
    let converted = convert(&prepared, precision, &magnitudes, &BTreeMap::new()).unwrap();
    converted.model.check().unwrap();
    check_types(&converted.model).unwrap_or_else(|fault| panic!("{fault}\n{}", text::print(&converted.model)));
    (prepared.model, converted)
}

/// Converts, and holds the simulation to the tolerance. Float16 is loaded and run as it is, too, which on a processor says
/// nothing of rounding.
fn half_of(model: &Model, precision: Precision) -> Converted {
    let (_, converted) = converted(model, precision);
    let simulation = simulate(&converted);
    simulation.model.check().unwrap();
    let claim = Claim::Within { rtol: precision.tolerance() };
    let show = |why: String| -> ! { panic!("{why}\n{}", text::print(&converted.model)) };
    lathe_testkit::equivalent(model, &simulation.model, claim, 1).unwrap_or_else(|why| show(why));
    if precision == FLOAT16 {
        let anything = Claim::Within { rtol: f64::MAX };
        lathe_testkit::equivalent(model, &converted.model, anything, 1).unwrap_or_else(|why| show(why));
    }
    converted
}

fn half(inputs: &str, outputs: &str, constants: &str, body: &str) -> Converted {
    half_of(&parse(17, inputs, outputs, constants, body), FLOAT16)
}

/// The operators that compute in half precision, in order.
fn in_half(converted: &Converted) -> Vec<&str> {
    let graph = &converted.model.graph;
    let nodes = graph.nodes(ScopeId::MAIN).filter(|id| converted.nodes.contains(id));
    nodes.map(|id| graph.node(id).op_type.as_str()).collect()
}

/// Why the node with this label stays.
fn reason<'c>(converted: &'c Converted, label: &str) -> &'c str {
    let kept = converted.kept.iter().find(|kept| kept.node.contains(&format!("`{label}`")));
    kept.map_or_else(|| panic!("`{label}` does not stay: {:?}", converted.kept), |kept| &kept.reason)
}

fn count(converted: &Converted, op: &str) -> usize {
    let graph = &converted.model.graph;
    graph.nodes(ScopeId::MAIN).filter(|&id| graph.node(id).is(op)).count()
}

#[test]
fn a_layer_computes_in_half_precision_between_two_casts() {
    let found = half("float[n, 64] x", "float[n, 64] y", "", "h = MatMul (x, w) y = Relu (h)");
    assert_eq!(in_half(&found), ["MatMul", "Relu"]);
    assert_eq!((found.casts, count(&found, "Cast")), (2, 2));
    let weight = found.model.graph.find_value("w").unwrap();
    assert_eq!(found.model.graph.constant(weight).map(Tensor::dtype), Some(DataType::Float16));
}

#[test]
fn a_value_is_cast_once_for_all_that_read_it() {
    let body = "a = MatMul (x, w) b = MatMul (x, w) [c] c = Add (a, b) [i] i = Cast <to = 7> (c) [j] j = Cast <to = 6> (c) y = Relu (c)";
    let found = half_of(
        &parse(
            17,
            "float[n, 64] x",
            "float[n, 64] y",
            "",
            &body.replace("[i] i = Cast <to = 7> (c) [j] j = Cast <to = 6> (c) ", ""),
        ),
        FLOAT16,
    );
    assert_eq!((found.casts, in_half(&found).len()), (2, 4));
    // The chain up to the casts makes whole numbers, and the products are behind its end.
    let (_, whole) = converted(&parse(17, "float[n, 64] x", "int64[n, 64] i, int32[n, 64] j", "", body), FLOAT16);
    assert_eq!(reason(&whole, "c"), "whole numbers are computed by it");
    assert_eq!((whole.casts, in_half(&whole)), (3, vec!["MatMul", "MatMul"]));
}

#[test]
fn inputs_and_outputs_change_where_that_is_asked_for() {
    let model = parse(17, "float[n, 64] x", "float[n, 64] y", "", "h = MatMul (x, w) y = Relu (h)");
    let precision = Precision { interface: true, ..FLOAT16 };
    let (_, found) = converted(&model, precision);
    let main = found.model.graph.main();
    let elem = |value| found.model.graph.value(value).ty.as_ref().and_then(lathe_ir::Type::elem);
    let names: Vec<_> =
        main.inputs().iter().chain(main.outputs()).map(|&v| (&*found.model.graph.value(v).name, elem(v))).collect();
    assert_eq!(names, [("x", Some(DataType::Float16)), ("y", Some(DataType::Float16))]);
    assert_eq!(found.casts, 0);
    let simulation = simulate(&found);
    let claim = Claim::Within { rtol: precision.tolerance() };
    lathe_testkit::equivalent(&model, &simulation.model, claim, 1).unwrap();
}

/// Softmax of scores with masks on them.
fn masked(mask: &str, adds: &str) -> Model {
    let constants = format!("float zero = {{0}}, float mask = {{{mask}}}");
    let body = format!("s = MatMul (x, w) m = Where (c, zero, mask) {adds} p = Softmax (b) y = MatMul (p, w)");
    parse(17, "float[n, 64] x, bool[n, 64] c", "float[n, 64] y", &constants, &body)
}

/// Seeded inputs have a row that is masked throughout: it stays uniform, as it was.
#[test]
fn two_masks_add_up_to_no_infinity() {
    let twice = "a = Add (s, m) b = Add (a, m)";
    for model in [masked("-1e9", twice), masked("-3.4028235e38", "b = Add (s, m)")] {
        let found = half_of(&model, FLOAT16);
        assert!(in_half(&found).contains(&"Add") && in_half(&found).contains(&"Softmax"), "{:?}", found.kept);
    }
}

#[test]
fn masks_keep_their_numbers_beside_large_scores() {
    let model = masked("-1e9", "g = Div (s, mask) b = Add (g, m)");
    // The constant is a divisor too.
    assert!(Prepared::new(&model, FLOAT16, true).unwrap().masks.is_empty());
    let model = masked("-1e9", "b = Add (s, m)");
    let prepared = Prepared::new(&model, FLOAT16, true).unwrap();
    assert_eq!(prepared.masks, ["mask"]);
    let scores = prepared.model.graph.find_value("s").unwrap();
    let reaching = |largest: f64| Magnitudes::from_iter([(scores, Magnitude { largest, smallest: None })]);
    assert!(prepared.masks_hold(&reaching(900.0)) && !prepared.masks_hold(&reaching(1100.0)));
}

#[test]
fn an_infinite_mask_stays_infinite() {
    let constants = "float zero = {0}, float mask = {-inf}";
    let body = "s = MatMul (x, w) m = Where (c, zero, mask) a = Add (s, m) p = Softmax (a) n = IsNaN (p) \
                g = Where (n, zero, p) y = MatMul (g, w)";
    let model = parse(17, "float[n, 64] x, bool[n, 64] c", "float[n, 64] y", constants, body);
    let prepared = Prepared::new(&model, FLOAT16, true).unwrap();
    assert!(prepared.masks.is_empty());
    let found = half_of(&model, FLOAT16);
    assert_eq!(found.kept, []);
}

#[test]
fn a_large_constant_that_is_no_mask_blocks_what_reads_it() {
    let found = half(
        "float[n, 64] x",
        "float[n, 64] y",
        "float c = {1e6}",
        "h = MatMul (x, w) [d] d = Div (h, c) y = MatMul (d, w)",
    );
    assert_eq!(reason(&found, "d"), "its constant `c` holds 1.000e6, which is beyond the range of float16");
    assert_eq!(in_half(&found), ["MatMul"]);
    // What is left of it is too small for float16, so the next product stays too.
    let product = &found.kept.last().unwrap().reason;
    assert!(product.starts_with("`d` is") && product.ends_with("which float16 has few digits for"), "{product}");
}

#[test]
fn a_bound_that_bounds_nothing_is_dropped() {
    let constants = "float zero = {0}, float most = {3.4028235e38}, float least = {-3.4028235e38}";
    let body = "h = MatMul (x, w) c = Clip (h, zero, most) m = Max (c, least) y = MatMul (m, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", constants, body);
    assert_eq!(in_half(&found), ["MatMul", "Clip", "Max", "MatMul"]);
    let graph = &found.model.graph;
    let clip = graph.nodes(ScopeId::MAIN).find(|&id| graph.node(id).is("Clip")).unwrap();
    assert_eq!(graph.node(clip).inputs().len(), 2);
}

#[test]
fn what_keeps_from_dividing_by_zero_stays() {
    let body =
        "h = MatMul (x, w) a = Abs (h) [e] e = Add (a, eps) [r] r = Sqrt (e) [d] d = Div (h, r) y = MatMul (d, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", "float eps = {1e-12}", body);
    assert!(reason(&found, "e").starts_with("its constant `eps` holds 1.0e-12"), "{}", reason(&found, "e"));
    for label in ["r", "d"] {
        assert_eq!(reason(&found, label), "a constant that keeps it from dividing by zero would vanish");
    }
}

#[test]
fn a_norm_that_is_spelled_out_stays_as_a_group() {
    let body = "h = MatMul (x, w) [m] m = ReduceMean <axes = [-1]> (h) [d] d = Sub (h, m) [q] q = Pow (d, two) \
                [v] v = ReduceMean <axes = [-1]> (q) [e] e = Add (v, eps) [r] r = Sqrt (e) [n] n = Div (d, r) y = MatMul (n, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", "float two = {2}, float eps = {0.001}", body);
    for label in ["m", "d", "q", "v", "e", "r", "n"] {
        assert!(reason(&found, label).contains("it belongs to a normalization"), "{label}: {}", reason(&found, label));
    }
    assert_eq!((in_half(&found), found.casts), (vec!["MatMul", "MatMul"], 4));
}

#[test]
fn whole_numbers_stay_where_they_are_exact() {
    let body = "[p] p = Cast <to = 1> (i) [s] s = Mul (p, three) [t] t = Add (s, three) [f] f = Mul (t, half) \
                u = MatMul (x, w) [a] a = Add (u, f) y = MatMul (a, w)";
    let found =
        half("float[n, 64] x, int64[n, 64] i", "float[n, 64] y", "float three = {3}, float half = {0.001}", body);
    for label in ["p", "s", "t", "f"] {
        assert_eq!(reason(&found, label), "whole numbers are carried in its floats");
    }
}

#[test]
fn shapes_that_are_computed_in_floats_stay() {
    let body = "h = MatMul (x, w) s = Shape (h) [f] f = Cast <to = 1> (s) [m] m = Mul (f, k) [c] c = Ceil (m) \
                i = Cast <to = 7> (c) e = Expand (one, i) z = Concat <axis = 0> (h, e) y = MatMul (z, w)";
    let found = half("float[2, 64] x", "float[m, 64] y", "float[2] k = {2.5, 1}, float[1, 1] one = {1}", body);
    for label in ["f", "m", "c"] {
        assert!(reason(&found, label).contains("whole numbers"), "{}", reason(&found, label));
    }
    assert!(in_half(&found).contains(&"Concat"));
}

#[test]
fn scales_of_a_resize_stay_and_its_data_changes() {
    let body = "h = MatMul (x, w) r = Resize <mode = \"linear\"> (h, , k) y = MatMul (w, r)";
    let found = half("float[1, 1, 64, 64] x", "float[1, 1, 64, m] y", "float[4] k = {1, 1, 1, 2}", body);
    assert_eq!(in_half(&found), ["MatMul", "Resize", "MatMul"]);
    let scales = found.model.graph.find_value("k").unwrap();
    assert_eq!(found.model.graph.constant(scales).map(Tensor::dtype), Some(DataType::Float));
}

#[test]
fn choices_stay() {
    let body = "h = MatMul (x, w) [t] v, i = TopK (h, k) g = MatMul (h, w) [c] c = Greater (g, h) y = Where (c, g, h)";
    let found = half("float[n, 64] x", "float[n, 4] v, float[n, 64] y", "int64[1] k = {4}", body);
    for label in ["t", "c"] {
        assert_eq!(reason(&found, label), "what it chooses may change by rounding");
    }
    assert!(in_half(&found).starts_with(&["MatMul", "MatMul"]));
}

#[test]
fn boxes_that_are_selected_stay_with_what_computes_them() {
    let body = "h = MatMul (x, w) [d] d = Mul (h, k) [b] b = Slice (d, from, to, axis) [r] r = Reshape (b, shape) \
                [s] s = Sigmoid (h) [u] u = Reshape (s, scores) [i] i = NonMaxSuppression (r, u, most) y = MatMul (h, w)";
    let constants = "float k = {2}, int64[1] from = {0}, int64[1] to = {4}, int64[1] axis = {1}, int64[3] shape = {1, 64, 4}, \
                     int64[3] scores = {1, 64, 64}, int64 most = {3}";
    // Which boxes are selected hangs on the scores that the product gives, so that outputs are not compared.
    let (_, found) =
        converted(&parse(17, "float[64, 64] x", "int64[m, 3] i, float[64, 64] y", constants, body), FLOAT16);
    for label in ["d", "b", "r", "s", "u"] {
        assert_eq!(reason(&found, label), "coordinates are computed by it");
    }
    assert!(reason(&found, "i").contains("float16") || reason(&found, "i").contains("chooses"));
    assert_eq!(in_half(&found), ["MatMul", "MatMul"]);
}

#[test]
fn choices_are_known_by_what_they_choose_among() {
    let body = "h = MatMul (x, w) v, i = TopK (h, k) [s] s = Sigmoid (v) u, y = TopK (s, k) z = MatMul (h, w)";
    let outputs = "float[n, 4] v, int64[n, 4] y, float[n, 64] z";
    let model = parse(17, "float[n, 64] x", outputs, "int64[1] k = {4}", body);
    let choices = Choices::of(&model);
    assert_eq!(choices.outputs.into_iter().collect::<Vec<_>>(), [0, 1]);
    assert_eq!(choices.candidates, [model.graph.find_value("h").unwrap()]);
}

#[test]
fn angles_of_several_turns_stay() {
    let body = "[a] a = MatMul (x, w) [m] m = Mul (a, k) [s] s = Sin (m) y = MatMul (s, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", "float k = {100}", body);
    assert_eq!(reason(&found, "s"), "it reads angles of several turns");
    for label in ["a", "m"] {
        assert_eq!(reason(&found, label), "angles of several turns are computed by it");
    }
    let small = half("float[n, 64] x", "float[n, 64] y", "float k = {0.1}", body);
    assert_eq!(in_half(&small), ["MatMul", "Mul", "Sin", "MatMul"]);
}

#[test]
fn what_comes_near_the_end_of_the_range_stays() {
    let body = "h = MatMul (x, w) [m] m = Mul (h, k) [d] d = Mul (m, l) y = MatMul (d, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", "float k = {20000}, float l = {0.0001}", body);
    for label in ["m", "d"] {
        assert!(reason(&found, label).contains("more than an eighth of float16's range"), "{}", reason(&found, label));
    }
    assert_eq!(in_half(&found), ["MatMul", "MatMul"]);
}

#[test]
fn what_float16_has_few_digits_for_stays_unless_it_is_added_to_more() {
    let body = "h = MatMul (x, w) [m] m = Mul (h, k) a = Add (m, h) y = MatMul (a, w)";
    let added =
        half("float[n, 64] x", "float[n, 64] y", "float k = {0.0001}", &body.replace("Add (m, h)", "Add (h, m)"));
    assert_eq!(added.kept, []);
    let read =
        half("float[n, 64] x", "float[n, 64] y", "float k = {0.0000001}", &body.replace("Add (m, h)", "Neg (m)"));
    assert!(reason(&read, "m").contains("which float16"), "{}", reason(&read, "m"));
}

#[test]
fn local_functions_are_inlined() {
    let text = "<ir_version: 10, opset_import: [\"\" : 17, \"own\" : 1]> g (float[n, 64] x) => (float[n, 64] y) \
                { h = own.twice (x) y = own.twice (h) } \
                <domain: \"own\", opset_import: [\"\" : 17]> twice (a) => (c) { b = Add (a, a) c = Sigmoid (b) }";
    let model = text::parse(text).unwrap();
    let found = half_of(&model, FLOAT16);
    assert!(found.kept.iter().all(|kept| !kept.node.contains("twice")), "{:?}", found.kept);
    assert_eq!(found.nodes.len() + found.kept.len(), 4);
}

#[test]
fn long_sums_stay() {
    let body = "h = MatMul (x, w) [s] s = ReduceSum (h, axis) g = MatMul (h, w) [m] m = ReduceSum (g, last) z = Add (g, m) y = Add (z, s)";
    let constants = "int64[1] axis = {0}, int64[1] last = {-1}";
    let (_, found) = converted(&parse(17, "float[n, 64] x", "float[n, 64] y", constants, body), FLOAT16);
    assert_eq!(reason(&found, "s"), "how many numbers it adds up is not known");
    assert!(in_half(&found).contains(&"ReduceSum"));
}

#[test]
fn subgraphs_compute_in_float32() {
    let body = "h = MatMul (x, w) [if] z = If (c) < \
                  then_branch = t () => (float[n, 64] p) { p = Relu (h) }, \
                  else_branch = e () => (float[n, 64] q) { q = Neg (h) } > y = MatMul (z, w)";
    let found = half("float[n, 64] x, bool c", "float[n, 64] y", "", body);
    assert_eq!(reason(&found, "if"), "its subgraphs compute in float32");
    // In, what the branches capture, what comes of them, out.
    assert_eq!((in_half(&found), found.casts), (vec!["MatMul", "MatMul"], 4));
}

#[test]
fn states_of_a_loop_are_float32() {
    let body = "h = MatMul (x, w) [loop] z = Loop (k, , h) < \
                  body = b (int64 i, bool go, float[n, 64] s) => (bool on, float[n, 64] t) \
                    { on = Identity (go) r = Relu (s) t = Add (r, h) } > y = MatMul (z, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", "int64 k = {3}", body);
    assert_eq!(reason(&found, "loop"), "its subgraphs compute in float32");
    assert_eq!((in_half(&found), found.casts), (vec!["MatMul", "MatMul"], 4));
}

#[test]
fn a_constant_that_both_read_is_stored_twice() {
    let body = "h = MatMul (x, w) [t] v, i = TopK (w, k) y = MatMul (h, w)";
    let found = half("float[n, 64] x", "float[n, 64] y, float[64, 4] v", "int64[1] k = {4}", body);
    let graph = &found.model.graph;
    let types: Vec<DataType> = graph
        .initializers(ScopeId::MAIN)
        .filter_map(|value| graph.constant(value))
        .filter(|tensor| tensor.dims() == [64, 64])
        .map(Tensor::dtype)
        .collect();
    assert_eq!(types, [DataType::Float, DataType::Float16]);
}

#[test]
fn casts_of_the_model_become_no_casts() {
    let body = "a = Cast <to = 10> (x) v = Cast <to = 10> (w) h = MatMul (a, v) f = Cast <to = 1> (h) g = MatMul (f, w) \
                b = Cast <to = 10> (g) k = Relu (b) y = Cast <to = 1> (k)";
    let found = half("float[n, 64] x", "float[n, 64] y", "", body);
    assert_eq!(in_half(&found), ["MatMul"]);
    // Left are the model's own in front of its half, and the last one.
    assert_eq!((found.casts, count(&found, "Cast")), (0, 3));
}

#[test]
fn quantized_parts_are_left_alone() {
    let body = "h = MatMul (x, w) q = QuantizeLinear (h, s, z) d = DequantizeLinear (q, s, z) [r] r = Relu (d) \
                g = MatMul (r, w) y = MatMul (g, w)";
    let found = half("float[n, 64] x", "float[n, 64] y", "float s = {0.01}, int8 z = {0}", body);
    assert!(reason(&found, "r").starts_with("it is quantized"));
    assert_eq!(in_half(&found), ["MatMul", "MatMul"]);
}

/// `codes` of 64 times 64 whole numbers with a scale for each column.
fn codes(scale: &str) -> String {
    let codes: Vec<String> = (0..64 * 64).map(|at| (at * 37 % 101 - 50).to_string()).collect();
    format!("int8[64, 64] codes = {{{}}}, float[64] scales = {{{}}}", codes.join(", "), vec![scale; 64].join(", "))
}

#[test]
fn a_weight_of_codes_is_restored_to_what_reads_it() {
    let body =
        "[d] d = DequantizeLinear <axis = 1> (codes, scales) [h] h = MatMul (x, d) r = Relu (h) y = MatMul (r, w)";
    let convert = |opset: i64, scale: &str| {
        half_of(&parse(opset, "float[n, 64] x", "float[n, 64] y", &codes(scale), body), FLOAT16)
    };
    let found = convert(21, "0.003");
    assert_eq!(in_half(&found), ["DequantizeLinear", "MatMul", "Relu", "MatMul"]);
    assert_eq!((found.casts, count(&found, "Cast")), (2, 2));
    let graph = &found.model.graph;
    let tensor = |name: &str| graph.constant(graph.find_value(name).unwrap()).unwrap();
    assert_eq!((tensor("scales").dtype(), tensor("codes").dtype()), (DataType::Float16, DataType::Int8));
    // Both stay together: no cast comes between codes and the product.
    let old = convert(17, "0.003");
    assert!(reason(&old, "d").contains("--opset 19 upgrades"));
    assert_eq!(reason(&old, "h"), "it reads a weight that is dequantized to float32");
    let tiny = convert(21, "1e-6");
    assert!(reason(&tiny, "d").contains("its constant `scales` holds 1.0e-6"));
    assert!(tiny.kept.iter().any(|kept| kept.node.contains("`h`")));
}

#[test]
fn what_is_around_pairs_converts() {
    let body = "a = MatMul (x, w) b = Relu (a) q = QuantizeLinear (b, s, z) [p] p = DequantizeLinear (q, s, z) \
                [d] d = DequantizeLinear <axis = 1> (codes, scales) [h] h = MatMul (p, d) o = QuantizeLinear (h, s, z) \
                u = DequantizeLinear (o, s, z) [first] c = MatMul (u, w) e = MatMul (c, w) y = Relu (e)";
    let constants = format!("{}, float s = {{0.02}}, int8 z = {{0}}", codes("0.003"));
    let model = parse(21, "float[n, 64] x", "float[n, 64] y", &constants, body);
    assert!(reads_codes(&model));
    let (_, found) = converted(&model, FLOAT16);
    // Before a quantizer rounding moves codes by a step.
    let claim = Claim::Within { rtol: 10.0 * FLOAT16.tolerance() };
    lathe_testkit::equivalent(&model, &simulate(&found).model, claim, 1).unwrap();
    assert_eq!(in_half(&found), ["MatMul", "MatMul", "Relu"]);
    for label in ["p", "h", "first"] {
        assert!(reason(&found, label).starts_with("it is quantized"), "{label}");
    }
    assert_eq!(reason(&found, "d"), "what reads the weight that it dequantizes stays in float32");
    // Nothing stands between a quantized product and its pairs.
    let graph = &found.model.graph;
    let product = graph.producer(graph.find_value("h").unwrap()).unwrap();
    let read = graph.node(product).inputs().iter().flatten();
    assert!(read.into_iter().all(|&v| graph.node(graph.producer(v).unwrap()).is("DequantizeLinear")));
}

#[test]
fn the_operator_set_of_the_model_decides() {
    let body = "a = Conv (x, k) [r] r = Relu (a) y = Conv (r, k)";
    let weights = vec!["0.1"; 16 * 16 * 9].join(", ");
    let constants = format!("float[16, 16, 3, 3] k = {{{weights}}}");
    let model = |opset| parse(opset, "float[1, 16, 12, 12] x", "float[1, 16, 8, 8] y", &constants, body);
    let (_, old) = converted(&model(21), BFLOAT16);
    assert!(in_half(&old).is_empty());
    let why = &old.kept.iter().find(|kept| kept.node.contains("Conv")).unwrap().reason;
    assert_eq!(why, "`Conv` allows no bfloat16 in operator set 21; --opset 22 upgrades");
    let new = half_of(&model(22), BFLOAT16);
    assert_eq!(in_half(&new), ["Conv", "Relu", "Conv"]);
}

#[test]
fn what_is_half_precision_already_is_left() {
    let body = "a = Relu (x) y = Neg (a)";
    let model = parse(17, "float16[n, 64] x", "float16[n, 64] y", "", body);
    let prepared = Prepared::new(&model, FLOAT16, true).unwrap();
    let found = convert(&prepared, FLOAT16, &Magnitudes::default(), &BTreeMap::new()).unwrap();
    assert_eq!((found.nodes.len(), found.kept.len(), found.casts), (0, 0, 0));
}

#[test]
fn a_node_that_is_kept_by_name_stays() {
    let model =
        parse(17, "float[n, 64] x", "float[n, 64] y", "", "h = MatMul (x, w) [g] g = MatMul (h, w) y = MatMul (g, w)");
    let graph = &model.graph;
    let id = graph.nodes(ScopeId::MAIN).find(|&id| graph.node(id).name == "g").unwrap();
    let kept = BTreeMap::from([(id, "because".to_owned())]);
    let prepared = Prepared::new(&model, FLOAT16, true).unwrap();
    let found = convert(&prepared, FLOAT16, &measured(&model), &kept).unwrap();
    assert_eq!((reason(&found, "g"), in_half(&found).len(), found.casts), ("because", 2, 4));
}

#[test]
fn types_that_do_not_fit_are_named_with_their_node() {
    let faults = [
        (
            "float16[2] x, float[2] z",
            "[a] y = Add (x, z)",
            "node `a` (Add): `z` is float, and `x`, which has to be of the same type, is float16",
        ),
        (
            "float[2] x, float16[1] z",
            "[b] y = Upsample (x, z)",
            "node `b` (Upsample): `z` is float16, which its operator does not allow there",
        ),
    ];
    for (inputs, body, expected) in faults {
        let opset = if body.contains("Upsample") { 9 } else { 17 };
        let text = format!("<ir_version: 8, opset_import: [\"\" : {opset}]> g ({inputs}) => (y) {{ {body} }}");
        let fault = check_types(&text::parse(&text).unwrap()).unwrap_err();
        assert_eq!(fault.to_string(), expected);
    }
}

#[test]
fn precisions_are_read_by_name() {
    let named = |text: &str| Precision::parse(text).map(|precision| precision.to_string());
    assert_eq!(named("bfloat16:io").as_deref(), Some("bfloat16:io"));
    assert_eq!(named("float16").as_deref(), Some("float16"));
    assert_eq!((named("float32"), named("float16:in"), named("half")), (None, None, None));
}
