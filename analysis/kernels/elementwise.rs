//! Operators that compute each element of the result from one element of each input.

use super::{
    Call, Result, Unsupported,
    elements::{Element, collect, moved, typed, values},
    layout::{broadcast_dims, broadcast_strides, rows},
    movement::identity,
};
use half::{bf16, f16};
use lathe_ir::{DataType, Tensor};
use std::cmp::Ordering;

/// Arithmetic as C++ does it; `None` where that is undefined or machines disagree.
trait Number: Element + PartialOrd + Default {
    fn add(self, other: Self) -> Option<Self>;
    fn sub(self, other: Self) -> Option<Self>;
    fn mul(self, other: Self) -> Option<Self>;
    fn div(self, other: Self) -> Option<Self>;
    fn neg(self) -> Option<Self>;
    fn abs(self) -> Option<Self>;
    fn sign(self) -> Option<Self>;
    /// The remainder with the sign of the divisor.
    fn floor_mod(self, other: Self) -> Option<Self>;
    /// The remainder with the sign of the dividend.
    fn trunc_mod(self, other: Self) -> Option<Self>;
    /// `self` to a whole `exponent`, by the rules of a scalar exponent.
    fn power(self, exponent: i64) -> Option<Self>;
    /// Whether both have the same bits: tells −0 from +0.
    fn same(self, other: Self) -> bool;
}

/// Whole numbers up to here are exact in float64, through which C++ computes some integer functions.
const EXACT: u128 = 1 << 53;

macro_rules! integer {
    ($($type:ty, $neg:expr, $abs:expr;)*) => {$(
        impl Number for $type {
            fn add(self, other: Self) -> Option<Self> {
                Some(self.wrapping_add(other))
            }
            fn sub(self, other: Self) -> Option<Self> {
                Some(self.wrapping_sub(other))
            }
            fn mul(self, other: Self) -> Option<Self> {
                Some(self.wrapping_mul(other))
            }
            fn div(self, other: Self) -> Option<Self> {
                self.checked_div(other)
            }
            fn neg(self) -> Option<Self> {
                $neg(self)
            }
            fn abs(self) -> Option<Self> {
                $abs(self)
            }
            fn sign(self) -> Option<Self> {
                i128::from(self).signum().try_into().ok()
            }
            fn floor_mod(self, other: Self) -> Option<Self> {
                let rest = self.checked_rem(other)?;
                let opposite = rest != 0 && (i128::from(rest) < 0) != (i128::from(other) < 0);
                Some(if opposite { rest.wrapping_add(other) } else { rest })
            }
            fn trunc_mod(self, other: Self) -> Option<Self> {
                let small = |v: Self| i128::from(v).unsigned_abs() <= EXACT;
                if small(self) && small(other) { self.checked_rem(other) } else { None }
            }
            fn power(self, exponent: i64) -> Option<Self> {
                let power = i128::from(self).checked_pow(exponent.try_into().ok()?)?;
                if power.unsigned_abs() <= EXACT { power.try_into().ok() } else { None }
            }
            fn same(self, other: Self) -> bool {
                self == other
            }
        }
    )*};
}

integer! {
    u8, |_| None, Some; u16, |_| None, Some; u32, |_| None, Some; u64, |_| None, Some;
    i8, i8::checked_neg, i8::checked_abs; i16, i16::checked_neg, i16::checked_abs;
    i32, i32::checked_neg, i32::checked_abs; i64, i64::checked_neg, i64::checked_abs;
}

macro_rules! float {
    ($($type:ty, $wide:ty, $narrow:expr;)*) => {$(
        impl Number for $type {
            fn add(self, other: Self) -> Option<Self> {
                Some($narrow(<$wide>::from(self) + <$wide>::from(other)))
            }
            fn sub(self, other: Self) -> Option<Self> {
                Some($narrow(<$wide>::from(self) - <$wide>::from(other)))
            }
            fn mul(self, other: Self) -> Option<Self> {
                Some($narrow(<$wide>::from(self) * <$wide>::from(other)))
            }
            fn div(self, other: Self) -> Option<Self> {
                Some($narrow(<$wide>::from(self) / <$wide>::from(other)))
            }
            fn neg(self) -> Option<Self> {
                Some(-self)
            }
            fn abs(self) -> Option<Self> {
                Some($narrow(<$wide>::from(self).abs()))
            }
            fn sign(self) -> Option<Self> {
                let order = <$wide>::from(self).partial_cmp(&0.0)?;
                Some($narrow(<$wide>::from(order as i8)))
            }
            fn floor_mod(self, _other: Self) -> Option<Self> {
                None
            }
            fn trunc_mod(self, other: Self) -> Option<Self> {
                Some($narrow(<$wide>::from(self) % <$wide>::from(other)))
            }
            fn power(self, exponent: i64) -> Option<Self> {
                let x = <$wide>::from(self);
                match exponent {
                    1 => Some(self),
                    2 => Some($narrow(x * x)),
                    _ => None,
                }
            }
            fn same(self, other: Self) -> bool {
                self.to_bits() == other.to_bits()
            }
        }
    )*};
}

// The 16-bit types are computed in float32 and rounded once, which is the correctly rounded result.
float! { f32, f32, |x| x; f64, f64, |x| x; f16, f32, f16::from_f32; bf16, f32, bf16::from_f32; }

fn unary<T: Element, O: Element>(call: &Call, compute: impl Fn(T) -> Option<O>) -> Result<Tensor> {
    let input = call.input(0)?;
    collect(call, input.dims().to_vec(), values::<T>(input).map(compute))
}

macro_rules! unary {
    ($($name:ident, $group:ident, $compute:expr;)*) => {$(
        pub(super) fn $name(call: &Call) -> Result<Tensor> {
            typed!(call.input(0)?.dtype(), $group, T => unary::<T, _>(call, $compute))
        }
    )*};
}

unary! {
    abs, numbers, Number::abs;
    neg, numbers, Number::neg;
    sign, numbers, Number::sign;
    bitwise_not, integers, |v| Some(!v);
    is_nan, floats, |v| Some(v.is_nan());
}

/// Operators on float32 and float64 alone; the 16-bit types take the way over float32.
macro_rules! real {
    ($($name:ident, |$x:ident: $wide:ident| $compute:expr;)*) => {$(
        pub(super) fn $name(call: &Call) -> Result<Tensor> {
            match call.input(0)?.dtype() {
                DataType::Float => unary(call, |$x: f32| { type $wide = f32; $compute }),
                DataType::Double => unary(call, |$x: f64| { type $wide = f64; $compute }),
                DataType::Float16 => unary(call, |v: f16| {
                    type $wide = f32;
                    let $x = f32::from(v);
                    $compute.map(f16::from_f32)
                }),
                DataType::Bfloat16 => unary(call, |v: bf16| {
                    type $wide = f32;
                    let $x = f32::from(v);
                    $compute.map(bf16::from_f32)
                }),
                _ => Err(Unsupported::Type),
            }
        }
    )*};
}

real! {
    floor, |x: T| Some(T::floor(x));
    ceil, |x: T| Some(T::ceil(x));
    round, |x: T| Some(T::round_ties_even(x));
    // The sign of the NaN that a negative number gives is the machine's choice.
    sqrt, |x: T| (x >= 0.0).then(|| T::sqrt(x));
    reciprocal, |x: T| Some(T::recip(x));
}

pub(super) fn relu(call: &Call) -> Result<Tensor> {
    typed!(call.input(0)?.dtype(), numbers, T => unary::<T, T>(call, |v| larger(v, T::default())))
}

pub(super) fn is_inf(call: &Call) -> Result<Tensor> {
    let (negative, positive) = (call.int_or("detect_negative", 1)? != 0, call.int_or("detect_positive", 1)? != 0);
    typed!(call.input(0)?.dtype(), floats, T => unary::<T, bool>(call, |v| {
        let v = f64::from(v);
        Some(v.is_infinite() && if v < 0.0 { negative } else { positive })
    }))
}

pub(super) fn not(call: &Call) -> Result<Tensor> {
    if call.input(0)?.dtype() != DataType::Bool {
        return Err(Unsupported::Type);
    }
    unary(call, |v: bool| Some(!v))
}

/// The shape of the result of a binary operator, which broadcasts since version 7.
fn pair_dims(call: &Call, a: &Tensor, b: &Tensor) -> Result<Vec<usize>> {
    if call.opset < 7 && a.dims() != b.dims() {
        return Err(Unsupported::Form);
    }
    broadcast_dims(&[a.dims(), b.dims()]).ok_or(Unsupported::Invalid)
}

fn zip<A: Element, B: Element, O: Element>(
    call: &Call,
    a: &Tensor,
    b: &Tensor,
    compute: impl Fn(A, B) -> Option<O>,
) -> Result<Tensor> {
    let dims = pair_dims(call, a, b)?;
    let count = call.room(O::TYPE, &dims)?;
    let (left, right) = (A::raw(a.bytes()), B::raw(b.bytes()));
    let mut out = Vec::with_capacity(count * size_of::<O::Raw>());
    let mut exact = true;
    let steps = [&*broadcast_strides(a.dims(), &dims), &*broadcast_strides(b.dims(), &dims)];
    rows(&dims, steps, |length, [mut i, mut j], [di, dj]| {
        for _ in 0..length {
            match compute(A::read(left[i as usize]), B::read(right[j as usize])) {
                Some(value) => value.write(&mut out),
                None => exact = false,
            }
            (i, j) = (i + di, j + dj);
        }
    });
    if !exact {
        return Err(Unsupported::NotExact);
    }
    Tensor::new(O::TYPE, dims, out).map_err(|_| Unsupported::Invalid)
}

/// The two inputs of a binary operator and their common type.
fn pair<'a>(call: &Call<'a>) -> Result<(&'a Tensor, &'a Tensor, DataType)> {
    let (a, b) = (call.input(0)?, call.input(1)?);
    if a.dtype() == b.dtype() { Ok((a, b, a.dtype())) } else { Err(Unsupported::Invalid) }
}

macro_rules! binary {
    ($($name:ident, $group:ident, $compute:expr;)*) => {$(
        pub(super) fn $name(call: &Call) -> Result<Tensor> {
            let (a, b, dtype) = pair(call)?;
            typed!(dtype, $group, T => zip::<T, T, _>(call, a, b, $compute))
        }
    )*};
}

binary! {
    add, numbers, Number::add;
    sub, numbers, Number::sub;
    mul, numbers, Number::mul;
    div, numbers, Number::div;
    greater, numbers, |a, b| Some(a > b);
    greater_or_equal, numbers, |a, b| Some(a >= b);
    less, numbers, |a, b| Some(a < b);
    less_or_equal, numbers, |a, b| Some(a <= b);
    bitwise_and, integers, |a, b| Some(a & b);
    bitwise_or, integers, |a, b| Some(a | b);
    bitwise_xor, integers, |a, b| Some(a ^ b);
}

macro_rules! logical {
    ($($name:ident, $compute:expr;)*) => {$(
        pub(super) fn $name(call: &Call) -> Result<Tensor> {
            let (a, b, dtype) = pair(call)?;
            if dtype != DataType::Bool {
                return Err(Unsupported::Type);
            }
            zip::<bool, bool, bool>(call, a, b, $compute)
        }
    )*};
}

logical! {
    and, |a, b| Some(a & b);
    or, |a, b| Some(a | b);
    xor, |a, b| Some(a ^ b);
}

pub(super) fn equal(call: &Call) -> Result<Tensor> {
    let (a, b, dtype) = pair(call)?;
    match (dtype, a.string_data(), b.string_data()) {
        (DataType::Bool, ..) => zip::<bool, bool, bool>(call, a, b, |a, b| Some(a == b)),
        (_, Some(left), Some(right)) => {
            let dims = pair_dims(call, a, b)?;
            let mut out = Vec::with_capacity(call.room(DataType::Bool, &dims)?);
            let steps = [&*broadcast_strides(a.dims(), &dims), &*broadcast_strides(b.dims(), &dims)];
            rows(&dims, steps, |length, [i, j], [di, dj]| {
                out.extend((0..length as isize).map(|k| left[(i + k * di) as usize] == right[(j + k * dj) as usize]));
            });
            Ok(Tensor::from_bools(&dims, &out))
        }
        _ => typed!(dtype, numbers, T => zip::<T, T, bool>(call, a, b, |a, b| Some(a == b))),
    }
}

pub(super) fn bit_shift(call: &Call) -> Result<Tensor> {
    let (a, b, dtype) = pair(call)?;
    let left = match call.string_or("direction", "")? {
        "LEFT" => true,
        "RIGHT" => false,
        _ => return Err(Unsupported::Form),
    };
    if !matches!(dtype, DataType::Uint8 | DataType::Uint16 | DataType::Uint32 | DataType::Uint64) {
        return Err(Unsupported::Type);
    }
    typed!(dtype, integers, T => zip::<T, T, T>(call, a, b, |a, b| {
        let by = u32::try_from(b).ok()?;
        if left { a.checked_shl(by) } else { a.checked_shr(by) }
    }))
}

pub(super) fn modulo(call: &Call) -> Result<Tensor> {
    let (a, b, dtype) = pair(call)?;
    if call.flag("fmod")? {
        typed!(dtype, numbers, T => zip::<T, T, T>(call, a, b, Number::trunc_mod))
    } else {
        typed!(dtype, integers, T => zip::<T, T, T>(call, a, b, Number::floor_mod))
    }
}

pub(super) fn pow(call: &Call) -> Result<Tensor> {
    let (base, exponent) = (call.input(0)?, call.input(1)?);
    let power = exponent.scalar_f64().filter(|p| p.fract() == 0.0 && p.abs() < 64.0);
    let power = power.ok_or(Unsupported::NotExact)? as i64;
    let dims = pair_dims(call, base, exponent)?;
    // Only where the exponent alone is a scalar do runtimes multiply instead of calling `pow`.
    if base.dtype().is_float() && base.len() == 1 && power > 1 {
        return Err(Unsupported::NotExact);
    }
    typed!(base.dtype(), numbers, T => collect(call, dims, values::<T>(base).map(|v| v.power(power))))
}

/// The greater of two numbers; `None` where the sign of zero or a NaN makes it ambiguous.
fn larger<T: Number>(a: T, b: T) -> Option<T> {
    match a.partial_cmp(&b)? {
        Ordering::Greater => Some(a),
        Ordering::Less => Some(b),
        Ordering::Equal => a.same(b).then_some(a),
    }
}

/// The lesser of two numbers, like [`larger`].
fn smaller<T: Number>(a: T, b: T) -> Option<T> {
    match a.partial_cmp(&b)? {
        Ordering::Less => Some(a),
        Ordering::Greater => Some(b),
        Ordering::Equal => a.same(b).then_some(a),
    }
}

/// The extreme of a group of numbers, for the reductions.
macro_rules! extreme {
    ($($name:ident, $choose:ident;)*) => {$(
        /// Folds a group with the operator's choice; `None` where that is ambiguous.
        pub(super) fn $name(call: &Call, input: &Tensor, group: usize, dims: Vec<usize>) -> Result<Tensor> {
            typed!(input.dtype(), numbers, T => {
                let all: Vec<T> = values::<T>(input).collect();
                let fold = |group: &[T]| group[1..].iter().try_fold(group[0], |best, &v| $choose(best, v));
                collect(call, dims, all.chunks_exact(group).map(fold))
            })
        }
    )*};
}
extreme! { group_max, larger; group_min, smaller; }

/// Applies a binary operator to any number of inputs from left to right.
fn fold(call: &Call, step: impl Fn(&Tensor, &Tensor, &Call) -> Result<Tensor>) -> Result<Tensor> {
    let first = call.input(0)?;
    if call.inputs.len() == 1 {
        return identity(call);
    }
    if call.opset < 8 && call.inputs.iter().flatten().any(|t| t.dims() != first.dims()) {
        return Err(Unsupported::Form);
    }
    let mut total = first.clone();
    for index in 1..call.inputs.len() {
        let next = call.input(index)?;
        if next.dtype() != total.dtype() {
            return Err(Unsupported::Invalid);
        }
        total = step(&total, next, call)?;
    }
    Ok(total)
}

pub(super) fn max(call: &Call) -> Result<Tensor> {
    fold(call, |a, b, call| typed!(a.dtype(), numbers, T => zip::<T, T, T>(call, a, b, larger)))
}

pub(super) fn min(call: &Call) -> Result<Tensor> {
    fold(call, |a, b, call| typed!(a.dtype(), numbers, T => zip::<T, T, T>(call, a, b, smaller)))
}

pub(super) fn sum(call: &Call) -> Result<Tensor> {
    if call.inputs.len() > 2 && call.input(0)?.dtype().is_float() {
        return Err(Unsupported::NotExact);
    }
    fold(call, |a, b, call| typed!(a.dtype(), numbers, T => zip::<T, T, T>(call, a, b, Number::add)))
}

pub(super) fn clip(call: &Call) -> Result<Tensor> {
    let input = call.input(0)?;
    let bound = |index: usize, name: &str| -> Result<Option<Tensor>> {
        if call.opset < 11 {
            return Ok(call.float(name)?.and_then(|v| Tensor::from_f64s(input.dtype(), &[], &[v.into()])));
        }
        match call.optional(index) {
            _ if call.node.attribute(name).is_some() => Err(Unsupported::Form),
            Some(bound) if bound.dtype() == input.dtype() && bound.len() == 1 => Ok(Some(bound.clone())),
            Some(_) => Err(Unsupported::Invalid),
            None => Ok(None),
        }
    };
    let (low, high) = (bound(1, "min")?, bound(2, "max")?);
    typed!(input.dtype(), numbers, T => {
        let low = low.as_ref().and_then(|t| values::<T>(t).next());
        let high = high.as_ref().and_then(|t| values::<T>(t).next());
        unary::<T, T>(call, |v| {
            // Some runtimes use the largest finite number for a bound that is left out.
            let open = |v: T| (!endless(v)).then_some(v);
            let v = low.map_or(open(v), |low| larger(v, low))?;
            high.map_or(open(v), |high| smaller(v, high))
        })
    })
}

/// Whether a number is infinite.
fn endless<T: Number>(v: T) -> bool {
    v.sub(v).is_none_or(|zero| zero.partial_cmp(&T::default()).is_none())
}

/// The operator `Where`.
pub(super) fn select(call: &Call) -> Result<Tensor> {
    let (condition, x, y) = (call.input(0)?, call.input(1)?, call.input(2)?);
    if condition.dtype() != DataType::Bool {
        return Err(Unsupported::Invalid);
    }
    // ONNX Runtime joins two masked copies by asking which is not zero, and so loses the sign of a zero.
    if x.dtype().is_float() && x.dtype() == y.dtype() {
        typed!(x.dtype(), floats, T => {
            let negative_zero = |v: T| v == T::default() && v.is_sign_negative();
            if values::<T>(x).chain(values::<T>(y)).any(negative_zero) { Err(Unsupported::NotExact) } else { Ok(()) }
        })?;
    }
    let dims = broadcast_dims(&[condition.dims(), x.dims(), y.dims()]).ok_or(Unsupported::Invalid)?;
    let chosen: &[[u8; 1]] = bool::raw(condition.bytes());
    let shape = dims.clone();
    let [c, a, b] = [condition, x, y].map(|t| broadcast_strides(t.dims(), &shape));
    moved!(call, &[x, y], dims, |data| {
        let mut out = Vec::with_capacity(shape.iter().product());
        rows(&shape, [&c, &a, &b], |length, [c, a, b], [dc, da, db]| {
            out.extend((0..length as isize).map(|k| {
                let from_x = bool::read(chosen[(c + k * dc) as usize]);
                if from_x { &data[0][(a + k * da) as usize] } else { &data[1][(b + k * db) as usize] }.clone()
            }));
        });
        out
    })
}
