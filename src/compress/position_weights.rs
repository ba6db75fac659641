//! Positions whose errors count more than those of their neighbours.
//!
//! A classifier that reads a class token answers to errors of that one among hundreds of tokens. Where a model reads
//! positions apart, outputs are tried against errors of these alone, and second moments of what a layer reads and gives
//! weigh every position by what an error there does: fits and prices then speak of the outputs, not of the mean token.

use lathe_analysis::{EvaluateError, Facts, Gram, Moments, Rows, SymMatrix, View, read_apart};
use lathe_ir::{Model, ValueId};
use lathe_passes::lossy::{Weight, gram_rows};
use lathe_runtime::Request;
use std::collections::{BTreeMap, BTreeSet};

/// A position counts at most this many times as much as the others.
const MOST: f64 = 1e4;

/// The least share of what outputs answer that the other positions are taken to be the reason of.
const LEAST_OF_OTHERS: f64 = 0.01;

/// What the outputs answer to errors of values, per squared error relative to what is disturbed.
pub(super) struct Sensitivities {
    /// Whether any is known.
    pub is_known: bool,
    /// Errors everywhere.
    pub values: BTreeMap<ValueId, f64>,
    /// Errors at one position only.
    pub positions: BTreeMap<(ValueId, usize), f64>,
}

/// Mean squares over a calibration set, not weighed; `None` if they were not collected.
pub(super) trait PositionMoments {
    /// Along the last axis of a value.
    fn moments_of_all(&self, value: &str) -> Result<Option<Moments>, EvaluateError>;

    /// Of one position of a value.
    fn moments_alone(&self, value: &str, at: usize) -> Result<Option<Moments>, EvaluateError>;
}

/// Layers that read, and give, positions of which the model reads some apart.
#[derive(Default)]
pub(super) struct SlicedPositions {
    /// By the name of what is read.
    layers: BTreeMap<String, Layers>,
}

/// All layers that read one value.
struct Layers {
    /// How many positions there are, and which are read apart.
    count: usize,
    sliced: BTreeSet<usize>,
    /// Whether methods may want second moments of what is read.
    gram: bool,
    /// What the layers give.
    outputs: BTreeMap<ValueId, String>,
}

impl SlicedPositions {
    pub fn find(model: &Model, found: &[Weight]) -> SlicedPositions {
        let (graph, facts) = (&model.graph, Facts::infer(model));
        let read = read_apart(model, &facts);
        let positions = |value: ValueId| {
            let [_, positions, .., _] = facts.shape(value).filter(|shape| shape.len() > 2)? else { return None };
            usize::try_from(positions.as_known()?).ok()
        };
        let mut all = SlicedPositions::default();
        for weight in found {
            let grams = gram_rows(weight);
            for tap in &weight.taps {
                let Some(rows) = tap.rows.as_ref().filter(|rows| rows.view == View::Axis(-1)) else { continue };
                let Some(count) = graph.find_value(&rows.value).and_then(positions) else { continue };
                let Some(sliced) = read.get(&count).filter(|_| positions(tap.output) == Some(count)) else { continue };
                let layers = all.layers.entry(rows.value.clone()).or_insert_with(|| Layers {
                    count,
                    sliced: sliced.clone(),
                    gram: false,
                    outputs: BTreeMap::new(),
                });
                layers.gram |= grams.contains(rows);
                layers.outputs.insert(tap.output, graph.value(tap.output).name.clone());
            }
        }
        all
    }

    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Every position of what layers give.
    pub fn outputs(&self) -> Vec<(ValueId, usize)> {
        let of = |layers: &'_ Layers| -> Vec<(ValueId, usize)> {
            layers.outputs.keys().flat_map(|&value| layers.sliced.iter().map(move |&at| (value, at))).collect()
        };
        self.layers.values().flat_map(of).collect()
    }

    /// What has to be known of every position.
    pub fn requests(&self) -> Vec<Request> {
        let mut all = Vec::new();
        for (read, layers) in &self.layers {
            for &at in &layers.sliced {
                let rows = Rows::at(read, at);
                all.push(if layers.gram { Request::Gram(rows) } else { Request::Columns(rows) });
                all.extend(layers.outputs.values().map(|given| Request::Columns(Rows::at(given, at))));
            }
        }
        all
    }

    /// How much every position counts.
    pub fn position_weights(
        &self,
        seen: &impl PositionMoments,
        sensitivities: &Sensitivities,
    ) -> Result<PositionWeights, EvaluateError> {
        let mut position_weights = PositionWeights::default();
        for (read, layers) in &self.layers {
            let mut logs: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
            for (value, name) in &layers.outputs {
                let (Some(&whole), Some(all)) = (sensitivities.values.get(value), seen.moments_of_all(name)?) else {
                    continue;
                };
                let mut parts = Vec::new();
                for &at in &layers.sliced {
                    let energy = seen.moments_alone(name, at)?.map(|m| m.square.iter().sum::<f64>());
                    parts.extend(
                        sensitivities
                            .positions
                            .get(&(*value, at))
                            .zip(energy)
                            .map(|(&answer, energy)| (at, answer, energy)),
                    );
                }
                let energy =
                    layers.count as f64 * all.square.iter().sum::<f64>() - parts.iter().map(|p| p.2).sum::<f64>();
                let answer = (whole - parts.iter().map(|p| p.1).sum::<f64>()).max(LEAST_OF_OTHERS * whole);
                for (at, own_answer, own_energy) in parts {
                    let times = (own_answer / own_energy) / (answer / energy);
                    // Fewer than the others is left: what is taken from sums over other samples may be more than is there.
                    logs.entry(at).or_default().extend(times.is_finite().then(|| times.clamp(1.0, MOST).ln()));
                }
            }
            let mean = |logs: &Vec<f64>| (logs.iter().sum::<f64>() / logs.len().max(1) as f64).exp();
            let times: Vec<(usize, f64)> = logs.iter().map(|(&at, logs)| (at, mean(logs))).collect();
            let weights = Weights { count: layers.count, times };
            for name in layers.outputs.values() {
                position_weights.by_value.entry(name.clone()).or_insert_with(|| weights.clone());
            }
            position_weights.by_value.insert(read.clone(), weights);
        }
        Ok(position_weights)
    }
}

/// How many times as much as the other positions some count.
#[derive(Debug, Clone, PartialEq)]
struct Weights {
    count: usize,
    times: Vec<(usize, f64)>,
}

impl Weights {
    /// All positions count once, and some so much more.
    fn total(&self) -> f64 {
        self.count as f64 + self.times.iter().map(|(_, times)| times - 1.0).sum::<f64>()
    }
}

/// How positions of values count, by the names of the values.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PositionWeights {
    by_value: BTreeMap<String, Weights>,
}

impl PositionWeights {
    fn of(&self, rows: &Rows) -> Option<&Weights> {
        self.by_value.get(&rows.value).filter(|_| rows.view == View::Axis(-1))
    }

    /// The same of single positions.
    pub fn requests(&self, request: &Request) -> Vec<Request> {
        let (rows, of): (_, fn(Rows) -> Request) = match request {
            Request::Gram(rows) => (rows, Request::Gram),
            Request::Columns(rows) => (rows, Request::Columns),
            _ => return Vec::new(),
        };
        let positions = self.of(rows).map(|weights| weights.times.as_slice()).unwrap_or_default();
        positions.iter().map(|&(at, _)| of(Rows::at(&rows.value, at))).collect()
    }

    /// Second moments over all rows with every position weighed, from those over all rows and those of single positions.
    ///
    /// A position has one row per sample. As far as these are few for the number of features, what all rows look like
    /// stands in for it, so that nothing is fitted to the samples that happen to be there.
    pub fn gram(
        &self,
        rows: &Rows,
        all: Gram,
        alone: impl Fn(usize) -> Result<Option<Gram>, EvaluateError>,
    ) -> Result<Gram, EvaluateError> {
        let Some(weights) = self.of(rows) else { return Ok(all) };
        let size = all.matrix.size();
        let trace = |gram: &Gram| (0..size).map(|i| gram.matrix.get(i, i)).sum::<f64>();
        let total = weights.total();
        let share = weights.count as f64 / total;
        let (mut of_all, mut of_mean) = (share, share);
        let mut parts = Vec::new();
        for &(at, times) in &weights.times {
            let Some(found) = alone(at)?.filter(|gram| gram.matrix.size() == size) else { continue };
            let more = (times - 1.0) / total;
            let own = found.rows as f64 / (found.rows as f64 + size as f64);
            let scale = trace(&found) / trace(&all).max(f64::MIN_POSITIVE);
            of_all += more * (1.0 - own) * scale;
            of_mean += more * (1.0 - own) * scale.sqrt();
            parts.push((more * own, found));
        }
        let mix = |of_all: f64, all: &[f64], part: fn(&Gram) -> &[f64]| -> Vec<f64> {
            let sum =
                |(at, x): (usize, &f64)| of_all * x + parts.iter().map(|(own, gram)| own * part(gram)[at]).sum::<f64>();
            all.iter().enumerate().map(sum).collect()
        };
        let upper = mix(of_all, all.matrix.upper(), |gram| gram.matrix.upper());
        let mean = mix(of_mean, &all.mean, |gram| &gram.mean);
        let matrix = SymMatrix::from_upper(size, upper).expect("sums of triangles of one size are one");
        Ok(Gram { matrix, mean, rows: all.rows })
    }

    /// Mean squares likewise.
    pub fn moments(
        &self,
        rows: &Rows,
        mut all: Moments,
        alone: impl Fn(usize) -> Result<Option<Moments>, EvaluateError>,
    ) -> Result<Moments, EvaluateError> {
        let Some(weights) = self.of(rows) else { return Ok(all) };
        let total = weights.total();
        all.square.iter_mut().for_each(|x| *x *= weights.count as f64 / total);
        for &(at, times) in &weights.times {
            let found = alone(at)?.filter(|found| found.square.len() == all.square.len());
            for (sum, own) in all.square.iter_mut().zip(found.iter().flat_map(|found| &found.square)) {
                *sum += own * (times - 1.0) / total;
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: usize = 5;
    const SIZE: usize = 2;

    /// Of rows of `SIZE` features.
    fn gram(rows: &[[f64; SIZE]]) -> Gram {
        let mean = |of: &dyn Fn(&[f64; SIZE]) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
        let upper = vec![mean(&|r| r[0] * r[0]), mean(&|r| r[0] * r[1]), mean(&|r| r[1] * r[1])];
        let matrix = SymMatrix::from_upper(SIZE, upper).unwrap();
        Gram { matrix, mean: vec![mean(&|r| r[0]), mean(&|r| r[1])], rows: rows.len() as u64 }
    }

    fn row(sample: usize, position: usize) -> [f64; SIZE] {
        let x = (sample * 7 + position * 3) as f64;
        [(x * 0.7).sin() + 0.3, if position == 1 { 4.0 } else { (x * 1.3).cos() }]
    }

    fn position_weights(times: f64) -> PositionWeights {
        let weights = Weights { count: COUNT, times: vec![(1, times)] };
        PositionWeights { by_value: BTreeMap::from([("x".to_owned(), weights)]) }
    }

    #[test]
    fn a_position_that_counts_three_times_is_as_if_it_were_there_three_times() {
        // With very many samples, so that nothing has to stand in for the position.
        let samples = 4000;
        let all: Vec<[f64; SIZE]> = (0..samples).flat_map(|s| (0..COUNT).map(move |p| row(s, p))).collect();
        let one: Vec<[f64; SIZE]> = (0..samples).map(|s| row(s, 1)).collect();
        let thrice = [all.as_slice(), &one, &one].concat();
        let rows = Rows::last("x");
        let found = position_weights(3.0).gram(&rows, gram(&all), |at| Ok((at == 1).then(|| gram(&one)))).unwrap();
        let expected = gram(&thrice);
        let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-3 * b.abs().max(1.0));
        assert!(near(found.matrix.upper(), expected.matrix.upper()), "{found:?} is not {expected:?}");
        assert!(near(&found.mean, &expected.mean), "{found:?} is not {expected:?}");
        let moments = |gram: &Gram| {
            let square = (0..SIZE).map(|i| gram.matrix.get(i, i)).collect();
            Moments { square, largest: Some(4.0), rows: gram.rows }
        };
        let found =
            position_weights(3.0).moments(&rows, moments(&gram(&all)), |_| Ok(Some(moments(&gram(&one))))).unwrap();
        let expected = moments(&expected);
        assert!(found.square.iter().zip(&expected.square).all(|(a, b)| (a - b).abs() < 1e-12));
        assert_eq!(found.largest, Some(4.0));
        // Other readings of the value stay as they are.
        let other = Rows::channels("x");
        assert_eq!(position_weights(3.0).gram(&other, gram(&all), |_| Ok(None)).unwrap(), gram(&all));
    }

    #[test]
    fn a_position_seen_in_few_samples_is_not_fitted_to_them() {
        // One sample, and a feature that is zero in it.
        let (all, one) = (gram(&[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 0.5]]), gram(&[[2.0, 0.0]]));
        let found = position_weights(1e4).gram(&Rows::last("x"), all, |_| Ok(Some(one.clone()))).unwrap();
        let (first, second) = (found.matrix.get(0, 0), found.matrix.get(1, 1));
        assert!(second > 0.1 * first, "{found:?}");
        // Still moments that rows could have: none of their covariance is negative.
        let of = |i: usize, j: usize| found.matrix.get(i, j) - found.mean[i] * found.mean[j];
        assert!(of(0, 0) > 0.0 && of(0, 0) * of(1, 1) - of(0, 1).powi(2) > 0.0, "{found:?}");
    }
}
