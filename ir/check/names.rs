//! Every use of a value is a use of its name, as the file writes it.

use super::CheckError;
use crate::{Graph, ScopeId, ValueId};
use std::collections::HashMap;

enum Step {
    Enter(ScopeId),
    Leave(ScopeId),
}

/// Checks that names are unique within each scope, and that wherever a value is used, the innermost value of its name
/// is that very value. A name that hides another one is otherwise harmless, and real models have them.
pub(super) fn check(graph: &Graph) -> Result<(), CheckError> {
    // For each name the values that have it in the scopes around the current place, innermost last.
    let mut visible: HashMap<&str, Vec<ValueId>> = HashMap::new();
    let mut steps = vec![Step::Enter(ScopeId::MAIN)];
    while let Some(step) = steps.pop() {
        let scope = match step {
            Step::Enter(scope) => scope,
            Step::Leave(scope) => {
                for value in defined(graph, scope) {
                    visible.get_mut(graph.value(value).name.as_str()).and_then(Vec::pop);
                }
                continue;
            }
        };
        let here = || graph.scope(scope).name.clone();
        for value in defined(graph, scope) {
            let name = graph.value(value).name.as_str();
            if name.is_empty() {
                return Err(CheckError::Unnamed { graph: here() });
            }
            let same = visible.entry(name).or_default();
            if same.last().is_some_and(|&other| graph.scope_of(other) == Some(scope)) {
                return Err(CheckError::Repeated { name: name.to_owned(), graph: here() });
            }
            same.push(value);
        }
        let means = |value: ValueId| visible.get(graph.value(value).name.as_str()).and_then(|same| same.last());
        let inputs = graph.nodes(scope).flat_map(|id| graph.node(id).inputs().iter().flatten().copied());
        for value in inputs.chain(graph.scope(scope).outputs().iter().copied()) {
            if means(value) != Some(&value) {
                return Err(CheckError::Hidden { name: graph.value(value).name.clone(), graph: here() });
            }
        }
        steps.push(Step::Leave(scope));
        steps.extend(graph.nodes(scope).flat_map(|id| graph.node(id).subgraphs()).map(Step::Enter));
    }
    Ok(())
}

/// The values that a scope itself defines.
fn defined(graph: &Graph, scope: ScopeId) -> impl Iterator<Item = ValueId> + '_ {
    let made = graph.nodes(scope).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    graph.scope(scope).inputs().iter().copied().chain(graph.initializers(scope)).chain(made)
}
