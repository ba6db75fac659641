use super::SliceChains;
use crate::testing::{check_in, check_refuses_in, model};
use crate::{Outcome, Pass, PassContext};
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::ScopeId;

const WEIGHTS: &str = "float[2] one = {1, 2}, float[2] zero = {0.5, 0.25},
    float[2,6] w = {1, -2, 3, -4, 5, -6, 0.5, 0.25, -1, 2, -0.5, 1},
    float[6,2] v = {0.5, -1, 2, 1, -0.25, 3, 1, -2, 0.75, 1, -1, 0.5}";

fn settings(all: &[(&str, &str)]) -> PassContext<'static> {
    let named = |(name, value): &(&str, &str)| (format!("slice-chains.{name}"), (*value).to_owned());
    let settings = [("enabled", "true")].iter().chain(all).map(named).collect::<crate::Settings>();
    PassContext::default().with_settings(settings).with_evaluator(lathe_testkit::evaluator())
}

/// Every chain that saves anything, in at most four pieces.
fn small() -> PassContext<'static> {
    settings(&[("pieces", "4"), ("min-bytes", "1")])
}

/// A graph from `x` to `y`, of opset 21, that may use [`WEIGHTS`].
fn graph(x: &str, y: &str, nodes: &str) -> String {
    format!("<ir_version: 10, opset_import: [\"\" : 21]> g (float[{x}] x) => ({y}) <{WEIGHTS}> {{ {nodes} }}")
}

const MLP: &str =
    "n = LayerNormalization (x, one, zero) h = MatMul (n, w) a = Gelu (h) o = MatMul (a, v) y = Add (x, o)";

#[test]
fn slices_the_rows_of_an_mlp() {
    let printed = check_in(&SliceChains, &graph("8,2", "float[8,2] y", MLP), &small());
    assert!(printed.contains("{4, 2, 2}"), "four pieces of two rows: {printed}");
}

#[test]
fn the_peak_of_activations_falls() {
    let cost = |model: &lathe_ir::Model| Cost::of(model, &Facts::infer(model), &Bindings::default());
    let mut sliced = model(&graph("1,8,2", "float[1,8,2] y", MLP));
    let before = cost(&sliced);
    assert_eq!(SliceChains.apply(&mut sliced, &small()).unwrap().changes.len(), 1);
    let main = sliced.graph.nodes(ScopeId::MAIN).map(|id| sliced.graph.node(id).op_type.clone());
    assert_eq!(main.collect::<Vec<_>>(), ["Reshape", "Scan", "Reshape"]);
    let after = cost(&sliced);
    assert!(after.activation_peak_bytes < before.activation_peak_bytes, "{after:?}");
    assert_eq!((after.flops, after.parameters), (before.flops, before.parameters));
}

#[test]
fn slices_the_batch_of_convolutions() {
    let graph = "<ir_version: 10, opset_import: [\"\" : 21]> g (float[4,2,3,5] x) => (float[4,2,3,5] y) <
        float[2] one = {1, 2}, float[2] zero = {0.5, 0.25},
        float[6,2,1,3] w = {1, -2, 3, -4, 5, -6, 0.5, 0.25, -1, 2, -0.5, 1, 1, -2, 3, -4, 5, -6, 0.5, 0.25, -1, 2, -0.5,
            1, 1, -2, 3, -4, 5, -6, 0.5, 0.25, -1, 2, -0.5, 1},
        float[2,6,1,1] v = {0.5, -1, 2, 1, -0.25, 3, 1, -2, 0.75, 1, -1, 0.5}
    > {
        n = GroupNormalization <num_groups = 2> (x, one, zero) s = Sigmoid (n) m = Mul (n, s)
        c = Conv <pads = [0, 1, 0, 1]> (m, w) r = Relu (c) d = Conv (r, v) y = Add (x, d)
    }";
    let printed = check_in(&SliceChains, graph, &settings(&[("min-bytes", "1")]));
    assert!(printed.contains("{4, 1, 2, 3, 5}"), "eight pieces of four samples are four: {printed}");
    // Of the channels nothing is independent.
    let one = graph.replace("4,2,3,5", "1,2,3,5");
    check_refuses_in(&SliceChains, &one, "nothing inside a chain is larger", &small());
}

#[test]
fn writes_the_targets_of_reshapes_anew() {
    let nodes =
        "h = MatMul (x, w) r = Reshape (h, split) s = Softmax <axis = -1> (r) t = Transpose <perm = [0, 2, 1]> (s)
        q = Reshape (t, join) y = MatMul (q, v)";
    let graph = graph("4,2,2", "float[4,2,2] y", nodes)
        .replace("float[2] one", "int64[3] split = {4, 4, 3}, int64[3] join = {0, 2, -1}, float[2] one");
    let printed = check_in(&SliceChains, &graph, &small());
    assert!(printed.contains("{1, 4, 3}"), "{printed}");
}

#[test]
fn keeps_what_others_read_and_what_they_make() {
    // The mean is made of the entry, outside; two outputs leave the chain, one of them for a node that mixes rows.
    let nodes = "m = ReduceMean <keepdims = 1> (x, rows) n = Sub (x, m) h = MatMul (n, w) a = Gelu (h)
        o = MatMul (a, v) z = ReduceSum <keepdims = 0> (a, columns) y = Softmax <axis = 0> (o)";
    let graph = graph("8,2", "float[8,2] y, float[8] z", nodes)
        .replace("float[2] one", "int64[1] rows = {0}, int64[1] columns = {1}, float[2] one");
    let printed = check_in(&SliceChains, &graph, &small());
    let scan = printed.lines().find(|line| line.contains("Scan")).unwrap();
    assert!(scan.contains("o_pieces") && scan.contains("z_pieces"), "{printed}");
}

#[test]
fn slices_each_of_several_chains() {
    let nodes = "h = MatMul (x, w) a = Gelu (h) o = MatMul (a, v) p = Softmax <axis = 0> (o)
        k = MatMul (p, w) b = Relu (k) y = MatMul (b, v)";
    let printed = check_in(&SliceChains, &graph("8,2", "float[8,2] y", nodes), &small());
    assert_eq!(printed.matches("Scan").count(), 2, "{printed}");
}

#[test]
fn refuses_what_it_cannot_cut_or_what_does_not_pay() {
    let refuses = |graph: &str, reason: &str| check_refuses_in(&SliceChains, graph, reason, &small());
    refuses(&graph("N,2", "float[N,2] y", MLP), "is not fixed");
    refuses(&graph("7,2", "float[7,2] y", MLP), "no number of pieces up to `pieces` divides");
    refuses(&graph("8,2", "float[8,2] y", "a = Relu (x) y = Neg (a)"), "nothing inside a chain is larger");
    refuses(&graph("8,2", "float[8,2] y", "y = Softmax <axis = 0> (x)"), "no two nodes in a row");
    let mlp = graph("8,2", "float[8,2] y", MLP);
    check_refuses_in(&SliceChains, &mlp, "less than `min-bytes`", &settings(&[]));
    refuses(&mlp.replace(": 21", ": 8").replace("Gelu", "Relu"), "before opset 9");
}

#[test]
fn rows_that_meet_stay_together() {
    let mixed = |middle: &str| {
        let nodes = format!("h = MatMul (x, w) {middle} a = Relu (c) y = MatMul (a, v)");
        let graph = graph("8,2", "float[8,2] y", &nodes)
            .replace("float[2] one", "int64[1] rows = {0}, float[8,1] table = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] one");
        check_refuses_in(&SliceChains, &graph, "nothing inside a chain is larger", &small());
    };
    mixed("c = Add (h, table)");
    mixed("c = Softmax <axis = 0> (h)");
    mixed("m = ReduceMax (h, rows) c = Sub (h, m)");
    mixed("t = Transpose <perm = [1, 0]> (h) u = MatMul (h, t) c = MatMul (u, h)");
}

#[test]
fn is_off_by_default() {
    let mut sliced = model(&graph("8,2", "float[8,2] y", MLP));
    assert_eq!(SliceChains.apply(&mut sliced, &PassContext::default()).unwrap(), Outcome::default());
}
