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
        (strip(plan))
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

/// The units of the model in order, as wide as their share of its operations, and what each got.
fn strip(plan: &Value) -> Markup {
    let Some(units) = plan.get("units").and_then(Value::as_array).filter(|u| !u.is_empty()) else { return html! {} };
    let text = |unit: &Value, key: &str| unit.get(key).and_then(Value::as_str).unwrap_or("outside of units").to_owned();
    let got = |unit: &Value| -> Vec<String> {
        let all = unit.get("got").and_then(Value::as_array).into_iter().flatten();
        all.filter_map(|g| g.as_str().map(str::to_owned)).collect()
    };
    let share = |unit: &Value| unit.get("flops_share").and_then(Value::as_f64).unwrap_or(0.0);
    let class = |got: &[String]| match got {
        [] => "kept",
        all if all.iter().any(|o| o.starts_with("leave out")) => "gone",
        _ => "changed",
    };
    let said = |unit: &Value| {
        let got = got(unit);
        let what = if got.is_empty() { "as it is".to_owned() } else { got.join(", ") };
        format!("{} ({}, {:.1} % of FLOPs): {what}", text(unit, "unit"), text(unit, "kind"), share(unit) * 100.0)
    };
    html! {
        p.caption {
            "The model from first to last unit, each as wide as its share of the FLOPs: "
            span.key.gone {} " left out, " span.key.changed {} " changed, " span.key.kept {} " as it is."
        }
        ol #strip { @for unit in units {
            @let got = got(unit);
            li class=(class(&got)) style=(format!("flex-grow:{:.2}", (share(unit) * 1000.0).max(1.0))) title=(said(unit)) {
                span { (text(unit, "kind").chars().next().unwrap_or('·')) }
            }
        } }
        details {
            summary { "What each unit got" }
            ul { @for unit in units { li { (said(unit)) } } }
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
