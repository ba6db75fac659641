//! Plans that are found by running the denoiser: searched timesteps, methods by name, and the planner.

mod acceptance;
mod by_name;
mod plan_compiler;
mod plan_runner;
mod planner;
mod search;

pub use acceptance::ImageReference;
pub(super) use search::REFERENCE_STEPS;
pub use search::Search;

use super::{SamplerOptions, denoiser::Denoiser, evaluator::Evaluator, form::likely_form, steps};
use crate::{Failure, runner::Runner};
use lathe_passes::sampler::{Scheduler, StepPlan};
use plan_compiler::PlanCompiler;
use plan_runner::PlanRunner;

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
        images: Option<ImageReference>,
    },
}

/// Finds the plan that `tune` asks for, with a sentence where it is not what one would expect.
pub(super) fn find_plan(
    options: &SamplerOptions,
    tune: &Tune,
    scheduler: &Scheduler,
    denoiser: &Denoiser,
    runner: &Runner,
) -> Result<(StepPlan, Option<String>), Failure> {
    let roles = &denoiser.roles;
    if options.guidance.is_some() && !roles.guides() {
        let message = "guidance needs an unconditional pass; --io uncond:NAME=VALUE says what a condition is then";
        return Err(Failure::Usage(message.to_owned()));
    }
    if scheduler.solver.info().pairs && !matches!(tune, Tune::Methods(_)) {
        let solver = scheduler.solver.name();
        let message = format!(
            "solver {solver} evaluates the network twice a step, and timesteps are searched for one; --plan METHOD plans rows"
        );
        return Err(Failure::Usage(message));
    }
    if !scheduler.solver.info().grids && matches!(tune, Tune::Search(_)) {
        let message =
            format!("solver {} makes its own timesteps, and --search looks for others", scheduler.solver.name());
        return Err(Failure::Usage(message));
    }
    let run = &options.run;
    let simplified = denoiser.simplified(runner, &run.progress)?;
    let evaluator = Evaluator::fast(runner, &run.load);
    let plans = PlanRunner {
        denoiser: &simplified.model,
        roles,
        scheduler,
        request: steps::request(options, options.plan.as_ref(), scheduler)?,
        guidance: options.guidance,
        inputs: &run.inputs,
        evaluator: &evaluator,
        at_a_time: runner.child().workers(),
    };
    let (mut plan, sentence) = match tune {
        Tune::Search(search) => (search::find(&plans, search, &run.progress)?, None),
        Tune::Methods(text) => by_name::find(&plans, text)?,
        Tune::Auto { latency, images } => {
            let all = plans.full_plan(&plans.table()?);
            let form = options.form.unwrap_or_else(|| likely_form(&simplified.model, &all, run.memory));
            let compiler = PlanCompiler::new(&plans, runner, &run.load, form)?;
            planner::find(&compiler, *latency, images.as_ref(), &run.progress)?
        }
    };
    plan.key = plans.key();
    Ok((plan, sentence))
}
