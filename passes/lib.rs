//! Part of onnx-lathe.
