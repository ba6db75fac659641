//! The sampler compiler's job: read a denoiser, simplify it, compile its sampling loop, prove it step by step, write it.

mod check;
mod compare;
mod evaluator;
mod features;
mod picture;
mod preview;
mod report;
mod seeded_inputs;
mod tune;

use crate::{
    Failure, PassRecord, RunOptions, job,
    pipeline::{self, Run},
    report as contract,
    runner::Runner,
};
use anyhow::{Context as _, anyhow};
use check::Checked;
use lathe_ir::{Dim, Model, Staged, Type, WriteOptions};
use lathe_passes::{
    PASSES, PassContext,
    sampler::{
        Error, Form, Guidance, Mode, OPSET, Request, Roles, Sampler, Scheduler, Solver, StepPlan, Table, Wishes, emit,
    },
};
use lathe_runtime::{Listener, LoadOptions, Progress};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub(crate) use compare::{FEWEST, SamplerPair, compare_samplers};
pub use report::{SamplerReport, SamplerSide};
pub use tune::{Eyes, Search, Tune};

/// Nodes above which steps are not put side by side.
const MOST_NODES: usize = 20_000;

/// Packed copies of weights that steps side by side may take when nothing else is said, in bytes: a runtime packs the
/// weights of every node for itself.
const MOST_PACKED: u64 = 4 << 30;

/// Time after which loading steps side by side is given up for a loop.
const MOST_LOADING: Duration = Duration::from_secs(60);

/// What to compile.
#[derive(Debug, Clone)]
pub struct SamplerOptions {
    /// The denoiser.
    pub denoiser: PathBuf,
    /// Where the sampler goes.
    pub output: PathBuf,
    /// Whether it may replace the denoiser.
    pub overwrite: bool,
    /// The scheduler's configuration.
    pub scheduler: Value,
    /// A solver in the place of the one that the configuration names.
    pub solver: Option<&'static dyn Solver>,
    /// The steps and what else the solver needs.
    pub request: Request,
    /// A plan; without one, every step is computed.
    pub plan: Option<StepPlan>,
    /// How a plan is found, where none is given.
    pub tune: Option<Tune>,
    /// How it is guided; `None` runs the conditional pass only.
    pub guidance: Option<Guidance>,
    /// What the user said about inputs.
    pub wishes: Wishes,
    /// The form; `None` chooses.
    pub form: Option<Form>,
    /// Whether a picture is drawn of samples of the result, beside those of the denoiser with every step computed.
    pub preview: bool,
    /// Whether the result is compared with the loop step by step.
    pub verify: bool,
    /// The largest relative L2 error of the sample; `None` is what its type allows.
    pub rtol: Option<f64>,
    /// How models are run. The seed is that of noise and conditions, too; shapes are those of the denoiser's inputs.
    pub run: RunOptions,
    /// The command line, for the report.
    pub command: Vec<String>,
}

/// What a successful job leaves.
#[derive(Debug)]
pub struct SamplerDone {
    /// The report.
    pub report: SamplerReport,
    /// The plan that was carried out.
    pub plan: StepPlan,
    /// The picture that was asked for, a PNG.
    pub preview: Option<Vec<u8>>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Evaluate(error) => Failure::Error(anyhow!("the denoiser cannot be run: {error}")),
            Error::Network(message) => Failure::Error(anyhow!(message)),
            // What was asked for does not fit the model or itself.
            other => Failure::Usage(other.to_string()),
        }
    }
}

/// Compiles a sampler. Nothing is written unless it succeeds.
pub fn compile(options: &SamplerOptions) -> Result<SamplerDone, Failure> {
    let start = Instant::now();
    job::check_output(&options.denoiser, &options.output, options.overwrite)?;
    if options.preview {
        let loaded = Model::read(&options.denoiser);
        let model = loaded.with_context(|| format!("cannot use `{}`", options.denoiser.display()))?.model;
        preview::check(&model, &Roles::infer(&model, &options.wishes)?)?;
    }
    let asked = options;
    let (mut found, mut sentence) = (None, None);
    if let Some(tune) = &options.tune {
        let (plan, why) = tune::plan(options, tune)?;
        sentence = why;
        found = Some(SamplerOptions { plan: Some(plan), tune: None, ..options.clone() });
    }
    let options = found.as_ref().unwrap_or(options);
    let (scheduler, mut warnings) = Scheduler::parse(&options.scheduler, options.solver)?;
    let table = table(options, &scheduler)?;
    let loaded = Model::read(&options.denoiser);
    let loaded = loaded.with_context(|| format!("cannot use `{}`", options.denoiser.display()))?;
    warnings.extend(sentence);
    warnings.extend(loaded.warnings.clone());
    let data: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let input = job::side(&options.denoiser, &loaded.model, loaded.file_bytes + data);
    let mut original = loaded.model;
    warnings.extend(job::prepare(&mut original)?);
    let roles = Roles::infer(&original, &options.wishes)?;
    let plan = plan(options, &scheduler, &table, &roles)?;
    let guidance = options.guidance.unwrap_or(check::UNGUIDED);
    let runner = Runner::new(&options.run)?;
    let drawn = drawn(&original, &roles, &plan, &options.run.inputs.shapes)?;
    let (simplified, records) = simplify(&original, &runner, &options.run.progress)?;
    let bare;
    let external = if loaded.data_files.is_empty() { lathe_ir::External::Auto } else { lathe_ir::External::Always };
    let job = Job { options, original: &original, drawn: &drawn, runner: &runner, write: WriteOptions { external } };
    let mut sampler = Sampler { denoiser: &simplified, roles: &roles, table: &table, plan: &plan, guidance };
    check::check_sizes(&job, &sampler)?;
    let mut made = job.make(&sampler, &mut warnings)?;
    if let Checked::Fails(reason) = &made.checked {
        // A pass that broke the denoiser would show here; the loop around it is tried with the denoiser as it is.
        warnings.push(format!("the denoiser was not simplified: with it simplified {reason}"));
        bare = upgraded(&original, &runner)?;
        sampler = Sampler { denoiser: &bare, ..sampler };
        made = job.make(&sampler, &mut warnings)?;
    }
    let verify = match made.checked {
        Checked::Holds(found) => Some(*found),
        Checked::Not => None,
        Checked::Fails(reason) => return Err(Failure::Refused(reason)),
    };
    let preview = match options.preview {
        true => Some(preview::draw(&job, &sampler, &preview::full(asked, &scheduler)?, made.staged.path())?),
        false => None,
    };
    let written = made.staged.written().clone();
    let output = SamplerSide {
        side: job::side(&options.output, &made.model, written.file_bytes + written.data_bytes),
        form: made.form.name().to_owned(),
        inputs: report::signature(&made.model, made.model.graph.main().inputs()),
        outputs: report::signature(&made.model, made.model.graph.main().outputs()),
        evaluations: plan.cfg.iter().map(|mode| mode.passes().len()).sum(),
    };
    Failure::if_stopped(&options.run.progress)?;
    made.staged.commit()?;
    let report = SamplerReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: options.command.clone(),
        seed: options.run.inputs.seed,
        input,
        output,
        solver: scheduler.solver.name().to_owned(),
        roles: roles.describe(),
        passes: records.iter().map(job::pass_line).collect(),
        plan: serde_json::to_value(&plan).context("the plan has no JSON form")?,
        verify,
        warnings,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: contract::peak_rss_bytes(),
    };
    Ok(SamplerDone { report, plan, preview })
}

/// The steps of a plan are those of its grid.
fn request(options: &SamplerOptions, scheduler: &Scheduler) -> Result<Request, Failure> {
    let Some(plan) = &options.plan else { return Ok(options.request.clone()) };
    if plan.solver != scheduler.solver.name() {
        let message = format!("the plan is for solver {}, and this is {}", plan.solver, scheduler.solver.name());
        return Err(Failure::Usage(message));
    }
    // A grid that the configuration makes by itself follows the reference in everything, rounding included.
    let counted = Request { steps: lathe_passes::sampler::Steps::Count(plan.grid.len()), ..options.request.clone() };
    let same = |table: &Table| table.rows.iter().map(|row| row.time).eq(plan.grid.iter().copied());
    if Table::new(scheduler, &counted).is_ok_and(|table| same(&table)) {
        return Ok(counted);
    }
    Ok(Request { steps: lathe_passes::sampler::Steps::Times(plan.grid.clone()), ..options.request.clone() })
}

/// The numbers of the steps that were asked for.
fn table(options: &SamplerOptions, scheduler: &Scheduler) -> Result<Table, Failure> {
    Ok(match options.plan.as_ref().and_then(|plan| Some((plan, plan.sizes.as_ref()?))) {
        Some((plan, sizes)) if plan.solver == scheduler.solver.name() => {
            Table::staged(scheduler, &options.request, &plan.grid, sizes)?
        }
        _ => Table::new(scheduler, &request(options, scheduler)?)?,
    })
}

/// The denoiser as inputs are made up for it: its latent has the size that the plan says.
fn drawn(original: &Model, roles: &Roles, plan: &StepPlan, shapes: &[(String, Vec<usize>)]) -> Result<Model, Failure> {
    let mut drawn = original.clone();
    let Some(sizes) = &plan.sizes else { return Ok(drawn) };
    let (name, [height, width]) = (&roles.latent, sizes.full());
    let value = drawn.graph.find_value(name);
    let Some(ty) = value.and_then(|v| drawn.graph.value_mut(v).ty.as_mut()) else { return Ok(drawn) };
    let given = shapes.iter().find(|(n, _)| n == name).map(|(_, dims)| dims.as_slice());
    if given.is_some_and(|dims| !dims.ends_with(&[height, width])) {
        let message =
            format!("the plan makes samples of {height}×{width}, and --input-shape gives `{name}` another size");
        return Err(Failure::Usage(message));
    }
    if let (Some(elem), Some(mut dims)) = (ty.elem(), ty.shape().map(|shape| shape.dims.clone()))
        && let [.., h, w] = dims.as_mut_slice()
    {
        (*h, *w) = (Dim::Known(height as i64), Dim::Known(width as i64));
        *ty = Type::tensor(elem, dims);
    }
    Ok(drawn)
}

/// The plan that was given, or the one that computes everything.
fn plan(options: &SamplerOptions, scheduler: &Scheduler, table: &Table, roles: &Roles) -> Result<StepPlan, Failure> {
    let mode = if options.guidance.is_some() { Mode::Guided } else { Mode::Conditional };
    let grid: Vec<f64> = table.rows.iter().map(|row| row.time).collect();
    let plan = options.plan.clone().unwrap_or_else(|| StepPlan::plain(scheduler.solver.name(), grid, mode));
    let guided = plan.cfg.contains(&Mode::Guided);
    if guided && options.guidance.is_none() {
        return Err(Failure::Usage("the plan has guided steps, and no --guidance says how strongly".to_owned()));
    }
    if plan.cfg.iter().any(|mode| *mode != Mode::Conditional) && !roles.guides() {
        let message = "guidance needs an unconditional pass; --io uncond:NAME=VALUE or uncond:NAME=input says what a \
                       condition is then";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(plan)
}

/// Runs the exact passes on a denoiser, upgraded to what samplers are written in.
fn simplify(original: &Model, runner: &Runner, progress: &Listener) -> Result<(Model, Vec<PassRecord>), Failure> {
    let mut model = original.clone();
    let cx = PassContext::default().with_evaluator(runner);
    let cx = if model.opset() < OPSET { cx.with_setting("upgrade-opset.to", OPSET) } else { cx };
    let mut watch = |_: &Model, _: &dyn lathe_passes::Pass| Ok(None);
    let tell = |done: usize| {
        progress.hear(&Progress::new(done, PASSES.len(), "passes"));
        !progress.is_stopped()
    };
    let run = Run { passes: PASSES, limit: usize::MAX, watch: &mut watch, count_flops: None, tell: &tell };
    let result = pipeline::run(&mut model, &cx, run);
    Failure::if_stopped(progress)?;
    match result {
        Ok((records, _)) => Ok((model, records)),
        Err(_) => Ok((upgraded(original, runner)?, Vec::new())),
    }
}

/// A denoiser of the operator set that samplers are written in, otherwise as it is.
fn upgraded(original: &Model, runner: &Runner) -> Result<Model, Failure> {
    let mut model = original.clone();
    if model.opset() < OPSET {
        let cx = PassContext::default().with_evaluator(runner).with_setting("upgrade-opset.to", OPSET);
        let upgrade = PASSES.iter().find(|p| p.info().name == "upgrade-opset").expect("the pass is registered");
        upgrade.apply(&mut model, &cx)?;
    }
    Ok(model)
}

/// What can be told about the form before anything is made.
fn likely_form(denoiser: &Model, plan: &StepPlan, memory: Option<u64>) -> Form {
    let evaluations: usize = plan.cfg.iter().map(|mode| mode.passes().len()).sum();
    let nodes = pipeline::node_count(denoiser).saturating_mul(evaluations);
    let packed = pipeline::weight_bytes(denoiser).saturating_mul(evaluations as u64);
    let most = memory.map_or(MOST_PACKED, |memory| memory / 2);
    // Passes of a batch are one evaluation; whoever is near the bound is better off with a loop anyway.
    if nodes > 2 * MOST_NODES || packed > most { Form::Loop } else { Form::Unrolled }
}

struct Job<'a> {
    options: &'a SamplerOptions,
    original: &'a Model,
    /// The denoiser as inputs are made up for it.
    drawn: &'a Model,
    runner: &'a Runner,
    write: WriteOptions,
}

/// A sampler that is not yet in place.
struct Made {
    model: Model,
    staged: Staged,
    form: Form,
    checked: Checked,
}

impl Job<'_> {
    /// Makes a sampler of the form that was asked for, or of the first that fits, and compares it.
    fn make(&self, sampler: &Sampler, warnings: &mut Vec<String>) -> Result<Made, Failure> {
        let form = match (self.options.form, sampler.plan.adaptive) {
            (Some(form), _) => form,
            (None, Some(_)) => Form::Adaptive,
            (None, None) if sampler.plan.sizes.is_some() => Form::Unrolled,
            (None, None) => likely_form(sampler.denoiser, sampler.plan, self.options.run.memory),
        };
        let made = self.make_as(sampler, form)?;
        if self.options.form.is_some() || form != Form::Unrolled || sampler.plan.sizes.is_some() {
            return Ok(made);
        }
        let nodes = pipeline::node_count(&made.model);
        let slow = self.loading(&made)?.filter(|&time| time > MOST_LOADING);
        if nodes <= MOST_NODES && slow.is_none() {
            return Ok(made);
        }
        let why = match slow {
            Some(time) => format!("it takes {:.0} s to load", time.as_secs_f64()),
            None => format!("it has {nodes} nodes"),
        };
        let looped = self.make_as(sampler, Form::Loop)?;
        if pipeline::node_count(&looped.model) < nodes {
            warnings.push(format!("the form is loop, because with its steps side by side {why}"));
            return Ok(looped);
        }
        warnings.push(format!("with its steps side by side {why}, and no steps of the plan repeat"));
        Ok(made)
    }

    /// How long the runtime takes to load a model; `None` where it is not worth asking.
    fn loading(&self, made: &Made) -> Result<Option<Duration>, Failure> {
        const FEW: usize = MOST_NODES / 8;
        if !self.options.verify || pipeline::node_count(&made.model) < FEW {
            return Ok(None);
        }
        let options = LoadOptions { optimize: true, ..self.options.run.load.clone() };
        Ok(check::loading(self.runner, made.staged.path(), &options)?)
    }

    fn make_as(&self, sampler: &Sampler, form: Form) -> Result<Made, Failure> {
        let model = emit(sampler, form, self.runner)?;
        let staged = self.stage(&model, &self.options.output)?;
        let checked = if self.options.verify { check::check(self, sampler, staged.path())? } else { Checked::Not };
        Ok(Made { model, staged, form, checked })
    }

    fn stage(&self, model: &Model, target: &Path) -> Result<Staged, Failure> {
        Ok(model.stage(target, &self.write)?)
    }
}

impl SamplerDone {
    /// What a person reads at the end.
    pub fn summary(&self) -> String {
        report::summary(&self.report)
    }
}

/// The before/after table of the main job, for a denoiser and its sampler.
fn sides(report: &SamplerReport) -> Vec<[String; 4]> {
    contract::rows(&report.input, &report.output.side)
}
