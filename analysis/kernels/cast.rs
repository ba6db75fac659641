//! Conversions between element types.

use super::{
    Call, Result, Unsupported,
    elements::{Element, collect, typed, values},
    movement::identity,
};
use half::{bf16, f16};
use lathe_ir::{DataType, Tensor};

/// A number on its way from one type to another.
#[derive(Clone, Copy)]
enum Number {
    Whole(i128),
    /// With whether it came from a type wider than float32.
    Real(f64, bool),
}

/// What a number becomes; `None` where that is undefined or depends on who converts it.
trait Target: Element {
    fn from_number(number: Number) -> Option<Self>;
}

macro_rules! whole_targets {
    ($($type:ty),*) => {$(
        impl Target for $type {
            fn from_number(number: Number) -> Option<Self> {
                match number {
                    Number::Whole(value) => Some(value as $type),
                    // C leaves conversions out of range undefined.
                    Number::Real(value, _) => {
                        let cut = value.trunc();
                        ((<$type>::MIN as f64) <= cut && cut < <$type>::MAX as f64 + 1.0).then_some(cut as $type)
                    }
                }
            }
        }
    )*};
}
whole_targets!(u8, i8, u16, i16, u32, i32, u64, i64);

impl Target for f32 {
    fn from_number(number: Number) -> Option<f32> {
        Some(match number {
            Number::Whole(value) => value as f32,
            Number::Real(value, _) => value as f32,
        })
    }
}

impl Target for f64 {
    fn from_number(number: Number) -> Option<f64> {
        Some(match number {
            Number::Whole(value) => value as f64,
            Number::Real(value, _) => value,
        })
    }
}

/// Rounds to 16 bits. Runtimes go through float32; where rounding twice would differ from rounding once, the result
/// depends on the runtime. So do the bits of NaN.
fn narrowed<T: PartialEq>(number: Number, direct: impl Fn(f64) -> T, through: impl Fn(f32) -> T) -> Option<T> {
    let (exact, single) = match number {
        Number::Whole(value) if value.unsigned_abs() <= 1 << 53 => (value as f64, value as f32),
        Number::Whole(_) => return None,
        Number::Real(value, false) => return (!value.is_nan()).then(|| through(value as f32)),
        Number::Real(value, true) => (value, value as f32),
    };
    let (once, twice) = (direct(exact), through(single));
    (once == twice).then_some(twice)
}

impl Target for f16 {
    fn from_number(number: Number) -> Option<f16> {
        narrowed(number, f16::from_f64, f16::from_f32)
    }
}

impl Target for bf16 {
    fn from_number(number: Number) -> Option<bf16> {
        narrowed(number, bf16::from_f64, bf16::from_f32)
    }
}

impl Target for bool {
    fn from_number(number: Number) -> Option<bool> {
        Some(match number {
            Number::Whole(value) => value != 0,
            Number::Real(value, _) => value != 0.0,
        })
    }
}

pub(super) fn cast(call: &Call) -> Result<Tensor> {
    let code = call.int("to")?.ok_or(Unsupported::Form)?;
    let dtype = i32::try_from(code).ok().and_then(DataType::from_code).ok_or(Unsupported::Form)?;
    convert(call, call.input(0)?, dtype)
}

pub(super) fn cast_like(call: &Call) -> Result<Tensor> {
    convert(call, call.input(0)?, call.input(1)?.dtype())
}

/// `input` as `dtype`.
pub(super) fn convert(call: &Call, input: &Tensor, dtype: DataType) -> Result<Tensor> {
    if dtype == input.dtype() {
        return identity(&Call { inputs: &[Some(input)], ..*call });
    }
    match dtype {
        DataType::Bool => converted::<bool>(call, input),
        _ => typed!(dtype, numbers, T => converted::<T>(call, input)),
    }
}

fn converted<T: Target>(call: &Call, input: &Tensor) -> Result<Tensor> {
    let dims = input.dims().to_vec();
    match input.dtype() {
        DataType::Bool => collect(call, dims, values::<bool>(input).map(|v| T::from_number(Number::Whole(v.into())))),
        DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double => {
            let wide = input.dtype() == DataType::Double;
            typed!(input.dtype(), floats, S => {
                collect(call, dims, values::<S>(input).map(|v| T::from_number(Number::Real(v.into(), wide))))
            })
        }
        DataType::Int4 | DataType::Uint4 | DataType::Int2 | DataType::Uint2 => {
            call.room(DataType::Int64, &dims)?;
            let all = input.to_i64s().ok_or(Unsupported::Type)?;
            collect(call, dims, all.into_iter().map(|v| T::from_number(Number::Whole(v.into()))))
        }
        dtype if dtype.is_integer() => typed!(dtype, integers, S => {
            collect(call, dims, values::<S>(input).map(|v| T::from_number(Number::Whole(v.into()))))
        }),
        // The other small floats are exact in float32; only the bits of NaN are not agreed on.
        dtype if dtype.is_float() => {
            call.room(DataType::Double, &dims)?;
            let all = input.to_f64s().ok_or(Unsupported::Type)?;
            let number = |v: f64| if v.is_nan() { None } else { T::from_number(Number::Real(v, false)) };
            collect(call, dims, all.into_iter().map(number))
        }
        _ => Err(Unsupported::Type),
    }
}
