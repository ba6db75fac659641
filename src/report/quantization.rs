//! What the report says of layers that compute in whole numbers of fixed ranges.

use super::KeptNode;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Layers in whole numbers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct QuantizationReport {
    /// For what `QuantizeLinear` and `DequantizeLinear` stand where they do: `cpu`, `tensorrt`, `openvino` or `qnn`.
    pub recipe: String,
    /// Layers that read codes.
    pub layers: usize,
    /// Their share of the multiply-adds of all layers.
    pub share: f64,
    /// Layers that read floats, and why.
    pub kept: Vec<KeptNode>,
    /// What the runtime made of it; `null` where it was not run where it is for.
    pub fused: Option<FusedKernels>,
    /// The largest code of a weight.
    pub largest_code: u8,
    /// Whether this processor adds products of bytes in 32 bits (VNNI); `null` where all of its kind do.
    pub vnni: Option<bool>,
}

/// The graph that the runtime made of the result.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FusedKernels {
    /// Kernels of whole numbers by their operator.
    pub kernels: BTreeMap<String, usize>,
    /// `QuantizeLinear` nodes that are part of none.
    pub quantize: Vec<String>,
    /// `DequantizeLinear` nodes that are part of none.
    pub dequantize: Vec<String>,
}

/// Codes of weights up to this keep sums of 16 bits from overflowing.
const SAFE: u8 = 64;

impl QuantizationReport {
    /// One sentence for people.
    pub(crate) fn describe(&self) -> String {
        let layers = self.layers + self.kept.len();
        let mut text = format!(
            "whole numbers: {} of {layers} layers, {:.0} % of their multiply-adds, for {}",
            self.layers,
            100.0 * self.share,
            self.recipe
        );
        if let Some(fused) = &self.fused {
            let kernels: usize = fused.kernels.values().sum();
            let plural = if kernels == 1 { "" } else { "s" };
            text.push_str(&format!(
                "; {kernels} kernel{plural} of whole numbers, {} QuantizeLinear and {} DequantizeLinear outside of them",
                fused.quantize.len(),
                fused.dequantize.len()
            ));
        }
        if self.recipe == "cpu" {
            text.push_str(&format!("; {}", self.processor()));
        }
        text
    }

    /// What the range of weights means on this processor and on others.
    pub(crate) fn processor(&self) -> String {
        let own = match self.vnni {
            Some(true) => "this processor has VNNI",
            Some(false) => "this processor has no VNNI",
            None => "this processor adds products of bytes in 32 bits",
        };
        match (self.largest_code <= SAFE, self.vnni) {
            (true, Some(false)) => format!("weights are within ±{SAFE}, as processors without VNNI need; {own}"),
            (true, _) => {
                format!(
                    "weights are within ±{SAFE} for processors without VNNI; {own}, and quantize-static.cpus=vnni uses ±127"
                )
            }
            (false, Some(false)) => {
                format!("weights go up to ±{}, and {own}: sums may overflow here", self.largest_code)
            }
            (false, _) => {
                format!("weights go up to ±{}: {own}, and x86 processors without VNNI may overflow", self.largest_code)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_tells_kernels_and_what_processors_do() {
        let fused = FusedKernels {
            kernels: [("QLinearConv".to_owned(), 3), ("QGemm".to_owned(), 1)].into(),
            quantize: vec!["in".to_owned()],
            dequantize: Vec::new(),
        };
        let kept = KeptNode { node: "a".to_owned(), reason: "b".to_owned() };
        let report = QuantizationReport {
            recipe: "cpu".to_owned(),
            layers: 4,
            share: 0.954,
            kept: vec![kept],
            fused: Some(fused),
            largest_code: 64,
            vnni: Some(true),
        };
        assert_eq!(
            report.describe(),
            "whole numbers: 4 of 5 layers, 95 % of their multiply-adds, for cpu; 4 kernels of whole numbers, 1 QuantizeLinear \
             and 0 DequantizeLinear outside of them; weights are within ±64 for processors without VNNI; this processor has \
             VNNI, and quantize-static.cpus=vnni uses ±127"
        );
        let with = |largest_code, vnni| QuantizationReport { largest_code, vnni, ..report.clone() }.processor();
        assert!(with(127, Some(false)).ends_with("sums may overflow here"));
        assert!(
            with(127, Some(true)).contains("this processor has VNNI, and x86 processors without VNNI may overflow")
        );
        assert!(with(64, Some(false)).contains("as processors without VNNI need"));
        assert!(with(127, None).contains("adds products of bytes in 32 bits"));
        let elsewhere = QuantizationReport { recipe: "qnn".to_owned(), fused: None, ..report };
        assert!(elsewhere.describe().ends_with("for qnn"));
    }
}
