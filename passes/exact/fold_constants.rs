//! Computes ahead whatever does not depend on the inputs.

use super::{
    fold_compute::{Source, compute},
    fold_plan::{Candidates, Plan, TooLarge, plan},
};
use crate::{Editor, Error, Info, Kind, Outcome, Pass, PassContext, Saving, edit_graphs};
use lathe_analysis::Facts;
use lathe_ir::{AttributeValue, Graph, Initializer, Model, NodeId, Origin, ScopeId, Tensor, ValueId};
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

/// See [`INFO`].
pub struct FoldConstants;

static INFO: Info = Info {
    name: "fold-constants",
    summary: "computes ahead what does not depend on the inputs of the model",
    doc: "A node whose inputs are all constant, or whose result is known from the shapes (the Shape of a fixed size), \
          becomes an initializer. Results are computed exactly as the runtime would: by kernels of our own where there \
          is only one possible result, else in the runtime itself with its optimizations off. Only because a runtime may \
          use another kernel for a weight that is an initializer (ONNX Runtime does for LSTM) can outputs move by a \
          rounding. Chains are judged as a whole, what goes in against what comes out, and whatever would enlarge the \
          model by more than `--max-growth`, and what drop-trace-info has taken off the file, is left as it is and named. Random operators, quantization and operators of \
          unknown domains are left alone.",
    options: &[],
    // Folding itself keeps bits, but a runtime packs weights that have become constant and then sums in another order.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

/// Rounds of finding out what the runtime cannot compute, after which it is not asked any more.
const RUNTIME_ROUNDS: usize = 4;
/// Refusals that are named one by one.
const NAMED: usize = 3;

impl Pass for FoldConstants {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let mut refused = Vec::new();
        let version = model.ir_version;
        let mut outcome = edit_graphs(model, cx, |editor| fold(editor, version, &mut refused))?;
        name_refusals(refused, cx, &mut outcome);
        if !outcome.changes.is_empty() {
            // Older files list every initializer among the inputs.
            model.ir_version = model.ir_version.max(4);
        }
        Ok(outcome)
    }
}

/// Something too large: what it is called, by how much it would grow the model.
type Refused = (String, u64);

fn fold(editor: &mut Editor, ir_version: i64, refused: &mut Vec<Refused>) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    merge_fills(graph, outcome);
    graph.sort()?;
    let mut facts = cx.facts.take(graph, opsets, functions);
    let mut blocked: BTreeSet<NodeId> = BTreeSet::new();
    let mut done: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    let mut rounds = 0;
    let chosen = loop {
        let found = Candidates::find(graph, opsets, functions, &facts, &blocked, &done);
        if found.nodes.is_empty() {
            break None;
        }
        rounds += 1;
        let evaluator = cx.evaluator.filter(|_| rounds <= RUNTIME_ROUNDS);
        let source = Source { graph, opsets, ir_version, facts: &facts, found: &found };
        let mut failures = compute(&source, cx, evaluator, &found.unsized_values, &mut done);
        let mut chosen = None;
        if failures.is_empty() {
            if found.unsized_values.is_empty() {
                let plan = plan(graph, &found, cx.growth_left());
                failures = compute(&source, cx, evaluator, &plan.stored, &mut done);
                chosen = Some(plan);
            } else {
                // Now that they are computed their sizes are known.
                continue;
            }
        }
        if failures.is_empty() {
            break chosen;
        }
        for (id, reason) in failures {
            outcome.refuse(reason, graph.describe(id));
            blocked.insert(id);
        }
    };
    if let Some(plan) = chosen {
        let name = |t: &TooLarge| (label(graph, t.node), t.growth);
        refused.extend(plan.too_large.iter().map(name));
        commit(graph, &mut facts, plan, done, cx, outcome)?;
    }
    cx.facts.keep(graph, facts);
    Ok(())
}

/// Lets equal `ConstantOfShape` nodes of one graph share their result, so that what they fill is stored once.
fn merge_fills(graph: &mut Graph, outcome: &mut Outcome) {
    type Fill = (ScopeId, Vec<i64>, Option<(i32, Vec<u8>)>);
    let mut seen: BTreeMap<Fill, ValueId> = BTreeMap::new();
    for id in graph.all_nodes() {
        let node = graph.node(id);
        let (Some(input), Some(output)) = (node.input(0), node.output(0)) else { continue };
        if !node.is("ConstantOfShape") || graph.is_output(output) {
            continue;
        }
        let Some(shape) = graph.constant(input).and_then(Tensor::to_i64s) else { continue };
        let fill = match node.attribute("value") {
            None => None,
            Some(AttributeValue::Tensor(fill)) => Some((fill.dtype().code(), fill.bytes().to_vec())),
            Some(_) => continue,
        };
        match seen.entry((node.scope(), shape, fill)) {
            Entry::Vacant(entry) => _ = entry.insert(output),
            Entry::Occupied(entry) => {
                outcome.change("merge-fills", graph.describe(id));
                graph.replace_uses(output, *entry.get());
                graph.remove_node(id);
            }
        }
    }
}

/// Puts the results in the place of the nodes.
fn commit(
    graph: &mut Graph,
    facts: &mut Facts,
    plan: Plan,
    mut done: BTreeMap<ValueId, Tensor>,
    cx: &PassContext,
    outcome: &mut Outcome,
) -> Result<(), Error> {
    if plan.removed.is_empty() {
        return Ok(());
    }
    cx.grown.set(cx.grown.get().saturating_add(plan.growth));
    for value in plan.stored {
        let Origin::Node(producer, _) = graph.value(value).origin() else { continue };
        let tensor = done.remove(&value).expect("every stored result was computed");
        outcome.change("fold", graph.describe(producer));
        let scope = graph.node(producer).scope();
        let old = graph.value(value);
        let (name, ty, doc, metadata) = (old.name.clone(), old.ty.clone(), old.doc.clone(), old.metadata.clone());
        let annotations = old.quantization().to_vec();
        let new = graph.add_value(name.clone(), ty);
        graph.make_initializer(scope, new, Initializer::Dense(tensor));
        facts.inherit(new, value);
        graph.replace_uses(value, new);
        // Where the old name is that of an output, the output has kept it and the constant needs another.
        if graph.value(value).name != name {
            let fresh = graph.fresh_name(&name);
            graph.rename(new, fresh);
        }
        graph.set_quantization(new, annotations);
        let info = graph.value_mut(new);
        info.doc = doc;
        info.metadata = metadata;
    }
    graph.remove_unused(plan.removed.into_iter().rev().collect());
    for value in plan.freed {
        if graph.constant(value).is_some() && graph.value(value).uses().is_empty() {
            graph.remove_initializer(value);
        }
    }
    graph.sort()?;
    Ok(())
}

/// What a refusal calls a node: its name, else that of its first output.
fn label(graph: &Graph, id: NodeId) -> String {
    let node = graph.node(id);
    let output = || node.outputs().iter().flatten().next().map(|&v| graph.value(v).name.clone());
    if node.name.is_empty() { output().unwrap_or_default() } else { node.name.clone() }
}

/// Names the largest results that stay computed, and sums up the others.
fn name_refusals(mut refused: Vec<Refused>, cx: &PassContext, outcome: &mut Outcome) {
    refused.sort_by_key(|r| std::cmp::Reverse(r.1));
    let allowed = |bytes: u64| option_value(cx.grown.get().saturating_add(bytes).saturating_sub(cx.saved.get()));
    for (name, bytes) in refused.iter().take(NAMED) {
        let reason = format!("fold `{name}` (+{}), allowed with --max-growth {}", size(*bytes), allowed(*bytes));
        outcome.refuse(reason, name);
    }
    if let Some((first, _)) = refused.get(NAMED) {
        let total: u64 = refused.iter().map(|r| r.1).sum();
        let (more, all) = (refused.len() - NAMED, size(total));
        let reason = format!("fold {more} more results (+{all} in all), allowed with --max-growth {}", allowed(total));
        outcome.refuse(reason, first);
    }
}

const MIB: u64 = 1 << 20;

fn size(bytes: u64) -> String {
    if bytes < MIB {
        format!("{:.1} KiB", bytes as f64 / 1024.0)
    } else {
        format!("{:.1} MiB", bytes as f64 / MIB as f64)
    }
}

/// The smallest round value of `--max-growth` that allows `bytes`.
fn option_value(bytes: u64) -> String {
    if bytes < MIB { format!("{}KB", bytes.div_ceil(1024)) } else { format!("{}MB", bytes.div_ceil(MIB)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_in, check_refuses, check_refuses_in, check_untouched};
    use insta::assert_snapshot;

    #[test]
    fn folds_a_chain_into_one_constant() {
        let graph = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> {
            c = Mul (a, b)
            d = Neg (c)
            y = Add (x, d)
        }";
        assert_snapshot!(check(&FoldConstants, graph), @r#"
        g (float[2] x) => (float[2] y) <
            float[2] d = {-3, -8}
        > {
            y = Add (x, d)  # float[2]
        }
        "#);
    }

    #[test]
    fn asks_the_runtime_for_the_rest_in_one_run() {
        let graph = "g (float[2] x) => (float[2] y, float[1] z) <float[2] a = {1, 2}> {
            c = Exp (a)
            d = Sin (c)
            y = Add (x, d)
            e = ReduceSum (d)
            m = Sigmoid (e)
            z = Mul (m, e)
        }";
        assert_snapshot!(check(&FoldConstants, graph), @r#"
        g (float[2] x) => (float[2] y, float[1] z) <
            float[2] d = {0.41078135, 0.893855},
            float[1] z_2 = {1.0262456}
        > {
            y = Add (x, d)  # float[2]
            z = Identity (z_2)  # float[1]
        }
        "#);
    }

    #[test]
    fn folds_shapes_that_are_known() {
        let graph = "g (float[2,N,4] x) => (float[A,B] y) {
            s = Shape <start = 2> (x)
            t = Constant <value = int64[1] {-1}> ()
            r = Concat <axis = 0> (t, s)
            y = Reshape (x, r)
        }";
        assert_snapshot!(check(&FoldConstants, graph), @r#"
        g (float[2,N,4] x) => (float[A,B] y) <
            int64[2] r = {-1, 4}
        > {
            y = Reshape (x, r)  # float[A,B]
        }
        "#);
    }

    #[test]
    fn judges_a_chain_as_a_whole() {
        // The middle is large, the result is not.
        let graph = "g (float[1] x) => (float[1] y) <int64[1] n = {100000}> {
            wide = ConstantOfShape <value = float[1] {2.0}> (n)
            most = ReduceMax <keepdims = 0> (wide)
            y = Add (x, most)
        }";
        assert_snapshot!(check(&FoldConstants, graph), @r#"
        g (float[1] x) => (float[1] y) <
            float most = {2}
        > {
            y = Add (x, most)  # float[1]
        }
        "#);
    }

    #[test]
    fn keeps_what_would_grow_and_folds_what_leads_to_it() {
        let graph = "g (float[100000] x) => (float[100000] y) <int64[1] n = {50000}, int64[1] two = {2}> {
            m = Mul (n, two)
            wide = ConstantOfShape <value = float[1] {2.0}> (m)
            y = Add (x, wide)
        }";
        assert_snapshot!(check(&FoldConstants, graph), @r#"
        g (float[100000] x) => (float[100000] y) <
            int64[1] m = {100000}
        > {
            wide = ConstantOfShape <value = float[1] {2}> (m)
            y = Add (x, wide)  # float[100000]
        }
        "#);
        let one = "g (float[100000] x) => (float[100000] y) <int64[1] n = {100000}> {
            wide = ConstantOfShape <value = float[1] {2.0}> (n)
            y = Add (x, wide)
        }";
        let reason = "fold `wide` (+390.6 KiB), allowed with --max-growth 391KB";
        check_refuses(&FoldConstants, one, reason);
        let short = PassContext::default().with_max_growth(390 << 10);
        check_refuses_in(&FoldConstants, one, reason, &short);
        let enough = PassContext::default().with_max_growth(391 << 10);
        assert!(!check_in(&FoldConstants, one, &enough).contains("ConstantOfShape"));
        assert_eq!(enough.grown.get(), 400_000 - 4);
        // Notes that are gone make room as well, for this and not for copies of weights.
        let noted = PassContext::default().with_max_growth(5);
        noted.saved.set(400_000 - 4);
        assert!(!check_in(&FoldConstants, one, &noted).contains("ConstantOfShape"));
        assert_eq!((noted.growth_left(), noted.copies_left()), (5, 5));
        let short = PassContext::default();
        short.saved.set(399_000);
        check_refuses_in(&FoldConstants, one, "allowed with --max-growth 1KB", &short);
    }

    #[test]
    fn sums_up_what_it_does_not_name() {
        let fill = |(number, w): (usize, &str)| format!("{w} = ConstantOfShape <value = float[1] {{{number}.5}}> (n)");
        let wide: Vec<String> = ["a", "b", "c", "d", "e"].into_iter().enumerate().map(fill).collect();
        let graph = format!(
            "g (float[100000] x) => (float[100000] y) <int64[1] n = {{100000}}> {{ {} y = Sum (x, a, b, c, d, e) }}",
            wide.join(" ")
        );
        check_refuses(&FoldConstants, &graph, "fold `c` (+390.6 KiB), allowed with --max-growth 391KB");
        check_refuses(&FoldConstants, &graph, " more results (+");
    }

    #[test]
    fn counts_what_a_result_frees() {
        // The transposed weight takes the place of the weight, unless that is used elsewhere.
        let weight = vec!["1"; 600].join(", ");
        let alone = format!(
            "g (float[2,20] x) => (float[2,30] y) <float[30,20] w = {{{weight}}}> {{
                t = Transpose (w)
                y = MatMul (x, t)
            }}"
        );
        assert!(!check(&FoldConstants, &alone).contains("Transpose"));
        let shared = format!(
            "g (float[2,20] x) => (float[2,30] y, float[30,20] z) <float[30,20] w = {{{weight}}}> {{
                t = Transpose (w)
                y = MatMul (x, t)
                z = Neg (w)
            }}"
        );
        // Two results of which one can take the place of the weight: they are judged together.
        check_refuses(&FoldConstants, &shared, "(+2.3 KiB), allowed with --max-growth 3KB");
    }

    #[test]
    fn folds_in_a_subgraph_and_beside_an_output() {
        let graph = "g (bool c, float[2] x) => (float[2] y, float[2] k) <float[2] a = {1, 2}> {
            k = Neg (a)
            y = If (c) <
                then_branch = t () => (float[2] p) { u = Add (k, a)  p = Add (u, x) },
                else_branch = e () => (float[2] r) { r = Mul (k, k) }
            >
        }";
        assert_snapshot!(check(&FoldConstants, graph), @r#"
        g (bool c, float[2] x) => (float[2] y, float[2] k) <
            float[2] k_2 = {-1, -2}
        > {
            y = If (c) <then_branch = t () => (float[2] p) <
                float[2] u = {0, 0}
            > {
                p = Add (u, x)  # float[2]
            }, else_branch = e () => (r_1) <
                float[2] r = {1, 4}
            > {
                r_1 = Identity (r)
            }>  # float[2]
            k = Identity (k_2)  # float[2]
        }
        "#);
    }

    #[test]
    fn leaves_random_and_quantizing_nodes() {
        check_untouched(
            &FoldConstants,
            "g (float[2] x) => (float[2] y, float[2] z)
            <int8[2] q = {1, 2}, float s = {0.5}, float[2] a = {1, 2}> {
                w = DequantizeLinear (q, s)
                r = RandomNormalLike (a)
                n = Mul (r, x)
                y = Add (x, w)
                z = Identity (n)
            }",
        );
    }

    #[test]
    fn says_what_nobody_can_compute() {
        let graph = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            e = Exp (a)
            y = Add (x, e)
        }";
        check_refuses_in(&FoldConstants, graph, "no runtime is there to compute it", &PassContext::default());
    }

    #[test]
    fn says_what_a_runtime_does_not_compute() {
        let graph = |weights: &str, body: &str| format!("g (float[1] x) => (float[1] y) <{weights}> {{ {body} }}");
        let far = graph("float[2] a = {1, 2}, int64[1] i = {5}", "g = Gather (a, i) e = Exp (g) y = Add (x, e)");
        check_refuses(&FoldConstants, &far, " declines to compute it: ");
        let huge = graph(
            "int64[1] n = {100000000}",
            "w = ConstantOfShape (n) m = ReduceMax <keepdims = 0> (w) y = Add (x, m)",
        );
        check_refuses(&FoldConstants, &huge, "the result is too large to be computed ahead");
        let many = vec!["1"; 300_000].join(", ");
        let large = graph(
            &format!("float[300000] a = {{{many}}}"),
            "e = Exp (a) m = ReduceMax <keepdims = 0> (e) y = Add (x, m)",
        );
        check_refuses(&FoldConstants, &large, "its constants are too large to be copied");
    }

    #[test]
    fn says_that_a_runtime_gives_nothing() {
        struct Silent;
        impl lathe_analysis::Evaluate for Silent {
            fn run(
                &self,
                _: &Model,
                _: &[(String, Tensor)],
            ) -> Result<Vec<(String, Tensor)>, lathe_analysis::EvaluateError> {
                Ok(Vec::new())
            }
            fn name(&self) -> String {
                "a silent runtime".to_owned()
            }
        }
        let graph = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { e = Exp (a) y = Add (x, e) }";
        let cx = PassContext::default().with_evaluator(&Silent);
        check_refuses_in(&FoldConstants, graph, "a silent runtime declines to compute it: an output is missing", &cx);
    }
}
