//! Which timesteps to visit, and which layers to leave out at each: evolution of candidates.
//!
//! The search asks a [`Scorer`] for every candidate and knows nothing of models: with the same seed and the same scores it
//! takes the same way, so a scorer that remembers its answers makes a search that goes on where it was interrupted.
//! Source: Li et al. 2023, AutoDiffusion, arXiv:2309.10438.

mod breed;
mod path;

pub use path::shortest;

use super::Error;
use breed::Breeder;
use std::collections::{BTreeMap, BTreeSet};

/// Timesteps and what is left out at each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Candidate {
    /// The timesteps, noisy ones first, all different.
    pub times: Vec<usize>,
    /// For every timestep the layers that are left out.
    pub skips: Vec<BTreeSet<usize>>,
}

impl Candidate {
    /// All layers at these timesteps.
    pub fn plain(times: Vec<usize>) -> Candidate {
        Candidate { skips: vec![BTreeSet::new(); times.len()], times }
    }

    /// How many layers are left out over all steps.
    pub fn skipped(&self) -> usize {
        self.skips.iter().map(BTreeSet::len).sum()
    }

    /// A text that tells it from other candidates: `901 640:3+7 201`.
    pub fn key(&self) -> String {
        let step = |(time, skips): (&usize, &BTreeSet<usize>)| {
            let layers: Vec<String> = skips.iter().map(usize::to_string).collect();
            if layers.is_empty() { time.to_string() } else { format!("{time}:{}", layers.join("+")) }
        };
        self.times.iter().zip(&self.skips).map(step).collect::<Vec<_>>().join(" ")
    }
}

/// Says how good candidates are. `E` is why it cannot.
pub trait Scorer<E = Error> {
    /// A distance from what is wanted; smaller is better. Not a number counts as worst.
    fn score(&mut self, candidate: &Candidate) -> Result<f64, E>;

    /// How many candidates it scores at a time.
    fn at_a_time(&self) -> usize {
        1
    }

    /// The scores of several candidates, in their order: each the same as alone.
    fn score_all(&mut self, candidates: &[Candidate]) -> Result<Vec<f64>, E> {
        candidates.iter().map(|candidate| self.score(candidate)).collect()
    }
}

/// How to search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SearchOptions {
    /// How many timesteps a candidate has.
    pub steps: usize,
    /// Timesteps are below this.
    pub train: usize,
    /// How many candidates are scored.
    pub evaluations: usize,
    /// How many layers could be left out at a step.
    pub layers: usize,
    /// The share of all layers over all steps that may be left out in the second stage; 0 for no second stage.
    pub most_skipped: f64,
    /// What chance depends on.
    pub seed: u64,
}

/// A candidate and its score.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The candidate.
    pub candidate: Candidate,
    /// Its score.
    pub score: f64,
}

/// How many of the best candidates have children.
const PARENTS: usize = 10;
/// Candidates of one generation, where there are evaluations enough for eight.
const POPULATION: usize = 50;
/// The first stage ends after this many generations at the latest.
const FIRST_STAGE: usize = 4;
/// In so many generations the second stage reaches the share that may be left out.
const RISE: f64 = 5.0;

/// Scores candidates, `seeds` first, and returns all of them, the best first; of equal ones the earlier.
///
/// In a first stage only timesteps change, until the best candidate stays or some generations have passed; in a second
/// one, more and more layers may be left out. `tell` hears of every score, with the best so far.
pub fn search<E: From<Error>>(
    options: &SearchOptions,
    seeds: &[Candidate],
    scorer: &mut dyn Scorer<E>,
    tell: &mut dyn FnMut(usize, &Scored, &Scored),
) -> Result<Vec<Scored>, E> {
    if options.steps == 0 || options.steps > options.train || options.evaluations == 0 {
        let message = format!(
            "{} evaluations for {} of {} timesteps, expected at least one of each",
            options.evaluations, options.steps, options.train
        );
        return Err(Error::Plan(message).into());
    }
    if let Some(bad) = seeds.iter().find(|s| !fits(s, options)) {
        return Err(Error::Plan(format!("the search cannot start at `{}`", bad.key())).into());
    }
    let size = (options.evaluations / 8).clamp(PARENTS.min(options.evaluations), POPULATION);
    let mut breeder = Breeder::new(options);
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut ranked: Vec<Scored> = Vec::new();
    let mut share = None;
    let mut generation = breeder.first(seeds, size);
    for epoch in 0.. {
        let before = ranked.first().map(|best| best.candidate.key());
        let fresh: Vec<Candidate> = generation.into_iter().filter(|c| seen.insert(c.key())).collect();
        if fresh.is_empty() {
            break;
        }
        for some in fresh[..fresh.len().min(options.evaluations - ranked.len())].chunks(scorer.at_a_time().max(1)) {
            for (candidate, score) in some.iter().zip(scorer.score_all(some)?) {
                let score = if score.is_nan() { f64::INFINITY } else { score };
                let scored = Scored { score, candidate: candidate.clone() };
                let at = ranked.partition_point(|other| other.score <= scored.score);
                ranked.insert(at, scored.clone());
                tell(ranked.len(), &scored, &ranked[0]);
            }
        }
        if ranked.len() == options.evaluations {
            return Ok(ranked);
        }
        let stays = before.is_some() && before == ranked.first().map(|best| best.candidate.key());
        if share.is_some() || stays || epoch >= FIRST_STAGE {
            let grown = share.unwrap_or(0.0) + options.most_skipped / RISE;
            share = Some(grown.min(options.most_skipped));
        }
        let limit = share.unwrap_or(0.0) * (options.layers * options.steps) as f64;
        let parents: Vec<&Candidate> = ranked.iter().take(PARENTS).map(|s| &s.candidate).collect();
        generation = breeder.next(&parents, &seen, size, limit.floor() as usize);
    }
    Ok(ranked)
}

fn fits(candidate: &Candidate, options: &SearchOptions) -> bool {
    let times = &candidate.times;
    times.len() == options.steps
        && candidate.skips.len() == options.steps
        && times.first().is_some_and(|&t| t < options.train)
        && times.windows(2).all(|pair| pair[0] > pair[1])
        && candidate.skips.iter().flatten().all(|&layer| layer < options.layers)
}

/// Remembers scores, so that a candidate is scored once whoever asks.
pub struct Remembering<'a, E = Error> {
    known: BTreeMap<String, f64>,
    scorer: &'a mut dyn Scorer<E>,
    /// Hears of every new score before it is used.
    keep: &'a mut dyn FnMut(&str, f64) -> Result<(), E>,
}

impl<'a, E> Remembering<'a, E> {
    /// Answers from `known` where it can, else from `scorer`, and tells `keep`.
    pub fn new(
        known: BTreeMap<String, f64>,
        scorer: &'a mut dyn Scorer<E>,
        keep: &'a mut dyn FnMut(&str, f64) -> Result<(), E>,
    ) -> Remembering<'a, E> {
        Remembering { known, scorer, keep }
    }
}

impl<E> Scorer<E> for Remembering<'_, E> {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, E> {
        let key = candidate.key();
        if let Some(&score) = self.known.get(&key) {
            return Ok(score);
        }
        let score = self.scorer.score(candidate)?;
        (self.keep)(&key, score)?;
        self.known.insert(key, score);
        Ok(score)
    }

    fn at_a_time(&self) -> usize {
        self.scorer.at_a_time()
    }

    fn score_all(&mut self, candidates: &[Candidate]) -> Result<Vec<f64>, E> {
        let open: Vec<Candidate> = candidates.iter().filter(|c| !self.known.contains_key(&c.key())).cloned().collect();
        for (candidate, score) in open.iter().zip(self.scorer.score_all(&open)?) {
            (self.keep)(&candidate.key(), score)?;
            self.known.insert(candidate.key(), score);
        }
        candidates.iter().map(|candidate| self.score(candidate)).collect()
    }
}

#[cfg(test)]
mod tests;
