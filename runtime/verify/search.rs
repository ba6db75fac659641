//! Runs of a reference on inputs that are made up: the search for sizes it accepts, and the edges of sizes and types.

use super::{ReferenceRun, Stop, Verdict};
use crate::{
    Claim, InputError, RuntimeError, Session, Talk,
    inputs::{Estimate, InputSpec, RunWork, Sizes, Style, edge_sizes, generate, has_mask, has_whole, sizes_to_try},
};
use lathe_ir::Model;

/// All runs of the reference together do no more operations than this, so that they take seconds; one of them may do half
/// of what is left.
const MOST_OPERATIONS: u64 = 100_000_000_000;

/// No run holds more bytes than this at a time.
const MOST_BYTES: u64 = 2 << 30;

/// Where the reference accepts nothing that keeps to these bounds, so many of the lightest other sizes are tried.
const MOST_HEAVY: usize = 2;

/// Two sizes show a dimension that was baked in; more only take longer.
const WANTED: usize = 2;

/// What the worker says before it runs the reference on inputs that may crash the engine: whoever waits for it then leaves
/// these inputs out and asks again.
pub(crate) const AT_EDGE: &str = "running the original at the edge: ";

/// What the worker says before it runs the candidate on such inputs.
pub(crate) const RESULT_AT_EDGE: &str = "running the result at the edge: ";

/// Inputs that are not run, by what [`Sizes::label`] calls them, and why.
pub(crate) type LeftOut = (String, String);

/// Which edges are run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Edges<'a> {
    /// Those on which no engine crashes: no size is 0.
    Safe,
    /// All but these.
    AllBut(&'a [LeftOut]),
}

/// Runs of the reference, and what it does not run on.
pub(super) struct ReferenceRuns {
    pub runs: Vec<ReferenceRun>,
    pub left_out: Vec<LeftOut>,
}

/// Finds sizes the reference accepts and runs it on two of them; then at the edges of sizes and types, as far as it runs
/// there and the work is within bounds.
pub(super) fn run_random(
    session: &mut dyn Session,
    model: &Model,
    spec: &InputSpec,
    claim: Claim,
    edges: Edges<'_>,
    talk: &mut dyn Talk,
) -> Result<ReferenceRuns, Stop> {
    let left_out = if let Edges::AllBut(left_out) = edges { left_out.to_vec() } else { Vec::new() };
    let accepted = ReferenceRuns { runs: Vec::new(), left_out };
    let estimate = Estimate::of(model);
    let mut search = InputSearch { session, model, spec, estimate, operations_left: MOST_OPERATIONS, accepted };
    let all_accepted = search.sizes(sizes_to_try(model, spec))?;
    let last = all_accepted.last().expect("a search that ends well has accepted sizes");
    if has_mask(model) {
        search.edge(&last.with_masked_row(), spec, talk)?;
    }
    if has_whole(model) {
        search.edge(&last.with_style(Style::Ends), spec, talk)?;
    }
    if claim == Claim::Identical {
        for round in 0..search.special_rounds() {
            let spec = InputSpec { seed: spec.seed.wrapping_add(round), ..spec.clone() };
            search.edge(&last.with_style(Style::Special), &spec, talk)?;
        }
    }
    for sizes in edge_sizes(model, spec, &all_accepted) {
        match edges {
            Edges::Safe if sizes.has_zero() => {
                let why = "an engine may crash on it, and this process with it";
                search.accepted.left_out.push((sizes.label(), why.to_owned()));
            }
            _ => search.edge(&sizes, spec, talk)?,
        }
    }
    Ok(search.accepted)
}

/// A search for inputs and what it has come to.
struct InputSearch<'a> {
    session: &'a mut dyn Session,
    model: &'a Model,
    spec: &'a InputSpec,
    estimate: Estimate<'a>,
    /// Operations that may still be done.
    operations_left: u64,
    accepted: ReferenceRuns,
}

impl InputSearch<'_> {
    /// Runs at the first sizes that the reference accepts, and returns them.
    fn sizes(&mut self, candidates: Vec<Sizes>) -> Result<Vec<Sizes>, Stop> {
        let open = candidates.iter().any(|sizes| !sizes.describe().is_empty());
        let (mut accepted, mut tried, mut first_error) = (Vec::new(), Vec::new(), None);
        let mut heavy: Vec<(RunWork, Sizes)> = Vec::new();
        let mut run = |search: &mut Self, sizes: Sizes, work: RunWork| {
            let inputs = match generate(search.model, search.spec, &sizes) {
                Ok(inputs) => inputs,
                // Other sizes may be small enough.
                Err(InputError::TooLarge { .. }) if !accepted.is_empty() => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            if tried.last() != Some(&sizes.describe()) {
                tried.push(sizes.describe());
            }
            search.operations_left = search.operations_left.saturating_sub(work.operations);
            match search.session.run(&inputs) {
                Ok(outputs) => {
                    search.accepted.runs.push(ReferenceRun { inputs, outputs, sizes: sizes.label(), edge: false });
                    accepted.push(sizes);
                }
                Err(lost @ RuntimeError::DeviceLost { .. }) => return Err(lost.into()),
                Err(error) => _ = first_error.get_or_insert(error.to_string()),
            }
            Ok::<(), Stop>(())
        };
        for sizes in candidates {
            if self.accepted.runs.len() >= WANTED {
                break;
            }
            let work = self.estimate.at(&sizes);
            match self.affords(work) {
                true => run(self, sizes, work)?,
                false => heavy.push((work, sizes)),
            }
        }
        heavy.sort_by_key(|(work, _)| (work.operations, work.bytes));
        for (work, sizes) in heavy.into_iter().take(MOST_HEAVY) {
            if self.accepted.runs.is_empty() {
                run(self, sizes, work)?;
            }
        }
        if accepted.is_empty() {
            let message = first_error.unwrap_or_else(|| "no inputs could be made for it".to_owned());
            let hint = if open { "; --input-shape states its sizes" } else { "" };
            return Err(Verdict::ReferenceRefused { message: format!("{message}{hint}"), tried }.into());
        }
        Ok(accepted)
    }

    fn affords(&self, work: RunWork) -> bool {
        work.operations <= self.operations_left / 2 && work.bytes <= MOST_BYTES
    }

    /// Small inputs hold few elements, so more of them are needed to meet every special value.
    fn special_rounds(&self) -> u64 {
        let inputs = self.accepted.runs.iter().flat_map(|ran| &ran.inputs);
        let numbers = inputs.filter(|(_, tensor)| tensor.dtype().is_float() || tensor.dtype().is_integer());
        let elements: usize = numbers.map(|(_, tensor)| tensor.len()).sum();
        256usize.checked_div(elements).map_or(0, |rounds| rounds.clamp(1, 8) as u64)
    }

    /// The reference need not accept such inputs; what it accepts has to be kept.
    fn edge(&mut self, sizes: &Sizes, spec: &InputSpec, talk: &mut dyn Talk) -> Result<(), Stop> {
        let label = sizes.label();
        let work = self.estimate.at(sizes);
        if self.accepted.left_out.iter().any(|(known, _)| *known == label) {
            return Ok(());
        }
        if !self.affords(work) {
            self.accepted.left_out.push((label, "that would take too long".to_owned()));
            return Ok(());
        }
        self.operations_left = self.operations_left.saturating_sub(work.operations);
        talk.stage(&format!("{AT_EDGE}{label}"));
        let inputs = generate(self.model, spec, sizes)?;
        match self.session.run(&inputs) {
            Ok(outputs) => self.accepted.runs.push(ReferenceRun { inputs, outputs, sizes: label, edge: true }),
            Err(lost @ RuntimeError::DeviceLost { .. }) => return Err(lost.into()),
            Err(error) => self.accepted.left_out.push((label, error.to_string())),
        }
        Ok(())
    }
}
