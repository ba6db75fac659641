//! What the report says of half precision.

use serde::{Deserialize, Serialize};

/// The conversion to half precision.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrecisionReport {
    /// `float16` or `bfloat16`.
    pub dtype: String,
    /// Whether inputs and outputs changed too.
    pub interface: bool,
    /// Nodes that compute in it.
    pub nodes: usize,
    /// Nodes of the main graph that read or give float32 and stay in it.
    pub kept: Vec<KeptNode>,
    /// Casts that were added.
    pub casts: usize,
    /// Casts of the model that were dropped.
    pub dropped_casts: usize,
    /// Constants of attention masks that became smaller, so that two of them add up to no infinity.
    pub masks: Vec<String>,
    /// `proven on the calibration set`, or `not proven`.
    pub ranges: String,
    /// The largest relative L2 error of an output where every value is rounded; `null` where that was not run, or no output's
    /// values could be compared.
    pub simulated_error: Option<f64>,
    /// The bound on it.
    pub limit: f64,
    /// Who ran the file itself; `null` where nobody did.
    pub loaded: Option<String>,
    /// What the runtime says that has no kernels for the type.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub refused_by_runtime: Option<String>,
}

/// A node that stays in float32.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeptNode {
    /// The node.
    pub node: String,
    /// Why.
    pub reason: String,
}

impl PrecisionReport {
    /// One sentence for people.
    pub(crate) fn describe(&self) -> String {
        let kept = self.kept.len();
        let ranges = match self.ranges.as_str() {
            "not proven" => "range not proven (--calib measures it)".to_owned(),
            other => format!("ranges {other}"),
        };
        let loaded = match (&self.loaded, &self.refused_by_runtime) {
            (Some(engine), _) => format!("; {engine} loads and runs the file"),
            (None, Some(message)) => format!("; not loaded, the runtime has no kernels for it: {message}"),
            (None, None) => String::new(),
        };
        let interface = if self.interface { ", inputs and outputs too" } else { "" };
        format!(
            "{}: {} nodes compute in it{interface}, {kept} stay in float32; {} casts; {ranges}{loaded}",
            self.dtype, self.nodes, self.casts
        )
    }
}
