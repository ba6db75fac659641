//! Plain alternatives: what other tools would do, with every layer alike, beside the plan that was chosen.
//!
//! Each is told with what it takes and is predicted to lose. One that keeps to the budgets and is predicted to lose hardly
//! more than the plan is carried out and measured too, and taken where it loses less.

use super::{
    bench::{Bench, Exact, Fitted},
    candidates::{Candidates, Offer, Region},
    fit_budget::{Limit, measured},
};
use crate::{Failure, report::Alternative};
use lathe_passes::lossy::{
    Candidate,
    allocate::{Limits, Plan, Solver},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

/// How many times what the plan is predicted to lose an alternative may lose to be measured: predictions are rough.
const CLOSE: f64 = 2.0;

impl Candidates<'_> {
    /// The names of the plain alternatives that the candidates hold.
    fn plain_names(&self) -> BTreeSet<&'static str> {
        let names = |(offer, own): (&Offer, usize)| offer.method.plain(&offer.site.candidates[own]);
        self.regions.iter().flat_map(Region::candidates).filter_map(names).collect()
    }

    /// The candidates of one alternative and no others, with the plan that takes all of them; `None` where there is none.
    fn alike(&self, name: &str) -> Option<(Candidates<'_>, Plan)> {
        let mut regions = Vec::new();
        for region in &self.regions {
            let mut region = region.clone();
            let is_plain = |offer: &Offer, candidate: &Candidate| offer.method.plain(candidate) == Some(name);
            let stays: Vec<Vec<bool>> = region
                .offers
                .iter()
                .map(|offer| offer.site.candidates.iter().map(|candidate| is_plain(offer, candidate)).collect())
                .collect();
            region.retain(&stays);
            region.offers.iter_mut().for_each(|offer| {
                // What can be nested in a candidate is of others.
                offer.nested.clear();
                offer.site.required = !offer.site.candidates.is_empty();
            });
            if region.required() {
                regions.push(region);
            }
        }
        let only = Candidates {
            regions,
            records: self.records.clone(),
            unmet: BTreeMap::new(),
            calibrated: Rc::clone(&self.calibrated),
            cx: self.cx.clone(),
            uncovered: Vec::new(),
        };
        let (plan, _) = only.choose(&Limits::default(), Solver::Pareto).ok()?;
        Some((only, plan))
    }
}

/// The result with the plain alternatives beside it, or one of them in its place. Without `warnings` none is measured.
pub(super) fn beside(
    (bench, exact): (&Bench<'_>, &Exact<'_>),
    candidates: &Candidates<'_>,
    (limits, budget): (&[Limit], &super::Budget),
    mut fitted: Fitted,
    warnings: Option<&mut Vec<String>>,
) -> Result<Fitted, Failure> {
    let mut notes = Vec::new();
    let mut rows = Vec::new();
    for name in candidates.plain_names() {
        let Some((only, plan)) = candidates.alike(name) else { continue };
        let own = only.baseline();
        let takes = |limit: &Limit| {
            let saved = own.of(limit.quantity) as f64 - plan.used.of(limit.quantity) as f64;
            (limit.exact - saved) / limit.original
        };
        let takes: Vec<f64> = limits.iter().map(takes).collect();
        let keeps = |takes: &[f64]| limits.iter().zip(takes).all(|(limit, share)| *share <= limit.share);
        let told =
            |takes: &[f64]| limits.iter().zip(takes).map(|(l, share)| (l.quantity.key().to_owned(), *share)).collect();
        let mut row = Alternative {
            name: name.to_owned(),
            takes: told(&takes),
            loses: plan.objective,
            measured: false,
            keeps: keeps(&takes),
        };
        let is_close = row.keeps && plan.objective <= CLOSE * fitted.plan.objective;
        if warnings.is_some() && is_close && bench.verify {
            let Some(mine) = candidates.loss_of(&fitted.model)? else { break };
            let (mut found, takes) = match measured((bench, exact), &only, limits, &plan) {
                Ok(measured) => measured,
                Err(Failure::Error(error)) => {
                    // The result does not depend on it.
                    notes.push(format!("{name} for every layer alike cannot be measured: {error:#}"));
                    rows.push(row);
                    continue;
                }
                Err(other) => return Err(other),
            };
            let loses = candidates.loss_of(&found.model)?.unwrap_or(f64::INFINITY);
            row = Alternative { takes: told(&takes), loses, measured: true, keeps: keeps(&takes), ..row };
            if row.keeps && loses < mine {
                found.verify = bench.measure(found.judged(), budget)?;
            }
            // A result that keeps to the allowed drop is not given up for one that does not.
            let passes = |fitted: &Fitted| fitted.verify.as_ref().is_none_or(|verify| verify.passed);
            if row.keeps && loses < mine && (passes(&found) || !passes(&fitted)) {
                let loss = |loss: f64| candidates.describe_loss(loss);
                notes.push(format!(
                    "{name} for every layer alike loses {} on calibration samples, and the plan that was predicted to lose \
                     least {}: the plain one is taken",
                    loss(loses),
                    loss(mine)
                ));
                found.plan.solver.clone_from(&fitted.plan.solver);
                fitted = found;
            }
        }
        rows.push(row);
    }
    fitted.plan.alternatives = rows;
    if let Some(warnings) = warnings {
        warnings.append(&mut notes);
    }
    Ok(fitted)
}
