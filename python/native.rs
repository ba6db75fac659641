//! `onnx_lathe._native`: the program for Python. Arguments are command lines, answers are JSON; the modules around it
//! make both Pythonic.

use onnx_lathe::{Call, Event, Failure, Host, PROVIDERS, Report};
use pyo3::{
    create_exception,
    exceptions::{PyException, PyKeyboardInterrupt, PyOSError, PyValueError},
    prelude::*,
};
use std::{ffi::OsString, path::PathBuf, time::Duration};

/// How often Python's signals are looked at while a call goes on.
const LOOK: Duration = Duration::from_millis(50);

create_exception!(onnx_lathe, Error, PyException, "Nothing was written: the base of all errors of onnx_lathe.");
create_exception!(onnx_lathe, InputError, Error, "The model, a set or the machine is at fault (exit code 1).");
create_exception!(onnx_lathe, UsageError, Error, "Arguments that do not go together (exit code 2).");
create_exception!(onnx_lathe, Refused, Error, "The result was computed and turned down (exit code 3).");
create_exception!(
    onnx_lathe,
    RuntimeMissing,
    InputError,
    "The ONNX Runtime library that was asked for is not to be had (exit code 1)."
);

fn raised(failure: &Failure) -> PyErr {
    let message = failure.to_string();
    match failure {
        Failure::Usage(_) => UsageError::new_err(message),
        Failure::Refused(_) => Refused::new_err(message),
        Failure::Interrupted => PyKeyboardInterrupt::new_err(message),
        Failure::Error(_) if failure.is_missing_runtime() => RuntimeMissing::new_err(message),
        Failure::Error(_) => InputError::new_err(message),
    }
}

/// Tells the program where it is: what starts a process that runs models, the folder of the package, folders of ONNX
/// Runtime packages, and the interpreter.
#[pyfunction]
fn set_host(worker: Vec<OsString>, folder: PathBuf, packages: Vec<PathBuf>, python: PathBuf) -> PyResult<()> {
    let mut worker = worker.into_iter();
    let program = worker.next().ok_or_else(|| PyValueError::new_err("the worker has no program"))?;
    onnx_lathe::set_host(Host { worker: (program.into(), worker.collect()), folder, packages, python });
    Ok(())
}

/// Runs the program as the command line does, and returns its exit code.
#[pyfunction]
fn run(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| onnx_lathe::cli::run(arguments))
}

/// Carries out a command line. Returns its JSON, its text, its notes, and why its answer does not do, if so.
///
/// `hear(done, total, unit)` is called with progress. An exception of it, like Ctrl-C, calls the work off.
#[pyfunction]
#[pyo3(signature = (arguments, hear=None))]
fn call(
    py: Python<'_>,
    arguments: Vec<OsString>,
    hear: Option<Bound<'_, PyAny>>,
) -> PyResult<(String, String, Vec<String>, Option<String>)> {
    let call = Call::start(arguments).map_err(|e| PyOSError::new_err(format!("cannot start a thread: {e}")))?;
    let mut call = Detached(Some(call));
    loop {
        match call.wait(py) {
            Some(Event::Done(Ok(found))) => {
                return Ok((found.json.to_string(), found.text, found.notes, found.refused));
            }
            Some(Event::Done(Err(failure))) => return Err(raised(&failure)),
            Some(Event::Progress(now)) => {
                if let Some(hear) = &hear {
                    hear.call1((now.done, now.total, now.unit))?;
                }
            }
            None => {}
        }
        py.check_signals()?;
    }
}

/// A call that is waited for, and called off, without holding up other Python threads.
struct Detached(Option<Call>);

impl Detached {
    fn wait(&mut self, py: Python<'_>) -> Option<Event> {
        let call = self.0.as_mut()?;
        py.detach(move || call.wait(LOOK))
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        let call = self.0.take();
        Python::attach(|py| py.detach(move || drop(call)));
    }
}

/// The HTML page of a report in JSON.
#[pyfunction]
fn html(report: &str) -> PyResult<String> {
    let report: Report = serde_json::from_str(report).map_err(|e| PyValueError::new_err(format!("no report: {e}")))?;
    Ok(report.to_html())
}

/// Every execution provider: ONNX Runtime's name, the name on command lines, and whether its devices are seldom those that
/// models are optimized on.
#[pyfunction]
fn providers() -> Vec<(&'static str, &'static str, bool)> {
    PROVIDERS.iter().map(|provider| (provider.runtime_name, provider.name, provider.elsewhere)).collect()
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("Error", py.get_type::<Error>())?;
    module.add("InputError", py.get_type::<InputError>())?;
    module.add("UsageError", py.get_type::<UsageError>())?;
    module.add("Refused", py.get_type::<Refused>())?;
    module.add("RuntimeMissing", py.get_type::<RuntimeMissing>())?;
    module.add_function(wrap_pyfunction!(set_host, module)?)?;
    module.add_function(wrap_pyfunction!(run, module)?)?;
    module.add_function(wrap_pyfunction!(call, module)?)?;
    module.add_function(wrap_pyfunction!(html, module)?)?;
    module.add_function(wrap_pyfunction!(providers, module)?)
}
