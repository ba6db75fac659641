//! What `--auto` tried: every run by what it keeps and what it loses, those that no other beats joined by a line.

use super::{document, scientific};
use crate::report::{AutoPoint, AutoReport};
use maud::{Markup, html};
use std::path::Path;

/// Width and height of the drawing, and what is left free for the scales, in its own units.
const SIZE: (f64, f64) = (640.0, 300.0);
const LEFT: f64 = 70.0;
const BELOW: f64 = 44.0;
const ABOVE: f64 = 12.0;

/// Marks on a scale, its ends included.
const MARKS: usize = 4;

/// A page of its own for a folder of models.
pub(crate) fn page(name: &str, auto: &AutoReport) -> String {
    let body = html! {
        header {
            h1 { (name) }
            p { "Models that no other beats in both what is kept and what is lost; each has a report beside it." }
        }
        main { (section(auto)) }
        footer { "onnx-lathe " (env!("CARGO_PKG_VERSION")) }
    };
    document(name, body)
}

/// The section of a report.
pub(super) fn section(auto: &AutoReport) -> Markup {
    let metric = auto.points.iter().find_map(|point| point.metric.as_deref()).unwrap_or("the metric");
    html! {
        h2 { "What was tried" }
        p.caption {
            "Share of the " (auto.measure) " that is kept, and the drop of " (metric) " on held-out samples"
            @if let Some(limit) = auto.limit { "; the dashed line is the largest drop that is allowed, " (limit) }
            ". Hover over a point for its figures."
        }
        (drawing(auto))
        (table(auto, metric))
    }
}

/// The shares and drops of runs that have both.
fn drawn(auto: &AutoReport) -> Vec<(&AutoPoint, f64, f64)> {
    let both = |point: &'_ AutoPoint| point.ratio.zip(point.drop);
    let finite = |(_, ratio, drop): &(_, f64, f64)| ratio.is_finite() && drop.is_finite();
    auto.points
        .iter()
        .filter_map(|point| both(point).map(|(ratio, drop)| (point, ratio, drop)))
        .filter(finite)
        .collect()
}

fn drawing(auto: &AutoReport) -> Markup {
    let drawn = drawn(auto);
    if drawn.is_empty() {
        return html! {};
    }
    let fold = |of: &dyn Fn(&(&AutoPoint, f64, f64)) -> f64, start: f64, pick: fn(f64, f64) -> f64| {
        drawn.iter().map(of).fold(start, pick)
    };
    let limit = auto.limit.filter(|limit| limit.is_finite());
    let shares = (fold(&|d| d.1, 1.0, f64::min), fold(&|d| d.1, 1.0, f64::max));
    let drops = (fold(&|d| d.2, 0.0, f64::min), fold(&|d| d.2, limit.unwrap_or(0.0), f64::max));
    let place =
        |value: f64, (least, most): (f64, f64)| if most > least { (value - least) / (most - least) } else { 0.5 };
    let x = |share: f64| LEFT + place(share, shares) * (SIZE.0 - LEFT - 12.0);
    let y = |drop: f64| SIZE.1 - BELOW - place(drop, drops) * (SIZE.1 - BELOW - ABOVE);
    let mut front: Vec<(f64, f64)> = drawn.iter().filter(|d| d.0.front).map(|d| (d.1, d.2)).collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0));
    let path: Vec<String> = front.iter().map(|&(share, drop)| format!("{:.1},{:.1}", x(share), y(drop))).collect();
    let mark = |(least, most): (f64, f64), k: usize| least + (most - least) * k as f64 / MARKS as f64;
    let view = format!("0 0 {} {}", SIZE.0, SIZE.1);
    html! {
        svg.front viewBox=(view) role="img" aria-label="Share kept and drop of every run" {
            @for k in 0..=MARKS {
                @let (share, drop) = (mark(shares, k), mark(drops, k));
                line.grid x1=(LEFT) x2=(SIZE.0 - 12.0) y1=(y(drop)) y2=(y(drop)) {}
                text.end x=(LEFT - 8.0) y=(y(drop) + 4.0) { (short(drop)) }
                text.middle x=(x(share)) y=(SIZE.1 - BELOW + 18.0) { (format!("{share:.2}")) }
            }
            text.middle x=((LEFT + SIZE.0) / 2.0) y=(SIZE.1 - 6.0) { "share of the " (auto.measure) }
            @if let Some(limit) = limit {
                line.limit x1=(LEFT) x2=(SIZE.0 - 12.0) y1=(y(limit)) y2=(y(limit)) {}
            }
            polyline points=(path.join(" ")) {}
            @for (point, share, drop) in &drawn {
                @let class = if point.chosen { "chosen" } else if point.front { "best" } else { "other" };
                circle class=(class) cx=(format!("{:.1}", x(*share))) cy=(format!("{:.1}", y(*drop))) r="6" tabindex="0" {
                    title { (told(point, *share, *drop, &auto.measure)) }
                }
            }
        }
    }
}

/// A number of a scale.
fn short(number: f64) -> String {
    if number == 0.0 {
        "0".to_owned()
    } else if number.abs() >= 1e-3 {
        format!("{number:.3}")
    } else {
        scientific(number)
    }
}

fn told(point: &AutoPoint, share: f64, drop: f64, measure: &str) -> String {
    let asked = point.share.map(|share| format!(", asked for {share:.2}")).unwrap_or_default();
    format!("{}{asked}: {share:.3} of the {measure}, drop {drop:.4}, {:.0} s", point.recipe, point.seconds)
}

fn table(auto: &AutoReport, metric: &str) -> Markup {
    let number = |x: Option<f64>| x.map_or_else(|| "–".to_owned(), |x| format!("{x:.3}"));
    html! {
        div.scroll { table #tried {
            thead { tr {
                th { "recipe" } th.number { "asked" } th.number { (auto.measure) } th.number { "drop of " (metric) }
                th.number { "size" } th.number { "FLOPs" } th.number { "latency" } th.number { "seconds" } th { "model" }
            } }
            tbody { @for point in &auto.points {
                tr {
                    td { (point.recipe) @if point.chosen { " (the result)" } }
                    td.number { (number(point.share)) }
                    td.number { (number(point.ratio)) }
                    td.number { (point.drop.map_or_else(|| "–".to_owned(), |drop| format!("{drop:.4}"))) }
                    td.number { (number(point.size_ratio)) }
                    td.number { (number(point.flops_ratio)) }
                    td.number { (number(point.latency_ratio)) }
                    td.number { (format!("{:.0}", point.seconds)) }
                    td.name {
                        @if let Some(reason) = &point.refused { (reason) }
                        @else if let Some(file) = &point.file { (links(file)) }
                        @else if !point.front { "beaten" }
                    }
                }
            } }
        } }
    }
}

/// The model and its report, which lie beside the page of the folder.
fn links(file: &str) -> Markup {
    let name = Path::new(file).file_name().map_or_else(|| file.to_owned(), |name| name.to_string_lossy().into_owned());
    let report = Path::new(&name).with_extension("json").display().to_string();
    html! { a href=(name) { (name) } " · " a href=(report) { "report" } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scraper::{Html, Selector};

    fn point(recipe: &str, ratio: Option<f64>, drop: Option<f64>, front: bool) -> AutoPoint {
        AutoPoint {
            recipe: recipe.to_owned(),
            share: Some(0.5),
            ratio,
            drop,
            metric: Some("accuracy".to_owned()),
            latency_ratio: None,
            size_ratio: ratio,
            flops_ratio: None,
            seconds: 3.0,
            front,
            chosen: false,
            refused: ratio.is_none().then(|| "the drop of `<b>` is too large".to_owned()),
            file: front.then(|| format!("front/{recipe}.onnx")),
        }
    }

    #[test]
    fn every_run_is_a_point_or_a_reason() {
        let points = vec![
            point("exact", Some(1.0), Some(0.0), true),
            point("all", Some(0.5), Some(0.01), true),
            point("rounding", Some(0.7), Some(0.02), false),
            point("pruning", None, None, false),
        ];
        let auto = AutoReport { family: String::new(), measure: "size".to_owned(), limit: Some(0.015), points };
        let html = Html::parse_document(&page("vit", &auto));
        let all = |selector: &str| html.select(&Selector::parse(selector).unwrap()).count();
        assert_eq!((all("circle.best"), all("circle.other"), all("circle.chosen")), (2, 1, 0));
        assert_eq!((all("line.limit"), all("#tried tbody tr"), all("#tried b")), (1, 4, 0));
        let links: Vec<_> = html.select(&Selector::parse("#tried a").unwrap()).filter_map(|a| a.attr("href")).collect();
        assert_eq!(links, ["exact.onnx", "exact.json", "all.onnx", "all.json"]);
        let line = html.select(&Selector::parse("polyline").unwrap()).next().unwrap();
        // The smaller share is on the left, the smaller drop below.
        let corners: Vec<f64> = line.attr("points").unwrap().split([' ', ',']).map(|n| n.parse().unwrap()).collect();
        assert!(corners[0] < corners[2] && corners[1] < corners[3], "{corners:?}");
    }
}
