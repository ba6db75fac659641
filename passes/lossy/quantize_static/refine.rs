//! What makes a region in whole numbers lose less at the same cost: ranges, channels made alike, codes and biases that make up
//! for what is lost. Each is carried out in the whole model, and kept only where that loses less.

use super::{
    channels::{self, Equal, Group, Scaled},
    emit::StaticEdit,
    offers::Work,
    ranges::Ranges,
    regions::Region,
    rounding::{Fits, Numbers, divided, fit_layer, mean_rows},
    rows, sizes,
    units::Unit,
};
use crate::{
    Error,
    lossy::{Recipe, prune_units::own_values},
};
use lathe_analysis::{Rows, Spread};
use lathe_ir::{Graph, NodeId, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Ways to make channels alike that are tried.
const TRIED: [Equal; 4] = [Equal::Weights, Equal::Activations(0.5), Equal::Activations(0.75), Equal::Activations(1.0)];

/// Runs over the samples of trials that counting numbers takes about as long as.
const COUNTING: f64 = 4.0;

/// What rounding a weight takes of the mean of every output of its layer.
pub(super) type Corrections = BTreeMap<NodeId, Vec<f32>>;

/// How a region is carried out.
#[derive(Clone)]
pub(super) struct Plan {
    pub spreads: BTreeMap<ValueId, Spread>,
    pub ranges: Ranges,
    pub scaled: Vec<Scaled>,
    pub fits: Fits,
    pub corrections: Corrections,
}

impl StaticEdit {
    /// What was done besides rounding, as reports add it.
    pub fn steps(&self) -> String {
        let corrected = self.units.iter().any(|unit| !unit.correction.is_empty());
        let steps = [
            (!self.scaled.is_empty(), "equalised"),
            (!self.smoothed.is_empty(), "smoothed"),
            (!self.fitted.is_empty(), "GPTQ"),
            (corrected, "biases corrected"),
        ];
        steps.into_iter().filter(|(done, _)| *done).map(|(_, step)| format!(", {step}")).collect()
    }
}

impl Work<'_> {
    /// How the whole region is carried out so that it loses least, and what it loses then, if that can be tried.
    pub fn plan(&mut self, region: &Region, spreads: BTreeMap<ValueId, Spread>) -> Result<(Plan, Option<f64>), Error> {
        let with = |ranges: Ranges| Plan {
            spreads: spreads.clone(),
            ranges,
            scaled: Vec::new(),
            fits: Fits::new(),
            corrections: Corrections::new(),
        };
        let plans: Vec<Plan> = self.options.ranges.tried().into_iter().map(with).collect();
        let Some((mut plan, mut loss)) = self.best(region, plans)? else {
            return Ok((with(self.options.ranges), None));
        };
        for step in [Work::equalised, Work::rounded] {
            let plans = step(self, region, &plan)?;
            if let Some((better, less)) = self.best(region, plans)?.filter(|(_, less)| *less < loss) {
                (plan, loss) = (better, less);
            }
        }
        Ok((plan, Some(loss)))
    }

    /// The plan that loses least in the whole model; `None` where trying them would take too long, or there are none.
    fn best(&mut self, region: &Region, plans: Vec<Plan>) -> Result<Option<(Plan, f64)>, Error> {
        if plans.is_empty() {
            return Ok(None);
        }
        let edits: Vec<StaticEdit> = plans.iter().map(|plan| self.edit(region, plan)).collect();
        let measured = self.measure(edits.iter().zip(&plans).map(|(edit, plan)| (edit, &plan.fits)))?;
        let Some(measured) = measured else { return Ok(None) };
        Ok(plans.into_iter().zip(measured).min_by(|a, b| a.1.total_cmp(&b.1)))
    }

    /// The plan with channels made alike in several ways, and ranges seen anew.
    fn equalised(&mut self, region: &Region, plan: &Plan) -> Result<Vec<Plan>, Error> {
        let (graph, values) = (&self.model.graph, region.values(&self.model.graph));
        let Some(calibration) = self.cx.calibration else { return Ok(Vec::new()) };
        let groups = self.groups(region, &values);
        let sizes = sizes((graph, self.facts), values.iter().copied(), self.cx)?;
        let mut ways: Vec<Vec<Scaled>> = Vec::new();
        for equal in TRIED {
            let scaled = channels::equalise(graph, &groups, &sizes, equal);
            if !scaled.is_empty() && !ways.contains(&scaled) {
                ways.push(scaled);
            }
        }
        let mut plans = Vec::new();
        for scaled in ways {
            if !self.affords(COUNTING) {
                break;
            }
            let mut model = self.model.clone();
            channels::scale(&mut model.graph, &scaled).expect("constants are those that were found");
            let watched: Vec<Rows> = values.iter().map(|&value| rows(graph, self.facts, value)).collect();
            let spreads = calibration.spreads_of(&model, &watched)?;
            let spreads: BTreeMap<ValueId, Spread> =
                values.iter().zip(spreads).filter_map(|(&value, spread)| Some((value, spread?))).collect();
            if spreads.len() == values.len() {
                plans.push(Plan { spreads, scaled, ..plan.clone() });
            }
        }
        Ok(plans)
    }

    /// Channels that may be made alike: of values that the region rounds, by constants that are its own.
    fn groups(&self, region: &Region, values: &BTreeSet<ValueId>) -> Vec<Group> {
        let own: BTreeSet<ValueId> = own_values(self.graph(), &region.nodes()).into_iter().collect();
        // Elsewhere the region is the model, and nothing else has a claim to what is outside of it.
        let inside = |group: &Group| self.options.recipe != Recipe::Cpu || group.constants().all(|c| own.contains(&c));
        let rounded = |group: &Group| group.values.iter().any(|value| values.contains(value));
        let mut groups = channels::groups(self.model, self.facts);
        groups.retain(|group| rounded(group) && inside(group));
        groups
    }

    /// The plan with codes and biases that make up for what is lost, one at a time and both.
    fn rounded(&mut self, region: &Region, plan: &Plan) -> Result<Vec<Plan>, Error> {
        let mut model = self.model.clone();
        channels::scale(&mut model.graph, &plan.scaled).expect("constants are those that were found");
        let graph = &model.graph;
        let edit = self.edit(region, plan);
        let mut fits = Fits::new();
        for unit in region.units.iter().filter(|unit| unit.has_weight()) {
            let name = unit.weight(graph).map(|weight| graph.value(weight).name.clone());
            let codes = fit_layer(graph, unit, &edit, self.cx)?;
            fits.extend(name.zip(codes));
        }
        let mut plans = Vec::new();
        for fits in [Fits::new(), fits] {
            let corrections = self.corrections(region, graph, (plan, &fits))?;
            let fitted = Plan { fits, ..plan.clone() };
            if !corrections.is_empty() {
                plans.push(Plan { corrections, ..fitted.clone() });
            }
            if !fitted.fits.is_empty() {
                plans.push(fitted);
            }
        }
        Ok(plans)
    }

    /// What the biases of layers have to make up for, where it is known what they read on average and they have a bias.
    fn corrections(&self, region: &Region, graph: &Graph, (plan, fits): (&Plan, &Fits)) -> Result<Corrections, Error> {
        let mut all = Corrections::new();
        let (Some(calibration), Recipe::Cpu | Recipe::Qnn) = (self.cx.calibration, self.options.recipe) else {
            return Ok(all);
        };
        for unit in region.units.iter().filter(|unit| unit.has_weight()) {
            let Some(rows) = mean_rows(graph, unit).filter(|_| graph.node(unit.node).input(2).is_some()) else {
                continue;
            };
            let Some(gram) = calibration.gram(&rows)? else { continue };
            let divided = divided(graph, unit, &plan.scaled);
            let mean = gram.mean.iter().enumerate().map(|(at, mean)| match divided {
                Some(factors) => mean / f64::from(factors[at * factors.len() / gram.mean.len()]),
                None => *mean,
            });
            let mean: Vec<f64> = mean.collect();
            all.extend(self.correction(graph, unit, &mean, fits).map(|correction| (unit.node, correction)));
        }
        Ok(all)
    }

    /// The mean of what a layer reads times what rounding takes of its weight; `None` where they do not fit.
    fn correction(&self, graph: &Graph, unit: &Unit, mean: &[f64], fits: &Fits) -> Option<Vec<f32>> {
        let numbers = Numbers::of_layer(graph, unit.node, self.options.recipe)?;
        let weight = unit.weight(graph)?;
        let fitted = fits.get(&graph.value(weight).name);
        let codes = numbers.codes(self.options.largest, None, fitted)?;
        let by_channel = Rows::of_depthwise(graph, unit.node).is_some();
        let expected = if by_channel { numbers.outputs() } else { numbers.inputs() };
        if mean.len() != expected {
            return None;
        }
        let mut sums = vec![0.0; numbers.outputs()];
        for (at, &w) in numbers.numbers.iter().enumerate() {
            let (input, output) = numbers.place(at);
            let mean = mean[if by_channel { output } else { input }];
            sums[output] += mean * f64::from(w - codes.restored(at, numbers.scale_of(at)));
        }
        let finite = sums.iter().all(|sum| sum.is_finite());
        finite.then(|| sums.into_iter().map(|sum| sum as f32).collect())
    }
}
