//! Joins the program to whatever runs models: found at the first use, in a child process of the same executable.

use crate::{RunOptions, remote::Remote};
use anyhow::Context as _;
use lathe_analysis::{Evaluate, EvaluateError};
use lathe_ir::{Model, Tensor};
use lathe_runtime::{
    BenchInputs, BenchResult, BenchTask, Child, ChosenSamples, Claim, CollectOptions, ContentIds, Inputs, KeptResults,
    LibrarySearch, Limits, LoadOptions, Measured, ModelOn, Request, SetSpec, Statistics, StatisticsError, Verdict,
};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// The hidden subcommand under which the program serves runs to its parent.
pub(crate) const SERVE: &str = "__serve";

/// The process that this library is part of, where that is not the `optimize` program: a Python interpreter.
#[derive(Debug, Clone)]
pub struct Host {
    /// The program that runs models for this one, and what it is called with before the hidden subcommand.
    pub worker: (PathBuf, Vec<OsString>),
    /// The folder that takes the place of the executable's where libraries are looked for.
    pub folder: PathBuf,
    /// Folders of ONNX Runtime libraries that the host knows of.
    pub packages: Vec<PathBuf>,
    /// The interpreter whose pip installs ONNX Runtime.
    pub python: PathBuf,
}

static HOST: OnceLock<Host> = OnceLock::new();

/// Tells once, before anything else is called, which process this library is part of; later calls change nothing.
pub fn set_host(host: Host) {
    HOST.get_or_init(|| host);
}

/// The interpreter that has pip.
pub(crate) fn python() -> PathBuf {
    HOST.get().map_or_else(|| PathBuf::from("python3"), |host| host.python.clone())
}

/// Where ONNX Runtime may be: the command line, the environment, beside the program, the data folder, Python, the system.
pub(crate) fn search(library: Option<PathBuf>) -> LibrarySearch {
    LibrarySearch {
        explicit: library,
        variable: std::env::var_os("ORT_DYLIB_PATH").filter(|v| !v.is_empty()).map(PathBuf::from),
        executable_dir: match HOST.get() {
            Some(host) => Some(host.folder.clone()),
            None => std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)),
        },
        data_dir: data_dir(),
        packages: HOST.get().map(|host| host.packages.clone()).unwrap_or_default(),
        environments: [std::env::var_os("VIRTUAL_ENV").map(PathBuf::from), Some(PathBuf::from(".venv"))]
            .into_iter()
            .flatten()
            .collect(),
        pythons: vec![PathBuf::from("python3")],
        system_dirs: LibrarySearch::usual_system_dirs(),
    }
}

/// The user's data folder of this program.
pub(crate) fn data_dir() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else {
        variable("XDG_DATA_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/share")))
    };
    base.map(|base| base.join("onnx-lathe"))
}

/// Bytes of sessions that may stay loaded: a quarter of what runs may take, or of the machine's memory.
fn kept_bytes(memory: Option<u64>) -> u64 {
    memory.map_or_else(lathe_runtime::quarter_of_memory, |limit| limit / 4)
}

/// Runs models in a child process that is started when the first one is asked for.
pub(crate) struct Runner {
    child: Child,
    load: LoadOptions,
    store: Option<PathBuf>,
    /// Whether the user named the store: nothing is removed there.
    named: bool,
}

/// Bytes that statistics, and other results, may take in the user's data folder.
const CACHE_LIMIT: u64 = 8 << 30;

/// What the program is: its version, and a hash of what it was built from.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-", env!("LATHE_SOURCES"));

/// The executable of this program; `None` where it is part of another process, or nobody knows.
pub(crate) fn own_program() -> Option<PathBuf> {
    if HOST.get().is_some() { None } else { std::env::current_exe().ok() }
}

impl Runner {
    /// Workers as the options ask for them.
    pub(crate) fn new(options: &RunOptions) -> anyhow::Result<Runner> {
        let runner = Runner::here(options)?;
        let Some(on) = &options.on else { return Ok(runner) };
        let (engine, _) = runner.child.hello()?;
        let remote = Remote::start(on, options, &engine)?;
        Ok(Runner { child: runner.child.carried_out_by(remote, VERSION)?, ..runner })
    }

    /// The same for a proof that was asked for: nothing is taken of what earlier runs kept.
    pub(crate) fn afresh(self) -> Runner {
        Runner { child: self.child.keeping_nothing(), ..self }
    }

    /// One worker of this machine, which nothing disturbs: for timing.
    pub(crate) fn alone(options: &RunOptions) -> anyhow::Result<Runner> {
        Runner::here(&RunOptions { jobs: 1, ..options.clone() })
    }

    fn here(options: &RunOptions) -> anyhow::Result<Runner> {
        let (program, mut arguments) = match (&options.worker, HOST.get()) {
            (Some(program), _) => (program.clone(), Vec::new()),
            (None, Some(host)) => host.worker.clone(),
            (None, None) => (std::env::current_exe().context("the program does not find itself")?, Vec::new()),
        };
        arguments.push(OsString::from(SERVE));
        // Workers share what there is.
        let workers = options.jobs.max(1) as u64;
        let memory = options.memory.map(|memory| memory / workers);
        arguments.push(OsString::from((kept_bytes(options.memory) / workers).to_string()));
        arguments.extend(options.ort.clone().map(PathBuf::into_os_string));
        let limits = Limits { timeout: Some(options.timeout), memory };
        let mut child =
            Child::new(program, arguments, limits).of_workers(options.jobs).heard_by(options.progress.clone());
        let store = options.store.clone().or_else(data_dir);
        if let Some(store) = &options.store {
            child = child.writing_in(store.join("scratch"));
        }
        if let Some(store) = &store {
            let kept = KeptResults::new(store.join("kept"), VERSION);
            child = child.keeping(kept, ContentIds::kept_in(store.join("files")));
        }
        Ok(Runner { child, load: options.load.clone(), store, named: options.store.is_some() })
    }

    /// The folder where results are kept; `None` where the user has none.
    pub(crate) fn store(&self) -> Option<&Path> {
        self.store.as_deref()
    }

    /// Bytes of statistics that may be kept.
    pub(crate) fn statistics_limit(&self) -> u64 {
        if self.named { u64::MAX } else { CACHE_LIMIT }
    }

    /// Removes what was kept and not used for longest where it becomes much.
    pub(crate) fn tidy_store(&self) {
        if let Some(kept) = self.child.kept().filter(|_| !self.named) {
            kept.limit(CACHE_LIMIT);
        }
    }

    /// The process that runs models.
    pub(crate) fn child(&self) -> &Child {
        &self.child
    }

    /// Runs two model files on the same inputs and compares what they give.
    pub(crate) fn compare(
        &self,
        reference: &Path,
        candidate: &Path,
        inputs: &Inputs,
        claim: Claim,
    ) -> anyhow::Result<Verdict> {
        let on = |path| ModelOn { path, options: &self.load };
        Ok(self.child.verify(on(reference), on(candidate), inputs, claim)?)
    }

    /// The same on the CPU, whatever the provider: for models that are made to be looked at, not to be deployed. Providers may
    /// compute infinities and constants otherwise.
    pub(crate) fn compare_on_cpu(
        &self,
        reference: &Path,
        candidate: &Path,
        inputs: &Inputs,
        claim: Claim,
    ) -> anyhow::Result<Verdict> {
        let options = LoadOptions { provider: "cpu".to_owned(), device: 0, ..self.load.clone() };
        let on = |path| ModelOn { path, options: &options };
        Ok(self.child.verify(on(reference), on(candidate), inputs, claim)?)
    }

    /// Times one or two model files.
    pub(crate) fn bench(
        &self,
        models: &[PathBuf],
        inputs: &BenchInputs,
        task: BenchTask,
    ) -> anyhow::Result<BenchResult> {
        Ok(self.child.bench(models, inputs, task, &self.load)?)
    }

    /// Collects statistics of values inside a model.
    pub(crate) fn collect(
        &self,
        model: &Model,
        set: &SetSpec,
        requests: &[Request],
        options: &CollectOptions,
    ) -> Result<Statistics, StatisticsError> {
        Statistics::collect(&self.child, model, set, requests, options)
    }

    /// Runs two model files on a set and measures what the second loses.
    pub(crate) fn measure(
        &self,
        reference: &Path,
        candidate: &Path,
        set: &SetSpec,
        metric: &str,
    ) -> anyhow::Result<Result<Measured, Verdict>> {
        Ok(self.child.measure(reference, candidate, set, metric, &self.load)?)
    }
}

impl Runner {
    /// Chooses `count` samples of a calibration set.
    pub(crate) fn select(&self, model: &Path, set: &SetSpec, count: usize, seed: u64) -> anyhow::Result<ChosenSamples> {
        let chosen = self.child.select(model, set, count, seed, &self.load);
        chosen.with_context(|| format!("no samples of `{}` can be chosen", set.path.display()))
    }
}

impl Evaluate for Runner {
    fn run(&self, model: &Model, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, EvaluateError> {
        Evaluate::run(&self.child, model, inputs)
    }

    fn name(&self) -> String {
        self.child.name()
    }
}
