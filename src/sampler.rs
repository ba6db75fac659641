//! The sampler compiler's job: read a denoiser, simplify it, compile its sampling loop, prove it step by step, write it.

mod action_errors;
mod around;
mod check;
mod compare;
mod denoiser;
mod evaluator;
mod features;
mod folder;
mod form;
mod picture;
mod preview;
mod report;
mod seeded_inputs;
mod source;
mod spread;
mod stages;
mod steps;
mod tune;

use crate::{Failure, RunOptions, job, report as contract, runner::Runner};
use anyhow::{Context as _, anyhow};
use around::{Around, Prepared};
use check::Checked;
use denoiser::Denoiser;
use lathe_ir::{External, Model, Staged, WriteOptions};
use lathe_passes::sampler::{
    Actions, Error, Form, Guidance, Request, RoleOptions, Sampler, Scheduler, Solver, StepPlan,
};
use serde_json::Value;
use stages::Stages;
use std::{path::PathBuf, time::Instant};

pub use around::{NegativeText, PipelineOptions};
pub(crate) use compare::{ACTION_METRIC, LEAST_SEEDS, SamplerComparison, compare_samplers};
pub(crate) use folder::Folder;
pub use report::{SamplerReport, SamplerSide};
pub use tune::{ImageReference, Search, Tune};

/// What to compile.
#[derive(Debug, Clone)]
pub struct SamplerOptions {
    /// The denoiser, or the folder of a whole pipeline.
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
    pub roles: RoleOptions,
    /// What the user said about a pipeline besides its loop.
    pub pipeline: PipelineOptions,
    /// How actions are read off the sample of a policy.
    pub actions: Option<Actions>,
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
            Error::Network(message) | Error::Pipeline(message) => Failure::Error(anyhow!(message)),
            // What was asked for does not fit the model or itself.
            other => Failure::Usage(other.to_string()),
        }
    }
}

/// Compiles a sampler. Nothing is written unless it succeeds.
pub fn compile(options: &SamplerOptions) -> Result<SamplerDone, Failure> {
    let start = Instant::now();
    job::check_output(&options.denoiser, &options.output, options.overwrite)?;
    let folder = options;
    let Prepared { options, denoiser, around } = prepare(folder)?;
    let options = &options;
    let (scheduler, mut warnings) = Scheduler::parse(&options.scheduler, options.solver)?;
    let roles = &denoiser.roles;
    let scheduler = if roles.preconditioned { scheduler.preconditioned()? } else { scheduler };
    if options.preview {
        match &around {
            Some(around) => preview::check_pipeline(around.pipeline)?,
            None => preview::check(&denoiser.original, roles)?,
        }
    }
    let runner = Runner::new(&options.run)?;
    let (plan, sentence) = match &options.tune {
        Some(tune) => {
            let (plan, sentence) = tune::find_plan(options, tune, &scheduler, &denoiser, &runner)?;
            (Some(plan), sentence)
        }
        None => (options.plan.clone(), None),
    };
    let table = steps::table(options, plan.as_ref(), &scheduler)?;
    warnings.extend(table.notes.iter().cloned());
    warnings.extend(denoiser.rounded_times(&table));
    let plan = plan.unwrap_or_else(|| steps::full_plan(options, &scheduler, &table));
    steps::check_guidance(&plan, options, roles)?;
    warnings.extend(sentence);
    warnings.extend(denoiser.warnings.iter().cloned());
    let sized = denoiser.sized(&plan, &options.run.inputs.shapes)?;
    let simplified = denoiser.simplified(&runner, &options.run.progress)?;
    let data = denoiser.data || around.as_ref().is_some_and(Around::data);
    let write = WriteOptions { external: if data { External::Always } else { External::Auto } };
    let mut job = Job { options, original: &denoiser.original, sized: &sized, runner: &runner, write, stages: None };
    if let Some(around) = &around {
        let (stages, found) = around.stages(options, &denoiser, table.noises(), &runner)?;
        job.stages = Some(stages);
        warnings.extend(around.warnings.iter().cloned().chain(found));
    }
    if let Some(actions) = &options.actions {
        let tail = actions.tail(denoiser.latent(), denoiser.opset())?;
        job.stages = Some(Stages::tail("actions", tail, &options.run.inputs));
    }
    let guidance = options.guidance.unwrap_or(check::UNGUIDED);
    let mut sampler = Sampler { denoiser: &simplified.model, roles, table: &table, plan: &plan, guidance };
    check::check_sizes(&job, &sampler)?;
    let mut compiled = job.compile(&sampler, &mut warnings)?;
    let unsimplified;
    if let Checked::Fails(reason) = &compiled.checked {
        // A pass that broke the denoiser would show here; the loop around it is tried with the denoiser as it is.
        warnings.push(format!("the denoiser was not simplified: with it simplified {reason}"));
        unsimplified = denoiser.upgraded(&runner)?;
        sampler = Sampler { denoiser: &unsimplified, ..sampler };
        job.stages = job.stages.as_ref().map(Stages::unsimplified);
        compiled = job.compile(&sampler, &mut warnings)?;
    }
    let output = SamplerSide::of(&options.output, &compiled, &sampler);
    let verify = match compiled.checked {
        Checked::Holds(verify) => Some(*verify),
        Checked::Not => None,
        Checked::Fails(reason) => return Err(Failure::Refused(reason)),
    };
    let preview = match options.preview {
        true => Some(preview::draw(&job, &sampler, &preview::full(options, &scheduler)?, compiled.staged.path())?),
        false => None,
    };
    Failure::if_stopped(&options.run.progress)?;
    compiled.staged.commit()?;
    let (input, parts) = match &around {
        Some(around) => around.sides(folder, &denoiser.side),
        None => (denoiser.side.clone(), Vec::new()),
    };
    let report = SamplerReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: options.command.clone(),
        seed: options.run.inputs.seed,
        input,
        parts,
        output,
        solver: scheduler.solver.name().to_owned(),
        steps: table.steps,
        roles: roles.describe(),
        passes: simplified.records.iter().map(job::pass_line).collect(),
        plan: serde_json::to_value(&plan).context("the plan has no JSON form")?,
        verify,
        warnings,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: contract::peak_rss_bytes(),
    };
    Ok(SamplerDone { report, plan, preview })
}

struct Job<'a> {
    options: &'a SamplerOptions,
    original: &'a Model,
    /// The denoiser as inputs are made up for it.
    sized: &'a Model,
    runner: &'a Runner,
    write: WriteOptions,
    /// What stands around the loop of a pipeline.
    stages: Option<Stages>,
}

/// Reads the denoiser, or all that a pipeline is made of.
fn prepare(asked: &SamplerOptions) -> Result<Prepared, Failure> {
    if asked.denoiser.is_dir() {
        return around::prepare(asked);
    }
    if asked.pipeline != PipelineOptions::default() {
        let message = format!(
            "--size, --frames, --negative and --only are about the folder of a pipeline, and `{}` is a denoiser alone",
            asked.denoiser.display()
        );
        return Err(Failure::Usage(message));
    }
    let denoiser = Denoiser::read(&asked.denoiser, &asked.roles)?;
    let guidance = asked.guidance.filter(|guidance| !guidance.is_plain());
    Ok(Prepared { options: SamplerOptions { guidance, ..asked.clone() }, denoiser, around: None })
}

/// A sampler that is not yet in place.
struct Compiled {
    model: Model,
    staged: Staged,
    form: Form,
    checked: Checked,
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
