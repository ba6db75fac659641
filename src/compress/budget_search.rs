//! What a plan may take on paper so that, measured, it keeps to a budget and uses it up.

/// What is aimed for beyond a budget that was missed and not yet met: the next measurement differs a little again.
const MARGIN: f64 = 1.05;

/// Share of a budget below which a result saves more than it was asked to, and loses more than it needs to.
const SAVED_TOO_MUCH: f64 = 0.96;

/// The share of a budget that is aimed for between a plan within it and one beyond it.
const INSIDE: f64 = 0.98;

/// A plan: what it takes on paper, and what was measured of it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    used: u64,
    took: f64,
}

/// The search for the largest plan whose measurement is within a budget.
#[derive(Debug, Clone)]
pub(super) struct BudgetSearch {
    allowed: f64,
    unchanged: Point,
    /// Of what was measured, the largest plan within the budget.
    within: Option<Point>,
    /// The smallest beyond it.
    beyond: Point,
}

impl BudgetSearch {
    /// A search where nothing changed takes `kept` on paper and `exact` when measured, and `allowed` may be measured.
    pub fn new(kept: u64, exact: f64, allowed: f64) -> BudgetSearch {
        let unchanged = Point { used: kept, took: exact };
        BudgetSearch { allowed, unchanged, within: None, beyond: unchanged }
    }

    /// Whether a plan of this size is no larger than one that is known to be within the budget.
    pub fn knows(&self, used: u64) -> bool {
        self.within.is_some_and(|within| used <= within.used)
    }

    /// Takes in a measurement of a plan, and gives what the next one may take: less while nothing is within the budget,
    /// then more, as long as some of it is left over. `None` where there is nothing to look for.
    pub fn next(&mut self, used: u64, took: f64) -> Option<u64> {
        let here = Point { used, took };
        if took > self.allowed {
            if used < self.beyond.used {
                self.beyond = here;
            }
        } else if !self.knows(used) {
            self.within = Some(here);
        }
        match self.within {
            None => Some(self.less(here)),
            Some(within) => self.more(within),
        }
    }

    /// As far as this measurement tells, with a margin. Measurements that save nothing tell only by how much they are over.
    fn less(&self, here: Point) -> u64 {
        let (reckoned, saved) = (self.unchanged.used.saturating_sub(here.used) as f64, self.unchanged.took - here.took);
        let most = match saved > 0.0 {
            true => self.unchanged.used as f64 - (self.unchanged.took - self.allowed) * reckoned / saved * MARGIN,
            false => here.used as f64 - (here.took - self.allowed),
        };
        most.clamp(0.0, here.used.saturating_sub(1) as f64) as u64
    }

    /// Along the line between both plans that are nearest to the budget.
    fn more(&self, within: Point) -> Option<u64> {
        let (rise, run) = (self.beyond.took - within.took, self.beyond.used.saturating_sub(within.used) as f64);
        if within.took >= SAVED_TOO_MUCH * self.allowed || rise <= 0.0 {
            return None;
        }
        let step = ((INSIDE * self.allowed - within.took) / rise * run).min(run - 1.0);
        (step >= 1.0).then(|| within.used + step as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is measured last, within the budget, of plans of every size up to 1,000, and how many were measured.
    fn reach(allowed: f64, sizes: &[u64], took: &dyn Fn(u64) -> f64) -> (u64, usize) {
        let mut search = BudgetSearch::new(1000, took(1000), allowed);
        let (mut most, mut best) = (allowed as u64, 0);
        for tried in 1..20 {
            let used = sizes.iter().copied().filter(|&s| s <= most).max().unwrap();
            if search.knows(used) {
                return (best, tried - 1);
            }
            let measured = took(used);
            if measured <= allowed {
                best = best.max(used);
            }
            match search.next(used, measured) {
                Some(next) => most = next,
                None => return (best, tried),
            }
        }
        panic!("it goes on for ever");
    }

    #[test]
    fn a_budget_is_used_up() {
        let every: Vec<u64> = (0..=1000).collect();
        let cases: [(&str, &dyn Fn(u64) -> f64); 3] = [
            ("as reckoned", &|used| used as f64),
            ("half of what was reckoned is saved", &|used| 500.0 + used as f64 / 2.0),
            ("at first twice as much is saved", &|used| (2.0 * used as f64 - 1000.0).max(used as f64 / 3.0)),
        ];
        for (name, took) in cases {
            let (used, tried) = reach(600.0, &every, took);
            assert!((0.94 * 600.0..=600.0).contains(&took(used)) && tried <= 4, "{name}: {used} after {tried}");
        }
    }

    #[test]
    fn of_few_plans_the_largest_within_is_found() {
        // Small plans cost more than was reckoned, so that the first one is beyond and the second overshoots.
        let (sizes, took) = ([200, 350, 450, 600, 1000], |used: u64| 150.0 + used as f64 * 0.85);
        assert_eq!(reach(550.0, &sizes, &took).0, 450);
        let coarse = [200, 600, 1000];
        assert_eq!(reach(550.0, &coarse, &took).0, 200, "nothing lies between");
    }

    #[test]
    fn plans_that_save_nothing_shrink() {
        let mut search = BudgetSearch::new(1000, 1000.0, 800.0);
        assert_eq!(search.next(800, 1010.0), Some(590));
        assert_eq!(search.next(590, 1005.0), Some(385));
        assert_eq!(search.next(0, 1001.0), Some(0));
    }
}
