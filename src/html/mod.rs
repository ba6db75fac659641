//! The report as one HTML page that needs nothing else: no network, no script. Every section is a function of the
//! [`Report`]; the JSON report lies in the page too.

mod charts;
pub(crate) mod diff;
pub(crate) mod front;
mod numbers;
mod plan;

use crate::{
    Report,
    latency::{Latency, LatencySide, digits},
    layers::LayerLine,
    report::{PassLine, Verify, grouped, mib, rows},
};
use charts::{bar, decades, quartiles};
use lathe_runtime::{metric_columns, metrics};
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = include_str!("style.css");

impl Report {
    /// The report as one HTML page that needs nothing else.
    pub fn to_html(&self) -> String {
        page(self)
    }
}

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let title = match report.output.path.as_str() {
        "" => &report.input.path,
        path => path,
    };
    let name = title.rsplit(['/', '\\']).next().unwrap_or(title);
    // `<` cannot end the script element inside a string of JSON.
    let json = report.to_json().replace('<', "\\u003c");
    let body = html! {
        header {
            h1 { (name) }
            p { (verdict(report)) " From " code.name { (report.input.path) } ", opset " (report.output.opset) "." }
        }
        main {
            (overview(report))
            @if !report.warnings.is_empty() {
                h2 { "Warnings" }
                ul.warnings { @for warning in &report.warnings { li { (warning) } } }
            }
            (sizes(report))
            @if let Some(verify) = &report.verify { (outputs(verify)) }
            @if let Some(latency) = &report.latency { (timings(latency)) }
            @if let Some(auto) = &report.auto { (front::section(auto)) }
            @if let Some(plan) = &report.plan { (plan::section(plan)) }
            @if let Some(precision) = &report.precision { (numbers::precision(precision)) }
            @if let Some(caches) = &report.kv_cache { (numbers::caches(caches)) }
            @if let Some(found) = &report.quantization { (numbers::quantization(found)) }
            (passes(&report.passes))
            @if !report.layers.is_empty() { (layers(report)) }
            h2 { "Reproduce" }
            p.caption { "Seed " (report.seed) ". Paths are relative to the folder it ran in." }
            pre { (shell(&report.command)) }
        }
        footer {
            "onnx-lathe " (report.version) " · " (format!("{:.2} s", report.seconds)) " · "
            (mib(report.peak_rss_bytes)) " peak memory"
        }
        script #report type="application/json" { (PreEscaped(json)) }
    };
    document(name, body)
}

/// A page that needs nothing else.
fn document(name: &str, body: Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (name) " · onnx-lathe" }
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) }
            }
            body { (body) }
        }
    }
    .into_string()
}

/// Whether the result was written and holds its promise.
fn verdict(report: &Report) -> Markup {
    let written = if report.output.path.is_empty() { "nothing written (--dry-run)." } else { "" };
    html! {
        @match &report.verify {
            None => span.verdict { "Not verified." },
            Some(v) if v.passed && v.samples > 0 => span.verdict.good { "Verified against the original." },
            Some(v) if v.passed => span.verdict { "Not compared." },
            Some(_) => span.verdict.bad { "Verification failed." },
        }
        " " (written)
    }
}

/// Small multiples, one quantity each.
fn overview(report: &Report) -> Markup {
    let (a, b) = (&report.input, &report.output);
    let count = |name: &str, before: u64, after: u64, say: &dyn Fn(u64) -> String| {
        multiple(name, (before as f64, say(before)), (after as f64, say(after)))
    };
    html! {
        section.multiples aria-label="Before and after" {
            (count("File size", a.file_bytes, b.file_bytes, &mib))
            (count("FLOPs of one run", a.flops, b.flops, &flops))
            (count("Peak activation", a.peak_activation_bytes, b.peak_activation_bytes, &mib))
            (count("Nodes", a.nodes_total, b.nodes_total, &grouped))
            @if let Some(latency) = &report.latency { (median(latency)) }
            @if let Some(verify) = report.verify.as_ref().filter(|v| v.samples > 0) { (error(verify)) }
        }
    }
}

/// The medians; a difference that may be chance is not given as a number.
fn median(latency: &Latency) -> Markup {
    let Some(after) = latency.after_ms else { return html! {} };
    let side = |ms: f64| (ms, format!("{} ms", digits(ms)));
    let change = match latency.verdict.as_deref() {
        Some("faster" | "slower") => percent(latency.before_ms, after),
        _ => "≈".to_owned(),
    };
    pair("Latency, median", side(latency.before_ms), side(after), &change)
}

fn multiple(name: &str, before: (f64, String), after: (f64, String)) -> Markup {
    let change = percent(before.0, after.0);
    pair(name, before, after, &change)
}

/// The change of a quantity.
fn percent(before: f64, after: f64) -> String {
    match (after / before - 1.0) * 100.0 {
        p if !p.is_finite() || p == 0.0 => "=".to_owned(),
        p if p.abs() < 0.005 => "≈".to_owned(),
        p if p.abs() < 0.1 => minus(&format!("{p:+.2} %")),
        p => minus(&format!("{p:+.1} %")),
    }
}

/// One quantity, before and after on one scale.
fn pair(name: &str, before: (f64, String), after: (f64, String), change: &str) -> Markup {
    let most = before.0.max(after.0);
    let share = |x: f64| if most > 0.0 { x / most } else { 0.0 };
    html! {
        figure.multiple {
            span.change { (change) }
            h3 { (name) }
            @for (label, (value, text)) in [("before", &before), ("after", &after)] {
                div.row {
                    span.label { (label) } span.value { (text) }
                    (bar(share(*value), label, &format!("{name} {label}: {text}")))
                }
            }
        }
    }
}

/// The metric beside its bound, both on a scale of decades where the metric is an error.
fn error(verify: &Verify) -> Markup {
    let is_error = verify.metric == "bits" || metrics().any(|m| m.name == verify.metric && m.is_error);
    if !is_error {
        let number = |x: f64| if x.is_finite() { format!("{x:.4}") } else { "∞".to_owned() };
        return multiple(
            &format!("{}, {} set", verify.metric, verify.set),
            (verify.before, number(verify.before)),
            (verify.after, number(verify.after)),
        );
    }
    let class = if verify.passed { "after" } else { "bad" };
    let limit = if verify.limit.is_finite() { scientific(verify.limit) } else { "none".to_owned() };
    let after = scientific(verify.after);
    html! {
        figure.multiple {
            span.change { @if verify.passed { "holds" } @else { "exceeded" } }
            h3 { "Error, " (verify.metric) ", log scale" }
            div.row {
                span.label { "limit" } span.value { (limit) }
                (bar(decades(verify.limit), "before", &format!("limit {limit}, logarithmic")))
            }
            div.row {
                span.label { "worst" } span.value { (after) }
                (bar(decades(verify.after), class, &format!("worst error {after}, logarithmic")))
            }
        }
    }
}

fn sizes(report: &Report) -> Markup {
    html! {
        h2 { "Before and after" }
        p.caption {
            "Open dimensions count as 128, a batch as 1. One multiply-add is 2 FLOP. 1 MiB is 1,048,576 bytes."
        }
        table #sizes {
            thead { tr { th { "" } th.number { "before" } th.number { "after" } th.number { "change" } } }
            tbody {
                @for [name, before, after, change] in rows(&report.input, &report.output) {
                    tr { td { (name) } td.number { (before) } td.number { (after) } td.number { (minus(&change)) } }
                }
            }
        }
    }
}

fn outputs(verify: &Verify) -> Markup {
    let on = match verify.set.as_str() {
        "random" => format!("{} sets of random inputs", verify.samples),
        set => format!("{} samples of the {set} set", verify.samples),
    };
    // The first columns are there for every output.
    let mut shown = metric_columns();
    shown.retain(|(metric, column)| {
        column.order > 0 && verify.outputs.iter().any(|o| o.scores.get(metric.name).is_some())
    });
    let bounded = verify.outputs.iter().any(|o| o.limit.is_some());
    html! {
        h2 { "Error of every output" }
        p.caption {
            "Run beside the original on " (verify.runtime) ", " (on) ". "
            @if let Some(detail) = &verify.detail { (detail) ". " }
            @if let Some(why) = &verify.why { (verify.metric) ": " (why) ". " }
            "Relative L2 is the norm of the difference over the norm of the original; its bar is logarithmic, from 1e-9 to 1."
        }
        @if let Some(note) = &verify.note { p { (note) } }
        @if !verify.outputs.is_empty() {
            div.scroll { table #outputs {
                thead { tr {
                    th { "output" } th.number { "relative L2" } th { "" }
                    @if bounded { th.number { "limit" } }
                    th.number { "max abs" } th.number.wide { "cosine" }
                    @for (_, column) in &shown { th.number { (column.heading) @if !column.unit.is_empty() { ", " (column.unit) } } }
                } }
                tbody { @for o in &verify.outputs {
                    tr {
                        td.name { code { (breakable(&o.name)) } }
                        td.number { (scientific(o.scores.rel_l2())) }
                        td.chart { (bar(decades(o.scores.rel_l2()), "after", &format!("relative L2 {}", scientific(o.scores.rel_l2())))) }
                        @if bounded { td.number { (o.limit.map_or("–".to_owned(), scientific)) } }
                        td.number { (scientific(o.scores.max_abs())) }
                        td.number.wide { (format!("{:.6}", o.scores.cosine())) }
                        @for (metric, _) in &shown {
                            td.number { (o.scores.get(metric.name).map_or("–".to_owned(), |x| format!("{x:.4}"))) }
                        }
                    }
                } }
            } }
        }
    }
}

fn timings(latency: &Latency) -> Markup {
    let sides: Vec<(&str, &LatencySide)> =
        std::iter::once(("before", &latency.before)).chain(latency.after.as_ref().map(|a| ("after", a))).collect();
    let most = sides.iter().map(|(_, s)| s.q3_ms).fold(0.0, f64::max);
    html! {
        h2 { "Latency" }
        p { (latency.describe()) "." }
        p.caption {
            (latency.setting()) ". The runtime's own optimizations are on for both. Bars end at the median, "
            "whiskers hold the middle half of the runs, and the scale starts at zero."
        }
        div.scroll { table #latency {
            thead { tr {
                th { "" } th.number { "median, ms" } th.number.wide { "quartiles, ms" } th { "" }
                th.number.wide { "load, ms" } th.number.wide { "first run, ms" } th.number { "peak memory" }
            } }
            tbody { @for (label, s) in sides {
                tr {
                    td { (label) }
                    td.number { (digits(s.median_ms)) }
                    td.number.wide { (digits(s.q1_ms)) " – " (digits(s.q3_ms)) }
                    td.chart { (quartiles(s.q1_ms, s.median_ms, s.q3_ms, most, label, &format!("{label}: {} ms", digits(s.median_ms)))) }
                    td.number.wide { (digits(s.load_ms)) }
                    td.number.wide { (digits(s.first_run_ms)) }
                    td.number { (s.peak_rss_bytes.map_or("–".to_owned(), mib)) }
                }
            } }
        } }
    }
}

fn layers(report: &Report) -> Markup {
    let most = |of: fn(&LayerLine) -> u64| report.layers.iter().map(of).max().unwrap_or(0).max(1);
    let most = (most(|l| l.flops), most(|l| l.weight_bytes));
    let small = |part: u64, all: u64| part.saturating_mul(100) < all;
    let (minor, major): (Vec<_>, Vec<_>) = report.layers.iter().partition(|l| {
        small(l.flops, report.output.flops) && small(l.weight_bytes, report.output.weight_bytes) && l.error.is_none()
    });
    html! {
        h2 { "Layers of the result" }
        p.caption {
            "Nodes with at least one percent of the FLOPs or of the weight bytes, in the model's order. "
            "Bars are relative to the largest node."
        }
        (layer_table("layers", &major, most))
        @if !minor.is_empty() {
            details {
                summary { (minor.len()) " smaller nodes" }
                (layer_table("minor", &minor, most))
            }
        }
    }
}

/// `most` is the most FLOPs and weight bytes that a node has.
fn layer_table(id: &str, layers: &[&LayerLine], most: (u64, u64)) -> Markup {
    let measured = layers.iter().any(|l| l.error.is_some());
    let share = |part: u64, most: u64| part as f64 / most as f64;
    html! {
        div.scroll { table id=(id) {
            thead { tr {
                th { "node" } th.wide { "operator" } th.number { "FLOPs" } th { "" } th.number { "weights" } th { "" }
                @if measured { th.number { "error" } th { "relative L2, log scale" } }
            } }
            tbody { @for l in layers {
                tr {
                    td.name { code { (breakable(&l.name)) } }
                    td.wide { (l.op) }
                    td.number { (flops(l.flops)) }
                    td.chart { (bar(share(l.flops, most.0), "after", &flops(l.flops))) }
                    td.number { (bytes(l.weight_bytes)) }
                    td.chart { (bar(share(l.weight_bytes, most.1), "after", &bytes(l.weight_bytes))) }
                    @if measured {
                        @let said = l.error.map_or("–".to_owned(), scientific);
                        td.number { (said) }
                        td.chart { (bar(decades(l.error.unwrap_or(0.0)), "bad", &said)) }
                    }
                }
            } }
        } }
    }
}

fn passes(passes: &[PassLine]) -> Markup {
    let (busy, idle): (Vec<_>, Vec<_>) = passes.iter().partition(|p| p.changes > 0 || p.dropped.is_some());
    let refused: Vec<&PassLine> = passes.iter().filter(|p| !p.refusals.is_empty()).collect();
    let places: usize = refused.iter().flat_map(|p| &p.refusals).map(|r| r.count).sum();
    html! {
        h2 { "Passes" }
        p.caption {
            (busy.len()) " of " (passes.len()) " passes changed the model. "
            "An identical pass keeps every bit; an equivalent one computes the same function, rounded differently."
        }
        @if !busy.is_empty() { (pass_table("passes", &busy)) }
        @if !idle.is_empty() {
            details {
                summary { (idle.len()) " passes found nothing to change" }
                (pass_table("idle", &idle))
            }
        }
        @if !refused.is_empty() {
            details #refusals {
                summary { (refused.len()) " passes left " (places) " places alone, and why" }
                @for pass in refused {
                    details {
                        summary { (pass.name) }
                        ul { @for r in &pass.refusals {
                            li {
                                (r.reason)
                                @if r.count > 1 { " (" (r.count) " places)" }
                                span.caption { " for example " code { (r.example) } }
                            }
                        } }
                    }
                }
            }
        }
    }
}

fn pass_table(id: &str, passes: &[&PassLine]) -> Markup {
    let signed = |delta: i64, say: &dyn Fn(u64) -> String| match delta {
        0 => "–".to_owned(),
        d => format!("{}{}", if d < 0 { "−" } else { "+" }, say(d.unsigned_abs())),
    };
    html! {
        div.scroll { table id=(id) {
            thead { tr {
                th { "pass" } th.wide { "claim" } th.number { "changes" } th.number { "nodes" } th.number { "weights" }
                th.number { "FLOPs" } th.number.wide { "error" } th.number.wide { "seconds" }
            } }
            tbody { @for p in passes {
                tr {
                    td.name {
                        (p.name)
                        @if let Some(reason) = &p.dropped { br; span.verdict.bad { "left out" } ": " (reason) }
                    }
                    td.wide { (p.kind) }
                    td.number { (grouped(p.changes as u64)) }
                    td.number { (signed(p.nodes_delta, &grouped)) }
                    td.number { (signed(p.weight_bytes_delta, &mib)) }
                    td.number { (signed(p.flops_delta, &flops)) }
                    td.number.wide { (p.error.map_or("–".to_owned(), scientific)) }
                    td.number.wide { (format!("{:.3}", p.seconds)) }
                }
            } }
        } }
    }
}

/// `1.20e-7`; exact zero says so.
fn scientific(x: f64) -> String {
    match x {
        0.0 => "0".to_owned(),
        x if x.is_finite() => format!("{x:.2e}"),
        _ => "∞".to_owned(),
    }
}

/// Bytes as the unit that suits them; nothing for none.
fn bytes(count: u64) -> String {
    match count {
        0 => "–".to_owned(),
        1..1024 => format!("{count} B"),
        _ => mib(count),
    }
}

/// A change with the sign that is as wide as a plus.
fn minus(change: &str) -> String {
    change.replace('-', "−")
}

/// A name that may be broken behind its separators, and elsewhere only where one part alone is too long.
fn breakable(name: &str) -> Markup {
    html! {
        @for part in name.split_inclusive(['/', '.', '_', ':']) { (part) wbr; }
    }
}

/// FLOPs in the unit that leaves one to three digits before the point.
fn flops(count: u64) -> String {
    let scaled = |unit: f64, name: &str| format!("{:.2} {name}", count as f64 / unit);
    match count {
        0 => "–".to_owned(),
        1..1_000 => grouped(count),
        1_000..1_000_000 => scaled(1e3, "k"),
        1_000_000..1_000_000_000 => scaled(1e6, "M"),
        1_000_000_000..1_000_000_000_000 => scaled(1e9, "G"),
        _ => scaled(1e12, "T"),
    }
}

/// The command line as a shell reads it.
fn shell(command: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    let word = |word: &String| match word.as_str() {
        w if !w.is_empty() && w.chars().all(plain) => w.to_owned(),
        w => format!("'{}'", w.replace('\'', "'\\''")),
    };
    command.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
