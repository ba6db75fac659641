//! Which operators of ONNX Runtime's own domain are slower than the nodes they take the place of.
//!
//! [`MEASURED`] holds what `optimize doctor --kernels` found on one machine; what it finds on this one is kept in the data
//! folder and comes first. Passes ask through [`lathe_passes::PassContext::slow_kernels`].

mod missing;

pub(crate) use missing::missing;

use crate::{RunOptions, latency::Measurement, runner};
use anyhow::{Context as _, anyhow};
use lathe_ir::text;
use lathe_runtime::{BenchInputs, InputSpec, provider_name};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fs, io::Write as _, path::PathBuf};

/// An operator, and a model with it beside one without.
struct Kernel {
    name: &'static str,
    /// The header of both models: inputs, outputs and constants.
    head: &'static str,
    plain: &'static str,
    fused: &'static str,
}

/// Sizes are open, so that ONNX Runtime does not write the operators itself.
const KERNELS: &[Kernel] = &[
    Kernel {
        name: "SkipLayerNormalization",
        head: "(float[B,S,384] x, float[B,S,384] z) => (float[B,S,384] y, float[B,S,384] sum) <int64[1] n = {384}>",
        plain: "g = ConstantOfShape <value = float[1] {1.5}> (n) sum = Add (x, z)
            y = LayerNormalization <axis = -1, epsilon = 1e-5> (sum, g, g)",
        fused: "g = ConstantOfShape <value = float[1] {1.5}> (n)
            y, \"\", \"\", sum = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (x, z, g, g)",
    },
    Kernel {
        name: "SkipSimplifiedLayerNormalization",
        head: "(float[B,S,384] x, float[B,S,384] z) => (float[B,S,384] y, float[B,S,384] sum) <int64[1] n = {384}>",
        plain: "g = ConstantOfShape <value = float[1] {1.5}> (n) sum = Add (x, z)
            y = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5> (sum, g)",
        fused: "g = ConstantOfShape <value = float[1] {1.5}> (n)
            y, \"\", \"\", sum = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (x, z, g)",
    },
    Kernel {
        name: "MultiHeadAttention",
        head: "(float[B,S,384] x, float[B,S,384] z, float[1,1,S,S] mask) => (float[B,S,384] y)
            <int64[4] heads = {0, 0, 12, 32}, int64[3] join = {0, 0, 384}, float scale = {0.177}>",
        plain: "q3 = Reshape (x, heads) q = Transpose <perm = [0, 2, 1, 3]> (q3)
            k3 = Reshape (z, heads) k = Transpose <perm = [0, 2, 3, 1]> (k3) v = Transpose <perm = [0, 2, 1, 3]> (k3)
            s = MatMul (q, k) t = Mul (s, scale) u = Add (t, mask) p = Softmax <axis = -1> (u)
            c = MatMul (p, v) d = Transpose <perm = [0, 2, 1, 3]> (c) y = Reshape (d, join)",
        fused: "y = com.microsoft.MultiHeadAttention <num_heads = 12, scale = 0.177> (x, z, z, \"\", \"\", mask)",
    },
    Kernel {
        name: "Attention",
        head: "(float[B,S,384] x, float[1,1,S,S] mask) => (float[B,S,384] y)
            <int64[2] one = {384, 384}, int64[2] all = {384, 1152}, int64[1] n = {384}, int64[1] m = {1152}>",
        plain: "w = ConstantOfShape <value = float[1] {0.01}> (one) b = ConstantOfShape <value = float[1] {0.1}> (n)
            q0 = MatMul (x, w) q = Add (q0, b) w2 = ConstantOfShape <value = float[1] {0.02}> (one)
            k0 = MatMul (x, w2) k = Add (k0, b) w3 = ConstantOfShape <value = float[1] {0.03}> (one)
            v0 = MatMul (x, w3) v = Add (v0, b)
            y = com.microsoft.MultiHeadAttention <num_heads = 12, scale = 0.177> (q, k, v, \"\", \"\", mask)",
        fused: "w = ConstantOfShape <value = float[1] {0.01}> (all) b = ConstantOfShape <value = float[1] {0.1}> (m)
            y = com.microsoft.Attention <num_heads = 12, scale = 0.177> (x, w, b, \"\", \"\", mask)",
    },
];

/// How an operator compares on an execution provider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    /// The execution provider.
    pub provider: String,
    /// The operator.
    pub kernel: String,
    /// Its time over that of the nodes.
    pub ratio: f64,
    /// The runtime, with its version.
    pub runtime: String,
}

impl Verdict {
    /// Whether the operator is not worth its place.
    pub(crate) fn is_slower(&self) -> bool {
        self.ratio > EQUAL
    }
}

/// One thread, ONNX Runtime 1.32: provider, operator, and its time over that of the nodes.
const MEASURED: &[(&str, &str, f64)] = &[
    ("cpu", "Attention", 0.97),
    ("cpu", "MultiHeadAttention", 0.98),
    ("cpu", "SkipLayerNormalization", 4.2),
    ("cpu", "SkipSimplifiedLayerNormalization", 1.0),
];

/// What differs by less is equal: two sessions of one model differ by as much.
const EQUAL: f64 = 1.05;

/// The operators that are slower on `provider`, which may be `NAME=path` of a plugin.
pub(crate) fn slower(provider: &str) -> BTreeSet<String> {
    choose(provider, kept().unwrap_or_default())
}

fn choose(provider: &str, kept: Vec<Verdict>) -> BTreeSet<String> {
    let provider = provider_name(provider);
    let found: Vec<Verdict> = kept.into_iter().filter(|v| v.provider == provider).collect();
    let here = |kernel: &str| found.iter().any(|v| v.kernel == kernel);
    let default = MEASURED.iter().filter(|(at, kernel, _)| *at == provider && !here(kernel));
    let default = default.map(|&(_, kernel, ratio)| (kernel, ratio));
    let all = found.iter().map(|v| (v.kernel.as_str(), v.ratio)).chain(default);
    all.filter(|&(_, ratio)| ratio > EQUAL).map(|(kernel, _)| kernel.to_owned()).collect()
}

fn file() -> Option<PathBuf> {
    folder_file("kernels.json")
}

/// A file of the data folder.
fn folder_file(name: &str) -> Option<PathBuf> {
    Some(runner::data_dir()?.join(name))
}

fn kept() -> Option<Vec<Verdict>> {
    serde_json::from_str(&fs::read_to_string(file()?).ok()?).ok()
}

/// Measures every operator beside the nodes it takes the place of, and keeps what was found.
pub(crate) fn measure(options: &RunOptions) -> anyhow::Result<Vec<Verdict>> {
    let folder = tempfile::tempdir()?;
    let mut found = Vec::new();
    for kernel in KERNELS {
        let mut paths = Vec::new();
        for (name, body) in [("plain", kernel.plain), ("fused", kernel.fused)] {
            let path = folder.path().join(format!("{name}.onnx"));
            fs::write(&path, model(kernel, body)?.to_bytes())?;
            paths.push(path);
        }
        let sizes = |name: &str, sizes: &[usize]| (name.to_owned(), sizes.to_vec());
        let inputs = [sizes("x", &[1, 128, 384]), sizes("z", &[1, 128, 384]), sizes("mask", &[1, 1, 128, 128])];
        let shapes = inputs.into_iter().filter(|(name, _)| kernel.head.contains(&format!("] {name}"))).collect();
        let inputs = BenchInputs::Random(InputSpec { shapes, ..InputSpec::default() });
        let models: Vec<&std::path::Path> = paths.iter().map(PathBuf::as_path).collect();
        let latency = Measurement { run: options, models: &models, inputs: &inputs, seconds: 2.0 }.run(&mut |_| {})?;
        found.push(Verdict {
            provider: provider_name(&options.load.provider).into_owned(),
            kernel: kernel.name.to_owned(),
            ratio: latency.ratio.ok_or_else(|| anyhow!("the two models of `{}` were not timed", kernel.name))?,
            runtime: latency.runtime,
        });
    }
    keep(&found)?;
    Ok(found)
}

/// What was found takes the place of what was kept of the same provider.
fn keep(found: &[Verdict]) -> anyhow::Result<()> {
    let file = file().ok_or_else(|| anyhow!("there is no data folder: HOME is not set"))?;
    let same = |v: &Verdict| found.iter().any(|f| f.provider == v.provider && f.kernel == v.kernel);
    let mut all: Vec<Verdict> = kept().unwrap_or_default().into_iter().filter(|v| !same(v)).collect();
    all.extend_from_slice(found);
    let folder = file.parent().expect("the file lies in the data folder");
    fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let text = serde_json::to_string_pretty(&all)?;
    lathe_ir::write_whole(&file, |out| out.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write `{}`", file.display()))
}

fn model(kernel: &Kernel, body: &str) -> anyhow::Result<lathe_ir::Model> {
    let opsets = r#"<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>"#;
    text::parse(&format!("{opsets} g {} {{ {body} }}", kernel.head)).map_err(|error| anyhow!("{error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_is_slow_where() {
        assert!(choose("cpu", Vec::new()).contains("SkipLayerNormalization"));
        assert!(!choose("cpu", Vec::new()).contains("MultiHeadAttention"));
        assert!(choose("cuda", Vec::new()).is_empty());
    }

    #[test]
    fn what_was_measured_here_comes_first() {
        let verdict = |provider: &str, kernel: &str, ratio: f64| Verdict {
            provider: provider.to_owned(),
            kernel: kernel.to_owned(),
            ratio,
            runtime: String::new(),
        };
        let kept = vec![verdict("cpu", "SkipLayerNormalization", 0.9), verdict("cuda", "Attention", 1.2)];
        assert!(choose("cpu", kept.clone()).is_empty());
        assert_eq!(choose("cuda=/lib/plugin.so", kept), ["Attention".to_owned()].into());
    }

    #[test]
    fn both_models_of_a_kernel_are_valid() {
        for kernel in KERNELS {
            for body in [kernel.plain, kernel.fused] {
                model(kernel, body).unwrap().check().unwrap();
            }
        }
    }
}
