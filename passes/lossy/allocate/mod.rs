//! Choosing: one option per site so that the predicted error is least within the budget. Arithmetic on a table.

mod greedy;
mod ilp;
mod pareto;
mod table;
#[cfg(test)]
mod tests;

pub use table::{Group, Item, Limits, Pick, Plan, SolveError, Status};

use crate::{Info, Kind, Opt, Quantity, Saving};
use table::Tree;

/// How to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Solver {
    /// The Pareto programme where it applies.
    #[default]
    Auto,
    /// The exact Pareto programme: at most one limit.
    Pareto,
    /// The integer linear programme.
    Ilp,
    /// The same share for every group, for comparison: one limit.
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
    doc: "Every method offers options for the same weights, each with its exact bytes, numbers, FLOPs and \
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
    lowers: &[Saving::Parameters, Saving::Flops],
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

/// Chooses the plan of least error within `limits`; without any limit the least error there is.
///
/// The same groups, limits and solver give the same plan, unless the time runs out.
pub fn solve(groups: &[Group], limits: &Limits, solver: Solver) -> Result<Plan, SolveError> {
    let tree = Tree::new(groups, limits)?;
    let limits = reachable(&tree, limits)?;
    match (solver, limits.as_slice()) {
        (Solver::Auto | Solver::Pareto, []) => Ok(pareto::solve(&tree, Quantity::Size, u64::MAX >> 1)),
        (Solver::Auto | Solver::Pareto, &[(of, limit)]) => Ok(pareto::solve(&tree, of, limit)),
        (Solver::Uniform, &[(of, limit)]) => Ok(greedy::uniform(&tree, of, limit)),
        (Solver::Random(seed), _) => Ok(greedy::random(&tree, seed)),
        (Solver::Pareto | Solver::Uniform, limits) => Err(SolveError::NotPareto { budgets: limits.len() }),
        (Solver::Auto | Solver::Ilp, limits) => ilp::solve(&tree, limits, SECONDS),
    }
}

/// The limits, where each can be met on its own.
fn reachable(tree: &Tree, limits: &Limits) -> Result<Vec<(Quantity, u64)>, SolveError> {
    let limits: Vec<(Quantity, u64)> = limits.iter().collect();
    let least = |of: Quantity| tree.smallest(of);
    let smallest: Vec<(Quantity, u64, u64)> = limits
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
