//! What can be chosen and what it may take: plain data, and its checks. Knows no models.

use std::fmt;

/// Something that can be limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Measure {
    /// Bytes in the file.
    Bytes,
    /// Floating-point operations of one run.
    Flops,
    /// Stored numbers.
    Parameters,
    /// Measured nanoseconds.
    #[default]
    Latency,
}

impl Measure {
    /// All of them, in the order of their figures.
    pub const ALL: [Measure; 4] = [Measure::Bytes, Measure::Flops, Measure::Parameters, Measure::Latency];
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Measure::Bytes => "bytes",
            Measure::Flops => "FLOP",
            Measure::Parameters => "parameters",
            Measure::Latency => "ns",
        })
    }
}

/// One option of a group, and the groups that exist only where it is taken.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Choice {
    /// Bytes in the file, without those of `inner`; the other costs likewise.
    pub bytes: u64,
    /// Floating-point operations of one run.
    pub flops: u64,
    /// Stored numbers.
    pub parameters: u64,
    /// Measured nanoseconds; without them no budget of latency can be given.
    pub latency_ns: Option<u64>,
    /// What it loses, at least 0, in one currency for the whole table.
    pub error: f64,
    /// The groups inside.
    pub inner: Vec<Group>,
}

impl Choice {
    /// The figure of one quantity; 0 where it was not measured.
    pub fn cost(&self, of: Measure) -> u64 {
        match of {
            Measure::Bytes => self.bytes,
            Measure::Flops => self.flops,
            Measure::Parameters => self.parameters,
            Measure::Latency => self.latency_ns.unwrap_or(0),
        }
    }
}

/// A site: exactly one option is taken where the site exists.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Group {
    /// As reports call it.
    pub name: String,
    /// At least one; leaving the site as it is has to be among them to be possible.
    pub options: Vec<Choice>,
}

/// An option of a group; groups are counted depth first, options and their inner groups in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pick {
    /// The index of the group.
    pub group: usize,
    /// The index of its option.
    pub option: usize,
}

/// Everything that can be chosen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Table {
    /// The outermost groups.
    pub groups: Vec<Group>,
    /// Pairs that cannot both be taken.
    pub conflicts: Vec<[Pick; 2]>,
}

/// What all options together may take at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Budget {
    /// Bytes in the file.
    pub bytes: Option<u64>,
    /// Floating-point operations of one run.
    pub flops: Option<u64>,
    /// Stored numbers.
    pub parameters: Option<u64>,
    /// Nanoseconds.
    pub latency_ns: Option<u64>,
}

impl Budget {
    /// The limits that are given.
    pub fn limits(&self) -> Vec<(Measure, u64)> {
        let all = [self.bytes, self.flops, self.parameters, self.latency_ns];
        Measure::ALL.into_iter().zip(all).filter_map(|(measure, limit)| Some((measure, limit?))).collect()
    }

    /// Sets the limit on one quantity.
    pub fn set(&mut self, measure: Measure, limit: u64) {
        *match measure {
            Measure::Bytes => &mut self.bytes,
            Measure::Flops => &mut self.flops,
            Measure::Parameters => &mut self.parameters,
            Measure::Latency => &mut self.latency_ns,
        } = Some(limit);
    }

    /// A limit on one quantity.
    pub fn of(measure: Measure, limit: u64) -> Self {
        let limit = |of: Measure| (of == measure).then_some(limit);
        Budget {
            bytes: limit(Measure::Bytes),
            flops: limit(Measure::Flops),
            parameters: limit(Measure::Parameters),
            latency_ns: limit(Measure::Latency),
        }
    }
}

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
    /// What the plan takes, in the order of [`Measure::ALL`].
    pub used: [u64; 4],
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SolveError {
    /// No plan meets the budget.
    #[error("no plan fits: {}", smallest.iter().map(|(m, least, limit)| format!("at least {least} {m}, {limit} allowed"))
        .collect::<Vec<_>>().join("; "))]
    Infeasible {
        /// For every limited quantity: the least that can be reached in it alone, conflicts aside, and the limit.
        smallest: Vec<(Measure, u64, u64)>,
    },
    /// The table is not sound.
    #[error("group `{group}` {reason}")]
    BadGroup {
        /// Its name.
        group: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A conflict names what is not there.
    #[error("conflict {index} names a group or an option that does not exist")]
    BadConflict {
        /// Its index.
        index: usize,
    },
    /// The exact programme was asked for where it does not apply.
    #[error("this solver takes one budget and no conflicts, found {budgets} and {conflicts}")]
    NotPareto {
        /// Limits given.
        budgets: usize,
        /// Conflicts given.
        conflicts: usize,
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

/// Every group of a table, a group before those inside it.
pub(super) struct Tree<'a> {
    pub nodes: Vec<Node<'a>>,
    pub outer: Vec<usize>,
}

impl<'a> Tree<'a> {
    /// Flattens and checks a table.
    pub fn new(table: &'a Table, budget: &Budget) -> Result<Self, SolveError> {
        let mut tree = Tree { nodes: Vec::new(), outer: Vec::new() };
        for group in &table.groups {
            let index = tree.add(group, None, budget.latency_ns.is_some())?;
            tree.outer.push(index);
        }
        for of in Measure::ALL {
            let mut sum = 0u64;
            for node in &tree.nodes {
                for choice in &node.group.options {
                    // Every sum that is taken later stays below this one, and is exact as a float.
                    sum = sum.saturating_add(choice.cost(of));
                    if sum >> 53 != 0 {
                        let (group, reason) = (node.group.name.clone(), "takes the sum of all costs beyond 2^53");
                        return Err(SolveError::BadGroup { group, reason });
                    }
                }
            }
        }
        for (index, pair) in table.conflicts.iter().enumerate() {
            let known = |p: &Pick| tree.nodes.get(p.group).is_some_and(|n| p.option < n.group.options.len());
            if !pair.iter().all(known) {
                return Err(SolveError::BadConflict { index });
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
        if timed && group.options.iter().any(|o| o.latency_ns.is_none()) {
            return bad("has an option whose latency was not measured");
        }
        let index = self.nodes.len();
        self.nodes.push(Node { group, around, inner: Vec::new() });
        for (option, choice) in group.options.iter().enumerate() {
            let around = Some(Pick { group: index, option });
            let inner = choice.inner.iter().map(|g| self.add(g, around, timed)).collect::<Result<_, _>>()?;
            self.nodes[index].inner.push(inner);
        }
        Ok(index)
    }

    /// The least of one quantity that can be reached inside every group.
    pub fn smallest(&self, of: Measure) -> Vec<u64> {
        let mut least = vec![0; self.nodes.len()];
        for (at, node) in self.nodes.iter().enumerate().rev() {
            let total = |(o, inner): (&Choice, &Vec<usize>)| o.cost(of) + inner.iter().map(|&i| least[i]).sum::<u64>();
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
    pub fn totals(&self, choices: &[Option<usize>]) -> ([u64; 4], f64) {
        let taken = || self.nodes.iter().zip(choices).filter_map(|(n, c)| c.map(|c| &n.group.options[c]));
        (Measure::ALL.map(|m| taken().map(|o| o.cost(m)).sum()), taken().map(|o| o.error).sum())
    }
}
