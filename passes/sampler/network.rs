//! The denoiser taken apart: what depends on the time only, on the conditions only, and the rest.

use super::{Error, Roles};
use crate::{Pass as _, PassContext, exact::DropDead};
use lathe_analysis::{Evaluate, Facts};
use lathe_ir::{DataType, Dim, Graph, Model, Node, NodeId, Origin, ScopeId, Tensor, Type, Use, ValueId};

/// What a value depends on, as bits.
type Mask = u8;
const LATENT: Mask = 1;
const TIME: Mask = 2;
const CONDITION: Mask = 4;

/// How the network is told the time.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TimeFeed {
    /// As one tensor of this shape for the whole batch, so that work on the time alone is done ahead.
    Ahead(Vec<usize>),
    /// As a vector as long as the batch, made when the sampler runs.
    Batch,
}

/// The denoiser as a step needs it.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    /// The denoiser, whose inputs are its own or stand for values in [`Network::ahead`] and [`Network::hoisted`].
    pub model: Model,
    /// The input for the noisy sample.
    pub latent: ValueId,
    /// What it predicts.
    pub output: ValueId,
    /// Inputs that depend on the time only.
    pub ahead: Vec<ValueId>,
    /// Inputs that depend on conditions only.
    pub hoisted: Vec<ValueId>,
    /// What the denoiser calls them.
    pub hoisted_names: Vec<String>,
    /// Computes `ahead` from the time.
    pub time_part: Model,
    /// Computes `hoisted` from the conditions.
    pub condition_part: Model,
    /// How the time is fed.
    pub feed: TimeFeed,
    /// The input of the time in all three.
    pub time: ValueId,
    /// The element type of the time.
    pub time_type: DataType,
    /// The element type of latent and prediction.
    pub dtype: DataType,
    /// The latent's dimensions.
    pub dims: Vec<Dim>,
    /// Channels of the prediction that are used; the others are a variance.
    pub channels: Option<i64>,
}

impl Network {
    /// Takes a denoiser apart.
    pub fn new(denoiser: &Model, roles: &Roles) -> Result<Network, Error> {
        let mut model = denoiser.clone();
        let find = |name: &str| {
            let found = model.graph.find_value(name);
            found.ok_or_else(|| Error::Roles(format!("the denoiser has no value `{name}`")))
        };
        let (latent, time, output) = (find(&roles.latent)?, find(&roles.time)?, find(&roles.output)?);
        keep_outputs(&mut model, &[output])?;
        model.graph.sort().map_err(|e| Error::Network(e.to_string()))?;
        let facts = Facts::infer(&model);
        let dims = model.graph.value(latent).ty.as_ref().and_then(|t| t.shape()).map(|s| s.dims.clone());
        let dims = dims.ok_or_else(|| Error::Network(format!("the shape of `{}` is not stated", roles.latent)))?;
        let dtype =
            facts.elem(latent).filter(|t| matches!(t, DataType::Float | DataType::Float16 | DataType::Bfloat16));
        let dtype = dtype
            .ok_or_else(|| Error::Network(format!("`{}` is no tensor of float, float16 or bfloat16", roles.latent)))?;
        let time_type = facts.elem(time).filter(|t| t.is_float() || t.is_integer());
        let time_type = time_type.ok_or_else(|| Error::Network(format!("`{}` is no tensor of numbers", roles.time)))?;
        let channels = variance(&facts, latent, output)?;
        let feed = feed(&model, &facts, time, output)?;
        let masks = masks(&model.graph, latent, time);
        let ahead = if feed == TimeFeed::Batch { Vec::new() } else { boundary(&model.graph, &masks, TIME) };
        let hoisted = boundary(&model.graph, &masks, CONDITION);
        let hoisted_names = hoisted.iter().map(|&v| model.graph.value(v).name.clone()).collect();
        let time_part = part(&model, &ahead)?;
        let condition_part = part(&model, &hoisted)?;
        let cut = |values: Vec<ValueId>, model: &mut Model| values.into_iter().map(|v| cut(model, &facts, v)).collect();
        let (mut ahead, hoisted): (Vec<_>, Vec<_>) = (cut(ahead, &mut model), cut(hoisted, &mut model));
        if feed == TimeFeed::Batch {
            ahead.push(time);
        }
        drop_dead(&mut model)?;
        Ok(Network {
            latent,
            output,
            ahead,
            hoisted,
            hoisted_names,
            time_part,
            condition_part,
            feed,
            time,
            time_type,
            dtype,
            dims,
            channels,
            model,
        })
    }

    /// The time as the network takes it, of a shape.
    pub fn time_tensor(&self, time: f64, dims: &[usize]) -> Tensor {
        let count = dims.iter().product();
        let time = if self.time_type.is_integer() { time.round_ties_even() } else { time };
        Tensor::from_f64s(self.time_type, dims, &vec![time; count]).expect("the time is of a type of numbers")
    }

    /// The values of [`Network::ahead`] at a time.
    pub fn at(&self, time: f64, evaluator: &dyn Evaluate) -> Result<Vec<Tensor>, Error> {
        let TimeFeed::Ahead(dims) = &self.feed else {
            return Ok(vec![self.time_tensor(time, &[])]);
        };
        let tensor = self.time_tensor(time, dims);
        let name = self.time_part.graph.value(self.time).name.clone();
        let computed = if self.time_part.graph.main().outputs().is_empty() {
            Vec::new()
        } else {
            evaluator.run(&self.time_part, &[(name, tensor.clone())])?
        };
        let mut computed = computed.into_iter();
        let mut next =
            |value: &ValueId| if *value == self.time { Some(tensor.clone()) } else { Some(computed.next()?.1) };
        let values: Option<Vec<Tensor>> = self.ahead.iter().map(&mut next).collect();
        values.ok_or_else(|| Error::Network("the part of the denoiser that sees the time lost an output".to_owned()))
    }
}

/// Which channels of the output are the prediction, where there are twice as many as the latent has.
fn variance(facts: &Facts, latent: ValueId, output: ValueId) -> Result<Option<i64>, Error> {
    let channels = |v: ValueId| facts.shape(v).and_then(|s| s.get(1)).and_then(|d| d.as_known());
    match (channels(latent), channels(output)) {
        (Some(a), Some(b)) if b == 2 * a && facts.ndim(latent) == Some(4) => Ok(Some(a)),
        (Some(a), Some(b)) if a != b => Err(Error::Network(format!(
            "the latent has {a} channels and the prediction {b}, expected {a} or {}",
            2 * a
        ))),
        _ => Ok(None),
    }
}

/// Feeds one timestep to the whole batch where the shape of the prediction provably stays the same.
fn feed(model: &Model, facts: &Facts, time: ValueId, output: ValueId) -> Result<TimeFeed, Error> {
    let shape = model.graph.value(time).ty.as_ref().and_then(|t| t.shape());
    let Some(shape) = shape else { return Ok(TimeFeed::Ahead(Vec::new())) };
    let dims: Vec<usize> =
        shape.dims.iter().map(|d| d.known().and_then(|d| usize::try_from(d).ok()).unwrap_or(1)).collect();
    if shape.sizes().is_some() {
        return Ok(TimeFeed::Ahead(dims));
    }
    if dims.len() > 1 {
        return Err(Error::Network("a time with several axes of open size is not supported".to_owned()));
    }
    let mut single = model.clone();
    let elem = facts.elem(time).unwrap_or(DataType::Float);
    single.graph.value_mut(time).ty = Some(Type::tensor(elem, vec![Dim::Known(1)]));
    let narrowed = Facts::infer(&single);
    let same = facts.shape(output).is_some_and(|shape| narrowed.shape(output) == Some(shape));
    Ok(if same && joins_alike(model, facts, &narrowed) { TimeFeed::Ahead(dims) } else { TimeFeed::Batch })
}

/// Whether what is joined has the same sizes along all other axes wherever it had before: a join does not broadcast.
fn joins_alike(model: &Model, before: &Facts, after: &Facts) -> bool {
    let graph = &model.graph;
    let joined = |id: &NodeId| {
        let node = graph.node(*id);
        if !node.is("Concat") {
            return true;
        }
        let values: Vec<ValueId> = node.inputs().iter().flatten().copied().collect();
        let Some((&first, others)) = values.split_first() else { return true };
        let differ = |facts: &Facts, other: ValueId, axis: usize| {
            let sizes = facts.shape(first).and_then(|a| a.get(axis)).zip(facts.shape(other).and_then(|b| b.get(axis)));
            sizes.map(|(a, b)| a != b)
        };
        let ndim = before.ndim(first).unwrap_or(0);
        let own = node.int("axis").map_or(0, |axis| axis.rem_euclid(ndim.max(1) as i64)) as usize;
        let axes = || (0..ndim).filter(|&axis| axis != own);
        let broken = |other: ValueId, axis| {
            differ(before, other, axis) == Some(false) && differ(after, other, axis) == Some(true)
        };
        !others.iter().any(|&other| axes().any(|axis| broken(other, axis)))
    };
    graph.all_nodes().iter().all(joined)
}

/// What every value of the main graph depends on; reading the shape of the latent counts, for there is no latent where
/// the time is worked on ahead.
fn masks(graph: &Graph, latent: ValueId, time: ValueId) -> Vec<Mask> {
    let mut masks = vec![0; graph.value_bound()];
    for &input in graph.main().inputs() {
        masks[input.index()] = match input {
            v if v == latent => LATENT,
            v if v == time => TIME,
            _ => CONDITION,
        };
    }
    for id in graph.nodes(ScopeId::MAIN) {
        let mask = node_mask(graph, &masks, id);
        for output in graph.node(id).outputs().iter().flatten() {
            masks[output.index()] = mask;
        }
    }
    masks
}

fn node_mask(graph: &Graph, masks: &[Mask], id: NodeId) -> Mask {
    let node = graph.node(id);
    let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
    let mask = node.inputs().iter().flatten().copied().chain(captured).fold(0, |m, v| m | masks[v.index()]);
    // What is random is not the same at every step, whatever it depends on.
    if node.op_type.starts_with("Random") || node.op_type == "Bernoulli" { mask | LATENT } else { mask }
}

/// The values of exactly this mask that other nodes need.
fn boundary(graph: &Graph, masks: &[Mask], wanted: Mask) -> Vec<ValueId> {
    let outside = |place: &Use| match *place {
        Use::Node(id, _) => node_mask(graph, masks, outermost(graph, id)) != wanted,
        Use::Output(scope, _) => scope == ScopeId::MAIN,
        Use::Annotation(_) => false,
    };
    let inputs = graph.main().inputs().iter().copied();
    let computed = graph.nodes(ScopeId::MAIN).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    let here = inputs.chain(computed).filter(|v| masks[v.index()] == wanted);
    here.filter(|&v| graph.value(v).uses().iter().any(outside)).collect()
}

/// The node of the main graph that a node stands in.
fn outermost(graph: &Graph, mut id: NodeId) -> NodeId {
    while let Some(owner) = graph.scope(graph.node(id).scope()).owner() {
        id = owner;
    }
    id
}

/// A model that computes some values of another one. Values that are its inputs are left out.
fn part(model: &Model, values: &[ValueId]) -> Result<Model, Error> {
    let mut part = model.clone();
    let is_computed = |v: &&ValueId| matches!(model.graph.value(**v).origin(), Origin::Node(..));
    let computed: Vec<ValueId> = values.iter().filter(is_computed).copied().collect();
    keep_outputs(&mut part, &computed)?;
    drop_inputs(&mut part);
    Ok(part)
}

/// Drops inputs that nothing reads.
pub(crate) fn drop_inputs(model: &mut Model) {
    let graph = &mut model.graph;
    for index in (0..graph.main().inputs().len()).rev() {
        if graph.value(graph.main().inputs()[index]).uses().is_empty() {
            graph.remove_input(ScopeId::MAIN, index);
        }
    }
}

/// Lets a model compute these values only.
pub(crate) fn keep_outputs(model: &mut Model, values: &[ValueId]) -> Result<(), Error> {
    let graph = &mut model.graph;
    for index in (0..graph.main().outputs().len()).rev() {
        graph.remove_output(ScopeId::MAIN, index);
    }
    for &value in values {
        graph.add_output(ScopeId::MAIN, value);
    }
    drop_dead(model)?;
    state_outputs(model);
    Ok(())
}

pub(crate) fn drop_dead(model: &mut Model) -> Result<(), Error> {
    let done = DropDead.apply(model, &PassContext::default());
    done.map(drop).map_err(|e| Error::Network(e.to_string()))
}

/// Runtimes want to know the element types of outputs.
fn state_outputs(model: &mut Model) {
    let outputs = model.graph.main().outputs().to_vec();
    if outputs.iter().all(|&v| model.graph.value(v).ty.is_some()) {
        return;
    }
    let facts = Facts::infer(model);
    for value in outputs.into_iter().filter(|&v| model.graph.value(v).ty.is_none()).collect::<Vec<_>>() {
        model.graph.value_mut(value).ty = facts.ty(value);
    }
}

/// Puts an input in the place of a value that is computed elsewhere.
fn cut(model: &mut Model, facts: &Facts, value: ValueId) -> ValueId {
    let graph = &mut model.graph;
    if matches!(graph.value(value).origin(), Origin::Input(_)) {
        return value;
    }
    let name = graph.fresh_name(&format!("{}.given", graph.value(value).name));
    let input = graph.add_value(name, facts.ty(value));
    graph.add_input(ScopeId::MAIN, input);
    graph.replace_uses(value, input);
    input
}

/// How a cut is replaced inside the network: by the given tensor plus these, each times a number. One may be the cut
/// itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct How(Vec<(ValueId, f64)>);

impl How {
    /// By another tensor of the network plus the given one.
    pub fn shifted(from: ValueId) -> How {
        How(vec![(from, 1.0)])
    }

    /// Adds a tensor of the network; one that is there already gets both weights.
    pub fn add(&mut self, value: ValueId, weight: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == value) {
            Some((_, sum)) => *sum += weight,
            None => self.0.push((value, weight)),
        }
    }

    /// Whether the given tensor is all.
    pub fn is_given(&self) -> bool {
        self.0.is_empty()
    }
}

/// The network, or another model of the same values, with cuts replaced.
#[derive(Debug, Clone)]
pub(crate) struct Variant {
    /// The model; its outputs are the prediction, if it is still computed, and what is kept.
    pub model: Model,
    /// The inputs for the given tensors, in the order of the cuts.
    pub given: Vec<ValueId>,
    /// Whether the prediction is its first output.
    pub predicts: bool,
}

/// Replaces cuts in `base`, and returns `kept` values (as they are afterwards) besides the prediction.
pub(crate) fn variant(
    base: &Model,
    output: ValueId,
    cuts: &[(ValueId, How)],
    kept: &[ValueId],
) -> Result<Variant, Error> {
    let mut model = base.clone();
    let facts = if cuts.is_empty() { None } else { Some(Facts::infer(base)) };
    let graph = &mut model.graph;
    let mut now: Vec<(ValueId, ValueId)> = Vec::new();
    let mut given = Vec::new();
    let current = |now: &[(ValueId, ValueId)], v: ValueId| now.iter().find(|(old, _)| *old == v).map_or(v, |p| p.1);
    for (value, how) in cuts {
        let value = *value;
        let elem = facts.as_ref().and_then(|f| f.elem(value)).unwrap_or(DataType::Float);
        let name = graph.fresh_name(&format!("{}.given", graph.value(value).name));
        let input = graph.add_value(name, Some(Type::unshaped(elem)));
        graph.add_input(ScopeId::MAIN, input);
        given.push(input);
        // Whoever reads the cut reads this from now on; what it is made of is filled in afterwards.
        let new = graph.append(ScopeId::MAIN, Node::new("Identity"), &[input], "given");
        graph.replace_uses(value, new);
        let mut sum = input;
        for &(own, weight) in &how.0 {
            // An earlier cut is what it was replaced by, but a cut itself is what it would be.
            let own = if own == value { own } else { current(&now, own) };
            let mut term = own;
            if weight != 1.0 {
                let weight = Tensor::from_f64s(elem, &[], &[weight]);
                let weight = weight.ok_or_else(|| Error::Network(format!("{elem} cannot be weighted")))?;
                let weight = graph.add_initializer(ScopeId::MAIN, "weight", weight);
                term = graph.append(ScopeId::MAIN, Node::new("Mul"), &[own, weight], "own");
            }
            sum = graph.append(ScopeId::MAIN, Node::new("Add"), &[term, sum], "mixed");
        }
        let node = graph.producer(new).expect("a node makes what takes the place of the cut");
        graph.set_input(node, 0, Some(sum));
        now.push((value, new));
    }
    let predicts = !cuts.iter().any(|(v, how)| *v == output && how.is_given());
    let mut outputs: Vec<ValueId> = if predicts { vec![current(&now, output)] } else { Vec::new() };
    outputs.extend(kept.iter().map(|&v| current(&now, v)));
    // An output that is asked for twice must be two values, and none is an input.
    for index in 0..outputs.len() {
        let input = matches!(graph.value(outputs[index]).origin(), Origin::Input(_));
        if input || outputs[..index].contains(&outputs[index]) {
            outputs[index] = graph.append(ScopeId::MAIN, Node::new("Identity"), &[outputs[index]], "copy");
        }
    }
    if graph.sort().is_err() {
        let names: Vec<String> = cuts.iter().map(|(v, _)| format!("`{}`", base.graph.value(*v).name)).collect();
        return Err(Error::Plan(format!("{} cannot take what is computed from it", names.join(", "))));
    }
    keep_outputs(&mut model, &outputs)?;
    Ok(Variant { model, given, predicts })
}

/// The value of the main graph with this name that a plan may cut.
pub(crate) fn cut_value(model: &Model, name: &str) -> Result<ValueId, Error> {
    let graph = &model.graph;
    let found = graph
        .find_value(name)
        .filter(|&v| matches!(graph.value(v).origin(), Origin::Node(id, _) if graph.node(id).scope() == ScopeId::MAIN));
    found.ok_or_else(|| Error::Plan(format!("no node of the denoiser computes `{name}` from the latent")))
}
