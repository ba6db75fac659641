//! `optimize inspect`: what a model is, where its bytes and FLOPs are, and what could be saved.

mod activations;
mod anatomy;
mod ceilings;
mod placement;
mod text;

use super::Answer;
use crate::{
    Failure, job,
    progress::Meter,
    report::Side,
    run_options::{EngineArgs, LimitArgs, RunOptions, input_shape},
    runner::Runner,
};
use activations::{Activations, Sources};
use anatomy::{Anatomy, node_name};
use clap::Args;
use lathe_analysis::{Facts, NodeCost, UnitId};
use lathe_ir::{Model, ValueId};
use lathe_runtime::{Listener, SetSpec};
use placement::{Placements, Question};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// How many of the layers that cost most are shown.
const DEAREST: usize = 8;

/// What to look at. How models are run is of use only where some are.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The model.
    model: PathBuf,
    /// List every residual unit.
    #[arg(long)]
    units: bool,
    /// How many inputs of every layer could be left out, by WINA's and TEAL's rule, as measured on a set.
    #[arg(long, requires = "calib")]
    activations: bool,
    /// The calibration set: .npz, a folder of .npz or .npy, or of test_data_set_*.
    #[arg(long, value_name = "SET", requires = "activations")]
    calib: Option<PathBuf>,
    /// With --ep: the shape of an input in the run; may be given several times.
    #[arg(long, value_name = "NAME:1,3,224,224", requires = "ep")]
    input_shape: Vec<String>,
    #[command(flatten)]
    runs: RunsOfSet,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// How the set is read and run.
#[derive(Debug, Args)]
struct RunsOfSet {
    /// The array of the set that holds labels, which the model does not read.
    #[arg(long, value_name = "NAME", requires = "activations")]
    labels: Option<String>,
    /// Samples that run at once.
    #[arg(long, value_name = "N", requires = "activations", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

impl RunsOfSet {
    fn measure(&self, model: &Model, calib: &Path, options: &RunOptions) -> Result<Activations, Failure> {
        let set = SetSpec {
            unread: self.labels.clone(),
            batch: self.batch.map(|batch| batch as usize),
            ..SetSpec::all(calib)
        };
        let runner = Runner::new(options)?;
        Sources { runner: &runner, set: &set, load: &options.load, memory: options.memory }.activations(model)
    }
}

fn value_line(model: &Model, facts: &Facts, value: ValueId) -> (String, String) {
    let info = model.graph.value(value);
    let ty = facts.described(&model.graph, value);
    let ty = match ty.as_ref().and_then(|ty| Some((ty.elem()?, ty.shape()))) {
        Some((elem, Some(shape))) => {
            let dims: Vec<String> = shape.dims.iter().map(ToString::to_string).collect();
            format!("{elem}[{}]", dims.join(", "))
        }
        Some((elem, None)) => format!("{elem}, shape unknown"),
        None => "not a tensor, or of unknown type".to_owned(),
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
    activations: Option<Activations>,
    placement: Option<Placements>,
}

/// The provider that takes everything.
const CPU: &str = "cpu";

impl InspectArgs {
    /// How models are run; an error where that is said and none is.
    fn run_options(&self, progress: Listener) -> Result<RunOptions, Failure> {
        let (engine, limits) = (&self.runs.engine, &self.runs.limits);
        let runs = self.activations || engine.ep != CPU;
        let said = !engine.is_default() || !limits.is_default() || !self.input_shape.is_empty();
        if said && !runs {
            let message = "nothing is run without --activations or an --ep other than cpu, so there is no use for how it \
                           would be";
            return Err(Failure::Usage(message.to_owned()));
        }
        if self.activations && !self.input_shape.is_empty() {
            let message = "--activations runs the samples of --calib, which have shapes; leave --input-shape out";
            return Err(Failure::Usage(message.to_owned()));
        }
        let mut run = engine.options(limits, progress)?;
        run.inputs.shapes = self.input_shape.iter().map(|text| input_shape(text)).collect::<Result<_, _>>()?;
        Ok(run)
    }
}

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let doing = if args.activations { "measuring activations" } else { "inspecting" };
    let meter = Meter::new(doing, false);
    let found = answer(args, meter.listener())?;
    drop(meter);
    found.show(args.json);
    Ok(())
}

pub(crate) fn answer(args: &InspectArgs, progress: Listener) -> Result<Answer, Failure> {
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
    let run = args.run_options(progress)?;
    let activations = args.calib.as_deref().map(|calib| args.runs.measure(&model, calib, &run)).transpose()?;
    let asked = args.runs.engine.ep != CPU && !args.activations;
    let placement = asked.then(|| Question { path: &args.model, run: &run }.answer(&model)).transpose()?;
    let found = Found { side, anatomy: Anatomy::of(&model, &facts), inputs, outputs, warnings, activations, placement };
    Ok(Answer::new(&as_json(&found), text::page(&found, args.units), Vec::new()))
}

fn as_json(found: &Found) -> Value {
    let (anatomy, model) = (&found.anatomy, found.anatomy.model);
    let values = |ids: &[ValueId]| -> Vec<_> {
        let line = |&id: &ValueId| {
            let (name, ty) = value_line(model, anatomy.facts, id);
            json!({"name": name, "type": ty, "ndim": anatomy.facts.ndim(id)})
        };
        ids.iter().map(line).collect()
    };
    let main = model.graph.main();
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
        let about = json!({"node": node_name(graph, id), "op": graph.node(id).op_type});
        with(about, cost(&anatomy.cost.by_node[id.index()]))
    });
    let kinds =
        anatomy.by_kind().into_iter().map(|(kind, count, sum)| with(json!({"kind": kind, "count": count}), cost(&sum)));
    let chains = anatomy.units.chains().iter().enumerate().map(|(index, chain)| {
        json!({"units": chain.iter().map(|id| id.index()).collect::<Vec<_>>(), "period": anatomy.units.period(index)})
    });
    let rejected = anatomy.units.rejected().iter();
    let rejected = rejected.map(|r| json!({"join": node_name(graph, r.join), "reason": r.reason.to_string()}));
    json!({
        "model": found.side, "ir_version": model.ir_version, "producer": model.producer_name,
        "inputs": values(main.inputs()), "outputs": values(main.outputs()), "functions": model.functions.len(),
        "operators": operators, "uncounted": anatomy.cost.uncounted, "layers": layers.collect::<Vec<_>>(),
        "unit_kinds": kinds.collect::<Vec<_>>(), "chains": chains.collect::<Vec<_>>(),
        "units": anatomy.units.iter().map(|(id, _)| with(unit_json(anatomy, id), cost(&anatomy.of_unit[id.index()])))
            .collect::<Vec<_>>(),
        "rejected_sums": rejected.collect::<Vec<_>>(), "ceilings": ceilings::ceilings(anatomy),
        "activations": found.activations, "placement": found.placement, "warnings": found.warnings,
    })
}

fn unit_json(anatomy: &Anatomy, id: UnitId) -> Value {
    let (graph, unit) = (anatomy.graph(), anatomy.units.get(id));
    let name = |v: ValueId| graph.value(v).name.clone();
    let names = |values: &[ValueId]| values.iter().map(|&v| name(v)).collect::<Vec<_>>();
    json!({
        "unit": id.index(), "label": anatomy.units.label(graph, id), "kind": unit.kind.name(), "chain": unit.chain,
        "position": unit.position, "parent": unit.parent.map(UnitId::index), "nodes": unit.nodes.len(),
        "join": node_name(graph, unit.join), "stream_in": name(unit.stream_in),
        "stream_out": name(unit.stream_out), "side_inputs": names(&unit.side_inputs), "outputs": names(&unit.outputs),
        "shape_taps": names(&unit.shape_taps), "barrier": unit.barrier.map(|b| b.to_string()),
    })
}
