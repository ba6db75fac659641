//! Values on their way to ONNX Runtime and back.

use super::sentence;
use crate::Datum;
use bytes::Bytes;
use half::{bf16, f16};
use lathe_ir::{DataType, Tensor, TensorError};
use ort::value::{DynMapValueType, DynSequenceValueType, DynValue, TensorElementType, Value, ValueType};
use std::{num::TryFromIntError, string::FromUtf8Error};

/// The elements of a tensor as a vector of `$ty`, as ONNX Runtime wants them.
macro_rules! elements {
    ($ty:ty, $tensor:expr) => {
        $tensor
            .bytes()
            .as_chunks::<{ size_of::<$ty>() }>()
            .0
            .iter()
            .map(|&b| <$ty>::from_le_bytes(b))
            .collect::<Vec<$ty>>()
    };
}

/// Why a value cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub(super) enum ValueError {
    #[error(transparent)]
    Size(#[from] TryFromIntError),
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("a string is not UTF-8")]
    Text(#[from] FromUtf8Error),
    #[error("elements of type {0} are not supported by the binding")]
    Elements(String),
    #[error("maps from {key} to {value} are not supported by the binding")]
    Map { key: String, value: String },
    #[error("it is not a tensor")]
    NotATensor,
    #[error("it is not a map")]
    NotAMap,
    #[error("{0}")]
    Binding(String),
}

/// What the binding says about a value.
fn unbound<T>(error: ort::Error<T>) -> ValueError {
    ValueError::Binding(sentence(error.message()))
}

/// A tensor for the runtime.
pub(super) fn to_ort(tensor: &Tensor) -> Result<DynValue, ValueError> {
    let dims: Vec<i64> = tensor.dims().iter().map(|&d| i64::try_from(d)).collect::<Result<_, _>>()?;
    macro_rules! numbers {
        ($ty:ty) => {
            ort::value::Tensor::from_array((dims, elements!($ty, tensor))).map(|t| t.into_dyn())
        };
    }
    let value = match tensor.dtype() {
        DataType::Float => numbers!(f32),
        DataType::Double => numbers!(f64),
        DataType::Float16 => numbers!(f16),
        DataType::Bfloat16 => numbers!(bf16),
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
            ort::value::Tensor::from_array((dims, flags)).map(|t| t.into_dyn())
        }
        DataType::String => {
            let strings = tensor.string_data().unwrap_or_default();
            let text = |s: &Bytes| String::from_utf8(s.to_vec());
            let strings: Vec<String> = strings.iter().map(text).collect::<Result<_, _>>()?;
            ort::value::Tensor::from_string_array((dims, strings.as_slice())).map(|t| t.into_dyn())
        }
        other => return Err(ValueError::Elements(other.to_string())),
    };
    value.map_err(unbound)
}

/// What the runtime gives.
pub(super) fn from_ort(value: DynValue) -> Result<Datum, ValueError> {
    match value.dtype() {
        ValueType::Tensor { .. } => tensor_from_ort(&value).map(Datum::Tensor),
        ValueType::Sequence(_) => {
            let sequence: Value<DynSequenceValueType> = value.downcast().map_err(unbound)?;
            let members = sequence.try_extract_sequence::<ort::value::DynValueTypeMarker>();
            let members = members.map_err(unbound)?;
            Ok(Datum::Sequence(members.into_iter().map(from_ort).collect::<Result<_, _>>()?))
        }
        ValueType::Map { .. } => map_from_ort(value),
        // An optional output that is present shows the type of what it holds.
        ValueType::Optional(_) => Ok(Datum::None),
    }
}

fn tensor_from_ort(value: &DynValue) -> Result<Tensor, ValueError> {
    let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
        return Err(ValueError::NotATensor);
    };
    let dims: Vec<usize> = shape.iter().map(|&d| usize::try_from(d)).collect::<Result<_, _>>()?;
    macro_rules! numbers {
        ($ty:ty, $dtype:ident) => {{
            let (_, elements) = value.try_extract_tensor::<$ty>().map_err(unbound)?;
            let mut bytes = Vec::with_capacity(size_of_val(elements));
            for element in elements {
                bytes.extend_from_slice(&element.to_le_bytes());
            }
            Tensor::new(DataType::$dtype, dims, bytes)
        }};
    }
    let tensor = match ty {
        TensorElementType::Float32 => numbers!(f32, Float),
        TensorElementType::Float64 => numbers!(f64, Double),
        TensorElementType::Float16 => numbers!(f16, Float16),
        TensorElementType::Bfloat16 => numbers!(bf16, Bfloat16),
        TensorElementType::Int8 => numbers!(i8, Int8),
        TensorElementType::Int16 => numbers!(i16, Int16),
        TensorElementType::Int32 => numbers!(i32, Int32),
        TensorElementType::Int64 => numbers!(i64, Int64),
        TensorElementType::Uint8 => numbers!(u8, Uint8),
        TensorElementType::Uint16 => numbers!(u16, Uint16),
        TensorElementType::Uint32 => numbers!(u32, Uint32),
        TensorElementType::Uint64 => numbers!(u64, Uint64),
        TensorElementType::Bool => {
            let (_, flags) = value.try_extract_tensor::<bool>().map_err(unbound)?;
            let bytes: Vec<u8> = flags.iter().map(|&f| u8::from(f)).collect();
            Tensor::new(DataType::Bool, dims, bytes)
        }
        // Asking an empty tensor for its strings is an error in ONNX Runtime.
        TensorElementType::String if dims.contains(&0) => Tensor::strings(dims, Vec::new()),
        TensorElementType::String => {
            let (_, strings) = value.try_extract_strings().map_err(unbound)?;
            Tensor::strings(dims, strings.into_iter().map(Bytes::from).collect())
        }
        other => return Err(ValueError::Elements(other.to_string())),
    };
    Ok(tensor?)
}

fn map_from_ort(value: DynValue) -> Result<Datum, ValueError> {
    use TensorElementType::{Float32, Float64, Int64, String as Text};
    let map: Value<DynMapValueType> = value.downcast().map_err(unbound)?;
    let ValueType::Map { key, value } = map.dtype() else {
        return Err(ValueError::NotAMap);
    };
    macro_rules! entries {
        ($key:ty, $value:ty, $dtype:ident, $keys:expr) => {{
            let mut entries = map.try_extract_key_values::<$key, $value>().map_err(unbound)?;
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            let (keys, values): (Vec<$key>, Vec<$value>) = entries.into_iter().unzip();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            ($keys(keys), Tensor::new(DataType::$dtype, vec![values.len()], bytes))
        }};
    }
    let ints = |keys: Vec<i64>| Ok(Tensor::int64s(&keys));
    let texts = |keys: Vec<String>| Tensor::strings(vec![keys.len()], keys.into_iter().map(Bytes::from).collect());
    let (keys, values) = match (key, value) {
        (Int64, Float32) => entries!(i64, f32, Float, ints),
        (Int64, Float64) => entries!(i64, f64, Double, ints),
        (Int64, Int64) => entries!(i64, i64, Int64, ints),
        (Text, Float32) => entries!(String, f32, Float, texts),
        (Text, Float64) => entries!(String, f64, Double, texts),
        (Text, Int64) => entries!(String, i64, Int64, texts),
        _ => return Err(ValueError::Map { key: key.to_string(), value: value.to_string() }),
    };
    Ok(Datum::Map { keys: keys?, values: values? })
}
