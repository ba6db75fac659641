//! Slice.

use super::{
    contents::{Element, flatten, sizes, unflatten},
    node::{Cx, Dims, Out, axis_of, known},
};
use crate::dim::DimExpr;
use lathe_ir::element_count;

/// Ends from here on mean "to the end", as exporters write them.
const TO_THE_END: i64 = i32::MAX as i64;

/// Slice: bounds from attributes before opset 10, from inputs since.
pub(super) fn infer(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(shape) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    let ndim = shape.len();
    let list = |name: &str, index: usize| -> Option<Option<Vec<Element>>> {
        if cx.opset < 10 {
            return Some(cx.ints(name)?.map(|all| all.iter().map(|&v| known(v)).collect()));
        }
        if !cx.has(index) {
            return Some(None);
        }
        cx.contents(index).map(|c| Some(c.elements().to_vec()))
    };
    let unknown = vec![Out::tensor(elem, Some(vec![None; ndim]))];
    let axes: Option<Option<Vec<i64>>> = list("axes", 3).and_then(|axes| match axes {
        Some(axes) => axes.iter().map(|a| a.as_ref()?.as_known()).collect::<Option<Vec<i64>>>().map(Some),
        None => Some(None),
    });
    let Some(axes) = axes else { return Some(unknown) };
    let (starts, ends, steps) = (list("starts", 1).flatten(), list("ends", 2).flatten(), list("steps", 4));
    let count = match (&axes, &starts, &ends) {
        (Some(axes), ..) => axes.len(),
        (None, Some(starts), _) => starts.len(),
        (None, None, Some(ends)) => ends.len(),
        _ => match cx.len_of(1) {
            Some(len) if cx.opset >= 10 => len,
            _ => return Some(unknown),
        },
    };
    if count > ndim {
        return None;
    }
    let axes: Vec<usize> = match axes {
        Some(axes) => axes.iter().map(|&a| axis_of(a, ndim)).collect::<Option<_>>()?,
        None => (0..count).collect(),
    };
    let mut dims: Dims = shape.iter().cloned().map(Some).collect();
    // First element and step along each axis, where known.
    let mut walk: Vec<Option<(i64, i64)>> = vec![Some((0, 1)); ndim];
    for (i, &axis) in axes.iter().enumerate() {
        let start = starts.as_ref().and_then(|s| s.get(i).cloned().flatten());
        let end = ends.as_ref().and_then(|e| e.get(i).cloned().flatten());
        let step = match &steps {
            Some(Some(steps)) => steps.get(i).and_then(|s| s.as_ref()?.as_known()),
            Some(None) if cx.opset >= 10 || !cx.has(4) => Some(1),
            _ => None,
        };
        dims[axis] = length(cx, &shape[axis], start.as_ref(), end.as_ref(), step);
        walk[axis] = first(&shape[axis], start.as_ref(), step).zip(step);
    }
    let contents = cx.contents(0).zip(sizes(cx, 0)).and_then(|(c, old)| picked(c.elements(), &old, &dims, &walk));
    Some(vec![Out::tensor(elem, Some(dims)).with_contents(contents)])
}

/// How many elements lie between two bounds; `None` where that is not certain.
fn length(
    cx: &Cx,
    size: &DimExpr,
    start: Option<&DimExpr>,
    end: Option<&DimExpr>,
    step: Option<i64>,
) -> Option<DimExpr> {
    let step = step.filter(|&s| s != 0 && s != i64::MIN)?;
    if step < 0 {
        // Backwards: between the clamped bounds, the end excluded.
        let (start, end) = (start?.as_known()?, end?.as_known()?);
        if let Some(n) = size.as_known() {
            // ONNX Runtime reads an end this far out as "down to the first".
            if end >= TO_THE_END {
                return None;
            }
            let start = if start < 0 { start.saturating_add(n) } else { start }.clamp((n - 1).min(0), n - 1);
            let end = if end < 0 { end.saturating_add(n).max(-1) } else { end.min(n - 1) };
            let span = start.checked_sub(end)?.max(0);
            return DimExpr::from(span).ceil_div(-step);
        }
        // The whole axis in reverse.
        let whole = (start == -1 || start >= TO_THE_END) && end <= -TO_THE_END;
        return if whole { size.ceil_div(-step) } else { None };
    }
    let (start, stated) = (start?, end?);
    let end = clamped(cx, size, stated)?;
    let span = if end == *size && cx.facts.is_size(start) {
        // `n - min(s, n)`, in the form that stacked slices share.
        cx.facts.at_least_zero(size.minus(start)?)?
    } else if cx.facts.is_size(start) && stated.at_least(start) {
        // `min(e, n) - min(s, n)`: what the bounds ask for, as far as there is any.
        stated.minus(start)?.smaller(&cx.facts.at_least_zero(size.minus(start)?)?)?
    } else if let (true, Some(back)) =
        (end == *size, start.as_known().and_then(i64::checked_neg).filter(|&back| back < TO_THE_END))
    {
        DimExpr::from(back).smaller(size)?
    } else {
        cx.facts.at_least_zero(end.minus(&clamped(cx, size, start)?)?)?
    };
    span.ceil_div(step)
}

/// A bound brought into `0..=size`.
fn clamped(cx: &Cx, size: &DimExpr, bound: &DimExpr) -> Option<DimExpr> {
    match bound.as_known() {
        Some(at) if at >= TO_THE_END && size.as_known().is_none_or(|n| n <= at) => Some(size.clone()),
        Some(at) if at <= -TO_THE_END && size.as_known().is_none() => Some(0.into()),
        Some(at) if at < 0 => cx.facts.at_least_zero(size.offset(at)?),
        Some(_) => bound.smaller(size),
        None if cx.facts.is_size(bound) => bound.smaller(size),
        None => None,
    }
}

/// The index of the first element that is taken, for an axis of known size.
fn first(size: &DimExpr, start: Option<&DimExpr>, step: Option<i64>) -> Option<i64> {
    let (n, start) = (size.as_known()?, start?.as_known()?);
    let start = if start < 0 { start.saturating_add(n) } else { start };
    Some(if step? < 0 { start.clamp((n - 1).min(0), n - 1) } else { start.clamp(0, n) })
}

fn picked(elements: &[Element], old: &[usize], dims: &Dims, walk: &[Option<(i64, i64)>]) -> Option<Vec<Element>> {
    let out: Vec<usize> = dims.iter().map(|d| usize::try_from(d.as_ref()?.as_known()?).ok()).collect::<Option<_>>()?;
    let walk: Vec<(i64, i64)> = walk.iter().copied().collect::<Option<_>>()?;
    let total = element_count(&out).filter(|&n| n <= super::MAX_CONTENTS)?;
    let pick = |flat| {
        let at = unflatten(flat, &out);
        let place = at.iter().zip(&walk).map(|(&p, &(start, step))| {
            usize::try_from(start.checked_add(step.checked_mul(i64::try_from(p).ok()?)?)?).ok()
        });
        let place: Vec<usize> = place.collect::<Option<_>>()?;
        elements.get(flatten(&place, old))?.clone()
    };
    Some((0..total).map(pick).collect())
}
