//! Choosing one option per site so that the predicted loss is least within a budget of bytes: a multi-choice knapsack.
//!
//! The exact Pareto dynamic programme: after each site the states that no other beats in both bytes and loss, pruned by
//! the budget and by a Lagrangian bound against a greedy solution. Arithmetic on a table; knows no models.

/// One option of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Item {
    /// What it takes.
    pub bytes: u64,
    /// What it loses, at least 0.
    pub loss: f64,
}

/// One option per group.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// The option of every group.
    pub chosen: Vec<usize>,
    /// Bytes of all options together.
    pub bytes: u64,
    /// Their loss.
    pub loss: f64,
    /// No allocation within the budget loses less than this.
    pub bound: f64,
    /// Whether this one is proven to be the best.
    pub optimal: bool,
}

/// Why there is no allocation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// Even the smallest options do not fit.
    #[error("the smallest that can be reached is {smallest} bytes, and {budget} are allowed")]
    Infeasible {
        /// The sum of the smallest options.
        smallest: u64,
        /// What was allowed.
        budget: u64,
    },
    /// A group cannot be chosen from.
    #[error("group {group} has no options, or one whose loss is negative or not a number")]
    BadGroup {
        /// Its index.
        group: usize,
    },
}

/// States after one site above which the search keeps only the most promising, and can prove nothing.
const MOST_STATES: usize = 400_000;

/// Steps of the bisection for the price of a byte.
const BISECTIONS: usize = 200;

/// Chooses one option of each group within `budget` bytes in all so that the sum of losses is least.
pub fn allocate(groups: &[Vec<Item>], budget: u64) -> Result<Allocation, AllocateError> {
    for (group, items) in groups.iter().enumerate() {
        if items.is_empty() || items.iter().any(|i| !(i.loss >= 0.0 && i.loss.is_finite())) {
            return Err(AllocateError::BadGroup { group });
        }
    }
    let smallest: u64 = groups.iter().map(|g| g.iter().map(|i| i.bytes).min().unwrap_or(0)).sum();
    if smallest > budget {
        return Err(AllocateError::Infeasible { smallest, budget });
    }
    let useful: Vec<Vec<usize>> = groups.iter().map(|g| undominated(g)).collect();
    let price = price(groups, &useful, budget);
    let start = greedy(groups, &useful, budget, price);
    let priced = |item: &Item| item.loss + price * item.bytes as f64;
    let least: Vec<f64> = groups.iter().map(|g| g.iter().map(priced).fold(f64::INFINITY, f64::min)).collect();
    let bound = (least.iter().sum::<f64>() - price * budget as f64).max(0.0);
    let (states, complete) = search(groups, &useful, budget, price, &least, start.1);
    let (chosen, proven) = match states.last().and_then(|last| best(last)) {
        Some(end) => (backtrack(&states, end), complete),
        None => (start.0, complete),
    };
    let (bytes, loss) = totals(groups, &chosen);
    Ok(Allocation { chosen, bytes, loss, bound: if proven { loss } else { bound.min(loss) }, optimal: proven })
}

/// The options that are not both larger and worse than another, by size.
fn undominated(items: &[Item]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&a, &b| items[a].bytes.cmp(&items[b].bytes).then(items[a].loss.total_cmp(&items[b].loss)));
    let mut least = f64::INFINITY;
    order.retain(|&i| {
        let better = items[i].loss < least;
        least = least.min(items[i].loss);
        better
    });
    order
}

fn totals(groups: &[Vec<Item>], chosen: &[usize]) -> (u64, f64) {
    let items = || groups.iter().zip(chosen).map(|(g, &i)| g[i]);
    (items().map(|i| i.bytes).sum(), items().map(|i| i.loss).sum())
}

/// What every group takes where a byte costs `price`; the smaller of equals.
fn at_price(groups: &[Vec<Item>], useful: &[Vec<usize>], price: f64) -> Vec<usize> {
    let pick = |(g, order): (&Vec<Item>, &Vec<usize>)| {
        let cost = |i: usize| g[i].loss + price * g[i].bytes as f64;
        order.iter().copied().reduce(|a, b| if cost(b) < cost(a) { b } else { a }).expect("a group has options")
    };
    groups.iter().zip(useful).map(pick).collect()
}

/// The lowest price of a byte at which what is taken fits.
fn price(groups: &[Vec<Item>], useful: &[Vec<usize>], budget: u64) -> f64 {
    let fits = |price: f64| totals(groups, &at_price(groups, useful, price)).0 <= budget;
    if fits(0.0) {
        return 0.0;
    }
    // One byte buys at most the largest loss there is.
    let (mut low, mut high) = (0.0, groups.iter().flatten().map(|i| i.loss).fold(0.0, f64::max) + 1.0);
    for _ in 0..BISECTIONS {
        let middle = if low == 0.0 { high / 1024.0 } else { f64::sqrt(low * high) };
        if middle <= low || middle >= high || middle == 0.0 {
            break;
        }
        if fits(middle) { high = middle } else { low = middle }
    }
    high
}

/// What fits at a price, improved by the single change that lowers the loss most as long as one fits.
fn greedy(groups: &[Vec<Item>], useful: &[Vec<usize>], budget: u64, price: f64) -> (Vec<usize>, f64) {
    let mut chosen = at_price(groups, useful, price);
    if totals(groups, &chosen).0 > budget {
        chosen = useful.iter().map(|order| order[0]).collect();
    }
    loop {
        let free = budget - totals(groups, &chosen).0;
        let mut best: Option<(f64, usize, usize)> = None;
        for (group, order) in useful.iter().enumerate() {
            let now = groups[group][chosen[group]];
            for &option in order {
                let then = groups[group][option];
                let gain = now.loss - then.loss;
                if gain > 0.0 && then.bytes <= now.bytes.saturating_add(free) && best.is_none_or(|b| gain > b.0) {
                    best = Some((gain, group, option));
                }
            }
        }
        match best {
            Some((_, group, option)) => chosen[group] = option,
            None => break,
        }
    }
    let loss = totals(groups, &chosen).1;
    (chosen, loss)
}

/// Bytes and loss so far, the option taken last and the state before it.
#[derive(Debug, Clone, Copy)]
struct State {
    bytes: u64,
    loss: f64,
    option: usize,
    before: usize,
}

/// The states after every group, and whether none had to be given up.
fn search(
    groups: &[Vec<Item>],
    useful: &[Vec<usize>],
    budget: u64,
    price: f64,
    least: &[f64],
    known: f64,
) -> (Vec<Vec<State>>, bool) {
    // What the groups that are left take at least, in bytes and at the price.
    let mut rest = vec![(0u64, 0.0f64); groups.len() + 1];
    for at in (0..groups.len()).rev() {
        let smallest = groups[at].iter().map(|i| i.bytes).min().unwrap_or(0);
        rest[at] = (rest[at + 1].0 + smallest, rest[at + 1].1 + least[at]);
    }
    let slack = known.abs() * 1e-9 + f64::MIN_POSITIVE;
    let mut complete = true;
    let mut all: Vec<Vec<State>> = Vec::new();
    let mut now = vec![State { bytes: 0, loss: 0.0, option: 0, before: 0 }];
    for (at, order) in useful.iter().enumerate() {
        let mut next = Vec::with_capacity(now.len() * order.len());
        for (before, state) in now.iter().enumerate() {
            for &option in order {
                let item = groups[at][option];
                let (bytes, loss) = (state.bytes + item.bytes, state.loss + item.loss);
                let reach = loss + price * bytes as f64 + rest[at + 1].1 - price * budget as f64;
                if bytes + rest[at + 1].0 <= budget && reach <= known + slack {
                    next.push(State { bytes, loss, option, before });
                }
            }
        }
        next.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)));
        let mut lowest = f64::INFINITY;
        next.retain(|s| {
            let better = s.loss < lowest;
            lowest = lowest.min(s.loss);
            better
        });
        if next.len() > MOST_STATES {
            complete = false;
            let priced = |s: &State| s.loss + price * s.bytes as f64;
            next.sort_by(|a, b| priced(a).total_cmp(&priced(b)));
            next.truncate(MOST_STATES);
            next.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)));
        }
        all.push(next.clone());
        now = next;
    }
    (all, complete)
}

fn best(states: &[State]) -> Option<usize> {
    (0..states.len()).min_by(|&a, &b| states[a].loss.total_cmp(&states[b].loss))
}

fn backtrack(states: &[Vec<State>], end: usize) -> Vec<usize> {
    let mut chosen = vec![0; states.len()];
    let mut at = end;
    for (group, layer) in states.iter().enumerate().rev() {
        chosen[group] = layer[at].option;
        at = layer[at].before;
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator: splitmix64.
    struct Seeded(u64);

    impl Seeded {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn unit(&mut self) -> f64 {
            (self.next() >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    /// Losses that fall with size, convex and concave, with noise.
    fn table(seed: u64, groups: usize, options: usize) -> Vec<Vec<Item>> {
        let mut random = Seeded(seed);
        let mut group = || {
            let (size, scale, power) = (1 + random.next() % 50_000, random.unit(), 0.6 + 1.2 * random.unit());
            let mut item = |i: usize| {
                let removed = i as f64 / options as f64;
                let loss = scale * removed.powf(power) * (0.95 + 0.1 * random.unit());
                Item { bytes: (size as f64 * (1.0 - removed)) as u64 + 1, loss }
            };
            (0..options).map(&mut item).collect::<Vec<Item>>()
        };
        (0..groups).map(|_| group()).collect()
    }

    fn full(groups: &[Vec<Item>]) -> u64 {
        groups.iter().map(|g| g[0].bytes).sum()
    }

    fn brute_force(groups: &[Vec<Item>], budget: u64) -> Option<f64> {
        let mut best: Option<f64> = None;
        let combinations: usize = groups.iter().map(Vec::len).product();
        for mut code in 0..combinations {
            let chosen: Vec<usize> = groups
                .iter()
                .map(|g| {
                    let option = code % g.len();
                    code /= g.len();
                    option
                })
                .collect();
            let (bytes, loss) = totals(groups, &chosen);
            if bytes <= budget && best.is_none_or(|b| loss < b) {
                best = Some(loss);
            }
        }
        best
    }

    #[test]
    fn is_as_good_as_trying_everything() {
        for seed in 0..200 {
            let groups = table(seed, 1 + seed as usize % 6, 2 + seed as usize % 3);
            for share in [0.3, 0.5, 0.7, 0.9] {
                let budget = (full(&groups) as f64 * share) as u64;
                let found = allocate(&groups, budget);
                match brute_force(&groups, budget) {
                    Some(best) => {
                        let found = found.unwrap();
                        assert!((found.loss - best).abs() < 1e-12 && found.bytes <= budget && found.optimal);
                    }
                    None => assert!(matches!(found, Err(AllocateError::Infeasible { .. }))),
                }
            }
        }
    }

    #[test]
    fn the_whole_budget_changes_nothing() {
        let groups = table(7, 40, 15);
        let found = allocate(&groups, full(&groups)).unwrap();
        assert_eq!(found.chosen, vec![0; 40]);
        assert_eq!((found.loss, found.bytes), (0.0, full(&groups)));
    }

    #[test]
    fn a_larger_budget_never_loses_more() {
        let groups = table(11, 60, 12);
        let mut last = f64::INFINITY;
        for share in [40, 50, 60, 70, 80, 90, 100] {
            let found = allocate(&groups, full(&groups) * share / 100).unwrap();
            assert!(found.loss <= last && found.bound <= found.loss);
            last = found.loss;
        }
    }

    #[test]
    fn says_what_can_be_reached() {
        let groups = vec![vec![Item { bytes: 10, loss: 0.0 }, Item { bytes: 4, loss: 1.0 }]; 2];
        assert_eq!(allocate(&groups, 7), Err(AllocateError::Infeasible { smallest: 8, budget: 7 }));
        let message = allocate(&groups, 7).unwrap_err().to_string();
        assert_eq!(message, "the smallest that can be reached is 8 bytes, and 7 are allowed");
    }

    #[test]
    fn refuses_a_loss_that_is_no_number() {
        let groups = vec![vec![Item { bytes: 1, loss: 0.0 }], vec![Item { bytes: 1, loss: f64::NAN }]];
        assert_eq!(allocate(&groups, 9), Err(AllocateError::BadGroup { group: 1 }));
    }

    #[test]
    fn three_hundred_sites_are_solved_to_the_end() {
        let groups = table(3, 300, 40);
        let found = allocate(&groups, full(&groups) * 7 / 10).unwrap();
        assert!(found.optimal && found.loss > 0.0);
    }
}
