//! Runs whose inputs and outputs stay on the device, for timing.

use super::{OrtEngine, PROVIDERS, Provider, assignment::Assignment, sentence, values::to_ort};
use crate::{
    RuntimeError, Sample,
    engine::{LoadOptions, Source, Timed},
};
use ort::{
    logging::LogLevel,
    memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType},
    session::IoBinding,
    value::DynValue,
};
use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Providers by whether their runs return before the device has finished, whatever synchronizing says; found out once.
static RUNS_AHEAD: Mutex<BTreeMap<String, bool>> = Mutex::new(BTreeMap::new());

/// Runs that are given to a device before the one whose outputs are waited for.
const BACKLOG: usize = 4;

/// How many times longer that one takes where the others were not done.
const LATE: u32 = 2;

/// A run of this length is hardly disturbed; shorter ones are repeated.
const LONG: Duration = Duration::from_millis(20);

struct OrtTimed {
    // Dropped before the session it belongs to.
    binding: IoBinding,
    session: ort::session::Session,
    /// What the binding refers to.
    values: Vec<(String, DynValue)>,
    outputs: Vec<String>,
    /// The memory of the device, if it has its own and can be bound to.
    memory: Option<AllocationDevice<'static>>,
    device: i32,
    copies_in_run: bool,
    profiled: bool,
    assignment: Assignment,
    provider: String,
    engine: String,
}

// The binding's own error hands the builder back, whatever its size.
#[allow(clippy::result_large_err)]
pub(super) fn load(
    engine: &OrtEngine,
    source: Source<'_>,
    options: &LoadOptions,
    profile: Option<&Path>,
) -> Result<Box<dyn Timed>, RuntimeError> {
    let name = crate::Engine::name(engine);
    let refused = |e: &ort::Error| RuntimeError::Load { engine: name.clone(), message: sentence(e.message()) };
    let assignment = Assignment::default();
    let (mut builder, provider) = engine.builder(options, true)?;
    if let Some(folder) = profile {
        builder = builder
            .with_profiling(folder.join("profile"))
            .and_then(|b| b.with_logger(assignment.logger()))
            .and_then(|b| b.with_log_level(LogLevel::Info))
            .map_err(|e| RuntimeError::Load { engine: name.clone(), message: sentence(e.message()) })?;
    }
    let session = engine.commit(builder, source)?;
    let built_in = PROVIDERS.iter().find(|provider| provider.name == options.provider);
    let binding = session.create_binding().map_err(|e| refused(&e))?;
    let outputs = session.outputs().iter().map(|o| o.name().to_owned()).collect();
    Ok(Box::new(OrtTimed {
        binding,
        session,
        values: Vec::new(),
        outputs,
        memory: built_in.and_then(|provider| provider.memory.clone()),
        device: options.device,
        // A plugin may have memory of any name.
        copies_in_run: !built_in.is_some_and(Provider::is_built_in),
        profiled: profile.is_some(),
        assignment,
        provider,
        engine: name,
    }))
}

impl OrtTimed {
    fn failed(&self, error: &ort::Error) -> RuntimeError {
        let (node, message) = super::failed_node(&sentence(error.message()));
        RuntimeError::of_run(&self.engine, node, message)
    }

    /// Lets the outputs stay on `memory`, or come to the host.
    fn bind_outputs(&mut self, memory: Option<&AllocationDevice<'static>>) -> Result<(), RuntimeError> {
        let (device, id) = match memory {
            Some(device) => (device.clone(), self.device),
            None => (AllocationDevice::CPU, 0),
        };
        let info = MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default);
        let info = info.map_err(|e| self.failed(&e))?;
        self.binding.clear_outputs();
        for name in &self.outputs {
            if let Err(error) = self.binding.bind_output_to_device(name.as_str(), &info) {
                return Err(self.failed(&error));
            }
        }
        Ok(())
    }

    /// Whether runs whose outputs stay on the device return before it has finished: then a run whose outputs are waited
    /// for takes longer after others than alone. Outputs are bound to `memory` before and after.
    fn runs_ahead(&mut self, memory: &AllocationDevice<'static>) -> Result<bool, RuntimeError> {
        let known = || RUNS_AHEAD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&found) = known().get(&self.provider) {
            return Ok(found);
        }
        let shortest = |timed: &mut OrtTimed, backlog: usize| -> Result<Duration, RuntimeError> {
            let mut shortest = Duration::MAX;
            for _ in 0..3 {
                timed.bind_outputs(Some(memory))?;
                for _ in 0..backlog {
                    timed.run_bound()?;
                }
                timed.bind_outputs(None)?;
                shortest = shortest.min(timed.run_bound()?);
                if shortest > LONG {
                    break;
                }
            }
            Ok(shortest)
        };
        // The first run prepares kernels.
        shortest(self, 0)?;
        let alone = shortest(self, 0)?;
        let after = shortest(self, BACKLOG)?;
        self.bind_outputs(Some(memory))?;
        let found = after > alone * LATE;
        known().insert(self.provider.clone(), found);
        Ok(found)
    }

    fn run_bound(&mut self) -> Result<Duration, RuntimeError> {
        let (session, binding) = (&mut self.session, &self.binding);
        let start = Instant::now();
        // The binding panics on an output that is an absent optional.
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let outputs = session.run_binding(binding)?;
            // A run may return before the device has finished.
            binding.synchronize_outputs()?;
            let time = start.elapsed();
            drop(outputs);
            Ok::<_, ort::Error>(time)
        }));
        match ran {
            Ok(Ok(time)) => Ok(time),
            Ok(Err(error)) => Err(self.failed(&error)),
            Err(_) => {
                let message = "an output is of a type that cannot be taken from it".to_owned();
                Err(RuntimeError::Run { engine: self.engine.clone(), node: None, message })
            }
        }
    }
}

impl Timed for OrtTimed {
    fn bind(&mut self, inputs: &Sample) -> Result<Option<Duration>, RuntimeError> {
        let mut values = Vec::with_capacity(inputs.len());
        for (name, tensor) in inputs {
            let value = to_ort(tensor).map_err(|why| RuntimeError::Value {
                value: format!("input `{name}`"),
                engine: self.engine.clone(),
                message: why.to_string(),
            })?;
            values.push((name.clone(), value));
        }
        self.binding.clear();
        let start = Instant::now();
        // Binding copies a value to where the session wants it.
        let bound = values.iter().try_for_each(|(name, value)| self.binding.bind_input(name.as_str(), value));
        bound.and_then(|()| self.binding.synchronize_inputs()).map_err(|e| self.failed(&e))?;
        let took = start.elapsed();
        self.values = values;
        if let Some(memory) = self.memory.clone() {
            if self.bind_outputs(Some(&memory)).is_ok() && !self.runs_ahead(&memory)? {
                return Ok(Some(took));
            }
            // Names of device memory differ between versions of the runtime, and where only the arrival of the outputs
            // tells that a run is over, they have to come to the host.
            self.memory = None;
            self.copies_in_run = true;
        }
        self.bind_outputs(None)?;
        Ok(None)
    }

    fn run(&mut self) -> Result<Duration, RuntimeError> {
        self.run_bound()
    }

    fn fetch(&mut self) -> Result<Option<Duration>, RuntimeError> {
        let Some(memory) = self.memory.clone() else { return Ok(None) };
        // What a run takes longer whose outputs come to the host is what copying them takes.
        let median = |timed: &mut OrtTimed| -> Result<Duration, RuntimeError> {
            timed.run_bound()?;
            let mut times = (0..5).map(|_| timed.run_bound()).collect::<Result<Vec<_>, _>>()?;
            times.sort_unstable();
            Ok(times[2])
        };
        let stays = median(self)?;
        self.bind_outputs(None)?;
        let comes = median(self)?;
        self.bind_outputs(Some(&memory))?;
        Ok(Some(comes.saturating_sub(stays)))
    }

    fn copies_in_run(&self) -> bool {
        self.copies_in_run
    }

    fn profile(&mut self) -> Result<Option<PathBuf>, RuntimeError> {
        if !std::mem::take(&mut self.profiled) {
            return Ok(None);
        }
        let path = self.session.end_profiling().map_err(|e| self.failed(&e))?;
        Ok(Some(path.into()))
    }

    fn left_because(&self) -> BTreeMap<String, String> {
        self.assignment.reasons()
    }

    fn provider(&self) -> &str {
        &self.provider
    }
}
