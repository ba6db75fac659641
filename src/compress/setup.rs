//! What calibrating, proposing and pricing share.

use crate::runner::Runner;
use lathe_passes::lossy::{Method, MethodContext, Recipe};
use lathe_runtime::{BenchInputs, Distance, LoadOptions, SetSpec};

/// Everything that candidates depend on besides the model.
pub(super) struct Setup<'a> {
    pub runner: &'a Runner,
    /// What methods may know before anything is calibrated.
    pub cx: MethodContext<'a>,
    /// The methods that are open to the run.
    pub methods: Vec<&'static dyn Method>,
    /// The calibration set.
    pub set: &'a SetSpec,
    pub load: &'a LoadOptions,
    /// Bytes that statistics may take; `None` for a quarter of the memory.
    pub memory: Option<u64>,
    pub seed: u64,
    pub distance: Distance,
    /// The inputs of runs that are timed.
    pub inputs: BenchInputs,
}

/// Whether an execution provider, which may be `NAME=path` of a plugin, computes in half precision.
pub(super) fn computes_in_half(provider: &str) -> bool {
    lathe_runtime::Provider::asked(provider).is_some_and(|provider| provider.half)
}

/// How an execution provider wants to be told what is rounded to whole numbers.
pub(super) fn recipe(provider: &str) -> Recipe {
    match lathe_runtime::Provider::asked(provider).is_some_and(|provider| provider.integers) {
        true => Recipe::Cpu,
        false => Recipe::None,
    }
}
