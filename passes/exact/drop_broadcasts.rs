//! Removes nodes that only repeat elements which every reader would repeat anyway.

use super::fold_index_arithmetic::decided;
use crate::{Editor, Error, Info, Kind, Outcome, Pass, PassContext, Refusal, Saving, edit_graphs};
use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{Graph, Model, Node, NodeId, ValueId};
use std::collections::BTreeMap;

/// See [`INFO`].
pub struct DropBroadcasts;

static INFO: Info = Info {
    name: "drop-broadcasts",
    summary: "removes Expand, Tile, And, Or and Where that only repeat elements, where readers repeat them anyway",
    doc: "An Expand, a Tile of single elements, and an And, Or or Where whose condition is certain (see fold-index-arithmetic), hands on one of its \
          inputs with elements repeated to a larger shape. Arithmetic, comparisons and Where repeat elements by themselves, \
          so the input can take its place where every value that is computed from it ends in the shape it had: the \
          mask of padding [batch, 1, 1, keys] in the place of [batch, 1, queries, keys]. Also where an index of Gather, the \
          first operand of another Expand, or a product over one element repeats them. Casts, negations and Unsqueezes may lie between. Declines where a value of \
          another shape would reach anything else, and names what that is.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes, Saving::PeakMemory],
    source: None,
};

/// Operators that broadcast all their inputs against one another, and give the same bits in whatever order they go
/// through the elements.
const BROADCASTING: &[&str] = &[
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "Sub",
    "Where",
    "Xor",
];

/// The same for one input.
const UNARY: &[&str] = &["Abs", "Cast", "Identity", "Neg", "Not"];

impl Pass for DropBroadcasts {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        edit_graphs(model, cx, drop_in)
    }
}

fn drop_in(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    let wanted =
        |graph: &Graph, id: NodeId| ["Expand", "Tile", "And", "Or", "Where"].iter().any(|op| graph.node(id).is(op));
    // Before version 7 operands are aligned by attributes.
    if lathe_ir::imported(opsets, "").unwrap_or(0) < 7 || !graph.all_nodes().iter().any(|&id| wanted(graph, id)) {
        return Ok(());
    }
    graph.sort()?;
    let mut facts = cx.facts.take(graph, opsets, functions);
    for id in graph.all_nodes() {
        if graph.get(id).is_none() || !wanted(graph, id) {
            continue;
        }
        let place = graph.describe(id);
        match narrower(graph, &facts, id) {
            Ok(Some((kept, narrowed))) => {
                let old = graph.node(id).output(0).expect("what is narrowed is an output");
                graph.replace_uses(old, kept);
                // The types that the file states for them are those of the repeated elements.
                for &(reader, value) in &narrowed {
                    graph.value_mut(value).ty = None;
                    facts.update(graph, opsets, functions, reader);
                }
                graph.remove_unused(vec![id]);
                outcome.change("drop-broadcast", place);
            }
            Ok(None) => {}
            Err(Refusal::NoMatch) => {}
            Err(Refusal::Reason(reason)) => outcome.refuse(reason, place),
        }
    }
    cx.facts.keep(graph, facts);
    Ok(())
}

/// Nodes that then compute values of a smaller shape, in order, with those values.
type Narrowed = Vec<(NodeId, ValueId)>;

/// The input that can take the place of what a node gives.
fn narrower(graph: &Graph, facts: &Facts, id: NodeId) -> Result<Option<(ValueId, Narrowed)>, Refusal> {
    let node = graph.node(id);
    let Some(output) = node.output(0) else { return Ok(None) };
    let kept = match node.op_type.as_str() {
        "Expand" | "Tile" => node.input(0),
        _ => decided(graph, facts, node),
    };
    let Some(kept) = kept else { return Ok(None) };
    let (Some(small), Some(large)) = (facts.shape(kept), facts.shape(output)) else {
        return Err("the shape of the elements or of the result is unknown".into());
    };
    // What keeps its shape is for other passes.
    if small == large {
        return Ok(None);
    }
    let one = |size: &DimExpr| size.as_known() == Some(1);
    if node.is("Tile") && small.iter().zip(large).any(|(a, b)| a != b && !one(a)) {
        return Err("the Tile repeats more than single elements".into());
    }
    let output_of = |value: ValueId, id: NodeId| match graph.is_output(value) {
        true => {
            let maker = a(&graph.node(id).op_type);
            Err(Refusal::Reason(format!("an output of the graph would lose its repeated elements, from {maker}")))
        }
        false => Ok(()),
    };
    output_of(output, id)?;
    let mut shapes: BTreeMap<ValueId, Vec<DimExpr>> = BTreeMap::from([(output, small.to_vec())]);
    let mut narrowed = Narrowed::new();
    // The subgraphs of a node follow the graph around it, and what they return counts as output.
    for reader in graph.all_nodes() {
        let node = graph.node(reader);
        if !node.inputs().iter().flatten().any(|v| shapes.contains_key(v)) {
            continue;
        }
        let stopped = || format!("the repeated elements are needed by {}", a(&node.op_type));
        let result = node.output(0).filter(|_| node.is_standard()).ok_or_else(stopped)?;
        let shape = repeated(graph, facts, reader, &shapes).ok_or_else(stopped)?;
        if facts.shape(result) != Some(shape.as_slice()) {
            output_of(result, reader)?;
            shapes.insert(result, shape);
            narrowed.push((reader, result));
        }
    }
    Ok(Some((kept, narrowed)))
}

/// `an Add`, `a Concat`.
fn a(operator: &str) -> String {
    let vowel = operator.starts_with(['A', 'E', 'I', 'O', 'U']) && !operator.starts_with("Uni");
    format!("{} {operator}", if vowel { "an" } else { "a" })
}

/// The shape that a reader gives when some of its inputs have the shapes in `shapes`.
fn repeated(
    graph: &Graph,
    facts: &Facts,
    reader: NodeId,
    shapes: &BTreeMap<ValueId, Vec<DimExpr>>,
) -> Option<Vec<DimExpr>> {
    let node = graph.node(reader);
    let shape = |index: usize| {
        let value = node.input(index)?;
        shapes.get(&value).map(Vec::as_slice).or_else(|| facts.shape(value))
    };
    let narrow = |index: usize| node.input(index).is_some_and(|v| shapes.contains_key(&v));
    match node.op_type.as_str() {
        op if BROADCASTING.contains(&op) => {
            let mut all = (0..node.inputs().len()).map(shape);
            let first = all.next()??.to_vec();
            all.try_fold(first, |a, b| broadcast(&a, b?))
        }
        op if UNARY.contains(&op) => shape(0).map(<[DimExpr]>::to_vec),
        "Unsqueeze" => unsqueezed(graph, facts, node, shape(0)?),
        "Expand" if !narrow(1) => {
            let target = facts.contents(node.input(1)?)?.elements().iter().cloned().collect::<Option<Vec<_>>>()?;
            broadcast(shape(0)?, target.iter().all(DimExpr::is_nonnegative).then_some(&target)?)
        }
        "Gather" if !narrow(0) => {
            let data = shape(0)?;
            let axis = node.int("axis").unwrap_or(0);
            let axis = usize::try_from(if axis < 0 { axis + data.len() as i64 } else { axis }).ok()?;
            Some([data.get(..axis)?, shape(1)?, data.get(axis + 1..)?].concat())
        }
        // A product over one element adds nothing up, so it is the same however the rows are grouped.
        "MatMul" => {
            let ([left @ .., rows, one], [right @ .., _, columns]) = (shape(0)?, shape(1)?) else { return None };
            let same_matrix = |index: usize| {
                let before = facts.shape(node.input(index)?)?;
                Some(before.last_chunk::<2>() == shape(index)?.last_chunk::<2>())
            };
            let batch = one.as_known() == Some(1) && same_matrix(0)? && same_matrix(1)?;
            let batches = broadcast(left, right).filter(|_| batch)?;
            Some([batches.as_slice(), &[rows.clone(), columns.clone()]].concat())
        }
        _ => None,
    }
}

/// The shape with the axes of size 1 that an Unsqueeze adds.
fn unsqueezed(graph: &Graph, facts: &Facts, node: &Node, shape: &[DimExpr]) -> Option<Vec<DimExpr>> {
    let axes = match (node.ints("axes"), node.input(1)) {
        (Some(axes), _) => axes.to_vec(),
        (None, Some(axes)) => match graph.constant(axes) {
            Some(tensor) => tensor.to_i64s()?,
            None => facts.contents(axes)?.known()?,
        },
        (None, None) => return None,
    };
    let ndim = shape.len() + axes.len();
    let added: Vec<usize> = axes
        .iter()
        .map(|&axis| usize::try_from(if axis < 0 { axis + ndim as i64 } else { axis }).ok())
        .collect::<Option<_>>()?;
    let mut rest = shape.iter().cloned();
    (0..ndim).map(|axis| if added.contains(&axis) { Some(1.into()) } else { rest.next() }).collect()
}

fn broadcast(a: &[DimExpr], b: &[DimExpr]) -> Option<Vec<DimExpr>> {
    let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
    let lead = long.len() - short.len();
    let joined = long[lead..].iter().zip(short).map(|(a, b)| a.broadcast(b));
    long[..lead].iter().cloned().map(Some).chain(joined).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_untouched};
    use insta::assert_snapshot;

    /// The mask that transformers makes: positions are never negative, so only the padding decides.
    const MASK: &str = "<ir_version: 9, opset_import: [\"\" : 17]>
        g (float[B,4,S,S] s, bool[B,1,1,S] m) => (float[B,4,S,S] y)
           <int64[1] front = {0}, int64 zero = {0}, int64 one = {1}, int64[3] axes = {0, 1, 3}, float none = {0}, float low = {-3.4e38}> {
            sh = Shape <start = 3, end = 4> (s)
            n = Squeeze (sh, front)
            r = Range (zero, n, one)
            q = Unsqueeze (r, axes)
            ge = GreaterOrEqual (q, zero)
            k = And (ge, m)
            w = Where (k, none, low)
            y = Add (s, w)
        }";

    #[test]
    fn a_mask_that_is_certainly_true_goes() {
        assert_snapshot!(check(&DropBroadcasts, MASK), @"
        g (float[B,4,S,S] s, bool[B,1,1,S] m) => (float[B,4,S,S] y) <
            int64[1] front = {0},
            int64 zero = {0},
            int64 one = {1},
            int64[3] axes = {0, 1, 3},
            float none = {0},
            float low = {-3.4e38}
        > {
            w = Where (m, none, low)
            y = Add (s, w)  # float[B,4,S,S]
        }
        ");
    }

    #[test]
    fn says_what_needs_the_repeated_elements() {
        let softmax = MASK.replace("y = Add (s, w)", "w2 = Softmax (w) y = Add (s, w2)");
        check_refuses(&DropBroadcasts, &softmax, "the repeated elements are needed by a Softmax");
        let output =
            MASK.replace("y = Add (s, w)", "y = Add (s, w) z = Not (k)").replace("=> (", "=> (bool[B,1,S,S] z, ");
        check_refuses(&DropBroadcasts, &output, "an output of the graph would lose its repeated elements, from a Not");
        check_untouched(&DropBroadcasts, &MASK.replace("k = And (ge, m)", "k = And (m, m)"));
    }

    #[test]
    fn two_narrow_values_do_not_widen_one_another() {
        let graph =
            MASK.replace("y = Add (s, w)", "w2 = Where (k, low, none) w3 = Mul (w, w2) y = Concat <axis = 1> (s, w3)");
        check_refuses(&DropBroadcasts, &graph, "the repeated elements are needed by a Concat");
    }

    #[test]
    fn expanded_positions_are_looked_up_once() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (float[B,S,2] x, int64[1,S] p) => (float[B,S,2] y) <float[5,2] table = {1,2,3,4,5,6,7,8,9,10}, int64 five = {5}> {
                q = Mod (p, five)
                sh = Shape <start = 0, end = 2> (x)
                e = Expand (q, sh)
                rows = Gather (table, e)
                y = Add (rows, x)
            }";
        assert_snapshot!(check(&DropBroadcasts, graph), @r#"
        g (float[B,S,2] x, int64[1,S] p) => (float[B,S,2] y) <
            float[5,2] table = ["elements": "10", "hash": "8a408f08"],
            int64 five = {5}
        > {
            q = Mod (p, five)
            rows = Gather (table, q)
            y = Add (rows, x)  # float[B,S,2]
        }
        "#);
    }

    #[test]
    fn a_tile_of_single_rows_goes_and_one_of_more_stays() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (float[B,S,2] x, float[1,S,2] p) => (float[B,S,2] y) <int64[2] ones = {1, 1}> {
                b = Shape <start = 0, end = 1> (x)
                times = Concat <axis = 0> (b, ones)
                n = Neg (p)
                t = Tile (n, times)
                y = Mul (x, t)
            }";
        assert_snapshot!(check(&DropBroadcasts, graph), @r#"
        g (float[B,S,2] x, float[1,S,2] p) => (float[B,S,2] y) <
            int64[2] ones = {1, 1}
        > {
            n = Neg (p)
            y = Mul (x, n)  # float[B,S,2]
        }
        "#);
        let more = graph.replace("float[1,S,2] p", "float[1,S,1] p").replace("ones = {1, 1}", "ones = {2, 2}");
        let more = more.replace("float[B,S,2] x", "float[B,T,2] x");
        check_refuses(&DropBroadcasts, &more, "the Tile repeats more than single elements");
    }

    #[test]
    fn frequencies_are_multiplied_once_per_position() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (float[B,1,S] p) => (float[B,4,S] y) <float[1,4,1] f = {1, 0.1, 0.01, 0.001}, int64[3] t = {1, 4, 1}> {
                b = Shape <start = 0, end = 1> (p)
                rest = Constant <value_ints = [4, 1]> ()
                to = Concat <axis = 0> (b, rest)
                e = Expand (f, to)
                y = MatMul (e, p)
            }";
        assert_snapshot!(check(&DropBroadcasts, graph), @"
        g (float[B,1,S] p) => (float[B,4,S] y) <
            float[1,4,1] f = {1, 0.1, 0.01, 0.001},
            int64[3] t = {1, 4, 1}
        > {
            y = MatMul (f, p)  # float[B,4,S]
        }
        ");
        let two = graph.replace("float[1,4,1] f = {1, 0.1, 0.01, 0.001}", "float[1,2,2] f = {1, 0.1, 0.01, 0.001}");
        let two = two.replace("[4, 1]", "[2, 2]").replace("[B,1,S]", "[B,2,S]").replace("[B,4,S]", "[B,2,S]");
        check_refuses(&DropBroadcasts, &two, "the repeated elements are needed by a MatMul");
    }

    #[test]
    fn axes_may_be_added_between() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (float[B,4,S] x, int64[1,S] p) => (float[B,4,S] y) <int64[1] mid = {1}, int64[2] two = {0, -1}, int64[1] front = {0}> {
                s = Shape (x)
                b = Shape <start = 0, end = 1> (x)
                n = Shape <start = 2> (x)
                to = Concat <axis = 0> (b, n)
                e = Expand (p, to)
                f = Cast <to = 1> (e)
                u = Unsqueeze (f, mid)
                y = Mul (x, u)
            }";
        assert_snapshot!(check(&DropBroadcasts, graph), @r#"
        g (float[B,4,S] x, int64[1,S] p) => (float[B,4,S] y) <
            int64[1] mid = {1},
            int64[2] two = {0, -1},
            int64[1] front = {0}
        > {
            s = Shape (x)
            f = Cast <to = 1> (p)
            u = Unsqueeze (f, mid)
            y = Mul (x, u)  # float[B,4,S]
        }
        "#);
    }

    #[test]
    fn works_in_a_branch() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17]>
            g (bool c, float[2,1] x, float[2,3] z) => (float[2,3] y) <int64[2] to = {2, 3}> {
                y = If (c) <then_branch = t () => (float[2,3] p) {
                    e = Expand (x, to)
                    n = Neg (e)
                    p = Mul (n, z)
                }, else_branch = o () => (float[2,3] q) { q = Neg (z) }>
            }";
        assert_snapshot!(check(&DropBroadcasts, graph), @"
        g (bool c, float[2,1] x, float[2,3] z) => (float[2,3] y) <
            int64[2] to = {2, 3}
        > {
            y = If (c) <then_branch = t () => (float[2,3] p) {
                n = Neg (x)
                p = Mul (n, z)  # float[2,3]
            }, else_branch = o () => (float[2,3] q) {
                q = Neg (z)  # float[2,3]
            }>  # float[2,3]
        }
        ");
    }

    #[test]
    fn what_the_file_states_of_a_narrowed_value_goes() {
        let mut model = crate::testing::model(MASK);
        let w = model.graph.find_value("w").unwrap();
        let ty = model.graph.value(model.graph.find_value("s").unwrap()).ty.clone();
        model.graph.value_mut(w).ty = ty;
        DropBroadcasts.apply(&mut model, &PassContext::default()).unwrap();
        assert_eq!(model.graph.value(w).ty, None);
        model.check().unwrap();
    }

    #[test]
    fn an_axis_of_size_0_or_1_is_no_exception() {
        for size in ["0", "1"] {
            let graph = MASK.replace('S', size).replace('B', "2").replace(&format!("{size}hape"), "Shape");
            let graph = graph.replace(&format!("{size}queeze"), "Squeeze");
            let model = crate::testing::model(&graph);
            let mut after = model.clone();
            DropBroadcasts.apply(&mut after, &PassContext::default()).unwrap();
            lathe_testkit::equivalent(&model, &after, None, 1).unwrap();
        }
    }

    #[test]
    fn keeps_elements_of_unknown_shape() {
        let graph = "<ir_version: 9, opset_import: [\"\" : 17, \"test\" : 1]>
            g (float[2] x, int64[2] to) => (float[A,B] y) { u = test.Strange (x) e = Expand (u, to) y = Neg (e) }";
        check_refuses(&DropBroadcasts, graph, "the shape of the elements or of the result is unknown");
    }
}
