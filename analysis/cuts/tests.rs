//! Cuts of the denoisers in `fixtures/`, with their names taken away, and of small graphs.

use super::*;
use lathe_ir::{Graph, text};
use std::fmt::Write as _;

fn fixture(name: &str) -> Model {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let mut model = Model::read(&folder.join(name)).unwrap().model;
    strip_names(&mut model.graph);
    model
}

/// Numbers instead of names, in an order that says nothing.
fn strip_names(graph: &mut Graph) {
    let keep: Vec<ValueId> = graph.main().inputs().iter().chain(graph.main().outputs()).copied().collect();
    for id in graph.all_nodes() {
        graph.node_mut(id).name.clear();
        let outputs: Vec<ValueId> = graph.node(id).outputs().iter().flatten().copied().collect();
        for value in outputs.into_iter().filter(|v| !keep.contains(v)) {
            graph.rename(value, format!("v{}", value.index().wrapping_mul(7919) % 100_003));
        }
    }
}

struct Found {
    model: Model,
    facts: Facts,
    cuts: Cuts,
}

impl Found {
    fn of(model: Model, latent: &str, time: &str) -> Found {
        let facts = Facts::infer(&model);
        let find = |name: &str| model.graph.find_value(name).unwrap();
        let (latent, time) = (find(latent), find(time));
        let cones = Cones::find(&model, &[latent], &[time]).unwrap();
        let cuts = Cuts::find(&model, &facts, &cones, latent, model.graph.main().outputs()[0]);
        Found { model, facts, cuts }
    }

    /// The residual sums of a block, as kinds.
    fn kinds(&self, block: &Block) -> Vec<UnitKind> {
        block.residuals.iter().map(|&i| self.cuts.residuals[i].kind).collect()
    }

    /// For every run its period, the number of blocks and the kinds in the first.
    fn runs(&self) -> Vec<(usize, usize, Vec<UnitKind>)> {
        self.cuts.runs.iter().map(|run| (run.period, run.blocks.len(), self.kinds(&run.blocks[0]))).collect()
    }

    fn sizes(&self, value: ValueId) -> Vec<Option<i64>> {
        self.facts.shape(value).unwrap().iter().map(DimExpr::as_known).collect()
    }
}

#[test]
fn a_diffusion_transformer_has_blocks_of_attention_and_mlp() {
    let found = Found::of(fixture("dit.onnx"), "x", "t");
    assert_eq!(found.runs(), [(2, 4, vec![UnitKind::Attention, UnitKind::Mlp])]);
    let cuts = &found.cuts;
    assert_eq!(
        (cuts.spine.first(), cuts.spine.last()),
        (Some(&found.model.graph.main().inputs()[0]), Some(&found.model.graph.main().outputs()[0]))
    );
    assert!(cuts.skips.is_empty());
    assert_eq!(cuts.borders.len(), 9);
    for border in &cuts.borders {
        assert!(border.skips == 0 && cuts.spine.contains(&border.streams[0]), "{border:?}");
        assert_eq!(found.sizes(border.streams[0])[1..], [Some(16), Some(16)]);
    }
    // Every block starts where the one before ends, and all its nodes lie between.
    let run = cuts.longest().unwrap();
    assert!(run.blocks.windows(2).all(|pair| pair[0].leave == pair[1].enter));
    let per_block: Vec<usize> = run.blocks.iter().map(|b| b.nodes.len()).collect();
    assert!(per_block.iter().all(|&n| n == per_block[0] && n > 40), "{per_block:?}");
    for residual in &cuts.residuals {
        let gate = residual.gate.unwrap();
        assert_ne!(residual.ungated, residual.arm);
        let product = found.model.graph.producer(residual.arm).unwrap();
        let product = found.model.graph.node(product);
        assert!(product.is("Mul") && product.inputs().contains(&Some(gate)));
        assert_eq!(found.sizes(gate)[1..], [Some(1), Some(16)]);
    }
}

#[test]
fn a_unet_has_skips_and_levels() {
    let found = Found::of(fixture("unet.onnx"), "sample", "timestep");
    let cuts = &found.cuts;
    // Three at each resolution; the shallowest runs last and takes what the first convolution made.
    assert_eq!(cuts.skips.iter().map(|s| s.level).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1].map(Some));
    let graph = &found.model.graph;
    let made_by = |v: ValueId| graph.node(graph.producer(v).unwrap()).op_type.as_str();
    assert_eq!((made_by(cuts.skips[0].source), made_by(cuts.skips[5].source)), ("Conv", "Add"));
    assert!(cuts.skips.iter().all(|s| graph.node(s.join).is("Concat")));
    // With a deep value given, fewer nodes run the shallower the skip is.
    let depth: Vec<usize> = cuts.skips.iter().map(|s| graph.producer(s.deep).unwrap().index()).collect();
    assert!(depth.is_sorted_by(|a, b| a > b), "{depth:?}");
    // Nothing but the ends is passed by everything; with skips aside the whole trunk is.
    let inner = cuts.borders.iter().filter(|b| b.skips > 0).count();
    assert!(inner >= 14, "{:?}", cuts.borders);
    let kinds = |kind| cuts.residuals.iter().filter(|r| r.kind == kind).count();
    assert_eq!((kinds(UnitKind::Attention), kinds(UnitKind::CrossAttention), kinds(UnitKind::Mlp)), (6, 6, 6));
    assert_eq!((kinds(UnitKind::Conv), kinds(UnitKind::Nested)), (12, 6));
    // Where the width changes the shortcut is a convolution of the stream.
    let projected: Vec<&Residual> = cuts.residuals.iter().filter(|r| r.shortcut != r.stream).collect();
    assert_eq!(projected.len(), 7);
    assert!(projected.iter().all(|r| made_by(r.shortcut) == "Conv" && r.kind == UnitKind::Conv));
    // The two blocks of the first level repeat.
    assert_eq!(found.runs()[0], (1, 2, vec![UnitKind::Conv]));
}

#[test]
fn two_streams_are_cut_together() {
    let found = Found::of(fixture("mmdit.onnx"), "latent", "timestep");
    let cuts = &found.cuts;
    use UnitKind::{Attention, Mlp};
    assert_eq!(found.runs(), [(1, 3, vec![Attention, Mlp, Attention, Mlp]), (1, 2, vec![Attention])]);
    let double = &cuts.runs[0];
    for block in &double.blocks {
        for border in [&cuts.borders[block.enter], &cuts.borders[block.leave]] {
            // The image comes first at every border, also where the text does not yet depend on it.
            let tokens: Vec<_> = border.streams.iter().map(|&v| found.sizes(v)[1]).collect();
            assert_eq!(tokens, [Some(16), Some(6)]);
        }
    }
    let single = &cuts.runs[1];
    let tokens = found.sizes(cuts.borders[single.blocks[0].enter].streams[0])[1];
    assert_eq!((cuts.borders[single.blocks[0].enter].streams.len(), tokens), (1, Some(22)));
    assert!(cuts.residuals.iter().all(|r| r.gate.is_some()));
}

fn small(ports: &str, body: &str) -> Found {
    let square = (0..16).map(|i| if i % 5 == 0 { "1" } else { "0.5" }).collect::<Vec<_>>().join(", ");
    let model = text::parse(&format!(
        r#"<ir_version: 10, opset_import: ["" : 20]> g {ports}
        <float[4,4] w = {{{square}}}, float[4,4] v = {{{square}}}, float[4] g = {{1, 1, 1, 1}}, float[4] b = {{0, 0, 0, 0}}> {{ {body} }}"#
    ))
    .unwrap();
    Found::of(model, "x", "t")
}

const PORTS: &str = "(float[n,6,4] x, float t) => (float[n,6,4] y)";

fn names(found: &Found, values: &[ValueId]) -> String {
    values.iter().map(|&v| found.model.graph.value(v).name.as_str()).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_spine_is_what_every_path_passes() {
    let found =
        small(PORTS, "a = MatMul (x, w) l = Relu (a) r = Tanh (a) s = Mul (l, r) tt = Mul (s, t) y = MatMul (tt, v)");
    assert_eq!(names(&found, &found.cuts.spine), "x a s tt y");
    // Reading a shape is no path.
    let found = small(PORTS, "s = Shape (x) a = MatMul (x, w) y = Reshape (a, s)");
    assert_eq!(names(&found, &found.cuts.spine), "x a y");
    let found = small(PORTS, "a = MatMul (x, w) y = Add (a, x)");
    assert_eq!(names(&found, &found.cuts.spine), "x y");
}

#[test]
fn an_output_that_does_not_depend_on_the_latent_has_no_cuts() {
    let found = small("(float[n,6,4] x, float t) => (float y)", "y = Sin (t)");
    assert!(found.cuts.spine.is_empty() && found.cuts.borders.is_empty() && found.cuts.runs.is_empty());
}

#[test]
fn sums_inside_an_activation_and_of_unrelated_values_are_no_residuals() {
    let found = small(
        PORTS,
        "a = MatMul (x, w) c = Mul (a, a) i = Add (a, c) th = Tanh (i) l = MatMul (th, v) m = MatMul (a, v) r = Sigmoid (m) y = Add (l, r)",
    );
    assert!(found.cuts.residuals.is_empty());
}

#[test]
fn the_arm_is_known_before_and_after_its_gate() {
    let found = small(
        PORTS,
        "n = LayerNormalization (x, g, b) m = MatMul (n, w) r = Relu (m) d = MatMul (r, v) k = Sin (t) dg = Mul (d, k) y = Add (x, dg)",
    );
    let residual = &found.cuts.residuals[0];
    let told = [residual.stream, residual.shortcut, residual.arm, residual.ungated, residual.gate.unwrap()];
    assert_eq!((names(&found, &told).as_str(), residual.kind), ("x x dg d k", UnitKind::Mlp));
    // A constant scale is no gate.
    let found = small(PORTS, "m = MatMul (x, w) r = Relu (m) d = MatMul (r, v) dg = Mul (d, g) y = Add (x, dg)");
    let residual = &found.cuts.residuals[0];
    assert_eq!((residual.gate, residual.ungated), (None, residual.arm));
}

#[test]
fn blocks_of_other_weights_repeat_and_blocks_of_other_structure_do_not() {
    let block = |i: usize, act: &str, weight: &str| {
        format!(" m{i} = MatMul (h{i}, {weight}) r{i} = {act} (m{i}) h{} = Add (h{i}, r{i})", i + 1)
    };
    let chain = |blocks: &[(&str, &str)]| {
        let mut body = String::from("h0 = MatMul (x, w)");
        blocks.iter().enumerate().for_each(|(i, (act, weight))| body.push_str(&block(i, act, weight)));
        let _ = write!(body, " y = MatMul (h{}, v)", blocks.len());
        small(PORTS, &body)
    };
    let runs = |found: &Found| found.cuts.runs.iter().map(|r| (r.period, r.blocks.len())).collect::<Vec<_>>();
    assert_eq!(runs(&chain(&[("Relu", "w"), ("Relu", "v"), ("Relu", "w")])), [(1, 3)]);
    assert_eq!(runs(&chain(&[("Relu", "w"), ("Tanh", "v"), ("Relu", "v"), ("Tanh", "w")])), [(2, 2)]);
    assert_eq!(runs(&chain(&[("Relu", "w"), ("Tanh", "v"), ("Elu", "v")])), []);
    let mixed = chain(&[("Relu", "w"), ("Relu", "v"), ("Tanh", "v"), ("Elu", "w"), ("Elu", "w"), ("Elu", "v")]);
    assert_eq!(runs(&mixed), [(1, 2), (1, 3)]);
}

#[test]
fn time_stays_in_proportion_to_nodes() {
    let mut body = String::from("h0 = MatMul (x, w)");
    let blocks = 5_000;
    for i in 0..blocks {
        let _ = write!(
            body,
            " m{i} = MatMul (h{i}, w) r{i} = Relu (m{i}) q{i} = Mul (r{i}, t) p{i} = MatMul (q{i}, v) h{} = Add (h{i}, p{i})",
            i + 1
        );
    }
    let _ = write!(body, " y = MatMul (h{blocks}, v)");
    let Found { model, facts, cuts } = small(PORTS, &body);
    assert_eq!(cuts.runs[0].blocks.len(), blocks);
    let find = |name: &str| model.graph.find_value(name).unwrap();
    let start = std::time::Instant::now();
    let cones = Cones::find(&model, &[find("x")], &[find("t")]).unwrap();
    let again = Cuts::find(&model, &facts, &cones, find("x"), find("y"));
    // 25,000 nodes take some tenths of a second; what would be quadratic takes minutes.
    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(again.runs, cuts.runs);
}
