//! Calibration and validation sets: samples in files, fitted to the inputs of a model and read batch by batch.
//!
//! A set is a `.npz`, a folder of `.npz` or of `.npy` files, or ONNX `test_data_set_*` folders. What is in it is held
//! against the model before any work; its data is streamed and never in memory as a whole.

mod error;
mod fit;
mod folder;
mod npy;
mod store;

pub use error::SetError;

use crate::Sample;
use bytes::Bytes;
use fit::{Array, Division, InputColumn, Shard};
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{DataType, Model, Tensor};
use npy::Elements;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use store::{Stored, Stream};

/// Which samples of a set are meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// All of them.
    #[default]
    All,
    /// The first three quarters.
    Calibration,
    /// The last quarter, held out from calibration.
    Validation,
}

/// A set as the user names it; cheap, and what travels to a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetSpec {
    /// The file or folder.
    pub path: PathBuf,
    /// The array that holds labels instead of an input.
    pub labels: Option<String>,
    /// An array that may be there and is not read: labels, where nothing is measured by them.
    pub unread: Option<String>,
    /// Which samples.
    pub part: Part,
    /// Samples in a batch where the model leaves the choice; `None` takes what fits in a moderate amount of memory.
    pub batch: Option<usize>,
    /// Only these of the whole set, by their numbers in ascending order, as [`crate::ChosenSamples`] gives them.
    pub chosen: Option<Vec<usize>>,
}

impl SetSpec {
    /// All samples of the set at `path`.
    pub fn all(path: impl Into<PathBuf>) -> SetSpec {
        SetSpec { path: path.into(), ..SetSpec::default() }
    }
}

/// One run's worth of a set.
#[derive(Debug, Clone)]
pub struct Batch {
    /// A tensor for every input that the set feeds.
    pub inputs: Sample,
    /// The labels of these samples, whole numbers of any type, if the set has labels.
    pub labels: Option<Tensor>,
    /// How many samples these are.
    pub samples: usize,
    /// The number of the first of them in the set.
    pub first: usize,
}

/// A set that fits a model.
#[derive(Debug)]
pub struct SampleSet {
    shards: Vec<Shard>,
    /// Which units of which shard are run together, in order.
    plan: Vec<Group>,
    samples: usize,
    batch: usize,
    part: Part,
}

/// Units of a shard that make one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    shard: usize,
    /// In ascending order; neighbours mostly.
    units: Vec<usize>,
}

/// Bytes of activations that a batch may need where its size is ours to choose.
const MODERATE: u64 = 256 << 20;

/// No batch of our choice is larger; more rows gain nothing.
const LARGEST_BATCH: usize = 64;

impl SampleSet {
    /// Opens a set and holds names, types, shapes and sizes of its arrays against the inputs of `model`.
    ///
    /// Where all arrays have the rank of their inputs, the first axis counts samples, and a batch has as many as the
    /// model's first dimension says. An array with one axis more holds one run in each row, and an array without any axis
    /// is the same in every run.
    pub fn open(spec: &SetSpec, model: &Model) -> Result<SampleSet, SetError> {
        let shards = folder::shards(spec, &model.graph)?;
        let units: usize = shards.iter().map(|s| s.units).sum();
        let held_out = (units / 4).max(1);
        let (range, part) = match spec.part {
            // One run cannot be divided.
            Part::Calibration if units > 1 => (0..units - held_out, Part::Calibration),
            Part::Validation if units > 1 => (units - held_out..units, Part::Validation),
            _ => (0..units, Part::All),
        };
        let kept: Vec<usize> = match &spec.chosen {
            None => range.collect(),
            Some(chosen) => {
                if let Some(&sample) = chosen.iter().find(|&&sample| sample >= units) {
                    return Err(SetError::Chosen { sample, found: units });
                }
                chosen.clone()
            }
        };
        let wanted = match spec.batch {
            Some(batch) => batch.max(1),
            None => usual_batch(model, &shards),
        };
        let plan = groups(&shards, &kept, wanted);
        let samples = plan.iter().map(|g| g.units.len() * shards[g.shard].samples).sum();
        let batch = plan.iter().map(|g| g.units.len() * shards[g.shard].samples).max().unwrap_or(0);
        Ok(SampleSet { shards, plan, samples, batch, part })
    }

    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.samples
    }

    /// Whether there are none; a set that opens has some.
    pub fn is_empty(&self) -> bool {
        self.samples == 0
    }

    /// Samples in a full batch.
    pub fn batch_size(&self) -> usize {
        self.batch
    }

    /// How many batches there are.
    pub fn batch_count(&self) -> usize {
        self.plan.len()
    }

    /// The numbers in the whole set of the smallest runs that a batch is made of: what [`SetSpec::chosen`] names.
    pub(crate) fn units(&self, batch: usize) -> Vec<usize> {
        let Some(group) = self.plan.get(batch) else { return Vec::new() };
        let start: usize = self.shards[..group.shard].iter().map(|s| s.units).sum();
        group.units.iter().map(|unit| start + unit).collect()
    }

    /// The numbers of about `count` samples, spread evenly over these: what [`SetSpec::chosen`] names.
    pub fn spread(&self, count: usize) -> Vec<usize> {
        let all: Vec<usize> = (0..self.batch_count()).flat_map(|batch| self.units(batch)).collect();
        let kept = (all.len() * count).div_ceil(self.len().max(1)).clamp(1, all.len().max(1));
        (0..kept).filter_map(|i| all.get(i * all.len() / kept).copied()).collect()
    }

    /// Which part of the set this is; [`Part::All`] where one run could not be divided.
    pub fn part(&self) -> Part {
        self.part
    }

    /// Reads the set from front to back, one batch at a time.
    pub fn batches(&self) -> Batches<'_> {
        Batches { set: self, next: 0, first: 0, open: None }
    }

    /// Reads all of it once and fails at the first NaN in an input.
    pub fn check_values(&self) -> Result<(), SetError> {
        let float = |s: &Shard| s.columns.iter().any(|c| c.dtype.is_float());
        if !self.shards.iter().any(float) {
            return Ok(());
        }
        let mut batches = self.batches();
        while let Some(batch) = batches.next() {
            let batch = batch?;
            for (name, tensor) in &batch.inputs {
                if let Some(element) = first_nan(tensor) {
                    let row = tensor.len() / batch.samples.max(1);
                    let sample = batch.first + element.checked_div(row).unwrap_or(0);
                    let shard = &self.shards[self.plan[batches.next - 1].shard];
                    let column = shard.columns.iter().find(|c| c.input == *name);
                    let path = column.map(|c| c.array.path().to_owned()).unwrap_or_default();
                    return Err(SetError::NotANumber { path, array: name.clone(), sample });
                }
            }
        }
        Ok(())
    }
}

/// The place of the first NaN.
fn first_nan(tensor: &Tensor) -> Option<usize> {
    match tensor.dtype() {
        DataType::Float => tensor.bytes().as_chunks::<4>().0.iter().position(|&b| f32::from_le_bytes(b).is_nan()),
        dtype if dtype.is_float() => tensor.to_f64s()?.iter().position(|v| v.is_nan()),
        _ => None,
    }
}

/// Divides the kept units into batches; only neighbours in one file, of one shape, are run together.
fn groups(shards: &[Shard], kept: &[usize], wanted: usize) -> Vec<Group> {
    let mut plan: Vec<Group> = Vec::new();
    let (mut shard, mut start) = (0, 0);
    for &unit in kept {
        while unit >= start + shards[shard].units {
            start += shards[shard].units;
            shard += 1;
        }
        let most = if shards[shard].joins { wanted } else { 1 };
        match plan.last_mut().filter(|g| g.shard == shard && g.units.len() < most) {
            Some(group) => group.units.push(unit - start),
            None => plan.push(Group { shard, units: vec![unit - start] }),
        }
    }
    plan
}

/// How many samples of these sizes can be run together in a moderate amount of memory.
fn usual_batch(model: &Model, shards: &[Shard]) -> usize {
    let Some(shard) = shards.iter().find(|s| s.joins) else { return 1 };
    let mut bindings = Bindings::default();
    for &id in model.graph.main().inputs() {
        let value = model.graph.value(id);
        let column = shard.columns.iter().find(|c| c.input == value.name);
        let shape = value.ty.as_ref().and_then(|t| t.shape());
        if let Some((stated, column)) = shape.zip(column) {
            let mut sizes = column.array.shape().to_vec();
            sizes.iter_mut().take(1).for_each(|first| *first = 1);
            bindings.set_input(stated, &sizes);
        }
    }
    let peak = Cost::unfolded(model, &Facts::infer(model), &bindings).activation_peak_bytes.max(1);
    usize::try_from(MODERATE / peak).unwrap_or(1).clamp(1, LARGEST_BATCH)
}

/// The batches of a set, in order.
pub struct Batches<'a> {
    set: &'a SampleSet,
    next: usize,
    first: usize,
    open: Option<(usize, Reader<'a>)>,
}

impl Iterator for Batches<'_> {
    type Item = Result<Batch, SetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let group = self.set.plan.get(self.next)?;
        let batch = self.read(group);
        // After an error nothing more can be read in order.
        self.next = if batch.is_ok() { self.next + 1 } else { self.set.plan.len() };
        Some(batch)
    }
}

impl Batches<'_> {
    fn read(&mut self, group: &Group) -> Result<Batch, SetError> {
        if self.open.as_ref().is_none_or(|(shard, _)| *shard != group.shard) {
            self.open = Some((group.shard, Reader::open(&self.set.shards[group.shard])?));
        }
        let (_, reader) = self.open.as_mut().expect("opened above");
        let (inputs, labels) = reader.read(&group.units)?;
        let samples = group.units.len() * self.set.shards[group.shard].samples;
        let first = self.first;
        self.first += samples;
        Ok(Batch { inputs, labels, samples, first })
    }
}

/// A shard being read from front to back.
struct Reader<'a> {
    shard: &'a Shard,
    columns: Vec<Cursor<'a>>,
    labels: Option<Cursor<'a>>,
}

impl<'a> Reader<'a> {
    fn open(shard: &'a Shard) -> Result<Reader<'a>, SetError> {
        let columns = shard.columns.iter().map(Cursor::open).collect::<Result<_, _>>()?;
        Ok(Reader { shard, columns, labels: shard.labels.as_ref().map(Cursor::open).transpose()? })
    }

    fn read(&mut self, units: &[usize]) -> Result<(Sample, Option<Tensor>), SetError> {
        let mut inputs = Vec::with_capacity(self.columns.len());
        for (cursor, column) in self.columns.iter_mut().zip(&self.shard.columns) {
            inputs.push((column.input.clone(), cursor.read(units)?));
        }
        let labels = self.labels.as_mut().map(|cursor| cursor.read(units)).transpose()?;
        Ok((inputs, labels))
    }
}

/// One column being read.
struct Cursor<'a> {
    column: &'a InputColumn,
    stream: Option<(&'a Stored, Stream)>,
    /// The unit that comes next.
    unit: usize,
    /// What every run reads, once it was read.
    same: Option<Tensor>,
}

impl<'a> Cursor<'a> {
    fn open(column: &'a InputColumn) -> Result<Cursor<'a>, SetError> {
        let stream = match &column.array {
            Array::Stored(stored) => Some((stored, stored.stream()?)),
            Array::Tensor { .. } => None,
        };
        Ok(Cursor { column, stream, unit: 0, same: None })
    }

    /// The whole array, for one run after the other.
    fn same(&mut self) -> Result<Tensor, SetError> {
        if let (None, Some((stored, stream))) = (&self.same, &mut self.stream) {
            let bytes = stream.read_bytes(stored.header.data_bytes).map_err(|e| stored.broken(e.to_string()))?;
            self.same = Some(elements(stored, self.column.dtype, self.column.array.shape().to_vec(), bytes)?);
        }
        Ok(self.same.clone().expect("only arrays that are stored are the same in every run"))
    }

    /// The rows of these units, one after another.
    fn read(&mut self, units: &[usize]) -> Result<Tensor, SetError> {
        let InputColumn { array, rows, dtype, .. } = self.column;
        if *rows == Division::Same {
            return self.same();
        }
        let Some((stored, stream)) = &mut self.stream else {
            return Ok(fit::tensor(array.path())?.1);
        };
        let shape = array.shape();
        let (per_unit, dims) = match rows {
            Division::Whole | Division::Same => (1, shape.to_vec()),
            Division::Single => (1, shape[1..].to_vec()),
            Division::Several(rows) => {
                let mut dims = shape.to_vec();
                dims[0] = rows * units.len();
                (*rows, dims)
            }
        };
        let units_total = if *rows == Division::Whole { 1 } else { shape[0] / per_unit };
        let unit_bytes = stored.header.data_bytes / units_total as u64;
        let broken = |stored: &Stored, error: std::io::Error| stored.broken(error.to_string());
        let mut bytes = Vec::new();
        for &unit in units {
            let gap = unit.saturating_sub(self.unit) as u64;
            stream.skip(gap * unit_bytes).map_err(|e| broken(stored, e))?;
            bytes.append(&mut stream.read_bytes(unit_bytes).map_err(|e| broken(stored, e))?);
            self.unit = unit + 1;
        }
        elements(stored, *dtype, dims, bytes)
    }
}

/// A tensor of the elements as the file stores them.
fn elements(stored: &Stored, dtype: DataType, dims: Vec<usize>, mut bytes: Vec<u8>) -> Result<Tensor, SetError> {
    let tensor = match stored.header.elements {
        Elements::Plain { swapped, .. } => {
            if swapped {
                bytes.chunks_exact_mut(stored.header.elements.width()).for_each(<[u8]>::reverse);
            }
            Tensor::new(dtype, dims, bytes)
        }
        Elements::Raw { .. } => Tensor::new(dtype, dims, bytes),
        Elements::Text { unicode, swapped, width } => {
            let wide = stored.header.elements.width();
            let strings = match width {
                0 => vec![Bytes::new(); lathe_ir::element_count(&dims).unwrap_or(0)],
                _ => bytes
                    .chunks_exact(wide)
                    .map(|text| string(text, unicode, swapped))
                    .collect::<Option<Vec<_>>>()
                    .ok_or_else(|| stored.broken("a string in it is not Unicode"))?,
            };
            Tensor::strings(dims, strings)
        }
    };
    tensor.map_err(|e| stored.broken(e.to_string()))
}

/// A string without the zeros that fill it up.
fn string(text: &[u8], unicode: bool, swapped: bool) -> Option<Bytes> {
    if !unicode {
        let end = text.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        return Some(Bytes::copy_from_slice(&text[..end]));
    }
    let code = |&b: &[u8; 4]| if swapped { u32::from_be_bytes(b) } else { u32::from_le_bytes(b) };
    let codes: Vec<u32> = text.as_chunks::<4>().0.iter().map(code).collect();
    let end = codes.iter().rposition(|&c| c != 0).map_or(0, |last| last + 1);
    let text: Option<String> = codes[..end].iter().map(|&c| char::from_u32(c)).collect();
    text.map(|text| text.into_bytes().into())
}

#[cfg(test)]
mod tests;
