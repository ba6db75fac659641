//! The one place that makes graphs of samplers: steps side by side, or in loops.

use super::{
    Clip, Error, Mode, Pass, Roles, Row, StepPlan, Substitution, Table, Uncond,
    network::{self, How, Network, TimeFeed, Variant},
    plan::{Kind, Ref},
    sums::{Factor, Sums},
};
use crate::{
    Context,
    exact::{DropDead, DropIdentities, MergeDuplicates, ShareInitializers},
};
use lathe_analysis::{Evaluate, Facts};
use lathe_ir::{DataType, Dim, Fragment, Graph, Model, Node, ScopeId, Tensor, Type, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

mod adaptive;
mod segments;

/// The operator set that samplers are written in; denoisers of older ones must be upgraded first.
pub const OPSET: i64 = 18;

/// How strong guidance is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// This strong.
    Constant(f64),
    /// As strong as an input named `guidance` says.
    Input,
}

/// How a sampler is guided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    /// How strong.
    pub scale: Scale,
    /// How far the result is pulled to the deviation of the conditional prediction, 0 to 1.
    pub rescale: f64,
    /// Whether both passes of a step run as one batch, the unconditional half first, where the plan allows it.
    pub batched: bool,
}

/// The shape of the control flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Every step side by side.
    Unrolled,
    /// Steps that repeat are the body of a `Loop`.
    Loop,
    /// A `Loop` whose body decides by an `If` whether it runs the network.
    Adaptive,
}

impl Form {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Form::Unrolled => "unrolled",
            Form::Loop => "loop",
            Form::Adaptive => "adaptive",
        }
    }
}

/// What to compile.
#[derive(Debug, Clone, Copy)]
pub struct Sampler<'a> {
    /// The denoiser, simplified, of operator set [`OPSET`] or later.
    pub denoiser: &'a Model,
    /// What its inputs are.
    pub roles: &'a Roles,
    /// The numbers of every step.
    pub table: &'a Table,
    /// What every step computes.
    pub plan: &'a StepPlan,
    /// How it is guided.
    pub guidance: Guidance,
}

/// Something that a step leaves for later ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    /// A cut.
    Cut(String),
    /// What a range of blocks added: the cut after it minus the tensor before it.
    Added(String, String),
}

impl What {
    /// What a substitution needs of the steps it refers to.
    pub fn of(one: &Substitution) -> What {
        match &one.kind {
            Kind::Delta { input, .. } => What::Added(one.cut.clone(), input.clone()),
            _ => What::Cut(one.cut.clone()),
        }
    }

    /// The tensors of the network that it is made of.
    pub fn names(&self) -> Vec<&str> {
        match self {
            What::Cut(cut) => vec![cut],
            What::Added(cut, input) => vec![cut, input],
        }
    }
}

/// What is stored at each step for later ones.
pub(crate) fn stored(plan: &StepPlan) -> BTreeMap<usize, BTreeSet<What>> {
    let mut all: BTreeMap<usize, BTreeSet<What>> = BTreeMap::new();
    for (&step, substitutions) in &plan.steps {
        for one in substitutions {
            for r in one.refs().iter().filter(|r| r.step != step || r.pass.is_some()) {
                all.entry(r.step).or_default().insert(What::of(one));
            }
        }
    }
    all
}

/// Which passes a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    One(Pass),
    /// Both in one batch, the unconditional half first.
    Both,
}

type Store = BTreeMap<(What, usize, Lane), ValueId>;

/// What one step finds and what it leaves.
#[derive(Debug, Clone)]
struct State {
    x: ValueId,
    /// Estimates of the clean sample, the latest first.
    history: Vec<ValueId>,
    store: Store,
}

/// Where the numbers of a step come from.
struct Numbers {
    input_scale: Factor,
    /// Factors of state and output in the estimate.
    estimate: [Factor; 2],
    state: Factor,
    output: Factor,
    /// Whether the estimate is computed; if not, `state` and `output` hold what it would contribute.
    estimates: bool,
    /// Factors of the estimate of this step and of earlier ones.
    weights: Vec<Factor>,
    noise: Factor,
    /// The fresh noise.
    fresh: Option<ValueId>,
    /// What the network knows of the time.
    ahead: Vec<ValueId>,
    /// The state of the flow: factor of the state. Only the adaptive form asks.
    flow_scale: Factor,
    /// The flow: factors of state and output.
    flow: [Factor; 2],
}

/// The iteration of a loop that a step stands in.
#[derive(Debug, Clone, Copy)]
struct Iteration {
    scope: ScopeId,
    /// The counter; `None` in the main graph.
    index: Option<ValueId>,
}

struct Emitter<'a> {
    sampler: &'a Sampler<'a>,
    net: Network,
    facts: Facts,
    out: Model,
    /// What constants and conditions of the denoiser became.
    known: BTreeMap<ValueId, ValueId>,
    /// What conditions became, by lane, in the order of [`Network::hoisted`].
    hoisted: BTreeMap<Lane, Vec<ValueId>>,
    stored: BTreeMap<usize, BTreeSet<What>>,
    variants: BTreeMap<String, Rc<(Variant, Fragment)>>,
    /// What the network knows of the time, by step.
    times: Vec<Vec<Tensor>>,
    /// The input for fresh noise.
    noise: Option<ValueId>,
    /// The input for the scale of guidance.
    scale: Option<ValueId>,
    /// Inputs for what conditions are in the unconditional pass.
    unconditional: BTreeMap<ValueId, ValueId>,
}

/// Compiles a sampler. `evaluator` computes what depends on the time only.
///
/// The result takes `noise`, the conditions, `step_noise` with one entry per step that adds some, and `guidance` where
/// that is an input; it gives `sample`, and in the adaptive form `computed`, which steps ran the network.
pub fn emit(sampler: &Sampler, form: Form, evaluator: &dyn Evaluate) -> Result<Model, Error> {
    check(sampler, form)?;
    let net = Network::new(sampler.denoiser, sampler.roles)?;
    let times: Result<Vec<_>, Error> =
        sampler.table.rows.iter().map(|row| net.at(row.time * sampler.roles.time_scale, evaluator)).collect();
    let mut emitter = Emitter::new(sampler, net, times?)?;
    let state = emitter.start()?;
    let outputs = match form {
        Form::Unrolled => {
            let mut state = state;
            for step in 0..sampler.table.rows.len() {
                emitter.unrolled(step, &mut state)?;
            }
            vec![state.x]
        }
        Form::Loop => vec![emitter.looped(state)?.x],
        Form::Adaptive => emitter.adaptive(state)?,
    };
    emitter.finish(&outputs)
}

fn check(sampler: &Sampler, form: Form) -> Result<(), Error> {
    let plan = sampler.plan;
    plan.check()?;
    if plan.grid.len() != sampler.table.rows.len() {
        let (steps, rows) = (plan.grid.len(), sampler.table.rows.len());
        return Err(Error::Plan(format!("the plan has {steps} steps and the solver {rows}")));
    }
    if (form == Form::Adaptive) != plan.adaptive.is_some() {
        return Err(Error::Form("a rule that decides at run time and the adaptive form go together".to_owned()));
    }
    if plan.cfg.iter().any(|mode| *mode != Mode::Conditional) && !sampler.roles.guides() {
        let message = "guidance needs an unconditional pass; --io uncond:NAME=VALUE or uncond:NAME=input says what a \
                       condition is then";
        return Err(Error::Roles(message.to_owned()));
    }
    let opset = sampler.denoiser.opset();
    if opset < OPSET {
        return Err(Error::Network(format!("the denoiser is of operator set {opset}, expected {OPSET} or later")));
    }
    Ok(())
}

impl<'a> Emitter<'a> {
    fn new(sampler: &'a Sampler<'a>, net: Network, times: Vec<Vec<Tensor>>) -> Result<Emitter<'a>, Error> {
        let denoiser = sampler.denoiser;
        let mut out = Model {
            ir_version: denoiser.ir_version.max(8),
            opsets: denoiser.opsets.clone(),
            producer_name: "onnx-lathe".to_owned(),
            functions: denoiser.functions.clone(),
            configurations: denoiser.configurations.clone(),
            graph: Graph::new("sampler"),
            ..Model::default()
        };
        // Conditions come first: their names are those of the denoiser, whatever else needs one.
        let mut known = BTreeMap::new();
        for &value in denoiser.graph.main().inputs() {
            let old = denoiser.graph.value(value);
            if sampler.roles.conditions.iter().any(|c| c.name == old.name) {
                let name = out.graph.fresh_name(&old.name);
                known.insert(value, out.graph.add_value(name, old.ty.clone()));
            }
        }
        known.extend(out.graph.paste_constants(&denoiser.graph.fragment(ScopeId::MAIN), ScopeId::MAIN, ""));
        Ok(Emitter {
            facts: Facts::infer(&net.model),
            stored: stored(sampler.plan),
            sampler,
            net,
            out,
            known,
            hoisted: BTreeMap::new(),
            variants: BTreeMap::new(),
            times,
            noise: None,
            scale: None,
            unconditional: BTreeMap::new(),
        })
    }

    fn sums(&mut self, scope: ScopeId) -> Sums<'_> {
        Sums { graph: &mut self.out.graph, scope }
    }

    /// A new input of the sampler.
    fn input(&mut self, name: &str, ty: Option<Type>) -> ValueId {
        let name = self.out.graph.fresh_name(name);
        let value = self.out.graph.add_value(name, ty);
        self.out.graph.add_input(ScopeId::MAIN, value);
        value
    }

    /// Makes the inputs and the first state.
    fn start(&mut self) -> Result<State, Error> {
        let dims = self.net.dims.clone();
        let noise = self.input("noise", Some(Type::tensor(DataType::Float, dims.clone())));
        let count = self.sampler.table.noises();
        if count > 0 {
            let dims: Vec<Dim> = std::iter::once(Dim::Known(count as i64)).chain(dims).collect();
            self.noise = Some(self.input("step_noise", Some(Type::tensor(DataType::Float, dims))));
        }
        let guided = self.sampler.plan.cfg.iter().any(|mode| *mode != Mode::Conditional);
        for condition in &self.sampler.roles.conditions {
            let old = self.condition(&condition.name)?;
            let value = self.known[&old];
            self.out.graph.add_input(ScopeId::MAIN, value);
            if guided && condition.uncond == Uncond::Input {
                let ty = self.out.graph.value(value).ty.clone();
                let uncond = self.input(&format!("{}_uncond", condition.name), ty);
                self.unconditional.insert(old, uncond);
            }
        }
        if self.sampler.guidance.scale == Scale::Input && self.sampler.plan.cfg.contains(&Mode::Guided) {
            self.scale = Some(self.input("guidance", Some(Type::tensor(DataType::Float, Vec::new()))));
        }
        let scale = Factor::Number(self.sampler.table.initial_scale);
        let x = self.sums(ScopeId::MAIN).scaled(noise, scale, DataType::Float, "state")?;
        Ok(State { x, history: Vec::new(), store: Store::new() })
    }

    /// An input of the denoiser by name.
    fn condition(&self, name: &str) -> Result<ValueId, Error> {
        let graph = &self.sampler.denoiser.graph;
        let found = graph.main().inputs().iter().find(|&&v| graph.value(v).name == name).copied();
        found.ok_or_else(|| Error::Roles(format!("the denoiser has no input `{name}`")))
    }

    /// Whether the passes of a step run as one batch.
    fn is_batched(&self, step: usize) -> bool {
        let alike = |one: &Substitution| one.pass.is_none() && one.refs().iter().all(|r| r.pass.is_none());
        self.sampler.guidance.batched
            && self.can_batch()
            && self.sampler.plan.cfg[step].is_guided()
            && self.sampler.plan.at(step).iter().all(alike)
    }

    /// Whether latent and conditions have a first axis that may grow.
    fn can_batch(&self) -> bool {
        let open = |dims: &[Dim]| dims.first().is_some_and(|d| d.known().is_none());
        let condition = |name: &str| {
            let ty = self.condition(name).ok().and_then(|v| self.sampler.denoiser.graph.value(v).ty.as_ref());
            ty.and_then(Type::shape).is_some_and(|shape| open(&shape.dims))
        };
        open(&self.net.dims) && self.sampler.roles.conditions.iter().all(|c| condition(&c.name))
    }

    /// The lanes that a step stores in.
    fn lanes(&self, step: usize) -> Vec<Lane> {
        if self.is_batched(step) {
            return vec![Lane::Both];
        }
        self.sampler.plan.cfg[step].passes().iter().map(|&pass| Lane::One(pass)).collect()
    }

    /// What the network knows of the conditions in a lane, computed once in front of all steps.
    fn hoisted(&mut self, lane: Lane) -> Result<Vec<ValueId>, Error> {
        if let Some(known) = self.hoisted.get(&lane) {
            return Ok(known.clone());
        }
        let mut given = BTreeMap::new();
        for condition in &self.sampler.roles.conditions {
            let old = self.condition(&condition.name)?;
            let cond = self.known[&old];
            let mut uncond = cond;
            if lane != Lane::One(Pass::Cond) {
                uncond = match condition.uncond {
                    Uncond::Same => cond,
                    Uncond::Input => self.unconditional[&old],
                    Uncond::Constant(number) => self.filled(cond, number)?,
                };
            }
            let value = match lane {
                Lane::One(Pass::Cond) => cond,
                Lane::One(Pass::Uncond) => uncond,
                Lane::Both => self.sums(ScopeId::MAIN).joined(uncond, cond, "conditions"),
            };
            given.insert(old, value);
        }
        let fragment = self.net.condition_part.graph.fragment(ScopeId::MAIN);
        let arguments: Vec<_> = fragment.inputs().iter().map(|v| given.get(v).copied()).collect();
        let pasted = self.out.graph.paste(&fragment, ScopeId::MAIN, &arguments, &self.known, "once.");
        let mut computed = pasted.outputs.into_iter().flatten();
        let value = |v: &ValueId| given.get(v).copied().or_else(|| computed.next());
        let values: Option<Vec<ValueId>> = self.net.hoisted.iter().map(value).collect();
        let values = values.ok_or_else(|| Error::Network("the part that sees conditions lost an output".to_owned()))?;
        self.hoisted.insert(lane, values.clone());
        Ok(values)
    }

    /// A number in the shape of a value.
    fn filled(&mut self, like: ValueId, number: f64) -> Result<ValueId, Error> {
        let elem = self.out.graph.value(like).ty.as_ref().and_then(Type::elem);
        let tensor = elem.and_then(|elem| Tensor::from_f64s(elem, &[], &[number]));
        let tensor = tensor.ok_or_else(|| {
            Error::Roles(format!("`{}` cannot be filled with {number}", self.out.graph.value(like).name))
        })?;
        let mut sums = self.sums(ScopeId::MAIN);
        let number = sums.constant(tensor, "unconditional");
        let shape = sums.node("Shape", &[like], "condition.shape");
        Ok(sums.node("Expand", &[number, shape], "unconditional"))
    }

    /// The numbers of a step: constants, or rows of tables where several iterations share it.
    fn numbers(&mut self, steps: &[usize], at: Iteration) -> Result<Numbers, Error> {
        let table = self.sampler.table;
        let estimates = steps.iter().any(|&step| self.needs_estimate(step));
        let mut factor = |value: &dyn Fn(usize) -> f64, name: &str| {
            let values: Vec<f64> = steps.iter().map(|&step| value(step)).collect();
            match at.index {
                Some(index) if values.iter().any(|v| *v != values[0]) => {
                    let numbers: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                    let mut sums = Sums { graph: &mut self.out.graph, scope: at.scope };
                    let rows = sums.constant(Tensor::from_f32s(&[numbers.len()], &numbers), &format!("{name}.table"));
                    Factor::Value(sums.row(rows, index, name))
                }
                _ => Factor::Number(values[0]),
            }
        };
        let row = |step: usize| &table.rows[step];
        let deepest = steps.iter().map(|&step| row(step).estimates.len()).max().unwrap_or(0);
        let resolved = |step: usize| {
            if estimates { (row(step).state, row(step).output) } else { (row(step).affine().0, row(step).affine().1) }
        };
        let adaptive = self.sampler.plan.adaptive.is_some();
        let unless = |used: bool, f: Factor| if used { f } else { Factor::Number(0.0) };
        let numbers = Numbers {
            input_scale: factor(&|step| row(step).input_scale, "input_scale"),
            estimate: [0, 1].map(|k| match estimates {
                true => factor(&|step| row(step).estimate[k], "estimate"),
                false => Factor::Number(0.0),
            }),
            state: factor(&|step| resolved(step).0, "state"),
            output: factor(&|step| resolved(step).1, "output"),
            estimates,
            weights: (0..deepest)
                .map(|k| match k == 0 && !estimates {
                    true => Factor::Number(0.0),
                    false => factor(&|step| row(step).estimates.get(k).copied().unwrap_or(0.0), "weight"),
                })
                .collect(),
            noise: factor(&|step| row(step).noise, "noise"),
            fresh: None,
            ahead: Vec::new(),
            flow_scale: match adaptive {
                true => factor(&|step| row(step).flow.scale, "flow_scale"),
                false => Factor::Number(0.0),
            },
            flow: [0, 1].map(|k| match adaptive {
                true => factor(&|step| row(step).flow.flow[k], "flow"),
                false => Factor::Number(0.0),
            }),
        };
        let fresh = match self.noise {
            Some(noise) if steps.iter().any(|&step| row(step).noise != 0.0) => Some(self.fresh(noise, steps, at)),
            _ => None,
        };
        let ahead = (0..self.net.ahead.len()).map(|k| self.ahead(k, steps, at)).collect::<Result<_, _>>()?;
        Ok(Numbers { fresh, ahead, noise: unless(fresh.is_some(), numbers.noise), ..numbers })
    }

    /// The noise that a step adds.
    fn fresh(&mut self, noise: ValueId, steps: &[usize], at: Iteration) -> ValueId {
        let rows = &self.sampler.table.rows;
        let before = |step: usize| rows[..step].iter().filter(|row| row.noise != 0.0).count() as i64;
        let last = self.sampler.table.noises() as i64 - 1;
        let indices: Vec<i64> = steps.iter().map(|&step| before(step).min(last)).collect();
        let mut sums = self.sums(at.scope);
        let index = match at.index {
            Some(iteration) => {
                let indices = sums.int64s(&indices, "noise.table");
                sums.row(indices, iteration, "noise.index")
            }
            None => sums.constant(Tensor::from_i64s(&[], &indices[..1]), "noise.index"),
        };
        sums.row(noise, index, "fresh")
    }

    /// What the network knows of the time at a step.
    fn ahead(&mut self, index: usize, steps: &[usize], at: Iteration) -> Result<ValueId, Error> {
        let tensors: Vec<Tensor> = steps.iter().map(|&step| self.times[step][index].clone()).collect();
        let first = tensors[0].clone();
        let Some(iteration) = at.index.filter(|_| tensors.iter().any(|t| !t.same_bits(&first))) else {
            return Ok(self.sums(at.scope).constant(first, "time"));
        };
        let dims: Vec<usize> = std::iter::once(tensors.len()).chain(first.dims().iter().copied()).collect();
        let bytes: Vec<u8> = tensors.iter().flat_map(|t| t.bytes().to_vec()).collect();
        let table = Tensor::new(first.dtype(), dims, bytes);
        let table =
            table.map_err(|e| Error::Network(format!("what the network knows of the time changes shape: {e}")))?;
        let mut sums = self.sums(at.scope);
        let table = sums.constant(table, "time.table");
        Ok(sums.row(table, iteration, "time"))
    }

    /// Whether the estimate of a step must be computed: it is clipped, or a later step uses it.
    fn needs_estimate(&self, step: usize) -> bool {
        let rows = &self.sampler.table.rows;
        let own = self.sampler.table.clip != Clip::None && rows[step].estimates.first().is_some_and(|&b| b != 0.0);
        let later = |(back, row): (usize, &Row)| row.estimates.get(back + 1).is_some_and(|&b| b != 0.0);
        own || rows[step + 1..].iter().enumerate().any(later)
    }

    /// One step in the main graph.
    fn unrolled(&mut self, step: usize, state: &mut State) -> Result<(), Error> {
        let at = Iteration { scope: ScopeId::MAIN, index: None };
        let numbers = self.numbers(&[step], at)?;
        self.step(step, &numbers, at.scope, state)
    }

    /// One step in any scope.
    fn step(&mut self, step: usize, numbers: &Numbers, scope: ScopeId, state: &mut State) -> Result<(), Error> {
        let predictions = self.predictions(step, numbers, scope, state)?;
        let m = self.joined(step, &predictions, scope)?;
        self.advance(numbers, scope, state, m)
    }

    /// What the network predicts in each pass of a step, in float32.
    fn predictions(
        &mut self,
        step: usize,
        numbers: &Numbers,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<BTreeMap<Pass, ValueId>, Error> {
        let dtype = self.net.dtype;
        let mut sums = self.sums(scope);
        let latent = sums.scaled(state.x, numbers.input_scale, DataType::Float, "latent")?;
        let mut latent = sums.cast(latent, DataType::Float, dtype, "latent");
        let mut found = BTreeMap::new();
        for lane in self.lanes(step) {
            if lane == Lane::Both {
                latent = self.sums(scope).joined(latent, latent, "latents");
            }
            let m = self.evaluate(step, lane, latent, numbers, scope, state)?;
            let mut sums = self.sums(scope);
            match lane {
                Lane::One(pass) => _ = found.insert(pass, m),
                Lane::Both => {
                    let [uncond, cond] = sums.halves(m, "prediction");
                    found.extend([(Pass::Cond, cond), (Pass::Uncond, uncond)]);
                }
            }
        }
        Ok(found)
    }

    /// One evaluation of the network, or of what a plan leaves of it.
    fn evaluate(
        &mut self,
        step: usize,
        lane: Lane,
        latent: ValueId,
        numbers: &Numbers,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<ValueId, Error> {
        let mut cuts = Vec::new();
        let mut given = Vec::new();
        let mut whole = None;
        let inside = |one: &&Substitution| match lane {
            Lane::One(pass) => one.is_in(pass),
            Lane::Both => true,
        };
        for one in self.sampler.plan.at(step).iter().filter(inside) {
            let cut = self.cut(&one.cut)?;
            let (how, tensor) = self.given(one, step, lane, scope, state)?;
            if cut == self.net.output && how == How::Given {
                whole = Some(tensor);
            }
            cuts.push((cut, how));
            given.push(tensor);
        }
        let wanted = self.stored.get(&step).cloned().unwrap_or_default();
        let names: BTreeSet<String> = wanted.iter().flat_map(What::names).map(str::to_owned).collect();
        let names: Vec<String> = names.into_iter().collect();
        let kept = names.iter().map(|name| self.cut(name)).collect::<Result<Vec<_>, _>>()?;
        let outputs = if whole.is_some() && kept.is_empty() {
            Vec::new()
        } else {
            self.paste(step, lane, latent, numbers, scope, (&cuts, &given, &kept))?
        };
        let predicted = usize::from(whole.is_none());
        let tensors: BTreeMap<&str, ValueId> =
            names.iter().map(String::as_str).zip(outputs.iter().skip(predicted).copied()).collect();
        for what in wanted {
            let value = match &what {
                What::Cut(cut) => tensors[cut.as_str()],
                What::Added(cut, input) => {
                    self.sums(scope).node("Sub", &[tensors[cut.as_str()], tensors[input.as_str()]], "added")
                }
            };
            state.store.insert((what, step, lane), value);
        }
        let m = whole.or(outputs.first().copied()).expect("a variant predicts unless its prediction is given");
        let (dtype, channels) = (self.net.dtype, self.net.channels);
        let mut sums = self.sums(scope);
        let m = sums.cast(m, dtype, DataType::Float, "prediction");
        let Some(channels) = channels else { return Ok(m) };
        let bounds = [0, channels, 1].map(|n| sums.int64s(&[n], "mean"));
        Ok(sums.node("Slice", &[m, bounds[0], bounds[1], bounds[2]], "mean"))
    }

    /// The value that a plan cuts.
    fn cut(&self, name: &str) -> Result<ValueId, Error> {
        if name == self.sampler.roles.output { Ok(self.net.output) } else { network::cut_value(&self.net.model, name) }
    }

    /// Puts a variant of the network into a scope.
    fn paste(
        &mut self,
        step: usize,
        lane: Lane,
        latent: ValueId,
        numbers: &Numbers,
        scope: ScopeId,
        (cuts, given, kept): (&[(ValueId, How)], &[ValueId], &[ValueId]),
    ) -> Result<Vec<ValueId>, Error> {
        let key = format!("{cuts:?} {kept:?}");
        let variant = match self.variants.get(&key) {
            Some(known) => Rc::clone(known),
            None => {
                let variant = network::variant(&self.net.model, self.net.output, cuts, kept)?;
                let fragment = variant.model.graph.fragment(ScopeId::MAIN);
                let made = Rc::new((variant, fragment));
                self.variants.insert(key, Rc::clone(&made));
                made
            }
        };
        let (variant, fragment) = &*variant;
        let mut arguments: BTreeMap<ValueId, ValueId> = BTreeMap::from([(self.net.latent, latent)]);
        let hoisted = self.hoisted(lane)?;
        arguments.extend(self.net.hoisted.iter().copied().zip(hoisted));
        arguments.extend(variant.given.iter().copied().zip(given.iter().copied()));
        let mut ahead = numbers.ahead.clone();
        if self.net.feed == TimeFeed::Batch {
            let graph = &mut self.out.graph;
            let size = graph.append(scope, Node::new("Shape").with("start", 0).with("end", 1), &[latent], "batch");
            ahead = ahead.iter().map(|&t| graph.append(scope, Node::new("Expand"), &[t, size], "times")).collect();
        }
        arguments.extend(self.net.ahead.iter().copied().zip(ahead));
        let arguments: Vec<_> = fragment.inputs().iter().map(|v| arguments.get(v).copied()).collect();
        let prefix = match lane {
            Lane::One(Pass::Uncond) => format!("step{step}.uncond."),
            _ => format!("step{step}."),
        };
        let pasted = self.out.graph.paste(fragment, scope, &arguments, &self.known, &prefix);
        Ok(pasted.outputs.into_iter().flatten().collect())
    }

    /// The tensor that a substitution brings into the network, and what it does there.
    fn given(
        &mut self,
        one: &Substitution,
        step: usize,
        lane: Lane,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<(How, ValueId), Error> {
        let dtype = self.facts.elem(self.cut(&one.cut)?).unwrap_or(self.net.dtype);
        let Some(terms) = one.terms(step) else {
            let Kind::Delta { input, from } = &one.kind else { unreachable!("only a delta has no terms") };
            let tensor = self.fetch(&What::of(one), *from, lane, scope, state)?;
            return Ok((How::Shifted(self.cut(input)?), tensor));
        };
        let own = |r: &Ref| r.step == step && r.pass.is_none_or(|pass| lane == Lane::One(pass));
        let itself: f64 = terms.iter().filter(|(r, _)| own(r)).map(|(_, weight)| weight).sum();
        let mut others = Vec::new();
        for (r, weight) in terms.iter().filter(|(r, _)| !own(r)) {
            let from = r.pass.map_or(lane, Lane::One);
            others.push((self.fetch(&What::of(one), r.step, from, scope, state)?, Factor::Number(*weight)));
        }
        let how = if terms.iter().any(|(r, _)| own(r)) { How::Mixed(itself) } else { How::Given };
        let mut sums = self.sums(scope);
        let tensor = if others.is_empty() {
            let zero = Tensor::from_f64s(dtype, &[], &[0.0]);
            let zero = zero.ok_or_else(|| Error::Plan(format!("`{}` of {dtype} cannot be weighted", one.cut)))?;
            sums.constant(zero, "nothing")
        } else {
            sums.sum(&others, dtype, "forecast")?
        };
        Ok((how, tensor))
    }

    /// What a step stored, in a lane; halves of batches are taken and joined as needed.
    fn fetch(
        &mut self,
        what: &What,
        step: usize,
        lane: Lane,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<ValueId, Error> {
        let find = |store: &Store, lane: Lane| store.get(&(what.clone(), step, lane)).copied();
        if let Some(found) = find(&state.store, lane) {
            return Ok(found);
        }
        let missing = || Error::Plan(format!("step {step} left no `{}` for another pass", what.names()[0]));
        let [cond, uncond] = [Pass::Cond, Pass::Uncond].map(Lane::One);
        if lane == Lane::Both {
            let (a, b) = find(&state.store, uncond).zip(find(&state.store, cond)).ok_or_else(missing)?;
            let both = self.sums(scope).joined(a, b, "both");
            state.store.insert((what.clone(), step, lane), both);
            return Ok(both);
        }
        let both = find(&state.store, Lane::Both).ok_or_else(missing)?;
        let halves = self.sums(scope).halves(both, "half");
        for (lane, value) in [uncond, cond].into_iter().zip(halves) {
            state.store.insert((what.clone(), step, lane), value);
        }
        find(&state.store, lane).ok_or_else(missing)
    }

    /// The prediction of a step: of its only pass, or guided.
    fn joined(&mut self, step: usize, found: &BTreeMap<Pass, ValueId>, scope: ScopeId) -> Result<ValueId, Error> {
        let (mode, guidance) = (self.sampler.plan.cfg[step], self.sampler.guidance);
        if !mode.is_guided() {
            return Ok(found[&mode.passes()[0]]);
        }
        let scale = match (mode, guidance.scale, self.scale) {
            (Mode::Scaled(scale), ..) | (_, Scale::Constant(scale), _) => Factor::Number(scale),
            (_, Scale::Input, input) => Factor::Value(input.expect("a guided step has its input")),
        };
        let ndim = self.net.dims.len();
        self.sums(scope).guided(found[&Pass::Cond], found[&Pass::Uncond], scale, guidance.rescale, ndim)
    }

    /// The next state from a prediction.
    fn advance(&mut self, numbers: &Numbers, scope: ScopeId, state: &mut State, m: ValueId) -> Result<(), Error> {
        let (clip, dims) = (self.sampler.table.clip, self.net.dims.clone());
        let kept = self.sampler.table.history();
        let mut sums = self.sums(scope);
        let mut terms = vec![(state.x, numbers.state), (m, numbers.output)];
        if numbers.estimates {
            let [u, w] = numbers.estimate;
            let y = sums.sum(&[(state.x, u), (m, w)], DataType::Float, "clean")?;
            let y = sums.clipped(y, clip, &dims)?;
            terms.push((y, numbers.weights.first().copied().unwrap_or(Factor::Number(0.0))));
            state.history.insert(0, y);
        } else if kept > 0 {
            // Nobody asks for this estimate, but earlier ones move one place on.
            state.history.insert(0, state.x);
        }
        for (back, &weight) in numbers.weights.iter().enumerate().skip(1) {
            match state.history.get(back) {
                Some(&y) => terms.push((y, weight)),
                None if weight == Factor::Number(0.0) => {}
                None => return Err(Error::Plan("a step uses an estimate from before the first".to_owned())),
            }
        }
        state.history.truncate(kept);
        if let Some(fresh) = numbers.fresh {
            terms.push((fresh, numbers.noise));
        }
        state.x = sums.sum(&terms, DataType::Float, "state")?;
        Ok(())
    }

    /// Names the outputs, drops what nothing uses, and shares constants.
    fn finish(mut self, outputs: &[ValueId]) -> Result<Model, Error> {
        let graph = &mut self.out.graph;
        let names = ["sample", "computed"];
        for (&value, name) in outputs.iter().zip(names) {
            let value = graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], name);
            let ty = match name {
                "sample" => Type::tensor(DataType::Float, self.net.dims.clone()),
                _ => Type::tensor(DataType::Bool, vec![Dim::Known(self.sampler.table.rows.len() as i64)]),
            };
            graph.value_mut(value).ty = Some(ty);
            graph.add_output(ScopeId::MAIN, value);
        }
        graph.sort().map_err(|e| Error::Network(e.to_string()))?;
        for pass in [&ShareInitializers as &dyn crate::Pass, &MergeDuplicates, &DropIdentities, &DropDead] {
            pass.apply(&mut self.out, &Context::default()).map_err(|e| Error::Network(e.to_string()))?;
        }
        let unused = |graph: &Graph, index: usize| graph.value(graph.main().inputs()[index]).uses().is_empty();
        let graph = &mut self.out.graph;
        for index in (1..graph.main().inputs().len()).rev() {
            if unused(graph, index) {
                graph.remove_input(ScopeId::MAIN, index);
            }
        }
        graph.sort().map_err(|e| Error::Network(e.to_string()))?;
        graph.make_names_unique();
        let checked = self.out.check();
        checked.map_err(|e| {
            Error::Network(format!("the sampler is not a valid model; this is a fault of this program: {e}"))
        })?;
        Ok(self.out)
    }
}
