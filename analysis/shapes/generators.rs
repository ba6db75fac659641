//! Operators that make tensors from attributes or from shapes: constants, ranges, random numbers, windows.

use super::{
    constant,
    contents::{Element, whole},
    node::{Cx, Dims, Out, known},
};
use crate::dim::DimExpr;
use lathe_ir::{AttributeValue, DataType};

/// Constant, in each of its forms.
pub(super) fn constant_node(cx: &Cx) -> Option<Vec<Out>> {
    let names = [
        "value",
        "value_int",
        "value_ints",
        "value_float",
        "value_floats",
        "value_string",
        "value_strings",
        "sparse_value",
    ];
    let value = names.iter().find_map(|name| cx.attribute(name).ok().flatten())?;
    let list = |len: usize| Some(vec![i64::try_from(len).ok().map(DimExpr::from)]);
    let out = match value {
        AttributeValue::Tensor(tensor) => constant(tensor),
        AttributeValue::Int(value) => Out::scalar(DataType::Int64).with_contents(Some(vec![known(*value)])),
        AttributeValue::Ints(values) => {
            let contents = values.iter().map(|&v| known(v)).collect();
            Out::tensor(Some(DataType::Int64), list(values.len())).with_contents(Some(contents))
        }
        AttributeValue::Float(value) => {
            let contents = whole(f64::from(*value)).map(DimExpr::from);
            Out::scalar(DataType::Float).with_contents(Some(vec![contents]))
        }
        AttributeValue::Floats(values) => {
            let contents = values.iter().map(|&v| whole(f64::from(v)).map(DimExpr::from)).collect();
            Out::tensor(Some(DataType::Float), list(values.len())).with_contents(Some(contents))
        }
        AttributeValue::String(_) => Out::scalar(DataType::String),
        AttributeValue::Strings(values) => Out::tensor(Some(DataType::String), list(values.len())),
        AttributeValue::SparseTensor(sparse) => {
            let dims = sparse.dims.iter().map(|&d| i64::try_from(d).ok().map(DimExpr::from)).collect();
            Out::tensor(Some(sparse.values.dtype()), Some(dims))
        }
        _ => return None,
    };
    Some(vec![out])
}

/// The sizes that a shape input lists.
pub(super) fn listed_dims(cx: &Cx, index: usize) -> Option<Dims> {
    match cx.contents(index) {
        Some(contents) => Some(contents.elements().iter().map(|e| e.clone().and_then(|size| cx.size(&size))).collect()),
        None => cx.len_of(index).map(|len| vec![None; len]),
    }
}

/// ConstantOfShape.
pub(super) fn constant_of_shape(cx: &Cx) -> Option<Vec<Out>> {
    let (elem, value): (DataType, Element) = match cx.attribute("value").ok()? {
        Some(AttributeValue::Tensor(tensor)) => {
            let whole_number = tensor.dtype().is_integer() || tensor.dtype() == DataType::Bool;
            let number = if whole_number { tensor.scalar_i64() } else { tensor.scalar_f64().and_then(whole) };
            (tensor.dtype(), number.map(DimExpr::from))
        }
        Some(_) => return None,
        None => (DataType::Float, known(0)),
    };
    let dims = listed_dims(cx, 0);
    Some(vec![Out::tensor(Some(elem), dims.clone()).with_contents(filled(&dims, value))])
}

fn filled(dims: &Option<Dims>, value: Element) -> Option<Vec<Element>> {
    let sizes: Vec<usize> =
        dims.as_ref()?.iter().map(|d| usize::try_from(d.as_ref()?.as_known()?).ok()).collect::<Option<_>>()?;
    let count = lathe_ir::element_count(&sizes).filter(|&n| n <= super::MAX_CONTENTS)?;
    Some(vec![value; count])
}

/// Range.
pub(super) fn range(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let (start, limit, step) = (cx.element_of(0), cx.element_of(1), cx.element_of(2));
    // Floats that are not whole numbers have no contents, so this never rounds.
    let known_step = step.as_ref().and_then(DimExpr::as_known).filter(|&s| s != 0);
    let length = || {
        let (start, limit, step) = (start.as_ref()?, limit.as_ref()?, known_step?);
        let span = if step > 0 { limit.minus(start)? } else { start.minus(limit)? };
        cx.facts.at_least_zero(span.ceil_div(step.checked_abs()?)?)
    };
    let length = length();
    let count = length.as_ref().and_then(|l| usize::try_from(l.as_known()?).ok()).filter(|&n| n <= super::MAX_CONTENTS);
    let contents = count.zip(start).zip(known_step).map(|((count, start), step)| {
        let at = |i: usize| start.offset(step.checked_mul(i64::try_from(i).ok()?)?);
        (0..count).map(at).collect()
    });
    Some(vec![Out::tensor(elem, Some(vec![length])).with_contents(contents)])
}

/// EyeLike, RandomNormalLike, RandomUniformLike, Bernoulli.
pub(super) fn like(cx: &Cx) -> Option<Vec<Out>> {
    let elem = match cx.maybe_int("dtype")? {
        Some(_) => cx.dtype("dtype", None),
        None => cx.elem(0),
    };
    Some(vec![Out::tensor(elem, cx.dims(0))])
}

/// RandomNormal and RandomUniform.
pub(super) fn random(cx: &Cx) -> Option<Vec<Out>> {
    let dims = cx.ints("shape")?.map(|dims| dims.iter().map(|&d| known(d)).collect());
    Some(vec![Out::tensor(cx.dtype("dtype", Some(DataType::Float)), dims)])
}

/// Multinomial.
pub(super) fn multinomial(cx: &Cx) -> Option<Vec<Out>> {
    let dims = vec![cx.dim(0, 0), known(cx.int("sample_size", 1)?)];
    Some(vec![Out::tensor(cx.dtype("dtype", Some(DataType::Int32)), Some(dims))])
}
