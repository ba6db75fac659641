//! Constant tensors: typed, shaped, zero-copy.

use crate::{
    DataType,
    mapping::{Buffer, Mapping},
};
use bytes::Bytes;
use half::{bf16, f16};
use std::{fmt, path::Path, sync::Arc};

/// Bytes of one of [`Tensor::parts`].
const PART: usize = 1 << 20;

/// Smaller tensors share their pages with others, and letting them go would cost more than reading them.
const SMALLEST_RELEASED: usize = 64 << 10;

/// Key and value pairs that travel with a model, graph, node, value or tensor.
pub type Metadata = Vec<(String, String)>;

/// Why bytes and a shape do not make a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The product of the dimensions does not fit in memory addresses.
    #[error("its dimensions {dims:?} overflow")]
    Overflow {
        /// The stated dimensions.
        dims: Vec<i64>,
    },
    /// A dimension is below zero.
    #[error("its dimensions {dims:?} hold a negative size")]
    Negative {
        /// The stated dimensions.
        dims: Vec<i64>,
    },
    /// The data has another length than type and shape say.
    #[error("its shape {dims:?} of {dtype} needs {expected} {unit}, found {found}")]
    Length {
        /// The stated dimensions.
        dims: Vec<usize>,
        /// The element type.
        dtype: DataType,
        /// What type and shape need.
        expected: usize,
        /// What is there.
        found: usize,
        /// `bytes` or `elements`.
        unit: &'static str,
    },
}

#[derive(Clone)]
enum Data {
    Bytes(Buffer),
    Strings(Arc<[Bytes]>),
}

/// A constant tensor. Cloning shares the data.
///
/// Elements are little-endian and packed (two int4 or four int2 to a byte, low bits first), as in ONNX `raw_data`.
#[derive(Clone)]
pub struct Tensor {
    dtype: DataType,
    dims: Vec<usize>,
    data: Data,
    /// Documentation kept for the file.
    pub doc: String,
    /// Metadata kept for the file.
    pub metadata: Metadata,
    /// Whether the file stored (and will store) the elements in the typed fields rather than as raw bytes.
    pub(crate) typed: bool,
}

/// The number of elements of a shape; `None` if it overflows.
pub fn element_count(dims: &[usize]) -> Option<usize> {
    // A zero anywhere makes the tensor empty, whatever the other sizes are.
    if dims.contains(&0) {
        return Some(0);
    }
    dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))
}

impl Tensor {
    /// A tensor over packed little-endian bytes. Fails unless `bytes` has exactly the length that type and shape need.
    pub fn new(dtype: DataType, dims: Vec<usize>, bytes: impl Into<Bytes>) -> Result<Tensor, TensorError> {
        Tensor::mapped(dtype, dims, bytes.into(), None)
    }

    pub(crate) fn mapped(
        dtype: DataType,
        dims: Vec<usize>,
        bytes: Bytes,
        mapping: Option<&Arc<Mapping>>,
    ) -> Result<Tensor, TensorError> {
        let overflow = || TensorError::Overflow { dims: dims.iter().map(|&d| d as i64).collect() };
        let count = element_count(&dims).ok_or_else(overflow)?;
        let expected = dtype.byte_len(count).ok_or_else(overflow)?;
        if bytes.len() != expected {
            return Err(TensorError::Length { dims, dtype, expected, found: bytes.len(), unit: "bytes" });
        }
        let data = Data::Bytes(Buffer::new(bytes, mapping));
        Ok(Tensor { dtype, dims, data, doc: String::new(), metadata: Vec::new(), typed: false })
    }

    /// A tensor of strings. Fails unless there are as many strings as the shape has elements.
    pub fn strings(dims: Vec<usize>, strings: Vec<Bytes>) -> Result<Tensor, TensorError> {
        let overflow = || TensorError::Overflow { dims: dims.iter().map(|&d| d as i64).collect() };
        let expected = element_count(&dims).ok_or_else(overflow)?;
        let found = strings.len();
        if found != expected {
            return Err(TensorError::Length { dims, dtype: DataType::String, expected, found, unit: "elements" });
        }
        let data = Data::Strings(strings.into());
        Ok(Tensor { dtype: DataType::String, dims, data, doc: String::new(), metadata: Vec::new(), typed: true })
    }

    fn of<const N: usize>(dtype: DataType, dims: &[usize], elements: impl Iterator<Item = [u8; N]>) -> Tensor {
        let bytes: Vec<u8> = elements.flatten().collect();
        Tensor::new(dtype, dims.to_vec(), bytes).expect("the caller gives as many elements as the shape has")
    }

    /// A float32 tensor. Panics if `values` has another length than `dims` say.
    pub fn from_f32s(dims: &[usize], values: &[f32]) -> Tensor {
        Tensor::of(DataType::Float, dims, values.iter().map(|v| v.to_le_bytes()))
    }

    /// An int64 tensor. Panics if `values` has another length than `dims` say.
    pub fn from_i64s(dims: &[usize], values: &[i64]) -> Tensor {
        Tensor::of(DataType::Int64, dims, values.iter().map(|v| v.to_le_bytes()))
    }

    /// A one-axis int64 tensor, as the shape inputs of many operators want it.
    pub fn int64s(values: &[i64]) -> Tensor {
        Tensor::from_i64s(&[values.len()], values)
    }

    /// A boolean tensor. Panics if `values` has another length than `dims` say.
    pub fn from_bools(dims: &[usize], values: &[bool]) -> Tensor {
        Tensor::of(DataType::Bool, dims, values.iter().map(|&v| [v as u8]))
    }

    /// Numbers rounded to `dtype`, which is a float of 16 bits or more, an integer of 8 bits or more, or bool; `None`
    /// for other types. Integers wrap as casts do. Panics if `values` has another length than `dims` say.
    pub fn from_f64s(dtype: DataType, dims: &[usize], values: &[f64]) -> Option<Tensor> {
        let v = values.iter();
        Some(match dtype {
            DataType::Float => Tensor::of(dtype, dims, v.map(|&x| (x as f32).to_le_bytes())),
            DataType::Double => Tensor::of(dtype, dims, v.map(|x| x.to_le_bytes())),
            DataType::Float16 => Tensor::of(dtype, dims, v.map(|&x| f16::from_f64(x).to_le_bytes())),
            DataType::Bfloat16 => Tensor::of(dtype, dims, v.map(|&x| bf16::from_f64(x).to_le_bytes())),
            DataType::Int64 => Tensor::of(dtype, dims, v.map(|&x| (x as i64).to_le_bytes())),
            DataType::Int32 => Tensor::of(dtype, dims, v.map(|&x| (x as i32).to_le_bytes())),
            DataType::Int16 => Tensor::of(dtype, dims, v.map(|&x| (x as i16).to_le_bytes())),
            DataType::Int8 => Tensor::of(dtype, dims, v.map(|&x| (x as i8).to_le_bytes())),
            DataType::Uint64 => Tensor::of(dtype, dims, v.map(|&x| (x as u64).to_le_bytes())),
            DataType::Uint32 => Tensor::of(dtype, dims, v.map(|&x| (x as u32).to_le_bytes())),
            DataType::Uint16 => Tensor::of(dtype, dims, v.map(|&x| (x as u16).to_le_bytes())),
            DataType::Uint8 => Tensor::of(dtype, dims, v.map(|&x| (x as u8).to_le_bytes())),
            DataType::Bool => Tensor::of(dtype, dims, v.map(|&x| [(x != 0.0) as u8])),
            _ => return None,
        })
    }

    /// The element type.
    pub fn dtype(&self) -> DataType {
        self.dtype
    }

    /// The sizes of the axes.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        element_count(&self.dims).expect("checked when the tensor was made")
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The packed bytes; empty for strings (see [`Tensor::string_data`]).
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Bytes(buffer) => buffer.as_slice(),
            Data::Strings(_) => &[],
        }
    }

    /// [`Tensor::bytes`] part by part; every part but the last is of a length that all element types of whole bytes
    /// divide. Pages of a mapped file are let go when the next part is asked for, so that a large tensor takes no more
    /// memory than a part.
    pub fn parts(&self) -> Parts<'_> {
        Parts { tensor: self, at: 0, len: 0 }
    }

    /// The packed bytes, shared; empty for strings.
    pub fn shared_bytes(&self) -> Bytes {
        match &self.data {
            Data::Bytes(buffer) => buffer.bytes().clone(),
            Data::Strings(_) => Bytes::new(),
        }
    }

    /// The strings, if this is a tensor of strings.
    pub fn string_data(&self) -> Option<&[Bytes]> {
        match &self.data {
            Data::Bytes(_) => None,
            Data::Strings(strings) => Some(strings),
        }
    }

    /// Bytes of data; for strings the sum of their lengths.
    pub fn byte_len(&self) -> usize {
        match &self.data {
            Data::Bytes(buffer) => buffer.as_slice().len(),
            Data::Strings(strings) => strings.iter().map(Bytes::len).sum(),
        }
    }

    /// The same tensor with its data on disk, where it is large and held in memory; see [`Tensor::release`].
    ///
    /// Constants that a rewrite computes are as large as those that it replaces. What is part of a graph is spilled by
    /// [`Graph::add_initializer`](crate::Graph::add_initializer) and [`Patch::constant`](crate::Patch::constant).
    pub fn spilled(self) -> Tensor {
        match self.data {
            Data::Bytes(buffer) => Tensor { data: Data::Bytes(buffer.spilled()), ..self },
            Data::Strings(_) => self,
        }
    }

    /// Lets go of the memory pages behind the data if it is borrowed from a mapped file. It stays readable.
    pub fn release(&self) {
        if let Data::Bytes(buffer) = &self.data {
            buffer.release();
        }
    }

    /// The file that the data is mapped from, and where it lies in it.
    pub(crate) fn place(&self) -> Option<(&Path, u64)> {
        match &self.data {
            Data::Bytes(buffer) => buffer.place(),
            Data::Strings(_) => None,
        }
    }

    /// The same tensor, to be stored as raw bytes whatever the file did before.
    pub(crate) fn as_raw(&self) -> Tensor {
        Tensor { typed: self.string_data().is_some(), ..self.clone() }
    }

    /// Lets go of the memory pages behind a part of [`Tensor::bytes`], as [`Tensor::release`] does.
    pub(crate) fn release_part(&self, part: &[u8]) {
        if let Data::Bytes(buffer) = &self.data {
            buffer.release_part(part);
        }
    }

    /// The same elements in another shape. Fails unless the number of elements is the same.
    pub fn reshaped(&self, dims: Vec<usize>) -> Result<Tensor, TensorError> {
        let overflow = || TensorError::Overflow { dims: dims.iter().map(|&d| d as i64).collect() };
        let expected = element_count(&dims).ok_or_else(overflow)?;
        if expected != self.len() {
            return Err(TensorError::Length { dims, dtype: self.dtype, expected, found: self.len(), unit: "elements" });
        }
        Ok(Tensor { dims, ..self.clone() })
    }

    /// Whole numbers of any width and booleans as int64; `None` for other types and for uint64 beyond its range.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        Some(match self.dtype {
            DataType::Int64 => self.elements(i64::from_le_bytes),
            DataType::Int32 => self.elements(|b| i32::from_le_bytes(b).into()),
            DataType::Int16 => self.elements(|b| i16::from_le_bytes(b).into()),
            DataType::Int8 => self.elements(|b| i8::from_le_bytes(b).into()),
            DataType::Uint64 => {
                return self.elements(u64::from_le_bytes).into_iter().map(|v| v.try_into().ok()).collect();
            }
            DataType::Uint32 => self.elements(|b| u32::from_le_bytes(b).into()),
            DataType::Uint16 => self.elements(|b| u16::from_le_bytes(b).into()),
            DataType::Uint8 | DataType::Bool => self.elements(|[b]: [u8; 1]| b.into()),
            DataType::Uint4 => self.unpacked(4).map(i64::from).collect(),
            DataType::Int4 => self.unpacked(4).map(|b| i64::from((b << 4) as i8 >> 4)).collect(),
            DataType::Uint2 => self.unpacked(2).map(i64::from).collect(),
            DataType::Int2 => self.unpacked(2).map(|b| i64::from((b << 6) as i8 >> 6)).collect(),
            _ => return None,
        })
    }

    /// Real numbers, whole numbers and booleans as float64; `None` for strings and complex numbers.
    pub fn to_f64s(&self) -> Option<Vec<f64>> {
        Some(match self.dtype {
            DataType::Float => self.elements(|b| f32::from_le_bytes(b).into()),
            DataType::Double => self.elements(f64::from_le_bytes),
            DataType::Float16 => self.elements(|b| f16::from_le_bytes(b).into()),
            DataType::Bfloat16 => self.elements(|b| bf16::from_le_bytes(b).into()),
            DataType::Uint64 => self.elements(|b| u64::from_le_bytes(b) as f64),
            DataType::Float8E4M3FN => self.elements(|[b]| small_float(b, 4, 3, 7, Special::NanAllOnes)),
            DataType::Float8E4M3FNUZ => self.elements(|[b]| small_float(b, 4, 3, 8, Special::NanNegativeZero)),
            DataType::Float8E5M2 => self.elements(|[b]| small_float(b, 5, 2, 15, Special::Ieee)),
            DataType::Float8E5M2FNUZ => self.elements(|[b]| small_float(b, 5, 2, 16, Special::NanNegativeZero)),
            DataType::Float8E8M0 => {
                self.elements(|[b]| if b == 255 { f64::NAN } else { 2f64.powi(i32::from(b) - 127) })
            }
            DataType::Float4E2M1 => self.unpacked(4).map(|b| small_float(b, 2, 1, 1, Special::None)).collect(),
            DataType::Float6E2M3 => self.unpacked(6).map(|b| small_float(b, 2, 3, 1, Special::None)).collect(),
            DataType::Float6E3M2 => self.unpacked(6).map(|b| small_float(b, 3, 2, 3, Special::None)).collect(),
            DataType::String | DataType::Complex64 | DataType::Complex128 => return None,
            _ => self.to_i64s()?.into_iter().map(|v| v as f64).collect(),
        })
    }

    /// The float32 elements; `None` for other types.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        (self.dtype == DataType::Float).then(|| self.elements(f32::from_le_bytes))
    }

    /// Every element of `N` bytes, read part by part.
    fn elements<const N: usize, T>(&self, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        let mut all = Vec::with_capacity(self.bytes().len() / N);
        self.parts().for_each(|part| all.extend(part.as_chunks::<N>().0.iter().map(|&bytes| read(bytes))));
        all
    }

    /// The only element as float64, if there is exactly one.
    pub fn scalar_f64(&self) -> Option<f64> {
        if self.len() == 1 { self.to_f64s()?.first().copied() } else { None }
    }

    /// The only element as int64, if there is exactly one.
    pub fn scalar_i64(&self) -> Option<i64> {
        if self.len() == 1 { self.to_i64s()?.first().copied() } else { None }
    }

    /// Elements of `bits` bits each, low bits first.
    fn unpacked(&self, bits: usize) -> impl Iterator<Item = u8> {
        let bytes = self.bytes();
        (0..self.len()).map(move |index| {
            let at = index * bits;
            let pair = u16::from(bytes[at / 8]) | bytes.get(at / 8 + 1).map_or(0, |&b| u16::from(b) << 8);
            ((pair >> (at % 8)) & ((1 << bits) - 1)) as u8
        })
    }

    /// Whether both hold the same elements, bit by bit, in the same shape and type.
    pub fn same_bits(&self, other: &Tensor) -> bool {
        self.dtype == other.dtype
            && self.dims == other.dims
            && match (&self.data, &other.data) {
                (Data::Bytes(a), Data::Bytes(b)) => {
                    std::ptr::eq(a.as_slice(), b.as_slice()) || self.parts().eq(other.parts())
                }
                (Data::Strings(a), Data::Strings(b)) => a == b,
                _ => false,
            }
    }
}

/// See [`Tensor::parts`].
pub struct Parts<'a> {
    tensor: &'a Tensor,
    /// Where the part that was given last begins, and its length.
    at: usize,
    len: usize,
}

impl Parts<'_> {
    /// Lets go of the part that was given last.
    fn release(&self) {
        let bytes = self.tensor.bytes();
        if bytes.len() >= SMALLEST_RELEASED {
            self.tensor.release_part(&bytes[self.at..self.at + self.len]);
        }
    }
}

impl<'a> Iterator for Parts<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.release();
        let bytes = self.tensor.bytes();
        self.at += self.len;
        self.len = PART.min(bytes.len() - self.at);
        (self.len > 0).then(|| &bytes[self.at..self.at + self.len])
    }
}

impl Drop for Parts<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// Which codes of a small float are not numbers.
#[derive(Clone, Copy)]
enum Special {
    None,
    Ieee,
    NanAllOnes,
    NanNegativeZero,
}

/// Decodes a float of `1 + exponent + mantissa` bits.
fn small_float(code: u8, exponent: u32, mantissa: u32, bias: i32, special: Special) -> f64 {
    let sign_bit = 1u8 << (exponent + mantissa);
    let sign = if code & sign_bit != 0 { -1.0 } else { 1.0 };
    let body = code & (sign_bit - 1);
    let (e, m) = (i32::from(body >> mantissa), body & ((1 << mantissa) - 1));
    match special {
        Special::NanNegativeZero if code == sign_bit => return f64::NAN,
        Special::NanAllOnes if body == sign_bit - 1 => return f64::NAN,
        Special::Ieee if e == (1 << exponent) - 1 => return if m == 0 { sign * f64::INFINITY } else { f64::NAN },
        _ => {}
    }
    let fraction = f64::from(m) / f64::from(1 << mantissa);
    sign * if e == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(e - bias) }
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        self.same_bits(other) && self.doc == other.doc && self.metadata == other.metadata
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}{:?}, {} bytes)", self.dtype, self.dims, self.byte_len())
    }
}

/// A constant sparse tensor in coordinate form.
#[derive(Debug, Clone, PartialEq)]
pub struct SparseTensor {
    /// The entries that are not the default, `[n]`.
    pub values: Tensor,
    /// Where they are: `[n]` linear or `[n, ndim]` indices, int64.
    pub indices: Tensor,
    /// The shape of the dense tensor.
    pub dims: Vec<usize>,
}
