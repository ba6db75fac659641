//! What a pass is, what it may know, and what it reports.

use lathe_analysis::{Evaluate, EvaluateError, Facts};
use lathe_ir::{Function, Graph, Model};
use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

/// What a pass claims to lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saving {
    /// Nodes of the graph.
    Nodes,
    /// Stored parameters.
    Parameters,
    /// Floating-point operations.
    Flops,
    /// The largest sum of live activations.
    PeakMemory,
    /// Sampler steps.
    Steps,
}

impl Saving {
    /// How the documentation calls it.
    pub fn name(self) -> &'static str {
        match self {
            Saving::Nodes => "nodes",
            Saving::Parameters => "parameters",
            Saving::Flops => "flops",
            Saving::PeakMemory => "peak memory",
            Saving::Steps => "steps",
        }
    }
}

/// The claim of a pass about error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Exact: every output keeps its bits.
    Identical,
    /// Exact: the same function over the reals, rounded differently.
    Equivalent {
        /// The largest relative L2 difference of an output in float32.
        rtol: f32,
    },
    /// An approximation, accepted only within the user's budget.
    Lossy,
}

impl Kind {
    /// How reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Identical => "identical",
            Kind::Equivalent { .. } => "equivalent",
            Kind::Lossy => "lossy",
        }
    }
}

/// An option of a pass, set with `--set PASS.OPTION=VALUE`.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// Its name.
    pub name: &'static str,
    /// What values it takes: `bytes`, `count`, `true or false`.
    pub unit: &'static str,
    /// The value it has when it is not set.
    pub default: &'static str,
    /// What it does, one line.
    pub doc: &'static str,
}

/// A pass as a user meets it: in the help, the tables and the report.
#[derive(Debug)]
pub struct Info {
    /// Verb and object: `fold-constants`; the file is `fold_constants.rs`.
    pub name: &'static str,
    /// One line without a full stop.
    pub summary: &'static str,
    /// One paragraph: what changes, what it needs, when it declines.
    pub doc: &'static str,
    /// What can be set.
    pub options: &'static [Opt],
    /// The claim about error.
    pub kind: Kind,
    /// The claim about savings.
    pub lowers: &'static [Saving],
    /// The paper or specification.
    pub source: Option<&'static str>,
}

/// Which operators a result may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Target {
    /// Standard operators only.
    #[default]
    Portable,
    /// Operators of ONNX Runtime's `com.microsoft` domain too.
    Ort,
    /// Standard operators, with whole numbers as TensorRT reads them.
    TensorRt,
    /// Standard operators, with whole numbers as OpenVINO reads them.
    OpenVino,
    /// Standard operators, with whole numbers as the HTP of Qualcomm's AI Engine reads them.
    Qnn,
}

/// What a pass may know besides the model.
#[derive(Default)]
pub struct PassContext<'a> {
    /// Which operators may be used.
    pub target: Target,
    /// Bytes by which folding may enlarge the model, over the whole run.
    pub max_growth: u64,
    /// Whether initializers that are listed among the inputs are constants of an old exporter: decided once in a run, on
    /// the model as it was read.
    pub lists_constants: OnceCell<bool>,
    /// Named dimensions that cannot be 0 where the model runs at all: found once in a run, before any Reshape changes.
    pub nonempty: OnceCell<BTreeSet<String>>,
    /// Bytes by which folding has enlarged the model so far in this run.
    pub grown: Cell<u64>,
    /// Bytes of notes that passes have taken off the file so far in this run, which folding may use as well.
    pub saved: Cell<u64>,
    /// Runs models, if anything can.
    pub evaluator: Option<&'a dyn Evaluate>,
    /// Operators of ONNX Runtime's own domain whose kernels are slower, where the result will run, than the nodes they
    /// take the place of.
    pub slow_kernels: BTreeSet<String>,
    /// Operators that the provider on which the result will run has no right kernel for, those of other domains with theirs:
    /// `IsNaN`, `com.microsoft.Gelu`, `Pad:reflect` for a mode. They are not written.
    pub missing_kernels: BTreeSet<String>,
    settings: Settings,
    /// Facts of graphs that have not changed since they were inferred.
    pub facts: FactsCache,
}

/// Facts by graph revision: inference is the dearest part of most passes, and most passes change nothing.
#[derive(Default)]
pub struct FactsCache {
    known: RefCell<Vec<(u64, Facts)>>,
}

impl FactsCache {
    /// How many graphs' facts are kept: the main graph and the local functions being worked on.
    const KEPT: usize = 4;

    /// The facts of `graph` as it is now.
    pub fn take(&self, graph: &Graph, opsets: &[(String, i64)], functions: &[Function]) -> Facts {
        let mut known = self.known.borrow_mut();
        match known.iter().position(|(revision, _)| *revision == graph.revision()) {
            Some(index) => known.remove(index).1,
            None => Facts::of(graph, opsets, functions),
        }
    }

    /// Keeps facts that hold for `graph` as it is now.
    pub fn keep(&self, graph: &Graph, facts: Facts) {
        let mut known = self.known.borrow_mut();
        known.truncate(Self::KEPT - 1);
        known.insert(0, (graph.revision(), facts));
    }
}

/// A setting that is not what its option takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The value of an option cannot be read.
    #[error("`{option}` is set to `{value}`, expected {expected}")]
    Setting {
        /// `PASS.OPTION`.
        option: String,
        /// What was given.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// The nodes of a graph need one another.
    #[error(transparent)]
    Cycle(#[from] lathe_ir::Cycle),
    /// The calibration cannot be read.
    #[error(transparent)]
    Calibration(#[from] EvaluateError),
}

impl PassContext<'_> {
    /// Bytes by which computing constants ahead may still enlarge the model.
    pub fn growth_left(&self) -> u64 {
        self.max_growth.saturating_add(self.saved.get()).saturating_sub(self.grown.get())
    }

    /// Bytes by which copies of weights may still enlarge the model. What notes took is not for more parameters.
    pub fn copies_left(&self) -> u64 {
        self.max_growth.saturating_sub(self.grown.get().saturating_sub(self.saved.get()))
    }

    /// The value of an option of a pass: as set, else its default.
    pub fn setting<T: FromStr>(&self, pass: &Info, option: &str) -> Result<T, Error> {
        self.settings.value(pass, option)
    }
}

impl<'a> PassContext<'a> {
    /// With operators that may be used.
    #[must_use]
    pub fn with_target(self, target: Target) -> Self {
        PassContext { target, ..self }
    }

    /// With something that runs models.
    #[must_use]
    pub fn with_evaluator(self, evaluator: &'a dyn Evaluate) -> Self {
        PassContext { evaluator: Some(evaluator), ..self }
    }

    /// With bytes by which folding may enlarge the model.
    #[must_use]
    pub fn with_max_growth(self, max_growth: u64) -> Self {
        PassContext { max_growth, ..self }
    }

    /// With operators of ONNX Runtime's own domain that are not worth writing.
    #[must_use]
    pub fn with_slow_kernels(self, slow_kernels: BTreeSet<String>) -> Self {
        PassContext { slow_kernels, ..self }
    }

    /// With operators that the provider has no kernel for.
    #[must_use]
    pub fn with_missing_kernels(self, missing_kernels: BTreeSet<String>) -> Self {
        PassContext { missing_kernels, ..self }
    }

    /// With values of options.
    #[must_use]
    pub fn with_settings(self, settings: impl Into<Settings>) -> Self {
        PassContext { settings: settings.into(), ..self }
    }

    /// With the value of one option, `PASS.OPTION`.
    #[must_use]
    pub fn with_setting(mut self, option: &str, value: impl ToString) -> Self {
        self.settings.set(option, value);
        self
    }
}

/// Values of `--set PASS.OPTION=VALUE`, by `PASS.OPTION`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, String>);

impl From<BTreeMap<String, String>> for Settings {
    fn from(values: BTreeMap<String, String>) -> Settings {
        Settings(values)
    }
}

impl FromIterator<(String, String)> for Settings {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(values: I) -> Settings {
        Settings(values.into_iter().collect())
    }
}

impl<const N: usize> From<[(String, String); N]> for Settings {
    fn from(values: [(String, String); N]) -> Settings {
        values.into_iter().collect()
    }
}

impl Settings {
    /// Gives an option, `PASS.OPTION`, a value.
    pub fn set(&mut self, option: &str, value: impl ToString) {
        self.0.insert(option.to_owned(), value.to_string());
    }

    /// The value of an option of a pass: as set, else its default.
    pub fn value<T: FromStr>(&self, pass: &Info, option: &str) -> Result<T, Error> {
        let opt = pass.options.iter().find(|o| o.name == option).expect("a pass reads the options it declares");
        let key = format!("{}.{option}", pass.name);
        let value = self.0.get(&key).map_or(opt.default, String::as_str);
        value.parse().map_err(|_| Error::Setting { option: key, value: value.to_owned(), expected: opt.unit })
    }
}

/// One edit that a pass made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The rule or step: `compose-transposes`.
    pub what: String,
    /// Where, as `Graph::describe` names it.
    pub place: String,
}

/// What a pass did and what it could not do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The edits. A pass that lists none left the model as it was.
    pub changes: Vec<Change>,
    /// Reasons for what was not done, with how often each came up and the first place.
    pub refusals: BTreeMap<String, (usize, String)>,
}

impl Outcome {
    /// Records an edit.
    pub fn change(&mut self, what: impl Into<String>, place: impl Into<String>) {
        self.changes.push(Change { what: what.into(), place: place.into() });
    }

    /// Records something that was not done.
    pub fn refuse(&mut self, reason: impl Into<String>, place: impl Into<String>) {
        let entry = self.refusals.entry(reason.into()).or_insert_with(|| (0, place.into()));
        entry.0 += 1;
    }

    /// Adds what another run of the same pass did.
    pub fn merge(&mut self, other: Outcome) {
        self.changes.extend(other.changes);
        for (reason, (count, place)) in other.refusals {
            let entry = self.refusals.entry(reason).or_insert_with(|| (0, place));
            entry.0 += count;
        }
    }
}

/// A pass: one idea, one file.
pub trait Pass: Sync {
    /// The pass as a user meets it.
    fn info(&self) -> &'static Info;

    /// Rewrites `model`, or leaves it as it was and says why.
    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error>;
}
