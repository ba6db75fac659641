//! Planted layers are found and replaced, what is told of an error is what is lost, and the rest is declined with reasons.

use super::{
    places::{Grid, Layout, grid},
    *,
};
use crate::testing::model;
use lathe_analysis::{EvaluateError, Gram, Moments as Squares, View};
use lathe_ir::{DataType, Node, ScopeId, Tensor, Type};
use std::fmt::Write as _;

/// Numbers from a seed, in `(-1, 1)`.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut one = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| one()).collect()
}

/// A calibration set that models are run on: two samples to fit, one that is held out, of one input.
struct Runs {
    model: Model,
    name: String,
    samples: Vec<Tensor>,
}

impl Runs {
    fn of(model: &Model, dims: &[usize]) -> Runs {
        let count: usize = dims.iter().product();
        let samples = (0..3).map(|seed| Tensor::from_f32s(dims, &noise(count, 77 + seed))).collect();
        let name = model.graph.value(model.graph.main().inputs()[0]).name.clone();
        Runs { model: model.clone(), name, samples }
    }

    fn run(&self, model: &Model, sample: usize) -> Vec<(String, Tensor)> {
        let inputs = [(self.name.clone(), self.samples[sample].clone())];
        lathe_testkit::evaluator().run(model, &inputs).unwrap()
    }

    /// Values of a model for a sample, in order.
    fn values(&self, model: &Model, names: &[&str], sample: usize) -> Vec<Tensor> {
        let mut model = model.clone();
        for at in (0..model.graph.main().outputs().len()).rev() {
            model.graph.remove_output(ScopeId::MAIN, at);
        }
        for name in names {
            let value = model.graph.find_value(name).unwrap();
            let shown = model.graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], "shown");
            model.graph.value_mut(shown).ty = Some(Type::unshaped(DataType::Float));
            model.graph.add_output(ScopeId::MAIN, shown);
        }
        self.run(&model, sample).into_iter().map(|(_, tensor)| tensor).collect()
    }

    fn moments(&self, model: &Model, pairs: &[(Rows, Rows)], samples: &[usize]) -> Vec<Cross> {
        let moment = |(x, y): &(Rows, Rows)| {
            let both: Vec<Vec<Tensor>> =
                samples.iter().map(|&s| self.values(model, &[x.value.as_str(), y.value.as_str()], s)).collect();
            let a: Vec<Vec<f64>> = both.iter().flat_map(|t| as_rows(&t[0], &x.view)).collect();
            let b: Vec<Vec<f64>> = both.iter().flat_map(|t| as_rows(&t[1], &y.view)).collect();
            assert_eq!(a.len(), b.len());
            let (k, m, rows) = (a[0].len(), b[0].len(), a.len() as f64);
            let mean = |of: &dyn Fn(usize) -> f64| (0..a.len()).map(of).sum::<f64>() / rows;
            let cross = (0..k * m).map(|at| mean(&|r| a[r][at / m] * b[r][at % m])).collect();
            Cross {
                matrix: cross,
                x_mean: (0..k).map(|i| mean(&|r| a[r][i])).collect(),
                y_mean: (0..m).map(|j| mean(&|r| b[r][j])).collect(),
                x_square: (0..k).map(|i| mean(&|r| a[r][i] * a[r][i])).collect(),
                y_square: (0..m).map(|j| mean(&|r| b[r][j] * b[r][j])).collect(),
                rows: a.len() as u64,
            }
        };
        pairs.iter().map(moment).collect()
    }
}

fn as_rows(tensor: &Tensor, view: &View) -> Vec<Vec<f64>> {
    let &View::Axis(axis) = view else { panic!("only axes are asked for") };
    let dims = tensor.dims();
    let axis = if axis < 0 { (dims.len() as i64 + axis) as usize } else { axis as usize };
    let numbers = tensor.to_f32s().unwrap();
    let (outer, inner): (usize, usize) = (dims[..axis].iter().product(), dims[axis + 1..].iter().product());
    let at = |o: usize, feature: usize, i: usize| f64::from(numbers[(o * dims[axis] + feature) * inner + i]);
    (0..outer)
        .flat_map(|o| (0..inner).map(move |i| (o, i)))
        .map(|(o, i)| (0..dims[axis]).map(|f| at(o, f, i)).collect())
        .collect()
}

impl Calibrate for Runs {
    fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(None)
    }

    fn moments(&self, _: &Rows) -> Result<Option<Squares>, EvaluateError> {
        Ok(None)
    }

    fn cross(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        Ok(self.moments(model, pairs, &[0, 1]))
    }

    fn held_out(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        Ok(self.moments(model, pairs, &[2]))
    }

    fn trials(&self, variant: &Model, _: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        let (whole, found) = (self.run(&self.model, 2), self.run(variant, 2));
        Ok(vec![off(&whole[0].1, &found[0].1)])
    }
}

/// The squared relative error of a tensor.
fn off(whole: &Tensor, found: &Tensor) -> f64 {
    let (a, b) = (whole.to_f64s().unwrap(), found.to_f64s().unwrap());
    a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.iter().map(|a| a * a).sum::<f64>()
}

fn proposal(model: &Model, runs: &Runs) -> Proposal {
    let cx = MethodContext::default().with_calibration(runs).with_quantities(vec![Quantity::Latency]);
    Substitute.propose(model, &cx).unwrap()
}

/// Carries out a choice.
fn replaced(model: &Model, site: &Site, choice: usize) -> Model {
    let mut changed = model.clone();
    let done = Substitute.apply(&mut changed, site, &site.candidates[choice], &MethodContext::default()).unwrap();
    assert_eq!(done.changes.len(), 1, "{:?}", done.refusals);
    changed.check().unwrap();
    changed
}

fn find<'a>(proposal: &'a Proposal, site: &str) -> &'a Site {
    let names: Vec<&str> = proposal.sites.iter().map(|s| s.name.as_str()).collect();
    proposal
        .sites
        .iter()
        .find(|s| s.name == site)
        .unwrap_or_else(|| panic!("{site} is not among {names:?}: {:?}", proposal.outcome))
}

/// The choice of this name, with an error that is only rounding, carried out: the same function.
fn check(model: &Model, proposal: &Proposal, site: &str, choice: &str) -> Model {
    let site = find(proposal, site);
    let stated: Vec<(&str, &Loss)> = site.candidates.iter().map(|c| (c.label.as_str(), &c.loss)).collect();
    let at = site
        .candidates
        .iter()
        .position(|c| c.label == choice)
        .unwrap_or_else(|| panic!("{choice} is not among {stated:?}"));
    let loss = &site.candidates[at].loss;
    let error = loss.measured().unwrap_or_else(|| loss.per_tap().unwrap()[0]);
    assert!(error < 1e-5, "{choice}: {error}");
    let changed = replaced(model, site, at);
    lathe_testkit::equivalent(model, &changed, Some(1e-5), 1).unwrap_or_else(|why| panic!("{choice}: {why}"));
    changed
}

const CHANNELS: usize = 6;

/// The kernel of every channel.
type Kernels = dyn Fn(usize) -> [f32; 9];

/// A convolution whose channel `i` reads channel `i` with this kernel, times a factor, plus a constant.
fn planted(kernels: &Kernels, depthwise: bool, attributes: &str, size: &str, rest: &str) -> Model {
    let mut weights = Vec::new();
    for o in 0..CHANNELS {
        for i in 0..if depthwise { 1 } else { CHANNELS } {
            let factor = if depthwise || o == i { 0.5 + 0.25 * o as f32 } else { 0.0 };
            weights.extend(kernels(o).map(|w| w * factor));
        }
    }
    let list = |numbers: &[f32]| numbers.iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ");
    let (per_group, group) = if depthwise { (1, CHANNELS) } else { (CHANNELS, 1) };
    model(&format!(
        "<ir_version: 10, opset_import: [\"\" : 20]>
         g (float[n,{CHANNELS},8,8] x) => (float[n,{size}] y)
         <float[{CHANNELS},{per_group},3,3] w = {{{}}}, float[{CHANNELS}] b = {{{}}},
          float[4,{CHANNELS},1,1] v = {{{}}}, float[4] c = {{1, 2, 3, 4}}> {{
            s = Softplus (x)
            u = Conv <pads = [1, 1, 1, 1], group = {group}{attributes}> (s, w, b)
            {rest}
        }}",
        list(&weights),
        list(&noise(CHANNELS, 5).iter().map(|x| x + 1.5).collect::<Vec<_>>()),
        list(&noise(4 * CHANNELS, 6)),
    ))
}

fn one_at(tap: usize) -> [f32; 9] {
    std::array::from_fn(|at| if at == tap { 1.0 } else { 0.0 })
}

const IMAGE: [usize; 4] = [2, CHANNELS, 8, 8];

#[test]
fn convolutions_that_are_copies_pools_and_shifts_are_found() {
    let cases: [(&Kernels, &str, usize); 4] = [
        (&|_| one_at(4), "identity, scaled", 1),
        (&|_| [1.0 / 9.0; 9], "average pool, scaled", 2),
        (&|_| one_at(5), "shift, scaled", 2),
        (&|channel| one_at(channel % 9), "shift, scaled", 2),
    ];
    for (kernels, choice, nodes) in cases {
        for depthwise in [false, true] {
            for (attributes, size) in [("", "6,8,8"), (", strides = [2, 2]", "6,4,4")] {
                let model = planted(kernels, depthwise, attributes, size, "y = Tanh (u)");
                let found = proposal(&model, &Runs::of(&model, &IMAGE));
                let changed = check(&model, &found, "w", choice);
                assert_eq!(changed.graph.nodes(ScopeId::MAIN).count(), 2 + nodes, "{choice}");
                assert!(changed.graph.find_value("w").is_none());
            }
        }
    }
}

#[test]
fn a_factor_goes_into_the_pointwise_layer_behind_it() {
    let rest = "r = Relu (u) z = Conv (r, v, c) y = Tanh (z)";
    for depthwise in [false, true] {
        let model = planted(&|_| one_at(4), depthwise, "", "4,8,8", rest);
        let found = proposal(&model, &Runs::of(&model, &IMAGE));
        for choice in ["identity, scaled in the next layer", "identity, one layer"] {
            let changed = check(&model, &found, "w, v", choice);
            // Softplus, one convolution, and Tanh.
            assert_eq!(changed.graph.nodes(ScopeId::MAIN).count(), 3);
        }
        // The convolution alone is another place.
        check(&model, &found, "w", "identity, scaled");
    }
}

#[test]
fn what_is_told_is_what_is_lost() {
    let kernel = noise(9, 3);
    let kernels = move |channel: usize| std::array::from_fn(|at| kernel[(at + channel) % 9]);
    let model = planted(&kernels, false, "", "4,8,8", "r = Relu (u) z = Conv (r, v, c) y = Tanh (z)");
    let runs = Runs::of(&model, &IMAGE);
    let found = proposal(&model, &runs);
    let mut moments = BTreeSet::new();
    for site in &found.sites {
        let tap = model.graph.value(site.taps[0]).name.as_str();
        let whole = runs.values(&model, &[tap], 2).remove(0);
        for (at, choice) in site.candidates.iter().enumerate() {
            let lost = off(&whole, &runs.values(&replaced(&model, site, at), &[tap], 2)[0]).sqrt();
            let stated = choice.loss.per_tap().unwrap()[0];
            assert!(
                (lost - stated).abs() < 1e-3 * stated.max(1e-3),
                "{} {}: {lost} lost, {stated} told",
                site.name,
                choice.label
            );
            moments.insert(choice.label.clone());
        }
    }
    for name in ["max pool, one layer", "identity + average pool + max pool, one layer", "shift, one layer"] {
        assert!(moments.contains(name), "{name} is not among {moments:?}");
    }
}

const WIDTH: usize = 6;

/// Two units behind normalizations over ten tokens: attention whose scores are zero, and a feed-forward part that never
/// clips.
fn transformer() -> Model {
    let mut constants = String::new();
    let mut matrix = |name: &str, rows: usize, columns: usize, scale: f32, seed: u64| {
        let numbers: Vec<String> = noise(rows * columns, seed).iter().map(|x| format!("{:e}", x * scale)).collect();
        let _ = write!(constants, ", float[{rows},{columns}] {name} = {{{}}}", numbers.join(", "));
    };
    matrix("wq", WIDTH, WIDTH, 0.0, 1);
    matrix("wk", WIDTH, WIDTH, 0.7, 2);
    matrix("wv", WIDTH, WIDTH, 0.7, 3);
    matrix("wo", WIDTH, WIDTH, 0.7, 4);
    matrix("up", WIDTH, 8, 0.3, 5);
    matrix("down", 8, WIDTH, 0.7, 6);
    model(&format!(
        "<ir_version: 10, opset_import: [\"\" : 20]> g (float[n,10,{WIDTH}] x) => (float[n,10,{WIDTH}] y)
         <float[{WIDTH}] g = {{1, 1, 1, 1, 1, 1}}, float[{WIDTH}] b = {{0, 0, 0, 0, 0, 0}},
          float[8] high = {{9, 9, 9, 9, 9, 9, 9, 9}}{constants}> {{
            e = Tanh (x)
            [\"one/norm\"] n = LayerNormalization (e, g, b)
            [\"one/q\"] q = MatMul (n, wq) [\"one/k\"] k = MatMul (n, wk) [\"one/v\"] v = MatMul (n, wv)
            [\"one/t\"] kt = Transpose <perm = [0, 2, 1]> (k)
            [\"one/scores\"] scores = MatMul (q, kt) [\"one/weights\"] p = Softmax (scores)
            [\"one/sums\"] o = MatMul (p, v) [\"one/out\"] a = MatMul (o, wo)
            s = Add (e, a)
            [\"two/norm\"] m = LayerNormalization (s, g, b)
            [\"two/up\"] u = MatMul (m, up) [\"two/add\"] h = Add (u, high) [\"two/act\"] r = Relu (h)
            [\"two/down\"] d = MatMul (r, down)
            t = Add (s, d)
            y = Tanh (t)
        }}"
    ))
}

#[test]
fn branches_that_are_layers_and_constant_attention_are_found() {
    let model = transformer();
    let found = proposal(&model, &Runs::of(&model, &[9, 10, WIDTH]));
    let changed = check(&model, &found, "two", "identity, one layer");
    assert!(changed.graph.find_value("up").is_none() && changed.graph.find_value("m").is_some());
    // Equal weights make every token the average one, whatever averages look like.
    let old = Model { opsets: vec![(String::new(), 17)], ..transformer() };
    for model in [&model, &old] {
        let found = proposal(model, &Runs::of(model, &[9, 10, WIDTH]));
        check(model, &found, "one", "identity + mean token, one layer");
    }
    let frozen = check(&model, &found, "one, attention weights", "constant attention weights");
    assert!(frozen.graph.find_value("wk").is_none() && frozen.graph.find_value("wv").is_some());
    // What is inside lies inside.
    let footprint = |name: &str| find(&found, name).footprint.iter().copied().collect::<BTreeSet<ValueId>>();
    assert!(footprint("one, attention weights").is_subset(&footprint("one")));
}

#[test]
fn squares_of_tokens_stand_alone_or_behind_a_class_token() {
    assert_eq!(
        [grid(9), grid(10), grid(197)].map(|g| g.map(|g| (g.front, g.side))),
        [Some((0, 3)), Some((1, 3)), Some((1, 14))]
    );
    assert_eq!([grid(4), grid(11), grid(0)], [None::<Grid>; 3]);
    let (found, _) = places(&transformer());
    let tokens = |layout: &Layout| matches!(layout, Layout::Tokens(Some(t)) if t.grid.is_some());
    assert_eq!(found.iter().map(|p| tokens(&p.layout)).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn a_grid_of_neighbours_is_averaged_and_the_class_token_stays() {
    let model = transformer();
    let (found, _) = places(&model);
    let mut variant = model.clone();
    let features = basis::beside(&mut variant.graph, &found[0]);
    let name = variant.graph.value(features).name.clone();
    let runs = Runs::of(&model, &[1, 10, WIDTH]);
    let made = runs.values(&variant, &["n", &name], 0);
    let [read, made] = [&made[0], &made[1]].map(|t| as_rows(t, &View::Axis(-1)));
    let grid = |token: usize, feature: usize| made[token][2 * WIDTH + feature];
    for (feature, first) in read[0].iter().enumerate() {
        assert_eq!(grid(0, feature), *first);
        let average = |tokens: &[usize]| tokens.iter().map(|&t| read[t][feature]).sum::<f64>() / tokens.len() as f64;
        assert!((grid(1, feature) - average(&[1, 2, 4, 5])).abs() < 1e-6);
        assert!((grid(5, feature) - average(&[1, 2, 3, 4, 5, 6, 7, 8, 9])).abs() < 1e-6);
    }
}

fn refused(body: &str, weights: &str, reason: &str) {
    let model = model(&format!(
        "<ir_version: 10, opset_import: [\"\" : 20]> g (float[1,2,8,8] x) => (float y) <{weights}> {{ s = Relu (x) {body} }}"
    ));
    let (found, refused) = places(&model);
    assert!(found.is_empty() && refused.iter().any(|(why, _)| *why == reason), "{reason} is not among {refused:?}");
}

#[test]
fn other_windows_are_declined_with_the_reason() {
    let list = |count: usize| vec!["1"; count].join(", ");
    let w = format!("float[2,2,3,3] w = {{{}}}", list(36));
    let end = "y = ReduceMax <keepdims = 0> (u)";
    refused(&format!("u = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (s, w) {end}"), &w, "its window has gaps");
    refused(&format!("u = Conv (s, w) {end}"), &w, "its window is not centred on what it gives");
    let even = format!("float[2,2,2,2] w = {{{}}}", list(16));
    refused(&format!("u = Conv (s, w) {end}"), &even, "its window is not centred on what it gives");
    let grouped = format!("float[4,1,3,3] w = {{{}}}", list(36));
    let body = format!("u = Conv <pads = [1, 1, 1, 1], group = 2> (s, w) {end}");
    refused(&body, &grouped, "it has groups of several channels");
    let twice = format!("a = Conv <pads = [1, 1, 1, 1]> (s, w) u = Conv <pads = [1, 1, 1, 1]> (a, w) {end}");
    refused(&twice, &w, "others share its weights");
}

#[test]
fn a_branch_that_reads_more_than_the_stream_is_declined() {
    let text = lathe_ir::text::print_full(&transformer());
    let masked = text.replace("(float[n,10,6] x)", "(float[n,10,6] x, float[n,10,10] mask)");
    let masked = masked.replace("p = Softmax (scores)", "ms = Add (scores, mask) p = Softmax (ms)");
    let (_, refused) = places(&model(&masked));
    assert!(refused.iter().any(|(why, _)| *why == "it reads or gives more than the stream"), "{refused:?}");
}

#[test]
fn a_causal_attention_is_no_average_of_all_tokens() {
    let text = lathe_ir::text::print_full(&transformer());
    let rows = (0..100).map(|at| if at % 10 > at / 10 { "-1e9" } else { "0" });
    let mask = format!("float[10,10] mask = {{{}}}, ", rows.collect::<Vec<_>>().join(", "));
    let at = text.find("float[8] high").unwrap();
    let causal = format!("{}{mask}{}", &text[..at], &text[at..]);
    let causal = causal.replace("p = Softmax (scores)", "ms = Add (scores, mask) p = Softmax (ms)");
    let (found, _) = places(&model(&causal));
    let of_one = found.iter().find(|place| place.name == "one").unwrap();
    assert_eq!(basis::bases(of_one), [basis::Base::Identity]);
}

#[test]
fn it_is_idle_under_a_budget_of_bytes() {
    let model = planted(&|_| one_at(4), false, "", "6,8,8", "y = Tanh (u)");
    let runs = Runs::of(&model, &IMAGE);
    let cx = MethodContext::default().with_calibration(&runs).with_quantities(vec![Quantity::Size]);
    assert!(Substitute.propose(&model, &cx).unwrap().sites.is_empty());
    assert!(Substitute.extra_taps(&model, &cx).unwrap().is_empty());
}
