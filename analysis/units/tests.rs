//! Units of small graphs, one for each family of residual networks.

use super::*;
use lathe_ir::{ScopeId, text};
use std::fmt::Write as _;

/// A model from its inputs and outputs in the text form, weights such as `w:4,4`, and the body.
fn model(ports: &str, weights: &str, body: &str) -> Model {
    let mut constants = String::new();
    for weight in weights.split_whitespace() {
        let (name, sizes) = weight.split_once(':').unwrap();
        let count: usize = sizes.split(',').map(|s| s.parse::<usize>().unwrap()).product();
        let values = vec!["1"; count].join(", ");
        let _ =
            write!(constants, "{}float[{sizes}] {name} = {{{values}}}", if constants.is_empty() { "" } else { ", " });
    }
    let head = r#"<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>"#;
    text::parse(&format!("{head} g {ports} <{constants}> {{ {body} }}")).unwrap()
}

fn find(model: &Model) -> Units {
    Units::find(model, &Facts::infer(model))
}

/// Each unit as `kind in->out`, with what is remarkable about it.
fn told(model: &Model) -> Vec<String> {
    let units = find(model);
    let name = |v: ValueId| model.graph.value(v).name.as_str();
    let names = |values: &[ValueId]| values.iter().map(|&v| name(v)).collect::<Vec<_>>().join(" ");
    let line = |(_, unit): (UnitId, &Unit)| {
        let mut line = format!("{} {}->{}", unit.kind, name(unit.stream_in), name(unit.stream_out));
        let remarks = [("side", &unit.side_inputs), ("outputs", &unit.outputs), ("taps", &unit.shape_taps)];
        for (what, values) in remarks.iter().filter(|(_, values)| !values.is_empty()) {
            let _ = write!(line, " {what} {}", names(values));
        }
        if unit.barrier.is_some() {
            line.push_str(" projected");
        }
        if unit.depth > 0 {
            let _ = write!(line, " depth {}", unit.depth);
        }
        line
    };
    units.iter().map(line).collect()
}

fn chain_lengths(model: &Model) -> Vec<usize> {
    find(model).chains().iter().map(Vec::len).collect()
}

const ATTENTION: &str = "
    q = MatMul (n, wq) k = MatMul (n, wk) v = MatMul (n, wv)
    kt = Transpose <perm = [0, 2, 1]> (k) scores = MatMul (q, kt) p = Softmax (scores)
    o = MatMul (p, v) a = MatMul (o, wo)";
const WEIGHTS: &str = "wq:4,4 wk:4,4 wv:4,4 wo:4,4 up:4,8 down:8,4 g:4 b:4";
const STREAM: &str = "(float[batch,seq,4] x) => (float[batch,seq,4] y)";

#[test]
fn pre_norm() {
    let m = model(
        STREAM,
        WEIGHTS,
        &format!(
            "n = LayerNormalization (x, g, b) {ATTENTION} h = Add (x, a)
             m = LayerNormalization (h, g, b) u = MatMul (m, up) r = Relu (u) d = MatMul (r, down) y = Add (d, h)"
        ),
    );
    assert_eq!(told(&m), ["attention x->h", "mlp h->y"]);
    assert_eq!(chain_lengths(&m), [2]);
    let units = find(&m);
    let (id, attention) = units.iter().next().unwrap();
    assert_eq!((attention.nodes.len(), attention.position, attention.post), (9, 0, None));
    assert!(attention.nodes.iter().all(|&node| units.of_node(node) == Some(id)));
    assert_eq!(units.of_node(attention.join), Some(id));
    // Everything else belongs to the second unit.
    assert!(m.graph.nodes(ScopeId::MAIN).all(|node| units.of_node(node).is_some()));
}

#[test]
fn sandwich_norm_and_layer_scale_are_inside() {
    let m = model(
        STREAM,
        WEIGHTS,
        "n = LayerNormalization (x, g, b) u = MatMul (n, up) r = Gelu (u) d = MatMul (r, down)
         e = LayerNormalization (d, g, b) f = Mul (e, g) y = Add (x, f)",
    );
    assert_eq!(told(&m), ["mlp x->y"]);
    assert_eq!(find(&m).get(UnitId(0)).nodes.len(), 6);
}

#[test]
fn post_norm() {
    let m = model(
        STREAM,
        WEIGHTS,
        &format!(
            "n = Identity (x) {ATTENTION} s = Add (a, x) h = LayerNormalization (s, g, b)
             u = MatMul (h, up) r = Relu (u) d = MatMul (r, down) t = Add (d, h) y = LayerNormalization (t, g, b)"
        ),
    );
    assert_eq!(told(&m), ["attention x->s", "mlp h->t"]);
    assert_eq!(chain_lengths(&m), [2]);
    assert_eq!(find(&m).get(UnitId(1)).post, Some(PostOp::Norm));
}

#[test]
fn post_norm_spelled_out() {
    let m = model(
        STREAM,
        "up:4,8 down:8,4 g:4 b:4 two:1 eps:1 w:4,4",
        "e = MatMul (x, w) f = Relu (e) s = Add (f, x)
         mean = ReduceMean <keepdims = 1> (s) c = Sub (s, mean) sq = Pow (c, two) var = ReduceMean <keepdims = 1> (sq)
         ve = Add (var, eps) sd = Sqrt (ve) nn = Div (c, sd) ng = Mul (nn, g) h = Add (ng, b)
         u = MatMul (h, up) r = Relu (u) d = MatMul (r, down) y = Add (d, h)",
    );
    assert_eq!(told(&m), ["mlp x->s", "mlp h->y"]);
    assert_eq!(find(&m).get(UnitId(1)).post, Some(PostOp::Norm));
}

#[test]
fn parallel_branches_of_one_sum() {
    let branches =
        format!("n = LayerNormalization (x, g, b) {ATTENTION} u = MatMul (n, up) r = Relu (u) d = MatMul (r, down)");
    for sums in ["s = Add (a, d) y = Add (s, x)", "s = Add (x, a) y = Add (s, d)", "y = Sum (x, a, d)"] {
        let m = model(STREAM, WEIGHTS, &format!("{branches} {sums}"));
        assert_eq!(told(&m), ["attention x->y side n", "mlp x->y side n"], "{sums}");
        assert_eq!(chain_lengths(&m), [2], "{sums}");
        let units = find(&m);
        // The sum that reads the branch itself is the one to take apart.
        for (_, unit) in units.iter() {
            assert!(m.graph.node(unit.join).inputs().contains(&Some(unit.branch[0])), "{sums}");
        }
    }
}

#[test]
fn parallel_branches_with_norms_of_their_own() {
    let body = format!(
        "n = LayerNormalization (x, g, b) {ATTENTION} m = LayerNormalization (x, g, b)
         u = MatMul (m, up) r = Relu (u) d = MatMul (r, down) s = Add (x, a) y = Add (s, d)"
    );
    assert_eq!(told(&model(STREAM, WEIGHTS, &body)), ["attention x->s", "mlp x->y"]);
    assert_eq!(chain_lengths(&model(STREAM, WEIGHTS, &body)), [2]);
}

#[test]
fn low_rank_and_parallel_linear_maps_are_one_branch() {
    let m = model(
        STREAM,
        "w:4,4 l:4,1 r:1,4",
        "n = Relu (x) full = MatMul (n, w) thin = MatMul (n, l) back = MatMul (thin, r) s = Add (full, back) y = Add (s, x)",
    );
    assert_eq!(told(&m), ["mlp x->y"]);
}

#[test]
fn residual_network_with_projection() {
    let m = model(
        "(float[batch,4,8,8] x) => (float[batch,8,4,4] y)",
        "c1:4,4,3,3 c2:4,4,3,3 p1:8,4,3,3 p2:8,8,3,3 ps:8,4,1,1 k1:8,8,3,3 k2:8,8,3,3",
        "a = Conv <pads = [1,1,1,1]> (x, c1) ar = Relu (a) b = Conv <pads = [1,1,1,1]> (ar, c2) s = Add (b, x) t = Relu (s)
         p = Conv <pads = [1,1,1,1], strides = [2,2]> (t, p1) pr = Relu (p) q = Conv <pads = [1,1,1,1]> (pr, p2)
         o = Conv <strides = [2,2]> (t, ps) u = Add (q, o) v = Relu (u)
         k = Conv <pads = [1,1,1,1]> (v, k1) kr = Relu (k) l = Conv <pads = [1,1,1,1]> (kr, k2) z = Add (l, v) y = Relu (z)",
    );
    assert_eq!(told(&m), ["conv x->s", "conv t->u projected", "conv v->z"]);
    assert_eq!(chain_lengths(&m), [3]);
    assert_eq!(find(&m).get(UnitId(2)).post, Some(PostOp::Activation));
}

#[test]
fn inverted_residual_with_squeeze_and_excite() {
    let m = model(
        "(float[batch,4,8,8] x) => (float[batch,4,8,8] y)",
        "e:8,4,1,1 d:8,1,3,3 r:2,8,1,1 i:8,2,1,1 o:4,8,1,1",
        "a = Conv (x, e) ar = HardSwish (a) b = Conv <group = 8, pads = [1,1,1,1]> (ar, d)
         pool = GlobalAveragePool (b) s1 = Conv (pool, r) s2 = Relu (s1) s3 = Conv (s2, i) gate = HardSigmoid (s3)
         c = Mul (b, gate) f = Conv (c, o) y = Add (x, f)",
    );
    assert_eq!(told(&m), ["conv x->y"]);
}

#[test]
fn diffusion_transformer_gates() {
    let m = model(
        "(float[batch,seq,4] x, float[batch,1,4] c) => (float[batch,seq,4] y)",
        "up:4,8 down:8,4 g:4 b:4 w:4,12 one:1",
        "e = MatMul (c, w) shift, scale, gate = Split <axis = 2, num_outputs = 3> (e)
         n = LayerNormalization (x, g, b) o = Add (scale, one) ns = Mul (n, o) nn = Add (ns, shift)
         u = MatMul (nn, up) r = Gelu (u) d = MatMul (r, down) dg = Mul (d, gate) y = Add (x, dg)",
    );
    assert_eq!(told(&m), ["mlp x->y side shift gate o"]);
    // What makes the gates serves nothing else.
    assert_eq!(find(&m).get(UnitId(0)).support.len(), 3);
}

#[test]
fn sums_inside_an_activation_are_no_units() {
    let m = model(
        STREAM,
        "up:4,8 down:8,4 three:1 k:1 half:1",
        "u = MatMul (x, up) p = Pow (u, three) pk = Mul (p, k) i = Add (u, pk) t = Tanh (i) e = Add (t, half) f = Mul (u, e)
         d = MatMul (f, down) y = Add (x, d)",
    );
    assert_eq!(told(&m), ["mlp x->y"]);
    assert_eq!(find(&m).rejected(), []);
}

#[test]
fn rotary_sums_masks_and_biases_are_no_units() {
    let m = model(
        "(float[batch,seq,4] x, float[batch,seq,4] cos, float[batch,seq,4] sin, float[batch,1,seq] mask) => (float[batch,seq,seq] y)",
        "w:4,4 b:4",
        "h = MatMul (x, w) q = Add (h, b) qc = Mul (q, cos) l, r = Split <axis = 2, num_outputs = 2> (q) nr = Neg (r)
         rot = Concat <axis = 2> (nr, l) qs = Mul (rot, sin) e = Add (qc, qs)
         t = Transpose <perm = [0, 2, 1]> (e) s = MatMul (e, t) y = Add (s, mask)",
    );
    assert!(told(&m).is_empty());
    assert_eq!(find(&m).rejected(), []);
}

#[test]
fn attention_with_cache_mask_and_cross_attention() {
    let m = model(
        "(float[batch,seq,4] x, float[batch,past,4] past_key, float[batch,enc,4] states, float[batch,seq,total] mask)
         => (float[batch,seq,4] y, float present_key)",
        "wq:4,4 wk:4,4 wv:4,4 cq:4,4 ck:4,4 cv:4,4",
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) key = Concat <axis = 1> (past_key, k)
         present_key = Identity (key) kt = Transpose <perm = [0, 2, 1]> (key) s0 = MatMul (q, kt) s = Add (s0, mask)
         p = Softmax (s) vv = Concat <axis = 1> (past_key, v) a = MatMul (p, vv) h = Add (x, a)
         cqx = MatMul (h, cq) ckx = MatMul (states, ck) cvx = MatMul (states, cv)
         ct = Transpose <perm = [0, 2, 1]> (ckx) cs = MatMul (cqx, ct) cp = Softmax (cs) ca = MatMul (cp, cvx) y = Add (h, ca)",
    );
    assert_eq!(told(&m), ["attention x->h side past_key mask outputs present_key", "cross-attention h->y side cvx ct"]);
    let units = find(&m);
    // The copy that becomes the cache goes with the unit; so do the keys and values of the other.
    assert_eq!(units.get(UnitId(0)).support.len(), 1);
    assert_eq!(units.get(UnitId(1)).support.len(), 3);
}

#[test]
fn fused_skip_norms() {
    let m = model(
        STREAM,
        WEIGHTS,
        "n0 = SimplifiedLayerNormalization (x, g) u = MatMul (n0, up) r = Relu (u) d = MatMul (r, down)
         n1, , , s1 = com.microsoft.SkipSimplifiedLayerNormalization (x, d, g)
         u1 = MatMul (n1, up) r1 = Relu (u1) d1 = MatMul (r1, down)
         n2, , , s2 = com.microsoft.SkipSimplifiedLayerNormalization (s1, d1, g)
         e = MatMul (n2, wq) f = Relu (e) y = Add (s2, f)",
    );
    assert_eq!(told(&m), ["mlp x->s1", "mlp s1->s2", "mlp s2->y"]);
    assert_eq!(chain_lengths(&m), [3]);
    let post = model(
        STREAM,
        WEIGHTS,
        "u = MatMul (x, up) r = Relu (u) d = MatMul (r, down) h = com.microsoft.SkipLayerNormalization (x, d, g, b)
         u1 = MatMul (h, up) r1 = Relu (u1) d1 = MatMul (r1, down) y = com.microsoft.SkipLayerNormalization (d1, h, g, b)",
    );
    assert_eq!(told(&post), ["mlp x->h", "mlp h->y"]);
}

#[test]
fn fused_attention_is_classified() {
    let m = model(
        "(float[batch,seq,4] x, float[batch,enc,4] states) => (float[batch,seq,4] y)",
        "wq:4,4 wk:4,4 wv:4,4",
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
         a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v) h = Add (x, a)
         q2 = MatMul (h, wq) k2 = MatMul (states, wk) v2 = MatMul (states, wv)
         c = com.microsoft.MultiHeadAttention <num_heads = 2> (q2, k2, v2) y = Add (h, c)",
    );
    assert_eq!(told(&m), ["attention x->h", "cross-attention h->y side k2 v2"]);
}

#[test]
fn nested_units_form_a_tree() {
    let m = model(
        "(float[batch,4,8,8] x) => (float[batch,4,8,8] y)",
        "c0:4,4,3,3 c1:4,4,3,3 c2:4,4,3,3 c3:4,4,3,3",
        "a = Conv <pads = [1,1,1,1]> (x, c0) b = Conv <pads = [1,1,1,1]> (a, c1) br = Relu (b) h = Add (a, br)
         c = Conv <pads = [1,1,1,1]> (h, c2) cr = Relu (c) i = Add (h, cr) d = Conv <pads = [1,1,1,1]> (i, c3) y = Add (x, d)",
    );
    assert_eq!(told(&m), ["conv a->h depth 1", "conv h->i depth 1", "nested x->y"]);
    assert_eq!(chain_lengths(&m), [2, 1]);
    let units = find(&m);
    let last = m.graph.producer(m.graph.find_value("d").unwrap()).unwrap();
    assert_eq!(units.of_node(last), Some(UnitId(2)));
    assert_eq!(units.get(UnitId(0)).parent, Some(UnitId(2)));
}

#[test]
fn mixers_of_tokens() {
    let m = model(
        "(float[batch,6,4] x) => (float[batch,6,4] y)",
        "t1:6,8 t2:8,6",
        "t = Transpose <perm = [0, 2, 1]> (x) u = MatMul (t, t1) r = Relu (u) d = MatMul (r, t2)
         e = Transpose <perm = [0, 2, 1]> (d) y = Add (x, e)",
    );
    assert_eq!(told(&m), ["mixer x->y"]);
}

#[test]
fn a_value_used_elsewhere_is_an_escape() {
    let m = model(
        "(float[batch,seq,4] x) => (float[batch,seq,4] y, float[batch,seq,4] features)",
        WEIGHTS,
        "n = LayerNormalization (x, g, b) u = MatMul (n, wq) features = Relu (n) d = MatMul (u, wk) y = Add (x, d)",
    );
    assert!(told(&m).is_empty());
    assert_eq!(find(&m).rejected().iter().map(|r| r.reason).collect::<Vec<_>>(), [NoUnitReason::Escape]);
}

#[test]
fn taps_of_the_stream_and_of_shapes_are_no_escapes() {
    let m = model(
        "(float[batch,seq,4] x) => (float[batch,seq,4] y, float[batch,seq,4] hidden, int64[3] sizes)",
        WEIGHTS,
        "u = MatMul (x, wq) r = Relu (u) h = Add (x, r) hidden = Identity (h) v = MatMul (h, wk) w = Relu (v)
         sizes = Shape (v) y = Add (h, w)",
    );
    assert_eq!(told(&m), ["mlp x->h", "mlp h->y taps v"]);
}

#[test]
fn long_skips_by_concatenation_and_top_down_sums_are_no_units() {
    let m = model(
        "(float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,4,4] z)",
        "c0:4,4,3,3 c1:4,4,3,3 l0:4,4,1,1 l1:4,4,1,1 one:1",
        "a = Conv <pads = [1,1,1,1]> (x, c0) ar = Relu (a) b = Conv <pads = [1,1,1,1], strides = [2,2]> (ar, c1) z = Relu (b)
         la = Conv (ar, l0) lb = Conv (z, l1) up = ConvTranspose <strides = [2,2], output_padding = [1,1]> (lb, l1) y = Add (la, up)",
    );
    assert!(told(&m).is_empty());
}

#[test]
fn unknown_shapes_are_named() {
    let m = model(
        "(float[batch,seq,4] x) => (float y)",
        "w:4,4",
        "h = other.Mystery (x) u = MatMul (h, w) r = Relu (u) y = Add (h, r)",
    );
    assert!(told(&m).is_empty());
    assert_eq!(find(&m).rejected().iter().map(|r| r.reason).collect::<Vec<_>>(), [NoUnitReason::UnknownShapes]);
}

#[test]
fn units_inside_subgraphs() {
    let m = model(
        "(float[2,4] x, bool go) => (float[2,4] y)",
        "w:4,4",
        "y = If (go) <then_branch = t () => (float[2,4] a) { u = MatMul (x, w) r = Relu (u) a = Add (x, r) },
                      else_branch = e () => (float[2,4] b) { b = Identity (x) }>",
    );
    assert_eq!(told(&m), ["mlp x->a"]);
}

#[test]
fn blocks_repeat_with_a_period() {
    let mut body = String::from("h0 = Identity (x)");
    for i in 0..4 {
        let _ = write!(
            body,
            " m{i} = MatMul (h{i}, wq) r{i} = Relu (m{i}) s{i} = Add (h{i}, r{i})
              u{i} = MatMul (s{i}, up) t{i} = Relu (u{i}) d{i} = MatMul (t{i}, down) h{} = Add (s{i}, d{i})",
            i + 1
        );
    }
    body.push_str(" y = Identity (h4)");
    let m = model(STREAM, "wq:4,4 up:4,8 down:8,4", &body);
    let units = find(&m);
    assert_eq!((units.len(), units.chains().len(), units.period(0)), (8, 1, Some(2)));
}

#[test]
fn fixtures_have_the_units_that_their_makers_built() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let kinds = |name: &str| {
        let model = Model::read(&folder.join(name)).unwrap().model;
        let units = find(&model);
        units.iter().map(|(_, unit)| (unit.kind, unit.depth, unit.chain)).collect::<Vec<_>>()
    };
    let block = [(UnitKind::Attention, 0, 0), (UnitKind::Mlp, 0, 0)];
    assert_eq!(kinds("transformer.onnx"), [block, block].concat());
    // Two blocks of equal width at each of three sizes; between them the width changes without a skip.
    assert_eq!(kinds("mobilenet.onnx"), [0, 0, 1, 1, 2, 2].map(|chain| (UnitKind::Conv, 0, chain)));
}

#[test]
fn time_stays_in_proportion_to_nodes() {
    let mut body = String::from("h0 = Identity (x)");
    let blocks = 10_000;
    for i in 0..blocks {
        let _ = write!(
            body,
            " m{i} = MatMul (h{i}, w) r{i} = Relu (m{i}) q{i} = Mul (r{i}, mask) p{i} = MatMul (q{i}, w) h{} = Add (h{i}, p{i})",
            i + 1
        );
    }
    let _ = write!(body, " y = Add (h{blocks}, x)");
    let m = model("(float[batch,seq,4] x, float[batch,seq,4] mask) => (float[batch,seq,4] y)", "w:4,4", &body);
    let facts = Facts::infer(&m);
    let start = std::time::Instant::now();
    let units = Units::find(&m, &facts);
    // 50,000 nodes take some hundredths of a second; what would be quadratic takes minutes.
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!((units.len(), units.chains().len()), (blocks + 1, 2));
}
