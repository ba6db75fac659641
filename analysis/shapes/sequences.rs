//! Sequences and optional values.

use super::node::{Cx, Out, ValueType, axis_of, known};
use crate::dim::DimExpr;
use lathe_ir::{AttributeValue, DataType};

/// The type of the elements of input `index`.
fn element(cx: &Cx, index: usize) -> ValueType {
    match cx.ty(index) {
        ValueType::Sequence(element) => *element,
        _ => ValueType::Unknown,
    }
}

/// SequenceEmpty.
pub(super) fn empty(cx: &Cx) -> Vec<Out> {
    let elem = cx.dtype("dtype", Some(DataType::Float));
    vec![Out::sequence(ValueType::Tensor { elem, dims: None })]
}

/// SequenceConstruct.
pub(super) fn construct(cx: &Cx) -> Option<Vec<Out>> {
    let mut types = (0..cx.node.inputs().len()).map(|i| cx.ty(i));
    let first = types.next()?;
    Some(vec![Out::sequence(types.fold(first, |a, b| a.merged(&b)))])
}

/// SequenceInsert.
pub(super) fn insert(cx: &Cx) -> Vec<Out> {
    vec![Out::sequence(element(cx, 0).merged(&cx.ty(1)))]
}

/// SequenceErase.
pub(super) fn erase(cx: &Cx) -> Vec<Out> {
    vec![Out::of_type(&cx.ty(0))]
}

/// SequenceAt.
pub(super) fn at(cx: &Cx) -> Vec<Out> {
    vec![Out::of_type(&element(cx, 0))]
}

/// SplitToSequence.
pub(super) fn split(cx: &Cx) -> Option<Vec<Out>> {
    let keep = cx.int("keepdims", 1)? != 0 || cx.has(1);
    let dims = match cx.dims(0) {
        Some(mut dims) => {
            let axis = axis_of(cx.int("axis", 0)?, dims.len())?;
            if !keep {
                dims.remove(axis);
            } else {
                // Parts are equal only if one is asked for along the whole axis, or each has one element.
                dims[axis] = if cx.has(1) { None } else { known(1) };
            }
            Some(dims)
        }
        None => None,
    };
    Some(vec![Out::sequence(ValueType::Tensor { elem: cx.elem(0), dims })])
}

/// ConcatFromSequence.
pub(super) fn concat(cx: &Cx) -> Option<Vec<Out>> {
    let new_axis = cx.int("new_axis", 0)? != 0;
    let axis = cx.maybe_int("axis")??;
    Some(vec![match element(cx, 0) {
        ValueType::Tensor { elem, dims: Some(mut dims) } => {
            let axis = axis_of(axis, dims.len() + usize::from(new_axis))?;
            if new_axis {
                dims.insert(axis, None);
            } else {
                dims[axis] = None;
            }
            Out::tensor(elem, Some(dims))
        }
        ValueType::Tensor { elem, dims: None } => Out::unshaped(elem),
        _ => Out::unknown(),
    }])
}

/// Optional: of the input, or of the stated type if there is none.
pub(super) fn optional(cx: &Cx) -> Option<Vec<Out>> {
    let inner = if cx.has(0) {
        cx.ty(0)
    } else {
        match cx.attribute("type").ok()?? {
            AttributeValue::Type(ty) => ValueType::stated_sizes(ty),
            _ => return None,
        }
    };
    Some(vec![Out::of_type(&ValueType::Optional(Box::new(inner)))])
}

/// OptionalGetElement: from opset 18 a value that is not optional passes through.
pub(super) fn optional_get(cx: &Cx) -> Vec<Out> {
    vec![match cx.ty(0) {
        ValueType::Optional(inner) => Out::of_type(&inner),
        other => Out::of_type(&other),
    }]
}

/// OptionalHasElement.
pub(super) fn optional_has(cx: &Cx) -> Vec<Out> {
    let known: Option<DimExpr> = if cx.has(0) { None } else { Some(0.into()) };
    vec![Out::scalar(DataType::Bool).with_contents(Some(vec![known]))]
}
