//! Searches on scores that are computed at once.

use super::*;

/// The sum of distances to a grid that is wanted, plus 10 for every layer that is left out but one.
struct Wanted {
    times: Vec<usize>,
    asked: usize,
}

impl Scorer for Wanted {
    fn score(&mut self, candidate: &Candidate) -> Result<f64, Error> {
        self.asked += 1;
        let apart: usize = candidate.times.iter().zip(&self.times).map(|(a, b)| a.abs_diff(*b)).sum();
        let skips: f64 = candidate.skips.iter().flatten().map(|&layer| if layer == 2 { -20.0 } else { 10.0 }).sum();
        Ok(apart as f64 + skips)
    }
}

fn options(evaluations: usize) -> SearchOptions {
    SearchOptions { steps: 4, train: 1000, evaluations, layers: 6, most_skipped: 0.0, seed: 3 }
}

fn wanted() -> Wanted {
    Wanted { times: vec![931, 702, 310, 44], asked: 0 }
}

fn uniform() -> Candidate {
    Candidate::plain(vec![999, 749, 499, 249])
}

#[test]
fn evolution_beats_its_seed_and_repeats_itself() {
    let mut all = Vec::new();
    for _ in 0..2 {
        let mut told = Vec::new();
        let found = search(&options(400), &[uniform()], &mut wanted(), &mut |n, one, best| {
            told.push((n, one.candidate.key(), best.score));
        })
        .unwrap();
        let seed = wanted().score(&uniform()).unwrap();
        assert!(found[0].score < 0.4 * seed, "{} {seed}", found[0].score);
        assert_eq!((found.len(), told.len(), told[0].1.as_str()), (400, 400, "999 749 499 249"));
        assert!(found.is_sorted_by(|a, b| a.score <= b.score));
        // What is told of the best never gets worse, and ends with the result.
        assert!(told.is_sorted_by(|a, b| a.2 >= b.2) && told[399].2 == found[0].score);
        assert!(found.iter().all(|s| fits(&s.candidate, &options(400)) && s.candidate.skipped() == 0));
        let keys: BTreeSet<String> = found.iter().map(|s| s.candidate.key()).collect();
        assert_eq!(keys.len(), 400);
        all.push(told);
    }
    assert_eq!(all[0], all[1]);
}

#[test]
fn layers_are_left_out_in_the_second_stage_up_to_the_share() {
    let options = SearchOptions { most_skipped: 0.25, ..options(600) };
    let found = search(&options, &[uniform()], &mut wanted(), &mut |_, _, _| {}).unwrap();
    assert!(found.iter().all(|s| s.candidate.skipped() <= 6));
    assert!(
        found[0].candidate.skips.iter().flatten().filter(|&&l| l == 2).count() >= 2,
        "{}",
        found[0].candidate.key()
    );
}

#[test]
fn a_search_goes_on_where_it_was_interrupted() {
    let straight = search(&options(200), &[uniform()], &mut wanted(), &mut |_, _, _| {}).unwrap();
    let mut file: BTreeMap<String, f64> = BTreeMap::new();
    // The first attempt dies after 70 scores.
    let mut first = wanted();
    let mut keep = |key: &str, score: f64| {
        if file.len() == 70 {
            return Err(Error::Plan("killed".to_owned()));
        }
        file.insert(key.to_owned(), score);
        Ok(())
    };
    let mut scorer = Remembering::new(BTreeMap::new(), &mut first, &mut keep);
    assert!(search(&options(200), &[uniform()], &mut scorer, &mut |_, _, _| {}).is_err());
    assert_eq!((file.len(), first.asked), (70, 71));
    let mut second = wanted();
    let mut keep = |_: &str, _: f64| Ok(());
    let mut scorer = Remembering::new(file, &mut second, &mut keep);
    let resumed = search(&options(200), &[uniform()], &mut scorer, &mut |_, _, _| {}).unwrap();
    assert_eq!((resumed, second.asked), (straight, 130));
}

#[test]
fn a_small_space_is_searched_to_the_end() {
    let options = SearchOptions { steps: 2, train: 3, evaluations: 100, ..options(0) };
    let mut scorer = Wanted { times: vec![1, 0], asked: 0 };
    let found = search(&options, &[], &mut scorer, &mut |_, _, _| {}).unwrap();
    let keys: Vec<String> = found.iter().map(|s| s.candidate.key()).collect();
    assert_eq!((keys[0].as_str(), keys.len()), ("1 0", 3));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |options: SearchOptions, seeds: &[Candidate]| {
        search(&options, seeds, &mut wanted(), &mut |_, _, _| {}).unwrap_err().to_string()
    };
    assert!(refused(options(0), &[]).contains("0 evaluations"));
    assert!(refused(SearchOptions { steps: 9, train: 8, ..options(5) }, &[]).contains("9 of 8"));
    for times in [vec![1, 2, 3, 4], vec![1000, 3, 2, 1], vec![3, 2, 1]] {
        assert!(refused(options(5), &[Candidate::plain(times)]).contains("cannot start"));
    }
}

#[test]
fn keys_tell_candidates_apart() {
    let mut candidate = Candidate::plain(vec![9, 5]);
    assert_eq!(candidate.key(), "9 5");
    candidate.skips[0].extend([3, 1]);
    assert_eq!((candidate.key().as_str(), candidate.skipped()), ("9:1+3 5", 2));
}

#[test]
fn the_shortest_path_is_the_best_of_all() {
    let nodes = 7;
    let jump = |from: usize, to: usize| (((from * 31 + to * 17) % 13) as f64) + (to - from) as f64;
    let start: Vec<f64> = (0..nodes).map(|j| (j * j) as f64).collect();
    for steps in 1..=nodes {
        let cost = |path: &[usize]| {
            let inner: f64 = path.windows(2).map(|pair| jump(pair[0], pair[1])).sum();
            start[path[0]] + inner + jump(path[path.len() - 1], nodes)
        };
        let mut least = f64::INFINITY;
        for bits in 0u32..1 << nodes {
            let path: Vec<usize> = (0..nodes).filter(|i| bits & (1 << i) != 0).collect();
            if path.len() == steps {
                least = least.min(cost(&path));
            }
        }
        let found = shortest(&start, &jump, steps).unwrap();
        assert!(found.windows(2).all(|pair| pair[0] < pair[1]) && found.len() == steps, "{found:?}");
        assert!((cost(&found) - least).abs() < 1e-9, "{steps}: {found:?}");
    }
    assert_eq!(shortest(&start, &jump, nodes + 1), None);
    assert_eq!(shortest(&start, &|_, _| f64::NAN, 2), None);
}
