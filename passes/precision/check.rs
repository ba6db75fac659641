//! Whether types fit: every type variable of every node is bound once, to a type that its schema allows.

use lathe_analysis::{Facts, Formal, Schema};
use lathe_ir::{DataType, Graph, Model, NodeId, ValueId};

/// Types that do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeFault {
    /// A parameter has a type that the operator does not allow.
    #[error("{node}: `{value}` is {found}, which its operator does not allow there")]
    NotAllowed {
        /// The node.
        node: String,
        /// The value.
        value: String,
        /// Its element type.
        found: DataType,
    },
    /// Two parameters that have to be of one type are not.
    #[error("{node}: `{value}` is {found}, and `{other}`, which has to be of the same type, is {expected}")]
    TwoTypes {
        /// The node.
        node: String,
        /// One value.
        value: String,
        /// Its element type.
        found: DataType,
        /// The value before it.
        other: String,
        /// The element type of that.
        expected: DataType,
    },
    /// A type is stated that the value does not have.
    #[error("`{value}` is stated as {stated}, and is {found}")]
    Stated {
        /// The value.
        value: String,
        /// What the file says.
        stated: DataType,
        /// What it is.
        found: DataType,
    },
}

/// Checks the element types of every node whose schema is known, and those that the file states.
pub fn check_types(model: &Model) -> Result<(), TypeFault> {
    for (graph, opsets) in model.graphs() {
        let facts = Facts::of(graph, opsets, &model.functions);
        for id in graph.all_nodes() {
            check_node(graph, opsets, &facts, id)?;
        }
        for scope in graph.scopes() {
            let made = graph.nodes(scope).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
            for value in made.chain(graph.scope(scope).outputs().iter().copied()) {
                let stated = graph.value(value).ty.as_ref().and_then(lathe_ir::Type::elem);
                if let (Some(stated), Some(found)) = (stated, facts.elem(value))
                    && stated != found
                {
                    return Err(TypeFault::Stated { value: graph.value(value).name.clone(), stated, found });
                }
            }
        }
    }
    Ok(())
}

fn check_node(graph: &Graph, opsets: &[(String, i64)], facts: &Facts, id: NodeId) -> Result<(), TypeFault> {
    let node = graph.node(id);
    let version = lathe_ir::imported(opsets, &node.domain).unwrap_or(0);
    let Some(schema) = Schema::of(node, version) else { return Ok(()) };
    let inputs = node.inputs().iter().enumerate().map(|(at, value)| (*value, schema.input(at)));
    let outputs = node.outputs().iter().enumerate().map(|(at, value)| (*value, schema.output(at)));
    let mut bound: Vec<Option<(ValueId, DataType)>> = vec![None; schema.variables().len()];
    for (value, formal) in inputs.chain(outputs) {
        let (Some(value), Some(formal)) = (value, formal) else { continue };
        let Some(found) = facts.elem(value) else { continue };
        let name = |value: ValueId| graph.value(value).name.clone();
        let not_allowed = || TypeFault::NotAllowed { node: graph.describe(id), value: name(value), found };
        match formal {
            Formal::Any => {}
            Formal::Fixed(expected) if expected == found => {}
            Formal::Fixed(_) => return Err(not_allowed()),
            Formal::Variable(index) if !schema.variables()[index].allows(found) => return Err(not_allowed()),
            Formal::Variable(index) => match bound[index] {
                Some((other, expected)) if expected != found => {
                    let (node, other) = (graph.describe(id), name(other));
                    return Err(TypeFault::TwoTypes { node, value: name(value), found, other, expected });
                }
                _ => bound[index] = Some((value, found)),
            },
        }
    }
    Ok(())
}
