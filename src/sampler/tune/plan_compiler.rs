//! Plans compiled into files: timed beside one another and sampled from.

use super::{
    super::{check::UNGUIDED, compare::SamplerFile, evaluator::Evaluator},
    plan_runner::PlanRunner,
};
use crate::{Failure, runner::Runner};
use anyhow::{Context as _, anyhow};
use lathe_passes::sampler::{Form, Sampler, StepPlan, Table, emit};
use lathe_runtime::{BenchInputs, BenchResult, BenchTask, InputSpec, LoadOptions};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Compiles plans into a temporary folder.
pub(super) struct PlanCompiler<'a> {
    pub plans: &'a PlanRunner<'a>,
    pub runner: &'a Runner,
    pub load: &'a LoadOptions,
    pub form: Form,
    folder: TempDir,
}

impl<'a> PlanCompiler<'a> {
    /// A compiler whose samplers are of this form.
    pub fn new(
        plans: &'a PlanRunner<'a>,
        runner: &'a Runner,
        load: &'a LoadOptions,
        form: Form,
    ) -> Result<PlanCompiler<'a>, Failure> {
        let folder = tempfile::tempdir().context("there is no place for samplers that are tried")?;
        Ok(PlanCompiler { plans, runner, load, form, folder })
    }

    /// Compiles a plan into a file of this name.
    pub fn compile(&self, name: &str, table: &Table, plan: &StepPlan) -> Result<PathBuf, Failure> {
        let PlanRunner { denoiser, roles, guidance, evaluator, .. } = self.plans;
        let sampler = Sampler { denoiser, roles, table, plan, guidance: guidance.unwrap_or(UNGUIDED) };
        let model = emit(&sampler, self.form, *evaluator)?;
        let path = self.folder.path().join(format!("{name}.onnx"));
        model.write_linked(&path)?;
        Ok(path)
    }

    /// The times of one run of some samplers that take turns, in milliseconds.
    pub fn times(&self, samplers: &[&Path]) -> Result<Vec<f64>, Failure> {
        let models: Vec<PathBuf> = samplers.iter().map(|path| path.to_path_buf()).collect();
        let inputs = BenchInputs::Random(self.inputs());
        match self.runner.bench(&models, &inputs, BenchTask::Each)? {
            BenchResult::Each(times) if times.len() == samplers.len() => Ok(times),
            _ => Err(Failure::Error(anyhow!("the worker measured something else"))),
        }
    }

    /// A sampler to draw samples from.
    pub fn open(&self, path: &Path) -> Result<SamplerFile<'a>, Failure> {
        SamplerFile::open(path, self.runner, self.load)
    }

    /// The seed, and shapes of inputs by the names that samplers give them.
    pub fn inputs(&self) -> InputSpec {
        let roles = self.plans.roles;
        let named = |(name, dims): &(String, Vec<usize>)| {
            let name = if *name == roles.latent { "noise" } else { name.as_str() };
            (name != roles.time).then(|| (name.to_owned(), dims.clone()))
        };
        let InputSpec { seed, shapes, .. } = self.plans.inputs;
        InputSpec { seed: *seed, shapes: shapes.iter().filter_map(named).collect(), ..InputSpec::default() }
    }

    /// Runs networks that are no samplers.
    pub fn evaluator(&self) -> Evaluator<'a> {
        Evaluator::fast(self.runner, self.load)
    }
}
