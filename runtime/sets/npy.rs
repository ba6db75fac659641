//! The header of a `.npy` array.
//!
//! Only the form that NumPy itself writes is read: a flat dictionary of `descr`, `fortran_order` and `shape`. A parser of
//! whole Python literals would have to bound its recursion on hostile input, for headers that are refused anyway.

use lathe_ir::{DataType, element_count};
use std::io::{self, Read};

/// No real header is longer; the format would allow 4 GiB.
const LONGEST: usize = 1 << 16;

/// What the elements of an array are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elements {
    /// Numbers or booleans; `swapped` if they are big-endian.
    Plain { dtype: DataType, swapped: bool },
    /// Bytes without a type: how NumPy stores the types it does not know, such as bfloat16.
    Raw { width: usize },
    /// Strings of a fixed width: UTF-32 characters, or bytes.
    Text { width: usize, unicode: bool, swapped: bool },
}

impl Elements {
    /// Bytes of one element.
    pub(super) fn width(self) -> usize {
        match self {
            Elements::Plain { dtype, .. } => dtype.bits() / 8,
            Elements::Raw { width } => width,
            Elements::Text { width, unicode, .. } => width * if unicode { 4 } else { 1 },
        }
    }

    /// Whether these elements can be read as `dtype`.
    pub(super) fn is(self, dtype: DataType) -> bool {
        use DataType::*;
        match self {
            Elements::Plain { dtype: found, .. } => found == dtype,
            Elements::Raw { width } => {
                let unknown_to_numpy = matches!(
                    dtype,
                    Bfloat16 | Float8E4M3FN | Float8E4M3FNUZ | Float8E5M2 | Float8E5M2FNUZ | Float8E8M0
                );
                unknown_to_numpy && dtype.bits() == width * 8
            }
            Elements::Text { .. } => dtype == String,
        }
    }

    /// For messages.
    pub(super) fn describe(self) -> String {
        match self {
            Elements::Plain { dtype, .. } => dtype.to_string(),
            Elements::Raw { width } => format!("raw elements of {width} bytes"),
            Elements::Text { .. } => "string".to_owned(),
        }
    }
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) elements: Elements,
    pub(super) shape: Vec<usize>,
    /// Whether the first axis varies fastest, where that makes a difference.
    pub(super) fortran: bool,
    /// Bytes before the data.
    pub(super) length: u64,
    /// Bytes of data.
    pub(super) data_bytes: u64,
}

/// Why a header cannot be used.
#[derive(Debug)]
pub(super) enum HeaderError {
    Io(io::Error),
    Pickle,
    Bad(String),
}

impl Header {
    /// Reads a header and leaves `input` at the first byte of data.
    pub(super) fn read(input: &mut dyn Read) -> Result<Header, HeaderError> {
        let bad = |message: &str| HeaderError::Bad(message.to_owned());
        let mut exactly = |length: usize| {
            let mut bytes = vec![0; length];
            input.read_exact(&mut bytes).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => HeaderError::Bad("it ends inside its header".to_owned()),
                _ => HeaderError::Io(e),
            })?;
            Ok(bytes)
        };
        let start = exactly(8)?;
        if start[..6] != *b"\x93NUMPY" {
            // A bare pickle begins with the opcode of its protocol.
            return Err(if start[0] == 0x80 { HeaderError::Pickle } else { bad("it does not begin as a .npy array") });
        }
        let (before, text) = match start[6] {
            1 => (10, exactly(2)?),
            2 | 3 => (12, exactly(4)?),
            other => return Err(HeaderError::Bad(format!("its format version is {other}, expected 1 to 3"))),
        };
        let text = text.iter().rev().fold(0usize, |length, &byte| length << 8 | usize::from(byte));
        if text > LONGEST {
            return Err(HeaderError::Bad(format!("its header has {text} bytes, expected at most {LONGEST}")));
        }
        let header = exactly(text)?;
        let header = str::from_utf8(&header).map_err(|_| bad("its header is not text"))?;
        let (elements, fortran, shape) = dictionary(header)?;
        let count = element_count(&shape).and_then(|count| count.checked_mul(elements.width()));
        let data_bytes = count.ok_or_else(|| HeaderError::Bad(format!("its shape {shape:?} overflows")))? as u64;
        let fortran = fortran && shape.iter().filter(|&&size| size > 1).count() > 1;
        Ok(Header { elements, shape, fortran, length: (before + text) as u64, data_bytes })
    }
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, with the keys in any order.
fn dictionary(text: &str) -> Result<(Elements, bool, Vec<usize>), HeaderError> {
    let bad = || HeaderError::Bad(format!("its header is `{}`, which is not understood", text.trim()));
    let mut rest = text.trim().strip_prefix('{').and_then(|t| t.strip_suffix('}')).ok_or_else(bad)?.trim();
    let (mut elements, mut fortran, mut shape) = (None, None, None);
    while !rest.is_empty() {
        let (key, after) = quoted(rest).ok_or_else(bad)?;
        let value = after.trim_start().strip_prefix(':').ok_or_else(bad)?.trim_start();
        rest = match key {
            "descr" => {
                let (descr, after) = quoted(value).ok_or_else(|| {
                    HeaderError::Bad("its elements are records, expected one number per element".to_owned())
                })?;
                elements = Some(elements_of(descr)?);
                after
            }
            "fortran_order" => {
                let (flag, after) = match value.strip_prefix("True") {
                    Some(after) => (true, after),
                    None => (false, value.strip_prefix("False").ok_or_else(bad)?),
                };
                fortran = Some(flag);
                after
            }
            "shape" => {
                let (sizes, after) = value.strip_prefix('(').and_then(|v| v.split_once(')')).ok_or_else(bad)?;
                let sizes = sizes.split(',').map(str::trim).filter(|s| !s.is_empty());
                // Python 2 wrote long integers with an L.
                let sizes: Result<_, _> = sizes.map(|s| s.trim_end_matches('L').parse::<usize>()).collect();
                shape = Some(sizes.map_err(|_| bad())?);
                after
            }
            _ => return Err(bad()),
        };
        rest = rest.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    elements.zip(fortran).zip(shape).map(|((e, f), s)| (e, f, s)).ok_or_else(bad)
}

/// A quoted string at the start, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote)
}

fn elements_of(descr: &str) -> Result<Elements, HeaderError> {
    use DataType::*;
    let unusable = || HeaderError::Bad(format!("its elements are of NumPy type `{descr}`, which no model takes"));
    let (order, kind) = match descr.chars().next() {
        Some(order @ ('<' | '>' | '|' | '=')) => (order, &descr[1..]),
        _ => ('=', descr),
    };
    let swapped = order == '>';
    let plain = |dtype: DataType| Elements::Plain { dtype, swapped: swapped && dtype.bits() > 8 };
    if kind.starts_with('O') {
        return Err(HeaderError::Pickle);
    }
    Ok(match kind {
        "b1" | "?" => plain(Bool),
        "i1" => plain(Int8),
        "i2" => plain(Int16),
        "i4" => plain(Int32),
        "i8" => plain(Int64),
        "u1" => plain(Uint8),
        "u2" => plain(Uint16),
        "u4" => plain(Uint32),
        "u8" => plain(Uint64),
        "f2" => plain(Float16),
        "f4" => plain(Float),
        "f8" => plain(Double),
        _ => {
            let mut letters = kind.chars();
            let letter = letters.next().ok_or_else(unusable)?;
            let width: usize = letters.as_str().parse().map_err(|_| unusable())?;
            // Bounded so that four bytes per character do not overflow.
            let width = Some(width).filter(|&w| w < 1 << 24).ok_or_else(unusable)?;
            match letter {
                'V' if width > 0 => Elements::Raw { width },
                'U' => Elements::Text { width, unicode: true, swapped },
                'S' => Elements::Text { width, unicode: false, swapped: false },
                _ => return Err(unusable()),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, text: &str) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        match version {
            1 => bytes.extend((text.len() as u16).to_le_bytes()),
            _ => bytes.extend((text.len() as u32).to_le_bytes()),
        }
        bytes.extend(text.as_bytes());
        bytes
    }

    fn read(text: &str) -> Result<Header, HeaderError> {
        Header::read(&mut &file(1, text)[..])
    }

    fn message(text: &str) -> String {
        match read(text).unwrap_err() {
            HeaderError::Bad(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reads_what_numpy_writes() {
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }      \n";
        for version in [1, 2, 3] {
            let header = Header::read(&mut &file(version, text)[..]).unwrap();
            assert_eq!(header.elements, Elements::Plain { dtype: DataType::Float, swapped: false });
            assert_eq!((header.shape, header.fortran, header.data_bytes), (vec![3, 4], false, 48));
            assert_eq!(header.length as usize, file(version, text).len());
        }
        let scalar = read("{'descr': '|u1', 'fortran_order': False, 'shape': (), }").unwrap();
        assert_eq!((scalar.shape, scalar.data_bytes), (vec![], 1));
        let vector = read("{'shape': (5L,), 'fortran_order': True, 'descr': '>i8'}").unwrap();
        assert_eq!((vector.shape, vector.fortran), (vec![5], false));
        assert_eq!(vector.elements, Elements::Plain { dtype: DataType::Int64, swapped: true });
        let raw = read("{'descr': '|V2', 'fortran_order': False, 'shape': (1,), }").unwrap();
        assert!(raw.elements.is(DataType::Bfloat16) && !raw.elements.is(DataType::Float16));
        assert!(read("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 4), }").unwrap().fortran);
    }

    #[test]
    fn objects_and_pickles_are_refused() {
        let object = read("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }");
        assert!(matches!(object, Err(HeaderError::Pickle)));
        assert!(matches!(Header::read(&mut &b"\x80\x04\x95\x00\x00\x00\x00\x00\x00"[..]), Err(HeaderError::Pickle)));
    }

    #[test]
    fn hostile_headers_are_errors() {
        assert!(message("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }").contains("records"));
        assert!(message("{'descr': '<c8', 'fortran_order': False, 'shape': (3,), }").contains("`<c8`"));
        let huge = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({0}, {0}), }}", usize::MAX);
        assert!(message(&huge).contains("overflows"));
        assert!(message("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }").contains("not understood"));
        assert!(message(&"{".repeat(60000)).contains("not understood"));
        assert!(message("{'descr': '<f4'}").contains("not understood"));
        let mut long = file(2, "{}");
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Header::read(&mut &long[..]), Err(HeaderError::Bad(m)) if m.contains("at most")));
        assert!(matches!(Header::read(&mut &b"\x93NUM"[..]), Err(HeaderError::Bad(m)) if m.contains("ends inside")));
        assert!(matches!(Header::read(&mut &b"PK\x03\x04aaaaaaa"[..]), Err(HeaderError::Bad(_))));
    }
}
