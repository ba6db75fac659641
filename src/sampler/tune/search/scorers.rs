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

/// Scores by the distance between samples and those of the dense sampler from the same noise.
pub(super) struct ByReference<'a> {
    pub candidates: &'a Candidates<'a>,
    pub extractor: Option<&'a Extractor<'a>>,
    /// What is compared of the dense sampler's samples, batch by batch.
    reference: Vec<Vec<f64>>,
}

impl<'a> ByReference<'a> {
    /// Scores against these samples of the dense sampler, batch by batch.
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
}

impl ByReference<'_> {
    fn distance(&self, candidate: &Candidate) -> Result<f64, Failure> {
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

impl Scorer<Failure> for ByReference<'_> {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, Failure> {
        self.distance(candidate)
    }

    fn at_a_time(&self) -> usize {
        self.candidates.plans.at_a_time
    }

    fn score_all(&mut self, candidates: &[Candidate]) -> Result<Vec<f64>, Failure> {
        at_a_time(candidates, &|candidate| self.distance(candidate))
    }
}

/// What `score` says of every candidate, each on a thread of its own.
fn at_a_time(
    candidates: &[Candidate],
    score: &(dyn Fn(&Candidate) -> Result<f64, Failure> + Sync),
) -> Result<Vec<f64>, Failure> {
    if let [only] = candidates {
        return Ok(vec![score(only)?]);
    }
    thread::scope(|scope| {
        let scores: Vec<_> = candidates.iter().map(|candidate| scope.spawn(move || score(candidate))).collect();
        scores.into_iter().map(|score| score.join().expect("a score is computed or fails")).collect()
    })
}

/// Scores by the kernel distance between a set of samples, always from the same noise, and real images.
pub(super) struct ByImages<'a> {
    pub candidates: &'a Candidates<'a>,
    pub images: &'a RealImages<'a>,
    pub batches: u64,
}

impl ByImages<'_> {
    fn distance(&self, candidate: &Candidate) -> Result<f64, Failure> {
        let samples = self.candidates.features(candidate, self.images.extractor, 0..self.batches)?;
        let Some(samples) = samples else { return Ok(f64::INFINITY) };
        let seed = self.candidates.plans.inputs.seed;
        Ok(kernel(&samples, &self.images.features, 1, IMAGES_OF_SCORE, seed)?.mean)
    }
}

impl Scorer<Failure> for ByImages<'_> {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, Failure> {
        self.distance(candidate)
    }

    fn at_a_time(&self) -> usize {
        self.candidates.plans.at_a_time
    }

    fn score_all(&mut self, candidates: &[Candidate]) -> Result<Vec<f64>, Failure> {
        at_a_time(candidates, &|candidate| self.distance(candidate))
    }
}

/// Whether samples are numbers throughout.
pub(super) fn is_finite(samples: &Tensor) -> bool {
    samples.to_f64s().is_none_or(|all| all.iter().all(|v| v.is_finite()))
}
