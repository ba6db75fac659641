//! The allocator's plan as the report tells it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What was chosen at every site, and how far it goes within the budgets.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// `pareto`, `ilp` or `greedy`.
    pub solver: String,
    /// `optimal`, `gap` or `time limit`.
    pub status: String,
    /// How far the objective may be from the least, as a share of it; 0 where it is optimal.
    pub gap: f64,
    /// The predicted loss.
    pub objective: f64,
    /// A loss that no plan within the budgets is below.
    pub bound: f64,
    /// Seconds that the solver took.
    pub seconds: f64,
    /// Every quantity that is limited: `size`, `parameters`, `flops`, `latency`.
    pub budget: BTreeMap<String, BudgetRow>,
    /// What the written file takes of every quantity that is known, by the same names: bytes, numbers, operations and
    /// milliseconds.
    pub used: BTreeMap<String, f64>,
    /// What the sites take of it, as planned.
    pub sites: SitesTake,
    /// What was chosen, one for every site.
    pub choices: Vec<PlanChoice>,
    /// The residual units of the model in order, and what was done to each.
    pub units: Vec<PlanUnit>,
    /// What other tools would do, with every layer alike.
    #[serde(default)]
    pub alternatives: Vec<Alternative>,
}

/// A plain alternative to a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// What it does with every layer.
    pub name: String,
    /// What it takes of every limited quantity, as a share of the original.
    pub takes: BTreeMap<String, f64>,
    /// What it loses: a squared relative L2 error, or a divergence in nats.
    pub loses: f64,
    /// Whether it was carried out and all of that measured; otherwise it is predicted.
    pub measured: bool,
    /// Whether it keeps to the budgets.
    pub keeps: bool,
}

/// A limited quantity. Figures are bytes, numbers, floating-point operations or milliseconds of the whole model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BudgetRow {
    /// What is left of the original at most, as a share.
    pub limit: f64,
    /// What that is.
    pub allowed: f64,
    /// What the result takes.
    pub used: f64,
    /// That as a share of the original.
    pub share: f64,
}

/// What all sites take together. Names and attributes of nodes are not part of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SitesTake {
    /// Bytes in the file.
    pub bytes: u64,
    /// Elements of constants.
    pub parameters: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Nanoseconds, where latency is limited.
    pub latency_ns: u64,
}

/// An option that was chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanChoice {
    /// The site, after its weight or its first node.
    pub site: String,
    /// The option, in words.
    pub option: String,
    /// The method that offers it; `null` where the site stays as it is.
    pub method: Option<String>,
    /// What it takes.
    pub cost: PlanCost,
    /// What it adds to the predicted loss.
    pub error: f64,
}

/// What an option takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanCost {
    /// Bytes in the file.
    pub bytes: u64,
    /// Elements of constants.
    pub parameters: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Milliseconds, where latency is limited.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub latency_ms: Option<f64>,
}

/// A residual unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanUnit {
    /// The unit; `null` for everything that is in none.
    pub unit: Option<String>,
    /// Its kind.
    pub kind: String,
    /// Its share of the operations of the model.
    pub flops_share: f64,
    /// The options that were chosen inside it.
    pub got: Vec<String>,
}
