//! The network of the user that sees features in images.

use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_analysis::Evaluate;
use lathe_ir::{Model, Tensor};
use lathe_runtime::{Features, SampleSet, SetSpec, required_inputs};
use std::path::Path;

/// Images of a set that run together.
const BATCH: usize = 32;

/// A network that gives a row of features per image.
pub(super) struct Extractor<'a> {
    model: Model,
    input: String,
    evaluator: &'a (dyn Evaluate + Sync),
}

impl<'a> Extractor<'a> {
    /// Reads the network; its first output counts.
    pub fn read(path: &Path, evaluator: &'a (dyn Evaluate + Sync)) -> Result<Extractor<'a>, Failure> {
        let model = Model::read(path).with_context(|| format!("cannot use `{}`", path.display()))?.model;
        let inputs: Vec<String> = required_inputs(&model.graph).map(|v| model.graph.value(v).name.clone()).collect();
        let [input] = inputs.as_slice() else {
            let message = format!("`{}` has {} inputs, expected one for images", path.display(), inputs.len());
            return Err(Failure::Usage(message));
        };
        Ok(Extractor { input: input.clone(), model, evaluator })
    }

    /// What the network gives for images, one tensor per output; the first is their features.
    pub fn see(&self, images: &Tensor) -> Result<Vec<Tensor>, Failure> {
        let outputs = self.evaluator.run(&self.model, &[(self.input.clone(), images.clone())]);
        let outputs = outputs.context("the features of samples cannot be computed")?;
        if outputs.is_empty() {
            return Err(Failure::Error(anyhow!("the network of the features has no output")));
        }
        Ok(outputs.into_iter().map(|(_, tensor)| tensor).collect())
    }

    /// Adds the features of images.
    pub fn add(&self, images: &Tensor, to: &mut Features) -> Result<(), Failure> {
        Ok(to.push(&self.see(images)?[0])?)
    }

    /// The features of at most `most` images of a set, spread over it.
    pub fn of_set(&self, spec: &SetSpec, most: usize) -> Result<Features, Failure> {
        let set = SampleSet::open(&SetSpec { batch: Some(BATCH), ..spec.clone() }, &self.model)?;
        let chosen = (most < set.len()).then(|| set.spread(most));
        let set = match chosen {
            Some(chosen) => {
                let some = SetSpec { batch: Some(BATCH), chosen: Some(chosen), ..spec.clone() };
                SampleSet::open(&some, &self.model)?
            }
            None => set,
        };
        let mut features = Features::new();
        for batch in set.batches() {
            let batch = batch?;
            let images = batch.inputs.iter().find(|(name, _)| *name == self.input);
            let images = images.ok_or_else(|| anyhow!("the set holds no `{}`", self.input))?;
            self.add(&images.1, &mut features)?;
        }
        Ok(features)
    }
}
