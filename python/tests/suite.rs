//! Runs the Python tests on the extension that cargo has built, with the interpreter of `.venv`.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What the extension is called in the package: of one file for every Python from 3.10 on.
const EXTENSION: &str = if cfg!(windows) { "_native.pyd" } else { "_native.abi3.so" };

fn copy(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy(&path, &target)?;
        } else {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

/// The package as a wheel would lay it, in a folder for `PYTHONPATH`.
fn package(python: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let deps = std::env::current_exe()?;
    let deps = deps.parent().ok_or("a test lies in a folder")?;
    let library = format!("{}_native{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let built = [deps.join(&library), deps.with_file_name(&library)].into_iter().find(|path| path.exists());
    let built = built.ok_or_else(|| format!("{library} was not built beside {}", deps.display()))?;
    let folder = deps.with_file_name("python");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    copy(&python.join("onnx_lathe"), &folder.join("onnx_lathe"))?;
    let extension = folder.join("onnx_lathe").join(EXTENSION);
    // A link where the file system has them: the extension is large.
    fs::hard_link(&built, &extension).or_else(|_| fs::copy(&built, &extension).map(drop))?;
    Ok(folder)
}

#[test]
fn the_python_tests_pass() -> Result<(), Box<dyn Error>> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR"));
    let repository = python.parent().ok_or("the package lies in the repository")?;
    let environment = repository.join(".venv");
    let programs = environment.join(if cfg!(windows) { "Scripts" } else { "bin" });
    let package = package(python)?;
    let data = package.join("data");
    let mut tests = Command::new(programs.join("python"));
    tests.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).arg(python.join("tests")).current_dir(repository);
    // What the user has installed or measured before is not what is tested.
    tests.env("XDG_DATA_HOME", data).env("PYTHONPATH", package).env("PYTHONDONTWRITEBYTECODE", "1");
    tests.env_remove("ORT_DYLIB_PATH").env_remove("VIRTUAL_ENV");
    let output = tests.output().map_err(|e| format!("{} does not run: {e}; ./test makes it", programs.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
