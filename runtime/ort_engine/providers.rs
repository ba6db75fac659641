//! Execution providers: what `--ep` names, and the table of those that are known.
//!
//! A provider is one that the library was built with, or a plugin library of its own. Whatever this program knows of one
//! is in its row of [`PROVIDERS`]; messages, `doctor`, documentation and Python read it there.

use ort::{
    ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider, ExecutionProviderDispatch},
    memory::AllocationDevice,
};
use std::{
    borrow::Cow,
    path::{Path, PathBuf},
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

/// The name of what `--ep` asks for, without the path of a plugin.
pub fn provider_name(text: &str) -> Cow<'_, str> {
    match parse(text) {
        Asked::Named(_) => text.into(),
        Asked::Plugin { name, .. } => name.into(),
    }
}

/// A provider that ONNX Runtime may have been built with.
pub struct Provider {
    /// Its name on the command line: `cuda`.
    pub name: &'static str,
    /// ONNX Runtime's name of it: `CUDAExecutionProvider`.
    pub runtime_name: &'static str,
    /// Whether its devices multiply in half precision.
    pub half: bool,
    /// Whether ONNX Runtime fuses `QuantizeLinear` and `DequantizeLinear` around layers to kernels of whole numbers for it.
    pub integers: bool,
    /// Whether its GroupQueryAttention reads and writes caches of int8 and int4.
    pub quantized_caches: bool,
    /// Whether it is for devices that models are seldom optimized on: phones and boards.
    pub elsewhere: bool,
    /// How to get it where the library was built without it.
    pub remedy: &'static str,
    /// What must be installed besides; empty where nothing must.
    pub needs: &'static str,
    /// The folder of the Python package that its plugin library comes in; empty where there is none.
    pub package: &'static str,
    /// Whether the loaded library was built with it.
    pub(super) available: fn() -> ort::Result<bool>,
    /// What is appended to a session for a device, and whether for timing.
    pub(super) append: fn(i32, bool) -> Vec<ExecutionProviderDispatch>,
    /// The memory it computes in, where that is not the host's.
    pub(super) memory: Option<AllocationDevice<'static>>,
}

impl Provider {
    /// The provider that `--ep` asks for, as a plugin or by its name; `None` of one that is not known.
    pub fn asked(text: &str) -> Option<&'static Provider> {
        let name = provider_name(text);
        PROVIDERS.iter().find(|provider| provider.name == name)
    }

    pub(super) fn is_built_in(&self) -> bool {
        (self.available)().unwrap_or(false)
    }
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

/// How the GPU build is had.
const GPU: &str =
    "install onnxruntime-gpu, or let `optimize doctor --install --gpu` fetch it, or name another library with --ort";

/// How a provider is had that no package carries.
const BUILD: &str = "build ONNX Runtime with it and name the library with --ort";

/// Every provider that is known, the CPU first.
pub const PROVIDERS: &[Provider] = &[
    Provider {
        name: "cpu",
        runtime_name: "CPUExecutionProvider",
        half: false,
        integers: true,
        quantized_caches: true,
        elsewhere: false,
        remedy: "it is in every build",
        needs: "",
        package: "",
        available: has::<ep::CPU>,
        append: |_, _| Vec::new(),
        memory: None,
    },
    Provider {
        name: "cuda",
        runtime_name: "CUDAExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: true,
        elsewhere: false,
        remedy: GPU,
        needs: "an NVIDIA driver, and the CUDA and cuDNN libraries where the loader finds them (LD_LIBRARY_PATH)",
        package: "",
        available: has::<ep::CUDA>,
        append: |device, timing| vec![cuda(device, timing)],
        memory: Some(AllocationDevice::CUDA),
    },
    Provider {
        name: "tensorrt",
        runtime_name: "TensorrtExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: GPU,
        needs: "an NVIDIA driver, and the TensorRT, CUDA and cuDNN libraries where the loader finds them \
                (LD_LIBRARY_PATH)",
        package: "",
        available: has::<ep::TensorRT>,
        // What TensorRT does not take belongs on the same device, not on the CPU.
        append: |device, timing| {
            vec![ep::TensorRT::default().with_device_id(device).build().error_on_failure(), cuda(device, timing)]
        },
        memory: Some(AllocationDevice::CUDA),
    },
    Provider {
        name: "tensorrt-rtx",
        runtime_name: "NvTensorRTRTXExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: "install the plugin onnxruntime-ep-nv-tensorrt-rtx beside it, or give its library with --ep tensorrt-rtx=PATH",
        needs: "an NVIDIA RTX GPU with its driver",
        package: "onnxruntime_ep_nv_tensorrt_rtx",
        // No library is built with it.
        available: || Ok(false),
        append: |_, _| Vec::new(),
        memory: Some(AllocationDevice::CUDA),
    },
    Provider {
        name: "webgpu",
        runtime_name: "WebGpuExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: "install the plugin onnxruntime-ep-webgpu beside it, or give its library with --ep webgpu=PATH",
        needs: "a GPU with a Vulkan, Metal or Direct3D 12 driver",
        package: "onnxruntime_ep_webgpu",
        available: has::<ep::WebGPU>,
        append: |device, _| vec![ep::WebGPU::default().with_device_id(device).build().error_on_failure()],
        memory: Some(AllocationDevice::WEBGPU_BUFFER),
    },
    Provider {
        name: "openvino",
        runtime_name: "OpenVINOExecutionProvider",
        half: false,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: "install the plugin onnxruntime-ep-openvino beside it (Intel devices), or onnxruntime-openvino and name its \
                 library with --ort",
        needs: "the OpenVINO libraries where the loader finds them; its plugin an Intel processor, GPU or NPU",
        package: "onnxruntime_ep_openvino",
        available: has::<ep::OpenVINO>,
        append: |device, _| vec![openvino(device)],
        memory: None,
    },
    Provider {
        name: "coreml",
        runtime_name: "CoreMLExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: "it is in the builds for macOS",
        needs: "macOS",
        package: "",
        available: has::<ep::CoreML>,
        append: |_, _| vec![ep::CoreML::default().with_subgraphs(true).build().error_on_failure()],
        memory: None,
    },
    Provider {
        name: "directml",
        runtime_name: "DmlExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: "install onnxruntime-directml on Windows and name its library with --ort",
        needs: "Windows with a Direct3D 12 device",
        package: "",
        available: has::<ep::DirectML>,
        append: |device, _| vec![ep::DirectML::default().with_device_id(device).build().error_on_failure()],
        memory: Some(AllocationDevice::DIRECTML),
    },
    Provider {
        name: "migraphx",
        runtime_name: "MIGraphXExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: "install the plugin onnxruntime-ep-migraphx beside it, or build ONNX Runtime with it and name the library with \
                 --ort",
        needs: "an AMD GPU with ROCm and MIGraphX",
        package: "onnxruntime_ep_migraphx",
        available: has::<ep::MIGraphX>,
        append: |device, _| vec![ep::MIGraphX::default().with_device_id(device).build().error_on_failure()],
        memory: Some(AllocationDevice::HIP),
    },
    Provider {
        name: "rocm",
        runtime_name: "ROCMExecutionProvider",
        half: true,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: BUILD,
        needs: "an AMD GPU with ROCm",
        package: "",
        available: has::<ep::ROCm>,
        append: |device, _| {
            vec![ep::ROCm::default().with_arbitrary_config("device_id", device).build().error_on_failure()]
        },
        memory: Some(AllocationDevice::HIP),
    },
    Provider {
        name: "qnn",
        runtime_name: "QNNExecutionProvider",
        half: false,
        integers: false,
        quantized_caches: false,
        elsewhere: true,
        remedy: "install the plugin onnxruntime-qnn beside it, or name a library that was built with it with --ort",
        needs: "the Qualcomm AI Engine Direct libraries",
        package: "onnxruntime_qnn",
        available: has::<ep::QNN>,
        append: |_, _| vec![ep::QNN::default().build().error_on_failure()],
        memory: None,
    },
    Provider {
        name: "xnnpack",
        runtime_name: "XnnpackExecutionProvider",
        half: false,
        integers: false,
        quantized_caches: false,
        elsewhere: true,
        remedy: BUILD,
        needs: "",
        package: "",
        available: has::<ep::XNNPACK>,
        append: |_, _| vec![ep::XNNPACK::default().build().error_on_failure()],
        memory: None,
    },
    Provider {
        name: "onednn",
        runtime_name: "DnnlExecutionProvider",
        half: false,
        integers: false,
        quantized_caches: false,
        elsewhere: false,
        remedy: BUILD,
        needs: "",
        package: "",
        available: has::<ep::OneDNN>,
        append: |_, _| vec![ep::OneDNN::default().build().error_on_failure()],
        memory: None,
    },
];

/// The names of the providers that the loaded library was built with.
pub(crate) fn available() -> Vec<String> {
    PROVIDERS.iter().filter(|provider| provider.is_built_in()).map(|provider| provider.name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for text in ["webgpu", "webgpu=lib/gpu.so", "lib/libonnxruntime_providers_webgpu.so"] {
            assert_eq!(Provider::asked(text).map(|provider| provider.name), Some("webgpu"), "{text}");
        }
        assert!(Provider::asked("dir/a=b.so").is_none());
    }

    #[test]
    fn names_are_told_apart_and_every_row_says_how_to_get_it() {
        let mut names: Vec<&str> = PROVIDERS.iter().flat_map(|p| [p.name, p.runtime_name]).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 2 * PROVIDERS.len());
        assert!(PROVIDERS.iter().all(|p| !p.remedy.is_empty() && p.runtime_name.ends_with("ExecutionProvider")));
        assert_eq!(PROVIDERS[0].name, "cpu");
    }
}
