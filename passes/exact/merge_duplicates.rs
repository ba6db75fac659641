//! Common subexpressions: nodes that compute the same thing compute it once.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext, Saving};
use lathe_analysis::{Operator, Trait};
use lathe_ir::{AttributeValue, Graph, Initializer, Model, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::{BTreeMap, HashMap};

/// See [`INFO`].
pub struct MergeDuplicates;

static INFO: Info = Info {
    name: "merge-duplicates",
    summary: "computes a value once that several nodes compute alike",
    doc: "Two nodes with the same operator, attributes and inputs give the same outputs; the first stays and serves the \
          users of the second. Subgraphs are compared node by node. A node of a subgraph gives way to an equal one of a \
          graph around it. Operators that draw random numbers, operators of unknown domains and calls of local \
          functions are left alone, and so are two nodes that both produce outputs of the model.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

/// Constants inside a compared attribute or subgraph may hold this many bytes.
const LARGEST_CONSTANT: usize = 4096;
/// Subgraphs nested deeper than this are not compared.
const DEEPEST: usize = 8;

impl Pass for MergeDuplicates {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, _: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let called: Vec<(String, String)> =
            model.functions.iter().map(|f| (f.domain.clone(), f.name.clone())).collect();
        let pure = |domain: &str, op: &str| {
            let known = matches!(domain, "" | "ai.onnx" | "ai.onnx.ml" | "com.microsoft");
            let random = Operator::named(domain, op).is_some_and(|operator| operator.is(Trait::Random));
            known && !random && !called.iter().any(|(d, n)| d == domain && n == op)
        };
        for (graph, _) in model.graphs_mut() {
            merge(graph, &pure, &mut outcome)?;
        }
        Ok(outcome)
    }
}

type Pure<'a> = &'a dyn Fn(&str, &str) -> bool;

fn merge(graph: &mut Graph, pure: Pure, outcome: &mut Outcome) -> Result<(), Error> {
    graph.sort()?;
    let mut seen: BTreeMap<ScopeId, HashMap<Vec<u8>, NodeId>> = BTreeMap::new();
    for scope in graph.scopes() {
        let mut visible = vec![scope];
        while let Some(outer) = graph.parent(visible[visible.len() - 1]) {
            visible.push(outer);
        }
        let nodes: Vec<NodeId> = graph.nodes(scope).collect();
        for id in nodes {
            // A node merged before may have held the scope of this one.
            if graph.get(id).is_none() {
                continue;
            }
            let mut writer = Writer { graph, pure, local: HashMap::new(), out: Vec::new() };
            if writer.node(id, 0).is_none() {
                continue;
            }
            let key = writer.out;
            match visible.iter().find_map(|s| seen.get(s)?.get(&key).copied()) {
                Some(first) if can_serve(graph, first, id) => {
                    outcome.change("merge", format!("{} repeats {}", graph.describe(id), graph.describe(first)));
                    for index in 0..graph.node(id).outputs().len() {
                        if let (Some(old), Some(new)) = (graph.node(id).output(index), graph.node(first).output(index))
                        {
                            graph.replace_uses(old, new);
                        }
                    }
                    graph.remove_node(id);
                }
                Some(_) => {}
                None => _ = seen.entry(scope).or_default().insert(key, id),
            }
        }
    }
    graph.sort()?;
    Ok(())
}

/// Whether the outputs of `first` can take the place of those of `second` without copies.
fn can_serve(graph: &Graph, first: NodeId, second: NodeId) -> bool {
    let (a, b) = (graph.node(first), graph.node(second));
    (0..b.outputs().len()).all(|index| {
        let Some(old) = b.output(index) else { return true };
        let Some(new) = a.output(index) else { return false };
        graph.value(old).uses().iter().all(|u| match u {
            Use::Output(..) => a.scope() == b.scope() && !graph.is_output(new),
            _ => true,
        }) && graph.value(old).uses().iter().filter(|u| matches!(u, Use::Output(..))).count() <= 1
    })
}

/// Writes down what a node computes; equal texts mean equal results.
struct Writer<'a> {
    graph: &'a Graph,
    pure: Pure<'a>,
    /// Values defined inside the subgraph being written, by number.
    local: HashMap<ValueId, usize>,
    out: Vec<u8>,
}

impl Writer<'_> {
    fn word(&mut self, word: &[u8]) {
        self.out.extend((word.len() as u64).to_le_bytes());
        self.out.extend(word);
    }

    fn number(&mut self, number: u64) {
        self.out.extend(number.to_le_bytes());
    }

    fn value(&mut self, value: Option<ValueId>) {
        match value {
            None => self.out.push(0),
            Some(value) => match self.local.get(&value) {
                Some(&number) => {
                    self.out.push(1);
                    self.number(number as u64);
                }
                None => {
                    self.out.push(2);
                    self.number(value.index() as u64);
                }
            },
        }
    }

    /// `None` where the node cannot be compared.
    fn node(&mut self, id: NodeId, depth: usize) -> Option<()> {
        let node = self.graph.node(id);
        if depth > DEEPEST || !(self.pure)(&node.domain, &node.op_type) {
            return None;
        }
        self.word(node.op_type.as_bytes());
        self.word(if node.is_standard() { b"" } else { node.domain.as_bytes() });
        self.number(node.outputs().len() as u64);
        self.number(node.inputs().len() as u64);
        for &input in node.inputs() {
            self.value(input);
        }
        let mut attributes: Vec<_> = node.attributes.iter().collect();
        attributes.sort_by(|a, b| a.name.cmp(&b.name));
        for attribute in attributes {
            self.word(attribute.name.as_bytes());
            self.attribute(&attribute.value, depth)?;
        }
        Some(())
    }

    fn attribute(&mut self, value: &AttributeValue, depth: usize) -> Option<()> {
        match value {
            AttributeValue::Float(v) => self.word(&[&[1], &v.to_bits().to_le_bytes()[..]].concat()),
            AttributeValue::Int(v) => self.word(&[&[2], &v.to_le_bytes()[..]].concat()),
            AttributeValue::String(v) => self.word(&[&[3], &v[..]].concat()),
            AttributeValue::Floats(v) => {
                self.out.push(4);
                let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
                self.word(&bytes);
            }
            AttributeValue::Ints(v) => {
                self.out.push(5);
                let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
                self.word(&bytes);
            }
            AttributeValue::Strings(v) => {
                self.out.push(6);
                self.number(v.len() as u64);
                v.iter().for_each(|s| self.word(s));
            }
            AttributeValue::Tensor(v) => {
                self.out.push(7);
                self.tensor(v)?;
            }
            AttributeValue::Graph(scope) => {
                self.out.push(8);
                self.scope(*scope, depth + 1)?;
            }
            AttributeValue::Reference { name, kind } => {
                self.out.push(9);
                self.word(name.as_bytes());
                self.number(*kind as u64);
            }
            _ => return None,
        }
        Some(())
    }

    fn tensor(&mut self, tensor: &Tensor) -> Option<()> {
        if tensor.byte_len() > LARGEST_CONSTANT || tensor.string_data().is_some() {
            return None;
        }
        self.number(tensor.dtype().code() as u64);
        let dims: Vec<u8> = tensor.dims().iter().flat_map(|d| d.to_le_bytes()).collect();
        self.word(&dims);
        self.word(tensor.bytes());
        Some(())
    }

    fn scope(&mut self, scope: ScopeId, depth: usize) -> Option<()> {
        let graph = self.graph;
        let define = |writer: &mut Self, value: ValueId| {
            let number = writer.local.len();
            writer.local.insert(value, number);
        };
        self.number(graph.scope(scope).inputs().len() as u64);
        for &input in graph.scope(scope).inputs() {
            define(self, input);
        }
        for value in graph.initializers(scope) {
            match graph.value(value).initializer() {
                Some(Initializer::Dense(tensor)) => self.tensor(tensor)?,
                _ => return None,
            }
            define(self, value);
        }
        for id in graph.nodes(scope) {
            self.node(id, depth)?;
            for &output in graph.node(id).outputs().iter().flatten() {
                define(self, output);
            }
        }
        for &output in graph.scope(scope).outputs() {
            self.value(Some(output));
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_untouched};
    use insta::assert_snapshot;

    #[test]
    fn merges_chains_in_one_sweep() {
        let graph = "g (float[2] x) => (float[2] y) {
            a = Exp (x)
            b = Neg (a)
            c = Exp (x)
            d = Neg (c)
            y = Add (b, d)
        }";
        assert_snapshot!(check(&MergeDuplicates, graph), @r#"
        g (float[2] x) => (float[2] y) {
            a = Exp (x)
            b = Neg (a)
            y = Add (b, b)  # float[2]
        }
        "#);
    }

    #[test]
    fn attributes_of_every_kind_are_compared() {
        let graph = |first: &str, second: &str| {
            format!(
                "<ir_version: 7, opset_import: [\"\" : 8]>
                g (float[1,1,2,2] x) => (float[1,1,a,b] y, float[1,1,c,d] z) {{
                    p = Upsample <{first}> (x)
                    q = Upsample <{second}> (x)
                    y = Neg (p)
                    z = Abs (q)
                }}"
            )
        };
        let (two, three) =
            ("mode = \"nearest\", scales = [1.0, 1.0, 2.0, 2.0]", "mode = \"nearest\", scales = [1.0, 1.0, 2.0, 3.0]");
        assert_eq!(check(&MergeDuplicates, &graph(two, two)).matches("Upsample").count(), 1);
        check_untouched(&MergeDuplicates, &graph(two, three));
        check_untouched(&MergeDuplicates, &graph(two, &two.replace("nearest", "linear")));
    }

    #[test]
    fn merges_into_the_graph_around_and_keeps_output_names() {
        let graph = "g (bool c, float[2] x) => (float[2] y, float[2] z) {
            a = Exp (x)
            z = Exp (x)
            y = If (c) <
                then_branch = t () => (float[2] p) { q = Exp (x)  p = Neg (q) },
                else_branch = e () => (float[2] r) { r = Neg (a) }
            >
        }";
        assert_snapshot!(check(&MergeDuplicates, graph), @r#"
        g (bool c, float[2] x) => (float[2] y, float[2] z) {
            z = Exp (x)  # float[2]
            y = If (c) <then_branch = t () => (float[2] p) {
                p = Neg (z)  # float[2]
            }, else_branch = e () => (float[2] r) {
                r = Neg (z)  # float[2]
            }>  # float[2]
        }
        "#);
    }

    #[test]
    fn leaves_two_outputs_random_numbers_and_other_attributes_alone() {
        check_untouched(&MergeDuplicates, "g (float[2] x) => (float[2] y, float[2] z) { y = Exp (x)  z = Exp (x) }");
        check_untouched(
            &MergeDuplicates,
            "g (float[2] x) => (float[2] y) {
            a = RandomNormalLike (x)
            b = RandomNormalLike (x)
            y = Sub (a, b)
        }",
        );
        check_untouched(
            &MergeDuplicates,
            "g (float[2,2] x) => (float[2,2] y) {
            a = Softmax <axis = 0> (x)
            b = Softmax <axis = 1> (x)
            y = Sub (a, b)
        }",
        );
    }
}
