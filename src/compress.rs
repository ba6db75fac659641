//! The budget run, which trades quality for a budget: calibrate → propose → price → choose → apply → fit. Nothing runs
//! back: a stage reads what those before it made.

mod apply;
mod bench;
mod budget;
mod budget_search;
mod calibrate;
mod calibration;
mod candidates;
mod choose;
mod fit_budget;
mod latency_model;
mod loss_trials;
mod not_slower;
mod plain;
mod position_weights;
mod price;
mod propose;
mod seen_before;
mod setup;
mod uncovered;
mod unit_report;

pub(crate) use bench::{Bench, Exact, Finish, Fitted, Half, Written};
pub(crate) use budget::ADVICE;
pub use budget::Budget;

use crate::Failure;
use lathe_analysis::Keep;
use lathe_passes::lossy::{Method, MethodContext, allocate::Solver};
use lathe_runtime::SetSpec;
use not_slower::Settled;
use propose::Proposed;
pub(crate) use setup::recipe;
use setup::{Setup, computes_in_half};
use std::rc::Rc;

/// What a budget run is asked to do.
pub(crate) struct Request<'a> {
    pub budget: &'a Budget,
    /// The methods that are open to the run.
    pub methods: Vec<&'static dyn Method>,
    /// Those of them that settings ask for.
    pub required: Vec<&'static str>,
    /// The calibration set.
    pub calibration: SetSpec,
    /// What methods may know before anything is calibrated, but for what is limited.
    pub cx: MethodContext<'a>,
    pub solver: Solver,
    /// Whether all methods are asked, whatever those lose that only round.
    pub asks_all: bool,
}

/// A model within the budget, staged for writing.
pub(crate) fn compress(
    bench: &Bench<'_>,
    exact: &Exact<'_>,
    request: &Request<'_>,
    warnings: &mut Vec<String>,
) -> Result<Fitted, Failure> {
    let goal = fit_budget::Goal::of(request);
    let run = bench.run;
    let quantities = goal.shares.iter().map(|&(quantity, _)| quantity).collect();
    let setup = Setup {
        runner: bench.runner,
        cx: request
            .cx
            .clone()
            .with_quantities(quantities)
            .with_half_precision(computes_in_half(&run.load.provider))
            .with_recipe(recipe(request.cx.target, &run.load.provider))
            .with_memory(run.memory.unwrap_or_else(lathe_runtime::quarter_of_memory))
            .with_kept(bench.runner.child().kept().map(|kept| kept as &dyn Keep))
            .with_threads(run.load.threads * run.jobs),
        methods: goal.methods.clone(),
        set: &request.calibration,
        load: &run.load,
        memory: run.memory,
        seed: run.inputs.seed,
        distance: bench.distance(exact.model, request.budget),
        inputs: bench.inputs.clone(),
        halves: bench.finish.is_some(),
    };
    let span = |what| run.progress.stage(what);
    let calibrated = Rc::new(calibrate::calibrate(&setup, exact.model, warnings)?);
    let model = exact.model;
    let (proposed, settled) = {
        let _span = span("propose");
        let (rounding, others) = in_order(&setup);
        let first = propose::propose(&setup, model, &calibrated, &rounding, Proposed::default())?;
        let rounded = first.clone();
        let settled = Settled { setup: &setup, calibrated: &calibrated, goal: &goal, request, rounded };
        let is_open = goal.may_stop_early() && request.required.is_empty() && !request.asks_all;
        if is_open && !rounding.is_empty() && !others.is_empty() {
            let mut notes = Vec::new();
            let alone = first.clone().without(&others);
            let candidates = price::price(&setup, model, &calibrated, alone, &mut notes)?;
            let fitted = fit_budget::fit_unnoticed(bench, exact, candidates, &goal, request)?;
            if let Some(fitted) = fitted {
                warnings.append(&mut notes);
                let fitted = settled.not_slower(bench, exact, fitted, warnings);
                bench.runner.tidy_store();
                return fitted;
            }
        }
        (propose::propose(&setup, model, &calibrated, &others, first)?, settled)
    };
    let candidates = {
        let _span = span("price");
        price::price(&setup, model, &calibrated, proposed, warnings)?
    };
    let _span = span("fit the budget");
    let fitted = fit_budget::fit(bench, exact, candidates, &goal, request, warnings)?;
    let fitted = settled.not_slower(bench, exact, fitted, warnings);
    bench.runner.tidy_store();
    fitted
}

/// The methods that may lower what is limited by rounding alone, and the others, which come after them.
fn in_order(setup: &Setup<'_>) -> (Vec<&'static dyn Method>, Vec<&'static dyn Method>) {
    let rounds = |method: &&'static dyn Method| method.rounds_only() && method.serves(&setup.cx.quantities);
    setup.methods.iter().copied().partition(rounds)
}
