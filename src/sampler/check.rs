//! A compiled sampler beside the loop that it replaces.

use super::{Job, evaluator::Evaluator, seeded_inputs::LoopInputs};
use crate::{Failure, job, report::Verify, runner::Runner};
use anyhow::{Context as _, anyhow};
use lathe_analysis::Evaluate as _;
use lathe_ir::{DataType, Model, Tensor, Type};
use lathe_passes::sampler::{self, Guidance, Mode, Sampler, Scale, Sizes, StepPlan, Table};
use lathe_runtime::{
    BenchInputs, BenchResult, BenchTask, Claim, Datum, InputSpec, LoadOptions, Progress, compare, default_rtol,
    generate, sizes_to_try,
};
use std::{collections::BTreeSet, path::Path, time::Duration};

/// What stands for guidance where there is none.
pub(super) const UNGUIDED: Guidance = Guidance { scale: Scale::Constant(1.0), rescale: 0.0, batched: true };

/// What came of a comparison.
pub(super) enum Checked {
    /// The sampler does what the loop does.
    Holds(Box<Verify>),
    /// It does not, for this reason.
    Fails(String),
    /// It was not run.
    Not,
}

/// Runs a sampler that was written on seeded noise, and the denoiser step by step on the same.
pub(super) fn check(job: &Job, sampler: &Sampler, path: &Path) -> Result<Checked, Failure> {
    let options = job.options;
    let scale_is_input = sampler.guidance.scale == Scale::Input;
    let sizes = job.stages.as_ref().map(|stages| stages.inputs(scale_is_input)).transpose()?.flatten();
    let sizes = match sizes {
        Some(sizes) => sizes,
        None => vec![inputs(job, sampler)?],
    };
    let evaluator = Evaluator::new(job.runner, &options.run.load);
    let written = Model::read(path).context("the sampler that was written cannot be read")?.model;
    let mut trouble = None;
    let mut tried = sizes.into_iter().map(|whole| {
        match job.runner.child().run_file(path, &[named(&written, &whole)], &options.run.load) {
            Ok(mut found) => Some((whole, found.pop().unwrap_or_default())),
            Err(error) => {
                trouble.get_or_insert(error);
                None
            }
        }
    });
    let Some((whole, found)) = tried.find_map(|tried| tried) else {
        let error = trouble.map_or_else(|| "it accepts no sizes".to_owned(), |error| error.to_string());
        return Ok(Checked::Fails(format!("the sampler cannot be run: {error}")));
    };
    let steps = sampler.table.rows.len();
    let tell = |done: usize| options.run.progress.hear(&Progress::new(done, steps, "steps of the reference"));
    let inputs = match &job.stages {
        Some(stages) => stages.of_loop(&whole, job.original, sampler.roles, &evaluator)?,
        None => whole,
    };
    let expected = sampler::sample(sampler, job.original, &inputs, &evaluator, &tell)?;
    let (output, reference) = match &job.stages {
        Some(stages) => (stages.output, stages.decoded(expected.sample.clone(), &evaluator)?),
        None => ("sample", expected.sample.clone()),
    };
    let sample = |outputs: &[(String, Tensor)], name: &str| {
        outputs.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor.clone())
    };
    let claim = Claim::Equivalent { rtol: Some(options.rtol.unwrap_or_else(|| default_rtol(precision(job, sampler)))) };
    let got = sample(&found, output).ok_or_else(|| anyhow!("the sampler gives no `{output}`"))?;
    let reference = [(output.to_owned(), Datum::Tensor(reference))];
    let comparison = compare(&reference, &[(output.to_owned(), Datum::Tensor(got))], claim);
    if let Some(computed) = sample(&found, "computed") {
        let computed: Vec<bool> = computed.to_i64s().unwrap_or_default().iter().map(|&c| c != 0).collect();
        if comparison.holds() && computed != expected.computed {
            let message = "the sampler does not do what the denoiser does step by step: it computes other steps than \
                           the rule says";
            return Ok(Checked::Fails(message.to_owned()));
        }
    }
    if let Some(fault) = comparison.faults.first() {
        return Ok(Checked::Fails(format!("the sampler does not do what the denoiser does step by step: {fault}")));
    }
    let samples = expected.sample.dims().first().copied().unwrap_or(1);
    let report = lathe_runtime::Report {
        comparison,
        samples,
        engine: evaluator.name(),
        sizes: vec![format!("latent {:?}", expected.sample.dims())],
        left_out: Vec::new(),
    };
    Ok(Checked::Holds(Box::new(job::verify(report, claim, "random"))))
}

/// The type that limits how well two samples can agree.
fn precision(job: &Job, sampler: &Sampler) -> DataType {
    let graph = &sampler.denoiser.graph;
    let latent = graph.find_value(&sampler.roles.latent);
    let own = latent.and_then(|v| graph.value(v).ty.as_ref()).and_then(Type::elem).unwrap_or(DataType::Float);
    match &job.stages {
        Some(stages) if own == DataType::Float => stages.precision(),
        _ => own,
    }
}

/// The inputs that a model takes.
pub(super) fn named(model: &Model, inputs: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let graph = &model.graph;
    let takes = |name: &str| graph.main().inputs().iter().any(|&v| graph.value(v).name == name);
    inputs.iter().filter(|(name, _)| takes(name)).cloned().collect()
}

/// Seeded noise and conditions, for the sampler and the loop alike.
fn inputs(job: &Job, sampler: &Sampler) -> Result<Vec<(String, Tensor)>, Failure> {
    let run = &job.options.run.inputs;
    let make = |seed: u64| {
        let spec = InputSpec { seed, ..run.clone() };
        let sizes = sizes_to_try(job.sized, &spec);
        // The second sizes have a batch of several.
        let sizes = sizes.get(1).or(sizes.first()).ok_or_else(|| anyhow!("the denoiser accepts no sizes"))?;
        generate(job.sized, &spec, sizes).context("no inputs for the denoiser can be made up")
    };
    let scale_is_input = sampler.guidance.scale == Scale::Input;
    let inputs = LoopInputs { roles: sampler.roles, noises: sampler.table.noises(), scale_is_input };
    Ok(inputs.from(run.seed, &make)?)
}

/// Runs the denoiser once at every size that steps have. Fails where it rejects one, or predicts another size.
pub(super) fn check_sizes(job: &Job, sampler: &Sampler) -> Result<(), Failure> {
    let Some(sizes) = &sampler.plan.sizes else { return Ok(()) };
    sampler.check_latent()?;
    let roles = sampler.roles;
    let distinct: BTreeSet<[usize; 2]> = sizes.steps.iter().copied().collect();
    for size in distinct {
        // One step of the loop, whatever else the plan says.
        let time = sampler.table.rows[0].time;
        let steps = Sizes { steps: vec![size], up: sizes.up };
        let plan = StepPlan { sizes: Some(steps), ..StepPlan::plain("", vec![time], Mode::Conditional) };
        let table = Table { rows: sampler.table.rows[..1].to_vec(), ..sampler.table.clone() };
        let one = Sampler { table: &table, plan: &plan, guidance: UNGUIDED, ..*sampler };
        let inputs = inputs(job, &one)?;
        let evaluator = Evaluator::new(job.runner, &job.options.run.load);
        if let Err(error) = sampler::sample(&one, job.original, &inputs, &evaluator, &|_| {}) {
            let [height, width] = size;
            let message = format!("the denoiser rejects `{}` of the size {height}×{width}: {error}", roles.latent);
            return Err(Failure::Usage(message));
        }
    }
    Ok(())
}

/// How long the runtime takes to load a model.
pub(super) fn loading(runner: &Runner, path: &Path, options: &LoadOptions) -> anyhow::Result<Option<Duration>> {
    let inputs = BenchInputs::Random(InputSpec::default());
    let loaded = runner.child().bench(&[path.to_owned()], &inputs, BenchTask::Load, options)?;
    Ok(match loaded {
        BenchResult::Loaded(loading) => Some(Duration::from_secs_f64(loading.load_ms / 1000.0)),
        _ => None,
    })
}
