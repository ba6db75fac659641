//! How many inputs of every layer could be left out, by their size and by what they are multiplied with.
//!
//! Thresholds come from a ladder of magnitudes, under which inputs count as unrelated. What they really skip and lose is
//! measured: inputs below them are left out of the layer's product, in the graph, on the whole set.
//!
//! Sources: WINA, arXiv:2505.19427 (weighed by norms of weights); TEAL, arXiv:2408.14690 (by size alone).

use super::anatomy::node_name;
use crate::{Failure, runner::Runner};
use anyhow::Context as _;
use lathe_analysis::{Magnitudes, Rows};
use lathe_ir::Model;
use lathe_passes::lossy::{QUIET, Tap, Weight, weights};
use lathe_runtime::{CollectOptions, Cut, LoadOptions, Request, SetSpec, Skip, Statistics, quarter_of_memory};
use serde::Serialize;
use std::collections::BTreeSet;

/// Relative errors of a layer's product that inputs are left out up to.
pub(super) const LIMITS: [f64; 2] = [0.01, 0.05];

/// Measurements, every one of which corrects the thresholds by what the one before was off.
const ROUNDS: usize = 3;

/// What a threshold skips and what that loses.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Skipped {
    /// The relative error of the product that was aimed at.
    pub limit: f64,
    /// The threshold of `|x|` (TEAL) or of `|x|` times the norm of its weights (WINA).
    pub threshold: f64,
    /// The share of the inputs below it, as measured.
    pub share: f64,
    /// The relative error of the product without them, as measured.
    pub error: f64,
}

/// A layer and what could be left out of what it reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Layer {
    /// The node.
    pub layer: String,
    /// Its operator.
    pub op: String,
    /// Its weight.
    pub weight: String,
    /// Numbers that one output sums over.
    pub inputs: usize,
    /// Outputs of a row.
    pub outputs: usize,
    /// Rows of the set that count.
    pub rows: u64,
    /// Inputs below the WINA threshold of the largest limit on at least 99.9 % of the rows: `drop-inputs` looks there.
    pub quiet_inputs: usize,
    /// Weighed by the norm of the weights, one for each limit.
    pub wina: Vec<Skipped>,
    /// By size alone, one for each limit.
    pub teal: Vec<Skipped>,
}

/// What a set shows of a model's layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Activations {
    /// The set.
    pub set: String,
    /// Its samples.
    pub samples: usize,
    /// In order of the nodes.
    pub layers: Vec<Layer>,
    /// Constants that are no weights of layers, with the reason.
    pub passed_over: Vec<(String, String)>,
}

impl Activations {
    /// The share of multiplications that would be skipped in all layers, by limit: weighed, and by size alone.
    pub fn totals(&self) -> Vec<(f64, f64)> {
        let work = |layer: &Layer| layer.rows as f64 * layer.inputs as f64 * layer.outputs as f64;
        let all: f64 = self.layers.iter().map(work).sum();
        let share = |of: &dyn Fn(&Layer) -> f64| self.layers.iter().map(|l| work(l) * of(l)).sum::<f64>() / all;
        (0..LIMITS.len()).map(|i| (share(&|l| l.wina[i].share), share(&|l| l.teal[i].share))).collect()
    }
}

/// A layer under measurement.
struct Probe<'a> {
    weight: &'a Weight,
    tap: &'a Tap,
    rows: &'a Rows,
    magnitudes: Magnitudes,
    norms: Vec<f64>,
    ones: Vec<f64>,
    /// The mean square of the product that may be lost, weighed and by size, for each limit.
    aims: Vec<(bool, f64)>,
}

impl Probe<'_> {
    fn scale(&self, weighed: bool) -> &[f64] {
        if weighed { &self.norms } else { &self.ones }
    }

    fn threshold(&self, (weighed, aim): (bool, f64)) -> f64 {
        self.magnitudes.threshold(aim, self.scale(weighed), &self.norms)
    }

    fn skip(&self, model: &Model) -> Skip {
        let cut = |&aim: &(bool, f64)| Cut::new(self.threshold(aim) as f32, aim.0);
        Skip {
            rows: self.rows.clone(),
            weight: model.graph.value(self.weight.value).name.clone(),
            first_axis: self.tap.inputs_axis == 0,
            cuts: self.aims.iter().map(cut).collect(),
        }
    }
}

/// How the set is read and run.
pub(super) struct Sources<'a> {
    pub runner: &'a Runner,
    pub set: &'a SetSpec,
    pub load: &'a LoadOptions,
    pub memory: Option<u64>,
}

impl Sources<'_> {
    /// Measures every layer of `model`.
    pub fn activations(&self, model: &Model) -> Result<Activations, Failure> {
        let graph = &model.graph;
        let (found, refused) = weights(graph);
        let name = |value| graph.value(value).name.clone();
        let mut passed_over: Vec<(String, String)> =
            refused.into_iter().map(|(value, reason)| (name(value), reason.to_owned())).collect();
        let taps: Vec<(&Weight, &Tap)> = found.iter().flat_map(|w| w.taps.iter().map(move |tap| (w, tap))).collect();
        let read: BTreeSet<&Rows> = taps.iter().filter_map(|(_, tap)| tap.rows.as_ref()).collect();
        let temporary = tempfile::tempdir().context("there is no place for statistics")?;
        let kept = self.runner.store().map(|store| store.join("statistics"));
        let cache = kept.unwrap_or_else(|| temporary.path().to_owned());
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot use `{}`", cache.display()))?;
        let memory = self.memory.unwrap_or_else(quarter_of_memory);
        let options = CollectOptions {
            memory,
            cache_limit: self.runner.statistics_limit(),
            ..CollectOptions::new(self.load.clone(), cache)
        };
        let collect = |requests: Vec<Request>| -> Result<Statistics, Failure> {
            Ok(self.runner.collect(model, self.set, &requests, &options)?)
        };
        let sizes = collect(read.into_iter().cloned().map(Request::Magnitudes).collect())?;
        let mut probes = Vec::new();
        for (weight, tap) in taps {
            let Some(rows) = &tap.rows else { continue };
            let norms = weight.norms(graph, tap).unwrap_or_default();
            let magnitudes = sizes.magnitudes(rows)?;
            let Some(magnitudes) = magnitudes.filter(|m| m.features() == norms.len()) else {
                passed_over.push((name(weight.value), "no row of what it reads counts".to_owned()));
                continue;
            };
            let whole: f64 = magnitudes.square.iter().zip(&norms).map(|(x, c)| x * c * c).sum();
            let aims =
                [true, false].into_iter().flat_map(|weighed| LIMITS.map(|limit| (weighed, limit * limit * whole)));
            let (aims, ones) = (aims.collect(), vec![1.0; norms.len()]);
            probes.push(Probe { weight, tap, rows, magnitudes, norms, ones, aims });
        }
        let mut measured = None;
        for round in 0..ROUNDS {
            let requests: Vec<Request> = probes.iter().map(|p| Request::Skip(p.skip(model))).collect();
            let statistics = collect(requests.clone())?;
            let mut layers = Vec::new();
            for (probe, request) in probes.iter_mut().zip(&requests) {
                let layer = layer(model, probe, &statistics, request)?;
                if round + 1 < ROUNDS {
                    let found = layer.wina.iter().chain(&layer.teal);
                    for (aim, skipped) in probe.aims.iter_mut().zip(found) {
                        aim.1 *= (skipped.limit / skipped.error).powi(2).clamp(1.0 / 64.0, 64.0);
                    }
                }
                layers.push(layer);
            }
            measured = Some(layers);
        }
        let samples = lathe_runtime::SampleSet::open(self.set, model)?.len();
        let set = self.set.path.display().to_string();
        Ok(Activations { set, samples, layers: measured.unwrap_or_default(), passed_over })
    }
}

/// What a measurement says about a layer.
fn layer(
    model: &Model,
    probe: &Probe<'_>,
    statistics: &Statistics,
    request: &Request,
) -> Result<Layer, lathe_runtime::StatisticsError> {
    let graph = &model.graph;
    let numbers = |field: &str| statistics.field(request, field).map(|f| f.data);
    let (skipped, lost, output) =
        (numbers("skipped")?, numbers("lost_square_sum")?, numbers("output_square_sum")?.iter().sum::<f64>());
    let rows = statistics.counts(request)?.rows;
    let all = (rows as f64 * probe.norms.len() as f64).max(1.0);
    let mut found = probe.aims.iter().enumerate().map(|(at, &aim)| Skipped {
        limit: LIMITS[at % LIMITS.len()],
        threshold: probe.threshold(aim),
        share: skipped[at] / all,
        error: if output > 0.0 { (lost[at] / output).sqrt() } else { 0.0 },
    });
    let wina: Vec<Skipped> = found.by_ref().take(LIMITS.len()).collect();
    let teal = found.collect();
    let quiet = wina.last().map_or(0.0, |last| last.threshold);
    let is_quiet = |&i: &usize| probe.magnitudes.bound(i, QUIET) * probe.norms[i] <= quiet;
    let node = graph.node(probe.tap.node);
    let elements: usize = probe.weight.dims.iter().product();
    Ok(Layer {
        layer: node_name(graph, probe.tap.node),
        op: node.op_type.clone(),
        weight: graph.value(probe.weight.value).name.clone(),
        inputs: probe.norms.len(),
        outputs: elements / probe.norms.len().max(1),
        rows,
        quiet_inputs: (0..probe.norms.len()).filter(is_quiet).count(),
        wina,
        teal,
    })
}
