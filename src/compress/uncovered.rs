//! What of a model no method offers anything for, by operator.

use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{Model, NodeId, ScopeId, Use, ValueId};
use lathe_passes::{
    Quantity,
    lossy::{SMALLEST, Site, weights},
};
use std::collections::{BTreeMap, BTreeSet};

/// Shares of a quantity that are told of where a budget cannot be kept.
const WORTH_TELLING: f64 = 0.05;

/// Nodes of one operator that stay as they are, with the constants that they read.
#[derive(Debug, Clone, Default)]
pub(super) struct Uncovered {
    pub operator: String,
    pub nodes: usize,
    /// Why the largest of the constants is no weight that methods know, where it is none.
    pub reason: Option<&'static str>,
    bytes: f64,
    parameters: f64,
    flops: f64,
}

impl Uncovered {
    /// Its share of all there is.
    pub fn share(&self, quantity: Quantity) -> f64 {
        match quantity {
            Quantity::Size => self.bytes,
            Quantity::Parameters => self.parameters,
            // How long it takes is not known apart; it is told by its operations.
            Quantity::Flops | Quantity::Latency => self.flops,
        }
    }
}

/// What is in none of these sites, the operator with most bytes first.
pub(super) fn uncovered(model: &Model, offered: &[&Site]) -> Vec<Uncovered> {
    let graph = &model.graph;
    let covered: BTreeSet<ValueId> = offered.iter().flat_map(|site| site.footprint.iter().copied()).collect();
    let touched: BTreeSet<NodeId> = offered.iter().flat_map(|site| site.nodes.iter().copied()).collect();
    let reasons: BTreeMap<ValueId, &'static str> = weights(graph).1.into_iter().collect();
    let cost = Cost::of(model, &Facts::infer(model), &Bindings::default());
    let mut found: BTreeMap<&str, Uncovered> = BTreeMap::new();
    let mut nodes: BTreeMap<&str, BTreeSet<NodeId>> = BTreeMap::new();
    let mut largest: BTreeMap<&str, u64> = BTreeMap::new();
    for value in graph.initializers(ScopeId::MAIN).filter(|value| !covered.contains(value)) {
        let Some(tensor) = graph.constant(value) else { continue };
        let readers = graph.value(value).uses().iter().filter_map(|place| match *place {
            Use::Node(id, _) => Some(id),
            _ => None,
        });
        // Transpositions and the like stand between a constant and what it is for.
        let Some(id) = readers.map(|id| behind(model, id)).next() else { continue };
        let operator = graph.node(id).op_type.as_str();
        let own = found.entry(operator).or_default();
        own.bytes += tensor.byte_len() as f64 / cost.weight_bytes.max(1) as f64;
        if tensor.dtype().is_float() {
            own.parameters += tensor.len() as f64 / cost.parameters.max(1) as f64;
        }
        nodes.entry(operator).or_default().insert(id);
        let most = largest.entry(operator).or_default();
        if tensor.byte_len() as u64 > *most {
            *most = tensor.byte_len() as u64;
            let small = (tensor.len() < SMALLEST).then_some("constants of fewer than 4,096 numbers");
            own.reason = reasons.get(&value).copied().or(small);
        }
    }
    for id in graph.nodes(ScopeId::MAIN).filter(|id| !touched.contains(id)) {
        let flops = cost.by_node.get(id.index()).map_or(0, |node| node.flops);
        let operator = graph.node(id).op_type.as_str();
        if flops > 0 {
            found.entry(operator).or_default().flops += flops as f64 / cost.flops.max(1) as f64;
            nodes.entry(operator).or_default().insert(id);
        }
    }
    let named = found.into_iter().map(|(operator, uncovered)| Uncovered {
        operator: operator.to_owned(),
        nodes: nodes.get(operator).map_or(0, BTreeSet::len),
        ..uncovered
    });
    named.collect()
}

/// What takes much of a quantity, as the end of a sentence.
pub(super) fn describe(all: &[Uncovered], quantity: Quantity) -> String {
    let mut large: Vec<&Uncovered> = all.iter().filter(|u| u.share(quantity) >= WORTH_TELLING).collect();
    large.sort_by(|a, b| b.share(quantity).total_cmp(&a.share(quantity)));
    let what = match quantity {
        Quantity::Size => "bytes of constants",
        Quantity::Parameters => "parameters",
        Quantity::Flops | Quantity::Latency => "FLOPs",
    };
    let one = |uncovered: &&Uncovered| {
        let (percent, nodes) = (100.0 * uncovered.share(quantity), uncovered.nodes);
        let plural = if nodes == 1 { "" } else { "s" };
        let reason = uncovered.reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        format!("{nodes} {} node{plural} ({percent:.0} % of the {what}{reason})", uncovered.operator)
    };
    match large.is_empty() {
        true => String::new(),
        false => format!("; no method handles {}", large.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

/// The node that reads what a chain of layout operators makes.
fn behind(model: &Model, mut id: NodeId) -> NodeId {
    let graph = &model.graph;
    for _ in 0..4 {
        let node = graph.node(id);
        let layout = ["Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "DequantizeLinear"];
        let next = node.output(0).filter(|_| layout.iter().any(|op| node.is(op))).and_then(|output| {
            graph.value(output).uses().iter().find_map(|place| match *place {
                Use::Node(id, _) => Some(id),
                _ => None,
            })
        });
        match next {
            Some(next) => id = next,
            None => break,
        }
    }
    id
}
