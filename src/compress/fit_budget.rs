//! Last stage: choosing and applying until what is measured keeps to the budgets, and holding the loss against what is
//! allowed.

mod attempts;

use super::{
    Request,
    bench::{Bench, Exact, Fitted, Written, counted, judged},
    candidates::Candidates,
    plain,
};
use crate::{
    Failure,
    latency::Latency,
    report::{self, BudgetRow},
    validate,
};
use attempts::{Attempts, Step};
use lathe_ir::Model;
use lathe_passes::{
    Quantity,
    lossy::{
        Method,
        allocate::{Plan, Solver},
    },
};
use std::time::Instant;

/// Allocations that are tried until the result is as small and as fast as it must be.
const ATTEMPTS: usize = 6;

/// Share of a run that layers with weights can take at most.
const MOST_OF_LATENCY: f64 = 0.9;

/// Larger budgets that are tried to say what would keep to the allowed drop, and smaller ones to find the least.
const BISECTIONS: usize = 4;

/// How many times as much as predicted a result has to lose for the prediction to be doubted, and what it has to lose at
/// least: squared and relative, or in nats.
const UNLIKE: f64 = 8.0;
const NOTICEABLE: f64 = 1e-3;

/// What methods that only round may lose for no other to be asked: half of what would be noticed.
const UNNOTICED: f64 = NOTICEABLE / 2.0;

/// Parts of a budget whose plans are tried where the prediction of its own is doubted.
const TIGHTER: [f64; 4] = [0.9, 0.8, 0.65, 0.5];

/// What is looked for.
pub(super) struct Goal {
    /// What is limited, and the share of the original that may stay.
    pub shares: Vec<(Quantity, f64)>,
    /// The methods that may act.
    pub methods: Vec<&'static dyn Method>,
    kind: GoalKind,
}

#[derive(Clone, Copy, PartialEq)]
enum GoalKind {
    /// The least loss within the shares.
    WithinShares,
    /// The smallest share whose loss is allowed.
    SmallestShare,
    /// What settings ask for, whatever it saves, and nothing else.
    Required,
}

impl Goal {
    /// Whether the least loss within shares is looked for, of which rounding may leave next to nothing.
    pub fn may_stop_early(&self) -> bool {
        self.kind == GoalKind::WithinShares
    }

    /// Without shares, what settings ask for; without that either, as little as the allowed drop permits.
    pub fn of(request: &Request<'_>) -> Goal {
        let mut shares = request.budget.shares();
        let kind = match (shares.is_empty(), request.required.is_empty()) {
            (false, _) => GoalKind::WithinShares,
            (true, true) => GoalKind::SmallestShare,
            (true, false) => GoalKind::Required,
        };
        if kind == GoalKind::SmallestShare {
            shares.push((request.budget.minimize, 1.0));
        }
        let mut methods = request.methods.clone();
        if kind == GoalKind::Required {
            methods.retain(|method| request.required.contains(&method.info().name));
        }
        Goal { shares, methods, kind }
    }
}

/// A quantity with its share to keep, and what the original and the exact result take of it.
#[derive(Clone, Copy)]
pub(super) struct Limit {
    pub quantity: Quantity,
    pub share: f64,
    pub original: f64,
    pub exact: f64,
    /// What the regions that could change take as they are.
    baseline: u64,
}

impl Limit {
    /// What the whole model may take.
    fn allowed(&self) -> f64 {
        self.share * self.original
    }

    /// What the regions may take at most; the least share that can be asked for if everything else takes too much already.
    fn of_regions(&self) -> Result<u64, f64> {
        let rest = self.exact - self.baseline as f64;
        let allowed = self.allowed() - rest;
        if allowed >= 0.0 { Ok(allowed as u64) } else { Err(rest / self.original) }
    }

    /// What is allowed beside what a result takes, of which that is the given share of the original.
    fn row(&self, share: f64) -> BudgetRow {
        // Latency is told in milliseconds; everything but time is counted.
        let is_time = self.quantity == Quantity::Latency;
        let original = self.original * if is_time { 1e-6 } else { 1.0 };
        let used = share * original;
        let used = if is_time { used } else { used.round() };
        BudgetRow { limit: self.share, allowed: self.share * original, used, share }
    }

    /// What is asked for, as the start of a sentence.
    fn asked(&self) -> String {
        let verb = if matches!(self.quantity, Quantity::Parameters | Quantity::Flops) { "are" } else { "is" };
        format!("{:.3} of the original's {} {verb} asked for", self.share, self.quantity.name())
    }

    /// That even the smallest share is larger than what is allowed.
    fn unreachable(&self, least: f64, candidates: &Candidates<'_>) -> Failure {
        let asked = self.asked();
        let (uncovered, declined) =
            (candidates.describe_uncovered(self.quantity), candidates.describe_declined(self.quantity));
        Failure::Refused(format!("{asked}, and {least:.3} is the least{uncovered}{declined}"))
    }
}

/// Chooses among the candidates, applies what was chosen and measures it, until it keeps to the budgets.
pub(super) fn fit(
    bench: &Bench<'_>,
    exact: &Exact<'_>,
    mut candidates: Candidates<'_>,
    goal: &Goal,
    request: &Request<'_>,
    warnings: &mut Vec<String>,
) -> Result<Fitted, Failure> {
    let unmet = request.required.iter().find_map(|&method| Some((method, candidates.unmet(method)?)));
    if let Some((method, reason)) = unmet {
        return Err(Failure::Refused(format!("`{method}` cannot do what is asked: {reason}")));
    }
    let limits = limits(bench, exact, &mut candidates, &goal.shares)?;
    let uses_up = goal.kind != GoalKind::SmallestShare;
    let fit = Fit { bench, exact, candidates: &candidates, request, uses_up };
    if goal.kind == GoalKind::SmallestShare {
        return fit.smallest_share(&limits);
    }
    let fitted = fit.as_predicted(&limits, warnings)?;
    let fitted = plain::beside((bench, exact), &candidates, (&limits, request.budget), fitted, Some(warnings))?;
    let Some(failed) = fitted.verify.as_ref().filter(|v| !v.passed).map(validate::describe) else { return Ok(fitted) };
    drop(fitted);
    if goal.kind == GoalKind::Required {
        return Err(Failure::Refused(failed));
    }
    Err(Failure::Refused(format!("{failed}{}", fit.what_passes(&limits)?)))
}

/// The shares with what the original and the candidates take.
fn limits(
    bench: &Bench<'_>,
    exact: &Exact<'_>,
    candidates: &mut Candidates<'_>,
    shares: &[(Quantity, f64)],
) -> Result<Vec<Limit>, Failure> {
    let mut limits = Vec::new();
    for &(quantity, share) in shares {
        let (original, exact) = bench.totals(quantity, exact)?;
        if quantity == Quantity::Latency {
            candidates.scale_latency(MOST_OF_LATENCY * exact);
        }
        let baseline = candidates.baseline().of(quantity);
        limits.push(Limit { quantity, share, original, exact, baseline });
    }
    Ok(limits)
}

/// A result of candidates that only round, if it keeps to the budgets and loses so little, as predicted and as measured, that
/// nobody would notice what others may gain.
pub(super) fn fit_unnoticed(
    bench: &Bench<'_>,
    exact: &Exact<'_>,
    mut candidates: Candidates<'_>,
    goal: &Goal,
    request: &Request<'_>,
) -> Result<Option<Fitted>, Failure> {
    if !candidates.is_known() || candidates.regions.is_empty() {
        return Ok(None);
    }
    let limits = limits(bench, exact, &mut candidates, &goal.shares)?;
    let fit = Fit { bench, exact, candidates: &candidates, request, uses_up: true };
    let Ok(attempts) = Attempts::new(&fit, &limits) else { return Ok(None) };
    let Some(predicted) = attempts.predicted() else { return Ok(None) };
    if predicted > UNNOTICED {
        return Ok(None);
    }
    let fitted = match fit.within(&limits) {
        Ok(fitted) => fitted,
        Err(Failure::Refused(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let passes = fitted.verify.as_ref().is_none_or(|verify| verify.passed) && fitted.plan.objective <= UNNOTICED;
    let lost = if passes { candidates.loss_of(&fitted.model)? } else { None };
    if lost.is_none_or(|lost| lost > UNNOTICED) {
        return Ok(None);
    }
    plain::beside((bench, exact), &candidates, (&limits, request.budget), fitted, None).map(Some)
}

/// A plan carried out, with what it takes of every limited quantity as a share of the original.
pub(super) fn measured(
    (bench, exact): (&Bench<'_>, &Exact<'_>),
    candidates: &Candidates<'_>,
    limits: &[Limit],
    plan: &Plan,
) -> Result<(Fitted, Vec<f64>), Failure> {
    let mut applied = candidates.apply(exact.model, plan)?;
    bench.tidy(&mut applied.model)?;
    let written = bench.write(&applied.model, exact)?;
    let staged = &written.staged;
    let timings = match limits.iter().any(|l| l.quantity == Quantity::Latency) {
        true => Some(bench.time(staged.path())?),
        false => None,
    };
    let took = |limit: &Limit| match &timings {
        Some(timings) if limit.quantity == Quantity::Latency => timings.ratio().unwrap_or(f64::NAN),
        _ => counted(limit.quantity, written.model(&applied.model), staged) / limit.original,
    };
    let shares: Vec<f64> = limits.iter().map(took).collect();
    let row = |(limit, &share): (&Limit, &f64)| (limit.quantity.key().to_owned(), limit.row(share));
    let latency = timings.map(|timings| bench.latency(staged.path(), &timings)).transpose()?;
    let used = used(written.model(&applied.model), staged, latency.as_ref());
    let plan = report::Plan { budget: limits.iter().zip(&shares).map(row).collect(), used, ..applied.plan };
    let (model, Written { staged, half }) = (applied.model, written);
    Ok((Fitted { model, staged, half, verify: None, plan, records: applied.records, latency }, shares))
}

/// Candidates that were timed, for a search among plans of which latency is the last limit.
pub(super) struct Timed<'a, 'c> {
    bench: &'a Bench<'a>,
    exact: &'a Exact<'a>,
    candidates: Candidates<'c>,
    limits: Vec<Limit>,
    request: &'a Request<'a>,
}

impl<'a, 'c> Timed<'a, 'c> {
    pub fn new(
        bench: &'a Bench<'a>,
        exact: &'a Exact<'a>,
        mut candidates: Candidates<'c>,
        shares: &[(Quantity, f64)],
        request: &'a Request<'a>,
    ) -> Result<Timed<'a, 'c>, Failure> {
        let limits = limits(bench, exact, &mut candidates, shares)?;
        Ok(Timed { bench, exact, candidates, limits, request })
    }

    /// A result within the first of some rising shares of the latency whose plan is predicted to lose no more than `loss`,
    /// or what nobody would notice, and else within the last of them; `None` where none keeps to the limits.
    pub fn fastest(&mut self, shares: &[f64], loss: f64) -> Result<Option<Fitted>, Failure> {
        let Timed { bench, exact, candidates, request, .. } = self;
        let fit = Fit { bench, exact, candidates, request, uses_up: false };
        let within = |share: f64| -> Vec<Limit> {
            let timed = |l: &Limit| if l.quantity == Quantity::Latency { Limit { share, ..*l } } else { *l };
            self.limits.iter().map(timed).collect()
        };
        let loses_much = |share: &f64| {
            let limits = within(*share);
            let predicted = Attempts::new(&fit, &limits).ok().and_then(|attempts| attempts.predicted());
            predicted.is_none_or(|predicted| predicted > UNNOTICED.max(loss))
        };
        // The more time there may be left, the less is lost.
        let first = shares.partition_point(loses_much).min(shares.len().saturating_sub(1));
        let mut tried = shares[first..].iter();
        // What is measured may take a little more than was reckoned: the next share then, and the last at last.
        let mut asked: Vec<f64> = [tried.next(), tried.next(), shares.last()].into_iter().flatten().copied().collect();
        asked.dedup();
        for share in asked {
            match fit.within(&within(share)) {
                Ok(fitted) => return Ok(Some(fitted)),
                Err(Failure::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// Everything that is the same for every allocation that is tried.
struct Fit<'a> {
    bench: &'a Bench<'a>,
    exact: &'a Exact<'a>,
    candidates: &'a Candidates<'a>,
    request: &'a Request<'a>,
    /// Whether a budget of latency is to be used up.
    uses_up: bool,
}

impl Fit<'_> {
    /// Shares that would pass, found by bisection, as the end of a sentence, so that the user knows what to ask for. Times are
    /// not measured for it, and it ends when the time for it is up.
    fn what_passes(&self, limits: &[Limit]) -> Result<String, Failure> {
        let (start, time) = (Instant::now(), self.request.budget.advice);
        if time.is_zero() {
            return Ok(String::new());
        }
        let _span = self.bench.run.progress.stage("look for a budget that passes");
        // Where nothing changes nothing is lost.
        let (mut low, mut high, mut cut_short) = (0.0, 1.0, false);
        for looked in 0..BISECTIONS {
            let middle = (low + high) / 2.0;
            // What one look takes, the next takes too.
            if start.elapsed().mul_f64((looked + 1) as f64 / looked.max(1) as f64) > time {
                cut_short = true;
                break;
            }
            let passed = self.passes_untimed(&relaxed(limits, middle))?;
            if passed { high = middle } else { low = middle }
        }
        let timed = limits.iter().any(|l| l.quantity == Quantity::Latency);
        let passing = relaxed(limits, high);
        let share = |l: &Limit| format!("{} {:.2}", l.quantity.flag(), (l.share * 100.0).ceil() / 100.0);
        let shares = || passing.iter().map(share).collect::<Vec<_>>().join(" ");
        let keeps = if timed { "would keep to it, as far as predicted" } else { "keeps to it" };
        let is_known = high < 1.0 || !cut_short && passing.iter().all(|l| l.share <= 1.0);
        Ok(if is_known { format!("; {} {keeps}", shares()) } else { String::new() })
    }

    /// Whether the plan for these limits keeps to the allowed drop. Where latency is limited it is not timed.
    fn passes_untimed(&self, limits: &[Limit]) -> Result<bool, Failure> {
        if !limits.iter().any(|l| l.quantity == Quantity::Latency) {
            return Ok(self.within(limits)?.verify.is_none_or(|v| v.passed));
        }
        let attempts = Attempts::new(self, limits)?;
        let Ok((plan, _)) = self.candidates.choose(&attempts.budget(), self.request.solver) else { return Ok(false) };
        let mut applied = self.candidates.apply(self.exact.model, &plan)?;
        self.bench.tidy(&mut applied.model)?;
        let written = self.bench.write(&applied.model, self.exact)?;
        let judged = judged(&written.staged, &written.half);
        Ok(self.bench.measure(judged, self.request.budget)?.is_none_or(|v| v.passed))
    }

    /// A result within the limits that loses about what was predicted, where it is run on samples that no fit has seen or no
    /// candidate was measured on. Where the plan for the limits loses far more, those for tighter ones are tried too, and the
    /// one that loses least is taken.
    fn as_predicted(&self, limits: &[Limit], warnings: &mut Vec<String>) -> Result<Fitted, Failure> {
        let fitted = self.within(limits)?;
        let Some(mut lost) = self.unlike_predicted(&fitted)? else { return Ok(fitted) };
        let (first, mut best, mut tightened) = (lost, fitted, false);
        for part in TIGHTER {
            let tighter: Vec<Limit> = limits.iter().map(|l| Limit { share: l.share * part, ..*l }).collect();
            let fitted = match self.within(&tighter) {
                Ok(fitted) => fitted,
                Err(Failure::Refused(_)) => break,
                Err(error) => return Err(error),
            };
            let now = self.candidates.loss_of(&fitted.model)?.unwrap_or(f64::INFINITY);
            if now < lost {
                (lost, best, tightened) = (now, fitted, true);
            }
            if self.unlike_predicted(&best)?.is_none() {
                break;
            }
        }
        let loss = |lost: f64| self.candidates.describe_loss(lost);
        if tightened {
            warnings.push(format!(
                "the plan for this budget loses {} on calibration samples, far more than was predicted; a tighter one \
                 that loses {} is written",
                loss(first),
                loss(lost)
            ));
        }
        if self.unlike_predicted(&best)?.is_some() {
            let predicted = loss(best.plan.objective);
            warnings.push(format!(
                "the result loses {} on calibration samples, where {predicted} was predicted: they are too few, or \
                 what layers lose does not add up; --max-drop bounds what may be lost",
                loss(lost)
            ));
        }
        Ok(best)
    }

    /// What a result loses, if that is far more than was predicted.
    fn unlike_predicted(&self, fitted: &Fitted) -> Result<Option<f64>, Failure> {
        let lost = self.candidates.loss_of(&fitted.model)?;
        Ok(lost.filter(|&lost| lost > UNLIKE * fitted.plan.objective && lost > NOTICEABLE))
    }

    /// The smallest share of one quantity whose loss is allowed, by bisection.
    fn smallest_share(&self, limits: &[Limit]) -> Result<Fitted, Failure> {
        let (mut low, mut high) = (0.0, 1.0);
        let mut best = None;
        for _ in 0..BISECTIONS + 2 {
            let middle = (low + high) / 2.0;
            match self.within(&relaxed(&[Limit { share: 0.0, ..limits[0] }], middle)) {
                Ok(fitted) if fitted.verify.as_ref().is_none_or(|v| v.passed) => {
                    (high, best) = (middle, Some(fitted));
                }
                Ok(_) | Err(Failure::Refused(_)) => low = middle,
                Err(error) => return Err(error),
            }
        }
        best.ok_or_else(|| {
            let name = limits[0].quantity.name();
            Failure::Refused(format!("no {name} below the original's keeps to the allowed drop"))
        })
    }

    /// A result within the limits, whose loss may still be too large.
    fn within(&self, limits: &[Limit]) -> Result<Fitted, Failure> {
        let mut attempts = Attempts::new(self, limits)?;
        for _ in 0..ATTEMPTS {
            Failure::if_stopped(&self.bench.run.progress)?;
            if attempts.step()? == Step::Done {
                break;
            }
        }
        let Some(mut fitted) = attempts.best else { return Err(attempts.missed()) };
        fitted.verify = self.bench.measure(fitted.judged(), self.request.budget)?;
        let solver = match self.request.solver {
            Solver::Auto if limits.len() < 2 => Solver::Pareto,
            Solver::Auto => Solver::Ilp,
            solver => solver,
        };
        fitted.plan.solver = solver.name().to_owned();
        Ok(fitted)
    }
}

/// What a result takes of every quantity that is known, in the units of reports.
fn used(
    model: &Model,
    staged: &lathe_ir::Staged,
    latency: Option<&Latency>,
) -> std::collections::BTreeMap<String, f64> {
    let of = |quantity: Quantity| match quantity {
        Quantity::Latency => latency.and_then(|latency| latency.after_ms),
        _ => Some(counted(quantity, model, staged)),
    };
    Quantity::ALL.into_iter().filter_map(|quantity| Some((quantity.key().to_owned(), of(quantity)?))).collect()
}

/// The limits moved by a part of the way towards what the exact passes left, where nothing is lost.
fn relaxed(limits: &[Limit], part: f64) -> Vec<Limit> {
    let whole = |l: &Limit| (l.exact / l.original).max(l.share);
    limits.iter().map(|l| Limit { share: l.share + part * (whole(l) - l.share), ..*l }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_a_budget_is_of_the_whole_model_in_the_units_of_the_report() {
        let limit = |quantity, share| Limit { quantity, share, original: 2e6, exact: 1.8e6, baseline: 1_000_000 };
        let row = limit(Quantity::Latency, 0.7).row(0.65);
        assert_eq!(row, BudgetRow { limit: 0.7, allowed: 0.7 * 2.0, used: 1.3, share: 0.65 });
        let row = limit(Quantity::Size, 0.7).row(0.6500001);
        assert_eq!(row, BudgetRow { limit: 0.7, allowed: 0.7 * 2e6, used: 1_300_000.0, share: 0.6500001 });
        // What does not change takes 0.8 million, so that regions may take 0.6 of what is allowed.
        assert_eq!(limit(Quantity::Flops, 0.7).of_regions(), Ok(600_000));
        assert_eq!(limit(Quantity::Parameters, 0.3).of_regions(), Err(0.4));
    }

    #[test]
    fn limits_move_towards_what_the_exact_passes_left() {
        let limit = Limit { quantity: Quantity::Size, share: 0.5, original: 100.0, exact: 90.0, baseline: 60 };
        let shares: Vec<f64> = [0.0, 0.5, 1.0].map(|part| relaxed(&[limit], part)[0].share).to_vec();
        assert_eq!(shares, [0.5, 0.7, 0.9]);
        let beyond = Limit { share: 0.95, ..limit };
        assert_eq!(relaxed(&[beyond], 0.5)[0].share, 0.95);
    }
}
