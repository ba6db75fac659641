//! Which steps to compute, chosen from what forecasts were seen to lose.
//!
//! Pure arithmetic on tables: a [`Profile`] of forecast errors becomes a [`Mask`] by an exact programme for one price, the
//! price is bisected to meet a cost, and the mask is refined by whoever can measure it.

use super::{Error, methods::Forecast};
use std::collections::VecDeque;

/// What forecasts of one tensor lose, seen on calibration runs that computed every step.
#[derive(Debug, Clone)]
pub struct Profile {
    kinds: Vec<Forecast>,
    longest: usize,
    /// By kind, step and gap − 1: the sum of relative errors and how many runs it is of.
    sums: Vec<Vec<Vec<(f64, usize)>>>,
    ring: VecDeque<Vec<f64>>,
    step: usize,
}

impl Profile {
    /// Watches forecasts of these kinds over up to `longest` steps that are not computed.
    pub fn new(kinds: &[Forecast], longest: usize, steps: usize) -> Profile {
        let sums = vec![vec![vec![(0.0, 0); longest]; steps]; kinds.len()];
        Profile { kinds: kinds.to_vec(), longest, sums, ring: VecDeque::new(), step: 0 }
    }

    /// A new run begins.
    pub fn restart(&mut self) {
        self.ring.clear();
        self.step = 0;
    }

    /// Takes what the tensor is at the next step of the run.
    ///
    /// A forecast over a gap looks back in strides of that gap, as one between computed steps at even distances does.
    pub fn push(&mut self, value: Vec<f64>) -> Result<(), Error> {
        let wrong = self.ring.front().is_some_and(|last| last.len() != value.len());
        if wrong || self.step >= self.sums.first().map_or(0, Vec::len) {
            return Err(Error::Plan(format!("step {} of a run has another size or is one too many", self.step)));
        }
        let size: f64 = value.iter().map(|v| v.abs()).sum::<f64>().max(f64::MIN_POSITIVE);
        for (kind, sums) in self.kinds.iter().zip(&mut self.sums) {
            for gap in 1..=self.longest.min(self.step) {
                let before: Vec<usize> = (1..).map_while(|k| self.step.checked_sub(k * gap)).collect();
                let terms = kind.terms(&before, self.step);
                // The ring does not reach back to the first steps of a long run.
                let known: Option<Vec<(&Vec<f64>, f64)>> =
                    terms.iter().map(|&(step, weight)| Some((self.ring.get(self.step - 1 - step)?, weight))).collect();
                let Some(known) = known else { continue };
                let forecast = |k: usize| known.iter().map(|(value, weight)| weight * value[k]).sum::<f64>();
                let error: f64 = value.iter().enumerate().map(|(k, v)| (v - forecast(k)).abs()).sum();
                let (sum, runs) = &mut sums[self.step][gap - 1];
                (*sum, *runs) = (*sum + error / size, *runs + 1);
            }
        }
        self.ring.push_front(value);
        self.ring.truncate(4 * self.longest);
        self.step += 1;
        Ok(())
    }

    /// The mean relative error of a kind by step and gap − 1; infinite where it was not seen.
    pub fn errors(&self, kind: Forecast) -> Vec<Vec<f64>> {
        let Some(index) = self.kinds.iter().position(|k| *k == kind) else { return Vec::new() };
        let mean = |&(sum, runs): &(f64, usize)| if runs == 0 { f64::INFINITY } else { sum / runs as f64 };
        self.sums[index].iter().map(|gaps| gaps.iter().map(mean).collect()).collect()
    }
}

/// What a step costs, in any unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCost {
    /// Computed.
    pub full: f64,
    /// Forecast.
    pub forecast: f64,
}

/// What bounds a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// So many first steps are computed; at least one.
    pub first: usize,
    /// So many last steps are computed.
    pub last: usize,
    /// The most forecast steps in a row.
    pub longest: usize,
}

/// Which steps are computed, with what that costs and is expected to lose.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    /// For every step whether it is computed.
    pub computed: Vec<bool>,
    /// The sum of costs.
    pub cost: f64,
    /// The sum of errors.
    pub error: f64,
}

/// The mask of the smallest cost plus `price` times error. `errors[step][gap − 1]` is what a forecast of a step loses when
/// the last computed step lies `gap` back.
pub fn cheapest(errors: &[Vec<f64>], cost: StepCost, price: f64, bounds: Bounds) -> Mask {
    let steps = errors.len();
    let lost = |step: usize, from: usize| {
        errors[step].get(step - from - 1).copied().filter(|e| !e.is_nan()).unwrap_or(f64::INFINITY)
    };
    let fixed = |step: usize| step < bounds.first.max(1) || step + bounds.last >= steps;
    // best[f]: the least price of the steps up to a computed step f, and the computed step before it.
    let mut best: Vec<(f64, usize)> = Vec::with_capacity(steps + 1);
    for f in 0..=steps {
        let own = if f < steps { cost.full } else { 0.0 };
        if f == 0 {
            best.push((own, 0));
            continue;
        }
        let mut found = (f64::INFINITY, f - 1);
        let (mut between, mut from) = (0.0, f - 1);
        loop {
            // Errors belong to the last computed step, so they are summed anew for each.
            if f - from > 1 {
                between = (from + 1..f).map(|i| cost.forecast + price * lost(i, from)).sum();
            }
            let total = best[from].0 + between + own;
            if total < found.0 {
                found = (total, from);
            }
            if from == 0 || fixed(from) || f - from > bounds.longest {
                break;
            }
            from -= 1;
        }
        best.push(found);
    }
    let mut computed = vec![false; steps];
    let mut at = steps;
    while at > 0 {
        at = best[at].1;
        computed[at] = true;
    }
    let mut last = 0;
    let (mut error, mut sum) = (0.0, 0.0);
    for (step, &computed) in computed.iter().enumerate() {
        if computed {
            last = step;
            sum += cost.full;
        } else {
            error += lost(step, last);
            sum += cost.forecast;
        }
    }
    Mask { computed, cost: sum, error }
}

/// How often the price is halved.
const BISECTIONS: usize = 60;

/// The mask of the smallest error that some price gives and that costs no more than `budget`; `None` if no mask is cheap
/// enough. Masks off the convex hull of cost and error have no price and are not found.
pub fn within_budget(errors: &[Vec<f64>], cost: StepCost, budget: f64, bounds: Bounds) -> Option<Mask> {
    let allowance = budget * (1.0 + 1e-12);
    let whole = cheapest(errors, cost, f64::MAX.sqrt(), bounds);
    if whole.cost <= allowance {
        return Some(whole);
    }
    let free = cheapest(errors, cost, 0.0, bounds);
    if free.cost > allowance || !free.error.is_finite() {
        return None;
    }
    let (mut low, mut high) = (0.0_f64, 1.0_f64);
    let mut best = free;
    while cheapest(errors, cost, high, bounds).cost <= allowance && high < 1e200 {
        high *= 4.0;
    }
    for _ in 0..BISECTIONS {
        let price = (low + high) / 2.0;
        let mask = cheapest(errors, cost, price, bounds);
        if mask.cost <= allowance {
            low = price;
            if mask.error < best.error || (mask.error == best.error && mask.cost < best.cost) {
                best = mask;
            }
        } else {
            high = price;
        }
    }
    Some(best)
}

/// Moves computed steps to neighbours as long as that lowers a measured loss, with at most `evaluations` measurements.
///
/// `measure` gets a mask of as many computed steps. Returns the best mask and its loss.
pub fn refine<E>(
    computed: Vec<bool>,
    bounds: Bounds,
    evaluations: usize,
    measure: &mut dyn FnMut(&[bool]) -> Result<f64, E>,
) -> Result<(Vec<bool>, f64), E> {
    let steps = computed.len();
    let mut left = evaluations.saturating_sub(1);
    let mut loss = measure(&computed)?;
    let mut best = computed;
    let mut improved = true;
    while improved {
        improved = false;
        for step in bounds.first.max(1)..steps.saturating_sub(bounds.last) {
            for other in [step.wrapping_sub(1), step + 1] {
                let free = (bounds.first.max(1)..steps.saturating_sub(bounds.last)).contains(&other);
                if !free || !best[step] || best[other] {
                    continue;
                }
                let mut moved = best.clone();
                moved.swap(step, other);
                if !allowed(&moved, bounds) {
                    continue;
                }
                if left == 0 {
                    return Ok((best, loss));
                }
                left -= 1;
                let found = measure(&moved)?;
                if found < loss {
                    (best, loss, improved) = (moved, found, true);
                }
            }
        }
    }
    Ok((best, loss))
}

fn allowed(computed: &[bool], bounds: Bounds) -> bool {
    computed.split(|&c| c).all(|run| run.len() <= bounds.longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(mask: &[bool]) -> String {
        mask.iter().map(|&c| if c { 'x' } else { '.' }).collect()
    }

    fn errors(steps: usize) -> Vec<Vec<f64>> {
        // Late steps change faster, and errors grow with the gap.
        (0..steps).map(|i| (1..=4).map(|gap| 0.01 * (gap * gap) as f64 * (1.0 + i as f64)).collect()).collect()
    }

    const BOUNDS: Bounds = Bounds { first: 2, last: 1, longest: 3 };
    const COST: StepCost = StepCost { full: 1.0, forecast: 0.1 };

    /// Every mask within bounds, with cost and error.
    fn all(errors: &[Vec<f64>]) -> Vec<Mask> {
        let steps = errors.len();
        let mut found = Vec::new();
        for bits in 0u32..1 << steps {
            let computed: Vec<bool> = (0..steps).map(|i| bits & (1 << i) != 0).collect();
            let fits =
                computed[..BOUNDS.first].iter().all(|&c| c) && computed[steps - BOUNDS.last..].iter().all(|&c| c);
            if !fits || !allowed(&computed, BOUNDS) {
                continue;
            }
            let (mut cost, mut error, mut last) = (0.0, 0.0, 0);
            for step in 0..steps {
                if computed[step] {
                    last = step;
                    cost += COST.full;
                } else {
                    cost += COST.forecast;
                    error += errors[step][step - last - 1];
                }
            }
            found.push(Mask { computed, cost, error });
        }
        found
    }

    #[test]
    fn the_programme_is_the_best_of_all_masks() {
        let errors = errors(11);
        let masks = all(&errors);
        for price in [0.0, 0.3, 1.0, 3.0, 10.0, 1e6] {
            let of = |mask: &Mask| mask.cost + price * mask.error;
            let least = masks.iter().map(of).fold(f64::INFINITY, f64::min);
            let found = cheapest(&errors, COST, price, BOUNDS);
            assert!((of(&found) - least).abs() < 1e-9, "{price}: {}", shown(&found.computed));
            let same = masks.iter().find(|m| m.computed == found.computed).unwrap();
            assert!((same.cost - found.cost).abs() < 1e-9 && (same.error - found.error).abs() < 1e-9);
        }
    }

    #[test]
    fn a_budget_is_kept_and_used() {
        let errors = errors(11);
        for budget in [5.7, 6.5, 7.5, 9.0, 11.0] {
            let found = within_budget(&errors, COST, budget, BOUNDS).unwrap();
            assert!(found.cost <= budget + 1e-9, "{budget}: {found:?}");
            // Nothing that is at least as cheap on the hull is better: a price finds it too.
            let better =
                all(&errors).into_iter().filter(|m| m.cost <= found.cost + 1e-9 && m.error < found.error - 1e-9);
            assert_eq!(better.count(), 0, "{budget}: {}", shown(&found.computed));
        }
        assert_eq!(shown(&within_budget(&errors, COST, 11.0, BOUNDS).unwrap().computed), "xxxxxxxxxxx");
        assert_eq!(within_budget(&errors, COST, 1.0, BOUNDS), None);
    }

    #[test]
    fn steps_that_were_never_seen_are_computed() {
        let mut errors = errors(8);
        errors[4] = vec![f64::INFINITY; 4];
        let found = cheapest(&errors, COST, 1e-3, BOUNDS);
        assert!(found.computed[4] && found.error.is_finite(), "{}", shown(&found.computed));
    }

    #[test]
    fn forecasts_of_straight_lines_lose_nothing() {
        let kinds = [Forecast::Reuse, Forecast::Taylor(1)];
        let mut profile = Profile::new(&kinds, 3, 8);
        for slope in [1.0, 2.0] {
            profile.restart();
            for step in 0..8 {
                profile.push(vec![slope * (step as f64 + 1.0); 3]).unwrap();
            }
        }
        let (reuse, taylor) = (profile.errors(Forecast::Reuse), profile.errors(Forecast::Taylor(1)));
        // The value 6 of step 5 is 4 two steps before.
        assert!((reuse[5][1] - 2.0 / 6.0).abs() < 1e-12);
        assert!(taylor[5][1].abs() < 1e-12);
        assert!(reuse[0].iter().all(|e| e.is_infinite()));
        assert!(profile.errors(Forecast::Lagrange(3)).is_empty());
        assert!(profile.push(vec![0.0; 3]).is_err());
    }

    #[test]
    fn refining_finds_a_better_neighbour_and_stops() {
        let start = vec![true, true, true, false, false, false, false, true];
        let bounds = Bounds { first: 1, last: 1, longest: 6 };
        let mut asked = 0;
        let mut measure = |mask: &[bool]| {
            asked += 1;
            // Best where the middle steps stand at 3 and 5.
            let inner: Vec<usize> = (1..7).filter(|&i| mask[i]).collect();
            Ok(inner.iter().zip([3, 5]).map(|(&a, b): (&usize, usize)| a.abs_diff(b) as f64).sum())
        };
        let (mask, loss) = refine::<Error>(start.clone(), bounds, 100, &mut measure).unwrap();
        assert_eq!((shown(&mask).as_str(), loss), ("x..x.x.x", 0.0));
        assert!(asked < 100);
        let mut asked = 0;
        let mut count = |_: &[bool]| {
            asked += 1;
            Ok(1.0)
        };
        refine::<Error>(start, bounds, 2, &mut count).unwrap();
        assert_eq!(asked, 2);
    }
}
