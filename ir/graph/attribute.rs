//! Attributes of nodes.

use super::ScopeId;
use crate::{DataType, SparseTensor, Tensor, Type};
use bytes::Bytes;

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The names are ONNX's own.
pub enum AttributeValue {
    Float(f32),
    Int(i64),
    String(Bytes),
    Tensor(Tensor),
    Graph(ScopeId),
    SparseTensor(SparseTensor),
    Type(Type),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Bytes>),
    Tensors(Vec<Tensor>),
    Graphs(Vec<ScopeId>),
    SparseTensors(Vec<SparseTensor>),
    Types(Vec<Type>),
    /// In a local function: the attribute `name` of the calling node, of ONNX attribute type `kind`.
    Reference {
        name: String,
        kind: i32,
    },
}

impl From<i64> for AttributeValue {
    fn from(value: i64) -> Self {
        AttributeValue::Int(value)
    }
}

impl From<f32> for AttributeValue {
    fn from(value: f32) -> Self {
        AttributeValue::Float(value)
    }
}

impl From<&str> for AttributeValue {
    fn from(value: &str) -> Self {
        AttributeValue::String(Bytes::copy_from_slice(value.as_bytes()))
    }
}

impl From<Vec<i64>> for AttributeValue {
    fn from(value: Vec<i64>) -> Self {
        AttributeValue::Ints(value)
    }
}

impl From<Vec<f32>> for AttributeValue {
    fn from(value: Vec<f32>) -> Self {
        AttributeValue::Floats(value)
    }
}

impl From<Tensor> for AttributeValue {
    fn from(value: Tensor) -> Self {
        AttributeValue::Tensor(value)
    }
}

impl From<DataType> for AttributeValue {
    fn from(value: DataType) -> Self {
        AttributeValue::Int(value.code().into())
    }
}

/// A named attribute of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct Attribute {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: AttributeValue,
    /// Documentation kept for the file.
    pub doc: String,
}

impl Attribute {
    /// An attribute without documentation.
    pub fn new(name: impl Into<String>, value: impl Into<AttributeValue>) -> Attribute {
        Attribute { name: name.into(), value: value.into(), doc: String::new() }
    }
}
