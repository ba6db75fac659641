//! The ONNX file format: protobuf messages, reading and writing. Nothing outside this folder sees a message.

mod convert;
mod external;
mod message;
mod proto;
mod read;
mod read_error;
mod scan;
mod write;

#[cfg(test)]
mod tests;

pub use external::ExternalError;
pub use read::Loaded;
pub use read_error::ReadError;
pub use write::{External, Staged, WriteError, WriteOptions, Written, remove_staged, remove_staged_of};
