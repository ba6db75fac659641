//! The subcommands, one file each, and what they share.

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod catalogue;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod dump;
pub(crate) mod inspect;
pub(crate) mod optimize;
pub(crate) mod sampler;
pub(crate) mod sets;
pub(crate) mod shell;
pub(crate) mod stats;
pub(crate) mod verify;

use crate::{
    Failure, runner,
    terminal::{print, say},
};
use lathe_ir::{Loaded, Model};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// What a command found out.
#[derive(Debug, Clone)]
pub struct Answer {
    /// For programs; the names are a contract.
    pub json: serde_json::Value,
    /// For people.
    pub text: String,
    /// What was odd, one sentence each.
    pub notes: Vec<String>,
    /// Why the answer does not do, where two models were compared and differ: exit code 3.
    pub refused: Option<String>,
}

impl Answer {
    pub(crate) fn new(found: &impl serde::Serialize, text: String, notes: Vec<String>) -> Answer {
        let json = serde_json::to_value(found).expect("answers are names, texts and numbers");
        Answer { json, text, notes, refused: None }
    }

    /// Prints it as JSON or as text.
    pub(crate) fn show(&self, json: bool) {
        for note in &self.notes {
            say(&format!("note: {note}"));
        }
        if json {
            print(&format!("{}\n", serde_json::to_string_pretty(&self.json).expect("a JSON value has a text")));
        } else {
            print(&self.text);
        }
    }
}

/// Runs models for the parent process until it hangs up. `arguments` are those that [`runner::Runner`] gives: bytes of
/// sessions that may stay, and the user's `--ort`.
pub(crate) fn serve(arguments: &[OsString]) -> u8 {
    let keep = arguments.first().and_then(|text| text.to_str()?.parse().ok()).unwrap_or(0);
    let library = arguments.get(1).map(PathBuf::from);
    lathe_runtime::serve(lathe_runtime::start(&runner::search(library)), keep, runner::VERSION).is_err().into()
}

/// Reads a model and names it in the error.
pub(crate) fn read(path: &Path) -> Result<Loaded, Failure> {
    let context = || format!("cannot use `{}`", path.display());
    anyhow::Context::with_context(Model::read(path), context).map_err(Failure::Error)
}
