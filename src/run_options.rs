//! How models are run, in every command that runs some: a field of [`RunOptions`] and the argument that fills it.

use crate::{Failure, quantities::size, remote::On};
use anyhow::Context as _;
use clap::Args;
use lathe_runtime::{InputSpec, Listener, LoadOptions, Trace};
use serde::Serialize;
use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    str::FromStr as _,
    sync::Arc,
    time::Duration,
};

/// How models are run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The seed of whatever is random, and shapes of inputs.
    pub inputs: InputSpec,
    /// A library of ONNX Runtime to use, or its folder.
    pub ort: Option<PathBuf>,
    /// Execution provider, device and threads.
    pub load: LoadOptions,
    /// Time one run may take.
    pub timeout: Duration,
    /// Memory that runs may use, in bytes; `None` for no limit of ours.
    pub memory: Option<u64>,
    /// Workers that run models at a time.
    pub jobs: usize,
    /// The folder where results are kept for later runs; `None` for the user's data folder.
    pub store: Option<PathBuf>,
    /// Where tasks are carried out; `None` for workers of this program.
    pub on: Option<On>,
    /// The program that runs models for this one; `None` is this executable itself.
    pub worker: Option<PathBuf>,
    /// Who hears how far long work is.
    pub progress: Listener,
}

impl Default for RunOptions {
    fn default() -> RunOptions {
        RunOptions {
            inputs: InputSpec::default(),
            ort: None,
            load: LoadOptions::default(),
            timeout: Duration::from_secs(TIMEOUT_SECONDS),
            memory: None,
            jobs: 1,
            store: None,
            on: None,
            worker: None,
            progress: Listener::default(),
        }
    }
}

/// Seconds that one run may take unless told.
const TIMEOUT_SECONDS: u64 = 600;

/// The arguments behind [`RunOptions`].
#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Running models")]
pub(crate) struct RunArgs {
    /// Shape of an input in runs; may be given several times.
    #[arg(long, value_name = "NAME:1,3,224,224")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub input_shape: Vec<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub engine: EngineArgs,
    /// Seed of random inputs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    #[serde(flatten)]
    pub limits: LimitArgs,
}

/// What runs models.
#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Running models")]
pub(crate) struct EngineArgs {
    /// Execution provider.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub ep: String,
    /// Device of the execution provider.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub device: i32,
    /// Threads of a run; 0 leaves it to the runtime.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// The ONNX Runtime library to use, or its folder.
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ort: Option<PathBuf>,
}

/// What a run may take.
#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Running models")]
pub(crate) struct LimitArgs {
    /// Memory that runs may use (8GB).
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Seconds that one run may take.
    #[arg(long, value_name = "SECONDS", default_value_t = TIMEOUT_SECONDS)]
    pub timeout: u64,
    /// Workers that run models at a time, each with its own threads.
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    pub jobs: usize,
    /// The folder where results are kept for later runs, if not in the user's data folder.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<PathBuf>,
    /// Where models are run: `ray`, or `ray:ADDRESS` of a cluster, by as many workers as --jobs says.
    #[arg(long, value_name = "WHERE")]
    #[serde(skip)]
    pub on: Option<String>,
    /// Where to write what takes how long, for Perfetto or `chrome://tracing`.
    #[arg(long, value_name = "FILE.json")]
    #[serde(skip)]
    pub trace: Option<PathBuf>,
}

impl RunArgs {
    /// The options that these arguments ask for. `progress` hears how far the work is.
    pub(crate) fn options(&self, progress: Listener) -> Result<RunOptions, Failure> {
        let shapes = self.input_shape.iter().map(|text| input_shape(text)).collect::<Result<_, _>>()?;
        let inputs = InputSpec { seed: self.seed, shapes, sizes: Vec::new() };
        Ok(RunOptions { inputs, ..self.engine.options(&self.limits, progress)? })
    }
}

impl EngineArgs {
    /// Whether nothing was said.
    pub(crate) fn is_default(&self) -> bool {
        self.ep == "cpu" && self.device == 0 && self.threads == 0 && self.ort.is_none()
    }

    /// The options of a command that makes up no inputs.
    pub(crate) fn options(&self, limits: &LimitArgs, progress: Listener) -> Result<RunOptions, Failure> {
        let load = LoadOptions {
            threads: self.threads,
            provider: self.ep.clone(),
            device: self.device,
            ..LoadOptions::default()
        };
        let progress = match &limits.trace {
            None => progress,
            Some(path) => {
                let trace = Trace::create(path).with_context(|| format!("cannot write `{}`", path.display()))?;
                progress.traced_by(Arc::new(trace))
            }
        };
        if limits.jobs == 0 {
            return Err(Failure::Usage("--jobs is 0, expected at least 1".to_owned()));
        }
        if limits.on.is_some() && limits.store.is_none() {
            let message = "--on needs --store DIR, a folder that every worker sees under the same path";
            return Err(Failure::Usage(message.to_owned()));
        }
        if let Some(store) = &limits.store {
            usable(store).with_context(|| format!("the store `{}` cannot be used", store.display()))?;
        }
        Ok(RunOptions {
            jobs: limits.jobs,
            store: limits.store.clone(),
            on: limits.on.as_deref().map(On::from_str).transpose().map_err(Failure::Usage)?,
            ort: self.ort.clone(),
            load,
            timeout: Duration::from_secs(limits.timeout),
            memory: limits.memory.as_deref().map(size).transpose()?,
            progress,
            ..RunOptions::default()
        })
    }
}

impl LimitArgs {
    /// Whether nothing was said.
    pub(crate) fn is_default(&self) -> bool {
        let named = self.memory.is_some() || self.store.is_some() || self.on.is_some() || self.trace.is_some();
        !named && self.timeout == TIMEOUT_SECONDS && self.jobs == 1
    }
}

/// Makes a folder if need be and finds out whether files can be put into it.
fn usable(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    tempfile::Builder::new().prefix(".usable-").tempfile_in(folder)?.write_all(b"x")
}

/// `NAME:1,3,224,224`.
pub(crate) fn input_shape(text: &str) -> Result<(String, Vec<usize>), Failure> {
    let wrong = || Failure::Usage(format!("`{text}` is no input shape, expected NAME:1,3,224,224"));
    let (name, sizes) = text.rsplit_once(':').ok_or_else(wrong)?;
    let sizes: Result<Vec<usize>, _> =
        sizes.split(',').filter(|s| !s.is_empty()).map(|s| s.trim().parse::<usize>()).collect();
    Ok((name.to_owned(), sizes.map_err(|_| wrong())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_input_shapes() {
        assert_eq!(input_shape("a:b:1,3").unwrap(), ("a:b".to_owned(), vec![1, 3]));
        assert_eq!(input_shape("x:").unwrap(), ("x".to_owned(), vec![]));
        assert!(input_shape("1,3").is_err());
    }
}
