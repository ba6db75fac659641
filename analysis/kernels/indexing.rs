//! Operators that pick elements by computed indices.

use super::{
    Call, Result, Unsupported,
    elements::{moved, typed, values},
    layout::{around, strides},
};
use lathe_ir::{DataType, Tensor, element_count};

/// Indices of type int32 or int64 into an axis of `size`; negative ones count from the end.
pub(super) fn indices(tensor: &Tensor, size: usize) -> Result<Vec<usize>> {
    if !matches!(tensor.dtype(), DataType::Int32 | DataType::Int64) {
        return Err(Unsupported::Invalid);
    }
    let size = size as i64;
    let inside = |at: i64| {
        let at = if at < 0 { at.checked_add(size)? } else { at };
        (0..size).contains(&at).then_some(at as usize)
    };
    let list = tensor.to_i64s().ok_or(Unsupported::Type)?;
    list.into_iter().map(|at| inside(at).ok_or(Unsupported::Invalid)).collect()
}

/// The slices `at` of `input` along `axis`; `shape` takes the place of that axis.
pub(super) fn pick(call: &Call, input: &Tensor, axis: usize, at: &[usize], shape: &[usize]) -> Result<Tensor> {
    let size = *input.dims().get(axis).ok_or(Unsupported::Invalid)?;
    if at.iter().any(|&at| at >= size) {
        return Err(Unsupported::Invalid);
    }
    let (outer, _, inner) = around(input.dims(), axis);
    let mut dims = input.dims().to_vec();
    dims.splice(axis..=axis, shape.iter().copied());
    let empty = element_count(&dims) == Some(0);
    moved!(call, &[input], dims, |data| {
        let mut out = Vec::new();
        for row in 0..if empty { 0 } else { outer } {
            out.reserve(at.len() * inner);
            for &at in at {
                let start = (row * size + at) * inner;
                out.extend_from_slice(&data[0][start..start + inner]);
            }
        }
        out
    })
}

pub(super) fn gather(call: &Call) -> Result<Tensor> {
    let (input, at) = (call.input(0)?, call.input(1)?);
    let axis = call.axis(call.int_or("axis", 0)?, input.dims().len())?;
    pick(call, input, axis, &indices(at, input.dims()[axis])?, at.dims())
}

pub(super) fn gather_elements(call: &Call) -> Result<Tensor> {
    let (input, at) = (call.input(0)?, call.input(1)?);
    let axis = call.axis(call.int_or("axis", 0)?, input.dims().len())?;
    let places = element_places(input, at, axis)?;
    moved!(call, &[input], at.dims().to_vec(), |data| {
        places.iter().map(|&place| data[0][place].clone()).collect::<Vec<_>>()
    })
}

/// Where each element of `at` points in `data`: its own place, with `axis` replaced by its value.
pub(super) fn element_places(data: &Tensor, at: &Tensor, axis: usize) -> Result<Vec<usize>> {
    let (dims, shape) = (data.dims(), at.dims());
    let fits = dims.len() == shape.len() && (0..dims.len()).all(|a| a == axis || shape[a] <= dims[a]);
    if !fits {
        return Err(Unsupported::Invalid);
    }
    let own = strides(dims);
    let list = indices(at, dims[axis])?;
    let (mut places, mut index) = (Vec::with_capacity(list.len()), vec![0usize; dims.len()]);
    for at in list {
        let place = |a: usize| own[a] as usize * if a == axis { at } else { index[a] };
        places.push((0..dims.len()).map(place).sum());
        for a in (0..dims.len()).rev() {
            index[a] += 1;
            if index[a] < shape[a] {
                break;
            }
            index[a] = 0;
        }
    }
    Ok(places)
}

pub(super) fn gather_nd(call: &Call) -> Result<Tensor> {
    let (input, at) = (call.input(0)?, call.input(1)?);
    let batch = usize::try_from(call.int_or("batch_dims", 0)?).map_err(|_| Unsupported::Form)?;
    let (dims, shape) = (input.dims(), at.dims());
    let &tuple = shape.last().ok_or(Unsupported::Invalid)?;
    let fits = batch < shape.len() && tuple > 0 && tuple <= dims.len().saturating_sub(batch);
    if !fits || dims[..batch] != shape[..batch] {
        return Err(Unsupported::Invalid);
    }
    let (places, inner) = tuple_places(dims, at, batch)?;
    let mut out_dims = shape[..shape.len() - 1].to_vec();
    out_dims.extend_from_slice(&dims[batch + tuple..]);
    moved!(call, &[input], out_dims, |data| {
        let mut out = Vec::with_capacity(places.len() * inner);
        for &place in if inner == 0 { &[] } else { places.as_slice() } {
            out.extend_from_slice(&data[0][place..place + inner]);
        }
        out
    })
}

/// Where each tuple of indices in the last axis of `at` points in a tensor of `dims`, after `batch` axes both share; and
/// how many elements lie there. The caller has checked that the shapes fit.
pub(super) fn tuple_places(dims: &[usize], at: &Tensor, batch: usize) -> Result<(Vec<usize>, usize)> {
    if at.dtype() != DataType::Int64 {
        return Err(Unsupported::Invalid);
    }
    let tuple = at.dims().last().copied().unwrap_or(0);
    let list = at.to_i64s().ok_or(Unsupported::Type)?;
    let own = strides(dims);
    let per_batch = element_count(&at.dims()[batch..at.dims().len() - 1]).ok_or(Unsupported::Invalid)?;
    let batch_step = if batch == 0 { 0 } else { own[batch - 1] as usize };
    let inner = element_count(&dims[batch + tuple..]).ok_or(Unsupported::Invalid)?;
    let mut places = Vec::with_capacity(list.len() / tuple.max(1));
    for (row, index) in list.chunks_exact(tuple.max(1)).enumerate() {
        let mut place = row / per_batch.max(1) * batch_step;
        for (axis, &at) in index.iter().enumerate() {
            let size = dims[batch + axis] as i64;
            let at = if at < 0 { at.saturating_add(size) } else { at };
            if !(0..size).contains(&at) {
                return Err(Unsupported::Invalid);
            }
            place += at as usize * own[batch + axis] as usize;
        }
        places.push(place);
    }
    Ok((places, inner))
}

pub(super) fn compress(call: &Call) -> Result<Tensor> {
    let (input, condition) = (call.input(0)?, call.input(1)?);
    if condition.dtype() != DataType::Bool || condition.dims().len() != 1 {
        return Err(Unsupported::Invalid);
    }
    let (flat, axis);
    let (input, axis) = match call.int("axis")? {
        Some(given) => {
            axis = call.axis(given, input.dims().len())?;
            (input, axis)
        }
        None => {
            flat = input.reshaped(vec![input.len()]).map_err(|_| Unsupported::Invalid)?;
            (&flat, 0)
        }
    };
    let chosen = values::<bool>(condition).enumerate().filter(|(_, keep)| *keep).map(|(at, _)| at);
    let chosen: Vec<usize> = chosen.collect();
    pick(call, input, axis, &chosen, &[chosen.len()])
}

pub(super) fn non_zero(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    // Runtimes disagree about the result of a scalar.
    let ndim = input.dims().len();
    if ndim == 0 {
        return Err(Unsupported::Form);
    }
    let hits: Vec<usize> = match input.dtype() {
        DataType::Bool => values::<bool>(input).enumerate().filter(|(_, v)| *v).map(|(at, _)| at).collect(),
        dtype => typed!(dtype, numbers, T => {
            let zero = T::default();
            Ok(values::<T>(input).enumerate().filter(|(_, v)| *v != zero).map(|(at, _)| at).collect())
        })?,
    };
    call.room(DataType::Int64, &[ndim, hits.len()])?;
    let mut out = Vec::with_capacity(ndim * hits.len());
    for (&size, &step) in input.dims().iter().zip(&strides(input.dims())) {
        out.extend(hits.iter().map(|&at| (at / step as usize % size) as i64));
    }
    Ok(Tensor::from_i64s(&[ndim, hits.len()], &out))
}

pub(super) fn reverse_sequence(call: &Call) -> Result<Tensor> {
    let (input, lengths) = (call.input(0)?, call.list(1)?.ok_or(Unsupported::Invalid)?);
    let (batch, time) = (call.int_or("batch_axis", 1)?, call.int_or("time_axis", 0)?);
    let dims = input.dims();
    if dims.len() < 2 || !matches!((batch, time), (0, 1) | (1, 0)) || lengths.len() != dims[batch as usize] {
        return Err(Unsupported::Form);
    }
    let steps = dims[time as usize];
    if lengths.iter().any(|&length| !(0..=steps as i64).contains(&length)) {
        return Err(Unsupported::Invalid);
    }
    let inner = element_count(&dims[2..]).ok_or(Unsupported::Invalid)?;
    let mut order = Vec::with_capacity(dims[0].saturating_mul(dims[1]).min(input.len()));
    for a in 0..if input.is_empty() { 0 } else { dims[0] } {
        for b in 0..dims[1] {
            let (at, length) = if time == 0 { (a, lengths[b]) } else { (b, lengths[a]) };
            let at = if (at as i64) < length { length as usize - 1 - at } else { at };
            order.push(if time == 0 { at * dims[1] + b } else { a * dims[1] + at });
        }
    }
    moved!(call, &[input], dims.to_vec(), |data| {
        let mut out = Vec::with_capacity(data[0].len());
        for &place in &order {
            out.extend_from_slice(&data[0][place * inner..(place + 1) * inner]);
        }
        out
    })
}

pub(super) fn top_k(call: &Call) -> Result<Vec<Tensor>> {
    let input = call.input(0)?;
    let axis = call.axis(call.int_or("axis", -1)?, input.dims().len())?;
    let k = match call.opset {
        ..10 => call.int("k")?.ok_or(Unsupported::Form)?,
        _ if call.node.attribute("k").is_some() => return Err(Unsupported::Form),
        _ => call.input(1)?.scalar_i64().ok_or(Unsupported::Invalid)?,
    };
    let k = usize::try_from(k).ok().filter(|&k| k <= input.dims()[axis]).ok_or(Unsupported::Invalid)?;
    let largest = call.int_or("largest", 1)? == 1;
    // The order of an unsorted result is the runtime's choice.
    if call.int_or("sorted", 1)? != 1 {
        return Err(Unsupported::NotExact);
    }
    let mut dims = input.dims().to_vec();
    dims[axis] = k;
    call.room(DataType::Int64, &dims)?;
    let (outer, size, inner) = around(input.dims(), axis);
    let (outer, inner) = if element_count(&dims) == Some(0) { (0, 0) } else { (outer, inner) };
    let mut chosen = vec![0i64; outer * k * inner];
    let mut places = vec![0usize; outer * k * inner];
    typed!(input.dtype(), numbers, T => {
        let all: Vec<T> = values::<T>(input).collect();
        for row in 0..outer {
            for column in 0..inner {
                let place = |at: usize| (row * size + at) * inner + column;
                let mut order: Vec<usize> = (0..size).collect();
                let mut ordered = true;
                order.sort_by(|&a, &b| {
                    let found = all[place(a)].partial_cmp(&all[place(b)]);
                    ordered &= found.is_some();
                    let found = found.unwrap_or(std::cmp::Ordering::Equal);
                    if largest { found.reverse() } else { found }.then(a.cmp(&b))
                });
                if !ordered {
                    return Err(Unsupported::NotExact);
                }
                for (at, &from) in order.iter().take(k).enumerate() {
                    chosen[(row * k + at) * inner + column] = from as i64;
                    places[(row * k + at) * inner + column] = place(from);
                }
            }
        }
        Ok(())
    })?;
    let picked = moved!(call, &[input], dims.clone(), |data| {
        places.iter().map(|&place| data[0][place].clone()).collect::<Vec<_>>()
    })?;
    Ok(vec![picked, Tensor::from_i64s(&dims, &chosen)])
}
