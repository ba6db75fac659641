//! Tests of the attention fusion.

use super::*;
use crate::testing::{check, check_in, check_refuses, check_refuses_in};

fn ort() -> PassContext<'static> {
    PassContext::default().with_target(Target::Ort)
}

/// Two heads of four from values of three axes, with a mask.
const PLAIN: &str = r#"g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,S,T] mask) => (float[B,S,8] y)
    <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float root = {2}> {
        a4 = Reshape (a, split)
        q = Transpose <perm = [0, 2, 1, 3]> (a4)
        b4 = Reshape (b, split)
        k = Transpose <perm = [0, 2, 3, 1]> (b4)
        c4 = Reshape (c, split)
        v = Transpose <perm = [0, 2, 1, 3]> (c4)
        scores = MatMul (q, k)
        scaled = Div (scores, root)
        masked = Add (scaled, mask)
        weights = Softmax <axis = -1> (masked)
        context = MatMul (weights, v)
        turned = Transpose <perm = [0, 2, 1, 3]> (context)
        y = Reshape (turned, join)
    }"#;

fn plain(opset: i64) -> String {
    format!("<opset_import: [\"\" : {opset}]> {PLAIN}")
}

/// [`plain`] with sizes that are known.
fn fixed(opset: i64) -> String {
    plain(opset).replace("float[B,", "float[2,").replace(",S,", ",3,").replace(",T,", ",5,").replace(",T]", ",5]")
}

/// The line of `printed` that makes the first node of `op`, without its type.
fn line(printed: &str, op: &str) -> String {
    let found = printed.lines().find(|line| line.contains(&format!("{op} ")));
    let found = found.unwrap_or_else(|| panic!("no {op} in {printed}"));
    found.split("  #").next().unwrap_or_default().trim().to_owned()
}

/// What the pass writes for ONNX Runtime.
fn fused(graph: &str) -> String {
    let printed = check_in(&FuseAttention, graph, &ort());
    assert!(!printed.contains("Softmax"), "{printed}");
    printed
}

#[test]
fn writes_multi_head_attention() {
    let made = line(&fused(&plain(17)), "MultiHeadAttention");
    assert_eq!(
        made.split_once(" = ").unwrap().1,
        r#"com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.5> (a, b, c, "", "", mask)"#
    );
}

#[test]
fn writes_the_standard_attention() {
    let graph =
        fixed(23).replace(", float[2,1,3,5] mask", "").replace("Softmax <axis = -1> (masked)", "Softmax (scaled)");
    let graph = graph.replace("masked = Add (scaled, mask)", "");
    let made = line(&check(&FuseAttention, &graph), "Attention");
    let expected = "Attention <scale = 0.5, q_num_heads = 2, kv_num_heads = 2> (a, b, c)";
    assert_eq!(made.split_once(" = ").unwrap().1, expected);
}

#[test]
fn leaves_heads_separate_that_nothing_joins() {
    let printed = check(
        &FuseAttention,
        r#"<opset_import: ["" : 23]>
        g (bool c, float[2,4,3,8] q, float[2,4,5,8] k, float[2,4,5,8] v) => (float[2,4,3,8] y) <float scale = {0.5}> {
            y = If (c) <then_branch = a () => (float[2,4,3,8] p) {
                kt = Transpose <perm = [0, 1, 3, 2]> (k)
                qs = Mul (q, scale)
                ks = Mul (kt, scale)
                scores = MatMul (qs, ks)
                weights = Softmax (scores)
                p = MatMul (weights, v)
            }, else_branch = b () => (float[2,4,3,8] n) { n = Neg (q) }>
        }"#,
    );
    assert!(line(&printed, "Attention").ends_with("Attention <scale = 0.25> (q, k, v)"), "{printed}");
}

/// Three projections of two heads, the keys turned at once.
const PROJECTED: &str = r#"<opset_import: ["" : 17]>
    g (float[B,S,2] x) => (float[B,S,2] y)
    <int64[4] split = {0, 0, 2, 1}, int64[3] join = {0, 0, 2}, float[2,2] wq = {1, 2, 3, 4},
     float[2,2] wk = {5, 6, 7, 8}, float[2,2] wv = {9, 1, 2, 3}> {
        a = MatMul (x, wq)
        b = MatMul (x, wk)
        c = MatMul (x, wv)
        a4 = Reshape (a, split)
        q = Transpose <perm = [0, 2, 1, 3]> (a4)
        b4 = Reshape (b, split)
        k4 = Transpose <perm = [0, 2, 1, 3]> (b4)
        k = Transpose <perm = [0, 1, 3, 2]> (k4)
        c4 = Reshape (c, split)
        v = Transpose <perm = [0, 2, 1, 3]> (c4)
        scores = MatMul (q, k)
        weights = Softmax <axis = -1> (scores)
        context = MatMul (weights, v)
        turned = Transpose <perm = [0, 2, 1, 3]> (context)
        y = Reshape (turned, join)
    }"#;

#[test]
fn joins_three_projections() {
    let made = line(&fused(PROJECTED), "Attention");
    assert!(made.contains("com.microsoft.Attention <num_heads = 2, scale = 1.0> (x, "), "{made}");
}

#[test]
fn does_not_compute_a_projection_twice() {
    let uses = [
        ("turned = Transpose", "other = Neg (a)\n turned = Transpose", "float[B,S,2] other"),
        ("turned = Transpose", "other = Shape (k4)\n turned = Transpose", "int64[4] other"),
        ("turned = Transpose", "other = MatMul (x, wv)\n turned = Transpose", "float[B,S,2] other"),
    ];
    for (at, new, output) in uses {
        let graph = PROJECTED.replace(at, new).replace("(float[B,S,2] y)", &format!("(float[B,S,2] y, {output})"));
        let made = line(&fused(&graph), "MultiHeadAttention");
        assert!(made.contains("(a, b, c)"), "{made}");
    }
}

#[test]
fn unpacks_a_projection() {
    let printed = fused(
        r#"<opset_import: ["" : 17]>
        g (float[B,5,12] packed) => (float[B,5,4] y, float[B,5,12] shown)
        <int64[5] split = {0, 0, 3, 2, 2}, int64[3] join = {0, 0, 4}, int64[3] each = {1, 1, 1}, int64[1] first = {0},
         float[12] bias = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
            shown = Add (packed, bias)
            five = Reshape (shown, split)
            moved = Transpose <perm = [2, 0, 3, 1, 4]> (five)
            q1, k1, v1 = Split <axis = 0> (moved, each)
            q = Squeeze (q1, first)
            k4 = Squeeze (k1, first)
            v = Squeeze (v1, first)
            k = Transpose <perm = [0, 1, 3, 2]> (k4)
            scores = MatMul (q, k)
            weights = Softmax <axis = -1> (scores)
            context = MatMul (weights, v)
            turned = Transpose <perm = [0, 2, 1, 3]> (context)
            y = Reshape (turned, join)
        }"#,
    );
    assert!(line(&printed, "Split").contains("Split <axis = -1> (shown, "), "{printed}");
}

/// The scores and weights of heads that come as they are.
fn bare(inputs: &str, inits: &str, body: &str) -> String {
    format!(
        r#"<opset_import: ["" : 18]>
        g (float[B,2,S,8] q, float[B,2,T,8] k, float[B,2,T,8] v{inputs}) => (float[B,2,S,8] y)
        <float half = {{0.5}}, float zero = {{0}}, float low = {{-3.4028235e38}}, float inf = {{-inf}}{inits}> {{
            {body}
            y = MatMul (weights, v)
        }}"#
    )
}

const TURN: &str = "kt = Transpose <perm = [0, 1, 3, 2]> (k)";

#[test]
fn takes_heads_as_they_come() {
    let body =
        format!("{TURN} qs = Mul (q, half) ks = Div (kt, half) s = MatMul (qs, ks) weights = Softmax <axis = -1> (s)");
    let printed = fused(&bare("", "", &body));
    let made = line(&printed, "MultiHeadAttention");
    assert!(made.contains("<num_heads = 2, scale = 1.0>") && made.ends_with(", k, v)"), "{made}");
    assert!(printed.contains("Transpose <perm = [0, 2, 1, 3]> (q)"), "{printed}");
}

#[test]
fn takes_values_of_another_size() {
    let body = format!("{TURN} s = MatMul (q, kt) weights = Softmax <axis = -1> (s)");
    let graph = bare("", "", &body)
        .replace("float[B,2,T,8] v", "float[B,2,T,6] v")
        .replace("float[B,2,S,8] y", "float[B,2,S,6] y");
    assert!(fused(&graph).contains("{0, 0, 2, 6}"));
}

#[test]
fn adds_masks_up_in_any_order() {
    let body = format!(
        "{TURN} s = MatMul (q, kt) a = Add (m, s) b = Mul (a, half) c = Sub (b, n) d = Where (seen, c, low) \
         weights = Softmax <axis = -1> (d)"
    );
    let printed = fused(&bare(", float[B,1,S,T] m, float[2,S,T] n, bool[B,1,1,T] seen", "", &body));
    assert!(line(&printed, "MultiHeadAttention").contains("scale = 0.5"), "{printed}");
    assert!(
        printed.contains("Where (seen,") && printed.contains("Mul (m,") && printed.contains("Mul (n,"),
        "{printed}"
    );
}

#[test]
fn multiplies_queries_by_a_temperature() {
    let body = format!("{TURN} s = MatMul (q, kt) a = Mul (s, t) c = Add (a, m) weights = Softmax <axis = -1> (c)");
    let printed = fused(&bare(", float[2,1,1] t, float[B,2,1,T] m", "", &body));
    assert!(printed.contains("Mul (q, t)") && printed.contains("Expand (m,"), "{printed}");
}

#[test]
fn a_softmax_does_not_see_a_shift() {
    let body = format!(
        "{TURN} s = MatMul (q, kt) most = ReduceMax (s, last) less = Sub (s, most) more = Div (less, half) \
         weights = Softmax <axis = -1> (more)"
    );
    assert!(line(&fused(&bare("", ", int64[1] last = {-1}", &body)), "MultiHeadAttention").contains("scale = 2"));
}

#[test]
fn weights_that_are_no_number_become_zero_behind() {
    let guarded = |mask: &str| {
        format!(
            "{TURN} s = MatMul (q, kt) mask = Where (seen, zero, {mask}) a = Add (s, mask) p = Softmax <axis = -1> (a) \
             missing = IsNaN (p) weights = Where (missing, zero, p)"
        )
    };
    let seen = ", bool[B,1,S,T] seen";
    assert!(fused(&bare(seen, "", &guarded("inf"))).contains("IsNaN"));
    assert!(!fused(&bare(seen, "", &guarded("low"))).contains("IsNaN"));
    let twice = guarded("low").replace("p = Softmax <axis = -1> (a)", "b = Add (a, mask) p = Softmax <axis = -1> (b)");
    assert!(fused(&bare(seen, "", &twice)).contains("IsNaN"));
    let given = guarded("low").replace("mask = Where (seen, zero, low)", "mask = Identity (given)");
    assert!(fused(&bare(", float[1,1,S,T] given", "", &given)).contains("IsNaN"));
}

#[test]
fn looks_through_regrouped_axes() {
    // As T5, DeBERTa and `nn.MultiheadAttention` write it: batch and heads are one axis in the products.
    let printed = fused(
        r#"<opset_import: ["" : 17]>
        g (float[B,5,16] a, float[B,7,16] b, float[B,1,5,7] m) => (float[B,5,16] y)
        <int64[4] split = {0, 0, 2, 8}, int64[3] five = {-1, 5, 8}, int64[3] seven = {-1, 7, 8}, int64[4] four = {-1, 2, 5, 7},
         int64[3] three = {-1, 5, 7}, int64[4] back = {-1, 2, 5, 8}, int64[3] join = {0, 0, 16}> {
            a4 = Reshape (a, split)
            at = Transpose <perm = [0, 2, 1, 3]> (a4)
            q = Reshape (at, five)
            b4 = Reshape (b, split)
            bt = Transpose <perm = [0, 2, 1, 3]> (b4)
            k = Reshape (bt, seven)
            kt = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul (q, kt)
            s4 = Reshape (s, four)
            sm = Add (s4, m)
            s3 = Reshape (sm, three)
            p = Softmax <axis = -1> (s3)
            c = MatMul (p, k)
            c4 = Reshape (c, back)
            ct = Transpose <perm = [0, 2, 1, 3]> (c4)
            y = Reshape (ct, join)
        }"#,
    );
    assert!(line(&printed, "MultiHeadAttention").contains("(a, b, b, \"\", \"\", m)"), "{printed}");
}

#[test]
fn one_head_for_each_batch_where_axes_stay_together() {
    let printed = fused(
        r#"<opset_import: ["" : 17]>
        g (float[5,G,8] a, float[7,G,8] b, float[G,7,6] v, float[5,7] m) => (float[G,5,6] y) {
            q = Transpose <perm = [1, 0, 2]> (a)
            kt = Transpose <perm = [1, 2, 0]> (b)
            s = MatMul (q, kt)
            sm = Add (s, m)
            p = Softmax <axis = -1> (sm)
            y = MatMul (p, v)
        }"#,
    );
    assert!(line(&printed, "MultiHeadAttention").contains("num_heads = 1"), "{printed}");
    assert!(printed.contains("Unsqueeze (m,"), "{printed}");
}

/// Windows of 4 with two heads of 8, one batch axis more than others have, and masks that differ by window.
#[test]
fn repeats_the_masks_of_windows() {
    let printed = fused(r#"<opset_import: ["" : 17]>
        g (float[N,2,4,8] q, float[N,2,4,8] k, float[N,2,4,8] v, float[B,3] other) => (float[B,6,4,8] y)
        <float[1,2,4,4] bias = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2,1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, float zero = {0}, float low = {-100},
         bool[1,3,1,4,4] seen = {1,0,1,0,1,0,1,0,1,0,1,0,1,0,1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0,0,1,1,0,0,1,1,0,0,1,1,0,0,1,1},
         int64[4] n = {-1, 2, 4, 8}, int64[5] wide = {-1, 3, 2, 4, 4}, int64[4] narrow = {-1, 2, 4, 4}, int64[4] last = {-1, 6, 4, 8}> {
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            s = MatMul (q, kt)
            sb = Add (s, bias)
            s5 = Reshape (sb, wide)
            mask = Where (seen, zero, low)
            sm = Add (s5, mask)
            s4 = Reshape (sm, narrow)
            p = Softmax <axis = -1> (s4)
            c = MatMul (p, v)
            y = Reshape (c, last)
        }"#.replace("float[N,", "float[3,").replace("float[B,6,4,8] y", "float[1,6,4,8] y").as_str());
    assert!(line(&printed, "MultiHeadAttention").ends_with("y_1_4)") || printed.contains("Add ("), "{printed}");
}

#[test]
fn reads_products_of_einsum() {
    let printed = fused(
        r#"<opset_import: ["" : 17]>
        g (float[B,3,4,16] a, float[B,3,5,16] b, float[1,2,4,5] bias) => (float[B,3,4,16] y)
        <int64[5] split = {0, 0, 0, 2, 8}, int64[4] join = {0, 0, 0, 16}> {
            q5 = Reshape (a, split)
            q = Transpose <perm = [0, 1, 3, 2, 4]> (q5)
            k = Reshape (b, split)
            v = Transpose <perm = [0, 1, 3, 2, 4]> (k)
            s = Einsum <equation = "b g h i d, b g j h d -> b g h i j"> (q, k)
            sb = Add (s, bias)
            p = Softmax <axis = -1> (sb)
            c = Einsum <equation = "bghij,bghjd->bgihd"> (p, v)
            y = Reshape (c, join)
        }"#,
    );
    assert!(line(&printed, "MultiHeadAttention").contains("num_heads = 2"), "{printed}");
    assert!(!printed.contains("Einsum"), "{printed}");
}

#[test]
fn values_may_come_first() {
    let printed = fused(
        r#"<opset_import: ["" : 17]>
        g (float[B,8,S] q, float[B,8,S] k, float[B,6,S] v) => (float[B,6,S] y) {
            qt = Transpose <perm = [0, 2, 1]> (q)
            s = MatMul (qt, k)
            p = Softmax <axis = -1> (s)
            pt = Transpose <perm = [0, 2, 1]> (p)
            y = MatMul (v, pt)
        }"#,
    );
    assert!(line(&printed, "MultiHeadAttention").contains("num_heads = 1"), "{printed}");
}

/// Two query heads of 16 on one key head, rotated by position, with `mask`.
fn grouped(mask: &str) -> String {
    format!(
        r#"<opset_import: ["" : 18]>
        g (float[B,S,32] a, float[B,S,16] b, float[B,S,16] c, float[B,1,S,S] given) => (float[B,S,32] y)
        <int64[4] heads = {{0, 0, 2, 16}}, int64[4] shared = {{0, 0, 1, 16}}, int64[3] join = {{0, 0, 32}}, float scale = {{0.5}},
         int64[1] first = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] end = {{9223372036854775807}},
         int64 zero = {{0}}, int64 step = {{1}}, float[8] frequency = {{1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001}}, float seen = {{0}}, float unseen = {{-3e38}},
         int64[1] last = {{-1}}, int64[1] eight = {{8}}, int64[1] sixteen = {{16}}, int64[2] outer = {{0, 1}}, int64[3] outermost = {{0, 1, 2}}> {{
            shape = Shape (a)
            length = Gather <axis = 0> (shape, step)
            batch = Gather <axis = 0> (shape, first)
            length1 = Gather <axis = 0> (shape, one)
            positions = Range (zero, length, step)
            column = Unsqueeze (positions, last)
            floats = Cast <to = 1> (column)
            half = Mul (floats, frequency)
            angles = Concat <axis = -1> (half, half)
            cosines = Cos (angles)
            cos = Unsqueeze (cosines, outer)
            sines = Sin (angles)
            sin = Unsqueeze (sines, outer)
            queries = Unsqueeze (column, outer)
            keys = Unsqueeze (positions, outermost)
            visible = LessOrEqual (keys, queries)
            causal = Where (visible, seen, unseen)
            a4 = Reshape (a, heads)
            q = Transpose <perm = [0, 2, 1, 3]> (a4)
            qc = Mul (q, cos)
            q_low = Slice (q, first, eight, three, one)
            q_high = Slice (q, eight, end, three, one)
            q_neg = Neg (q_high)
            q_turned = Concat <axis = -1> (q_neg, q_low)
            qs = Mul (q_turned, sin)
            qr = Add (qc, qs)
            b4 = Reshape (b, shared)
            k = Transpose <perm = [0, 2, 1, 3]> (b4)
            kc = Mul (k, cos)
            k_low, k_high = Split <axis = -1, num_outputs = 2> (k)
            k_neg = Neg (k_high)
            k_turned = Concat <axis = -1> (k_neg, k_low)
            ks = Mul (k_turned, sin)
            kr = Add (kc, ks)
            c4 = Reshape (c, shared)
            v = Transpose <perm = [0, 2, 1, 3]> (c4)
            wide = Concat <axis = 0> (batch, one, two, length1, sixteen)
            full = Concat <axis = 0> (batch, two, length1, sixteen)
            k5 = Unsqueeze (kr, two)
            k_wide = Expand (k5, wide)
            k_full = Reshape (k_wide, full)
            v5 = Unsqueeze (v, two)
            v_wide = Expand (v5, wide)
            v_full = Reshape (v_wide, full)
            kt = Transpose <perm = [0, 1, 3, 2]> (k_full)
            scores = MatMul (qr, kt)
            scaled = Mul (scores, scale)
            masked = Add (scaled, {mask})
            weights = Softmax <axis = -1> (masked)
            context = MatMul (weights, v_full)
            turned = Transpose <perm = [0, 2, 1, 3]> (context)
            y = Reshape (turned, join)
        }}"#
    )
}

#[test]
fn stacks_the_queries_of_heads_that_share_keys() {
    let printed = fused(&grouped("given"));
    let made = line(&printed, "MultiHeadAttention");
    assert!(made.contains("num_heads = 1"), "{made}");
    assert!(printed.contains("Concat <axis = 2> (given, given)") && !printed.contains("k_wide ="), "{printed}");
}

#[test]
fn stacks_biases_that_differ_by_head() {
    let graph = grouped("given").replace("float[B,1,S,S] given", "float[1,2,S,S] given");
    assert!(!fused(&graph).contains("Concat <axis = 2>"));
}

/// [`grouped`] with sizes that are known.
fn grouped_fixed(mask: &str) -> String {
    grouped(mask).replace("[B,S,", "[2,3,").replace("[B,1,S,S]", "[2,1,3,3]")
}

#[test]
fn writes_group_query_attention() {
    let printed = fused(&grouped_fixed("causal"));
    let made = line(&printed, "GroupQueryAttention");
    assert!(made.contains("<num_heads = 2, kv_num_heads = 1, scale = 0.5, do_rotary = 1> (a, b, c, "), "{made}");
}

#[test]
fn caps_scores() {
    let body = format!(
        "{TURN} s = MatMul (q, kt) low_s = Div (s, cap) t = Tanh (low_s) c = Mul (t, cap) d = Add (c, m) \
         weights = Softmax <axis = -1> (d)"
    );
    let graph = bare(", float[1,1,S,T] m", ", float cap = {3}", &body);
    check_refuses_in(&FuseAttention, &graph, "a soft cap needs GroupQueryAttention", &ort());
    let known = graph.replace("[B,2,S,", "[2,2,3,").replace("[B,2,T,", "[2,2,3,").replace("[1,1,S,T]", "[1,1,3,3]");
    assert!(line(&fused(&known), "GroupQueryAttention").contains("softcap = 3"));
}

#[test]
fn a_sink_is_one_more_key() {
    let body = format!(
        "{TURN} s = MatMul (q, kt) d = Add (s, m) e = Concat <axis = -1> (d, sink) most = ReduceMax <keepdims = 1> (e, last) \
         less = Sub (e, most) p = Softmax <axis = -1> (less) weights = Slice (p, first, last, last)"
    );
    let sized = ", float[1,1,S,T] m, float[B,2,S,1] sink";
    let printed = fused(&bare(sized, ", int64[1] last = {-1}, int64[1] first = {0}", &body));
    assert!(printed.matches("Pad (").count() == 2 && printed.contains(", sink)"), "{printed}");
    let grouped = grouped("given").replace("given) =>", "given, float[B,2,S,1] sink) =>");
    let grouped = grouped.replace(
        "weights = Softmax <axis = -1> (masked)",
        "more = Concat <axis = 3> (masked, sink) \
        p = Softmax <axis = -1> (more) weights = Slice (p, first, last, three)",
    );
    assert!(line(&fused(&grouped), "MultiHeadAttention").contains("num_heads = 1"));
}

#[test]
fn keys_and_values_are_as_many_where_nothing_is_broadcast() {
    // A cache whose two parts have lengths of different names.
    let body = format!("{TURN} s = MatMul (q, kt) a = Add (s, m) weights = Softmax <axis = -1> (a)");
    let graph = bare(", float[B,1,S,T] m", "", &body).replace("float[B,2,T,8] v", "float[B,2,U,8] v");
    let before = crate::testing::model(&graph);
    let mut after = before.clone();
    let outcome = FuseAttention.apply(&mut after, &ort()).unwrap();
    assert_eq!(outcome.changes.len(), 1, "{:?}", outcome.refusals);
}

#[test]
fn shares_keys_in_the_standard_attention() {
    let graph = grouped_fixed("causal").replace(r#"["" : 18]"#, r#"["" : 23]"#);
    let made = line(&check(&FuseAttention, &graph), "Attention");
    assert_eq!(made, "context = Attention <scale = 0.5, is_causal = 1> (qr, kr, context_1)");
}

#[test]
fn needs_no_mask() {
    let graph = grouped_fixed("given").replace("masked = Add (scaled, given)", "");
    let graph = graph.replace("Softmax <axis = -1> (masked)", "Softmax <axis = -1> (scaled)");
    assert!(fused(&graph).contains("causal = 0"));
}

#[test]
fn does_not_take_one_zero_for_a_causal_mask() {
    let graph = grouped("given")
        .replace("given) =>", "unused) =>")
        .replace("float scale", "float[1,1] given = {0}, float scale");
    assert!(fused(&graph).contains("Expand ("));
}

#[test]
fn works_in_half_precision() {
    let graph = plain(17).replace("float[B", "float16[B").replace("float root = {2}", "float16 root = {16384}");
    assert!(fused(&graph).contains("MultiHeadAttention"));
}

#[test]
fn keeps_a_mask_that_is_not_known_to_be_causal() {
    let made = line(&fused(&grouped_fixed("given")), "GroupQueryAttention");
    assert!(made.contains("causal = 0, do_rotary = 1") && made.ends_with("\"\", given)"), "{made}");
}

#[test]
fn repeats_a_padding_mask() {
    let padding = plain(17).replace("float[B,1,S,T] mask", "float[B,1,1,T] mask");
    let printed = fused(&padding);
    assert!(printed.contains("Shape <start = 1, end = 2> (a)") && printed.contains("Expand (mask,"), "{printed}");
    let column = plain(17).replace("float[B,1,S,T] mask", "float[B,1,S,1] mask");
    assert!(fused(&column).contains("Expand (mask,"));
}

#[test]
fn takes_a_padding_mask_by_key() {
    let graph = plain(17).replace("float[B,1,S,T] mask", "bool[B,1,1,T] seen");
    let graph = graph.replace("float root", "float zero = {0}, float low = {-3.4028235e38}, float root");
    let hidden = graph.replace("masked = Add (scaled, mask)", "masked = Where (seen, scaled, low)");
    let made = line(&fused(&hidden), "MultiHeadAttention");
    assert!(made.contains("mask_filter_value = -3.4028235e38") && !made.contains("Expand"), "{made}");
    for mask in ["(seen, zero, low)", "(seen, low, zero)"] {
        let added = graph.replace("masked = ", &format!("mask = Where {mask} masked = "));
        let printed = fused(&added);
        assert!(
            printed.contains("Cast <to = 6>") && printed.contains("Not (seen)") == mask.starts_with("(seen, low"),
            "{printed}"
        );
    }
}

#[test]
fn a_causal_mask_stays_a_number_beside_one_that_may_hide_all() {
    let body = format!("{TURN} s = MatMul (q, kt) a = Add (s, causal) weights = Softmax <axis = -1> (a)");
    let inits = ", float[3,3] causal = {0, -1e38, -1e38, 0, 0, -1e38, 0, 0, 0}";
    let graph = |body: &str| bare(", float[1,1,3,3] m", inits, body).replace(",S,", ",3,").replace(",T,", ",3,");
    assert!(line(&fused(&graph(&body)), "MultiHeadAttention").contains("unidirectional = 1"));
    let both = body.replace("weights = Softmax <axis = -1> (a)", "b = Add (a, m) weights = Softmax <axis = -1> (b)");
    assert!(!line(&fused(&graph(&both)), "MultiHeadAttention").contains("unidirectional"));
    let small =
        body.replace("weights = Softmax <axis = -1> (a)", "b = Add (a, half) weights = Softmax <axis = -1> (b)");
    assert!(line(&fused(&graph(&small)), "MultiHeadAttention").contains("unidirectional = 1"));
}

/// Two heads with a cache, whose keys and values the model returns.
const CACHED: &str = r#"<opset_import: ["" : 17]>
    g (float[B,S,16] a, float[B,2,P,8] pk, float[B,2,P,8] pv) => (float[B,S,16] y, float[B,2,T,8] k, float[B,2,T,8] v)
    <int64[4] split = {0, 0, 2, 8}, int64[3] join = {0, 0, 16}> {
        a4 = Reshape (a, split)
        q = Transpose <perm = [0, 2, 1, 3]> (a4)
        new = Neg (q)
        k = Concat <axis = 2> (pk, new)
        v = Concat <axis = -2> (pv, q)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        c = MatMul (p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        y = Reshape (ct, join)
    }"#;

#[test]
fn hands_caches_on() {
    let printed = fused(CACHED);
    let made = line(&printed, "MultiHeadAttention");
    assert!(made.contains(", k, v = com.microsoft") && made.ends_with(", pk, pv)"), "{made}");
    assert!(!printed.contains("Concat"), "{printed}");
}

/// The kernel takes several new positions behind a cache of one sequence.
#[test]
fn hands_caches_to_grouped_queries_where_that_is_asked_for() {
    let asked = |value: &str| {
        ort().with_settings(std::collections::BTreeMap::from([(
            "fuse-attention.grouped-caches".to_owned(),
            value.to_owned(),
        )]))
    };
    let one = CACHED.replace("[B,", "[1,").replace("S,16]", "3,16]");
    let printed = check_in(&FuseAttention, &one, &asked("true"));
    let made = line(&printed, "GroupQueryAttention");
    assert!(
        made.contains(", k, v = com.microsoft") && made.contains("causal = 0") && made.contains(", pk, pv, "),
        "{made}"
    );
    assert!(!printed.contains("Concat"), "{printed}");
    assert!(check_in(&FuseAttention, &one, &asked("false")).contains("MultiHeadAttention"));
    let wide = one.replace("P,8]", "P,12]").replace("T,8]", "T,12]").replace("3,16]", "3,24]");
    let wide = wide.replace("{0, 0, 2, 8}", "{0, 0, 2, 12}").replace("{0, 0, 16}", "{0, 0, 24}");
    assert!(check_in(&FuseAttention, &wide, &asked("true")).contains("MultiHeadAttention"));
}

#[test]
fn keeps_caches_apart_that_are_not_returned_or_come_first() {
    let inner = CACHED.replace(", float[B,2,T,8] k, float[B,2,T,8] v)", ", float[B,2,T,8] k)");
    assert!(fused(&inner).contains("Concat"));
    let first = CACHED.replace(
        "s = MatMul (q, kt)",
        "sizes = Shape (k) many = Cast <to = 1> (sizes) few = ReduceMax <keepdims = 0> (many) \
        more = Mul (q, few) s = MatMul (more, kt)",
    );
    assert!(fused(&first).contains("Concat"));
}

#[test]
fn onnx_runtime_holds_the_standard_attention_to_more() {
    let row = fixed(23).replace("float[2,1,3,5] mask", "bool[2,1,1,5] seen").replace("scaled, mask", "scaled, mask0");
    let row = row.replace("masked = ", "mask0 = Where (seen, zero, low) masked = ");
    let row = row.replace("float root", "float zero = {0}, float low = {-3.4028235e38}, float root");
    let printed = check(&FuseAttention, &row);
    assert!(printed.contains("Expand (") && printed.contains("Max ("), "{printed}");
    let inf = row.replace("-3.4028235e38", "-inf");
    check_refuses(&FuseAttention, &inf, "a mask may hold the lowest number or less");
    let hidden = inf
        .replace("mask0 = Where (seen, zero, low) masked = Add (scaled, mask0)", "masked = Where (seen, scaled, low)");
    check_refuses(&FuseAttention, &hidden, "is not a number, and 0 in ONNX Runtime's Attention");
    let guarded = hidden.replace(
        "weights = Softmax <axis = -1> (masked)",
        "p = Softmax <axis = -1> (masked) \
        missing = IsNaN (p) weights = Where (missing, zero, p)",
    );
    assert!(check(&FuseAttention, &guarded).contains("Attention <scale"));
    check_refuses(&FuseAttention, &fixed(23), "a mask may hold");
    check_refuses(&FuseAttention, &plain(23), "batch or lengths 0");
}

#[test]
fn writes_what_is_not_slower() {
    let slow = |op: &str| ort().with_slow_kernels([op.to_owned()].into());
    assert!(check_in(&FuseAttention, PROJECTED, &slow("Attention")).contains("MultiHeadAttention"));
    check_refuses_in(&FuseAttention, &plain(17), "is slower than its steps", &slow("MultiHeadAttention"));
    let grouped = check_in(&FuseAttention, &grouped_fixed("given"), &slow("GroupQueryAttention"));
    assert!(grouped.contains("MultiHeadAttention"), "{grouped}");
}

#[test]
fn refuses() {
    check_refuses(&FuseAttention, &plain(22), "Attention needs opset 23");
    let shown = plain(17).replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,2,S,T] weights)");
    check_refuses_in(&FuseAttention, &shown, "the scores or weights are an output too", &ort());
    let used = plain(17).replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,2,S,T] other)");
    let used = used.replace("context = ", "other = Neg (scaled) context = ");
    check_refuses_in(&FuseAttention, &used, "the scores or weights have other uses", &ort());
    let varying = plain(17).replace("mask) =>", "mask, float[B,1,S,T] r) =>").replace("(scores, root)", "(scores, r)");
    check_refuses_in(&FuseAttention, &varying, "a factor of the scores varies along the keys", &ort());
    let other =
        plain(17).replace("float[B,T,8] c", "float[B,U,8] c").replace("float[B,1,S,T] mask", "float[B,1,S,W] mask");
    check_refuses_in(&FuseAttention, &other, "queries, keys and values do not fit", &ort());
    let between = plain(17).replace("context = MatMul (weights", "less = Mul (weights, root) context = MatMul (less");
    check_refuses_in(
        &FuseAttention,
        &between,
        "`Mul` lies between the softmax and the product with the values",
        &ort(),
    );
    let abs = plain(17).replace("Softmax <axis = -1> (masked)", "Softmax <axis = -1> (abs)");
    let abs = abs.replace("weights = ", "abs = Abs (masked) weights = ");
    check_refuses_in(
        &FuseAttention,
        &abs,
        "`Abs` lies between the product of queries and keys and the softmax",
        &ort(),
    );
    let axis = plain(17).replace("Softmax <axis = -1>", "Softmax <axis = 2>");
    check_refuses_in(&FuseAttention, &axis, "the softmax is not over the keys", &ort());
    let weak = plain(17)
        .replace("float[B,1,S,T] mask", "bool[B,1,S,T] mask")
        .replace("float root", "float low = {-1e4}, float root");
    let weak = weak.replace("Add (scaled, mask)", "Where (mask, scaled, low)");
    check_refuses_in(&FuseAttention, &weak, "what hidden scores become does not hide them in every sum", &ort());
    let rows = plain(17).replace("float[B,1,S,T] mask", "float[C,1,S,T] mask");
    check_refuses_in(
        &FuseAttention,
        &rows,
        "no operand of a `Add` before the softmax is provably a product of its shape",
        &ort(),
    );
    let zero = plain(17).replace("float root = {2}", "float root = {inf}");
    check_refuses_in(&FuseAttention, &zero, "the scale is 0 or not finite", &ort());
}

/// The scores of `bare` without a mask, and the weights of `scores`.
fn scored(inputs: &str, inits: &str, body: &str) -> String {
    bare(inputs, inits, &format!("{TURN} s = MatMul (q, kt) {body}"))
}

fn refuses_ort(graph: &str, reason: &str) {
    check_refuses_in(&FuseAttention, graph, reason, &ort());
}

/// A graph with one operator set more, for operators that nothing is known of.
fn strange(graph: &str) -> String {
    let (opset, rest) = graph.split_once(']').unwrap();
    format!(r#"{opset}, "test" : 1]{rest}"#)
}

const SOFTMAX: &str = "weights = Softmax <axis = -1>";

#[test]
fn refuses_masks_that_are_not_known_to_fit() {
    let masked = format!("a = Add (s, m) {SOFTMAX} (a)");
    let sized = |graph: String| graph.replace("[B,2,S,8]", "[2,2,3,8]").replace("[B,2,T,8]", "[2,2,5,8]");
    let stated = sized(scored("", ", float[2,2,3,5] a", &format!("m = test.Strange (q) {masked}")));
    refuses_ort(&strange(&stated), "the shape of a mask is unknown");
    let numbers = scored(", float[B,1,1,T] seen", "", &format!("a = Where (seen, s, low) {SOFTMAX} (a)"));
    refuses_ort(&numbers, "the condition of a mask is not boolean");
    let wide = scored(
        ", float[B,1,S,T] m",
        "",
        "w = Cast <to = 1> (s) a = Add (w, m) p = Softmax <axis = -1> (a) weights = Cast <to = 10> (p)",
    );
    let wide = wide.replace("float[B,2", "float16[B,2");
    refuses_ort(&wide, "a mask has another type than the values");
    let fixed = |mask: &str| sized(scored(mask, "", &masked));
    refuses_ort(&fixed(", float[C,1,3,5] m"), "the sizes of the mask are not provably 1 or those of batch and heads");
    refuses_ort(&fixed(", float[1,H,3,5] m"), "the sizes of the mask are not provably 1 or those of batch and heads");
    refuses_ort(&fixed(", float[1,1,R,5] m"), "the mask has another number of queries");
    let two = fixed(", float[1,1,R,5] m, float[1,1,W,5] n")
        .replace("(a)", "(b)")
        .replace("weights =", "b = Add (a, n) weights =");
    refuses_ort(&two, "two masks are not provably of sizes that fit");
}

#[test]
fn refuses_masks_where_axes_are_regrouped() {
    let graph = |wide: &str, step: &str| {
        format!(
            r#"<opset_import: ["" : 17]>
            g (float[6,4,8] q, float[6,5,8] k, float[6,5,8] v, float[3,1,4,5] m, float[2,1,1] r) => (float[6,4,8] y)
            <int64[4] wide = {{{wide}}}, int64[3] narrow = {{6, 4, 5}}> {{
                kt = Transpose <perm = [0, 2, 1]> (k)
                s = MatMul (q, kt)
                s4 = Reshape (s, wide)
                a = {step}
                s3 = Reshape (a, narrow)
                p = Softmax <axis = -1> (s3)
                y = MatMul (p, v)
            }}"#
        )
    };
    refuses_ort(&graph("3, 2, 4, 5", "Add (s4, m)"), "the axes of the scores are regrouped before a mask is added");
    refuses_ort(&graph("3, 2, 4, 5", "Mul (s4, r)"), "the axes of the scores are regrouped before they are multiplied");
}

#[test]
fn repeats_nothing_before_there_is_expand() {
    let row = plain(7).replace("float[B,1,S,T] mask", "float[B,1,1,T] mask").replace("axis = -1", "axis = 3");
    refuses_ort(&row, "a mask of one row is repeated with Expand of opset 8");
    let windows = r#"<opset_import: ["" : 7]>
        g (float[3,2,4,8] q, float[3,2,4,8] k, float[3,2,4,8] v, float[1,3,1,4,4] m) => (float[3,2,4,8] y)
        <int64[5] wide = {1, 3, 2, 4, 4}, int64[4] narrow = {3, 2, 4, 4}> {
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            s = MatMul (q, kt)
            s5 = Reshape (s, wide)
            sm = Add (s5, m)
            s4 = Reshape (sm, narrow)
            p = Softmax <axis = 3> (s4)
            y = MatMul (p, v)
        }"#;
    refuses_ort(windows, "a mask is repeated with Expand of opset 8");
}

#[test]
fn refuses_heads_that_are_not_known_to_fit() {
    let plain = scored("", "", &format!("{SOFTMAX} (s)"));
    let sized = |q: &str, k: &str, v: &str| {
        let graph = plain
            .replace("float[B,2,S,8] q", &format!("float[{q}] q"))
            .replace("float[B,2,T,8] k", &format!("float[{k}] k"));
        graph.replace("float[B,2,T,8] v", &format!("float[{v}] v")).replace("float[B,2,S,8] y", "float[] y")
    };
    let vector = r#"<opset_import: ["" : 17]> g (float[S,8] q, float[8,T] k, float[T] v) => (float[S] y) {
        s = MatMul (q, k) p = Softmax <axis = -1> (s) y = MatMul (p, v) }"#;
    refuses_ort(vector, "queries, keys or values have less than two axes");
    let query = r#"<opset_import: ["" : 17]> g (float[8] q, float[8,T] k, float[T,6] v) => (float[6] y) {
        s = MatMul (q, k) p = Softmax <axis = -1> (s) y = MatMul (p, v) }"#;
    refuses_ort(query, "the scores have less than two axes");
    let stated =
        strange(&plain).replace("(float[B,2,S,8] y)", "(float[B,2,S,8] y, float[B,2,8,T] kt)").replace("(k)", "(u)");
    let stated = stated.replace("kt = ", "u = test.Strange (k) kt = ");
    refuses_ort(&stated, "the shape of queries, keys or values is unknown");
    refuses_ort(&sized("B,2,S,D", "B,2,T,D", "B,2,T,8"), "the size of a head is unknown");
    refuses_ort(&sized("B,N,S,8", "B,N,T,8", "B,N,T,8"), "the number of heads is unknown");
    refuses_ort(&sized("1,2,S,8", "B,2,T,8", "B,2,T,8"), "the queries are not provably as many as the scores");
    refuses_ort(&sized("B,2,S,8", "B,2,T,8", "B,1,T,8"), "keys and values have different heads");
    refuses_ort(&sized("B,2,S,8", "1,2,T,8", "1,2,T,8"), "the keys are broadcast along the batch");
    refuses_ort(
        &sized("A,B,2,S,8", "A,B,1,T,8", "A,B,1,T,8").replace("[0, 1, 3, 2]", "[0, 1, 2, 4, 3]"),
        "heads share keys, and there are several batch axes",
    );
    refuses_ort(
        &sized("B,2,S,8", "B,1,T,8", "B,1,T,8").replace(": 18", ": 13"),
        "heads that share keys need a Reshape of opset 14",
    );
    let many = sized("B,2048,3,8", "B,1,T,8", "B,1,T,8").replace("q, float", "q, float[B,1,3,T] m, float");
    refuses_ort(
        &many.replace("weights = Softmax <axis = -1> (s)", "a = Add (s, m) weights = Softmax <axis = -1> (a)"),
        "too many heads share keys",
    );
    let open = sized("B,200,S,8", "B,1,T,8", "B,1,T,8");
    refuses_ort(&open, "the sizes of batch and queries cannot be read off an input");
    let huge = i64::MAX / 2 + 1;
    refuses_ort(
        &sized(&format!("2,{huge},3,8"), &format!("2,{huge},5,8"), &format!("2,{huge},5,8")),
        "the heads are too wide",
    );
    refuses_ort(&sized(&format!("2,4,{huge},8"), "2,1,5,8", "2,1,5,8"), "the sizes of the queries overflow");
    let wide = format!("{huge},4,2,3,8");
    refuses_ort(
        &sized(&wide, &wide, &wide).replace("[0, 1, 3, 2]", "[0, 1, 2, 4, 3]"),
        "the size of the batch overflows",
    );
    let batches = sized("A,B,2,S,8", "A,B,2,T,8", "A,B,2,T,8").replace("[0, 1, 3, 2]", "[0, 1, 2, 4, 3]");
    refuses_ort(&batches.replace(": 18", ": 13"), "several sizes that may be 0 need a Reshape of opset 14");
    refuses_ort(&batches, "a size cannot be read off an input of the graph");
    let long =
        grouped_fixed("causal").replace("[2,3,", "[2,3000000000,").replace("[2,1,3,3]", "[2,1,3000000000,3000000000]");
    refuses_ort(&long, "the batch or the length is no int32");
    let narrowed = plain
        .replace("MatMul (weights, v)", "MatMul (half_weights, v)")
        .replace("y = ", "half_weights = Cast <to = 10> (weights) y = ");
    refuses_ort(
        &narrowed.replace("float[B,2,T,8] v", "float16[B,2,T,8] v"),
        "queries, keys and values have different types",
    );
}

#[test]
fn refuses_sinks_that_are_not_one_score_for_each_query() {
    let sink = |shape: &str, mask: &str, step: &str| {
        let inits = ", int64[1] last = {-1}, int64[1] first = {0}, int64[1] three = {3}";
        let body = format!("{step} p = Softmax <axis = 3> (e) weights = Slice (p, first, last, three)");
        scored(&format!("{mask}, float[{shape}] sink"), inits, &body)
    };
    let joined = "a = Add (s, m) e = Concat <axis = 3> (a, sink)";
    let mask = ", float[1,1,S,T] m";
    let fits = sink("B,2,S,1", mask, joined);
    refuses_ort(&sink("C,2,S,1", mask, joined), "a sink is not one score for each query of each head");
    refuses_ort(&sink("B,2,S,1", "", "e = Concat <axis = 3> (s, sink)"), "a sink without a mask");
    refuses_ort(&fits.replace(": 18", ": 10"), "a key is added with the Pad of opset 11");
    let sized = fits
        .replace("[B,2,S,", "[2,2,3,")
        .replace("[B,2,T,", "[2,2,5,")
        .replace("[1,1,S,T]", "[1,1,3,5]")
        .replace(": 18", ": 23");
    check_refuses(&FuseAttention, &sized, "Attention has no sink");
    let short = sink("B,2,S,1", "", "e = Identity (s)")
        .replace("[B,2,T,8] k", "[B,2,6,8] k")
        .replace("[B,2,T,8] v", "[B,2,5,8] v");
    refuses_ort(&short, "the last weight is dropped, and its score is not one beside the others");
}

#[test]
fn refuses_scores_that_are_not_read() {
    let given = bare(", float[B,2,S,T] given", "", &format!("{SOFTMAX} (given)"));
    refuses_ort(&given, "the scores are not computed by a product");
    let stated = bare("", "", &format!("s = test.Strange (q) {SOFTMAX} (s)"))
        .replace("(float[B,2,S,8] y)", "(float[B,2,S,8] y, float[B,2,S,T] weights)");
    refuses_ort(&strange(&stated), "the number of axes of the scores is unknown");
    let einsum = bare(
        "",
        ", float[B,2,S,T] a",
        &format!(
            "u = test.Strange (q) s = Einsum <equation = \"bhid,bhjd->bhij\"> (u, k) a = Identity (s) {SOFTMAX} (a)"
        ),
    );
    refuses_ort(&strange(&einsum), "the sizes of the scores are unknown");
    let chain: String = (0..40).map(|i| format!("i{} = Identity (i{i}) ", i + 1)).collect();
    let chain = scored("", "", &format!("i0 = Identity (s) {chain} {SOFTMAX} (i40)"));
    refuses_ort(&chain, "too many nodes lie between the product of queries and keys and the softmax");
    let where_to =
        scored(", float[B,1,S,T] m, bool[B,1,S,T] seen", "", &format!("a = Where (seen, s, m) {SOFTMAX} (a)"));
    refuses_ort(&where_to, "what hidden scores become is not one constant number");
}

#[test]
fn refuses_other_orders_of_steps() {
    let refuses = |body: &str, reason: &str| {
        refuses_ort(&scored(", float[B,1,S,T] m, float[2,1,1] r", "", &format!("{body} {SOFTMAX} (z)")), reason);
    };
    refuses("a = Tanh (s) z = Tanh (a)", "the scores are capped twice");
    refuses("a = Tanh (s) z = Mul (a, r)", "capped scores are multiplied by a computed factor");
    refuses("a = Add (s, m) z = Tanh (a)", "something is added before the scores are capped");
    refuses("a = Add (s, m) z = Mul (a, r)", "something is added before the scores meet a computed factor");
    refuses("a = Add (s, m) z = Mul (a, inf)", "an addend is multiplied by what is not finite");
    let factor = scored("", ", float[2,2,3,5] z", &format!("r = test.Strange (q) z = Mul (s, r) {SOFTMAX} (z)"));
    let factor = factor.replace("[B,2,S,8]", "[2,2,3,8]").replace("[B,2,T,8]", "[2,2,5,8]");
    refuses_ort(&strange(&factor), "the shape of a factor of the scores is unknown");
}

#[test]
fn the_standard_attention_needs_batch_and_heads() {
    let three = r#"<opset_import: ["" : 23]> g (float[2,3,8] q, float[2,8,5] k, float[2,5,8] v) => (float[2,3,8] y) {
        s = MatMul (q, k) p = Softmax (s) y = MatMul (p, v) }"#;
    check_refuses(&FuseAttention, three, "batch and heads are one axis");
    let turned = r#"<opset_import: ["" : 23]> g (float[2,4,3,8] q, float[2,4,8,5] k, float[2,4,5,8] v) => (float[2,3,4,8] y) {
        s = MatMul (q, k) p = Softmax (s) y = Einsum <equation = "bhij,bhjd->bihd"> (p, v) }"#;
    check_refuses(&FuseAttention, turned, "batch and heads are regrouped before the product with the values");
}

#[test]
fn only_one_operator_caps_scores() {
    let body = format!("a = Tanh (s) {SOFTMAX} (a)");
    let known = scored("", "", &body).replace("[B,2,S,", "[2,2,3,").replace("[B,2,T,", "[2,2,3,");
    check_refuses(&FuseAttention, &known.replace(": 18", ": 23"), "ONNX Runtime caps the scores after the mask");
    let slow = ort().with_slow_kernels(["GroupQueryAttention".to_owned()].into());
    check_refuses_in(&FuseAttention, &known, "MultiHeadAttention has no soft cap", &slow);
    let shared = known.replace("float[2,2,3,8] k", "float[2,1,3,8] k").replace("float[2,2,3,8] v", "float[2,1,3,8] v");
    check_refuses_in(&FuseAttention, &shared, "MultiHeadAttention has no soft cap", &slow);
}

#[test]
fn reads_no_size_off_what_comes_later() {
    // The nodes stand in another order than they are computed in.
    let graph = r#"<opset_import: ["" : 17]>
        g (float[A,B,3,2,4,8] q, float[A,B,3,2,4,8] k, float[A,B,3,2,4,8] v, float[1,3,1,4,4] m) => (float[] y)
        <int64[5] wide = {-1, 3, 2, 4, 4}, int64[1] zero = {0}, int64[1] two = {2}, int64[4] rest = {3, 2, 4, 4}> {
            y = MatMul (p, v)
            kt = Transpose <perm = [0, 1, 2, 3, 5, 4]> (k)
            s = MatMul (q, kt)
            s5 = Reshape (s, wide)
            sm = Add (s5, m)
            l = Shape (q)
            front = Slice (l, zero, two)
            to = Concat <axis = 0> (front, rest)
            s6 = Reshape (sm, to)
            p = Softmax <axis = -1> (s6)
        }"#;
    refuses_ort(graph, "a size by which a mask is repeated cannot be read off an input");
}

#[test]
fn only_what_zeroes_missing_weights_is_looked_through() {
    let refuses = |inputs: &str, step: &str| {
        let body = format!("p = Softmax <axis = -1> (s) {step}");
        let graph = scored(inputs, "", &body).replace("float[B,2,S,8] y)", "float[B,2,S,8] y, bool[B,2,S,T] other)");
        refuses_ort(&graph, "`Where` lies between the softmax and the product with the values");
    };
    let end = "other = Not (also)";
    refuses(", bool[B,2,S,T] also", &format!("missing = IsNaN (p) weights = Where (missing, half, p) {end}"));
    refuses(
        ", bool[B,2,S,T] also, float[B,2,S,T] r",
        &format!("missing = IsNaN (r) weights = Where (missing, zero, p) {end}"),
    );
    refuses("", "missing = IsNaN (p) weights = Where (missing, zero, p) other = Not (missing)");
}

#[test]
fn only_the_last_weight_may_be_dropped() {
    let refuses = |slice: &str| {
        let inits = ", int64[1] zero1 = {0}, int64[1] one = {1}, int64[1] far = {9999}, int64[1] less = {-2}, int64[1] three = {3}";
        let graph = scored("", inits, &format!("p = Softmax <axis = -1> (s) weights = Slice {slice}"));
        let graph =
            graph.replace("float[B,2,T,8] k", "float[B,2,6,8] k").replace("float[B,2,T,8] v", "float[B,2,U,8] v");
        refuses_ort(&graph, "`Slice` lies between the softmax and the product with the values");
    };
    refuses("(p, one, far, three)");
    refuses("(p, zero1, less, three)");
}

#[test]
fn a_shift_along_the_queries_is_seen() {
    let body = format!("most = ReduceMax (s, two) a = Sub (s, most) {SOFTMAX} (a)");
    refuses_ort(&scored("", ", int64[1] two = {2}", &body), "the scores or weights have other uses");
}

#[test]
fn scores_that_are_repeated_are_not_followed() {
    let graph = scored(", float[1,1,S,T] m", "", &format!("a = Add (s, m) {SOFTMAX} (a)"));
    let graph = graph.replace("float[B,2,S,8] q", "float[B,2,1,8] q");
    refuses_ort(&graph, "no operand of a `Add` before the softmax is provably a product of its shape");
}

#[test]
fn scales_that_vanish_together_are_refused() {
    let body = format!("{TURN} qs = Mul (q, tiny) s = MatMul (qs, kt) a = Mul (s, tiny) {SOFTMAX} (a)");
    refuses_ort(&bare("", ", float tiny = {1e-30}", &body), "the scale is 0 or not finite");
}

#[test]
fn what_favours_later_keys_is_no_causal_mask() {
    let body = format!("a = Sub (s, causal) {SOFTMAX} (a)");
    let inits = ", float[3,3] causal = {0, -1e38, -1e38, 0, 0, -1e38, 0, 0, 0}";
    let graph = scored("", inits, &body).replace(",S,", ",3,").replace(",T,", ",3,");
    assert!(!line(&fused(&graph), "MultiHeadAttention").contains("unidirectional"));
}

#[test]
fn a_mask_that_favours_keys_is_no_padding() {
    let graph = plain(17).replace("float[B,1,S,T] mask", "bool[B,1,1,T] seen");
    let graph = graph.replace("float root", "float zero = {0}, float more = {0.5}, float root");
    let graph = graph.replace("masked = ", "mask = Where (seen, zero, more) masked = ");
    assert!(!line(&fused(&graph), "MultiHeadAttention").contains("mask_filter_value"));
}
