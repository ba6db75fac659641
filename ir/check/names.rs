//! No name means two values where both could be seen.

use super::CheckError;
use crate::{Graph, ScopeId, ValueId};
use std::collections::HashSet;

enum Step {
    Enter(ScopeId),
    Leave(ScopeId),
}

pub(super) fn check(graph: &Graph) -> Result<(), CheckError> {
    let mut visible: HashSet<&str> = HashSet::new();
    let mut steps = vec![Step::Enter(ScopeId::MAIN)];
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(scope) => defined(graph, scope).for_each(|v| _ = visible.remove(graph.value(v).name.as_str())),
            Step::Enter(scope) => {
                for value in defined(graph, scope) {
                    let name = graph.value(value).name.as_str();
                    let in_graph = || graph.scope(scope).name.clone();
                    if name.is_empty() {
                        return Err(CheckError::Unnamed { graph: in_graph() });
                    }
                    if !visible.insert(name) {
                        return Err(CheckError::Ambiguous { name: name.to_owned(), graph: in_graph() });
                    }
                }
                steps.push(Step::Leave(scope));
                steps.extend(graph.nodes(scope).flat_map(|id| graph.node(id).subgraphs()).map(Step::Enter));
            }
        }
    }
    Ok(())
}

/// The values that a scope itself defines.
fn defined(graph: &Graph, scope: ScopeId) -> impl Iterator<Item = ValueId> + '_ {
    let made = graph.nodes(scope).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    graph.scope(scope).inputs().iter().copied().chain(graph.initializers(scope)).chain(made)
}
