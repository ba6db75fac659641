//! When values are needed: first and last use, and nodes that nothing needs.

use lathe_ir::{Graph, NodeId, Origin, ScopeId, Use, ValueId};

/// When the values of one scope come to be and are last needed, counted in nodes of that scope.
///
/// A subgraph needs what it captures as long as the node it belongs to runs.
#[derive(Debug, Clone)]
pub struct Liveness {
    order: Vec<NodeId>,
    made: Vec<Option<usize>>,
    last: Vec<Option<usize>>,
}

impl Liveness {
    /// Looks at one scope in the order its nodes run; `None` if they form a cycle.
    pub fn of(graph: &Graph, scope: ScopeId) -> Option<Liveness> {
        let order = graph.sorted(scope).ok()?;
        let mut made = vec![None; graph.value_bound()];
        let mut last: Vec<Option<usize>> = vec![None; graph.value_bound()];
        for &value in graph.scope(scope).inputs() {
            made[value.index()] = Some(0);
        }
        for (at, &id) in order.iter().enumerate() {
            let node = graph.node(id);
            for value in node.inputs().iter().flatten() {
                last[value.index()] = Some(at);
            }
            for inner in node.subgraphs() {
                for value in graph.captures(inner) {
                    last[value.index()] = Some(at);
                }
            }
            for value in node.outputs().iter().flatten() {
                made[value.index()] = Some(at);
            }
        }
        for &value in graph.scope(scope).outputs() {
            last[value.index()] = Some(order.len());
        }
        Some(Liveness { order, made, last })
    }

    /// The nodes in the order they run.
    pub fn order(&self) -> &[NodeId] {
        &self.order
    }

    /// The position of the node that makes a value of this scope; 0 for its inputs, `None` for constants.
    pub fn made_at(&self, value: ValueId) -> Option<usize> {
        self.made.get(value.index()).copied().flatten()
    }

    /// The position of the last node that needs a value; the number of nodes for an output of the scope.
    pub fn last_use(&self, value: ValueId) -> Option<usize> {
        self.last.get(value.index()).copied().flatten()
    }
}

/// The nodes, in every scope, that no output of the main graph depends on, in a fixed order.
///
/// What a needed node's subgraphs return counts as needed. Nodes inside a dead node's subgraphs are listed as well.
pub fn dead_nodes(graph: &Graph) -> Vec<NodeId> {
    let mut needed = vec![false; graph.node_bound()];
    let mut pending: Vec<ValueId> = graph.main().outputs().to_vec();
    while let Some(value) = pending.pop() {
        let Origin::Node(id, _) = graph.value(value).origin() else { continue };
        if std::mem::replace(&mut needed[id.index()], true) {
            continue;
        }
        let node = graph.node(id);
        pending.extend(node.inputs().iter().flatten());
        for scope in node.subgraphs() {
            pending.extend(graph.scope(scope).outputs());
        }
    }
    graph.all_nodes().into_iter().filter(|id| !needed[id.index()]).collect()
}

/// The initializers, in every scope, that nothing uses, in a fixed order.
pub fn unused_initializers(graph: &Graph) -> Vec<ValueId> {
    let used =
        |value: &ValueId| graph.value(*value).uses().iter().any(|u| !matches!(u, Use::Annotation(v) if v == value));
    graph.scopes().into_iter().flat_map(|scope| graph.initializers(scope)).filter(|v| !used(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::Node;

    #[test]
    fn finds_lifetimes_and_dead_nodes() {
        let mut graph = Graph::new("g");
        let main = ScopeId::MAIN;
        let x = graph.add_value("x", None);
        graph.add_input(main, x);
        let a = graph.append(main, Node::new("Relu"), &[x], "a");
        let unused = graph.append(main, Node::new("Neg"), &[x], "unused");
        let mut bodies = Vec::new();
        let mut spares = Vec::new();
        for name in ["then_branch", "else_branch"] {
            let body = graph.add_scope(name);
            let inner = graph.append(body, Node::new("Abs"), &[a], "inner");
            spares.push(graph.append(body, Node::new("Abs"), &[a], "spare"));
            graph.add_output(body, inner);
            bodies.push((name, body));
        }
        let condition = graph.append(main, Node::new("Constant").with("value_int", 1), &[], "condition");
        let mut node = Node::new("If");
        for (name, body) in bodies {
            node.attributes.push(lathe_ir::Attribute {
                name: name.into(),
                value: lathe_ir::AttributeValue::Graph(body),
                doc: String::new(),
            });
        }
        let y = graph.append(main, node, &[condition], "y");
        graph.add_output(main, y);
        let live = Liveness::of(&graph, main).unwrap();
        assert_eq!(live.made_at(a), Some(0));
        assert_eq!(live.last_use(a), Some(3));
        assert_eq!(live.last_use(y), Some(4));
        assert_eq!(live.last_use(unused), None);
        let dead = [unused, spares[0], spares[1]].map(|v| graph.producer(v).unwrap());
        assert_eq!(dead_nodes(&graph), dead);
    }
}
