//! `optimize inspect`: what a model is.

use crate::{
    Failure,
    cli::print,
    job,
    report::{grouped, mib},
};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{Model, ValueId};
use serde_json::json;
use std::{fmt::Write as _, path::PathBuf};

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The model.
    model: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn value_line(model: &Model, facts: &Facts, value: ValueId) -> (String, String) {
    let info = model.graph.value(value);
    let ty = match (facts.elem(value), facts.shape(value)) {
        (Some(elem), Some(shape)) => {
            let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
            format!("{elem}[{}]", dims.join(", "))
        }
        (Some(elem), None) => format!("{elem}, shape unknown"),
        _ => "not a tensor, or of unknown type".to_owned(),
    };
    (info.name.clone(), ty)
}

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let loaded = super::read(&args.model)?;
    let mut model = loaded.model;
    let mut warnings = loaded.warnings;
    warnings.extend(job::prepare(&mut model)?);
    let data: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let side = job::side(&args.model, &model, loaded.file_bytes + data);
    let facts = Facts::infer(&model);
    let cost = Cost::of(&model, &facts, &Bindings::default());
    let lines = |values: &[ValueId]| -> Vec<(String, String)> {
        values.iter().map(|&v| value_line(&model, &facts, v)).collect()
    };
    let (inputs, outputs) = (lines(model.graph.main().inputs()), lines(model.graph.main().outputs()));
    if args.json {
        let values = |lines: &[(String, String)]| -> Vec<_> {
            lines.iter().map(|(name, ty)| json!({"name": name, "type": ty})).collect()
        };
        let operators: Vec<_> = cost
            .operators
            .iter()
            .map(|o| json!({"op": o.op_type, "count": o.count, "flops": o.flops, "weight_bytes": o.weight_bytes}))
            .collect();
        let found = json!({
            "model": side, "ir_version": model.ir_version, "producer": model.producer_name, "inputs": values(&inputs),
            "outputs": values(&outputs), "functions": model.functions.len(), "operators": operators,
            "uncounted": cost.uncounted, "warnings": warnings,
        });
        print(&format!("{}\n", serde_json::to_string_pretty(&found).expect("only names and numbers")));
        return Ok(());
    }
    let mut out = format!(
        "{}\nformat {} · opset {} · {} {}\n\n",
        side.path, model.ir_version, side.opset, model.producer_name, model.producer_version
    );
    for (title, lines) in [("inputs", &inputs), ("outputs", &outputs)] {
        let _ = writeln!(out, "{title}");
        for (name, ty) in lines {
            let _ = writeln!(out, "  {name}  {ty}");
        }
    }
    let (nodes, all) = (grouped(side.nodes), grouped(side.nodes_total));
    let _ = writeln!(out, "\nnodes            {nodes} ({all} with subgraphs and functions)");
    let _ = writeln!(out, "parameters       {}", grouped(side.parameters));
    let _ = writeln!(out, "file             {} (constants {})", mib(side.file_bytes), mib(side.weight_bytes));
    let _ = writeln!(out, "FLOPs            {} (open batch sizes as 1, other open sizes as 128)", grouped(side.flops));
    let _ = writeln!(out, "peak activation  {}\n", mib(side.peak_activation_bytes));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let heads = ["nodes", "FLOPs", "constants"].map(|head| right(head.to_owned()));
    table.set_header([vec![Cell::new("operator")], heads.to_vec()].concat());
    for o in &cost.operators {
        let numbers = [grouped(o.count as u64), grouped(o.flops), mib(o.weight_bytes)].map(right);
        table.add_row([vec![Cell::new(&o.op_type)], numbers.to_vec()].concat());
    }
    let _ = writeln!(out, "{table}");
    if !cost.uncounted.is_empty() {
        let names: Vec<String> = cost.uncounted.iter().map(|(op, count)| format!("{op} ×{count}")).collect();
        let _ = writeln!(out, "\nFLOPs not known for: {}", names.join(", "));
    }
    for warning in warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    print(&out);
    Ok(())
}
