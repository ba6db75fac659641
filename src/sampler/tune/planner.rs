//! The planner: which steps are guided, computed and forecast, for a share of the time of the plain loop.

use super::{
    acceptance::{self, Baseline, ImageReference, TOLERANCE},
    plan_compiler::PlanCompiler,
    plan_runner::PlanRunner,
};
use crate::Failure;
use lathe_ir::Tensor;
use lathe_passes::sampler::{
    Error, StepPlan, Table,
    methods::{Calibration, Forecast, agreement_of_passes, forecast, gate, guide_until},
    planner::{Bounds, Profile, StepCost, refine, within_budget},
};
use lathe_runtime::{Listener, Progress, pairs};
use serde_json::json;

/// The time of a step without network, in evaluations.
const IDLE: f64 = 0.02;
/// The batch on which plans are ranked.
const RANKING: u64 = 0;
/// Plans that are compiled and timed before plain steps are used.
const ATTEMPTS: usize = 3;
/// Measurements that refine a plan.
const REFINEMENTS: usize = 24;
/// Thresholds of agreement at which guidance may end; more than 1 is never reached.
const GATES: [f64; 4] = [2.0, 0.999, 0.99, 0.97];
/// How forecasts may be made.
const KINDS: [Forecast; 3] = [Forecast::Reuse, Forecast::Taylor(1), Forecast::Lagrange(3)];
/// What every plan keeps.
const BOUNDS: Bounds = Bounds { first: 3, last: 1, longest: 4 };

struct Planner<'a> {
    plans: &'a PlanRunner<'a>,
    table: &'a Table,
    progress: &'a Listener,
    /// The samples of the plain loop.
    reference: Tensor,
    /// For every sample and step the cosine between both passes, where there is guidance.
    cosines: Option<Vec<Vec<f64>>>,
    profile: Profile,
    /// How much an error at a step moves the sample.
    weights: Vec<f64>,
    /// Evaluations of a step.
    passes: f64,
}

/// A choice of the planner.
#[derive(Debug, Clone)]
struct RankedPlan {
    plan: StepPlan,
    gate: usize,
    kind: Forecast,
    computed: Vec<bool>,
}

/// The best plan that takes `latency` of the time of the plain loop, or the best plain grid where no plan beats that; and
/// a sentence where it is the grid.
pub(super) fn find(
    compiler: &PlanCompiler,
    latency: f64,
    images: Option<&ImageReference>,
    progress: &Listener,
) -> Result<(StepPlan, Option<String>), Failure> {
    let plans = compiler.plans;
    if !(latency > 0.0 && latency < 1.0) {
        return Err(Failure::Usage(format!("--latency is {latency}, expected a share between 0 and 1")));
    }
    let table = plans.table()?;
    let steps = table.rows.len();
    if steps < 2 * BOUNDS.first {
        return Err(Failure::Usage(format!(
            "a plan for {steps} steps saves nothing; --search finds timesteps for few steps"
        )));
    }
    let planner = Planner::new(plans, &table, progress)?;
    let baseline = Baseline::new(compiler, &table)?;
    let mut share = latency;
    for attempt in 0..ATTEMPTS {
        let Some(plan) = planner.best(share)? else { break };
        let timed = baseline.measure(compiler, &format!("plan{attempt}"), table.clone(), plan)?;
        if timed.share <= latency * (1.0 + TOLERANCE) {
            return baseline.decide(compiler, timed, images, progress);
        }
        // Evaluations are not all of the time.
        share *= latency / timed.share;
    }
    acceptance::plain_grid(&baseline, compiler, latency)
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

impl<'a> Planner<'a> {
    /// Runs the plain loop for everything that plans are made of.
    fn new(plans: &'a PlanRunner<'a>, table: &'a Table, progress: &'a Listener) -> Result<Planner<'a>, Failure> {
        let steps = table.rows.len();
        let calibration = Calibration::new(plans, table, plans.roles);
        let mut planner = Planner {
            plans,
            table,
            progress,
            reference: plans.samples(table, &plans.full_plan(table), RANKING)?,
            cosines: plans.guidance.is_some().then(|| agreement_of_passes(&calibration)).transpose()?,
            profile: Profile::new(&KINDS, BOUNDS.longest, steps),
            weights: weights(table),
            passes: if plans.guidance.is_some() { 2.0 } else { 1.0 },
        };
        // Errors of forecasts of the prediction, over both passes.
        let record = calibration.first()?;
        for pass in 0..record.first().map_or(0, |step| step.outputs.len()) {
            planner.profile.restart();
            for step in record {
                planner.profile.push(step.numbers(pass, &plans.roles.output)?)?;
            }
        }
        Ok(planner)
    }

    /// The plan that loses least of those that take this share of the evaluations; `None` if none takes so few.
    fn best(&self, share: f64) -> Result<Option<StepPlan>, Failure> {
        let steps = self.table.rows.len();
        let budget = share * self.passes * steps as f64;
        let mut choices = Vec::new();
        for threshold in GATES {
            let end = self.cosines.as_ref().map_or(steps, |cosines| gate(cosines, threshold, 0.9));
            for kind in KINDS {
                choices.extend(self.choose(end, kind, budget)?);
            }
        }
        let mut best: Option<(f64, RankedPlan)> = None;
        let count = choices.len();
        for (index, choice) in choices.into_iter().enumerate() {
            self.progress.hear(&Progress::new(index, count, "plans"));
            let loss = self.loss(&choice.plan)?;
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, choice));
            }
        }
        let Some((_, choice)) = best else { return Ok(None) };
        let mut done = 0;
        let mut measure = |computed: &[bool]| {
            self.progress.hear(&Progress::new(done, REFINEMENTS, "refinements"));
            done += 1;
            let plan = self.plan(choice.gate, choice.kind, computed)?;
            self.loss(&plan)
        };
        let (computed, loss) = refine(choice.computed.clone(), BOUNDS, REFINEMENTS, &mut measure)?;
        let mut plan = self.plan(choice.gate, choice.kind, &computed)?;
        let evidence = json!({
            "evaluations": share, "gate": choice.gate, "forecast": format!("{:?}", choice.kind),
            "computed": computed.iter().filter(|&&c| c).count(), "rmse": loss,
        });
        plan.evidence = evidence.as_object().cloned().unwrap_or_default();
        Ok(Some(plan))
    }

    /// The plan of a gate and a kind of forecast that fits the budget, if there is one.
    fn choose(&self, end: usize, kind: Forecast, budget: f64) -> Result<Option<RankedPlan>, Failure> {
        let (steps, passes) = (self.weights.len(), self.passes);
        let errors: Vec<Vec<f64>> = self
            .profile
            .errors(kind)
            .iter()
            .zip(&self.weights)
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
            match within_budget(&errors, cost, middle, BOUNDS) {
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
        Ok(Some(RankedPlan { plan, gate: end, kind, computed }))
    }

    fn plan(&self, end: usize, kind: Forecast, computed: &[bool]) -> Result<StepPlan, Error> {
        let mut plan = self.plans.full_plan(self.table);
        if end < computed.len() {
            guide_until(&mut plan, end)?;
        }
        forecast(&mut plan, std::slice::from_ref(&self.plans.roles.output), computed, kind)?;
        plan.check()?;
        Ok(plan)
    }

    /// The root mean square distance to the samples of the plain loop.
    fn loss(&self, plan: &StepPlan) -> Result<f64, Failure> {
        let found = self.plans.samples(self.table, plan, RANKING)?;
        let all = pairs(&self.reference, &found, 2.0)?;
        Ok((all.iter().map(|p| p.rmse * p.rmse).sum::<f64>() / all.len().max(1) as f64).sqrt())
    }
}
