//! `optimize completions` and `optimize man`: what shells and `man` know of the command line.

use crate::{Failure, terminal::print};
use anyhow::Context as _;
use clap::Args;
use clap_complete::Shell;
use clap_mangen::Man;
use std::path::PathBuf;

/// Which shell.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell that reads them.
    shell: Shell,
}

/// Where manual pages go.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write a page for every command to this folder; without it the page of the program is printed.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn completions(args: &CompletionsArgs, mut command: clap::Command) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "optimize", &mut script);
    print(&String::from_utf8_lossy(&script));
    Ok(())
}

pub(crate) fn man(args: &ManArgs, command: clap::Command) -> Result<(), Failure> {
    if let Some(folder) = &args.dir {
        return clap_mangen::generate_to(command, folder)
            .with_context(|| format!("cannot write manual pages to `{}`", folder.display()))
            .map_err(Failure::Error);
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page).context("a manual page cannot be made")?;
    print(&String::from_utf8_lossy(&page));
    Ok(())
}
