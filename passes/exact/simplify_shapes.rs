//! Rebuilds tensors of sizes from as few nodes as their elements need.

use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
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
    doc: "A vector or scalar of int64 whose elements are known numbers or sizes of tensors that it is computed from, or of \
          inputs of the graph, is made anew from Shape, Slice or Gather, and Concat where that takes fewer nodes than \
          what computed it and is used by nothing else: tensors that are only measured go too. Sizes that an input has \
          are measured there, so that equal sizes of many tensors become one. Declines silently where nodes would not \
          become fewer, and where an element is neither.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for SimplifyShapes {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

/// Nodes looked at on the way back from a vector of sizes.
const MAX_CONE: usize = 64;

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule(
            "rebuild-sizes",
            pat!(node: Concat|Where|Reshape|Cast|Slice|Gather|Mul|Add|Sub|Div|Max|Min|Squeeze|Unsqueeze|Expand|Shape|Size|ReduceProd|Identity(..)),
            rebuild,
        ),
        rule("measure-input", pat!(node: Shape(x)), |m, g| {
            let (input, axis, length) = input_with(m, "output", "x")?;
            if Some(length) == m.facts().ndim(input) {
                return Ok(g.node(Node::new("Shape"), &[input]));
            }
            m.only_if(m.opset() >= 15)?;
            let node = Node::new("Shape").with("start", axis as i64).with("end", (axis + length) as i64);
            Ok(g.node(node, &[input]))
        }),
        rule("measure-input", pat!(node: Gather(shape: Shape(x), _)), |m, g| {
            m.only_if(m.facts().ndim(m.value("output")) == Some(0))?;
            let (input, axis, _) = input_with(m, "output", "x")?;
            // Without another Shape of the input there would be one more.
            let shape = existing_shape(m, input).ok_or(Refusal::NoMatch)?;
            let index = g.constant("axis", Tensor::from_i64s(&[], &[axis as i64]));
            Ok(g.node(Node::new("Gather").with("axis", 0), &[shape, index]))
        })
        .sharing(),
    ]
}

/// The first input of the graph that has these sizes one after another, from which axis on, and how many they are. No
/// match where they are read off an input already.
fn input_with(m: &Match, sizes: &str, measured: &str) -> Result<(ValueId, usize, usize), Refusal> {
    let inputs = m.graph().main().inputs();
    m.only_if(!inputs.contains(&m.value(measured)))?;
    let contents = m.facts().contents(m.value(sizes)).ok_or(Refusal::NoMatch)?;
    let sizes: Vec<DimExpr> = contents.elements().iter().cloned().collect::<Option<_>>().ok_or(Refusal::NoMatch)?;
    m.only_if(sizes.iter().any(|size| size.as_known().is_none()))?;
    let place = |&input: &ValueId| {
        let axis = m.facts().shape(input)?.windows(sizes.len()).position(|run| run == sizes)?;
        Some((input, axis, sizes.len()))
    };
    inputs.iter().find_map(place).ok_or(Refusal::NoMatch)
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
    let elements = elements.ok_or(Refusal::NoMatch)?;
    // What is known altogether is a constant, which is another pass's to fold.
    m.only_if(elements.iter().any(|e| e.as_known().is_none()))?;
    let graph = m.graph();
    let (cone, data) = cone(graph, m.root());
    let measured = cone.iter().filter(|&&id| graph.node(id).is("Shape")).filter_map(|&id| graph.node(id).input(0));
    let measured: BTreeSet<ValueId> = measured.chain(graph.main().inputs().iter().copied()).collect();
    let producer = |x: ValueId| graph.producer(x);
    // What is computed only to be measured goes where other tensors have its sizes.
    let lasting: BTreeSet<ValueId> =
        measured.iter().copied().filter(|&x| producer(x).is_none_or(|id| !data.contains(&id))).collect();
    let scalar = facts.ndim(output) == Some(0);
    let ways = [&lasting, &measured].into_iter().filter_map(|measured| {
        let pieces = pieces(m, &elements, measured)?;
        let (shapes, cost) = cost(m, &pieces, scalar);
        let tensors = pieces.iter().filter_map(|piece| match piece {
            Piece::Sizes(x, ..) => Some(*x),
            Piece::Known(_) => None,
        });
        let kept: BTreeSet<NodeId> = shapes.values().copied().chain(tensors).filter_map(producer).collect();
        let saved = dying(graph, m.root(), &cone, &kept).checked_sub(cost).filter(|&saved| saved > 0)?;
        Some((saved, pieces, shapes))
    });
    // Of equal ones the first.
    let best = ways.reduce(|best, way| if way.0 > best.0 { way } else { best });
    let (_, pieces, shapes) = best.ok_or(Refusal::NoMatch)?;
    build(m, g, &pieces, &shapes, scalar)
}

/// The nodes that `root` is computed by, itself first, as far back as sizes are measured, and what is computed only to be
/// measured; and which of them those last ones are.
fn cone(graph: &Graph, root: NodeId) -> (Vec<NodeId>, BTreeSet<NodeId>) {
    let mut found = vec![root];
    let mut data = BTreeSet::new();
    let mut next = 0;
    while let Some(&id) = found.get(next) {
        next += 1;
        let node = graph.node(id);
        let measures = node.is("Shape") || node.is("Size") || data.contains(&id);
        for &value in node.inputs().iter().flatten() {
            let Some(producer) = graph.producer(value) else { continue };
            let inside = |u: &Use| matches!(u, Use::Node(user, _) if found.contains(user));
            let only_here = || graph.value(value).uses().iter().all(inside);
            if found.len() < MAX_CONE && !found.contains(&producer) && (!measures || only_here()) {
                found.push(producer);
                if measures {
                    data.insert(producer);
                }
            }
        }
    }
    (found, data)
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
        [] => Err(Refusal::NoMatch),
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
    fn what_is_only_measured_goes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (int64[B,S] ids, float[1] one) => (float[B,1,S] y) <int64[2] a12 = {1, 2}, int64[2] a01 = {0, 1}, int64 zero = {0}, int64 step = {1}> {
                sh = Shape (ids)
                b = Gather (sh, zero)
                n = Gather (sh, step)
                rows = Range (zero, b, step)
                keys = Range (zero, n, step)
                r = Unsqueeze (rows, a12)
                k = Unsqueeze (keys, a01)
                both = Max (r, k)
                to = Shape (both)
                y = Expand (one, to)
            }";
        insta::assert_snapshot!(check(&SimplifyShapes, graph), @r#"
        g (int64[B,S] ids, float[1] one) => (float[B,1,S] y) <
            int64[2] a12 = {1, 2},
            int64[2] a01 = {0, 1},
            int64 zero = {0},
            int64 step = {1},
            int64[1] to_sizes = {1}
        > {
            to_1 = Shape <start = 0, end = 1> (ids)
            to_2 = Shape <start = 1, end = 2> (ids)
            to = Concat <axis = 0> (to_1, to_sizes, to_2)
            y = Expand (one, to)  # float[B,1,S]
        }
        "#);
        // What something else reads stays, and then nothing is won.
        let read = graph
            .replace("float[B,1,S] y)", "float[B,1,S] y, int64[B,1,S] z)")
            .replace("to = Shape", "z = Neg (both) to = Shape");
        crate::testing::check_untouched(&SimplifyShapes, &read);
    }

    #[test]
    fn equal_sizes_are_measured_in_one_place() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
            g (float[B,S,8] x, float[1] one, float[8,8] w) => (float[S,B] y, float[B,S,8] z, int64 n, int64[2] r) <int64 i1 = {1}, int64 i2 = {2}> {
                h = MatMul (x, w)
                s = Shape <start = 1, end = 2> (h)
                b = Shape <start = 0, end = 1> (h)
                to = Concat <axis = 0> (s, b)
                y = Expand (one, to)
                all = Shape (h)
                z = Expand (one, all)
                t = Transpose (h)
                whole = Shape (t)
                n = Gather (whole, i1)
                r = Shape <start = 0, end = 2> (t)
            }";
        insta::assert_snapshot!(check(&SimplifyShapes, graph), @r#"
        g (float[B,S,8] x, float[1] one, float[8,8] w) => (float[S,B] y, float[B,S,8] z, int64 n, int64[2] r) <
            int64 i1 = {1},
            int64 i2 = {2},
            int64 n_axis = {1},
            int64[1] r_sizes = {8}
        > {
            s = Shape <start = 1, end = 2> (x)
            b = Shape <start = 0, end = 1> (x)
            to = Concat <axis = 0> (s, b)
            y = Expand (one, to)  # float[S,B]
            all = Shape (x)
            z = Expand (one, all)  # float[B,S,8]
            n = Gather <axis = 0> (all, n_axis)  # int64
            r_1 = Shape <start = 1, end = 2> (x)
            r = Concat <axis = 0> (r_sizes, r_1)  # int64[2]
        }
        "#);
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
