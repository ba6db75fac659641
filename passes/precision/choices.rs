//! What hangs on choices: outputs that another order of nearly equal candidates changes, and the candidates themselves.

use lathe_analysis::{Facts, downstream};
use lathe_ir::{DataType, Model, NodeId, ScopeId, ValueId};
use std::collections::BTreeSet;

/// Operators that choose: one candidate in the place of another changes all that comes of it.
const CHOOSING: &[&str] = &["ArgMax", "ArgMin", "NonMaxSuppression", "TopK"];

/// The choices of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choices {
    /// Positions of the outputs that are computed of what is chosen.
    pub outputs: BTreeSet<usize>,
    /// The float32 values that are chosen among, as far as they hang on no other choice.
    pub candidates: Vec<ValueId>,
}

impl Choices {
    /// Of the main graph.
    pub fn of(model: &Model) -> Choices {
        let graph = &model.graph;
        let facts = Facts::infer(model);
        let choosing = graph.nodes(ScopeId::MAIN).filter(|&id| CHOOSING.contains(&graph.node(id).op_type.as_str()));
        let choosing: Vec<NodeId> = choosing.collect();
        let mut behind: BTreeSet<ValueId> = BTreeSet::new();
        for &id in &choosing {
            for &value in graph.node(id).outputs().iter().flatten() {
                behind.insert(value);
                let reached = downstream(graph, value);
                let nodes = graph.nodes(ScopeId::MAIN).filter(|&id| reached.contains(id));
                behind.extend(nodes.flat_map(|id| graph.node(id).outputs().iter().flatten().copied()));
            }
        }
        let outputs = graph.main().outputs().iter().enumerate();
        let read = choosing.iter().flat_map(|&id| graph.node(id).inputs().iter().flatten().copied());
        let open = |value: &ValueId| {
            facts.elem(*value) == Some(DataType::Float) && graph.constant(*value).is_none() && !behind.contains(value)
        };
        let candidates: BTreeSet<ValueId> = read.filter(open).collect();
        Choices {
            outputs: outputs.filter(|(_, value)| behind.contains(value)).map(|(at, _)| at).collect(),
            candidates: candidates.into_iter().collect(),
        }
    }
}
