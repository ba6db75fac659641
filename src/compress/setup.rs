//! What calibrating, proposing and pricing share.

use crate::runner::Runner;
use lathe_passes::{
    Target,
    lossy::{Method, MethodContext, Recipe},
};
use lathe_runtime::{BenchInputs, Distance, LoadOptions, Provider, SetSpec};

/// Everything that candidates depend on besides the model.
#[derive(Clone)]
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
    /// Whether floats that stay are written in half precision.
    pub halves: bool,
}

/// Whether an execution provider, which may be `NAME=path` of a plugin, computes in half precision.
pub(super) fn computes_in_half(provider: &str) -> bool {
    lathe_runtime::Provider::asked(provider).is_some_and(|provider| provider.half)
}

/// How what the result is for wants to be told what is rounded to whole numbers: the target, or else the execution provider.
pub(crate) fn recipe(target: Target, provider: &str) -> Recipe {
    match target {
        Target::TensorRt => Recipe::TensorRt,
        Target::OpenVino => Recipe::OpenVino,
        Target::Qnn => Recipe::Qnn,
        Target::Portable | Target::Ort => lathe_runtime::Provider::asked(provider).map_or(Recipe::None, of_provider),
    }
}

fn of_provider(provider: &Provider) -> Recipe {
    match provider.name {
        "tensorrt" => Recipe::TensorRt,
        "openvino" => Recipe::OpenVino,
        "qnn" => Recipe::Qnn,
        _ if provider.integers => Recipe::Cpu,
        _ => Recipe::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_says_where_pairs_stand_and_else_the_provider() {
        let of = |provider| recipe(Target::Portable, provider);
        assert_eq!(
            ["cpu", "cuda", "webgpu", "tensorrt"].map(of),
            [Recipe::Cpu, Recipe::None, Recipe::None, Recipe::TensorRt]
        );
        assert_eq!(["openvino=lib/plugin.so", "qnn", "unknown"].map(of), [Recipe::OpenVino, Recipe::Qnn, Recipe::None]);
        assert_eq!((recipe(Target::Ort, "cpu"), recipe(Target::Qnn, "cpu")), (Recipe::Cpu, Recipe::Qnn));
        assert_eq!(recipe(Target::TensorRt, "cuda"), Recipe::TensorRt);
    }
}
