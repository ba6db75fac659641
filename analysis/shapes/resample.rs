//! Resize and Upsample.

use super::node::{Cx, Dims, Out, axis_of};
use crate::dim::DimExpr;

/// Resize: sizes or scales for all axes or (from opset 18) for some.
pub(super) fn resize(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(shape) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    let mut dims: Dims = shape.iter().cloned().map(Some).collect();
    let axes: Vec<usize> = match cx.ints("axes")? {
        Some(axes) if cx.opset >= 18 => axes.iter().map(|&a| axis_of(a, shape.len())).collect::<Option<_>>()?,
        _ => (0..shape.len()).collect(),
    };
    let crops = cx.string("coordinate_transformation_mode", "half_pixel")? == "tf_crop_and_resize";
    let keeps_ratio = cx.opset >= 18 && cx.string("keep_aspect_ratio_policy", "stretch")? != "stretch";
    let (scales, sizes) = if cx.opset < 11 { (1, usize::MAX) } else { (2, 3) };
    // An empty tensor counts as an input left out.
    let has_sizes = sizes != usize::MAX && cx.has(sizes) && cx.len_of(sizes) != Some(0);
    for (i, &axis) in axes.iter().enumerate() {
        dims[axis] = if has_sizes {
            let size = cx.contents(sizes).and_then(|c| c.elements().get(i).cloned().flatten());
            size.filter(|_| !keeps_ratio).and_then(|size| cx.size(&size))
        } else if crops {
            None
        } else {
            cx.floats_of(scales).and_then(|all| scaled(&shape[axis], *all.get(i)?))
        };
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// Upsample: scales from attributes before opset 9.
pub(super) fn upsample(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(shape) = cx.shape(0) else { return Some(vec![Out::unshaped(elem)]) };
    let scales: Option<Vec<f64>> = if cx.opset >= 9 {
        cx.floats_of(1)
    } else {
        match cx.attribute("scales").ok()? {
            Some(lathe_ir::AttributeValue::Floats(scales)) => Some(scales.iter().map(|&s| f64::from(s)).collect()),
            _ => None,
        }
    };
    let dims = match scales.filter(|s| s.len() == shape.len()) {
        Some(scales) => shape.iter().zip(scales).map(|(size, scale)| scaled(size, scale)).collect(),
        None => vec![None; shape.len()],
    };
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// `⌊size · scale⌋` where it does not depend on the precision of the product.
fn scaled(size: &DimExpr, scale: f64) -> Option<DimExpr> {
    if !(scale > 0.0 && scale <= 1e6) {
        return None;
    }
    if scale.fract() == 0.0 {
        return size.scaled(scale as i64);
    }
    if let Some(size) = size.as_known().filter(|&s| (0..1 << 24).contains(&s)) {
        let (wide, narrow) = (size as f64 * scale, size as f32 * scale as f32);
        return (wide.floor() as i64 == narrow.floor() as i64).then(|| (wide.floor() as i64).into());
    }
    // A power of two divides without rounding.
    let inverse = 1.0 / scale;
    let exact = inverse.fract() == 0.0 && inverse <= 65536.0 && (inverse as i64).count_ones() == 1;
    if exact { size.floor_div(&(inverse as i64).into()) } else { None }
}
