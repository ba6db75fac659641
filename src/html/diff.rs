//! What differs between two models, as a page.

use super::{breakable, document};
use crate::{
    diff::{Diff, NodeLine, WeightLine},
    report::{grouped, mib, rows},
};
use maud::{Markup, html};

/// The whole page.
pub(crate) fn page(diff: &Diff) -> String {
    let there = |side: &Option<String>| side.clone().unwrap_or_else(|| "–".to_owned());
    let (nodes, weights) = (&diff.nodes, &diff.weights);
    let changed = weights.changed.iter().map(|weight| {
        let number = |x: Option<f64>| x.map_or_else(|| "–".to_owned(), |x| format!("{x:.2e}"));
        let share = weight.share.map_or_else(|| "–".to_owned(), |share| format!("{:.1} %", share * 100.0));
        let ty = if weight.a == weight.b { weight.b.clone() } else { format!("{} → {}", weight.a, weight.b) };
        vec![weight.name.clone(), ty, number(weight.rel_l2), number(weight.max_abs), share]
    });
    let node = |node: &NodeLine| vec![node.op.clone(), node.output.clone()];
    let weight = |weight: &WeightLine| vec![weight.name.clone(), weight.ty.clone(), mib(weight.bytes as u64)];
    document(
        "Differences",
        html! {
            header {
                h1 { "Differences" }
                p {
                    @if diff.equal { span.verdict.good { "The models are equal." } } @else { span.verdict { "The models differ." } }
                    " From " code.name { (diff.a.path) } " to " code.name { (diff.b.path) } "."
                }
            }
            main {
                (table("Figures", ["", "first", "second", "change"].as_ref(), rows(&diff.a, &diff.b).into_iter().map(Vec::from)))
                (table("Inputs and outputs", ["", "name", "first", "second"].as_ref(), diff.interface.iter().map(|port| {
                    vec![port.kind.to_owned(), port.name.clone(), there(&port.a), there(&port.b)]
                })))
                (table("Properties", ["", "first", "second"].as_ref(), diff.properties.iter().map(|property| {
                    vec![property.name.clone(), there(&property.a), there(&property.b)]
                })))
                (table("Operators", ["", "first", "second"].as_ref(), diff.operators.iter().map(|count| {
                    vec![count.op.clone(), grouped(count.a as u64), grouped(count.b as u64)]
                })))
                (table("Nodes that changed", ["operator", "output", "what"].as_ref(), nodes.changed.iter().map(|node| {
                    vec![node.op.clone(), node.output.clone(), node.what.join(", ")]
                })))
                (table("Nodes only in the first", ["operator", "output"].as_ref(), nodes.only_a.iter().map(node)))
                (table("Nodes only in the second", ["operator", "output"].as_ref(), nodes.only_b.iter().map(node)))
                (table("Constants that changed", ["name", "type", "of its norm", "at most", "numbers"].as_ref(), changed))
                (table("Constants with another name", ["first", "second"].as_ref(), weights.renamed.iter().map(|renamed| {
                    vec![renamed.a.clone(), renamed.b.clone()]
                })))
                (table("Constants only in the first", ["name", "type", "bytes"].as_ref(), weights.only_a.iter().map(weight)))
                (table("Constants only in the second", ["name", "type", "bytes"].as_ref(), weights.only_b.iter().map(weight)))
            }
        },
    )
}

/// A title and a table; nothing where it has no row.
fn table(title: &str, heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Markup {
    let rows: Vec<Vec<String>> = rows.collect();
    html! {
        @if !rows.is_empty() {
            h2 { (title) }
            table {
                thead { tr { @for head in heads { th scope="col" { (head) } } } }
                tbody { @for row in &rows { tr { @for cell in row { td { (breakable(cell)) } } } } }
            }
        }
    }
}
