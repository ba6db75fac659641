//! The HTML report as the program writes it, read by a parser; and in a browser where there is one.

#![allow(clippy::unwrap_used)]

mod common;

use common::fixture;
use scraper::{Html, Selector};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Optimizes a fixture and returns its reports, HTML and JSON.
fn reports(name: &str, folder: &Path) -> (PathBuf, PathBuf) {
    // Names that a careless page would take for markup.
    let (html, json) = (folder.join("<report> & 'more'.html"), folder.join("report.json"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path);
    command.arg(fixture(name)).arg("-o").arg(folder.join("out.onnx"));
    command.arg("--report").arg(&html).arg("--report").arg(&json);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Nobody watches a pipe, so no bar is drawn there.
    assert!(!output.stderr.contains(&0x1b), "{}", String::from_utf8_lossy(&output.stderr));
    (html, json)
}

#[test]
fn the_page_holds_the_numbers_of_the_json_report() {
    let folder = tempfile::tempdir().unwrap();
    let (html, json) = reports("transformer.onnx", folder.path());
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    let page = Html::parse_document(&fs::read_to_string(html).unwrap());
    let texts = |selector: &str| -> Vec<String> {
        let selector = Selector::parse(selector).unwrap();
        page.select(&selector).map(|e| e.text().collect::<String>().trim().to_owned()).collect()
    };
    let data: serde_json::Value = serde_json::from_str(&texts("#report")[0]).unwrap();
    assert_eq!(data, report);
    let cells = texts("#sizes td");
    for side in ["input", "output"] {
        let nodes = report[side]["nodes"].to_string();
        assert!(cells.contains(&nodes), "{nodes}: {cells:?}");
    }
    let names = |key: &str| -> Vec<String> {
        report[key].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap().to_owned()).collect()
    };
    let mut shown = texts("#passes td:first-child, #idle td:first-child");
    let mut passes = names("passes");
    shown.sort();
    passes.sort();
    assert_eq!(shown, passes);
    let layers = names("layers");
    assert!(layers.len() > 10, "{layers:?}");
    assert_eq!(texts("#layers td.name").len() + texts("#minor td.name").len(), layers.len());
    let command = texts("pre");
    assert!(command[0].contains("'\\''more'\\''"), "{command:?}");
}

#[test]
fn a_browser_has_nothing_to_complain_about() {
    // The check is a script, which says more by hand; a machine without the browser has the parser above.
    let runs = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !runs("chromium") || !runs("python3") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (html, json) = reports("mobilenet.onnx", folder.path());
    let mut script = Command::new("python3");
    script.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/report_in_browser.py"));
    let output = script.arg(html).arg("--json").arg(json).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
