//! Fourier transforms, windows, filters, and operators on strings and images.

use super::node::{Cx, Dims, Out, axis_of, known};
use crate::dim::DimExpr;
use lathe_ir::DataType;

/// DFT: the axis is an attribute before opset 20.
pub(super) fn dft(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let (inverse, one_sided) = (cx.int("inverse", 0)? != 0, cx.int("onesided", 0)? != 0);
    let Some(mut dims) = cx.dims(0) else { return Some(vec![Out::unshaped(elem)]) };
    let axis = if cx.opset >= 20 { if cx.has(2) { cx.int_of(2) } else { Some(-2) } } else { Some(cx.int("axis", 1)?) };
    let Some(axis) = axis.and_then(|a| axis_of(a, dims.len())) else {
        return Some(vec![Out::tensor(elem, Some(vec![None; dims.len()]))]);
    };
    let length = if cx.has(1) { cx.element_of(1).and_then(|size| cx.size(&size)) } else { dims[axis].clone() };
    dims[axis] = match (one_sided, inverse) {
        (false, _) => length,
        (true, false) => length.and_then(|l| l.floor_div(&2.into())?.offset(1)),
        // From one side back to a real signal, whose length may be odd or even.
        (true, true) => {
            if cx.has(1) {
                length
            } else {
                None
            }
        }
    };
    if let Some(last) = dims.last_mut() {
        *last = known(if inverse && one_sided { 1 } else { 2 });
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// STFT: frames of a signal.
pub(super) fn stft(cx: &Cx) -> Option<Vec<Out>> {
    let one_sided = cx.int("onesided", 1)? != 0;
    let frame = if cx.has(3) { cx.element_of(3) } else { cx.dim(2, 0) };
    let bins = frame.clone().and_then(|f| if one_sided { f.floor_div(&2.into())?.offset(1) } else { Some(f) });
    let frames = || {
        let room = cx.dim(0, 1)?.minus(&frame?)?;
        room.floor_div(&cx.element_of(1)?)?.offset(1)
    };
    Some(vec![Out::tensor(cx.elem(0), Some(vec![cx.dim(0, 0), frames(), bins, known(2)]))])
}

/// HannWindow, HammingWindow, BlackmanWindow.
pub(super) fn window(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.dtype("output_datatype", Some(DataType::Float));
    Some(vec![Out::tensor(elem, Some(vec![cx.element_of(0).and_then(|size| cx.size(&size))]))])
}

/// MelWeightMatrix.
pub(super) fn mel_weights(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.dtype("output_datatype", Some(DataType::Float));
    let bins = cx.element_of(1).and_then(|size| cx.size(&size)).and_then(|l| l.floor_div(&2.into())?.offset(1));
    Some(vec![Out::tensor(elem, Some(vec![bins, cx.element_of(0).and_then(|size| cx.size(&size))]))])
}

/// StringSplit: the parts, padded to the longest list, and how many there are.
pub(super) fn string_split(cx: &Cx) -> Vec<Out> {
    let parts = cx.dims(0).map(|mut dims: Dims| {
        dims.push(None);
        dims
    });
    vec![Out::tensor(Some(DataType::String), parts), Out::tensor(Some(DataType::Int64), cx.dims(0))]
}

/// StringNormalizer: words may be dropped.
pub(super) fn string_normalizer(cx: &Cx) -> Vec<Out> {
    let dims = cx.shape(0).and_then(|shape| match shape {
        [_] => Some(vec![None]),
        [_, _] => Some(vec![known(1), None]),
        _ => None,
    });
    vec![Out::tensor(Some(DataType::String), dims)]
}

/// TfIdfVectorizer: as many columns as the largest index wants.
pub(super) fn tf_idf(cx: &Cx) -> Option<Vec<Out>> {
    let columns = cx.ints("ngram_indexes")?.and_then(|all| all.iter().max()?.checked_add(1)).map(DimExpr::from);
    let dims = match cx.shape(0) {
        Some([] | [_]) => Some(vec![columns]),
        Some([rows, _]) => Some(vec![Some(rows.clone()), columns]),
        _ => None,
    };
    Some(vec![Out::tensor(Some(DataType::Float), dims)])
}

/// ImageDecoder.
pub(super) fn image(cx: &Cx) -> Option<Vec<Out>> {
    let channels = if cx.string("pixel_format", "RGB")? == "Grayscale" { 1 } else { 3 };
    Some(vec![Out::tensor(Some(DataType::Uint8), Some(vec![None, None, known(channels)]))])
}
