//! A picture of what a sampler draws, beside what the denoiser draws when every step is computed.

use super::{
    Job, SamplerOptions, Tune,
    check::named,
    evaluator::Evaluator,
    picture::{self, Half, spread},
    seeded_inputs::{SCALE, SeededInputs},
    stages::Stages,
    steps, tune,
};
use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_ir::{Dim, Model, Tensor, Type};
use lathe_passes::sampler::{
    self, Mode, Request, Roles, Sampler, Scale, Scheduler, StepPlan, Steps, Table, Uncond, pipelines::Pipeline,
};
use lathe_runtime::{LoadOptions, Progress};
use std::path::Path;

/// Fails unless a pipeline makes images: known before any work.
pub(super) fn check_pipeline(pipeline: &Pipeline) -> Result<(), Failure> {
    if pipeline.output == "image" {
        return Ok(());
    }
    let (class, output) = (pipeline.classes[0], pipeline.output);
    Err(Failure::Usage(format!("--preview draws images, and pipelines of class `{class}` give `{output}`")))
}

/// Fails unless samples are images: known before any work.
pub(super) fn check(model: &Model, roles: &Roles) -> Result<(), Failure> {
    let latent = model.graph.find_value(&roles.latent).and_then(|v| model.graph.value(v).ty.as_ref());
    let shape = latent.and_then(Type::shape);
    match shape.map(|shape| shape.dims.as_slice()) {
        Some([_, channels, _, _]) if matches!(channels.known(), Some(1 | 3)) => Ok(()),
        found => {
            let found = found.map_or("unknown".to_owned(), |dims| {
                let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
                format!("[{}]", dims.join(", "))
            });
            Err(Failure::Usage(format!(
                "--preview draws images, and the shape of `{}` is {found}, expected [n, c, h, w] with 1 or 3 channels",
                roles.latent
            )))
        }
    }
}

/// The steps of the sampler that everything is computed in: those that were asked for; for a search, those it aims at.
pub(super) fn full(asked: &SamplerOptions, scheduler: &Scheduler) -> Result<Table, Failure> {
    let request = match (&asked.tune, &asked.plan) {
        (Some(Tune::Search(_)), _) => {
            let steps = Steps::Count(tune::REFERENCE_STEPS.min(scheduler.num_train_timesteps));
            Request { steps, ..asked.request.clone() }
        }
        // Beside steps of several sizes stand as many of one.
        (None, Some(plan)) if plan.sizes.is_some() => {
            Request { steps: Steps::Count(plan.grid.len()), ..asked.request.clone() }
        }
        (None, plan @ Some(_)) => steps::request(asked, plan.as_ref(), scheduler)?,
        _ => asked.request.clone(),
    };
    Ok(Table::new(scheduler, &request)?)
}

/// Draws the same seeds with the denoiser step by step (left) and with the sampler at `path` (right), as a PNG.
pub(super) fn draw(job: &Job, sampler: &Sampler, full: &Table, path: &Path) -> Result<Vec<u8>, Failure> {
    let mode = if job.options.guidance.is_some() { Mode::Guided } else { Mode::Conditional };
    let plan = StepPlan::plain("", full.rows.iter().map(|row| row.time).collect(), mode);
    let whole = Sampler { table: full, plan: &plan, ..*sampler };
    match job.stages.as_ref().and_then(|stages| Some((stages, stages.reference.encode.as_ref()?))) {
        Some((stages, encode)) => draw_pipeline(job, (stages, encode), sampler, &whole, path),
        None => draw_samples(job, sampler, &whole, path),
    }
}

/// What a pipeline makes of made-up ids: beside the parts run one after the other, what is at `path`.
fn draw_pipeline(
    job: &Job,
    (stages, encode): (&Stages, &Model),
    sampler: &Sampler,
    whole: &Sampler,
    path: &Path,
) -> Result<Vec<u8>, Failure> {
    let options = job.options;
    let written = Model::read(path).context("the pipeline that was written cannot be read")?.model;
    let seeded = SeededInputs::new(encode, "noise", &stages.spec())?;
    let evaluator = Evaluator::fast(job.runner, &options.run.load);
    let load = LoadOptions { optimize: true, ..options.run.load.clone() };
    let (mut left, mut right) = (Half::default(), Half::default());
    let (count, batch) = (picture::ROWS * picture::COLUMNS, seeded.batch(picture::ROWS * picture::COLUMNS));
    let (own, all) = (sampler.table.noises(), whole.table.noises());
    if own != all && stages.packed {
        let message =
            "--preview of a pipeline of patches draws all steps beside as many that add noise; leave out the plan";
        return Err(Failure::Usage(message.to_owned()));
    }
    for start in (0..count).step_by(batch) {
        let samples = start..start + batch;
        let inputs = seeded.of_sampler(&written, samples.clone())?;
        let mut inner = stages.of_loop(&inputs, job.original, sampler.roles, &evaluator)?;
        if own != all {
            inner.retain(|(name, _)| name != "step_noise");
            inner.push(("step_noise".to_owned(), seeded.step_noise(all, samples)));
        }
        let steps = whole.table.rows.len();
        let tell = |done: usize| options.run.progress.hear(&Progress::new(done, steps, "steps of the picture"));
        let drawn = sampler::sample(whole, job.original, &inner, &evaluator, &tell)?;
        left.push(&spread(&stages.decoded(drawn.sample, &evaluator)?)?)?;
        let mut outputs = job.runner.child().run_file(path, &[inputs], &load)?;
        let outputs = outputs.pop().unwrap_or_default();
        let found = outputs.iter().find(|(name, _)| name == stages.output);
        right.push(&spread(&found.ok_or_else(|| anyhow!("the pipeline gives no image"))?.1)?)?;
    }
    Ok(picture::encode(&left, &right)?)
}

fn draw_samples(job: &Job, sampler: &Sampler, whole: &Sampler, path: &Path) -> Result<Vec<u8>, Failure> {
    let (options, roles) = (job.options, sampler.roles);
    let written = Model::read(path).context("the sampler that was written cannot be read")?.model;
    let seeded = SeededInputs::new(job.sized, &roles.latent, &options.run.inputs)?;
    let evaluator = Evaluator::fast(job.runner, &options.run.load);
    let load = LoadOptions { optimize: true, ..options.run.load.clone() };
    let (mut left, mut right) = (Half::default(), Half::default());
    let (count, batch) = (picture::ROWS * picture::COLUMNS, seeded.batch(picture::ROWS * picture::COLUMNS));
    for start in (0..count).step_by(batch) {
        let samples = start..start + batch;
        let mut inputs = vec![("noise".to_owned(), seeded.noise(samples.clone()))];
        for condition in &roles.conditions {
            let none = if let Uncond::Constant(none) = condition.uncond { Some(none) } else { None };
            let value = seeded.condition(&condition.name, samples.clone(), none)?;
            if condition.uncond == Uncond::Input {
                // Another condition than that of the sample itself.
                let other = seeded.condition(&condition.name, start + count..start + count + batch, none)?;
                inputs.push((format!("{}_uncond", condition.name), other));
            }
            inputs.push((condition.name.clone(), value));
        }
        if sampler.guidance.scale == Scale::Input {
            inputs.push(("guidance".to_owned(), Tensor::from_f32s(&[], &[SCALE])));
        }
        let with_noise = |steps: usize| {
            let mut all = inputs.clone();
            if steps > 0 {
                all.push(("step_noise".to_owned(), seeded.step_noise(steps, samples.clone())));
            }
            all
        };
        let steps = whole.table.rows.len();
        let tell = |done: usize| options.run.progress.hear(&Progress::new(done, steps, "steps of the picture"));
        let drawn = sampler::sample(whole, job.original, &with_noise(whole.table.noises()), &evaluator, &tell)?;
        left.push(&drawn.sample)?;
        let inputs = named(&written, &with_noise(sampler.table.noises()));
        let mut outputs = job.runner.child().run_file(path, &[inputs], &load)?;
        let outputs = outputs.pop().unwrap_or_default();
        let found = outputs.iter().find(|(name, _)| name == "sample");
        right.push(&found.ok_or_else(|| anyhow!("the sampler gives no `sample`"))?.1)?;
    }
    Ok(picture::encode(&left, &right)?)
}
