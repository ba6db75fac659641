//! The steps of a sampler: those of its plan, or those that were asked for.

use super::SamplerOptions;
use crate::Failure;
use lathe_passes::sampler::{Mode, Request, Roles, Scheduler, StepPlan, Steps, Table};

/// What is asked of the scheduler. The steps of a plan are those of its grid.
pub(super) fn request(
    options: &SamplerOptions,
    plan: Option<&StepPlan>,
    scheduler: &Scheduler,
) -> Result<Request, Failure> {
    let Some(plan) = plan else { return Ok(options.request.clone()) };
    let solver = scheduler.solver.name();
    if plan.solver != solver {
        return Err(Failure::Usage(format!("the plan is for solver {}, and this is {solver}", plan.solver)));
    }
    // A grid that the configuration makes by itself follows the reference in everything, rounding included.
    let same = |table: &Table| table.rows.iter().map(|row| row.time).eq(plan.grid.iter().copied());
    for count in counts(plan.grid.len()) {
        let counted = Request { steps: Steps::Count(count), ..options.request.clone() };
        if Table::new(scheduler, &counted).is_ok_and(|table| same(&table)) {
            return Ok(counted);
        }
    }
    // Second evaluations of a step are between the timesteps of a grid.
    let every = if scheduler.solver.info().pairs { 2 } else { 1 };
    let times = plan.grid.iter().copied().step_by(every).collect();
    Ok(Request { steps: Steps::Times(times), ..options.request.clone() })
}

/// How many steps may have so many rows: as many; one more, whose evaluation reaches nothing; half of them, where each is
/// evaluated twice; or fewer by what the first ones take besides.
fn counts(rows: usize) -> impl Iterator<Item = usize> {
    const BESIDES: [usize; 3] = [1, 8, 9];
    let fewer = BESIDES.into_iter().filter_map(move |more| rows.checked_sub(more));
    [rows, rows + 1, rows.div_ceil(2), rows / 2 + 1].into_iter().chain(fewer)
}

/// The numbers of the steps.
pub(super) fn table(
    options: &SamplerOptions,
    plan: Option<&StepPlan>,
    scheduler: &Scheduler,
) -> Result<Table, Failure> {
    Ok(match plan.and_then(|plan| Some((plan, plan.sizes.as_ref()?))) {
        Some((plan, sizes)) if plan.solver == scheduler.solver.name() => {
            Table::staged(scheduler, &options.request, &plan.grid, sizes)?
        }
        _ => Table::new(scheduler, &request(options, plan, scheduler)?)?,
    })
}

/// The plan that computes every step.
pub(super) fn full_plan(options: &SamplerOptions, scheduler: &Scheduler, table: &Table) -> StepPlan {
    let mode = if options.guidance.is_some() { Mode::Guided } else { Mode::Conditional };
    StepPlan::plain(scheduler.solver.name(), table.rows.iter().map(|row| row.time).collect(), mode)
}

/// Fails where a plan has guided steps that nothing is known to guide by.
pub(super) fn check_guidance(plan: &StepPlan, options: &SamplerOptions, roles: &Roles) -> Result<(), Failure> {
    if plan.cfg.contains(&Mode::Guided) && options.guidance.is_none() {
        return Err(Failure::Usage("the plan has guided steps, and no --guidance says how strongly".to_owned()));
    }
    if plan.cfg.iter().any(|mode| *mode != Mode::Conditional) && !roles.guides() {
        let message = "guidance needs an unconditional pass; --io uncond:NAME=VALUE or uncond:NAME=input says what a \
                       condition is then";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(())
}
