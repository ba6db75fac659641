//! The text of every fixture after the default passes, and of exports in three ways. A refactor shows itself by no difference here.
//!
//! `UPDATE_GOLDEN=1 cargo test --test golden` writes the files anew.

#![allow(clippy::unwrap_used)]

mod common;

use lathe_ir::{Model, text};
use lathe_passes::Target;
use onnx_lathe::Options;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Ways to run: what they are called, the target and the operator set.
const WAYS: [(&str, Target, Option<i64>); 3] =
    [("portable", Target::Portable, None), ("ort", Target::Ort, None), ("opset23", Target::Portable, Some(23))];

#[test]
fn fixtures_become_what_they_were() {
    let text = |path: &Path| {
        let folder = tempfile::tempdir().unwrap();
        text::print(
            &common::optimize(path, &folder.path().join("out.onnx")).unwrap_or_else(|why| panic!("{path:?}: {why}")),
        )
    };
    let models = models("fixtures");
    compare("tests/golden", models.iter().map(|path| (stem(path), text(path))));
}

/// What PyTorch's exporters write, with what they write run beside what becomes of it.
#[test]
fn exports_become_what_they_were() {
    let models = models("fixtures/exports");
    let all = models.iter().flat_map(|path| WAYS.iter().map(move |way| (path, way)));
    let found = all.map(|(path, (name, target, opset))| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.onnx");
        let options = Options { target: *target, opset: *opset, verify: true, ..common::options(path, &out) };
        let report = onnx_lathe::optimize(&options).unwrap_or_else(|why| panic!("{path:?} {name}: {why}")).report;
        let left_out = report.warnings.iter().find(|warning| warning.contains("was left out"));
        assert!(left_out.is_none(), "{path:?} {name}: {left_out:?}");
        assert!(report.verify.is_some_and(|verify| verify.passed && verify.samples > 0), "{path:?} {name}");
        (format!("{}.{name}", stem(path)), text::print(&Model::read(&out).unwrap().model))
    });
    compare("tests/golden/exports", found);
}

/// The models of a folder, in order.
fn models(folder: &str) -> Vec<PathBuf> {
    let mut models: Vec<_> = fs::read_dir(common::repository(folder)).unwrap().map(|e| e.unwrap().path()).collect();
    models.retain(|path| path.extension().is_some_and(|e| e == "onnx"));
    models.sort();
    assert!(!models.is_empty());
    models
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

/// Compares texts with the files of their names in a folder, which holds no others.
fn compare(folder: &str, texts: impl Iterator<Item = (String, String)>) {
    let folder = common::repository(folder);
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    if update {
        fs::create_dir_all(&folder).unwrap();
    }
    let (mut different, mut names) = (Vec::new(), BTreeSet::new());
    for (name, found) in texts {
        let golden = folder.join(format!("{name}.txt"));
        if update {
            fs::write(&golden, &found).unwrap();
        } else if let Some(difference) = first_difference(&fs::read_to_string(&golden).unwrap_or_default(), &found) {
            different.push(format!("{name}: {difference}"));
        }
        names.insert(name);
    }
    let stored = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let stored: BTreeSet<String> = stored.map(|path| stem(&path)).collect();
    assert_eq!(stored, names, "{folder:?} has files of models that are gone, or lacks some");
    assert!(different.is_empty(), "UPDATE_GOLDEN=1 accepts what changed:\n{}", different.join("\n"));
}

/// The first line in which two texts differ.
fn first_difference(expected: &str, found: &str) -> Option<String> {
    if expected == found {
        return None;
    }
    let same = expected.lines().zip(found.lines()).take_while(|(a, b)| a == b).count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("the end").trim().to_owned();
    Some(format!("line {}: expected `{}`, found `{}`", same + 1, line(expected), line(found)))
}
