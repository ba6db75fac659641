//! The catalogue of passes agrees with the files and with the book.

use lathe_runtime::{PROVIDERS, metrics};
use std::{fs, path::Path, process::Command};

fn table() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_optimize")).args(["passes", "--markdown"]).output().expect("it runs");
    String::from_utf8(output.stdout).expect("the table is text")
}

/// The names in the first column.
fn names() -> Vec<String> {
    table().lines().skip(2).map(|line| line.split('`').nth(1).expect("a name in each row").to_owned()).collect()
}

#[test]
fn the_book_shows_the_catalogue() {
    shows("docs/src/passes.md", "optimize passes --markdown", &table());
}

#[test]
fn every_pass_is_the_file_of_its_name_and_every_such_file_is_registered() {
    let folders = ["passes/exact", "passes/lossy"].map(|f| Path::new(env!("CARGO_MANIFEST_DIR")).join(f));
    let mut files: Vec<String> = Vec::new();
    for entry in folders.iter().flat_map(|folder| fs::read_dir(folder).expect("the folder is there")) {
        let path = entry.expect("it can be listed").path();
        let registers = |text: String| text.contains("\nimpl Pass for ") || text.contains("\nimpl Method for ");
        let is_pass = path.extension().is_some_and(|e| e == "rs")
            && registers(fs::read_to_string(&path).expect("a source file is text"));
        if is_pass {
            files.push(path.file_stem().expect("a name").to_string_lossy().replace('_', "-"));
        }
    }
    let mut registered = names();
    files.sort();
    registered.sort();
    assert_eq!(registered, files);
}

/// Holds what stands in a page between a marker and the end to what it must be.
fn shows(page: &str, marker: &str, table: &str) {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).expect("the page is there");
    let shown = text.split(&format!("<!-- {marker} -->\n")).nth(1).expect("the table has a start");
    let shown = shown.split("<!-- end -->").next().expect("the table has an end");
    assert_eq!(shown, table, "put this into {page}");
}

#[test]
fn the_book_shows_every_metric() {
    let rows = metrics().map(|m| format!("| `{}` | {} | {} |\n", m.name, m.summary, m.drop));
    let head = "| metric | what it is | drop |\n|---|---|---|\n".to_owned();
    shows("docs/src/pipelines.md", "metrics", &std::iter::once(head).chain(rows).collect::<String>());
}

#[test]
fn the_book_shows_every_execution_provider() {
    let row = |p: &lathe_runtime::Provider| {
        let (half, needs) = (if p.half { "yes" } else { "" }, if p.needs.is_empty() { "–" } else { p.needs });
        format!("| `{}` | {} | {half} | {needs} | {} |\n", p.name, p.runtime_name, p.remedy)
    };
    let head =
        "| `--ep` | ONNX Runtime's name | half precision | needs | where it is missing |\n|---|---|---|---|---|\n";
    let table: String = std::iter::once(head.to_owned()).chain(PROVIDERS.iter().map(row)).collect();
    shows("docs/src/faq.md", "providers", &table);
}

#[test]
fn the_help_names_every_metric() {
    let optimize = || Command::new(env!("CARGO_BIN_EXE_optimize"));
    let output = optimize().args(["verify", "--help"]).output().expect("it runs");
    let help = String::from_utf8(output.stdout).expect("help is text");
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for metric in metrics() {
        let line = format!("- {}: {} [drop: {}]", metric.name, metric.summary, metric.drop);
        assert!(words.contains(&line), "{line} is not in {help}");
    }
}
