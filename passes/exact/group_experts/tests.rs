use super::GroupExperts;
use crate::{
    PassContext,
    testing::{check, check_refuses, check_refuses_in, model},
};
use lathe_ir::text;

/// Numbers of a table, none of them alike.
fn numbers(count: usize) -> String {
    (0..count).map(|i| format!("{}", ((i * 37 % 23) as f64 - 11.0) / 8.0)).collect::<Vec<_>>().join(", ")
}

/// Two of three experts for every token. `tables` are constants, `body` makes `yf: [pairs, 2]` of `flat`, `column` and `row`.
fn layer(opset: i64, tables: &str, body: &str) -> String {
    format!(
        "<ir_version: 8, opset_import: [\"\" : {opset}]> g (float[T,2] x) => (float[T,2] y) <
            float[2,3] router = {{0.5, -1.25, 0.75, 1, 0.25, -0.5}}, int64[1] k = {{2}}, int64[1] one = {{1}},
            int64[1] last = {{-1}}, int64[3] wide = {{1, 2, 1}}, int64[3] columns = {{-1, 2, 1}}, int64[3] rows = {{-1, 1, 2}},
            int64[2] each = {{-1, 1}}, int64[3] pairs = {{-1, 2, 2}}, {tables}
        > {{
            scores = MatMul (x, router)
            p = Softmax <axis = -1> (scores)
            w, ids = TopK <axis = -1> (p, k)
            flat = Reshape (ids, last)
            alone = Unsqueeze (x, one)
            wider = Expand (alone, wide)
            column = Reshape (wider, columns)
            row = Reshape (wider, rows)
            {body}
            wc = Reshape (w, each)
            yw = Mul (yf, wc)
            y3 = Reshape (yw, pairs)
            y = ReduceSum <keepdims = 0> (y3, one)
        }}"
    )
}

/// A gated layer over columns, as PyTorch's exporters write it.
fn gated() -> String {
    let tables = format!("float[3,4,2] up = {{{}}}, float[3,2,2] down = {{{}}}", numbers(24), numbers(12));
    layer(
        17,
        &tables,
        "g1 = Gather <axis = 0> (up, flat)
        h = MatMul (g1, column)
        hf = Squeeze (h, last)
        a, b = Split <axis = 1> (hf)
        s = Sigmoid (a)
        silu = Mul (a, s)
        hb = Mul (silu, b)
        hc = Unsqueeze (hb, last)
        g2 = Gather <axis = 0> (down, flat)
        yc = MatMul (g2, hc)
        yf = Squeeze (yc, last)",
    )
}

#[test]
fn every_expert_multiplies_its_own_rows() {
    let after = check(&GroupExperts, &gated());
    // Two products for each expert, and no table of three dimensions is gathered.
    assert_eq!((after.matches("Gemm").count(), after.matches("Gather <axis = 0>").count()), (6, 1), "{after}");
    assert_eq!(after.matches("Sigmoid").count(), 3, "{after}");
    assert!(after.contains("TopK <axis = 0, largest = 0, sorted = 1> (flat, "), "{after}");
    assert!(after.contains("float[4,2] up_expert_1"), "{after}");
}

#[test]
fn rows_before_tables_with_biases_and_slices() {
    let tables = format!(
        "float[3,2,4] up = {{{}}}, float[3,4] first = {{{}}}, float[3,2,2] down = {{{}}}, float[3,2] second = {{{}}},
        float low = {{-1.5}}, float high = {{1.5}}, float[2] gain = {{0.5, 2}}, int64[1] zero = {{0}}, int64[1] two = {{2}},
        int64[1] far = {{100}}, int64[1] axis = {{2}}",
        numbers(24),
        numbers(12),
        numbers(12),
        numbers(6)
    );
    let graph = layer(
        17,
        &tables,
        "g1 = Gather <axis = 0> (up, flat)
        h = MatMul (row, g1)
        r1 = Gather <axis = 0> (first, flat)
        b1 = Unsqueeze (r1, one)
        hb = Add (h, b1)
        gate = Slice (hb, zero, far, axis, two)
        linear = Slice (hb, one, far, axis, two)
        clipped = Clip (gate, low, high)
        act = Tanh (clipped)
        scaled = Mul (linear, gain)
        both = Mul (act, scaled)
        g2 = Gather <axis = 0> (down, flat)
        y2 = MatMul (both, g2)
        yr = Squeeze (y2, one)
        r2 = Gather <axis = 0> (second, flat)
        yf = Add (yr, r2)",
    );
    let after = check(&GroupExperts, &graph);
    assert_eq!((after.matches("Gemm").count(), after.matches("Clip").count()), (6, 3), "{after}");
    assert!(after.contains("float[4] first_expert_2") && after.contains("float[2] second_expert_0"), "{after}");
}

#[test]
fn transposed_tables_are_multiplied_as_they_lie() {
    let tables = format!("float[3,2,4] up = {{{}}}, float[3,4,2] down = {{{}}}", numbers(24), numbers(24));
    let graph = layer(
        13,
        &tables,
        "g1 = Gather <axis = 0> (up, flat)
        t1 = Transpose <perm = [0, 2, 1]> (g1)
        h = MatMul (t1, column)
        r = Relu (h)
        g2 = Gather <axis = 0> (down, flat)
        t2 = Transpose <perm = [0, 2, 1]> (g2)
        yc = MatMul (t2, r)
        yf = Squeeze (yc, last)",
    );
    let after = check(&GroupExperts, &graph);
    assert_eq!(after.matches("Gemm <transB = 0>").count(), 6, "{after}");
}

#[test]
fn an_expert_that_nobody_picks_gets_no_rows() {
    // The third score is far below the others.
    let graph = gated().replace("0.5, -1.25, 0.75, 1, 0.25, -0.5", "0, 0, 0, 0, 0, 0").replace(
        "p = Softmax <axis = -1> (scores)",
        "never = Constant <value = float[3] {0, 1, -1000}> ()
            masked = Add (scores, never)
            p = Softmax <axis = -1> (masked)",
    );
    check(&GroupExperts, &graph);
}

#[test]
fn layers_in_a_branch_are_grouped_there() {
    let graph = gated();
    let (head, body) = graph.split_once("> {\n").unwrap();
    let head = head.replace("(float[T,2] x) =>", "(float[T,2] x, bool c) =>");
    let branch = body.trim_end().trim_end_matches('}').replace("y = ReduceSum", "z = ReduceSum");
    let graph = format!(
        "{head}> {{ y = If (c) <then_branch = yes () => (float[T,2] z) {{ {branch} }}, else_branch = no () => (float[T,2] o) {{ o = Identity (x) }}> }}"
    );
    let after = check(&GroupExperts, &graph);
    assert_eq!(after.matches("Gemm").count(), 6, "{after}");
}

#[test]
fn parts_of_tables_are_the_bytes_of_the_table() {
    let before = model(&gated());
    let mut after = before.clone();
    crate::Pass::apply(&GroupExperts, &mut after, &PassContext::default()).unwrap();
    let table = before.graph.constant(before.graph.find_value("up").unwrap()).unwrap();
    let part = after.graph.constant(after.graph.find_value("up_expert_1").unwrap()).unwrap();
    assert_eq!(part.bytes(), &table.bytes()[32..64]);
    assert!(text::print_graph(&after).len() > 100);
}

#[test]
fn what_is_no_layer_of_experts_is_left_alone() {
    let refuses = |graph: &str, reason: &str| check_refuses(&GroupExperts, graph, reason);
    let between = "what lies between the tables does not treat every pair by itself";
    // Over all pairs of a feature instead of over the features of a pair.
    let mixed = gated().replace("s = Sigmoid (a)", "s = Softmax <axis = 0> (a)");
    refuses(&mixed, between);
    let unlisted = gated()
        .replace(
            "g1 = Gather <axis = 0> (up, flat)",
            "g0 = Gather <axis = 0> (up, ids)
            four = Constant <value = int64[3] {-1, 4, 2}> ()
            g1 = Reshape (g0, four)",
        )
        .replace(
            "g2 = Gather <axis = 0> (down, flat)",
            "g3 = Gather <axis = 0> (down, ids)
            two = Constant <value = int64[3] {-1, 2, 2}> ()
            g2 = Reshape (g3, two)",
        );
    refuses(&unlisted, "the numbers of experts are no list");
    let other = gated().replace(
        "w, ids = TopK <axis = -1> (p, k)",
        "w, best = TopK <axis = -1> (p, k) \
        top = Constant <value = int64 {1}> () ids = Min (best, top)",
    );
    refuses(&other, "the numbers of experts are not those of a TopK over all of them");
    let read = gated().replace(
        "yf = Squeeze (yc, last)",
        "more = ReduceSum <keepdims = 0> (g2, one) yq = Squeeze (yc, last) \
        yf = Add (yq, more)",
    );
    refuses(&read, "gathered weights are read by more than products");
    let down = |experts: usize| format!("float[{experts},2,2] down = {{{}}}", numbers(4 * experts));
    let fewer = gated().replace(&down(3), &down(2));
    refuses(&fewer, "the tables are of different numbers of experts");
    let old = gated().replace("\"\" : 17", "\"\" : 12").replace("Unsqueeze (x, one)", "Unsqueeze <axes = [1]> (x)");
    let old = old
        .replace("Squeeze (h, last)", "Squeeze <axes = [2]> (h)")
        .replace("Unsqueeze (hb, last)", "Unsqueeze <axes = [2]> (hb)");
    let old = old
        .replace("Squeeze (yc, last)", "Squeeze <axes = [2]> (yc)")
        .replace("<keepdims = 0> (y3, one)", "<keepdims = 0, axes = [1]> (y3)");
    refuses(&old, "before opset 13 a Split has fixed sizes");
    let few = PassContext::default().with_setting("group-experts.max-experts", 2);
    check_refuses_in(&GroupExperts, &gated(), "there are more experts than max-experts allows", &few);
}

#[test]
fn tables_in_several_graphs_are_left_alone() {
    let graph = gated().replace(
        "yf = Squeeze (yc, last)",
        "yq = Squeeze (yc, last)
        no = Constant <value = bool {0}> ()
        yf = If (no) <then_branch = yes () => (float[P,2] q) {
            g3 = Gather <axis = 0> (down, flat)
            q2 = MatMul (g3, hc)
            q = Squeeze (q2, last)
        }, else_branch = other () => (float[P,2] r) { r = Identity (yq) }>",
    );
    check_refuses(&GroupExperts, &graph, "the tables are gathered in several graphs");
}
