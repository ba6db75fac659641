//! `optimize bench A [B]`: the latency of a model, or of two side by side.

use super::Answer;
use crate::{
    Failure,
    latency::{Latency, LatencySide, Measurement, digits},
    progress::Meter,
    report::mib,
    run_options::RunArgs,
};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use lathe_analysis::{Facts, Units};
use lathe_ir::Model;
use lathe_runtime::{BenchInputs, Listener, Profile, SampleSet, SetSpec};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// What to time.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The model.
    a: PathBuf,
    /// A second model with the same inputs, timed in turns with the first.
    b: Option<PathBuf>,
    /// Take the inputs from this set: its first batch.
    #[arg(long, value_name = "PATH", conflicts_with = "input_shape")]
    calib: Option<PathBuf>,
    /// Samples in the batch where the model leaves the choice.
    #[arg(long, value_name = "N", requires = "calib", value_parser = clap::value_parser!(u64).range(1..))]
    batch: Option<u64>,
    /// Time to spend on timed runs; slow models take longer.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds)]
    seconds: f64,
    /// Show where the time goes, by operator and by residual unit.
    #[arg(long)]
    profile: bool,
    /// As JSON, in the form of the report's `latency`; with --profile the key `profile` besides.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run: RunArgs,
}

fn seconds(text: &str) -> Result<f64, NoSeconds> {
    text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds)).ok_or(NoSeconds)
}

/// A text that is no time to spend.
#[derive(Debug, thiserror::Error)]
#[error("expected a number of seconds from 0 to 3600")]
struct NoSeconds;

/// The profile of one model, as JSON and as text show it.
#[derive(Debug, Serialize)]
struct ProfileReport {
    path: String,
    runs: usize,
    run_ms: f64,
    operators: Vec<Share>,
    units: Vec<Share>,
}

/// A part of the time of a run.
#[derive(Debug, Serialize)]
struct Share {
    name: String,
    calls: f64,
    ms: f64,
}

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    latency: &'a Latency,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<&'a [ProfileReport]>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let meter = Meter::new("timing", false);
    let found = answer(args, meter.listener())?;
    drop(meter);
    found.show(args.json);
    Ok(())
}

pub(crate) fn answer(args: &BenchArgs, progress: Listener) -> Result<Answer, Failure> {
    let first = super::read(&args.a)?.model;
    let models: Vec<&Path> = std::iter::once(&args.a).chain(&args.b).map(PathBuf::as_path).collect();
    if let Some(second) = &args.b {
        super::read(second)?;
    }
    let run = args.run.options(progress)?;
    if run.jobs > 1 || run.on.is_some() {
        let message = "--jobs and --on are for work that can be shared out; what is timed has this machine to itself";
        return Err(Failure::Usage(message.to_owned()));
    }
    let inputs = match &args.calib {
        Some(path) => {
            let batch = args.batch.and_then(|n| usize::try_from(n).ok());
            let spec = SetSpec { batch, ..SetSpec::all(path) };
            SampleSet::open(&spec, &first)?;
            BenchInputs::Set(spec)
        }
        None => BenchInputs::Random(run.inputs.clone()),
    };
    let measurement = Measurement { run: &run, models: &models, inputs: &inputs, seconds: args.seconds };
    let latency = measurement.run(&mut |_| {})?;
    let profiles = if args.profile {
        let found = measurement.profiles()?;
        let reports = models.iter().zip(found).map(|(path, profile)| report(path, &profile));
        Some(reports.collect::<Result<Vec<_>, Failure>>()?)
    } else {
        None
    };
    let output = Output { latency: &latency, profile: profiles.as_deref() };
    Ok(Answer::new(&output, text(&latency, profiles.as_deref().unwrap_or_default()), latency.notes()))
}

fn report(path: &Path, profile: &Profile) -> Result<ProfileReport, Failure> {
    let share = |(name, calls, ms)| Share { name, calls, ms };
    let model = super::read(path)?.model;
    Ok(ProfileReport {
        path: path.display().to_string(),
        runs: profile.runs,
        run_ms: profile.run_ms,
        operators: profile.by_operator().into_iter().map(share).collect(),
        units: by_unit(&model, profile).into_iter().map(share).collect(),
    })
}

/// Calls and milliseconds of each residual unit, in the model's order, and of what lies outside them.
///
/// The runtime names a node that it fused after one of the values it replaced, or not at all; such a node belongs to
/// the unit that the nodes run before and after it agree on.
fn by_unit(model: &Model, profile: &Profile) -> Vec<(String, f64, f64)> {
    let units = Units::find(model, &Facts::infer(model));
    let graph = &model.graph;
    let mut known: BTreeMap<&str, Option<usize>> = BTreeMap::new();
    for id in graph.scopes().into_iter().flat_map(|scope| graph.nodes(scope)) {
        let unit = units.of_node(id).map(|unit| unit.index());
        let node = graph.node(id);
        let outputs = node.outputs().iter().flatten().map(|&value| graph.value(value).name.as_str());
        for name in std::iter::once(node.name.as_str()).chain(outputs).filter(|name| !name.is_empty()) {
            known.insert(name, unit);
        }
    }
    let place = |name: &str| -> Option<Option<usize>> {
        let mut ends = std::iter::once(name.len()).chain(name.rmatch_indices('_').map(|(at, _)| at));
        ends.find_map(|end| known.get(&name[..end]).copied())
    };
    let mut places: Vec<Option<Option<usize>>> = profile.nodes.iter().map(|node| place(&node.name)).collect();
    for at in 0..places.len() {
        if places[at].is_none() {
            let before = places[..at].iter().rev().find_map(|p| *p);
            let after = places[at..].iter().find_map(|p| *p);
            places[at] = before.filter(|_| before == after);
        }
    }
    let mut sums = vec![(0.0, 0.0); units.len() + 1];
    for (node, place) in profile.nodes.iter().zip(places) {
        let sum = &mut sums[place.flatten().unwrap_or(units.len())];
        sum.0 += node.calls;
        sum.1 += node.ms;
    }
    let names = units.iter().map(|(id, unit)| format!("{} ({})", units.label(graph, id), unit.kind.name()));
    let names = names.chain(std::iter::once("outside of units".to_owned()));
    names.zip(sums).map(|(name, (calls, ms))| (name, calls, ms)).collect()
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

fn right(text: impl ToString) -> Cell {
    Cell::new(text.to_string()).set_alignment(CellAlignment::Right)
}

/// What a quantity is called, and what it is for a model.
type Row = (&'static str, fn(&LatencySide) -> Option<String>);

const ROWS: &[Row] = &[
    ("median, ms", |s| Some(digits(s.median_ms))),
    ("quartiles, ms", |s| Some(format!("{} – {}", digits(s.q1_ms), digits(s.q3_ms)))),
    ("runs timed", |s| Some(s.runs.to_string())),
    ("runs per second", |s| Some(format!("{:.1}", s.runs_per_second))),
    ("samples per second", |s| Some(format!("{:.1}", s.samples_per_second?))),
    ("copies in, ms", |s| Some(digits(s.copy_in_ms?))),
    ("copies out, ms", |s| Some(digits(s.copy_out_ms?))),
    ("load, ms", |s| Some(digits(s.load_ms))),
    ("first run, ms", |s| Some(digits(s.first_run_ms))),
    ("peak memory", |s| Some(mib(s.peak_rss_bytes?))),
];

fn text(latency: &Latency, profiles: &[ProfileReport]) -> String {
    let mut out = format!("{}\n\n", latency.setting());
    let sides: Vec<&LatencySide> = std::iter::once(&latency.before).chain(&latency.after).collect();
    let mut rows = table();
    let mut header = vec![Cell::new("")];
    header.extend(sides.iter().map(|side| right(&side.path)));
    rows.set_header(header);
    for (name, of) in ROWS {
        let cells: Vec<Option<String>> = sides.iter().map(|side| of(side)).collect();
        if cells.iter().any(Option::is_some) {
            let mut row = vec![Cell::new(name)];
            row.extend(cells.into_iter().map(|cell| right(cell.unwrap_or_default())));
            rows.add_row(row);
        }
    }
    let _ = writeln!(out, "{rows}\n\n{}", latency.describe());
    for profile in profiles {
        let _ = writeln!(out, "\n{}: {} ms a run under the profiler", profile.path, digits(profile.run_ms));
        for (what, shares) in [("operator", &profile.operators), ("residual unit", &profile.units)] {
            let mut rows = table();
            rows.set_header(vec![Cell::new(what), right("calls"), right("ms"), right("share")]);
            let total: f64 = shares.iter().map(|s| s.ms).sum();
            for s in shares {
                let share = format!("{:.1} %", 100.0 * s.ms / total.max(f64::MIN_POSITIVE));
                rows.add_row(vec![Cell::new(&s.name), right(s.calls), right(digits(s.ms)), right(share)]);
            }
            let _ = writeln!(out, "\n{rows}");
        }
    }
    out
}
