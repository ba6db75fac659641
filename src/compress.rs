//! Spending a budget: what was seen on the calibration set, what methods propose, what the allocator chooses.

mod budget_search;
mod calibration;
mod candidates;
pub(crate) mod fit_budget;
mod latency_model;
mod loss_trials;
mod position_weights;
mod uncovered;
mod unit_report;

use calibration::{Part, Seen, Split};
pub(crate) use candidates::Table;
use candidates::{Inside, Offer, Place};
use position_weights::{Answers, Apart, Emphasis};

use crate::{
    Failure, PassRecord,
    runner::{self, Runner},
};
use anyhow::Context as _;
use lathe_analysis::{Bindings, Facts, Rows, View};
use lathe_ir::{Model, ValueId};
use lathe_passes::{
    Kind, Quantity,
    lossy::{METHODS, MethodContext, Tap, Weight, gram_rows, weights},
};
use lathe_runtime::{
    BenchInputs, CollectOptions, Distance, LoadOptions, Probe, ProbeOptions, Request, SampleSet, SetSpec,
    quarter_of_memory, sensitivities,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Instant,
};

/// What may be spent, and what may be lost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Budget {
    /// Share of the original file's bytes to keep.
    pub size: Option<f64>,
    /// Share of the original's parameters to keep.
    pub params: Option<f64>,
    /// Share of the original's floating-point operations to keep.
    pub flops: Option<f64>,
    /// Share of the original's measured latency to keep.
    pub latency: Option<f64>,
    /// The largest drop of the metric on the validation set.
    pub max_drop: Option<f64>,
    /// What becomes as little as the drop allows where no share is given.
    pub minimize: Quantity,
    /// The metric; `None` chooses one that fits the outputs.
    pub metric: Option<String>,
}

impl Budget {
    /// Whether anything may be lost.
    pub fn is_given(&self) -> bool {
        !self.shares().is_empty() || self.max_drop.is_some()
    }

    /// What is limited or becomes as little as the drop allows.
    pub(crate) fn limited(&self) -> Vec<Quantity> {
        let shares = self.shares();
        match shares.is_empty() {
            true => vec![self.minimize],
            false => shares.into_iter().map(|(measure, _)| measure).collect(),
        }
    }

    /// The shares that are given, each with what it is of.
    pub fn shares(&self) -> Vec<(Quantity, f64)> {
        let all = [
            (Quantity::Size, self.size),
            (Quantity::Parameters, self.params),
            (Quantity::Flops, self.flops),
            (Quantity::Latency, self.latency),
        ];
        all.into_iter().filter_map(|(measure, share)| Some((measure, share?))).collect()
    }
}

/// Everything a compression needs besides the model.
pub(crate) struct Compressor<'a> {
    pub runner: &'a Runner,
    pub cx: MethodContext<'a>,
    /// The calibration set.
    pub set: &'a SetSpec,
    pub load: &'a LoadOptions,
    pub memory: Option<u64>,
    pub seed: u64,
    /// Whether an option is open to the run: named by `--passes`, not by `--skip`.
    pub admits: &'a dyn Fn(&str) -> bool,
    pub distance: Distance,
    /// The inputs of runs that are timed.
    pub inputs: BenchInputs,
}

/// Rows per input feature that second moments are taken over at least, where the set has as many.
const ROWS_PER_FEATURE: usize = 4;

/// Rows and samples that second moments are taken over at least.
const LEAST_ROWS: usize = 8192;
const LEAST_SAMPLES: usize = 32;

/// Rows that fits are judged by at least, where as many are held out.
const HELD_ROWS: usize = 2048;

/// Samples in which positions that are read apart are looked at, at most: one position has one row in each.
const MOST_ALONE: usize = 512;

/// Whether an execution provider, which may be `NAME=path` of a plugin, computes in half precision.
pub(crate) fn computes_in_half(provider: &str) -> bool {
    lathe_runtime::Provider::asked(provider).is_some_and(|provider| provider.half)
}

impl<'a> Compressor<'a> {
    /// Collects statistics, measures sensitivities and asks every method what it could do.
    pub(crate) fn table(&self, model: &Model, warnings: &mut Vec<String>) -> Result<Table<'a>, Failure> {
        let graph = &model.graph;
        let methods = || METHODS.iter().copied().filter(|m| (self.admits)(m.info().name));
        let found = if methods().any(|m| m.needs(&self.cx).statistics) { weights(graph).0 } else { Vec::new() };
        let taps = || found.iter().flat_map(|w| &w.taps);
        let temporary = tempfile::tempdir().context("there is no place for statistics")?;
        let kept = runner::data_dir().map(|data| data.join("statistics"));
        let cache = kept.unwrap_or_else(|| temporary.path().to_owned());
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot use `{}`", cache.display()))?;
        let apart = Apart::find(model, &found);
        let mut seen = self.statistics(model, &found, &apart, cache.clone(), temporary.path())?;
        let mut outputs: BTreeMap<ValueId, View> =
            taps().map(|tap| (tap.output, tap.output_rows.view.clone())).collect();
        for method in methods() {
            for rows in method.extra_taps(model, &self.cx)? {
                let value = graph.find_value(&rows.value).context("a value that is watched is not there")?;
                outputs.entry(value).or_insert(rows.view);
            }
        }
        let answers = self.sensitivity(model, &outputs, &apart.outputs(), cache, warnings)?;
        seen.emphasis = apart.emphasis(&seen, &answers).map_err(anyhow::Error::from)?;
        let facts = Facts::infer(model);
        let bindings = Bindings::default().for_inputs(graph, &facts);
        let rows = |value: ValueId| -> u64 {
            let taps = found.iter().filter(|w| w.value == value).flat_map(|w| &w.taps);
            taps.filter(|tap| tap.rows.is_some()).map(|tap| rows_of(&facts, &bindings, tap)).sum()
        };
        let weight_rows = found.iter().map(|w| (w.value, rows(w.value))).collect();
        let mut cx = self.cx.with_calibration(&seen).with_rows(weight_rows);
        let mut places: BTreeMap<Vec<ValueId>, Place> = BTreeMap::new();
        let mut records = BTreeMap::new();
        for method in methods() {
            Failure::if_stopped(self.runner.child().listener())?;
            let start = Instant::now();
            let proposal = method.propose(model, &cx).map_err(anyhow::Error::from)?;
            let mut outcome = proposal.outcome;
            for site in proposal.sites {
                if places.keys().any(|other| candidates::overlap(other, &site.footprint)) {
                    outcome.refuse("it shares a part with what another method would change as a whole", site.name);
                    continue;
                }
                if let (Some(weight), 1) = (site.weight, site.footprint.len()) {
                    cx.incumbents.entry(weight).or_default().extend(site.candidates.iter().cloned());
                }
                let offer = Offer {
                    method,
                    needs: method.needs(&cx),
                    inside: Vec::new(),
                    sensitivity: site.taps.iter().filter_map(|tap| answers.values.get(tap).copied()).collect(),
                    rows: site.weight.map_or(1, rows),
                    site,
                };
                let place = places.entry(offer.site.footprint.clone());
                place.or_insert_with(|| Place { offers: Vec::new(), latency: Vec::new() }).offers.push(offer);
            }
            let record = PassRecord {
                name: method.info().name,
                kind: Kind::Lossy,
                outcome,
                time: start.elapsed(),
                nodes_delta: 0,
                weight_bytes_delta: 0,
                flops_delta: 0,
                error: None,
                dropped: None,
            };
            records.insert(method.info().name, record);
        }
        let mut places: Vec<Place> = places.into_values().collect();
        if self.cx.quantities.contains(&Quantity::Latency) {
            self.time_options(model, &mut places, &cx, warnings)?;
            latency_model::decline_slower(&mut places, &mut records);
        }
        self.try_choices(model, &mut places, &cx, warnings)?;
        self.look_inside(model, &mut places, &cx)?;
        drop(cx);
        let unhandled = uncovered::unhandled(model, &places);
        Ok(Table { cx: self.cx.clone(), places, records, seen, told: answers.told, unhandled, _scratch: temporary })
    }

    /// Asks what every place takes where a choice of one around it is carried out.
    fn look_inside(&self, model: &Model, places: &mut [Place], cx: &MethodContext) -> Result<(), Failure> {
        for at in 0..places.len() {
            for offer in 0..places[at].offers.len() {
                let mut inside = Vec::new();
                for choice in 0..places[at].offers[offer].site.candidates.len() {
                    Failure::if_stopped(self.runner.child().listener())?;
                    let Offer { method, site, .. } = &places[at].offers[offer];
                    let around = method.effect_on_nested(model, site, &site.candidates[choice], cx)?;
                    let found = around.map(|around| Inside::of(places, at, &around, cx)).transpose();
                    inside.push(found.map_err(anyhow::Error::from)?);
                }
                places[at].offers[offer].inside = inside;
            }
        }
        Ok(())
    }

    /// What layers read and give on the calibration set.
    fn statistics(
        &self,
        model: &Model,
        found: &[Weight],
        apart: &Apart,
        cache: PathBuf,
        scratch: &Path,
    ) -> Result<Seen<'a>, Failure> {
        let collect = CollectOptions {
            memory: self.memory.unwrap_or_else(quarter_of_memory),
            ..CollectOptions::new(self.load.clone(), cache)
        };
        // Second moments have no range, which layers in half precision have to keep to on every sample.
        let half = self.cx.half_precision;
        let ranges = METHODS.iter().any(|m| (self.admits)(m.info().name) && m.needs(&self.cx).ranges);
        let widths = found.iter().filter(|w| !gram_rows(w).is_empty()).map(Weight::inputs);
        let widest = widths.max().unwrap_or(0);
        let (columns, grams) = requests(found, half, ranges);
        let split = Split::of(self.set, model).map_err(anyhow::Error::from)?;
        let all = [columns.as_slice(), &grams].concat();
        let gather = |set: &SetSpec, requests: &[Request]| {
            self.runner.collect(model, set, requests, &collect).map_err(anyhow::Error::from)
        };
        let part = |set: &SetSpec, rows: usize, positions: usize| -> Result<Part, Failure> {
            let samples = SampleSet::open(set, model).map_err(anyhow::Error::from)?;
            let spread = |count: usize| match count >= samples.len() {
                true => set.clone(),
                false => SetSpec { chosen: Some(samples.spread(count)), ..set.clone() },
            };
            let wanted = self.samples(model, found, &samples, rows)?;
            let (some, many) = (spread(wanted), spread(positions.min(MOST_ALONE).max(wanted)));
            let alone = if apart.is_empty() { None } else { Some(gather(&many, &apart.requests())?) };
            Ok(Part { all: gather(&some, &all)?, alone, some, many })
        };
        let rows = ROWS_PER_FEATURE * widest;
        let fits = part(&split.fits, rows.max(LEAST_ROWS), rows)?;
        let held = if split.holds_out { Some(part(&split.trials, HELD_ROWS, MOST_ALONE)?) } else { None };
        let mut seen = Seen {
            whole: if half { Some(gather(self.set, &columns)?) } else { None },
            fits,
            held,
            emphasis: Emphasis::default(),
            magnitudes: None,
            runner: self.runner,
            model: model.clone(),
            split,
            load: self.load,
            distance: self.distance,
            // Variants come once; what is kept for later runs is about the model itself.
            collect: CollectOptions {
                memory: collect.memory,
                ..CollectOptions::new(self.load.clone(), scratch.to_owned())
            },
        };
        let cx = self.cx.with_calibration(&seen);
        let mut wanted = BTreeSet::new();
        for method in METHODS.iter().filter(|m| (self.admits)(m.info().name)) {
            wanted.extend(method.magnitudes(model, &cx).map_err(anyhow::Error::from)?);
        }
        drop(cx);
        if !wanted.is_empty() {
            let requests: Vec<Request> = wanted.into_iter().map(Request::Magnitudes).collect();
            let found = self.runner.collect(model, self.set, &requests, &collect).map_err(anyhow::Error::from)?;
            seen.magnitudes = Some(found);
        }
        Ok(seen)
    }

    /// How many samples have as many rows as are `wanted` of every layer.
    fn samples(&self, model: &Model, found: &[Weight], set: &SampleSet, wanted: usize) -> Result<usize, Failure> {
        let facts = Facts::infer(model);
        let Some(batch) = set.batches().next().transpose().map_err(anyhow::Error::from)? else { return Ok(0) };
        let bindings = calibration::sizes(model, &batch.inputs);
        let taps = found.iter().flat_map(|w| &w.taps).filter(|tap| tap.rows.is_some());
        let fewest = taps.map(|tap| rows_of(&facts, &bindings, tap) as usize).filter(|&rows| rows > 0).min();
        Ok((wanted * batch.samples.max(1)).div_ceil(fewest.unwrap_or(1)).max(LEAST_SAMPLES))
    }

    /// How much the outputs answer to every value, and to single positions of values. Where the first cannot be measured,
    /// the median of those where it can.
    fn sensitivity(
        &self,
        model: &Model,
        values: &BTreeMap<ValueId, View>,
        positions: &[(ValueId, usize)],
        cache: PathBuf,
        warnings: &mut Vec<String>,
    ) -> Result<Answers, Failure> {
        let facts = Facts::infer(model);
        let ndim = |v: &ValueId| facts.ndim(*v).unwrap_or(0);
        let probe = |(v, view): (&ValueId, View)| Probe { value: model.graph.value(*v).name.clone(), view };
        let whole = values.iter().map(|(v, view)| (v, view.clone()));
        let alone = positions.iter().map(|(v, at)| (v, View::Position(*at)));
        let probes: Vec<Probe> = whole.chain(alone).map(probe).collect();
        let (load, cache) = (self.load.clone(), Some(cache));
        let options = ProbeOptions { load, distance: self.distance, seed: self.seed, cache };
        let measured = self.runner.sensitivities(model, self.set, &probes, &options);
        let mut found =
            measured.map_err(anyhow::Error::from).context("the sensitivity of layers cannot be measured")?;
        let of_positions = found.split_off(values.len());
        let mut known: Vec<f64> = found.iter().flatten().copied().collect();
        known.sort_by(f64::total_cmp);
        let told = known.iter().any(|&answer| answer > 0.0);
        if !told {
            // Outputs that answer to nothing tell layers not apart.
            found.iter_mut().for_each(|answer| *answer = None);
        }
        let median = known.get(known.len() / 2).copied().filter(|_| told).unwrap_or(1.0);
        let missing: Vec<ValueId> =
            values.keys().zip(&found).filter(|(v, s)| s.is_none() && ndim(v) > 0).map(|(&v, _)| v).collect();
        if let Some(&first) = missing.first() {
            let instead = if told { "the median of the others stands in" } else { "errors of all of them count alike" };
            warnings.push(format!(
                "no output answers to an error in {} of {} layers, first the one that makes `{}`: {instead}; a calibration set \
                 with more samples, and finite outputs on all of them, may tell",
                missing.len(),
                values.len(),
                model.graph.value(first).name
            ));
        }
        Ok(Answers {
            told,
            values: values.keys().zip(found).map(|(&v, s)| (v, s.unwrap_or(median))).collect(),
            positions: positions.iter().zip(of_positions).filter_map(|(&at, s)| Some((at, s?))).collect(),
        })
    }
}

/// What is collected of layers: sums and ranges of columns, and Gram matrices, which tell sums of their columns too.
fn requests(found: &[Weight], half: bool, ranges: bool) -> (Vec<Request>, Vec<Request>) {
    let (mut columns, mut grams) = (BTreeSet::new(), BTreeSet::new());
    for weight in found {
        let wanted = gram_rows(weight);
        for tap in &weight.taps {
            let patches = |rows: &&Rows| !matches!(rows.view, View::Patches(_));
            let alone = tap.rows.iter().filter(|rows| patches(rows) && (ranges || !wanted.contains(rows)));
            columns.extend(alone.chain([&tap.output_rows]).cloned());
            let wide = tap.rows.iter().filter(|rows| half && !patches(rows));
            columns.extend(wide.map(|rows| Rows::channels(rows.value.clone())));
        }
        grams.extend(wanted);
    }
    (columns.into_iter().map(Request::Columns).collect(), grams.into_iter().map(Request::Gram).collect())
}

/// Rows of a use's output in one run.
fn rows_of(facts: &Facts, bindings: &Bindings, tap: &Tap) -> u64 {
    let shape = facts.shape(tap.output).unwrap_or_default();
    let axis = match tap.output_rows.view {
        View::Axis(axis) if axis >= 0 => axis as usize,
        _ => shape.len().saturating_sub(1),
    };
    let sizes = shape.iter().enumerate().filter(|(at, _)| *at != axis).map(|(_, dim)| bindings.evaluate(dim));
    sizes.map(|size| size.unwrap_or(1)).product()
}

impl Runner {
    /// How much the outputs of a model answer to errors of values inside it.
    pub(crate) fn sensitivities(
        &self,
        model: &Model,
        set: &SetSpec,
        probes: &[Probe],
        options: &ProbeOptions,
    ) -> Result<Vec<Option<f64>>, lathe_runtime::StatisticsError> {
        sensitivities(self.child(), model, set, probes, options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Gram matrix tells the squares of what a layer reads, but not how large it gets.
    #[test]
    fn ranges_are_collected_where_a_method_reads_them() {
        let text = format!(
            "<ir_version: 10, opset_import: [\"\" : 21]> m (float[n, 64] x) => (float[n, 64] y) \
             <float[64, 64] w = {{{}}}> {{ y = MatMul (x, w) }}",
            vec!["1"; 64 * 64].join(", ")
        );
        let found = weights(&lathe_ir::text::parse(&text).unwrap().graph).0;
        let input = Request::Columns(found[0].taps[0].rows.clone().unwrap());
        for ranges in [false, true] {
            let (columns, grams) = requests(&found, false, ranges);
            assert_eq!(grams.len(), 1);
            assert_eq!(columns.contains(&input), ranges);
        }
    }
}
