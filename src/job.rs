//! The main job: read, simplify, prove, write, report.

mod lines;
mod prepare;

pub(crate) use self::{
    lines::{pass_line, side, verify},
    prepare::prepare,
};

use self::prepare::state_outputs;
use crate::{
    Budget, Failure, PassRecord, Report, RunOptions, Selection, Sets,
    compress::{self, Bench, Exact, Fitted},
    latency::{Latency, Measurement},
    layers,
    pipeline::{self, Broken, Run},
    report::{self, Verify},
    runner::Runner,
};
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::{External, Loaded, Model, WriteOptions};
use lathe_passes::{
    Kind, PASSES, Pass, PassContext, Target,
    lossy::{METHODS, Method, MethodContext, OLDEST_OPSET, allocate},
};
use lathe_runtime::{BenchInputs, ChosenSamples, Claim, Inputs, Progress, SampleSet, SetSpec, Verdict};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The claim about a whole run. Bits are expected of a single pass only: a runtime packs weights that have become
/// constant, and then sums in another order.
const WHOLE: Claim = Claim::Equivalent { rtol: None };

/// Passes that are dropped one after another before the tool gives up on a model.
const MOST_CULPRITS: usize = 8;

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
    /// How many samples to choose of the calibration set; `None` keeps all.
    pub calib_select: Option<usize>,
    /// How models are run.
    pub run: RunOptions,
    /// The command line, for the report.
    pub command: Vec<String>,
}

/// What a successful job leaves.
#[derive(Debug)]
pub struct Done {
    /// The report.
    pub report: Report,
    /// The files written: the model, and its data file if it has one.
    pub files: Vec<PathBuf>,
}

/// Samples that exact passes are verified on where a budget is spent afterwards.
const EXACT_SAMPLES: usize = 16;

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

/// Does the main job. Nothing is written unless it succeeds.
pub fn optimize(options: &Options) -> Result<Done, Failure> {
    let start = Instant::now();
    if let Some(output) = &options.output {
        check_output(&options.model, output, options.overwrite)?;
    }
    let chosen = options.selection.of(PASSES).map_err(Failure::Usage)?;
    check_settings(options)?;
    let loaded = Model::read(&options.model).with_context(|| format!("cannot use `{}`", options.model.display()))?;
    let set = options.sets.check(&loaded.model)?;
    let old = loaded.model.opset();
    let opset = options.opset.or_else(|| Some(newest(options)?.operator_set()).filter(|&o| old < o));
    let mut lossy = options.budget.is_given();
    for &method in METHODS {
        lossy |= is_requested(options, method)?;
    }
    let few = match set.as_ref().filter(|_| lossy) {
        Some((spec, _)) => {
            Some(SampleSet::open(spec, &loaded.model).map_err(anyhow::Error::from)?.spread(EXACT_SAMPLES))
        }
        None => None,
    };
    let runner = Runner::new(&options.run)?;
    let job = Job { options, set, lossy, few, runner: &runner, opset, methods: None };
    let used = match job.run(&loaded, chosen.clone(), start)? {
        Finished::Done(done) => return Ok(*done),
        Finished::Upgraded(used) => used,
    };
    // What was chosen can be written without the newer operators, so the model keeps its own where that works out.
    let opset = Some(needed(&used)).filter(|&needed| old < needed);
    let job = Job { methods: Some(used), ..job };
    let kept = Job { opset, set: job.set.clone(), few: job.few.clone(), methods: job.methods.clone(), ..job };
    let finished = match kept.run(&loaded, chosen.clone(), start) {
        Err(Failure::Refused(_)) => job.run(&loaded, chosen, start)?,
        finished => finished?,
    };
    match finished {
        Finished::Done(done) => Ok(*done),
        Finished::Upgraded(_) => unreachable!("a job whose methods are settled is carried out"),
    }
}

/// The operator set that these methods write.
fn needed(methods: &[&'static str]) -> i64 {
    let sets = METHODS.iter().filter(|m| methods.contains(&m.info().name)).map(|m| m.operator_set());
    sets.fold(OLDEST_OPSET, i64::max)
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
    for key in options.settings.keys() {
        let methods = METHODS.iter().map(|m| m.info()).chain([&allocate::INFO]);
        let infos = PASSES.iter().map(|p| p.info()).chain(methods);
        let known = infos
            .into_iter()
            .any(|info| info.options.iter().any(|o| key.strip_prefix(info.name) == Some(&format!(".{}", o.name))));
        if !known {
            let message = format!("there is no option `{key}`; `optimize explain PASS` lists the options of a pass");
            return Err(Failure::Usage(message));
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

struct Job<'a> {
    options: &'a Options,
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
}

/// The result of the passes, before it is written.
struct Simplified {
    model: Model,
    records: Vec<PassRecord>,
    applied: usize,
}

impl Job<'_> {
    fn run(&self, loaded: &Loaded, mut passes: Vec<&dyn Pass>, start: Instant) -> Result<Finished, Failure> {
        let options = self.options;
        let mut warnings = loaded.warnings.clone();
        let data_bytes: u64 = loaded.data_files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
        let original = &loaded.model;
        let input = side(&options.model, original, loaded.file_bytes + data_bytes);
        let calibration = self.select()?;
        let mut prepared = original.clone();
        warnings.extend(prepare(&mut prepared)?);
        if let (None, Some(opset)) = (options.opset, self.opset) {
            let old = original.opset();
            let whose = self
                .writer(opset)
                .map_or("in which models are compressed".to_owned(), |name| format!("which `{name}` writes"));
            warnings.push(format!("the model is upgraded from operator set {old} to {opset}, {whose}"));
        }
        let external = if loaded.data_files.is_empty() { options.external } else { External::Always };
        let write = WriteOptions { external };
        let target = options.output.clone().unwrap_or_else(|| options.model.with_extension("optimized.onnx"));
        let mut dropped: Vec<PassRecord> = Vec::new();
        loop {
            let simplified = match self.simplify(&prepared, &passes)? {
                Ok(simplified) => simplified,
                Err(broken) => {
                    warnings.push(format!("pass `{}` was left out: {}", broken.pass, broken.reason));
                    leave_out(&mut passes, &mut dropped, broken)?;
                    continue;
                }
            };
            let Simplified { mut model, mut records, applied } = simplified;
            state_outputs(&mut model);
            model.check().context("the result is not a valid model; this is a fault of this program")?;
            let staged = model.stage(&target, &write).map_err(|e| Failure::Error(e.into()))?;
            let mut verify = None;
            if options.verify {
                match self.judge(staged.path())? {
                    Judgement::Holds(found) => verify = Some(*found),
                    Judgement::Fails(reason) => {
                        drop(staged);
                        let mut holds = |model: &Model| self.holds(model, &target, &write);
                        let cx = self.context();
                        let culprit = match applied {
                            0 => return Err(Failure::Refused(format!("the model cannot be verified: {reason}"))),
                            _ => pipeline::bisect(&prepared, &cx, &passes, applied, &mut holds)?,
                        };
                        warnings.push(format!("pass `{culprit}` was left out: {reason}"));
                        leave_out(&mut passes, &mut dropped, Broken { pass: culprit, reason })?;
                        continue;
                    }
                }
            }
            let mut plan = None;
            let mut staged = staged;
            let mut latency = None;
            if self.lossy {
                let exact = Exact { model: &model, staged: &staged, original: &input, target: &target, write: &write };
                let chosen = calibration.as_ref().map(|c| c.chosen.clone());
                let found = self.compress(&exact, chosen, &mut warnings)?;
                if let Some(used) = self.upgraded_for_less(&found.records) {
                    return Ok(Finished::Upgraded(used));
                }
                (model, staged, verify) = (found.model, found.staged, found.verify.or(verify));
                (plan, latency) = (Some(found.plan), found.latency);
                if let Some(after) = latency.as_mut().and_then(|l| l.after.as_mut()) {
                    after.path = target.display().to_string();
                }
                records.extend(found.records);
            }
            let latency = match latency {
                Some(latency) => Some(latency),
                None => self.measure(staged.path(), &target, &mut warnings)?,
            };
            let written = staged.written().clone();
            let mut output = side(&target, &model, written.file_bytes + written.data_bytes);
            let mut files = Vec::new();
            Failure::if_stopped(&options.run.progress)?;
            if options.output.is_some() {
                staged.commit().map_err(|e| Failure::Error(e.into()))?;
                files.push(target.clone());
                if written.data_bytes > 0 {
                    let mut data = target.clone().into_os_string();
                    data.push(".data");
                    files.push(data.into());
                }
                if model.renamed() != original.renamed() {
                    files.push(write_names(&target, &model)?);
                }
            } else {
                output.path = String::new();
            }
            records.extend(dropped);
            let report = Report {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                command: options.command.clone(),
                seed: options.run.inputs.seed,
                calibration,
                input,
                output,
                passes: records.iter().map(pass_line).collect(),
                plan,
                auto: None,
                verify,
                latency,
                layers: layers::largest(&model, &cost(&model)),
                warnings,
                seconds: start.elapsed().as_secs_f64(),
                peak_rss_bytes: report::peak_rss_bytes(),
            };
            return Ok(Finished::Done(Box::new(Done { report, files })));
        }
    }

    /// The method that needs an operator set as new as the model is upgraded to.
    fn writer(&self, opset: i64) -> Option<&'static str> {
        match &self.methods {
            None => newest(self.options).map(|method| method.info().name),
            Some(methods) => methods.iter().copied().find(|&name| needed(&[name]) == opset),
        }
    }

    /// The methods that changed something, if the model was upgraded for others.
    fn upgraded_for_less(&self, records: &[PassRecord]) -> Option<Vec<&'static str>> {
        let opset = self.opset.filter(|_| self.options.opset.is_none() && self.methods.is_none())?;
        let changed = records.iter().filter(|record| !record.outcome.changes.is_empty());
        let used: Vec<&'static str> = changed.map(|record| record.name).collect();
        (needed(&used) < opset).then_some(used)
    }

    /// Chooses samples of the calibration set if that is asked for.
    fn select(&self) -> Result<Option<ChosenSamples>, Failure> {
        let Some((set, count)) = self.options.sets.calibration.as_ref().zip(self.options.calib_select) else {
            return Ok(None);
        };
        Ok(Some(self.runner.select(&self.options.model, set, count, self.options.run.inputs.seed)?))
    }

    fn context(&self) -> PassContext<'_> {
        let mut settings = self.options.settings.clone();
        if let Some(opset) = self.opset {
            settings.insert("upgrade-opset.to".to_owned(), opset.to_string());
        }
        PassContext::default()
            .with_target(self.options.target)
            .with_max_growth(self.options.max_growth)
            .with_evaluator(self.runner)
            .with_slow_kernels(crate::kernels::slower(&self.options.run.load.provider))
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
        let bench = Bench {
            runner: self.runner,
            run: &options.run,
            original: &options.model,
            seconds: options.bench.unwrap_or(0.0),
            inputs: match options.run.inputs.shapes.is_empty() {
                true => BenchInputs::Set(calibration.clone()),
                false => BenchInputs::Random(options.run.inputs.clone()),
            },
            passes: self.context(),
            set: self.set.clone(),
            verify: options.verify,
        };
        let request = compress::Request {
            budget: &options.budget,
            methods: METHODS.iter().copied().filter(is_open).collect(),
            required,
            calibration,
            cx: MethodContext::new(options.target, Vec::new(), options.settings.clone()),
            solver: self.context().setting(&allocate::INFO, "solver")?,
        };
        compress::compress(&bench, exact, &request, warnings)
    }

    /// Runs the passes on a copy of `prepared`.
    fn simplify(&self, prepared: &Model, passes: &[&dyn Pass]) -> Result<Result<Simplified, Broken>, Failure> {
        let mut model = prepared.clone();
        let cx = self.context();
        let mut seen = prepared.clone();
        let mut trouble = None;
        let mut watch = |model: &Model, pass: &dyn Pass| {
            if !(self.options.paranoid || cfg!(debug_assertions)) {
                return Ok(None);
            }
            let broken = |reason: String| Broken { pass: pass.info().name, reason };
            model.check().map_err(|e| broken(format!("it leaves an invalid model: {e}")))?;
            if !(self.options.paranoid && self.options.verify) {
                return Ok(None);
            }
            match self.compare_models(&seen, model, claim_of(pass.info().kind)) {
                Ok(Verdict::Compared(report)) if report.comparison.holds() => {
                    seen = model.clone();
                    Ok(report.comparison.worst().map(|output| output.rel_l2))
                }
                Ok(verdict) => Err(broken(verdict.describe())),
                Err(error) => {
                    trouble = Some(error);
                    Err(broken(String::new()))
                }
            }
        };
        let count = |model: &Model| flops(model);
        let tell = |done: usize| {
            self.options.run.progress.hear(&Progress::new(done, passes.len(), "passes"));
            !self.options.run.progress.is_stopped()
        };
        let count: Option<&dyn Fn(&Model) -> u64> = if self.options.detailed { Some(&count) } else { None };
        let settings = Run { passes, limit: usize::MAX, watch: &mut watch, count_flops: count, tell: &tell };
        let result = pipeline::run(&mut model, &cx, settings);
        Failure::if_stopped(&self.options.run.progress)?;
        if let Some(error) = trouble {
            return Err(error.into());
        }
        Ok(result.map(|(records, applied)| Simplified { model, records, applied }))
    }

    fn inputs(&self) -> Inputs {
        match &self.set {
            // Samples are many where a loss is measured; that the same function is left shows on a few.
            Some((spec, _)) => Inputs::Set(match &self.few {
                Some(few) => SetSpec { chosen: Some(few.clone()), ..spec.clone() },
                None => spec.clone(),
            }),
            None => Inputs::Random(self.options.run.inputs.clone()),
        }
    }

    /// What [`Job::inputs`] are, in the report's word.
    fn set_name(&self) -> &'static str {
        self.set.as_ref().map_or("random", |(_, name)| name)
    }

    /// Compares two models in memory, by way of a temporary folder.
    fn compare_models(&self, reference: &Model, candidate: &Model, claim: Claim) -> anyhow::Result<Verdict> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let (a, b) = (folder.path().join("reference.onnx"), folder.path().join("candidate.onnx"));
        reference.write(&a, &WriteOptions::default())?;
        candidate.write(&b, &WriteOptions::default())?;
        self.runner.compare(&a, &b, &self.inputs(), claim)
    }

    /// Whether a model found on the way to the result still does what the original does.
    fn holds(&self, model: &Model, target: &Path, write: &WriteOptions) -> anyhow::Result<bool> {
        let staged = model.stage(target, write)?;
        let verdict = self.runner.compare(&self.options.model, staged.path(), &self.inputs(), WHOLE)?;
        Ok(verdict.holds())
    }

    /// Times the candidate beside the original if that was asked for. Where a provider other than the CPU runs models,
    /// nodes that it leaves to others are named in a warning, and one that takes none is an error.
    fn measure(&self, candidate: &Path, target: &Path, warnings: &mut Vec<String>) -> Result<Option<Latency>, Failure> {
        let inputs = match &self.set {
            Some((spec, _)) => BenchInputs::Set(spec.clone()),
            None => BenchInputs::Random(self.options.run.inputs.clone()),
        };
        let models = [self.options.model.as_path(), candidate];
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

    fn judge(&self, candidate: &Path) -> Result<Judgement, Failure> {
        let verdict = self
            .runner
            .compare(&self.options.model, candidate, &self.inputs(), WHOLE)
            .context("the result cannot be run beside the original (--no-verify writes it without proof)")?;
        let reason = verdict.describe();
        match verdict {
            Verdict::Compared(report) if report.comparison.holds() => {
                Ok(Judgement::Holds(Box::new(verify(report, WHOLE, self.set_name()))))
            }
            Verdict::ReferenceRefused { .. } => Err(Failure::Error(anyhow!(
                "{reason}, so the result cannot be verified (--no-verify writes it without proof)"
            ))),
            _ => Ok(Judgement::Fails(reason)),
        }
    }
}

enum Judgement {
    Holds(Box<Verify>),
    Fails(String),
}

/// Removes the broken pass from those that run, and keeps a line about it for the report.
fn leave_out(passes: &mut Vec<&dyn Pass>, dropped: &mut Vec<PassRecord>, broken: Broken) -> Result<(), Failure> {
    if dropped.len() >= MOST_CULPRITS {
        let message = format!("{} passes failed on this model, the last was `{}`", dropped.len(), broken.pass);
        return Err(Failure::Refused(message));
    }
    let index = passes.iter().position(|p| p.info().name == broken.pass);
    let index = index.ok_or_else(|| anyhow!("pass `{}` failed although it does not run", broken.pass))?;
    let pass = passes.remove(index);
    dropped.push(PassRecord {
        name: pass.info().name,
        kind: pass.info().kind,
        outcome: Default::default(),
        time: Duration::ZERO,
        nodes_delta: 0,
        weight_bytes_delta: 0,
        flops_delta: 0,
        error: None,
        dropped: Some(broken.reason),
    });
    Ok(())
}

fn claim_of(kind: Kind) -> Claim {
    match kind {
        Kind::Identical => Claim::Identical,
        // A pass states its bound for float32; narrower types have the bounds of their own precision.
        _ => Claim::Equivalent { rtol: None },
    }
}

fn cost(model: &Model) -> Cost {
    Cost::of(model, &Facts::infer(model), &Bindings::default())
}

fn flops(model: &Model) -> u64 {
    cost(model).flops
}

/// Writes which inputs and outputs are gone or have other names beside a model that was written.
fn write_names(target: &Path, model: &Model) -> Result<PathBuf, Failure> {
    let mut path = target.to_owned().into_os_string();
    path.push(".names.json");
    let path = PathBuf::from(path);
    let names = serde_json::to_string_pretty(&serde_json::json!({ "renamed": model.renamed() }));
    let written = std::fs::write(&path, names.expect("names are text"));
    written.with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(path)
}
