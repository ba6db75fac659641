//! The command line for shells, programs and people who mistype.

#![allow(clippy::unwrap_used)]

mod common;

use common::fixture;
use serde_json::Value;
use std::{
    fs,
    process::{Command, Output},
};

fn optimize(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    command.args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn shells_and_manuals_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = printed(&optimize(&["completions", shell]));
        assert!(script.contains("max-drop") && script.contains("sampler"), "{shell}");
    }
    assert!(printed(&optimize(&["man"])).starts_with(".ie"));
    let folder = tempfile::tempdir().unwrap();
    printed(&optimize(&["man", "--dir", folder.path().to_str().unwrap()]));
    let page = fs::read_to_string(folder.path().join("optimize-verify.1")).unwrap();
    assert!(page.contains("\\-\\-layers"), "{page}");
    let missing = optimize(&["man", "--dir", "no/such/folder"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(said(&missing).contains("cannot write manual pages to `no/such/folder`"), "{}", said(&missing));
}

#[test]
fn help_has_groups_and_examples() {
    let help = printed(&optimize(&["--help"]));
    for heading in ["Files and proof:", "Budget:", "Data:", "Running models:", "Examples:"] {
        assert!(help.lines().any(|line| line == heading), "{heading}");
    }
    for command in
        ["sampler", "inspect", "verify", "diff", "stats", "bench", "cache", "passes", "explain", "dump", "doctor"]
    {
        assert!(printed(&optimize(&[command, "--help"])).contains("Examples:\n"), "{command}");
    }
}

#[test]
fn errors_are_json_where_answers_are() {
    let output = optimize(&["inspect", "missing.onnx", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &found["error"]["exit_code"]), (Some(1), &Value::from(1)));
    assert_eq!(found["error"]["kind"], "error");
    let message = found["error"]["message"].as_str().unwrap();
    assert!(message.contains("`missing.onnx`") && said(&output) == format!("error: {message}\n"), "{}", said(&output));
    let without = optimize(&["inspect", "missing.onnx"]);
    assert!(without.stdout.is_empty());
}

#[test]
fn names_that_nobody_has_are_asked_about() {
    let model = fixture("transformer.onnx");
    let model = model.to_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    fs::write(&recipe, "max-dorp = 0.1\n").unwrap();
    for (arguments, meant) in [
        (&["explain", "fuse-layernorm"][..], "did you mean `fuse-layer-norm`?"),
        (&[model, "--dry-run", "--skip", "fold-biass"], "did you mean `fold-bias`?"),
        (&[model, "--dry-run", "--set", "slice-chains.piece=2"], "did you mean `slice-chains.pieces`?"),
        (&[model, "--dry-run", "--recipe", recipe.to_str().unwrap()], "did you mean `max-drop`?"),
    ] {
        let output = optimize(arguments);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(meant), "{}", said(&output));
    }
}
