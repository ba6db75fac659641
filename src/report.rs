//! The report: what went in, what every pass did, what came out. The names are a contract with other programs.

mod auto;
mod kv_cache;
mod plan;
mod precision;
mod quantization;
mod scores;

pub use auto::{AutoPoint, AutoReport};
pub use kv_cache::{CachePort, CacheReport};
pub use plan::{Alternative, BudgetRow, Plan, PlanChoice, PlanCost, PlanUnit, SitesTake};
pub use precision::{KeptNode, PrecisionReport};
pub use quantization::{FusedKernels, QuantizationReport};
pub use scores::OutputScores;

use crate::{Latency, layers::LayerLine};
use lathe_passes::Quantity;
use lathe_runtime::{ChosenSamples, Excuse, metric_columns};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt::Write as _;

/// One model as the report counts it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Side {
    /// The file.
    pub path: String,
    /// Bytes of the file and of its external data.
    pub file_bytes: u64,
    /// Bytes of all constants.
    pub weight_bytes: u64,
    /// Nodes of the main graph.
    pub nodes: u64,
    /// Nodes of the main graph, of every subgraph and of every local function.
    pub nodes_total: u64,
    /// Elements of all constants.
    pub parameters: u64,
    /// Floating-point operations of one run; 1 multiply-add is 2.
    pub flops: u64,
    /// The largest sum of live activations, in bytes.
    pub peak_activation_bytes: u64,
    /// The version of the standard operator set.
    pub opset: i64,
}

impl Side {
    /// What it takes of a quantity that is counted; `None` for time, which is measured.
    pub(crate) fn figure(&self, quantity: Quantity) -> Option<u64> {
        match quantity {
            Quantity::Size => Some(self.file_bytes),
            Quantity::Parameters => Some(self.parameters),
            Quantity::Flops => Some(self.flops),
            Quantity::Latency => None,
        }
    }
}

/// Why a pass left places alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    /// The reason.
    pub reason: String,
    /// At how many places.
    pub count: usize,
    /// One of them.
    pub example: String,
}

/// What one pass did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PassLine {
    /// The pass.
    pub name: String,
    /// `identical`, `equivalent` or `lossy`.
    pub kind: String,
    /// How many edits it made.
    pub changes: usize,
    /// What it left alone.
    pub refusals: Vec<Refusal>,
    /// Time spent in it.
    pub seconds: f64,
    /// Change of the number of nodes.
    pub nodes_delta: i64,
    /// Change of the bytes of all constants.
    pub weight_bytes_delta: i64,
    /// Change of the floating-point operations.
    pub flops_delta: i64,
    /// The largest relative L2 error measured right after it; `null` where nothing was run.
    pub error: Option<f64>,
    /// Why it was left out, if it was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dropped: Option<String>,
}

/// How far one output is from the original's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutputLine {
    /// The output.
    pub name: String,
    /// What was measured on it: `max_abs`, `rel_l2` and `cosine`, and for some outputs and sets `top1`, `kl`, `snr`, `psnr`
    /// and `ssim`, as [`lathe_runtime::metrics`] explains them.
    #[serde(flatten)]
    pub scores: OutputScores,
    /// The bound on the relative L2 error that the output was held to; `null` where all has to be the same, and for sets.
    #[serde(default)]
    pub limit: Option<f64>,
    /// What was measured on the original and accounts for an error beyond the bound.
    #[serde(default)]
    pub excuse: Option<Excuse>,
    /// Why only type and shape were compared, and not the values.
    #[serde(default)]
    pub uncompared: Option<String>,
}

/// JSON has no infinity, so it is written as `null`.
fn null_is_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// The run of the result beside the original.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verify {
    /// `random`, `calibration` or `validation`.
    pub set: String,
    /// How many sets of inputs were run.
    pub samples: usize,
    /// What is bounded: the metric of a set, else `rel-l2`, or `bits` where every pass claims identical results.
    pub metric: String,
    /// Why this metric, where the program chose it.
    #[serde(default)]
    pub why: Option<String>,
    /// The metric of the original; `null` is infinite.
    #[serde(deserialize_with = "null_is_infinite")]
    pub before: f64,
    /// The metric of the result; `null` is infinite.
    #[serde(deserialize_with = "null_is_infinite")]
    pub after: f64,
    /// The loss, positive where the result is worse; `null` is infinite.
    #[serde(deserialize_with = "null_is_infinite")]
    pub drop: f64,
    /// The bound on the loss; `null` where none was set. Of errors by output, the bound of the output `worst`.
    #[serde(deserialize_with = "null_is_infinite")]
    pub limit: f64,
    /// The output whose error is largest beside its bound, where outputs are held to bounds.
    #[serde(default)]
    pub worst: Option<String>,
    /// Whether the bound holds.
    pub passed: bool,
    /// What the numbers are made of: `9178 of 10000 labels before, 9177 after`.
    #[serde(default)]
    pub detail: Option<String>,
    /// Who ran the models.
    pub runtime: String,
    /// The sizes of open dimensions in each run, and what is unusual about its values.
    pub sizes: Vec<String>,
    /// Edges of sizes and types that were not compared, and why: most often the original does not run there.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// What could not be compared and what passes beyond its bound, with the numbers that were measured; or `null`.
    pub note: Option<String>,
    /// Every output.
    pub outputs: Vec<OutputLine>,
}

/// Everything about one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The version of the program.
    pub version: String,
    /// The command line.
    pub command: Vec<String>,
    /// The seed of random inputs.
    pub seed: u64,
    /// The calibration samples that `--calib-select` chose; not there without it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibration: Option<ChosenSamples>,
    /// The model that was read.
    pub input: Side,
    /// The model that was written.
    pub output: Side,
    /// Every pass that ran, in order.
    pub passes: Vec<PassLine>,
    /// The allocator's plan; `null` without a budget.
    pub plan: Option<Plan>,
    /// What `--auto` tried; not there without it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub auto: Option<AutoReport>,
    /// The conversion to half precision; not there without `--dtype`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub precision: Option<PrecisionReport>,
    /// Key-value caches in other numbers; not there without `--kv-cache`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kv_cache: Option<CacheReport>,
    /// Layers that compute in whole numbers of fixed ranges; not there without any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub quantization: Option<QuantizationReport>,
    /// The run beside the original; `null` with `--no-verify`.
    pub verify: Option<Verify>,
    /// The measured latency; `null` where it was not measured.
    pub latency: Option<Latency>,
    /// The nodes of the result with the largest share of FLOPs or weights, in the model's order.
    #[serde(default)]
    pub layers: Vec<LayerLine>,
    /// What was odd about the input.
    pub warnings: Vec<String>,
    /// Time of the whole run.
    pub seconds: f64,
    /// The largest resident memory of this process.
    pub peak_rss_bytes: u64,
}

impl Report {
    /// The report as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has only names and numbers")
    }

    /// The report as Markdown.
    pub fn to_markdown(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        line(format!("# {}", self.output.path));
        line(format!("\n`{}` (onnx-lathe {})\n", self.command.join(" "), self.version));
        line("| | before | after | change |\n|---|---|---|---|".to_owned());
        for row in rows(&self.input, &self.output) {
            line(format!("| {} | {} | {} | {} |", row[0], row[1], row[2], row[3]));
        }
        line(
            "\n| pass | claim | changes | nodes | bytes | FLOPs | seconds | error |\n|---|---|---|---|---|---|---|---|"
                .to_owned(),
        );
        for p in &self.passes {
            let error = p.error.map_or("–".to_owned(), |e| format!("{e:.1e}"));
            line(format!(
                "| {} | {} | {} | {:+} | {:+} | {:+} | {:.3} | {error} |",
                p.name, p.kind, p.changes, p.nodes_delta, p.weight_bytes_delta, p.flops_delta, p.seconds
            ));
        }
        let refused: Vec<&PassLine> = self.passes.iter().filter(|p| !p.refusals.is_empty()).collect();
        if !refused.is_empty() {
            line("\n| left alone by | reason | places | for example |\n|---|---|---|---|".to_owned());
            for p in refused {
                for r in &p.refusals {
                    line(format!("| {} | {} | {} | {} |", p.name, r.reason, r.count, r.example));
                }
            }
        }
        if let Some(precision) = &self.precision {
            line(format!("\n{}.", precision.describe()));
        }
        if let Some(caches) = &self.kv_cache {
            line(format!("\n{}.", caches.describe()));
        }
        if let Some(quantization) = &self.quantization {
            line(format!("\n{}.", quantization.describe()));
        }
        if let Some(verify) = &self.verify {
            let verdict = if verify.passed { "holds" } else { "does not hold" };
            line(format!(
                "\nRun beside the original on {} ({} {} sets of inputs): {} {:.2e}, limit {:.0e}: {verdict}.\n",
                verify.runtime, verify.samples, verify.set, verify.metric, verify.after, verify.limit
            ));
            if let Some(note) = &verify.note {
                line(format!("{note}.\n"));
            }
            let mut columns = metric_columns();
            columns.retain(|(metric, column)| {
                let is_measured = verify.outputs.iter().any(|o| o.scores.get(metric.name).is_some());
                (1..=2).contains(&column.order) || column.order > 2 && is_measured
            });
            let headings: String = columns.iter().map(|(_, column)| format!(" {} |", column.heading)).collect();
            line(format!(
                "| output | max abs | rel L2 | cosine |{headings}\n|---|---|---|---|{}",
                "---|".repeat(columns.len())
            ));
            for OutputLine { name, scores, .. } in &verify.outputs {
                let cell = |metric: &str| scores.get(metric).map_or("–".to_owned(), |x| format!("{x:.4}"));
                let cells: String = columns.iter().map(|(metric, _)| format!(" {} |", cell(metric.name))).collect();
                let (max_abs, rel_l2, cosine) = (scores.max_abs(), scores.rel_l2(), scores.cosine());
                line(format!("| {name} | {max_abs:.2e} | {rel_l2:.2e} | {cosine:.6} |{cells}"));
            }
        }
        if let Some(latency) = &self.latency {
            line(format!("\nLatency, {}: {}.", latency.setting(), latency.describe()));
        }
        for warning in &self.warnings {
            line(format!("\nwarning: {warning}"));
        }
        let _ = write!(out, "\n{:.2} s, {} peak memory\n", self.seconds, mib(self.peak_rss_bytes));
        out
    }
}

/// Bytes in MiB, or in KiB below one.
pub(crate) fn mib(bytes: u64) -> String {
    if bytes >= 1 << 20 {
        format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
    } else {
        format!("{:.1} KiB", bytes as f64 / 1024.0)
    }
}

/// A count with thousands separated.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// The before/after table: quantity, before, after, change.
pub(crate) fn rows(before: &Side, after: &Side) -> Vec<[String; 4]> {
    let change = |a: u64, b: u64| match (a, b) {
        (a, b) if a == b => "–".to_owned(),
        (0, _) => "new".to_owned(),
        (a, b) => {
            let percent = (b as f64 / a as f64 - 1.0) * 100.0;
            match percent.abs() {
                size if size < 0.005 => format!("{}<0.01 %", if percent < 0.0 { "-" } else { "+" }),
                size if size < 0.1 => format!("{percent:+.2} %"),
                _ => format!("{percent:+.1} %"),
            }
        }
    };
    let count = |name: &str, a: u64, b: u64| [name.to_owned(), grouped(a), grouped(b), change(a, b)];
    let size = |name: &str, a: u64, b: u64| [name.to_owned(), mib(a), mib(b), change(a, b)];
    let mut rows = vec![count("nodes", before.nodes, after.nodes)];
    if before.nodes_total != before.nodes || after.nodes_total != after.nodes {
        rows.push(count("nodes, with subgraphs", before.nodes_total, after.nodes_total));
    }
    rows.push(count("parameters", before.parameters, after.parameters));
    rows.push(size("file size", before.file_bytes, after.file_bytes));
    rows.push(count("FLOPs", before.flops, after.flops));
    rows.push(size("peak activation", before.peak_activation_bytes, after.peak_activation_bytes));
    rows
}

/// The largest resident memory of this process so far, where the system tells.
pub(crate) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    let kib: Option<u64> = line.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    kib.unwrap_or(0) * 1024
}
