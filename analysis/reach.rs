//! What nodes are computed from, and what is computed from them.
//!
//! [`NodeGraph`] shows petgraph's algorithms the graph as it is, without a copy. What has to keep an order that is a
//! contract (`Graph::sorted`), or is asked for the nearest gate of every node (`units/flow.rs`), has its own code beside it.

use lathe_ir::{Graph, NodeId, Use, ValueId};
use petgraph::{
    Direction,
    algo::has_path_connecting,
    visit::{Dfs, GraphBase, GraphRef, IntoNeighbors, IntoNeighborsDirected, Reversed, VisitMap, Visitable},
};

/// A graph as nodes, each with an edge to every node that reads one of its outputs. A node that captures a value for its
/// subgraphs reads it.
#[derive(Clone, Copy)]
pub(crate) struct NodeGraph<'a>(pub &'a Graph);

/// Nodes, of which each is in or not.
#[derive(Debug, Clone)]
pub struct NodeSet(Vec<bool>);

impl NodeSet {
    fn of(graph: &Graph) -> NodeSet {
        NodeSet(vec![false; graph.node_bound()])
    }

    /// Whether a node is in.
    pub fn contains(&self, id: NodeId) -> bool {
        self.0.get(id.index()).copied().unwrap_or(false)
    }
}

impl VisitMap<NodeId> for NodeSet {
    fn visit(&mut self, id: NodeId) -> bool {
        !std::mem::replace(&mut self.0[id.index()], true)
    }

    fn is_visited(&self, id: &NodeId) -> bool {
        self.contains(*id)
    }

    fn unvisit(&mut self, id: NodeId) -> bool {
        std::mem::replace(&mut self.0[id.index()], false)
    }
}

impl GraphBase for NodeGraph<'_> {
    type NodeId = NodeId;
    type EdgeId = (NodeId, NodeId);
}

impl GraphRef for NodeGraph<'_> {}

impl Visitable for NodeGraph<'_> {
    type Map = NodeSet;

    fn visit_map(&self) -> NodeSet {
        NodeSet::of(self.0)
    }

    fn reset_map(&self, map: &mut NodeSet) {
        *map = NodeSet::of(self.0);
    }
}

impl IntoNeighbors for NodeGraph<'_> {
    type Neighbors = std::vec::IntoIter<NodeId>;

    fn neighbors(self, id: NodeId) -> Self::Neighbors {
        self.neighbors_directed(id, Direction::Outgoing)
    }
}

impl IntoNeighborsDirected for NodeGraph<'_> {
    type NeighborsDirected = std::vec::IntoIter<NodeId>;

    fn neighbors_directed(self, id: NodeId, direction: Direction) -> Self::NeighborsDirected {
        let (graph, node) = (self.0, self.0.node(id));
        let all: Vec<NodeId> = match direction {
            Direction::Outgoing => node.outputs().iter().flatten().flat_map(|&value| readers(graph, value)).collect(),
            Direction::Incoming => {
                let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
                let read = node.inputs().iter().flatten().copied().chain(captured);
                read.filter_map(|value| graph.producer(value)).collect()
            }
        };
        all.into_iter()
    }
}

/// The nodes that read a value: themselves, and as owners of the subgraphs in which it is read.
fn readers(graph: &Graph, value: ValueId) -> Vec<NodeId> {
    let mut readers = Vec::new();
    for place in graph.value(value).uses() {
        let (reader, mut scope) = match *place {
            Use::Node(id, _) => (Some(id), graph.node(id).scope()),
            Use::Output(scope, _) => (None, scope),
            Use::Annotation(_) => continue,
        };
        readers.extend(reader);
        // Every node around it reads the value, up to the scope that the value lives in.
        while graph.scope_of(value) != Some(scope) {
            let Some(owner) = graph.scope(scope).owner() else { break };
            readers.push(owner);
            scope = graph.node(owner).scope();
        }
    }
    readers
}

/// The nodes that values are computed from.
pub fn upstream(graph: &Graph, values: impl IntoIterator<Item = ValueId>) -> NodeSet {
    let makers = values.into_iter().filter_map(|value| graph.producer(value)).collect();
    let mut walk = Dfs::from_parts(makers, NodeSet::of(graph));
    let backward = Reversed(NodeGraph(graph));
    while walk.next(backward).is_some() {}
    walk.discovered
}

/// The nodes that are computed from a value.
pub fn downstream(graph: &Graph, value: ValueId) -> NodeSet {
    let mut walk = Dfs::from_parts(readers(graph, value), NodeSet::of(graph));
    while walk.next(NodeGraph(graph)).is_some() {}
    walk.discovered
}

/// Whether a value is computed from what a node gives, or is what it gives.
pub fn comes_from(graph: &Graph, value: ValueId, node: NodeId) -> bool {
    let view = NodeGraph(graph);
    graph.producer(value).is_some_and(|maker| has_path_connecting(view, node, maker, None))
}

/// A node that `test` holds for among a node and what is computed from it, if there is one.
pub fn find_downstream(graph: &Graph, from: NodeId, test: impl Fn(NodeId) -> bool) -> Option<NodeId> {
    let view = NodeGraph(graph);
    let mut walk = Dfs::new(view, from);
    std::iter::from_fn(|| walk.next(view)).find(|&id| test(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::ScopeId;

    fn names(graph: &Graph, set: &NodeSet) -> Vec<String> {
        let inside = graph.all_nodes().into_iter().filter(|&id| set.contains(id));
        inside.map(|id| graph.node(id).name.clone()).collect()
    }

    #[test]
    fn what_depends_on_what() {
        let model = lathe_ir::text::parse(
            "<ir_version: 8, opset_import: [\"\": 17]>
            g (float[2] x, float[2] z, bool c) => (float[2] y, float[2] w) {
                [a] h = Relu (x)
                [b] k = Neg (z)
                [if] y = If (c) <
                    then_branch = t () => (float[2] p) { [inner] q = Exp (h) [last] p = Abs (q) },
                    else_branch = e () => (float[2] r) { [other] r = Identity (k) }
                >
                [c] w = Add (k, k)
            }",
        )
        .unwrap();
        let graph = &model.graph;
        let value = |name: &str| graph.find_value(name).unwrap();
        let node = |name: &str| *graph.all_nodes().iter().find(|&&id| graph.node(id).name == name).unwrap();
        assert_eq!(names(graph, &downstream(graph, value("h"))), ["if", "inner", "last"]);
        assert_eq!(names(graph, &downstream(graph, value("k"))), ["if", "c", "other"]);
        assert_eq!(names(graph, &upstream(graph, [value("y")])), ["a", "b", "if"]);
        assert_eq!(names(graph, &upstream(graph, [value("x"), value("w")])), ["b", "c"]);
        assert!(comes_from(graph, value("y"), node("b")) && comes_from(graph, value("w"), node("c")));
        assert!(!comes_from(graph, value("w"), node("a")) && !comes_from(graph, value("x"), node("a")));
        let reached = |op: &str| find_downstream(graph, node("b"), |id| graph.node(id).is(op));
        assert_eq!((reached("Add"), reached("Exp"), reached("Neg")), (Some(node("c")), None, Some(node("b"))));
        assert!(graph.nodes(ScopeId::MAIN).all(|id| comes_from(graph, graph.node(id).output(0).unwrap(), id)));
    }
}
