//! Cross-layer equalisation: channels between layers made alike in size, so that one range suits all of them.
//!
//! Where every operator between layers commutes with a positive factor on each channel, what one layer gives may be divided by
//! factors that the next ones multiply their weights with. The model stays the same function.
//!
//! Source: Nagel et al. 2019, data-free quantization, arXiv:1906.04721; Xiao et al. 2022, SmoothQuant, arXiv:2211.10438.

use super::units::{floats, is_spatial_mean};
use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{Graph, Initializer, Model, Node, NodeId, Origin, ScopeId, Tensor, Use, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Factors lie within this, and one over it.
const MOST: f64 = 1e3;

/// Rounds in which layers are made alike, and the change of factors below which they are.
const ROUNDS: usize = 20;
const ALIKE: f64 = 1e-3;

/// A constant whose numbers are multiplied, those at every place of an axis with a factor of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Scaled {
    pub name: String,
    pub axis: usize,
    pub factors: Vec<f32>,
    /// Whether what the constant is multiplied with was divided by these factors.
    pub reads: bool,
}

/// How factors are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Equal {
    /// What layers give and what the next ones read have weights of one size.
    Weights,
    /// This power of how large a channel gets, and the rest of the power of the weights that read it.
    Activations(f64),
}

/// A constant, and its axis along which the channels lie.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Side {
    constant: ValueId,
    axis: usize,
}

/// Values whose channels can be divided by the same factors, with the constants that make up for that.
#[derive(Debug, Clone, Default)]
pub(super) struct Group {
    channels: usize,
    pub values: BTreeSet<ValueId>,
    /// Constants that give the values: divided by the factors.
    gives: Vec<Side>,
    /// Constants that they are multiplied with.
    reads: Vec<Side>,
    /// Whether each of these has one scale for every channel that it reads, so that factors cost it nothing.
    free: bool,
}

/// Values on the way to groups.
struct Search<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    parent: BTreeMap<ValueId, ValueId>,
    /// The axis of a value's channels.
    axes: BTreeMap<ValueId, usize>,
    blocked: BTreeSet<ValueId>,
    gives: Vec<(ValueId, Side)>,
    reads: Vec<(ValueId, Side, bool)>,
}

/// All groups of a model.
pub(super) fn groups(model: &Model, facts: &Facts) -> Vec<Group> {
    let graph = &model.graph;
    let mut search = Search {
        graph,
        facts,
        parent: BTreeMap::new(),
        axes: BTreeMap::new(),
        blocked: BTreeSet::new(),
        gives: Vec::new(),
        reads: Vec::new(),
    };
    for id in graph.sorted(ScopeId::MAIN).unwrap_or_default() {
        if search.node(id).is_none() {
            let node = graph.node(id);
            let all = node.inputs().iter().chain(node.outputs()).flatten();
            search.blocked.extend(all.copied());
        }
    }
    search.found()
}

impl Search<'_> {
    fn root(&self, mut value: ValueId) -> ValueId {
        while let Some(&next) = self.parent.get(&value).filter(|next| **next != value) {
            value = next;
        }
        value
    }

    fn join(&mut self, a: ValueId, b: ValueId) {
        let (a, b) = (self.root(a), self.root(b));
        self.parent.insert(a.max(b), a.min(b));
    }

    /// A constant that this node alone reads.
    fn own(&self, value: Option<ValueId>) -> Option<&Tensor> {
        let own = |value: &ValueId| self.graph.value(*value).uses().len() == 1;
        floats(self.graph, value.filter(own))
    }

    fn ndim(&self, value: ValueId) -> Option<usize> {
        self.facts.ndim(value)
    }

    /// Notes where a value has its channels; `None` where it has them elsewhere for another node.
    fn on(&mut self, value: ValueId, axis: usize) -> Option<()> {
        let known = *self.axes.entry(value).or_insert(axis);
        (known == axis).then_some(())
    }

    /// Takes note of a node; `None` where it does not commute with factors.
    fn node(&mut self, id: NodeId) -> Option<()> {
        let node = self.graph.node(id);
        if !node.is_standard() || node.outputs().iter().flatten().count() != 1 {
            return None;
        }
        let (x, y) = (node.input(0)?, node.output(0)?);
        match node.op_type.as_str() {
            "Conv" => self.conv(node, x, y),
            "Gemm" => self.gemm(node, x, y),
            "MatMul" => {
                self.own(node.input(1)).filter(|weight| weight.dims().len() == 2)?;
                self.layer((x, self.ndim(x)?.checked_sub(1)?, 0), (y, self.ndim(y)?.checked_sub(1)?, 1), node.input(1)?)
            }
            "LayerNormalization" => self.norm(node, x, y),
            "Relu" | "LeakyRelu" | "Identity" => self.alike(x, y),
            "Clip" => {
                let zero = floats(self.graph, node.input(1)).and_then(Tensor::scalar_f64) == Some(0.0);
                (zero && node.input(2).is_none()).then_some(())?;
                self.alike(x, y)
            }
            "MaxPool" | "AveragePool" | "GlobalAveragePool" => self.image(x, y),
            "ReduceMean" if is_spatial_mean(self.graph, self.facts, id) => {
                self.on(x, 1)?;
                self.on(y, 1)?;
                self.join(x, y);
                Some(())
            }
            "Flatten" | "Reshape" | "Squeeze" => self.flat(x, y),
            "Add" => self.sum(node, y),
            _ => None,
        }
    }

    fn alike(&mut self, x: ValueId, y: ValueId) -> Option<()> {
        let axis = *self.axes.get(&x)?;
        self.on(y, axis)?;
        self.join(x, y);
        Some(())
    }

    fn image(&mut self, x: ValueId, y: ValueId) -> Option<()> {
        self.on(x, 1)?;
        self.alike(x, y)
    }

    /// `[n, channels, 1, 1]` as `[n, channels]`.
    fn flat(&mut self, x: ValueId, y: ValueId) -> Option<()> {
        let shape = |value: ValueId| self.facts.shape(value);
        let (from, to) = (shape(x)?, shape(y)?);
        let one = |dim: &DimExpr| dim.as_known() == Some(1);
        let same = from.len() > 2 && to.len() == 2 && from[1] == to[1] && from[1].as_known().is_some();
        (same && from[2..].iter().all(one)).then_some(())?;
        self.on(x, 1)?;
        self.on(y, 1)?;
        self.join(x, y);
        Some(())
    }

    /// A layer whose weight has the channels that it reads and gives along these axes.
    fn layer(
        &mut self,
        (x, read, inputs): (ValueId, usize, usize),
        (y, given, outputs): (ValueId, usize, usize),
        weight: ValueId,
    ) -> Option<()> {
        self.on(x, read)?;
        self.on(y, given)?;
        self.reads.push((x, Side { constant: weight, axis: inputs }, false));
        self.gives.push((y, Side { constant: weight, axis: outputs }));
        Some(())
    }

    fn conv(&mut self, node: &Node, x: ValueId, y: ValueId) -> Option<()> {
        let weight = node.input(1)?;
        let dims = self.own(Some(weight))?.dims().to_vec();
        if node.input(2).is_some() {
            self.own(node.input(2)).filter(|bias| bias.dims() == [dims[0]])?;
        }
        let group = node.int("group").unwrap_or(1);
        if group == 1 {
            self.layer((x, 1, 1), (y, 1, 0), weight)?;
        } else if dims[1] == 1 && group == dims[0] as i64 {
            self.layer((x, 1, 0), (y, 1, 0), weight)?;
            self.reads.last_mut().expect("the layer was noted").2 = true;
        } else {
            return None;
        }
        self.gives.extend(node.input(2).map(|bias| (y, Side { constant: bias, axis: 0 })));
        Some(())
    }

    fn gemm(&mut self, node: &Node, x: ValueId, y: ValueId) -> Option<()> {
        let plain = ["alpha", "beta"].iter().all(|f| node.float(f).unwrap_or(1.0) == 1.0);
        (plain && node.int("transA").unwrap_or(0) == 0).then_some(())?;
        let weight = node.input(1)?;
        let outputs = usize::from(node.int("transB").unwrap_or(0) == 0);
        let count = self.own(Some(weight))?.dims()[outputs];
        let bias = match node.input(2) {
            Some(bias) => {
                Some(self.own(Some(bias)).filter(|tensor| super::units::is_row(tensor, count))?.dims().len() - 1)
            }
            None => None,
        };
        self.layer((x, 1, 1 - outputs), (y, 1, outputs), weight)?;
        self.gives.extend(node.input(2).zip(bias).map(|(constant, axis)| (y, Side { constant, axis })));
        Some(())
    }

    fn norm(&mut self, node: &Node, x: ValueId, y: ValueId) -> Option<()> {
        let last = self.ndim(y)?.checked_sub(1)?;
        let axis = node.int("axis").unwrap_or(-1);
        (axis == -1 || axis == last as i64).then_some(())?;
        for constant in [node.input(1), node.input(2)].into_iter().flatten() {
            self.own(Some(constant)).filter(|tensor| tensor.dims().len() == 1)?;
        }
        self.blocked.insert(x);
        self.on(y, last)?;
        let sides = [node.input(1), node.input(2)].into_iter().flatten();
        self.gives.extend(sides.map(|constant| (y, Side { constant, axis: 0 })));
        Some(())
    }

    /// A sum of two values of one shape, or of one with a constant that has a number for every channel.
    fn sum(&mut self, node: &Node, y: ValueId) -> Option<()> {
        let [a, b] = [node.input(0)?, node.input(1)?];
        let constant = |value: ValueId| self.graph.constant(value).is_some();
        let (data, bias) = match (constant(a), constant(b)) {
            (false, true) => (a, Some(b)),
            (true, false) => (b, Some(a)),
            (false, false) => (a, None),
            (true, true) => return None,
        };
        let axis = *self.axes.get(&data)?;
        let ndim = self.ndim(y)?;
        match bias {
            None => {
                (self.facts.shape(a)? == self.facts.shape(b)?).then_some(())?;
                self.on(b, axis)?;
                self.join(a, b);
            }
            Some(bias) => {
                let dims = self.own(Some(bias))?.dims().to_vec();
                let at = (axis + dims.len()).checked_sub(ndim)?;
                let alone = dims.iter().enumerate().all(|(place, &size)| place == at || size == 1);
                (alone && dims.get(at) == Some(&self.channels(y, axis)?)).then_some(())?;
                self.gives.push((y, Side { constant: bias, axis: at }));
            }
        }
        self.on(y, axis)?;
        self.join(data, y);
        Some(())
    }

    fn channels(&self, value: ValueId, axis: usize) -> Option<usize> {
        usize::try_from(self.facts.shape(value)?.get(axis)?.as_known()?).ok()
    }

    fn found(self) -> Vec<Group> {
        let graph = self.graph;
        let outside = |value: ValueId| {
            let elsewhere = |place: &Use| match *place {
                Use::Node(id, _) => graph.node(id).scope() != ScopeId::MAIN,
                _ => true,
            };
            matches!(graph.value(value).origin(), Origin::Input(_)) || graph.value(value).uses().iter().any(elsewhere)
        };
        let mut all: BTreeMap<ValueId, Group> = BTreeMap::new();
        let mut broken: BTreeSet<ValueId> = self.blocked.iter().map(|&value| self.root(value)).collect();
        for (&value, &axis) in &self.axes {
            let (root, channels) = (self.root(value), self.channels(value, axis));
            let group = all.entry(root).or_default();
            let known = if group.values.is_empty() { channels } else { Some(group.channels) };
            if channels.is_none() || known != channels || outside(value) {
                broken.insert(root);
            }
            group.channels = channels.unwrap_or(0);
            group.values.insert(value);
            group.free = true;
        }
        for &(value, side) in &self.gives {
            all.entry(self.root(value)).or_default().gives.push(side);
        }
        for &(value, side, free) in &self.reads {
            let group = all.entry(self.root(value)).or_default();
            group.reads.push(side);
            group.free &= free;
        }
        let usable = |(root, group): &(ValueId, Group)| {
            !broken.contains(root) && !group.gives.is_empty() && !group.reads.is_empty()
        };
        all.into_iter().filter(usable).map(|(_, group)| group).collect()
    }
}

/// The largest magnitude at every place of an axis.
fn largest(dims: &[usize], numbers: &[f32], axis: usize) -> Vec<f64> {
    let inner: usize = dims[axis + 1..].iter().product();
    let mut found = vec![0.0f64; dims[axis]];
    for (at, &x) in numbers.iter().enumerate() {
        let own = &mut found[at / inner.max(1) % dims[axis]];
        *own = own.max(f64::from(x.abs()));
    }
    found
}

fn multiply(dims: &[usize], numbers: &mut [f32], axis: usize, factor: impl Fn(usize) -> f32) {
    let inner: usize = dims[axis + 1..].iter().product();
    for (at, x) in numbers.iter_mut().enumerate() {
        *x *= factor(at / inner.max(1) % dims[axis]);
    }
}

/// What is done to constants so that the channels of these groups are alike; `sizes` tells how large each channel of a value
/// that is rounded gets. Nothing where they are alike already, or a constant is not finite.
pub(super) fn equalise(
    graph: &Graph,
    groups: &[Group],
    sizes: &BTreeMap<ValueId, Vec<f64>>,
    equal: Equal,
) -> Vec<Scaled> {
    let mut constants: BTreeMap<ValueId, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for side in groups.iter().flat_map(|group| group.gives.iter().chain(&group.reads)) {
        let Some(tensor) = floats(graph, Some(side.constant)) else { return Vec::new() };
        let Some(numbers) = tensor.to_f32s().filter(|all| all.iter().all(|x| x.is_finite())) else { return Vec::new() };
        tensor.release();
        constants.insert(side.constant, (tensor.dims().to_vec(), numbers));
    }
    let chosen: Vec<Vec<f64>> = match equal {
        Equal::Weights => alike_weights(groups, constants),
        Equal::Activations(power) => {
            groups.iter().map(|group| group.by_activations(&constants, sizes, power)).collect()
        }
    };
    let mut scaled = Vec::new();
    for (group, factors) in groups.iter().zip(chosen) {
        if factors.iter().all(|s| (s - 1.0).abs() < ALIKE) {
            continue;
        }
        let name = |side: &Side| graph.value(side.constant).name.clone();
        let by = |side: &Side, power: i32| Scaled {
            name: name(side),
            axis: side.axis,
            factors: factors.iter().map(|s| s.powi(power) as f32).collect(),
            reads: power > 0,
        };
        scaled.extend(group.gives.iter().map(|side| by(side, -1)));
        scaled.extend(group.reads.iter().map(|side| by(side, 1)));
    }
    scaled
}

/// Factors around one, within what is allowed.
fn centred(mut factors: Vec<f64>) -> Vec<f64> {
    let mean = factors.iter().map(|s| s.ln()).sum::<f64>() / factors.len().max(1) as f64;
    let middle = mean.exp();
    factors.iter_mut().for_each(|s| *s = (*s / middle).clamp(1.0 / MOST, MOST));
    factors
}

/// Factors with which what gives every channel and what reads it are of one size, for all groups together.
fn alike_weights(groups: &[Group], mut constants: BTreeMap<ValueId, (Vec<usize>, Vec<f32>)>) -> Vec<Vec<f64>> {
    let mut all: Vec<Vec<f64>> = groups.iter().map(|group| vec![1.0; group.channels]).collect();
    for _ in 0..ROUNDS {
        let mut moved = 0.0f64;
        for (group, factors) in groups.iter().zip(&mut all) {
            let most = |sides: &[Side], layers: bool| {
                let mut most = vec![0.0f64; group.channels];
                for side in sides {
                    let (dims, numbers) = &constants[&side.constant];
                    // Biases follow, and tell nothing of weights.
                    if !layers || dims.len() > 1 {
                        let own = largest(dims, numbers, side.axis);
                        most.iter_mut().zip(own).for_each(|(most, own)| *most = most.max(own));
                    }
                }
                most
            };
            let (given, read) = (most(&group.gives, true), most(&group.reads, false));
            let both = given.iter().zip(&read).zip(factors.iter()).map(|((a, b), old)| match a * b > 0.0 {
                true => old * (a / b).sqrt(),
                false => *old,
            });
            let new = centred(both.collect());
            let change: Vec<f64> = new.iter().zip(factors.iter()).map(|(new, old)| new / old).collect();
            for side in &group.gives {
                let (dims, numbers) = constants.get_mut(&side.constant).expect("it was read");
                multiply(dims, numbers, side.axis, |at| (1.0 / change[at]) as f32);
            }
            for side in &group.reads {
                let (dims, numbers) = constants.get_mut(&side.constant).expect("it was read");
                multiply(dims, numbers, side.axis, |at| change[at] as f32);
            }
            moved = change.iter().fold(moved, |moved, t| moved.max((t - 1.0).abs()));
            *factors = new;
        }
        if moved < ALIKE {
            break;
        }
    }
    all
}

impl Group {
    /// The constants that change.
    pub fn constants(&self) -> impl Iterator<Item = ValueId> {
        self.gives.iter().chain(&self.reads).map(|side| side.constant)
    }

    /// Factors that share how large channels get between their ranges and the weights that read them.
    fn by_activations(
        &self,
        constants: &BTreeMap<ValueId, (Vec<usize>, Vec<f32>)>,
        sizes: &BTreeMap<ValueId, Vec<f64>>,
        power: f64,
    ) -> Vec<f64> {
        // Every value, and every weight, counts by its own largest number.
        let most = |all: &mut dyn Iterator<Item = Vec<f64>>| {
            let mut most = vec![0.0f64; self.channels];
            for own in all.filter(|own| own.len() == self.channels) {
                let top = own.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
                most.iter_mut().zip(own).for_each(|(most, own)| *most = most.max(own / top));
            }
            most
        };
        let ranges = most(&mut self.values.iter().filter_map(|value| sizes.get(value).cloned()));
        let weights = most(&mut self.reads.iter().map(|side| {
            let (dims, numbers) = &constants[&side.constant];
            largest(dims, numbers, side.axis)
        }));
        smoothing(&ranges, &weights, if self.free { 1.0 } else { power })
    }
}

/// `range^power / weight^(1 − power)` of every channel; one where either is zero.
pub(super) fn smoothing(ranges: &[f64], weights: &[f64], power: f64) -> Vec<f64> {
    let both = ranges.iter().zip(weights).map(|(&range, &weight)| match range > 0.0 && weight > 0.0 {
        true => Some(range.powf(power) / weight.powf(1.0 - power)),
        false => None,
    });
    let known: Vec<Option<f64>> = both.collect();
    let some: Vec<f64> = known.iter().flatten().copied().collect();
    let mean = some.iter().map(|s| s.ln()).sum::<f64>() / some.len().max(1) as f64;
    let middle = mean.exp();
    known.into_iter().map(|s| s.map_or(1.0, |s| (s / middle).clamp(1.0 / MOST, MOST))).collect()
}

/// Multiplies constants in place.
pub(super) fn scale(graph: &mut Graph, scaled: &[Scaled]) -> Result<(), &'static str> {
    for Scaled { name, axis, factors, .. } in scaled {
        let value = graph.find_value(name).ok_or(super::emit::CHANGED)?;
        let tensor = floats(graph, Some(value)).ok_or(super::emit::CHANGED)?;
        let dims = tensor.dims().to_vec();
        let mut numbers = tensor.to_f32s().ok_or(super::emit::CHANGED)?;
        tensor.release();
        if dims.get(*axis) != Some(&factors.len()) {
            return Err(super::emit::CHANGED);
        }
        multiply(&dims, &mut numbers, *axis, |at| factors[at]);
        graph.set_initializer(value, Initializer::Dense(Tensor::from_f32s(&dims, &numbers)));
    }
    Ok(())
}
