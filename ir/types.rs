//! Element types, dimensions, and the types of values.

use std::fmt;

/// The element type of a tensor, with the number ONNX gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(i32)]
#[allow(missing_docs)] // The names are ONNX's own.
pub enum DataType {
    Float = 1,
    Uint8 = 2,
    Int8 = 3,
    Uint16 = 4,
    Int16 = 5,
    Int32 = 6,
    Int64 = 7,
    String = 8,
    Bool = 9,
    Float16 = 10,
    Double = 11,
    Uint32 = 12,
    Uint64 = 13,
    Complex64 = 14,
    Complex128 = 15,
    Bfloat16 = 16,
    Float8E4M3FN = 17,
    Float8E4M3FNUZ = 18,
    Float8E5M2 = 19,
    Float8E5M2FNUZ = 20,
    Uint4 = 21,
    Int4 = 22,
    Float4E2M1 = 23,
    Float8E8M0 = 24,
    Uint2 = 25,
    Int2 = 26,
    Float6E2M3 = 27,
    Float6E3M2 = 28,
}

/// Every element type with its name in the ONNX text form and its width in bits (0 for strings).
const DATA_TYPES: &[(DataType, &str, usize)] = &[
    (DataType::Float, "float", 32),
    (DataType::Uint8, "uint8", 8),
    (DataType::Int8, "int8", 8),
    (DataType::Uint16, "uint16", 16),
    (DataType::Int16, "int16", 16),
    (DataType::Int32, "int32", 32),
    (DataType::Int64, "int64", 64),
    (DataType::String, "string", 0),
    (DataType::Bool, "bool", 8),
    (DataType::Float16, "float16", 16),
    (DataType::Double, "double", 64),
    (DataType::Uint32, "uint32", 32),
    (DataType::Uint64, "uint64", 64),
    (DataType::Complex64, "complex64", 64),
    (DataType::Complex128, "complex128", 128),
    (DataType::Bfloat16, "bfloat16", 16),
    (DataType::Float8E4M3FN, "float8e4m3fn", 8),
    (DataType::Float8E4M3FNUZ, "float8e4m3fnuz", 8),
    (DataType::Float8E5M2, "float8e5m2", 8),
    (DataType::Float8E5M2FNUZ, "float8e5m2fnuz", 8),
    (DataType::Uint4, "uint4", 4),
    (DataType::Int4, "int4", 4),
    (DataType::Float4E2M1, "float4e2m1", 4),
    (DataType::Float8E8M0, "float8e8m0", 8),
    (DataType::Uint2, "uint2", 2),
    (DataType::Int2, "int2", 2),
    (DataType::Float6E2M3, "float6e2m3", 6),
    (DataType::Float6E3M2, "float6e3m2", 6),
];

impl DataType {
    /// The type that ONNX numbers `code`, if there is one.
    pub fn from_code(code: i32) -> Option<DataType> {
        let index = usize::try_from(code).ok()?.checked_sub(1)?;
        DATA_TYPES.get(index).map(|entry| entry.0)
    }

    /// The number ONNX gives this type.
    pub fn code(self) -> i32 {
        self as i32
    }

    /// The name in the ONNX text form: `float`, `int64`, `bfloat16`.
    pub fn name(self) -> &'static str {
        DATA_TYPES[self as usize - 1].1
    }

    /// The type with this name in the ONNX text form.
    pub fn from_name(name: &str) -> Option<DataType> {
        DATA_TYPES.iter().find(|entry| entry.1 == name).map(|entry| entry.0)
    }

    /// Bits of one element; 0 for strings.
    pub fn bits(self) -> usize {
        DATA_TYPES[self as usize - 1].2
    }

    /// Bytes that `elements` of this type take, packed; `None` for strings and on overflow.
    pub fn byte_len(self, elements: usize) -> Option<usize> {
        match self.bits() {
            0 => None,
            bits => elements.checked_mul(bits)?.checked_add(7).map(|total| total / 8),
        }
    }

    /// Whether elements are real floating-point numbers (of any width).
    pub fn is_float(self) -> bool {
        use DataType::*;
        matches!(
            self,
            Float
                | Float16
                | Double
                | Bfloat16
                | Float8E4M3FN
                | Float8E4M3FNUZ
                | Float8E5M2
                | Float8E5M2FNUZ
                | Float4E2M1
                | Float8E8M0
                | Float6E2M3
                | Float6E3M2
        )
    }

    /// Whether elements are whole numbers (of any width, signed or not; booleans are not).
    pub fn is_integer(self) -> bool {
        use DataType::*;
        matches!(self, Uint8 | Int8 | Uint16 | Int16 | Int32 | Int64 | Uint32 | Uint64 | Uint4 | Int4 | Uint2 | Int2)
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One dimension of a shape as the file states it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A known size.
    Known(i64),
    /// A size that is only named; equal names within a model mean equal sizes. A name of digits is that number.
    Symbol(String),
    /// Nothing is said.
    Unknown,
}

impl Dim {
    /// The size, if it is known. Some exporters write `32` as a name; the file then keeps it as it is.
    pub fn known(&self) -> Option<i64> {
        match self {
            Dim::Known(size) => Some(*size),
            Dim::Symbol(name) if name.bytes().all(|b| b.is_ascii_digit()) => name.parse().ok(),
            _ => None,
        }
    }

    /// The name of a size that is not known.
    pub fn name(&self) -> Option<&str> {
        match self {
            Dim::Symbol(name) if self.known().is_none() => Some(name),
            _ => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(size) => write!(f, "{size}"),
            Dim::Symbol(name) => f.write_str(name),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// The dimensions of a tensor; the denotations ("DATA_BATCH") are kept for the file only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Shape {
    /// One entry per axis.
    pub dims: Vec<Dim>,
    /// Empty, or one denotation per axis.
    pub denotations: Vec<String>,
}

impl Shape {
    /// A shape with these dimensions and no denotations.
    pub fn new(dims: Vec<Dim>) -> Shape {
        Shape { dims, denotations: Vec::new() }
    }

    /// A shape whose sizes are all known.
    pub fn known(sizes: &[usize]) -> Shape {
        Shape::new(sizes.iter().map(|&size| Dim::Known(size as i64)).collect())
    }

    /// All sizes, if every one of them is known.
    pub fn sizes(&self) -> Option<Vec<i64>> {
        self.dims.iter().map(Dim::known).collect()
    }
}

/// What a value holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TypeKind {
    /// A tensor; `elem` is `None` where the file names no element type.
    Tensor {
        /// The element type.
        elem: Option<DataType>,
        /// The dimensions; `None` when even their number is unknown.
        shape: Option<Shape>,
    },
    /// A sparse tensor.
    SparseTensor {
        /// The element type.
        elem: Option<DataType>,
        /// The dimensions.
        shape: Option<Shape>,
    },
    /// A sequence of values of one type.
    Sequence(Box<Type>),
    /// A value that may be absent.
    Optional(Box<Type>),
    /// A dictionary.
    Map {
        /// The key type: an integer or string.
        key: DataType,
        /// The type of the values.
        value: Box<Type>,
    },
    /// A type known only to its domain.
    Opaque {
        /// The domain that defines it.
        domain: String,
        /// Its name there.
        name: String,
    },
    /// The file states a type without saying which.
    Unstated,
}

/// The type of a value, with its denotation ("IMAGE"), which is kept for the file only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Type {
    /// What the value holds.
    pub kind: TypeKind,
    /// The standard denotation; usually empty.
    pub denotation: String,
}

impl From<TypeKind> for Type {
    fn from(kind: TypeKind) -> Type {
        Type { kind, denotation: String::new() }
    }
}

impl Type {
    /// A tensor of `elem` with these dimensions.
    pub fn tensor(elem: DataType, dims: Vec<Dim>) -> Type {
        TypeKind::Tensor { elem: Some(elem), shape: Some(Shape::new(dims)) }.into()
    }

    /// A tensor of `elem` with an unknown number of axes.
    pub fn unshaped(elem: DataType) -> Type {
        TypeKind::Tensor { elem: Some(elem), shape: None }.into()
    }

    /// The element type, if this is a tensor that states one.
    pub fn elem(&self) -> Option<DataType> {
        match &self.kind {
            TypeKind::Tensor { elem, .. } => *elem,
            _ => None,
        }
    }

    /// The shape, if this is a tensor that states one.
    pub fn shape(&self) -> Option<&Shape> {
        match &self.kind {
            TypeKind::Tensor { shape, .. } => shape.as_ref(),
            _ => None,
        }
    }
}
