//! Operators that pick elements by index.

use super::{
    contents::{Element, flatten, sizes, unflatten},
    node::{Cx, Dims, Out, axis_of, known},
};
use crate::dim::{DimExpr, product};
use lathe_ir::{AttributeValue, DataType, element_count};

/// Gather: the indexed axis is replaced by the axes of the indices.
pub(super) fn gather(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let (Some(data), Some(indices)) = (cx.shape(0), cx.shape(1)) else { return Some(vec![Out::unshaped(elem)]) };
    let axis = axis_of(cx.int("axis", 0)?, data.len())?;
    let dims = data[..axis].iter().chain(indices).chain(&data[axis + 1..]).cloned().map(Some).collect();
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(gathered(cx, axis))])
}

fn gathered(cx: &Cx, axis: usize) -> Option<Vec<Element>> {
    let (data, picks) = (cx.contents(0)?.elements(), cx.contents(1)?.elements());
    let shape = sizes(cx, 0)?;
    let (outer, inner) = (element_count(&shape[..axis])?, element_count(&shape[axis + 1..])?);
    let total = outer.checked_mul(picks.len())?.checked_mul(inner)?;
    if total == 0 || total > super::MAX_CONTENTS {
        return None;
    }
    let mut all = Vec::with_capacity(total);
    for row in 0..outer {
        for pick in picks {
            let at = pick.as_ref().and_then(|p| axis_of(p.as_known()?, shape[axis]));
            for column in 0..inner {
                all.push(at.and_then(|at| data.get((row * shape[axis] + at) * inner + column)?.clone()));
            }
        }
    }
    Some(all)
}

/// The output has the elements of the first input in the shape of the indices: GatherElements.
pub(super) fn gather_elements(cx: &Cx) -> Vec<Out> {
    vec![Out::tensor(cx.elem(0), cx.dims(1))]
}

/// GatherND.
pub(super) fn gather_nd(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let batch = usize::try_from(cx.int("batch_dims", 0)?).ok()?;
    let (Some(data), Some(indices)) = (cx.shape(0), cx.shape(1)) else { return Some(vec![Out::unshaped(elem)]) };
    let (last, lead) = indices.split_last()?;
    let Some(depth) = last.as_known().and_then(|d| usize::try_from(d).ok()) else {
        return Some(vec![Out::unshaped(elem)]);
    };
    let rest = data.get(batch.checked_add(depth)?..)?;
    Some(vec![Out::tensor(elem, Some(lead.iter().chain(rest).cloned().map(Some).collect()))])
}

/// Compress.
pub(super) fn compress(cx: &Cx) -> Option<Vec<Out>> {
    let dims = match cx.maybe_int("axis")? {
        None => Some(vec![None]),
        Some(axis) => cx.dims(0).map(|mut dims| {
            if let Some(axis) = axis_of(axis, dims.len()) {
                dims[axis] = None;
            }
            dims
        }),
    };
    Some(vec![Out::tensor(cx.elem(0), dims)])
}

/// NonZero: one column per element found.
pub(super) fn non_zero(cx: &Cx) -> Vec<Out> {
    // A scalar counts as a vector of one element in some runtimes and not in others.
    let ndim = cx.ndim(0).filter(|&n| n > 0).and_then(|n| i64::try_from(n).ok());
    let all = || {
        let filled = cx.graph.node(cx.graph.producer(cx.node.input(0)?)?);
        let full = filled.is("ConstantOfShape")
            && matches!(filled.attribute("value"), Some(AttributeValue::Tensor(t)) if t.scalar_f64().is_some_and(|v| v != 0.0));
        full.then(|| product(cx.shape(0)?)).flatten()
    };
    let count = ndim.and_then(|_| all());
    vec![Out::tensor(Some(DataType::Int64), Some(vec![ndim.map(DimExpr::from), count]))]
}

/// OneHot.
pub(super) fn one_hot(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(2);
    let Some(indices) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    let axis = axis_of(cx.int("axis", -1)?, indices.len() + 1)?;
    let mut dims: Dims = indices.iter().cloned().map(Some).collect();
    dims.insert(axis, cx.element_of(1).and_then(|size| cx.size(&size)));
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// TopK: `k` is an attribute before opset 10.
pub(super) fn top_k(cx: &Cx) -> Option<Vec<Out>> {
    let k = if cx.opset < 10 { cx.maybe_int("k")?.map(DimExpr::from) } else { cx.element_of(1) };
    let axis = cx.int("axis", -1)?;
    let dims = match cx.dims(0) {
        Some(mut dims) => {
            let axis = axis_of(axis, dims.len())?;
            dims[axis] = k.and_then(|size| cx.size(&size));
            Some(dims)
        }
        None => None,
    };
    Some(vec![Out::tensor(cx.elem(0), dims.clone()), Out::tensor(Some(DataType::Int64), dims)])
}

/// Unique: a number of elements that only the data tells.
pub(super) fn unique(cx: &Cx) -> Option<Vec<Out>> {
    let axis = cx.maybe_int("axis")?;
    let dims = match axis {
        None => Some(vec![None]),
        Some(axis) => match cx.dims(0) {
            Some(mut dims) => {
                let axis = axis_of(axis, dims.len())?;
                dims[axis] = None;
                Some(dims)
            }
            None => None,
        },
    };
    let inverse = match axis {
        None => cx.shape(0).and_then(crate::dim::product),
        Some(axis) => cx.shape(0).and_then(|s| s.get(axis_of(axis, s.len())?).cloned()),
    };
    let list = |len: Option<DimExpr>| Out::tensor(Some(DataType::Int64), Some(vec![len]));
    Some(vec![Out::tensor(cx.elem(0), dims), list(None), list(inverse), list(None)])
}

/// ScatterElements, ScatterND and the like keep the first input's type; contents follow where everything is known.
pub(super) fn scatter_nd(cx: &Cx) -> Option<Vec<Out>> {
    let contents = || {
        if cx.string("reduction", "none")? != "none" {
            return None;
        }
        let (shape, mut data) = (sizes(cx, 0)?, cx.contents(0)?.elements().to_vec());
        let (indices, updates) = (cx.ints_of(1)?, cx.contents(2)?.elements());
        let depth = *sizes(cx, 1)?.last()?;
        let inner = element_count(shape.get(depth..)?)?;
        if depth == 0 {
            return None;
        }
        for (row, index) in indices.chunks(depth).enumerate() {
            let at: Vec<usize> = index.iter().zip(&shape).map(|(&i, &size)| axis_of(i, size)).collect::<Option<_>>()?;
            let start = flatten(&at, &shape[..depth]) * inner;
            for column in 0..inner {
                *data.get_mut(start + column)? = updates.get(row * inner + column)?.clone();
            }
        }
        Some(data)
    };
    Some(vec![Out::of_type(&cx.ty(0)).with_contents(contents())])
}

/// ScatterElements along one axis.
pub(super) fn scatter_elements(cx: &Cx) -> Option<Vec<Out>> {
    let contents = || {
        if cx.string("reduction", "none")? != "none" {
            return None;
        }
        let (shape, mut data) = (sizes(cx, 0)?, cx.contents(0)?.elements().to_vec());
        let (indices, updates, places) = (cx.ints_of(1)?, cx.contents(2)?.elements(), sizes(cx, 1)?);
        let axis = axis_of(cx.int("axis", 0)?, shape.len())?;
        for (flat, &index) in indices.iter().enumerate() {
            let mut at = unflatten(flat, &places);
            *at.get_mut(axis)? = axis_of(index, shape[axis])?;
            *data.get_mut(flatten(&at, &shape))? = updates.get(flat)?.clone();
        }
        Some(data)
    };
    Some(vec![Out::of_type(&cx.ty(0)).with_contents(contents())])
}

/// ArgMax and ArgMin.
pub(super) fn arg_extreme(cx: &Cx) -> Option<Vec<Out>> {
    let keep = cx.int("keepdims", 1)? != 0;
    let axis = cx.int("axis", 0)?;
    let dims = match cx.dims(0) {
        Some(mut dims) => {
            let axis = axis_of(axis, dims.len())?;
            if keep {
                dims[axis] = known(1);
            } else {
                dims.remove(axis);
            }
            Some(dims)
        }
        None => None,
    };
    Some(vec![Out::tensor(Some(DataType::Int64), dims)])
}
