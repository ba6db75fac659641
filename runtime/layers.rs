//! Two models compared value by value, in the order in which they are computed: where do they part, and which node is it?
//!
//! Every value that both models name is made an output, as many at a time as memory allows. Values drift apart a little at
//! every node, so the first one beyond its bound need not be of the node that is wrong: nodes whose inputs are still good
//! are run alone, on the reference's own inputs.

mod alone;
mod tapped;

use self::{
    alone::run_alone,
    tapped::{Tapped, run_tapped, shapes_of},
};
use crate::{
    Claim, Datum, Engine, InputError, InputSpec, LoadOptions, RuntimeError, Sample, SampleSet, SetError, SetSpec,
    Source, Talk, compare, default_rtol,
    inputs::{Estimate, generate, sizes_to_try},
    seeding,
};
use lathe_analysis::Facts;
use lathe_ir::{DataType, Model, NodeId, Origin, ReadError, ScopeId, Tensor, ValueId};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

/// Nodes that are run alone, the first ones whose output is beyond its bound while their inputs are not.
const MOST_ALONE: usize = 16;

/// Two models to compare value by value.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayersJob {
    /// The reference.
    pub reference: PathBuf,
    /// The candidate; it may be the same file.
    pub candidate: PathBuf,
    /// A set whose first batch is run; without one inputs are random.
    pub set: Option<SetSpec>,
    /// How random inputs are made.
    pub inputs: InputSpec,
    /// The largest relative L2 error of a value; `None` takes [`default_rtol`] of its type.
    pub rtol: Option<f64>,
    /// Bytes that values of one model may take at a time.
    pub bytes: u64,
    /// How the reference is loaded.
    pub reference_options: LoadOptions,
    /// How the candidate is loaded.
    pub options: LoadOptions,
}

/// Why two models could not be compared value by value.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// A model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No inputs can be made.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The set cannot be read.
    #[error(transparent)]
    Set(#[from] SetError),
    /// A model does not run.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A model with more outputs cannot be written.
    #[error("a copy of the model with more outputs cannot be written to the temporary folder")]
    Copy,
    /// The reference accepts no sizes.
    #[error("the original cannot be run: {message}")]
    Refused {
        /// What the engine says.
        message: String,
    },
    /// There is nothing to compare.
    #[error("the two models have no value in common but their inputs, so there is nothing to compare layer by layer")]
    NothingCommon,
}

/// How far one value of the candidate is from the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValueLine {
    /// The value.
    pub value: String,
    /// The node of the candidate that computes it: "node `fc1` (Gemm)".
    pub node: String,
    /// Its sizes.
    pub dims: Vec<usize>,
    /// `‖candidate − reference‖ / ‖reference‖`; infinite where nothing numeric can be said.
    #[serde(with = "crate::json_float")]
    pub rel_l2: f64,
    /// The largest difference of two elements.
    #[serde(with = "crate::json_float")]
    pub max_abs: f64,
    /// The bound on `rel_l2`; `None` where everything has to be the same.
    pub limit: Option<f64>,
    /// Elements of the reference that are NaN or infinite.
    pub special_before: usize,
    /// Elements of the candidate that are NaN or infinite.
    pub special_after: usize,
    /// What is wrong with it; `None` where it is within its bound.
    pub fault: Option<String>,
}

/// What came of running a node alone on the reference's inputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alone {
    /// Its relative L2 error, and what is wrong with it, if anything is.
    Ran {
        /// The relative L2 error.
        #[serde(with = "crate::json_float")]
        rel_l2: f64,
        /// What is wrong.
        fault: Option<String>,
    },
    /// It could not be run alone, and why.
    NotRun(String),
}

/// A node whose output is beyond its bound while its inputs are not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Culprit {
    /// The node of the candidate: "node `fc1` (Gemm)".
    pub node: String,
    /// Its first output that is beyond its bound.
    pub value: String,
    /// What it does on the reference's inputs.
    pub alone: Alone,
}

impl Culprit {
    /// Whether the node itself computes something else.
    pub fn is_proven(&self) -> bool {
        matches!(&self.alone, Alone::Ran { fault: Some(_), .. })
    }
}

/// What a comparison value by value came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayersReport {
    /// Who ran the models.
    pub engine: String,
    /// What they were run on.
    pub inputs: String,
    /// Every value that was compared, in the order in which they are computed.
    pub values: Vec<ValueLine>,
    /// Values of the reference that were not compared, and why.
    pub left_out: Vec<String>,
    /// Nodes that were run alone, in their order, up to the first that is proven to be wrong.
    pub culprits: Vec<Culprit>,
}

impl LayersReport {
    /// The first value beyond its bound.
    pub fn first(&self) -> Option<&ValueLine> {
        self.values.iter().find(|line| line.fault.is_some())
    }

    /// The first value that holds NaN or infinities where the reference has fewer.
    pub fn first_special(&self) -> Option<&ValueLine> {
        self.values.iter().find(|line| line.special_after > line.special_before)
    }

    /// The node that is proven to compute something else.
    pub fn culprit(&self) -> Option<&Culprit> {
        self.culprits.iter().find(|culprit| culprit.is_proven())
    }
}

/// A value that both models compute.
#[derive(Debug, Clone)]
struct Common {
    name: String,
    /// Of the reference.
    before: ValueId,
    /// Of the candidate.
    after: ValueId,
    /// The node of the candidate.
    node: NodeId,
}

/// Both models and what they are run on.
struct Layers<'a> {
    engine: &'a dyn Engine,
    job: &'a LayersJob,
    reference: Model,
    candidate: Model,
    /// Types of values in both.
    facts: (Facts, Facts),
    sample: Sample,
}

/// Runs both models on one sample with all values that they have in common, and compares those.
pub fn compare_layers(engine: &dyn Engine, job: &LayersJob, talk: &mut dyn Talk) -> Result<LayersReport, LayersError> {
    let (mut reference, mut candidate) = (Model::read(&job.reference)?.model, Model::read(&job.candidate)?.model);
    let mut loose = BTreeSet::new();
    if seeding::has_random(&reference) {
        let seeded = seeding::seeded(&reference, &candidate);
        (reference, candidate, loose) = (seeded.reference, seeded.candidate, seeded.loose);
    }
    talk.stage("running the original");
    let (sample, inputs) = first_sample(engine, job, &reference)?;
    let facts = (Facts::infer(&reference), Facts::infer(&candidate));
    let layers = Layers { engine, job, reference, candidate, facts, sample };
    let mut report = LayersReport { engine: engine.name(), inputs, ..LayersReport::default() };
    let common = layers.common(&mut report.left_out);
    if common.is_empty() {
        return Err(LayersError::NothingCommon);
    }
    report.left_out.extend(loose.into_iter().map(|name| format!("`{name}`: it is random in one of the models only")));
    let (mut done, all) = (0, common.len());
    for part in layers.parts(common.clone(), talk)? {
        talk.stage(&format!("comparing values {} to {} of {all}", done + 1, done + part.len()));
        layers.compare(&part, &mut report.values)?;
        done += part.len();
        talk.progress(done, all, "values");
    }
    layers.accuse(&common, &mut report, talk)?;
    Ok(report)
}

/// The first batch of the set, or random inputs of the first sizes that the reference accepts.
fn first_sample(engine: &dyn Engine, job: &LayersJob, reference: &Model) -> Result<(Sample, String), LayersError> {
    if let Some(spec) = &job.set {
        let set = SampleSet::open(spec, reference)?;
        if let Some(batch) = set.batches().next() {
            let batch = batch?;
            return Ok((batch.inputs, format!("the first {} of {} samples", batch.samples, set.len())));
        }
    }
    let mut session = engine.load(Source::Path(&job.reference), &job.reference_options)?;
    let estimate = Estimate::of(reference);
    let mut candidates = sizes_to_try(reference, &job.inputs);
    candidates.sort_by_key(|sizes| {
        let work = estimate.at(sizes);
        // All that are light enough are as good; of the others the lightest.
        (work.operations > LIGHT, if work.operations > LIGHT { work.operations } else { 0 })
    });
    let mut message = "no inputs could be made for it".to_owned();
    for sizes in candidates {
        let sample = generate(reference, &job.inputs, &sizes)?;
        match session.run(&sample) {
            Ok(_) if sizes.describe().is_empty() => return Ok((sample, "random inputs".to_owned())),
            Ok(_) => return Ok((sample, format!("random inputs at {}", sizes.describe()))),
            Err(lost @ RuntimeError::DeviceLost { .. }) => return Err(lost.into()),
            Err(error) => message = error.to_string(),
        }
    }
    Err(LayersError::Refused { message })
}

/// Operations of a run that takes no time worth mentioning.
const LIGHT: u64 = 50_000_000_000;

impl Layers<'_> {
    /// Tensors that nodes of both main graphs compute under one name, in the order of the candidate.
    fn common(&self, left_out: &mut Vec<String>) -> Vec<Common> {
        let (before, after) = (&self.reference.graph, &self.candidate.graph);
        let order = after.sorted(ScopeId::MAIN).unwrap_or_else(|_| after.nodes(ScopeId::MAIN).collect());
        let mut common = Vec::new();
        let mut nested = 0;
        for node in order {
            nested += after.node(node).subgraphs().iter().map(|&scope| after.nodes(scope).count()).sum::<usize>();
            for &value in after.node(node).outputs().iter().flatten() {
                let name = &after.value(value).name;
                let known = before.find_value(name).filter(|&v| {
                    matches!(before.value(v).origin(), Origin::Node(id, _) if before.node(id).scope() == ScopeId::MAIN)
                });
                let Some(known) = known else { continue };
                match (self.facts.0.elem(known), self.facts.1.elem(value)) {
                    (Some(a), Some(b)) if a != DataType::String && b != DataType::String => {
                        common.push(Common { name: name.clone(), before: known, after: value, node });
                    }
                    _ => left_out.push(format!("`{name}`: its type is not known, or no tensor of numbers")),
                }
            }
        }
        if nested > 0 {
            left_out.push(format!("{nested} nodes inside of subgraphs: only their results were compared"));
        }
        common
    }

    /// Splits values so that those of one part fit in memory together.
    fn parts(&self, common: Vec<Common>, talk: &mut dyn Talk) -> Result<Vec<Vec<Common>>, LayersError> {
        talk.stage("measuring the sizes of values");
        let ids: Vec<ValueId> = common.iter().map(|value| value.before).collect();
        let shapes = shapes_of(self.engine, &self.reference, &ids, &self.sample, &self.job.reference_options)?;
        let (mut parts, mut part, mut held) = (Vec::new(), Vec::new(), 0u64);
        for (value, elements) in common.into_iter().zip(shapes) {
            // Values are widened where they are compared.
            let bytes = elements.saturating_mul(8);
            if !part.is_empty() && held.saturating_add(bytes) > self.job.bytes {
                parts.push(std::mem::take(&mut part));
                held = 0;
            }
            held = held.saturating_add(bytes);
            part.push(value);
        }
        parts.push(part);
        Ok(parts)
    }

    fn compare(&self, part: &[Common], lines: &mut Vec<ValueLine>) -> Result<(), LayersError> {
        let job = self.job;
        let (before, after): (Vec<_>, Vec<_>) = part.iter().map(|value| (value.before, value.after)).unzip();
        let of = |model, facts, values: &[ValueId]| Tapped { model, facts, values: values.to_vec() };
        let before = of(&self.reference, &self.facts.0, &before);
        let after = of(&self.candidate, &self.facts.1, &after);
        let before = run_tapped(self.engine, &before, &self.sample, &job.reference_options)?;
        let after = run_tapped(self.engine, &after, &self.sample, &job.options)?;
        for ((value, before), after) in part.iter().zip(&before).zip(&after) {
            lines.push(line_of(&value.name, self.candidate.graph.describe(value.node), before, after, job.rtol));
        }
        Ok(())
    }

    /// Runs nodes alone whose output is beyond its bound while their inputs are not, until one is proven to be wrong.
    fn accuse(&self, common: &[Common], report: &mut LayersReport, talk: &mut dyn Talk) -> Result<(), LayersError> {
        let faulty: BTreeSet<&str> =
            report.values.iter().filter(|line| line.fault.is_some()).map(|line| line.value.as_str()).collect();
        let graph = &self.candidate.graph;
        let known: BTreeMap<&str, ValueId> = common.iter().map(|value| (value.name.as_str(), value.before)).collect();
        let mut tried = BTreeSet::new();
        for value in common.iter().filter(|value| faulty.contains(value.name.as_str())) {
            let node = graph.node(value.node);
            let good = |v: &ValueId| !faulty.contains(graph.value(*v).name.as_str());
            if tried.len() >= MOST_ALONE || !node.inputs().iter().flatten().all(good) || !tried.insert(value.node) {
                continue;
            }
            talk.stage(&format!("running {} alone", graph.describe(value.node)));
            let alone = match run_alone(self, value, &known) {
                Ok((before, after)) => {
                    let line = line_of(&value.name, String::new(), &before, &after, self.job.rtol);
                    Alone::Ran { rel_l2: line.rel_l2, fault: line.fault }
                }
                Err(why) => Alone::NotRun(why),
            };
            let (node, value) = (graph.describe(value.node), value.name.clone());
            report.culprits.push(Culprit { node, value, alone });
            if report.culprits.last().is_some_and(Culprit::is_proven) {
                break;
            }
        }
        Ok(())
    }
}

/// Compares one value, in the type of the reference: precision may be what the two differ in.
fn line_of(name: &str, node: String, before: &Tensor, after: &Tensor, rtol: Option<f64>) -> ValueLine {
    let floats = before.dtype().is_float() && after.dtype().is_float();
    let coarser = default_rtol(before.dtype()).max(default_rtol(after.dtype()));
    let same = after.dtype() == before.dtype();
    let widened = (floats && !same).then(|| cast(after, before.dtype())).flatten();
    let pair = |tensor: &Tensor| vec![(name.to_owned(), Datum::Tensor(tensor.clone()))];
    let claim = Claim::Within { rtol: rtol.unwrap_or(coarser) };
    let found = compare(&pair(before), &pair(widened.as_ref().unwrap_or(after)), claim);
    let error = found.outputs.first();
    ValueLine {
        value: name.to_owned(),
        node,
        dims: before.dims().to_vec(),
        rel_l2: error.map_or(f64::INFINITY, |error| error.rel_l2),
        max_abs: error.map_or(f64::INFINITY, |error| error.max_abs),
        limit: error.and_then(|error| error.limit),
        special_before: special(before),
        special_after: special(after),
        fault: found.faults.first().map(|fault| {
            let whole = fault.to_string();
            whole.strip_prefix(&format!("output `{name}`: ")).map_or(whole.clone(), str::to_owned)
        }),
    }
}

/// The tensor in another float type.
fn cast(tensor: &Tensor, dtype: DataType) -> Option<Tensor> {
    Tensor::from_f64s(dtype, tensor.dims(), &tensor.to_f64s()?)
}

/// Elements that are NaN or infinite.
fn special(tensor: &Tensor) -> usize {
    if !tensor.dtype().is_float() {
        return 0;
    }
    tensor.to_f64s().map_or(0, |all| all.iter().filter(|x| !x.is_finite()).count())
}

#[cfg(test)]
mod tests;
