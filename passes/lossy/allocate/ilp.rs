//! Several budgets, and options that exclude each other: an integer linear programme.
//!
//! One binary variable per option; the options of a group sum to 1, or to the variable of the option around the group.
//! The solver starts from a greedy plan, because it may find none by itself; the bound is the Lagrangian one, or the
//! solver's own gap where that is narrower.

use super::greedy::{allowed, at_prices, bound, improve, price_beside};
use super::table::{Plan, SolveError, Status, Tree, share};
use crate::Quantity;
use good_lp::{
    Expression, ProblemVariables, ResolutionError, Solution, SolutionStatus, SolverModel, Variable, WithMipGap,
    WithTimeLimit, variable,
};

/// The relative gap at which the solver may stop.
const GAP: f64 = 1e-4;

/// Rounds over the prices of all quantities.
const ROUNDS: usize = 12;

/// Times that a plan beyond a limit by the solver's tolerance is asked for again.
const RETRIES: i32 = 3;

/// The plan of least error within `limits`, each of which can be met by itself; `seconds` are allowed.
pub(super) fn solve(tree: &Tree, limits: &[(Quantity, u64)], seconds: f64) -> Result<Plan, SolveError> {
    let mut prices: Vec<(Quantity, f64)> = limits.iter().map(|&(m, _)| (m, 0.0)).collect();
    let mut least: f64 = 0.0;
    for _ in 0..ROUNDS {
        for at in 0..prices.len() {
            prices[at].1 = price_beside(tree, &prices, at, limits[at].1);
            least = least.max(bound(tree, &at_prices(tree, &prices), &prices, limits));
        }
    }
    let mut start = at_prices(tree, &prices).picks;
    let mut known = None;
    if allowed(tree, &tree.existing(&start), limits) {
        improve(tree, &mut start, limits);
        known = Some(tree.existing(&start));
    }
    let mut found = None;
    for retry in 0..RETRIES {
        // A plan that the solver's tolerance let through is asked for again within a little less.
        let room = 1.0 - 1e-6 * f64::from(retry);
        match programme(tree, limits, room, known.as_deref(), seconds) {
            Ok((choices, status)) if allowed(tree, &choices, limits) => {
                found = Some((choices, status));
                break;
            }
            Ok(_) => {}
            Err(ResolutionError::Infeasible) if known.is_none() && retry == 0 => return Err(infeasible(tree, limits)),
            Err(error) if known.is_none() => return Err(SolveError::Solver(error.to_string())),
            Err(_) => break,
        }
    }
    let better = |a: &[Option<usize>], b: &[Option<usize>]| tree.totals(a).1 < tree.totals(b).1;
    let (choices, ended) = match (found, known) {
        (Some((choices, status)), Some(known)) if better(&known, &choices) => (known, Some(status)),
        (Some((choices, status)), _) => (choices, Some(status)),
        (None, Some(known)) => (known, None),
        (None, None) => return Err(SolveError::Solver("every plan it found is beyond a limit".to_owned())),
    };
    let (used, objective) = tree.totals(&choices);
    // The solver proves its own gap.
    if matches!(ended, Some(SolutionStatus::Optimal | SolutionStatus::GapLimit)) {
        least = least.max(objective * (1.0 - GAP));
    }
    let bound = least.min(objective);
    let gap = share(objective, bound);
    let status = match ended {
        Some(SolutionStatus::Optimal) => Status::Optimal,
        Some(SolutionStatus::TimeLimit) | None if gap > GAP => Status::TimeLimit(gap),
        _ => Status::Gap(gap),
    };
    Ok(Plan { choices, objective, bound, status, used })
}

fn infeasible(tree: &Tree, limits: &[(Quantity, u64)]) -> SolveError {
    let least = |of: Quantity| {
        let smallest = tree.smallest(of);
        tree.outer.iter().map(|&n| smallest[n]).sum()
    };
    SolveError::Infeasible { smallest: limits.iter().map(|&(m, limit)| (m, least(m), limit)).collect() }
}

/// Options that another of their group matches in every limited quantity and beats in one, and that hold no groups.
fn useful(tree: &Tree, limits: &[(Quantity, u64)]) -> Vec<Vec<bool>> {
    let nodes = tree.nodes.iter();
    nodes
        .map(|node| {
            let options = &node.group.options;
            let plain = |o: usize| node.inner[o].is_empty();
            let beaten = |o: usize| {
                (0..options.len()).any(|other| {
                    let (a, b) = (&options[other], &options[o]);
                    let costs = || limits.iter().map(|&(m, _)| (a.cost.of(m), b.cost.of(m)));
                    let no_worse = a.error <= b.error && costs().all(|(a, b)| a <= b);
                    let better = a.error < b.error || costs().any(|(a, b)| a < b) || other < o;
                    other != o && plain(other) && no_worse && better
                })
            };
            (0..options.len()).map(|o| !plain(o) || !beaten(o)).collect()
        })
        .collect()
}

type Found = (Vec<Option<usize>>, SolutionStatus);

fn programme(
    tree: &Tree,
    limits: &[(Quantity, u64)],
    room: f64,
    start: Option<&[Option<usize>]>,
    seconds: f64,
) -> Result<Found, ResolutionError> {
    let mut kept = useful(tree, limits);
    if let Some(start) = start {
        start.iter().zip(&mut kept).for_each(|(choice, kept)| choice.iter().for_each(|&o| kept[o] = true));
    }
    let mut variables = ProblemVariables::new();
    let mut of: Vec<Vec<Option<Variable>>> = Vec::new();
    for (at, kept) in kept.iter().enumerate() {
        let mut add = |(option, &kept): (usize, &bool)| {
            kept.then(|| {
                let binary = variable().binary();
                variables.add(match start {
                    Some(start) => binary.initial(f64::from(u8::from(start[at] == Some(option)))),
                    None => binary,
                })
            })
        };
        of.push(kept.iter().enumerate().map(&mut add).collect());
    }
    // The solver's tolerances are absolute: figures near 1.
    let largest = tree.nodes.iter().flat_map(|n| &n.group.options).map(|o| o.error).fold(0.0, f64::max);
    let scale = if largest > 0.0 { 1.0 / largest } else { 1.0 };
    let all = || {
        let options = |(at, vars): (usize, &Vec<Option<Variable>>)| {
            let taken: Vec<(usize, usize, Variable)> =
                vars.iter().enumerate().filter_map(|(o, v)| Some((at, o, (*v)?))).collect();
            taken
        };
        of.iter().enumerate().flat_map(options)
    };
    let option = |at: usize, o: usize| &tree.nodes[at].group.options[o];
    let objective: Expression = all().map(|(at, o, v)| v * (option(at, o).error * scale)).sum();
    let problem = variables.minimise(objective);
    #[cfg(not(feature = "highs"))]
    let problem = problem.using(good_lp::microlp);
    #[cfg(feature = "highs")]
    let problem = problem.using(good_lp::highs);
    let problem = problem.with_mip_gap(GAP as f32).map_err(|e| ResolutionError::Str(e.to_string()))?;
    let mut problem = problem.with_time_limit(seconds);
    for (node, vars) in tree.nodes.iter().zip(&of) {
        let sum: Expression = vars.iter().flatten().copied().map(Expression::from).sum();
        let around = node.around.and_then(|a| of[a.group][a.option]);
        problem.add_constraint(match around {
            Some(around) => (sum - around).eq(0),
            None => sum.eq(1),
        });
    }
    for &(measure, limit) in limits {
        let unit = 1.0 / limit.max(1) as f64;
        let spent: Expression = all().map(|(at, o, v)| v * (option(at, o).cost.of(measure) as f64 * unit)).sum();
        problem.add_constraint(spent.leq(limit as f64 * unit * room));
    }
    let solution = problem.solve()?;
    let taken = |vars: &Vec<Option<Variable>>| {
        let value = |v: &Option<Variable>| v.map_or(0.0, |v| solution.value(v));
        vars.iter().position(|v| value(v) > 0.5)
    };
    let picks: Vec<usize> = of.iter().map(|vars| taken(vars).unwrap_or(0)).collect();
    Ok((tree.existing(&picks), solution.status()))
}
