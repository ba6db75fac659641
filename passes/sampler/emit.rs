//! The one place that makes graphs of samplers: steps side by side, or in loops.

use super::{
    Error, Mode, Pass, Ref, Roles, Sizes, StepPlan, Substitution, Table, Uncond,
    network::{Network, Variant},
    plan::Kind,
    sums::{Factor, Sums},
};
use crate::{
    PassContext,
    exact::{DropDead, DropIdentities, MergeDuplicates, ShareInitializers},
};
use lathe_analysis::{Evaluate, Facts};
use lathe_ir::{DataType, Dim, Fragment, Graph, Model, Node, ScopeId, Tensor, Type, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

mod adaptive;
mod conditions;
mod numbers;
mod segments;
mod sizes;
mod step;

use numbers::{Iteration, Numbers};
use sizes::Sized;

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

impl Guidance {
    /// Whether it makes the conditional prediction.
    pub fn is_plain(&self) -> bool {
        self.scale == Scale::Constant(1.0)
    }
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
    /// A tensor.
    Cut(String),
    /// What a range of blocks added: the cut after it minus the tensor before it.
    Added(String, String),
}

impl What {
    /// What a substitution needs of a step that it refers to.
    pub fn of(one: &Substitution, r: &Ref) -> What {
        match &one.kind {
            Kind::Delta { input, .. } => What::Added(one.cut.clone(), input.clone()),
            _ => What::Cut(r.of.as_ref().unwrap_or(&one.cut).clone()),
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
                all.entry(r.step).or_default().insert(What::of(one, r));
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
    /// What rows kept, the latest first.
    history: Vec<ValueId>,
    /// What rows began with, the latest first, as far back as some row starts from.
    seen: Vec<ValueId>,
    store: Store,
}

struct Emitter<'a> {
    sampler: &'a Sampler<'a>,
    evaluator: &'a dyn Evaluate,
    /// The network as the current step needs it.
    net: Network,
    facts: Facts,
    out: Model,
    /// What constants and conditions of the denoiser became.
    known: BTreeMap<ValueId, ValueId>,
    /// The network at other sizes than that of the current step; that of no size yet has none.
    others: BTreeMap<Option<[usize; 2]>, Sized>,
    /// The size of the current step, if steps have sizes.
    size: Option<[usize; 2]>,
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
        sampler.table.rows.iter().map(|row| net.at(sampler.roles.time_of(row), evaluator)).collect();
    let mut emitter = Emitter::new(sampler, net, times?, evaluator)?;
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
    sampler.check_latent()?;
    if plan.sizes.is_some() && form != Form::Unrolled {
        let message = "steps of several sizes stand side by side; leave out --form, or --form unrolled";
        return Err(Error::Form(message.to_owned()));
    }
    if form == Form::Adaptive && sampler.table.anchored() > 0 {
        let message = "some steps evaluate the network several times, which the adaptive form cannot leave out; take \
                       another form";
        return Err(Error::Form(message.to_owned()));
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
    fn new(
        sampler: &'a Sampler<'a>,
        net: Network,
        times: Vec<Vec<Tensor>>,
        evaluator: &'a dyn Evaluate,
    ) -> Result<Emitter<'a>, Error> {
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
            evaluator,
            net,
            out,
            known,
            others: BTreeMap::new(),
            size: None,
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
        let sizes = self.sampler.plan.sizes.as_ref();
        let dims = self.dims(sizes.map(Sizes::full));
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
        let noise = self.cropped(noise, sizes.map(|sizes| sizes.steps[0]), ScopeId::MAIN);
        let x = self.sums(ScopeId::MAIN).scaled(noise, scale, DataType::Float, "state")?;
        Ok(State { x, history: Vec::new(), seen: Vec::new(), store: Store::new() })
    }

    /// An input of the denoiser by name.
    fn condition(&self, name: &str) -> Result<ValueId, Error> {
        let graph = &self.sampler.denoiser.graph;
        let found = graph.main().inputs().iter().find(|&&v| graph.value(v).name == name).copied();
        found.ok_or_else(|| Error::Roles(format!("the denoiser has no input `{name}`")))
    }

    /// Names the outputs, drops what nothing uses, and shares constants.
    fn finish(mut self, outputs: &[ValueId]) -> Result<Model, Error> {
        let sample = self.dims(self.sampler.plan.sizes.as_ref().map(Sizes::full));
        let graph = &mut self.out.graph;
        let names = ["sample", "computed"];
        for (&value, name) in outputs.iter().zip(names) {
            let value = graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], name);
            let ty = match name {
                "sample" => Type::tensor(DataType::Float, sample.clone()),
                _ => Type::tensor(DataType::Bool, vec![Dim::Known(self.sampler.table.rows.len() as i64)]),
            };
            graph.value_mut(value).ty = Some(ty);
            graph.add_output(ScopeId::MAIN, value);
        }
        graph.sort().map_err(|e| Error::Network(e.to_string()))?;
        for pass in [&ShareInitializers as &dyn crate::Pass, &MergeDuplicates, &DropIdentities, &DropDead] {
            pass.apply(&mut self.out, &PassContext::default()).map_err(|e| Error::Network(e.to_string()))?;
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
