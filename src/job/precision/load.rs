//! The file itself: whether the runtime takes it, and what it gives where devices compute in half precision.

use super::{PrecisionOptions, before_choices::only_behind_choices};
use crate::{Failure, job::Job, report::PrecisionReport};
use lathe_passes::precision::Choices;
use lathe_runtime::{Claim, Inputs, Provider, Verdict};
use std::path::Path;

impl Job<'_> {
    /// Loads the file itself and runs it beside a reference. The report says who did, or what a runtime says that has no kernels for the type.
    ///
    /// The tolerance counts where devices compute in half precision. The CPU provider computes it in float32, so that there
    /// a difference is told and no more.
    pub(super) fn load(
        &self,
        [reference, staged]: [&Path; 2],
        asked: PrecisionOptions,
        choices: &Choices,
        report: &mut PrecisionReport,
        warnings: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let claim = Claim::Within { rtol: asked.tolerance() };
        let verdict = match asked.precision.interface {
            // Its inputs are no longer those of the original.
            true => {
                let inputs = Inputs::Random(self.options.run.inputs.clone());
                self.runner.compare(staged, staged, &inputs, Claim::Equivalent { rtol: None })?
            }
            false => self.runner.compare(reference, staged, &self.inputs(), claim)?,
        };
        let reason = verdict.describe();
        let dtype = asked.precision.dtype;
        match verdict {
            Verdict::Compared(found) => {
                let holds = found.comparison.holds();
                let computes = Provider::asked(&self.options.run.load.provider).is_some_and(|p| p.half);
                let by_choice = only_behind_choices(choices, &found.comparison);
                if !holds && !by_choice && (computes || asked.precision.interface) {
                    return Err(Failure::Refused(format!(
                        "the result in {dtype} does not hold when it is run: {reason}"
                    )));
                }
                if !holds {
                    warnings.push(match by_choice {
                        true => format!("run as it is, what hangs on choices differs: {reason}"),
                        false => format!("run as it is, on a provider that computes {dtype} in float32, {reason}"),
                    });
                }
                report.loaded = Some(found.engine);
            }
            Verdict::CandidateRefused { message, .. } | Verdict::ReferenceRefused { message, .. }
                if lacks_kernels(&message) =>
            {
                report.refused_by_runtime = Some(message);
            }
            _ => return Err(Failure::Refused(format!("the result in {dtype} is not run: {reason}"))),
        }
        Ok(())
    }
}

/// Whether a runtime says that it has no kernel of this type for an operator.
fn lacks_kernels(message: &str) -> bool {
    ["NOT_IMPLEMENTED", "Could not find an implementation"].iter().any(|text| message.contains(text))
}
