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
mod position_weights;
mod price;
mod propose;
mod setup;
mod uncovered;
mod unit_report;

pub(crate) use bench::{Bench, Exact, Fitted};
pub(crate) use budget::ADVICE;
pub use budget::Budget;

use crate::Failure;
use lathe_analysis::Keep;
use lathe_passes::lossy::{Method, MethodContext, allocate::Solver};
use lathe_runtime::SetSpec;
use setup::{Setup, computes_in_half, recipe};

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
    };
    let span = |what| run.progress.stage(what);
    let calibrated = calibrate::calibrate(&setup, exact.model, warnings)?;
    let proposed = {
        let _span = span("propose");
        propose::propose(&setup, exact.model, &calibrated)?
    };
    let candidates = {
        let _span = span("price");
        price::price(&setup, exact.model, calibrated, proposed, warnings)?
    };
    let _span = span("fit the budget");
    let fitted = fit_budget::fit(bench, exact, candidates, &goal, request, warnings);
    bench.runner.tidy_store();
    fitted
}
