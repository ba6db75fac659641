//! Inputs of layers that hardly ever matter: left out for good.

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, OVERHEAD, Proposal, Site, Weight,
    factors::{self, LayerStatistics},
    on_all_cores, spectrum, weights,
};
use crate::{Error, Info, Kind, Opt, Outcome, Saving};
use faer::Mat;
use lathe_analysis::{Magnitudes, Rows};
use lathe_ir::{Graph, Model, Node, ScopeId, Tensor, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Leaves out inputs of layers that are small in nearly every row.
pub struct DropInputs;

static INFO: Info = Info {
    name: "drop-inputs",
    summary: "leave out inputs of layers that are small in nearly every row (static WINA; off by default)",
    doc: "Offers layers without the inputs whose size times the norm of their weights lies below a threshold on at least \
          99.9 % of the rows of the calibration set; the thresholds are those under which all small inputs together make \
          1, 2, 5 or 10 % of the output. A `Gather` picks the inputs that are left, and the bias takes the mean of the \
          others. Declines where that would not be smaller, and on layers \
          whose inputs matter alike, as most do: without such inputs it offers nothing.",
    options: &[Opt {
        name: "enabled",
        unit: "true or false",
        default: "false",
        doc: "whether it offers anything: how large every input is takes long to count, and few models have such inputs",
    }],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters, Saving::Flops],
    source: Some("threshold of Chen et al. 2025, WINA, arXiv:2505.19427, made static"),
};

/// Share of the rows on which an input must be small.
pub const QUIET: f64 = 0.999;

/// Rows that are needed to tell: one in so many may be larger.
const LEAST_ROWS: u64 = 1000;

/// Relative errors of a layer's output that all small inputs together may make.
const LIMITS: [f64; 4] = [0.01, 0.02, 0.05, 0.1];

const FEW: &str = "too few of its inputs matter little";

/// Units that a layer reads, and the numbers that it multiplies per unit.
fn units(graph: &Graph, reader: &Weight) -> (usize, usize) {
    let conv = reader.taps.first().is_some_and(|tap| graph.node(tap.node).is("Conv"));
    let units = if conv { reader.dims[1] } else { reader.sides().0 };
    (units, reader.sides().0 / units)
}

/// Kept inputs come in multiples of this many.
fn step(units: usize) -> usize {
    if units >= 64 { 8 } else { 4 }
}

/// How many of `units` go where `quiet` may; 0 if that is too few.
fn dropped(units: usize, quiet: usize) -> usize {
    units - (units - quiet).next_multiple_of(step(units)).clamp(step(units).min(units), units)
}

/// Whether the smallest inputs together make little of every use's output.
fn may_be_quiet(graph: &Graph, weight: &Weight, statistics: &LayerStatistics) -> bool {
    let (units, window) = units(graph, weight);
    let most = LIMITS.iter().copied().fold(0.0, f64::max).powi(2);
    let energies = energies(graph, weight, statistics, units, window);
    let mut sorted: Vec<f64> = energies;
    sorted.sort_by(f64::total_cmp);
    let mut sum = 0.0;
    let quiet = sorted.iter().take_while(|&&energy| {
        sum += energy;
        sum <= most
    });
    dropped(units, quiet.count()) > 0
}

/// The share of the output's mean square that every unit makes by itself, the largest of all uses.
fn energies(graph: &Graph, weight: &Weight, statistics: &LayerStatistics, units: usize, window: usize) -> Vec<f64> {
    let mut most = vec![0.0f64; units];
    for (tap, (gram, output)) in weight.taps.iter().zip(statistics.grams.iter().zip(&statistics.outputs)) {
        let norms = weight.norms(graph, tap).unwrap_or_default();
        for (unit, most) in most.iter_mut().enumerate() {
            let all = (unit * window..(unit + 1) * window).map(|i| gram.matrix.get(i, i) * norms[i].powi(2));
            *most = most.max(all.sum::<f64>() / output);
        }
    }
    most
}

/// All units, the ones to keep first, and numbers of units to drop from the end.
struct Order {
    units: Vec<usize>,
    drops: Vec<usize>,
}

/// Puts the units of a layer in order of how large they hardly ever are.
fn order(
    graph: &Graph,
    weight: &Weight,
    statistics: &LayerStatistics,
    cx: &MethodContext,
) -> Result<Result<Order, &'static str>, Error> {
    if !may_be_quiet(graph, weight, statistics) {
        return Ok(Err(FEW));
    }
    let Some(calibration) = cx.calibration else { return Ok(Err("nothing was seen of it on the calibration set")) };
    let (units, window) = units(graph, weight);
    // By limit, whether a unit is quiet for every use; by unit, its size relative to the largest limit's threshold.
    let mut quiet = vec![vec![true; units]; LIMITS.len()];
    let mut sizes = vec![0.0f64; units];
    for (tap, output) in weight.taps.iter().zip(&statistics.outputs) {
        let magnitudes = tap.rows.as_ref().map(|rows| calibration.magnitudes(rows)).transpose()?.flatten();
        let norms = weight.norms(graph, tap).unwrap_or_default();
        let Some(magnitudes) = magnitudes.filter(|m| m.features() == norms.len()) else {
            return Ok(Err("it was not watched how large its inputs are"));
        };
        if magnitudes.rows < LEAST_ROWS {
            return Ok(Err("fewer than 1,000 rows of its inputs were seen"));
        }
        let largest = |unit: usize| largest(&magnitudes, &norms, unit * window..(unit + 1) * window);
        for (limit, quiet) in LIMITS.iter().zip(&mut quiet) {
            let threshold = magnitudes.threshold(limit * limit * output, &norms, &norms);
            quiet.iter_mut().enumerate().for_each(|(unit, quiet)| *quiet &= largest(unit) <= threshold);
            sizes.iter_mut().enumerate().for_each(|(unit, size)| *size = size.max(largest(unit) / threshold));
        }
    }
    let energies = energies(graph, weight, statistics, units, window);
    let mut order: Vec<usize> = (0..units).collect();
    order.sort_by(|&a, &b| sizes[b].total_cmp(&sizes[a]).then(energies[b].total_cmp(&energies[a])));
    let mut drops: Vec<usize> =
        quiet.iter().map(|quiet| dropped(units, quiet.iter().filter(|q| **q).count())).filter(|&d| d > 0).collect();
    drops.sort_unstable();
    drops.dedup();
    Ok(if drops.is_empty() { Err(FEW) } else { Ok(Order { units: order, drops }) })
}

/// What the numbers of a unit, weighed, stay below on nearly all rows.
fn largest(magnitudes: &Magnitudes, norms: &[f64], unit: std::ops::Range<usize>) -> f64 {
    let bound = |i: usize| if norms[i] == 0.0 { 0.0 } else { magnitudes.bound(i, QUIET) * norms[i] };
    unit.map(bound).fold(0.0, f64::max)
}

/// What of a layer's inputs is left, and what the bias of every use takes over.
struct Picked {
    /// In rising order.
    kept: Vec<usize>,
    biases: Vec<Vec<f32>>,
    /// The relative error of every use.
    errors: Vec<f64>,
}

fn picked(
    graph: &Graph,
    weight: &Weight,
    statistics: &LayerStatistics,
    order: &Order,
    drop: usize,
) -> Result<Picked, &'static str> {
    let (units, window) = units(graph, weight);
    let matrix = factors::matrix(graph, weight)?;
    let (kept, gone) = order.units.split_at(units - drop);
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    let gone: Vec<usize> = gone.iter().flat_map(|&unit| unit * window..(unit + 1) * window).collect();
    let rows = Mat::from_fn(gone.len(), matrix.ncols(), |row, column| matrix[(gone[row], column)]);
    let (mut biases, mut errors) = (Vec::new(), Vec::new());
    for (gram, judge) in statistics.grams.iter().zip(statistics.judges()?) {
        let mean = |i: usize| gram.mean[gone[i]];
        // Of other rows, around the mean that the bias takes.
        let other = |i: usize| judge.gram.mean[gone[i]];
        let spread = |i: usize, j: usize| {
            judge.gram.matrix.get(gone[i], gone[j]) + mean(i) * mean(j) - mean(i) * other(j) - other(i) * mean(j)
        };
        let covariance = Mat::from_fn(gone.len(), gone.len(), spread);
        let lost: f64 = spectrum::energies(rows.as_ref(), covariance.as_ref()).iter().sum();
        errors.push((lost.max(0.0) / judge.output).sqrt());
        let bias = |column: usize| (0..gone.len()).map(|row| mean(row) * rows[(row, column)]).sum::<f64>();
        biases.push((0..rows.ncols()).map(|column| bias(column) as f32).collect());
    }
    Ok(Picked { kept, biases, errors })
}

/// A layer that picks its inputs; only choices that save bytes and work are listed.
fn picking(graph: &Graph, weight: &Weight, statistics: &LayerStatistics, order: &Order) -> Result<Site, &'static str> {
    let (units, _) = units(graph, weight);
    let uses = weight.taps.len() as u64;
    let (elements, n) = (weight.dims.iter().product::<usize>() as u64, weight.sides().1 as u64);
    let mut candidates = Vec::new();
    for &drop in &order.drops {
        let left = (units - drop) as u64;
        let numbers = elements / units as u64 * left;
        let cost = Cost {
            bytes: numbers * 4 + left * 8 + uses * (4 * n + 2 * OVERHEAD),
            parameters: numbers + left + uses * n,
            flops_per_row: 2 * numbers + n,
        };
        if cost.bytes < 4 * elements && cost.flops_per_row < 2 * elements {
            let errors = picked(graph, weight, statistics, order, drop)?.errors;
            let label = format!("drop {drop} of {units} inputs");
            candidates.push(Candidate { label, cost, loss: Loss::PerTap(errors), edit: Edit::new(Dropped(drop)) });
        }
    }
    if candidates.is_empty() {
        Err("picking inputs would take more than they do")
    } else {
        Ok(weight.site(graph, candidates))
    }
}

/// How many units of its inputs a layer no longer reads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Dropped(usize);

impl Method for DropInputs {
    fn info(&self) -> &'static Info {
        &INFO
    }

    /// What layers read, where enough inputs matter little on average.
    fn magnitudes(&self, model: &Model, cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        let mut wanted = BTreeSet::new();
        if !cx.setting::<bool>(&INFO, "enabled")? {
            return Ok(Vec::new());
        }
        for weight in &weights(&model.graph).0 {
            if let Ok(statistics) = factors::statistics(&model.graph, weight, cx)?
                && may_be_quiet(&model.graph, weight, &statistics)
            {
                wanted.extend(weight.taps.iter().filter_map(|tap| tap.rows.clone()));
            }
        }
        Ok(wanted.into_iter().collect())
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Dropped>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        if !cx.setting::<bool>(&INFO, "enabled")? {
            return Ok(Proposal::refused("it is off; --set drop-inputs.enabled=true turns it on", "the model"));
        }
        let graph = &model.graph;
        let place = |value: ValueId| format!("`{}`", graph.value(value).name);
        let (found, refused) = weights(graph);
        refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
        let mut work = Vec::new();
        for weight in &found {
            let ready = match factors::statistics(graph, weight, cx)? {
                Ok(statistics) => order(graph, weight, &statistics, cx)?.map(|order| (statistics, order)),
                Err(reason) => Err(reason),
            };
            match ready {
                Ok((statistics, order)) => work.push((weight, statistics, order)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
        let sites = on_all_cores(cx, &work, |(weight, statistics, order)| picking(graph, weight, statistics, order));
        for ((weight, ..), site) in work.iter().zip(sites) {
            match site {
                Ok(site) => proposal.sites.push(site),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
        Ok(proposal)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let &Dropped(drop) = candidate.edit.of();
        let mut outcome = Outcome::default();
        let graph = &mut model.graph;
        let (found, _) = weights(graph);
        let done = match found.iter().find(|w| Some(w.value) == site.weight) {
            Some(weight) => match factors::statistics(graph, weight, cx)? {
                Ok(statistics) => order(graph, weight, &statistics, cx)?.and_then(|order| {
                    let picked = picked(graph, weight, &statistics, &order, drop)?;
                    pick(graph, weight, &picked);
                    Ok(())
                }),
                Err(reason) => Err(reason),
            },
            None => Err("the constant is no longer used as it was"),
        };
        match done {
            Ok(()) => outcome.change(candidate.label.clone(), format!("`{}`", site.name)),
            Err(reason) => outcome.refuse(reason, format!("`{}`", site.name)),
        }
        Ok(outcome)
    }
}

/// Lets every use of a weight read the inputs that are kept, and nothing else.
fn pick(graph: &mut Graph, weight: &Weight, picked: &Picked) {
    let name = graph.value(weight.value).name.clone();
    let kept: Vec<i64> = picked.kept.iter().map(|&unit| unit as i64).collect();
    let fresh = graph.fresh_name(&format!("{name}_inputs"));
    let kept = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::int64s(&kept));
    let axis = weight.inputs_axis();
    let tensor = factors::along(graph.constant(weight.value).expect("weights are constants"), axis, &picked.kept);
    let readers = factors::readers(graph, weight.value);
    factors::replace(graph, weight.value, tensor, &readers);
    for (tap, bias) in weight.taps.iter().zip(&picked.biases) {
        let data = graph.node(tap.node).input(0).expect("a tap multiplies data");
        let axis = if graph.node(tap.node).is("Conv") { 1i64 } else { -1 };
        let left =
            graph.append(ScopeId::MAIN, Node::new("Gather").with("axis", axis), &[data, kept], &format!("{name}_read"));
        graph.set_input(tap.node, 0, Some(left));
        factors::add_to_bias(graph, tap, bias);
    }
}

#[cfg(test)]
mod tests;
