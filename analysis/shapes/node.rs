//! What an operator's rule sees of a node, and what it answers.

use super::{Contents, Facts};
use crate::dim::{DimExpr, Symbol};
use lathe_ir::{
    Attribute, AttributeValue, DataType, Dim, Graph, Initializer, Node, Origin, Shape, Tensor, Type, TypeKind, ValueId,
};

/// The sizes of the axes; `None` where one is unknown.
pub(super) type Dims = Vec<Option<DimExpr>>;

/// A type in which sizes may be unknown.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ValueType {
    Unknown,
    Tensor { elem: Option<DataType>, dims: Option<Dims> },
    Sparse { elem: Option<DataType>, dims: Option<Dims> },
    Sequence(Box<ValueType>),
    Optional(Box<ValueType>),
    Map { key: DataType, value: Box<ValueType> },
    Opaque { domain: String, name: String },
}

impl ValueType {
    /// A stated type with the names of its dimensions taken as true.
    pub(super) fn believed(ty: &Type) -> ValueType {
        ValueType::from_stated(ty, true)
    }

    /// A stated type with only its known sizes.
    pub(super) fn stated_sizes(ty: &Type) -> ValueType {
        ValueType::from_stated(ty, false)
    }

    fn from_stated(ty: &Type, names: bool) -> ValueType {
        let dim = |dim: &Dim| match (dim.known(), dim.name()) {
            (Some(size), _) => (size >= 0).then(|| DimExpr::from(size)),
            (None, Some(name)) if names => named(name),
            _ => None,
        };
        let dims = |shape: &Option<Shape>| shape.as_ref().map(|s| s.dims.iter().map(dim).collect());
        match &ty.kind {
            TypeKind::Tensor { elem, shape } => ValueType::Tensor { elem: *elem, dims: dims(shape) },
            TypeKind::SparseTensor { elem, shape } => ValueType::Sparse { elem: *elem, dims: dims(shape) },
            // The elements of a sequence need not have equal sizes, whatever their dimensions are called.
            TypeKind::Sequence(inner) => ValueType::Sequence(Box::new(ValueType::from_stated(inner, false))),
            TypeKind::Optional(inner) => ValueType::Optional(Box::new(ValueType::from_stated(inner, names))),
            TypeKind::Map { key, value } => {
                ValueType::Map { key: *key, value: Box::new(ValueType::from_stated(value, false)) }
            }
            TypeKind::Opaque { domain, name } => ValueType::Opaque { domain: domain.clone(), name: name.clone() },
            TypeKind::Unstated => ValueType::Unknown,
        }
    }

    /// The type in the file's terms.
    pub(super) fn stated(&self) -> Option<Type> {
        let shape = |dims: &Option<Dims>| {
            let dims = dims.as_ref()?.iter().map(|d| d.as_ref().map_or(Dim::Unknown, super::stated_dim)).collect();
            Some(Shape::new(dims))
        };
        let inner = |ty: &ValueType| Box::new(ty.stated().unwrap_or_else(|| TypeKind::Unstated.into()));
        let kind = match self {
            ValueType::Unknown => return None,
            ValueType::Tensor { elem, dims } => TypeKind::Tensor { elem: *elem, shape: shape(dims) },
            ValueType::Sparse { elem, dims } => TypeKind::SparseTensor { elem: *elem, shape: shape(dims) },
            ValueType::Sequence(ty) => TypeKind::Sequence(inner(ty)),
            ValueType::Optional(ty) => TypeKind::Optional(inner(ty)),
            ValueType::Map { key, value } => TypeKind::Map { key: *key, value: inner(value) },
            ValueType::Opaque { domain, name } => TypeKind::Opaque { domain: domain.clone(), name: name.clone() },
        };
        Some(kind.into())
    }

    /// How many types are nested in one another.
    pub(super) fn depth(&self) -> usize {
        match self {
            ValueType::Sequence(inner) | ValueType::Optional(inner) | ValueType::Map { value: inner, .. } => {
                1 + inner.depth()
            }
            _ => 1,
        }
    }

    /// This type with gaps filled from another one that does not contradict it.
    pub(super) fn filled_from(self, other: ValueType) -> ValueType {
        match (self, other) {
            (ValueType::Unknown, other) => other,
            (ValueType::Tensor { elem, dims }, ValueType::Tensor { elem: e, dims: d }) => {
                let dims = match (dims, d) {
                    (Some(dims), Some(d)) if dims.len() == d.len() => {
                        Some(dims.into_iter().zip(d).map(|(a, b)| a.or(b)).collect())
                    }
                    (Some(dims), _) => Some(dims),
                    (None, d) => d,
                };
                ValueType::Tensor { elem: elem.or(e), dims }
            }
            (ValueType::Sequence(a), ValueType::Sequence(b)) => ValueType::Sequence(Box::new(a.filled_from(*b))),
            (ValueType::Optional(a), ValueType::Optional(b)) => ValueType::Optional(Box::new(a.filled_from(*b))),
            (own, _) => own,
        }
    }

    /// What holds for values of both types.
    pub(super) fn merged(&self, other: &ValueType) -> ValueType {
        match (self, other) {
            (ValueType::Tensor { elem, dims }, ValueType::Tensor { elem: e, dims: d }) => {
                let dims = match (dims, d) {
                    (Some(a), Some(b)) if a.len() == b.len() => {
                        Some(a.iter().zip(b).map(|(a, b)| a.clone().filter(|_| a == b)).collect())
                    }
                    _ => None,
                };
                ValueType::Tensor { elem: elem.filter(|_| elem == e), dims }
            }
            (ValueType::Sequence(a), ValueType::Sequence(b)) => ValueType::Sequence(Box::new(a.merged(b))),
            (ValueType::Optional(a), ValueType::Optional(b)) => ValueType::Optional(Box::new(a.merged(b))),
            (a, b) if a == b => a.clone(),
            _ => ValueType::Unknown,
        }
    }

    fn keeping(self, keep: &dyn Fn(&Symbol) -> bool) -> ValueType {
        let kept = |dims: Option<Dims>| {
            let known = |dim: Option<DimExpr>| dim.filter(|d| d.all_symbols(keep));
            dims.map(|dims| dims.into_iter().map(known).collect())
        };
        match self {
            ValueType::Tensor { elem, dims } => ValueType::Tensor { elem, dims: kept(dims) },
            ValueType::Sparse { elem, dims } => ValueType::Sparse { elem, dims: kept(dims) },
            ValueType::Sequence(ty) => ValueType::Sequence(Box::new(ty.keeping(keep))),
            ValueType::Optional(ty) => ValueType::Optional(Box::new(ty.keeping(keep))),
            other => other,
        }
    }
}

/// The dimension that a name stands for. Exporters also write sums and products of names: `past + sequence`, `2*height`.
fn named(name: &str) -> Option<DimExpr> {
    let factor = |text: &str| match text.trim() {
        number if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => {
            Some(number.parse::<i64>().ok()?.into())
        }
        word if word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') && is_name(word) => {
            Some(DimExpr::named(word))
        }
        _ => None,
    };
    let term = |text: &str| text.split('*').map(factor).reduce(|a, b| a?.times(&b?)).flatten();
    let sum = name.split('+').map(term).reduce(|a, b| a?.plus(&b?)).flatten();
    sum.or_else(|| is_name(name).then(|| DimExpr::named(name)))
}

/// Whether a dimension's name tells it from others. Some exporters write `?` or `None` for every size they do not know.
fn is_name(name: &str) -> bool {
    let word = name.starts_with(|c: char| c.is_alphabetic() || c == '_');
    word && !["none", "unk", "unknown", "dynamic", "any"].iter().any(|n| name.eq_ignore_ascii_case(n))
}

/// What a rule says about one output.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Out {
    pub(super) ty: ValueType,
    /// As many elements as the (then known) shape has.
    pub(super) contents: Option<Vec<Option<DimExpr>>>,
}

impl Out {
    pub(super) fn unknown() -> Out {
        Out::of_type(&ValueType::Unknown)
    }

    pub(super) fn of_type(ty: &ValueType) -> Out {
        Out { ty: ty.clone(), contents: None }
    }

    pub(super) fn tensor(elem: Option<DataType>, dims: Option<Dims>) -> Out {
        Out { ty: ValueType::Tensor { elem, dims }, contents: None }
    }

    pub(super) fn unshaped(elem: Option<DataType>) -> Out {
        Out::tensor(elem, None)
    }

    pub(super) fn scalar(elem: DataType) -> Out {
        Out::tensor(Some(elem), Some(Vec::new()))
    }

    pub(super) fn sequence(ty: ValueType) -> Out {
        Out::of_type(&ValueType::Sequence(Box::new(ty)))
    }

    pub(super) fn with_contents(mut self, contents: Option<Vec<Option<DimExpr>>>) -> Out {
        self.contents = contents;
        self
    }

    /// What holds for both.
    pub(super) fn merged(&self, other: &Out) -> Out {
        let contents = match (&self.contents, &other.contents) {
            (Some(a), Some(b)) if a.len() == b.len() => {
                Some(a.iter().zip(b).map(|(a, b)| a.clone().filter(|_| a == b)).collect())
            }
            _ => None,
        };
        Out { ty: self.ty.merged(&other.ty), contents }
    }

    /// Without everything that depends on other symbols than `keep` allows.
    pub(super) fn keeping(self, keep: &dyn Fn(&Symbol) -> bool) -> Out {
        let kept = |element: Option<DimExpr>| element.filter(|e| e.all_symbols(keep));
        let contents = self.contents.map(|all| all.into_iter().map(kept).collect());
        Out { ty: self.ty.keeping(keep), contents }
    }
}

/// An attribute whose value is not known here: a function body looked at without a call.
#[derive(Debug)]
pub(super) struct Unbound;

/// One node as its rule sees it.
#[derive(Clone, Copy)]
pub(super) struct Cx<'a> {
    pub(super) node: &'a Node,
    pub(super) graph: &'a Graph,
    pub(super) facts: &'a Facts,
    /// The version of the operator set that the node's domain is imported at.
    pub(super) opset: i64,
    pub(super) bindings: &'a [Attribute],
}

impl<'a> Cx<'a> {
    pub(super) fn has(&self, index: usize) -> bool {
        self.node.input(index).is_some()
    }

    pub(super) fn elem(&self, index: usize) -> Option<DataType> {
        self.facts.elem(self.node.input(index)?)
    }

    pub(super) fn shape(&self, index: usize) -> Option<&'a [DimExpr]> {
        self.facts.shape(self.node.input(index)?)
    }

    pub(super) fn ndim(&self, index: usize) -> Option<usize> {
        self.shape(index).map(<[DimExpr]>::len)
    }

    /// The shape as an output states it.
    pub(super) fn dims(&self, index: usize) -> Option<Dims> {
        self.shape(index).map(|dims| dims.iter().cloned().map(Some).collect())
    }

    /// The size of an axis counted from the front.
    pub(super) fn dim(&self, index: usize, axis: usize) -> Option<DimExpr> {
        self.shape(index)?.get(axis).cloned()
    }

    pub(super) fn contents(&self, index: usize) -> Option<&'a Contents> {
        self.facts.contents(self.node.input(index)?)
    }

    /// All elements of an input, if they are known numbers.
    pub(super) fn ints_of(&self, index: usize) -> Option<Vec<i64>> {
        self.contents(index)?.known()
    }

    /// The only element of an input, if it is a known number.
    pub(super) fn int_of(&self, index: usize) -> Option<i64> {
        match self.ints_of(index)?.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }

    /// The only element of an input.
    pub(super) fn element_of(&self, index: usize) -> Option<DimExpr> {
        match self.contents(index)?.elements() {
            [only] => only.clone(),
            _ => None,
        }
    }

    /// The size that a number is, if it is certain to be one.
    pub(super) fn size(&self, number: &DimExpr) -> Option<DimExpr> {
        self.facts.is_size(number).then(|| number.clone())
    }

    /// The number of elements of an input with one axis, if that can be a number of axes.
    pub(super) fn len_of(&self, index: usize) -> Option<usize> {
        match self.shape(index)? {
            [len] => usize::try_from(len.as_known()?).ok().filter(|&len| len <= super::MAX_NDIM),
            _ => None,
        }
    }

    /// The real numbers of a small constant input.
    pub(super) fn floats_of(&self, index: usize) -> Option<Vec<f64>> {
        self.tensor_of(self.node.input(index)?).filter(|t| t.len() <= super::MAX_CONTENTS)?.to_f64s()
    }

    fn tensor_of(&self, value: ValueId) -> Option<&'a Tensor> {
        match self.graph.value(value).origin() {
            Origin::Initializer(_) => match self.graph.value(value).initializer() {
                Some(Initializer::Dense(tensor)) => Some(tensor),
                _ => None,
            },
            Origin::Node(node, 0) if self.graph.node(node).is("Constant") => {
                match self.graph.node(node).attribute("value")? {
                    AttributeValue::Tensor(tensor) => Some(tensor),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// An input's type as an output takes it over.
    pub(super) fn ty(&self, index: usize) -> ValueType {
        let Some(value) = self.node.input(index) else { return ValueType::Unknown };
        match self.facts.fact(value) {
            super::Fact::Unknown => ValueType::Unknown,
            super::Fact::Tensor { elem, .. } => ValueType::Tensor { elem: *elem, dims: self.dims(index) },
            super::Fact::Other(ty) => (**ty).clone(),
        }
    }

    /// The attribute, with references of function bodies resolved.
    pub(super) fn attribute(&self, name: &str) -> Result<Option<&'a AttributeValue>, Unbound> {
        match self.node.attribute(name) {
            Some(AttributeValue::Reference { name, .. }) => {
                let bound = self.bindings.iter().find(|a| a.name == *name).map(|a| &a.value);
                match bound {
                    Some(AttributeValue::Reference { .. }) => Err(Unbound),
                    // A call that leaves out an attribute leaves it out inside; in a body without a call it is unknown.
                    None if self.bindings.is_empty() => Err(Unbound),
                    bound => Ok(bound),
                }
            }
            found => Ok(found),
        }
    }

    /// The integer attribute; `None` if it is there but unknown.
    pub(super) fn int(&self, name: &str, default: i64) -> Option<i64> {
        self.maybe_int(name).map(|v| v.unwrap_or(default))
    }

    /// The integer attribute if it is there; the outer `None` if it is there but unknown.
    pub(super) fn maybe_int(&self, name: &str) -> Option<Option<i64>> {
        match self.attribute(name).ok()? {
            Some(AttributeValue::Int(value)) => Some(Some(*value)),
            Some(_) => None,
            None => Some(None),
        }
    }

    /// The integers attribute if it is there; the outer `None` if it is there but unknown.
    pub(super) fn ints(&self, name: &str) -> Option<Option<&'a [i64]>> {
        match self.attribute(name).ok()? {
            Some(AttributeValue::Ints(values)) => Some(Some(values)),
            Some(_) => None,
            None => Some(None),
        }
    }

    /// The string attribute; `None` if it is there but unknown.
    pub(super) fn string(&self, name: &str, default: &'a str) -> Option<&'a str> {
        match self.attribute(name).ok()? {
            Some(AttributeValue::String(value)) => std::str::from_utf8(value).ok(),
            Some(_) => None,
            None => Some(default),
        }
    }

    /// The element type that an integer attribute names; `None` if it is there but names none.
    pub(super) fn dtype(&self, name: &str, default: Option<DataType>) -> Option<DataType> {
        match self.maybe_int(name)? {
            Some(code) => DataType::from_code(i32::try_from(code).ok()?),
            None => default,
        }
    }
}

/// An axis counted from the front, if it lies in range.
pub(super) fn axis_of(axis: i64, ndim: usize) -> Option<usize> {
    let ndim_signed = i64::try_from(ndim).ok()?;
    let axis = if axis < 0 { axis.checked_add(ndim_signed)? } else { axis };
    usize::try_from(axis).ok().filter(|&axis| axis < ndim)
}

/// A size that is known.
pub(super) fn known(size: i64) -> Option<DimExpr> {
    Some(size.into())
}
