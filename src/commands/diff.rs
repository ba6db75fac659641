//! `optimize diff A B`: what differs between two models, without running them.

use super::Answer;
use crate::{
    Failure,
    diff::{Diff, WeightLine},
    html, job,
    report::{grouped, mib, rows},
    summary,
};
use anyhow::{Context as _, anyhow};
use clap::Args;
use lathe_ir::Model;
use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
};

/// Lines of a list that are shown; --json and --html have all.
const SHOWN: usize = 12;

/// What to compare.
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// One model.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Write a page with everything.
    #[arg(long, value_name = "FILE.html")]
    html: Option<PathBuf>,
    /// End with exit code 1 where the models differ.
    #[arg(long)]
    exit_code: bool,
}

pub(crate) fn run(args: &DiffArgs) -> Result<(), Failure> {
    let found = written(args)?;
    Answer::new(&found, text(&found), Vec::new()).show(args.json);
    args.end(&found)
}

pub(crate) fn answer(args: &DiffArgs) -> Result<Answer, Failure> {
    let found = written(args)?;
    args.end(&found)?;
    Ok(Answer::new(&found, text(&found), Vec::new()))
}

impl DiffArgs {
    /// How the command ends.
    fn end(&self, found: &Diff) -> Result<(), Failure> {
        match self.exit_code && !found.equal {
            true => Err(Failure::Error(anyhow!("the models differ"))),
            false => Ok(()),
        }
    }
}

/// The differences, with a page of them where one is asked for.
fn written(args: &DiffArgs) -> Result<Diff, Failure> {
    let found = differences(args)?;
    if let Some(path) = &args.html {
        let page = html::diff::page(&found);
        lathe_ir::write_whole(path, |out| out.write_all(page.as_bytes()))
            .with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(found)
}

fn differences(args: &DiffArgs) -> Result<Diff, Failure> {
    let read = |path: &Path| -> Result<_, Failure> {
        let loaded = super::read(path)?;
        let data: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
        let side = job::side(path, &loaded.model, loaded.file_bytes + data);
        Ok((loaded.model, side))
    };
    let ((a, a_side), (b, b_side)): ((Model, _), (Model, _)) = (read(&args.a)?, read(&args.b)?);
    Ok(Diff::of((&a, a_side), (&b, b_side)))
}

fn text(found: &Diff) -> String {
    if found.equal {
        return format!(
            "the models are equal: {} nodes and {} constants are the same\n",
            grouped(found.nodes.same as u64),
            grouped(found.weights.same as u64)
        );
    }
    let mut out = summary::sides(["first", "second"], rows(&found.a, &found.b));
    let there = |side: &Option<String>| side.clone().unwrap_or_else(|| "–".to_owned());
    list(&mut out, "inputs and outputs", &found.interface, |port| {
        format!("{} `{}`: {} → {}", port.kind, port.name, there(&port.a), there(&port.b))
    });
    list(&mut out, "properties", &found.properties, |p| format!("{}: {} → {}", p.name, there(&p.a), there(&p.b)));
    list(&mut out, "operators", &found.operators, |count| format!("{}: {} → {}", count.op, count.a, count.b));
    let nodes = &found.nodes;
    let _ = writeln!(
        out,
        "\nnodes: {} the same, {} changed, {} only in the first, {} only in the second",
        grouped(nodes.same as u64),
        grouped(nodes.changed.len() as u64),
        grouped(nodes.only_a.len() as u64),
        grouped(nodes.only_b.len() as u64)
    );
    lines(&mut out, &nodes.changed, |node| format!("{} `{}`: {}", node.op, node.output, node.what.join(", ")));
    let weights = &found.weights;
    let _ = writeln!(
        out,
        "\nconstants: {} the same, {} renamed, {} changed, {} only in the first, {} only in the second",
        grouped(weights.same as u64),
        grouped(weights.renamed.len() as u64),
        grouped(weights.changed.len() as u64),
        grouped(weights.only_a.len() as u64),
        grouped(weights.only_b.len() as u64)
    );
    lines(&mut out, &weights.changed, |weight| match (weight.rel_l2, weight.max_abs, weight.share) {
        (Some(rel), Some(most), Some(share)) => format!(
            "`{}` {}: by {rel:.2e} of its norm, at most {most:.2e}, in {:.1} % of its numbers",
            weight.name,
            weight.b,
            share * 100.0
        ),
        _ => format!("`{}`: {} → {}", weight.name, weight.a, weight.b),
    });
    let line = |weight: &WeightLine| format!("`{}` {}, {}", weight.name, weight.ty, mib(weight.bytes as u64));
    list(&mut out, "constants only in the first", &weights.only_a, line);
    list(&mut out, "constants only in the second", &weights.only_b, line);
    out
}

/// A title and the first lines of a list, where there are any.
fn list<T>(out: &mut String, title: &str, items: &[T], line: impl Fn(&T) -> String) {
    if !items.is_empty() {
        let _ = writeln!(out, "\n{title}");
        lines(out, items, line);
    }
}

fn lines<T>(out: &mut String, items: &[T], line: impl Fn(&T) -> String) {
    for item in items.iter().take(SHOWN) {
        let _ = writeln!(out, "  {}", line(item));
    }
    if items.len() > SHOWN {
        let _ = writeln!(out, "  … and {} more (--json, --html)", items.len() - SHOWN);
    }
}
