//! Layers with constant weights, and how a scale and a shift before or after one go into its weights.

use super::rounding::{Grid, Sum, attribute, is_weight_type, scaled, sums};
use crate::{Match, Refusal};
use lathe_ir::{DataType, Graph, Node, NodeId, Patch, Tensor, Use, ValueId};

/// The relative L2 difference that passes over weights claim. One fold moves float32 outputs by some 10⁻⁷; deep models
/// add up hundreds of them.
pub(super) const RTOL: f32 = 1e-4;

/// Growth of the stored constants below this many bytes is less than what the removed nodes took.
const TRIVIAL_BYTES: usize = 1024;

/// One number for every channel, or one number for each.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Gain {
    All(f64),
    Each(Vec<f64>),
}

impl Gain {
    pub(super) const ONE: Gain = Gain::All(1.0);
    pub(super) const ZERO: Gain = Gain::All(0.0);

    pub(super) fn at(&self, channel: usize) -> f64 {
        match self {
            Gain::All(number) => *number,
            Gain::Each(numbers) => numbers[channel],
        }
    }

    pub(super) fn map(&self, f: impl Fn(f64) -> f64) -> Gain {
        match self {
            Gain::All(number) => Gain::All(f(*number)),
            Gain::Each(numbers) => Gain::Each(numbers.iter().map(|&x| f(x)).collect()),
        }
    }

    /// Every number combined with the one of `other` for the same channel.
    pub(super) fn zip(&self, other: &Gain, f: impl Fn(f64, f64) -> f64) -> Gain {
        match (self, other) {
            (Gain::All(a), Gain::All(b)) => Gain::All(f(*a, *b)),
            (Gain::Each(all), _) => Gain::Each(all.iter().enumerate().map(|(i, &a)| f(a, other.at(i))).collect()),
            (_, Gain::Each(all)) => Gain::Each(all.iter().enumerate().map(|(i, &b)| f(self.at(i), b)).collect()),
        }
    }

    fn all(&self, test: impl Fn(f64) -> bool) -> bool {
        match self {
            Gain::All(number) => test(*number),
            Gain::Each(numbers) => numbers.iter().all(|&x| test(x)),
        }
    }

    pub(super) fn is(&self, number: f64) -> bool {
        self.all(|x| x == number)
    }

    pub(super) fn require_finite(&self) -> Result<(), Refusal> {
        if self.all(f64::is_finite) { Ok(()) } else { Err("a constant is infinite or not a number".into()) }
    }

    /// Reads a constant that multiplies or is added to a value of `ndim` axes: one number, or one for each of `size`
    /// channels, which lie along the axis that `from_end` others follow.
    pub(super) fn read(tensor: &Tensor, ndim: Option<usize>, from_end: usize, size: usize) -> Result<Gain, Refusal> {
        let dims = tensor.dims();
        if dims.len() > 1 && ndim.is_none_or(|n| dims.len() > n) {
            return Err("the constant may have more axes than the value".into());
        }
        if !is_weight_type(tensor.dtype()) {
            return Err(Refusal::NoMatch);
        }
        let gain = if tensor.len() == 1 {
            Gain::All(tensor.scalar_f64().ok_or(Refusal::NoMatch)?)
        } else {
            let along =
                |(index, &dim): (usize, &usize)| dim == 1 || (index + 1 + from_end == dims.len() && dim == size);
            if !dims.iter().enumerate().all(along) || tensor.len() != size {
                return Err("the constant is neither one number nor one number a channel".into());
            }
            Gain::Each(tensor.to_f64s().ok_or(Refusal::NoMatch)?)
        };
        gain.require_finite()?;
        Ok(gain)
    }
}

/// What is added to every channel of a layer's output, as a sum of constants: its total, the size of its largest term, and
/// the size of what it is added to.
pub(super) struct Shift {
    total: Gain,
    largest: Gain,
    beside: Gain,
}

impl Shift {
    /// One constant that is added where the output is multiplied by `gain`.
    fn after(gain: &Gain, constant: &Gain) -> Shift {
        Shift { total: constant.clone(), largest: constant.clone(), beside: gain.clone() }
    }

    /// Nothing.
    fn none() -> Shift {
        Shift::after(&Gain::ONE, &Gain::ZERO)
    }

    /// Whether nothing is added, not even terms that cancel.
    fn is_nothing(&self) -> bool {
        self.total.is(0.0) && self.largest.is(0.0)
    }

    /// The sum that is added to a channel.
    pub(super) fn at(&self, channel: usize) -> Sum {
        Sum::from_parts(self.total.at(channel), self.largest.at(channel), self.beside.at(channel))
    }
}

/// Which operator a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerKind {
    Conv,
    ConvTranspose,
    Gemm,
    MatMul,
}

/// A Conv, ConvTranspose, Gemm or MatMul whose second input is a constant weight.
pub(super) struct Layer<'a> {
    graph: &'a Graph,
    id: NodeId,
    opset: i64,
    allowed_growth: u64,
    pub(super) kind: LayerKind,
    pub(super) node: &'a Node,
    pub(super) weight: &'a Tensor,
    /// Axes of the output; `None` where unknown.
    pub(super) ndim: Option<usize>,
    /// Input and output channels.
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    groups: usize,
}

impl<'a> Layer<'a> {
    /// The layer at a node; silently none where the node has no constant weight.
    pub(super) fn at(m: &Match<'a>, id: NodeId) -> Result<Layer<'a>, Refusal> {
        let graph = m.graph();
        let node = graph.node(id);
        let kind = match node.op_type.as_str() {
            "Conv" => LayerKind::Conv,
            "ConvTranspose" => LayerKind::ConvTranspose,
            "Gemm" => LayerKind::Gemm,
            "MatMul" => LayerKind::MatMul,
            _ => return Err(Refusal::NoMatch),
        };
        if !node.is_standard() {
            return Err(Refusal::NoMatch);
        }
        let (Some(data), Some(weight)) = (node.input(0), node.input(1)) else { return Err(Refusal::NoMatch) };
        let weight = graph.constant(weight).ok_or(Refusal::NoMatch)?;
        if !is_weight_type(weight.dtype()) || weight.is_empty() || graph.constant(data).is_some() {
            return Err(Refusal::NoMatch);
        }
        let dims = weight.dims();
        let groups = match kind {
            LayerKind::Conv | LayerKind::ConvTranspose => usize::try_from(node.int("group").unwrap_or(1)).unwrap_or(0),
            _ => 1,
        };
        let malformed = || Refusal::from("the weight does not fit its operator");
        let split = |dim: usize| (groups > 0 && dim.is_multiple_of(groups)).then_some(dim).ok_or_else(malformed);
        let over_groups = |dim: usize| dim.checked_mul(groups).ok_or_else(malformed);
        let (inputs, outputs, ndim) = match (kind, dims) {
            (LayerKind::Conv, [m, c, _, ..]) => (over_groups(*c)?, split(*m)?, Some(dims.len())),
            (LayerKind::ConvTranspose, [c, m, _, ..]) => (split(*c)?, over_groups(*m)?, Some(dims.len())),
            (LayerKind::Gemm, [a, b]) if node.int("transB").unwrap_or(0) != 0 => (*b, *a, Some(2)),
            (LayerKind::Gemm, [a, b]) => (*a, *b, Some(2)),
            (LayerKind::MatMul, [.., a, b]) => (*a, *b, node.output(0).and_then(|y| m.facts().ndim(y))),
            // A vector has no output channel.
            (LayerKind::MatMul, _) => return Err(Refusal::NoMatch),
            _ => return Err(malformed()),
        };
        if kind == LayerKind::Gemm && m.opset() < 7 {
            return Err("before opset 7 Gemm broadcasts only where an attribute says so".into());
        }
        let allowed_growth = allowed_growth(m);
        Ok(Layer { graph, id, opset: m.opset(), allowed_growth, kind, node, weight, ndim, inputs, outputs, groups })
    }

    /// Its node.
    pub(super) fn id(&self) -> NodeId {
        self.id
    }

    /// How many axes follow the channel axis in the input and in the output.
    pub(super) fn trailing_axes(&self) -> usize {
        match self.kind {
            LayerKind::Conv | LayerKind::ConvTranspose => self.weight.dims().len() - 2,
            LayerKind::Gemm | LayerKind::MatMul => 0,
        }
    }

    /// Reads a constant that the output is multiplied with or added to.
    pub(super) fn gain(&self, tensor: &Tensor) -> Result<Gain, Refusal> {
        Gain::read(tensor, self.ndim, self.trailing_axes(), self.outputs)
    }

    /// Reads a constant that `x` is multiplied with or added to where that makes `wide`, the input of the layer.
    pub(super) fn input_gain(&self, m: &Match, x: ValueId, wide: ValueId, tensor: &Tensor) -> Result<Gain, Refusal> {
        let ndim = m.facts().ndim(x);
        let gain = Gain::read(tensor, ndim, self.trailing_axes(), self.inputs)?;
        let wider = match (&gain, ndim) {
            (Gain::All(_), Some(n)) => tensor.dims().len() > n,
            (Gain::All(_), None) => !tensor.dims().is_empty(),
            // A channel axis of one element would grow.
            (Gain::Each(_), _) => !m.facts().same_shape(x, wide),
        };
        m.require(!wider, "the constant may give the value more elements")?;
        Ok(gain)
    }

    /// Refuses where other nodes use the weight and a copy would enlarge the file.
    fn require_own_weight(&self) -> Result<(), Refusal> {
        if self.shares_weight() && self.weight.byte_len() as u64 > self.allowed_growth.max(TRIVIAL_BYTES as u64) {
            return Err("the weight is shared: a copy would enlarge the file".into());
        }
        Ok(())
    }

    /// Whether anything else uses the weight.
    pub(super) fn shares_weight(&self) -> bool {
        let weight = self.node.input(1).expect("a layer has a weight");
        self.graph.value(weight).uses().iter().any(|place| *place != Use::Node(self.id, 1))
    }

    /// The weight's two leading axes, with leading axes of stacked MatMul weights taken together.
    fn rows_and_columns(&self) -> (usize, usize) {
        let dims = self.weight.dims();
        match self.kind {
            LayerKind::MatMul => (self.weight.len() / self.outputs.max(1), self.outputs),
            _ => (dims[0], dims[1]),
        }
    }

    /// The input and output channel that a row and column of the weight belong to.
    fn channels(&self, row: usize, column: usize) -> (usize, usize) {
        match self.kind {
            LayerKind::Conv => {
                let per_group = self.outputs / self.groups;
                (row / per_group * (self.inputs / self.groups) + column, row)
            }
            LayerKind::ConvTranspose => {
                let per_group = self.inputs / self.groups;
                (row, row / per_group * (self.outputs / self.groups) + column)
            }
            LayerKind::Gemm if self.node.int("transB").unwrap_or(0) != 0 => (column, row),
            LayerKind::Gemm => (row, column),
            LayerKind::MatMul => (row % self.inputs, column),
        }
    }

    /// The weight with every element multiplied by the gains of its channels: the old one if they are all 1.
    fn scaled_weight(&self, g: &mut Patch, inputs: &Gain, outputs: &Gain) -> Result<ValueId, Refusal> {
        if inputs.is(1.0) && outputs.is(1.0) {
            return Ok(self.node.input(1).expect("a layer has a weight"));
        }
        self.require_own_weight()?;
        let (rows, columns) = self.rows_and_columns();
        let place = |block: usize| self.channels(block / columns, block % columns);
        let inner = self.weight.len() / (rows * columns).max(1);
        let grid = Grid { counts: (self.inputs, self.outputs), inner, place };
        let tensor = scaled(self.weight, &grid, |block| {
            let (input, output) = place(block);
            inputs.at(input) * outputs.at(output)
        })?;
        Ok(g.constant("weight", tensor))
    }

    /// What the layer makes of an input whose channels hold these numbers everywhere, without its bias, for every output
    /// channel.
    pub(super) fn response(&self, shift: &Gain) -> Result<Shift, Refusal> {
        if self.kind == LayerKind::MatMul && self.weight.dims().len() != 2 {
            return Err("the weight is a stack of matrices".into());
        }
        // Of the products with the shift, and of the weights alone: their sum, and their size as what they multiply varies.
        let (mut total, mut terms, mut weights) =
            (vec![0.0; self.outputs], vec![0.0; self.outputs], vec![0.0; self.outputs]);
        let (rows, columns) = self.rows_and_columns();
        let inner = (self.weight.len() / (rows * columns).max(1)).max(1);
        let mut add = |block: usize, sum: f64, squares: f64| {
            let (input, output) = self.channels(block / columns, block % columns);
            let by = shift.at(input);
            total[output] += sum * by;
            terms[output] += squares * by * by;
            weights[output] += squares;
        };
        let mut add_all = |block: usize, values: &mut dyn Iterator<Item = f64>| {
            let (sum, squares) = values.fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
            add(block, sum, squares);
        };
        if self.weight.dtype() == DataType::Float {
            for (block, values) in self.weight.bytes().chunks(4 * inner).enumerate() {
                add_all(block, &mut values.as_chunks::<4>().0.iter().map(|&v| f64::from(f32::from_le_bytes(v))));
            }
        } else {
            let numbers = self.weight.to_f64s().ok_or(Refusal::NoMatch)?;
            for (block, values) in numbers.chunks(inner).enumerate() {
                add_all(block, &mut values.iter().copied());
            }
        }
        let alpha = f64::from(self.node.float("alpha").filter(|_| self.kind == LayerKind::Gemm).unwrap_or(1.0));
        let each =
            |numbers: Vec<f64>, f: fn(f64) -> f64| Gain::Each(numbers.into_iter().map(|x| f(x) * alpha).collect());
        Ok(Shift { total: each(total, |x| x), largest: each(terms, f64::sqrt), beside: each(weights, f64::sqrt) })
    }

    /// The layer with its output multiplied by `gain` and then added to `shift`, as a node of `g`.
    pub(super) fn then(&self, g: &mut Patch, gain: &Gain, shift: &Gain) -> Result<ValueId, Refusal> {
        let data = self.node.input(0).expect("a layer has an input");
        self.rebuilt(g, data, &Gain::ONE, gain, &Shift::after(gain, shift))
    }

    /// The layer on `data` where its input was `data·gain + shift`, as a node of `g`.
    pub(super) fn on(&self, g: &mut Patch, data: ValueId, gain: &Gain, shift: &Gain) -> Result<ValueId, Refusal> {
        let transposed = self.kind == LayerKind::Gemm && self.node.int("transA").unwrap_or(0) != 0;
        if transposed && matches!((gain, shift), (Gain::Each(_), _) | (_, Gain::Each(_))) {
            return Err("the Gemm transposes its input".into());
        }
        let mut added = Shift::none();
        if !shift.is(0.0) {
            if self.kind == LayerKind::ConvTranspose {
                return Err("a shift reaches the border of a ConvTranspose in other ways than its middle".into());
            }
            if self.kind == LayerKind::Conv && !is_unpadded(self.node) {
                return Err("the Conv pads its input with zeros, which the shift does not reach".into());
            }
            added = self.response(shift)?;
            added.total.require_finite()?;
        }
        self.rebuilt(g, data, gain, &Gain::ONE, &added)
    }

    fn rebuilt(
        &self,
        g: &mut Patch,
        data: ValueId,
        inputs: &Gain,
        outputs: &Gain,
        shift: &Shift,
    ) -> Result<ValueId, Refusal> {
        if self.kind == LayerKind::Gemm {
            return self.rebuilt_gemm(g, data, inputs, outputs, shift);
        }
        let mut node = self.node.clone();
        let old = self.node.input(2);
        let bias = match old {
            _ if self.kind == LayerKind::MatMul && shift.is_nothing() => None,
            _ if self.kind == LayerKind::MatMul => {
                // Gemm takes two axes only.
                if self.ndim != Some(2) || self.weight.dims().len() != 2 {
                    return Err(Refusal::NoMatch);
                }
                if self.opset < 7 {
                    return Err("before opset 7 Gemm broadcasts only where an attribute says so".into());
                }
                if self.weight.dtype() == DataType::Bfloat16 && self.opset < 13 {
                    return Err("Gemm has no bfloat16 before opset 13".into());
                }
                node = Node::new("Gemm");
                node.name.clone_from(&self.node.name);
                Some(self.rounded_bias(g, |channel| shift.at(channel))?)
            }
            Some(old) if outputs.is(1.0) && shift.is_nothing() => Some(old),
            None if shift.is_nothing() => None,
            None => Some(self.rounded_bias(g, |channel| shift.at(channel))?),
            Some(old) => {
                let old = self.graph.constant(old).ok_or("the bias is not a constant")?;
                let old = Gain::read(old, Some(1), 0, self.outputs)?;
                let bias = |channel| shift.at(channel).plus(old.at(channel) * outputs.at(channel));
                Some(self.rounded_bias(g, bias)?)
            }
        };
        let weight = self.scaled_weight(g, inputs, outputs)?;
        Ok(g.node_with(node, &[Some(data), Some(weight), bias][..if bias.is_some() { 3 } else { 2 }], 1)[0])
    }

    /// One number a channel, as a constant of the weight's type.
    fn rounded_bias(&self, g: &mut Patch, bias: impl Fn(usize) -> Sum) -> Result<ValueId, Refusal> {
        let all: Vec<Sum> = (0..self.outputs).map(bias).collect();
        Ok(g.constant("bias", sums(self.weight.dtype(), &[self.outputs], &all)?))
    }

    /// Gemm computes `alpha·A·B + beta·C`, where C may be spread over rows, columns or both.
    fn rebuilt_gemm(
        &self,
        g: &mut Patch,
        data: ValueId,
        inputs: &Gain,
        outputs: &Gain,
        shift: &Shift,
    ) -> Result<ValueId, Refusal> {
        let mut node = self.node.clone();
        let beta = f64::from(node.float("beta").unwrap_or(1.0));
        let old = self.node.input(2);
        let constant = old.and_then(|c| self.graph.constant(c)).filter(|c| is_weight_type(c.dtype()));
        let bias = match (old, constant, outputs) {
            (Some(old), ..) if outputs.is(1.0) && shift.is_nothing() => Some(old),
            (None, ..) if shift.is_nothing() => None,
            (None, ..) => {
                node.remove_attribute("beta");
                Some(self.rounded_bias(g, |channel| shift.at(channel))?)
            }
            (Some(_), Some(tensor), _) => {
                node.remove_attribute("beta");
                let spread = matches!((outputs, &shift.total), (Gain::All(_), Gain::All(_)));
                let along = |b: f64, channel: usize| shift.at(channel).plus(b * beta * outputs.at(channel));
                Some(if spread {
                    let numbers = tensor.to_f64s().ok_or(Refusal::NoMatch)?;
                    let all: Vec<Sum> = numbers.into_iter().map(|b| along(b, 0)).collect();
                    g.constant("bias", sums(tensor.dtype(), tensor.dims(), &all)?)
                } else {
                    let old = Gain::read(tensor, Some(2), 0, self.outputs)?;
                    self.rounded_bias(g, |channel| along(old.at(channel), channel))?
                })
            }
            (Some(old), None, Gain::All(gain)) if shift.is_nothing() => {
                node.set_attribute("beta", attribute(beta * gain)?);
                Some(old)
            }
            _ => return Err("the bias is not a constant".into()),
        };
        let weight = match (inputs, outputs) {
            // A shared weight stays as it is; the attribute scales it.
            (Gain::All(a), Gain::All(b)) if self.shares_weight() && a * b != 1.0 => {
                let alpha = f64::from(node.float("alpha").unwrap_or(1.0));
                node.set_attribute("alpha", attribute(alpha * a * b)?);
                self.node.input(1).expect("a layer has a weight")
            }
            _ => self.scaled_weight(g, inputs, outputs)?,
        };
        Ok(g.node_with(node, &[Some(data), Some(weight), bias][..if bias.is_some() { 3 } else { 2 }], 1)[0])
    }
}

/// Whether a Conv certainly pads nothing.
fn is_unpadded(node: &Node) -> bool {
    match node.string("auto_pad").unwrap_or("NOTSET") {
        "NOTSET" => node.ints("pads").is_none_or(|pads| pads.iter().all(|&p| p == 0)),
        "VALID" => true,
        _ => false,
    }
}

/// Refuses unless the constants that a patch adds take no more room than those it frees, or the run may still grow.
pub(super) fn require_no_growth(m: &Match, g: &Patch) -> Result<(), Refusal> {
    require_no_growth_over(m, g, m.bindings.nodes())
}

/// As [`require_no_growth`], where the patch makes exactly `nodes` superfluous.
pub(super) fn require_no_growth_over(m: &Match, g: &Patch, nodes: &[NodeId]) -> Result<(), Refusal> {
    let graph = m.graph();
    let mut inputs: Vec<ValueId> =
        nodes.iter().flat_map(|&id| graph.node(id).inputs().iter().flatten().copied()).collect();
    inputs.sort_unstable();
    inputs.dedup();
    let gone = |value: &ValueId| {
        graph.value(*value).uses().iter().all(|place| matches!(place, Use::Node(user, _) if nodes.contains(user)))
    };
    let freed: usize = inputs.iter().filter(|v| gone(v)).filter_map(|&v| graph.constant(v)).map(Tensor::byte_len).sum();
    let growth = g.constant_bytes().saturating_sub(freed);
    if growth > TRIVIAL_BYTES {
        let reason = "a constant is shared with other nodes: a copy would enlarge the file";
        m.require(growth as u64 <= allowed_growth(m), reason)?;
        let grown = &m.context().grown;
        grown.set(grown.get().saturating_add(growth as u64));
    }
    Ok(())
}

/// Bytes by which copies may still enlarge the model in this run.
fn allowed_growth(m: &Match) -> u64 {
    m.context().copies_left()
}

/// Refuses where a value inside the match is used outside it, before anything dear is computed.
pub(super) fn require_private(m: &Match) -> Result<(), Refusal> {
    let nodes = m.bindings.nodes();
    for &inner in &nodes[1..] {
        for &value in m.graph().node(inner).outputs().iter().flatten() {
            let outside = |place: &Use| !matches!(place, Use::Node(user, _) if nodes.contains(user));
            if m.graph().value(value).uses().iter().any(outside) {
                return Err("an inner value has other uses".into());
            }
        }
    }
    Ok(())
}

/// Which of two operands is computed and which is the constant; silently none where both or neither are constant.
pub(super) fn operands<'a>(m: &Match<'a>, a: &str, b: &str) -> Result<(ValueId, &'a Tensor), Refusal> {
    let (a, b) = (m.value(a), m.value(b));
    match (m.graph().constant(a), m.graph().constant(b)) {
        (None, Some(tensor)) => Ok((a, tensor)),
        (Some(tensor), None) => Ok((b, tensor)),
        _ => Err(Refusal::NoMatch),
    }
}
