//! Merging in small transformers.

use super::{
    ReduceTokens, Schedule, Work,
    emit::{Form, emit, most},
    label, name,
    place::{Chain, TokenOptions, chains},
    reduce,
};
use crate::{
    Pass as _,
    exact::DropDead,
    lossy::{Candidate, Cost, Edit, Loss, Method as _, MethodContext, NestedCost, Site, prune_units::PruneUnits},
};
use lathe_analysis::{Bindings, Calibrate, Cost as ModelCost, EvaluateError, Facts, Gram, Moments, Rows};
use lathe_ir::{Initializer, Model, Tensor, text};
use std::fmt::Write as _;

const TOKEN_OPTIONS: TokenOptions = TokenOptions { restore: true, protected: None };

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

/// How blocks are written.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    Spelled,
    Packed,
    Standard,
    Flat,
}

const WIDTH: usize = 8;

/// Pre-norm blocks over tokens `t` with two heads of size 4; the last stream is `s`.
fn blocks(count: usize, style: Style, constants: &mut String) -> String {
    let mut constant = |name: String, dims: &[usize], seed: usize| {
        let numbers = noise(dims.iter().product(), seed as u64 + 7);
        let numbers: Vec<String> = numbers.iter().map(|x| format!("{:e}", x * 0.7)).collect();
        let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
        let _ = write!(constants, ", float[{}] {name} = {{{}}}", dims.join(","), numbers.join(", "));
    };
    let mut body = String::from("s0 = Identity (t) ");
    for i in 0..count {
        constant(format!("qkv{i}"), &[WIDTH, 3 * WIDTH], 10 * i);
        constant(format!("bias{i}"), &[3 * WIDTH], 10 * i + 1);
        constant(format!("up{i}"), &[WIDTH, 16], 10 * i + 2);
        constant(format!("down{i}"), &[16, WIDTH], 10 * i + 3);
        let _ = write!(body, "n{i} = LayerNormalization (s{i}, g, b) ");
        if style == Style::Packed {
            let _ = write!(body, "a{i} = com.microsoft.Attention <num_heads = 2> (n{i}, qkv{i}, bias{i}) ");
        } else {
            let _ = write!(body, "p{i} = MatMul (n{i}, qkv{i}) pb{i} = Add (p{i}, bias{i}) ");
            let _ = write!(body, "q{i}, k{i}, v{i} = Split <axis = 2, num_outputs = 3> (pb{i}) ");
        }
        match style {
            Style::Packed => {}
            Style::Standard => {
                let _ = write!(body, "a{i} = Attention <q_num_heads = 2, kv_num_heads = 2> (q{i}, k{i}, v{i}) ");
            }
            Style::Flat => {
                let _ = write!(body, "a{i} = com.microsoft.MultiHeadAttention <num_heads = 2> (q{i}, k{i}, v{i}) ");
            }
            Style::Spelled => {
                for (name, perm) in [("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")] {
                    let _ = write!(
                        body,
                        "{name}h{i} = Reshape ({name}{i}, heads) {name}t{i} = Transpose <perm = [{perm}]> ({name}h{i}) "
                    );
                }
                let _ = write!(
                    body,
                    "sc{i} = MatMul (qt{i}, kt{i}) sm{i} = Softmax <axis = -1> (sc{i}) o{i} = MatMul (sm{i}, vt{i})
                     ot{i} = Transpose <perm = [0, 2, 1, 3]> (o{i}) a{i} = Reshape (ot{i}, flat) "
                );
            }
        }
        let next = i + 1;
        let _ = write!(
            body,
            "h{i} = Add (s{i}, a{i}) m{i} = LayerNormalization (h{i}, g, b) u{i} = MatMul (m{i}, up{i})
             r{i} = Relu (u{i}) d{i} = MatMul (r{i}, down{i}) s{next} = Add (h{i}, d{i}) "
        );
    }
    let _ = write!(body, "s = LayerNormalization (s{count}, g, b) ");
    body
}

/// `head` reads `s` and gives `y`; `front` reads `x` and gives `t`, `tokens` rows.
fn transformer(style: Style, tokens: usize, input: &str, front: &str, output: &str, head: &str) -> Model {
    transformer_of(2, style, tokens, input, front, output, head)
}

fn transformer_of(
    depth: usize,
    style: Style,
    tokens: usize,
    input: &str,
    front: &str,
    output: &str,
    head: &str,
) -> Model {
    let list = |n: usize, value: &str| vec![value; n].join(", ");
    let mut constants = format!(
        "float[{WIDTH}] g = {{{}}}, float[{WIDTH}] b = {{{}}}, int64[4] heads = {{0, {tokens}, 2, 4}}, \
         int64[3] flat = {{0, {tokens}, {WIDTH}}}, int64 zero = {{0}}, int64[1] one = {{1}}, \
         int64[1] end = {{9223372036854775807}}, int64[4] grid = {{0, 8, 3, 3}}, int64[9] twice = {{0, 1, 1, 2, 2, 3, 3, 4, 4}}, int64[9] first = {{0, 1, 1, 1, 1, 1, 1, 1, 1}}, int64[9] same = {{1, 1, 1, 1, 1, 1, 1, 1, 1}}",
        list(WIDTH, "1"),
        list(WIDTH, "0.1"),
    );
    let body = blocks(depth, style, &mut constants);
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 23, \"com.microsoft\" : 1]> g (float[{input}] x) => (float[{output}] y) \
         <{constants}> {{ {front} {body} {head} }}"
    );
    let model = text::parse(&source).unwrap_or_else(|error| panic!("{error}\n{source}"));
    model.check().unwrap();
    model
}

const PICK: &str = "y = Gather <axis = 1> (s, zero)";

/// Nine tokens: the first, and four pairs of equal ones, at the positions that may merge.
fn twins(style: Style, output: &str, head: &str) -> Model {
    transformer(style, 9, "batch, 5, 8", "t = Gather <axis = 1> (x, twice)", output, head)
}

fn only(model: &Model) -> Chain {
    let mut found = chains(model, TOKEN_OPTIONS);
    assert_eq!(found.len(), 1);
    found.pop().unwrap().unwrap()
}

fn reduced(model: &Model, counts: &[usize]) -> Model {
    reduced_by(model, counts, Form::Merge)
}

fn reduced_by(model: &Model, counts: &[usize], form: Form) -> Model {
    let mut changed = model.clone();
    assert!(reduce(&mut changed, TOKEN_OPTIONS, &name(model, &only(model)), counts, form));
    changed.check().unwrap_or_else(|error| panic!("{error}\n{}", text::print(&changed)));
    changed
}

fn assert_equivalent(model: &Model, changed: &Model) {
    lathe_testkit::equivalent(model, changed, Some(1e-4), 1)
        .unwrap_or_else(|why| panic!("{why}\n{}", text::print(changed)));
}

#[test]
fn equal_tokens_merge_without_loss() {
    for style in [Style::Spelled, Style::Standard, Style::Packed, Style::Flat] {
        let model = twins(style, "batch, 8", PICK);
        assert_eq!(only(&model).protected, 1);
        for counts in [[4, 0], [3, 0], [0, 4], [2, 0]] {
            assert_equivalent(&model, &reduced(&model, &counts));
        }
        // Merging what differs, before an attention that sees it, is no longer the same.
        let model = transformer(style, 9, "batch, 9, 8", "t = Identity (x)", "batch, 8", PICK);
        let far = reduced(&model, &[4, 0]);
        assert!(lathe_testkit::equivalent(&model, &far, Some(1e-4), 1).is_err());
    }
}

#[test]
fn averages_count_tokens_as_often_as_they_stand_for() {
    let pooled = twins(Style::Spelled, "batch, 8", "y = ReduceMean <keepdims = 0> (s, one)");
    assert_eq!(only(&pooled).protected, 0);
    // Without a protected token pairs are at positions 1 and 2, 3 and 4, and so on: odd and even.
    assert_equivalent(&pooled, &reduced(&pooled, &[4, 0]));
    let rest = "rest = Slice (s, one, end, one) y = ReduceMean <keepdims = 0> (rest, one)";
    let rest = twins(Style::Spelled, "batch, 8", rest);
    assert_eq!(only(&rest).protected, 1);
    assert_equivalent(&rest, &reduced(&rest, &[3, 0]));
}

#[test]
fn dense_heads_get_every_token_back() {
    let dense = twins(Style::Spelled, "batch, 9, 8", "y = Relu (s)");
    assert_equivalent(&dense, &reduced(&dense, &[4, 0]));
    assert_equivalent(&dense, &reduced(&dense, &[0, 4]));
    let grid = twins(Style::Packed, "batch, 8, 3, 3", "c = Transpose <perm = [0, 2, 1]> (s) y = Reshape (c, grid)");
    assert_equivalent(&grid, &reduced(&grid, &[2, 0]));
    let none = chains(&dense, TokenOptions { restore: false, protected: None }).pop().unwrap();
    assert_eq!(none.err().unwrap().1, "an output of the model has a row per token");
}

#[test]
fn tokens_merge_inside_a_sum_that_is_fused_with_its_normalization() {
    let model = twins(Style::Packed, "batch, 8", PICK);
    let source = text::print_full(&model);
    let source = source.replace("h0 = Add (s0, a0)", "").replace(
        "m0 = LayerNormalization (h0, g, b)",
        "m0, mean_0, deviation_0, h0 = com.microsoft.SkipLayerNormalization <epsilon = 1e-05> (s0, a0, g, b)",
    );
    let fused = text::parse(&source).unwrap();
    assert_equivalent(&model, &fused);
    for counts in [[4, 0], [0, 4], [2, 2]] {
        assert_equivalent(&model, &reduced(&fused, &counts));
    }
}

/// One merge by loops over numbers: ToMe's bipartite soft matching, with the first token protected.
fn merge(rows: &[Vec<f32>], keys: &[Vec<f32>], r: usize) -> Vec<Vec<f32>> {
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let count = rows.len();
    let (even, odd): (Vec<usize>, Vec<usize>) = ((2..count).step_by(2).collect(), (1..count).step_by(2).collect());
    let best = |&a: &usize| {
        let scores = odd.iter().map(|&b| cosine(&keys[a], &keys[b]));
        scores.enumerate().max_by(|x, y| x.1.total_cmp(&y.1)).map(|(at, score)| (a, at, score)).unwrap()
    };
    let mut edges: Vec<(usize, usize, f64)> = even.iter().map(best).collect();
    edges.sort_by(|x, y| y.2.total_cmp(&x.2));
    let mut sums: Vec<(Vec<f32>, f32)> = odd.iter().map(|&b| (rows[b].clone(), 1.0)).collect();
    for &(a, to, _) in &edges[..r] {
        sums[to].0.iter_mut().zip(&rows[a]).for_each(|(sum, x)| *sum += x);
        sums[to].1 += 1.0;
    }
    let mut stay: Vec<usize> = edges[r..].iter().map(|e| e.0).collect();
    stay.sort_unstable();
    let merged = sums.into_iter().map(|(sum, size)| sum.iter().map(|x| x / size).collect());
    [0].into_iter().chain(stay).map(|at| rows[at].clone()).chain(merged).collect()
}

#[test]
fn tokens_merge_as_the_method_says() {
    // Keys are the tokens themselves, with one head's worth of features twice.
    let source = "<ir_version: 10, opset_import: [\"\" : 20]> g (float[1, 9, 4] x) => (float[1, 4] y) \
        <int64[4] heads = {0, 9, 1, 4}, int64[3] flat = {0, 9, 4}, int64 zero = {0}, float tiny = {0.0}> { \
        h = Reshape (x, heads) q = Transpose <perm = [0, 2, 1, 3]> (h) k = Transpose <perm = [0, 2, 3, 1]> (h) \
        sc = MatMul (q, k) p = Softmax <axis = -1> (sc) o = MatMul (p, q) ot = Transpose <perm = [0, 2, 1, 3]> (o) \
        a = Reshape (ot, flat) small = Mul (a, tiny) s = Add (x, small) seen = Relu (s) y = Gather <axis = 1> (seen, zero) }";
    let mut model = text::parse(source).unwrap();
    let chain = only(&model);
    let stream = chain.cuts[0].stream;
    emit(&mut model, &chain, &[3], Form::Merge);
    let graph = &mut model.graph;
    let left = graph.find_value("seen").unwrap();
    let merged = graph.node(graph.producer(left).unwrap()).input(0).unwrap();
    assert_ne!(merged, stream);
    graph.value_mut(merged).ty = Some(lathe_ir::Type::unshaped(lathe_ir::DataType::Float));
    graph.add_output(lathe_ir::ScopeId::MAIN, merged);
    let numbers = noise(36, 3);
    let input = Tensor::from_f32s(&[1, 9, 4], &numbers);
    let name = model.graph.value(merged).name.clone();
    let outputs = run(&model, input);
    let found = &outputs[1].1;
    assert_eq!(found.dims(), [1, 6, 4], "{name}");
    let rows: Vec<Vec<f32>> = numbers.chunks(4).map(<[f32]>::to_vec).collect();
    let expected: Vec<f32> = merge(&rows, &rows, 3).concat();
    for (a, b) in found.to_f32s().unwrap().iter().zip(&expected) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
}

fn run(model: &Model, input: Tensor) -> Vec<(String, Tensor)> {
    let name = model.graph.value(model.graph.main().inputs()[0]).name.clone();
    lathe_testkit::evaluator().run(model, &[(name, input)]).unwrap()
}

#[test]
fn at_most_half_of_the_tokens_can_merge() {
    assert_eq!([most(9, 1), most(9, 0), most(8, 1), most(4, 2)], [4, 5, 3, 1]);
}

#[test]
fn labels_count_the_tokens_that_are_left_and_what_does_not_fit_is_not_carried_out() {
    let label = label(197, &[0, 24, 0, 86], Form::Merge);
    assert_eq!(label, "197 tokens to 197, 173, 173, 87");
    let model = twins(Style::Spelled, "batch, 8", PICK);
    let chain = super::name(&model, &only(&model));
    for wrong in [&[5, 0][..], &[1][..], &[4, 3][..]] {
        assert!(!reduce(&mut model.clone(), TOKEN_OPTIONS, &chain, wrong, Form::Merge), "{wrong:?}");
    }
}

#[test]
fn equal_tokens_mix_without_loss() {
    // A small temperature sends each token to those that are equal to it; some twin of each must stay.
    let equal = "t = Gather <axis = 1> (x, first)";
    let model = transformer(Style::Spelled, 9, "batch, 5, 8", equal, "batch, 8", PICK);
    assert_equivalent(&model, &reduced_by(&model, &[5, 0], Form::Mix(0.01)));
    assert_equivalent(&model, &reduced_by(&model, &[2, 3], Form::Mix(0.01)));
    let all = "t = Gather <axis = 1> (x, same)";
    let dense = transformer(Style::Spelled, 9, "batch, 5, 8", all, "batch, 9, 8", "y = Relu (s)");
    assert_equivalent(&dense, &reduced_by(&dense, &[4, 2], Form::Mix(0.01)));
    let twins = twins(Style::Spelled, "batch, 8", PICK);
    let far = reduced_by(&twins, &[6, 0], Form::Mix(0.1));
    assert!(lathe_testkit::equivalent(&twins, &far, Some(1e-4), 1).is_err());
}

#[test]
fn what_is_written_is_of_operator_set_17() {
    let older = |mut model: Model| {
        model.opsets.iter_mut().filter(|(domain, _)| domain.is_empty()).for_each(|(_, version)| *version = 17);
        let split: Vec<_> =
            model.graph.all_nodes().into_iter().filter(|&id| model.graph.node(id).is("Split")).collect();
        split.into_iter().for_each(|id| model.graph.node_mut(id).remove_attribute("num_outputs"));
        model
    };
    for style in [Style::Spelled, Style::Packed, Style::Flat] {
        let old = older(twins(style, "batch, 8", PICK));
        assert_equivalent(&old, &reduced_by(&old, &[4, 0], Form::Merge));
    }
    let equal = "t = Gather <axis = 1> (x, first)";
    let old = older(transformer(Style::Spelled, 9, "batch, 5, 8", equal, "batch, 8", PICK));
    assert_equivalent(&old, &reduced_by(&old, &[5, 0], Form::Mix(0.01)));
}

#[test]
fn windows_are_refused_with_the_reason() {
    let list = |n: usize| vec!["0.5"; n].join(", ");
    let source = format!(
        "<ir_version: 10, opset_import: [\"\" : 20, \"com.microsoft\" : 1]> g (float[batch, 16, 8] x) => (float[batch, 8] y) \
         <float[8] g = {{{}}}, float[8] b = {{{}}}, float[8, 24] qkv = {{{}}}, float[24] bias = {{{}}}, \
         int64[3] windows = {{-1, 4, 8}}, int64[3] whole = {{-1, 16, 8}}, int64[1] one = {{1}}> {{ \
         n = LayerNormalization (x, g, b) inside = Reshape (n, windows) \
         a = com.microsoft.Attention <num_heads = 2> (inside, qkv, bias) back = Reshape (a, whole) \
         s = Add (x, back) y = ReduceMean <keepdims = 0> (s, one) }}",
        list(8),
        list(8),
        list(8 * 24),
        list(24)
    );
    let model = text::parse(&source).unwrap();
    let refused = chains(&model, TOKEN_OPTIONS).pop().unwrap().err().unwrap();
    let reason = "the tokens are divided into windows or a grid, or joined with another axis";
    assert_eq!(refused, ("`x`".to_owned(), reason));
}

#[test]
fn what_is_left_is_counted_in_full() {
    for style in [Style::Spelled, Style::Packed, Style::Flat] {
        let model = twins(style, "batch, 8", PICK);
        for (form, counts) in [(Form::Merge, [4, 2]), (Form::Mix(0.1), [4, 2])] {
            if style != Style::Spelled && form != Form::Merge {
                continue;
            }
            let changed = reduced_by(&model, &counts, form);
            let cost = |model: &Model| ModelCost::of(model, &Facts::infer(model), &Bindings::default());
            let (before, after) = (cost(&model), cost(&changed));
            let known =
                |cost: &ModelCost| cost.uncounted.iter().map(|(op, count)| format!("{op} {count}")).collect::<Vec<_>>();
            assert_eq!(known(&before), known(&after));
            let shapes = Facts::infer(&changed);
            let unknown: Vec<String> = changed
                .graph
                .nodes(lathe_ir::ScopeId::MAIN)
                .flat_map(|id| changed.graph.node(id).outputs().to_vec())
                .flatten()
                .filter(|v| shapes.shape(*v).is_none_or(|s| s.iter().skip(1).any(|d| d.as_known().is_none())))
                .map(|v| changed.graph.value(v).name.clone())
                .collect();
            assert_eq!(unknown, [] as [String; 0]);
        }
    }
}

/// Runs models beside one on a sample.
struct Runs {
    model: Model,
    sample: Tensor,
}

impl Calibrate for Runs {
    fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(None)
    }

    fn moments(&self, _: &Rows) -> Result<Option<Moments>, EvaluateError> {
        Ok(None)
    }

    fn trials(&self, variant: &Model, gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        let before = run(&self.model, self.sample.clone()).remove(0).1.to_f32s().unwrap();
        let loss = |gates: &Vec<(String, f32)>| {
            let numbers = gates.iter().map(|(name, x)| (name.clone(), Tensor::from_f32s(&[], &[*x])));
            let inputs: Vec<(String, Tensor)> =
                [("x".to_owned(), self.sample.clone())].into_iter().chain(numbers).collect();
            let after = lathe_testkit::evaluator().run(variant, &inputs).unwrap().remove(0).1.to_f32s().unwrap();
            let square = |x: f32| f64::from(x).powi(2);
            let far: f64 = before.iter().zip(&after).map(|(a, b)| square(a - b)).sum();
            far / before.iter().map(|x| square(*x)).sum::<f64>()
        };
        Ok(gates.iter().map(loss).collect())
    }
}

/// Four blocks over [`twins`], of which the second attention and the third feed-forward unit add nothing.
fn idle(style: Style) -> Model {
    let front = "t = Gather <axis = 1> (x, twice)";
    let mut model = transformer_of(4, style, 9, "batch, 5, 8", front, "batch, 8", PICK);
    let values = |index: usize| index % (3 * WIDTH) >= 2 * WIDTH;
    for (name, keep) in [("qkv1", false), ("bias1", false), ("down2", true)] {
        let value = model.graph.find_value(name).unwrap();
        let tensor = model.graph.constant(value).unwrap();
        let (dims, numbers) = (tensor.dims().to_vec(), tensor.to_f32s().unwrap());
        let left = numbers.iter().enumerate().map(|(at, x)| if keep || values(at) { 0.0 } else { *x });
        let left: Vec<f32> = left.collect();
        model.graph.set_initializer(value, Initializer::Dense(Tensor::from_f32s(&dims, &left)));
    }
    DropDead.apply(&mut model, &crate::PassContext::default()).unwrap();
    model
}

/// Units that could be left out, those that are missed least first; the last place holds as many as can go.
fn units(model: &Model, cx: &MethodContext) -> Vec<Site> {
    PruneUnits.propose(model, cx).unwrap().sites
}

/// A place with one schedule.
fn schedule(model: &Model, counts: &[usize], form: Form) -> Site {
    let (chain, work) = (only(model), Work::of(model));
    let (nodes, footprint) = (chain.nodes(&model.graph), chain.footprint(&model.graph));
    let baseline = work.cost(model, &nodes);
    let candidate = Candidate {
        label: label(chain.tokens.count, counts, form),
        cost: work.left(&baseline, &reduced_by(model, counts, form)),
        loss: Loss::Measured(0.0),
        edit: Edit::new(Schedule { counts: counts.to_vec(), form }),
    };
    let candidates = vec![candidate];
    let (name, taps) = (name(model, &chain), chain.ends(&model.graph));
    Site { weight: None, footprint, nodes, name, taps, baseline, candidates, required: false, isolatable: false }
}

/// Both carried out, fewer tokens first, and what the units take among them.
fn both(model: &Model, tokens: &Site, units: &Site, cx: &MethodContext) -> (Model, NestedCost) {
    let effect = ReduceTokens.effect_on_nested(model, tokens, &tokens.candidates[0], cx).unwrap().unwrap();
    let nested = PruneUnits.cost_under(units, &effect, cx).unwrap().unwrap();
    let mut joint = model.clone();
    for done in [
        ReduceTokens.apply(&mut joint, tokens, &tokens.candidates[0], cx),
        PruneUnits.apply(&mut joint, units, &units.candidates[0], cx),
    ] {
        assert_eq!(done.unwrap().changes.len(), 1);
    }
    DropDead.apply(&mut joint, &cx.pass_context()).unwrap();
    joint.check().unwrap_or_else(|error| panic!("{error}\n{}", text::print(&joint)));
    (joint, nested)
}

fn context(calibration: &Runs) -> MethodContext<'_> {
    let settings = [("prune-units.patch", "none"), ("reduce-tokens.temperature", "0.01")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    MethodContext::default().with_calibration(calibration).with_settings(settings)
}

fn runs(model: &Model) -> Runs {
    Runs { model: model.clone(), sample: Tensor::from_f32s(&[1, 5, 8], &noise(40, 5)) }
}

#[test]
fn fewer_tokens_and_units_that_go_add_up_in_one_plan() {
    for style in [Style::Spelled, Style::Standard, Style::Packed, Style::Flat] {
        let model = idle(style);
        let calibration = runs(&model);
        let cx = context(&calibration);
        let found = units(&model, &cx);
        let both_idle = found.iter().find(|site| site.taps.len() == 2).unwrap();
        assert!(both_idle.candidates[0].loss.measured().unwrap() < 1e-10, "{}", both_idle.name);
        // Merging before, in and after the attention that goes.
        for counts in [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 2, 0, 0]] {
            let tokens = schedule(&model, &counts, Form::Merge);
            let (joint, nested) = both(&model, &tokens, both_idle, &cx);
            assert_equivalent(&model, &joint);
            let cost = |model: &Model| ModelCost::of(model, &Facts::infer(model), &Bindings::default());
            let (before, after, left) = (cost(&model), cost(&joint), nested.candidates[0].unwrap());
            let schedule = tokens.candidates[0].cost;
            let stated = |of: &dyn Fn(&Cost) -> u64, whole: u64| {
                whole - of(&tokens.baseline) + of(&schedule) - of(&nested.baseline) + of(&left)
            };
            assert_eq!(stated(&|s| s.flops_per_row, before.flops), after.flops, "{counts:?}");
            assert_eq!(stated(&|s| s.parameters, before.parameters), after.parameters, "{counts:?}");
            let added = cost(&reduced(&model, &counts)).nodes - before.nodes;
            let bytes = stated(&|s| s.bytes, before.weight_bytes) - super::OVERHEAD * added as u64;
            assert_eq!(bytes, after.weight_bytes, "{counts:?}");
            // The keys of an attention that goes stay where tokens merge by them.
            assert_eq!(left.flops_per_row > 0, counts[1] > 0, "{counts:?}");
            let alone = both_idle.baseline.flops_per_row;
            assert!(nested.baseline.flops_per_row < alone, "{counts:?}: {} of {alone}", nested.baseline.flops_per_row);
        }
    }
}

#[test]
fn units_go_after_tokens_as_they_would_before() {
    let model = transformer_of(4, Style::Spelled, 9, "batch, 9, 8", "t = Identity (x)", "batch, 8", PICK);
    let calibration = Runs { model: model.clone(), sample: Tensor::from_f32s(&[1, 9, 8], &noise(72, 5)) };
    let cx = context(&calibration);
    for units in units(&model, &cx) {
        let tokens = schedule(&model, &[4, 0, 0, 0], Form::Merge);
        let (joint, _) = both(&model, &tokens, &units, &cx);
        let mut first = model.clone();
        PruneUnits.apply(&mut first, &units, &units.candidates[0], &cx).unwrap();
        // An attention that goes has no place for a schedule.
        let mut counts = vec![0; only(&first).cuts.len()];
        counts[0] = 4;
        assert_equivalent(&reduced(&first, &counts), &joint);
    }
}

#[test]
fn weights_that_tokens_mix_by_stay_when_their_attention_goes() {
    let model = idle(Style::Spelled);
    let calibration = runs(&model);
    let cx = context(&calibration);
    let found = units(&model, &cx);
    let idle = found.iter().find(|site| site.taps.len() == 2).unwrap();
    // Only the keys of the second attention are needed to merge there, and its queries too to mix there.
    let left = |form: Form| {
        let tokens = schedule(&model, &[0, 2, 0, 0], form);
        let (joint, nested) = both(&model, &tokens, idle, &cx);
        let alone = reduced_by(&model, &[0, 2, 0, 0], form);
        assert_equivalent(&alone, &joint);
        nested.candidates[0].unwrap().flops_per_row
    };
    assert!(left(Form::Mix(0.01)) > left(Form::Merge));
}

#[test]
fn a_bias_of_a_fused_sum_goes_with_its_unit() {
    let source = text::print_full(&idle(Style::Packed));
    let fused = source.replace("h1 = Add (s1, a1)", "").replace(
        "m1 = LayerNormalization (h1, g, b)",
        "m1, \"\", \"\", h1 = com.microsoft.SkipLayerNormalization <epsilon = 1e-05> (s1, a1, g, b, b)",
    );
    assert_ne!(fused, source);
    let model = text::parse(&fused).unwrap();
    let calibration = runs(&model);
    let cx = context(&calibration);
    let attention =
        units(&model, &cx).into_iter().find(|site| site.name.contains("a1") || site.taps.len() == 2).unwrap();
    let mut without = model.clone();
    PruneUnits.apply(&mut without, &attention, &attention.candidates[0], &cx).unwrap();
    let tokens = schedule(&model, &[0, 4, 0, 0], Form::Merge);
    assert_equivalent(&without, &both(&model, &tokens, &attention, &cx).0);
}
