//! `optimize dump`: a model in the ONNX text form.

use crate::{Failure, cli::print};
use clap::Args;
use lathe_ir::text;
use std::path::PathBuf;

/// What to print.
#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// The model.
    model: PathBuf,
    /// Print every element of every constant, so that the text is the whole model.
    #[arg(long)]
    full: bool,
}

pub(crate) fn run(args: &DumpArgs) -> Result<(), Failure> {
    let model = super::read(&args.model)?.model;
    print(&if args.full { text::print_full(&model) } else { text::print(&model) });
    Ok(())
}
