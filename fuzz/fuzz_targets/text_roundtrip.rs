//! Any text is a model or an error; the full text of a model is read back as the same model.

#![no_main]

use lathe_ir::text;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| {
    let Ok(model) = text::parse(data) else { return };
    let _ = model.check();
    let _ = text::print(&model);
    let printed = text::print_full(&model);
    let again = text::parse(&printed).expect("printed text can be parsed");
    assert_eq!(text::print_full(&again), printed);
    assert_eq!(again.to_bytes(), model.to_bytes());
});
