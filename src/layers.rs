//! Where the cost of a model is, node by node, for the report.

use lathe_analysis::Cost;
use lathe_ir::{Model, ScopeId};
use serde::{Deserialize, Serialize};

/// Nodes that the report lists.
const MOST: usize = 64;

/// One node of the result that computes or holds weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerLine {
    /// The node's name, or that of its first output if it has none.
    pub name: String,
    /// The operator, with its domain if that is not the standard one.
    pub op: String,
    /// Floating-point operations in one run; 1 multiply-add is 2.
    pub flops: u64,
    /// Bytes of the constants that it is the first to read.
    pub weight_bytes: u64,
    /// The relative L2 error of its output; `null` where it was not measured.
    pub error: Option<f64>,
}

/// The nodes of the main graph with the largest share of FLOPs or of weight bytes, in the model's order.
pub(crate) fn largest(model: &Model, cost: &Cost) -> Vec<LayerLine> {
    let graph = &model.graph;
    let mut found = Vec::new();
    for id in graph.nodes(ScopeId::MAIN) {
        let own = cost.by_node[id.index()];
        let share = |part: u64, all: u64| part as f64 / all.max(1) as f64;
        let weight = share(own.flops, cost.flops).max(share(own.weight_bytes, cost.weight_bytes));
        if weight == 0.0 {
            continue;
        }
        let node = graph.node(id);
        let first = || node.outputs().iter().flatten().next().map(|v| graph.value(*v).name.clone());
        let line = LayerLine {
            name: if node.name.is_empty() { first().unwrap_or_default() } else { node.name.clone() },
            op: if node.is_standard() { node.op_type.clone() } else { format!("{}.{}", node.domain, node.op_type) },
            flops: own.flops,
            weight_bytes: own.weight_bytes,
            error: None,
        };
        found.push((found.len(), weight, line));
    }
    found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    found.truncate(MOST);
    found.sort_by_key(|(place, _, _)| *place);
    found.into_iter().map(|(_, _, line)| line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_analysis::{Bindings, Facts};

    #[test]
    fn layers_add_up_to_the_model() {
        let model = lathe_ir::text::parse(
            "<ir_version: 8, opset_import: [\"\": 17]>
            g (float[2,3] x) => (float[2,2] y, float[2,2] z) <float[3,2] w = {1,2,3,4,5,6}> {
                [first] h = MatMul (x, w)
                y = Relu (h)
                z = MatMul (x, w)
            }",
        )
        .unwrap();
        let cost = Cost::of(&model, &Facts::infer(&model), &Bindings::default());
        let layers = largest(&model, &cost);
        let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["first", "y", "z"]);
        assert_eq!(layers.iter().map(|l| l.flops).sum::<u64>(), cost.flops);
        // Weights that two nodes share are counted once.
        assert_eq!(layers.iter().map(|l| l.weight_bytes).collect::<Vec<_>>(), [24, 0, 0]);
    }
}
