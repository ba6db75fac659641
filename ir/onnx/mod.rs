//! The ONNX file format: protobuf messages, reading and writing.
