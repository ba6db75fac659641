//! What one comparison gathers: which outputs can be compared, how far they are apart, and what accounts for it.

use super::{Report, Verification};
use crate::{
    Claim, Datum, Fault, Sample, Session, Talk, compare,
    compare::{Unsteadies, Unsteady, compare_steady},
    rounding::{Exceeding, Rounding},
};
use std::collections::BTreeSet;

/// Runs in which an output that is random in the reference has to differ once in the candidate.
const TRIES: usize = 8;

pub(super) struct Judge<'a> {
    pub report: Report,
    claim: Claim,
    /// Outputs of which only type and shape are compared.
    unsteady: Unsteadies,
    /// Outputs that differed between two runs of the reference.
    varying: BTreeSet<String>,
    /// Outputs that depend on random numbers: a further run of the reference draws others, so that noise cannot be told
    /// from them.
    drawn: BTreeSet<String>,
    rounding: Rounding<'a>,
}

impl<'a> Judge<'a> {
    pub fn new(verification: &Verification<'a>) -> Judge<'a> {
        Judge {
            report: Report { engine: verification.engine.name(), ..Report::default() },
            claim: verification.task.claim,
            unsteady: Unsteadies::new(),
            varying: BTreeSet::new(),
            drawn: BTreeSet::new(),
            rounding: Rounding::new(verification.engine, verification.task.model, &verification.reference_options),
        }
    }

    /// Learns which outputs depend on random numbers, and which of them on operators that could not be seeded alike.
    pub fn random(&mut self, drawn: &BTreeSet<String>, loose: &BTreeSet<String>) {
        self.drawn.clone_from(drawn);
        for name in loose {
            let reason = "it is random, and what draws its numbers is not found in both models".to_owned();
            self.unsteady.insert(name.clone(), Unsteady { reason, shape: false });
        }
    }

    /// Learns from two runs of the reference on one sample which outputs are the same in both.
    pub fn repeated(&mut self, first: &[(String, Datum)], second: &[(String, Datum)]) {
        // Rounding may differ from run to run where threads add up in whatever order they finish.
        let steady = compare(first, second, self.claim);
        for output in steady.faulty() {
            self.varying.insert(output.to_owned());
            let of = |all: &[(String, Datum)]| {
                let datum = all.iter().find(|(name, _)| name == output).map(|(_, datum)| datum);
                datum.map(Datum::describe)
            };
            let shape = of(first) != of(second);
            let unsteady = self.unsteady.entry(output.to_owned()).or_insert_with(|| Unsteady {
                reason: "it differs from run to run of the original".to_owned(),
                shape: false,
            });
            unsteady.shape |= shape;
        }
    }

    /// Learns from two runs of one session of the reference which of the outputs that could not be seeded are random.
    pub fn redrawn(&mut self, first: &[(String, Datum)], second: &[(String, Datum)]) {
        let compared = compare(first, second, Claim::Identical);
        let random = compared.faulty().filter(|&output| self.unsteady.contains_key(output));
        self.varying.extend(random.map(str::to_owned));
    }

    /// Whether an output is random in the reference and could not be seeded.
    pub fn has_random(&self) -> bool {
        !self.varying.is_empty()
    }

    /// Compares the outputs of one sample, and measures rounding where one exceeds its bound.
    pub fn compare(
        &mut self,
        inputs: &Sample,
        before: &[(String, Datum)],
        after: &[(String, Datum)],
        talk: &mut dyn Talk,
    ) {
        let mut compared = compare_steady(before, after, self.claim, &self.unsteady);
        let excusable = !matches!(self.claim, Claim::Within { .. });
        let names = if excusable { compared.too_far() } else { Vec::new() };
        let exceeding = |name: &String| {
            let index = before.iter().position(|(other, _)| other == name).filter(|_| !self.drawn.contains(name))?;
            let (expected, found) = (before[index].1.tensor()?, after[index].1.tensor()?);
            Some((name.clone(), Exceeding { index, expected, found }))
        };
        let (names, exceeding): (Vec<String>, Vec<Exceeding>) = names.iter().filter_map(exceeding).unzip();
        if !exceeding.is_empty() {
            talk.stage("measuring how the original rounds");
            for (name, excuse) in names.iter().zip(self.rounding.excuses(inputs, &exceeding)) {
                if let Some(excuse) = excuse {
                    compared.excuse(name, excuse);
                }
            }
        }
        self.report.comparison.merge(compared);
    }

    /// Runs the candidate again: what is random in the reference has to be random in the candidate.
    pub fn still_random(&mut self, session: &mut dyn Session, inputs: &Sample, outputs: &[(String, Datum)]) {
        let mut frozen = self.varying.clone();
        for _ in 0..TRIES {
            if frozen.is_empty() {
                return;
            }
            // A run that fails has been reported where it matters.
            let Ok(again) = session.run(inputs) else { return };
            for output in compare(outputs, &again, Claim::Identical).faulty() {
                frozen.remove(output);
            }
        }
        for output in frozen {
            let message = "it is random in the original, and the same in every run of the result".to_owned();
            self.report.comparison.faults.push(Fault::Differs { output, message });
        }
    }
}
