//! A copy of a model that computes statistics and nothing else.

mod ranges;
mod small;

use super::{error::StatisticsError, request::Request};
use crate::wire::{Fold, Output};
use lathe_analysis::{DimExpr, Facts, Rows, View, Window, unused_initializers};
use lathe_ir::{AttributeValue, DataType, Graph, Model, Node, Origin, ScopeId, Tensor, Type, ValueId};
use std::collections::BTreeMap;

/// Rows of one product in float32. Longer sums are cut into parts of this many rows that are added in float64.
const PART: usize = 512;

/// Products of matrices with at most this many features are float64 throughout: they cost little, and a channel that
/// holds the same value in most rows (the background of images) is rounded the same way in every step of a float32 sum.
const NARROW: usize = 128;

/// The oldest operator set that has everything that is appended.
const OLDEST_OPSET: i64 = 9;

/// The sizes of what was asked for, as a first run showed them: of the value, or of its patches.
pub(crate) type RowSizes = BTreeMap<Rows, Vec<usize>>;

/// A mask of tokens: an input of the model, `[batch, tokens]`, zero where a token is padding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mask {
    value: ValueId,
}

impl Mask {
    /// The mask to use: the input of this name, or the one whose name says that it is one.
    pub(crate) fn find(model: &Model, name: Option<&str>) -> Result<Option<Mask>, StatisticsError> {
        let graph = &model.graph;
        let inputs = graph.main().inputs().iter().copied();
        if let Some(name) = name {
            let input = inputs.filter(|&v| graph.value(v).name == name).find(|&v| fits_mask(graph, v));
            let value = input.ok_or_else(|| StatisticsError::NoMask { name: name.to_owned() })?;
            return Ok(Some(Mask { value }));
        }
        let named = |v: &ValueId| {
            let lower = graph.value(*v).name.to_ascii_lowercase();
            lower == "mask" || lower.ends_with("attention_mask") || lower.ends_with("attn_mask")
        };
        Ok(inputs.filter(named).find(|&v| fits_mask(graph, v)).map(|value| Mask { value }))
    }
}

/// Whether an input is whole numbers or booleans of two axes. Float masks are added to scores and mean other things.
fn fits_mask(graph: &Graph, value: ValueId) -> bool {
    let Some(ty) = graph.value(value).ty.as_ref() else { return false };
    let whole = ty.elem().is_some_and(|e| e.is_integer() || e == DataType::Bool);
    whole && ty.shape().is_some_and(|s| s.dims.len() == 2)
}

/// The main-graph value of this name, or why statistics of it cannot be had.
pub(crate) fn resolve(model: &Model, name: &str) -> Result<ValueId, StatisticsError> {
    let graph = &model.graph;
    let outputs = graph.nodes(ScopeId::MAIN).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    let mut here = graph.main().inputs().iter().copied().chain(outputs);
    if let Some(value) = here.find(|&v| graph.value(v).name == name) {
        return Ok(value);
    }
    let name = name.to_owned();
    let in_function = |name: &str| model.functions.iter().any(|f| f.graph.find_value(name).is_some());
    match graph.find_value(&name) {
        Some(value) if matches!(graph.value(value).origin(), Origin::Initializer(_)) => {
            Err(StatisticsError::Constant { value: name })
        }
        Some(value) => {
            let owner = graph.scope_of(value).and_then(|scope| graph.scope(scope).owner());
            let node = owner.map_or_else(|| "another node".to_owned(), |id| graph.describe(id));
            Err(StatisticsError::Nested { value: name, node: format!("a subgraph of {node}") })
        }
        None if in_function(&name) => {
            Err(StatisticsError::Nested { value: name, node: "a function of the model".to_owned() })
        }
        None => Err(StatisticsError::Missing { value: name }),
    }
}

/// The copy under construction.
pub(crate) struct Append<'a> {
    graph: Graph,
    model: &'a Model,
    facts: &'a Facts,
    sizes: &'a RowSizes,
    mask: Option<Mask>,
    rows: BTreeMap<Rows, Matrix>,
    kept: BTreeMap<Rows, (ValueId, ValueId)>,
    ints: BTreeMap<Vec<i64>, ValueId>,
    outputs: Vec<ValueId>,
}

/// A value as a matrix.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    /// `[t, k]`, float or double.
    value: ValueId,
    /// Which rows hold numbers only, `[t, 1]`.
    finite: ValueId,
    /// Which rows are tokens, `[t, 1]`; `None` where the mask says nothing about them.
    tokens: Option<ValueId>,
    /// Rows in the first batch.
    rows: usize,
    /// Columns.
    features: usize,
    /// Whether it is double.
    wide: bool,
}

impl<'a> Append<'a> {
    /// Starts with everything that `model` computes. `sizes` may be empty for [`Append::shapes`].
    pub(crate) fn new(
        model: &'a Model,
        facts: &'a Facts,
        sizes: &'a RowSizes,
        mask: Option<Mask>,
    ) -> Result<Append<'a>, StatisticsError> {
        if model.opset() < OLDEST_OPSET {
            return Err(StatisticsError::OldOpset { found: model.opset(), needed: OLDEST_OPSET });
        }
        let mut graph = model.graph.clone();
        for index in (0..graph.main().outputs().len()).rev() {
            graph.remove_output(ScopeId::MAIN, index);
        }
        let (rows, kept, ints) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Ok(Append { graph, model, facts, sizes, mask, rows, kept, ints, outputs: Vec::new() })
    }

    /// The finished copy: the nodes that an output needs, with weights shared.
    pub(crate) fn finish(self) -> Model {
        let mut graph = self.graph;
        for &value in &self.outputs {
            graph.add_output(ScopeId::MAIN, value);
        }
        let unused = |graph: &Graph, id| {
            graph.node(id).outputs().iter().flatten().all(|&v: &ValueId| graph.value(v).uses().is_empty())
        };
        let dead = graph.all_nodes().into_iter().filter(|&id| unused(&graph, id)).collect();
        graph.remove_unused(dead);
        for value in unused_initializers(&graph) {
            graph.remove_initializer(value);
        }
        let ir_version = self.model.ir_version.max(4);
        Model { graph, ir_version, training: Vec::new(), ..self.model.clone() }
    }

    /// Asks for the sizes of rows: of the value, or of its patches.
    pub(crate) fn shapes(&mut self, rows: &Rows) -> Result<Output, StatisticsError> {
        let base = self.base(rows)?;
        Ok(self.size_of(base))
    }

    /// Asks for the sizes of a model input.
    pub(crate) fn size_of(&mut self, value: ValueId) -> Output {
        let shape = self.op("Shape", &[value]);
        self.output(shape, DataType::Int64, "shape", Fold::First)
    }

    /// Asks for a statistic.
    pub(crate) fn request(&mut self, request: &Request) -> Result<Vec<Output>, StatisticsError> {
        match request {
            Request::Gram(x) => self.gram(x),
            Request::Columns(x) => self.columns(x),
            Request::Cross(x, y) => self.cross(x, y),
            Request::Cosine(x, y) => self.cosine(x, y),
            Request::Magnitudes(x) => self.magnitudes(x),
            Request::Range(x) => self.range(x),
            Request::Spread(x) => self.spread(x),
            Request::Skip(skip) => self.skip(skip),
        }
    }

    fn gram(&mut self, rows: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let matrix = self.matrix(rows)?;
        let (x, counts) = self.kept_alone(rows, matrix);
        let (gram, dtype) = self.product(x, x, matrix.rows, matrix.wide || matrix.features <= NARROW);
        let sum = self.column_sum(x);
        Ok(vec![
            self.output(gram, dtype, "gram", Fold::Triangle),
            self.output(sum, DataType::Double, "sum", Fold::Sum),
            self.output(counts, DataType::Double, "counts", Fold::Sum),
        ])
    }

    fn columns(&mut self, rows: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let matrix = self.matrix(rows)?;
        let (x, counts) = self.kept_alone(rows, matrix);
        let wide = self.cast(x, DataType::Double);
        let size = self.op("Abs", &[wide]);
        let square = self.op("Mul", &[wide, wide]);
        let sum = self.reduce("ReduceSum", wide, Some(0), false);
        let abs_sum = self.reduce("ReduceSum", size, Some(0), false);
        let square_sum = self.reduce("ReduceSum", square, Some(0), false);
        let max = self.reduce("ReduceMax", size, Some(0), false);
        Ok(vec![
            self.output(sum, DataType::Double, "sum", Fold::Sum),
            self.output(abs_sum, DataType::Double, "abs_sum", Fold::Sum),
            self.output(square_sum, DataType::Double, "square_sum", Fold::Sum),
            self.output(max, DataType::Double, "max_abs", Fold::Max),
            self.output(counts, DataType::Double, "counts", Fold::Sum),
        ])
    }

    fn cross(&mut self, x: &Rows, y: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let (a, b) = (self.matrix(x)?, self.matrix(y)?);
        if a.rows != b.rows {
            return Err(StatisticsError::Rows { x: x.label(), y: y.label(), found: (a.rows, b.rows) });
        }
        let (x, y, counts) = self.kept_together(a, b);
        let (cross, dtype) = self.product(x, y, a.rows, a.wide || b.wide || a.features.max(b.features) <= NARROW);
        let mut outputs = vec![self.output(cross, dtype, "cross", Fold::Sum)];
        for (value, sum, square_sum) in [(x, "x_sum", "x_square_sum"), (y, "y_sum", "y_square_sum")] {
            let wide = self.cast(value, DataType::Double);
            let square = self.op("Mul", &[wide, wide]);
            for (value, field) in [(wide, sum), (square, square_sum)] {
                let reduced = self.reduce("ReduceSum", value, Some(0), false);
                outputs.push(self.output(reduced, DataType::Double, field, Fold::Sum));
            }
        }
        outputs.push(self.output(counts, DataType::Double, "counts", Fold::Sum));
        Ok(outputs)
    }

    fn cosine(&mut self, x: &Rows, y: &Rows) -> Result<Vec<Output>, StatisticsError> {
        let (a, b) = (self.matrix(x)?, self.matrix(y)?);
        let (sizes_x, sizes_y) = (&self.sizes[x], &self.sizes[y]);
        if sizes_x != sizes_y {
            let found = (sizes_x.clone(), sizes_y.clone());
            return Err(StatisticsError::Shapes { x: x.label(), y: y.label(), found });
        }
        let (x, y, counts) = self.kept_together(a, b);
        let (x, y) = (self.cast(x, DataType::Double), self.cast(y, DataType::Double));
        let mut row_sum = |a: ValueId, b: ValueId| {
            let product = self.op("Mul", &[a, b]);
            self.reduce("ReduceSum", product, Some(1), true)
        };
        let (dot, xx, yy) = (row_sum(x, y), row_sum(x, x), row_sum(y, y));
        let (x_norm, y_norm) = (self.op("Sqrt", &[xx]), self.op("Sqrt", &[yy]));
        let norms = self.op("Mul", &[x_norm, y_norm]);
        // A row of zeros has no direction; its dot product is 0 whatever the divisor.
        let smallest = self.constant(Tensor::from_f64s(DataType::Double, &[1], &[f64::MIN_POSITIVE]));
        let divisor = self.op("Max", &[norms, smallest]);
        let cosine = self.op("Div", &[dot, divisor]);
        let difference = self.op("Sub", &[x, y]);
        let square = self.op("Mul", &[difference, difference]);
        let sums = [
            (cosine, "cosine_sum"),
            (dot, "dot_sum"),
            (x_norm, "x_norm_sum"),
            (y_norm, "y_norm_sum"),
            (xx, "x_square_sum"),
            (yy, "y_square_sum"),
            (square, "difference_square_sum"),
        ];
        let mut outputs = Vec::new();
        for (value, field) in sums {
            let sum = self.reduce("ReduceSum", value, None, false);
            outputs.push(self.output(sum, DataType::Double, field, Fold::Sum));
        }
        outputs.push(self.output(counts, DataType::Double, "counts", Fold::Sum));
        Ok(outputs)
    }

    /// The value whose axes make up rows: a value of the model, or its patches.
    fn base(&mut self, rows: &Rows) -> Result<ValueId, StatisticsError> {
        let value = resolve(self.model, &rows.value)?;
        match &rows.view {
            View::Axis(_) => Ok(value),
            View::Position(position) => {
                let position = self.ints(&[*position as i64]);
                Ok(self.node(Node::new("Gather").with("axis", 1i64), &[value, position]))
            }
            View::Patches(window) => {
                let dtype = self.facts.elem(value).filter(|&e| e == DataType::Double).unwrap_or(DataType::Float);
                let value = self.as_float(value);
                if !window.apart {
                    return self.patches(value, window, dtype);
                }
                let spatial = window.kernel.iter().map(|_| 0);
                let alone = self.ints(&[-1, 1].into_iter().chain(spatial).collect::<Vec<i64>>());
                let alone = self.op("Reshape", &[value, alone]);
                self.patches(alone, &Window { channels: 1, ..window.clone() }, dtype)
            }
        }
    }

    /// A value in float32, or as it is if it is known to be float32 or float64.
    fn as_float(&mut self, value: ValueId) -> ValueId {
        match self.facts.elem(value) {
            Some(DataType::Float | DataType::Double) => value,
            _ => self.cast(value, DataType::Float),
        }
    }

    /// Every window as channels: a convolution of each channel with one kernel per tap that picks this tap.
    fn patches(&mut self, value: ValueId, window: &Window, dtype: DataType) -> Result<ValueId, StatisticsError> {
        let wrong = || StatisticsError::Window { window: format!("{window:?}") };
        let sizes: Option<Vec<usize>> = window.kernel.iter().map(|&k| usize::try_from(k).ok()).collect();
        let sizes = sizes.ok_or_else(wrong)?;
        let taps = lathe_ir::element_count(&sizes).filter(|&t| (1..=1 << 10).contains(&t)).ok_or_else(wrong)?;
        let channels = usize::try_from(window.channels).ok().filter(|&c| (1..=1 << 20).contains(&c));
        let channels = channels.ok_or_else(wrong)?;
        let one_hot = (0..channels * taps).flat_map(|row| (0..taps).map(move |tap| f64::from(row % taps == tap)));
        let mut dims = vec![channels * taps, 1];
        dims.extend(&sizes);
        let weight = self.constant(Tensor::from_f64s(dtype, &dims, &one_hot.collect::<Vec<_>>()));
        let mut node = Node::new("Conv").with("group", window.channels).with("kernel_shape", window.kernel.clone());
        let lists = [("strides", &window.strides), ("dilations", &window.dilations), ("pads", &window.pads)];
        for (name, list) in lists {
            if !list.is_empty() {
                node = node.with(name, list.clone());
            }
        }
        if !window.auto_pad.is_empty() {
            node = node.with("auto_pad", window.auto_pad.as_str());
        }
        Ok(self.node(node, &[value, weight]))
    }

    /// Reads rows as a matrix, once.
    fn matrix(&mut self, rows: &Rows) -> Result<Matrix, StatisticsError> {
        if let Some(matrix) = self.rows.get(rows) {
            return Ok(*matrix);
        }
        let base = self.base(rows)?;
        let sizes = &self.sizes[rows];
        let ndim = sizes.len();
        let axis = match rows.view {
            View::Axis(axis) => axis,
            View::Position(_) => -1,
            View::Patches(_) => 1,
        };
        let axis = if axis < 0 { axis + ndim as i64 } else { axis };
        let axis = usize::try_from(axis).ok().filter(|&a| a < ndim);
        let axis = axis.ok_or_else(|| StatisticsError::Axis { value: rows.label(), found: sizes.clone() })?;
        let features = sizes[axis];
        let count: usize = sizes.iter().enumerate().filter(|(a, _)| *a != axis).map(|(_, &size)| size).product();
        if features == 0 {
            return Err(StatisticsError::Axis { value: rows.label(), found: sizes.clone() });
        }
        // Patches are made from floats already.
        let mut value = if matches!(rows.view, View::Patches(_)) { base } else { self.as_float(base) };
        if axis + 1 != ndim {
            let mut perm: Vec<i64> = (0..ndim as i64).filter(|&a| a != axis as i64).collect();
            perm.push(axis as i64);
            value = self.node(Node::new("Transpose").with("perm", perm), &[value]);
        }
        let tokens = match &rows.view {
            View::Axis(_) => self.tokens(base, axis, value),
            View::Position(_) | View::Patches(_) => None,
        };
        let shape = self.ints(&[-1, features as i64]);
        let value = self.op("Reshape", &[value, shape]);
        // The sum of absolute values is no number exactly where an element is none (or the sum is beyond float32, and
        // so would every product be); subtracting it from itself leaves 0 or NaN.
        let size = self.op("Abs", &[value]);
        let sum = self.reduce("ReduceSum", size, Some(1), true);
        let zero = self.op("Sub", &[sum, sum]);
        let broken = self.op("IsNaN", &[zero]);
        let finite = self.op("Not", &[broken]);
        let wide = self.facts.elem(resolve(self.model, &rows.value)?) == Some(DataType::Double);
        let matrix = Matrix { value, finite, tokens, rows: count, features, wide };
        self.rows.insert(rows.clone(), matrix);
        Ok(matrix)
    }

    /// Which rows of a value are tokens, `[t, 1]`, if the mask's axes are found among the value's. `moved` is the value
    /// with its features last.
    fn tokens(&mut self, base: ValueId, features: usize, moved: ValueId) -> Option<ValueId> {
        let mask = self.mask?.value;
        let [batch, tokens] = self.facts.shape(mask)? else { return None };
        let mut dims: Vec<DimExpr> = self.facts.shape(base)?.to_vec();
        dims.remove(features);
        let flags = self.cast(mask, DataType::Bool);
        let column = self.ints(&[-1, 1]);
        if dims.len() == 1 && batch.times(tokens).is_some_and(|all| dims[0] == all) {
            return Some(self.op("Reshape", &[flags, column]));
        }
        let at = dims.iter().rposition(|d| d == tokens).filter(|&at| at > 0 && dims[0] == *batch)?;
        let mut target = vec![1; dims.len()];
        (target[0], target[at]) = (0, -1);
        let target = self.ints(&target);
        let flags = self.op("Reshape", &[flags, target]);
        let shape = self.op("Shape", &[moved]);
        let shape = self.slice(shape, 0, -1);
        let flags = self.op("Expand", &[flags, shape]);
        Some(self.op("Reshape", &[flags, column]))
    }

    /// The matrix with zeros in the rows that are dropped, and how many rows there are.
    fn kept_alone(&mut self, rows: &Rows, matrix: Matrix) -> (ValueId, ValueId) {
        if let Some(&kept) = self.kept.get(rows) {
            return kept;
        }
        let (keep, counts) = self.keep(matrix.finite, matrix.tokens, matrix.value);
        let kept = (self.zeroed(matrix, keep), counts);
        self.kept.insert(rows.clone(), kept);
        kept
    }

    /// Both matrices with zeros in the rows that are dropped from either.
    fn kept_together(&mut self, a: Matrix, b: Matrix) -> (ValueId, ValueId, ValueId) {
        let finite = self.op("And", &[a.finite, b.finite]);
        let (keep, counts) = self.keep(finite, a.tokens.or(b.tokens), a.value);
        (self.zeroed(a, keep), self.zeroed(b, keep), counts)
    }

    /// Which rows are kept, and `[kept, padded, broken]`.
    fn keep(&mut self, finite: ValueId, tokens: Option<ValueId>, matrix: ValueId) -> (ValueId, ValueId) {
        let shape = self.op("Shape", &[matrix]);
        let all = self.slice(shape, 0, 1);
        let all = self.cast(all, DataType::Double);
        let one = self.ints(&[1]);
        let mut count = |flags: ValueId| {
            let numbers = self.cast(flags, DataType::Double);
            let sum = self.reduce("ReduceSum", numbers, None, false);
            self.op("Reshape", &[sum, one])
        };
        let (keep, real) = match tokens {
            Some(tokens) => {
                let real = count(tokens);
                (self.op("And", &[finite, tokens]), real)
            }
            None => (finite, all),
        };
        let numbers = self.cast(keep, DataType::Double);
        let kept = self.reduce("ReduceSum", numbers, None, false);
        let kept = self.op("Reshape", &[kept, one]);
        let padded = self.op("Sub", &[all, real]);
        let broken = self.op("Sub", &[real, kept]);
        (keep, self.node(Node::new("Concat").with("axis", 0), &[kept, padded, broken]))
    }

    fn zeroed(&mut self, matrix: Matrix, keep: ValueId) -> ValueId {
        let dtype = if matrix.wide { DataType::Double } else { DataType::Float };
        let zero = self.constant(Tensor::from_f64s(dtype, &[1], &[0.0]));
        self.op("Where", &[keep, matrix.value, zero])
    }

    /// `aᵀ·b`, in float64 if `wide`, else in parts if `rows` are many; the type is that of the result.
    fn product(&mut self, a: ValueId, b: ValueId, rows: usize, wide: bool) -> (ValueId, DataType) {
        let (a, b) = match wide {
            true => (self.cast(a, DataType::Double), self.cast(b, DataType::Double)),
            false => (a, b),
        };
        let parts = rows.div_ceil(PART).max(1);
        if wide {
            return (self.part_product(a, b), DataType::Double);
        }
        if parts == 1 {
            return (self.part_product(a, b), DataType::Float);
        }
        let mut sum = None;
        for part in 0..parts {
            let start = (part * PART) as i64;
            // A later batch may have more rows than the first.
            let end = if part + 1 == parts { i64::MAX } else { start + PART as i64 };
            let left = self.slice(a, start, end);
            let right = if a == b { left } else { self.slice(b, start, end) };
            let product = self.part_product(left, right);
            let product = self.cast(product, DataType::Double);
            sum = Some(match sum {
                Some(sum) => self.op("Add", &[sum, product]),
                None => product,
            });
        }
        // Rounded once per batch, which changes less than the parts do, and half as large on the way out.
        let sum = sum.expect("there is at least one part");
        (self.cast(sum, DataType::Float), DataType::Float)
    }

    fn part_product(&mut self, a: ValueId, b: ValueId) -> ValueId {
        let turned = self.node(Node::new("Transpose").with("perm", vec![1i64, 0]), &[a]);
        self.op("MatMul", &[turned, b])
    }

    fn column_sum(&mut self, x: ValueId) -> ValueId {
        let wide = self.cast(x, DataType::Double);
        self.reduce("ReduceSum", wide, Some(0), false)
    }

    fn slice(&mut self, value: ValueId, start: i64, end: i64) -> ValueId {
        if self.model.opset() < 10 {
            let node = Node::new("Slice").with("axes", vec![0i64]).with("starts", vec![start]).with("ends", vec![end]);
            return self.node(node, &[value]);
        }
        let (start, end, axis) = (self.ints(&[start]), self.ints(&[end]), self.ints(&[0]));
        self.op("Slice", &[value, start, end, axis])
    }

    fn reduce(&mut self, op: &str, value: ValueId, axis: Option<i64>, keep: bool) -> ValueId {
        let axes_are_input = self.model.opset() >= if op == "ReduceSum" { 13 } else { 18 };
        let node = Node::new(op).with("keepdims", i64::from(keep));
        match axis {
            None => self.node(node, &[value]),
            Some(axis) if axes_are_input => {
                let axis = self.ints(&[axis]);
                self.node(node, &[value, axis])
            }
            Some(axis) => self.node(node.with("axes", vec![axis]), &[value]),
        }
    }

    fn cast(&mut self, value: ValueId, dtype: DataType) -> ValueId {
        self.node(Node::new("Cast").with("to", AttributeValue::Int(i64::from(dtype.code()))), &[value])
    }

    fn op(&mut self, op: &str, inputs: &[ValueId]) -> ValueId {
        self.node(Node::new(op), inputs)
    }

    fn node(&mut self, node: Node, inputs: &[ValueId]) -> ValueId {
        self.graph.append(ScopeId::MAIN, node, inputs, "statistic")
    }

    fn constant(&mut self, tensor: Option<Tensor>) -> ValueId {
        let tensor = tensor.expect("made as float or double");
        let name = self.graph.fresh_name("statistic");
        self.graph.add_initializer(ScopeId::MAIN, &name, tensor)
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        if let Some(&value) = self.ints.get(values) {
            return value;
        }
        let name = self.graph.fresh_name("statistic");
        let value = self.graph.add_initializer(ScopeId::MAIN, &name, Tensor::int64s(values));
        self.ints.insert(values.to_vec(), value);
        value
    }

    /// Makes a value an output. One that is an output already (counts shared by two requests) goes through a node.
    fn output(&mut self, value: ValueId, dtype: DataType, field: &str, fold: Fold) -> Output {
        let value = self.op("Identity", &[value]);
        self.graph.value_mut(value).ty = Some(Type::unshaped(dtype));
        self.outputs.push(value);
        Output { value: self.graph.value(value).name.clone(), field: field.to_owned(), fold }
    }
}
