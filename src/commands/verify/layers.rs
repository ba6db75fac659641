//! `optimize verify --layers`: which value is the first that differs, and which node is it?

use crate::runner::Runner;
use lathe_runtime::{Alone, LayersJob, LayersReport, ValueLine, quarter_of_memory};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Values beyond their bound that are shown; the others are counted, and all of them are in the JSON.
const SHOWN: usize = 8;

/// Bytes that values of one model may take at a time, unless runs may take less.
const MOST_BYTES: u64 = 1 << 30;

/// Bytes for values at a time where runs may take `memory`.
pub(super) fn bytes(memory: Option<u64>) -> u64 {
    // Both models hold theirs, and what is compared is widened.
    memory.unwrap_or_else(|| 4 * quarter_of_memory()).min(8 * MOST_BYTES) / 8
}

/// What was found, for programs and for people.
pub(super) struct Found {
    pub json: Value,
    pub text: String,
    /// The node that is proven to compute something else.
    pub culprit: Option<String>,
}

/// Compares two models value by value.
pub(super) fn compare(runner: &Runner, job: LayersJob) -> anyhow::Result<Found> {
    let report = runner.child().layers(job)?;
    let culprit = report.culprit().map(|culprit| culprit.node.clone());
    Ok(Found { json: as_json(&report), text: text(&report), culprit })
}

fn as_json(report: &LayersReport) -> Value {
    json!({
        "engine": report.engine, "inputs": report.inputs, "values": report.values, "left_out": report.left_out,
        "first": report.first().map(|line| &line.value),
        "first_special": report.first_special().map(|line| &line.value),
        "culprits": report.culprits, "culprit": report.culprit().map(|culprit| &culprit.node),
    })
}

fn text(report: &LayersReport) -> String {
    let beyond: Vec<&ValueLine> = report.values.iter().filter(|line| line.fault.is_some()).collect();
    let mut out = format!(
        "layers: {} of {} values are beyond their bound on {}\n",
        beyond.len(),
        report.values.len(),
        report.inputs
    );
    for (index, found) in beyond.iter().take(SHOWN).enumerate() {
        let _ = writeln!(out, "  {}{}", if index == 0 { "first: " } else { "" }, line(found));
    }
    if beyond.len() > SHOWN {
        let _ = writeln!(out, "  and {} more (--json lists all)", beyond.len() - SHOWN);
    }
    if let Some(found) = report.first_special() {
        let (before, after) = (found.special_before, found.special_after);
        let _ = writeln!(
            out,
            "  NaN or infinities begin in `{}` by {}: {after} elements, {before} in the original",
            found.value, found.node
        );
    }
    for culprit in &report.culprits {
        let _ = match &culprit.alone {
            Alone::Ran { fault: Some(fault), .. } => writeln!(
                out,
                "  {} alone, on the inputs that the original computes for it, differs too: {fault}",
                culprit.node
            ),
            Alone::Ran { rel_l2, fault: None } => writeln!(
                out,
                "  {} alone, on the inputs that the original computes for it, is right (rel L2 {rel_l2:.1e}): earlier \
                 differences add up in it",
                culprit.node
            ),
            Alone::NotRun(why) => writeln!(out, "  {} could not be run alone: {why}", culprit.node),
        };
    }
    match (report.culprit(), beyond.is_empty()) {
        (Some(culprit), _) => _ = writeln!(out, "  so {} is the node to look at", culprit.node),
        (None, false) => out.push_str("  no single node is proven to compute something else\n"),
        (None, true) => {}
    }
    for left_out in &report.left_out {
        let _ = writeln!(out, "  not compared: {left_out}");
    }
    out
}

fn line(found: &ValueLine) -> String {
    let sizes: Vec<String> = found.dims.iter().map(ToString::to_string).collect();
    let fault = found.fault.as_deref().unwrap_or_default();
    format!("`{}` [{}] by {}: {fault}", found.value, sizes.join(", "), found.node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantities::size;
    use lathe_runtime::Culprit;

    fn value(name: &str, node: &str, fault: Option<&str>) -> ValueLine {
        ValueLine {
            value: name.to_owned(),
            node: node.to_owned(),
            dims: vec![1, 8],
            rel_l2: 0.5,
            max_abs: 1.0,
            limit: Some(1e-4),
            special_before: 0,
            special_after: usize::from(fault.is_some()),
            fault: fault.map(str::to_owned),
        }
    }

    #[test]
    fn the_node_that_is_proven_wrong_is_said_last() {
        let fault = Some("the relative L2 error is 5.000e-1, the limit 1.0e-4");
        let alone = Alone::Ran { rel_l2: 0.5, fault: fault.map(str::to_owned) };
        let report = LayersReport {
            inputs: "random inputs".to_owned(),
            values: vec![value("a", "`one` (Relu)", None), value("b", "`two` (Exp)", fault)],
            culprits: vec![Culprit { node: "`two` (Exp)".to_owned(), value: "b".to_owned(), alone }],
            ..LayersReport::default()
        };
        insta::assert_snapshot!(text(&report), @r"
        layers: 1 of 2 values are beyond their bound on random inputs
          first: `b` [1, 8] by `two` (Exp): the relative L2 error is 5.000e-1, the limit 1.0e-4
          NaN or infinities begin in `b` by `two` (Exp): 1 elements, 0 in the original
          `two` (Exp) alone, on the inputs that the original computes for it, differs too: the relative L2 error is 5.000e-1, the limit 1.0e-4
          so `two` (Exp) is the node to look at
        ");
        assert_eq!(as_json(&report)["culprit"], "`two` (Exp)");
    }

    #[test]
    fn little_memory_means_few_values_at_a_time() {
        assert_eq!(bytes(Some(size("800MB").unwrap())), 100 << 20);
        assert!(bytes(None) <= MOST_BYTES);
    }
}
