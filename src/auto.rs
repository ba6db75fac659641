//! `--auto`: the recipes that a model's features suggest, each a job as a person would ask for it, and the best that came out.

mod features;
mod history;
mod search;

use crate::{
    Budget, Done, Failure, Options, Report, html,
    job::{check_output, optimize},
    report::{AutoPoint, AutoReport, Side},
    runner,
};
use anyhow::{Context as _, anyhow};
use features::{Features, Recipe};
use history::{History, Record};
use lathe_ir::{Model, WriteOptions};
use lathe_passes::{Quantity, lossy::METHODS};
use search::{Arm, Tried};
use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Seconds of timing a point that its own job has not timed.
const TIMING_SECONDS: f64 = 2.0;

/// The share that a recipe is first asked for where nothing is known of models like this one.
const FIRST: f64 = 0.7;

/// What to do to which model, and how long it may take.
#[derive(Debug, Clone)]
pub struct AutoOptions {
    /// The job, without shares to keep: those are what is searched.
    pub job: Options,
    /// Time after which no other recipe is started.
    pub time: Duration,
    /// The folder for all models that nothing beats, each with its report.
    pub pareto: Option<PathBuf>,
}

/// A run that gave a model.
struct Found {
    /// Its index among the points.
    at: usize,
    report: Report,
    files: Vec<PathBuf>,
}

/// Runs recipes until time is up, and writes the best of what came out: the least of what is to become little whose drop is
/// allowed. Hears a line for every run.
pub fn auto(options: &AutoOptions, tell: &mut dyn FnMut(&str)) -> Result<Done, Failure> {
    let start = Instant::now();
    let job = &options.job;
    check(options)?;
    let near = job.output.as_deref().or(options.pareto.as_deref()).and_then(Path::parent);
    let scratch = match near.filter(|folder| folder.is_dir()) {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let scratch = scratch.context("there is no place for models that are tried")?;
    let loaded = Model::read(&job.model).with_context(|| format!("cannot use `{}`", job.model.display()))?;
    let features = Features::of(&loaded.model);
    drop(loaded);
    let mut search = Search::new(options, &features, scratch.path());
    search.exact(tell)?;
    let mut history = History::open(runner::data_dir().as_deref());
    let recipes = search.recipes(&features, &history);
    let mut arms: Vec<Arm> = recipes.iter().map(|(_, first)| Arm::new(*first)).collect();
    while let Some((at, share)) = search::next(&arms, job.budget.max_drop) {
        let longest = search.longest(recipes[at].0.name);
        let spent = start.elapsed();
        if spent + longest > options.time {
            tell(&format!(
                "stopping after {:.0} s: the next run may take {:.0} s",
                spent.as_secs_f64(),
                longest.as_secs_f64()
            ));
            break;
        }
        let record = search.run(recipes[at].0, share, tell)?;
        arms[at].tried.push(Tried { share, found: record.as_ref().map(|r| (r.ratio, r.drop)) });
        record.into_iter().for_each(|record| history.add(record));
    }
    search.finish(start)
}

/// Refuses what makes no sense together.
fn check(options: &AutoOptions) -> Result<(), Failure> {
    let job = &options.job;
    if let Some(output) = &job.output {
        check_output(&job.model, output, job.overwrite)?;
    }
    if job.sets.calibration.is_none() {
        return Err(Failure::Usage(
            "--auto measures what is lost on samples, and none are given; --calib names a set".to_owned(),
        ));
    }
    if job.output.is_some() && job.budget.max_drop.is_none() {
        let message =
            "--auto writes the best that --max-drop allows; give --max-drop, or --pareto DIR without -o for all";
        return Err(Failure::Usage(message.to_owned()));
    }
    if let Some(folder) = &options.pareto {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    }
    Ok(())
}

/// The runs so far.
struct Search<'a> {
    options: &'a AutoOptions,
    /// Where models of runs are.
    scratch: &'a Path,
    quantity: Quantity,
    family: String,
    points: Vec<AutoPoint>,
    found: Vec<Found>,
    warnings: Vec<String>,
}

impl<'a> Search<'a> {
    fn new(options: &'a AutoOptions, features: &Features, scratch: &'a Path) -> Search<'a> {
        let (points, found, warnings) = (Vec::new(), Vec::new(), Vec::new());
        let quantity = options.job.budget.minimize;
        Search { options, scratch, quantity, family: features.family(), points, found, warnings }
    }

    /// The share of the original that is left of what is to become little.
    fn ratio(&self, report: &Report) -> Option<f64> {
        let counted = |side: &Side| side.figure(self.quantity);
        let ratio = match (counted(&report.output), counted(&report.input)) {
            (Some(after), Some(before)) => Some(after as f64 / before.max(1) as f64),
            _ => report.latency.as_ref()?.ratio,
        };
        ratio.filter(|ratio| ratio.is_finite())
    }

    /// The job of a run without a budget, whose result goes to the scratch folder.
    fn job(&self, name: &str) -> Options {
        let job = &self.options.job;
        let budget = Budget { metric: job.budget.metric.clone(), ..Budget::default() };
        let bench = job.bench.or((self.quantity == Quantity::Latency).then_some(TIMING_SECONDS));
        Options {
            output: Some(self.scratch.join(format!("{name}.onnx"))),
            budget,
            bench,
            overwrite: false,
            ..job.clone()
        }
    }

    /// Runs the exact passes alone, which lose nothing.
    fn exact(&mut self, tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        let start = Instant::now();
        let done = optimize(&self.job("exact"))?;
        let mut point = self.point("exact passes", None, start, Some(&done.report));
        point.drop = Some(0.0);
        tell(&told(&point, self.quantity.key()));
        self.found.push(Found { at: self.points.len(), report: done.report, files: done.files });
        self.points.push(point);
        Ok(())
    }

    /// The recipes in the order they are run first, and the share that is asked for then. What saved most in models alike
    /// goes first, and starts where that ended.
    fn recipes(&self, features: &Features, history: &History) -> Vec<(Recipe, f64)> {
        let selection = &self.options.job.selection;
        let open = |recipe: &Recipe| match recipe.methods {
            [] => METHODS.iter().any(|m| selection.admits(m.info().name)),
            some => some.iter().any(|name| selection.admits(name)),
        };
        let limit = self.options.job.budget.max_drop;
        let metric = self.options.job.budget.metric.clone().unwrap_or_else(|| "auto".to_owned());
        let recipes = features.recipes(self.quantity).into_iter().filter(open);
        let known = recipes.map(|recipe| {
            let like = self.record(recipe, 0.0, (0.0, 0.0), &metric, 0.0);
            let best = history.best(&like, limit).filter(|r| r.ratio < 1.0);
            (recipe, best.map(|r| (r.ratio, r.share)))
        });
        let mut known: Vec<(Recipe, Option<(f64, f64)>)> = known.collect();
        known.sort_by(|a, b| {
            let ratio = |best: &Option<(f64, f64)>| best.map_or(f64::INFINITY, |(ratio, _)| ratio);
            ratio(&a.1).total_cmp(&ratio(&b.1))
        });
        known.into_iter().map(|(recipe, best)| (recipe, best.map_or(FIRST, |(_, share)| share))).collect()
    }

    fn record(&self, recipe: Recipe, share: f64, (ratio, drop): (f64, f64), metric: &str, seconds: f64) -> Record {
        let load = &self.options.job.run.load;
        Record {
            family: self.family.clone(),
            place: format!("{} {}, {} threads", load.provider, load.device, load.threads),
            measure: self.quantity.key().to_owned(),
            metric: metric.to_owned(),
            recipe: recipe.name.to_owned(),
            share,
            ratio,
            drop,
            seconds,
        }
    }

    /// How long a recipe may take, as earlier runs say: its own, or else the longest of all.
    fn longest(&self, recipe: &str) -> Duration {
        let most =
            |own: &dyn Fn(&&AutoPoint) -> bool| self.points.iter().filter(own).map(|p| p.seconds).reduce(f64::max);
        let seconds = most(&|p| p.recipe == recipe).or(most(&|p| p.share.is_some())).unwrap_or(0.0);
        Duration::from_secs_f64(seconds)
    }

    /// Runs a recipe; `None` if it gave no model.
    fn run(&mut self, recipe: Recipe, share: f64, tell: &mut dyn FnMut(&str)) -> Result<Option<Record>, Failure> {
        let start = Instant::now();
        let name = format!("{}-{share:.3}", recipe.name.replace(' ', "-"));
        let mut job = self.job(&name);
        job.budget.shares.set(self.quantity, share);
        if !recipe.methods.is_empty() {
            let others = METHODS.iter().map(|m| m.info().name).filter(|name| !recipe.methods.contains(name));
            job.selection.skip.extend(others.map(str::to_owned));
        }
        let mut record = None;
        let point = match optimize(&job) {
            Ok(done) => {
                let point = self.point(recipe.name, Some(share), start, Some(&done.report));
                if let (Some(ratio), Some(drop)) = (point.ratio, point.drop) {
                    let metric = self.options.job.budget.metric.clone().unwrap_or_else(|| "auto".to_owned());
                    record = Some(self.record(recipe, share, (ratio, drop), &metric, point.seconds));
                    self.found.push(Found { at: self.points.len(), report: done.report, files: done.files });
                }
                point
            }
            Err(Failure::Usage(message)) => return Err(Failure::Usage(message)),
            Err(failure) => {
                if let Failure::Error(_) = &failure {
                    self.warnings.push(format!("`{}` at {share:.2} failed: {failure}", recipe.name));
                }
                let mut point = self.point(recipe.name, Some(share), start, None);
                point.refused = Some(failure.to_string());
                point
            }
        };
        tell(&told(&point, self.quantity.key()));
        self.points.push(point);
        Ok(record)
    }

    fn point(&self, recipe: &str, share: Option<f64>, start: Instant, report: Option<&Report>) -> AutoPoint {
        let verify = report.and_then(|r| r.verify.as_ref());
        let ratio = |of: &dyn Fn(&Report) -> (u64, u64)| report.map(of).map(|(a, b)| a as f64 / b.max(1) as f64);
        AutoPoint {
            recipe: recipe.to_owned(),
            share,
            ratio: report.and_then(|r| self.ratio(r)),
            drop: verify.map(|v| v.drop).filter(|drop| drop.is_finite()),
            metric: verify.map(|v| v.metric.clone()),
            latency_ratio: report.and_then(|r| r.latency.as_ref()).and_then(|l| l.ratio),
            size_ratio: ratio(&|r| (r.output.file_bytes, r.input.file_bytes)),
            flops_ratio: ratio(&|r| (r.output.flops, r.input.flops)),
            seconds: start.elapsed().as_secs_f64(),
            front: false,
            chosen: false,
            refused: None,
            file: None,
        }
    }

    /// Says which points nothing beats, keeps their models where that is asked for, and writes the best.
    fn finish(mut self, start: Instant) -> Result<Done, Failure> {
        let pairs: Vec<Option<(f64, f64)>> = self.points.iter().map(|p| p.ratio.zip(p.drop)).collect();
        for (point, front) in self.points.iter_mut().zip(search::front(&pairs)) {
            point.front = front;
        }
        let limit = self.options.job.budget.max_drop;
        let allowed = |found: &&Found| pairs[found.at].is_some_and(|(_, drop)| limit.is_none_or(|limit| drop <= limit));
        // Without a limit the one that loses least stands for all.
        let by =
            |found: &Found| pairs[found.at].map_or(f64::INFINITY, |pair| if limit.is_some() { pair.0 } else { pair.1 });
        let runs = std::mem::take(&mut self.found);
        let best = runs.iter().filter(allowed).min_by(|a, b| by(a).total_cmp(&by(b)));
        let best = best.or(runs.first()).ok_or_else(|| anyhow!("no run gave a model"))?;
        self.points[best.at].chosen = limit.is_some();
        let mut files = Vec::new();
        if let Some(folder) = &self.options.pareto {
            for found in runs.iter().filter(|found| pairs[found.at].is_some()) {
                if !self.points[found.at].front {
                    continue;
                }
                let name = found.files.first().and_then(|path| path.file_name()).expect("a job writes a model");
                let path = folder.join(name);
                files.extend(self.copy(found, &path)?);
                let report = path.with_extension("json");
                let own = Report { output: with_path(&found.report, &path), ..found.report.clone() };
                lathe_ir::write_whole(&report, |out| out.write_all(own.to_json().as_bytes()))
                    .with_context(|| format!("cannot write `{}`", report.display()))?;
                files.push(report);
                self.points[found.at].file = Some(path.display().to_string());
            }
        }
        let measure = self.quantity.key().to_owned();
        let tried =
            AutoReport { family: self.family.clone(), measure, limit, points: std::mem::take(&mut self.points) };
        if let Some(folder) = &self.options.pareto {
            let path = folder.join("index.html");
            let name = self.options.job.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let page = html::front::page(&name, &tried);
            lathe_ir::write_whole(&path, |out| out.write_all(page.as_bytes()))
                .with_context(|| format!("cannot write `{}`", path.display()))?;
            files.push(path);
        }
        let mut output = with_path(&best.report, Path::new(""));
        if let Some(target) = &self.options.job.output {
            files.extend(self.copy(best, target)?);
            output.path = target.display().to_string();
        }
        let mut report = best.report.clone();
        report.output = output;
        report.warnings.extend(self.warnings);
        report.seconds = start.elapsed().as_secs_f64();
        report.auto = Some(tried);
        Ok(Done { report, files })
    }

    /// Puts the model of a run elsewhere, with what lies beside it.
    fn copy(&self, found: &Found, target: &Path) -> Result<Vec<PathBuf>, Failure> {
        let from = found.files.first().expect("a job writes a model");
        let loaded = Model::read(from).with_context(|| format!("cannot read `{}` again", from.display()))?;
        let write = WriteOptions { external: self.options.job.external };
        let staged = loaded.model.stage(target, &write)?;
        let data = staged.written().data_bytes > 0;
        staged.commit()?;
        let beside = |ending: &str| {
            let mut path = target.to_owned().into_os_string();
            path.push(ending);
            PathBuf::from(path)
        };
        let mut files = vec![target.to_owned()];
        files.extend(data.then(|| beside(".data")));
        if let Some(names) = found.files.iter().find(|path| path.to_string_lossy().ends_with(".names.json")) {
            let path = beside(".names.json");
            fs::copy(names, &path).with_context(|| format!("cannot write `{}`", path.display()))?;
            files.push(path);
        }
        Ok(files)
    }
}

/// The side of a report for a model that lies elsewhere.
fn with_path(report: &Report, path: &Path) -> crate::report::Side {
    crate::report::Side { path: path.display().to_string(), ..report.output.clone() }
}

/// One line about a run.
fn told(point: &AutoPoint, measure: &str) -> String {
    let share = point.share.map(|share| format!(" at {share:.2}")).unwrap_or_default();
    let head = format!("{}{share}", point.recipe);
    match (&point.refused, point.ratio) {
        (Some(reason), _) => format!("{head}: {reason}"),
        (None, Some(ratio)) => {
            let lost = point.drop.map(|drop| format!(", drop {drop:.4}")).unwrap_or_default();
            format!("{head}: {measure} {ratio:.3} of the original{lost} ({:.0} s)", point.seconds)
        }
        (None, None) => format!("{head}: {measure} could not be measured"),
    }
}
