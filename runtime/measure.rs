//! How much a candidate loses against its reference on a set: both are run batch by batch, and only sums are kept.

use crate::{
    Batch, Claim, Datum, LoadOptions, MetricError, RuntimeError, Sample, SampleSet, Session, SetError, Talk, Verdict,
    compare, elements,
    metrics::{
        Case, ChosenMetric, OutputInfo, OutputMeter, OutputPair, Refusal, Score, TokenMask, choose, token_inputs,
    },
    sessions::SessionStore,
    wire::MeasureJob,
};
use lathe_ir::{DataType, Model, ReadError, Tensor};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path, rc::Rc};

/// What one output came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The output.
    pub name: String,
    /// Every metric that can be measured on it, by its name.
    pub scores: BTreeMap<String, Score>,
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
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The engine cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The set does not fit or cannot be read to its end.
    #[error(transparent)]
    Set(#[from] SetError),
    /// There is nothing to measure on.
    #[error("the set has no samples")]
    Empty,
    /// The metric says nothing about this model or set.
    #[error(transparent)]
    Metric(#[from] MetricError),
    /// A batch is not what the metric needs.
    #[error("{0}")]
    Batch(Refusal),
    /// Nothing is left to measure.
    #[error("{0} cannot be measured: every element is left out")]
    Nothing(&'static str),
}

/// Measures two files on a set; what a worker does.
pub(crate) fn serve(
    sessions: &SessionStore<'_>,
    job: &MeasureJob,
    talk: &mut dyn Talk,
) -> Result<Result<Measured, Verdict>, MeasureError> {
    talk.stage("reading the models");
    let model = Model::read(&job.reference)?.model;
    let other = Model::read(&job.candidate)?.model.renamed();
    // A note that the original has too is about what it was made of itself.
    let renamed = if other == model.renamed() { Renamed::new() } else { other };
    talk.stage("opening the set");
    let set = SampleSet::open(&job.set, &model)?;
    let measurement = Measurement {
        sessions,
        model: &model,
        reference: &job.reference,
        candidate: &job.candidate,
        renamed,
        metric: &job.metric,
        // As the models will run where they are used.
        options: LoadOptions { optimize: true, ..job.options.clone() },
        total: set.len(),
    };
    measurement.run(&mut set.batches(), talk)
}

/// Two models, and what is measured on them.
struct Measurement<'a> {
    sessions: &'a SessionStore<'a>,
    /// The reference as read.
    model: &'a Model,
    reference: &'a Path,
    candidate: &'a Path,
    /// Inputs and outputs of the reference that the candidate has not under their names.
    renamed: Renamed,
    /// The name of a metric, or `auto`.
    metric: &'a str,
    options: LoadOptions,
    /// Samples of the set.
    total: usize,
}

impl Measurement<'_> {
    /// Runs both models on every batch and measures the metric.
    ///
    /// The reference is run twice on the first batch, and not at all where its outputs are known. A model that does not run is a [`Verdict`]. `talk` hears of every
    /// batch: `samples 8 to 15 of 64`.
    fn run(
        &self,
        batches: &mut dyn Iterator<Item = Result<Batch, SetError>>,
        talk: &mut dyn Talk,
    ) -> Result<Result<Measured, Verdict>, MeasureError> {
        talk.stage("loading the original");
        let mut original = match self.sessions.load(self.reference, &self.options) {
            Ok(session) => session,
            Err(RuntimeError::Load { message, .. }) => {
                return Ok(Err(Verdict::ReferenceRefused { message, tried: Vec::new() }));
            }
            Err(error) => return Err(error.into()),
        };
        talk.stage("loading the result");
        let mut result = match self.sessions.load(self.candidate, &self.options) {
            Ok(session) => session,
            Err(RuntimeError::Load { message, .. }) => {
                return Ok(Err(Verdict::CandidateRefused { message, sizes: String::new() }));
            }
            Err(error) => return Err(error.into()),
        };
        let renamed = &self.renamed;
        let mut state: Option<State> = None;
        let mut samples = 0;
        for batch in batches {
            let batch = batch?;
            let range = format!("samples {samples} to {} of {}", samples + batch.samples.max(1) - 1, self.total);
            talk.stage(&range);
            let before = match original.known(&batch.inputs) {
                Some(known) => known,
                None => {
                    let outputs = match original.run(&batch.inputs) {
                        Ok(outputs) => Rc::new(outputs),
                        Err(error) => {
                            let message = error.to_string();
                            return Ok(Err(Verdict::ReferenceRefused { message, tried: vec![range] }));
                        }
                    };
                    if state.is_none()
                        && let Some(verdict) = repeat(&mut original, &batch.inputs, &outputs, &self.options)
                    {
                        return Ok(Err(verdict));
                    }
                    original.remember(&batch.inputs, &outputs);
                    outputs
                }
            };
            let before: Vec<(String, Datum)> =
                before.iter().filter(|(name, _)| renamed.get(name) != Some(&None)).cloned().collect();
            if state.is_none() {
                let mut probe =
                    |output: &OutputInfo<'_>| is_causal(&mut original, &batch.inputs, &before, output).unwrap_or(false);
                state = Some(self.start(&batch, &before, &mut probe)?);
            }
            let after: Vec<(String, Datum)> = match result.run(&translated(&batch.inputs, renamed)) {
                Ok(outputs) => outputs.into_iter().map(|(name, datum)| (original_name(name, renamed), datum)).collect(),
                Err(error) => return Ok(Err(Verdict::CandidateRefused { message: error.to_string(), sizes: range })),
            };
            let state = state.as_mut().expect("made in the first round");
            state.add(&batch, samples, &before, &after)?;
            samples += batch.samples;
            talk.progress(samples, self.total, "samples");
            // A candidate whose outputs have another shape stays wrong on every further batch.
            if !state.failures.is_empty() {
                break;
            }
        }
        state.ok_or(MeasureError::Empty)?.finish(samples, self.sessions.engine().name()).map(Ok)
    }

    /// Chooses the metric by the first batch, and starts to measure every output.
    fn start(
        &self,
        batch: &Batch,
        outputs: &[(String, Datum)],
        is_causal: &mut dyn FnMut(&OutputInfo<'_>) -> bool,
    ) -> Result<State, MeasureError> {
        let graph = &self.model.graph;
        let tokens = token_inputs(graph, &batch.inputs);
        let labels = batch.labels.as_ref();
        let numbers = |(name, datum): &'_ (String, Datum)| -> Option<(String, Tensor)> {
            numbers_in(datum)?.first().map(|&tensor| (name.clone(), tensor.clone()))
        };
        let tensors: Vec<(String, Tensor)> = outputs.iter().filter_map(numbers).collect();
        let info: Vec<OutputInfo<'_>> = tensors
            .iter()
            .map(|(name, t)| OutputInfo { name, dtype: t.dtype(), dims: t.dims(), labels, tokens })
            .collect();
        let mut case = Case { graph, outputs: &info, samples: self.total, is_causal };
        let chosen = choose(self.metric, &mut case)?;
        let meter = |output: &OutputInfo<'_>| {
            let single: Vec<&'static str> =
                chosen.outputs.iter().filter(|o| *o == output.name).map(|_| chosen.metric).collect();
            OutputMeter::new(output, &single)
        };
        let meters: Vec<OutputMeter> = info.iter().map(meter).collect();
        let is_other = |(name, _): &&(String, Datum)| !tensors.iter().any(|(n, _)| n == name);
        let others = outputs.iter().filter(is_other).map(|(name, _)| name.clone()).collect();
        let ids = tokens.map(|tokens| tokens.ids.to_owned());
        let mask = tokens.and_then(|tokens| tokens.mask).map(str::to_owned);
        Ok(State { chosen, ids, mask, meters, others, failures: Vec::new() })
    }
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

/// Whether changing the last token of every sequence leaves the logits before it as they are; `None` where that cannot be
/// found out.
fn is_causal(
    session: &mut dyn Session,
    inputs: &Sample,
    outputs: &[(String, Datum)],
    output: &OutputInfo<'_>,
) -> Option<bool> {
    let input = |name: &str| inputs.iter().position(|(n, _)| n == name);
    let (tokens, &[_, length, vocabulary]) = (output.tokens?, output.dims) else { return None };
    let at = input(tokens.ids)?;
    let tensor = &inputs[at].1;
    let mut ids = tensor.to_f64s().filter(|_| tensor.dims() == &output.dims[..2])?;
    let outside = |id: &f64| *id >= vocabulary as f64 || *id < -(tokens.vocabulary.unwrap_or(vocabulary) as f64);
    if length == 0 || ids.iter().any(outside) {
        return None;
    }
    let mask = tokens.mask.and_then(input).and_then(|at| TokenMask::of(&inputs[at].1));
    let mut compared = vec![true; ids.len()];
    if let Some(mask) = mask.filter(|mask| mask.flags.len() == ids.len()) {
        compared = mask.flags;
    }
    for (sequence, compared) in ids.chunks_mut(length).zip(compared.chunks_mut(length)) {
        let last = compared.iter().rposition(|&kept| kept).unwrap_or(0);
        // Towards zero, where there is another token on either side.
        sequence[last] -= if sequence[last] == 0.0 { -1.0 } else { sequence[last].signum() };
        // Only positions before the changed one are compared.
        compared[last..].fill(false);
    }
    if !compared.contains(&true) {
        return None;
    }
    let mut changed = inputs.clone();
    changed[at].1 = Tensor::from_f64s(tensor.dtype(), tensor.dims(), &ids)?;
    // Another token may be one that the model cannot take.
    let again = session.run(&changed).ok()?;
    let find =
        |all: &[(String, Datum)]| all.iter().find(|(n, _)| n == output.name).and_then(|(_, d)| d.tensor().cloned());
    let (before, after) = (find(outputs)?, find(&again)?);
    if before.dims() != after.dims() {
        return None;
    }
    let (mut difference, mut total) = (0.0, 0.0);
    elements::rows(
        &before,
        &after,
        vocabulary.max(1),
        |row| compared[row],
        |_, a, b| {
            for (x, y) in a.iter().zip(b).filter(|(x, y)| x.is_finite() && y.is_finite()) {
                difference += (x - y) * (x - y);
                total += x * x;
            }
        },
    );
    // Rounding may differ where another token takes another path through a kernel.
    Some(difference <= total * 1e-10)
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
    chosen: ChosenMetric,
    ids: Option<String>,
    mask: Option<String>,
    meters: Vec<OutputMeter>,
    /// Outputs that are not made of numbers; they must be equal.
    others: Vec<String>,
    failures: Vec<String>,
}

impl State {
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
        let kept = input(&self.mask).and_then(TokenMask::of);
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
                        let pair = OutputPair { name, reference, candidate, first, samples, labels, ids, kept };
                        meter.add(&pair).map_err(MeasureError::Batch)?;
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
            let compared = compare(&pick(before), &pick(after), Claim::Equivalent { rtol: None });
            self.failures.extend(compared.faults.into_iter().map(|f| format!("{f}, in samples from {first} on")));
        }
        Ok(())
    }

    fn finish(self, samples: usize, engine: String) -> Result<Measured, MeasureError> {
        let State { chosen, meters, mut failures, .. } = self;
        let broken = !failures.is_empty();
        failures.extend(meters.iter().flat_map(OutputMeter::failures));
        let notes = meters.iter().flat_map(OutputMeter::notes).collect();
        let scores = |meter: &OutputMeter| -> BTreeMap<String, Score> {
            meter.scores().into_iter().map(|(metric, score)| (metric.to_owned(), score)).collect()
        };
        let outputs: Vec<Scores> =
            meters.iter().map(|meter| Scores { name: meter.name.clone(), scores: scores(meter) }).collect();
        let counted = outputs.iter().filter(|o| chosen.outputs.contains(&o.name));
        let counted = counted.filter_map(|o| o.scores.get(chosen.metric));
        let worst = counted.reduce(|worst, next| if next.drop > worst.drop { next } else { worst });
        let worst = match worst.cloned() {
            // What could not be compared counts as lost, however well the rest did.
            _ if broken => Score::unmeasured(),
            Some(score) => score,
            None => return Err(MeasureError::Nothing(chosen.metric)),
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

    fn stacks(inputs: &[(&str, Tensor)], labels: Option<Tensor>, samples: usize) -> Vec<Result<Batch, SetError>> {
        let inputs = inputs.iter().map(|(name, t)| ((*name).to_owned(), t.clone())).collect();
        vec![Ok(Batch { inputs, labels, samples, first: 0 })]
    }

    fn run(a: &Model, b: &Model, stacks: Vec<Result<Batch, SetError>>, metric: &str) -> Result<Measured, String> {
        measured(&SessionStore::new(engine(), 1 << 20), [a, b], stacks, metric)
    }

    fn measured(
        sessions: &SessionStore<'_>,
        [a, b]: [&Model; 2],
        stacks: Vec<Result<Batch, SetError>>,
        metric: &str,
    ) -> Result<Measured, String> {
        let total = stacks.iter().flatten().map(|s| s.samples).sum();
        let folder = tempfile::tempdir().unwrap();
        let [x, y] = ["a.onnx", "b.onnx"].map(|name| folder.path().join(name));
        std::fs::write(&x, a.to_bytes()).unwrap();
        std::fs::write(&y, b.to_bytes()).unwrap();
        let measurement = Measurement {
            sessions,
            model: a,
            reference: &x,
            candidate: &y,
            renamed: Renamed::new(),
            metric,
            options: LoadOptions { threads: 1, ..LoadOptions::default() },
            total,
        };
        let found = measurement.run(&mut stacks.into_iter(), &mut |_: &str| {});
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

    #[test]
    fn an_original_whose_outputs_are_known_gives_the_same_measurement() {
        let sessions = SessionStore::new(engine(), 1 << 20);
        let model = linear(&[1.0, 2.0, -1.0, 0.5]);
        let set = || {
            let rows = |at: f32| Tensor::from_f32s(&[2, 2], &[at, 1.0, -1.0, at]);
            [0.5, 2.0].map(|at| stacks(&[("x", rows(at))], None, 2)).into_iter().flatten().collect()
        };
        let found = [0.25, 0.0, 0.25].map(|w| {
            let other = linear(&[1.0, 2.0, -1.0, w]);
            measured(&sessions, [&model, &other], set(), "rel-l2").unwrap()
        });
        assert_eq!(found[0], found[2]);
        assert_ne!(found[0].drop, found[1].drop);
        assert_eq!(found[0], run(&model, &linear(&[1.0, 2.0, -1.0, 0.25]), set(), "rel-l2").unwrap());
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
        let names: Vec<&String> = whole.outputs[0].scores.keys().collect();
        assert_eq!(names, ["accuracy", "cosine", "kl", "max-abs", "rel-l2", "snr", "top1"]);
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
