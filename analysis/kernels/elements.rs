//! Elements of tensors as Rust values: numbers by type, and anonymous cells by width.

use super::{Call, Result, Unsupported};
use bytes::Bytes;
use half::{bf16, f16};
use lathe_ir::{DataType, Tensor};

/// A number type with a fixed little-endian form.
pub(super) trait Element: Copy {
    /// The ONNX type.
    const TYPE: DataType;
    /// The bytes of one element.
    type Raw: Copy + 'static;
    /// The elements of a tensor of this type.
    fn raw(bytes: &[u8]) -> &[Self::Raw];
    /// Decodes one element.
    fn read(raw: Self::Raw) -> Self;
    /// Appends one element.
    fn write(self, out: &mut Vec<u8>);
}

macro_rules! element {
    ($($type:ty, $dtype:ident, $width:literal;)*) => {$(
        impl Element for $type {
            const TYPE: DataType = DataType::$dtype;
            type Raw = [u8; $width];
            fn raw(bytes: &[u8]) -> &[Self::Raw] {
                bytes.as_chunks::<$width>().0
            }
            fn read(raw: Self::Raw) -> Self {
                <$type>::from_le_bytes(raw)
            }
            fn write(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

element! {
    u8, Uint8, 1; i8, Int8, 1; u16, Uint16, 2; i16, Int16, 2; u32, Uint32, 4; i32, Int32, 4; u64, Uint64, 8; i64, Int64, 8;
    f32, Float, 4; f64, Double, 8; f16, Float16, 2; bf16, Bfloat16, 2;
}

impl Element for bool {
    const TYPE: DataType = DataType::Bool;
    type Raw = [u8; 1];
    fn raw(bytes: &[u8]) -> &[[u8; 1]] {
        bytes.as_chunks::<1>().0
    }
    fn read([byte]: [u8; 1]) -> bool {
        byte != 0
    }
    fn write(self, out: &mut Vec<u8>) {
        out.push(self.into());
    }
}

/// The elements of a tensor, which must be of type `T`.
pub(super) fn values<T: Element>(tensor: &Tensor) -> impl Iterator<Item = T> + '_ {
    debug_assert_eq!(tensor.dtype(), T::TYPE, "the caller looked at the type");
    T::raw(tensor.bytes()).iter().map(|&raw| T::read(raw))
}

/// A tensor of `dims` from as many values; `Unsupported` as soon as one of them is.
pub(super) fn collect<T: Element>(
    call: &Call,
    dims: Vec<usize>,
    values: impl Iterator<Item = Option<T>>,
) -> Result<Tensor> {
    let count = call.room(T::TYPE, &dims)?;
    let mut out = Vec::with_capacity(count * size_of::<T::Raw>());
    for value in values {
        value.ok_or(Unsupported::NotExact)?.write(&mut out);
    }
    Tensor::new(T::TYPE, dims, out).map_err(|_| Unsupported::Invalid)
}

/// Runs `$body` with `$T` standing for the Rust type of `$dtype`, one of the groups `integers`, `floats`, `numbers`.
macro_rules! typed {
    ($dtype:expr, integers, $T:ident => $body:expr) => {
        $crate::kernels::elements::typed!(@ $dtype, $T => $body;
            Uint8 u8, Int8 i8, Uint16 u16, Int16 i16, Uint32 u32, Int32 i32, Uint64 u64, Int64 i64)
    };
    ($dtype:expr, floats, $T:ident => $body:expr) => {
        $crate::kernels::elements::typed!(@ $dtype, $T => $body;
            Float f32, Double f64, Float16 half::f16, Bfloat16 half::bf16)
    };
    ($dtype:expr, numbers, $T:ident => $body:expr) => {
        $crate::kernels::elements::typed!(@ $dtype, $T => $body;
            Uint8 u8, Int8 i8, Uint16 u16, Int16 i16, Uint32 u32, Int32 i32, Uint64 u64, Int64 i64,
            Float f32, Double f64, Float16 half::f16, Bfloat16 half::bf16)
    };
    (@ $dtype:expr, $T:ident => $body:expr; $($variant:ident $rust:ty),*) => {
        match $dtype {
            $(lathe_ir::DataType::$variant => { type $T = $rust; $body })*
            _ => Err($crate::kernels::Unsupported::Type),
        }
    };
}
pub(super) use typed;

/// Runs `$body` with `$data: Vec<&[T]>`, the elements of `$tensors` (all of one type) as anonymous cells, and makes the
/// `Vec<T>` it gives a tensor of `$dims`. Types narrower than a byte are unpacked and packed again.
macro_rules! moved {
    ($call:expr, $tensors:expr, $dims:expr, |$data:ident| $body:expr) => {{
        let (call, tensors, dims): (&Call, &[&Tensor], Vec<usize>) = ($call, $tensors, $dims);
        let dtype = $crate::kernels::elements::same_type(tensors)?;
        call.room(dtype, &dims)?;
        macro_rules! cells {
            ($width:literal) => {{
                let $data: Vec<&[[u8; $width]]> = tensors.iter().map(|t| t.bytes().as_chunks::<$width>().0).collect();
                Tensor::new(dtype, dims, $body.into_flattened())
            }};
        }
        let made = match dtype.bits() {
            0 => {
                let $data: Vec<&[bytes::Bytes]> = tensors.iter().filter_map(|t| t.string_data()).collect();
                Tensor::strings(dims, $body)
            }
            8 => cells!(1),
            16 => cells!(2),
            32 => cells!(4),
            64 => cells!(8),
            128 => cells!(16),
            bits => {
                let unpacked: Vec<Vec<u8>> =
                    tensors.iter().map(|t| $crate::kernels::elements::unpack(t, bits)).collect();
                let $data: Vec<&[u8]> = unpacked.iter().map(Vec::as_slice).collect();
                Tensor::new(dtype, dims, $crate::kernels::elements::pack(&$body, bits))
            }
        };
        made.map_err(|_| $crate::kernels::Unsupported::Invalid)
    }};
}
pub(super) use moved;

/// The common type of some tensors.
pub(super) fn same_type(tensors: &[&Tensor]) -> Result<DataType> {
    let first = tensors.first().ok_or(Unsupported::Invalid)?.dtype();
    if tensors.iter().all(|t| t.dtype() == first) { Ok(first) } else { Err(Unsupported::Invalid) }
}

/// Elements of fewer than eight bits, one to a byte.
pub(super) fn unpack(tensor: &Tensor, bits: usize) -> Vec<u8> {
    let bytes = tensor.bytes();
    let mask = (1u16 << bits) - 1;
    let element = |index: usize| {
        let at = index * bits;
        let next = bytes.get(at / 8 + 1).map_or(0, |&b| u16::from(b) << 8);
        (((u16::from(bytes[at / 8]) | next) >> (at % 8)) & mask) as u8
    };
    (0..tensor.len()).map(element).collect()
}

/// The reverse of [`unpack`]; unused bits are zero.
pub(super) fn pack(elements: &[u8], bits: usize) -> Vec<u8> {
    let mut out = vec![0u8; (elements.len() * bits).div_ceil(8)];
    for (index, &element) in elements.iter().enumerate() {
        let at = index * bits;
        let spread = u16::from(element) << (at % 8);
        out[at / 8] |= spread as u8;
        if spread > 0xff {
            out[at / 8 + 1] |= (spread >> 8) as u8;
        }
    }
    out
}

/// Bytes that `count` elements take in memory while they are worked on.
pub(super) fn footprint(dtype: DataType, count: usize) -> Option<usize> {
    if dtype == DataType::String { count.checked_mul(size_of::<Bytes>()) } else { dtype.byte_len(count) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_what_it_unpacks() {
        for (dtype, bits) in [(DataType::Int4, 4), (DataType::Uint2, 2), (DataType::Float6E2M3, 6)] {
            for count in 0..9usize {
                let elements: Vec<u8> = (0..count).map(|i| (i as u8).wrapping_mul(37) & ((1 << bits) - 1)).collect();
                let tensor = Tensor::new(dtype, vec![count], pack(&elements, bits)).unwrap();
                assert_eq!(unpack(&tensor, bits), elements);
            }
        }
    }
}
