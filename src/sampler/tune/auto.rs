//! The planner: which steps are guided, computed and forecast, for a share of the time of the plain loop.

use super::{
    methods::Calibration,
    trial::{BATCH, Seen, Trial},
};
use crate::Failure;
use anyhow::anyhow;
use lathe_passes::sampler::{
    Error, StepPlan, Table,
    methods::{Forecast, forecast, gate, guide_until},
    planner::{Bounds, Profile, StepCost, refine, within},
};
use lathe_runtime::{Listener, Progress, pairs, quantile};
use serde_json::json;

/// The time of a step without network, in evaluations.
const IDLE: f64 = 0.02;
/// Batches on which plans are ranked, and held-out ones on which the best must prove itself.
const RANKING: [u64; 1] = [0];
const HELD_OUT: [u64; 2] = [1 << 21, (1 << 21) + 1];
/// Measurements that refine a plan.
const REFINEMENTS: usize = 24;
/// Thresholds of agreement at which guidance may end; more than 1 is never reached.
const GATES: [f64; 4] = [2.0, 0.999, 0.99, 0.97];
/// How forecasts may be made.
const KINDS: [Forecast; 3] = [Forecast::Reuse, Forecast::Taylor(1), Forecast::Lagrange(3)];
/// What every plan keeps.
const BOUNDS: Bounds = Bounds { first: 3, last: 1, longest: 4 };

struct Planner<'a> {
    trial: &'a Trial<'a>,
    table: &'a Table,
    /// The samples of the plain loop, by batch.
    wanted: Vec<(u64, lathe_ir::Tensor)>,
}

/// A choice of the planner.
#[derive(Debug, Clone)]
struct Choice {
    plan: StepPlan,
    gate: usize,
    kind: Forecast,
    computed: Vec<bool>,
}

/// The best plan that takes `latency` of the time of the plain loop, or the best plain grid where no plan beats that.
pub(super) fn run(trial: &Trial, latency: f64, progress: &Listener) -> Result<StepPlan, Failure> {
    if !(latency > 0.0 && latency < 1.0) {
        return Err(Failure::Usage(format!("--latency is {latency}, expected a share between 0 and 1")));
    }
    let table = trial.asked()?;
    let steps = table.rows.len();
    if steps < 2 * BOUNDS.first {
        return Err(Failure::Usage(format!(
            "a plan for {steps} steps saves nothing; --search finds timesteps for few steps"
        )));
    }
    let mut planner = Planner { trial, table: &table, wanted: Vec::new() };
    for batch in RANKING.iter().chain(&HELD_OUT) {
        planner.wanted.push((*batch, trial.samples(&table, &trial.plain(&table), *batch)?));
    }
    let passes = if trial.guidance.is_some() { 2.0 } else { 1.0 };
    let budget = latency * passes * steps as f64;
    let mut calibration = Calibration { trial, table: &table, runs: Vec::new() };
    let cosines = if trial.guidance.is_some() { Some(calibration.cosines()?) } else { None };
    let profile = planner.profile()?;
    let weights = weights(&table);
    let mut choices = Vec::new();
    for threshold in GATES {
        let end = cosines.as_ref().map_or(steps, |cosines| gate(cosines, threshold, 0.9));
        for kind in KINDS {
            choices.extend(planner.choose(end, kind, &profile, &weights, budget, passes)?);
        }
    }
    let mut best: Option<(f64, Choice)> = None;
    let count = choices.len();
    for (index, choice) in choices.into_iter().enumerate() {
        progress.hear(&Progress::new(index, count, "plans"));
        let loss = planner.loss(&table, &choice.plan, &RANKING)?;
        if best.as_ref().is_none_or(|(least, _)| loss < *least) {
            best = Some((loss, choice));
        }
    }
    let plain = planner.plain(budget, passes)?;
    let Some((_, choice)) = best else {
        let mut plan = plain.1;
        plan.evidence.insert("kept".to_owned(), "plain".into());
        return Ok(plan);
    };
    let mut left = 0;
    let mut measure = |computed: &[bool]| {
        progress.hear(&Progress::new(left, REFINEMENTS, "refinements"));
        left += 1;
        let plan = planner.plan(choice.gate, choice.kind, computed)?;
        planner.loss(&table, &plan, &RANKING).map_err(|e| Error::Plan(e.to_string()))
    };
    let (computed, _) = refine(choice.computed.clone(), BOUNDS, REFINEMENTS, &mut measure)?;
    let mut plan = planner.plan(choice.gate, choice.kind, &computed)?;
    let (ours, theirs) = (planner.loss(&table, &plan, &HELD_OUT)?, planner.loss(&plain.0, &plain.1, &HELD_OUT)?);
    let evidence = json!({
        "latency": latency, "gate": choice.gate, "forecast": format!("{:?}", choice.kind),
        "computed": computed.iter().filter(|&&c| c).count(), "rmse": ours, "psnr_p10": planner.psnr(&table, &plan)?,
        "plain_steps": plain.1.grid.len(), "plain_rmse": theirs, "held_out": HELD_OUT.len() * BATCH,
        "kept": if ours < theirs { "plan" } else { "plain" },
    });
    // A plan that does not beat fewer plain steps of the same cost is not worth its trouble.
    if ours.is_nan() || ours >= theirs {
        plan = plain.1;
    }
    plan.evidence = evidence.as_object().cloned().unwrap_or_default();
    Ok(plan)
}

/// How much an error of the prediction at a step moves the sample: its factor there times the factors of later states.
fn weights(table: &Table) -> Vec<f64> {
    let mut later = 1.0;
    let mut weights: Vec<f64> = table
        .rows
        .iter()
        .rev()
        .map(|row| {
            let (state, output, _) = row.affine();
            let weight = output.abs() * later;
            later *= state.abs();
            weight
        })
        .collect();
    weights.reverse();
    weights
}

impl Planner<'_> {
    /// Errors of forecasts of the prediction, over both passes.
    fn profile(&self) -> Result<Profile, Failure> {
        let mut profile = Profile::new(&KINDS, BOUNDS.longest, self.table.rows.len());
        let (_, seen) = self.trial.watch(self.trial.denoiser, self.table, 1 << 24)?;
        let passes = seen.first().map_or(0, |step| step.outputs.len());
        for pass in 0..passes {
            profile.restart();
            for step in &seen {
                profile.push(self.output(step, pass)?)?;
            }
        }
        Ok(profile)
    }

    fn output(&self, step: &Seen, pass: usize) -> Result<Vec<f64>, Failure> {
        let name = &self.trial.roles.output;
        let found = step.outputs.get(pass).and_then(|outputs| outputs.iter().find(|(n, _)| n == name));
        let numbers = found.and_then(|(_, tensor)| tensor.to_f64s());
        numbers.ok_or_else(|| Failure::Error(anyhow!("the denoiser gave no numbers as `{name}`")))
    }

    /// The plan of a gate and a kind of forecast that fits the budget, if there is one.
    fn choose(
        &self,
        end: usize,
        kind: Forecast,
        profile: &Profile,
        weights: &[f64],
        budget: f64,
        passes: f64,
    ) -> Result<Option<Choice>, Failure> {
        let steps = weights.len();
        let errors: Vec<Vec<f64>> = profile
            .errors(kind)
            .iter()
            .zip(weights)
            .map(|(gaps, weight)| gaps.iter().map(|error| error * weight).collect())
            .collect();
        // Steps cost differently before and after the gate, and the programme knows one price: bisect the share of the
        // budget that it takes to be right.
        let of = |computed: &[bool]| -> f64 {
            let cost = |(step, &full): (usize, &bool)| match full {
                true if step < end => passes,
                true => 1.0,
                false => IDLE,
            };
            computed.iter().enumerate().map(cost).sum()
        };
        let (mut low, mut high) = (0.0, passes * steps as f64);
        let mut found = None;
        for _ in 0..30 {
            let middle = (low + high) / 2.0;
            let cost = StepCost { full: passes, forecast: IDLE };
            match within(&errors, cost, middle, BOUNDS) {
                Some(mask) if of(&mask.computed) > budget => high = middle,
                Some(mask) => {
                    found = Some(mask.computed);
                    low = middle;
                }
                None => low = middle,
            }
        }
        let Some(computed) = found else { return Ok(None) };
        let plan = self.plan(end, kind, &computed)?;
        Ok(Some(Choice { plan, gate: end, kind, computed }))
    }

    fn plan(&self, end: usize, kind: Forecast, computed: &[bool]) -> Result<StepPlan, Error> {
        let mut plan = self.trial.plain(self.table);
        if end < computed.len() {
            guide_until(&mut plan, end)?;
        }
        forecast(&mut plan, std::slice::from_ref(&self.trial.roles.output), computed, kind)?;
        plan.check()?;
        Ok(plan)
    }

    /// The root mean square distance to the samples of the plain loop.
    fn loss(&self, table: &Table, plan: &StepPlan, batches: &[u64]) -> Result<f64, Failure> {
        let all = self.pairs(table, plan, batches)?;
        Ok((all.iter().map(|p| p.rmse * p.rmse).sum::<f64>() / all.len().max(1) as f64).sqrt())
    }

    /// The ratio of signal to noise that nine of ten samples exceed, for samples from −1 to 1.
    fn psnr(&self, table: &Table, plan: &StepPlan) -> Result<f64, Failure> {
        let all: Vec<f64> = self.pairs(table, plan, &HELD_OUT)?.iter().map(|p| p.psnr.min(200.0)).collect();
        Ok(quantile(&all, 0.1))
    }

    fn pairs(&self, table: &Table, plan: &StepPlan, batches: &[u64]) -> Result<Vec<lathe_runtime::Pair>, Failure> {
        let mut all = Vec::new();
        for (batch, wanted) in self.wanted.iter().filter(|(batch, _)| batches.contains(batch)) {
            let found = self.trial.samples(table, plan, *batch)?;
            all.extend(pairs(wanted, &found, 2.0).map_err(|e| Failure::Error(anyhow!(e)))?);
        }
        Ok(all)
    }

    /// The plain grid of the most steps that the budget allows.
    fn plain(&self, budget: f64, passes: f64) -> Result<(Table, StepPlan), Failure> {
        let count = ((budget / passes).floor() as usize).clamp(1, self.table.rows.len());
        let table = self.trial.spread(count)?;
        let plan = self.trial.plain(&table);
        Ok((table, plan))
    }
}
