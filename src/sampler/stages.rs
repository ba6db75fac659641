//! A pipeline around a sampling loop: one model of all, and the reference that runs one after the other.

use super::seeded_inputs::{SCALE, normal};
use crate::{Failure, runner::Runner};
use anyhow::{Context as _, anyhow};
use lathe_analysis::Evaluate;
use lathe_ir::{DataType, Dim, Model, ScopeId, Tensor, Type, ValueId};
use lathe_passes::sampler::{
    Roles,
    pipelines::{Link, PACKED_NOISES, chain},
};
use lathe_runtime::{InputSpec, Sizes, generate, required_inputs, sizes_to_try};
use serde_json::{Map, Value};

/// Tensors by name.
type Tensors = Vec<(String, Tensor)>;

/// Sizes that are tried until a pipeline takes one: how long texts may be is not always said by its parts.
const MOST_SIZES: usize = 6;
/// Samples of a trial.
pub(super) const SAMPLES: usize = 2;
/// The inputs of a loop that hold noise.
const NOISES: [&str; 2] = ["noise", "step_noise"];

/// What stands in front of a loop and behind it.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    /// Gives conditions; `None` where the loop is given its own.
    pub encode: Option<Model>,
    pub decode: Model,
}

/// What stands around a loop.
#[derive(Clone)]
pub(super) struct Stages {
    /// What the decoder gives.
    pub output: &'static str,
    /// Whether the noise is packed in front of the loop.
    pub packed: bool,
    /// With the parts as they are.
    pub reference: Ends,
    /// With the parts that go into the result.
    pub result: Ends,
    /// The sizes of the noise on trials; `None` for the batch.
    pub noise: Vec<Option<usize>>,
    /// How inputs are made up.
    pub inputs: InputSpec,
}

impl Stages {
    /// A loop whose sample becomes something else.
    pub fn tail(output: &'static str, decode: Model, inputs: &InputSpec) -> Stages {
        let ends = Ends { encode: None, decode };
        let (reference, result) = (ends.clone(), ends);
        Stages { output, packed: false, reference, result, noise: Vec::new(), inputs: inputs.clone() }
    }

    /// The same with the parts as they are.
    pub fn unsimplified(&self) -> Stages {
        Stages { result: self.reference.clone(), ..self.clone() }
    }

    /// One model of what stands around a loop and the loop.
    pub fn around(&self, inner: &Model) -> Result<Model, Failure> {
        let mut inner = inner.clone();
        let Ends { encode, decode } = &self.result;
        let packed: Vec<String> =
            encode.as_ref().map(|encode| names(encode, encode.graph.main().outputs())).unwrap_or_default();
        for (name, new) in NOISES.iter().zip(PACKED_NOISES) {
            if let Some(value) = inner.graph.find_value(name).filter(|_| packed.iter().any(|p| p == new)) {
                inner.graph.rename(value, new);
            }
        }
        let encode = encode.as_ref().map(|model| Link { name: "encode", what: "the text encoders", model });
        let links: Vec<Link> = encode
            .into_iter()
            .chain([
                Link { name: "loop", what: "the denoiser", model: &inner },
                Link { name: "decode", what: "the decoder", model: decode },
            ])
            .collect();
        Ok(chain(&links, &[self.output, "computed"])?)
    }

    /// Made-up inputs of the whole, of the sizes that are to be tried one after the other; `None` where they are those of the
    /// loop.
    pub fn inputs(&self, scale_is_input: bool) -> Result<Option<Vec<Tensors>>, Failure> {
        let Some(encode) = &self.reference.encode else { return Ok(None) };
        let spec = self.spec();
        let mut all = sizes_to_try(encode, &spec);
        // The second sizes have other tokens than the first.
        if all.len() > 1 {
            all.swap(0, 1);
        }
        all.truncate(MOST_SIZES);
        let make = |sizes: &Sizes| {
            let mut inputs = generate(encode, &spec, sizes).context("no inputs for the pipeline can be made up")?;
            for (name, tensor) in &mut inputs {
                if NOISES.contains(&name.as_str()) {
                    *tensor = normal(spec.seed, name, tensor.dims());
                }
                if tensor.dims().is_empty() && tensor.dtype() == DataType::Float {
                    *tensor = Tensor::from_f32s(&[], &[SCALE]);
                }
            }
            if scale_is_input {
                inputs.push(("guidance".to_owned(), Tensor::from_f32s(&[], &[SCALE])));
            }
            Ok(inputs)
        };
        all.iter().map(make).collect::<Result<_, _>>().map(Some)
    }

    /// What the user said about shapes; else the noise has the size that the denoiser is for.
    pub fn spec(&self) -> InputSpec {
        let mut spec = self.inputs.clone();
        if spec.shapes.iter().all(|(name, _)| name != NOISES[0]) {
            let batch = self.reference.encode.as_ref().and_then(fixed_batch).unwrap_or(SAMPLES);
            let dims: Option<Vec<usize>> =
                self.noise.iter().enumerate().map(|(axis, d)| d.or((axis == 0).then_some(batch))).collect();
            spec.shapes.extend(dims.map(|dims| (NOISES[0].to_owned(), dims)));
        }
        spec
    }

    /// What the loop takes when the whole takes `whole`.
    pub fn of_loop(
        &self,
        whole: &[(String, Tensor)],
        denoiser: &Model,
        roles: &Roles,
        evaluator: &dyn Evaluate,
    ) -> Result<Vec<(String, Tensor)>, Failure> {
        let Some(encode) = &self.reference.encode else { return Ok(whole.to_vec()) };
        let failed = |e| anyhow!("the text encoders cannot be run: {e}");
        let outputs = evaluator.run(encode, &super::check::named(encode, whole)).map_err(failed)?;
        let mut inputs: Vec<(String, Tensor)> = Vec::new();
        for (name, tensor) in outputs {
            let unpacked = PACKED_NOISES.iter().position(|packed| *packed == name).map(|k| NOISES[k].to_owned());
            inputs.push((unpacked.unwrap_or(name), tensor));
        }
        let given = whole.iter().filter(|(name, _)| NOISES.contains(&name.as_str()) || name == "guidance");
        for (name, tensor) in given {
            if inputs.iter().all(|(known, _)| known != name) {
                inputs.push((name.clone(), tensor.clone()));
            }
        }
        for (name, tensor) in &mut inputs {
            let condition = name.strip_suffix("_uncond").unwrap_or(name);
            let wanted =
                roles.conditions.iter().any(|c| c.name == condition).then(|| elem(denoiser, condition)).flatten();
            if let Some(elem) = wanted.filter(|elem| *elem != tensor.dtype()) {
                let cast = tensor.to_f64s().and_then(|values| Tensor::from_f64s(elem, tensor.dims(), &values));
                *tensor = cast.ok_or_else(|| anyhow!("`{name}` cannot be given as {elem}"))?;
            }
        }
        Ok(inputs)
    }

    /// The narrowest type of weights around the loop.
    pub fn precision(&self) -> DataType {
        let Ends { encode, decode } = &self.reference;
        let holds = |elem: DataType| {
            encode.iter().chain([decode]).any(|model| {
                let graph = &model.graph;
                graph
                    .initializers(ScopeId::MAIN)
                    .any(|v| graph.constant(v).is_some_and(|t| t.dtype() == elem && t.len() > 1))
            })
        };
        let narrow = [DataType::Bfloat16, DataType::Float16].into_iter().find(|&elem| holds(elem));
        narrow.unwrap_or(DataType::Float)
    }

    /// What the decoder makes of a sample.
    pub fn decoded(&self, sample: Tensor, evaluator: &dyn Evaluate) -> Result<Tensor, Failure> {
        let failed = |e| anyhow!("the decoder cannot be run: {e}");
        let outputs = evaluator.run(&self.reference.decode, &[("sample".to_owned(), sample)]).map_err(failed)?;
        let found = outputs.into_iter().find(|(name, _)| name == self.output).map(|(_, tensor)| tensor);
        Ok(found.ok_or_else(|| anyhow!("the decoder gave nothing"))?)
    }
}

/// What the encoders make of one text, by the name of the condition, for one sample.
pub(super) fn of_text(
    encode: &Model,
    ids: &Map<String, Value>,
    noise: &[Option<usize>],
    runner: &Runner,
) -> Result<Vec<(String, Tensor)>, Failure> {
    let graph = &encode.graph;
    let mut inputs = Vec::new();
    for value in required_inputs(graph) {
        let (name, ty) = (&graph.value(value).name, graph.value(value).ty.as_ref());
        let elem = ty.and_then(Type::elem).unwrap_or(DataType::Int64);
        let tensor = if NOISES.contains(&name.as_str()) {
            let dims: Vec<usize> = noise.iter().map(|d| d.unwrap_or(1)).collect();
            Tensor::from_f32s(&dims, &vec![0.0; dims.iter().product()])
        } else if elem.is_float() {
            Tensor::from_f32s(&[], &[1.0])
        } else {
            row(name, ids, elem)?
        };
        inputs.push((name.clone(), tensor));
    }
    runner
        .run(encode, &inputs)
        .map_err(|e| Failure::Error(anyhow!("the text encoders cannot be run on --negative: {e}")))
}

/// A list of whole numbers, or a list that holds one.
fn row(name: &str, ids: &Map<String, Value>, elem: DataType) -> Result<Tensor, Failure> {
    let list = ids.get(name).and_then(Value::as_array);
    let list = list.map(|list| match list.as_slice() {
        [Value::Array(inner)] => inner,
        _ => list,
    });
    let numbers: Option<Vec<f64>> = list.and_then(|list| list.iter().map(|n| n.as_i64().map(|n| n as f64)).collect());
    let tensor = numbers.filter(|n| !n.is_empty()).and_then(|n| Tensor::from_f64s(elem, &[1, n.len()], &n));
    tensor.ok_or_else(|| Failure::Usage(format!("--negative has no list of whole numbers `{name}`")))
}

/// The batch that encoders take, where they take one only.
fn fixed_batch(encode: &Model) -> Option<usize> {
    let graph = &encode.graph;
    let first = |v: ValueId| graph.value(v).ty.as_ref()?.shape()?.dims.first().and_then(Dim::known);
    required_inputs(graph).find_map(first).and_then(|batch| usize::try_from(batch).ok())
}

fn elem(model: &Model, name: &str) -> Option<DataType> {
    let graph = &model.graph;
    graph.value(graph.find_value(name)?).ty.as_ref()?.elem()
}

fn names(model: &Model, values: &[ValueId]) -> Vec<String> {
    values.iter().map(|&v| model.graph.value(v).name.clone()).collect()
}
