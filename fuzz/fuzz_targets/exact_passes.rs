//! Every exact pass leaves a valid model, and all of them together keep the outputs of random graphs.

#![no_main]

use lathe_passes::{Context, PASSES};
use libfuzzer_sys::fuzz_target;

/// Relative L2 error per output: what a few dozen roundings of f32 may add up to.
const RTOL: f32 = 1e-4;

fuzz_target!(|seed: u64| {
    let model = lathe_testkit::random_model(seed);
    let cx = Context { evaluator: Some(lathe_testkit::evaluator()), ..Context::default() };
    let mut optimized = model.clone();
    for pass in PASSES {
        let name = pass.info().name;
        pass.apply(&mut optimized, &cx).unwrap_or_else(|error| panic!("{name} fails: {error}"));
        optimized.check().unwrap_or_else(|error| panic!("{name} leaves a broken model: {error}"));
    }
    lathe_testkit::equivalent(&model, &optimized, Some(RTOL), seed).expect("the outputs stay");
});
