//! What was seen on the calibration set, and what can be run on it, as methods ask for it.

use super::position_weights::{PositionMoments, PositionWeights};
use crate::runner::Runner;
use lathe_analysis::{
    Bindings, Calibrate, Cost, Cross, EvaluateError, Facts, Gram, Magnitudes, Moments, Rows, Spread, View,
};
use lathe_ir::Model;
use lathe_passes::lossy::{Weight, gram_rows};
use lathe_runtime::{
    CollectOptions, Distance, LoadOptions, Request, SampleSet, SetError, SetSpec, Statistics, StatisticsError, Trials,
};
use std::collections::{BTreeMap, BTreeSet};

/// Floating-point operations that one run of a model over the samples of trials may take.
const TRIAL_FLOPS: f64 = 4e11;

/// Samples of trials, at least and at most, where a quarter of the set is as many.
const TRIAL_SAMPLES: (usize, usize) = (4, 256);

/// Rows that second moments between values are taken over at least, per feature and altogether, and samples, where the
/// set has as many: fits have far fewer coefficients per output than features.
const CROSS_ROWS_PER_FEATURE: usize = 8;
const LEAST_CROSS_ROWS: usize = 8192;
const LEAST_CROSS_SAMPLES: usize = 32;

/// Statistics by the names of values, and everything that running a variant of the model needs.
pub(super) struct Calibration<'a> {
    /// Mean squares and ranges over the whole calibration set, where layers in half precision have to keep to them.
    pub whole: Option<Statistics>,
    /// What fits see.
    pub fits: Part,
    /// What they are judged by; `None` where the set has one sample only.
    pub held: Option<Part>,
    /// How much more the errors of positions that are read apart count; statistics are weighed with it.
    pub position_weights: PositionWeights,
    /// How large values are, where a method wants to know.
    pub magnitudes: Option<Statistics>,
    /// How numbers are spread, where a method wants to know, and over which samples.
    pub spreads: Option<(SetSpec, Statistics)>,
    /// What all of it follows from; `None` for a variant of the model, or where nothing is kept.
    pub identity: Option<[u8; 32]>,
    pub runner: &'a Runner,
    /// The model that is being compressed.
    pub model: Model,
    pub split: Split,
    pub load: &'a LoadOptions,
    pub distance: Distance,
    /// How statistics of variants are collected.
    pub collect: CollectOptions,
}

/// Statistics over a part of the calibration set.
pub(super) struct Part {
    /// As many of its samples as second moments need: of all rows, and of single positions.
    pub some: SetSpec,
    pub many: SetSpec,
    /// Mean squares of what layers read and give, and second moments of what they read.
    pub all: Statistics,
    /// The same of single positions that are read apart from the others.
    pub alone: Option<Statistics>,
}

impl Part {
    /// Mean squares with every row counting as much; `None` if they were not collected.
    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        moments_or_diagonal(&self.all, rows)
    }

    fn moments_alone(&self, value: &str, at: usize) -> Result<Option<Moments>, EvaluateError> {
        self.alone.as_ref().map_or(Ok(None), |alone| moments_or_diagonal(alone, &Rows::at(value, at)))
    }

    /// Second moments in which positions count as much as `emphasis` says.
    fn gram(&self, rows: &Rows, position_weights: &PositionWeights) -> Result<Option<Gram>, EvaluateError> {
        let Some(all) = gram_in(&self.all, rows)? else { return Ok(None) };
        let alone = |at: usize| -> Result<Option<Gram>, EvaluateError> {
            self.alone.as_ref().map_or(Ok(None), |alone| gram_in(alone, &Rows::at(&rows.value, at)))
        };
        position_weights.gram(rows, all, alone).map(Some)
    }
}

impl Calibration<'_> {
    /// Second moments between values of a variant of the model, over a part of the calibration set.
    fn cross_on(&self, set: &SetSpec, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        let request = |(x, y): &(Rows, Rows)| Request::Cross(x.clone(), y.clone());
        let requests: Vec<Request> = pairs.iter().map(request).collect();
        let facts = Facts::infer(model);
        let mut by_samples: BTreeMap<usize, Vec<Request>> = BTreeMap::new();
        let samples: Vec<usize> = pairs.iter().map(|pair| self.split.enough(set, model, &facts, pair)).collect();
        for (&samples, request) in samples.iter().zip(&requests) {
            by_samples.entry(samples).or_default().push(request.clone());
        }
        let mut found = BTreeMap::new();
        for (samples, requests) in by_samples {
            let set = spread(set, samples);
            found.insert(samples, self.runner.collect(model, &set, &requests, &self.collect).map_err(failed)?);
        }
        let cross = |(request, samples): (&Request, &usize)| -> Result<Cross, StatisticsError> {
            let found = &found[samples];
            let rows = found.counts(request)?.rows;
            let mean = |name: &str| -> Result<Vec<f64>, StatisticsError> {
                let mut field = found.field(request, name)?.data;
                field.iter_mut().for_each(|x| *x /= rows.max(1) as f64);
                Ok(field)
            };
            Ok(Cross {
                matrix: mean("cross")?,
                x_mean: mean("x_sum")?,
                y_mean: mean("y_sum")?,
                x_square: mean("x_square_sum")?,
                y_square: mean("y_square_sum")?,
                rows,
            })
        };
        requests.iter().zip(&samples).map(cross).collect::<Result<_, _>>().map_err(failed)
    }

    /// The counts of numbers, if these were asked for.
    fn counted(&self, request: &Request) -> Option<&Statistics> {
        let (_, found) = self.spreads.as_ref()?;
        found.requests().any(|known| known == request).then_some(found)
    }

    /// Both parts, as far as there are two.
    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.fits).chain(&self.held)
    }

    /// Mean squares with every row counting as much; `None` if they were not collected.
    fn moments_of(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        if let Some(found) = self.whole.as_ref().map(|whole| moments_in(whole, rows)).transpose()?.flatten() {
            return Ok(Some(found));
        }
        together(self.parts().map(|part| part.moments(rows)))
    }

    /// The larger of what a variant loses on samples that no fit has seen and on as many that no choice was measured on.
    pub fn loss_of(&self, variant: &Model) -> Result<f64, StatisticsError> {
        let mut most = 0.0f64;
        for set in [&self.split.trials, &self.split.unmeasured] {
            let lost = self.trials_of_variant(variant, set).run(self.runner.child(), &[Vec::new()])?;
            most = lost.into_iter().fold(most, f64::max);
        }
        Ok(most)
    }

    /// Runs of a variant beside the model.
    fn trials_of_variant<'t>(&'t self, variant: &'t Model, set: &'t SetSpec) -> Trials<'t> {
        Trials { reference: &self.model, variant, set, distance: self.distance, load: self.load }
    }

    /// What these weights read and give in a variant of the model, with everything else as it was.
    pub fn again(&self, variant: &Model, weights: &[&Weight]) -> Result<Self, StatisticsError> {
        let (mut columns, mut grams) = (BTreeSet::new(), BTreeSet::new());
        for weight in weights {
            grams.extend(gram_rows(weight).into_iter().map(Request::Gram));
            for tap in &weight.taps {
                let plain = tap.rows.iter().filter(|rows| !matches!(rows.view, View::Patches(_)));
                columns.extend(plain.chain([&tap.output_rows]).cloned().map(Request::Columns));
            }
        }
        let collect = |set: &SetSpec, requests: &BTreeSet<Request>| {
            let requests: Vec<Request> = requests.iter().cloned().collect();
            self.runner.collect(variant, set, &requests, &self.collect)
        };
        let all: BTreeSet<Request> = columns.into_iter().chain(grams).collect();
        let alone: BTreeSet<Request> = all.iter().flat_map(|request| self.position_weights.requests(request)).collect();
        let part = |part: &Part| -> Result<Part, StatisticsError> {
            Ok(Part {
                some: part.some.clone(),
                many: part.many.clone(),
                all: collect(&part.some, &all)?,
                alone: if alone.is_empty() { None } else { Some(collect(&part.many, &alone)?) },
            })
        };
        Ok(Calibration {
            whole: None,
            fits: part(&self.fits)?,
            held: self.held.as_ref().map(part).transpose()?,
            position_weights: self.position_weights.clone(),
            magnitudes: None,
            spreads: None,
            identity: None,
            runner: self.runner,
            model: self.model.clone(),
            split: self.split.clone(),
            load: self.load,
            distance: self.distance,
            collect: self.collect.clone(),
        })
    }
}

/// The calibration set in two parts that share no sample, unless it has only one.
#[derive(Clone)]
pub(super) struct Split {
    /// What trials run on.
    pub trials: SetSpec,
    /// What variants are fitted to, and as many of these samples as trials run on.
    pub fits: SetSpec,
    pub unmeasured: SetSpec,
    /// Whether the two parts differ.
    pub holds_out: bool,
    /// Floating-point operations of one run over what trials run on.
    pub trial_flops: f64,
    /// The sizes of the first run over the set, and its samples.
    sizes: Bindings,
    samples: usize,
}

impl Split {
    pub fn of(set: &SetSpec, model: &Model) -> Result<Split, SetError> {
        let samples = SampleSet::open(set, model)?;
        let (least, most) = TRIAL_SAMPLES;
        let (sizes, of_run) = match samples.batches().next().transpose()? {
            Some(batch) => (sizes(model, &batch.inputs), batch.samples.max(1)),
            None => (Bindings::default(), 1),
        };
        let flops = Cost::of(model, &Facts::infer(model), &sizes).flops as f64 / of_run as f64;
        let affordable = (TRIAL_FLOPS / flops.max(1.0)) as usize;
        let trials = samples.spread(affordable.clamp(least, most).min(samples.len() / 4).max(1));
        let tried: BTreeSet<usize> = trials.iter().copied().collect();
        let all: Vec<usize> = samples.spread(samples.len());
        let mut fits: Vec<usize> = all.iter().copied().filter(|unit| !tried.contains(unit)).collect();
        let holds_out = !fits.is_empty();
        if !holds_out {
            fits = all;
        }
        let part = |chosen| SetSpec { chosen: Some(chosen), ..set.clone() };
        let trial_flops = flops * trials.len() as f64;
        let some = trials.len().min(fits.len());
        let unmeasured = (0..some).map(|i| fits[i * fits.len() / some]).collect();
        Ok(Split {
            trials: part(trials),
            fits: part(fits),
            unmeasured: part(unmeasured),
            holds_out,
            trial_flops,
            sizes,
            samples: of_run,
        })
    }

    /// How many of the samples of a part second moments of this pair need: a power of two times the least, so that pairs
    /// that need about as many share their runs.
    fn enough(&self, part: &SetSpec, model: &Model, facts: &Facts, (x, y): &(Rows, Rows)) -> usize {
        let wanted = [x, y].into_iter().filter_map(|rows| {
            let View::Axis(axis) = rows.view else { return None };
            let shape = facts.shape(model.graph.find_value(&rows.value)?)?;
            let dims: Vec<usize> = shape
                .iter()
                .map(|dim| usize::try_from(self.sizes.evaluate(dim)?).ok().filter(|&size| size > 0))
                .collect::<Option<_>>()?;
            let axis = if axis < 0 { dims.len().checked_add_signed(axis as isize)? } else { axis as usize };
            let (all, features) = (dims.iter().product::<usize>(), *dims.get(axis)?);
            let rows = LEAST_CROSS_ROWS.max(CROSS_ROWS_PER_FEATURE * features);
            Some((rows * self.samples).div_ceil(all / features))
        });
        let all = part.chosen.as_ref().map_or(0, Vec::len);
        let runs = wanted.max().map(|wanted| wanted.div_ceil(LEAST_CROSS_SAMPLES).max(1).next_power_of_two());
        runs.map_or(all, |runs| (runs * LEAST_CROSS_SAMPLES).min(all))
    }
}

/// So many of the samples of a part, spread over it.
fn spread(part: &SetSpec, count: usize) -> SetSpec {
    let chosen = part.chosen.clone().unwrap_or_default();
    let spread = (0..count).map(|i| chosen[i * chosen.len() / count]).collect();
    SetSpec { chosen: Some(spread), ..part.clone() }
}

/// The sizes that symbols of the inputs' shapes have in these inputs.
pub(super) fn sizes(model: &Model, inputs: &[(String, lathe_ir::Tensor)]) -> Bindings {
    let mut bindings = Bindings::default();
    for &input in model.graph.main().inputs() {
        let value = model.graph.value(input);
        let Some((_, tensor)) = inputs.iter().find(|(name, _)| *name == value.name) else { continue };
        if let Some(stated) = value.ty.as_ref().and_then(|ty| ty.shape()) {
            bindings.set_input(stated, tensor.dims());
        }
    }
    bindings
}

fn gram_in(statistics: &Statistics, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
    let request = Request::Gram(rows.clone());
    if !statistics.requests().any(|r| *r == request) {
        return Ok(None);
    }
    let (mut sums, mut mean, counts) = statistics.gram_and_sum(rows).map_err(failed)?;
    let rows_counted = counts.rows;
    let count = rows_counted.max(1) as f64;
    sums.scale(1.0 / count);
    mean.iter_mut().for_each(|x| *x /= count);
    Ok((rows_counted > 0).then_some(Gram { matrix: sums, mean, rows: rows_counted }))
}

fn moments_in(statistics: &Statistics, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
    let request = Request::Columns(rows.clone());
    if !statistics.requests().any(|r| *r == request) {
        return Ok(None);
    }
    let rows = statistics.counts(&request).map_err(failed)?.rows;
    let mut square = statistics.field(&request, "square_sum").map_err(failed)?.data;
    square.iter_mut().for_each(|x| *x /= rows.max(1) as f64);
    let largest = statistics.field(&request, "max_abs").map_err(failed)?.data.into_iter().fold(0.0, f64::max);
    Ok((rows > 0).then_some(Moments { square, largest: Some(largest), rows }))
}

fn moments_or_diagonal(statistics: &Statistics, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
    Ok(match moments_in(statistics, rows)? {
        Some(found) => Some(found),
        None => gram_in(statistics, rows)?.as_ref().map(diagonal),
    })
}

/// Mean squares over the rows of several parts, as far as they were collected; `None` if those of none were.
fn together(
    parts: impl Iterator<Item = Result<Option<Moments>, EvaluateError>>,
) -> Result<Option<Moments>, EvaluateError> {
    let all: Vec<Moments> = parts.filter_map(Result::transpose).collect::<Result<_, _>>()?;
    let rows: u64 = all.iter().map(|part| part.rows).sum();
    let share = |part: &Moments| part.rows as f64 / rows.max(1) as f64;
    let size = all.first().map_or(0, |part| part.square.len());
    let square = (0..size).map(|at| all.iter().map(|part| share(part) * part.square[at]).sum()).collect();
    let largest = all.iter().map(|part| part.largest).collect::<Option<Vec<f64>>>();
    let largest = largest.map(|all| all.into_iter().fold(0.0, f64::max));
    Ok((size > 0).then_some(Moments { square, largest, rows }))
}

fn diagonal(gram: &Gram) -> Moments {
    let square = (0..gram.matrix.size()).map(|i| gram.matrix.get(i, i)).collect();
    Moments { square, largest: None, rows: gram.rows }
}

fn failed(error: StatisticsError) -> EvaluateError {
    EvaluateError { message: error.to_string() }
}

impl PositionMoments for Calibration<'_> {
    fn moments_of_all(&self, value: &str) -> Result<Option<Moments>, EvaluateError> {
        self.moments_of(&Rows::last(value))
    }

    fn moments_alone(&self, value: &str, at: usize) -> Result<Option<Moments>, EvaluateError> {
        together(self.parts().map(|part| part.moments_alone(value, at)))
    }
}

impl Calibrate for Calibration<'_> {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        self.fits.gram(rows, &self.position_weights)
    }

    fn held_gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        self.held.as_ref().map_or(Ok(None), |held| held.gram(rows, &self.position_weights))
    }

    fn held_moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let Some(held) = &self.held else { return Ok(None) };
        let Some(all) = held.moments(rows)? else { return Ok(None) };
        self.position_weights.moments(rows, all, |at| held.moments_alone(&rows.value, at)).map(Some)
    }

    fn identity(&self) -> Option<[u8; 32]> {
        self.identity
    }

    fn holds_out(&self) -> bool {
        self.split.holds_out
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let Some(all) = self.moments_of(rows)? else { return Ok(None) };
        self.position_weights.moments(rows, all, |at| self.moments_alone(&rows.value, at)).map(Some)
    }

    fn magnitudes(&self, rows: &Rows) -> Result<Option<Magnitudes>, EvaluateError> {
        let request = Request::Magnitudes(rows.clone());
        let found = self.magnitudes.as_ref().filter(|m| m.requests().any(|r| *r == request));
        found.map(|found| found.magnitudes(rows)).transpose().map(Option::flatten).map_err(failed)
    }

    fn spread(&self, rows: &Rows) -> Result<Option<Spread>, EvaluateError> {
        let request = Request::Spread(rows.clone());
        let found = self.counted(&request);
        found.map(|found| found.spread(rows)).transpose().map(Option::flatten).map_err(failed)
    }

    fn extremes(&self, rows: &Rows) -> Result<Option<Vec<(f64, f64)>>, EvaluateError> {
        let found = self.counted(&Request::Spread(rows.clone()));
        found.map(|found| found.extremes(rows)).transpose().map_err(failed)
    }

    fn spreads_of(&self, model: &Model, rows: &[Rows]) -> Result<Vec<Option<Spread>>, EvaluateError> {
        let set = self.spreads.as_ref().map_or(&self.split.fits, |(set, _)| set);
        let requests: Vec<Request> = rows.iter().cloned().map(Request::Spread).collect();
        let found = self.runner.collect(model, set, &requests, &self.collect).map_err(failed)?;
        rows.iter().map(|rows| found.spread(rows)).collect::<Result<_, _>>().map_err(failed)
    }

    fn cosines(&self, pairs: &[(Rows, Rows)]) -> Result<Vec<f64>, EvaluateError> {
        let request = |(x, y): &(Rows, Rows)| Request::Cosine(x.clone(), y.clone());
        let requests: Vec<Request> = pairs.iter().map(request).collect();
        let found = self.runner.collect(&self.model, &self.split.fits, &requests, &self.collect).map_err(failed)?;
        let cosine = |request: &Request| -> Result<f64, StatisticsError> {
            let sum = found.field(request, "cosine_sum")?.data.first().copied().unwrap_or(0.0);
            Ok(sum / found.counts(request)?.rows.max(1) as f64)
        };
        requests.iter().map(cosine).collect::<Result<_, _>>().map_err(failed)
    }

    fn cross(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        self.cross_on(&self.split.fits, model, pairs)
    }

    fn held_out(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        self.cross_on(&self.split.trials, model, pairs)
    }

    fn trial_flops(&self) -> f64 {
        self.split.trial_flops
    }

    fn trials_of(&self, variants: &[Model]) -> Result<Vec<f64>, EvaluateError> {
        let all: Vec<Trials<'_>> = variants.iter().map(|v| self.trials_of_variant(v, &self.split.trials)).collect();
        Trials::run_each(&all, self.runner.child()).map_err(failed)
    }

    fn trials(&self, variant: &Model, gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        self.trials_of_variant(variant, &self.split.trials).run(self.runner.child(), gates).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::{Tensor, text};

    #[test]
    fn moments_of_parts_are_those_of_all_their_rows() {
        let part = |square: &[f64], largest, rows| Ok(Some(Moments { square: square.to_vec(), largest, rows }));
        let both = [part(&[1.0, 2.0], Some(3.0), 30), part(&[5.0, 2.0], Some(4.0), 10), Ok(None)];
        let found = together(both.into_iter()).unwrap().unwrap();
        assert_eq!((found.square, found.largest, found.rows), (vec![2.0, 2.0], Some(4.0), 40));
        let unwatched = [part(&[1.0], Some(3.0), 1), part(&[1.0], None, 1)];
        assert_eq!(together(unwatched.into_iter()).unwrap().unwrap().largest, None);
        assert_eq!(together([Ok(None)].into_iter()).unwrap(), None);
    }

    #[test]
    fn fits_and_trials_share_no_sample_but_the_only_one() {
        let source = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 3] x) => (float[n, 3] y) { y = Neg (x) }";
        let model = text::parse(source).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        for (samples, fits, trials) in [(1, 1, 1), (2, 1, 1), (9, 7, 2), (400, 300, 100)] {
            let mut npz = lathe_runtime::NpzWriter::create(&path).unwrap();
            npz.add("x", &Tensor::from_f32s(&[samples, 3], &vec![0.5; 3 * samples])).unwrap();
            npz.finish().unwrap();
            let split = Split::of(&SetSpec::all(&path), &model).unwrap();
            let chosen = |set: &SetSpec| set.chosen.clone().unwrap();
            let (own, tried) = (chosen(&split.fits), chosen(&split.trials));
            assert_eq!((own.len(), tried.len(), split.holds_out), (fits, trials, samples > 1));
            assert!(samples == 1 || !own.iter().any(|unit| tried.contains(unit)));
            let others = chosen(&split.unmeasured);
            assert!(others.len() == trials && others.iter().all(|unit| own.contains(unit)));
        }
    }
}
