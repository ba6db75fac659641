//! Rewrite rules: a pattern, a short function, and what it can ask about the place it matched.

use crate::PassContext;
use lathe_analysis::{DimExpr, Facts, Operator};
use lathe_ir::{Bindings, DataType, Function, Graph, Node, NodeId, Patch, Pattern, ScopeId, Tensor, Use, ValueId};

/// Why a rule does not act on a place that its pattern matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The place is not what the rule looks for; nothing is reported.
    NoMatch,
    /// One true sentence, which is counted and reported.
    Reason(String),
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Refusal {
        Refusal::Reason(reason.to_owned())
    }
}

impl From<String> for Refusal {
    fn from(reason: String) -> Refusal {
        Refusal::Reason(reason)
    }
}

/// What takes the place of values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// For the outputs of the root node, by output index.
    pub outputs: Vec<(usize, ValueId)>,
    /// For values of other nodes: old and new. What is new must not be computed from anything that uses the old.
    pub others: Vec<(ValueId, ValueId)>,
}

impl From<ValueId> for Replacement {
    fn from(value: ValueId) -> Replacement {
        Replacement::from(vec![value])
    }
}

impl From<Vec<ValueId>> for Replacement {
    fn from(values: Vec<ValueId>) -> Replacement {
        Replacement { outputs: values.into_iter().enumerate().collect(), others: Vec::new() }
    }
}

type Action = Box<dyn Fn(&Match, &mut Patch) -> Result<Replacement, Refusal> + Send + Sync>;

/// A local rewrite: where a pattern matches, a function builds what takes its place.
pub struct Rule {
    pub(crate) name: &'static str,
    pub(crate) pattern: Pattern,
    pub(crate) action: Action,
    pub(crate) shares: bool,
}

/// A rule named `name` that acts where `pattern` matches.
pub fn rule<R: Into<Replacement>>(
    name: &'static str,
    pattern: Pattern,
    action: impl Fn(&Match, &mut Patch) -> Result<R, Refusal> + Send + Sync + 'static,
) -> Rule {
    let action: Action = Box::new(move |m, g| action(m, g).map(Into::into));
    Rule { name, pattern, action, shares: false }
}

impl Rule {
    /// The rule also acts where inner values of the pattern have other uses; those keep the old nodes.
    pub fn sharing(mut self) -> Rule {
        self.shares = true;
        self
    }
}

/// A pattern, written as ONNX text: see [`Pattern`].
#[macro_export]
macro_rules! pat {
    ($($text:tt)*) => { lathe_ir::Pattern::parse(stringify!($($text)*)) };
}

/// One place where a pattern matched, with everything known about it.
pub struct Match<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) facts: &'a Facts,
    pub(crate) opsets: &'a [(String, i64)],
    pub(crate) functions: &'a [Function],
    pub(crate) cx: &'a PassContext<'a>,
    pub(crate) bindings: Bindings,
}

impl<'a> Match<'a> {
    /// Refuses with `reason` unless `holds`.
    pub fn require(&self, holds: bool, reason: &str) -> Result<(), Refusal> {
        if holds { Ok(()) } else { Err(reason.into()) }
    }

    /// Passes over the place without a word unless `holds`: for what the pattern could not say itself.
    pub fn only_if(&self, holds: bool) -> Result<(), Refusal> {
        if holds { Ok(()) } else { Err(Refusal::NoMatch) }
    }

    /// The graph around the place.
    pub fn graph(&self) -> &'a Graph {
        self.graph
    }

    /// Types, shapes and contents.
    pub fn facts(&self) -> &'a Facts {
        self.facts
    }

    /// Target, settings and engine.
    pub fn context(&self) -> &'a PassContext<'a> {
        self.cx
    }

    /// The model's local functions.
    pub fn functions(&self) -> &'a [Function] {
        self.functions
    }

    /// The version of the standard operator set here.
    pub fn opset(&self) -> i64 {
        lathe_ir::imported(self.opsets, "").unwrap_or(0)
    }

    /// Whether the standard operator set here has this operator.
    pub fn has_operator(&self, name: &str) -> bool {
        Operator::named("", name).is_some_and(|operator| operator.since <= self.opset())
    }

    /// The value that `name` is bound to; `output` is the root's first output. Panics if the pattern has no such name.
    pub fn value(&self, name: &str) -> ValueId {
        if name == "output" {
            return self.graph.node(self.root()).output(0).expect("patterns match nodes whose first output is used");
        }
        self.bindings.value(name).expect("the rule asks for names of its own pattern")
    }

    /// The value that `name` is bound to, if the pattern has such a name.
    pub fn find_value(&self, name: &str) -> Option<ValueId> {
        self.bindings.value(name)
    }

    /// The matched root.
    pub fn root(&self) -> NodeId {
        self.bindings.nodes()[0]
    }

    /// The scope the match lies in.
    pub fn scope(&self) -> ScopeId {
        self.graph.node(self.root()).scope()
    }

    /// The node with this label. Panics if the pattern has no such label or the node is absent.
    pub fn node(&self, label: &str) -> &'a Node {
        self.find_node(label).expect("the rule asks for labels of its own pattern")
    }

    /// The node with this label; `None` where an optional one is absent.
    pub fn find_node(&self, label: &str) -> Option<&'a Node> {
        self.bindings.node(label).map(|id| self.graph.node(id))
    }

    /// The first output of the node with this label, which is what a pattern finds a node by.
    pub fn made(&self, label: &str) -> ValueId {
        self.node(label).output(0).expect("patterns find nodes by their first output")
    }

    /// The id of the node with this label.
    pub fn id(&self, label: &str) -> NodeId {
        self.bindings.node(label).expect("the rule asks for labels of its own pattern")
    }

    /// Every node with this label, for patterns that use it more than once.
    pub fn labelled(&self, label: &str) -> Vec<&'a Node> {
        self.bindings.labelled(label).map(|id| self.graph.node(id)).collect()
    }

    /// The number that `#name` stands for. Panics if the pattern has no such number.
    pub fn number(&self, name: &str) -> f64 {
        self.bindings.number(name).expect("the rule asks for numbers of its own pattern")
    }

    /// Requires that the output has the axes of `x`: constants of one element, those that the pattern read as numbers
    /// and `others`, may have axes of their own.
    pub fn require_no_new_axes(&self, x: ValueId, others: &[ValueId]) -> Result<(), Refusal> {
        let holds = match (self.facts.ndim(x), self.facts.ndim(self.value("output"))) {
            (Some(before), Some(after)) => before == after,
            _ => {
                let constants = self.bindings.constants().iter().chain(others);
                constants.into_iter().all(|&v| self.graph.constant(v).is_some_and(|t| t.dims().is_empty()))
            }
        };
        self.require(holds, "a constant adds axes")
    }

    /// The constant behind a name.
    pub fn tensor(&self, name: &str) -> Result<&'a Tensor, Refusal> {
        let value = self.value(name);
        self.graph.constant(value).ok_or_else(|| Refusal::Reason(format!("`{name}` is not a constant")))
    }

    /// The whole numbers in a value, if they are known.
    pub fn known_int64s(&self, value: ValueId) -> Option<Vec<i64>> {
        match self.graph.constant(value) {
            Some(tensor) => tensor.to_i64s(),
            None => self.facts.contents(value)?.known(),
        }
    }

    /// Whether two values provably have the same shape.
    pub fn same_shape(&self, a: &str, b: &str) -> bool {
        self.facts.same_shape(self.value(a), self.value(b))
    }

    /// The shape of a name.
    pub fn shape(&self, name: &str) -> Result<&'a [DimExpr], Refusal> {
        self.facts.shape(self.value(name)).ok_or_else(|| Refusal::Reason(format!("the shape of `{name}` is unknown")))
    }

    /// The number of axes of a name.
    pub fn ndim(&self, name: &str) -> Result<usize, Refusal> {
        self.facts
            .ndim(self.value(name))
            .ok_or_else(|| Refusal::Reason(format!("the number of axes of `{name}` is unknown")))
    }

    /// The element type of a name.
    pub fn elem(&self, name: &str) -> Result<DataType, Refusal> {
        self.facts
            .elem(self.value(name))
            .ok_or_else(|| Refusal::Reason(format!("the element type of `{name}` is unknown")))
    }

    /// The permutation of the `Transpose` with this label; axes are reversed where none is given.
    pub fn perm(&self, label: &str) -> Result<Vec<usize>, Refusal> {
        let node = self.node(label);
        match node.ints("perm") {
            Some(perm) => {
                let axes: Vec<usize> = perm.iter().filter_map(|&axis| usize::try_from(axis).ok()).collect();
                let mut sorted = axes.clone();
                sorted.sort_unstable();
                let ndim = node.input(0).and_then(|input| self.facts.ndim(input)).unwrap_or(perm.len());
                self.require(sorted.into_iter().eq(0..ndim), "the permutation is not one of the axes")?;
                Ok(axes)
            }
            None => {
                let ndim = node.input(0).and_then(|input| self.facts.ndim(input));
                let ndim = ndim.ok_or("the number of axes is unknown")?;
                Ok((0..ndim).rev().collect())
            }
        }
    }

    /// The boolean in a one-element constant, if it is known.
    pub fn known_bool(&self, value: ValueId) -> Option<bool> {
        self.known_int64s(value).filter(|all| all.len() == 1).map(|all| all[0] != 0)
    }

    /// Requires that everything that uses `old` can use the existing value `new` without a copy between them: a graph
    /// output needs a name of its own, and a subgraph returns only what it computes.
    pub fn require_replaceable(&self, old: &str, new: &str) -> Result<(), Refusal> {
        self.require_free(self.value(old), self.value(new))
    }

    /// As [`Match::require_replaceable`], for values the pattern does not name.
    pub fn require_free(&self, old: ValueId, new: ValueId) -> Result<(), Refusal> {
        let outputs = self.graph.value(old).uses().iter().filter_map(|u| match u {
            Use::Output(scope, _) => Some(*scope),
            _ => None,
        });
        let producer_scope = self.graph.producer(new).map(|p| self.graph.node(p).scope());
        let mut count = 0;
        for scope in outputs {
            count += 1;
            self.require(producer_scope == Some(scope), "an output needs a node of its own graph that produces it")?;
            if scope == ScopeId::MAIN {
                let free = count == 1 && !self.graph.is_output(new);
                self.require(free, "two outputs would be one value")?;
            } else {
                self.require(!self.graph.must_return_once(scope, new), "a subgraph would return one value twice")?;
            }
        }
        Ok(())
    }

    /// An axis counted from the front.
    pub fn axis(&self, axis: i64, ndim: usize) -> Result<usize, Refusal> {
        let from_front = if axis < 0 { axis + ndim as i64 } else { axis };
        match usize::try_from(from_front) {
            Ok(found) if found < ndim => Ok(found),
            _ => Err(format!("axis {axis} is outside {ndim} axes").into()),
        }
    }
}
