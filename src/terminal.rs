//! What the program says: data to standard output, talk to standard error.

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use clap::Args;
use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
};

/// How lines begin that stand out on a terminal.
const MARKS: [(&str, Style); 4] = [
    ("error: ", AnsiColor::Red.on_default().bold()),
    ("warning: ", AnsiColor::Yellow.on_default().bold()),
    ("note: ", AnsiColor::Cyan.on_default().bold()),
    ("verified ", AnsiColor::Green.on_default().bold()),
];

/// How much is said.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct TalkArgs {
    /// Say more: every pass and every refusal.
    #[arg(short, long, conflicts_with = "quiet")]
    pub verbose: bool,
    /// Say only what went wrong.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Whether data was printed.
static PRINTED: AtomicBool = AtomicBool::new(false);

/// Whether [`print`] has printed anything.
pub(crate) fn has_printed() -> bool {
    PRINTED.load(Ordering::Relaxed)
}

/// Data for standard output. A closed pipe ends the program quietly.
#[allow(clippy::print_stdout)] // The one place that prints data.
pub(crate) fn print(text: &str) {
    PRINTED.store(true, Ordering::Relaxed);
    let choice = AutoStream::choice(&std::io::stdout());
    let text = marked(text, choice);
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        lathe_ir::remove_staged();
        std::process::exit(1);
    }
}

/// Talk for standard error.
#[allow(clippy::print_stderr)] // The one place that talks.
pub(crate) fn say(text: &str) {
    eprintln!("{}", marked(text, AutoStream::choice(&std::io::stderr())));
}

/// The text with its marks in colour where the stream takes colour: a terminal, unless `NO_COLOR` is set.
fn marked(text: &str, choice: ColorChoice) -> String {
    if choice == ColorChoice::Never {
        return text.to_owned();
    }
    let line = |line: &str| {
        let mark = MARKS.iter().find(|(mark, _)| line.starts_with(mark));
        mark.map_or_else(|| line.to_owned(), |(mark, style)| format!("{style}{mark}{style:#}{}", &line[mark.len()..]))
    };
    text.split_inclusive('\n').map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_coloured_where_a_terminal_takes_colour() {
        let text = "size\nverified against the original\nwrote out.onnx\n";
        assert_eq!(marked(text, ColorChoice::Never), text);
        let coloured = marked(text, ColorChoice::Always);
        assert_eq!(coloured.matches("\x1b[").count(), 3, "{coloured:?}");
        assert!(coloured.starts_with("size\n\x1b[") && coloured.ends_with("against the original\nwrote out.onnx\n"));
    }
}
