//! Residual units: the places where a model computes `x + f(x)`, and the chains that they form.
//!
//! A *join* adds tensors of equal shape. Where one summand, the *stream*, is an ancestor of another, the *branch*, the
//! nodes between the two are a unit: without them the model still runs, with the stream handed on unchanged. Nothing in
//! the unit may be used elsewhere; other values (masks, rotary tables, conditions, caches) may enter. Reading a tensor's
//! shape is no use of it, and outputs named like key-value caches or attention maps may leave.
//!
//! What makes the difference from other sums: rotary embeddings, biases, masks and position embeddings have no summand
//! that is an ancestor of the other, or one that is constant or broadcast; sums inside an activation contain no layer.

mod chain;
pub(crate) mod flow;
pub(crate) mod kind;
mod search;
#[cfg(test)]
mod tests;

use crate::Facts;
use flow::Flow;
pub use flow::may_leave;
use lathe_ir::{Graph, Model, NodeId, ValueId};
use std::fmt;

/// A unit of [`Units`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(u32);

impl UnitId {
    /// A dense index below [`Units::len`], for side tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a unit computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnitKind {
    /// Attention of the stream to itself.
    Attention,
    /// Attention of the stream to something else.
    CrossAttention,
    /// Every token or pixel by itself.
    Mlp,
    /// Convolutions with a kernel larger than one.
    Conv,
    /// Mixes tokens or pixels in another way: pooling, a product along the token axis, a recurrence.
    Mixer,
    /// Holds other units.
    Nested,
}

impl UnitKind {
    /// Every kind, in the order of tables.
    pub const ALL: [UnitKind; 6] = [
        UnitKind::Attention,
        UnitKind::CrossAttention,
        UnitKind::Mlp,
        UnitKind::Conv,
        UnitKind::Mixer,
        UnitKind::Nested,
    ];

    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            UnitKind::Attention => "attention",
            UnitKind::CrossAttention => "cross-attention",
            UnitKind::Mlp => "mlp",
            UnitKind::Conv => "conv",
            UnitKind::Mixer => "mixer",
            UnitKind::Nested => "nested",
        }
    }
}

impl fmt::Display for UnitKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Why a unit cannot simply be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Barrier {
    /// Stride or width change between `stream_in` and `stream_out`.
    #[error("the skip is projected, so the stream changes here")]
    Projected,
}

/// What stands between the join of one unit and the stream of the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PostOp {
    /// A normalization, in one node or spelled out: a post-norm design.
    Norm,
    /// An activation such as ReLU, which leaves a stream alone that it has made.
    Activation,
    /// Only layout, casts and copies.
    Layout,
}

/// One residual unit.
#[derive(Debug, Clone)]
pub struct Unit {
    /// The node that adds the branch. To leave the unit out, its other summand takes the place of its sum.
    pub join: NodeId,
    /// The stream before the unit: what the branch is computed from.
    pub stream_in: ValueId,
    /// The stream after the unit. Of an addition of several branches: with all of them added.
    pub stream_out: ValueId,
    /// The summands that the unit computes; more than one where branches cannot be told apart.
    pub branch: Vec<ValueId>,
    /// The nodes on a path from `stream_in` to `branch`, in the order they run; the join is not among them.
    pub nodes: Vec<NodeId>,
    /// Nodes off that path that only the unit needs, in the order they run: constants, sizes, projections of side
    /// inputs, and what only leads to `outputs`.
    pub support: Vec<NodeId>,
    /// Values computed from the inputs of the model that enter from elsewhere: masks, tables, conditions, caches.
    pub side_inputs: Vec<ValueId>,
    /// Outputs of the model (caches, attention maps) that would go with the unit.
    pub outputs: Vec<ValueId>,
    /// Values of the unit whose shape is read outside of it.
    pub shape_taps: Vec<ValueId>,
    /// What it computes.
    pub kind: UnitKind,
    /// Why it cannot simply be left out.
    pub barrier: Option<Barrier>,
    /// Its chain, an index into [`Units::chains`].
    pub chain: usize,
    /// Its place in the chain, counted from 0.
    pub position: usize,
    /// What stands between the unit before it in the chain and this one.
    pub post: Option<PostOp>,
    /// The smallest unit around it.
    pub parent: Option<UnitId>,
    /// How many units are around it.
    pub depth: usize,
    /// Equal for units of equal operators and sizes.
    pub signature: u64,
    /// Partial sums between the branch and `stream_out`.
    via: Vec<ValueId>,
}

/// A sum that looks like the end of a unit and is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoUnit {
    /// The node that adds.
    pub join: NodeId,
    /// What is wrong.
    pub reason: NoUnitReason,
}

/// Why a sum is not the end of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum NoUnitReason {
    /// A value made between the stream and the sum is used elsewhere.
    #[error("a value inside is used elsewhere")]
    Escape,
    /// The summands may be broadcast against each other.
    #[error("the shapes of the summands are not known")]
    UnknownShapes,
    /// Looking further would cost too much.
    #[error("units are nested too deeply")]
    TooDeep,
}

/// The residual units of a main graph and its subgraphs. Local functions are not looked into.
#[derive(Debug, Clone, Default)]
pub struct Units {
    units: Vec<Unit>,
    chains: Vec<Vec<UnitId>>,
    rejected: Vec<NoUnit>,
    owner: Vec<Option<UnitId>>,
}

impl Units {
    /// Finds the units of a model whose facts are known.
    ///
    /// Takes time in proportion to the nodes and to how deeply units are nested. A graph with a cycle has none.
    pub fn find(model: &Model, facts: &Facts) -> Units {
        let graph = &model.graph;
        let mut units = Units { owner: vec![None; graph.node_bound()], ..Units::default() };
        let mut dynamic = vec![false; graph.value_bound()];
        for scope in graph.scopes() {
            let Some(flow) = Flow::of(graph, scope, &mut dynamic) else { return Units::default() };
            let first = units.units.len();
            search::find(&flow, facts, &mut units.units, &mut units.rejected);
            chain::nest(&flow, &mut units, first);
            chain::link(&flow, &mut units, first);
        }
        units
    }

    /// How many units there are.
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// A unit.
    pub fn get(&self, id: UnitId) -> &Unit {
        &self.units[id.index()]
    }

    /// Every unit, in the order in which their sums are computed.
    pub fn iter(&self) -> impl Iterator<Item = (UnitId, &Unit)> {
        self.units.iter().enumerate().map(|(index, unit)| (UnitId(index as u32), unit))
    }

    /// The chains: units each of which goes on where the one before ended, first to last.
    pub fn chains(&self) -> &[Vec<UnitId>] {
        &self.chains
    }

    /// The innermost unit that a node belongs to: as one of its nodes, its support or its join.
    pub fn of_node(&self, node: NodeId) -> Option<UnitId> {
        self.owner.get(node.index()).copied().flatten()
    }

    /// Sums that look like the end of a unit and are none.
    pub fn rejected(&self) -> &[NoUnit] {
        &self.rejected
    }

    /// How many units make one block of a chain: the smallest period at which four fifths of its units repeat in
    /// operators and sizes; `None` if the chain does not repeat.
    pub fn period(&self, chain: usize) -> Option<usize> {
        let of: Vec<u64> = self.chains.get(chain)?.iter().map(|&id| self.get(id).signature).collect();
        (1..=of.len() / 2).find(|&period| {
            let pairs = of.len() - period;
            let equal = of.iter().zip(&of[period..]).filter(|(a, b)| a == b).count();
            equal * 5 >= pairs * 4
        })
    }

    /// A name for a unit: the part that the names of its nodes have in common, else the name of its stream.
    pub fn label(&self, graph: &Graph, id: UnitId) -> String {
        let unit = self.get(id);
        let mut names = unit.nodes.iter().map(|&n| graph.node(n).name.as_str()).filter(|name| !name.is_empty());
        let mut common = names.next().unwrap_or_default();
        for name in names {
            let same = common.char_indices().zip(name.chars()).find(|((_, a), b)| a != b);
            let end = same.map_or(common.len().min(name.len()), |((at, _), _)| at);
            common = common.get(..end).unwrap_or_default();
        }
        // A common prefix ends with a whole part of the path.
        let whole = common.rfind(['/', '.']).map_or("", |end| &common[..end]);
        let whole = whole.trim_matches(['/', '.']);
        if whole.is_empty() { graph.value(unit.stream_out).name.clone() } else { whole.to_owned() }
    }
}
