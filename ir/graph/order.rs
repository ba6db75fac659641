//! The order of nodes: each after what it needs.

use super::{Graph, NodeId, ScopeId, ValueId};
use std::collections::HashMap;

/// Nodes that need one another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{node} needs its own output: the nodes form a cycle")]
pub struct Cycle {
    /// One node of the cycle, as [`Graph::describe`] names it.
    pub node: String,
}

impl Graph {
    /// Puts the nodes of every scope in an order in which each one follows what it needs.
    ///
    /// Nodes already in order stay where they are; a node that comes too late moves to just before its first user.
    pub fn sort(&mut self) -> Result<(), Cycle> {
        for scope in self.scopes() {
            let order = self.sorted(scope)?;
            let live: Vec<ValueId> = self.initializers(scope).collect();
            let scope = &mut self.scopes[scope.index()];
            scope.nodes = order;
            scope.initializers = live;
        }
        Ok(())
    }

    /// The nodes of one scope in the order that [`Graph::sort`] would give them.
    ///
    /// No library gives this order: it leaves nodes that are in order where they are, so that a model that is written again
    /// keeps its bytes, and what a subgraph captures is needed by the node that owns it.
    pub fn sorted(&self, scope: ScopeId) -> Result<Vec<NodeId>, Cycle> {
        const WAITING: u8 = 1;
        const DONE: u8 = 2;
        let roots: Vec<NodeId> = self.nodes(scope).collect();
        let mut order = Vec::with_capacity(roots.len());
        let mut state: HashMap<NodeId, u8> = HashMap::with_capacity(roots.len());
        let mut stack: Vec<(NodeId, Vec<NodeId>)> = Vec::new();
        for root in roots {
            if state.contains_key(&root) {
                continue;
            }
            state.insert(root, WAITING);
            stack.push((root, self.needs(root, scope)));
            while let Some((node, pending)) = stack.last_mut() {
                let Some(next) = pending.pop() else {
                    state.insert(*node, DONE);
                    order.push(*node);
                    stack.pop();
                    continue;
                };
                match state.get(&next) {
                    Some(&DONE) => {}
                    Some(_) => return Err(Cycle { node: self.describe(next) }),
                    None => {
                        state.insert(next, WAITING);
                        let needs = self.needs(next, scope);
                        stack.push((next, needs));
                    }
                }
            }
        }
        Ok(order)
    }

    /// The nodes of `scope` whose outputs a node or its subgraphs read, last input first.
    fn needs(&self, id: NodeId, scope: ScopeId) -> Vec<NodeId> {
        let node = self.node(id);
        let mut values: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
        for subgraph in node.subgraphs() {
            values.extend(self.captures(subgraph));
        }
        let here = |v: ValueId| self.producer(v).filter(|&p| self.node(p).scope() == scope);
        let mut needs: Vec<NodeId> = values.into_iter().rev().filter_map(here).collect();
        needs.dedup();
        needs
    }
}
