//! The part of the main job that spends a size budget and holds the loss against what is allowed.

use super::Job;
use crate::{
    Failure, PassRecord,
    compress::Compressor,
    report::Verify,
    validate::{self, Bound, validate},
};
use anyhow::Context as _;
use lathe_ir::{Model, WriteOptions};
use lathe_runtime::{Distance, SetSpec};
use std::path::Path;

/// Allocations that are tried until the file is as small as it must be.
const SIZE_ATTEMPTS: usize = 4;

/// Larger sizes that are tried to say what would keep to the allowed drop.
const REACHABLE_ATTEMPTS: usize = 4;

/// A result within the size budget, before it is written.
pub(super) struct Spent {
    pub(super) model: Model,
    pub(super) staged: lathe_ir::Staged,
    pub(super) verify: Option<Verify>,
    pub(super) plan: serde_json::Value,
    pub(super) records: Vec<PassRecord>,
}

impl Job<'_> {
    /// Spends the size budget: of a file of `original` bytes passes left `exact`, of which `allowed` may stay. Methods
    /// see the `chosen` samples of the calibration set, or all.
    pub(super) fn compress(
        &self,
        model: &Model,
        chosen: Option<Vec<usize>>,
        (original, exact, allowed): (u64, u64, u64),
        (target, write): (&Path, &WriteOptions),
        warnings: &mut Vec<String>,
    ) -> Result<Spent, Failure> {
        let options = self.options;
        let given = options.sets.calibration.as_ref();
        let given = given.context("a size is spent by what is seen on a calibration set, and none is given")?;
        let calibration = &SetSpec { chosen: chosen.or_else(|| given.chosen.clone()), ..given.clone() };
        let cx = self.context();
        let compressor = Compressor {
            runner: &self.runner,
            cx: self.context(),
            set: calibration,
            load: &options.load,
            memory: options.memory,
            seed: options.seed,
            admits: &|name| options.selection.admits(name),
            distance: self.distance(model),
        };
        let table = compressor.table(model, warnings)?;
        let fixed = exact.saturating_sub(table.kept_bytes());
        let too_small = |reached: u64| {
            let [reached, allowed] = [reached, allowed].map(|bytes| bytes as f64 / (1 << 20) as f64);
            Failure::Refused(format!(
                "{allowed:.1} MiB are allowed, and {reached:.1} MiB are the least that can be reached"
            ))
        };
        let within = |allowed: u64| -> Result<Spent, Failure> {
            let mut bytes = allowed.checked_sub(fixed).ok_or_else(|| too_small(fixed))?;
            for _ in 0..SIZE_ATTEMPTS {
                let found = table.compress(model, bytes, &cx, &|smallest| too_small(smallest + fixed))?;
                found.model.check().context("the result is not a valid model; this is a fault of this program")?;
                let staged = found.model.stage(target, write).map_err(|e| Failure::Error(e.into()))?;
                let size = staged.written().file_bytes + staged.written().data_bytes;
                if size <= allowed {
                    let verify = self.held_out(staged.path())?;
                    return Ok(Spent { model: found.model, staged, verify, plan: found.plan, records: found.records });
                }
                // Names and attributes took more than was reckoned.
                bytes = bytes.checked_sub(size - allowed).ok_or_else(|| too_small(size))?;
            }
            Err(Failure::Refused("the size of the result does not settle within the budget".to_owned()))
        };
        let spent = within(allowed)?;
        let Some(failed) = spent.verify.as_ref().filter(|v| !v.passed).map(validate::describe) else {
            return Ok(spent);
        };
        drop(spent);
        // What would pass, found by bisection, so that the user knows what to ask for.
        let (mut low, mut high) = (allowed, exact);
        for _ in 0..REACHABLE_ATTEMPTS {
            let middle = low + (high - low) / 2;
            if within(middle)?.verify.is_none_or(|v| v.passed) { high = middle } else { low = middle }
        }
        let share = high as f64 / original as f64;
        let reachable = if share <= 1.0 {
            format!("; --size {:.2} keeps to it", (share * 100.0).ceil() / 100.0)
        } else {
            String::new()
        };
        Err(Failure::Refused(format!("{failed}{reachable}")))
    }

    /// The loss of a candidate on held-out samples; `None` if it is not to be run.
    fn held_out(&self, candidate: &Path) -> Result<Option<Verify>, Failure> {
        let Some((set, set_name)) = self.set.as_ref().filter(|_| self.options.verify) else { return Ok(None) };
        let budget = &self.options.budget;
        let metric = budget.metric.clone().unwrap_or_else(|| "auto".to_owned());
        let bound = Bound { set: set.clone(), set_name, metric, max_drop: budget.max_drop };
        Ok(Some(validate(&self.runner, &self.options.model, candidate, &bound)?))
    }

    /// How outputs are compared while the sensitivity of layers is measured: as distributions where they are logits.
    fn distance(&self, model: &Model) -> Distance {
        let graph = &model.graph;
        let logits = |&v: &lathe_ir::ValueId| graph.value(v).name.to_ascii_lowercase().contains("logit");
        let divergence = match self.options.budget.metric.as_deref() {
            Some(metric) => matches!(metric, "perplexity" | "kl" | "top1" | "accuracy"),
            None => {
                self.options.sets.calibration.as_ref().is_some_and(|s| s.labels.is_some())
                    || graph.main().outputs().iter().any(logits)
            }
        };
        if divergence { Distance::Divergence } else { Distance::Relative }
    }
}
