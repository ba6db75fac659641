//! The `optimize` program.
fn main() {}
