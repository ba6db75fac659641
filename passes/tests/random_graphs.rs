//! Random graphs keep their outputs under the exact passes: the seeded share of the fuzz target `exact_passes`.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, text};
use lathe_passes::{Kind, PASSES, Pass, PassContext};
use lathe_testkit::{equivalent, evaluator, random_model};

const GRAPHS: u64 = 500;

/// Relative L2 error per output: what a few dozen roundings of f32 may add up to.
const RTOL: f32 = 1e-4;

/// Applies one pass; the result must be a valid model that survives its own text.
fn apply(pass: &dyn Pass, model: &mut Model, seed: u64) -> bool {
    let cx = PassContext::default().with_evaluator(evaluator());
    let name = pass.info().name;
    let before = text::print_full(model);
    let outcome = pass.apply(model, &cx).unwrap_or_else(|error| panic!("seed {seed}: {name} fails: {error}"));
    model.check().unwrap_or_else(|error| panic!("seed {seed}: {name} leaves a broken model: {error}\n{before}"));
    let after = text::print_full(model);
    assert_eq!(text::print_full(&text::parse(&after).unwrap()), after, "seed {seed}: {name}");
    if outcome.changes.is_empty() {
        assert_eq!(after, before, "seed {seed}: {name} changes what it does not report");
    }
    !outcome.changes.is_empty()
}

#[test]
fn random_graphs_keep_their_outputs() {
    for seed in 0..GRAPHS {
        let model = random_model(seed);
        let mut optimized = model.clone();
        for pass in PASSES {
            apply(*pass, &mut optimized, seed);
        }
        if let Err(why) = equivalent(&model, &optimized, Some(RTOL), seed) {
            panic!("seed {seed}: {why}\n{}\n{}", culprit(&model, seed), text::print_graph(&optimized));
        }
    }
}

/// The first pass whose own claim does not hold.
fn culprit(model: &Model, seed: u64) -> String {
    let mut current = model.clone();
    for pass in PASSES {
        let before = current.clone();
        apply(*pass, &mut current, seed);
        let rtol = match pass.info().kind {
            Kind::Equivalent { rtol } => Some(rtol),
            _ => None,
        };
        if let Err(why) = equivalent(&before, &current, rtol, seed) {
            return format!("first broken by {}: {why}\n{}", pass.info().name, text::print_graph(&before));
        }
    }
    "no pass alone breaks its claim".to_owned()
}
