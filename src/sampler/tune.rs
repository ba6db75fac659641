//! Plans that are found by running the denoiser: searched timesteps, methods by name, and the planner.

mod acceptance;
mod by_name;
mod plan_compiler;
mod plan_runner;
mod planner;
mod search;

pub use acceptance::Eyes;
pub(super) use search::REFERENCE_STEPS;
pub use search::Search;

use super::{SamplerOptions, evaluator::Evaluator, likely_form, request, simplify};
use crate::{Failure, job, runner::Runner};
use anyhow::Context as _;
use lathe_ir::Model;
use lathe_passes::sampler::{Roles, Scheduler, StepPlan};
use plan_compiler::Workshop;
use plan_runner::Trial;

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
        /// What sets of samples are held against besides.
        eyes: Option<Eyes>,
    },
}

/// Finds the plan that `tune` asks for, with a sentence where it is not what one would expect.
pub(super) fn plan(options: &SamplerOptions, tune: &Tune) -> Result<(StepPlan, Option<String>), Failure> {
    let (scheduler, _) = Scheduler::parse(&options.scheduler, options.solver)?;
    let loaded = Model::read(&options.denoiser);
    let mut original = loaded.with_context(|| format!("cannot use `{}`", options.denoiser.display()))?.model;
    job::prepare(&mut original)?;
    let roles = Roles::infer(&original, &options.wishes)?;
    if options.guidance.is_some() && !roles.guides() {
        let message = "guidance needs an unconditional pass; --io uncond:NAME=VALUE says what a condition is then";
        return Err(Failure::Usage(message.to_owned()));
    }
    let runner = Runner::new(&options.run)?;
    let (denoiser, _) = simplify(&original, &runner, &options.run.progress)?;
    let evaluator = Evaluator::fast(&runner, &options.run.load);
    let trial = Trial {
        denoiser: &denoiser,
        roles: &roles,
        scheduler: &scheduler,
        request: request(options, &scheduler)?,
        guidance: options.guidance,
        inputs: &options.run.inputs,
        evaluator: &evaluator,
    };
    let (mut plan, sentence) = match tune {
        Tune::Search(search) => (search::run(&trial, search, &options.run.progress)?, None),
        Tune::Methods(text) => by_name::run(&trial, text)?,
        Tune::Auto { latency, eyes } => {
            let all = trial.plain(&trial.asked()?);
            let form = options.form.unwrap_or_else(|| likely_form(&denoiser, &all, options.run.memory));
            let shop = Workshop::new(&trial, &runner, &options.run.load, form)?;
            planner::run(&trial, &shop, *latency, eyes.as_ref(), &options.run.progress)?
        }
    };
    plan.key = trial.key();
    Ok((plan, sentence))
}
