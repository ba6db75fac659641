//! The pure-Rust engine for machines without ONNX Runtime: the only module that mentions tract.
//!
//! It knows fewer operators than ONNX Runtime (no `Loop`, sequences or local functions) and says so when it meets one.

use crate::{
    Datum, RuntimeError,
    engine::{Engine, LoadOptions, Session, Source},
};
use bytes::Bytes;
use half::f16;
use lathe_ir::{DataType, Model, Tensor, TensorError};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, TValue, TractError,
    TractResult, TypedRunnableModel,
};

/// The engine that is always there.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Embedded;

impl Embedded {
    fn refuse(&self, message: String) -> RuntimeError {
        RuntimeError::Load { engine: self.name(), message }
    }
}

impl Engine for Embedded {
    fn load(&self, source: Source<'_>, options: &LoadOptions) -> Result<Box<dyn Session>, RuntimeError> {
        if options.provider != "cpu" {
            return Err(RuntimeError::Provider {
                engine: self.name(),
                provider: options.provider.clone(),
                available: self.providers().join(", "),
            });
        }
        // Names come from our own reader: the engine renames outputs that are also used inside.
        let read = match source {
            Source::Bytes(bytes) => Model::from_bytes(Bytes::copy_from_slice(bytes)),
            Source::Path(path) => Model::read(path),
        };
        let model = read.map_err(|e| self.refuse(e.to_string()))?.model;
        let outputs = model.graph.main().outputs().iter().map(|&v| model.graph.value(v).name.clone()).collect();
        let parse = || match source {
            Source::Bytes(mut bytes) => tract_onnx::onnx().model_for_read(&mut bytes),
            Source::Path(path) => tract_onnx::onnx().model_for_path(path),
        };
        let model = guarded(parse).map_err(|why| self.refuse(why.to_string()))?;
        Ok(Box::new(EmbeddedSession { model, outputs, optimize: options.optimize, engine: self.name(), plan: None }))
    }

    fn name(&self) -> String {
        "tract 0.23 (embedded)".to_owned()
    }

    fn providers(&self) -> Vec<String> {
        vec!["cpu".to_owned()]
    }
}

/// Element type and shape of every input.
type Signature = Vec<(DataType, Vec<usize>)>;

struct EmbeddedSession {
    model: InferenceModel,
    outputs: Vec<String>,
    optimize: bool,
    engine: String,
    /// The model made ready for inputs of these shapes.
    plan: Option<(Signature, Arc<TypedRunnableModel>)>,
}

impl Session for EmbeddedSession {
    fn run(&mut self, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Datum)>, RuntimeError> {
        let failed = |message: String| RuntimeError::Run { engine: self.engine.clone(), node: None, message };
        let refused = |why: Refused| failed(why.to_string());
        let value = |value: String, why: ValueError| RuntimeError::Value {
            value,
            engine: self.engine.clone(),
            message: why.to_string(),
        };
        let mut ordered = Vec::new();
        for outlet in self.model.inputs.iter() {
            let name = &self.model.nodes[outlet.node].name;
            let given = inputs.iter().find(|(given, _)| given == name);
            ordered.push(given.ok_or_else(|| failed(format!("the input `{name}` is not given")))?);
        }
        let signature: Signature = ordered.iter().map(|(_, t)| (t.dtype(), t.dims().to_vec())).collect();
        let mut feeds = Vec::with_capacity(ordered.len());
        for (name, tensor) in &ordered {
            let fed = to_tract(tensor).map_err(|why| value(format!("input `{name}`"), why))?;
            feeds.push(TValue::from(fed));
        }
        let known = self.plan.as_ref().filter(|(known, _)| *known == signature).map(|(_, plan)| Arc::clone(plan));
        let plan = match known {
            Some(plan) => plan,
            None => {
                let plan = guarded(|| prepare(&self.model, &feeds, self.optimize)).map_err(refused)?;
                self.plan = Some((signature, Arc::clone(&plan)));
                plan
            }
        };
        let results = guarded(|| plan.run(feeds.into_iter().collect())).map_err(refused)?;
        let mut outputs = Vec::with_capacity(results.len());
        for (name, result) in self.outputs.iter().zip(results) {
            let tensor = from_tract(&result).map_err(|why| value(format!("output `{name}`"), why))?;
            outputs.push((name.clone(), Datum::Tensor(tensor)));
        }
        Ok(outputs)
    }
}

/// Fixes the shapes of the inputs and makes the model ready to run.
fn prepare(model: &InferenceModel, feeds: &[TValue], optimize: bool) -> TractResult<Arc<TypedRunnableModel>> {
    let mut model = model.clone();
    for (index, feed) in feeds.iter().enumerate() {
        model.set_input_fact(index, InferenceFact::dt_shape(feed.datum_type(), feed.shape()))?;
    }
    if optimize { model.into_optimized()?.into_runnable() } else { model.into_typed()?.into_runnable() }
}

/// What the engine does not do.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0} (an installed ONNX Runtime is used instead, and runs more)")]
    Error(String),
    #[error("it stopped on an internal check (an installed ONNX Runtime is used instead, and runs more)")]
    Panic,
}

/// Runs something of the engine's; its errors and panics become one line.
fn guarded<T>(work: impl FnOnce() -> TractResult<T>) -> Result<T, Refused> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
            Err(Refused::Error(chain.join(": ").split_whitespace().collect::<Vec<_>>().join(" ")))
        }
        Err(_) => Err(Refused::Panic),
    }
}

/// Why a value cannot be handed over.
#[derive(Debug, thiserror::Error)]
enum ValueError {
    #[error("it has no elements of type {0}")]
    Elements(DataType),
    #[error("elements of type {0} cannot be taken from it")]
    Foreign(String),
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("{0}")]
    Engine(#[from] TractError),
}

fn to_tract(tensor: &Tensor) -> Result<tract_onnx::prelude::Tensor, ValueError> {
    macro_rules! numbers {
        ($ty:ty) => {{
            let chunks = tensor.bytes().as_chunks::<{ size_of::<$ty>() }>().0;
            let elements: Vec<$ty> = chunks.iter().map(|&b| <$ty>::from_le_bytes(b)).collect();
            tract_onnx::prelude::Tensor::from_shape(tensor.dims(), &elements)
        }};
    }
    let value = match tensor.dtype() {
        DataType::Float => numbers!(f32),
        DataType::Double => numbers!(f64),
        DataType::Float16 => numbers!(f16),
        DataType::Int8 => numbers!(i8),
        DataType::Int16 => numbers!(i16),
        DataType::Int32 => numbers!(i32),
        DataType::Int64 => numbers!(i64),
        DataType::Uint8 => numbers!(u8),
        DataType::Uint16 => numbers!(u16),
        DataType::Uint32 => numbers!(u32),
        DataType::Uint64 => numbers!(u64),
        DataType::Bool => {
            let flags: Vec<bool> = tensor.bytes().iter().map(|&b| b != 0).collect();
            tract_onnx::prelude::Tensor::from_shape(tensor.dims(), &flags)
        }
        other => return Err(ValueError::Elements(other)),
    };
    Ok(value?)
}

fn from_tract(value: &tract_onnx::prelude::Tensor) -> Result<Tensor, ValueError> {
    let dtype = match value.datum_type() {
        DatumType::F32 => DataType::Float,
        DatumType::F64 => DataType::Double,
        DatumType::F16 => DataType::Float16,
        DatumType::I8 => DataType::Int8,
        DatumType::I16 => DataType::Int16,
        DatumType::I32 => DataType::Int32,
        DatumType::I64 => DataType::Int64,
        DatumType::U8 => DataType::Uint8,
        DatumType::U16 => DataType::Uint16,
        DatumType::U32 => DataType::Uint32,
        DatumType::U64 => DataType::Uint64,
        DatumType::Bool => DataType::Bool,
        // Sizes it keeps symbolic are numbers by the time they come out.
        DatumType::TDim => {
            let sizes = value.cast_to::<i64>()?;
            let view = sizes.to_plain_array_view::<i64>()?;
            let sizes: Vec<i64> = view.iter().copied().collect();
            return Ok(Tensor::from_i64s(value.shape(), &sizes));
        }
        other => return Err(ValueError::Foreign(format!("{other:?}"))),
    };
    Ok(Tensor::new(dtype, value.shape().to_vec(), value.as_bytes().to_vec())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Claim, InputSpec, Inputs, VerifyTask,
        testing::{self, Build, unary},
        verify,
    };
    use lathe_ir::{Node, Type};

    #[test]
    fn agrees_with_onnx_runtime() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        let w = build.constant("w", Tensor::from_f32s(&[3, 2], &[1.0, -2.0, 0.5, 3.0, -1.0, 0.25]));
        let h = build.node(Node::new("MatMul"), &[x, w], "h");
        let y = build.node(Node::new("Softmax").with("axis", -1), &[h], "y");
        let bytes = build.output(y, Type::unshaped(DataType::Float)).model().to_bytes();
        let input = ("x".to_owned(), Tensor::from_f32s(&[2, 3], &[0.1, 0.2, 0.3, -1.0, 2.0, 0.5]));
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let run = |engine: &dyn Engine| {
            engine.load(Source::Bytes(&bytes), &options).unwrap().run(std::slice::from_ref(&input)).unwrap()
        };
        let result = crate::compare(&run(testing::engine()), &run(&Embedded), Claim::Equivalent { rtol: None });
        assert!(result.holds(), "{}", result.describe_faults());
    }

    #[test]
    fn verifies_at_several_sizes() {
        let model = unary(Node::new("Relu"));
        let bytes = model.to_bytes();
        let source = || Source::Bytes(&bytes);
        let inputs = Inputs::Random(InputSpec::default());
        let claim = Claim::Equivalent { rtol: None };
        let options = LoadOptions::default();
        let (reference, candidate, inputs, options) = (source(), source(), &inputs, &options);
        let task =
            VerifyTask { model: &model, reference, candidate, inputs, claim, reference_options: options, options };
        let verdict = verify(&Embedded, &task, &mut |_: &str| {}).unwrap();
        assert!(verdict.holds(), "{}", verdict.describe());
    }

    #[test]
    fn an_unknown_operator_is_an_error() {
        let bytes = unary(Node::new("NoSuchOperator")).to_bytes();
        let input = ("x".to_owned(), Tensor::from_f32s(&[1, 3], &[0.0; 3]));
        let loaded = Embedded.load(Source::Bytes(&bytes), &LoadOptions::default());
        let error = loaded.and_then(|mut session| session.run(&[input])).unwrap_err().to_string();
        assert!(error.contains("NoSuchOperator"), "{error}");
    }
}
