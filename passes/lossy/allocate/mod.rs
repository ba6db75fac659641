//! Choosing: one option per site so that the predicted error is least within the budget. Arithmetic on a table.

mod greedy;
mod ilp;
mod pareto;
mod table;
#[cfg(test)]
mod tests;

pub use table::{Budget, Choice, Group, Measure, Pick, Plan, SolveError, Status, Table};

use crate::{Info, Kind, Opt, Quantity};
use table::Tree;

/// How to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Solver {
    /// The Pareto programme where it applies.
    #[default]
    Auto,
    /// The exact Pareto programme: at most one limit, no conflicts.
    Pareto,
    /// The integer linear programme.
    Ilp,
    /// The same share for every group, for comparison: one limit, no conflicts.
    Uniform,
    /// Anything, from this seed, to see how well errors are predicted.
    Random(u64),
}

impl std::str::FromStr for Solver {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if let Some(seed) = text.strip_prefix("random:") {
            return seed.parse().map(Solver::Random).map_err(|_| ());
        }
        let all = [Solver::Auto, Solver::Pareto, Solver::Ilp, Solver::Uniform];
        all.into_iter().find(|s| s.name() == text).ok_or(())
    }
}

/// How the allocator is set: `--set allocate.solver=ilp`.
pub static INFO: Info = Info {
    name: "allocate",
    summary: "choose what every lossy method does where, within the budgets",
    doc: "Every method offers options for the same weights, each with its exact bytes, numbers, multiply-adds and \
          measured latency, and the error it adds to the model's output as far as the calibration set tells. One option \
          per weight is chosen so that the errors sum to the least within all budgets: by an exact Pareto programme for \
          one budget, by an integer linear programme for several.",
    options: &[Opt {
        name: "solver",
        unit: "auto, pareto, ilp, uniform or random:SEED",
        default: "auto",
        doc: "pareto takes one budget; ilp any number; for comparison, uniform keeps the same share of every \
              weight, and random takes anything, whatever the budget",
    }],
    kind: Kind::Lossy,
    lowers: &[Quantity::Parameters, Quantity::Flops],
    source: Some("Sinha and Zoltners 1979, multiple-choice knapsack; ROCKET, arXiv:2602.11008"),
};

impl Solver {
    /// As options and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Solver::Auto => "auto",
            Solver::Pareto => "pareto",
            Solver::Ilp => "ilp",
            Solver::Uniform => "uniform",
            Solver::Random(_) => "random",
        }
    }
}

/// Seconds that the integer programme may take.
const SECONDS: f64 = 10.0;

/// Chooses the plan of least error within `budget`; without any limit the least error there is.
///
/// The same table, budget and solver give the same plan, unless the time runs out.
pub fn solve(table: &Table, budget: &Budget, solver: Solver) -> Result<Plan, SolveError> {
    let tree = Tree::new(table, budget)?;
    let limits = reachable(&tree, budget)?;
    let conflicts = &table.conflicts;
    match (solver, limits.as_slice()) {
        (Solver::Auto | Solver::Pareto, []) if conflicts.is_empty() => {
            Ok(pareto::solve(&tree, Measure::Bytes, u64::MAX >> 1))
        }
        (Solver::Auto | Solver::Pareto, &[(of, limit)]) if conflicts.is_empty() => Ok(pareto::solve(&tree, of, limit)),
        (Solver::Uniform, &[(of, limit)]) if conflicts.is_empty() => Ok(greedy::uniform(&tree, of, limit)),
        (Solver::Random(seed), _) => Ok(greedy::random(&tree, seed)),
        (Solver::Pareto | Solver::Uniform, limits) => {
            Err(SolveError::NotPareto { budgets: limits.len(), conflicts: conflicts.len() })
        }
        (Solver::Auto | Solver::Ilp, limits) => ilp::solve(&tree, limits, conflicts, SECONDS),
    }
}

/// The limits, where each can be met on its own.
fn reachable(tree: &Tree, budget: &Budget) -> Result<Vec<(Measure, u64)>, SolveError> {
    let limits = budget.limits();
    let least = |of: Measure| tree.smallest(of);
    let smallest: Vec<(Measure, u64, u64)> = limits
        .iter()
        .map(|&(m, limit)| {
            let least = least(m);
            (m, tree.outer.iter().map(|&n| least[n]).sum(), limit)
        })
        .collect();
    match smallest.iter().any(|&(_, least, limit)| least > limit) {
        true => Err(SolveError::Infeasible { smallest }),
        false => Ok(limits),
    }
}

/// Every cost of one quantity worth paying, rising, each with the least error it buys; conflicts are not looked at.
///
/// Says `false` where some points were left out because there are too many; those that are there can be reached.
pub fn frontier(table: &Table, of: Measure) -> Result<(Vec<(u64, f64)>, bool), SolveError> {
    let tree = Tree::new(table, &Budget::of(of, u64::MAX >> 1))?;
    Ok(pareto::frontier(&tree, of))
}

/// The plan that takes least of one quantity with an error of at most `limit`, by bisection over the budget.
///
/// The cheapest there is where its status is optimal; `bound` is about its error, as everywhere.
pub fn cheapest(table: &Table, of: Measure, limit: f64) -> Result<Plan, SolveError> {
    let within = |most: u64| solve(table, &Budget::of(of, most), Solver::Auto);
    let mut best = within(u64::MAX >> 1)?;
    if limit.is_nan() || best.objective > limit {
        return Err(SolveError::TooExact { limit, least: best.objective });
    }
    let (mut low, mut proven) = (0, best.status == Status::Optimal);
    while low < best.used[of as usize] {
        let middle = low + (best.used[of as usize] - low) / 2;
        match within(middle) {
            Ok(plan) if plan.objective <= limit => best = plan,
            Ok(plan) => {
                proven &= plan.bound > limit;
                low = middle + 1;
            }
            Err(SolveError::Infeasible { .. }) => low = middle + 1,
            Err(other) => return Err(other),
        }
    }
    if !proven && best.status == Status::Optimal {
        best.status = Status::Gap(pareto::share(best.objective, best.bound));
    }
    Ok(best)
}
