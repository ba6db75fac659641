//! One budget: the exact Pareto programme over the tree.
//!
//! The frontier of an option is its own point added to every combination of the frontiers inside it; the frontier of a
//! group is the best of its options. A point is given up when even the smallest rest does not fit, or when even at the
//! best price for the budget (a Lagrangian bound) it cannot beat a greedy plan. No grid, so nothing is rounded.

use super::greedy::{Priced, at_prices, bound, improve, price};
use super::table::{Pick, Plan, Status, Tree, share};
use crate::Quantity;

/// Points of one frontier above which only the most promising stay, and nothing is proven.
const MOST_POINTS: usize = 200_000;

/// A cost, its error and how it came about.
#[derive(Clone, Copy)]
struct Point {
    cost: u64,
    error: f64,
    from: u32,
}

/// How a point came about.
enum Step {
    Start,
    Take(Pick, u32),
    Join(u32, u32),
}

/// What prunes: nothing is pruned by a bound where `price` is 0 and `known` is infinite.
struct Search<'a> {
    tree: &'a Tree<'a>,
    of: Quantity,
    limit: u64,
    price: f64,
    known: f64,
    priced: &'a Priced,
    smallest: Vec<u64>,
    steps: Vec<Step>,
    complete: bool,
}

/// What everything outside takes at least, in cost and in error plus price times cost.
#[derive(Clone, Copy)]
struct Outside {
    cost: u64,
    priced: f64,
}

/// The plan of least error with at most `limit` of one quantity, which can be reached.
pub(super) fn solve(tree: &Tree, of: Quantity, limit: u64) -> Plan {
    let price = price(tree, of, limit);
    let prices = [(of, price)];
    let priced = at_prices(tree, &prices);
    let bound = bound(tree, &priced, &prices, &[(of, limit)]);
    let mut picks = priced.picks.clone();
    improve(tree, &mut picks, &[(of, limit)]);
    let start = tree.existing(&picks);
    let known = tree.totals(&start).1;
    let mut search = Search::new(tree, of, limit, price, known, &priced);
    let ends = search.all();
    let choices = match ends.last() {
        Some(end) if end.error <= known => search.trace(end.from),
        _ => start,
    };
    let (used, objective) = tree.totals(&choices);
    let status = if search.complete { Status::Optimal } else { Status::Gap(share(objective, bound)) };
    let bound = if search.complete { objective } else { bound.min(objective) };
    Plan { choices, objective, bound, status, used }
}

impl<'a> Search<'a> {
    fn new(tree: &'a Tree, of: Quantity, limit: u64, price: f64, known: f64, priced: &'a Priced) -> Self {
        let (smallest, steps) = (tree.smallest(of), vec![Step::Start]);
        Search { tree, of, limit, price, known, priced, smallest, steps, complete: true }
    }

    fn all(&mut self) -> Vec<Point> {
        let start = vec![Point { cost: 0, error: 0.0, from: 0 }];
        self.join(start, &self.tree.outer, Outside { cost: 0, priced: 0.0 })
    }

    /// The frontier of a group.
    fn group(&mut self, at: usize, outside: Outside) -> Vec<Point> {
        let node = &self.tree.nodes[at];
        let mut points = Vec::new();
        for (option, choice) in node.group.options.iter().enumerate() {
            let start = vec![Point { cost: choice.cost.of(self.of), error: choice.error, from: 0 }];
            for mut point in self.join(start, &node.inner[option], outside) {
                self.steps.push(Step::Take(Pick { group: at, option }, point.from));
                point.from = (self.steps.len() - 1) as u32;
                points.push(point);
            }
        }
        self.thin(points)
    }

    /// The points of `start` with everything of `groups` added.
    fn join(&mut self, start: Vec<Point>, groups: &[usize], outside: Outside) -> Vec<Point> {
        let mut points = start;
        points.retain(|p| self.promising(p, self.rest(groups, outside)));
        for (done, &at) in groups.iter().enumerate() {
            let Some(first) = points.first() else { break };
            let rest = self.rest(&groups[done + 1..], outside);
            // What the group's own points meet at least: the best of what is there, and the rest.
            let worth = points.iter().map(|p| self.worth(p)).fold(f64::INFINITY, f64::min);
            let around = Outside { cost: rest.cost + first.cost, priced: rest.priced + worth };
            let added = self.group(at, around);
            let mut next: Vec<(Point, u32, u32)> = Vec::new();
            for a in &points {
                for b in &added {
                    let sum = Point { cost: a.cost + b.cost, error: a.error + b.error, from: 0 };
                    if self.promising(&sum, rest) {
                        next.push((sum, a.from, b.from));
                    }
                }
            }
            next.sort_unstable_by(|(a, ..), (b, ..)| a.cost.cmp(&b.cost).then(a.error.total_cmp(&b.error)));
            let mut joined = Vec::new();
            let mut lowest = f64::INFINITY;
            for (mut sum, a, b) in next {
                if sum.error < lowest {
                    lowest = sum.error;
                    self.steps.push(Step::Join(a, b));
                    sum.from = (self.steps.len() - 1) as u32;
                    joined.push(sum);
                }
            }
            points = self.thin(joined);
        }
        points
    }

    fn rest(&self, groups: &[usize], outside: Outside) -> Outside {
        groups.iter().fold(outside, |sum, &g| Outside {
            cost: sum.cost + self.smallest[g],
            priced: sum.priced + self.priced.least[g],
        })
    }

    fn worth(&self, point: &Point) -> f64 {
        point.error + self.price * point.cost as f64
    }

    fn promising(&self, point: &Point, rest: Outside) -> bool {
        let reach = self.worth(point) + rest.priced - self.price * self.limit as f64;
        // Sums taken in another order differ in their last bits.
        let slack = 1e-9 * (self.known + self.price * self.limit as f64) + f64::MIN_POSITIVE;
        point.cost + rest.cost <= self.limit && reach <= self.known + slack
    }

    /// The points no other beats, by cost; fewer where there are too many.
    fn thin(&mut self, mut points: Vec<Point>) -> Vec<Point> {
        let by_cost = |a: &Point, b: &Point| a.cost.cmp(&b.cost).then(a.error.total_cmp(&b.error));
        points.sort_by(by_cost);
        let mut lowest = f64::INFINITY;
        points.retain(|p| {
            let better = p.error < lowest;
            lowest = lowest.min(p.error);
            better
        });
        if points.len() > MOST_POINTS {
            self.complete = false;
            if self.known.is_finite() {
                points.sort_by(|a, b| self.worth(a).total_cmp(&self.worth(b)));
                points.truncate(MOST_POINTS);
                points.sort_by(by_cost);
            } else {
                let (last, stride) = (points.len() - 1, points.len().div_ceil(MOST_POINTS));
                points = (0..=last).filter(|&i| i % stride == 0 || i == last).map(|i| points[i]).collect();
            }
        }
        points
    }

    fn trace(&self, end: u32) -> Vec<Option<usize>> {
        let mut choices = vec![None; self.tree.nodes.len()];
        let mut open = vec![end];
        while let Some(at) = open.pop() {
            match self.steps[at as usize] {
                Step::Start => {}
                Step::Take(pick, inner) => {
                    choices[pick.group] = Some(pick.option);
                    open.push(inner);
                }
                Step::Join(a, b) => open.extend([a, b]),
            }
        }
        choices
    }
}
