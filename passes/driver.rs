//! The one place that edits graphs for rules.

use crate::{
    Editor, Error, Outcome, PassContext, edit_graphs,
    rule::{Match, Refusal, Replacement, Rule},
};
use lathe_analysis::Facts;
use lathe_ir::{Attribute, AttributeValue, DataType, Function, Graph, Model, NodeId, Patch, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Rewrites per node of the graph after which the driver stops: rules that undo each other would go on for ever.
const REWRITES_PER_NODE: usize = 8;

/// Applies rules everywhere in a model, local functions included, until none acts any more.
pub fn rewrite(model: &mut Model, cx: &PassContext, rules: &[Rule]) -> Result<Outcome, Error> {
    edit_graphs(model, cx, |editor| rewrite_graph(editor, rules))
}

fn rewrite_graph(editor: &mut Editor, rules: &[Rule]) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    let mut by_root: BTreeMap<&str, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        let mut ops: Vec<&str> = rule.pattern.roots().iter().map(|(_, op)| op.as_str()).collect();
        ops.dedup();
        for op in ops {
            by_root.entry(op).or_default().push(rule);
        }
    }
    let wanted = |graph: &Graph, id: NodeId| by_root.contains_key(graph.node(id).op_type.as_str());
    let first: Vec<NodeId> = graph.all_nodes().into_iter().filter(|&id| wanted(graph, id)).collect();
    if first.is_empty() {
        return Ok(());
    }
    let mut driver =
        Driver { graph, opsets, functions, cx, facts: None, outcome, refused: BTreeSet::new(), labels: None };
    let budget = driver.graph.node_bound().saturating_mul(REWRITES_PER_NODE) + 64;
    let mut queued: BTreeSet<NodeId> = first.iter().copied().collect();
    let mut queue: VecDeque<NodeId> = first.into();
    let mut rewrites = 0;
    while let Some(id) = queue.pop_front() {
        queued.remove(&id);
        let Some(node) = driver.graph.get(id) else { continue };
        let Some(rules) = by_root.get(node.op_type.as_str()) else { continue };
        for rule in rules {
            let Some(touched) = driver.try_rule(rule, id) else { continue };
            rewrites += 1;
            if rewrites > budget {
                driver.outcome.refuse("the rules went on without end and were stopped", rule.name);
                return driver.finish(rewrites);
            }
            for near in touched {
                let live = driver.graph.get(near).is_some_and(|n| by_root.contains_key(n.op_type.as_str()));
                if live && queued.insert(near) {
                    queue.push_back(near);
                }
            }
            break;
        }
    }
    driver.finish(rewrites)
}

/// In a local function, an attribute that the caller passes has no value that a rule could read.
fn require_own_attributes(graph: &Graph, nodes: &[NodeId]) -> Result<(), Refusal> {
    let passed = |a: &Attribute| matches!(a.value, AttributeValue::Reference { .. });
    match nodes.iter().any(|&id| graph.node(id).attributes.iter().any(passed)) {
        true => Err("an attribute depends on the caller of the function".into()),
        false => Ok(()),
    }
}

/// Whether a node, if it is a cast, is between floating-point types of 16 bits at least: such a cast only rounds.
fn casts_floats(graph: &Graph, facts: &Facts, id: NodeId) -> bool {
    let node = graph.node(id);
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
    let is_float = |v: Option<ValueId>| v.and_then(|v| facts.elem(v)).is_some_and(|elem| floats.contains(&elem));
    !node.is("Cast") || (is_float(node.input(0)) && is_float(node.output(0)))
}

struct Driver<'a> {
    graph: &'a mut Graph,
    opsets: &'a [(String, i64)],
    functions: &'a [Function],
    cx: &'a PassContext<'a>,
    /// Inferred at the first match.
    facts: Option<Facts>,
    outcome: &'a mut Outcome,
    /// Places whose refusal is already counted.
    refused: BTreeSet<(NodeId, &'static str)>,
    /// The names that nodes have or had, collected when one is first needed.
    labels: Option<BTreeSet<String>>,
}

impl Driver<'_> {
    /// Hands the facts back, and puts the nodes in order if any were added.
    fn finish(self, rewrites: usize) -> Result<(), Error> {
        if rewrites > 0 {
            self.graph.sort()?;
        }
        if let Some(facts) = self.facts {
            self.cx.facts.keep(self.graph, facts);
        }
        Ok(())
    }

    /// A name like `base` that no node has: ONNX Runtime refuses models in which two do.
    fn free_label(&mut self, base: &str) -> String {
        let graph = &self.graph;
        let taken = self
            .labels
            .get_or_insert_with(|| graph.all_nodes().into_iter().map(|id| graph.node(id).name.clone()).collect());
        let mut number = 0;
        loop {
            let label = format!("{base}_{number}");
            if taken.insert(label.clone()) {
                return label;
            }
            number += 1;
        }
    }

    /// What the provider has no kernel for is not written, unless it was there before.
    fn require_kernels(&self, nodes: &[NodeId], patch: &Patch) -> Result<(), Refusal> {
        let missing = &self.cx.missing_kernels;
        if missing.is_empty() {
            return Ok(());
        }
        let there: BTreeSet<String> = nodes.iter().map(|&id| self.graph.node(id).operator()).collect();
        match patch.operators().find(|op| missing.contains(op) && !there.contains(op)) {
            Some(op) => Err(format!("the provider has no right kernel for {op}").into()),
            None => Ok(()),
        }
    }

    /// Tries one rule at one node. Returns the nodes worth another look if it acted.
    fn try_rule(&mut self, rule: &Rule, id: NodeId) -> Option<Vec<NodeId>> {
        let bindings = rule.pattern.find(self.graph, id)?;
        let (cx, opsets, functions) = (self.cx, self.opsets, self.functions);
        let facts = self.facts.get_or_insert_with(|| cx.facts.take(self.graph, opsets, functions));
        let mut patch = Patch::new(self.graph);
        let nodes = bindings.nodes().to_vec();
        let place =
            Match { graph: self.graph, facts, opsets: self.opsets, functions: self.functions, cx: self.cx, bindings };
        if rule.pattern.passes_casts() && !nodes.iter().all(|&id| casts_floats(self.graph, place.facts, id)) {
            return None;
        }
        let result = require_own_attributes(self.graph, &nodes).and_then(|()| (rule.action)(&place, &mut patch));
        let result = result.and_then(|replacement| {
            if !rule.shares {
                self.require_private(&nodes)?;
            }
            self.require_complete(id, &replacement)?;
            self.require_kernels(&nodes, &patch)?;
            Ok(replacement)
        });
        match result {
            Ok(replacement) => Some(self.carry_out(rule, id, &nodes, patch, replacement)),
            Err(Refusal::NoMatch) => None,
            Err(Refusal::Reason(reason)) => {
                if self.refused.insert((id, rule.name)) {
                    self.outcome.refuse(format!("{}: {reason}", rule.name), self.graph.describe(id));
                }
                None
            }
        }
    }

    /// Inner values of a match must be used inside it only.
    fn require_private(&self, nodes: &[NodeId]) -> Result<(), Refusal> {
        for &inner in &nodes[1..] {
            for &value in self.graph.node(inner).outputs().iter().flatten() {
                for place in self.graph.value(value).uses() {
                    match place {
                        Use::Node(user, _) if nodes.contains(user) => {}
                        Use::Output(..) => return Err("an inner value is a graph output".into()),
                        _ => return Err("an inner value has other uses".into()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Every used output of the root needs something that takes its place.
    fn require_complete(&self, root: NodeId, replacement: &Replacement) -> Result<(), Refusal> {
        for (index, value) in self.graph.node(root).outputs().iter().enumerate() {
            let Some(value) = value else { continue };
            let used = !self.graph.value(*value).uses().is_empty();
            if used && !replacement.outputs.iter().any(|(i, _)| *i == index) {
                return Err("another output of the node is used".into());
            }
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        rule: &Rule,
        root: NodeId,
        nodes: &[NodeId],
        patch: Patch,
        replacement: Replacement,
    ) -> Vec<NodeId> {
        let place = self.graph.describe(root);
        let scope = self.graph.node(root).scope();
        let outputs: Vec<Option<ValueId>> = self.graph.node(root).outputs().to_vec();
        let base = outputs.iter().flatten().next().map(|&v| self.graph.value(v).name.clone()).unwrap_or_default();
        let label = self.graph.node(root).name.clone();
        let of_root = replacement.outputs.into_iter().filter_map(|(index, new)| Some(((*outputs.get(index)?)?, new)));
        let replaced: Vec<(ValueId, ValueId)> = of_root.chain(replacement.others).collect();
        let made: BTreeSet<ValueId> = replaced.iter().map(|r| r.1).filter(|&v| patch.makes(v)).collect();
        let mut touched: Vec<NodeId> = Vec::new();
        for &id in nodes {
            touched.extend(self.graph.node(id).inputs().iter().flatten().filter_map(|&v| self.graph.producer(v)));
        }
        let added = self.graph.apply(patch, scope, &base);
        for (index, &id) in added.iter().enumerate() {
            if self.graph.node(id).name.is_empty() && !label.is_empty() {
                let last = index + 1 == added.len();
                self.graph.node_mut(id).name = if last { label.clone() } else { self.free_label(&label) };
            }
        }
        let facts = self.facts.as_mut().expect("a rule acts only on a place with facts");
        for &id in &added {
            facts.update(self.graph, self.opsets, self.functions, id);
        }
        touched.extend(&added);
        let mut unused = nodes.to_vec();
        for (old, new) in replaced {
            unused.extend(self.graph.producer(old));
            let users = self.graph.value(old).uses().iter().filter_map(|u| match u {
                Use::Node(node, _) => Some(*node),
                _ => None,
            });
            touched.extend(users);
            let facts = self.facts.as_mut().expect("a rule acts only on a place with facts");
            if made.contains(&new) || facts.shape(new).is_none() {
                facts.inherit(new, old);
            }
            // A value that was there before keeps its own name.
            match made.contains(&new) {
                true => self.graph.replace(old, new),
                false => self.graph.replace_uses(old, new),
            }
        }
        self.graph.remove_unused(unused);
        self.outcome.change(rule.name, place);
        touched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{pat, rule, testing::model};
    use lathe_ir::{Node, text};

    fn apply(graph: &str, rules: &[Rule]) -> (Model, Outcome) {
        let mut model = model(graph);
        let outcome = rewrite(&mut model, &PassContext::default(), rules).unwrap();
        model.check().unwrap();
        (model, outcome)
    }

    fn becomes(from: &str, to: &'static str) -> Rule {
        rule(
            to,
            lathe_ir::Pattern::parse(&format!("{from}(x)")),
            move |m, g| Ok(g.node(Node::new(to), &[m.value("x")])),
        )
    }

    #[test]
    fn stops_rules_that_undo_each_other() {
        let graph = "g (float[2] x) => (float[2] y) { a = Neg (x) y = Abs (a) }";
        let (_, outcome) = apply(graph, &[becomes("Neg", "Exp"), becomes("Exp", "Neg")]);
        assert_eq!(outcome.refusals.len(), 1);
        assert!(outcome.refusals.contains_key("the rules went on without end and were stopped"));
        // A budget of eight rewrites a node and 64, of which the last is told.
        assert_eq!(outcome.changes.len(), 2 * REWRITES_PER_NODE + 65);
    }

    #[test]
    fn a_chain_of_rules_that_ends_is_not_stopped() {
        let graph = "g (float[2] x) => (float[2] y) { y = Neg (x) }";
        let (model, outcome) = apply(graph, &[becomes("Neg", "Exp"), becomes("Exp", "Log"), becomes("Log", "Abs")]);
        assert_eq!((outcome.changes.len(), outcome.refusals.len()), (3, 0));
        assert!(text::print_graph(&model).contains("y = Abs (x)"));
    }

    #[test]
    fn keeps_attributes_that_the_caller_decides() {
        let graph = |attribute: &str| {
            format!(
                r#"<ir_version: 10, opset_import: ["": 18, "local": 1]>
            g (float[2,3] x) => (float[3,2] y) {{ y = local.F <order = [1, 0]> (x) }}
            <domain: "local", opset_import: ["": 18]>
            F <order> (a) => (b) {{ t = Transpose <{attribute}> (a) b = Neg (t) }}"#
            )
        };
        let rules = || [rule("neg", pat!(Neg(inner: Transpose(x))), |m, _| Ok(m.value("x")))];
        let (_, outcome) = apply(&graph("perm: ints = @order"), &rules());
        assert!(outcome.changes.is_empty());
        assert!(outcome.refusals.contains_key("neg: an attribute depends on the caller of the function"));
        let (_, outcome) = apply(&graph("perm = [1, 0]"), &rules());
        assert_eq!(outcome.changes.len(), 1);
    }

    #[test]
    fn keeps_nodes_of_which_another_output_is_used() {
        let rules = || [rule("take", pat!(Dropout(x)), |m, g| Ok(g.node(Node::new("Neg"), &[m.value("x")])))];
        let graph = |mask: &str| {
            format!("g (float[2] x) => (float[2] y, bool[2] m) {{ y, {mask} = Dropout (x) z = Not (t) m = Not (z) }}")
        };
        let used = graph("t");
        let (_, outcome) = apply(&used, &rules());
        assert!(outcome.changes.is_empty());
        assert!(outcome.refusals.contains_key("take: another output of the node is used"));
        let unused = graph("w").replace("(float[2] x)", "(float[2] x, bool[2] t)");
        assert_eq!(apply(&unused, &rules()).1.changes.len(), 1);
    }

    #[test]
    fn counts_a_refusal_once_for_every_place() {
        let rules = [rule("never", pat!(Neg(x)), |m, _| {
            m.require(false, "it never does")?;
            Ok(m.value("x"))
        })];
        let graph = "g (float[2] x) => (float[2] y) { a = Neg (x) y = Neg (a) }";
        let (_, outcome) = apply(graph, &rules);
        assert_eq!(outcome.refusals["never: it never does"].0, 2);
        assert_eq!(outcome.refusals["never: it never does"].1, "node `a` (Neg)");
    }

    #[test]
    fn nodes_get_names_that_no_other_node_has() {
        let mut model = model(
            "g (float[2] x) => (float[2] y, float[2] z) {
                [add_0] t = Neg (x)
                [add] y = Add (t, t)
                [other] z = Add (x, t)
            }",
        );
        let steps = rule("steps", pat!(Add(a, b)), |m, g| {
            let a = g.node(Node::new("Abs"), &[m.value("a")]);
            let b = g.node(Node::new("Abs"), &[a]);
            Ok(g.node(Node::new("Mul"), &[b, m.value("b")]))
        });
        rewrite(&mut model, &PassContext::default(), &[steps]).unwrap();
        let mut names: Vec<&str> =
            model.graph.all_nodes().into_iter().map(|id| model.graph.node(id).name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["add", "add_0", "add_1", "add_2", "other", "other_0", "other_1"]);
    }
}
