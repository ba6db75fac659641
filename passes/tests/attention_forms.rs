//! Attention as exporters spell it becomes one operator under all exact passes together.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, Tensor, text};
use lathe_passes::{PASSES, PassContext, Target};
use lathe_testkit::{equivalent, evaluator};
use std::collections::{BTreeMap, BTreeSet};

/// The passes over `graph`, round after round, and how often each operator is in the result, which is the same function.
fn optimized(graph: &str, cx: &PassContext) -> (Model, BTreeMap<String, usize>) {
    let before = text::parse(graph).unwrap_or_else(|error| panic!("{error}\n{graph}"));
    let mut model = before.clone();
    for _ in 0..8 {
        let changed = PASSES.iter().filter(|pass| !pass.apply(&mut model, cx).unwrap().changes.is_empty()).count();
        if changed == 0 {
            break;
        }
    }
    model.check().unwrap();
    equivalent(&before, &model, Some(1e-4), 7).unwrap_or_else(|why| panic!("{why}\n{}", text::print(&model)));
    let mut ops = BTreeMap::new();
    for id in model.graph.all_nodes() {
        *ops.entry(model.graph.node(id).op_type.clone()).or_insert(0) += 1;
    }
    (model, ops)
}

fn ort() -> PassContext<'static> {
    PassContext::default().with_target(Target::Ort).with_evaluator(evaluator())
}

/// The operators of the result for ONNX Runtime.
fn fused(graph: &str) -> BTreeMap<String, usize> {
    let (model, ops) = optimized(graph, &ort());
    assert!(!ops.contains_key("Softmax"), "{}", text::print(&model));
    ops
}

/// A multi-head attention of four heads of eight over `[B, S, 32]`, as exporters write it: how the keys are turned, what
/// lies between the scores and the softmax, and what behind it.
fn attention(inputs: &str, turn: &str, scores: &str, weights: &str) -> String {
    let weight = |seed: usize| {
        let numbers = (0..1024).map(|i| format!("{}", ((i * 37 + seed * 101) % 61) as f32 / 300.0 - 0.1));
        numbers.collect::<Vec<_>>().join(", ")
    };
    let bias: Vec<String> = (0..32).map(|i| format!("{}", f64::from(i) / 50.0)).collect();
    let bias = bias.join(", ");
    format!(
        r#"<ir_version: 9, opset_import: ["" : 17]>
        g (float[B,S,32] x{inputs}) => (float[B,S,32] y) <
            float[32,32] wq = {{{}}}, float[32,32] wk = {{{}}}, float[32,32] wv = {{{}}}, float[32,32] wo = {{{}}},
            float[32] bq = {{{bias}}}, float[32] bk = {{{bias}}}, float[32] bv = {{{bias}}},
            int64[4] split = {{0, 0, 4, 8}}, int64[3] join = {{0, 0, 32}}, float root = {{0.5946}}, float zero = {{0}},
            float inf = {{-inf}}, float low = {{-3.4028235e38}}, int64[1] m1 = {{-1}}, int64[1] m2 = {{-2}},
            int64[1] first = {{-9223372036854775808}}, int64[1] last = {{9223372036854775807}}
        > {{
            q1 = MatMul (x, wq) q2 = Add (q1, bq) q3 = Reshape (q2, split) q4 = Transpose <perm = [0, 2, 1, 3]> (q3)
            k1 = MatMul (x, wk) k2 = Add (k1, bk) k3 = Reshape (k2, split) k4 = Transpose <perm = [0, 2, 1, 3]> (k3)
            v1 = MatMul (x, wv) v2 = Add (v1, bv) v3 = Reshape (v2, split) v4 = Transpose <perm = [0, 2, 1, 3]> (v3)
            {turn}
            qs = Mul (q4, root) ks = Mul (kt, root) s = MatMul (qs, ks)
            {scores}
            p = Softmax <axis = -1> (masked)
            {weights}
            o = MatMul (kept, v4) ot = Transpose <perm = [0, 2, 1, 3]> (o) o3 = Reshape (ot, join) y = MatMul (o3, wo)
        }}"#,
        weight(1),
        weight(2),
        weight(3),
        weight(4)
    )
}

const TURN: &str = "kt = Transpose <perm = [0, 1, 3, 2]> (k4)";
/// As PyTorch's default exporter turns keys.
const TURN_BY_SHAPE: &str = "sizes = Shape (k4) columns = Slice (sizes, m1, last) rows = Slice (sizes, m2, m1)
    lead = Slice (sizes, first, m2) flat = Concat <axis = 0> (m1, rows, columns) ka = Reshape (k4, flat)
    kb = Transpose <perm = [0, 2, 1]> (ka) back = Concat <axis = 0> (lead, columns, rows) kt = Reshape (kb, back)";
const PLAIN: &str = "masked = Identity (s)";
const KEPT: &str = "kept = Identity (p)";
const WITHOUT_NAN: &str = "missing = IsNaN (p) kept = Where (missing, zero, p)";

#[test]
fn keys_are_turned_in_any_way() {
    let fixed = "three = Constant <value = int64[3] {-1, 6, 8}> () ka = Reshape (k4, three)
        kb = Transpose <perm = [0, 2, 1]> (ka) four = Constant <value = int64[4] {-1, 4, 8, 6}> () kt = Reshape (kb, four)";
    let at_once = "kt = Transpose <perm = [0, 2, 3, 1]> (k3)";
    let twice = "k5 = Transpose <perm = [1, 0, 2, 3]> (k4) kt = Transpose <perm = [1, 0, 3, 2]> (k5)";
    for turn in [TURN, TURN_BY_SHAPE, fixed, at_once, twice] {
        let graph = attention("", turn, PLAIN, KEPT);
        let graph = if turn == fixed { graph.replace("[B,S,32]", "[B,6,32]") } else { graph };
        let ops = fused(&graph);
        let expected = BTreeMap::from([("Attention".to_owned(), 1), ("MatMul".to_owned(), 1)]);
        assert_eq!(ops, expected, "{turn}");
    }
}

#[test]
fn what_is_no_number_becomes_zero_only_where_a_mask_may_be_infinite() {
    let mask = ", bool[B,1,1,S] m";
    for (hidden, guards) in [("inf", 1), ("low", 0)] {
        let added = format!("mask = Where (m, zero, {hidden}) masked = Add (s, mask)");
        let filled = format!("masked = Where (m, s, {hidden})");
        let inverted = format!("hide = Not (m) masked = Where (hide, {hidden}, s)");
        for scores in [added, filled, inverted] {
            let ops = fused(&attention(mask, TURN_BY_SHAPE, &scores, WITHOUT_NAN));
            assert_eq!(ops.get("IsNaN").copied().unwrap_or(0), guards, "{scores}: {ops:?}");
            assert_eq!(ops["Attention"], 1, "{scores}: {ops:?}");
        }
    }
}

#[test]
fn a_projection_with_other_uses_is_not_joined() {
    let used = [
        // T5 takes the number of keys from the keys themselves.
        ("", "ksh = Shape (k4) two = Constant <value = int64 {2}> () n = Gather <axis = 0> (ksh, two)
            c0 = Constant <value = int64 {0}> () c1 = Constant <value = int64 {1}> () r = Range (c0, n, c1)
            f = Cast <to = 1> (r) ax = Constant <value = int64[3] {0, 1, 2}> () u = Unsqueeze (f, ax) masked = Add (s, u)"),
        // Wav2Vec2-BERT has queries meet a table of relative positions as well.
        (", float[8,S] table", "more = MatMul (q4, table) masked = Add (s, more)"),
        // A gate on the values, as in gated attention.
        ("", "gate = ReduceMean <axes = [2, 3], keepdims = 1> (v4) masked = Add (s, gate)"),
        ("", "k6 = Neg (k4) far = ReduceMax <axes = [2, 3]> (k6) masked = Mul (s, far)"),
    ];
    for (inputs, scores) in used {
        let graph = attention(inputs, TURN, scores, KEPT);
        let (model, ops) = optimized(&graph, &ort());
        let before = text::parse(&graph).unwrap();
        assert!(!ops.contains_key("Softmax"), "{scores}: {ops:?}");
        assert!(weights(&model) <= weights(&before), "{scores}: {}", text::print(&model));
    }
}

/// Elements of all constants.
fn weights(model: &Model) -> usize {
    let graph = &model.graph;
    let all: BTreeSet<_> = graph.scopes().into_iter().flat_map(|scope| graph.initializers(scope)).collect();
    all.into_iter().filter_map(|value| graph.constant(value)).map(Tensor::len).sum()
}

#[test]
fn norms_of_heads_stay_before_the_operator() {
    let normed = |axes: &str, at: &str| {
        format!(
            "square = Mul ({at}, {at}) mean = ReduceMean <axes = [-1], keepdims = 1> (square) eps = Constant <value = float {{1e-6}}> ()
             safe = Add (mean, eps) size = Sqrt (safe) unit = Div ({at}, size) k5 = Mul (unit, gain) {axes}"
        )
    };
    let gain = ", float[8] gain";
    let before = normed("k6 = Transpose <perm = [0, 2, 1, 3]> (k5) kt = Transpose <perm = [0, 1, 3, 2]> (k6)", "k3");
    let behind = normed("kt = Transpose <perm = [0, 1, 3, 2]> (k5)", "k4");
    for turn in [before, behind] {
        let ops = fused(&attention(gain, &turn, PLAIN, KEPT));
        assert_eq!(ops["MultiHeadAttention"], 1, "{ops:?}");
    }
}

#[test]
fn caches_go_through_the_operator() {
    let turn = "k = Concat <axis = 2> (pk, k4) v = Concat <axis = 2> (pv, v4) kt = Transpose <perm = [0, 1, 3, 2]> (k)";
    let graph = attention(", float[B,4,P,8] pk, float[B,4,P,8] pv", turn, PLAIN, KEPT)
        .replace("(float[B,S,32] y)", "(float[B,S,32] y, float[B,4,T,8] k, float[B,4,T,8] v)")
        .replace("(kept, v4)", "(kept, v)");
    let ops = fused(&graph);
    assert!(ops["MultiHeadAttention"] == 1 && !ops.contains_key("Concat"), "{ops:?}");
}

#[test]
fn a_skip_norm_is_written_where_it_pays() {
    let graph = r#"<ir_version: 9, opset_import: ["" : 17]>
        g (float[B,S,4] x, float[B,S,4] z) => (float[B,S,4] y) <float[4] scale = {1, 2, 3, 4}, float[4] shift = {0, 1, 0, -1}> {
            sum = Add (x, z)
            y = LayerNormalization <axis = -1> (sum, scale, shift)
        }"#;
    assert!(optimized(graph, &ort()).1.contains_key("SkipLayerNormalization"));
    let slow = ort().with_slow_kernels(["SkipLayerNormalization".to_owned()].into());
    assert!(optimized(graph, &slow).1.contains_key("LayerNormalization"));
    let rms = graph.replace(
        "LayerNormalization <axis = -1> (sum, scale, shift)",
        "SimplifiedLayerNormalization <axis = -1> (sum, scale)",
    );
    assert!(optimized(&rms, &slow).1.contains_key("SkipSimplifiedLayerNormalization"));
}
