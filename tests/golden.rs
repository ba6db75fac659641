//! The text of every fixture after the default passes. A refactor shows itself by no difference here.
//!
//! `UPDATE_GOLDEN=1 cargo test --test golden` writes the files anew.

#![allow(clippy::unwrap_used)]

mod common;

use lathe_ir::text;
use std::{fs, path::Path};

#[test]
fn fixtures_become_what_they_were() {
    let folder = common::repository("tests/golden");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    if update {
        fs::create_dir_all(&folder).unwrap();
    }
    let mut models: Vec<_> = fs::read_dir(common::repository("fixtures")).unwrap().map(|e| e.unwrap().path()).collect();
    models.retain(|path| path.extension().is_some_and(|e| e == "onnx"));
    models.sort();
    assert!(!models.is_empty());
    let mut different = Vec::new();
    for path in &models {
        let name = path.file_stem().unwrap().to_string_lossy();
        let golden = folder.join(format!("{name}.txt"));
        let found = optimized(path);
        if update {
            fs::write(&golden, &found).unwrap();
            continue;
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if let Some(difference) = first_difference(&expected, &found) {
            different.push(format!("{name}: {difference}"));
        }
    }
    let stored = fs::read_dir(&folder).unwrap().count();
    assert_eq!(stored, models.len(), "tests/golden has files of fixtures that are gone, or lacks some");
    assert!(different.is_empty(), "UPDATE_GOLDEN=1 accepts what changed:\n{}", different.join("\n"));
}

fn optimized(path: &Path) -> String {
    let folder = tempfile::tempdir().unwrap();
    let model = common::optimize(path, &folder.path().join("out.onnx")).unwrap_or_else(|why| panic!("{path:?}: {why}"));
    text::print(&model)
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
