//! Costs of small graphs.

use super::*;
use lathe_ir::text;

fn cost(model: &str) -> Cost {
    let model = text::parse(model).unwrap();
    Cost::of(&model, &Facts::infer(&model), &Bindings::default())
}

#[test]
fn counts_a_product_with_its_weight() {
    let cost = cost(
        "g (float[batch,4] x) => (float[batch,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
            h = MatMul (x, w)
            y = Relu (h)
        }",
    );
    assert_eq!((cost.nodes, cost.nodes_total, cost.parameters, cost.weight_bytes), (2, 2, 12, 48));
    assert_eq!(cost.flops, 2 * 4 * 3 + 3);
    assert_eq!(cost.uncounted, []);
    // While the product runs, x and h are held; y is no larger than x.
    assert_eq!((cost.activation_peak_bytes, cost.unsized_values), (16 + 12, 0));
    assert_eq!(cost.operators[0].op_type, "MatMul");
    assert_eq!((cost.operators[0].flops, cost.operators[0].weight_bytes), (24, 48));
    let of_nodes = [(24, 12, 48), (3, 0, 0)];
    assert_eq!(
        cost.by_node,
        of_nodes.map(|(flops, parameters, weight_bytes)| NodeCost { flops, parameters, weight_bytes })
    );
}

#[test]
fn open_sizes_come_from_bindings() {
    let model =
        text::parse("g (float[batch,seq,8] x, float[batch,8,seq] z) => (float y) { y = MatMul (x, z) }").unwrap();
    let facts = Facts::infer(&model);
    let mut bindings = Bindings::default();
    assert_eq!(Cost::of(&model, &facts, &bindings).flops, 2 * 128 * 128 * 8);
    bindings.set("seq", 10);
    bindings.batch = 3;
    assert_eq!(Cost::of(&model, &facts, &bindings).flops, 3 * 2 * 10 * 10 * 8);
}

#[test]
fn loops_multiply_and_unknown_operators_are_listed() {
    let cost = cost(
        "g (float[2,2] x) => (float y) <int64 trips = {5}> {
            z = Loop (trips, , x) <body = l (int64 i, bool go, float[2,2] v) => (bool on, float w) {
                on = Constant <value = bool {1}> ()
                w = MatMul (v, v)
            }>
            y = other.Mystery (z)
        }",
    );
    assert_eq!(cost.flops, 5 * 2 * 2 * 2 * 2);
    assert_eq!(cost.uncounted, [("other.Mystery".to_owned(), 1)]);
    assert_eq!((cost.nodes, cost.nodes_total), (2, 4));
}

#[test]
fn functions_count_at_their_calls() {
    let cost = cost(
        r#"<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
        g (float[2,3] x) => (? y) { z = local.f (x) y = local.f (z) }
        <domain: "local", opset_import: ["" : 18]>
        f (v) => (w) { w = Relu (v) }"#,
    );
    assert_eq!(cost.flops, 12);
}

#[test]
fn convolutions_count_channels_and_kernel() {
    let cost = cost(
        "g (float[1,4,8,8] x, float[6,2,3,3] w, float[6] b) => (float y) {
            y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b)
        }",
    );
    assert_eq!(cost.flops, 2 * (6 * 8 * 8) * (2 * 3 * 3) + 6 * 8 * 8);
}

/// FLOPs of one addition to each of these inputs: their elements, with 1 for batches and 128 for other open sizes.
fn elements(inputs: &[&str]) -> Vec<u64> {
    let names: Vec<String> = (0..inputs.len()).map(|i| format!("x{i}")).collect();
    let declared: Vec<String> = inputs.iter().zip(&names).map(|(ty, name)| format!("{ty} {name}")).collect();
    let nodes: Vec<String> =
        names.iter().map(|name| format!("y{name} = CastLike ({name}, one) z{name} = Neg (y{name})")).collect();
    let outputs: Vec<String> = names.iter().map(|name| format!("float z{name}")).collect();
    let model = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]> g ({}) => ({}) <float one = {{1}}> {{ {} }}",
        declared.join(", "),
        outputs.join(", "),
        nodes.join(" ")
    );
    let found = cost(&model);
    let flops = |id: &NodeCost| id.flops;
    found.by_node.iter().map(flops).filter(|&flops| flops > 0).collect()
}

#[test]
fn the_first_axis_is_the_batch_whatever_its_name() {
    for name in ["batch", "s33", "unk__214", "?", "images"] {
        assert_eq!(elements(&[&format!("float[{name},3,64,64]")]), [3 * 64 * 64], "{name}");
    }
    assert_eq!(elements(&["float[s1,32,32,3]", "int64[s2,s3]"]), [32 * 32 * 3, 128]);
    assert_eq!(elements(&["int64[s21,s50]", "int64[s6,s50]", "float[s21,2,s57,16]"]), [128, 128, 2 * 128 * 16]);
    assert_eq!(elements(&["int64[?,?]", "int64[?,?]"]), [128, 128]);
    assert_eq!(elements(&["float[rows,8]", "float[rows]"]), [8, 1]);
}

#[test]
fn what_need_not_be_the_batch_is_not() {
    // A name says what is the batch, here or there.
    assert_eq!(elements(&["float[s1,N,8]"]), [128 * 8]);
    assert_eq!(elements(&["float[s1,8]", "float[batch,8]"]), [128 * 8, 8]);
    // Nodes and edges, time first, one axis, a fixed batch, an axis that is another input's second.
    assert_eq!(elements(&["float[nodes,8]", "float[edges,8]"]), [128 * 8, 128 * 8]);
    assert_eq!(elements(&["float[seq_len,n2,8]"]), [128 * 128 * 8]);
    assert_eq!(elements(&["float[s1]"]), [128]);
    assert_eq!(elements(&["float[s1,8]", "float[4,8]"]), [128 * 8, 32]);
    assert_eq!(elements(&["float[s1,8]", "float[s2,s1]"]), [128 * 8, 128 * 128]);
}

#[test]
fn sizes_of_a_run_are_those_of_its_inputs() {
    let model = text::parse("g (float[?,seq,8] x, float[\"4\",?] z) => (float y, float w) { y = Neg (x) w = Neg (z) }")
        .unwrap();
    let mut bindings = Bindings::default();
    for (input, sizes) in model.graph.main().inputs().iter().zip([vec![5, 7, 8], vec![4, 2]]) {
        let ty = model.graph.value(*input).ty.clone().unwrap();
        bindings.set_input(ty.shape().unwrap(), &sizes);
    }
    assert_eq!(Cost::of(&model, &Facts::infer(&model), &bindings).flops, 128 * 7 * 8 + 4 * 128);
    assert_eq!(bindings.batch, 5);
}

#[test]
fn what_a_runtime_folds_at_load_counts_nothing() {
    let zeros = ["1"; 32].join(", ");
    let text = format!(
        "<opset_import: [\"\" : 21]>
        g (float[batch,8] x, bool k) => (float[batch,4] y, float[4] r) <
            int8[8,4] q = {{{zeros}}}, float s = {{0.1}}, float16[4] b = {{1, 2, 3, 4}}
        > {{
            w = DequantizeLinear (q, s)
            t = Identity (w)
            h = MatMul (x, t)
            bias = Cast <to = 1> (b)
            y = Add (h, bias)
            one = If (k) <then_branch = f () => (float[4] o) {{ o = Neg (bias) }}, else_branch = g () => (float[4] p) {{ p = Abs (bias) }}>
            noise = RandomNormal <shape = [4]> ()
            r = Add (one, noise)
        }}"
    );
    let cost = cost(&text);
    // The product and the two sums. The branches only read constants, and nothing is drawn ahead.
    assert_eq!(
        cost.flops,
        2 * 8 * 4 + 4 + 4 + cost.operators.iter().find(|o| o.op_type == "RandomNormal").unwrap().flops
    );
    assert_eq!((cost.weight_bytes, cost.parameters), (32 + 4 + 8, 32 + 1 + 4));
    let of = |name: &str| cost.operators.iter().find(|o| o.op_type == name).unwrap();
    assert_eq!((of("DequantizeLinear").weight_bytes, of("DequantizeLinear").flops), (0, 0));
    assert_eq!((of("MatMul").weight_bytes, of("Add").weight_bytes), (36, 8));
    // x, h and y with k beside them; the unpacked weight is held by nobody.
    assert!(cost.activation_peak_bytes < 100, "{}", cost.activation_peak_bytes);
    // With its optimizations off it computes them in every run.
    let model = text::parse(&text).unwrap();
    let all = Cost::unfolded(&model, &Facts::infer(&model), &Bindings::default());
    assert!(all.flops > cost.flops && all.activation_peak_bytes >= 32 * 4, "{all:?}");
    assert_eq!((all.weight_bytes, all.parameters), (cost.weight_bytes, cost.parameters));
}

#[test]
fn parts_of_computed_sizes_are_equal_shares() {
    // Of 128 rows, as many as a run says go to each of four products.
    let cost = cost(
        "<ir_version: 8, opset_import: [\"\" : 17]> g (float[t,8] x, float[8,2] w, int64[4] counts) => (float[a,2] p, float[b,2] q, float[c,2] r, float[d,2] s) {
            x0, x1, x2, x3 = Split <axis = 0> (x, counts)
            p = MatMul (x0, w)  q = MatMul (x1, w)  r = MatMul (x2, w)  s = MatMul (x3, w)
        }",
    );
    assert_eq!(cost.flops, 128 * 8 * 2 * 2);
}
