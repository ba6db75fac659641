use super::*;
use crate::testing::{check, check_in, check_refuses, check_refuses_in, check_untouched};
use insta::assert_snapshot;

const SLICED: &str = r#"<opset_import: ["" : 23]>
    g (float[B,2,S,4] x, float[B,S] p) => (float[B,2,S,4] y)
    <float[2] frequencies = {1, 0.1}, int64[1] one = {1}, int64[1] end = {-1}, int64[1] zero = {0}, int64[1] two = {2},
     int64[1] all = {9223372036854775807}> {
        u = Unsqueeze (p, end)
        f = Mul (u, frequencies)
        both = Concat <axis = -1> (f, f)
        cosines = Cos (both)
        sines = Sin (both)
        cos = Unsqueeze (cosines, one)
        sin = Unsqueeze (sines, one)
        a = Mul (x, cos)
        low = Slice (x, zero, two, end)
        high = Slice (x, two, all, end)
        minus = Neg (high)
        turned = Concat <axis = -1> (minus, low)
        b = Mul (turned, sin)
        y = Add (a, b)
    }"#;

#[test]
fn fuses_the_sum_of_two_products() {
    assert_snapshot!(check(&FuseRotary, SLICED), @"
    g (float[B,2,S,4] x, float[B,S] p) => (float[B,2,S,4] y) <
        float[2] frequencies = {1, 0.1},
        int64[1] one = {1},
        int64[1] end = {-1},
        int64[1] zero = {0},
        int64[1] two = {2},
        int64[1] all = {9223372036854775807}
    > {
        u = Unsqueeze (p, end)
        f = Mul (u, frequencies)
        y_1 = Cos (f)
        y_2 = Sin (f)
        y = RotaryEmbedding (x, y_1, y_2)  # float[B,2,S,4]
    }
    ");
}

#[test]
fn takes_halves_of_a_split_in_any_order_with_a_factor() {
    let graph = SLICED
        .replace("low = Slice (x, zero, two, end)", "low, high = Split <axis = -1, num_outputs = 2> (x)")
        .replace("high = Slice (x, two, all, end)", "")
        .replace("cos = Unsqueeze (cosines, one)", "more = Mul (cosines, scale) cos = Unsqueeze (more, one)")
        .replace("int64[1] one", "float scale = {1.5}, int64[1] one")
        .replace("Mul (x, cos)", "Mul (cos, x)")
        .replace("Add (a, b)", "Add (b, a)");
    let fused = check(&FuseRotary, &graph);
    assert!(fused.contains("y = RotaryEmbedding (x, ") && fused.contains("1.5"), "{fused}");
}

#[test]
fn repeats_angles_that_all_batches_share() {
    let graph = SLICED.replace("float[B,S] p", "float[1,S] p");
    assert_snapshot!(check(&FuseRotary, &graph), @"
    g (float[B,2,S,4] x, float[1,S] p) => (float[B,2,S,4] y) <
        float[2] frequencies = {1, 0.1},
        int64[1] one = {1},
        int64[1] end = {-1},
        int64[1] zero = {0},
        int64[1] two = {2},
        int64[1] all = {9223372036854775807},
        int64[2] y_ones = {1, 1}
    > {
        u = Unsqueeze (p, end)
        f = Mul (u, frequencies)
        y_1 = Cos (f)
        y_2 = Sin (f)
        y_3 = Shape <start = 0, end = 1> (x)
        y_4 = Concat <axis = 0> (y_3, y_ones)
        y_5 = Expand (y_1, y_4)
        y_6 = Expand (y_2, y_4)
        y = RotaryEmbedding (x, y_5, y_6)  # float[B,2,S,4]
    }
    ");
}

fn ort() -> PassContext<'static> {
    PassContext::default().with_target(Target::Ort)
}

#[test]
fn writes_the_operator_of_onnx_runtime() {
    let shared = SLICED.replace(": 23", ": 17").replace("float[B,S] p", "float[1,S] p");
    for graph in [shared, SLICED.replace(": 23", ": 14")] {
        let printed = check_in(&FuseRotary, &graph, &ort());
        assert_eq!(printed.matches("com.microsoft.RotaryEmbedding").count(), 1, "{printed}");
        assert!(!printed.contains("Neg ("), "{printed}");
        // An empty batch has no angles of its own, and the operator asks for as many as there are positions.
        assert_eq!(printed.contains("ConstantOfShape"), graph.contains("float[B,S] p"), "{printed}");
    }
    check_refuses_in(&FuseRotary, &SLICED.replace(": 23", ": 13"), "counted with operators of opset 14", &ort());
}

#[test]
fn leaves_an_embedding_to_the_attention_that_reads_it() {
    let scores = "t = Transpose <perm = [0, 1, 3, 2]> (y) m = MatMul (x, t) s = Mul (m, scale) z = Softmax (s)";
    let graph = SLICED
        .replace("y = Add (a, b)", &format!("y = Add (a, b) {scores}"))
        .replace("(float[B,2,S,4] y)", "(float[B,2,S,S] z)")
        .replace("int64[1] one", "float scale = {0.5}, int64[1] one");
    let fixed = graph.replace("[B,", "[2,").replace(",S", ",8").replace(",8,S", ",8,8");
    check_refuses_in(&FuseRotary, &fixed, "is still spelled out", &ort());
    // The operator that rotates by itself needs known sizes.
    assert!(check_in(&FuseRotary, &graph, &ort()).contains("RotaryEmbedding (x, "));
    check(&FuseRotary, &graph);
}

#[test]
fn works_in_half_precision_inside_a_branch() {
    let graph = r#"<opset_import: ["" : 23]>
        g (bool c, float16[B,2,S,4] x, float[B,S] p) => (float16[B,2,S,4] y)
        <float[2] frequencies = {1, 0.1}, int64[1] one = {1}, int64[1] end = {-1}, int64[1] zero = {0},
         int64[1] two = {2}, int64[1] four = {4}> {
            y = If (c) <then_branch = t () => (float16[B,2,S,4] r) {
                u = Unsqueeze (p, end)
                f = Mul (u, frequencies)
                both = Concat <axis = -1> (f, f)
                cosines = Cos (both)
                sines = Sin (both)
                cos16 = Cast <to = 10> (cosines)
                sin16 = Cast <to = 10> (sines)
                cos = Unsqueeze (cos16, one)
                sin = Unsqueeze (sin16, one)
                a = Mul (x, cos)
                low = Slice (x, zero, two, end)
                high = Slice (x, two, four, end)
                minus = Neg (high)
                turned = Concat <axis = -1> (minus, low)
                b = Mul (turned, sin)
                r = Add (a, b)
            }, else_branch = e () => (float16[B,2,S,4] z) { z = Neg (x) }>
        }"#;
    assert!(check(&FuseRotary, graph).contains("RotaryEmbedding"));
}

#[test]
fn refuses() {
    check_refuses(&FuseRotary, &SLICED.replace(": 23", ": 22"), "needs opset 23");
    check_refuses(
        &FuseRotary,
        &SLICED
            .replace("(f, f)", "(f, u)")
            .replace("0.1}", "0.1}, float[3] other = {1, 2, 3}")
            .replace("f = Mul (u, frequencies)", "f = Mul (u, other)"),
        "the angles of the two halves are not joined from one value",
    );
    check_refuses(
        &FuseRotary,
        &SLICED.replace("(float[B,2,S,4] y)", "(float[B,2,S,4] y, float[B,2,S,4] b)"),
        "graph output",
    );
    check_refuses(
        &FuseRotary,
        &SLICED.replace("sines = Sin (both)", "sines = Tanh (both)"),
        "the cosines or sines are not those of angles that are computed here",
    );
    check_refuses(&FuseRotary, &SLICED.replace("float", "double"), "not float or float16");
    check_untouched(&FuseRotary, &SLICED.replace("Concat <axis = -1> (minus, low)", "Concat <axis = -1> (low, minus)"));
    check_untouched(&FuseRotary, &SLICED.replace("(x, two, all, end)", "(x, zero, two, end)"));
    check_untouched(&FuseRotary, &SLICED.replace("low = Slice (x, zero, two, end)", "low = Slice (x, two, all, end)"));
}

#[test]
fn refuses_heads_and_angles_of_other_shapes() {
    let refuses = |graph: &str, reason: &str| check_refuses(&FuseRotary, graph, reason);
    let sliced = SLICED.replace(r#"["" : 23]"#, r#"["" : 23, "test" : 1]"#);
    let cos = "cos = Unsqueeze (cosines, one)";
    let strange = sliced.replace(cos, "cos = test.Strange (cosines)");
    refuses(&strange, "the shape of the cosines or sines is unknown");
    let by_head = sliced.replace("float[B,S] p", "float[B,2,S] p").replace(cos, "cos = Identity (cosines)");
    let by_head = by_head.replace("sin = Unsqueeze (sines, one)", "sin = Identity (sines)");
    refuses(&by_head, "the cosines or sines are not the same for all heads");
    let narrow = sliced.replace("cosines = Cos (both)", "cosines = Cos (u)");
    refuses(&narrow, "the cosines or sines have another size than the heads");
    let rounded = sliced
        .replace(cos, "rough = Cast <to = 16> (cosines) back = Cast <to = 1> (rough) cos = Unsqueeze (back, one)");
    refuses(&rounded, "the cosines or sines are rounded");
    let three = sliced.replace("float[B,2,S,4]", "float[2,S,4]").replace("float[B,S] p", "float[S] p");
    let three = three
        .replace(cos, "cos = Identity (cosines)")
        .replace("sin = Unsqueeze (sines, one)", "sin = Identity (sines)");
    refuses(&three, "the heads do not have four axes");
    refuses(&sliced.replace("float[B,S] p", "float[B,1] p"), "the angles are for another number of positions");
    refuses(&sliced.replace("float[B,2,S,4] x", "float[1,2,S,4] x"), "the angles are for another batch");
    let moved = sliced.replace("[B,2,S,4]", "[1,2,6,4]").replace("float[B,S] p", "float[2,3] p");
    let moved = moved
        .replace(cos, "cos = Reshape (cosines, to)")
        .replace("sin = Unsqueeze (sines, one)", "sin = Reshape (sines, to)");
    let moved = moved.replace("int64[1] one", "int64[4] to = {1, 1, 6, 4}, int64[1] one");
    refuses(&moved, "the angles have other axes than batch, positions and size");
    let apart = sliced
        .replace("Concat <axis = -1> (f, f)", "Concat <axis = -1> (f4, f4)")
        .replace("both = ", "f4 = Unsqueeze (f, one) both = ");
    let apart = apart
        .replace(cos, "cos = Identity (cosines)")
        .replace("sin = Unsqueeze (sines, one)", "sin = Identity (sines)");
    refuses(&apart, "neither the batch nor the positions of the angles are known");
}

#[test]
fn refuses_angles_of_which_little_is_known() {
    let refuses = |graph: &str, reason: &str| check_refuses(&FuseRotary, graph, reason);
    let shown = SLICED.replace(r#"["" : 23]"#, r#"["" : 23, "test" : 1]"#);
    let shown =
        shown.replace("=> (float[B,2,S,4] y)", "=> (float[B,2,S,4] y, float[B,S,4] cosines, float[B,S,4] sines)");
    let strange = shown.replace("f = Mul (u, frequencies)", "f = test.Strange (u)");
    refuses(&strange, "the number of axes of the angles is unknown");
    // A Cast that does not say to what.
    let typeless = shown.replace("f = Mul (u, frequencies)", "f0 = Mul (u, frequencies) f = Cast (f0)");
    refuses(&typeless, "the element type of the angles is unknown");
}

#[test]
fn counts_positions_where_the_operator_set_can() {
    let old = SLICED.replace(": 23", ": 13");
    check_refuses_in(&FuseRotary, &old, "positions are counted with operators of opset 14", &ort());
}
