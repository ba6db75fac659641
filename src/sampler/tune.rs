//! Plans that are found by running the denoiser: searched timesteps, methods by name, and the planner.

mod auto;
mod features;
mod methods;
mod search;
mod trial;

pub use search::Search;

use super::{SamplerOptions, request, simplify};
use crate::{
    Failure, job,
    runner::{Runner, RunnerOptions},
};
use anyhow::Context as _;
use lathe_analysis::{Evaluate, EvaluateError};
use lathe_ir::{Model, Tensor};
use lathe_passes::sampler::{Roles, Scheduler, StepPlan};
use lathe_runtime::LoadOptions;
use trial::Trial;

/// Where a plan comes from that no file holds.
#[derive(Debug, Clone)]
pub enum Tune {
    /// A search for timesteps.
    Search(Box<Search>),
    /// Methods by name with their options: `gate:at=30+forecast:every=2`.
    Methods(String),
    /// Whatever takes this share of the time of the plain loop and changes its samples least.
    Auto {
        /// The share.
        latency: f64,
    },
}

/// Runs models with everything that the runtime does for speed: plans are compared with one another, not with a bound.
struct Fast<'a> {
    runner: &'a Runner,
    load: LoadOptions,
}

impl Evaluate for Fast<'_> {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        Ok(self.runner.child().evaluate(&model.to_bytes(), inputs, &self.load)?)
    }

    fn name(&self) -> String {
        Evaluate::name(self.runner.child())
    }
}

/// Finds the plan that `tune` asks for.
pub(super) fn plan(options: &SamplerOptions, tune: &Tune) -> Result<StepPlan, Failure> {
    let (scheduler, _) = Scheduler::parse(&options.scheduler, options.solver)?;
    let loaded = Model::read(&options.denoiser);
    let mut original = loaded.with_context(|| format!("cannot use `{}`", options.denoiser.display()))?.model;
    job::prepare(&mut original)?;
    let roles = Roles::infer(&original, &options.wishes)?;
    if options.guidance.is_some() && !roles.guides() {
        let message = "guidance needs an unconditional pass; --io uncond:NAME=VALUE says what a condition is then";
        return Err(Failure::Usage(message.to_owned()));
    }
    let runner = Runner::new(RunnerOptions {
        library: options.ort.clone(),
        load: options.load.clone(),
        timeout: options.timeout,
        memory: options.memory,
        worker: options.worker.clone(),
        progress: options.progress.clone(),
    })?;
    let (denoiser, _) = simplify(&original, &runner, &options.progress)?;
    let evaluator = Fast { runner: &runner, load: LoadOptions { optimize: true, ..options.load.clone() } };
    let trial = Trial {
        denoiser: &denoiser,
        roles: &roles,
        scheduler: &scheduler,
        request: request(options, &scheduler)?,
        guidance: options.guidance,
        seed: options.seed,
        shapes: &options.shapes,
        evaluator: &evaluator,
    };
    let mut plan = match tune {
        Tune::Search(search) => search::run(&trial, search, &options.progress)?,
        Tune::Methods(text) => methods::run(&trial, text)?,
        Tune::Auto { latency } => auto::run(&trial, *latency, &options.progress)?,
    };
    plan.key = trial.key();
    Ok(plan)
}
