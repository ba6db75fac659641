//! Operators that only move elements.

use super::{
    Call, Result, Unsupported,
    elements::moved,
    layout::{around, broadcast_dims, broadcast_strides, read_strided, strides},
    sizes,
};
use lathe_ir::{Tensor, element_count};

/// The same elements in another shape. The bytes are shared, so no limit applies.
fn reshaped(tensor: &Tensor, dims: Vec<usize>) -> Result<Tensor> {
    // The result is a new value: documentation of the old one is not about it.
    let mut made = tensor.reshaped(dims).map_err(|_| Unsupported::Invalid)?;
    made.doc.clear();
    made.metadata.clear();
    Ok(made)
}

pub(super) fn identity(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    reshaped(input, input.dims().to_vec())
}

pub(super) fn reshape(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let target = call.list_since(5, "shape", 1)?.ok_or(Unsupported::Invalid)?;
    let allow_zero = call.flag("allowzero")?;
    let mut unknown = None;
    let mut dims = Vec::with_capacity(target.len());
    for (axis, &size) in target.iter().enumerate() {
        dims.push(match size {
            0 if !allow_zero => *input.dims().get(axis).ok_or(Unsupported::Invalid)?,
            -1 if unknown.is_none() => {
                unknown = Some(axis);
                1
            }
            size => usize::try_from(size).map_err(|_| Unsupported::Invalid)?,
        });
    }
    if let Some(axis) = unknown {
        let known = element_count(&dims).filter(|&count| count > 0).ok_or(Unsupported::Invalid)?;
        dims[axis] = input.len() / known;
    }
    reshaped(input, dims)
}

pub(super) fn flatten(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let dims = input.dims();
    let axis = match call.int_or("axis", 1)? {
        axis if axis == dims.len() as i64 => dims.len(),
        axis => call.axis(axis, dims.len())?,
    };
    let rows = element_count(&dims[..axis]).ok_or(Unsupported::Invalid)?;
    let columns = element_count(&dims[axis..]).ok_or(Unsupported::Invalid)?;
    reshaped(input, vec![rows, columns])
}

pub(super) fn squeeze(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let dims = input.dims();
    let axes = match call.list_since(13, "axes", 1)? {
        Some(axes) => call.axes(&axes, dims.len())?,
        None => (0..dims.len()).filter(|&axis| dims[axis] == 1).collect(),
    };
    if axes.iter().any(|&axis| dims[axis] != 1) {
        return Err(Unsupported::Invalid);
    }
    let kept = (0..dims.len()).filter(|axis| !axes.contains(axis)).map(|axis| dims[axis]).collect();
    reshaped(input, kept)
}

pub(super) fn unsqueeze(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let axes = call.list_since(13, "axes", 1)?.ok_or(Unsupported::Invalid)?;
    let axes = call.axes(&axes, input.dims().len() + axes.len())?;
    let mut dims = input.dims().to_vec();
    for axis in axes {
        dims.insert(axis, 1);
    }
    reshaped(input, dims)
}

pub(super) fn transpose(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let ndim = input.dims().len();
    let perm = match call.ints("perm")? {
        Some(perm) => sizes(perm)?,
        None => (0..ndim).rev().collect(),
    };
    permute(call, input, &perm)
}

/// Output axis `i` is input axis `perm[i]`.
pub(super) fn permute(call: &Call, input: &Tensor, perm: &[usize]) -> Result<Tensor> {
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    if !sorted.into_iter().eq(0..input.dims().len()) {
        return Err(Unsupported::Invalid);
    }
    let own = strides(input.dims());
    let dims: Vec<usize> = perm.iter().map(|&axis| input.dims()[axis]).collect();
    let steps: Vec<isize> = perm.iter().map(|&axis| own[axis]).collect();
    view(call, input, 0, dims, &steps)
}

/// The elements that `start` and `steps` (in elements of `input`) pick for each index of `dims`.
fn view(call: &Call, input: &Tensor, start: isize, dims: Vec<usize>, steps: &[isize]) -> Result<Tensor> {
    let out = dims.clone();
    moved!(call, &[input], dims, |data| read_strided(data[0], start, &out, steps))
}

pub(super) fn expand(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let target = sizes(&call.list(1)?.ok_or(Unsupported::Invalid)?)?;
    let dims = broadcast_dims(&[input.dims(), &target]).ok_or(Unsupported::Invalid)?;
    stretch(call, input, dims)
}

/// `input` broadcast to `dims`.
pub(super) fn stretch(call: &Call, input: &Tensor, dims: Vec<usize>) -> Result<Tensor> {
    if broadcast_dims(&[input.dims(), &dims]).as_deref() != Some(&dims) {
        return Err(Unsupported::Invalid);
    }
    let steps = broadcast_strides(input.dims(), &dims);
    view(call, input, 0, dims, &steps)
}

pub(super) fn tile(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    if call.opset < 6 {
        return Err(Unsupported::Form);
    }
    let repeats = sizes(&call.list(1)?.ok_or(Unsupported::Invalid)?)?;
    if repeats.len() != input.dims().len() {
        return Err(Unsupported::Invalid);
    }
    let own = strides(input.dims());
    let (mut long, mut steps, mut dims) = (Vec::new(), Vec::new(), Vec::new());
    for ((&dim, &repeat), &step) in input.dims().iter().zip(&repeats).zip(&own) {
        long.extend([repeat, dim]);
        steps.extend([0, step]);
        dims.push(dim.checked_mul(repeat).ok_or(Unsupported::TooLarge { bytes: usize::MAX })?);
    }
    moved!(call, &[input], dims, |data| read_strided(data[0], 0, &long, &steps))
}

pub(super) fn concat(call: &Call) -> Result<Tensor> {
    let tensors = call.inputs.iter().map(|t| t.ok_or(Unsupported::Invalid)).collect::<Result<Vec<&Tensor>>>()?;
    let first = tensors.first().ok_or(Unsupported::Invalid)?;
    let axis = match call.int("axis")? {
        Some(axis) => axis,
        None if call.opset < 4 => 1,
        None => return Err(Unsupported::Form),
    };
    join(call, &tensors, call.axis(axis, first.dims().len())?)
}

/// `tensors` one after the other along `axis`.
pub(super) fn join(call: &Call, tensors: &[&Tensor], axis: usize) -> Result<Tensor> {
    let first = tensors.first().ok_or(Unsupported::Invalid)?.dims();
    let mut dims = first.to_vec();
    *dims.get_mut(axis).ok_or(Unsupported::Invalid)? = 0;
    for tensor in tensors {
        let other = tensor.dims();
        let fits = other.len() == first.len() && (0..first.len()).all(|a| a == axis || other[a] == first[a]);
        if !fits {
            return Err(Unsupported::Invalid);
        }
        dims[axis] = dims[axis].checked_add(other[axis]).ok_or(Unsupported::Invalid)?;
    }
    let (outer, _, inner) = around(&dims, axis);
    let blocks: Vec<usize> = tensors.iter().map(|t| if t.is_empty() { 0 } else { t.dims()[axis] * inner }).collect();
    moved!(call, tensors, dims, |data| {
        let mut out = Vec::with_capacity(data.iter().map(|d| d.len()).sum());
        for row in 0..if out.capacity() == 0 { 0 } else { outer } {
            for (cells, &block) in data.iter().zip(&blocks) {
                out.extend_from_slice(&cells[row * block..(row + 1) * block]);
            }
        }
        out
    })
}

pub(super) fn split(call: &Call) -> Result<Vec<Tensor>> {
    let input = call.input(0)?;
    let axis = call.axis(call.int_or("axis", 0)?, input.dims().len())?;
    let size = input.dims()[axis];
    let parts = match call.list_since(13, "split", 1)? {
        Some(split) if call.node.attribute("num_outputs").is_none() => sizes(&split)?,
        Some(_) => return Err(Unsupported::Invalid),
        None => {
            let asked = call.node.outputs().len();
            let count = match call.int("num_outputs")? {
                Some(count) if call.opset >= 18 && count > 0 => count as usize,
                None if call.opset < 18 && asked > 0 => asked,
                _ => return Err(Unsupported::Form),
            };
            // Before version 18 the parts are equal; since then the last one may be smaller.
            if (call.opset < 18 && !size.is_multiple_of(count)) || count > size.max(1) || asked > count {
                return Err(Unsupported::Invalid);
            }
            let part = size.div_ceil(count);
            (0..count).map(|i| size.saturating_sub(i * part).min(part)).collect()
        }
    };
    if parts.iter().try_fold(0usize, |sum, &part| sum.checked_add(part)) != Some(size) {
        return Err(Unsupported::Invalid);
    }
    let own = strides(input.dims());
    let mut start = 0;
    let mut outputs = Vec::with_capacity(parts.len());
    for part in parts {
        let mut dims = input.dims().to_vec();
        dims[axis] = part;
        outputs.push(view(call, input, own[axis].wrapping_mul(start), dims, &own)?);
        start += part as isize;
    }
    Ok(outputs)
}

pub(super) fn slice(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let mut dims = input.dims().to_vec();
    let starts = call.list_since(10, "starts", 1)?.ok_or(Unsupported::Invalid)?;
    let ends = call.list_since(10, "ends", 2)?.ok_or(Unsupported::Invalid)?;
    let axes = call.list_since(10, "axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let by = call.list(4)?.unwrap_or_else(|| vec![1; starts.len()]);
    if ends.len() != starts.len() || axes.len() != starts.len() || by.len() != starts.len() {
        return Err(Unsupported::Invalid);
    }
    call.axes(&axes, dims.len())?;
    let mut steps = strides(&dims);
    let mut first = 0isize;
    for (((start, end), axis), by) in starts.into_iter().zip(ends).zip(axes).zip(by) {
        let axis = call.axis(axis, dims.len())?;
        let size = dims[axis] as i64;
        let from_start = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
        let (start, count) = if by > 0 {
            let (start, end) = (from_start(start).clamp(0, size), from_start(end).clamp(0, size));
            (start, (end - start).max(0).unsigned_abs().div_ceil(by.unsigned_abs()))
        } else if by < 0 {
            // ONNX Runtime takes an end this far out for "down to the first".
            if end >= i64::from(i32::MAX) {
                return Err(Unsupported::NotExact);
            }
            let last = (size - 1).max(0);
            let (start, end) = (from_start(start).clamp(0, last), from_start(end).clamp(-1, last));
            let count = if size == 0 { 0 } else { (start - end).max(0).unsigned_abs() };
            (start, count.div_ceil(by.unsigned_abs()))
        } else {
            return Err(Unsupported::Invalid);
        };
        dims[axis] = count as usize;
        if count > 0 {
            first = first.wrapping_add(steps[axis].wrapping_mul(start as isize));
        }
        steps[axis] = steps[axis].wrapping_mul(by as isize);
    }
    view(call, input, first, dims, &steps)
}

/// Where each index of a padded axis reads; `None` for the constant.
fn padded_axis(mode: &str, size: usize, before: i64, after: i64) -> Result<Vec<Option<usize>>> {
    let n = size as i64;
    let total = n.checked_add(before).and_then(|t| t.checked_add(after)).filter(|&t| t >= 0);
    let total = total.ok_or(Unsupported::Invalid)?;
    let inside = |at: i64| (0..n).contains(&at).then_some(at as usize);
    // Runtimes disagree about a mirror that reaches past the far end, or that is cropped at the same time.
    let plain = before >= 0 && after >= 0 && n > 0;
    let source = |at: i64| match mode {
        "constant" => Ok(inside(at)),
        "edge" if plain => Ok(Some(at.clamp(0, n - 1) as usize)),
        "reflect" if plain && before < n && after < n => Ok(inside(if at < 0 {
            -at
        } else if at >= n {
            2 * (n - 1) - at
        } else {
            at
        })),
        "wrap" if plain && before <= n && after <= n => Ok(inside(at.rem_euclid(n))),
        _ if before == 0 && after == 0 => Ok(inside(at)),
        _ => Err(Unsupported::Form),
    };
    (0..total).map(|at| source(at - before)).collect()
}

pub(super) fn pad(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let ndim = input.dims().len();
    let mode = call.string_or("mode", "constant")?;
    let pads = call.list_since(11, "pads", 1)?.ok_or(Unsupported::Invalid)?;
    let axes = match call.list(3)? {
        Some(axes) => axes.iter().map(|&axis| call.axis(axis, ndim)).collect::<Result<Vec<usize>>>()?,
        None => (0..ndim).collect(),
    };
    if call.opset >= 11 && call.node.attribute("value").is_some() || pads.len() != 2 * axes.len() {
        return Err(Unsupported::Form);
    }
    call.axes(&axes.iter().map(|&axis| axis as i64).collect::<Vec<i64>>(), ndim)?;
    let mut both = vec![(0, 0); ndim];
    for (at, &axis) in axes.iter().enumerate() {
        both[axis] = (pads[at], pads[at + axes.len()]);
    }
    let grown = |(&dim, &(before, after)): (&usize, &(i64, i64))| {
        let sum = i64::try_from(dim).ok()?.checked_add(before)?.checked_add(after)?;
        usize::try_from(sum).ok()
    };
    let dims: Option<Vec<usize>> = input.dims().iter().zip(&both).map(grown).collect();
    let dims = dims.ok_or(Unsupported::Invalid)?;
    call.room(input.dtype(), &dims)?;
    if element_count(&dims) == Some(0) {
        return moved!(call, &[input], dims, |data| data[0][..0].to_vec());
    }
    let fill = match call.optional(2) {
        Some(value) if value.len() == 1 => value.clone(),
        Some(_) => return Err(Unsupported::Invalid),
        None => {
            let value = if call.opset < 11 { call.float("value")?.unwrap_or(0.0) } else { 0.0 };
            match Tensor::from_f64s(input.dtype(), &[1], &[value.into()]) {
                Some(fill) => fill,
                None if mode == "constant" => return Err(Unsupported::Type),
                None => input.clone(),
            }
        }
    };
    let maps = input.dims().iter().zip(&both);
    let maps = maps.map(|(&dim, &(before, after))| padded_axis(mode, dim, before, after));
    let maps = maps.collect::<Result<Vec<Vec<Option<usize>>>>>()?;
    let own = strides(input.dims());
    let next = |base: Option<usize>, at: Option<usize>, step: isize| Some(base? + at? * step as usize);
    let mut starts: Vec<Option<usize>> = vec![Some(0)];
    let (last, outer) = match maps.split_last() {
        Some((last, outer)) => (last.as_slice(), outer),
        None => ([Some(0)].as_slice(), maps.as_slice()),
    };
    for (map, &step) in outer.iter().zip(&own) {
        starts = starts.iter().flat_map(|&base| map.iter().map(move |&at| next(base, at, step))).collect();
    }
    moved!(call, &[input, &fill], dims, |data| {
        let mut out = Vec::with_capacity(starts.len() * last.len());
        for &base in &starts {
            let cell = |&at: &Option<usize>| next(base, at, 1).map_or(&data[1][0], |at| &data[0][at]).clone();
            out.extend(last.iter().map(cell));
        }
        out
    })
}

pub(super) fn trilu(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let upper = call.int_or("upper", 1)? != 0;
    let k = match call.optional(1) {
        Some(k) => k.scalar_i64().ok_or(Unsupported::Invalid)?,
        None => 0,
    };
    let [.., height, width] = *input.dims() else { return Err(Unsupported::Invalid) };
    let zero = Tensor::from_f64s(input.dtype(), &[1], &[0.0]).ok_or(Unsupported::Type)?;
    let kept = |index: usize| {
        let (row, column) = ((index / width % height) as i64, (index % width) as i64);
        let diagonal = column - row;
        if upper { diagonal >= k } else { diagonal <= k }
    };
    let dims = input.dims().to_vec();
    moved!(call, &[input, &zero], dims, |data| {
        let cells = data[0].iter().enumerate();
        cells.map(|(index, cell)| if kept(index) { cell } else { &data[1][0] }.clone()).collect::<Vec<_>>()
    })
}

/// The four sizes and the block size of an image operator.
fn image(call: &Call) -> Result<([usize; 4], usize)> {
    let dims = <[usize; 4]>::try_from(call.input(0)?.dims()).map_err(|_| Unsupported::Invalid)?;
    let block = call.int("blocksize")?.and_then(|b| usize::try_from(b).ok()).filter(|b| (1..=1 << 15).contains(b));
    Ok((dims, block.ok_or(Unsupported::Form)?))
}

/// Sees `input` as `split`, reorders the axes and sees the result as `dims`.
fn regrouped(call: &Call, input: &Tensor, split: Vec<usize>, perm: &[usize], dims: Vec<usize>) -> Result<Tensor> {
    reshaped(&permute(call, &reshaped(input, split)?, perm)?, dims)
}

pub(super) fn depth_to_space(call: &Call) -> Result<Tensor> {
    let ([n, c, h, w], b) = image(call)?;
    if !c.is_multiple_of(b * b) {
        return Err(Unsupported::Invalid);
    }
    let depth = c / (b * b);
    let (split, perm) = match call.string_or("mode", "DCR")? {
        "DCR" => (vec![n, b, b, depth, h, w], [0, 3, 4, 1, 5, 2]),
        "CRD" => (vec![n, depth, b, b, h, w], [0, 1, 4, 2, 5, 3]),
        _ => return Err(Unsupported::Form),
    };
    let (height, width) = (h.checked_mul(b), w.checked_mul(b));
    let dims = vec![n, depth, height.ok_or(Unsupported::Invalid)?, width.ok_or(Unsupported::Invalid)?];
    regrouped(call, call.input(0)?, split, &perm, dims)
}

pub(super) fn space_to_depth(call: &Call) -> Result<Tensor> {
    let ([n, c, h, w], b) = image(call)?;
    if !h.is_multiple_of(b) || !w.is_multiple_of(b) {
        return Err(Unsupported::Invalid);
    }
    let depth = c.checked_mul(b * b).ok_or(Unsupported::Invalid)?;
    let dims = vec![n, depth, h / b, w / b];
    regrouped(call, call.input(0)?, vec![n, c, h / b, b, w / b, b], &[0, 3, 5, 1, 2, 4], dims)
}
