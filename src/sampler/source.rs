//! A model that a job reads: as it was, and after the exact passes.

use crate::{
    Failure, PassRecord, job,
    pipeline::{self, Run},
    report::Side,
    runner::Runner,
};
use anyhow::Context as _;
use lathe_ir::Model;
use lathe_passes::{PASSES, Pass, PassContext, sampler::OPSET};
use lathe_runtime::{Listener, Progress};
use std::{
    cell::{Cell, OnceCell},
    path::{Path, PathBuf},
};

/// A model of a job.
pub(super) struct Source {
    /// Where it was read.
    pub path: PathBuf,
    /// As it was read, in order and with unique names.
    pub original: Model,
    /// Its line of the report.
    pub side: Side,
    /// What was odd about it.
    pub warnings: Vec<String>,
    /// Whether its weights are beside it.
    pub data: bool,
    /// The operator set that it is upgraded to.
    opset: Cell<i64>,
    simplified: OnceCell<Simplified>,
}

/// A model after the exact passes.
pub(super) struct Simplified {
    pub model: Model,
    /// What the passes did; none where one failed.
    pub records: Vec<PassRecord>,
}

impl Source {
    /// Reads a model.
    pub fn read(path: &Path) -> Result<Source, Failure> {
        let loaded = Model::read(path).with_context(|| format!("cannot use `{}`", path.display()))?;
        let data: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
        let side = job::side(path, &loaded.model, loaded.file_bytes + data);
        let (mut original, mut warnings) = (loaded.model, loaded.warnings);
        warnings.extend(job::prepare(&mut original)?);
        let opset = Cell::new(original.opset().max(OPSET));
        let (path, data) = (path.to_owned(), !loaded.data_files.is_empty());
        Ok(Source { path, original, side, warnings, data, opset, simplified: OnceCell::new() })
    }

    /// The operator set that it is upgraded to: its own, that of samplers, or what was asked for.
    pub fn opset(&self) -> i64 {
        self.opset.get()
    }

    /// Upgrades it to this operator set, if that is newer.
    pub fn raise(&self, opset: i64) {
        self.opset.set(self.opset().max(opset));
    }

    /// The model after the exact passes, upgraded.
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

    /// The model in the operator set that it is upgraded to, otherwise as it is.
    pub fn upgraded(&self, runner: &Runner) -> Result<Model, Failure> {
        let mut model = self.original.clone();
        if model.opset() < self.opset() {
            let upgrade = PASSES.iter().find(|p| p.info().name == "upgrade-opset").expect("the pass is registered");
            upgrade.apply(&mut model, &self.context(runner))?;
        }
        Ok(model)
    }

    fn context<'a>(&self, runner: &'a Runner) -> PassContext<'a> {
        let cx = PassContext::default().with_evaluator(runner);
        if self.original.opset() < self.opset() { cx.with_setting("upgrade-opset.to", self.opset()) } else { cx }
    }
}
