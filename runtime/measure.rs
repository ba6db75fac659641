//! How much a candidate loses against its reference on a set: both are run batch by batch, and only sums are kept.

use crate::{
    Batch, Claim, Datum, Engine, LoadOptions, RuntimeError, Sample, SampleSet, Session, SetSpec, Source, Talk, Verdict,
    compare,
    metrics::{Chosen, Kept, OutputMeter, Pair, Place, Score, choose, token_inputs},
};
use lathe_ir::{DataType, Model, Tensor};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// What one output came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The output.
    pub name: String,
    /// Every metric that can be measured on it.
    pub scores: Vec<Score>,
}

/// What two models came to on a set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The metric that counts.
    pub metric: String,
    /// Why that one, where it was chosen automatically.
    pub why: Option<String>,
    /// How many samples were run.
    pub samples: usize,
    /// The metric of the reference.
    #[serde(with = "crate::json_float")]
    pub before: f64,
    /// The metric of the candidate, of the output where it is worst.
    #[serde(with = "crate::json_float")]
    pub after: f64,
    /// How much is lost; positive is worse.
    #[serde(with = "crate::json_float")]
    pub drop: f64,
    /// What the numbers are made of.
    pub detail: Option<String>,
    /// Every output.
    pub outputs: Vec<Scores>,
    /// What makes the candidate unusable whatever the metric says; empty if nothing does.
    pub failures: Vec<String>,
    /// What a reader should know about the numbers.
    pub notes: Vec<String>,
    /// Who ran the models.
    pub engine: String,
}

/// Why nothing could be measured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeasureError {
    /// The engine cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The set cannot be read to its end.
    #[error("{0}")]
    Set(String),
    /// The metric says nothing about this model or set.
    #[error("{0}")]
    Metric(String),
}

/// [`measure`] on two files and a set that is opened here.
pub(crate) fn measure_files(
    engine: &dyn Engine,
    reference: &Path,
    candidate: &Path,
    set: &SetSpec,
    metric: &str,
    options: &LoadOptions,
    talk: &mut dyn Talk,
) -> Result<Result<Measured, Verdict>, String> {
    talk.stage("reading the models");
    let model = Model::read(reference).map_err(|e| e.to_string())?.model;
    let other = Model::read(candidate).map_err(|e| e.to_string())?.model.renamed();
    // A note that the original has too is about what it was made of itself.
    let renamed = if other == model.renamed() { Renamed::new() } else { other };
    talk.stage("opening the set");
    let set = SampleSet::open(set, &model).map_err(|e| e.to_string())?;
    let mut batches = set.batches().map(|batch| batch.map_err(|e| e.to_string()));
    let (reference, candidate) = (Source::Path(reference), Source::Path(candidate));
    let found = measure(engine, &model, reference, candidate, &mut batches, set.len(), metric, &renamed, options, talk);
    found.map_err(|e| e.to_string())
}

/// Runs both models on every batch and measures `metric` (or what `auto` finds).
///
/// `model` is the reference as read; `renamed` are its inputs and outputs that the candidate has not under their names.
/// The reference is run twice on the first batch. A model that does not run is a [`Verdict`]. `talk` hears of every batch: `samples 8 to 15 of 64`.
#[allow(clippy::too_many_arguments)] // Two models, what to run them on, what to measure, and how.
pub(crate) fn measure(
    engine: &dyn Engine,
    model: &Model,
    reference: Source<'_>,
    candidate: Source<'_>,
    batches: &mut dyn Iterator<Item = Result<Batch, String>>,
    total: usize,
    metric: &str,
    renamed: &Renamed,
    options: &LoadOptions,
    talk: &mut dyn Talk,
) -> Result<Result<Measured, Verdict>, MeasureError> {
    let options = LoadOptions { optimize: false, ..options.clone() };
    talk.stage("loading the original");
    let mut original = match engine.load(reference, &options) {
        Ok(session) => session,
        Err(RuntimeError::Load { message, .. }) => {
            return Ok(Err(Verdict::ReferenceRefused { message, tried: Vec::new() }));
        }
        Err(error) => return Err(error.into()),
    };
    talk.stage("loading the result");
    let mut result = match engine.load(candidate, &options) {
        Ok(session) => session,
        Err(RuntimeError::Load { message, .. }) => {
            return Ok(Err(Verdict::CandidateRefused { message, sizes: String::new() }));
        }
        Err(error) => return Err(error.into()),
    };
    let mut state: Option<State> = None;
    let mut samples = 0;
    for batch in batches {
        let batch = batch.map_err(MeasureError::Set)?;
        let range = format!("samples {samples} to {} of {total}", samples + batch.samples.max(1) - 1);
        talk.stage(&range);
        let before: Vec<(String, Datum)> = match original.run(&batch.inputs) {
            Ok(outputs) => outputs.into_iter().filter(|(name, _)| renamed.get(name) != Some(&None)).collect(),
            Err(error) => {
                let message = error.to_string();
                return Ok(Err(Verdict::ReferenceRefused { message, tried: vec![range] }));
            }
        };
        if state.is_none() {
            if let Some(verdict) = repeat(original.as_mut(), &batch.inputs, &before, &options) {
                return Ok(Err(verdict));
            }
            let mut probe = |place: &Place<'_>| is_causal(original.as_mut(), &batch.inputs, &before, place);
            state = Some(State::new(model, &batch, &before, total, metric, &mut probe)?);
        }
        let after: Vec<(String, Datum)> = match result.run(&translated(&batch.inputs, renamed)) {
            Ok(outputs) => outputs.into_iter().map(|(name, datum)| (original_name(name, renamed), datum)).collect(),
            Err(error) => return Ok(Err(Verdict::CandidateRefused { message: error.to_string(), sizes: range })),
        };
        let state = state.as_mut().expect("made in the first round");
        state.add(&batch, samples, &before, &after)?;
        samples += batch.samples;
        talk.progress(samples, total, "samples");
        // A candidate whose outputs have another shape stays wrong on every further batch.
        if !state.failures.is_empty() {
            break;
        }
    }
    let state = state.ok_or_else(|| MeasureError::Set("the set has no samples".to_owned()))?;
    state.finish(samples, engine.name()).map(Ok)
}

/// Names of a model's inputs and outputs in another one, as [`Model::renamed`] gives them.
type Renamed = BTreeMap<String, Option<String>>;

/// Inputs under their other names, without those that are gone.
fn translated(inputs: &Sample, renamed: &Renamed) -> Sample {
    let other = |(name, tensor): &(String, Tensor)| {
        let name = renamed.get(name).map_or(Some(name), Option::as_ref)?;
        Some((name.clone(), tensor.clone()))
    };
    inputs.iter().filter_map(other).collect()
}

fn original_name(name: String, renamed: &Renamed) -> String {
    let old = renamed.iter().find(|(_, new)| new.as_ref() == Some(&name));
    old.map_or(name, |(old, _)| old.clone())
}

/// Runs the reference once more; a verdict if it disagrees with itself.
fn repeat(
    session: &mut dyn Session,
    inputs: &Sample,
    outputs: &[(String, Datum)],
    options: &LoadOptions,
) -> Option<Verdict> {
    // Devices other than the processor add in whatever order their threads finish.
    let claim = if options.provider == "cpu" { Claim::Identical } else { Claim::Equivalent { rtol: None } };
    let known = |(name, _): &(String, Datum)| outputs.iter().any(|(n, _)| n == name);
    let failures = match session.run(inputs).map(|again| again.into_iter().filter(known).collect::<Vec<_>>()) {
        Ok(again) => compare(outputs, &again, claim).faults.iter().map(ToString::to_string).collect(),
        Err(error) => vec![error.to_string()],
    };
    (!failures.is_empty()).then_some(Verdict::Nondeterministic { failures })
}

/// Whether changing the last token of every sequence leaves the logits before it as they are.
fn is_causal(
    session: &mut dyn Session,
    inputs: &Sample,
    outputs: &[(String, Datum)],
    place: &Place<'_>,
) -> Result<bool, String> {
    let input = |name: &str| inputs.iter().position(|(n, _)| n == name);
    let (Some(tokens), &[_, length, vocabulary]) = (place.tokens, place.dims) else { return Ok(false) };
    let Some(at) = input(tokens.ids) else { return Ok(false) };
    let tensor = &inputs[at].1;
    let Some(mut ids) = tensor.to_f64s().filter(|_| tensor.dims() == &place.dims[..2]) else { return Ok(false) };
    let outside = |id: &f64| *id >= vocabulary as f64 || *id < -(tokens.vocabulary.unwrap_or(vocabulary) as f64);
    if length == 0 || ids.iter().any(outside) {
        return Ok(false);
    }
    let kept = tokens.mask.and_then(input).and_then(|at| Kept::of(&inputs[at].1));
    let mut flags = vec![true; ids.len()];
    if let Some(kept) = kept.filter(|k| k.flags.len() == ids.len()) {
        flags = kept.flags;
    }
    let (sequences, ends) = (ids.chunks_mut(length), flags.chunks_mut(length));
    for (sequence, flags) in sequences.zip(ends) {
        let last = flags.iter().rposition(|&kept| kept).unwrap_or(0);
        // Towards zero, where there is another token on either side.
        sequence[last] -= if sequence[last] == 0.0 { -1.0 } else { sequence[last].signum() };
        // Only positions before the changed one are compared.
        flags[last..].fill(false);
    }
    if !flags.contains(&true) {
        return Ok(false);
    }
    let Some(ids) = Tensor::from_f64s(tensor.dtype(), tensor.dims(), &ids) else { return Ok(false) };
    let mut changed = inputs.clone();
    changed[at].1 = ids;
    // Another token may be one that the model cannot take.
    let Ok(again) = session.run(&changed) else { return Ok(false) };
    let find =
        |all: &[(String, Datum)]| all.iter().find(|(n, _)| n == place.name).and_then(|(_, d)| d.tensor().cloned());
    let (Some(before), Some(after)) = (find(outputs), find(&again)) else { return Ok(false) };
    if before.dims() != after.dims() {
        return Ok(false);
    }
    let (mut difference, mut total) = (0.0, 0.0);
    let (reference, candidate, name) = (&before, &after, place.name);
    let pair = Pair { name, reference, candidate, first: 0, samples: 1, labels: None, ids: None, kept: None };
    pair.rows(|start, a, b| {
        if flags[start / vocabulary] {
            for (x, y) in a.iter().zip(b).filter(|(x, y)| x.is_finite() && y.is_finite()) {
                difference += (x - y) * (x - y);
                total += x * x;
            }
        }
    });
    // Rounding may differ where another token takes another path through a kernel.
    Ok(difference <= total * 1e-10)
}

/// The tensors of numbers that an output is, or is made of; `None` where there is something else in it.
fn numbers_in(datum: &Datum) -> Option<Vec<&Tensor>> {
    match datum {
        Datum::Tensor(tensor) => is_number(tensor.dtype()).then(|| vec![tensor]),
        Datum::Sequence(members) => Some(members.iter().map(numbers_in).collect::<Option<Vec<_>>>()?.concat()),
        Datum::Map { values, .. } => is_number(values.dtype()).then(|| vec![values]),
        Datum::None => None,
    }
}

/// Whether two outputs are of the same types and sizes, with the same keys.
fn is_alike(a: &Datum, b: &Datum) -> bool {
    match (a, b) {
        (Datum::Tensor(a), Datum::Tensor(b)) => a.dims() == b.dims() && a.dtype() == b.dtype(),
        (Datum::Sequence(a), Datum::Sequence(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_alike(a, b)),
        (Datum::Map { keys: a, values: x }, Datum::Map { keys: b, values: y }) => {
            a.same_bits(b) && x.dims() == y.dims() && x.dtype() == y.dtype()
        }
        _ => false,
    }
}

/// What is kept from batch to batch.
struct State {
    chosen: Chosen,
    ids: Option<String>,
    mask: Option<String>,
    meters: Vec<OutputMeter>,
    /// Outputs that are not made of numbers; they must be equal.
    others: Vec<String>,
    failures: Vec<String>,
}

impl State {
    fn new(
        model: &Model,
        batch: &Batch,
        outputs: &[(String, Datum)],
        total: usize,
        metric: &str,
        causal: &mut dyn FnMut(&Place<'_>) -> Result<bool, String>,
    ) -> Result<State, MeasureError> {
        let tokens = token_inputs(&model.graph, &batch.inputs);
        let labels = batch.labels.as_ref();
        let place = |(name, datum): &'_ (String, Datum)| -> Option<(String, Tensor)> {
            numbers_in(datum)?.first().map(|&tensor| (name.clone(), tensor.clone()))
        };
        let tensors: Vec<(String, Tensor)> = outputs.iter().filter_map(place).collect();
        let places: Vec<Place<'_>> =
            tensors.iter().map(|(name, t)| Place { name, dtype: t.dtype(), dims: t.dims(), labels, tokens }).collect();
        let chosen = choose(metric, &model.graph, &places, total, causal).map_err(MeasureError::Metric)?;
        let meter = |place: &Place<'_>| {
            let single: Vec<&'static str> =
                chosen.outputs.iter().filter(|o| *o == place.name).map(|_| chosen.metric).collect();
            OutputMeter::new(place, &single)
        };
        let meters: Vec<OutputMeter> = places.iter().map(meter).collect();
        let is_other = |(name, _): &&(String, Datum)| !tensors.iter().any(|(n, _)| n == name);
        let others = outputs.iter().filter(is_other).map(|(name, _)| name.clone()).collect();
        let ids = tokens.map(|tokens| tokens.ids.to_owned());
        let mask = tokens.and_then(|tokens| tokens.mask).map(str::to_owned);
        Ok(State { chosen, ids, mask, meters, others, failures: Vec::new() })
    }

    fn add(
        &mut self,
        batch: &Batch,
        first: usize,
        before: &[(String, Datum)],
        after: &[(String, Datum)],
    ) -> Result<(), MeasureError> {
        let input = |name: &Option<String>| {
            batch.inputs.iter().find(|(n, _)| Some(n) == name.as_ref()).map(|(_, tensor)| tensor)
        };
        let ids = input(&self.ids);
        let kept = input(&self.mask).and_then(Kept::of);
        let (samples, labels, kept) = (batch.samples, batch.labels.as_ref(), kept.as_ref());
        let find = |all: &'_ [(String, Datum)], name: &str| all.iter().position(|(n, _)| n == name);
        for meter in &mut self.meters {
            let name = meter.name.clone();
            let (Some(a), Some(b)) = (find(before, &name), find(after, &name)) else {
                self.failures.push(format!("output `{name}` is missing"));
                continue;
            };
            let (a, b) = (&before[a].1, &after[b].1);
            match (numbers_in(a), numbers_in(b)) {
                (Some(references), Some(candidates)) if is_alike(a, b) => {
                    for (reference, candidate) in references.into_iter().zip(candidates) {
                        let name = &name;
                        let pair = Pair { name, reference, candidate, first, samples, labels, ids, kept };
                        meter.add(&pair).map_err(MeasureError::Metric)?;
                    }
                }
                _ => self.failures.push(format!(
                    "output `{name}` of samples from {first} on: expected {}, found {}",
                    a.describe(),
                    b.describe()
                )),
            }
        }
        for name in &self.others {
            let pick = |all: &[(String, Datum)]| -> Vec<(String, Datum)> {
                find(all, name).map(|at| all[at].clone()).into_iter().collect()
            };
            let found = compare(&pick(before), &pick(after), Claim::Equivalent { rtol: None });
            self.failures.extend(found.faults.into_iter().map(|f| format!("{f}, in samples from {first} on")));
        }
        Ok(())
    }

    fn finish(self, samples: usize, engine: String) -> Result<Measured, MeasureError> {
        let State { chosen, meters, mut failures, .. } = self;
        let broken = !failures.is_empty();
        failures.extend(meters.iter().flat_map(OutputMeter::failures));
        let notes = meters.iter().flat_map(OutputMeter::notes).collect();
        let outputs: Vec<Scores> = meters.iter().map(|m| Scores { name: m.name.clone(), scores: m.scores() }).collect();
        let counted = outputs.iter().filter(|o| chosen.outputs.contains(&o.name));
        let scores = counted.flat_map(|o| o.scores.iter().filter(|s| s.metric == chosen.metric));
        let worst = scores.reduce(|worst, next| if next.drop > worst.drop { next } else { worst });
        let worst = match worst.cloned() {
            // What could not be compared counts as lost, however well the rest did.
            _ if broken => Score::unmeasured(chosen.metric),
            Some(score) => score,
            None => {
                let message = format!("{} cannot be measured: every element is left out", chosen.metric);
                return Err(MeasureError::Metric(message));
            }
        };
        Ok(Measured {
            metric: chosen.metric.to_owned(),
            why: chosen.why,
            samples,
            before: worst.before,
            after: worst.after,
            drop: worst.drop,
            detail: worst.detail,
            outputs,
            failures,
            notes,
            engine,
        })
    }
}

fn is_number(dtype: DataType) -> bool {
    !matches!(dtype, DataType::String | DataType::Complex64 | DataType::Complex128)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Build, engine};
    use lathe_ir::{DataType, Node, Type};

    fn stacks(inputs: &[(&str, Tensor)], labels: Option<Tensor>, samples: usize) -> Vec<Result<Batch, String>> {
        let inputs = inputs.iter().map(|(name, t)| ((*name).to_owned(), t.clone())).collect();
        vec![Ok(Batch { inputs, labels, samples, first: 0 })]
    }

    fn run(a: &Model, b: &Model, stacks: Vec<Result<Batch, String>>, metric: &str) -> Result<Measured, String> {
        let total = stacks.iter().flatten().map(|s| s.samples).sum();
        let (x, y) = (a.to_bytes(), b.to_bytes());
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let (x, y) = (Source::Bytes(&x), Source::Bytes(&y));
        let found = measure(
            engine(),
            a,
            x,
            y,
            &mut stacks.into_iter(),
            total,
            metric,
            &Renamed::new(),
            &options,
            &mut |_: &str| {},
        );
        found.map_err(|e| e.to_string())?.map_err(|verdict| verdict.describe())
    }

    /// `y = x · w + b`, one row of `w` per input.
    fn linear(weights: &[f32]) -> Model {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "2"]);
        let w = build.constant("w", Tensor::from_f32s(&[2, weights.len() / 2], weights));
        let y = build.node(Node::new("MatMul"), &[x, w], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    /// Logits for each token are a row of a table; with `look` every position adds the last token's row.
    fn language(table: &[f32], look: bool) -> Model {
        let mut build = Build::new();
        let ids = build.input("ids", DataType::Int64, &["n", "s"]);
        build.input("attention_mask", DataType::Int64, &["n", "s"]);
        let table = build.constant("table", Tensor::from_f32s(&[3, 3], table));
        let mut y = build.node(Node::new("Gather"), &[table, ids], "rows");
        if look {
            let last = build.constant("last", Tensor::int64s(&[-1]));
            let end = build.node(Node::new("Gather").with("axis", 1), &[y, last], "end");
            y = build.node(Node::new("Add"), &[y, end], "sum");
        }
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    #[test]
    fn batches_of_any_size_give_the_same() {
        let (a, b) = (linear(&[1.0, 0.0, 0.0, 1.0]), linear(&[1.0, 0.0, 0.0, 0.5]));
        let rows: Vec<f32> = (0..12).map(|i| (i * 7 % 5) as f32).collect();
        let labels = [0, 1, 1, 0, 1, 0];
        let part = |range: std::ops::Range<usize>| {
            let x = Tensor::from_f32s(&[range.len(), 2], &rows[range.start * 2..range.end * 2]);
            let labels = Tensor::int64s(&labels[range.clone()]);
            Ok(Batch {
                inputs: vec![("x".to_owned(), x)],
                labels: Some(labels),
                samples: range.len(),
                first: range.start,
            })
        };
        let whole = run(&a, &b, vec![part(0..6)], "auto").unwrap();
        let parts = run(&a, &b, vec![part(0..4), part(4..5), part(5..6)], "auto").unwrap();
        assert_eq!((&whole, whole.metric.as_str()), (&parts, "accuracy"));
        assert_eq!(whole.detail.as_deref(), Some("1 of 6 labels before, 2 after"));
        assert_eq!(whole.drop, -1.0 / 6.0);
        let names: Vec<&str> = whole.outputs[0].scores.iter().map(|s| s.metric.as_str()).collect();
        assert_eq!(names, ["max-abs", "rel-l2", "cosine", "snr", "kl", "top1", "accuracy"]);
    }

    #[test]
    fn a_causal_model_is_told_from_one_that_looks_ahead() {
        let table = [1.0, 2.0, 0.0, 0.5, -1.0, 3.0, 0.0, 0.0, 0.0];
        let ids = Tensor::from_i64s(&[2, 4], &[0, 1, 2, 0, 2, 1, 0, 0]);
        let mask = Tensor::from_i64s(&[2, 4], &[1, 1, 1, 1, 1, 1, 0, 0]);
        let set = || stacks(&[("ids", ids.clone()), ("attention_mask", mask.clone())], None, 2);
        let causal = language(&table, false);
        let found = run(&causal, &causal, set(), "auto").unwrap();
        assert_eq!((found.metric.as_str(), found.drop), ("perplexity", 0.0));
        assert_eq!(found.detail.as_deref(), Some("4 tokens predicted, 2 of padding left out"));
        let ahead = language(&table, true);
        assert_eq!(run(&ahead, &ahead, set(), "auto").unwrap().metric, "rel-l2");
    }

    #[test]
    fn a_nan_fails_whatever_the_metric_says() {
        let x = Tensor::from_f32s(&[2, 2], &[1.0, 0.0, 0.0, 1.0]);
        let set = stacks(&[("x", x)], None, 2);
        let found = run(&linear(&[1.0; 4]), &linear(&[1.0, 1.0, 1.0, f32::NAN]), set, "rel-l2").unwrap();
        assert!(found.failures[0].starts_with("output `y` has NaN in sample 0 where the original has 1"), "{found:?}");
    }

    #[test]
    fn other_shapes_and_refused_models_are_told_apart() {
        let set = || stacks(&[("x", Tensor::from_f32s(&[1, 2], &[1.0, 2.0]))], None, 1);
        let (two, three) = (linear(&[1.0; 4]), linear(&[1.0; 6]));
        let found = run(&two, &three, set(), "rel-l2").unwrap();
        assert_eq!(found.failures, ["output `y` of samples from 0 on: expected float[1, 2], found float[1, 3]"]);
        assert_eq!(found.drop, f64::INFINITY);
        let broken = crate::testing::unary(Node::new("NoSuchOperator"));
        assert!(
            run(&two, &broken, set(), "auto").unwrap_err().starts_with("the original runs but the result does not")
        );
        let noise = {
            let mut build = Build::new();
            let x = build.input("x", DataType::Float, &["n", "2"]);
            let y = build.node(Node::new("RandomNormalLike"), &[x], "y");
            build.output(y, Type::unshaped(DataType::Float)).model()
        };
        assert!(run(&noise, &two, set(), "auto").unwrap_err().starts_with("the model disagrees with itself"));
        assert_eq!(run(&two, &two, Vec::new(), "auto").unwrap_err(), "the set has no samples");
    }

    #[test]
    fn members_of_sequences_and_values_of_maps_are_measured() {
        let source = |weights: &str, length: usize| {
            let members = vec!["y"; length].join(", ");
            let head = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 2] x) => (seq(float[n, 2]) z)";
            let body = format!("y = MatMul (x, w) z = SequenceConstruct ({members})");
            lathe_ir::text::parse(&format!("{head} <float[2, 2] w = {{{weights}}}> {{ {body} }}")).unwrap()
        };
        let rows = || stacks(&[("x", Tensor::from_f32s(&[2, 2], &[1.0, 0.0, 0.0, 1.0]))], None, 2);
        let found = run(&source("3, 0, 0, 4", 2), &source("3, 0, 0, 3", 2), rows(), "auto").unwrap();
        assert_eq!((found.metric.as_str(), found.drop, found.failures.len()), ("rel-l2", 0.2, 0));
        let found = run(&source("3, 0, 0, 4", 2), &source("3, 0, 0, 4", 3), rows(), "rel-l2").unwrap();
        assert!(found.failures[0].contains("expected a sequence of 2, found a sequence of 3"), "{:?}", found.failures);
        let map = |keys: &[i64], values: &[f32]| Datum::Map {
            keys: Tensor::int64s(keys),
            values: Tensor::from_f32s(&[values.len()], values),
        };
        assert!(is_alike(&map(&[1, 2], &[0.5, 0.5]), &map(&[1, 2], &[0.4, 0.6])));
        assert!(!is_alike(&map(&[1, 2], &[0.5, 0.5]), &map(&[1, 3], &[0.5, 0.5])));
        assert_eq!(numbers_in(&Datum::Sequence(vec![map(&[1], &[0.5]), map(&[2], &[0.5])])).unwrap().len(), 2);
        assert!(numbers_in(&Datum::Sequence(vec![Datum::None])).is_none());
    }
}
