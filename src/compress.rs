//! Spending a budget: what was seen on the calibration set, what methods propose, what the allocator chooses.

mod timing;

use crate::{
    Failure, PassRecord,
    runner::{self, Runner},
};
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Bindings, Calibrate, EvaluateError, Facts, Gram, Magnitudes, Moments, Rows, SymMatrix, View};
use lathe_ir::{Model, ValueId};
use lathe_passes::{
    Context, Kind,
    lossy::{
        Choice, DropInputs, METHODS, Method, Site, Spent, Tap, Weight,
        allocate::{self, Group, Measure, Plan, SolveError, Solver, Status},
        gram_rows, quiet_rows, weights,
    },
};
use lathe_runtime::{
    BenchInputs, CollectOptions, Distance, LoadOptions, Probe, ProbeOptions, Request, SampleSet, SetSpec, Statistics,
    quarter_of_memory, sensitivities,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Instant,
};
use tempfile::TempDir;

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
    pub minimize: Measure,
    /// The metric; `None` chooses one that fits the outputs.
    pub metric: Option<String>,
}

impl Budget {
    /// Whether anything may be lost.
    pub fn is_given(&self) -> bool {
        !self.shares().is_empty() || self.max_drop.is_some()
    }

    /// The shares that are given, each with what it is of.
    pub fn shares(&self) -> Vec<(Measure, f64)> {
        let all = [
            (Measure::Bytes, self.size),
            (Measure::Parameters, self.params),
            (Measure::Flops, self.flops),
            (Measure::Latency, self.latency),
        ];
        all.into_iter().filter_map(|(measure, share)| Some((measure, share?))).collect()
    }
}

/// Everything a compression needs besides the model.
pub(crate) struct Compressor<'a> {
    pub runner: &'a Runner,
    pub cx: Context<'a>,
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
    /// What is limited.
    pub measures: Vec<Measure>,
}

/// Sites with their options and what those lose, ready to be allocated.
pub(crate) struct Table {
    places: Vec<Place>,
    records: BTreeMap<&'static str, PassRecord>,
    seen: Seen,
    /// Holds the statistics where the user has no data folder.
    _scratch: TempDir,
}

/// One weight with the options of all methods.
struct Place {
    site: Site,
    /// Rows of all products with the weight in one run.
    rows: u64,
    /// The rise of the outputs' distance per squared error of every tap.
    sensitivity: Vec<f64>,
    /// The method of each choice, and its index there.
    origin: Vec<(&'static dyn Method, usize)>,
    /// Nanoseconds of the weight as it is, and of every choice; `None` where they were not measured.
    latency: Vec<Option<u64>>,
}

impl Place {
    fn loss(&self, choice: &Choice) -> f64 {
        self.sensitivity.iter().zip(&choice.errors).map(|(s, e)| s * e * e).sum()
    }

    /// The first option is to leave the weight as it is.
    fn group(&self, timed: bool) -> Group {
        let option = |spent: &Spent, latency: Option<u64>, error: f64| allocate::Choice {
            bytes: spent.bytes,
            parameters: spent.parameters,
            flops: spent.flops_per_row.saturating_mul(self.rows),
            latency_ns: latency,
            error,
            ..allocate::Choice::default()
        };
        let latency = |index: usize| self.latency.get(index).copied().flatten();
        let mut options = vec![option(&self.site.kept, latency(0).or(timed.then_some(0)), 0.0)];
        let choices = self.site.choices.iter().enumerate();
        options.extend(choices.map(|(i, c)| match latency(i + 1) {
            // What was not measured is not chosen: it is as slow as can be told.
            None if timed => option(&c.spent, Some(latency(0).unwrap_or(0)), self.loss(c)),
            latency => option(&c.spent, latency, self.loss(c)),
        }));
        Group { name: self.site.name.clone(), options }
    }
}

/// A model within the budget as far as the allocator can tell.
pub(crate) struct Compressed {
    pub model: Model,
    pub plan: Value,
    pub records: Vec<PassRecord>,
}

/// Statistics by the names of values.
struct Seen {
    /// Mean squares of what layers read and give, over the whole calibration set.
    moments: Statistics,
    /// Second moments of what they read, over as many samples as those need.
    grams: Statistics,
    /// How large it is, where a method wants to know.
    magnitudes: Option<Statistics>,
}

impl Calibrate for Seen {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        let request = Request::Gram(rows.clone());
        if !self.grams.requests().any(|r| *r == request) {
            return Ok(None);
        }
        let failed = |e: lathe_runtime::StatisticsError| EvaluateError { message: e.to_string() };
        let rows_counted = self.grams.counts(&request).map_err(failed)?.rows;
        let mut sums = self.grams.gram(rows).map_err(failed)?;
        let mut mean = self.grams.field(&request, "sum").map_err(failed)?.data;
        let count = rows_counted.max(1) as f64;
        sums.scale(1.0 / count);
        mean.iter_mut().for_each(|x| *x /= count);
        Ok((rows_counted > 0).then_some(Gram { matrix: sums, mean, rows: rows_counted }))
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let request = Request::Columns(rows.clone());
        if !self.moments.requests().any(|r| *r == request) {
            let diagonal = |gram: &SymMatrix| (0..gram.size()).map(|i| gram.get(i, i)).collect();
            return Ok(self.gram(rows)?.map(|g| Moments { square: diagonal(&g.matrix), largest: None, rows: g.rows }));
        }
        let failed = |e: lathe_runtime::StatisticsError| EvaluateError { message: e.to_string() };
        let rows = self.moments.counts(&request).map_err(failed)?.rows;
        let mut square = self.moments.field(&request, "square_sum").map_err(failed)?.data;
        square.iter_mut().for_each(|x| *x /= rows.max(1) as f64);
        let largest = self.moments.field(&request, "max_abs").map_err(failed)?.data.into_iter().fold(0.0, f64::max);
        Ok((rows > 0).then_some(Moments { square, largest: Some(largest), rows }))
    }

    fn magnitudes(&self, rows: &Rows) -> Result<Option<Magnitudes>, EvaluateError> {
        let request = Request::Magnitudes(rows.clone());
        let Some(found) = self.magnitudes.as_ref().filter(|m| m.requests().any(|r| *r == request)) else {
            return Ok(None);
        };
        found.magnitudes(rows).map_err(|e| EvaluateError { message: e.to_string() })
    }
}

/// Rows per input feature that second moments are taken over at least, where the set has as many.
const ROWS_PER_FEATURE: usize = 4;

/// Rows and samples that second moments are taken over at least.
const LEAST_ROWS: usize = 8192;
const LEAST_SAMPLES: usize = 32;

/// Execution providers on devices that multiply in half precision.
const HALF: [&str; 7] = ["cuda", "tensorrt", "rocm", "migraphx", "directml", "webgpu", "coreml"];

impl Compressor<'_> {
    /// Whether the execution provider, which may be `NAME=path` of a plugin, computes in half precision.
    fn computes_in_half(&self) -> bool {
        let provider = &self.load.provider;
        HALF.contains(&provider.split_once('=').map_or(provider.as_str(), |(name, _)| name))
    }

    /// Collects statistics, measures sensitivities and asks every method what it could do.
    pub(crate) fn table(&self, model: &Model, warnings: &mut Vec<String>) -> Result<Table, Failure> {
        let graph = &model.graph;
        let (found, _) = weights(graph);
        let taps = || found.iter().flat_map(|w| &w.taps);
        let temporary = tempfile::tempdir().context("there is no place for statistics")?;
        let kept = runner::data_dir().map(|data| data.join("statistics"));
        let cache = kept.unwrap_or_else(|| temporary.path().to_owned());
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot use `{}`", cache.display()))?;
        let seen = self.statistics(model, &found, cache.clone())?;
        let outputs: BTreeMap<ValueId, View> = taps().map(|tap| (tap.output, tap.output_rows.view.clone())).collect();
        let sensitivity = self.sensitivity(model, &outputs, cache, warnings)?;
        let facts = Facts::infer(model);
        let bindings = Bindings::default();
        let rows = |value: ValueId| -> u64 {
            let taps = found.iter().filter(|w| w.value == value).flat_map(|w| &w.taps);
            taps.filter(|tap| tap.rows.is_some()).map(|tap| rows_of(&facts, &bindings, tap)).sum()
        };
        let mut cx = Context {
            calibration: Some(&seen),
            target: self.cx.target,
            settings: self.cx.settings.clone(),
            measures: self.measures.clone(),
            half_precision: self.computes_in_half(),
            rows: found.iter().map(|w| (w.value, rows(w.value))).collect(),
            ..Context::default()
        };
        let mut places: BTreeMap<Vec<ValueId>, Place> = BTreeMap::new();
        let mut records = BTreeMap::new();
        for &method in METHODS.iter().filter(|m| (self.admits)(m.info().name)) {
            let start = Instant::now();
            let proposal = method.propose(model, &cx).map_err(anyhow::Error::from)?;
            for site in proposal.sites {
                if site.covers.len() == 1 {
                    cx.rivals.entry(site.weight).or_default().extend(site.choices.iter().cloned());
                }
                let place = places.entry(site.covers.clone()).or_insert_with(|| Place {
                    sensitivity: site.taps.iter().map(|tap| sensitivity[tap]).collect(),
                    rows: rows(site.weight),
                    site: Site { choices: Vec::new(), ..site.clone() },
                    origin: Vec::new(),
                    latency: Vec::new(),
                });
                place.origin.extend((0..site.choices.len()).map(|index| (method, index)));
                place.site.choices.extend(site.choices);
            }
            let record = PassRecord {
                name: method.info().name,
                kind: Kind::Lossy,
                outcome: proposal.outcome,
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
        if self.measures.contains(&Measure::Latency) {
            self.time_options(model, &mut places, &cx, warnings)?;
        }
        drop(cx);
        Ok(Table { places, records, seen, _scratch: temporary })
    }

    /// What layers read and give on the calibration set.
    fn statistics(&self, model: &Model, found: &[Weight], cache: PathBuf) -> Result<Seen, Failure> {
        let collect = CollectOptions {
            memory: self.memory.unwrap_or_else(quarter_of_memory),
            ..CollectOptions::new(self.load.clone(), cache)
        };
        let (mut columns, mut grams) = (BTreeSet::new(), BTreeSet::new());
        let mut widest = 0;
        for weight in found {
            let wanted = gram_rows(weight);
            widest = widest.max(if wanted.is_empty() { 0 } else { weight.inputs() });
            grams.extend(wanted);
            for tap in &weight.taps {
                let patches = |rows: &&Rows| !matches!(rows.view, View::Patches(_));
                columns.extend(tap.rows.iter().filter(patches).chain([&tap.output_rows]).cloned());
                // Second moments have no range, which layers in half precision have to keep to.
                let wide = tap.rows.iter().filter(|rows| self.computes_in_half() && !patches(rows));
                columns.extend(wide.map(|rows| Rows::channels(rows.value.clone())));
            }
        }
        let requests: Vec<Request> = columns.iter().cloned().map(Request::Columns).collect();
        let moments = self.runner.collect(model, self.set, &requests, &collect).map_err(anyhow::Error::from)?;
        let set = SampleSet::open(self.set, model).map_err(anyhow::Error::from)?;
        let rows = |rows: &Rows| moments.counts(&Request::Columns(rows.clone())).ok().map(|c| c.rows as usize);
        let fewest = columns.iter().filter_map(rows).filter(|&r| r > 0).min().unwrap_or(1);
        let wanted = (ROWS_PER_FEATURE * widest).max(LEAST_ROWS);
        let samples = (wanted * set.len()).div_ceil(fewest).max(LEAST_SAMPLES);
        let some = SetSpec { chosen: Some(set.spread(samples.min(set.len()))), ..self.set.clone() };
        let some = if samples >= set.len() { self.set } else { &some };
        let requests: Vec<Request> = grams.into_iter().map(Request::Gram).collect();
        let grams = self.runner.collect(model, some, &requests, &collect).map_err(anyhow::Error::from)?;
        let mut seen = Seen { moments, grams, magnitudes: None };
        if (self.admits)(DropInputs.info().name) {
            let cx = Context { calibration: Some(&seen), ..Context::default() };
            let wanted = quiet_rows(model, &cx).map_err(anyhow::Error::from)?;
            let requests: Vec<Request> = wanted.into_iter().map(Request::Magnitudes).collect();
            if !requests.is_empty() {
                let found = self.runner.collect(model, self.set, &requests, &collect).map_err(anyhow::Error::from)?;
                seen.magnitudes = Some(found);
            }
        }
        Ok(seen)
    }

    /// How much the outputs answer to every value. Where that cannot be measured, the median of those where it can.
    fn sensitivity(
        &self,
        model: &Model,
        values: &BTreeMap<ValueId, View>,
        cache: PathBuf,
        warnings: &mut Vec<String>,
    ) -> Result<BTreeMap<ValueId, f64>, Failure> {
        let facts = Facts::infer(model);
        let ndim = |v: &ValueId| facts.ndim(*v).unwrap_or(0);
        let probes: Vec<Probe> = values
            .iter()
            .map(|(v, view)| Probe { value: model.graph.value(*v).name.clone(), view: view.clone() })
            .collect();
        let (load, cache) = (self.load.clone(), Some(cache));
        let options = ProbeOptions { load, distance: self.distance, seed: self.seed, cache };
        let measured = self.runner.sensitivities(model, self.set, &probes, &options);
        let found = measured.map_err(anyhow::Error::from).context("the sensitivity of layers cannot be measured")?;
        let mut known: Vec<f64> = found.iter().flatten().copied().collect();
        known.sort_by(f64::total_cmp);
        let median = known.get(known.len() / 2).copied().unwrap_or(1.0);
        let missing = values.keys().zip(&found).filter(|(v, s)| s.is_none() && ndim(v) > 0).count();
        if missing > 0 {
            warnings.push(format!(
                "the sensitivity of {missing} of {} layers cannot be measured sample by sample; the median of the others stands in",
                values.len()
            ));
        }
        Ok(values.keys().zip(found).map(|(&v, s)| (v, s.unwrap_or(median))).collect())
    }
}

impl Table {
    /// Scales the times of options so that those of all constants as they are make `most` nanoseconds at most: a layer
    /// by itself takes longer than among others.
    pub(crate) fn scale_latency(&mut self, most: f64) {
        let kept = self.kept()[Measure::Latency as usize] as f64;
        let times = self.places.iter_mut().flat_map(|p| &mut p.latency).flatten();
        if kept > most {
            times.for_each(|ns| *ns = (*ns as f64 * most / kept) as u64);
        }
    }

    /// What the constants that could change take as they are: bytes, multiply-adds, numbers, nanoseconds, in the order
    /// of [`Measure::ALL`].
    pub(crate) fn kept(&self) -> [u64; 4] {
        fn of(groups: &[Group], measure: Measure) -> u64 {
            groups.iter().map(|g| g.options[0].cost(measure) + of(&g.options[0].inner, measure)).sum()
        }
        let timed = self.places.iter().any(|p| !p.latency.is_empty());
        let (groups, _) = self.groups(timed);
        Measure::ALL.map(|m| of(&groups, m))
    }

    /// The places as groups, and the place of every group as the allocator counts them. A place of several constants
    /// holds the places of each where it stays as it is.
    fn groups(&self, timed: bool) -> (Vec<Group>, Vec<usize>) {
        let (mut groups, mut order) = (Vec::new(), Vec::new());
        let within = |place: &Place, outer: &Place| {
            outer.site.covers.len() > place.site.covers.len()
                && place.site.covers.iter().all(|value| outer.site.covers.contains(value))
        };
        for (index, place) in self.places.iter().enumerate() {
            if self.places.iter().any(|outer| within(place, outer)) {
                continue;
            }
            order.push(index);
            let mut group = place.group(timed);
            let inside = self.places.iter().enumerate().filter(|(_, inner)| within(inner, place));
            for (at, inner) in inside {
                order.push(at);
                let (whole, part) = (&mut group.options[0], inner.group(timed));
                // What is left are constants that nothing is offered for.
                whole.bytes = whole.bytes.saturating_sub(part.options[0].bytes);
                whole.flops = whole.flops.saturating_sub(part.options[0].flops);
                whole.parameters = whole.parameters.saturating_sub(part.options[0].parameters);
                whole.latency_ns =
                    whole.latency_ns.map(|ns| ns.saturating_sub(part.options[0].latency_ns.unwrap_or(0)));
                whole.inner.push(part);
            }
            groups.push(group);
        }
        (groups, order)
    }

    /// Chooses within the budget for these constants.
    pub(crate) fn choose(&self, budget: &allocate::Budget, solver: Solver) -> Result<(Plan, f64), SolveError> {
        let start = Instant::now();
        let (groups, _) = self.groups(budget.latency_ns.is_some());
        let table = allocate::Table { groups, conflicts: Vec::new() };
        Ok((allocate::solve(&table, budget, solver)?, start.elapsed().as_secs_f64()))
    }

    /// Carries a plan out on a copy of `model`.
    pub(crate) fn carry_out(&self, model: &Model, plan: &Plan, cx: &Context) -> Result<Compressed, Failure> {
        let mut result = model.clone();
        let mut records = self.records.clone();
        let mut choices = Vec::new();
        let cx = Context {
            calibration: Some(&self.seen),
            target: cx.target,
            settings: cx.settings.clone(),
            ..Context::default()
        };
        let (_, order) = self.groups(false);
        for (&index, chosen) in order.iter().zip(&plan.choices) {
            // Inside a place that does not stay as it is, nothing is chosen.
            let Some(chosen) = *chosen else { continue };
            let place = &self.places[index];
            let site = &place.site;
            if chosen == 0 && site.covers.len() > 1 {
                continue;
            }
            // The first option is to leave the site as it is.
            let (option, method, spent, error) = match chosen.checked_sub(1) {
                None => ("as it is".to_owned(), None, site.kept, 0.0),
                Some(index) => {
                    let choice = &site.choices[index];
                    let (method, own) = place.origin[index];
                    let outcome = method.rewrite(&mut result, &place.of_method(index), own, &cx);
                    let outcome = outcome.map_err(anyhow::Error::from)?;
                    if outcome.changes.is_empty() {
                        let (name, site) = (&choice.name, &site.name);
                        let fault =
                            anyhow!("`{site}` could not be made {name} as planned; this is a fault of this program");
                        return Err(Failure::Error(fault));
                    }
                    let record = records.get_mut(method.info().name).expect("a method that proposes has a record");
                    record.weight_bytes_delta += choice.spent.bytes as i64 - site.kept.bytes as i64;
                    let rows = place.rows as i64;
                    record.flops_delta += (choice.spent.flops_per_row as i64 - site.kept.flops_per_row as i64) * rows;
                    record.outcome.merge(outcome);
                    (choice.name.clone(), Some(method.info().name), choice.spent, place.loss(choice))
                }
            };
            let mut cost = json!({
                "bytes": spent.bytes,
                "parameters": spent.parameters,
                "flops": spent.flops_per_row.saturating_mul(place.rows),
            });
            if let Some(ns) = place.latency.get(chosen).copied().flatten() {
                cost["latency_ms"] = json!(ns as f64 * 1e-6);
            }
            choices
                .push(json!({ "site": site.name, "option": option, "method": method, "cost": cost, "error": error }));
        }
        let (status, gap) = match plan.status {
            Status::Optimal => ("optimal", 0.0),
            Status::Gap(gap) => ("gap", gap),
            Status::TimeLimit(gap) => ("time limit", gap),
        };
        let by_name = |figures: [u64; 4]| -> serde_json::Map<String, Value> {
            let names = ["bytes", "flops", "parameters", "latency_ns"];
            names.iter().zip(figures).map(|(name, figure)| ((*name).to_owned(), json!(figure))).collect()
        };
        let json = json!({
            "status": status,
            "gap": gap,
            "objective": plan.objective,
            "bound": plan.bound,
            "used": by_name(plan.used),
            "choices": choices,
        });
        Ok(Compressed { model: result, plan: json, records: records.into_values().collect() })
    }
}

impl Place {
    /// The site as the method of a choice proposed it.
    fn of_method(&self, index: usize) -> Site {
        let (method, own) = self.origin[index];
        let first = index - own;
        let count = self.origin[first..].iter().take_while(|(m, _)| m.info().name == method.info().name).count();
        Site { choices: self.site.choices[first..first + count].to_vec(), ..self.site.clone() }
    }
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
