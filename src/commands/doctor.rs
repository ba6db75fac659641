//! `optimize doctor`: which runtime is used, what it offers, and installing one.

use crate::{
    Failure, RunOptions, kernels,
    progress::Meter,
    runner::{self, Runner},
    terminal::print,
};
use anyhow::anyhow;
use clap::{Args, ValueEnum};
use lathe_ir::{Model, Tensor, text as text_form};
use lathe_runtime::{Diagnosis, InstalledPlugin, Kind, LibrarySearch, LoadOptions};
use serde::Serialize;
use std::{fmt::Write as _, path::PathBuf};

/// What can be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum InstallArg {
    /// ONNX Runtime.
    Cpu,
    /// ONNX Runtime with the CUDA and TensorRT providers.
    Gpu,
    /// The plugin with the WebGPU provider.
    Webgpu,
    /// The plugin with the OpenVINO provider.
    Openvino,
}

/// What to do.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The ONNX Runtime library to look at, or its folder.
    #[arg(long, value_name = "PATH")]
    ort: Option<PathBuf>,
    /// Fetch the pinned ONNX Runtime, or a plugin for it, with pip into the data folder.
    #[arg(long, value_name = "WHAT", num_args = 0..=1, default_missing_value = "cpu")]
    install: Option<InstallArg>,
    /// The same as --install gpu.
    #[arg(long, requires = "install")]
    gpu: bool,
    /// As JSON.
    #[arg(long, conflicts_with_all = ["install", "kernels"])]
    json: bool,
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
    if let Some(what) = args.install {
        if args.gpu && !matches!(what, InstallArg::Cpu | InstallArg::Gpu) {
            return Err(Failure::Usage("--gpu is about ONNX Runtime itself; leave it out for a plugin".to_owned()));
        }
        let kind = match what {
            InstallArg::Gpu => Kind::Gpu,
            InstallArg::Cpu if args.gpu => Kind::Gpu,
            InstallArg::Cpu => Kind::Cpu,
            InstallArg::Webgpu => Kind::WebGpu,
            InstallArg::Openvino => Kind::OpenVino,
        };
        let folder = runner::data_dir().ok_or_else(|| anyhow!("there is no data folder: HOME is not set"))?;
        let meter = Meter::new(&format!("fetching {}", kind.name()), false);
        let files = lathe_runtime::install(kind, &folder, &runner::python())?;
        drop(meter);
        for file in files {
            print(&format!("installed {}\n", file.display()));
        }
    }
    if args.kernels {
        return measure(args);
    }
    let search = runner::search(args.ort.clone());
    let found = lathe_runtime::diagnose(&search);
    let plugins = match &found.library {
        Some(library) => library.plugins.iter().map(|plugin| Plugin::tried(plugin, args, &search)).collect(),
        None => Vec::new(),
    };
    if args.json {
        let found = serde_json::json!({ "runtime": found, "plugins": plugins });
        print(&format!("{}\n", serde_json::to_string_pretty(&found).expect("names and paths have a JSON form")));
    } else {
        print(&text(&found, &plugins));
    }
    Ok(())
}

/// A plugin and whether it can be used.
#[derive(Debug, Serialize)]
struct Plugin {
    name: String,
    version: String,
    path: PathBuf,
    /// Its devices, one line each.
    devices: Vec<String>,
    /// Why it cannot be used.
    problem: Option<String>,
}

impl Plugin {
    /// Loads a plugin, first in a process of its own: it may crash.
    fn tried(plugin: &InstalledPlugin, args: &DoctorArgs, search: &LibrarySearch) -> Plugin {
        let options = RunOptions { ort: args.ort.clone(), ..RunOptions::default() };
        let load = LoadOptions { provider: plugin.name.clone(), ..LoadOptions::default() };
        let input = [("x".to_owned(), Tensor::from_f32s(&[1], &[-1.0]))];
        let runs = || -> anyhow::Result<()> {
            let runner = Runner::new(&options)?.afresh();
            runner.child().evaluate(&relu().to_bytes(), &input, &load)?;
            Ok(())
        };
        let devices = match runs() {
            Ok(()) => lathe_runtime::devices_of(search, plugin),
            // What it is about stands above.
            Err(error) => {
                let (error, known) =
                    (error.to_string(), format!("the execution provider `{}` cannot be used: ", plugin.name));
                Err(error.strip_prefix(&known).unwrap_or(&error).to_owned())
            }
        };
        let (devices, problem) = match devices {
            Ok(devices) => (devices, None),
            Err(problem) => (Vec::new(), Some(problem)),
        };
        Plugin {
            name: plugin.name.clone(),
            version: plugin.version.clone(),
            path: plugin.path.clone(),
            devices,
            problem,
        }
    }
}

/// A model of one node.
fn relu() -> Model {
    let source = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[1] x) => (float[1] y) { y = Relu (x) }";
    text_form::parse(source).expect("the text is a model")
}

fn text(found: &Diagnosis, plugins: &[Plugin]) -> String {
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
    for plugin in plugins {
        let _ = writeln!(out, "plugin {} {}\n  {}", plugin.name, plugin.version, plugin.path.display());
        for device in &plugin.devices {
            let _ = writeln!(out, "  device: {device}");
        }
        if let Some(problem) = &plugin.problem {
            let _ = writeln!(out, "  {problem}");
        }
    }
    let embedded = if found.embedded { "built in, used where there is no ONNX Runtime" } else { "not built in" };
    let _ = writeln!(out, "embedded engine: {embedded}");
    if found.library.is_none() && !found.tried.is_empty() {
        let _ = writeln!(out, "looked at:");
        for tried in &found.tried {
            let _ = writeln!(out, "  {tried}");
        }
    }
    out
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
