//! `optimize passes` and `optimize explain`: the catalogue.

use crate::{Failure, cli::print};
use clap::Args;
use lathe_passes::{Info, Kind, PASSES, lossy::METHODS};
use serde_json::json;
use std::fmt::Write as _;

/// How to list the passes.
#[derive(Debug, Args)]
pub(crate) struct PassesArgs {
    /// As JSON.
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// As the table of the README.
    #[arg(long)]
    markdown: bool,
}

/// Which pass to describe.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The pass.
    pass: String,
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
    let infos = infos();
    let mut out = String::new();
    if args.json {
        let list: Vec<_> = infos
            .map(|i| json!({"name": i.name, "kind": i.kind.name(), "summary": i.summary, "options": options(i)}))
            .collect();
        out = serde_json::to_string_pretty(&list).expect("the catalogue has only names and texts");
        out.push('\n');
    } else if args.markdown {
        out.push_str("| pass | claim | what it does |\n|---|---|---|\n");
        for info in infos {
            let _ = writeln!(out, "| `{}` | {} | {} |", info.name, info.kind.name(), info.summary);
        }
    } else {
        let width = self::infos().map(|i| i.name.len()).max().unwrap_or(0);
        for info in infos {
            let _ = writeln!(out, "{:width$}  {:10}  {}", info.name, info.kind.name(), info.summary);
        }
    }
    print(&out);
    Ok(())
}

fn options(info: &Info) -> Vec<serde_json::Value> {
    let option = |o: &lathe_passes::Opt| json!({"name": o.name, "unit": o.unit, "default": o.default, "doc": o.doc});
    info.options.iter().map(option).collect()
}

pub(crate) fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let Some(info) = infos().find(|i| i.name == args.pass) else {
        return Err(Failure::Usage(format!("there is no pass `{}`; `optimize passes` lists them", args.pass)));
    };
    let mut out = format!("{}: {}\n\n{}\n\n", info.name, info.summary, info.doc);
    let _ = writeln!(out, "Claim: {}.", claim(info.kind));
    let lowers: Vec<String> = info.lowers.iter().map(|q| format!("{q:?}").to_lowercase()).collect();
    let lowers = if lowers.is_empty() { "nothing by itself".to_owned() } else { lowers.join(", ") };
    let _ = writeln!(out, "Lowers: {lowers}.");
    if let Some(source) = info.source {
        let _ = writeln!(out, "Source: {source}.");
    }
    for option in info.options {
        let _ = writeln!(
            out,
            "\n--set {}.{}=… ({}, default {})\n    {}",
            info.name, option.name, option.unit, option.default, option.doc
        );
    }
    print(&out);
    Ok(())
}
