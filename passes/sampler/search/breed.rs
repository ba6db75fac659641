//! New candidates from old ones.

use super::{Candidate, SearchOptions};
use lathe_analysis::Random;
use std::collections::BTreeSet;

/// The chance of every timestep to change.
const CHANGE: f64 = 0.25;
/// The same for the mutants that stand beside the seeds.
const CHANGE_OF_SEEDS: f64 = 0.1;
/// Shares of mutants and of children of two parents in a generation; the others are random.
const MUTANTS: f64 = 0.5;
const CHILDREN: f64 = 0.3;
/// How often a candidate that exists already is tried again before fewer are made.
const TRIES: usize = 20;

/// Makes candidates.
pub(super) struct Breeder<'a> {
    options: &'a SearchOptions,
    random: Random,
}

impl<'a> Breeder<'a> {
    pub fn new(options: &'a SearchOptions) -> Breeder<'a> {
        Breeder { options, random: Random::new(options.seed) }
    }

    /// The seeds, mutants of them and random candidates, half each.
    pub fn first(&mut self, seeds: &[Candidate], size: usize) -> Vec<Candidate> {
        let mut made: Vec<Candidate> = seeds.to_vec();
        let mut seen: BTreeSet<String> = made.iter().map(Candidate::key).collect();
        let missing = size.saturating_sub(made.len());
        let mutants = if seeds.is_empty() { 0 } else { missing / 2 };
        for index in 0..missing {
            let one = self.fresh(&mut seen, |breeder| match index < mutants {
                true => breeder.mutant(&seeds[index % seeds.len()], CHANGE_OF_SEEDS, 0),
                false => breeder.random(),
            });
            made.extend(one);
        }
        made
    }

    /// The next generation, without what was `seen`; no candidate leaves out more than `limit` layers.
    pub fn next(
        &mut self,
        parents: &[&Candidate],
        seen: &BTreeSet<String>,
        size: usize,
        limit: usize,
    ) -> Vec<Candidate> {
        let mut seen = seen.clone();
        let mutants = (size as f64 * MUTANTS).round() as usize;
        let children = (size as f64 * CHILDREN).round() as usize;
        let make = |breeder: &mut Breeder, index: usize| {
            let first = parents[breeder.random.index(parents.len())];
            let second = parents[breeder.random.index(parents.len())];
            match index {
                _ if index < mutants => breeder.mutant(first, CHANGE, limit),
                _ if index < mutants + children => breeder.child(first, second, limit),
                _ => breeder.random(),
            }
        };
        (0..size).filter_map(|index| self.fresh(&mut seen, |breeder| make(breeder, index))).collect()
    }

    /// Something that was not seen before, if it is found.
    fn fresh(
        &mut self,
        seen: &mut BTreeSet<String>,
        mut make: impl FnMut(&mut Self) -> Candidate,
    ) -> Option<Candidate> {
        (0..TRIES).map(|_| make(self)).find(|candidate| seen.insert(candidate.key()))
    }

    fn random(&mut self) -> Candidate {
        self.complete(Vec::new())
    }

    /// A candidate with some of its timesteps moved to a free place, near or anywhere, and up to one layer left out,
    /// taken back or both.
    fn mutant(&mut self, of: &Candidate, change: f64, limit: usize) -> Candidate {
        let reach = (self.options.train / (2 * self.options.steps)).max(1);
        let mut steps: Vec<(usize, BTreeSet<usize>)> = Vec::new();
        // At least one timestep moves, unless a layer changes.
        let moved =
            if limit == 0 || self.random.chance(0.5) { self.random.index(self.options.steps) } else { usize::MAX };
        for (index, (&time, skips)) in of.times.iter().zip(&of.skips).enumerate() {
            let mut time = time;
            if index == moved || self.random.chance(change) {
                time = match self.random.chance(0.5) {
                    true => self.random.index(self.options.train),
                    false => {
                        let shifted = (time + 1 + self.random.index(2 * reach)).saturating_sub(reach + 1);
                        shifted.min(self.options.train - 1)
                    }
                };
            }
            steps.push((time, skips.clone()));
        }
        let mut made = self.complete(steps);
        if limit > 0 {
            let (step, layer) = (self.random.index(self.options.steps), self.random.index(self.options.layers));
            if !made.skips[step].remove(&layer) {
                made.skips[step].insert(layer);
            }
        }
        self.limit(&mut made, limit);
        made
    }

    /// At every position the timestep of either parent, with what is left out there.
    fn child(&mut self, first: &Candidate, second: &Candidate, limit: usize) -> Candidate {
        let mut steps = Vec::new();
        for index in 0..self.options.steps {
            let parent = if self.random.chance(0.5) { first } else { second };
            steps.push((parent.times[index], parent.skips[index].clone()));
        }
        let mut made = self.complete(steps);
        self.limit(&mut made, limit);
        made
    }

    /// Sorts steps, drops those of equal time and adds random ones until there are enough.
    fn complete(&mut self, mut steps: Vec<(usize, BTreeSet<usize>)>) -> Candidate {
        steps.sort_by_key(|step| std::cmp::Reverse(step.0));
        steps.dedup_by_key(|step| step.0);
        while steps.len() < self.options.steps {
            let time = self.random.index(self.options.train);
            let at = steps.partition_point(|step| step.0 > time);
            if steps.get(at).is_none_or(|step| step.0 != time) {
                steps.insert(at, (time, BTreeSet::new()));
            }
        }
        let (times, skips) = steps.into_iter().unzip();
        Candidate { times, skips }
    }

    /// Takes back layers at random until no more than `limit` are left out.
    fn limit(&mut self, candidate: &mut Candidate, limit: usize) {
        while candidate.skipped() > limit {
            let all: Vec<(usize, usize)> =
                candidate.skips.iter().enumerate().flat_map(|(step, l)| l.iter().map(move |&l| (step, l))).collect();
            let (step, layer) = all[self.random.index(all.len())];
            candidate.skips[step].remove(&layer);
        }
    }
}
