//! How data flows through one scope: what depends on inputs, what is needed, and through which nodes everything passes.

use lathe_ir::{Graph, NodeId, Origin, ScopeId, Use, ValueId};

/// The nodes of one scope in the order they run, with the edges that carry data.
///
/// An edge carries data if its value depends on an input of the model and the node reads more than its shape.
pub(crate) struct Flow<'a> {
    pub graph: &'a Graph,
    pub scope: ScopeId,
    pub order: Vec<NodeId>,
    /// The place of a node of this scope in `order`, by node index.
    place: Vec<u32>,
    /// For each place the values that carry data to it, captures of its subgraphs included.
    pub reads: Vec<Vec<ValueId>>,
    /// Whether what a node makes carries data to an output that is not a cache or an attention map.
    pub needed: Vec<bool>,
    /// The nodes that everything a node makes must pass form a tree; these are its intervals.
    first: Vec<u32>,
    size: Vec<u32>,
}

const NOWHERE: u32 = u32::MAX;

/// Whether an operator reads only the shape (or type) of this input.
pub(crate) fn reads_shape(graph: &Graph, id: NodeId, input: usize) -> bool {
    match graph.node(id).op_type.as_str() {
        "Shape" | "Size" | "EyeLike" | "RandomNormalLike" | "RandomUniformLike" => true,
        "CastLike" => input == 1,
        _ => false,
    }
}

/// Whether an output of the main graph is by its name a cache or an attention map, which may go with its unit.
pub fn may_leave(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["present", "past", "cache", "attn", "attention", "key_value", "kv_"].iter().any(|part| name.contains(part))
}

impl<'a> Flow<'a> {
    /// Looks at one scope; `dynamic` must hold the values of the scopes around it that depend on inputs, and learns
    /// those of this one. `None` if the nodes form a cycle.
    pub fn of(graph: &'a Graph, scope: ScopeId, dynamic: &mut [bool]) -> Option<Flow<'a>> {
        let order = graph.sorted(scope).ok()?;
        for &input in graph.scope(scope).inputs() {
            dynamic[input.index()] = scope != ScopeId::MAIN || graph.value(input).initializer().is_none();
        }
        let mut place = vec![NOWHERE; graph.node_bound()];
        let mut reads = Vec::with_capacity(order.len());
        for (at, &id) in order.iter().enumerate() {
            place[id.index()] = at as u32;
            let node = graph.node(id);
            let direct = node.inputs().iter().enumerate().filter(|(i, _)| !reads_shape(graph, id, *i));
            let mut read: Vec<ValueId> = direct.filter_map(|(_, v)| *v).collect();
            for inner in node.subgraphs() {
                read.extend(graph.captures(inner));
            }
            read.retain(|v| dynamic[v.index()]);
            for value in node.outputs().iter().flatten() {
                dynamic[value.index()] = !read.is_empty();
            }
            reads.push(read);
        }
        let mut flow =
            Flow { graph, scope, order, place, reads, needed: Vec::new(), first: Vec::new(), size: Vec::new() };
        let leaving = flow.mark_needed();
        flow.build_tree(&leaving);
        Some(flow)
    }

    /// The place of the node of this scope that makes a value.
    pub fn made_at(&self, value: ValueId) -> Option<usize> {
        match self.graph.value(value).origin() {
            Origin::Node(id, _) => self.place_of(id),
            _ => None,
        }
    }

    /// The place of a node of this scope.
    pub fn place_of(&self, id: NodeId) -> Option<usize> {
        self.place.get(id.index()).filter(|&&p| p != NOWHERE).map(|&p| p as usize)
    }

    /// The node of this scope that a node is, or in one of whose subgraphs it lies.
    pub fn lift(&self, mut id: NodeId) -> Option<usize> {
        loop {
            if let Some(at) = self.place_of(id) {
                return Some(at);
            }
            id = self.graph.scope(self.graph.node(id).scope()).owner()?;
        }
    }

    /// Marks the nodes that outputs need; returns those that make an output.
    fn mark_needed(&mut self) -> Vec<bool> {
        let outputs = self.graph.scope(self.scope).outputs();
        let stays = |v: &&ValueId| self.scope != ScopeId::MAIN || !may_leave(&self.graph.value(**v).name);
        let mut roots: Vec<usize> = outputs.iter().filter(stays).filter_map(|&v| self.made_at(v)).collect();
        if roots.is_empty() {
            roots = outputs.iter().filter_map(|&v| self.made_at(v)).collect();
        }
        let mut leaving = vec![false; self.order.len()];
        self.needed = vec![false; self.order.len()];
        for root in roots {
            (leaving[root], self.needed[root]) = (true, true);
        }
        for at in (0..self.order.len()).rev().filter(|&at| !self.reads[at].is_empty()) {
            if self.needed[at] {
                for &value in &self.reads[at] {
                    if let Some(maker) = self.made_at(value) {
                        self.needed[maker] = true;
                    }
                }
            }
        }
        leaving
    }

    /// Computes for every node the nearest one that all its data must pass, from last to first; the end comes after all.
    ///
    /// These are the immediate dominators of the edges turned round. The nodes are in order already, so one round does; and
    /// a value that is read throughout, as a mask is, has its readers meet by jumps. petgraph's `simple_fast` walks to the
    /// meeting place one node at a time, which is quadratic there.
    fn build_tree(&mut self, leaving: &[bool]) {
        let count = self.order.len();
        let mut users: Vec<Vec<u32>> = vec![Vec::new(); count];
        for at in (0..count).filter(|&at| self.needed[at]) {
            for &value in &self.reads[at] {
                if let Some(maker) = self.made_at(value) {
                    users[maker].push(at as u32);
                }
            }
        }
        let mut tree = Tree { up: vec![count; count + 1], jump: vec![count; count + 1], depth: vec![0; count + 1] };
        for at in (0..count).rev() {
            let mut next = if leaving[at] { Some(count) } else { None };
            for &user in &users[at] {
                next = Some(next.map_or(user as usize, |n| tree.meet(n, user as usize)));
            }
            tree.hang(at, next.unwrap_or(count));
        }
        self.size = vec![1; count + 1];
        for at in 0..count {
            self.size[tree.up[at]] += self.size[at];
        }
        self.first = vec![0; count + 1];
        let mut free = vec![1; count + 1];
        for at in (0..count).rev() {
            let up = tree.up[at];
            self.first[at] = free[up];
            free[up] += self.size[at];
            free[at] = self.first[at] + 1;
        }
    }

    /// Whether everything that the node at `at` makes and an output needs passes the node at `gate`.
    pub fn passes(&self, at: usize, gate: usize) -> bool {
        let (start, at) = (self.first[gate], self.first[at]);
        start <= at && at - start < self.size[gate]
    }

    /// Whether all uses of a value are nodes of this scope (or nested in them) that `test` accepts.
    pub fn all_users(&self, value: ValueId, test: impl Fn(usize) -> bool) -> bool {
        self.graph.value(value).uses().iter().all(|u| match u {
            Use::Node(id, _) => self.lift(*id).is_some_and(&test),
            Use::Output(scope, _) => self.graph.scope(*scope).owner().and_then(|id| self.lift(id)).is_some_and(&test),
            Use::Annotation(_) => true,
        })
    }
}

/// A tree in which the common ancestor of two nodes is found in logarithmic time, by jumps (Myers 1983).
struct Tree {
    up: Vec<usize>,
    jump: Vec<usize>,
    depth: Vec<u32>,
}

impl Tree {
    fn hang(&mut self, node: usize, up: usize) {
        let (j, jj) = (self.jump[up], self.jump[self.jump[up]]);
        self.up[node] = up;
        self.depth[node] = self.depth[up] + 1;
        self.jump[node] = if self.depth[up] - self.depth[j] == self.depth[j] - self.depth[jj] { jj } else { up };
    }

    fn meet(&self, mut a: usize, mut b: usize) -> usize {
        if self.depth[a] < self.depth[b] {
            std::mem::swap(&mut a, &mut b);
        }
        while self.depth[a] > self.depth[b] {
            a = if self.depth[self.jump[a]] >= self.depth[b] { self.jump[a] } else { self.up[a] };
        }
        while a != b {
            let apart = self.jump[a] != self.jump[b];
            (a, b) = if apart { (self.jump[a], self.jump[b]) } else { (self.up[a], self.up[b]) };
        }
        a
    }
}
