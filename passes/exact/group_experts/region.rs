//! What a layer of experts does with every pair of a token and an expert.

use crate::operands::slice_ranges;
use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{Graph, Node, NodeId, ScopeId, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Operators of one value that treat every element by itself.
const UNARY: [&str; 20] = [
    "Abs",
    "Ceil",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Reciprocal",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Sqrt",
    "Tanh",
];

/// Operators of two or more values that do.
const NARY: [&str; 8] = ["Add", "Clip", "Div", "Max", "Min", "Mul", "Pow", "Sub"];

/// How the features of a pair lie in a value whose first axis are the pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[pairs, features]`
    Flat,
    /// `[pairs, 1, features]`
    Row,
    /// `[pairs, features, 1]`
    Column,
}

impl Layout {
    /// Which axis the features are.
    fn axis(self) -> usize {
        match self {
            Layout::Flat | Layout::Column => 1,
            Layout::Row => 2,
        }
    }

    fn ndim(self) -> usize {
        if self == Layout::Flat { 2 } else { 3 }
    }

    /// Of a shape whose features of a pair are `width`.
    fn of(shape: &[DimExpr], width: usize) -> Option<Layout> {
        let is = |dim: &DimExpr, size: usize| dim.as_known() == Some(size as i64);
        match shape {
            [_, a] if is(a, width) => Some(Layout::Flat),
            [_, a, b] if is(a, width) && is(b, 1) => Some(Layout::Column),
            [_, a, b] if is(a, 1) && is(b, width) => Some(Layout::Row),
            _ => None,
        }
    }
}

/// Where an operand of a step comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operand {
    /// A value of the pairs.
    Pairs(ValueId),
    /// One row of a table of two dimensions for each expert.
    Rows(ValueId),
    /// A constant for all: one number, or one for each feature.
    Constant(ValueId),
    /// There is none.
    Absent,
}

/// What is done to the rows of every expert.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A product with the expert's matrix of a table.
    Product { table: ValueId, transposed: bool, x: ValueId, made: ValueId },
    /// The same value in another layout.
    Alias { x: ValueId, made: ValueId },
    /// A node as it stands, over `[rows, features]`.
    Node { node: NodeId, operands: Vec<Operand> },
    /// A Split or a Slice of the features.
    Cut { node: NodeId, x: ValueId },
}

/// A layer of experts.
pub(super) struct Region {
    /// The numbers of the picked experts: `[pairs]`.
    pub numbers: ValueId,
    pub experts: usize,
    pub scope: ScopeId,
    pub steps: Vec<Step>,
    /// Values of the pairs from outside, and how many features they have.
    pub entries: BTreeMap<ValueId, usize>,
    /// The one value that others read, its layout and how many features it has.
    pub exit: (ValueId, Layout, usize),
    /// Nodes that nobody needs any more.
    pub replaced: Vec<NodeId>,
}

/// A search for the steps of a layer.
struct Search<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    pairs: DimExpr,
    /// Gathered tables of three dimensions, and whether they were transposed since.
    tables: BTreeMap<ValueId, (ValueId, bool)>,
    /// Gathered tables of two dimensions, and how their features lie.
    rows: BTreeMap<ValueId, (ValueId, Layout)>,
    /// Values of the pairs: how they lie and how many features they have.
    known: BTreeMap<ValueId, (Layout, usize)>,
    entries: BTreeMap<ValueId, usize>,
    steps: Vec<Step>,
}

impl Region {
    /// The layer whose experts are picked by `numbers`, or why it is left alone.
    pub(super) fn find(graph: &Graph, facts: &Facts, numbers: ValueId, most: usize) -> Result<Region, &'static str> {
        let Some([pairs]) = facts.shape(numbers) else { return Err("the numbers of experts are no list") };
        let gathers: Vec<NodeId> =
            graph.value(numbers).uses().iter().filter_map(|place| gather(graph, *place)).collect();
        let scopes: BTreeSet<ScopeId> = gathers.iter().map(|&id| graph.node(id).scope()).collect();
        let (Some(&scope), 1) = (scopes.first(), scopes.len()) else {
            return Err("the tables are gathered in several graphs");
        };
        let experts = experts(graph, &gathers).ok_or("the tables are of different numbers of experts")?;
        if experts > most {
            return Err("there are more experts than max-experts allows");
        }
        if !is_top_k(graph, facts, numbers, experts) {
            return Err("the numbers of experts are not those of a TopK over all of them");
        }
        let mut search = Search {
            graph,
            facts,
            pairs: pairs.clone(),
            tables: BTreeMap::new(),
            rows: BTreeMap::new(),
            known: BTreeMap::new(),
            entries: BTreeMap::new(),
            steps: Vec::new(),
        };
        for &id in &gathers {
            let (Some(table), Some(made)) = (graph.node(id).input(0), graph.node(id).output(0)) else { continue };
            match graph.constant(table).map_or(0, |t| t.dims().len()) {
                3 => _ = search.tables.insert(made, (table, false)),
                _ => _ = search.rows.insert(made, (table, Layout::Flat)),
            }
        }
        let mut replaced = gathers.clone();
        for id in graph.sorted(scope).unwrap_or_default() {
            if search.step(id).is_some() {
                replaced.push(id);
            }
        }
        let inside: BTreeSet<NodeId> = replaced.iter().copied().collect();
        let leaves = |value: &ValueId| {
            graph.value(*value).uses().iter().any(|place| !matches!(place, Use::Node(id, _) if inside.contains(id)))
        };
        if search.tables.keys().chain(search.rows.keys()).any(leaves) {
            return Err("gathered weights are read by more than products");
        }
        let mut exits = search.known.iter().filter(|(value, _)| !search.entries.contains_key(value) && leaves(value));
        let (Some((&exit, &(layout, width))), None) = (exits.next(), exits.next()) else {
            return Err("what lies between the tables does not treat every pair by itself");
        };
        let Search { entries, steps, .. } = search;
        Ok(Region { numbers, experts, scope, steps, entries, exit: (exit, layout, width), replaced })
    }
}

/// A Gather of floats along the first axis of a constant table of two or three dimensions.
fn gather(graph: &Graph, place: Use) -> Option<NodeId> {
    let Use::Node(id, 1) = place else { return None };
    let node = graph.node(id);
    let table = node.input(0).and_then(|table| graph.constant(table))?;
    let fits = matches!(table.dims().len(), 2 | 3) && table.dtype().is_float();
    (node.is("Gather") && node.int("axis").unwrap_or(0) == 0 && fits).then_some(id)
}

/// How many experts all tables have.
fn experts(graph: &Graph, gathers: &[NodeId]) -> Option<usize> {
    let mut counts = gathers.iter().filter_map(|&id| Some(graph.constant(graph.node(id).input(0)?)?.dims()[0]));
    let first = counts.next()?;
    (first > 1 && counts.all(|count| count == first)).then_some(first)
}

/// Whether numbers are the indices of a TopK over `experts` scores: none is negative, and none too large.
fn is_top_k(graph: &Graph, facts: &Facts, numbers: ValueId, experts: usize) -> bool {
    let mut value = numbers;
    loop {
        let Some(id) = graph.producer(value) else { return false };
        let node = graph.node(id);
        if node.is("TopK") && node.output(1) == Some(value) {
            let scores = node.input(0).and_then(|scores| facts.shape(scores));
            let axis = node.int("axis").unwrap_or(-1);
            return scores.is_some_and(|shape| {
                let axis = if axis < 0 { axis + shape.len() as i64 } else { axis };
                let size = usize::try_from(axis).ok().and_then(|axis| shape.get(axis)?.as_known());
                size == Some(experts as i64)
            });
        }
        let keeps =
            ["Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Transpose"].iter().any(|op| node.is(op));
        let Some(before) = node.input(0).filter(|_| keeps) else { return false };
        value = before;
    }
}

impl Search<'_> {
    /// Reads a node as a step, if it is one.
    fn step(&mut self, id: NodeId) -> Option<()> {
        let graph = self.graph;
        let node = graph.node(id);
        let inputs: Vec<ValueId> = node.inputs().iter().flatten().copied().collect();
        let is_inside =
            |v: &ValueId| self.tables.contains_key(v) || self.rows.contains_key(v) || self.known.contains_key(v);
        if !inputs.iter().any(is_inside) || !node.is_standard() || !node.subgraphs().is_empty() {
            return None;
        }
        let (x, made) = (node.input(0)?, node.output(0)?);
        match node.op_type.as_str() {
            "Transpose" => {
                let &(table, transposed) = self.tables.get(&x)?;
                (node.ints("perm")? == [0, 2, 1]).then_some(())?;
                self.tables.insert(made, (table, !transposed));
            }
            "MatMul" => self.product(x, node.input(1)?, made)?,
            "Squeeze" | "Unsqueeze" | "Reshape" => {
                if let Some(&(table, _)) = self.rows.get(&x) {
                    let width = self.graph.constant(table)?.dims()[1];
                    let layout = Layout::of(self.facts.shape(made)?, width)?;
                    self.rows.insert(made, (table, layout));
                    return Some(());
                }
                let &(_, width) = self.known.get(&x)?;
                let layout = Layout::of(self.facts.shape(made)?, width)?;
                self.known.insert(made, (layout, width));
                self.steps.push(Step::Alias { x, made });
            }
            "Split" | "Slice" => self.cut(id, node, x)?,
            op if UNARY.contains(&op) => {
                let known = *self.known.get(&x)?;
                self.known.insert(made, known);
                self.steps.push(Step::Node { node: id, operands: vec![Operand::Pairs(x)] });
            }
            op if NARY.contains(&op) => {
                let (layout, width) = inputs.iter().find_map(|v| self.known.get(v).copied())?;
                let operand = |input: &Option<ValueId>| self.operand(*input, layout, width);
                let operands: Vec<Operand> = node.inputs().iter().map(operand).collect::<Option<_>>()?;
                self.known.insert(made, (layout, width));
                self.steps.push(Step::Node { node: id, operands });
            }
            _ => return None,
        }
        Some(())
    }

    /// A product of a gathered matrix with a column, or of a row with it.
    fn product(&mut self, a: ValueId, b: ValueId, made: ValueId) -> Option<()> {
        let (x, &(table, transposed), layout) = match (self.tables.get(&a), self.tables.get(&b)) {
            (Some(table), None) => (b, table, Layout::Column),
            (None, Some(table)) => (a, table, Layout::Row),
            _ => return None,
        };
        let &[_, rows, columns] = self.graph.constant(table)?.dims() else { return None };
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        let (taken, given) = if layout == Layout::Column { (columns, rows) } else { (rows, columns) };
        if !self.known.contains_key(&x) {
            let shape = self.facts.shape(x)?;
            (shape.first() == Some(&self.pairs) && Layout::of(shape, taken) == Some(layout)).then_some(())?;
            self.known.insert(x, (layout, taken));
            self.entries.insert(x, taken);
        }
        (self.known.get(&x) == Some(&(layout, taken)) || taken == 1).then_some(())?;
        self.known.insert(made, (layout, given));
        // Over rows, a matrix that stands before a column stands transposed behind them.
        let transposed = transposed != (layout == Layout::Column);
        self.steps.push(Step::Product { table, transposed, x, made });
        Some(())
    }

    /// A Split or a Slice along the features.
    fn cut(&mut self, id: NodeId, node: &Node, x: ValueId) -> Option<()> {
        let &(layout, _) = self.known.get(&x)?;
        let axis = if node.is("Split") {
            let axis = node.int("axis").unwrap_or(0);
            if axis < 0 { axis + layout.ndim() as i64 } else { axis }
        } else {
            let ranges = slice_ranges(self.graph, self.facts, node, layout.ndim()).ok()?;
            let [range] = ranges.as_slice() else { return None };
            range.axis as i64
        };
        (axis == layout.axis() as i64).then_some(())?;
        let mut parts = Vec::new();
        for &part in node.outputs().iter().flatten() {
            let width = self.facts.shape(part)?.get(layout.axis())?.as_known()?;
            parts.push((part, usize::try_from(width).ok()?));
        }
        self.known.extend(parts.into_iter().map(|(part, width)| (part, (layout, width))));
        self.steps.push(Step::Cut { node: id, x });
        Some(())
    }

    /// An operand of a node that treats every element by itself, beside values of this layout and width.
    fn operand(&self, input: Option<ValueId>, layout: Layout, width: usize) -> Option<Operand> {
        let Some(value) = input else { return Some(Operand::Absent) };
        if let Some(known) = self.known.get(&value) {
            return (*known == (layout, width)).then_some(Operand::Pairs(value));
        }
        if let Some(&(table, lies)) = self.rows.get(&value) {
            let fits = lies == layout && self.graph.constant(table)?.dims()[1] == width;
            return fits.then_some(Operand::Rows(table));
        }
        let tensor = self.graph.constant(value)?;
        let dims = tensor.dims();
        let from_end = layout.ndim() - 1 - layout.axis();
        let along = |(index, &dim): (usize, &usize)| dim == 1 || (index + 1 + from_end == dims.len() && dim == width);
        let fits = dims.len() <= layout.ndim() && dims.iter().enumerate().all(along);
        (fits && (tensor.len() == 1 || tensor.len() == width)).then_some(Operand::Constant(value))
    }
}
