use super::*;
use crate::QuantityMap;

/// A small generator: splitmix64.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Errors that fall with size, convex and concave, with noise; the first option is dense.
    fn group(&mut self, options: usize) -> Group {
        let (size, scale, power) = (1 + self.below(50_000), self.unit(), 0.6 + 1.2 * self.unit());
        let option = |i: usize| {
            let removed = i as f64 / options as f64;
            let bytes = (size as f64 * (1.0 - removed)) as u64 + 1;
            let error = scale * removed.powf(power) * (0.95 + 0.1 * self.unit());
            let ns = 1 + self.next() % 1000;
            let cost = QuantityMap::default().with(Quantity::Size, bytes).with(Quantity::Latency, ns);
            Item { cost: cost.with(Quantity::Flops, self.next() % 5000), error, inner: Vec::new() }
        };
        Group { name: "g".into(), options: (0..options).map(option).collect() }
    }

    fn table(&mut self, groups: usize, options: usize) -> Vec<Group> {
        (0..groups).map(|_| self.group(options)).collect()
    }

    /// Up to three outer groups, some of whose options hold groups.
    fn nested(&mut self) -> Vec<Group> {
        let outer = 1 + self.below(3);
        let mut table = self.table(outer, 3);
        for group in &mut table {
            for option in &mut group.options[..2] {
                option.inner = (0..self.below(3)).map(|_| self.group(2)).collect();
            }
        }
        if let Some(inner) = table[0].options[0].inner.first_mut() {
            inner.options[0].inner = vec![self.group(2)];
        }
        table
    }
}

fn tree(table: &[Group]) -> Tree<'_> {
    Tree::new(table, &Limits::default()).unwrap()
}

fn full(table: &[Group]) -> u64 {
    let tree = tree(table);
    tree.totals(&tree.existing(&vec![0; tree.nodes.len()])).0.of(Quantity::Size)
}

/// The least error over every plan there is.
fn brute_force(table: &[Group], limits: &[(Quantity, u64)]) -> Option<f64> {
    let tree = tree(table);
    let mut picks = vec![0; tree.nodes.len()];
    let mut best: Option<f64> = None;
    loop {
        let choices = tree.existing(&picks);
        let error = tree.totals(&choices).1;
        if greedy::allowed(&tree, &choices, limits) && best.is_none_or(|b| error < b) {
            best = Some(error);
        }
        let Some(at) = (0..picks.len()).find(|&i| picks[i] + 1 < tree.nodes[i].group.options.len()) else {
            return best;
        };
        picks[..at].fill(0);
        picks[at] += 1;
    }
}

fn assert_best(table: &[Group], limits: Limits, solver: Solver, tolerance: f64) {
    match (brute_force(table, &limits.iter().collect::<Vec<_>>()), solve(table, &limits, solver)) {
        (Some(best), Ok(plan)) => {
            assert!(plan.objective - best <= tolerance * best + 1e-12, "{} {best}", plan.objective);
            assert!(plan.bound <= best + 1e-9 && best <= plan.objective + 1e-12, "{plan:?} {best}");
            let tree = tree(table);
            assert_eq!(tree.totals(&plan.choices), (plan.used, plan.objective));
            assert!(greedy::allowed(&tree, &plan.choices, &limits.iter().collect::<Vec<_>>()));
        }
        (None, Err(SolveError::Infeasible { .. })) => {}
        (best, found) => panic!("{best:?} {found:?}"),
    }
}

#[test]
fn pareto_is_as_good_as_trying_everything() {
    for seed in 0..200 {
        let mut random = Seeded(seed);
        let flat = random.table(1 + seed as usize % 6, 2 + seed as usize % 3);
        for table in [flat, random.nested()] {
            for share in [0.1, 0.4, 0.7, 0.9] {
                let bytes = (full(&table) as f64 * share) as u64;
                assert_best(&table, Limits::default().with(Quantity::Size, bytes), Solver::Auto, 1e-12);
            }
        }
    }
}

#[test]
fn the_bound_is_below_and_the_greedy_plan_above() {
    for seed in 0..20 {
        let table = Seeded(seed).table(30, 8);
        let (tree, limits) = (tree(&table), [(Quantity::Size, full(&table) * 6 / 10)]);
        let prices = [(Quantity::Size, greedy::price(&tree, Quantity::Size, limits[0].1))];
        let mut priced = greedy::at_prices(&tree, &prices);
        let bound = greedy::bound(&tree, &priced, &prices, &limits);
        greedy::improve(&tree, &mut priced.picks, &limits);
        let above = tree.totals(&tree.existing(&priced.picks)).1;
        let best = pareto::solve(&tree, Quantity::Size, limits[0].1);
        assert!(best.status == Status::Optimal && bound <= best.objective && best.objective <= above);
    }
}

#[test]
fn a_larger_budget_never_loses_more_and_the_whole_changes_nothing() {
    let table = Seeded(11).table(60, 12);
    let mut last = f64::INFINITY;
    for share in [40, 50, 60, 70, 80, 90, 100] {
        let plan =
            solve(&table, &Limits::default().with(Quantity::Size, full(&table) * share / 100), Solver::Auto).unwrap();
        assert!(plan.objective <= last);
        last = plan.objective;
        if share == 100 {
            assert_eq!((plan.objective, plan.choices), (0.0, vec![Some(0); 60]));
        }
    }
}

#[test]
fn says_what_can_be_reached() {
    let option =
        |bytes: u64, error| Item { cost: QuantityMap::default().with(Quantity::Size, bytes), error, ..Item::default() };
    let group = Group { name: "g".into(), options: vec![option(10, 0.0), option(4, 1.0)] };
    let table = vec![group.clone(), group];
    let message = solve(&table, &Limits::default().with(Quantity::Size, 7), Solver::Auto).unwrap_err().to_string();
    assert_eq!(message, "no plan fits: at least 8 bytes, 7 allowed");
}

#[test]
fn refuses_a_table_that_is_not_sound() {
    let message = |choice: Item, limits: Limits| {
        let groups = vec![Group { name: "mlp".into(), options: vec![choice] }];
        let table = groups;
        solve(&table, &limits, Solver::Auto).unwrap_err().to_string()
    };
    for error in [f64::NAN, -1.0, f64::INFINITY] {
        assert_eq!(
            message(Item { error, ..Item::default() }, Limits::default()),
            "group `mlp` has an option whose error is negative or not a finite number"
        );
    }
    assert_eq!(
        message(Item::default(), Limits::default().with(Quantity::Latency, 5)),
        "group `mlp` has an option whose latency was not measured"
    );
    assert_eq!(
        message(
            Item { cost: QuantityMap::default().with(Quantity::Size, 1 << 53), ..Item::default() },
            Limits::default()
        ),
        "group `mlp` takes the sum of all costs beyond 2^53"
    );
    let empty = vec![Group { name: "mlp".into(), options: vec![] }];
    let message = solve(&empty, &Limits::default(), Solver::Auto).unwrap_err().to_string();
    assert_eq!(message, "group `mlp` has no options");
}

#[test]
fn the_integer_programme_finds_what_the_pareto_programme_finds() {
    for seed in 0..200 {
        let mut random = Seeded(seed);
        let flat = random.table(2 + seed as usize % 9, 2 + seed as usize % 4);
        for table in [flat, random.nested()] {
            let limits = Limits::default().with(Quantity::Size, full(&table) * (4 + seed % 5) / 10);
            match (solve(&table, &limits, Solver::Pareto), solve(&table, &limits, Solver::Ilp)) {
                (Ok(exact), Ok(ilp)) => {
                    assert!(ilp.objective <= exact.objective * (1.0 + 2e-4) + 1e-9, "{seed} {exact:?} {ilp:?}");
                    assert!(exact.objective <= ilp.objective + 1e-12 && ilp.bound <= exact.objective + 1e-12);
                }
                (Err(a), Err(b)) => assert_eq!(a, b),
                (a, b) => panic!("{seed} {a:?} {b:?}"),
            }
        }
    }
}

#[test]
fn several_budgets_are_as_good_as_trying_everything() {
    for seed in 0..100 {
        let mut random = Seeded(seed);
        let flat = random.table(2 + seed as usize % 4, 3);
        for table in [flat, random.nested()] {
            let groups = tree(&table).nodes.len();
            let tree = tree(&table);
            let all = tree.totals(&tree.existing(&vec![0; groups])).0;
            let limits = Limits::default()
                .with(Quantity::Size, all.of(Quantity::Size) * 7 / 10)
                .with(Quantity::Latency, all.of(Quantity::Latency));
            assert_best(&table, limits, Solver::Auto, 2e-4);
        }
    }
}

#[test]
fn the_pareto_programme_says_where_it_does_not_apply() {
    let table = Seeded(1).table(2, 2);
    let limits = Limits::default().with(Quantity::Size, 1 << 40).with(Quantity::Flops, 1 << 40);
    let message = solve(&table, &limits, Solver::Pareto).unwrap_err().to_string();
    assert_eq!(message, "this solver takes one budget, found 2");
}

#[test]
fn many_sites_are_solved_to_the_end() {
    // Without optimization the arithmetic takes several times as long.
    let allowance = if cfg!(debug_assertions) { 20.0 } else { 1.0 };
    for (groups, options, seconds) in [(300, 40, 1.0), (5000, 15, 10.0)] {
        let table = Seeded(3).table(groups, options);
        let limits = Limits::default().with(Quantity::Size, full(&table) * 7 / 10);
        let start = std::time::Instant::now();
        let plan = solve(&table, &limits, Solver::Auto).unwrap();
        let (took, gap) = (start.elapsed().as_secs_f64(), table::share(plan.objective, plan.bound));
        assert!(plan.objective > 0.0 && gap <= 1e-3 && took < seconds * allowance, "{groups}: {took} s, {gap}");
    }
}

#[test]
fn one_share_for_all_is_never_better_than_the_best_plan() {
    for seed in 0..50 {
        let table = Seeded(seed).table(12, 8);
        let limits = Limits::default().with(Quantity::Size, full(&table) * 7 / 10);
        let (even, best) =
            (solve(&table, &limits, Solver::Uniform).unwrap(), solve(&table, &limits, Solver::Auto).unwrap());
        assert!(even.used.of(Quantity::Size) <= limits.of(Quantity::Size) && even.objective >= best.objective);
        assert!(even.bound <= best.objective + 1e-12);
    }
}
