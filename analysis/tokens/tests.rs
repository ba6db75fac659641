//! Tokens of small graphs.

use super::*;
use lathe_ir::text;
use std::fmt::Write as _;

/// A model that reads `float[batch, 8, 4] x` and gives `y`, with ones as weights such as `w:4,4`.
fn model(output: &str, weights: &str, body: &str) -> Model {
    let mut constants = "int64[3] grid = {0, 4, -1}, int64[4] heads = {0, 8, 2, 2}, int64[3] flat = {0, 8, 4}, \
                         int64 zero = {0}, int64 last = {-1}, int64[1] one = {1}, int64[1] end = {9223372036854775807}, \
                         int64[1] second = {1}, int64[1] two = {2}"
        .to_owned();
    for weight in weights.split_whitespace() {
        let (name, sizes) = weight.split_once(':').unwrap();
        let count: usize = sizes.split(',').map(|s| s.parse::<usize>().unwrap()).product();
        let _ = write!(constants, ", float[{sizes}] {name} = {{{}}}", vec!["1"; count].join(", "));
    }
    let head = r#"<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>"#;
    let source = format!("{head} g (float[batch, 8, 4] x) => (float[{output}] y) <{constants}> {{ {body} }}");
    text::parse(&source).unwrap_or_else(|error| panic!("{error}\n{source}"))
}

fn follow(model: &Model) -> Tokens {
    let from = model.graph.find_value("x").unwrap();
    Tokens::follow(model, &Facts::infer(model), from, &BTreeSet::new()).unwrap()
}

fn reasons(model: &Model) -> Vec<&'static str> {
    follow(model).blocks.iter().map(|block| block.reason).collect()
}

const ATTENTION: &str = "
    q0 = MatMul (x, w) q1 = Reshape (q0, heads) q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul (x, w) k1 = Reshape (k0, heads) k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v0 = MatMul (x, w) v1 = Reshape (v0, heads) v = Transpose <perm = [0, 2, 1, 3]> (v1)
    scores = MatMul (q, k)";
const REST: &str = "p = Softmax <axis = -1> (shifted) o = MatMul (p, v) o1 = Transpose <perm = [0, 2, 1, 3]> (o)
    o2 = Reshape (o1, flat) h = Add (x, o2)";

#[test]
fn attention_is_followed_to_the_token_that_is_picked() {
    let m = model(
        "batch, 4",
        "w:4,4",
        &format!("{ATTENTION} shifted = Identity (scores) {REST} y = Gather <axis = 1> (h, zero)"),
    );
    let tokens = follow(&m);
    assert_eq!((tokens.blocks.len(), tokens.count, tokens.picked), (0, 8, 1));
    let axes = |name: &str| tokens.of(m.graph.find_value(name).unwrap()).map(|t| t.axes.clone());
    assert_eq!(axes("k"), Some(vec![3]));
    assert_eq!(axes("scores"), Some(vec![2, 3]));
    assert_eq!(axes("h"), Some(vec![1]));
    assert_eq!(axes("y"), None);
    let keys = m.graph.find_value("k").unwrap();
    assert_eq!(tokens.attentions.iter().map(|a| &a.keys).collect::<Vec<_>>(), [&Keys::Heads(keys, 3)]);
}

#[test]
fn operators_that_do_it_all_are_attentions() {
    let m = model(
        "batch, 4",
        "w:4,12 b:12",
        "a = com.microsoft.Attention <num_heads = 2> (x, w, b) h = Add (x, a) y = ReduceMean <keepdims = 0> (h, one)",
    );
    let tokens = follow(&m);
    assert_eq!((tokens.blocks.len(), tokens.averages.len()), (0, 1));
    assert_eq!(tokens.attentions[0].keys, Keys::Packed(m.graph.find_value("x").unwrap()));
    let m = model(
        "batch, 4",
        "",
        "a = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x) y = Gather <axis = 1> (a, zero)",
    );
    assert_eq!(follow(&m).attentions[0].keys, Keys::Flat(m.graph.find_value("x").unwrap(), 2));
}

#[test]
fn slices_pick_the_first_tokens_and_leave_the_others() {
    let m = model(
        "batch, 4",
        "",
        "first = Slice (x, grid_zero, two, one) s = ReduceSum <keepdims = 0> (first, one)
        rest = Slice (x, two, end, one) a = ReduceMean <keepdims = 0> (rest, one) y = Add (s, a)"
            .replace("grid_zero", "second")
            .as_str(),
    );
    let tokens = follow(&m);
    assert_eq!(tokens.blocks, []);
    assert_eq!(tokens.picked, 2);
    assert_eq!(tokens.of(m.graph.find_value("rest").unwrap()).unwrap().skipped, 2);
}

#[test]
fn what_cannot_go_on_with_fewer_tokens_says_why() {
    let windows = model("batch, 4, 8", "", "y = Reshape (x, grid)");
    assert_eq!(reasons(&windows), ["the tokens are divided into windows or a grid, or joined with another axis"]);
    let table = format!("{ATTENTION} shifted = Add (scores, t) {REST} y = Gather <axis = 1> (h, zero)");
    let table = model("batch, 4", "w:4,4 t:2,8,8", &table);
    assert_eq!(reasons(&table)[0], "a constant has a number per token, as tables of relative positions do");
    let last = model("batch, 4", "", "y = Gather <axis = 1> (x, last)");
    assert_eq!(reasons(&last), ["tokens are picked by their position from the end"]);
    let dense = model("batch, 8, 4", "", "y = Relu (x)");
    assert_eq!(reasons(&dense), ["an output of the model has a row per token"]);
    let mixer = model("batch, 8, 4", "w:8,8", "y = MatMul (w, x)");
    assert_eq!(reasons(&mixer), ["a layer mixes tokens"]);
    let linear = model("batch, 4, 4", "", "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (t, x)");
    assert_eq!(reasons(&linear), ["tokens are summed over without a softmax"]);
    let causal = model(
        "batch, 8, 4",
        "w:4,12 b:12",
        "y = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, b)",
    );
    assert_eq!(reasons(&causal), ["an attention is causal, or has a mask, a cache or rotary embeddings"]);
    let sizes = model("3", "", "s = Shape (x) y = Cast <to = 1> (s)");
    assert_eq!(reasons(&sizes), ["the number of tokens is read"]);
    let length = model("1", "", "s = Shape <start = 0, end = 1> (x) y = Cast <to = 1> (s)");
    assert_eq!(reasons(&length), [] as [&str; 0]);
}

#[test]
fn an_open_number_of_tokens_is_not_followed() {
    let m = text::parse(
        "<ir_version: 10, opset_import: [\"\" : 20]> g (float[b, n, 4] x) => (float[b, n, 4] y) { y = Relu (x) }",
    );
    let m = m.unwrap();
    let from = m.graph.find_value("x").unwrap();
    let found = Tokens::follow(&m, &Facts::infer(&m), from, &BTreeSet::new());
    assert_eq!(found.err(), Some("the number of tokens is not fixed"));
}
