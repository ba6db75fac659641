//! Measured latency: asks the worker, and puts what it measured into the report's words.

use crate::{RunOptions, runner::Runner};
use anyhow::{anyhow, bail};
use lathe_runtime::{
    BenchInputs, BenchResult, BenchTask, Loading, PROVIDERS, Placement, Profile, RuntimeError, SITTINGS, Timings,
    provider_name,
};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// The measured latency of one model, or of two side by side.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Latency {
    /// The execution provider.
    pub ep: String,
    /// Which of its devices.
    pub device: i32,
    /// Threads inside one operator; 0 leaves the choice to the runtime.
    pub threads: usize,
    /// Who ran the models, with its own optimizations on.
    pub runtime: String,
    /// The sizes of the inputs.
    pub inputs: String,
    /// The median of the first model, in milliseconds.
    pub before_ms: f64,
    /// The median of the second; `null` where there is one model.
    pub after_ms: Option<f64>,
    /// `after_ms / before_ms`.
    pub ratio: Option<f64>,
    /// By how much the ratio (with one model: the median) may be off, as a share of it.
    pub spread: f64,
    /// `faster`, `slower` or `no difference`: beyond three spreads, or not.
    pub verdict: Option<String>,
    /// More about the first model.
    pub before: LatencySide,
    /// More about the second.
    pub after: Option<LatencySide>,
}

/// One model's part of the latency.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LatencySide {
    /// The file.
    pub path: String,
    /// The runs that were timed.
    pub runs: usize,
    /// The median, in milliseconds; copies to and from a device are not in it.
    pub median_ms: f64,
    /// The first quartile.
    pub q1_ms: f64,
    /// The third quartile.
    pub q3_ms: f64,
    /// Runs in a second.
    pub runs_per_second: f64,
    /// Samples in a second, where the inputs are of a set.
    pub samples_per_second: Option<f64>,
    /// Making a session, in milliseconds.
    pub load_ms: f64,
    /// The first run.
    pub first_run_ms: f64,
    /// The largest resident memory of a process that loads and runs this model only.
    pub peak_rss_bytes: Option<u64>,
    /// Copying the inputs to the device; `null` where they stay in host memory.
    pub copy_in_ms: Option<f64>,
    /// Copying the outputs from it.
    pub copy_out_ms: Option<f64>,
    /// Whether such copies are in the times, because they could not be kept out.
    #[serde(default)]
    pub copies_in_run: bool,
    /// Which nodes the provider took; `null` on the CPU, which takes all.
    pub placement: Option<Placement>,
}

/// What is measured, and how.
pub(crate) struct Measurement<'a> {
    pub run: &'a RunOptions,
    pub models: &'a [&'a Path],
    pub inputs: &'a BenchInputs,
    /// Time to spend on runs.
    pub seconds: f64,
}

impl Measurement<'_> {
    /// The times of both models in turns and nothing else, with sessions that are made anew so often.
    pub(crate) fn timings(&self, sittings: usize) -> anyhow::Result<Timings> {
        let all: Vec<PathBuf> = self.models.iter().map(|p| p.to_path_buf()).collect();
        match self.ask(&all, BenchTask::Time { seconds: self.seconds, sittings })? {
            BenchResult::Timed(timings) => Ok(timings),
            _ => bail!("the worker measured something else"),
        }
    }

    /// Measures, each part in a process of its own.
    pub(crate) fn run(&self, note: &mut dyn FnMut(&str)) -> anyhow::Result<Latency> {
        // What the provider cannot take is better known before minutes of timing.
        let sides = self.sides(note)?;
        note("timing");
        Ok(self.latency(&self.timings(SITTINGS)?, &sides))
    }

    /// The latency that was timed, with how both models start and where their nodes went.
    pub(crate) fn of(&self, timings: &Timings) -> anyhow::Result<Latency> {
        Ok(self.latency(timings, &self.sides(&mut |_| {})?))
    }

    /// How every model starts, and which of its nodes the provider takes.
    fn sides(&self, note: &mut dyn FnMut(&str)) -> anyhow::Result<Vec<(Loading, Option<Placement>)>> {
        let mut placements = Vec::new();
        if self.run.load.provider != "cpu" {
            note("looking which nodes the provider takes");
            placements.extend(self.profiles()?.into_iter().map(|profile| profile.placement));
        }
        let mut placements = placements.into_iter();
        let mut sides = Vec::new();
        for model in self.models {
            note("measuring load time and memory");
            sides.push((self.loading(model)?, placements.next()));
        }
        Ok(sides)
    }

    fn latency(&self, timings: &Timings, sides: &[(Loading, Option<Placement>)]) -> Latency {
        let side = |index: usize| self.side(timings, index, sides[index].0, sides[index].1.as_ref());
        let both = self.models.len() == 2;
        Latency {
            ep: self.run.load.provider.clone(),
            device: self.run.load.device,
            threads: self.run.load.threads,
            runtime: timings.engine.clone(),
            inputs: timings.inputs.clone(),
            before_ms: timings.quartiles(0)[0],
            after_ms: both.then(|| timings.quartiles(1)[0]),
            ratio: timings.ratio(),
            spread: timings.spread(),
            verdict: timings.verdict().map(str::to_owned),
            before: side(0),
            after: both.then(|| side(1)),
        }
    }

    /// Sentences about nodes that the provider leaves to others; an error where it takes none.
    pub(crate) fn left_behind(&self) -> anyhow::Result<Vec<String>> {
        if self.run.load.provider == "cpu" {
            return Ok(Vec::new());
        }
        Ok(self.profiles()?.iter().filter_map(|profile| profile.placement.note()).collect())
    }

    /// Where the time of a run of each model goes.
    pub(crate) fn profiles(&self) -> anyhow::Result<Vec<Profile>> {
        let mut profiles = Vec::new();
        for model in self.models {
            let folder = tempfile::tempdir()?;
            let task = BenchTask::Profile { folder: folder.path().to_owned() };
            match self.ask(&[model.to_path_buf()], task).map_err(|error| self.explained(error))? {
                BenchResult::Profiled(found) => profiles.extend(found),
                _ => bail!("the worker measured something else"),
            }
        }
        Ok(profiles)
    }

    /// What a provider that ends the process most likely is, and what would help.
    fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        let provider = &self.run.load.provider;
        let name = provider_name(provider);
        let known = PROVIDERS.iter().find(|known| known.name == name && !known.package.is_empty());
        match (error.downcast_ref(), known) {
            (Some(RuntimeError::Ended { message, killed: false, .. }), Some(known)) => anyhow!(
                "the execution provider `{provider}` is unusable: {message}; a library for another version of ONNX Runtime \
                 does that: {}",
                known.remedy
            ),
            _ => error,
        }
    }

    /// Three processes, because one start is easily disturbed; of a model that loads slowly one is enough.
    fn loading(&self, model: &Path) -> anyhow::Result<Loading> {
        const SLOW_MS: f64 = 2000.0;
        let mut starts: Vec<Loading> = Vec::new();
        while starts.len() < 3 && starts.first().is_none_or(|first| first.load_ms < SLOW_MS) {
            match self.ask(&[model.to_owned()], BenchTask::Load)? {
                BenchResult::Loaded(loading) => starts.push(loading),
                _ => bail!("the worker measured something else"),
            }
        }
        starts.sort_by(|a, b| a.load_ms.total_cmp(&b.load_ms));
        starts.get(starts.len() / 2).copied().ok_or_else(|| anyhow!("nothing was loaded"))
    }

    fn ask(&self, models: &[PathBuf], task: BenchTask) -> anyhow::Result<BenchResult> {
        Runner::alone(self.run)?.bench(models, self.inputs, task)
    }

    fn side(&self, timings: &Timings, index: usize, loading: Loading, placement: Option<&Placement>) -> LatencySide {
        let [median, q1, q3] = timings.quartiles(index);
        let series = &timings.models[index];
        let runs_per_second = 1000.0 / median;
        LatencySide {
            path: self.models[index].display().to_string(),
            runs: series.sittings.iter().map(Vec::len).sum(),
            median_ms: median,
            q1_ms: q1,
            q3_ms: q3,
            runs_per_second,
            samples_per_second: timings.samples.map(|samples| samples as f64 * runs_per_second),
            load_ms: loading.load_ms,
            first_run_ms: loading.first_run_ms,
            peak_rss_bytes: loading.peak_rss_bytes,
            copy_in_ms: series.copy_in_ms,
            copy_out_ms: series.copy_out_ms,
            copies_in_run: series.copies_in_run,
            placement: placement.cloned(),
        }
    }
}

impl Latency {
    /// One sentence: what was measured and whether it differs.
    pub fn describe(&self) -> String {
        let spread = self.spread * 100.0;
        let (Some(after), Some(ratio), Some(verdict)) = (self.after_ms, self.ratio, &self.verdict) else {
            return format!("{} ms ± {spread:.1} %", digits(self.before_ms));
        };
        let change = (ratio - 1.0) * 100.0;
        let meaning = match verdict.as_str() {
            "faster" => format!("faster by {:.1} %", -change),
            "slower" => format!("slower by {change:.1} %"),
            _ => format!("no difference beyond three spreads ({change:+.1} %)"),
        };
        format!("{} ms before, {} ms after: {meaning}; spread {spread:.1} %", digits(self.before_ms), digits(after))
    }

    /// Sentences about nodes that the provider left to others.
    pub fn notes(&self) -> Vec<String> {
        let sides = [Some(&self.before), self.after.as_ref()];
        let note = |side: &LatencySide| Some(format!("`{}`: {}", side.path, side.placement.as_ref()?.note()?));
        sides.into_iter().flatten().filter_map(note).collect()
    }

    /// How it was measured: provider, threads, runtime.
    pub fn setting(&self) -> String {
        let threads = match self.threads {
            0 => "the runtime's choice of threads".to_owned(),
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        let mut out = format!("{} on {}", self.runtime, self.ep);
        if self.ep != "cpu" {
            let _ = write!(out, ", device {}", self.device);
        }
        if self.before.copies_in_run {
            out.push_str(", copies to and from it included");
        }
        format!("{out}, {threads}, inputs {}", self.inputs)
    }
}

/// A number of milliseconds to four digits.
pub(crate) fn digits(ms: f64) -> String {
    let decimals = (3.0 - ms.max(1e-6).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{ms:.decimals$}")
}
