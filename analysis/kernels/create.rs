//! Operators that make tensors from shapes and numbers.

use super::{
    Call, Result, Unsupported,
    elements::{collect, moved, typed, values},
    layout::around,
    sizes,
};
use lathe_ir::{AttributeValue, DataType, Tensor};

pub(super) fn constant(call: &Call) -> Result<Tensor> {
    let [attribute] = call.node.attributes.as_slice() else { return Err(Unsupported::Form) };
    match (attribute.name.as_str(), &attribute.value) {
        ("value", AttributeValue::Tensor(tensor)) => Ok(tensor.clone()),
        ("value_int", AttributeValue::Int(value)) => Ok(Tensor::from_i64s(&[], &[*value])),
        ("value_ints", AttributeValue::Ints(values)) => Ok(Tensor::int64s(values)),
        ("value_float", AttributeValue::Float(value)) => Ok(Tensor::from_f32s(&[], &[*value])),
        ("value_floats", AttributeValue::Floats(values)) => Ok(Tensor::from_f32s(&[values.len()], values)),
        ("value_string", AttributeValue::String(value)) => {
            Tensor::strings(vec![], vec![value.clone()]).map_err(|_| Unsupported::Invalid)
        }
        ("value_strings", AttributeValue::Strings(values)) => {
            Tensor::strings(vec![values.len()], values.clone()).map_err(|_| Unsupported::Invalid)
        }
        _ => Err(Unsupported::Form),
    }
}

pub(super) fn constant_of_shape(call: &Call) -> Result<Tensor> {
    let dims = sizes(&call.list(0)?.ok_or(Unsupported::Invalid)?)?;
    let value = match call.node.attribute("value") {
        None => Tensor::from_f32s(&[1], &[0.0]),
        Some(AttributeValue::Tensor(value)) if value.len() == 1 => value.clone(),
        Some(_) => return Err(Unsupported::Form),
    };
    let count = call.room(value.dtype(), &dims)?;
    moved!(call, &[&value], dims, |data| vec![data[0][0].clone(); count])
}

pub(super) fn shape(call: &Call) -> Result<Tensor> {
    let dims = call.input(0)?.dims();
    let ndim = dims.len() as i64;
    let from_start = |at: i64| if at < 0 { at.saturating_add(ndim) } else { at }.clamp(0, ndim) as usize;
    let start = from_start(call.int_or("start", 0)?);
    let end = from_start(call.int_or("end", ndim)?).max(start);
    let sizes: Vec<i64> = dims[start..end].iter().map(|&dim| dim as i64).collect();
    Ok(Tensor::int64s(&sizes))
}

pub(super) fn size(call: &Call) -> Result<Tensor> {
    Ok(Tensor::from_i64s(&[], &[call.input(0)?.len() as i64]))
}

pub(super) fn range(call: &Call) -> Result<Tensor> {
    let (start, limit, delta) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let dtype = start.dtype();
    if limit.dtype() != dtype || delta.dtype() != dtype {
        return Err(Unsupported::Invalid);
    }
    // Whole numbers this small are exact in every type that follows, however a runtime adds them up.
    let largest = match dtype {
        DataType::Int64 | DataType::Double => 1i64 << 52,
        DataType::Int32 => i64::from(i32::MAX),
        DataType::Int16 => i64::from(i16::MAX),
        DataType::Float => 1 << 24,
        _ => return Err(Unsupported::Type),
    };
    let whole = |tensor: &Tensor| -> Result<i64> {
        let value = tensor.scalar_f64().ok_or(Unsupported::Invalid)?;
        let small =
            value.abs() <= largest as f64 && value.fract() == 0.0 && !(value == 0.0 && value.is_sign_negative());
        if small { Ok(value as i64) } else { Err(Unsupported::NotExact) }
    };
    let (first, end, step) = (whole(start)?, whole(limit)?, whole(delta)?);
    if step == 0 {
        return Err(Unsupported::Invalid);
    }
    let distance = if step > 0 { end - first } else { first - end };
    let count = distance.max(0).unsigned_abs().div_ceil(step.unsigned_abs()) as usize;
    call.room(dtype, &[count])?;
    // Runtimes compute one number past the last, which must not overflow either.
    let past = first.checked_add(step.checked_mul(count as i64).ok_or(Unsupported::NotExact)?);
    if past.is_none_or(|past| past.abs() > largest) {
        return Err(Unsupported::NotExact);
    }
    let numbers = (0..count as i64).map(|i| first + i * step);
    match dtype {
        DataType::Int64 => collect(call, vec![count], numbers.map(Some)),
        DataType::Int32 => collect(call, vec![count], numbers.map(|v| i32::try_from(v).ok())),
        DataType::Int16 => collect(call, vec![count], numbers.map(|v| i16::try_from(v).ok())),
        DataType::Float => collect(call, vec![count], numbers.map(|v| Some(v as f32))),
        _ => collect(call, vec![count], numbers.map(|v| Some(v as f64))),
    }
}

pub(super) fn eye_like(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let &[height, width] = input.dims() else { return Err(Unsupported::Invalid) };
    let dtype = match call.int("dtype")? {
        Some(code) => i32::try_from(code).ok().and_then(DataType::from_code).ok_or(Unsupported::Form)?,
        None => input.dtype(),
    };
    let k = call.int_or("k", 0)?;
    let pair = Tensor::from_f64s(dtype, &[2], &[0.0, 1.0]).ok_or(Unsupported::Type)?;
    let dims = vec![height, width];
    let count = call.room(dtype, &dims)?;
    let on = |index: usize| i64::checked_sub((index % width) as i64, (index / width) as i64) == Some(k);
    moved!(call, &[&pair], dims, |data| (0..count).map(|i| data[0][usize::from(on(i))].clone()).collect::<Vec<_>>())
}

pub(super) fn one_hot(call: &Call) -> Result<Tensor> {
    let (at, depth, pair) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let depth = depth.scalar_f64().filter(|&d| d.fract() == 0.0 && (1.0..9e15).contains(&d));
    let depth = depth.ok_or(Unsupported::Invalid)? as usize;
    if pair.len() != 2 {
        return Err(Unsupported::Invalid);
    }
    let axis = call.axis(call.int_or("axis", -1)?, at.dims().len() + 1)?;
    let mut dims = at.dims().to_vec();
    dims.insert(axis, depth);
    let count = call.room(pair.dtype(), &dims)?;
    let size = depth as i128;
    let index = |value: i128| if value < 0 { value + size } else { value };
    let hot: Vec<i128> = match at.dtype() {
        dtype if dtype.is_float() => typed!(dtype, floats, T => {
            // A fraction is cut off; beyond this range the cut is undefined.
            let whole = |v: f64| (v.abs() < 9e15).then_some(index(v as i128));
            values::<T>(at).map(|v| whole(v.into()).ok_or(Unsupported::NotExact)).collect::<Result<_>>()
        })?,
        dtype => typed!(dtype, integers, T => Ok(values::<T>(at).map(|v| index(v.into())).collect()))?,
    };
    let (_, _, inner) = around(&dims, axis);
    let on = |i: usize| hot[i / (depth * inner) * inner + i % inner] == (i / inner % depth) as i128;
    moved!(call, &[pair], dims, |data| (0..count).map(|i| data[0][usize::from(on(i))].clone()).collect::<Vec<_>>())
}
