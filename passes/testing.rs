//! How passes are tested: a graph goes in as text, the proof is a run, the result comes out as text.

use crate::{Kind, Pass, PassContext};
use lathe_ir::{Model, text};

/// Parses `graph`.
pub(crate) fn model(graph: &str) -> Model {
    let model = text::parse(graph).unwrap_or_else(|error| panic!("{error}\n{graph}"));
    model.check().unwrap_or_else(|error| panic!("{error}\n{graph}"));
    model
}

/// Applies `pass` to `graph` with the default context and returns the result as text. See [`check_in`].
pub(crate) fn check(pass: &dyn Pass, graph: &str) -> String {
    check_in(pass, graph, &PassContext::default().with_evaluator(lathe_testkit::evaluator()))
}

/// Applies `pass` to `graph`, checks the result, runs both under the pass's claim, applies the pass again and expects
/// no change. Returns the result as text.
pub(crate) fn check_in(pass: &dyn Pass, graph: &str, cx: &PassContext) -> String {
    let before = model(graph);
    let mut after = before.clone();
    let outcome = pass.apply(&mut after, cx).expect("the pass runs");
    after.check().unwrap_or_else(|error| panic!("{error}\n{}", text::print(&after)));
    assert!(!outcome.changes.is_empty(), "nothing changed: {:?}", outcome.refusals);
    let rtol = match pass.info().kind {
        Kind::Identical => None,
        Kind::Equivalent { rtol } => Some(rtol),
        Kind::Lossy => panic!("lossy passes are tested against a budget"),
    };
    lathe_testkit::equivalent(&before, &after, rtol, 1).unwrap_or_else(|why| panic!("{why}\n{}", text::print(&after)));
    let printed = text::print_graph(&after);
    let again = pass.apply(&mut after, cx).expect("the pass runs again");
    assert_eq!(again.changes, [], "the pass changes its own result");
    printed
}

/// Applies `pass` to `graph` and expects an untouched graph and a refusal that contains `reason`.
pub(crate) fn check_refuses(pass: &dyn Pass, graph: &str, reason: &str) {
    let cx = PassContext::default().with_evaluator(lathe_testkit::evaluator());
    check_refuses_in(pass, graph, reason, &cx);
}

/// As [`check_refuses`], in a given context.
pub(crate) fn check_refuses_in(pass: &dyn Pass, graph: &str, reason: &str, cx: &PassContext) {
    let before = model(graph);
    let mut after = before.clone();
    let outcome = pass.apply(&mut after, cx).expect("the pass runs");
    assert_eq!(outcome.changes, [], "the pass acted");
    assert_eq!(text::print(&after), text::print(&before), "the graph changed");
    let found = outcome.refusals.keys().any(|refusal| refusal.contains(reason));
    assert!(found, "expected a refusal with `{reason}`, found {:?}", outcome.refusals);
}

/// Applies `pass` to `graph` and expects an untouched graph, whatever is said about it.
pub(crate) fn check_untouched(pass: &dyn Pass, graph: &str) {
    let before = model(graph);
    let mut after = before.clone();
    let cx = PassContext::default().with_evaluator(lathe_testkit::evaluator());
    let outcome = pass.apply(&mut after, &cx).expect("the pass runs");
    assert_eq!(outcome.changes, [], "the pass acted");
    assert_eq!(text::print(&after), text::print(&before), "the graph changed");
}
