//! A rule that asks for a name which its pattern lacks would find nothing, or panic where it matches at last. Every rule
//! of the sources is read here, and every name it asks for is looked up in its pattern.

#![allow(clippy::unwrap_used)]

use lathe_ir::Pattern;
use std::{collections::BTreeMap, fs, path::Path};

/// Methods of a match whose arguments are names of its pattern.
const ASKING: &[&str] = &[
    "elem",
    "find_node",
    "find_value",
    "id",
    "int64s",
    "labelled",
    "ndim",
    "node",
    "number",
    "perm",
    "require_replaceable",
    "same_shape",
    "shape",
    "tensor",
    "value",
];

/// Functions that are given a match and names of its pattern.
const PASSING: &[&str] = &["certain(m, ", "copy(m, ", "matrix(m, ", "number(m, ", "operands(m, ", "spanning(m, g, "];

/// What stands between the parenthesis that `text` begins with and the one that closes it.
fn inside(text: &str) -> &str {
    let (mut depth, mut quoted) = (0, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b'(' | b'{' | b'[' if !quoted => depth += 1,
            b')' | b'}' | b']' if !quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &text[1..at];
        }
    }
    panic!("a parenthesis is not closed: {}", &text[..text.len().min(80)]);
}

/// The string literals that `arguments` begins with.
fn literals(arguments: &str) -> Vec<String> {
    let quoted = |part: &str| Some(part.trim().strip_prefix('"')?.strip_suffix('"')?.to_owned());
    arguments.split(',').map_while(quoted).collect()
}

/// The names that a piece of source asks a match `m` for, in itself and in the functions of its file that it calls.
fn asked(source: &str, functions: &BTreeMap<&str, &str>, depth: usize, names: &mut Vec<String>) {
    let calls = ASKING.iter().map(|method| format!("m.{method}("));
    for call in calls.chain(PASSING.iter().map(|&call| call.to_owned())) {
        for (at, _) in source.match_indices(&call) {
            let before = source[..at].chars().next_back().unwrap_or(' ');
            let open = at + call.find('(').expect("a call has a parenthesis");
            if !before.is_alphanumeric() && before != '_' {
                let skipped = at + call.len() - open - 1;
                names.extend(literals(&inside(&source[open..])[skipped..]));
            }
        }
    }
    for (name, body) in functions {
        let called = source.contains(&format!("{name}(m")) || source.trim_end_matches([')', ',']).ends_with(name);
        if called && depth > 0 {
            asked(body, functions, depth - 1, names);
        }
    }
}

/// The bodies of the functions of a file, by name.
fn functions(source: &str) -> BTreeMap<&str, &str> {
    let mut found = BTreeMap::new();
    for (at, _) in source.match_indices("\nfn ").chain(source.match_indices("\npub(super) fn ")) {
        let rest = &source[at..];
        let name =
            rest.split("fn ").nth(1).and_then(|rest| rest.split(['(', '<']).next()).expect("a function has a name");
        let (start, end) = (rest.find('{').unwrap_or(0), rest.find("\n}").unwrap_or(rest.len()));
        found.insert(name, rest.get(start..end).unwrap_or(rest));
    }
    found
}

/// The words of all string literals of a file: the names of patterns that are put together from pieces.
fn words(source: &str) -> Vec<String> {
    let literals = source.split('"').skip(1).step_by(2);
    literals.flat_map(|text| text.split(|c: char| !c.is_alphanumeric() && c != '_')).map(str::to_owned).collect()
}

fn check_rule(text: &str, source: &str, functions: &BTreeMap<&str, &str>) -> Result<usize, String> {
    let mut wanted = Vec::new();
    let (names, action) = match text.find("pat!") {
        Some(at) => {
            let pattern = inside(&text[at + 4..]);
            let names: Vec<String> = Pattern::parse(pattern).names().into_iter().map(str::to_owned).collect();
            (names, &text[at + 4 + pattern.len() + 2..])
        }
        None => (words(source), text),
    };
    asked(action, functions, 3, &mut wanted);
    for name in &wanted {
        if name != "output" && !names.contains(name) {
            return Err(format!("`{name}` is no name of the pattern of rule({text})"));
        }
    }
    Ok(wanted.len())
}

#[test]
fn every_name_that_a_rule_asks_for_is_in_its_pattern() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("exact");
    let (mut rules, mut asked) = (0, 0);
    for entry in fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it can be listed").path();
        if path.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        let whole = fs::read_to_string(&path).expect("a source file is text");
        let source = whole.split("#[cfg(test)]").next().expect("a text has a start");
        let functions = functions(source);
        for (at, _) in source.match_indices("rule(\"") {
            rules += 1;
            asked += check_rule(inside(&source[at + 4..]), source, &functions)
                .unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        }
    }
    assert!(rules > 60 && asked > 100, "{rules} rules ask for {asked} names: the sources are read wrongly");
}

#[test]
fn a_name_that_is_missing_is_found() {
    let source = "fn tell(m: &Match) -> usize {\n    m.ndim(\"b\")\n}";
    let functions =
        functions(&format!("\n{source}\n")).into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect::<Vec<_>>();
    let functions: BTreeMap<&str, &str> = functions.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let good = "\"a-rule\", pat!(Add(a, b)), |m, g| { m.value(\"a\"); tell(m) }";
    assert_eq!(check_rule(good, "", &functions), Ok(2));
    let bad = good.replace("m.value(\"a\")", "m.find_node(\"c\")");
    let missing = check_rule(&bad, "", &functions);
    assert!(missing.is_err_and(|why| why.contains("`c` is no name")));
    assert!(check_rule(&good.replace("Add(a, b)", "Neg(a)"), "", &functions).is_err());
    assert!(check_rule("\"a-rule\", pat!(Neg(a)), tell", "", &functions).is_err());
}
