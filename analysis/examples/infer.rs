//! Prints what is inferred about the outputs of model files: `cargo run --example infer -- MODEL...`.

#![allow(clippy::print_stdout)]

use lathe_analysis::Facts;
use lathe_ir::Model;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let model = Model::read(Path::new(&path))?.model;
        let facts = Facts::infer(&model);
        println!("{path}");
        for &value in model.graph.main().outputs() {
            let name = &model.graph.value(value).name;
            let elem = facts.elem(value).map_or("?", |e| e.name());
            println!("\t{name}\t{elem}\t{}", facts.shape(value).map_or("?".to_owned(), |shape| format!("{shape:?}")));
        }
    }
    Ok(())
}
