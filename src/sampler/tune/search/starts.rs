//! The grids that a search for timesteps begins with.

use super::PlanRunner;
use crate::Failure;
use anyhow::anyhow;
use lathe_ir::{DataType, Tensor};
use lathe_passes::sampler::{
    Clip, Row, Scale, Table,
    methods::StepRecord,
    search::{Candidate, shortest},
};
use std::collections::BTreeMap;

/// The grids to begin with: as the scheduler spreads steps, evenly with both ends, and along the shortest path.
pub(super) fn candidates(
    plans: &PlanRunner,
    dense: &Table,
    record: &[StepRecord],
    steps: usize,
) -> Result<Vec<Candidate>, Failure> {
    let train = plans.scheduler.num_train_timesteps;
    let whole = |times: Vec<f64>| -> Option<Candidate> {
        let mut all: Vec<usize> = times.iter().map(|&t| (t.max(0.0) as usize).min(train - 1)).collect();
        all.dedup();
        (all.len() == steps && all.is_sorted_by(|a, b| a > b)).then(|| Candidate::plain(all))
    };
    let own = plans.table_of(steps)?.rows.iter().map(|row| row.time).collect();
    let even = (1..=steps).rev().map(|i| (i * train / steps) as f64 - 1.0).collect();
    let mut found: Vec<Candidate> = [whole(own), whole(even)].into_iter().flatten().collect();
    if let Some(path) = path(plans, dense, record, steps)? {
        found.extend(whole(path));
    }
    found.dedup();
    Ok(found)
}

/// The timesteps of the shortest path along what the dense sampler saw.
fn path(plans: &PlanRunner, dense: &Table, record: &[StepRecord], steps: usize) -> Result<Option<Vec<f64>>, Failure> {
    let mut states = Vec::new();
    let mut outputs = Vec::new();
    for (row, step) in dense.rows.iter().zip(record) {
        let all = |t: &Tensor| t.to_f64s().ok_or_else(|| anyhow!("the denoiser gives no real numbers"));
        states.push(all(&step.latent)?.into_iter().map(|v| v / row.input_scale).collect::<Vec<f64>>());
        outputs.push(all(&guided(plans, step)?)?);
    }
    let size = states.first().map_or(0, Vec::len);
    if states.len() != dense.rows.len() || outputs.iter().any(|o| o.len() != size) {
        // A variance beside the prediction: the channels are not taken apart here.
        return Ok(None);
    }
    let end = jump(dense.rows.last(), dense.clip, &states, &outputs, states.len() - 1);
    let rms_distance =
        |a: &[f64], b: &[f64]| (a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
    let start: Vec<f64> = states.iter().map(|state| rms_distance(state, &states[0])).collect();
    let times: Vec<f64> = dense.rows.iter().map(|row| row.time).collect();
    let mut costs: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for from in 0..times.len() {
        for to in from + 1..=times.len() {
            let grid = if to < times.len() { vec![times[from], times[to]] } else { vec![times[from]] };
            let Ok(table) = plans.table_exactly_at(&grid) else { continue };
            let reached = jump(table.rows.first(), dense.clip, &states, &outputs, from);
            let target = if to < times.len() { &states[to] } else { &end };
            costs.insert((from, to), rms_distance(&reached, target));
        }
    }
    let found = shortest(&start, &|from, to| costs.get(&(from, to)).copied().unwrap_or(f64::INFINITY), steps);
    Ok(found.map(|path| path.into_iter().map(|node| times[node]).collect()))
}

/// One first-order step with the numbers of `row` from what was record at a step.
fn jump(row: Option<&Row>, clip: Clip, states: &[Vec<f64>], outputs: &[Vec<f64>], at: usize) -> Vec<f64> {
    let Some(row) = row else { return Vec::new() };
    let own = row.history.first().copied().unwrap_or(0.0);
    let [of_state, of_output, of_estimate] = row.kept;
    let step = |(x, m): (&f64, &f64)| {
        let estimate = row.estimate[0] * x + row.estimate[1] * m;
        let estimate = if let Clip::Clamp(range) = clip { estimate.clamp(-range, range) } else { estimate };
        row.state * x + row.output * m + own * (of_state * x + of_output * m + of_estimate * estimate)
    };
    states[at].iter().zip(&outputs[at]).map(step).collect()
}

/// The prediction of a step, guided as samples are.
fn guided(plans: &PlanRunner, step: &StepRecord) -> Result<Tensor, Failure> {
    let find =
        |outputs: &[(String, Tensor)]| outputs.iter().find(|(n, _)| *n == plans.roles.output).map(|(_, t)| t.clone());
    let missing = || anyhow!("the denoiser gave no `{}`", plans.roles.output);
    let cond = find(&step.outputs[0]).ok_or_else(missing)?;
    let Some(uncond) = step.outputs.get(1) else { return Ok(cond) };
    let uncond = find(uncond).ok_or_else(missing)?;
    let scale = match plans.guidance.map(|g| g.scale) {
        Some(Scale::Constant(scale)) => scale,
        _ => 3.0,
    };
    let all = |t: &Tensor| t.to_f64s().ok_or_else(|| anyhow!("the denoiser gives no real numbers"));
    let joined: Vec<f64> = all(&cond)?.iter().zip(all(&uncond)?).map(|(c, u)| u + scale * (c - u)).collect();
    Ok(Tensor::from_f64s(DataType::Double, cond.dims(), &joined).ok_or_else(missing)?)
}
