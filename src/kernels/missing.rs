//! Which operators an execution provider has no kernel for, or one that computes something else, as runs tell: a model of one
//! node of each is run there, its placement is looked at and its outputs are held to those of the CPU. What was found is kept,
//! by runtime, provider and device.

use super::folder_file;
use crate::{RunOptions, latency::Measurement, runner::Runner};
use anyhow::Context as _;
use lathe_ir::text;
use lathe_runtime::{BenchInputs, Claim, InputSpec, Inputs, LoadOptions, ModelOn, Verdict};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fs, io::Write as _, path::Path};

/// One node of an operator that passes write or know another form of.
struct Probe {
    /// As [`lathe_passes::PassContext::missing_kernels`] calls it; several probes may be of one operator.
    name: &'static str,
    /// What it computes of `x`, `z` (`T[1, 64, 128]`), `heads` (`T[1, 4, 64, 32]`) and constants.
    node: &'static str,
    /// The type of its output, where it is not `T[1, 64, 128]`.
    output: &'static str,
}

const fn probe(name: &'static str, node: &'static str) -> Probe {
    Probe { name, node, output: "T[1, 64, 128]" }
}

const ATTENTION: &str = "com.microsoft.Attention";

const PROBES: &[Probe] = &[
    probe("com.microsoft.Gelu", "com.microsoft.Gelu (x)"),
    probe("com.microsoft.FastGelu", "com.microsoft.FastGelu (x)"),
    probe("com.microsoft.QuickGelu", "com.microsoft.QuickGelu <alpha = 1.702> (x)"),
    probe("com.microsoft.BiasGelu", "com.microsoft.BiasGelu (x, row)"),
    probe("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipLayerNormalization (x, z, row, row)"),
    probe(
        "com.microsoft.SkipSimplifiedLayerNormalization",
        "com.microsoft.SkipSimplifiedLayerNormalization (x, z, row)",
    ),
    probe("SimplifiedLayerNormalization", "SimplifiedLayerNormalization (x, row)"),
    probe("com.microsoft.MultiHeadAttention", "com.microsoft.MultiHeadAttention <num_heads = 4> (x, z, z)"),
    probe(ATTENTION, "com.microsoft.Attention <num_heads = 4> (x, wide, wide_row)"),
    probe(ATTENTION, "com.microsoft.Attention <num_heads = 4, scale = 1.0> (x, wide)"),
    Probe {
        name: "com.microsoft.RotaryEmbedding",
        node: "com.microsoft.RotaryEmbedding (heads, first, cosines, sines)",
        output: "T[1, 4, 64, 32]",
    },
    probe(
        "com.microsoft.MatMulNBits",
        "com.microsoft.MatMulNBits <K = 128, N = 128, bits = 4, block_size = 32> (x, codes, scales)",
    ),
    probe("LayerNormalization", "LayerNormalization <axis = -1> (x, row, row)"),
    probe("Gelu", "Gelu (x)"),
    probe("HardSwish", "HardSwish (x)"),
    Probe { name: "IsNaN", node: "IsNaN (x)", output: "bool[1, 64, 128]" },
    Probe { name: "Pad:reflect", node: "Pad <mode = \"reflect\"> (x, pads)", output: "T[1, 66, 130]" },
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

/// The operators that the provider of `run` has no right kernels for, in half precision too if `half`
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
    let of = format!("{engine}, {} {}, {}", run.load.provider, run.load.device, crate::runner::VERSION);
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

/// The operators of `probes` that another provider runs, or that compute something else than on the CPU.
fn run_probes(run: &RunOptions, path: &Path, probes: &[&Probe], half: bool) -> anyhow::Result<BTreeSet<String>> {
    fs::write(path, model(probes, half)?.to_bytes())?;
    let inputs = BenchInputs::Random(InputSpec::default());
    let measured = Measurement { run, models: &[path], inputs: &inputs, seconds: 0.0 };
    let profile = measured.profiles()?.into_iter().next().context("nothing was profiled")?;
    let left: BTreeSet<&str> = profile.placement.left.iter().map(|node| node.name.as_str()).collect();
    let cpu = LoadOptions { provider: "cpu".to_owned(), device: 0, ..run.load.clone() };
    let on = |options| ModelOn { path, options };
    let claim = Claim::Within { rtol: if half { HALF } else { FULL } };
    let inputs = Inputs::Random(InputSpec::default());
    let verdict = Runner::alone(run)?.child().verify(on(&cpu), on(&run.load), &inputs, claim)?;
    let Verdict::Compared(report) = verdict else { anyhow::bail!("{}", verdict.describe()) };
    let wrong = |at: usize| {
        let output = format!("y{at}");
        let line = report.comparison.outputs.iter().find(|line| line.name == output);
        line.is_none_or(|line| line.limit.is_some_and(|limit| line.rel_l2.is_nan() || line.rel_l2 > limit))
    };
    let lacking = |at: usize| left.contains(label(at).as_str()) || wrong(at);
    Ok(probes.iter().enumerate().filter(|&(at, _)| lacking(at)).map(|(_, probe)| probe.name.to_owned()).collect())
}

/// Relative L2 errors beyond which a kernel computes something else than the CPU's.
const FULL: f64 = 1e-3;
const HALF: f64 = 2e-2;

/// The name of a probe's node.
fn label(at: usize) -> String {
    format!("probe_{at}")
}

/// A model of one node of each, and one that every provider has a kernel for: one that takes nothing is an error.
fn model(probes: &[&Probe], half: bool) -> anyhow::Result<lathe_ir::Model> {
    let element = if half { "float16" } else { "float" };
    // Spread over both signs, and no two rows alike.
    let numbers = |count: usize| {
        let number = |at: usize| format!("{:.4}", ((at * 37 + at / 101) % 101) as f64 / 500.0 - 0.1);
        (0..count).map(number).collect::<Vec<_>>().join(", ")
    };
    let outputs: Vec<String> =
        probes.iter().enumerate().map(|(at, probe)| format!("{} y{at}", probe.output.replace('T', element))).collect();
    let nodes: Vec<String> =
        probes.iter().enumerate().map(|(at, probe)| format!("[{}] y{at} = {}", label(at), probe.node)).collect();
    let text = format!(
        "{HEADER} g ({element}[1, 64, 128] x, {element}[1, 64, 128] z, {element}[1, 4, 64, 32] heads) =>
            ({element}[1, 64, 128] sum, {element}[1, 4, 64, 32] twice, {}) <
            {element}[128] row = {{{}}}, {element}[128, 384] wide = {{{}}}, {element}[384] wide_row = {{{}}},
            int64[1] first = {{0}}, {element}[64, 16] cosines = {{{}}}, {element}[64, 16] sines = {{{}}},
            uint8[128, 4, 16] codes = {{{}}}, {element}[512] scales = {{{}}}, int64[6] pads = {{0, 1, 1, 0, 1, 1}}
        > {{ sum = Add (x, z) twice = Add (heads, heads) {} }}",
        outputs.join(", "),
        numbers(128),
        numbers(128 * 384),
        numbers(384),
        numbers(64 * 16),
        numbers(64 * 16),
        (0..128 * 64).map(|at| (at * 41 % 256).to_string()).collect::<Vec<_>>().join(", "),
        numbers(512),
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
