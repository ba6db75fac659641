//! Execution providers: what `--ep` names, and handing a session to one.
//!
//! A provider is one that the library was built with, or a plugin library of its own. One that cannot be used is an
//! error that says what is missing; nothing falls back to the CPU in silence.

use crate::{LoadOptions, RuntimeError};
use ort::{
    environment::Environment,
    ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider, ExecutionProviderDispatch},
    logging::LogLevel,
    memory::AllocationDevice,
    session::builder::SessionBuilder,
};
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// `cuda`: by its short name.
    Named(String),
    /// `NAME=path/to/library.so`, or a path alone, whose name is the file's.
    Plugin { name: String, path: PathBuf },
}

/// Reads the value of `--ep`.
pub(crate) fn parse(text: &str) -> Asked {
    let is_path = |text: &str| {
        let extension = Path::new(text).extension().and_then(|e| e.to_str()).unwrap_or_default();
        text.contains(['/', '\\']) || ["so", "dll", "dylib"].contains(&extension)
    };
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !is_path(name) => {
            Asked::Plugin { name: name.to_owned(), path: path.into() }
        }
        _ if is_path(text) => {
            let stem = Path::new(text).file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            let name = stem.trim_start_matches("lib").trim_start_matches("onnxruntime_providers_").to_owned();
            Asked::Plugin { name, path: text.into() }
        }
        _ => Asked::Named(text.to_owned()),
    }
}

/// A provider that ONNX Runtime may have been built with.
struct Known {
    /// Its name on the command line.
    short: &'static str,
    /// ONNX Runtime's name.
    full: &'static str,
    available: fn() -> ort::Result<bool>,
    /// For a device, and whether for timing.
    append: fn(i32, bool) -> Vec<ExecutionProviderDispatch>,
    /// The memory it computes in, where that is not the host's.
    memory: Option<AllocationDevice<'static>>,
    /// What must be installed besides.
    needs: &'static str,
}

fn has<E: ExecutionProvider>() -> ort::Result<bool> {
    E::is_available()
}

/// Only timing runs as the provider does by default: with matrix products in TF32, whose ten bits of mantissa would hide
/// or invent differences in a comparison.
fn cuda(device: i32, timing: bool) -> ExecutionProviderDispatch {
    ep::CUDA::default().with_device_id(device).with_tf32(timing).build().error_on_failure()
}

/// The devices of OpenVINO are counted among GPUs; without a number it chooses by itself.
fn openvino(device: i32) -> ExecutionProviderDispatch {
    let provider = ep::OpenVINO::default();
    let provider = if device > 0 { provider.with_device_type(format!("GPU.{device}")) } else { provider };
    provider.build().error_on_failure()
}

const KNOWN: &[Known] = &[
    Known {
        short: "cpu",
        full: "CPUExecutionProvider",
        available: has::<ep::CPU>,
        append: |_, _| Vec::new(),
        memory: None,
        needs: "",
    },
    Known {
        short: "cuda",
        full: "CUDAExecutionProvider",
        available: has::<ep::CUDA>,
        append: |device, timing| vec![cuda(device, timing)],
        memory: Some(AllocationDevice::CUDA),
        needs: "an NVIDIA driver, and the CUDA and cuDNN libraries where the loader finds them (LD_LIBRARY_PATH)",
    },
    Known {
        short: "tensorrt",
        full: "TensorrtExecutionProvider",
        available: has::<ep::TensorRT>,
        // What TensorRT does not take belongs on the same device, not on the CPU.
        append: |device, timing| {
            vec![ep::TensorRT::default().with_device_id(device).build().error_on_failure(), cuda(device, timing)]
        },
        memory: Some(AllocationDevice::CUDA),
        needs: "an NVIDIA driver, and the TensorRT, CUDA and cuDNN libraries where the loader finds them \
                (LD_LIBRARY_PATH)",
    },
    Known {
        short: "webgpu",
        full: "WebGpuExecutionProvider",
        available: has::<ep::WebGPU>,
        append: |device, _| vec![ep::WebGPU::default().with_device_id(device).build().error_on_failure()],
        memory: Some(AllocationDevice::WEBGPU_BUFFER),
        needs: "a GPU with a Vulkan, Metal or Direct3D 12 driver",
    },
    Known {
        short: "openvino",
        full: "OpenVINOExecutionProvider",
        available: has::<ep::OpenVINO>,
        append: |device, _| vec![openvino(device)],
        memory: None,
        needs: "the OpenVINO libraries where the loader finds them",
    },
    Known {
        short: "coreml",
        full: "CoreMLExecutionProvider",
        available: has::<ep::CoreML>,
        append: |_, _| vec![ep::CoreML::default().with_subgraphs(true).build().error_on_failure()],
        memory: None,
        needs: "macOS",
    },
    Known {
        short: "directml",
        full: "DmlExecutionProvider",
        available: has::<ep::DirectML>,
        append: |device, _| vec![ep::DirectML::default().with_device_id(device).build().error_on_failure()],
        memory: Some(AllocationDevice::DIRECTML),
        needs: "Windows with a Direct3D 12 device",
    },
    Known {
        short: "migraphx",
        full: "MIGraphXExecutionProvider",
        available: has::<ep::MIGraphX>,
        append: |device, _| vec![ep::MIGraphX::default().with_device_id(device).build().error_on_failure()],
        memory: Some(AllocationDevice::HIP),
        needs: "an AMD GPU with ROCm and MIGraphX",
    },
    Known {
        short: "rocm",
        full: "ROCMExecutionProvider",
        available: has::<ep::ROCm>,
        append: |device, _| {
            vec![ep::ROCm::default().with_arbitrary_config("device_id", device).build().error_on_failure()]
        },
        memory: Some(AllocationDevice::HIP),
        needs: "an AMD GPU with ROCm",
    },
    Known {
        short: "qnn",
        full: "QNNExecutionProvider",
        available: has::<ep::QNN>,
        append: |_, _| vec![ep::QNN::default().build().error_on_failure()],
        memory: None,
        needs: "the Qualcomm AI Engine Direct libraries",
    },
    Known {
        short: "xnnpack",
        full: "XnnpackExecutionProvider",
        available: has::<ep::XNNPACK>,
        append: |_, _| vec![ep::XNNPACK::default().build().error_on_failure()],
        memory: None,
        needs: "",
    },
    Known {
        short: "onednn",
        full: "DnnlExecutionProvider",
        available: has::<ep::OneDNN>,
        append: |_, _| vec![ep::OneDNN::default().build().error_on_failure()],
        memory: None,
        needs: "",
    },
];

/// The short names of the providers that the loaded library was built with.
pub(crate) fn available() -> Vec<String> {
    let built_in = KNOWN.iter().filter(|known| (known.available)().unwrap_or(false));
    built_in.map(|known| known.short.to_owned()).collect()
}

/// Whether the loaded library was built with what `--ep` names.
pub(super) fn is_built_in(provider: &str) -> bool {
    KNOWN.iter().any(|known| known.short == provider && (known.available)().unwrap_or(false))
}

/// The device memory of a provider, where it has its own and the binding can name it.
pub(crate) fn memory(provider: &str) -> Option<AllocationDevice<'static>> {
    KNOWN.iter().find(|known| known.short == provider)?.memory.clone()
}

/// What the library complained about last. Its errors often name less than its log does.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps an error that the library logs.
pub(crate) fn complain(message: &str) {
    let mut complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    // A library that complains without end must not fill memory.
    if complaints.len() < 16 {
        complaints.push(message.split_whitespace().collect::<Vec<_>>().join(" "));
    }
}

/// Plugin libraries of this process: their path and the name of the provider in them.
static PLUGINS: Mutex<Vec<(PathBuf, String)>> = Mutex::new(Vec::new());

/// Hands the sessions of `builder` to the provider of `options`, and returns ONNX Runtime's name of it.
///
/// `library` is the loaded ONNX Runtime; plugin libraries installed beside it are found by their short name.
pub(crate) fn register(
    environment: &Environment,
    builder: SessionBuilder,
    options: &LoadOptions,
    engine: &str,
    library: &Path,
    timing: bool,
) -> Result<(SessionBuilder, String), RuntimeError> {
    let unavailable = |message: String| RuntimeError::Unavailable { provider: options.provider.clone(), message };
    let (name, path) = match parse(&options.provider) {
        Asked::Named(name) => match KNOWN.iter().find(|known| known.short == name) {
            Some(known) if (known.available)().unwrap_or(false) => {
                let builder = built_in(environment, builder, known, options.device, timing).map_err(unavailable)?;
                return Ok((builder, known.full.to_owned()));
            }
            Some(known) => match beside(library, &name) {
                Some(path) => (name, path),
                None => return Err(unavailable(lacking(known, engine, library))),
            },
            None => {
                let (provider, available) = (name, available().join(", "));
                return Err(RuntimeError::Provider { engine: engine.to_owned(), provider, available });
            }
        },
        Asked::Plugin { name, path } => (name, path),
    };
    let provider = plugin(environment, &name, &path).map_err(unavailable)?;
    let devices: Vec<_> = environment.devices().filter(|d| d.ep().is_ok_and(|ep| ep == provider)).collect();
    let count = devices.len();
    let chosen = usize::try_from(options.device).ok().and_then(|index| devices.into_iter().nth(index));
    let chosen = chosen.ok_or_else(|| {
        unavailable(format!("`{}` offers {count} devices, so there is no device {}", path.display(), options.device))
    })?;
    let builder = builder.with_devices([chosen], None).map_err(|e| unavailable(said(e.message())))?;
    Ok((builder, provider))
}

fn built_in(
    environment: &Environment,
    builder: SessionBuilder,
    known: &Known,
    device: i32,
    timing: bool,
) -> Result<SessionBuilder, String> {
    let providers = (known.append)(device, timing);
    if providers.is_empty() {
        return Ok(builder);
    }
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    environment.set_log_level(LogLevel::Error);
    let registered = builder.with_execution_providers(providers);
    environment.set_log_level(LogLevel::Fatal);
    registered.map_err(|e| {
        let needs = if known.needs.is_empty() { String::new() } else { format!("; it needs {}", known.needs) };
        format!("{}{needs}", said(e.message()))
    })
}

/// The library's error with what it logged about it.
fn said(message: &str) -> String {
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let message = message.trim_end_matches('.');
    let complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    match complaints.iter().find(|c| c.contains("lib") || c.contains("driver")).or_else(|| complaints.first()) {
        Some(complaint) if !message.contains(complaint.as_str()) => format!("{message} ({complaint})"),
        _ => message.to_owned(),
    }
}

/// Why a known provider is not there, and what would bring it.
fn lacking(known: &Known, engine: &str, library: &Path) -> String {
    let built = format!("{engine} (`{}`) was built with {} only", library.display(), available().join(", "));
    let bring = match known.short {
        "cuda" | "tensorrt" => {
            "install onnxruntime-gpu, or let `optimize doctor --install --gpu` fetch it, or name another library with --ort"
        }
        "webgpu" => "install the plugin onnxruntime-ep-webgpu beside it, or give its library with --ep webgpu=PATH",
        "openvino" => "install onnxruntime-openvino and name its library with --ort",
        "coreml" => "it is in the builds for macOS",
        "directml" => "install onnxruntime-directml on Windows and name its library with --ort",
        "qnn" => "install onnxruntime-qnn and name its library with --ort",
        _ => "build ONNX Runtime with it and name the library with --ort",
    };
    format!("{built}; {bring}")
}

/// The library of a provider that is a Python package beside ONNX Runtime's.
fn beside(library: &Path, short: &str) -> Option<PathBuf> {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let file = format!("{prefix}onnxruntime_providers_{short}{suffix}");
    let packages = library.parent()?.parent()?.parent()?;
    let path = packages.join(format!("onnxruntime_ep_{short}")).join(file);
    path.is_file().then_some(path)
}

/// Loads a plugin library, once, and says which provider is in it.
fn plugin(environment: &Environment, name: &str, path: &Path) -> Result<String, String> {
    let mut plugins = PLUGINS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, provider)) = plugins.iter().find(|(known, _)| known == path) {
        return Ok(provider.clone());
    }
    // The loader looks for a bare file name in the system's folders, so a missing file is better found here.
    let whole = path.canonicalize().map_err(|e| format!("cannot find the library `{}`: {e}", path.display()))?;
    if name.is_empty() {
        return Err(format!("`{}` gives it no name; --ep NAME={0} does", path.display()));
    }
    let names = || -> Vec<String> { environment.devices().filter_map(|d| d.ep().ok().map(str::to_owned)).collect() };
    let before = names();
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    environment.set_log_level(LogLevel::Error);
    let registered = environment.register_ep_library(name, &whole);
    environment.set_log_level(LogLevel::Fatal);
    registered
        .map_err(|e| format!("`{}` is not a provider that can be loaded: {}", path.display(), said(e.message())))?;
    let found = names().into_iter().find(|name| !before.contains(name)).ok_or_else(|| {
        format!(
            "`{}` was loaded but offers no device: there is no hardware or driver here that it supports",
            path.display()
        )
    })?;
    plugins.push((path.to_owned(), found.clone()));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Engine, Source, testing};
    use lathe_ir::Node;

    fn refused(provider: &str, device: i32) -> String {
        let bytes = testing::unary(Node::new("Relu")).to_bytes();
        let options = LoadOptions { provider: provider.into(), device, ..LoadOptions::default() };
        testing::engine().load(Source::Bytes(&bytes), &options).err().unwrap().to_string()
    }

    #[test]
    fn reads_what_is_asked_for() {
        let plugin = |name: &str, path: &str| Asked::Plugin { name: name.into(), path: path.into() };
        assert_eq!(parse("cuda"), Asked::Named("cuda".into()));
        assert_eq!(parse("webgpu=lib/gpu.so"), plugin("webgpu", "lib/gpu.so"));
        assert_eq!(
            parse("lib/libonnxruntime_providers_webgpu.so"),
            plugin("webgpu", "lib/libonnxruntime_providers_webgpu.so")
        );
        assert_eq!(parse("dir/a=b.so"), plugin("a=b", "dir/a=b.so"));
    }

    #[test]
    fn names_are_told_apart() {
        let mut names: Vec<&str> = KNOWN.iter().flat_map(|k| [k.short, k.full]).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 2 * KNOWN.len());
    }

    #[test]
    fn what_the_library_lacks_is_an_error_with_a_remedy() {
        let missing = KNOWN.iter().filter(|known| !(known.available)().unwrap_or(false));
        for known in missing.filter(|known| known.short != "webgpu") {
            let error = refused(known.short, 0);
            assert!(error.starts_with(&format!("the execution provider `{}` cannot be used", known.short)), "{error}");
            assert!(error.contains("was built with"), "{error}");
        }
    }

    #[test]
    fn a_plugin_that_is_none_is_an_error() {
        assert!(refused("no/such/library.so", 0).contains("cannot find the library `no/such/library.so`"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.so");
        std::fs::write(&path, "not a library").unwrap();
        let error = refused(&path.to_string_lossy(), 0);
        assert!(error.contains("is not a provider that can be loaded"), "{error}");
    }
}
