//! The control flow of a sampler: the one that was asked for, or the first that a runtime can load.

use super::{
    Compiled, Job,
    check::{self, Checked},
};
use crate::{Failure, pipeline};
use lathe_ir::Model;
use lathe_passes::sampler::{Form, Sampler, StepPlan, emit};
use lathe_runtime::LoadOptions;
use std::time::Duration;

/// Nodes above which steps are not put side by side.
const MOST_NODES: usize = 20_000;

/// Packed copies of weights that steps side by side may take when nothing else is said, in bytes: a runtime packs the
/// weights of every node for itself.
const MOST_PACKED: u64 = 4 << 30;

/// Time after which loading steps side by side is given up for a loop.
const MOST_LOADING: Duration = Duration::from_secs(60);

/// What can be told about the form before anything is made.
pub(super) fn likely_form(denoiser: &Model, plan: &StepPlan, memory: Option<u64>) -> Form {
    let evaluations: usize = plan.cfg.iter().map(|mode| mode.passes().len()).sum();
    let nodes = pipeline::node_count(denoiser).saturating_mul(evaluations);
    let packed = pipeline::weight_bytes(denoiser).saturating_mul(evaluations as u64);
    let most = memory.map_or(MOST_PACKED, |memory| memory / 2);
    // Passes of a batch are one evaluation; whoever is near the bound is better off with a loop anyway.
    if nodes > 2 * MOST_NODES || packed > most { Form::Loop } else { Form::Unrolled }
}

impl Job<'_> {
    /// Compiles a sampler of the form that was asked for, or of the first that fits, and compares it.
    pub(super) fn compile(&self, sampler: &Sampler, warnings: &mut Vec<String>) -> Result<Compiled, Failure> {
        let form = match (self.options.form, sampler.plan.adaptive) {
            (Some(form), _) => form,
            (None, Some(_)) => Form::Adaptive,
            (None, None) if sampler.plan.sizes.is_some() => Form::Unrolled,
            (None, None) => likely_form(sampler.denoiser, sampler.plan, self.options.run.memory),
        };
        let compiled = self.compile_as(sampler, form)?;
        if self.options.form.is_some() || form != Form::Unrolled || sampler.plan.sizes.is_some() {
            return Ok(compiled);
        }
        let nodes = pipeline::node_count(&compiled.model);
        let slow = self.loading(&compiled)?.filter(|&time| time > MOST_LOADING);
        if nodes <= MOST_NODES && slow.is_none() {
            return Ok(compiled);
        }
        let why = match slow {
            Some(time) => format!("it takes {:.0} s to load", time.as_secs_f64()),
            None => format!("it has {nodes} nodes"),
        };
        let looped = self.compile_as(sampler, Form::Loop)?;
        if pipeline::node_count(&looped.model) < nodes {
            warnings.push(format!("the form is loop, because with its steps side by side {why}"));
            return Ok(looped);
        }
        warnings.push(format!("with its steps side by side {why}, and no steps of the plan repeat"));
        Ok(compiled)
    }

    /// How long the runtime takes to load a model; `None` where it is not worth asking.
    fn loading(&self, compiled: &Compiled) -> Result<Option<Duration>, Failure> {
        const FEW: usize = MOST_NODES / 8;
        if !self.options.verify || pipeline::node_count(&compiled.model) < FEW {
            return Ok(None);
        }
        let options = LoadOptions { optimize: true, ..self.options.run.load.clone() };
        Ok(check::loading(self.runner, compiled.staged.path(), &options)?)
    }

    fn compile_as(&self, sampler: &Sampler, form: Form) -> Result<Compiled, Failure> {
        let inner = emit(sampler, form, self.runner)?;
        let model = match &self.stages {
            Some(stages) => stages.around(&inner)?,
            None => inner,
        };
        let staged = model.stage(&self.options.output, &self.write)?;
        let checked = if self.options.verify { check::check(self, sampler, staged.path())? } else { Checked::Not };
        Ok(Compiled { model, staged, form, checked })
    }
}
