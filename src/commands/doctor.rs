//! `optimize doctor`: which runtime is used, what it offers, and installing one.

use crate::{Failure, RunOptions, kernels, progress::Meter, runner, terminal::print};
use anyhow::anyhow;
use clap::Args;
use lathe_runtime::LoadOptions;
use std::{fmt::Write as _, path::PathBuf};

/// What to do.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The ONNX Runtime library to look at, or its folder.
    #[arg(long, value_name = "PATH")]
    ort: Option<PathBuf>,
    /// Fetch the pinned ONNX Runtime with pip into the data folder.
    #[arg(long)]
    install: bool,
    /// Fetch the one with the CUDA and TensorRT providers.
    #[arg(long, requires = "install")]
    gpu: bool,
    /// Measure which operators of ONNX Runtime's own domain are slower here than what they take the place of; later runs
    /// with --target ort for the same provider do not write those.
    #[arg(long, conflicts_with = "install")]
    kernels: bool,
    /// The execution provider to measure on.
    #[arg(long, value_name = "NAME", default_value = "cpu", requires = "kernels")]
    ep: String,
    /// Threads of a run; 0 leaves it to the runtime.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "kernels")]
    threads: usize,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    if args.install {
        let folder = runner::data_dir().ok_or_else(|| anyhow!("there is no data folder: HOME is not set"))?;
        let meter = Meter::new("fetching ONNX Runtime", false);
        let files = lathe_runtime::install(args.gpu, &folder, &runner::python())?;
        drop(meter);
        for file in files {
            print(&format!("installed {}\n", file.display()));
        }
    }
    if args.kernels {
        return measure(args);
    }
    let found = lathe_runtime::diagnose(&runner::search(args.ort.clone()));
    let mut out = String::new();
    match &found.library {
        Some(library) => {
            let _ = writeln!(out, "ONNX Runtime {}\n  {} ({})", library.version, library.path.display(), library.place);
            let _ = writeln!(out, "  execution providers: {}", library.providers.join(", "));
            for device in &library.devices {
                let _ = writeln!(out, "  device: {device}");
            }
        }
        None => {
            let _ = writeln!(out, "no ONNX Runtime; `optimize doctor --install` fetches one");
            // Where places were looked at, they are listed below.
            if let Some(problem) = found.problem.as_ref().filter(|_| found.tried.is_empty()) {
                let _ = writeln!(out, "  {problem}");
            }
        }
    }
    let embedded = if found.embedded { "built in, used where there is no ONNX Runtime" } else { "not built in" };
    let _ = writeln!(out, "embedded engine: {embedded}");
    if !found.tried.is_empty() {
        let _ = writeln!(out, "looked at:");
    }
    for tried in &found.tried {
        let _ = writeln!(out, "  {tried}");
    }
    print(&out);
    Ok(())
}

/// Measures the operators and prints one line for each.
fn measure(args: &DoctorArgs) -> Result<(), Failure> {
    let meter = Meter::new("timing", false);
    let options = RunOptions {
        ort: args.ort.clone(),
        load: LoadOptions {
            provider: args.ep.clone(),
            threads: args.threads,
            optimize: true,
            ..LoadOptions::default()
        },
        progress: meter.listener(),
        ..RunOptions::default()
    };
    let found = kernels::measure(&options)?;
    drop(meter);
    let mut out = String::new();
    for verdict in &found {
        let word = if verdict.is_slower() { "slower, not written" } else { "written" };
        let _ = writeln!(out, "{:34} {:5.2} of the time of the nodes: {word}", verdict.kernel, verdict.ratio);
    }
    print(&out);
    Ok(())
}
