//! What is said of a result whose layers compute in whole numbers: which do, why the others do not, and what the runtime makes
//! of the nodes that round.

use super::{Job, cost};
use crate::{
    PassRecord,
    compress::recipe,
    latency::Measurement,
    report::{FusedKernels, KeptNode, QuantizationReport},
};
use lathe_ir::Model;
use lathe_passes::lossy::{Recipe, layers_in_codes};
use lathe_runtime::{Profile, adds_bytes_in_32_bits};
use std::path::Path;

/// The method that it is about.
const METHOD: &str = "quantize-static";

/// Kernels of whole numbers that are not called `QLinear…`.
const KERNELS: [&str; 4] = ["QGemm", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"];

impl Job<'_> {
    /// What is said of a result in a file; `None` unless ranges of whole numbers were fixed in it.
    pub(super) fn quantization(
        &self,
        model: &Model,
        path: &Path,
        records: &[PassRecord],
        warnings: &mut Vec<String>,
    ) -> Option<QuantizationReport> {
        let acted = |record: &PassRecord| record.name == METHOD && !record.outcome.changes.is_empty();
        if !records.iter().any(acted) {
            return None;
        }
        let recipe = recipe(self.options.target, &self.options.run.load.provider);
        let layers = layers_in_codes(model, recipe);
        let cost = cost(model);
        let flops = |node: usize| cost.by_node.get(node).map_or(0, |node| node.flops) as f64;
        let coded: f64 = layers.coded.iter().map(|id| flops(id.index())).sum();
        let floats: f64 = layers.floats.iter().map(|(id, _)| flops(id.index())).sum();
        let kept = layers.floats.into_iter().map(|(id, reason)| KeptNode { node: model.graph.describe(id), reason });
        let mut fused = None;
        if recipe == Recipe::Cpu && self.options.verify {
            match self.profile(path) {
                Ok(profile) => fused = profile.as_ref().map(kernels),
                Err(error) => {
                    warnings.push(format!("which kernels the runtime makes of the result is not known: {error:#}"))
                }
            }
        }
        Some(QuantizationReport {
            recipe: name(recipe).to_owned(),
            layers: layers.coded.len(),
            share: if coded + floats > 0.0 { coded / (coded + floats) } else { 0.0 },
            kept: kept.collect(),
            fused,
            largest_code: layers.largest,
            vnni: adds_bytes_in_32_bits(),
        })
    }

    /// Where the time of a run goes, by the nodes that the runtime made of a model.
    fn profile(&self, path: &Path) -> anyhow::Result<Option<Profile>> {
        let (models, inputs) = ([path], self.timed_inputs());
        let measurement = Measurement { run: &self.options.run, models: &models, inputs: &inputs, seconds: 0.0 };
        Ok(measurement.profiles()?.into_iter().next())
    }
}

fn name(recipe: Recipe) -> &'static str {
    match recipe {
        Recipe::Cpu => "cpu",
        Recipe::TensorRt => "tensorrt",
        Recipe::OpenVino => "openvino",
        Recipe::Qnn => "qnn",
        Recipe::None => "none",
    }
}

fn kernels(profile: &Profile) -> FusedKernels {
    let mut fused = FusedKernels::default();
    for node in &profile.nodes {
        match node.op.as_str() {
            "QuantizeLinear" => fused.quantize.push(node.name.clone()),
            "DequantizeLinear" => fused.dequantize.push(node.name.clone()),
            op if op.starts_with("QLinear") || KERNELS.contains(&op) => {
                *fused.kernels.entry(op.to_owned()).or_insert(0) += 1;
            }
            _ => {}
        }
    }
    fused
}
