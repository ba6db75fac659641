//! Moves what a loop computes anew on every trip, always with the same result, in front of the loop.

use super::inline_if::known_bool;
use crate::{Editor, Error, Info, Kind, Outcome, Pass, PassContext, Saving, edit_graphs};
use lathe_analysis::{Facts, Trait};
use lathe_ir::{DataType, Graph, Model, NodeId, ScopeId, Use, ValueId};

/// See [`INFO`].
pub struct HoistInvariants;

static INFO: Info = Info {
    name: "hoist-invariants",
    summary: "moves nodes whose inputs do not change from trip to trip out of loops",
    doc: "A node in the body of a Loop or Scan that reads only constants and values from outside the body computes the \
          same on every trip; it moves in front of the loop. It must be a standard operator that is deterministic and \
          cannot fail, or the loop must be known to run at least once. Declines for nodes with subgraphs and for \
          values that the body returns.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Flops],
    source: None,
};

impl Pass for HoistInvariants {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        edit_graphs(model, cx, hoist)
    }
}

fn hoist(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    let is_loop = |graph: &Graph, id: NodeId| graph.node(id).is("Loop") || graph.node(id).is("Scan");
    if !graph.all_nodes().into_iter().any(|id| is_loop(graph, id)) {
        return Ok(());
    }
    let before = outcome.changes.len();
    graph.sort()?;
    let facts = cx.facts.take(graph, opsets, functions);
    // Inner loops first, so that a node can leave several of them.
    for owner in graph.all_nodes().into_iter().rev() {
        if !is_loop(graph, owner) {
            continue;
        }
        let Some(body) = graph.node(owner).subgraph("body") else { continue };
        let runs = runs(graph, &facts, owner);
        let nodes: Vec<NodeId> = graph.nodes(body).collect();
        for id in nodes {
            if !invariant(graph, body, id) {
                continue;
            }
            let place = graph.describe(id);
            match movable(graph, &facts, id, runs) {
                Ok(()) => {
                    move_out(graph, id, graph.node(owner).scope());
                    outcome.change("hoist-invariant", place);
                }
                Err(reason) => outcome.refuse(reason, place),
            }
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

/// Whether a node of a body reads something, and nothing that the body itself makes.
fn invariant(graph: &Graph, body: ScopeId, id: NodeId) -> bool {
    let node = graph.node(id);
    let mut inputs = node.inputs().iter().flatten().peekable();
    inputs.peek().is_some()
        && inputs.all(|&v| graph.constant(v).is_some() || graph.scope_of(v).is_some_and(|s| !graph.is_within(s, body)))
}

fn movable(graph: &Graph, facts: &Facts, id: NodeId, runs: bool) -> Result<(), &'static str> {
    let node = graph.node(id);
    let known = |wanted: Trait| node.is_standard() && wanted.of(node);
    if !node.subgraphs().is_empty() || !(known(Trait::Total) || known(Trait::Partial)) {
        return Err("the operator is not one that may run in front of the loop");
    }
    let strings = |v: ValueId| facts.elem(v).is_none_or(|elem| elem == DataType::String);
    let total = known(Trait::Total)
        || (node.is("Cast") && node.input(0).is_some_and(|v| !strings(v)) && node.int("to") != Some(8));
    if !total && !runs {
        return Err("the loop may never run, and then a node in front of it could fail where nothing failed before");
    }
    if node.outputs().iter().flatten().any(|&v| graph.value(v).uses().iter().any(|u| matches!(u, Use::Output(..)))) {
        return Err("the body returns the value");
    }
    Ok(())
}

/// Whether a loop is known to run its body at least once.
fn runs(graph: &Graph, facts: &Facts, id: NodeId) -> bool {
    let node = graph.node(id);
    if !node.is("Loop") {
        return false;
    }
    let number = |v: ValueId| match graph.constant(v) {
        Some(tensor) => tensor.scalar_i64(),
        None => facts.contents(v)?.known()?.first().copied(),
    };
    let trips = node.input(0).is_none_or(|v| number(v).is_some_and(|n| n >= 1));
    trips && node.input(1).is_none_or(|v| known_bool(graph, facts, v) == Some(true))
}

fn move_out(graph: &mut Graph, id: NodeId, scope: ScopeId) {
    let inputs: Vec<ValueId> = graph.node(id).inputs().iter().flatten().copied().collect();
    for value in inputs {
        let inside = graph.scope_of(value).is_some_and(|s| s != scope && graph.is_within(s, scope));
        if inside {
            graph.move_initializer(value, scope);
        }
    }
    graph.move_node(id, scope);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    fn looped(trips: &str, body: &str) -> String {
        format!(
            "g (float[2] x, float[2] w, int64 n) => (float[2] y) <int64 three = {{3}}, bool go = {{1}}> {{
                y = Loop ({trips}, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t)
                <float[2] k = {{2.0, 3.0}}> {{
                    d = Identity (c)
                    {body}
                }}>
            }}"
        )
    }

    #[test]
    fn hoists_a_chain_out_of_a_loop_that_runs() {
        assert_snapshot!(check(&HoistInvariants, &looped("three", "e = Exp (w) m = Mul (e, k) t = Add (s, m)")), @"
        g (float[2] x, float[2] w, int64 n) => (float[2] y) <
            int64 three = {3},
            bool go = {1},
            float[2] k = {2, 3}
        > {
            e = Exp (w)
            m = Mul (e, k)
            y = Loop (three, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
                d = Identity (c)  # bool
                t = Add (s, m)  # float[2]
            }>  # float[2]
        }
        ");
    }

    #[test]
    fn hoists_only_what_cannot_fail_where_the_loop_may_not_run() {
        check(&HoistInvariants, &looped("n", "e = Exp (w) m = Mul (e, k) t = Add (s, m)"));
        check_refuses(&HoistInvariants, &looped("n", "m = Mul (w, k) t = Add (s, m)"), "the loop may never run");
    }

    #[test]
    fn refuses_random_operators() {
        let graph = looped("three", "r = RandomNormalLike <seed = 1.0> (w) t = Add (s, r)");
        check_refuses(&HoistInvariants, &graph, "not one that may run in front of the loop");
    }

    #[test]
    fn keeps_what_the_body_returns_and_divisions_that_may_fail() {
        let returned = "g (float[2] x, float[2] w) => (float[2] y) <int64 three = {3}, bool go = {1}> {
            y = Loop (three, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
                d = Identity (c)
                t = Exp (w)
            }>
        }";
        check_refuses(&HoistInvariants, returned, "the body returns the value");
        // Whole numbers cannot be divided by 0.
        let divided = "g (int64[2] x, int64[2] w, int64 n) => (int64[2] y) <bool go = {1}> {
            y = Loop (n, go, x) <body = b (int64 i, bool c, int64[2] s) => (bool d, int64[2] t) {
                d = Identity (c)
                q = Div (w, w)
                t = Add (s, q)
            }>
        }";
        check_refuses(&HoistInvariants, divided, "the loop may never run");
        for op in ["Div", "Mod", "Add", "Gather"] {
            assert!(!Trait::Total.of(&lathe_ir::Node::new(op)), "{op} may fail");
        }
    }
}
