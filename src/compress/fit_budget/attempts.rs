//! Allocations for one set of limits, one after the other.

use super::{
    super::{
        bench::{Fitted, Written, counted},
        budget_search::BudgetSearch,
    },
    Fit, Limit, used,
};
use crate::Failure;
use anyhow::anyhow;
use lathe_passes::{
    Quantity,
    lossy::allocate::{Limits, SolveError},
};
use lathe_runtime::RunEvent;

/// Times that a result which saved more than a budget of latency asks for is looked beyond.
const LOOSENINGS: usize = 3;

/// Allocations for one set of limits, each told by what was measured of those before.
pub(super) struct Attempts<'a> {
    fit: &'a Fit<'a>,
    limits: &'a [Limit],
    /// What the regions may take in the next plan, of every limit.
    most: Vec<u64>,
    searches: Vec<BudgetSearch>,
    /// Shares of the original that were last measured.
    reached: Vec<f64>,
    /// Whether the smallest plan there is was tried beyond what may be taken: measured, it may still do.
    smallest_tried: bool,
    loosenings: usize,
    /// The last that keeps to the limits.
    pub best: Option<Fitted>,
}

/// Whether there is more to try.
#[derive(PartialEq)]
pub(super) enum Step {
    Again,
    Done,
}

impl<'a> Attempts<'a> {
    /// Nothing was tried yet; an error where the regions can never take as little.
    pub fn new(fit: &'a Fit<'a>, limits: &'a [Limit]) -> Result<Attempts<'a>, Failure> {
        let mut most = Vec::new();
        for limit in limits {
            most.push(limit.of_regions().map_err(|least| limit.unreachable(least, fit.candidates))?);
        }
        let search = |l: &Limit| BudgetSearch::new(l.baseline, l.exact, l.allowed());
        Ok(Attempts {
            fit,
            limits,
            most,
            searches: limits.iter().map(search).collect(),
            reached: Vec::new(),
            smallest_tried: false,
            loosenings: if fit.uses_up { LOOSENINGS } else { 0 },
            best: None,
        })
    }

    /// What the regions may take in the next plan.
    pub fn budget(&self) -> Limits {
        let mut budget = Limits::default();
        self.limits.iter().zip(&self.most).for_each(|(limit, &most)| budget.set(limit.quantity, most));
        budget
    }

    /// What the next plan would lose; `None` where there is none.
    pub fn predicted(&self) -> Option<f64> {
        let chosen = self.fit.candidates.choose(&self.budget(), self.fit.request.solver);
        chosen.ok().map(|(plan, _)| plan.objective)
    }

    /// Chooses, applies and measures once.
    pub fn step(&mut self) -> Result<Step, Failure> {
        let Fit { bench, exact, candidates, request, .. } = *self.fit;
        let budget = self.budget();
        let span = |what| bench.run.progress.span(what);
        let choosing = span("choose");
        let (plan, seconds) = match candidates.choose(&budget, request.solver) {
            Ok(chosen) => chosen,
            Err(error) => return self.without_plan(error),
        };
        drop(choosing);
        // Between what is within and what is not there is nothing.
        let knows = |(limit, search): (&Limit, &BudgetSearch)| search.knows(plan.used.of(limit.quantity));
        if self.best.is_some() && self.limits.iter().zip(&self.searches).all(knows) {
            return Ok(Step::Done);
        }
        let applying = span("apply");
        let mut applied = candidates.apply(exact.model, &plan)?;
        bench.tidy(&mut applied.model)?;
        let written = bench.write(&applied.model, exact)?;
        let staged = &written.staged;
        drop(applying);
        let timings = match self.limits.iter().any(|l| l.quantity == Quantity::Latency) {
            true => Some(bench.time(staged.path())?),
            false => None,
        };
        let took = |limit: &Limit| match &timings {
            Some(timings) if limit.quantity == Quantity::Latency => {
                timings.ratio().unwrap_or(f64::NAN) * limit.original
            }
            _ => counted(limit.quantity, written.model(&applied.model), staged),
        };
        let took: Vec<f64> = self.limits.iter().map(took).collect();
        let Progress { over, loosened } = self.learn(&plan.used, &took);
        if !over {
            let mut plan = applied.plan;
            plan.seconds = seconds;
            let rows = self.limits.iter().zip(&self.reached);
            let reached = rows.clone().map(|(limit, share)| format!("{share:.3} of the {}", limit.quantity.name()));
            bench.run.progress.tell(&RunEvent::Best(reached.collect::<Vec<_>>().join(", ")));
            plan.budget = rows.map(|(l, &share)| (l.quantity.key().to_owned(), l.row(share))).collect();
            let latency = timings.map(|timings| bench.latency(staged.path(), &timings)).transpose()?;
            plan.used = used(written.model(&applied.model), staged, latency.as_ref());
            let (model, Written { staged, half }) = (applied.model, written);
            self.best = Some(Fitted { model, staged, half, verify: None, plan, records: applied.records, latency });
        }
        if self.best.is_some() {
            if !loosened {
                return Ok(Step::Done);
            }
            self.loosenings -= 1;
        }
        Ok(Step::Again)
    }

    /// Sets what the next plan may take, from what this one took.
    fn learn(&mut self, used: &Limits, took: &[f64]) -> Progress {
        let mut progress = Progress { over: false, loosened: false };
        self.reached = self.limits.iter().zip(took).map(|(limit, took)| took / limit.original).collect();
        for (at, (limit, &took)) in self.limits.iter().zip(took).enumerate() {
            let (allowed, used) = (limit.allowed(), used.of(limit.quantity));
            let next = self.searches[at].next(used, took);
            let is_latency = limit.quantity == Quantity::Latency;
            let most = &mut self.most[at];
            match next {
                Some(next) if is_latency && (took > allowed || self.loosenings > 0) => *most = next,
                // Names and attributes take a little more than was reckoned; a plan may have left part of its budget,
                // which it must not take now.
                _ if took > allowed => *most = used.min(*most).saturating_sub((took - allowed).ceil() as u64),
                _ => {}
            }
            progress.over |= took > allowed;
            progress.loosened |= is_latency && self.loosenings > 0 && next.is_some();
        }
        progress
    }

    /// What follows where no plan takes as little as it may.
    fn without_plan(&mut self, error: SolveError) -> Result<Step, Failure> {
        let SolveError::Infeasible { smallest } = error else { return Err(Failure::Error(anyhow!(error))) };
        if self.smallest_tried {
            return Ok(Step::Done);
        }
        if !self.reached.is_empty() {
            // Measured, the smallest may still do.
            self.smallest_tried = true;
            smallest.iter().zip(&mut self.most).for_each(|((_, least, _), most)| *most = (*most).max(*least));
            return Ok(Step::Again);
        }
        let short = smallest.iter().find(|(_, least, most)| least > most).or(smallest.first());
        let &(quantity, least, _) = short.expect("a limit is given");
        let limit = self.limits.iter().find(|l| l.quantity == quantity).expect("limits are those that were given");
        let least = (limit.exact - limit.baseline as f64 + least as f64) / limit.original;
        Err(limit.unreachable(least, self.fit.candidates))
    }

    /// What was measured beyond what is allowed.
    pub fn missed(&self) -> Failure {
        let missed = self.limits.iter().zip(&self.reached).filter(|(limit, reached)| **reached > limit.share);
        let sentence = |(limit, reached): (&Limit, &f64)| format!("{}, and {reached:.3} was measured", limit.asked());
        Failure::Refused(missed.map(sentence).collect::<Vec<_>>().join("; "))
    }
}

/// What a measurement said of a plan.
struct Progress {
    /// Whether something takes more than is allowed.
    over: bool,
    /// Whether a larger plan may be within the budget too.
    loosened: bool,
}
