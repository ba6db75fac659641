//! Spending a budget: what was seen on the calibration set, what methods propose, what the allocator chooses.

use crate::{
    Failure, PassRecord,
    runner::{self, Runner},
};
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Calibrate, EvaluateError, Facts, Gram, Moments, Rows};
use lathe_ir::{Model, ValueId};
use lathe_passes::{
    Context, Kind,
    lossy::{AllocateError, Choice, Item, METHODS, Method, Site, allocate, weights},
};
use lathe_runtime::{
    CollectOptions, Distance, LoadOptions, Probe, ProbeOptions, Request, SetSpec, Statistics, quarter_of_memory,
    sensitivities,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};
use tempfile::TempDir;

/// What may be spent, and what may be lost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Budget {
    /// Share of the original file's bytes to keep.
    pub size: Option<f64>,
    /// The largest drop of the metric on the validation set.
    pub max_drop: Option<f64>,
    /// The metric; `None` chooses one that fits the outputs.
    pub metric: Option<String>,
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
}

/// Sites with their options and what those lose, ready to be allocated.
pub(crate) struct Table {
    sites: Vec<Place>,
    records: BTreeMap<&'static str, PassRecord>,
    statistics: Seen,
    /// Holds the statistics where the user has no data folder.
    _scratch: TempDir,
}

/// One weight with the options of all methods.
struct Place {
    site: Site,
    /// The rise of the outputs' distance per squared error of every tap.
    sensitivity: Vec<f64>,
    /// The method of each choice, and its index there.
    origin: Vec<(&'static dyn Method, usize)>,
}

impl Place {
    fn loss(&self, choice: &Choice) -> f64 {
        self.sensitivity.iter().zip(&choice.errors).map(|(s, e)| s * e * e).sum()
    }
}

/// A model within the budget as far as the allocator can tell.
pub(crate) struct Compressed {
    pub model: Model,
    pub plan: Value,
    pub records: Vec<PassRecord>,
}

/// Statistics by the names of values.
struct Seen(Statistics);

impl Calibrate for Seen {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        let request = Request::Gram(rows.clone());
        if !self.0.requests().any(|r| *r == request) {
            return Ok(None);
        }
        let failed = |e: lathe_runtime::StatisticsError| EvaluateError { message: e.to_string() };
        let rows_counted = self.0.counts(&request).map_err(failed)?.rows;
        let mut sums = self.0.gram(rows).map_err(failed)?;
        let mut mean = self.0.field(&request, "sum").map_err(failed)?.data;
        let count = rows_counted.max(1) as f64;
        sums.scale(1.0 / count);
        mean.iter_mut().for_each(|x| *x /= count);
        Ok(Some(Gram { matrix: sums, mean, rows: rows_counted }))
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let request = Request::Columns(rows.clone());
        if !self.0.requests().any(|r| *r == request) {
            return Ok(None);
        }
        let failed = |e: lathe_runtime::StatisticsError| EvaluateError { message: e.to_string() };
        let rows = self.0.counts(&request).map_err(failed)?.rows;
        let mut square = self.0.field(&request, "square_sum").map_err(failed)?.data;
        square.iter_mut().for_each(|x| *x /= rows.max(1) as f64);
        Ok((rows > 0).then_some(Moments { square, rows }))
    }
}

impl Compressor<'_> {
    /// Collects statistics, measures sensitivities and asks every method what it could do.
    pub(crate) fn table(&self, model: &Model, warnings: &mut Vec<String>) -> Result<Table, Failure> {
        let graph = &model.graph;
        let (found, _) = weights(graph);
        let taps = || found.iter().flat_map(|w| &w.taps);
        let mut requests = BTreeSet::new();
        for tap in taps() {
            requests.extend(tap.rows.iter().chain([&tap.output_rows]).cloned().map(Request::Columns));
        }
        let requests: Vec<Request> = requests.into_iter().collect();
        let temporary = tempfile::tempdir().context("there is no place for statistics")?;
        let kept = runner::data_dir().map(|data| data.join("statistics"));
        let cache = kept.unwrap_or_else(|| temporary.path().to_owned());
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot use `{}`", cache.display()))?;
        let collect = CollectOptions {
            memory: self.memory.unwrap_or_else(quarter_of_memory),
            ..CollectOptions::new(self.load.clone(), cache)
        };
        let statistics = self.runner.collect(model, self.set, &requests, &collect).map_err(anyhow::Error::from)?;
        let statistics = Seen(statistics);
        let outputs: BTreeSet<ValueId> = taps().map(|tap| tap.output).collect();
        let sensitivity = self.sensitivity(model, &outputs, warnings)?;
        let cx = Context {
            calibration: Some(&statistics),
            target: self.cx.target,
            settings: self.cx.settings.clone(),
            ..Context::default()
        };
        let mut sites: BTreeMap<ValueId, Place> = BTreeMap::new();
        let mut records = BTreeMap::new();
        for &method in METHODS.iter().filter(|m| (self.admits)(m.info().name)) {
            let start = Instant::now();
            let proposal = method.propose(model, &cx).map_err(anyhow::Error::from)?;
            for site in proposal.sites {
                let place = sites.entry(site.weight).or_insert_with(|| Place {
                    sensitivity: site.taps.iter().map(|tap| sensitivity[tap]).collect(),
                    site: Site { choices: Vec::new(), ..site.clone() },
                    origin: Vec::new(),
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
        Ok(Table { sites: sites.into_values().collect(), records, statistics, _scratch: temporary })
    }

    /// How much the outputs answer to every value. Where that cannot be measured, the median of those where it can.
    fn sensitivity(
        &self,
        model: &Model,
        values: &BTreeSet<ValueId>,
        warnings: &mut Vec<String>,
    ) -> Result<BTreeMap<ValueId, f64>, Failure> {
        let facts = Facts::infer(model);
        let ndim = |v: &ValueId| facts.ndim(*v).unwrap_or(0);
        let probes: Vec<Probe> = values
            .iter()
            .map(|v| Probe { value: model.graph.value(*v).name.clone(), view: lathe_analysis::View::Axis(-1) })
            .collect();
        let options = ProbeOptions { load: self.load.clone(), distance: self.distance, seed: self.seed };
        let measured = self.runner.sensitivities(model, self.set, &probes, &options);
        let found = measured.map_err(anyhow::Error::from).context("the sensitivity of layers cannot be measured")?;
        let mut known: Vec<f64> = found.iter().flatten().copied().collect();
        known.sort_by(f64::total_cmp);
        let median = known.get(known.len() / 2).copied().unwrap_or(1.0);
        let missing = values.iter().zip(&found).filter(|(v, s)| s.is_none() && ndim(v) > 0).count();
        if missing > 0 {
            warnings.push(format!(
                "the sensitivity of {missing} of {} layers cannot be measured sample by sample; the median of the others stands in",
                values.len()
            ));
        }
        Ok(values.iter().zip(found).map(|(&v, s)| (v, s.unwrap_or(median))).collect())
    }
}

impl Table {
    /// Bytes of the constants that could change, as they are.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.sites.iter().map(|p| p.site.kept.bytes).sum()
    }

    /// Chooses within `bytes` for these constants and carries the choice out on a copy of `model`. `too_small` says that
    /// even the smallest options, of so many bytes, do not fit.
    pub(crate) fn compress(
        &self,
        model: &Model,
        bytes: u64,
        cx: &Context,
        too_small: &dyn Fn(u64) -> Failure,
    ) -> Result<Compressed, Failure> {
        let start = Instant::now();
        let groups: Vec<Vec<Item>> = self.sites.iter().map(items).collect();
        let found = match allocate(&groups, bytes) {
            Ok(found) => found,
            Err(AllocateError::Infeasible { smallest, .. }) => return Err(too_small(smallest)),
            Err(error) => return Err(Failure::Error(anyhow!(error))),
        };
        let mut result = model.clone();
        let mut records = self.records.clone();
        let mut choices = Vec::new();
        let cx = Context {
            calibration: Some(&self.statistics),
            target: cx.target,
            settings: cx.settings.clone(),
            ..Context::default()
        };
        for (place, &chosen) in self.sites.iter().zip(&found.chosen) {
            let site = &place.site;
            // The first option is to leave the site as it is.
            let (option, spent, error) = match chosen.checked_sub(1) {
                None => ("as it is".to_owned(), site.kept, 0.0),
                Some(index) => {
                    let choice = &site.choices[index];
                    let (method, own) = place.origin[index];
                    let own_site = Site { choices: site.choices[index - own..].to_vec(), ..site.clone() };
                    let outcome = method.rewrite(&mut result, &own_site, own, &cx).map_err(anyhow::Error::from)?;
                    let record = records.get_mut(method.info().name).expect("a method that proposes has a record");
                    record.weight_bytes_delta += choice.spent.bytes as i64 - site.kept.bytes as i64;
                    record.outcome.merge(outcome);
                    (choice.name.clone(), choice.spent, place.loss(choice))
                }
            };
            let cost = json!({ "bytes": spent.bytes, "parameters": spent.parameters });
            choices.push(json!({ "site": site.name, "option": option, "cost": cost, "error": error }));
        }
        let plan = json!({
            "solver": "pareto",
            "status": if found.optimal { "optimal" } else { "gap" },
            "objective": found.loss,
            "bound": found.bound,
            "budget": { "bytes": bytes },
            "used": { "bytes": found.bytes },
            "seconds": start.elapsed().as_secs_f64(),
            "choices": choices,
        });
        Ok(Compressed { model: result, plan, records: records.into_values().collect() })
    }
}

fn items(place: &Place) -> Vec<Item> {
    let kept = Item { bytes: place.site.kept.bytes, loss: 0.0 };
    let choices = place.site.choices.iter().map(|c| Item { bytes: c.spent.bytes, loss: place.loss(c) });
    std::iter::once(kept).chain(choices).collect()
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
