//! The main job from the command line.

pub(crate) mod args;

use self::args::{ExternalArg, OptimizeArgs, TargetArg};
use super::Answer;
use crate::{
    AutoOptions, Budget, CacheOptions, Failure, Interface, Options, PrecisionOptions, Report, RunOptions, Selection,
    Sets,
    compress::ADVICE,
    progress::Meter,
    quantities::{size, time},
    recipe, summary,
    terminal::{print, say},
};
use anyhow::{Context as _, anyhow};
use lathe_ir::External;
use lathe_passes::{Quantity, QuantityMap, Target, kv_cache::CacheType, precision::Precision};
use lathe_runtime::Listener;
use std::{collections::BTreeMap, ffi::OsString, io::Write as _, path::Path};

/// Time that `--bench` spends on runs.
const TIMING_SECONDS: f64 = 10.0;

/// Time that `--auto` takes unless told.
const AUTO_TIME: &str = "10m";

/// The kinds of report there are.
#[derive(Clone, Copy)]
enum ReportKind {
    Html,
    Json,
    Markdown,
}

fn report_kind(path: &Path) -> Result<ReportKind, Failure> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("html") => Ok(ReportKind::Html),
        Some("json") => Ok(ReportKind::Json),
        Some("md") => Ok(ReportKind::Markdown),
        _ => Err(Failure::Usage(format!("report `{}` ends in none of .html, .json and .md", path.display()))),
    }
}

pub(crate) fn run(args: &OptimizeArgs, command: &[OsString]) -> Result<(), Failure> {
    // `--auto` says what it tries line by line, which a bar would be in the way of.
    let meter = Meter::new("optimizing", args.talk.quiet || args.auto);
    let options = options(args, command, meter.listener())?;
    let mut tell = |line: &str| {
        if !args.talk.quiet {
            say(line);
        }
    };
    let report = perform(args, options, &mut tell)?;
    drop(meter);
    for warning in &report.warnings {
        say(&format!("warning: {warning}"));
    }
    if !args.talk.quiet {
        print(&summary::text(&report, args.talk.verbose));
    }
    Ok(())
}

/// The same for a program, whose report always counts the FLOPs of every pass.
pub(crate) fn answer(args: &OptimizeArgs, command: &[OsString], progress: Listener) -> Result<Answer, Failure> {
    let options = Options { detailed: true, ..options(args, command, progress)? };
    let report = perform(args, options, &mut |_| {})?;
    Ok(Answer::new(&report, summary::text(&report, args.talk.verbose), report.warnings.clone()))
}

/// Does the job and writes what was asked for besides the model. `tell` hears what `--auto` tries.
fn perform(args: &OptimizeArgs, options: Options, tell: &mut dyn FnMut(&str)) -> Result<Report, Failure> {
    let mut reports = Vec::new();
    for path in &args.report {
        reports.push((path, report_kind(path)?));
    }
    if let Some(path) = &args.save_recipe {
        recipe::save(args, path)?;
    }
    let done = match args.auto {
        true => {
            let options = AutoOptions {
                job: options,
                time: time(args.time.as_deref().unwrap_or(AUTO_TIME))?,
                pareto: args.pareto.clone(),
            };
            crate::auto(&options, tell)?
        }
        false => crate::optimize(&options)?,
    };
    let report = done.report;
    for (path, kind) in reports {
        write_report(&report, path, kind)?;
    }
    Ok(report)
}

fn write_report(report: &Report, path: &Path, kind: ReportKind) -> Result<(), Failure> {
    let text = match kind {
        ReportKind::Html => report.to_html(),
        ReportKind::Json => report.to_json(),
        ReportKind::Markdown => report.to_markdown(),
    };
    lathe_ir::write_whole(path, |out| out.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write report `{}`", path.display()))?;
    Ok(())
}

fn options(args: &OptimizeArgs, command: &[OsString], progress: Listener) -> Result<Options, Failure> {
    let model = args.model.clone().ok_or_else(|| {
        Failure::Usage("no model is given; `optimize MODEL -o OUT` is the main job, --help shows the rest".to_owned())
    })?;
    let output = args.output.clone().or_else(|| args.second.clone());
    if output.is_none() && !args.dry_run && args.pareto.is_none() {
        return Err(Failure::Usage("no output is given; -o OUT says where the result goes".to_owned()));
    }
    let settings = settings(args)?;
    if let Some(folder) = output.as_deref().and_then(Path::parent).filter(|f| !f.as_os_str().is_empty())
        && !folder.is_dir()
    {
        return Err(Failure::Error(anyhow!("the folder `{}` does not exist", folder.display())));
    }
    let run = args.run.options(progress)?;
    let sets = args.sets.sets()?;
    check_sets(args, &sets, &run)?;
    Ok(Options {
        model,
        output: output.filter(|_| !args.dry_run),
        overwrite: args.overwrite,
        selection: Selection { only: args.passes.clone(), skip: args.skip.iter().cloned().collect() },
        settings,
        target: match args.target {
            TargetArg::Portable => Target::Portable,
            TargetArg::Ort => Target::Ort,
            TargetArg::Tensorrt => Target::TensorRt,
            TargetArg::Openvino => Target::OpenVino,
            TargetArg::Qnn => Target::Qnn,
        },
        opset: args.opset,
        max_growth: size(&args.max_growth)?,
        external: match args.external_data {
            ExternalArg::Auto => External::Auto,
            ExternalArg::Always => External::Always,
        },
        verify: !args.no_verify,
        paranoid: args.paranoid,
        bench: args.bench.then_some(TIMING_SECONDS),
        detailed: !args.report.is_empty(),
        sets,
        budget: Budget {
            shares: QuantityMap::default()
                .with(Quantity::Size, args.size)
                .with(Quantity::Parameters, args.params)
                .with(Quantity::Flops, args.flops)
                .with(Quantity::Latency, args.latency),
            advice: match args.time.as_deref().filter(|_| !args.auto) {
                Some(text) => time(text)?,
                None => ADVICE,
            },
            minimize: args.minimize.unwrap_or_default().into(),
            max_drop: args.max_drop,
            metric: args.metric.clone(),
            thorough: args.thorough,
            allow_slower: args.allow_slower,
        },
        interface: interface(args)?,
        precision: precision(args)?,
        cache: cache(args)?,
        calib_select: args.calib_select,
        run,
        command: command.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
    })
}

/// `--fix-dim`, `--outputs` and `--rename`.
fn interface(args: &OptimizeArgs) -> Result<Interface, Failure> {
    let pair = |text: &String| {
        let (left, right) = text.rsplit_once('=').filter(|(left, _)| !left.is_empty())?;
        Some((left.to_owned(), right.to_owned()))
    };
    let wrong = |flag: &str, form: &str, text: &String| Failure::Usage(format!("{flag} {text}: expected {form}"));
    let mut sizes = Vec::new();
    for text in &args.fix_dim {
        let found = pair(text).and_then(|(name, size)| Some((name, size.trim().parse().ok()?)));
        sizes.push(found.ok_or_else(|| wrong("--fix-dim", "NAME=SIZE", text))?);
    }
    let mut names = Vec::new();
    for text in &args.rename {
        names.push(pair(text).ok_or_else(|| wrong("--rename", "OLD=NEW", text))?);
    }
    Ok(Interface { sizes, outputs: args.outputs.clone(), names })
}

/// `--rtol`, where something asks for it.
fn rtol(args: &OptimizeArgs) -> Result<Option<f64>, Failure> {
    let usage = |message: &str| Err(Failure::Usage(message.to_owned()));
    match args.rtol {
        Some(rtol) if !rtol.is_finite() || rtol <= 0.0 => {
            usage("--rtol is a relative error, expected a number above 0")
        }
        Some(_) if args.dtype.is_none() && args.kv_cache.is_none() => {
            usage("--rtol is the error that --dtype or --kv-cache may make, and neither is given")
        }
        rtol => Ok(rtol),
    }
}

/// `--kv-cache`.
fn cache(args: &OptimizeArgs) -> Result<Option<CacheOptions>, Failure> {
    let Some(cache) = args.kv_cache.as_deref().and_then(CacheType::parse) else { return Ok(None) };
    if args.auto {
        return Err(Failure::Usage("--auto tries budgets; run --kv-cache on its result".to_owned()));
    }
    if args.bench {
        let message =
            "--bench runs both models on the same inputs, whose types --kv-cache changes; leave one of them out";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(Some(CacheOptions { cache, rtol: rtol(args)? }))
}

/// `--dtype`.
fn precision(args: &OptimizeArgs) -> Result<Option<PrecisionOptions>, Failure> {
    let rtol = rtol(args)?;
    let Some(precision) = args.dtype.as_deref().and_then(Precision::parse) else { return Ok(None) };
    if args.auto {
        return Err(Failure::Usage("--auto tries budgets; run --dtype on its result".to_owned()));
    }
    if precision.interface && args.bench {
        let message = "--bench runs both models on the same inputs, whose types :io changes; leave one of them out";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(Some(PrecisionOptions { precision, rtol }))
}

/// `--set PASS.OPTION=VALUE`, the last of an option counts.
fn settings(args: &OptimizeArgs) -> Result<BTreeMap<String, String>, Failure> {
    let mut settings = BTreeMap::new();
    for setting in &args.set {
        let wrong = || Failure::Usage(format!("`{setting}` is no setting, expected PASS.OPTION=VALUE"));
        let (key, value) = setting.split_once('=').ok_or_else(wrong)?;
        settings.insert(key.to_owned(), value.to_owned());
    }
    Ok(settings)
}

/// Whether sets, shapes of inputs and what is asked of both go together.
fn check_sets(args: &OptimizeArgs, sets: &Sets, run: &RunOptions) -> Result<(), Failure> {
    let usage = |message: &str| Err(Failure::Usage(message.to_owned()));
    if args.minimize.is_some() && args.max_drop.is_none() && !args.auto {
        return usage("--minimize says what becomes as little as --max-drop allows, and none is given");
    }
    let spends = args.size.or(args.params).or(args.flops).or(args.latency).or(args.max_drop).is_some() || args.auto;
    for (flag, given) in [("--thorough", args.thorough), ("--allow-slower", args.allow_slower)] {
        if given && !spends {
            return usage(&format!("{flag} says how a budget is spent, and none is given"));
        }
    }
    // Time is measured at given shapes, whatever the set's are.
    let shares = args.size.or(args.params).or(args.flops);
    let timed = args.latency.is_some() || args.auto || (args.max_drop.is_some() && shares.is_none());
    if !timed {
        sets.instead_of(&run.inputs)?;
    }
    if args.size.is_some() && sets.calibration.is_none() {
        return usage("--size spends a loss that is measured on samples, and none are given; --calib names a set");
    }
    match args.calib_select {
        Some(_) if sets.calibration.is_none() => {
            return usage("--calib-select chooses samples of a calibration set, and none is given; --calib names one");
        }
        Some(0) => return usage("--calib-select is 0, expected at least 1"),
        _ => {}
    }
    if args.no_verify && sets.validation.is_some() {
        return usage("--no-verify runs nothing, so there is no use for a set; leave one of them out");
    }
    Ok(())
}
