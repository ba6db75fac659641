//! The report of a compiled sampler. The names are a contract with other programs; parts are those of the main report.

use super::Compiled;
use crate::{
    job,
    report::{PassLine, Side, Verify, mib},
};
use comfy_table::{Cell, CellAlignment, Table, presets};
use lathe_ir::{Model, ValueId};
use lathe_passes::sampler::Sampler;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The sampler that was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SamplerSide {
    /// As of any model.
    #[serde(flatten)]
    pub side: Side,
    /// `unrolled`, `loop` or `adaptive`.
    pub form: String,
    /// Inputs with their types.
    pub inputs: Vec<String>,
    /// Outputs with their types.
    pub outputs: Vec<String>,
    /// Evaluations of the network that the plan makes at most; a guided step makes two.
    pub evaluations: usize,
}

impl SamplerSide {
    /// A sampler that is written to `path`.
    pub(super) fn of(path: &Path, compiled: &Compiled, sampler: &Sampler) -> SamplerSide {
        let rows = sampler.plan.cfg.iter().zip(&sampler.table.rows).filter(|(_, row)| row.evaluates());
        let (model, written) = (&compiled.model, compiled.staged.written());
        SamplerSide {
            side: job::side(path, model, written.file_bytes + written.data_bytes),
            form: compiled.form.name().to_owned(),
            inputs: signature(model, model.graph.main().inputs()),
            outputs: signature(model, model.graph.main().outputs()),
            evaluations: rows.map(|(mode, _)| mode.passes().len()).sum(),
        }
    }
}

/// Everything about one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SamplerReport {
    /// The version of the program.
    pub version: String,
    /// The command line.
    pub command: Vec<String>,
    /// The seed of noise and conditions.
    pub seed: u64,
    /// The denoiser, or all parts of a pipeline together.
    pub input: Side,
    /// The parts of a pipeline, the denoiser first; left out where there is a denoiser alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Side>,
    /// The sampler.
    pub output: SamplerSide,
    /// The solver: `ddim`.
    pub solver: String,
    /// How many steps were asked for; some solvers evaluate the network several times in one.
    pub steps: usize,
    /// What the inputs of the denoiser are.
    pub roles: String,
    /// The exact passes that the denoiser went through.
    pub passes: Vec<PassLine>,
    /// The step plan.
    pub plan: serde_json::Value,
    /// The comparison with the loop step by step; `null` with `--no-verify`.
    pub verify: Option<Verify>,
    /// What was odd.
    pub warnings: Vec<String>,
    /// Time of the whole run.
    pub seconds: f64,
    /// The largest resident memory of this process.
    pub peak_rss_bytes: u64,
}

impl SamplerReport {
    /// The report as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has only names and numbers")
    }
}

/// Values with their types: `noise float[N, 1, 28, 28]`.
fn signature(model: &Model, values: &[ValueId]) -> Vec<String> {
    let line = |&value: &ValueId| {
        let value = model.graph.value(value);
        let elem = value.ty.as_ref().and_then(|t| t.elem()).map_or("?", |elem| elem.name());
        let dims = value.ty.as_ref().and_then(|t| t.shape()).map(|shape| {
            let dims: Vec<String> = shape.dims.iter().map(ToString::to_string).collect();
            format!("[{}]", dims.join(", "))
        });
        format!("{} {elem}{}", value.name, dims.unwrap_or_default())
    };
    values.iter().map(line).collect()
}

/// What a person reads at the end of a run.
pub(super) fn summary(report: &SamplerReport) -> String {
    let right = |text: &str| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let names = if report.parts.is_empty() { ["denoiser", "sampler"] } else { ["parts", "pipeline"] };
    table.set_header(vec![Cell::new(""), right(names[0]), right(names[1]), right("change")]);
    for [name, before, after, change] in super::sides(report) {
        table.add_row(vec![Cell::new(name), right(&before), right(&after), right(&change)]);
    }
    let rows = report.plan["grid"].as_array().map_or(0, Vec::len);
    let several = if rows > report.steps { format!(" in {rows} rows") } else { String::new() };
    let side = &report.output;
    let mut out = format!("{table}\n\n{}\n", report.roles);
    out.push_str(&format!(
        "{} steps of {}{several}, {} evaluations at most, {}\n  {}\n  → {}\n",
        report.steps,
        report.solver,
        side.evaluations,
        side.form,
        side.inputs.join(", "),
        side.outputs.join(", ")
    ));
    match &report.verify {
        Some(verify) => out.push_str(&format!(
            "\nverified against the {} run step by step on {}: {} samples, relative L2 error {:.1e} (limit {:.0e})\n",
            if report.parts.is_empty() { "denoiser" } else { "parts, the denoiser" },
            verify.runtime,
            verify.samples,
            verify.after,
            verify.limit
        )),
        None => out.push_str("\nnot verified (--no-verify)\n"),
    }
    out.push_str(&format!(
        "wrote {} · {:.2} s · {} peak\n",
        side.side.path,
        report.seconds,
        mib(report.peak_rss_bytes)
    ));
    out
}
