//! The grid that follows a reference trajectory best, step by step.

/// The nodes that a sampler of exactly `steps` steps visits, first to last, so that the sum of its costs is smallest.
///
/// Nodes `0..nodes` are points of a reference trajectory, noisy ones first, and `nodes` is its end. `start[j]` is the cost
/// of taking the first state for node `j`, `jump(j, k)` that of going from node `j` to node `k > j` in one step. Costs add
/// up, which errors of a sampler do only roughly: the result is a good place to begin a search. `None` if there are fewer
/// nodes than steps, no steps, or no path of finite cost.
pub fn shortest(start: &[f64], jump: &dyn Fn(usize, usize) -> f64, steps: usize) -> Option<Vec<usize>> {
    let nodes = start.len();
    if steps == 0 || steps > nodes {
        return None;
    }
    // best[e][v]: the least cost of standing at v with e steps behind, and where the last of them began.
    let mut best: Vec<Vec<(f64, usize)>> = vec![start.iter().map(|&c| (c, 0)).collect()];
    for done in 1..=steps {
        let last = &best[done - 1];
        let reach = |to: usize| {
            let ways = (0..to.min(nodes)).map(|from| (last[from].0 + jump(from, to), from));
            ways.filter(|(cost, _)| cost.is_finite()).min_by(|a, b| a.0.total_cmp(&b.0))
        };
        // The last step goes to the end and no other does.
        let row = match done == steps {
            true => vec![reach(nodes)?],
            false => (0..nodes).map(|to| reach(to).unwrap_or((f64::INFINITY, 0))).collect(),
        };
        best.push(row);
    }
    let mut path = vec![best[steps][0].1];
    for done in (1..steps).rev() {
        let at = path[path.len() - 1];
        path.push(best[done][at].1);
    }
    path.reverse();
    Some(path)
}
