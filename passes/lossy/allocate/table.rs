//! What can be chosen and what it may take: plain data, and its checks. Knows no models.

use crate::{Quantity, QuantityMap};

/// One option of a group, and the groups that exist only where it is taken.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Item {
    /// What it takes, without what `inner` does. What is not there counts as 0; no budget can be given for latency unless
    /// every item has one.
    pub cost: QuantityMap<u64>,
    /// What it loses, at least 0, in one currency for all groups.
    pub error: f64,
    /// The groups inside.
    pub inner: Vec<Group>,
}

/// A site: exactly one option is taken where the site exists.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Group {
    /// As reports call it.
    pub name: String,
    /// At least one; leaving the site as it is has to be among them to be possible.
    pub options: Vec<Item>,
}

/// An option of a group; groups are counted depth first, options and their inner groups in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pick {
    /// The index of the group.
    pub group: usize,
    /// The index of its option.
    pub option: usize,
}

/// What all options together may take at most.
pub type Limits = QuantityMap<u64>;

/// How much is known about a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Status {
    /// No plan within the budget loses less, apart from rounding.
    Optimal,
    /// The search ended at a bound: at most this share of the objective could still be gained.
    Gap(f64),
    /// The time ran out; at most this share of the objective could still be gained.
    TimeLimit(f64),
}

/// The part of `objective` above `bound`.
pub(super) fn share(objective: f64, bound: f64) -> f64 {
    if objective > bound { (objective - bound) / objective } else { 0.0 }
}

/// One option per group that exists.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The option of every group, counted as in [`Pick`]; `None` where the option around the group was not taken.
    pub choices: Vec<Option<usize>>,
    /// The sum of errors.
    pub objective: f64,
    /// No plan within the budget loses less than this.
    pub bound: f64,
    /// How much is known.
    pub status: Status,
    /// What the plan takes.
    pub used: QuantityMap<u64>,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SolveError {
    /// No plan meets the budget.
    #[error("no plan fits: {}", smallest.iter().map(|(q, least, limit)| format!("at least {least} {}, {limit} allowed", q.unit()))
        .collect::<Vec<_>>().join("; "))]
    Infeasible {
        /// For every limited quantity: the least that can be reached in it alone, and the limit.
        smallest: Vec<(Quantity, u64, u64)>,
    },
    /// A group is not sound.
    #[error("group `{group}` {reason}")]
    BadGroup {
        /// Its name.
        group: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The exact programme was asked for where it does not apply.
    #[error("this solver takes one budget, found {budgets}")]
    NotPareto {
        /// Limits given.
        budgets: usize,
    },
    /// No plan loses as little as was asked.
    #[error("no plan has an error of at most {limit}, the least is {least}")]
    TooExact {
        /// What was asked.
        limit: f64,
        /// What can be reached.
        least: f64,
    },
    /// The solver gave up without a plan.
    #[error("the solver found no plan: {0}")]
    Solver(String),
}

/// A group in the flat order of [`Pick`].
pub(super) struct Node<'a> {
    pub group: &'a Group,
    /// The group and option around it.
    pub around: Option<Pick>,
    /// The groups inside each option.
    pub inner: Vec<Vec<usize>>,
}

/// Every group, a group before those inside it.
pub(super) struct Tree<'a> {
    pub nodes: Vec<Node<'a>>,
    pub outer: Vec<usize>,
}

impl<'a> Tree<'a> {
    /// Flattens and checks groups.
    pub fn new(groups: &'a [Group], limits: &Limits) -> Result<Self, SolveError> {
        let mut tree = Tree { nodes: Vec::new(), outer: Vec::new() };
        for group in groups {
            let index = tree.add(group, None, limits.get(Quantity::Latency).is_some())?;
            tree.outer.push(index);
        }
        for of in Quantity::ALL {
            let mut sum = 0u64;
            for node in &tree.nodes {
                for item in &node.group.options {
                    // Every sum that is taken later stays below this one, and is exact as a float.
                    sum = sum.saturating_add(item.cost.of(of));
                    if sum >> 53 != 0 {
                        let (group, reason) = (node.group.name.clone(), "takes the sum of all costs beyond 2^53");
                        return Err(SolveError::BadGroup { group, reason });
                    }
                }
            }
        }
        Ok(tree)
    }

    fn add(&mut self, group: &'a Group, around: Option<Pick>, timed: bool) -> Result<usize, SolveError> {
        let bad = |reason| Err(SolveError::BadGroup { group: group.name.clone(), reason });
        if group.options.is_empty() {
            return bad("has no options");
        }
        if group.options.iter().any(|o| !(o.error >= 0.0 && o.error.is_finite())) {
            return bad("has an option whose error is negative or not a finite number");
        }
        if timed && group.options.iter().any(|o| o.cost.get(Quantity::Latency).is_none()) {
            return bad("has an option whose latency was not measured");
        }
        let index = self.nodes.len();
        self.nodes.push(Node { group, around, inner: Vec::new() });
        for (option, item) in group.options.iter().enumerate() {
            let around = Some(Pick { group: index, option });
            let inner = item.inner.iter().map(|g| self.add(g, around, timed)).collect::<Result<_, _>>()?;
            self.nodes[index].inner.push(inner);
        }
        Ok(index)
    }

    /// The least of one quantity that can be reached inside every group.
    pub fn smallest(&self, of: Quantity) -> Vec<u64> {
        let mut least = vec![0; self.nodes.len()];
        for (at, node) in self.nodes.iter().enumerate().rev() {
            let total = |(o, inner): (&Item, &Vec<usize>)| o.cost.of(of) + inner.iter().map(|&i| least[i]).sum::<u64>();
            least[at] = node.group.options.iter().zip(&node.inner).map(total).min().unwrap_or(0);
        }
        least
    }

    /// Which groups exist under `picks`: the picks of the others removed.
    pub fn existing(&self, picks: &[usize]) -> Vec<Option<usize>> {
        let mut choices: Vec<Option<usize>> = Vec::with_capacity(picks.len());
        for (node, &pick) in self.nodes.iter().zip(picks) {
            choices.push(node.around.is_none_or(|a| choices[a.group] == Some(a.option)).then_some(pick));
        }
        choices
    }

    /// What a plan takes and loses.
    pub fn totals(&self, choices: &[Option<usize>]) -> (QuantityMap<u64>, f64) {
        let taken = || self.nodes.iter().zip(choices).filter_map(|(n, c)| c.map(|c| &n.group.options[c]));
        (QuantityMap::of_all(|q| taken().map(|o| o.cost.of(q)).sum()), taken().map(|o| o.error).sum())
    }
}
