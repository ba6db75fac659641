//! What `--auto` tried, as the report tells it.

use serde::{Deserialize, Serialize};

/// One recipe at one share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AutoPoint {
    /// What was tried: `fewer tokens`.
    pub recipe: String,
    /// The share it was asked to keep; `null` for exact passes alone.
    pub share: Option<f64>,
    /// The share that was measured; `null` where there was no result.
    pub ratio: Option<f64>,
    /// The drop of the metric on held-out samples.
    pub drop: Option<f64>,
    /// The metric.
    pub metric: Option<String>,
    /// Measured latency over that of the original; `null` where it was not timed.
    pub latency_ratio: Option<f64>,
    /// Bytes of the files over those of the original.
    pub size_ratio: Option<f64>,
    /// Operations over those of the original.
    pub flops_ratio: Option<f64>,
    /// Time of the run.
    pub seconds: f64,
    /// Whether no other point is as good in both share and drop.
    pub front: bool,
    /// Whether this is the result.
    pub chosen: bool,
    /// Why there was no result.
    pub refused: Option<String>,
    /// The model, where it was kept.
    pub file: Option<String>,
}

/// Everything that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AutoReport {
    /// What the model is like; what is found is remembered for models alike.
    pub family: String,
    /// What is to become little: `latency`, `size`, `parameters` or `flops`.
    pub measure: String,
    /// The largest drop that was allowed; `null` for any.
    pub limit: Option<f64>,
    /// Every run, in order.
    pub points: Vec<AutoPoint>,
}
