//! The ONNX textual syntax: the one notation in which graphs are written, in tests, snapshots and dumps.
//!
//! The syntax is that of `onnx.parser` and `onnx.printer`, with these additions:
//!
//! - Names that are no identifiers may be quoted wherever a name stands, also operators, domains and graph attributes.
//! - A bare graph is a model with `ir_version` 10 and operator set 21; domains that its nodes use are imported at 1.
//! - Lists of tensors, types and graphs are attribute values; so is a sparse tensor, written
//!   `sparse_tensor(float[4]) {float[2] {1, 2}, int64[2] {0, 3}}` (values, then indices), also as an initializer.
//! - `\xff` in a quoted string is one byte, and `nan(0x7fa00000)` is a NaN with these bits.
//! - Elements of float16 and bfloat16 tensors with a decimal point are numbers; without one they are codes, as in ONNX.
//! - `undefined` is the missing element type, `?` the missing type.
//!
//! Documentation, metadata, denotations, quantization annotations and device placements below the model's header have
//! no place in the syntax and are left out. So are the elements of a large tensor unless [`PrintOptions::full`] asks
//! for them; what stands for them, `["elements": "2359296", "hash": "9f31c2aa"]`, is valid syntax but holds no data,
//! and parsing it back is an error.

mod build;
mod literal;
mod parse;
mod print;
mod scan;
mod tree;

pub use build::parse;
pub use print::{PrintOptions, print, print_full, print_graph, print_with};
pub use scan::ParseError;

/// Words that begin a type besides the names of element types.
const TYPE_WORDS: &[&str] = &["seq", "map", "optional", "sparse_tensor", "opaque", "undefined"];

/// Whether `word` begins a type.
fn is_type_word(word: &str) -> bool {
    crate::DataType::from_name(word).is_some() || TYPE_WORDS.contains(&word)
}

/// Whether `word` is a float that is written in letters.
fn is_special_float(word: &str) -> bool {
    ["inf", "infinity", "nan"].iter().any(|special| word.eq_ignore_ascii_case(special))
}

/// The names of the attribute types; ONNX's number is the position.
const ATTRIBUTE_TYPES: &[&str] = &[
    "undefined",
    "float",
    "int",
    "string",
    "tensor",
    "graph",
    "floats",
    "ints",
    "strings",
    "tensors",
    "graphs",
    "sparse_tensor",
    "sparse_tensors",
    "type_proto",
    "type_protos",
];

#[cfg(test)]
mod tests;
