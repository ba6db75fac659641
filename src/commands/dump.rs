//! `optimize dump`: a model in the ONNX text form.

use crate::{Failure, terminal::print};
use clap::Args;
use lathe_analysis::Facts;
use lathe_ir::text;
use std::path::PathBuf;

/// What to print.
#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// The model.
    model: PathBuf,
    /// Print every element of every constant and the types that the file states, so that the text is the whole model.
    #[arg(long)]
    full: bool,
}

pub(crate) fn run(args: &DumpArgs) -> Result<(), Failure> {
    let mut model = super::read(&args.model)?.model;
    if args.full {
        print(&text::print_full(&model));
        return Ok(());
    }
    // Comments say what is known of each value; what the file says is often less, and older than the graph.
    let facts = Facts::infer(&model);
    for id in model.graph.all_nodes() {
        for value in model.graph.node(id).outputs().to_vec().into_iter().flatten() {
            if let Some(ty) = facts.described(&model.graph, value).filter(|_| !model.graph.is_output(value)) {
                model.graph.value_mut(value).ty = Some(ty);
            }
        }
    }
    print(&text::print(&model));
    Ok(())
}
