//! Choosing a calibration set out of a larger pool: every sample is run once up to an early layer, and its pooled features
//! say which samples span what the pool holds.
//!
//! Source: ScalSelect, arXiv:2602.11636. Activations are pooled batch by batch; what is kept is one row per sample.

mod leverage;

use crate::{Datum, Engine, RuntimeError, SampleSet, SetError, Source, Talk, wire::SelectJob};
use lathe_analysis::{Facts, dead_nodes, unused_initializers};
use lathe_ir::{DataType, Graph, Model, ReadError, ScopeId, Tensor, ValueId, WriteError, WriteOptions};
use leverage::{NotConverged, PooledFeatures};
use serde::{Deserialize, Serialize};
use std::io;

/// What was chosen from a pool, and by what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChosenSamples {
    /// The numbers of the chosen samples in the set, in ascending order: for [`crate::SetSpec::chosen`]. Where a model takes
    /// several rows at a time, those count as one sample.
    pub chosen: Vec<usize>,
    /// How many samples there were to choose from.
    pub pool: usize,
    /// The value whose pooled activations stood for a sample.
    pub feature: String,
    /// Dimensions of the dominant subspace, which holds nine tenths of the variance.
    pub components: usize,
    /// The share of the pool's leverage in that subspace that the chosen samples have.
    pub coverage: f64,
    /// Samples equal to an earlier one in their features.
    pub duplicates: usize,
    /// Samples whose features are not numbers; none of them is chosen.
    pub broken: usize,
}

/// Where the features of a value lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channels {
    /// `[batch, channels, height, width]`.
    Second,
    /// `[batch, tokens, features]` or `[batch, features]`.
    Last,
}

/// Why no samples could be chosen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SelectError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Set(#[from] SetError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("the model has no float value that could stand for a sample")]
    NoFeature,
    #[error("cannot make a temporary folder: {0}")]
    Folder(io::Error),
    #[error("cannot write the first layers: {0}")]
    Write(WriteError),
    #[error(transparent)]
    Decomposition(#[from] NotConverged),
    #[error("the runtime does not give `{0}`")]
    Missing(String),
    #[error("`{value}` has the shape {shape:?} for {samples} samples")]
    Shape { value: String, shape: Vec<usize>, samples: usize },
    #[error("`{value}` has {found} features for one sample and {expected} for another")]
    Width { value: String, found: usize, expected: usize },
}

/// Chooses samples of a set; what a worker does.
pub(crate) fn serve(engine: &dyn Engine, job: &SelectJob, talk: &mut dyn Talk) -> Result<ChosenSamples, SelectError> {
    talk.stage("reading the model");
    let mut model = Model::read(&job.model)?.model;
    let set = SampleSet::open(&job.set, &model)?;
    let (value, channels) = feature(&model).ok_or(SelectError::NoFeature)?;
    let name = model.graph.value(value).name.clone();
    cut(&mut model.graph, value);
    talk.stage("loading the first layers");
    let folder = tempfile::tempdir().map_err(SelectError::Folder)?;
    let path = folder.path().join("layers.onnx");
    model.write(&path, &WriteOptions::default()).map_err(SelectError::Write)?;
    drop(model);
    let mut session = engine.load(Source::Path(&path), &job.options)?;
    let mut features = PooledFeatures { width: 0, values: Vec::new() };
    let mut units = Vec::new();
    for (number, batch) in set.batches().enumerate() {
        let batch = batch?;
        let here = set.units(number);
        talk.stage(&format!("running samples {} to {} of {}", batch.first, batch.first + batch.samples - 1, set.len()));
        let outputs = session.run(&batch.inputs)?;
        let Some(Datum::Tensor(tensor)) = outputs.into_iter().find(|(n, _)| *n == name).map(|(_, datum)| datum) else {
            return Err(SelectError::Missing(name));
        };
        let mask = batch.inputs.iter().find(|(n, t)| n.contains("mask") && t.dims().len() == 2).map(|(_, t)| t);
        let rows = pooled(&tensor, here.len(), channels, mask);
        let rows = rows.ok_or_else(|| SelectError::Shape {
            value: name.clone(),
            shape: tensor.dims().to_vec(),
            samples: here.len(),
        })?;
        let width = rows.len() / here.len().max(1);
        if features.width != 0 && features.width != width {
            return Err(SelectError::Width { value: name, found: width, expected: features.width });
        }
        talk.progress(batch.first + batch.samples - 1, set.len(), "samples");
        features.width = width;
        features.values.extend(rows);
        units.extend(here);
    }
    talk.stage("choosing samples");
    let choice = features.choose(job.count, job.seed)?;
    Ok(ChosenSamples {
        chosen: choice.chosen.iter().map(|&row| units[row]).collect(),
        pool: units.len(),
        feature: name,
        components: choice.components,
        coverage: choice.coverage,
        duplicates: choice.duplicates,
        broken: choice.broken,
    })
}

/// The value that stands for a sample: the tokens after the first layer, or else the widest feature map, or else the
/// widest row of features. The later of equals.
fn feature(model: &Model) -> Option<(ValueId, Channels)> {
    let graph = &model.graph;
    let facts = Facts::infer(model);
    let is_float = |v: ValueId| matches!(facts.elem(v), Some(DataType::Float | DataType::Float16 | DataType::Bfloat16));
    let produced: Vec<ValueId> = graph
        .sorted(ScopeId::MAIN)
        .ok()?
        .into_iter()
        .filter_map(|id| graph.node(id).output(0))
        .filter(|&v| is_float(v))
        .collect();
    // A residual unit ends in a sum of two computed values of one shape, and a layer has two of them.
    let sums: Vec<ValueId> = produced.iter().copied().filter(|&v| is_residual(graph, &facts, v)).collect();
    if let Some(&sum) = sums.get(1).or(sums.first()) {
        return Some((sum, Channels::Last));
    }
    let widest = |ndim: fn(usize) -> bool, axis: fn(usize) -> usize| {
        let width = |v: &ValueId| {
            let shape = facts.shape(*v).filter(|s| ndim(s.len()))?;
            shape[axis(shape.len())].as_known()
        };
        produced.iter().copied().filter(|v| width(v).is_some()).max_by_key(width)
    };
    let map = widest(|ndim| ndim >= 4, |_| 1).map(|v| (v, Channels::Second));
    let row = || widest(|ndim| matches!(ndim, 2 | 3), |ndim| ndim - 1).map(|v| (v, Channels::Last));
    map.or_else(row).or_else(|| produced.last().map(|&v| (v, Channels::Last)))
}

fn is_residual(graph: &Graph, facts: &Facts, value: ValueId) -> bool {
    let Some(node) = graph.producer(value).map(|id| graph.node(id)).filter(|n| n.is("Add")) else { return false };
    let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return false };
    let computed = graph.constant(a).is_none() && graph.constant(b).is_none();
    // A mask or bias that broadcasts is no residual.
    computed && a != b && facts.ndim(value) == Some(3) && facts.same_shape(a, b)
}

/// Leaves only what `value` needs, and makes it the only output. The inputs stay.
fn cut(graph: &mut Graph, value: ValueId) {
    for index in (0..graph.main().outputs().len()).rev() {
        graph.remove_output(ScopeId::MAIN, index);
    }
    graph.add_output(ScopeId::MAIN, value);
    // Users stand after what they use, and are removed first.
    for id in dead_nodes(graph).into_iter().rev() {
        if graph.get(id).is_some() {
            graph.remove_node(id);
        }
    }
    for initializer in unused_initializers(graph) {
        graph.remove_initializer(initializer);
    }
}

/// The mean over everything but the channels, for each of `samples`, padded tokens left out; `None` if the first axis is
/// not made of samples.
fn pooled(tensor: &Tensor, samples: usize, channels: Channels, mask: Option<&Tensor>) -> Option<Vec<f32>> {
    let (dims, values) = (tensor.dims(), tensor.to_f64s()?);
    let first = *dims.first()?;
    if samples == 0 || first == 0 || first % samples != 0 || values.is_empty() {
        return None;
    }
    let (width, inner) = match channels {
        Channels::Second => (*dims.get(1)?, dims[2..].iter().product::<usize>()),
        Channels::Last => (*dims.last()?, 1),
    };
    let rows = values.len() / (width * inner) / samples;
    let kept = mask.filter(|m| m.len() == rows * samples).and_then(Tensor::to_f64s);
    let mut out = Vec::with_capacity(samples * width);
    for sample in 0..samples {
        let (mut sums, mut count) = (vec![0.0; width], 0usize);
        for row in sample * rows..(sample + 1) * rows {
            if kept.as_ref().is_some_and(|k| k[row] == 0.0) {
                continue;
            }
            count += inner;
            let block = &values[row * width * inner..(row + 1) * width * inner];
            sums.iter_mut().zip(block.chunks_exact(inner)).for_each(|(sum, part)| *sum += part.iter().sum::<f64>());
        }
        out.extend(sums.iter().map(|sum| (sum / count.max(1) as f64) as f32));
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        LoadOptions, SetSpec,
        testing::{Build, engine},
    };
    use lathe_ir::{Node, Type};
    use std::path::Path;

    #[test]
    fn means_leave_channels_and_skip_padding() {
        let image = Tensor::from_f32s(&[2, 2, 1, 2], &[1.0, 3.0, 5.0, 7.0, 0.0, 2.0, 4.0, 4.0]);
        assert_eq!(pooled(&image, 2, Channels::Second, None).unwrap(), [2.0, 6.0, 1.0, 4.0]);
        let tokens = Tensor::from_f32s(&[2, 2, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 9.0]);
        assert_eq!(pooled(&tokens, 2, Channels::Last, None).unwrap(), [2.0, 3.0, 7.0, 7.5]);
        let mask = Tensor::from_i64s(&[2, 2], &[1, 1, 1, 0]);
        assert_eq!(pooled(&tokens, 2, Channels::Last, Some(&mask)).unwrap(), [2.0, 3.0, 5.0, 6.0]);
        assert_eq!(pooled(&tokens, 1, Channels::Last, None).unwrap(), [4.5, 5.25]);
        assert_eq!(pooled(&tokens, 3, Channels::Last, None), None);
    }

    fn fixture(name: &str) -> Model {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name);
        Model::read(&path).unwrap().model
    }

    #[test]
    fn tokens_after_the_first_layer_stand_for_a_sample() {
        let mut model = fixture("transformer.onnx");
        let nodes = model.graph.all_nodes().len();
        let (value, channels) = feature(&model).unwrap();
        assert_eq!((channels, Facts::infer(&model).ndim(value)), (Channels::Last, Some(3)));
        cut(&mut model.graph, value);
        model.check().unwrap();
        assert!(model.graph.all_nodes().len() < nodes * 2 / 3, "{} of {nodes}", model.graph.all_nodes().len());
        let (_, channels) = feature(&fixture("mobilenet.onnx")).unwrap();
        assert_eq!(channels, Channels::Second);
    }

    #[test]
    fn samples_are_chosen_from_a_set() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        build.input("k", DataType::Int64, &["n"]);
        let y = build.node(Node::new("Abs"), &[x], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/sets/good.npz");
        let set = SetSpec { part: crate::Part::Calibration, batch: Some(4), ..SetSpec::all(path) };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abs.onnx");
        std::fs::write(&path, model.to_bytes()).unwrap();
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let job = SelectJob { model: path, set: set.clone(), count: 3, seed: 0, options };
        let found = serve(engine(), &job, &mut |_: &str| {}).unwrap();
        assert_eq!((found.pool, found.chosen.len(), found.feature.as_str()), (6, 3, "y"));
        // Rows that lie on a line: its ends have the most leverage.
        assert!(found.chosen.contains(&0) || found.chosen.contains(&5), "{found:?}");
        let chosen = SetSpec { chosen: Some(found.chosen.clone()), ..set };
        assert_eq!(SampleSet::open(&chosen, &model).unwrap().len(), 3);
    }
}
