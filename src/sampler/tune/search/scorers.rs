//! What candidates are worth.

use super::{Candidates, RealImages};
use crate::{Failure, sampler::features::Extractor};
use anyhow::anyhow;
use lathe_ir::Tensor;
use lathe_passes::sampler::search::{Candidate, Scorer};
use lathe_runtime::{Features, kernel};
use std::thread;

/// Images that a score holds samples against.
const IMAGES_OF_SCORE: usize = 1000;

/// The distance between samples and those of the dense sampler from the same noise.
pub(super) struct ByReference<'a> {
    pub candidates: &'a Candidates<'a>,
    pub extractor: Option<&'a Extractor<'a>>,
    /// What is compared of the dense sampler's samples, batch by batch.
    reference: Vec<Vec<f64>>,
}

impl<'a> ByReference<'a> {
    /// The distance from these samples of the dense sampler, batch by batch.
    pub fn new(
        candidates: &'a Candidates<'a>,
        extractor: Option<&'a Extractor<'a>>,
        samples: &[Tensor],
    ) -> Result<ByReference<'a>, Failure> {
        let mut scorer = ByReference { candidates, extractor, reference: Vec::new() };
        scorer.reference = samples.iter().map(|samples| scorer.compared(samples)).collect::<Result<_, _>>()?;
        Ok(scorer)
    }

    /// What is compared of samples: their features, or without a network the samples themselves.
    fn compared(&self, samples: &Tensor) -> Result<Vec<f64>, Failure> {
        match self.extractor {
            Some(extractor) => {
                let mut features = Features::new();
                extractor.add(samples, &mut features)?;
                Ok((0..features.len()).flat_map(|image| features.row(image).to_vec()).collect())
            }
            None => Ok(samples.to_f64s().ok_or_else(|| anyhow!("samples are no real numbers"))?),
        }
    }

    /// How far a candidate's samples are from what is wanted.
    pub fn distance(&self, candidate: &Candidate) -> Result<f64, Failure> {
        let (table, plan) = self.candidates.plan(candidate)?;
        let (mut difference, mut norm) = (0.0, 0.0);
        for (batch, reference) in self.reference.iter().enumerate() {
            let samples = self.candidates.plans.samples(&table, &plan, batch as u64)?;
            if !is_finite(&samples) {
                return Ok(f64::INFINITY);
            }
            let compared = self.compared(&samples)?;
            difference += compared.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            norm += reference.iter().map(|b| b * b).sum::<f64>();
        }
        Ok((difference / norm).sqrt())
    }
}

/// How far a candidate's samples are from what is wanted.
pub(super) type Distance<'a> = dyn Fn(&Candidate) -> Result<f64, Failure> + Sync + 'a;

/// Scores by a distance of samples, of as many candidates at a time as runs go on.
pub(super) struct ByDistance<'a> {
    /// The distance of a candidate's samples from what is wanted.
    pub distance: &'a Distance<'a>,
    pub at_a_time: usize,
}

impl Scorer<Failure> for ByDistance<'_> {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, Failure> {
        (self.distance)(candidate)
    }

    fn at_a_time(&self) -> usize {
        self.at_a_time
    }

    fn score_all(&mut self, candidates: &[Candidate]) -> Result<Vec<f64>, Failure> {
        if let [only] = candidates {
            return Ok(vec![self.score(only)?]);
        }
        let distance = self.distance;
        thread::scope(|scope| {
            let scores: Vec<_> = candidates.iter().map(|candidate| scope.spawn(move || distance(candidate))).collect();
            scores.into_iter().map(|score| score.join().expect("a score is computed or fails")).collect()
        })
    }
}

/// The kernel distance between a set of samples, always from the same noise, and real images.
pub(super) struct ByImages<'a> {
    pub candidates: &'a Candidates<'a>,
    pub images: &'a RealImages<'a>,
    pub batches: u64,
}

impl ByImages<'_> {
    /// How far a candidate's samples are from what is wanted.
    pub fn distance(&self, candidate: &Candidate) -> Result<f64, Failure> {
        let samples = self.candidates.features(candidate, self.images.extractor, 0..self.batches)?;
        let Some(samples) = samples else { return Ok(f64::INFINITY) };
        let seed = self.candidates.plans.inputs.seed;
        Ok(kernel(&samples, &self.images.features, 1, IMAGES_OF_SCORE, seed)?.mean)
    }
}

/// Whether samples are numbers throughout.
pub(super) fn is_finite(samples: &Tensor) -> bool {
    samples.to_f64s().is_none_or(|all| all.iter().all(|v| v.is_finite()))
}
