//! Operators that work element by element, and others that keep the shape of an input.

use super::{
    contents,
    node::{Cx, Dims, Out},
};
use crate::dim::DimExpr;
use lathe_ir::DataType;

/// The first output has the type and shape of input `index`.
pub(super) fn same(cx: &Cx, index: usize) -> Vec<Out> {
    vec![Out::of_type(&cx.ty(index))]
}

/// The first output has the shape of input `index` and this element type.
pub(super) fn same_shape(cx: &Cx, index: usize, elem: Option<DataType>) -> Vec<Out> {
    vec![Out::tensor(elem, cx.dims(index))]
}

/// The same value: type, shape and contents.
pub(super) fn identity(cx: &Cx) -> Vec<Out> {
    let contents = cx.contents(0).map(|c| c.elements().to_vec());
    vec![Out::of_type(&cx.ty(0)).with_contents(contents)]
}

/// The shape that all these shapes broadcast to; `None` if one is unknown.
pub(super) fn broadcast_dims<'a>(shapes: impl IntoIterator<Item = Option<&'a [DimExpr]>>) -> Option<Dims> {
    let mut out: Dims = Vec::new();
    for shape in shapes {
        let shape = shape?;
        if shape.len() > out.len() {
            let missing = shape.len() - out.len();
            out.splice(0..0, std::iter::repeat_n(Some(DimExpr::from(1)), missing));
        }
        let skip = out.len() - shape.len();
        for (at, size) in out[skip..].iter_mut().zip(shape) {
            *at = match at.take() {
                Some(other) => other.broadcast(size),
                // Whatever the unknown size is, it broadcasts to a known one other than 1.
                None => Some(size.clone()).filter(|s| s.as_known().is_some_and(|s| s != 1)),
            };
        }
    }
    Some(out)
}

fn all_shapes<'a>(cx: &Cx<'a>) -> Option<Dims> {
    broadcast_dims((0..cx.node.inputs().len()).map(|i| cx.shape(i)))
}

/// Before opset 7 the second input was aligned by attributes, and the output had the shape of the first.
fn binary_dims(cx: &Cx) -> Option<Dims> {
    if cx.opset < 7 && cx.node.is_standard() { cx.dims(0) } else { all_shapes(cx) }
}

fn first_elem(cx: &Cx) -> Option<DataType> {
    (0..cx.node.inputs().len()).find_map(|i| cx.elem(i))
}

/// Add, Sub, Mul, Div, Mod.
pub(super) fn arithmetic(cx: &Cx) -> Vec<Out> {
    let elem = first_elem(cx);
    let contents = if cx.opset >= 7 { contents::arithmetic(cx, &cx.node.op_type, elem) } else { None };
    vec![Out::tensor(elem, binary_dims(cx)).with_contents(contents)]
}

/// Operators whose first input alone decides the element type.
pub(super) fn led_by_first(cx: &Cx) -> Vec<Out> {
    let elem = cx.elem(0);
    let contents = if cx.opset >= 7 { contents::arithmetic(cx, &cx.node.op_type, elem) } else { None };
    vec![Out::tensor(elem, binary_dims(cx)).with_contents(contents)]
}

/// Max, Min, Sum, Mean: any number of inputs, broadcast from opset 8.
pub(super) fn variadic(cx: &Cx) -> Vec<Out> {
    let dims = if cx.opset >= 8 { all_shapes(cx) } else { (0..cx.node.inputs().len()).find_map(|i| cx.dims(i)) };
    let elem = first_elem(cx);
    vec![Out::tensor(elem, dims).with_contents(contents::arithmetic(cx, &cx.node.op_type, elem))]
}

/// One input, arithmetic that contents can follow.
pub(super) fn unary(cx: &Cx) -> Vec<Out> {
    let contents = contents::arithmetic(cx, &cx.node.op_type, cx.elem(0));
    vec![Out::of_type(&cx.ty(0)).with_contents(contents)]
}

/// Comparisons and logical operators.
pub(super) fn logic(cx: &Cx) -> Vec<Out> {
    let contents = if cx.opset >= 7 { contents::logic(cx, &cx.node.op_type) } else { None };
    vec![Out::tensor(Some(DataType::Bool), binary_dims(cx)).with_contents(contents)]
}

/// Where.
pub(super) fn choice(cx: &Cx) -> Vec<Out> {
    vec![Out::tensor(cx.elem(1).or(cx.elem(2)), all_shapes(cx)).with_contents(contents::choice(cx))]
}

/// Cast and CastLike, with the target type given.
pub(super) fn cast(cx: &Cx, to: Option<DataType>) -> Vec<Out> {
    let contents = cx.contents(0).and_then(|c| contents::cast(c.elements(), cx.elem(0), to));
    vec![Out::tensor(to, cx.dims(0)).with_contents(contents)]
}

/// BitCast: the last axis grows or shrinks with the width of the type. Only equal widths are followed exactly.
pub(super) fn bit_cast(cx: &Cx) -> Option<Vec<Out>> {
    let to = cx.dtype("to", None)?;
    let from = cx.elem(0)?;
    let dims = if to.bits() == from.bits() { cx.dims(0) } else { None };
    Some(vec![Out::tensor(Some(to), dims)])
}

/// Clip: bounds are attributes or inputs; contents only where they lie within known bounds.
pub(super) fn clip(cx: &Cx) -> Vec<Out> {
    let bound = |index: usize| match cx.has(index) {
        true => cx.element_of(index).map(Some),
        false => Some(None),
    };
    let contents = if cx.opset >= 11 {
        let clipped = |low: &Option<DimExpr>, high: &Option<DimExpr>, value: &DimExpr| {
            let raised = low.as_ref().map_or_else(|| Some(value.clone()), |low| value.larger(low))?;
            high.as_ref().map_or_else(|| Some(raised.clone()), |high| raised.smaller(high))
        };
        cx.contents(0).zip(bound(1).zip(bound(2))).map(|(c, (low, high))| {
            let clip = |e: &contents::Element| contents::fitting(cx.elem(0), clipped(&low, &high, e.as_ref()?));
            c.elements().iter().map(clip).collect()
        })
    } else {
        None
    };
    vec![Out::of_type(&cx.ty(0)).with_contents(contents)]
}

/// Dropout: the mask had the type of the data before opset 10.
pub(super) fn dropout(cx: &Cx) -> Vec<Out> {
    let mask = if cx.opset >= 10 { Some(DataType::Bool) } else { cx.elem(0) };
    vec![Out::of_type(&cx.ty(0)), Out::tensor(mask, cx.dims(0))]
}

/// PRelu: the slope broadcasts to the data and never the other way.
pub(super) fn led_by_data(cx: &Cx) -> Vec<Out> {
    same(cx, 0)
}
