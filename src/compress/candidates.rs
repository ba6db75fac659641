//! The options of every place as the allocator sees them, and the carrying out of its plan.

use super::{
    Seen,
    uncovered::{Unhandled, WORTH_TELLING},
    unit_report::{Done, strip},
};
use crate::{
    Failure, PassRecord,
    report::{self, PlanChoice, PlanCost, PlanUnit, SitesTake},
};
use anyhow::anyhow;
use lathe_analysis::{Facts, Units};
use lathe_ir::{Model, NodeId, ValueId};
use lathe_passes::{
    Quantity, QuantityMap,
    lossy::{
        Candidate, Cost, Loss, METHODS, Method, MethodContext, Needs, NestedCost, NestedEffect, Site, Weight,
        allocate::{self, Group, Limits, Plan, SolveError, Solver, Status},
        block_by_block, weights,
    },
};
use lathe_runtime::Distance;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};
use tempfile::TempDir;

/// Reasons of methods that a refusal names.
const MOST_REASONS: usize = 3;

/// Sites with their options and what those lose, ready to be allocated.
pub(crate) struct Table<'a> {
    pub(super) places: Vec<Place>,
    pub(super) records: BTreeMap<&'static str, PassRecord>,
    pub(super) seen: Seen<'a>,
    pub(super) cx: MethodContext<'a>,
    /// Whether it is known how the outputs answer to errors of any layer.
    pub(super) told: bool,
    /// What no place is of.
    pub(super) unhandled: Vec<Unhandled>,
    /// Holds the statistics where the user has no data folder.
    pub(super) _scratch: TempDir,
}

/// What one method offers for a place.
pub(super) struct Offer {
    pub method: &'static dyn Method,
    pub site: Site,
    pub needs: Needs,
    /// The rise of the outputs' distance per squared error of every tap.
    pub sensitivity: Vec<f64>,
    /// Rows in one run that operations are counted by: of all products with the weight, or 1.
    pub rows: u64,
    /// Of every choice, what is inside where it is carried out; `None` where it leaves nothing as it was.
    pub inside: Vec<Option<Inside>>,
}

/// The places inside another one where a choice of that one is carried out.
pub(super) struct Inside {
    /// What the site of every offer of a place takes then, if it is still a place.
    within: BTreeMap<usize, Vec<Option<NestedCost>>>,
    nesting: Nesting,
}

impl Inside {
    /// Asks the methods of every place inside the place `at`.
    pub fn of(
        places: &[Place],
        at: usize,
        effect: &NestedEffect,
        cx: &MethodContext,
    ) -> Result<Inside, lathe_passes::Error> {
        let mut within = BTreeMap::new();
        for (index, place) in places.iter().enumerate().filter(|(_, place)| place.lies_in(&places[at])) {
            let found = place.offers.iter().map(|offer| offer.method.cost_under(&offer.site, effect, cx));
            let found: Vec<Option<NestedCost>> = found.collect::<Result<_, _>>()?;
            if found.iter().any(Option::is_some) {
                within.insert(index, found);
            }
        }
        let nesting = Nesting::of(places, &|index| within.contains_key(&index));
        Ok(Inside { within, nesting })
    }
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
    pub plan: report::Plan,
    pub records: Vec<PassRecord>,
}

/// What the site of every offer of a place takes where a choice around the place is carried out; `None` outside of one.
type Then<'t> = Option<&'t [Option<NestedCost>]>;

/// A group as a plan counts it.
struct Entry<'t> {
    place: &'t Place,
    then: Then<'t>,
    /// The choice of the place that every option is; `None` where it stays as it is.
    options: Vec<Option<usize>>,
}

/// What a plan does with a place: a choice, or to leave it as it is.
#[derive(Clone, Copy)]
struct Chosen<'t> {
    place: &'t Place,
    then: Then<'t>,
    choice: Option<usize>,
}

impl Offer {
    pub fn loss(&self, candidate: &Candidate) -> f64 {
        match &candidate.loss {
            Loss::PerTap(errors) => self.sensitivity.iter().zip(errors).map(|(s, e)| s * e * e).sum(),
            Loss::Measured(loss) => *loss,
        }
    }

    fn option(&self, cost: &Cost, latency_ns: Option<u64>, error: f64, within: Option<&NestedCost>) -> allocate::Item {
        let flops = cost.flops_per_row.saturating_mul(self.rows);
        let cost = QuantityMap::default()
            .with(Quantity::Size, cost.bytes)
            .with(Quantity::Parameters, cost.parameters)
            .with(Quantity::Flops, within.map_or(flops, |within| part(flops, within.rows)))
            .with(Quantity::Latency, latency_ns);
        allocate::Item { cost, error, inner: Vec::new() }
    }
}

/// A share of a whole number.
fn part(whole: u64, share: f64) -> u64 {
    (whole as f64 * share).round() as u64
}

impl Place {
    /// The site as the first method that offers something names it.
    pub fn site(&self) -> &Site {
        &self.offers[0].site
    }

    fn footprint(&self) -> &[ValueId] {
        &self.site().footprint
    }

    fn lies_in(&self, other: &Place) -> bool {
        let (own, around) = (self.footprint(), other.footprint());
        own.len() < around.len() && own.iter().all(|value| around.binary_search(value).is_ok())
    }

    /// Whether the user asked for a change, so that the place cannot stay as it is.
    fn forced(&self) -> bool {
        self.offers.iter().any(|o| o.site.required)
    }

    /// Every choice in order: what offers it, and its index there.
    pub fn choices(&self) -> impl Iterator<Item = (&Offer, usize)> {
        self.offers.iter().flat_map(|offer| (0..offer.site.candidates.len()).map(move |own| (offer, own)))
    }

    /// Keeps some choices, with their times: a flag for every choice of every offer.
    pub fn retain(&mut self, stays: &[Vec<bool>]) {
        let mut flags = stays.iter().flatten().copied();
        let times = std::mem::take(&mut self.latency);
        let kept = times.iter().enumerate().filter(|(at, _)| *at == 0 || flags.next().unwrap_or(false));
        let kept: Vec<Option<u64>> = kept.map(|(_, ns)| *ns).collect();
        for (offer, stays) in self.offers.iter_mut().zip(stays) {
            let mut flags = stays.iter().copied();
            offer.site.candidates.retain(|_| flags.next().unwrap_or(true));
        }
        self.latency = if kept.len() == 1 + self.choices().count() { kept } else { Vec::new() };
    }

    /// Nanoseconds of what takes `spent`: the place as it is at index 0, or a choice. What is timed by its share of the
    /// operations has that share of those that are left too.
    fn latency(&self, index: usize, offer: &Offer, spent: &Cost, within: Option<&NestedCost>) -> Option<u64> {
        let measured = |index: usize| self.latency.get(index).copied().flatten();
        let Some(within) = within else { return measured(index) };
        if offer.site.isolatable {
            return measured(index).map(|ns| part(ns, within.rows));
        }
        let left = spent.flops_per_row as f64 / offer.site.baseline.flops_per_row.max(1) as f64;
        measured(0).map(|ns| part(ns, within.rows * left))
    }

    /// The place as it is.
    fn whole(&self, then: Then<'_>, timed: bool) -> allocate::Item {
        let first = then.and_then(|then| then.iter().position(Option::is_some)).unwrap_or(0);
        let (offer, within) = (&self.offers[first], then.and_then(|then| then[first].as_ref()));
        let kept = within.map_or(&offer.site.baseline, |within| &within.baseline);
        let latency = self.latency(0, offer, kept, within);
        offer.option(kept, latency.or(timed.then_some(0)), 0.0, within)
    }

    /// What could be done instead, with the index of the choice. What was not measured is not chosen: it is as slow as can
    /// be told.
    fn options(&self, then: Then<'_>, timed: bool) -> Vec<(usize, allocate::Item)> {
        let unknown = timed.then(|| self.latency.first().copied().flatten().unwrap_or(0));
        let (mut index, mut options) = (0, Vec::new());
        for (at, offer) in self.offers.iter().enumerate() {
            let within = then.map(|then| then[at].as_ref());
            for (own, choice) in offer.site.candidates.iter().enumerate() {
                let spent = match within {
                    None => Some(choice.cost),
                    Some(within) => within.and_then(|within| within.candidates[own]),
                };
                if let Some(spent) = spent {
                    let within = within.flatten();
                    let latency = self.latency(index + 1, offer, &spent, within);
                    options.push((index, offer.option(&spent, latency.or(unknown), offer.loss(choice), within)));
                }
                index += 1;
            }
        }
        options
    }
}

impl Chosen<'_> {
    /// What the place then takes.
    fn takes(&self) -> allocate::Item {
        match self.choice {
            None => self.place.whole(self.then, false),
            Some(choice) => {
                let options = self.place.options(self.then, false);
                let own = options.into_iter().find(|(index, _)| *index == choice);
                own.expect("plans choose among what is there").1
            }
        }
    }
}

/// Which places lie in which: a place lies in the smallest one that footprint all that it footprint and more.
struct Nesting {
    roots: Vec<usize>,
    inner: Vec<Vec<usize>>,
}

impl Nesting {
    /// Of those places that are `chosen` by their index.
    fn of(places: &[Place], chosen: &dyn Fn(usize) -> bool) -> Nesting {
        let mut nesting = Nesting { roots: Vec::new(), inner: vec![Vec::new(); places.len()] };
        let sets: Vec<BTreeSet<ValueId>> = places.iter().map(|p| p.footprint().iter().copied().collect()).collect();
        for (index, set) in sets.iter().enumerate().filter(|(index, _)| chosen(*index)) {
            let others = (0..sets.len()).filter(|&other| chosen(other));
            let around = others.filter(|&o| sets[o].len() > set.len() && set.is_subset(&sets[o]));
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

fn subtract(whole: &mut allocate::Item, part: &allocate::Item) {
    whole.cost = whole.cost.map(|quantity, cost| cost.saturating_sub(part.cost.of(quantity)));
}

impl Table<'_> {
    /// Scales the times of options so that those of all places as they are make `most` nanoseconds at most: a layer
    /// by itself takes longer than among others.
    pub(crate) fn scale_latency(&mut self, most: f64) {
        let kept = self.kept().of(Quantity::Latency) as f64;
        let times = self.places.iter_mut().flat_map(|p| &mut p.latency).flatten();
        if kept > most {
            times.for_each(|ns| *ns = (*ns as f64 * most / kept) as u64);
        }
    }

    /// What everything that could change takes as it is.
    pub(crate) fn kept(&self) -> QuantityMap<u64> {
        fn of(table: &Table, nesting: &Nesting, at: usize, measure: Quantity) -> u64 {
            let inside = nesting.inner[at].iter().map(|&i| of(table, nesting, i, measure)).sum();
            table.places[at].whole(None, true).cost.of(measure).max(inside)
        }
        let nesting = Nesting::of(&self.places, &|_| true);
        QuantityMap::of_all(|m| nesting.roots.iter().map(|&at| of(self, &nesting, at, m)).sum())
    }

    /// The places as groups, and what every group is as the allocator counts them. A place holds those inside it where it
    /// stays as it is, and where its choice leaves them.
    fn groups(&self, timed: bool) -> (Vec<Group>, Vec<Entry<'_>>) {
        let nesting = Nesting::of(&self.places, &|_| true);
        let mut order = Vec::new();
        let roots = nesting.roots.iter();
        let groups = roots.map(|&at| self.group(at, timed, &nesting, None, &mut order));
        (groups.collect(), order)
    }

    /// The group of a place among others, `inside` a choice around it that is carried out.
    fn group<'t>(
        &'t self,
        at: usize,
        timed: bool,
        nesting: &Nesting,
        inside: Option<&'t Inside>,
        order: &mut Vec<Entry<'t>>,
    ) -> Group {
        let place = &self.places[at];
        let then: Then<'t> = inside.map(|inside| inside.within[&at].as_slice());
        let entry = order.len();
        order.push(Entry { place, then, options: Vec::new() });
        let (mut options, mut choices) = (Vec::new(), Vec::new());
        if !place.forced() {
            options.push(self.holding(place.whole(then, timed), &nesting.inner[at], timed, nesting, inside, order));
            choices.push(None);
        }
        let insides: Vec<Option<&Inside>> = match inside {
            None => place.choices().map(|(offer, own)| offer.inside.get(own)?.as_ref()).collect(),
            // One choice around a place is carried out first, and no further ones.
            Some(_) => Vec::new(),
        };
        for (index, option) in place.options(then, timed) {
            let option = match insides.get(index).copied().flatten() {
                Some(inside) if !self.leaves_what_is_forced(at, inside) => continue,
                Some(inside) => {
                    self.holding(option, &inside.nesting.roots, timed, &inside.nesting, Some(inside), order)
                }
                None => option,
            };
            options.push(option);
            choices.push(Some(index));
        }
        order[entry].options = choices;
        Group { name: place.site().name.clone(), options }
    }

    /// An option with the places that exist only where it is taken.
    fn holding<'t>(
        &'t self,
        mut option: allocate::Item,
        places: &[usize],
        timed: bool,
        nesting: &Nesting,
        inside: Option<&'t Inside>,
        order: &mut Vec<Entry<'t>>,
    ) -> allocate::Item {
        for &at in places {
            // What is left is nothing that another place offers something for.
            let then: Then<'_> = inside.map(|inside| inside.within[&at].as_slice());
            subtract(&mut option, &self.places[at].whole(then, timed));
            option.inner.push(self.group(at, timed, nesting, inside, order));
        }
        option
    }

    /// Whether all that settings ask for inside the place `at` can still be done.
    fn leaves_what_is_forced(&self, at: usize, inside: &Inside) -> bool {
        let possible = |index: usize| {
            let then = inside.within.get(&index).map(Vec::as_slice);
            then.is_some_and(|then| !self.places[index].options(Some(then), false).is_empty())
        };
        let forced = |index: &usize| self.places[*index].forced() && self.places[*index].lies_in(&self.places[at]);
        (0..self.places.len()).filter(forced).all(possible)
    }

    /// Why a method that was asked for offers nothing; `None` if it does.
    pub(crate) fn unmet(&self, method: &str) -> Option<String> {
        let offers = self.places.iter().flat_map(|p| &p.offers);
        if offers.into_iter().any(|o| o.site.required && o.method.info().name == method) {
            return None;
        }
        let refusals = self.records.get(method).map(|r| &r.outcome.refusals);
        let reason = refusals.into_iter().flatten().max_by_key(|(reason, _)| reason.contains(" are to go"));
        Some(reason.map_or("there is nothing it could do".to_owned(), |(reason, _)| reason.clone()))
    }

    /// What methods that may lower a quantity say most often where they offer nothing, as the end of a sentence: where much of
    /// it is in no place.
    pub(crate) fn declined(&self, measure: Quantity) -> String {
        if !self.places.is_empty() && self.unhandled(measure).is_empty() {
            return String::new();
        }
        let mut said: Vec<(u64, &str, Vec<&str>)> = Vec::new();
        for (name, record) in &self.records {
            let serves = METHODS.iter().any(|m| m.info().name == *name && m.serves(&[measure]));
            let most = record.outcome.refusals.iter().max_by_key(|(_, (count, _))| *count).filter(|_| serves);
            let Some((reason, (count, _))) = most else { continue };
            match said.iter_mut().find(|(_, other, _)| other == reason) {
                Some((all, _, names)) => {
                    *all += *count as u64;
                    names.push(name);
                }
                None => said.push((*count as u64, reason, vec![name])),
            }
        }
        // The sort is stable, so that equal counts stay in the order of the names.
        said.sort_by_key(|(count, ..)| std::cmp::Reverse(*count));
        said.iter().take(MOST_REASONS).map(|(_, reason, names)| format!("; {}: {reason}", names.join(", "))).collect()
    }

    /// How far the outputs of a variant of the model are from its own, on samples that no fit has seen and on others that no
    /// choice was measured on; `None` where it has not the same outputs, or where nothing is known of how they answer to
    /// errors.
    pub(crate) fn lost(&self, variant: &Model) -> Result<Option<f64>, Failure> {
        let names = |model: &Model| -> BTreeSet<String> {
            model.graph.main().outputs().iter().map(|&v| model.graph.value(v).name.clone()).collect()
        };
        if !self.told || !names(&self.seen.model).is_subset(&names(variant)) {
            return Ok(None);
        }
        self.seen.lost(variant).map(Some).map_err(|error| Failure::Error(error.into()))
    }

    /// A loss as people say it.
    pub(crate) fn describe_loss(&self, lost: f64) -> String {
        match self.seen.distance {
            Distance::Relative => format!("a relative L2 error of {:.2e}", lost.max(0.0).sqrt()),
            Distance::Divergence => format!("a divergence of {lost:.2e} nats"),
        }
    }

    /// What takes much of a quantity and no method offers anything for, as the end of a sentence.
    pub(crate) fn unhandled(&self, measure: Quantity) -> String {
        let covered = |unhandled: &&Unhandled| unhandled.share(measure) >= WORTH_TELLING;
        let mut all: Vec<&Unhandled> = self.unhandled.iter().filter(covered).collect();
        all.sort_by(|a, b| b.share(measure).total_cmp(&a.share(measure)));
        let what = match measure {
            Quantity::Size => "bytes of constants",
            Quantity::Parameters => "parameters",
            Quantity::Flops | Quantity::Latency => "FLOPs",
        };
        let one = |unhandled: &&Unhandled| {
            let (percent, nodes) = (100.0 * unhandled.share(measure), unhandled.nodes);
            let plural = if nodes == 1 { "" } else { "s" };
            let reason = unhandled.reason.map(|reason| format!(": {reason}")).unwrap_or_default();
            format!("{nodes} {} node{plural} ({percent:.0} % of the {what}{reason})", unhandled.operator)
        };
        match all.is_empty() {
            true => String::new(),
            false => format!("; no method handles {}", all.iter().map(one).collect::<Vec<_>>().join(", ")),
        }
    }

    /// Chooses within the budget.
    pub(crate) fn choose(&self, limits: &Limits, solver: Solver) -> Result<(Plan, f64), SolveError> {
        let start = Instant::now();
        let (groups, _) = self.groups(limits.get(Quantity::Latency).is_some());
        let table = allocate::Problem { groups, conflicts: Vec::new() };
        Ok((allocate::solve(&table, limits, solver)?, start.elapsed().as_secs_f64()))
    }

    /// Carries out choices of places, one after the other.
    fn edit(
        &self,
        result: &mut Model,
        records: &mut BTreeMap<&'static str, PassRecord>,
        edits: &[Chosen<'_>],
        cx: &MethodContext,
    ) -> Result<(), Failure> {
        for edit in edits {
            let Some((offer, own)) = edit.choice.and_then(|choice| edit.place.choices().nth(choice)) else { continue };
            let (site, choice) = (&offer.site, &offer.site.candidates[own]);
            let name = offer.method.info().name;
            let outcome = offer.method.apply(result, site, choice, cx).map_err(anyhow::Error::from)?;
            if outcome.changes.is_empty() {
                let fault = anyhow!(
                    "`{}` could not be made {} as planned; this is a fault of this program",
                    site.name,
                    choice.label
                );
                return Err(Failure::Error(fault));
            }
            let record = records.get_mut(name).expect("a method that proposes has a record");
            let (before, after) = (edit.place.whole(edit.then, false), edit.takes());
            let delta = |quantity: Quantity| after.cost.of(quantity) as i64 - before.cost.of(quantity) as i64;
            record.weight_bytes_delta += delta(Quantity::Size);
            record.flops_delta += delta(Quantity::Flops);
            record.outcome.merge(outcome);
        }
        Ok(())
    }

    /// Tells of methods that nothing was taken of, though they had something to offer.
    fn say_what_is_not_used(&self, records: &mut BTreeMap<&'static str, PassRecord>) {
        let offers = self.places.iter().flat_map(|p| &p.offers);
        // What was left of others was declined for a reason of its own.
        for offer in offers.filter(|offer| !offer.site.candidates.is_empty()) {
            let record = records.get_mut(offer.method.info().name).expect("a method that proposes has a record");
            if record.outcome.changes.is_empty() {
                record.outcome.refuse("the budget is kept with less loss without it", format!("`{}`", offer.site.name));
            }
        }
    }

    /// Carries a plan out on a copy of `model`.
    pub(crate) fn carry_out(&self, model: &Model, plan: &Plan) -> Result<Compressed, Failure> {
        let mut result = model.clone();
        let mut records = self.records.clone();
        let cx = self.cx.with_calibration(&self.seen);
        let (_, order) = self.groups(false);
        let chosen = order.iter().zip(&plan.choices).filter_map(|(entry, option)| {
            let choice = entry.options[(*option)?];
            Some(Chosen { place: entry.place, then: entry.then, choice })
        });
        let chosen: Vec<Chosen<'_>> = chosen.collect();
        let mut edits: Vec<Chosen<'_>> = chosen.iter().copied().filter(|c| c.choice.is_some()).collect();
        // What reaches over several layers goes first: the others work on what it leaves of theirs.
        edits.sort_by_key(|edit| (edit.place.site().weight.is_some(), std::cmp::Reverse(edit.place.footprint().len())));
        let stages = match block_by_block(&cx).map_err(anyhow::Error::from)? {
            true => stages(model, edits),
            false => vec![edits],
        };
        let mut again = None;
        for (stage, edits) in stages.into_iter().enumerate() {
            if stage > 0 {
                let (found, _) = weights(&result.graph);
                let covered = |w: &&Weight| edits.iter().any(|edit| edit.place.footprint().contains(&w.value));
                let own: Vec<&Weight> = found.iter().filter(covered).collect();
                again = Some(self.seen.again(&result, &own).map_err(anyhow::Error::from)?);
            }
            let cx = cx.with_calibration(again.as_ref().unwrap_or(&self.seen));
            self.edit(&mut result, &mut records, &edits, &cx)?;
        }
        self.say_what_is_not_used(&mut records);
        let choices = chosen.iter().filter_map(told).collect();
        let done = chosen.iter().filter_map(|chosen| {
            let (offer, own) = chosen.place.choices().nth(chosen.choice?)?;
            Some(Done { nodes: &offer.site.nodes, option: &offer.site.candidates[own].label })
        });
        let plan = reported(plan, choices, strip(model, &done.collect::<Vec<_>>()));
        Ok(Compressed { model: result, plan, records: records.into_values().collect() })
    }
}

/// Edits by the residual block that they are in, in the order of the model; what is in none goes with what is before it.
fn stages<'p>(model: &Model, mut edits: Vec<Chosen<'p>>) -> Vec<Vec<Chosen<'p>>> {
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
    edits.sort_by_key(|edit| (edit.place.site().weight.is_some(), first(edit.place)));
    let mut stages: Vec<Vec<Chosen<'p>>> = Vec::new();
    let mut last = None;
    for edit in edits {
        let own = block(edit.place).filter(|_| edit.place.site().weight.is_some());
        match stages.last_mut() {
            Some(stage) if own.is_none() || own == last => stage.push(edit),
            _ => stages.push(vec![edit]),
        }
        last = own.or(last);
    }
    stages
}

/// A choice as the report tells it; `None` for a place of several constants that stays as it is.
fn told(chosen: &Chosen<'_>) -> Option<PlanChoice> {
    let place = chosen.place;
    let (option, method) = match chosen.choice {
        None if place.footprint().len() > 1 => return None,
        None => ("as it is", None),
        Some(index) => {
            let (offer, own) = place.choices().nth(index).expect("plans choose among what was offered");
            (offer.site.candidates[own].label.as_str(), Some(offer.method.info().name.to_owned()))
        }
    };
    let takes = chosen.takes();
    let cost = PlanCost {
        bytes: takes.cost.of(Quantity::Size),
        parameters: takes.cost.of(Quantity::Parameters),
        flops: takes.cost.of(Quantity::Flops),
        latency_ms: takes.cost.get(Quantity::Latency).map(|ns| ns as f64 * 1e-6),
    };
    Some(PlanChoice { site: place.site().name.clone(), option: option.to_owned(), method, cost, error: takes.error })
}

/// The plan as far as it is known before it was carried out.
fn reported(plan: &Plan, choices: Vec<PlanChoice>, units: Vec<PlanUnit>) -> report::Plan {
    let (status, gap) = match plan.status {
        Status::Optimal => ("optimal", 0.0),
        Status::Gap(gap) => ("gap", gap),
        Status::TimeLimit(gap) => ("time limit", gap),
    };
    let [bytes, flops, parameters, latency_ns] = Quantity::ALL.map(|quantity| plan.used.of(quantity));
    report::Plan {
        status: status.to_owned(),
        gap,
        objective: plan.objective,
        bound: plan.bound,
        sites: SitesTake { bytes, parameters, flops, latency_ns },
        choices,
        units,
        ..report::Plan::default()
    }
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
        let place = |footprint: &[usize]| Place {
            offers: vec![Offer {
                method: lathe_passes::lossy::METHODS[0],
                site: Site {
                    weight: None,
                    footprint: footprint.iter().map(|&i| values[i]).collect(),
                    nodes: Vec::new(),
                    name: String::new(),
                    taps: Vec::new(),
                    baseline: Cost { bytes: 10 * footprint.len() as u64, parameters: 0, flops_per_row: 0 },
                    candidates: Vec::new(),
                    required: false,
                    isolatable: true,
                },
                sensitivity: Vec::new(),
                needs: Needs::default(),
                rows: 1,
                inside: Vec::new(),
            }],
            latency: Vec::new(),
        };
        let places = [place(&[1]), place(&[0, 1, 2, 3]), place(&[0, 1]), place(&[4]), place(&[3])];
        let nesting = Nesting::of(&places, &|_| true);
        assert_eq!(nesting.roots, [1, 3]);
        assert_eq!(nesting.inner, [vec![], vec![2, 4], vec![0], vec![], vec![]]);
        assert!(overlap(places[2].footprint(), &[values[1], values[2]]));
        assert!(
            !overlap(places[2].footprint(), places[1].footprint())
                && !overlap(places[0].footprint(), places[3].footprint())
        );
    }
}
