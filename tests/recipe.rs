//! Recipes: what a run used can be used again, and the command line has the last word.

#![allow(clippy::unwrap_used)]

mod common;

use common::fixture;
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn run(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).current_dir(folder);
    command.arg(fixture("transformer.onnx")).args(arguments).output().unwrap()
}

fn succeeds(folder: &Path, arguments: &[&str]) {
    let output = run(folder, arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_recipe_does_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    let options =
        ["--skip", "fuse-layer-norm,fold-scale", "--opset=21", "--set=merge-linears.enabled=true", "--seed=7"];
    let options = [&options[..], &["--target", "ort", "--input-shape", "hidden:2,5,32", "--no-verify"]].concat();
    succeeds(folder.path(), &[&["-o", "a.onnx", "--save-recipe", "a.toml"], &options[..]].concat());
    succeeds(folder.path(), &["-o", "b.onnx", "--recipe", "a.toml", "--save-recipe", "b.toml"]);
    assert_eq!(read("a.onnx"), read("b.onnx"));
    assert_eq!(String::from_utf8(read("a.toml")), String::from_utf8(read("b.toml")));
    succeeds(folder.path(), &["-o", "plain.onnx", "--no-verify"]);
    assert_ne!(read("a.onnx"), read("plain.onnx"), "the options make no difference");
}

#[test]
fn the_command_line_has_the_last_word() {
    let folder = tempfile::tempdir().unwrap();
    let text = "passes = [\"drop-dead\"]\nno-verify = true\nseed = 3\nset = [\"merge-linears.enabled=true\"]\n";
    fs::write(folder.path().join("r.toml"), text).unwrap();
    let options = ["--recipe", "r.toml", "--passes", "hoist-constants", "--seed", "4", "--save-recipe", "s.toml"];
    succeeds(folder.path(), &[&["-o", "a.onnx", "--set", "drop-inputs.enabled=true"], &options[..]].concat());
    let saved: toml::Table = fs::read_to_string(folder.path().join("s.toml")).unwrap().parse().unwrap();
    assert_eq!(saved["passes"].as_array().unwrap().len(), 1);
    assert_eq!(saved["passes"][0].as_str(), Some("hoist-constants"));
    assert_eq!(saved["seed"].as_integer(), Some(4));
    assert_eq!(saved["no-verify"].as_bool(), Some(true));
    assert_eq!(saved["set"].as_array().unwrap().len(), 2);
}

#[test]
fn a_recipe_with_a_mistake_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    for (text, code, culprit) in [
        ("siez = 0.5", 2, "`siez` in recipe `r.toml` is no option of the main job"),
        ("recipe = \"other.toml\"", 2, "`recipe` in recipe `r.toml` is no option of the main job"),
        ("[set]\nx = 1", 1, "`set` in recipe `r.toml` is a table, expected a value"),
        ("size = ", 1, "recipe `r.toml` is not TOML"),
    ] {
        fs::write(folder.path().join("r.toml"), text).unwrap();
        let output = run(folder.path(), &["-o", "a.onnx", "--recipe", "r.toml"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(culprit), "{said}");
        assert!(!folder.path().join("a.onnx").exists());
    }
}
