//! All blocks are all of attention, planted blocks are found, masks are kept, and the rest is declined with reasons.

use super::*;
use crate::testing::model;
use lathe_ir::Tensor;

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

/// An attention over `n` tokens of two heads with a mask of some shape.
fn attention(n: &str, mask: &str) -> Model {
    model(&format!(
        r#"<ir_version: 10, opset_import: ["" : 17]>
        g (float[2, 2, {n}, 8] q, float[2, 2, 8, {n}] k, float[2, 2, {n}, 8] v, float[{mask}] mask)
          => (float[2, 2, {n}, 8] y)
        <float two = {{2}}>
        {{ s = MatMul (q, k) c = Mul (s, two) m = Add (c, mask) w = Softmax <axis = -1> (m) y = MatMul (w, v) }}"#
    ))
}

fn run(model: &Model, inputs: &[(&str, Tensor)]) -> Vec<f32> {
    let inputs: Vec<(String, Tensor)> = inputs.iter().map(|(name, t)| ((*name).to_owned(), t.clone())).collect();
    lathe_testkit::evaluator().run(model, &inputs).unwrap()[0].1.to_f32s().unwrap()
}

fn carried_out(model: &Model, kept: Kept) -> Model {
    let mut changed = model.clone();
    let place = places(model, &Facts::infer(model)).into_iter().flatten().next().unwrap();
    let opset = model.opset();
    let made = sparse(&mut Writer::new(&mut changed.graph, "y_sparse".to_owned()), &place, kept, opset);
    changed.graph.replace(place.output, made);
    drop_unused(&mut changed.graph, place.output);
    changed.graph.sort().unwrap();
    changed.check().unwrap();
    changed
}

fn off(a: &[f32], b: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(f32, f32) -> f32| a.iter().zip(b).map(|(x, y)| f64::from(f(*x, *y)).powi(2)).sum::<f64>();
    (sum(&|x, y| x - y) / sum(&|x, _| x)).sqrt()
}

#[test]
fn all_blocks_are_the_whole_attention_under_masks_of_every_shape() {
    let n = 512usize;
    let tensor = |dims: &[usize], seed| Tensor::from_f32s(dims, &noise(dims.iter().product(), seed));
    for dims in [vec![n], vec![n, n], vec![1, 2, n, n], vec![2, 1, 1, n], vec![2, 2, n, n]] {
        let shape = dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let whole = attention("512", &shape);
        let inputs = [
            ("q", tensor(&[2, 2, n, 8], 1)),
            ("k", tensor(&[2, 2, 8, n], 2)),
            ("v", tensor(&[2, 2, n, 8], 3)),
            ("mask", tensor(&dims, 4)),
        ];
        let expected = run(&whole, &inputs);
        let all = run(&carried_out(&whole, Kept { block: 64, count: 8 }), &inputs);
        assert!(off(&expected, &all) < 1e-5, "{shape}: {}", off(&expected, &all));
        let few = run(&carried_out(&whole, Kept { block: 64, count: 2 }), &inputs);
        assert!(off(&expected, &few) > 1e-2, "{shape}: leaving six of eight blocks out shows");
    }
}

#[test]
fn what_is_masked_stays_masked_whatever_is_chosen() {
    let n = 512usize;
    let causal: Vec<f32> = (0..n * n).map(|at| if at % n > at / n { f32::NEG_INFINITY } else { 0.0 }).collect();
    let whole = attention("512", "512, 512");
    let sparse = carried_out(&whole, Kept { block: 128, count: 3 });
    let inputs = |last: f32| {
        let mut values = noise(4 * n * 8, 3);
        values.chunks_mut(8).enumerate().filter(|(row, _)| row % n == n - 1).for_each(|(_, row)| row.fill(last));
        [
            ("q", Tensor::from_f32s(&[2, 2, n, 8], &noise(4 * n * 8, 1))),
            ("k", Tensor::from_f32s(&[2, 2, 8, n], &noise(4 * n * 8, 2))),
            ("v", Tensor::from_f32s(&[2, 2, n, 8], &values)),
            ("mask", Tensor::from_f32s(&[n, n], &causal)),
        ]
    };
    let (whole, one, other) = (run(&whole, &inputs(0.0)), run(&sparse, &inputs(0.0)), run(&sparse, &inputs(1e3)));
    // Only the last token may see the last value, and the first three blocks have no more than three before them.
    let rows = |x: &[f32], from: usize, to: usize| x[from * 8..to * 8].to_vec();
    assert_eq!(rows(&one, 0, n - 1), rows(&other, 0, n - 1));
    assert!(off(&rows(&whole, 0, 384), &rows(&one, 0, 384)) < 1e-5);
    assert!(one.iter().all(|x| x.is_finite()));
}

#[test]
fn choices_are_told_apart_and_keep_two_blocks_at_least() {
    let labels: Vec<String> = Kept::of(512).into_iter().map(|kept| kept.label(512)).collect();
    assert_eq!(
        labels,
        [
            "2 of 4 blocks of 128 keys",
            "4 of 8 blocks of 64 keys",
            "3 of 8 blocks of 64 keys",
            "2 of 8 blocks of 64 keys"
        ]
    );
    assert_eq!(Kept::of(576).iter().map(|kept| kept.block).max(), Some(64));
    assert_eq!(Kept::of(4096).len(), 10);
}

#[test]
fn what_cannot_be_cut_into_blocks_is_declined_with_reasons() {
    let reason = |model: &Model| places(model, &Facts::infer(model)).into_iter().next().unwrap().err().unwrap().0;
    assert_eq!(reason(&attention("n", "n, n")), "its number of tokens is open; --input-shape or --fix-dim fixes it");
    assert_eq!(reason(&attention("448", "448")), "it has less than 512 tokens, where leaving blocks out is no faster");
    assert_eq!(reason(&attention("577", "577")), "its number of tokens is no multiple of 64");
    let mut shown = attention("512", "512");
    let weights = shown.graph.find_value("w").unwrap();
    shown.graph.add_output(lathe_ir::ScopeId::MAIN, weights);
    assert_eq!(reason(&shown), "its weights are read by other than the weighted sums");
}
