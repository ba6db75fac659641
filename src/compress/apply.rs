//! Fifth stage: carrying a plan out on a copy of the model.

use super::{
    calibration::Calibration,
    candidates::{Candidates, Region},
    choose::Decision,
    seen_before::SeenBefore,
    unit_report::{Applied as AppliedTo, units},
};
use crate::{
    Failure, PassRecord,
    report::{self, PlanChoice, PlanCost, PlanUnit, SitesTake},
};
use anyhow::anyhow;
use lathe_analysis::{Facts, Units};
use lathe_ir::{Model, NodeId, ScopeId};
use lathe_passes::{
    Quantity,
    lossy::{
        MethodContext, Weight,
        allocate::{Plan, Status},
        block_by_block, weights,
    },
};
use std::collections::BTreeMap;

/// A model within the budget as far as the allocator knows.
pub(super) struct Applied {
    pub model: Model,
    pub plan: report::Plan,
    pub records: Vec<PassRecord>,
}

impl Candidates<'_> {
    /// Carries a plan out on a copy of `model`.
    pub fn apply(&self, model: &Model, plan: &Plan) -> Result<Applied, Failure> {
        let mut result = model.clone();
        let mut records = self.records.clone();
        let cx = self.cx.with_calibration(&self.calibrated.calibration);
        let decisions = self.decisions(plan);
        let mut edits: Vec<Decision<'_>> = decisions.iter().copied().filter(|d| d.candidate().is_some()).collect();
        // What reaches over several layers goes first: the others work on what it leaves of theirs.
        edits.sort_by_key(|edit| {
            (edit.region.site().weight.is_some(), std::cmp::Reverse(edit.region.footprint().len()))
        });
        let stages = match block_by_block(&cx)? {
            true => stages(model, edits),
            false => vec![edits],
        };
        let mut again = None;
        for (stage, edits) in stages.into_iter().enumerate() {
            if stage > 0 {
                again = Some(self.calibrate_again(&result, &edits)?);
            }
            let cx = cx.with_calibration(again.as_ref().unwrap_or(&self.calibrated.calibration));
            edit(&mut result, &mut records, &edits, &cx)?;
        }
        self.refuse_what_is_not_used(&mut records);
        let choices = decisions.iter().filter_map(choice).collect();
        let applied = decisions.iter().filter_map(|decision| {
            let (offer, candidate) = decision.candidate()?;
            Some(AppliedTo { nodes: &offer.site.nodes, label: &candidate.label })
        });
        let plan = reported(plan, choices, units(model, &applied.collect::<Vec<_>>()));
        Ok(Applied { model: result, plan, records: records.into_values().collect() })
    }

    /// What the layers that these edits change read and give in a variant of the model.
    fn calibrate_again(&self, variant: &Model, edits: &[Decision<'_>]) -> Result<Calibration<'_>, Failure> {
        let (layers, _) = weights(&variant.graph);
        let changes = |w: &&Weight| edits.iter().any(|edit| edit.region.footprint().contains(&w.value));
        let changed: Vec<&Weight> = layers.iter().filter(changes).collect();
        Ok(self.calibrated.calibration.again(variant, &changed)?)
    }

    /// Records the methods that nothing was taken of, though they had something to offer.
    fn refuse_what_is_not_used(&self, records: &mut BTreeMap<&'static str, PassRecord>) {
        let offers = self.regions.iter().flat_map(|region| &region.offers);
        // What was left of others was declined for a reason of its own.
        for offer in offers.filter(|offer| !offer.site.candidates.is_empty()) {
            let record = records.get_mut(offer.method.info().name).expect("a method that proposes has a record");
            if record.outcome.changes.is_empty() {
                record.outcome.refuse("the budget is kept with less loss without it", format!("`{}`", offer.site.name));
            }
        }
    }
}

/// Carries out candidates of regions, one after the other.
fn edit(
    result: &mut Model,
    records: &mut BTreeMap<&'static str, PassRecord>,
    edits: &[Decision<'_>],
    cx: &MethodContext,
) -> Result<(), Failure> {
    let mut seen = cx.calibration.map(|seen| SeenBefore::new(seen, result));
    for edit in edits {
        let Some((offer, candidate)) = edit.candidate() else { continue };
        let cx = &seen.as_ref().map_or_else(|| cx.clone(), |seen| cx.with_calibration(seen));
        let outcome = offer.method.apply(result, &offer.site, candidate, cx)?;
        if outcome.changes.is_empty() {
            let why: String = outcome.refusals.keys().map(|reason| format!(": {reason}")).collect();
            return Err(Failure::Error(anyhow!(
                "`{}` could not be made {} as planned{why}; this is a fault of this program",
                offer.site.name,
                candidate.label
            )));
        }
        if let Some(seen) = seen.as_mut().filter(|_| offer.site.weight.is_none()) {
            seen.follow(result);
        }
        let record = records.get_mut(offer.method.info().name).expect("a method that proposes has a record");
        let (before, after) = (edit.before(), edit.after());
        let delta = |quantity: Quantity| after.cost.of(quantity) as i64 - before.cost.of(quantity) as i64;
        record.weight_bytes_delta += delta(Quantity::Size);
        record.flops_delta += delta(Quantity::Flops);
        record.outcome.merge(outcome);
    }
    Ok(())
}

/// Edits by the residual block that they are in, in the order of the model; what is in none goes with what is before it.
fn stages<'p>(model: &Model, mut edits: Vec<Decision<'p>>) -> Vec<Vec<Decision<'p>>> {
    let all = Units::find(model, &Facts::infer(model));
    let order: BTreeMap<NodeId, usize> =
        model.graph.nodes(ScopeId::MAIN).enumerate().map(|(at, id)| (id, at)).collect();
    let first = |region: &Region| region.site().nodes.iter().filter_map(|id| order.get(id)).min().copied();
    let block = |region: &Region| {
        let mut unit = region.site().nodes.iter().find_map(|&id| all.of_node(id))?;
        while let Some(parent) = all.get(unit).parent {
            unit = parent;
        }
        let unit = all.get(unit);
        Some((unit.chain, unit.position / all.period(unit.chain).unwrap_or(1).max(1)))
    };
    // What reaches over several layers stays first.
    edits.sort_by_key(|edit| (edit.region.site().weight.is_some(), first(edit.region)));
    let mut stages: Vec<Vec<Decision<'p>>> = Vec::new();
    let mut last = None;
    for edit in edits {
        let own = block(edit.region).filter(|_| edit.region.site().weight.is_some());
        match stages.last_mut() {
            Some(stage) if own.is_none() || own == last => stage.push(edit),
            _ => stages.push(vec![edit]),
        }
        last = own.or(last);
    }
    stages
}

/// A decision as the report tells it; `None` for a region of several constants that stays as it is.
fn choice(decision: &Decision<'_>) -> Option<PlanChoice> {
    let region = decision.region;
    let (option, method) = match decision.candidate() {
        None if region.footprint().len() > 1 => return None,
        None => ("as it is", None),
        Some((offer, candidate)) => (candidate.label.as_str(), Some(offer.method.info().name.to_owned())),
    };
    let after = decision.after();
    let cost = PlanCost {
        bytes: after.cost.of(Quantity::Size),
        parameters: after.cost.of(Quantity::Parameters),
        flops: after.cost.of(Quantity::Flops),
        latency_ms: after.cost.get(Quantity::Latency).map(|ns| ns as f64 * 1e-6),
    };
    Some(PlanChoice { site: region.site().name.clone(), option: option.to_owned(), method, cost, error: after.error })
}

/// The plan as far as it is known before anything was measured.
fn reported(plan: &Plan, choices: Vec<PlanChoice>, units: Vec<PlanUnit>) -> report::Plan {
    let (status, gap) = match plan.status {
        Status::Optimal => ("optimal", 0.0),
        Status::Gap(gap) => ("gap", gap),
        Status::TimeLimit(gap) => ("time limit", gap),
    };
    report::Plan {
        status: status.to_owned(),
        gap,
        objective: plan.objective,
        bound: plan.bound,
        sites: SitesTake {
            bytes: plan.used.of(Quantity::Size),
            parameters: plan.used.of(Quantity::Parameters),
            flops: plan.used.of(Quantity::Flops),
            latency_ns: plan.used.of(Quantity::Latency),
        },
        choices,
        units,
        ..report::Plan::default()
    }
}
