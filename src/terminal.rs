//! What the program says: data to standard output, talk to standard error.

use clap::Args;
use std::io::Write;

/// How much is said.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct TalkArgs {
    /// Say more: every pass and every refusal.
    #[arg(short, long, conflicts_with = "quiet")]
    pub verbose: bool,
    /// Say only what went wrong.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Data for standard output. A closed pipe ends the program quietly.
#[allow(clippy::print_stdout)] // The one place that prints data.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        lathe_ir::remove_staged();
        std::process::exit(1);
    }
}

/// Talk for standard error.
#[allow(clippy::print_stderr)] // The one place that talks.
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}
