//! Reads an attention as it is spelled out: from the product with the values back to the product of queries and keys.

use super::product::{Operand, Product};
use super::walk::{constant_number, hides, is_layout, made_by, producer, uniform};
use crate::{
    Match, Refusal,
    operands::{int64s, slice_ranges},
};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Node, NodeId, Use, ValueId};

/// Nodes between the two products that are looked through.
const DEPTH: usize = 32;

/// The steps of an attention between its two products.
pub(super) struct Spelled {
    /// The product of queries, `[…, queries, size]`, and keys, `[…, size, keys]`.
    pub product: Product,
    /// What the scores are multiplied by.
    pub scale: f64,
    /// Computed values that do not vary along the keys, by which the scores are multiplied.
    pub factors: Vec<Factor>,
    /// `c` where the scores `s` become `c · tanh(s / c)`.
    pub softcap: Option<f64>,
    /// What is added to the scores after that.
    pub terms: Vec<Term>,
    /// Whether weights that are not a number become 0.
    pub zeroes_nan: bool,
    /// One more score for each query, `[…, queries, 1]`, whose weight is dropped: an attention sink.
    pub sink: Option<ValueId>,
    /// The number of keys that the weights have.
    pub keys: DimExpr,
    /// The sizes of the scores.
    pub sizes: Vec<DimExpr>,
    /// The nodes of all steps and both products.
    pub nodes: Vec<NodeId>,
}

/// A computed factor of the scores.
pub(super) struct Factor {
    /// Its value.
    pub value: ValueId,
    /// Whether the scores are divided by it.
    pub divides: bool,
    /// The sizes of the scores where they are multiplied.
    pub at: Vec<DimExpr>,
}

/// Something that is added to the scores.
pub(super) struct Term {
    /// The addend, or the condition that says which scores stay.
    pub value: ValueId,
    /// What it is multiplied by.
    pub factor: f64,
    /// What kind of addend it is.
    pub kind: TermKind,
    /// The sizes of the scores where it is added.
    pub at: Vec<DimExpr>,
}

/// How a term enters the scores.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum TermKind {
    /// It is added.
    Added,
    /// Scores become `fill`, which hides them, except where the condition is `seen`.
    Hidden {
        /// What the condition is where a score stays.
        seen: bool,
        /// What the others become.
        fill: f64,
    },
}

/// Reads the attention whose weights are `weights`. Passes over values that no softmax makes.
pub(super) fn read(m: &Match, weights: &Operand) -> Result<Spelled, Refusal> {
    let (weights, turn) = weights.upright(m).ok_or(Refusal::NoMatch)?;
    let keys = m.facts().shape(weights).and_then(<[_]>::last).ok_or(Refusal::NoMatch)?.clone();
    let mut path = Path::default();
    path.nodes.extend(turn.into_iter().chain([m.root()]));
    let Weights { softmax, zeroes_nan, regrouped, drops_last } = softmax_of(m, weights, &mut path)?;
    let node = m.graph().node(softmax);
    let mut scores = node.input(0).ok_or(Refusal::NoMatch)?;
    let ndim = m.facts().ndim(scores).ok_or("the number of axes of the scores is unknown")?;
    let default = if m.opset() >= 13 { -1 } else { 1 };
    let axis = m.axis(node.int("axis").unwrap_or(default), ndim)?;
    m.require(axis + 1 == ndim, "the softmax is not over the keys")?;
    let mut sink = None;
    if drops_last {
        let found = sink_of(m, scores, &mut path)
            .ok_or("the last weight is dropped, and its score is not one beside the others")?;
        (scores, sink) = (found.0, Some(found.1));
    }
    let mut reader = Reader { m, path, factor: 1.0, cap: None, factors: Vec::new(), terms: Vec::new(), regrouped };
    let (product, plain) = reader.product(scores)?;
    let Reader { factor, cap, factors, terms, path, regrouped, .. } = reader;
    path.require_inner(m)?;
    // Where nothing regroups the scores, they have the sizes of the product: no addend broadcasts them.
    let sizes = m.facts().shape(if regrouped { scores } else { plain });
    let sizes = sizes.ok_or("the sizes of the scores are unknown")?.to_vec();
    let scale = factor * cap.unwrap_or(1.0);
    m.require(scale.is_finite() && scale != 0.0, "the scale is 0 or not finite")?;
    Ok(Spelled { product, scale, factors, softcap: cap, terms, zeroes_nan, sink, keys, sizes, nodes: path.nodes })
}

/// The scores that have one more beside them, and that one.
fn sink_of(m: &Match, scores: ValueId, path: &mut Path) -> Option<(ValueId, ValueId)> {
    let mut at = scores;
    if let Some(sub) = made_by(m, at, "Sub") {
        path.pass(m, at);
        at = sub.input(0)?;
        path.nodes.extend(shift(m, at, sub.input(1)?)?);
    }
    path.pass(m, at);
    let concat = made_by(m, at, "Concat")?;
    let [Some(main), Some(sink)] = *concat.inputs() else { return None };
    let ndim = m.facts().ndim(at)?;
    let last = m.axis(concat.int("axis")?, ndim).ok()? + 1 == ndim;
    let one = m.facts().shape(sink)?.last()?.as_known() == Some(1);
    (last && one).then_some((main, sink))
}

/// Whether a Slice leaves out the last of the last axis.
fn drops_last(m: &Match, node: &Node) -> bool {
    let drops = || {
        let (from, to) = (m.facts().shape(node.input(0)?)?, m.facts().shape(node.output(0)?)?);
        let ranges = slice_ranges(m.graph(), m.facts(), node, from.len()).ok()?;
        let [range] = ranges.as_slice() else { return None };
        let one_less = to.last()?.offset(1)? == *from.last()?;
        (range.axis + 1 == from.len() && range.start == 0 && range.step == 1 && one_less).then_some(())
    };
    node.is("Slice") && drops().is_some()
}

/// The nodes that make `shift`, if it is the largest of `scores` along the keys: a softmax does not see that it is
/// subtracted.
fn shift(m: &Match, scores: ValueId, shift: ValueId) -> Option<Vec<NodeId>> {
    let (id, mut node) = producer(m, shift)?;
    let mut nodes = vec![id];
    let kept = !node.is("Unsqueeze");
    if !kept {
        let (inner, found) = producer(m, node.input(0)?)?;
        nodes.push(inner);
        node = found;
    }
    let ndim = m.facts().ndim(scores)?;
    let axes = int64s(m, node, "axes", 1).ok()??;
    let last = matches!(axes[..], [axis] if axis == -1 || axis == ndim as i64 - 1);
    let keeps = (node.int("keepdims") != Some(0)) == kept;
    let one = m.facts().shape(shift)?.last()?.as_known() == Some(1);
    (node.is("ReduceMax") && node.input(0) == Some(scores) && last && keeps && one).then_some(nodes)
}

/// The nodes that an attention takes the place of, and the values between them.
#[derive(Default)]
struct Path {
    nodes: Vec<NodeId>,
    values: Vec<ValueId>,
}

impl Path {
    /// Goes on to `value`, and the node that makes it.
    fn pass(&mut self, m: &Match, value: ValueId) {
        self.values.push(value);
        self.nodes.extend(producer(m, value).map(|(id, _)| id));
    }

    /// Requires that nothing but the nodes themselves needs the values, be it for their sizes.
    fn require_inner(&self, m: &Match) -> Result<(), Refusal> {
        for &value in &self.values {
            for place in m.graph().value(value).uses() {
                match place {
                    Use::Node(user, _) => {
                        let shape = m.graph().node(*user).is("Shape") && self.needs(m, *user, &mut DEPTH.clone());
                        let own = self.nodes.contains(user) || shape;
                        m.require(own, "the scores or weights have other uses")?;
                    }
                    Use::Output(..) => return Err("the scores or weights are an output too".into()),
                    Use::Annotation(_) => return Err("the scores or weights are quantization parameters".into()),
                }
            }
        }
        Ok(())
    }

    /// Whether everything that uses `node` is index arithmetic for the nodes of the path alone.
    fn needs(&self, m: &Match, node: NodeId, budget: &mut usize) -> bool {
        const ARITHMETIC: &[&str] = &[
            "Shape",
            "Gather",
            "Slice",
            "Concat",
            "Unsqueeze",
            "Squeeze",
            "Cast",
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Identity",
        ];
        if *budget == 0 || !ARITHMETIC.iter().any(|op| m.graph().node(node).is(op)) {
            return false;
        }
        *budget -= 1;
        let uses = m.graph().node(node).outputs().iter().flatten().flat_map(|&v| m.graph().value(v).uses());
        uses.into_iter().all(|place| match place {
            Use::Node(user, _) => self.nodes.contains(user) || self.needs(m, *user, budget),
            Use::Output(..) | Use::Annotation(_) => false,
        })
    }
}

/// What lies between the softmax and the product with the values.
struct Weights {
    softmax: NodeId,
    zeroes_nan: bool,
    regrouped: bool,
    drops_last: bool,
}

/// The softmax that makes `weights`.
fn softmax_of(m: &Match, weights: ValueId, path: &mut Path) -> Result<Weights, Refusal> {
    let (mut at, mut zeroes_nan, mut regrouped, mut dropped) = (weights, false, false, false);
    for _ in 0..DEPTH {
        let (id, node) = producer(m, at).ok_or(Refusal::NoMatch)?;
        path.pass(m, at);
        if node.is("Softmax") {
            return Ok(Weights { softmax: id, zeroes_nan, regrouped, drops_last: dropped });
        }
        regrouped |= is_layout(node);
        at = if let Some(kept) = with_nan_zeroed(m, node) {
            zeroes_nan = true;
            path.nodes.extend(node.input(0).and_then(|condition| m.graph().producer(condition)));
            kept
        } else if is_layout(node) || node.is("Identity") || is_float_cast(m, node) {
            node.input(0).ok_or(Refusal::NoMatch)?
        } else if !dropped && !regrouped && drops_last(m, node) {
            dropped = true;
            node.input(0).ok_or(Refusal::NoMatch)?
        } else if follows_softmax(m, node, &mut SEARCH.clone()) {
            return Err(format!("`{}` lies between the softmax and the product with the values", node.op_type).into());
        } else {
            return Err(Refusal::NoMatch);
        };
    }
    Err(Refusal::NoMatch)
}

/// Whether a node only changes the precision of floats.
fn is_float_cast(m: &Match, node: &Node) -> bool {
    let is_float = |value: Option<ValueId>| value.and_then(|v| m.facts().elem(v)).is_some_and(DataType::is_float);
    node.is("Cast") && is_float(node.input(0)) && is_float(node.output(0))
}

/// `x` of `Where(IsNaN(x), 0, x)`, which PyTorch puts behind the softmax of every attention with a mask.
fn with_nan_zeroed(m: &Match, node: &Node) -> Option<ValueId> {
    let (condition, zero, kept) = (node.input(0)?, node.input(1)?, node.input(2)?);
    let tests = made_by(m, condition, "IsNaN")?.input(0)? == kept;
    let private = m.graph().value(condition).uses().len() == 1;
    (node.is("Where") && tests && private && constant_number(m, zero) == Some(0.0)).then_some(kept)
}

/// The nodes that are looked at to see what an unknown node between softmax and product belongs to.
const SEARCH: usize = 96;

/// Whether a softmax of a product is found before `node` without another product between.
fn follows_softmax(m: &Match, node: &Node, budget: &mut usize) -> bool {
    precedes(m, node, budget, &mut |node| {
        let scores = node.input(0).and_then(|scores| producer(m, scores)).filter(|_| node.is("Softmax"));
        let product = |node: &Node| Product::of(m, node).is_some();
        scores.is_some_and(|(_, node)| product(node) || precedes(m, node, &mut SEARCH.clone(), &mut |n| product(n)))
    })
}

/// Whether a node that fits comes before `node` along floats, without a layer or a product between.
fn precedes(m: &Match, node: &Node, budget: &mut usize, fits: &mut dyn FnMut(&Node) -> bool) -> bool {
    const LAYERS: &[&str] = &["MatMul", "Gemm", "Einsum", "Conv", "LayerNormalization", "RMSNormalization", "Softmax"];
    node.inputs().iter().flatten().any(|&input| {
        let float = m.facts().elem(input).is_none_or(DataType::is_float);
        let Some((_, node)) = producer(m, input).filter(|_| float && *budget > 0) else { return false };
        *budget -= 1;
        fits(node) || (!LAYERS.iter().any(|op| node.is(op)) && precedes(m, node, budget, fits))
    })
}

/// The fewest nodes between `value` and a product that it is computed from element by element.
fn distance(m: &Match, value: ValueId, depth: usize) -> Option<usize> {
    let (_, node) = producer(m, value).filter(|_| depth > 0)?;
    if Product::making(m, value).is_some() {
        return Some(0);
    }
    let through = |index: usize| distance(m, node.input(index)?, depth - 1).map(|d| d + 1);
    match node.op_type.as_str() {
        "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Tanh" | "Sub" | "Div" => through(0),
        "Add" | "Mul" => through(0).into_iter().chain(through(1)).min(),
        "Where" => through(1).into_iter().chain(through(2)).min(),
        _ => None,
    }
}

/// Walks from the softmax to the product of queries and keys.
struct Reader<'m, 'a> {
    m: &'m Match<'a>,
    path: Path,
    /// What everything further on is multiplied by.
    factor: f64,
    /// The soft cap, if it has been passed.
    cap: Option<f64>,
    factors: Vec<Factor>,
    terms: Vec<Term>,
    /// Whether axes were regrouped on the way.
    regrouped: bool,
}

impl Reader<'_, '_> {
    /// The product that `scores` are computed from, and its value.
    fn product(&mut self, scores: ValueId) -> Result<(Product, ValueId), Refusal> {
        let mut at = scores;
        for _ in 0..DEPTH {
            self.path.pass(self.m, at);
            if let Some(product) = Product::making(self.m, at) {
                return Ok((product, at));
            }
            let (_, node) = producer(self.m, at).ok_or("the scores are not computed by a product")?;
            let input = |index: usize| node.input(index).ok_or(Refusal::NoMatch);
            at = match node.op_type.as_str() {
                "Identity" => input(0)?,
                _ if is_float_cast(self.m, node) => input(0)?,
                _ if is_layout(node) => {
                    self.regrouped = true;
                    input(0)?
                }
                "Tanh" => {
                    self.m.require(self.cap.is_none(), "the scores are capped twice")?;
                    self.cap = Some(std::mem::replace(&mut self.factor, 1.0));
                    self.m.require(self.factors.is_empty(), "capped scores are multiplied by a computed factor")?;
                    input(0)?
                }
                "Add" | "Sub" | "Mul" | "Div" | "Where" => {
                    let shift = if node.is("Sub") { shift(self.m, input(0)?, input(1)?) } else { None };
                    match shift {
                        Some(nodes) => {
                            self.path.nodes.extend(nodes);
                            input(0)?
                        }
                        None => self.step(node)?,
                    }
                }
                other => {
                    return Err(
                        format!("`{other}` lies between the product of queries and keys and the softmax").into()
                    );
                }
            };
        }
        Err("too many nodes lie between the product of queries and keys and the softmax".into())
    }

    /// Passes an elementwise node with two operands of which one leads on. Returns that one.
    fn step(&mut self, node: &Node) -> Result<ValueId, Refusal> {
        let m = self.m;
        let output = node.output(0).ok_or(Refusal::NoMatch)?;
        let operand = |index: usize| node.input(index).ok_or(Refusal::NoMatch);
        let candidates: &[usize] = match node.op_type.as_str() {
            "Where" => &[1, 2],
            "Sub" | "Div" => &[0],
            _ => &[0, 1],
        };
        let main = candidates
            .iter()
            .filter(|&&index| {
                let others: Vec<ValueId> =
                    node.inputs().iter().enumerate().filter(|(at, _)| *at != index).filter_map(|(_, v)| *v).collect();
                node.input(index).is_some_and(|value| self.carries(value, output, &others))
            })
            .filter_map(|&index| Some((distance(m, node.input(index)?, DEPTH)?, index)))
            .min();
        let (_, main) = main.ok_or_else(|| {
            Refusal::from(format!(
                "no operand of a `{}` before the softmax is provably a product of its shape",
                node.op_type
            ))
        })?;
        let at = m.facts().shape(operand(main)?).ok_or(Refusal::NoMatch)?.to_vec();
        match node.op_type.as_str() {
            "Where" => {
                let (condition, fill) = (operand(0)?, operand(3 - main)?);
                let fill =
                    uniform(m, fill).ok_or("what hidden scores become is not one constant number")? * self.factor;
                let elem = m.facts().elem(output).ok_or(Refusal::NoMatch)?;
                m.require(hides(fill, elem), "what hidden scores become does not hide them in every sum")?;
                self.term(condition, TermKind::Hidden { seen: main == 1, fill }, 1.0, at)?;
            }
            "Add" | "Sub" => {
                let sign = if node.is("Sub") { -1.0 } else { 1.0 };
                self.term(operand(1 - main)?, TermKind::Added, sign * self.factor, at)?;
            }
            _ => self.multiply(operand(1 - main)?, node.is("Div"), at)?,
        }
        operand(main)
    }

    /// Whether the scores go through `value`: the node that makes `output` from it and `others` broadcasts it along no
    /// axis. Along the keys the product with the values forbids it, and so along the queries if there are as many of
    /// either, in the scores and in what is added to them.
    fn carries(&self, value: ValueId, output: ValueId, others: &[ValueId]) -> bool {
        let shape = |value: ValueId| self.m.facts().shape(value);
        let (Some(from), Some(to)) = (shape(value), shape(output)) else { return false };
        let ([from_lead @ .., rows, columns], [to_lead @ .., new_rows, _]) = (from, to) else { return false };
        if self.regrouped || from.len() != to.len() {
            return from == to;
        }
        let square = |other: &ValueId| match shape(*other) {
            Some([.., r, c]) => r == c || r.as_known() == Some(1) || r.equal_where_broadcast(rows),
            Some(_) => true,
            None => false,
        };
        from_lead == to_lead && (rows == new_rows || (rows == columns && others.iter().all(square)))
    }

    fn term(&mut self, value: ValueId, kind: TermKind, factor: f64, at: Vec<DimExpr>) -> Result<(), Refusal> {
        self.m.require(self.cap.is_none(), "something is added before the scores are capped")?;
        self.m.require(self.factors.is_empty(), "something is added before the scores meet a computed factor")?;
        self.m.require(factor.is_finite(), "an addend is multiplied by what is not finite")?;
        self.terms.push(Term { value, factor, kind, at });
        Ok(())
    }

    /// Takes a factor (or a divisor) of everything further on.
    fn multiply(&mut self, value: ValueId, divides: bool, at: Vec<DimExpr>) -> Result<(), Refusal> {
        let m = self.m;
        if let Some(number) = constant_number(m, value) {
            self.factor *= if divides { 1.0 / number } else { number };
            return Ok(());
        }
        let shape = m.facts().shape(value).ok_or("the shape of a factor of the scores is unknown")?;
        let constant_along_keys = shape.last().is_none_or(|size| size.as_known() == Some(1));
        m.require(constant_along_keys, "a factor of the scores varies along the keys")?;
        self.factors.push(Factor { value, divides, at });
        Ok(())
    }
}
