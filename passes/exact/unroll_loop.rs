//! Replaces Loop nodes that run a fixed, small number of times by copies of their body.

use super::inline_if::known_bool;
use crate::same_scope::{Operand, operand};
use crate::{Editor, Error, Info, Kind, Opt, Outcome, Pass, PassContext, edit_graphs};
use lathe_analysis::{Facts, Trait};
use lathe_ir::{AttributeValue, Function, Graph, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::BTreeMap;

/// See [`INFO`].
pub struct UnrollLoop;

static INFO: Info = Info {
    name: "unroll-loop",
    summary: "replaces Loop nodes with a small, known number of trips by copies of their body",
    doc: "Where the number of trips is known and the condition stays true throughout, the body is copied once per trip \
          with the trip number as a constant; what a trip hands on goes straight to the next one, and per-trip outputs \
          are stacked with Unsqueeze and Concat. Constants are shared by all copies. Declines for more trips than \
          `max-trips`, for more than `max-nodes` new nodes, where the condition may end the loop early, for bodies with \
          random operators, and for per-trip outputs of a loop that never runs.",
    options: &[
        Opt { name: "max-trips", unit: "count", default: "16", doc: "the most trips that are unrolled" },
        Opt { name: "max-nodes", unit: "count", default: "512", doc: "the most nodes that one loop may become" },
    ],
    kind: Kind::Identical,
    lowers: &[],
    source: None,
};

/// Bytes of constants inside the nodes of a body that may be repeated.
const MAX_REPEATED_BYTES: usize = 1024;

impl Pass for UnrollLoop {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let limits = Limits { trips: cx.setting(&INFO, "max-trips")?, nodes: cx.setting(&INFO, "max-nodes")? };
        edit_graphs(model, cx, |editor| unroll(editor, &limits))
    }
}

struct Limits {
    trips: usize,
    nodes: usize,
}

fn unroll(editor: &mut Editor, limits: &Limits) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    if !graph.all_nodes().into_iter().any(|id| graph.node(id).is("Loop")) {
        return Ok(());
    }
    let before = outcome.changes.len();
    let opset = lathe_ir::imported(opsets, "").unwrap_or(0);
    let facts = cx.facts.take(graph, opsets, functions);
    // Inner loops first: the copies of an outer body then hold no loops that could be unrolled.
    for id in graph.all_nodes().into_iter().rev() {
        if !graph.get(id).is_some_and(|node| node.is("Loop")) {
            continue;
        }
        let place = graph.describe(id);
        match plan(graph, &facts, functions, limits, id) {
            Ok(plan) => {
                carry_out(graph, opset, id, &plan);
                outcome.change("unroll-loop", place);
            }
            Err(reason) => outcome.refuse(reason, place),
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

/// A loop that can be unrolled.
struct Plan {
    body: ScopeId,
    trips: usize,
    /// How many values each trip hands to the next one.
    carried: usize,
}

fn plan(
    graph: &Graph,
    facts: &Facts,
    functions: &[Function],
    limits: &Limits,
    id: NodeId,
) -> Result<Plan, &'static str> {
    let node = graph.node(id);
    let body = node.subgraph("body").ok_or("the loop has no body")?;
    let (inputs, outputs) = (graph.scope(body).inputs(), graph.scope(body).outputs());
    // Every body has the trip number and the condition too.
    let carried = inputs.len() - 2;
    if !(0..carried).all(|i| node.input(i + 2).is_some()) {
        return Err("the loop begins without one of the values that it hands on");
    }
    let trips = node.input(0).and_then(|count| known_count(graph, facts, count));
    let mut trips = trips.ok_or("the number of trips is not known")?.max(0);
    match node.input(1).map(|v| known_bool(graph, facts, v)) {
        None | Some(Some(true)) => {}
        Some(Some(false)) => trips = 0,
        Some(None) => return Err("whether the loop begins is not known"),
    }
    let trips = usize::try_from(trips).ok().filter(|&n| n <= limits.trips);
    let trips = trips.ok_or("the loop runs more often than `max-trips`")?;
    if trips == 0 {
        let stacked = node.outputs().iter().skip(carried).flatten().any(|&v| !graph.value(v).uses().is_empty());
        return if stacked {
            Err("per-trip outputs of a loop that never runs are empty tensors")
        } else {
            Ok(Plan { body, trips, carried })
        };
    }
    let goes_on = match operand(graph, outputs[0], body) {
        Operand::Constant(tensor) => tensor.scalar_i64() == Some(1),
        Operand::Inner(value) if value == inputs[1] => true,
        Operand::Outer(value) | Operand::Inner(value) => known_bool(graph, facts, value) == Some(true),
    };
    if !goes_on && trips > 1 {
        return Err("the condition may end the loop early");
    }
    let fragment = graph.fragment(body);
    if fragment.node_count().saturating_mul(trips) > limits.nodes {
        return Err("the copies would be more than `max-nodes`");
    }
    let nodes = fragment.all_nodes();
    let random = |n: &&Node| {
        let unknown = !n.is_standard() && functions.iter().all(|f| f.name != n.op_type || f.domain != n.domain);
        Trait::Random.of(n) || (unknown && n.domain != "com.microsoft")
    };
    if trips > 1 && nodes.iter().any(random) {
        return Err("the body holds a random or unknown operator, which may keep a state from trip to trip");
    }
    let held = nodes.iter().flat_map(|n| &n.attributes).map(|a| match &a.value {
        AttributeValue::Tensor(tensor) => tensor.byte_len(),
        AttributeValue::Floats(all) => all.len().saturating_mul(4),
        AttributeValue::Ints(all) => all.len().saturating_mul(8),
        _ => 0,
    });
    if trips > 1 && held.sum::<usize>() > MAX_REPEATED_BYTES {
        return Err("the body's nodes hold constants that would be repeated");
    }
    Ok(Plan { body, trips, carried })
}

fn known_count(graph: &Graph, facts: &Facts, value: ValueId) -> Option<i64> {
    let all = match graph.constant(value) {
        Some(tensor) => tensor.to_i64s()?,
        None => facts.contents(value)?.known()?,
    };
    if let [only] = all.as_slice() { Some(*only) } else { None }
}

fn carry_out(graph: &mut Graph, opset: i64, id: NodeId, plan: &Plan) {
    let scope = graph.node(id).scope();
    let node = graph.node(id);
    let outputs = node.outputs().to_vec();
    let names: Vec<Option<String>> = outputs.iter().map(|v| v.map(|v| graph.value(v).name.clone())).collect();
    let mut state: Vec<Option<ValueId>> = (0..plan.carried).map(|index| node.input(index + 2)).collect();
    let wanted: Vec<usize> = (plan.carried..outputs.len())
        .filter(|&index| outputs[index].is_some_and(|v| !graph.value(v).uses().is_empty()))
        .collect();
    // Constants of the body and of what is nested in it move out once instead of being copied for every trip.
    let inside: Vec<ScopeId> = graph.scopes().into_iter().filter(|&s| graph.is_within(s, plan.body)).collect();
    for inner in inside {
        let constants: Vec<ValueId> = graph.initializers(inner).collect();
        for value in constants {
            graph.move_initializer(value, scope);
        }
    }
    let fragment = graph.fragment(plan.body);
    let number_used = !graph.value(fragment.inputs()[0]).uses().is_empty();
    let condition_used = !graph.value(fragment.inputs()[1]).uses().is_empty();
    let dims = |graph: &Graph, input: ValueId| -> &'static [usize] {
        let shape = graph.value(input).ty.as_ref().and_then(|ty| ty.shape());
        if shape.is_some_and(|s| s.dims.len() == 1) { &[1] } else { &[] }
    };
    let (number_dims, condition_dims) = (dims(graph, fragment.inputs()[0]), dims(graph, fragment.inputs()[1]));
    let going = condition_used
        .then(|| graph.add_initializer(scope, "loop_condition", Tensor::from_bools(condition_dims, &[true])));
    let base = outputs.iter().flatten().next().map(|&v| graph.value(v).name.clone()).unwrap_or_default();
    let mut stacks: Vec<Vec<ValueId>> = vec![Vec::new(); wanted.len()];
    let axes = (opset >= 13 && !wanted.is_empty() && plan.trips > 0)
        .then(|| graph.add_initializer(scope, &format!("{base}_axes"), Tensor::int64s(&[0])));
    for trip in 0..plan.trips {
        let number = number_used.then(|| {
            let tensor = Tensor::from_i64s(number_dims, &[trip as i64]);
            graph.add_initializer(scope, &format!("{base}_trip_{trip}"), tensor)
        });
        let mut arguments = vec![number, going];
        arguments.extend(&state);
        let pasted = graph.paste(&fragment, scope, &arguments, &BTreeMap::new(), &format!("trip{trip}_"));
        state = pasted.outputs[1..=plan.carried].to_vec();
        for (stack, &index) in stacks.iter_mut().zip(&wanted) {
            let Some(value) = pasted.outputs[index + 1] else { continue };
            stack.push(match axes {
                Some(axes) => graph.append(scope, Node::new("Unsqueeze"), &[value, axes], &base),
                None => graph.append(scope, Node::new("Unsqueeze").with("axes", vec![0]), &[value], &base),
            });
        }
        // What only the condition needed is computed for nothing now.
        graph.remove_unused(pasted.outputs[0].and_then(|v| graph.producer(v)).into_iter().collect());
    }
    for (index, new) in state.into_iter().enumerate() {
        if let (Some(old), Some(new)) = (outputs.get(index).copied().flatten(), new) {
            graph.replace_uses(old, new);
        }
    }
    let mut taken: Vec<(usize, ValueId)> = Vec::new();
    for (stack, &index) in stacks.iter().zip(&wanted) {
        let Some(old) = outputs[index] else { continue };
        let new = match stack.as_slice() {
            [only] => *only,
            several => graph.append(scope, Node::new("Concat").with("axis", 0), several, &base),
        };
        graph.replace_uses(old, new);
        taken.push((index, new));
    }
    graph.remove_node(id);
    for (index, new) in taken {
        let main_output = graph.value(new).uses().iter().any(|u| matches!(u, Use::Output(ScopeId::MAIN, _)));
        if let Some(name) = names[index].as_ref().filter(|_| !main_output) {
            let free = graph.fresh_name(name);
            graph.rename(new, free);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_refuses_in};
    use insta::assert_snapshot;

    /// A loop of `trips` over `s`, whose body is `body` and which ends by `end`.
    fn counted(trips: &str, end: &str) -> String {
        format!(
            "g (float[2] x, int64 n, bool again) => (float[2] y, float[k,2] all)
            <int64 trips = {{{trips}}}, bool go = {{1}}> {{
                y, all = Loop ({}, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t, float[2] u)
                <float[2] half = {{0.5, 0.25}}> {{
                    d = Identity ({end})
                    f = Cast <to = 1> (i)
                    t = Add (s, f)
                    u = Mul (t, half)
                }}>
            }}",
            if trips == "9999" { "n" } else { "trips" }
        )
    }

    #[test]
    fn unrolls_three_trips() {
        assert_snapshot!(check(&UnrollLoop, &counted("3", "c")), @"
        g (float[2] x, int64 n, bool again) => (float[2] y, float[k,2] all) <
            int64 trips = {3},
            bool go = {1},
            float[2] half = {0.5, 0.25},
            bool loop_condition = {1},
            int64[1] y_axes = {0},
            int64 y_trip_0 = {0},
            int64 y_trip_1 = {1},
            int64 y_trip_2 = {2}
        > {
            trip0_f = Cast <to = 1> (y_trip_0)
            trip0_t = Add (x, trip0_f)  # float[2]
            trip0_u = Mul (trip0_t, half)  # float[2]
            y_1 = Unsqueeze (trip0_u, y_axes)
            trip1_f = Cast <to = 1> (y_trip_1)
            trip1_t = Add (trip0_t, trip1_f)  # float[2]
            trip1_u = Mul (trip1_t, half)  # float[2]
            y_2 = Unsqueeze (trip1_u, y_axes)
            trip2_f = Cast <to = 1> (y_trip_2)
            y = Add (trip1_t, trip2_f)  # float[2]
            trip2_u = Mul (y, half)  # float[2]
            y_3 = Unsqueeze (trip2_u, y_axes)
            all = Concat <axis = 0> (y_1, y_2, y_3)  # float[k,2]
        }
        ");
    }

    #[test]
    fn unrolls_one_trip_whatever_the_condition_says_then() {
        check(&UnrollLoop, &counted("1", "again"));
    }

    #[test]
    fn hands_on_the_initial_value_of_a_loop_that_never_runs() {
        check(
            &UnrollLoop,
            "
            g (float[2] x) => (float[2] y) <int64 trips = {0}, bool go = {1}> {
                a = Neg (x)
                y = Loop (trips, go, a) <body = b (int64 i, bool c, float[2] s) => (bool c2, float[2] t) {
                    c2 = Identity (c)
                    t = Exp (s)
                }>
            }",
        );
    }

    #[test]
    fn unrolls_inside_a_branch_with_a_nested_if() {
        check(
            &UnrollLoop,
            "
            g (float[2] x, bool p) => (float[2] y) <int64 trips = {2}, bool go = {1}> {
                y = If (p) <then_branch = a () => (float[2] r) {
                    r = Loop (trips, go, x) <body = b (int64 i, bool c, float[2] s) => (bool c2, float[2] t) {
                        c2 = Identity (c)
                        e = Exp (s)
                        t = If (p) <then_branch = d () => (float[2] v) { v = Add (e, x) },
                                    else_branch = f () => (float[2] w) { w = Sub (e, s) }>
                    }>
                }, else_branch = z () => (float[2] q) { q = Neg (x) }>
            }",
        );
    }

    #[test]
    fn unrolls_before_opset_13() {
        check(&UnrollLoop, "
            <ir_version: 7, opset_import: [\"\": 11]>
            g (float[2] x) => (float[2,2] all) <int64 trips = {2}, bool go = {1}> {
                y, all = Loop (trips, go, x) <body = b (int64 i, bool c, float[2] s) => (bool c2, float[2] t, float[2] u) {
                    c2 = Identity (c)
                    t = Exp (s)
                    u = Neg (t)
                }>
            }");
    }

    #[test]
    fn refuses_what_is_not_known() {
        check_refuses(&UnrollLoop, &counted("9999", "c"), "the number of trips is not known");
        check_refuses(&UnrollLoop, &counted("17", "c"), "more often than `max-trips`");
        check_refuses(&UnrollLoop, &counted("3", "again"), "may end the loop early");
        check_refuses(&UnrollLoop, &counted("0", "c"), "never runs");
    }

    #[test]
    fn refuses_random_bodies() {
        let graph = "
            g (float[2] x) => (float[2] y) <int64 trips = {2}, bool go = {1}> {
                y = Loop (trips, go, x) <body = b (int64 i, bool c, float[2] s) => (bool c2, float[2] t) {
                    c2 = Identity (c)
                    r = RandomNormalLike <seed = 1.0> (s)
                    t = Add (s, r)
                }>
            }";
        check_refuses(&UnrollLoop, graph, "random or unknown operator");
    }

    #[test]
    fn keeps_loops_that_are_not_known_or_would_grow() {
        let graph = |head: &str, inputs: &str, body: &str| {
            format!(
                "g (float[2] x, bool go, int64 n) => (float[2] y) <int64 three = {{3}}, bool yes = {{1}}> {{
                y = Loop ({head}) <body = b ({inputs}) => (bool d, float[2] t) {{ {body} }}> }}"
            )
        };
        let usual = "int64 i, bool c, float[2] s";
        let body = "d = Identity (c) t = Exp (s)";
        check_refuses(&UnrollLoop, &graph("three, go, x", usual, body), "whether the loop begins is not known");
        let two = graph("three, yes, , x", "int64 i, bool c, float[2] r, float[2] s", body);
        let two =
            two.replace("(bool d, float[2] t)", "(bool d, float[2] t, float[2] t)").replace("y = Loop", "y, z = Loop");
        check_refuses(&UnrollLoop, &two, "the loop begins without one of the values that it hands on");
        let small = PassContext::default().with_settings([("unroll-loop.max-nodes".to_owned(), "5".to_owned())]);
        check_refuses_in(
            &UnrollLoop,
            &graph("three, yes, x", usual, body),
            "the copies would be more than `max-nodes`",
            &small,
        );
        let many = vec!["1"; 300].join(", ");
        let held = format!(
            "d = Identity (c) k = Constant <value = float[300] {{{many}}}> () m = ReduceMax <keepdims = 0> (k) t = Add (s, m)"
        );
        check_refuses(
            &UnrollLoop,
            &graph("three, yes, x", usual, &held),
            "the body's nodes hold constants that would be repeated",
        );
    }

    #[test]
    fn keeps_a_loop_whose_body_the_caller_gives() {
        let graph = r#"<ir_version: 10, opset_import: ["": 18, "local": 1]>
            g (float[2] x) => (float[2] y) {
                y = local.F <k = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) { d = Identity (c) t = Exp (s) }> (x)
            }
            <domain: "local", opset_import: ["": 18]>
            F <k> (a) => (r) { n = Constant <value_int = 3> () r = Loop <body: graph = @k> (n, , a) }"#;
        check_refuses(&UnrollLoop, graph, "the loop has no body");
    }
}
