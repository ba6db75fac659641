//! `optimize sampler DENOISER -o OUT`: a whole diffusion sampling loop as one model, or with a folder a whole pipeline.

use super::Answer;
use crate::{
    Failure, ImageReference, NegativeText, PipelineOptions, SamplerDone, SamplerOptions, Search, Tune,
    progress::Meter,
    run_options::RunArgs,
    sampler::{self, Folder},
    terminal::{TalkArgs, print, say},
};
use anyhow::Context as _;
use clap::{Args, ValueEnum};
use lathe_passes::sampler::{
    Actions, Adaptive, Form, Guidance, Mode, Request, RoleOptions, Scale, Solver, StepPlan, Steps, Table,
    methods::METHODS, read_python_json, solver_names,
};
use lathe_runtime::{Listener, SetSpec};
use serde_json::Value;
use std::{
    ffi::OsString,
    io::Write as _,
    path::{Path, PathBuf},
};

/// Forms on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormArg {
    /// Side by side while that stays small, else in loops; adaptive with a plan that says so.
    Auto,
    /// Every step side by side.
    Unrolled,
    /// Steps that repeat in a Loop.
    Loop,
    /// A Loop that decides while it runs which steps are computed (EasyCache).
    Adaptive,
}

/// How guided passes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PassesArg {
    /// As one batch where the denoiser's batch is open, the unconditional half first.
    Batched,
    /// One after the other.
    Separate,
}

/// What to compile.
#[derive(Debug, Args)]
pub(crate) struct SamplerArgs {
    /// The denoiser, or the folder of a whole pipeline as diffusers and Optimum lay it out: token ids and noise in, pixels out.
    #[arg(value_name = "DENOISER|FOLDER")]
    denoiser: PathBuf,
    /// Where the sampler goes.
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Let it replace the denoiser itself.
    #[arg(long)]
    overwrite: bool,
    /// The scheduler_config.json that came with the denoiser; a folder has one.
    #[arg(long, value_name = "FILE")]
    scheduler: Option<PathBuf>,
    #[arg(long, value_name = "NAME", value_parser = solver, help = solver_help())]
    solver: Option<&'static dyn Solver>,
    /// How many steps.
    #[arg(long, value_name = "N", required_unless_present_any = ["grid", "plan", "search"], conflicts_with = "grid")]
    steps: Option<usize>,
    /// The timesteps themselves, noisy ones first: 981,841,701.
    #[arg(long, value_name = "T,...", value_delimiter = ',')]
    grid: Vec<f64>,
    /// How stochastic DDIM is, 0 deterministic and 1 as DDPM; of TCD the paper's gamma, 0.3 unless given.
    #[arg(long, value_name = "X")]
    eta: Option<f64>,
    /// Tokens of the latent, for schedulers that shift their noise levels by it.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Flow noise levels linspace(1, 1/N, N), as FLUX pipelines pass them, instead of the scheduler's own.
    #[arg(long)]
    explicit_sigmas: bool,
    /// Classifier-free guidance: its scale, or `input` for a scale that is an input of the sampler. Of a pipeline whose
    /// denoiser is told the scale, that.
    #[arg(long, value_name = "G")]
    guidance: Option<String>,
    /// Pull a guided prediction to the deviation of the conditional one, 0 to 1.
    #[arg(long, value_name = "X", default_value_t = 0.0, requires = "guidance")]
    guidance_rescale: f64,
    /// How the two passes of a guided step run.
    #[arg(long, value_enum, default_value = "batched", requires = "guidance")]
    guidance_passes: PassesArg,
    /// Roles of the denoiser's inputs where they are not plain: latent=x, time=t, time-scale=0.001, time-offset=1,
    /// time-value=sigma or c-noise, predicts=clean of a denoiser that does its own preconditioning, cond=label, output=eps,
    /// uncond:label=10, uncond:text=input. May be given several times.
    #[arg(long, value_name = "ROLE=NAME")]
    io: Vec<String>,
    /// Of a policy that draws chunks of actions: statistics of the actions as LeRobot writes them, a .json file with `mean`
    /// and `std`, `min` and `max`, or `q01` and `q99`. The result then gives `actions` in their own units.
    #[arg(long, value_name = "FILE")]
    actions: Option<PathBuf>,
    /// The control flow of the result.
    #[arg(long, value_enum, default_value = "auto")]
    form: FormArg,
    /// For --form adaptive: the share of change at which a step is computed, 0.05 unless given.
    #[arg(long, value_name = "X", conflicts_with = "plan")]
    threshold: Option<f64>,
    /// For --form adaptive: first steps that are always computed, 5 unless given.
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    warmup: Option<usize>,
    /// For --form adaptive: last steps that are always computed, 1 unless given.
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    tail: Option<usize>,
    #[arg(long, value_name = "PLAN", help = plan_help())]
    plan: Option<String>,
    /// For --plan auto: the share of the time of the plain loop that is left.
    #[arg(long, value_name = "R")]
    latency: Option<f64>,
    #[command(flatten)]
    search: SearchArgs,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Write the plan of this run.
    #[arg(long, value_name = "FILE")]
    save_plan: Option<PathBuf>,
    /// Draw eight samples into a picture: left with the denoiser step by step and every step computed (for --search, 100
    /// steps), right with the result. For images of 1 or 3 channels from −1 to 1, and for folders, whose images come from
    /// the decoder.
    #[arg(long, value_name = "FILE.png")]
    preview: Option<PathBuf>,
    /// Write the result without running it.
    #[arg(long)]
    no_verify: bool,
    /// The largest relative L2 error of the sample against the denoiser run step by step.
    #[arg(long, value_name = "X", conflicts_with = "no_verify")]
    rtol: Option<f64>,
    /// Write a report: .json.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    talk: TalkArgs,
}

/// What goes with the folder of a pipeline.
#[derive(Debug, Args)]
struct PipelineArgs {
    /// Of a folder: the size of images in pixels, 512x768. Sizes stay open without it where the pipeline allows that.
    #[arg(long, value_name = "HxW", value_parser = size)]
    size: Option<[usize; 2]>,
    /// Of a folder: how many frames videos have.
    #[arg(long, value_name = "N")]
    frames: Option<usize>,
    /// Of a folder, what stands for the text in the unconditional pass: `input` for token ids of its own, `zeros`, or a .json
    /// file with token ids by the names of the inputs, as tokenizers give them.
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
    /// Of a folder: compile this alone.
    #[arg(long, value_enum, value_name = "PART")]
    only: Option<OnlyArg>,
}

/// What alone is compiled of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnlyArg {
    /// The sampling loop: noise and what the text encoders give in, a latent out.
    Loop,
}

/// `512x768`.
fn size(text: &str) -> Result<[usize; 2], NoSize> {
    text.split_once('x').and_then(|(h, w)| Some([h.parse().ok()?, w.parse().ok()?])).ok_or(NoSize)
}

/// What is no size.
#[derive(Debug, thiserror::Error)]
#[error("expected height and width in pixels, as 512x768")]
struct NoSize;

/// The search for timesteps.
#[derive(Debug, Args)]
struct SearchArgs {
    /// Search this many timesteps instead of taking those of the scheduler.
    #[arg(long, value_name = "K", conflicts_with_all = ["steps", "grid", "plan"])]
    search: Option<usize>,
    /// How many candidates the search scores.
    #[arg(long, value_name = "N", default_value_t = 200, requires = "search")]
    evaluations: usize,
    /// Pairs of samples that a score is made of, rounded up to whole batches of 32; with --real, samples, and at least 256.
    #[arg(long, value_name = "N", default_value_t = 32, requires = "search")]
    pairs: usize,
    /// The share of attention and MLP layers that may be left out over all steps.
    #[arg(long, value_name = "X", default_value_t = 0.0, requires = "search")]
    skip_layers: f64,
    /// A network that gives features of images: samples are compared by them. For --search, and with --real for --plan
    /// auto.
    #[arg(long, value_name = "FEATURES")]
    reference: Option<PathBuf>,
    /// Real images for the network of --reference, a set like those of --calib: candidates are scored by the distance of
    /// sets of samples from them, without it by that of single samples from those of 100 steps.
    #[arg(long, value_name = "SET", requires = "reference")]
    real: Option<PathBuf>,
    /// Samples that are drawn from each of the best candidates.
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "real")]
    draws: usize,
    /// Where scores are kept, so that the same search goes on where it was interrupted; OUT.search.jsonl by default.
    #[arg(long, value_name = "FILE", requires = "search")]
    search_log: Option<PathBuf>,
}

/// Where the plan comes from that no file holds, if one is asked for.
fn tune(args: &SamplerArgs) -> Result<Option<Tune>, Failure> {
    let search = &args.search;
    let usage = |message: String| Err(Failure::Usage(message));
    let auto = args.plan.as_deref() == Some("auto");
    if args.latency.is_some() && !auto {
        return usage("--latency goes with --plan auto".to_owned());
    }
    if search.reference.is_some() && search.search.is_none() && !auto {
        return usage("--reference is for --search and --plan auto".to_owned());
    }
    if let Some(steps) = search.search {
        if !(0.0..=1.0).contains(&search.skip_layers) {
            return usage(format!("--skip-layers is {}, expected 0 to 1", search.skip_layers));
        }
        let log = || {
            let mut name = args.output.clone().into_os_string();
            name.push(".search.jsonl");
            PathBuf::from(name)
        };
        return Ok(Some(Tune::Search(Box::new(Search {
            steps,
            evaluations: search.evaluations,
            pairs: search.pairs,
            skip: search.skip_layers,
            reference: search.reference.clone(),
            real: search.real.as_ref().map(SetSpec::all),
            draws: search.draws,
            log: search.search_log.clone().unwrap_or_else(log),
        }))));
    }
    let Some(plan) = args.plan.as_ref().filter(|plan| !is_file(plan)) else { return Ok(None) };
    if args.steps.is_none() && args.grid.is_empty() {
        return usage(format!("--plan {plan} makes a plan for the steps of --steps or --grid"));
    }
    Ok(Some(match (plan.as_str(), args.latency) {
        ("auto", Some(latency)) => {
            let images = search.reference.as_ref().zip(search.real.as_ref()).map(|(reference, real)| ImageReference {
                network: reference.clone(),
                real: SetSpec::all(real),
                samples: search.draws,
            });
            if search.reference.is_some() && images.is_none() {
                return usage(
                    "with --plan auto, --reference needs --real: sets are held against real images".to_owned(),
                );
            }
            Tune::Auto { latency, images }
        }
        ("auto", None) => return usage("--plan auto needs --latency, the share of time that is left".to_owned()),
        _ => Tune::Methods(plan.clone()),
    }))
}

/// Whether a plan is named by its file rather than by methods.
fn is_file(plan: &str) -> bool {
    std::path::Path::new(plan).extension().is_some_and(|e| e == "json")
}

fn solver(name: &str) -> Result<&'static dyn Solver, UnknownSolver> {
    lathe_passes::sampler::solver(name).ok_or(UnknownSolver)
}

/// A name that no solver has.
#[derive(Debug, thiserror::Error)]
#[error("expected one of {}", solver_names().join(", "))]
struct UnknownSolver;

fn solver_help() -> String {
    format!("Use this solver instead of the one that the configuration names: {}", listed(&solver_names(), "or"))
}

fn plan_help() -> String {
    let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
    format!(
        "A step plan: a .json file; `auto` with --latency; or methods by name, on --steps: gate:at=30+forecast:every=2. \
         They are {}; `optimize explain METHOD` describes one",
        listed(&names, "and")
    )
}

/// `a, b and c`.
fn listed(names: &[&str], last: &str) -> String {
    match names.split_last() {
        Some((end, names)) if !names.is_empty() => format!("{} {last} {end}", names.join(", ")),
        _ => names.concat(),
    }
}

pub(crate) fn run(args: &SamplerArgs, command: &[OsString]) -> Result<(), Failure> {
    let meter = Meter::new("compiling", args.talk.quiet);
    let done = perform(args, options(args, command, meter.listener())?)?;
    drop(meter);
    for warning in &done.report.warnings {
        say(&format!("warning: {warning}"));
    }
    if !args.talk.quiet {
        print(&done.summary());
    }
    Ok(())
}

/// The same for a program.
pub(crate) fn answer(args: &SamplerArgs, command: &[OsString], progress: Listener) -> Result<Answer, Failure> {
    let done = perform(args, options(args, command, progress)?)?;
    Ok(Answer::new(&done.report, done.summary(), done.report.warnings.clone()))
}

/// Compiles, and writes what was asked for besides the sampler.
fn perform(args: &SamplerArgs, options: SamplerOptions) -> Result<SamplerDone, Failure> {
    if let Some(path) = args.report.as_ref().filter(|p| p.extension().is_none_or(|e| e != "json")) {
        return Err(Failure::Usage(format!("report `{}` does not end in .json", path.display())));
    }
    if let Some(path) = args.preview.as_ref().filter(|p| p.extension().is_none_or(|e| e != "png")) {
        return Err(Failure::Usage(format!("preview `{}` does not end in .png", path.display())));
    }
    let done = sampler::compile(&options)?;
    let write = |path: &PathBuf, bytes: &[u8]| {
        lathe_ir::write_whole(path, |out| out.write_all(bytes))
            .with_context(|| format!("cannot write `{}`", path.display()))
    };
    if let Some(path) = &args.report {
        write(path, done.report.to_json().as_bytes())?;
    }
    if let Some(path) = &args.save_plan {
        write(path, done.plan.to_json().as_bytes())?;
    }
    if let Some((path, picture)) = args.preview.as_ref().zip(done.preview.as_ref()) {
        write(path, picture)?;
    }
    Ok(done)
}

fn options(args: &SamplerArgs, command: &[OsString], progress: Listener) -> Result<SamplerOptions, Failure> {
    let text =
        |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()));
    let scheduler: Value = match &args.scheduler {
        Some(path) => read_python_json(&text(path)?).with_context(|| format!("`{}` is not JSON", path.display()))?,
        None if args.denoiser.is_dir() => Folder::open(&args.denoiser)?.scheduler()?,
        None => {
            let message = "--scheduler is missing: the scheduler_config.json that came with the denoiser";
            return Err(Failure::Usage(message.to_owned()));
        }
    };
    let tune = tune(args)?;
    let mut plan = match args.plan.as_ref().filter(|plan| is_file(plan)) {
        Some(_) if args.steps.is_some() || !args.grid.is_empty() => {
            return Err(Failure::Usage("a plan file has its own steps; leave out --steps and --grid".to_owned()));
        }
        Some(path) => Some(StepPlan::parse(&text(&PathBuf::from(path))?)?),
        None => None,
    };
    let steps = match args.steps.or(args.search.search) {
        Some(count) => Steps::Count(count),
        None => Steps::Times(args.grid.clone()),
    };
    let explicit_sigmas = args.explicit_sigmas;
    let request = Request { steps, eta: args.eta, tokens: args.tokens, explicit_sigmas };
    let guidance = guidance(args)?;
    let rule = args.threshold.is_some() || args.warmup.is_some() || args.tail.is_some();
    if rule && args.form != FormArg::Adaptive {
        let message = "--threshold, --warmup and --tail are about --form adaptive, and another form is asked for";
        return Err(Failure::Usage(message.to_owned()));
    }
    if args.form == FormArg::Adaptive && tune.is_some() {
        let message = "--form adaptive decides while it runs; leave out --search, or --plan";
        return Err(Failure::Usage(message.to_owned()));
    }
    if args.form == FormArg::Adaptive && plan.is_none() {
        let guided = guidance.is_some_and(|guidance| !guidance.is_plain());
        plan = Some(adaptive(args, &scheduler, &request, guided)?);
    }
    Ok(SamplerOptions {
        denoiser: args.denoiser.clone(),
        output: args.output.clone(),
        overwrite: args.overwrite,
        scheduler,
        solver: args.solver,
        request,
        plan,
        tune,
        guidance,
        roles: RoleOptions::parse(&args.io)?,
        pipeline: pipeline(&args.pipeline)?,
        actions: args.actions.as_deref().map(actions).transpose()?,
        form: match args.form {
            FormArg::Auto => None,
            FormArg::Unrolled => Some(Form::Unrolled),
            FormArg::Loop => Some(Form::Loop),
            FormArg::Adaptive => Some(Form::Adaptive),
        },
        preview: args.preview.is_some(),
        verify: !args.no_verify,
        rtol: args.rtol,
        run: args.run.options(progress)?,
        command: command.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
    })
}

/// Statistics of actions.
fn actions(path: &Path) -> Result<Actions, Failure> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let json = read_python_json(&text).with_context(|| format!("`{}` is not JSON", path.display()))?;
    Ok(Actions::parse(&json)?)
}

/// What was said about a pipeline.
fn pipeline(args: &PipelineArgs) -> Result<PipelineOptions, Failure> {
    let negative = match args.negative.as_deref() {
        None => None,
        Some("input") => Some(NegativeText::Input),
        Some("zeros") => Some(NegativeText::Zeros),
        Some(file) if file.ends_with(".json") => {
            let text = std::fs::read_to_string(file).with_context(|| format!("cannot read `{file}`"))?;
            let ids: Value = serde_json::from_str(&text).with_context(|| format!("`{file}` is not JSON"))?;
            let Value::Object(ids) = ids else {
                return Err(Failure::Usage(format!("`{file}` holds no object with token ids by name")));
            };
            Some(NegativeText::Ids(ids))
        }
        Some(other) => {
            let message = format!("--negative is `{other}`, expected `input`, `zeros` or a .json file");
            return Err(Failure::Usage(message));
        }
    };
    Ok(PipelineOptions { size: args.size, frames: args.frames, negative, only_loop: args.only.is_some() })
}

fn guidance(args: &SamplerArgs) -> Result<Option<Guidance>, Failure> {
    let Some(text) = &args.guidance else { return Ok(None) };
    let number = || text.parse().ok().filter(|g: &f64| g.is_finite()).map(Scale::Constant);
    let scale = if text == "input" { Some(Scale::Input) } else { number() };
    let scale = scale.ok_or_else(|| Failure::Usage(format!("--guidance is `{text}`, expected a number or `input`")))?;
    if !(0.0..=1.0).contains(&args.guidance_rescale) {
        return Err(Failure::Usage(format!("--guidance-rescale is {}, expected 0 to 1", args.guidance_rescale)));
    }
    let batched = args.guidance_passes == PassesArg::Batched;
    Ok(Some(Guidance { scale, rescale: args.guidance_rescale, batched }))
}

/// The plan that leaves it to the run which steps are computed.
fn adaptive(args: &SamplerArgs, scheduler: &Value, request: &Request, guided: bool) -> Result<StepPlan, Failure> {
    let (scheduler, _) = lathe_passes::sampler::Scheduler::parse(scheduler, args.solver)?;
    let table = Table::new(&scheduler, request)?;
    let mode = if guided { Mode::Guided } else { Mode::Conditional };
    let grid = table.rows.iter().map(|row| row.time).collect();
    let (threshold, warmup, tail) = (args.threshold.unwrap_or(0.05), args.warmup.unwrap_or(5), args.tail.unwrap_or(1));
    let adaptive = Adaptive { threshold, warmup, tail };
    let plan = StepPlan { adaptive: Some(adaptive), ..StepPlan::plain(scheduler.solver.name(), grid, mode) };
    plan.check()?;
    Ok(plan)
}
