//! What the rest of the program knows about an engine: it loads a model and runs it on named tensors.

use crate::{Datum, Sample};
use lathe_analysis::EvaluateError;
use lathe_ir::Tensor;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Where a model comes from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A serialized model with everything inline.
    Bytes(&'a [u8]),
    /// A file, whose external data lies beside it.
    Path(&'a Path),
}

/// A model on disk, and how it is run.
#[derive(Debug, Clone, Copy)]
pub struct ModelOn<'a> {
    /// The file.
    pub path: &'a Path,
    /// The provider and the rest of how it is loaded.
    pub options: &'a LoadOptions,
}

/// How a model is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadOptions {
    /// Whether the engine may rewrite the graph for speed. Off where a result is held to its original: a rewrite of the
    /// runtime would hide or invent differences. On where it is measured what is lost, and how fast that is: as it will run.
    pub optimize: bool,
    /// Threads inside one operator; 0 leaves the choice to the engine.
    pub threads: usize,
    /// The execution provider: `cpu`, `cuda`.
    pub provider: String,
    /// Which of the provider's devices.
    pub device: i32,
    /// Whether idle threads spin: faster when timing, a waste otherwise.
    pub spin: bool,
    /// Whether the engine saves memory at the cost of time: no packed copies of weights, no pool of freed tensors.
    pub lean: bool,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { optimize: false, threads: 0, provider: "cpu".to_owned(), device: 0, spin: false, lean: false }
    }
}

/// Why a model could not be loaded or run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    /// There is nothing to run models with.
    #[error(
        "no usable ONNX Runtime was found; `pip install onnxruntime` or `optimize doctor --install` fetches one, --ort or \
         ORT_DYLIB_PATH names one; tried {}",
        places(.tried)
    )]
    NoLibrary {
        /// Every place that was looked at and what was there.
        tried: Vec<String>,
    },
    /// The worker has nothing to run models with; it says why.
    #[error("{0}")]
    NoEngine(String),
    /// The work was called off.
    #[error("the work was called off")]
    Stopped,
    /// The library that was asked for cannot be used.
    #[error("cannot load ONNX Runtime from `{}`: {message}", .path.display())]
    Library {
        /// The library.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// The execution provider that was asked for is not there.
    #[error("{engine} has no execution provider `{provider}`; it has {available}")]
    Provider {
        /// The engine.
        engine: String,
        /// What was asked for.
        provider: String,
        /// What there is.
        available: String,
    },
    /// The execution provider that was asked for exists and cannot be used here.
    #[error("the execution provider `{provider}` cannot be used: {message}")]
    Unavailable {
        /// What was asked for.
        provider: String,
        /// What is missing.
        message: String,
    },
    /// The engine does not accept the model.
    #[error("{engine} refuses the model: {message}")]
    Load {
        /// The engine.
        engine: String,
        /// What it says.
        message: String,
    },
    /// The engine failed on these inputs.
    #[error("{engine} fails {}: {message}", .node.as_ref().map_or("to run the model".to_owned(), |n| format!("at node {n}")))]
    Run {
        /// The engine.
        engine: String,
        /// The node that failed, if the engine names it: "`layer1` (Gather)".
        node: Option<String>,
        /// What it says.
        message: String,
    },
    /// The device went away during a run, which says nothing about the model or its inputs.
    #[error(
        "the device was lost during a run ({engine}: {message}); a driver that stops or is reset does that, so run it again, \
         with less at a time (--batch, --input-shape), or on another device (--device)"
    )]
    DeviceLost {
        /// The engine.
        engine: String,
        /// What it says.
        message: String,
    },
    /// A value that this program cannot hand to the engine or take from it.
    #[error("{value} cannot be passed to or from {engine}: {message}")]
    Value {
        /// Which value.
        value: String,
        /// The engine.
        engine: String,
        /// Why.
        message: String,
    },
    /// The child process cannot be talked to.
    #[error("{0}")]
    Child(String),
    /// The child process ended, took too long or used too much memory.
    #[error("{message}")]
    Ended {
        /// What it was doing, in its own words.
        stage: String,
        /// How it ended.
        message: String,
        /// Whether another process ended it, which says nothing about what it was doing.
        killed: bool,
    },
}

/// What providers and drivers say of a device that is gone; every later run on it fails too.
const LOST: [&str; 8] = [
    "Device] is lost",
    "evice lost",
    "evice was lost",
    "DEVICE_LOST",
    "DEVICE_REMOVED",
    "DEVICE_HUNG",
    "an illegal memory access was encountered",
    "unspecified launch failure",
];

impl RuntimeError {
    /// Of a run that failed with this message, at a node if the engine names one.
    pub(crate) fn of_run(engine: &str, node: Option<String>, message: String) -> RuntimeError {
        let engine = engine.to_owned();
        match LOST.iter().any(|sign| message.contains(sign)) {
            true => RuntimeError::DeviceLost { engine, message },
            false => RuntimeError::Run { engine, node, message },
        }
    }
}

/// The places where something was found that cannot be used; all of them if there was nothing anywhere.
fn places(tried: &[String]) -> String {
    let nothing = |line: &&String| line.ends_with("(no library there)") || line.ends_with("(none known)");
    let unusable: Vec<&str> = tried.iter().filter(|line| !nothing(line)).map(String::as_str).collect();
    match tried.len() - unusable.len() {
        0 => unusable.join("; "),
        _ if unusable.is_empty() => tried.join("; "),
        others => format!("{}; and {others} places without a library", unusable.join("; ")),
    }
}

impl From<RuntimeError> for EvaluateError {
    fn from(error: RuntimeError) -> EvaluateError {
        EvaluateError { message: error.to_string() }
    }
}

/// A model that is ready to run.
pub trait Session {
    /// Runs on named inputs and returns the outputs in the model's order. Inputs with a default may be left out.
    fn run(&mut self, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Datum)>, RuntimeError>;

    /// Runs on named inputs and hands over one output after the other: for outputs that are large together.
    fn visit(
        &mut self,
        inputs: &[(String, Tensor)],
        take: &mut dyn FnMut(&str, Datum) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        self.run(inputs)?.into_iter().try_for_each(|(name, datum)| take(&name, datum))
    }
}

/// A model that is timed: its inputs are put in place once, and runs copy nothing to or from a device.
pub trait Timed {
    /// Puts inputs in place, in the memory of the provider; the time that copying them there took, `None` where they
    /// stay in host memory.
    fn bind(&mut self, inputs: &Sample) -> Result<Option<Duration>, RuntimeError>;

    /// Runs once and says how long it took.
    fn run(&mut self) -> Result<Duration, RuntimeError>;

    /// Copies the outputs of a run to host memory and says how long that took; `None` where they are there already.
    fn fetch(&mut self) -> Result<Option<Duration>, RuntimeError>;

    /// Whether runs copy values between a device and the host all the same, because its memory cannot be bound to.
    fn copies_in_run(&self) -> bool {
        false
    }

    /// Ends the profile that was asked for and returns where it is; `None` where there is none.
    fn profile(&mut self) -> Result<Option<PathBuf>, RuntimeError>;

    /// Why nodes were left to other providers, by their names, as far as the engine says so where it profiles.
    fn left_because(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// The name that nodes of the execution provider carry in a profile.
    fn provider(&self) -> &str;
}

/// Times any session, conversions of inputs and outputs included.
struct Plain {
    session: Box<dyn Session>,
    inputs: Sample,
}

impl Timed for Plain {
    fn bind(&mut self, inputs: &Sample) -> Result<Option<Duration>, RuntimeError> {
        self.inputs = inputs.clone();
        Ok(None)
    }

    fn run(&mut self) -> Result<Duration, RuntimeError> {
        let start = Instant::now();
        self.session.run(&self.inputs)?;
        Ok(start.elapsed())
    }

    fn fetch(&mut self) -> Result<Option<Duration>, RuntimeError> {
        Ok(None)
    }

    fn profile(&mut self) -> Result<Option<PathBuf>, RuntimeError> {
        Ok(None)
    }

    fn provider(&self) -> &str {
        "cpu"
    }
}

/// Something that loads models.
pub trait Engine: Send + Sync {
    /// Prepares a model for running.
    fn load(&self, source: Source<'_>, options: &LoadOptions) -> Result<Box<dyn Session>, RuntimeError>;

    /// Prepares a model for timing. With `profile`, a folder, every run is profiled there if the engine can.
    fn timed(
        &self,
        source: Source<'_>,
        options: &LoadOptions,
        _profile: Option<&Path>,
    ) -> Result<Box<dyn Timed>, RuntimeError> {
        Ok(Box::new(Plain { session: self.load(source, options)?, inputs: Sample::new() }))
    }

    /// Its name with its version: `ONNX Runtime 1.32.0`.
    fn name(&self) -> String;

    /// The execution providers it can be asked for: `cpu`, `cuda`.
    fn providers(&self) -> Vec<String>;
}
