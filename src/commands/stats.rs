//! `optimize stats MODEL --calib SET -o stats.npz`: calibration statistics as NumPy arrays.

use crate::{
    Failure,
    progress::Meter,
    run_options::RunArgs,
    runner::Runner,
    summary,
    terminal::{TalkArgs, print, say},
};
use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use lathe_analysis::{Rows, View, weight_inputs};
use lathe_ir::{DataType, Model, Tensor};
use lathe_runtime::{CollectOptions, MaskInput, NpzWriter, Request, SetSpec, Statistics, quarter_of_memory};
use std::{fmt::Write as _, path::PathBuf, time::Instant};

/// What to collect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// XᵀX and the sum of every feature.
    Gram,
    /// Sum, sum of absolute values, sum of squares and largest absolute value of every feature.
    Columns,
    /// XᵀY of the two tensors.
    Cross,
    /// Cosines between the rows of the two tensors.
    Cosine,
}

/// Which statistics of which tensors.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// The model.
    model: PathBuf,
    /// The calibration set: .npz, a folder of .npz or .npy, or of test_data_set_*.
    #[arg(long, value_name = "SET")]
    calib: PathBuf,
    /// The array of the set that holds labels, which the model does not read.
    #[arg(long, value_name = "NAME")]
    labels: Option<String>,
    /// Samples that run at once.
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Choose N samples of the set: half for spanning what it holds, half at random.
    #[arg(long, value_name = "N")]
    calib_select: Option<usize>,
    /// A tensor, its features along the last axis or along AXIS; by default the inputs of all layers with weights.
    #[arg(long = "tensor", value_name = "NAME[@AXIS]")]
    tensors: Vec<String>,
    /// What to collect, comma-separated.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "gram")]
    kind: Vec<Kind>,
    /// The input that marks padded tokens with zeros; `none` for none, by default the one whose name says so.
    #[arg(long, value_name = "NAME")]
    mask: Option<String>,
    /// Compute everything again.
    #[arg(long)]
    no_cache: bool,
    /// Where the arrays go: `gram:NAME/gram`, `gram:NAME/sum`, `gram:NAME/counts` and so on.
    #[arg(short, long, value_name = "FILE.npz")]
    output: PathBuf,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    talk: TalkArgs,
}

pub(crate) fn run(args: &StatsArgs) -> Result<(), Failure> {
    if !args.run.input_shape.is_empty() || (args.run.seed != 0 && args.calib_select.is_none()) {
        let message = "--input-shape and --seed are for random choices; statistics are taken of a set";
        return Err(Failure::Usage(message.to_owned()));
    }
    if args.calib_select == Some(0) {
        return Err(Failure::Usage("--calib-select is 0, expected at least 1".to_owned()));
    }
    if args.batch == Some(0) {
        return Err(Failure::Usage("--batch is 0, expected at least 1".to_owned()));
    }
    let model = super::read(&args.model)?.model;
    let requests = requests(&model, args)?;
    let meter = Meter::new("collecting statistics", args.talk.quiet);
    let options = args.run.options(meter.listener())?;
    let mut set = SetSpec { unread: args.labels.clone(), batch: args.batch, ..SetSpec::all(&args.calib) };
    let memory = options.memory.unwrap_or_else(quarter_of_memory);
    let temporary = tempfile::tempdir().context("there is no place for results")?;
    let runner = Runner::new(&options)?;
    let kept = runner.store().filter(|_| !args.no_cache).map(|store| store.join("statistics"));
    let cache = kept.unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot use `{}`", cache.display()))?;
    let mask = match args.mask.as_deref() {
        None => MaskInput::Auto,
        Some("none") => MaskInput::None,
        Some(name) => MaskInput::Named(name.to_owned()),
    };
    let cache_limit = runner.statistics_limit();
    let collect = CollectOptions { memory, mask, cache_limit, ..CollectOptions::new(options.load.clone(), cache) };
    if let Some(count) = args.calib_select {
        let chosen = runner.select(&args.model, &set, count, options.inputs.seed)?;
        if !args.talk.quiet {
            say(&summary::chosen(&chosen));
        }
        set.chosen = Some(chosen.chosen);
    }
    let start = Instant::now();
    let statistics = runner.collect(&model, &set, &requests, &collect)?;
    let seconds = start.elapsed().as_secs_f32();
    drop(meter);
    let mut text = String::new();
    write(args, &statistics, &mut text).with_context(|| format!("cannot write `{}`", args.output.display()))?;
    let work = statistics.work;
    if args.talk.verbose {
        print(&text);
    }
    if !args.talk.quiet {
        let damaged = if work.damaged > 0 { format!(" ({} were damaged)", work.damaged) } else { String::new() };
        say(&format!(
            "{} statistics computed in {} runs over the set, {} taken from the cache{damaged}, in {seconds:.1} s",
            work.computed, work.groups, work.cached
        ));
    }
    Ok(())
}

fn requests(model: &Model, args: &StatsArgs) -> Result<Vec<Request>, Failure> {
    let rows =
        if args.tensors.is_empty() { weight_inputs(model) } else { args.tensors.iter().map(|t| tensor(t)).collect() };
    if rows.is_empty() {
        return Err(Failure::Error(anyhow!("the model has no layer with weights; name tensors with --tensor")));
    }
    let mut requests = Vec::new();
    for kind in &args.kind {
        match (kind, &rows[..]) {
            (Kind::Gram, _) => requests.extend(rows.iter().cloned().map(Request::Gram)),
            (Kind::Columns, _) => requests.extend(rows.iter().cloned().map(Request::Columns)),
            (Kind::Cross, [x, y]) => requests.push(Request::Cross(x.clone(), y.clone())),
            (Kind::Cosine, [x, y]) => requests.push(Request::Cosine(x.clone(), y.clone())),
            _ => return Err(Failure::Usage("statistics of pairs need exactly two of --tensor".to_owned())),
        }
    }
    Ok(requests)
}

/// `NAME` or `NAME@AXIS`.
fn tensor(text: &str) -> Rows {
    match text.rsplit_once('@').and_then(|(name, axis)| Some((name, axis.parse().ok()?))) {
        Some((name, axis)) => Rows { value: name.to_owned(), view: View::Axis(axis) },
        None => Rows::last(text),
    }
}

fn write(args: &StatsArgs, statistics: &Statistics, text: &mut String) -> anyhow::Result<()> {
    lathe_ir::write_whole(&args.output, |out| {
        let mut npz = NpzWriter::new(out);
        for request in statistics.requests() {
            let label = request.label();
            let counts = statistics.counts(request)?;
            let _ = writeln!(text, "{label}: {} rows, {} padded, {} broken", counts.rows, counts.padded, counts.broken);
            let mut add = |name: &str, dims: &[usize], data: &[f64]| {
                let tensor = Tensor::from_f64s(DataType::Double, dims, data).expect("numbers fit float64");
                npz.add(&format!("{label}/{name}"), &tensor)
            };
            for field in statistics.fields(request)? {
                add(&field.name, &field.dims, &field.data)?;
            }
            add("counts", &[3], &[counts.rows, counts.padded, counts.broken].map(|count| count as f64))?;
        }
        Ok(npz.finish()?)
    })
}
