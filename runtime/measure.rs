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
mod tests;
