//! Patterns: small graphs to look for, written as ONNX text.

mod parse;
mod search;

use crate::{Graph, NodeId, ValueId};
use std::sync::Arc;

/// A pattern such as `outer: Transpose(inner: Transpose(x))`.
///
/// - `Op(…)` is a node; `A|B(…)` one of several operators; `com.microsoft.Op(…)` one of another domain. Operators begin
///   with a capital letter, names do not.
/// - A bare name binds a value; the same name twice means the same value. `_` binds nothing.
/// - A number is a constant with one element of that value.
/// - `label:` names a node. `Op?(x)` also matches `x` itself, where there is no such node.
/// - `…` as the last argument (`..`) allows further inputs; otherwise there are exactly as many as written.
/// - Add, Mul, Min, Max, And, Or, Xor and Equal match either way round.
/// - `(A | B)` is one of several patterns, the first that fits.
///
/// A term with a star is arithmetic, however it is spelled:
///
/// - `Mul*(a, b, …)` is a product of these factors, in any order and association. Div, Reciprocal, Sqrt, Neg and Pow
///   with a constant exponent are read as powers of their operands, and `Pow(a, -0.5)` as an argument stands for such a
///   power. Numbers multiply: `Mul*(x, 0.5)` is a product of `x` and scalar constants that make ½ together, and
///   a 1 among them is never what a name stands for.
/// - `Add*(a, -b, …)` is a sum of these terms, likewise; Sub and Neg give signs. Numbers add up.
/// - `Pow*(a, 2)` is `Mul*(Pow(a, 2))`: the power alone.
/// - `#name` as an argument stands for any number, which [`Bindings::number`] tells; it is 1 in a product and 0 in a sum
///   without constants.
///
/// Reading arithmetic this way is true over the real numbers, so a rule must ask for floating-point types. Scalar
/// constants may have axes of size one, which a result could gain: see [`Bindings::constants`].
///
/// Matching takes bounded time: a product or sum spans at most sixteen nodes, and a search that has gone through
/// some thousand steps finds nothing.
#[derive(Debug, Clone)]
pub struct Pattern {
    root: Term,
    roots: Vec<(String, String)>,
    through_casts: bool,
}

#[derive(Debug, Clone)]
enum Term {
    Any,
    Value(Arc<str>),
    Number(f64),
    Node(NodeTerm),
    Chain(Chain),
    Choice(Vec<Term>),
}

#[derive(Debug, Clone)]
struct NodeTerm {
    label: Option<Arc<str>>,
    ops: Vec<(String, String)>,
    optional: bool,
    args: Vec<Term>,
    rest: bool,
}

/// A product or a sum, in any order and association.
#[derive(Debug, Clone)]
struct Chain {
    label: Option<Arc<str>>,
    kind: Arithmetic,
    /// The most telling first.
    factors: Vec<(Term, Power)>,
    number: Wanted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    Product,
    Sum,
}

/// Twice the exponent of a factor; of a term of a sum, two times its sign.
type Power = i32;

#[derive(Debug, Clone)]
enum Wanted {
    Number(f64),
    Named(Arc<str>),
}

/// What a pattern found: the values, nodes and numbers its names stand for.
#[derive(Debug, Clone, Default)]
pub struct Bindings {
    values: Vec<(Arc<str>, ValueId)>,
    labels: Vec<(Arc<str>, NodeId)>,
    numbers: Vec<(Arc<str>, f64)>,
    nodes: Vec<NodeId>,
    constants: Vec<ValueId>,
}

impl Bindings {
    /// The value a name stands for.
    pub fn value(&self, name: &str) -> Option<ValueId> {
        self.values.iter().find(|(n, _)| **n == *name).map(|(_, v)| *v)
    }

    /// The node a label stands for; `None` where an optional node is absent.
    pub fn node(&self, label: &str) -> Option<NodeId> {
        self.labelled(label).next()
    }

    /// Every node with this label: a pattern may use a label more than once.
    pub fn labelled<'a>(&'a self, label: &'a str) -> impl Iterator<Item = NodeId> + 'a {
        self.labels.iter().filter(move |(n, _)| **n == *label).map(|(_, v)| *v)
    }

    /// The number a `#name` stands for.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.numbers.iter().find(|(n, _)| **n == *name).map(|(_, v)| *v)
    }

    /// Every matched node, the root first; a node may be there more than once.
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }

    /// The constants that numbers were read from.
    pub fn constants(&self) -> &[ValueId] {
        &self.constants
    }
}

impl Pattern {
    /// Reads a pattern. Panics if it is malformed: patterns are part of the program.
    pub fn parse(text: &str) -> Pattern {
        parse::pattern(text)
    }

    /// Arithmetic also goes on behind casts, which become part of the match. Whoever uses the match sees to it that they
    /// are between floating-point types.
    pub fn through_casts(mut self) -> Pattern {
        self.through_casts = true;
        self
    }

    /// Whether the match may hold casts that the pattern does not name.
    pub fn passes_casts(&self) -> bool {
        self.through_casts
    }

    /// The operators the root may be, with their domains.
    pub fn roots(&self) -> &[(String, String)] {
        &self.roots
    }

    /// The names of values and numbers, and the labels of nodes.
    pub fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        self.root.collect_names(&mut names);
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Matches the pattern with its root at `node`.
    pub fn find(&self, graph: &Graph, node: NodeId) -> Option<Bindings> {
        search::find(self, graph, node)
    }
}

impl Term {
    fn collect_names<'a>(&'a self, names: &mut Vec<&'a str>) {
        match self {
            Term::Any | Term::Number(_) => {}
            Term::Value(name) => names.push(name),
            Term::Node(node) => {
                names.extend(node.label.as_deref());
                node.args.iter().for_each(|arg| arg.collect_names(names));
            }
            Term::Chain(chain) => {
                names.extend(chain.label.as_deref());
                if let Wanted::Named(name) = &chain.number {
                    names.push(name);
                }
                chain.factors.iter().for_each(|(term, _)| term.collect_names(names));
            }
            Term::Choice(terms) => terms.iter().for_each(|term| term.collect_names(names)),
        }
    }

    /// The operators that a node matched by this term may have.
    fn collect_roots(&self, roots: &mut Vec<(String, String)>) {
        match self {
            Term::Any | Term::Value(_) | Term::Number(_) => {}
            Term::Node(node) => roots.extend(node.ops.iter().cloned()),
            Term::Chain(chain) => roots.extend(chain.roots().iter().map(|op| (String::new(), (*op).to_owned()))),
            Term::Choice(terms) => terms.iter().for_each(|term| term.collect_roots(roots)),
        }
    }
}

impl Chain {
    fn roots(&self) -> &'static [&'static str] {
        match (self.kind, self.factors.len()) {
            (Arithmetic::Sum, _) => &["Add", "Sub"],
            (Arithmetic::Product, 0 | 1) => &["Mul", "Div", "Pow", "Sqrt", "Reciprocal"],
            (Arithmetic::Product, _) => &["Mul", "Div"],
        }
    }
}

#[cfg(test)]
mod tests;
