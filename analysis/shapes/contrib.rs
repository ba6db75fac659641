//! The `com.microsoft` domain: the operators that ONNX Runtime's own optimizer and common exporters write.

use super::{
    convolution, elementwise, indexing, linear,
    node::{Cx, Dims, Out, axis_of, known},
    quantized, reduce,
};
use crate::dim::DimExpr;
use lathe_ir::DataType;

/// The outputs of an operator of `com.microsoft`.
pub(super) fn infer(cx: &Cx) -> Option<Vec<Out>> {
    Some(match cx.node.op_type.as_str() {
        "BiasGelu" | "FastGelu" | "Gelu" | "QuickGelu" | "BiasAdd" | "BiasSoftmax" | "RotaryEmbedding" | "Inverse"
        | "GroupNorm" | "Trilu" | "MoE" | "QMoE" | "QLinearLeakyRelu" | "QLinearSigmoid" | "QLinearSoftmax"
        | "NGramRepeatBlock" => elementwise::same(cx, 0),
        "BiasDropout" => vec![Out::of_type(&cx.ty(0)), Out::tensor(Some(DataType::Bool), cx.dims(0))],
        "BiasSplitGelu" => return super::neural::halved(cx, -1),
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" | "SkipGroupNorm" => skip_norm(cx),
        "EmbedLayerNormalization" => embed_norm(cx),
        "FusedMatMul" | "TransposeMatMul" | "FusedMatMulActivation" => return fused_matmul(cx),
        "FusedConv" => return convolution::conv(cx, 1, cx.elem(0)),
        "FusedGemm" | "GemmFastGelu" => return linear::gemm(cx),
        "Attention" => return attention(cx),
        "MultiHeadAttention" => return multi_head(cx),
        "GroupQueryAttention" => return group_query(cx),
        "MatMulNBits" | "MatMulBnb4" | "MatMulFpQ4" => return matmul_packed(cx),
        "GatherBlockQuantized" => return gather_quantized(cx),
        "QuantizeLinear" => return quantized::quantize(cx),
        "DequantizeLinear" => return quantized::dequantize(cx),
        "QLinearAdd" | "QLinearMul" => {
            let dims = elementwise::broadcast_dims([cx.shape(0), cx.shape(3)]);
            vec![Out::tensor(cx.elem(0), dims)]
        }
        "QLinearReduceMean" => {
            let outs = reduce::infer(cx)?;
            outs.into_iter().map(|out| Out { contents: None, ..out }).collect()
        }
        "QLinearConcat" => return concat(cx),
        "QLinearGlobalAveragePool" if cx.int("channels_last", 0)? == 0 => convolution::global_pool(cx),
        "QLinearConv" if cx.int("channels_last", 0)? == 0 => return quantized::conv(cx),
        "DynamicQuantizeMatMul" => linear::matmul(cx, 0, 1, Some(DataType::Float)),
        "MatMulIntegerToFloat" => linear::matmul(cx, 0, 1, cx.elem(2)),
        "MatMulInteger16" => linear::matmul(cx, 0, 1, Some(DataType::Int32)),
        "GatherND" => return indexing::gather_nd(cx),
        "CDist" => vec![Out::tensor(cx.elem(0), Some(vec![cx.dim(0, 0), cx.dim(1, 0)]))],
        _ => return None,
    })
}

/// The statistics outputs are rarely computed and left unknown; the last output is the sum before the norm.
fn skip_norm(cx: &Cx) -> Vec<Out> {
    let like = || Out::of_type(&cx.ty(0));
    if cx.node.op_type == "SkipGroupNorm" {
        return vec![like(), like()];
    }
    vec![like(), Out::unknown(), Out::unknown(), like()]
}

fn embed_norm(cx: &Cx) -> Vec<Out> {
    let elem = cx.elem(2);
    let dims = Some(vec![cx.dim(0, 0), cx.dim(0, 1), cx.dim(2, 1)]);
    let mask = Out::tensor(Some(DataType::Int32), Some(vec![cx.dim(0, 0)]));
    vec![Out::tensor(elem, dims.clone()), mask, Out::tensor(elem, dims)]
}

fn fused_matmul(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    if cx.int("transBatchA", 0)? != 0 || cx.int("transBatchB", 0)? != 0 {
        return Some(vec![Out::unshaped(elem)]);
    }
    let turned = |index: usize, name: &str| -> Option<Option<Vec<DimExpr>>> {
        let flip = cx.int(name, 0)? != 0;
        Some(cx.shape(index).map(|shape| {
            let mut shape = shape.to_vec();
            if let (true, [.., a, b]) = (flip, shape.as_mut_slice()) {
                std::mem::swap(a, b);
            }
            shape
        }))
    };
    let (a, b) = (turned(0, "transA")?, turned(1, "transB")?);
    Some(vec![Out::tensor(elem, linear::matmul_dims(a.as_deref(), b.as_deref()))])
}

/// Attention over one projection: the output has the width of the values.
fn attention(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let width = match cx.ints("qkv_hidden_sizes")? {
        Some([_, _, v]) => known(*v),
        Some(_) => None,
        None => cx.dim(1, 1).and_then(|w| w.exact_div(&3.into())),
    };
    let out = Out::tensor(elem, Some(vec![cx.dim(0, 0), cx.dim(0, 1), width]));
    let present = Out::tensor(
        elem,
        Some(vec![known(2), cx.dim(0, 0), cx.maybe_int("num_heads")?.map(DimExpr::from), None, None]),
    );
    Some(vec![out, present])
}

fn multi_head(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let heads = cx.maybe_int("num_heads")?.filter(|&h| h > 0);
    let width = match cx.shape(2) {
        Some([_, _, hidden]) => Some(hidden.clone()),
        Some([_, heads, _, size]) => heads.times(size),
        _ => None,
    };
    let out = Out::tensor(elem, Some(vec![cx.dim(0, 0), cx.dim(0, 1), width]));
    let present = Out::tensor(elem, Some(vec![cx.dim(0, 0), heads.map(DimExpr::from), None, None]));
    Some(vec![out, present.clone(), present])
}

/// The caches may be shared buffers, so their length is left unknown.
fn group_query(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let heads = cx.maybe_int("num_heads")?.filter(|&h| (1..1 << 20).contains(&h));
    let kv_heads = cx.maybe_int("kv_num_heads")?.filter(|&h| (1..1 << 20).contains(&h));
    let (width, size) = if cx.has(1) && cx.ndim(1).is_some() {
        let width = cx.dim(0, 2);
        (width.clone(), heads.and_then(|h| width?.exact_div(&h.into())))
    } else if cx.has(1) {
        (None, None)
    } else {
        // Queries, keys and values are packed along the last axis.
        let size = heads.zip(kv_heads).and_then(|(h, kv)| cx.dim(0, 2)?.exact_div(&(h + 2 * kv).into()));
        (heads.and_then(|h| size.as_ref()?.scaled(h)), size)
    };
    let out = Out::tensor(elem, Some(vec![cx.dim(0, 0), cx.dim(0, 1), width]));
    let cache = |past: usize| {
        // A quantized cache may pack two numbers to a byte, as the one before did.
        let (elem, size) = if cx.has(past) { (cx.elem(past), cx.dim(past, 3)) } else { (elem, size.clone()) };
        Out::tensor(elem, Some(vec![cx.dim(0, 0), kv_heads.map(DimExpr::from), None, size]))
    };
    Some(vec![out, cache(3), cache(4)])
}

/// Products with a packed weight whose sizes are attributes.
fn matmul_packed(cx: &Cx) -> Option<Vec<Out>> {
    let columns = known(cx.maybe_int("N")??);
    let dims = match cx.shape(0) {
        Some([lead @ .., _]) => Some(lead.iter().cloned().map(Some).chain([columns]).collect()),
        _ => None,
    };
    Some(vec![Out::tensor(cx.elem(0), dims)])
}

fn gather_quantized(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(2);
    let (Some(data), Some(indices)) = (cx.shape(0), cx.shape(1)) else { return Some(vec![Out::unshaped(elem)]) };
    let axis = axis_of(cx.int("gather_axis", 0)?, data.len())?;
    let packing = match (cx.elem(0)?, cx.int("bits", 4)?) {
        (DataType::Uint8, bits @ (2 | 4 | 8)) => 8 / bits,
        (DataType::Int4 | DataType::Uint4, _) => 1,
        _ => return Some(vec![Out::unshaped(elem)]),
    };
    let mut data: Dims = data.iter().cloned().map(Some).collect();
    if let Some(last) = data.last_mut() {
        *last = last.as_ref().and_then(|d| d.scaled(packing));
    }
    let indices = indices.iter().cloned().map(Some);
    let dims = data[..axis].iter().cloned().chain(indices).chain(data[axis + 1..].iter().cloned()).collect();
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// Inputs are the output's scale and zero point, then data, scale and zero point of each part.
fn concat(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(1);
    let parts: Vec<usize> = (2..cx.node.inputs().len()).step_by(3).collect();
    let Some(ndim) = parts.iter().find_map(|&i| cx.ndim(i)) else { return Some(vec![Out::unshaped(elem)]) };
    let axis = axis_of(cx.maybe_int("axis")??, ndim)?;
    let size = |at: usize| {
        let mut each = parts.iter().map(|&i| cx.dim(i, at));
        if at == axis {
            each.try_fold(DimExpr::from(0), |total, size| total.plus(&size?))
        } else {
            each.flatten().next()
        }
    };
    Some(vec![Out::tensor(elem, Some((0..ndim).map(size).collect()))])
}
