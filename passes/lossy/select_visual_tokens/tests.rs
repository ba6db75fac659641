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
    let settings = settings
        .iter()
        .map(|(k, v)| (format!("select-visual-tokens.{k}"), (*v).to_owned()))
        .collect::<crate::Settings>();
    let cx =
        MethodContext::default().with_calibration(&runs).with_quantities(vec![Quantity::Flops]).with_settings(settings);
    SelectVisualTokens.propose(model, &cx).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Positions in one part as the method says: by score, then each as far as can be from those before it.
fn chosen(x: &[Vec<f32>], score: &[f32], counts: Counts, form: Form) -> Vec<usize> {
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
            let requested =
                Requested { span: Span::At(3, VISUAL), keep: None, frames, segment: None, key: Some(1), task: 0.4 };
            let counts = requested.counts(form, keep);
            let mut expected: Vec<usize> = vec![0, 1, 2];
            for frame in 0..frames {
                let own = |at: usize| &looks[(frame * part + at) % looks.len()];
                let score: Vec<f32> = (0..part).map(|j| (0..part).map(|i| own(i)[j]).sum()).collect();
                let first = 3 + frame * part;
                expected.extend(chosen(&h[first..first + part], &score, counts, form).iter().map(|i| first + i));
            }
            let mut changed = model.clone();
            let place = place(&model, &requested.span, frames).unwrap();
            emit(&mut changed, &place, &counts, form, Rest::Gone, 1);
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
        let names: Vec<&str> = site.candidates.iter().map(|c| c.label.as_str()).collect();
        assert_eq!(
            names,
            [
                "4 of 8 visual tokens",
                "4 of 8 visual tokens, others counted",
                "4 of 8 visual tokens spread out, others counted"
            ]
        );
        let lost: Vec<f64> = site.candidates.iter().map(|c| c.loss.measured().unwrap()).collect();
        assert!(lost[0] > 1e-4, "{lost:?}");
        assert_eq!(lost[1..].iter().all(|&l| l < 1e-10), !positions, "{lost:?}");
        assert!(site.candidates.iter().all(|c| c.cost.flops_per_row < site.baseline.flops_per_row));
        let settings = [("span", span), ("keep", "4"), ("key", "1"), ("task", "0")];
        let settings = settings
            .iter()
            .map(|(k, v)| (format!("select-visual-tokens.{k}"), (*v).to_owned()))
            .collect::<crate::Settings>();
        let cx = MethodContext::default().with_settings(settings);
        let mut changed = model.clone();
        assert_eq!(SelectVisualTokens.apply(&mut changed, site, &site.candidates[1], &cx).unwrap().changes.len(), 1);
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

/// The trees of one segment by their definition: what stays of every frame, as a mean, and how many tokens it stands for.
fn trees(x: &[Vec<Vec<f64>>], score: &[Vec<f64>], counts: Counts) -> Vec<Vec<(Vec<f64>, f64)>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let unit = |a: &[f64]| a.iter().map(|x| x / dot(a, a).sqrt()).collect::<Vec<f64>>();
    let (frames, part) = (x.len(), x[0].len());
    let u: Vec<Vec<Vec<f64>>> = x.iter().map(|frame| frame.iter().map(|row| unit(row)).collect()).collect();
    let mean = |frame: &[Vec<f64>]| -> Vec<f64> {
        (0..frame[0].len()).map(|i| frame.iter().map(|row| row[i]).sum::<f64>() / part as f64).collect()
    };
    let means: Vec<Vec<f64>> = x.iter().map(|frame| unit(&mean(frame))).collect();
    let relevance = |row: &[f64]| (means.iter().map(|m| dot(row, m)).sum::<f64>() / frames as f64).max(1e-3);
    let weight: Vec<Vec<f64>> =
        (0..frames).map(|f| (0..part).map(|j| score[f][j] * relevance(&u[f][j])).collect()).collect();
    let best = |of: Vec<usize>, by: &dyn Fn(usize) -> f64| of.into_iter().max_by(|&a, &b| by(a).total_cmp(&by(b)));
    let mut apart = vec![Vec::new(); frames];
    for f in 0..frames {
        apart[f].push(best((0..part).collect(), &|j| weight[f][j]).unwrap());
        for _ in 0..counts.spread {
            let own = apart[f].clone();
            let far =
                |j: usize| own.iter().map(|&i| (1.0 - dot(&u[f][i], &u[f][j])) * weight[f][j]).fold(f64::MAX, f64::min);
            apart[f].push(best((0..part).filter(|j| !own.contains(j)).collect(), &far).unwrap());
        }
    }
    let others = |f: usize| (0..part).filter(|j| !apart[f].contains(j)).collect::<Vec<_>>();
    let parent = |f: usize, j: usize| best(others(f - 1), &|i| dot(&u[f][j], &u[f - 1][i])).unwrap();
    let mut stays = apart.clone();
    for f in 0..frames {
        let mut order = others(f);
        let key = |j: usize| if f == 0 { -weight[0][j] } else { dot(&u[f][j], &u[f - 1][parent(f, j)]) };
        order.sort_by(|&a, &b| key(a).total_cmp(&key(b)));
        stays[f].extend(&order[..counts.merged]);
        stays[f].sort_unstable();
    }
    let mut sums: Vec<Vec<(Vec<f64>, f64)>> =
        x.iter().map(|frame| frame.iter().map(|row| (row.clone(), 1.0)).collect()).collect();
    for f in (0..frames).rev() {
        for j in (0..part).filter(|j| !stays[f].contains(j)) {
            let to = match f {
                0 => best(stays[0].iter().copied().filter(|j| !apart[0].contains(j)).collect(), &|i| {
                    dot(&u[0][j], &u[0][i])
                }),
                _ => Some(parent(f, j)),
            };
            let (row, count) = sums[f][j].clone();
            let into = &mut sums[f.saturating_sub(1)][to.unwrap()];
            into.0.iter_mut().zip(row).for_each(|(a, b)| *a += b);
            into.1 += count;
        }
    }
    let mean = |(row, count): &(Vec<f64>, f64)| (row.iter().map(|x| x / count).collect(), *count);
    (0..frames).map(|f| stays[f].iter().map(|&j| mean(&sums[f][j])).collect()).collect()
}

#[test]
fn frames_are_merged_into_the_means_of_their_trees() {
    let (segments, segment, part, width) = (2, 3, 6, 5);
    let counts = Counts { key: 1, task: 0, spread: 1, merged: 1 };
    for seed in 0..8 {
        let mut model = model(&format!(
            "<ir_version: 11, opset_import: [\"\" : 23]> g (float[n,{part},{width}] x, float[n,{part}] score) => () {{
                u = LpNormalization <axis = -1, p = 2> (x)
            }}"
        ));
        let value = |name: &str| model.graph.find_value(name).unwrap();
        let video = video::Video { x: value("x"), unit: value("u"), score: value("score"), part, segment };
        let w = &mut super::super::reduce_tokens::emit::Writer::new(&mut model.graph, "v".to_owned());
        let (kept, sizes) = video.merged(w, counts);
        for output in [kept, sizes] {
            model.graph.value_mut(output).ty = Some(Type::unshaped(DataType::Float));
            model.graph.add_output(ScopeId::MAIN, output);
        }
        model.check().unwrap();
        let frames = segments * segment;
        // Frames that look alike, so that trees grow over several.
        let base = noise(part * width, 100 + seed);
        let x: Vec<f32> = noise(frames * part * width, seed)
            .iter()
            .enumerate()
            .map(|(i, e)| base[i % base.len()] + 0.3 * e)
            .collect();
        let score: Vec<f32> = noise(frames * part, 50 + seed).iter().map(|s| s.abs() + 0.1).collect();
        let inputs = vec![
            ("x".to_owned(), Tensor::from_f32s(&[frames, part, width], &x)),
            ("score".to_owned(), Tensor::from_f32s(&[frames, part], &score)),
        ];
        let found = lathe_testkit::evaluator().run(&model, &inputs).unwrap();
        let (rows, sizes) = (found[0].1.to_f64s().unwrap(), found[1].1.to_f64s().unwrap());
        let rows: Vec<&[f64]> = rows.chunks(width).collect();
        let x: Vec<Vec<Vec<f64>>> = x
            .chunks(part * width)
            .map(|frame| frame.chunks(width).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect())
            .collect();
        let score: Vec<Vec<f64>> = score.chunks(part).map(|s| s.iter().map(|&x| f64::from(x)).collect()).collect();
        let mut highest: f64 = 0.0;
        for s in 0..segments {
            let of = s * segment..(s + 1) * segment;
            let expected = trees(&x[of.clone()], &score[of], counts);
            let flat: Vec<&(Vec<f64>, f64)> = expected.iter().flatten().collect();
            assert_eq!(flat.iter().map(|(_, count)| count).sum::<f64>(), (segment * part) as f64);
            for (at, (row, count)) in flat.iter().enumerate() {
                let at = s * segment * counts.all() + at;
                assert_eq!(sizes[at], *count, "seed {seed}, segment {s}");
                let far = row.iter().zip(rows[at]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(far < 1e-5, "seed {seed}, segment {s}: {row:?} is not {:?}", rows[at]);
                highest = highest.max(*count);
            }
        }
        assert!(highest > 3.0, "no tree spans several frames");
    }
}

#[test]
fn merging_over_time_is_offered_where_there_are_several_frames() {
    let names = |frames: &str, more: &[(&str, &str)]| -> Vec<String> {
        let settings = [&[("span", "3:8"), ("keep", "4"), ("frames", frames)], more].concat();
        let found = propose(&mixed(frames.parse().unwrap(), "s = Identity (h)"), &settings);
        let [site] = found.sites.as_slice() else { panic!("{:?}", found.outcome) };
        assert!(site.candidates.iter().all(|c| c.loss.measured().is_some_and(f64::is_finite)));
        site.candidates.iter().map(|c| c.label.clone()).filter(|name| name.contains("over time")).collect()
    };
    let both = ["4 of 8 visual tokens merged over time", "4 of 8 visual tokens merged over time, others counted"];
    assert_eq!(names("2", &[]), both);
    assert!(names("2", &[("segment", "1")]).is_empty());
    assert!(names("1", &[]).is_empty());
}
