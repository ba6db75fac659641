//! The exact part of a job: the passes, the run beside the original, and what is left out until that holds.

use super::{Job, Outcome, Prepared, cost, interface::state_sizes, lines, prepare::state_outputs};
use crate::{
    Failure, PassRecord,
    pipeline::{self, Broken, Run},
    report::Verify,
};
use anyhow::{Context as _, anyhow};
use lathe_ir::{Model, WriteOptions};
use lathe_passes::{Kind, Pass};
use lathe_runtime::{Claim, Inputs, Progress, SetSpec, Verdict};
use std::path::Path;

/// The claim about a whole run. Bits are expected of a single pass only: a runtime packs weights that have become
/// constant, and then sums in another order.
const WHOLE: Claim = Claim::Equivalent { rtol: None };

/// Passes that are dropped one after another before the tool gives up on a model.
const MOST_CULPRITS: usize = 8;

/// What the exact passes made.
pub(super) struct Proven {
    pub outcome: Outcome,
    /// The passes that were left out.
    pub dropped: Vec<PassRecord>,
}

/// The result of the passes, before it is run.
struct Simplified {
    model: Model,
    records: Vec<PassRecord>,
    applied: usize,
}

impl Job<'_> {
    /// Runs the passes, and the result beside the original. A pass that breaks the model is left out, and all run again.
    pub(super) fn simplify_and_prove(
        &self,
        prepared: &Prepared<'_>,
        mut passes: Vec<&dyn Pass>,
        warnings: &mut Vec<String>,
    ) -> Result<Proven, Failure> {
        let Prepared { model: original, target, write, .. } = prepared;
        let mut dropped: Vec<PassRecord> = Vec::new();
        loop {
            let Simplified { mut model, records, applied } = match self.simplify(original, &passes)? {
                Ok(simplified) => simplified,
                Err(broken) => {
                    leave_out(&mut passes, &mut dropped, broken, warnings)?;
                    continue;
                }
            };
            state_outputs(&mut model);
            if !self.options.interface.sizes.is_empty() {
                state_sizes(&mut model);
            }
            model.check().context("the result is not a valid model; this is a fault of this program")?;
            let staged = model.stage(target, write)?;
            let mut verify = None;
            if self.options.verify {
                match self.judge(staged.path())? {
                    Judgement::Holds(found) => verify = Some(*found),
                    Judgement::Fails(reason) if applied == 0 => {
                        return Err(Failure::Refused(format!("the model cannot be verified: {reason}")));
                    }
                    Judgement::Fails(reason) => {
                        drop(staged);
                        let mut holds = |model: &Model| self.holds(model, target, write);
                        let pass = pipeline::bisect(original, &self.context(), &passes, applied, &mut holds)?;
                        leave_out(&mut passes, &mut dropped, Broken { pass, reason }, warnings)?;
                        continue;
                    }
                }
            }
            let outcome = Outcome { model, staged, verify, plan: None, latency: None, precision: None, records };
            return Ok(Proven { outcome, dropped });
        }
    }

    /// Runs the passes on a copy of `prepared`.
    fn simplify(&self, prepared: &Model, passes: &[&dyn Pass]) -> Result<Result<Simplified, Broken>, Failure> {
        let mut model = prepared.clone();
        let cx = self.context();
        let mut seen = prepared.clone();
        let mut trouble = None;
        let mut watch = |model: &Model, pass: &dyn Pass| {
            if !(self.options.paranoid || cfg!(debug_assertions)) {
                return Ok(None);
            }
            let broken = |reason: String| Broken { pass: pass.info().name, reason };
            model.check().map_err(|e| broken(format!("it leaves an invalid model: {e}")))?;
            if !(self.options.paranoid && self.options.verify) {
                return Ok(None);
            }
            match self.compare_models(&seen, model, claim_of(pass.info().kind)) {
                Ok(Verdict::Compared(report)) if report.comparison.holds() => {
                    seen = model.clone();
                    Ok(report.comparison.worst().map(|output| output.rel_l2))
                }
                Ok(verdict) => Err(broken(verdict.describe())),
                Err(error) => {
                    trouble = Some(error);
                    Err(broken(String::new()))
                }
            }
        };
        let count = |model: &Model| cost(model).flops;
        let tell = |done: usize| {
            self.options.run.progress.hear(&Progress::new(done, passes.len(), "passes"));
            !self.options.run.progress.is_stopped()
        };
        let count: Option<&dyn Fn(&Model) -> u64> = if self.options.detailed { Some(&count) } else { None };
        let settings = Run { passes, limit: usize::MAX, watch: &mut watch, count_flops: count, tell: &tell };
        let result = pipeline::run(&mut model, &cx, settings);
        Failure::if_stopped(&self.options.run.progress)?;
        if let Some(error) = trouble {
            return Err(error.into());
        }
        Ok(result.map(|(records, applied)| Simplified { model, records, applied }))
    }

    pub(super) fn inputs(&self) -> Inputs {
        match &self.set {
            // Samples are many where a loss is measured; that the same function is left shows on a few.
            Some((spec, _)) => Inputs::Set(match &self.few {
                Some(few) => SetSpec { chosen: Some(few.clone()), ..spec.clone() },
                None => spec.clone(),
            }),
            None => Inputs::Random(self.options.run.inputs.clone()),
        }
    }

    /// What [`Job::inputs`] are, in the report's word.
    pub(super) fn set_name(&self) -> &'static str {
        self.set.as_ref().map_or("random", |(_, name)| name)
    }

    /// Compares two models in memory, by way of a temporary folder.
    fn compare_models(&self, reference: &Model, candidate: &Model, claim: Claim) -> anyhow::Result<Verdict> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let (a, b) = (folder.path().join("reference.onnx"), folder.path().join("candidate.onnx"));
        reference.write(&a, &WriteOptions::default())?;
        candidate.write(&b, &WriteOptions::default())?;
        self.runner.compare(&a, &b, &self.inputs(), claim)
    }

    /// Whether a model found on the way to the result still does what the original does.
    fn holds(&self, model: &Model, target: &Path, write: &WriteOptions) -> anyhow::Result<bool> {
        let staged = model.stage(target, write)?;
        let verdict = self.runner.compare(self.reference, staged.path(), &self.inputs(), WHOLE)?;
        Ok(verdict.holds())
    }

    fn judge(&self, candidate: &Path) -> Result<Judgement, Failure> {
        let verdict = self
            .runner
            .compare(self.reference, candidate, &self.inputs(), WHOLE)
            .context("the result cannot be run beside the original (--no-verify writes it without proof)")?;
        let reason = verdict.describe();
        match verdict {
            Verdict::Compared(report) if report.comparison.holds() => {
                Ok(Judgement::Holds(Box::new(lines::verify(report, WHOLE, self.set_name()))))
            }
            Verdict::ReferenceRefused { .. } => Err(Failure::Error(anyhow!(
                "{reason}, so the result cannot be verified (--no-verify writes it without proof)"
            ))),
            _ => Ok(Judgement::Fails(reason)),
        }
    }
}

enum Judgement {
    Holds(Box<Verify>),
    Fails(String),
}

/// Removes the broken pass from those that run, and keeps a line about it for the report.
fn leave_out(
    passes: &mut Vec<&dyn Pass>,
    dropped: &mut Vec<PassRecord>,
    broken: Broken,
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    warnings.push(format!("pass `{}` was left out: {}", broken.pass, broken.reason));
    if dropped.len() >= MOST_CULPRITS {
        let message = format!("{} passes failed on this model, the last was `{}`", dropped.len(), broken.pass);
        return Err(Failure::Refused(message));
    }
    let index = passes.iter().position(|p| p.info().name == broken.pass);
    let index = index.ok_or_else(|| anyhow!("pass `{}` failed although it does not run", broken.pass))?;
    let pass = passes.remove(index);
    dropped.push(PassRecord { dropped: Some(broken.reason), ..PassRecord::new(pass.info()) });
    Ok(())
}

fn claim_of(kind: Kind) -> Claim {
    match kind {
        Kind::Identical => Claim::Identical,
        // A pass states its bound for float32; narrower types have the bounds of their own precision.
        _ => Claim::Equivalent { rtol: None },
    }
}
