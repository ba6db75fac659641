//! Normalization, attention, losses and other operators of networks.

use super::node::{Cx, Dims, Out, axis_of, known};
use crate::dim::DimExpr;
use lathe_ir::DataType;

/// BatchNormalization: the further outputs are running statistics and, before opset 9, saved ones.
pub(super) fn batch_norm(cx: &Cx) -> Vec<Out> {
    let channel = |index: usize| Out::tensor(cx.elem(index).or(cx.elem(0)), cx.dims(3));
    vec![Out::of_type(&cx.ty(0)), channel(3), channel(4), channel(3), channel(4)]
}

/// LayerNormalization and SimplifiedLayerNormalization: statistics keep the leading axes.
pub(super) fn layer_norm(cx: &Cx) -> Option<Vec<Out>> {
    let axis = cx.int("axis", -1)?;
    let statistics = match cx.shape(0) {
        Some(shape) => {
            let axis = axis_of(axis, shape.len())?;
            Some(shape.iter().enumerate().map(|(i, d)| if i < axis { Some(d.clone()) } else { known(1) }).collect())
        }
        None => None,
    };
    let elem = cx.dtype("stash_type", Some(DataType::Float));
    let statistics = Out::tensor(elem, statistics);
    Some(vec![Out::of_type(&cx.ty(0)), statistics.clone(), statistics])
}

/// The standard Attention (opset 23 and later): 3-axis or 4-axis queries, keys and values.
pub(super) fn attention(cx: &Cx) -> Option<Vec<Out>> {
    let (q_heads, kv_heads) = (cx.maybe_int("q_num_heads")?, cx.maybe_int("kv_num_heads")?);
    let batch = cx.dim(0, 0);
    let present = |index: usize, elem: Option<DataType>, past: usize| {
        let (heads, size) = match cx.shape(index) {
            Some([_, heads, _, size]) => (Some(heads.clone()), Some(size.clone())),
            Some([_, _, hidden]) => {
                let heads = kv_heads.filter(|&h| h > 0);
                (heads.map(DimExpr::from), heads.and_then(|h| hidden.exact_div(&h.into())))
            }
            _ => (None, None),
        };
        let new = if cx.ndim(index) == Some(4) { cx.dim(index, 2) } else { cx.dim(index, 1) };
        let total = if cx.has(past) { new.zip(cx.dim(past, 2)).and_then(|(a, b)| a.plus(&b)) } else { new };
        Out::tensor(elem, Some(vec![batch.clone(), heads, total, size]))
    };
    let (key, value) = (present(1, cx.elem(1), 4), present(2, cx.elem(2), 5));
    let total = match &key.ty {
        super::ValueType::Tensor { dims: Some(dims), .. } => dims.get(2).cloned().flatten(),
        _ => None,
    };
    let (out, heads, length) = match (cx.shape(0), cx.shape(2)) {
        (Some([b, heads, length, _]), Some([.., size])) => {
            let dims = vec![Some(b.clone()), Some(heads.clone()), Some(length.clone()), Some(size.clone())];
            (Some(dims), Some(heads.clone()), Some(length.clone()))
        }
        (Some([b, length, _]), Some([_, _, hidden])) => {
            let (q, kv) = (q_heads.filter(|&h| h > 0), kv_heads.filter(|&h| h > 0));
            let width = q.zip(kv).and_then(|(q, kv)| hidden.exact_div(&kv.into())?.scaled(q));
            let dims = vec![Some(b.clone()), Some(length.clone()), width];
            (Some(dims), q.map(DimExpr::from), Some(length.clone()))
        }
        _ => (None, None, None),
    };
    let scores = Out::tensor(cx.elem(0), Some(vec![batch.clone(), heads, length, total]));
    Some(vec![Out::tensor(cx.elem(0), out), key, value, scores])
}

/// CausalConvWithState: the state holds the last `k - 1` steps.
pub(super) fn causal_conv(cx: &Cx) -> Vec<Out> {
    let state = vec![cx.dim(0, 0), cx.dim(0, 1), cx.dim(1, 2).and_then(|k| k.offset(-1))];
    vec![Out::of_type(&cx.ty(0)), Out::tensor(cx.elem(0), Some(state))]
}

/// LinearAttention: heads are packed into the last axis of queries, keys and values.
pub(super) fn linear_attention(cx: &Cx) -> Option<Vec<Out>> {
    let heads = |name: &str| Some(cx.maybe_int(name)?.filter(|&h| h > 0));
    let (q, kv) = (heads("q_num_heads")?, heads("kv_num_heads")?);
    let each = |index: usize| cx.dim(index, 2).zip(kv).and_then(|(width, kv)| width.exact_div(&kv.into()));
    let width = each(2).zip(q).and_then(|(size, q)| size.scaled(q));
    let state = vec![cx.dim(0, 0), kv.map(DimExpr::from), each(1), each(2)];
    let elem = if cx.has(3) { cx.elem(3) } else { None };
    Some(vec![Out::tensor(cx.elem(0), Some(vec![cx.dim(0, 0), cx.dim(0, 1), width])), Out::tensor(elem, Some(state))])
}

/// Adagrad, Adam and Momentum: rate and count, then tensors, gradients and one or two kinds of state; the outputs are
/// the tensors and the state.
pub(super) fn optimizer(cx: &Cx) -> Vec<Out> {
    let groups = match cx.node.op_type.as_str() {
        "Adagrad" | "Momentum" => 3,
        "Adam" => 4,
        _ => return Vec::new(),
    };
    let given = cx.node.inputs().len().saturating_sub(2);
    if !given.is_multiple_of(groups) {
        return Vec::new();
    }
    let tensors = given / groups;
    let place = |i: usize| if i < tensors { 2 + i } else { 2 + tensors + i };
    (0..cx.node.outputs().len()).map(|i| Out::of_type(&cx.ty(place(i)))).collect()
}

/// SoftmaxCrossEntropyLoss and NegativeLogLikelihoodLoss; the second output is the log-probability.
pub(super) fn loss(cx: &Cx) -> Option<Vec<Out>> {
    let dims = if cx.string("reduction", "mean")? == "none" { cx.dims(1) } else { Some(Vec::new()) };
    Some(vec![Out::tensor(cx.elem(0), dims), Out::of_type(&cx.ty(0))])
}

/// SwiGLU-like gates: the last axis is halved.
pub(super) fn halved(cx: &Cx, axis: i64) -> Option<Vec<Out>> {
    let dims = match cx.dims(0) {
        Some(mut dims) => {
            let axis = axis_of(axis, dims.len())?;
            dims[axis] = dims[axis].as_ref().and_then(|d| d.exact_div(&2.into()));
            Some(dims)
        }
        None => None,
    };
    Some(vec![Out::tensor(cx.elem(0), dims)])
}

/// AffineGrid: the target size is `[N, C, H, W]` or `[N, C, D, H, W]`.
pub(super) fn affine_grid(cx: &Cx) -> Vec<Out> {
    let dims: Option<Dims> = match cx.contents(1).map(|c| c.elements()) {
        Some([n, _, rest @ ..]) => {
            let mut dims: Dims = vec![n.clone()];
            dims.extend(rest.iter().cloned());
            dims.push(i64::try_from(rest.len()).ok().map(DimExpr::from));
            Some(dims)
        }
        _ => None,
    };
    vec![Out::tensor(cx.elem(0), dims)]
}

/// GridSample: the channels of the data at the places of the grid.
pub(super) fn grid_sample(cx: &Cx) -> Vec<Out> {
    let dims = match (cx.shape(0), cx.shape(1)) {
        (Some([n, c, ..]), Some([_, places @ .., _])) => {
            let mut dims: Dims = vec![Some(n.clone()), Some(c.clone())];
            dims.extend(places.iter().cloned().map(Some));
            Some(dims)
        }
        _ => None,
    };
    vec![Out::tensor(cx.elem(0), dims)]
}

/// NonMaxSuppression: any number of (batch, class, box).
pub(super) fn non_max_suppression() -> Vec<Out> {
    vec![Out::tensor(Some(DataType::Int64), Some(vec![None, known(3)]))]
}

/// RoiAlign and MaxRoiPool.
pub(super) fn roi(cx: &Cx) -> Option<Vec<Out>> {
    let (height, width) = match cx.node.op_type.as_str() {
        "MaxRoiPool" => match cx.ints("pooled_shape")?? {
            [h, w] => (*h, *w),
            _ => return None,
        },
        _ => (cx.int("output_height", 1)?, cx.int("output_width", 1)?),
    };
    Some(vec![Out::tensor(cx.elem(0), Some(vec![cx.dim(1, 0), cx.dim(0, 1), known(height), known(width)]))])
}

/// Det: the last two axes go.
pub(super) fn det(cx: &Cx) -> Vec<Out> {
    let dims = cx.dims(0).and_then(|mut dims| {
        let len = dims.len().checked_sub(2)?;
        dims.truncate(len);
        Some(dims)
    });
    vec![Out::tensor(cx.elem(0), dims)]
}
