//! Matrix products.

use super::{
    elementwise::broadcast_dims,
    node::{Cx, Dims, Out},
};
use crate::dim::DimExpr;
use lathe_ir::DataType;

/// The shape of a batched matrix product, with vectors allowed on either side.
pub(super) fn matmul_dims(a: Option<&[DimExpr]>, b: Option<&[DimExpr]>) -> Option<Dims> {
    let (a, b) = (a?, b?);
    match (a, b) {
        ([], _) | (_, []) => None,
        ([_], [_]) => Some(Vec::new()),
        ([_], [lead @ .., _, n]) => Some(lead.iter().chain([n]).cloned().map(Some).collect()),
        ([lead @ .., _], [_]) => Some(lead.iter().cloned().map(Some).collect()),
        ([lead_a @ .., m, _], [lead_b @ .., _, n]) => {
            let mut dims = broadcast_dims([Some(lead_a), Some(lead_b)])?;
            dims.extend([Some(m.clone()), Some(n.clone())]);
            Some(dims)
        }
    }
}

/// MatMul and relatives whose operands are inputs `a` and `b`.
pub(super) fn matmul(cx: &Cx, a: usize, b: usize, elem: Option<DataType>) -> Vec<Out> {
    vec![Out::tensor(elem, matmul_dims(cx.shape(a), cx.shape(b)))]
}

/// Gemm.
pub(super) fn gemm(cx: &Cx) -> Option<Vec<Out>> {
    let pick = |index: usize, flag: &str, own: usize| -> Option<Option<DimExpr>> {
        let flipped = cx.int(flag, 0)? != 0;
        Some(match cx.shape(index) {
            Some([rows, columns]) => Some(if flipped == (own == 1) { rows } else { columns }.clone()),
            _ => None,
        })
    };
    let dims = vec![pick(0, "transA", 0)?, pick(1, "transB", 1)?];
    Some(vec![Out::tensor(cx.elem(0), Some(dims))])
}

/// Einsum. Shapes with an ellipsis are followed where every operand with one has as many axes under it.
pub(super) fn einsum(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let unknown = Some(vec![Out::unshaped(elem)]);
    let equation: String = cx.string("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (equation.as_str(), None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != cx.node.inputs().len() {
        return None;
    }
    let mut letters: Vec<(char, Option<DimExpr>, usize)> = Vec::new();
    let mut rest: Vec<Option<&[DimExpr]>> = Vec::new();
    for (i, term) in terms.iter().enumerate() {
        let Some(shape) = cx.shape(i) else { return unknown };
        let (front, back) = match term.split_once("...") {
            Some((front, back)) => (front, back),
            None if term.chars().count() == shape.len() => (*term, ""),
            None => return None,
        };
        let (before, after) = (front.chars().count(), back.chars().count());
        let middle = shape.len().checked_sub(before + after)?;
        if term.contains("...") {
            rest.push(Some(&shape[before..before + middle]));
        }
        let sizes = shape[..before].iter().chain(&shape[before + middle..]);
        for (letter, size) in front.chars().chain(back.chars()).zip(sizes) {
            match letters.iter_mut().find(|l| l.0 == letter) {
                Some((_, known, count)) => {
                    *known = known.take().and_then(|k| k.broadcast(size));
                    *count += 1;
                }
                None => letters.push((letter, Some(size.clone()), 1)),
            }
        }
    }
    let shared = if rest.is_empty() { Some(Vec::new()) } else { broadcast_dims(rest.iter().copied()) };
    let Some(shared) = shared else { return unknown };
    let size = |letter: char| letters.iter().find(|l| l.0 == letter).map(|l| l.1.clone());
    let mut dims: Dims = Vec::new();
    match right {
        Some(right) => {
            let (front, back) = right.split_once("...").unwrap_or((right, ""));
            dims.extend(front.chars().map(size).collect::<Option<Vec<_>>>()?);
            if right.contains("...") {
                dims.extend(shared);
            }
            dims.extend(back.chars().map(size).collect::<Option<Vec<_>>>()?);
        }
        None => {
            dims.extend(shared);
            let mut once: Vec<char> = letters.iter().filter(|l| l.2 == 1).map(|l| l.0).collect();
            once.sort_unstable();
            dims.extend(once.into_iter().map(size).collect::<Option<Vec<_>>>()?);
        }
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}
