//! `optimize passes` and `optimize explain`: the catalogue.

use super::Answer;
use crate::{Failure, similar::did_you_mean, terminal::print};
use clap::Args;
use lathe_passes::{Info, Kind, PASSES, lossy::METHODS, sampler};
use serde_json::json;
use std::fmt::Write as _;

/// How to list the passes.
#[derive(Debug, Args)]
pub(crate) struct PassesArgs {
    /// As JSON.
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// As the table of the book.
    #[arg(long)]
    markdown: bool,
}

/// Which pass to describe.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The pass, or a method of `optimize sampler --plan`; with --markdown all passes without one.
    #[arg(required_unless_present = "markdown")]
    pass: Option<String>,
    /// As a chapter of the documentation.
    #[arg(long)]
    markdown: bool,
}

fn claim(kind: Kind) -> String {
    match kind {
        Kind::Identical => "identical: every output keeps its bits".to_owned(),
        Kind::Equivalent { rtol } => format!("equivalent: outputs within {rtol:.0e} relative L2 in float32"),
        Kind::Lossy => "lossy: within the budget".to_owned(),
    }
}

/// Every pass and every lossy method, in the order in which they run.
fn infos() -> impl Iterator<Item = &'static Info> {
    PASSES.iter().map(|p| p.info()).chain(METHODS.iter().map(|m| m.info()))
}

pub(crate) fn passes(args: &PassesArgs) -> Result<(), Failure> {
    if args.markdown {
        print(&table());
    } else {
        answer().show(args.json);
    }
    Ok(())
}

/// The list of passes.
pub(crate) fn answer() -> Answer {
    let object = |i: &Info| json!({"name": i.name, "kind": i.kind.name(), "summary": i.summary, "options": options(i)});
    let width = infos().map(|i| i.name.len()).max().unwrap_or(0);
    let line = |i: &Info| format!("{:width$}  {:10}  {}\n", i.name, i.kind.name(), i.summary);
    Answer::new(&infos().map(object).collect::<Vec<_>>(), infos().map(line).collect(), Vec::new())
}

fn table() -> String {
    let mut out = String::from("| pass | claim | what it does |\n|---|---|---|\n");
    for info in infos() {
        let _ = writeln!(out, "| `{}` | {} | {} |", info.name, info.kind.name(), info.summary);
    }
    out
}

fn options(info: &Info) -> Vec<serde_json::Value> {
    let option = |o: &lathe_passes::Opt| json!({"name": o.name, "unit": o.unit, "default": o.default, "doc": o.doc});
    info.options.iter().map(option).collect()
}

pub(crate) fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let Some(name) = &args.pass else {
        print(&infos().map(chapter).collect::<String>());
        return Ok(());
    };
    if let Some(method) = sampler::methods::METHODS.iter().find(|method| method.name == name) {
        print(&method_page(method));
        return Ok(());
    }
    let Some(info) = infos().find(|i| i.name == name) else {
        let names = infos().map(|i| i.name).chain(sampler::methods::METHODS.iter().map(|method| method.name));
        let meant = did_you_mean(name, names);
        return Err(Failure::Usage(format!("there is no pass `{name}`; `optimize passes` lists them{meant}")));
    };
    print(&if args.markdown { chapter(info) } else { page(info) });
    Ok(())
}

/// What a pass claims, lowers and is taken from, one sentence each.
fn facts(info: &Info) -> Vec<String> {
    let lowers: Vec<&str> = info.lowers.iter().map(|q| q.name()).collect();
    let lowers = if lowers.is_empty() { "nothing by itself".to_owned() } else { lowers.join(", ") };
    let mut facts = vec![format!("Claim: {}.", claim(info.kind)), format!("Lowers: {lowers}.")];
    facts.extend(info.source.map(|source| format!("Source: {source}.")));
    facts
}

fn page(info: &Info) -> String {
    let mut out = format!("{}: {}\n\n{}\n\n{}\n", info.name, info.summary, info.doc, facts(info).join("\n"));
    for option in info.options {
        let (name, unit, default, doc) = (option.name, option.unit, option.default, option.doc);
        let _ = writeln!(out, "\n--set {}.{name}=… ({unit}, default {default})\n    {doc}", info.name);
    }
    out
}

/// A method of `optimize sampler`.
fn method_page(method: &sampler::methods::Method) -> String {
    let (name, source) = (method.name, method.source);
    let mut out = format!("{name}: {}\n\n{}\n\nSource: {source}.\n", method.summary, method.doc);
    for option in method.options {
        let default = if option.default.is_empty() { "none" } else { option.default };
        let _ =
            writeln!(out, "\n--plan {name}:{}=… ({}, default {default})\n    {}", option.name, option.unit, option.doc);
    }
    out
}

/// The page as a chapter of the documentation. What reads as markup there is code here.
fn chapter(info: &Info) -> String {
    let plain = |text: &str| text.replace('|', "\\|").replace('<', "&lt;");
    let mut out = format!("## {}\n\n{}.\n\n{}\n\n", info.name, capital(&plain(info.summary)), plain(info.doc));
    for fact in facts(info) {
        let _ = writeln!(out, "- {}", plain(&fact));
    }
    if !info.options.is_empty() {
        out.push_str("\n| option | | default | |\n|---|---|---|---|\n");
    }
    for option in info.options {
        let (name, unit, default) = (option.name, plain(option.unit), plain(option.default));
        let _ = writeln!(out, "| `{}.{name}` | {unit} | {default} | {} |", info.name, plain(option.doc));
    }
    out.push('\n');
    out
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_of_samplers_is_explained_with_its_options() {
        let methods = sampler::methods::METHODS;
        assert!(methods.iter().all(|method| infos().all(|info| info.name != method.name)), "a name means one thing");
        let gate = methods.iter().find(|method| method.name == "gate").unwrap();
        let page = method_page(gate);
        assert!(page.starts_with("gate: ends guidance\n\n") && page.contains("arXiv:2312.12487"), "{page}");
        assert!(page.contains("\n--plan gate:threshold=… (a number, default 0.99)\n"), "{page}");
        assert!(page.contains("\n--plan gate:at=… (a number, default none)\n"), "{page}");
    }
}
