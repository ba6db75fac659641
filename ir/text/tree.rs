//! A parsed text before its names are resolved.

use crate::{AttributeValue, Initializer, Metadata, Type};

/// A graph as written.
pub(super) struct RawGraph {
    pub name: String,
    pub inputs: Vec<RawValue>,
    pub outputs: Vec<RawValue>,
    /// Initializers and stated types.
    pub values: Vec<RawValue>,
    pub nodes: Vec<RawNode>,
}

/// A value that a graph declares.
pub(super) struct RawValue {
    pub at: usize,
    pub name: String,
    pub ty: Option<Type>,
    pub initializer: Option<Initializer>,
}

/// A name and where it stands; empty for an input or output that is left out.
pub(super) struct RawName {
    pub at: usize,
    pub name: String,
}

pub(super) struct RawNode {
    pub label: String,
    pub domain: String,
    pub op_type: String,
    pub overload: String,
    pub attributes: Vec<RawAttribute>,
    pub inputs: Vec<RawName>,
    pub outputs: Vec<RawName>,
}

pub(super) struct RawAttribute {
    pub at: usize,
    pub name: String,
    pub value: RawAttributeValue,
}

pub(super) enum RawAttributeValue {
    Plain(AttributeValue),
    Graph(RawGraph),
    Graphs(Vec<RawGraph>),
}

pub(super) struct RawFunction {
    pub header: Header,
    pub attributes: Vec<String>,
    pub defaults: Vec<RawAttribute>,
    pub graph: RawGraph,
}

/// What stands in `<…>` before a model or function.
#[derive(Default)]
pub(super) struct Header {
    pub ir_version: Option<i64>,
    pub opsets: Option<Vec<(String, i64)>>,
    pub producer_name: String,
    pub producer_version: String,
    pub domain: String,
    pub overload: String,
    pub model_version: Option<i64>,
    pub doc: String,
    pub metadata: Metadata,
}

pub(super) struct RawModel {
    /// `None` for a bare graph.
    pub header: Option<Header>,
    pub graph: RawGraph,
    pub functions: Vec<RawFunction>,
}
