//! Tensors and numbers as text.

use super::{Printer, join};
use crate::{DataType, Initializer, Shape, SparseTensor, Tensor};

/// Tensors with more elements than this are abbreviated.
const SHORT: usize = 8;

impl Printer<'_> {
    pub fn tensor_type(&mut self, initializer: &Initializer) {
        let (elem, dims, sparse) = match initializer {
            Initializer::Dense(tensor) => (tensor.dtype(), tensor.dims(), false),
            Initializer::Sparse(tensor) => (tensor.values.dtype(), tensor.dims.as_slice(), true),
        };
        self.push(if sparse { "sparse_tensor(" } else { "" });
        self.elem_and_shape(Some(elem), Some(&Shape::known(dims)));
        self.push(if sparse { ")" } else { "" });
    }

    pub fn data(&mut self, initializer: &Initializer) {
        match initializer {
            Initializer::Dense(tensor) => self.elements(tensor),
            Initializer::Sparse(sparse) => {
                self.push("{");
                self.tensor(&sparse.values);
                self.push(", ");
                self.tensor(&sparse.indices);
                self.push("}");
            }
        }
    }

    /// A tensor with its type, where it has no name.
    pub fn tensor(&mut self, tensor: &Tensor) {
        self.elem_and_shape(Some(tensor.dtype()), Some(&Shape::known(tensor.dims())));
        // Without the sign, `[` would read as a second shape.
        self.push(if self.abbreviates(tensor) { " = " } else { " " });
        self.elements(tensor);
    }

    pub fn sparse(&mut self, tensor: &SparseTensor) {
        let initializer = Initializer::Sparse(tensor.clone());
        self.tensor_type(&initializer);
        self.push(" ");
        self.data(&initializer);
    }

    fn abbreviates(&self, tensor: &Tensor) -> bool {
        !self.options.full && tensor.len() > SHORT
    }

    fn elements(&mut self, tensor: &Tensor) {
        use DataType::*;
        if self.abbreviates(tensor) {
            let (count, hash) = (tensor.len(), content_hash(tensor));
            tensor.release();
            return self.display(format_args!("[\"elements\": \"{count}\", \"hash\": \"{hash:08x}\"]"));
        }
        self.push("{");
        let bytes = tensor.bytes();
        match tensor.dtype() {
            String => join!(self, tensor.string_data().unwrap_or_default(), |text| self.string(text)),
            Float | Complex64 => {
                join!(self, bytes.as_chunks::<4>().0, |&raw| self.float(f32::from_le_bytes(raw), false))
            }
            Double | Complex128 => {
                join!(self, bytes.as_chunks::<8>().0, |&raw| self.double(f64::from_le_bytes(raw)))
            }
            Uint64 => join!(self, bytes.as_chunks::<8>().0, |&raw| self.display(u64::from_le_bytes(raw))),
            Float16 | Bfloat16 => {
                join!(self, bytes.as_chunks::<2>().0, |&raw| self.display(u16::from_le_bytes(raw)))
            }
            dtype => match tensor.to_i64s() {
                Some(values) => join!(self, values, |value| self.display(value)),
                None => join!(self, codes(bytes, dtype.bits(), tensor.len()), |code| self.display(code)),
            },
        }
        self.push("}");
        tensor.release();
    }

    /// A float that reads back as the same bits; with a point or exponent if `point`, as attributes need it.
    pub fn float(&mut self, value: f32, point: bool) {
        if value.is_nan() {
            return match value.to_bits() {
                0x7fc0_0000 => self.push("nan"),
                0xffc0_0000 => self.push("-nan"),
                bits => self.display(format_args!("nan(0x{bits:08x})")),
            };
        }
        let text = format!("{value:?}");
        self.push(if point { &text } else { text.strip_suffix(".0").unwrap_or(&text) });
    }

    fn double(&mut self, value: f64) {
        if value.is_nan() {
            return match value.to_bits() {
                0x7ff8_0000_0000_0000 => self.push("nan"),
                0xfff8_0000_0000_0000 => self.push("-nan"),
                bits => self.display(format_args!("nan(0x{bits:016x})")),
            };
        }
        let text = format!("{value:?}");
        self.push(text.strip_suffix(".0").unwrap_or(&text));
    }
}

/// `count` codes of at most eight bits, low bits first.
fn codes(bytes: &[u8], bits: usize, count: usize) -> impl Iterator<Item = u16> {
    (0..count).map(move |index| {
        let at = index * bits;
        let byte = |at: usize| bytes.get(at).map_or(0, |&b| u16::from(b));
        ((byte(at / 8) | byte(at / 8 + 1) << 8) >> (at % 8)) & ((1 << bits) - 1)
    })
}

/// A short hash of a tensor's elements: equal on every machine and in every version, for people to compare.
fn content_hash(tensor: &Tensor) -> u32 {
    let mut hash = 0;
    match tensor.string_data() {
        None => hash = hash_bytes(hash, tensor.bytes()),
        Some(strings) => strings.iter().for_each(|text| hash = hash_bytes(hash, text)),
    }
    (hash ^ hash >> 32) as u32
}

/// Four lanes of eight bytes, each multiplied and rotated as in xxHash.
fn hash_bytes(seed: u64, bytes: &[u8]) -> u64 {
    const A: u64 = 0x9e37_79b1_85eb_ca87;
    const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
    let step = |lane: u64, word: u64| (lane ^ word.wrapping_mul(B)).rotate_left(31).wrapping_mul(A);
    let mut lanes = [seed ^ A, seed ^ B, seed, bytes.len() as u64];
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane = step(*lane, u64::from_le_bytes(*word));
        }
    }
    let mut hash = lanes.iter().fold(seed, |hash, &lane| step(hash, lane));
    for &byte in rest {
        hash = step(hash, u64::from(byte) + 1);
    }
    hash ^= hash >> 33;
    hash.wrapping_mul(B) ^ hash >> 29
}
