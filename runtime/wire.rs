//! What travels between the program and its worker.

pub(crate) mod framing;
