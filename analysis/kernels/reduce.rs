//! Operators that combine the elements along some axes.

use super::{
    Call, Result, Unsupported,
    elements::{Element, collect, typed, values},
    elementwise::{group_max, group_min},
    layout::around,
    movement::{identity, permute},
};
use lathe_ir::{DataType, Tensor, element_count};

/// What a reduction works on.
struct Groups {
    /// The input with the elements of each group next to one another.
    packed: Tensor,
    /// The number of elements in a group; never zero.
    size: usize,
    /// The shape of the result.
    dims: Vec<usize>,
}

/// Groups the elements that a reduction combines; `since` is when its axes became an input. `None` where the operator
/// does nothing.
fn groups(call: &Call, since: i64) -> Result<Option<Groups>> {
    let input = call.input(0)?;
    let ndim = input.dims().len();
    let keep = call.int_or("keepdims", 1)? != 0;
    let axes = match call.list_since(since, "axes", 1)? {
        Some(axes) if !axes.is_empty() => call.axes(&axes, ndim)?,
        _ if call.flag("noop_with_empty_axes")? => return Ok(None),
        Some(_) if call.opset < since => return Err(Unsupported::Form),
        _ => (0..ndim).collect(),
    };
    let kept: Vec<usize> = (0..ndim).filter(|axis| !axes.contains(axis)).collect();
    let dims = if keep {
        (0..ndim).map(|axis| if axes.contains(&axis) { 1 } else { input.dims()[axis] }).collect()
    } else {
        kept.iter().map(|&axis| input.dims()[axis]).collect()
    };
    let size: Vec<usize> = axes.iter().map(|&axis| input.dims()[axis]).collect();
    // Runtimes disagree about groups without elements.
    let size = element_count(&size).filter(|&size| size > 0).ok_or(Unsupported::NotExact)?;
    let perm: Vec<usize> = kept.into_iter().chain(axes).collect();
    let packed = if perm.is_sorted() { identity(call)? } else { permute(call, input, &perm)? };
    Ok(Some(Groups { packed, size, dims }))
}

/// Runtimes add and multiply integers in float64 too, which is exact up to here.
const EXACT: u128 = 1 << 53;

/// Sums that come out alike in whatever order and type they are computed: whole numbers that stay small.
trait Sum: Element {
    fn sum(group: &[Self]) -> Option<Self>;
}

macro_rules! whole_sum {
    ($($type:ty),*) => {$(
        impl Sum for $type {
            fn sum(group: &[$type]) -> Option<$type> {
                let (mut sum, mut largest) = (0i128, 0u128);
                for &v in group {
                    sum += i128::from(v);
                    largest += i128::from(v).unsigned_abs();
                }
                if largest <= EXACT { <$type>::try_from(sum).ok() } else { None }
            }
        }
    )*};
}
whole_sum!(u8, i8, u16, i16, u32, i32, u64, i64);

macro_rules! exact_sum {
    ($($type:ty, $bits:literal;)*) => {$(
        impl Sum for $type {
            fn sum(group: &[$type]) -> Option<$type> {
                let (mut sum, mut largest) = (0f64, 0f64);
                for &v in group {
                    let v = f64::from(v);
                    largest += v.abs();
                    let plain = v.fract() == 0.0 && !(v == 0.0 && v.is_sign_negative());
                    if !plain || largest > (1u64 << $bits) as f64 {
                        return None;
                    }
                    sum += v;
                }
                Some(sum as $type)
            }
        }
    )*};
}
exact_sum! { f32, 24; f64, 52; }

/// Runs `$body` with `$T` standing for a type that can be summed.
macro_rules! summed {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DataType::Float => {
                type $T = f32;
                $body
            }
            DataType::Double => {
                type $T = f64;
                $body
            }
            dtype => typed!(dtype, integers, $T => $body),
        }
    };
}

pub(super) fn sum(call: &Call) -> Result<Tensor> {
    let Some(groups) = groups(call, 13)? else { return identity(call) };
    summed!(groups.packed.dtype(), T => {
        let all: Vec<T> = values(&groups.packed).collect();
        collect(call, groups.dims, all.chunks_exact(groups.size).map(T::sum))
    })
}

pub(super) fn prod(call: &Call) -> Result<Tensor> {
    let Some(groups) = groups(call, 18)? else { return identity(call) };
    typed!(groups.packed.dtype(), integers, T => {
        let all: Vec<T> = values(&groups.packed).collect();
        let product = |group: &[T]| {
            let (mut product, mut largest) = (1i128, 1u128);
            for &v in group {
                // A zero must not hide that the product before it was large.
                largest = largest.checked_mul(i128::from(v).unsigned_abs().max(1)).filter(|&l| l <= EXACT)?;
                product *= i128::from(v);
            }
            T::try_from(product).ok()
        };
        collect(call, groups.dims, all.chunks_exact(groups.size).map(product))
    })
}

pub(super) fn mean(call: &Call) -> Result<Tensor> {
    let Some(groups) = groups(call, 18)? else { return identity(call) };
    typed!(groups.packed.dtype(), integers, T => {
        let all: Vec<T> = values(&groups.packed).collect();
        let mean = |group: &[T]| {
            let sum: i128 = group.iter().map(|&v| i128::from(v)).sum();
            let size = groups.size as i128;
            // How a runtime rounds, and whether its sum wraps, is its own affair.
            if sum % size == 0 && T::sum(group).is_some() { T::try_from(sum / size).ok() } else { None }
        };
        collect(call, groups.dims, all.chunks_exact(groups.size).map(mean))
    })
}

pub(super) fn max(call: &Call) -> Result<Tensor> {
    let Some(groups) = groups(call, 18)? else { return identity(call) };
    group_max(call, &groups.packed, groups.size, groups.dims)
}

pub(super) fn min(call: &Call) -> Result<Tensor> {
    let Some(groups) = groups(call, 18)? else { return identity(call) };
    group_min(call, &groups.packed, groups.size, groups.dims)
}

pub(super) fn arg_max(call: &Call) -> Result<Tensor> {
    arg(call, true)
}

pub(super) fn arg_min(call: &Call) -> Result<Tensor> {
    arg(call, false)
}

fn arg(call: &Call, largest: bool) -> Result<Tensor> {
    let input = call.input(0)?;
    let axis = call.axis(call.int_or("axis", 0)?, input.dims().len())?;
    let (keep, last) = (call.int_or("keepdims", 1)? != 0, call.flag("select_last_index")?);
    let mut dims = input.dims().to_vec();
    if dims[axis] == 0 {
        return Err(Unsupported::Invalid);
    }
    if keep {
        dims[axis] = 1;
    } else {
        dims.remove(axis);
    }
    let count = call.room(DataType::Int64, &dims)?;
    let (_, size, inner) = around(input.dims(), axis);
    typed!(input.dtype(), numbers, T => {
        let all: Vec<T> = values(input).collect();
        let find = |group: usize| {
            let place = |at: usize| (group / inner * size + at) * inner + group % inner;
            let mut best = 0;
            for at in 0..size {
                let order = all[place(at)].partial_cmp(&all[place(best)])?;
                let better = if largest { order.is_gt() } else { order.is_lt() };
                if better || (last && order.is_eq()) {
                    best = at;
                }
            }
            Some(best as i64)
        };
        collect(call, dims, (0..count).map(find))
    })
}

pub(super) fn cum_sum(call: &Call) -> Result<Tensor> {
    let (input, axis) = (call.input(0)?, call.input(1)?.scalar_i64().ok_or(Unsupported::Invalid)?);
    let axis = call.axis(axis, input.dims().len())?;
    let (exclusive, reverse) = (call.flag("exclusive")?, call.flag("reverse")?);
    let (outer, size, inner) = around(input.dims(), axis);
    let outer = if input.is_empty() { 0 } else { outer };
    call.room(input.dtype(), input.dims())?;
    summed!(input.dtype(), T => {
        let all: Vec<T> = values(input).collect();
        let mut out = vec![T::default(); all.len()];
        let mut line = Vec::with_capacity(size);
        for row in 0..outer {
            for column in 0..inner {
                let place = |at: usize| {
                    let at = if reverse { size - 1 - at } else { at };
                    (row * size + at) * inner + column
                };
                line.clear();
                line.extend((0..size).map(|at| all[place(at)]));
                // One check that the whole line adds up exactly covers every part of it.
                T::sum(&line).ok_or(Unsupported::NotExact)?;
                let mut total = T::default();
                for (at, &value) in line.iter().enumerate() {
                    let next = T::sum(&[total, value]).ok_or(Unsupported::NotExact)?;
                    out[place(at)] = if exclusive { total } else { next };
                    total = next;
                }
            }
        }
        collect(call, input.dims().to_vec(), out.into_iter().map(Some))
    })
}
