//! `optimize doctor`: which runtime is used, what it offers, and installing one.

use crate::{Failure, cli::print, runner};
use anyhow::anyhow;
use clap::Args;
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
}

pub(crate) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    if args.install {
        let folder = runner::data_dir().ok_or_else(|| anyhow!("there is no data folder: HOME is not set"))?;
        let library = lathe_runtime::install(args.gpu, &folder).map_err(|e| anyhow!("{e}"))?;
        print(&format!("installed {}\n", library.display()));
    }
    let found = lathe_runtime::doctor(&runner::search(args.ort.clone()));
    let mut out = String::new();
    match (&found.library, &found.version) {
        (Some(library), Some(version)) => {
            let _ = writeln!(out, "ONNX Runtime {version}\n  {}", library.display());
            let _ = writeln!(out, "  execution providers: {}", found.providers.join(", "));
            for device in &found.devices {
                let _ = writeln!(out, "  device: {device}");
            }
        }
        _ => {
            let _ = writeln!(out, "no ONNX Runtime; `optimize doctor --install` fetches one");
            if let Some(error) = &found.error {
                let _ = writeln!(out, "  {error}");
            }
        }
    }
    let _ = writeln!(out, "embedded engine: {}", found.embedded.as_deref().unwrap_or("not built in"));
    let _ = writeln!(out, "looked at:");
    for tried in &found.tried {
        let _ = writeln!(out, "  {tried}");
    }
    print(&out);
    Ok(())
}
