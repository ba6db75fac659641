//! In which numbers the result computes and keeps its caches: half precision, and quantized key-value caches.

use super::scientific;
use crate::report::{CacheReport, KeptNode, PrecisionReport, QuantizationReport, grouped};
use maud::{Markup, html};
use std::collections::BTreeMap;

/// The section about half precision.
pub(super) fn precision(report: &PrecisionReport) -> Markup {
    let error = report.simulated_error.map_or_else(|| "not simulated".to_owned(), scientific);
    let ranges = if report.ranges == "not proven" { "not proven (--calib measures them)" } else { &report.ranges };
    html! {
        h2 { "Half precision" }
        p.caption {
            (report.dtype) @if report.interface { ", inputs and outputs too" } ". The error is the largest relative L2 error of an "
            "output where every value is rounded as the file says."
        }
        table #precision {
            tbody {
                tr { td { "nodes in " (report.dtype) } td.number { (grouped(report.nodes as u64)) } }
                tr { td { "nodes in float32" } td.number { (grouped(report.kept.len() as u64)) } }
                tr { td { "casts added" } td.number { (report.casts) } }
                tr { td { "casts dropped" } td.number { (report.dropped_casts) } }
                tr { td { "error of the simulation" } td.number { (error) } }
                tr { td { "limit" } td.number { (scientific(report.limit)) } }
                tr { td { "ranges" } td { (ranges) } }
                @match (&report.loaded, &report.refused_by_runtime) {
                    (Some(engine), _) => tr { td { "loaded by" } td { (engine) } },
                    (None, Some(message)) => tr { td { "not loaded" } td { (message) } },
                    (None, None) => {}
                }
                @for mask in &report.masks { tr { td { "mask of smaller numbers" } td.name { code { (super::breakable(mask)) } } } }
            }
        }
        (reasons("kept", "stays in float32 because", &report.kept))
    }
}

/// The section about caches.
pub(super) fn caches(report: &CacheReport) -> Markup {
    html! {
        h2 { "Key-value caches" }
        p.caption {
            (report.dtype) " with scales " (report.scales) " in " (grouped(report.nodes as u64)) " attentions; a position of a sequence takes "
            (grouped(report.bytes_after)) " bytes in place of " (grouped(report.bytes_before)) "."
            @if let Some(compared) = &report.compared { " Compared with those of the original " (compared) "." }
        }
        div.scroll { table #caches {
            thead { tr { th { "input or output" } th { "before" } th { "after" } } }
            tbody { @for port in &report.ports {
                tr { td.name { code { (super::breakable(&port.name)) } } td { code { (port.before) } } td { code { (port.after) } } }
            } }
        } }
        (reasons("cacheskept", "keeps its cache because", &report.kept))
    }
}

/// The section about layers in whole numbers.
pub(super) fn quantization(report: &QuantizationReport) -> Markup {
    html! {
        h2 { "Whole numbers" }
        p.caption {
            "Layers that read codes of fixed ranges, placed for " (report.recipe) "."
            @if report.recipe == "cpu" { " Here " (report.processor()) "." }
        }
        table #quantization {
            tbody {
                tr { td { "layers that read codes" } td.number { (grouped(report.layers as u64)) } }
                tr { td { "layers that read floats" } td.number { (grouped(report.kept.len() as u64)) } }
                tr { td { "multiply-adds in whole numbers" } td.number { (format!("{:.1} %", 100.0 * report.share)) } }
                tr { td { "largest code of a weight" } td.number { (report.largest_code) } }
                @if let Some(fused) = &report.fused {
                    @for (kernel, count) in &fused.kernels { tr { td { code { (kernel) } } td.number { (count) } } }
                    tr { td { code { "QuantizeLinear" } " outside of kernels" } td.number { (fused.quantize.len()) } }
                    tr { td { code { "DequantizeLinear" } " outside of kernels" } td.number { (fused.dequantize.len()) } }
                }
            }
        }
        (reasons("floats", "reads floats because", &report.kept))
    }
}

/// Nodes by the reason for which they stay as they are, the most frequent first.
fn reasons(id: &str, heading: &str, kept: &[KeptNode]) -> Markup {
    let mut by_reason: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for node in kept {
        by_reason.entry(&node.reason).or_insert((0, &node.node)).0 += 1;
    }
    let mut rows: Vec<(&str, (usize, &str))> = by_reason.into_iter().collect();
    rows.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
    html! {
        @if !rows.is_empty() {
            div.scroll { table id=(id) {
                thead { tr { th { (heading) } th.number { "nodes" } th { "for example" } } }
                tbody { @for (reason, (count, example)) in rows {
                    tr { td { (reason) } td.number { (count) } td.name { (example) } }
                } }
            } }
        }
    }
}
