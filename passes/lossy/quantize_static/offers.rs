//! What could be done with a region: all of it in whole numbers, or all but some of its layers.

use super::{
    Options,
    emit::{StaticEdit, UnitEdit},
    ranges::Params,
    refine::Plan,
    regions::Region,
    rounding::{Fits, Numbers},
    spreads,
    units::{Unit, floats, output_axis},
};
use crate::{
    Error,
    lossy::{Candidate, Cost, Edit, Loss, MethodContext, OVERHEAD, Proposal, Site, prune_units::own_values, weights},
};
use lathe_analysis::{Bindings, Cost as ModelCost, Facts};
use lathe_ir::{Graph, Model, NodeId, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Numbers of layers that stay in float where those that lose most are left out.
const LEFT_OUT: [usize; 4] = [1, 2, 4, 8];

/// Floating-point operations that trying candidates in the whole model may take.
const MOST_FLOPS: f64 = 8e12;

/// Why a region is only rounded.
const UNTRIED: &str =
    "equalisation, GPTQ and corrected biases were not tried: running the model often enough takes too long";

/// Losses below this, squared and relative or in nats, are hardly any.
const NOTICEABLE: f64 = 1e-3;

/// Nodes that a layer in codes has more: those that restore its weight and bias, and a pair behind it.
const ADDED: u64 = 4;

/// A model whose regions become sites.
pub(super) struct Work<'a> {
    pub model: &'a Model,
    pub facts: &'a Facts,
    cost: ModelCost,
    pub cx: &'a MethodContext<'a>,
    pub options: Options,
    /// Floating-point operations that trials may still take.
    pub left: f64,
}

/// What a layer in codes loses of its output, squared and relative: by what it reads, and by its weight.
#[derive(Clone, Copy)]
struct LayerLoss {
    weight: f64,
    /// Floating-point operations that are then done in whole numbers.
    flops: u64,
}

/// Proposes the regions that were found.
pub(super) fn propose(
    model: &Model,
    facts: &Facts,
    regions: &[Region],
    cx: &MethodContext,
    options: Options,
    proposal: &mut Proposal,
) -> Result<(), Error> {
    let cost = ModelCost::of(model, facts, &Bindings::default());
    let mut work = Work { model, facts, cost, cx, options, left: MOST_FLOPS };
    for region in regions {
        match work.site(region)? {
            Ok(site) => {
                if site.candidates.iter().all(|candidate| candidate.loss.measured().is_none()) {
                    proposal.outcome.refuse(UNTRIED, format!("`{}`", work.name(region)));
                }
                proposal.sites.push(site);
            }
            Err(reason) => proposal.outcome.refuse(reason, format!("`{}`", work.name(region))),
        }
    }
    Ok(())
}

/// Whether leaving layers in float is worth its time: where the whole region loses next to nothing, most of that has to go.
fn pays((whole, cut): (f64, f64)) -> bool {
    whole > NOTICEABLE && cut < whole || cut <= whole / 4.0
}

impl Work<'_> {
    pub fn graph(&self) -> &Graph {
        &self.model.graph
    }

    /// `conv1.weight to fc.weight`.
    fn name(&self, region: &Region) -> String {
        let name = |value: ValueId| self.graph().value(value).name.as_str();
        let mut all = region.units.iter().filter_map(|unit| unit.weight(self.graph())).map(name);
        let first = all.next().unwrap_or_default();
        all.next_back().map_or(first.to_owned(), |last| format!("{first} to {last}"))
    }

    /// A region with what could be done with it, or why it stays as it is.
    fn site(&mut self, region: &Region) -> Result<Result<Site, String>, Error> {
        let graph = &self.model.graph;
        let values = region.values(graph);
        let spreads = spreads((graph, self.facts), values.iter().copied(), self.cx)?;
        if let Some(&unseen) = values.iter().find(|value| !spreads.contains_key(value)) {
            let name = &graph.value(unseen).name;
            return Ok(Err(format!("no finite number of `{name}` was seen on the calibration set")));
        }
        let Some(losses) = self.losses(region) else { return Ok(Err("a weight holds a NaN or an infinity".into())) };
        let (plan, whole) = self.plan(region, spreads)?;
        let cuts = if self.options.everywhere { Vec::new() } else { self.cuts(region, &losses, &plan) };
        let partial = |cut: &Region| StaticEdit { whole: false, ..self.edit(cut, &plan) };
        let edits: Vec<StaticEdit> = cuts.iter().map(partial).collect();
        let measured = match whole {
            Some(_) => self.measure(edits.iter().map(|edit| (edit, &plan.fits)))?,
            None => None,
        };
        let all = std::iter::once((region, self.edit(region, &plan), whole));
        let of_cut = |at: usize| measured.as_ref().map(|losses| losses[at]);
        let all = all.chain(cuts.iter().zip(edits).enumerate().map(|(at, (cut, edit))| (cut, edit, of_cut(at))));
        let taps = self.taps(region);
        let nodes = region.nodes();
        let layers = |region: &Region| region.units.iter().filter(|unit| unit.has_weight()).count();
        let mut candidates = Vec::new();
        for (own, edit, measured) in all {
            let error = |(_, at): &(ValueId, usize)| {
                let unit = &region.units[*at];
                let inside = own.units.iter().any(|other| other.node == unit.node);
                if inside { self.error(unit, &losses[at], &plan).sqrt() } else { 0.0 }
            };
            let told = || Loss::PerTap(taps.iter().map(error).collect());
            let loss = measured.map_or_else(told, Loss::Measured);
            let pays = own.units.len() == region.units.len() || whole.zip(measured).is_none_or(pays);
            if measured.is_none_or(f64::is_finite) && pays {
                let label = format!("static int8 of {} of {} layers{}", layers(own), layers(region), edit.steps());
                candidates.push(Candidate { label, cost: self.cost(&nodes, own), loss, edit: Edit::new(edit) });
            }
        }
        if candidates.is_empty() {
            return Ok(Err("in whole numbers it gives none that are finite".into()));
        }
        Ok(Ok(Site {
            weight: None,
            footprint: self.footprint(&nodes, &plan),
            name: self.name(region),
            taps: taps.into_iter().map(|(tap, _)| tap).collect(),
            baseline: self.baseline(&nodes),
            candidates,
            required: self.options.everywhere,
            isolatable: true,
            nodes: nodes.into_iter().collect(),
        }))
    }

    /// The values that would change, in order.
    fn footprint(&self, nodes: &BTreeSet<NodeId>, plan: &Plan) -> Vec<ValueId> {
        let mut all: BTreeSet<ValueId> = own_values(self.graph(), nodes).into_iter().collect();
        all.extend(plan.scaled.iter().filter_map(|scaled| self.graph().find_value(&scaled.name)));
        all.into_iter().collect()
    }

    /// What the model loses with each edit alone; `None` where trying them would take too long.
    pub fn measure<'e>(
        &mut self,
        edits: impl Iterator<Item = (&'e StaticEdit, &'e Fits)>,
    ) -> Result<Option<Vec<f64>>, Error> {
        let Some(calibration) = self.cx.calibration else { return Ok(None) };
        let edits: Vec<(&StaticEdit, &Fits)> = edits.collect();
        if !self.affords(edits.len() as f64) {
            return Ok(None);
        }
        let variant = |(edit, fits): &(&StaticEdit, &Fits)| {
            let mut model = self.model.clone();
            let done = edit.scale(&mut model.graph).and_then(|()| edit.emit(&mut model.graph, fits));
            done.expect("an edit is made for this model");
            model
        };
        let variants: Vec<Model> = edits.iter().map(variant).collect();
        Ok(Some(calibration.trials_of(&variants)?))
    }

    /// Whether so many more runs over the samples of trials may be made, which are then counted.
    pub fn affords(&mut self, runs: f64) -> bool {
        let takes = runs * self.cx.calibration.map_or(0.0, |calibration| calibration.trial_flops());
        let affords = takes <= self.left;
        if affords {
            self.left -= takes;
        }
        affords
    }

    /// The region without some of its layers: the first, the last, and those that lose most for the work they save.
    fn cuts(&self, region: &Region, losses: &BTreeMap<usize, LayerLoss>, plan: &Plan) -> Vec<Region> {
        let mut worst: Vec<(f64, usize)> = losses
            .iter()
            .map(|(&at, loss)| (self.error(&region.units[at], loss, plan) / loss.flops.max(1) as f64, at))
            .collect();
        worst.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let ends = [losses.keys().next(), losses.keys().next_back()];
        let mut out: Vec<BTreeSet<usize>> = ends.into_iter().flatten().map(|&at| BTreeSet::from([at])).collect();
        out.extend(LEFT_OUT.iter().map(|&count| worst.iter().take(count).map(|&(_, at)| at).collect()));
        out.retain(|out| out.len() < losses.len());
        let mut known = BTreeSet::new();
        out.retain(|out| known.insert(out.clone()));
        out.iter().map(|out| region.without(self.graph(), out, self.options.recipe)).collect()
    }

    /// What codes lose of every layer's weight, by its place; `None` where one is not finite.
    fn losses(&self, region: &Region) -> Option<BTreeMap<usize, LayerLoss>> {
        let graph = self.graph();
        let mut all = BTreeMap::new();
        for (at, unit) in region.units.iter().enumerate().filter(|(_, unit)| unit.has_weight()) {
            let numbers = Numbers::of_layer(graph, unit.node, self.options.recipe)?;
            let codes = numbers.codes(self.options.largest, None, None)?;
            let (mut lost, mut energy) = (0.0, 0.0);
            for (at, &w) in numbers.numbers.iter().enumerate() {
                lost += f64::from(w - codes.restored(at, numbers.scale_of(at))).powi(2);
                energy += f64::from(w).powi(2);
            }
            let weight = if energy > 0.0 { lost / energy } else { 0.0 };
            all.insert(at, LayerLoss { weight, flops: self.cost.by_node[unit.node.index()].flops });
        }
        Some(all)
    }

    /// The squared relative error of what a layer gives.
    fn error(&self, unit: &Unit, loss: &LayerLoss, plan: &Plan) -> f64 {
        let Options { recipe, width, .. } = self.options;
        let relative = |value: ValueId| {
            let spread = &plan.spreads[&value];
            let square = spread.square();
            let lost = Params::by(recipe, width, plan.ranges.of(spread, width)).error(spread);
            if square > 0.0 { lost / square } else { 0.0 }
        };
        let read: f64 = unit.reads(self.graph()).iter().map(|&(_, value)| relative(value)).sum();
        loss.weight + read + relative(unit.output)
    }

    /// The outputs of layers whose errors count, with the places of their units.
    fn taps(&self, region: &Region) -> Vec<(ValueId, usize)> {
        let found = weights(self.graph()).0;
        let taps = found.iter().flat_map(|weight| &weight.taps).filter(|tap| tap.rows.is_some());
        let unit = |node: NodeId| region.units.iter().position(|unit| unit.node == node && unit.has_weight());
        taps.filter_map(|tap| Some((tap.output, unit(tap.node)?))).collect()
    }

    pub fn edit(&self, region: &Region, plan: &Plan) -> StaticEdit {
        let graph = self.graph();
        let Options { recipe, width, largest, .. } = self.options;
        let name = |value: ValueId| graph.value(value).name.clone();
        let unit = |unit: &Unit| UnitEdit {
            output: name(unit.output),
            form: unit.form,
            activation: unit.activation.is_some(),
            rounds: region.rounds(graph, unit, recipe),
            correction: plan.corrections.get(&unit.node).cloned().unwrap_or_default(),
        };
        let params = region.params(graph, &plan.spreads, plan.ranges, (recipe, width));
        let params = params.into_iter().map(|(value, params)| (name(value), params));
        let own: BTreeSet<String> = region.units.iter().filter_map(|unit| unit.weight(graph)).map(name).collect();
        StaticEdit {
            units: region.units.iter().map(unit).collect(),
            params: params.collect(),
            largest,
            recipe,
            whole: true,
            scaled: plan.scaled.clone(),
            smoothed: BTreeMap::new(),
            fitted: plan.fits.keys().filter(|name| own.contains(*name)).cloned().collect(),
        }
    }

    fn baseline(&self, nodes: &BTreeSet<NodeId>) -> Cost {
        let graph = self.graph();
        let values = own_values(graph, nodes);
        let tensors = || values.iter().filter_map(|&value| graph.constant(value));
        Cost {
            bytes: tensors().map(|tensor| tensor.byte_len() as u64).sum::<u64>() + OVERHEAD * nodes.len() as u64,
            parameters: tensors().filter(|tensor| tensor.dtype().is_float()).map(|tensor| tensor.len() as u64).sum(),
            flops_per_row: nodes.iter().map(|id| self.cost.by_node[id.index()].flops).sum(),
        }
    }

    /// What the nodes take with these units in codes.
    fn cost(&self, nodes: &BTreeSet<NodeId>, region: &Region) -> Cost {
        let graph = self.graph();
        let mut cost = self.baseline(nodes);
        for unit in region.units.iter().filter(|unit| unit.has_weight()) {
            let Some(weight) = floats(graph, unit.weight(graph)) else { continue };
            let outputs = weight.dims()[output_axis(graph, unit.node)] as u64;
            // Scales of the weight, and of the bias.
            let scales = 4 * outputs * if graph.node(unit.node).input(2).is_some() { 2 } else { 1 };
            cost.bytes = (cost.bytes + scales + ADDED * OVERHEAD).saturating_sub(3 * weight.len() as u64);
        }
        cost
    }
}
