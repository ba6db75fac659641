//! A picture of what a sampler draws, beside what the denoiser draws when every step is computed.

use super::{
    Job, SamplerOptions, Tune,
    check::named,
    evaluator::Evaluator,
    picture::{self, Half},
    seeded_inputs::{SCALE, SeededInputs},
    steps, tune,
};
use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_ir::{Dim, Model, Type};
use lathe_passes::sampler::{self, Mode, Request, Roles, Sampler, Scale, Scheduler, StepPlan, Steps, Table, Uncond};
use lathe_runtime::{LoadOptions, Progress};
use std::path::Path;

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
    let (options, roles) = (job.options, sampler.roles);
    let mode = if options.guidance.is_some() { Mode::Guided } else { Mode::Conditional };
    let plan = StepPlan::plain("", full.rows.iter().map(|row| row.time).collect(), mode);
    let whole = Sampler { table: full, plan: &plan, ..*sampler };
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
            inputs.push(("guidance".to_owned(), lathe_ir::Tensor::from_f32s(&[], &[SCALE])));
        }
        let with_noise = |steps: usize| {
            let mut all = inputs.clone();
            if steps > 0 {
                all.push(("step_noise".to_owned(), seeded.step_noise(steps, samples.clone())));
            }
            all
        };
        let steps = full.rows.len();
        let tell = |done: usize| options.run.progress.hear(&Progress::new(done, steps, "steps of the picture"));
        let drawn = sampler::sample(&whole, job.original, &with_noise(full.noises()), &evaluator, &tell)?;
        left.push(&drawn.sample)?;
        let inputs = named(&written, &with_noise(sampler.table.noises()));
        let mut outputs = job.runner.child().run_file(path, &[inputs], &load)?;
        let outputs = outputs.pop().unwrap_or_default();
        let found = outputs.iter().find(|(name, _)| name == "sample");
        right.push(&found.ok_or_else(|| anyhow!("the sampler gives no `sample`"))?.1)?;
    }
    Ok(picture::encode(&left, &right)?)
}
