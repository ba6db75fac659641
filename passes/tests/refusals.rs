//! Every refusal has a test: each sentence that the exact passes and what carries them out may give as a reason stands,
//! in whole or in a part that tells it from others, in a test that expects it.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where refusals are written.
const SOURCES: &[&str] = &["driver.rs", "operands.rs", "rule.rs"];

/// Strings of several words that are no reasons: where something happened.
const PLACES: &[&str] = &["the main graph", "`{}` is `{}`"];

/// The least that a test must expect of a sentence.
const LEAST: usize = 10;

/// A string in a source, without its quotes, and where it begins.
type Literal = (usize, String);

/// The strings of a source, and the source with them and the comments blanked out.
fn strings(source: &str) -> (Vec<Literal>, String) {
    let bytes = source.as_bytes();
    let (mut found, mut code, mut at) = (Vec::new(), source.as_bytes().to_vec(), 0);
    let blank = |code: &mut Vec<u8>, from: usize, to: usize| code[from..to].fill(b' ');
    while at < bytes.len() {
        let rest = &source[at..];
        if rest.starts_with("//") {
            let end = rest.find('\n').map_or(bytes.len(), |n| at + n);
            blank(&mut code, at, end);
            at = end;
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") || rest.starts_with("'\\''") {
            at += if bytes[at + 1] == b'\\' { 4 } else { 3 };
        } else if let Some(hashes) = raw(rest) {
            let (open, close) = (at + hashes + 2, format!("\"{}", "#".repeat(hashes)));
            let end = open + source[open..].find(&close).unwrap();
            found.push((at, source[open..end].to_owned()));
            blank(&mut code, open, end);
            at = end + close.len();
        } else if bytes[at] == b'"' {
            let (mut text, mut end) = (String::new(), at + 1);
            while bytes[end] != b'"' {
                let escaped = bytes[end] == b'\\';
                end += usize::from(escaped);
                let next = source[end..].chars().next().unwrap();
                if escaped && next == '\n' {
                    // A line that goes on in the next one.
                    end += source[end..].find(|c: char| !c.is_whitespace()).unwrap();
                    continue;
                }
                text.push(next);
                end += next.len_utf8();
            }
            blank(&mut code, at + 1, end);
            found.push((at, text));
            at = end + 1;
        } else {
            at += rest.chars().next().unwrap().len_utf8();
        }
    }
    (found, String::from_utf8(code).unwrap())
}

/// The number of `#` where a raw string begins.
fn raw(rest: &str) -> Option<usize> {
    let hashes = rest.strip_prefix('r')?.bytes().take_while(|&b| b == b'#').count();
    rest[1 + hashes..].starts_with('"').then_some(hashes)
}

/// Where the tests of a source begin.
fn tests_at(source: &str) -> usize {
    source.find("#[cfg(test)]\nmod tests {").unwrap_or(source.len())
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut all: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    for path in all {
        match path.is_dir() {
            true => files(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// A reason in a source, and the name of the constant that holds it.
struct Reason {
    sentence: String,
    name: Option<String>,
}

/// The reasons in a source: strings of at least three words that are neither documentation, patterns, places nor what a
/// broken invariant says.
fn reasons(source: &str) -> Vec<Reason> {
    let source = &source[..tests_at(source)];
    let (strings, code) = strings(source);
    let mut found = Vec::new();
    for (at, text) in strings {
        let before = code[..at].trim_end();
        let statement = &before[before.rfind([';', '{', '}']).map_or(0, |n| n + 1)..];
        let documentation = code[..at].rfind("Info = Info {").is_some_and(|info| !code[info..at].contains("\n};"));
        let expected = |name: &str| code.contains(&format!("expect({})", name.trim()));
        let bug = ["expect(", "panic!(", "unreachable!("].iter().any(|call| before.ends_with(call))
            || statement.split_once("let ").and_then(|(_, rest)| rest.strip_suffix('=')).is_some_and(expected);
        let pattern = text
            .split(|c: char| !c.is_alphanumeric() && !"({*".contains(c))
            .map(|word| word.trim_start_matches('('))
            .any(|word| word.starts_with(char::is_uppercase) && word.contains('('));
        let pattern = pattern || text.contains("}(");
        let change = statement.contains("change(") || PLACES.contains(&text.as_str());
        if text.matches(' ').count() < 2 || documentation || bug || pattern || change {
            continue;
        }
        let name = statement.split("const ").nth(1).and_then(|rest| rest.split(':').next());
        found.push(Reason { sentence: text, name: name.map(str::to_owned) });
    }
    found
}

/// The parts of a sentence between what is filled in.
fn parts(sentence: &str) -> Vec<&str> {
    let outside = sentence.split('{').enumerate();
    outside.map(|(index, part)| if index == 0 { part } else { part.split_once('}').map_or("", |p| p.1) }).collect()
}

/// The pass whose tests reach a source of it, by its name; `None` for what several passes share, which the tests of
/// each of them reach.
fn pass_of(path: &Path, folder: &Path) -> Option<String> {
    let inside = path.strip_prefix(folder.join("exact")).ok()?;
    let first = Path::new(inside.components().next()?.as_os_str()).with_extension("rs");
    let main = fs::read_to_string(folder.join("exact").join(&first)).ok()?;
    main.contains("Info = Info {").then(|| first.with_extension("").to_string_lossy().into_owned())
}

/// Strings of tests, and their code without them.
struct Tests {
    /// The pass they belong to; `None` where they may reach any.
    pass: Option<String>,
    strings: Vec<String>,
    code: String,
}

/// Whether a string of a test is, or is part of, what a sentence says with its places filled in, or says it behind where
/// it happened.
fn is_of(text: &str, sentence: &str) -> bool {
    let parts = parts(sentence);
    let fixed = parts.iter().map(|part| part.trim()).max_by_key(|part| part.len()).unwrap_or_default();
    let behind = text.strip_suffix(sentence).is_some_and(|place| place.ends_with(": "));
    behind
        || parts.iter().any(|part| part.contains(text))
        || (parts.len() > 1 && fixed.len() >= LEAST && text.contains(fixed))
}

#[test]
fn every_refusal_is_expected_by_a_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut all, mut exact) = (Vec::new(), Vec::new());
    files(folder, &mut all);
    files(&folder.join("../tests"), &mut all);
    files(&folder.join("exact"), &mut exact);
    exact.extend(SOURCES.iter().map(|name| folder.join(name)));
    let mut tests = Vec::new();
    for path in all.iter().filter(|path| path.file_name().is_some_and(|name| name != "refusals.rs")) {
        let source = fs::read_to_string(path).unwrap();
        let whole = path.ends_with("tests.rs") || path.parent().is_some_and(|p| p.ends_with("tests"));
        let begin = if whole { 0 } else { tests_at(&source) };
        let (found, code) = strings(&source[begin..]);
        let long = found.into_iter().map(|(_, text)| text).filter(|text| text.trim().len() >= LEAST);
        let strings = long.filter(|text| !text.contains(['\n', '{'])).collect();
        tests.push(Tests { pass: pass_of(path, folder), strings, code });
    }
    let mut found: Vec<(&Path, Option<String>, Reason)> = Vec::new();
    for path in exact.iter().filter(|path| !path.ends_with("tests.rs")) {
        let pass = pass_of(path, folder);
        let reasons = reasons(&fs::read_to_string(path).unwrap());
        found.extend(reasons.into_iter().map(|r| (path.strip_prefix(folder).unwrap(), pass.clone(), r)));
    }
    let is_expected = |pass: &Option<String>, reason: &Reason| {
        // What a text may mean in this place: it counts for a sentence that it tells from the others.
        let near = found.iter().filter(|(_, other, _)| pass.is_none() || other == pass || other.is_none());
        let others: Vec<&str> = near.map(|(_, _, r)| r.sentence.as_str()).filter(|s| *s != reason.sentence).collect();
        let tells = |text: &String| {
            let exact = *text == reason.sentence || text.ends_with(&format!(": {}", reason.sentence));
            exact || (is_of(text, &reason.sentence) && !others.iter().any(|other| is_of(text, other)))
        };
        let reach = tests.iter().filter(|tests| pass.is_none() || tests.pass.is_none() || tests.pass == *pass);
        reach.into_iter().any(|tests| {
            let named = reason.name.as_ref().is_some_and(|name| tests.code.contains(name.as_str()));
            named || tests.strings.iter().any(tells)
        })
    };
    let missing: Vec<String> = found
        .iter()
        .filter(|(_, pass, reason)| !is_expected(pass, reason))
        .map(|(path, _, reason)| format!("{}: {}", path.display(), reason.sentence))
        .collect();
    let count = found.len();
    assert!(count > 250, "only {count} reasons were found: the sources are read wrongly");
    assert!(missing.is_empty(), "{} of {count} reasons are in no test:\n{}", missing.len(), missing.join("\n"));
}

#[test]
fn reads_strings_as_the_compiler_does() {
    let source =
        "// \"no\"\nlet a = \"one \\\"two\\\" \\\n    three\"; let b = 'x'; let c = '\"'; let d = r#\"raw \"q\"\"#;\n";
    let (found, code) = strings(source);
    let texts: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(texts, ["one \"two\" three", "raw \"q\""]);
    assert!(!code.contains("three") && !code.contains("no") && code.contains("let d"));
    assert_eq!(parts("the {name} of a {} are computed"), ["the ", " of a ", " are computed"]);
}
