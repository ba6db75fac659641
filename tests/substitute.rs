//! Convolutions that are copies of what they read are replaced under a budget, and what is not worth it is declined.

#![allow(clippy::unwrap_used)]

mod common;

use common::Workbench;
use lathe_ir::{Model, ScopeId, Tensor, text};

const CHANNELS: usize = 16;

/// Numbers in `(-0.5, 0.5)` from a seed.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f32 / (1u64 << 31) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn list(numbers: impl Iterator<Item = f32>) -> String {
    numbers.map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ")
}

/// A convolution that multiplies every channel with a factor, and one that is what it is.
fn model() -> Model {
    let copy = (0..CHANNELS * CHANNELS * 9).map(|at| {
        let (o, i, tap) = (at / 9 / CHANNELS, at / 9 % CHANNELS, at % 9);
        if o == i && tap == 4 { 1.0 + o as f32 / 8.0 } else { 0.0 }
    });
    text::parse(&format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n,{CHANNELS},12,12] x) => (float[n,{CHANNELS}] y)
         <float[{CHANNELS},{CHANNELS},3,3] copy = {{{}}}, float[{CHANNELS},{CHANNELS},3,3] other = {{{}}}> {{
            a = Conv <pads = [1, 1, 1, 1]> (x, copy) b = Tanh (a)
            c = Conv <pads = [1, 1, 1, 1]> (b, other) d = Tanh (c)
            e = GlobalAveragePool (d) y = Flatten (e)
        }}",
        list(copy),
        list(noise(CHANNELS * CHANNELS * 9, 3).into_iter().map(|x| x / 4.0))
    ))
    .unwrap()
}

const OTHERS: &str = "quantize,quantize-dynamic,quantize-static,convert-floats,compensate,factorize,factorize-jointly,dictionary,\
                      prune-channels,drop-inputs,prune-units,reduce-tokens";

#[test]
fn a_convolution_that_is_a_copy_goes_without_loss() {
    let dims = [32, CHANNELS, 12, 12];
    let x = Tensor::from_f32s(&dims, &noise(dims.iter().product(), 11));
    let fixed = ["--metric", "rel-l2", "--skip", OTHERS, "--calib", "set.npz", "-o", "out.onnx"];
    let bench = Workbench::new(&model(), &[("x", x)], &fixed);
    let report = bench.report(&["--flops", "0.6"]);
    let choices = report["plan"]["choices"].as_array().unwrap();
    let of = |site: &str| choices.iter().find(|c| c["site"] == site).unwrap()["option"].as_str().unwrap().to_owned();
    assert_eq!((of("copy"), of("other")), ("identity, scaled".to_owned(), "as it is".to_owned()));
    assert!(report["verify"]["drop"].as_f64().unwrap() < 1e-5, "{}", report["verify"]);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.find_value("copy").is_none());
    assert_eq!(model.graph.nodes(ScopeId::MAIN).count(), 6);
    // Without a budget nothing of it runs, nor under one of bytes.
    for pass in bench.report(&[])["passes"].as_array().unwrap() {
        assert_ne!(pass["name"], "substitute");
    }
}
