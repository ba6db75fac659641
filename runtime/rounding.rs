//! What rounding does to the outputs of a model, measured: an output that is as small as the rounding errors of what it
//! is computed from has no digits that a candidate could keep.
//!
//! Two copies of the reference are run, each only when an output exceeds its bound. In one, operands move by at most one
//! unit in the last place (`moved.rs`); what changes is the noise of that output. In the other, half precision is
//! computed in float32 (`widened.rs`); it shows how far the reference itself is from what it stands for.

mod moved;
mod widened;

use crate::{Datum, Engine, Excuse, LoadOptions, Sample, Session, Source, differences::root_mean_square};
use lathe_ir::{Model, Tensor};
use std::{collections::BTreeSet, path::PathBuf};
use tempfile::TempDir;

/// Runs of the copy with moved operands: the larger change counts, since one may happen to cancel.
const DRAWS: usize = 2;

/// A changed copy of a model on disk, which refers to the files that the weights are mapped from.
pub(crate) struct ModelCopy {
    // Removes the folder when it is dropped.
    _folder: TempDir,
    path: PathBuf,
}

impl ModelCopy {
    /// Writes `model` into a folder of its own; `None` where that fails.
    pub(crate) fn write(model: &Model) -> Option<ModelCopy> {
        let folder = tempfile::tempdir().ok()?;
        let path = folder.path().join("model.onnx");
        model.write_linked(&path).ok()?;
        Some(ModelCopy { _folder: folder, path })
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::Path(&self.path)
    }
}

/// A copy that is loaded.
struct Loaded {
    session: Box<dyn Session>,
    _copy: ModelCopy,
}

impl Loaded {
    fn new(engine: &dyn Engine, options: &LoadOptions, model: &Model) -> Option<Loaded> {
        let copy = ModelCopy::write(model)?;
        let session = engine.load(copy.source(), options).ok()?;
        Some(Loaded { session, _copy: copy })
    }

    /// The outputs in the model's order; `None` where the engine does not run the copy.
    fn run(&mut self, inputs: &Sample) -> Option<Vec<Datum>> {
        let outputs = self.session.run(inputs).ok()?;
        Some(outputs.into_iter().map(|(_, datum)| datum).collect())
    }
}

/// An output beyond its bound on one sample.
pub(crate) struct Exceeding<'a> {
    /// Its place among the outputs.
    pub index: usize,
    /// The reference's.
    pub expected: &'a Tensor,
    /// The candidate's.
    pub found: &'a Tensor,
}

/// Measures rounding in a reference. Copies are made when they are first needed and kept for further samples.
pub(crate) struct Rounding<'a> {
    engine: &'a dyn Engine,
    model: &'a Model,
    options: LoadOptions,
    /// The copy with moved operands, and the outputs it is made for.
    moved: Option<(BTreeSet<usize>, Option<Loaded>)>,
    /// The copy in float32; `None` inside where there is none.
    widened: Option<Option<Loaded>>,
}

impl<'a> Rounding<'a> {
    pub(crate) fn new(engine: &'a dyn Engine, model: &'a Model, options: &LoadOptions) -> Rounding<'a> {
        Rounding { engine, model, options: options.clone(), moved: None, widened: None }
    }

    /// What accounts for the errors of outputs on one sample, in the same order.
    pub(crate) fn excuses(&mut self, inputs: &Sample, exceeding: &[Exceeding]) -> Vec<Option<Excuse>> {
        let mut excuses = self.in_float32(inputs, exceeding);
        let unexplained: Vec<usize> = (0..exceeding.len()).filter(|&at| excuses[at].is_none()).collect();
        if !unexplained.is_empty() {
            let rest: Vec<&Exceeding> = unexplained.iter().map(|&at| &exceeding[at]).collect();
            for (at, excuse) in unexplained.into_iter().zip(self.of_noise(inputs, &rest)) {
                excuses[at] = excuse;
            }
        }
        excuses
    }

    /// Holds outputs against the reference computed in float32, where it computes in half precision.
    fn in_float32(&mut self, inputs: &Sample, exceeding: &[Exceeding]) -> Vec<Option<Excuse>> {
        let (engine, model, options) = (self.engine, self.model, &self.options);
        let load = || widened::widened(model).and_then(|copy| Loaded::new(engine, options, &copy));
        let copy = self.widened.get_or_insert_with(load);
        let outputs = copy.as_mut().and_then(|copy| copy.run(inputs));
        let excuse = |e: &Exceeding| {
            let exact = outputs.as_ref()?.get(e.index)?.tensor()?;
            let size = root_mean_square(exact, &zeros(exact)?).filter(|&size| size > 0.0)?;
            let reference = root_mean_square(exact, e.expected)? / size;
            let candidate = root_mean_square(exact, e.found)? / size;
            (candidate <= Excuse::HALVES * reference).then_some(Excuse::HalfPrecision { candidate, reference })
        };
        exceeding.iter().map(excuse).collect()
    }

    /// Holds differences against what moved operands change.
    fn of_noise(&mut self, inputs: &Sample, exceeding: &[&Exceeding]) -> Vec<Option<Excuse>> {
        let wanted: BTreeSet<usize> = exceeding.iter().map(|e| e.index).collect();
        if self.moved.as_ref().is_none_or(|(made, _)| !wanted.is_subset(made)) {
            let copy = moved::moved(self.model, &wanted);
            let copy = copy.and_then(|copy| Loaded::new(self.engine, &self.options, &copy));
            self.moved = Some((wanted, copy));
        }
        let copy = self.moved.as_mut().and_then(|(_, copy)| copy.as_mut());
        let Some(copy) = copy else { return vec![None; exceeding.len()] };
        let runs: Vec<Vec<Datum>> = (0..DRAWS).map_while(|_| copy.run(inputs)).collect();
        let excuse = |e: &&Exceeding| {
            let change = |run: &Vec<Datum>| root_mean_square(e.expected, run.get(e.index)?.tensor()?);
            let changes: Option<Vec<f64>> = runs.iter().map(change).collect();
            let noise = changes?.into_iter().fold(0.0, f64::max);
            let error = root_mean_square(e.expected, e.found)?;
            (noise > 0.0 && error <= Excuse::NOISES * noise).then_some(Excuse::Rounding { error, noise })
        };
        exceeding.iter().map(excuse).collect()
    }
}

fn zeros(like: &Tensor) -> Option<Tensor> {
    Tensor::from_f64s(like.dtype(), like.dims(), &vec![0.0; like.len()])
}
