//! Execution providers that are installed as libraries of their own beside ONNX Runtime.

use super::providers::PROVIDERS;
use serde::{Deserialize, Serialize};
use std::{
    env::consts::{DLL_PREFIX, DLL_SUFFIX},
    fs,
    path::{Path, PathBuf},
};

/// What names of packages of plugins begin with, unless a provider's row says otherwise.
const PACKAGES: &str = "onnxruntime_ep_";

/// A plugin library in its Python package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InstalledPlugin {
    /// What `--ep` calls it: `webgpu`.
    pub name: String,
    /// The version of its package; empty where that is not written down.
    pub version: String,
    /// The library.
    pub path: PathBuf,
}

/// Plugins in these folders of Python packages, by name; the first of a name counts.
pub(super) fn installed(folders: &[PathBuf]) -> Vec<InstalledPlugin> {
    let mut found: Vec<InstalledPlugin> = Vec::new();
    for folder in folders {
        let names = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut entries: Vec<PathBuf> =
            fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        entries.sort();
        for package in entries.iter().filter(|path| path.is_dir()) {
            let Some(name) = provider_of(&names(package)) else { continue };
            let Some(path) = library(package).filter(|_| found.iter().all(|known| known.name != name)) else {
                continue;
            };
            let start = format!("{}-", names(package));
            let version = entries.iter().find_map(|path| {
                let version = names(path).strip_prefix(&start)?.strip_suffix(".dist-info")?.to_owned();
                Some(version)
            });
            found.push(InstalledPlugin { name, version: version.unwrap_or_default(), path });
        }
    }
    found.sort();
    found
}

/// The provider whose plugin a package of this name holds.
fn provider_of(package: &str) -> Option<String> {
    if package.contains('-') {
        return None;
    }
    let known = PROVIDERS.iter().find(|known| known.package == package);
    match known {
        Some(known) => Some(known.name.to_owned()),
        None => Some(package.strip_prefix(PACKAGES).filter(|rest| !rest.is_empty())?.replace('_', "-")),
    }
}

/// The plugin in a package: the library of a provider at its top or one folder below.
fn library(package: &Path) -> Option<PathBuf> {
    let start = format!("{DLL_PREFIX}onnxruntime_providers_");
    let is_plugin = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Some leave out the usual prefix.
        let name = if name.starts_with(DLL_PREFIX) { name } else { format!("{DLL_PREFIX}{name}") };
        name.starts_with(&start) && name.ends_with(DLL_SUFFIX) && !name.contains("providers_shared") && path.is_file()
    };
    let inside = |folder: &Path| -> Vec<PathBuf> {
        let mut all: Vec<PathBuf> = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        all.sort();
        all
    };
    let top = inside(package);
    let below = top.iter().filter(|path| path.is_dir()).flat_map(|folder| inside(folder));
    top.clone().into_iter().chain(below).find(is_plugin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_are_found_by_their_packages() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        let library = |name: &str| format!("{DLL_PREFIX}onnxruntime_providers_{name}{DLL_SUFFIX}");
        put(&format!("onnxruntime_ep_openvino/{}", library("openvino_plugin")));
        put("onnxruntime_ep_openvino-1.8.1.dist-info/METADATA");
        put(&format!("onnxruntime_qnn/capi/{}", library("qnn")));
        put(&format!("onnxruntime_qnn/capi/{}", library("shared")));
        put(&format!("onnxruntime_ep_own_chip/{}", library("own_chip")));
        put("onnxruntime_ep_empty/__init__.py");
        put(&format!("onnxruntime/capi/{}", library("cuda")));
        let found = installed(&[folder.path().to_owned(), folder.path().join("nowhere")]);
        let told: Vec<_> = found.iter().map(|plugin| (plugin.name.as_str(), plugin.version.as_str())).collect();
        assert_eq!(told, [("openvino", "1.8.1"), ("own-chip", ""), ("qnn", "")]);
        assert!(found[2].path.ends_with(Path::new("onnxruntime_qnn/capi").join(library("qnn"))));
    }
}
