//! The worker's part: runs the model and the variant, and keeps distances.

use super::{
    counted,
    distance::{Expected, NoNumbers},
    list,
};
use crate::{
    Datum, Gates, RuntimeError, Sample, SampleSet, Session, SetError, Source, StatisticsError, Talk,
    sessions::SessionStore, wire::TrialJob,
};
use lathe_ir::{Model, ReadError, Tensor};
use std::{path::PathBuf, rc::Rc};

/// Why a variant could not be tried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrialError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Set(#[from] SetError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    #[error(transparent)]
    NoNumbers(#[from] NoNumbers),
    #[error("the variant has no output `{0}`")]
    NoOutput(String),
    #[error("the variant has no input `{0}`")]
    NoInput(String),
    #[error("the set holds no samples")]
    Empty,
}

/// Runs a job; `None` stands for a distance that is not finite.
pub(crate) fn serve(
    sessions: &SessionStore<'_>,
    job: &TrialJob,
    talk: &mut dyn Talk,
) -> Result<Vec<Option<f64>>, TrialError> {
    talk.stage("opening the set");
    let read = |path: &PathBuf| Model::read(path).map(|loaded| loaded.model);
    let (model, variant) = (read(&job.reference)?, read(&job.variant)?);
    let set = SampleSet::open(&job.set, &model)?;
    let compared = compared(&model, &variant)?;
    let gates = job.gates.iter().map(|gates| tensors(&variant, gates)).collect::<Result<Vec<_>, _>>()?;
    let feeds: Vec<String> =
        variant.graph.main().inputs().iter().map(|&v| variant.graph.value(v).name.clone()).collect();
    drop((model, variant));
    talk.stage("loading the model");
    let mut original = sessions.load(&job.reference, &job.options)?;
    talk.stage("loading a variant of the model");
    // Every variant is another one.
    let mut session = sessions.engine().load(Source::Path(&job.variant), &job.options)?;
    let mut sums = vec![0.0; gates.len()];
    let (mut samples, mut runs, mut finite) = (0, 0, None);
    for batch in set.batches() {
        let batch = batch?;
        talk.stage("running the model");
        let mut expected = Vec::new();
        let outputs = match original.known(&batch.inputs) {
            Some(known) => known,
            None => {
                let mut outputs = Vec::new();
                original.visit(&batch.inputs, &mut |name, datum| {
                    if compared.iter().any(|c| c == name) {
                        outputs.push((name.to_owned(), datum));
                    }
                    Ok(())
                })?;
                let outputs = Rc::new(outputs);
                original.remember(&batch.inputs, &outputs);
                outputs
            }
        };
        for (name, datum) in outputs.iter() {
            each(name.clone(), datum, &mut |name, tensor| {
                expected.push((name, Expected::of(tensor, job.distance, batch.samples)?));
                Ok(())
            })?;
        }
        drop(outputs);
        // Whole numbers and strings stay what they are under small errors: they count where there is nothing else.
        if expected.iter().any(|(_, e)| matches!(e, Expected::Numbers(_))) {
            expected.retain(|(_, e)| matches!(e, Expected::Numbers(_)));
            finite = Some(finite.unwrap_or(0) + expected.iter().map(|(_, e)| e.finite()).sum::<usize>());
        }
        let inputs: Sample = batch.inputs.into_iter().filter(|(name, _)| feeds.contains(name)).collect();
        for (sum, gates) in sums.iter_mut().zip(&gates) {
            runs += 1;
            talk.stage(&format!("running variant {runs} of the model"));
            let all: Sample = inputs.iter().chain(gates).cloned().collect();
            let (mut rise, mut present) = (0.0, 0);
            visit(session.as_mut(), &all, &compared, &mut |name, tensor| {
                if let Some((_, of)) = expected.iter().find(|(n, _)| *n == name) {
                    present += 1;
                    rise += of.distance(tensor, job.non_finite)?;
                }
                Ok(())
            })?;
            // A member of a sequence that is not there is lost.
            rise += (expected.len() - present) as f64;
            *sum += rise * batch.samples as f64;
            talk.progress(runs, set.batch_count() * job.gates.len(), "runs of variants");
        }
        samples += batch.samples;
    }
    if samples == 0 {
        return Err(TrialError::Empty);
    }
    if finite == Some(0) {
        return Err(StatisticsError::NotFinite { outputs: list(&compared) }.into());
    }
    let mean = |sum: f64| Some(sum / samples as f64).filter(|d| d.is_finite());
    Ok(sums.into_iter().map(mean).collect())
}

/// The outputs that count, which the variant must have too.
fn compared(model: &Model, variant: &Model) -> Result<Vec<String>, TrialError> {
    let given = |name: &String| variant.graph.main().outputs().iter().any(|&v| variant.graph.value(v).name == *name);
    let own = counted(model);
    match own.iter().find(|name| !given(name)) {
        Some(name) => Err(TrialError::NoOutput(name.clone())),
        None => Ok(own),
    }
}

/// One number for every gate, in the shape its input states.
fn tensors(variant: &Model, gates: &Gates) -> Result<Sample, TrialError> {
    let graph = &variant.graph;
    let tensor = |(name, number): &(String, f32)| {
        let input = graph.main().inputs().iter().find(|&&v| graph.value(v).name == *name);
        let input = input.ok_or_else(|| TrialError::NoInput(name.clone()))?;
        let ndim = graph.value(*input).ty.as_ref().and_then(|ty| ty.shape()).map_or(0, |shape| shape.dims.len());
        Ok((name.clone(), Tensor::from_f32s(&vec![1; ndim], &[*number])))
    };
    gates.iter().map(tensor).collect()
}

/// Runs and hands over the tensors of the outputs that count.
fn visit(
    session: &mut dyn Session,
    inputs: &Sample,
    compared: &[String],
    take: &mut dyn FnMut(String, &Tensor) -> Result<(), TrialError>,
) -> Result<(), TrialError> {
    let mut wrong = None;
    let visited = session.visit(inputs, &mut |name, datum| {
        if wrong.is_none() && compared.iter().any(|c| c == name) {
            wrong = each(name.to_owned(), &datum, take).err();
        }
        Ok(())
    });
    visited?;
    wrong.map_or(Ok(()), Err)
}

/// Every tensor inside an output, with a name of its own.
fn each(
    name: String,
    datum: &Datum,
    take: &mut dyn FnMut(String, &Tensor) -> Result<(), TrialError>,
) -> Result<(), TrialError> {
    match datum {
        Datum::Tensor(tensor) => take(name, tensor),
        Datum::Sequence(members) => {
            members.iter().enumerate().try_for_each(|(at, member)| each(format!("{name}[{at}]"), member, take))
        }
        Datum::Map { keys, values } => {
            take(format!("{name} keys"), keys)?;
            take(format!("{name} values"), values)
        }
        Datum::None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Distance, LoadOptions, NpzWriter, SetSpec,
        testing::{Build, engine},
        wire::NonFinite,
    };
    use lathe_ir::{DataType, Node, Type};

    /// `y = x + gate · x`, or without a gate `y = x`.
    fn model(gated: bool) -> Model {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        if !gated {
            let y = build.node(Node::new("Identity"), &[x], "y");
            return build.output(y, Type::unshaped(DataType::Float)).model();
        }
        let gate = build.input("gate", DataType::Float, &[]);
        let more = build.node(Node::new("Mul"), &[x, gate], "more");
        let y = build.node(Node::new("Add"), &[x, more], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    fn run(distance: Distance, gates: &[f32]) -> Vec<Option<f64>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        let mut npz = NpzWriter::create(&path).unwrap();
        npz.add("x", &Tensor::from_f32s(&[2, 3], &[1.0, 2.0, 3.0, -1.0, 0.5, 2.0])).unwrap();
        npz.finish().unwrap();
        let file = |name: &str, model: Model| {
            let path = folder.path().join(name);
            model.write_linked(&path).unwrap();
            path
        };
        let job = TrialJob {
            reference: file("reference.onnx", model(false)),
            variant: file("variant.onnx", model(true)),
            set: SetSpec::all(&path),
            gates: gates.iter().map(|&g| vec![("gate".to_owned(), g)]).collect(),
            distance,
            non_finite: NonFinite::Infinite,
            options: LoadOptions::default(),
        };
        serve(&SessionStore::new(engine(), 1 << 20), &job, &mut |_: &str| {}).unwrap()
    }

    #[test]
    fn one_session_serves_every_assignment() {
        let found = run(Distance::Relative, &[0.0, 0.5, -1.0, f32::NAN]);
        assert_eq!(found, [Some(0.0), Some(0.25), Some(1.0), None]);
    }

    #[test]
    fn divergence_is_the_mean_over_rows() {
        let softmax = |row: &[f64]| {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x.exp() / sum).collect::<Vec<_>>()
        };
        let rows = [[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]];
        let expected: f64 = rows
            .iter()
            .map(|row| {
                let (p, q) = (softmax(row), softmax(&row.map(|x| 1.5 * x)));
                p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>() / 2.0
            })
            .sum();
        let found = run(Distance::Divergence, &[0.0, 0.5]);
        assert!(found[0].unwrap() < 1e-6, "{found:?}");
        assert!((found[1].unwrap() - expected).abs() < 1e-6, "{found:?} is not {expected}");
    }
}
