//! Reductions along axes.

use super::{
    contents::{self, Element},
    layout,
    node::{Cx, Dims, Out, axis_of, known},
};
use crate::dim::DimExpr;

/// ReduceSum (axes as an input from opset 13) and the others (from opset 18).
pub(super) fn infer(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let keep = cx.int("keepdims", 1)? != 0;
    let empty_is_all = cx.int("noop_with_empty_axes", 0)? == 0;
    let since_input = if cx.node.op_type == "ReduceSum" { 13 } else { 18 };
    let axes = layout::axes(cx, since_input);
    let Some(shape) = cx.shape(0) else {
        let all = !keep && empty_is_all && matches!(&axes, Some(None));
        return Some(vec![Out::tensor(elem, all.then(Vec::new))]);
    };
    let axes: Vec<usize> = match axes {
        Some(Some(axes)) if !axes.is_empty() => axes.iter().map(|&a| axis_of(a, shape.len())).collect::<Option<_>>()?,
        Some(_) if empty_is_all => (0..shape.len()).collect(),
        Some(_) => Vec::new(),
        None => {
            // Which axes go is unknown, and how many only where the number of axes given cannot be 0.
            let dims = match cx.len_of(1) {
                _ if keep => Some(vec![None; shape.len()]),
                Some(count) if count > 0 && count <= shape.len() => Some(vec![None; shape.len() - count]),
                _ => None,
            };
            return Some(vec![Out::tensor(elem, dims)]);
        }
    };
    let mut dims: Dims = Vec::new();
    for (axis, size) in shape.iter().enumerate() {
        match axes.contains(&axis) {
            true if keep => dims.push(known(1)),
            true => {}
            false => dims.push(Some(size.clone())),
        }
    }
    let whole = axes.len() == shape.len() || (axes.is_empty() && shape.is_empty());
    let contents = if whole && !axes.is_empty() { reduced(cx) } else { None };
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(contents.map(|e| vec![e]))])
}

/// All elements reduced to one.
fn reduced(cx: &Cx) -> Option<Element> {
    let elements = cx.contents(0)?.elements();
    let rule: fn(&DimExpr, &DimExpr) -> Option<DimExpr> = match cx.node.op_type.as_str() {
        "ReduceSum" => DimExpr::plus,
        "ReduceProd" => DimExpr::times,
        "ReduceMax" => DimExpr::larger,
        "ReduceMin" => DimExpr::smaller,
        _ => return None,
    };
    let mut all = elements.iter().cloned();
    let total = match all.next() {
        Some(first) => all.try_fold(first?, |a, b| rule(&a, &b?)),
        None if cx.node.op_type == "ReduceProd" => Some(1.into()),
        None if cx.node.op_type == "ReduceSum" => Some(0.into()),
        None => None,
    };
    Some(contents::fitting(cx.elem(0), total))
}
