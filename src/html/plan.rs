//! The allocator's plan: what was chosen where, what it costs and what it loses.

use super::{charts::bar, flops, scientific};
use crate::report::{Plan, PlanChoice, PlanUnit, grouped, mib};
use maud::{Markup, html};

/// A column of costs: its heading, a choice's cost and how it is written.
type Column = (&'static str, fn(&PlanChoice) -> Option<f64>, fn(f64) -> String);

const COSTS: [Column; 4] = [
    ("bytes", |c| Some(c.cost.bytes as f64), |x| mib(x as u64)),
    ("parameters", |c| Some(c.cost.parameters as f64), |x| grouped(x as u64)),
    ("FLOPs", |c| Some(c.cost.flops as f64), |x| flops(x as u64)),
    ("latency, ms", |c| c.cost.latency_ms, |x| format!("{x:.3}")),
];

/// The section.
pub(super) fn section(plan: &Plan) -> Markup {
    let most = |of: &dyn Fn(&PlanChoice) -> Option<f64>| plan.choices.iter().filter_map(of).fold(0.0, f64::max);
    let share = |x: Option<f64>, most: f64| x.filter(|_| most > 0.0).map_or(0.0, |x| x / most);
    let columns: Vec<&Column> =
        COSTS.iter().filter(|(_, cost, _)| plan.choices.iter().any(|c| cost(c).is_some())).collect();
    let most_error = most(&|c| Some(c.error));
    html! {
        h2 { "Plan" }
        p.caption {
            "Solver " (plan.solver) ", " (plan.status) "; predicted loss " (scientific(plan.objective)) ", lower bound "
            (scientific(plan.bound)) ". Bars are relative to the largest of their column."
        }
        (budget(plan))
        (alternatives(plan))
        (strip(&plan.units))
        @if !plan.choices.is_empty() {
            div.scroll { table #plan {
                thead { tr {
                    th { "site" } th { "option" }
                    @for (heading, ..) in &columns { th.number { (heading) } th { "" } }
                    th.number { "error" } th { "" }
                } }
                tbody { @for choice in &plan.choices {
                    tr {
                        td.name { code { (super::breakable(&choice.site)) } }
                        td { (choice.option) }
                        @for (_, cost, written) in &columns {
                            @let said = cost(choice).map_or("–".to_owned(), written);
                            td.number { (said) }
                            td.chart { (bar(share(cost(choice), most(cost)), "before", &said)) }
                        }
                        @let said = scientific(choice.error);
                        td.number { (said) }
                        td.chart { (bar(share(Some(choice.error), most_error), "bad", &format!("error {said}"))) }
                    }
                } }
            } }
        }
    }
}

/// What other tools would do with every layer alike.
fn alternatives(plan: &Plan) -> Markup {
    if plan.alternatives.is_empty() {
        return html! {};
    }
    html! {
        table #alternatives {
            thead { tr { th { "for every layer" } th.number { "takes" } th.number { "loses" } th { "" } } }
            tbody { @for other in &plan.alternatives {
                @let takes = other.takes.iter().map(|(what, share)| format!("{share:.3} of the {what}"));
                tr {
                    td { (other.name) }
                    td.number { (takes.collect::<Vec<_>>().join(", ")) }
                    td.number { (scientific(other.loses)) }
                    td { (if other.measured { "measured" } else { "predicted" }) (if other.keeps { "" } else { ", beyond the budget" }) }
                }
            } }
        }
    }
}

/// The units of the model in order, as wide as their share of its operations, and what each got.
fn strip(units: &[PlanUnit]) -> Markup {
    if units.is_empty() {
        return html! {};
    }
    let class = |got: &[String]| match got {
        [] => "kept",
        all if all.iter().any(|o| o.starts_with("leave out")) => "gone",
        _ => "changed",
    };
    let said = |unit: &PlanUnit| {
        let what = if unit.got.is_empty() { "as it is".to_owned() } else { unit.got.join(", ") };
        let name = unit.unit.as_deref().unwrap_or("outside of units");
        format!("{name} ({}, {:.1} % of FLOPs): {what}", unit.kind, unit.flops_share * 100.0)
    };
    let width = |unit: &PlanUnit| format!("flex-grow:{:.2}", (unit.flops_share * 1000.0).max(1.0));
    html! {
        p.caption {
            "The model from first to last unit, each as wide as its share of the FLOPs: "
            span.key.gone {} " left out, " span.key.changed {} " changed, " span.key.kept {} " as it is."
        }
        ol #strip { @for unit in units {
            li class=(class(&unit.got)) style=(width(unit)) title=(said(unit)) {
                span { (unit.kind.chars().next().unwrap_or('·')) }
            }
        } }
        details {
            summary { "What each unit got" }
            ul { @for unit in units { li { (said(unit)) } } }
        }
    }
}

/// What was allowed of every limited quantity beside what the result takes.
fn budget(plan: &Plan) -> Markup {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    html! {
        table #budget {
            thead { tr {
                th { "budget" } th.number { "allowed" } th.number { "" } th.number { "used" } th.number { "" } th { "" }
            } }
            tbody { @for (key, row) in &plan.budget {
                @let part = if row.allowed > 0.0 { row.used / row.allowed } else { 0.0 };
                @let class = if row.used > row.allowed { "bad" } else { "after" };
                tr {
                    td { (heading(key)) }
                    td.number { (quantity(key, row.allowed)) }
                    td.number { (percent(row.limit)) }
                    td.number { (quantity(key, row.used)) }
                    td.number { (percent(row.share)) }
                    td.chart { (bar(part, class, &format!("{} of what is allowed", percent(part)))) }
                }
            } }
        }
    }
}

/// A limited quantity as people write it.
fn heading(key: &str) -> &str {
    match key {
        "flops" => "FLOPs",
        "latency" => "latency, ms",
        other => other,
    }
}

/// A figure of a limited quantity.
fn quantity(key: &str, x: f64) -> String {
    match key {
        "size" => mib(x as u64),
        "flops" => flops(x as u64),
        "latency" => format!("{x:.3}"),
        _ => grouped(x as u64),
    }
}
