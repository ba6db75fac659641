//! Rebuilds tensors of sizes from as few nodes as their elements need.

use crate::{Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Rule, pat, rewrite, rule};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Graph, Model, Node, NodeId, Patch, Tensor, Use, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

/// See [`INFO`].
pub struct SimplifyShapes;

static INFO: Info = Info {
    name: "simplify-shapes",
    summary: "rebuilds tensors of sizes from as few nodes as their elements need",
    doc: "A vector or scalar of int64 whose elements are known numbers or sizes of tensors that it is computed from is \
          made anew from Shape, Slice or Gather, and Concat where that takes fewer nodes than what computed it and is \
          used by nothing else. Declines silently where it does not, and where an element is neither.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Quantity::Nodes],
    source: None,
};

impl Pass for SimplifyShapes {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

/// Nodes looked at on the way back from a vector of sizes.
const MAX_CONE: usize = 64;

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![rule(
        "rebuild-sizes",
        pat!(node: Concat|Where|Reshape|Cast|Slice|Gather|Mul|Add|Sub|Div|Max|Min|Squeeze|Unsqueeze|Expand|Shape|Size|ReduceProd|Identity(..)),
        rebuild,
    )]
}

/// Consecutive elements that one node or constant provides.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Known(Vec<i64>),
    /// The sizes of the axes from the first number up to the second.
    Sizes(ValueId, usize, usize),
}

fn rebuild(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let output = m.value("output");
    let facts = m.facts();
    m.only_if(facts.elem(output) == Some(DataType::Int64) && facts.ndim(output).is_some_and(|n| n <= 1))?;
    let elements: Option<Vec<DimExpr>> =
        facts.contents(output).and_then(|contents| contents.elements().iter().cloned().collect());
    let elements = elements.ok_or_else(Refusal::no_match)?;
    // What is known altogether is a constant, which is another pass's to fold.
    m.only_if(elements.iter().any(|e| e.as_known().is_none()))?;
    let graph = m.graph();
    let cone = cone(graph, m.root());
    let measured: BTreeSet<ValueId> =
        cone.iter().filter(|&&id| graph.node(id).is("Shape")).filter_map(|&id| graph.node(id).input(0)).collect();
    let pieces = pieces(m, &elements, &measured).ok_or_else(Refusal::no_match)?;
    let scalar = facts.ndim(output) == Some(0);
    let (shapes, cost) = cost(m, &pieces, scalar);
    let kept: BTreeSet<NodeId> = shapes.values().filter_map(|&v| graph.producer(v)).collect();
    m.only_if(cost < dying(graph, m.root(), &cone, &kept))?;
    build(m, g, &pieces, &shapes, scalar)
}

/// The nodes that `root` is computed by, itself first, as far back as sizes are measured.
fn cone(graph: &Graph, root: NodeId) -> Vec<NodeId> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&id) = found.get(next) {
        next += 1;
        let node = graph.node(id);
        if node.is("Shape") || node.is("Size") {
            continue;
        }
        for producer in node.inputs().iter().flatten().filter_map(|&v| graph.producer(v)) {
            if found.len() < MAX_CONE && !found.contains(&producer) {
                found.push(producer);
            }
        }
    }
    found
}

/// How many nodes of the cone nothing needs once the root is replaced.
fn dying(graph: &Graph, root: NodeId, cone: &[NodeId], kept: &BTreeSet<NodeId>) -> usize {
    let mut dead = BTreeSet::from([root]);
    loop {
        let before = dead.len();
        for &id in cone {
            let idle = |v: &ValueId| {
                let uses = graph.value(*v).uses();
                uses.iter().all(|u| matches!(u, Use::Node(user, _) if dead.contains(user)))
            };
            if !kept.contains(&id) && graph.node(id).outputs().iter().flatten().all(idle) {
                dead.insert(id);
            }
        }
        if dead.len() == before {
            return dead.len();
        }
    }
}

fn pieces(m: &Match, elements: &[DimExpr], measured: &BTreeSet<ValueId>) -> Option<Vec<Piece>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    while at < elements.len() {
        if let Some(known) = elements[at].as_known() {
            match pieces.last_mut() {
                Some(Piece::Known(run)) => run.push(known),
                _ => pieces.push(Piece::Known(vec![known])),
            }
            at += 1;
            continue;
        }
        // The tensor that provides the longest run from here on.
        let runs = measured.iter().flat_map(|&x| {
            let shape = m.facts().shape(x).unwrap_or_default();
            (0..shape.len()).map(move |axis| {
                let same = shape[axis..].iter().zip(&elements[at..]).take_while(|(a, b)| a == b).count();
                (same, x, axis)
            })
        });
        let (length, x, axis) =
            runs.filter(|run| run.0 > 0).max_by_key(|&(length, x, _)| (length, std::cmp::Reverse(x)))?;
        // Known sizes at the end of the run may as well join the constants that follow them.
        pieces.push(Piece::Sizes(x, axis, axis + length));
        at += length;
    }
    Some(pieces)
}

/// Existing whole `Shape`s that the pieces can use, by tensor, and how many nodes the pieces take besides.
fn cost(m: &Match, pieces: &[Piece], scalar: bool) -> (BTreeMap<ValueId, ValueId>, usize) {
    let mut shapes = BTreeMap::new();
    let mut made: BTreeSet<ValueId> = BTreeSet::new();
    let mut nodes = usize::from(pieces.len() > 1);
    for piece in pieces {
        let Piece::Sizes(x, from, to) = piece else { continue };
        let whole = !scalar && Some(to - from) == m.facts().ndim(*x);
        // A ranged Shape is one node by itself and lets the whole one go.
        let existing = existing_shape(m, *x).filter(|_| whole || scalar || m.opset() < 15);
        if let Some(shape) = existing {
            shapes.insert(*x, shape);
            nodes += usize::from(!whole);
        } else if m.opset() >= 15 && !scalar {
            nodes += 1;
        } else {
            nodes += usize::from(!whole) + usize::from(made.insert(*x));
        }
    }
    (shapes, nodes)
}

/// The output of a node of the same scope that measures all of `x`, other than the root.
fn existing_shape(m: &Match, x: ValueId) -> Option<ValueId> {
    let graph = m.graph();
    graph.value(x).uses().iter().find_map(|place| {
        let Use::Node(id, 0) = place else { return None };
        let node = graph.node(*id);
        let whole = node.is("Shape") && node.attributes.is_empty() && node.scope() == m.scope() && *id != m.root();
        node.output(0).filter(|_| whole)
    })
}

fn build(
    m: &Match,
    g: &mut Patch,
    pieces: &[Piece],
    shapes: &BTreeMap<ValueId, ValueId>,
    scalar: bool,
) -> Result<ValueId, Refusal> {
    let mut made = shapes.clone();
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        parts.push(match piece {
            Piece::Known(numbers) => g.int64s("sizes", numbers),
            Piece::Sizes(x, from, to) => {
                let whole = !scalar && Some(to - from) == m.facts().ndim(*x);
                let ranged = m.opset() >= 15 && !scalar && !whole && !shapes.contains_key(x);
                if ranged {
                    let node = Node::new("Shape").with("start", *from as i64).with("end", *to as i64);
                    g.node(node, &[*x])
                } else {
                    let shape = *made.entry(*x).or_insert_with(|| g.node(Node::new("Shape"), &[*x]));
                    match (whole, scalar) {
                        (true, _) => shape,
                        (false, true) => {
                            let axis = g.constant("axis", Tensor::from_i64s(&[], &[*from as i64]));
                            g.node(Node::new("Gather").with("axis", 0), &[shape, axis])
                        }
                        (false, false) => {
                            let axes: Vec<i64> = (*from..*to).map(|axis| axis as i64).collect();
                            let axes = g.int64s("axes", &axes);
                            g.node(Node::new("Gather").with("axis", 0), &[shape, axes])
                        }
                    }
                }
            }
        });
    }
    match parts.as_slice() {
        [] => Err(Refusal::no_match()),
        [only] => {
            if !g.makes(*only) {
                m.require_free(m.value("output"), *only)?;
            }
            Ok(*only)
        }
        _ => Ok(g.node(Node::new("Concat").with("axis", 0), &parts)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::check;

    #[test]
    fn shrinks_the_target_of_an_expanded_class_token() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (float[batch,n,8] x, float[1,1,8] cls) => (float[batch,1,8] y)
               <int64 zero = {0}, int64[1] front = {0}, int64[1] keep = {-1}, int64 minus = {-1}> {
                s = Shape (x)
                b = Gather (s, zero)
                u = Unsqueeze (b, front)
                c = Concat <axis = 0> (u, keep, keep)
                r = Reshape (c, keep)
                t = Shape (r)
                o = ConstantOfShape <value = int64[1] {1}> (t)
                f = Mul (o, minus)
                e = Equal (r, f)
                w = Where (e, o, r)
                y = Expand (cls, w)
            }";
        insta::assert_snapshot!(check(&SimplifyShapes, graph), @"
        g (float[batch,n,8] x, float[1,1,8] cls) => (float[batch,1,8] y) <
            int64 zero = {0},
            int64[1] front = {0},
            int64[1] keep = {-1},
            int64 minus = {-1},
            int64[2] r_sizes = {-1, -1},
            int64[2] w_sizes = {1, 1}
        > {
            w_1 = Shape <start = 0, end = 1> (x)
            w = Concat <axis = 0> (w_1, w_sizes)
            y = Expand (cls, w)  # float[batch,1,8]
        }
        ");
    }

    #[test]
    fn finds_the_whole_shape_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 13]>
            g (bool c, float[a,b] x, float[1] z) => (float[a,b] y) <int64 i0 = {0}, int64 i1 = {1}, int64[1] front = {0}> {
                y = If (c) <then_branch = yes () => (float[a,b] p) {
                    s = Shape (x)
                    f = Gather (s, i0)
                    h = Gather (s, i1)
                    uf = Unsqueeze (f, front)
                    uh = Unsqueeze (h, front)
                    to = Concat <axis = 0> (uf, uh)
                    p = Expand (z, to)
                }, else_branch = no () => (float[a,b] q) { q = Neg (x) }>
            }";
        insta::assert_snapshot!(check(&SimplifyShapes, graph), @"
        g (bool c, float[a,b] x, float[1] z) => (float[a,b] y) <
            int64 i0 = {0},
            int64 i1 = {1},
            int64[1] front = {0}
        > {
            y = If (c) <then_branch = yes () => (float[a,b] p) <
                int64[1] uf_axes = {0},
                int64[1] uh_axes = {1}
            > {
                s = Shape (x)
                p = Expand (z, s)  # float[a,b]
            }, else_branch = no () => (float[a,b] q) {
                q = Neg (x)  # float[a,b]
            }>  # float[a,b]
        }
        ");
    }
}
