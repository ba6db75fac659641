//! What `optimize doctor` shows, and installing ONNX Runtime from its pinned wheel.

use crate::{Engine, InstalledPlugin, LibrarySearch, OrtEngine, RuntimeError};
use serde::Serialize;
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What there is to run models with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// The library in use.
    pub library: Option<Library>,
    /// Why there is none.
    pub problem: Option<String>,
    /// Every place that was looked at, one line each.
    pub tried: Vec<String>,
    /// Whether the pure-Rust engine is built in.
    pub embedded: bool,
}

/// ONNX Runtime as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Library {
    /// Where it lies.
    pub path: PathBuf,
    /// How it was found: `an installed Python package`.
    pub place: String,
    /// Its version.
    pub version: String,
    /// The execution providers it was built with: `cpu`, `cuda`.
    pub providers: Vec<String>,
    /// The devices it sees.
    pub devices: Vec<String>,
    /// Providers that are installed as libraries of their own.
    pub plugins: Vec<InstalledPlugin>,
}

/// The devices that an installed plugin offers, one line each, or why it has none. Loads it into this process.
pub fn devices_of(search: &LibrarySearch, plugin: &InstalledPlugin) -> Result<Vec<String>, String> {
    OrtEngine::start(search).map_err(|error| error.to_string())?.devices_of(plugin)
}

/// Looks for ONNX Runtime, loads it and asks it about itself.
pub fn diagnose(search: &LibrarySearch) -> Diagnosis {
    let embedded = cfg!(feature = "embedded");
    match OrtEngine::start(search) {
        Ok(engine) => {
            let found = engine.library();
            let library = Library {
                path: found.path.clone(),
                place: found.place.to_string(),
                version: engine.version().to_owned(),
                providers: engine.providers(),
                devices: engine.devices(),
                plugins: engine.plugins().to_vec(),
            };
            Diagnosis { library: Some(library), problem: None, tried: engine.tried().to_vec(), embedded }
        }
        Err(error) => {
            let tried = if let RuntimeError::NoLibrary { tried } = &error { tried.clone() } else { Vec::new() };
            Diagnosis { library: None, problem: Some(error.to_string()), tried, embedded }
        }
    }
}

/// What can be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ONNX Runtime.
    Cpu,
    /// The one with the CUDA and TensorRT providers.
    Gpu,
    /// The plugin with the WebGPU provider.
    WebGpu,
    /// The plugin with the OpenVINO provider.
    OpenVino,
}

impl Kind {
    /// As messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Cpu => "ONNX Runtime",
            Kind::Gpu => "ONNX Runtime for CUDA",
            Kind::WebGpu => "the WebGPU plugin",
            Kind::OpenVino => "the OpenVINO plugin",
        }
    }

    /// The folder of the package that holds a plugin.
    fn package(self) -> Option<&'static str> {
        match self {
            Kind::Cpu | Kind::Gpu => None,
            Kind::WebGpu => Some("onnxruntime_ep_webgpu"),
            Kind::OpenVino => Some("onnxruntime_ep_openvino"),
        }
    }
}

/// One wheel that is known by its hash.
struct Wheel {
    os: &'static str,
    arch: &'static str,
    kind: Kind,
    requirement: &'static str,
    platform: &'static str,
    sha256: &'static str,
}

/// The library inside a wheel does not depend on the version of Python, so one wheel per platform is enough.
const PYTHON: &str = "3.12";

const WHEELS: &[Wheel] = &[
    Wheel {
        os: "linux",
        arch: "x86_64",
        kind: Kind::Cpu,
        requirement: "onnxruntime==1.32.0",
        platform: "manylinux_2_28_x86_64",
        sha256: "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
    },
    Wheel {
        os: "linux",
        arch: "aarch64",
        kind: Kind::Cpu,
        requirement: "onnxruntime==1.32.0",
        platform: "manylinux_2_28_aarch64",
        sha256: "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
    },
    Wheel {
        os: "macos",
        arch: "aarch64",
        kind: Kind::Cpu,
        requirement: "onnxruntime==1.32.0",
        platform: "macosx_14_0_arm64",
        sha256: "d52510bbbcc880c13b826f7d75cdf33ac5cf0bb864d960000fc29ce73f0cb83e",
    },
    Wheel {
        os: "windows",
        arch: "x86_64",
        kind: Kind::Cpu,
        requirement: "onnxruntime==1.32.0",
        platform: "win_amd64",
        sha256: "efe7456952c243a05a53d5b8732953625144642c2f3989094277f6217f0c0c40",
    },
    Wheel {
        os: "linux",
        arch: "x86_64",
        kind: Kind::Gpu,
        requirement: "onnxruntime-gpu==1.31.1",
        platform: "manylinux_2_28_x86_64",
        sha256: "05d548956197b9d01f59b625de740e0d6be3593f874e241a12dc0362650ecdf7",
    },
    Wheel {
        os: "windows",
        arch: "x86_64",
        kind: Kind::Gpu,
        requirement: "onnxruntime-gpu==1.31.1",
        platform: "win_amd64",
        sha256: "2bb1e9373baba88f6415257f5b6a589d23e23c16004f7d89adf4344eada5749e",
    },
    Wheel {
        os: "linux",
        arch: "x86_64",
        kind: Kind::WebGpu,
        requirement: "onnxruntime-ep-webgpu==0.4.0",
        platform: "manylinux_2_28_x86_64",
        sha256: "5d8c961eda91a88961cad1fb7621f389f006b18497d6ea9ecf96f729f066cbfb",
    },
    Wheel {
        os: "linux",
        arch: "aarch64",
        kind: Kind::WebGpu,
        requirement: "onnxruntime-ep-webgpu==0.4.0",
        platform: "manylinux_2_28_aarch64",
        sha256: "17f660db53b1a509c63e721ac6784a2daa1c4e91a968523ee9986505ee5b0a55",
    },
    Wheel {
        os: "macos",
        arch: "aarch64",
        kind: Kind::WebGpu,
        requirement: "onnxruntime-ep-webgpu==0.4.0",
        platform: "macosx_14_0_universal2",
        sha256: "8d0a91d44b43d931c3068b9134aed9770f27803e353c2b58c93e1700bb68bcca",
    },
    Wheel {
        os: "windows",
        arch: "x86_64",
        kind: Kind::WebGpu,
        requirement: "onnxruntime-ep-webgpu==0.4.0",
        platform: "win_amd64",
        sha256: "7db646669d1a2390551da675115ea125e68cb3d4d2c3a2d6e463372bf8d6ea87",
    },
    Wheel {
        os: "linux",
        arch: "x86_64",
        kind: Kind::OpenVino,
        requirement: "onnxruntime-ep-openvino==1.8.1",
        platform: "manylinux_2_28_x86_64",
        sha256: "3832643158c8c187fcab6db661cde2a8c06a2b3559d95d0f2411ac0e51c5e924",
    },
    Wheel {
        os: "windows",
        arch: "x86_64",
        kind: Kind::OpenVino,
        requirement: "onnxruntime-ep-openvino==1.8.1",
        platform: "win_amd64",
        sha256: "1acd878be173b02bb8b953460f2f59b121e5f6e47ebc6aad490c0590cf6718fb",
    },
];

/// Why the library could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// No wheel is pinned for this machine.
    #[error("no wheel of {} is known for {os} on {arch}", .kind.name())]
    Platform {
        /// The operating system.
        os: &'static str,
        /// The processor.
        arch: &'static str,
        /// What was asked for.
        kind: Kind,
    },
    /// Python or pip failed.
    #[error("{what} failed: {message}")]
    Tool {
        /// What was being done.
        what: &'static str,
        /// What it said last.
        message: String,
    },
    /// A file could not be written.
    #[error("cannot write to `{}`", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The wheel holds no library.
    #[error("the wheel `{requirement}` does not hold the library")]
    Empty {
        /// The wheel.
        requirement: &'static str,
    },
}

/// Downloads the pinned wheel of ONNX Runtime with pip, checks its hash, and puts its libraries into `data_dir`.
///
/// `python` is the interpreter whose pip is used. Returns the files written.
pub fn install(kind: Kind, data_dir: &Path, python: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    let wheel = WHEELS.iter().find(|w| w.os == os && w.arch == arch && w.kind == kind);
    let wheel = wheel.ok_or(InstallError::Platform { os, arch, kind })?;
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| InstallError::Io { path, source }
    };
    fs::create_dir_all(data_dir).map_err(at(data_dir))?;
    let folder = tempfile::Builder::new().prefix("download-").tempdir_in(data_dir).map_err(at(data_dir))?;
    let work = folder.path();
    let list = work.join("requirements.txt");
    fs::write(&list, requirement(wheel)).map_err(at(&list))?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]);
    pip.args(["--implementation", "cp", "--python-version", PYTHON, "--platform", wheel.platform]);
    pip.arg("--dest").arg(work).arg("--requirement").arg(&list);
    succeed("downloading the wheel with pip", &mut pip)?;
    let entries = || fs::read_dir(work).into_iter().flatten().flatten().map(|entry| entry.path());
    let archive = entries().find(|path| path.extension().is_some_and(|e| e == "whl"));
    let archive = archive.ok_or(InstallError::Empty { requirement: wheel.requirement })?;
    let unpacked = work.join("wheel");
    // Python's own unpacker keeps every entry inside the target folder.
    let mut unzip = Command::new(python);
    unzip.args(["-m", "zipfile", "-e"]).arg(&archive).arg(&unpacked);
    succeed("unpacking the wheel", &mut unzip)?;
    if let Some(package) = kind.package() {
        return move_package(&unpacked, package, data_dir, wheel);
    }
    let capi = unpacked.join("onnxruntime").join("capi");
    let mut written = Vec::new();
    for entry in fs::read_dir(&capi).map_err(at(&capi))?.flatten() {
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let library = text.starts_with("libonnxruntime") || (text.starts_with("onnxruntime") && text.ends_with(".dll"));
        if library {
            let target = data_dir.join(&name);
            fs::rename(entry.path(), &target).map_err(at(&target))?;
            written.push(target);
        }
    }
    written.sort();
    if written.is_empty() { Err(InstallError::Empty { requirement: wheel.requirement }) } else { Ok(written) }
}

/// Puts the package of a plugin, and what tells its version, in the place of one that is there.
fn move_package(unpacked: &Path, package: &str, data_dir: &Path, wheel: &Wheel) -> Result<Vec<PathBuf>, InstallError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| InstallError::Io { path, source }
    };
    let folders = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let is_own = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(package));
        entries.filter(|path| path.is_dir() && is_own(path)).collect()
    };
    if !unpacked.join(package).is_dir() {
        return Err(InstallError::Empty { requirement: wheel.requirement });
    }
    for old in folders(data_dir) {
        fs::remove_dir_all(&old).map_err(at(&old))?;
    }
    for new in folders(unpacked) {
        let target = data_dir.join(new.file_name().unwrap_or_default());
        fs::rename(&new, &target).map_err(at(&target))?;
    }
    Ok(vec![data_dir.join(package)])
}

fn requirement(wheel: &Wheel) -> String {
    format!("{} --hash=sha256:{}\n", wheel.requirement, wheel.sha256)
}

fn succeed(what: &'static str, command: &mut Command) -> Result<(), InstallError> {
    let failed = |message: String| InstallError::Tool { what, message };
    let output = command.stdin(Stdio::null()).output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(said.lines().map(str::trim).rfind(|l| !l.is_empty()).unwrap_or("no reason given").to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_whole_and_distinct() {
        let mut hashes: Vec<&str> = WHEELS.iter().map(|w| w.sha256).collect();
        assert!(hashes.iter().all(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit())));
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), WHEELS.len());
    }

    #[test]
    fn a_python_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = install(Kind::Cpu, folder.path(), Path::new("no-such-python")).unwrap_err().to_string();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "the download folder is gone");
        assert!(error.starts_with("downloading the wheel with pip failed"), "{error}");
    }

    #[test]
    fn the_library_in_use_is_described() {
        crate::testing::engine();
        let diagnosis = diagnose(&LibrarySearch::default());
        assert!(diagnosis.library.unwrap().providers.contains(&"cpu".to_owned()));
        assert!(diagnosis.tried.last().unwrap().ends_with("(used)"));
    }
}
