//! Fourth stage: one candidate or none for every region, so that the predicted loss is least within what may be taken.

use super::candidates::{Candidates, Nested, Nesting, Offer, Region, UnderEffect};
use lathe_passes::{
    Quantity,
    lossy::{
        Candidate,
        allocate::{self, Group, Item, Limits, Plan, SolveError, Solver},
    },
};
use std::time::Instant;

/// A group of the allocator, as plans count them.
struct Entry<'t> {
    region: &'t Region,
    under: UnderEffect<'t>,
    /// The candidate of the region that every option is; `None` where it stays as it is.
    options: Vec<Option<usize>>,
}

/// What a plan does with a region: a candidate, or to leave it as it is.
#[derive(Clone, Copy)]
pub(super) struct Decision<'t> {
    pub region: &'t Region,
    under: UnderEffect<'t>,
    candidate: Option<usize>,
}

impl<'t> Decision<'t> {
    /// What was chosen, and who offers it; `None` where the region stays as it is.
    pub fn candidate(&self) -> Option<(&'t Offer, &'t Candidate)> {
        let (offer, own) = self.region.candidates().nth(self.candidate?)?;
        Some((offer, &offer.site.candidates[own]))
    }

    /// What the region takes as it is.
    pub fn before(&self) -> Item {
        self.region.unchanged(self.under, false)
    }

    /// What the region then takes.
    pub fn after(&self) -> Item {
        let Some(candidate) = self.candidate else { return self.before() };
        let own = self.region.items(self.under, false).into_iter().find(|(index, _)| *index == candidate);
        own.expect("plans choose among what is there").1
    }
}

fn subtract(whole: &mut Item, part: &Item) {
    whole.cost = whole.cost.map(|quantity, cost| cost.saturating_sub(part.cost.of(quantity)));
}

impl Candidates<'_> {
    /// Chooses within the limits, and says how many seconds that took.
    pub fn choose(&self, limits: &Limits, solver: Solver) -> Result<(Plan, f64), SolveError> {
        let start = Instant::now();
        let (groups, _) = Groups::of(self, limits.get(Quantity::Latency).is_some());
        Ok((allocate::solve(&groups, limits, solver)?, start.elapsed().as_secs_f64()))
    }

    /// What a plan does with every region that exists under it.
    pub fn decisions(&self, plan: &Plan) -> Vec<Decision<'_>> {
        let (_, entries) = Groups::of(self, false);
        let chosen = entries.iter().zip(&plan.choices).filter_map(|(entry, option)| {
            let candidate = entry.options[(*option)?];
            Some(Decision { region: entry.region, under: entry.under, candidate })
        });
        chosen.collect()
    }
}

/// The regions as groups of the allocator. A region holds those inside it where it stays as it is, and where its candidate
/// leaves them.
struct Groups<'t> {
    candidates: &'t Candidates<'t>,
    timed: bool,
    entries: Vec<Entry<'t>>,
}

impl<'t> Groups<'t> {
    /// The groups, and what each is in the order in which plans count them.
    fn of(candidates: &'t Candidates<'t>, timed: bool) -> (Vec<Group>, Vec<Entry<'t>>) {
        let nesting = Nesting::of(&candidates.regions, &|_| true);
        let mut all = Groups { candidates, timed, entries: Vec::new() };
        let groups = nesting.roots.iter().map(|&at| all.group(at, &nesting, None)).collect();
        (groups, all.entries)
    }

    /// The group of a region, `around` which a candidate is carried out that leaves it.
    fn group(&mut self, at: usize, nesting: &Nesting, around: Option<&'t Nested>) -> Group {
        let region = &self.candidates.regions[at];
        let under = around.and_then(|nested| nested.costs(at));
        let entry = self.entries.len();
        self.entries.push(Entry { region, under, options: Vec::new() });
        let (mut options, mut decided) = (Vec::new(), Vec::new());
        if !region.required() {
            let unchanged = region.unchanged(under, self.timed);
            options.push(self.holding(unchanged, &nesting.inner[at], nesting, around));
            decided.push(None);
        }
        let nested: Vec<Option<&Nested>> = match around {
            None => region.candidates().map(|(offer, own)| offer.nested.get(own)?.as_ref()).collect(),
            // One candidate around a region is carried out first, and no further ones.
            Some(_) => Vec::new(),
        };
        for (index, item) in region.items(under, self.timed) {
            let item = match nested.get(index).copied().flatten() {
                Some(nested) if !self.leaves_what_is_required(at, nested) => continue,
                Some(nested) => self.holding(item, &nested.nesting.roots, &nested.nesting, Some(nested)),
                None => item,
            };
            options.push(item);
            decided.push(Some(index));
        }
        self.entries[entry].options = decided;
        Group { name: region.site().name.clone(), options }
    }

    /// An item with the regions that exist only where it is taken.
    fn holding(&mut self, mut item: Item, regions: &[usize], nesting: &Nesting, around: Option<&'t Nested>) -> Item {
        for &at in regions {
            // What is left is nothing that another region offers something for.
            let under = around.and_then(|nested| nested.costs(at));
            subtract(&mut item, &self.candidates.regions[at].unchanged(under, self.timed));
            item.inner.push(self.group(at, nesting, around));
        }
        item
    }

    /// Whether all that settings ask for inside the region `at` can still be done.
    fn leaves_what_is_required(&self, at: usize, nested: &Nested) -> bool {
        let regions = &self.candidates.regions;
        let possible = |index: usize| {
            nested.costs(index).is_some_and(|costs| !regions[index].items(Some(costs), false).is_empty())
        };
        let required = |index: &usize| regions[*index].required() && regions[*index].lies_in(&regions[at]);
        (0..regions.len()).filter(required).all(possible)
    }
}
