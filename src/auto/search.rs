//! Which recipe is run next, and how much it must save: arithmetic on what earlier runs found.

/// What is saved less than this is not looked for.
const FINEST: f64 = 0.04;

/// Part of the share that is tried next where the last one kept to the drop.
const STEP: f64 = 0.75;

/// The least share that is tried.
const LEAST: f64 = 0.05;

/// Shares that are tried of every recipe where no drop is given.
const LADDER: [f64; 5] = [0.8, 0.6, 0.45, 0.33, 0.24];

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tried {
    /// The share that was asked for.
    pub share: f64,
    /// The share that was measured, and the drop of the metric; `None` where there was no result.
    pub found: Option<(f64, f64)>,
}

/// A recipe with its runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Arm {
    /// The share of its first run.
    pub first: f64,
    pub tried: Vec<Tried>,
}

impl Arm {
    pub fn new(first: f64) -> Arm {
        Arm { first, tried: Vec::new() }
    }

    /// The share of the next run; `None` if no other is worth one. A run keeps to the drop if it loses at most `limit`.
    fn next(&self, limit: Option<f64>) -> Option<f64> {
        if self.tried.is_empty() {
            return Some(self.first);
        }
        let Some(limit) = limit else {
            // The first run took the place of the rung that is nearest to it.
            let nearest = |rung: f64| self.tried.iter().any(|t| (t.share - rung).abs() < 0.08);
            let failed = self.tried.iter().filter(|t| t.found.is_none()).map(|t| t.share).fold(0.0, f64::max);
            return LADDER.into_iter().find(|&rung| !nearest(rung) && rung > failed);
        };
        let keeps = |t: &&Tried| t.found.is_some_and(|(_, drop)| drop <= limit);
        let good = self.tried.iter().filter(keeps).map(|t| t.share).fold(1.0, f64::min);
        let bad = self.tried.iter().filter(|t| !keeps(t) && t.share < good).map(|t| t.share).fold(0.0, f64::max);
        let next = if bad > 0.0 { (good + bad) / 2.0 } else { good * STEP };
        (good - next >= FINEST / 2.0 && next >= LEAST).then_some(next)
    }
}

/// The recipe to run next and the share that it must keep: every one once, in order, then the one that promises most.
pub(super) fn next(arms: &[Arm], limit: Option<f64>) -> Option<(usize, f64)> {
    if let Some(at) = arms.iter().position(|arm| arm.tried.is_empty()) {
        return Some((at, arms[at].first));
    }
    let open = arms.iter().enumerate().filter_map(|(at, arm)| Some((at, arm.next(limit)?)));
    match limit {
        // Rung by rung, so that all have been tried as far when time is up.
        None => open.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))),
        Some(limit) => {
            let kept =
                arms.iter().flat_map(|arm| &arm.tried).filter_map(|t| t.found).filter(|(_, drop)| *drop <= limit);
            let best = kept.map(|(ratio, _)| ratio).fold(1.0, f64::min);
            // What could only reach what is there already is of no use.
            open.filter(|(_, share)| *share < best).min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))
        }
    }
}

/// Which points no other one is at least as good as in both its share and its drop.
pub(super) fn front(points: &[Option<(f64, f64)>]) -> Vec<bool> {
    let beats = |a: (f64, f64), b: (f64, f64)| a.0 <= b.0 && a.1 <= b.1 && a != b;
    let stays = |(at, point): (usize, &Option<(f64, f64)>)| {
        point.is_some_and(|own| {
            let twin = points[..at].contains(&Some(own));
            !twin && !points.iter().flatten().any(|&other| beats(other, own))
        })
    };
    points.iter().enumerate().map(stays).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs recipes whose drop follows from the share, and says what was asked for.
    fn play(drops: &[&dyn Fn(f64) -> Option<f64>], limit: Option<f64>, runs: usize) -> (Vec<Arm>, Vec<(usize, f64)>) {
        let mut arms = vec![Arm::new(0.7); drops.len()];
        let mut asked = Vec::new();
        while let Some((at, share)) = next(&arms, limit).filter(|_| asked.len() < runs) {
            asked.push((at, share));
            let found = drops[at](share).map(|drop| (share, drop));
            arms[at].tried.push(Tried { share, found });
        }
        (arms, asked)
    }

    #[test]
    fn every_recipe_is_run_once_and_the_best_is_followed_to_where_it_loses_too_much() {
        let good = |share: f64| Some(if share < 0.31 { 0.1 } else { 0.0 });
        let poor = |share: f64| Some(1.0 - share);
        let (arms, asked) = play(&[&poor, &good], Some(0.01), 50);
        assert_eq!(asked[..2], [(0, 0.7), (1, 0.7)]);
        let kept = |arm: &Arm| {
            let kept = arm.tried.iter().filter(|t| t.found.is_some_and(|(_, drop)| drop <= 0.01));
            kept.map(|t| t.share).fold(1.0, f64::min)
        };
        assert!(kept(&arms[1]) < 0.31 + FINEST, "{arms:?}");
        // The poor one is not refined where the other already is.
        assert!(arms[0].tried.len() <= 2 && asked.len() < 15, "{asked:?}");
    }

    #[test]
    fn what_gives_no_result_is_asked_for_less() {
        let stubborn = |share: f64| (share > 0.84).then_some(0.0);
        let (arms, _) = play(&[&stubborn], Some(0.01), 50);
        let shares: Vec<f64> = arms[0].tried.iter().map(|t| t.share).collect();
        assert_eq!(shares[..2], [0.7, 0.85]);
        assert!(shares.len() < 8, "{shares:?}");
    }

    #[test]
    fn without_a_drop_all_rungs_are_tried() {
        let (arms, asked) = play(&[&|_| Some(0.0), &|share| (share > 0.5).then_some(0.0)], None, 50);
        assert_eq!(arms[0].tried.len(), 1 + LADDER.len());
        assert!(arms[1].tried.len() < arms[0].tried.len() && asked[2].1 == 0.8, "{asked:?}");
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let points = [Some((1.0, 0.0)), Some((0.5, 0.1)), Some((0.6, 0.1)), None, Some((0.5, 0.1)), Some((0.4, 0.3))];
        assert_eq!(front(&points), [true, true, false, false, false, true]);
    }
}
