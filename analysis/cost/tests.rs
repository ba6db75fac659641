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
