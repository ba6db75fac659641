//! The worker's part: runs a copy that computes statistics over a set and adds up what it gives.

use super::store::{self, FileHead, StoredField};
use crate::{
    Datum, Engine, RuntimeError, Sample, SampleSet, Session, SetError, Source, Talk,
    wire::{Fold, GatherJob, Gathered, Output},
};
use lathe_analysis::Spread;
use lathe_ir::{DataType, Model, ReadError, Tensor};
use std::{collections::BTreeMap, io, path::PathBuf};

/// Why sums could not be gathered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GatherError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Set(#[from] SetError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("the set holds no samples")]
    Empty,
    #[error("the runtime does not give `{0}`")]
    Missing(String),
    #[error("cannot write `{}`: {source}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("`{value}` is {found}, not a tensor")]
    NotATensor { value: String, found: String },
    #[error("`{value}` is {found}, not a square matrix")]
    NotSquare { value: String, found: String },
    #[error("the features of a tensor vary from batch to batch: {expected:?} first, now {found:?}")]
    Varying { expected: Vec<usize>, found: Vec<usize> },
    #[error("a statistic is of type {0}")]
    Type(DataType),
}

/// Sums of one output.
struct OutputSums {
    fold: Fold,
    dims: Vec<usize>,
    data: Vec<f64>,
}

/// Loads the copy of a job and runs it on the job's set.
pub(crate) fn serve(engine: &dyn Engine, job: &GatherJob, talk: &mut dyn Talk) -> Result<Gathered, GatherError> {
    talk.stage("opening the set");
    let model = Model::read(&job.model)?.model;
    let set = SampleSet::open(&job.set, &model)?;
    drop(model);
    talk.stage("loading the model that computes statistics");
    let mut session = engine.load(Source::Path(&job.model), &job.options)?;
    let mut batches = set.batches().map(|batch| batch.map(|batch| (batch.inputs, batch.samples)));
    gather(session.as_mut(), &mut batches, set.len(), job, talk)
}

/// Runs `session` on every batch and writes the sums. `batches` come with their number of samples, `total` in all.
fn gather(
    session: &mut dyn Session,
    batches: &mut dyn Iterator<Item = Result<(Sample, usize), SetError>>,
    total: usize,
    job: &GatherJob,
    talk: &mut dyn Talk,
) -> Result<Gathered, GatherError> {
    let outputs = job.entries.iter().flat_map(|e| &e.outputs).chain(&job.direct);
    let folds: BTreeMap<&str, Fold> = outputs.map(|o| (o.value.as_str(), o.fold)).collect();
    let mut sums: BTreeMap<String, OutputSums> = BTreeMap::new();
    let mut gathered = Gathered::default();
    for batch in batches {
        let (inputs, samples) = batch?;
        talk.stage(&format!("collecting statistics of batch {}", gathered.batches + 1));
        let mut wrong = None;
        session.visit(&inputs, &mut |name, datum| {
            let (Some(&fold), None) = (folds.get(name), &wrong) else { return Ok(()) };
            wrong = add(&mut sums, name, fold, &datum).err();
            Ok(())
        })?;
        if let Some(error) = wrong {
            return Err(error);
        }
        gathered.samples += samples;
        gathered.batches += 1;
        talk.progress(gathered.samples, total, "samples");
        if job.first_only {
            break;
        }
    }
    if gathered.batches == 0 {
        return Err(GatherError::Empty);
    }
    let missing = |o: &Output| GatherError::Missing(o.value.clone());
    for entry in &job.entries {
        talk.stage("writing statistics");
        let taken = entry.outputs.iter().map(|o| sums.remove(&o.value).ok_or_else(|| missing(o)));
        let taken: Vec<OutputSums> = taken.collect::<Result<_, _>>()?;
        let array = |(output, sums): (&Output, &OutputSums)| StoredField {
            field: output.field.clone(),
            dims: sums.dims.clone(),
            triangle: sums.fold == Fold::Triangle,
            len: sums.data.len(),
        };
        let arrays = entry.outputs.iter().zip(&taken).map(array).collect();
        let head = FileHead { request: entry.request.clone(), arrays };
        let data: Vec<&[f64]> = taken.iter().map(|s| &s.data[..]).collect();
        store::write(&entry.file, &head, &data)
            .map_err(|source| GatherError::Write { path: entry.file.clone(), source })?;
    }
    for output in &job.direct {
        gathered.direct.push(sums.remove(&output.value).ok_or_else(|| missing(output))?.data);
    }
    Ok(gathered)
}

/// Adds what one batch gave for one output.
fn add(sums: &mut BTreeMap<String, OutputSums>, name: &str, fold: Fold, datum: &Datum) -> Result<(), GatherError> {
    let described = || (name.to_owned(), datum.describe());
    let tensor = datum.tensor().ok_or_else(|| {
        let (value, found) = described();
        GatherError::NotATensor { value, found }
    })?;
    let dims = tensor.dims();
    if fold == Fold::Spread {
        // What is kept does not depend on how many rows a batch has.
        let bins = || OutputSums { fold, dims: vec![3, Spread::BINS], data: vec![0.0; 3 * Spread::BINS] };
        return join(sums.entry(name.to_owned()).or_insert_with(bins), tensor);
    }
    let Some(known) = sums.get_mut(name) else {
        let square = matches!(dims, [rows, columns] if rows == columns);
        if fold == Fold::Triangle && !square {
            let (value, found) = described();
            return Err(GatherError::NotSquare { value, found });
        }
        let length = if fold == Fold::Triangle { dims[0] * (dims[0] + 1) / 2 } else { tensor.len() };
        let start = match fold {
            Fold::Max => f64::NEG_INFINITY,
            Fold::Min => f64::INFINITY,
            _ => 0.0,
        };
        let mut first = OutputSums { fold, dims: dims.to_vec(), data: vec![start; length] };
        join(&mut first, tensor)?;
        sums.insert(name.to_owned(), first);
        return Ok(());
    };
    if fold == Fold::First {
        return Ok(());
    }
    if known.dims != dims {
        return Err(GatherError::Varying { expected: known.dims.clone(), found: dims.to_vec() });
    }
    join(known, tensor)
}

fn join(sums: &mut OutputSums, tensor: &Tensor) -> Result<(), GatherError> {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        DataType::Float => fold(sums, bytes.as_chunks::<4>().0, |b| f64::from(f32::from_le_bytes(b))),
        DataType::Double => fold(sums, bytes.as_chunks::<8>().0, f64::from_le_bytes),
        DataType::Int64 => fold(sums, bytes.as_chunks::<8>().0, |b| i64::from_le_bytes(b) as f64),
        other => return Err(GatherError::Type(other)),
    }
    Ok(())
}

fn fold<const N: usize>(sums: &mut OutputSums, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64) {
    let all = sums.data.iter_mut();
    match sums.fold {
        Fold::Sum | Fold::First => all.zip(elements).for_each(|(sum, &e)| *sum += read(e)),
        Fold::Max => all.zip(elements).for_each(|(sum, &e)| *sum = sum.max(read(e))),
        Fold::Min => all.zip(elements).for_each(|(sum, &e)| *sum = sum.min(read(e))),
        Fold::Spread => Spread::add(&mut sums.data, elements.iter().map(|&e| read(e) as f32)),
        Fold::Triangle => {
            let columns = sums.dims[1].max(1);
            let upper = elements.chunks(columns).enumerate().flat_map(|(row, line)| &line[row..]);
            all.zip(upper).for_each(|(sum, &e)| *sum += read(e));
        }
    }
}
