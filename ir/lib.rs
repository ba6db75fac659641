//! ONNX models in memory: reading, editing, checking and writing them, and their text form.
//!
//! Everything about the file format stays in [`onnx`]; the rest of the program sees [`Model`] and [`Graph`].

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod copy;
mod graph;
mod mapping;
mod model;
mod onnx;
mod patch;
mod pattern;
mod tensor;
mod types;
mod whole_file;

pub mod text;

pub use check::{CheckError, KNOWN_OPSETS};
pub use copy::{Fragment, Pasted};
pub use graph::{
    Attribute, AttributeValue, Cycle, Graph, Initializer, Node, NodeId, Origin, Placement, Port, Scope, ScopeId,
    ShardedDim, Sharding, Use, Value, ValueId,
};
pub use model::{DeviceConfiguration, Function, Model, RENAMED, imported};
pub use onnx::{
    External, ExternalError, Loaded, ReadError, Staged, WriteError, WriteOptions, Written, remove_staged,
    remove_staged_of,
};
pub use patch::Patch;
pub use pattern::{Bindings, Pattern};
pub use tensor::{Metadata, Parts, SparseTensor, Tensor, TensorError, element_count};
pub use types::{DataType, Dim, Shape, Type, TypeKind};
pub use whole_file::write_whole;
