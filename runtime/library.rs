//! Where ONNX Runtime may be installed, and in which order the places are tried.

use crate::RuntimeError;
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The places to look at. Whoever calls reads the environment; nothing here does.
#[derive(Debug, Clone, Default)]
pub struct LibrarySearch {
    /// The user's `--ort`: a library or the folder it lies in. Nothing else is tried when it is set.
    pub explicit: Option<PathBuf>,
    /// The value of `ORT_DYLIB_PATH`. Nothing after it is tried when it is set.
    pub variable: Option<PathBuf>,
    /// The folder of the running executable.
    pub executable_dir: Option<PathBuf>,
    /// Where `doctor --install` puts the library.
    pub data_dir: Option<PathBuf>,
    /// Folders that hold the library in Python packages which the program knows of by itself.
    pub packages: Vec<PathBuf>,
    /// Virtual environments whose `site-packages` are looked at: `.venv`.
    pub environments: Vec<PathBuf>,
    /// Python interpreters that are asked where `onnxruntime` is installed.
    pub pythons: Vec<PathBuf>,
    /// Folders of the system's libraries.
    pub system_dirs: Vec<PathBuf>,
}

/// Which place a library was found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The variants are the fields of `LibrarySearch`.
pub enum SearchPlace {
    Explicit,
    Variable,
    Executable,
    DataDir,
    Python,
    System,
}

impl fmt::Display for SearchPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SearchPlace::Explicit => "`--ort`",
            SearchPlace::Variable => "`ORT_DYLIB_PATH`",
            SearchPlace::Executable => "the folder of the executable",
            SearchPlace::DataDir => "the data folder",
            SearchPlace::Python => "an installed Python package",
            SearchPlace::System => "the system's libraries",
        })
    }
}

/// A library that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLibrary {
    /// The library itself.
    pub path: PathBuf,
    /// Where it was found.
    pub place: SearchPlace,
}

/// One place that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// The kind of place.
    pub place: SearchPlace,
    /// The folder, file or interpreter; empty if there was none to look at.
    pub at: PathBuf,
    /// What was there.
    pub outcome: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.at.as_os_str().is_empty() {
            return write!(f, "{} ({})", self.place, self.outcome);
        }
        write!(f, "{} at {} ({})", self.place, self.at.display(), self.outcome)
    }
}

/// Why a library cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unusable {
    /// There is nothing where it was asked for.
    #[error("there is no such library")]
    Absent,
    /// Its version is before the first that serves.
    #[error("it is ONNX Runtime {found}, and this program needs {needed} or later")]
    TooOld { found: String, needed: String },
    /// It lacks what every ONNX Runtime has.
    #[error("it is not an ONNX Runtime this program understands")]
    Foreign,
    /// It says why itself.
    #[error("{0}")]
    Refused(String),
}

/// Why an interpreter leads to no library.
#[derive(Debug, thiserror::Error)]
enum PythonError {
    #[error("cannot be run: {0}")]
    Run(io::Error),
    #[error("has no package `onnxruntime`")]
    NoPackage,
}

/// Whether a library can be used.
type Usable<'a> = dyn FnMut(&Path) -> Result<(), Unusable> + 'a;

/// What a search came to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Discovery {
    /// The library, if there is a usable one.
    pub found: Option<FoundLibrary>,
    /// Every place that was looked at, in order.
    pub tried: Vec<Attempt>,
}

impl LibrarySearch {
    /// The usual folders of system libraries on this platform.
    pub fn usual_system_dirs() -> Vec<PathBuf> {
        let dirs: &[&str] = if cfg!(target_os = "linux") {
            &[
                "/usr/local/lib",
                "/usr/local/lib64",
                "/usr/lib",
                "/usr/lib64",
                "/usr/lib/x86_64-linux-gnu",
                "/usr/lib/aarch64-linux-gnu",
                "/opt/onnxruntime/lib",
            ]
        } else if cfg!(target_os = "macos") {
            &["/opt/homebrew/lib", "/usr/local/lib"]
        } else {
            &[]
        };
        dirs.iter().map(PathBuf::from).collect()
    }

    /// Looks at the places in order and returns the first library that `usable` accepts.
    ///
    /// Fails when a library that was asked for by name cannot be used: falling back would hide a mistake.
    pub(crate) fn find(&self, usable: &mut Usable<'_>) -> Result<Discovery, RuntimeError> {
        let mut discovery = Discovery::default();
        for (place, given) in [(SearchPlace::Explicit, &self.explicit), (SearchPlace::Variable, &self.variable)] {
            let Some(given) = given else { continue };
            let failed = |why: Unusable| RuntimeError::Library { path: given.clone(), message: why.to_string() };
            let path = if given.is_dir() { library_in(given) } else { given.is_file().then(|| given.clone()) };
            let path = path.ok_or_else(|| failed(Unusable::Absent))?;
            usable(&path).map_err(failed)?;
            discovery.tried.push(Attempt { place, at: given.clone(), outcome: "used".to_owned() });
            discovery.found = Some(FoundLibrary { path, place });
            return Ok(discovery);
        }
        let beside = self.executable_dir.iter().flat_map(|dir| [dir.clone(), dir.join("lib"), dir.join("../lib")]);
        let beside: Vec<PathBuf> = beside.collect();
        let data: Vec<PathBuf> = self.data_dir.iter().cloned().collect();
        if discovery.look(SearchPlace::Executable, &beside, usable)
            || discovery.look(SearchPlace::DataDir, &data, usable)
        {
            return Ok(discovery);
        }
        if !self.packages.is_empty() && discovery.look(SearchPlace::Python, &self.packages, usable) {
            return Ok(discovery);
        }
        for environment in &self.environments {
            if discovery.look(SearchPlace::Python, &packages_of(environment), usable) {
                return Ok(discovery);
            }
        }
        for python in &self.pythons {
            match ask_python(python) {
                Ok(folder) if discovery.look(SearchPlace::Python, std::slice::from_ref(&folder), usable) => {
                    return Ok(discovery);
                }
                Ok(_) => {}
                Err(error) => {
                    let outcome = error.to_string();
                    discovery.tried.push(Attempt { place: SearchPlace::Python, at: python.clone(), outcome });
                }
            }
        }
        discovery.look(SearchPlace::System, &self.system_dirs, usable);
        Ok(discovery)
    }
}

impl Discovery {
    /// Whether one of `folders` holds a usable library; notes what was seen.
    fn look(&mut self, place: SearchPlace, folders: &[PathBuf], usable: &mut Usable<'_>) -> bool {
        if folders.is_empty() {
            self.tried.push(Attempt { place, at: PathBuf::new(), outcome: "none known".to_owned() });
        }
        for folder in folders {
            let Some(path) = library_in(folder) else {
                let outcome = "no library there".to_owned();
                self.tried.push(Attempt { place, at: folder.clone(), outcome });
                continue;
            };
            match usable(&path) {
                Ok(()) => {
                    self.tried.push(Attempt { place, at: path.clone(), outcome: "used".to_owned() });
                    self.found = Some(FoundLibrary { path, place });
                    return true;
                }
                Err(why) => self.tried.push(Attempt { place, at: path, outcome: why.to_string() }),
            }
        }
        false
    }
}

/// The ONNX Runtime library in a folder; the newest if there are several.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let is_library = |name: &str| {
        if cfg!(target_os = "windows") {
            name.eq_ignore_ascii_case("onnxruntime.dll")
        } else if cfg!(target_os = "macos") {
            name.starts_with("libonnxruntime.") && name.ends_with(".dylib")
        } else {
            name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so.")
        }
    };
    let version = |name: &str| -> Vec<u64> { name.split('.').filter_map(|part| part.parse().ok()).collect() };
    let names = fs::read_dir(folder).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let newest = names.filter(|name| is_library(name)).max_by_key(|name| (version(name), name.clone()))?;
    let path = folder.join(newest);
    path.is_file().then_some(path)
}

/// The folders in which the packages of a virtual environment keep the library.
fn packages_of(environment: &Path) -> Vec<PathBuf> {
    let capi = |site: PathBuf| site.join("onnxruntime").join("capi");
    let mut folders = vec![capi(environment.join("Lib").join("site-packages"))];
    for entry in fs::read_dir(environment.join("lib")).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("python") {
            folders.push(capi(entry.path().join("site-packages")));
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    folders
}

/// Where a Python interpreter has `onnxruntime`, found without importing it.
fn ask_python(python: &Path) -> Result<PathBuf, PythonError> {
    // The current folder is taken off the path first: a folder of that name there is not an installed package.
    const SCRIPT: &str = "import sys\n\
        sys.path = [p for p in sys.path if p not in ('', '.')]\n\
        import importlib.util\n\
        spec = importlib.util.find_spec('onnxruntime')\n\
        print((list(spec.submodule_search_locations or []) or [''])[0] if spec else '')";
    let output = Command::new(python).args(["-c", SCRIPT]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.map_err(PythonError::Run)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.trim() {
        "" => Err(PythonError::NoPackage),
        package => Ok(Path::new(package).join("capi")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|file| fs::write(folder.path().join(file), "").unwrap());
        folder
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn places_are_tried_in_order_until_one_is_usable() {
        let beside = folder(&["libonnxruntime.so.1.9.0", "libonnxruntime_providers_shared.so"]);
        let data = folder(&["libonnxruntime.so.1.9.0", "libonnxruntime.so.1.32.0"]);
        let search = LibrarySearch {
            executable_dir: Some(beside.path().to_owned()),
            data_dir: Some(data.path().to_owned()),
            packages: vec!["no/such/package".into()],
            pythons: vec!["no-such-python".into()],
            ..LibrarySearch::default()
        };
        let mut accept = |path: &Path| {
            if path.starts_with(data.path()) { Ok(()) } else { Err(Unusable::Refused("too old".to_owned())) }
        };
        let found = search.find(&mut accept).unwrap().found.unwrap();
        assert_eq!((found.path, found.place), (data.path().join("libonnxruntime.so.1.32.0"), SearchPlace::DataDir));
        let nothing = search.find(&mut |_| Err(Unusable::Refused("too old".to_owned()))).unwrap();
        assert!(nothing.found.is_none());
        let lines: Vec<String> = nothing.tried.iter().map(ToString::to_string).collect();
        assert!(lines[0].ends_with("libonnxruntime.so.1.9.0 (too old)"), "{lines:?}");
        assert!(
            lines.iter().any(|l| l == "an installed Python package at no/such/package (no library there)"),
            "{lines:?}"
        );
        assert!(lines.iter().any(|l| l.contains("no-such-python (cannot be run")), "{lines:?}");
        assert_eq!(lines.last().unwrap(), "the system's libraries (none known)");
    }

    #[test]
    fn a_library_asked_for_by_name_must_be_there() {
        let search = LibrarySearch { explicit: Some("no/such/library.so".into()), ..LibrarySearch::default() };
        let error = search.find(&mut |_| Ok(())).unwrap_err().to_string();
        assert_eq!(error, "cannot load ONNX Runtime from `no/such/library.so`: there is no such library");
        let search = LibrarySearch { variable: Some("no/such/library.so".into()), ..LibrarySearch::default() };
        assert!(search.find(&mut |_| Ok(())).is_err());
    }
}
