//! The main job: read, simplify, prove, write, report.

mod exact;
mod interface;
mod kv_cache;
mod lines;
mod precision;
mod prepare;
mod quantization;

pub use self::{interface::Interface, kv_cache::CacheOptions, precision::PrecisionOptions};
pub(crate) use self::{
    lines::{pass_line, side, verify},
    prepare::prepare,
};

use crate::{
    Budget, Failure, PassRecord, Report, RunOptions, Selection, Sets,
    compress::{self, Bench, Exact, Finish, Fitted},
    kernels,
    latency::{Latency, Measurement},
    layers,
    report::{self, Side, Verify},
    runner::Runner,
    similar::did_you_mean,
};
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{DataType, External, Loaded, Model, Staged, WriteOptions};
use lathe_passes::{
    PASSES, Pass, PassContext, Quantity, Target,
    lossy::{METHODS, Method, MethodContext, OLDEST_OPSET, allocate},
};
use lathe_runtime::{BenchInputs, ChosenSamples, InputSpec, RunEvent, SampleSet, SetSpec};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::{Path, PathBuf},
    time::Instant,
};

/// What to do to which model.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model file.
    pub model: PathBuf,
    /// Where the result goes; `None` runs everything and writes nothing.
    pub output: Option<PathBuf>,
    /// Whether the result may replace the model itself.
    pub overwrite: bool,
    /// Which passes run.
    pub selection: Selection,
    /// `PASS.OPTION` settings.
    pub settings: BTreeMap<String, String>,
    /// Which operators the result may use.
    pub target: Target,
    /// The standard operator set to upgrade to.
    pub opset: Option<i64>,
    /// Bytes by which folding may enlarge the file.
    pub max_growth: u64,
    /// Whether weights go to a file of their own even where they need not.
    pub external: External,
    /// Whether the result is run beside the original.
    pub verify: bool,
    /// Seconds to spend on timing it beside the original; `None` does not time it.
    pub bench: Option<f64>,
    /// Whether it is run after every pass.
    pub paranoid: bool,
    /// Whether the report counts the FLOPs that each pass saves.
    pub detailed: bool,
    /// Sets that the result is run on instead of random inputs.
    pub sets: Sets,
    /// What lossy methods may spend; without a budget none runs.
    pub budget: Budget,
    /// Inputs and outputs that the result has instead of the model's.
    pub interface: Interface,
    /// The half precision that the result is converted to.
    pub precision: Option<PrecisionOptions>,
    /// The numbers in which key-value caches are kept.
    pub cache: Option<CacheOptions>,
    /// How many samples to choose of the calibration set; `None` keeps all.
    pub calib_select: Option<usize>,
    /// How models are run.
    pub run: RunOptions,
    /// The command line, for the report.
    pub command: Vec<String>,
}

impl Options {
    /// All exact passes on `model`, and nothing else: the result is written to `output` without being run.
    pub fn exact(model: PathBuf, output: PathBuf, run: RunOptions) -> Options {
        Options {
            model,
            output: Some(output),
            overwrite: false,
            selection: Selection::default(),
            settings: BTreeMap::new(),
            target: Target::Portable,
            opset: None,
            max_growth: 0,
            external: External::Auto,
            verify: false,
            bench: None,
            paranoid: false,
            detailed: false,
            sets: Sets::default(),
            budget: Budget::default(),
            interface: Interface::default(),
            precision: None,
            cache: None,
            calib_select: None,
            run,
            command: Vec::new(),
        }
    }
}

/// What a successful job leaves.
#[derive(Debug)]
pub struct Done {
    /// The report.
    pub report: Report,
    /// The files written: the model, and its data file if it has one.
    pub files: Vec<PathBuf>,
}

/// The stages of a job, with their usual shares of the time: without a budget, and with one.
const EXACT_STAGES: [(&str, f64); 1] = [("simplify and prove", 1.0)];
const LOSSY_STAGES: [(&str, f64); 6] = [
    EXACT_STAGES[0],
    ("statistics", 3.0),
    ("sensitivities", 2.0),
    ("propose", 8.0),
    ("price", 2.0),
    ("fit the budget", 4.0),
];

/// Samples that exact passes are verified on where a budget is spent afterwards.
const EXACT_SAMPLES: usize = 16;

/// Why a result whose inputs change is not timed.
const TIMED_INPUTS: &str =
    "--latency runs both models on the same inputs, whose types :io changes; leave one of them out";

/// The oldest operator set in which what is quantized can be dequantized to half precision.
const HALF_CODES: i64 = 19;

/// Why caches change in a run of their own.
const CACHE_ALONE: &str = "--kv-cache changes caches and nothing else: give a budget to its result, with a set whose caches have the new \
                           type; --dtype does not go with it";

/// Whether settings ask for a lossy method, budget or not.
fn is_requested(options: &Options, method: &dyn Method) -> Result<bool, Failure> {
    let cx = MethodContext::new(options.target, Vec::new(), options.settings.clone());
    let asked = method.is_requested(&cx).map_err(anyhow::Error::from)?;
    Ok(asked && options.selection.admits(method.info().name))
}

/// Of the methods that may lower what a budget limits, the one that writes the newest operators; `None` where nothing may
/// be lost.
fn newest(options: &Options) -> Option<&'static dyn Method> {
    let limited = options.budget.limited();
    let admitted = METHODS.iter().copied().filter(|m| options.selection.admits(m.info().name) && m.serves(&limited));
    // Of several the first.
    admitted.rev().max_by_key(|m| m.operator_set()).filter(|_| options.budget.is_given())
}

/// Whether a model computes anything in half precision.
fn has_half(model: &Model) -> bool {
    let (graph, facts) = (&model.graph, Facts::infer(model));
    let half = |value| matches!(facts.elem(value), Some(DataType::Float16 | DataType::Bfloat16));
    let nodes = graph.all_nodes();
    nodes.iter().flat_map(|&id| graph.node(id).outputs().iter().flatten().copied()).any(half)
}

/// Does the main job. Nothing is written unless it succeeds.
pub fn optimize(options: &Options) -> Result<Done, Failure> {
    let start = Instant::now();
    if let Some(output) = &options.output {
        check_output(&options.model, output, options.overwrite)?;
    }
    let chosen = options.selection.of(PASSES)?;
    check_settings(options)?;
    let mut loaded =
        Model::read(&options.model).with_context(|| format!("cannot use `{}`", options.model.display()))?;
    let on_set = options.sets.calibration.is_some() || options.sets.validation.is_some();
    let changed = options.interface.change(&mut loaded.model, &options.model, on_set)?;
    let reference = changed.reference.as_ref().map_or(options.model.as_path(), |changed| changed.path());
    let inputs = InputSpec { sizes: changed.sizes, ..options.run.inputs.clone() };
    let options = &Options { run: RunOptions { inputs, ..options.run.clone() }, ..options.clone() };
    let set = options.sets.check(&loaded.model)?;
    let old = loaded.model.opset();
    let opset = options.opset.or_else(|| Some(newest(options)?.operator_set()).filter(|&o| old < o));
    let mut lossy = options.budget.is_given();
    for &method in METHODS {
        lossy |= is_requested(options, method)?;
    }
    let is_timed = options.budget.is_given() && options.budget.limited().contains(&Quantity::Latency);
    if is_timed && options.precision.is_some_and(|asked| asked.precision.interface) {
        return Err(Failure::Usage(TIMED_INPUTS.to_owned()));
    }
    if let Some(asked) = options.cache {
        if lossy || options.precision.is_some() {
            return Err(Failure::Usage(CACHE_ALONE.to_owned()));
        }
        kv_cache::check(asked, &options.run.load.provider, options.sets.calibration.as_ref())?;
    }
    let few = match set.as_ref().filter(|_| lossy || options.cache.is_some()) {
        Some((spec, _)) => {
            Some(SampleSet::open(spec, &loaded.model).map_err(anyhow::Error::from)?.spread(EXACT_SAMPLES))
        }
        None => None,
    };
    let runner = Runner::new(&options.run)?;
    let half = || options.precision.is_some() || has_half(&loaded.model);
    let missing_kernels = kernels::missing(&options.run, half);
    let job = Job { options, reference, set, lossy, few, runner: &runner, opset, methods: None, missing_kernels };
    let used = match job.run(&loaded, chosen.clone(), start)? {
        Finished::Done(done) => return Ok(*done),
        Finished::Upgraded(used) => used,
    };
    // What was chosen can be written without the newer operators, so the model keeps its own where that works out.
    let opset = Some(needed(options, &used)).filter(|&needed| old < needed);
    let job = Job { methods: Some(used), ..job };
    let kept = Job {
        opset,
        set: job.set.clone(),
        few: job.few.clone(),
        methods: job.methods.clone(),
        missing_kernels: job.missing_kernels.clone(),
        ..job
    };
    let finished = match kept.run(&loaded, chosen.clone(), start) {
        Err(Failure::Refused(_)) => job.run(&loaded, chosen, start)?,
        finished => finished?,
    };
    match finished {
        Finished::Done(done) => Ok(*done),
        Finished::Upgraded(_) => unreachable!("a job whose methods are settled is carried out"),
    }
}

/// The operator set that these methods write, such that what is around it can be half precision if that is asked for.
fn needed(options: &Options, methods: &[&'static str]) -> i64 {
    let sets = METHODS.iter().filter(|m| methods.contains(&m.info().name)).map(|m| m.operator_set());
    match sets.fold(OLDEST_OPSET, i64::max) {
        OLDEST_OPSET => OLDEST_OPSET,
        written if options.precision.is_some() => written.max(HALF_CODES),
        written => written,
    }
}

pub(crate) fn check_output(model: &Path, output: &Path, overwrite: bool) -> Result<(), Failure> {
    let same = match (model.canonicalize(), output.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    if same && !overwrite {
        let message = format!("`{}` is the model itself; give another path, or --overwrite", output.display());
        return Err(Failure::Error(anyhow!(message)));
    }
    if output.is_dir() {
        return Err(Failure::Error(anyhow!("`{}` is a folder, expected a file to write", output.display())));
    }
    Ok(())
}

/// Settings must name options that exist.
fn check_settings(options: &Options) -> Result<(), Failure> {
    let methods = METHODS.iter().map(|m| m.info()).chain([&allocate::INFO]);
    let infos = PASSES.iter().map(|p| p.info()).chain(methods);
    let known: Vec<String> =
        infos.flat_map(|info| info.options.iter().map(|o| format!("{}.{}", info.name, o.name))).collect();
    for key in options.settings.keys() {
        if !known.contains(key) {
            let meant = did_you_mean(key, known.iter().map(String::as_str));
            let message = "`optimize explain PASS` lists the options of a pass";
            return Err(Failure::Usage(format!("there is no option `{key}`; {message}{meant}")));
        }
    }
    Ok(())
}

/// What comes of a job.
enum Finished {
    Done(Box<Done>),
    /// The model was upgraded for a budget, which is spent by these methods, and they need no operator set as new.
    Upgraded(Vec<&'static str>),
}

/// What comes of spending a budget.
enum Spent {
    Within(Box<Outcome>),
    /// As [`Finished::Upgraded`].
    Upgraded(Vec<&'static str>),
}

struct Job<'a> {
    options: &'a Options,
    /// What results are run beside: the model, or a copy of it with the interface that was asked for.
    reference: &'a Path,
    /// The set that the result is compared on, and which one it is; random inputs without one.
    set: Option<(SetSpec, &'static str)>,
    runner: &'a Runner,
    /// Whether a budget is given or settings ask for a lossy method.
    lossy: bool,
    /// Samples of that set on which exact passes are verified before a budget is spent; `None` for all.
    few: Option<Vec<usize>>,
    /// The standard operator set to upgrade to.
    opset: Option<i64>,
    /// The lossy methods that may act, where that is settled; `None` for all that were not skipped.
    methods: Option<Vec<&'static str>>,
    /// Operators that the provider has no kernel for.
    missing_kernels: BTreeSet<String>,
}

/// What a run starts from.
struct Prepared<'a> {
    loaded: &'a Loaded,
    /// The original as reports count it.
    input: Side,
    /// The original with its nodes in order, unambiguous names and no default that is never used.
    model: Model,
    /// Where the result will be written, and how.
    target: PathBuf,
    write: WriteOptions,
}

/// A result before it is written.
struct Outcome {
    model: Model,
    staged: Staged,
    verify: Option<Verify>,
    plan: Option<report::Plan>,
    latency: Option<Latency>,
    precision: Option<report::PrecisionReport>,
    records: Vec<PassRecord>,
}

impl Job<'_> {
    /// Reads as ARCHITECTURE tells it: prepare, simplify and prove, spend the budget, time, write, report.
    fn run(&self, loaded: &Loaded, passes: Vec<&dyn Pass>, start: Instant) -> Result<Finished, Failure> {
        let mut warnings = loaded.warnings.clone();
        let calibration = self.select()?;
        let prepared = self.prepare(loaded, &mut warnings)?;
        let exact::Proven { mut outcome, dropped } = {
            let progress = &self.options.run.progress;
            progress.tell(&RunEvent::Plan(if self.lossy { LOSSY_STAGES.to_vec() } else { EXACT_STAGES.to_vec() }));
            let _span = progress.stage(EXACT_STAGES[0].0);
            self.simplify_and_prove(&prepared, passes, &mut warnings)?
        };
        if self.lossy {
            let chosen = calibration.as_ref().map(|c| c.chosen.clone());
            outcome = match self.spend(&prepared, outcome, chosen, &mut warnings)? {
                Spent::Within(outcome) => *outcome,
                Spent::Upgraded(used) => return Ok(Finished::Upgraded(used)),
            };
        }
        // A budget has been spent on the file that is written, in half precision if that is asked for.
        if let Some(asked) = self.options.precision.filter(|_| !self.lossy) {
            outcome = self.to_half(&prepared, outcome, asked, &mut warnings)?;
        }
        let mut caches = None;
        if let Some((asked, given)) = self.options.cache.zip(self.options.sets.calibration.as_ref()) {
            let chosen = calibration.as_ref().map(|c| c.chosen.clone());
            let set = SetSpec { chosen: chosen.or_else(|| given.chosen.clone()), ..given.clone() };
            let (quantized, report) = self.quantize_caches(&prepared, outcome, asked, &set, &dropped)?;
            (outcome, caches) = (quantized, Some(report));
        }
        // The samples of a set have caches of other types.
        if outcome.latency.is_none() && caches.is_none() {
            outcome.latency = self.measure(outcome.staged.path(), &prepared.target, &mut warnings)?;
        }
        let quantization = self.quantization(&outcome.model, outcome.staged.path(), &outcome.records, &mut warnings);
        let Outcome { model, staged, verify, plan, latency, precision: half, mut records } = outcome;
        let written = staged.written().clone();
        let mut output = side(&prepared.target, &model, written.file_bytes + written.data_bytes);
        let files = self.commit(&prepared, &model, staged)?;
        if files.is_empty() {
            output.path = String::new();
        }
        records.extend(dropped);
        let report = Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: self.options.command.clone(),
            seed: self.options.run.inputs.seed,
            calibration,
            input: prepared.input,
            output,
            passes: records.iter().map(pass_line).collect(),
            plan,
            auto: None,
            precision: half,
            kv_cache: caches,
            quantization,
            verify,
            latency,
            layers: layers::largest(&model, &cost(&model)),
            warnings,
            seconds: start.elapsed().as_secs_f64(),
            peak_rss_bytes: report::peak_rss_bytes(),
        };
        Ok(Finished::Done(Box::new(Done { report, files })))
    }

    /// Puts the model in order, and says what is odd about it.
    fn prepare<'l>(&self, loaded: &'l Loaded, warnings: &mut Vec<String>) -> Result<Prepared<'l>, Failure> {
        let options = self.options;
        let data_bytes: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
        let original = &loaded.model;
        let mut model = original.clone();
        warnings.extend(prepare(&mut model)?);
        if let (None, Some(opset)) = (options.opset, self.opset) {
            let old = original.opset();
            let whose = self
                .writer(opset)
                .map_or("in which models are compressed".to_owned(), |name| format!("which `{name}` writes"));
            warnings.push(format!("the model is upgraded from operator set {old} to {opset}, {whose}"));
        }
        let external = if loaded.data_files.is_empty() { options.external } else { External::Always };
        Ok(Prepared {
            loaded,
            input: side(&options.model, original, loaded.file_bytes + data_bytes),
            model,
            target: options.output.clone().unwrap_or_else(|| options.model.with_extension("optimized.onnx")),
            write: WriteOptions { external },
        })
    }

    /// The result within the budget. Methods see the `chosen` samples of the calibration set, or all.
    fn spend(
        &self,
        prepared: &Prepared<'_>,
        exact: Outcome,
        chosen: Option<Vec<usize>>,
        warnings: &mut Vec<String>,
    ) -> Result<Spent, Failure> {
        let Prepared { input, target, write, .. } = prepared;
        let found = Exact { model: &exact.model, staged: &exact.staged, original: input, target, write };
        let mut fitted = self.compress(&found, chosen, warnings)?;
        if let Some(used) = self.upgraded_for_less(&fitted.records) {
            return Ok(Spent::Upgraded(used));
        }
        let precision = fitted.half.take().map(|half| self.judge_half(&mut fitted, *half, warnings)).transpose()?;
        let Fitted { model, staged, verify, plan, records, mut latency, .. } = fitted;
        if let Some(after) = latency.as_mut().and_then(|l| l.after.as_mut()) {
            after.path = target.display().to_string();
        }
        let verify = verify.or(exact.verify);
        let records = exact.records.into_iter().chain(records).collect();
        Ok(Spent::Within(Box::new(Outcome { model, staged, verify, plan: Some(plan), latency, precision, records })))
    }

    /// Writes the result where that is asked for, and says which files it wrote.
    fn commit(&self, prepared: &Prepared<'_>, model: &Model, staged: Staged) -> Result<Vec<PathBuf>, Failure> {
        Failure::if_stopped(&self.options.run.progress)?;
        if self.options.output.is_none() {
            return Ok(Vec::new());
        }
        let target = &prepared.target;
        let has_data = staged.written().data_bytes > 0;
        staged.commit()?;
        let mut files = vec![target.clone()];
        if has_data {
            let mut data = target.clone().into_os_string();
            data.push(".data");
            files.push(data.into());
        }
        if model.renamed() != prepared.loaded.model.renamed() {
            files.push(write_names(target, model)?);
        }
        Ok(files)
    }

    /// The method that needs an operator set as new as the model is upgraded to.
    fn writer(&self, opset: i64) -> Option<&'static str> {
        match &self.methods {
            None => newest(self.options).map(|method| method.info().name),
            Some(methods) => methods.iter().copied().find(|&name| needed(self.options, &[name]) == opset),
        }
    }

    /// The methods that changed something, if the model was upgraded for others.
    fn upgraded_for_less(&self, records: &[PassRecord]) -> Option<Vec<&'static str>> {
        let opset = self.opset.filter(|_| self.options.opset.is_none() && self.methods.is_none())?;
        let changed = records.iter().filter(|record| !record.outcome.changes.is_empty());
        let used: Vec<&'static str> = changed.map(|record| record.name).collect();
        (needed(self.options, &used) < opset).then_some(used)
    }

    /// Chooses samples of the calibration set if that is asked for.
    fn select(&self) -> Result<Option<ChosenSamples>, Failure> {
        let Some((set, count)) = self.options.sets.calibration.as_ref().zip(self.options.calib_select) else {
            return Ok(None);
        };
        Ok(Some(self.runner.select(self.reference, set, count, self.options.run.inputs.seed)?))
    }

    fn context(&self) -> PassContext<'_> {
        let mut settings = self.options.settings.clone();
        if let Some(opset) = self.opset {
            settings.insert("upgrade-opset.to".to_owned(), opset.to_string());
        }
        if self.options.cache.is_some() {
            settings.entry("fuse-attention.grouped-caches".to_owned()).or_insert_with(|| "true".to_owned());
        }
        PassContext::default()
            .with_target(self.options.target)
            .with_max_growth(self.options.max_growth)
            .with_evaluator(self.runner)
            .with_slow_kernels(kernels::slower(&self.options.run.load.provider))
            .with_missing_kernels(self.missing_kernels.clone())
            .with_settings(settings)
    }

    /// Spends the budgets. Methods see the `chosen` samples of the calibration set, or all.
    fn compress(
        &self,
        exact: &Exact<'_>,
        chosen: Option<Vec<usize>>,
        warnings: &mut Vec<String>,
    ) -> Result<Fitted, Failure> {
        let options = self.options;
        let given = options.sets.calibration.as_ref();
        let given = given.context("lossy methods choose by what is seen on a calibration set, and none is given")?;
        let calibration = SetSpec { chosen: chosen.or_else(|| given.chosen.clone()), ..given.clone() };
        let mut required = Vec::new();
        for &method in METHODS {
            if is_requested(options, method)? {
                required.push(method.info().name);
            }
        }
        let is_open = |method: &&dyn Method| {
            let name = method.info().name;
            options.selection.admits(name) && self.methods.as_ref().is_none_or(|methods| methods.contains(&name))
        };
        let passes = self.context();
        let halving = options.precision.map(|asked| precision::Halving { job: self, asked, exact });
        let bench = Bench {
            runner: self.runner,
            run: &options.run,
            original: self.reference,
            seconds: options.bench.unwrap_or(0.0),
            inputs: match options.run.inputs.shapes.is_empty() {
                true => BenchInputs::Set(calibration.clone()),
                false => BenchInputs::Random(options.run.inputs.clone()),
            },
            passes: &passes,
            set: self.set.clone(),
            verify: options.verify,
            finish: halving.as_ref().map(|halving| halving as &dyn Finish),
        };
        let request = compress::Request {
            budget: &options.budget,
            methods: METHODS.iter().copied().filter(is_open).collect(),
            required,
            calibration,
            cx: MethodContext::new(options.target, Vec::new(), options.settings.clone()),
            solver: self.context().setting(&allocate::INFO, "solver")?,
            asks_all: options.budget.thorough || options.selection.only.is_some(),
        };
        compress::compress(&bench, exact, &request, warnings)
    }

    /// What models are timed on.
    fn timed_inputs(&self) -> BenchInputs {
        match &self.set {
            Some((spec, _)) => BenchInputs::Set(spec.clone()),
            None => BenchInputs::Random(self.options.run.inputs.clone()),
        }
    }

    /// Times the candidate beside the original if that was asked for. Where a provider other than the CPU runs models,
    /// nodes that it leaves to others are named in a warning, and one that takes none is an error.
    fn measure(&self, candidate: &Path, target: &Path, warnings: &mut Vec<String>) -> Result<Option<Latency>, Failure> {
        let inputs = self.timed_inputs();
        let models = [self.reference, candidate];
        let measurement = Measurement {
            run: &self.options.run,
            models: &models,
            inputs: &inputs,
            seconds: self.options.bench.unwrap_or(0.0),
        };
        if self.options.bench.is_some() {
            let mut latency = measurement.run(&mut |_| {}).context("the latency cannot be measured")?;
            if let Some(after) = &mut latency.after {
                after.path = target.display().to_string();
            }
            warnings.extend(latency.notes());
            return Ok(Some(latency));
        }
        if self.options.verify {
            let alone = Measurement { models: &models[1..], ..measurement };
            warnings.extend(alone.left_behind()?);
        }
        Ok(None)
    }
}

fn cost(model: &Model) -> Cost {
    Cost::of(model, &Facts::infer(model), &Bindings::default())
}

/// Writes which inputs and outputs are gone or have other names beside a model that was written.
fn write_names(target: &Path, model: &Model) -> Result<PathBuf, Failure> {
    let mut path = target.to_owned().into_os_string();
    path.push(".names.json");
    let path = PathBuf::from(path);
    let names = serde_json::to_string_pretty(&serde_json::json!({ "renamed": model.renamed() }));
    let names = names.expect("names are text");
    let written = lathe_ir::write_whole(&path, |out| out.write_all(names.as_bytes()));
    written.with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(path)
}
