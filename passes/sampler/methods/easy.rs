//! What the network adds to the latent is kept while it is expected to change little: the rule of the adaptive form, run
//! ahead on calibration runs.
//!
//! Source: Zhou et al. 2025, EasyCache, arXiv:2507.02860.

use super::{Method, Options, PlanContext, Stages, substitute};
use crate::{
    Opt,
    sampler::{Adaptive, Error, Kind, Ref, StepPlan, Substitution, Table},
};

pub(super) const METHOD: Method = Method {
    name: "easy",
    summary: "skips steps by EasyCache's rule, run ahead",
    doc: "Steps at which the rule of the adaptive form computes nothing, in most runs of the plain loop, add to the latent \
          what the network added at the last computed step. Where runs do not agree, `--form adaptive` lets each decide.",
    options: &[
        Opt {
            name: "threshold",
            unit: "a number",
            default: "0.05",
            doc: "the share of change at which a step is computed",
        },
        Opt { name: "warmup", unit: "a number", default: "5", doc: "first steps that are always computed" },
        Opt { name: "tail", unit: "a number", default: "1", doc: "last steps that are always computed" },
        Opt {
            name: "share",
            unit: "a number",
            default: "0.3",
            doc: "the share of runs that must want a step computed",
        },
    ],
    stages: Stages::One,
    source: "Zhou et al. 2025, EasyCache, arXiv:2507.02860",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let rule =
        Adaptive { threshold: options.get("threshold")?, warmup: options.get("warmup")?, tail: options.get("tail")? };
    let runs: Vec<Vec<bool>> = cx.calibration.paths()?.iter().map(|p| follow(&rule, &p.states, &p.flows)).collect();
    let (computed, agreement) = vote(&runs, options.get("share")?);
    easy(plan, cx.table, cx.calibration.latent(), &cx.parts.output, &computed)?;
    plan.evidence.insert("agreement".to_owned(), agreement.into());
    Ok(())
}

/// Which steps the rule computes in one run that computed all: `states` and `flows` are, for every step, the latent and
/// the prediction of the conditional pass in the coordinates of a flow.
fn follow(rule: &Adaptive, states: &[Vec<f64>], flows: &[Vec<f64>]) -> Vec<bool> {
    let size = |values: &[f64]| values.iter().map(|v| v.abs()).sum::<f64>();
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y).abs()).sum::<f64>();
    let steps = states.len();
    // The last computed step, the rate at which the flow changes with the latent, and the change expected since.
    let (mut last, mut rate, mut sum) = (None::<usize>, 0.0, 0.0);
    let mut decide = |step: usize| {
        let expected = match last {
            Some(last) => sum + rate * distance(&states[step], &states[step - 1]) / size(&flows[last]),
            None => f64::INFINITY,
        };
        let forced = step < rule.warmup.max(2) || step + rule.tail >= steps;
        if !forced && expected < rule.threshold {
            sum = expected;
            return false;
        }
        if let Some(last) = last {
            rate = distance(&flows[step], &flows[last]) / distance(&states[step], &states[last]).max(1e-12);
        }
        (last, sum) = (Some(step), 0.0);
        true
    };
    (0..steps).map(&mut decide).collect()
}

/// Which steps are computed when at least this share of runs wants it; and the mean share of runs that agree with that.
fn vote(runs: &[Vec<bool>], share: f64) -> (Vec<bool>, f64) {
    let steps = runs.first().map_or(0, Vec::len);
    let wanted = |step: usize| runs.iter().filter(|run| run[step]).count() as f64 / runs.len() as f64;
    let computed: Vec<bool> = (0..steps).map(|step| step == 0 || wanted(step) >= share).collect();
    let agree = |(step, &full): (usize, &bool)| if full { wanted(step) } else { 1.0 - wanted(step) };
    let agreement = computed.iter().enumerate().map(agree).sum::<f64>() / steps.max(1) as f64;
    (computed, agreement)
}

/// Writes the entries: at steps that are not computed, the prediction is the latent plus what the network added to it at
/// the last computed step, in the coordinates of a flow.
pub fn easy(plan: &mut StepPlan, table: &Table, latent: &str, output: &str, computed: &[bool]) -> Result<(), Error> {
    if computed.len() != plan.grid.len() || table.rows.len() != computed.len() || computed.first() == Some(&false) {
        let message = format!(
            "{} decisions for {} steps, expected one for each and the first step computed",
            computed.len(),
            plan.grid.len()
        );
        return Err(Error::Plan(message));
    }
    let mut last = 0;
    for (step, &full) in computed.iter().enumerate() {
        if full {
            last = step;
            continue;
        }
        // m = (s·x − q·x + (q′ − s′)·x′ + p′·m′) / p, with the last computed step primed and x the scaled latent.
        let (now, then) = (&table.rows[step], &table.rows[last]);
        let ([q, p], [q_then, p_then]) = (now.flow.flow, then.flow.flow);
        let refs = vec![Ref::of(latent, step), Ref::of(latent, last), Ref::from(last)];
        let own = (now.flow.scale - q) / p / now.input_scale;
        let coefs = vec![own, (q_then - then.flow.scale) / p / then.input_scale, p_then / p];
        substitute(plan, step, Substitution::new(output, Kind::Affine { refs, coefs }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::guided;
    use super::*;
    use crate::sampler::testing::table;
    use serde_json::json;

    fn shown(mask: &[bool]) -> String {
        mask.iter().map(|&c| if c { 'x' } else { '.' }).collect()
    }

    /// A latent that moves by one a step, and a flow that moves half as much between steps 3 and 9 and twice otherwise.
    fn run() -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let states = (0..14).map(|i| vec![f64::from(i); 2]).collect();
        let mut flow = 10.0;
        let mut next = |i: i32| {
            flow += if (3..9).contains(&i) { 0.5 } else { 2.0 };
            vec![flow; 2]
        };
        (states, (0..14).map(&mut next).collect())
    }

    #[test]
    fn the_rule_computes_where_the_flow_turns() {
        let (states, flows) = run();
        let rule = |threshold: f64| Adaptive { threshold, warmup: 4, tail: 1 };
        assert_eq!(shown(&follow(&rule(0.0), &states, &flows)), "xxxxxxxxxxxxxx");
        assert_eq!(shown(&follow(&rule(f64::INFINITY), &states, &flows)), "xxxx.........x");
        // From the flow 16.5 on, half a unit a step: the second step brings the sum to more than a twentieth.
        assert_eq!(shown(&follow(&rule(0.05), &states, &flows)), "xxxx.x.x.xxxxx");
    }

    #[test]
    fn runs_vote() {
        let runs = [[true, true, false, false], [true, false, true, false], [true, false, false, false]].map(Vec::from);
        let (computed, agreement) = vote(&runs, 0.5);
        assert_eq!(shown(&computed), "x...");
        assert!((agreement - (1.0 + 2.0 / 3.0 + 2.0 / 3.0 + 1.0) / 4.0).abs() < 1e-12);
        assert_eq!(shown(&vote(&runs, 0.3).0), "xxx.");
    }

    #[test]
    fn what_the_network_added_is_added_again() {
        let table = table("EulerDiscreteScheduler", json!({}), 5);
        let mut plan = guided(5);
        easy(&mut plan, &table, "x", "eps", &[true, true, false, true, true]).unwrap();
        plan.check().unwrap();
        let Kind::Affine { refs, coefs } = &plan.at(2)[0].kind else { panic!() };
        assert_eq!(refs, &[Ref::of("x", 2), Ref::of("x", 1), Ref::from(1)]);
        // With any latents and the last prediction: in the flow's coordinates the difference to the latent stays.
        let (x, x_then, m_then) = (0.7, -1.3, 0.4);
        let (now, then) = (&table.rows[2], &table.rows[1]);
        let m = coefs[0] * x * now.input_scale + coefs[1] * x_then * then.input_scale + coefs[2] * m_then;
        let added = |row: &crate::sampler::Row, x: f64, m: f64| {
            row.flow.flow[0] * x + row.flow.flow[1] * m - row.flow.scale * x
        };
        assert!((added(now, x, m) - added(then, x_then, m_then)).abs() < 1e-12);
        assert!(easy(&mut guided(5), &table, "x", "eps", &[true; 4]).is_err());
        assert!(easy(&mut guided(5), &table, "x", "eps", &[false; 5]).is_err());
    }
}
