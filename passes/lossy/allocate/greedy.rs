//! Prices: what is taken when every unit of a quantity costs a price, a bound from below, and a good plan from above.

use super::table::{Plan, Status, Tree, share};
use crate::Quantity;
use lathe_analysis::Random;

/// Steps of the bisection for a price.
const BISECTIONS: usize = 200;

/// The choice at one price per unit of cost.
pub(super) struct Priced {
    /// What every group takes where it exists; the cheaper of equals.
    pub picks: Vec<usize>,
    /// Error plus price times cost of every group, those inside it included.
    pub least: Vec<f64>,
}

/// What is taken where a unit of each quantity costs its price.
pub(super) fn at_prices(tree: &Tree, prices: &[(Quantity, f64)]) -> Priced {
    let (mut picks, mut least) = (vec![0; tree.nodes.len()], vec![0.0; tree.nodes.len()]);
    let mut weight = vec![0.0; tree.nodes.len()];
    for (at, node) in tree.nodes.iter().enumerate().rev() {
        let mut best = (f64::INFINITY, f64::INFINITY);
        for (option, choice) in node.group.options.iter().enumerate() {
            let inner = &node.inner[option];
            let cost: f64 = prices.iter().map(|&(m, price)| price * choice.cost.of(m) as f64).sum();
            let value = choice.error + cost + inner.iter().map(|&i| least[i]).sum::<f64>();
            // At no price at all the size still decides between equals.
            let size: f64 = prices.iter().map(|&(m, _)| choice.cost.of(m) as f64).sum();
            let size = size + inner.iter().map(|&i| weight[i]).sum::<f64>();
            if value < best.0 || (value == best.0 && size < best.1) {
                (best, picks[at]) = ((value, size), option);
            }
        }
        (least[at], weight[at]) = best;
    }
    Priced { picks, least }
}

/// The lowest price at which what is taken fits one limit, which can be met.
pub(super) fn price(tree: &Tree, of: Quantity, limit: u64) -> f64 {
    price_beside(tree, &[(of, 0.0)], 0, limit)
}

/// The lowest price of the quantity at `at` at which what is taken fits its limit, the other prices being as they are.
pub(super) fn price_beside(tree: &Tree, prices: &[(Quantity, f64)], at: usize, limit: u64) -> f64 {
    let of = prices[at].0;
    let mut tried = prices.to_vec();
    let mut fits = |price: f64| {
        tried[at].1 = price;
        let picks = at_prices(tree, &tried).picks;
        tree.totals(&tree.existing(&picks)).0.of(of) <= limit
    };
    if fits(0.0) {
        return 0.0;
    }
    // One unit buys at most all the error there is and all that the other prices ask.
    let dearest = |o: &super::table::Item| o.error + prices.iter().map(|&(m, p)| p * o.cost.of(m) as f64).sum::<f64>();
    let most: f64 = tree.nodes.iter().flat_map(|n| &n.group.options).map(dearest).sum();
    let (mut low, mut high) = (0.0, most + 1.0);
    for _ in 0..BISECTIONS {
        let middle = if low == 0.0 { high / 1024.0 } else { f64::sqrt(low * high) };
        if middle <= low || middle >= high || middle == 0.0 {
            break;
        }
        if fits(middle) { high = middle } else { low = middle }
    }
    high
}

/// No plan within the limits loses less than this, whatever the prices.
pub(super) fn bound(tree: &Tree, priced: &Priced, prices: &[(Quantity, f64)], limits: &[(Quantity, u64)]) -> f64 {
    let paid = |m: Quantity| prices.iter().find(|p| p.0 == m).map_or(0.0, |p| p.1);
    let spent: f64 = limits.iter().map(|&(m, limit)| paid(m) * limit as f64).sum();
    (tree.outer.iter().map(|&n| priced.least[n]).sum::<f64>() - spent).max(0.0)
}

/// Whether a plan is within the limits.
pub(super) fn allowed(tree: &Tree, choices: &[Option<usize>], limits: &[(Quantity, u64)]) -> bool {
    let (used, _) = tree.totals(choices);
    limits.iter().all(|&(m, limit)| used.of(m) <= limit)
}

/// The single change that lowers the error most and is allowed, as long as there is one.
pub(super) fn improve(tree: &Tree, picks: &mut [usize], limits: &[(Quantity, u64)]) {
    let nodes = &tree.nodes;
    loop {
        let existing = tree.existing(picks);
        let used = tree.totals(&existing).0;
        // What every group takes under the picks, those inside it included.
        let mut total = vec![([0u64; 4], 0.0f64); nodes.len()];
        let sum = |total: &[([u64; 4], f64)], at: usize, option: usize| {
            let item = &nodes[at].group.options[option];
            let mut cost = Quantity::ALL.map(|q| item.cost.of(q));
            let mut error = item.error;
            for &i in &nodes[at].inner[option] {
                (0..4).for_each(|k| cost[k] += total[i].0[k]);
                error += total[i].1;
            }
            (cost, error)
        };
        for at in (0..nodes.len()).rev() {
            total[at] = sum(&total, at, picks[at]);
        }
        let mut changes: Vec<(f64, usize, usize)> = Vec::new();
        for at in (0..nodes.len()).filter(|&at| existing[at].is_some()) {
            for option in (0..nodes[at].group.options.len()).filter(|&o| o != picks[at]) {
                let (cost, error) = sum(&total, at, option);
                let fits =
                    |&(m, limit): &(Quantity, u64)| used.of(m) - total[at].0[m as usize] + cost[m as usize] <= limit;
                // Rounding must not make two changes undo each other for ever.
                let gain = total[at].1 - error;
                if gain > 1e-12 * total[at].1 && limits.iter().all(fits) {
                    changes.push((gain, at, option));
                }
            }
        }
        changes.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        // Each was checked against the limits by itself: the best of them is within.
        let Some((_, at, option)) = changes.into_iter().next() else { return };
        picks[at] = option;
    }
}

/// The best option of every group within the largest share of its first option's cost that fits: the smallest where none
/// is within it.
pub(super) fn uniform(tree: &Tree, of: Quantity, limit: u64) -> Plan {
    let at = |part: f64| -> Vec<usize> {
        let pick = |node: &super::table::Node| {
            let options = &node.group.options;
            let most = options[0].cost.of(of) as f64 * part;
            let within = (0..options.len()).filter(|&o| options[o].cost.of(of) as f64 <= most);
            let best = within.min_by(|&a, &b| options[a].error.total_cmp(&options[b].error));
            best.or_else(|| (0..options.len()).min_by_key(|&o| options[o].cost.of(of))).unwrap_or(0)
        };
        tree.nodes.iter().map(pick).collect()
    };
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..BISECTIONS {
        let middle = (low + high) / 2.0;
        if tree.totals(&tree.existing(&at(middle))).0.of(of) <= limit { low = middle } else { high = middle }
    }
    let choices = tree.existing(&at(low));
    let (used, objective) = tree.totals(&choices);
    let prices = [(of, price(tree, of, limit))];
    let bound = bound(tree, &at_prices(tree, &prices), &prices, &[(of, limit)]).min(objective);
    Plan { choices, objective, bound, status: Status::Gap(share(objective, bound)), used }
}

/// Options drawn from a seed: some part of the groups, itself drawn, takes another option than its first one.
pub(super) fn random(tree: &Tree, seed: u64) -> Plan {
    let mut random = Random::new(seed);
    let changed = random.below(101);
    let mut draw = |node: &super::table::Node| {
        let others = node.group.options.len() - 1;
        if others > 0 && random.below(100) < changed { 1 + random.index(others) } else { 0 }
    };
    let picks: Vec<usize> = tree.nodes.iter().map(&mut draw).collect();
    let choices = tree.existing(&picks);
    let (used, objective) = tree.totals(&choices);
    Plan { choices, objective, bound: 0.0, status: Status::Gap(share(objective, 0.0)), used }
}
