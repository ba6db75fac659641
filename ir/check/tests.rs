//! What is an error, what is not, and what the messages say.

use super::CheckError;
use crate::{
    AttributeValue, Graph, Model, Node, NodeId, ScopeId, Tensor, ValueId,
    text::{parse, print_graph},
};

#[track_caller]
fn valid(text: &str) -> Model {
    let model = parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    model.check().unwrap_or_else(|error| panic!("{error}\n{text}"));
    model
}

#[track_caller]
fn fails(text: &str, message: &str) {
    let model = parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(model.check().map_err(|error| error.to_string()), Err(message.to_owned()));
}

fn value(graph: &Graph, name: &str) -> ValueId {
    graph.find_value(name).unwrap()
}

fn node(graph: &Graph, op_type: &str) -> NodeId {
    graph.all_nodes().into_iter().find(|&id| graph.node(id).op_type == op_type).unwrap()
}

#[test]
fn takes_what_is_merely_untidy() {
    valid(
        "g (bool c, float[2] x, float unused) => (y, x, y) <float[2] w = {1, 2}, float[N] w, float dead = {1}> {
            y = If (c) <then_branch = a () => (p, q) { p = Neg (late) q = Neg (p) }, else_branch = b () => (p, p) { p = Abs (x) }>
            late = Add (x, w)
            idle = Exp (x)
        }",
    );
    valid(
        "g (int64 n, bool c, float s) => (last, all) {
        last, all = Loop (n, c, s) <body = b (int64 i, bool go, float t) => (go, u, u) { u = Neg (t) }>
    }",
    );
    valid(
        "g (float s, float[3] xs) => (last) {
        last = Scan <num_scan_inputs = 1, body = b (float t, float x) => (u, u) { u = Add (t, x) }> (s, xs)
    }",
    );
    valid(
        "g (float x) => (y) { y = local.f <k = 1.0> (x) }
        <domain: \"local\"> f <k> (x) => (y) { y = local.h (x) }
        <domain: \"local\"> h <k = 1.0> (x) => (y) { y = Elu <alpha: float = @k> (x) }",
    );
}

#[test]
fn names_what_is_wrong_with_values() {
    fails("g (x) => (x) { }", "input `x` has no type");
    fails("g (? x) => (x) { }", "input `x` has no type");
    fails(
        "g (float x) => (y) <float[2] w = {1, 2}, float[3] w> { y = Add (x, w) }",
        "`w` is stated as float[3], but its data is float[2]",
    );
    fails(
        "g (float x) => (y) <float[2] w = {1, 2}, int64[2] w> { y = Add (x, w) }",
        "`w` is stated as int64[2], but its data is float[2]",
    );
    fails(
        "g (float[N,2] x) => (y) <float[2] x = {1, 2}> { y = Neg (x) }",
        "`x` is stated as float[N,2], but its data is float[2]",
    );
    fails(
        "g (float x) => (b) { a = Add (x, b) b = Neg (a) }",
        "node `a` (Add) needs its own output: the nodes form a cycle",
    );
    fails(
        "g (bool c, float x) => (y) {
            y = If (c) <then_branch = a () => (p) { p = Neg (y) }, else_branch = b () => (p) { p = Abs (x) }>
        }",
        "node `y` (If) needs its own output: the nodes form a cycle",
    );
}

#[test]
fn a_name_may_hide_another_that_is_not_used() {
    let text = "g (bool c, float x) => (y) {
        y = If (c) <then_branch = a () => (x) { x = Neg (c) }, else_branch = b () => (p) { p = Abs (x) }>
    }";
    let mut model = valid(text);
    let outer = model.graph.main().inputs()[1];
    let graph = &mut model.graph;
    graph.set_input(node(graph, "Neg"), 0, Some(outer));
    let message = "graph `a` uses a value `x` that another one of the same name hides there";
    assert_eq!(model.check().unwrap_err().to_string(), message);
    model.graph.make_names_unique();
    model.check().unwrap();
    model.graph.rename(outer, "p");
    assert!(matches!(model.check(), Err(CheckError::Hidden { graph, .. }) if graph == "b"));
    model.graph.rename(outer, "c");
    assert_eq!(model.check().unwrap_err().to_string(), "`c` is defined twice in graph `g`");
}

#[test]
fn names_what_is_wrong_with_nodes() {
    fails("g (float x) => (y) { y = \"\" (x) }", "node `y` () has no operator");
    fails("g (float x) => (y) { [n] y = Neg <a = 1, a = 2> (x) }", "attribute `a` of node `n` (Neg) is given twice");
    fails(
        "<opset_import: [\"\": 18]> g (float x) => (y) { y = com.microsoft.Gelu (x) }",
        "node `y` (Gelu) belongs to domain `com.microsoft`, of which no version is imported",
    );
    fails(
        "<opset_import: []> g (float x) => (y) { y = Neg (x) }",
        "node `y` (Neg) belongs to domain ``, of which no version is imported",
    );
    fails(
        "<opset_import: [\"\": 99]> g (float x) => (y) { y = Neg (x) }",
        "version 99 of the standard operator set is unknown; known are 1 to 28",
    );
    fails("g (bool c) => (y) { y = If (c) }", "node `y` (If) has no subgraph `then_branch`");
    fails(
        "g (bool c) => (y) { y = If (c) <then_branch = a () => (c) { }, else_branch = b () => () { }> }",
        "subgraph `else_branch` of node `y` (If) has 0 outputs, expected at least 1",
    );
    fails(
        "g (bool c) => (y) { y = If (c) <then_branch = a () => (c) { }, else_branch = b () => (c, c) { }> }",
        "subgraph `else_branch` of node `y` (If) has 2 outputs, expected 1",
    );
    fails(
        "g (bool c) => (y) { y = Loop (, c, c) <body = b (int64 i, bool d) => (d, d) { }> }",
        "subgraph `body` of node `y` (Loop) has 2 inputs, expected 3",
    );
    fails(
        "g (bool c) => (y) { y = Loop (, c, c) <body = b (int64 i, bool d, bool e) => (d) { }> }",
        "subgraph `body` of node `y` (Loop) has 1 outputs, expected at least 2",
    );
}

#[test]
fn names_what_is_wrong_with_functions() {
    let with = |body: &str| format!("g (float x) => (y) {{ y = local.f (x) }} <domain: \"local\"> f <k> {body}");
    fails(
        &with("(x) => (y) { y = Elu <alpha: float = @m> (x) }"),
        "in function `local.f`: node `y` (Elu) refers to attribute `m`, which its function does not have",
    );
    fails(&with("(x) => (y) { y = local.f (x) }"), "function `local.f` calls itself");
    fails(
        &with("(x) => (y) { y = local.h (x) } <domain: \"local\"> h (x) => (y) { y = local.f (x) }"),
        "function `local.f` calls itself",
    );
    fails(&with("(x) => (x) { } <domain: \"local\"> f (x) => (x) { }"), "function `local.f` is defined twice");
    fails(
        "g (float x) => (y) { y = local.f (x) } <domain: \"local\", opset_import: [\"\": 18]> f (x) => (y) { y = local.h (x) }",
        "in function `local.f`: node `y` (h) belongs to domain `local`, of which no version is imported",
    );
    fails(
        "g (float x) => (y) { y = Elu <alpha: float = @m> (x) }",
        "node `y` (Elu) refers to attribute `m`, but stands in no function",
    );
}

#[test]
fn many_calls_of_the_same_functions_take_no_longer() {
    let mut text = "g (float x) => (x) { }".to_owned();
    for level in 0..200 {
        let next = level + 1;
        text += &format!("<domain: \"local\"> f{level} (x) => (z) {{ y = local.f{next} (x) z = local.f{next} (y) }}\n");
    }
    valid(&text);
}

#[test]
fn finds_values_out_of_sight() {
    let mut model = valid(
        "g (bool c, float x) => (y) {
            y = If (c) <then_branch = a () => (p) { p = Neg (x) }, else_branch = b () => (q) { q = Abs (x) }>
        }",
    );
    let graph = &mut model.graph;
    let p = value(graph, "p");
    graph.set_input(node(graph, "Abs"), 0, Some(p));
    let message = "input 0 of node `q` (Abs) is `p`, which belongs to a graph that it cannot see";
    assert_eq!(model.check().unwrap_err().to_string(), message);
    model.graph.set_output(ScopeId::MAIN, 0, p);
    let x = value(&model.graph, "x");
    model.graph.set_input(node(&model.graph, "Abs"), 0, Some(x));
    let message = "output `p` of graph `g` belongs to a graph that it cannot see";
    assert_eq!(model.check().unwrap_err().to_string(), message);
}

#[test]
fn finds_what_an_edit_left_behind() {
    let text = "g (bool c, float x) => (y) {
        y = If (c) <then_branch = a () => (p) { p = Neg (x) }, else_branch = b () => (q) { q = Abs (x) }>
    }";
    let mut model = valid(text);
    let choose = node(&model.graph, "If");
    model.graph.node_mut(choose).remove_attribute("else_branch");
    assert!(
        matches!(model.check(), Err(CheckError::Inconsistent { what, .. }) if what == "node `q` (Abs) stands in no graph")
    );

    let mut model = valid(text);
    let graph = &mut model.graph;
    let branch = graph.node(choose).subgraph("then_branch").unwrap();
    graph.node_mut(choose).set_attribute("else_branch", AttributeValue::Graph(branch));
    let message = "the graph `g` is inconsistent: a subgraph of node `y` (If) belongs to another node";
    assert_eq!(model.check().unwrap_err().to_string(), message);

    let mut model = valid(text);
    let stray = model.graph.add_value("stray", None);
    model.graph.set_input(choose, 0, Some(stray));
    let message = "input 0 of node `y` (If) is `stray`, which nothing produces";
    assert_eq!(model.check().unwrap_err().to_string(), message);
}

#[test]
fn removing_a_node_clears_subgraphs_in_subgraphs() {
    let mut model = valid(
        "g (bool c, float x) => (x) {
            y = If (c) <then_branch = a () => (q) {
                p = Neg (x)
                q = If (c) <then_branch = d () => (r) { r = Exp (p) }, else_branch = e () => (p) { }>
            }, else_branch = b () => (x) { }>
        }",
    );
    let choose = model.graph.nodes(ScopeId::MAIN).next().unwrap();
    model.graph.remove_node(choose);
    model.check().unwrap();
    assert_eq!(print_graph(&model), "g (bool c, float x) => (float x) {\n}\n");
    assert!(model.graph.value(value(&model.graph, "x")).uses().len() == 1);
}

#[test]
fn moving_back_and_forth_lists_once() {
    let mut model = valid(
        "g (bool c, float x) => (y) {
            y = If (c) <then_branch = a () => (p) <float w = {1}> { p = Add (x, w) }, else_branch = b () => (x) { }>
        }",
    );
    let (add, w) = (node(&model.graph, "Add"), value(&model.graph, "w"));
    let inner = model.graph.node(add).scope();
    for scope in [ScopeId::MAIN, inner, ScopeId::MAIN, ScopeId::MAIN] {
        model.graph.move_initializer(w, scope);
        model.graph.move_node(add, scope);
        assert_eq!(model.graph.nodes(scope).filter(|&id| id == add).count(), 1);
        assert_eq!(model.graph.initializers(scope).filter(|&v| v == w).count(), 1);
        model.check().unwrap();
    }
}

#[test]
fn edits_through_the_graph_stay_consistent() {
    let mut model = valid("g (float[2] x) => (y, z) { y = Neg (x) z = Relu (y) }");
    let graph = &mut model.graph;
    let x = value(graph, "x");
    let w = graph.add_initializer(ScopeId::MAIN, "x", Tensor::from_f32s(&[2], &[1.0, 2.0]));
    let sum = graph.append(ScopeId::MAIN, Node::new("Add"), &[x, w], "sum");
    graph.set_quantization(sum, vec![("SCALE_TENSOR".to_owned(), w)]);
    let y = value(graph, "y");
    graph.replace_uses(y, sum);
    graph.remove_node(node(graph, "Neg"));
    model.check().unwrap();
    model.graph.sort().unwrap();
    model.check().unwrap();
    let text =
        "g (float[2] x) => (y, z) <\n    float[2] x_1 = {1, 2}\n> {\n    y = Add (x, x_1)\n    z = Relu (y)\n}\n";
    assert_eq!(print_graph(&model), text);
}
