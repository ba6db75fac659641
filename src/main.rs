//! The `optimize` program.

fn main() -> std::process::ExitCode {
    onnx_lathe::cli::main()
}
