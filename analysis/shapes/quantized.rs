//! Quantization and quantized products.

use super::{
    convolution,
    linear::matmul_dims,
    node::{Cx, Out},
};
use lathe_ir::DataType;

/// QuantizeLinear: the type of the zero point, else of the attribute, else uint8.
pub(super) fn quantize(cx: &Cx) -> Option<Vec<Out>> {
    let elem = if cx.has(2) {
        cx.elem(2)
    } else {
        match cx.int("output_dtype", 0)? {
            0 => Some(DataType::Uint8),
            _ => cx.dtype("output_dtype", None),
        }
    };
    Some(vec![Out::tensor(elem, cx.dims(0))])
}

/// DequantizeLinear: the type of the scale, unless an attribute says otherwise.
pub(super) fn dequantize(cx: &Cx) -> Option<Vec<Out>> {
    let elem = match cx.int("output_dtype", 0)? {
        0 => cx.elem(1),
        _ => cx.dtype("output_dtype", None),
    };
    Some(vec![Out::tensor(elem, cx.dims(0))])
}

/// DynamicQuantizeLinear.
pub(super) fn dynamic_quantize(cx: &Cx) -> Vec<Out> {
    vec![Out::tensor(Some(DataType::Uint8), cx.dims(0)), Out::scalar(DataType::Float), Out::scalar(DataType::Uint8)]
}

/// QLinearMatMul.
pub(super) fn matmul(cx: &Cx) -> Vec<Out> {
    vec![Out::tensor(cx.elem(7), matmul_dims(cx.shape(0), cx.shape(3)))]
}

/// QLinearConv.
pub(super) fn conv(cx: &Cx) -> Option<Vec<Out>> {
    convolution::conv(cx, 3, cx.elem(7))
}
