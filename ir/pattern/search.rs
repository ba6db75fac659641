//! Looks for a pattern in a graph.

use super::{Arithmetic, Bindings, Chain, NodeTerm, Pattern, Power, Term, Wanted};
use crate::{DataType, Graph, Node, NodeId, ScopeId, Tensor, ValueId};
use std::cell::Cell;

/// Goals that a search may look at before it gives up.
const MOST_STEPS: u32 = 4096;

/// Nodes that one product or sum may span.
const MOST_NODES: usize = 16;

const COMMUTATIVE: &[&str] = &["Add", "Mul", "Min", "Max", "And", "Or", "Xor", "Equal"];

pub(super) fn find(pattern: &Pattern, graph: &Graph, node: NodeId) -> Option<Bindings> {
    let search = Search {
        graph,
        scope: graph.node(node).scope(),
        through_casts: pattern.through_casts,
        steps: Cell::new(MOST_STEPS),
    };
    let mut found = Bindings::default();
    search.root(&pattern.root, node, &mut found).then_some(found)
}

struct Search<'a> {
    graph: &'a Graph,
    scope: ScopeId,
    through_casts: bool,
    steps: Cell<u32>,
}

/// What is still to be met, the next goal first.
#[derive(Clone, Copy)]
struct Goals<'l, 'p> {
    goal: Goal<'l, 'p>,
    rest: Option<&'l Goals<'l, 'p>>,
}

#[derive(Clone, Copy)]
enum Goal<'l, 'p> {
    /// Terms that stand for these values, one each.
    Args(&'p [Term], &'l [Option<ValueId>]),
    Chain(&'l Progress<'p>),
}

/// How far a product or sum is matched.
#[derive(Clone)]
struct Progress<'p> {
    chain: &'p Chain,
    /// What the nodes so far are a product of; the next one last.
    operands: Vec<(ValueId, Power)>,
    /// Factors of the pattern that nothing stands for yet, by index.
    open: Vec<(usize, Power)>,
    /// What the numbers so far make together.
    number: f64,
    /// How far off that may be, by the rounding of each number.
    slack: f64,
    nodes: usize,
}

/// What a node of a product or sum is made of.
struct Parts {
    node: NodeId,
    operands: Vec<(ValueId, Power)>,
    negated: bool,
    exponent: Option<ValueId>,
}

/// The lengths of everything found so far.
type Mark = [usize; 5];

fn mark(found: &Bindings) -> Mark {
    [found.values.len(), found.labels.len(), found.numbers.len(), found.nodes.len(), found.constants.len()]
}

fn reset(found: &mut Bindings, to: Mark) {
    found.values.truncate(to[0]);
    found.labels.truncate(to[1]);
    found.numbers.truncate(to[2]);
    found.nodes.truncate(to[3]);
    found.constants.truncate(to[4]);
}

impl Search<'_> {
    fn root(&self, term: &Term, node: NodeId, found: &mut Bindings) -> bool {
        match term {
            Term::Node(pattern) => self.node(pattern, node, None, found),
            Term::Chain(chain) => {
                let standard = self.graph.node(node).is_standard();
                let fits = standard && chain.roots().contains(&self.graph.node(node).op_type.as_str());
                fits && self.graph.node(node).output(0).is_some_and(|value| self.chain(chain, value, true, None, found))
            }
            Term::Choice(terms) => terms.iter().any(|term| self.root(term, node, found)),
            Term::Any | Term::Value(_) | Term::Number(_) => false,
        }
    }

    /// Meets all goals; on failure `found` is as it was.
    fn solve<'p>(&self, goals: Option<&Goals<'_, 'p>>, found: &mut Bindings) -> bool {
        let Some(Goals { goal, rest }) = goals else { return true };
        let Some(left) = self.steps.get().checked_sub(1) else { return false };
        self.steps.set(left);
        match *goal {
            Goal::Chain(progress) => self.go_on(progress, *rest, found),
            Goal::Args(terms, values) => match (terms.split_first(), values.split_first()) {
                (Some((term, terms)), Some((value, values))) => {
                    let others = Goals { goal: Goal::Args(terms, values), rest: *rest };
                    self.term(term, *value, Some(&others), found)
                }
                _ => self.solve(*rest, found),
            },
        }
    }

    fn term<'p>(
        &self,
        term: &'p Term,
        value: Option<ValueId>,
        rest: Option<&Goals<'_, 'p>>,
        found: &mut Bindings,
    ) -> bool {
        let Some(value) = value else { return matches!(term, Term::Any) && self.solve(rest, found) };
        let start = mark(found);
        let met = match term {
            Term::Any => self.solve(rest, found),
            Term::Number(number) => {
                found.constants.push(value);
                self.graph.constant(value).is_some_and(|t| is_number(t, *number)) && self.solve(rest, found)
            }
            Term::Value(name) => match found.value(name) {
                Some(bound) => bound == value && self.solve(rest, found),
                None => {
                    found.values.push((name.clone(), value));
                    self.solve(rest, found)
                }
            },
            Term::Choice(terms) => terms.iter().any(|term| self.term(term, Some(value), rest, found)),
            Term::Chain(chain) => self.chain(chain, value, false, rest, found),
            Term::Node(pattern) => {
                self.producer(value).is_some_and(|node| self.node(pattern, node, rest, found))
                    || (pattern.optional && self.term(&pattern.args[0], Some(value), rest, found))
                    || self.cast(value).is_some_and(|(cast, inner)| {
                        found.nodes.push(cast);
                        self.term(term, Some(inner), rest, found)
                    })
            }
        };
        if !met {
            reset(found, start);
        }
        met
    }

    /// The node of the same scope whose first output is `value`.
    fn producer(&self, value: ValueId) -> Option<NodeId> {
        let id = self.graph.producer(value)?;
        let node = self.graph.node(id);
        (node.scope() == self.scope && node.output(0) == Some(value)).then_some(id)
    }

    /// The cast that makes `value`, if the pattern passes casts, and what it casts.
    fn cast(&self, value: ValueId) -> Option<(NodeId, ValueId)> {
        let id = self.producer(value).filter(|&id| self.through_casts && self.graph.node(id).is("Cast"))?;
        Some((id, self.graph.node(id).input(0)?))
    }

    fn node<'p>(&self, pattern: &'p NodeTerm, id: NodeId, rest: Option<&Goals<'_, 'p>>, found: &mut Bindings) -> bool {
        let node = self.graph.node(id);
        let domain = if node.is_standard() { "" } else { node.domain.as_str() };
        if !pattern.ops.iter().any(|(d, op)| *op == node.op_type && d == domain) {
            return false;
        }
        let (inputs, args) = (node.inputs(), &pattern.args);
        if inputs.len() < args.len() || (inputs.len() > args.len() && !pattern.rest) {
            return false;
        }
        let start = mark(found);
        found.nodes.push(id);
        if let Some(label) = &pattern.label {
            found.labels.push((label.clone(), id));
        }
        let met = self.solve(Some(&Goals { goal: Goal::Args(args, &inputs[..args.len()]), rest }), found)
            || (args.len() == 2 && domain.is_empty() && COMMUTATIVE.contains(&node.op_type.as_str()) && {
                let swapped = [inputs[1], inputs[0]];
                self.solve(Some(&Goals { goal: Goal::Args(args, &swapped), rest }), found)
            });
        if !met {
            reset(found, start);
        }
        met
    }

    /// Matches a product or sum to `value`, which is one node of it at least if `whole`.
    fn chain<'p>(
        &self,
        chain: &'p Chain,
        value: ValueId,
        whole: bool,
        rest: Option<&Goals<'_, 'p>>,
        found: &mut Bindings,
    ) -> bool {
        let start = mark(found);
        if let Some(label) = &chain.label {
            let Some(node) = self.producer(value) else { return false };
            found.labels.push((label.clone(), node));
        }
        let open = chain.factors.iter().enumerate().map(|(index, (_, power))| (index, *power)).collect();
        let (number, operands) = (chain.kind.neutral(), vec![(value, 2)]);
        let progress = Progress { chain, operands, open, number, slack: 0.0, nodes: 0 };
        let met = if whole { self.split(&progress, rest, found) } else { self.go_on(&progress, rest, found) };
        if !met {
            reset(found, start);
        }
        met
    }

    /// Finds what the next operand of a product or sum is: a factor of the pattern, a number, or a node that is part of
    /// the product itself.
    fn go_on<'p>(&self, progress: &Progress<'p>, rest: Option<&Goals<'_, 'p>>, found: &mut Bindings) -> bool {
        let Some(&(value, power)) = progress.operands.last() else { return self.complete(progress, rest, found) };
        if !self.is_viable(progress) {
            return false;
        }
        // The 1 of 1/√x is no factor that a name could stand for.
        let neutral = self.graph.constant(value).is_some_and(|t| is_number(t, progress.chain.kind.neutral()));
        let open = if neutral { &[] } else { &progress.open[..] };
        for (place, &(index, wanted)) in open.iter().enumerate() {
            let Some(met) = progress.chain.kind.common(power, wanted) else { continue };
            let mut next = progress.clone();
            next.operands.pop();
            if power != met {
                next.operands.push((value, power - met));
            }
            match wanted == met {
                true => drop(next.open.remove(place)),
                false => next.open[place].1 -= met,
            }
            if next.operands.is_empty() && !next.open.is_empty() {
                continue;
            }
            let others = Goals { goal: Goal::Chain(&next), rest };
            if self.term(&progress.chain.factors[index].0, Some(value), Some(&others), found) {
                return true;
            }
        }
        self.absorb(progress, rest, found) || self.split(progress, rest, found)
    }

    /// Whether there are as many factors left as operands that could be them.
    fn is_viable(&self, progress: &Progress) -> bool {
        let units = |power: Power| power.unsigned_abs().div_ceil(2);
        let open: u32 = progress.open.iter().map(|(_, power)| units(*power)).sum();
        let mut needed = 0;
        for &(value, power) in &progress.operands {
            needed += if self.graph.constant(value).is_some_and(|t| t.len() == 1) { 0 } else { units(power) };
        }
        needed <= open
    }

    fn complete<'p>(&self, progress: &Progress<'p>, rest: Option<&Goals<'_, 'p>>, found: &mut Bindings) -> bool {
        if !progress.open.is_empty() {
            return false;
        }
        match &progress.chain.number {
            Wanted::Number(wanted) => {
                (progress.number - wanted).abs() <= progress.tolerance(*wanted) && self.solve(rest, found)
            }
            Wanted::Named(name) => {
                found.numbers.push((name.clone(), progress.number));
                let met = self.solve(rest, found);
                if !met {
                    found.numbers.pop();
                }
                met
            }
        }
    }

    /// Takes the next operand as a number.
    fn absorb<'p>(&self, progress: &Progress<'p>, rest: Option<&Goals<'_, 'p>>, found: &mut Bindings) -> bool {
        let Some(&(value, power)) = progress.operands.last() else { return false };
        let Some((number, rounding)) = self.graph.constant(value).and_then(scalar) else { return false };
        let mut next = progress.clone();
        next.operands.pop();
        match progress.chain.kind {
            Arithmetic::Product => {
                next.number *= if power == 2 { number } else { number.powf(f64::from(power) / 2.0) };
                next.slack += rounding * f64::from(power.abs()) / 2.0;
            }
            Arithmetic::Sum => {
                next.number += number * f64::from(power.signum());
                next.slack += rounding * number.abs();
            }
        }
        if !next.number.is_finite() {
            return false;
        }
        found.constants.push(value);
        let met = self.go_on(&next, rest, found);
        if !met {
            found.constants.pop();
        }
        met
    }

    /// Takes the next operand as a node of the product or sum itself, and its inputs in its place.
    fn split<'p>(&self, progress: &Progress<'p>, rest: Option<&Goals<'_, 'p>>, found: &mut Bindings) -> bool {
        let Some(&(value, power)) = progress.operands.last() else { return false };
        let Some(parts) = self.parts(progress.chain.kind, value, power) else { return false };
        let Some(left) = self.steps.get().checked_sub(1).filter(|_| progress.nodes < MOST_NODES) else { return false };
        self.steps.set(left);
        let mut next = progress.clone();
        next.nodes += 1;
        next.operands.pop();
        next.operands.extend(parts.operands.into_iter().rev());
        if parts.negated {
            next.number = -next.number;
        }
        let start = mark(found);
        found.nodes.push(parts.node);
        found.constants.extend(parts.exponent);
        let met = self.go_on(&next, rest, found);
        if !met {
            reset(found, start);
        }
        met
    }

    fn parts(&self, kind: Arithmetic, value: ValueId, power: Power) -> Option<Parts> {
        let id = self.producer(value)?;
        let node = self.graph.node(id);
        if !node.is_standard() {
            return None;
        }
        let mut parts = Parts { node: id, operands: Vec::with_capacity(2), negated: false, exponent: None };
        let a = node.input(0)?;
        if node.op_type == "Cast" && self.through_casts {
            parts.operands.push((a, power));
            return Some(parts);
        }
        match kind {
            Arithmetic::Sum => match node.op_type.as_str() {
                "Add" => parts.operands = vec![(a, power), (node.input(1)?, power)],
                "Sub" => parts.operands = vec![(a, power), (node.input(1)?, -power)],
                "Neg" => parts.operands.push((a, -power)),
                _ => return None,
            },
            Arithmetic::Product => self.factors(node, a, power, &mut parts)?,
        }
        Some(parts)
    }

    /// The factors of a node to the power of `power`, whose first input is `a`.
    fn factors(&self, node: &Node, a: ValueId, power: Power, parts: &mut Parts) -> Option<()> {
        // A root of a product is the product of the roots only where nothing is negative.
        let whole = power % 2 == 0;
        let positive = |v| self.graph.constant(v).and_then(scalar).is_some_and(|(number, _)| number > 0.0);
        match node.op_type.as_str() {
            "Mul" | "Div" => {
                let b = node.input(1)?;
                let other = if node.op_type == "Mul" { power } else { -power };
                if !whole && !positive(a) && !positive(b) {
                    return None;
                }
                if a == b && node.op_type == "Mul" {
                    parts.operands.push((a, 2 * power));
                } else {
                    parts.operands = vec![(a, power), (b, other)];
                }
            }
            "Reciprocal" => parts.operands.push((a, -power)),
            "Neg" if whole => {
                parts.operands.push((a, power));
                parts.negated = power % 4 != 0;
            }
            // The root of a negative number is not a number, which its square would forget.
            "Sqrt" if whole && power % 4 != 0 => parts.operands.push((a, power / 2)),
            "Pow" => {
                let exponent = node.input(1)?;
                let (number, _) = self.graph.constant(exponent).and_then(scalar)?;
                let all = f64::from(power) * number;
                let fits = if whole {
                    number.fract() == 0.0 || (power.abs() == 2 && (2.0 * number).fract() == 0.0)
                } else {
                    number.abs() == 1.0
                };
                if !fits || all == 0.0 || all.abs() > 64.0 {
                    return None;
                }
                parts.operands.push((a, all as Power));
                parts.exponent = Some(exponent);
            }
            _ => return None,
        }
        // Whatever is squared again and again soon is more than any pattern asks for.
        parts.operands.iter().all(|(_, power)| power.abs() <= 64).then_some(())
    }
}

impl Progress<'_> {
    /// How far the number may be from `wanted`.
    fn tolerance(&self, wanted: f64) -> f64 {
        match self.chain.kind {
            Arithmetic::Product => self.slack * wanted.abs(),
            Arithmetic::Sum => self.slack,
        }
    }
}

impl Arithmetic {
    /// The number that changes nothing.
    pub(super) fn neutral(self) -> f64 {
        match self {
            Arithmetic::Product => 1.0,
            Arithmetic::Sum => 0.0,
        }
    }

    pub(super) fn join(self, a: f64, b: f64) -> f64 {
        match self {
            Arithmetic::Product => a * b,
            Arithmetic::Sum => a + b,
        }
    }

    /// The part of an operand's power that a factor takes.
    fn common(self, operand: Power, factor: Power) -> Option<Power> {
        let whole = |power: Power| power % 2 == 0;
        if operand == factor {
            return Some(factor);
        }
        let shared =
            self == Arithmetic::Product && whole(operand) && whole(factor) && operand.signum() == factor.signum();
        shared.then(|| operand.signum() * operand.abs().min(factor.abs()))
    }
}

/// How much of itself a number in a tensor of this type may be off.
fn rounding(dtype: DataType) -> Option<f64> {
    match dtype {
        DataType::Float16 => Some(1e-3),
        DataType::Bfloat16 => Some(8e-3),
        DataType::Float => Some(1e-6),
        dtype if dtype.is_integer() || dtype == DataType::Double => Some(1e-12),
        _ => None,
    }
}

/// The one number in a tensor, and its rounding.
fn scalar(tensor: &Tensor) -> Option<(f64, f64)> {
    let rounding = rounding(tensor.dtype())?;
    let number = tensor.scalar_f64().filter(|x| tensor.len() == 1 && x.is_finite())?;
    Some((number, rounding))
}

/// Whether a tensor holds exactly one element that is `number`, as far as its type can tell.
fn is_number(tensor: &Tensor, number: f64) -> bool {
    scalar(tensor).is_some_and(|(found, rounding)| (found - number).abs() <= rounding * number.abs().max(1e-30))
}
