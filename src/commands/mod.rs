//! The subcommands, one file each, and what they share.

pub(crate) mod bench;
pub(crate) mod catalogue;
pub(crate) mod doctor;
pub(crate) mod dump;
pub(crate) mod inspect;
pub(crate) mod optimize;
pub(crate) mod sampler;
pub(crate) mod sets;
pub(crate) mod stats;
pub(crate) mod verify;

use crate::{
    Failure,
    cli::{RunArgs, print, say},
    runner::{self, RunnerOptions},
};
use lathe_ir::{Loaded, Model};
use lathe_runtime::{InputSpec, Listener, LoadOptions};
use std::{
    path::{Path, PathBuf},
    time::Duration,
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

/// Runs models for the parent process until it hangs up. `library` is the user's `--ort`.
pub(crate) fn serve(library: Option<PathBuf>) -> u8 {
    lathe_runtime::serve(runner::engine(&runner::search(library))).is_err().into()
}

/// Reads a model and names it in the error.
pub(crate) fn read(path: &Path) -> Result<Loaded, Failure> {
    let context = || format!("cannot use `{}`", path.display());
    anyhow::Context::with_context(Model::read(path), context).map_err(Failure::Error)
}

/// A time such as `90s`, `10m` or `2h`; seconds without a unit.
pub(crate) fn time(text: &str) -> Result<Duration, Failure> {
    let wrong = || Failure::Usage(format!("`{text}` is no time, expected a number with s, m, h or none"));
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit = match text[end..].trim() {
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

/// A size such as `512MB`, `1.5GiB` or `1024`, in bytes. Units count in powers of 1024, as memory does.
pub(crate) fn size(text: &str) -> Result<u64, Failure> {
    let wrong = || Failure::Usage(format!("`{text}` is no size, expected a number with KB, MB, GB or none"));
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..number_end].parse().map_err(|_| wrong())?;
    let unit = match text[number_end..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    Ok((number * unit as f64) as u64)
}

/// `NAME:1,3,224,224`.
fn input_shape(text: &str) -> Result<(String, Vec<usize>), Failure> {
    let wrong = || Failure::Usage(format!("`{text}` is no input shape, expected NAME:1,3,224,224"));
    let (name, sizes) = text.rsplit_once(':').ok_or_else(wrong)?;
    let sizes: Result<Vec<usize>, _> =
        sizes.split(',').filter(|s| !s.is_empty()).map(|s| s.trim().parse::<usize>()).collect();
    Ok((name.to_owned(), sizes.map_err(|_| wrong())?))
}

pub(crate) fn input_spec(args: &RunArgs) -> Result<InputSpec, Failure> {
    let shapes: Result<Vec<_>, Failure> = args.input_shape.iter().map(|s| input_shape(s)).collect();
    Ok(InputSpec { seed: args.seed, shapes: shapes? })
}

pub(crate) fn load_options(args: &RunArgs) -> LoadOptions {
    LoadOptions { threads: args.threads, provider: args.ep.clone(), device: args.device, ..LoadOptions::default() }
}

pub(crate) fn runner_options(args: &RunArgs, progress: Listener) -> Result<RunnerOptions, Failure> {
    Ok(RunnerOptions {
        library: args.ort.clone(),
        load: load_options(args),
        timeout: Duration::from_secs(args.timeout),
        memory: args.memory.as_deref().map(size).transpose()?,
        worker: None,
        progress,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes() {
        assert_eq!(size("512MB").unwrap(), 512 << 20);
        assert_eq!(size("1.5 gib").unwrap(), 3 << 29);
        assert_eq!(size("7").unwrap(), 7);
        assert!(size("much").is_err());
    }

    #[test]
    fn reads_input_shapes() {
        assert_eq!(input_shape("a:b:1,3").unwrap(), ("a:b".to_owned(), vec![1, 3]));
        assert_eq!(input_shape("x:").unwrap(), ("x".to_owned(), vec![]));
        assert!(input_shape("1,3").is_err());
    }
}
