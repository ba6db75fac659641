//! Values: where they come from, what uses them, the constant behind them.

use super::{NodeId, ScopeId, ValueId};
use crate::{Metadata, SparseTensor, Tensor, Type};
use std::collections::BTreeSet;

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nothing: removed, or just added and not yet produced.
    None,
    /// An input of this scope; it may carry a default (an initializer that a caller can override).
    Input(ScopeId),
    /// An initializer of this scope.
    Initializer(ScopeId),
    /// This output of this node.
    Node(NodeId, usize),
}

/// Where a value is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Use {
    /// This input of this node.
    Node(NodeId, usize),
    /// This output of this scope.
    Output(ScopeId, usize),
    /// A parameter (scale, zero point) that this value's quantization annotation names.
    Annotation(ValueId),
}

/// A constant stored with the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Initializer {
    /// A dense tensor.
    Dense(Tensor),
    /// A sparse tensor.
    Sparse(SparseTensor),
}

/// One value: a graph input, an initializer or a node output.
#[derive(Debug, Clone)]
pub struct Value {
    /// Its name; never empty.
    pub name: String,
    /// The type that the file states.
    pub ty: Option<Type>,
    /// Documentation kept for the file.
    pub doc: String,
    /// Metadata kept for the file.
    pub metadata: Metadata,
    /// Quantization annotation: parameter kind (`SCALE_TENSOR`) and the value that holds it.
    pub(super) quantization: Vec<(String, ValueId)>,
    pub(super) origin: Origin,
    pub(super) initializer: Option<Initializer>,
    pub(super) uses: BTreeSet<Use>,
}

impl Value {
    /// Where it comes from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Its initializer: the constant itself, or the default of a graph input.
    pub fn initializer(&self) -> Option<&Initializer> {
        self.initializer.as_ref()
    }

    /// Everything that uses it, in a fixed order.
    pub fn uses(&self) -> &BTreeSet<Use> {
        &self.uses
    }

    /// The quantization annotation.
    pub fn quantization(&self) -> &[(String, ValueId)] {
        &self.quantization
    }
}
