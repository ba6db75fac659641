//! One node at a time: operator, version, attributes, subgraphs.

use super::CheckError;
use crate::{AttributeValue, Function, Graph, NodeId, ScopeId, imported};
use std::collections::HashSet;

pub(super) fn check(
    graph: &Graph,
    id: NodeId,
    opsets: &[(String, i64)],
    function: Option<&Function>,
) -> Result<(), CheckError> {
    let node = graph.node(id);
    let describe = || graph.describe(id);
    if node.op_type.is_empty() {
        return Err(CheckError::NoOperator { node: describe() });
    }
    let Some(version) = imported(opsets, &node.domain) else {
        return Err(CheckError::NotImported { node: describe(), domain: node.domain.clone() });
    };
    let mut names = HashSet::with_capacity(node.attributes.len());
    for attribute in &node.attributes {
        if !names.insert(attribute.name.as_str()) {
            return Err(CheckError::RepeatedAttribute { node: describe(), attribute: attribute.name.clone() });
        }
        if let AttributeValue::Reference { name, .. } = &attribute.value {
            let attribute = name.clone();
            let Some(function) = function else {
                return Err(CheckError::NotInFunction { node: describe(), attribute });
            };
            if !function.attributes.contains(name) && !function.defaults.iter().any(|d| d.name == *name) {
                return Err(CheckError::NoSuchAttribute { node: describe(), attribute });
            }
        }
    }
    if node.is_standard() {
        match node.op_type.as_str() {
            "If" => check_if(graph, id)?,
            "Loop" => check_loop(graph, id)?,
            // Before version 9 the first input of Scan holds sequence lengths.
            "Scan" if version >= 9 => check_scan(graph, id)?,
            _ => {}
        }
    }
    Ok(())
}

/// The subgraph `attribute`; `None` where the caller of the function gives it.
fn subgraph(graph: &Graph, id: NodeId, attribute: &'static str) -> Result<Option<ScopeId>, CheckError> {
    match graph.node(id).attribute(attribute) {
        Some(AttributeValue::Graph(scope)) => Ok(Some(*scope)),
        Some(AttributeValue::Reference { .. }) => Ok(None),
        _ => Err(CheckError::NoSubgraph { node: graph.describe(id), attribute }),
    }
}

fn check_if(graph: &Graph, id: NodeId) -> Result<(), CheckError> {
    let mut outputs = None;
    for attribute in ["then_branch", "else_branch"] {
        let Some(scope) = subgraph(graph, id, attribute)? else { continue };
        let wrong = |what, expected, found| {
            Err(CheckError::Arity { node: graph.describe(id), attribute, what, expected, found })
        };
        let (inputs, returned) = (graph.scope(scope).inputs().len(), graph.scope(scope).outputs().len());
        if inputs != 0 {
            return wrong("inputs", "0".to_owned(), inputs);
        }
        let asked = graph.node(id).outputs().len();
        if returned < asked {
            return wrong("outputs", format!("at least {asked}"), returned);
        }
        match outputs.replace(returned) {
            Some(other) if other != returned => return wrong("outputs", other.to_string(), returned),
            _ => {}
        }
    }
    Ok(())
}

fn check_loop(graph: &Graph, id: NodeId) -> Result<(), CheckError> {
    let Some(scope) = subgraph(graph, id, "body")? else { return Ok(()) };
    let carried = graph.node(id).inputs().len().saturating_sub(2);
    let asked = graph.node(id).outputs().len();
    arity(graph, id, scope, carried + 2, 1 + carried.max(asked))
}

fn check_scan(graph: &Graph, id: NodeId) -> Result<(), CheckError> {
    let Some(scope) = subgraph(graph, id, "body")? else { return Ok(()) };
    let inputs = graph.node(id).inputs().len();
    let scanned = graph.node(id).int("num_scan_inputs").and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
    arity(graph, id, scope, inputs, inputs.saturating_sub(scanned).max(graph.node(id).outputs().len()))
}

/// A body with exactly `inputs` inputs and at least `outputs` outputs.
fn arity(graph: &Graph, id: NodeId, scope: ScopeId, inputs: usize, outputs: usize) -> Result<(), CheckError> {
    let wrong = |what, expected, found| {
        Err(CheckError::Arity { node: graph.describe(id), attribute: "body", what, expected, found })
    };
    let (has_inputs, has_outputs) = (graph.scope(scope).inputs().len(), graph.scope(scope).outputs().len());
    if has_inputs != inputs {
        return wrong("inputs", inputs.to_string(), has_inputs);
    }
    if has_outputs < outputs {
        return wrong("outputs", format!("at least {outputs}"), has_outputs);
    }
    Ok(())
}
