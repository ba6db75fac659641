//! What a person reads at the end of a run.

use crate::{
    AutoReport, Report,
    report::{Alternative, PassLine, Verify, mib, rows},
    validate,
};
use comfy_table::{Cell, CellAlignment, Table, presets};
use lathe_runtime::ChosenSamples;

/// Lines of refusals shown without `-v`.
const SHOWN: usize = 3;

fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

fn right(text: impl ToString) -> Cell {
    Cell::new(text.to_string()).set_alignment(CellAlignment::Right)
}

/// Figures of two models, and what changed.
pub(crate) fn sides([before, after]: [&str; 2], rows: Vec<[String; 4]>) -> String {
    let mut sides = table();
    sides.set_header(vec![Cell::new(""), right(before), right(after), right("change")]);
    for [name, before, after, change] in rows {
        sides.add_row(vec![Cell::new(name), right(before), right(after), right(change)]);
    }
    format!("{sides}\n")
}

/// The before/after table with one line per pass that did something.
pub(crate) fn text(report: &Report, verbose: bool) -> String {
    let mut out = sides(["before", "after"], rows(&report.input, &report.output));
    out.push('\n');
    let mut passes = table();
    passes.set_header(vec![Cell::new("pass"), right("changes"), right("nodes"), right("bytes"), right("seconds")]);
    let shown = |p: &&PassLine| p.changes > 0 || p.dropped.is_some() || verbose;
    for pass in report.passes.iter().filter(shown) {
        let name = if pass.dropped.is_some() { format!("{} (left out)", pass.name) } else { pass.name.clone() };
        passes.add_row(vec![
            Cell::new(name),
            right(pass.changes),
            right(format!("{:+}", pass.nodes_delta)),
            right(format!("{:+}", pass.weight_bytes_delta)),
            right(format!("{:.3}", pass.seconds)),
        ]);
    }
    out.push_str(&format!("{passes}\n"));
    out.push_str(&refusals(report, verbose));
    if let Some(selection) = &report.calibration {
        out.push_str(&format!("\n{}\n", chosen(selection)));
    }
    if let Some(auto) = &report.auto {
        out.push_str(&format!("\n{}\n", tried(auto)));
    }
    if let Some(precision) = &report.precision {
        out.push_str(&format!("\n{}\n", precision.describe()));
    }
    if let Some(caches) = &report.kv_cache {
        out.push_str(&format!("\n{}\n", caches.describe()));
    }
    if let Some(quantization) = &report.quantization {
        out.push_str(&format!("\n{}\n", quantization.describe()));
    }
    if let Some(verify) = &report.verify {
        for left_out in verify.left_out.iter().filter(|_| verbose) {
            out.push_str(&format!("\nnot compared: {left_out}"));
        }
        if let Some(note) = &verify.note {
            out.push_str(&format!("\nnote: {note}\n"));
        }
        // A metric of a set has no output of its own that says most.
        let measured = verify.worst.is_none() && verify.outputs.iter().any(|o| o.uncompared.is_none());
        if verify.samples > 0 && measured {
            out.push_str(&format!("\nmeasured on {}: {}\n", verify.runtime, validate::describe(verify)));
        } else if verify.samples > 0 {
            let on = match verify.set.as_str() {
                "random" => format!("{} sets of random inputs", verify.samples),
                set => format!("{} samples of the {set} set", verify.samples),
            };
            out.push_str(&format!("\nverified against the original on {}: {on}, {}\n", verify.runtime, worst(verify)));
        }
    } else {
        out.push_str("\nnot verified (--no-verify)\n");
    }
    if let Some(plan) = &report.plan {
        plan.alternatives.iter().for_each(|other| out.push_str(&format!("beside it: {}\n", alternative(other))));
    }
    if let Some(latency) = &report.latency {
        out.push_str(&format!("latency, {}: {}\n", latency.setting(), latency.describe()));
    }
    out.push_str(&bargain(report));
    let wrote = match (&report.auto, report.output.path.as_str()) {
        (Some(_), "") => "wrote the models that no other beats".to_owned(),
        (None, "") => "wrote nothing (--dry-run)".to_owned(),
        (_, path) => format!("wrote {path}"),
    };
    out.push_str(&format!("{wrote} · {:.2} s · {} peak\n", report.seconds, mib(report.peak_rss_bytes)));
    out
}

/// What a budget got, and for what, in one sentence.
fn bargain(report: &Report) -> String {
    let (Some(plan), Some(verify)) = (&report.plan, &report.verify) else { return String::new() };
    let mut shares: Vec<String> =
        plan.budget.iter().map(|(what, row)| format!("{:.3} of the {what}", row.share)).collect();
    if let Some(ratio) = report.latency.as_ref().and_then(|latency| latency.ratio)
        && !plan.budget.contains_key("latency")
    {
        shares.push(format!("{ratio:.3} of the latency"));
    }
    let mut methods: Vec<&str> = Vec::new();
    for method in plan.choices.iter().filter_map(|choice| choice.method.as_deref()) {
        if !methods.contains(&method) {
            methods.push(method);
        }
    }
    let by = if methods.is_empty() { "exact passes".to_owned() } else { methods.join(", ") };
    format!(
        "got {} for a loss of {:.2e} in {} on {} {} samples, by {by}\n",
        shares.join(" and "),
        verify.drop,
        verify.metric,
        verify.samples,
        verify.set,
    )
}

/// A plain alternative to the plan, in a line.
fn alternative(other: &Alternative) -> String {
    let takes: Vec<String> = other.takes.iter().map(|(what, share)| format!("{share:.3} of the {what}")).collect();
    let keeps = if other.keeps { "" } else { ", beyond the budget" };
    let how = if other.measured { "loses" } else { "is predicted to lose" };
    let takes = if takes.is_empty() { String::new() } else { format!(" takes {}{keeps}, and", takes.join(", ")) };
    format!("{} for every layer{takes} {how} {:.2e}", other.name, other.loses)
}

/// The error that says most, with the bound that its output was held to.
fn worst(verify: &Verify) -> String {
    let Some(name) = &verify.worst else { return "no output whose values can be compared".to_owned() };
    let output = verify.outputs.iter().find(|o| o.name == *name);
    let of = if verify.outputs.len() > 1 { format!(" in `{name}`") } else { String::new() };
    // The note has told why.
    let excused = if output.is_some_and(|o| o.excuse.is_some()) { ", passed for the reason above" } else { "" };
    format!("worst relative L2 error {:.1e}{of} (limit {:.0e}{excused})", verify.after, verify.limit)
}

/// Every run of `--auto`; those that no other beats carry a star, and the result an arrow.
fn tried(auto: &AutoReport) -> String {
    let figure = |x: Option<f64>| right(x.map_or_else(|| "–".to_owned(), |x| format!("{x:.3}")));
    let mut points = table();
    let head =
        [Cell::new(""), Cell::new("recipe"), right("asked"), right(&auto.measure), right("drop"), right("seconds")];
    points.set_header(head.to_vec());
    for point in &auto.points {
        let mark = match (point.chosen, point.front) {
            (true, _) => "→",
            (false, true) => "*",
            (false, false) => "",
        };
        let lost = point.drop.map_or_else(|| "–".to_owned(), |drop| format!("{drop:.4}"));
        points.add_row(vec![
            Cell::new(mark),
            Cell::new(&point.recipe),
            figure(point.share),
            figure(point.ratio),
            right(lost),
            right(format!("{:.0}", point.seconds)),
        ]);
    }
    points.to_string()
}

/// Which samples were chosen, all of them if they fit on a few lines.
pub(crate) fn chosen(selection: &ChosenSamples) -> String {
    const MOST: usize = 64;
    let numbers: Vec<String> = selection.chosen.iter().take(MOST).map(ToString::to_string).collect();
    let more = selection.chosen.len().saturating_sub(MOST);
    let more = if more > 0 { format!(" and {more} more (in the report)") } else { String::new() };
    format!(
        "chose {} of {} calibration samples by `{}`: they have {:.0} % of the leverage in its {} main directions\n  {}{more}",
        selection.chosen.len(),
        selection.pool,
        selection.feature,
        selection.coverage * 100.0,
        selection.components,
        numbers.join(" "),
    )
}

/// What was left alone: everything with `-v`, otherwise folds that would have made the file larger.
fn refusals(report: &Report, verbose: bool) -> String {
    let mut out = String::new();
    let mut hidden = 0;
    for pass in &report.passes {
        for refusal in &pass.refusals {
            let growth = refusal.reason.contains("--max-growth");
            if !verbose && (!growth || hidden >= SHOWN) {
                hidden += usize::from(growth);
                continue;
            }
            hidden += usize::from(growth && !verbose);
            let places = if refusal.count > 1 { format!(" ({} places)", refusal.count) } else { String::new() };
            out.push_str(&format!("\nleft alone by {}: {}{places}, {}", pass.name, refusal.reason, refusal.example));
        }
    }
    if hidden > SHOWN {
        out.push_str(&format!("\nand {} more; -v lists them", hidden - SHOWN));
    }
    if !out.is_empty() {
        out.push('\n');
    }
    out
}
