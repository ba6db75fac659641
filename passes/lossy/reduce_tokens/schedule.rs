//! How many tokens to merge where: a dynamic programme over the cuts. Arithmetic on numbers; knows no models.

use std::collections::BTreeMap;

/// Shares of the tokens that may be merged at one cut, in sixteenths.
pub(super) const SHARES: [usize; 4] = [1, 2, 4, 8];

/// Numbers of tokens that count as one.
const GRID: usize = 2;

/// Plans kept for a number of tokens at a cut.
const MOST_PLANS: usize = 48;

/// One cut and what runs between it and the next one, with all tokens.
#[derive(Debug, Clone, Default)]
pub(super) struct Stretch {
    /// Operations that grow with the number of tokens.
    pub linear: f64,
    /// Operations that grow with its square.
    pub square: f64,
    /// What merging takes besides, whatever the number.
    pub merge: f64,
    /// What is lost where each of [`SHARES`] is merged here and nowhere else.
    pub losses: [f64; SHARES.len()],
}

/// How many tokens of `count` a share is, `most` at most.
pub(super) fn merged(share: usize, count: usize, most: usize) -> usize {
    (count * share / 16).min(most)
}

#[derive(Debug, Clone)]
struct Partial {
    cost: f64,
    loss: f64,
    counts: Vec<usize>,
}

/// The plans of least loss for each of these shares of the cost with all tokens: how many tokens each cut merges.
///
/// Losses of cuts add up, and depend on the share of the tokens that are left which is merged. `most(count)` bounds what
/// one cut can merge.
pub(super) fn plans(
    stretches: &[Stretch],
    tokens: usize,
    shares: &[f64],
    most: &dyn Fn(usize) -> usize,
) -> Vec<Vec<usize>> {
    let mut states: BTreeMap<usize, Vec<Partial>> =
        BTreeMap::from([(tokens, vec![Partial { cost: 0.0, loss: 0.0, counts: Vec::new() }])]);
    for stretch in stretches {
        let mut next: BTreeMap<usize, Vec<Partial>> = BTreeMap::new();
        for (&count, partials) in &states {
            let mut options = vec![(0, 0.0, 0.0)];
            for (share, loss) in SHARES.iter().zip(stretch.losses) {
                // Odd ends are left where they are, so that few numbers of tokens are different.
                let r = merged(*share, count, most(count)) / GRID * GRID;
                if r > 0 {
                    options.push((r, loss, stretch.merge));
                }
            }
            for (r, loss, merge) in options {
                let left = count - r;
                let part = left as f64 / tokens as f64;
                let cost = merge + stretch.linear * part + stretch.square * part * part;
                let grown = partials.iter().map(|p| {
                    let counts = p.counts.iter().copied().chain([r]).collect();
                    Partial { cost: p.cost + cost, loss: p.loss + loss, counts }
                });
                next.entry(left).or_default().extend(grown);
            }
        }
        next.values_mut().for_each(prune);
        states = next;
    }
    let whole: f64 = stretches.iter().map(|s| s.linear + s.square).sum();
    let all: Vec<Partial> = states.into_values().flatten().collect();
    let mut found: Vec<Vec<usize>> = Vec::new();
    for share in shares {
        let within = all.iter().filter(|p| p.cost <= share * whole && p.counts.iter().any(|&r| r > 0));
        let best = within.min_by(|a, b| a.loss.total_cmp(&b.loss).then(a.cost.total_cmp(&b.cost)));
        if let Some(best) = best.filter(|best| !found.contains(&best.counts)) {
            found.push(best.counts.clone());
        }
    }
    found
}

/// Leaves plans that no other one beats in both, thinned to a bound.
fn prune(partials: &mut Vec<Partial>) {
    partials.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.loss.total_cmp(&b.loss)));
    let mut least = f64::INFINITY;
    partials.retain(|p| {
        let better = p.loss < least;
        least = least.min(p.loss);
        better
    });
    if partials.len() > MOST_PLANS {
        let step = (partials.len() - 1) as f64 / (MOST_PLANS - 1) as f64;
        let chosen: Vec<usize> = (0..MOST_PLANS).map(|i| (i as f64 * step).round() as usize).collect();
        let mut at = 0;
        partials.retain(|_| {
            at += 1;
            chosen.binary_search(&(at - 1)).is_ok()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Equal stretches; merging a share loses its square times what the cut says.
    fn stretches(weights: &[f64]) -> Vec<Stretch> {
        let losses = |weight: &f64| SHARES.map(|share| weight * (share as f64 / 16.0).powi(2));
        weights.iter().map(|w| Stretch { linear: 10.0, square: 2.0, merge: 0.1, losses: losses(w) }).collect()
    }

    /// Every plan there is.
    fn all(stretches: &[Stretch], count: usize, tokens: usize, most: &dyn Fn(usize) -> usize) -> Vec<Partial> {
        let Some((first, rest)) = stretches.split_first() else {
            return vec![Partial { cost: 0.0, loss: 0.0, counts: Vec::new() }];
        };
        let mut options = vec![(0, 0.0, 0.0)];
        for (share, loss) in SHARES.iter().zip(first.losses) {
            options.push((merged(*share, count, most(count)) / GRID * GRID, loss, first.merge));
        }
        let mut found = Vec::new();
        for (r, loss, merge) in options {
            let part = (count - r) as f64 / tokens as f64;
            let cost = merge + first.linear * part + first.square * part * part;
            for rest in all(rest, count - r, tokens, most) {
                let counts = [r].into_iter().chain(rest.counts).collect();
                found.push(Partial { cost: rest.cost + cost, loss: rest.loss + loss, counts });
            }
        }
        found
    }

    #[test]
    fn plans_lose_as_little_as_the_best_of_all() {
        let (stretches, most) = (stretches(&[5.0, 1.0, 3.0, 0.5]), |count: usize| count / 2);
        let shares = [0.9, 0.7, 0.5];
        let found = plans(&stretches, 64, &shares, &most);
        assert_eq!(found.len(), 3);
        let every = all(&stretches, 64, 64, &most);
        for (plan, share) in found.iter().zip(shares) {
            let within = every.iter().filter(|p| p.cost <= share * 48.0 && p.counts.iter().any(|&r| r > 0));
            let best = within.map(|p| p.loss).fold(f64::INFINITY, f64::min);
            let own = every.iter().find(|p| p.counts == *plan).unwrap();
            assert!(own.cost <= share * 48.0 && (own.loss - best).abs() < 1e-12, "{plan:?} {} {best}", own.loss);
        }
    }

    #[test]
    fn tokens_go_where_they_are_missed_least() {
        let found = plans(&stretches(&[100.0, 0.01, 100.0]), 64, &[0.8], &|count| count / 2);
        assert!(found[0][0] == 0 && found[0][1] > 0 && found[0][2] == 0, "{found:?}");
        let nothing = plans(&stretches(&[1.0]), 64, &[0.01], &|count| count / 2);
        assert_eq!(nothing, [] as [Vec<usize>; 0]);
    }
}
