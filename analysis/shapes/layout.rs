//! Operators that rearrange elements or change how they are counted: reshaping, transposing, joining, splitting.

use super::{
    contents::{self, Element, flatten, sizes, unflatten},
    node::{Cx, Dims, Out, axis_of, known},
};
use crate::dim::{DimExpr, product};
use lathe_ir::{DataType, element_count};

/// The elements of an input, for an output that has the same ones in the same order.
fn carried(cx: &Cx) -> Option<Vec<Element>> {
    cx.contents(0).map(|c| c.elements().to_vec())
}

/// Reshape: the target is an attribute before opset 5.
pub(super) fn reshape(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let copies_zero = cx.int("allowzero", 0)? == 0;
    let target: Option<Vec<Element>> = if cx.opset < 5 {
        cx.ints("shape")?.map(|dims| dims.iter().map(|&d| known(d)).collect())
    } else {
        match cx.contents(1) {
            Some(contents) => Some(contents.elements().to_vec()),
            None => cx.len_of(1).map(|len| vec![None; len]),
        }
    };
    let Some(target) = target else { return Some(vec![Out::unshaped(elem)]) };
    let mut inferred = None;
    // Whether every other size is certain to be a size, so that one −1 can be computed.
    let mut certain = true;
    let mut dims: Dims = Vec::with_capacity(target.len());
    for (axis, element) in target.iter().enumerate() {
        let dim = match element.as_ref().map(|e| (e, e.as_known())) {
            Some((_, Some(-1))) => {
                certain &= inferred.is_none();
                inferred = Some(axis);
                None
            }
            Some((_, Some(0))) if copies_zero => cx.dim(0, axis),
            Some((size, _)) => cx.size(size),
            _ => None,
        };
        certain &= dim.is_some() || inferred == Some(axis);
        dims.push(dim);
    }
    if let (Some(axis), true, Some(shape)) = (inferred, certain, cx.shape(0)) {
        let others: Option<DimExpr> = product(dims.iter().flatten());
        // What the runtime accepts leaves no remainder.
        dims[axis] = quotient(shape, &dims).or_else(|| product(shape)?.floor_div(&others?));
    } else if inferred.is_none()
        && let Some(shape) = cx.shape(0)
    {
        // A single unknown size follows from the number of elements.
        let unknown: Vec<usize> = (0..dims.len()).filter(|&axis| dims[axis].is_none()).collect();
        if let [axis] = unknown.as_slice() {
            let filled = || product(shape)?.exact_div(&product(dims.iter().flatten())?);
            let positive = dims.iter().flatten().all(|d| d.as_known().is_none_or(|d| d != 0));
            dims[*axis] = if positive { quotient(shape, &dims).or_else(filled) } else { None };
        }
    }
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(carried(cx))])
}

/// The size left for one axis after equal sizes on both sides cancel, which avoids products that grow large.
fn quotient(shape: &[DimExpr], dims: &Dims) -> Option<DimExpr> {
    let mut left: Vec<&DimExpr> = shape.iter().collect();
    let mut right: Vec<&DimExpr> = Vec::new();
    for dim in dims.iter().flatten() {
        match left.iter().position(|&l| l == dim) {
            Some(at) => _ = left.swap_remove(at),
            None => right.push(dim),
        }
    }
    if left.iter().chain(&right).any(|d| d.as_known() == Some(0))
        || dims.iter().flatten().any(|d| d.as_known() == Some(0))
    {
        return None;
    }
    product(left)?.exact_div(&product(right)?)
}

/// Flatten to two axes.
pub(super) fn flatten_axes(cx: &Cx) -> Option<Vec<Out>> {
    let axis = cx.int("axis", 1)?;
    let dims = match cx.shape(0) {
        Some(shape) => {
            let axis = if usize::try_from(axis) == Ok(shape.len()) { shape.len() } else { axis_of(axis, shape.len())? };
            vec![product(&shape[..axis]), product(&shape[axis..])]
        }
        None => vec![None, None],
    };
    Some(vec![Out::tensor(cx.elem(0), Some(dims)).with_contents(carried(cx))])
}

/// Transpose.
pub(super) fn transpose(cx: &Cx) -> Option<Vec<Out>> {
    let perm = cx.ints("perm")?;
    let ndim = cx.ndim(0).or(perm.map(<[i64]>::len));
    let Some(ndim) = ndim else { return Some(vec![Out::unshaped(cx.elem(0))]) };
    let perm: Vec<usize> = match perm {
        Some(perm) => perm.iter().map(|&p| axis_of(p, ndim)).collect::<Option<_>>()?,
        None => (0..ndim).rev().collect(),
    };
    if perm.len() != ndim {
        return None;
    }
    let dims = perm.iter().map(|&axis| cx.dim(0, axis)).collect();
    let contents = cx.contents(0).zip(sizes(cx, 0)).map(|(contents, old)| {
        let new: Vec<usize> = perm.iter().map(|&axis| old[axis]).collect();
        let pick = |flat| {
            let at = unflatten(flat, &new);
            let mut from = vec![0; ndim];
            for (position, &axis) in at.iter().zip(&perm) {
                from[axis] = *position;
            }
            contents.elements().get(flatten(&from, &old)).cloned().flatten()
        };
        (0..contents.elements().len()).map(pick).collect()
    });
    Some(vec![Out::tensor(cx.elem(0), Some(dims)).with_contents(contents)])
}

/// Axes from the second input from opset 13 on, from the attribute before; the outer `None` if they are unknown.
pub(super) fn axes(cx: &Cx, since_input: i64) -> Option<Option<Vec<i64>>> {
    if cx.opset < since_input {
        return Some(cx.ints("axes")?.map(<[i64]>::to_vec));
    }
    if cx.has(1) { cx.ints_of(1).map(Some) } else { Some(None) }
}

/// Squeeze.
pub(super) fn squeeze(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let dims = match (cx.shape(0), axes(cx, 13)) {
        (Some(shape), Some(Some(axes))) => {
            let drop: Vec<usize> = axes.iter().map(|&a| axis_of(a, shape.len())).collect::<Option<_>>()?;
            Some(shape.iter().enumerate().filter(|(i, _)| !drop.contains(i)).map(|(_, d)| Some(d.clone())).collect())
        }
        // Without axes, every axis of size 1 goes; one that may be 1 leaves the number of axes unknown.
        (Some(shape), Some(None)) => {
            let sure = shape.iter().all(|d| d.as_known().is_some() || d.differs(&1.into()));
            sure.then(|| shape.iter().filter(|d| d.as_known() != Some(1)).cloned().map(Some).collect())
        }
        (Some(shape), None) => match cx.len_of(1) {
            Some(count) if count <= shape.len() => Some(vec![None; shape.len() - count]),
            _ => None,
        },
        _ => None,
    };
    Some(vec![Out::tensor(elem, dims).with_contents(carried(cx))])
}

/// Unsqueeze.
pub(super) fn unsqueeze(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(shape) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    let Some(axes) = axes(cx, 13) else {
        let dims = cx.len_of(1).filter(|&n| n <= 64).map(|count| vec![None; shape.len() + count]);
        return Some(vec![Out::tensor(elem, dims)]);
    };
    let axes = axes?;
    let ndim = shape.len() + axes.len();
    let new: Vec<usize> = axes.iter().map(|&a| axis_of(a, ndim)).collect::<Option<_>>()?;
    let mut old = shape.iter();
    let dims = (0..ndim).map(|i| if new.contains(&i) { known(1) } else { old.next().cloned() }).collect();
    if old.next().is_some() {
        return None;
    }
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(carried(cx))])
}

/// Concat: axis 1 by default before opset 4.
pub(super) fn concat(cx: &Cx) -> Option<Vec<Out>> {
    let elem = (0..cx.node.inputs().len()).find_map(|i| cx.elem(i));
    let count = cx.node.inputs().len();
    let axis = if cx.opset < 4 { cx.int("axis", 1)? } else { cx.maybe_int("axis")?? };
    let Some(ndim) = (0..count).find_map(|i| cx.ndim(i)) else { return Some(vec![Out::unshaped(elem)]) };
    let axis = axis_of(axis, ndim)?;
    let mut dims: Dims = Vec::with_capacity(ndim);
    for at in 0..ndim {
        let each: Vec<Option<DimExpr>> = (0..count).map(|i| cx.dim(i, at)).collect();
        dims.push(if at == axis {
            each.into_iter().try_fold(DimExpr::from(0), |total, size| total.plus(&size?))
        } else {
            // They are all equal, so the simplest is the best name for it.
            each.into_iter().flatten().reduce(|a, b| a.simpler(&b).clone())
        });
    }
    let contents = joined(cx, axis, &dims);
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(contents)])
}

fn joined(cx: &Cx, axis: usize, dims: &Dims) -> Option<Vec<Element>> {
    let out: Vec<usize> = dims.iter().map(|d| usize::try_from(d.as_ref()?.as_known()?).ok()).collect::<Option<_>>()?;
    let total = element_count(&out).filter(|&n| n > 0 && n <= super::MAX_CONTENTS)?;
    let count = cx.node.inputs().len();
    if !(0..count).any(|i| cx.contents(i).is_some()) {
        return None;
    }
    let parts: Vec<Vec<usize>> = (0..count).map(|i| sizes(cx, i)).collect::<Option<_>>()?;
    let mut all = Vec::with_capacity(total);
    let inner = element_count(&out[axis + 1..])?;
    let outer = element_count(&out[..axis])?;
    for row in 0..outer {
        for (i, part) in parts.iter().enumerate() {
            let run = part.get(axis)?.checked_mul(inner)?;
            let elements = cx.contents(i).map(|c| c.elements());
            all.extend((row * run..(row + 1) * run).map(|at| elements.and_then(|e| e.get(at).cloned().flatten())));
        }
    }
    Some(all)
}

/// Split: sizes from an attribute before opset 13, else from the second input or equal parts.
pub(super) fn split(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let count = cx.node.outputs().len();
    let axis = cx.int("axis", 0)?;
    let unknown = |dims: Option<Dims>| vec![Out::tensor(elem, dims); count];
    let Some(shape) = cx.shape(0) else { return Some(unknown(None)) };
    let axis = axis_of(axis, shape.len())?;
    let total = shape[axis].clone();
    let with = |size: Option<DimExpr>| {
        let mut dims: Dims = shape.iter().cloned().map(Some).collect();
        dims[axis] = size;
        dims
    };
    let given: Option<Vec<Element>> = if cx.opset < 13 {
        // In opset 1 the sizes may also be an input.
        if cx.has(1) {
            cx.contents(1).map_or_else(|| Some(vec![None; count]), |c| Some(c.elements().to_vec()))
        } else {
            cx.ints("split")?.map(|sizes| sizes.iter().map(|&s| known(s)).collect())
        }
    } else if cx.has(1) {
        Some(cx.contents(1).map_or_else(|| vec![None; count], |c| c.elements().to_vec()))
    } else {
        None
    };
    let parts: Vec<Option<DimExpr>> = match given {
        Some(sizes) if sizes.len() == count => sizes,
        Some(_) => vec![None; count],
        None => {
            let parts = i64::try_from(count).ok()?;
            if parts == 0 || cx.maybe_int("num_outputs")?.is_some_and(|n| n != parts) {
                return Some(unknown(Some(with(None))));
            }
            if cx.opset >= 18 {
                // Parts are equal but for a smaller last one.
                let size = total.ceil_div(parts);
                let last = size.as_ref().and_then(|s| total.minus(&s.scaled(parts - 1)?));
                let mut all = vec![size; count];
                if let Some(end) = all.last_mut() {
                    *end = last.and_then(|size| cx.size(&size));
                }
                all
            } else {
                vec![total.exact_div(&parts.into()).or_else(|| total.floor_div(&parts.into())); count]
            }
        }
    };
    let mut at = Some(0usize);
    let mut outs = Vec::with_capacity(count);
    for size in parts {
        let width = size.as_ref().and_then(|s| usize::try_from(s.as_known()?).ok());
        // Contents are followed for one axis only, as shape arithmetic has it.
        let contents = match (cx.contents(0), at, width, shape.len()) {
            (Some(c), Some(start), Some(width), 1) => {
                c.elements().get(start..start.checked_add(width)?).map(<[Element]>::to_vec)
            }
            _ => None,
        };
        at = at.zip(width).and_then(|(a, w)| a.checked_add(w));
        outs.push(Out::tensor(elem, Some(with(size.and_then(|size| cx.size(&size))))).with_contents(contents));
    }
    Some(outs)
}

/// Expand: the shape broadcasts with a target.
pub(super) fn expand(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let target: Option<Vec<Element>> = match cx.contents(1) {
        Some(contents) => Some(contents.elements().to_vec()),
        None => cx.len_of(1).map(|len| vec![None; len]),
    };
    let (Some(target), Some(shape)) = (target, cx.shape(0)) else { return Some(vec![Out::unshaped(elem)]) };
    let target: Vec<Element> = target.into_iter().map(|size| cx.size(&size?)).collect();
    let dims = broadcast_partly(shape, &target);
    let contents = cx.contents(0).zip(sizes(cx, 0)).and_then(|(c, old)| spread(c.elements(), &old, &dims));
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(contents)])
}

/// Broadcasts sizes with others of which some may be unknown.
fn broadcast_partly(shape: &[DimExpr], target: &[Element]) -> Dims {
    let ndim = shape.len().max(target.len());
    let one = DimExpr::from(1);
    (0..ndim)
        .map(|axis| {
            let own = (axis + shape.len()).checked_sub(ndim).map_or(&one, |i| &shape[i]);
            match (axis + target.len()).checked_sub(ndim).map(|i| &target[i]) {
                None => Some(own.clone()),
                Some(Some(size)) => own.broadcast(size),
                _ => Some(own.clone()).filter(|d| d.as_known().is_some_and(|d| d != 1)),
            }
        })
        .collect()
}

/// Elements of shape `old` repeated to the (then known) shape `dims`.
fn spread(elements: &[Element], old: &[usize], dims: &Dims) -> Option<Vec<Element>> {
    let out: Vec<usize> = dims.iter().map(|d| usize::try_from(d.as_ref()?.as_known()?).ok()).collect::<Option<_>>()?;
    let total = element_count(&out).filter(|&n| n <= super::MAX_CONTENTS)?;
    let skip = out.len().checked_sub(old.len())?;
    let pick = |flat| {
        let at = unflatten(flat, &out);
        let place: Vec<usize> =
            old.iter().enumerate().map(|(i, &size)| if size == 1 { 0 } else { at[skip + i] }).collect();
        elements.get(flatten(&place, old)).cloned().flatten()
    };
    Some((0..total).map(pick).collect())
}

/// Tile: before opset 6 one axis, repeated a number of times.
pub(super) fn tile(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(shape) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    if cx.opset < 6 {
        return Some(vec![Out::tensor(elem, Some(vec![None; shape.len()]))]);
    }
    let repeats: Vec<Element> = cx.contents(1).map_or_else(|| vec![None; shape.len()], |c| c.elements().to_vec());
    let grow = |(size, times): (&DimExpr, &Element)| size.times(times.as_ref()?).and_then(|size| cx.size(&size));
    let dims: Dims = shape.iter().zip(&repeats).map(grow).collect();
    if repeats.len() != shape.len() {
        return Some(vec![Out::tensor(elem, Some(vec![None; shape.len()]))]);
    }
    let contents = || {
        let (old, elements) = (sizes(cx, 0)?, cx.contents(0)?.elements());
        let out: Vec<usize> =
            dims.iter().map(|d| usize::try_from(d.as_ref()?.as_known()?).ok()).collect::<Option<_>>()?;
        let total = element_count(&out).filter(|&n| n <= super::MAX_CONTENTS)?;
        let pick = |flat| {
            let at: Vec<usize> = unflatten(flat, &out).iter().zip(&old).map(|(&p, &size)| p % size.max(1)).collect();
            elements.get(flatten(&at, &old)).cloned().flatten()
        };
        Some((0..total).map(pick).collect())
    };
    Some(vec![Out::tensor(elem, Some(dims.clone())).with_contents(contents())])
}

/// Pad: amounts from attributes before opset 11, for all axes or (from opset 18) some.
pub(super) fn pad(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(shape) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    let pads: Option<Vec<Element>> = if cx.opset < 11 && cx.node.is_standard() {
        let name = if cx.opset < 2 { "paddings" } else { "pads" };
        cx.ints(name)?.map(|pads| pads.iter().map(|&p| known(p)).collect())
    } else {
        cx.contents(1).map(|c| c.elements().to_vec())
    };
    let axes: Option<Vec<usize>> = if cx.opset >= 18 && cx.has(3) {
        cx.ints_of(3).and_then(|axes| axes.iter().map(|&a| axis_of(a, shape.len())).collect())
    } else {
        Some((0..shape.len()).collect())
    };
    let mut dims: Dims = vec![None; shape.len()];
    if let (Some(pads), Some(axes)) = (pads, axes)
        && pads.len() == axes.len() * 2
    {
        dims = shape.iter().cloned().map(Some).collect();
        for (i, &axis) in axes.iter().enumerate() {
            let both = pads[i].as_ref().zip(pads[axes.len() + i].as_ref());
            dims[axis] = both.and_then(|(a, b)| dims[axis].as_ref()?.plus(a)?.plus(b));
        }
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// DepthToSpace.
pub(super) fn depth_to_space(cx: &Cx) -> Option<Vec<Out>> {
    let block = cx.maybe_int("blocksize")??;
    let area = block.checked_mul(block).filter(|&a| a > 0)?;
    let dims = match cx.shape(0) {
        Some([n, c, h, w]) => vec![Some(n.clone()), c.exact_div(&area.into()), h.scaled(block), w.scaled(block)],
        _ => vec![None; 4],
    };
    Some(vec![Out::tensor(cx.elem(0), Some(dims))])
}

/// SpaceToDepth.
pub(super) fn space_to_depth(cx: &Cx) -> Option<Vec<Out>> {
    let block = cx.maybe_int("blocksize")??;
    let area = block.checked_mul(block).filter(|&a| a > 0)?;
    let down = |size: &DimExpr| size.exact_div(&block.into()).or_else(|| size.floor_div(&block.into()));
    let dims = match cx.shape(0) {
        Some([n, c, h, w]) => vec![Some(n.clone()), c.scaled(area), down(h), down(w)],
        _ => vec![None; 4],
    };
    Some(vec![Out::tensor(cx.elem(0), Some(dims))])
}

/// CenterCropPad.
pub(super) fn center_crop_pad(cx: &Cx) -> Option<Vec<Out>> {
    let Some(mut dims) = cx.dims(0) else { return Some(vec![Out::unshaped(cx.elem(0))]) };
    let axes: Vec<usize> = match cx.ints("axes")? {
        Some(axes) => axes.iter().map(|&a| axis_of(a, dims.len())).collect::<Option<_>>()?,
        None => (0..dims.len()).collect(),
    };
    let target = cx.contents(1).map(|c| c.elements());
    for (i, &axis) in axes.iter().enumerate() {
        dims[axis] = target.and_then(|t| t.get(i).cloned().flatten()).and_then(|size| cx.size(&size));
    }
    Some(vec![Out::tensor(cx.elem(0), Some(dims))])
}

/// Shape, with a range of axes from opset 15.
pub(super) fn shape_of(cx: &Cx) -> Option<Vec<Out>> {
    let (start, end) = (cx.int("start", 0)?, cx.maybe_int("end")?);
    let Some(shape) = cx.shape(0) else {
        return Some(vec![Out::tensor(Some(DataType::Int64), Some(vec![None]))]);
    };
    let ndim = i64::try_from(shape.len()).ok()?;
    let clamp = |at: i64| if at < 0 { at.saturating_add(ndim).max(0) } else { at.min(ndim) };
    let (start, end) = (clamp(start), clamp(end.unwrap_or(ndim)));
    let part = &shape[usize::try_from(start).ok()?..usize::try_from(end.max(start)).ok()?];
    let contents = part.iter().cloned().map(Some).collect();
    let dims = vec![i64::try_from(part.len()).ok().map(DimExpr::from)];
    Some(vec![Out::tensor(Some(DataType::Int64), Some(dims)).with_contents(Some(contents))])
}

/// Size.
pub(super) fn size_of(cx: &Cx) -> Vec<Out> {
    let total = cx.shape(0).and_then(product);
    vec![Out::scalar(DataType::Int64).with_contents(Some(vec![contents::fitting(Some(DataType::Int64), total)]))]
}
