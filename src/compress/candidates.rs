//! Candidates with their prices: regions of the model, what every method offers for each, and how regions nest.

use super::{calibrate::Calibrated, uncovered::Uncovered};
use crate::{Failure, PassRecord};
use lathe_ir::{Model, ValueId};
use lathe_passes::{
    Quantity, QuantityMap,
    lossy::{
        Candidate, Cost, Loss, METHODS, Method, MethodContext, Needs, NestedCost, NestedEffect, Site, allocate::Item,
    },
};
use lathe_runtime::Distance;
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

/// Reasons of methods that a refusal names.
const MOST_REASONS: usize = 3;

/// Everything that can be chosen, and what it takes and loses.
pub(super) struct Candidates<'a> {
    pub regions: Vec<Region>,
    /// What every method said, by its name.
    pub records: BTreeMap<&'static str, PassRecord>,
    /// Why methods cannot do what settings ask of them.
    pub unmet: BTreeMap<&'static str, String>,
    pub calibrated: Rc<Calibrated<'a>>,
    pub cx: MethodContext<'a>,
    /// What is in no region.
    pub uncovered: Vec<Uncovered>,
}

/// Values that would change together, with the sites of all methods that have them as footprint.
#[derive(Clone)]
pub(super) struct Region {
    /// At least one.
    pub offers: Vec<Offer>,
    /// Nanoseconds of the region as it is, and of every candidate; `None` where they were not measured.
    pub latency: Vec<Option<u64>>,
}

/// What one method offers for a region.
#[derive(Clone)]
pub(super) struct Offer {
    pub method: &'static dyn Method,
    pub site: Site,
    pub needs: Needs,
    /// The rise of the outputs' distance per squared error of every tap.
    pub sensitivity: Vec<f64>,
    /// Rows in one run that operations are counted by: of all products with the weight, or 1.
    pub rows: u64,
    /// Of every candidate, the regions inside that are left where it is carried out; `None` where it leaves nothing of them
    /// as it was.
    pub nested: Vec<Option<Nested>>,
}

/// What the sites of a region take, offer by offer, where a candidate around the region is carried out; `None` outside of
/// one.
pub(super) type UnderEffect<'t> = Option<&'t [Option<NestedCost>]>;

/// The regions inside another one where a candidate of that one is carried out.
#[derive(Clone)]
pub(super) struct Nested {
    /// By region, what the site of every offer takes then, if it is still a site.
    costs: BTreeMap<usize, Vec<Option<NestedCost>>>,
    pub nesting: Nesting,
}

impl Nested {
    /// Asks the methods of every region inside the one at `at`.
    pub fn under(
        regions: &[Region],
        at: usize,
        effect: &NestedEffect,
        cx: &MethodContext,
    ) -> Result<Nested, lathe_passes::Error> {
        let mut costs = BTreeMap::new();
        for (index, region) in regions.iter().enumerate().filter(|(_, region)| region.lies_in(&regions[at])) {
            let of_offers = region.offers.iter().map(|offer| offer.method.cost_under(&offer.site, effect, cx));
            let of_offers: Vec<Option<NestedCost>> = of_offers.collect::<Result<_, _>>()?;
            if of_offers.iter().any(Option::is_some) {
                costs.insert(index, of_offers);
            }
        }
        let nesting = Nesting::of(regions, &|index| costs.contains_key(&index));
        Ok(Nested { costs, nesting })
    }

    /// What the sites of a region take then; `None` where it is none any more.
    pub fn costs(&self, region: usize) -> UnderEffect<'_> {
        self.costs.get(&region).map(Vec::as_slice)
    }
}

/// Which regions lie in which: a region lies in the smallest one with all of its footprint and more.
#[derive(Clone)]
pub(super) struct Nesting {
    pub roots: Vec<usize>,
    pub inner: Vec<Vec<usize>>,
}

impl Nesting {
    /// Of those regions that are `included` by their index.
    pub fn of(regions: &[Region], included: &dyn Fn(usize) -> bool) -> Nesting {
        let mut nesting = Nesting { roots: Vec::new(), inner: vec![Vec::new(); regions.len()] };
        let sets: Vec<BTreeSet<ValueId>> = regions.iter().map(|r| r.footprint().iter().copied().collect()).collect();
        for (index, set) in sets.iter().enumerate().filter(|(index, _)| included(*index)) {
            let others = (0..sets.len()).filter(|&other| included(other));
            let around = others.filter(|&o| sets[o].len() > set.len() && set.is_subset(&sets[o]));
            match around.min_by_key(|&outer| sets[outer].len()) {
                Some(outer) => nesting.inner[outer].push(index),
                None => nesting.roots.push(index),
            }
        }
        nesting
    }
}

/// Whether two footprints share a part and neither lies in the other, so that it is not known what both take together.
pub(super) fn overlap(one: &[ValueId], other: &[ValueId]) -> bool {
    let shared = one.iter().filter(|value| other.binary_search(value).is_ok()).count();
    shared > 0 && shared < one.len().min(other.len())
}

/// A share of a whole number.
fn part(whole: u64, share: f64) -> u64 {
    (whole as f64 * share).round() as u64
}

impl Offer {
    /// What a candidate adds to the predicted loss.
    pub fn loss(&self, candidate: &Candidate) -> f64 {
        match &candidate.loss {
            Loss::PerTap(errors) => self.sensitivity.iter().zip(errors).map(|(s, e)| s * e * e).sum(),
            Loss::Measured(loss) => *loss,
        }
    }

    fn item(&self, cost: &Cost, latency_ns: Option<u64>, error: f64, nested: Option<&NestedCost>) -> Item {
        let flops = cost.flops_per_row.saturating_mul(self.rows);
        let cost = QuantityMap::default()
            .with(Quantity::Size, cost.bytes)
            .with(Quantity::Parameters, cost.parameters)
            .with(Quantity::Flops, nested.map_or(flops, |nested| part(flops, nested.rows)))
            .with(Quantity::Latency, latency_ns);
        Item { cost, error, inner: Vec::new() }
    }
}

impl Region {
    /// The site as the first method that offers something names it.
    pub fn site(&self) -> &Site {
        &self.offers[0].site
    }

    pub fn footprint(&self) -> &[ValueId] {
        &self.site().footprint
    }

    pub fn lies_in(&self, other: &Region) -> bool {
        let (own, around) = (self.footprint(), other.footprint());
        own.len() < around.len() && own.iter().all(|value| around.binary_search(value).is_ok())
    }

    /// Whether the user asked for a change, so that the region cannot stay as it is.
    pub fn required(&self) -> bool {
        self.offers.iter().any(|o| o.site.required)
    }

    /// Every candidate in order: what offers it, and its index there.
    pub fn candidates(&self) -> impl Iterator<Item = (&Offer, usize)> {
        self.offers.iter().flat_map(|offer| (0..offer.site.candidates.len()).map(move |own| (offer, own)))
    }

    /// Keeps some candidates, with their times: a flag for every candidate of every offer.
    pub fn retain(&mut self, stays: &[Vec<bool>]) {
        let mut flags = stays.iter().flatten().copied();
        let times = std::mem::take(&mut self.latency);
        let kept = times.iter().enumerate().filter(|(at, _)| *at == 0 || flags.next().unwrap_or(false));
        let kept: Vec<Option<u64>> = kept.map(|(_, ns)| *ns).collect();
        for (offer, stays) in self.offers.iter_mut().zip(stays) {
            let mut flags = stays.iter().copied();
            offer.site.candidates.retain(|_| flags.next().unwrap_or(true));
        }
        self.latency = if kept.len() == 1 + self.candidates().count() { kept } else { Vec::new() };
    }

    /// Nanoseconds of what takes `cost`: the region as it is at index 0, or a candidate. What is timed by its share of the
    /// operations has that share of those that are left too.
    fn latency(&self, index: usize, offer: &Offer, cost: &Cost, nested: Option<&NestedCost>) -> Option<u64> {
        let measured = |index: usize| self.latency.get(index).copied().flatten();
        let Some(nested) = nested else { return measured(index) };
        if offer.site.isolatable {
            return measured(index).map(|ns| part(ns, nested.rows));
        }
        let left = cost.flops_per_row as f64 / offer.site.baseline.flops_per_row.max(1) as f64;
        measured(0).map(|ns| part(ns, nested.rows * left))
    }

    /// The region as it is.
    pub fn unchanged(&self, under: UnderEffect<'_>, timed: bool) -> Item {
        let first = under.and_then(|costs| costs.iter().position(Option::is_some)).unwrap_or(0);
        let (offer, nested) = (&self.offers[first], under.and_then(|costs| costs[first].as_ref()));
        let baseline = nested.map_or(&offer.site.baseline, |nested| &nested.baseline);
        let latency = self.latency(0, offer, baseline, nested);
        offer.item(baseline, latency.or(timed.then_some(0)), 0.0, nested)
    }

    /// What could be done instead, with the index of the candidate. What was not measured is not chosen: it is taken to be as
    /// slow as what is there.
    pub fn items(&self, under: UnderEffect<'_>, timed: bool) -> Vec<(usize, Item)> {
        let unknown = timed.then(|| self.latency.first().copied().flatten().unwrap_or(0));
        let (mut index, mut items) = (0, Vec::new());
        for (at, offer) in self.offers.iter().enumerate() {
            let nested = under.map(|costs| costs[at].as_ref());
            for (own, candidate) in offer.site.candidates.iter().enumerate() {
                let cost = match nested {
                    None => Some(candidate.cost),
                    Some(nested) => nested.and_then(|nested| nested.candidates[own]),
                };
                if let Some(cost) = cost {
                    let nested = nested.flatten();
                    let latency = self.latency(index + 1, offer, &cost, nested);
                    items.push((index, offer.item(&cost, latency.or(unknown), offer.loss(candidate), nested)));
                }
                index += 1;
            }
        }
        items
    }
}

impl Candidates<'_> {
    /// Scales the times of candidates so that those of all regions as they are make `most` nanoseconds at most: a layer
    /// by itself takes longer than among others.
    pub fn scale_latency(&mut self, most: f64) {
        let baseline = self.baseline().of(Quantity::Latency) as f64;
        let times = self.regions.iter_mut().flat_map(|region| &mut region.latency).flatten();
        if baseline > most {
            times.for_each(|ns| *ns = (*ns as f64 * most / baseline) as u64);
        }
    }

    /// What all regions take as they are.
    pub fn baseline(&self) -> QuantityMap<u64> {
        fn of(candidates: &Candidates, nesting: &Nesting, at: usize, quantity: Quantity) -> u64 {
            let inside = nesting.inner[at].iter().map(|&i| of(candidates, nesting, i, quantity)).sum();
            candidates.regions[at].unchanged(None, true).cost.of(quantity).max(inside)
        }
        let nesting = Nesting::of(&self.regions, &|_| true);
        QuantityMap::of_all(|quantity| nesting.roots.iter().map(|&at| of(self, &nesting, at, quantity)).sum())
    }

    /// Why a method that was asked for offers nothing; `None` if it does.
    pub fn unmet(&self, method: &str) -> Option<String> {
        let mut offers = self.regions.iter().flat_map(|region| &region.offers);
        if offers.any(|offer| offer.site.required && offer.method.info().name == method) {
            return None;
        }
        let refused = || self.records.get(method)?.outcome.refusals.keys().last().cloned();
        let reason = self.unmet.get(method).cloned().or_else(refused);
        Some(reason.unwrap_or_else(|| "there is nothing it could do".to_owned()))
    }

    /// What methods that may lower a quantity say most often where they offer nothing, as the end of a sentence: where much of
    /// it is in no region.
    pub fn describe_declined(&self, quantity: Quantity) -> String {
        if !self.regions.is_empty() && self.describe_uncovered(quantity).is_empty() {
            return String::new();
        }
        let mut said: Vec<(u64, &str, Vec<&str>)> = Vec::new();
        for (name, record) in &self.records {
            let serves = METHODS.iter().any(|m| m.info().name == *name && m.serves(&[quantity]));
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

    /// What takes much of a quantity and no method offers anything for, as the end of a sentence.
    pub fn describe_uncovered(&self, quantity: Quantity) -> String {
        super::uncovered::describe(&self.uncovered, quantity)
    }

    /// How far the outputs of a variant of the model are from its own, on samples that no fit has seen and on others that no
    /// candidate was measured on; `None` where it has not the same outputs, or where nothing is known of how they answer to
    /// errors.
    pub fn loss_of(&self, variant: &Model) -> Result<Option<f64>, Failure> {
        let names = |model: &Model| -> BTreeSet<String> {
            model.graph.main().outputs().iter().map(|&v| model.graph.value(v).name.clone()).collect()
        };
        let calibration = &self.calibrated.calibration;
        if !self.is_known() || !names(&calibration.model).is_subset(&names(variant)) {
            return Ok(None);
        }
        Ok(Some(calibration.loss_of(variant)?))
    }

    /// Whether it is known how the outputs answer to errors of any layer.
    pub fn is_known(&self) -> bool {
        self.calibrated.sensitivities.is_known
    }

    /// A loss as people say it.
    pub fn describe_loss(&self, loss: f64) -> String {
        match self.calibrated.calibration.distance {
            Distance::Relative => format!("a relative L2 error of {:.2e}", loss.max(0.0).sqrt()),
            Distance::Divergence => format!("a divergence of {loss:.2e} nats"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::{Graph, ScopeId, Tensor};

    #[test]
    fn regions_lie_in_the_smallest_around_them_and_overlap_is_seen() {
        let mut graph = Graph::new("g");
        let values: Vec<ValueId> = (0..5)
            .map(|i| graph.add_initializer(ScopeId::MAIN, &format!("v{i}"), Tensor::from_f32s(&[1], &[0.0])))
            .collect();
        let region = |footprint: &[usize]| Region {
            offers: vec![Offer {
                method: METHODS[0],
                site: Site {
                    weight: None,
                    footprint: footprint.iter().map(|&i| values[i]).collect(),
                    nodes: Vec::new(),
                    name: String::new(),
                    taps: Vec::new(),
                    baseline: Cost { bytes: 10 * footprint.len() as u64, ..Cost::default() },
                    candidates: Vec::new(),
                    required: false,
                    isolatable: true,
                },
                needs: Needs::default(),
                sensitivity: Vec::new(),
                rows: 1,
                nested: Vec::new(),
            }],
            latency: Vec::new(),
        };
        let regions = [region(&[1]), region(&[0, 1, 2, 3]), region(&[0, 1]), region(&[4]), region(&[3])];
        let nesting = Nesting::of(&regions, &|_| true);
        assert_eq!(nesting.roots, [1, 3]);
        assert_eq!(nesting.inner, [vec![], vec![2, 4], vec![0], vec![], vec![]]);
        assert!(overlap(regions[2].footprint(), &[values[1], values[2]]));
        assert!(!overlap(regions[2].footprint(), regions[1].footprint()));
        assert!(!overlap(regions[0].footprint(), regions[3].footprint()));
    }
}
