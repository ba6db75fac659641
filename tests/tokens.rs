//! Fewer tokens and fewer units at once: one plan, whose costs are those of the file it makes.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Workbench,
    pairs::{self, HIDDEN, TOKENS, WIDTH},
};
use lathe_ir::{Model, text};
use serde_json::Value;

fn bench() -> Workbench {
    let fixed = ["--metric", "rel-l2", "--set", "prune-units.patch=none", "--calib", "set.npz", "-o", "out.onnx"];
    Workbench::new(&text::parse(&pairs::model()).unwrap(), &[("x", pairs::samples())], &fixed)
}

/// Sites and options of what a method got.
fn got<'r>(report: &'r Value, method: &str) -> Vec<(&'r str, &'r str)> {
    let choices = report["plan"]["choices"].as_array().unwrap().iter().filter(|c| c["method"] == method);
    choices.map(|c| (c["site"].as_str().unwrap(), c["option"].as_str().unwrap())).collect()
}

/// That the plan told what the file takes: every pass told what it saved.
fn assert_reckoned(report: &Value, key: &str, delta: &str) {
    let side = |side: &str| report[side][key].as_i64().unwrap();
    let saved: i64 = report["passes"].as_array().unwrap().iter().map(|p| p[delta].as_i64().unwrap()).sum();
    assert_eq!(side("output") - side("input"), saved, "{}", report["passes"]);
}

#[test]
fn one_plan_merges_tokens_and_leaves_out_units() {
    let bench = bench();
    // Neither fewer tokens alone nor fewer units alone go so far without loss.
    let report = bench.report(&["--flops", "0.45", "--passes", "prune-units,reduce-tokens,factorize"]);
    let (tokens, units) = (got(&report, "reduce-tokens"), got(&report, "prune-units"));
    assert!(tokens.len() == 1 && units.len() == 1, "{}", report["plan"]["choices"]);
    assert_eq!(units[0].1, "leave out");
    assert!(report["verify"]["after"].as_f64().unwrap() < 1e-3, "{}", report["verify"]);
    assert_reckoned(&report, "flops", "flops_delta");
    // Layers in units that stay go on with the rows that are left.
    let choices = report["plan"]["choices"].as_array().unwrap();
    let flops = |site: &str| choices.iter().find(|c| c["site"] == site).map(|c| c["cost"]["flops"].as_u64().unwrap());
    let all = (2 * TOKENS * WIDTH * HIDDEN) as u64;
    assert!(flops("down3").unwrap() < all && flops("down3").unwrap() > all / 4, "{choices:?}");
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.nodes(lathe_ir::ScopeId::MAIN).any(|id| model.graph.node(id).is("ScatterElements")));
    let left = |name: &str| model.graph.find_value(name).is_some();
    assert!(left("down3") && (!left("down2") || !units[0].0.contains('2')));
}

#[test]
fn units_that_must_go_go_where_tokens_merge() {
    let bench = bench();
    let report =
        bench.report(&["--flops", "0.5", "--set", "prune-units.mlp=1", "--passes", "prune-units,reduce-tokens"]);
    assert_eq!(got(&report, "prune-units").len(), 1, "{}", report["plan"]["choices"]);
    assert_eq!(got(&report, "reduce-tokens").len(), 1, "{}", report["plan"]["choices"]);
    let model = Model::read(&bench.path("out.onnx")).unwrap().model;
    assert!(model.graph.find_value("down2").is_none() && model.graph.find_value("down1").is_some());
    assert!(report["verify"]["after"].as_f64().unwrap() < 1e-3, "{}", report["verify"]);
}
