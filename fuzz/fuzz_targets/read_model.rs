//! Any bytes are a model or an error; a model that was read can be checked, printed, written and read again.

#![no_main]

use bytes::Bytes;
use lathe_ir::{Model, text};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(loaded) = Model::from_bytes(Bytes::copy_from_slice(data)) else { return };
    let _ = loaded.model.check();
    let printed = text::print_full(&loaded.model);
    let again = Model::from_bytes(loaded.model.to_bytes().into()).expect("a model that was read can be read again");
    assert_eq!(text::print_full(&again.model), printed);
});
