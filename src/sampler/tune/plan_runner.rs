//! Runs of one denoiser under many plans, all from the same noise.

use super::super::{check::UNGUIDED, seeded_inputs::LoopInputs};
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Evaluate, EvaluateError, Facts, StableHash};
use lathe_ir::{Dim, Model, ScopeId, Tensor};
use lathe_passes::sampler::{
    self, Error, Guidance, Key, Mode, Pass, Request, Roles, Sampler, Scale, Scheduler, StepPlan, Steps, Table, Uncond,
    methods::{PlainLoop, StepRecord},
};
use lathe_runtime::{InputSpec, generate, sizes_to_try};
use std::{cell::RefCell, hash::Hasher as _};

/// Samples that run together.
pub(super) const BATCH: usize = 32;

/// What stays the same from plan to plan.
pub(super) struct PlanRunner<'a> {
    /// The denoiser, simplified.
    pub denoiser: &'a Model,
    pub roles: &'a Roles,
    pub scheduler: &'a Scheduler,
    /// The steps that were asked for, and what else the solver needs.
    pub request: Request,
    pub guidance: Option<Guidance>,
    /// The seed, and shapes of inputs where the denoiser leaves them open.
    pub inputs: &'a InputSpec,
    pub evaluator: &'a (dyn Evaluate + Sync),
    /// Runs that go on at a time where one does not wait for another.
    pub at_a_time: usize,
}

impl PlanRunner<'_> {
    /// The numbers of the steps that were asked for.
    pub fn table(&self) -> Result<Table, Error> {
        Table::new(self.scheduler, &self.request)
    }

    /// The numbers of so many steps, spread as the scheduler spreads them.
    pub fn table_of(&self, count: usize) -> Result<Table, Error> {
        Table::new(self.scheduler, &Request { steps: Steps::Count(count), ..self.request.clone() })
    }

    /// The numbers of these steps; of ones that the scheduler would choose itself, as it chooses them.
    pub fn table_at(&self, times: &[f64]) -> Result<Table, Error> {
        if let Ok(spread) = self.table_of(times.len())
            && spread.rows.iter().map(|row| row.time).eq(times.iter().copied())
        {
            return Ok(spread);
        }
        self.table_exactly_at(times)
    }

    /// The numbers of exactly these steps, whatever the scheduler would make of their number.
    pub fn table_exactly_at(&self, times: &[f64]) -> Result<Table, Error> {
        Table::new(self.scheduler, &Request { steps: Steps::Times(times.to_vec()), ..self.request.clone() })
    }

    /// The plan that computes every step of a table.
    pub fn full_plan(&self, table: &Table) -> StepPlan {
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

    /// Noise and conditions of a batch by its number: the same for every plan.
    fn batch(&self, noises: usize, batch: u64) -> Result<Vec<(String, Tensor)>, Error> {
        let seed = self.inputs.seed.wrapping_add(batch.wrapping_mul(0x9e37_79b9));
        let shapes = self.shapes()?;
        let make = |seed: u64| {
            let spec = InputSpec { seed, shapes: shapes.clone(), ..InputSpec::default() };
            let sizes = sizes_to_try(self.denoiser, &spec);
            let sizes = sizes.first().ok_or_else(|| anyhow!("the denoiser accepts no sizes"))?;
            generate(self.denoiser, &spec, sizes).context("no inputs for the denoiser can be made up")
        };
        let scale_is_input = self.guidance.is_some_and(|g| g.scale == Scale::Input);
        let inputs = LoopInputs { roles: self.roles, noises, scale_is_input }.from(seed, &make);
        let mut inputs = inputs.map_err(|error| Error::Network(format!("{error:#}")))?;
        for (name, value) in &mut inputs {
            if let Some(condition) = self.roles.conditions.iter().find(|condition| condition.name == *name) {
                *value = conditional(value.clone(), condition.uncond);
            }
        }
        Ok(inputs)
    }

    /// Shapes of all inputs of the denoiser, which are stated or given but for the number of samples.
    fn shapes(&self) -> Result<Vec<(String, Vec<usize>)>, Error> {
        let graph = &self.denoiser.graph;
        let mut shapes = self.inputs.shapes.clone();
        for &input in graph.main().inputs() {
            let name = &graph.value(input).name;
            if shapes.iter().any(|(given, _)| given == name) {
                continue;
            }
            let open = || {
                Error::Roles(format!("the shape of `{name}` is open; --input-shape {name}:... says what to run with"))
            };
            let size = |(axis, dim): (usize, &Dim)| match dim.known() {
                Some(known) => usize::try_from(known).map_err(|_| open()),
                None if axis == 0 => Ok(BATCH),
                None => Err(open()),
            };
            let dims = self.dims(name).ok_or_else(open)?;
            shapes.push((name.clone(), dims.iter().enumerate().map(size).collect::<Result<_, _>>()?));
        }
        Ok(shapes)
    }

    fn sampler<'s>(&'s self, model: &'s Model, table: &'s Table, plan: &'s StepPlan) -> Sampler<'s> {
        let guidance = self.guidance.unwrap_or(UNGUIDED);
        Sampler { denoiser: model, roles: self.roles, table, plan, guidance }
    }

    /// The samples of a batch.
    pub fn samples(&self, table: &Table, plan: &StepPlan, batch: u64) -> Result<Tensor, Error> {
        let inputs = self.batch(table.noises(), batch)?;
        let sampler = self.sampler(self.denoiser, table, plan);
        Ok(sampler::sample(&sampler, self.denoiser, &inputs, self.evaluator, &|_| {})?.sample)
    }

    /// The samples of a batch under the plan that computes everything, with a record of every step.
    pub fn samples_and_record(&self, table: &Table, batch: u64) -> Result<(Tensor, Vec<StepRecord>), Error> {
        self.record_of(self.denoiser, table, batch)
    }

    /// The same of `denoiser`, which may be the denoiser with further outputs.
    fn record_of(&self, denoiser: &Model, table: &Table, batch: u64) -> Result<(Tensor, Vec<StepRecord>), Error> {
        let plan = self.full_plan(table);
        let inputs = self.batch(table.noises(), batch)?;
        let recorder = Recorder { evaluator: self.evaluator, calls: RefCell::default() };
        let sampler = self.sampler(denoiser, table, &plan);
        let sample = sampler::sample(&sampler, denoiser, &inputs, &recorder, &|_| {})?.sample;
        let passes = plan.cfg.first().map_or(1, |mode| mode.passes().len());
        debug_assert!(passes == 1 || Mode::Guided.passes()[0] == Pass::Cond, "the conditional pass runs first");
        let mut record: Vec<StepRecord> = Vec::new();
        for (index, (inputs, outputs)) in recorder.calls.into_inner().into_iter().enumerate() {
            match record.last_mut().filter(|_| index % passes != 0) {
                Some(step) => step.outputs.push(outputs),
                None => {
                    let latent = inputs.into_iter().find(|(name, _)| *name == self.roles.latent);
                    let missing = || Error::Network("the network was run without its latent".to_owned());
                    record.push(StepRecord { latent: latent.ok_or_else(missing)?.1, outputs: vec![outputs] });
                }
            }
        }
        Ok((sample, record))
    }
}

impl PlainLoop for PlanRunner<'_> {
    fn record(&self, table: &Table, batch: u64, value: Option<&str>) -> Result<Vec<StepRecord>, Error> {
        let Some(name) = value else { return Ok(self.samples_and_record(table, batch)?.1) };
        let mut denoiser = self.denoiser.clone();
        let value = denoiser.graph.find_value(name);
        let value = value.ok_or_else(|| Error::Network(format!("the denoiser has no value `{name}`")))?;
        denoiser.graph.value_mut(value).ty = Facts::infer(self.denoiser).ty(value);
        denoiser.graph.add_output(ScopeId::MAIN, value);
        Ok(self.record_of(&denoiser, table, batch)?.1)
    }

    fn sides(&self) -> Result<[usize; 2], Error> {
        let name = &self.roles.latent;
        let given = self.inputs.shapes.iter().find(|(n, _)| n == name).map(|(_, dims)| dims.clone());
        let stated = || {
            let dims = self.dims(name)?;
            dims.iter().skip(1).map(|d| d.known().and_then(|d| usize::try_from(d).ok())).collect::<Option<Vec<usize>>>()
        };
        match given.or_else(stated).as_deref() {
            Some([.., height, width]) => Ok([*height, *width]),
            _ => Err(Error::Roles(format!(
                "the shape of `{name}` is open; --input-shape {name}:... says how large samples are"
            ))),
        }
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

/// Inputs and outputs of one run.
type Run = (Vec<(String, Tensor)>, Vec<(String, Tensor)>);

/// Runs models and remembers what came in and went out.
struct Recorder<'a> {
    evaluator: &'a dyn Evaluate,
    calls: RefCell<Vec<Run>>,
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
