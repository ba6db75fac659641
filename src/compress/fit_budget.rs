//! The part of the main job that spends budgets and holds the loss against what is allowed.

use super::{Compressor, Table, budget_search::Aim, computes_in_half};
use crate::{
    Failure, PassRecord,
    job::{self, Job},
    latency::{Latency, Measurement},
    report::{BudgetRow, Plan, Side, Verify},
    validate::{self, Bound, validate},
};
use anyhow::{Context as _, anyhow};
use lathe_ir::{Model, Staged, WriteOptions};
use lathe_passes::{
    Pass, PassContext, Quantity,
    exact::{DropDead, DropNoopLayout},
    lossy::{
        METHODS, MethodContext,
        allocate::{self, SolveError, Solver},
    },
};
use lathe_runtime::{BenchInputs, Distance, SetSpec, metrics};
use std::path::Path;

/// Allocations that are tried until the result is as small and as fast as it must be.
const ATTEMPTS: usize = 6;

/// Share of a run that layers with weights can take at most.
const MOST_OF_LATENCY: f64 = 0.9;

/// Times that a result which saved more than a budget of latency asks for is looked beyond.
const LOOSENINGS: usize = 3;

/// Larger budgets that are tried to say what would keep to the allowed drop, and smaller ones to find the least.
const BISECTIONS: usize = 4;

/// How many times as much as predicted a result has to lose for the prediction to be doubted, and what it has to lose at
/// least: squared and relative, or in nats.
const UNLIKE: f64 = 8.0;
const NOTICEABLE: f64 = 1e-3;

/// Parts of a budget whose plans are tried where the prediction of its own is doubted.
const TIGHTER: [f64; 4] = [0.9, 0.8, 0.65, 0.5];

/// A result within the budgets, before it is written.
pub(crate) struct Spent {
    pub(crate) model: Model,
    pub(crate) staged: Staged,
    pub(crate) verify: Option<Verify>,
    pub(crate) plan: Plan,
    pub(crate) records: Vec<PassRecord>,
    pub(crate) latency: Option<Latency>,
}

impl Spent {
    /// The loss of the plan, as it was reckoned.
    fn predicted(&self) -> f64 {
        self.plan.objective
    }
}

/// What the exact passes left.
pub(crate) struct Exact<'a> {
    pub(crate) model: &'a Model,
    pub(crate) staged: &'a Staged,
    /// The original.
    pub(crate) original: &'a Side,
    pub(crate) target: &'a Path,
    pub(crate) write: &'a WriteOptions,
}

/// A quantity with its share to keep, and what the original and the exact result take of it.
#[derive(Clone, Copy)]
struct Limit {
    measure: Quantity,
    share: f64,
    original: f64,
    exact: f64,
    /// What the constants that could change take.
    kept: u64,
}

impl Limit {
    /// What these constants may take at most; what is missing if everything else takes too much already.
    fn of_sites(&self) -> Result<u64, f64> {
        let rest = self.exact - self.kept as f64;
        let allowed = self.share * self.original - rest;
        if allowed >= 0.0 { Ok(allowed as u64) } else { Err(rest / self.original) }
    }

    fn name(&self) -> &'static str {
        match self.measure {
            Quantity::Size => "size",
            Quantity::Parameters => "parameters",
            Quantity::Flops => "FLOPs",
            Quantity::Latency => "latency",
        }
    }

    fn key(&self) -> &'static str {
        key(self.measure)
    }

    /// What is allowed beside what a result takes, of which that is the given share of the original.
    fn row(&self, share: f64) -> BudgetRow {
        // Latency is told in milliseconds.
        let unit = if self.measure == Quantity::Latency { 1e-6 } else { 1.0 };
        let original = self.original * unit;
        let used = share * original;
        // Everything but time is counted.
        let used = if self.measure == Quantity::Latency { used } else { used.round() };
        BudgetRow { limit: self.share, allowed: self.share * original, used, share }
    }

    fn option(&self) -> &'static str {
        match self.measure {
            Quantity::Size => "--size",
            Quantity::Parameters => "--params",
            Quantity::Flops => "--flops",
            Quantity::Latency => "--latency",
        }
    }

    /// What is asked for, as the start of a sentence.
    fn asked(&self) -> String {
        let verb = if matches!(self.measure, Quantity::Parameters | Quantity::Flops) { "are" } else { "is" };
        format!("{:.3} of the original's {} {verb} asked for", self.share, self.name())
    }

    /// That even the smallest share is larger than what is allowed.
    fn unreachable(&self, least: f64, table: &Table<'_>) -> Failure {
        let asked = self.asked();
        let (others, why) = (table.unhandled(self.measure), table.declined(self.measure));
        Failure::Refused(format!("{asked}, and {least:.3} is the least{others}{why}"))
    }
}

/// Everything that is the same for every allocation that is tried.
struct Attempt<'a> {
    exact: &'a Exact<'a>,
    table: &'a Table<'a>,
    inputs: &'a BenchInputs,
    solver: Solver,
    /// Whether a budget of latency is to be used up.
    loosens: bool,
}

/// A plan that was carried out.
struct Candidate {
    model: Model,
    staged: Staged,
    plan: Plan,
    records: Vec<PassRecord>,
    latency: Option<Latency>,
}

impl Job<'_> {
    /// Spends the budgets. Methods see the `chosen` samples of the calibration set, or all.
    pub(crate) fn compress(
        &self,
        exact: &Exact<'_>,
        chosen: Option<Vec<usize>>,
        warnings: &mut Vec<String>,
    ) -> Result<Spent, Failure> {
        let options = self.options;
        let given = options.sets.calibration.as_ref();
        let given = given.context("lossy methods choose by what is seen on a calibration set, and none is given")?;
        let calibration = &SetSpec { chosen: chosen.or_else(|| given.chosen.clone()), ..given.clone() };
        let solver = self.context().setting(&allocate::INFO, "solver").map_err(anyhow::Error::from)?;
        let mut shares = options.budget.shares();
        let mut asked = Vec::new();
        for &method in METHODS {
            if job::is_asked(options, method)? {
                asked.push(method.info().name);
            }
        }
        // What is asked for is done whatever it saves, and nothing else without a budget.
        let only_asked = shares.is_empty() && !asked.is_empty();
        let least = shares.is_empty() && !only_asked;
        if least {
            shares.push((options.budget.minimize, 1.0));
        }
        let inputs = match options.run.inputs.shapes.is_empty() {
            true => BenchInputs::Set(calibration.clone()),
            false => BenchInputs::Random(options.run.inputs.clone()),
        };
        let compressor = Compressor {
            runner: self.runner,
            cx: MethodContext::new(options.target, shares.iter().map(|s| s.0).collect(), options.settings.clone())
                .with_half_precision(computes_in_half(&options.run.load.provider)),
            set: calibration,
            load: &options.run.load,
            memory: options.run.memory,
            seed: options.run.inputs.seed,
            admits: &|name| {
                let settled = self.methods.as_ref().is_none_or(|methods| methods.contains(&name));
                options.selection.admits(name) && settled && (!only_asked || asked.contains(&name))
            },
            distance: self.distance(exact.model),
            inputs: inputs.clone(),
        };
        let mut table = compressor.table(exact.model, warnings)?;
        if let Some((method, reason)) = asked.iter().find_map(|&method| Some((method, table.unmet(method)?))) {
            return Err(Failure::Refused(format!("`{method}` cannot do what is asked: {reason}")));
        }
        let mut limits = Vec::new();
        for (measure, share) in shares {
            let (original, left) = self.totals(measure, exact, &inputs)?;
            if measure == Quantity::Latency {
                table.scale_latency(MOST_OF_LATENCY * left);
            }
            let kept = table.kept();
            limits.push(Limit { measure, share, original, exact: left, kept: kept.of(measure) });
        }
        let attempt = Attempt { exact, table: &table, inputs: &inputs, solver, loosens: !least };
        if least {
            return self.least(&attempt, &limits);
        }
        let spent = self.as_predicted(&attempt, &limits, warnings)?;
        let Some(failed) = spent.verify.as_ref().filter(|v| !v.passed).map(validate::describe) else {
            return Ok(spent);
        };
        drop(spent);
        // What would pass, found by bisection, so that the user knows what to ask for.
        if only_asked {
            return Err(Failure::Refused(failed));
        }
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..BISECTIONS {
            let middle = (low + high) / 2.0;
            let found = self.within(&attempt, &relaxed(&limits, middle))?;
            if found.verify.is_none_or(|v| v.passed) { high = middle } else { low = middle }
        }
        let asked = relaxed(&limits, high);
        let share = |l: &Limit| format!("{} {:.2}", l.option(), (l.share * 100.0).ceil() / 100.0);
        let reachable = match asked.iter().all(|l| l.share <= 1.0) {
            true => format!("; {} keeps to it", asked.iter().map(share).collect::<Vec<_>>().join(" ")),
            false => String::new(),
        };
        Err(Failure::Refused(format!("{failed}{reachable}")))
    }

    /// A result within the limits that loses about what was predicted, where it is run on samples that no fit has seen or no
    /// choice was measured on. Where the plan for the limits loses far more, those for tighter ones are tried too, and the one
    /// that loses least is taken.
    fn as_predicted(
        &self,
        attempt: &Attempt<'_>,
        limits: &[Limit],
        warnings: &mut Vec<String>,
    ) -> Result<Spent, Failure> {
        let spent = self.within(attempt, limits)?;
        let Some(mut lost) = self.unlike_predicted(attempt, &spent)? else { return Ok(spent) };
        let (first, mut best, mut tightened) = (lost, spent, false);
        for part in TIGHTER {
            let tighter: Vec<Limit> = limits.iter().map(|l| Limit { share: l.share * part, ..*l }).collect();
            let found = match self.within(attempt, &tighter) {
                Ok(found) => found,
                Err(Failure::Refused(_)) => break,
                Err(error) => return Err(error),
            };
            let now = attempt.table.lost(&found.model)?.unwrap_or(f64::INFINITY);
            if now < lost {
                (lost, best, tightened) = (now, found, true);
            }
            if self.unlike_predicted(attempt, &best)?.is_none() {
                break;
            }
        }
        let loss = |lost: f64| attempt.table.describe_loss(lost);
        if tightened {
            warnings.push(format!(
                "the plan for this budget loses {} on calibration samples, far more than was predicted; a tighter one \
                 that loses {} is written",
                loss(first),
                loss(lost)
            ));
        }
        if self.unlike_predicted(attempt, &best)?.is_some() {
            let predicted = loss(best.predicted());
            warnings.push(format!(
                "the result loses {} on calibration samples, where {predicted} was predicted: they are too few, or \
                 what layers lose does not add up; --max-drop bounds what may be lost",
                loss(lost)
            ));
        }
        Ok(best)
    }

    /// What a result loses, if that is far more than was predicted.
    fn unlike_predicted(&self, attempt: &Attempt<'_>, spent: &Spent) -> Result<Option<f64>, Failure> {
        let lost = attempt.table.lost(&spent.model)?;
        Ok(lost.filter(|&lost| lost > UNLIKE * spent.predicted() && lost > NOTICEABLE))
    }

    /// The smallest share of one quantity whose loss is allowed, by bisection.
    fn least(&self, attempt: &Attempt<'_>, limits: &[Limit]) -> Result<Spent, Failure> {
        let (mut low, mut high) = (0.0, 1.0);
        let mut best = None;
        for _ in 0..BISECTIONS + 2 {
            let middle = (low + high) / 2.0;
            match self.within(attempt, &relaxed(&[Limit { share: 0.0, ..limits[0] }], middle)) {
                Ok(found) if found.verify.as_ref().is_none_or(|v| v.passed) => {
                    (high, best) = (middle, Some(found));
                }
                Ok(_) | Err(Failure::Refused(_)) => low = middle,
                Err(error) => return Err(error),
            }
        }
        best.ok_or_else(|| {
            let name = limits[0].name();
            Failure::Refused(format!("no {name} below the original's keeps to the allowed drop"))
        })
    }

    /// What the original and the exact result take.
    fn totals(&self, measure: Quantity, exact: &Exact<'_>, inputs: &BenchInputs) -> Result<(f64, f64), Failure> {
        Ok(match measure {
            Quantity::Latency => {
                let latency = self.time(exact.staged.path(), inputs)?;
                (latency.before_ms * 1e6, latency.after_ms.unwrap_or(f64::NAN) * 1e6)
            }
            _ => (of_side(measure, exact.original), taken(measure, exact.model, exact.staged)),
        })
    }

    /// The latency of the original and of a candidate.
    fn time(&self, candidate: &Path, inputs: &BenchInputs) -> Result<Latency, Failure> {
        let models = [self.options.model.as_path(), candidate];
        let seconds = self.options.bench.unwrap_or(0.0);
        let measurement = Measurement { run: &self.options.run, models: &models, inputs, seconds };
        Ok(measurement.run(&mut |_| {}).context("the latency cannot be measured")?)
    }

    /// A result within the limits, whose loss may still be too large.
    fn within(&self, attempt: &Attempt<'_>, limits: &[Limit]) -> Result<Spent, Failure> {
        let exact = attempt.exact;
        let cx = self.context();
        let mut most = Vec::new();
        for limit in limits {
            most.push(limit.of_sites().map_err(|least| limit.unreachable(least, attempt.table))?);
        }
        let mut reached: Vec<f64> = Vec::new();
        let mut smallest_tried = false;
        let aim = |l: &Limit| Aim::new(l.kept, l.exact, l.share * l.original);
        let mut aims: Vec<Aim> = limits.iter().map(aim).collect();
        let mut loosenings = if attempt.loosens { LOOSENINGS } else { 0 };
        let mut within: Option<Candidate> = None;
        for _ in 0..ATTEMPTS {
            Failure::if_stopped(&self.options.run.progress)?;
            let mut budget = allocate::Limits::default();
            for (limit, &most) in limits.iter().zip(&most) {
                budget.set(limit.measure, most);
            }
            let (plan, seconds) = match attempt.table.choose(&budget, attempt.solver) {
                Ok(found) => found,
                // Measured, the smallest may still do.
                Err(SolveError::Infeasible { smallest }) if !reached.is_empty() && !smallest_tried => {
                    smallest_tried = true;
                    smallest.iter().zip(&mut most).for_each(|((_, least, _), most)| *most = (*most).max(*least));
                    continue;
                }
                Err(SolveError::Infeasible { .. }) if smallest_tried => break,
                Err(SolveError::Infeasible { smallest }) => {
                    let short = smallest.iter().find(|(_, least, most)| least > most).or(smallest.first());
                    let &(measure, least, _) = short.expect("a limit is given");
                    let limit = limits.iter().find(|l| l.measure == measure).expect("limits are those that were given");
                    let least = (limit.exact - limit.kept as f64 + least as f64) / limit.original;
                    return Err(limit.unreachable(least, attempt.table));
                }
                Err(error) => return Err(Failure::Error(anyhow!(error))),
            };
            // Between what is within and what is not there is nothing.
            if within.is_some() && limits.iter().zip(&aims).all(|(l, aim)| aim.knows(plan.used.of(l.measure))) {
                break;
            }
            let found = attempt.table.carry_out(exact.model, &plan)?;
            let mut model = found.model;
            tidy(&mut model, &cx)?;
            model.check().context("the result is not a valid model; this is a fault of this program")?;
            let staged = model.stage(exact.target, exact.write).map_err(|e| Failure::Error(e.into()))?;
            let mut latency = None;
            let (mut over, mut loosened) = (false, false);
            reached.clear();
            for ((limit, aim), most) in limits.iter().zip(&mut aims).zip(&mut most) {
                let took = match limit.measure {
                    Quantity::Latency => {
                        let measured = self.time(staged.path(), attempt.inputs)?;
                        let ratio = measured.ratio.unwrap_or(f64::NAN);
                        latency = Some(measured);
                        ratio * limit.original
                    }
                    _ => taken(limit.measure, &model, &staged),
                };
                reached.push(took / limit.original);
                let allowed = limit.share * limit.original;
                let used = plan.used.of(limit.measure);
                let next = aim.next(used, took);
                let is_latency = limit.measure == Quantity::Latency;
                match next {
                    Some(next) if is_latency && (took > allowed || loosenings > 0) => *most = next,
                    // Names and attributes take a little more than was reckoned; a plan may have left part of its budget,
                    // which it must not take now.
                    _ if took > allowed => *most = used.min(*most).saturating_sub((took - allowed).ceil() as u64),
                    _ => {}
                }
                over |= took > allowed;
                loosened |= is_latency && loosenings > 0 && next.is_some();
            }
            if !over {
                let mut plan = found.plan;
                plan.seconds = seconds;
                plan.budget =
                    limits.iter().zip(&reached).map(|(l, &share)| (l.key().to_owned(), l.row(share))).collect();
                plan.used = [Quantity::Size, Quantity::Parameters, Quantity::Flops]
                    .map(|measure| (key(measure).to_owned(), taken(measure, &model, &staged)))
                    .into_iter()
                    .chain(latency.iter().filter_map(|l| Some((key(Quantity::Latency).to_owned(), l.after_ms?))))
                    .collect();
                within = Some(Candidate { model, staged, plan, records: found.records, latency });
            }
            if within.is_some() {
                if !loosened {
                    break;
                }
                loosenings -= 1;
            }
        }
        if let Some(Candidate { model, staged, mut plan, records, latency }) = within {
            let verify = self.held_out(staged.path())?;
            let solver = match attempt.solver {
                Solver::Auto if limits.len() < 2 => Solver::Pareto,
                Solver::Auto => Solver::Ilp,
                solver => solver,
            };
            plan.solver = solver.name().to_owned();
            return Ok(Spent { model, staged, verify, plan, records, latency });
        }
        let told = limits.iter().zip(&reached).filter(|(l, r)| **r > l.share);
        let told = told.map(|(l, r)| format!("{}, and {r:.3} was measured", l.asked()));
        Err(Failure::Refused(told.collect::<Vec<_>>().join("; ")))
    }

    /// The loss of a candidate on held-out samples; `None` if it is not to be run.
    fn held_out(&self, candidate: &Path) -> Result<Option<Verify>, Failure> {
        let Some((set, set_name)) = self.set.as_ref().filter(|_| self.options.verify) else { return Ok(None) };
        let budget = &self.options.budget;
        let metric = budget.metric.clone().unwrap_or_else(|| "auto".to_owned());
        let bound = Bound { set: set.clone(), set_name, metric, max_drop: budget.max_drop };
        Ok(Some(validate(self.runner, &self.options.model, candidate, &bound)?))
    }

    /// How outputs are compared while the sensitivity of layers is measured: as distributions where they are logits.
    fn distance(&self, model: &Model) -> Distance {
        let graph = &model.graph;
        let logits = |&v: &lathe_ir::ValueId| graph.value(v).name.to_ascii_lowercase().contains("logit");
        let divergence = match self.options.budget.metric.as_deref() {
            Some(metric) => metrics().any(|m| m.name == metric && m.of_logits),
            None => {
                self.set.as_ref().is_some_and(|(set, _)| set.labels.is_some())
                    || graph.main().outputs().iter().any(logits)
            }
        };
        if divergence { Distance::Divergence } else { Distance::Relative }
    }
}

/// The limits moved by a part of the way towards what the exact passes left, where nothing is lost.
fn relaxed(limits: &[Limit], part: f64) -> Vec<Limit> {
    let whole = |l: &Limit| (l.exact / l.original).max(l.share);
    limits.iter().map(|l| Limit { share: l.share + part * (whole(l) - l.share), ..*l }).collect()
}

/// The name of a quantity in the report.
fn key(measure: Quantity) -> &'static str {
    match measure {
        Quantity::Size => "size",
        Quantity::Parameters => "parameters",
        Quantity::Flops => "flops",
        Quantity::Latency => "latency",
    }
}

/// What a side of the report takes.
fn of_side(measure: Quantity, side: &Side) -> f64 {
    match measure {
        Quantity::Size => side.file_bytes as f64,
        Quantity::Parameters => side.parameters as f64,
        Quantity::Flops => side.flops as f64,
        Quantity::Latency => f64::NAN,
    }
}

/// What a model that is written aside takes.
fn taken(measure: Quantity, model: &Model, staged: &Staged) -> f64 {
    match measure {
        Quantity::Size => (staged.written().file_bytes + staged.written().data_bytes) as f64,
        Quantity::Parameters => job::cost(model).parameters as f64,
        Quantity::Flops => job::cost(model).flops as f64,
        Quantity::Latency => f64::NAN,
    }
}

/// Drops what methods left unread, and casts that cancel between layers of one type.
fn tidy(model: &mut Model, cx: &PassContext) -> Result<(), Failure> {
    let passes: [&dyn Pass; 2] = [&DropNoopLayout, &DropDead];
    for pass in passes {
        pass.apply(model, cx).map_err(anyhow::Error::from)?;
    }
    Ok(())
}
