//! A tiny tower and a language model of one block: the tokens that are kept are those the method names.

use super::*;
use crate::testing::model;
use lathe_analysis::{Calibrate, EvaluateError, Gram, Moments, Rows};
use lathe_ir::{Node, Tensor, Type};
use std::fmt::Write as _;

const WIDTH: usize = 6;
const VISUAL: usize = 8;

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

/// Three words before eight patches, or so many parts of them, that the tower attends to; `stream` makes `s` of them, `h`.
fn mixed(frames: usize, stream: &str) -> Model {
    let mut constants = String::new();
    let mut matrix = |name: &str, rows: usize, columns: usize, seed: u64| {
        let numbers: Vec<String> = noise(rows * columns, seed).iter().map(|x| format!("{x:e}")).collect();
        let _ = write!(constants, ", float[{rows},{columns}] {name} = {{{}}}", numbers.join(", "));
    };
    matrix("tq", WIDTH, WIDTH, 1);
    matrix("tk", WIDTH, WIDTH, 2);
    matrix("words", 10, WIDTH, 3);
    matrix("wq", WIDTH, WIDTH, 4);
    matrix("wk", WIDTH, WIDTH, 5);
    matrix("wv", WIDTH, WIDTH, 6);
    matrix("wo", WIDTH, WIDTH, 7);
    let (part, all) = (VISUAL / frames, 3 + VISUAL);
    model(&format!(
        "<ir_version: 11, opset_import: [\"\" : 23]>
         g (float[n,{VISUAL},1,{WIDTH}] pixels, int64[n,3] ids) => (float[n,{WIDTH}] y)
         <float[{WIDTH}] g = {{1, 1, 1, 1, 1, 1}}, float[{WIDTH}] b = {{0, 0, 0, 0, 0, 0}},
          int64[4] parts = {{-1, 1, {part}, {WIDTH}}}, int64[3] rows = {{-1, {VISUAL}, {WIDTH}}}, int64[1] one = {{1}},
          float[1,{all},{WIDTH}] table = {{{}}}{constants}> {{
            t = Reshape (pixels, parts)
            q = MatMul (t, tq) k = MatMul (t, tk) kt = Transpose <perm = [0, 1, 3, 2]> (k)
            sc = MatMul (q, kt) p = Softmax <axis = -1> (sc) o = MatMul (p, t) to = Add (t, o)
            v = Reshape (to, rows)
            w = Gather (words, ids)
            h = Concat <axis = 1> (w, v)
            {stream}
            n = LayerNormalization (s, g, b)
            nq = MatMul (n, wq) nk = MatMul (n, wk) nv = MatMul (n, wv)
            a = Attention <q_num_heads = 2, kv_num_heads = 2> (nq, nk, nv)
            c = MatMul (a, wo)
            r = Add (s, c)
            m = ReduceMean <keepdims = 0> (r, one)
            y = Tanh (m)
        }}",
        noise(all * WIDTH, 8).iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ")
    ))
}

/// One sample; every patch twice if `twins`.
fn inputs(twins: bool) -> Vec<(String, Tensor)> {
    let mut pixels = noise(VISUAL * WIDTH, 21);
    for row in (0..VISUAL).filter(|row| twins && row % 2 == 1) {
        pixels.copy_within((row - 1) * WIDTH..row * WIDTH, row * WIDTH);
    }
    let pixels = Tensor::from_f32s(&[1, VISUAL, 1, WIDTH], &pixels);
    vec![("pixels".to_owned(), pixels), ("ids".to_owned(), Tensor::from_i64s(&[1, 3], &[4, 0, 7]))]
}

fn run(model: &Model, twins: bool) -> Tensor {
    lathe_testkit::evaluator().run(model, &inputs(twins)).unwrap().remove(0).1
}

/// Rows of a value of three or four axes.
fn rows(model: &Model, value: ValueId) -> Vec<Vec<f32>> {
    let mut model = model.clone();
    let shown = model.graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], "shown");
    model.graph.value_mut(shown).ty = Some(Type::unshaped(DataType::Float));
    model.graph.remove_output(ScopeId::MAIN, 0);
    model.graph.add_output(ScopeId::MAIN, shown);
    let tensor = run(&model, false);
    tensor.to_f32s().unwrap().chunks(*tensor.dims().last().unwrap()).map(<[f32]>::to_vec).collect()
}

struct Runs(Model);

impl Calibrate for Runs {
    fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(None)
    }

    fn moments(&self, _: &Rows) -> Result<Option<Moments>, EvaluateError> {
        Ok(None)
    }

    fn trials(&self, variant: &Model, _: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        Ok(vec![off(&run(&self.0, true), &run(variant, true))])
    }
}

fn off(whole: &Tensor, found: &Tensor) -> f64 {
    let (a, b) = (whole.to_f64s().unwrap(), found.to_f64s().unwrap());
    a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.iter().map(|a| a * a).sum::<f64>()
}

fn propose(model: &Model, settings: &[(&str, &str)]) -> Proposal {
    let runs = Runs(model.clone());
    let settings = settings.iter().map(|(k, v)| (format!("select-visual-tokens.{k}"), (*v).to_owned())).collect();
    let cx = Context { calibration: Some(&runs), measures: vec![Measure::Flops], settings, ..Context::default() };
    SelectVisualTokens.propose(model, &cx).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Positions in one part as the method says: by score, then each as far as can be from those before it.
fn chosen(x: &[Vec<f32>], score: &[f32], counts: emit::Counts, form: Form) -> Vec<usize> {
    let cosine = |i: usize, j: usize| dot(&x[i], &x[j]) / (dot(&x[i], &x[i]) * dot(&x[j], &x[j])).sqrt();
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&i, &j| score[j].total_cmp(&score[i]));
    let mut all = order[..counts.key + counts.task].to_vec();
    let mut measured = all[..counts.key].to_vec();
    for _ in 0..counts.spread {
        let weight = |i: usize| if form == Form::Spread { score[i] } else { 1.0 };
        let far = |i: usize| measured.iter().map(|&j| (1.0 - cosine(i, j)) * weight(i)).fold(f32::INFINITY, f32::min);
        let next = (0..x.len()).filter(|i| !all.contains(i)).max_by(|&i, &j| far(i).total_cmp(&far(j))).unwrap();
        all.push(next);
        measured.push(next);
    }
    all.sort_unstable();
    all
}

#[test]
fn the_tokens_that_stay_are_those_the_method_names() {
    for frames in [1, 2] {
        let model = mixed(frames, "s = Identity (h)");
        let value = |name: &str| model.graph.find_value(name).unwrap();
        let (h, looks) = (rows(&model, value("h")), rows(&model, value("p")));
        let part = VISUAL / frames;
        let keep = 4 / frames;
        for form in [Form::Score, Form::Spread] {
            let asked = Asked { span: Span::At(3, VISUAL), keep: None, frames, key: Some(1), task: 0.4 };
            let counts = asked.counts(form, keep);
            let mut expected: Vec<usize> = vec![0, 1, 2];
            for frame in 0..frames {
                let own = |at: usize| &looks[(frame * part + at) % looks.len()];
                let score: Vec<f32> = (0..part).map(|j| (0..part).map(|i| own(i)[j]).sum()).collect();
                let first = 3 + frame * part;
                expected.extend(chosen(&h[first..first + part], &score, counts, form).iter().map(|i| first + i));
            }
            let mut changed = model.clone();
            let place = place(&model, &asked.span, frames).unwrap();
            emit(&mut changed, &place, &counts, form, Rest::Gone);
            changed.check().unwrap();
            let norm = changed.graph.producer(changed.graph.find_value("n").unwrap()).unwrap();
            let found = rows(&changed, changed.graph.node(norm).input(0).unwrap());
            let wanted: Vec<Vec<f32>> = expected.iter().map(|&i| h[i].clone()).collect();
            assert_eq!(found, wanted, "{frames} frames, {form:?}: {expected:?}");
        }
    }
}

#[test]
fn tokens_that_are_there_twice_go_without_loss_if_they_are_counted() {
    for (stream, span) in [("s = Identity (h)", "3:8"), ("s = Add (h, table)", "v")] {
        let model = mixed(1, stream);
        // Positions tell twins apart.
        let positions = stream.contains("table");
        let found = propose(&model, &[("span", span), ("keep", "4"), ("key", "1"), ("task", "0")]);
        let [site] = found.sites.as_slice() else { panic!("{:?}", found.outcome) };
        let names: Vec<&str> = site.choices.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "4 of 8 visual tokens",
                "4 of 8 visual tokens, others counted",
                "4 of 8 visual tokens spread out, others counted"
            ]
        );
        let lost: Vec<f64> = site.choices.iter().map(|c| c.measured.unwrap()).collect();
        assert!(lost[0] > 1e-4, "{lost:?}");
        assert_eq!(lost[1..].iter().all(|&l| l < 1e-10), !positions, "{lost:?}");
        assert!(site.choices.iter().all(|c| c.spent.flops_per_row < site.kept.flops_per_row));
        let settings = [("span", span), ("keep", "4"), ("key", "1"), ("task", "0")];
        let settings = settings.iter().map(|(k, v)| (format!("select-visual-tokens.{k}"), (*v).to_owned())).collect();
        let cx = Context { settings, ..Context::default() };
        let mut changed = model.clone();
        assert_eq!(SelectVisualTokens.rewrite(&mut changed, site, 1, &cx).unwrap().changes.len(), 1);
        changed.check().unwrap();
        assert!((off(&run(&model, true), &run(&changed, true)) - lost[1]).abs() < 1e-12);
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let said = |model: &Model, settings: &[(&str, &str)]| {
        let found = propose(model, settings);
        assert!(found.sites.is_empty());
        found.outcome.refusals.into_keys().next().unwrap_or_default()
    };
    let model = mixed(1, "s = Identity (h)");
    assert!(said(&model, &[]).starts_with("which tokens are visual is not told"));
    assert_eq!(said(&model, &[("span", "nowhere")]), "there is no value of the name that the span gives");
    assert_eq!(
        said(&model, &[("span", "3:8"), ("frames", "3")]),
        "the visual tokens do not divide into so many frames"
    );
    assert_eq!(said(&model, &[("span", "2:5")]), "no attention over the visual tokens can be read");
    let none = "no attention over a fixed number of tokens, these among them, was found";
    assert_eq!(said(&model, &[("span", "3:9")]), none);
    // A position inside the block stays where it is, whoever comes there.
    let source = lathe_ir::text::print_full(&mixed(1, "s = Identity (h)"));
    let inside = source.replace("nq = MatMul (n, wq)", "np = Mul (n, table) nq = MatMul (np, wq)");
    let reason = "a constant has a number per token, as tables of relative positions do";
    assert_eq!(said(&crate::testing::model(&inside), &[("span", "3:8")]), reason);
    assert!("3:0".parse::<Span>().is_err() && "".parse() == Ok(Span::None));
}
