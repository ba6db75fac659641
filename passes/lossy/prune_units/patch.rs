//! What stands in for units that went: nothing, a factor per feature, a change of the layer before them, or a product.
//!
//! Fitted in closed form to the stream of the whole model, span after span, each with those before it already gone and
//! patched. Every fit is of the change of the stream, so that too few rows mean too little change.

use super::{
    span::{Last, Span, spans},
    surgery::leave_out,
};
use crate::{
    Error,
    lossy::{factors, spectrum},
};
use faer::{Mat, MatRef};
use lathe_analysis::{Calibrate, Cross, Facts, Rows, View};
use lathe_ir::{DataType, Initializer, Model, Node, NodeId, Origin, ScopeId, Tensor, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How the gap that a span leaves is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Patch {
    /// Not at all.
    None,
    /// A factor and a constant per feature.
    Scale,
    /// A change of the last layer before it.
    Fold,
    /// A product and a constant.
    Affine,
    /// Two thin products and a constant.
    LowRank,
}

impl Patch {
    pub const ALL: [Patch; 5] = [Patch::None, Patch::Scale, Patch::Fold, Patch::Affine, Patch::LowRank];

    pub fn name(self) -> &'static str {
        match self {
            Patch::None => "none",
            Patch::Scale => "scale",
            Patch::Fold => "fold",
            Patch::Affine => "affine",
            Patch::LowRank => "low-rank",
        }
    }
}

/// Rows per feature that a fit of a matrix needs.
const ROWS_PER_FEATURE: u64 = 10;

/// Streams wider than this are patched by a factor per feature at most: memory grows with the square.
const WIDEST: usize = 4096;

/// Parts of the mean square of a feature that are tried as what is added to it.
const RIDGES: [f64; 6] = [1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Tokens of one sample are alike: so many of them say as much as one that is independent.
const ALIKE: f64 = 4.0;

/// The rank of [`Patch::LowRank`] as a part of the width.
const RANK: usize = 8;

/// Leaves `gone` out of `model` and fills the gaps. A gap that cannot be filled in this way stays; says how many could.
pub(super) fn leave_out_with(
    model: &mut Model,
    gone: &[ValueId],
    patch: Patch,
    calibration: Option<&dyn Calibrate>,
) -> Result<Result<usize, &'static str>, Error> {
    let Some(calibration) = calibration.filter(|_| patch != Patch::None) else {
        return Ok(leave_out(model, gone).map(|()| 0));
    };
    let base = model.clone();
    let mut filled = 0;
    let mut changed = BTreeSet::new();
    let mut rest: BTreeSet<ValueId> = gone.iter().copied().collect();
    for span in spans(&base.graph, gone) {
        let features = Features::of(&base, &span);
        let Some(features) = features else { continue };
        span.gone.iter().for_each(|v| _ = rest.remove(v));
        let gap = Gap { base: &base, span: &span, features: &features, calibration };
        let done = match patch {
            Patch::Fold => fold(model, &gap, &mut changed)?,
            _ => insert(model, &gap, &changed, patch)?,
        };
        filled += usize::from(done);
        if !(done && patch != Patch::Fold)
            && let Err(reason) = leave_out(model, &span.gone)
        {
            return Ok(Err(reason));
        }
    }
    let rest: Vec<ValueId> = gone.iter().copied().filter(|v| rest.contains(v)).collect();
    if let Err(reason) = leave_out(model, &rest) {
        return Ok(Err(reason));
    }
    Ok(Ok(filled))
}

/// The features of a stream.
struct Features {
    size: usize,
    /// Whether they are channels, on axis 1, with so many axes in all; else they are on the last axis.
    channels: Option<usize>,
    /// Whether the first row of every sample is a token that attends to nothing but itself, and is no example.
    tokens: bool,
}

impl Features {
    fn of(model: &Model, span: &Span) -> Option<Features> {
        let facts = Facts::infer(model);
        let shape = facts.shape(span.leave)?;
        let ndim = shape.len();
        let conv = span
            .gone
            .iter()
            .any(|&v| super::span::layer(&model.graph, v).is_some_and(|id| model.graph.node(id).is("Conv")));
        let channels = (conv || ndim == 4).then_some(ndim).filter(|&n| n > 2);
        let size = shape.get(if channels.is_some() { 1 } else { ndim.checked_sub(1)? })?.as_known()?;
        let size = usize::try_from(size).ok().filter(|&s| s > 0)?;
        let ids = |&v: &ValueId| facts.elem(v).is_some_and(|t| matches!(t, DataType::Int64 | DataType::Int32));
        let tokens = channels.is_none() && ndim == 3 && model.graph.main().inputs().iter().any(ids);
        (facts.elem(span.leave) == Some(DataType::Float)).then_some(Features { size, channels, tokens })
    }

    fn view(&self) -> View {
        View::Axis(if self.channels.is_some() { 1 } else { -1 })
    }

    /// The shape of a number per feature, to be multiplied with the stream.
    fn dims(&self) -> Vec<usize> {
        let after = self.channels.map_or(0, |ndim| ndim - 2);
        std::iter::once(self.size).chain(vec![1; after]).collect()
    }
}

/// Second moments about the mean of what is at hand and of the change that is wanted.
struct Moments {
    /// Of what is at hand, `[d, d]`.
    own: Mat<f64>,
    /// Between both, `[d, d]`.
    cross: Mat<f64>,
    mean: Vec<f64>,
    change_mean: Vec<f64>,
    change: f64,
    rows: u64,
}

impl Moments {
    fn of(own: &Cross, with: &Cross) -> Moments {
        let d = own.x_mean.len();
        let centred = |c: &Cross| Mat::from_fn(d, d, |i, j| c.matrix[i * d + j] - c.x_mean[i] * c.y_mean[j]);
        let squares = with.y_square.iter().zip(&with.y_mean).map(|(square, mean)| (square - mean * mean).max(0.0));
        Moments {
            own: centred(own),
            cross: centred(with),
            mean: own.x_mean.clone(),
            change_mean: with.y_mean.clone(),
            change: squares.sum(),
            rows: with.rows,
        }
    }

    fn constant(&self, change: MatRef<'_, f64>) -> Vec<f64> {
        let d = self.mean.len();
        (0..d).map(|j| self.change_mean[j] - (0..d).map(|i| self.mean[i] * change[(i, j)]).sum::<f64>()).collect()
    }

    /// What to multiply what is at hand with, `[d, d]`, for the change: ridge regression on features of equal size, with
    /// the ridge that generalized cross-validation likes best.
    fn regression(&self) -> Option<Mat<f64>> {
        let d = self.mean.len();
        if self.rows < ROWS_PER_FEATURE * d as u64 {
            return None;
        }
        let scale: Vec<f64> =
            (0..d).map(|i| self.own[(i, i)].max(0.0).sqrt()).map(|s| if s > 0.0 { 1.0 / s } else { 0.0 }).collect();
        let level = Mat::from_fn(d, d, |i, j| self.own[(i, j)] * scale[i] * scale[j]);
        let turned = Mat::from_fn(d, d, |i, j| self.cross[(i, j)] * scale[i]);
        let (mut values, vectors) = spectrum::descending(level.as_ref())?;
        values.iter_mut().for_each(|x| *x = x.max(0.0));
        let along = spectrum::product(vectors.transpose(), turned.as_ref());
        let energy: Vec<f64> = (0..d).map(|i| along.row(i).iter().map(|x| x * x).sum()).collect();
        let count = self.rows as f64 / ALIKE;
        let score = |ridge: f64| {
            let (mut left, mut freedom) = (self.change, 0.0);
            for (value, energy) in values.iter().zip(&energy) {
                let damped = value + ridge;
                left -= energy * (2.0 / damped - value / (damped * damped));
                freedom += value / damped;
            }
            left.max(0.0) / (1.0 - (freedom / count).min(0.99)).powi(2)
        };
        let ridge = RIDGES.into_iter().min_by(|&a, &b| score(a).total_cmp(&score(b)))?;
        let damped = Mat::from_fn(d, d, |i, j| along[(i, j)] / (values[i] + ridge));
        let fitted = spectrum::product(vectors.as_ref(), damped.as_ref());
        Some(Mat::from_fn(d, d, |i, j| fitted[(i, j)] * scale[i]))
    }

    /// The factors per feature, as changes.
    fn per_feature(&self) -> Vec<f64> {
        let ratio = |i: usize| if self.own[(i, i)] > 0.0 { self.cross[(i, i)] / self.own[(i, i)] } else { 0.0 };
        (0..self.mean.len()).map(ratio).collect()
    }
}

/// A gap to be filled.
struct Gap<'a> {
    /// The model with all its units.
    base: &'a Model,
    span: &'a Span,
    features: &'a Features,
    calibration: &'a dyn Calibrate,
}

/// What the model needs at a span: moments of `at`, a value of `model`, and of the step from `from`, another one of it, to
/// the sum of the span in `base`.
fn moments(
    model: &Model,
    gap: &Gap<'_>,
    changed: &BTreeSet<ValueId>,
    [at, from]: [ValueId; 2],
) -> Result<Option<Moments>, Error> {
    let Gap { base, span, features, calibration } = *gap;
    if features.size > WIDEST {
        return Ok(None);
    }
    let Some((mut both, copied)) = beside(base, model, &[at, from], changed) else { return Ok(None) };
    let graph = &mut both.graph;
    let step = graph.append(ScopeId::MAIN, Node::new("Sub"), &[span.leave, copied[1]], "step");
    let mut rows = |value: ValueId| {
        let value = if features.tokens {
            let numbers =
                [1, i64::MAX, 1].map(|n| graph.add_initializer(ScopeId::MAIN, "tokens", Tensor::int64s(&[n])));
            graph.append(ScopeId::MAIN, Node::new("Slice"), &[value, numbers[0], numbers[1], numbers[2]], "tokens")
        } else {
            value
        };
        Rows { value: graph.value(value).name.clone(), view: features.view() }
    };
    let (own, step) = (rows(copied[0]), rows(step));
    graph.sort()?;
    let found = calibration.cross(&both, &[(own.clone(), own.clone()), (own, step)])?;
    let [own, with] = found.as_slice() else { return Ok(None) };
    let finite = |c: &Cross| c.rows > 1 && c.matrix.iter().all(|x| x.is_finite());
    Ok((finite(own) && finite(with)).then(|| Moments::of(own, with)))
}

/// Changes the last layer before a span so that its sum is near that of the span. Says whether it could.
fn fold(model: &mut Model, gap: &Gap<'_>, changed: &mut BTreeSet<ValueId>) -> Result<bool, Error> {
    let Gap { span, features, .. } = *gap;
    let Some((summand, sum)) = span.before else { return Ok(false) };
    let Some(last) = Last::of(&model.graph, summand) else { return Ok(false) };
    let found = moments(model, gap, changed, [summand, sum])?;
    let Some((moments, change)) = found.and_then(|m| m.regression().map(|change| (m, change))) else {
        return Ok(false);
    };
    let d = features.size;
    let Ok(matrix) = factors::matrix(&model.graph, &last.weight) else { return Ok(false) };
    if matrix.ncols() != d {
        return Ok(false);
    }
    let graph = &mut model.graph;
    let Some(per_feature) = numbers_of(graph, &last, d) else { return Ok(false) };
    let turn = Mat::from_fn(d, d, |i, j| change[(i, j)] + f64::from(u8::from(i == j)));
    let scaled = Mat::from_fn(matrix.nrows(), d, |i, j| matrix[(i, j)] * per_feature.factor[j]);
    let weight = spectrum::product(scaled.as_ref(), turn.as_ref());
    let constant = moments.constant(change.as_ref());
    let bias: Vec<f64> =
        (0..d).map(|j| (0..d).map(|i| per_feature.bias[i] * turn[(i, j)]).sum::<f64>() + constant[j]).collect();
    let numbers = match last.weight.inputs_axis() {
        0 => factors::numbers(weight.as_ref()),
        _ => factors::numbers(weight.transpose()),
    };
    graph.set_initializer(last.weight.value, Initializer::Dense(Tensor::from_f32s(&last.weight.dims, &numbers)));
    changed.insert(last.weight.value);
    if last.factors.is_empty() {
        let change: Vec<f32> = bias.iter().zip(&per_feature.bias).map(|(new, old)| (new - old) as f32).collect();
        if factors::takes_bias(graph, &last.weight) {
            factors::add_to_bias(graph, &last.tap, &change);
        } else {
            // The layer's own output keeps its name, under which statistics of it are known.
            let name = format!("{}_shifted", graph.value(last.tap.output).name);
            let constant = Tensor::from_f32s(&features.dims(), &change);
            let constant = graph.add_initializer(ScopeId::MAIN, &name, constant);
            let sum = graph.append(ScopeId::MAIN, Node::new("Add"), &[last.tap.output, constant], &name);
            let add = graph.producer(sum).expect("it was just added");
            graph.replace_uses(last.tap.output, sum);
            graph.set_input(add, 0, Some(last.tap.output));
        }
    } else {
        // What is added and multiplied after the layer is in the new numbers.
        if graph.node(last.tap.node).input(2).is_some() {
            graph.set_input(last.tap.node, 2, None);
        }
        let name = graph.value(summand).name.clone();
        let numbers: Vec<f32> = bias.iter().map(|&x| x as f32).collect();
        let bias = Tensor::from_f32s(&features.dims(), &numbers);
        let bias = graph.add_initializer(ScopeId::MAIN, &format!("{name}_bias"), bias);
        let made = graph.append(ScopeId::MAIN, Node::new("Add"), &[last.tap.output, bias], &name);
        graph.replace(summand, made);
    }
    graph.sort()?;
    Ok(true)
}

/// What is multiplied and added after the product of a layer, per feature.
struct PerFeature {
    factor: Vec<f64>,
    bias: Vec<f64>,
}

fn numbers_of(graph: &lathe_ir::Graph, last: &Last, d: usize) -> Option<PerFeature> {
    let spread = |value: ValueId| -> Option<Vec<f64>> {
        let numbers = graph.constant(value)?.to_f64s()?;
        match numbers.len() {
            1 => Some(vec![numbers[0]; d]),
            n if n == d => Some(numbers),
            _ => None,
        }
    };
    let mut found = PerFeature { factor: vec![1.0; d], bias: vec![0.0; d] };
    if let Some(own) = graph.node(last.tap.node).input(2) {
        found.bias = spread(own)?;
    }
    // From the layer towards the stream: sums come before factors.
    for &(_, constant) in last.sums.iter().rev() {
        found.bias.iter_mut().zip(spread(constant)?).for_each(|(b, x)| *b += x);
    }
    for &(_, constant) in last.factors.iter().rev() {
        let factor = spread(constant)?;
        found.bias.iter_mut().zip(&factor).for_each(|(b, x)| *b *= x);
        found.factor.iter_mut().zip(&factor).for_each(|(f, x)| *f *= x);
    }
    Some(found)
}

/// Puts something in the place of a span. Says whether it could.
fn insert(model: &mut Model, gap: &Gap<'_>, changed: &BTreeSet<ValueId>, patch: Patch) -> Result<bool, Error> {
    let Gap { span, features, .. } = *gap;
    let found = moments(model, gap, changed, [span.enter, span.enter])?;
    let Some(moments) = found else { return Ok(false) };
    let d = features.size;
    let graph = &mut model.graph;
    let name = graph.value(span.leave).name.clone();
    let mut constant = |dims: &[usize], numbers: &[f32]| {
        graph.add_initializer(ScopeId::MAIN, &format!("{name}_patch"), Tensor::from_f32s(dims, numbers))
    };
    let ndim = features.channels.unwrap_or(2);
    let square = |m: MatRef<'_, f64>| -> (Vec<usize>, Vec<f32>) {
        match features.channels {
            // A convolution holds outputs first.
            Some(_) => ([vec![m.ncols(), m.nrows()], vec![1; ndim - 2]].concat(), factors::numbers(m.transpose())),
            None => (vec![m.nrows(), m.ncols()], factors::numbers(m)),
        }
    };
    let product = if features.channels.is_some() { "Conv" } else { "MatMul" };
    let (steps, bias) = match patch {
        Patch::Scale => {
            let change = moments.per_feature();
            let factor: Vec<f32> = change.iter().map(|c| (1.0 + c) as f32).collect();
            let bias: Vec<f64> = (0..d).map(|i| moments.change_mean[i] - moments.mean[i] * change[i]).collect();
            (vec![("Mul", constant(&features.dims(), &factor))], bias)
        }
        Patch::Affine => {
            let Some(change) = moments.regression() else { return Ok(false) };
            let bias = moments.constant(change.as_ref());
            let whole = Mat::from_fn(d, d, |i, j| change[(i, j)] + f64::from(u8::from(i == j)));
            let (dims, numbers) = square(whole.as_ref());
            (vec![(product, constant(&dims, &numbers))], bias)
        }
        Patch::LowRank => {
            let Some(change) = moments.regression() else { return Ok(false) };
            let Some((left, right)) = thin(&moments, &change, d.div_ceil(RANK)) else { return Ok(false) };
            let bias = moments.constant(spectrum::product(left.as_ref(), right.as_ref()).as_ref());
            let steps = [left, right].map(|m| {
                let (dims, numbers) = square(m.as_ref());
                (product, constant(&dims, &numbers))
            });
            (steps.to_vec(), bias)
        }
        Patch::None | Patch::Fold => return Ok(false),
    };
    let bias: Vec<f32> = bias.iter().map(|&x| x as f32).collect();
    let bias = constant(&features.dims(), &bias);
    let mut value = span.enter;
    for (op, operand) in steps {
        value = graph.append(ScopeId::MAIN, Node::new(op), &[value, operand], &format!("{name}_patch"));
    }
    if patch == Patch::LowRank {
        value = graph.append(ScopeId::MAIN, Node::new("Add"), &[span.enter, value], &format!("{name}_patch"));
    }
    value = graph.append(ScopeId::MAIN, Node::new("Add"), &[value, bias], &format!("{name}_patch"));
    graph.replace(span.leave, value);
    // Where a normalization of the span's last sum goes too, it goes behind the patch.
    let norms: Vec<ValueId> = span.gone.iter().copied().filter(|&v| v == span.leave).map(|_| value).collect();
    if leave_out(model, &norms).is_err() {
        return Ok(false);
    }
    model.graph.sort()?;
    Ok(true)
}

/// The change as two thin matrices, `[d, r]` and `[r, d]`, so that it is off least for what is at hand.
fn thin(moments: &Moments, change: &Mat<f64>, rank: usize) -> Option<(Mat<f64>, Mat<f64>)> {
    let made = spectrum::product(moments.own.as_ref(), change.as_ref());
    let outputs = spectrum::product(change.transpose(), made.as_ref());
    let (_, vectors) = spectrum::descending(outputs.as_ref())?;
    let strong = vectors.as_ref().subcols(0, rank).to_owned();
    let left = spectrum::product(change.as_ref(), strong.as_ref());
    Some((left, strong.transpose().to_owned()))
}

/// `base` with a copy of everything of `model`, an edited clone of it, that `wanted` needs and that differs; and the
/// values in it. `None` where that cannot be copied.
fn beside(
    base: &Model,
    model: &Model,
    wanted: &[ValueId],
    changed: &BTreeSet<ValueId>,
) -> Option<(Model, Vec<ValueId>)> {
    let mut both = base.clone();
    let mut copies: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let order: Vec<NodeId> = model.graph.sorted(ScopeId::MAIN).ok()?;
    let mut needed: BTreeSet<ValueId> = wanted.iter().copied().collect();
    for &id in order.iter().rev() {
        let node = model.graph.node(id);
        if node.outputs().iter().flatten().any(|v| needed.contains(v)) {
            needed.extend(node.inputs().iter().flatten());
        }
    }
    for id in order {
        let node = model.graph.node(id);
        if !node.outputs().iter().flatten().any(|v| needed.contains(v)) {
            continue;
        }
        let known = base.graph.get(id).filter(|old| old.inputs() == node.inputs() && old.outputs() == node.outputs());
        let moved = |v: &ValueId| copies.contains_key(v) || changed.contains(v);
        if known.is_some() && !node.inputs().iter().flatten().any(moved) {
            continue;
        }
        if !node.subgraphs().is_empty() {
            return None;
        }
        let mut inputs = Vec::new();
        for input in node.inputs() {
            let Some(input) = *input else {
                inputs.push(None);
                continue;
            };
            let here = input.index() < base.graph.value_bound() && !changed.contains(&input);
            let constant = model.graph.constant(input).filter(|_| !here);
            let value = match (copies.get(&input), constant) {
                (Some(&copy), _) => copy,
                (None, Some(tensor)) => {
                    let name = model.graph.value(input).name.clone();
                    let copy = both.graph.add_initializer(ScopeId::MAIN, &name, tensor.clone());
                    copies.insert(input, copy);
                    copy
                }
                (None, None) if here || matches!(model.graph.value(input).origin(), Origin::Input(_)) => input,
                (None, None) => return None,
            };
            inputs.push(Some(value));
        }
        let mut copy = node.clone();
        copy.name.clear();
        let mut outputs = Vec::new();
        for output in node.outputs() {
            outputs.push(output.map(|output| {
                let name = both.graph.fresh_name(&model.graph.value(output).name);
                let value = both.graph.add_value(name, None);
                copies.insert(output, value);
                value
            }));
        }
        both.graph.add_node(ScopeId::MAIN, copy, inputs, outputs);
    }
    let find = |v: &ValueId| copies.get(v).copied().unwrap_or(*v);
    let values = wanted.iter().map(find).collect();
    Some((both, values))
}
