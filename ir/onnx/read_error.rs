//! Why a file is not a model: one sentence each.

use super::external::ExternalError;
use crate::TensorError;

/// The newest file format version that is understood.
pub(super) const NEWEST_IR: i64 = 14;

/// Why a file is not a model we can work on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum ReadError {
    #[error("cannot read the file: {0}")]
    Io(#[from] std::io::Error),
    #[error("the file is empty")]
    Empty,
    #[error("not an ONNX model, or a damaged one: {0}")]
    Decode(prost::DecodeError),
    #[error("not an ONNX tensor, or a damaged one: {0}")]
    DecodeTensor(prost::DecodeError),
    #[error("its graphs are nested more than 30 levels deep, which no one can follow")]
    TooDeep,
    #[error("the file has no graph, so it is not an ONNX model")]
    NoGraph,
    #[error("the file has format version {found}; the newest one known here is {NEWEST_IR}")]
    TooNew { found: i64 },
    #[error("field {field} of {message} is unknown here, and dropping it could change the model")]
    UnknownField { message: &'static str, field: u32 },
    #[error("{what} `{name}` is defined twice")]
    Duplicate { what: &'static str, name: String },
    #[error("input {index} of node `{node}` ({op}) is `{value}`, which nothing produces")]
    Dangling { node: String, op: String, index: usize, value: String },
    #[error("output `{value}` of graph `{graph}` is produced by nothing")]
    DanglingOutput { graph: String, value: String },
    #[error("{what} of graph `{graph}` has no name")]
    Unnamed { what: &'static str, graph: String },
    #[error("node `{node}` has no operator")]
    NoOperator { node: String },
    #[error("tensor `{tensor}`: {source}")]
    Tensor { tensor: String, source: TensorError },
    #[error("tensor `{tensor}`: {source}")]
    External { tensor: String, source: ExternalError },
    #[error("tensor `{tensor}` has element type {code}, which is unknown")]
    ElementType { tensor: String, code: i32 },
    #[error("the type of `{value}` names element type {code}, which is unknown")]
    ValueElementType { value: String, code: i32 },
    #[error("tensor `{tensor}` is a segment of a larger one, which no runtime supports")]
    Segment { tensor: String },
    #[error("attribute `{attribute}` of node `{node}` {problem}")]
    Attribute { node: String, attribute: String, problem: String },
}
