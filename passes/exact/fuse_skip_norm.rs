//! Merges a residual addition into the normalization that reads it.

use super::norm_parts::{CONTRIB, import_contrib};
use crate::{Editor, Error, Info, Kind, Outcome, Pass, PassContext, Saving, Target, edit_graphs};
use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, Node, NodeId, ValueId};

/// See [`INFO`].
pub struct FuseSkipNorm;

static INFO: Info = Info {
    name: "fuse-skip-norm",
    summary: "merges a residual addition into the normalization after it",
    doc: "Under the target ort, Add and LayerNormalization, RMSNormalization or SimplifiedLayerNormalization over the \
          last axis become SkipLayerNormalization or SkipSimplifiedLayerNormalization, whose fourth output is the sum \
          for whatever else reads it, and a constant bias added to one branch goes in too. Needs operands that \
          provably have one shape of two or three axes, and a constant scale and shift. Declines where the operator is \
          slower than the nodes, as SkipLayerNormalization is on the CPU.",
    options: &[],
    // The fused kernel sums in another order and may take the variance as E[x²] − E[x]².
    kind: Kind::Equivalent { rtol: 1e-4 },
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for FuseSkipNorm {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        if cx.target != Target::Ort {
            return Ok(Outcome::default());
        }
        let outcome = edit_graphs(model, cx, fuse_graph)?;
        if !outcome.changes.is_empty() {
            import_contrib(model);
        }
        Ok(outcome)
    }
}

fn fuse_graph(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    let norms: Vec<NodeId> = graph.all_nodes().into_iter().filter(|&id| fused_op(graph.node(id)).is_some()).collect();
    if norms.is_empty() {
        return Ok(());
    }
    let mut facts = cx.facts.take(graph, opsets, functions);
    let before = outcome.changes.len();
    for norm in norms {
        let Some((add, operands)) = residual(graph, norm) else { continue };
        match plan(graph, &facts, norm, add, operands).and_then(|plan| pays(cx, plan)) {
            Ok(plan) => {
                let place = graph.describe(norm);
                let made = carry_out(graph, &mut facts, norm, add, plan);
                facts.update(graph, opsets, functions, made);
                outcome.change("fuse-residual", place);
            }
            Err(reason) => outcome.refuse(format!("fuse-residual: {reason}"), graph.describe(norm)),
        }
    }
    if outcome.changes.len() > before {
        graph.sort()?;
    }
    cx.facts.keep(graph, facts);
    Ok(())
}

fn fused_op(norm: &Node) -> Option<&'static str> {
    let simplified = norm.is("RMSNormalization") || norm.is("SimplifiedLayerNormalization");
    match (norm.is("LayerNormalization"), simplified) {
        (true, _) => Some("SkipLayerNormalization"),
        (_, true) => Some("SkipSimplifiedLayerNormalization"),
        _ => None,
    }
}

/// The addition in the same scope that the normalization reads, and its operands.
fn residual(graph: &Graph, norm: NodeId) -> Option<(NodeId, [ValueId; 2])> {
    let node = graph.node(norm);
    let add = graph.producer(node.input(0)?)?;
    let found = graph.node(add);
    let [Some(a), Some(b)] = *found.inputs() else { return None };
    (found.is("Add") && found.scope() == node.scope()).then_some((add, [a, b]))
}

/// Passes a plan on whose operator is not slower than the two nodes.
fn pays(cx: &PassContext, plan: Plan) -> Result<Plan, &'static str> {
    require(
        !cx.slow_kernels.contains(plan.op),
        "the operator is slower than the two nodes on this execution provider",
    )?;
    Ok(plan)
}

struct Plan {
    op: &'static str,
    inputs: Vec<Option<ValueId>>,
}

fn plan(graph: &Graph, facts: &Facts, norm: NodeId, add: NodeId, [a, b]: [ValueId; 2]) -> Result<Plan, &'static str> {
    let node = graph.node(norm);
    let op = fused_op(node).expect("only normalizations are planned");
    let has_shift = op == "SkipLayerNormalization";
    let x = graph.node(add).output(0).expect("the normalization reads the sum");
    let elem = facts.elem(x).ok_or("the element type is unknown")?;
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16];
    require(floats.contains(&elem), "the elements are not float, float16 or bfloat16")?;
    require(node.int("stash_type").is_none_or(|t| t == 1), "the statistics are not computed in float32")?;
    require((1..node.outputs().len()).all(|i| node.output(i).is_none()), "the mean or deviation is an output too")?;
    let shape = facts.shape(x).ok_or("the shape is unknown")?;
    require(matches!(shape.len(), 2 | 3), "the operator takes two or three axes")?;
    let last = shape.len() as i64 - 1;
    let axis = node.int("axis").unwrap_or(-1);
    require(axis == -1 || axis == last, "the normalization is not over the last axis")?;
    let scale = node.input(1).ok_or("the normalization has no scale")?;
    let shift = if has_shift { node.input(2) } else { None };
    let vector = |v: ValueId| {
        facts.shape(v).is_some_and(|s| s.len() == 1 && s[0] == shape[shape.len() - 1])
            && graph.constant(v).is_some()
            && facts.elem(v) == Some(elem)
    };
    require(vector(scale) && shift.is_none_or(vector), "the scale or shift is not a constant over the last axis")?;
    require(facts.same_shape(a, b), "the operands of the addition may have different shapes")?;
    let mut bias = None;
    let mut operands = [a, b];
    for operand in &mut operands {
        let Some((value, found)) = biased(graph, add, *operand, &vector).filter(|_| bias.is_none()) else { continue };
        if facts.same_shape(value, x) {
            (*operand, bias) = (value, Some(found));
        }
    }
    let mut inputs = vec![Some(operands[0]), Some(operands[1]), Some(scale)];
    if has_shift {
        inputs.push(shift);
    }
    inputs.push(bias);
    while inputs.last() == Some(&None) {
        inputs.pop();
    }
    Ok(Plan { op, inputs })
}

fn require(holds: bool, reason: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(reason) }
}

/// The value and the constant bias whose sum `operand` is, if only `add` reads that sum.
fn biased(
    graph: &Graph,
    add: NodeId,
    operand: ValueId,
    vector: &dyn Fn(ValueId) -> bool,
) -> Option<(ValueId, ValueId)> {
    let producer = graph.node(graph.producer(operand)?);
    if !producer.is("Add") || producer.scope() != graph.node(add).scope() || graph.value(operand).uses().len() != 1 {
        return None;
    }
    let (a, b) = (producer.input(0)?, producer.input(1)?);
    match (vector(a), vector(b)) {
        (_, true) => Some((a, b)),
        (true, false) => Some((b, a)),
        _ => None,
    }
}

/// Puts the fused node in place. The scale, shift and bias are constants and the operands come before the addition, so
/// nothing that reads the sum can come before the new node.
fn carry_out(graph: &mut Graph, facts: &mut Facts, norm: NodeId, add: NodeId, plan: Plan) -> NodeId {
    let scope = graph.node(norm).scope();
    let output = graph.node(norm).output(0).expect("a normalization that is planned is used");
    let sum = graph.node(add).output(0).expect("the normalization reads the sum");
    let epsilon = graph.node(norm).float("epsilon").unwrap_or(1e-5);
    let mut node = Node::new(plan.op).in_domain(CONTRIB).with("epsilon", epsilon);
    node.name = graph.node(norm).name.clone();
    let names = [output, sum].map(|old| graph.value(old).name.clone());
    let [new, total] = names.map(|name| {
        let name = graph.fresh_name(&name);
        graph.add_value(name, None)
    });
    let made = graph.add_node(scope, node, plan.inputs, vec![Some(new), None, None, Some(total)]);
    for (old, new) in [(output, new), (sum, total)] {
        facts.inherit(new, old);
    }
    graph.replace(output, new);
    graph.remove_unused(vec![norm]);
    if graph.value(sum).uses().is_empty() {
        graph.drop_output(made, 3);
    } else {
        graph.replace(sum, total);
    }
    graph.remove_unused(vec![add]);
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_in, check_refuses_in};
    use insta::assert_snapshot;

    fn ort() -> PassContext<'static> {
        PassContext::default().with_target(Target::Ort)
    }

    #[test]
    fn hands_the_sum_on() {
        assert_snapshot!(check_in(&FuseSkipNorm, r#"<opset_import: ["" : 17]>
            g (float[N,S,4] a, float[N,S,4] b) => (float[N,S,4] y, float[N,S,4] sum)
            <float[4] scale = {1, 2, 3, 4}, float[4] shift = {0, 1, 0, -1}> {
                sum = Add (a, b)
                n = LayerNormalization <epsilon = 1e-5> (sum, scale, shift)
                y = Mul (n, sum)
            }"#, &ort()), @r#"
        g (float[N,S,4] a, float[N,S,4] b) => (float[N,S,4] y, float[N,S,4] sum) <
            float[4] scale = {1, 2, 3, 4},
            float[4] shift = {0, 1, 0, -1}
        > {
            n, "", "", sum = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (a, b, scale, shift)  # ?, ?, ?, float[N,S,4]
            y = Mul (n, sum)  # float[N,S,4]
        }
        "#);
    }

    #[test]
    fn the_last_axis_may_be_counted_from_the_front() {
        let graph = |axis: i64| {
            format!(
                r#"<opset_import: ["" : 17]>
                g (float[N,S,4] a, float[N,S,4] b) => (float[N,S,4] y) <float[4] scale = {{1, 2, 3, 4}}> {{
                    sum = Add (a, b)
                    y = LayerNormalization <axis = {axis}> (sum, scale)
                }}"#
            )
        };
        assert!(check_in(&FuseSkipNorm, &graph(2), &ort()).contains("com.microsoft.SkipLayerNormalization"));
        check_refuses_in(&FuseSkipNorm, &graph(1), "the normalization is not over the last axis", &ort());
    }

    #[test]
    fn takes_a_bias_in_and_drops_an_unused_sum() {
        assert_snapshot!(check_in(&FuseSkipNorm, r#"<opset_import: ["" : 18]>
            g (bool c, float[N,S,4] a, float[N,S,4] b) => (float[N,S,4] y) <float[4] scale = {1, 2, 3, 4}, float[4] bias = {0, 1, 0, -1}> {
                y = If (c) <then_branch = t () => (float[N,S,4] p) {
                    biased = Add (bias, b)
                    sum = Add (a, biased)
                    p = SimplifiedLayerNormalization <epsilon = 1e-5> (sum, scale)
                }, else_branch = e () => (float[N,S,4] q) { q = Neg (a) }>
            }"#, &ort()), @"
        g (bool c, float[N,S,4] a, float[N,S,4] b) => (float[N,S,4] y) <
            float[4] scale = {1, 2, 3, 4},
            float[4] bias = {0, 1, 0, -1}
        > {
            y = If (c) <then_branch = t () => (p_1) {
                p_1 = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (a, b, scale, bias)
            }, else_branch = e () => (float[N,S,4] q) {
                q = Neg (a)  # float[N,S,4]
            }>  # float[N,S,4]
        }
        ");
    }

    #[test]
    fn refuses() {
        let graph = |b: &str, scale: &str| {
            format!(
                r#"<opset_import: ["" : 17]>
                g (float[N,S,4] a, float[{b}] b, float[4] free) => (float[N,S,4] y) <float[4] fixed = {{1, 2, 3, 4}}> {{
                    sum = Add (a, b)
                    y = LayerNormalization <epsilon = 1e-5> (sum, {scale})
                }}"#
            )
        };
        check_refuses_in(&FuseSkipNorm, &graph("1,S,4", "fixed"), "may have different shapes", &ort());
        check_refuses_in(
            &FuseSkipNorm,
            &graph("N,S,4", "free"),
            "the scale or shift is not a constant over the last axis",
            &ort(),
        );
        let plain = graph("N,S,4", "fixed");
        let refuses = |graph: &str, reason: &str| check_refuses_in(&FuseSkipNorm, graph, reason, &ort());
        refuses(&plain.replace("<epsilon = 1e-5>", "<stash_type = 11>"), "the statistics are not computed in float32");
        refuses(&plain.replace("float[", "double["), "the elements are not float, float16 or bfloat16");
        refuses(&plain.replace("y = Layer", "y, mean = Layer"), "the mean or deviation is an output too");
        refuses(&plain.replace("[N,S,4]", "[]"), "the shape is unknown");
        refuses(&plain.replace("[N,S,4]", "[N,S,2,4]"), "the operator takes two or three axes");
        refuses(&plain.replace("[N,S,4]", "[4]"), "the operator takes two or three axes");
        refuses(&plain.replace("<epsilon = 1e-5>", "<axis = 1>"), "the normalization is not over the last axis");
        refuses(&plain.replace("(sum, fixed)", "(sum)"), "the normalization has no scale");
        let slow = ort().with_slow_kernels(["SkipLayerNormalization".to_owned()].into());
        check_refuses_in(&FuseSkipNorm, &graph("N,S,4", "fixed"), "slower than the two nodes", &slow);
    }
}
