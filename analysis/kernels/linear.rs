//! Linear algebra on weights, in float64 and rounded back once: for passes that move factors and offsets into them.

use super::{
    Call, Result, Unsupported,
    elements::{Element, collect, typed, values},
    layout::around,
};
use lathe_ir::{Node, Tensor};

/// A float type that results are rounded back to.
trait Rounded: Element + Into<f64> {
    fn round(value: f64) -> Self;
}

macro_rules! rounded {
    ($($type:ty, $round:expr;)*) => {$(
        impl Rounded for $type {
            fn round(value: f64) -> $type {
                $round(value)
            }
        }
    )*};
}
rounded! { f32, |v| v as f32; f64, |v| v; half::f16, half::f16::from_f64; half::bf16, half::bf16::from_f64; }

/// Rounds, unless a finite number would become infinite or a NaN.
fn checked<T: Rounded>(value: f64) -> Option<T> {
    let rounded = T::round(value);
    let wide: f64 = rounded.into();
    wide.is_finite().then_some(rounded)
}

/// `tensor` with slice `i` along `axis` multiplied by `factors[i]`.
///
/// Works for float tensors of 16 bits or more. Fails if there is not one factor per slice, or if an element is not
/// finite afterwards.
pub fn scale_axis(tensor: &Tensor, axis: usize, factors: &[f64]) -> Result<Tensor> {
    map_axis(tensor, axis, factors, |value, factor| value * factor)
}

/// `tensor` with `terms[i]` added to every element of slice `i` along `axis`, under the terms of [`scale_axis`].
pub fn add_axis(tensor: &Tensor, axis: usize, terms: &[f64]) -> Result<Tensor> {
    map_axis(tensor, axis, terms, |value, term| value + term)
}

fn map_axis(tensor: &Tensor, axis: usize, by: &[f64], compute: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
    if tensor.dims().get(axis) != Some(&by.len()) {
        return Err(Unsupported::Invalid);
    }
    let (_, size, inner) = around(tensor.dims(), axis);
    let node = Node::default();
    typed!(tensor.dtype(), floats, T => {
        let value = |(index, value): (usize, T)| checked::<T>(compute(value.into(), by[index / inner % size]));
        collect(&Call::free(&node), tensor.dims().to_vec(), values::<T>(tensor).enumerate().map(value))
    })
}

/// The sum of the slices of `tensor` along `axis`, slice `i` multiplied by `factors[i]`, in float64.
///
/// For a weight `w: [m, n]`, axis 0 gives `factors · w: [n]` and axis 1 gives `w · factors: [m]`: what an offset in front
/// of a layer adds to its bias. The result is packed, in the order of the remaining axes.
pub fn contract(tensor: &Tensor, axis: usize, factors: &[f64]) -> Result<Vec<f64>> {
    if tensor.dims().get(axis) != Some(&factors.len()) {
        return Err(Unsupported::Invalid);
    }
    let (outer, size, inner) = around(tensor.dims(), axis);
    let mut out = vec![0f64; if tensor.is_empty() { 0 } else { outer * inner }];
    typed!(tensor.dtype(), floats, T => {
        for (index, value) in values::<T>(tensor).enumerate() {
            let place = index / (size * inner) * inner + index % inner;
            out[place] += f64::from(value) * factors[index / inner % size];
        }
        Ok(())
    })?;
    Ok(out)
}

/// `values` rounded to the type of `like`, in the shape `dims`. Fails if `like` is no float of 16 bits or more, the
/// number of values is wrong, or one is not finite afterwards.
pub fn rounded_like(like: &Tensor, dims: &[usize], values: &[f64]) -> Result<Tensor> {
    let node = Node::default();
    let call = Call::free(&node);
    if call.room(like.dtype(), dims)? != values.len() {
        return Err(Unsupported::Invalid);
    }
    typed!(like.dtype(), floats, T => collect(&call, dims.to_vec(), values.iter().map(|&v| checked::<T>(v))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::DataType;

    #[test]
    fn scales_along_the_axis() {
        let weight = Tensor::from_f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
        let scaled = scale_axis(&weight, 0, &[2.0, 10.0]).unwrap();
        assert_eq!(scaled.to_f32s().unwrap(), [2., 4., 6., 40., 50., 60.]);
        let scaled = scale_axis(&weight, 1, &[1.0, 0.0, -1.0]).unwrap();
        assert_eq!(scaled.to_f32s().unwrap(), [1., 0., -3., 4., 0., -6.]);
        assert_eq!(scale_axis(&weight, 1, &[1.0]), Err(Unsupported::Invalid));
    }

    #[test]
    fn refuses_what_overflows() {
        let weight = Tensor::from_f64s(DataType::Float16, &[1], &[60000.0]).unwrap();
        assert_eq!(scale_axis(&weight, 0, &[2.0]), Err(Unsupported::NotExact));
    }

    #[test]
    fn contracts_either_axis() {
        let weight = Tensor::from_f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
        assert_eq!(contract(&weight, 0, &[1.0, 10.0]).unwrap(), [41., 52., 63.]);
        assert_eq!(contract(&weight, 1, &[1.0, 0.0, 1.0]).unwrap(), [4., 10.]);
    }
}
