//! Tests of the attention fusion.

use super::*;
use crate::testing::{check, check_in, check_refuses, check_refuses_in};
use insta::assert_snapshot;

fn ort() -> Context<'static> {
    Context { target: Target::Ort, ..Context::default() }
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

#[test]
fn writes_multi_head_attention() {
    assert_snapshot!(check_in(&FuseAttention, &plain(17), &ort()), @r#"
    g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,S,T] mask) => (float[B,S,8] y) <
        int64[4] split = {0, 0, 2, 4},
        int64[3] join = {0, 0, 8},
        float root = {2}
    > {
        y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.5> (a, b, c, "", "", mask)  # float[B,S,8]
    }
    "#);
}

#[test]
fn writes_the_standard_attention() {
    assert_snapshot!(check(&FuseAttention, &plain(23)), @"
    g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,S,T] mask) => (float[B,S,8] y) <
        int64[4] split = {0, 0, 2, 4},
        int64[3] join = {0, 0, 8},
        float root = {2}
    > {
        y = Attention <scale = 0.5, q_num_heads = 2, kv_num_heads = 2> (a, b, c, mask)  # float[B,S,8]
    }
    ");
}

#[test]
fn leaves_heads_separate_that_nothing_joins() {
    assert_snapshot!(check(&FuseAttention, r#"<opset_import: ["" : 23]>
        g (bool c, float[2,4,S,8] q, float[2,4,T,8] k, float[2,4,T,8] v) => (float[2,4,S,8] y) <float scale = {0.5}> {
            y = If (c) <then_branch = a () => (float[2,4,S,8] p) {
                kt = Transpose <perm = [0, 1, 3, 2]> (k)
                qs = Mul (q, scale)
                ks = Mul (kt, scale)
                scores = MatMul (qs, ks)
                weights = Softmax (scores)
                p = MatMul (weights, v)
            }, else_branch = b () => (float[2,4,S,8] n) { n = Neg (q) }>
        }"#), @"
    g (bool c, float[2,4,S,8] q, float[2,4,T,8] k, float[2,4,T,8] v) => (float[2,4,S,8] y) <
        float scale = {0.5}
    > {
        y = If (c) <then_branch = a () => (p_1) {
            p_1 = Attention <scale = 0.25> (q, k, v)
        }, else_branch = b () => (float[2,4,S,8] n) {
            n = Neg (q)  # float[2,4,S,8]
        }>  # float[2,4,S,8]
    }
    ");
}

#[test]
fn joins_three_projections() {
    assert_snapshot!(check_in(&FuseAttention, r#"<opset_import: ["" : 17]>
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
        }"#, &ort()), @r#"
    g (float[B,S,2] x) => (float[B,S,2] y) <
        int64[4] split = {0, 0, 2, 1},
        int64[3] join = {0, 0, 2},
        float[2,2] wq = {1, 2, 3, 4},
        float[2,2] wk = {5, 6, 7, 8},
        float[2,2] wv = {9, 1, 2, 3},
        float[2,6] y_weight = ["elements": "12", "hash": "db1a3c26"]
    > {
        y = com.microsoft.Attention <num_heads = 2, scale = 1.0> (x, y_weight)  # float[B,S,2]
    }
    "#);
}

#[test]
fn unpacks_a_projection() {
    assert_snapshot!(check_in(&FuseAttention, r#"<opset_import: ["" : 17]>
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
        }"#, &ort()), @r#"
    g (float[B,5,12] packed) => (float[B,5,4] y, float[B,5,12] shown) <
        int64[5] split = {0, 0, 3, 2, 2},
        int64[3] join = {0, 0, 4},
        int64[3] each = {1, 1, 1},
        int64[1] first = {0},
        float[12] bias = ["elements": "12", "hash": "a764f3b1"],
        int64[3] y_split = {4, 4, 4}
    > {
        shown = Add (packed, bias)  # float[B,5,12]
        y_1, y_2, y_3 = Split <axis = -1> (shown, y_split)
        y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 1.0> (y_1, y_2, y_3)  # float[B,5,4]
    }
    "#);
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
fn writes_group_query_attention() {
    assert_snapshot!(check_in(&FuseAttention, &grouped("causal"), &ort()), @r#"
    g (float[B,S,32] a, float[B,S,16] b, float[B,S,16] c, float[B,1,S,S] given) => (float[B,S,32] y) <
        int64[4] heads = {0, 0, 2, 16},
        int64[4] shared = {0, 0, 1, 16},
        int64[3] join = {0, 0, 32},
        float scale = {0.5},
        int64[1] first = {0},
        int64[1] one = {1},
        int64[1] two = {2},
        int64[1] three = {3},
        int64[1] end = {9223372036854775807},
        int64 zero = {0},
        int64 step = {1},
        float[8] frequency = {1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001},
        float seen = {0},
        float unseen = {-3e38},
        int64[1] last = {-1},
        int64[1] eight = {8},
        int64[1] sixteen = {16},
        int64[2] outer = {0, 1},
        int64[3] outermost = {0, 1, 2},
        int32[1] y_one = {1},
        int64[2] y_shape = {-1, 8}
    > {
        shape = Shape (a)
        length = Gather <axis = 0> (shape, step)
        batch = Gather <axis = 0> (shape, first)
        length1 = Gather <axis = 0> (shape, one)
        positions = Range (zero, length, step)
        column = Unsqueeze (positions, last)
        floats = Cast <to = 1> (column)
        half = Mul (floats, frequency)
        y_1 = Cast <to = 6> (length1)
        y_2 = Sub (y_1, y_one)
        y_3 = Expand (y_2, batch)
        y_4 = Reshape (half, y_shape)
        y_5 = Cos (y_4)
        y_6 = Sin (y_4)
        y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, scale = 0.5, do_rotary = 1> (a, b, c, "", "", y_3, y_1, y_5, y_6)  # float[B,S,32]
    }
    "#);
}

#[test]
fn shares_keys_in_the_standard_attention() {
    let graph = grouped("causal").replace(r#"["" : 18]"#, r#"["" : 23]"#);
    let printed = check(&FuseAttention, &graph);
    let attention = printed.lines().find(|line| line.contains(" = Attention"));
    assert_snapshot!(attention.unwrap_or_default().trim(), @"
    context = Attention <scale = 0.5, is_causal = 1> (qr, kr, v)
    ");
}

#[test]
fn needs_no_mask() {
    let graph = grouped("given").replace("masked = Add (scaled, given)", "");
    let graph = graph.replace("Softmax <axis = -1> (masked)", "Softmax <axis = -1> (scaled)");
    let printed = check_in(&FuseAttention, &graph, &ort());
    assert!(printed.contains("causal = 0"), "{printed}");
}

#[test]
fn does_not_take_one_zero_for_a_causal_mask() {
    let graph = grouped("given")
        .replace("given) =>", "unused) =>")
        .replace("float scale", "float[1,1] given = {0}, float scale");
    check_refuses_in(&FuseAttention, &graph, "the mask does not have four known axes", &ort());
}

#[test]
fn works_in_half_precision() {
    let graph = plain(17).replace("float[B", "float16[B").replace("float root = {2}", "float16 root = {16384}");
    assert!(check_in(&FuseAttention, &graph, &ort()).contains("MultiHeadAttention"));
}

#[test]
fn keeps_a_mask_that_is_not_known_to_be_causal() {
    let printed = check_in(&FuseAttention, &grouped("given"), &ort());
    let attention = printed.lines().find(|line| line.contains("GroupQueryAttention"));
    assert_snapshot!(attention.unwrap_or_default().trim(), @r#"
    y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, scale = 0.5, causal = 0, do_rotary = 1> (a, b, c, "", "", y_3, y_1, y_5, y_6, "", given)  # float[B,S,32]
    "#);
}

#[test]
fn repeats_a_padding_mask() {
    let padding = plain(17).replace("float[B,1,S,T] mask", "float[B,1,1,T] mask");
    assert_snapshot!(check_in(&FuseAttention, &padding, &ort()), @r#"
    g (float[B,S,8] a, float[B,T,8] b, float[B,T,8] c, float[B,1,1,T] mask) => (float[B,S,8] y) <
        int64[4] split = {0, 0, 2, 4},
        int64[3] join = {0, 0, 8},
        float root = {2},
        int64[1] y_index = {1},
        int64[2] y_pads = {2, 1},
        int64 y_one = {1}
    > {
        y_1 = Shape (a)
        y_2 = Gather <axis = 0> (y_1, y_index)
        y_3 = Pad (y_2, y_pads, y_one)
        y_4 = Expand (mask, y_3)
        y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.5> (a, b, c, "", "", y_4)  # float[B,S,8]
    }
    "#);
}

#[test]
fn refuses() {
    check_refuses(&FuseAttention, &plain(22), "Attention needs opset 23");
    let column = plain(17).replace("float[B,1,S,T] mask", "float[B,1,S,1] mask");
    check_refuses_in(&FuseAttention, &column, "the mask broadcasts over keys", &ort());
    let small = grouped("given").replace("16", "12").replace("32", "24").replace("eight = {8}", "eight = {6}");
    let small = small.replace("float[8] frequency = {1, 0.5, ", "float[6] frequency = {");
    check_refuses_in(&FuseAttention, &small, "the size of a head", &ort());
    let shown = plain(17).replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,2,S,T] weights)");
    check_refuses_in(&FuseAttention, &shown, "an inner value is a graph output", &ort());
    let varying = plain(17).replace("mask) =>", "mask, float r) =>").replace("(scores, root)", "(scores, r)");
    check_refuses_in(&FuseAttention, &varying, "the scale is not a constant number", &ort());
    let other = plain(17).replace("float[B,T,8] c", "float[B,U,8] c");
    check_refuses_in(&FuseAttention, &other, "queries, keys and values do not fit", &ort());
}
