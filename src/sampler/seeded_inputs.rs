//! Noise and conditions by seed. Sample `k` of a seed is the same in whatever batch it is drawn and by whichever sampler.

use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_analysis::Random;
use lathe_ir::{Dim, Model, Tensor, Type};
use lathe_passes::sampler::{Roles, Uncond};
use lathe_runtime::{InputSpec, Sizes, classes, generate, required_inputs, sizes_to_try};
use std::ops::Range;

/// The scale of guidance where it is an input.
pub(super) const SCALE: f32 = 3.0;

/// In how many steps a sampler adds noise that it is given; `None` if in none.
pub(super) fn step_noises(sampler: &Model) -> Option<usize> {
    let value = sampler.graph.find_value("step_noise")?;
    let dims = &sampler.graph.value(value).ty.as_ref()?.shape()?.dims;
    usize::try_from(dims.first()?.known()?).ok()
}

/// Normal numbers of a seed, others for every name.
pub(super) fn normal(seed: u64, name: &str, dims: &[usize]) -> Tensor {
    let mut random = Random::named(seed, name);
    let numbers: Vec<f32> = (0..dims.iter().product::<usize>()).map(|_| random.normal() as f32).collect();
    Tensor::from_f32s(dims, &numbers)
}

/// What a sampling loop takes besides the denoiser: noise, conditions and, where that is an input, the scale of guidance.
pub(super) struct LoopInputs<'a> {
    pub roles: &'a Roles,
    /// How many steps add noise.
    pub noises: usize,
    pub scale_is_input: bool,
}

impl LoopInputs<'_> {
    /// The inputs of a seed. `make` makes up inputs of the denoiser; those of the seed after it are what conditions are
    /// where there is none.
    pub fn from(
        &self,
        seed: u64,
        make: &dyn Fn(u64) -> anyhow::Result<Vec<(String, Tensor)>>,
    ) -> anyhow::Result<Vec<(String, Tensor)>> {
        let (given, others) = (make(seed)?, make(seed.wrapping_add(1))?);
        let find = |from: &[(String, Tensor)], name: &str| {
            let found = from.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor.clone());
            found.ok_or_else(|| anyhow!("no value for `{name}` could be made up"))
        };
        let latent = find(&given, &self.roles.latent)?.dims().to_vec();
        let normal = |name: &str, dims: &[usize]| (name.to_owned(), normal(seed, name, dims));
        let mut inputs = vec![normal("noise", &latent)];
        if self.noises > 0 {
            inputs.push(normal("step_noise", &[&[self.noises], &latent[..]].concat()));
        }
        for condition in &self.roles.conditions {
            inputs.push((condition.name.clone(), find(&given, &condition.name)?));
            if condition.uncond == Uncond::Input {
                inputs.push((format!("{}_uncond", condition.name), find(&others, &condition.name)?));
            }
        }
        if self.scale_is_input {
            inputs.push(("guidance".to_owned(), Tensor::from_f32s(&[], &[SCALE])));
        }
        Ok(inputs)
    }
}

/// Makes inputs of a sampler, or of the denoiser that it is made of, sample by sample.
pub(super) struct SeededInputs<'a> {
    model: &'a Model,
    spec: InputSpec,
    sizes: Sizes,
    /// The axes of one sample.
    dims: Vec<usize>,
    /// How many samples run together where that is not free.
    fixed: Option<usize>,
}

impl<'a> SeededInputs<'a> {
    /// Inputs of `model`, whose noise has the shape of its input `latent`. `inputs` has the shapes of `--input-shape`.
    pub fn new(model: &'a Model, latent: &str, inputs: &InputSpec) -> Result<SeededInputs<'a>, Failure> {
        let shapes = &inputs.shapes;
        let first = |name: &str| -> Option<Dim> {
            let value = model.graph.find_value(name)?;
            model.graph.value(value).ty.as_ref()?.shape()?.dims.first().cloned()
        };
        let open = |name: &str| first(name).is_some_and(|dim| dim.known().is_none());
        let given = shapes.iter().find(|(name, _)| name == latent).and_then(|(_, dims)| dims.first().copied());
        // Samples are made one by one.
        let single = |(name, dims): &(String, Vec<usize>)| {
            let mut dims = dims.clone();
            if let Some(first) = dims.first_mut().filter(|_| open(name)) {
                *first = 1;
            }
            (name.clone(), dims)
        };
        let spec = InputSpec { seed: inputs.seed, shapes: shapes.iter().map(single).collect(), ..InputSpec::default() };
        let sizes =
            sizes_to_try(model, &spec).into_iter().next().ok_or_else(|| anyhow!("the model accepts no sizes"))?;
        let made = generate(model, &spec, &sizes).context("no inputs can be made up")?;
        let found = made.iter().find(|(name, _)| name == latent).map(|(_, tensor)| tensor.dims().to_vec());
        let dims = found.ok_or_else(|| anyhow!("the model has no input `{latent}`"))?;
        let (&whole, dims) = dims.split_first().ok_or_else(|| anyhow!("`{latent}` has no axes"))?;
        let fixed = if open(latent) { given } else { Some(whole) };
        Ok(SeededInputs { model, spec, sizes, dims: dims.to_vec(), fixed })
    }

    /// Samples that run together: `most`, unless that is not free.
    pub fn batch(&self, most: usize) -> usize {
        self.fixed.unwrap_or(most).max(1)
    }

    /// Bytes of one sample.
    pub fn bytes(&self) -> usize {
        self.dims.iter().product::<usize>() * 4
    }

    /// What a sampler takes of these: noise for as many steps as it adds some in, conditions by name.
    ///
    /// A condition that the model of these does not have is an error; what a condition is without one, `NAME_uncond`, is
    /// what `NAME` is in the sample after.
    pub fn of_sampler(&self, sampler: &Model, samples: Range<usize>) -> Result<Vec<(String, Tensor)>, Failure> {
        let graph = &sampler.graph;
        let mut inputs = Vec::new();
        for value in required_inputs(graph) {
            let (name, ty) = (&graph.value(value).name, graph.value(value).ty.as_ref());
            let value = match name.as_str() {
                "noise" => self.noise(samples.clone()),
                "step_noise" => self.step_noise(step_noises(sampler).unwrap_or(0), samples.clone()),
                "guidance" | "guidance_scale"
                    if ty.and_then(Type::shape).is_some_and(|shape| shape.dims.is_empty()) =>
                {
                    Tensor::from_f32s(&[], &[SCALE])
                }
                other => {
                    let later = usize::from(other.ends_with("_uncond"));
                    self.condition(other, samples.start + later..samples.end + later, None)?
                }
            };
            inputs.push((name.clone(), value));
        }
        Ok(inputs)
    }

    /// A seed for one sample.
    fn seed(&self, sample: usize) -> u64 {
        self.spec.seed.wrapping_add((sample as u64).wrapping_mul(0x9e37_79b9))
    }

    /// Normal numbers for the first state of some samples.
    pub fn noise(&self, samples: Range<usize>) -> Tensor {
        self.normal("noise", samples)
    }

    /// Normal numbers for so many steps, `[steps, samples, …]`.
    pub fn step_noise(&self, steps: usize, samples: Range<usize>) -> Tensor {
        let parts: Vec<f32> = (0..steps)
            .flat_map(|step| self.normal(&format!("step {step}"), samples.clone()).to_f32s().unwrap_or_default())
            .collect();
        Tensor::from_f32s(&[&[steps, samples.len()], &self.dims[..]].concat(), &parts)
    }

    fn normal(&self, name: &str, samples: Range<usize>) -> Tensor {
        let size: usize = self.dims.iter().product();
        let dims = [&[samples.len()], &self.dims[..]].concat();
        let numbers: Vec<f32> = samples
            .flat_map(|sample| {
                let mut random = Random::named(self.seed(sample), name);
                (0..size).map(move |_| random.normal() as f32)
            })
            .collect();
        Tensor::from_f32s(&dims, &numbers)
    }

    /// A condition of some samples. Classes are taken in turn, without the one that stands for none.
    pub fn condition(&self, name: &str, samples: Range<usize>, none: Option<f64>) -> Result<Tensor, Failure> {
        let one = |sample: usize| -> Result<Tensor, Failure> {
            let spec = InputSpec { seed: self.seed(sample), ..self.spec.clone() };
            let made = generate(self.model, &spec, &self.sizes).context("no inputs can be made up")?;
            let found = made.into_iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor);
            Ok(found.ok_or_else(|| anyhow!("no value for `{name}` can be made up"))?)
        };
        let first = one(samples.start)?;
        let value = self.model.graph.find_value(name);
        let shape = value.and_then(|v| self.model.graph.value(v).ty.as_ref()).and_then(|ty| ty.shape());
        let batched = shape.and_then(|shape| shape.dims.first()).is_some_and(|dim| dim.known().is_none());
        let mut dims = first.dims().to_vec();
        if batched {
            dims[0] = samples.len();
        }
        let make = |values: &[f64]| {
            let tensor = Tensor::from_f64s(first.dtype(), &dims, values);
            tensor.ok_or_else(|| Failure::Error(anyhow!("no value for `{name}` can be made up")))
        };
        if let Some(count) = classes(self.model, name) {
            let all: Vec<f64> = (0..count).map(|class| class as f64).filter(|c| Some(*c) != none).collect();
            let rows: usize = dims.iter().product();
            let turn: Vec<f64> = (samples.start..samples.start + rows).map(|k| all[k % all.len()]).collect();
            return make(&turn);
        }
        if !batched {
            return Ok(first);
        }
        let mut values = Vec::new();
        for sample in samples {
            let numbers = one(sample)?.to_f64s();
            values.extend(numbers.ok_or_else(|| anyhow!("no value for `{name}` can be made up"))?);
        }
        make(&values)
    }
}
