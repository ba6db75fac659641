//! Runs of one denoiser on fixed noise with many plans.

use super::super::seeded_inputs::SCALE;
use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Evaluate, EvaluateError, Random, StableHash};
use lathe_ir::{Dim, Model, Tensor};
use lathe_passes::sampler::{
    self, Error, Guidance, Key, Mode, Pass, Request, Roles, Sampler, Scale, Scheduler, StepPlan, Steps, Table, Uncond,
};
use lathe_runtime::{InputSpec, generate, sizes_to_try};
use std::{cell::RefCell, hash::Hasher as _};

/// Samples that run together.
pub(super) const BATCH: usize = 32;

/// What stays the same from plan to plan.
pub(super) struct Trial<'a> {
    /// The denoiser, simplified.
    pub denoiser: &'a Model,
    pub roles: &'a Roles,
    pub scheduler: &'a Scheduler,
    /// The steps that were asked for, and what else the solver needs.
    pub request: Request,
    pub guidance: Option<Guidance>,
    /// The seed, and shapes of inputs where the denoiser leaves them open.
    pub inputs: &'a InputSpec,
    pub evaluator: &'a dyn Evaluate,
}

/// What the network was fed and said at one step.
pub(super) struct Seen {
    /// The latent as the network saw it.
    pub latent: Tensor,
    /// The outputs of the conditional pass and, where the step was guided, of the unconditional one.
    pub outputs: Vec<Vec<(String, Tensor)>>,
}

impl Trial<'_> {
    /// The numbers of the steps that were asked for.
    pub fn asked(&self) -> Result<Table, Error> {
        Table::new(self.scheduler, &self.request)
    }

    /// The numbers of so many steps, spread as the scheduler spreads them.
    pub fn spread(&self, count: usize) -> Result<Table, Error> {
        Table::new(self.scheduler, &Request { steps: Steps::Count(count), ..self.request.clone() })
    }

    /// The numbers of these steps; of ones that the scheduler would choose itself, as it chooses them.
    pub fn at(&self, times: &[f64]) -> Result<Table, Error> {
        if let Ok(spread) = self.spread(times.len())
            && spread.rows.iter().map(|row| row.time).eq(times.iter().copied())
        {
            return Ok(spread);
        }
        self.at_exactly(times)
    }

    /// The numbers of exactly these steps, whatever the scheduler would make of their number.
    pub fn at_exactly(&self, times: &[f64]) -> Result<Table, Error> {
        Table::new(self.scheduler, &Request { steps: Steps::Times(times.to_vec()), ..self.request.clone() })
    }

    /// The plan that computes every step of a table.
    pub fn plain(&self, table: &Table) -> StepPlan {
        let mode = if self.guidance.is_some() { Mode::Guided } else { Mode::Conditional };
        let grid = table.rows.iter().map(|row| row.time).collect();
        StepPlan::plain(self.scheduler.solver.name(), grid, mode)
    }

    /// What a plan that is found here belongs to.
    pub fn key(&self) -> Key {
        let model = StableHash::of(&self.denoiser.to_bytes());
        let guidance = self.guidance.and_then(|g| match g.scale {
            Scale::Constant(scale) => Some(scale),
            Scale::Input => None,
        });
        let shape = self.dims(&self.roles.latent).unwrap_or_default();
        let shape = shape.iter().skip(1).map(|d| d.known().unwrap_or(-1)).collect();
        Key { model: Some(format!("{:016x}", model.finish())), guidance, shape }
    }

    fn dims(&self, input: &str) -> Option<Vec<Dim>> {
        let graph = &self.denoiser.graph;
        Some(graph.value(graph.find_value(input)?).ty.as_ref()?.shape()?.dims.clone())
    }

    /// Height and width of samples.
    pub fn sides(&self) -> Result<[usize; 2], Failure> {
        let name = &self.roles.latent;
        let given = self.inputs.shapes.iter().find(|(n, _)| n == name).map(|(_, dims)| dims.clone());
        let stated = || {
            let dims = self.dims(name)?;
            dims.iter().skip(1).map(|d| d.known().and_then(|d| usize::try_from(d).ok())).collect::<Option<Vec<usize>>>()
        };
        match given.or_else(stated).as_deref() {
            Some([.., height, width]) => Ok([*height, *width]),
            _ => {
                let message =
                    format!("the shape of `{name}` is open; --input-shape {name}:... says how large samples are");
                Err(Failure::Usage(message))
            }
        }
    }

    /// Noise and conditions of a batch, told apart by number: the same for every plan.
    pub fn inputs(&self, noises: usize, batch: u64) -> Result<Vec<(String, Tensor)>, Failure> {
        let seed = self.inputs.seed.wrapping_add(batch.wrapping_mul(0x9e37_79b9));
        let graph = &self.denoiser.graph;
        let mut shapes = self.inputs.shapes.clone();
        for &input in graph.main().inputs() {
            let name = &graph.value(input).name;
            if shapes.iter().any(|(given, _)| given == name) {
                continue;
            }
            let open = || {
                let message = format!("the shape of `{name}` is open; --input-shape {name}:... says what to run with");
                Failure::Usage(message)
            };
            let size = |(axis, dim): (usize, &Dim)| match dim.known() {
                Some(known) => usize::try_from(known).map_err(|_| open()),
                None if axis == 0 => Ok(BATCH),
                None => Err(open()),
            };
            let dims = self.dims(name).ok_or_else(open)?;
            shapes.push((name.clone(), dims.iter().enumerate().map(size).collect::<Result<_, _>>()?));
        }
        let make = |seed: u64| {
            let spec = InputSpec { seed, shapes: shapes.clone() };
            let sizes = sizes_to_try(self.denoiser, &spec);
            let sizes = sizes.first().ok_or_else(|| anyhow!("the denoiser accepts no sizes"))?;
            generate(self.denoiser, &spec, sizes).context("no inputs for the denoiser can be made up")
        };
        let (given, others) = (make(seed)?, make(seed.wrapping_add(1))?);
        let find = |from: &[(String, Tensor)], name: &str| {
            let found = from.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor.clone());
            found.ok_or_else(|| anyhow!("no value for `{name}` could be made up"))
        };
        let latent = find(&given, &self.roles.latent)?.dims().to_vec();
        let normal = |name: &str, dims: &[usize]| {
            let mut random = Random::named(seed, name);
            let numbers: Vec<f32> = (0..dims.iter().product::<usize>()).map(|_| random.normal() as f32).collect();
            (name.to_owned(), Tensor::from_f32s(dims, &numbers))
        };
        let mut inputs = vec![normal("noise", &latent)];
        if noises > 0 {
            inputs.push(normal("step_noise", &[&[noises], &latent[..]].concat()));
        }
        for condition in &self.roles.conditions {
            let value = find(&given, &condition.name)?;
            inputs.push((condition.name.clone(), conditional(value, condition.uncond)));
            if condition.uncond == Uncond::Input {
                inputs.push((format!("{}_uncond", condition.name), find(&others, &condition.name)?));
            }
        }
        if self.guidance.is_some_and(|g| g.scale == Scale::Input) {
            inputs.push(("guidance".to_owned(), Tensor::from_f32s(&[], &[SCALE])));
        }
        Ok(inputs)
    }

    fn sampler<'s>(&'s self, model: &'s Model, table: &'s Table, plan: &'s StepPlan) -> Sampler<'s> {
        let guidance = self.guidance.unwrap_or(super::super::check::UNGUIDED);
        Sampler { denoiser: model, roles: self.roles, table, plan, guidance }
    }

    /// The samples of a batch.
    pub fn samples(&self, table: &Table, plan: &StepPlan, batch: u64) -> Result<Tensor, Failure> {
        let inputs = self.inputs(table.noises(), batch)?;
        let sampler = self.sampler(self.denoiser, table, plan);
        Ok(sampler::sample(&sampler, self.denoiser, &inputs, self.evaluator, &|_| {})?.sample)
    }

    /// The samples of a batch under the plan that computes everything, with what was seen at every step. `watched` is the
    /// denoiser, perhaps with further outputs.
    pub fn watch(&self, watched: &Model, table: &Table, batch: u64) -> Result<(Tensor, Vec<Seen>), Failure> {
        let plan = self.plain(table);
        let inputs = self.inputs(table.noises(), batch)?;
        let recorder = Recorder { evaluator: self.evaluator, calls: RefCell::default() };
        let sampler = self.sampler(watched, table, &plan);
        let sample = sampler::sample(&sampler, watched, &inputs, &recorder, &|_| {})?.sample;
        let passes = plan.cfg.first().map_or(1, |mode| mode.passes().len());
        debug_assert!(passes == 1 || Mode::Guided.passes()[0] == Pass::Cond, "the conditional pass runs first");
        let mut seen: Vec<Seen> = Vec::new();
        for (index, (inputs, outputs)) in recorder.calls.into_inner().into_iter().enumerate() {
            match seen.last_mut().filter(|_| index % passes != 0) {
                Some(step) => step.outputs.push(outputs),
                None => {
                    let latent = inputs.into_iter().find(|(name, _)| *name == self.roles.latent);
                    let latent = latent.ok_or_else(|| anyhow!("the network was run without its latent"))?.1;
                    seen.push(Seen { latent, outputs: vec![outputs] });
                }
            }
        }
        Ok((sample, seen))
    }
}

/// A condition without what stands for no condition.
fn conditional(value: Tensor, uncond: Uncond) -> Tensor {
    let (Uncond::Constant(none), true) = (uncond, value.dtype().is_integer()) else { return value };
    if none < 1.0 {
        return value;
    }
    let Some(numbers) = value.to_f64s() else { return value };
    let other = |(index, number): (usize, &f64)| if *number == none { (index % none as usize) as f64 } else { *number };
    let numbers: Vec<f64> = numbers.iter().enumerate().map(other).collect();
    Tensor::from_f64s(value.dtype(), value.dims(), &numbers).unwrap_or(value)
}

type Call = (Vec<(String, Tensor)>, Vec<(String, Tensor)>);

/// Runs models and remembers what came in and went out.
struct Recorder<'a> {
    evaluator: &'a dyn Evaluate,
    calls: RefCell<Vec<Call>>,
}

impl Evaluate for Recorder<'_> {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        let outputs = self.evaluator.run(model, inputs)?;
        self.calls.borrow_mut().push((inputs.to_vec(), outputs.clone()));
        Ok(outputs)
    }

    fn name(&self) -> String {
        self.evaluator.name()
    }
}
