//! Replaces If nodes whose branch is known by what that branch computes.

use crate::same_scope::{Operand, operand, same_scopes};
use crate::{Editor, Error, Info, Kind, Outcome, Pass, PassContext, Saving, edit_graphs};
use lathe_analysis::Facts;
use lathe_ir::{AttributeValue, Graph, Initializer, Model, NodeId, ScopeId, Use, ValueId};
use std::collections::BTreeMap;

/// See [`INFO`].
pub struct InlineIf;

static INFO: Info = Info {
    name: "inline-if",
    summary: "replaces If nodes with a known condition, or with equal branches, by the branch",
    doc: "Where the condition is a constant, or follows from types and shapes (`Size(Shape(x)) == 2`), the nodes of the \
          branch that runs move to the graph around the If under names of their own. So they do where both branches \
          hold the same nodes. An output for which both branches hand out the same constant or the same outer value \
          becomes that value. A negated condition swaps the branches instead. Declines where the condition depends on \
          the inputs and the branches differ.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for InlineIf {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        edit_graphs(model, cx, inline)
    }
}

fn inline(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    if !graph.all_nodes().into_iter().any(|id| graph.node(id).is("If")) {
        return Ok(());
    }
    let before = outcome.changes.len();
    // Inner nodes come after the ones around them, so taking them from the end looks at inner branches first: whatever
    // is inlined then is already as small as it gets.
    let facts = cx.facts.take(graph, opsets, functions);
    for id in graph.all_nodes().into_iter().rev() {
        if graph.get(id).is_some_and(|node| node.is("If")) {
            inline_one(graph, &facts, id, outcome);
        }
    }
    if outcome.changes.len() == before {
        cx.facts.keep(graph, facts);
        return Ok(());
    }
    graph.sort()?;
    graph.make_names_unique();
    Ok(())
}

fn inline_one(graph: &mut Graph, facts: &Facts, id: NodeId, outcome: &mut Outcome) {
    let place = graph.describe(id);
    let node = graph.node(id);
    let branches = node.subgraph("then_branch").zip(node.subgraph("else_branch"));
    let (Some(condition), Some((yes, no))) = (node.input(0), branches) else { return };
    let count = node.outputs().len();
    if let Some(taken) = known_bool(graph, facts, condition) {
        inline_branch(graph, id, if taken { yes } else { no });
        return outcome.change("inline-known-branch", place);
    }
    if same_scopes(graph, yes, no) {
        inline_branch(graph, id, yes);
        return outcome.change("inline-equal-branches", place);
    }
    let mut acted = false;
    for index in 0..count {
        if share_output(graph, id, index, yes, no) {
            outcome.change("share-branch-output", place.clone());
            acted = true;
        }
    }
    let inner = graph.producer(condition).map(|p| graph.node(p)).filter(|n| n.is("Not")).and_then(|n| n.input(0));
    if let Some(inner) = inner {
        let node = graph.node_mut(id);
        node.set_attribute("then_branch", AttributeValue::Graph(no));
        node.set_attribute("else_branch", AttributeValue::Graph(yes));
        graph.set_input(id, 0, Some(inner));
        if let Some(not) = graph.producer(condition) {
            graph.remove_unused(vec![not]);
        }
        outcome.change("swap-branches", place.clone());
        acted = true;
    }
    if acted {
        graph.remove_unused(vec![id]);
        return;
    }
    outcome.refuse("the condition is not known and the branches differ", place);
}

/// The truth of a one-element boolean, if it is known.
pub(super) fn known_bool(graph: &Graph, facts: &Facts, value: ValueId) -> Option<bool> {
    let all = match graph.constant(value) {
        Some(tensor) => tensor.to_i64s()?,
        None => facts.contents(value)?.known()?,
    };
    if let [only] = all.as_slice() { Some(*only != 0) } else { None }
}

/// Puts what `branch` computes in the place of an If node.
fn inline_branch(graph: &mut Graph, id: NodeId, branch: ScopeId) {
    let scope = graph.node(id).scope();
    let outputs = graph.node(id).outputs().to_vec();
    let fragment = graph.fragment(branch);
    let pasted = graph.paste(&fragment, scope, &[], &BTreeMap::new(), "");
    for (old, new) in outputs.iter().zip(&pasted.outputs) {
        if let (Some(old), Some(new)) = (*old, *new) {
            graph.replace_uses(old, new);
        }
    }
    let names: Vec<Option<String>> = outputs.iter().map(|v| v.map(|v| graph.value(v).name.clone())).collect();
    graph.remove_node(id);
    // The branch is gone and its names are free again; what it handed out is known by the name of the output.
    for (new, name) in pasted.values {
        if graph.value(new).uses().iter().any(|u| matches!(u, Use::Output(ScopeId::MAIN, _))) {
            continue;
        }
        let position = pasted.outputs.iter().take(names.len()).position(|&v| v == Some(new));
        let known = position.and_then(|index| names[index].clone());
        let wanted = known.unwrap_or(name);
        let free = graph.fresh_name(&wanted);
        if free == wanted {
            graph.rename(new, wanted);
        }
    }
}

/// Replaces one output for which both branches hand out the same thing. Whether it did.
fn share_output(graph: &mut Graph, id: NodeId, index: usize, yes: ScopeId, no: ScopeId) -> bool {
    let Some(output) = graph.node(id).output(index).filter(|&v| !graph.value(v).uses().is_empty()) else {
        return false;
    };
    let scope = graph.node(id).scope();
    let (a, b) = (graph.scope(yes).outputs()[index], graph.scope(no).outputs()[index]);
    let shared = match (operand(graph, a, yes), operand(graph, b, no)) {
        (Operand::Outer(a), Operand::Outer(b)) if a == b => a,
        (Operand::Constant(a), Operand::Constant(b)) if a.same_bits(&b) => {
            let name = graph.fresh_name(&graph.value(output).name.clone());
            let new = graph.add_value(name, None);
            graph.make_initializer(scope, new, Initializer::Dense(a));
            new
        }
        _ => return false,
    };
    graph.replace_uses(output, shared);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    #[test]
    fn inlines_a_constant_condition() {
        assert_snapshot!(check(&InlineIf, "
            g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}> {
                s = Exp (x)
                y, m = If (c) <then_branch = t () => (float[2] p, float[2] k) <float[2] k = {1.0, 2.0}> {
                    a = Add (s, k)
                    p = Neg (a)
                }, else_branch = e () => (float[2] q, float[2] r) { q = Neg (s) r = Exp (s) }>
                z = Mul (m, x)
            }"), @"
        g (float[2] x) => (float[2] y, float[2] z) <
            bool c = {1},
            float[2] m = {1, 2}
        > {
            s = Exp (x)
            z = Mul (m, x)  # float[2]
            a = Add (s, m)
            y = Neg (a)  # float[2]
        }
        ");
    }

    #[test]
    fn inlines_what_shapes_decide() {
        check(
            &InlineIf,
            "
            g (float[a,b] x) => (float[c,d] y) <int64 two = {2}> {
                shape = Shape (x)
                ndim = Size (shape)
                c = Equal (ndim, two)
                y = If (c) <then_branch = t () => (float[c,d] p) { p = Neg (x) },
                            else_branch = e () => (float[c,d] q) { q = Exp (x) }>
            }",
        );
    }

    #[test]
    fn inlines_equal_branches_in_a_subgraph() {
        assert_snapshot!(check(&InlineIf, "
            g (float[2] x, bool a, bool b) => (float[2] y) {
                y = If (a) <then_branch = t () => (float[2] p) {
                    p = If (b) <then_branch = t2 () => (float[2] u) { u0 = Exp (x) u = Neg (u0) },
                                else_branch = e2 () => (float[2] v) { v0 = Exp (x) v = Neg (v0) }>
                }, else_branch = e () => (float[2] q) { q = Exp (x) }>
            }"), @"
        g (float[2] x, bool a, bool b) => (float[2] y) {
            y = If (a) <then_branch = t () => (float[2] p) {
                u0 = Exp (x)
                p = Neg (u0)  # float[2]
            }, else_branch = e () => (float[2] q) {
                q = Exp (x)  # float[2]
            }>  # float[2]
        }
        ");
    }

    #[test]
    fn hands_on_captured_values() {
        check(
            &InlineIf,
            "
            g (float[2] x) => (float[2] y, float[2] z) <bool c = {0}> {
                y = If (c) <then_branch = t () => (float[2] p) { p = Neg (x) },
                            else_branch = e () => (float[2] q) { q = Identity (x) }>
                s = Exp (x)
                w = If (c) <then_branch = t3 () => (float[2] p3) { p3 = Neg (x) },
                            else_branch = e3 () => (float[2] q3) { q3 = Identity (s) }>
                z = Identity (w)
            }",
        );
    }

    #[test]
    fn swaps_negated_branches_and_shares_outputs() {
        assert_snapshot!(check(&InlineIf, "
            g (float[2] x, bool c) => (float[2] y, float[2] z) {
                s = Exp (x)
                n = Not (c)
                y, t = If (n) <then_branch = t () => (float[2] p, float[2] a) { p = Neg (s) a = Identity (s) },
                               else_branch = e () => (float[2] q, float[2] b) { q = Exp (s) b = Identity (s) }>
                z = Neg (t)
            }"), @"
        g (float[2] x, bool c) => (float[2] y, float[2] z) {
            s = Exp (x)
            y, t = If (c) <then_branch = e () => (float[2] q, float[2] b) {
                q = Exp (s)  # float[2]
                b = Identity (s)  # float[2]
            }, else_branch = t () => (float[2] p, float[2] a) {
                p = Neg (s)  # float[2]
                a = Identity (s)  # float[2]
            }>  # float[2], ?
            z = Neg (s)  # float[2]
        }
        ");
    }

    #[test]
    fn refuses_unknown_conditions() {
        let graph = "
            g (float[2] x, bool c) => (float[2] y) {
                y = If (c) <then_branch = t () => (float[2] p) { p = Neg (x) },
                            else_branch = e () => (float[2] q) { q = Exp (x) }>
            }";
        check_refuses(&InlineIf, graph, "the condition is not known");
    }
}
