//! The options of every place as the allocator sees them, and the carrying out of its plan.

use super::{
    Seen,
    strip::{Done, strip},
};
use crate::{Failure, PassRecord};
use anyhow::anyhow;
use lathe_analysis::{Facts, Units};
use lathe_ir::{Model, NodeId, ValueId};
use lathe_passes::{
    Context,
    lossy::{
        Choice, Method, RowsLeft, Site, Spent, Weight,
        allocate::{self, Group, Measure, Plan, SolveError, Solver, Status},
        block_by_block, weights,
    },
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};
use tempfile::TempDir;

/// Sites with their options and what those lose, ready to be allocated.
pub(crate) struct Table<'a> {
    pub(super) places: Vec<Place>,
    pub(super) records: BTreeMap<&'static str, PassRecord>,
    pub(super) seen: Seen<'a>,
    /// Holds the statistics where the user has no data folder.
    pub(super) _scratch: TempDir,
}

/// What one method offers for a place.
pub(super) struct Offer {
    pub method: &'static dyn Method,
    pub site: Site,
    /// The rise of the outputs' distance per squared error of every tap.
    pub sensitivity: Vec<f64>,
    /// Rows in one run that operations are counted by: of all products with the weight, or 1.
    pub rows: u64,
    /// Of every choice that leaves the weights inside their places: the share of their rows that is left.
    pub rows_left: Vec<Option<RowsLeft>>,
}

/// Values that would change together, with the options of all methods.
pub(super) struct Place {
    /// At least one.
    pub offers: Vec<Offer>,
    /// Nanoseconds of the place as it is, and of every choice; `None` where they were not measured.
    pub latency: Vec<Option<u64>>,
}

/// A model within the budget as far as the allocator can tell.
pub(crate) struct Compressed {
    pub model: Model,
    pub plan: Value,
    pub records: Vec<PassRecord>,
}

impl Offer {
    fn loss(&self, choice: &Choice) -> f64 {
        let squares = || self.sensitivity.iter().zip(&choice.errors).map(|(s, e)| s * e * e).sum();
        choice.measured.unwrap_or_else(squares)
    }

    fn option(&self, spent: &Spent, latency_ns: Option<u64>, error: f64) -> allocate::Choice {
        allocate::Choice {
            bytes: spent.bytes,
            parameters: spent.parameters,
            flops: spent.flops_per_row.saturating_mul(self.rows),
            latency_ns,
            error,
            ..allocate::Choice::default()
        }
    }
}

impl Place {
    /// The site as the first method that offers something names it.
    pub fn site(&self) -> &Site {
        &self.offers[0].site
    }

    fn covers(&self) -> &[ValueId] {
        &self.site().covers
    }

    /// Whether the user asked for a change, so that the place cannot stay as it is.
    fn forced(&self) -> bool {
        self.offers.iter().any(|o| o.site.forced)
    }

    /// Every choice in order: what offers it, and its index there.
    pub fn choices(&self) -> impl Iterator<Item = (&Offer, usize)> {
        self.offers.iter().flat_map(|offer| (0..offer.site.choices.len()).map(move |own| (offer, own)))
    }

    /// The place as it is.
    fn whole(&self, timed: bool) -> allocate::Choice {
        let measured = self.latency.first().copied().flatten();
        self.offers[0].option(&self.site().kept, measured.or(timed.then_some(0)), 0.0)
    }

    /// What could be done instead. What was not measured is not chosen: it is as slow as can be told.
    fn options(&self, timed: bool) -> Vec<allocate::Choice> {
        let latency = |index: usize| self.latency.get(index).copied().flatten();
        let unknown = timed.then(|| latency(0).unwrap_or(0));
        let choices = self.choices().enumerate();
        let option = |(index, (offer, own)): (usize, (&Offer, usize))| {
            let choice = &offer.site.choices[own];
            offer.option(&choice.spent, latency(index + 1).or(unknown), offer.loss(choice))
        };
        choices.map(option).collect()
    }
}

/// Which places lie in which: a place lies in the smallest one that covers all that it covers and more.
struct Nesting {
    roots: Vec<usize>,
    inner: Vec<Vec<usize>>,
}

impl Nesting {
    fn of(places: &[Place]) -> Nesting {
        let mut nesting = Nesting { roots: Vec::new(), inner: vec![Vec::new(); places.len()] };
        let sets: Vec<BTreeSet<ValueId>> = places.iter().map(|p| p.covers().iter().copied().collect()).collect();
        for (index, set) in sets.iter().enumerate() {
            let around = (0..sets.len()).filter(|&o| sets[o].len() > set.len() && set.is_subset(&sets[o]));
            match around.min_by_key(|&outer| sets[outer].len()) {
                Some(outer) => nesting.inner[outer].push(index),
                None => nesting.roots.push(index),
            }
        }
        nesting
    }
}

/// Whether two places share a part and neither lies in the other, so that what both take cannot be told.
pub(super) fn overlap(one: &[ValueId], other: &[ValueId]) -> bool {
    let shared = one.iter().filter(|value| other.binary_search(value).is_ok()).count();
    shared > 0 && shared < one.len().min(other.len())
}

fn subtract(whole: &mut allocate::Choice, part: &allocate::Choice) {
    whole.bytes = whole.bytes.saturating_sub(part.bytes);
    whole.flops = whole.flops.saturating_sub(part.flops);
    whole.parameters = whole.parameters.saturating_sub(part.parameters);
    whole.latency_ns = whole.latency_ns.map(|ns| ns.saturating_sub(part.latency_ns.unwrap_or(0)));
}

impl Table<'_> {
    /// Scales the times of options so that those of all places as they are make `most` nanoseconds at most: a layer
    /// by itself takes longer than among others.
    pub(crate) fn scale_latency(&mut self, most: f64) {
        let kept = self.kept()[Measure::Latency as usize] as f64;
        let times = self.places.iter_mut().flat_map(|p| &mut p.latency).flatten();
        if kept > most {
            times.for_each(|ns| *ns = (*ns as f64 * most / kept) as u64);
        }
    }

    /// What everything that could change takes as it is: bytes, multiply-adds, numbers, nanoseconds, in the order of
    /// [`Measure::ALL`].
    pub(crate) fn kept(&self) -> [u64; 4] {
        fn of(table: &Table, nesting: &Nesting, at: usize, measure: Measure) -> u64 {
            let inside = nesting.inner[at].iter().map(|&i| of(table, nesting, i, measure)).sum();
            table.places[at].whole(true).cost(measure).max(inside)
        }
        let nesting = Nesting::of(&self.places);
        Measure::ALL.map(|m| nesting.roots.iter().map(|&at| of(self, &nesting, at, m)).sum())
    }

    /// The places as groups, and the place of every group as the allocator counts them. A place holds those inside it
    /// where it stays as it is.
    fn groups(&self, timed: bool) -> (Vec<Group>, Vec<usize>) {
        let nesting = Nesting::of(&self.places);
        let mut order = Vec::new();
        let groups = nesting.roots.iter().map(|&at| self.group(at, timed, &nesting, &mut order)).collect();
        (groups, order)
    }

    fn group(&self, at: usize, timed: bool, nesting: &Nesting, order: &mut Vec<usize>) -> Group {
        let place = &self.places[at];
        order.push(at);
        let mut options = Vec::new();
        if !place.forced() {
            let mut whole = place.whole(timed);
            for &inner in &nesting.inner[at] {
                // What is left is nothing that another place offers something for.
                subtract(&mut whole, &self.places[inner].whole(timed));
                whole.inner.push(self.group(inner, timed, nesting, order));
            }
            options.push(whole);
        }
        for ((offer, own), mut option) in place.choices().zip(place.options(timed)) {
            for (value, share) in offer.rows_left[own].iter().flatten() {
                self.add_inside(&mut option, at, (*value, *share), timed, order);
            }
            options.push(option);
        }
        Group { name: place.site().name.clone(), options }
    }

    /// Adds the place of a weight inside place `at` to one of its options, for a share of the weight's rows.
    fn add_inside(
        &self,
        option: &mut allocate::Choice,
        at: usize,
        (value, share): (ValueId, f64),
        timed: bool,
        order: &mut Vec<usize>,
    ) {
        let inside = self.places[at].covers().contains(&value);
        let own = self.places.iter().position(|p| p.site().weight == Some(value) && p.covers().len() == 1);
        let Some(own) = own.filter(|_| inside) else { return };
        let place = &self.places[own];
        let fewer = |mut choice: allocate::Choice| {
            choice.flops = (choice.flops as f64 * share) as u64;
            choice.latency_ns = choice.latency_ns.map(|ns| (ns as f64 * share) as u64);
            choice
        };
        let whole = fewer(place.whole(timed));
        subtract(option, &whole);
        order.push(own);
        let options = [whole].into_iter().chain(place.options(timed).into_iter().map(fewer)).collect();
        option.inner.push(Group { name: place.site().name.clone(), options });
    }

    /// Why a method that was asked for offers nothing; `None` if it does.
    pub(crate) fn unmet(&self, method: &str) -> Option<String> {
        let offers = self.places.iter().flat_map(|p| &p.offers);
        if offers.into_iter().any(|o| o.site.forced && o.method.info().name == method) {
            return None;
        }
        let refusals = self.records.get(method).map(|r| &r.outcome.refusals);
        let reason = refusals.into_iter().flatten().max_by_key(|(reason, _)| reason.contains(" are to go"));
        Some(reason.map_or("there is nothing it could do".to_owned(), |(reason, _)| reason.clone()))
    }

    /// What methods say where none of them offers anything, as the end of a sentence.
    pub(crate) fn declined(&self) -> String {
        if !self.places.is_empty() {
            return String::new();
        }
        let said = self.records.iter().filter_map(|(name, record)| {
            let (reason, _) = record.outcome.refusals.iter().max_by_key(|(_, (count, _))| *count)?;
            Some(format!("; {name}: {reason}"))
        });
        said.collect()
    }

    /// Chooses within the budget.
    pub(crate) fn choose(&self, budget: &allocate::Budget, solver: Solver) -> Result<(Plan, f64), SolveError> {
        let start = Instant::now();
        let (groups, _) = self.groups(budget.latency_ns.is_some());
        let table = allocate::Table { groups, conflicts: Vec::new() };
        Ok((allocate::solve(&table, budget, solver)?, start.elapsed().as_secs_f64()))
    }

    /// Carries out choices of places, one after the other.
    fn edit(
        &self,
        result: &mut Model,
        records: &mut BTreeMap<&'static str, PassRecord>,
        edits: &[(&Place, usize)],
        cx: &Context,
    ) -> Result<(), Failure> {
        for &(place, index) in edits {
            let (offer, own) = place.choices().nth(index).expect("plans choose among what was offered");
            let (site, choice) = (&offer.site, &offer.site.choices[own]);
            let name = offer.method.info().name;
            let outcome = offer.method.rewrite(result, site, own, cx).map_err(anyhow::Error::from)?;
            if outcome.changes.is_empty() {
                let fault = anyhow!(
                    "`{}` could not be made {} as planned; this is a fault of this program",
                    site.name,
                    choice.name
                );
                return Err(Failure::Error(fault));
            }
            let record = records.get_mut(name).expect("a method that proposes has a record");
            record.weight_bytes_delta += choice.spent.bytes as i64 - site.kept.bytes as i64;
            let rows = offer.rows as i64;
            record.flops_delta += (choice.spent.flops_per_row as i64 - site.kept.flops_per_row as i64) * rows;
            record.outcome.merge(outcome);
        }
        Ok(())
    }

    /// Carries a plan out on a copy of `model`.
    pub(crate) fn carry_out(&self, model: &Model, plan: &Plan, cx: &Context) -> Result<Compressed, Failure> {
        let mut result = model.clone();
        let mut records = self.records.clone();
        let cx = Context {
            calibration: Some(&self.seen),
            target: cx.target,
            settings: cx.settings.clone(),
            ..Context::default()
        };
        let (_, order) = self.groups(false);
        // Inside a place that does not stay as it is, nothing is chosen. Where that is possible, the first option is to
        // leave a place as it is.
        let chosen = order.iter().zip(&plan.choices).filter_map(|(&at, chosen)| {
            let place = &self.places[at];
            Some((place, (*chosen)?.checked_sub(usize::from(!place.forced()))))
        });
        let chosen: Vec<(&Place, Option<usize>)> = chosen.collect();
        let mut edits: Vec<(&Place, usize)> = chosen.iter().filter_map(|&(p, choice)| Some((p, choice?))).collect();
        // What reaches over several layers goes first: the others work on what it leaves of theirs.
        edits.sort_by_key(|(place, _)| (place.site().weight.is_some(), std::cmp::Reverse(place.covers().len())));
        let stages = match block_by_block(&cx).map_err(anyhow::Error::from)? {
            true => stages(model, edits),
            false => vec![edits],
        };
        let mut again = None;
        for (stage, edits) in stages.into_iter().enumerate() {
            if stage > 0 {
                let (found, _) = weights(&result.graph);
                let covered = |w: &&Weight| edits.iter().any(|(place, _)| place.covers().contains(&w.value));
                let own: Vec<&Weight> = found.iter().filter(covered).collect();
                again = Some(self.seen.again(&result, &own).map_err(anyhow::Error::from)?);
            }
            let cx = Context {
                calibration: Some(again.as_ref().unwrap_or(&self.seen)),
                target: cx.target,
                settings: cx.settings.clone(),
                ..Context::default()
            };
            self.edit(&mut result, &mut records, &edits, &cx)?;
        }
        let choices = chosen.iter().filter_map(|&(place, choice)| told(place, choice)).collect();
        let done = chosen.iter().filter_map(|&(place, choice)| {
            let (offer, own) = place.choices().nth(choice?)?;
            Some(Done { nodes: &offer.site.nodes, option: &offer.site.choices[own].name })
        });
        let mut json = plan_json(plan, choices);
        json["units"] = strip(model, &done.collect::<Vec<_>>()).into();
        Ok(Compressed { model: result, plan: json, records: records.into_values().collect() })
    }
}

/// Edits by the residual block that they are in, in the order of the model; what is in none goes with what is before it.
fn stages<'p>(model: &Model, mut edits: Vec<(&'p Place, usize)>) -> Vec<Vec<(&'p Place, usize)>> {
    let units = Units::find(model, &Facts::infer(model));
    let order: BTreeMap<NodeId, usize> =
        model.graph.nodes(lathe_ir::ScopeId::MAIN).enumerate().map(|(at, id)| (id, at)).collect();
    let first = |place: &Place| place.site().nodes.iter().filter_map(|id| order.get(id)).min().copied();
    let block = |place: &Place| {
        let mut unit = place.site().nodes.iter().find_map(|&id| units.of_node(id))?;
        while let Some(parent) = units.get(unit).parent {
            unit = parent;
        }
        let unit = units.get(unit);
        Some((unit.chain, unit.position / units.period(unit.chain).unwrap_or(1).max(1)))
    };
    // What reaches over several layers stays first.
    edits.sort_by_key(|(place, _)| (place.site().weight.is_some(), first(place)));
    let mut stages: Vec<Vec<(&Place, usize)>> = Vec::new();
    let mut last = None;
    for edit in edits {
        let own = block(edit.0).filter(|_| edit.0.site().weight.is_some());
        match stages.last_mut() {
            Some(stage) if own.is_none() || own == last => stage.push(edit),
            _ => stages.push(vec![edit]),
        }
        last = own.or(last);
    }
    stages
}

/// A choice as the report tells it; `None` for a place of several constants that stays as it is.
fn told(place: &Place, choice: Option<usize>) -> Option<Value> {
    let first = &place.offers[0];
    let (option, method, offer, spent, error) = match choice {
        None if place.covers().len() > 1 => return None,
        None => ("as it is", None, first, &first.site.kept, 0.0),
        Some(index) => {
            let (offer, own) = place.choices().nth(index).expect("plans choose among what was offered");
            let choice = &offer.site.choices[own];
            (choice.name.as_str(), Some(offer.method.info().name), offer, &choice.spent, offer.loss(choice))
        }
    };
    let mut cost = json!({
        "bytes": spent.bytes,
        "parameters": spent.parameters,
        "flops": spent.flops_per_row.saturating_mul(offer.rows),
    });
    if let Some(ns) = place.latency.get(choice.map_or(0, |index| index + 1)).copied().flatten() {
        cost["latency_ms"] = json!(ns as f64 * 1e-6);
    }
    Some(json!({ "site": first.site.name, "option": option, "method": method, "cost": cost, "error": error }))
}

fn plan_json(plan: &Plan, choices: Vec<Value>) -> Value {
    let (status, gap) = match plan.status {
        Status::Optimal => ("optimal", 0.0),
        Status::Gap(gap) => ("gap", gap),
        Status::TimeLimit(gap) => ("time limit", gap),
    };
    let names = ["bytes", "flops", "parameters", "latency_ns"];
    let used: serde_json::Map<String, Value> =
        names.iter().zip(plan.used).map(|(name, figure)| ((*name).to_owned(), json!(figure))).collect();
    json!({
        "status": status,
        "gap": gap,
        "objective": plan.objective,
        "bound": plan.bound,
        "used": used,
        "choices": choices,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::{Graph, ScopeId, Tensor};

    #[test]
    fn places_lie_in_the_smallest_that_holds_them_and_overlap_is_seen() {
        let mut graph = Graph::new("g");
        let values: Vec<ValueId> = (0..5)
            .map(|i| graph.add_initializer(ScopeId::MAIN, &format!("v{i}"), Tensor::from_f32s(&[1], &[0.0])))
            .collect();
        let place = |covers: &[usize]| Place {
            offers: vec![Offer {
                method: lathe_passes::lossy::METHODS[0],
                site: Site {
                    weight: None,
                    covers: covers.iter().map(|&i| values[i]).collect(),
                    nodes: Vec::new(),
                    name: String::new(),
                    taps: Vec::new(),
                    kept: Spent { bytes: 10 * covers.len() as u64, parameters: 0, flops_per_row: 0 },
                    choices: Vec::new(),
                    forced: false,
                    apart: true,
                },
                sensitivity: Vec::new(),
                rows: 1,
                rows_left: Vec::new(),
            }],
            latency: Vec::new(),
        };
        let places = [place(&[1]), place(&[0, 1, 2, 3]), place(&[0, 1]), place(&[4]), place(&[3])];
        let nesting = Nesting::of(&places);
        assert_eq!(nesting.roots, [1, 3]);
        assert_eq!(nesting.inner, [vec![], vec![2, 4], vec![0], vec![], vec![]]);
        assert!(overlap(places[2].covers(), &[values[1], values[2]]));
        assert!(!overlap(places[2].covers(), places[1].covers()) && !overlap(places[0].covers(), places[3].covers()));
    }
}
