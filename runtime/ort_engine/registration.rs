//! Handing a session to an execution provider.
//!
//! A provider that cannot be used is an error that says what is missing; nothing falls back to the CPU in silence.

use super::{
    plugins::InstalledPlugin,
    providers::{Asked, PROVIDERS, Provider, available, parse},
};
use crate::{LoadOptions, RuntimeError};
use ort::{environment::Environment, logging::LogLevel, session::builder::SessionBuilder};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Why a provider cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProviderError {
    #[error("{engine} (`{}`) was built with {available} only; {remedy}", .library.display())]
    NotBuilt { engine: String, library: PathBuf, available: String, remedy: &'static str },
    #[error("{said}{}", if .needs.is_empty() { String::new() } else { format!("; it needs {needs}") })]
    Registration { said: String, needs: &'static str },
    #[error("`{}` offers {count} devices, so there is no device {device}", .path.display())]
    NoDevice { path: PathBuf, count: usize, device: i32 },
    #[error("{0}")]
    Devices(String),
    #[error("cannot find the library `{}`: {source}", .path.display())]
    Missing { path: PathBuf, source: io::Error },
    #[error("`{path}` gives it no name; --ep NAME={path} does", path = .0.display())]
    NoName(PathBuf),
    #[error("`{}` is not a provider that can be loaded: {said}", .path.display())]
    Foreign { path: PathBuf, said: String },
    #[error(
        "`{}` was loaded but offers no device: there is no hardware or driver here that it supports{}", .path.display(),
        if .needs.is_empty() { String::new() } else { format!("; it needs {needs}") }
    )]
    NoHardware { path: PathBuf, needs: &'static str },
}

/// What the library complained about last. Its errors often name less than its log does.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps an error that the library logs.
pub(super) fn complain(message: &str) {
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
/// `library` is the loaded ONNX Runtime; `installed` plugins are found by their name.
pub(super) fn register(
    environment: &Environment,
    builder: SessionBuilder,
    options: &LoadOptions,
    (engine, library): (&str, &Path),
    installed: &[InstalledPlugin],
    timing: bool,
) -> Result<(SessionBuilder, String), RuntimeError> {
    let unavailable =
        |why: ProviderError| RuntimeError::Unavailable { provider: options.provider.clone(), message: why.to_string() };
    let plugin_of = |name: &str| installed.iter().find(|plugin| plugin.name == name).map(|plugin| plugin.path.clone());
    let (name, path) = match parse(&options.provider) {
        Asked::Named(name) => match (PROVIDERS.iter().find(|known| known.name == name), plugin_of(&name)) {
            (Some(known), _) if known.is_built_in() => {
                let builder = built_in(environment, builder, known, options.device, timing).map_err(unavailable)?;
                return Ok((builder, known.runtime_name.to_owned()));
            }
            (_, Some(path)) => (name, path),
            (Some(known), None) => return Err(unavailable(lacking(known, engine, library))),
            (None, None) => {
                let mut all = available();
                all.extend(installed.iter().map(|plugin| plugin.name.clone()));
                let (provider, available) = (name, all.join(", "));
                return Err(RuntimeError::Provider { engine: engine.to_owned(), provider, available });
            }
        },
        Asked::Plugin { name, path } => (name, path),
    };
    let provider = plugin(environment, &name, &path).map_err(unavailable)?;
    let devices: Vec<_> = environment.devices().filter(|d| d.ep().is_ok_and(|ep| ep == provider)).collect();
    let count = devices.len();
    let chosen = usize::try_from(options.device).ok().and_then(|index| devices.into_iter().nth(index));
    let chosen = chosen
        .ok_or_else(|| unavailable(ProviderError::NoDevice { path: path.clone(), count, device: options.device }))?;
    let builder =
        builder.with_devices([chosen], None).map_err(|e| unavailable(ProviderError::Devices(said(e.message()))))?;
    Ok((builder, provider))
}

fn built_in(
    environment: &Environment,
    builder: SessionBuilder,
    known: &Provider,
    device: i32,
    timing: bool,
) -> Result<SessionBuilder, ProviderError> {
    let providers = (known.append)(device, timing);
    if providers.is_empty() {
        return Ok(builder);
    }
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    environment.set_log_level(LogLevel::Error);
    let registered = builder.with_execution_providers(providers);
    environment.set_log_level(LogLevel::Fatal);
    registered.map_err(|e| ProviderError::Registration { said: said(e.message()), needs: known.needs })
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
fn lacking(known: &Provider, engine: &str, library: &Path) -> ProviderError {
    ProviderError::NotBuilt {
        engine: engine.to_owned(),
        library: library.to_owned(),
        available: available().join(", "),
        remedy: known.remedy,
    }
}

/// Loads a plugin library, once, and says which provider is in it.
pub(super) fn plugin(environment: &Environment, name: &str, path: &Path) -> Result<String, ProviderError> {
    let mut plugins = PLUGINS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, provider)) = plugins.iter().find(|(known, _)| known == path) {
        return Ok(provider.clone());
    }
    // The loader looks for a bare file name in the system's folders, so a missing file is better found here.
    let whole = path.canonicalize().map_err(|source| ProviderError::Missing { path: path.to_owned(), source })?;
    if name.is_empty() {
        return Err(ProviderError::NoName(path.to_owned()));
    }
    let names = || -> Vec<String> { environment.devices().filter_map(|d| d.ep().ok().map(str::to_owned)).collect() };
    let before = names();
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    environment.set_log_level(LogLevel::Error);
    let registered = environment.register_ep_library(name, &whole);
    environment.set_log_level(LogLevel::Fatal);
    registered.map_err(|e| ProviderError::Foreign { path: path.to_owned(), said: said(e.message()) })?;
    let provider = names().into_iter().find(|name| !before.contains(name));
    let needs = PROVIDERS.iter().find(|known| known.name == name).map_or("", |known| known.needs);
    let provider = provider.ok_or_else(|| ProviderError::NoHardware { path: path.to_owned(), needs })?;
    plugins.push((path.to_owned(), provider.clone()));
    Ok(provider)
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
    fn what_the_library_lacks_is_an_error_with_a_remedy() {
        let missing = PROVIDERS.iter().filter(|known| !known.is_built_in());
        for known in missing.filter(|known| known.package.is_empty()) {
            let error = refused(known.name, 0);
            assert!(error.starts_with(&format!("the execution provider `{}` cannot be used", known.name)), "{error}");
            assert!(error.contains("was built with") && error.ends_with(known.remedy), "{error}");
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
