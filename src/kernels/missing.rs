//! Which operators an execution provider has no kernel for, as the runtime itself says: a model of one node of each is run
//! and its placement looked at. What was found is kept, by runtime and provider.

use super::folder_file;
use crate::{RunOptions, latency::Measurement, runner::Runner};
use anyhow::Context as _;
use lathe_ir::text;
use lathe_runtime::{BenchInputs, InputSpec};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fs, io::Write as _, path::Path};

/// One node of an operator that passes write or know another form of.
struct Probe {
    /// As [`lathe_passes::PassContext::missing_kernels`] calls it.
    name: &'static str,
    /// What it computes of `x`, `z` (`T[B, S, 64]`), `heads` (`T[B, 4, S, 16]`) and constants.
    node: &'static str,
    /// The type of its output, where it is not `T[B, S, 64]`.
    output: &'static str,
}

const fn probe(name: &'static str, node: &'static str) -> Probe {
    Probe { name, node, output: "T[B, S, 64]" }
}

const PROBES: &[Probe] = &[
    probe("com.microsoft.Gelu", "com.microsoft.Gelu (x)"),
    probe("com.microsoft.FastGelu", "com.microsoft.FastGelu (x)"),
    probe("com.microsoft.QuickGelu", "com.microsoft.QuickGelu <alpha = 1.702> (x)"),
    probe("com.microsoft.BiasGelu", "com.microsoft.BiasGelu (x, one)"),
    probe("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipLayerNormalization (x, z, one, one)"),
    probe(
        "com.microsoft.SkipSimplifiedLayerNormalization",
        "com.microsoft.SkipSimplifiedLayerNormalization (x, z, one)",
    ),
    probe("SimplifiedLayerNormalization", "SimplifiedLayerNormalization (x, one)"),
    probe("com.microsoft.MultiHeadAttention", "com.microsoft.MultiHeadAttention <num_heads = 4> (x, z, z)"),
    probe("com.microsoft.Attention", "com.microsoft.Attention <num_heads = 4> (x, wide, wide_bias)"),
    Probe {
        name: "com.microsoft.RotaryEmbedding",
        node: "com.microsoft.RotaryEmbedding (heads, first, cosines, sines)",
        output: "T[B, 4, S, 16]",
    },
    probe(
        "com.microsoft.MatMulNBits",
        "com.microsoft.MatMulNBits <K = 64, N = 64, bits = 4, block_size = 32> (x, codes, scales)",
    ),
    probe("LayerNormalization", "LayerNormalization <axis = -1> (x, one, one)"),
    probe("Gelu", "Gelu (x)"),
    probe("HardSwish", "HardSwish (x)"),
    Probe { name: "IsNaN", node: "IsNaN (x)", output: "bool[B, S, 64]" },
    Probe { name: "Pad:reflect", node: "Pad <mode = \"reflect\"> (x, pads)", output: "T[B, U, 66]" },
];

/// Both operators' sets are old enough for every runtime that this program runs with.
const HEADER: &str = "<ir_version: 9, opset_import: [\"\" : 20, \"com.microsoft\" : 1]>";

/// What a provider has no kernels for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    /// The runtime with its version, the provider and this program.
    of: String,
    /// Whether in half precision.
    half: bool,
    /// The operators.
    missing: BTreeSet<String>,
}

/// The operators that the provider of `run` has no kernels for, in half precision too if `half`
/// says so; empty for the CPU, and where
/// that cannot be found out.
pub(crate) fn missing(run: &RunOptions, half: impl FnOnce() -> bool) -> BTreeSet<String> {
    if run.load.provider == "cpu" {
        return BTreeSet::new();
    }
    let kinds: &[bool] = if half() { &[false, true] } else { &[false] };
    kinds.iter().filter_map(|&half| known(run, half).ok()).flatten().collect()
}

/// The same for one precision, out of what is kept, else by asking.
fn known(run: &RunOptions, half: bool) -> anyhow::Result<BTreeSet<String>> {
    let runner = Runner::alone(run)?;
    let (engine, _) = runner.child().hello()?;
    let of = format!("{engine}, {}, {}", run.load.provider, crate::runner::VERSION);
    let mut all = kept().unwrap_or_default();
    if let Some(known) = all.iter().find(|known| known.of == of && known.half == half) {
        return Ok(known.missing.clone());
    }
    let missing = ask(run, half)?;
    all.push(Known { of, half, missing: missing.clone() });
    // What cannot be kept is asked for again.
    let _ = keep(&all);
    Ok(missing)
}

/// All operators in one run where the runtime knows them all, else one by one.
fn ask(run: &RunOptions, half: bool) -> anyhow::Result<BTreeSet<String>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("probe.onnx");
    let all: Vec<&Probe> = PROBES.iter().collect();
    if let Ok(missing) = run_probes(run, &path, &all, half) {
        return Ok(missing);
    }
    let mut missing = BTreeSet::new();
    let mut ran = false;
    for probe in PROBES {
        match run_probes(run, &path, &[probe], half) {
            Ok(found) => {
                ran = true;
                missing.extend(found);
            }
            // What does not run there is not there.
            Err(_) => _ = missing.insert(probe.name.to_owned()),
        }
    }
    // Where nothing runs, something else is wrong.
    anyhow::ensure!(ran, "no operator runs on `{}`", run.load.provider);
    Ok(missing)
}

/// The operators of `probes` that another provider runs.
fn run_probes(run: &RunOptions, path: &Path, probes: &[&Probe], half: bool) -> anyhow::Result<BTreeSet<String>> {
    fs::write(path, model(probes, half)?.to_bytes())?;
    let shapes = [("x", vec![1, 8, 64]), ("z", vec![1, 8, 64]), ("heads", vec![1, 4, 8, 16])];
    let shapes = shapes.into_iter().map(|(name, sizes)| (name.to_owned(), sizes)).collect();
    let inputs = BenchInputs::Random(InputSpec { shapes, ..InputSpec::default() });
    let measured = Measurement { run, models: &[path], inputs: &inputs, seconds: 0.0 };
    let profile = measured.profiles()?.into_iter().next().context("nothing was profiled")?;
    let left: BTreeSet<&str> = profile.placement.left.iter().map(|node| node.name.as_str()).collect();
    Ok(probes.iter().filter(|probe| left.contains(probe.name)).map(|probe| probe.name.to_owned()).collect())
}

/// A model of one node of each, and one that every provider has a kernel for: one that takes nothing is an error.
fn model(probes: &[&Probe], half: bool) -> anyhow::Result<lathe_ir::Model> {
    let (element, one) = if half { ("float16", "1.0") } else { ("float", "1.0") };
    let list = |count: usize, number: &str| vec![number; count].join(", ");
    let outputs: Vec<String> =
        probes.iter().enumerate().map(|(at, probe)| format!("{} y{at}", probe.output.replace('T', element))).collect();
    let nodes: Vec<String> =
        probes.iter().enumerate().map(|(at, probe)| format!("[\"{}\"] y{at} = {}", probe.name, probe.node)).collect();
    let text = format!(
        "{HEADER} g ({element}[B, S, 64] x, {element}[B, S, 64] z, {element}[B, 4, S, 16] heads) =>
            ({element}[B, S, 64] sum, {element}[B, 4, S, 16] twice, {}) <
            {element}[64] one = {{{}}}, {element}[64, 192] wide = {{{}}}, {element}[192] wide_bias = {{{}}},
            int64[1] first = {{0}}, {element}[16, 8] cosines = {{{}}}, {element}[16, 8] sines = {{{}}},
            uint8[64, 2, 16] codes = {{{}}}, {element}[128] scales = {{{}}}, int64[6] pads = {{0, 1, 1, 0, 1, 1}}
        > {{ sum = Add (x, z) twice = Add (heads, heads) {} }}",
        outputs.join(", "),
        list(64, one),
        list(64 * 192, one),
        list(192, one),
        list(128, one),
        list(128, one),
        list(64 * 32, "136"),
        list(128, one),
        nodes.join(" "),
    );
    text::parse(&text).map_err(|error| anyhow::anyhow!("{error}"))
}

const FILE: &str = "missing-kernels.json";

fn kept() -> Option<Vec<Known>> {
    serde_json::from_str(&fs::read_to_string(folder_file(FILE)?).ok()?).ok()
}

fn keep(all: &[Known]) -> anyhow::Result<()> {
    let file = folder_file(FILE).context("there is no data folder")?;
    fs::create_dir_all(file.parent().context("the file has no folder")?)?;
    let text = serde_json::to_string_pretty(all)?;
    Ok(lathe_ir::write_whole(&file, |out| out.write_all(text.as_bytes()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_is_a_valid_node() {
        let all: Vec<&Probe> = PROBES.iter().collect();
        for half in [false, true] {
            model(&all, half).unwrap().check().unwrap();
            for probe in PROBES {
                model(&[probe], half).unwrap().check().unwrap();
            }
        }
    }

    #[test]
    fn the_cpu_is_not_asked() {
        assert!(missing(&RunOptions::default(), || true).is_empty());
    }
}
