//! `optimize inspect`: what a model is, where its bytes and FLOPs are, and what could be saved.

mod anatomy;
mod ceilings;
mod text;

use crate::{Failure, cli::print, job, report::Side};
use anatomy::Anatomy;
use clap::Args;
use lathe_analysis::{Facts, NodeCost, UnitId};
use lathe_ir::{Model, ValueId};
use serde_json::{Value, json};
use std::path::PathBuf;

/// How many of the layers that cost most are shown.
const DEAREST: usize = 8;

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The model.
    model: PathBuf,
    /// List every residual unit.
    #[arg(long)]
    units: bool,
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

/// What both forms of the answer start from.
struct Found<'a> {
    side: Side,
    anatomy: Anatomy<'a>,
    inputs: Vec<(String, String)>,
    outputs: Vec<(String, String)>,
    warnings: Vec<String>,
}

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let loaded = super::read(&args.model)?;
    let mut model = loaded.model;
    let mut warnings = loaded.warnings;
    warnings.extend(job::prepare(&mut model)?);
    let data: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let side = job::side(&args.model, &model, loaded.file_bytes + data);
    let facts = Facts::infer(&model);
    let lines = |values: &[ValueId]| -> Vec<(String, String)> {
        values.iter().map(|&v| value_line(&model, &facts, v)).collect()
    };
    let (inputs, outputs) = (lines(model.graph.main().inputs()), lines(model.graph.main().outputs()));
    let found = Found { side, anatomy: Anatomy::of(&model, &facts), inputs, outputs, warnings };
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&as_json(&found)).expect("only names and numbers")));
    } else {
        print(&text::page(&found, args.units));
    }
    Ok(())
}

fn as_json(found: &Found) -> Value {
    let (anatomy, model) = (&found.anatomy, found.anatomy.model);
    let values = |lines: &[(String, String)]| -> Vec<_> {
        lines.iter().map(|(name, ty)| json!({"name": name, "type": ty})).collect()
    };
    let operators: Vec<_> = anatomy
        .cost
        .operators
        .iter()
        .map(|o| json!({"op": o.op_type, "count": o.count, "flops": o.flops, "weight_bytes": o.weight_bytes}))
        .collect();
    let cost = |c: &NodeCost| json!({"parameters": c.parameters, "weight_bytes": c.weight_bytes, "flops": c.flops});
    let with = |mut object: Value, more: Value| {
        if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
            object.extend(more);
        }
        object
    };
    let graph = anatomy.graph();
    let layers = anatomy.dearest(DEAREST).into_iter().map(|id| {
        let about = json!({"node": text::node_name(graph, id), "op": graph.node(id).op_type});
        with(about, cost(&anatomy.cost.by_node[id.index()]))
    });
    let kinds =
        anatomy.by_kind().into_iter().map(|(kind, count, sum)| with(json!({"kind": kind, "count": count}), cost(&sum)));
    let chains = anatomy.units.chains().iter().enumerate().map(|(index, chain)| {
        json!({"units": chain.iter().map(|id| id.index()).collect::<Vec<_>>(), "period": anatomy.units.period(index)})
    });
    let rejected = anatomy.units.rejected().iter();
    let rejected = rejected.map(|r| json!({"join": text::node_name(graph, r.join), "reason": r.reason.to_string()}));
    json!({
        "model": found.side, "ir_version": model.ir_version, "producer": model.producer_name,
        "inputs": values(&found.inputs), "outputs": values(&found.outputs), "functions": model.functions.len(),
        "operators": operators, "uncounted": anatomy.cost.uncounted, "layers": layers.collect::<Vec<_>>(),
        "unit_kinds": kinds.collect::<Vec<_>>(), "chains": chains.collect::<Vec<_>>(),
        "units": anatomy.units.iter().map(|(id, _)| with(unit_json(anatomy, id), cost(&anatomy.of_unit[id.index()])))
            .collect::<Vec<_>>(),
        "rejected_sums": rejected.collect::<Vec<_>>(), "ceilings": ceilings::ceilings(anatomy),
        "warnings": found.warnings,
    })
}

fn unit_json(anatomy: &Anatomy, id: UnitId) -> Value {
    let (graph, unit) = (anatomy.graph(), anatomy.units.get(id));
    let name = |v: ValueId| graph.value(v).name.clone();
    let names = |values: &[ValueId]| values.iter().map(|&v| name(v)).collect::<Vec<_>>();
    json!({
        "unit": id.index(), "label": anatomy.units.label(graph, id), "kind": unit.kind.name(), "chain": unit.chain,
        "position": unit.position, "parent": unit.parent.map(UnitId::index), "nodes": unit.nodes.len(),
        "join": text::node_name(graph, unit.join), "stream_in": name(unit.stream_in),
        "stream_out": name(unit.stream_out), "side_inputs": names(&unit.side_inputs), "outputs": names(&unit.outputs),
        "shape_taps": names(&unit.shape_taps), "barrier": unit.barrier.map(|b| b.to_string()),
    })
}
