//! The allocator's plan: what was chosen where, what it costs and what it loses.

use super::{charts::bar, scientific};
use crate::report::{grouped, mib};
use maud::{Markup, html};
use serde_json::Value;

/// The section; `plan` is the object of the JSON report.
pub(super) fn section(plan: &Value) -> Markup {
    let text = |key: &str| plan.get(key).and_then(Value::as_str).unwrap_or("–");
    let number = |key: &str| plan.get(key).and_then(Value::as_f64).map_or("–".to_owned(), scientific);
    let none = Vec::new();
    let choices = plan.get("choices").and_then(Value::as_array).unwrap_or(&none);
    // One column for every quantity that some choice costs, in the order of first appearance.
    let mut costs: Vec<&str> = Vec::new();
    for (key, value) in choices.iter().filter_map(|c| c.get("cost")?.as_object()).flatten() {
        if value.is_number() && !costs.contains(&key.as_str()) {
            costs.push(key);
        }
    }
    let cost = |choice: &Value, key: &str| choice.get("cost").and_then(|c| c.get(key)).and_then(Value::as_f64);
    let error = |choice: &Value| choice.get("error").and_then(Value::as_f64);
    let most = |of: &dyn Fn(&Value) -> Option<f64>| choices.iter().filter_map(of).fold(0.0, f64::max);
    let most_error = most(&error);
    let share = |x: Option<f64>, most: f64| x.filter(|_| most > 0.0).map_or(0.0, |x| x / most);
    html! {
        h2 { "Plan" }
        p.caption {
            "Solver " (text("solver")) ", " (text("status")) "; predicted loss " (number("objective")) ", lower bound "
            (number("bound")) ". Bars are relative to the largest of their column."
        }
        (budget(plan))
        @if !choices.is_empty() {
            div.scroll { table #plan {
                thead { tr {
                    th { "site" } th { "option" }
                    @for key in &costs { th.number { (heading(key)) } th { "" } }
                    th.number { "error" } th { "" }
                } }
                tbody { @for choice in choices {
                    tr {
                        td.name { code { (super::breakable(choice.get("site").and_then(Value::as_str).unwrap_or("–"))) } }
                        td { (choice.get("option").and_then(Value::as_str).unwrap_or("–")) }
                        @for key in &costs {
                            @let x = cost(choice, key);
                            @let said = x.map_or("–".to_owned(), |x| quantity(key, x));
                            td.number { (said) }
                            td.chart { (bar(share(x, most(&|c| cost(c, key))), "before", &said)) }
                        }
                        @let said = error(choice).map_or("–".to_owned(), scientific);
                        td.number { (said) }
                        td.chart { (bar(share(error(choice), most_error), "bad", &format!("error {said}"))) }
                    }
                } }
            } }
        }
    }
}

/// What was allowed beside what is used.
fn budget(plan: &Value) -> Markup {
    let object = |key: &str| plan.get(key).and_then(Value::as_object);
    let Some(budget) = object("budget") else { return html! {} };
    let used = |key: &str| object("used").and_then(|u| u.get(key)).and_then(Value::as_f64);
    html! {
        table #budget {
            thead { tr { th { "budget" } th.number { "allowed" } th.number { "used" } th { "" } } }
            tbody { @for (key, allowed) in budget {
                @let allowed = allowed.as_f64();
                @let said = |x: Option<f64>| x.map_or("–".to_owned(), |x| quantity(key, x));
                @let share = used(key).zip(allowed).map_or(0.0, |(u, a)| if a > 0.0 { u / a } else { 0.0 });
                tr {
                    td { (heading(key)) }
                    td.number { (said(allowed)) }
                    td.number { (said(used(key))) }
                    td.chart { (bar(share, if share > 1.0 { "bad" } else { "after" }, &format!("{:.1} % used", share * 100.0))) }
                }
            } }
        }
    }
}

/// A key of the JSON report as words.
fn heading(key: &str) -> String {
    key.replace('_', " ")
}

/// A number with the unit that its key names.
fn quantity(key: &str, x: f64) -> String {
    let whole = x >= 1.0 && x.fract() == 0.0 && x < u64::MAX as f64;
    match key {
        key if key.contains("bytes") && whole => mib(x as u64),
        key if key.ends_with("flops") && whole => super::flops(x as u64),
        key if key.ends_with("_ms") || key == "latency" => format!("{x:.3}"),
        _ if whole => grouped(x as u64),
        _ if x.abs() >= 1e-3 || x == 0.0 => format!("{x:.4}"),
        _ => scientific(x),
    }
}
