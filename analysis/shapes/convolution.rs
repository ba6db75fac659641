//! Convolutions and pooling.

use super::node::{Cx, Dims, Out};
use crate::dim::DimExpr;
use lathe_ir::DataType;

/// The window of a convolution or pooling along its spatial axes.
struct Window {
    strides: Vec<i64>,
    dilations: Vec<i64>,
    /// Starts, then ends.
    pads: Vec<i64>,
    auto_pad: Pad,
}

#[derive(Clone, Copy, PartialEq)]
enum Pad {
    Explicit,
    Same,
    Valid,
}

fn window(cx: &Cx, spatial: usize) -> Option<Window> {
    let list = |name: &str, len: usize, default: i64| match cx.ints(name)? {
        Some(values) if values.len() == len => Some(values.to_vec()),
        Some([]) | None => Some(vec![default; len]),
        Some(_) => None,
    };
    let auto_pad = match cx.string("auto_pad", "NOTSET")? {
        "NOTSET" | "" => Pad::Explicit,
        "SAME_UPPER" | "SAME_LOWER" => Pad::Same,
        "VALID" => Pad::Valid,
        _ => return None,
    };
    let window = Window {
        strides: list("strides", spatial, 1)?,
        dilations: list("dilations", spatial, 1)?,
        pads: list("pads", spatial * 2, 0)?,
        auto_pad,
    };
    (window.strides.iter().chain(&window.dilations).all(|&v| v > 0)).then_some(window)
}

impl Window {
    /// `(kernel - 1)·dilation + 1`.
    fn extent(&self, axis: usize, kernel: &DimExpr) -> Option<DimExpr> {
        kernel.offset(-1)?.scaled(self.dilations[axis])?.offset(1)
    }

    /// Output size along one axis.
    fn size(&self, axis: usize, input: &DimExpr, kernel: &DimExpr, ceil: bool) -> Option<DimExpr> {
        let stride = self.strides[axis];
        if self.auto_pad == Pad::Same {
            return input.ceil_div(stride);
        }
        let pads = self.pads.len() / 2;
        let (before, after) = match self.auto_pad {
            Pad::Explicit => (self.pads[axis], self.pads[pads + axis]),
            _ => (0, 0),
        };
        let extent = self.extent(axis, kernel)?;
        let room = input.offset(before.checked_add(after)?)?.minus(&extent)?;
        if room.as_known().is_some_and(|r| r < 0) {
            return None;
        }
        let floor = room.floor_div(&stride.into())?.offset(1)?;
        if !ceil || stride == 1 {
            return Some(floor);
        }
        let up = room.ceil_div(stride)?.offset(1)?;
        // A window that would start in the padding behind the data is dropped by some runtimes and kept by others.
        let never_late = extent.as_known().is_some_and(|e| after.saturating_add(stride) <= e);
        match (up.as_known(), input.as_known()) {
            _ if never_late || up == floor => Some(up),
            (Some(up), Some(input)) => {
                let start = (up - 1).checked_mul(stride)?;
                (start < input.checked_add(before)?).then(|| up.into())
            }
            _ => None,
        }
    }
}

/// The sizes of the kernel along the spatial axes: the attribute, else the weight's own.
fn kernel(cx: &Cx, weight: Option<usize>, spatial: usize) -> Option<Vec<Option<DimExpr>>> {
    match cx.ints("kernel_shape")? {
        Some(sizes) if sizes.len() == spatial => Some(sizes.iter().map(|&k| Some(k.into())).collect()),
        Some(sizes) if !sizes.is_empty() => None,
        _ => {
            let weight = weight?;
            let known = cx.ndim(weight) == Some(spatial + 2);
            Some((0..spatial).map(|axis| if known { cx.dim(weight, axis + 2) } else { None }).collect())
        }
    }
}

/// How many spatial axes there are: from the data, the kernel or the weight.
fn spatial(cx: &Cx, weight: Option<usize>) -> Option<usize> {
    let ndim = cx.ndim(0).or_else(|| cx.ndim(weight?));
    match ndim {
        Some(ndim) => ndim.checked_sub(2),
        None => cx.ints("kernel_shape")?.map(<[i64]>::len),
    }
}

/// Convolution of input 0 with the weight at `weight`.
pub(super) fn conv(cx: &Cx, weight: usize, elem: Option<DataType>) -> Option<Vec<Out>> {
    let Some(spatial) = spatial(cx, Some(weight)) else { return Some(vec![Out::unshaped(elem)]) };
    let mut dims: Dims = vec![cx.dim(0, 0), cx.dim(weight, 0)];
    let (window, kernel) = (window(cx, spatial)?, kernel(cx, Some(weight), spatial)?);
    for (axis, kernel) in kernel.iter().enumerate() {
        let input = cx.dim(0, axis + 2);
        dims.push(input.zip(kernel.as_ref()).and_then(|(input, k)| window.size(axis, &input, k, false)));
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// ConvTranspose.
pub(super) fn conv_transpose(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(spatial) = spatial(cx, Some(1)) else { return Some(vec![Out::unshaped(elem)]) };
    let groups = cx.int("group", 1)?;
    let mut dims: Dims = vec![cx.dim(0, 0), cx.dim(1, 1).and_then(|c| c.scaled(groups))];
    let (window, kernel) = (window(cx, spatial)?, kernel(cx, Some(1), spatial)?);
    let stated = cx.ints("output_shape")?.filter(|s| !s.is_empty());
    if stated.is_some_and(|s| s.len() != spatial && s.len() != spatial + 2) {
        return None;
    }
    let extra = match cx.ints("output_padding")? {
        Some(extra) if extra.len() == spatial => extra.to_vec(),
        Some([]) | None => vec![0; spatial],
        Some(_) => return None,
    };
    for (axis, kernel) in kernel.iter().enumerate() {
        if let Some(stated) = stated {
            // Some exporters state the batch and channel sizes as well.
            dims.push(Some(stated[stated.len() - spatial + axis].into()));
            continue;
        }
        let size = || {
            let input = cx.dim(0, axis + 2)?;
            let stride = window.strides[axis];
            if window.auto_pad == Pad::Same {
                return input.scaled(stride);
            }
            let pads = match window.auto_pad {
                Pad::Explicit => window.pads[axis].checked_add(window.pads[spatial + axis])?,
                _ => 0,
            };
            let extent = window.extent(axis, kernel.as_ref()?)?;
            input.offset(-1)?.scaled(stride)?.plus(&extent)?.offset(extra[axis].checked_sub(pads)?)
        };
        dims.push(size());
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// MaxPool, AveragePool, LpPool.
pub(super) fn pool(cx: &Cx, elem: Option<DataType>) -> Option<Vec<Out>> {
    let Some(spatial) = spatial(cx, None) else { return Some(vec![Out::unshaped(elem); 2]) };
    let (window, kernel) = (window(cx, spatial)?, kernel(cx, None, spatial)?);
    let ceil = cx.int("ceil_mode", 0)? != 0;
    let mut dims: Dims = vec![cx.dim(0, 0), cx.dim(0, 1)];
    for (axis, kernel) in kernel.iter().enumerate() {
        let input = cx.dim(0, axis + 2);
        dims.push(input.zip(kernel.as_ref()).and_then(|(input, k)| window.size(axis, &input, k, ceil)));
    }
    Some(vec![Out::tensor(elem, Some(dims.clone())), Out::tensor(Some(DataType::Int64), Some(dims))])
}

/// Pooling over all spatial axes.
pub(super) fn global_pool(cx: &Cx) -> Vec<Out> {
    let dims = cx.dims(0).map(|dims| {
        let pooled = |(axis, dim): (usize, Option<DimExpr>)| if axis < 2 { dim } else { Some(1.into()) };
        dims.into_iter().enumerate().map(pooled).collect()
    });
    vec![Out::tensor(cx.elem(0), dims)]
}

/// MaxUnpool: a third input states the shape.
pub(super) fn max_unpool(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let Some(spatial) = spatial(cx, None) else { return Some(vec![Out::unshaped(elem)]) };
    if cx.has(2) {
        let dims = cx.contents(2).map(|c| c.elements().to_vec()).filter(|d| d.len() == spatial + 2);
        return Some(vec![Out::tensor(elem, Some(dims.unwrap_or_else(|| vec![None; spatial + 2])))]);
    }
    let (window, kernel) = (window(cx, spatial)?, kernel(cx, None, spatial)?);
    let mut dims: Dims = vec![cx.dim(0, 0), cx.dim(0, 1)];
    for (axis, kernel) in kernel.iter().enumerate() {
        let size = || {
            let pads = window.pads[axis].checked_add(window.pads[spatial + axis])?;
            let grown = cx.dim(0, axis + 2)?.offset(-1)?.scaled(window.strides[axis])?;
            grown.plus(kernel.as_ref()?)?.offset(pads.checked_neg()?)
        };
        dims.push(size());
    }
    Some(vec![Out::tensor(elem, Some(dims))])
}

/// DeformConv: the offsets have the spatial sizes of the output.
pub(super) fn deform_conv(cx: &Cx) -> Option<Vec<Out>> {
    conv(cx, 1, cx.elem(0))
}

/// Col2Im.
pub(super) fn col2im(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let image = match cx.contents(1) {
        Some(contents) => contents.elements().to_vec(),
        None => match cx.len_of(1) {
            Some(len) => vec![None; len],
            None => return Some(vec![Out::unshaped(elem)]),
        },
    };
    let block = cx.contents(2).and_then(|c| c.elements().iter().cloned().collect::<Option<Vec<_>>>());
    let area = block.as_deref().and_then(crate::dim::product);
    let channels = cx.dim(0, 1).zip(area).and_then(|(c, area)| c.exact_div(&area));
    let mut dims = vec![cx.dim(0, 0), channels];
    dims.extend(image);
    Some(vec![Out::tensor(elem, Some(dims))])
}
