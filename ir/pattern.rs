//! Patterns: small graphs to look for, written as ONNX text.

use crate::{DataType, Graph, NodeId, ScopeId, Tensor, ValueId};

/// A pattern such as `outer: Transpose(inner: Transpose(x))`.
///
/// - `Op(…)` is a node; `A|B(…)` one of several operators; `com.microsoft.Op(…)` one of another domain.
/// - A bare name binds a value; the same name twice means the same value. `_` binds nothing.
/// - A number is a constant with one element of that value.
/// - `label:` names a node. `Op?(x)` also matches `x` itself, where there is no such node.
/// - `…` as the last argument (`..`) allows further inputs; otherwise there are exactly as many as written.
/// - Add, Mul, Min, Max, And, Or, Xor and Equal match either way round.
#[derive(Debug, Clone)]
pub struct Pattern {
    root: Term,
}

#[derive(Debug, Clone)]
enum Term {
    Any,
    Value(String),
    Number(f64),
    Node { label: Option<String>, ops: Vec<(String, String)>, optional: bool, args: Vec<Term>, rest: bool },
}

/// What a pattern found: the values and nodes its names stand for.
#[derive(Debug, Clone, Default)]
pub struct Bindings {
    values: Vec<(String, ValueId)>,
    labels: Vec<(String, NodeId)>,
    nodes: Vec<NodeId>,
}

impl Bindings {
    /// The value a name stands for.
    pub fn value(&self, name: &str) -> Option<ValueId> {
        self.values.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// The node a label stands for; `None` where an optional node is absent.
    pub fn node(&self, label: &str) -> Option<NodeId> {
        self.labels.iter().find(|(n, _)| n == label).map(|(_, v)| *v)
    }

    /// Every matched node, the root first.
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }
}

const COMMUTATIVE: &[&str] = &["Add", "Mul", "Min", "Max", "And", "Or", "Xor", "Equal"];

impl Pattern {
    /// Reads a pattern. Panics if it is malformed: patterns are part of the program.
    pub fn parse(text: &str) -> Pattern {
        let mut parser = Parser { text: text.as_bytes(), at: 0 };
        let root = parser.term();
        assert!(parser.peek().is_none(), "pattern `{text}` goes on after its root");
        assert!(matches!(root, Term::Node { .. }), "pattern `{text}` is no node");
        Pattern { root }
    }

    /// The operators the root may be, with their domains.
    pub fn roots(&self) -> &[(String, String)] {
        match &self.root {
            Term::Node { ops, .. } => ops,
            _ => &[],
        }
    }

    /// Matches the pattern with its root at `node`.
    pub fn find(&self, graph: &Graph, node: NodeId) -> Option<Bindings> {
        let Term::Node { label, ops, args, rest, .. } = &self.root else { return None };
        let mut found = Bindings::default();
        let scope = graph.node(node).scope();
        let search = Search { graph, scope };
        search.node(node, label.as_deref(), ops, args, *rest, &mut Vec::new(), &mut found).then_some(found)
    }
}

struct Search<'a> {
    graph: &'a Graph,
    scope: ScopeId,
}

type Goals<'p> = Vec<(&'p Term, Option<ValueId>)>;

impl Search<'_> {
    /// Meets all goals, the last one first; on failure `found` is as it was.
    fn solve<'p>(&self, goals: &mut Goals<'p>, found: &mut Bindings) -> bool {
        let Some((term, value)) = goals.pop() else { return true };
        let met = match (term, value) {
            (Term::Any, _) => self.solve(goals, found),
            (_, None) => false,
            (Term::Number(number), Some(value)) => {
                self.graph.constant(value).is_some_and(|t| is_number(t, *number)) && self.solve(goals, found)
            }
            (Term::Value(name), Some(value)) => match found.value(name) {
                Some(bound) => bound == value && self.solve(goals, found),
                None => {
                    found.values.push((name.clone(), value));
                    let met = self.solve(goals, found);
                    if !met {
                        found.values.pop();
                    }
                    met
                }
            },
            (Term::Node { label, ops, optional, args, rest }, Some(value)) => {
                let producer = self.graph.producer(value);
                let here = producer.filter(|&p| {
                    self.graph.node(p).scope() == self.scope && self.graph.node(p).output(0) == Some(value)
                });
                let direct = here.is_some_and(|p| self.node(p, label.as_deref(), ops, args, *rest, goals, found));
                direct
                    || (*optional && args.len() == 1 && {
                        goals.push((&args[0], Some(value)));
                        let met = self.solve(goals, found);
                        if !met {
                            goals.pop();
                        }
                        met
                    })
            }
        };
        if !met {
            goals.push((term, value));
        }
        met
    }

    #[allow(clippy::too_many_arguments)] // The fields of one term and the state of the search.
    fn node<'p>(
        &self,
        id: NodeId,
        label: Option<&str>,
        ops: &[(String, String)],
        args: &'p [Term],
        rest: bool,
        goals: &mut Goals<'p>,
        found: &mut Bindings,
    ) -> bool {
        let node = self.graph.node(id);
        let domain = if node.is_standard() { "" } else { node.domain.as_str() };
        if !ops.iter().any(|(d, op)| *op == node.op_type && d == domain) {
            return false;
        }
        let inputs = node.inputs();
        if inputs.len() < args.len() || (inputs.len() > args.len() && !rest) {
            return false;
        }
        found.nodes.push(id);
        if let Some(label) = label {
            found.labels.push((label.to_owned(), id));
        }
        let depth = goals.len();
        let swap = args.len() == 2 && domain.is_empty() && COMMUTATIVE.contains(&node.op_type.as_str());
        let orders: &[[usize; 2]] = if swap { &[[0, 1], [1, 0]] } else { &[[0, 1]] };
        for order in orders {
            for index in (0..args.len()).rev() {
                let input = if swap { inputs[order[index]] } else { inputs[index] };
                goals.push((&args[index], input));
            }
            if self.solve(goals, found) {
                return true;
            }
            goals.truncate(depth);
        }
        found.nodes.pop();
        if label.is_some() {
            found.labels.pop();
        }
        false
    }
}

/// Whether a tensor holds exactly one element that is `number`, as far as its type can tell.
fn is_number(tensor: &Tensor, number: f64) -> bool {
    let tolerance = match tensor.dtype() {
        DataType::Float16 => 1e-3,
        DataType::Bfloat16 => 8e-3,
        DataType::Float => 1e-6,
        dtype if dtype.is_integer() || dtype == DataType::Double => 1e-12,
        _ => return false,
    };
    tensor.len() == 1
        && tensor.scalar_f64().is_some_and(|found| (found - number).abs() <= tolerance * number.abs().max(1e-30))
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn word(&mut self) -> String {
        self.peek();
        let start = self.at;
        let inside = |b: &u8| b.is_ascii_alphanumeric() || b"_.".contains(b);
        while self.text.get(self.at).is_some_and(inside) {
            self.at += 1;
            // `stringify!` may put spaces around the dots of a domain.
            if self.text.get(self.at) == Some(&b' ') && self.text.get(self.at + 1) == Some(&b'.') {
                self.at += 1;
            }
        }
        String::from_utf8_lossy(&self.text[start..self.at]).replace(' ', "")
    }

    fn term(&mut self) -> Term {
        let negative = self.eat(b'-');
        let word = self.word();
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            let number: f64 = word.parse().expect("a pattern's number is a number");
            return Term::Number(if negative { -number } else { number });
        }
        if self.eat(b':') {
            let Term::Node { ops, optional, args, rest, .. } = self.term() else {
                panic!("label `{word}` stands before something that is no node");
            };
            return Term::Node { label: Some(word), ops, optional, args, rest };
        }
        let mut ops = vec![word];
        while self.eat(b'|') {
            ops.push(self.word());
        }
        let optional = self.eat(b'?');
        if !self.eat(b'(') {
            let name = ops.pop().expect("one word was read");
            return if name == "_" { Term::Any } else { Term::Value(name) };
        }
        let (mut args, mut rest) = (Vec::new(), false);
        while !self.eat(b')') {
            if self.eat(b'.') {
                while self.eat(b'.') {}
                rest = true;
                continue;
            }
            args.push(self.term());
            self.eat(b',');
            assert!(self.peek().is_some(), "pattern ends inside an argument list");
        }
        let split = |op: String| match op.rsplit_once('.') {
            Some((domain, op)) => (domain.to_owned(), op.to_owned()),
            None => (String::new(), op),
        };
        Term::Node { label: None, ops: ops.into_iter().map(split).collect(), optional, args, rest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Node;

    fn graph() -> (Graph, NodeId) {
        let mut g = Graph::new("g");
        let x = g.add_value("x", None);
        g.add_input(ScopeId::MAIN, x);
        let half = g.add_initializer(ScopeId::MAIN, "half", Tensor::from_f32s(&[], &[0.5]));
        let erf = g.append(ScopeId::MAIN, Node::new("Erf"), &[x], "erf");
        let scaled = g.append(ScopeId::MAIN, Node::new("Mul"), &[half, x], "scaled");
        let y = g.append(ScopeId::MAIN, Node::new("Mul"), &[scaled, erf], "y");
        g.add_output(ScopeId::MAIN, y);
        let root = g.producer(y).unwrap();
        (g, root)
    }

    #[test]
    fn matches_commutative_operators_either_way_round() {
        let (g, root) = graph();
        let pattern = Pattern::parse("out: Mul(Erf(x), inner: Mul(x, 0.5))");
        let found = pattern.find(&g, root).unwrap();
        assert_eq!(g.value(found.value("x").unwrap()).name, "x");
        assert_eq!(found.node("out"), Some(root));
        assert_eq!(found.nodes().len(), 3);
    }

    #[test]
    fn needs_the_same_value_for_the_same_name() {
        let (g, root) = graph();
        assert!(Pattern::parse("Mul(Mul(x, 0.5), x)").find(&g, root).is_none());
        assert!(Pattern::parse("Mul(Mul(x, 0.25), _)").find(&g, root).is_none());
    }

    #[test]
    fn skips_optional_nodes() {
        let (g, root) = graph();
        let found = Pattern::parse("Mul(c: Cast?(Erf(x)), Mul(Cast?(x), _))").find(&g, root).unwrap();
        assert_eq!(found.node("c"), None);
        assert_eq!(found.nodes().len(), 3);
    }
}
