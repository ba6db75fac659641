//! The denoiser of a job: read once, simplified once, whoever asks for it.

use crate::{
    Failure, PassRecord, job,
    pipeline::{self, Run},
    report::Side,
    runner::Runner,
};
use anyhow::Context as _;
use lathe_ir::{DataType, Dim, External, Model, Type};
use lathe_passes::{
    PASSES, Pass, PassContext,
    sampler::{OPSET, RoleOptions, Roles, StepPlan, Table},
};
use lathe_runtime::{Listener, Progress};
use std::{cell::OnceCell, path::Path};

/// The denoiser of a job.
pub(super) struct Denoiser {
    /// As it was read, in order and with unique names.
    pub original: Model,
    pub roles: Roles,
    /// Its line of the report.
    pub side: Side,
    /// What was odd about it.
    pub warnings: Vec<String>,
    /// Where weights of its samplers go: beside them, if they are beside the denoiser.
    pub external: External,
    simplified: OnceCell<Simplified>,
}

/// The denoiser after the exact passes.
pub(super) struct Simplified {
    pub model: Model,
    /// What the passes did; none where one failed.
    pub records: Vec<PassRecord>,
}

impl Denoiser {
    /// Reads a denoiser and finds out what its inputs are.
    pub fn read(path: &Path, options: &RoleOptions) -> Result<Denoiser, Failure> {
        let loaded = Model::read(path).with_context(|| format!("cannot use `{}`", path.display()))?;
        let data: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
        let side = job::side(path, &loaded.model, loaded.file_bytes + data);
        let (mut original, mut warnings) = (loaded.model, loaded.warnings);
        warnings.extend(job::prepare(&mut original)?);
        let roles = Roles::infer(&original, options)?;
        let external = if loaded.data_files.is_empty() { External::Auto } else { External::Always };
        Ok(Denoiser { original, roles, side, warnings, external, simplified: OnceCell::new() })
    }

    /// A sentence where the network takes whole times only and steps have others.
    pub fn rounded_times(&self, table: &Table) -> Option<String> {
        let graph = &self.original.graph;
        let elem = graph.find_value(&self.roles.time).and_then(|v| graph.value(v).ty.as_ref()?.elem());
        let rounded = table.rows.iter().filter(|row| self.roles.time_of(row).fract() != 0.0).count();
        (rounded > 0 && elem.is_some_and(DataType::is_integer)).then(|| {
            let (name, all) = (&self.roles.time, table.rows.len());
            format!("`{name}` takes whole numbers, and {rounded} of {all} times have fractions, which are rounded")
        })
    }

    /// The denoiser after the exact passes, upgraded to what samplers are written in.
    pub fn simplified(&self, runner: &Runner, progress: &Listener) -> Result<&Simplified, Failure> {
        if let Some(simplified) = self.simplified.get() {
            return Ok(simplified);
        }
        let simplified = self.simplify(runner, progress)?;
        Ok(self.simplified.get_or_init(|| simplified))
    }

    fn simplify(&self, runner: &Runner, progress: &Listener) -> Result<Simplified, Failure> {
        let mut model = self.original.clone();
        let mut watch = |_: &Model, _: &dyn Pass| Ok(None);
        let tell = |done: usize| {
            progress.hear(&Progress::new(done, PASSES.len(), "passes"));
            !progress.is_stopped()
        };
        let run = Run { passes: PASSES, limit: usize::MAX, watch: &mut watch, count_flops: None, tell: &tell };
        let result = pipeline::run(&mut model, &self.context(runner), run);
        Failure::if_stopped(progress)?;
        match result {
            Ok((records, _)) => Ok(Simplified { model, records }),
            Err(_) => Ok(Simplified { model: self.upgraded(runner)?, records: Vec::new() }),
        }
    }

    /// The denoiser in the operator set that samplers are written in, otherwise as it is.
    pub fn upgraded(&self, runner: &Runner) -> Result<Model, Failure> {
        let mut model = self.original.clone();
        if model.opset() < OPSET {
            let upgrade = PASSES.iter().find(|p| p.info().name == "upgrade-opset").expect("the pass is registered");
            upgrade.apply(&mut model, &self.context(runner))?;
        }
        Ok(model)
    }

    fn context<'a>(&self, runner: &'a Runner) -> PassContext<'a> {
        let cx = PassContext::default().with_evaluator(runner);
        if self.original.opset() < OPSET { cx.with_setting("upgrade-opset.to", OPSET) } else { cx }
    }

    /// The denoiser as inputs are made up for it: its latent has the size that the plan says.
    pub fn sized(&self, plan: &StepPlan, shapes: &[(String, Vec<usize>)]) -> Result<Model, Failure> {
        let mut sized = self.original.clone();
        let Some(sizes) = &plan.sizes else { return Ok(sized) };
        let (name, [height, width]) = (&self.roles.latent, sizes.full());
        let value = sized.graph.find_value(name);
        let Some(ty) = value.and_then(|v| sized.graph.value_mut(v).ty.as_mut()) else { return Ok(sized) };
        let given = shapes.iter().find(|(n, _)| n == name).map(|(_, dims)| dims.as_slice());
        if given.is_some_and(|dims| !dims.ends_with(&[height, width])) {
            let message =
                format!("the plan makes samples of {height}×{width}, and --input-shape gives `{name}` another size");
            return Err(Failure::Usage(message));
        }
        if let (Some(elem), Some(mut dims)) = (ty.elem(), ty.shape().map(|shape| shape.dims.clone()))
            && let [.., h, w] = dims.as_mut_slice()
        {
            (*h, *w) = (Dim::Known(height as i64), Dim::Known(width as i64));
            *ty = Type::tensor(elem, dims);
        }
        Ok(sized)
    }
}
