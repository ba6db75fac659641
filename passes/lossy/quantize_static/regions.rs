//! Regions: units joined by values that carry codes, so that nothing between them is rounded twice.

use super::{
    ranges::{Params, Ranges, Width},
    units::{Form, Unit, fuses},
};
use crate::{Outcome, lossy::Recipe};
use lathe_analysis::{Facts, Spread};
use lathe_ir::{Graph, Model, NodeId, ScopeId, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Units that are carried out together, in the order in which they run.
#[derive(Debug, Clone, Default)]
pub(super) struct Region {
    pub units: Vec<Unit>,
}

/// Every region of a model, and why operators that read or give what units do stay in float.
pub(super) fn find(model: &Model, facts: &Facts, recipe: Recipe, outcome: &mut Outcome) -> Vec<Region> {
    let graph = &model.graph;
    let order = graph.sorted(ScopeId::MAIN).unwrap_or_default();
    let mut units: Vec<Unit> = Vec::new();
    let mut refused: Vec<(NodeId, String)> = Vec::new();
    let mut included: BTreeSet<NodeId> = BTreeSet::new();
    for &id in &order {
        if included.contains(&id) {
            continue;
        }
        match fuses(model, facts, id, recipe) {
            Ok(unit) => {
                included.extend(unit.activation);
                units.push(unit);
            }
            Err(reason) => refused.push((id, reason)),
        }
    }
    if recipe == Recipe::Cpu {
        closed(graph, &mut units);
    }
    let produced: BTreeSet<ValueId> = units.iter().map(|unit| unit.output).collect();
    for (id, reason) in refused {
        let layer = ["Conv", "Gemm", "ConvTranspose"].iter().any(|op| graph.node(id).is(op));
        let reads = graph.node(id).inputs().iter().flatten().any(|value| produced.contains(value));
        if layer || reads {
            outcome.refuse(reason, graph.describe(id));
        }
    }
    if recipe != Recipe::Cpu {
        // Every pair is a hint for the runtime, which moves and fuses them: the model is one region.
        let layers = units.iter().any(Unit::has_weight);
        return if layers { vec![Region { units }] } else { Vec::new() };
    }
    let mut regions = connected(graph, units);
    // A layer alone that may give floats is a site of its weight.
    regions.retain(|region| {
        let layers = region.units.iter().filter(|unit| unit.has_weight()).count();
        layers > 1 || region.units.iter().any(|unit| unit.form == Form::Conv)
    });
    regions
}

/// Drops units without weights that read anything but what other units give: codes would be made for them alone.
pub(super) fn closed(graph: &Graph, units: &mut Vec<Unit>) {
    loop {
        let produced: BTreeSet<ValueId> = units.iter().map(|unit| unit.output).collect();
        let before = units.len();
        units.retain(|unit| unit.has_weight() || unit.reads(graph).iter().all(|(_, value)| produced.contains(value)));
        if units.len() == before {
            return;
        }
    }
}

/// Units that read what others give, or share a weight, together.
fn connected(graph: &Graph, units: Vec<Unit>) -> Vec<Region> {
    let mut group: Vec<usize> = (0..units.len()).collect();
    fn root(group: &mut [usize], at: usize) -> usize {
        let mut top = at;
        while group[top] != top {
            group[top] = group[group[top]];
            top = group[top];
        }
        top
    }
    let mut made: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (at, unit) in units.iter().enumerate() {
        let weight = unit.weight(graph);
        for value in unit.reads(graph).into_iter().map(|(_, value)| value).chain(weight) {
            if let Some(&other) = made.get(&value) {
                let (one, other) = (root(&mut group, at), root(&mut group, other));
                group[one.max(other)] = one.min(other);
            }
        }
        made.extend(weight.map(|weight| (weight, at)));
        made.insert(unit.output, at);
    }
    let mut regions: BTreeMap<usize, Region> = BTreeMap::new();
    for (at, unit) in units.into_iter().enumerate() {
        regions.entry(root(&mut group, at)).or_default().units.push(unit);
    }
    regions.into_values().collect()
}

impl Region {
    /// The nodes that would change.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        self.units.iter().flat_map(Unit::nodes).collect()
    }

    /// The values that carry codes.
    pub fn values(&self, graph: &Graph) -> BTreeSet<ValueId> {
        let read = self.units.iter().flat_map(|unit| unit.reads(graph)).map(|(_, value)| value);
        read.chain(self.units.iter().map(|unit| unit.output)).collect()
    }

    /// The units left without those at these places, and without what then reads floats alone.
    pub fn without(&self, graph: &Graph, out: &BTreeSet<usize>, recipe: Recipe) -> Region {
        let kept = self.units.iter().enumerate().filter(|(at, _)| !out.contains(at));
        let mut units: Vec<Unit> = kept.map(|(_, unit)| unit.clone()).collect();
        if recipe == Recipe::Cpu {
            closed(graph, &mut units);
        }
        Region { units }
    }

    /// Whether what a unit gives is rounded: its kernel wants that, or another one reads it.
    pub fn rounds(&self, graph: &Graph, unit: &Unit, recipe: Recipe) -> bool {
        match recipe {
            Recipe::Qnn => return true,
            Recipe::TensorRt | Recipe::OpenVino => return false,
            Recipe::Cpu | Recipe::None => {}
        }
        let read = |other: &Unit| other.reads(graph).iter().any(|&(_, value)| value == unit.output);
        unit.needs_rounded_output() || self.units.iter().any(read)
    }

    /// The parameters of every value that carries codes. Those that are only moved share theirs, of a range that holds all.
    /// Something was seen of every value.
    pub fn params(
        &self,
        graph: &Graph,
        spreads: &BTreeMap<ValueId, Spread>,
        ranges: Ranges,
        (recipe, width): (Recipe, Width),
    ) -> BTreeMap<ValueId, Params> {
        let mut same: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        let mut limits: BTreeMap<ValueId, f32> = BTreeMap::new();
        for unit in &self.units {
            if unit.form == Form::Carried {
                let read = unit.reads(graph)[0].1;
                let first = same.get(&read).copied().unwrap_or(read);
                same.insert(unit.output, first);
            }
            limits.extend(unit.most.map(|most| (unit.output, most)));
        }
        let mut all: BTreeMap<ValueId, Spread> = BTreeMap::new();
        let values = self.values(graph);
        for &value in &values {
            let spread = &spreads[&value];
            let first = same.get(&value).copied().unwrap_or(value);
            let known = all.remove(&first);
            all.insert(first, known.map_or_else(|| spread.clone(), |known| known.with(spread)));
        }
        let params = |value: &ValueId| {
            let fixed = graph.producer(*value).and_then(|id| Params::fixed(&graph.node(id).op_type));
            if let Some(fixed) = fixed.filter(|_| recipe == Recipe::Qnn && width == Width::Sixteen) {
                return fixed;
            }
            let params = Params::by(recipe, width, ranges.of(&all[value], width));
            limits.get(value).map_or(params, |&most| params.at_most(most))
        };
        let of_first: BTreeMap<ValueId, Params> = all.keys().map(|value| (*value, params(value))).collect();
        values.into_iter().map(|v| (v, of_first[&same.get(&v).copied().unwrap_or(v)])).collect()
    }
}
