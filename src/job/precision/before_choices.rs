//! What hangs on choices is judged by what is chosen among.

use crate::{Failure, job::Job};
use lathe_ir::Model;
use lathe_passes::precision::{Choices, Simulation, watch_errors};
use lathe_runtime::{Claim, Comparison, Fault, Report, Verdict};

impl Job<'_> {
    /// Where only outputs that hang on choices differ, holds what is chosen among to the bound in their place: of nearly
    /// equal candidates any rounding may choose another.
    pub(super) fn compare_before_choices(
        &self,
        prepared: &Model,
        simulation: &Simulation,
        rtol: f64,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let choices = Choices::of(prepared);
        if choices.candidates.is_empty() || !only_behind_choices(&choices, &report.comparison) {
            return Ok(());
        }
        let (reference, rounded, names) = watch_errors(prepared, simulation, &choices.candidates);
        let Verdict::Compared(mut found) =
            self.compare_on(&reference, &rounded, &self.inputs(), Claim::Within { rtol })?
        else {
            return Ok(());
        };
        let error = found.comparison.worst().map_or(0.0, |output| output.rel_l2);
        for fault in &mut found.comparison.faults {
            if let Fault::TooFar { output, .. } | Fault::Differs { output, .. } = fault
                && let Some(&value) = names.get(output)
            {
                output.clone_from(&prepared.graph.value(value).name);
            }
        }
        report.comparison.faults = found.comparison.faults;
        let reason = format!(
            "rounding may choose another of nearly equal candidates; those have a relative L2 error of {error:.1e} \
             (limit {rtol:.0e})"
        );
        for &at in &choices.outputs {
            if let Some(output) = report.comparison.outputs.get_mut(at) {
                output.uncompared = Some(reason.clone());
            }
        }
        Ok(())
    }
}

/// Whether all that differs are outputs that hang on choices.
pub(super) fn only_behind_choices(choices: &Choices, comparison: &Comparison) -> bool {
    let hangs = |name: &str| {
        let at = comparison.outputs.iter().position(|output| output.name == name);
        at.is_some_and(|at| choices.outputs.contains(&at))
    };
    comparison.faults.iter().all(|fault| match fault {
        Fault::TooFar { output, .. } | Fault::Differs { output, .. } => hangs(output),
        Fault::Count { .. } | Fault::Name { .. } => false,
    })
}
