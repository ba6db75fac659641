//! What the report says of quantized key-value caches.

use super::KeptNode;
use serde::{Deserialize, Serialize};

/// Caches in other numbers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CacheReport {
    /// `int8` or `int4`.
    pub dtype: String,
    /// `per channel` or `per tensor`.
    pub scales: String,
    /// Attentions whose cache changed.
    pub nodes: usize,
    /// Attentions with a cache that stays.
    pub kept: Vec<KeptNode>,
    /// Inputs, then outputs of the model that changed.
    pub ports: Vec<CachePort>,
    /// Bytes that one position of one sequence took in the caches that changed.
    pub bytes_before: u64,
    /// Bytes that it takes now.
    pub bytes_after: u64,
    /// How caches were compared with those of the original; `null` where nothing was run.
    pub compared: Option<String>,
    /// The bound on the relative L2 error of every output.
    pub limit: f64,
}

/// An input or output that changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CachePort {
    /// Its name.
    pub name: String,
    /// Its type in the original: `float[batch,3,past,64]`.
    pub before: String,
    /// Its type now: `int8[batch,3,past,64]`.
    pub after: String,
}

impl CacheReport {
    /// One sentence for people.
    pub(crate) fn describe(&self) -> String {
        let kept = match self.kept.len() {
            0 => String::new(),
            count => format!(", {count} caches stay"),
        };
        let change = self.ports.first().map_or_else(String::new, |port| {
            let like = if self.ports.len() > 1 { ", as all of them" } else { "" };
            format!("`{}` was {} and is {}{like}", port.name, port.before, port.after)
        });
        format!(
            "caches: {} with scales {} in {} attentions{kept}; a position takes {} bytes in place of {}; {} inputs and outputs \
             change their type: {change}",
            self.dtype,
            self.scales,
            self.nodes,
            self.bytes_after,
            self.bytes_before,
            self.ports.len(),
        )
    }
}
