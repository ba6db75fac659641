//! First stage: statistics of what layers read and give, and how much the outputs answer to errors of each.

use super::{
    calibration::{Calibration, Part, Split, sizes},
    position_weights::{PositionWeights, Sensitivities, SlicedPositions},
    setup::Setup,
};
use crate::{Failure, runner::Runner};
use anyhow::Context as _;
use lathe_analysis::{Bindings, Facts, Rows, View};
use lathe_ir::{Model, ValueId};
use lathe_passes::lossy::{MethodContext, Tap, Weight, gram_rows, weights};
use lathe_runtime::{
    CollectOptions, Probe, ProbeOptions, Request, SampleSet, SetSpec, quarter_of_memory, sensitivities,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Rows per input feature that second moments are taken over at least, where the set has as many.
const ROWS_PER_FEATURE: usize = 4;

/// Rows and samples that second moments are taken over at least.
const LEAST_ROWS: usize = 8192;
const LEAST_SAMPLES: usize = 32;

/// Rows that fits are judged by at least, where as many are held out.
const HELD_ROWS: usize = 2048;

/// Samples in which positions that are read apart are looked at, at most: one position has one row in each.
const MOST_ALONE: usize = 512;

/// Samples over which numbers are counted, at most.
const MOST_SPREAD: usize = 1024;

/// What is known before anything is proposed.
pub(super) struct Calibrated<'a> {
    pub calibration: Calibration<'a>,
    pub sensitivities: Sensitivities,
    /// Rows of all products with every weight in one run.
    pub rows: BTreeMap<ValueId, u64>,
    /// Holds the statistics where the user has no data folder.
    _scratch: TempDir,
}

impl<'a> Calibrated<'a> {
    /// What methods may know now.
    pub fn context<'c>(&'c self, cx: &MethodContext<'c>) -> MethodContext<'c> {
        cx.with_calibration(&self.calibration).with_rows(self.rows.clone())
    }
}

/// Collects statistics over the calibration set and measures sensitivities.
pub(super) fn calibrate<'a>(
    setup: &Setup<'a>,
    model: &Model,
    warnings: &mut Vec<String>,
) -> Result<Calibrated<'a>, Failure> {
    let graph = &model.graph;
    let reads_statistics = setup.methods.iter().any(|m| m.needs(&setup.cx).statistics);
    let layers = if reads_statistics { weights(graph).0 } else { Vec::new() };
    let scratch = tempfile::tempdir().context("there is no place for statistics")?;
    let kept = setup.runner.store().map(|store| store.join("statistics"));
    let cache = kept.unwrap_or_else(|| scratch.path().to_owned());
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot use `{}`", cache.display()))?;
    let sliced = SlicedPositions::find(model, &layers);
    let span = |what| setup.runner.child().listener().stage(what);
    let mut calibration = {
        let _span = span("statistics");
        statistics(setup, model, &layers, &sliced, [&cache, scratch.path()])?
    };
    let taps = layers.iter().flat_map(|w| &w.taps);
    let mut outputs: BTreeMap<ValueId, View> = taps.map(|tap| (tap.output, tap.output_rows.view.clone())).collect();
    for method in &setup.methods {
        for rows in method.extra_taps(model, &setup.cx)? {
            let value = graph.find_value(&rows.value).context("a value that is watched is not there")?;
            outputs.entry(value).or_insert(rows.view);
        }
    }
    let sensitivities = {
        let _span = span("sensitivities");
        sensitivity(setup, model, &outputs, &sliced.outputs(), cache, warnings)?
    };
    calibration.position_weights = sliced.position_weights(&calibration, &sensitivities)?;
    let facts = Facts::infer(model);
    let bindings = Bindings::default().for_inputs(graph, &facts);
    let rows = |weight: &Weight| -> u64 {
        let products = weight.taps.iter().filter(|tap| tap.rows.is_some());
        products.map(|tap| rows_of(&facts, &bindings, tap)).sum()
    };
    let rows = layers.iter().map(|weight| (weight.value, rows(weight))).collect();
    Ok(Calibrated { calibration, sensitivities, rows, _scratch: scratch })
}

/// What layers read and give on the calibration set.
///
/// What is about the model itself is kept in the first folder, what is about variants of it in the second.
fn statistics<'a>(
    setup: &Setup<'a>,
    model: &Model,
    layers: &[Weight],
    sliced: &SlicedPositions,
    [cache, scratch]: [&Path; 2],
) -> Result<Calibration<'a>, Failure> {
    let collect = CollectOptions {
        memory: setup.memory.unwrap_or_else(quarter_of_memory),
        cache_limit: setup.runner.statistics_limit(),
        ..CollectOptions::new(setup.load.clone(), cache.to_owned())
    };
    // Second moments have no range, which layers in half precision have to keep to on every sample.
    let half = setup.cx.half_precision;
    let ranges = setup.methods.iter().any(|m| m.needs(&setup.cx).ranges);
    let widths = layers.iter().filter(|w| !gram_rows(w).is_empty()).map(Weight::inputs);
    let widest = widths.max().unwrap_or(0);
    let (columns, mut grams) = requests(layers, half, ranges);
    for method in &setup.methods {
        let wanted = method.grams(model, &setup.cx).map_err(anyhow::Error::from)?;
        let wanted: Vec<Request> = wanted.into_iter().map(Request::Gram).collect();
        let wanted: Vec<Request> = wanted.into_iter().filter(|request| !grams.contains(request)).collect();
        grams.extend(wanted);
    }
    let split = Split::of(setup.set, model).map_err(anyhow::Error::from)?;
    let all = [columns.as_slice(), &grams].concat();
    let gather = |set: &SetSpec, requests: &[Request]| {
        setup.runner.collect(model, set, requests, &collect).map_err(anyhow::Error::from)
    };
    let part = |set: &SetSpec, rows: usize, positions: usize| -> Result<Part, Failure> {
        let samples = SampleSet::open(set, model).map_err(anyhow::Error::from)?;
        let spread = |count: usize| match count >= samples.len() {
            true => set.clone(),
            false => SetSpec { chosen: Some(samples.spread(count)), ..set.clone() },
        };
        let wanted = samples_for(model, layers, &samples, rows)?;
        let (some, many) = (spread(wanted), spread(positions.min(MOST_ALONE).max(wanted)));
        let alone = if sliced.is_empty() { None } else { Some(gather(&many, &sliced.requests())?) };
        Ok(Part { all: gather(&some, &all)?, alone, some, many })
    };
    let rows = ROWS_PER_FEATURE * widest;
    let fits = part(&split.fits, rows.max(LEAST_ROWS), rows)?;
    let held = if split.holds_out { Some(part(&split.trials, HELD_ROWS, MOST_ALONE)?) } else { None };
    let mut calibration = Calibration {
        whole: if half { Some(gather(setup.set, &columns)?) } else { None },
        fits,
        held,
        position_weights: PositionWeights::default(),
        magnitudes: None,
        spreads: None,
        identity: identity(setup, model)?,
        runner: setup.runner,
        model: model.clone(),
        split,
        load: setup.load,
        distance: setup.distance,
        // Variants come once; what is kept for later runs is about the model itself.
        collect: CollectOptions {
            memory: collect.memory,
            ..CollectOptions::new(setup.load.clone(), scratch.to_owned())
        },
    };
    let cx = setup.cx.with_calibration(&calibration);
    let (mut wanted, mut spreads) = (BTreeSet::new(), BTreeSet::new());
    for method in &setup.methods {
        wanted.extend(method.magnitudes(model, &cx).map_err(anyhow::Error::from)?);
        spreads.extend(method.spreads(model, &cx).map_err(anyhow::Error::from)?);
    }
    drop(cx);
    if !spreads.is_empty() {
        let samples = SampleSet::open(setup.set, model).map_err(anyhow::Error::from)?;
        let set = SetSpec { chosen: Some(samples.spread(MOST_SPREAD)), ..setup.set.clone() };
        let requests: Vec<Request> = spreads.into_iter().map(Request::Spread).collect();
        let found = gather(&set, &requests)?;
        calibration.spreads = Some((set, found));
    }
    if !wanted.is_empty() {
        let requests: Vec<Request> = wanted.into_iter().map(Request::Magnitudes).collect();
        let found = setup.runner.collect(model, setup.set, &requests, &collect).map_err(anyhow::Error::from)?;
        calibration.magnitudes = Some(found);
    }
    Ok(calibration)
}

/// What is known of a model follows from this: the model, the samples, and how they are run and compared.
fn identity(setup: &Setup<'_>, model: &Model) -> Result<Option<[u8; 32]>, Failure> {
    if setup.cx.kept.is_none() {
        return Ok(None);
    }
    let hash = setup.runner.child().run_hash(model, setup.set, setup.load, &(setup.distance, setup.seed));
    Ok(Some(*hash.map_err(anyhow::Error::from)?.as_bytes()))
}

/// How many samples have as many rows as are `wanted` of every layer.
fn samples_for(model: &Model, layers: &[Weight], set: &SampleSet, wanted: usize) -> Result<usize, Failure> {
    let facts = Facts::infer(model);
    let Some(batch) = set.batches().next().transpose().map_err(anyhow::Error::from)? else { return Ok(0) };
    let bindings = sizes(model, &batch.inputs);
    let taps = layers.iter().flat_map(|w| &w.taps).filter(|tap| tap.rows.is_some());
    let fewest = taps.map(|tap| rows_of(&facts, &bindings, tap) as usize).filter(|&rows| rows > 0).min();
    Ok((wanted * batch.samples.max(1)).div_ceil(fewest.unwrap_or(1)).max(LEAST_SAMPLES))
}

/// How much the outputs answer to every value, and to single positions of values. Where the first cannot be measured,
/// the median of those where it can.
fn sensitivity(
    setup: &Setup<'_>,
    model: &Model,
    values: &BTreeMap<ValueId, View>,
    positions: &[(ValueId, usize)],
    cache: PathBuf,
    warnings: &mut Vec<String>,
) -> Result<Sensitivities, Failure> {
    let facts = Facts::infer(model);
    let ndim = |v: &ValueId| facts.ndim(*v).unwrap_or(0);
    let probe = |(v, view): (&ValueId, View)| Probe { value: model.graph.value(*v).name.clone(), view };
    let whole = values.iter().map(|(v, view)| (v, view.clone()));
    let alone = positions.iter().map(|(v, at)| (v, View::Position(*at)));
    let probes: Vec<Probe> = whole.chain(alone).map(probe).collect();
    let (load, cache) = (setup.load.clone(), Some(cache));
    let options = ProbeOptions { load, distance: setup.distance, seed: setup.seed, cache };
    let measured = setup.runner.sensitivities(model, setup.set, &probes, &options);
    let mut found = measured.map_err(anyhow::Error::from).context("the sensitivity of layers cannot be measured")?;
    let of_positions = found.split_off(values.len());
    let mut known: Vec<f64> = found.iter().flatten().copied().collect();
    known.sort_by(f64::total_cmp);
    let is_known = known.iter().any(|&answer| answer > 0.0);
    if !is_known {
        // Outputs that answer to nothing do not tell layers apart.
        found.iter_mut().for_each(|answer| *answer = None);
    }
    let median = known.get(known.len() / 2).copied().filter(|_| is_known).unwrap_or(1.0);
    let missing: Vec<ValueId> =
        values.keys().zip(&found).filter(|(v, s)| s.is_none() && ndim(v) > 0).map(|(&v, _)| v).collect();
    if let Some(&first) = missing.first() {
        let first = &model.graph.value(first).name;
        warnings.push(unanswered([missing.len(), values.len()], first, is_known));
    }
    Ok(Sensitivities {
        is_known,
        values: values.keys().zip(found).map(|(&v, s)| (v, s.unwrap_or(median))).collect(),
        positions: positions.iter().zip(of_positions).filter_map(|(&at, s)| Some((at, s?))).collect(),
    })
}

/// That outputs do not answer to errors of some of all layers.
fn unanswered([missing, all]: [usize; 2], first: &str, others_are_known: bool) -> String {
    let instead =
        if others_are_known { "the median of the others stands in" } else { "errors of all of them count alike" };
    format!(
        "no output answers to an error in {missing} of {all} layers, first the one that makes `{first}`: {instead}; a \
         calibration set with more samples, and finite outputs on all of them, may tell"
    )
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

    #[test]
    fn layers_that_no_output_answers_to_are_named_with_what_stands_in() {
        let known = unanswered([2, 9], "hidden", true);
        assert_eq!(
            known,
            "no output answers to an error in 2 of 9 layers, first the one that makes `hidden`: the median of the others \
             stands in; a calibration set with more samples, and finite outputs on all of them, may tell"
        );
        assert!(unanswered([9, 9], "hidden", false).contains("`hidden`: errors of all of them count alike; "));
    }

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
