//! Types and tensors of the text form.

use super::scan::{Number, Parsed, Scanner};
use crate::{DataType, Dim, Initializer, Shape, SparseTensor, Tensor, Type, TypeKind, element_count};
use bytes::Bytes;
use half::{bf16, f16};

impl Scanner<'_> {
    /// Whether a type stands at the cursor.
    pub fn at_type(&mut self) -> bool {
        self.peek() == Some(b'?') || self.peek_identifier().is_some_and(super::is_type_word)
    }

    /// A type, if one stands at the cursor.
    pub fn optional_type(&mut self) -> Parsed<Option<Type>> {
        if self.at_type() { self.ty().map(Some) } else { Ok(None) }
    }

    pub fn ty(&mut self) -> Parsed<Type> {
        self.nested(|s| s.type_inside())
    }

    fn type_inside(&mut self) -> Parsed<Type> {
        if self.eat(b'?') {
            return Ok(TypeKind::Unstated.into());
        }
        self.skip();
        let at = self.at;
        let Some(word) = self.identifier() else {
            let found = self.found();
            return self.error(format!("expected a type, found {found}"));
        };
        let elem = DataType::from_name(word);
        if elem.is_some() || word == "undefined" {
            return Ok(TypeKind::Tensor { elem, shape: self.shape()? }.into());
        }
        if !super::is_type_word(word) {
            return self.error_at(at, format!("`{word}` is not a type"));
        }
        self.expect(b'(')?;
        let kind = match word {
            "seq" => TypeKind::Sequence(Box::new(self.ty()?)),
            "optional" => TypeKind::Optional(Box::new(self.ty()?)),
            "map" => {
                let key = self.identifier().and_then(DataType::from_name);
                let Some(key) = key else { return self.error("expected the element type of the keys") };
                self.expect(b',')?;
                TypeKind::Map { key, value: Box::new(self.ty()?) }
            }
            "sparse_tensor" => match self.ty()?.kind {
                TypeKind::Tensor { elem, shape } => TypeKind::SparseTensor { elem, shape },
                _ => return self.error_at(at, "a sparse tensor has an element type"),
            },
            _ => {
                let first = self.dotted()?;
                let (domain, name) = if self.eat(b',') { (first, self.dotted()?) } else { (String::new(), first) };
                TypeKind::Opaque { domain, name }
            }
        };
        self.expect(b')')?;
        Ok(kind.into())
    }

    /// Identifiers joined by points, or nothing; a quoted string stands for itself.
    fn dotted(&mut self) -> Parsed<String> {
        let mut name = self.optional_name()?.unwrap_or_default();
        while self.eat(b'.') {
            name.push('.');
            name.push_str(&self.name("a name")?);
        }
        Ok(name)
    }

    /// Nothing for a scalar, `[]` for an unknown number of axes, else the dimensions.
    fn shape(&mut self) -> Parsed<Option<Shape>> {
        let mut dims = Vec::new();
        if !self.eat(b'[') {
            return Ok(Some(Shape::new(dims)));
        }
        if self.eat(b']') {
            return Ok(None);
        }
        loop {
            dims.push(if self.eat(b'?') {
                Dim::Unknown
            } else if let Some(symbol) = self.optional_name()? {
                Dim::Symbol(symbol)
            } else {
                Dim::Known(self.integer()?)
            });
            if !self.eat(b',') {
                break;
            }
        }
        self.expect(b']')?;
        Ok(Some(Shape::new(dims)))
    }

    /// The data of a tensor whose type was read; `name` is for messages and may be empty.
    pub fn initializer(&mut self, ty: &Type, name: &str) -> Parsed<Initializer> {
        self.skip();
        let (TypeKind::Tensor { elem, shape } | TypeKind::SparseTensor { elem, shape }) = &ty.kind else {
            return self.error("only tensors can be written out");
        };
        let sizes = shape.as_ref().and_then(Shape::sizes).unwrap_or_else(|| vec![-1]);
        let dims: Option<Vec<usize>> = sizes.into_iter().map(|size| usize::try_from(size).ok()).collect();
        let (Some(dtype), Some(dims)) = (*elem, dims) else {
            return self.error("the data of a tensor needs an element type and a shape of known sizes");
        };
        if let TypeKind::Tensor { .. } = ty.kind {
            return self.tensor(dtype, dims, name).map(Initializer::Dense);
        }
        self.expect(b'{')?;
        let values = self.inner_tensor()?;
        self.expect(b',')?;
        let indices = self.inner_tensor()?;
        self.expect(b'}')?;
        Ok(Initializer::Sparse(SparseTensor { values, indices, dims }))
    }

    /// A tensor with its type, inside a sparse one.
    fn inner_tensor(&mut self) -> Parsed<Tensor> {
        let at = self.at;
        let ty = self.ty()?;
        self.eat(b'=');
        // Looked at before reading on: sparse tensors do not nest.
        if matches!(ty.kind, TypeKind::Tensor { .. })
            && let Initializer::Dense(tensor) = self.initializer(&ty, "")?
        {
            return Ok(tensor);
        }
        self.error_at(at, "expected a dense tensor")
    }

    fn tensor(&mut self, dtype: DataType, dims: Vec<usize>, name: &str) -> Parsed<Tensor> {
        self.skip();
        let start = self.at;
        let whose = if name.is_empty() { "of the tensor".to_owned() } else { format!("of `{name}`") };
        if self.eat(b'[') {
            let entries = self.entries()?;
            let abbreviated = entries.iter().any(|(key, _)| key == "elements");
            let why = if abbreviated { "are abbreviated, print the model in full" } else { "are not in the text" };
            return self.error_at(start, format!("the elements {whose} {why}"));
        }
        self.expect(b'{')?;
        let mut bytes = Vec::new();
        let mut strings = Vec::new();
        let mut count = 0;
        if !self.eat(b'}') {
            loop {
                if dtype == DataType::String {
                    strings.push(Bytes::from(self.bytes()?));
                } else {
                    let number = self.number()?;
                    self.element(dtype, number, &mut bytes)?;
                }
                count += 1;
                if !self.eat(b',') {
                    break;
                }
            }
            self.expect(b'}')?;
        }
        let complex = matches!(dtype, DataType::Complex64 | DataType::Complex128);
        let expected = element_count(&dims).and_then(|elements| elements.checked_mul(1 + usize::from(complex)));
        if expected != Some(count) {
            let expected = expected.map_or("too many".to_owned(), |expected| expected.to_string());
            return self
                .error_at(start, format!("the shape {whose} needs {expected} numbers or strings, found {count}"));
        }
        let tensor = match dtype {
            DataType::String => Tensor::strings(dims, strings),
            _ if dtype.bits() < 8 => Tensor::new(dtype, dims, pack(&bytes, dtype.bits())),
            _ => Tensor::new(dtype, dims, bytes),
        };
        tensor.or_else(|error| self.error_at(start, format!("the data {whose} is no tensor: {error}")))
    }

    /// `"key": "value"` pairs up to `]`.
    pub fn entries(&mut self) -> Parsed<Vec<(String, String)>> {
        let mut entries = Vec::new();
        if self.eat(b']') {
            return Ok(entries);
        }
        loop {
            let key = self.string()?;
            self.expect(b':')?;
            entries.push((key, self.string()?));
            if !self.eat(b',') {
                break;
            }
        }
        self.expect(b']')?;
        Ok(entries)
    }

    /// Appends one number: its bytes, or one byte with its code for types narrower than a byte.
    fn element(&self, dtype: DataType, number: Number<'_>, bytes: &mut Vec<u8>) -> Parsed<()> {
        use DataType::*;
        match dtype {
            Float | Complex64 => bytes.extend(self.float(number)?.to_le_bytes()),
            Double | Complex128 => bytes.extend(self.double(number)?.to_le_bytes()),
            Float16 if number.is_float => bytes.extend(f16::from_f64(self.double(number)?).to_le_bytes()),
            Bfloat16 if number.is_float => bytes.extend(bf16::from_f64(self.double(number)?).to_le_bytes()),
            _ => {
                let bits = dtype.bits();
                let signed = matches!(dtype, Int2 | Int4 | Int8 | Int16 | Int32 | Int64);
                let range = if signed { -(1i128 << (bits - 1))..1i128 << (bits - 1) } else { 0..1i128 << bits };
                let value = number.text.parse::<i128>().ok().filter(|value| range.contains(value));
                let Some(value) = value else {
                    return self.error_at(number.at, format!("`{}` is not an element of {dtype}", number.text));
                };
                let code = value & ((1i128 << bits) - 1);
                bytes.extend(&code.to_le_bytes()[..bits.div_ceil(8)]);
            }
        }
        Ok(())
    }
}

/// Codes of `bits` bits each, low bits first.
fn pack(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; (codes.len() * bits).div_ceil(8)];
    for (index, &code) in codes.iter().enumerate() {
        let at = index * bits;
        let pair = u16::from(code) << (at % 8);
        bytes[at / 8] |= pair as u8;
        if let Some(next) = bytes.get_mut(at / 8 + 1) {
            *next |= (pair >> 8) as u8;
        }
    }
    bytes
}
